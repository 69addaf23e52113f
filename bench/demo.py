"""How long `make demo` takes after installation, how much memory it needs, and what it reaches.

    python bench/demo.py [FOLDER]

Runs rcic_demo in a process of its own (with its children) and reads the results that it wrote.
"""
import json, resource, subprocess, sys, tempfile, time
from pathlib import Path

from machine import save

LIMITS = dict(minutes=6, peak_gb=4, times_chance=10)


def main(folder=None):
    with tempfile.TemporaryDirectory() as tmp:
        out, start = Path(folder or tmp)/'demo', time.time()
        subprocess.run([Path(sys.executable).parent/'rcic_demo', out, '--force'], check=True)
        seconds = time.time() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024/1e9
        results = json.loads((out/'results.json').read_text())
    figures = dict(seconds=round(seconds), minutes_asked=LIMITS['minutes'], peak_gb=round(peak, 2), peak_gb_asked=LIMITS['peak_gb'])
    for protocol, r in results.items(): figures[protocol] = r
    ind = results['inductive']
    figures['inductive_times_chance'] = round(ind['accuracy']/ind['chance'], 1)
    figures['times_chance_asked'] = LIMITS['times_chance']
    print(f"{'':14}{'measured':>10}{'asked':>10}")
    print(f"{'minutes':14}{seconds/60:10.1f}{'< 6':>10}\n{'peak GB':14}{peak:10.2f}{'< 4':>10}")
    print(f"{'inductive':14}{ind['accuracy']:10.3f}{'≥ ' + format(10*ind['chance'], '.3f'):>10}")
    for p in ('adapted', 'transductive'): print(f"{p:14}{results[p]['accuracy']:10.3f}{'≥ ' + format(ind['accuracy'], '.3f'):>10}")
    save('demo', **figures)


if __name__ == '__main__': main(*sys.argv[1:2])
