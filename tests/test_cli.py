"The commands as a user types them: whole runs, exit codes, one clear line on wrong input, nothing half-written."
import io, json, os, re, shutil, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from helpers import python
from rcic_fastai import cli, core, workflow
from rcic_fastai.embed.correct import CORRECTIONS
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.screen.simulate.layout import screen_layout
from rcic_fastai.screen.tables import read_metadata, real_data, write_metadata
from rcic_fastai.screen.screen import Screen

BIN = Path(sys.executable).parent
EXPS = 'HUVEC-01,HUVEC-02,RPE-01,HUVEC-17'
TINY = '--arch test_efficientnet --pretrained no --seed 1 --tta 1'

def run(command):
    "In a process of its own, as a shell starts it; each command starts so at least once"
    name, *args = command.split()
    return subprocess.run([BIN/name, *args], capture_output=True, text=True, env=dict(os.environ, PYTHONWARNINGS='ignore'), timeout=300)

def run_imported(command):
    "In a process of its own that does what the command's script does, and whose imports are done"
    return python('import sys; from rcic_fastai import cli; sys.exit(getattr(cli, sys.argv.pop(1))())', *command.split(), env=dict(os.environ, PYTHONWARNINGS='ignore'))

def ok(command, run=None):
    "In this process, or with `run`: it has to succeed; what was printed"
    name, *args = command.split()
    if run: done = run(command)
    else:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err: code = getattr(cli, name)(args)
        done = subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def refused(command, says, capsys):
    "In this process: it is the same code, and the import is paid once"
    name, *args = command.split()
    capsys.readouterr()
    code, err = getattr(cli, name)(args), capsys.readouterr().err
    lines = [l for l in err.strip().splitlines() if l.startswith('rcic_')]
    assert code == 2 and len(lines) == 1 and re.search(says, lines[0]), (code, err[-2000:])

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    ok(f'rcic_simulate {d}/screen --experiments {EXPS} --sirnas 8 --size 64 --controls 2 --seed 1', run_imported)
    recipe = dict(name='tiny', arch='test_efficientnet', stages=[dict(name='head', epochs=1, lr=1e-2, parts='stem,head', loss='adacos'),
                                                                   dict(name='all', epochs=1, lr=1e-3, cutmix=.5)])
    (d/'tiny.json').write_text(json.dumps(recipe))
    ok(f'rcic_train {d}/screen {d}/model --recipe {d}/tiny.json --valid HUVEC-02 --metadata cell_type,plate_group,experiment {TINY}', run)
    ok(f'rcic_predict {d}/model {d}/screen {d}/inductive.csv --tta 2 --neighbors {d}/near.parquet', run)
    (d/'blank').mkdir(); os.symlink(d/'screen/images', d/'blank/images')
    t = pd.read_csv(d/'screen/metadata.csv')
    t.loc[t.dataset == 'test', ['sirna', 'sirna_id']] = None
    t.to_csv(d/'blank/metadata.csv', index=False)
    return d

def test_simulated_layout(here):
    t = read_metadata(here/'screen')
    assert t.groupby('experiment').dataset.first().to_dict() == {'HUVEC-01': 'train', 'HUVEC-02': 'train', 'RPE-01': 'train', 'HUVEC-17': 'test'}
    pictures = list((here/'screen/images').rglob('*.png'))
    assert len(pictures) == 6*len(t) and plt.imread(pictures[0]).shape == (64, 64)
    want = screen_layout(EXPS, sirnas=8, controls=2, seed=1)          # the options that were typed
    assert t.set_index('site_id').sirna.to_dict() == want.set_index('site_id').sirna.to_dict()

def test_model_folder(here):
    assert {p.name for p in (here/'model').iterdir()} >= {'weights.safetensors', 'config.json', 'index.safetensors', 'index.rows.json', 'history.csv'}
    assert not [p for p in (here/'model').iterdir() if p.suffix in ('.pkl', '.pt', '.pth')]
    assert list(pd.read_csv(here/'model/history.csv').stage) == ['head', 'all']

