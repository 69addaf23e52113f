"Accuracies against counting by hand; what must not matter; predictions that cannot be evaluated."
import json
from itertools import product
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.core import ScreenError
from rcic_fastai.results.evaluate import ScreenResult, bootstrap_interval, evaluate, evaluate_screen, right_wrong
from rcic_fastai.results.plots import accuracy_plot
from rcic_fastai.embed.metrics import batch_predictability, perturbation_magnitude, replicate_consistency, retrieval_map
from rcic_fastai.embed.table import emb_metadata, make_emb_table, merge_sites, toy_profiles

EMB = toy_profiles(n_sirnas=24, dim=8, test=('HUVEC-17', 'RPE-08', 'RPE-09'))
TABLE = emb_metadata(EMB)
WELLS = TABLE[(TABLE.dataset == 'test') & (TABLE.well_type == 'treatment')].drop_duplicates('well_id').reset_index(drop=True)

def guess(seed=0, share=.5, protocol='inductive'):
    "Predictions of which about `share` are right"
    r = np.random.default_rng(seed)
    wrong = r.permutation(WELLS.sirna.to_numpy())
    return pd.DataFrame(dict(id_code=WELLS.well_id, sirna=np.where(r.random(len(WELLS)) < share, WELLS.sirna, wrong), protocol=protocol))

def by_hand(pred):
    truth = dict(zip(WELLS.well_id, WELLS.itertuples()))
    groups = {}
    for p in pred.itertuples():
        w = truth[p.id_code]
        for key in ('all', ('cell', w.cell_type), ('exp', w.experiment)): groups.setdefault(key, []).append(p.sirna == w.sirna)
    return {k: sum(v)/len(v) for k, v in groups.items()}

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_counted_by_hand(seed, share):
    pred = guess(seed, share)
    res, hand = evaluate(pred, TABLE), by_hand(pred)
    assert res['accuracy'] == pytest.approx(hand['all'])
    assert res['by_cell_type'] == pytest.approx({k[1]: v for k, v in hand.items() if k[0] == 'cell'})
    exps = {k[1]: v for k, v in hand.items() if k[0] == 'exp'}
    assert res['by_experiment'] == pytest.approx(exps)
    assert res['worst_experiment']['accuracy'] == pytest.approx(min(exps.values())) == pytest.approx(exps[res['worst_experiment']['experiment']])
    assert (res['n_wells'], res['n_classes'], res['chance'], res['n_missing'], res['protocol']) == (72, 24, 1/24, 0, 'inductive')

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_rows_does_not_matter(seed):
    shuffled = evaluate(guess().sample(frac=1, random_state=seed), TABLE.sample(frac=1, random_state=seed))
    assert json.dumps(shuffled, sort_keys=True) == json.dumps(evaluate(guess(), TABLE), sort_keys=True)

def test_names_of_experiments_do_not_matter():
    names = {e: f'X{9-i}' for i, e in enumerate(sorted(TABLE.experiment.unique()))}
    def renamed(s): return [f'{names[v.split("_")[0]]}_{v.split("_", 1)[1]}' for v in s]
    a = evaluate(guess(), TABLE)
    b = evaluate(guess().assign(id_code=renamed(WELLS.well_id)), TABLE.assign(well_id=renamed(TABLE.well_id), experiment=TABLE.experiment.map(names)))
    assert b['accuracy'] == a['accuracy'] and b['by_experiment'] == {names[e]: v for e, v in a['by_experiment'].items()}

def test_perfect_and_hopeless():
    assert evaluate(guess(share=1.), TABLE)['accuracy'] == 1
    assert evaluate(guess().assign(sirna=np.roll(WELLS.sirna, 1)), TABLE)['accuracy'] == 0

def test_json_and_any_target():
    res = evaluate(pd.DataFrame(dict(id_code=WELLS.well_id, cell_type='HUVEC', protocol='adapted')), TABLE, target='cell_type')
    assert json.loads(json.dumps(res))['by_cell_type'] == {'HUVEC': 1., 'RPE': 0.}
    assert res['accuracy'] == pytest.approx(1/3) and res['n_classes'] == 2

