"Naming wells: against a plain loop, what must not matter, no label of a query is ever used, files."
import os, json, re, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.predict import predict
from rcic_fastai.core import ScreenError
from rcic_fastai.embed import index as index_module
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.predict.predict import predict_tables, predict_wells, read_predictions, write_predictions
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, merge_sites, toy_profiles

TOY = toy_profiles(n_sirnas=24, dim=32, signal=.8, seed=1)
TREATED = (TOY.Metadata_well_type == 'treatment').to_numpy()
IS_TRAIN = (TOY.Metadata_dataset == 'train').to_numpy()
TRAIN, TEST, ALL_TEST = TOY[IS_TRAIN & TREATED], TOY[~IS_TRAIN & TREATED], TOY[~IS_TRAIN]
UNKNOWN = TEST.assign(Metadata_plate_group=pd.array([pd.NA]*len(TEST), dtype='Int64'))
INDEX = EmbeddingIndex(TRAIN)
TRUTH = emb_metadata(TEST).drop_duplicates('well_id').set_index('well_id')
PROTOCOLS = ['inductive', 'adapted', 'transductive']

def index_of(target, rows=TRAIN): return EmbeddingIndex(rows, target=target)

def same(a, b, **kw): pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True), rtol=0, atol=1e-5, **kw)

def test_inductive_is_the_loop():
    pred, near = predict_wells(TEST, INDEX, k=3)
    product = pd.DataFrame(emb_features(TEST).astype(float) @ emb_features(TRAIN).astype(float).T, index=TEST.Metadata_well_id.to_numpy())
    names = TRAIN.Metadata_sirna.to_numpy()
    assert pred.id_code.tolist() == sorted(TEST.Metadata_well_id.unique())
    for p in pred.itertuples():
        mine = product.loc[p.id_code].to_numpy()
        by_class = {c: mine[:, names == c].max() for c in set(names)}
        first, second = sorted(by_class, key=by_class.get)[::-1][:2]
        assert (p.sirna, p.runner_up) == (first, second)
        assert (p.score, p.margin) == pytest.approx((by_class[first], by_class[first] - by_class[second]), abs=1e-5)
        found = np.concatenate([names[np.argsort(-row)[:3]] for row in mine])
        assert p.votes == pytest.approx((found == first).mean())
    assert len(near) == 3*len(TEST) and (near.groupby('query')['rank'].max() == 3).all()

# ---- against products and loops

def unit(x): return x/np.linalg.norm(x, axis=-1, keepdims=True)

class Products:
    "An index that answers from all products, in float64, query by query and class by class"
    kind, target, model = 'exact', 'sirna', None
    def __init__(self, emb):
        self.labels, self.x = emb_metadata(emb), unit(emb_features(emb).astype(float))
        self.y, self.classes = self.labels.sirna.to_numpy(), sorted(self.labels.sirna.unique())
    def allowed(self, cell): return np.ones(len(self.y), bool) if cell is None else (self.labels.cell_type == cell).to_numpy()
    def search(self, q, k, cell_type=None):
        found = []
        for i, v in enumerate(unit(q.astype(float))):
            s = np.where(self.allowed(None if cell_type is None else cell_type[i]), self.x @ v, -np.inf)
            rows = np.argsort(-s, kind='stable')[:k]
            found.append((s[rows], rows))
        return tuple(map(np.array, zip(*found)))
    def score(self, v, mine, vote, k):
        if vote == 'prototype': return unit(self.x[mine].mean(0)) @ v
        return np.sort(self.x[mine] @ v)[::-1][:1 if vote == 'nearest' else k].mean()
    def class_scores(self, q, vote, k, classes=None, cell_type=None, top=None):
        out = np.full((len(q), len(self.classes)), -np.inf)
        for i, v in enumerate(unit(q.astype(float))):
            allowed = self.allowed(None if cell_type is None else cell_type[i])
            for c, name in enumerate(self.classes):
                mine = allowed & (self.y == name)
                if mine.any() and (classes is None or classes[c]): out[i, c] = self.score(v, mine, vote, k)
        return out.astype(np.float32)