def test_same_seed_same_model(here):
    ok(f'rcic_train {here}/screen {here}/again --recipe {here}/tiny.json --valid HUVEC-02 --metadata cell_type,plate_group,experiment {TINY}')
    assert (here/'again/weights.safetensors').read_bytes() == (here/'model/weights.safetensors').read_bytes()

def test_submission_form(here):
    pred = pd.read_csv(here/'inductive.csv')
    t = read_metadata(here/'screen')
    want = t[(t.dataset == 'test') & (t.well_type == 'treatment')].well_id.unique()
    assert list(pred.columns) == ['id_code', 'sirna'] and set(pred.id_code) == set(want) and pred.sirna.notna().all()
    near = pd.read_parquet(here/'near.parquet')
    assert set(near.id_code) == set(want) and near.cosine.between(-1.001, 1.001).all()

def test_wrong_input_exits_with_2_and_one_line(here):
    r = run_imported(f'rcic_predict {here}/screen {here}/screen {here}/x.csv')
    assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and 'not a model folder' in r.stderr
    assert run_imported('rcic_train').returncode == 2

def test_all_wells(here):
    "Controls are embedded; they are named only by a model that learned controls"
    ok(f'rcic_predict {here}/model {here}/screen {here}/all.csv --tta 1 --wells all --embeddings {here}/all.parquet')
    t = read_metadata(here/'screen')
    t = t[t.dataset == 'test']
    assert set(pd.read_csv(here/'all.csv').id_code) == set(t.well_id[t.well_type == 'treatment'])
    assert set(pd.read_parquet(here/'all.parquet').Metadata_well_id) == set(t.well_id)

@pytest.mark.parametrize('protocol', ['inductive', 'transductive'])
def test_blank_test_labels_give_the_same_answer(here, protocol):
    for s in ('screen', 'blank'): ok(f'rcic_predict {here}/model {here}/{s} {here}/{s}_{protocol}.csv --tta 1 --protocol {protocol}')
    assert (here/f'screen_{protocol}.csv').read_bytes() == (here/f'blank_{protocol}.csv').read_bytes()

def test_transductive_uses_each_sirna_once_a_plate(here):
    ok(f'rcic_predict {here}/model {here}/screen {here}/t.csv --tta 1 --protocol transductive')
    pred = pd.read_csv(here/'t.csv')
    plate = pred.id_code.str.rsplit('_', n=1).str[0]
    assert not pred.duplicated().any() and not pd.DataFrame(dict(p=plate, s=pred.sirna)).duplicated().any()

def test_evaluate(here, capsys):
    res = json.loads(ok(f'rcic_evaluate {here}/inductive.csv {here}/screen --json', run_imported))['columns']['inductive']
    pred = pd.read_csv(here/'inductive.csv').merge(read_metadata(here/'screen').drop_duplicates('well_id'), left_on='id_code', right_on='well_id')
    assert res['accuracy'] == pytest.approx((pred.sirna_x == pred.sirna_y).mean()) and res['n_wells'] == len(pred)
    assert res['protocol'] == 'inductive'
    refused(f'rcic_evaluate {here}/inductive.csv {here}/blank --json', 'label', capsys)

def test_several_protocols_have_columns_of_their_own(here, capsys):
    ok(f'rcic_predict {here}/model {here}/screen {here}/adapted.csv --tta 1 --protocol adapted')
    assert json.loads((here/'adapted.json').read_text())['adapt'] == 'experiment'
    res = json.loads(ok(f'rcic_evaluate {here}/inductive.csv,{here}/adapted.csv {here}/screen --json'))
    assert list(res['columns']) == ['inductive', 'adapted']
    refused(f'rcic_predict {here}/model {here}/screen {here}/x.csv --adapt plate', 'adapted or transductive', capsys)
    refused(f'rcic_predict {here}/model {here}/screen {here}/x.csv --protocol adapted --adapt no', 'adapt nothing', capsys)

def test_a_packed_screen_gives_the_same_predictions(here):
    ok(f'rcic_pack {here}/screen {here}/screen.zarr --verify', run_imported)
    ok(f'rcic_predict {here}/model {here}/screen.zarr {here}/packed.csv --tta 1')
    ok(f'rcic_predict {here}/model {here}/screen {here}/png.csv --tta 1')
    assert (here/'packed.csv').read_bytes() == (here/'png.csv').read_bytes()

