"Batch effects: statistics of control wells, AdaBN of control wells, corrections that are kept; what is exact, and what is refused."
import json
from dataclasses import asdict, replace
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Transform
from torch import nn
from helpers import simulate_screen
from rcic_fastai.model.batchnorm import adapted_batchnorm
from rcic_fastai.embed.correct import *
from rcic_fastai.batch.site import TensorSite
from rcic_fastai.batch.data import ScreenSpec, screen_dls, spec_dl, statistics_rows
from rcic_fastai.embed.embed import *
from rcic_fastai.screen.images import PngTree
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.screen.pack import PackedScreen, pack_screen
from rcic_fastai.predict.predict import predict_wells
from rcic_fastai.embed.table import *
from rcic_fastai.screen.screen import Screen

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp('batch')/'screen'
    table = simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=48, controls=2, n_workers=1, progress=False)
    return Screen(table, PngTree(folder, table))

@pytest.fixture(scope='module')
def learn(screen):
    return screen_learner(screen_dls(screen, bs=8, valid='HUVEC-02', device='cpu', augs=None), 'test_efficientnet', pretrained=None)

def is_control(t): return (t.well_type != 'treatment').to_numpy()
def of(t, e): return t[t.experiment == e]
def spec_of(screen, norm, sites=1, **kwargs):
    return screen_dls(screen, bs=4, valid='HUVEC-02', norm=norm, norm_from='controls', sites=sites, device='cpu', augs=None, **kwargs).spec
def images(spec, rows, source, **kwargs):
    dl = spec_dl(spec, Screen(rows, source), bs=4, device='cpu', **kwargs)
    return dict(zip(dl.rows[spec.key], torch.cat([b[0].as_subclass(torch.Tensor) for b in dl])))

# --- statistics of control wells

@pytest.mark.parametrize('norm,keys', [('plate', ['experiment', 'plate']), ('experiment', ['experiment'])])
@pytest.mark.parametrize('sites', [1, 2])
def test_pictures_are_measured_from_the_control_pixels_of_their_group(screen, norm, keys, sites):
    table, source = screen.table, screen.source
    test = of(table, 'HUVEC-17')
    got = images(spec_of(screen, norm, sites), test[~is_control(test)], source, stat_rows=table)
    for _, group in test.groupby(keys):
        pixels = np.stack([source[i] for i in group.site_id[is_control(group)]]).astype(np.float64)/255
        mean, std = (f(pixels, axis=(0, 2, 3))[:, None, None] for f in (np.mean, np.std))
        for r in group[~is_control(group)].drop_duplicates('well_id').itertuples():
            x = got[r.site_id] if sites == 1 else got[r.well_id][0]
            raw = source[r.site_id if sites == 1 else source.sites_of(r.well_id)[0]]
            np.testing.assert_allclose(x, (raw/255 - mean)/std, atol=2e-4)

def test_who_else_is_predicted_makes_no_difference(screen):
    table, source = screen.table, screen.source
    spec, test = spec_of(screen, 'plate'), of(table, 'HUVEC-17')
    whole, some = images(spec, test, source), images(spec, test[~is_control(test)].sample(5, random_state=1), source, stat_rows=table)
    for i, x in some.items(): torch.testing.assert_close(x, whole[i])

def test_only_the_controls_are_read_for_the_statistics(screen):
    table, source = screen.table, screen.source
    fresh = PngTree(source.root, table)
    dls = screen_dls(Screen(table, fresh), valid='HUVEC-02', norm='experiment', norm_from='controls', bs=4, device='cpu')
    used = table[is_control(table) & (table.dataset == 'train')]
    assert set(fresh.stats.index) == set(used.site_id)
    assert set(statistics_rows(dls.spec, dls.train.items, table).experiment) == {'HUVEC-01'}

def test_packed_and_png_are_normalized_alike(screen, tmp_path):
    table, source = screen.table, screen.source
    store = PackedScreen(pack_screen(Screen(table, source), tmp_path/'s.zarr', progress=False), table)
    spec, rows = spec_of(screen, 'plate'), of(table, 'HUVEC-17')
    for a, b in zip(images(spec, rows, source).values(), images(spec, rows, store).values()): torch.testing.assert_close(a, b)

def test_the_spec_is_json_and_older_ones_mean_all_wells(screen):
    spec = spec_of(screen, 'plate')
    assert ScreenSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    old = {k: v for k, v in asdict(spec).items() if k != 'norm_from'}
    assert ScreenSpec(**old).norm_from == 'all'

