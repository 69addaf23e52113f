"How sure an answer is: what is learned from held-out experiments, and what is refused."
import json
from functools import lru_cache
import numpy as np, pandas as pd, pytest
from helpers import refused
from rcic_fastai import cli
from rcic_fastai.core import ScreenError, file_facts, read_json
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import emb_metadata, toy_profiles
from rcic_fastai.predict.ensemble import ensemble_files, name_wells
from rcic_fastai.predict.predict import write_predictions
from rcic_fastai.predict.scores import SCORE, score_classes, score_matrix, score_wells, scores_path, write_scores
from rcic_fastai.results.confidence import (chance_of, confidence_files, covering_level, fit_chance, fit_confidence, fit_temperature,
                                            forecast_accuracy, judge_confidence, name_probabilities)
from rcic_fastai.screen.screen import Screen

TRAIN, NEW = [f'HUVEC-{i:02d}' for i in range(1, 11)], ['HUVEC-11', 'HUVEC-12', 'RPE-01']
EMB = toy_profiles(TRAIN, NEW, n_sirnas=24, signal=.7, seed=2)
META = emb_metadata(EMB)
TABLE = META.assign(sirna=META.sirna.astype(str))
TREATED = META.well_type == 'treatment'

def scores(asked, known, protocol='inductive', **kwargs):
    "Scores of wells whose plate groups nobody knows"
    asked = EMB[asked].assign(Metadata_plate_group=pd.array([pd.NA]*int(asked.sum()), dtype='Int64'))
    return score_wells(asked, EmbeddingIndex(EMB[known & TREATED]), protocol, **kwargs)

@lru_cache(None)
def of_treated(which, protocol, **kwargs): return which(protocol, TREATED, **kwargs)

def each_held(protocol, wells, **kwargs):
    is_train = META.dataset == 'train'
    return [scores(wells & (META.experiment == e), is_train & (META.experiment != e), protocol, **kwargs) for e in TRAIN]

def all_new(protocol, wells, **kwargs): return scores(wells & (META.dataset == 'test'), META.dataset == 'train', protocol, **kwargs)

def held(protocol='inductive', **kwargs):
    "Scores of each held-out experiment; those of treated wells are made once, and each test has copies"
    return [t.copy() for t in of_treated(each_held, protocol, **kwargs)] if 'wells' not in kwargs else each_held(protocol, **kwargs)

def new(protocol='inductive', **kwargs): return of_treated(all_new, protocol, **kwargs).copy() if 'wells' not in kwargs else all_new(protocol, **kwargs)

HELD, ASKED = held(), new()

def with_attrs(t, like):
    t.attrs.update(like.attrs)
    return t

def test_labels_of_the_new_wells_are_not_read():
    blind = TABLE.assign(sirna=TABLE.sirna.where(TABLE.dataset == 'train'))
    a, b = (fit_confidence(HELD, t).answers(ASKED) for t in (TABLE, blind))
    pd.testing.assert_frame_equal(a, b)

def test_labels_of_held_out_wells_are():
    wrong = TABLE.assign(sirna=np.where(TABLE.dataset == 'train', np.roll(TABLE.sirna, 8), TABLE.sirna))
    assert fit_confidence(HELD, wrong).answers(ASKED).chance.mean() < fit_confidence(HELD, TABLE).answers(ASKED).chance.mean() - .2

@pytest.mark.parametrize('coverage', [.5, .8, .95])
def test_sets_cover_the_held_out_wells_as_asked(coverage):
    conf = fit_confidence(HELD, TABLE, coverage)
    shares = []
    for t in HELD:
        p = name_probabilities(t, name_wells(t), conf.temperature)
        truth = TABLE.drop_duplicates('well_id').set_index('well_id').sirna[t.id_code]
        shares.append((p[np.arange(len(t)), pd.Index(score_classes(t)).get_indexer(truth)] >= 1 - conf.level - 1e-12).mean())
    assert coverage <= np.mean(shares) < coverage + .02

