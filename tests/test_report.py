"Figures and the report: groups never look alike, legends never vanish, and the page fits a narrow window."
import html, re, shutil, subprocess

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from matplotlib.legend import Legend

from rcic_fastai.core import ScreenError
from rcic_fastai.embed.plots import group_styles, legend_below, principal_plane, scatter_groups, show_correction
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, toy_profiles
from rcic_fastai.results.evaluate import ScreenResult
from rcic_fastai.results.plots import accuracy_plot, embedding_map, right_wrong_map, training_curve
from rcic_fastai.results.report import write_report

EMB = toy_profiles(['HUVEC-01', 'RPE-01'], ['HUVEC-17'], n_sirnas=12, seed=1)
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


pytestmark = pytest.mark.usefixtures('close_figures')


def legend_texts(fig): return [[t.get_text().strip() for t in legend.get_texts()] for legend in fig.findobj(Legend)]


def look(handle): return tuple(handle.get_facecolor()[0]), handle.get_paths()[0].vertices.tobytes()


# ---- groups

@pytest.mark.parametrize('n', [1, 2, 10, 11, 33, 51, 90])
def test_no_two_groups_look_alike(n):
    "with ten colors alone, DMSO and a compound would share one"
    names = ['DMSO', *(f'compound {i}' for i in range(n - 1))]
    styles = group_styles(names)
    assert list(styles) == names and len({tuple(s.values()) for s in styles.values()}) == n
    _, ax = plt.subplots()
    handles = scatter_groups(ax, np.zeros((3*n, 2)), names*3, most=n)
    assert len({look(h) for h in handles}) == n


def test_gray_is_the_color_of_no_group():
    _, ax = plt.subplots()
    *named, more = scatter_groups(ax, np.zeros((40, 2)), [*range(38), 38, 38], most=20)
    assert more.get_label() == '19 more' and look(more) not in map(look, named)
    assert '38' in [h.get_label() for h in named]                           # the largest is named


def test_more_groups_than_looks():
    with pytest.raises(ScreenError, match='91 groups cannot all look different'): group_styles(range(91))


def test_points_without_a_name_are_gray():
    _, ax = plt.subplots()
    handles = scatter_groups(ax, np.zeros((3, 2)), ['a', None, np.nan])
    assert [h.get_label() for h in handles] == ['a', 'no name']


@pytest.mark.parametrize('n', [1, 10, 11, 30, 31, 60])
def test_legends_never_vanish(n):
    emb = EMB.assign(Metadata_plate=pd.factorize(EMB.Metadata_well_id)[0] % n)
    for fig in (embedding_map(emb, 'plate'), show_correction(emb, emb, 'plate')):
        drawn, = legend_texts(fig)
        wells = emb[(emb.Metadata_well_type == 'treatment') | (fig.axes[0].get_title() != 'before')]
        groups = wells.Metadata_plate.nunique()
        assert len(drawn) == min(groups, 31) and (groups <= 30 or drawn[-1] == f'{groups - 30} more')


def test_a_legend_stays_inside_the_figure():
    fig, ax = plt.subplots(figsize=(5, 4), layout='constrained')
    legend = legend_below(fig, scatter_groups(ax, np.zeros((120, 2)), [f'experiment {i % 40}' for i in range(120)]))
    fig.canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= ax.get_window_extent().y0


# ---- maps

def test_axes_are_principal_components():
    from sklearn.decomposition import PCA
    x = emb_features(EMB).astype(np.float64)
    want = PCA(2).fit_transform(x/np.linalg.norm(x, axis=1, keepdims=True))
    got = principal_plane(EMB)
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-5)


