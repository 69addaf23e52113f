"""How long `make demo` takes after installation, how much memory it needs, and what it reaches.

    python bench/demo.py [FOLDER]
    python bench/demo.py --seeds 1 2     other seeds: their accuracies are added to the stored figures
    python bench/demo.py --elsewhere     another machine: its minutes and accuracies are added

Runs rcic_demo in a process of its own (with its children) and reads the results that it wrote. A seed decides the
screen that is drawn, the order of training and the augmentations.
"""
import argparse, json, re, resource, subprocess, sys, tempfile, time
from pathlib import Path

from machine import RESULTS, cpu_model, save
from rcic_fastai.core import write_json

LIMITS = dict(minutes=2.5, peak_gb=4, times_chance=10)
PROTOCOLS = ('inductive', 'adapted', 'transductive')


def run(folder, seed):
    "Return the results of `evaluate` by protocol, and the seconds after which each step began"
    out = Path(folder)/'demo'
    with subprocess.Popen([Path(sys.executable).parent/'rcic_demo', out, '--force', '--seed', str(seed)], stdout=subprocess.PIPE, text=True) as demo:
        said = []
        for line in demo.stdout: print(line, end='', flush=True); said.append(line)
    if demo.returncode: raise SystemExit(f'rcic_demo ended with {demo.returncode}.')
    return json.loads((out/'results.json').read_text()), steps_of(''.join(said))


def steps_of(said): return {name: int(s) for name, s in re.findall(r'== (.+) \((\d+) s since start\)', said)}


def accuracies(results): return {p: round(results[p]['accuracy'], 4) for p in PROTOCOLS}


def more_seeds(folder, seeds):
    stored = json.loads((RESULTS/'demo.json').read_text())
    found = stored.get('seeds', {'0': accuracies(stored)})
    for seed in seeds: found[str(seed)] = accuracies(run(folder, seed)[0])
    for p in PROTOCOLS:
        values = [f[p] for f in found.values()]
        print(f'{p:14} mean {sum(values)/len(values):.3f}, {min(values):.3f} to {max(values):.3f} over {len(values)} seeds')
    save('demo', **{k: v for k, v in {**stored, 'seeds': found}.items() if k != 'machine'})


def measure(folder):
    start = time.time()
    results, steps = run(folder, 0)
    seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024/1e9
    figures = dict(seconds=round(seconds), minutes_asked=LIMITS['minutes'], peak_gb=round(peak, 2), peak_gb_asked=LIMITS['peak_gb'])
    figures.update(results, steps_begin_at_s=steps)
    ind = results['inductive']
    figures['inductive_times_chance'] = round(ind['accuracy']/ind['chance'], 1)
    figures['times_chance_asked'] = LIMITS['times_chance']
    figures['seeds'] = {'0': accuracies(results)}
    print(f"{'':14}{'measured':>10}{'asked':>10}")
    print(f"{'minutes':14}{seconds/60:10.1f}{'< 2.5':>10}\n{'peak GB':14}{peak:10.2f}{'< 4':>10}")
    print(f"{'inductive':14}{ind['accuracy']:10.3f}{'≥ ' + format(10*ind['chance'], '.3f'):>10}")
    for p in PROTOCOLS[1:]: print(f"{p:14}{results[p]['accuracy']:10.3f}{'≥ ' + format(ind['accuracy'], '.3f'):>10}")
    return figures


def elsewhere(figures):
    "Add the figures of another machine to the stored ones"
    stored = json.loads((RESULTS/'demo.json').read_text())
    also = dict(cpu=cpu_model(), **{k: figures[k] for k in ('seconds', 'peak_gb', 'steps_begin_at_s')}, **accuracies(figures))
    write_json(RESULTS/'demo.json', {**stored, 'elsewhere': also}, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', help='where to make the demo')
    parser.add_argument('--seeds', type=int, nargs='+', help='more seeds, whose accuracies are added')
    parser.add_argument('--elsewhere', action='store_true', help='add to the stored figures those of this machine')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        if args.seeds: more_seeds(args.folder or tmp, args.seeds)
        elif args.elsewhere: elsewhere(measure(args.folder or tmp))
        else: save('demo', **measure(args.folder or tmp))


if __name__ == '__main__': main()
