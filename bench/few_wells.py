"""How many wells of a new batch its BatchNorm statistics need, what they cost when those wells are alike, and what control wells beside them are worth.

    python bench/few_wells.py [--scale demo|long|full] [--seeds 0,1,2] [--runs FOLDER] [--screen STORE] [--judge held|test]

Two models of ablation.py (`cutmix`: usual batches; `with_controls`: batches of one experiment with its negative controls) are trained on a screen that is drawn like its own, but with as many controls as RxRx1 has: one negative and 30 different
positive ones on every plate. Every well of an experiment that they never saw is named with BatchNorm statistics of some of its wells only (8, 16, 32, all), and of control wells beside them: the negative ones, the positive ones of 7 or 15 perturbations and
the negative ones, or all. The wells are drawn evenly, or they are those of perturbations that look alike (label shift): the nearest ones to a drawn perturbation, by the training wells. Labels of new wells choose which wells are looked at, no answer. The index
is adapted to whole training experiments with the same controls, as in a model folder. `prior` is how many sites' worth of the remembered statistics are mixed in.

Without `--judge` two training experiments are held out first, and then the test experiments are read once. Asked: with 16 wells 90 % of the gain that all wells bring over no adaptation, all without controls. What a run gave is kept in FOLDER
(default: bench/runs), so that an interrupted benchmark continues. Prints a table; stores bench/results/few_wells_held.json and few_wells.json (few_wells_held_long.json, …).
"""
import argparse, itertools, json, os, time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from ablation import DEMO, HELD, MODELS, SCALES, accuracy_of, check_run, drawn_screen, screen, train
from machine import save
from rcic_fastai.all import *
from rcic_fastai.core import write_atomic
from rcic_fastai.screen.screen import store_fingerprint

WELLS, DRAWS, ASKED, CONTROLS = (8, 16, 32), 3, .9, 30
HOW = dict(held=('even',), test=('even', 'alike'))     # how wells are drawn: label shift is not chosen by
BESIDE = {'none': 0, 'negative': 1, '8 kinds': 8, '16 kinds': 16, 'all': CONTROLS + 1}     # how many different controls there are beside the wells, the negative one first
PRIOR = 16     # the library's own
WAYS = dict(held={'cutmix': [*((b, PRIOR) for b in BESIDE), ('none', 0), ('all', 0)], 'with_controls': [('negative', PRIOR), ('all', PRIOR)]},     # controls, prior
            test={'cutmix': [(b, PRIOR) for b in BESIDE if b != '8 kinds'], 'with_controls': [('negative', PRIOR), ('all', PRIOR)]})


def screen_with_controls(args):
    "Return the screen that is judged on"
    if args.screen or args.scale == 'full': return screen(args.scale, args.screen, args.runs)
    return drawn_screen(args.runs/'few_wells.zarr', **{**DEMO, 'controls': CONTROLS})


def controls_of(table, rows, beside):
    "Return the control wells of the experiments of some rows: those of the first `beside` different ones"
    controls = table[table.well_type != 'treatment']
    names = controls.drop_duplicates('sirna').sort_values(['well_type', 'sirna']).sirna[:BESIDE[beside]]     # negative before positive
    return controls[controls.sirna.isin(names) & controls.experiment.isin(rows.experiment)]


