"One-to-one assignment and rotations against searches through all possibilities."
from itertools import permutations
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from rcic_fastai.metadata import ScreenError, read_metadata, real_data
from rcic_fastai.assign import assign_plate, group_scores, infer_rotation

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

REAL = real_data()

@pytest.mark.skipif(REAL is None, reason='the real RxRx1 tables are not on this machine (set RCIC_REAL)')
def test_real_plates_hold_rotations_only():
    t = read_metadata(REAL/'metadata')
    maps = t.drop_duplicates(['experiment', 'plate']).pivot(index='experiment', columns='plate', values='plate_group').astype(int)
    assert len(maps) == 51 and maps.shape[1] == 4
    for _, groups in maps.iterrows(): assert [(groups[p] - groups[1]) % 4 for p in (1, 2, 3, 4)] == [0, 1, 2, 3]

@pytest.mark.skipif(REAL is None, reason='the real RxRx1 tables are not on this machine (set RCIC_REAL)')
def test_real_groups_derived_from_labels_rotate_too(tmp_path):
    for name in ('train.csv', 'train_controls.csv', 'test.csv', 'sirna_int_to_name.csv'): (tmp_path/name).symlink_to(REAL/'metadata'/name)
    t = read_metadata(tmp_path)
    maps = t[t.dataset == 'train'].drop_duplicates(['experiment', 'plate']).pivot(index='experiment', columns='plate', values='plate_group').astype(int)
    assert len(maps) == 33
    for _, groups in maps.iterrows(): assert [(groups[p] - groups[1]) % 4 for p in (1, 2, 3, 4)] == [0, 1, 2, 3]