def test_more_coverage_takes_larger_sets_of_the_same_answers():
    small, large, sure = (fit_confidence(HELD, TABLE, c, g).answers(ASKED) for c, g in ((.6, False), (.9, False), (.9, True)))
    assert (small.n_names <= large.n_names).all() and (large.n_names <= sure.n_names).all() and small.n_names.sum() < large.n_names.sum() < sure.n_names.sum()
    assert all(a.split('|')[0] == b for a, b in zip(small.names, small.sirna)) and (small.chance == large.chance).all()

@pytest.mark.parametrize('protocol, assign', [('inductive', True), ('transductive', True), ('transductive', False)])
def test_what_is_said_holds_about(protocol, assign):
    conf = fit_confidence(held(protocol, assign=assign), TABLE)
    res, per = judge_confidence(conf.answers(new(protocol, assign=assign)), TABLE)
    assert abs(res['expected'] - res['accuracy']) < .12 and res['coverage'] > .78 and len(per) == len(NEW)

def test_only_names_of_the_plates_group_are_in_its_sets():
    asked = new('transductive')
    ans = fit_confidence(held('transductive'), TABLE, .99).answers(asked)
    group_of = TABLE[TREATED].drop_duplicates('sirna').set_index('sirna').plate_group
    found = name_wells(asked).set_index('id_code').plate_group
    for r in ans.itertuples(): assert {group_of[n] for n in r.names.split('|')} == {found[r.id_code]}

def test_probabilities_as_scores_are_read_as_logarithms():
    def softened(t):
        z = np.exp(score_matrix(t)/.05)
        t = with_attrs(t.assign(**dict(zip([c for c in t if c.startswith(SCORE)], (z/z.sum(1, keepdims=True)).T))), t)
        t.attrs['kind'] = 'probability'
        return t
    a, b = fit_confidence(HELD, TABLE).answers(ASKED), fit_confidence([softened(t) for t in HELD], TABLE).answers(softened(ASKED))
    assert np.abs(a.chance - b.chance).max() < .01 and (a.n_names == b.n_names).mean() > .95

def test_controls_are_left_out():
    everything = META.well_type.notna()
    assert (new(wells=everything).well_type != 'treatment').any()
    a, b = fit_confidence(HELD, TABLE).answers(ASKED), fit_confidence(held(wells=everything), TABLE).answers(new(wells=everything))
    pd.testing.assert_frame_equal(a, b)

def test_labels_that_were_never_learned_are_counted_and_not_learned_from():
    odd = TABLE.assign(sirna=TABLE.sirna.mask((TABLE.experiment == TRAIN[0]) & (TABLE.plate == 1), 'something else'))
    conf = fit_confidence(HELD, odd)
    n = int((TREATED & (odd.sirna == 'something else')).groupby(odd.well_id).any().sum())
    assert conf.held.wells.sum() == sum(map(len, HELD)) - n and f'{n} held-out wells have labels that their model never learned' in conf.notes[0]

def test_plates_that_do_not_settle_are_judged_well_by_well(monkeypatch):
    import rcic_fastai.results.confidence as module
    def fails(*args): raise ScreenError('not balanced')
    monkeypatch.setattr(module, 'balance_plate', fails)
    t = new('transductive')
    p, s = name_probabilities(t, name_wells(t), .05), module.possible_scores(t, name_wells(t).plate_group)
    assert np.array_equal(p, module.softmax_at(s, .05))

def test_wells_without_a_known_label_still_fill_their_plate():
    "A plate is balanced whole, whatever is known of its wells"
    t = held('transductive')
    odd = TABLE.assign(sirna=TABLE.sirna.mask((TABLE.experiment == TRAIN[0]) & (TABLE.well_id.isin(t[0].id_code[::3])), 'something else'))
    import rcic_fastai.results.confidence as module
    whole, part = (module._of_experiments(t[:1], x)[0][TRAIN[0]][0] for x in (TABLE, odd))
    assert np.allclose(module._stated(part, .05)[0], module._stated(whole, .05)[0][part.keep]) and 0 < part.keep.mean() < 1