SMALL = toy_profiles(['HUVEC-01', 'RPE-01', 'RPE-02'], ['HUVEC-17'], n_sirnas=8, dim=24, signal=.8, plates=2, seed=2)
SMALL_TRAIN, SMALL_TEST = (SMALL[SMALL.Metadata_dataset == d].reset_index(drop=True) for d in ('train', 'test'))

def cases(controls):
    "Queries and index rows; plate groups given and to be inferred"
    train, test = (t if controls else t[t.Metadata_well_type == 'treatment'] for t in (SMALL_TRAIN, SMALL_TEST))
    for queries in (test, test.assign(Metadata_plate_group=pd.array([pd.NA]*len(test), dtype='Int64'))): yield queries, train

@pytest.mark.parametrize('vote', ['nearest', 'mean', 'prototype'])
@pytest.mark.parametrize('merge', ['best', 'mean'])
@pytest.mark.parametrize('controls', [False, True])
def test_answers_are_those_of_all_products(vote, merge, controls):
    for queries, train in cases(controls):
        index, reference = EmbeddingIndex(train), Products(train)
        for protocol in ('inductive', 'transductive'):
            for cell in (False, True):
                got, want = (predict_wells(queries, i, protocol, vote, merge, 3, cell) for i in (index, reference))
                pd.testing.assert_frame_equal(got[0], want[0], rtol=1e-5, atol=1e-6)
                pd.testing.assert_frame_equal(got[1], want[1], rtol=0, atol=1e-6, check_dtype=False)

@pytest.mark.parametrize('vote', ['nearest', 'mean', 'prototype'])
@pytest.mark.parametrize('merge', ['best', 'mean'])
def test_ties_are_those_of_all_products(vote, merge):
    "Every siRNA has a twin with the same pictures: which of two twins is named first is decided by their names"
    for queries, train in cases(controls=True):
        is_treated = train.Metadata_well_type == 'treatment'
        train = pd.concat([train, train.assign(Metadata_sirna=np.where(is_treated, 'A_' + train.Metadata_sirna, train.Metadata_sirna))[is_treated]])
        index, reference = EmbeddingIndex(train), Products(train)
        for cell in (False, True):
            (got, _), (want, _) = (predict_wells(queries, i, 'inductive', vote, merge, 3, cell) for i in (index, reference))
            treated = (got.well_type == 'treatment').to_numpy()
            assert got.sirna[treated].str.startswith('A_').all() and (got.margin[treated].abs() < 1e-6).all()
            assert got[['id_code', 'sirna', 'runner_up']].equals(want[['id_code', 'sirna', 'runner_up']])
            np.testing.assert_allclose(got[['score', 'margin']], want[['score', 'margin']], atol=1e-6)
            pairs = [[f.str.removeprefix('A_').tolist() for f in (p.top_1, p.top_2)] for p in (got, want)]
            assert pairs[0] == pairs[1] and got.top_1.equals(got.sirna)

class OwnSearch(Products):
    "Answers from what an approximate index finds, by loops"
    kind = 'ivf'
    def __init__(self, index):
        self.index, self.labels, self.classes, self.y = index, index.labels, index.classes, index.labels.sirna.to_numpy()
        self.search, self.x = index.search, index.features.astype(float)
    def class_scores(self, q, vote, k, classes=None, cell_type=None, top=None):
        out = np.full((len(q), len(self.classes)), -np.inf)
        for i, v in enumerate(self.index._queries(q)):
            allowed = self.index.allowed(classes, cell_type=None if cell_type is None else cell_type[i])
            present = np.unique(self.index.codes[allowed])
            for depth in (64, 256, 1024) if top and vote == 'nearest' else (1024,):
                cos, rows = (o[0] for o in self.index._search_rows(v[None], min(depth, len(allowed)), allowed))
                for c in present:
                    mine, n = cos[self.index.codes[rows] == c][:1 if vote == 'nearest' else k], (self.index.codes[allowed] == c).sum()
                    n = min(1 if vote == 'nearest' else k, n)
                    out[i, c] = (mine.sum() + (n - len(mine))*cos[-1])/n
                if (out[i, present] > out[i, present].min() + 1e-6).sum() >= min(top or 0, len(present)): break
        return out.astype(np.float32)

