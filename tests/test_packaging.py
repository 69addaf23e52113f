"The house is in order: the two settings files agree, the wheel is whole, notebooks and pages are clean."
import ast, base64, importlib, json, os, re, shlex, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from configparser import ConfigParser
from functools import lru_cache
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB, NBS, DOCS = ROOT/'rcic_fastai', ROOT/'nbs', ROOT/'docs'
NOTEBOOKS = [ROOT/'index.ipynb'] + sorted(p for p in NBS.glob('*.ipynb') if not p.is_symlink())
MODULES = sorted(LIB.rglob('*.py'))
MACHINE_PATH = re.compile(r'''(?<![\w.:/~-])/(?:tmp|work|root|home|Users|private/var|var/folders)/[\w.-]''')

sys.path.insert(0, str(ROOT/'tools'))
import docs as pages, lock  # noqa: E402


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
             classifiers='classifiers', project_urls='urls')


def test_settings_and_pyproject_agree(monkeypatch):
    cfg, project, given = settings(), pyproject()['project'], setup_arguments(monkeypatch)
    assert project['name'] == cfg['lib_name'] == given['name'] == pyproject()['tool']['nbdev']['lib_name']
    assert project['description'] == cfg['description'] == given['description']
    set_here = {FIELD[k] for k in given if k in FIELD} | {'scripts', 'entry-points'}
    assert set(project['dynamic']) == set_here
    assert given['version'] == cfg['version'] == re.search(r"'(.*)'|\"(.*)\"", (LIB/'__init__.py').read_text())[0][1:-1]
    assert given['python_requires'] == f">={cfg['min_python']}"
    assert f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d" in given['entry_points']['nbdev']


def test_the_package_names_its_pages(monkeypatch):
    assert setup_arguments(monkeypatch)['project_urls'] == dict(
        Documentation=pages.pages_url(ROOT), Source=pages.repository(ROOT),
        Changelog=f"{pages.repository(ROOT)}/blob/{settings()['branch']}/CHANGELOG.md")
    assert (ROOT/'CHANGELOG.md').is_file()


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


# ---- what is built

def said(*command, cwd, **env):
    "What a command prints; it has to succeed"
    quiet = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=quiet | env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "{'sdist': …, 'wheel': …, 'wheel of the sdist': …}: files made from what is in the checkout"
    top = tmp_path_factory.mktemp('build')
    for f in ROOT.iterdir():
        if f.is_file(): shutil.copy(f, top)
    for d in ('rcic_fastai', 'tests', 'tools'):
        shutil.copytree(ROOT/d, top/d, ignore=shutil.ignore_patterns('__pycache__'))
    said(sys.executable, '-m', 'build', '--no-isolation', '--sdist', '--wheel', '--outdir', 'out', '.', cwd=top)
    sdist, wheel = next((top/'out').glob('*.tar.gz')), next((top/'out').glob('*.whl'))
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation']
    said(*pip, '-w', 'again', sdist, cwd=top)
    return {'sdist': sdist, 'wheel': wheel, 'wheel of the sdist': next((top/'again').glob('*.whl'))}


def inside(path):
    "Names of the files in an archive, without the folder that an sdist has around them"
    if path.suffix == '.whl': return set(zipfile.ZipFile(path).namelist())
    return {m.name.partition('/')[2] for m in tarfile.open(path) if m.isfile()}


