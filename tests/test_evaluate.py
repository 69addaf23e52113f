"Accuracies against counting by hand; what must not matter; predictions that cannot be evaluated."
import json
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.metadata import ScreenError
from rcic_fastai.evaluate import accuracy_table, evaluate, right_wrong
from rcic_fastai.profiles import emb_metadata, toy_profiles

TABLE = emb_metadata(toy_profiles(n_sirnas=24, dim=4, test=('HUVEC-17', 'RPE-08', 'RPE-09')))
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
    assert evaluate(guess().assign(sirna='no such siRNA'), TABLE)['accuracy'] == 0

def test_json_and_any_target():
    res = evaluate(pd.DataFrame(dict(id_code=WELLS.well_id, cell_type='HUVEC', protocol='adapted')), TABLE, target='cell_type')
    assert json.loads(json.dumps(res))['by_cell_type'] == {'HUVEC': 1., 'RPE': 0.}
    assert res['accuracy'] == pytest.approx(1/3) and res['n_classes'] == 2

def test_controls_count_only_when_predicted():
    everything = TABLE[TABLE.dataset == 'test'].drop_duplicates('well_id')
    pred = pd.DataFrame(dict(id_code=everything.well_id, sirna=everything.sirna, protocol='inductive'))
    res = evaluate(pred, TABLE)
    assert (res['n_wells'], res['n_classes']) == (len(everything), 27)
    assert evaluate(guess(), TABLE)['n_wells'] == 72

def test_partial():
    half = guess(share=1.)[::2]
    with pytest.raises(ScreenError, match='36 test wells are not predicted') as e: evaluate(half, TABLE)
    named = [w for w in WELLS.well_id[1::2] if w in str(e.value)]
    assert len(named) == 10
    assert evaluate(half, TABLE, partial=True)['n_missing'] == 36

def test_protocols_never_share_a_column():
    a, b = evaluate(guess(0), TABLE), evaluate(guess(1, .9, 'transductive'), TABLE)
    t = accuracy_table(a, b)
    assert list(t.columns) == ['inductive', 'transductive']
    assert t.loc['all wells'].tolist() == [a['accuracy'], b['accuracy']]
    with pytest.raises(ScreenError, match='share a column'): accuracy_table(a, evaluate(guess(2), TABLE))
    with pytest.raises(ScreenError, match='mix the protocols'): evaluate(pd.concat([guess(0)[:9], guess(1, .9, 'adapted')[9:]]), TABLE)

def test_right_wrong_stays_with_its_well():
    r = right_wrong(guess(3).sample(frac=1, random_state=1), TABLE).set_index('id_code')
    truth = WELLS.set_index('well_id')
    assert (r.truth == truth.sirna[r.index]).all() and (r.well == truth.well[r.index]).all() and (r.right == (r.predicted == r.truth)).all()

@pytest.mark.parametrize('spoil, says', [
    (lambda p: (pd.concat([p, p[:2]]), TABLE), '2 well.s. are predicted more than once'),
    (lambda p: (p.assign(id_code=['nowhere'] + p.id_code.tolist()[1:]), TABLE), 'nowhere'),
    (lambda p: (p, TABLE.assign(sirna=None)), 'no sirna label'),
    (lambda p: (p, TABLE.assign(sirna=TABLE.sirna.where(TABLE.well_id != p.id_code[0], None))), '1 of 72'),
    (lambda p: (p[:0], TABLE), 'no predictions'),
    (lambda p: (p.drop(columns='sirna'), TABLE), 'no column sirna')])
def test_bad_input(spoil, says):
    with pytest.raises(ScreenError, match=says): evaluate(*spoil(guess()))
