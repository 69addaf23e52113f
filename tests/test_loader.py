"ScreenDL: the same batches as fastai's own loader; buffers; threads; batches by group; many processes."
import gc, itertools, multiprocessing, os, pickle, random, sys, threading, time, types
import numpy as np, pandas as pd, pytest, torch
import fastai.callback.progress  # brings learn.no_bar
from fastai.vision.all import (CategoryBlock, ColReader, DataBlock, DisplayedTransform, Image, ItemTransform, MultiCategoryBlock, Normalize,
                               Pipeline, RandomSplitter, RegressionBlock, TfmdDL, ToTensor, TransformBlock, first, load_learner, no_random, noop, plt, tensor)
from fastai.data.core import test_set as rows_for_testing
from hypothesis import Phase, given, settings, strategies as st
from helpers import simulate_screen
from rcic_fastai.batch import loader
from rcic_fastai.batch.augment import CLAHE, IntToFloat, SiteDihedral
from rcic_fastai.batch.data import SiteBlock, screen_dls, spec_dl
from rcic_fastai.embed.embed import embed_dl
from rcic_fastai.screen.images import ImageSource, PngTree
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.batch.loader import *
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import SITE_COLUMNS, read_metadata
from rcic_fastai.screen.pack import PackedScreen, pack_screen
from rcic_fastai.batch.site import TensorSite
from rcic_fastai.screen.screen import Screen

CPU = torch.device('cpu')
quick = dict(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])   # a failure is told at once, not made small first


class Memory(ImageSource):
    "Every pixel of site n is n, or n and a bit for each channel"
    def __init__(self, table, shape=(2, 8, 8), dtype=np.uint8, pause=0., fail=None):
        super().__init__('memory', table, [f'w{c}' for c in range(shape[0])])
        self.shape_, self.dtype_, self.pause, self.fail, self.seen = shape, np.dtype(dtype), pause, fail, []
    shape = property(lambda self: self.shape_)
    dtype = property(lambda self: self.dtype_)
    def _read(self, site_id, out):
        if self.pause: time.sleep(self.pause)
        n = self._rows[site_id]
        self.seen.append(n)
        if self.fail is not None and n == self.fail: raise ScreenError(f'site {site_id} cannot be read: copy it again.')
        out[:] = n


def site_table(n, sites=1, group=8):
    rows = [(f'w{w}_{s}', f'w{w}', 'HUVEC', 'train', f'HUVEC-{w//group:02d}', 1 + w % 2, 'B02', s, 'treatment', f's{w % 3}', w % 3, 0)
            for w in range(n) for s in range(1, sites+1)]
    return pd.DataFrame(rows, columns=SITE_COLUMNS)


def datasets(source, table, label=None, split=None):
    getters = [ColReader('site_id'), ColReader('sirna')]
    return DataBlock([TransformBlock(SiteReader(source)), label or CategoryBlock], getters=getters,
                     splitter=split or (lambda t: (range(len(t)), []))).datasets(table)


def memory_dl(n=50, bs=4, cls=ScreenDL, **kwargs):
    "Batches of whole numbers, in order"
    names = [k for k in ('shape', 'dtype', 'pause', 'fail') if k in kwargs]
    table = site_table(n)
    given = {k: kwargs.pop(k) for k in names}
    source = Memory(table, **{k: given[k] for k in given if k not in ('pause', 'fail')})
    dl = cls(datasets(source, table).train, bs=bs, **{'device': CPU, 'num_workers': 0, **kwargs})
    source.pause, source.fail = given.get('pause', 0.), given.get('fail')
    source.seen.clear()
    return dl