@pytest.mark.parametrize('kind', ['sdist', 'wheel', 'wheel of the sdist'])
def test_what_is_built_holds_every_module_and_table(built, kind):
    library = {p.relative_to(ROOT).as_posix() for p in LIB.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert {'rcic_fastai/tables/sirna_int_to_name.csv', 'rcic_fastai/screen/tables.py'} <= library
    files = inside(built[kind])
    assert library <= files, library - files
    if kind == 'sdist': assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'} <= files
    assert not [f for f in files if f.startswith(('tests/', 'tools/', 'nbs/'))]


def test_what_is_built_says_where_its_pages_are(built):
    files = zipfile.ZipFile(built['wheel'])
    text = files.read(next(n for n in files.namelist() if n.endswith('.dist-info/METADATA'))).decode()
    found = dict(re.findall(r'^Project-URL: (\w+), (\S+)$', text, re.MULTILINE))
    assert found.keys() == {'Documentation', 'Source', 'Changelog'} and found['Source'] == pages.repository(ROOT)


USE_ALL = """
import importlib, pkgutil, rcic_fastai
from rcic_fastai.screen.tables import package_table
for m in pkgutil.walk_packages(rcic_fastai.__path__, 'rcic_fastai.'): importlib.import_module(m.name)
assert len(package_table('sirna_int_to_name')) > 1000
print(rcic_fastai.__file__)
"""

@pytest.mark.parametrize('kind', ['wheel', 'wheel of the sdist'])   # pip installs an sdist by making a wheel of it
def test_what_is_built_works_where_it_is_installed(built, kind, tmp_path):
    said(sys.executable, '-m', 'venv', '--without-pip', 'env', cwd=tmp_path)
    python = tmp_path/'env/bin/python'
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps', '--no-index']
    said(*pip, built[kind], cwd=tmp_path)
    site = Path(said(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path).strip())
    (site/'required.pth').write_text(sysconfig.get_path('purelib'))    # what it requires is that of this environment
    assert Path(said(python, '-c', USE_ALL, cwd=tmp_path).strip()) == site/'rcic_fastai/__init__.py'
    for script in settings()['console_scripts'].split():
        assert (python.parent/script.split('=')[0]).is_file()
    assert 'usage: rcic_simulate' in said(python.parent/'rcic_simulate', '--help', cwd=tmp_path)


# ---- what is required

# Named by those who ordered this library, whether a module imports them or not.
ORDERED = {'fastai', 'torch', 'efficientnet-pytorch', 'faiss-cpu', 'nbdev', 'pandas', 'numpy', 'scipy', 'matplotlib'}


def required(*extras): return {canonicalize_name(Requirement(r).name) for r in lock.requirements(*extras)}


def imports(path):
    "(name of the package, whether it is optional: imported in a function that has an answer to its absence) of a module"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inner = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    tried = {n for t in ast.walk(tree) if isinstance(t, ast.Try) and any('ImportError' in ast.unparse(h.type or t) for h in t.handlers)
             for n in ast.walk(t)}
    found = [(name.split('.')[0], n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and not getattr(n, 'level', 0)
             for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])]
    guarded = {name for name, n in found if n in tried}
    return {(name, n in inner and name in guarded) for name, n in found}


BRINGS = lru_cache(packages_distributions)
OTHER_NAMES = dict(umap='umap-learn', iterstrat='iterative-stratification')     # of packages of extras, which may not be installed

def distribution(name):
    "Name on PyPI of what brings a package; most of extras that are not installed have the same name"
    return canonicalize_name(BRINGS().get(name, [OTHER_NAMES.get(name, name)])[0])


def third_party(*folders):
    "{distribution: whether all its imports are optional} in these folders"
    own = {'rcic_fastai'} | {p.stem for d in ('tests', 'tools', 'bench') for p in (ROOT/d).glob('*.py')}
    found = {}
    for name, optional in [i for d in folders for p in sorted((ROOT/d).rglob('*.py')) for i in imports(p)]:
        if name in sys.stdlib_module_names or name in own: continue
        found[distribution(name)] = found.get(distribution(name), True) and optional
    return found


def test_every_import_of_the_library_is_required():
    found = third_party('rcic_fastai')
    assert {'google-crc32c', 'numcodecs', 'opencv-python-headless', 'anndata'} <= set(found)
    missing = {name for name, optional in found.items() if name not in required()}
    assert missing <= required(*lock.extras()), 'neither required nor of an extra'
    assert not [name for name in missing if not found[name]], 'of an extra, but its absence has no answer'


def test_every_import_of_tests_and_tools_is_required():
    assert set(third_party('tests', 'tools')) <= required(*lock.extras()) | {'setuptools', 'packaging'}


def test_nothing_is_required_that_is_not_imported():
    assert ORDERED <= required('dev')
    found = set(third_party('rcic_fastai'))
    assert required() - ORDERED <= found
    assert required(*(e for e in lock.extras() if e not in ('dev', 'peers'))) - ORDERED <= found
    assert required('peers') - required() <= set(third_party('tests'))


def test_every_requirement_has_a_lower_bound():
    for r in map(Requirement, [*lock.requirements(*lock.extras()), *lock.build_system()]):
        assert [s for s in r.specifier if s.operator in ('>=', '==')], f'{r} permits any version'


def unused_imports(path):
    "Names that a file imports and never uses; what follows `# ` on the line is a reason to keep it"
    text = path.read_text(encoding='utf-8')
    lines, tree = text.splitlines(), ast.parse(text)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}     # in __all__, and annotations in quotes
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or any('#' in line for line in lines[node.lineno - 1:node.end_lineno]): continue
        for a in node.names:
            name = a.asname or a.name.split('.')[0]
            if a.name != '*' and name not in used: yield f'{path.name}, line {node.lineno}: {name}'


