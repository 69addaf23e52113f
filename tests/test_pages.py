"The pages show what they should: every field, method and option, no raw Markdown, code that fits, named pictures."
import contextlib, dataclasses, html, importlib, inspect, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT/'docs'
PAGES = sorted(DOCS.glob('*.html'))
sys.path.insert(0, str(ROOT/'tools'))
import docs as builder  # noqa: E402
import page_html  # noqa: E402

from rcic_fastai import showdoc  # noqa: E402
from rcic_fastai._modidx import d as INDEX  # noqa: E402


def read(page): return page.read_text(encoding='utf-8')


def name_of(path): return path.name


def settings():
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def section(page, name):
    "The HTML from the heading of a definition to the next heading of its own or a higher level."
    text = read(page)
    start = re.search(rf'<h([34])\b[^>]*>{re.escape(name)}</h', text)
    assert start, f'{page.name} has no heading {name}'
    end = re.search(rf'<h[1-{start[1]}]\b', text[start.end():])
    return text[start.start():start.end() + end.start()] if end else text[start.start():]


def public_classes():
    "(page, class) of every exported class."
    for module, names in INDEX['syms'].items():
        exported = getattr(importlib.import_module(module), '__all__', [])
        for full, (page, _) in names.items():
            name = full.removeprefix(f'{module}.')
            if '.' in name or name not in exported: continue
            found = getattr(importlib.import_module(module), name)
            if inspect.isclass(found) and found.__module__ == module: yield DOCS/page.split('#')[0], found


CLASSES = list(public_classes())


# ---- definitions

def test_there_are_classes_and_dataclasses_to_show():
    assert len(CLASSES) > 40 and sum(dataclasses.is_dataclass(c) for _, c in CLASSES) > 5


@pytest.mark.parametrize('page,cls', CLASSES, ids=lambda v: getattr(v, '__name__', ''))
def test_class_shows_its_fields_and_methods(page, cls):
    if page.name == 'cli.html': pytest.skip('a page of commands')
    shown = section(page, cls.__name__)
    if dataclasses.is_dataclass(cls):
        for field, _, _, comment in showdoc.parameter_rows(cls):
            begins = comment.split('`')[0][:20].strip()
            assert f'<code>{field}</code>' in shown and begins in html.unescape(shown), field
    for name, method in showdoc.public_methods(cls).items():
        part = section(page, f'{cls.__name__}.{name}')
        is_property = not inspect.isfunction(method)
        rows = [] if is_property else showdoc.parameter_rows(method)
        assert ('<table' in part) >= any(r[3] for r in rows), name
        assert is_property or f'{cls.__name__}.{name}' in html.unescape(page_html.plain(part)), name


def source_links(page):
    "(heading, address) of every link from a definition to its source."
    heading = ''
    for m in re.finditer(r'<h[34]\b[^>]*>(.*?)</h[34]>|class="source-link" href="([^"]+)"', read(page), re.DOTALL):
        if m[2]: yield heading, m[2]
        else: heading = page_html.plain(m[1])


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_source_links_lead_to_the_definition(page):
    address, branch = showdoc.repository(ROOT)
    for heading, link in source_links(page):
        file, line = re.fullmatch(rf'{re.escape(address)}/blob/{branch}/(.+)#L(\d+)', link).groups()
        text = (ROOT/file).read_text(encoding='utf-8').splitlines()[int(line)-1]
        assert re.search(rf'\b(def|class) {re.escape(heading.split(".")[-1])}\b', text), f'{heading}: {link}'


def test_most_definitions_have_a_source_link():
    assert sum(len(list(source_links(p))) for p in PAGES) > 200


# ---- commands

COMMANDS = dict(line.strip().split('=') for line in settings()['console_scripts'].splitlines() if line.strip())


@pytest.mark.parametrize('command', COMMANDS)
def test_command_page_says_what_help_says(command, capsys):
    module, name = COMMANDS[command].split(':')
    with contextlib.suppress(SystemExit): getattr(importlib.import_module(module), name)(['--help'])
    said = capsys.readouterr().out
    told = set(re.findall(r'^  (?:-\w, )?(--[a-z][\w-]*)', said, re.MULTILINE)) - {'--help', '--version'}
    shown = section(DOCS/'cli.html', command)
    assert set(re.findall(r'<td><code>(--[a-z][\w-]*)', shown)) == told and told
    usage = page_html.plain(re.search(r'<pre.*?</pre>', shown, re.DOTALL)[0])
    assert usage.startswith(f'{command} ') and all(f'[{o}' in usage for o in told)


def test_command_page_has_no_python_internals():
    page = read(DOCS/'cli.html')
    definitions = {full.removeprefix('rcic_fastai.cli.') for full in INDEX['syms']['rcic_fastai.cli']}
    assert {page_html.plain(h) for h in re.findall(r'<h3\b[^>]*>(.*?)</h3>', page)} & definitions == set(COMMANDS)
    assert 'class="source"' not in page


# ---- text

@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_no_markdown_is_left(page): assert page_html.raw_markdown(read(page)) == []


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_no_code_block_swallows_the_page(page):
    for code in re.findall(r'<pre\b.*?</pre>', read(page), re.DOTALL):
        text = html.unescape(page_html.TAGS.sub('', code))
        assert not re.search(r'^(:::|</details>)$', text, re.MULTILINE), text[:80]