def test_pack_refuses(here, capsys):
    refused(f'rcic_pack {here}/screen {here}/bad.zarr --codec zip', 'codec zip is not known', capsys)
    refused(f'rcic_pack {here}/screen {here}/bad.zarr --columns experiment', 'not understood', capsys)
    refused(f'rcic_pack {here}/screen {here}/bad.zarr --columns experiment=Batch', 'columns cannot be given', capsys)
    refused(f'rcic_pack {here}/nowhere {here}/bad.zarr', 'There is no', capsys)

def test_other_target(here):
    ok(f'rcic_train {here}/screen {here}/cells --recipe {here}/tiny.json --valid none --target cell_type {TINY}')
    ok(f'rcic_predict {here}/cells {here}/screen {here}/cells.csv --tta 1 --wells all')
    pred = pd.read_csv(here/'cells.csv')
    assert list(pred.columns) == ['id_code', 'cell_type'] and set(pred.cell_type) <= {'HUVEC', 'RPE'}

@pytest.mark.parametrize('norm', ['plate', 'experiment'])
def test_group_normalization_is_batch_adapted(here, norm, capsys):
    recipe = dict(name='n', arch='test_efficientnet', data=dict(norm=norm), stages=[dict(name='a', epochs=1, lr=1e-3)])
    (here/f'{norm}_recipe.json').write_text(json.dumps(recipe))
    assert cli.rcic_train(f'{here}/screen {here}/{norm} --recipe {here}/{norm}_recipe.json --valid HUVEC-02 --pretrained no --tta 1'.split()) == 0
    refused(f'rcic_predict {here}/{norm} {here}/screen {here}/x.csv', 'adapted or transductive', capsys)
    assert cli.rcic_predict(f'{here}/{norm} {here}/screen {here}/{norm}.csv --tta 1 --protocol adapted'.split()) == 0
    assert json.loads((here/f'{norm}.json').read_text())['protocol'] == 'adapted'

def test_wells_and_controls(here):
    assert cli.rcic_train(f'{here}/screen {here}/wc --recipe {here}/tiny.json --valid HUVEC-02 --pretrained no --tta 1 --sites 2 --controls'.split()) == 0
    for wells in ('treatment', 'all'):
        assert cli.rcic_predict(f'{here}/wc {here}/screen {here}/wc.csv --tta 1 --protocol transductive --wells {wells}'.split()) == 0
    t = read_metadata(here/'screen').drop_duplicates('well_id').set_index('well_id')
    pred = pd.read_csv(here/'wc.csv').set_index('id_code')
    treated = t.index[(t.dataset == 'test') & (t.well_type == 'treatment')]
    assert set(pred.sirna[treated]) <= set(t.sirna[t.well_type == 'treatment']) and len(pred) == (t.dataset == 'test').sum()

@pytest.mark.parametrize('method, more', [('standardize', '--adapt no'), ('standardize', '--wells all --neighbors {d}/c.near.parquet'), ('center', '--wells all'),
                                          ('sphere', '--wells all --adapt no'), ('tvn', '--wells all --protocol transductive')])
