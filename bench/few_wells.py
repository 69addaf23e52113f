"""How many wells of a new batch its BatchNorm statistics need, and what they cost when those wells are alike.

    python bench/few_wells.py [--scale demo|long|full] [--seeds 0,1,2] [--runs FOLDER] [--screen STORE] [--judge held|test]

Two models of ablation.py (`cutmix`: usual batches; `with_controls`: batches of one experiment with its negative controls) are trained on its screen. Every well of an experiment that they never saw is
named with BatchNorm statistics of some of its wells only (8, 16, 32, 64, all), and with its negative controls beside them (for the second model always). The wells are drawn evenly, or they are those of
perturbations that look alike (label shift): the nearest ones to a drawn perturbation, by the training wells. What statistics are taken of has no other use, and labels of new wells choose which wells
are looked at, no answer. The index is adapted to whole training experiments, as in a model folder. `prior` is how many sites' worth of the remembered statistics are mixed in.

Without `--judge` two training experiments are held out first and the prior is chosen there, at 16 wells drawn evenly; then the test experiments are read once with that prior. Asked: with 16 wells
90 % of the gain that all wells bring over no adaptation. What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues. Prints a table; stores
bench/results/few_wells_held.json and few_wells.json (few_wells_held_long.json, …).
"""
import argparse, json, os, time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from ablation import HELD, MODELS, SCALES, accuracy_of, check_run, screen, train
from machine import RESULTS, save
from rcic_fastai.all import *
from rcic_fastai.core import write_atomic
from rcic_fastai.screen.screen import store_fingerprint

WELLS, PRIORS, DRAWS, ASKED = (8, 16, 32, 64), (0, 16, 64), 3, .9
HOW = dict(held=('even',), test=('even', 'alike'))     # how wells are drawn: label shift is not chosen by
CONTROLS_BESIDE = {'cutmix': (False, True), 'with_controls': (True,)}     # model: statistics of the wells alone, or with the negative controls


def controls_of(table, rows):
    "Return the negative controls of the experiments of some rows"
    return table[table.experiment.isin(rows.experiment) & (table.well_type == 'negative_control')]


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


def judged(learn, table, test, tta, model, seed, priors, hows):
    "Return one row for each way of taking statistics: beside, prior, wells, how, draw, accuracy; and the accuracy without adaptation"
    quiet, rows, res = dict(tta=tta, progress=False), learn.dls.train.items, []
    plain = accuracy_of(learn.embed(test, **quiet), EmbeddingIndex(learn.embed(rows, **quiet)), table)['accuracy']
    most = int(test.groupby('experiment').well_id.nunique().max())
    for beside in CONTROLS_BESIDE[model]:
        known = pd.concat([rows, controls_of(table, rows)]) if beside else None
        for prior in priors:
            index = EmbeddingIndex(learn.embed(rows, adapt='experiment', adapt_rows=known, prior=prior, **quiet))
            for n in [*(w for w in WELLS if w < most), None, *([0] if beside else [])]:
                for how in hows if n else ('even',):
                    for draw in range(DRAWS if n else 1):
                        seen = test if n is None else some_wells(test, n, how, index, np.random.default_rng((seed, n, draw)))
                        if beside: seen = pd.concat([seen, controls_of(table, test)])
                        query = learn.embed(test, adapt='experiment', adapt_rows=seen, prior=prior, **quiet)
                        res.append(dict(beside=beside, prior=prior, wells='all' if n is None else n, how=how, draw=draw, accuracy=accuracy_of(query, index, table, 'adapted')['accuracy']))
    return dict(inductive=plain, rows=res)


def runs_of(args, judge, priors, table, source):
    "Train and judge what has no result yet, one file per model and seed; return {(model, seed): result}"
    held, done = list(HELD[args.scale]) if judge == 'held' else [], {}
    of = table.experiment.isin(held) if held else table.dataset == 'test'
    test = table[of & (table.well_type == 'treatment')]
    for seed in args.seeds:
        for model in CONTROLS_BESIDE:
            path = args.runs/f'few_wells-{args.scale}-{judge}-{model}-{seed}.json'
            facts = json.loads(json.dumps(dict(screen=store_fingerprint(source), scale=SCALES[args.scale], model=MODELS[model], judge=judge, priors=priors, wells=WELLS, draws=DRAWS, how=HOW[judge])))
            if path.exists(): check_run(path, facts)
            else:
                start = time.time()
                learn = train(table, source, args.scale, seed, held=held or 'none', **MODELS[model])
                found = judged(learn, table, test, SCALES[args.scale]['tta'], model, seed, priors, HOW[judge])
                text = json.dumps(dict(seconds=round(time.time() - start), facts=facts, result=found), indent=1)
                write_atomic(path, lambda p: p.write_text(text))
                print(f'{judge}, {model}, seed {seed}: {time.time() - start:.0f} s', flush=True)
            done[model, seed] = json.loads(path.read_text())['result']
    return done


