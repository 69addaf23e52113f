"The report of a model and its predictions: through the command, with wrong input, with names that are not ours to trust"
import shutil

import numpy as np, pandas as pd, pytest
from helpers import learner, refused, simulate_screen
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.folder import load_model
from rcic_fastai.predict.predict import read_predictions
from rcic_fastai.results.evaluate import confused_pairs
from rcic_fastai.results.report import how_table, report_screen, settings_table
from rcic_fastai.screen.open import open_screen


@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    "Two experiments to train on, one to name"
    path = tmp_path_factory.mktemp('report')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    return open_screen(path)


@pytest.fixture(scope='module')
def made(screen, tmp_path_factory):
    "A model folder and its predictions under two protocols"
    out = tmp_path_factory.mktemp('report')
    model = learner(screen_dls(screen.train, valid='none', bs=8, device='cpu')).to_model(tta=1, progress=False)
    model.save(out/'model')
    for p in ('inductive', 'transductive'): model.predict(screen, p, out/f'{p}.csv', tta=1, progress=False)
    return out, load_model(out/'model')


def command(*args): return cli.rcic_report([*map(str, args)])


def test_the_command_writes_what_the_function_writes(made, screen, close_figures):
    out, model = made
    given = f"{out/'inductive.csv'},{out/'transductive.csv'}"
    assert command(out/'model', screen.source.root, out/'page.html', '--predictions', given) == 0
    preds = {p: read_predictions(out/f'{p}.csv') for p in ('inductive', 'transductive')}
    page = report_screen(out/'same.html', model, screen, preds, progress=False).read_text()
    assert (out/'page.html').read_text() == page
    assert [page.count(f'<h2>{h}</h2>') for h in ('Accuracy of test wells', 'Plates', 'How it was made')] == [1, 1, 1]


def test_how_tells_the_protocols_apart(made):
    out, _ = made
    how = how_table({p: read_predictions(out/f'{p}.csv') for p in ('inductive', 'transductive')})
    assert how.loc['BatchNorm statistics'].tolist() == ['of training', 'of each experiment']
    assert how.loc['each name once on a plate'].tolist() == ['no', 'yes']
    assert how.loc['plate groups', 'inductive'] == 'not used' and how.loc['plate groups', 'transductive'] != 'not used'


def test_an_edited_file_has_no_record_to_show(made, tmp_path):
    out, _ = made
    for f in out.glob('inductive*'): shutil.copy(f, tmp_path)
    pred = pd.read_csv(tmp_path/'inductive.csv')
    pred.assign(sirna=pred.sirna[::-1].to_numpy()).to_csv(tmp_path/'inductive.csv', index=False)
    assert not len(how_table({'edited': read_predictions(tmp_path/'inductive.csv')}).columns)


@pytest.mark.parametrize('which, words', [('no_such.csv', 'There is no file'), ('inductive.csv,inductive.csv', 'would share a column')])
def test_wrong_predictions_leave_no_page(made, screen, which, words, capsys):
    out, _ = made
    given = ','.join(str(out/o) for o in which.split(','))
    assert command(out/'model', screen.source.root, out/'none.html', '--predictions', given) == 2
    assert words in capsys.readouterr().err and not (out/'none.html').exists()


def test_a_new_screen_whose_labels_nobody_knows(made, screen, close_figures):
    "What rcic_predict wrote of wells without labels, not marked as test: the usual case"
    out, _ = made
    table = screen.test.table.assign(sirna=None, sirna_id=None, dataset='train')
    new = screen[pd.concat([screen.train.table, table])]
    report_screen(out/'new.html', load_model(out/'model'), new, read_predictions(out/'inductive.csv'), progress=False)
    page = (out/'new.html').read_text()
    assert 'nothing is known of right and wrong' in page and 'the score of each answer, inductive, of HUVEC-17' in page and 'Hollow points are test wells, of HUVEC-17' in page


def test_labels_of_some_wells_are_used(made, screen, close_figures):
    out, model = made
    pred = read_predictions(out/'inductive.csv')
    known = set(pred.id_code[::2])
    some = screen[screen.table.assign(sirna=screen.table.sirna.where((screen.table.dataset != 'test') | screen.table.well_id.isin(known)))]
    page = report_screen(out/'some.html', model, some, pred, progress=False).read_text()
    assert f'Labels are known of {len(known)} of {len(pred)} wells' in page and 'Right and wrong wells' in page


