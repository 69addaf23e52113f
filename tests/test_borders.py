"Names that are orders elsewhere: every one of a screen, through every border, arrives as text."
import rcic_fastai.folder                # learn.to_model
import csv, io, re, warnings
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from types import SimpleNamespace
import matplotlib, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from hypothesis import example, given, settings, strategies as st
from markdown_it import MarkdownIt
from helpers import simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.batch.site import TensorSite, plot_channels
from rcic_fastai.cli import run_command
from rcic_fastai.core import *
from rcic_fastai.embed.index import EmbeddingIndex

from rcic_fastai.model.model import set_provenance
from rcic_fastai.predict.predict import predict_wells, read_predictions, top_path, write_predictions
from rcic_fastai.results.evaluate import evaluate_screen, right_wrong
from rcic_fastai.results.plots import *
from rcic_fastai.results.report import *
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.screen.screen import Screen

def evil(name, terminal=True):
    "A name that is an order to HTML, Markdown, matplotlib, a spreadsheet and a terminal"
    return f'=<img src=x onerror="alert(1)"><b>{name}</b>$\\foo$ [l](javascript:a) ![i](x) | `c` <x@y.zz> {(chr(27) + "[31m")*terminal} \'q\' _$'

class Pixels(ImageSource):
    shape, dtype = (3, 32, 32), np.dtype('uint8')
    def _read(self, site_id, out): out[:] = np.random.default_rng(self._rows[site_id]).integers(0, 255, self.shape)
    def missing(self, ids=None): return []
    def stamp(self, site_id): return site_id

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    "A screen whose every name is hostile, and its pictures"
    t = simulate_screen(tmp_path_factory.mktemp('borders')/'s', ['HUVEC-01', 'RPE-01', 'RPE-02', 'HUVEC-17'], sirnas=4, size=32, plates=2, controls=1,
                        n_workers=1, progress=False)
    for c in ('site_id', 'well_id', 'experiment', 'cell_type', 'sirna'): t[c] = t[c].map(evil)
    t['plate'] = t.plate.map(lambda p: evil(p))
    return Screen(t, Pixels('nowhere', t, [evil(c, False) for c in 'abc']))

@pytest.fixture(scope='module')
def trained(screen):
    learn = screen_learner(screen_dls(screen, valid=[evil('RPE-02')], bs=8, device='cpu', augs=None), 'test_resnet', pretrained=None, emb_dim=8, metadata='cell_type')
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit_recipe(Recipe('r', [Stage(evil('stage'), 1, 1e-3)]))
    emb = learn.embed(screen.table, tta=1, progress=False)
    of = lambda d: emb[(emb.Metadata_dataset == d).to_numpy() & (emb.Metadata_well_type == 'treatment').to_numpy()]
    index = EmbeddingIndex(of('train'))
    pred, near = predict_wells(of('test'), index)
    table = screen.table
    return SimpleNamespace(learn=learn, emb=emb, index=index, pred=pred, near=near,
                           result=evaluate_screen({evil('column'): pred}, table, embeddings={evil('column'): emb}, n_boot=20, n_null=20))

# ---- HTML

class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = set(), ''
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.found |= {tag, *(f'{tag}.{k}' for k, _ in attrs)}
    def handle_data(self, data): self.text += data

TABLE = {'table', 'table.border', 'table.class', 'thead', 'tbody', 'tr', 'tr.style', 'th', 'td', 'p'}

def test_html_of_a_result(trained):
    assert trained.result.notes and any('<img' in n for n in trained.result.notes)
    page = Tags(trained.result._repr_html_())
    assert page.found <= TABLE and '<img src=x onerror="alert(1)">' in page.text

def test_html_of_a_report(screen, trained, tmp_path):
    page = Tags(write_report(tmp_path/'r.html', evil('title'), [(evil('heading'), evil('text'), [trained.result.table(), pd.DataFrame({evil('column'): [evil('cell')]}),
        accuracy_plot(trained.result)])]).read_text())
    assert page.found <= TABLE | {'html', 'html.lang', 'main', 'meta', 'meta.charset', 'meta.name', 'meta.content', 'title', 'style', 'h1', 'h2', 'p.class', 'div', 'div.class', 'img', 'img.alt', 'img.src', 'picture', 'source', 'source.media', 'source.srcset'}
    assert len(re.findall('<img ', (tmp_path/'r.html').read_text())) == 1

