"""How long `make demo` takes after installation, how much memory it needs, and what it reaches.

    python bench/demo.py [FOLDER]
    python bench/demo.py --seeds 1 2     other seeds: their accuracies are added to the stored figures

Runs rcic_demo in a process of its own (with its children) and reads the results that it wrote. A seed decides the
screen that is drawn, the order of training and the augmentations.
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path

from machine import RESULTS, save

LIMITS = dict(minutes=2.5, peak_gb=4, times_chance=10)
PROTOCOLS = ('inductive', 'adapted', 'transductive')


def run(folder, seed):
    "Return the results of `evaluate` by protocol"
    out = Path(folder)/'demo'
    subprocess.run([Path(sys.executable).parent/'rcic_demo', out, '--force', '--seed', str(seed)], check=True)
    return json.loads((out/'results.json').read_text())


def accuracies(results): return {p: round(results[p]['accuracy'], 4) for p in PROTOCOLS}


def more_seeds(folder, seeds):
    stored = json.loads((RESULTS/'demo.json').read_text())
    found = stored.get('seeds', {'0': accuracies(stored)})
    for seed in seeds: found[str(seed)] = accuracies(run(folder, seed))
    for p in PROTOCOLS:
        values = [f[p] for f in found.values()]
        print(f'{p:14} mean {sum(values)/len(values):.3f}, {min(values):.3f} to {max(values):.3f} over {len(values)} seeds')
    save('demo', **{k: v for k, v in {**stored, 'seeds': found}.items() if k != 'machine'})


def measure(folder):
    start = time.time()
    results = run(folder, 0)
    seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024/1e9
    figures = dict(seconds=round(seconds), minutes_asked=LIMITS['minutes'], peak_gb=round(peak, 2), peak_gb_asked=LIMITS['peak_gb'])
    figures.update(results)
    ind = results['inductive']
    figures['inductive_times_chance'] = round(ind['accuracy']/ind['chance'], 1)
    figures['times_chance_asked'] = LIMITS['times_chance']
    figures['seeds'] = {'0': accuracies(results)}
    print(f"{'':14}{'measured':>10}{'asked':>10}")
    print(f"{'minutes':14}{seconds/60:10.1f}{'< 2.5':>10}\n{'peak GB':14}{peak:10.2f}{'< 4':>10}")
    print(f"{'inductive':14}{ind['accuracy']:10.3f}{'≥ ' + format(10*ind['chance'], '.3f'):>10}")
    for p in PROTOCOLS[1:]: print(f"{p:14}{results[p]['accuracy']:10.3f}{'≥ ' + format(ind['accuracy'], '.3f'):>10}")
    save('demo', **figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', help='where to make the demo')
    parser.add_argument('--seeds', type=int, nargs='+', help='more seeds, whose accuracies are added')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        if args.seeds: more_seeds(args.folder or tmp, args.seeds)
        else: measure(args.folder or tmp)


if __name__ == '__main__': main()
