"One output, one run; and what one process of a run refuses ends all of them."
import json, os, signal, sys, time
from pathlib import Path
import pytest
from helpers import simulate_screen, two_processes
from rcic_fastai import cli, core, folder, workflow
from rcic_fastai.core import OwnLock, ScreenError, only_one

ENV = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore', MPLBACKEND='Agg', GLOO_SOCKET_IFNAME='lo')

def forked(work):
    "The number of a child that runs `work` and ends"
    if pid := os.fork(): return pid
    code = 99
    try: code = work() or 0
    except SystemExit as e: code = e.code
    finally: os._exit(code)

def holding(out, ready):
    signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored where the tests were started in the background
    with only_one(out): ready.touch(); time.sleep(60)

def held(tmp_path, how=signal.SIGKILL):
    "A lock whose process is there; its number"
    pid = forked(lambda: holding(tmp_path/'out', tmp_path/'ready'))
    while not (tmp_path/'ready').exists(): time.sleep(.01)
    return pid

def ended(pid, how):
    os.kill(pid, how)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def test_a_living_owner_is_respected(tmp_path):
    pid = held(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(ScreenError, match=f'Process {pid} is writing this output'): OwnLock(tmp_path/'out').acquire()
    finally: ended(pid, signal.SIGKILL)

@pytest.mark.parametrize('how,left', [(signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGINT, False)])
def test_every_end_releases_or_is_taken_over(tmp_path, how, left):
    pid = held(tmp_path)
    code = ended(pid, how)
    assert (tmp_path/'out.lock').exists() == left and (how != signal.SIGTERM or code == 143)
    with only_one(tmp_path/'out'): assert json.loads((tmp_path/'out.lock').read_text())['pid'] == os.getpid()
    assert [p.name for p in tmp_path.iterdir()] == ['ready']

def test_a_process_that_nobody_has_collected_is_over(tmp_path):
    pid = held(tmp_path)
    os.kill(pid, signal.SIGKILL)
    try:
        while core._began(pid) not in ('', None): time.sleep(.01)
        with only_one(tmp_path/'out'): pass
    finally: os.waitpid(pid, 0)

@pytest.mark.skipif(os.name != 'posix', reason='no flock')
@pytest.mark.parametrize('number', ['unknown', 'the same'])
def test_a_run_of_another_container_is_respected(tmp_path, monkeypatch, number):
    "Same host and folder, and processes that cannot be seen, or that have the same number"
    me = dict(core._owner(), began='another start 1')
    def hold():
        if number == 'the same': core._owner = lambda: me
        holding(tmp_path/'out', tmp_path/'ready')
    pid = forked(hold)
    try:
        while not (tmp_path/'ready').exists(): time.sleep(.01)
        if number == 'unknown':
            monkeypatch.setattr(core, '_alive', lambda p: p == os.getpid())
            monkeypatch.setattr(core, '_began', lambda p: None)
        text = (tmp_path/'out.lock').read_text()
        for _ in range(2):
            with pytest.raises(ScreenError, match='is writing this output.*wait for it'): OwnLock(tmp_path/'out').acquire()
        assert (tmp_path/'out.lock').read_text() == text
    finally: ended(pid, signal.SIGKILL)
    with only_one(tmp_path/'out'): assert (tmp_path/'out.lock').read_text() != text          # as after a restart of the container

def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    def work():
        with only_one(tmp_path/'out'):
            (tmp_path/'child').write_text(str(forked(lambda: time.sleep(60))))
            (tmp_path/'ready').touch()
            time.sleep(60)
    pid = forked(work)
    while not (tmp_path/'ready').exists(): time.sleep(.01)
    child = int((tmp_path/'child').read_text())
    try:
        ended(pid, signal.SIGKILL)
        os.kill(child, 0)
        with only_one(tmp_path/'out'): pass
    finally: os.kill(child, signal.SIGKILL)

@pytest.mark.parametrize('how', ['absent', 'not on this disk'])
def test_without_locks_of_the_system_the_number_decides(tmp_path, monkeypatch, how):
    if how == 'absent': monkeypatch.setitem(sys.modules, 'fcntl', None)
    else:
        def flock(*_): raise OSError(38, 'Function not implemented')
        monkeypatch.setattr('fcntl.flock', flock)
    pid = held(tmp_path)
    try:
        with pytest.raises(ScreenError, match=f'Process {pid} is writing'): OwnLock(tmp_path/'out').acquire()
    finally: ended(pid, signal.SIGKILL)
    with only_one(tmp_path/'out'): assert json.loads((tmp_path/'out.lock').read_text())['pid'] == os.getpid()
    assert not (tmp_path/'out.lock').exists()

def test_a_lock_on_a_disk_without_links(tmp_path, monkeypatch):
    def link(*_): raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(core.os, 'link', link)
    pid = held(tmp_path)
    try:
        monkeypatch.setattr(core, '_alive', lambda p: False)
        with pytest.raises(ScreenError, match=f'Process {pid} is writing'): OwnLock(tmp_path/'out').acquire()
    finally: ended(pid, signal.SIGKILL)

def test_a_number_that_was_given_again_is_not_the_owner(tmp_path):
    owner = dict(core._owner(), began='another start of the machine 12')
    for pid in (os.getpid(), os.getppid()):
        (tmp_path/'out.lock').write_text(json.dumps(dict(owner, pid=pid)))
        if core._began(pid) is not None:
            with only_one(tmp_path/'out'): pass

@pytest.mark.parametrize('text,says', [('', 'no lock of rcic_fastai'), ('mine', 'no lock of rcic_fastai'), ('{"pid": 1}', 'no lock of rcic_fastai'),
                                       (None, 'of elsewhere is writing.*remove that file')])
def test_other_locks_stay(tmp_path, text, says):
    text = json.dumps(dict(core._owner(), host='elsewhere')) if text is None else text
    (tmp_path/'out.lock').write_text(text)
    with pytest.raises(ScreenError, match=says) as e: OwnLock(tmp_path/'out').acquire()
    assert 'out.lock' in str(e.value) and (tmp_path/'out.lock').read_text() == text

def test_a_machine_that_gets_another_name_meanwhile(tmp_path, monkeypatch):
    with only_one(tmp_path/'out'): monkeypatch.setattr(core.platform, 'node', lambda: 'elsewhere')
    assert not (tmp_path/'out.lock').exists()

def test_a_child_does_not_release_the_lock_of_its_parent(tmp_path):
    with only_one(tmp_path/'out') as lock:
        os.waitpid(forked(lock.release), 0)
        assert json.loads((tmp_path/'out.lock').read_text())['pid'] == os.getpid()

def test_of_many_that_find_a_stale_lock_one_at_a_time_gets_it(tmp_path):
    for turn in range(5):
        out = tmp_path/str(turn)
        out.with_name(f'{turn}.lock').write_text(json.dumps(dict(core._owner(), pid=2**22 + 1)))
        def work():
            try:
                with only_one(out):
                    open(tmp_path/'inside', 'x').close()
                    time.sleep(.2)
                    (tmp_path/'inside').unlink()
            except ScreenError: return 2
        pids = [forked(work) for _ in range(6)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
        assert 0 in codes and set(codes) <= {0, 2}, codes           # 99 if two were inside

# The commands

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('locks')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, size=32, plates=1, controls=0, progress=False)
    (d/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='test_efficientnet', model=dict(emb_dim=16), stages=[dict(name='all', epochs=1, lr=1e-3)])))
    assert cli.rcic_train([*train_line(d), str(d/'model')]) == 0
    return d

