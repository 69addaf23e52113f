"Site: types through batches and workers, pictures of any numbers, fastai's show functions."
import matplotlib; matplotlib.use('Agg')
import warnings; warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (nn, L, plt, tensor, TensorBase, TensorImage, TensorCategory, TensorMultiCategory,
    DataBlock, TransformBlock, CategoryBlock, ColReader, RandomSplitter, IntToFloatTensor, Learner,
    CrossEntropyLossFlat, Interpretation, show_batch, show_results, plot_top_losses)
from rcic_fastai.batch.site import *
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import CHANNELS, read_metadata, real_data

real = pytest.mark.real('images')


pytestmark = pytest.mark.usefixtures('close_figures')


class Memory:
    "The smallest image source: arrays by name"
    def __init__(self, pixels):
        one = next(iter(pixels.values()))
        self.pixels, self.shape, self.dtype = pixels, one.shape, one.dtype
    def __getitem__(self, i): return self.pixels[i].copy()
    def sites_of(self, well): return [i for i in self.pixels if i.rsplit('_', 1)[0] == well]
    def read_into(self, ids, buffer):
        for b, i in zip(buffer, ids): b[:] = self.pixels[i]
        return buffer


def memory(c=6, size=12, n_wells=12, dtype=np.uint8):
    rng = np.random.default_rng(0)
    names = [f'W{w:02d}_{s}' for w in range(n_wells) for s in (1, 2)]
    return Memory({n: rng.integers(0, 200, (c, size, size), dtype) for n in names})


# ---- types

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_create(dtype):
    src = memory(dtype=dtype)
    x, w = TensorSite.create(src, 'W03_2'), TensorWell.create(src, 'W03')
    assert type(x) is TensorSite and type(w) is TensorWell and w.shape == (2, *x.shape)
    assert x.numpy().dtype == dtype and (x.numpy() == src['W03_2']).all() and (w[1].numpy() == x.numpy()).all()
    assert TensorWell.create(src, 'W03', 1).shape[0] == 1
    assert (TensorWell.create(src, 'W03', 5)[4].numpy() == src['W03_1']).all()


def small_dls(src, well=False, n_meta=2, num_workers=0, bs=4):
    items = pd.DataFrame(dict(name=[f'W{i:02d}' for i in range(12)], a=list('xyz')*4, b=list('pq')*6, y=list('klm')*4))
    def get(row): return TensorWell.create(src, row['name']) if well else TensorSite.create(src, row['name']+'_1')
    blocks = (TransformBlock(batch_tfms=IntToFloatTensor), *[CategoryBlock]*(n_meta+1))
    getters = [get, *[ColReader(c) for c in 'ab'[:n_meta]], ColReader('y')]
    block = DataBlock(blocks=blocks, n_inp=1+n_meta, getters=getters, splitter=RandomSplitter(.4, seed=0))
    return block.dataloaders(items, bs=bs, num_workers=num_workers, device='cpu')


