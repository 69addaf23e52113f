"EmbeddingIndex against plain products and loops; restrictions, approximate kinds, folders, bad input."
import gc, json, os, random, shutil
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.core import ScreenError
from rcic_fastai.core import check_file, file_facts, is_facts, json_hash, parse_json, plain_file, read_json
from rcic_fastai.embed import index as index_module
from rcic_fastai.embed.index import INDEX_FILES, EmbeddingIndex, checked_rows, class_centroids, merge_wells, stack_views
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, toy_profiles

TOY = toy_profiles(n_sirnas=24, dim=16)
TRAIN, TEST = (TOY[TOY.Metadata_dataset == d] for d in ('train', 'test'))
INDEX, Q, META = EmbeddingIndex(TRAIN), emb_features(TEST), emb_metadata(TEST)
LABELS = emb_metadata(TRAIN)

def unit(x): return np.asarray(x, float)/np.linalg.norm(np.asarray(x, float), axis=1, keepdims=True)

def numbers(seed, n=60, d=6, classes=5):
    r = np.random.default_rng(seed)
    return r.normal(size=(n, d))*r.uniform(.01, 100, (n, 1)), pd.DataFrame(dict(sirna=r.integers(classes, size=n).astype(str))), r.normal(size=(11, d))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60))
def test_search_is_the_product(seed, k):
    x, labels, q = numbers(seed)
    cos, rows = EmbeddingIndex(make_emb_table(labels, x)).search(q, k)
    product = unit(q) @ unit(x).T
    np.testing.assert_allclose(cos, -np.sort(-product, 1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(product, rows, 1), cos, atol=1e-5)
    assert all(len(set(r)) == k for r in rows)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_length_of_a_vector_does_not_matter(seed):
    x, labels, q = numbers(seed)
    scale = np.random.default_rng(seed).uniform(1e-3, 1e3, (len(x), 1))
    np.testing.assert_allclose(EmbeddingIndex(make_emb_table(labels, x)).class_scores(q), EmbeddingIndex(make_emb_table(labels, x*scale)).class_scores(q*7), atol=1e-5)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(['nearest', 'mean', 'prototype']), st.integers(1, 20))
def test_class_scores_are_the_loop(seed, vote, k):
    x, labels, q = numbers(seed)
    index, product = EmbeddingIndex(make_emb_table(labels, x)), unit(q) @ unit(x).T
    for c, name in enumerate(index.classes):
        mine = (labels.sirna == name).to_numpy()
        if vote == 'prototype': want = unit(q) @ unit(unit(x)[mine].mean(0)[None])[0]
        else: want = np.sort(product[:, mine], 1)[:, ::-1][:, :1 if vote == 'nearest' else k].mean(1)
        np.testing.assert_allclose(index.class_scores(q, vote, k)[:, c], want, atol=1e-5)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_index_rows_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(len(LABELS))
    other = EmbeddingIndex(TRAIN.iloc[order])
    for vote in ('nearest', 'mean', 'prototype'): np.testing.assert_allclose(INDEX.class_scores(Q[:20], vote), other.class_scores(Q[:20], vote), atol=1e-5)
    np.testing.assert_array_equal(INDEX.labels.site_id.to_numpy()[INDEX.search(Q[:20], 3)[1]], other.labels.site_id.to_numpy()[other.search(Q[:20], 3)[1]])

def test_nearest_vote_is_the_first_neighbor():
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
    index = INDEX if kind == 'exact' else EmbeddingIndex(TRAIN, kind=kind)
    allowed = masks(cell, None if group is None else list(group))
    product = np.where(allowed, unit(Q) @ unit(emb_features(TRAIN)).T, -np.inf)
    cos, rows = index.search(Q, 4, cell_type=cell, plate_group=group)
    assert rows.shape == (len(Q), 4) and (rows >= 0).all() and np.take_along_axis(allowed, rows, 1).all()
    if kind == 'exact': np.testing.assert_allclose(cos, -np.sort(-product, 1)[:, :4], atol=1e-5)
    s = index.class_scores(Q, cell_type=cell, plate_group=group)
    for c, name in enumerate(index.classes):
        np.testing.assert_allclose(s[:, c], product[:, (LABELS.sirna == name).to_numpy()].max(1), atol=1e-5)

# the approximate kinds: other answers, and those of their own search

