"""Take the pictures of a page of rcic_explore, and store them in the notebooks that show them.

    python tools/pictures.py DEMO

DEMO is a folder of rcic_demo. Needs playwright and a Chromium (on the path, or EXPLORE_BROWSER). A picture belongs to the
cell that ends with `Image('NAME.png')` and is never run; it has a palette, so that it stays below 100 kB.
"""
import argparse, base64, io, json, os, re, shutil
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MOST = 100_000      # bytes of a stored picture
# name → (address, width, height, dark, colors); {wrong} and {right} are wells of the first test experiment
VIEWS = {'explore.png': ('p=1&w={right}', 1240, 1160, False, 64), 'page.png': ('p=0&w={wrong}', 1240, 1000, False, 96),
         'map.png': ('v=map&p=1&c=label&w={right}', 1240, 760, False, 48), 'confusions.png': ('v=confusions&p=0', 1240, 520, False, 48),
         'accuracy.png': ('v=accuracy', 1240, 700, False, 48), 'panels.png': ('w={right}&m=panels&s=plate', 620, 800, True, 32)}


def wells(data):
    "A wrong well and a right one of the first test experiment, of the first prediction"
    p, w = data['predictions'][0], data['wells']
    mine = [(w['id'][i], l == w['truth'][i]) for i, l in zip(p['wells'], p['label']) if w['experiment'][i] == w['experiment'][p['wells'][0]]]
    return {'wrong': next(i for i, ok in mine if not ok), 'right': next(i for i, ok in mine[2*len(mine)//3:] if ok)}


def small_png(raw, colors):
    "A picture with a palette, as large as a page shows it"
    im, out = Image.open(io.BytesIO(raw)).convert('RGB'), io.BytesIO()
    if im.width > 880: im = im.resize((880, round(im.height*880/im.width)), Image.LANCZOS)
    im.quantize(colors, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return out.getvalue()


def take(page, names):
    "{name: PNG}"
    from playwright.sync_api import sync_playwright
    done = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get('EXPLORE_BROWSER') or shutil.which('chromium'), args=['--no-sandbox'])
        for name in names:
            state, width, height, dark, colors = VIEWS[name]
            tab = browser.new_page(viewport=dict(width=width, height=height), color_scheme='dark' if dark else 'light')
            tab.goto(page.as_uri())
            tab.wait_for_selector('html[data-ready]')
            data = json.loads(tab.evaluate("document.getElementById('data').textContent"))
            tab.goto('about:blank')
            tab.goto(f'{page.as_uri()}#{state.format(**wells(data))}')
            tab.wait_for_selector('html[data-ready]')
            if 'w=' in state: tab.wait_for_selector('#well[data-ready]:not([data-ready=""])')
            done[name] = small_png(tab.screenshot(), colors)
            tab.close()
        browser.close()
    return done


def shown(cell):
    "The name of the picture that a cell shows; None for any other cell"
    source = ''.join(cell['source'])
    m = re.search(r"^Image\('([\w.]+)'\)", source, re.M)
    return m[1] if m and cell['cell_type'] == 'code' and 'eval: false' in source else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('demo', type=Path, help='a folder of rcic_demo')
    page, pictures = parser.parse_args().demo.resolve()/'explore.html', {}
    for path in [ROOT/'index.ipynb', *sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))]:
        nb = json.loads(path.read_text(encoding='utf-8'))
        cells = [c for c in nb['cells'] if shown(c) in VIEWS]
        if not cells: continue
        pictures.update(take(page, [n for n in map(shown, cells) if n not in pictures]))
        for c in cells:
            png = pictures[shown(c)]
            if len(png) > MOST: raise SystemExit(f'{shown(c)} has {len(png)} bytes: give it fewer colors.')
            data = {'image/png': base64.b64encode(png).decode() + '\n', 'text/plain': ['<IPython.core.display.Image object>']}
            c['outputs'] = [dict(data=data, execution_count=None, metadata={}, output_type='execute_result')]
            print(f'{path.name}: {shown(c)}, {len(png)/1000:.0f} kB')
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