def test_other_names_are_refused():
    few = [with_attrs(t[[c for c in t if not c.startswith(SCORE)] + [c for c in t if c.startswith(SCORE)][:6]], t) for t in (ASKED, HELD[0])]
    refused(lambda: fit_confidence(HELD, TABLE).answers(few[0]), 'The new answers choose among 6 names and the held-out ones among 24')
    refused(lambda: fit_confidence([few[1], *HELD[1:]], TABLE), 'Some held-out answers choose among')

def test_a_cell_type_that_was_never_held_out_is_said():
    ans = fit_confidence(HELD, TABLE).answers(ASKED)
    assert ans.attrs['unknown'] == ['RPE-01'] and 'No experiment of RPE was held out' in ans.attrs['notes'][0]
    assert forecast_accuracy(ans, .05).set_index('experiment').error.isna().to_dict() == {'HUVEC-11': False, 'HUVEC-12': False, 'RPE-01': True}

def test_groups_that_were_given_say_nothing_of_those_that_are_inferred():
    is_train = META.dataset == 'train'
    given = [score_wells(EMB[TREATED & (META.experiment == e)], EmbeddingIndex(EMB[is_train & TREATED & (META.experiment != e)]), 'transductive') for e in TRAIN]
    refused(lambda: fit_confidence(given, TABLE).answers(new('transductive')), 'plate groups of the new wells were inferred and those of the held-out ones given')

def test_names_that_are_not_possible_are_in_no_set():
    "One held-out experiment whose groups were inferred wrongly makes the sets whole plates, and that is said"
    t = held('transductive')
    wrong = t[0].assign(**{c: t[0][c].to_numpy()[np.random.default_rng(0).permutation(len(t[0]))] for c in t[0] if c.startswith(SCORE)})
    conf = fit_confidence([with_attrs(wrong, t[0]), *t[1:]], TABLE, .95)
    ans = conf.answers(new('transductive'))
    assert conf.level == 1 and any('all names of a plate' in n for n in conf.notes) and ans.n_names.max() <= 6

def test_labels_for_testing_are_not_read():
    refused(lambda: fit_confidence(HELD, TABLE.assign(dataset=TABLE.dataset.mask(TABLE.experiment == TRAIN[0], 'id_test'))), f'{TRAIN[0]} is there for testing')
    second = TABLE.assign(dataset=TABLE.dataset.mask((TABLE.dataset == 'train') & (TABLE.site == 2), 'id_test'))       # as WILDS divides a well
    assert fit_confidence(HELD, second).held.wells.sum() == sum(map(len, HELD))

def test_an_experiment_in_two_files_counts_once():
    halves = [with_attrs(HELD[0].iloc[k::2].reset_index(drop=True), HELD[0]) for k in (0, 1)]
    a, b = fit_confidence(HELD, TABLE), fit_confidence([*halves, *HELD[1:]], TABLE)
    assert np.isclose(a.temperature, b.temperature, rtol=1e-4) and np.isclose(a.slope, b.slope, rtol=1e-3)

def test_a_file_of_controls_only_is_passed_over():
    everything = META.well_type.notna()
    controls = held(wells=everything)[0]
    controls = with_attrs(controls[controls.well_type != 'treatment'].reset_index(drop=True), controls)
    assert len(fit_confidence([controls, *HELD[1:]], TABLE).held) == len(HELD) - 1
    refused(lambda: fit_confidence([controls], TABLE), 'No held-out well has a label')

@pytest.mark.parametrize('change, words', [
    (dict(coverage='.9'), ['is no share of wells']), (dict(coverage=1.), ['coverage=1.0 is no share of wells']), (dict(coverage=0), ['coverage=0 is no share']),
    (dict(coverage=.95, guarantee=True), ['needs 19 held-out experiments or more and there are 10', 'leave guarantee=True out'])])
def test_shares_that_cannot_be_kept(change, words): refused(lambda: fit_confidence(HELD, TABLE, **change), *words)

def test_a_guarantee_for_nine_tenths_needs_nine(): assert fit_confidence(HELD[:9], TABLE, .9, True).guarantee

def test_the_level_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=200), rng.integers(0, 7, 200)
    order = rng.permutation(200)
    assert covering_level(x, e) == covering_level(x[order], e[order])

