"The simulated screen: layout, bad input, honesty of the pixels, brightness, what real images say."
import hashlib, os

import cv2
import numpy as np
import pandas as pd
import pytest

import helpers
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import (CELL_TYPES, SITE_COLUMNS, control_wells,
                                       real_data, read_metadata, treatment_wells)
from rcic_fastai.screen.simulate import layout
from rcic_fastai.screen.simulate.batches import Studio, batch_effects, batch_stats, default_field, plate_effects
from rcic_fastai.screen.simulate.cells import MORPHOLOGY, draw_site, morphology, phenotype
from rcic_fastai.screen.simulate.layout import REAL_TEST, screen_layout, simulate_screen

WELLS = treatment_wells()[5::7]
SMALL = dict(experiments='HUVEC-01,RPE-08', sirnas=4, size=64, plates=2, controls=2, progress=False)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    dest = tmp_path_factory.mktemp('sim')/'screen'
    return dest, simulate_screen(dest, n_workers=1, **SMALL)


@pytest.fixture(scope='module')
def studio():
    return Studio(('HUVEC-01', 'HUVEC-02', 'HEPG2-01', 'RPE-01', 'U2OS-01'), sirnas=12)


# ---- files

def test_tree_and_tables(screen):
    dest, table = screen
    assert list(table.columns) == SITE_COLUMNS
    pd.testing.assert_frame_equal(table, read_metadata(dest))
    raw = pd.read_csv(dest/'metadata.csv')
    assert list(raw.columns) == SITE_COLUMNS[:-1] and not raw.isna().any().any()
    want = {f'images/{r.dataset}/{r.experiment}/Plate{r.plate}/{r.well}_s{r.site}_w{w}.png' for r in table.itertuples()
            for w in range(1, 7)} | {'metadata.csv'}
    assert set(contents(dest)) == want
    for f in list(dest.rglob('*.png'))[:20]:
        im = cv2.imread(str(f), cv2.IMREAD_UNCHANGED)
        assert im.shape == (64, 64) and im.dtype == np.uint8


def test_the_groups_that_were_drawn_are_the_ones_metadata_derives(screen):
    _, table = screen
    layout = screen_layout('HUVEC-01,RPE-08', sirnas=4, plates=2, controls=2)
    known = table.plate_group.notna()
    assert (table.plate_group[known].astype(int) == layout.plate_group[known]).all() and known.any()


def test_same_seed_same_bytes_for_any_number_of_workers(screen, tmp_path):
    simulate_screen(tmp_path/'again', n_workers=2, **SMALL)
    assert contents(tmp_path/'again') == contents(screen[0])


def test_screens_whose_sites_and_cameras_were_drawn_in_another_test_have_the_same_bytes(screen, tmp_path):
    for n, change in enumerate((dict(experiments='RPE-08', size=32), dict(experiments='RPE-08'), {})):
        helpers.simulate_screen(tmp_path/f'{n}', n_workers=1, **{**SMALL, **change})
    assert contents(tmp_path/'2') == contents(screen[0])
    assert layout.Studio is Studio


def test_another_seed_gives_another_screen(screen, tmp_path):
    simulate_screen(tmp_path/'other', n_workers=1, seed=1, **SMALL)
    a, b = contents(screen[0]), contents(tmp_path/'other')
    pngs = [k for k in a if k.endswith('.png') and k in b]
    assert pngs and all(a[k] != b[k] for k in pngs)


def test_an_experiment_does_not_depend_on_which_others_are_drawn(screen, tmp_path):
    simulate_screen(tmp_path/'alone', n_workers=1, **{**SMALL, 'experiments': 'HUVEC-01'})
    both = contents(screen[0])
    for name, data in contents(tmp_path/'alone').items():
        if name.endswith('.png'): assert both[name] == data


def test_one_site_one_plate_no_controls(tmp_path):
    table = simulate_screen(tmp_path/'s', 'U2OS-04', sirnas=2, size=48, sites=1, plates=1, controls=0, n_workers=1, progress=False)
    assert table.well_type.value_counts().to_dict() == dict(treatment=2, negative_control=1)
    assert set(table.dataset) == {'test'} and table.sirna_id.max() == 2