def test_named_controls_are_counted_on_their_own():
    everything = TABLE[TABLE.dataset == 'test'].drop_duplicates('well_id')
    control = everything.well_type != 'treatment'
    some = everything.sirna.where(~control | (np.arange(len(everything)) % 2 == 0), everything.sirna[control].iloc[0])
    pred = pd.DataFrame(dict(id_code=everything.well_id, sirna=some, protocol='inductive'))
    res, only = evaluate(pred, TABLE), evaluate(pred[~control.to_numpy()], TABLE)
    assert {k: v for k, v in res.items() if k not in ('n_controls', 'control_accuracy')} == only
    assert (res['n_wells'], res['n_classes'], res['n_controls'], res['accuracy']) == (72, 24, control.sum(), 1)
    assert res['control_accuracy'] == pytest.approx((some == everything.sirna)[control].mean()) and .3 < res['control_accuracy'] < 1
    shown = evaluate_screen(pred, TABLE)
    assert number(shown, 'control wells').value == control.sum() and number(shown, 'control accuracy').value == res['control_accuracy']
    assert number(shown, 'wells').value == 72 and 'control wells' not in evaluate_screen(guess(), TABLE).rows.measure.tolist()
    alone = evaluate(pred[control.to_numpy()], TABLE, partial=True)
    assert alone['n_wells'] == control.sum() and 'n_controls' not in alone
    with pytest.raises(ScreenError, match='is not predicted'): evaluate(pred[:-1], TABLE)

def test_partial():
    half = guess(share=1.)[::2]
    with pytest.raises(ScreenError, match='36 test wells are not predicted') as e: evaluate(half, TABLE)
    named = [w for w in WELLS.well_id[1::2] if w in str(e.value)]
    assert len(named) == 10
    assert evaluate(half, TABLE, partial=True)['n_missing'] == 36

def test_protocols_never_share_a_column():
    res = evaluate_screen([guess(0), guess(1, .9, 'transductive')], TABLE)
    assert list(res.table().columns) == list(res.columns) == ['inductive', 'transductive']
    with pytest.raises(ScreenError, match='share a column'): evaluate_screen([guess(0), guess(2)], TABLE)
    with pytest.raises(ScreenError, match='mix the protocols'): evaluate(pd.concat([guess(0)[:9], guess(1, .9, 'adapted')[9:]]), TABLE)

def test_right_wrong_stays_with_its_well():
    r = right_wrong(guess(3).sample(frac=1, random_state=1), TABLE).set_index('id_code')
    truth = WELLS.set_index('well_id')
    assert (r.truth == truth.sirna[r.index]).all() and (r.well == truth.well[r.index]).all() and (r.right == (r.predicted == r.truth)).all()

@pytest.mark.parametrize('spoil, says', [
    (lambda p: (pd.concat([p, p[:2]]), TABLE), '2 wells are predicted more than once'),
    (lambda p: (p.assign(id_code=['nowhere'] + p.id_code.tolist()[1:]), TABLE), 'nowhere'),
    (lambda p: (p, TABLE.assign(sirna=None)), 'no sirna label'),
    (lambda p: (p, TABLE.assign(sirna=TABLE.sirna.where(TABLE.well_id != p.id_code[0], None))), '1 of 72'),
    (lambda p: (p.assign(sirna=p.sirna.str.removeprefix('sirna_')), TABLE), 'name their classes differently'),
    (lambda p: (p.assign(sirna='no such siRNA'), TABLE), 'No predicted name .no such siRNA. is a sirna'),
    (lambda p: (p, TABLE.drop(columns='sirna')), 'The table has no column sirna'),
    (lambda p: (p[:0], TABLE), 'no predictions'),
    (lambda p: (p.drop(columns='sirna'), TABLE), 'no column sirna')])
def test_bad_input(spoil, says):
    with pytest.raises(ScreenError, match=says): evaluate(*spoil(guess()))

# ---- intervals

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_interval_of_three_experiments_is_that_of_all_27_draws(seed):
    r = np.random.default_rng(seed)
    wells = r.integers(5, 300, 3); right = r.integers(0, wells + 1)
    draws = np.sort([right[list(d)].sum()/wells[list(d)].sum() for d in product(range(3), repeat=3)])
    low, high = bootstrap_interval(right, wells, n_boot=20_000)
    assert draws[0] <= low <= draws[1] + 1e-9 and draws[-2] - 1e-9 <= high <= draws[-1]           # 2.5 % of 27 is less than one
    mid = bootstrap_interval(right, wells, n_boot=20_000, level=1/3)
    assert np.searchsorted(draws, mid[0] + 1e-9) in range(7, 13) and np.searchsorted(draws, mid[1] - 1e-9) in range(15, 21)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 20))
