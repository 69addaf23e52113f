"Embedding tables: round trips, atomic writing, and sites averaged into wells against a plain loop."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.metadata import ScreenError, write_atomic
from rcic_fastai.profiles import *

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