def test_what_cannot_be_measured_is_refused(screen):
    table, source = screen.table, screen.source
    spec, test = spec_of(screen, 'plate'), of(table, 'HUVEC-17')
    treated = test[~is_control(test)]
    for given in (None, treated, of(table, 'HUVEC-01')):
        with pytest.raises(ScreenError, match='no control well to take pixel statistics of'):
            spec_dl(spec, Screen(treated, source.restrict(treated)), stat_rows=given)
    bare = test[~(is_control(test) & (test.plate == 3))]
    with pytest.raises(ScreenError, match='HUVEC-17_3 has no control'): spec_dl(spec, Screen(bare, source.restrict(bare)))
    with pytest.raises(ScreenError, match='has no site to take'): spec_dl(replace(spec, norm_from='all'), Screen(test, source), stat_rows=table[table.plate < 4])
    with pytest.raises(ScreenError, match='not with norm=.own.'): screen_dls(Screen(table, source), norm_from='controls')
    with pytest.raises(ScreenError, match="norm_from='negative' is not known"): screen_dls(Screen(table, source), norm='plate', norm_from='negative')

def test_rebuild_keeps_the_statistics(screen):
    dls = screen_dls(screen, bs=4, valid='HUVEC-02', norm='plate', norm_from='controls', device='cpu')
    assert dls.rebuild(size=24).spec == replace(dls.spec, size=24)

# --- fastai's habits, and what a spec looks like

def no_nucleus(x:TensorSite):
    x[:, 0] = 0
    return x

@pytest.mark.parametrize('sites', [1, 2])
def test_batch_transforms_of_the_user(screen, sites):
    "They come after ours, in training only, and stay with `rebuild`; predictions know nothing of them"
    dls = screen_dls(screen, bs=4, valid='HUVEC-02', norm='plate', sites=sites, device='cpu', batch_tfms=no_nucleus)
    for d in (dls, dls.rebuild(size=24)):
        assert not d.train.one_batch()[0][..., 0, :, :].any() and d.valid.one_batch()[0][..., 0, :, :].any()
    dl = spec_dl(dls.spec, Screen(of(screen.table, 'HUVEC-17'), screen.source), bs=4, device='cpu')
    assert dl.one_batch()[0][..., 0, :, :].any()

def test_batch_transforms_keep_their_order(screen):
    "A `Transform` runs where its order says: this one before the normalization, which undoes it"
    plain, bright = (screen_dls(screen, bs=4, valid='HUVEC-02', device='cpu', augs=None, batch_tfms=t).train.one_batch()[0]
                     for t in (None, [Brighter()]))
    torch.testing.assert_close(torch.Tensor(bright), torch.Tensor(plain), atol=1e-3, rtol=0)

class Brighter(Transform):
    order, split_idx = 50, 0
    def encodes(self, x:TensorSite): return x*2 + .1

def test_item_transforms_are_not_silently_dropped(screen):
    with pytest.raises(ScreenError, match='sites are read in whole batches'): screen_dls(screen, item_tfms=Brighter())

def test_a_spec_prints_short(screen):
    spec = spec_of(screen, 'plate', sites=2)
    text = repr(replace(spec, labels=[f's{i}' for i in range(1108)]))
    assert len(text.splitlines()) == 2 and len(text) < 250
    assert '1,108 classes of sirna (s0, s1, s2 and 1105 more), wells of 2 sites' in text and 'norm plate (from control wells)' in text
    assert spec == replace(spec)

# --- AdaBN

@pytest.mark.parametrize('sizes', [(30,), (7, 23), (28, 2), (10, 10, 10), (29, 1)])
def test_every_site_counts_alike_whatever_batch_it_is_in(sizes):
    torch.manual_seed(0)
    bn, x = nn.BatchNorm2d(3).eval(), torch.randn(30, 3, 8, 8) + torch.arange(30)[:, None, None, None]
    parts = [p for p in x.split(sizes) if len(p) > 1]
    with adapted_batchnorm(bn, [(p,) for p in parts], prior=0):
        torch.testing.assert_close(bn.running_mean, torch.cat(parts).mean((0, 2, 3)))
        torch.testing.assert_close(bn.running_var, sum(p.var((0, 2, 3))*len(p) for p in parts)/sum(map(len, parts)))

