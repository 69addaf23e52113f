"An answer that cannot be right carries a note: pictures without anything in them, and labels that the model never learned."
import contextlib, io, json, re
import numpy as np, pandas as pd, pytest, tifffile
from rcic_fastai import cli
from rcic_fastai.folder import load_model
from rcic_fastai.predict.predict import read_predictions, write_predictions
from rcic_fastai.results.evaluate import evaluate, evaluate_screen
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import measure_columns, picture_kinds, picture_notes, site_measures
from rcic_fastai.train.recipes import get_recipe

def run(command, *args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): code = command([str(a) for a in args])
    assert code == 0, out.getvalue()
    return out.getvalue()

def draw(folder, odd={}, test_names=None, dtype=np.uint16):
    "Write three batches of a plate with two DMSO wells and four compounds, two wells each; `odd`: {(batch, well): what to do with the site [2,32,32]}"
    folder.mkdir()
    rng, rows, tone = np.random.default_rng(0), [], np.random.default_rng(5).uniform(.3, 1, (9, 2))
    top = np.iinfo(dtype).max//16
    for b in ('B1', 'B2', 'B3'):
        names = test_names if b == 'B3' and test_names else [f'cpd{i}' for i in range(4)]
        for n, name in enumerate(['DMSO', 'DMSO', *np.repeat(names, 2)]):
            k, w = 0 if name == 'DMSO' else 1 + int(name[3:]), f'A{n+1:02d}'
            x = np.stack([rng.random((32, 32))*top*tone[k, j] for j in range(2)])
            x[:, 8:16, 8:16+k] += top/2
            x = odd.get((b, w), lambda o: o)(x.astype(dtype))
            row = dict(Batch=b, Plate=f'{b}P', Well=w, Site=1, Compound=name)
            for c, o in zip(('DNA', 'ER'), x):
                row[f'FileName_{c}'] = f = f'{b}_{w}_{c}.tif'
                tifffile.imwrite(folder/f, o)
            rows.append(row)
    pd.DataFrame(rows).to_csv(folder/'load_data.csv', index=False)
    return folder/'load_data.csv'

def pack(csv, dest): return run(cli.rcic_pack, csv, dest, '--columns', 'sirna=Compound', '--controls', 'DMSO=negative_control', '--test', 'B3')

def fill(value, channel=slice(None)):
    def f(x):
        x[channel] = value
        return x
    return f

def glare(x):
    "Two thirds of the pixels of ER at 4095, the top of a camera of 12 bits"
    x[1].reshape(-1)[:700] = 4095
    return x