def test_predictions_of_some_wells_are_reported(made, screen, close_figures):
    out, model = made
    pred = read_predictions(out/'inductive.csv')
    some = pred[:5].copy()
    some.attrs = dict(pred.attrs)
    assert 'Accuracy of test wells' in report_screen(out/'few.html', model, screen, some, progress=False).read_text()


def test_no_sites_for_the_maps_is_one_sentence(made, screen):
    out, model = made
    refused(lambda: report_screen(out/'none.html', model, screen, read_predictions(out/'inductive.csv'), most=0), 'most', 'give 1 or more')


def test_names_from_tables_are_escaped(made, screen, close_figures):
    out, model = made
    evil = '<script>alert(1)</script>'
    pred = read_predictions(out/'inductive.csv')
    page = report_screen(out/'evil.html', model, screen, {evil: pred}, title=evil, progress=False).read_text()
    assert '<script' not in page and '&lt;script&gt;' in page


def test_confused_pairs_count_every_error_once():
    draw = np.random.default_rng(0)
    r = pd.DataFrame(dict(id_code=[*map(str, range(200))], truth=draw.choice([*'abcd'], 200), predicted=draw.choice([*'abcd'], 200),
                          experiment=draw.choice(['E1', 'E2'], 200)))
    r['right'] = r.truth == r.predicted
    pairs = confused_pairs(r, most=100)
    assert pairs.wells.sum() == (~r.right).sum() and pairs.wells.is_monotonic_decreasing
    for p in pairs.itertuples():
        back = pairs[(pairs.truth == p.predicted) & (pairs.predicted == p.truth)].wells
        assert p._6 == (back.iloc[0] if len(back) else 0)


def test_settings_name_what_was_held_out_and_seen(made, screen):
    table = settings_table(made[1])['']
    assert table['names'].startswith(str(screen.train.treatments.table.sirna.nunique()))
    assert table['held out'] == 'none' and screen.train.table.experiment.iloc[0] in table['trained on']


def test_a_page_shows_the_scores_of_the_file(made, screen, tmp_path):
    "Predictions are embedded and searched again as their record says, each in its own way"
    from rcic_fastai.results.explore import explore
    _, model = made
    how = dict(one=dict(tta=1), corrected=dict(protocol='adapted', correct='standardize', tta=2), voted=dict(vote='mean', k=2, merge='mean', tta=3))
    preds = {}
    for name, given in how.items():
        model.predict(screen, out=tmp_path/f'{name}.csv', progress=False, **given)
        preds[name] = read_predictions(tmp_path/f'{name}.csv')
    data = explore(model, screen, preds, side=0, progress=False).data
    for p in data['predictions']:
        file = preds[p['name']].set_index('id_code')
        shown = pd.DataFrame(dict(score=p['score'], margin=p['margin'], first=[r[0] for r in zip(*p['top_scores'])]), index=[data['wells']['id'][w] for w in p['wells']])
        np.testing.assert_allclose(shown.score, file.score[shown.index], atol=6e-4)
        np.testing.assert_allclose(shown.margin, file.margin[shown.index], atol=1.1e-3)
        np.testing.assert_allclose(shown['first'], shown.score, atol=1e-3)
    assert not any('are named otherwise' in n for n in data['notes'])
    said = [p['how'] for p in data['predictions']]
    assert 'views of a site: 1 dihedral' in said[0] and 'correction: Standardize' in said[1] and 'mean of the index, mean site' in said[2]
    assert 'views of a site: 2 dihedral' in explore(model, screen, side=0, tta=2, progress=False).data['predictions'][0]['how']
    other = explore(model, screen, preds['one'], side=0, tta=4, progress=False).data        # what is given goes first
    assert not np.allclose(other['predictions'][0]['top_scores'][0], data['predictions'][0]['top_scores'][0], atol=1e-4)


def test_a_page_takes_a_record_at_its_word():
    "Each correction that a prediction can have is asked for again by its own name"
    from rcic_fastai.embed.correct import new_correction
    from rcic_fastai.predict.plan import _CORRECT, _method_of
    for name, options in _CORRECT.items():
        said = str(new_correction(name, options))
        assert _method_of(said) == _method_of(f'{said} #299f65ab') == name
    assert _method_of(None) == 'no'


def test_a_page_does_not_say_how_others_predicted(made, screen):
    "A table without a record may have been made in any way; one of this model's own says how"
    from rcic_fastai.results.explore import explore
    _, model = made
    pred = model.predict(screen, 'adapted', correct='standardize', tta=2, progress=False)
    others = pred.copy()
    others.attrs.pop('record')
    said = [explore(model, screen, p, side=0, tta=1, protocol='adapted', progress=False).data['predictions'][0]['how'] for p in (others, None, pred)]
    assert said[0] == '' and 'views of a site: 1 dihedral' in said[1] and 'views of a site: 2 dihedral' in said[2]


