"The page of `explore`: what its data hold, what it asks for, and how it answers in a browser."
import base64, io, json, os, re, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from helpers import learner, refused
from rcic_fastai.core import csv_name
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.predict.plan import embed_plan, plan_prediction
from rcic_fastai.results.evaluate import confused_pairs, evaluate, right_wrong
from rcic_fastai.results.explore import *
from rcic_fastai.results.explore import _seen_wells
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from helpers import simulate_screen
from rcic_fastai.screen.simulate.layout import screen_layout
from rcic_fastai.screen.tables import with_target

HOSTILE = ['</script><img src=x onerror=alert(1)>', '<b>bold</b>', '"quoted" & \'single\'', '{{pictures}}', '=cmd()', 'ä 細胞 \u2028 \u202e']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(screen, model, page, path): two experiments to name after two others, most of the names hostile"
    top = tmp_path_factory.mktemp('explore')
    simulate_screen(top/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17', 'HUVEC-18'], sirnas=8, size=32, plates=2, controls=1, progress=False)
    plain = open_screen(top/'screen')
    names = sorted(plain.table.sirna[plain.table.well_type == 'treatment'].unique())
    table = plain.table.replace({'sirna': dict(zip(names, HOSTILE))})
    table['stain'] = np.where(table.plate == 1, '</script><script>alert(2)</script>', None)
    table['dose'] = np.arange(len(table))/7
    screen = Screen(table, plain.source, 'A <b>screen</b>')
    model = learner(screen_dls(screen, valid='HUVEC-03', bs=16, device='cpu')).to_model(tta=1, progress=False)
    path = top/'page.html'
    page = explore(model, screen, out=path, protocol=['inductive', 'adapted'], side=32, umap='no', tta=1, progress=False)
    return screen, model, page, path


@pytest.fixture(scope='module')
def preds(made):
    "{protocol: what the model says}"
    screen, model, *_ = made
    return {p: model.predict(screen, p, tta=1, progress=False) for p in ('inductive', 'adapted')}


def data_of(path): return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding='utf-8'), re.S)[1])


# ---- without a browser

@pytest.mark.parametrize('protocol', ['inductive', 'adapted'])
def test_the_page_holds_the_predictions(made, preds, protocol):
    d, pred = data_of(made[3]), preds[protocol]
    p = next(p for p in d['predictions'] if p['name'] == protocol)
    assert [d['wells']['id'][i] for i in p['wells']] == pred.id_code.tolist() and p['protocol'] == protocol
    assert [d['labels'][i] for i in p['label']] == pred.sirna.tolist()
    for i in range(5): assert [d['labels'][j] if j >= 0 else None for j in p['top'][i]] == pred[f'top_{i+1}'].tolist()
    for c in ('score', 'margin', 'votes'): np.testing.assert_allclose(p[c], pred[c], atol=1e-3)
    np.testing.assert_allclose(p['top_scores'][0], p['score'])


def test_the_page_holds_the_neighbors(made):
    screen, model, page, path = made
    d, near = data_of(path), model.neighbors(screen, 'adapted', tta=1, progress=False)
    space = d['spaces'][d['predictions'][1]['space']]['near']
    site = screen.table.site_id.tolist()
    held = pd.DataFrame(dict(query=[site[i] for i in space['query']], site_id=[site[i] for i in space['site']], cosine=space['cosine']))
    both = near.merge(held, on=['query', 'site_id'], how='left', suffixes=('', '_page'))
    assert len(both) == len(near) and both.cosine_page.notna().all()
    np.testing.assert_allclose(both.cosine_page, both.cosine, atol=1e-3)


def test_the_page_holds_the_table(made):
    screen, _, _, path = made
    d, wells = data_of(path), screen.wells
    assert [d['labels'][i] for i in d['wells']['truth']] == wells.sirna.tolist()
    columns = {c['name']: c for c in d['wells']['columns']}
    assert [columns['stain']['names'][i] if i >= 0 else None for i in columns['stain']['codes']] == wells.stain.astype(object).where(wells.stain.notna(), None).tolist()
    assert columns['dose']['kind'] == 'number' and len(columns['dose']['values']) == len(wells)
    assert 'sirna' not in columns and 'site_id' not in columns


def test_accuracies_name_their_protocol(made):
    a = made[2].data['accuracy']
    assert [o['protocol'] for o in a] == ['inductive', 'adapted'] and [r['name'] for r in a[0]['rows'] if r['group'] == 'experiment'] == ['HUVEC-17', 'HUVEC-18']


def test_nothing_is_asked_of_any_address(made):
    text = made[3].read_text(encoding='utf-8')
    markup = re.sub(r'<script type="application/json".*?</script>', '', text, flags=re.S)
    assert not re.search(r'(?i)https?:|\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|import)\b\s*\(|@import|(?<![a-z])url\(', markup)
    assert not re.search(r'<(?:link|iframe|object|embed|base)\b', markup) and not re.search(r'\bsrc=', markup)


def test_the_policy_allows_the_program_and_nothing_else(made):
    import base64, hashlib
    text = made[3].read_text(encoding='utf-8')
    policy = dict(o.split(' ', 1) for o in re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].split('; '))
    assert policy['default-src'] == "'none'" and policy['img-src'] == 'data: blob:' and 'unsafe' not in ' '.join(policy.values())
    for tag, key in (('script', 'script-src'), ('style', 'style-src')):
        body = re.findall(rf'<{tag}>(.*?)</{tag}>', text, re.S)
        assert len(body) == 1 and policy[key] == f"'sha256-{base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()}'"


