"One-to-one assignment and rotations against searches through all possibilities."
from itertools import permutations
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import read_metadata, real_data
from rcic_fastai.predict import assign
from rcic_fastai.predict.assign import (assign_plate, balance_plate, group_evidence, group_patterns, group_scores, infer_groups,
                                infer_rotation, pattern_fit)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 2))
def test_assignment_is_the_best_of_all_permutations(seed, wells, spare):
    s = np.random.default_rng(seed).uniform(-1, 1, (wells, wells + spare))
    got = assign_plate(s)
    assert len(set(got)) == wells
    best = max(s[range(wells), list(p)].sum() for p in permutations(range(wells + spare), wells))
    assert s[range(wells), got].sum() == pytest.approx(best)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_forbidden_classes_are_left_alone(seed):
    r = np.random.default_rng(seed)
    s = np.where(r.random((4, 6)) < .4, -np.inf, r.uniform(-1, 1, (4, 6)))
    s[range(4), r.permutation(6)[:4]] = r.uniform(-1, 1, 4)                    # one allowed assignment at least
    best = max(s[range(4), list(p)].sum() for p in permutations(range(6), 4))
    assert s[range(4), assign_plate(s)].sum() == pytest.approx(best)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_wells_and_classes_does_not_matter(seed):
    r = np.random.default_rng(seed)
    s, w, c = r.normal(size=(5, 7)), r.permutation(5), r.permutation(7)
    np.testing.assert_array_equal(c[assign_plate(s[w][:, c])], assign_plate(s)[w])

def test_a_plate_of_real_size():
    r = np.random.default_rng(0)
    s, truth = r.normal(0, .1, (271, 277)), r.permutation(277)[:271]
    s[range(271), truth] += 1
    np.testing.assert_array_equal(assign_plate(s), truth)

@pytest.mark.parametrize('s, says', [(np.zeros((3, 2)), '3 wells cannot be given 2'), (np.full((2, 5), -np.inf), '2 wells cannot be given 0'),
                                     (np.array([[.1, -np.inf], [.2, -np.inf]]), '2 wells cannot be given 1')])
def test_more_wells_than_sirnas(s, says):
    with pytest.raises(ScreenError, match=says): assign_plate(s)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_group_scores_are_the_loop(seed):
    r = np.random.default_rng(seed)
    s, groups = r.normal(size=(6, 9)), pd.array([0, 1, 2, 0, 1, 2, None, None, 1], dtype='Int64')
    got = group_scores(s, groups, 4)
    for g in range(3): np.testing.assert_array_equal(got[:, g], s[:, [i for i, o in enumerate(groups) if not pd.isna(o) and o == g]].max(1))
    assert np.isneginf(got[:, 3]).all()

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_rotation_is_the_best_of_all(seed, n):
    r = np.random.default_rng(seed)
    plates, best = np.repeat(np.arange(1, n + 1), 7), r.normal(size=(7*n, n))
    order = r.permutation(7*n)
    groups, confidence = infer_rotation(best[order], plates[order])
    total = {turn: sum(best[i, (p - 1 + turn) % n] for i, p in enumerate(plates)) for turn in range(n)}
    turn = max(total, key=total.get)
    assert groups == {p: (p - 1 + turn) % n for p in range(1, n + 1)}
    assert confidence >= 0

def test_confidence_grows_with_the_evidence():
    def confidence(gain, wells):
        r = np.random.default_rng(1)
        plates, best = np.repeat([1, 2, 3, 4], wells), r.normal(size=(4*wells, 4))
        best[range(4*wells), (plates + 1) % 4] += gain
        groups, c = infer_rotation(best, plates)
        return groups, c
    assert confidence(.5, 60)[0] == {1: 2, 2: 3, 3: 0, 4: 1}
    assert confidence(.5, 60)[1] > 3 > confidence(0., 60)[1]
    assert confidence(1., 60)[1] > confidence(.5, 60)[1] and confidence(.5, 200)[1] > confidence(.5, 60)[1]

def test_absent_plates_and_single_groups():
    r = np.random.default_rng(2)
    plates, best = np.repeat([2, 4], 50), r.normal(size=(100, 4))
    best[range(100), (plates + 2) % 4] += 3
    assert infer_rotation(best, plates)[0] == {2: 0, 4: 2}
    assert infer_rotation(best[:, :1], np.ones(100))[0] == {1: 0}

