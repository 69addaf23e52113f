"Somebody else's plates, from a folder of files to a model, by commands: what is wrong or ambiguous is said before it costs hours."
import json, re, sys, types, warnings
import numpy as np, pandas as pd, pytest, tifffile, torch
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.folder import load_model
from rcic_fastai.predict.trained import build_index
from rcic_fastai.results.evaluate import evaluate_screen
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.tables import read_table, write_csv
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.workflow import try_all
from helpers import refused
from newcomer import newcomer_layout, write_newcomer

NAMES = '{plate}_{well}_s{site}_w{channel}.tif'
HOW = ['--pattern', NAMES, '--channels', 'DNA=1,ER=2,AGP=3,Mito=4', '--controls', 'DMSO=negative_control', '--cell-type', 'U2OS']


@pytest.fixture(scope='module')
def files(tmp_path_factory): return write_newcomer(tmp_path_factory.mktemp('new'), size=32, sites=1, plates=3, columns=range(2, 7))


def packed(files, dest, capsys, *more, layout=None):
    "Pack the files; the exit code, and what was printed"
    code = cli.rcic_pack([str(files[0]), str(dest), *HOW, '--layout', str(layout or files[1]), *more])
    said = capsys.readouterr()
    return code, said.out + said.err


def changed(files, dest, **cells):
    "Write the layout with other cells in some columns, and return where"
    table = read_table(files[1])
    for c, v in cells.items(): table[c] = v(table[c])
    return write_csv(table, dest)


@pytest.fixture(scope='module')
def model(files, tmp_path_factory):
    "A model of pairs of compound and dose, trained and asked by commands alone"
    d = tmp_path_factory.mktemp('model')
    (d/'tiny.json').write_text('{"name": "tiny", "arch": "test_efficientnet", "stages": [{"name": "all", "epochs": 2, "lr": 0.01}]}')
    assert cli.rcic_pack([str(files[0]), str(d/'own.zarr'), *HOW, '--layout', str(files[1])]) == 0
    assert cli.rcic_train(f'{d}/own.zarr {d}/model --recipe {d}/tiny.json --target compound+dose --test batch3 --pretrained no --tta 1 --epochs 1 --lr 0.002 --device cpu'.split()) == 0
    return d


# what is said while packing

def test_one_command_packs_a_folder_and_says_what_it_took_it_for(files, tmp_path, capsys):
    code, out = packed(files, tmp_path/'own.zarr', capsys, '--test', 'batch3')
    assert code == 0 and '30 wells: 24 treatment, 6 negative_control' in out and '20 train, 10 test; 4 perturbations' in out
    assert '4 perturbations have wells of several doses in the column dose (' in out and '--target sirna+dose (rcic_train)' in out
    dry = packed(files, tmp_path/'no.zarr', capsys, '--test', 'batch3', '--dry-run')[1]
    assert 'wells: 30 (24 treatment, 6 negative_control)' in dry and 'perturbations: 4 (' in dry and not (tmp_path/'no.zarr').exists()


def test_empty_cells_and_tests_only_are_said(files, tmp_path, capsys):
    bare = changed(files, tmp_path/'l.csv', compound=lambda s: s.where(s != 'alpha', None))
    out = packed(files, tmp_path/'own.zarr', capsys, '--test', 'batch1,batch2,batch3', layout=bare)[1]
    assert 'every experiment is a test, so nothing is left to train on' in out
    out = packed(files, tmp_path/'two.zarr', capsys, '--test', 'batch3', layout=bare)[1]
    assert re.search(r'4 training wells name no perturbation and are left out of training \(batch\d_P\d+_', out)
    assert cli.rcic_train([str(tmp_path/'own.zarr'), str(tmp_path/'m')]) == 2
    assert 'Every experiment of the screen is a test (batch1, batch2, batch3), so there is nothing to train on' in capsys.readouterr().err


@pytest.mark.parametrize('cells, says', [(['0,5', '5'], 'is read with decimal commas: 0,5 is 0.5'), (['1,000', '5'], 'may be thousands or a decimal comma')])
def test_decimal_commas(files, tmp_path, capsys, cells, says):
    layout = changed(files, tmp_path/'l.csv', dose=lambda s: s.map({'0.5': cells[0], '5': cells[1]}))
    code, out = packed(files, tmp_path/'own.zarr', capsys, '--dry-run', layout=layout)
    assert says in out and code == (0 if 'is read' in says else 2)
    if not code: assert 'doses (dose): 0.5, 5.0' in out