CROWD = toy_profiles([f'{c}-{i:02}' for c in ('HUVEC', 'RPE') for i in range(1, 6)], ['HUVEC-31', 'RPE-31'], n_sirnas=188, dim=128, signal=.5, noise=1.5, plates=2, seed=5)

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_answers_of_an_approximate_index_are_those_of_its_search(kind, monkeypatch):
    monkeypatch.setattr(index_module, 'EF_SEARCH', 64)                 # a small graph is searched well, one of millions as badly as this
    train, test = (CROWD[CROWD.Metadata_dataset == d] for d in ('train', 'test'))
    index, some = EmbeddingIndex(train, kind=kind), test.groupby('Metadata_plate').head(12)
    for protocol, vote, merge, cell in (('inductive', 'nearest', 'best', False), ('inductive', 'nearest', 'best', True), ('inductive', 'mean', 'mean', False),
                                        ('transductive', 'nearest', 'best', False), ('transductive', 'mean', 'best', True)):
        (got, _), (want, _) = (predict_wells(some, i, protocol, vote, merge, 3, cell) for i in (index, OwnSearch(index)))
        pd.testing.assert_frame_equal(got, want, rtol=1e-5, atol=1e-6)
    test = test.groupby('Metadata_plate').head(100)
    got, exact = (predict_wells(test, i)[0].sirna for i in (index, EmbeddingIndex(train)))
    assert .5 < (got == exact).mean() < 1

def test_transductive_is_one_sirna_a_plate_from_the_right_group():
    pred, _ = predict_wells(UNKNOWN, INDEX, 'transductive')
    assert not pred.duplicated(['experiment', 'plate', 'sirna']).any()
    group_of = TRAIN.drop_duplicates('Metadata_sirna').set_index('Metadata_sirna').Metadata_plate_group
    assert (group_of[pred.sirna].to_numpy() == TRUTH.plate_group[pred.id_code].to_numpy()).all()
    assert set(pred.group_source) == {'inferred'} and (pred.group_confidence > 0).all()
    given, _ = predict_wells(TEST, INDEX, 'transductive')
    assert set(given.group_source) == {'given'} and given.sirna.tolist() == pred.sirna.tolist()
    free, _ = predict_wells(TEST, INDEX)
    right = [(p.sirna == TRUTH.sirna[p.id_code].to_numpy()).mean() for p in (free, pred)]
    assert 1/24 < right[0] < right[1]

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_labels_of_queries_are_not_used(protocol):
    want, near = predict_wells(UNKNOWN, INDEX, protocol)
    other = UNKNOWN.Metadata_sirna.sample(frac=1, random_state=0).to_numpy()
    for blind in (UNKNOWN.assign(Metadata_sirna=None, Metadata_sirna_id=None), UNKNOWN.assign(Metadata_sirna=other, Metadata_sirna_id=7),
                  UNKNOWN.drop(columns=['Metadata_sirna', 'Metadata_sirna_id'])):
        got, near2 = predict_wells(blind, INDEX, protocol)
        pd.testing.assert_frame_equal(got, want)
        pd.testing.assert_frame_equal(near2, near)

@pytest.mark.parametrize('target', ['cell_type', 'experiment', 'well_type', 'plate'])
def test_no_target_is_read_from_the_queries(target):
    index = index_of(target, TOY[IS_TRAIN])
    want, _ = predict_wells(ALL_TEST, index)
    lie = 9 if target == 'plate' else 'a lie'
    for blind in (ALL_TEST.assign(**{f'Metadata_{target}': lie}), ALL_TEST.assign(**{f'Metadata_{target}': None}), ALL_TEST.drop(columns=f'Metadata_{target}')):
        got, _ = predict_wells(blind, index)
        assert got[target].tolist() == want[target].tolist()
        assert set(got[target]) <= set(index.classes)

