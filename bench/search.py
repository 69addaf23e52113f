"""Time and memory of searching an `EmbeddingIndex`: 1,000,000 rows × 10,000 queries × 512 numbers, and a screen of the size of RxRx1.

    python bench/search.py [--rows N] [--queries N] [--screen N] [--kinds exact,ivf,hnsw] [--runs FOLDER] [--dry]

Every line is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues; it is a process of its own, whose largest resident memory the operating system tells: it draws the embeddings, builds
the index from their table, and answers. At most 6 GB is asked. `inductive` is class scores whose six best classes are
right, and the five nearest rows of each query; `recall_at_1` is the share of queries whose nearest row is the exact one,
`agreement` the share whose answer is that of the exact index. `transductive` names the wells of a screen in 36 experiments of four
plates, groups given, by `predict_wells`, experiment by experiment.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
from machine import save
from rcic_fastai.core import write_json

LIMIT_GB, DIM, CLASSES = 6, 512, 1108
TOO_SLOW = {('transductive', 'hnsw')}     # given up after 15 minutes of one core: the exact index took 5


def peak_gb():
    "Largest resident memory of this process, 10⁹ bytes"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)/1e9


def drawn(rng, sirna, experiment, noise=2., factors=64):
    "Embeddings of unit length: a direction per siRNA and one per experiment, and more noise than either, in 64 directions, as wells vary in few ways"
    of_sirna, of_experiment, ways = (np.random.default_rng(i).normal(size=(n, DIM)).astype(np.float32) for i, n in ((1, 2000), (2, 2000), (3, factors)))
    x = np.empty((len(sirna), DIM), np.float32)
    for i in range(0, len(x), 2**14):
        at = slice(i, i + 2**14)
        x[at] = of_sirna[sirna[at]] + of_experiment[experiment[at]] + noise*rng.standard_normal((len(sirna[at]), factors), np.float32) @ ways/factors**.5
        x[at] /= np.linalg.norm(x[at], axis=1, keepdims=True)
    return x


def table(x, **columns):
    "The embeddings table of `x`, which is not copied"
    emb = pd.DataFrame(x, columns=[f'emb_{i:04d}' for i in range(DIM)], copy=False)
    return pd.concat([pd.DataFrame({f'Metadata_{c}': v for c, v in columns.items()}), emb], axis=1, copy=False)


def names(codes): return pd.Categorical.from_codes(codes, [f'sirna_{i:04d}' for i in range(CLASSES)]).astype(object)


def timed(what, f):
    "What `f` gives, and how long it took: seconds on the clock, and of all cores together (what a busy machine does not change)"
    start, cpu = time.perf_counter(), time.process_time()
    res = f()
    return res, {f'{what}_seconds': round(time.perf_counter() - start, 1), f'{what}_cpu_seconds': round(time.process_time() - cpu, 1)}


def inductive(kind, n, n_queries, out):
    "Build an index of `n` rows and answer"
    from rcic_fastai.embed.index import EmbeddingIndex
    rng = np.random.default_rng(0)
    sirna, experiment = rng.integers(CLASSES, size=n), rng.integers(33, size=n)
    emb = table(drawn(rng, sirna, experiment), sirna=names(sirna), experiment=experiment)
    q = drawn(rng, rng.integers(CLASSES, size=n_queries), np.full(n_queries, 1000))
    index, build = timed('build', lambda: EmbeddingIndex(emb, kind=kind))
    del emb
    scores, answer = timed('answer', lambda: index.class_scores(q, top=6))
    (_, near), neighbors = timed('neighbor', lambda: index.search(q, 5))
    np.savez(out, answer=scores.argmax(1), nearest=near[:, 0])
    return build | answer | neighbors


def plate_rows(n_sites, experiments, first):
    "Metadata of about `n_sites` sites: four plates per experiment, 277 siRNAs each, two sites per well"
    wells = max(1, round(n_sites/experiments/8))
    rows = pd.DataFrame([(e, p, w, s) for e in range(experiments) for p in range(1, 5) for w in range(min(wells, CLASSES//4)) for s in (1, 2)],
                        columns=['e', 'plate', 'w', 'site'])
    rows['plate_group'], rows['well_type'], rows['cell_type'] = (rows.plate + rows.e) % 4, 'treatment', 'HUVEC'
    rows['code'] = rows.w*4 + rows.plate_group
    rows['experiment'] = 'HUVEC-' + (rows.e + first).astype(str)
    rows['well'] = [f'{"ABCDEFGHIJKLMNOP"[w//24]}{w % 24 + 1:02d}' for w in rows.w]
    rows['well_id'] = rows.experiment + '_' + rows.plate.astype(str) + '_' + rows.well
    return rows.assign(site_id=rows.well_id + '_' + rows.site.astype(str), sirna=names(rows.code.to_numpy()))


def transductive(kind, n, n_queries, out):
    "Name the wells of a screen of the size of RxRx1"
    from rcic_fastai.embed.index import EmbeddingIndex
    from rcic_fastai.predict.predict import predict_tables
    rng = np.random.default_rng(0)
    known, asked = plate_rows(n, 33, 1), plate_rows(n_queries, 18, 100)
    of = lambda rows, first: table(drawn(rng, rows.code.to_numpy(), rows.e.to_numpy() + first), **rows.drop(columns=['e', 'w', 'code']))
    index, build = timed('build', lambda: EmbeddingIndex(of(known, 0), kind=kind))
    queries = of(asked, 1000)
    tables = [queries[(asked.e == e).to_numpy()] for e in asked.e.unique()]
    pred, answer = timed('answer', lambda: predict_tables(tables, index, 'transductive'))
    np.savez(out, answer=pred.sirna.to_numpy(str))
    truth = asked.drop_duplicates('well_id').set_index('well_id').sirna
    return dict(rows=len(known), queries=len(asked)) | build | answer | dict(right=round(float((truth[pred.id_code].to_numpy() == pred.sirna).mean()), 4))


def measure(task, kind, n, n_queries, folder):
    "Run one line in a process of its own, or return what a run before gave"
    def file(kind, end): return Path(folder)/f'search-{task}-{kind}-{n}-{n_queries}.{end}'
    out, kept = file(kind, 'npz'), file(kind, 'json')
    if kept.is_file():
        print(kept.read_text(), flush=True)
        return json.loads(kept.read_text())
    command = [sys.executable, __file__, '--child', json.dumps([task, kind, n, n_queries, str(out)])]
    done = subprocess.run(command, env=dict(os.environ, OMP_WAIT_POLICY='PASSIVE'), capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    row = dict(task=task, kind=kind, rows=n, queries=n_queries) | json.loads(done.stdout.splitlines()[-1])
    exact, mine = (np.load(file(k, 'npz')) for k in ('exact', kind))
    if 'nearest' in mine: row['recall_at_1'] = round(float((exact['nearest'] == mine['nearest']).mean()), 4)
    row['agreement'] = round(float((exact['answer'] == mine['answer']).mean()), 4)
    print(row, flush=True)
    write_json(kept, row)
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(rows=1_000_000, queries=10_000, screen=73_000, screen_queries=40_000).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--kinds', default='exact,ivf,hnsw', help='begins with exact')
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs', help='where lines are kept')
    p.add_argument('--child', help=argparse.SUPPRESS)
    p.add_argument('--dry', action='store_true', help='store nothing')
    a = p.parse_args()
    if a.child:
        task, *what = json.loads(a.child)
        print(json.dumps(dict(inductive=inductive, transductive=transductive)[task](*what) | dict(peak_gb=round(peak_gb(), 2))))
        return
    a.runs.mkdir(parents=True, exist_ok=True)
    sizes = dict(inductive=(a.rows, a.queries), transductive=(a.screen, a.screen_queries))
    rows = [measure(task, kind, *sizes[task], a.runs) for task in sizes for kind in a.kinds.split(',') if (task, kind) not in TOO_SLOW]
    print(pd.DataFrame(rows).to_string(index=False))
    peak = max(r['peak_gb'] for r in rows)
    print(f'largest memory of a process: {peak} GB   asked: under {LIMIT_GB}')
    if not a.dry: save('search', dimensions=DIM, classes=CLASSES, lines=rows, peak_gb=peak, peak_gb_asked=LIMIT_GB, met=peak < LIMIT_GB)


if __name__ == '__main__': main()