@pytest.mark.parametrize('workers', [1, 2])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch, workers):
    real = Studio.site
    def site(self, experiment, plate, well, *args):
        if well == 'C03': raise RuntimeError('stop')
        return real(self, experiment, plate, well, *args)
    monkeypatch.setattr(Studio, 'site', site)
    threads = cv2.getNumThreads()
    with pytest.raises(RuntimeError): simulate_screen(tmp_path/'s', n_workers=workers, **SMALL)
    assert os.listdir(tmp_path) == [] and cv2.getNumThreads() == threads


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(layout.cv2, 'imwrite', lambda *a: False)
    with pytest.raises(ScreenError, match='w1.png could not be written'): simulate_screen(tmp_path/'s', n_workers=1, **SMALL)
    assert os.listdir(tmp_path) == []


def test_empty_folder_is_used_and_a_full_one_is_not(tmp_path):
    (tmp_path/'empty').mkdir()
    simulate_screen(tmp_path/'empty', n_workers=1, **{**SMALL, 'experiments': 'HUVEC-01', 'size': 32})
    (tmp_path/'file').write_text('x')
    for name in ('empty', 'file'):
        with pytest.raises(ScreenError, match='remove it or give another'): simulate_screen(tmp_path/name, **SMALL)
    assert (tmp_path/'file').read_text() == 'x'


# ---- the bytes drawn, pinned: code may change, a drawn screen may not

PINNED = [  # arguments, checksum of names and files, mean of all pixels by channel
    (SMALL, 'a1c580a956885292', (3.493, 17.447, 11.352, 10.061, 1.87, 9.899)),
    (dict(experiments='HEPG2-08,U2OS-04', sirnas=3, size=48, sites=1, plates=1, controls=1, seed=5, difficulty=2.,
          field=.3, progress=False), 'dee0dd3b182bd01e', (7.605, 38.645, 16.164, 19.812, 20.835, 17.046)),
    (dict(experiments='HUVEC-30', sirnas=2, size=160, sites=1, plates=2, controls=0, seed=1, difficulty=0,
          test='HUVEC-30', progress=False), '78ae04a4c16d117a', (3.652, 17.6, 7.58, 9.344, 1.957, 5.933))]
PRIMITIVES = '51740d0d5922996a'  # checksum of `primitives` on the machine where the checksums above were taken


def primitives():
    "What OpenCV, numpy and the PNG writer make of fixed noise; other processors and versions may round otherwise."
    noise = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    y, x = np.mgrid[:64, :64].astype(np.float32)*.7
    lines = np.zeros((64, 64), np.uint8)
    cv2.polylines(lines, [np.array([[30, 50], [700, 300], [100, 900]], np.int32)], False, 255, 1, cv2.LINE_AA, 4)
    made = [cv2.GaussianBlur(noise, (0, 0), s) for s in (.7, 1.8, 2.5, 4)] + [lines, np.exp(noise), np.abs(noise)**.77]
    made += [cv2.resize(noise, (k, k), interpolation=how) for k, how in ((20, cv2.INTER_AREA), (150, cv2.INTER_CUBIC))]
    made += [cv2.remap(noise, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), cv2.phase(noise, noise[::-1])]
    made += [cv2.imencode('.png', lines, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1], noise.mean(1), noise.std(1)]
    return hashlib.sha256(b''.join(a.tobytes() for a in made)).hexdigest()[:16]


@pytest.fixture(scope='module', params=range(len(PINNED)))
def pinned(request, tmp_path_factory):
    kwargs, checksum, means = PINNED[request.param]
    dest = tmp_path_factory.mktemp('pinned')/'screen'
    simulate_screen(dest, n_workers=1, **kwargs)
    return contents(dest), checksum, means


def test_the_bytes_drawn_have_not_changed(pinned):
    files, checksum, _ = pinned
    if primitives() != PRIMITIVES: pytest.skip('OpenCV or numpy round otherwise on this machine')
    assert hashlib.sha256(b''.join(n.encode() + data for n, data in files.items())).hexdigest()[:16] == checksum


