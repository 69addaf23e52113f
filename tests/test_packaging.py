"The house is in order: the two settings files agree, the wheel is whole, notebooks and pages are clean."
import ast, base64, importlib, json, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB, NBS, DOCS = ROOT/'rcic_fastai', ROOT/'nbs', ROOT/'docs'
NOTEBOOKS = [ROOT/'index.ipynb'] + sorted(p for p in NBS.glob('*.ipynb') if not p.is_symlink())
MODULES = sorted(LIB.rglob('*.py'))
MACHINE_PATH = re.compile(r'''(?<![\w.:/~-])/(?:tmp|work|root|home|Users|private/var|var/folders)/[\w.-]''')

sys.path.insert(0, str(ROOT/'tools'))
import docs as pages  # noqa: E402


def name_of(path): return path.name


def settings():
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def pyproject():
    if sys.version_info < (3, 11): pytest.skip('tomllib needs Python 3.11')
    import tomllib
    return tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))


def setup_arguments(monkeypatch):
    "What setup.py hands to setuptools."
    import setuptools
    given = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    exec((ROOT/'setup.py').read_text(encoding='utf-8'), {'__file__': str(ROOT/'setup.py')})
    return given


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']


def code(nb):
    "(number, source, directives) of the code cells that are Python."
    for n, cell in enumerate(cells(nb)):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and not re.search(r'^\s*[!%]', source, re.MULTILINE):
            yield n, source, pages.options(source)


# ---- settings

FIELD = dict(version='version', long_description='readme', author='authors', keywords='keywords', license='license',
             python_requires='requires-python', install_requires='dependencies', extras_require='optional-dependencies',
             classifiers='classifiers')


def test_settings_and_pyproject_agree(monkeypatch):
    cfg, project, given = settings(), pyproject()['project'], setup_arguments(monkeypatch)
    assert project['name'] == cfg['lib_name'] == given['name'] == pyproject()['tool']['nbdev']['lib_name']
    assert project['description'] == cfg['description'] == given['description']
    set_here = {FIELD[k] for k in given if k in FIELD} | {'scripts', 'entry-points'}
    assert set(project['dynamic']) == set_here
    assert given['version'] == cfg['version'] == re.search(r"'(.*)'|\"(.*)\"", (LIB/'__init__.py').read_text())[0][1:-1]
    assert given['python_requires'] == f">={cfg['min_python']}"
    assert f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d" in given['entry_points']['nbdev']


def test_nbdev_and_the_docs_builder_are_for_developers_only(monkeypatch):
    given = setup_arguments(monkeypatch)
    plain = ' '.join(given['install_requires'])
    for name in ('nbdev', 'smalldocs', 'pytest'):
        assert name not in plain
        assert any(r.startswith(name) for r in given['extras_require']['dev'])


def test_console_scripts_are_callable(monkeypatch):
    scripts = setup_arguments(monkeypatch)['entry_points']['console_scripts']
    names = {s.split('=')[0] for s in scripts}
    assert names >= {f'rcic_{verb}' for verb in ('simulate', 'train', 'predict', 'evaluate', 'demo')}
    for script in scripts:
        module, name = script.split('=')[1].split(':')
        assert callable(getattr(importlib.import_module(module), name)), script


def test_wheel_holds_every_module_and_table(tmp_path):
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(LIB, tmp_path/'rcic_fastai', ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation',
               '-w', 'out', '.']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = (tmp_path/'out').glob('*.whl')
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {p.relative_to(ROOT).as_posix() for p in MODULES} <= inside
    tables = {f'rcic_fastai/tables/{p.name}' for p in (LIB/'tables').glob('*.csv')}
    assert tables and tables <= inside


