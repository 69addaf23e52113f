"Figures: plate maps of labels, numbers and booleans."
from types import SimpleNamespace
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from rcic_fastai.results.plots import plate_array, plate_map


pytestmark = pytest.mark.usefixtures('close_figures')


def test_plate_array():
    t = pd.DataFrame(dict(well=['B02', 'B02', 'B02', 'C03', 'D04'], n=[1, 2, 6, 4, None], c=['a', 'b', 'b', None, 'z'],
                          f=[True, False, False, True, True]))
    n = plate_array(t, 'n')
    assert n[1, 1] == 3 and n[2, 2] == 4 and np.isnan(n[3, 3]) and np.isfinite(n).sum() == 2
    c = plate_array(t, t.c)
    assert c[1, 1] == 'b' and c[2, 2] is None and c[3, 3] == 'z'
    assert plate_array(t, 'f')[1, 1] == False and plate_array(t, np.arange(5))[3, 3] == 4
    assert plate_array(t, pd.array([1, None, 3, 4, 5], 'Int64'))[1, 1] == 2


@pytest.mark.parametrize('n_labels', [1, 2, 11, 25, 300])
def test_plate_map_labels(n_labels):
    wells = [f'{r}{c:02d}' for r in 'ABCDEFGHIJKLMNOP' for c in range(1, 25)]
    t = pd.DataFrame(dict(well=wells, v=[f's{i % n_labels}' for i in range(384)]))
    ax = plate_map(t, 'v', title='x', text=n_labels < 5)
    im = np.asarray(ax.images[0].get_array())
    assert len({tuple(p) for p in im[..., :3].reshape(-1, 3)}) == min(n_labels, len({tuple(p) for p in im[..., :3].reshape(-1, 3)}))
    if n_labels <= 25: assert len({tuple(p) for p in im[..., :3].reshape(-1, 3)}) == n_labels
    assert (ax.get_legend() is not None) == (n_labels <= 12)


def test_plate_map_numbers_and_booleans():
    t = pd.DataFrame(dict(well=['B02', 'P24', 'A01'], v=[1., 2., 5.], ok=[True, False, True]))
    ax = plate_map(t, 'v', vmin=0, vmax=10)
    assert ax.images[0].get_clim() == (0, 10)
    ax = plate_map(t, 'ok')
    im = np.asarray(ax.images[0].get_array())
    assert im[0, 0, 1] > im[0, 0, 0] and im[15, 23, 0] > im[15, 23, 1]
    ax = plate_map(pd.DataFrame(dict(well=['AF48'], v=[1.])), 'v', shape=(32, 48))
    assert ax.images[0].get_array().shape == (32, 48)
    plate_map(t, 'v', cmap='magma', text=True); plate_map(t, 'ok', colors={'True': 'k', 'False': 'w'})


def test_a_contact_sheet_says_the_dose():
    "A compound at .1 and at 10 is not the same treatment"
    from rcic_fastai.results.plots import contact_sheet
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(site_id=list('abc'), well_id=['E_1_A01', 'E_1_A02', 'E_1_A03'], experiment='E', plate='1', well=['A01', 'A02', 'A03'], site='1',
                              well_type=['treatment', 'treatment', 'negative_control'], sirna=['drug', 'drug', 'DMSO'], dose=[.1, 10, np.nan]))
    pictures = {s: rng.integers(0, 255, (3, 16, 16), np.uint8) for s in 'abc'}
    fig = contact_sheet(SimpleNamespace(table=table, source=pictures, name='x'))
    assert [ax.get_title().split('\n')[1] for ax in fig.axes] == ['drug 0.1', 'drug 10', 'DMSO']


def touching(labels):
    "Return whether texts that are shown touch"
    boxes = [t.get_window_extent() for t in labels if t.get_text() and t.get_visible()]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i+1:])


@pytest.mark.parametrize('wells', [['M07', 'N10', 'O14'], ['A01', 'P02'], ['A01', 'P24'], ['A01', 'AF48'], ['B02', 'C07'], ['C03']])
def test_labels_of_plates_do_not_touch(wells):
    "Each plate shows what any plate has, and its labels are for that part"
    from rcic_fastai.results.plots import plate_maps
    first = pd.DataFrame(dict(experiment='E', plate=1, well=wells, v='a'))
    more = pd.DataFrame(dict(experiment='E', plate=[2, 2], well=['G02', 'H20'], v='b'))
    for t in (first, pd.concat([first, more]), first.assign(v=np.arange(len(wells), dtype=float))):
        fig = plate_maps(t, 'v')
        fig.canvas.draw()
        axs = [ax for ax in fig.axes if ax.get_title()]
        assert all(ax.get_xticklabels() and not touching(ax.get_xticklabels()) and not touching(ax.get_yticklabels()) for ax in axs)
        assert len({tuple(x.get_text() for x in ax.get_xticklabels()) for ax in axs}) == 1
        plt.close(fig)


def test_the_key_of_a_contact_sheet_names_every_channel():
    from rcic_fastai.batch.site import channel_colors
    from rcic_fastai.results.plots import contact_sheet
    table = pd.DataFrame(dict(site_id=['a'], well_id=['E_1_A01'], experiment='E', plate='1', well=['A01'], site='1', well_type='treatment', sirna='drug'))
    class Pictures(dict): channels = ('DNA', 'ER', 'AGP', 'Mito')
    pictures = Pictures(a=np.random.default_rng(0).integers(0, 255, (4, 16, 16), np.uint8))
    screen, keys = SimpleNamespace(table=table, source=pictures, name='x'), {}
    for how in ('composite', '3d+3d', 'panels'):
        fig = contact_sheet(screen, how=how)
        keys[how] = {t.get_text(): h.get_facecolor()[:3] for legend in fig.legends for t, h in zip(legend.get_texts(), legend.get_patches())}
        plt.close(fig)
    np.testing.assert_allclose([*keys['composite'].values()], channel_colors(4, Pictures.channels))
    assert [*keys['composite']] == [*Pictures.channels] and keys['panels'] == {}         # panels have their name in them
    assert keys['3d+3d'] == {'DNA (left)': (1, 0, 0), 'ER (left)': (0, 1, 0), 'AGP (left)': (0, 0, 1), 'Mito (right)': (1, 0, 0)}


def test_a_training_that_held_nothing_out_has_no_empty_chart():
    from rcic_fastai.results.plots import training_curve
    history = pd.DataFrame(dict(stage='all', train_loss=[2., 1.], valid_loss=[np.nan, np.nan], accuracy=[np.nan, np.nan]))
    assert [ax.get_title() for ax in training_curve(history).axes] == ['loss']
    assert len(training_curve(history.assign(accuracy=[.1, .2])).axes) == 2
    plt.close('all')
