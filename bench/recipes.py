"""Every published recipe on one screen, in small, by one rule: what each idea is worth where all else is equal.

    python bench/recipes.py [--epochs 24] [--seeds 0,1,2] [--only rcic117,rcic16] [--runs FOLDER] [--full --screen STORE]

The rule: each recipe as it is, with (1) EfficientNet-Lite0 with its published weights in place of its backbone, unless the backbone is the point
(`capstone_cnn`); (2) pictures of 64 px for 512, sizes and crops in proportion; (3) so many epochs in all, shared among its stages as its own are;
(4) batches of 32, the rate times the root of 32 over its own batch (SGD: times 32 over it); (5) all six channels, no first task, one model; (6) nothing held out, so that all have the same
wells, and what would choose by held-out experiments has nothing to choose by. All have the same epochs of the same pictures; the seconds that these took are
stored. The screen: 8 training and 4 unseen experiments, 24 siRNAs, six in each plate group. A recipe predicts as its authors did.

What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues. `--full` trains the recipes at their own sizes
on a packed RxRx1 (`--screen`), for whoever has a GPU and weeks. Prints one table with the protocols in columns of their own; stores bench/results/recipes.json.
"""
import argparse, contextlib, io, json, os, tempfile, time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import pandas as pd
from machine import save
from rcic_fastai.all import *
from rcic_fastai.core import write_json
from time_to_accuracy import TRAIN, UNSEEN

SIDE, BATCH, SIRNAS = 64, 32, 24
LEFT_OUT = ('features', 'best',   # no training; the demo recipe with more epochs
            'rcic16_efficientnet_b4', 'rcic16_xception', 'rcic16_resnet101_cbam', 'rcic16_se_resnext101',   # the same with another backbone
            'rcic117_huvec', 'rcic117_u2os', 'rcic117_hepg2', 'rcic117_rpe', 'rcic117_groups', 'rcic117_cell_types', 'rcic16_cell_types', 'capstone_cell_types',   # other wells are judged, or each by a model of its cell type
            'rcic1_pseudo', 'six_channels_pseudo')   # learn what is judged
# what telling the plate group is worth by itself: the demo recipe with metadata, each well named alone
TOLD = replace(RECIPES['demo'], name='demo_told', model=dict(metadata=['cell_type', 'plate_group', 'experiment']), predict=dict(tell='plate_group', assign='no'),
               about='The demo recipe with metadata: the plate groups that were inferred are told')
ALL = {**{n: r for n, r in RECIPES.items() if n not in LEFT_OUT and not r.data.get('several')}, 'demo_told': TOLD}
NAMES = [*ALL]


def drawn(folder):
    "Return the screen, drawn and packed once"
    store = folder/'recipes.zarr'
    if not store.exists():
        simulate_screen(folder/'recipes', TRAIN + UNSEEN, sirnas=SIRNAS, size=SIDE, controls=2, seed=11, progress=False)
        pack_screen(open_screen(folder/'recipes'), store, progress=False)
    return open_screen(store)


def rate_for(lr, share, opt):
    "Return the learning rate for a batch that is `share` times as large"
    name = opt['name'] if isinstance(opt, dict) else opt
    f = share if name == 'sgd' else share**.5
    if isinstance(lr, dict): return {k: v*f for k, v in lr.items()}
    return tuple(v*f for v in lr) if isinstance(lr, (tuple, list)) else lr*f


def in_small(recipe, epochs):
    "Return a recipe by the rule above"
    r, bs, opt, stages = recipe.scaled(epochs, side=SIDE), recipe.data.get('bs', BATCH), None, []
    for s in r.stages:
        bs, opt = s.bs or bs, s.opt or opt
        stages.append(replace(s, lr=rate_for(s.lr, BATCH/(bs*s.accumulate), opt), bs=None, accumulate=1, size=None if s.size == SIDE else s.size))
    model = {k: v for k, v in r.model.items() if k != 'arch_args'}
    keep = recipe.arch == 'capstone_cnn'
    groups = {'batch_groups': 4} if 'batch_groups' in r.data else {}
    return replace(r, channels='', pretrain='', pseudo={}, stages=stages, arch=recipe.arch if keep else 'efficientnet-lite0', model=model, data={**r.data, 'bs': BATCH, **groups}, valid=())


def one(recipe, screen, seed):
    "Train and judge one recipe: accuracy by protocol, seconds of the training"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()):
        model = train_screen(screen, Path(home)/'model', recipe, valid='none', seed=seed, pretrained='no' if recipe.arch == 'capstone_cnn' else 'yes')
    trained = time.perf_counter() - start
    res = {}
    for p in ('inductive', 'adapted', 'transductive'):
        try: res[p] = accuracy_of(model, screen, p)
        except ScreenError as e: res[p] = str(e)
    if recipe.predict.get('tell'): res['transductive, not told'] = accuracy_of(model, screen, 'transductive', tell='no')
    return dict(seconds=round(trained), accuracy=res)


def accuracy_of(model, screen, protocol, **kwargs):
    "Return the share of unseen wells that are named right"
    if protocol == 'adapted': kwargs['adapt'] = 'experiment'
    pred = model.predict(screen, protocol, progress=False, **kwargs)
    return float(right_wrong(pred, screen.table).right.mean())


def table_of(runs, names, seeds):
    "Return one row per recipe: mean, lowest and highest of each protocol over the seeds"
    rows = []
    for n in names:
        found = [json.loads(f.read_text()) for s in seeds if (f := runs/f'recipes-{n}-{s}.json').exists()]
        if not found: continue
        row = dict(recipe=n, published=ALL[n].about.split(':')[0], seeds=len(found), seconds=sum(f['seconds'] for f in found)/len(found))
        for p in ('inductive', 'adapted', 'transductive', 'transductive, not told'):
            a = [f['accuracy'][p] for f in found if isinstance(f['accuracy'].get(p), float)]
            if a: row[p] = dict(mean=round(sum(a)/len(a), 4), low=round(min(a), 4), high=round(max(a), 4))
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=24, help='(default: %(default)s)')
    parser.add_argument('--seeds', default='0,1,2', help='(default: %(default)s)')
    parser.add_argument('--only', default=','.join(NAMES), help='(default: all)')
    parser.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs', help='(default: %(default)s)')
    parser.add_argument('--full', action='store_true', help='the sizes of the recipes themselves')
    parser.add_argument('--screen', type=Path, help='with --full: a packed RxRx1')
    args = parser.parse_args()
    if args.full and not args.screen: raise SystemExit('recipes: --full needs --screen, a packed RxRx1 (rcic_download, rcic_pack).')
    args.runs.mkdir(exist_ok=True)
    screen, seeds, names = open_screen(args.screen) if args.full else drawn(args.runs), list(map(int, args.seeds.split(','))), args.only.split(',')
    for seed in seeds:
        for n in names:
            kept = args.runs/f'recipes-{n}-{seed}.json'
            if kept.exists(): continue
            res = one(ALL[n] if args.full else in_small(ALL[n], args.epochs), screen, seed)
            write_json(kept, {**res, 'epochs': args.epochs})
            print(n, seed, res, flush=True)
    rows = table_of(args.runs, names, seeds)
    print(pd.json_normalize(rows).drop(columns='published').to_string(index=False))
    save('recipes', rows=rows, epochs=args.epochs, seeds=seeds, chance=1/screen.test.treatments.table.sirna.nunique(), side=SIDE, batch=BATCH)


if __name__ == '__main__': main()