@pytest.fixture
def odd(files, tmp_path):
    "The files, of which two have another size, another depth"
    import shutil
    folder = shutil.copytree(files[0], tmp_path/'pictures')
    tifffile.imwrite(folder/'P0001_B03_s1_w2.tif', np.zeros((16, 16), np.uint16))
    tifffile.imwrite(folder/'P0002_C04_s1_w1.tif', np.zeros((32, 32), np.uint8))
    return folder, files[1]


def test_a_dry_run_and_packing_say_the_same_of_odd_pictures(odd, tmp_path, capsys):
    dry, full = packed(odd, tmp_path/'no.zarr', capsys, '--dry-run')[1], packed(odd, tmp_path/'own.zarr', capsys)[1]
    says = '2 of 30 sites cannot be read beside the others; the first: '
    assert f'packing would stop: {says}' in dry and f'rcic_pack: {says}' in full
    assert 'P0001_B03_s1_w2.tif is 16×16 px of 16 bits' in full and full.split(says)[1].strip() in dry
    assert 'table' not in full.split(says)[1] and '--only-present' in full       # there is none on this route


def test_counts_of_a_dry_run_are_those_of_what_would_be_packed(odd, tmp_path, capsys):
    for f in odd[0].glob('P000[12]_*_s1_w2.tif'): f.unlink()
    (odd[0]/'P0003_B02_s1_w1.tif').unlink()
    for more in ('--only-present', '--only-present --dry-run'):
        out = packed(odd, tmp_path/'own.zarr', capsys, *more.split())[1]
        assert '9 wells' in out or 'wells: 9 (' in out, out


@pytest.mark.parametrize('most, says', [(1000, '2 of 30 sites cannot'), (29, 'sites that were looked at (of 30) cannot')])
def test_large_folders_are_sampled_and_say_so(odd, most, says):
    from rcic_fastai.screen.images import unfit_sites
    s = open_screen(odd[0], pattern=NAMES, layout=odd[1], check=False)
    assert says in unfit_sites(s.source, s.table.site_id, most)


def test_a_folder_that_nothing_fits_names_the_doors(tmp_path, capsys):
    (tmp_path/'a').mkdir()
    for i in range(3): (tmp_path/f'a/scan-{i}.tif').touch()
    assert cli.rcic_pack([str(tmp_path/'a'), str(tmp_path/'own.zarr')]) == 2
    err = capsys.readouterr().err
    assert re.search(r"--pattern '[^' ]*\{plate\}_\{well\}_s\{site\}_w\{channel\}\.tif'", err) and 'operetta' in err and 'cell-painting-gallery' in err


def test_the_route_without_a_table_speaks_of_none(files, tmp_path, capsys):
    assert cli.rcic_pack([str(files[0]), 'no.zarr', '--pattern', NAMES, '--dry-run']) == 0
    out = capsys.readouterr().out
    assert 'name it in the layout, in a column experiment, or with {experiment} in the pattern' in out and 'of the table' not in out


# training and predicting

def test_a_pair_is_a_target_by_commands_alone(model, capsys):
    m = load_model(model/'model')
    assert len(m.spec.labels) == 8 and 'alpha @ 0.5' in m.spec.labels and not [l for l in m.spec.labels if 'DMSO' in l]
    assert m.trained == ['batch1', 'batch2'] and not m.config['held_out'] and (model/'model/history.png').is_file()      # of two batches none is held out
    assert cli.rcic_predict(f'{model}/model {model}/own.zarr {model}/p.csv --experiments batch3 --tta 1 --device cpu'.split()) == 0
    assert cli.rcic_evaluate([f'{model}/p.csv', f'{model}/own.zarr']) == 0
    out = capsys.readouterr().out
    assert 'p.csv: 8 wells of 1 experiment, protocol inductive' in out
    assert 'cannot be known from one' in out and 'Intervals' not in out and '(1 experiment)' in out
    assert list(pd.read_csv(model/'p.csv')) == ['id_code', 'compound+dose']


