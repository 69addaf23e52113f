"""Sites a second of `simulate_screen` at several sizes. Prints a table, stores bench/results/simulate.json.

On a shared machine the clock says little; `on_2_quiet_cores` is what the processor time of the drawing allows.

python bench/simulate.py [--sizes 64,128,256,512] [--workers N]
"""
import argparse, os, tempfile, time
from pathlib import Path

import pandas
from machine import save
from rcic_fastai.screen.simulate.layout import simulate_screen


ASKED = {128: 40, 512: 5} # sites/s on 2 cores


def measure(size, workers, sirnas):
    "Draw a small screen of three cell types: sites/s with start-up included, kB a site."
    with tempfile.TemporaryDirectory() as d:
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        table = simulate_screen(f'{d}/screen', ('HUVEC-01', 'HEPG2-01', 'RPE-01'), sirnas=sirnas, size=size, controls=4,
                                n_workers=workers, progress=False)
        seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
        kb = sum(f.stat().st_size for f in Path(d).rglob('*.png'))/1000
    return dict(size=size, sites=len(table), seconds=round(seconds, 2), sites_per_s=round(len(table)/seconds, 1),
                cpu_ms_per_site=round(1000*cpu/len(table), 1), on_2_quiet_cores=round(2*len(table)/cpu, 1),
                asked=ASKED.get(size), kB_per_site=round(kb/len(table), 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', default='64,128,256,512', help='sides of a site in px, with commas')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='worker processes (default: one per core)')
    args = p.parse_args()
    load = round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None  # above 0: the machine was shared
    rows = [measure(int(s), args.workers, 48 if int(s) <= 128 else 16) for s in args.sizes.split(',')]
    print(pandas.DataFrame(rows).to_string(index=False))
    save('simulate', workers=args.workers, load_before=load, rows=rows)


if __name__ == '__main__': main()