@pytest.mark.parametrize('plates', [[1, 2, 3, 5], [0, 1, 2, 3]])
def test_plates_beyond_the_groups(plates):
    with pytest.raises(ScreenError, match='Plate'): infer_rotation(np.zeros((4, 4)), plates)

@pytest.mark.parametrize('s, says', [([[1., np.nan], [0, 1]], 'well 0 are not numbers'), ([[1., 0], [0, np.inf]], 'well 1 are not numbers'),
                                     (np.zeros((0, 3)), 'shape'), (np.zeros(3), 'shape'),
                                     ([[1, -np.inf, -np.inf], [1, -np.inf, -np.inf], [1, 1, 1]], 'no free siRNA')])
def test_scores_that_cannot_be_assigned(s, says):
    for f in (assign_plate, balance_plate):
        with pytest.raises(ScreenError, match=says): f(s)
        with pytest.raises(ScreenError, match='Plate HUVEC-01_3'): f(s, plate='HUVEC-01_3')

# ---- balancing

def sinkhorn(s, temperature, rounds=3000):
    "By hand: a square matrix with a row for every missing well, columns and rows divided by their sums in turn"
    wells, classes = s.shape
    p = np.vstack([np.exp(s/temperature), np.ones((classes - wells, classes))])
    for _ in range(rounds):
        p = p/p.sum(0)
        p = p/p.sum(1, keepdims=True)
    return p[:wells]

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 3), st.floats(.3, 2))
def test_balanced_like_by_hand(seed, wells, spare, temperature):
    s = np.random.default_rng(seed).normal(size=(wells, wells + spare))
    p = balance_plate(s, temperature, tol=1e-9, max_rounds=100_000)
    np.testing.assert_allclose(p, sinkhorn(s, temperature), atol=1e-6)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p.sum(0) <= 1 + 1e-6).all()

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-5, 5), st.floats(.1, 50))
def test_balance_ignores_order_and_scale(seed, shift, scale):
    r = np.random.default_rng(seed)
    s, w, c = r.normal(size=(5, 7)), r.permutation(5), r.permutation(7)
    np.testing.assert_allclose(balance_plate(s[w][:, c]), balance_plate(s)[w][:, c], atol=1e-8)
    np.testing.assert_allclose(balance_plate(scale*s + shift), balance_plate(s), atol=1e-8)
    np.testing.assert_allclose(balance_plate(s + r.normal(size=(5, 1)), .5), balance_plate(s, .5), atol=1e-8)     # what a well has in common for all siRNAs

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_balance_between_softmax_and_assignment(seed):
    s = np.random.default_rng(seed).normal(size=(4, 4))
    best = assign_plate(s)
    order = sorted((s[range(4), list(p)].sum() for p in permutations(range(4))), reverse=True)
    if order[0] - order[1] > .05: np.testing.assert_array_equal(balance_plate(s, .01, tol=1e-2, max_rounds=200_000).argmax(1), best)
    np.testing.assert_allclose(balance_plate(s, 1e4), .25, atol=1e-3)

def test_balance_leaves_forbidden_alone_and_handles_flat_scores():
    s = np.array([[1., -np.inf, 0, 2], [0, 1, -np.inf, 1], [0, 0, 0, -np.inf]])
    p = balance_plate(s)
    assert (p[np.isneginf(s)] == 0).all() and np.allclose(p.sum(1), 1)
    np.testing.assert_allclose(balance_plate(np.zeros((3, 5))), .2)
    np.testing.assert_allclose(balance_plate([[3.]]), 1)

def test_balance_of_a_real_plate_and_its_limit():
    r = np.random.default_rng(0)
    s, truth = r.normal(0, .05, (271, 277)), r.permutation(277)[:271]
    s[range(271), truth] += .12
    p = balance_plate(s)
    assert (p.argmax(1) == truth).mean() > (s.argmax(1) == truth).mean()
    with pytest.raises(ScreenError, match='not balanced after 3 rounds'): balance_plate(s, 1e-3, max_rounds=3)
    for bad in (0, -1, np.nan):
        with pytest.raises(ScreenError, match='temperature'): balance_plate(s, bad)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2), st.integers(1, 9))
