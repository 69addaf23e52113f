"""How long the page of `explore` takes to make, to open and to answer, and how smoothly its map moves.

    python bench/explore.py [DEMO]

DEMO is a folder of rcic_demo; without it one is made (some minutes). The figures of a browser need playwright and a
Chromium (`chromium` on the path, or EXPLORE_BROWSER); without them they are left out, and nothing is stored.
"""
import argparse, json, os, shutil, tempfile, time
from pathlib import Path

import numpy as np

from machine import save
from rcic_fastai.all import *
from rcic_fastai.predict.plan import embed_plan
from rcic_fastai.results.explore import *

ASKED = dict(megabytes=25, open_s=2, click_ms=100, map_fps=30, site_ms=5)
WATCH = '''() => {     // milliseconds from a click until the pictures of the well are drawn, and until those of its neighbors are, too
  const well = document.getElementById('well');
  addEventListener('click', () => { window.clicked = performance.now(); }, true);
  window.took = [0, 0];
  new MutationObserver(changes => {
    for (const c of changes) {
      if (c.attributeName === 'data-own' && well.dataset.own) window.took[0] = performance.now() - window.clicked;
      if (c.attributeName === 'data-ready' && well.dataset.ready) window.took[1] = performance.now() - window.clicked;
    }
  }).observe(well, {attributes: true});
}'''
FRAMES = '''() => new Promise(done => {     // frames in two seconds in which the map moves in every frame
  const map = document.getElementById('map-canvas'), times = [];
  function step(t) {
    times.push(t);
    map.dispatchEvent(new KeyboardEvent('keydown', {key: times.length % 80 < 40 ? 'ArrowLeft' : 'ArrowRight', cancelable: true}));
    if (t - times[0] < 2000) requestAnimationFrame(step); else done((times.length - 1)/(times.at(-1) - times[0])*1000);
  }
  requestAnimationFrame(step);
})'''


def building(screen, columns, side=96, quality=70):
    "Milliseconds per site for encoding, and for reading, one core"
    ids = screen.table.site_id.iloc[::8]
    start = time.perf_counter()
    sites = [np.asarray(screen.source[i]) for i in ids]
    read = time.perf_counter() - start
    start = time.process_time()
    for x in sites: site_sprite(x, side, quality)
    return dict(site_ms=round(1e3*(time.process_time() - start)/len(ids), 2), read_ms=round(1e3*read/len(ids), 2))


def demo_page(demo, out):
    "The page of a demo with its three predictions, and the seconds that it took beyond embedding"
    screen, model = open_screen(demo/'screen.zarr'), load_model(demo/'model')
    preds = [read_predictions(demo/f'{p}.csv') for p in PROTOCOLS]
    emb = {p: embed_plan(model, plan_prediction(model, screen, p), progress=False) for p in ('inductive', 'adapted')}
    start = time.perf_counter()
    page = explore(model, screen, preds, out, embeddings=dict(emb, transductive=emb['adapted']), progress=False)
    figures = dict(page_s=round(time.perf_counter() - start, 1), megabytes=round(out.stat().st_size/1e6, 1), wells=len(page.data['wells']['id']), pictures=len(page.pictures.texts))
    return {**figures, **building(screen, page)}


def large_page(out, experiments=18, sirnas=1108):
    "A page of 20,000 wells with embeddings and no pictures"
    names = [f'HUVEC-{i+1:02d}' for i in range(experiments)]
    emb = toy_profiles(names[:-2], names[-2:], n_sirnas=sirnas, sites=1, seed=0)
    meta = emb_metadata(emb)
    test = (meta.dataset == 'test').to_numpy()
    queries, index = emb[test & (meta.well_type == 'treatment').to_numpy()].reset_index(drop=True), EmbeddingIndex(emb[~test])
    space = EmbeddingSpace('inductive', queries, index)
    pred, _ = predict_wells(queries, index)
    page = screen_page(Screen(meta, None, 'large'), [PageColumn('inductive', pred, space, dict(vote='nearest'))], umap='no')
    page.save(out)
    return dict(large_wells=len(page.data['wells']['id']), large_megabytes=round(out.stat().st_size/1e6, 1))


def browse(small, large):
    "Seconds to open, milliseconds from a click to drawn pictures (medians of 12 wells), frames per second"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        named = os.environ.get('EXPLORE_BROWSER') or shutil.which('chromium')
        browser = p.chromium.launch(executable_path=named, args=['--no-sandbox'])
        tab = browser.new_page(viewport=dict(width=1440, height=900))
        def opened(path, state=''):
            start = time.perf_counter()
            tab.goto(f'{path.as_uri()}#{state}')
            tab.wait_for_selector('html[data-ready]')
            return time.perf_counter() - start
        seconds = [opened(small), (tab.goto('about:blank'), opened(small))[1]]
        data = json.loads(tab.evaluate("document.getElementById('data').textContent"))
        tab.evaluate(WATCH)
        clicks = []
        for w in data['predictions'][0]['wells'][:12]:
            wells, canvas = data['wells'], tab.locator(f'canvas[aria-label^="Plate {data["plates"][data["wells"]["plate"][w]]} of "]')
            step = (canvas.bounding_box()['width'] - 20)/data['shape'][1]
            canvas.click(position=dict(x=18 + (wells['col'][w] + .5)*step, y=14 + (wells['row'][w] + .5)*step))
            tab.wait_for_selector(f'#well[data-ready="{wells["id"][w]}"]')
            clicks.append(tab.evaluate('window.took'))
        tab.goto('about:blank')
        large_s = opened(large, 'v=map&c=label')
        fps = [tab.evaluate(FRAMES) for _ in range(2)]
        browser.close()
    own, all_ = np.array(clicks).T
    return dict(open_s=round(max(seconds), 2), click_ms=round(float(np.median(own))), click_worst_ms=round(own.max()), click_with_neighbors_ms=round(float(np.median(all_))), large_open_s=round(large_s, 2), map_fps=round(min(fps), 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('demo', nargs='?', type=Path, help='a folder of rcic_demo')
    parser.add_argument('--no-save', action='store_true', help='print the figures only')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        if args.demo is None: run_demo(tmp/'demo')
        figures = {**demo_page(args.demo or tmp/'demo', tmp/'demo.html'), **large_page(tmp/'large.html')}
        try: figures.update(browse(tmp/'demo.html', tmp/'large.html'))
        except ImportError: args.no_save = print('playwright is not installed: the figures of a browser are left out') or True
    print(f"{'':24}{'measured':>10}{'asked':>10}")
    for k, v in figures.items(): print(f'{k:24}{v:10}{ASKED.get(k, ""):>10}')
    if not args.no_save: save('explore', **figures, asked=ASKED)


if __name__ == '__main__': main()