def test_the_brightness_drawn_has_not_changed(pinned):
    "The same on every machine, to a fiftieth of a gray level."
    files, _, means = pinned
    def read(data): return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    drawn = [np.mean([read(data) for name, data in files.items() if name.endswith(f'w{w}.png')]) for w in range(1, 7)]
    np.testing.assert_allclose(drawn, means, atol=.02)


# ---- layout

@pytest.mark.parametrize('sirnas,plates,controls', [(1108, 4, 30), (48, 4, 30), (50, 4, 7), (5, 2, 0), (277, 1, 1)])
def test_layout(sirnas, plates, controls):
    experiments = [f'HUVEC-{i:02}' for i in range(1, 9)]
    t = screen_layout(experiments, sirnas=sirnas, plates=plates, controls=controls, seed=3)
    assert t.site_id.is_unique and len(t) == 2*len(t.well_id.unique())
    t = t[t.site == 1]
    kinds = {k: set(g.well) for k, g in t.groupby('well_type')}
    assert kinds['negative_control'] == {'B02'} and kinds['treatment'] <= set(treatment_wells())
    assert kinds.get('positive_control', set()) <= set(control_wells()['positive_control'])
    assert set(t[t.well_type == 'negative_control'].sirna_id) == {sirnas + controls}
    treated = t[t.well_type == 'treatment']
    for _, g in treated.groupby('experiment'): assert sorted(g.sirna_id) == list(range(sirnas))
    for _, g in t[t.well_type == 'positive_control'].groupby(['experiment', 'plate']):
        assert sorted(g.sirna_id) == list(range(sirnas, sirnas+controls))
    groups = treated.groupby(['experiment', 'plate']).sirna_id.agg(frozenset)
    assert groups.nunique() == plates
    turns = {tuple(groups[e]) for e in experiments}
    first = list(groups[experiments[0]])
    assert turns <= {tuple(first[k:] + first[:k]) for k in range(plates)}
    if plates == 4: assert len(turns) > 1
    names = t.groupby('sirna').sirna_id.nunique()
    assert (names == 1).all() and 'EMPTY' in names


def test_well_positions_differ_between_experiments():
    t = screen_layout('HUVEC-01,HUVEC-02', sirnas=200, seed=0)
    t = t[(t.site == 1) & (t.well_type == 'treatment')].pivot(index='sirna_id', columns='experiment', values='well')
    assert (t['HUVEC-01'] == t['HUVEC-02']).mean() < .05


def test_dataset_follows_the_real_test_set_unless_named():
    t = screen_layout('HUVEC-16,HUVEC-17,U2OS-05', sirnas=8)
    assert t.groupby('experiment').dataset.first().to_dict() == {'HUVEC-16': 'train', 'HUVEC-17': 'test', 'U2OS-05': 'test'}
    t = screen_layout('HUVEC-16,HUVEC-17', sirnas=8, test='HUVEC-16')
    assert t.groupby('experiment').dataset.first().to_dict() == {'HUVEC-16': 'test', 'HUVEC-17': 'train'}
    assert set(screen_layout('HUVEC-17', sirnas=8, test=[]).dataset) == {'train'}


@pytest.mark.parametrize('change,says', [
    (dict(experiments=[]), 'no experiments'), (dict(experiments='HELA-01'), "'HELA'"), (dict(experiments='HUVEC'), "like 'HUVEC-01'"),
    (dict(experiments='huvec-01'), "like 'HUVEC-01'"), (dict(experiments=['HUVEC-01', 'HUVEC-01']), 'named twice'),
    (dict(sirnas=1109), 'at most 1108'), (dict(sirnas=278, plates=1), 'at most 277'), (dict(sirnas=3), 'without treatments'),
    (dict(sirnas=0), 'sirnas is 0'), (dict(sirnas=4.5), 'sirnas is 4.5'), (dict(size=31), 'size is 31'), (dict(size='128'), 'size is'),
    (dict(sites=0), 'sites is 0'), (dict(plates=0), 'plates is 0'), (dict(controls=31), 'controls is 31'), (dict(seed=-1), 'seed is -1'),
    (dict(test=['RPE-01']), 'RPE-01 is not among'), (dict(n_workers=-1), 'n_workers is -1'), (dict(field=0), 'field is 0'),
    (dict(field='all'), "field is 'all'"),
    (dict(difficulty=-1), 'difficulty is -1'), (dict(difficulty='hard'), "difficulty is 'hard'")])
