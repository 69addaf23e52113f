"Two CPU processes are one: the same index, the same predictions, the same weights; only process 0 speaks and writes."
import json, os, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from helpers import python, simulate_screen, two_processes
from rcic_fastai import cli
from rcic_fastai.train.checkpoints import read_checkpoint
from rcic_fastai.embed.table import read_embeddings
from rcic_fastai.folder import load_model
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen

ENV = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore', MPLBACKEND='Agg', GLOO_SOCKET_IFNAME='lo')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
LAUNCHERS = [pytest.param(TORCHRUN, id='torchrun'),
             pytest.param(ACCELERATE, id='accelerate')]

def launched(launcher, script, *args, **kw):
    return subprocess.run([*launcher, script, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=280, **kw)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('distributed')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17', 'RPE-08'], sirnas=8, size=32, controls=2, progress=False)
    (d/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='test_efficientnet', model=dict(emb_dim=16), stages=[])))
    assert cli.rcic_train(f'{d}/screen {d}/model --recipe {d}/tiny.json --valid HUVEC-02 --pretrained no --tta 1'.split()) == 0
    for name in ('predict', 'train'): (d/f'{name}.py').write_text(f'import sys\nfrom rcic_fastai.cli import rcic_{name}\nsys.exit(rcic_{name}())\n')
    return d

@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_prediction_is_that_of_one_process(made, tmp_path, launcher):
    args = lambda name: [made/'model', made/'screen', tmp_path/f'{name}.csv', '--tta', 1, '--bs', 8, '--wells', 'all',
                         '--protocol', 'adapted', '--embeddings', tmp_path/f'{name}.parquet']
    one = python((made/'predict.py').read_text(), *args('one'), env=ENV)
    two = launched(launcher, made/'predict.py', *args('two'))
    assert not one.returncode and not two.returncode, (one.stderr + two.stderr)[-3000:]
    assert (tmp_path/'one.csv').read_bytes() == (tmp_path/'two.csv').read_bytes()
    pd.testing.assert_frame_equal(*(read_embeddings(tmp_path/f'{n}.parquet') for n in ('one', 'two')), check_exact=True)
    assert two.stdout.count('protocol adapted') == 1 and two.stderr.count('note: ') == one.stderr.count('note: ') == 1
    assert not list(tmp_path.glob('*.part'))

FIT = '''
import sys, torch, fastai.vision.all as f
from rcic_fastai.screen.open import open_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.distributed import *
from rcic_fastai.train.recipes import *
from rcic_fastai.embed.embed import embed_screen
screen_ = open_screen(sys.argv[1])
out, bs, by = sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None
dls = screen_dls(screen_, valid='HUVEC-02', bs=bs, augs=None, device='cpu', seed=5, batch_by=by)
learn = screen_learner(dls, 'test_efficientnet_gn', pretrained=None, neck='identity', loss='softmax')
recipe = Recipe('two', [Stage('head', 1, 1e-2, 'head', loss='adacos'), Stage('all', 2, 1e-2, bs=bs//2)])
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
    args = lambda name: [made/'screen', tmp_path/f'{name}.pt', 8, *([by] if by else [])]
    for done in ([python(FIT, *args('one'), env=ENV)], two_processes(FIT, *args('two'), env=ENV)):
        said = ''.join(r.stdout + r.stderr for r in done)
        assert not any(r.returncode for r in done) and said.count(f'saved by 0 of {len(done)}') == 1, said[-3000:]
    a, b = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('one', 'two'))
    assert max((a['state'][k].float() - b['state'][k].float()).abs().max().item() for k in a['state']) < 1e-4
    assert np.allclose(a['history'], b['history'], atol=1e-4, equal_nan=True)

def test_a_model_without_each_channel_is_that_of_one_process(made, tmp_path):
    "All models of one command, one after the other"
    pack_screen(open_screen(made/'screen').pick('nucleus,ER,actin'), tmp_path/'three.zarr', progress=False)
    stages = [dict(name='all', epochs=1, lr=1e-2, loss='softmax')]
    (tmp_path/'each.json').write_text(json.dumps(dict(name='each', arch='test_efficientnet_gn', model=dict(neck='identity'), data=dict(augs=None, bs=8), stages=stages)))
    args = lambda out: [tmp_path/'three.zarr', tmp_path/out, *f'--recipe {tmp_path}/each.json --channels 2-of-3 --valid HUVEC-02 --pretrained no --tta 1'.split()]
    code = (made/'train.py').read_text()
    for done in ([python(code, *args('one'), env=ENV)], two_processes(code, *args('two'), env=ENV)):
        assert not any(r.returncode for r in done), ''.join(r.stdout + r.stderr for r in done)[-3000:]
    names = [f.name for f in sorted((tmp_path/'one').iterdir())]
    assert names == [f.name for f in sorted((tmp_path/'two').iterdir())] == ['without_ER', 'without_actin', 'without_nucleus']
    for name in names:
        one, two = (load_model(tmp_path/out/name).model.state_dict() for out in ('one', 'two'))
        assert max((one[k].float() - two[k].float()).abs().max().item() for k in one) < 1e-4

SCENES = '''
import contextlib, io, json, os, sys, threading, torch
from pathlib import Path
from fastai.vision.all import Callback, noop, patch
from rcic_fastai.train.checkpoints import *
from rcic_fastai.train.cutmix import *
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.distributed import *
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import *
from rcic_fastai.screen.open import open_screen
screen, folder = Path(sys.argv[1]), Path(sys.argv[2])
rank, world = rank_world()
screen_ = open_screen(screen)

