"""How the settings of the recipe `best` were chosen: on training experiments that are held out.

    python bench/choose.py [--only 'NAME;NAME'] [--folds 0,1,2] [--runs FOLDER]

Each candidate is the recipe `demo` with some changes, trained on the screen of ablation.py without its test experiments, which are not there at all. A fold holds out two training experiments, 96 wells, and its number is the seed.
The first candidates are about as long in seconds as 24 epochs of pictures of 64 px, so what enlarges the pictures has fewer epochs; the last are as long as 50 epochs, and as 92, which take the time of 49 epochs of version 0.1. Each is judged in the ways of predicting that a user can ask for: four and eight views, the index
as it is or whitened and shrunk (`SEARCH`), AdaBN with and without standardized embeddings. What a run gave is kept in FOLDER (default: bench/runs); candidates that are not run there keep the rows that are stored. Prints a table; stores bench/results/choose.json.
"""
import argparse, itertools, json, os, time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from ablation import accuracy_of, check_run, screen
from machine import RESULTS, cpu_model, save
from rcic_fastai.all import *
from rcic_fastai.core import write_json
from rcic_fastai.embed.neck import NeckIndex
from rcic_fastai.predict.plan import as_test
from rcic_fastai.screen.screen import store_fingerprint
from rcic_fastai.train.recipes import RECIPES

FOLDS = [('HUVEC-05', 'RPE-03'), ('HUVEC-04', 'RPE-02'), ('HUVEC-03', 'U2OS-02')]
SEARCH = 'whiten=0.3,shrink=0.5'
CANDIDATES = {   # epochs of everything, after two of the head; times the learning rate of demo; side, px (0: as stored); what else differs
    'demo': dict(epochs=22),
    'batches of 16': dict(epochs=22, bs=16),
    'twice the rate': dict(epochs=22, lr=2.),
    'four times the rate': dict(epochs=22, lr=4.),
    '96 px': dict(epochs=9, size=96),
    '96 px, twice the rate': dict(epochs=9, lr=2., size=96),
    '96 px, four times the rate': dict(epochs=9, lr=4., size=96),
    '96 px, twice the rate, no CutMix': dict(epochs=9, lr=2., size=96, cutmix=0.),
    '50 epochs, twice the rate': dict(epochs=48, lr=2.),
    '92 epochs, twice the rate': dict(epochs=90, lr=2.)}
SHOWN = {'inductive': ('inductive', 8, False, False, SEARCH), 'inductive, plain index': ('inductive', 8, False, False, 'no'),
         'adapted': ('adapted', 8, True, False, SEARCH), 'adapted, plain index': ('adapted', 8, True, False, 'no'), 'adapted, 4 views': ('adapted', 4, True, False, SEARCH),
         'adapted, standardized': ('adapted', 8, True, True, SEARCH)}


def trained(screen, seed, epochs, lr=1., cutmix=.3, bs=32, size=None):
    "Train a candidate with the experiments of a fold held out; return the learner and the processor's seconds"
    start = time.process_time()
    dls = screen_dls(screen, valid=list(FOLDS[seed]), size=size, bs=bs, seed=seed)
    learn = screen_learner(dls, 'efficientnet-lite0', loss='adacos', seed=seed)
    head, everything = RECIPES['demo'].stages
    everything = replace(everything, epochs=epochs, lr={k: v*lr for k, v in everything.lr.items()}, cutmix=cutmix)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(Recipe('candidate', [head, everything]), seed=seed)
    return learn, time.process_time() - start


def judged(learn, screen, held):
    "Return {way: accuracy}: protocol, views, AdaBN, standardized, search"
    table = screen.table
    test, rows, res = as_test(table[table.experiment.isin(held) & (table.well_type == 'treatment')]), learn.dls.train.items, {}
    for tta, adapt in itertools.product((4, 8), (None, 'experiment')):
        known, asked = (learn.embed(r, tta=tta, adapt=adapt, progress=False) for r in (rows, test))
        for standardized, (a, b) in {False: (known, asked), True: standardized_both(known, asked)}.items():
            protocol = 'adapted' if adapt or standardized else 'inductive'
            for search in ('no', SEARCH):
                index = EmbeddingIndex(a) if search == 'no' else NeckIndex(EmbeddingIndex(a), search)
                res[_key(protocol, tta, bool(adapt), standardized, search)] = accuracy_of(b, index, table, protocol)['accuracy']
    return res


def standardized_both(known, asked):
    "Return the embeddings of the index and of the wells that are asked for, each experiment standardized"
    both = correct(pd.concat([known, asked], ignore_index=True), 'standardize')
    return [o.reset_index(drop=True) for o in (both.iloc[:len(known)], both.iloc[len(known):])]


def _key(*way): return '|'.join(map(str, way))


def stored_rows():
    "Return {candidate: row} of what was stored before with the same settings"
    path = RESULTS/'choose.json'
    if not path.exists(): return {}
    d = json.loads(path.read_text())
    same = {k for k, v in json.loads(json.dumps(CANDIDATES)).items() if d['candidates'].get(k) == v}
    return {r['candidate']: {'cpu': d['machine']['cpu'], **r} for r in d['rows'] if r['candidate'] in same}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', type=lambda s: s.split(';'), default=list(CANDIDATES), help='candidates, with ; between them: ' + '; '.join(CANDIDATES))
    p.add_argument('--folds', type=lambda s: [int(o) for o in s.split(',')], default=[0, 1, 2])
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs')
    args = p.parse_args()
    if odd := set(args.only) - set(CANDIDATES): raise SystemExit(f'choose: there is no candidate {min(odd)!r}: take any of {"; ".join(CANDIDATES)}.')
    args.runs.mkdir(parents=True, exist_ok=True)
    whole = screen('demo', None, args.runs)
    training = Screen(whole.table[whole.table.dataset == 'train'].reset_index(drop=True), whole.source)
    rows, before = [], stored_rows()
    for name, settings in CANDIDATES.items():
        done = []
        for fold in args.folds:
            path = args.runs/f"choose-{name.replace(', ', '-').replace(' ', '_')}-{fold}.json"
            facts = json.loads(json.dumps(dict(screen=store_fingerprint(whole.source), settings=settings, held=FOLDS[fold])))
            if path.exists(): check_run(path, facts)
            elif name not in args.only: continue
            else:
                learn, seconds = trained(training, fold, **settings)
                write_json(path, dict(facts=facts, cpu=cpu_model(), cpu_seconds=round(seconds), result=judged(learn, training, FOLDS[fold])))
                print(name, fold, round(seconds), 's', flush=True)
            done.append(json.loads(path.read_text()))
        if not done:
            rows += [before[name]] if name in before else []
            continue
        found = {title: [d['result'][_key(*way)] for d in done] for title, way in SHOWN.items()}
        rows.append(dict(candidate=name, folds=len(done), cpu=done[0]['cpu'], cpu_seconds=round(float(np.mean([d['cpu_seconds'] for d in done]))), **{k: round(float(np.mean(v)), 4) for k, v in found.items()},
                         by_fold={k: [round(v, 4) for v in vs] for k, vs in found.items()}))
    if not rows: raise SystemExit('choose: nothing has been run.')
    print(pd.DataFrame(rows).drop(columns='by_fold').to_string(index=False))
    save('choose', screen='the calibrated screen without its test experiments', folds=FOLDS, candidates=CANDIDATES, search=SEARCH, rows=rows, chance=round(1/48, 4))


if __name__ == '__main__': main()