def test_bad_input_says_what_to_do_and_writes_nothing(tmp_path, change, says):
    with pytest.raises(ScreenError) as e:
        simulate_screen(tmp_path/'s', **{**dict(experiments='HUVEC-01', sirnas=8, size=64, progress=False), **change})
    assert says in str(e.value) and '\n' not in str(e.value)
    assert os.listdir(tmp_path) == []


# ---- honesty: the siRNA reaches the pixels through named morphology only

def test_an_id_without_an_effect_leaves_no_trace(studio):
    a, b = (studio.site('RPE-01', 1, 'C05', 1, i, 'negative_control') for i in (3, 11))
    assert (a == b).all()


def test_phenotype_is_data_and_does_not_know_the_batch():
    p = phenotype(7, 'RPE', seed=2)
    assert list(p) == list(MORPHOLOGY.index) and p == phenotype(7, 'RPE', seed=2) != phenotype(8, 'RPE', seed=2)
    assert p != phenotype(7, 'HUVEC', seed=2)
    assert set(phenotype(7, 'RPE', well_type='negative_control').values()) == {0.}
    with pytest.raises(ScreenError, match='HELA'): phenotype(1, 'HELA')


def test_strength_has_many_weak_ones_and_depends_on_the_cell_type():
    spread = MORPHOLOGY['spread'].to_numpy()
    size = {ct: np.array([np.sqrt(np.mean((np.array(list(phenotype(i, ct).values()))/spread)**2)) for i in range(300)]) for ct in CELL_TYPES}
    rel = size['RPE']/np.median(size['RPE'])
    assert (rel < .7).mean() > .15 and (rel > 1.2).mean() > .1 and rel.min() < .35
    assert size['HUVEC'].mean() > size['RPE'].mean() > size['U2OS'].mean()


def test_positive_controls_are_stronger():
    def strength(kind): return np.mean([np.square(list(phenotype(i, 'RPE', 0, kind).values())).mean() for i in range(150)])
    assert strength('positive_control') > 1.5*strength('treatment') > 0