def test_search_cannot_be_restricted_to_what_is_predicted():
    with pytest.raises(ScreenError, match='cell type'): predict_wells(TEST, index_of('cell_type'), restrict_cell_type=True)

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(PROTOCOLS))
def test_order_of_rows_does_not_matter(seed, protocol):
    same(predict_wells(UNKNOWN.sample(frac=1, random_state=seed), INDEX, protocol)[0], predict_wells(UNKNOWN, INDEX, protocol)[0])

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_names_of_experiments_do_not_matter(protocol):
    names = {'HUVEC-17': 'ZZ', 'RPE-08': 'AA'}
    other = UNKNOWN.assign(Metadata_experiment=UNKNOWN.Metadata_experiment.map(names))
    for c in ('site_id', 'well_id'):
        other[f'Metadata_{c}'] = [f'{names[v.split("_")[0]]}_{v.split("_", 1)[1]}' for v in UNKNOWN[f'Metadata_{c}']]
    a, b = predict_wells(UNKNOWN, INDEX, protocol)[0], predict_wells(other, INDEX, protocol)[0]
    a = a.assign(id_code=[f'{names[v.split("_")[0]]}_{v.split("_", 1)[1]}' for v in a.id_code], experiment=a.experiment.map(names))
    same(a.sort_values('id_code'), b)

def test_inductive_wells_are_named_one_by_one():
    together, _ = predict_wells(TEST, INDEX)
    alone = pd.concat([predict_wells(TEST[TEST.Metadata_well_id == w], INDEX)[0] for w in together.id_code])
    same(alone, together)

def test_ties_are_broken_the_same_way_in_any_company():
    twice = pd.concat([TRAIN, TRAIN.assign(Metadata_sirna='A_' + TRAIN.Metadata_sirna)])
    index = index_of('sirna', twice)
    together, _ = predict_wells(TEST, index)
    assert together.sirna.str.startswith('A_').all()
    assert together.sirna.tolist() == [predict_wells(TEST[TEST.Metadata_well_id == w], index)[0].sirna[0] for w in together.id_code]

def test_controls_do_not_change_treatments():
    blank = ALL_TEST.assign(Metadata_plate_group=pd.array([pd.NA]*len(ALL_TEST), dtype='Int64'))
    alone = predict_wells(UNKNOWN, INDEX, 'transductive')[0]
    both = predict_wells(blank, INDEX, 'transductive')[0]
    assert len(both) == blank.Metadata_well_id.nunique()
    same(both[both.well_type == 'treatment'], alone)

def test_controls_alone_keep_their_own_answer():
    controls = ALL_TEST[ALL_TEST.Metadata_well_type != 'treatment']
    pred, near = predict_wells(controls, INDEX, 'transductive')
    plain, _ = predict_wells(controls, INDEX)
    assert pred.sirna.tolist() == plain.sirna.tolist() and pred.plate_group.isna().all() and pred.group_source.isna().all()
    some = ALL_TEST[((ALL_TEST.Metadata_experiment == 'HUVEC-17') | (ALL_TEST.Metadata_well_type != 'treatment')).to_numpy()]
    tables = predict_tables((t for _, t in some.groupby('Metadata_experiment')), INDEX, 'transductive')          # RPE-08 has controls only
    same(tables, predict_wells(some, INDEX, 'transductive')[0], check_dtype=False)
    assert tables[tables.experiment == 'RPE-08'].sirna.tolist() == pred[pred.experiment == 'RPE-08'].sirna.tolist()

def barcodes(emb, code=lambda e, p: f'BC{e[-2:]}{"cadb"[p-1]}'):
    return emb.assign(Metadata_plate=[code(e, p) for e, p in zip(emb.Metadata_experiment, emb.Metadata_plate)])