def test_interval_ignores_names_and_encloses_the_extremes(seed, n):
    r = np.random.default_rng(seed)
    wells = r.integers(5, 300, n); right = r.integers(0, wells + 1); order = r.permutation(n)
    a = bootstrap_interval(right, wells)
    assert bootstrap_interval(right[order], wells[order]) == a
    assert (right/wells).min() <= a[0] <= a[1] <= (right/wells).max()
    assert bootstrap_interval(right, wells, level=.5)[0] >= a[0]

def test_interval_covers_the_truth_about_as_often_as_it_says():
    r = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        p = np.clip(r.normal(.5, .1, 18), 0, 1)
        low, high = bootstrap_interval(r.binomial(277, p), np.full(18, 277), n_boot=400)
        hits += low <= .5 <= high
    assert .86 < hits/200 < .99

def test_one_experiment_has_no_interval():
    assert np.isnan(bootstrap_interval([3], [9])).all()
    for bad in (dict(level=1), dict(level=0), dict(n_boot=0)):
        with pytest.raises(ScreenError): bootstrap_interval([1, 2], [3, 4], **bad)

# ---- the whole screen

def candidates(pred, seed=0, k=5):
    "Predictions with k candidates: the answer, then others without repetition"
    r, every = np.random.default_rng(seed), sorted(WELLS.sirna.unique())
    rest = [[s, *r.permutation([o for o in every if o != s])[:k-1]] for s in pred.sirna]
    return pred.join(pd.DataFrame(rest, index=pred.index, columns=[f'top_{i+1}' for i in range(k)]))

def site_guess(seed=0, protocol='inductive', share=.5):
    s = TABLE[TABLE.well_id.isin(WELLS.well_id)]
    r = np.random.default_rng(seed)
    return pd.DataFrame(dict(id_code=s.site_id.values, sirna=np.where(r.random(len(s)) < share, s.sirna, r.permutation(s.sirna.to_numpy())), protocol=protocol))

def number(res, measure, column='inductive', group='all', name=''):
    d = res.rows
    return d[(d.measure == measure) & (d.column == column) & (d.group == group) & (d.name == name)].iloc[0]

TEST = EMB[EMB.Metadata_dataset == 'test']
RES = evaluate_screen([candidates(guess()), guess(1, .9, 'transductive')], TABLE, embeddings=dict(inductive=TEST), sites=dict(inductive=site_guess()), n_null=19)

def test_numbers_are_those_counted_by_hand():
    hand = by_hand(guess())
    assert number(RES, 'well accuracy').value == pytest.approx(hand['all'])
    for c in ('HUVEC', 'RPE'): assert number(RES, 'well accuracy', group='cell_type', name=c).value == pytest.approx(hand['cell', c])
    for e in WELLS.experiment.unique(): assert number(RES, 'well accuracy', group='experiment', name=e).value == pytest.approx(hand['exp', e])
    worst = RES.rows[(RES.rows.group == 'worst') & (RES.rows.measure == 'well accuracy') & (RES.rows.column == 'inductive')].iloc[0]
    assert worst.value == pytest.approx(min(v for k, v in hand.items() if k[0] == 'exp')) == pytest.approx(hand['exp', worst['name']])
    p, truth = candidates(guess()), dict(zip(WELLS.well_id, WELLS.sirna))
    assert number(RES, 'top-5 accuracy').value == pytest.approx(np.mean([truth[o.id_code] in o[3:8] for o in p.itertuples(index=False)]))
    s, truth = site_guess(), dict(zip(TABLE.site_id, TABLE.sirna))
    assert number(RES, 'site accuracy').value == pytest.approx(np.mean([truth[i] == a for i, a in zip(s.id_code, s.sirna)]))
    assert number(RES, 'site accuracy').n == len(s) and number(RES, 'chance').value == pytest.approx(1/24)
    assert number(RES, 'top-5 accuracy').chance == pytest.approx(5/24)

def test_intervals_and_how_many_experiments():
    row, one = number(RES, 'well accuracy'), number(RES, 'well accuracy', group='cell_type', name='HUVEC')
    hand = [sum(g.sirna == guess().sirna[g.index]) for _, g in WELLS.groupby('experiment')]
    assert (row.low, row.high) == bootstrap_interval(hand, WELLS.groupby('experiment').size()) and row.n_experiments == 3
    assert one.n_experiments == 1 and np.isnan(one.low)
    assert 'bootstrap over experiments, 2000 draws, seed 0' in repr(RES)