@pytest.mark.parametrize('folder', ['rcic_fastai', 'tests', 'tools', 'bench'])
def test_nothing_is_imported_without_use(folder):
    files = [p for p in sorted((ROOT/folder).rglob('*.py')) if p.name not in ('all.py', '__init__.py', 'helpers.py', 'conftest.py')]     # these hand names on
    assert len(files) > 3 and not [line for p in files for line in unused_imports(p)]


def test_an_import_without_use_is_found(tmp_path):
    (tmp_path/'a.py').write_text('import os, json as j, numpy.random\nfrom pathlib import Path, PurePath\nimport sys  # kept\nx: "Path" = os.sep\n')
    assert [*unused_imports(tmp_path/'a.py')] == ['a.py, line 1: j', 'a.py, line 1: numpy', 'a.py, line 2: PurePath']


def names_of_packages(path):
    "`torch.nn.Linear` and the like: (line, what stands in the code) for the packages that are imported whole"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ''
        if re.fullmatch(r'(torch|np|pd|cv2)(\.\w+)+', text): yield node.lineno, text


def test_every_name_of_a_package_exists_in_this_version():
    "Also those of branches that are hardly ever taken; `make test-lowest` asks it of the lowest versions"
    import cv2, numpy as np, pandas as pd, torch, torch.distributed  # noqa: F401
    for path in MODULES:
        for line, text in names_of_packages(path):
            *inner, name = text.split('.')
            assert hasattr(eval('.'.join(inner)), name), f'{path.name}, line {line}: {text}'


def test_every_extra_is_one_of_the_package(monkeypatch):
    given = setup_arguments(monkeypatch)
    assert set(given['extras_require']) == set(lock.extras()) and given['install_requires'] == lock.requirements()


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
def test_whole_files_are_compared_at_once(nb):
    "`test_eq` walks over the bytes one by one: 10 s for a megabyte"
    for n, c in enumerate(cells(nb)):
        slow = [l for l in ''.join(c['source']).splitlines() if re.search(r"test_eq\(.*(read_bytes|tobytes)\(\)(?!.*b')", l)]
        assert not slow, f'cell {n}: compare with assert … == …: {slow[0].strip()}'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name_of)
def test_notebook_begins_with_title_and_description(nb):
    first = cells(nb)[0]
    lines = [l for l in ''.join(first['source']).splitlines() if l.strip()]
    assert first['cell_type'] == 'markdown' and len(lines) == 2, 'what else this cell holds would not reach the page'
    assert re.match(r'# \S', lines[0]) and re.match(r'> \S', lines[1])


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name_of)
def test_options_of_cells_are_understood(nb):
    "With a colon in the text of one, such as `fig-alt: a page: plates`, the builder of the pages would leave out all options of the cell"
    from smalldocs.notebook import cell_options
    for n, c in enumerate(cells(nb)):
        source = ''.join(c['source'])
        said = re.findall(r'^#\| (fig-\w+|echo|label|output):', source, re.M)
        if c['cell_type'] == 'code' and said: assert set(said) <= set(cell_options(source)[0]), f'cell {n}'


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


# ---- the README

README = (ROOT/'README.md').read_text(encoding='utf-8')
OUTSIDE_CODE = re.sub(r'```.*?```', '', README, flags=re.DOTALL)


def blocks(language): return re.findall(rf'^```{language}\n(.*?)^```', README, re.DOTALL | re.MULTILINE)


def commands():
    "Return the lines of the README's shell blocks, as lists of words without comments; `\\` continues a line"
    text = ''.join(blocks('sh')).replace('\\\n', ' ')
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_readme_is_what_index_gives():
    assert README == pages.readme(NBS/'index.ipynb')


def test_readme_works_on_pypi():
    "Where no file of the repository is beside it, raw HTML is shown as text, and headings have no anchors"
    own = (pages.repository(ROOT), pages.pages_url(ROOT), pages.raw_url(ROOT))
    links = re.findall(r'\]\(([^)\s]+)\)', OUTSIDE_CODE)
    assert len(links) > 20 and all(l.startswith('https://') for l in links), [l for l in links if not l.startswith('https://')]
    assert not re.search(r'</?(div|style|table|tr|td|th|p|img|a)\b', OUTSIDE_CODE)
    assert sum(l.startswith(own) for l in links) > 20


