"""What each part of the method is worth on experiments never seen: a ladder from the plainest baseline to the full method.

    python bench/ablation.py [--scale demo|long|full] [--seeds 0,1,2] [--runs FOLDER] [--only MODEL,MODEL] [--judge test|held]

Every model is trained on the training experiments of one screen, once a seed, and judged on the wells of the test experiments.
What a run gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark goes on where it was. Prints one table
with the three protocols in columns of their own, and stores bench/results/ablation.json (ablation_long.json, ablation_full.json).

`--scale demo` draws its screen (64 px, 48 siRNAs) and takes about an hour on two cores. `--scale long` trains four times as long on
the same screen: what regularizes has to be judged where a model can overfit (`--only adacos,cutmix,wells,metadata`; two processes took 77 minutes). `--scale full` wants a packed RxRx1
(`--screen`), EfficientNet-B3 at 300 px, 1,108 siRNAs, and a GPU.

`--judge held` holds out two of the training experiments, judges on these and stores ablation_held.json (ablation_held_long.json): methods against batch effects and ways of searching are chosen there,
and the test experiments are read once, with what was chosen.
"""
import argparse, json, os, time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from machine import save
from rcic_fastai.all import *
from rcic_fastai.core import write_atomic
from rcic_fastai.embed.embed import eval_mode
from rcic_fastai.embed.neck import SEARCHES, NeckIndex
from rcic_fastai.predict.plan import as_test
from rcic_fastai.predict.predict import best_class
from rcic_fastai.screen.screen import store_fingerprint

DEMO = dict(experiments='HUVEC-01,HUVEC-02,HUVEC-03,HUVEC-04,HUVEC-05,HUVEC-17,HUVEC-18,RPE-01,RPE-02,RPE-03,RPE-08,U2OS-01,U2OS-02,U2OS-04'.split(','),
            sirnas=48, size=64, controls=4, sites=2, seed=0)
SCALES = dict(demo=dict(arch='efficientnet-lite0', size=None, epochs=12, lr=4e-3, bs=32, tta=4),
              long=dict(arch='efficientnet-lite0', size=None, epochs=48, lr=4e-3, bs=32, tta=4),
              full=dict(arch='efficientnet-b3', size=300, epochs=90, lr=1e-3, bs=64, tta=8))
HELD = dict(demo=('HUVEC-05', 'RPE-03'), long=('HUVEC-05', 'RPE-03'), full=('HUVEC-16', 'HEPG2-07', 'RPE-07', 'U2OS-03'))   # with --judge held
WATCHED = dict(demo=('HUVEC-04', 'RPE-02'), long=('HUVEC-04', 'RPE-02'), full=('HUVEC-15', 'HEPG2-06', 'RPE-06', 'U2OS-02'))   # held out beside those that judge, where a training reads a loss of experiments that it does not learn
WAYS = 3     # changes when `judge` has other ways of predicting: earlier runs are not added to then
_BATCH = dict(norm='own', loss='adacos', cutmix=.5)
MODELS = dict( # name: what the model is trained with; each adds to the one above, those from wells on to cutmix
    untrained=dict(norm='own', loss='softmax', trained=False),
    plain=dict(norm='global', loss='softmax'),
    own=dict(norm='own', loss='softmax'),
    adacos=dict(norm='own', loss='adacos'),
    cutmix=dict(norm='own', loss='adacos', cutmix=.5),
    wells=dict(norm='own', loss='adacos', cutmix=.5, sites=2),
    metadata=dict(norm='own', loss='adacos', cutmix=.5, metadata=('cell_type', 'plate_group', 'experiment')),
    pairs=dict(**_BATCH, batch_by='pairs'),
    lisa=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='lisa', p=.5),)),
    lisa_mixup=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='lisa', how='mixup', p=.5),)),
    contrast=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='contrast', weight=.2),)),
    lisa_contrast=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='lisa', p=.5), dict(name='contrast', weight=.2))),
    contrast_memory=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='contrast', weight=.2, memory=256),)),
    contrast_centroids=dict(**_BATCH, batch_by='pairs', callbacks=(dict(name='contrast', weight=.2, memory=256, to='centroids'),)),
    mixstyle=dict(**_BATCH, callbacks=('mixstyle',)),
    dsu=dict(**_BATCH, callbacks=('dsu',)),
    adversarial_style=dict(**_BATCH, callbacks=('adversarial_style',)),
    by_experiment=dict(**_BATCH, batch_by='experiment'),
    by_two=dict(**_BATCH, batch_by='experiment', batch_groups=2),
    with_controls=dict(**_BATCH, batch_by='experiment', callbacks=(dict(name='control_batches', n=8),)),
    bag=dict(**_BATCH, stem='bag'),
    bag_sampled=dict(**_BATCH, stem='bag', callbacks=('channel_sampling',)),
    simsiam=dict(**_BATCH, pretrain='simsiam'),
    swa=dict(**_BATCH, callbacks=(dict(name='swa', after=.5),)),
    watched=dict(**_BATCH, watches=True),      # what swad is compared with: it learns as few experiments
    swad=dict(**_BATCH, watches=True, callbacks=('swad',)))


