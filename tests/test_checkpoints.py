"Training that is killed, at any moment and by any means, ends with the weights of one that was not."
import contextlib, datetime, errno, hashlib, json, os, pickle, random, re, resource, shutil, signal, subprocess, sys, tempfile, time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.all import Callback, EarlyStoppingCallback, GradientAccumulation, SaveModelCallback, partial
from fastai.callback.fp16 import MixedPrecision
from helpers import simulate_screen
from rcic_fastai import cli
from rcic_fastai.train import checkpoints
from rcic_fastai.train.checkpoints import *
from rcic_fastai.train.cutmix import *
from rcic_fastai.batch.data import *
from rcic_fastai.train.domain import *
from rcic_fastai.train.channels import ChannelSampling
from rcic_fastai.screen.images import PngTree
from rcic_fastai.train.learner import *
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.train.recipes import *
from rcic_fastai.train.style import *
from rcic_fastai.screen.screen import Screen

BIN, ARCH = Path(sys.executable).parent, 'test_efficientnet'
RECIPE = Recipe('three', [Stage('head', 2, 1e-2, 'stem,head', loss='adacos', metadata=False),
                          Stage('new neck', 2, (1e-4, 3e-3), neck='rcic117_meta', cutmix=.5, metadata=True, size=48, bs=6),
                          Stage('full data', 2, 1e-3, 'body,head', loss=dict(name='arcface', s=16.), full_data=True)])
SHORT = Recipe('short', [Stage('all', 3, 3e-3, loss='adacos')])
TWO = Recipe('two', [Stage('all', 2, 3e-3, loss='adacos')])

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp('cp')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=6, size=64, controls=1, plates=1, progress=False)
    return path

def make(screen, cbs=None, stem='tile', **kwargs):
    table = read_metadata(screen)
    dls = screen_dls(Screen(table, PngTree(screen, table)), **{**dict(valid='HUVEC-03', bs=8, device='cpu'), **kwargs})
    return screen_learner(dls, ARCH, metadata='cell_type,experiment', pretrained=None, stem=stem, cbs=cbs)

def fit(learn, recipe=RECIPE, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(recipe, seed=5, **kwargs)
    return learn

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(scope='module')
def whole(screen):
    start = time.time()
    learn = fit(make(screen))
    return weights(learn), learn.history, time.time() - start

def forked(work):
    "Run `work` in a process of its own, without paying for the imports again; its number"
    if pid := os.fork(): return pid
    try: work(); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)

def training(screen, folder): return lambda: fit(make(screen), folder=folder, resume=True)

# Killed

def test_killed_at_random_moments(screen, whole, tmp_path):
    dice, folder = random.Random(), tmp_path/'run'
    for _ in range(6):
        pid = forked(training(screen, folder))
        time.sleep(dice.uniform(.1, .8)*whole[2])
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
    learn = fit(make(screen), folder=folder, resume=True)
    same(weights(learn), whole[0])
    assert str(learn.history) == str(whole[1])
    assert [p.name for p in sorted(folder.iterdir())] == ['epoch_0005', 'epoch_0006']