def curves(done):
    "Return one row per model, way, number of wells and kind of draw: accuracy, and the share of the gain with all wells that it brings, over the seeds"
    parts = []
    for (model, seed), r in done.items(): parts.append(pd.DataFrame(r['rows']).assign(model=model, seed=seed, inductive=r['inductive']))
    t = pd.concat(parts).groupby(['model', 'beside', 'prior', 'how', 'wells', 'seed'], as_index=False, sort=False)[['accuracy', 'inductive']].mean()
    whole = t[t.wells.astype(str) == 'all'].set_index(['model', 'beside', 'prior', 'seed']).accuracy
    t['all'] = whole.loc[pd.MultiIndex.from_frame(t[['model', 'beside', 'prior', 'seed']])].to_numpy()
    res = []
    for k, g in t.groupby(['model', 'beside', 'prior', 'how', 'wells'], sort=False):
        gain, most = g.accuracy - g.inductive, (g['all'] - g.inductive).mean()
        res.append(dict(zip(('model', 'beside', 'prior', 'how', 'wells'), k), accuracy=round(float(g.accuracy.mean()), 4), inductive=round(float(g.inductive.mean()), 4), gain=round(float(gain.mean()), 4),
                        gain_error=round(float(gain.std(ddof=1)/len(gain)**.5), 4) if len(gain) > 1 else None, share_of_the_gain=round(float(gain.mean()/most), 3) if most > 0 else None, seeds=len(g)))
    return res


def chosen_priors(rows):
    "Return the prior with the highest accuracy at 16 wells drawn evenly, or at the most that there are below that, in the mean over models and ways"
    t = pd.DataFrame(rows)
    few = t[(t.how == 'even') & t.wells.isin([w for w in t.wells if w not in ('all', 0)])]
    n = max((w for w in set(few.wells) if w <= 16), default=None)
    if n is None: raise SystemExit('few_wells: the held-out experiments have too few wells to choose by.')
    return [int(few[few.wells == n].groupby('prior').accuracy.mean().idxmax())]


def stored_name(args, judge): return '_'.join(['few_wells', *(['held'] if judge == 'held' else []), *([args.scale] if args.scale != 'demo' else [])])


def report(args, judge, done):
    "Print the table, store it, and return its rows"
    rows = curves(done)
    t = pd.DataFrame(rows)
    t['way'] = t.model + np.where(t.beside, ' + controls', '') + ', prior ' + t.prior.astype(str) + ', ' + t.how
    print(t.pivot(index='way', columns='wells', values='accuracy').to_string(na_rep=''))
    sixteen = [dict(model=r['model'], beside=r['beside'], prior=r['prior'], how=r['how'], share_of_the_gain=r['share_of_the_gain']) for r in rows if r['wells'] == 16]
    met = [r for r in sixteen if r['how'] == 'even' and r['share_of_the_gain'] is not None and r['share_of_the_gain'] >= ASKED]
    save(stored_name(args, judge), scale=args.scale, judged='held-out training experiments: ' + ', '.join(HELD[args.scale]) if judge == 'held' else 'test experiments', seeds=args.seeds, draws=DRAWS,
         asked=f'{100*ASKED:g} % of the gain with 16 wells, drawn evenly', met_by=met, sixteen_wells=sixteen, rows=rows, **(dict(prior=chosen_priors(rows)[0]) if judge == 'held' else {}))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scale', choices=list(SCALES), default='demo')
    p.add_argument('--seeds', type=lambda s: [int(o) for o in s.split(',')], default=[0, 1, 2])
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs')
    p.add_argument('--screen', help='packed screen to use instead of a simulated one')
    p.add_argument('--judge', choices=('held', 'test'), default=None, help='only the held-out training experiments, or only the test experiments, with the prior that was chosen before')
    args = p.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    opened, priors = screen(args.scale, args.screen, args.runs), None
    if args.judge != 'test': priors = chosen_priors(report(args, 'held', runs_of(args, 'held', PRIORS, opened.table, opened.source)))
    if args.judge == 'held': return
    if priors is None:
        stored = RESULTS/f'{stored_name(args, "held")}.json'
        if not stored.exists(): raise SystemExit(f'few_wells: the prior is chosen on held-out experiments first, and there is no {stored.name}: leave --judge out.')
        priors = [json.loads(stored.read_text())['prior']]
    report(args, 'test', runs_of(args, 'test', priors, opened.table, opened.source))


if __name__ == '__main__': main()
