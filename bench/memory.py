"""Memory of rcic_predict at 1, 4 and 16 times the sites: at 16 times at most 1.2 times that of one is asked.

    python bench/memory.py [SITES]

A packed screen of 64 px, SITES (default 250) sites for each test experiment of 1, 4 and 16, and a tiny model; every
run is a process of its own, whose largest resident memory the operating system tells. The embeddings and neighbors
are written too.
"""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
from machine import save
from rcic_fastai import cli
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.pack import PackedScreen, pack_screen
from rcic_fastai.screen.screen import Screen

TIMES, LIMIT = (1, 4, 16), 1.2
CHILD = '''
import resource, sys
from rcic_fastai.cli import rcic_predict
code = rcic_predict(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
'''
ENV = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore')


class Repeated(ImageSource):
    "The sites of a screen again under the names of other experiments"
    def __init__(self, source, table):
        super().__init__(source.root, table, source.channels)
        self.source, self.of = source, dict(zip(table.site_id, table['from']))
    shape, dtype = property(lambda self: self.source.shape), property(lambda self: self.source.dtype)
    def _read(self, site_id, out): self.source._read(self.of[site_id], out)
    def missing(self): return pd.DataFrame(columns=['site_id', 'missing', 'file'])


def repeated(table, n):
    "A table of n test experiments, each with all rows of the one in `table`"
    many = pd.concat([table.assign(**{'from': table.site_id}, experiment=f'HUVEC-{100+i}') for i in range(n)], ignore_index=True)
    many['well_id'] = many.experiment + '_' + many.plate.astype(str) + '_' + many.well
    return many.assign(site_id=many.well_id + '_' + many.site.astype(str))


def prepare(home, sites):
    "Screens of 1, 4 and 16 test experiments of `sites` sites, and a model folder"
    wells = -(-sites//2)
    cli.simulate(home/'png', 'HUVEC-01,HUVEC-02,HUVEC-17', sirnas=max(wells - 4, 4), size=64, controls=0, workers=1)
    cli.pack(home/'png', home/'all.zarr')
    (home/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='mobilenetv3_small_050', stages=[])))
    cli.train(home/'all.zarr', home/'model', recipe=str(home/'tiny.json'), valid='none', pretrained='no', tta=1)
    source = PackedScreen(home/'all.zarr')
    test = source.table[source.table.dataset == 'test']
    for n in TIMES:
        table = repeated(test, n)
        pack_screen(Screen(table.drop(columns='from'), Repeated(source, table)), home/f'{n}.zarr', progress=False)


def measure(home, n):
    out = home/f'{n}'
    args = [home/'model', home/f'{n}.zarr', f'{out}.csv', '--tta', '1', '--wells', 'all', '--neighbors', f'{out}_near.parquet',
            '--embeddings', f'{out}_emb.parquet']
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', CHILD, *map(str, args)], env=ENV, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    kb = int(done.stderr.split()[-1])/(1024 if sys.platform == 'darwin' else 1)
    return dict(times=n, sites=len(pd.read_parquet(f'{out}_emb.parquet', columns=['Metadata_site_id'])), wells=len(pd.read_csv(f'{out}.csv')),
                peak_mb=round(kb*1024/1e6, 1), seconds=round(time.perf_counter() - start, 1))


def main(sites=250):
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        prepare(home, sites)
        measure(home, 1)      # fills the file cache and writes bytecode
        rows = [measure(home, n) for n in TIMES]
    print(pd.DataFrame(rows).to_string(index=False))
    ratio = rows[-1]['peak_mb']/rows[0]['peak_mb']
    kb = float(np.polyfit([r['sites'] for r in rows], [r['peak_mb'] for r in rows], 1)[0])*1000
    print(f'peak memory at {TIMES[-1]} times the sites: {ratio:.3f} times that of one   asked: at most {LIMIT}; {kb:.1f} kB a site')
    save('memory', runs=rows, ratio=round(ratio, 3), ratio_asked=LIMIT, kb_a_site=round(kb, 2), met=ratio <= LIMIT)


if __name__ == '__main__': main(*map(int, sys.argv[1:2]))