def test_chance_inside_the_group_is_for_transductive_columns_only():
    assert number(RES, 'chance inside the plate group', 'transductive').value == pytest.approx(4/24)
    assert 'inductive' not in RES.rows[RES.rows.measure == 'chance inside the plate group'].column.tolist()
    blind = evaluate_screen(guess(1, .9, 'transductive'), TABLE.assign(plate_group=pd.NA))
    assert 'chance inside the plate group' not in blind.rows.measure.tolist()

def test_embedding_measures_are_those_of_the_functions():
    e = merge_sites(TEST)
    for measure, (f, key) in {'retrieval mAP': (lambda: retrieval_map(e, within='cell_type'), 'map'), 'retrieval mAP among other experiments': (lambda: retrieval_map(e, within='cell_type', negatives='other'), 'map'),
                              'replicate consistency': (lambda: replicate_consistency(e, within='cell_type', n_null=19), 'consistency'),
                              'batch predictability (lower is better)': (lambda: batch_predictability(e), 'accuracy'),
                              'perturbation magnitude': (lambda: perturbation_magnitude(e, n_null=19), 'coefficient')}.items():
        assert number(RES, measure).value == pytest.approx(f()[0][key], abs=1e-6), measure
    assert not RES.rows[(RES.rows.column == 'transductive')].measure.str.contains('retrieval').any()

def test_labels_of_embeddings_are_taken_from_the_table():
    blind = TEST.assign(Metadata_sirna=None, Metadata_sirna_id=None, Metadata_well_type='treatment', Metadata_plate=0)
    a = evaluate_screen(guess(), TABLE, embeddings=blind, n_null=19)
    assert number(a, 'retrieval mAP').value == number(RES, 'retrieval mAP').value and number(a, 'perturbation magnitude').value == number(RES, 'perturbation magnitude').value
    everything = evaluate_screen(guess(), TABLE, embeddings=EMB, n_null=19)          # training rows are left out
    pd.testing.assert_frame_equal(everything.rows, a.rows)

def test_what_cannot_be_measured_is_said():
    treated = TEST[TEST.Metadata_well_type == 'treatment']
    few = evaluate_screen(guess()[WELLS.experiment == 'HUVEC-17'], TABLE, embeddings=treated, partial=True, n_null=9)
    text = repr(few)
    assert 'share of siRNAs unlike controls: so few wells cannot reach p' in repr(RES)
    assert 'retrieval needs at least two' in text and 'has two experiments' in text and 'no negative_control' in text and 'top-5 accuracy needs' in text
    assert number(few, 'well accuracy').n == 24 and not few.rows.measure.str.contains('mAP').any()

def test_order_of_everything_does_not_matter():
    mix = lambda d: d.sample(frac=1, random_state=5)
    other = evaluate_screen([mix(candidates(guess())), mix(guess(1, .9, 'transductive'))], mix(TABLE), embeddings=dict(inductive=mix(TEST)), sites=dict(inductive=mix(site_guess())), n_null=19)
    pd.testing.assert_frame_equal(other.rows, RES.rows)
    assert repr(other) == repr(RES)

def test_names_of_experiments_do_not_matter_to_intervals():
    names = dict(zip(sorted(TABLE.experiment.unique()), 'zyxwvut'))
    new = lambda ids: [names[i.split('_')[0]] + i[i.index('_'):] for i in ids]
    a = evaluate_screen(guess(), TABLE)
    b = evaluate_screen(guess().assign(id_code=new(WELLS.well_id)), TABLE.assign(well_id=new(TABLE.well_id), site_id=new(TABLE.site_id), experiment=TABLE.experiment.map(names)))
    for c in ('value', 'low', 'high', 'n', 'n_experiments'):
        for group in ('all', 'cell_type'): pd.testing.assert_series_equal(a.rows[a.rows.group == group][c], b.rows[b.rows.group == group][c])

def test_blank_labels_of_wells_that_are_not_predicted_change_nothing():
    blank = TABLE.assign(sirna=TABLE.sirna.where(TABLE.well_id.isin(WELLS.well_id) | (TABLE.dataset == 'train'), None))
    pd.testing.assert_frame_equal(evaluate_screen(guess(), blank).rows, evaluate_screen(guess(), TABLE).rows)

def test_columns_say_their_protocol():
    assert list(RES.table().columns) == ['inductive', 'transductive']
    two = evaluate_screen({'small': guess(), 'large': guess(2, .7), 'adapted': guess(3, .7, 'adapted')}, TABLE)
    assert list(two.table().columns) == ['small (inductive)', 'large (inductive)', 'adapted']
    assert evaluate_screen(guess(), TABLE).table().shape[1] == 1