HARD = toy_profiles(train=[f'HUVEC-{i:02}' for i in range(1, 9)], test=['HUVEC-31'], n_sirnas=188, signal=.6, noise=1.5, dim=128, seed=4)
ASKED = emb_features(HARD[HARD.Metadata_dataset == 'test'])[::3]
KEPT = {}

@pytest.fixture
def narrow(monkeypatch):
    "A graph of three thousand rows is searched well; one of millions as badly as this"
    monkeypatch.setattr(index_module, 'EF_SEARCH', 64)

def hard(kind):
    if kind not in KEPT: KEPT[kind] = EmbeddingIndex(HARD[HARD.Metadata_dataset == 'train'], kind=kind)
    return KEPT[kind]

def voted(index, cos, rows, k, classes):
    "Scores of one query from the rows that a search found, by a loop over classes: rows that it did not find are as far as the farthest"
    out = np.full(len(index.classes), -np.inf)
    for c in np.flatnonzero(classes):
        mine, n = cos[index.codes[rows] == c][:k], min(k, (index.codes == c).sum())
        out[c] = (mine.sum() + (n - len(mine))*cos[-1])/n
    return out

def wanted(index, q, vote, k, classes, top, depth):
    "What the searches of an approximate index say, query by query"
    allowed, k, res = np.flatnonzero(classes[index.codes]), 1 if vote == 'nearest' else k, []
    for v in index._queries(q):
        for deep in (depth//16, depth//4, depth) if top else (depth,):
            cos, rows = (o[0] for o in index._search_rows(v[None], min(deep, len(allowed)), allowed))
            s = voted(index, cos, rows, k, classes)
            if not top or deep >= len(allowed) or (s[classes] > s[classes].min() + 1e-6).sum() >= min(top, classes.sum()): break
        else:
            s = np.full(len(classes), -np.inf)
            for c in np.flatnonzero(classes): s[c] = (index.features[index.codes == c] @ v).max()
        res.append(s)
    return np.array(res)

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_an_approximate_search_changes_answers(kind, narrow):
    index, exact = hard(kind), hard('exact')
    s, complete = index.class_scores(ASKED, top=6), exact.class_scores(ASKED)
    differ = s.argmax(1) != complete.argmax(1)
    assert 0 < differ.mean() < .5
    found = (index.search(ASKED, 1)[1] == exact.search(ASKED, 1)[1])[:, 0]
    assert differ[~found].any() and not differ[found].any()           # wherever the nearest row was found, the answer is its class
    np.testing.assert_array_equal(s.argmax(1), index.codes[index.search(ASKED, 1)[1][:, 0]])
    group = HARD[HARD.Metadata_dataset == 'test'].Metadata_plate_group.to_numpy()[::3]
    within, full = (i.class_scores(ASKED, plate_group=group, depth=20) for i in (index, exact))
    assert ((within.argmax(1) != full.argmax(1)).any() or kind == 'hnsw') and (np.isfinite(within) == np.isfinite(full)).all()

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
@pytest.mark.parametrize('vote, k, top, depth', [('nearest', 5, 6, 1024), ('nearest', 5, 6, 64), ('nearest', 5, None, 100), ('mean', 3, None, 200), ('mean', 40, 6, 300)])
@pytest.mark.parametrize('part', [1, 3])
def test_approximate_scores_are_those_of_their_own_search(kind, vote, k, top, depth, part, narrow):
    index, q = hard(kind), ASKED[:20]
    classes = np.arange(len(index.classes)) % part == 0
    want = wanted(index, q, vote, k, classes, top if vote == 'nearest' else None, depth)
    np.testing.assert_allclose(index.class_scores(q, vote, k, classes, top=top, depth=depth), want, atol=1e-6)

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_few_classes_are_answered_exactly(kind):
    "Four plates with a thousand rows each: the nearest rows show one of them, and still all four have their own score"
    index = EmbeddingIndex(HARD[HARD.Metadata_dataset == 'train'], 'plate', kind)
    np.testing.assert_allclose(index.class_scores(ASKED, top=6), EmbeddingIndex(HARD[HARD.Metadata_dataset == 'train'], 'plate').class_scores(ASKED), atol=1e-5)

@pytest.mark.parametrize('kind', ['exact', 'ivf', 'hnsw'])
def test_prototypes_are_searched_exactly(kind):
    np.testing.assert_allclose(hard(kind).class_scores(ASKED, 'prototype'), hard('exact').class_scores(ASKED, 'prototype'), atol=1e-6)

@pytest.mark.parametrize('kind', ['exact', 'ivf', 'hnsw'])
def test_built_again_it_is_the_same(kind):
    again = EmbeddingIndex(HARD[HARD.Metadata_dataset == 'train'], kind=kind)
    for got, want in zip(again.search(ASKED, 9), hard(kind).search(ASKED, 9)): np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(again.class_scores(ASKED, top=6), hard(kind).class_scores(ASKED, top=6))

@pytest.mark.parametrize('kind', ['exact', 'ivf', 'hnsw'])
def test_pieces_do_not_matter(kind, monkeypatch):
    "Rows that are read and searched a hundred at a time"
    monkeypatch.setattr(index_module, 'PIECE', 100)
    rows = HARD[HARD.Metadata_dataset == 'train'][:1500]
    small = EmbeddingIndex(rows, kind=kind)
    np.testing.assert_array_equal(small.features, checked_rows(emb_features(rows)))
    if kind == 'hnsw': return                                          # a graph that grows in other steps is another graph
    monkeypatch.undo()
    whole = EmbeddingIndex(rows, kind=kind)
    for vote in ('nearest', 'mean', 'prototype'): np.testing.assert_allclose(small.class_scores(ASKED, vote, depth=200), whole.class_scores(ASKED, vote, depth=200), atol=1e-6)
    np.testing.assert_allclose(small.search(ASKED, 7)[0], whole.search(ASKED, 7)[0], atol=1e-6)
    monkeypatch.setattr(index_module, 'PIECE', 100)
    cell = ['HUVEC']*len(ASKED)
    np.testing.assert_allclose(small.search(ASKED, 300, cell_type=cell)[0], whole.search(ASKED, 300)[0], atol=1e-6)
    np.testing.assert_allclose(small._nearest(small._queries(ASKED), 300, np.arange(1500))[0], -np.sort(-(small._queries(ASKED) @ small.features.T), 1)[:, :300], atol=1e-6)

def test_large_products_are_made_on_a_gpu(monkeypatch):
    "A stand-in for the part of FAISS that needs one: what it is asked, and that its answers are used"
    import faiss
    asked, resources = [], object()
    def knn_gpu(res, q, x, k, metric):
        asked.append((res, len(q), len(x), k))
        return faiss.knn(q, x, k, metric=metric)
    for name, stand_in in dict(StandardGpuResources=lambda: resources, get_num_gpus=lambda: 1, knn_gpu=knn_gpu).items(): monkeypatch.setattr(faiss, name, stand_in, raising=False)
    rows = HARD[HARD.Metadata_dataset == 'train'][:1500]
    index = EmbeddingIndex(rows)
    index_module._gpu.cache_clear()
    try:
        plain = index.search(ASKED, 7)                                     # too small to be copied
        assert not asked
        monkeypatch.setattr(index_module, 'LEAST_ON_GPU', 1000)
        for got, want in zip(index.search(ASKED, 7), plain): np.testing.assert_allclose(got, want, atol=1e-6)
        assert asked == [(resources, len(ASKED), 1500, 7)]
        from rcic_fastai.train.distributed import on_device
        with on_device('cpu'): index.search(ASKED, 7)                       # the CPU was asked for
        assert len(asked) == 1
        monkeypatch.setattr(index_module, 'PIECE', 600)
        asked.clear()
        np.testing.assert_allclose(index.search(ASKED, 7)[0], plain[0], atol=1e-6)
        assert [n for _, _, n, _ in asked] == [600, 600, 300]
        monkeypatch.setattr(index_module, 'LEAST_ON_GPU', len(ASKED)*600 + 1)   # large as a whole, too small piece by piece
        asked.clear()
        monkeypatch.setattr(index, '_nearest', None)                            # then FAISS searches its index at once
        np.testing.assert_allclose(index.search(ASKED, 7)[0], plain[0], atol=1e-6)
        assert not asked
        monkeypatch.undo()
        for name, stand_in in dict(StandardGpuResources=lambda: resources, get_num_gpus=lambda: 1, knn_gpu=knn_gpu).items(): monkeypatch.setattr(faiss, name, stand_in, raising=False)
        monkeypatch.setattr(index_module, 'LEAST_ON_GPU', 1000)
        monkeypatch.setattr(index_module, 'MOST_ON_GPU', 6)
        asked.clear()
        np.testing.assert_allclose(index.search(ASKED, 7)[0], plain[0], atol=1e-6)
        assert not asked                                                   # more neighbors than it finds
    finally: index_module._gpu.cache_clear()

def test_vectors_are_kept_once():
    "The features are FAISS's own memory, outlive the index, and cannot be changed"
    for kind in ('exact', 'hnsw'):
        index = EmbeddingIndex(TRAIN, kind=kind)
        x, copy = index.features, index.features.copy()
        assert np.shares_memory(x, index.features) and not x.flags.owndata and not x.flags.writeable
        del index
        gc.collect()
        np.testing.assert_array_equal(x, copy)

def test_the_model_is_known_from_the_table():
    emb = TRAIN.copy()
    emb.attrs['model'] = 'c'*64
    assert EmbeddingIndex(emb).model == 'c'*64 and EmbeddingIndex(emb, model='d'*64).model == 'd'*64 and INDEX.model is None
    assert EmbeddingIndex(emb).table().attrs['model'] == 'c'*64

def test_no_neighbor_is_made_up():
    few = LABELS.assign(cell_type=['rare']*3 + ['other']*(len(LABELS) - 3))
    cos, rows = EmbeddingIndex(make_emb_table(few, emb_features(TRAIN))).search(Q[:9], 5, cell_type=['rare']*9)
    assert (np.sort(rows[:, :3], 1) == [0, 1, 2]).all() and (rows[:, 3:] == -1).all()
    assert not np.isfinite(cos[:, 3:]).any() and np.isfinite(cos[:, :3]).all()
    cos, rows = INDEX.search(Q[:2], len(INDEX) + 7)
    assert (rows[:, len(INDEX):] == -1).all() and all(len(set(r[:len(INDEX)])) == len(INDEX) for r in rows)

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_approximate_kinds_are_never_short(kind):
    r = np.random.default_rng(0)
    x = r.normal(size=(3000, 16))
    labels = pd.DataFrame(dict(sirna=np.arange(3000) % 30, cell_type=['common']*2990 + ['rare']*10))
    _, rows = EmbeddingIndex(make_emb_table(labels, x), kind=kind).search(r.normal(size=(50, 16)), 10, cell_type=['rare']*50)
    assert (np.sort(rows, 1) == np.arange(2990, 3000)).all()

def test_numeric_targets_and_numeric_groups():
    index = EmbeddingIndex(TRAIN, target='plate')
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
    index = EmbeddingIndex(TRAIN, kind=kind)
    index.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['index.json', 'index.rows.json', 'index.safetensors']
    back = EmbeddingIndex.load(tmp_path)
    assert (back.kind, back.target, back.classes, len(back)) == (kind, 'sirna', index.classes, len(index))
    np.testing.assert_array_equal(back.features, index.features)
    np.testing.assert_array_equal(back.search(Q, 4), index.search(Q, 4))
    np.testing.assert_array_equal(back.class_scores(Q), index.class_scores(Q))
    assert back.labels.site_id.tolist() == LABELS.site_id.tolist()
    back.save(tmp_path/'again')
    assert all((tmp_path/n).read_bytes() == (tmp_path/'again'/n).read_bytes() for n in ('index.json', *INDEX_FILES))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40))
