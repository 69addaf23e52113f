"""How much longer than fastai's own import ours takes: at most 15 % more is asked.

    python bench/import_time.py [ROUNDS]

Every round starts both in new processes, one after the other and in alternating order, so that a busy machine
slows both alike; the median of the rounds' ratios counts.
"""
import subprocess, sys
from statistics import median

from machine import save

FASTAI, OURS = 'from fastai.vision.all import *', 'import rcic_fastai.all'
TIMER = 'import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)'
LIMIT = 1.15


def seconds(statement):
    done = subprocess.run([sys.executable, '-c', TIMER.format(statement)], capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'`{statement}` failed:\n{done.stderr}')
    return float(done.stdout.split()[-1])


def main(rounds=11):
    seconds(OURS)   # fills the file cache and writes bytecode
    pairs = []
    for i in range(rounds):
        first, second = (FASTAI, OURS) if i % 2 == 0 else (OURS, FASTAI)
        took = {first: seconds(first), second: seconds(second)}
        pairs.append((took[FASTAI], took[OURS]))
    ratios = [ours / fastai for fastai, ours in pairs]
    figures = dict(rounds=rounds, fastai_s=round(median(p[0] for p in pairs), 3),
                   rcic_fastai_s=round(median(p[1] for p in pairs), 3),
                   ratio=round(median(ratios), 3), ratio_min=round(min(ratios), 3), ratio_max=round(max(ratios), 3),
                   ratio_asked=LIMIT, met=median(ratios) <= LIMIT)
    print(f"{FASTAI:34} {figures['fastai_s']:6.2f} s\n{OURS:34} {figures['rcic_fastai_s']:6.2f} s\n"
          f"{'ratio (median of ' + str(rounds) + ' rounds)':34} {figures['ratio']:6.2f}   asked: at most {LIMIT}")
    save('import_time', **figures)


if __name__ == '__main__': main(*map(int, sys.argv[1:2]))
