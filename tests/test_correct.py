"Corrections of embeddings: against plain references, what must not matter, the protocol on every row, bad input."
import json, struct, sys, types
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.linalg import fractional_matrix_power, sqrtm
from scipy.stats import median_abs_deviation
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from rcic_fastai.embed.correct import *
from rcic_fastai.embed.plots import show_correction
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.table import *

D = 12
TOY = toy_profiles(n_sirnas=24, dim=D, batch=2., seed=3)
X, M = emb_features(TOY).astype(float), emb_metadata(TOY)
TREATED, IS_TRAIN = (M.well_type == 'treatment').to_numpy(), (M.dataset == 'train').to_numpy()
IS_CONTROL = dict(negative=(M.well_type == 'negative_control').to_numpy(), positive=(M.well_type == 'positive_control').to_numpy(), all=~TREATED)
KEYS = dict(plate=['experiment', 'plate'], experiment=['experiment'])
METHODS = ['center', 'standardize', 'sphere', 'tvn']
OPTIONS = [('center', {}), ('center', dict(by='plate', robust=True)), ('standardize', dict(by='plate')), ('standardize', dict(robust=True)), ('sphere', {}),
           ('sphere', dict(by=None)), ('sphere', dict(within=True, shrink='auto')), ('tvn', {}), ('tvn', dict(by='plate', shrink=.2)), ('tvn', dict(by=None, dims=5))]

def feats(emb): return emb_features(emb).astype(float)
def batches(by): return M.groupby(KEYS[by]).indices.values()
def table(x, like=TOY): return make_emb_table(emb_metadata(like), x)
def close(a, b, tol=2e-3): np.testing.assert_allclose(a, b, rtol=tol, atol=tol*np.abs(b).max())