@pytest.mark.parametrize('module', ['rcic_fastai', 'rcic_fastai.all'])
def test_import_brings_nothing_heavy(module):
    heavy = ['timm', 'faiss', 'pyarrow.parquet', 'efficientnet_pytorch', 'nbdev', 'safetensors.torch']
    text = ('import sys\nfrom fastai.vision.all import *\nbefore = set(sys.modules)\n'
            f'import {module}\nprint(*[m for m in {heavy} if m in sys.modules and m not in before])')
    done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# ---- notebooks

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name_of)
def test_notebook_is_small_and_clean(nb):
    assert nb.stat().st_size < 2**20, f'{nb.stat().st_size} bytes'
    for n, cell in enumerate(cells(nb)):
        assert not MACHINE_PATH.search(''.join(cell['source'])), f'cell {n} names a path of one machine'
        for out in cell.get('outputs', []):
            assert out['output_type'] != 'error', f'cell {n} stores an error'
            data = dict(out.get('data', {}))
            if png := data.pop('image/png', None):
                size = len(base64.b64decode(pages.text_of(png)))
                assert size < 100_000, f'the picture of cell {n} has {size} bytes'
            found = MACHINE_PATH.search(json.dumps(data) + ''.join(out.get('text', [])))
            assert not found, f'the output of cell {n} names a path of one machine: {found[0]}'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name_of)
def test_notebook_begins_with_title_and_description(nb):
    first = cells(nb)[0]
    lines = [l for l in ''.join(first['source']).splitlines() if l.strip()]
    assert first['cell_type'] == 'markdown' and len(lines) == 2, 'what else this cell holds would not reach the page'
    assert re.match(r'# \S', lines[0]) and re.match(r'> \S', lines[1])


@pytest.mark.parametrize('nb', NOTEBOOKS[1:], ids=name_of)
def test_notebook_imports_only_lower_numbers(nb):
    number = {pages.page_name(p): pages.number(p) for p in NOTEBOOKS[1:]}
    mine, exports = pages.number(nb), {}
    for _, _, option in code(nb): exports |= option
    for n, source, option in code(nb):
        for node in ast.walk(ast.parse(source)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else \
                    [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in (x.split('.', 1)[1] for x in names if x.startswith('rcic_fastai.')):
                if module == 'all': assert 'export' not in option and mine >= (20, ''), f'cell {n} imports everything'
                elif module != exports.get('default_exp'): assert number[module] < mine, f'cell {n} imports {module}'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name_of)
def test_imports_have_their_own_cells(nb): assert pages.mixed_cells(nb) == []


@pytest.mark.parametrize('nb', NOTEBOOKS[1:], ids=name_of)
def test_exported_cells_are_short(nb):
    for n, source, option in code(nb):
        if 'export' in option: assert len(source.splitlines()) <= 60, f'cell {n} has {len(source.splitlines())} lines'


@pytest.mark.parametrize('module', MODULES, ids=name_of)
def test_module_is_finished(module):
    text = module.read_text(encoding='utf-8')
    assert not re.search(r'\b(TODO|FIXME|XXX|NotImplementedError)\b', text)
    assert not MACHINE_PATH.search(text)


# ---- pages

def anchors(page): return set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding='utf-8')))


PAGES = sorted(DOCS.glob('*.html'))


