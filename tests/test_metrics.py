"Measures of embeddings against loops, scikit-learn, scipy, copairs and full enumerations; what must not matter; bad input."
import tracemalloc
from itertools import permutations, product
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, merge_sites, toy_profiles, unit_rows
from rcic_fastai.embed.metrics import (average_precision, batch_predictability, chance_precision, energy_distance, perturbation_magnitude,
                                 replicate_consistency, retrieval_map)

EXPS = ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'RPE-01', 'RPE-02']

def wells(seed=0, n=16, exps=EXPS, **kw): return merge_sites(toy_profiles(exps, (), n, dim=16, seed=seed, **kw))
def tiny(x, **columns):
    m = pd.DataFrame(columns)
    return make_emb_table(m.assign(well_id=[f'{e}_{p}_{i}' for i, (e, p) in enumerate(zip(m.experiment, m.plate))]), x)

WELLS = wells()
ALL = {'retrieval_map': lambda e: retrieval_map(e), 'replicate_consistency': lambda e: replicate_consistency(e, n_null=19),
       'batch_predictability': lambda e: batch_predictability(e, folds=3), 'knn': lambda e: batch_predictability(e, model='knn', k=3, folds=3),
       'perturbation_magnitude': lambda e: perturbation_magnitude(e, n_null=19)}
every = pytest.mark.parametrize('measure', ALL.values(), ids=ALL)

# ---- what must not matter

@every
def test_order_of_rows_does_not_matter(measure):
    (a, ta), (b, tb) = measure(WELLS), measure(WELLS.sample(frac=1, random_state=1))
    assert a == b
    pd.testing.assert_frame_equal(ta, tb)

@every
def test_same_seed_same_numbers(measure):
    assert measure(WELLS)[0] == measure(WELLS.copy())[0]

@every
def test_names_do_not_matter(measure):
    "Other names that sort alike"
    rename = lambda s: s.astype(str).str.replace('HUVEC', 'K562').str.replace('RPE', 'S2')
    other = WELLS.assign(**{c: rename(WELLS[c]) for c in ('Metadata_experiment', 'Metadata_well_id', 'Metadata_cell_type')},
                         Metadata_sirna='x' + WELLS.Metadata_sirna)
    assert measure(other)[0] == measure(WELLS)[0]

@pytest.mark.parametrize('measure', [retrieval_map, lambda e: batch_predictability(e, folds=3), lambda e: batch_predictability(e, model='knn', k=3, folds=3)])
def test_names_in_another_order_do_not_matter(measure):
    new = dict(zip(EXPS, ['e', 'c', 'a', 'd', 'b']))
    exp = WELLS.Metadata_experiment
    other = WELLS.assign(Metadata_experiment=exp.map(new), Metadata_well_id=[new[e] + w[len(e):] for e, w in zip(exp, WELLS.Metadata_well_id)])
    a, b = measure(WELLS)[0], measure(other)[0]
    assert {k: pytest.approx(v, abs=1e-6) for k, v in a.items()} == b

@every
def test_turned_embeddings_are_the_same_embeddings(measure):
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    turned = make_emb_table(emb_metadata(WELLS), emb_features(WELLS) @ q)
    a, b = measure(WELLS)[0], measure(turned)[0]
    tol = .05 if 'accuracy' in a else 1e-3                     # shrinkage looks at the axes
    assert all(b[k] == pytest.approx(v, abs=tol, nan_ok=True) for k, v in a.items())

def test_batch_predictability_does_not_look_at_labels():
    assert batch_predictability(WELLS.assign(Metadata_sirna=None), folds=3)[0] == batch_predictability(WELLS, folds=3)[0]

def test_control_wells_do_not_touch_retrieval_and_consistency():
    treated = WELLS[WELLS.Metadata_well_type == 'treatment']
    for f in (retrieval_map, lambda e: replicate_consistency(e, n_null=9)): assert f(treated)[0] == f(WELLS)[0]

def test_the_length_of_vectors_does_not_matter_where_directions_are_compared():
    r = np.random.default_rng(0)
    long = make_emb_table(emb_metadata(WELLS), emb_features(WELLS)*r.uniform(.5, 20, (len(WELLS), 1)))
    for f in (retrieval_map, lambda e: replicate_consistency(e, n_null=9)):
        for k, v in f(WELLS)[0].items(): assert f(long)[0][k] == pytest.approx(v, abs=1e-4, nan_ok=True)