def test_each_experiment_counts_alike():
    "By hand: three wells of one experiment and one of another; and a regression with the weights written out"
    from sklearn.linear_model import LogisticRegression
    import rcic_fastai.results.confidence as module
    missed, of = [.1, .2, .3, .9], ['a', 'a', 'a', 'b']
    assert [covering_level(missed, of, c) for c in (.3, .5, .51)] == [.2, .3, .9]
    rng = np.random.default_rng(3)
    p = {e: rng.uniform(.05, .95, n) for e, n in (('a', 300), ('b', 30))}
    right = {'a': rng.random(300) < p['a'], 'b': rng.random(30) < .2 + .3*p['b']}
    x = np.concatenate([np.log(q/(1 - q)) for q in p.values()])[:, None]
    want = LogisticRegression(C=100).fit(x, np.concatenate([*right.values()]), sample_weight=np.repeat([330/2/300, 330/2/30], [300, 30]))
    assert module._fit_chances(p, right) == pytest.approx((want.coef_[0, 0], want.intercept_[0]), rel=1e-3)

def test_the_temperature_is_the_best_of_all_experiments_and_of_names_that_are_possible():
    rng = np.random.default_rng(5)
    parts = [(rng.normal(size=(40, 6)), rng.integers(0, 6, 40)) for _ in range(3)]
    for (s, at), sure in zip(parts, (2., 1., .5)): s[np.arange(40), at] += sure
    def loss(t): return np.mean([np.mean(np.log(np.exp(s/t).sum(1)) - s[np.arange(len(at)), at]/t) for s, at in parts])
    best = fit_temperature(parts)
    assert loss(best) <= min(map(loss, best*np.array([.9, .95, 1.05, 1.1])))
    impossible = [(np.vstack([s, np.where(np.arange(6) == 2, -np.inf, 0)]), np.append(at, 2)) for s, at in parts]
    assert fit_temperature(impossible) == pytest.approx(best, rel=1e-3)

def test_chances_where_nothing_can_be_learned_of_how_sure_answers_are():
    sure = np.linspace(.1, .9, 9)
    assert fit_chance(sure, np.ones(9)) == (0., pytest.approx(np.log(9.5/.5))) and fit_chance(sure, np.zeros(9)) == (0., pytest.approx(np.log(.5/9.5)))
    slope, intercept = fit_chance(sure, sure < .4)                           # the surer, the less often right
    assert slope == 0 and chance_of(sure, slope, intercept) == pytest.approx(np.full(9, 3/9))
    assert chance_of([.001, .5, .999], 1, 0) == pytest.approx([.001, .5, .999])

def test_a_forecast_of_a_held_out_experiment_does_not_know_its_labels(monkeypatch):
    import rcic_fastai.results.confidence as module
    monkeypatch.setattr(module, '_temperature_of', lambda parts: .1)
    names = TABLE.sirna[TREATED].unique()
    wrong = TABLE.assign(sirna=TABLE.sirna.mask((TABLE.experiment == TRAIN[0]) & TREATED, TABLE.sirna.map(dict(zip(names, np.roll(names, 1))))))
    a, b = (fit_confidence(HELD, t).held.set_index('experiment') for t in (TABLE, wrong))
    assert a.accuracy[TRAIN[0]] > b.accuracy[TRAIN[0]] and a.forecast[TRAIN[0]] == b.forecast[TRAIN[0]]
    assert (a.forecast[TRAIN[1:]] > b.forecast[TRAIN[1:]]).all()

def test_what_is_judged_by_hand():
    wells = TABLE[TREATED & (TABLE.experiment == NEW[0])].drop_duplicates('well_id').head(4)
    other = [n for n in TABLE.sirna[TREATED].unique() if n not in set(wells.sirna)][0]
    said = [wells.sirna.iloc[0], wells.sirna.iloc[1], other, other]
    ans = pd.DataFrame(dict(id_code=wells.well_id.to_numpy(), sirna=said, chance=[.9, .6, .5, .2], names=[said[0], said[1], f'{other}|{wells.sirna.iloc[2]}', other],
                            n_names=[1, 1, 2, 1], experiment=NEW[0], protocol='inductive'))
    ans.attrs.update(target='sirna')
    res, per = judge_confidence(ans, TABLE)
    want = dict(wells=4, accuracy=.5, expected=.55, brier=(.01 + .16 + .25 + .04)/4, coverage=.75, n_names=1.25, forecast_error=.05,
                by_chance=(2/np.pi)**.5*(.09 + .24 + .25 + .16)**.5/4)                 # the mean of |z| is √(2/π)
    assert res == pytest.approx(want) and per[['accuracy', 'forecast']].to_numpy().tolist() == [[.5, pytest.approx(.55)]]