@pytest.mark.parametrize('code', [lambda e, p: f'BC{e[-2:]}{"cadb"[p-1]}', lambda e, p: 1086289686 + 100*int(e[-2:]) + 1000*(e[0] == 'R') - p])
def test_plates_with_barcodes(code):
    index = index_of('sirna', barcodes(TRAIN, code))
    want, _ = predict_wells(UNKNOWN, INDEX, 'transductive')
    for known in (index, INDEX):
        pred, _ = predict_wells(barcodes(UNKNOWN, code), known, 'transductive')
        assert pred.sirna.tolist() == want.sirna.tolist() and pred.plate_group.tolist() == want.plate_group.tolist()
        assert set(pred.group_source) == {'inferred'} and (pred.group_confidence > 0).all()
    assert set(predict_wells(barcodes(TEST, code), index, 'transductive')[0].group_source) == {'given'}

def marked(*protocols): return TEST.assign(Metadata_protocol=[*protocols, *['inductive']*(len(TEST) - len(protocols))])

@pytest.mark.parametrize('mark, refused', [('adapted', PROTOCOLS[:1]), ('transductive', PROTOCOLS[:2]), (None, []), ('inductive', [])])
def test_one_row_that_used_more_than_the_protocol_allows(mark, refused):
    for queries in (marked(mark), marked('inductive', mark)[::-1], marked(mark).astype({'Metadata_protocol': 'category'}), *([marked(mark, 'adapted')] if 'adapted' in refused else [])):
        for protocol in PROTOCOLS:
            if protocol in refused:
                with pytest.raises(ScreenError, match=f"marked {mark} .*the result is not {protocol}: ask for protocol='{mark}', or") as e: predict_wells(queries, INDEX, protocol)
                assert len(str(e.value).splitlines()) == 1
            else: same(predict_wells(queries, INDEX, protocol)[0], predict_wells(queries.assign(Metadata_protocol='inductive'), INDEX, protocol)[0])
    with pytest.raises(ScreenError, match="protocol='odd' is not known"): predict_wells(marked('odd'), INDEX, 'transductive')

def test_missing_wells_and_single_sites():
    wells = UNKNOWN.Metadata_well_id.unique()
    fewer = UNKNOWN[~UNKNOWN.Metadata_well_id.isin(wells[::5]) & ~((UNKNOWN.Metadata_site == 2) & UNKNOWN.Metadata_well_id.isin(wells[1::5]))]
    pred, _ = predict_wells(fewer, INDEX, 'transductive')
    assert len(pred) == fewer.Metadata_well_id.nunique() and not pred.duplicated(['experiment', 'plate', 'sirna']).any()

def test_well_rows_are_understood():
    wells = merge_sites(TEST)
    pred, near = predict_wells(wells, INDEX)
    assert len(pred) == len(wells) and set(near['query']) == set(wells.Metadata_well_id)

@pytest.mark.parametrize('vote', ['nearest', 'mean', 'prototype'])
@pytest.mark.parametrize('merge', ['best', 'mean'])
def test_votes_and_merges_find_the_truth(vote, merge):
    easy = toy_profiles(n_sirnas=24, signal=3., noise=.3, batch=.3)
    train, test = (easy[(easy.Metadata_dataset == d) & (easy.Metadata_well_type == 'treatment')] for d in ('train', 'test'))
    pred, _ = predict_wells(test, index_of('sirna', train), vote=vote, merge=merge)
    truth = emb_metadata(test).drop_duplicates('well_id').set_index('well_id').sirna
    assert (pred.sirna.to_numpy() == truth[pred.id_code].to_numpy()).mean() > .95

def test_restricted_to_the_cell_type():
    pred, near = predict_wells(TEST, INDEX, restrict_cell_type=True)
    cells = TEST.drop_duplicates('Metadata_well_id').set_index('Metadata_well_id').Metadata_cell_type
    assert (near.cell_type.to_numpy() == cells[near.id_code].to_numpy()).all()
    for cell, q in TEST.groupby('Metadata_cell_type'):
        own, _ = predict_wells(q, index_of('sirna', TRAIN[TRAIN.Metadata_cell_type == cell]))
        same(pred[pred.cell_type == cell], own)