def test_balance_is_that_of_the_allowed_classes(seed, spare, forbidden):
    r = np.random.default_rng(seed)
    s = r.normal(size=(5, 5 + spare))
    all_, at = np.full((5, 5 + spare + forbidden), -np.inf), np.sort(r.permutation(5 + spare + forbidden)[:5 + spare])
    all_[:, at] = s
    np.testing.assert_allclose(balance_plate(all_)[:, at], balance_plate(s), atol=1e-12)
    assert balance_plate(all_).sum() == pytest.approx(5)
    np.testing.assert_allclose(balance_plate(all_, .7, tol=1e-12, max_rounds=10**6)[:, at], sinkhorn(s, .7, 20_000), atol=1e-9)

def rxrx1_plate(seed=0, wells=277, classes=1108, groups=4):
    "Cosines of a plate of RxRx1's size with all its classes, and which of these are of the plate's group"
    r, of = np.random.default_rng(seed), np.arange(classes) % groups
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    center = unit(r.normal(size=(classes, 64)))
    own = r.permutation(np.flatnonzero(of == 0))[:wells]
    return unit(.3*center[own] + r.normal(size=(wells, 64))/8) @ center.T, of == 0

def test_balance_of_a_plate_takes_as_many_rounds_as_its_own_group(monkeypatch):
    s, mine = rxrx1_plate()
    rounds, real = [], assign._logsumexp
    monkeypatch.setattr(assign, '_logsumexp', lambda x, axis: rounds.append(x.size) or real(x, axis))
    whole = balance_plate(np.where(mine, s, -np.inf))
    cost = sum(rounds)
    rounds.clear()
    part = balance_plate(s[:, mine])
    np.testing.assert_array_equal(whole[:, mine], part)
    assert cost == sum(rounds)

# ---- patterns

def rows(maps, **more):
    return pd.DataFrame([dict(experiment=e, plate=p, plate_group=g, **more) for e, gs in maps.items() for p, g in gs.items()])

def test_patterns_come_from_training():
    t = rows({'A': {1: 2, 2: 0, 3: 1}, 'B': {1: 0, 2: 1, 3: 2}, 'C': {1: 2, 2: 0, 3: 1}})
    assert group_patterns(t, extend='seen').values.tolist() == [[0, 1, 2], [2, 0, 1]]
    assert group_patterns(t).values.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert group_patterns(t, extend='all').values.tolist() == sorted(map(list, permutations(range(3))))
    pd.testing.assert_frame_equal(group_patterns(t.sample(frac=1, random_state=0)), group_patterns(t))
    pd.testing.assert_frame_equal(group_patterns(t.assign(experiment=t.experiment.map({'A': 'z', 'B': 'y', 'C': 'x'}))), group_patterns(t))

def test_patterns_that_are_not_in_the_order_of_the_numbers():
    t = rows({'A': {1: 3, 2: 0, 3: 2, 4: 1}})
    seen = group_patterns(t)
    assert [3, 0, 2, 1] in seen.values.tolist() and [0, 1, 2, 3] not in seen.values.tolist() and len(seen) == 4
    doubled = rows({'A': {1: 5, 2: 5, 3: 9, 4: 9}})                          # two plates may hold the same group
    assert group_patterns(doubled).values.tolist() == [[5, 5, 9, 9], [5, 9, 9, 5], [9, 5, 5, 9], [9, 9, 5, 5]]

def test_controls_and_unlabeled_rows_say_nothing_about_patterns():
    t = pd.concat([rows({'A': {1: 0, 2: 1}}, well_type='treatment'), rows({'A': {1: 1, 2: 0}}, well_type='positive_control'),
                   rows({'B': {1: pd.NA, 2: 0}}, well_type='treatment')])
    assert group_patterns(t, extend='seen').values.tolist() == [[0, 1]]

@pytest.mark.parametrize('t, says', [(rows({'A': {1: 0, 2: 1}, 'B': {2: 1, 3: 0}}), 'no pattern to learn'), (rows({'A': {1: 0}}).drop(columns='plate'), 'no column plate'),
                                     (pd.concat([rows({'A': {1: 0, 2: 1}}), rows({'A': {2: 0}})]), 'Plate 2 of A holds siRNAs of two groups')])
def test_patterns_that_cannot_be_read(t, says):
    with pytest.raises(ScreenError, match=says): group_patterns(t)

