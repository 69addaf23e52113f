"""Is the correction that `choose_correction` takes close to the best one on batches that it did not see?

    python bench/correct.py [--seeds 5]

Tables of simulated profiles, no pictures: three screens whose layouts differ, each with batches to choose on and
batches to judge on. Every single correction is judged on the latter; the chosen one should be at most .02 below the best.
"""
import argparse, time

import numpy as np
import pandas as pd

from machine import save
from rcic_fastai.embed.choose import CANDIDATES, choose_correction, corrected_tables, retrieval_in, shared_content
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, unit_rows

DIM, TREATMENTS, TRAIN, TEST = 32, 60, 5, 6
LAYOUTS = ('complete plates', 'few treatments a plate', 'unbalanced')


def contents(layout, rng):
    "Return the treatments on each of two plates of a batch"
    if layout == 'complete plates': return [np.arange(TREATMENTS)]*2
    if layout == 'few treatments a plate':       # six of them, of one class of mechanisms mostly
        classes = rng.permutation(6)[:2]
        return [np.repeat(np.concatenate([10*c + rng.permutation(10)[:5], rng.integers(0, TREATMENTS, 1)]), 4) for c in classes]
    weights = rng.dirichlet(np.full(6, .3)).repeat(10)/10      # a batch is mostly of a class or two
    return [rng.choice(TREATMENTS, 60, p=weights/weights.sum()) for _ in range(2)]


def drawn(layout, batches, seed, start, effects, axes):
    "Return an embeddings table of batches with a shift, a scale and a plate effect each"
    rng, rows, x = np.random.default_rng([seed, start]), [], []
    for b in range(start, start + batches):
        shift, scale = axes @ rng.normal(size=8)*.5, np.exp(.25*rng.normal(size=DIM))
        for p, mine in enumerate(contents(layout, rng)):
            plate = .2*rng.normal(size=DIM)
            wells = [(f't{t}', 'treatment', effects[t]) for t in mine] + [('DMSO', 'negative_control', 0*effects[0])]*12
            for w, (name, kind, effect) in enumerate(wells):
                noise = .3*(axes @ rng.normal(size=8))*.5 + .6*rng.normal(size=DIM)
                x.append((1 + effect + noise)*scale + shift + plate)
                rows.append((f'B{b}', p + 1, f'B{b}_{p + 1}_{w}', f'w{w}', kind, name, 'A'))
    m = pd.DataFrame(rows, columns=['experiment', 'plate', 'well_id', 'well', 'well_type', 'sirna', 'cell_type'])
    return make_emb_table(m, unit_rows(np.array(x)))


def top1(known, new):
    "Share of treated wells whose nearest known well has the same treatment"
    (ka, kx), (na, nx) = ((m.sirna.to_numpy()[t], unit_rows(emb_features(e)[t])) for e in (known, new)
                          for m in [emb_metadata(e)] for t in [(m.well_type == 'treatment').to_numpy()])
    can = np.isin(na, ka)
    return float((ka[(nx @ kx.T).argmax(1)] == na)[can].mean())


def one(layout, seed):
    "Return what every correction, and the chosen one, reach on batches that were not chosen on"
    rng = np.random.default_rng(seed)
    axes, classes = rng.normal(size=(DIM, 8))/DIM**.5*2, rng.normal(size=(6, DIM))*.5
    effects = np.repeat(classes, 10, axis=0) + .45*rng.normal(size=(TREATMENTS, DIM))
    train, test = drawn(layout, TRAIN, seed, 0, effects, axes), drawn(layout, TEST, seed, TRAIN, effects, axes)
    choice, reached = choose_correction(train), {}
    for name, (method, options) in CANDIDATES.items():
        tables = corrected_tables(train, test, method, options)
        reached[name] = dict(map=round(retrieval_in(*tables, most=10**6), 4), accuracy=round(top1(*tables), 4))
    best = max(reached, key=lambda k: reached[k]['map'])
    return dict(layout=layout, seed=seed, shared_content_of_plates=round(shared_content(emb_metadata(train), by='plate'), 3), chosen=choice.name, best=best,
                below_best_map=round(reached[best]['map'] - reached[choice.name]['map'], 4),
                below_best_accuracy=round(max(r['accuracy'] for r in reached.values()) - reached[choice.name]['accuracy'], 4),
                gain_over_no_map=round(reached[choice.name]['map'] - reached['no']['map'], 4), reached=reached)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5, help='simulated screens of each layout (default: %(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, and store nothing')
    args, start, runs = parser.parse_args(), time.time(), []
    for layout in LAYOUTS:
        for seed in range(args.seeds):
            runs.append(one(layout, seed))
            r = runs[-1]
            print(f"{layout}, seed {seed}: chosen {r['chosen']}, best {r['best']}; {r['below_best_map']:.3f} below (mAP), {r['below_best_accuracy']:.3f} (accuracy)", flush=True)
            if args.dry: print('   ', {k: (v['map'], v['accuracy']) for k, v in r['reached'].items()})
    t = pd.DataFrame(runs)
    mean = {lay: {c: round(float(t.loc[t.layout == lay, c].mean()), 4) for c in ('below_best_map', 'below_best_accuracy', 'gain_over_no_map')} for lay in LAYOUTS}
    worst = dict(map=float(t.below_best_map.max()), accuracy=float(t.below_best_accuracy.max()))
    print(mean, worst, sep='\n')
    if not args.dry: save('correct', treatments=TREATMENTS, training_batches=TRAIN, test_batches=TEST, seeds=args.seeds, mean=mean, worst=worst, seconds=round(time.time() - start, 1), runs=runs)


if __name__ == '__main__': main()