def test_a_map_by_sirna_shows_a_few_and_is_laid_out_by_training_wells():
    fig = embedding_map(EMB, 'sirna', n_sirnas=4)
    assert len(legend_texts(fig)[0]) == 4
    is_test = (EMB.Metadata_dataset == 'test').to_numpy()
    moved = make_emb_table(emb_metadata(EMB), np.where(is_test[:, None], -emb_features(EMB), emb_features(EMB)))
    other = embedding_map(moved, 'sirna', n_sirnas=4)
    full = [[c.get_offsets() for c in f.axes[0].collections if c.get_facecolor().size] for f in (fig, other)]
    assert len(full[0]) == 4
    for a, b in zip(*full): np.testing.assert_allclose(a, b, atol=1e-9)      # training points stay where they were
    hollow = [np.vstack([c.get_offsets() for c in f.axes[0].collections if not c.get_facecolor().size]) for f in (fig, other)]
    assert not np.allclose(*hollow)


def test_before_and_after_adaptation():
    fig = embedding_map(EMB, 'experiment', 'sirna', adapted=EMB)
    assert [ax.get_title() for ax in fig.axes] == ['as embedded', 'adapted']*2
    before, after = fig.axes[:2]
    for a, b in zip(before.collections, after.collections): np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())


# ---- the page

def result(columns):
    names = ['', *['HUVEC', 'RPE']*2]
    groups = ['all', 'cell_type', 'cell_type', 'experiment', 'experiment']
    rows = [dict(column=c, protocol='inductive', measure='well accuracy', group=g, name=n, cell_type=n, value=.5, low=.4, high=.6, n_experiments=1, chance=.1, p=np.nan)
            for c in columns for g, n in zip(groups, names)]
    return ScreenResult(pd.DataFrame(rows), dict.fromkeys(columns, {}), [], dict(level=.95, n_boot=10, seed=0))


@pytest.fixture
def page(tmp_path):
    history = pd.DataFrame(dict(stage='all', train_loss=[2., 1.], valid_loss=[2., 1.5], accuracy=[.1, .2]))
    r = pd.DataFrame([('HUVEC-17', p, 'B02', True) for p in range(1, 5)], columns=['experiment', 'plate', 'well', 'right'])
    scores = result([f'a rather long name of a model number {i} (inductive)' for i in range(3)])
    figures = [accuracy_plot(scores), training_curve(history), embedding_map(EMB, 'experiment', 'sirna', adapted=EMB), right_wrong_map(r)]
    wide = pd.DataFrame({f'a_long_column_{i}': [1/3, 2.] for i in range(12)})
    return write_report(tmp_path/'report.html', 'R&D <report>' + 'x'*80, [('Figures', 'a < b', figures), ('Tables', '', [scores.table(), wide, '<p>own <b>HTML</b></p>'])])


def test_figures_are_as_wide_as_a_column():
    for fig in (embedding_map(EMB, 'experiment', 'sirna'), accuracy_plot(result('abc'))): assert fig.get_size_inches()[0] == 5


def test_every_prediction_is_in_the_legend_of_accuracies():
    names = [f'model {i}' for i in range(14)]
    assert legend_texts(accuracy_plot(result(names))) == [names]


def test_a_plate_map_explains_both_colors_even_where_all_is_right():
    r = pd.DataFrame(dict(experiment='HUVEC-17', plate=[1, 2, 3], well='B02', right=True))
    assert legend_texts(right_wrong_map(r)) == [['right', 'wrong']]


def test_texts_are_escaped_and_tags_are_closed(page):
    text = page.read_text()
    assert '<report>' not in text and 'R&amp;D &lt;report&gt;' in text and 'a &lt; b' in text and '<p>own <b>HTML</b></p>' in text
    for tag in ('div', 'table', 'h2', 'p', 'b'): assert len(re.findall(f'<{tag}[ >]', text)) == text.count(f'</{tag}>')
    assert text.count('<div class="pics">') == 1 and text.count('<img') == 4


