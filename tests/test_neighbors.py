"SirnaIndex against plain products and loops; restrictions, approximate kinds, folders, bad input."
import json
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.metadata import ScreenError
from rcic_fastai.neighbors import SirnaIndex, merge_wells
from rcic_fastai.profiles import emb_features, emb_metadata, toy_profiles

TOY = toy_profiles(n_sirnas=24, dim=16)
TRAIN, TEST = (TOY[TOY.Metadata_dataset == d] for d in ('train', 'test'))
INDEX, Q, META = SirnaIndex(emb_features(TRAIN), emb_metadata(TRAIN)), emb_features(TEST), emb_metadata(TEST)
LABELS = emb_metadata(TRAIN)

def unit(x): return np.asarray(x, float)/np.linalg.norm(np.asarray(x, float), axis=1, keepdims=True)

def numbers(seed, n=60, d=6, classes=5):
    r = np.random.default_rng(seed)
    return r.normal(size=(n, d))*r.uniform(.01, 100, (n, 1)), pd.DataFrame(dict(sirna=r.integers(classes, size=n).astype(str))), r.normal(size=(11, d))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_search_is_the_product(seed, k):
    x, labels, q = numbers(seed)
    cos, rows = SirnaIndex(x, labels).search(q, k)
    product = unit(q) @ unit(x).T
    np.testing.assert_allclose(cos, -np.sort(-product, 1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(product, rows, 1), cos, atol=1e-5)
    assert all(len(set(r)) == k for r in rows)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_length_of_a_vector_does_not_matter(seed):
    x, labels, q = numbers(seed)
    scale = np.random.default_rng(seed).uniform(1e-3, 1e3, (len(x), 1))
    np.testing.assert_allclose(SirnaIndex(x, labels).class_scores(q), SirnaIndex(x*scale, labels).class_scores(q*7), atol=1e-5)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(['nearest', 'mean', 'prototype']), st.integers(1, 20))
def test_class_scores_are_the_loop(seed, vote, k):
    x, labels, q = numbers(seed)
    index, product = SirnaIndex(x, labels), unit(q) @ unit(x).T
    for c, name in enumerate(index.classes):
        mine = (labels.sirna == name).to_numpy()
        if vote == 'prototype': want = unit(q) @ unit(unit(x)[mine].mean(0)[None])[0]
        else: want = np.sort(product[:, mine], 1)[:, ::-1][:, :1 if vote == 'nearest' else k].mean(1)
        np.testing.assert_allclose(index.class_scores(q, vote, k)[:, c], want, atol=1e-5)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_index_rows_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(len(LABELS))
    other = SirnaIndex(emb_features(TRAIN)[order], LABELS.iloc[order])
    for vote in ('nearest', 'mean', 'prototype'): np.testing.assert_allclose(INDEX.class_scores(Q[:20], vote), other.class_scores(Q[:20], vote), atol=1e-5)
    np.testing.assert_array_equal(INDEX.labels.site_id.to_numpy()[INDEX.search(Q[:20], 3)[1]], other.labels.site_id.to_numpy()[other.search(Q[:20], 3)[1]])

def test_nearest_vote_is_the_first_neighbour():
    cos, rows = INDEX.search(Q, 1)
    s = INDEX.class_scores(Q)
    np.testing.assert_allclose(s.max(1), cos[:, 0], atol=1e-6)
    assert [INDEX.classes[i] for i in s.argmax(1)] == INDEX.labels.sirna.to_numpy()[rows[:, 0]].tolist()

def masks(cell, group):
    "The allowed rows of each query, by a loop"
    out = np.ones((len(Q), len(LABELS)), bool)
    for i in range(len(Q)):
        if cell is not None and not pd.isna(cell[i]): out[i] &= (LABELS.cell_type == cell[i]).to_numpy()
        if group is not None and not pd.isna(group[i]): out[i] &= (LABELS.plate_group == group[i]).to_numpy(bool)
    return out

CELL = META.cell_type.to_numpy(object)
SOME = np.where(np.arange(len(Q)) % 3 == 0, None, CELL)
GROUP = np.array([None if i % 4 == 0 else i % 4 for i in range(len(Q))], dtype=object)

@pytest.mark.parametrize('kind', ['exact', 'ivf', 'hnsw'])
@pytest.mark.parametrize('cell, group', [(CELL, None), (SOME, None), (None, GROUP), (SOME, GROUP), (CELL, META.plate_group)])
def test_restrictions(kind, cell, group):
    index = INDEX if kind == 'exact' else SirnaIndex(emb_features(TRAIN), LABELS, kind=kind)
    allowed = masks(cell, None if group is None else list(group))
    product = np.where(allowed, unit(Q) @ unit(emb_features(TRAIN)).T, -np.inf)
    cos, rows = index.search(Q, 4, cell_type=cell, plate_group=group)
    assert (rows >= 0).all() and np.take_along_axis(allowed, rows, 1).all()
    if kind == 'exact': np.testing.assert_allclose(cos, -np.sort(-product, 1)[:, :4], atol=1e-5)
    s = index.class_scores(Q, cell_type=cell, plate_group=group)
    for c, name in enumerate(index.classes):
        np.testing.assert_allclose(s[:, c], product[:, (LABELS.sirna == name).to_numpy()].max(1), atol=1e-5)