def kinds(*sites): return picture_kinds(pd.DataFrame([site_measures(np.array(s)[None]) for s in sites], columns=measure_columns('a')), 'a').a.tolist()

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_kinds_of_pictures(dtype):
    top, rng = np.iinfo(dtype).max, np.random.default_rng(0)
    noise = rng.integers(top//8, top//2, (64, 64)).astype(dtype)
    dead = np.full((64, 64), 7, dtype); dead[3, 5] = top                      # a hot pixel on a dead camera
    glare, few, dim = noise.copy(), noise.copy(), (noise > top//4).astype(dtype)*2
    glare[:40], few[:2] = top, top
    assert kinds(noise, 0*noise, 0*noise + 9, 0*noise + top, dead, glare, few, dim) == ['', 'black', 'constant', 'saturated', 'constant', 'saturated', '', '']
    if dtype == np.uint16:
        twelve = noise//17
        twelve[:40] = 4095
        assert kinds(twelve) == ['saturated']

@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('value, kind', [(0, 'black'), (77, 'constant')])
def test_wells_without_a_picture(tmp_path, packed, value, kind):
    csv = draw(tmp_path/'a', {('B3', 'A04'): fill(value), ('B3', 'A05'): fill(value)})
    said = pack(csv, tmp_path/'a.zarr')
    assert re.search(r'2 of 30 wells are black or constant in every channel \(B3_B3P_A04, B3_B3P_A05\)', said)
    s = open_screen(tmp_path/'a.zarr') if packed else open_screen(csv, columns=dict(sirna='Compound'))
    assert picture_notes(s) and '2 of 30' in picture_notes(s)[0]
    assert not picture_notes(s[s.table.experiment != 'B3']) and '1 of 1' in picture_notes(s[s.table.well == 'A04'].test if packed else s[(s.table.well == 'A04') & (s.table.experiment == 'B3')])[0]

def test_one_channel(tmp_path):
    csv = draw(tmp_path/'a', {('B3', 'A04'): fill(0, 0), ('B2', 'A03'): glare, ('B2', 'A05'): glare})
    said = pack(csv, tmp_path/'a.zarr')
    assert 'every channel' not in said
    assert 'black in DNA at 1 site (B3_B3P_A04_1)' in said and 'saturated in ER at 2 sites (B2_B2P_A03_1, B2_B2P_A05_1)' in said

def test_nothing_is_said_of_pictures_that_are_fine(tmp_path):
    said = pack(draw(tmp_path/'a'), tmp_path/'a.zarr')
    assert 'black' not in said and 'cannot be right' not in said
    assert picture_notes(open_screen(tmp_path/'a.zarr')) == []

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A model, and a test batch with black wells and with compounds that no other batch has"
    d = tmp_path_factory.mktemp('notes')
    csv = draw(d/'a', {('B3', 'A04'): fill(0), ('B1', 'A05'): fill(0)}, ['cpd2', 'cpd3', 'cpd6', 'cpd7'])
    pack(csv, d/'a.zarr')
    recipe = get_recipe('demo').to_dict()
    for s in recipe['stages']: s['epochs'] = 1
    (d/'recipe.json').write_text(json.dumps(recipe))
    (d/'train.txt').write_text(run(cli.rcic_train, d/'a.zarr', d/'m', '--recipe', d/'recipe.json', '--arch', 'test_efficientnet', '--pretrained', 'no',
                                   '--valid', 'none', '--tta', '1', '--bs', '8'))
    (d/'predict.txt').write_text(run(cli.rcic_predict, d/'m', d/'a.zarr', d/'o.csv', '--tta', '1'))
    return d

def test_training_and_prediction_say_it(made):
    "Of the wells that they read"
    assert '1 of 16 wells are black' in (made/'train.txt').read_text() and 'B1_B1P_A05' in (made/'train.txt').read_text()
    said, record = (made/'predict.txt').read_text(), json.loads((made/'o.json').read_text())
    assert 'note: 1 of 8 wells are black or constant in every channel (B3_B3P_A04)' in said
    assert [n for n in record['notes'] if 'B3_B3P_A04' in n]

def test_prediction_of_a_table_says_it(made):
    "Pictures that are not packed are looked at"
    model = load_model(made/'m')
    s = open_screen(made/'a/load_data.csv', columns=dict(sirna='Compound'), controls=dict(negative_control=['DMSO']), test=['B3'])
    assert [n for n in model.screen_notes(s.test.treatments) if 'B3_B3P_A04' in n]

def test_labels_never_learned(made):
    text = run(cli.rcic_evaluate, made/'o.csv', made/'a.zarr')
    assert re.search(r'4 of 8 wells hold 2 labels that the model never learned \(cpd6, cpd7\)', text)
    assert 'above 0.500' in text and re.search(r'^chance +0\.250', text, re.M) and 'over the 4 labels that it can name' in text
    res = json.loads(run(cli.rcic_evaluate, made/'o.csv', made/'a.zarr', '--json'))['columns']['inductive']
    assert (res['n_never_learned'], res['ceiling'], res['n_classes'], res['chance'], res['never_learned']) == (4, .5, 4, .25, ['cpd6', 'cpd7'])

def test_the_same_from_python(made):
    model, s = load_model(made/'m'), open_screen(made/'a.zarr')
    pred = model.predict(s, tta=1, progress=False)
    assert pred.attrs['classes'] == [f'cpd{i}' for i in range(4)] == read_predictions(made/'o.csv').attrs['classes']
    assert any('never learned' in n for n in evaluate_screen(pred, s).notes)
    assert evaluate(pred, s.table)['ceiling'] == .5

def test_the_share_of_the_others(made):
    "Accuracy among the wells that the model could name stands in the note"
    s, pred = open_screen(made/'a.zarr'), read_predictions(made/'o.csv')
    truth = s.test.treatments.wells.set_index('well_id').sirna
    right = pred[[c for c in pred if not c.startswith('top_')]].assign(sirna=truth[pred.id_code].to_numpy())
    right.loc[right.sirna.isin(['cpd6', 'cpd7']), 'sirna'] = 'cpd0'
    right.attrs = pred.attrs
    res = evaluate_screen(right, s)
    assert 'of the 4 others, 1.000 are right' in res.notes[0] or 'of the 4 others, 1.000 are right' in ' '.join(res.notes)
    assert res.columns['inductive']['accuracy'] == .5

def test_no_note_when_all_labels_are_known(made, tmp_path):
    s, pred = open_screen(made/'a.zarr'), read_predictions(made/'o.csv')
    pred.attrs['classes'] = [f'cpd{i}' for i in range(8)]
    res = evaluate_screen(pred, s)
    assert not any('never learned' in n for n in res.notes) and res.columns['inductive']['chance'] == 1/8 and 'ceiling' not in res.columns['inductive']

def test_control_wells_alone_are_not_labels_never_learned(made):
    "The classes on record are those of treatments"
    s, pred = open_screen(made/'a.zarr'), read_predictions(made/'o.csv')
    assert 'ceiling' in evaluate(pred, s.table) and 'ceiling' not in evaluate(pred, s.table.assign(well_type='negative_control'), partial=True)

@pytest.mark.parametrize('classes', [None, 3, 'cpd0', {}, []])
def test_a_record_without_names(made, tmp_path, classes):
    "Predictions of an earlier version, or of someone else, are evaluated as before: chance is over the labels of the table"
    pred = read_predictions(made/'o.csv')
    pred.attrs.pop('classes')
    write_predictions(pred, tmp_path/'o.csv')
    record = json.loads((tmp_path/'o.json').read_text())
    assert 'classes' not in record
    if classes is not None: (tmp_path/'o.json').write_text(json.dumps({**record, 'classes': classes}))
    res = evaluate(read_predictions(tmp_path/'o.csv'), open_screen(made/'a.zarr').table)
    assert 'ceiling' not in res and res['n_classes'] == 6

def test_batchnorm_statistics_of_few_wells_are_said(tmp_path):
    "Half of the wells that the index had, or fewer, and fewer than 32; not where whole experiments are as small, and not where nothing is adapted"
    from helpers import learner, simulate_screen
    from rcic_fastai.batch.data import screen_dls
    from rcic_fastai.predict.plan import plan_prediction
    simulate_screen(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    screen = open_screen(tmp_path/'screen')
    model = learner(screen_dls(screen, valid='none', bs=8, device='cpu')).to_model(tta=1, progress=False)
    test = screen.table[screen.table.dataset == 'test']
    wells = test.well_id[test.well_type == 'treatment'].unique()
    for n, is_few in ((8, False), (5, False), (4, True)):
        some = screen[test[test.well_id.isin(wells[:n])]]
        for protocol in ('inductive', 'adapted', 'transductive'):
            found = [o for o in plan_prediction(model, some, protocol, tta=1).notes if 'BatchNorm statistics of' in o]
            assert bool(found) == (is_few and protocol != 'inductive'), (n, protocol, found)
            assert all('HUVEC-17: BatchNorm statistics of 4 wells, where the index has those of 8' in o and "protocol='inductive'" in o for o in found)
    plates = plan_prediction(model, screen, 'adapted', tta=1, adapt='plate').notes       # the index has statistics of experiments, however the wells are adapted
    assert not any('BatchNorm statistics of' in o for o in plates)
    few = screen[test[test.well_id.isin(wells[:4])]]
    assert any('HUVEC-17 1: BatchNorm statistics of 4 wells, where the index has those of 8' in o for o in plan_prediction(model, few, 'adapted', tta=1, adapt='plate').notes)

def test_what_beside_them_counts():
    "Many different positive controls, and no number of wells of one, nor of negative ones"
    from types import SimpleNamespace
    from rcic_fastai.predict.plan import _few_note
    index = SimpleNamespace(labels=pd.DataFrame(dict(experiment='a', well_id=[f'a{i}' for i in range(40)], well_type='treatment')))
    def said(kinds, different=30, **n):
        rows = [dict(experiment='b', plate=1, well_id=f'{k}{i}', well_type=k, sirna=f'{k}{i % different}') for k in n for i in range(n[k])]
        return _few_note(index, pd.DataFrame(rows), SimpleNamespace(adapt='experiment', asked='experiment', kinds=kinds))
    every = {'treatment', 'positive_control', 'negative_control'}
    assert '16 wells' in said({'treatment'}, treatment=16, positive_control=30)[0]
    assert '16 wells' in said(every - {'positive_control'}, treatment=16, negative_control=30)[0]
    assert '16 wells' in said(every, treatment=16, positive_control=60, different=15)[0] and '4 wells' in said(every, treatment=4, positive_control=60, different=1)[0]
    assert said(every, treatment=4, positive_control=30) == said(every, treatment=21) == []
    assert '4 wells' in said({'positive_control', 'negative_control'}, positive_control=2, negative_control=2, treatment=40)[0]

def test_controls_that_nobody_marked_are_said(tmp_path):
    "A new batch without a layout: its controls are wells like others; not where some are marked, and not of a model of plates without controls"
    from helpers import learner, simulate_screen
    from rcic_fastai.batch.data import screen_dls
    from rcic_fastai.predict.plan import plan_prediction
    simulate_screen(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    screen = open_screen(tmp_path/'screen')
    unmarked = screen[screen.table[screen.table.well_type == 'treatment']]
    for given, asked, words in ((screen, screen, 0), (screen, unmarked, 1), (unmarked, unmarked, 0)):
        model = learner(screen_dls(given, valid='none', bs=8, device='cpu')).to_model(tta=1, progress=False)
        found = [o for o in plan_prediction(model, asked, 'inductive', tta=1).notes if 'marked as a control' in o]
        assert len(found) == words and all('HUVEC-17' in o and 'layout' in o for o in found)