def test_corrected_embeddings(here, method, more):
    "The answers are those of correcting index and queries in Python"
    model = here/('wc' if method != 'standardize' else 'model')
    if not model.exists(): test_wells_and_controls(here)
    more = more.format(d=here)
    assert cli.rcic_predict(f'{model} {here}/screen {here}/c.csv --tta 1 --protocol adapted --correct {method} --embeddings {here}/c.parquet {more}'.split()) == 0
    record, m = json.loads((here/'c.json').read_text()), workflow.load_model(model)
    protocol = 'transductive' if 'transductive' in more else 'adapted'
    assert record['protocol'] == protocol and record['adapt'] == (None if '--adapt no' in more else 'experiment')
    options = dict(shrink='auto') if method in ('sphere', 'tvn') else dict(wells='treatment') if method == 'standardize' else {}
    index = m.adapted_index if record['adapt'] else m.index
    assert record['correct'].startswith(str(CORRECTIONS[method](**options)))
    table = workflow.prediction_rows(read_metadata(here/'screen'), 'all' if '--wells all' in more else 'treatment')
    plain = m.embed(Screen(table, workflow.PngTree(here/'screen', table)), tta=1, mask=workflow.INDUCTIVE_MASK, progress=False, adapt=record['adapt'],
                    adapt_rows=table[table.well_type.isin(index.labels.well_type)] if record['adapt'] else None)
    both = pd.concat([index.table(), plain], ignore_index=True)
    known = np.arange(len(both)) < len(index)
    fit = CORRECTIONS[method](**options).fit(both[known])
    want, labels = fit.transform(both[~known]), fit.transform(both[known])
    np.testing.assert_allclose(workflow.emb_features(workflow.read_embeddings(here/'c.parquet')), workflow.emb_features(want), rtol=1e-3, atol=1e-3)
    if model.name == 'model': want = want[(want.Metadata_well_type == 'treatment').to_numpy()]
    want, near = workflow.predict_wells(want, workflow.EmbeddingIndex(labels), protocol)
    got = pd.read_csv(here/'c.csv')
    assert got.id_code.tolist() == want.id_code.tolist() and got.sirna.tolist() == want.sirna.tolist()
    if '--neighbors' in more: assert (pd.read_parquet(here/'c.near.parquet').cosine.to_numpy() == pytest.approx(near.cosine.to_numpy(), abs=1e-4))

@pytest.mark.parametrize('model', ['model', 'wc'])
@pytest.mark.parametrize('how', ['--adapt no --correct standardize', '', '--adapt-from controls'])
def test_adapted_answers_are_the_same_with_and_without_controls(here, model, how):
    "A test experiment is measured from the kinds of wells that the index was, whichever are to be named"
    if not (here/model).exists(): test_wells_and_controls(here)
    for wells in ('treatment', 'all'):
        assert cli.rcic_predict(f'{here/model} {here}/screen {here}/w_{wells}.csv --tta 1 --protocol adapted {how} --wells {wells}'.split()) == 0
        said = json.loads((here/f'w_{wells}.json').read_text())['notes']
        assert any('are of control wells here' in o for o in said) == ('controls' in how)
    some, every = (pd.read_csv(here/f'w_{w}.csv').set_index('id_code').sirna for w in ('treatment', 'all'))
    assert every[some.index].equals(some) and (len(every) > len(some)) == (model == 'wc')

def test_correcting_needs_wells_in_every_experiment(here, tmp_path, capsys):
    t = read_metadata(here/'screen')
    keep = {'no': (t.dataset != 'test') | (t.well_type == 'treatment')}
    keep['one'] = keep['no'] | (t.well_id == t.well_id[~keep['no']].iloc[0])
    if not (here/'wc').exists(): test_wells_and_controls(here)
    for name, k in keep.items():
        (tmp_path/name).mkdir(); os.symlink(here/'screen/images', tmp_path/name/'images'); write_metadata(t[k], tmp_path/name/'metadata.csv')
        refused(f'rcic_predict {here}/wc {tmp_path}/{name} {tmp_path}/x.csv --protocol adapted --correct center --wells all',
                f"two control wells in each experiment, and HUVEC-17 has {dict(no=0, one=1)[name]}", capsys)
    one = t[(t.dataset != 'test') | (t.well_id == t.well_id[(t.dataset == 'test') & (t.well_type == 'treatment')].iloc[0])]
    (tmp_path/'t').mkdir(); os.symlink(here/'screen/images', tmp_path/'t/images'); write_metadata(one, tmp_path/'t/metadata.csv')
    refused(f'rcic_predict {here}/model {tmp_path}/t {tmp_path}/x.csv --protocol adapted --correct standardize', 'two treatment wells', capsys)
    assert not list(tmp_path.glob('x*'))

class Terminal(io.StringIO):
    def isatty(self): return True

def bar():
    print('█', end='\r')
    print('\r |██| 100.00% [1/1]', end='')