@pytest.mark.parametrize('text', ['**bold**', '[link](page.html)', '| --- | --- |', '`code`', '## Heading', '::: {.x}'])
def test_markdown_that_is_left_is_found(text):
    assert page_html.raw_markdown(f'<main><p>{text}</p></main>')
    assert not page_html.raw_markdown(f'<main><pre><code>{text}</code></pre></main>')


# ---- pictures

@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_pictures_have_descriptions(page): assert page_html.unnamed_pictures(read(page)) == []


def test_a_picture_is_described_by_what_leads_to_it():
    page = ('<h2>The plate</h2><p>Wells by <code>kind</code>. More.</p><img src="1.png"><img src="2.png" alt="">'
            '<h2>Errors</h2><img src="3.png"><img alt="As told" src="4.png">')
    alts = re.findall(r'<img alt="([^"]*)"', page_html.alt_texts(page))
    assert alts == ['The plate: Wells by kind', 'The plate: Wells by kind (2)', 'Errors', 'As told']
    assert page_html.unnamed_pictures(page) == ['1.png', '2.png', '3.png']


# ---- code and tables

def test_long_lines_wrap_and_their_text_stays():
    code = '<span class="st">"""a\n  b' + 'c'*60 + '\n"""</span>\n' + 'x = 1\n    ' + '<span class="kw">y</span>'*50
    made = page_html.code_lines(code)
    assert page_html.TAGS.sub('', made) == page_html.TAGS.sub('', code)
    assert made.count('class="line"') == 2 and '--in:6ch' in made and '--in:8ch' in made
    assert all(line.count('<span') == line.count('</span>') for line in made.split('\n'))


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_no_line_of_code_needs_scrolling(page):
    for code in re.findall(r'<pre class="sourceCode.*?</pre>', read(page), re.DOTALL):
        for line in code.split('\n'):
            is_long = len(html.unescape(page_html.TAGS.sub('', line))) > page_html.LONG_LINE
            assert 'class="line"' in line or not is_long, line


def test_style_lets_code_wrap_and_tables_shrink():
    style = (DOCS/'styles.css').read_text()
    assert 'pre-wrap' in style and 'tbody th { white-space: normal; min-width' not in style


def test_output_in_columns_keeps_them():
    columns, text = 'name    value\nsize    3', 'A sentence that says what is wrong.'
    wrapped = page_html.wrap_code(f'<pre><code>{columns}</code></pre><pre><code>{text}</code></pre>')
    assert wrapped == f'<pre><code>{columns}</code></pre><pre class="prose"><code>{text}</code></pre>'


# ---- the site

@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_page_links_the_repository_and_has_both_modes(page):
    told = settings()
    text = read(page)
    assert f'href="https://github.com/{told["user"]}/{told["repo"]}"' in text
    assert 'quarto-color-scheme-toggle' in text and text.count('class="quarto-color-scheme') >= 2


def test_the_address_of_the_repository_stands_once():
    for file in ('pyproject.toml', 'nbs/_quarto.yml', 'tools/docs.py', 'tools/page_html.py'):
        assert f"{settings()['user']}/{settings()['repo']}" not in (ROOT/file).read_text(encoding='utf-8'), file


def test_llms_txt_lists_every_page_with_its_description():
    text = (DOCS/'llms.txt').read_text(encoding='utf-8')
    assert re.match(r'# \S.*\n\n> \S', text)
    listed = dict(re.findall(r'^- \[.+\]\((.+?)\): (.+)$', text, re.MULTILINE))
    assert set(listed) == {p.name for p in PAGES} - {'index.html'} and all(len(v) > 10 for v in listed.values())
    for link in re.findall(r'\]\(([^)]+)\)', text): assert re.match('https?:', link) or (DOCS/link).exists(), link


def test_links_inside_links_are_undone():
    made = '[what [`predict`](https://x.org/p.html#predict) says](51_p.ipynb) and [`other`](https://x.org/o.html)'
    undone = builder.NESTED.sub(lambda m: '[' + builder.LINK.sub(r'\1', m['text']) + f"]({m['to']})", made)
    assert undone == '[what `predict` says](51_p.ipynb) and [`other`](https://x.org/o.html)'


# ---- search

ENTRIES = [('Difficulty', 'How hard it is'), ('right_wrong_map', 'Right and wrong wells'),
           ('Files', 'PNG or TIFF, 8 or 16 bits'), ('read_tiff', 'Read a picture'), 
           ('The report', 'An embedding map, or a UMAP'), ('TensorSite', 'One site'),
           ('Sites', 'All sites of a well'), ('Batch', 'The size is told elsewhere'), ('bs', 'Batch size')]
SEARCHES = {'tiff': ['read_tiff', 'Files'], 'umap': ['The report'], 'map': ['right_wrong_map', 'The report'],
            'site': ['TensorSite', 'Sites'], 'batch size': ['bs', 'Batch'], 'nothing like it': []}


@pytest.mark.skipif(not shutil.which('node'), reason='needs Node.js')
def test_search_puts_exact_matches_first():
    index = [dict(title='Page', section=s, text=t, href='') for s, t in ENTRIES]
    script = f"""global.window = global
{(ROOT/'nbs'/'pages.js').read_text(encoding='utf-8')}
const fuse = new window.Fuse({json.dumps(index)}, {{}})
const found = {json.dumps(list(SEARCHES))}.map(q => fuse.search(q).map(h => h.item.section))
console.log(JSON.stringify(found))"""
    done = subprocess.run(['node', '-e', script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = dict(zip(SEARCHES, json.loads(done.stdout)))
    assert found == SEARCHES