def train_line(d): return f'{d}/screen --recipe {d}/tiny.json --valid HUVEC-02 --pretrained no --tta 1 --bs 4'.split()

LINES = dict(train=lambda d, out: [*train_line(d), out], pack=lambda d, out: [d/'screen', out], predict=lambda d, out: [d/'model', d/'screen', f'{out}.csv', '--tta', '1'])

@pytest.mark.parametrize('name', LINES)
def test_a_second_run_touches_nothing(made, tmp_path, name, capsys):
    line = [str(o) for o in LINES[name](made, tmp_path/'out')]
    out = tmp_path/('out.csv' if name == 'predict' else 'out')
    unfinished = {'train': 'out.checkpoints/epoch_0001', 'pack': 'out.part', 'predict': 'out.csv.part'}[name]
    (tmp_path/unfinished).mkdir(parents=True); (tmp_path/unfinished/'x').touch()
    pid = forked(lambda: holding(out, tmp_path/'ready'))
    try:
        while not (tmp_path/'ready').exists(): time.sleep(.01)
        more = dict(train=['--resume'], pack=['--force']).get(name, [])
        assert getattr(cli, f'rcic_{name}')(line + more) == 2
        assert f'Process {pid} is writing this output' in capsys.readouterr().err
        assert (tmp_path/unfinished/'x').exists()
    finally: ended(pid, signal.SIGKILL)