@pytest.mark.parametrize('stream', [Terminal, io.StringIO])
def test_text_does_not_begin_behind_a_progress_bar(here, stream):
    out, said = stream(), stream()
    with redirect_stdout(out): assert cli.rcic_predict(f'{here}/model {here}/screen {here}/bar.csv --tta 1'.split()) == 0
    assert ('100.00%' in out.getvalue()) == out.isatty() and out.getvalue().splitlines()[-1].startswith(f'{here}/bar.csv: ')
    def job():
        bar()
        raise core.ScreenError('No.')
    with redirect_stdout(said): assert cli.run_command(job, [], 'rcic_job') == 2
    assert said.getvalue().endswith(']\n') if said.isatty() else said.getvalue() == ''

def test_a_model_without_batchnorm_can_be_corrected(here):
    recipe = dict(name='gn', arch='test_efficientnet_gn', model=dict(neck='identity'), stages=[])
    (here/'gn_recipe.json').write_text(json.dumps(recipe))
    assert cli.rcic_train(f'{here}/screen {here}/gn --recipe {here}/gn_recipe.json --valid HUVEC-02 --pretrained no --tta 1'.split()) == 0
    assert cli.rcic_predict(f'{here}/gn {here}/screen {here}/gn.csv --tta 1 --protocol adapted --correct standardize'.split()) == 0
    record = json.loads((here/'gn.json').read_text())
    assert record['protocol'] == 'adapted' and record['adapt'] is None

def test_errors_inside_callbacks_read_like_others(capsys):
    "fastai puts its own words before what a callback raises"
    class Refuses(workflow.Callback):
        def before_fit(self): raise core.ScreenError('The plate is cracked: take another one.')
    def job(): workflow.Learner(workflow.DataLoaders([], []), workflow.nn.Linear(1, 1), loss_func=workflow.nn.MSELoss(), cbs=Refuses()).fit(1)
    assert cli.run_command(job, [], 'rcic_job') == 2
    assert capsys.readouterr().err == 'rcic_job: The plate is cracked: take another one.\n'

@pytest.mark.parametrize('command, says', [
    ('--adapt-from controls', '--adapt-from controls uses pictures of the test batch'), ('--protocol adapted --bs 1', 'give --bs 2'),
    ('--correct standardize', 'ask for --protocol adapted or transductive'), ('--protocol adapted --correct combat', '--correct combat is not known'),
    ('--protocol adapted --adapt none', '--adapt none is spelled --adapt no now'), ('--protocol adapted --correct harmony', '--correct harmony is not known'), ('--protocol adapted --correct tvn', 'add --wells all'),
    ('--protocol adapted --correct tvn --wells all', 'train with --controls')])
def test_correction_refused_before_any_work(here, command, says, capsys):
    refused(f'rcic_predict {here}/model {here}/screen {here}/o.csv {command}', says, capsys)
    assert not list(here.glob('o.*'))

def test_transductive_without_groups_is_refused_before_any_work(here, capsys):
    assert cli.rcic_train(f'{here}/screen {here}/types --recipe {here}/tiny.json --valid HUVEC-02 --pretrained no --tta 1 --target cell_type'.split()) == 0
    refused(f'rcic_predict {here}/types {here}/screen {here}/o.csv --protocol transductive', 'several groups', capsys)
    assert not list(here.glob('o.*'))

@pytest.mark.parametrize('name', ['simulate', 'pack', 'train', 'predict', 'evaluate', 'demo'])
def test_help(name):
    text = ok(f'rcic_{name} --help', run)
    assert 'usage: rcic_'+name in text and ('default' in text or name == 'evaluate')

