"Two CPU processes are one: the same index, the same predictions, the same weights; only process 0 speaks and writes."
import json, os, subprocess, sys, time
from importlib.util import find_spec
import numpy as np, pandas as pd, pytest, torch
from rcic_fastai import cli
from rcic_fastai.metadata import ScreenError, read_metadata
from rcic_fastai.profiles import read_embeddings
from rcic_fastai.simulate import simulate_screen

ENV = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore', MPLBACKEND='Agg', GLOO_SOCKET_IFNAME='lo')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
LAUNCHERS = [pytest.param(TORCHRUN, id='torchrun'),
             pytest.param(ACCELERATE, id='accelerate', marks=pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed'))]

def launched(launcher, script, *args, **kw):
    return subprocess.run([*launcher, script, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=280, **kw)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('distributed')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17', 'RPE-08'], sirnas=8, size=32, controls=2, progress=False)
    (d/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='mobilenetv3_small_050', model=dict(emb_dim=16), stages=[])))
    assert cli.rcic_train(f'{d}/screen {d}/model --recipe {d}/tiny.json --valid HUVEC-02 --pretrained no --tta 1'.split()) == 0
    for name in ('predict', 'train'): (d/f'{name}.py').write_text(f'import sys\nfrom rcic_fastai.cli import rcic_{name}\nsys.exit(rcic_{name}())\n')
    return d

@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_prediction_is_that_of_one_process(made, tmp_path, launcher):
    args = lambda name: [made/'model', made/'screen', tmp_path/f'{name}.csv', '--tta', 1, '--bs', 8, '--wells', 'all',
                         '--protocol', 'adapted', '--embeddings', tmp_path/f'{name}.parquet']
    one = subprocess.run([sys.executable, made/'predict.py', *map(str, args('one'))], env=ENV, capture_output=True, text=True, timeout=200)
    two = launched(launcher, made/'predict.py', *args('two'))
    assert not one.returncode and not two.returncode, (one.stderr + two.stderr)[-3000:]
    assert (tmp_path/'one.csv').read_bytes() == (tmp_path/'two.csv').read_bytes()
    pd.testing.assert_frame_equal(*(read_embeddings(tmp_path/f'{n}.parquet') for n in ('one', 'two')), check_exact=True)
    assert two.stdout.count('protocol adapted') == 1 and two.stderr.count('note: ') == one.stderr.count('note: ') == 1
    assert not list(tmp_path.glob('*.part'))

FIT = '''
import sys, torch, fastai.vision.all as f
from rcic_fastai.screens import open_screen
from rcic_fastai.data import screen_dls
from rcic_fastai.learner import screen_learner
from rcic_fastai.distributed import *
from rcic_fastai.recipes import *
from rcic_fastai.embed import embed_rows
table, source = open_screen(sys.argv[1])
out, bs, by = sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None
dls = screen_dls(table, source, valid='HUVEC-02', bs=bs, augs=None, device='cpu', seed=5, batch_by=by)
learn = screen_learner(dls, 'test_efficientnet_gn', pretrained=None, neck='identity', loss='softmax')
recipe = Recipe('two', [Stage('head', 1, 1e-2, 'head'), Stage('all', 2, 1e-2, bs=bs//2)])
try:
    with learn.sharded(): reached = learn.fit_recipe(recipe, seed=1)
except Exception as e: print(type(e).__name__, e); sys.exit(2)
assert type(learn.dls.train).__name__ == 'ScreenDL' and learn.dls.train.bs == bs//2 and hasattr(learn.model, 'body')
if rank_world()[0] == 0:
    torch.save(dict(state=learn.model.state_dict(), history=[float(o) for o in learn.history.iloc[:, 2:].to_numpy(float).ravel()]), out)
    print('saved by 0 of', rank_world()[1])
'''

@pytest.mark.parametrize('by', [None, 'experiment'])
def test_training_is_that_of_one_process(made, tmp_path, by):
    (tmp_path/'fit.py').write_text(FIT)
    args = [made/'screen', None, 8, *([by] if by else [])]
    res = []
    for n, start in (('one', [sys.executable]), ('two', TORCHRUN)):
        args[1] = tmp_path/f'{n}.pt'
        r = launched(start, tmp_path/'fit.py', *args)
        assert not r.returncode, (r.stdout + r.stderr)[-3000:]
        assert r.stdout.count('saved by 0') == 1
        res.append(torch.load(tmp_path/f'{n}.pt', weights_only=True))
    a, b = res
    assert max((a['state'][k].float() - b['state'][k].float()).abs().max().item() for k in a['state']) < 1e-4
    assert np.allclose(a['history'], b['history'], atol=1e-4, equal_nan=True)

def test_a_batch_that_cannot_be_shared_is_refused(made, tmp_path):
    (tmp_path/'fit.py').write_text(FIT)
    r = launched(TORCHRUN, tmp_path/'fit.py', made/'screen', tmp_path/'x.pt', 7)
    assert r.returncode and 'A batch of 7 cannot be shared evenly by 2 processes' in r.stdout + r.stderr