class Odd(Callback):
    "Stops, spoils a loss or gets SIGTERM, in one process or in all; draws a number in each batch"
    order, what = 2000, None
    def __init__(self): self.drawn = set()
    def after_loss(self):
        if self.training: self.drawn.add((self.train_iter, torch.randint(10**6, ()).item()))
        if self.what == 'nan' and self.training and self.epoch == 1 and rank == 1: self.learn.loss_grad = self.learn.loss_grad*float('nan'); self.learn.loss = self.learn.loss_grad.clone()
    def after_epoch(self):
        if self.what == 'break' and self.epoch == 1: raise KeyboardInterrupt

def fit(name, what=None, cbs=(), bs=8, folder=None, epochs=4, **kwargs):
    dls = screen_dls(screen_, valid='HUVEC-02', bs=bs, device='cpu', seed=5, batch_by='experiment', batch_groups=2 if bs == 8 else 1)
    learn = screen_learner(dls, 'test_efficientnet', pretrained=None, emb_dim=16, seed=0)
    Odd.what, odd, error, out = what, Odd(), '', io.StringIO()
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            with learn.sharded(): learn.fit_recipe(Recipe('r', [Stage('all', epochs, 1e-2)]), seed=1, cbs=[odd, *cbs], folder=folder, **kwargs)
        except (Exception, KeyboardInterrupt, SystemExit) as e: error = f'{type(e).__name__}: {e}'
    state = torch.cat([v.float().flatten() for v in learn.model.state_dict().values()]).double()
    return dict(name=name, rank=rank, sum=state.sum().item(), square=state.square().sum().item(), drawn=sorted(odd.drawn), error=error,
                said=out.getvalue(), terms=[len(cb.terms) for cb in cbs if hasattr(cb, 'terms')], finite=bool(state.isfinite().all()))

averaged = lambda: [MeanTeacher(.8), CutMix(p=.5), GradientReversal(hidden=4)]
# scenes
say = lambda **kw: (Path(sys.argv[3])/f"{kw['name']}-{rank}.json").write_text(json.dumps(kw))
say(**fit('refused', bs=7))
say(**fit('whole', cbs=averaged(), folder=folder/'whole'))
fit('broken', 'break', averaged(), folder=folder/'run'); wait_for_all()
say(**fit('resumed', None, averaged(), folder=folder/'run', resume=True))
fit('for one', 'break', [EMA(.8)], folder=folder/'one'); wait_for_all()
say(**fit('nan', 'nan', folder=folder/'nan'))
came = threading.Event()
@patch
def before_fit(self:Odd):
    if rank == 1: self.checkpoint.sigterm.set()
