"Embedding tables: round trips, atomic writing, sites averaged into wells against a plain loop, profiles for other programs."
import sys
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.core import ScreenError, write_atomic
from rcic_fastai.embed.table import *

TOY = toy_profiles(train=('HUVEC-01', 'RPE-01'), test=('HUVEC-17',), n_sirnas=8, dim=8)

def test_halves_come_back():
    again = make_emb_table(emb_metadata(TOY), emb_features(TOY))
    pd.testing.assert_frame_equal(again, TOY)
    assert emb_features(TOY).dtype == np.float32 and not [c for c in emb_metadata(TOY) if c.startswith(('Metadata_', 'emb_'))]

def test_parquet_keeps_numbers_and_missing_labels(tmp_path):
    df = TOY.assign(Metadata_sirna=TOY.Metadata_sirna.where(TOY.Metadata_dataset == 'train', None))
    back = read_embeddings(write_embeddings(df, tmp_path/'deep'/'e.parquet'))
    np.testing.assert_array_equal(emb_features(back), emb_features(df))
    assert (back.Metadata_sirna.isna() == df.Metadata_sirna.isna()).all()
    assert str(back.Metadata_plate_group.dtype) == 'Int64'

def test_failed_write_leaves_what_was_there(tmp_path):
    f = write_embeddings(TOY, tmp_path/'e.parquet')
    before = f.read_bytes()
    def fails(p): p.write_bytes(b'half'); raise OSError('disk full')
    with pytest.raises(OSError): write_atomic(f, fails)
    assert f.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('how', ['mean', 'median'])
def test_merge_sites_is_the_loop(how):
    got = merge_sites(TOY, how)
    x = emb_features(TOY).astype(float)
    for i, w in enumerate(got.Metadata_well_id):
        mine = x[(TOY.Metadata_well_id == w).to_numpy()]
        mine = getattr(np, how)(mine/np.linalg.norm(mine, axis=1, keepdims=True), axis=0)
        np.testing.assert_allclose(emb_features(got)[i], mine/np.linalg.norm(mine), atol=1e-5)
    assert len(got) == TOY.Metadata_well_id.nunique() and (got.Metadata_n_sites == 2).all()

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_merge_sites_ignores_the_order_of_rows(seed):
    a = merge_sites(TOY).sort_values('Metadata_well_id').reset_index(drop=True)
    b = merge_sites(TOY.sample(frac=1, random_state=seed)).sort_values('Metadata_well_id').reset_index(drop=True)
    assert list(a.Metadata_well_id) == list(b.Metadata_well_id)
    np.testing.assert_allclose(emb_features(a), emb_features(b), atol=1e-6)

@pytest.mark.parametrize('used', ['adapted', 'transductive'])
@pytest.mark.parametrize('turn', [1, -1])
def test_a_well_has_the_highest_protocol_of_its_rows(used, turn):
    rows = TOY[:8]
    wells = merge_sites(pd.concat([rows, rows[:4].assign(Metadata_protocol=used)][::turn], ignore_index=True))
    got = wells.set_index('Metadata_well_id').Metadata_protocol
    first, second = rows.Metadata_well_id.unique()[:2], rows.Metadata_well_id.unique()[2:]
    assert (got[first] == used).all() and got[second].isna().all()
    both = pd.concat([rows.assign(Metadata_protocol=p) for p in ('inductive', used, 'adapted')][::turn], ignore_index=True)
    assert (merge_sites(both).Metadata_protocol == used).all()

@pytest.mark.parametrize('column', ['correction', 'batchnorm'])
@pytest.mark.parametrize('turn', [1, -1])
def test_rows_of_a_well_that_were_made_differently_are_not_averaged(column, turn):
    made = TOY.assign(**{f'Metadata_{column}': 'experiment', 'Metadata_protocol': 'adapted'})
    with pytest.raises(ScreenError, match=rf'differ in Metadata_{column} \(experiment, none\): merge the rows of each kind'):
        merge_sites(pd.concat([TOY, made][::turn], ignore_index=True))
    halves = pd.concat([TOY[TOY.Metadata_experiment != 'RPE-08'], made[made.Metadata_experiment == 'RPE-08']])
    assert len(merge_sites(halves)) == TOY.Metadata_well_id.nunique()       # other wells may be made differently

def test_toy_layout_is_that_of_rxrx1():
    m = emb_metadata(toy_profiles(n_sirnas=48, plates=4, seed=3))
    t = m[m.well_type == 'treatment'].drop_duplicates('well_id')
    assert not t.duplicated(['experiment', 'sirna']).any()
    assert t.groupby('sirna').plate_group.nunique().max() == 1
    for _, e in t.groupby('experiment'):
        groups = e.drop_duplicates('plate').sort_values('plate').plate_group.astype(int).tolist()
        assert [(g - groups[0]) % 4 for g in groups] == [0, 1, 2, 3]
    assert m.groupby('well_id').site.nunique().eq(2).all()