@pytest.mark.parametrize('name', LINES)
def test_a_run_leaves_no_lock(made, tmp_path, name):
    line = [str(o) for o in LINES[name](made, tmp_path/'out')]
    (tmp_path/('out.csv.lock' if name == 'predict' else 'out.lock')).write_text(json.dumps(dict(core._owner(), pid=2**22 + 1)))
    assert getattr(cli, f'rcic_{name}')(line) == 0
    assert {p.name for p in tmp_path.iterdir()} == dict(train={'out'}, pack={'out'}, predict={'out.csv', 'out.json', 'out.top.csv'})[name]

# Before the training

def test_what_comes_after_is_tried_before(made, tmp_path, monkeypatch, capsys):
    "Index, names and folder: whatever would be refused at the end is refused before the first epoch"
    trained = []
    monkeypatch.setattr(workflow.Learner, 'fit_recipe', lambda *a, **k: trained.append(1))
    def fails(what, *args):
        with monkeypatch.context() as m:
            m.setattr(*args, lambda *a, **k: (_ for _ in ()).throw(ScreenError(f'No {what}.')))
            assert cli.rcic_train([*train_line(made), str(tmp_path/'out')]) == 2
        assert f'No {what}.' in capsys.readouterr().err and not trained and not list(tmp_path.iterdir())
    fails('embedding', 'rcic_fastai.embed.embed._part_features')
    fails('statistics', 'rcic_fastai.embed.embed.adapted_batchnorm')
    fails('index', 'rcic_fastai.embed.index.EmbeddingIndex.save')
    fails('room', 'rcic_fastai.folder._write_files')
    fails('card', 'rcic_fastai.folder.model_card')

def test_trying_changes_no_weight(made, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, 'try_all', lambda *a, **k: None)
    assert cli.rcic_train([*train_line(made), str(tmp_path/'out')]) == 0
    assert (tmp_path/'out/weights.safetensors').read_bytes() == (made/'model/weights.safetensors').read_bytes()
    assert (tmp_path/'out/index.safetensors').read_bytes() == (made/'model/index.safetensors').read_bytes()

def test_the_disk_has_the_model_before_the_checkpoints_go(made, tmp_path, monkeypatch):
    seen = []
    def noted(name, of, real):
        def f(*a, **k): seen.append((name, Path(a[0]).name)); return real(*a, **k)
        monkeypatch.setattr(of, name, f)
    noted('sync_tree', folder, core.sync_tree)
    noted('sync_path', folder, core.sync_path)
    noted('remove_checkpoints', workflow, workflow.remove_checkpoints)
    assert cli.rcic_train([*train_line(made), str(tmp_path/'out')]) == 0
    seen = [o for o in seen if o[1] not in ('out.controls.checkpoints', 'out.pseudo.checkpoints')]      # of steps that this training has not
    assert seen == [('sync_tree', 'out.part'), ('sync_path', tmp_path.name), ('remove_checkpoints', 'out.checkpoints')]