@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    "(table, PNGs, packed screen); two wells have one site only"
    folder = tmp_path_factory.mktemp('screen')
    simulate_screen(folder/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01'], sirnas=4, plates=2, size=32, controls=2, n_workers=1, progress=False)
    table = read_metadata(folder/'screen')
    table = table.drop(table.index[[3, 21]]).reset_index(drop=True)
    png = PngTree(folder/'screen', table)
    return table, png, PackedScreen(pack_screen(Screen(table, png), folder/'screen.zarr', progress=False))


@pytest.fixture(scope='module')
def deep(tmp_path_factory, screen):
    "The same of 16 bits"
    folder, table = tmp_path_factory.mktemp('deep'), screen[0]
    rng = np.random.default_rng(0)
    for r in table.itertuples():
        plate = folder/'images'/'train'/r.experiment/f'Plate{r.plate}'; plate.mkdir(parents=True, exist_ok=True)
        for c in range(6): Image.fromarray(rng.integers(0, 9000, (32, 32), np.uint16)).save(plate/f'{r.well}_s{r.site}_w{c+1}.png')
    png = PngTree(folder, table)
    return table, png, PackedScreen(pack_screen(Screen(table, png), folder/'deep.zarr', progress=False))


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    if feeders() or multiprocessing.active_children(): gc.collect()
    for p in multiprocessing.active_children(): p.join(10)      # told to end; on a busy machine that takes a moment
    assert feeders() == [] and multiprocessing.active_children() == []


def feeders(): return [t.name for t in threading.enumerate() if t.name.startswith('rcic-feed')]


def epochs(dl, n=2, seed=0):
    "All batches of `n` epochs, from this seed"
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dl.rng = random.Random(seed)
    return [list(dl) for _ in range(n)]


def plain(dl, **kwargs):
    "fastai's own loader of the same samples"
    pipes = {k: Pipeline(list(getattr(dl, k).fs)) for k in ('after_item', 'before_batch', 'after_batch')}
    return TfmdDL(dl.dataset, **{**dict(bs=dl.bs, shuffle=dl.shuffle, drop_last=dl.drop_last, num_workers=0, device=dl.device, do_setup=False, **pipes),
                                 **kwargs})


def same(a, b):
    "Batches are equal: types, dtypes, values, order"
    say = lambda o: f'{type(o).__name__} {getattr(o, "dtype", "")} {list(o.shape) if hasattr(o, "shape") else len(o) if hasattr(o, "__len__") else o}'
    ok = type(a) is type(b)
    if ok and isinstance(a, (list, tuple)):
        ok = len(a) == len(b)
        for x, y in zip(a, b): same(x, y)
    elif ok and isinstance(a, torch.Tensor):
        ok = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and np.array_equal(a.numpy(force=True), b.numpy(force=True), equal_nan=a.is_floating_point())
    elif ok: ok = a == b
    assert ok, f'{say(a)} and {say(b)}'


# ---- the same as TfmdDL

CASES = [dict(), dict(norm='plate'), dict(norm='experiment', clahe=True), dict(norm='global'), dict(norm='none', target='cell_type'),
         dict(sites=2), dict(sites=2, norm='plate', clahe=True), dict(sites=3, size=24), dict(bits=16), dict(bits=16, sites=2, clahe=True, norm='global', rows=9),
         dict(controls=True, size=24, augs=None), dict(valid='none', norm='experiment')]

@pytest.mark.parametrize('kind', ['png', 'packed'])
@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(f'{k}={v}' for k, v in c.items()) or 'default')
def test_screen_dls(screen, deep, case, kind):
    "Training and held-out batches of every kind of screen, two epochs of each"
    case = dict(case)
    table, png, packed = deep if case.pop('bits', 8) == 16 else screen
    table = table.groupby('experiment').head(case.pop('rows', 99))
    dls = screen_dls(Screen(table, png if kind == 'png' else packed), bs=16, device=CPU, **case)
    for dl in dls.loaders:
        assert type(dl) is ScreenDL and (dl._whole() or not len(dl))
        same(epochs(plain(dl)), epochs(dl))


@pytest.mark.parametrize('kwargs', [dict(bs=7), dict(bs=7, shuffle=True), dict(bs=7, shuffle=True, drop_last=True), dict(bs=1), dict(bs=1000),
                                    dict(bs=1000, drop_last=True), dict(bs=118), dict(bs=5, n=12), dict(bs=5, n=12, shuffle=True), dict(bs=4, ahead=1),
                                    dict(bs=4, ahead=9), dict(bs=4, threads=1), dict(bs=4, threads=5), dict(bs=None), dict(bs=7, ahead=0)], ids=str)
def test_batch_sizes(screen, kwargs):
    table, png, packed = screen
    train = datasets(packed, table).train
    ours = {k: kwargs[k] for k in ('threads', 'ahead') if k in kwargs}
    other = {k: v for k, v in kwargs.items() if k not in ours}
    dl, want = ScreenDL(train, device=CPU, **ours, **other), TfmdDL(train, num_workers=0, device=CPU, **other)
    for seed in (0, 1):
        a, b = epochs(want, 3, seed), epochs(dl, 3, seed)
        same(a, b)
    assert len(dl) == len(want) == len(b[0])
    if kwargs.get('shuffle'): assert not torch.equal(b[0][0][1], b[1][0][1])


@pytest.mark.parametrize('kwargs', [dict(), dict(sites=2, clahe=True), dict(norm='plate')], ids=str)
def test_worker_processes(screen, kwargs):
    "PNGs by two processes; a packed screen needs none"
    table, png, packed = screen
    dls = screen_dls(Screen(table, png), bs=16, num_workers=2, device=CPU, augs=None, **kwargs)
    for dl in dls.loaders:
        assert dl.fake_l.num_workers == 2
        same(epochs(plain(dl)), epochs(dl))
    same(plain(dls.valid).one_batch(), dls.valid.one_batch())
    assert screen_dls(Screen(table, packed), bs=16, num_workers=2, device=CPU).train.fake_l.num_workers == 0