def test_readme_links_lead_to_pages_pictures_and_files():
    branch = settings()['branch']
    places = {f'{pages.pages_url(ROOT)}/': DOCS, f'{pages.raw_url(ROOT)}/': ROOT, f'{pages.repository(ROOT)}/blob/{branch}/': ROOT}
    for address, folder in places.items():
        found = re.findall(rf'\]\({re.escape(address)}([^)#\s]+)', README)
        assert found, f'no link to {address}'
        for path in found:
            made = {f'{pages.page_name(nb)}.html' for nb in NOTEBOOKS} if folder == DOCS else ()
            assert path in made or (folder/path).exists(), path


def test_the_address_of_the_repository_comes_from_settings():
    assert f'git clone {pages.repository(ROOT)}\n' in README and pages.REPOSITORY not in README
    text = (ROOT/'index.ipynb').read_text(encoding='utf-8')
    assert f"{settings()['user']}/{settings()['repo']}" not in text and pages.REPOSITORY in text


@pytest.mark.parametrize('column,cell', [('a|b', r'a\|b'), (' x\ny ', 'x y')])
def test_a_data_frame_becomes_a_markdown_table(column, cell):
    html = f'<table><tr><th></th><th>{column}</th></tr><tr><th>0</th><td>1 &lt; 2</td></tr></table><p>Why</p>'
    assert pages.markdown_table(html) == f'| {cell} |\n| --- |\n| 1 < 2 |\n\nWhy'
    named = html.replace('>0<', '>row<')
    assert pages.markdown_table(named) == f'|  | {cell} |\n| --- | --- |\n| row | 1 < 2 |\n\nWhy'
    with pytest.raises(SystemExit, match='not a plain one'): pages.markdown_table(html.replace('<td>', '<td></td><td>'))


def test_readme_commands_are_understood():
    from rcic_fastai import cli
    functions = dict(rcic_simulate=cli.simulate, rcic_download=cli.download, rcic_pack=cli.pack, rcic_train=cli.train,
                     rcic_predict=cli.predict, rcic_evaluate=cli.evaluate_csv, rcic_embed=cli.embed, rcic_hits=cli.hits)
    seen = set()
    for name, *arguments in commands():
        if name not in functions: continue
        cli.command_parser(functions[name], name).parse_args(arguments)   # exits when it does not understand
        seen.add(name)
    assert seen == set(functions)
    made = {line.split(':')[0] for line in (ROOT/'Makefile').read_text().splitlines() if re.match(r'[\w-]+:', line)}
    assert {words[1] for words in commands() if words[0] == 'make'} == {'demo', 'test'} <= made


def test_readme_python_can_be_run_in_order():
    "The names that its snippets use are defined before, or come from the library"
    import rcic_fastai.all as library
    known = set(vars(library)) | set(dir(__builtins__)) | set(__builtins__ if isinstance(__builtins__, dict) else ())
    for block in blocks('python'):
        nodes = list(ast.walk(ast.parse(block)))
        known |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert not {n.id for n in nodes if isinstance(n, ast.Name)} - known, block


def index_cell(begin):
    "Return the source of the code cell of index.ipynb that holds a text"
    return next(source for _, source, _ in code(ROOT/'index.ipynb') if begin in source)


@pytest.mark.parametrize('labels', ['known', 'empty'])
def test_readme_packs_ones_own_plates(labels, tmp_path, monkeypatch, capsys):
    "The commands of the README on the table that the first of them draws, also with the perturbations of the test left empty"
    import rcic_fastai.all as library
    from rcic_fastai import cli
    from rcic_fastai.cli import rcic_pack
    monkeypatch.chdir(tmp_path)
    own = commands()[next(i for i, words in enumerate(commands()) if words[:2] == ['rcic_simulate', 'plates']):]
    assert cli.rcic_simulate(own[0][1:]) == 0
    if labels == 'empty':
        table = library.pd.read_csv('plates/plates.csv')
        table.loc[table.Batch == 'July', 'Reagent'] = None
        table.to_csv('plates/plates.csv', index=False)
    pack = next(words for words in commands() if words[:2] == ['rcic_pack', 'plates/plates.csv'])
    assert rcic_pack(pack[1:]) == 0
    screen = library.open_screen(pack[2])
    assert screen.test.experiments == ['July'] and set(screen.train.experiments) == {'May', 'June'}
    assert set(screen.train.controls.table.sirna) == {'untreated'} and set(screen.table.cell_type) == {'HUVEC'}
    assert screen.test.table.sirna.isna().all() == (labels == 'empty')
    assert 'sites are the same as in plates/plates.csv' in capsys.readouterr().out
    if labels == 'empty': return
    tiny = library.Recipe('demo', [library.Stage('all', 1, 1e-3)], arch='test_efficientnet', model=dict(pretrained=None))      # instead of minutes
    monkeypatch.setitem(library.RECIPES, 'demo', tiny)
    for words in own[2:5]: assert getattr(cli, words[0])(words[1:]) == 0, words
    assert 'well accuracy' in capsys.readouterr().out and [words[0] for words in own[2:5]] == ['rcic_train', 'rcic_predict', 'rcic_evaluate']