def test_what_was_changed_of_a_recipe_is_recorded(model):
    c = json.loads((model/'model/config.json').read_text())
    assert c['changed'] == dict(epochs=[2, 1], lr=[.01, .002]) and [s['epochs'] for s in c['recipe']['stages']] == [1] and c['recipe']['stages'][0]['lr'] == .002
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_model(model/'model')          # the picture of the learning curves is no stranger


@pytest.mark.parametrize('options, says', [
    ('--experiments batch1', 'The model learned the labels of batch1, so its answers would be memory: choose from batch3.'),
    ('--experiments batch9', 'has no experiment batch9: choose from batch1, batch2, batch3.'), ('', 'choose those to predict with --experiments EXP,EXP.'),
    ('--experiments batch3 --device cuda:77', '--device cuda:77 is not there'), ('--experiments batch3 --device tpu', '--device tpu is not')])
def test_what_cannot_be_predicted_is_said(model, capsys, options, says):
    assert cli.rcic_predict(f'{model}/model {model}/own.zarr {model}/no.csv --tta 1 {options}'.split()) == 2
    assert says in capsys.readouterr().err and not (model/'no.csv').exists()


def test_new_plates_need_no_mark(model):
    s = open_screen(model/'own.zarr')
    new = s[s.table.experiment == 'batch3']
    m = load_model(model/'model')
    a, b = m.predict(new, tta=1, progress=False), m.predict(s, experiments='batch3', tta=1, progress=False)
    pd.testing.assert_frame_equal(a, b)
    assert len(evaluate_screen(a, s.table, partial=True).rows)


@pytest.mark.parametrize('options, says', [('--lr -1', '--lr -1.0 is not possible'), ('--epochs -1', '--epochs -1 is not possible'), ('--test batch9', 'no experiment batch9'),
    ('--experiments batch1 --test batch1', 'batch1 is a test'), ('--recipe features --epochs 3', 'trains nothing'), ('--target sirna+dosis', "no column 'dosis'")])
def test_what_cannot_be_trained_is_said(model, capsys, options, says):
    assert cli.rcic_train(f'{model}/own.zarr {model}/no --recipe {model}/tiny.json {options}'.split()) == 2
    assert says in capsys.readouterr().err and not (model/'no').exists()


def test_a_training_says_what_it_holds_out_and_that_numbers_are_classes(model, capsys):
    assert cli.rcic_train(f'{model}/own.zarr {model}/doses --epochs 1 --arch test_efficientnet --target dose --test batch3 --pretrained no --tta 1'.split()) == 0
    out = capsys.readouterr().out
    assert 'nothing is held out, as 2 training experiments on so few plates are too few' in out and '--valid EXP holds out' in out
    assert 'dose holds numbers, and this is a classifier: its 2 values are classes without an order' in out


def test_a_network_that_has_learned_nothing_can_be_trained(model, tmp_path):
    "The embeddings of a deep network of random weights are next to nothing, which is no reason to refuse a training; what is no number is"
    dls = screen_dls(open_screen(model/'own.zarr'), target='compound+dose', valid='none', bs=8, device='cpu')
    learn = screen_learner(dls, 'efficientnet-lite0', pretrained=None)
    refused(lambda: build_index(learn, 1, progress=False), 'all zeros')
    try_all(learn, tmp_path/'m', tta=1)
    assert not learn.model.neck._forward_hooks
    for p in learn.model.neck.parameters(): torch.nn.init.constant_(p, float('nan'))
    refused(lambda: try_all(learn, tmp_path/'m', tta=1), 'not finite')
    assert not learn.model.neck._forward_hooks