def test_a_single_candidate_has_no_runner_up():
    one = TRAIN[(TRAIN.Metadata_cell_type == 'HUVEC') | (TRAIN.Metadata_sirna == 'sirna_0')]
    pred, _ = predict_wells(TEST, index_of('sirna', one), restrict_cell_type=True)
    rpe = pred[pred.cell_type == 'RPE']
    assert set(rpe.sirna) == {'sirna_0'} and rpe.runner_up.isna().all()

def test_files(tmp_path):
    pred, _ = predict_wells(UNKNOWN, INDEX, 'transductive')
    f = write_predictions(pred, tmp_path/'deep'/'out.csv', dict(model='m'))
    lines = f.read_text().splitlines()
    assert lines[0] == 'id_code,sirna' and len(lines) == len(pred) + 1 and all(l.count(',') == 1 for l in lines)
    record = json.loads(f.with_suffix('.json').read_text())
    assert (record['protocol'], record['target'], record['n_wells'], record['model']) == ('transductive', 'sirna', len(pred), 'm')
    back = read_predictions(f)
    assert back.sirna.tolist() == pred.sirna.tolist() and set(back.protocol) == {'transductive'} and back.attrs['target'] == 'sirna'
    assert sorted(p.name for p in f.parent.iterdir()) == ['out.csv', 'out.json', 'out.top.csv']

@pytest.mark.parametrize('protocol', ['inductive', 'transductive'])
def test_the_file_of_candidates_says_how_sure_each_answer_is(tmp_path, protocol):
    "Score, margin and votes, also below 0, without an end, and missing"
    pred, _ = predict_wells(UNKNOWN, INDEX, protocol)
    odd = pred.assign(score=-pred.score, margin=np.where(pred.index == 0, np.inf, pred.margin), votes=pred.votes.where(pred.index > 1))
    odd.attrs = pred.attrs
    for i, p in enumerate((pred, odd)):
        f = write_predictions(p, tmp_path/f'{i}.csv')
        assert f.with_suffix('.top.csv').read_text().startswith('id_code,top_1,top_2,top_3,top_4,top_5,score,margin,votes\n')
        back = read_predictions(f)
        for c in ('score', 'margin', 'votes'): np.testing.assert_allclose(back[c], p[c], rtol=1e-5)

@pytest.mark.parametrize('stop, left', [('.json', 'inductive'), ('.csv', 'unknown'), ('.top.csv', 'transductive')])     # in the order of writing
def test_an_interrupted_run_leaves_no_record_of_other_answers(tmp_path, monkeypatch, stop, left):
    old, new = predict_wells(TEST, INDEX)[0], predict_wells(TEST, INDEX, 'transductive')[0]
    assert old.sirna.tolist() != new.sirna.tolist()
    f = write_predictions(old, tmp_path/'w.csv')
    def broken(a, b, real=os.replace):
        if Path(b).name == f'w{stop}': raise KeyboardInterrupt
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', broken)
        with pytest.raises(KeyboardInterrupt): write_predictions(new, f)
    back = read_predictions(f)
    assert back.sirna.tolist() == (new if stop == '.top.csv' else old).sirna.tolist() and set(back.protocol) == {left}
    assert 'top_1' not in back or back.top_1.tolist() == back.sirna.tolist()
    write_predictions(new, f)
    assert set(read_predictions(f).protocol) == {'transductive'} and read_predictions(f).top_1.tolist() == new.sirna.tolist()

def test_answers_of_a_record_without_sums_stay(tmp_path):
    "As earlier versions wrote it: nothing tells whether someone has changed the answers since"
    old, new = predict_wells(TEST, INDEX)[0], predict_wells(TEST, INDEX, 'transductive')[0]
    f = write_predictions(old, tmp_path/'w.csv')
    record = json.loads(f.with_suffix('.json').read_text())
    del record['sha256']
    f.with_suffix('.json').write_text(json.dumps(record))
    before = f.read_bytes()
    with pytest.raises(ScreenError, match='w.csv would be overwritten, and rcic_fastai did not write it as it is now'): write_predictions(new, f)
    assert f.read_bytes() == before