@pytest.mark.parametrize('by', ['plate', 'experiment'])
@pytest.mark.parametrize('controls', ['positive', 'all'])
@pytest.mark.parametrize('scale', [True, False])
@pytest.mark.parametrize('robust', [True, False])
def test_center_is_the_loop(by, controls, scale, robust):
    got = feats(correct(TOY, 'center', by=by, controls=controls, scale=scale, robust=robust))
    for rows in batches(by):
        for j in range(D):
            ref = X[rows, j][IS_CONTROL[controls][rows]]
            center, spread = (np.median(ref), median_abs_deviation(ref, scale='normal')) if robust else (np.mean(ref), np.std(ref, ddof=1))
            np.testing.assert_allclose(got[rows, j], (X[rows, j] - center)/(spread if scale else 1), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('by', ['plate', 'experiment'])
def test_centering_is_exact(by):
    controls, wells = feats(correct(TOY, 'center', by=by)), feats(correct(TOY, 'standardize', by=by))
    for rows in batches(by):
        ref = controls[rows][IS_CONTROL['all'][rows]]
        assert np.abs(ref.mean(0)).max() < 1e-5 and np.abs(ref.std(0, ddof=1) - 1).max() < 1e-5
        assert np.abs(wells[rows].mean(0)).max() < 1e-5 and np.abs(wells[rows].std(0, ddof=1) - 1).max() < 1e-5

def test_one_untreated_well_a_plate_is_enough_for_a_center():
    got = feats(correct(TOY, 'center', by='plate', controls='negative', scale=False))
    for rows in batches('plate'): assert np.abs(got[rows][IS_CONTROL['negative'][rows]].mean(0)).max() < 1e-6

@pytest.mark.parametrize('controls', ['negative', 'all'])
@pytest.mark.parametrize('shrink', [0., .3])
def test_sphering_is_the_inverse_square_root_of_the_covariance(controls, shrink):
    got, ref = feats(correct(TOY, 'sphere', by=None, controls=controls, shrink=shrink)), X[IS_CONTROL[controls]]
    s = np.cov(ref.T)
    close(got, (X - ref.mean(0)) @ np.linalg.inv(sqrtm((1 - shrink)*s + shrink*np.trace(s)/D*np.eye(D))).real)
    if not shrink: close(np.cov(got[IS_CONTROL[controls]].T), np.eye(D))

def test_sphering_by_batch_centers_batches_and_whitens_what_is_left():
    for by in KEYS:
        got = feats(correct(TOY, 'sphere', by=by))
        close(np.cov(got[~TREATED].T), np.eye(D))
        for rows in batches(by): assert np.abs(got[rows][~TREATED[rows]].mean(0)).max() < 1e-4

def test_within_looks_at_copies_only():
    w = Sphering(within=True).fit(TOY).weights
    r = X.copy()
    for rows in batches('experiment'): r[rows] -= r[rows][~TREATED[rows]].mean(0)
    r = r[~TREATED]
    for rows in M[~TREATED].groupby(['sirna', 'cell_type']).indices.values(): r[rows] -= r[rows].mean(0)
    close(w, np.linalg.inv(sqrtm(np.cov(r.T))).real)
    far = X + 50*pd.get_dummies(M.sirna).to_numpy(float)[:, ::-1][:, :D]                     # controls further apart, copies no different
    close(Sphering(within=True).fit(table(far)).weights, w, 1e-2)
    assert np.abs(Sphering().fit(table(far)).weights - Sphering().fit(TOY).weights).max() > .1*np.abs(w).max()

def test_auto_is_ledoit_wolf():
    n = (~TREATED).sum()
    close(Sphering(by=None, shrink='auto').fit(TOY).weights, sqrtm(np.linalg.inv(LedoitWolf().fit(X[~TREATED]).covariance_*n/(n - 1))).real)

@pytest.mark.parametrize('dims', [None, 5])
def test_tvn_without_batches_is_a_whitening_pca_of_standardized_controls(dims):
    got, ref = feats(correct(TOY, 'tvn', by=None, dims=dims)), X[~TREATED]
    pca = PCA(dims, whiten=True).fit((ref - ref.mean(0))/ref.std(0, ddof=1))
    want = pca.transform((X - ref.mean(0))/ref.std(0, ddof=1))
    close(got @ got.T, want @ want.T)
    if dims: close(got, want*np.sign((got*want).sum(0)))
    close(np.cov(got[~TREATED].T), np.eye(dims or D)); assert np.abs(got[~TREATED].mean(0)).max() < 1e-4

@pytest.mark.parametrize('by', ['plate', 'experiment'])
@pytest.mark.parametrize('ridge', [.5, .01])
def test_tvn_by_batch_is_the_loop(by, ridge):
    v, root = feats(correct(TOY, 'tvn', by=None)), lambda c, p: fractional_matrix_power(c + ridge*np.eye(D), p).real
    for rows in batches(by): v[rows] -= v[rows][~TREATED[rows]].mean(0)
    target = root(np.cov(v[~TREATED].T), .5)
    for rows in batches(by): v[rows] = v[rows] @ root(np.cov(v[rows][~TREATED[rows]].T), -.5) @ target
    close(feats(correct(TOY, 'tvn', by=by, ridge=ridge)), v)

def test_tvn_gives_batches_one_covariance():
    got = feats(correct(TOY, 'tvn', ridge=1e-6))
    covs = [np.cov(got[rows][~TREATED[rows]].T) for rows in batches('experiment')]
    for c in covs[1:]: close(c, covs[0], 1e-2)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(['center', 'standardize']), st.sampled_from(['plate', 'experiment']), st.booleans())
def test_what_is_linear_in_a_batch_is_undone(seed, method, by, robust):
    rng, x = np.random.default_rng(seed), X.copy()
    for rows in batches(by): x[rows] = x[rows]*rng.uniform(.2, 5, D) + rng.normal(size=D)
    close(feats(correct(table(x), method, by=by, robust=robust)), feats(correct(TOY, method, by=by, robust=robust)))

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([('sphere', None), ('sphere', 'experiment'), ('sphere', 'plate'), ('tvn', None)]))
def test_a_linear_map_of_everything_only_turns_what_is_whitened(seed, how):
    rng = np.random.default_rng(seed)
    turn = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(2)]
    x = X @ turn[0]*rng.uniform(.5, 2, D) @ turn[1] + rng.normal(size=D)
    a, b = (feats(correct(emb, how[0], by=how[1])) for emb in (TOY, table(x)))
    close(b @ b.T, a @ a.T)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(OPTIONS), st.floats(.01, 100))
def test_the_scale_of_the_embedding_does_not_matter(seed, how, factor):
    a, b = (feats(correct(emb, how[0], **how[1])) for emb in (TOY, table(X*factor)))
    close(a, b)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(OPTIONS))
