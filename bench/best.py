"""What the recipe `best` reaches as a user trains and predicts with it, beside `demo`, an untrained network and channel means.

    python bench/best.py [--screens calibrated,confirming] [--seeds 0,1,2] [--only demo,best] [--runs FOLDER] [--speeds FOLDER] [--put-together]

calibrated    the screen of ablation.py, on whose held-out training experiments `best` was chosen (choose.py)
confirming    a screen whose seed was fixed in advance, which nothing was chosen on: other experiments, a cell type with two and one with a
              single training experiment, plates that are missing in training and in the test, a test experiment with 16 wells, and one with a third of the
              siRNAs (label shift)

channel means           mean and standard deviation of each channel, no network
features                the recipe without training
demo                    14 epochs
best, minutes of 0.1    `best` with as many epochs as take the time of 13 epochs of version 0.1, by the speeds below
best                    50 epochs

Every model learns all training experiments (nothing is held out) through `train_screen`, and the test experiments are named by `model.predict` under each protocol, with what the recipe and the library choose. They are read once with each model. Gains over `demo` are paired
by seed. What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues; screens of which nothing is there keep the rows that are stored. Stores bench/results/best.json.

`--speeds FOLDER` measures how much faster a training step is than that of a checkout of version 0.1 (`git worktree add FOLDER 22b8857`): epochs of each in turns, in processes of their own, seconds of all cores together.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from ablation import DEMO, drawn_screen
from machine import RESULTS, cpu_model, save
from rcic_fastai.all import *
from rcic_fastai.core import write_json
from rcic_fastai.screen.screen import store_fingerprint
from rcic_fastai.train.recipes import RECIPES

CONFIRMING = dict(experiments='HUVEC-06,HUVEC-07,HUVEC-08,HUVEC-09,HUVEC-10,HUVEC-19,HEPG2-01,HEPG2-02,HEPG2-08,RPE-04,RPE-05,RPE-06,RPE-09,U2OS-01,U2OS-05'.split(','),
                  sirnas=48, size=64, controls=4, sites=2, seed=2027)
MISSING = dict([('HUVEC-07', 3), ('RPE-05', 2), ('HUVEC-19', 4)])     # experiment: plate that is not there
FEW, SHIFTED, KEPT = 'HEPG2-08', 'RPE-09', 16                       # test experiments of which 16 wells are kept: any, and those of 16 siRNAs
OLD_EPOCHS = 13                                                    # of the figures of version 0.1: one of the head, twelve of everything
ASKED = dict(minutes=dict(inductive=.60, adapted=.82, transductive=.98), best=dict(inductive=.82, adapted=.94, transductive=.995))
BEFORE = dict(minutes=dict(inductive=.484, adapted=.681, transductive=.939), best=dict(inductive=.734, adapted=.891, transductive=.993))
MODELS = 'channel means', 'features', 'demo', 'best, minutes of 0.1', 'best'


def packed(name, runs):
    "Return the store of a screen, drawn and packed once"
    if name == 'calibrated': return runs/'screen.zarr', DEMO
    return runs/'confirming.zarr', CONFIRMING


def screen_named(name, runs):
    "Return a screen; of the confirming one without what is missing there"
    store, settings = packed(name, runs)
    screen = drawn_screen(store, **settings)
    return screen if name == 'calibrated' else Screen(thinned(screen.table), screen.source)


def thinned(table):
    "Return the rows of the confirming screen that are there"
    gone = pd.Series(False, table.index)
    for e, plate in MISSING.items(): gone |= (table.experiment == e) & (table.plate == plate)
    rng, treated = np.random.default_rng(CONFIRMING['seed']), table.well_type == 'treatment'
    wells = sorted(table[treated & (table.experiment == FEW)].well_id.unique())
    few = rng.choice(wells, KEPT, replace=False)
    names = rng.choice(sorted(table[treated].sirna.unique()), KEPT, replace=False)
    gone |= treated & (table.experiment == FEW) & ~table.well_id.isin(few)
    gone |= treated & (table.experiment == SHIFTED) & ~table.sirna.isin(names)
    return table[~gone].reset_index(drop=True)


def right_by_experiment(pred, table):
    r = right_wrong(pred, table)
    return dict(accuracy=float(r.right.mean()), wells=len(r), **{e: float(g.right.mean()) for e, g in r.groupby('experiment')})


def channel_means(screen):
    "Name wells by mean and standard deviation of their channels; adapted: standardized in each experiment"
    rows = screen.table[(screen.table.well_type == 'treatment') & screen.table.dataset.isin(('train', 'test'))].reset_index(drop=True)
    x = screen.source.stats.loc[rows.site_id, [f'{m}_{c}' for m in ('mean', 'std') for c in screen.channels]].to_numpy(np.float32)
    x = (x - x[rows.dataset == 'train'].mean(0))/x[rows.dataset == 'train'].std(0)
    emb = pd.concat([rows.add_prefix('Metadata_'), pd.DataFrame(x, columns=[f'emb_{i:04d}' for i in range(x.shape[1])])], axis=1)
    res = {}
    for protocol, e in dict(inductive=emb, adapted=correct(emb, 'standardize'), transductive=correct(emb, 'standardize')).items():
        test = e.Metadata_dataset == 'test'
        pred, _ = predict_wells(e[test].reset_index(drop=True), EmbeddingIndex(e[~test].reset_index(drop=True)), protocol)
        res[protocol] = right_by_experiment(pred, screen.table)
    return res


def run(name, screen, seed, runs, epochs):
    "Train, or not, and name the test wells under each protocol"
    if name == 'channel means': return channel_means(screen)
    with tempfile.TemporaryDirectory(dir=runs) as tmp:
        model = train_screen(screen, Path(tmp)/'model', name.split(',')[0], valid='none', seed=seed, epochs=epochs)
        res = {p: right_by_experiment(model.predict(screen, p, progress=False), screen.table) for p in PROTOCOLS}
    return res | dict(epochs=sum(s['epochs'] for s in model.config['recipe']['stages']))


STEP = """
import sys, time
from pathlib import Path
from rcic_fastai.all import *
store = Path(sys.argv[2])
if not store.exists(): pack_screen(*([open_screen(sys.argv[1])] if hasattr(open_screen(sys.argv[1]), 'treatments') else reversed(open_screen(sys.argv[1]))), store)
screen = open_screen(store)
given = [screen] if hasattr(screen, 'treatments') else list(screen)
dls = screen_dls(*given, valid='none', bs=32, seed=0)
learn = screen_learner(dls, 'efficientnet-lite0', loss='adacos', seed=0)
with learn.no_bar(), learn.no_logging():
    for n in (1, 1):     # the first warms up
        start = time.process_time(), time.perf_counter()
        learn.fit_recipe(Recipe('speed', [Stage('all', n, 4e-3, cutmix=.5)]), seed=0)
