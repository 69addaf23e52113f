"Augment: float64 references, any number of channels, seeds, half precision, the whole way of a batch."
import warnings; warnings.filterwarnings('ignore', category=FutureWarning)
import random
from functools import partial
import cv2, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (Pipeline, TensorCategory, Rotate, Zoom, Warp, nn, Learner, DataBlock,
    TransformBlock, CategoryBlock, ColReader, RandomSplitter, CrossEntropyLossFlat)
from rcic_fastai.batch.augment import *
from rcic_fastai.screen.images import stat_columns
from rcic_fastai.core import ScreenError
from rcic_fastai.batch.site import TensorSite, TensorWell

CS = [1, 2, 3, 4, 6, 9, 16]


def batch(b=5, c=6, h=16, w=None, dtype=np.uint8, seed=0):
    "Channels of very different brightness"
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    x = rng.random((b, c, h, w or h))*np.geomspace(.05, .9, c)[:, None, None]*top
    return TensorSite(torch.from_numpy(x.astype(dtype)))


def wells(b=4, s=2, **kw): return TensorWell(batch(b*s, **kw).reshape(b, s, *batch(1, **kw).shape[1:]))


def ref64(x, full=255): return x.numpy().astype(np.float64)/full


def own_ref(x): return (x - x.mean((-2, -1), keepdims=True))/x.std((-2, -1), keepdims=True)


# ---- integers to floats

@pytest.mark.parametrize('dtype,full', [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize('c', CS)
def test_int_to_float(dtype, full, c):
    x = batch(c=c, dtype=dtype)
    f = IntToFloat()(x)
    assert type(f) is TensorSite and f.dtype == torch.float32
    np.testing.assert_allclose(f.numpy(), ref64(x, full), rtol=1e-6)
    assert torch.equal(IntToFloat()(f), f)
    assert type(IntToFloat()(wells(dtype=dtype))) is TensorWell


@pytest.mark.parametrize('dt', [torch.float16, torch.bfloat16, torch.float32])
def test_floats_are_left_alone(dt):
    x = TensorSite(torch.rand(2, 6, 4, 4).to(dt)*300)
    assert IntToFloat()(x).dtype == dt and torch.equal(IntToFloat()(x), x)


@pytest.mark.parametrize('dt', [torch.int16, torch.int32, torch.int64, torch.bool])
def test_other_integers_are_refused(dt):
    with pytest.raises(ScreenError, match='cannot be scaled'): IntToFloat()(TensorSite(torch.ones(1, 1, 2, 2).to(dt)))


def test_only_the_image_is_touched():
    x, y, m = IntToFloat()((batch(), TensorCategory([255]), torch.tensor([255], dtype=torch.uint8)))
    assert y.item() == 255 and m.item() == 255 and m.dtype == torch.uint8 and x.max() <= 1


# ---- dihedral

@pytest.mark.parametrize('shape', [(4, 4), (3, 5), (2, 6, 7, 7), (2, 2, 6, 5, 8)])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float16])
def test_dihedral_against_numpy(shape, dtype):
    x = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    a = x.numpy()
    for k in range(8):
        r = a
        if k & 1: r = np.flip(r, -1)
        if k & 2: r = np.flip(r, -2)
        if k & 4: r = np.swapaxes(r, -1, -2)
        got = dihedral(x, k)
        assert (got.numpy() == r).all() and torch.equal(dihedral(got, k, inverse=True), x)
    assert len({dihedral(x, k).numpy().tobytes() + bytes(str(dihedral(x, k).shape), 'ascii') for k in range(8)}) == 8


def test_dihedral_is_the_symmetry_group_of_the_square():
    "Closed under composition, and it is all rotations and mirrored rotations"
    a = torch.arange(9).view(3, 3)
    views = [dihedral(a, k) for k in range(8)]
    def which(v): return next(i for i, o in enumerate(views) if torch.equal(o, v))
    table = [[which(dihedral(dihedral(a, i), j)) for j in range(8)] for i in range(8)]
    for row in table: assert sorted(row) == list(range(8))
    turns = [torch.rot90(a, k) for k in range(4)] + [torch.rot90(a.flip(-1), k) for k in range(4)]
    assert sorted(which(t) for t in turns) == list(range(8))