def test_pictures_are_described_by_the_titles_in_them(tmp_path):
    "Several pictures of a section are not all called by its heading"
    figs = []
    for titles in (['Plate 1\nof <A>', 'Plate 2'], ['5 \\$'], ['']):
        fig, axs = plt.subplots(1, len(titles), squeeze=False)
        for ax, t in zip(axs[0], titles): ax.set_title(t)
        figs.append(fig)
    text = write_report(tmp_path/'r.html', 'r', [('Plates', '', figs)]).read_text()
    assert re.findall('<img alt="(.*?)"', text) == ['Plates: Plate 1 of &lt;A&gt;, Plate 2', 'Plates: 5 $', 'Plates'] and '</main></html>' in text


def test_what_a_report_cannot_show(tmp_path):
    with pytest.raises(ScreenError, match=r'cannot show a int \(Sites\)'): write_report(tmp_path/'r.html', 'r', [('Sites', '', [3])])
    assert not list(tmp_path.iterdir())


def test_no_marker_of_an_accuracy_is_cut():
    "At 0 and at 1, in the first and in the last line"
    scores = result('ab')
    fig = accuracy_plot(ScreenResult(scores.rows.assign(value=[0., 1., 0., 1., 0.]*2), scores.columns, [], dict(level=.95, n_boot=10, seed=0)))
    fig.canvas.draw()
    ax = fig.axes[0]
    bars = [line for line in ax.lines if line.get_marker() == '|']
    assert bars and all(not line.get_clip_on() for line in ax.lines if line.get_marker() in 'o|')
    frame = ax.get_window_extent()
    for line in bars:
        y, half = ax.transData.transform([0, line.get_ydata()[0]])[1], line.get_markersize()/2*fig.dpi/72
        assert frame.y0 <= y - half and y + half <= frame.y1


def test_a_dark_page_has_dark_figures(tmp_path):
    "Paper, words and lines turn round; colors and pictures stay"
    import base64, io
    fig, axs = plt.subplots(1, 2, figsize=(4, 2))
    axs[0].imshow(np.random.default_rng(0).random((8, 8, 3)))
    axs[0].axis('off')
    axs[1].scatter([0, 1], [0, 1], c='#d95f02')
    axs[1].plot([0, 1], [1, 0], 'k-')
    axs[1].set_title('title')
    text = write_report(tmp_path/'r.html', 'r', [('Sites', '', [fig])]).read_text()
    dark, light = (plt.imread(io.BytesIO(base64.b64decode(o)))[..., :3] for o in re.findall('image/png;base64,([^"]+)"', text))
    is_picture = np.ptp(light, axis=2) > .3
    assert is_picture.mean() > .1 and (np.abs(dark - light)[is_picture] < .01).mean() > .9       # but for their edges
    assert (light.mean(2) > .98).mean() > .4 and (dark.mean(2) < .12).mean() > .4 and not (dark.mean(2) > .98).any()
    assert 'media="screen and (prefers-color-scheme:dark)"' in text                    # paper stays white


@pytest.mark.skipif(not CHROMIUM, reason='needs Chromium')
@pytest.mark.parametrize('width', [400, 1300])
def test_the_page_fits_the_window(page, tmp_path, width):
    "A browser lays the page out in a frame; only tables may be wider than it, and those scroll."
    frame = tmp_path/'frame.html'
    frame.write_text(f'''<iframe width={width} height=3000 srcdoc="{html.escape(page.read_text(), quote=True)}"
onload="const d=this.contentDocument;const w=[...d.images].map(i=>Math.round(i.getBoundingClientRect().width));
document.body.innerHTML='<p id=found>'+d.documentElement.scrollWidth+' '+w.join(' ')+'</p>'"></iframe>''')
    done = subprocess.run([CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=5000', '--dump-dom',
                           frame.as_uri()], capture_output=True, text=True, timeout=120)
    page_width, *pictures = map(int, re.search(r'id="found">([\d ]+)<', done.stdout)[1].split())
    assert page_width <= width and len(pictures) == 4 and all(330 <= p <= 480 for p in pictures)