@pytest.mark.parametrize('command, says', [
    ('rcic_simulate {d}/x --experiments A549-01', 'A549'),
    ('rcic_simulate {d}/screen', 'screen'),
    ('rcic_train {d}/nowhere {d}/x', 'nowhere'),
    ('rcic_train {d}/screen {d}/x --recipe fastest', "no recipe 'fastest'"),
    ('rcic_train {d}/screen {d}/x --arch efficientnet-b99', 'efficientnet-b99'),
    ('rcic_train {d}/screen {d}/x --valid HUVEC-99', 'HUVEC-99'),
    ('rcic_train {d}/screen {d}/x --metadata color --pretrained no', 'color'),
    ('rcic_train {d}/screen {d}/x --target gene', 'gene'),
    ('rcic_train {d}/screen {d}/x --target cell_type --metadata cell_type --pretrained no', 'cell_type is the target'),
    ('rcic_train {d}/screen {d}/model', 'not empty'),
    ('rcic_predict {d}/screen {d}/screen {d}/x.csv', 'not a model folder'),
    ('rcic_predict {d}/model {d}/screen {d}/x.csv --protocol magic', 'magic'),
    ('rcic_predict {d}/model {d}/screen {d}/x.csv --tta 99', 'tta'),
    ('rcic_train {d}/screen {d}/x --tta 9', 'tta'),
    ('rcic_predict {d}/model {d}/screen {d}/x.csv --vote loud', 'loud'),
    ('rcic_predict {d}/model {d}/screen {d}/x.csv --wells none', 'none'),
    ('rcic_evaluate {d}/nothing.csv {d}/screen', 'nothing.csv'),
])
def test_refused(here, command, says, capsys):
    refused(command.format(d=here), says, capsys)
    assert not (here/'x').exists() and not (here/'x.csv').exists() and not list(here.glob('*.part'))

def spoiled(here, tmp_path, spoil):
    shutil.copytree(here/'screen', tmp_path/'s')
    spoil(tmp_path/'s')
    return tmp_path/'s'

def test_missing_channel_file(here, tmp_path, capsys):
    s = spoiled(here, tmp_path, lambda s: next((s/'images/train/HUVEC-01/Plate1').glob('*_s1_w3.png')).unlink())
    t = read_metadata(s)
    victim = [i for i in t.site_id[(t.experiment == 'HUVEC-01') & (t.plate == 1) & (t.site == 1)]]
    treated = t[t.site_id.isin(victim) & (t.well_type == 'treatment')]
    gone = [i for i in treated.site_id if not (s/f'images/train/HUVEC-01/Plate1/{i.split("_")[2]}_s1_w3.png').exists()]
    if not gone:
        (s/f'images/train/HUVEC-01/Plate1/{treated.well.iloc[0]}_s1_w3.png').unlink()
    refused(f'rcic_train {s} {tmp_path}/m --recipe {here}/tiny.json {TINY}', r'_w3\.png.*--only-present', capsys)
    assert '1 of' in ok(f'rcic_train {s} {tmp_path}/m --recipe {here}/tiny.json {TINY} --only-present')

def test_truncated_png(here, tmp_path, capsys):
    t = read_metadata(here/'screen'); r = t[(t.dataset == 'test') & (t.well_type == 'treatment')].iloc[0]
    def cut(s):
        f = s/f'images/test/{r.experiment}/Plate{r.plate}/{r.well}_s1_w2.png'
        f.write_bytes(f.read_bytes()[:-40])
    s = spoiled(here, tmp_path, cut)
    refused(f'rcic_predict {here}/model {s} {tmp_path}/x.csv --tta 1', f'{r.well}_s1_w2.png', capsys)
    assert not (tmp_path/'x.csv').exists()

def test_plate_without_treatments(here, tmp_path, capsys):
    def spoil(s):
        t = read_metadata(s); t.loc[(t.experiment == 'RPE-01') & (t.plate == 2), 'well_type'] = 'positive_control'
        write_metadata(t, s/'metadata.csv')
    said = ok(f'rcic_train {spoiled(here, tmp_path, spoil)} {tmp_path}/m --recipe {here}/tiny.json {TINY}')
    assert said.count('note: RPE-01 plate 2 holds controls only, so there is no siRNA to name there: left out.') == 1

REAL = real_data()

@pytest.mark.real('images')
def test_real_sites_by_command(here, tmp_path):
    out = ok(f'rcic_train {REAL} {tmp_path}/m --target cell_type --only-present --size 96 --seed 0 --recipe {here}/tiny.json {TINY} --arch mobilenetv3_small_050')
    assert '13 training and 3 held-out samples (HUVEC-01 plate 4, ' in out
    ok(f'rcic_predict {tmp_path}/m {REAL} {tmp_path}/p.csv --wells all --only-present')
    pred = pd.read_csv(tmp_path/'p.csv')
    assert pred.id_code.tolist() == ['HEPG2-08_1_B02', 'HEPG2-08_2_B02'] and set(pred.cell_type) == {'HEPG2'}