def test_assigned_answers_come_first_in_their_sets_and_others_are_not_balanced():
    ans = fit_confidence(held('transductive'), TABLE).answers(new('transductive'))
    assert all(n.split('|')[0] == o for n, o in zip(ans.names, ans.sirna))
    import rcic_fastai.results.confidence as module
    free = new('transductive', assign=False)
    pred = name_wells(free)
    assert np.array_equal(name_probabilities(free, pred, .05), module.softmax_at(module.possible_scores(free, pred.plate_group), .05))

def test_few_experiments_those_marked_val_and_the_error_of_forecasts():
    marked = TABLE.assign(dataset=TABLE.dataset.mask(TABLE.experiment == TRAIN[0], 'val'))
    conf = fit_confidence(HELD[:3], marked)
    assert len(conf.held) == 3 and any('3 experiments were held out' in n for n in conf.notes)
    assert conf.error == pytest.approx(np.mean([abs(a - b) for a, b in zip(conf.held.forecast, conf.held.accuracy)])) and conf.error > 0
    assert not any('held out, which says little' in n for n in fit_confidence(HELD[:4], TABLE).notes)

def test_answers_of_another_kind_and_wells_of_no_experiment_are_refused():
    conf = fit_confidence(HELD, TABLE)
    def changed(t, **attrs): return (t := t.copy(), t.attrs.update(attrs))[0]
    refused(lambda: conf.answers(changed(ASKED, assign='?')), 'The new answers have the assign')
    refused(lambda: fit_confidence([changed(HELD[0], protocol='adapted'), *HELD[1:]], TABLE), 'Held-out answers have the protocol')
    refused(lambda: fit_confidence([with_attrs(HELD[0].assign(experiment=''), HELD[0]), *HELD[1:]], TABLE), 'of no experiment')
    barred = f'{SCORE}{score_classes(ASKED)[0]}'
    renamed = [with_attrs(t.rename(columns={barred: f'{barred}|x'}), t) for t in (ASKED, *HELD)]
    refused(lambda: fit_confidence(renamed[1:], TABLE).answers(renamed[0]), 'which separates the names of a set')

def test_answers_of_several_labels_are_refused():
    t = with_attrs(HELD[0].copy(), HELD[0]); t.attrs['thresholds'] = [.5]
    refused(lambda: fit_confidence([t], TABLE), 'several labels')

# ---- by files

def write(folder, name, t, **record):
    path = folder/f'{name}.csv'
    write_scores(t, scores_path(path))
    return write_predictions(name_wells(t), path, record)

@pytest.fixture
def files(tmp_path):
    return [write(tmp_path, 'new', ASKED), *(write(tmp_path, e, t) for e, t in zip(TRAIN, HELD))]

@pytest.fixture
def screen(tmp_path, monkeypatch):
    "A screen of which only the table is read"
    import rcic_fastai.results.confidence as module
    monkeypatch.setattr(module, 'open_screen', lambda s, check: Screen(TABLE, None))
    return 'screen'

def test_the_command_writes_what_the_function_returns(tmp_path, files, screen, capsys):
    assert cli.rcic_confidence([str(tmp_path/'sure.csv'), str(files[0]), screen, *map(str, files[1:])]) == 0
    out = capsys.readouterr().out
    back, said = pd.read_csv(tmp_path/'sure.csv'), fit_confidence(HELD, TABLE).answers(ASKED)
    assert back.id_code.tolist() == said.id_code.tolist() and back.names.tolist() == said.names.tolist() and np.allclose(back.chance, said.chance, atol=1e-4)
    record = json.loads((tmp_path/'sure.json').read_text())
    assert [r['experiment'] for r in record['forecasts']] == NEW and record['error'] > 0
    assert record['held_out'] == {str(f): file_facts(f)['sha256'] for f in files[1:]} and record['predictions_sha256'] == file_facts(files[0])['sha256']
    assert all(f'{e}: about ' in out for e in NEW) and 'sets of 90 %, protocol inductive' in out
    assert not [f for f in tmp_path.iterdir() if f.name.startswith('.') or 'tmp' in f.name]