print('SECONDS', time.process_time() - start[0], time.perf_counter() - start[1])
"""


def speeds(old, runs, rounds=2):
    "Return the seconds of all cores that an epoch takes, of this library and of a checkout of version 0.1, in turns"
    pictures, found = packed('calibrated', runs)[0].with_suffix('').resolve(), {'now': [], 'version 0.1': []}
    for _ in range(rounds):
        for what, folder in {'now': Path(__file__).parent.parent, 'version 0.1': Path(old)}.items():
            store = (runs/f'best-speeds-{"now" if what == "now" else "then"}.zarr').resolve()       # each reads what it packed itself
            ran = subprocess.run([sys.executable, '-c', STEP, pictures, store], cwd=folder, env={**os.environ, 'PYTHONPATH': str(Path(folder).resolve())}, capture_output=True, text=True)
            if 'SECONDS' not in ran.stdout: raise SystemExit(ran.stderr[-2000:])
            found[what].append(float(ran.stdout.split('SECONDS')[1].split()[0]))
    found = {k: round(float(np.median(v)), 1) for k, v in found.items()}
    return dict(cpu_seconds_of_an_epoch=found, times_faster=round(found['version 0.1']/found['now'], 2))


def with_range(values):
    return dict(mean=round(float(np.mean(values)), 4), low=round(min(values), 4), high=round(max(values), 4), seeds=len(values))


def rows_of(done, name):
    "One row a model: mean and range over seeds under each protocol; the gain over demo, paired by seed"
    rows = []
    for m in MODELS:
        runs = {s: r for (screen, model, s), r in done.items() if (screen, model) == (name, m)}
        if not runs: continue
        beside = {s: r for (screen, model, s), r in done.items() if (screen, model) == (name, 'demo')}
        row = dict(screen=name, model=m, epochs=next(iter(runs.values())).get('epochs', 0), cpu=sorted({r['cpu'] for r in runs.values()}))
        for p in PROTOCOLS:
            row[p] = with_range([r[p]['accuracy'] for r in runs.values()])
            gains = [r[p]['accuracy'] - beside[s][p]['accuracy'] for s, r in runs.items() if s in beside]
            if gains and m.startswith('best'): row[f'{p}_gain'] = with_range(gains)
        some = next(iter(runs.values()))['inductive']
        row['by_experiment'] = {p: {e: round(float(np.mean([r[p][e] for r in runs.values()])), 3) for e in some if e not in ('accuracy', 'wells')} for p in PROTOCOLS}
        rows.append(row)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--screens', type=lambda s: s.split(','), default=['calibrated', 'confirming'])
    p.add_argument('--seeds', type=lambda s: [int(o) for o in s.split(',')], default=[0, 1, 2])
    p.add_argument('--only', type=lambda s: [m for m in MODELS if m.split(',')[0] in s.split(',')], default=list(MODELS), help='models: ' + ', '.join(MODELS))
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs')
    p.add_argument('--speeds', type=Path, help='a checkout of version 0.1: measure how much faster a step is now')
    p.add_argument('--put-together', action='store_true', help='run nothing: store what has been run, whatever seeds there are of each screen')
    args = p.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    kept = args.runs/'best-speeds.json'
    if args.speeds:
        screen_named('calibrated', args.runs)
        write_json(kept, speeds(args.speeds, args.runs))
    stored = RESULTS/'best.json'
    if not kept.exists() and not stored.exists(): raise SystemExit('best: first measure the speeds (--speeds FOLDER).')
    speed = json.loads(kept.read_text()) if kept.exists() else json.loads(stored.read_text())['speed']
    epochs = {'best, minutes of 0.1': int(OLD_EPOCHS*speed['times_faster'])}
    done = {}
    for seed in args.seeds:
        for name in args.screens:
            if args.put_together and not packed(name, args.runs)[0].exists(): continue
            screen = screen_named(name, args.runs)
            for m in args.only:
                path = args.runs/f"best-{name}-{m.replace(', ', '-').replace(' ', '_')}-{seed}.json"
                recipe = RECIPES[m.split(',')[0]].to_dict() if m != 'channel means' else None
                facts = json.loads(json.dumps(dict(screen=store_fingerprint(screen.source), rows=len(screen.table), epochs=epochs.get(m, 0), recipe=recipe)))
                if path.exists():
                    kept_run = json.loads(path.read_text())
                    if kept_run['facts'] != facts: raise SystemExit(f'best: {path} is of another screen or of other settings: remove it, or name another folder with --runs.')
                elif args.put_together: continue
                else:
                    start = time.time()
                    kept_run = dict(facts=facts, result=run(m, screen, seed, args.runs, epochs.get(m, 0)), seconds=round(time.time() - start), cpu=cpu_model())
                    write_json(path, kept_run)
                    print(name, m, seed, {q: round(kept_run['result'][q]['accuracy'], 3) for q in PROTOCOLS}, f"{kept_run['seconds']} s", flush=True)
                done[name, m, seed] = {**kept_run['result'], 'cpu': kept_run['cpu']}
    if not done: raise SystemExit(f'best: there is no run in {args.runs}.')
    known = json.loads(stored.read_text())['rows'] if stored.exists() else []
    rows = [r for name in ('calibrated', 'confirming') for r in rows_of(done, name) or [o for o in known if o['screen'] == name]]
    print(pd.DataFrame([{'screen': r['screen'], 'model': r['model'], 'epochs': r['epochs'], **{q: '{mean:.3f} ({low:.3f} to {high:.3f})'.format(**r[q]) for q in PROTOCOLS}} for r in rows]).to_string(index=False))
    save('best', speed=speed, asked=ASKED, before=BEFORE, rows=rows, chance=round(1/48, 4))


if __name__ == '__main__': main()