def test_text_html_and_json(tmp_path):
    text, html = repr(RES), RES._repr_html_()
    for o in ('inductive', 'transductive', 'worst experiment', 'top-5 accuracy', 'HUVEC-17'): assert o in text and o in html
    data = json.loads(RES.to_json(tmp_path/'r.json'), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert json.loads((tmp_path/'r.json').read_text()) == data == json.loads(RES.to_json())
    assert data['columns']['inductive']['accuracy'] == pytest.approx(number(RES, 'well accuracy').value)
    assert len(data['rows']) == len(RES.rows) and {r['protocol'] for r in data['rows']} == {'inductive', 'transductive'}
    assert len(RES.table(full=True)) > len(RES.table()) and isinstance(RES, ScreenResult)
    import matplotlib.pyplot as plt
    plt.close(accuracy_plot(RES))

def test_controls_and_other_targets():
    w = TABLE[TABLE.dataset == 'test'].drop_duplicates('well_id')
    controls = evaluate_screen(pd.DataFrame(dict(id_code=w.well_id, sirna=w.sirna, protocol='transductive')), TABLE)
    assert number(controls, 'wells', 'transductive').value == 72 and number(controls, 'control wells', 'transductive').value == len(w) - 72
    cells = evaluate_screen(pd.DataFrame(dict(id_code=WELLS.well_id, cell_type='HUVEC', protocol='adapted')), TABLE, target='cell_type')
    assert number(cells, 'well accuracy', 'adapted').value == pytest.approx(1/3)

def test_candidates_may_be_fewer_than_five_when_classes_are():
    w = TABLE[TABLE.dataset == 'test'].drop_duplicates('well_id')
    two = pd.DataFrame(dict(id_code=w.well_id, cell_type='HUVEC', protocol='inductive', top_1='HUVEC', top_2='RPE'))
    res = evaluate_screen(two, TABLE, target='cell_type')
    assert number(res, 'top-5 accuracy').value == 1 == number(res, 'top-5 accuracy').chance
    three = candidates(guess())[[c for c in candidates(guess()) if c not in ('top_4', 'top_5')]]
    assert 'the predictions have 3' in repr(evaluate_screen(three, TABLE)) and number(evaluate_screen(three, TABLE, k=3), 'top-3 accuracy').n == 72

def test_rank_is_where_the_truth_is():
    r = right_wrong(candidates(guess(4)), TABLE)
    p = candidates(guess(4)).set_index('id_code')
    for o in r.itertuples():
        tops = p.loc[o.id_code, [f'top_{i}' for i in range(1, 6)]].tolist()
        assert (pd.isna(o.rank) and o.truth not in tops) or tops[o.rank - 1] == o.truth
    assert ((r['rank'] == 1).fillna(False) == r.right).all()

G = guess()
@pytest.mark.parametrize('call, says', [
    (lambda: evaluate_screen([G, guess(1)], TABLE), '2 predictions have the protocol inductive'),
    (lambda: evaluate_screen(pd.concat([G[:9], guess(1, .9, 'adapted')[9:]]), TABLE), 'mix the protocols inductive, adapted'),
    (lambda: evaluate_screen([], TABLE), 'no predictions'), (lambda: evaluate_screen({}, TABLE), 'no predictions'),
    (lambda: evaluate_screen('sub.csv', TABLE), 'are a str'), (lambda: evaluate_screen(['sub.csv'], TABLE), 'are a str'),
    (lambda: evaluate_screen(G.drop(columns='protocol'), TABLE), 'not known how prediction 1 was made'),
    (lambda: evaluate_screen({'mine': G.assign(protocol='unknown')}, TABLE), 'not known how mine was made'),
    (lambda: evaluate_screen({'adapted': G}, TABLE), "'adapted' holds inductive"),
    (lambda: evaluate_screen(G[1:], TABLE), '1 test well is not predicted'),
    (lambda: evaluate_screen(G, TABLE, embeddings=dict(adapted=TEST)), "embeddings for 'adapted', which has no predictions"),
    (lambda: evaluate_screen(G, TABLE, embeddings=[TEST, TEST]), '2 embeddings for 1 prediction'),
    (lambda: evaluate_screen([G, guess(1, .9, 'adapted')], TABLE, embeddings=TEST), '1 embeddings for 2 predictions'),
    (lambda: evaluate_screen(G, TABLE, embeddings=TEST.assign(Metadata_well_id='x')), 'not in the screen'),
    (lambda: evaluate_screen(G, TABLE, sites=site_guess(protocol='adapted')), 'are adapted, but its wells are inductive'),
    (lambda: evaluate_screen(G, TABLE, sites=site_guess()[5:]), 'have no site prediction'),
    (lambda: evaluate_screen(G, TABLE, sites=G), 'not in the screen'),
    (lambda: evaluate_screen(G[:-1], TABLE, sites=site_guess(), partial=True), 'sites of 1 well that are not predicted'),
    (lambda: evaluate_screen(candidates(G).assign(top_1='sirna_0'), TABLE), 'top_1 must equal sirna'),
    (lambda: evaluate_screen(candidates(G).drop(columns='top_2'), TABLE), 'without a gap'),
    (lambda: evaluate_screen(G, TABLE, level=95), 'level=95'),
    (lambda: evaluate_screen(G.assign(sirna=G.sirna.str[6:]), TABLE), 'name their classes differently')])
def test_what_evaluate_screen_rejects(call, says):
    with pytest.raises(ScreenError, match=says) as e: call()
    assert '\n' not in str(e.value) and str(e.value).endswith('.')

def test_chance_inside_the_group_needs_no_group_of_the_test_plates():
    "RxRx1 says the plate groups of the training experiments only"
    pred = guess(1, .9, 'transductive')
    bare = TABLE.assign(plate_group=TABLE.plate_group.mask(TABLE.dataset == 'test'))
    given, derived = (number(evaluate_screen(pred, t), 'chance inside the plate group', 'transductive').value for t in (TABLE, bare))
    assert given == derived == pytest.approx(1/6, abs=.1)
    none = TABLE.assign(plate_group=pd.array([pd.NA]*len(TABLE), 'Int64'))
    assert 'chance inside the plate group' not in evaluate_screen(pred, none).rows.measure.tolist()

@pytest.mark.parametrize('column, marks, fine', [('inductive', 'adapted', False), ('inductive', 'transductive', False), ('adapted', 'transductive', False),
                                                 ('inductive', 'inductive', True), ('adapted', 'adapted', True), ('transductive', 'adapted', True), ('inductive', None, True)])
def test_embeddings_used_no_more_than_their_column(column, marks, fine):
    w = TABLE[(TABLE.dataset == 'test') & (TABLE.site == 1)].reset_index(drop=True)
    emb = make_emb_table(w.assign(protocol='inductive'), np.random.default_rng(0).normal(size=(len(w), 8)))
    if marks is None: emb = emb.drop(columns='Metadata_protocol')
    else: emb.loc[3, 'Metadata_protocol'] = marks
    call = lambda: evaluate_screen(guess(1, .9, column), TABLE, embeddings=emb, n_boot=9, n_null=9)
    if fine: assert column in call().columns
    else:
        with pytest.raises(ScreenError, match=f"embeddings of '{column}' are {marks}"): call()

def test_a_note_of_several_columns_is_said_once():
    short = {n: candidates(guess())[[c for c in candidates(guess()) if c not in ('top_4', 'top_5')]] for n in 'ab'}
    assert evaluate_screen(short, TABLE).notes == ['a (inductive), b (inductive): top-5 accuracy needs the candidates top_1 … top_5, and the predictions have 3.']

def test_wrong_kinds_of_input():
    near = pd.DataFrame(dict(query=['a'], cosine=[.1]))
    with pytest.raises(ScreenError, match='give only the first'): evaluate_screen((guess(), near), TABLE)
    with pytest.raises(ScreenError, match='screen is a str'): evaluate_screen(guess(), 'screen')


@pytest.mark.parametrize('makers, judged', [([['HUVEC-01']], []), ([['HUVEC-01'], ['HUVEC-17']], ['HUVEC-17']), ([['HUVEC-01'], None], ['HUVEC-17', 'RPE-08', 'RPE-09']), ([], ['HUVEC-17', 'RPE-08', 'RPE-09'])])
def test_new_batches_that_are_not_marked_are_no_training_experiments(makers, judged):
    "The record says which experiments each model saw; where one does not say, all may be"
    pred, table = guess(), TABLE.assign(dataset='train')
    pred.attrs['record'] = dict(ensemble=[dict(made_by={'': {'fingerprint': 'f', **({} if m is None else dict(seen=m))}}) for m in makers])
    assert evaluate(pred, table).get('held_out', []) == judged
