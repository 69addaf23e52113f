"""Whether the stated chances, sets of names and forecasts hold on experiments never seen.

    python bench/confidence.py [--seeds 0,1,2] [--runs FOLDER]

One drawn screen (8 training and 4 unseen experiments, 24 siRNAs, 64 px; that of recipes.py). The demo recipe is trained four times, each time without two training
experiments, and the wells of these are named: answers for eight experiments that their models never saw. A fifth model learns from all eight and names the wells of
the four unseen ones. Chances, sets (asked to hold the right name of 90 % of the wells) and forecasts are fitted on the eight and read once on the four, in each protocol.

What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues. Prints one table; stores bench/results/confidence.json.
"""
import argparse, contextlib, io, os, tempfile
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import pandas as pd
from machine import save
from rcic_fastai.all import *
from rcic_fastai.predict.scores import read_scores, score_classes, write_scores
from recipes import drawn

PROTOCOLS, FOLDS, COVERAGE = ('inductive', 'adapted', 'transductive'), 4, .9


def scored(screen, seed, fold, runs):
    "Train without one fold of the training experiments (0: with all), and keep the scores of those (0: of the unseen experiments): {protocol: file}"
    files = {p: runs/f'confidence-{seed}-{fold}-{p}.parquet' for p in PROTOCOLS}
    if all(f.exists() for f in files.values()): return files
    held = dict(folds=FOLDS, fold=fold) if fold else dict(valid='none')
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()):
        model = train_screen(screen, Path(home)/'model', seed=seed, epochs=24, **held)
        asked = model.held_out(screen) if fold else screen
        for p, f in files.items(): write_scores(model.class_scores(asked, p, progress=False), f)
    print(seed, fold, model.config.get('metrics'), flush=True)
    return files


def judged(screen, seed, runs):
    "Return what is said of the unseen experiments of one seed, beside the truth, by protocol"
    folds, res = [scored(screen, seed, f, runs) for f in range(1, FOLDS + 1)], {}
    unseen = scored(screen, seed, 0, runs)
    for p in PROTOCOLS:
        held, asked = [read_scores(f[p]) for f in folds], read_scores(unseen[p])
        conf = fit_confidence(held, screen.table, COVERAGE)
        found, per = judge_confidence(conf.answers(asked), screen.table)
        accuracy = conf.held.accuracy
        res[p] = {**found, 'held_out_accuracy': float(accuracy.mean()), 'held_out_forecast_error': conf.error,
                  'forecast_error_of_the_mean': float((per.accuracy - accuracy.mean()).abs().mean()), 'names': len(score_classes(asked))}
    return res


def table_of(results):
    "Return mean, lowest and highest of each figure over the seeds, one row per protocol"
    rows = []
    for p in PROTOCOLS:
        each = pd.DataFrame([r[p] for r in results])
        rows.append(dict(protocol=p, **{c: dict(mean=round(float(each[c].mean()), 4), low=round(float(each[c].min()), 4), high=round(float(each[c].max()), 4)) for c in each}))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', default='0,1,2', help='(default: %(default)s)')
    parser.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs', help='(default: %(default)s)')
    args = parser.parse_args()
    args.runs.mkdir(exist_ok=True)
    screen, seeds = drawn(args.runs), list(map(int, args.seeds.split(',')))
    rows = table_of([judged(screen, s, args.runs) for s in seeds])
    print(pd.json_normalize(rows).set_index('protocol').filter(like='.mean').T.to_string())
    save('confidence', rows=rows, seeds=seeds, coverage=COVERAGE, folds=FOLDS, experiments=dict(held_out=8, unseen=4))


if __name__ == '__main__': main()