def test_epochs_are_logged_by_name(model, capsys, monkeypatch):
    "CSV needs nothing; the others are called as their packages are (stand-ins that record what they are given)"
    scalars, sent, started = [], [], []
    class SummaryWriter:
        def __init__(self, folder, purge_step): scalars.append((str(folder), purge_step))
        def add_scalar(self, k, v, step): scalars.append((k, step))
        def flush(self): pass
    wandb = types.ModuleType('wandb')
    wandb.run, wandb.init, wandb.log = None, lambda **how: (started.append(how), setattr(wandb, 'run', 1)), lambda row, step: sent.append((row['stage'], step))
    for name, module in (('tensorboard', types.ModuleType('tensorboard')), ('torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=SummaryWriter)), ('wandb', wandb)): monkeypatch.setitem(sys.modules, name, module)
    line = f'{model}/own.zarr {model}/logged --recipe {model}/tiny.json --target compound+dose --test batch3 --valid none --pretrained no --tta 1 --device cpu'
    assert cli.rcic_train([*line.split(), '--log', 'csv,tensorboard,wandb']) == 0
    log, history = read_table(model/'logged.log.csv'), load_model(model/'logged').history
    assert log.stage.tolist() == ['all', 'all'] and [float(o) for o in log.train_loss] == pytest.approx(history.train_loss.tolist())
    assert scalars[0] == (f'{model}/logged.tensorboard', 1) and ('train_loss', 2) in scalars and sent == [('all', 1), ('all', 2)]
    assert started == [dict(project='rcic_fastai', group='logged')]
    assert cli.rcic_train([*line.split(), '--resume']) == 0      # where epochs are shown is no part of what is trained


@pytest.mark.parametrize('log, says', [('tensorboard', 'rcic_fastai[tensorboard]'), ('wandb', 'rcic_fastai[wandb]'), ('excel', 'csv, tensorboard, wandb')])
def test_a_log_that_is_not_there_is_said_before_anything_is_trained(model, capsys, monkeypatch, log, says):
    for name in ('tensorboard', 'wandb'): monkeypatch.setitem(sys.modules, name, None)
    assert cli.rcic_train([*f'{model}/own.zarr {model}/no --recipe {model}/tiny.json --target compound+dose --pretrained no'.split(), '--log', log]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count('\n') == 1 and not (model/'no').exists()


def test_commands_are_quiet_about_what_other_packages_will_change(capsys, monkeypatch):
    def job(x): warnings.warn('torch.jit.script is deprecated', FutureWarning)
    monkeypatch.setattr('sys.warnoptions', [])
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        assert cli.run_command(job, ['x'], 'job') == 0
    assert capsys.readouterr().err == ''


def test_both_controls_are_explained():
    "The word has two meanings: which wells are controls, and to learn them too; each help names the other"
    pack, train = (' '.join(cli.command_parser(f).format_help().split()) for f in (cli.pack, cli.train))
    assert '--controls of rcic_train is a switch: to learn them too' in pack and 'which wells these are, --controls of rcic_pack has said' in train


def test_the_layout_of_the_newcomer(): assert newcomer_layout().groupby('batch').plate.nunique().tolist() == [2, 2, 2]


# the whole way

def test_four_commands_from_a_packed_screen_to_a_report(files, model, tmp_path, capsys, close_figures):
    "A model, profiles, hits and a page, by commands alone"
    assert packed(files, tmp_path/'own.zarr', capsys, '--test', 'batch3')[0] == 0
    d = tmp_path
    assert cli.rcic_train(f'{d}/own.zarr {d}/model --recipe {model}/tiny.json --norm plate --valid none --pretrained no --tta 1 --epochs 1 --device cpu'.split()) == 0
    assert cli.rcic_embed(f'{d}/model {d}/own.zarr {d}/profiles.parquet --tta 1'.split()) == 0
    assert cli.rcic_hits(f'{d}/profiles.parquet {d}/hits.csv --target compound+dose --n-null 50'.split()) == 0
    assert cli.rcic_report(f'{d}/model {d}/own.zarr {d}/report.html'.split()) == 0
    said = capsys.readouterr()
    assert f'{d}/report.adapted.csv: 8 wells named, protocol adapted' in said.out and 'no inductive prediction' in said.err
    page = (d/'report.html').read_text()
    assert all(f'<h2>{h}</h2>' in page for h in ('Accuracy of test wells', 'Nearest neighbors', 'Embedding map', 'How it was made'))
    assert {f.name for f in d.iterdir()} >= {'model', 'profiles.parquet', 'hits.csv', 'hits.png', 'report.html', 'report.adapted.csv'}