def test_order_names_and_labels_do_not_matter(seed, how):
    order = np.random.default_rng(seed).permutation(len(TOY))
    names = dict(zip(sorted(set(M.experiment)), np.random.default_rng(seed).permutation(sorted('other-' + M.experiment.unique().astype(object)))))
    other = TOY.assign(Metadata_experiment=M.experiment.map(names), Metadata_sirna=np.where(TREATED, f'x{seed}', M.sirna), Metadata_sirna_id=seed % 7)
    want, got = correct(TOY, how[0], **how[1]), correct(other.iloc[order], how[0], **how[1])
    close(feats(got), feats(want)[order])
    assert got.Metadata_site_id.tolist() == M.site_id.iloc[order].tolist() and set(got.Metadata_correction) == set(want.Metadata_correction)

@pytest.mark.parametrize('method', ['sphere', 'tvn'])
def test_order_does_not_matter_with_fewer_controls_than_dimensions(method):
    emb = toy_profiles(n_sirnas=8, dim=96, seed=1)
    order = np.random.default_rng(0).permutation(len(emb))
    how = dict(controls='negative', shrink='auto')
    close(feats(correct(emb.iloc[order], method, **how)), feats(correct(emb, method, **how))[order])

@pytest.mark.parametrize('method, options', [o for o in OPTIONS if o[0] != 'standardize'])
def test_controls_are_all_that_is_learned_from(method, options):
    kept = ~TREATED | (M.experiment == 'RPE-08').to_numpy()
    close(feats(correct(TOY[kept], method, **options)), feats(correct(TOY, method, **options))[kept])

@pytest.mark.parametrize('method', ['center', 'standardize'])
def test_simple_methods_may_be_used_table_by_table(method):
    want = correct(TOY, method)
    got = pd.concat([correct(TOY[IS_TRAIN], method), correct(TOY[~IS_TRAIN], method)], ignore_index=True)
    pd.testing.assert_frame_equal(got, pd.concat([want[IS_TRAIN], want[~IS_TRAIN]], ignore_index=True))

@pytest.mark.parametrize('kind', [Sphering, TVN])
def test_a_fit_without_batches_is_inductive(kind):
    fitted = kind(by=None).fit(TOY[IS_TRAIN])
    test = fitted.transform(TOY[~IS_TRAIN])
    assert set(test.Metadata_protocol) == {'inductive'} and set(fitted.transform(TOY[IS_TRAIN]).Metadata_protocol) == {'adapted'}
    half = TOY[~IS_TRAIN & ((M.plate == 1) | (M.experiment == 'RPE-08')).to_numpy()]           # nothing of the test batch is used
    close(feats(fitted.transform(half)), feats(test[test.Metadata_site_id.isin(half.Metadata_site_id)]), 1e-5)
    one = TOY[~IS_TRAIN & TREATED][7:8]
    close(feats(fitted.transform(one.drop(columns='Metadata_well_type'))), feats(test[test.Metadata_site_id.isin(one.Metadata_site_id)]), 1e-5)
    with pytest.raises(ScreenError, match='no control well in HUVEC-17'): kind().fit(TOY[IS_TRAIN]).transform(one)
    both = fitted.transform(TOY)
    assert both.Metadata_protocol.tolist() == np.where(IS_TRAIN, 'adapted', 'inductive').tolist()
    assert set(kind().fit(TOY[IS_TRAIN]).transform(TOY[~IS_TRAIN]).Metadata_protocol) == {'adapted'}
    assert set(correct(TOY, 'tvn', by=None).Metadata_protocol) == {'adapted'}

@pytest.mark.parametrize('kind', [lambda n: n, lambda n: n.astype(float), lambda n: n.astype('category'), lambda n: n.astype(str), lambda n: n.astype('Int64')])
@pytest.mark.parametrize('then', [lambda n: n, lambda n: n.astype(float), lambda n: n.astype(str), lambda n: n.astype('category')])
def test_what_it_was_fitted_on_is_known_however_experiments_are_written(kind, then, tmp_path):
    number = pd.Series(pd.factorize(M.experiment)[0])
    fitted = Sphering(by=None, shrink='auto').fit(TOY.assign(Metadata_experiment=kind(number))[IS_TRAIN])
    again = load_correction(save_correction(fitted, tmp_path/'c.safetensors'))
    assert again.seen == fitted.seen == set('0123')
    want = np.where(IS_TRAIN, 'adapted', 'inductive').tolist()
    for c in (fitted, again): assert c.transform(TOY.assign(Metadata_experiment=then(number))).Metadata_protocol.tolist() == want