def nuclei(light):
    "Number, median area and total area of bright connected regions in w1."
    im = cv2.normalize(cv2.GaussianBlur(light[0], (0, 0), 1), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    level, _ = cv2.threshold(im, 0, 255, cv2.THRESH_OTSU)
    area = cv2.connectedComponentsWithStats((im > .9*level).astype(np.uint8))[2][1:, 4]
    area = area[area > 25]
    return len(area), np.median(area), area.sum()

def energy(im, sigma): return (im - cv2.GaussianBlur(im, (0, 0), sigma)).std()

MEASURES = dict(cell_count=lambda s: nuclei(s)[0], nucleus_size=lambda s: nuclei(s)[1], actin_fibers=lambda s: energy(s[2], 3),
                nucleolus_size=lambda s: energy(s[3], 3), er_contrast=lambda s: energy(s[1], 3), mito_count=lambda s: s[4].mean(),
                golgi_count=lambda s: energy(s[5], 3), gaps=lambda s: (s[2] < .12).mean(), chromatin_grain=lambda s: energy(s[0], 2),
                round_cells=lambda s: (s/s.mean((1, 2), keepdims=True)).min(0).max())

@pytest.mark.parametrize('name', MEASURES)
def test_a_named_parameter_is_drawn(name):
    def mean(sign):
        m = morphology('U2OS', {'round_cells': -5., name: sign*2*MORPHOLOGY.loc[name, 'spread']} if name != 'round_cells' else {name: sign*2.})
        return np.mean([MEASURES[name](draw_site(m, 'U2OS', .5, np.random.default_rng(k))) for k in range(6)])
    assert mean(1) > 1.1*mean(-1)


@pytest.mark.parametrize('name', list(MORPHOLOGY.index))
def test_every_parameter_changes_pixels(name):
    a, b = (draw_site(morphology('HUVEC', {name: s}), 'HUVEC', .25, np.random.default_rng(2))
            for s in ((-4, 4) if name == 'mitoses' else (-.8, .8)))
    assert (a != b).any() and np.isfinite(a).all() and np.isfinite(b).all()


@pytest.mark.parametrize('cell_type', CELL_TYPES)
@pytest.mark.parametrize('shift', [-2.5, 2.5])
def test_extreme_morphology_still_draws(cell_type, shift):
    m = morphology(cell_type, {k: shift*s for k, s in MORPHOLOGY['spread'].items()})
    for field in (.1, .5): assert np.isfinite(draw_site(m, cell_type, field, np.random.default_rng(0))).all()


def texture_features(im):
    x = (im - im.mean((1, 2), keepdims=True))/(im.std((1, 2), keepdims=True) + 1e-3)
    bands = [[cv2.GaussianBlur(c, (0, 0), a) - cv2.GaussianBlur(c, (0, 0), b) for a, b in ((.5, 1), (1, 2), (2, 4), (4, 8))] for c in x]
    return [np.log(np.abs(d).mean() + 1e-4) for b in bands for d in b] + [np.corrcoef(bands[i][k].ravel(), bands[j][k].ravel())[0, 1]
            for i in range(6) for j in range(i) for k in (1, 2)]

def test_texture_names_sirnas_across_batches_and_brightness_does_not():
    "Nearest class mean over two batches names the wells of a third."
    n, experiments = 24, ('HUVEC-01', 'HUVEC-02', 'HUVEC-03')
    studio = Studio(experiments, sirnas=n)
    sites = [[[studio.site(e, 1 + i%4, WELLS[i], s, i).astype(np.float32) for s in (1, 2)] for i in range(n)] for e in experiments]
    def accuracy(features):
        f = np.array([[np.mean([features(s) for s in w], 0) for w in e] for e in sites])
        f = (f - f.mean(1, keepdims=True))/f.std(1, keepdims=True)
        d = ((f[2][:, None] - f[:2].mean(0)[None])**2).sum(-1)
        return (d.argmin(1) == np.arange(n)).mean()
    assert accuracy(texture_features) > 10/n
    assert accuracy(lambda s: s.mean((1, 2))) < 6/n


# ---- sites, wells, batches

def test_two_sites_of_a_well_share_the_well_not_the_pixels(studio):
    a, b = (studio.site('HUVEC-01', 1, 'C05', s, 3) for s in (1, 2))
    assert abs(np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1]) < .3


def test_brightness_follows_the_real_table():
    "A few wells of each plate; bench/calibration.py measures all 51 experiments."
    errors = []
    for e in ('HUVEC-15', 'HEPG2-05', 'RPE-07', 'U2OS-04'):
        studio = Studio((e,), sirnas=200, size=64)
        ims = np.stack([studio.site(e, 1 + i%4, WELLS[i], s, 7*i) for i in range(24) for s in (1, 2)])
        mean, std, source = batch_stats(e)
        assert source == e
        errors += [ims.mean((0, 2, 3))/mean - 1, ims.std((0, 2, 3))/std - 1]
    errors = np.abs(errors)
    assert np.median(errors) < .1 and errors.max() < .3, (np.median(errors), errors.max())


def test_difficulty_scales_the_batch_and_not_the_phenotype():
    easy, real = (batch_effects('RPE-02', 0, d) for d in (0., 1.))
    assert set(easy.shift.values()) == {0.} and easy.potency == 1 and (easy.mix == np.eye(6)).all()
    assert max(map(abs, real.shift.values())) > .1 and real.potency < 1 and (real.mix - np.eye(6)).max() > .02
    np.testing.assert_allclose(real.mix.sum(1), 1, atol=1e-6)
    a, b = (Studio(('RPE-02',), sirnas=4, size=48, difficulty=d).site('RPE-02', 1, 'C05', 1, 3) for d in (0., 1.))
    assert (a != b).any() and phenotype(3, 'RPE') == phenotype(3, 'RPE')