# ---- retrieval

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_sklearns_ties_included(ranked):
    from sklearn.metrics import average_precision_score
    s, pos = np.array([o[0] for o in ranked]), np.array([o[1] for o in ranked])
    if not pos.any(): assert np.isnan(average_precision(s, pos))
    else: assert average_precision(s, pos) == pytest.approx(average_precision_score(pos, s))

@pytest.mark.parametrize('R, M', [(1, 1), (1, 5), (2, 5), (5, 5), (3, 6)])
def test_chance_is_the_mean_of_all_orders(R, M):
    orders = {o for o in permutations([1]*R + [0]*(M-R))}
    assert chance_precision(R, M) == pytest.approx(np.mean([average_precision(-np.arange(M), o) for o in orders]))

def by_hand(emb, within, negatives):
    m, x, out = emb_metadata(emb), unit_rows(emb_features(emb)).astype(float), {}
    for i, q in m.iterrows():
        if q.well_type != 'treatment': continue
        hits, ranked = 0, []
        for j, o in m.iterrows():
            if o.well_type != 'treatment' or (within and o[within] != q[within]): continue
            same, here = o.sirna == q.sirna, o.experiment == q.experiment
            if (same and here) or (not same and here and negatives == 'other'): continue
            ranked.append((x[i] @ x[j], same))
        precision = []
        for rank, (_, same) in enumerate(sorted(ranked, key=lambda o: -o[0]), 1):
            hits += same
            if same: precision.append(hits/rank)
        out[q.well_id] = np.mean(precision) if precision else np.nan
    return pd.Series(out)

@pytest.mark.parametrize('negatives', ['any', 'other'])
@pytest.mark.parametrize('within', [None, 'cell_type'])
def test_retrieval_is_the_loop(within, negatives):
    emb = WELLS.sample(frac=.7, random_state=3)
    summary, table = retrieval_map(emb, within=within, negatives=negatives)
    hand = by_hand(emb.reset_index(drop=True), within, negatives)
    np.testing.assert_allclose(table.ap, hand[table.well_id], atol=2e-3)
    assert summary['map'] == pytest.approx(table.dropna().groupby('sirna').ap.mean().mean())
    assert summary['n_wells'] == hand.notna().sum()

def test_memory_of_retrieval_does_not_grow_with_the_square_of_wells():
    "9,200 wells need no table of 9,200 × 9,200"
    n = 6000
    m = pd.DataFrame(dict(well_id=[f'w{i}' for i in range(n)], well_type='treatment', sirna=[f't{i % 300}' for i in range(n)], experiment=[f'e{i // 300}' for i in range(n)], plate=1))
    emb = make_emb_table(m, np.random.default_rng(0).normal(size=(n, 8)))
    tracemalloc.start()
    try:
        retrieval_map(emb)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 4*n*n/2          # half of the cosines of all pairs


def test_a_collapsed_embedding_gets_the_share_of_positives():
    flat = make_emb_table(emb_metadata(WELLS), np.ones((len(WELLS), 4)))
    table = retrieval_map(flat)[1]
    np.testing.assert_allclose(table.ap, table.n_positive/table.n_ranked)

def test_a_perfect_embedding_and_a_batch_embedding():
    m = emb_metadata(WELLS)
    assert retrieval_map(make_emb_table(m, pd.get_dummies(m.sirna).to_numpy(float)))[0]['map'] == 1
    batch = pd.get_dummies(m.experiment).to_numpy(float) + .01*pd.get_dummies(m.sirna).to_numpy(float)[:, :5]
    assert retrieval_map(make_emb_table(m, batch))[0]['map'] < .3

def test_sites_are_queries_too():
    sites = toy_profiles(EXPS, (), 8, dim=16)
    summary, table = retrieval_map(sites)
    assert summary['n_wells'] == len(table) == (sites.Metadata_well_type == 'treatment').sum() and 'site_id' in table
    assert (table.n_positive == 2*(len(EXPS) - 1)).all()