def test_vectors_are_one_safetensors_tensor(tmp_path_factory, seed, n, d):
    "Anybody's safetensors can read them"
    from safetensors.numpy import load_file
    folder = tmp_path_factory.mktemp('flat')
    index = EmbeddingIndex(make_emb_table(pd.DataFrame(dict(sirna=['a']*n)), np.random.default_rng(seed).normal(size=(n, d))))
    index.save(folder)
    theirs = load_file(folder/'index.safetensors')
    assert list(theirs) == ['features'] and theirs['features'].dtype == np.float32
    np.testing.assert_array_equal(theirs['features'], index.features)
    np.testing.assert_array_equal(EmbeddingIndex.load(folder).features, index.features)

def test_unit_rows_stay_what_they_are():
    x = INDEX.features
    np.testing.assert_array_equal(EmbeddingIndex(make_emb_table(LABELS, x)).features, x)
    some = np.where(np.arange(len(x))[:, None] % 2, x, x*3)
    np.testing.assert_array_equal(EmbeddingIndex(make_emb_table(LABELS, some)).features[1::2], x[1::2])
    np.testing.assert_allclose(np.linalg.norm(EmbeddingIndex(make_emb_table(LABELS, x*1.0001)).features, axis=1), 1, atol=1e-6)

def test_labels_of_every_kind(tmp_path):
    n = 6
    t = pd.DataFrame(dict(sirna=list('abcabc'), none=[None]*n, mixed=[1, 'x', None, 2.5, True, 'µ'], whole=np.arange(n), small=np.arange(n, dtype='int8'), maybe=pd.array([1, None, 3, 2**63-1, -2**63, 6], 'Int64'), big=np.array([0, 2**64-1]*3, 'uint64'),
                          third=np.array([1/3, np.nan, -np.inf, 0, 1, 2], 'float32'), maybe_real=pd.array([.1, None]*3, 'Float64'),
                          real=[1.5, np.nan, np.inf, 0, 1, 2], truth=[True, False]*3, maybe_true=pd.array([True, None]*3, 'boolean'), kind=pd.Categorical(list('uvuvuv')), day=pd.date_range('2020', periods=n),
                          text=pd.array(['a', None]*3, 'string'), long=['x'*1000]*n, empty=['']*n))
    t[7] = range(n)
    EmbeddingIndex(make_emb_table(t, np.eye(n))).save(tmp_path)
    back = EmbeddingIndex.load(tmp_path).labels
    assert list(back) == [str(c) for c in t]
    for c in ('whole', 'small', 'maybe', 'big', 'real', 'third', 'maybe_real', 'truth', 'maybe_true'): pd.testing.assert_series_equal(back[c], t[c])
    assert back.mixed.tolist() == ['1', 'x', None, '2.5', 'True', 'µ'] and back.none.tolist() == [None]*n and back.text.tolist() == ['a', None]*3
    assert back.kind.tolist() == list('uvuvuv') and back.day[0].startswith('2020-01-01') and back['7'].tolist() == list(range(n)) and back['empty'].tolist() == ['']*n