@pytest.mark.parametrize('epoch,at', [(1, 'tensors'), (3, 'json'), (2, 'before the name'), (6, 'after the name')])
def test_killed_while_writing(screen, whole, tmp_path, monkeypatch, epoch, at):
    die, real, replace, name = lambda: os.kill(os.getpid(), signal.SIGKILL), checkpoints.write_through, os.replace, f'epoch_{epoch:04d}'
    def write(path, data):
        if path.parent.name == name + '.part' and path.name == dict(tensors='state.safetensors', json='state.json').get(at):
            path.write_bytes(data[:len(data)//2]); die()
        real(path, data)
    def named(a, b):
        if Path(b).name == name and at == 'before the name': die()
        replace(a, b)
        if Path(b).name == name and at == 'after the name': die()
    monkeypatch.setattr(checkpoints, 'write_through', write); monkeypatch.setattr(os, 'replace', named)
    pid = forked(training(screen, tmp_path/'run'))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    learn = fit(make(screen), folder=tmp_path/'run', resume=True)
    same(weights(learn), whole[0])
    assert not list((tmp_path/'run').glob('*.part'))

# What else a training carries

class BreakOff(Callback):
    "Ctrl-C in the second batch of an epoch"
    order, at = 2000, None
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise KeyboardInterrupt

def broken_off(screen, folder, epoch, recipe=TWO, cbs=list, made=make, **kwargs):
    "A whole training, and one that is broken off and resumed with a learner made anew"
    new = lambda: made(screen, [BreakOff(), *cbs()], **kwargs)
    a = fit(new(), recipe)
    BreakOff.at = epoch
    try:
        with pytest.raises(KeyboardInterrupt): fit(new(), recipe, folder=folder)
    finally: BreakOff.at = None
    return a, fit(new(), recipe, folder=folder, resume=True)

CARRIED = dict(
    channels=dict(cbs=lambda: [ChannelSampling()], stem='bag'), ema=dict(cbs=lambda: [EMA(.9)]), teacher=dict(cbs=lambda: [MeanTeacher(.9)]),
    reversal=dict(cbs=lambda: [GradientReversal(hidden=8)], batch_by='experiment', batch_groups=2),
    wasserstein=dict(cbs=lambda: [SlicedWasserstein(directions=4)], batch_by='experiment', batch_groups=2),
    lisa=dict(cbs=lambda: [LISA(same=.7)], batch_by='pairs'), contrast=dict(cbs=lambda: [Contrast(), MixStyle()], batch_by='pairs'),
    remembered_contrast=dict(cbs=lambda: [Contrast(memory=20, to='centroids')], batch_by='pairs'), dsu=dict(cbs=lambda: [DSU()]), worst_style=dict(cbs=lambda: [AdversarialStyle()]),
    unseeded_mix=dict(cbs=lambda: [CutMix(p=.7)]), mixup=dict(cbs=lambda: [MixUp(p=.7)]),
    accumulation=dict(cbs=lambda: [GradientAccumulation(20)]), unfinished_accumulation=dict(cbs=lambda: [GradientAccumulation(32)]),
    average_and_accumulation=dict(cbs=lambda: [EMA(.9), GradientAccumulation(16)]), early=dict(cbs=lambda: [EarlyStoppingCallback('accuracy')]), half=dict(cbs=lambda: [MixedPrecision('bf16')]),
    wells=dict(sites=2, bs=4), plate=dict(norm='plate'), workers=dict(num_workers=1))

@pytest.mark.parametrize('what', CARRIED)
def test_state_of(screen, tmp_path, capsys, what):
    a, b = broken_off(screen, tmp_path/'run', 1, **CARRIED[what])
    same(weights(a), weights(b))
    assert str(a.history) == str(b.history) and 'cannot be kept' not in capsys.readouterr().out

Pair = namedtuple('Pair', 'a b')

class Keeper(Callback):
    "Holds something of each form; it changes with every batch"
    order = 3
    def before_fit(self):
        self.seen, self.last, self.by_plate, self.none, self.count, self.pair = set(), deque(maxlen=3), {}, {}, Counter(), Pair(0, None)
        self.lists, self.sorted, self.frozen, self.best, self.code, self.alike = defaultdict(list), OrderedDict(), frozenset(), None, b'', {}
    def after_batch(self):
        if not self.training: return
        n, loss = self.train_iter, self.loss.item()
        self.seen.add(n % 5); self.last.append(loss); self.by_plate[('HUVEC-01', n % 3)] = {'n': {n}}; self.none[None] = n; self.count['abc'[n % 3]] += 1
        self.lists[n % 2].append((n, loss)); self.sorted[f'{n}'] = n; self.frozen |= {('a', n)}; self.best = Path(f'epoch/{n}'); self.code = bytes([n])
        self.pair, self.alike = Pair(n, [n]), {1: torch.tensor(n), '1': torch.tensor(-n)}
    def all(self): return {k: v for k, v in vars(self).items() if k != 'learn'}

def test_state_of_every_form(screen, tmp_path, capsys):
    a, b = broken_off(screen, tmp_path/'run', 1, cbs=lambda: [Keeper()])
    x, y = a.keeper.all(), b.keeper.all()
    assert x == y and {k: type(v) for k, v in x.items()} == {k: type(v) for k, v in y.items()}
    assert (y['last'].maxlen, y['lists'].default_factory, len(y['by_plate']), y['pair'].a) == (3, list, 3, 6) and len(y['seen']) == 5
    assert 'cannot be kept' not in capsys.readouterr().out

class Unkept(Callback):
    "Two attributes that may be state and cannot be kept, and many that are tools"
    def before_fit(self):
        self.began, self.deep = datetime.datetime(2026, 1, 1), {'in': [{1, datetime.date(2026, 1, 1)}], frozenset([print]): 3}
        self.tools = [print, len, np.mean, partial(print, 1), open(os.devnull), torch.device('cpu'), torch.float16, Callback, self.learn, self.learn.model,
                      self.recorder, range(3), re.compile('a'), self.learn.dls, (i for i in range(3)), random.random, signal, None]

def test_what_cannot_be_kept_is_said_once(screen, tmp_path, capsys):
    fit(make(screen, Unkept()), SHORT, folder=tmp_path/'run')
    said = [l for l in capsys.readouterr().out.splitlines() if 'cannot be kept' in l]
    assert [l.split()[0] for l in said] == ['unkept.began', 'unkept.deep'] and 'datetime' in said[0] and 'at the beginning' in said[0]

def test_generations_are_numbers(tmp_path):
    for n in range(9997, 10003): assert write_checkpoint(tmp_path, n, dict(stage=0, epoch=n, facts={}, extra={}, state={}), {})
    assert {p.name for p in tmp_path.iterdir()} == {'epoch_10001', 'epoch_10002'} and read_checkpoint(tmp_path).epoch == 10002

def test_two_callbacks_of_a_kind(screen, tmp_path):
    a, b = broken_off(screen, tmp_path/'run', 1, cbs=lambda: [EMA(.5), EMA(.99)])
    same(weights(a), weights(b))

def test_patience_is_remembered(screen, tmp_path):
    stop = lambda: [EarlyStoppingCallback('accuracy', min_delta=9, patience=4)]
    a, b = broken_off(screen, tmp_path/'run', 2, recipe=Recipe('long', [Stage('all', 8, 1e-3)]), cbs=stop)
    assert len(a.history) == len(b.history) < 8
    same(weights(a), weights(b))

def test_absent_gradients_stay_absent(screen, tmp_path):
    "A parameter whose gradient is zero decays, one without a gradient does not; after resuming as before"
    def made(*args, **kwargs):
        learn = make(*args, **kwargs)
        for n in ('unused', 'once'): learn.model.register_parameter(n, torch.nn.Parameter(torch.ones(3)))
        learn.splitter = lambda m: [list(m.parameters())]*1 + [[]]*4
        if BreakOff.at or not tmp_path.joinpath('run').exists(): learn.model.once.grad = torch.zeros(3)
        return learn
    a, b = broken_off(screen, tmp_path/'run', 1, made=made)
    same(weights(a), weights(b))
    assert (a.model.unused == 1).all() and (a.model.once < 1).all()

# Damaged

@pytest.fixture(scope='module')
def run(screen, tmp_path_factory):
    "Checkpoints of two epochs, and the weights that the third leads to"
    folder = tmp_path_factory.mktemp('run')/'run'
    learn, BreakOff.at = make(screen, BreakOff()), 2
    try: fit(learn, SHORT, folder=folder)
    except KeyboardInterrupt: pass
    finally: BreakOff.at = None
    return folder, weights(fit(make(screen, BreakOff()), SHORT))

def flip(p): d = bytearray(p.read_bytes()); d[len(d)//2] ^= 1; p.write_bytes(d)
def sums(d): return ''.join(f'{hashlib.sha256((d/f).read_bytes()).hexdigest()}  {f}\n' for f in ('state.safetensors', 'state.json'))

def pickled(d):
    "A file that would write `ran` if anybody unpickled it, with right checksums"
    class Bomb:
        def __reduce__(self): return os.system, (f'touch {d.parent.parent/"ran"}',)
    for f in ('state.safetensors', 'state.pkl', 'state.pth'): (d/f).write_bytes(pickle.dumps(Bomb()))
    (d/'SHA256SUMS').write_text(sums(d))

def rewritten(**changes):
    def damage(d):
        info = json.loads((d/'state.json').read_text())
        (d/'state.json').write_text(json.dumps({k: v for k, v in {**info, **changes}.items() if v is not None}))
        (d/'SHA256SUMS').write_text(sums(d))
    return damage

DAMAGE = dict(
    cut_off=lambda d: os.truncate(d/'state.safetensors', 1000), empty_file=lambda d: (d/'state.json').write_text(''),
    flipped_tensors=lambda d: flip(d/'state.safetensors'), flipped_json=lambda d: flip(d/'state.json'), flipped_sums=lambda d: flip(d/'SHA256SUMS'),
    no_tensors=lambda d: (d/'state.safetensors').unlink(), no_json=lambda d: (d/'state.json').unlink(), no_sums=lambda d: (d/'SHA256SUMS').unlink(),
    empty_folder=lambda d: [p.unlink() for p in d.iterdir()], a_file=lambda d: (shutil.rmtree(d), d.write_text('x')),
    pickled=pickled, newer=rewritten(format=2), no_stage=rewritten(stage=None), odd_stage=rewritten(stage='0'), odd_extra=rewritten(extra=[1]),
    a_list=lambda d: ((d/'state.json').write_text('[]'), (d/'SHA256SUMS').write_text(sums(d))))

@pytest.mark.parametrize('what', DAMAGE)
def test_damaged_falls_back(run, tmp_path, capsys, what):
    folder = shutil.copytree(run[0], tmp_path/'run')
    DAMAGE[what](folder/'epoch_0002')
    found, out = read_checkpoint(folder), capsys.readouterr().out.splitlines()
    assert found.path == folder/'epoch_0001' and len(out) == 1 and 'epoch_0002 cannot be used (' in out[0] and out[0].endswith('the one before it is tried.')
    DAMAGE[what](folder/'epoch_0001')
    with pytest.raises(ScreenError, match='No checkpoint in .*copy the folder again, or remove it'): read_checkpoint(folder)
    assert not (tmp_path/'ran').exists()

def test_fallback_ends_with_the_same_weights(screen, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path/'run')
    flip(folder/'epoch_0002/state.safetensors')
    same(weights(fit(make(screen, BreakOff()), SHORT, folder=folder, resume=True)), run[1])
    assert read_checkpoint(folder).epoch == 3

@pytest.mark.parametrize('part', ['model', 'optimizer', 'callbacks', 'loaders', 'random'])
def test_strange_state_is_refused(screen, run, tmp_path, part):
    folder, learn = shutil.copytree(run[0], tmp_path/'run'), make(screen, BreakOff())
    state = json.loads((folder/'epoch_0002/state.json').read_text())['state']
    for tree in ({'exec': 'x'}, {}, {'loads': 3}, {'tensor': ['nowhere', 'cpu']}, {'generator': {'bit_generator': 'os'}}, 'text', 7):
        rewritten(state={**state, part: tree})(folder/'epoch_0002')
        with pytest.raises(ScreenError, match='does not fit this training'): fit(learn, SHORT, folder=folder, resume=True)

def test_no_pickle_in_the_source():
    text = Path(checkpoints.__file__).read_text()
    assert not re.search(r'import pickle|torch\.(load|save)\(|pickle\.', text)

# A full disk

def test_full_disk_keeps_the_checkpoint_before(screen, run, tmp_path, monkeypatch, capsys):
    real = checkpoints.write_through
    def full(path, data):
        if 'epoch_0001' in str(path): return real(path, data)
        path.write_bytes(data[:100]); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(checkpoints, 'write_through', full)
    learn = fit(make(screen, BreakOff()), SHORT, folder=tmp_path/'run')
    same(weights(learn), run[1])
    said = [l for l in capsys.readouterr().out.splitlines() if 'cannot be written' in l]
    assert len(said) == 2 and 'No space left on device' in said[0] and 'free some space' in said[0]
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['epoch_0001']

def test_file_size_limit(tmp_path, capfd):
    "The kernel itself ends the write half-way"
    info, small, big = dict(stage=0, epoch=1, facts={}, extra={}, state={}), dict(a=torch.zeros(9)), dict(a=torch.zeros(99999))
    def work():
        assert write_checkpoint(tmp_path/'run', 1, info, small)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
        assert not write_checkpoint(tmp_path/'run', 2, info, big)
    assert os.waitpid(forked(work), 0)[1] == 0
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['epoch_0001'] and read_checkpoint(tmp_path/'run').epoch == 1

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(tmp_path, capsys):
    (tmp_path/'run').mkdir(mode=0o500)
    assert not write_checkpoint(tmp_path/'run', 1, {}, {})
    assert 'cannot be written' in capsys.readouterr().out

def test_folder_is_a_file(tmp_path, capsys):
    (tmp_path/'run').write_text('x')
    assert not write_checkpoint(tmp_path/'run', 1, {}, {})
    assert 'cannot be written' in capsys.readouterr().out

# No numbers

class Spoil(Callback):
    order, epoch_at = 5, 1
    def before_batch(self):
        if self.training and self.epoch == self.epoch_at and self.iter == 0: self.spoil()

class SpoilPicture(Spoil):
    def spoil(self): self.learn.xb[0][2] = float('inf')

class SpoilLoss(Spoil):
    def spoil(self): self.now = True
    def after_loss(self):
        if self.training and self.__dict__.pop('now', False): self.learn.loss_grad = self.learn.loss_grad*float('nan'); self.learn.loss = self.learn.loss_grad.clone()

@pytest.mark.parametrize('spoil,says', [(SpoilPicture, r'the loss is nan in batch 1 of 3, epoch 2 of 3 of stage .all. \(sites HUVEC\S+, whose pictures hold'),
                                        (SpoilLoss, r'the loss is nan in batch 1 of 3, epoch 2 of 3 of stage .all. \(sites HUVEC\S+, HUVEC\S+, HUVEC\S+ and 5 more\)')])
def test_no_number_stops_the_stage(screen, tmp_path, spoil, says):
    learn = make(screen, spoil())
    with pytest.raises(ScreenError, match=says) as e: fit(learn, SHORT, folder=tmp_path/'run')
    assert '\n' not in str(e.value) and 'lower learning rate' in str(e.value)
    found = read_checkpoint(tmp_path/'run')
    assert found.epoch == 1 and all(torch.equal(v, found.tensors[f'model/{k}']) for k, v in weights(learn).items())

def test_new_rate_only_where_a_stage_is_not_over(screen, tmp_path, capsys):
    with pytest.raises(ScreenError): fit(make(screen, SpoilPicture()), SHORT, folder=tmp_path/'run')
    other = lambda **kw: Recipe('short', [Stage(**{**dict(name='all', epochs=3, lr=3e-3, loss='adacos'), **kw})])
    SpoilPicture.epoch_at = 99
    try:
        with pytest.raises(ScreenError, match=r'recipe.stages.0.cutmix \(0.0 then, 0.5 now\)'): fit(make(screen, SpoilPicture()), other(cutmix=.5), folder=tmp_path/'run', resume=True)
        fit(make(screen, SpoilPicture()), other(lr={'body': 1e-4, 'neck': 1e-3}), folder=tmp_path/'run', resume=True)
    finally: SpoilPicture.epoch_at = 1
    assert "Stage 'all' continues with lr" in capsys.readouterr().out
    with pytest.raises(ScreenError, match='recipe.stages.0.lr'):
        two = Recipe('short', [*other(lr=1e-5).stages, Stage('more', 1, 1e-3)])
        found = read_checkpoint(tmp_path/'run'); found.stage = 1
        check_facts(found.facts, dict(found.facts, recipe=two.to_dict()))

# The command

TINY = f'--arch {ARCH} --pretrained no --tta 1 --valid HUVEC-03 --bs 8 --seed 3'
def command(line, **kw):
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='Agg', PYTHONWARNINGS='ignore')
    return subprocess.Popen([sys.executable, '-c', 'import sys; from rcic_fastai.cli import *; sys.exit(rcic_train())', *line.split()],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kw)

def train(line, capsys):
    "In this process: exit code, and what was said"
    capsys.readouterr()
    code, said = cli.rcic_train(line.split()), capsys.readouterr()
    return code, said.out, [l for l in said.err.splitlines() if l.startswith('rcic_train')]

@pytest.fixture(scope='module')
def interrupted(screen, tmp_path_factory):
    "A training that got SIGTERM after its first epoch: its folder, and what the command said"
    d = tmp_path_factory.mktemp('cli')
    recipe = Recipe('tiny', [Stage('head', 1, 1e-2, 'stem,head', loss='adacos'), Stage('all', 12, 1e-3, cutmix=.5)])
    (d/'r.json').write_text(json.dumps(recipe.to_dict()))
    p = command(f'{screen} {d}/m --recipe {d}/r.json {TINY}')
    while p.poll() is None and not (d/'m.checkpoints/epoch_0001').exists(): time.sleep(.02)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    return d, p.returncode, err

def test_sigterm(interrupted):
    d, code, err = interrupted
    said = [l for l in err.splitlines() if 'SIGTERM' in l]
    assert code == 143 and len(said) == 1 and re.search(r"stopped in epoch \d+ of 12 of stage 'all': continue from .*epoch_00\d\d with --resume", said[0]), err[-2000:]
    assert 'Traceback' not in err and not (d/'m').exists()
    assert all(re.fullmatch(r'epoch_\d{4}', p.name) for p in (d/'m.checkpoints').iterdir())

@pytest.mark.parametrize('change,says', [('', 'unfinished training: continue it with --resume, or remove'),
    ('--resume --seed 4', r'seed \(3 then, 4 now\)'), ('--resume --norm plate', r'arguments.norm \("" then, "plate" now\)'),
    ('--resume --bs 4', 'arguments.bs'), ('--resume --target cell_type', 'arguments.target'), ('--resume --arch mobilenetv3_small_075', 'arguments.arch'),
    ('--resume --recipe demo', 'recipe.name')])
def test_other_arguments_are_refused(screen, interrupted, capsys, change, says):
    d, *_ = interrupted
    code, _, err = train(f'{screen} {d}/m --recipe {d}/r.json {TINY} {change}', capsys)
    assert code == 2 and len(err) == 1 and re.search(says, err[0]), err
    assert not (d/'m').exists()

def test_other_data_are_refused(screen, interrupted, tmp_path, capsys):
    d, *_ = interrupted
    for name, change in (('labels', lambda t: t.assign(sirna=t.sirna.replace({t.sirna[t.well_type == 'treatment'].iloc[0]: 'another'}))),
                         ('table', lambda t: t.drop(t.index[t.well_type == 'treatment'][:2]))):
        other = tmp_path/name
        other.mkdir(); os.symlink(screen/'images', other/'images')
        table = read_metadata(screen)
        change(table[[c for c in table if c != 'plate_group']]).to_csv(other/'metadata.csv', index=False)
        code, _, err = train(f'{other} {d}/m --recipe {d}/r.json {TINY} --resume', capsys)
        assert code == 2 and 'was begun with different' in err[0], err
    simulate_screen(tmp_path/'pixels', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=6, size=64, controls=1, plates=1, seed=9, progress=False)
    shutil.copy(screen/'metadata.csv', tmp_path/'pixels/metadata.csv')
    code, _, err = train(f'{tmp_path}/pixels {d}/m --recipe {d}/r.json {TINY} --resume', capsys)
    assert code == 2 and re.search('another training|cannot be read|lack', err[0]), err

def test_resumed_command_writes_the_same_model(screen, interrupted, tmp_path, capsys):
    d, *_ = interrupted
    assert train(f'{screen} {d}/m --recipe {d}/r.json {TINY} --resume', capsys)[0] == 0
    assert not (d/'m.checkpoints').exists()
    code, out, _ = train(f'{screen} {tmp_path}/m --recipe {d}/r.json {TINY} --resume', capsys)
    assert code == 0 and 'starting from the beginning' in out
    for f in ('weights.safetensors', 'history.csv', 'index.rows.json'): assert (d/'m'/f).read_bytes() == (tmp_path/'m'/f).read_bytes(), f
    (d/'m.checkpoints').mkdir()
    code, out, _ = train(f'{screen} {d}/m --recipe {d}/r.json {TINY} --resume', capsys)
    assert code == 0 and 'is finished' in out and not (d/'m.checkpoints').exists()
    assert train(f"{screen} {d}/m --recipe {d}/r.json {TINY} --resume", capsys)[0] == 0

def test_nan_ends_with_2_and_goes_on_slower(screen, tmp_path, capsys):
    def recipe(lr): (tmp_path/'r.json').write_text(json.dumps(Recipe('wild', [Stage('calm', 1, 1e-3), Stage('wild', 1, lr)]).to_dict()))
    line = f'{screen} {tmp_path}/m --recipe {tmp_path}/r.json {TINY}'
    recipe(1e30)
    code, _, err = train(line, capsys)
    assert code == 2 and len(err) == 1 and re.search(r"of stage 'wild' .*lower learning rate.*epoch_0001 with --resume", err[0]), err
    recipe(1e-4)
    code, out, _ = train(line + ' --resume', capsys)
    assert code == 0 and "Stage 'wild' continues with lr 0.0001 instead of 1e+30." in out

def test_sigterm_handler_is_put_back(screen, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(make(screen), Recipe('none', []), folder=tmp_path/'run')
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path/'run').exists()
    with pytest.raises(ScreenError, match='give folder'): fit(make(screen), SHORT, resume=True)

# What watching costs

class Operators(Callback):
    "Operators that PyTorch runs in one training batch, from its begin to the end of all callbacks"
    order = -1000
    def before_batch(self):
        if self.training and self.train_iter == 1: self.prof = torch.profiler.profile(); self.prof.__enter__()
    def before_train(self): self.prof = self.count = None
    def close(self):
        self.prof.__exit__(None, None, None)
        self.count = sum(e.count for e in self.prof.key_averages() if e.key.startswith('aten::'))

class EndOfBatch(Callback):
    order = 5000
    def after_batch(self):
        if self.training and self.operators.prof and self.operators.count is None: self.operators.close()

def test_watching_costs_a_few_operators_whatever_the_model(screen):
    "Counted by PyTorch's profiler; a batch of this small network has some thousand"
    def count(watched):
        learn, ops = make(screen), Operators()
        with learn.no_bar(), learn.no_logging(), checkpointed(learn, Checkpoint()) if watched else contextlib.nullcontext(): learn.fit(1, 1e-3, cbs=[ops, EndOfBatch()])
        return ops.count
    plain, watched = count(False), count(True)
    assert plain > 1000 and 0 < watched - plain < 20

def test_nothing_is_read_between_forward_and_step(screen, monkeypatch):
    read, real = [], torch.Tensor.item
    class Where(Callback):
        order, now = -1000, ''
        def before_batch(self): self.now = 'in the batch'
        def after_batch(self): self.now = ''
    where = Where()
    monkeypatch.setattr(torch.Tensor, 'item', lambda t: (read.append(where.now), real(t))[1])
    learn = make(screen)
    with learn.no_bar(), learn.no_logging(), checkpointed(learn, Checkpoint()): learn.fit(1, 1e-3, cbs=where)
    assert '' in read and 'in the batch' not in read

@pytest.mark.parametrize('part', ['weight', 'statistics'])
def test_spoiled_weights_are_never_remembered(screen, tmp_path, part):
    "The loss shows nothing: the last batch of an epoch spoils what the next one would have used, or what only a validation uses"
    class SpoilModel(Callback):
        order = -5
        def after_batch(self):
            if not self.training or self.epoch != 1 or self.iter != self.n_iter - 1: return
            m = next(m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
            with torch.no_grad(): (m.weight if part == 'weight' else m.running_mean)[0] = float('nan')
    learn = make(screen, SpoilModel())
    with pytest.raises(ScreenError, match='not finite after the training batches of epoch 2 of 3 of stage .all.: the weights of the last good'): fit(learn, SHORT, folder=tmp_path/'run')
    found = read_checkpoint(tmp_path/'run')
    assert found.epoch == 1 and all(torch.equal(v, found.tensors[f'model/{k}']) and v.isfinite().all() for k, v in weights(learn).items())

def test_an_embedding_that_is_no_number_shows_in_the_loss(screen):
    "A vector of NaN is not scaled to zero, which would look like a network that knows nothing"
    learn = make(screen)
    x, *meta, y = learn.dls.one_batch()
    assert learn.model.embed(x*float('nan'), *meta).isnan().all() and learn.model.loss(learn.model(x*float('nan'), *meta), y).isnan()

def test_a_resumed_average_with_saved_models(screen, tmp_path):
    "What `SaveModelCallback` writes and what a checkpoint holds are two things; resumed, both are as without a break"
    def made(*args, **kwargs):
        learn = make(*args, **kwargs)
        learn.path = Path(tempfile.mkdtemp(dir=tmp_path))
        return learn
    a, b = broken_off(screen, tmp_path/'run', 1, made=made, cbs=lambda: [EMA(.9), SaveModelCallback(every_epoch=True)])
    same(weights(a), weights(b))
    saved = [torch.load(l.path/'models/model_1.pth', weights_only=True) for l in (a, b)]
    same(*saved)
    found = read_checkpoint(tmp_path/'run')
    average = {k.removeprefix('callbacks/ema/average/module.'): v for k, v in found.tensors.items() if k.startswith('callbacks/ema/average/module.')}
    same({k: saved[0][k] for k in average}, average)
    assert any(not torch.equal(v, found.tensors[f'model/{k}']) for k, v in average.items()), 'the model in the checkpoint is the trained one'

class Late(Callback):
    "SIGTERM behind the last batch of a training"
    order, on = 2000, False
    def __init__(self, event): setattr(self, event, self.end)
    def end(self):
        if self.on and self.epoch == self.n_epoch - 1: os.kill(os.getpid(), signal.SIGTERM)

@pytest.mark.parametrize('event', ['after_validate', 'after_epoch', 'after_fit'])
def test_a_late_sigterm_ends_the_run(screen, tmp_path, capsys, monkeypatch, event):
    "The resumed run has nothing to train"
    new = lambda: make(screen, Late(event))
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(Late, 'on', True)
        fit(new(), TWO, folder=tmp_path/'run')
    assert e.value.code == 143 and 'continue with resume=True' in capsys.readouterr().err
    again, whole = fit(new(), TWO, folder=tmp_path/'run', resume=True), fit(new(), TWO)
    same(weights(again), weights(whole))
    assert str(again.history) == str(whole.history)