@pytest.mark.extra('copairs')
def test_copairs_agrees():
    for emb in (WELLS, WELLS.sample(frac=.6, random_state=0), toy_profiles(EXPS, (), 8, dim=16)):
        for within, negatives in product((None, 'cell_type'), ('any', 'other')):
            (a, ta), (b, tb) = (retrieval_map(emb, within=within, negatives=negatives, engine=e) for e in ('direct', 'copairs'))
            np.testing.assert_allclose(ta.ap, tb.ap, atol=2e-3)              # direct counts cosines within 1e-6 as equal
            assert a['map'] == pytest.approx(b['map'], abs=1e-4) and (ta.n_positive == tb.n_positive).all() and (ta.n_ranked == tb.n_ranked).all()

def test_without_copairs(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'copairs.map', None)
    with pytest.raises(ScreenError, match='pip install copairs'): retrieval_map(WELLS, engine='copairs')

# ---- consistency

def test_consistency_is_the_loop_over_pairs():
    for within in (None, 'cell_type'):
        _, table = replicate_consistency(WELLS, within=within, n_null=5)
        m, x = emb_metadata(WELLS), unit_rows(emb_features(WELLS)).astype(float)
        for row in table.itertuples():
            at = np.flatnonzero((m.sirna == row.sirna) & ((m.cell_type == row.cell_type) if within else True))
            pairs = [x[i] @ x[j] for i in at for j in at if m.experiment[i] != m.experiment[j]]
            assert row.consistency == pytest.approx(np.mean(pairs), abs=1e-5) and row.n_wells == len(at)

def test_pairs_inside_an_experiment_do_not_count():
    r = np.random.default_rng(0)
    x = unit_rows(r.normal(size=(8, 5)))
    emb = tiny(x, experiment=['A']*4 + ['B']*4, plate=1, sirna=['p', 'p', 'q', 'q']*2, well_type='treatment')
    table = replicate_consistency(emb, n_null=3)[1].set_index('sirna')
    for s, (a, b) in {'p': ([0, 1], [4, 5]), 'q': ([2, 3], [6, 7])}.items():
        assert table.consistency[s] == pytest.approx(np.mean([x[i] @ x[j] for i in a for j in b]), abs=1e-6)

def test_consistency_p_is_that_of_all_shuffles():
    r = np.random.default_rng(4)
    x = unit_rows(r.normal(size=(8, 6)) + np.tile(r.normal(size=(4, 6)), (2, 1)))
    emb = tiny(x, experiment=['A']*4 + ['B']*4, plate=1, sirna=list('abcd')*2, well_type='treatment')
    summary, table = replicate_consistency(emb, n_null=4000)
    all_means = [[x[p[i]] @ x[4 + q[i]] for i in range(4)] for p in permutations(range(4)) for q in permutations(range(4))]
    seen = np.array([x[i] @ x[4 + i] for i in range(4)])
    np.testing.assert_allclose(table.p, (np.array(all_means) >= seen - 1e-9).mean(0), atol=.03)
    assert summary['p'] == pytest.approx((np.mean(all_means, 1) >= seen.mean() - 1e-9).mean(), abs=.03)
    np.testing.assert_allclose(table.null, np.mean(all_means, 0), atol=.03)
    np.testing.assert_allclose(table['floor'], 1/16)                     # one of four wells in each experiment
    assert np.isnan(summary['significant'])

def test_shuffling_stays_inside_plates():
    "Replicates that are alike only because their plates are, are not consistent"
    r = np.random.default_rng(0)
    plate = np.repeat([0, 1], 8)
    x = np.concatenate([np.eye(2)[plate]*3 + r.normal(0, .3, (16, 2)) for _ in range(4)])
    m = dict(experiment=np.repeat(list('ABCD'), 16), plate=np.tile(plate, 4), sirna=np.tile([f's{i}' for i in range(16)], 4), well_type='treatment')
    assert replicate_consistency(tiny(x, **m), n_null=199)[0]['p'] > .02
    assert replicate_consistency(tiny(x, **{**m, 'plate': 0}), n_null=199)[0]['p'] == .005

@pytest.mark.parametrize('measure', [lambda e: replicate_consistency(e, n_null=99)[0], lambda e: perturbation_magnitude(e, n_null=99)[0]])
def test_nothing_is_significant_as_often_as_it_should(measure):
    share = np.mean([measure(wells(s, signal=0., exps=[f'HUVEC-{i}' for i in range(8)]))['significant'] for s in range(30)])
    assert .02 < share < .09