def drawn_screen(store, experiments, **settings):
    "Return a simulated screen, drawn and packed once"
    if not store.exists():
        folder = store.with_suffix('')
        if not folder.exists(): simulate_screen(folder, experiments, **settings, progress=False)
        pack_screen(open_screen(folder), store, progress=False)
    return open_screen(store)


def screen(scale, path, runs):
    "The screen that is judged on"
    if path: return open_screen(path)
    if scale == 'full': raise SystemExit('ablation: --scale full needs --screen, a packed RxRx1 (rcic_download, rcic_pack).')
    return drawn_screen(runs/'screen.zarr', **DEMO)


def train(table, source, scale, seed, norm='own', loss='adacos', cutmix=0., sites=1, metadata=(), rows=None, longer=1, held='none', callbacks=(), trained=True, stem='tile', pretrain='', watches=False, **batches):
    "A learner trained on the training experiments but those held out: the test experiments judge, or these"
    s = SCALES[scale]
    if watches: rows, held = table[~table.experiment.isin([] if held == 'none' else held)], list(WATCHED[scale])     # those that judge are not there at all
    dls = screen_dls(Screen(table if rows is None else rows, source), valid=held, norm=norm, sites=sites, size=s['size'], bs=max(8, s['bs']//sites), seed=seed, **batches)
    learn = screen_learner(dls, s['arch'], stem=stem, metadata=metadata, loss=loss, seed=seed)
    if torch.cuda.is_available(): learn.to_fp16(); learn.model.to(memory_format=torch.channels_last)
    stages = [Stage('head', 1, 1e-2, 'stem,head', loss=loss), Stage('all', longer*s['epochs'], s['lr'], cutmix=cutmix, callbacks=callbacks)] if trained else []
    with learn.no_bar(), learn.no_logging():
        if pretrain: learn.pretrain_simsiam(Recipe('simsiam', stages[1:]), seed=seed)
        learn.fit_recipe(Recipe('ablation', stages, arch=s['arch']), seed=seed)
    return learn


def accuracy_of(emb, index, table, protocol='inductive', merge='best', **kwargs):
    "Share of wells named right, and of the worst experiment"
    pred, _ = predict_wells(emb, index, protocol, merge=merge, **kwargs)
    r = right_wrong(pred, table)
    return dict(accuracy=float(r.right.mean()), worst=float(r.groupby('experiment').right.mean().min()))


def restricted_accuracy(emb, index, table):
    "Share of wells named right when only the siRNAs of the inferred plate group are allowed, one well at a time"
    m = emb_metadata(emb)
    scores, ids = merge_wells(index.class_scores(emb_features(emb), 'nearest', 1), m['well_id'], 'best')
    wells = m.drop_duplicates('well_id').set_index('well_id').loc[ids].reset_index()
    known = index.labels.drop_duplicates('sirna').set_index('sirna').plate_group.reindex(index.classes)
    groups, _ = plate_groups_of(wells.drop(columns='plate_group'), scores, known, index.labels)
    allowed = known.to_numpy()[None] == np.asarray(groups)[:, None]
    named = np.array(index.classes, object)[best_class(np.where(allowed, scores, -np.inf))]
    truth = table.drop_duplicates('well_id').set_index('well_id').sirna.loc[wells.well_id].to_numpy(object)
    right = pd.Series(named == truth).groupby(wells.experiment).mean()
    return dict(accuracy=float((named == truth).mean()), worst=float(right.min()))


def site_accuracy(emb, index):
    "Share of single sites named right by their nearest neighbor"
    scores = index.class_scores(emb_features(emb), 'nearest', 1)
    named = np.array(index.classes, object)[best_class(scores)]
    return dict(accuracy=float((named == emb.Metadata_sirna.to_numpy(object)).mean()))


def judge(learn, table, test, tta, name):
    "Every way of predicting with one trained model"
    quiet, rows = dict(progress=False), learn.dls.train.items
    if learn.dls.spec.sites > 1: rows = table[table.well_id.isin(rows.well_id)]
    as_index = lambda emb: EmbeddingIndex(emb)
    one, query = learn.embed(rows, tta=1, **quiet), learn.embed(test, tta=1, **quiet)
    res = {}
    if learn.dls.spec.sites == 1:
        res['one site'] = ('inductive', site_accuracy(query, as_index(one)))
    res['two sites'] = ('inductive', accuracy_of(query, as_index(one), table))
    emb, query = learn.embed(rows, tta=tta, **quiet), learn.embed(test, tta=tta, **quiet)
    index = as_index(emb)
    res['two sites, TTA'] = ('inductive', accuracy_of(query, index, table))
    res['+ plate groups'] = ('transductive', restricted_accuracy(query, index, table))
    res['+ plate groups and assignment'] = ('transductive', accuracy_of(query, index, table, 'transductive'))
    beside = lambda r: pd.concat([r, table[table.experiment.isin(r.experiment) & (table.well_type == 'negative_control')]]) if name == 'with_controls' else None
    bn_query = learn.embed(test, tta=tta, adapt='experiment', adapt_rows=beside(test), **quiet)
    # queries alone, which predict_wells rejects when they say so: to show what it costs
    unmarked = bn_query.drop(columns='Metadata_batchnorm')
    res['+ AdaBN of the experiment'] = ('adapted', accuracy_of(unmarked, index, table, 'adapted'))
    bn_train = learn.embed(rows, tta=tta, adapt='experiment', adapt_rows=beside(rows), **quiet)
    bn_index = as_index(bn_train)
    res['+ AdaBN, index too'] = ('adapted', accuracy_of(bn_query, bn_index, table, 'adapted'))
    res['+ AdaBN, index too, groups and assignment'] = ('transductive', accuracy_of(bn_query, bn_index, table, 'transductive'))
    if name != 'untrained':      # its classifier says nothing
        surer = learn.embed(test, tta=tta, adapt='experiment', adapt_rows=beside(test), tent_rows=test, **quiet)
        res['+ AdaBN, index too, entropy lowered'] = ('adapted', accuracy_of(surer, bn_index, table, 'adapted'))
    for neck in SEARCHES[1:]:
        res[f'search {neck}'] = ('inductive', accuracy_of(query, NeckIndex(index, neck), table))
        res[f'+ AdaBN, search {neck}'] = ('adapted', accuracy_of(bn_query, NeckIndex(bn_index, neck), table, 'adapted'))
    for tag, (a, b) in {'': (emb, query), 'AdaBN, ': (bn_train, bn_query)}.items():
        both = correct(pd.concat([a, b], ignore_index=True), 'standardize')
        done, ask = as_index(both.iloc[:len(a)].reset_index(drop=True)), both.iloc[len(a):].reset_index(drop=True)
        res[f'+ {tag}standardized embeddings'] = ('adapted', accuracy_of(ask, done, table, 'adapted'))
        res[f'+ {tag}standardized, groups and assignment'] = ('transductive', accuracy_of(ask, done, table, 'transductive'))
    if name == 'metadata':
        group = predict_wells(query, index, 'transductive')[0].set_index('id_code').plate_group
        known = lambda r: learn.embed(r, tta=tta, mask=('experiment',), **quiet)
        told = known(test.assign(plate_group=test.well_id.map(group).astype('Int64')))
        res['plate groups as input'] = ('transductive', accuracy_of(told.drop(columns='Metadata_protocol'), as_index(known(rows)), table))
    return {k: dict(protocol=p, **v) for k, (p, v) in res.items()}


def named_by_classifier(learn, rows):
    "Share of single sites that the classifier names right"
    dl, n, out = spec_dl(learn.dls.spec, Screen(rows, learn.dls.screen.source), mask=('plate_group', 'experiment'), device=learn.dls.device), len(learn.model.inputs) + 1, []
    with eval_mode(learn.model) as m:
        for b in dl: out.append(m(*b[:n]).argmax(1).cpu().numpy())
    return float((np.array(learn.dls.spec.labels, object)[np.concatenate(out)] == dl.rows.sirna.to_numpy(object)).mean())


def leak(table, source, scale, seed):
    """One classifier (softmax), with the screen's norm and with each picture's own, on the sites that it learned, on the other site of the
    same wells (WILDS' id_test: a split by site), and on held-out experiments. Means over the cell types: the parts differ in their shares."""
    rows = table[(table.dataset == 'train') & (table.well_type == 'treatment')]
    parts = dict(learned_sites=rows[rows.site == 1], other_site_of_the_same_wells=rows[rows.site == 2],
                 held_out_experiments=table[(table.dataset == 'test') & (table.well_type == 'treatment')])
    res = {}
    for norm in ('global', 'own'):
        learn = train(table, source, scale, seed, norm=norm, loss='softmax', rows=parts['learned_sites'], longer=3)  # half the pictures: 1.5 times the steps
        res[norm] = {k: float(np.mean([named_by_classifier(learn, g) for _, g in r.groupby('cell_type')])) for k, r in parts.items()}
    return res


def leaks_of(results):
    "Means over the seeds, and in how many the other site was named better than the held-out experiments"
    res = {}
    for norm in results[0]:
        other, held = (np.array([r[norm][k] for r in results]) for k in ('other_site_of_the_same_wells', 'held_out_experiments'))
        res[norm] = {k: round(float(np.mean([r[norm][k] for r in results])), 4) for k in results[0][norm]}
        res[norm].update(other_site_times_held_out=round(float(other.mean()/held.mean()), 2), held_in=f'{int((other > held).sum())} of {len(other)} seeds')
    return res


def facts_of(args, name, source):
    "What a result is of: the screen's pictures and the settings"
    return json.loads(json.dumps(dict(screen=store_fingerprint(source), scale=SCALES[args.scale], model=MODELS.get(name, {}), judge=args.judge, ways=WAYS)))


def check_run(path, facts):
    "A result of another screen or of other settings is not this one's"
    if json.loads(path.read_text()).get('facts') != facts:
        raise SystemExit(f'ablation: {path} is of another screen or of other settings: name another folder with --runs, or remove it.')


def prefix(args): return args.scale if args.judge == 'test' else f'{args.scale}_held'


def runs_of(args, table, source):
    "Train and judge what has no result yet; one file a model and seed"
    held = [] if args.judge == 'test' else list(HELD[args.scale])
    judged = table.experiment.isin(held) if held else table.dataset == 'test'
    test = as_test(table[judged & (table.well_type == 'treatment')])      # also without the plate groups of training experiments
    for seed in args.seeds:
        for name in [m for m in [*MODELS, 'leak'] if not args.only or m in args.only]:
            if name == 'leak' and held: continue
            done = args.runs/f'{prefix(args)}-{name}-{seed}.json'
            facts = facts_of(args, name, source)
            if done.exists(): check_run(done, facts); continue
            start = time.time()
            if name == 'leak': res = leak(table, source, args.scale, seed)
            else: res = judge(train(table, source, args.scale, seed, held=held or 'none', **MODELS[name]), table, test, SCALES[args.scale]['tta'], name)
            write_atomic(done, lambda p: p.write_text(json.dumps(dict(seconds=round(time.time() - start), facts=facts, result=res), indent=1)))
            print(f'{name}, seed {seed}: {time.time() - start:.0f} s', flush=True)


def table_of(args):
    "One row a model and way of predicting, mean ± sd over the seeds, one column a protocol"
    rows, seeds = {}, sorted({int(p.stem.split('-')[-1]) for p in args.runs.glob(f'{prefix(args)}-*.json')})
    for name in MODELS:
        runs = {s: json.loads(p.read_text())['result'] for s in seeds if (p := args.runs/f'{prefix(args)}-{name}-{s}.json').exists()}
        found = list(runs.values())
        for way in found[0] if found else ():
            a = np.array([f[way]['accuracy'] for f in found])
            worst = [f[way]['worst'] for f in found if 'worst' in f[way]]
            rows[name, way] = dict(protocol=found[0][way]['protocol'], values=dict(zip(runs, a.tolist())), mean=float(a.mean()), sd=float(a.std(ddof=1)) if len(a) > 1 else None,
                                   worst=float(np.mean(worst)) if worst else None, seeds=len(a))
    return rows, seeds


CLAIMS = ( # what is said to help, on experiments never seen: with it, and without it; (model, way of predicting)
    ('own-image normalization', ('own', 'one site'), ('plain', 'one site')),
    ('AdaCos instead of softmax', ('adacos', 'two sites, TTA'), ('own', 'two sites, TTA')),
    ('CutMix', ('cutmix', 'two sites, TTA'), ('adacos', 'two sites, TTA')),
    ('two sites a well, at prediction', ('cutmix', 'two sites'), ('cutmix', 'one site')),
    ('two sites a sample, in training too', ('wells', 'two sites, TTA'), ('cutmix', 'two sites, TTA')),
    ('views at prediction (TTA)', ('cutmix', 'two sites, TTA'), ('cutmix', 'two sites')),
    ('AdaBN', ('cutmix', '+ AdaBN of the experiment'), ('cutmix', 'two sites, TTA')),
    ('AdaBN of the index too', ('cutmix', '+ AdaBN, index too'), ('cutmix', 'two sites, TTA')),
    *[(f'{m}: entropy lowered (Tent), adapted', (m, '+ AdaBN, index too, entropy lowered'), (m, '+ AdaBN, index too')) for m in ('cutmix', 'lisa')],
    ('standardized embeddings', ('cutmix', '+ standardized embeddings'), ('cutmix', 'two sites, TTA')),
    ('plate groups', ('cutmix', '+ plate groups'), ('cutmix', 'two sites, TTA')),
    ('one-to-one assignment', ('cutmix', '+ plate groups and assignment'), ('cutmix', '+ plate groups')),
    ('metadata: cell type', ('metadata', 'two sites, TTA'), ('cutmix', 'two sites, TTA')),
    ('metadata: plate group', ('metadata', 'plate groups as input'), ('metadata', 'two sites, TTA')),
    *[(f'{what}{", adapted" if way else ""}', (m, way or 'two sites, TTA'), (beside, way or 'two sites, TTA')) for way in ('', '+ AdaBN, index too') for what, m, beside in (
        ('batches of pairs', 'pairs', 'cutmix'), ('LISA (boxes)', 'lisa', 'cutmix'), ('LISA (Mixup)', 'lisa_mixup', 'cutmix'), ('contrast of pairs', 'contrast', 'cutmix'), ('LISA and contrast', 'lisa_contrast', 'cutmix'),
        ('contrast with earlier batches', 'contrast_memory', 'cutmix'), ('contrast with centroids', 'contrast_centroids', 'cutmix'),
        ('MixStyle', 'mixstyle', 'cutmix'), ('DSU', 'dsu', 'cutmix'), ('adversarial style', 'adversarial_style', 'cutmix'), ('batches of one experiment', 'by_experiment', 'cutmix'), ('batches of two experiments', 'by_two', 'cutmix'), ('controls in every batch', 'with_controls', 'by_experiment'),
        ('a bag of channels', 'bag', 'cutmix'), ('channel sampling', 'bag_sampled', 'bag'), ('SimSiam first', 'simsiam', 'cutmix'), ('SWA', 'swa', 'cutmix'), ('SWAD', 'swad', 'watched'))],
    *[(f'{m}: search {n}{", adapted" if a else ""}', (m, f'{a}search {n}'), (m, '+ AdaBN, index too' if a else 'two sites, TTA')) for m in ('cutmix', 'lisa') for a in ('', '+ AdaBN, ') for n in SEARCHES[1:]])
FULL = 'cutmix', 'two sites, TTA'  # the full method, inductive; two sites in training were to be part of it, and lost with the first seed
CHOSEN = 'full: after the first seed; best: after all seeds; both on the experiments that are judged, so take them as a little too good'


def claims_of(rows):
    "Each claim with the accuracies of both sides, the mean gain, and in how many seeds it held; over the seeds that both sides have"
    res = []
    for what, yes, no in CLAIMS:
        if yes not in rows or no not in rows: continue
        both = [s for s in rows[yes]['values'] if s in rows[no]['values']]
        if not both: continue
        a, b = (np.array([rows[k]['values'][s] for s in both]) for k in (no, yes))
        gain = b - a
        error = round(float(gain.std(ddof=1)/len(gain)**.5), 4) if len(gain) > 1 else None
        res.append(dict(claim=what, without=round(float(a.mean()), 4), with_it=round(float(b.mean()), 4), gain=round(float(gain.mean()), 4), error=error,
                        held_in=f'{int((gain > 0).sum())} of {len(gain)} seeds'))
    return res


def report(args, table):
    rows, seeds = table_of(args)
    chance = 1/table[(table.well_type == 'treatment') & table.sirna.notna()].sirna.nunique()
    text = lambda r: f"{r['mean']:.3f}" + (f" ± {r['sd']:.3f}" if r['sd'] is not None else '')
    shown = pd.DataFrame([{'model': m, 'prediction': w, **{p: text(r) if r['protocol'] == p else '' for p in PROTOCOLS}} for (m, w), r in rows.items()])
    print(shown.to_string(index=False), f'\nchance {chance:.3f}, seeds {seeds}')
    gain = lambda k: round((rows[k]['mean'] - chance)/(1 - chance), 4) if k in rows else None
    best = {p: max(((r['mean'], ' / '.join(k)) for k, r in rows.items() if r['protocol'] == p), default=None) for p in PROTOCOLS}
    done = {p: json.loads(p.read_text()) for p in sorted(args.runs.glob(f'{prefix(args)}-*.json'))}
    leaks = [d['result'] for p, d in done.items() if p.stem.startswith(f'{prefix(args)}-leak-')]
    figures = dict(scale=args.scale, judged='test experiments' if args.judge == 'test' else 'held-out training experiments: ' + ', '.join(HELD[args.scale]), chance=round(chance, 4), seeds=seeds, minutes=round(sum(d['seconds'] for d in done.values())/60/max(args.at_once, 1), 1),
                   **(dict(minutes_asked=60, chosen=CHOSEN) if args.scale == 'demo' and args.judge == 'test' else {}), best={k: v and [round(v[0], 4), v[1]] for k, v in best.items()}, full=' / '.join(FULL),
                   plain_error_reduction=gain(('plain', 'one site')), full_error_reduction=gain(FULL), times_plain_asked=2, claims=claims_of(rows),
                   leak=leaks_of(leaks) if leaks else None,
                   rows=[dict(model=m, prediction=w, **{k: v for k, v in r.items() if k != 'values'}) for (m, w), r in rows.items()])
    print(pd.DataFrame(figures['claims']).to_string(index=False))
    print(json.dumps({k: v for k, v in figures.items() if k not in ('rows', 'claims')}, indent=1))
    usual = '_'.join(['ablation', *(['held'] if args.judge == 'held' else []), *([args.scale] if args.scale != 'demo' else [])])
    save(args.store or usual, **figures)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scale', choices=list(SCALES), default='demo')
    p.add_argument('--seeds', type=lambda s: [int(o) for o in s.split(',')], default=[0, 1, 2])
    p.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs')
    p.add_argument('--screen', help='packed screen to use instead of a simulated one')
    p.add_argument('--judge', choices=('test', 'held'), default='test', help='judge on the test experiments, or on two training experiments that are held out')
    p.add_argument('--at-once', type=int, default=1, help='how many processes of this script shared the work, each with its own --only')
    p.add_argument('--only', type=lambda s: s.split(','), default=None, help='models to train: ' + ', '.join([*MODELS, 'leak']))
    p.add_argument('--store', help='name of the file in bench/results; the usual one where this is not given')
    args = p.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    judged = screen(args.scale, args.screen, args.runs)
    table, source = judged.table, judged.source
    runs_of(args, table, source)
    report(args, table)


if __name__ == '__main__': main()
