"""The three recipes of several labels on drawn images, in small, by one rule, beside guessing by frequency.

    python bench/recipes_labels.py [--epochs 20] [--images 900] [--side 96] [--seeds 0,1,2] [--only hpa46,hpa46_se] [--runs FOLDER]

The rule: each recipe as it is, with (1) EfficientNet-Lite0 with its published weights in place of its backbone; (2) pictures of SIDE px for 1024; (3) so many
epochs; (4) batches of 32, the rate times the root of 32 over its own batch; (5) means and standard deviations of the drawn images in place of those of the Atlas.
A fifth of the training images chooses the thresholds; a quarter of all images is for testing. Each recipe predicts as its authors did (four scaled views). A seed draws
the weights, the order and what is held out; the images are the same for all. `ensemble` is the mean of the recipes' probabilities, a seed at a time.

Cells of the test images are judged by mean average precision: `cell_map_image` gives each cell the probabilities of its image, `cell_map_alone` takes those of the cell by itself (a window of half
the picture, with what is around the cell), `cell_map_both` the geometric mean of the two. Nothing is chosen by the test images.

What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues. Prints one table; stores bench/results/recipes_labels.json.
"""
import argparse, contextlib, io, json, os, tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import pandas as pd
from machine import save
from rcic_fastai.all import *
from rcic_fastai.core import write_json
from rcic_fastai.predict.cells import with_image_scores
from rcic_fastai.results.labels import guessed_labels
from rcic_fastai.screen.tables import label_matrix

BATCH = 32
NAMES = [n for n, r in RECIPES.items() if r.data.get('several')]
MEASURES = ('macro_f1', 'micro_f1', 'mean_ap')
CELL_MEASURES = dict(cell_map_image='image', cell_map_alone='cell', cell_map_both='geometric')


def in_small(recipe, epochs, side):
    "Return a recipe by the rule above"
    bs, data = recipe.stages[0].bs, {k: v for k, v in recipe.data.items() if k != 'norm_stats'}
    stages = [replace(s, epochs=epochs, bs=BATCH, lr=s.lr*(BATCH/bs)**.5) for s in recipe.stages]
    return replace(recipe, arch='efficientnet-lite0', stages=stages, data={**data, 'bs': BATCH, 'size': side})


def drawn(folder, images, side):
    "Return the drawn images, packed in `folder`, and the folder they were drawn into, with masks and labels of cells"
    store, atlas = folder/f'labels-{images}-{side}.zarr', folder/f'labels-{images}-{side}'
    if not atlas.exists(): simulate_labels(atlas, images, side)
    if not store.exists(): pack_screen(open_screen(atlas), store)
    return open_screen(store), atlas


def one(recipe, screen, atlas, seed, home):
    "Train and judge one recipe: scores, seconds of the training; the predictions of images and cells go beside"
    start = perf_counter()
    with tempfile.TemporaryDirectory() as d, contextlib.redirect_stdout(io.StringIO()):
        model = train_screen(screen, Path(d)/'model', recipe, target='labels', seed=seed)
        seconds = perf_counter() - start
        pred = model.predict(screen, out=home, progress=False)
        cells = model.predict_cells(screen, atlas/'masks', cell_side=max(screen.source.shape[-1]//2, 8), cell_border='keep', progress=False)
    cells.to_parquet(home.with_suffix('.single.parquet'))
    return dict(scores={**scores_of(pred, screen), **cell_scores_of(cells, pred, atlas)}, seconds=round(seconds), held_out={k: model.config['metrics'][k] for k in ('macro_f1', 'micro_f1')})


def scores_of(pred, screen):
    "Return the measures of predictions"
    res, _ = evaluate_labels(pred, screen.table)
    return {k: round(res[k], 4) for k in MEASURES}


def cell_scores_of(cells, pred, atlas):
    "Return the mean average precision over cells, by each way"
    truth = pd.read_csv(atlas/'cells.csv', dtype=str)
    truth = truth.Label.set_axis(truth.ID + '_c' + truth.cell)
    names = [c for c in cells if c.startswith('score:')]
    y = label_matrix(truth[cells.id_code], [c.removeprefix('score:') for c in names])
    each = {k: cells if how == 'cell' else with_image_scores(cells, pred, how) for k, how in CELL_MEASURES.items()}
    return {k: round(cell_map(y, c[names])[0], 4) for k, c in each.items()}


def spread(values): return dict(mean=round(sum(values)/len(values), 4), low=min(values), high=max(values))


def table_of(runs, names, seeds, screen, tag):
    "Return one row per recipe and one for the ensemble: mean, lowest and highest over the seeds; and guessing"
    rows, cells = [], screen.table.labels
    for n in [*names, 'ensemble']:
        found = [json.loads(f.read_text())['scores'] for s in seeds if (f := runs/f'{tag}-{n}-{s}.json').exists()]
        if found: rows.append(dict(recipe=n, seeds=len(found), **{k: spread([f[k] for f in found]) for k in (*MEASURES, *CELL_MEASURES)}))
    is_test = screen.table.dataset == 'test'
    return rows, {k: round(v, 4) for k, v in guessed_labels(cells[~is_test], cells[is_test]).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(epochs=20, images=900, side=96).items(): parser.add_argument(f'--{name}', type=int, default=value, help='(default: %(default)s)')
    parser.add_argument('--seeds', default='0,1,2', help='(default: %(default)s)')
    parser.add_argument('--only', default=','.join(NAMES), help='(default: all)')
    parser.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs', help='(default: %(default)s)')
    parser.add_argument('--print-only', action='store_true', help='store nothing in bench/results')
    args = parser.parse_args()
    args.runs.mkdir(exist_ok=True)
    (screen, atlas), seeds, names = drawn(args.runs, args.images, args.side), list(map(int, args.seeds.split(','))), args.only.split(',')
    tag = f'labels-cells-{args.images}-{args.side}-{args.epochs}'       # runs from before cells were judged are not read
    for seed in seeds:
        for n in names:
            kept = args.runs/f'{tag}-{n}-{seed}.json'
            if kept.exists(): continue
            csv = args.runs/f'{tag}-{n}-{seed}.pred.csv'
            res = one(in_small(RECIPES[n], args.epochs, args.side), screen, atlas, seed, csv)
            write_json(kept, res)
            print(n, seed, res, flush=True)
        if len(names) > 1: write_json(args.runs/f'{tag}-ensemble-{seed}.json', dict(scores=scores_together(args.runs, tag, names, seed, screen, atlas)))
    rows, guess = table_of(args.runs, names, seeds, screen, tag)
    print(pd.json_normalize(rows).to_string(index=False))
    print('guessing by frequency:', guess)
    if not args.print_only: save('recipes_labels', rows=rows, guess=guess, epochs=args.epochs, images=args.images, side=args.side, seeds=seeds, batch=BATCH)


def together(runs, tag, names, seed):
    "Return the answers of all recipes of one seed together"
    from rcic_fastai.predict.ensemble import ensemble_predictions, read_member
    return ensemble_predictions([read_member(runs/f'{tag}-{n}-{seed}.pred.csv') for n in names])


def scores_together(runs, tag, names, seed, screen, atlas):
    "Return the measures of all recipes of one seed together"
    pred, each = together(runs, tag, names, seed), [pd.read_parquet(runs/f'{tag}-{n}-{seed}.pred.single.parquet') for n in names]
    scores = [c for c in each[0] if c.startswith('score:')]
    cells = each[0].assign(**sum(t[scores] for t in each).div(len(each)))
    return {**scores_of(pred, screen), **cell_scores_of(cells, pred, atlas)}


if __name__ == '__main__': main()