# ---- Markdown

def test_markdown_of_a_model_card(trained, tmp_path):
    set_provenance(trained.learn.model, dict(trained_experiments=[evil('earlier')], pseudo_experiments=[evil('pseudo')]))
    trained.learn.history['accuracy'] = .5
    card = (trained.learn.to_model(trained.index, license='free').save(tmp_path/'m')/'README.md').read_text()
    _, _, body = card.split('---\n', 2)
    tokens = MarkdownIt('commonmark').enable(['table', 'strikethrough']).parse(body)
    inner = [o for t in tokens for o in [t, *(t.children or ())]]
    assert not [t for t in inner if t.type in ('html_block', 'html_inline', 'image', 's_open')]
    assert {t.attrs['href'] for t in inner if t.type == 'link_open'} == {'https://github.com/rcic-fastai/rcic_fastai'}
    assert sum(t.type == 'table_open' for t in tokens) == 2
    assert all(n in ''.join(t.content for t in inner if t.type == 'text') for n in ('onerror', '$\\foo$'))
    assert not re.search(r'(?<!\\)\$', body)                    # formulas, where a hub draws them
    for name in ('earlier', 'pseudo', 'RPE-02', 'HUVEC-01'): assert f'b\\>{name}' in body or f'b&gt;{name}' in body