def test_worker_processes_16_bits_and_drop_last(deep):
    table, png, _ = deep
    dl = ScreenDL(datasets(png, table).train, bs=9, shuffle=True, drop_last=True, num_workers=2, device=CPU)
    same(epochs(plain(dl)), epochs(dl))


LABELS = dict(category=(CategoryBlock, ColReader('cell_type')), numbers=(RegressionBlock, ColReader('score')), whole=(RegressionBlock, ColReader('n')),
              tags=(MultiCategoryBlock, ColReader('tags', label_delim=' ')), two=(RegressionBlock(2), ColReader(['score', 'n'])),
              function=(CategoryBlock, lambda r: f'{r.experiment} {r.site}'), prefix=(CategoryBlock, ColReader('plate', pref='plate ')), rows=(CategoryBlock, RowValue(lambda t: (t.plate % 2).tolist())),
              plain_int=(TransformBlock, ColReader('n')), plain_float=(TransformBlock, ColReader('score')), plain_text=(TransformBlock, ColReader('cell_type')),
              arrays=(TransformBlock, lambda r: np.arange(3.)*r.n), tensors=(TransformBlock, lambda r: tensor([r.n, 1])), pictures=(SiteBlock, ColReader('site_id')))

@pytest.mark.parametrize('name', LABELS)
def test_any_target(screen, name):
    "What fastai can collate, ScreenDL can too"
    table, _, packed = screen
    table = table.assign(score=np.linspace(0, 1, len(table))**2, n=range(len(table)), tags=[' '.join('abc'[i % 2:1 + i % 3]) for i in range(len(table))])
    y, getter = LABELS[name]
    if name == 'pictures': y = SiteBlock(packed)
    block = DataBlock([SiteBlock(packed), y], getters=[ColReader('site_id'), getter], splitter=RandomSplitter(.25, seed=0), n_inp=1)
    dls = block.dataloaders(table, bs=8, num_workers=0, device=CPU)
    for dl in dls.loaders: same(epochs(plain(dl)), epochs(dl))


def test_a_target_of_pictures_is_read_batch_by_batch():
    table = site_table(200)
    source = Memory(table)
    block = DataBlock([TransformBlock(SiteReader(source)), TransformBlock(SiteReader(source))], getters=[ColReader('site_id')]*2,
                      splitter=lambda t: (range(len(t)), []))
    dl = ScreenDL(block.datasets(table).train, bs=4, device=CPU)
    source.seen.clear()
    x, y = dl.one_batch()
    assert x.shape == y.shape and len(source.seen) < 60


def test_statistics_that_a_transform_asks_for(screen):
    "`Normalize()` looks at a batch when it is set up; an AttributeError there would be swallowed"
    table, _, packed = screen
    def stats(dl_type):
        norm = Normalize()
        block = DataBlock([TransformBlock(SiteReader(packed), batch_tfms=[IntToFloat(), norm]), CategoryBlock], dl_type=dl_type,
                          getters=[ColReader('site_id'), ColReader('sirna')], splitter=RandomSplitter(.25, seed=0))
        with no_random(0): dls = block.dataloaders(table.dropna(subset=['sirna']), bs=8, num_workers=0, device=CPU)
        return norm.mean, norm.std, dls.train.one_batch()
    same(stats(TfmdDL), stats(ScreenDL))


class Brighter(ItemTransform):
    def encodes(self, o): return (o[0] + 3, *o[1:])

class TrainOnly(CLAHE): split_idx = 0

@pytest.mark.parametrize('kwargs', [dict(after_item=Brighter()), dict(before_batch=lambda b: b[::-1]), dict(create_item=lambda n: (n, 2*n)),
                                    dict(create_batch=lambda b: (torch.stack([o[0] for o in b])[:, :1], b[0][1])), dict(do_batch=lambda b: len(b)),
                                    dict(after_item=[ToTensor(), CLAHE()]), dict(after_item=TrainOnly()), dict(after_item=lambda o: o), dict(shuffle_fn=lambda i: i[::-1], shuffle=True),
                                    dict(after_batch=[IntToFloat(), SiteDihedral()]), dict(indexed=False), dict(sample=lambda: iter([3, 1, 2]))],
                         ids=lambda k: ' '.join(k) + str(CASES.index(k) if k in CASES else ''))