def test_the_program_writes_text_only():
    from rcic_fastai.results.explore import _own
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|setAttribute\(.on', _own('explore.js'))


def test_names_stay_names(made):
    text = made[3].read_text(encoding='utf-8')
    assert text.count('<script') == text.count('</script>') == 3 and 'onerror=alert(1)>' not in text
    assert set(HOSTILE) <= set(data_of(made[3])['labels'])
    assert '<h1>A &lt;b&gt;screen&lt;/b&gt;</h1>' in text


@pytest.mark.parametrize('max_mb', [.2, .3, 1])
def test_a_page_keeps_its_budget(made, max_mb):
    screen, _, page, path = made
    p = screen_page(screen, [], max_mb=max_mb, side=32)
    assert len(p.html.encode()) <= max_mb*1e6
    left = set(p.pictures.left_out)
    assert bool(left) == (len(p.pictures.texts) < len(screen)) and ('max_mb' in ' '.join(p.data['notes'])) == bool(left)
    has = {w for w, n in zip(screen.table.well_id, p.data['sites']['picture']) if n >= 0}
    assert not has & left and has | left == set(screen.wells.well_id)


def test_pages_without_pictures_labels_or_model(made, preds):
    screen, pred = made[0], preds['inductive']
    assert screen_page(screen, [], side=0).data['pictures']['count'] == 0
    unlabeled = Screen(screen.table.assign(sirna=screen.table.sirna.where(screen.table.dataset != 'test')), screen.source)
    page = explore(None, unlabeled, pred, side=0)
    assert page.data['accuracy'] == [] and any('no accuracy' in n for n in page.data['notes'])
    assert page.data['spaces'] == [] and 'score' in page.data['predictions'][0]


def test_the_page_says_what_the_model_learned(made):
    screen, model, page, _ = made
    seen = next(c for c in page.data['wells']['columns'] if c['name'] == 'in training')
    wells = screen.wells
    want = wells.experiment.map({'HUVEC-03': 'held out'}).fillna('not used').where(~wells.well_id.isin(model.index.labels.well_id), 'in the index')     # its weights have learned nothing
    assert [seen['names'][i] for i in seen['codes']] == want.tolist() and set(want) == {'in the index', 'held out', 'not used'}
    model.model.trained_experiments = tuple(model.trained)
    try: assert _seen_wells(model, screen)['in training'].tolist() == want.replace('in the index', 'learned').tolist()
    finally: model.model.trained_experiments = ()


def test_a_target_under_another_name(made, preds):
    "A model may be trained on compound, which the table calls sirna, or on a pair"
    screen = made[0]
    for target in ('compound', 'sirna+plate'):
        d = with_target(screen.table, target)
        pred = preds['inductive'][['id_code', 'protocol']].assign(**{target: d[target].dropna().iloc[0]})
        pred.attrs['target'] = target
        page = explore(None, screen, pred, side=0)
        assert page.data['target'] == target and len(page.data['accuracy']) == 1, page.data['notes']


def test_predictions_made_otherwise_are_said(made, preds):
    screen, model, pred = made[0], made[1], preds['inductive']
    names = pred.sirna.unique()
    other = pred[['id_code', 'sirna', 'protocol']].assign(sirna=names[0])
    other.attrs = dict(pred.attrs)
    page = explore(model, screen, dict(mine=other), side=0, umap='no', tta=1, progress=False)
    n = (pred.sirna != names[0]).sum()
    assert any(f'mine: {n} of {len(pred)} wells are named otherwise' in o for o in page.data['notes'])


def test_wrong_requests_are_one_sentence(made, preds, tmp_path):
    screen, model, pred = made[0], made[1], preds['inductive']
    refused(lambda: explore(model, screen, max_mb=-1), 'max_mb=-1', 'no room')
    refused(lambda: explore(model, screen, quality=101), 'quality=101')
    refused(lambda: explore(model, screen, protocol='magic'), 'magic')
    refused(lambda: explore(model, screen, pred, embeddings=[1]), 'embeddings')
    refused(lambda: explore(model, screen[screen.table.experiment != 'HUVEC-18'], pred, tta=1, progress=False), 'not in the screen')
    (tmp_path/'mine.html').write_text('<p>mine')
    refused(lambda: explore(model, screen, out=tmp_path/'mine.html'), 'mine.html', 'choose another name')
    assert (tmp_path/'mine.html').read_text() == '<p>mine'


def test_a_frame_holds_the_whole_page(made):
    import html
    frame = made[2]._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == made[2].html and 'allow-same-origin' not in frame
    assert re.fullmatch('<iframe [^>]*>(.*)</iframe>', frame)[1] == 'The page “A &lt;b&gt;screen&lt;/b&gt;” is shown when you trust this notebook.'     # what Jupyter leaves before


def test_a_model_of_another_screen_brings_its_wells(made, tmp_path):
    "Neighbors that this screen does not have are on the page, without a place and a picture"
    screen, model, *_ = made
    test = Screen(screen.test.table, screen.source)
    d = explore(model, test, side=32, umap='no', tta=1, progress=False).data
    outside = set(model.index.labels.well_id)
    assert set(d['wells']['id']) == set(test.wells.well_id) | outside
    at = {w: i for i, w in enumerate(d['wells']['id'])}
    pictures = {d['sites']['well'][i]: n for i, n in enumerate(d['sites']['picture'])}
    assert all(pictures[at[w]] == -1 for w in outside) and all(pictures[at[w]] >= 0 for w in test.wells.well_id)


@pytest.mark.parametrize('channels, dtype', [(1, np.uint8), (5, np.uint16), (16, np.uint16)])
def test_sprites_hold_any_channels(channels, dtype):
    x = (np.random.default_rng(0).random((channels, 40, 60))*np.iinfo(dtype).max).astype(dtype)
    sprite, limits, cell = site_sprite(x, 30)
    columns = min(channels, SPRITE_COLUMNS)
    assert cell == (20, 30) and limits.shape == (2, channels) and (limits[0] <= limits[1]).all()
    assert Image.open(io.BytesIO(sprite)).size == (30*columns, 20*-(-channels//columns))


# ---- a folder, with files of pictures beside the page

class Many(ImageSource):
    "Pictures of many sites, drawn from their names"
    def __init__(self, table, shape=(3, 16, 16)):
        super().__init__('many', table, ['a', 'b', 'c'])
        self.shape, self.dtype = shape, np.dtype('u1')
    def _read(self, site_id, out): out[...] = np.random.default_rng(list(site_id.encode())).integers(0, 255, self.shape, np.uint8)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "(screen, page, folder): some 1,200 wells in a folder"
    table = screen_layout([f'HUVEC-{i:02d}' for i in range(1, 5)], sirnas=300, plates=2)
    table = table[table.well_type == 'treatment'].drop_duplicates('well_id').reset_index(drop=True)
    screen, out = Screen(table, Many(table), 'many'), tmp_path_factory.mktemp('many')/'whole'
    return screen, explore(None, screen, out=out), out


def test_a_folder_holds_the_pictures_of_all_wells(many):
    screen, page, out = many
    assert page.pictures.left_out == [] and page.pictures.count == len(screen) and (out/'index.html').read_text() == page.html
    shown, files = [], sorted((out/'pictures').iterdir())
    for i, f in enumerate(files):
        k, texts = re.fullmatch(r'rcicPictures\((\d+),(\[.*\])\)\n', f.read_text()).groups()
        assert int(k) == i and page.data['pictures']['files'][i] == len(shown) and len(f.read_bytes()) < 1.2*PICTURE_FILE
        shown += json.loads(texts)
    assert len(shown) == len(screen) and len(files) > 2 and len(page.html.encode()) < 1e6
    site = len(screen)//2
    stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[page.data['sites']['picture'][site]]))).convert('L'))[:16, :16]
    lo, hi = black_white(screen.source[screen.table.site_id[site]])[:, 0]
    assert np.abs(lo + stored/255.*(hi - lo) - screen.source[screen.table.site_id[site]][0]).mean() < 25


def test_a_frame_holds_the_pictures_of_a_folder(many, tmp_path, monkeypatch):
    "A frame in a notebook gets no file that lies beside it: Jupyter hands it none. As many pictures as fit are in it, of named wells first"
    screen, page, out = many
    monkeypatch.chdir(tmp_path)
    def frame(page):
        d = json.loads(re.search(r'id="data">(.*?)</script>', page.framed(), re.S)[1])
        texts = re.search(r'id="pictures"[^>]*>(.*?)</script>', page.framed(), re.S)[1].strip().split('\n')
        assert d['pictures']['files'] == [] and 'src=' not in page._repr_html_().partition('srcdoc=')[0]
        return d, texts
    stored = [t for f in sorted((out/'pictures').iterdir()) for t in json.loads(f.read_text().partition(',')[2][:-2])]
    d, texts = frame(page)
    assert d['sites']['picture'] == [*range(len(stored))] and texts == stored and d['notes'] == page.data['notes']
    named = screen.wells.query('experiment == "HUVEC-03"').head(40)
    pred = pd.DataFrame(dict(id_code=named.well_id, sirna=named.sirna, protocol='inductive'))
    small = explore(None, screen, pred, tmp_path/'small')
    small.max_mb = .3
    d, texts = frame(small)
    ids, got = d['wells']['id'], [i for i, n in enumerate(d['sites']['picture']) if n >= 0]
    assert 40 < len(got) < len(screen) and {*named.well_id} <= {ids[d['sites']['well'][i]] for i in got} and len(small.framed().encode()) < .3e6 + 500
    assert [texts[d['sites']['picture'][i]] for i in got] == [stored[page.data['sites']['picture'][i]] for i in got]
    assert d['notes'][0] == f'In this notebook: {len(got)} of {len(screen):,} pictures, as many as 0.3 MB hold; {tmp_path}/small/index.html shows all.'
    explore(None, screen[screen.table.experiment == 'HUVEC-01'], out=tmp_path/'small')
    d, _ = frame(small)
    assert set(d['sites']['picture']) == {-1} and 'does not hold this page any more' in d['notes'][0]       # never the pictures of other wells


def test_a_folder_is_replaced_whole_and_nothing_else(many, tmp_path):
    screen, out = many[0][many[0].table.experiment == 'HUVEC-01'], tmp_path/'page'
    explore(None, screen, out=out)
    before = sorted(p.name for p in (out/'pictures').iterdir())
    (out/'pictures'/'mine.txt').write_text('mine')
    refused(lambda: explore(None, screen, out=out), 'holds more than a page', 'take that out')
    assert (out/'pictures'/'mine.txt').read_text() == 'mine' and sorted(p.name for p in (tmp_path/'page.part'/'pictures').iterdir()) == before
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'notes').touch()
    refused(lambda: explore(None, screen, out=tmp_path/'other'), 'was not written by rcic_fastai')
    refused(lambda: explore(None, screen, out=tmp_path/'small', max_mb=.001), 'without pictures')
    assert not (tmp_path/'small').exists() and not (tmp_path/'small.part').exists()



def test_the_folder_where_one_is(many, tmp_path, monkeypatch):
    screen = many[0][many[0].table.experiment == 'HUVEC-01']
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    explore(None, screen, out='.')
    assert (tmp_path/'here/index.html').is_file() and [p.name for p in tmp_path.iterdir()] == ['here']


# ---- in a browser: playwright drives a Chromium that is installed, its own or that of EXPLORE_BROWSER