@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ab<>[]()!`*_|\\$~&#- \n"\'', max_size=30))
def test_any_text_is_text_in_markdown(s):
    tokens = MarkdownIt('commonmark').enable(['table', 'strikethrough']).parse(f'a{markdown_text(s)}b\n')
    inner = [o for t in tokens for o in (t.children or ())]
    assert {t.type for t in inner} <= {'text', 'text_special'}
    assert ''.join(t.content for t in inner) == 'a' + ' '.join(s.split()) + 'b'

# ---- pictures

def drawn(fig):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph')
        fig.savefig(io.BytesIO(), format='png')
    texts = [t.get_text() for t in fig.findobj(matplotlib.text.Text)]
    plt.close(fig)
    return texts

def test_pictures_draw(screen, trained):
    table, source, learn = screen.table, screen.source, trained.learn
    site, right = TensorSite(torch.from_numpy(source[table.site_id[0]])), right_wrong(trained.pred, table)
    def of(draw):
        draw()
        return plt.gcf()
    batch = lambda f: of(lambda: f(max_n=2))
    near, query = trained.near[trained.near['query'] == trained.near['query'].iloc[0]], trained.near['query'].iloc[0]
    with learn.no_bar(), learn.no_logging():
        figures = dict(site=of(lambda: site.show(how='panels', title=evil('t'), channels=source.channels)), channels=of(lambda: plot_channels(site, source.channels)),
            batch=batch(learn.dls.show_batch), results=batch(learn.show_results), plate=of(lambda: plate_map(table.head(6), 'sirna', title=evil('t'), text=True)),
            gallery=site_gallery(Screen(table, source)), maps=embedding_map(trained.emb.rename(columns={'Metadata_well_type': 'Metadata_' + evil('c')}), 'cell_type', 'experiment', evil('c')),
            strip=neighbor_strip(near, query, evil('truth'), Screen(table, source)), accuracy=accuracy_plot(trained.result), right=right_wrong_map(right),
            curve=training_curve(learn.history))
    for name, fig in figures.items():
        texts = drawn(fig)
        assert name == 'curve' or any('\\$' in t for t in texts), name
        assert not [t for t in texts if re.search(r'(?<!\\)\$', t) and not t.startswith('$\\mathdefault')], name

def test_no_name_hides_from_a_legend(trained):
    "matplotlib leaves out what begins with an underscore"
    emb = trained.emb.assign(Metadata_kind=np.where(pd.factorize(trained.emb.Metadata_well_id)[0] % 2, '_a', 'b'))
    fig = embedding_map(emb, 'kind')
    legend, = fig.findobj(matplotlib.legend.Legend)
    assert [t.get_text().strip() for t in legend.get_texts()] == ['_a', 'b']
    plt.close(fig)

@settings(max_examples=40, deadline=None)
@given(st.text(alphabet='$\\{}_^%a\x1b\n', max_size=12))
@example('$\\foo$')
def test_any_text_is_drawn_as_it_is(s):
    fig, ax = plt.subplots(figsize=(1, 1), dpi=20)
    t = ax.set_title(picture_text(s))
    drawn(fig)
    shown = t._preprocess_math(t.get_text())
    assert not shown[1] and shown[0].lstrip(' ') == terminal_text(s, lines=True).lstrip(' ')

# ---- tables for spreadsheets

def cells(path):
    with open(path, newline='') as f: return [c for row in csv.reader(f) for c in row]

def test_no_cell_of_predictions_is_a_formula(trained, tmp_path):
    path = write_predictions(trained.pred, tmp_path/'p.csv')
    for f in (path, top_path(path)): assert not [c for c in cells(f) if c[:1] and c[0] in '=+-@\t\r' and not re.fullmatch(r'-\d+(\.\d+)?(e-\d+)?', c)]      # a number is none
    back, names = read_predictions(path), ['id_code', 'sirna', *(c for c in trained.pred if c.startswith('top_'))]
    pd.testing.assert_frame_equal(back[names], trained.pred[names], check_dtype=False)
    assert right_wrong(back, trained_table(trained)).right.equals(right_wrong(trained.pred, trained_table(trained)).right)

def trained_table(trained): return trained.learn.dls.screen.table

@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="=+-@'\t,\"a\n", min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
@example(['-', '+control', '@x', "'-", '=1+1', "''="])
def test_names_come_back_from_predictions(tmp_path_factory, names):
    tmp = tmp_path_factory.mktemp('p')
    pred = pd.DataFrame(dict(id_code=names, sirna=names[::-1], top_1=names[::-1], protocol='inductive'))
    pred.attrs['target'] = 'sirna'
    back = read_predictions(write_predictions(pred, tmp/'p.csv'))
    assert back[['id_code', 'sirna', 'top_1']].equals(pred[['id_code', 'sirna', 'top_1']])
    assert not [c for c in cells(tmp/'p.csv') if c[0] in '=+-@\t\r']

def test_csvs_of_others_are_read_as_they_are(tmp_path):
    (tmp_path/'p.csv').write_text('id_code,sirna\na,-\nb,+x\nc,=y\nd,\'z\n')
    assert read_predictions(tmp_path/'p.csv').sirna.tolist() == ['-', '+x', '=y', "'z"]

def test_history_of_a_model_folder(trained, tmp_path):
    folder = trained.learn.to_model(trained.index).save(tmp_path/'m')
    assert not [c for c in cells(folder/'history.csv') if c.startswith('=')]

# ---- terminals

def obeyed(s): return [c for c in s if c != '\n' and c != '\t' and (ord(c) < 32 or 127 <= ord(c) < 160)]

def test_text_of_a_result_and_of_messages(trained):
    assert '�[31m' in trained.result.to_text(full=True) and not obeyed(trained.result.to_text(full=True)) and not obeyed(repr(trained.result))
    assert str(ScreenError(evil('x'))).count('�') == 1

def test_what_commands_print():
    def loud(name): # A name
        "Say a name everywhere"
        print(name, 'and', name)
        print('\r|----| 3%', end='\r')
        print(name, file=__import__('sys').stderr)
        raise ScreenError(f'{name} cannot be used: rename it.')
    class Terminal(io.StringIO):
        def isatty(self): return True
    out, err = Terminal(), Terminal()
    with redirect_stdout(out), redirect_stderr(err): assert run_command(loud, [evil('a') + '\rb\x9b2J'], 'loud') == 2
    assert out.getvalue().count('\r') == 2 and not obeyed(out.getvalue().replace('\r', '')) and not obeyed(err.getvalue())
    assert out.getvalue().count('<b>a</b>') == 2 and err.getvalue().count('<b>a</b>') == 2