@pytest.mark.parametrize('part', [0, 1])
def test_what_may_be_passed_to_a_loader(screen, kwargs, part):
    "Whatever fastai's loader would do with it"
    table, _, packed = screen
    dset = datasets(packed, table, split=RandomSplitter(.5, seed=0)).subset(part)
    def result(cls):
        torch.manual_seed(0); random.seed(0)
        dl = cls(dset, bs=6, num_workers=0, device=CPU, **kwargs)
        try: return epochs(dl)
        except Exception as e: return type(e).__name__
    same(result(TfmdDL), result(ScreenDL))


def test_reading_stays_whole_only_where_it_may(screen):
    table, _, packed = screen
    train = datasets(packed, table).train
    assert ScreenDL(train)._whole() and ScreenDL(train, after_item=[ToTensor(), CLAHE()])._whole()
    assert not ScreenDL(train, after_item=Brighter())._whole() and not ScreenDL(train, before_batch=noop)._whole()
    assert not ScreenDL(list(range(9)))._whole()
    same(list(TfmdDL(list(range(9)), bs=4, num_workers=0)), list(ScreenDL(list(range(9)), bs=4)))


# ---- test_dl, new, showing, learners

@pytest.fixture(scope='module')
def dls(screen): return screen_dls(Screen(screen[0], screen[2]), bs=16, device=CPU, augs=None)


def test_test_dl(screen, dls):
    table, _, packed = screen
    for rows in (table[:21], table[50:51], table.sample(30, random_state=0)):
        for kwargs in (dict(), dict(bs=8), dict(shuffle=False, drop_last=False), dict(num_workers=0)):
            test = dls.test_dl(rows, **kwargs)
            assert type(test) is ScreenDL and test._whole() and len(test.one_batch()) == 4
            same(epochs(plain(test)), epochs(test))
    known = table[table.sirna.isin(dls.spec.labels)][:20]
    test = dls.test_dl(known, with_labels=True)
    same(epochs(plain(test)), epochs(test)); assert len(test.one_batch()) == 5
    strange = known.assign(experiment='HUVEC-99', cell_type=None)
    meta = dls.test_dl(strange).one_batch()
    assert not meta[1].any() and not meta[3].any()


def test_new(screen, dls):
    table, _, _ = screen
    for kwargs in (dict(), dict(bs=3), dict(shuffle=True), dict(drop_last=True), dict(dataset=dls.valid_ds)):
        a = dls.train.new(**kwargs)
        assert type(a) is ScreenDL and a._whole()
        same(epochs(plain(a)), epochs(a))
    own = ScreenDL(dls.train_ds, bs=4, threads=3, ahead=5, group_by='experiment', groups=2, shuffle=True, device=CPU)
    again = own.new()
    assert (again.threads, again.ahead, again.group_by, again.groups, len(again)) == (3, 5, 'experiment', 2, len(own))
    assert own.new(ahead=1).ahead == 1 and own.new(shuffle=False)._by_group is None
    same(epochs(plain(dls.valid)), epochs(dls.valid.new(cls=TfmdDL)))


def test_one_batch_show_batch_and_decode(dls):
    for dl in dls.loaders:
        want = plain(dl)
        random.seed(0); dl.rng = random.Random(1); a = dl.one_batch()
        random.seed(0); want.rng = random.Random(1); b = want.one_batch()
        same(b, a)
        got, expected = dl.decode_batch(a, max_n=3), want.decode_batch(b, max_n=3)
        assert len(got) == 3
        for x, y in zip(got, expected): same(tuple(y), tuple(x))
        same(tuple(want.decode(b)), tuple(dl.decode(a)))
    dls.show_batch(max_n=2); plt.close('all')
    dls.valid.show_batch(max_n=2); plt.close('all')


@pytest.fixture(scope='module')
def learn(dls): return screen_learner(dls, 'test_resnet', pretrained=None, emb_dim=16, metadata='cell_type')


def test_predictions_and_embeddings(screen, dls, learn):
    table, png, packed = screen
    with learn.no_bar(), learn.no_logging():
        got, want = learn.get_preds(), learn.get_preds(dl=plain(dls.valid))
        same([*want], [*got])
        assert len(got[0]) == len(dls.valid_ds)
        test = dls.test_dl(table[:21])
        same(learn.get_preds(dl=plain(test))[0], learn.get_preds(dl=test)[0])
        same([*learn.get_preds(ds_idx=0, reorder=False)], [*learn.get_preds(dl=plain(dls.train, shuffle=False, drop_last=False), reorder=False)])
        loss = learn.validate()
    assert np.isfinite(loss).all()
    rows = table[10:31]
    emb = learn.embed(rows, tta=2, progress=False)
    by_hand = embed_dl(learn.model, plain(spec_dl(dls.spec, Screen(rows, png), mask=('plate_group', 'experiment'), device=CPU)), 2, False)
    assert emb.Metadata_site_id.tolist() == rows.site_id.tolist()
    np.testing.assert_allclose(emb.filter(like='emb_').values, by_hand, atol=1e-6, rtol=0)  # batches of experiments, or across them
    assert len(learn.embed(dls.valid, tta=1, progress=False)) == len(dls.valid_ds)