def test_toy_signal_is_needed_to_name_a_sirna():
    def right(signal):
        e = merge_sites(toy_profiles(signal=signal, seed=2)); m = emb_metadata(e)
        keep = (m.well_type == 'treatment').to_numpy(); tr = keep & (m.dataset == 'train').to_numpy(); te = keep & (m.dataset == 'test').to_numpy()
        near = (emb_features(e)[te] @ emb_features(e)[tr].T).argmax(1)
        return (m.sirna[tr].to_numpy()[near] == m.sirna[te].to_numpy()).mean()
    assert right(0.) < .15 and right(2.) > .9

@pytest.mark.parametrize('make, says', [
    (lambda d: make_emb_table(emb_metadata(TOY), np.zeros((3, 2))), 'one row for every'),
    (lambda d: make_emb_table(emb_metadata(TOY)[:3], np.zeros(3)), r'shape \(3,\)'),
    (lambda d: emb_features(emb_metadata(TOY)), 'embeddings table'),
    (lambda d: write_embeddings(emb_metadata(TOY), d/'x.parquet'), 'embeddings table'),
    (lambda d: read_embeddings(d/'none.parquet'), 'none.parquet'),
    (lambda d: merge_sites(TOY, 'max'), "'max'"),
    (lambda d: merge_sites(TOY.assign(Metadata_well_id=None)), 'no well_id')])
def test_bad_input(tmp_path, make, says):
    with pytest.raises(ScreenError, match=says): make(tmp_path)
    assert not list(tmp_path.iterdir())

def test_torn_parquet_is_named(tmp_path):
    f = write_embeddings(TOY, tmp_path/'e.parquet')
    f.write_bytes(f.read_bytes()[:200])
    with pytest.raises(ScreenError, match='e.parquet'): read_embeddings(f)

# ---- profiles for other programs

ODD = make_emb_table(emb_metadata(TOY).assign(
    sirna=lambda m: m.sirna.where(m.dataset == 'train', None), sirna_id=lambda m: m.sirna_id.where(m.dataset == 'train'),
    dose=lambda m: m.site*.5, seen=lambda m: m.site == 1, none=None, mixed=[(i, 'a') if i % 2 else i for i in range(len(TOY))],
    day=pd.Timestamp('2019-06-01'), kind=lambda m: pd.Categorical(m.plate)), emb_features(TOY))

def test_profiles_are_the_embeddings_under_other_names():
    p, m = profile_table(ODD), emb_metadata(ODD)
    np.testing.assert_array_equal(emb_features(p), emb_features(ODD))
    assert list(p.columns[:4]) == ['Metadata_Batch', 'Metadata_Plate', 'Metadata_Well', 'Metadata_Site']
    assert (p.Metadata_Plate + '_' + p.Metadata_Well == m.well_id).all() and (p.Metadata_Batch == m.experiment).all()
    assert (p.Metadata_Site == m.site).all() and p.columns.str.lower().is_unique
    for c in ('site_id', 'well_id', 'cell_type', 'sirna', 'sirna_id', 'plate_group', 'dose'):
        pd.testing.assert_series_equal(p[f'Metadata_{c}'], ODD[f'Metadata_{c}'])
    assert list(ODD.columns) == list(make_emb_table(m, emb_features(ODD)).columns)      # the argument is left as it was

def test_levels():
    wells = profile_table(TOY, 'well')
    pd.testing.assert_frame_equal(wells, profile_table(merge_sites(TOY)))
    pd.testing.assert_frame_equal(wells, profile_table(merge_sites(TOY), 'well'))
    pd.testing.assert_frame_equal(profile_table(TOY, 'site'), profile_table(TOY))
    assert 'Metadata_Site' not in wells and not wells.duplicated(['Metadata_Plate', 'Metadata_Well']).any()

@pytest.mark.parametrize('level', ['site', 'well'])
def test_parquet_is_read_by_anyone(tmp_path, level):
    import pyarrow.parquet as pq
    df = ODD.drop(columns=['Metadata_mixed'])
    f = write_profiles(df, tmp_path/'p.parquet', level)
    table = pq.read_table(f)                                          # no pandas in between
    features = [c for c in table.column_names if not c.startswith('Metadata_')]
    assert features == [f'emb_{i:04d}' for i in range(8)] and {str(table.schema.field(c).type) for c in features} == {'float'}
    assert '__index_level_0__' not in table.column_names
    want = profile_table(df, level)
    assert table['Metadata_sirna'].null_count == want.Metadata_sirna.isna().sum() > 0
    assert str(table.schema.field('Metadata_plate_group').type) == 'int64'
    np.testing.assert_array_equal(np.stack([table[c].to_numpy() for c in features], 1), emb_features(want))
    assert len(read_embeddings(f)) == len(want)

def test_aggregating_by_plate_and_well_is_merge_sites():
    "What pycytominer's `aggregate` and `consensus` do by default: group by Metadata_Plate and Metadata_Well"
    p, wells = profile_table(TOY), merge_sites(TOY)
    x = p.groupby(['Metadata_Plate', 'Metadata_Well'], dropna=False)[[c for c in p if c.startswith('emb_')]].mean()
    x.index = x.index.map('_'.join)
    np.testing.assert_allclose(unit_rows(x.loc[wells.Metadata_well_id]), emb_features(wells), atol=1e-6)