@pytest.mark.parametrize('well,workers', [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_types_survive_batches_and_workers(well, workers):
    b = small_dls(memory(), well, num_workers=workers).one_batch()
    cls = TensorWell if well else TensorSite
    assert type(b[0]) is cls and b[0].ndim == (5 if well else 4) and b[0].is_floating_point()


# ---- pictures

@pytest.mark.parametrize('c', range(1, 17))
@pytest.mark.parametrize('how', PICTURES)
def test_any_number_of_channels(c, how):
    x = np.random.default_rng(c).integers(0, 255, (c, 9, 7), np.uint8)
    im = site_picture(TensorSite(torch.from_numpy(x)), how)
    assert im.ndim == 3 and im.shape[2] == 3 and 0 <= im.min() and im.max() <= 1 + 1e-6 and np.isfinite(im).all()
    if how == '3d+3d': assert im.shape == (9, 7*-(-c//3) + (-(-c//3)-1), 3)
    if how == 'composite': assert im.shape == (9, 7, 3)
    TensorSite(torch.from_numpy(x)).show(how=how, title='t')
    well = site_picture(TensorSite(torch.from_numpy(np.stack([x, x]))), how)
    assert well.size > 2*im.size - 1


@pytest.mark.parametrize('kind', ['uint8', 'uint16', 'float32', 'float16', 'bfloat16', 'normalized', 'grad', 'int32'])
def test_any_numbers(kind):
    x = np.random.default_rng(0).integers(0, 200, (6, 16, 16), np.uint8)
    t = torch.from_numpy(x)
    t = dict(uint8=t, uint16=torch.from_numpy(x.astype(np.uint16)*257), float32=t.float()/255, float16=(t/255).half(),
             bfloat16=t.bfloat16(), normalized=(t.float()-80)/30, grad=t.float().requires_grad_(), int32=t.int())[kind]
    s = stretch(TensorSite(t))
    assert s.dtype == np.float32 and 0 <= s.min() and s.max() <= 1
    np.testing.assert_allclose(s, stretch(x), atol=.02)


def test_stretch_rule():
    x = np.arange(1001, dtype=np.float32).reshape(1, 7, 143)
    lim = stretch_limits(x)
    np.testing.assert_allclose(lim[:, 0], [5, 998])
    s = stretch(x).ravel()
    assert s[5] == 0 and s[998] == 1 and s[1000] == 1 and s[501] == pytest.approx(496/993, abs=1e-5)
    np.testing.assert_allclose(stretch(x, [[0], [2000]]).ravel(), x.ravel()/2000, rtol=1e-5)
    before = x.copy(); stretch(x); assert (x == before).all()


def test_constant_nan_and_hot_pixel():
    x = np.full((3, 8, 8), 7.); x[1, 0, 0] = np.nan; x[2, 0, 0] = 9
    s = stretch(x)
    assert (s[0] == 0).all() and np.isfinite(s).all() and s[2, 0, 0] == 1 and s[2].sum() == 1
    assert np.isfinite(stretch(np.full((1, 4, 4), np.inf))).all()


def test_composite_of_one_stain_is_its_color():
    for i, c in enumerate(CHANNELS):
        x = np.zeros((6, 4, 4)); x[i, 0, 0] = 1
        np.testing.assert_allclose(rgb_composite(x)[0, 0], STAIN_COLORS[c], atol=1e-6)
        assert not rgb_composite(x)[1:].any()
    assert (channel_colors(2, ['golgi', 'actin'])[0] == STAIN_COLORS['golgi']).all()
    assert len({tuple(c) for c in channel_colors(16)}) == 16


def test_3d_is_channels_by_threes():
    x = np.random.default_rng(0).random((6, 64, 64)); s = stretch(x); im = rgb_3d(x)
    for c in range(6): assert (im[:, 65*(c//3):65*(c//3)+64, c % 3] == s[c]).all()


def test_refusals():
    x = TensorSite(torch.zeros(2, 6, 8, 8))
    for f in (lambda: stretch(x), lambda: stretch(x[0, 0]), lambda: x[0].show(how='RGB')):
        with pytest.raises(ScreenError): f()
    with pytest.raises(ScreenError, match='take one item of the batch'): TensorSite(torch.zeros(2, 3, 6, 8, 8)).show()


def test_panels_names():
    ax = TensorSite(torch.rand(6, 8, 8)).show(how='panels')
    assert [t.get_text() for t in ax.texts] == list(CHANNELS)
    axs = plot_channels(TensorSite(torch.rand(7, 8, 8)))
    assert len(axs) == 7 and axs[0].get_title().startswith('w1')


# ---- fastai's show functions

class Net(nn.Module):
    def __init__(self, n=3): super().__init__(); self.l = nn.LazyLinear(n)
    def forward(self, x, *meta): return self.l(x.mean((-1, -2)).flatten(1))


def titles(): return [a.get_title() for a in plt.gcf().axes if a.get_title()]


@pytest.mark.parametrize('well', [False, True])
@pytest.mark.parametrize('n_meta', [0, 1, 2])
@pytest.mark.parametrize('how', ['3d+3d', 'composite'])
def test_learner_pictures(well, n_meta, how):
    dls = small_dls(memory(), well, n_meta)
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    dls.show_batch(max_n=3, how=how)
    t = titles(); assert len(t) == 3
    for s in t: assert s.count('\n') == (n_meta > 0) and s.count('·') == max(n_meta-1, 0) and s[-1] in 'klm'
    with learn.no_bar(): learn.show_results(max_n=3, how=how)
    t = titles(); assert len(t) == 3 and all('→' in s for s in t)
    for a in plt.gcf().axes:
        if a.get_title():
            target, pred = a.get_title().split('\n')[-1].split(' → ')
            assert a.title.get_color() == ('green' if target == pred else 'red')
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        interp.plot_top_losses(2, how=how)
    t = titles(); assert len(t) == 2
    for s, l in zip(t, interp.top_losses(2)[0]): assert f'loss {l.item():.2f}' in s


def test_show_batch_options():
    dls = small_dls(memory())
    dls.show_batch(max_n=4, nrows=1, figsize=(6, 2))
    assert len(titles()) == 4 and tuple(plt.gcf().get_size_inches()) == (6, 2)
    _, axs = plt.subplots(1, 2)
    dls.train.show_batch(max_n=2, ctxs=axs, show=False)
    dls.valid.show_batch(max_n=50)
    assert len(titles()) == 4


def test_other_batches_keep_their_own_functions():
    "Dispatch takes only tuples that begin with a TensorSite"
    mod = lambda f, *a: f._resolve_method_with_cache(a)[0].__module__
    s, i = TensorSite(torch.zeros(1, 6, 4, 4)), TensorImage(torch.zeros(1, 3, 4, 4))
    for x in ((i, tensor(1)), (tensor(1), s), i, tensor(1)):
        assert mod(show_batch, x, tensor(1), []).startswith('fastai')
    for x in ((s, tensor(1)), (s,), s, TensorWell(s[None])):
        assert mod(show_batch, x, tensor(1), []) == 'rcic_fastai.batch.site'
    for y in (TensorCategory(0), tensor(1), TensorMultiCategory([0]), (tensor(1), tensor(2))):
        assert mod(show_results, s, y, [], []) == 'rcic_fastai.batch.site'
        assert mod(show_results, (s, tensor(1)), y, [], []) == 'rcic_fastai.batch.site'
        assert mod(plot_top_losses, s, y, [], [], [], []) == 'rcic_fastai.batch.site'
    assert mod(show_results, i, TensorCategory(0), [], []).startswith('fastai')


def test_hidden_input_is_not_in_the_title():
    class Hidden(TensorBase): _in_title = False
    x = TensorSite(torch.rand(1, 6, 8, 8))
    show_batch((x, tensor([1]), Hidden([3])), tensor([7]), L([(x[0], 'HUVEC', Hidden(3), 'sirna_9')]))
    assert titles() == ['HUVEC\nsirna_9']


@real
def test_real_sites_have_pictures():
    from rcic_fastai.screen.images import PngTree, only_present
    table = read_metadata(real_data())
    keep, _ = only_present(table, PngTree(real_data(), table))
    src = PngTree(real_data(), keep)
    for i in keep.site_id[::8]:
        x = TensorSite.create(src, i)
        for how in PICTURES:
            im = site_picture(x, how)
            assert .05 < im.mean() < .7 and im.std() > .05, (i, how)