def test_training_is_the_same(screen):
    "One epoch with either loader ends with the same weights"
    table, _, packed = screen
    def weights(change):
        dls = screen_dls(Screen(table, packed), bs=16, device=CPU)
        if change: dls.loaders = [plain(dl) for dl in dls.loaders]
        learn = screen_learner(dls, 'test_resnet', pretrained=None, emb_dim=16)
        with no_random(1), learn.no_bar(), learn.no_logging():
            for n, dl in enumerate(dls.loaders): dl.rng = random.Random(n)
            learn.fit(1, 1e-3)
        return [p.detach() for p in learn.model.parameters()], [float(v) for v in learn.recorder.values[0][:2]]
    same(weights(True), weights(False))


@pytest.mark.parametrize('by', [None, 'experiment', 'plate'])
def test_export(screen, tmp_path, by):
    "A learner is saved without its screen and predicts afterwards"
    table, _, packed = screen
    dls = screen_dls(Screen(table, packed), bs=8, device=CPU, batch_by=by)
    learn = screen_learner(dls, 'test_resnet', pretrained=None, emb_dim=16, path=tmp_path)
    assert [len(dl) for dl in dls.new_empty().loaders] == [0, 0]
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    same(learn.model.eval()(*dls.test_dl(table[:5]).one_batch()), again.model.eval()(*again.dls.test_dl(table[:5], device=CPU).one_batch()))
    assert dls.train.one_batch()[0].shape[0] == 8                     # a pool is there now, and is not pickled
    same(epochs(dls.valid, 1), epochs(pickle.loads(pickle.dumps(dls.valid)), 1))


# ---- threads, errors, leaving early

def values(batches): return [b[0][:, 0, 0, 0].tolist() for b in batches]


@pytest.mark.parametrize('workers', [0, 2])
def test_leaving_an_epoch_early(workers):
    dl = memory_dl(200, num_workers=workers)
    for stop in (0, 1, 5):
        for n, b in enumerate(dl):
            if n == stop: break
    with pytest.raises(ZeroDivisionError):
        for b in dl: 1/0
    it = iter(dl); next(it); next(it); del it, b
    dl.one_batch(); first(dl)
    gc.collect()
    assert feeders() == [] and multiprocessing.active_children() == []
    assert sum(values(dl), []) == list(range(200))


def test_only_a_few_batches_are_read_ahead():
    "Also when the model is slow; and breaking out does not wait for the rest"
    for ahead in (1, 3):
        dl = memory_dl(400, ahead=ahead, threads=1)
        seen = dl.reader.source.seen
        for n, b in enumerate(dl):
            time.sleep(.02)
            assert len(seen) <= 4*(n + 1 + ahead)
            if n == 5: break
    dl = memory_dl(4000, pause=.05, threads=1)
    start = time.time()
    for b in dl: break
    assert feeders() == [] and time.time() - start < 5
    seen = len(dl.reader.source.seen)
    time.sleep(.15)
    assert len(dl.reader.source.seen) == seen <= 12                   # nor does anything read on


def test_reading_and_working_overlap():
    "While the model works on a batch, the next one is read"
    dl, more = memory_dl(80, ahead=1, pause=.005, threads=1), 0
    for n, b in enumerate(dl):
        before = len(dl.reader.source.seen)
        time.sleep(.05)
        more += len(dl.reader.source.seen) > before
    assert more >= 10


@pytest.mark.parametrize('threads,ahead,begun', [(2, 2, True), (2, 1, False), (1, 2, False)])
def test_the_next_batch_is_begun_before_the_last_site_of_this_one_is_there(threads, ahead, begun):
    "A site that takes long to read does not stop the other thread; batches come in order anyway"
    dl = memory_dl(12, bs=4, threads=threads, ahead=ahead)
    source, go, waited = dl.reader.source, threading.Event(), []
    read = source._read
    def slow(site_id, out):
        if site_id == 'w3_1': waited.append(go.wait(5. if begun else .2))
        if site_id == 'w4_1': go.set()
        read(site_id, out)
    source._read = slow
    assert values(dl) == [list(range(i, i + 4)) for i in (0, 4, 8)]
    assert waited == [begun]