def test_rows_without_a_mark_are_inductive():
    "As from pd.concat of embeddings with and without the column"
    some = TOY.assign(Metadata_protocol=np.where(IS_TRAIN, None, 'adapted'))
    assert TVN(by=None).fit(TOY.assign(Metadata_experiment='other')).transform(some).Metadata_protocol.tolist() == np.where(IS_TRAIN, 'inductive', 'adapted').tolist()
    fresh = correct(TOY.assign(Metadata_correction=None), 'center')
    assert set(fresh.Metadata_correction) == set(correct(TOY, 'center').Metadata_correction)

def written(path, meta, dtype='F64', size=8):
    head = json.dumps({'__metadata__': {'correction': meta}, 'mean': dict(dtype=dtype, shape=[8], data_offsets=[0, 8*size])}).encode()
    path.write_bytes(struct.pack('<Q', len(head)) + head + bytes(8*size))
    return path

@pytest.mark.parametrize('dtype, size', [('BF16', 2), ('F8_E4M3', 1), ('F8_E5M2', 1), ('BOOL', 1), ('C64', 8), ('I8', 1), ('odd', 1)])
def test_corrections_of_odd_numbers(dtype, size, tmp_path):
    with pytest.raises(ScreenError, match=r'c\.safetensors (is not a saved correction|cannot be used) \(') as e:
        load_correction(written(tmp_path/'c.safetensors', json.dumps(CenterScale().fit(TOY).state()[0]), dtype, size))
    assert len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('meta', ['['*100_000, '{"a":'*100_000, '9'*5000, 'NaN', '', '{'])
def test_corrections_of_odd_facts(meta, tmp_path):
    with pytest.raises(ScreenError, match=r'c\.safetensors (is not a saved correction|cannot be used) \(') as e: load_correction(written(tmp_path/'c.safetensors', meta))
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300

@pytest.mark.parametrize('kind', ['i4', 'c16', 'b1', 'U1'])
def test_arrays_that_are_no_real_numbers(kind):
    facts, arrays = Sphering(None).fit(TOY).state()
    arrays = {k: np.zeros(v.shape, kind) for k, v in arrays.items()}
    with pytest.raises(ScreenError, match='do not hold real numbers'): Correction.from_state(facts, arrays)

def test_fitted_on_train_is_what_was_learned_there():
    fitted = TVN().fit(TOY[IS_TRAIN])
    close(feats(fitted.transform(TOY))[IS_TRAIN], feats(TVN().fit_transform(TOY[IS_TRAIN])), 1e-5)
    assert set(fitted.transform(TOY[~IS_TRAIN]).Metadata_correction) == set(fitted.transform(TOY[IS_TRAIN]).Metadata_correction)

@pytest.mark.parametrize('method', ['sphere', 'tvn'])
def test_other_fits_have_other_marks(method):
    marks = [set(correct(emb, method, **o).Metadata_correction) for emb, o in
             [(TOY, {}), (TOY[IS_TRAIN], {}), (table(X*1.01), {}), (TOY, dict(shrink=.1)), (TOY, dict(controls='positive'))]]
    assert len(set.union(*marks)) == 5

@pytest.mark.parametrize('method', METHODS)
def test_mark_survives(method, tmp_path):
    got = correct(TOY, method)
    assert len(got.Metadata_correction.unique()) == 1 and set(got.Metadata_protocol) == {'adapted'}
    kept = merge_sites(read_embeddings(write_embeddings(got[5:], tmp_path/'e.parquet')))
    assert set(kept.Metadata_protocol) == {'adapted'} and set(kept.Metadata_correction) == set(got.Metadata_correction)
    pd.testing.assert_frame_equal(emb_metadata(got)[M.columns], M)

def test_steps_are_recorded_and_adapted_stays():
    first = correct(TOY, 'center', by='plate', scale=False)
    fitted = TVN(by=None).fit(first[IS_TRAIN])
    second = fitted.transform(first[~IS_TRAIN])
    assert set(second.Metadata_protocol) == {'adapted'}
    assert second.Metadata_correction.iloc[0].split(' + ')[0] == first.Metadata_correction.iloc[0] and '#' in second.Metadata_correction.iloc[0]
    with pytest.raises(ScreenError, match='different ways'): correct(pd.concat([first[IS_TRAIN], TOY[~IS_TRAIN]]), 'tvn')
    with pytest.raises(ScreenError, match='different ways'): correct(pd.concat([first[IS_TRAIN], correct(TOY, 'center')[~IS_TRAIN]]), 'sphere')
    as_category = first.assign(**{c: first[c].astype('category') for c in first if c.startswith('Metadata_')})
    pd.testing.assert_frame_equal(correct(as_category, 'standardize').filter(like='emb_'), correct(first, 'standardize').filter(like='emb_'))
    with pytest.raises(ScreenError, match="protocol='odd'"): correct(TOY.assign(Metadata_protocol='odd'), 'center')
    assert set(correct(TOY.assign(Metadata_protocol='transductive'), 'center').Metadata_protocol) == {'transductive'}