def test_the_record_is_of_its_own_answers_only(tmp_path):
    pred, _ = predict_wells(TEST, INDEX)
    f = write_predictions(pred, tmp_path/'w.csv')
    moved = tmp_path/'v.csv'
    for s in ('.csv', '.json', '.top.csv'): moved.with_suffix(s).write_bytes(f.with_suffix(s).read_bytes())
    assert set(read_predictions(moved).protocol) == {'inductive'} and 'top_1' in read_predictions(moved)
    f.write_text(f.read_text().replace(f',{pred.sirna[0]}\n', ',sirna_x\n'))
    back = read_predictions(f)
    assert set(back.protocol) == {'unknown'} and 'top_1' not in back and back.sirna[0] == 'sirna_x'
    f.with_suffix('.json').write_text('{"protocol": "adapted"}')                    # said by hand
    assert set(read_predictions(f).protocol) == {'adapted'} and 'top_1' not in read_predictions(f)
    moved.with_suffix('.top.csv').write_text('id_code,top_1\n')
    assert set(read_predictions(moved).protocol) == {'inductive'} and 'top_1' not in read_predictions(moved)
    moved.with_suffix('.json').unlink()
    assert set(read_predictions(moved).protocol) == {'unknown'}

def test_csv_of_someone_else_has_no_protocol(tmp_path):
    (tmp_path/'x.csv').write_text('id_code,sirna\nHUVEC-17_1_B03,250\n')
    back = read_predictions(tmp_path/'x.csv')
    assert back.protocol.tolist() == ['unknown'] and back.sirna.tolist() == ['250']

@pytest.mark.parametrize('text, says', [('', 'not a readable CSV'), ('id_code\nA\n', 'id_code and'), ('well,sirna\nA,B\n', 'needs id_code'), ('id_code,sirna\nA,\n', 'empty cell in row 2')])
def test_bad_csv(tmp_path, text, says):
    (tmp_path/'x.csv').write_text(text)
    with pytest.raises(ScreenError, match=says): read_predictions(tmp_path/'x.csv')

@pytest.mark.parametrize('text', ['{torn', '[]', '"inductive"', '['*100_000, '{"protocol": "inductive", "target": ["sirna"]}', '{"sha256": "ab"}'])
def test_damaged_record(tmp_path, text):
    f = write_predictions(predict_wells(TEST, INDEX)[0], tmp_path/'x.csv')
    f.with_suffix('.json').write_text(text)
    with pytest.raises(ScreenError, match='x.json is damaged'): read_predictions(f)
    for odd in ('"Inductive"', 'null', '["adapted"]'):
        f.with_suffix('.json').write_text(f'{{"protocol": {odd}}}')
        with pytest.raises(ScreenError, match='x.json says protocol .* it can be inductive, adapted, transductive'): read_predictions(f)

@pytest.mark.parametrize('make, says', [
    (lambda: predict_wells(TEST, INDEX, 'leaky'), 'choose from inductive'),
    (lambda: predict_wells(TEST, INDEX, vote='loudest'), "'loudest'"),
    (lambda: predict_wells(TEST, INDEX, merge='loudest'), "'loudest'"),
    (lambda: predict_wells(TEST.drop(columns='Metadata_well_id'), INDEX), 'Metadata_well_id'),
    (lambda: predict_wells(emb_metadata(TEST), INDEX), 'embeddings table'),
    (lambda: predict_wells(make_emb_table(emb_metadata(TEST), emb_features(TEST)[:, :4]), INDEX), 'same model'),
    (lambda: predict_wells(TEST.assign(Metadata_cell_type='A549'), INDEX, restrict_cell_type=True), 'A549'),
    (lambda: predict_wells(TEST, index_of('cell_type'), 'transductive'), 'several groups'),
    (lambda: predict_wells(TEST, index_of('sirna', TRAIN.drop(columns='Metadata_plate_group')), 'transductive'), 'no plate groups'),
    (lambda: predict_wells(UNKNOWN.assign(Metadata_plate=UNKNOWN.Metadata_plate + 1), INDEX, 'transductive'), 'Plate 5'),
    (lambda: predict_wells(UNKNOWN.assign(Metadata_plate=1), INDEX, 'transductive'), '24 wells cannot be given 6'),
    (lambda: write_predictions(predict_wells(TEST, INDEX)[0], 'x.json'), 'x.json'),
    (lambda: read_predictions('nowhere.csv'), 'nowhere.csv')])