@pytest.mark.parametrize('index, asked, says', [(None, 'a'*64, 'not named'), ('b'*64, 'a'*64, r'\(bbbbbbbb\) than the one it is used with \(aaaaaaaa\)')])
def test_index_of_another_model(tmp_path, index, asked, says):
    made = EmbeddingIndex(TRAIN, model=index)
    made.save(tmp_path)
    assert EmbeddingIndex.load(tmp_path).model == index and EmbeddingIndex.load(tmp_path, index).model == index
    with pytest.raises(ScreenError, match=says): EmbeddingIndex.load(tmp_path, asked)
    if index:
        with pytest.raises(ScreenError, match=says): made.check_model(asked)
        with pytest.raises(ScreenError, match=says): made.save(tmp_path/'x', asked)
        assert not (tmp_path/'x').exists()
    made.check_model(None); INDEX.check_model(asked)

def test_changed_description(tmp_path):
    INDEX.save(tmp_path)
    (tmp_path/'index.json').write_text((tmp_path/'index.json').read_text().replace('"exact"', '"hnsw"'))
    with pytest.raises(ScreenError, match='was changed after'): EmbeddingIndex.load(tmp_path)

def test_damaged_indexes(tmp_path):
    "One byte anywhere: the same index or a sentence"
    INDEX.save(tmp_path/'whole')
    same = 0
    for seed in range(300):
        r = random.Random(seed)
        shutil.rmtree(tmp_path/'m', ignore_errors=True); shutil.copytree(tmp_path/'whole', tmp_path/'m')
        f = tmp_path/'m'/r.choice(['index.json', *INDEX_FILES])
        b = bytearray(f.read_bytes())
        b[r.randrange(len(b))] = r.randrange(256)
        f.write_bytes(b)
        try: back = EmbeddingIndex.load(tmp_path/'m')
        except ScreenError: continue
        np.testing.assert_array_equal(back.features, INDEX.features)
        assert back.labels.to_csv() == EmbeddingIndex.load(tmp_path/'whole').labels.to_csv() and (back.kind, back.target) == ('exact', 'sirna')
        same += 1
    assert same < 30

