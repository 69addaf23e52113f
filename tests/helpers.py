"What several test files use."
import atexit, multiprocessing, os, socket, subprocess, sys, tempfile, types
from functools import partial, wraps
from pathlib import Path
from unittest import mock
import pytest, torch
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.simulate import layout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
from drawn import kept_studio  # noqa: E402


def refused(f, *words):
    "Call `f`, which must raise a `ScreenError`: one short sentence with these words; return it"
    with pytest.raises(ScreenError) as e: f()
    text = str(e.value)
    for w in words: assert w in text, text
    assert '\n' not in text and text.endswith('.') and len(text) < 1500, text
    return text


def learner(dls, make=None, **kwargs):
    "Return a small learner without a progress bar"
    from rcic_fastai.train.learner import screen_learner
    learn = (make or screen_learner)(dls, 'test_efficientnet', pretrained=None, emb_dim=16, **kwargs)
    return learn.remove_cb(learn.progress) or learn


def quiet(learn, f):
    "Call `f` without the table of the epochs"
    with learn.no_logging(): return f()


def same(a, b):
    "Return whether two dicts hold the same tensors"
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- drawn screens

DRAWN = None    # a folder, which conftest.py makes

@wraps(layout.simulate_screen)
def simulate_screen(*args, **kwargs):
    "Draw a screen as the library does, to the same bytes; sites that another test has drawn, in any worker, are taken from there"
    with mock.patch.object(layout, 'Studio', partial(kept_studio, layout.Studio, DRAWN)): return layout.simulate_screen(*args, **kwargs)


# ---- processes

WARM = ['pytest', 'fastai.vision.all', 'faiss', 'timm', 'cv2', 'pyarrow.parquet', 'safetensors.torch', 'rcic_fastai.all', 'rcic_fastai.cli']


class Forked:
    "A process as `subprocess.Popen([sys.executable, '-c', code, *args])` starts it, forked from one that has imported `WARM`"
    def __init__(self, code, *args, env=None, cwd=None):
        self.args, self.folder = [sys.executable, '-c', code, *map(str, args)], tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name)/name for name in ('out', 'err')]
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(WARM)
        self.process = context.Process(target=_become, args=(code, self.args[3:], dict(os.environ if env is None else env), str(cwd or os.getcwd()), self.files))
        self.process.start()

    def wait(self, timeout=300):
        "Wait, and return what `subprocess.run` returns"
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *(f.read_text() if f.exists() else '' for f in self.files))


class Started(Forked):
    "The same where a process cannot be forked from another (macOS, Windows)"
    def __init__(self, code, *args, env=None, cwd=None):
        self.args = [sys.executable, '-c', code, *map(str, args)]
        self.process = subprocess.Popen(self.args, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self, timeout=300):
        "Wait, and return what `subprocess.run` returns"
        try: said = self.process.communicate(timeout=timeout)
        finally: self.process.kill()
        return subprocess.CompletedProcess(self.args, self.process.returncode, *said)


def _become(code, args, env, cwd, files):
    "Be the process of `Forked`: its arguments, environment, folder and output; at the end its exit functions"
    for fd, file in zip((1, 2), files): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.modules['__main__'] = ['-c', *args], types.ModuleType('__main__')
    sys.stdout, sys.stderr = (open(fd, 'w', encoding='utf-8', closefd=False, errors=e) for fd, e in ((1, 'strict'), (2, 'backslashreplace')))
    try: exec(compile(code, '<string>', 'exec'), vars(sys.modules['__main__']))
    finally: atexit._run_exitfuncs()


start_python = Forked if hasattr(os, 'fork') and sys.platform != 'darwin' else Started


def python(code, *args, timeout=300, **kwargs):
    "Run code in a process of its own, whose imports are done; return what `subprocess.run` returns"
    return start_python(code, *args, **kwargs).wait(timeout)


def two_processes(code, *args, env=None, timeout=280):
    "Run code in two processes that find each other as those of torchrun do; return what `subprocess.run` returns for each"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'GLOO_SOCKET_IFNAME': 'lo', **(env or {}), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    started = [start_python(code, *args, env={**env, 'RANK': str(rank), 'LOCAL_RANK': '0'}) for rank in (0, 1)]
    return [p.wait(timeout) for p in started]