def shell_lines(text):
    "Return the lines of a text that call our commands, as lists of words; `\\` continues a line"
    text = re.sub(r'\\\n\s*', ' ', text)
    return [shlex.split(line, comments=True) for line in re.findall(r'^ *(?:\$ )?(rcic_\w+ .*)$', text, re.MULTILINE)]


def test_shell_commands_of_notebooks_are_understood():
    "Those that stand in the text of a notebook, as a line of their own"
    from rcic_fastai import cli
    functions, seen = {**cli._commands(), 'rcic_simulate': cli.simulate, 'rcic_demo': cli.demo, 'rcic_ensemble': cli.ensemble, 'rcic_confidence': cli.confidence, 'rcic_drift': cli.drift, 'rcic_download': cli.download,
                       'rcic_embed': cli.embed, 'rcic_hits': cli.hits, 'rcic_report': cli.report, 'rcic_explore': cli.explore_screen, 'rcic_show': cli.show}, 0
    for nb in NOTEBOOKS:
        for name, *arguments in [w for c in cells(nb) if c['cell_type'] == 'markdown' for w in shell_lines(''.join(c['source']))]:
            assert name in functions, (nb.name, name)
            try: cli.command_parser(functions[name], name).parse_args(arguments)
            except SystemExit: pytest.fail(f'{nb.name}: {name} {shlex.join(arguments)}')
            seen += 1
    assert seen > 20


def test_shell_lines_are_found():
    assert shell_lines('see rcic_pack a\n    rcic_pack a b \\\n        --test c   # why\n') == [['rcic_pack', 'a', 'b', '--test', 'c']]


def test_readme_packs_ome_zarr_plates(tmp_path, monkeypatch):
    import pandas as pd
    from test_hcs import make_plate
    from rcic_fastai.cli import rcic_pack
    from rcic_fastai.screen.open import open_screen
    monkeypatch.chdir(tmp_path)
    (tmp_path/'ome_plates').mkdir()
    for name in ('P1', 'P2'): make_plate(tmp_path/f'ome_plates/{name}.zarr', name=name)
    pack = next(words for words in commands() if words[:2] == ['rcic_pack', 'ome_plates'])
    wells = [dict(plate=p, well=w, experiment=e, sirna=s, well_type=kind, cell_type='HUVEC', dataset=d) for p, e, d in
             [('P1', 'May', 'train'), ('P2', 'July', 'test')] for w, s, kind in [('B02', 'a', 'treatment'), ('C03', 'DMSO', 'negative_control')]]
    columns = re.search(r'the columns `plate` and `well`, and any of (.*)\.\n', README)[1]
    assert set(wells[0]) == {'plate', 'well'} | set(re.findall(r'`(\w+)`', re.sub(r'\(.*?\)', '', columns)))
    pd.DataFrame(wells).to_csv(pack[pack.index('--wells') + 1], index=False)
    assert rcic_pack(pack[1:]) == 0
    screen = open_screen(pack[2])
    assert screen.test.experiments == ['July'] and len(screen.controls) == 4


def test_readme_says_what_was_never_run():
    part = README.partition('## What has never been run')[2].partition('\n## ')[0]
    real = json.loads((ROOT/'bench/results/real_sites.json').read_text())
    assert f"only {real['sites']} real sites were read" in part and 'No GPU' in part and 'real labeled images' in part


