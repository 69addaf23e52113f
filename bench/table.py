"""What an answer costs besides pictures and network: `model.predict` on the table of a screen of RxRx1's size.

    python bench/table.py [--experiments 13,26,51]

The screen has RxRx1's layout (51 experiments, 1,108 siRNAs, 125,664 sites) and pictures of 8×8 pixels that are made up as they
are asked for; the network is one small matrix. What is left is the library: tables, batches, plans, index, search, votes, groups,
assignment and the file of answers. Every line is a process of its own, whose largest resident memory the operating system tells.
"""
import argparse, json, resource, subprocess, sys, tempfile, time, zlib
from pathlib import Path

import numpy as np
from machine import save

ASKED = dict(seconds=60, peak_gb=3)
REAL = dict(HUVEC=24, RPE=11, HEPG2=11, U2OS=5)


def experiments(n):
    "Return the names of n experiments, a share of each cell type's first and last ones"
    names = [f'{c}-{i:02d}' for c, k in REAL.items() for i in range(1, k + 1)]
    return [names[i] for i in np.linspace(0, len(names) - 1, n).round().astype(int)]


def made_up(table):
    "Return a screen whose pictures cost nothing"
    from rcic_fastai.all import ImageSource, Screen
    noise = np.random.default_rng(0).integers(0, 256, (997, 6, 8, 8), np.uint8)
    class Noise(ImageSource):
        shape, dtype = (6, 8, 8), np.dtype(np.uint8)
        def _read(self, site_id, out): out[...] = noise[zlib.crc32(site_id.encode()) % 997]
    return Screen(table, Noise('made-up', table))


def costless(screen):
    "Return a trained model whose network is one small matrix"
    from torch import nn
    from rcic_fastai.all import screen_dls, screen_learner
    learn = screen_learner(screen_dls(screen, valid='none', device='cpu'), 'test_resnet', pretrained=None)
    features = learn.model.n_pooled//2
    learn.model.stem = nn.Conv2d(6, 6, 8)
    learn.model.body = nn.Sequential(nn.Conv2d(6, features, 1, bias=False), nn.BatchNorm2d(features))
    return learn.to_model(tta=1, progress=False)


def one(n, protocol):
    "Return seconds of making the index and of answering, and the memory of both"
    import warnings
    warnings.filterwarnings('ignore')
    from rcic_fastai.all import screen_layout
    screen = made_up(screen_layout(experiments(n), sirnas=1108))
    start = time.perf_counter()
    model = costless(screen)
    built = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        wells = len(model.predict(screen, protocol, Path(folder)/'answers.csv', tta=1))
    return dict(experiments=n, sites=len(screen), protocol=protocol, wells=wells, index_seconds=round(built - start, 1),
                seconds=round(time.perf_counter() - built, 1), peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--experiments', default='13,26,51', help='sizes of the screen (default: %(default)s)')
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print('\n' + json.dumps(one(int(args.one[0]), args.one[1])))
    rows = []
    for n in args.experiments.split(','):
        for protocol in ('inductive', 'adapted', 'transductive'):
            done = subprocess.run([sys.executable, __file__, '--one', n, protocol], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    whole = [r for r in rows if r['experiments'] == rows[-1]['experiments']]
    met = {k: max(r[k] for r in whole) < v for k, v in ASKED.items()}
    print(f'asked of the largest: {ASKED}; met: {met}')
    save('table', lines=rows, asked=ASKED, met=met)


if __name__ == '__main__': main()