def test_wells_and_an_odd_index_work():
    wells = merge_sites(TOY).sample(frac=1, random_state=1)
    for method in METHODS:
        got = correct(wells, method, **({} if method in ('center', 'standardize') else dict(shrink='auto')))
        assert np.isfinite(feats(got)).all() and got.Metadata_well_id.tolist() == wells.Metadata_well_id.tolist() and isinstance(got.index, pd.RangeIndex)

def test_a_dead_number_is_only_centered():
    x = X.copy(); x[:, 3] = .1
    x[~TREATED, 5] = np.nextafter(np.float32(.7), np.float32(np.arange((~TREATED).sum()) % 2))         # but for the last digit
    for how in (dict(), dict(robust=True)):
        got = feats(correct(table(x), 'center', **how))
        assert np.abs(got[:, 3]).max() < 1e-6 and np.abs(got[:, 5]).max() < 5 and np.isfinite(got).all()
    for method in ('sphere', 'tvn'):
        with pytest.raises(ScreenError, match='vary in only 10 of 12 dimensions'): correct(table(x), method)
        assert np.isfinite(feats(correct(table(x), method, shrink='auto'))).all()
    assert np.isfinite(feats(correct(table(x), 'tvn', dims=10))).all()

def test_one_siRNA_in_two_batches_comes_together():
    "Controls of one kind lie nearer to each other than to other controls after a correction, though not before"
    def share(emb):
        w = merge_sites(emb[~TREATED]); x, m = feats(w), emb_metadata(w)
        s = x @ x.T; s[m.experiment.to_numpy()[:, None] == m.experiment.to_numpy()] = -9
        return (m.sirna.to_numpy()[s.argmax(1)] == m.sirna.to_numpy()).mean()
    before = share(TOY)
    for method in METHODS: assert share(correct(TOY, method)) > before + .15, method

@pytest.mark.parametrize('options, says', [
    (dict(method='combat'), "method='combat' is not known: choose from center"),
    (dict(method='standardize', controls='all'), 'no option controls: it has by, scale, robust'),
    (dict(method='center', by='well'), "by='well' is not known"), (dict(method='center', by=None), 'by=None is not known'),
    (dict(method='tvn', controls='none'), "controls='none' is not known"),
    (dict(method='tvn', shrink=2.), 'shrink=2.0'), (dict(method='sphere', shrink='yes'), "shrink='yes'"), (dict(method='tvn', ridge=0), 'ridge=0'),
    (dict(method='tvn', ridge=float('nan')), 'ridge=nan'), (dict(method='tvn', dims=0), 'dims=0'), (dict(method='tvn', dims=13), 'dims=13 is more than the 12'),
    (dict(method='center', by='plate', controls='negative'), 'only one negative control well in HUVEC-01 plate 1'),
    (dict(method='tvn', by='plate', controls='negative', shrink='auto'), 'only one negative control well in HUVEC-01 plate 1')])
def test_bad_options(options, says):
    with pytest.raises(ScreenError, match=says): correct(TOY, **options)

def edited(row, column, value):
    t = TOY.copy(); t[column] = t[column].astype(object) if not column.startswith('emb') else t[column]
    t.loc[row, column] = value
    return t