def test_bad_input(make, says):
    with pytest.raises(ScreenError, match=says): make()

def test_the_index_of_another_model_is_refused():
    emb = toy_profiles(n_sirnas=8, seed=3)
    known = (emb.Metadata_dataset == 'train').to_numpy() & (emb.Metadata_well_type == 'treatment').to_numpy()
    index = EmbeddingIndex(emb[known], model='a'*64)
    queries = emb[(emb.Metadata_dataset == 'test').to_numpy()].reset_index(drop=True)
    for made, fine in ((None, True), ('a'*64, True), ('b'*64, False)):
        if made: queries.attrs['model'] = made
        if fine: predict_wells(queries, index)
        else:
            with pytest.raises(ScreenError, match='are of model bbbbbbbb and the index of model aaaaaaaa'): predict_wells(queries, index)

def test_what_is_no_table_is_refused():
    emb = toy_profiles(n_sirnas=8, seed=3)
    known = (emb.Metadata_dataset == 'train').to_numpy() & (emb.Metadata_well_type == 'treatment').to_numpy()
    index = EmbeddingIndex(emb[known])
    with pytest.raises(ScreenError, match='ndarray is not an embeddings table'): predict_wells(emb_features(emb), index)

def test_experiments_that_the_index_holds_are_said():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predict_wells(TEST, INDEX)
    some = pd.concat([TRAIN[:6], TEST], ignore_index=True)
    with pytest.warns(UserWarning, match=f'^6 of {len(some)} embeddings to name are of experiments that the index holds too \\({TRAIN.Metadata_experiment.iloc[0]}\\)'):
        predict_wells(some, INDEX)

# ---- a plate that cannot be balanced

def unbalanced(*args, plate='', **kwargs): raise ScreenError(f'Plate {plate} is not balanced after 5000 rounds: raise the temperature.')

def test_a_finished_assignment_outlives_a_balancing_that_fails(monkeypatch, tmp_path):
    want, _ = predict_wells(TEST, INDEX, 'transductive')
    plates = want.groupby(['experiment', 'plate']).ngroups
    monkeypatch.setattr(predict, 'balance_plate', unbalanced)
    with pytest.warns(UserWarning, match='is not balanced'): got, _ = predict_wells(TEST, INDEX, 'transductive')
    tops = [c for c in want if re.fullmatch(r'top_[2-9]', c)]
    pd.testing.assert_frame_equal(got.drop(columns=tops), want.drop(columns=tops))
    group_of = TRAIN.drop_duplicates('Metadata_sirna').set_index('Metadata_sirna').Metadata_plate_group
    for c in tops: assert (group_of[got[c]].to_numpy() == TRUTH.plate_group[got.id_code].to_numpy()).all()
    assert len(got.attrs['notes']) == plates
    with pytest.warns(UserWarning, match='is not balanced'):
        every = predict_tables((t for _, t in TEST.groupby('Metadata_experiment')), INDEX, 'transductive')
    write_predictions(every, tmp_path/'p.csv', dict(notes=['of the command']))
    said = json.loads((tmp_path/'p.json').read_text())['notes']
    assert said[0] == 'of the command' and len(said) == 1 + plates and 'softmax' in said[-1]
    write_predictions(want, tmp_path/'p.csv')
    assert 'notes' not in json.loads((tmp_path/'p.json').read_text())