@pytest.mark.parametrize('c', CS)
def test_site_dihedral(c):
    x = IntToFloat()(batch(64, c, 5))
    torch.manual_seed(3)
    out = SiteDihedral()(x, split_idx=0)
    ks = [next(k for k in range(8) if torch.equal(dihedral(a, k), o)) for a, o in zip(x, out)]
    assert set(ks) == set(range(8)) and type(out) is TensorSite
    assert torch.equal(SiteDihedral(0.)(x, split_idx=0), x)
    torch.manual_seed(0)
    wide = IntToFloat()(batch(32, c, 4, 6))
    out = SiteDihedral()(wide, split_idx=0)
    assert {next(k for k in range(4) if torch.equal(dihedral(a, k), o)) for a, o in zip(wide, out)} == {0, 1, 2, 3}


# ---- geometry

@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('hw', [(16, 16), (12, 20)])
def test_geometry_any_channels(c, hw):
    "All channels of a site go the same way: a stack of copies stays a stack of copies"
    one = IntToFloat()(batch(4, 1, *hw))
    x = TensorSite(one.expand(-1, c, -1, -1).clone())
    t = SiteAffine([Rotate(90, p=1.), Zoom(p=1.), Warp(p=1.)], [crop_mat], size=9)
    torch.manual_seed(0); a = t(x, split_idx=0)
    torch.manual_seed(0); b = t(one, split_idx=0)
    assert a.shape == (4, c, 9, 9) and type(a) is TensorSite and torch.isfinite(a).all()
    for i in range(c): torch.testing.assert_close(a[:, i:i+1], b)


def test_affine_is_fastais():
    x = IntToFloat()(batch())
    torch.manual_seed(1); a = SiteAffine([Rotate(40, p=1.)])(x, split_idx=0)
    torch.manual_seed(1); b = Rotate(40, p=1.)(x, split_idx=0)
    torch.testing.assert_close(a, b)


def test_affine_half():
    x = IntToFloat()(batch())
    t = SiteAffine([Rotate(40, p=1.), Warp(p=1.)])
    torch.manual_seed(1); a = t(x.half(), split_idx=0)
    torch.manual_seed(1); b = t(x, split_idx=0)
    assert a.dtype == torch.float16 and (a.float()-b).abs().max() < .02


def test_crop_mat_stays_inside_and_keeps_the_area():
    torch.manual_seed(0)
    x = torch.zeros(2000, 1, 4, 4)
    m = crop_mat(x, .2, .6, (.75, 4/3))
    w, h, cx, cy = m[:, 0, 0], m[:, 1, 1], m[:, 0, 2], m[:, 1, 2]
    assert (cx.abs() + w <= 1+1e-6).all() and (cy.abs() + h <= 1+1e-6).all()
    area, r = w*h, w/h
    assert .199 < area.min() < .22 and .58 < area.max() < .601 and .74 < r.min() and r.max() < 1.34
    assert abs(area.mean() - .4) < .01 and cx.mean().abs() < .03 and (cx.abs()/(1-w)).max() > .98