# ---- batch

def batch_table(x, n_exp, per):
    e = np.repeat([f'A-{i}' for i in range(n_exp)], per)
    return tiny(x, experiment=e, plate=1, cell_type='A', well_type='treatment', sirna=None)

@pytest.mark.parametrize('model', ['linear', 'knn'])
def test_batches_that_are_plain_and_batches_that_are_not(model):
    r = np.random.default_rng(0)
    noise, batch = r.normal(size=(300, 8)), np.repeat(r.normal(size=(3, 8))*8, 100, 0)
    assert batch_predictability(batch_table(noise + batch, 3, 100), model=model)[0]['accuracy'] > .99
    assert batch_predictability(batch_table(noise, 3, 100), model=model)[0]['accuracy'] == pytest.approx(1/3, abs=.1)

def test_many_batches_in_few_dimensions():
    "Twenty batches on a line: indicator regression would mask those in the middle"
    r = np.random.default_rng(0)
    x = np.repeat(np.arange(20.), 20)[:, None]*10 + r.normal(size=(400, 1))
    assert batch_predictability(batch_table(np.hstack([x, r.normal(size=(400, 1))]), 20, 20))[0]['accuracy'] > .95

def test_sites_of_a_well_do_not_vouch_for_each_other():
    r = np.random.default_rng(0)
    x = np.repeat(r.normal(size=(80, 6)), 2, 0)                        # both sites the same, the batch nowhere
    emb = tiny(x, experiment=np.repeat(['A-1', 'A-2'], 80), plate=1, cell_type='A', well_type='treatment', site_id=[f's{i}' for i in range(160)])
    emb['Metadata_well_id'] = [f'{e}_{i//2}' for i, e in enumerate(emb.Metadata_experiment)]
    assert batch_predictability(emb, model='knn', k=1)[0]['accuracy'] < .7

def test_cell_types_are_not_batches():
    s, t = batch_predictability(WELLS, folds=3)
    assert sorted(t.cell_type) == ['HUVEC', 'RPE'] and t.n_groups.tolist() == [3, 2]
    assert s['accuracy'] == pytest.approx(np.average(t.accuracy, weights=t.n_rows))
    cell_only = make_emb_table(emb_metadata(WELLS), pd.get_dummies(WELLS.Metadata_cell_type).to_numpy(float)*9 + np.random.default_rng(0).normal(size=(len(WELLS), 2)))
    assert batch_predictability(cell_only, folds=3)[0]['accuracy'] < .6
    assert batch_predictability(WELLS, within=None, folds=3)[1].n_groups.tolist() == [5]

# ---- magnitude

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_energy_distance_is_scipys_squared(seed, n, m):
    from scipy.stats import energy_distance as scipys
    r = np.random.default_rng(seed)
    x, y = r.normal(size=n), r.normal(.5, 2, size=m)
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(scipys(x, y)**2, abs=1e-9)

def small_plates(seed=0, n=3, controls=1):
    r = np.random.default_rng(seed)
    rows = [(f'A-{e}', 1, t, s) for e in range(n) for t, s in [('treatment', 'p')] + [('negative_control', 'none')]*controls]
    m = pd.DataFrame(rows, columns=['experiment', 'plate', 'well_type', 'sirna'])
    return r.normal(size=(len(m), 3)) + (m.well_type == 'treatment').to_numpy()[:, None], m

@pytest.mark.parametrize('n, controls', [(3, 1), (4, 2)])
def test_magnitude_p_is_that_of_all_shuffles(n, controls):
    x, m = small_plates(1, n, controls)
    row = perturbation_magnitude(tiny(x, **m), n_null=6000)[1].iloc[0]
    plates, size = np.arange(len(m)).reshape(n, -1), len(m)
    draws = [energy_distance(x[list(t)], x[[i for i in range(size) if i not in t]]) for t in product(*plates)]     # one well of each plate is called treated
    treated = np.flatnonzero(m.well_type == 'treatment')
    seen = energy_distance(x[treated], x[np.setdiff1d(range(size), treated)])
    assert row.distance == pytest.approx(seen, abs=1e-5) and row.null == pytest.approx(np.mean(draws), abs=.02)
    assert row.p == pytest.approx(np.mean(np.array(draws) >= seen - 1e-6), abs=.03)
    assert row['floor'] == pytest.approx(np.mean(np.array(draws) >= max(draws) - 1e-6))
    assert (row.n_wells, row.n_controls) == (n, n*controls) and 0 <= row.coefficient <= 1