@pytest.mark.parametrize('workers,threads', [(0, 1), (0, 4), (2, 1)])
@pytest.mark.parametrize('at', [0, 9, 49])
def test_an_unreadable_site(at, workers, threads):
    "The batches before it arrive; then comes the sentence of the source"
    dl, got = memory_dl(50, fail=at, num_workers=workers, threads=threads), []
    with pytest.raises(ScreenError, match=f'site w{at}_1 cannot be read: copy it again'):
        for b in dl: got.append(b)
    assert sum(values(got), []) == list(range(at//4*4)) or (workers and len(got) <= at//4)
    dl.reader.source.fail = None
    assert sum(values(dl), []) == list(range(50))


def test_errors_of_labels_and_transforms():
    table = site_table(12)
    with pytest.raises(KeyError, match='NEW'): 
        dset = datasets(Memory(table), table)
        list(ScreenDL(dset.train, bs=4, device=CPU).new(rows_for_testing(dset, table.assign(sirna='NEW'), with_labels=True)))
    def broken(o): raise RuntimeError('broken on purpose')
    with pytest.raises(RuntimeError, match='on purpose'): list(memory_dl(after_batch=broken))
    class Broken(DisplayedTransform):
        per_site = True
        def encodes(self, x:TensorSite): raise RuntimeError('broken on purpose')
    with pytest.raises(RuntimeError, match='on purpose'): list(memory_dl(after_item=Broken()))


def test_a_failed_read_writes_no_more_into_the_buffer():
    "Other threads must have stopped when the error arrives"
    source = Memory(site_table(8), pause=.1, fail=0)
    buffer = np.zeros((8, *source.shape), np.uint8)
    with pytest.raises(ScreenError): source.read_into(source.site_ids, buffer, 4)
    buffer[:] = 99
    time.sleep(.4)
    assert (buffer == 99).all()


# ---- buffers

ACTIONS = ['drop', 'drop', 'keep', 'row', 'view', 'numpy', 'detach', 'storage', 'weak', 'write', 'float', 'late']

@settings(max_examples=40, **quick)
@given(st.lists(st.sampled_from(ACTIONS), min_size=8, max_size=26), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_what_is_kept_is_never_overwritten(actions, bs, ahead, threads):
    "Whatever part of a batch somebody holds, in whatever way"
    dl, held, late = memory_dl(len(actions)*bs - bs//2, bs, ahead=ahead, threads=threads), [], None
    for _ in range(2):
        for n, (do, (x, y)) in enumerate(zip(actions, dl, strict=True)):
            want = list(range(n*bs, min((n+1)*bs, dl.n)))
            assert x[:, 0, 0, 0].tolist() == want and y.tolist() == [int(dl.dataset.vocab.o2i[f's{w % 3}']) for w in want]
            if late is not None: held.append(late); late = None
            if do == 'keep': held.append((x, want))
            elif do == 'row': held.append((x[-1:], want[-1:]))
            elif do == 'view': held.append((x.flatten(2).transpose(1, 2)[..., :1].unsqueeze(-1), want))
            elif do == 'numpy': held.append((x.numpy(), want))
            elif do == 'detach': held.append((x.detach().as_subclass(torch.Tensor)[:, :1], want))
            elif do == 'storage': held.append((torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage(), 0, x.shape, x.stride()), want))
            elif do == 'float': held.append((x.float(), want))
            elif do == 'write': x.fill_(255)
            elif do == 'late': late = (x, want)
            elif do == 'weak' and held: held.pop(0)
            del x, y
            for h, w in held: assert h[:, 0, 0, 0].tolist() == w
    for h, w in held: assert (np.asarray(h) == np.array(w, np.uint8).reshape(-1, 1, 1, 1)).all()


@settings(max_examples=60, **quick)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=40), st.integers(1, 5))
def test_buffer_pool(calls, keep):
    "No two living tensors share memory; not more is kept than was said"
    pool, held = BufferPool((2, 3), np.uint16, keep), []
    for n, (size, hold) in enumerate(calls):
        x = pool.get(size)
        assert x.shape == (size, 2, 3) and x.dtype == torch.uint16 and len(pool.kept) <= keep
        x.numpy()[:] = n
        if hold: held.append((n, x))
        elif held and n % 3 == 0: held.pop(0)
        del x
        for m, h in held: assert (h.numpy() == m).all()
    spans = sorted((h.data_ptr(), h.data_ptr() + h.numel()*2) for _, h in held)
    for (_, end), (start, _) in itertools.pairwise(spans): assert end <= start


def test_two_at_once_never_get_the_same_buffer(monkeypatch):
    "`one_batch` in a callback runs beside the epoch: both look for a free buffer at the same time"
    def slow(o):
        n = sys.getrefcount(o) - 1
        del o                                                         # as after the call of C
        time.sleep(.02)
        return n
    pool = BufferPool((2,), np.uint8, 4)
    pool.kept = [np.empty((3, 2), np.uint8) for _ in range(2)]
    monkeypatch.setattr(loader, 'sys', types.SimpleNamespace(getrefcount=slow))
    got, meet = [None]*3, threading.Barrier(3)
    def ask(n): meet.wait(); got[n] = pool.get(3)
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({x.data_ptr() for x in got}) == 3


def test_two_iterators_of_one_loader():
    dl = memory_dl(60, threads=2)
    for n, ((x, _), (z, _)) in enumerate(zip(dl, dl)):
        assert x[:, 0, 0, 0].tolist() == z[:, 0, 0, 0].tolist() == list(range(4*n, 4*n+4))
        if n % 4 == 0: assert dl.one_batch()[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def rss(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='resident memory is read from /proc')
def test_memory_is_flat():
    "2,000 batches of 1.6 MB, some of them held for a while: they do not stay"
    dl, held = memory_dl(255*16, 16, shape=(3, 128, 128), dtype=np.uint16, threads=1, ahead=2, after_batch=noop), []
    def run(batches):
        for n, (x, y) in enumerate(itertools.islice(itertools.chain.from_iterable(itertools.repeat(dl)), batches)):
            if n % 50 == 0: held.append(x)
            if len(held) > 2: held.pop(0)
        held.clear(); gc.collect()
    run(300)
    before, files, threads = rss(), len(os.listdir('/proc/self/fd')), threading.active_count()
    run(2000)
    assert rss() - before < 40e6, f'{(rss() - before)/1e6:.1f} MB more'
    assert len(os.listdir('/proc/self/fd')) <= files and threading.active_count() <= threads
    assert len({x.data_ptr() for x, _ in dl}) <= 5


# ---- batches by group

groupings = st.lists(st.integers(1, 30), min_size=1, max_size=7).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.permutations([g for g, n in enumerate(sizes) for _ in range(n)]),
                            st.integers(1, len(sizes)), st.integers(1, 6)))