def test_neighbors_of_a_report_are_of_the_site_that_decided(made, screen):
    "The best neighbor of a well that was named right by its nearest neighbor holds its name"
    from rcic_fastai.results.report import _near
    out, model = made
    pred = read_predictions(out/'inductive.csv')
    near = _near(model, screen, pred.id_code, 1)
    best = near.loc[near.groupby('id_code').cosine.idxmax()].set_index('id_code').label
    assert best[pred.id_code].tolist() == pred.sirna.tolist()




def test_a_report_makes_the_predictions_that_are_possible(made, screen, tmp_path, capsys, close_figures):
    "In files beside it, as rcic_predict would, which are named"
    out, model = made
    assert command(out/'model', screen.source.root, tmp_path/'r.html') == 0
    said = capsys.readouterr()
    for p in ('inductive', 'adapted', 'transductive'):
        file = tmp_path/f'r.{p}.csv'
        assert f'{file}: 8 wells named, protocol {p}' in said.out
        mine, theirs = read_predictions(file), model.predict(screen, p, progress=False)
        assert mine.sirna.tolist() == theirs.sirna.tolist() and mine.attrs['record']['made_by'] == model.about
    page = (tmp_path/'r.html').read_text()
    assert page.count('<h2>Accuracy of test wells</h2>') == 1 and 'The predictions are in r.inductive.csv' in page
    assert command(out/'model', screen.source.root, tmp_path/'r.html') == 0         # its own files are made again


def test_a_report_predicts_new_wells_without_labels(made, screen, tmp_path, capsys, close_figures):
    out, model = made
    new = screen.test[screen.test.table.assign(sirna=None, sirna_id=None, dataset='train')]
    page = report_screen(tmp_path/'r.html', model, new, protocol='inductive', progress=False).read_text()
    assert 'nothing is known of right and wrong' in page and 'no experiment is marked as test' in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.glob('*.csv')) == ['r.inductive.csv', 'r.inductive.top.csv']


def test_what_is_not_possible_is_said_and_left_out(made, screen, tmp_path, capsys, close_figures):
    "A screen without plate groups has no transductive answer; asked for by name, that is an error"
    out, _ = made
    bare = screen[screen.table.assign(plate_group=pd.array([pd.NA]*len(screen.table), 'Int64'))]
    model = learner(screen_dls(bare.train, valid='none', bs=8, device='cpu')).to_model(tta=1, progress=False)
    report_screen(tmp_path/'r.html', model, bare, progress=False)
    assert 'note: no transductive prediction. ' in capsys.readouterr().err
    assert not [*tmp_path.glob('*transductive*')] and [*tmp_path.glob('*adapted*')]
    refused(lambda: report_screen(tmp_path/'s.html', model, bare, protocol='transductive', progress=False))
    assert not [*tmp_path.glob('s.*')]


def test_a_file_of_someone_else_stays(made, screen, tmp_path, capsys):
    out, _ = made
    (tmp_path/'r.adapted.csv').write_text('id_code,sirna\nmine,too\n')
    assert command(out/'model', screen.source.root, tmp_path/'r.html') == 2
    assert 'r.adapted.csv would be overwritten' in capsys.readouterr().err
    assert (tmp_path/'r.adapted.csv').read_text() == 'id_code,sirna\nmine,too\n'
    assert [f.name for f in tmp_path.iterdir()] == ['r.adapted.csv']                # nothing was begun


@pytest.mark.parametrize('given, words', [(['--protocol', 'adapted'], '--protocol adapted is of predictions that are made here'),
    (['--experiments', 'HUVEC-17'], '--experiments HUVEC-17 is of predictions'), (['--held-out'], '--held-out and --predictions both say which wells')])
def test_predictions_that_are_given_are_not_made(made, screen, tmp_path, capsys, given, words):
    out, _ = made
    assert command(out/'model', screen.source.root, tmp_path/'r.html', '--predictions', out/'inductive.csv', *given) == 2
    assert words in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_held_out_wells_and_their_neighbors_are_reported(screen, tmp_path, close_figures):
    model = learner(screen_dls(screen.train, valid='HUVEC-02', bs=8, device='cpu')).to_model(tta=1, progress=False)
    model.save(tmp_path/'model')
    assert command(tmp_path/'model', screen.source.root, tmp_path/'r.html', '--held-out', '--protocol', 'inductive') == 0
    pred = read_predictions(tmp_path/'r.inductive.csv')
    assert set(pred.id_code.str.rsplit('_', n=2).str[0]) == {'HUVEC-02'}
    page = (tmp_path/'r.html').read_text()
    assert 'of HUVEC-02' in page and 'wells of training experiments are judged (HUVEC-02)' in page       # as rcic_evaluate says of the same file