@pytest.mark.parametrize('arguments, words', [
    ('{d}/sure.csv {d}/none.csv {s} {d}/HUVEC-01.csv', 'none.csv: write predictions'),
    ('{d}/sure.txt {d}/new.csv {s} {d}/HUVEC-01.csv', 'let OUT end in .csv'),
    ('{d}/new.csv {d}/new.csv {s} {d}/HUVEC-01.csv', 'over what it is made from'),
    ('{d}/HUVEC-02.csv {d}/new.csv {s} {d}/HUVEC-01.csv', 'HUVEC-02.csv would be overwritten, and rcic_fastai did not write it'),
    ('{d}/sure.csv {d}/HUVEC-01.csv {s} {d}/HUVEC-01.csv', 'would be memory'),
    ('{d}/sure.csv {d}/HUVEC-01.csv {s} {d}/new.csv', 'are there for testing, so labels of them only judge'),
    ('{d}/sure.csv {d}/new.csv {s} {d}/HUVEC-01.csv {d}/HUVEC-01.csv', 'was held out twice'),
    ('{d}/sure.csv {d}/new.csv {s} {d}/HUVEC-01.csv --coverage 2', '--coverage 2.0 is no share of wells'),
    ('{d}/sure.csv {d}/new.csv {s} {d}/HUVEC-01.csv --guarantee', 'hold out more with --folds (rcic_train), ask for a lower --coverage, or leave --guarantee out')])
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, files, screen, arguments, words, capsys):
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    assert cli.rcic_confidence(arguments.format(d=tmp_path, s=screen).split()) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1, err
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before

@pytest.mark.parametrize('key, a, b', [('by', 'index', 'classifier'), ('tta', 8, 4), ('adapt', 'experiment', None), ('correct', None, 'standardize per experiment'), ('search', 'no', 'shrink=1'), ('cell_side', 64, 256)])
def test_predictions_that_were_made_in_different_ways_are_not_compared(tmp_path, key, a, b):
    x, y = write(tmp_path, 'x', ASKED, **{key: a}), write(tmp_path, 'y', HELD[0], **{key: b})
    refused(lambda: confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y), f'with {key} {a}', f'with {b}: predict both in one way')

ABOUT = dict(fingerprint='1', arch='resnet18', recipe='demo', channels=['DNA', 'ER'], size=64, norm='own', training_rows='a')

@pytest.mark.parametrize('key, other, words', [('arch', 'resnet50', 'arch (resnet18, resnet50)'), ('recipe', 'rcic117', 'recipe (demo, rcic117)'), ('channels', ['DNA'], 'channels (DNA, ER, DNA)'), ('size', None, 'size (64, as stored)')])
def test_predictions_of_models_that_were_built_differently_are_not_compared(tmp_path, key, other, words):
    x, y = write(tmp_path, 'x', ASKED, made_by=ABOUT), write(tmp_path, 'y', HELD[0], made_by={**ABOUT, 'fingerprint': '2', key: other})
    refused(lambda: confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y), f'models that differ in {words}')
    x, y = (write(tmp_path, n, t, cell_types=dict(RPE=dict(made_by=m))) for n, t, m in (('x', ASKED, ABOUT), ('y', HELD[0], {**ABOUT, key: other})))
    refused(lambda: confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y), f'models that differ in {words}')

def test_models_of_other_folds_are_compared_and_those_of_other_wells_with_a_note(tmp_path):
    x, y = write(tmp_path, 'x', ASKED, made_by=ABOUT), write(tmp_path, 'y', HELD[0], made_by={**ABOUT, 'fingerprint': '2'})
    assert not any('another table' in n for n in confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y)[1].notes)
    write(tmp_path, 'y', HELD[0], made_by={**ABOUT, 'training_rows': 'b'})
    assert any('was trained on another table of wells' in n for n in confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y)[1].notes)