def test_only_controls_of_the_same_plates_are_looked_at():
    x, m = small_plates()
    far = pd.concat([m, pd.DataFrame([('B-0', 1, 'negative_control', 'none')], columns=m.columns)], ignore_index=True)
    a = perturbation_magnitude(tiny(x, **m), n_null=19)[0]
    assert perturbation_magnitude(tiny(np.vstack([x, [[1e3]*3]]), **far), n_null=19)[0] == a

def test_coefficient_has_no_unit_and_grows_with_the_effect():
    a = perturbation_magnitude(WELLS, n_null=9)[1]
    b = perturbation_magnitude(make_emb_table(emb_metadata(WELLS), 7*emb_features(WELLS)), n_null=9)[1]
    np.testing.assert_allclose(a.coefficient, b.coefficient, atol=1e-5); np.testing.assert_allclose(7*a.distance, b.distance, rtol=1e-4)
    means = [perturbation_magnitude(wells(signal=s), n_null=9)[0]['coefficient'] for s in (0., 1., 2.)]
    assert means[0] < means[1] < means[2]

def test_wells_like_their_controls():
    x, m = small_plates()
    row = perturbation_magnitude(tiny(np.ones_like(x), **m), n_null=9)[1].iloc[0]
    assert (row.distance, row.coefficient, row.p) == (0, 0, 1)

# ---- bad input

@pytest.mark.parametrize('call, says', [
    (lambda: retrieval_map(WELLS[WELLS.Metadata_experiment == 'RPE-01']), 'at least two experiments'),
    (lambda: retrieval_map(WELLS.drop(columns='Metadata_sirna')), 'no column Metadata_sirna'),
    (lambda: retrieval_map(WELLS.assign(Metadata_sirna=WELLS.Metadata_sirna.where(WELLS.index != 3))), '1 of .* have no sirna'),
    (lambda: retrieval_map(WELLS[WELLS.Metadata_well_type != 'treatment']), 'no treatment well'),
    (lambda: retrieval_map(WELLS, negatives='none'), 'negatives='), (lambda: retrieval_map(WELLS, engine='fast'), 'engine='),
    (lambda: retrieval_map(WELLS.assign(emb_0000=np.nan)), 'not finite'),
    (lambda: replicate_consistency(WELLS[WELLS.Metadata_experiment == 'RPE-01']), 'needs replicates'),
    (lambda: replicate_consistency(toy_profiles(EXPS, (), 8)), 'merge_sites'), (lambda: replicate_consistency(WELLS, n_null=0), 'n_null=0'),
    (lambda: batch_predictability(WELLS, model='forest'), 'model='), (lambda: batch_predictability(WELLS, folds=1), 'folds=1'),
    (lambda: batch_predictability(WELLS, folds=99), 'too few for 99 folds'),
    (lambda: batch_predictability(WELLS[WELLS.Metadata_experiment == 'RPE-01']), 'has two experiments'),
    (lambda: perturbation_magnitude(WELLS[WELLS.Metadata_well_type == 'treatment']), '20 plates have no negative_control'),
    (lambda: perturbation_magnitude(WELLS[WELLS.Metadata_well_type != 'treatment']), 'no treatment well'),
    (lambda: perturbation_magnitude(WELLS, controls='DMSO'), 'have no DMSO well'),
    (lambda: perturbation_magnitude(WELLS.assign(Metadata_sirna=None)), 'has no sirna'),
    (lambda: perturbation_magnitude(toy_profiles(EXPS, (), 8)), 'merge_sites'), (lambda: perturbation_magnitude(WELLS, n_null=-1), 'n_null=-1'),
    (lambda: retrieval_map(emb_metadata(WELLS)), 'no emb_0000')])
def test_bad_input(call, says):
    with pytest.raises(ScreenError, match=says) as e: call()
    assert '\n' not in str(e.value) and str(e.value).endswith('.')