def test_a_model_that_normalizes_by_plate_is_reported(screen, tmp_path, capsys, close_figures):
    "Its embeddings use the plate, so there is no inductive answer, and few wells are shown with the statistics of whole plates"
    from rcic_fastai.results.report import _near
    model = learner(screen_dls(screen.train, valid='none', bs=8, device='cpu', norm='plate')).to_model(tta=1, progress=False)
    page = report_screen(tmp_path/'r.html', model, screen, progress=False).read_text()
    assert 'note: no inductive prediction. ' in capsys.readouterr().err and '<h2>Nearest neighbors</h2>' in page
    pred = read_predictions(tmp_path/'r.adapted.csv')
    some, every = (_near(model, screen, ids, 1).set_index(['query', 'rank']).cosine for ids in (pred.id_code[:1], pred.id_code))
    np.testing.assert_allclose(some, every[some.index], atol=1e-5)


def test_models_of_cell_types_are_one_sentence(made, screen, tmp_path):
    from rcic_fastai.folder import CellTypeModels
    refused(lambda: report_screen(tmp_path/'r.html', CellTypeModels(dict(HUVEC=made[1])), screen), 'of one model', 'CellTypeModels')


def test_batch_effects_are_shown_as_the_records_say(made, screen, tmp_path, close_figures):
    "Each treatment once, with the number that a loop gives; predictions that did nothing have none"
    from rcic_fastai.embed.table import emb_features, merge_sites, unit_rows
    from rcic_fastai.predict.plan import embed_plan, plan_prediction
    out, model = made
    preds = {}
    for name, how in dict(plain=dict(), adapted=dict(protocol='adapted'), again=dict(protocol='transductive'), fixed=dict(protocol='adapted', correct='standardize', adapt='no')).items():
        preds[name] = model.predict(screen, tta=1, progress=False, **how)
    page = report_screen(tmp_path/'r.html', model, screen, preds, progress=False).read_text()
    assert page.count('similar other well is of the same experiment for') == 2
    assert 'BatchNorm statistics of each experiment (adapted, again): of 8 wells' in page and 'Correction Standardize' in page
    plan = plan_prediction(model, screen, 'adapted', correct='standardize', adapt='no', tta=1)
    new = embed_plan(model, plan, False)
    both = pd.concat([t.drop(columns=['Metadata_protocol', 'Metadata_correction'], errors='ignore') for t in (plan.index.table(), new)], ignore_index=True)
    wells = merge_sites(both)
    x, e, n = unit_rows(emb_features(wells)), wells.Metadata_experiment.tolist(), []
    for i in np.flatnonzero(wells.Metadata_experiment == 'HUVEC-17'):
        others = [j for j in range(len(x)) if j != i]
        n.append(e[max(others, key=lambda j: x[i] @ x[j])] == e[i])
    assert f'before and {np.mean(n):.0%} after; without batch effects it would be about {7/(len(x) - 1):.0%}' in page.split('Correction Standardize')[1][:400]
    alone = report_screen(tmp_path/'a.html', model, screen, preds['plain'], progress=False).read_text()
    assert '<h2>Embedding map</h2>' in alone and 'before' not in alone.split('<h2>Embedding map</h2>')[1].split('<h2>')[0].split('src=')[0]


def test_a_correction_from_controls_is_read_from_the_record(tmp_path, close_figures):
    "Its class is called otherwise than the option; the page and the report do what the prediction did"
    from rcic_fastai.predict.plan import recorded_options
    from rcic_fastai.results.explore import explore
    simulate_screen(tmp_path/'s', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=2, controls=2, progress=False)
    screen = open_screen(tmp_path/'s')
    model = learner(screen_dls(screen.train, valid='none', bs=8, device='cpu', controls=True)).to_model(tta=1, progress=False)
    for method in ('center', 'sphere'):
        pred = model.predict(screen, 'adapted', correct=method, wells='all', tta=1, progress=False)
        assert recorded_options(pred.attrs['record'])['correct'] == method
        page = report_screen(tmp_path/f'{method}.html', model, screen, pred, progress=False).read_text()
        assert f'correction {pred.attrs["record"]["correct"][:8]}' in page and 'cannot be shown' not in page and 'before and' in page
        explore(model, screen, pred, side=0, umap='no', progress=False)