say(**fit('sigterm', folder=folder/'sigterm'))
Odd.before_fit = noop
say(**fit('apart', folder=folder/('nowhere' if rank else 'nan'), resume=True))
'''

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "What two processes said in each scene: {name: [process 0, process 1]}"
    d = tmp_path_factory.mktemp('scenes')
    (d/'said').mkdir()
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    for r in two_processes(SCENES, d/'screen', d, d/'said', env=ENV): assert not r.returncode, (r.stdout + r.stderr)[-3000:]
    res = {}
    for p in sorted((d/'said').iterdir()): res.setdefault(p.name[:-7], []).append(json.loads(p.read_text()))
    return d, res

def same_model(*scenes): assert len({(o['sum'], o['square']) for o in scenes}) == 1, scenes

def test_a_batch_that_cannot_be_shared_is_refused(scenes):
    for o in scenes[1]['refused']: assert 'A batch of 7 cannot be shared evenly by 2 processes' in o['error']

def test_interrupted_processes_end_with_the_same_weights(scenes):
    whole, resumed = scenes[1]['whole'], scenes[1]['resumed']
    assert not any(o['error'] for o in whole + resumed), (whole, resumed)
    same_model(*whole, *resumed)
    for a, b in zip(whole, resumed): assert a['drawn'] == b['drawn']
    assert whole[0]['drawn'] != whole[1]['drawn'] and [o['said'].count('Continuing from') for o in resumed] == [1, 0]
    assert not any('cannot be kept' in o['said'] for o in whole + resumed)

def test_each_share_holds_both_experiments(scenes):
    "CutMix left some batches alone, and in each process all of those had something to compare"
    for o in scenes[1]['whole']: assert o['terms'][0] > 0 and not o['error']

def test_a_nan_in_one_process_stops_all_and_brings_good_weights_back(scenes):
    d, res = scenes
    same_model(*res['nan'])
    for o in res['nan']: assert o['finite'] and 'the loss is nan in batch 1' in o['error'] and 'epoch_0001' in o['error']
    assert len({o['error'] for o in res['nan']}) == 1
    good = torch.cat([v.float().flatten() for k, v in read_checkpoint(d/'nan').tensors.items() if k.startswith('model/')]).double()
    assert good.square().sum().item() == pytest.approx(res['nan'][0]['square'], rel=1e-9)

def test_sigterm_in_one_process_stops_all(scenes):
    a, b = scenes[1]['sigterm']
    assert a['error'] == b['error'] == 'SystemExit: 143' and a['said'].count('SIGTERM came') == 1 and 'SIGTERM' not in b['said']

def test_processes_with_folders_of_their_own_are_refused(scenes):
    for o in scenes[1]['apart']: assert 'see different checkpoints' in o['error']

def test_one_process_goes_on_with_what_two_began(scenes):
    d, _ = scenes
    ns, argv = {}, sys.argv
    try: sys.argv = ['', d/'screen', d]; exec(SCENES.split('# scenes')[0], ns)
    finally: sys.argv = argv
    found = read_checkpoint(d/'one')
    assert not any('model/module.' in k for k in found.tensors) and len(found.state['others']) == 1
    own = [k for k in found.tensors if k.startswith('process1/')]
    assert own and sum(found.tensors[k].numel() for k in own) < sum(v.numel() for k, v in found.tensors.items() if k.startswith('model/'))
    o = ns['fit']('one', None, [ns['EMA'](.8)], folder=d/'one', resume=True)
    assert not o['error'] and o['finite'] and 'written by 2 processes and 1 will continue' in o['said'] and 'cannot be kept' not in o['said']

TRAINABLE = '''
import json, random, sys, torch
from pathlib import Path
from torch import nn
from fastai.vision.all import Callback
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.controls import difference_learner
from rcic_fastai.train.distributed import *
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.style import DSU
from rcic_fastai.screen.open import open_screen
screen_ = open_screen(Path(sys.argv[1]))
rank, world = rank_world()

