"Looking at a screen: counts against a loop, and nuclei and nucleoli where they are drawn"
import numpy as np, pytest
from helpers import refused
from rcic_fastai.screen.look import cell_features, count_nucleoli, count_wells, find_nuclei, otsu_threshold, well_positions
from rcic_fastai.screen.simulate.layout import screen_layout
from rcic_fastai.screen.tables import WELL_TYPES, well_to_rowcol

TABLE = screen_layout(['HUVEC-01', 'RPE-01', 'U2OS-04'], sirnas=60)


@pytest.mark.parametrize('by', ['cell_type', ['experiment', 'plate'], 'plate_group', 'dataset'])
def test_counts_are_the_loop(by):
    got, keys = count_wells(TABLE, by), [by] if isinstance(by, str) else by
    seen = {}
    for s in TABLE.dropna(subset=keys).itertuples():
        d = seen.setdefault(tuple(getattr(s, k) for k in keys), {k: set() for k in ('experiments', 'plates', 'wells', 'sirnas', 'sites', *WELL_TYPES)})
        d['experiments'].add(s.experiment); d['plates'].add((s.experiment, s.plate)); d['wells'].add(s.well_id); d['sites'].add(s.site_id)
        d[s.well_type].add(s.well_id)
        if s.well_type == 'treatment': d['sirnas'].add(s.sirna)
    assert len(got) == len(seen)
    for key, row in got.iterrows():
        key = key if isinstance(key, tuple) else (key,)
        assert row.to_dict() == {k: len(v) for k, v in seen[key].items() if k in row.index}


def test_a_plate_without_treatments_counts_none():
    controls = TABLE[TABLE.well_type != 'treatment']
    assert (count_wells(controls).treatment == 0).all() and (count_wells(controls).sirnas == 0).all()


def test_positions_are_the_loop():
    got = well_positions(TABLE)
    wells = TABLE.drop_duplicates('well_id')
    for r in got.sample(40, random_state=0).itertuples():
        mine = wells[(wells.well == r.well) & (wells.well_type == r.well_type)]
        assert (r.plates, r.labels, r.share) == (len(mine), mine.sirna.nunique(), len(mine)/12) and (r.row, r.column) == well_to_rowcol(r.well)
    assert got.plates.sum() == len(wells)


def discs(at, n=128, r=9., light=1., noise=.02, seed=0):
    "Draw soft discs"
    yy, xx = np.mgrid[:n, :n]
    x = np.random.default_rng(seed).normal(0, noise, (n, n))
    for y, c in at: x += light/(1 + np.exp(np.hypot(yy - y, xx - c) - r))
    return x


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('scale, offset', [(1, 0), (200, 30), (1e-3, -5)])
def test_discs_are_found_where_they_are(seed, scale, offset):
    "Whatever the unit of the picture is"
    rng = np.random.default_rng(seed)
    grid = [(y, x) for y in range(20, 128, 30) for x in range(20, 128, 30)]
    at = [grid[i] for i in rng.choice(len(grid), 9, replace=False)]
    found = find_nuclei(discs(at, seed=seed)*scale + offset)
    assert found.max() == 9 and found.dtype == np.int32
    assert len({int(found[y, x]) for y, x in at} - {0}) == 9
    areas = np.bincount(found.ravel())[1:]
    assert np.allclose(np.sqrt(areas/np.pi), 9, atol=1.2)


def test_touching_discs_are_two():
    found = find_nuclei(discs([(64, 54), (64, 72)]))
    assert found.max() == 2 and found[64, 50] != found[64, 76]
    assert abs(np.subtract(*np.bincount(found.ravel())[1:])) < 40


@pytest.mark.parametrize('k', range(5))
def test_spots_are_counted(k):
    "In one of two nuclei, and none outside"
    x = discs([(40, 40), (90, 90)], r=16., noise=0)
    nuclei = find_nuclei(x, radius=16.)
    for i, (y, c) in enumerate([(34, 34), (46, 34), (34, 46), (46, 46)][:k]): x += discs([(y, c)], r=2., light=.8, noise=0)
    x += discs([(20, 100)], r=2., light=.8, noise=0)
    spots = count_nucleoli(x, nuclei)
    assert spots[nuclei[40, 40] - 1] == k and spots[nuclei[90, 90] - 1] == 0 and len(spots) == 2


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
def test_features_of_every_type(dtype):
    x = np.clip(discs([(30, 30), (90, 90)])*200 + 10, 0, 255).astype(dtype)
    f = cell_features(np.stack([x, x]), ['nucleus', 'nucleoli'])
    assert f['nuclei'] == 2 and abs(f['nucleus_area']/(np.pi*81) - 1) < .2 and abs(f['nucleus_share'] - 2*f['nucleus_area']/128**2) < .005


@pytest.mark.parametrize('picture', [np.zeros((64, 64)), np.full((64, 64), 7), np.random.default_rng(0).normal(size=(8, 8))])
def test_pictures_without_cells(picture):
    assert find_nuclei(picture).shape == picture.shape
    if np.ptp(picture) == 0: assert find_nuclei(picture).max() == 0 and np.isfinite(otsu_threshold(picture))


def test_refusals():
    refused(lambda: count_wells(TABLE, 'dose'), 'no column dose')
    refused(lambda: well_positions(TABLE, ('empty',)), 'no well of type empty')
    refused(lambda: find_nuclei(np.zeros((2, 8, 8))), 'nuclear stain alone')
    refused(lambda: cell_features(np.zeros((2, 8, 8)), ['a', 'b']), 'none is called nucleus')