@settings(max_examples=100, **quick)
@given(groupings, st.integers(0, 2**32))
def test_group_batches(drawn, seed):
    sizes, groups, k, share = drawn
    names = np.array([f'exp {g}' for g in groups])
    gb = GroupBatches(names, k*share, k)
    order = gb.order(random.Random(seed))
    assert order == gb.order(random.Random(seed)) == GroupBatches(pd.Series(names), k*share, k).order(random.Random(seed))
    assert len(order) == len(gb)*k*share and all(type(i) is int for i in order)
    for n in range(len(gb)):
        counts = pd.Series(names[order[n*k*share:(n+1)*k*share]]).value_counts()
        assert counts.tolist() == [share]*k                           # k groups, the same share of each
    full = [max(n//share, 1) for n in sizes]                          # how many shares a group has
    most = next(m for m in range(sum(full), -1, -1) if sum(min(f, m) for f in full) >= m*k)
    assert len(gb) == most > 0                                        # no better plan exists
    if k == 1: assert set(names[order]) == set(names)
    used = pd.Series(order).value_counts()
    for g, n in enumerate(sizes):
        mine = used.reindex(np.flatnonzero(names == f'exp {g}')).fillna(0)
        assert mine.max() <= (1 if n >= share else -(-share//n))      # nothing twice, but in a group that is too small
        if n < share and mine.sum(): assert mine.min() >= share//n


@settings(max_examples=30, **quick)
@given(groupings)
def test_every_group_and_every_sample_comes_in_some_epoch(drawn):
    sizes, groups, k, share = drawn
    gb, rng = GroupBatches(groups, k*share, k), random.Random(0)
    seen = set()
    for _ in range(200):
        seen |= set(gb.order(rng))
        if len(seen) == len(groups): break
    assert {groups[i] for i in seen} == set(groups)


def plain_order(groups, bs, k, rng):
    "The same order, each step written out: among the groups that have samples left, those with most, ties by chance"
    share, (codes, names) = bs//k, pd.factorize(pd.Series(groups))
    members = [np.flatnonzero(codes == i).tolist() for i in range(len(names))]
    piles = [rng.sample(m, len(m)) for m in members]
    take = [iter((p*(-(-share//len(p))))[:max(len(p)//share, 1)*share]) for p in piles]
    left, plan = [max(len(m)//share, 1) for m in members], []
    while True:
        some = sorted((g for g in range(len(left)) if left[g]), key=lambda g: (-left[g], rng.random()))[:k]
        if len(some) < k: break
        for g in some: left[g] -= 1
        plan.append(some)
    rng.shuffle(plan)
    return [next(take[g]) for gs in plan for g in gs for _ in range(share)]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=200), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_orders_are_those_of_the_plain_loop(groups, share, k, seed):
    "And the generator goes on as it would after the plain loop"
    k = min(k, len(set(groups)))
    fast, slow = random.Random(seed), random.Random(seed)
    slow.gauss(0, 1), fast.gauss(0, 1)
    gb = GroupBatches(groups, k*share, k)
    for _ in range(2):
        order = plain_order(groups, k*share, k, slow)
        assert gb.order(fast) == order and len(gb)*k*share == len(order)
    assert fast.getstate() == slow.getstate()

def test_many_plates_are_ordered_in_linear_time():
    "300,000 samples of 2,000 plates: about a second, where each batch once looked through all plates in Python"
    groups = np.arange(300_000) % 2000
    start = time.process_time()
    order = GroupBatches(groups, 32).order(random.Random(0))
    assert len(order) == 2000*(150//32)*32 and time.process_time() - start < 8


def test_group_batches_refuses():
    for args, words in [((['a', 'b'], 5, 2), 'choose a multiple of 2'), ((['a', 'b'], 6, 3), 'there are 2'), ((['a', 'b'], 4, 0), 'choose 1 to 2'), ((['a'], 4, -1), 'choose 1 to 1')]:
        with pytest.raises(ScreenError, match=words): GroupBatches(*args)


@pytest.mark.parametrize('by,groups', [('experiment', 1), ('experiment', 2), ('plate', 1), ('plate', 4)])
def test_loader_by_group(screen, by, groups):
    table, png, packed = screen
    dls = screen_dls(Screen(table, packed), valid='RPE-01', bs=8, batch_by=by, batch_groups=groups, device=CPU, seed=3)
    keys = (dls.train.items.experiment + (dls.train.items.plate.astype(str) if by == 'plate' else '')).to_numpy()
    source = {png[i].tobytes(): n for n, i in enumerate(dls.train.items.site_id)}
    raw = ScreenDL(dls.train_ds, bs=8, shuffle=True, group_by=by, groups=groups, device=CPU)
    seen = []
    for epoch in range(2):
        rows = [[source[x.numpy().tobytes()] for x in b[0]] for b in raw]
        assert len(rows) == len(raw)
        for r in rows: assert pd.Series(keys[r]).value_counts().tolist() == [8//groups]*groups
        seen.append(rows)
    assert seen[0] != seen[1]
    same(epochs(raw, 1, 5), epochs(raw.new(), 1, 5))
    assert [b[1].shape for b in dls.train] == [torch.Size([8])]*len(raw)
    assert sum(len(b[0]) for b in dls.valid) == len(dls.valid_ds)     # held-out samples come all, in order
    with pytest.raises(ScreenError, match='is not known'): ScreenDL(dls.train_ds, bs=8, shuffle=True, group_by='nonsense')


# ---- several processes

@pytest.fixture(scope='module')
def rank():
    "fastai's `DistributedDL` without a process group: every rank draws the same order, as its broadcast would see to"
    with pytest.MonkeyPatch.context() as m:
        try: import accelerate     # is it there?
        except ModuleNotFoundError:                                   # fastai.distributed only names it
            m.setitem(sys.modules, 'accelerate', types.SimpleNamespace(Accelerator=type('Accelerator', (), {'__init__': lambda self: None})))
        from fastai.distributed import DistributedDL
    class Rank(DistributedDL):
        def _broadcast(self, t, rank): return t
    return Rank


@pytest.mark.parametrize('n,world', [(48, 2), (50, 2), (50, 3), (7, 4)])
@pytest.mark.parametrize('shuffle', [False, True])
def test_distributed(rank, n, world, shuffle):
    "The ranks together see every sample, as often as with fastai's own loader"
    def union(cls):
        seen = []
        for r in range(world):
            dl = memory_dl(n, cls=cls, shuffle=shuffle)
            dl.rng = random.Random(7)
            part = rank(dl, rank=r, world_size=world)
            for epoch in range(2):
                got = list(part)
                assert sum(len(b[0]) for b in got) == -(-n//world)
                seen.append(values(got))
        return seen
    ours = union(ScreenDL)
    assert ours == union(TfmdDL)
    for epoch in range(2): assert {v for part in ours[epoch::2] for b in part for v in b} == set(range(n))


def test_distributed_by_group(rank):
    table = site_table(64, group=16)
    dset = datasets(Memory(table), table).train
    seen = []
    for r in range(2):
        dl = ScreenDL(dset, bs=4, shuffle=True, group_by='experiment', device=CPU); dl.rng = random.Random(1)
        part = rank(dl, rank=r, world_size=2)
        rows = values(part)
        assert len(rows) == len(part) == 8
        for row in rows: assert len({i//16 for i in row}) == 1
        seen += sum(rows, [])
    assert sorted(seen) == list(range(64))