def test_plates_with_names_may_lie_in_any_order():
    every = sorted(map(list, permutations([0, 1, 2])))
    for t in (rows({'A': {'BC1': 2, 'BC7': 0, 'X': 1}}), rows({'A': {10071: 2, 10072: 0, 10073: 1}, 'B': {10099: 0, 10091: 2, 10090: 1}}),
              rows({'A': {'P1': 0, 'P2': 1, 'P10': 2}, 'B': {'P1': 0, 'P2': 1, 'P10': 2}})):
        for e in ('seen', 'rotations'):
            got = group_patterns(pd.concat([t, t]), extend=e)                    # rows may have any index
            assert got.values.tolist() == every and got.columns.tolist() == [1, 2, 3]
    assert group_patterns(rows({'A': {f'BC{i}': i for i in range(8)}})).empty
    text = rows({'A': {'1': 2, '2': 0, '3': 1}, 'B': {'1': 0, '2': 1, '3': 2}})     # numbers, written as text
    pd.testing.assert_frame_equal(group_patterns(text), group_patterns(text.assign(plate=text.plate.astype(int))))
    with pytest.raises(ScreenError, match='no plate'): group_patterns(text.assign(plate=['1', None, '3', '1', '2', '3']))

def test_too_many_orders():
    with pytest.raises(ScreenError, match='too many orders'): group_patterns(n_groups=9, extend='all')
    with pytest.raises(ScreenError, match='extend'): group_patterns(extend='guess')
    assert len(group_patterns(n_groups=9)) == 9

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4))
def test_fit_is_the_loop_over_patterns(seed, n):
    r = np.random.default_rng(seed)
    plates, best = np.repeat(np.arange(1, n + 1), 5), r.normal(size=(5*n, n))
    pats = group_patterns(n_groups=n, extend='all')
    fit = pattern_fit(best, plates, pats)
    values = {tuple(p): np.array([best[i, p[plates[i]-1]] for i in range(5*n)]) for p in pats.to_numpy()}
    top = max(values, key=lambda p: values[p].mean())
    z = {}
    for p, v in values.items():
        d = values[top] - v
        z[p] = 0 if p == top else d.mean()/(d.std(ddof=1)/len(d)**.5)
    total = sum(np.exp(-o**2/2) for o in z.values())
    for _, row in fit.iterrows():
        p = tuple(row[list(pats)].astype(int))
        assert row.fit == pytest.approx(values[p].mean()) and row.z == pytest.approx(z[p]) and row.posterior == pytest.approx(np.exp(-z[p]**2/2)/total)
    assert fit.z.is_monotonic_increasing and fit.posterior.sum() == pytest.approx(1)
    order = r.permutation(5*n)
    pd.testing.assert_frame_equal(pattern_fit(best[order], plates[order], pats), fit)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_evidence_is_the_best_of_all_assignments(seed):
    r = np.random.default_rng(seed)
    s, groups, plates = r.normal(size=(6, 9)), np.array([0, 1, 2]*3), np.array([1, 2, 1, 2, 1, 2])
    got = group_evidence(s, groups, 3, plates)
    for p in (1, 2):
        at = np.flatnonzero(plates == p)
        for g in range(3):
            best = max(permutations(np.flatnonzero(groups == g), 3), key=lambda c: s[at, list(c)].sum())
            np.testing.assert_allclose(got[at, g], s[at, list(best)])
    assert np.isneginf(group_evidence(s[:, [0, 1, 2, 3, 4, 5, 6]], groups[:7], 3, plates)[:, 1:]).all()          # group 0 alone has three siRNAs left
    with pytest.raises(ScreenError, match='3 wells cannot be given 2'): group_evidence(s[:, :5], groups[:5], 3, plates)