def test_without_scores_it_says_so(tmp_path, files):
    scores_path(files[0]).unlink()
    refused(lambda: confidence_files(tmp_path/'o.csv', files[0], Screen(TABLE, None), *files[1:]), 'new.scores.parquet: predict again and keep the scores')

@pytest.mark.parametrize('name, text', [('mine.csv', 'well,chance,comment\n1,2,3\n'), ('mine.json', '{"temperature": 37, "notes": "of the incubator"}')])
def test_files_of_others_stay(tmp_path, files, name, text):
    (tmp_path/name).write_text(text)
    refused(lambda: confidence_files(tmp_path/'mine.csv', files[0], Screen(TABLE, None), *files[1:]), f'{name} would be overwritten, and rcic_fastai did not write it')
    assert (tmp_path/name).read_text() == text

def test_what_is_known_of_the_held_out_answers_is_passed_on(tmp_path, files):
    write(tmp_path, TRAIN[0], HELD[0], validation='The search was chosen by these wells.')
    _, conf = confidence_files(tmp_path/'o.csv', files[0], Screen(TABLE, None), *files[1:])
    assert 'The search was chosen by these wells.' in conf.notes and any('No experiment of RPE' in n for n in read_json(tmp_path/'o.json', 2**20)['notes'])

def test_models_of_cell_types_are_compared_by_cell_type(tmp_path):
    ways = dict(HUVEC=dict(search='no'), RPE=dict(search='shrink=1'))
    x, y = write(tmp_path, 'x', ASKED, cell_types=ways), write(tmp_path, 'y', HELD[0], cell_types=dict(HUVEC=dict(search='no')))
    confidence_files(tmp_path/'o.csv', x, Screen(TABLE, None), y)
    z = write(tmp_path, 'z', HELD[0], cell_types=dict(HUVEC=dict(search='expand=3')))
    refused(lambda: confidence_files(tmp_path/'p.csv', x, Screen(TABLE, None), z), 'with search no', 'with expand=3')

def test_averages_are_judged_as_averages(tmp_path, files):
    mean = tmp_path/'mean.csv'
    ensemble_files(mean, files[0], files[0])
    refused(lambda: confidence_files(tmp_path/'o.csv', mean, Screen(TABLE, None), files[1]), 'is the average of 2 predictions and', 'of 0: average both alike')
    ensemble_files(tmp_path/'h.csv', files[1], files[1])
    ans, _ = confidence_files(tmp_path/'o.csv', mean, Screen(TABLE, None), tmp_path/'h.csv')
    assert len(ans) == len(ASKED) and read_json(tmp_path/'o.json', 2**20)['held'][0]['experiment'] == TRAIN[0]
    ensemble_files(tmp_path/'w.csv', files[1], files[1], weights=[1, 2])
    refused(lambda: confidence_files(tmp_path/'p.csv', mean, Screen(TABLE, None), tmp_path/'w.csv'), 'are averages with other weights')
    other = write(tmp_path, 'other', HELD[0], tta=2)
    ensemble_files(tmp_path/'v.csv', other, other)
    refused(lambda: confidence_files(tmp_path/'p.csv', mean, Screen(TABLE, None), tmp_path/'v.csv'), 'with tta None', 'with 2: predict both in one way')


@pytest.mark.parametrize('key, a, b', [('channels', ['DNA', 'ER'], ['DNA']), ('bs', 3, 32)])
def test_channels_that_were_read_and_batches_count_where_both_are_known(key, a, b):
    from rcic_fastai.results.confidence import _check_ways
    refused(lambda: _check_ways('new', dict(new={key: a}, held={key: b})), f'predicted with {key}')
    _check_ways('new', dict(new={key: a}, held={}))
    refused(lambda: _check_ways('new', dict(new=dict(channels=['DNA'], made_by=ABOUT), held=dict(made_by=ABOUT))), 'predicted with channels')
