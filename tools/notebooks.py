"""Run every notebook, each in a process of its own, so that none can lean on what another has imported or set.

    python tools/notebooks.py [--save] [--workers N] [NOTEBOOK ...]

One line a notebook; what a failed one said follows at the end, with the names of all that failed. `--save` stores the
outputs, cleaned.
"""
import argparse, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent   # not resolved: the commands stand beside the environment's python


def run(nb, save):
    "Run one notebook; its exit code and all it printed."
    start = time.monotonic()
    done = subprocess.run([BIN/'nbdev-test', '--n-workers', '0', *(['--save'] if save else []), nb], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed = done.returncode or 'No files were eligible' in done.stdout
    if save and not failed: subprocess.run([BIN/'nbdev-clean', '--fname', nb], cwd=ROOT, check=True)
    print(f"{'FAILED' if failed else 'passed'} {time.monotonic() - start:5.0f} s  {nb.relative_to(ROOT)}", flush=True)
    return nb, failed, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: index.ipynb and all in nbs/')
    parser.add_argument('--save', action='store_true', help='store the outputs')
    parser.add_argument('--workers', type=int, default=2, help='notebooks at a time (default: %(default)s)')
    args = parser.parse_args()
    nbs = [nb.absolute() for nb in args.notebooks] or sorted((ROOT/'nbs').glob('*.ipynb'))
    with ThreadPoolExecutor(args.workers) as pool: results = list(pool.map(lambda nb: run(nb, args.save), nbs))
    failed = [(nb, said) for nb, wrong, said in results if wrong]
    for nb, said in failed: print(f'\n{"="*20} {nb.name}\n{said}')
    if failed: raise SystemExit(f"notebooks: failed: {' '.join(nb.name for nb, _ in failed)}")
    print(f'notebooks: all {len(nbs)} passed')


if __name__ == '__main__': main()