@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-10**18, 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=['Cs'])),
                    lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=['Cs'])), c, max_size=4), max_leaves=20))
def test_strict_json_reads_what_is_written(o):
    d = dict(o=o)
    assert parse_json(json.dumps(d).encode(), 'x') == d == parse_json(json.dumps(d, ensure_ascii=False).encode(), 'x')
    assert json_hash(d) == json_hash(json.loads(json.dumps(d))) == json_hash({**d, 'sha256': 'x'}) != json_hash({'o': [o]})

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]":,019.eE-+naN \\u\x00', max_size=40).map(str.encode))
def test_strict_json_reads_or_complains(b):
    try: assert isinstance(parse_json(b, 'x'), dict)
    except ScreenError as e: assert str(e).startswith('x is damaged') and '\n' not in str(e)

@pytest.mark.parametrize('text', ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', '['*10**5, '{"a":'*10**5, '{"a": ' + '9'*10**5 + '}', '[]', '1', '', '{"a": "\\ud800"}', '\ufeff{}'])
def test_strict_json_refuses(text):
    with pytest.raises(ScreenError, match='x is damaged'): parse_json(text.encode(), 'x')

def test_plain_files(tmp_path):
    f = tmp_path/'f'; f.write_bytes(b'12345')
    (tmp_path/'link').symlink_to(f); os.mkfifo(tmp_path/'fifo')
    assert plain_file(f) == plain_file(f, 5) == 5
    for p, most in ((f, 4), (tmp_path/'link', None), (tmp_path/'fifo', None), (tmp_path, None), (tmp_path/'no', None), (str(f) + '\0', None), ('/dev/zero', None)):
        with pytest.raises(ScreenError): plain_file(p, most)
    facts = file_facts(f)
    assert is_facts(facts) and not any(map(is_facts, [None, {}, [], dict(facts, size=-1), dict(facts, size=True), dict(facts, more=1), dict(facts, sha256='x'), dict(facts, sha256=None)]))
    check_file(f, facts)
    for other in (b'12346', b'1234', b'123456'):
        f.write_bytes(other)
        with pytest.raises(ScreenError, match='not the file'): check_file(f, facts)
    f.write_text('{"a": 1}')
    assert read_json(f) == dict(a=1)
    with pytest.raises(ScreenError, match='more than the 7'): read_json(f, 7)

@pytest.mark.parametrize('name', ['index.json', *INDEX_FILES])
def test_folder_with_an_absent_file(tmp_path, name):
    INDEX.save(tmp_path)
    (tmp_path/name).unlink()
    with pytest.raises(ScreenError, match=name): EmbeddingIndex.load(tmp_path)

@pytest.mark.parametrize('name', INDEX_FILES)
def test_folder_with_a_file_of_another_index(tmp_path, name):
    INDEX.save(tmp_path/'a')
    EmbeddingIndex(TRAIN[::-1]).save(tmp_path/'b')
    (tmp_path/'a'/name).write_bytes((tmp_path/'b'/name).read_bytes())
    with pytest.raises(ScreenError, match=name): EmbeddingIndex.load(tmp_path/'a')

@pytest.mark.parametrize('text', ['{torn', '[]', '{}', json.dumps(dict(target='sirna', kind='exact'))])
def test_folder_with_a_damaged_description(tmp_path, text):
    INDEX.save(tmp_path)
    (tmp_path/'index.json').write_text(text)
    with pytest.raises(ScreenError, match='index.json is damaged'): EmbeddingIndex.load(tmp_path)

def spoiled(value):
    x = emb_features(TRAIN).copy()
    x[5] = value
    return x

@pytest.mark.parametrize('make, says', [
    (lambda: EmbeddingIndex(make_emb_table(LABELS, spoiled(0))), LABELS.site_id[5]),
    (lambda: EmbeddingIndex(make_emb_table(LABELS, spoiled(np.nan))), LABELS.site_id[5]),
    (lambda: EmbeddingIndex(make_emb_table(LABELS, spoiled(np.inf))), LABELS.site_id[5]),
    (lambda: EmbeddingIndex(emb_features(TRAIN)), 'make one with make_emb_table'),
    (lambda: EmbeddingIndex(LABELS), 'not a site table'),
    (lambda: EmbeddingIndex(TRAIN, target='drug'), "'drug'"),
    (lambda: EmbeddingIndex(TRAIN.assign(Metadata_sirna=None)), 'no sirna'),
    (lambda: EmbeddingIndex(TRAIN, kind='fast'), "'fast'"),
    (lambda: EmbeddingIndex(TRAIN[:0]), 'shape'),
    (lambda: INDEX.search(Q[:, :5]), 'same model'),
    (lambda: INDEX.class_scores(Q[:, :5]), 'same model'),
    (lambda: INDEX.search(Q, 0), 'k=0'),
    (lambda: INDEX.class_scores(Q, 'loudest'), "'loudest'"),
    (lambda: INDEX.class_scores(Q, 'mean', 0), 'k=0'),
    (lambda: INDEX.class_scores(Q, depth=0), 'depth=0'),
    (lambda: INDEX.search(Q, cell_type=['RPE']), '1 entries'),
    (lambda: EmbeddingIndex(TRAIN.drop(columns='Metadata_plate_group')).search(Q, plate_group=[0]*len(Q)), 'plate_group'),
    (lambda: INDEX.search(Q*np.nan), 'Row 0'),
    (lambda: EmbeddingIndex(make_emb_table(LABELS.assign(note=[f'{i}'*10**5 for i in range(len(LABELS))]), emb_features(TRAIN))).save(os.devnull + '/x'), 'letters a cell'),
    (lambda: merge_wells(np.zeros((2, 2)), ['a', None]), 'Row 1'),
    (lambda: merge_wells(np.zeros((2, 2)), ['a', 'b'], 'loudest'), "'loudest'")])
def test_bad_input(make, says):
    with pytest.raises(ScreenError, match=says): make()


# ---- centroids and views

def spread(x, found):
    "Return the sum of squared distances to the mean of each cluster, float64"
    return sum(((x[found == i] - x[found == i].mean(0))**2).sum() for i in np.unique(found))


@pytest.mark.parametrize('by', [(), ('cell_type',)])
def test_two_centroids_are_the_best_partition(by):
    "Against all partitions of the rows of a class; k-means may stop at another, not much worse one"
    x, m = emb_features(TRAIN).astype(float), emb_metadata(TRAIN)
    exact = []
    for _, at in list(m.groupby(['sirna', *by]).indices.items())[:12]:
        found, centers = index_module._centers(checked_rows(x[at]), 2, 0)
        means = [x[at][found == i].mean(0) for i in (0, 1)]
        assert np.allclose(centers, [c/np.linalg.norm(c) for c in means], atol=1e-6)
        every = [spread(x[at], np.array([0, *(n >> np.arange(len(at) - 1) & 1)])) for n in range(1, 2**(len(at) - 1))]
        assert spread(x[at], found) <= 1.1*min(every)
        exact.append(spread(x[at], found) <= min(every) + 1e-9)
    assert np.mean(exact) > .7


@pytest.mark.parametrize('k', [1, 3, 50])
@pytest.mark.parametrize('by', [(), ('cell_type',)])
def test_every_row_is_in_one_centroid(k, by):
    emb, m = class_centroids(TRAIN, k=k, by=by), emb_metadata(TRAIN)
    sizes = m.groupby(['sirna', *by]).size()
    assert len(emb) == sizes.clip(upper=k).sum() and emb.Metadata_n_rows.sum() == len(m)
    assert np.allclose(np.linalg.norm(emb_features(emb), axis=1), 1, atol=1e-6)
    if k == 50: assert np.allclose(np.sort(emb_features(emb), 0), np.sort(checked_rows(emb_features(TRAIN)), 0))


def test_centroids_are_saved_and_name_wells(tmp_path):
    from rcic_fastai.predict.predict import predict_wells
    few = EmbeddingIndex(TRAIN, model='a'*64).to_centroids(2, by=['cell_type'])
    few.save(tmp_path/'i')
    back = EmbeddingIndex.load(tmp_path/'i')
    assert back.model == few.model == 'a'*64 and np.array_equal(back.features, few.features)
    assert back.labels.sirna.tolist() == few.labels.sirna.tolist()
    assert len(predict_wells(TEST, few, 'transductive')[0]) == TEST.Metadata_well_id.nunique()


def test_stacked_views_are_rows_of_their_own():
    shifted = make_emb_table(emb_metadata(TRAIN), emb_features(TRAIN)[:, ::-1].copy())
    both = EmbeddingIndex(stack_views([TRAIN, shifted]))
    assert np.array_equal(both.features[:len(TRAIN)], EmbeddingIndex(TRAIN).features) and len(both) == 2*len(TRAIN)
    best = np.maximum(EmbeddingIndex(TRAIN).class_scores(Q), EmbeddingIndex(shifted).class_scores(Q))
    assert np.allclose(both.class_scores(Q), best, atol=1e-6)
    with pytest.raises(ScreenError, match='other samples'): stack_views([TRAIN, TRAIN.iloc[::-1]])
