"""Run every notebook, each in a process of its own, so that none can lean on what another has imported or set.

    python tools/notebooks.py [--save] [--workers N] [--new] [NOTEBOOK ...]

One line per notebook; what a failed one said follows at the end, with the names of all that failed. `--save` stores the
outputs, cleaned.

The packages of others take most of the time of a short notebook. They are imported once, here, and every notebook runs in
a fork of this process; `rcic_fastai` itself is imported by each notebook. Sites of simulated screens that several notebooks
have in common are drawn once (drawn.py), unless outputs are stored. Where there is no safe fork (Windows, macOS), and with
`--new`, every notebook starts a new Python and draws its own.
"""
import argparse, atexit, gc, importlib, os, shutil, subprocess, sys, tempfile, threading, time, traceback
from pathlib import Path
from drawn import KeepDrawn

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent   # not resolved: the commands stand beside the environment's python
CAN_FORK = hasattr(os, 'fork') and sys.platform != 'darwin'
WARM = 'nbdev.test nbdev.clean fastai.vision.all faiss timm cv2 sklearn scipy.stats pyarrow.parquet matplotlib_inline.backend_inline'.split()


def as_at_exit(f):
    "Call `f` and the exit functions of Python; the exit code. All that a Python frees as it ends is left to the system"
    code = 0
    try: f()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class Fork:
    "Call `f` in a fork of this process, which ends as a Python does: with its exit functions"
    def __init__(self, f, out):
        sys.stdout.flush()
        self.code, self.pid = None, os.fork()
        if self.pid: return
        for fd in (1, 2): os.dup2(out.fileno(), fd)
        os._exit(as_at_exit(f))

    def poll(self):
        "The exit code; None while it runs"
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]: self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code


def warm():
    "Import the packages of others; nothing may run beside a fork, and nothing of the library may be there before it"
    gc.disable()   # it would walk over all of this again and again
    for name in WARM: importlib.import_module(name)
    gc.freeze()     # nor do the notebooks walk over it: what they share stays shared
    gc.enable()
    assert threading.active_count() == 1 and 'rcic_fastai' not in sys.modules


def test_forked(command, drawn):
    "Do what `command`, a call of nbdev-test, does in a new process; `drawn` is a folder for drawn sites, or None"
    import random
    import numpy as np
    from nbdev.test import nbdev_test
    random.seed()
    np.random.seed()   # as in a new process: two forks draw different numbers
    sys.argv, sys.path[0] = [str(c) for c in command], str(BIN)
    if drawn: sys.meta_path.insert(0, KeepDrawn(drawn))
    nbdev_test(path=sys.argv[-1], n_workers=0, save='--save' in command)


def start(nb, save, fork, drawn):
    "Start one notebook; the process, the file that takes what it prints, and the time"
    out = tempfile.TemporaryFile('w+', errors='replace')
    command = [BIN/'nbdev-test', '--n-workers', '0', *(['--save'] if save else []), nb]
    began = time.monotonic()
    if fork: return Fork(lambda: test_forked(command, None if save else drawn), out), out, began
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT), out, began


def finish(nb, save, process, out, began):
    "Report one notebook that has ended; whether it failed, and all it printed"
    out.seek(0)
    said = out.read()
    failed = process.poll() or 'No files were eligible' in said
    if save and not failed: subprocess.run([BIN/'nbdev-clean', '--fname', nb], cwd=ROOT, check=True)
    print(f"{'FAILED' if failed else 'passed'} {time.monotonic() - began:5.0f} s  {nb.relative_to(ROOT)}", flush=True)
    return failed, said


def run(nbs, save, workers, fork, drawn):
    "Run the notebooks, `workers` at a time; for each, whether it failed and what it printed"
    todo, running, results = list(nbs), {}, {}
    while todo or running:
        while todo and len(running) < workers: running[nb] = start(nb := todo.pop(0), save, fork, drawn)
        for nb in [nb for nb, (process, *_) in running.items() if process.poll() is not None]:
            results[nb] = finish(nb, save, *running.pop(nb))
        time.sleep(.02)
    return [(nb, *results[nb]) for nb in nbs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: index.ipynb and all in nbs/')
    parser.add_argument('--save', action='store_true', help='store the outputs')
    parser.add_argument('--workers', type=int, default=2, help='notebooks at a time (default: %(default)s)')
    parser.add_argument('--new', action='store_true', help='start a new Python for each notebook')
    args = parser.parse_args()
    # the long ones, index and tutorials, stand last by name and begin first, so that the workers end together
    nbs = [nb.absolute() for nb in args.notebooks] or sorted((ROOT/'nbs').glob('*.ipynb'), reverse=True)
    fork = CAN_FORK and not args.new
    os.chdir(ROOT)
    if fork: warm()
    drawn = tempfile.mkdtemp()  # no TemporaryDirectory: the first fork that ends would remove it
    try: results = run(nbs, args.save, args.workers, fork, drawn)
    finally: shutil.rmtree(drawn)
    gc.unfreeze()
    failed = [(nb, said) for nb, wrong, said in results if wrong]
    for nb, said in failed: print(f'\n{"="*20} {nb.name}\n{said}')
    if failed: raise SystemExit(f"notebooks: failed: {' '.join(nb.name for nb, _ in failed)}")
    print(f'notebooks: all {len(nbs)} passed')


if __name__ == '__main__': main()