@pytest.mark.parametrize('n', [2, 8, 40])
@pytest.mark.parametrize('prior', [0, 16, 100])
def test_few_sites_change_little(n, prior):
    bn, x = nn.BatchNorm2d(3).eval(), torch.full((n, 3, 4, 4), 5.)
    with adapted_batchnorm(bn, [(x,)], prior=prior): torch.testing.assert_close(bn.running_mean, torch.full((3,), 5*n/(n + prior)))
    assert (bn.running_mean == 0).all() and not bn.training

def test_adabn_of_controls_end_to_end(screen, learn):
    table = screen.table
    test = of(table, 'HUVEC-17')
    treated, controls = test[~is_control(test)], test[is_control(test)]
    how = dict(tta=1, progress=False, adapt='experiment')
    plain, got = learn.embed(treated, tta=1, progress=False), learn.embed(treated, adapt_rows=controls, **how)
    assert got.Metadata_site_id.tolist() == treated.site_id.tolist() and set(got.Metadata_protocol) == {'adapted'}
    assert np.abs(emb_features(got) - emb_features(plain)).max() > .01
    few = learn.embed(treated.iloc[:3], adapt_rows=table[is_control(table)], **how)        # controls of others are not used
    np.testing.assert_allclose(emb_features(few), emb_features(got)[:3], atol=1e-5)
    with pytest.raises(ScreenError, match='HUVEC-17 has no site to take BatchNorm statistics of'):
        learn.embed(treated, adapt_rows=of(controls, 'HUVEC-01'), **how)

def test_an_index_adapted_by_its_own_experiments(screen, learn):
    table = screen.table
    treated = table[~is_control(table)]
    train, test = treated[treated.dataset == 'train'], treated[treated.dataset == 'test']
    how = dict(tta=1, progress=False, adapt='experiment')
    both = learn.embed(train, **how)
    for e, rows in train.groupby('experiment'):                                            # nothing of the other experiments
        np.testing.assert_allclose(emb_features(learn.embed(rows, **how)), emb_features(both[(both.Metadata_experiment == e).to_numpy()]), atol=1e-5)
    index, queries = EmbeddingIndex(both), learn.embed(test, **how)
    for protocol in ('adapted', 'transductive'):
        pred, near = predict_wells(queries, index, protocol)
        assert len(pred) == test.well_id.nunique() and set(pred.protocol) == {protocol} and len(near)
    with pytest.raises(ScreenError, match="ask for protocol='adapted'"): predict_wells(queries, index)
    plain = learn.embed(test, tta=1, progress=False)                                        # queries and index are treated alike
    with pytest.raises(ScreenError, match='were used for the rows of the index'): predict_wells(plain, index)
    with pytest.raises(ScreenError, match='were used for the embeddings to name'):
        predict_wells(queries, EmbeddingIndex(learn.embed(train, tta=1, progress=False)), 'adapted')

# --- corrections that are kept

TOY = toy_profiles(n_sirnas=16, dim=12, batch=2., seed=3)
META_ = emb_metadata(TOY)
TRAIN = (META_.dataset == 'train').to_numpy()
KEPT = [CenterScale(), CenterScale('plate', scale=False), Standardize(robust=True), Sphering(), Sphering(None, shrink='auto', within=True),
        TVN(), TVN(None, dims=5), TVN('plate', dims=7, shrink=.25, ridge=1/3)]

@pytest.mark.parametrize('kind', KEPT, ids=str)
def test_a_kept_correction_is_the_same(kind, tmp_path):
    fitted = kind.fit(TOY[TRAIN])
    want = fitted.transform(TOY[~TRAIN])
    facts, arrays = fitted.state()
    for again in (load_correction(save_correction(fitted, tmp_path/'c.safetensors')), Correction.from_state(json.loads(json.dumps(facts)), arrays)):
        pd.testing.assert_frame_equal(again.transform(TOY[~TRAIN]), want, check_exact=True)
        pd.testing.assert_frame_equal(again.transform(TOY[TRAIN]), fitted.transform(TOY[TRAIN]), check_exact=True)
    first = (tmp_path/'c.safetensors').read_bytes()
    assert save_correction(again, tmp_path/'d.safetensors').read_bytes() == first

