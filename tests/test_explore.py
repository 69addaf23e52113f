"The page of `explore`: what its data hold, what it asks for, and how it answers in a browser."
import json, os, re, shutil
from functools import lru_cache
from pathlib import Path
import numpy as np, pandas as pd, pytest
from helpers import learner, refused
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.results.explore import *
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.layout import simulate_screen

HOSTILE = ['</script><img src=x onerror=alert(1)>', '<b>bold</b>', '"quoted" & \'single\'', '{{pictures}}', '=cmd()', 'ä 細胞 \u2028 \u202e']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(screen, model, page, path): two experiments to name after two, half of the names hostile"
    top = tmp_path_factory.mktemp('explore')
    simulate_screen(top/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17', 'HUVEC-18'], sirnas=8, size=32, plates=2, controls=1, progress=False)
    plain = open_screen(top/'screen')
    names = sorted(plain.table.sirna[plain.table.well_type == 'treatment'].unique())
    table = plain.table.replace({'sirna': dict(zip(names, HOSTILE))})
    table['stain'] = np.where(table.plate == 1, '</script><script>alert(2)</script>', None)
    table['dose'] = np.arange(len(table))/7
    screen = Screen(table, plain.source, 'A <b>screen</b>')
    model = learner(screen_dls(screen, valid='HUVEC-02', bs=16, device='cpu')).to_model(tta=1, progress=False)
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
    assert not re.search(r'(?i)https?:|\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|import)\b\s*\(|@import|url\(', markup)
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


@pytest.mark.parametrize('max_mb', [.12, .2, 1])
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