@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('size', [8, 4, 16, (8, 4), 11, 24])
def test_resize(c, size):
    x = IntToFloat()(batch(3, c))
    out = SiteResize(size)(x)
    sh, sw = (size, size) if isinstance(size, int) else size
    assert out.shape == (3, c, sh, sw) and type(out) is TensorSite
    if 16 % sh == 0 and 16 % sw == 0:
        ref = x.numpy().astype(np.float64).reshape(3, c, sh, 16//sh, sw, 16//sw).mean((3, 5))
        np.testing.assert_allclose(out.numpy(), ref, atol=1e-6)
    assert SiteResize(size)(x.half()).dtype == torch.float16


# ---- normalization

def stats_table(c, g, seed=0):
    rng = np.random.default_rng(seed)
    mean, std = stat_columns([f'c{i}' for i in range(c)])
    plates = [f'HUVEC-01_{i+1}' for i in range(g)]
    return pd.DataFrame(rng.uniform(.05, .5, (g, 2*c)), columns=mean+std, index=plates).assign(n_sites=4)


@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('dtype,full', [(np.uint8, 255), (np.uint16, 65535)])
def test_own(c, dtype, full):
    x = batch(c=c, dtype=dtype)
    out = normalizer('own')(IntToFloat()(x))
    assert type(out) is TensorSite
    np.testing.assert_allclose(out.numpy(), own_ref(ref64(x, full)), atol=2e-4)


def test_own_dim_16_bit():
    "12-bit counts in 16-bit files: the standard deviation is small and must not be drowned by eps"
    x = TensorSite(torch.from_numpy(np.random.default_rng(0).integers(100, 300, (2, 6, 32, 32)).astype(np.uint16)))
    np.testing.assert_allclose(normalizer('own')(IntToFloat()(x)).numpy(), own_ref(ref64(x, 65535)), atol=2e-3)


@pytest.mark.parametrize('c', CS)
def test_global(c):
    st, x = stats_table(c, 1), batch(c=c)
    out = normalizer('global', st)(IntToFloat()(x))
    v = st.values[0][:-1].astype(float)
    np.testing.assert_allclose(out.numpy(), (ref64(x) - v[:c, None, None])/v[c:, None, None], atol=1e-4)


@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('form', ['sites', 'folded', 'wells'])
def test_groups(c, form):
    st = stats_table(c, 3)
    norm = normalizer('plate', st, pos=2)
    group = TensorGroup([1, 3, 0, 2, 7, -1])
    x = batch(6, c) if form == 'sites' else wells(6, 2, c=c)
    f = IntToFloat()(x)
    out, meta, g, y = norm((FoldSites()(f) if form == 'folded' else f, torch.arange(6), group, TensorCategory([5])))
    assert torch.equal(g, group) and torch.equal(meta, torch.arange(6)) and y.item() == 5
    a = ref64(x)
    for i, k in enumerate(group.tolist()):
        v = st.values[(k-1) % 3][:-1].astype(float)
        ref = (a[i] - v[:c, None, None])/v[c:, None, None] if 1 <= k <= 3 else own_ref(a[i])
        got = out[2*i:2*i+2] if form == 'folded' else out[i]
        np.testing.assert_allclose(got.numpy(), ref, atol=2e-4)
    assert type(out) is (TensorWell if form == 'wells' else TensorSite)


@pytest.mark.parametrize('how', ['own', 'global', 'plate'])
def test_constant_channels_are_zero(how):
    st = stats_table(3, 1); st.loc[:, :] = [[.25]*3 + [0.]*3 + [1]]
    x = TensorSite(torch.full((2, 3, 8, 8), .25))
    out = normalizer(how, st, pos=1)((x, TensorGroup([1, 0])))[0]
    assert torch.isfinite(out).all() and out.abs().max() < 1e-3
    assert torch.isfinite(normalizer(how, st, pos=1)((x*0, TensorGroup([1, 0])))[0]).all()


@pytest.mark.parametrize('how', ['own', 'global', 'plate', 'none'])
@pytest.mark.parametrize('dt,tol', [(torch.float16, .02), (torch.bfloat16, .2)])
def test_half_precision(how, dt, tol):
    st = stats_table(6, 1)
    f = IntToFloat()(batch(4))
    norm = normalizer(how, st, pos=1)
    g = TensorGroup([1, 1, 0, 1])
    a, b = norm((f.to(dt), g))[0], norm((f, g))[0]
    assert a.dtype == dt and (a.float()-b).abs().max() < tol*max(1, b.abs().max().item())


def test_group_index():
    norm = normalizer('plate', stats_table(6, 3), pos=1)
    t = pd.DataFrame(dict(experiment=['HUVEC-01', 'HUVEC-01', 'RPE-01'], plate=[3, 4, 1]))
    assert norm.index(t).tolist() == [3, 0, 0] and norm.index(t).dtype == np.int64
    st = stats_table(6, 2); st.index = ['HUVEC-01', 'RPE-01']
    assert normalizer('experiment', st, pos=1).index(t).tolist() == [1, 1, 2]


def test_normalizer_refusals():
    f = IntToFloat()(batch())
    for call, word in [(lambda: normalizer('sigma'), 'sigma'), (lambda: normalizer('global'), 'needs stats'),
                       (lambda: normalizer('experiment', stats_table(6, 2)), 'position of the group'),
                       (lambda: normalizer('plate', stats_table(6, 2), 0), 'position of the group'),
                       (lambda: normalizer('global', stats_table(6, 2)), 'one row'),
                       (lambda: normalizer('global', stats_table(6, 1).drop(columns='std_c3')), 'std_c3'),
                       (lambda: normalizer('global', pd.DataFrame(dict(a=[1]))), 'lack'),
                       (lambda: normalizer('global', stats_table(3, 1))(f), '6 channels'),
                       (lambda: normalizer('plate', stats_table(3, 1), 1)((f, TensorGroup([1]*5))), '6 channels'),
                       (lambda: normalizer('plate', stats_table(6, 1), 1)(f), 'no normalization group'),
                       (lambda: normalizer('plate', stats_table(6, 1), 4)((f, TensorGroup([1]*5))), 'position 4')]:
        with pytest.raises(ScreenError) as e: call()
        assert word in str(e.value) and '\n' not in str(e.value)


# ---- color

@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('normal', [False, True])
def test_jitter_is_gain_and_offset_of_every_channel(c, normal):
    x = IntToFloat()(batch(40, c))
    torch.manual_seed(0)
    out = ChannelJitter(.2, .3, p=1., normal=normal)(x, split_idx=0)
    a, o = x.numpy().astype(np.float64), out.numpy().astype(np.float64)
    gain = o.std((2, 3))/a.std((2, 3))
    offset = (o.mean((2, 3)) - gain*a.mean((2, 3)))/a.std((2, 3))
    np.testing.assert_allclose(o, a*gain[..., None, None] + (offset*a.std((2, 3)))[..., None, None], atol=1e-5)
    assert len(np.unique(gain.round(6))) > 39*c
    if normal:
        if c > 1: assert abs(gain.std() - .2) < .05 and abs(offset.std() - .3) < .06 and np.abs(offset).max() > .4
    else: assert np.abs(gain-1).max() <= .2001 and np.abs(offset).max() <= .3001
    assert c == 1 or np.abs(np.corrcoef(gain.T)[0, -1]) < .5     # channels are drawn on their own, the last as well


def test_jitter_p_split_and_constant():
    x = IntToFloat()(batch(400, 2, 4))
    torch.manual_seed(0)
    out = ChannelJitter(p=.25)(x, split_idx=0)
    changed = np.mean([not torch.equal(a, b) for a, b in zip(x, out)])
    assert .18 < changed < .32
    assert torch.equal(ChannelJitter(p=1.)(x, split_idx=1), x)
    assert torch.equal(ChannelJitter(0, 0, p=1.)(x, split_idx=0), x)
    flat = TensorSite(torch.zeros(3, 2, 4, 4))
    assert torch.equal(ChannelJitter(p=1.)(flat, split_idx=0), flat)
    assert ChannelJitter(p=1.)(x.half(), split_idx=0).dtype == torch.float16
    assert ChannelJitter(p=1.)(TensorSite(torch.rand(2, 3, 6, 4, 4)), split_idx=0).shape == (2, 3, 6, 4, 4)


@pytest.mark.parametrize('shape', [(256, 256), (250, 131), (33, 47), (16, 16), (3, 100, 80), (2, 5)])
@pytest.mark.parametrize('clip, grid', [(2., (8, 8)), (.01, (4, 4)), (40., (3, 5)), (2., (1, 1))])
def test_clahe_of_16_bits_is_that_of_8(shape, clip, grid):
    "Against OpenCV in 8 bits, up to rounding, whatever the size, the clip and the tiles"
    rng = np.random.default_rng(0)
    x = cv2.GaussianBlur(rng.gamma(2, 25, shape[-2:]), (0, 0), 2)
    x = np.stack([x*(k+1)/3 for k in range(shape[0])]) if len(shape) == 3 else x
    x = x.clip(0, 255).astype(np.uint8)
    got = clahe(x.astype(np.uint16)*257, clip, grid)/257
    assert np.abs(got - clahe(x, clip, grid)).max() < 1.01

def test_clahe_keeps_the_gray_values_between_two_of_8_bits():
    "A ramp of 12 bits in 16 stays a ramp; its limit is that of 8 bits"
    ramp = np.tile(np.arange(0, 4096, 16, dtype=np.uint16), (64, 1))
    out = clahe(ramp, 2., (1, 1))
    assert (np.diff(out[0].astype(int)) > 0).all() and len(np.unique(out)) == 256
    for flat in (0, 4095, 65535): assert len(np.unique(clahe(np.full((32, 32), flat, np.uint16)))) == 1

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('shape', [(1, 32, 32), (6, 40, 24), (2, 6, 33, 47), (16, 16, 16)])
def test_clahe(dtype, shape):
    x = np.random.default_rng(0).integers(0, np.iinfo(dtype).max//8, shape, dtype)
    got = clahe(x, 3., (4, 4))
    op = cv2.createCLAHE(3., (4, 4))
    assert got.dtype == dtype and got.shape == x.shape
    if dtype == np.uint8:
        for i in np.ndindex(shape[:-2]): assert (got[i] == op.apply(x[i])).all()
    cls = TensorWell if len(shape) == 4 else TensorSite
    t = cls(torch.from_numpy(x))
    out = CLAHE(3., (4, 4))(t)
    assert type(out) is cls and (out.numpy() == got).all() and (t.numpy() == x).all()
    with pytest.raises(ScreenError, match='CLAHE needs'): CLAHE()(cls(torch.rand(shape)))


# ---- wells

@pytest.mark.parametrize('s', [1, 2, 3, 5])
@pytest.mark.parametrize('c', CS)
def test_fold_unfold(s, c):
    w = wells(4, s, c=c)
    f = FoldSites()(w)
    assert type(f) is TensorSite and f.shape == (4*s, c, 16, 16)
    for i in range(4):
        for j in range(s): assert torch.equal(f[i*s+j], w[i, j])
    u = UnfoldSites(s)(f)
    assert type(u) is TensorWell and torch.equal(u, w)
    assert torch.equal(UnfoldSites(s)(u), u)


def test_fold_refuses_what_is_no_batch_of_wells():
    with pytest.raises(ScreenError, match='needs wells'): FoldSites()(wells()[0])
    with pytest.raises(ScreenError, match='4 sites are not a multiple of 3'): UnfoldSites(3)(batch(4))


def test_shuffle_sites_is_a_permutation_of_each_well():
    w = wells(60, 3, c=2, h=4)
    torch.manual_seed(0)
    out = ShuffleSites()(w, split_idx=0)
    orders = set()
    for a, b in zip(w, out): orders.add(tuple(next(i for i in range(3) if torch.equal(a[i], o)) for o in b))
    assert len(orders) == 6 and all(sorted(o) == [0, 1, 2] for o in orders)
    assert torch.equal(ShuffleSites()(w, split_idx=1), w)


# ---- published settings

def old_site_augs(size=None, min_scale=1., flip=True, max_lighting=.2, gain=.1, offset=.1):
    "What `site_augs` returned before it knew crops, ranges and holes, by hand"
    from fastai.vision.all import Brightness, Contrast, setup_aug_tfms
    crop = [partial(crop_mat, min_scale=min_scale, ratio=(1., 1.))] if min_scale < 1 else []
    geo = [Rotate(90., p=.75), Zoom(max_zoom=1.1, p=.75), Warp(.2, p=.75)]
    res = ([SiteDihedral()] if flip else []) + [SiteAffine(geo, crop, size=size if crop else None)]
    if size is not None: res.append(SiteResize(size, order=31 if crop else 15))
    if max_lighting: res += setup_aug_tfms([Brightness(max_lighting, p=.75), Contrast(max_lighting, p=.75)])
    return res + ([ChannelJitter(gain, offset, .75)] if gain or offset else [])


@pytest.mark.parametrize('how', [{}, dict(size=12), dict(size=12, min_scale=.3), dict(flip=False, max_lighting=0), dict(gain=0, offset=0)])
def test_the_defaults_are_what_they_were_bit_for_bit(how):
    x, outs = IntToFloat()(batch(6, 6, 24)), []
    for make in (site_augs, old_site_augs):
        pipe = Pipeline(make(**how), split_idx=0)
        random.seed(1); torch.manual_seed(1)
        outs.append(pipe(x.clone()))
    assert torch.equal(*outs)


@pytest.mark.parametrize('side, size, out', [(9, None, (9, 9)), ((9, 20), None, (20, 24)), ((9, 20), 12, (12, 12)), ((20, 20), (10, 14), (10, 14))])
def test_crops_are_pieces_of_the_site(side, size, out):
    "In float64 by hand: the piece, resized as PyTorch does"
    x, tfm = IntToFloat()(batch(6, 3, 20, 24)), SiteCrop(side, size)
    torch.manual_seed(4)
    got = tfm(x, split_idx=0)
    torch.manual_seed(4)
    sides = torch.randint(tfm.side[0], tfm.side[1] + 1, (6,)).tolist()
    for i, s in enumerate(sides):
        top, left = int(torch.randint(20 - s + 1, ())), int(torch.randint(24 - s + 1, ()))
        piece = x[i:i+1, :, top:top+s, left:left+s].as_subclass(torch.Tensor).double()
        if out != (s, s): piece = torch.nn.functional.interpolate(piece, out, mode='bilinear', antialias=True, align_corners=False) if s % out[0] or s % out[1] else torch.nn.functional.avg_pool2d(piece, (s//out[0], s//out[1]))
        assert torch.allclose(got[i:i+1].as_subclass(torch.Tensor).double(), piece, atol=1e-6)
    assert got.shape[-2:] == out and torch.equal(tfm(x, split_idx=1), x)


def test_crops_are_everywhere_and_of_every_side():
    x = torch.arange(20.).view(1, 1, 1, 20).expand(400, 1, 20, 20).contiguous().as_subclass(TensorSite)
    torch.manual_seed(0)
    left = SiteCrop(15)(x, split_idx=0)[:, 0, 0, 0]
    assert sorted(set(left.tolist())) == list(range(6))
    torch.manual_seed(0)
    assert set(torch.randint(5, 20 + 1, (400,)).tolist()) == set(range(5, 21))


@pytest.mark.parametrize('p', [0., .5, 1.])
def test_holes(p):
    x = TensorSite(torch.ones(300, 2, 30, 40))
    torch.manual_seed(0)
    out = SiteCutout((1, 3), (4, 10), p)(x, split_idx=0)
    has = (out == 0).flatten(1).any(1)
    assert abs(has.float().mean() - p) < .08 and torch.equal(out[:, 0], out[:, 1])      # all channels alike
    area = (out[has, 0] == 0).flatten(1).sum(1) if p else torch.tensor([1.])
    assert area.max() <= 3*100 and area.min() >= 1


@pytest.mark.parametrize('how', [dict(crop=9), dict(crop=(9, 16), size=8), dict(cutout=(1, 2), cutout_side=(3, 5)), dict(brightness=(.3, .5), contrast=(1., 2.)), dict(min_zoom=.5)])
@pytest.mark.parametrize('sites', [None, 2])
def test_new_augmentations_go_the_whole_way(how, sites):
    x = batch(4) if sites is None else wells(4, sites)
    pipe, outs = Pipeline(site_tfms(how.get('size'), sites=sites, **{k: v for k, v in how.items() if k != 'size'}), split_idx=0), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(pipe((x, torch.zeros(4)))[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2]) and torch.isfinite(outs[0]).all()
    assert outs[0].shape[-1] == how.get('size', how.get('crop', 16)) and type(outs[0]) is type(x)


@pytest.mark.parametrize('name', PUBLISHED_AUGS)
def test_published_settings_run_and_are_plain_data(name):
    import json
    augs = json.loads(json.dumps(PUBLISHED_AUGS[name]))
    x = IntToFloat()(batch(2, 6, 512))
    torch.manual_seed(0)
    out = Pipeline(site_augs(**augs), split_idx=0)(x)
    assert out.shape[-1] == {'rcic16': 384, 'rcic117_crop': 300}.get(name, 512) and torch.isfinite(out).all()


def test_the_first_places_jitter_is_normal_and_of_every_site():
    x = IntToFloat()(batch(400, 2, 8))
    jitter = next(t for t in site_augs(**PUBLISHED_AUGS['rcic1']) if isinstance(t, ChannelJitter))
    x = NormalizeOwn()(x)
    torch.manual_seed(0)
    y = jitter(x, split_idx=0).as_subclass(torch.Tensor)
    gain, offset = y.std((2, 3), correction=0), y.mean((2, 3))
    for draw, center in ((gain, 1.), (offset, 0.)):
        assert abs(draw.mean() - center) < .01 and abs(draw.std() - .1) < .01
        assert abs(((draw - center).abs() > .1).float().mean() - .317) < .05        # one standard deviation


# ---- the whole way

def test_order():
    names = [type(t).__name__ for t in Pipeline(site_tfms(32, 'plate', stats_table(6, 1), 1, sites=2)).fs]
    assert names == ['IntToFloat', 'ShuffleSites', 'FoldSites', 'SiteResize', 'SiteDihedral', 'SiteAffine',
                     'Brightness', 'NormalizeGroup', 'ChannelJitter', 'UnfoldSites']


@pytest.mark.parametrize('c', CS)
@pytest.mark.parametrize('sites', [None, 1, 2])
@pytest.mark.parametrize('min_scale', [1., .3])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_seeds_shapes_and_validation(c, sites, min_scale, dtype):
    x = batch(4, c, dtype=dtype) if sites is None else wells(4, sites, c=c, dtype=dtype)
    b = (x, torch.arange(4), TensorCategory([0, 1, 2, 3]))
    pipe = Pipeline(site_tfms(12, min_scale=min_scale, sites=sites), split_idx=0)
    outs = []
    for py, seed in ((0, 5), (1, 5), (0, 6)):
        random.seed(py); torch.manual_seed(seed)
        outs.append(pipe(b))
    assert torch.equal(outs[0][0], outs[1][0])       # torch's seed alone decides
    assert not torch.equal(outs[0][0], outs[2][0])
    out = outs[0][0]
    assert out.shape == (*x.shape[:-2], 12, 12) and type(out) is type(x) and torch.isfinite(out).all()
    assert torch.equal(outs[0][1], b[1]) and type(outs[0][2]) is TensorCategory
    pipe.split_idx = 1
    v1, v2 = pipe(b)[0], pipe(b)[0]
    assert torch.equal(v1, v2)
    plain = Pipeline(site_tfms(12, sites=sites, augment=False), split_idx=1)(b)[0]
    torch.testing.assert_close(v1, plain)


def test_the_batch_that_came_in_is_not_changed():
    x = batch(); before = x.clone()
    Pipeline(site_tfms(8), split_idx=0)((x, torch.zeros(5)))
    assert torch.equal(x, before)
    f = IntToFloat()(x); before = f.clone()
    Pipeline(site_tfms(None), split_idx=0)((f, torch.zeros(5)))
    assert torch.equal(f, before)


def test_sites_of_a_well_are_augmented_independently():
    one = batch(1, 6, 16)
    w = TensorWell(one[None].expand(8, 2, -1, -1, -1).clone())
    torch.manual_seed(0)
    out = Pipeline(site_tfms(sites=2), split_idx=0)((w, torch.zeros(8)))[0]
    assert sum(torch.equal(o[0], o[1]) for o in out) == 0


def test_through_a_learner():
    "DataBlock, workers' types, training and validation with a group input"
    st = stats_table(6, 2)
    pixels = batch(12, 6)
    items = pd.DataFrame(dict(i=range(12), g=[0, 1, 2]*4, y=list('ab')*6))
    tfms = site_tfms(8, 'plate', st, pos=1)
    getters = [lambda r: TensorSite(pixels[r.i].as_subclass(torch.Tensor)), lambda r: TensorGroup(r.g), ColReader('y')]
    block = DataBlock(blocks=(TransformBlock(batch_tfms=tfms), TransformBlock, CategoryBlock), n_inp=2,
                      splitter=RandomSplitter(.3, seed=0), getters=getters)
    dls = block.dataloaders(items, bs=4, num_workers=0, device='cpu')
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6, 2)
        def forward(self, x, group): return self.l(x.mean((2, 3)))
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    x, g, y = dls.valid.one_batch()
    rows = dls.valid.items
    for o, r in zip(x, rows.itertuples()):
        a = ref64(pixels[r.i]).reshape(6, 8, 2, 8, 2).mean((2, 4)); v = st.values[r.g-1][:-1].astype(float)
        ref = own_ref(a) if r.g == 0 else (a - v[:6, None, None])/v[6:, None, None]
        np.testing.assert_allclose(o.numpy(), ref, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_a_gpu():
    st = stats_table(6, 2)
    for dtype in (np.uint8, np.uint16):
        w = wells(4, 2, dtype=dtype)
        b = (w, TensorGroup([0, 1, 2, 1]))
        for split in (0, 1):
            pipe = Pipeline(site_tfms(12, 'plate', st, 1, sites=2, min_scale=.5), split_idx=split)
            torch.manual_seed(0)
            out = pipe(tuple(o.cuda() for o in b))[0]
            assert out.is_cuda and type(out) is TensorWell and torch.isfinite(out).all()
            if split: torch.testing.assert_close(out.cpu(), pipe(b)[0], atol=1e-4, rtol=1e-4)