def look_alikes(index, n, rng):
    "Return the `n` perturbations that are nearest to a drawn one, by the means of training wells"
    means = np.stack([index.features[index.codes == k].mean(0) for k in range(len(index.classes))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    near = np.argsort(-(means @ means[rng.integers(len(means))]), kind='stable')
    return [str(index.classes[i]) for i in near[:n]]


def some_wells(rows, n, how, index, rng):
    "Return the rows of at most `n` wells of each experiment, drawn evenly or alike"
    kept = []
    for _, e in rows.groupby('experiment', sort=True):
        wells = e.drop_duplicates('well_id')
        if how == 'alike':
            rank = {name: i for i, name in enumerate(look_alikes(index, len(index.classes), rng))}
            order = wells.sirna.astype(str).map(rank).argsort(kind='stable').to_numpy()
        else: order = rng.permutation(len(wells))
        kept += wells.well_id.iloc[order[:n]].tolist()
    return rows[rows.well_id.isin(kept)]


def judged(learn, table, test, tta, seed, ways, hows):
    "Return one row for each way of taking statistics: beside, prior, wells, how, draw, accuracy; and the accuracy without adaptation"
    quiet, rows, res = dict(tta=tta, progress=False), learn.dls.train.items, []
    plain = accuracy_of(learn.embed(test, **quiet), EmbeddingIndex(learn.embed(rows, **quiet)), table)['accuracy']
    for beside, prior in ways:
        def adapted(o, seen): return learn.embed(o, adapt='experiment', adapt_rows=pd.concat([seen, controls_of(table, o, beside)]), prior=prior, **quiet)
        index = EmbeddingIndex(adapted(rows, rows))
        for n, how, draw in drawn(beside, hows):
            seen = test if n == 'all' else some_wells(test, n, how, index, np.random.default_rng((seed, n, draw)))
            res.append(dict(beside=beside, prior=prior, wells=n, how=how, draw=draw, accuracy=accuracy_of(adapted(test, seen), index, table, 'adapted')['accuracy']))
    return dict(inductive=plain, rows=res)


def drawn(beside, hows):
    "Return (wells, how, draw) of everything that is judged; no wells are controls alone"
    alone = [] if beside == 'none' else [(0, 'even', 0)]
    return [*alone, *itertools.product(WELLS, hows, range(DRAWS)), ('all', 'even', 0)]


def runs_of(args, judge, table, source):
    "Train and judge what has no result yet, one file per model and seed; return {(model, seed): result}"
    held, done = list(HELD[args.scale]) if judge == 'held' else [], {}
    of = table.experiment.isin(held) if held else table.dataset == 'test'
    test = table[of & (table.well_type == 'treatment')]
    for seed in args.seeds:
        for model, ways in WAYS[judge].items():
            path = args.runs/f'few_wells-{args.scale}-{judge}-{model}-{seed}.json'
            facts = json.loads(json.dumps(dict(screen=store_fingerprint(source), scale=SCALES[args.scale], model=MODELS[model], judge=judge, ways=ways, wells=WELLS, draws=DRAWS, how=HOW[judge])))
            if path.exists(): check_run(path, facts)
            else:
                start = time.time()
                learn = train(table, source, args.scale, seed, held=held or 'none', **MODELS[model])
                found = judged(learn, table, test, SCALES[args.scale]['tta'], seed, ways, HOW[judge])
                text = json.dumps(dict(seconds=round(time.time() - start), facts=facts, result=found), indent=1)
                write_atomic(path, lambda p: p.write_text(text))
                print(f'{judge}, {model}, seed {seed}: {time.time() - start:.0f} s', flush=True)
            done[model, seed] = json.loads(path.read_text())['result']
    return done


def curves(done):
    "Return one row per model, way, number of wells and kind of draw: accuracy, and the share of the gain of all wells without controls that it brings, over the seeds"
    parts = []
    for (model, seed), r in done.items(): parts.append(pd.DataFrame(r['rows']).assign(model=model, seed=seed, inductive=r['inductive']))
    t = pd.concat(parts).groupby(['model', 'beside', 'prior', 'how', 'wells', 'seed'], as_index=False, sort=False)[['accuracy', 'inductive']].mean()
    most = whole_gain(t)
    res = []
    for k, g in t.groupby(['model', 'beside', 'prior', 'how', 'wells'], sort=False):
        gain, whole = g.accuracy - g.inductive, most.get(k[0], np.nan)
        res.append(dict(zip(('model', 'beside', 'prior', 'how', 'wells'), k), accuracy=round(float(g.accuracy.mean()), 4), inductive=round(float(g.inductive.mean()), 4), gain=round(float(gain.mean()), 4),
                        gain_error=round(float(gain.std(ddof=1)/len(gain)**.5), 4) if len(gain) > 1 else None, share_of_the_gain=round(float(gain.mean()/whole), 3) if whole > 0 else None, seeds=len(g)))
    return res


def whole_gain(t):
    "Return {model: gain of all wells over no adaptation, mean over the seeds}: without controls, or for a model that learned with them, with the least"
    whole = t[(t.wells.astype(str) == 'all') & (t.prior == PRIOR)]
    least = {m: min(g.beside, key=list(BESIDE).index) for m, g in whole.groupby('model')}
    return {m: float((g.accuracy - g.inductive)[g.beside == least[m]].mean()) for m, g in whole.groupby('model')}


def stored_name(args, judge): return '_'.join(['few_wells', *(['held'] if judge == 'held' else []), *([args.scale] if args.scale != 'demo' else [])])


def report(args, judge, done):
    "Print the table, store it, and return its rows"
    rows = curves(done)
    t = pd.DataFrame(rows)
    t['way'] = t.model + ', controls: ' + t.beside + np.where(t.prior != PRIOR, ', prior ' + t.prior.astype(str), '') + ', ' + t.how
    print(t.pivot(index='way', columns='wells', values='accuracy').to_string(na_rep=''))
    sixteen = [{k: r[k] for k in ('model', 'beside', 'prior', 'how', 'share_of_the_gain')} for r in rows if r['wells'] == 16]
    met = [r for r in sixteen if r['how'] == 'even' and r['share_of_the_gain'] is not None and r['share_of_the_gain'] >= ASKED]
    save(stored_name(args, judge), scale=args.scale, judged='held-out training experiments: ' + ', '.join(HELD[args.scale]) if judge == 'held' else 'test experiments', seeds=args.seeds, draws=DRAWS,
         asked=f'{100*ASKED:g} % of the gain with 16 wells, drawn evenly', met_by=met, sixteen_wells=sixteen, rows=rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scale', choices=list(SCALES), default='demo')
    p.add_argument('--seeds', type=lambda s: [int(o) for o in s.split(',')], default=[0, 1, 2])
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs')
    p.add_argument('--screen', help='packed screen to use instead of a simulated one')
    p.add_argument('--judge', choices=('held', 'test'), default=None, help='only the held-out training experiments, or only the test experiments')
    args = p.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    opened = screen_with_controls(args)
    for judge in [args.judge] if args.judge else ['held', 'test']: report(args, judge, runs_of(args, judge, opened.table, opened.source))


if __name__ == '__main__': main()