def test_readme_quotes_the_ablation():
    rows = json.loads((ROOT/'bench/results/ablation.json').read_text())['rows']
    for model, prediction in [('plain', 'one site'), ('own', 'one site'), ('cutmix', 'two sites, TTA'), ('cutmix', '+ AdaBN, index too'),
                              ('cutmix', '+ AdaBN, standardized embeddings'), ('cutmix', '+ AdaBN, standardized, groups and assignment')]:
        r = next(r for r in rows if (r['model'], r['prediction']) == (model, prediction))
        column = ('inductive', 'adapted', 'transductive').index(r['protocol'])
        assert re.search(rf"^\|[^|]*{'[|] '*(column + 1)}{r['mean']:.3f} ± {r['sd']:.3f} \|", README, re.MULTILINE), r


def test_readme_quotes_the_best_recipe():
    for r in json.loads((ROOT/'bench/results/best.json').read_text())['rows']:
        if r['screen'] != 'calibrated' or r['model'] not in ('demo', 'best', 'best, minutes of 0.1'): continue
        said = [f"{r[p]['mean']:.3f}" for p in ('inductive', 'adapted', 'transductive')]
        assert re.search(rf'{said[0]}\D[^.]*{said[1]}\D[^.]*{said[2]}\D', README), said


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
    mean = {p: sum(s[p] for s in r['seeds'].values())/len(r['seeds']) for p in ('inductive', 'adapted', 'transductive')}
    assert len(r['seeds']) >= 3 and ' | '.join(f'**{v:.3f}**' for v in mean.values()) in page
    for e, v in r['inductive']['by_experiment'].items():
        assert f"| {e}, seed 0 | {v:.3f} | {r['adapted']['by_experiment'][e]:.3f} | {r['transductive']['by_experiment'][e]:.3f} |" in page
    assert f"{r['seconds']/60:.1f} minutes" in page


def test_the_page_of_figures_is_current():
    import hashlib
    text = (NBS/'91_measured.ipynb').read_text(encoding='utf-8')
    for f in sorted((ROOT/'bench/results').glob('*.json')):
        assert f'{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()[:16]}' in text, f'run nbs/91_measured.ipynb again: {f.name} has changed'


def test_the_lock_file_pins_what_is_required_with_checksums():
    wanted = subprocess.run([sys.executable, ROOT/'tools/lock.py'], capture_output=True, text=True, check=True).stdout.splitlines()
    entries = re.split(r'\n(?=\S)', (ROOT/'requirements.lock').read_text())
    locked = {canonicalize_name(re.match(r'[\w.-]+', e)[0]): e for e in entries if e.strip()}
    for r in map(Requirement, wanted):
        pin = re.search(r'==([^\s;]+)', locked[canonicalize_name(r.name)])[1]
        assert r.specifier.contains(pin), f'{r} does not permit {pin}: make lock'
    for name, e in locked.items(): assert '==' in e.split('\n')[0] and '--hash=sha256:' in e, name


def test_the_lowest_versions_are_those_that_are_named(tmp_path):
    lowest = [f'{lock.name(r)}=={next(iter(Requirement(r).specifier)).version}' for r in lock.lowest()]
    (tmp_path/'lowest.txt').write_text('\n'.join(lowest))
    assert lock.check(tmp_path/'lowest.txt') == []
    (tmp_path/'lowest.txt').write_text('\n'.join(lowest).replace('torch==2.6', 'torch==2.7'))
    assert 'torch>=' in lock.check(tmp_path/'lowest.txt')[0]


# ---- skips

def test_no_test_skips_by_itself_what_it_lacks():
    "Missing packages and real files are said by marks, which `conftest.py` reads, so that none is skipped unseen"
    for f in sorted((ROOT/'tests').glob('test_*.py')):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Attribute): assert node.attr != 'importorskip', f'{f.name}: use @pytest.mark.extra'
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('skipif'):
                assert not re.search('find_spec|real_data|REAL', ast.unparse(node)), f'{f.name}: use a mark of conftest.py'


def test_every_extra_mark_names_a_package_of_an_extra():
    text = ''.join(f.read_text(encoding='utf-8') for f in sorted((ROOT/'tests').glob('test_*.py')))
    named = set(re.findall(r"@pytest\.mark\.extra\('(\w+)'\)", text))
    assert {'tensorstore', 'pycytominer', 'copairs', 'anndata', 'harmonypy'} <= named
    assert {*map(distribution, named)} <= required(*lock.extras()) - required('dev', 'lite', 'hcs')


def test_the_overview_is_one_notebook():
    "nbs/index.ipynb is a link to the notebook at the top, so that the two cannot differ"
    assert (NBS/'index.ipynb').is_symlink() and (NBS/'index.ipynb').resolve() == ROOT/'index.ipynb'