def test_statistics_of_controls_and_the_tables_own_validation(here, capsys):
    "Pixel statistics of control wells need their rows; `dataset` val is held out, id_test is not learned"
    d = here/'wilds'
    d.mkdir(); os.symlink(here/'screen/images', d/'images')
    t = pd.read_csv(here/'screen/metadata.csv')
    t.loc[t.experiment == 'HUVEC-01', 'dataset'] = 'val'
    t.loc[(t.experiment == 'RPE-01') & (t.site == 2), 'dataset'] = 'id_test'
    t.to_csv(d/'metadata.csv', index=False)
    n = t[t.well_type == 'treatment'].dataset.value_counts()
    out = ok(f'rcic_train {d} {d}/model --recipe {here}/tiny.json --norm plate --norm-from controls {TINY}')
    assert f'{n["train"]} training and {n["val"]} held-out samples (HUVEC-01)' in out
    index = EmbeddingIndex.load(d/'model').labels
    assert set(index.experiment) == {'HUVEC-02', 'RPE-01'} and len(index) == n['train']
    refused(f'rcic_train {d} {d}/pairs --recipe {here}/tiny.json --sites 2 {TINY}', 'id_test', capsys)

def test_columns_with_one_name(here, capsys):
    (here/'more').mkdir(); shutil.copy(here/'inductive.csv', here/'more/inductive.csv')
    refused(f'rcic_evaluate inductive={here}/more/inductive.csv,{here}/inductive.csv {here}/screen', 'names two columns alike', capsys)

@pytest.mark.parametrize('command, says', [
    ('rcic_predict {d}/model {d}/screen {d}/tiny.csv', 'tiny.json would be overwritten, and rcic_fastai did not write it'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --neighbors {d}/o.csv', 'would be written twice'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --neighbors {d}/o.json', 'would be written twice'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --neighbors {d}/o.parquet --embeddings {d}/folder.csv/../o.parquet', 'would be written twice'),
    ('rcic_predict {d}/model {d}/screen {d}/o', 'not the name of a CSV'),
    ('rcic_predict {d}/model {d}/screen {d}/folder.csv', 'is a folder'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --merge max', '--merge max is not known'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --bs 0', '--bs 0 is not possible'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --k -1', '--k -1 is not possible'),
    ('rcic_predict {d}/model {d}/screen {d}/o.csv --workers -1', '--workers -1 is not possible'),
    ('rcic_train {d}/screen {d}/o --bs 1', '--bs 1 is not possible'),
    ('rcic_train {d}/screen {d}/o --bs -3', '--bs -3 is not possible'),
    ('rcic_train {d}/screen {d}/o --size -5', '--size -5 is not possible'),
    ('rcic_train {d}/screen {d}/o --sites 3', '--sites 3 is not possible'),
    ('rcic_train {d}/screen {d}/o --seed 99999999999999999999999', '--seed 9+ is not possible'),
    ('rcic_train {d}/screen {d}/tiny.json/o', 'could not be read or written')])
def test_refused_before_any_work(here, command, says, capsys):
    (here/'folder.csv').mkdir(exist_ok=True)
    before = (here/'tiny.json').read_bytes()
    refused(command.format(d=here), says, capsys)
    assert (here/'tiny.json').read_bytes() == before and not list(here.glob('o*'))

def test_resumed_when_finished(here, capsys):
    "The same command; one with other arguments is not what was finished"
    same = f'{here}/screen {here}/model --recipe {here}/tiny.json --valid HUVEC-02 --metadata cell_type,plate_group,experiment {TINY} --resume'
    assert cli.rcic_train(same.split()) == 0
    assert 'is finished' in capsys.readouterr().out
    refused('rcic_train ' + same.replace('--seed 1', '--seed 2'), 'seed', capsys)