@pytest.mark.parametrize('kind', [Sphering(None, shrink='auto'), TVN(None, shrink='auto'), TVN(None, dims=5)], ids=str)
def test_an_inductive_correction_asks_nothing_of_the_test_batch(kind):
    fitted = kind.fit(TOY[TRAIN])
    got = fitted.transform(TOY[~TRAIN])
    assert set(got.Metadata_protocol) == {'inductive'} and set(fitted.transform(TOY[TRAIN]).Metadata_protocol) == {'adapted'}
    for i in (0, 7, 40):                                                                    # a site alone is what it is in company
        alone = fitted.transform(TOY[~TRAIN].iloc[[i]])
        np.testing.assert_allclose(emb_features(alone), emb_features(got)[[i]], rtol=1e-5, atol=1e-6)
    spoilt = TOY.copy(); spoilt.loc[~TRAIN, 'emb_0000'] += 9                               # fitted on nothing of it, either
    again = type(kind)(**asdict(kind)).fit(spoilt[TRAIN])
    for k, v in fitted.state()[1].items(): np.testing.assert_array_equal(v, again.state()[1][k])

def test_the_mark_of_a_kept_correction_goes_into_the_prediction(tmp_path):
    treated = (META_.well_type == 'treatment').to_numpy()
    fitted = load_correction(save_correction(TVN(None, shrink='auto').fit(TOY[TRAIN]), tmp_path/'c.safetensors'))
    done = fitted.transform(TOY[TRAIN & treated])
    index, queries = EmbeddingIndex(done), TOY[~TRAIN & treated]
    pred, _ = predict_wells(fitted.transform(queries), index, 'inductive')
    assert set(pred.protocol) == {'inductive'}
    with pytest.raises(ScreenError, match='corrected by'): predict_wells(queries, index, 'inductive')
    other = TVN(None, shrink='auto').fit(TOY).transform(queries)                            # fitted with the test experiments
    with pytest.raises(ScreenError, match='corrected by'): predict_wells(other, index, 'adapted')
    assert set(other.Metadata_protocol) == {'adapted'}
    adapted = fitted.transform(queries.assign(Metadata_protocol='adapted'))                 # AdaBN before stays what it was
    with pytest.raises(ScreenError, match="ask for protocol='adapted'"): predict_wells(adapted, index, 'inductive')

FACTS, ARRAYS = TVN(None, dims=5).fit(TOY).state()
@pytest.mark.parametrize('facts,arrays', [
    (None, ARRAYS), ({}, ARRAYS), ({**FACTS, 'more': 1}, ARRAYS), ({**FACTS, 'method': 'harmony'}, ARRAYS), ({**FACTS, 'method': ['tvn']}, ARRAYS),
    ({**FACTS, 'method': 'sphere'}, ARRAYS), ({**FACTS, 'options': {}}, ARRAYS), ({**FACTS, 'options': {**FACTS['options'], 'by': 'well'}}, ARRAYS),
    ({**FACTS, 'options': {**FACTS['options'], 'by': 'experiment'}}, ARRAYS), ({**FACTS, 'options': {**FACTS['options'], 'dims': 'five'}}, ARRAYS),
    ({**FACTS, 'dim': 13}, ARRAYS), ({**FACTS, 'dim': True}, ARRAYS), ({**FACTS, 'seen': 'HUVEC-01'}, ARRAYS), ({**FACTS, 'digest': None}, ARRAYS),
    (FACTS, {}), (FACTS, {**ARRAYS, 'target': np.eye(5)}), (FACTS, {**ARRAYS, 'mean': ARRAYS['mean']*np.inf}), (FACTS, {**ARRAYS, 'mean': ARRAYS['mean'][:5]})])
def test_a_damaged_state_is_refused(facts, arrays):
    with pytest.raises(ScreenError, match='^The correction cannot be used .*save it again') as e: Correction.from_state(facts, arrays)
    assert len(str(e.value).splitlines()) == 1

def test_files_that_are_no_corrections(tmp_path):
    with pytest.raises(ScreenError, match='There is no file'): load_correction(tmp_path/'a.safetensors')
    path = save_correction(Sphering(None).fit(TOY), tmp_path/'a.safetensors')
    for cut in (0, 7, 100, path.stat().st_size - 1):
        (tmp_path/'b.safetensors').write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ScreenError, match='b.safetensors'): load_correction(tmp_path/'b.safetensors')
    from safetensors.numpy import save_file
    save_file({'mean': np.zeros(3)}, tmp_path/'c.safetensors')
    with pytest.raises(ScreenError, match='c.safetensors cannot be used'): load_correction(tmp_path/'c.safetensors')
    for unfit in (TVN(), Harmony(), CenterScale()):
        with pytest.raises(ScreenError): save_correction(unfit, tmp_path/'d.safetensors')
    assert not (tmp_path/'d.safetensors').exists()