def test_every_notebook_has_a_page():
    assert {p.stem for p in PAGES} == {pages.page_name(nb) for nb in NOTEBOOKS}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_of_page_lead_somewhere(page):
    text = re.sub(r'<(pre|code)\b.*?</\1>', '', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    links = re.findall(r'\b(?:href|src)="([^"]*)"', text)
    assert links and not any(l.startswith('data:image/png') for l in links)
    for link in links:
        if re.match(r'[a-z]+:|//', link): continue
        path, _, anchor = unquote(link).partition('#')
        target = DOCS/path if path else page
        if path in ('./', '.'): target = DOCS/'index.html'
        assert target.exists(), f'{link} leads nowhere'
        if anchor and target.suffix == '.html': assert anchor in anchors(target), f'{link} has no such anchor'


def test_search_works_from_the_file_system():
    text = (DOCS/'search.js').read_text(encoding='utf-8')
    entries = json.loads(text.removeprefix('window.searchIndex = ').strip().removesuffix(';'))
    assert {e['href'].split('#')[0] for e in entries} == {p.name for p in PAGES}
    assert "'search.js'" in (DOCS/'pages.js').read_text(encoding='utf-8')
    assert all('<script src="pages.js">' in p.read_text(encoding='utf-8') for p in PAGES)


def test_pages_have_parameter_tables_and_no_address():
    text = (DOCS/'showdoc.html').read_text(encoding='utf-8')
    assert re.search(r'<th[^>]*>Details</th>', text)
    for page in PAGES: assert not re.search(r' at 0x[0-9a-f]{6}', page.read_text(encoding='utf-8')), page.name


def test_readme_pictures_exist():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#\s]+)\)', text):
        if not re.match(r'[a-z]+:', link): assert (ROOT/link).exists(), link


# ---- the check itself

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project, to spoil."
    top = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'tools', 'rcic_fastai', 'docs'):
        shutil.copytree(ROOT/name, top/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '_proc'))
    for name in ('index.ipynb', 'pyproject.toml', 'settings.ini', 'README.md'): shutil.copy(ROOT/name, top)
    record = json.loads((top/'docs'/'build.json').read_text())
    record['tools']['nbdev'] = 'another'   # checked by checksum, which is quick
    (top/'docs'/'build.json').write_text(json.dumps(record))
    return top


@pytest.mark.parametrize('spoiled', ['rcic_fastai/showdoc.py', 'rcic_fastai/extra.py', 'docs/index.html', 'README.md',
                                     'index.ipynb'])
def test_sync_check_names_the_spoiled_file(copy, spoiled):
    path = copy/spoiled
    before = path.read_bytes() if path.exists() else None
    if spoiled == 'index.ipynb': path.write_bytes(before.replace(b'microscopy screens', b'microscope screens'))
    else: path.write_bytes((before or b'') + b'\n# changed by hand\n')
    command = [sys.executable, 'tools/sync.py', 'check']
    try: done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    finally: path.write_bytes(before) if before is not None else path.unlink()
    assert done.returncode == 1, done.stdout + done.stderr
    named = 'README.md' if spoiled == 'index.ipynb' else spoiled
    assert f'sync: {named} ' in done.stdout


def test_the_front_page_quotes_what_was_measured():
    r = json.loads((ROOT/'bench/results/demo.json').read_text())
    page = (ROOT/'README.md').read_text()
    bold = ' | '.join(f"**{r[p]['accuracy']:.3f}**" for p in ('inductive', 'adapted', 'transductive'))
    assert bold in page and 'PLACEHOLDER' not in page
    for e, v in r['inductive']['by_experiment'].items():
        assert f"| {e} | {v:.3f} | {r['adapted']['by_experiment'][e]:.3f} | {r['transductive']['by_experiment'][e]:.3f} |" in page


def test_the_page_of_figures_is_current():
    import hashlib
    text = (NBS/'91_measured.ipynb').read_text(encoding='utf-8')
    for f in sorted((ROOT/'bench/results').glob('*.json')):
        assert f'{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()[:16]}' in text, f'run nbs/91_measured.ipynb again: {f.name} has changed'


def test_the_lock_file_pins_what_is_required_with_checksums():
    wanted = subprocess.run([sys.executable, ROOT/'tools/lock.py'], capture_output=True, text=True, check=True).stdout.split('\n')
    plain = lambda s: re.sub(r'[-_.]+', '-', re.match(r'[A-Za-z0-9._-]+', s)[0]).lower()
    entries = re.split(r'\n(?=\S)', (ROOT/'requirements.lock').read_text())
    locked = {plain(e): e for e in entries if e.strip()}
    assert not {plain(o) for o in wanted if o} - set(locked)
    for name, e in locked.items(): assert '==' in e.split('\n')[0] and '--hash=sha256:' in e, name