def screen(seed=0, per=8, gain=3., names=('A', 'B'), order=(2, 0, 3, 1), turns=(1, 3)):
    "Scores of two experiments of four plates; the groups follow each other as in `order`"
    r = np.random.default_rng(seed)
    class_groups = np.repeat(np.arange(4), per)
    wells = pd.DataFrame([(e, p, order[(p - 1 + t) % 4]) for e, t in zip(names, turns) for p in (1, 2, 3, 4) for _ in range(per)], columns=['experiment', 'plate', 'group'])
    s = r.normal(size=(len(wells), 4*per))
    for i, (_, w) in enumerate(wells.iterrows()): s[i, w.group*per + i % per] += gain
    return s, wells, class_groups, group_patterns(rows({'T': {p: order[p-1] for p in (1, 2, 3, 4)}}))

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_groups_are_found_whatever_they_are_called(seed):
    s, wells, classes, pats = screen(seed)
    groups, how = infer_groups(s, wells, classes, pats)
    assert groups.tolist() == wells.group.tolist() and (how.confidence > 3).all() and (how.posterior > .95).all()
    assert how.groups['A'] == wells[wells.experiment == 'A'].groupby('plate').group.first().to_dict() and how.runner_up['A'] != how.groups['A']
    new = np.array([7, 3, 40, 11])
    assert infer_groups(s, wells, new[classes], pats.apply(lambda c: new[c]))[0].tolist() == new[wells.group].tolist()
    order = np.random.default_rng(seed).permutation(len(s))
    g2, h2 = infer_groups(s[order], wells.iloc[order].assign(experiment=lambda d: d.experiment.map({'A': 'z', 'B': 'a'})), classes, pats)
    assert g2.tolist() == wells.group.iloc[order].tolist() and h2.confidence['z'] == pytest.approx(how.confidence['A'])
    assert (infer_groups(s, wells, classes, group_patterns(n_groups=4, extend='all'))[0] == wells.group.to_numpy()).all()

def test_groups_in_the_order_of_plates_are_an_assumption():
    s, wells, classes, _ = screen()
    groups, how = infer_groups(s, wells, classes)
    assert (groups != wells.group.to_numpy()).any() and (how.confidence < 3).all()

def test_one_group_and_classes_in_no_group():
    s, wells, classes, pats = screen()
    groups, how = infer_groups(s[:, :8], wells[:8].assign(plate=1), np.zeros(8, int))
    assert set(groups) == {0} and how.posterior.iloc[0] == 1 and np.isinf(how.confidence.iloc[0])
    some = pd.array([*classes, pd.NA], dtype='Int64')
    assert infer_groups(np.hstack([s, np.full((len(s), 1), 99.)]), wells, some, pats)[0].tolist() == wells.group.tolist()

def test_wells_missing_from_plates_and_whole_plates():
    s, wells, classes, pats = screen()
    keep = np.random.default_rng(0).random(len(s)) < .8
    keep &= ~((wells.experiment == 'A') & (wells.plate == 3)).to_numpy()
    assert infer_groups(s[keep], wells[keep], classes, pats)[0].tolist() == wells.group[keep].tolist()

def test_what_cannot_be_inferred():
    s, wells, classes, pats = screen()
    with pytest.raises(ScreenError, match='Plate 9'): infer_groups(s, wells.assign(plate=9), classes, pats)
    with pytest.raises(ScreenError, match='Plate 1: 16 wells cannot be given 8 siRNAs'): infer_groups(s, wells.assign(experiment='A'), classes, pats)
    uneven = np.minimum(classes, 1)                                  # group 0 keeps 8 siRNAs, group 1 has 24
    full = wells[:32].assign(plate=np.repeat([1, 2], 16))
    with pytest.raises(ScreenError, match='No pattern leaves plate'): infer_groups(s[:32], full, uneven, group_patterns(n_groups=2))
    with pytest.raises(ScreenError, match='holds no class'): infer_groups(s, wells, classes, pats + 1)

def coded(wells, code=lambda e, p: f'BC{e}{"cadb"[p-1]}'): return wells.assign(plate=[code(e, p) for e, p in zip(wells.experiment, wells.plate)])

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_groups_of_plates_with_names(seed):
    s, wells, classes, pats = screen(seed, gain=5.)
    named = rows({'T': {'x': 2, 'y': 0, 'z9': 3, 'w': 1}})
    want = wells.group.tolist()
    for code in (lambda e, p: f'BC{e}{"cadb"[p-1]}', lambda e, p: 10000*(e == 'A') + 7000 - 13*p):
        w = coded(wells, code)
        for patterns in (pats, group_patterns(named), None):
            groups, how = infer_groups(s, w, classes, patterns)
            assert groups.tolist() == want and (how.confidence > 2).all() and (how.posterior > .7).all()
            assert how.groups['A'] == w[w.experiment == 'A'].groupby('plate').group.first().to_dict()
            assert set(how.runner_up['B']) == set(how.groups['B']) and how.runner_up['B'] != how.groups['B']
    order = np.random.default_rng(seed).permutation(len(s))
    assert infer_groups(s[order], coded(wells).iloc[order], classes, group_patterns(named))[0].tolist() == wells.group.iloc[order].tolist()
    mixed = coded(wells, lambda e, p: f'BC{p}' if e == 'A' else str(p))             # barcodes in one experiment, numbers in the other
    groups, how = infer_groups(s, mixed, classes, pats)
    assert groups.tolist() == want and how.groups['B'] == infer_groups(s, wells, classes, pats)[1].groups['B']
    assert infer_groups(s, wells, classes, group_patterns(named))[0].tolist() == want   # named in training only