def chromium():
    "Where a browser is; None where there is none"
    named = os.environ.get('EXPLORE_BROWSER')
    return named or next((p for n in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (p := shutil.which(n))), None)


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    if not chromium(): pytest.skip('no Chromium was found on this machine (install one, or name it with EXPLORE_BROWSER)')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture
def tab(browser, made):
    "A function that opens the page at an address; what it asked for and what went wrong are seen at the end"
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page, asked, wrong = context.new_page(), [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('dialog', lambda d: (wrong.append(d.message), d.dismiss()))
    def go(state='', path=made[3]):
        page.goto(f'{path.as_uri()}#{state}')
        page.wait_for_selector('html[data-ready]')
        return page
    go.page, go.asked, go.wrong = page, asked, wrong
    yield go
    assert wrong == [] and all(u.startswith(('file:', 'data:', 'blob:')) for u in asked)
    context.close()


browses = pytest.mark.extra('playwright')


def open_well(page, well):
    "Wait until a well is open and its pictures are drawn"
    page.wait_for_selector(f'#well[data-ready="{well}"]')
    return page.inner_text('#well')


def at(page, screen, well):
    "Where a well is on its canvas: (canvas, x, y)"
    r = screen.wells.set_index('well_id').loc[well]
    canvas = page.locator(f'canvas[aria-label^="Plate {r.plate} of {r.experiment}:"]')
    from rcic_fastai.screen.tables import well_to_rowcol
    row, col = well_to_rowcol(r.well)
    step = (canvas.bounding_box()['width'] - 20)/24
    return canvas, 18 + (col + .5)*step, 14 + (row + .5)*step


@browses
def test_a_click_opens_a_well_its_neighbor_and_back(made, preds, tab):
    screen, p = made[0], preds['inductive'].iloc[0]
    page = tab()
    canvas, x, y = at(page, screen, p.id_code)
    canvas.click(position=dict(x=x, y=y))
    text = open_well(page, p.id_code)
    assert p.id_code in text and p.sirna in text and 'inductive' in text and f'{p.score:.3f}' in text
    assert page.locator('#well .near button').count() == 2*5 and page.locator('#well .pics canvas').count() == 2
    first = made[1].neighbors(screen, tta=1, progress=False).query('id_code == @p.id_code').iloc[0]
    page.locator('#well .near button').first.click()
    assert first.well_id in open_well(page, first.well_id) and 'This is no prediction' in page.inner_text('#well')
    page.click('#back')
    open_well(page, p.id_code)
    page.go_back()
    page.wait_for_selector('#well', state='hidden')
    page.go_forward()
    open_well(page, p.id_code)


@browses
def test_doses_are_seen_at_once_and_colored_by_their_logarithm(made, tab):
    "Doses go in steps of so many times: on a linear scale all but the highest look alike"
    wells = made[0].wells
    page = tab('w=HUVEC-17_1_B02&c=column:dose')
    open_well(page, 'HUVEC-17_1_B02')
    said = page.inner_text('#well dl.facts >> nth=0')
    assert 'dose' in said and f"{wells.dose[wells.well_id == 'HUVEC-17_1_B02'].iloc[0]:.3g}"[:3] in said
    assert 'log scale' in page.inner_text('#legend')
    page.select_option('#color', 'score')
    assert 'log scale' not in page.inner_text('#legend')


@browses
def test_pictures_are_those_of_the_screen(made, tab):
    "A panel on the scale of its own picture, against the site"
    screen = made[0]
    page, site = tab('w=HUVEC-17_1_B02&m=panels'), np.asarray(screen.source['HUVEC-17_1_B02_1'])
    open_well(page, 'HUVEC-17_1_B02')
    shown = page.evaluate('''() => { const c = document.querySelector('#well .pics canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [c.width, ...Array.from({length: c.width*c.height}, (_, i) => d[4*i])]; }''')
    lo, hi = black_white(site)[:, 0]
    wanted = np.clip((site[0] - float(lo))/(hi - lo)*255, 0, 255).ravel()
    assert shown[0] == 32 and np.abs(np.array(shown[1:]) - wanted).mean() < 12 and np.corrcoef(shown[1:], wanted)[0, 1] > .95


@browses
def test_the_keyboard_reaches_wells(made, tab):
    screen = made[0]
    page = tab()
    wells = screen.wells[(screen.wells.experiment == 'HUVEC-17') & (screen.wells.plate == 1)]
    page.focus('canvas[aria-label^="Plate 1 of HUVEC-17"]')
    page.keyboard.press('Enter')
    first = page.evaluate('location.hash')
    assert wells.well_id.iloc[0] in first
    page.wait_for_selector('#well:not([hidden])')
    page.keyboard.press('Escape')
    page.wait_for_selector('#well', state='hidden')
    for key in ('ArrowDown', 'ArrowRight', 'ArrowDown', 'Enter'): page.keyboard.press(key)
    page.wait_for_function('document.getElementById("said").textContent.length > 0')
    assert page.evaluate('document.activeElement.tagName') in ('CANVAS', 'H2')
    page.focus('#tab-plates')
    page.keyboard.press('ArrowRight')
    assert page.evaluate('document.activeElement.id') == 'tab-map' and page.is_visible('#map-canvas')


@browses
@pytest.mark.parametrize('typed', ['HUVEC-18_2', 'bold', '{{pictures}}', 'no such well'])
def test_search_finds_wells(made, tab, typed):
    wells, page = made[0].wells, tab()
    page.fill('#search', typed)
    p = made[2].data['predictions'][0]
    named = {made[2].data['wells']['id'][w]: made[2].data['labels'][l] for w, l in zip(p['wells'], p['label'])}
    hay = wells.well_id + ' ' + wells.sirna.fillna('') + ' ' + wells.well_id.map(named).fillna('')
    n = hay.str.lower().str.contains(typed.lower(), regex=False).sum() if typed != 'no such well' else 0
    assert page.inner_text('#count').startswith(f'{n} of {len(wells)}' if n else f'Nothing found for “{typed}”')
    if n:
        page.press('#search', 'Enter')
        page.wait_for_selector('#well:not([hidden])')


@browses
def test_a_search_for_a_perturbation_says_what_it_counted(made, tab):
    "All wells of it and those that were named so; a longer name that holds its name is another"
    wells, d, page = made[0].wells, made[2].data, tab()
    page.fill('#search', HOSTILE[1])
    p, code = d['predictions'][0], d['labels'].index(HOSTILE[1])
    mine = {w for w, t in enumerate(d['wells']['truth']) if t == code}
    named = {w for w, l in zip(p['wells'], p['label']) if l == code} - mine
    assert page.inner_text('#count') == f'{len(mine | named)} of {len(wells)} wells: {len(mine)} are {HOSTILE[1]}, {len(named)} more named so'
    page.fill('#search', 'treatment')                  # a text of the table
    assert page.inner_text('#count') == f"{(wells.well_type == 'treatment').sum()} of {len(wells)} wells"


def test_a_note_is_said_once_and_the_wells_that_were_named_are_counted(made, capsys):
    screen, model, _, _ = made
    new = screen[screen.table[screen.table.experiment.isin(['HUVEC-17', 'HUVEC-18'])].assign(dataset='train')]
    explore(model, new, protocol=['inductive', 'adapted'], side=0, umap='no', tta=1, progress=False)
    assert capsys.readouterr().err.count('no experiment is marked as test') == 1
    one = explore(model, screen, experiments='HUVEC-17', side=0, umap='no', tta=1, progress=False)
    n = (screen.wells.experiment.eq('HUVEC-17') & screen.wells.well_type.eq('treatment')).sum()
    assert f'{len(screen.wells)} wells ({n} of them named)' in one.about


@browses
def test_filters_are_shared_and_kept_in_the_address(made, preds, tab):
    page, pred = tab(), preds['inductive']
    truth = made[0].wells.set_index('well_id').sirna[pred.id_code].to_numpy()
    n = int((pred.sirna.to_numpy() == truth).sum())
    page.select_option('#result', 'right')
    assert page.inner_text('#count').startswith(f'{n} of')
    page.click('#tab-map')
    assert page.inner_text('#count').startswith(f'{n} of') and page.locator('#list tbody tr').count() == n
    page.select_option('#prediction', '1')
    state = page.evaluate('location.hash')
    page.reload()
    page.wait_for_selector('html[data-ready]')
    assert page.input_value('#prediction') == '1' and page.input_value('#result') == 'right' and page.evaluate('location.hash') == state
    page.click('#clear')
    assert page.inner_text('#count') == f'{len(made[0].wells)} wells'


@browses
def test_the_map_selects_wells(made, tab):
    page = tab('v=map')
    box = page.locator('#map-canvas').bounding_box()
    page.keyboard.down('Shift')
    page.mouse.move(box['x'] + 2, box['y'] + 2)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width'] - 2, box['y'] + box['height'] - 2, steps=3)
    page.mouse.up()
    page.keyboard.up('Shift')
    n = len(made[2].data['spaces'][0]['maps'][0]['wells'])
    assert page.inner_text('#count').startswith(f'{n} of')
    page.click('#tab-plates')
    assert page.inner_text('#count').startswith(f'{n} of')
    page.reload()
    page.wait_for_selector('html[data-ready]')
    assert page.inner_text('#count').startswith(f'{n} of') and page.locator('#chips button').count() == 1
    page.click('#chips button')
    assert page.inner_text('#count') == f'{len(made[0].wells)} wells'


@pytest.fixture(scope='module')
def corrected(made, tmp_path_factory):
    "(page, path): a prediction from corrected embeddings, with hits"
    screen, model, *_ = made
    out = tmp_path_factory.mktemp('corrected')/'page.html'
    hits = pd.DataFrame(dict(sirna=HOSTILE[:3], n_wells=2, activity=[.5, .1, .2], p=[.001, .4, .9], q=[.003, .6, .9], hit=[True, False, False]))
    return explore(model, screen, out=out, protocol='adapted', correct='standardize', hits=hits, side=32, umap='no', tta=1, progress=False), out


def test_maps_before_a_correction_are_those_without_one(made, corrected):
    "PCA of the same embeddings, as the page without the correction has it"
    first, after, before = made[2].data['spaces'][1]['maps'], *corrected[0].data['spaces'][0]['maps']
    assert (after['before'], before['before']) == (None, 0) and before['wells'] == after['wells'] and before['x'] != after['x']
    assert [before[k] for k in 'xy'] == [first[0][k] for k in 'xy'] and len(first) == 1
    emb = embed_plan(made[1], plan_prediction(made[1], made[0], 'adapted', correct='standardize', tta=1), progress=False)
    shown = explore(made[1], made[0], protocol='adapted', correct='standardize', embeddings=emb, side=0, umap='no', tta=1, progress=False)
    assert [m['before'] for m in shown.data['spaces'][0]['maps']] == [None]           # of a table it is not known what it was before


def test_hits_are_columns_of_wells(made, corrected):
    columns = {c['name']: c for c in corrected[0].data['wells']['columns']}
    p = dict(zip(HOSTILE[:3], [.001, .4, .9]))
    assert columns['hit p']['values'] == [p.get(s) for s in made[0].wells.sirna] and columns['hit p']['log'] and 'log' not in columns['hit activity']
    assert {columns['hit']['names'][i] for i in columns['hit']['codes'] if i >= 0} == {'hit', 'no hit'}


def test_hits_of_doses_are_those_of_each_dose(made, tmp_path):
    "A dose is a number in the screen and text in a CSV; and a column of the screen may have the name of one of ours"
    screen = made[0]
    table = screen.table.assign(dose=np.where(screen.table.plate == 1, .1, 10.), **{'hit p': 'mine'})
    hits = pd.DataFrame(dict(sirna=HOSTILE[1], dose=[.1, 10.], n_wells=2, activity=0., p=[.01, .5], q=[.02, .5], hit=[True, False]))
    hits.to_csv(tmp_path/'hits.csv', index=False)
    columns = {c['name']: c for c in explore(None, Screen(table, screen.source), hits=tmp_path/'hits.csv', side=0).data['wells']['columns']}
    wells = table.drop_duplicates('well_id')
    want = [None if s != HOSTILE[1] else .01 if d == .1 else .5 for s, d in zip(wells.sirna, wells.dose)]
    assert columns['hit p']['values'] == want and set(want) == {None, .01, .5}


@browses
def test_before_and_after_a_correction_stand_beside_each_other(made, corrected, tab):
    page = tab('v=map', corrected[1])
    assert [t.inner_text() for t in page.locator('#map figcaption').all()] == ['principal components', 'principal components before the correction']
    boxes = [page.locator(f'#{i}').bounding_box() for i in ('map-canvas', 'beside-canvas')]
    assert boxes[0]['y'] == boxes[1]['y'] and boxes[0]['x'] + boxes[0]['width'] < boxes[1]['x']
    inked = '''id => { const c = document.getElementById(id), d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer); return d.filter(v => v !== d[0]).length; }'''
    assert all(page.evaluate(inked, i) > 500 for i in ('map-canvas', 'beside-canvas'))
    page.check('#select')                              # what is selected on one is seen on the other
    b = boxes[1]
    page.mouse.move(b['x'] + 2, b['y'] + 2)
    page.mouse.down()
    page.mouse.move(b['x'] + b['width']/2, b['y'] + b['height'] - 2, steps=3)
    page.mouse.up()
    m = corrected[0].data['spaces'][0]['maps'][1]
    middle, width = (min(m['x']) + max(m['x']))/2, max(m['x']) - min(m['x'])
    least, most = (sum(x <= middle + d*width for x in m['x']) for d in (-.02, .02))       # a point at the edge may be in or out
    n = int(page.inner_text('#count').split()[0])
    assert 0 < least <= n <= most < len(m['x'])
    page.select_option('#beside', 'no')
    assert page.locator('#map canvas').count() == 1 and page.locator('#map figcaption').count() == 0
    page.reload()
    page.wait_for_selector('html[data-ready]')
    assert page.locator('#map canvas').count() == 1 and page.inner_text('#count').startswith(f'{n} of')
    tab.page.set_viewport_size(dict(width=400, height=800))
    assert tab('v=map', corrected[1]).evaluate('document.documentElement.scrollWidth') <= 400


@browses
def test_maps_of_two_predictions_stand_beside_each_other(made, tab):
    "Embeddings under two protocols, such as before and after the BatchNorm statistics are those of each experiment"
    page = tab('v=map')
    assert page.locator('#map canvas').count() == 1
    page.select_option('#beside', label='adapted: principal components')
    assert [t.inner_text() for t in page.locator('#map figcaption').all()] == ['inductive: principal components', 'adapted: principal components']
    page.locator('#beside-canvas').press('+')
    page.select_option('#prediction', '1')             # that map is the first now, and beside itself it says nothing
    assert page.locator('#map canvas').count() == 1


@browses
def test_p_values_are_colored_by_their_logarithm(corrected, tab):
    assert 'log scale' in tab('c=column:hit p', corrected[1]).inner_text('#legend') and 'log scale' not in tab('c=column:hit activity', corrected[1]).inner_text('#legend')


@browses
def test_the_address_keeps_what_was_chosen(made, tab):
    "A group of the legend, and how channels look"
    page = tab('w=HUVEC-17_1_B02&c=column:experiment')
    open_well(page, 'HUVEC-17_1_B02')
    pixels = "document.querySelector('#well .pics canvas').toDataURL()"
    first = page.evaluate(pixels)
    page.click('#channels summary')
    page.locator('#channels input.hi').first.fill('30')
    page.locator('#channels input[type=color]').nth(1).fill('#00ff00')
    page.locator('#channels input[type=checkbox]').nth(2).uncheck()
    page.locator('#legend button', has_text='HUVEC-18').click()
    count = page.inner_text('#count')
    assert count.startswith(f"{(made[0].wells.experiment == 'HUVEC-18').sum()} of")
    page.wait_for_timeout(100)
    changed = page.evaluate(pixels)
    page.reload()
    page.wait_for_selector('html[data-ready]')
    open_well(page, 'HUVEC-17_1_B02')
    assert changed != first and page.evaluate(pixels) == changed and page.inner_text('#count') == count
    page.click('#channels summary')
    page.get_by_text('As they were').click()
    page.wait_for_timeout(100)
    assert page.evaluate(pixels) == first and 't=' not in page.evaluate('location.hash')


@browses
def test_accuracies_say_that_a_filter_does_not_change_them(made, preds, tab):
    screen, pred = made[0], preds['inductive']
    mine = right_wrong(pred, screen.table)
    mine = mine[mine.experiment == 'HUVEC-18']
    page = tab('v=accuracy')
    assert page.locator('#filtered').count() == 0
    page = tab('v=accuracy&f=experiment&x=HUVEC-18')
    assert f'{mine.right.sum()} of {len(mine)} are right' in page.inner_text('#filtered')


@browses
def test_a_folder_loads_the_pictures_that_are_looked_at(many, tab, tmp_path):
    screen, page_, out = many
    page = tab(f'w={screen.table.well_id[700]}', out/'index.html')
    open_well(page, screen.table.well_id[700])
    asked = [u for u in tab.asked if '/pictures/' in u]
    assert len(asked) == 1 and page.evaluate("document.querySelector('#well .pics canvas').width") == 16
    shutil.copy(out/'index.html', tmp_path/'alone.html')
    tab(f'w={screen.table.well_id[700]}', tmp_path/'alone.html')
    page.wait_for_selector('text=must stay beside the page')
    assert len(tab.wrong) == 1 and 'ERR_FILE_NOT_FOUND' in tab.wrong.pop()


@browses
def test_confusions_and_accuracy_name_the_protocol(made, tab):
    page = tab('v=confusions&p=1')
    assert page.inner_text('#confusions').startswith('adapted')
    page.locator('#confusions button.link').first.click()
    assert page.locator('#chips button').count() == 1
    page.click('#tab-accuracy')
    assert [t.inner_text() for t in page.locator('#accuracy .tag').all()] == ['inductive', 'adapted']


@pytest.fixture(scope='module')
def by_hand(made, tmp_path_factory):
    "(predictions of all wells of two experiments, controls too, every third wrong; page)"
    wells = made[0].wells.query("experiment in ['HUVEC-17', 'HUVEC-18'] and sirna.notna()").reset_index(drop=True)
    names = wells.sirna.unique()
    pred = pd.DataFrame(dict(id_code=wells.well_id, sirna=[names[i % len(names)] if i % 3 == 0 else t for i, t in enumerate(wells.sirna)], protocol='adapted'))
    path = tmp_path_factory.mktemp('hand')/'page.html'
    explore(None, made[0], pred, path, side=0)
    return pred, path


@browses
def test_counts_are_those_of_python(made, by_hand, tab):
    "Right and wrong wells per plate, and confusions; controls have an accuracy of their own"
    pred, page = by_hand[0], tab('', by_hand[1])
    r = right_wrong(pred, made[0].table)
    treated, controls = r[r.well_type == 'treatment'], r[r.well_type != 'treatment']
    res = evaluate(pred, made[0].table, partial=True)
    assert len(controls) and (res['n_wells'], res['n_controls']) == (len(treated), len(controls))
    one, c = [d[d.experiment == 'HUVEC-17'] for d in (treated, controls)]
    assert page.inner_text('#experiment-said').startswith(f'{one.right.sum()} of {len(one)} wells right')
    assert f'(controls: {c.right.sum()} of {len(c)}), adapted' in page.inner_text('#experiment-said')
    captions = [t.inner_text() for t in page.locator('#plates figcaption').all()]
    assert all(f'{d.right.sum()} of {len(d)} right' in t for (_, d), t in zip(one.groupby('plate'), captions, strict=True))
    page.click('#tab-confusions')
    rows = [[c.inner_text() for c in r.locator('td').all()[:4]] for r in page.locator('#confusions table').first.locator('tbody tr').all()]
    want = confused_pairs(treated, most=200)
    assert sorted(rows) == sorted([p.truth, p.predicted, f'{p.wells} of {p.of}', str(p.experiments)] for p in want.itertuples())
    assert [int(r[2].split()[0]) for r in rows] == want.wells.tolist()


@browses
@pytest.mark.parametrize('width', [400, 700, 1000, 1240, 1600, 2400])
def test_the_axis_of_accuracies_is_seen_whole(made, tab, width):
    tab.page.set_viewport_size(dict(width=width, height=800))
    page = tab('v=accuracy')
    seen = page.evaluate("[...document.querySelectorAll('#accuracy .wide')].every(d => d.scrollWidth <= d.clientWidth + 1 && [...d.querySelectorAll('.interval')].every(i => i.clientWidth > 50 && i.getBoundingClientRect().right <= d.getBoundingClientRect().right + 1))")
    assert seen


@browses
def test_hostile_names_are_shown_as_text(made, tab):
    page = tab('c=label')
    shown = page.inner_text('#legend')
    assert '<b>bold</b>' in shown and '</script><img' in shown and page.locator('#legend img, #legend b b').count() == 0
    page.select_option('#color', 'column:stain')
    assert 'alert(2)' in page.inner_text('#legend')
    for v in ('map', 'confusions', 'accuracy'): page.click(f'#tab-{v}')
    assert page.evaluate('document.scripts.length') == 3


@browses
@pytest.mark.parametrize('width', [400, 3840])
def test_it_fits_into_any_width(made, tab, width):
    tab.page.set_viewport_size(dict(width=width, height=800))
    for state in ('', 'v=map', 'v=confusions', 'v=accuracy', 'w=HUVEC-17_1_B02'):
        page = tab(state)
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert width > 400 or page.locator('#well').bounding_box()['width'] == 400


@browses
def test_it_works_in_the_frame_of_a_notebook(made, tab, tmp_path):
    (tmp_path/'notebook.html').write_text(f'<!doctype html><meta charset="utf-8">{made[2]._repr_html_()}', encoding='utf-8')
    tab.page.goto((tmp_path/'notebook.html').as_uri())
    frame = tab.page.frame_locator('iframe')
    frame.locator('html[data-ready]').wait_for()
    frame.locator('#search').fill('HUVEC-17_1_B02')
    frame.locator('#search').press('Enter')
    frame.locator('#well[data-ready="HUVEC-17_1_B02"]').wait_for()
    w = made[2].data['wells']['id'][made[2].data['predictions'][0]['wells'][0]]
    frame.locator('#search').fill(w)
    frame.locator('#search').press('Enter')
    frame.locator(f'#well[data-ready="{w}"]').wait_for()
    frame.locator('#well .near button').first.click()
    frame.locator('#well', has_text='This is no prediction').wait_for()
    frame.locator('#back').click()
    frame.locator(f'#well[data-ready="{w}"]').wait_for()
    frame.locator('#close').click()
    frame.locator('#well').wait_for(state='hidden')


@browses
@pytest.mark.parametrize('how', ['output', 'srcdoc', 'blob', 'folder'])
def test_it_works_in_the_sandbox_of_another_origin(browser, made, many, preds, how):
    "As in Colab: outputs are in a frame of another origin that may run programs, without storage, cookies and files"
    page, wells = (made[2], preds['inductive'].id_code) if how != 'folder' else (many[1], many[0].wells.well_id)
    import html
    text = json.dumps(page.html if how == 'blob' else page._repr_html_()).replace('<', '\\u003c')
    fill = {'blob': f"const f = document.createElement('iframe'); f.style = 'width:1200px;height:800px'; f.src = URL.createObjectURL(new Blob([{text}], {{type: 'text/html'}})); document.body.append(f)"}
    output = f'<!doctype html><meta charset="utf-8"><body><script>{fill.get(how, f"document.body.innerHTML = {text}")}</script>'
    inner = f'srcdoc="{html.escape(page.html)}"' if how == 'srcdoc' else 'src="https://output.example/"'
    pages = {'https://notebook.example/': f'<!doctype html><meta charset="utf-8"><iframe sandbox="allow-scripts" style="width:1240px;height:780px" {inner}></iframe>', 'https://output.example/': output}
    context, wrong, asked = browser.new_context(viewport=dict(width=1280, height=800)), [], []
    context.route('**', lambda r: (asked.append(r.request.url), r.fulfill(body=pages[r.request.url], content_type='text/html') if r.request.url in pages else r.abort()))
    tab = context.new_page()
    tab.on('pageerror', lambda e: wrong.append(str(e)))
    tab.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    tab.goto('https://notebook.example/')
    frame = tab.frame_locator('iframe') if how == 'srcdoc' else tab.frame_locator('iframe').frame_locator('iframe')
    frame.locator('html[data-ready]').wait_for()
    assert frame.locator('html').evaluate('() => { try { return localStorage.length; } catch (e) { return e.name; } }') == 'SecurityError'       # it is a sandbox
    w = wells.iloc[0]
    frame.locator('#search').fill(w)
    frame.locator('#search').press('Enter')
    frame.locator(f'#well[data-ready="{w}"]').wait_for()
    assert len({*frame.locator('#well canvas').first.evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join().split(',')")}) > 9     # a picture
    if how != 'folder':
        frame.locator('#well .near button').first.click()
        frame.locator('#well', has_text='This is no prediction').wait_for()
        frame.locator('#back').click()
        frame.locator(f'#well[data-ready="{w}"]').wait_for()
        for v in ('map', 'confusions', 'accuracy', 'plates'): frame.locator(f'#tab-{v}').click()
    frame.locator('#close').click()
    frame.locator('#well').wait_for(state='hidden')
    context.close()
    assert wrong == [] and {*asked} <= {*pages}


@browses
@pytest.mark.parametrize('state', ['q=HUVEC-17', 'v=map&b=1.0&q=bold', 'v=confusions', 'v=accuracy&r=right', 'w=HUVEC-17_1_B02&n=HUVEC-17_1_B02', 'w=named', 'w=named&n=HUVEC-17_1_B02&m=panels'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_nothing(made, preds, tab, state, scheme):
    "With axe-core of npm, where EXPLORE_AXE names its axe.min.js"
    state = state.replace('named', preds['inductive'].id_code[0])
    axe = os.environ.get('EXPLORE_AXE')
    if not axe: pytest.skip('axe-core is not here (npm install axe-core, and name its axe.min.js with EXPLORE_AXE)')
    tab.page.emulate_media(color_scheme=scheme)
    page = tab(state)
    page.evaluate(Path(axe).read_text(encoding='utf-8'))     # the policy does not bind the debugger
    found = page.evaluate('axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 120)).slice(0, 3)]))')
    assert found == []


@browses
def test_what_is_read_aloud_holds_what_is_seen(made, preds, tab):
    "A control is found by the words that stand on it, also where it has a label for those who hear it"
    named = preds['inductive'].id_code[0]
    for state in ('', 'v=map&b=1.0', 'v=confusions', f'w={named}', f'w={named}&m=panels'):
        page = tab(state)
        if 'w=' in state: open_well(page, named)
        wrong = page.evaluate('''() => [...document.querySelectorAll('button[aria-label],select[aria-label],a[aria-label]')].filter(e => e.offsetParent && /[a-z0-9]/i.test(e.innerText)
            && !e.getAttribute('aria-label').toLowerCase().includes(e.innerText.trim().toLowerCase())).map(e => e.outerHTML.slice(0, 200))''')
        assert wrong == []
    assert page.locator('#well .near button').count() == 10 and 'open this well' in page.locator('#well .near button').first.text_content()


@browses
def test_a_finger_opens_a_well(browser, made, preds):
    screen, well = made[0], preds['inductive'].id_code.iloc[1]
    context = browser.new_context(viewport=dict(width=400, height=800), has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(made[3].as_uri())
    page.wait_for_selector('html[data-ready]')
    canvas, x, y = at(page, screen, well)
    canvas.tap(position=dict(x=x, y=y))
    open_well(page, well)
    page.tap('#close')
    page.wait_for_selector('#well', state='hidden')
    context.close()


# ---- what a user asked for

@pytest.fixture(scope='module')
def unlabeled(made, preds, tmp_path_factory):
    "(prediction, path): no named well has a known label"
    screen, path = made[0], tmp_path_factory.mktemp('unlabeled')/'page.html'
    new = Screen(screen.table.assign(sirna=screen.table.sirna.where(screen.table.dataset != 'test')), screen.source)
    explore(None, new, preds['inductive'], path, side=0)
    return preds['inductive'], path


@browses
def test_wells_without_known_labels_are_seen_to_be_named(unlabeled, made, tab):
    pred, page = unlabeled[0], tab('', unlabeled[1])
    assert page.input_value('#color') == 'named' and '#' == (page.evaluate('location.hash') or '#')
    n = (made[0].wells.set_index('well_id').experiment[pred.id_code] == 'HUVEC-17').sum()
    assert page.inner_text('#experiment-said') == f'{n} wells named, labels not known, inductive'
    assert 'named' in page.locator('#plates figcaption').first.inner_text()
    page.select_option('#color', 'result')
    assert f'named, label not known ({n})' in page.inner_text('#legend') and 'not named' in page.inner_text('#legend .kinds')
    page.select_option('#result', 'unknown')
    assert page.inner_text('#count').startswith(f'{len(pred)} of')
    page.select_option('#result', 'none')
    assert page.inner_text('#count').startswith(f'{len(made[0].wells) - len(pred)} of')
    page.select_option('#experiment', 'HUVEC-01')
    assert page.inner_text('#experiment-said') == 'no well was named'


@browses
def test_a_filter_leads_to_an_experiment_that_has_its_wells(made, tab):
    page, wells = tab(), made[0].wells
    n = (wells.experiment == 'HUVEC-02').sum()
    page.select_option('#column', 'experiment')
    page.select_option('#value', 'HUVEC-02')
    assert page.input_value('#experiment') == 'HUVEC-02' and page.is_hidden('#elsewhere')
    page.select_option('#experiment', 'HUVEC-17')          # whoever goes elsewhere is not sent back, but told
    assert page.inner_text('#elsewhere').strip() == f'No well of this experiment is shown. {n} wells in HUVEC-02: show'
    page.click('#elsewhere button')
    assert page.input_value('#experiment') == 'HUVEC-02' and page.is_hidden('#elsewhere')
    page.go_back()
    page.wait_for_selector('#elsewhere')
    page.select_option('#value', '')
    page.select_option('#color', 'column:experiment')      # a group of the legend is a filter too
    page.locator('#legend button', has_text='HUVEC-03').click()
    assert page.input_value('#experiment') == 'HUVEC-03'


@browses
def test_a_search_of_several_words(made, tab):
    wells, page = made[0].wells, tab()
    def found(typed):
        page.fill('#search', typed)
        said = page.inner_text('#count')
        return 0 if said.startswith('Nothing found') else int(said.split()[0])
    assert found('plate 2') == found('Plate 02') == found('2') == (wells.plate == 2).sum() < len(wells)
    assert found('B2') == found('well b02') == found('B02') == wells.well.eq('B02').sum() > 0
    assert found('HUVEC-17 plate 1 B2') == 1 and found('B2 huvec-17') == 2
    for typed in ('HUVEC-17 plate 7', 'HUVEC-17 plate 1 P24', '17'):          # 17 is a part of names only
        assert found(typed) == 0 and page.inner_text('#count') == f'Nothing found for “{typed}”' == page.inner_text('#elsewhere').rstrip('.')
    assert page.get_attribute('#count', 'role') == 'status'


@browses
def test_a_tip_goes_with_a_click_and_with_what_it_said(made, preds, tab):
    screen, pred, page = made[0], preds['inductive'], tab()
    canvas, x, y = at(page, screen, pred.id_code[0])
    canvas.hover(position=dict(x=x, y=y))
    assert pred.sirna[0] in page.text_content('#tip') and page.is_visible('#tip')
    page.select_option('#prediction', '1')
    assert page.is_hidden('#tip')
    canvas.hover(position=dict(x=x + 1, y=y))
    page.wait_for_selector('#tip')
    canvas.click(position=dict(x=x, y=y))
    open_well(page, pred.id_code[0])
    page.wait_for_timeout(200)
    assert page.is_hidden('#tip')
    page = tab('v=map')
    box = page.locator('#map-canvas').bounding_box()
    for i in range(200):                                   # somewhere is a point
        page.mouse.move(box['x'] + box['width']*(.2 + .003*i), box['y'] + box['height']*(.1 + .8*(i*.37 % 1)))
        if page.is_visible('#tip'): break
    assert page.is_visible('#tip')
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector('#well:not([hidden])')
    page.wait_for_timeout(200)
    assert page.is_hidden('#tip')


@browses
def test_the_keyboard_stops_at_wells_only(made, tab):
    page = tab()
    page.focus('canvas[aria-label^="Plate 1 of HUVEC-17"]')
    said = set()
    for key in ['ArrowRight']*6 + ['ArrowDown']*6 + ['ArrowLeft']*3 + ['ArrowUp']*8 + ['ArrowRight']*3:
        page.keyboard.press(key)
        said.add(page.text_content('#said'))
    assert all(s.startswith('HUVEC-17_1_') for s in said) and len(said) > 4


@browses
def test_the_keyboard_opens_the_well_in_the_middle_of_the_map(made, tab):
    page = tab('v=map')
    assert 'lists its wells here' in page.inner_text('#list')
    page.focus('#map-canvas')
    page.keyboard.press('ArrowLeft')
    said = page.text_content('#said')
    page.keyboard.press('Enter')
    page.wait_for_selector('#well:not([hidden])')
    well = page.inner_text('#well h2')
    assert said.startswith(f'in the middle: {well}, ')
    m = made[2].data['spaces'][0]['maps'][0]
    assert well in [made[2].data['wells']['id'][w] for w in m['wells']]


@browses
def test_black_stays_below_white_and_no_channel_is_said(made, tab):
    page = tab('w=HUVEC-17_1_B02&t=0-ff0000-80-20')
    open_well(page, 'HUVEC-17_1_B02')
    page.click('#channels summary')
    lo, hi = (page.locator(f'#channels input.{c}').first for c in ('lo', 'hi'))
    assert (lo.input_value(), hi.input_value()) == ('19', '20')
    lo.fill('90')
    assert lo.input_value() == '19'
    hi.fill('60')
    hi.fill('0')
    assert hi.input_value() == '20'
    boxes = page.locator('#channels input[type=checkbox]').all()
    for b in boxes:
        assert page.is_hidden('#all-off')
        b.uncheck()
    assert page.inner_text('#all-off') == 'All channels are off.'
    boxes[0].check()
    assert page.is_hidden('#all-off')


@browses
def test_neighbors_name_their_site(made, preds, tab):
    well = preds['inductive'].id_code[0]
    page, near = tab(f'w={well}'), made[1].neighbors(made[0], tta=1, progress=False).query('id_code == @well')
    open_well(page, well)
    site = made[0].table.set_index('site_id').site[near.site_id.iloc[0]]
    assert f'site {site}' in page.locator('#well .near button').first.inner_text()


@browses
def test_accuracies_are_rounded_as_by_python(made, tab, tmp_path):
    "5/16 = .3125 lies as near to .312 as to .313"
    wells = made[0].wells.query("experiment in ['HUVEC-17', 'HUVEC-18'] and well_type == 'treatment'").iloc[:16]
    names = wells.sirna.unique()
    wrong = dict(zip(names, np.roll(names, 1)))
    pred = pd.DataFrame(dict(id_code=wells.well_id, sirna=[t if i < 5 else wrong[t] for i, t in enumerate(wells.sirna)], protocol='inductive'))
    made_page = explore(None, made[0], pred, tmp_path/'p.html', side=0)
    page, rows = tab('v=accuracy', tmp_path/'p.html'), made_page.data['accuracy'][0]['rows']
    assert rows[0]['value'] == .3125
    assert [t.inner_text() for t in page.locator('#accuracy tbody td:nth-child(3)').all()] == [f"{r['value']:.3f}" for r in rows]


@browses
def test_one_finger_scrolls_past_the_map_and_two_zoom_it(browser, made):
    context = browser.new_context(viewport=dict(width=400, height=500), has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(made[3].as_uri() + '#v=map')
    page.wait_for_selector('html[data-ready]')
    send, state = context.new_cdp_session(page).send, "[scrollY, visualViewport.scale, document.getElementById('map-canvas').toDataURL()]"
    def touch(kind, *points): send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=[dict(x=a, y=b, id=i) for i, (a, b) in enumerate(points)]))
    def place():
        page.wait_for_timeout(150)
        return page.evaluate(state), page.locator('#map-canvas').bounding_box()['y']
    page.evaluate("scrollTo(0, document.getElementById('map-canvas').getBoundingClientRect().top - 200)")
    (before, y), x = place(), 200
    touch('touchStart', (x, y + 200))
    for d in range(10, 150, 10): touch('touchMove', (x, y + 200 - d))
    touch('touchEnd')
    (top, _, picture), y = place()
    assert top > before[0] + 50
    y += 140
    touch('touchStart', (x - 20, y))
    touch('touchStart', (x - 20, y), (x + 20, y))
    for d in range(25, 125, 10): touch('touchMove', (x - d, y - d/4), (x + d, y + d/4))
    touch('touchEnd')
    after = place()[0]
    assert after[:2] == [top, 1] and after[2] != picture
    context.close()


@browses
def test_words_of_accuracies_are_not_broken(made, tab):
    tab.page.set_viewport_size(dict(width=400, height=800))
    page = tab('v=accuracy')
    broken = page.evaluate('''() => [...document.querySelectorAll('#accuracy td:first-child')].flatMap(td => {
        const walk = document.createTreeWalker(td, NodeFilter.SHOW_TEXT), bad = [];
        for (let n; n = walk.nextNode();) for (const m of n.data.matchAll(/[a-z]+/gi)) {
            const r = document.createRange(); r.setStart(n, m.index); r.setEnd(n, m.index + m[0].length);
            if (new Set([...r.getClientRects()].map(o => Math.round(o.top))).size > 1) bad.push(m[0]);
        }
        return bad; })''')
    assert broken == [] and page.locator('#accuracy td:first-child').count() > 2


# ---- what a first look missed

def data_in(page): return json.loads(page.evaluate("document.getElementById('data').textContent"))


@pytest.fixture(scope='module')
def with_controls(made, tmp_path_factory):
    "(page, path): controls were embedded too, and the model learned none"
    screen, model, *_ = made
    out = tmp_path_factory.mktemp('controls')/'page.html'
    return explore(model, screen, out=out, wells='all', side=0, umap='no', tta=1, progress=False), out


def map_places(page, canvas='map-canvas', key=0):
    "Where each well of the first space is on a map, px of the canvas, by well number"
    m, box = data_in(page)['spaces'][0]['maps'][key], page.locator(f'#{canvas}').bounding_box()
    x, y = np.array(m['x']), np.array(m['y'])
    size, s = .92*min(box['width'], box['height']), max(np.ptp(x), np.ptp(y))
    at = np.stack([box['width']/2 + (x - (x.min() + x.max())/2)/s*size, box['height']/2 - (y - (y.min() + y.max())/2)/s*size], 1)
    return dict(zip(m['wells'], at))


@browses
def test_controls_that_were_embedded_are_on_the_map(made, with_controls, tab):
    screen, page = made[0], tab('v=map', with_controls[1])
    test = screen.wells[screen.wells.experiment.isin(['HUVEC-17', 'HUVEC-18'])]
    controls = test[test.well_type != 'treatment']
    d, places = data_in(page), map_places(page)
    ids = d['wells']['id']
    assert len(controls) and set(controls.well_id) < {ids[w] for w in places} and d['spaces'][0]['lacks'] == []
    for t in ('positive_control', 'negative_control'):
        assert f"{t.replace('_', ' ')} ({(controls.well_type == t).sum()})" in page.inner_text('#legend')
    alone = max((w for w in places if ids[w] in set(controls.well_id)), key=lambda w: min(np.hypot(*(places[w] - o)) for v, o in places.items() if v != w))
    page.locator('#map-canvas').click(position=dict(zip('xy', map(float, places[alone]))))
    text = open_well(page, ids[alone])
    assert 'control' in text and 'This is no prediction' in text and page.locator('#well .near button').count() == 10
    assert [d['wells']['id'][w] for w in d['predictions'][0]['wells']] == test.well_id[test.well_type == 'treatment'].tolist()


@browses
def test_a_map_says_that_controls_were_not_embedded(made, tab):
    n = (made[0].wells.experiment.isin(['HUVEC-17', 'HUVEC-18']) & (made[0].wells.well_type != 'treatment')).sum()
    assert f"{n} control wells of the same experiments are not on the map: embed them too, with wells='all'." in tab('v=map').inner_text('#map')


@browses
def test_a_map_says_why_it_has_none_before_the_correction(made, tab, tmp_path):
    emb = embed_plan(made[1], plan_prediction(made[1], made[0], 'adapted', correct='standardize', tta=1), progress=False)
    explore(made[1], made[0], out=tmp_path/'p.html', protocol='adapted', correct='standardize', embeddings=emb, side=0, umap='no', tta=1, progress=False)
    page = tab('v=map', tmp_path/'p.html')
    assert 'The map before the correction is not here' in page.inner_text('#map') and 'leave out embeddings' in page.inner_text('#map')
    assert 'before the correction' not in tab('v=map').inner_text('#map')          # nothing was corrected


@browses
def test_the_legend_counts_what_is_seen_and_controls_apart(made, preds, by_hand, tab):
    wells = made[0].wells
    held = wells[wells.experiment == 'HUVEC-03']
    treated, controls = (held.well_type == 'treatment').sum(), (held.well_type != 'treatment').sum()
    page = tab('c=column:in training&e=HUVEC-03')
    assert f'held out ({treated} + {controls} controls)' in page.inner_text('#legend') and 'wells of HUVEC-03' in page.inner_text('#legend')
    assert f"treatment ({treated})" in page.inner_text('#legend .kinds')
    page = tab('f=in training&x=held out')
    assert page.inner_text('#count') == f'{len(held)} of {len(wells)} wells, {controls} of them controls'
    page = tab('e=HUVEC-18')
    r = right_wrong(preds['inductive'], made[0].table).query("experiment == 'HUVEC-18'")
    assert f'right ({r.right.sum()})' in page.inner_text('#legend') and f'wrong ({(~r.right).sum()})' in page.inner_text('#legend')
    page.click('#tab-map')
    r = right_wrong(preds['inductive'], made[0].table)
    assert f'wrong ({(~r.right).sum()})' in page.inner_text('#legend') and 'wells of this map' in page.inner_text('#legend')
    page.locator('#legend button', has_text='wrong').click()           # the group that is chosen does not empty the others
    assert f'right ({r.right.sum()})' in page.inner_text('#legend')
    page.select_option('#result', 'wrong')                             # another filter does
    assert 'right (0)' in page.inner_text('#legend')
    r = right_wrong(by_hand[0], made[0].table).query("experiment == 'HUVEC-17'")
    n, c = r.right[r.well_type == 'treatment'].sum(), r.right[r.well_type != 'treatment'].sum()
    assert f'right ({n} + {c} control' in tab('', by_hand[1]).inner_text('#legend')


def selected(made, preds):
    "The table of the wells of HUVEC-17 as the page should list it"
    w, pred = made[0].wells, preds['inductive'].set_index('id_code')
    w = w[w.experiment == 'HUVEC-17'].set_index('well_id')
    kinds = w.well_type.str.replace('_', ' ')
    t = pd.DataFrame(dict(experiment=w.experiment, plate=w.plate.astype(str), well=w.well, sirna=w.sirna, prediction=pred.sirna.reindex(w.index), score=pred.score.reindex(w.index), protocol=pred.protocol.reindex(w.index), kind=kinds))
    return t.rename_axis('well_id').reset_index()


@browses
def test_selected_wells_are_listed_copied_and_downloaded(made, preds, tab):
    want = selected(made, preds)
    page = tab('q=HUVEC-17')
    tab.page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    page.click('#to-list')
    assert page.inner_text('#list h2') == f'{len(want)} selected wells' and page.locator('#list tbody tr').count() == len(want)
    named = want.prediction.first_valid_index()
    cells = page.locator('#list tbody tr').nth(named).locator('td').all_inner_texts()
    assert cells[:5] == want.iloc[named, :5].tolist() and cells[5].rstrip(' ✓✗') == want.prediction[named] and cells[6] == f'{want.score[named]:.3f}'
    def same(text, sep):
        t = pd.read_csv(io.StringIO(text), sep=sep, dtype={'plate': str}).map(csv_name)
        pd.testing.assert_frame_equal(t.drop(columns='score'), want.drop(columns='score'), check_dtype=False)
        np.testing.assert_allclose(t.score, want.score, atol=1e-3)
    with page.expect_download() as got: page.get_by_text('Download CSV').click()
    text = Path(got.value.path()).read_text(encoding='utf-8')
    assert got.value.suggested_filename.endswith('_wells.csv') and "'=cmd()" in text
    same(text, ',')
    page.locator('#list').get_by_text('Copy', exact=True).click()
    page.wait_for_function("document.querySelector('#list [role=status]').textContent != ''")
    assert page.inner_text('#list [role=status]') == f'{len(want)} wells copied'
    same(page.evaluate('navigator.clipboard.readText()'), '\t')
    page.locator('#list tbody button').nth(named).click()
    open_well(page, want.well_id[named])


@browses
def test_a_frame_lists_copies_and_downloads(made, tab, tmp_path):
    (tmp_path/'notebook.html').write_text(f'<!doctype html><meta charset="utf-8">{made[2]._repr_html_()}', encoding='utf-8')
    tab.page.goto((tmp_path/'notebook.html').as_uri())
    frame = tab.page.frame_locator('iframe')
    frame.locator('#search').fill('HUVEC-17_1_B02')
    with tab.page.expect_download() as got: frame.get_by_text('Download CSV').click()
    assert 'HUVEC-17_1_B02' in Path(got.value.path()).read_text(encoding='utf-8')
    frame.locator('#list').get_by_text('Copy', exact=True).click()
    frame.locator('#list [role=status]', has_text='1 well copied').wait_for()


@browses
def test_a_pinned_well_stands_beside_the_next(made, preds, tab):
    "On one scale: what is black and white in both is of the sites of both"
    screen, a = made[0], preds['inductive'].id_code[0]
    page = tab(f'w={a}&m=panels')
    open_well(page, a)
    page.click('#pin')
    assert 'open another well' in page.inner_text('#well')
    page.locator('#well .near button').first.click()
    page.wait_for_selector('aside.two')
    b = page.inner_text('#well h2')
    assert b != a and open_well(page, b)
    canvases = page.locator('#well .pics.two canvas')
    assert canvases.count() == 2*2*6 and canvases.first.bounding_box()['width'] > 300
    assert canvases.nth(0).bounding_box()['y'] == canvases.nth(1).bounding_box()['y']
    sites = [screen.table.site_id[screen.table.well_id == w] for w in (a, b)]
    limits = np.array([black_white(np.asarray(screen.source[s])) for s in pd.concat(sites)])
    lo, hi = limits[:, 0, 0].min(), limits[:, 1, 0].max()
    for i, mine in enumerate(sites):
        label = canvases.nth(i).get_attribute('aria-label')
        assert label.endswith(f'of {(a, b)[i]}')
        shown = page.evaluate("i => { const c = document.querySelectorAll('#well .pics.two canvas')[i], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return Array.from({length: c.width*c.height}, (_, j) => d[4*j]); }", i)
        wanted = np.clip((np.asarray(screen.source[mine.iloc[0]])[0] - float(lo))/(hi - lo)*255, 0, 255).ravel()
        assert np.abs(np.array(shown) - wanted).mean() < 12
        assert page.locator('#well .pics.two figcaption').nth(i).inner_text().endswith(f'{lo}…{hi}')
    page.reload()
    page.wait_for_selector('html[data-ready]')
    assert page.locator('aside.two').count() == 1 and open_well(page, b)
    page.select_option('#experiment', 'HUVEC-17')
    canvas, x, y = at(page, screen, preds['inductive'].id_code[3])         # the next one that is clicked
    canvas.click(position=dict(x=x, y=y))
    open_well(page, preds['inductive'].id_code[3])
    assert [t.inner_text() for t in page.locator('#well .pics.two > div > b').all()] == [a, preds['inductive'].id_code[3]]
    page.locator('#chips button').click()
    assert page.locator('aside.two').count() == 0 and page.inner_text('#well h2') == preds['inductive'].id_code[3]


LONG = 'Kinase_inhibitor_library_2026_compound_{}_uM'


@pytest.fixture(scope='module')
def long_names(made, preds, tmp_path_factory):
    "A page on which perturbations have names of 40 letters or more, which differ at the end"
    screen, path = made[0], tmp_path_factory.mktemp('long')/'page.html'
    names = {n: LONG.format(f'{i:03d}') for i, n in enumerate(sorted(screen.table.sirna.dropna().unique()))}
    pred = preds['inductive'].copy()
    for c in ['sirna', *(f'top_{i}' for i in range(1, 6))]: pred[c] = pred[c].map(names).where(pred[c].notna())
    explore(None, Screen(screen.table.assign(sirna=screen.table.sirna.map(names)), screen.source), pred, path, side=0)
    return path


@browses
@pytest.mark.parametrize('width', [400, 1280])
def test_long_names_hide_nothing_that_matters(preds, long_names, tab, width):
    tab.page.set_viewport_size(dict(width=width, height=800))
    ends = "s => [...document.querySelectorAll(s + ' .long')].filter(e => e.offsetParent).map(e => { const r = document.createRange(), b = e.closest('td,button,span:not(.long)').getBoundingClientRect(); r.selectNodeContents(e.lastChild); return r.getBoundingClientRect().right <= b.right + 1 && e.getBoundingClientRect().width < 260; })"
    for state, where in (('c=label', '#legend'), ('v=confusions', '#confusions'), ('r=wrong', '#list'), (f'w={preds["inductive"].id_code[0]}', '#well'), ('v=confusions&pair=' + LONG.format('001'), '#chips')):
        page = tab(state, long_names)
        seen = page.evaluate(ends, where)
        assert seen and all(seen), (state, seen)
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    page = tab('v=confusions', long_names)
    inside = "() => [...document.querySelectorAll('#confusions .cols > div')].map(d => [...d.querySelectorAll('tbody tr')].every(r => r.querySelector('td.n').getBoundingClientRect().right <= d.getBoundingClientRect().right + 1))"
    assert all(page.evaluate(inside))                              # the counts beside the names
    name = page.locator('#confusions td:nth-child(2) .long').first
    name.hover()
    assert page.inner_text('#tip') == name.text_content() and len(name.text_content()) >= 40
    page.mouse.move(1, 1)
    assert page.is_hidden('#tip')
    page.locator('#confusions button.link').first.focus()
    page.keyboard.press('Shift+Tab')
    page.keyboard.press('Tab')
    row = page.locator('#confusions tbody tr').first.locator('.long')
    assert page.inner_text('#tip').split('\n') == row.all_text_contents()


@browses
def test_a_printed_plate_is_legible(made, tab):
    "As wide as the paper, drawn finely, in light colors whatever the screen has, without what only answers to clicks"
    tab.page.set_viewport_size(dict(width=794, height=1123))               # A4
    tab.page.emulate_media(color_scheme='dark')
    page = tab('w=HUVEC-17_1_B02')
    page.evaluate("addEventListener('beforeprint', () => { window.before = document.querySelector('.plate canvas').width; })")
    page.pdf()
    assert page.evaluate('window.before') == 2000                          # drawn anew before paper is made
    page.emulate_media(media='print', color_scheme='dark')
    page.wait_for_selector('html[data-paper]')
    boxes = [c.bounding_box() for c in page.locator('.plate canvas').all()]
    assert all(b['width'] > 700 for b in boxes) and boxes[1]['y'] >= boxes[0]['y'] + boxes[0]['height']
    assert np.allclose([b['height']/b['width'] for b in boxes], 16/24, atol=.03)
    assert page.locator('#well').bounding_box()['y'] > boxes[-1]['y'] + boxes[-1]['height']
    assert all(page.is_hidden(s) for s in ('nav', '#search', '#close', '#experiment', '#channels')) and page.is_visible('#legend')
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == 'rgb(255, 255, 255)'
    assert 'HUVEC-17' in page.locator('.plate figcaption').first.inner_text()
    page.emulate_media(media='screen')
    page.wait_for_selector('html:not([data-paper])')
    assert page.evaluate("document.querySelector('.plate canvas').width") < 2000


@browses
@pytest.mark.parametrize('state, canvas', [('', '.plate canvas'), ('v=map', '#map-canvas')])
def test_the_wheel_zooms_around_the_pointer(made, preds, tab, state, canvas):
    page, screen = tab(state), made[0]
    c, well = page.locator(canvas).first, preds['inductive'].id_code[0]
    first, box = page.evaluate('s => document.querySelector(s).toDataURL()', canvas), c.bounding_box()
    if state:
        d, places = data_in(page), map_places(page)
        w = max((w for w in places if d['wells']['id'][w] in set(preds['inductive'].id_code)), key=lambda w: min(np.hypot(*(places[w] - o)) for v, o in places.items() if v != w))
        well, (x, y) = d['wells']['id'][w], map(float, places[w])
    else: c, x, y = at(page, screen, well)
    page.mouse.move(box['x'] + x, box['y'] + y)
    page.keyboard.down('Control')
    for _ in range(3): page.mouse.wheel(0, -120)
    page.keyboard.up('Control')
    page.wait_for_timeout(100)
    assert page.evaluate('s => document.querySelector(s).toDataURL()', canvas) != first and page.evaluate('visualViewport.scale') == 1
    page.mouse.move(box['x'] + x + 5, box['y'] + y)
    page.mouse.move(box['x'] + x, box['y'] + y)
    assert page.inner_text('#tip').startswith(well)                        # it is where it was
    page.mouse.down()                                                      # drag
    page.mouse.move(box['x'] + x + 60, box['y'] + y + 40, steps=4)
    page.mouse.up()
    page.mouse.move(box['x'] + x + 65, box['y'] + y + 40)
    page.mouse.move(box['x'] + x + 60, box['y'] + y + 40)
    assert page.inner_text('#tip').startswith(well) and page.is_hidden('#well')
    page.mouse.dblclick(box['x'] + box['width'] - 4, box['y'] + 5)
    page.wait_for_timeout(100)
    page.mouse.move(1, 1)
    page.evaluate('document.activeElement.blur()')                          # without the frame of the keyboard
    assert page.evaluate('s => document.querySelector(s).toDataURL()', canvas) == first


@browses
@pytest.mark.parametrize('state, canvas', [('', '.plate canvas'), ('v=map', '#map-canvas')])
def test_fingers_zoom_move_and_reset(browser, made, preds, state, canvas):
    context = browser.new_context(viewport=dict(width=400, height=700), has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f'{made[3].as_uri()}#{state}')
    page.wait_for_selector('html[data-ready]')
    page.evaluate("s => document.querySelector(s).scrollIntoView({block: 'center'})", canvas)
    send, box = context.new_cdp_session(page).send, page.locator(canvas).first.bounding_box()
    def touch(kind, *points): send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=[dict(x=a, y=b, id=i) for i, (a, b) in enumerate(points)]))
    def shown():
        page.wait_for_timeout(150)
        page.evaluate('document.activeElement.blur()')                      # without the frame of the keyboard
        return page.evaluate('s => [document.querySelector(s).toDataURL(), scrollY, visualViewport.scale]', canvas)
    x, y, first = box['x'] + 150, box['y'] + 120, shown()
    touch('touchStart', (x - 20, y))
    touch('touchStart', (x - 20, y), (x + 20, y))
    for d in range(25, 80, 5): touch('touchMove', (x - d, y), (x + d, y))
    touch('touchEnd')
    zoomed = shown()
    assert zoomed[0] != first[0] and zoomed[1:] == first[1:] and page.is_hidden('#well')
    touch('touchStart', (x, y))
    for d in range(0, 60, 6): touch('touchMove', (x - d, y - d))           # one finger moves what is zoomed
    touch('touchEnd')
    moved = shown()
    assert moved[0] != zoomed[0] and moved[1:] == first[1:] and page.is_hidden('#well')
    for _ in range(2):
        touch('touchStart', (x, y))
        touch('touchEnd')
        page.wait_for_timeout(60)
    page.wait_for_timeout(500)
    assert shown() == first and page.is_hidden('#well')
    context.close()


@browses
def test_the_keyboard_zooms_a_plate_and_finds_its_wells(made, tab):
    page = tab()
    c = page.locator('canvas[aria-label^="Plate 1 of HUVEC-17"]')
    c.focus()
    for key in ('+', '+', '+', '+'): page.keyboard.press(key)
    wells = made[0].wells.query("experiment == 'HUVEC-17' and plate == 1")
    for _ in range(len(wells)):
        page.keyboard.press('ArrowDown')
        tip, box = page.locator('#tip').bounding_box(), c.bounding_box()
        assert box['x'] <= tip['x'] and tip['y'] <= box['y'] + box['height'] + 20     # the well is seen, and so is its tip
    page.keyboard.press('0')
    page.click('#close') if page.is_visible('#close') else None
    assert 'zoomed' not in (c.get_attribute('class') or '')