def test_untreated_wells_keep_their_cells_and_the_rim_differs():
    camera = Studio(('HEPG2-05',), sirnas=4, size=48).cameras['HEPG2-05']
    treated, untreated = (camera.culture(2, 'C05', kind)[-1]['gaps'] for kind in ('treatment', 'negative_control'))
    assert treated > 1 and untreated == 0
    assert camera.culture(2, 'B05')[-1]['cell_count'] < 0 == camera.culture(2, 'C05')[-1]['cell_count']


def test_a_linear_classifier_on_brightness_names_the_batch_not_the_sirna():
    "The small version of what bench/calibration.py measures: nearest class mean on whitened channel means and deviations."
    names, n = ('HUVEC-01', 'HUVEC-05', 'HUVEC-15', 'RPE-01', 'HUVEC-17'), 24
    studio = Studio(names, sirnas=n, size=64)
    ims = np.stack([[[studio.site(e, 1 + i%4, WELLS[i], s, i) for s in (1,)] for i in range(n)] for e in names])
    x = np.log(np.concatenate([ims.mean((-1, -2)), ims.std((-1, -2))], -1) + .5).mean(2)
    def accuracy(train, test):  # [class, sample, feature]
        noise = np.mean([np.cov(c.T) for c in train], 0) + 1e-3*np.eye(12)
        to = np.linalg.cholesky(np.linalg.inv(noise))
        d = (((test[:, :, None] - train.mean(1))@to)**2).sum(-1)
        return (d.argmin(-1) == np.arange(len(train))[:, None]).mean()
    half = np.arange(n)//4%2 == 0
    assert accuracy(x[:, half], x[:, ~half]) >= .9
    sirna = x[[0, 1, 2]].transpose(1, 0, 2), x[[4]].transpose(1, 0, 2)
    assert accuracy(*sirna) <= 4/n


def test_an_experiment_the_table_lacks_borrows_from_its_cell_type():
    sources = {batch_stats(f'RPE-{i}')[2] for i in range(30, 60)}
    assert len(sources) > 3 and all(s.startswith('RPE-') for s in sources)
    assert batch_stats('RPE-30', seed=1)[2] == batch_stats('RPE-30', seed=1)[2]


def test_plates_differ_by_up_to_two(studio):
    factors = np.concatenate([plate_effects(f'HUVEC-{i:02}', 4, 0).factor for i in range(1, 25)])
    assert .5 <= factors.min() < .85 and 1.15 < factors.max() <= 2
    by_experiment = factors.reshape(24, 4, 6)
    assert (by_experiment.max(1)/by_experiment.min(1)).max() <= 2
    np.testing.assert_allclose(by_experiment.mean(1), 1)


def test_field():
    assert [default_field(s) for s in (64, 128, 192, 256, 512)] == [.5, .5, .75, 1, 1]


# ---- against the real tables and images

@pytest.mark.real('metadata')
def test_real_test_experiments():
    real = pd.read_csv(real_data()/'metadata'/'test.csv').experiment.unique()
    assert sorted(REAL_TEST) == sorted(real)


@pytest.mark.real('images')
@pytest.mark.parametrize('cell_type,tolerance', [('HUVEC', .35), ('RPE', .35), ('U2OS', .35), ('HEPG2', .5)])
def test_nuclei_are_as_many_and_as_large_as_in_real_untreated_wells(cell_type, tolerance):
    files = sorted((real_data()/'images'/'train'/f'{cell_type}-01').glob('Plate*/B02_s1_w1.png'))
    assert files
    def crowd(light):  # nuclei touch, so the number is the bright area in median nuclei
        count, area, total = nuclei(light)
        return total/area, area
    real = np.mean([crowd([cv2.imread(str(f), cv2.IMREAD_UNCHANGED).astype(np.float32)]) for f in files], 0)
    drawn = np.mean([crowd(draw_site(morphology(cell_type), cell_type, 1., np.random.default_rng(k))) for k in range(3)], 0)
    assert np.abs(drawn/real - 1).max() < tolerance, (real, drawn)