# Two processes, and no launcher that would end the other

SCENES = '''
import contextlib, io, json, sys
from pathlib import Path
from rcic_fastai import cli, folder, workflow
from rcic_fastai.predict import plan
from rcic_fastai.core import OwnLock, ScreenError
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.distributed import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import *
from rcic_fastai.screen.open import open_screen
d, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), rank_world()[0]
train, predict = json.loads(sys.argv[3]), json.loads(sys.argv[4])
def say(scene, text): (out/f'{scene}-{rank}').write_text(str(text))
def command(scene, func, line):
    err = io.StringIO()
    with contextlib.redirect_stderr(err): code = func([str(o) for o in line])
    say(scene, f'{code} {err.getvalue()}')
def refuses(of, name, who):
    real = getattr(of, name)
    def f(*a, **k):
        if rank == who: raise ScreenError(f'{name} refuses.')
        return real(*a, **k)
    setattr(of, name, f)
    return lambda: setattr(of, name, real)

if rank == 0: (out/'held.lock').write_text('mine')
command('lock', cli.rcic_train, [*train, out/'held'])
for scene, of, name, who in [('screen', workflow, 'open_screen', 1), ('begun', workflow, 'begin_checkpoints', 0)]:
    back = refuses(of, name, who); command(scene, cli.rcic_train, [*train, out/'new']); back()
from rcic_fastai.train import recipes
from rcic_fastai.embed import embed
back = refuses(recipes, '_stage_model', 1); command('stage', cli.rcic_train, [*train, out/'new']); back()
for scene, of, name, who in [('model', folder, 'load_model', 0), ('parts', embed, '_write_part', 0), ('rows', plan, 'prediction_rows', 1)]:
    back = refuses(of, name, who); command(scene, cli.rcic_predict, [*predict, out/f'{scene}.csv']); back()
from rcic_fastai.train.checkpoints import Checkpoint
real = Checkpoint.after_batch
def after_batch(self):
    if self.training and rank == 1: raise ScreenError('The disk is gone.')
    real(self)
Checkpoint.after_batch = after_batch
command('batch', cli.rcic_train, [*train, out/'new2'])
'''

@pytest.fixture(scope='module')
def scenes(made, tmp_path_factory):
    out = tmp_path_factory.mktemp('scenes')
    lines = [json.dumps(train_line(made)), json.dumps([str(made/'model'), str(made/'screen'), '--tta', '1'])]
    return out, [r.stderr[-2000:] for r in two_processes(SCENES, made, out, *lines, env=ENV, timeout=100)]

@pytest.mark.parametrize('scene,who,why', [('lock', 0, 'held.lock is no lock'), ('screen', 1, 'open_screen refuses'), ('begun', 0, 'begin_checkpoints refuses'),
    ('stage', 1, '_stage_model refuses'), ('model', 0, 'load_model refuses'), ('parts', 0, '_write_part refuses'), ('rows', 1, 'prediction_rows refuses')])
def test_a_refusal_reaches_all(scenes, scene, who, why):
    out, errors = scenes
    files = [out/f'{scene}-{rank}' for rank in (0, 1)]
    assert all(f.exists() for f in files), errors
    said = [f.read_text() for f in files]
    assert all(s.startswith('2 ') and why in s for s in said), said
    assert f'Process {who} of this run stopped' in said[1 - who] and 'of this run stopped' not in said[who]

def test_a_failure_between_two_batches_ends_all(scenes):
    out, errors = scenes
    said = [(out/f'batch-{rank}').read_text() for rank in (0, 1)]
    assert said[1].startswith('2 ') and 'The disk is gone.' in said[1]
    assert said[0].startswith('2 ') and 'Another process of this run has stopped' in said[0]
    assert not list(out.glob('new*.lock')) and (out/'held.lock').read_text() == 'mine'