@pytest.mark.extra('pycytominer')
def test_pycytominer_reads_profiles(tmp_path):
    import pycytominer as pm
    f = str(write_profiles(TOY, tmp_path/'sites.parquet', 'site'))
    features = [f'emb_{i:04d}' for i in range(8)]
    got = pm.aggregate(pm.cyto_utils.load_profiles(f), features=features, operation='mean')
    assert len(got) == TOY.Metadata_well_id.nunique()
    normed = pm.normalize(f, features=features, samples="Metadata_well_type == 'negative_control'")
    assert len(normed) == len(TOY)
    controls = normed[normed.Metadata_well_type == 'negative_control'][features]
    np.testing.assert_allclose(controls.mean(), 0, atol=1e-5)
    assert len(pm.consensus(f, replicate_columns=['Metadata_cell_type', 'Metadata_sirna'], features=features)) == 2*11

@pytest.mark.extra('copairs')
def test_copairs_reads_profiles(tmp_path):
    import copairs.map as cm
    good = toy_profiles(train=('HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-04'), test=(), n_sirnas=8, dim=16, signal=6)
    df = pd.read_parquet(write_profiles(good, tmp_path/'w.parquet', 'well'))
    meta, x = df.filter(regex='^Metadata'), df.filter(regex='^(?!Metadata)').values
    ap = cm.average_precision(meta, x, ['Metadata_sirna'], [], [], ['Metadata_sirna'])
    assert ap.groupby('Metadata_sirna').average_precision.mean().mean() > .9

@pytest.mark.parametrize('make, says', [
    (lambda: profile_table(TOY, 'plate'), "level='plate'"),
    (lambda: profile_table(merge_sites(TOY), 'site'), 'one row per well'),
    (lambda: profile_table(TOY.drop(columns='Metadata_plate')), 'no column Metadata_plate'),
    (lambda: profile_table(TOY.drop(columns='Metadata_experiment'), 'well'), 'no column Metadata_experiment'),
    (lambda: profile_table(emb_metadata(TOY)), 'embeddings table'),
    (lambda: profile_table(pd.concat([TOY, TOY[:1]])), 'several rows of site_id .HUVEC-01'),
    (lambda: profile_table(TOY.drop(columns=['Metadata_site_id'])), 'several rows of well_id'),
    (lambda: profile_table(TOY.drop(columns=['Metadata_site_id', 'Metadata_well_id'])), 'no name'),
    (lambda: profile_table(TOY.assign(Metadata_site_id=[None, *TOY.Metadata_site_id[1:]])), 'Row 0 of the table has no site_id'),
    (lambda: profile_table(TOY.assign(Metadata_Batch='x')), 'Metadata_batch twice'),
    (lambda: profile_table(TOY.assign(Metadata_SIRNA='x')), 'Metadata_sirna twice')])
def test_bad_profiles(make, says):
    with pytest.raises(ScreenError, match=says) as e: make()
    assert '\n' not in str(e.value)

def test_bad_profiles_leave_no_file(tmp_path):
    with pytest.raises(ScreenError): write_profiles(TOY, tmp_path/'p.parquet', 'plate')
    assert not list(tmp_path.iterdir())

def test_without_anndata_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'anndata', None)
    with pytest.raises(ScreenError, match='pip install anndata'): to_anndata(TOY)

@pytest.mark.extra('anndata')
@pytest.mark.parametrize('level', ['site', 'well'])
def test_anndata_there_and_back(tmp_path, level):
    import anndata as ad
    want = profile_table(ODD, level)
    a = to_anndata(ODD, level)
    assert a.X.dtype == np.float32 and a.X.flags.c_contiguous and list(a.var_names) == [f'emb_{i:04d}' for i in range(8)]
    assert list(a.obs_names) == list(want[f'Metadata_{level}_id']) and a.obs_names.is_unique
    a.write_h5ad(tmp_path/'p.h5ad')
    b = ad.read_h5ad(tmp_path/'p.h5ad')
    for x in (a, b):
        np.testing.assert_array_equal(x.X, emb_features(want))
        assert list(x.obs.columns) == [c for c in want if c.startswith('Metadata_')]
        assert (x.obs.Metadata_sirna.isna().to_numpy() == want.Metadata_sirna.isna().to_numpy()).all() and x.obs.Metadata_sirna.isna().any()
        assert x.obs.Metadata_sirna.dropna().astype(str).tolist() == want.Metadata_sirna.dropna().tolist()
        assert str(x.obs.Metadata_sirna_id.dtype) == 'Int64'
        assert x.obs.Metadata_sirna_id.tolist() == want.Metadata_sirna_id.tolist()
        assert x.obs.Metadata_none.isna().all() and x.obs.Metadata_seen.dtype == bool
        assert x.obs.Metadata_Plate.astype(str).tolist() == want.Metadata_Plate.tolist()
    assert list(b.obs_names) == list(a.obs_names) and list(b.var_names) == list(a.var_names)