FEW = TOY[TREATED | (M.plate == 1).to_numpy() & (M.experiment == 'RPE-08').to_numpy() | (M.well == 'B02').to_numpy() & (M.plate == 1).to_numpy()]
@pytest.mark.parametrize('emb, options, says', [
    (TOY[:0], dict(method='standardize'), 'table is empty'),
    (TOY[[c for c in TOY if not c.startswith('emb_')]], dict(method='tvn'), 'no emb_0000 column'),
    (TOY.drop(columns='Metadata_experiment'), dict(method='standardize'), 'no column Metadata_experiment'),
    (TOY.drop(columns=['Metadata_plate', 'Metadata_well_type']), dict(method='tvn', by='plate'), 'no column Metadata_plate, well_type'),
    (TOY.drop(columns='Metadata_sirna'), dict(method='sphere', within=True), 'no column Metadata_sirna'),
    (edited(5, 'Metadata_well_id', None), dict(method='tvn'), 'Row 5 .HUVEC-01_1_.* has no well_id'),
    (edited(4, 'Metadata_experiment', None), dict(method='center'), 'Row 4 .* has no experiment'),
    (edited(9, 'emb_0002', np.nan), dict(method='center'), 'Row 9 .HUVEC-01_1_.* not finite'),
    (edited(9, 'emb_0002', np.inf), dict(method='sphere'), 'Row 9 .* not finite'),
    (TOY[TREATED | IS_TRAIN], dict(method='tvn'), "no control well in HUVEC-17, RPE-08: .*'standardize'"),
    (TOY[~((M.experiment == 'RPE-02') & (M.plate == 3) & ~TREATED).to_numpy()], dict(method='sphere', by='plate'), 'no control well in RPE-02 plate 3'),
    (TOY[TREATED], dict(method='sphere', by=None), 'no control well in the table'),
    (FEW, dict(method='tvn', by=None, controls='negative'), 'The 12 control rows vary in only 11 of 12 dimensions'),
    (FEW, dict(method='tvn', by=None, controls='negative', dims=12), 'dims=11'),
    (TOY[(M.well == 'B02').to_numpy() & (M.site_id == 'HUVEC-01_1_B02_1').to_numpy()], dict(method='sphere', by=None, shrink='auto'), 'spread of 1 control row'),
    (TOY[~IS_TRAIN | (M.well == 'B02').to_numpy() & (M.plate == 1).to_numpy()], dict(method='standardize'), 'only one well in HUVEC-01, HUVEC-02, RPE-01, RPE-02')])
def test_bad_tables(emb, options, says):
    with pytest.raises(ScreenError, match=says) as e: correct(emb, **options)
    assert str(e.value).count('. ') == 0 and str(e.value).endswith('.')

def test_bad_order_of_calls():
    with pytest.raises(ScreenError, match='has not been fitted'): TVN().transform(TOY)
    with pytest.raises(ScreenError, match='have 3 numbers and TVN.* was fitted on 12'): TVN().fit(TOY).transform(make_emb_table(M, X[:, :3]))
    for f in (Harmony().fit, Harmony().transform):
        with pytest.raises(ScreenError, match='table as a whole'): f(TOY)

def test_pictures(tmp_path):
    fig = show_correction(TOY, correct(TOY, 'tvn', dims=1), 'cell_type')
    assert len(fig.axes) == 2 and [len(a.collections) for a in fig.axes] == [2, 2]
    assert show_correction(merge_sites(TOY), merge_sites(correct(TOY, 'center'))).axes[1].get_title() == 'after'

def test_without_harmonypy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'harmonypy', None)
    with pytest.raises(ScreenError, match='pip install "harmonypy>=2.1"'): correct(TOY, 'harmony')

def test_old_harmonypy_raises(monkeypatch):
    old = types.SimpleNamespace(run_harmony=lambda x, *args, **kw: types.SimpleNamespace(Z_corr=x))          # rows and columns the other way round
    monkeypatch.setitem(sys.modules, 'harmonypy', old)
    with pytest.raises(ScreenError, match='too old'): correct(TOY, 'harmony')
    with pytest.raises(ScreenError, match='one batch only .HUVEC-01.'): correct(TOY[(M.experiment == 'HUVEC-01').to_numpy()], 'harmony')

@pytest.mark.extra('harmonypy')
def test_harmony():
    emb = toy_profiles(n_sirnas=24, dim=32, batch=1., seed=3); m = emb_metadata(emb)
    got, centered = correct(emb, 'harmony', clusters=1), correct(emb, 'center', scale=False)
    spread = lambda e: np.var([feats(e)[i].mean(0) for i in m.groupby('experiment').indices.values()], axis=0).sum()/feats(e).var(0).sum()
    assert spread(got) < .2*spread(emb) and spread(correct(centered, 'harmony')) < .5*spread(centered)
    other = emb.assign(Metadata_experiment='z' + m.experiment.str[::-1]).sample(frac=1, random_state=0)
    again = correct(other, 'harmony', clusters=1)
    close(feats(again), feats(got)[other.index], 1e-4)
    assert set(again.Metadata_correction) == set(got.Metadata_correction) and set(got.Metadata_protocol) == {'adapted'}
    assert np.isfinite(feats(correct(emb[::45], 'harmony'))).all()