def test_more_plates_with_names_than_in_training_are_matched_one_by_one():
    s, wells, classes, _ = screen()
    one = wells.assign(experiment='E', plate=[f'{e}{p}' for e, p in zip(wells.experiment, wells.plate)])      # eight plates
    for patterns in (None, group_patterns(rows({'T': {'x': 2, 'y': 0, 'z': 3, 'w': 1}})), pd.DataFrame()):
        groups, how = infer_groups(s, one, classes, patterns)
        assert groups.tolist() == wells.group.tolist()
    best = group_evidence(s, classes, 4, one.plate)
    alone = {p: pattern_fit(best[(one.plate == p).to_numpy()], np.ones(8), pd.DataFrame({1: range(4)})) for p in one.plate.unique()}
    assert how.confidence.iloc[0] == pytest.approx(min(f.z[1] for f in alone.values()))
    assert how.posterior.iloc[0] == pytest.approx(np.prod([f.posterior[0] for f in alone.values()]))
    assert [p for p, g in how.runner_up.iloc[0].items() if g != how.groups.iloc[0][p]] == [min(alone, key=lambda p: alone[p].z[1])]

def test_bad_plates_with_names():
    s, wells, classes, pats = screen()
    w = coded(wells)
    with pytest.raises(ScreenError, match='Plate BC: 32 wells cannot be given 8'): infer_groups(s, w.assign(plate='BC'), classes, pats)
    with pytest.raises(ScreenError, match='Plate BC1 cannot be matched with 4 groups'): infer_rotation(np.zeros((2, 4)), ['BC1', 'BC2'])
    with pytest.raises(ScreenError, match='There is no pattern'): infer_rotation(np.zeros((2, 4)), ['BC1', 'BC2'], pd.DataFrame())
    with pytest.raises(ScreenError, match='cannot be called z'): infer_groups(s, coded(wells, lambda e, p: 'wxyz'[p-1]), classes, pats)
    with pytest.raises(ScreenError, match='Well 0 has no plate'): infer_groups(s, w.assign(plate=None), classes, pats)

REAL = real_data()

@pytest.mark.real('metadata')
def test_training_shows_three_real_patterns_and_the_test_has_the_fourth():
    t = read_metadata(REAL/'metadata')
    seen, every = (group_patterns(t[t.dataset == 'train'], extend=e) for e in ('seen', 'rotations'))
    assert (len(seen), len(every)) == (3, 4)
    test = t[t.dataset == 'test'].drop_duplicates(['experiment', 'plate']).pivot(index='experiment', columns='plate', values='plate_group').astype(int)
    known = [set(map(tuple, o.to_numpy())) for o in (seen, every)]
    assert sum(tuple(o) not in known[0] for o in test.to_numpy()) == 4 and all(tuple(o) in known[1] for o in test.to_numpy())

@pytest.mark.real('metadata')
def test_real_plates_hold_rotations_only():
    t = read_metadata(REAL/'metadata')
    maps = t.drop_duplicates(['experiment', 'plate']).pivot(index='experiment', columns='plate', values='plate_group').astype(int)
    assert len(maps) == 51 and maps.shape[1] == 4
    for _, groups in maps.iterrows(): assert [(groups[p] - groups[1]) % 4 for p in (1, 2, 3, 4)] == [0, 1, 2, 3]

@pytest.mark.real('metadata')
def test_real_groups_derived_from_labels_rotate_too(tmp_path):
    for name in ('train.csv', 'train_controls.csv', 'test.csv', 'sirna_int_to_name.csv'): (tmp_path/name).symlink_to(REAL/'metadata'/name)
    t = read_metadata(tmp_path)
    maps = t[t.dataset == 'train'].drop_duplicates(['experiment', 'plate']).pivot(index='experiment', columns='plate', values='plate_group').astype(int)
    assert len(maps) == 33
    for _, groups in maps.iterrows(): assert [(groups[p] - groups[1]) % 4 for p in (1, 2, 3, 4)] == [0, 1, 2, 3]