class Own(Callback):
    "Of a user: networks in a list and a dict, and one that training changes"
    order = 90
    def before_fit(self): self.nets, self.more = [nn.Linear(3, 2)], dict(a=(nn.BatchNorm1d(2),), b=nn.Linear(2, 2))

def modules(o): return [o] if isinstance(o, nn.Module) else [m for v in (o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()) for m in modules(v)]
def sums(ms): return [float(v.detach().double().sum()) for m in ms for v in m.state_dict().values()]

class Note(Callback):
    order = 2000
    def before_fit(self): self.found = {}
    def note(self, when):
        model = getattr(self.learn.model, 'module', self.learn.model)
        self.found[when] = {cb.name: sums(modules({k: v for k, v in vars(cb).items() if k != 'learn'})) for cb in self.learn.cbs if cb.name in ('own', 'ema', 'mean_teacher', 'gradient_reversal')}
        self.found[when]['model'] = sums([model])
    def before_validate(self): self.note(f'epoch {self.epoch}')
    def after_batch(self):
        if self.training and self.train_iter == 1:
            ps = lambda o: [float(p.detach().double().sum()) for m in modules(o) for p in m.parameters()]
            self.found['first batch'] = {cb.name: ps({k: v for k, v in vars(cb).items() if k != 'learn'}) for cb in self.learn.cbs if cb.name in ('own', 'ema', 'mean_teacher', 'gradient_reversal')}

def fit(name, cbs, make=screen_learner):
    torch.manual_seed(100 + rank); random.seed(rank)      # nobody has given the processes a seed
    dls = screen_dls(screen_, valid='HUVEC-02', bs=8, device='cpu', seed=5, batch_by='experiment', batch_groups=2)
    learn, note = make(dls, 'test_efficientnet', pretrained=None, emb_dim=16, seed=0), Note()
    with learn.no_bar(), learn.no_logging(), learn.sharded(): learn.fit(2, 1e-2, cbs=[*cbs, note])
    return dict(note.found, end=dict(model=sums([learn.model]), styles=[float(o) for cb in cbs if isinstance(cb, DSU) for o in cb.rng.random(3)]))

made = dict(coral=[CORAL()], wasserstein=[SlicedWasserstein(directions=4)], reversal=[GradientReversal(hidden=8)], ema=[EMA(.8)], teacher=[MeanTeacher(.8)], own=[Own()], style=[DSU()])
said = {k: fit(k, v) for k, v in made.items()}
said['controls'] = fit('controls', [EMA(.8)], difference_learner)
(Path(sys.argv[2])/f'{rank}.json').write_text(json.dumps(said))
'''

def test_what_callbacks_train_is_the_same_in_all_processes(tmp_path):
    "Also where each process draws numbers of its own"
    simulate_screen(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=8, size=32, plates=1, controls=2, progress=False)
    for r in two_processes(TRAINABLE, tmp_path/'screen', tmp_path, env=ENV): assert not r.returncode, (r.stdout + r.stderr)[-3000:]
    a, b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in (0, 1))
    assert set(a) == {'coral', 'wasserstein', 'reversal', 'ema', 'teacher', 'own', 'style', 'controls'} and len(a['style']['end']['styles']) == 3
    for what in a:
        for when in a[what]:
            for name in a[what][when]: assert np.allclose(a[what][when][name], b[what][when][name], rtol=1e-6, atol=1e-6, equal_nan=True), (what, when, name)
    for what, name in (('reversal', 'gradient_reversal'), ('ema', 'ema'), ('teacher', 'mean_teacher'), ('own', 'own')):
        assert all(len(a[what][when][name]) for when in ('first batch', 'epoch 0', 'epoch 1'))