def test_no_neighbour_is_made_up():
    few = LABELS.assign(cell_type=['rare']*3 + ['other']*(len(LABELS) - 3))
    cos, rows = SirnaIndex(emb_features(TRAIN), few).search(Q[:9], 5, cell_type=['rare']*9)
    assert (np.sort(rows[:, :3], 1) == [0, 1, 2]).all() and (rows[:, 3:] == -1).all()
    assert not np.isfinite(cos[:, 3:]).any() and np.isfinite(cos[:, :3]).all()
    cos, rows = INDEX.search(Q[:2], len(INDEX) + 7)
    assert (rows[:, len(INDEX):] == -1).all() and all(len(set(r[:len(INDEX)])) == len(INDEX) for r in rows)

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_approximate_kinds_are_never_short(kind):
    r = np.random.default_rng(0)
    x = r.normal(size=(3000, 16))
    labels = pd.DataFrame(dict(sirna=np.arange(3000) % 30, cell_type=['common']*2990 + ['rare']*10))
    _, rows = SirnaIndex(x, labels, kind=kind).search(r.normal(size=(50, 16)), 10, cell_type=['rare']*50)
    assert (np.sort(rows, 1) == np.arange(2990, 3000)).all()

def test_numeric_targets_and_numeric_groups():
    index = SirnaIndex(emb_features(TRAIN), LABELS, target='plate')
    assert index.classes == ['1', '2', '3', '4']
    assert index.class_scores(Q[:3]).shape == (3, 4)

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(['best', 'mean']))
def test_merge_wells_is_the_loop(seed, how):
    r = np.random.default_rng(seed)
    s, ids = r.normal(size=(12, 3)).astype(np.float32), r.integers(5, size=12).astype(str)
    got, wells = merge_wells(s, ids, how)
    assert list(wells) == list(dict.fromkeys(ids))
    for w, row in zip(wells, got): np.testing.assert_allclose(row, (np.max if how == 'best' else np.mean)(s[ids == w], axis=0), atol=1e-6)

@pytest.mark.parametrize('kind', ['exact', 'ivf', 'hnsw'])
def test_folder(tmp_path, kind):
    index = SirnaIndex(emb_features(TRAIN), LABELS, kind=kind)
    index.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['index.faiss', 'index.json', 'index.parquet']
    back = SirnaIndex.load(tmp_path)
    assert (back.kind, back.target, back.classes, len(back)) == (kind, 'sirna', index.classes, len(index))
    np.testing.assert_array_equal(back.search(Q, 4)[1], index.search(Q, 4)[1])
    np.testing.assert_allclose(back.class_scores(Q), index.class_scores(Q), atol=1e-5)
    assert back.labels.site_id.tolist() == LABELS.site_id.tolist()

@pytest.mark.parametrize('name', ['index.faiss', 'index.parquet', 'index.json'])
def test_folder_with_an_absent_file(tmp_path, name):
    INDEX.save(tmp_path)
    (tmp_path/name).unlink()
    with pytest.raises(ScreenError, match=name): SirnaIndex.load(tmp_path)

@pytest.mark.parametrize('name', ['index.faiss', 'index.parquet'])
def test_folder_with_a_file_of_another_index(tmp_path, name):
    INDEX.save(tmp_path/'a')
    SirnaIndex(emb_features(TRAIN)[::-1], LABELS[::-1]).save(tmp_path/'b')
    (tmp_path/'a'/name).write_bytes((tmp_path/'b'/name).read_bytes())
    with pytest.raises(ScreenError, match=name): SirnaIndex.load(tmp_path/'a')

@pytest.mark.parametrize('text', ['{torn', '[]', '{}', json.dumps(dict(target='sirna', kind='exact'))])
def test_folder_with_a_damaged_description(tmp_path, text):
    INDEX.save(tmp_path)
    (tmp_path/'index.json').write_text(text)
    with pytest.raises(ScreenError, match='index.json is damaged'): SirnaIndex.load(tmp_path)

def spoiled(value):
    x = emb_features(TRAIN).copy()
    x[5] = value
    return x

@pytest.mark.parametrize('make, says', [
    (lambda: SirnaIndex(spoiled(0), LABELS), LABELS.site_id[5]),
    (lambda: SirnaIndex(spoiled(np.nan), LABELS), LABELS.site_id[5]),
    (lambda: SirnaIndex(spoiled(np.inf), LABELS), LABELS.site_id[5]),
    (lambda: SirnaIndex(emb_features(TRAIN), LABELS[:7]), '7 labels'),
    (lambda: SirnaIndex(emb_features(TRAIN), LABELS, target='drug'), "'drug'"),
    (lambda: SirnaIndex(emb_features(TRAIN), LABELS.assign(sirna=None)), 'no sirna'),
    (lambda: SirnaIndex(emb_features(TRAIN), LABELS, kind='fast'), "'fast'"),
    (lambda: SirnaIndex(np.zeros((0, 4)), LABELS[:0]), 'shape'),
    (lambda: INDEX.search(Q[:, :5]), 'same model'),
    (lambda: INDEX.class_scores(Q[:, :5]), 'same model'),
    (lambda: INDEX.search(Q, 0), 'k=0'),
    (lambda: INDEX.class_scores(Q, 'loudest'), "'loudest'"),
    (lambda: INDEX.class_scores(Q, 'mean', 0), 'k=0'),
    (lambda: INDEX.search(Q, cell_type=['RPE']), '1 entries'),
    (lambda: SirnaIndex(emb_features(TRAIN), LABELS.drop(columns='plate_group')).search(Q, plate_group=[0]*len(Q)), 'plate_group'),
    (lambda: INDEX.search(Q*np.nan), 'Row 0'),
    (lambda: merge_wells(np.zeros((2, 2)), ['a', None]), 'Row 1'),
    (lambda: merge_wells(np.zeros((2, 2)), ['a', 'b'], 'loudest'), "'loudest'")])
def test_bad_input(make, says):
    with pytest.raises(ScreenError, match=says): make()
