"""Build docs/, README.md and the sidebar from the notebooks of one project folder.

    python tools/docs.py PROJECT OUT

PROJECT is a scratch copy (nbdev writes its `_proc` folder there; `sync.py` makes the copy), OUT receives `docs/`,
`README.md` and `nbs/sidebar.yml`. Two builds of the same notebooks are identical byte for byte, on any machine.
"""
import ast, base64, hashlib, html, json, os, re, shutil, sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import page_html

# what decides the bytes of a page besides the notebooks
TOOLS = ['nbdev', 'fastcore', 'execnb', 'smalldocs', 'Pygments', 'markdown-it-py', 'mdit-py-plugins',
         'latex2mathml', 'fastai', 'torch']
NOT_READ = 'output-file is not read'   # nbdev writes that option for Quarto; the pages get their names below
LINK = re.compile(r'\[(`[^`\]]+`)\]\([^)\s]+\)')
# nbdev links each name between backticks, also inside a link
NESTED = re.compile(r'\[(?P<text>[^\[\]]{0,200}(?:\[`[^`\]]+`\]\([^)\s]+\)[^\[\]]{0,200})+)\]\((?P<to>[^)\s]+)\)')
REPOSITORY = 'REPOSITORY_URL'   # stands for the address of the repository in index.ipynb
NUMBER = re.compile(r'^(\d+)([a-z]?)_')
SECTIONS = [('The screen', range(0, 10)), ('Batches', range(10, 20)), ('The model', range(20, 30)),
            ('Training', range(30, 39)), ('Embeddings', range(39, 50)), ('Predictions', range(50, 60)),
            ('Results', range(60, 70)), ('Folder and commands', range(70, 80)), ('Tutorials', range(80, 90)),
            ('Behind these pages', range(90, 100))]

SCRIPT = '<script src="pages.js"></script>'   # search, see there


def notebooks(project):
    "The notebooks in reading order: index, then by number."
    nbs = sorted(p for p in (project/'nbs').glob('*.ipynb') if p.stem != 'index' and not p.name.startswith(('_', '.')))
    return [project/'nbs'/'index.ipynb'] + nbs


def page_name(nb): return NUMBER.sub('', nb.stem)


def number(nb):
    "Return what orders the notebooks: the number, and the letter of those that share one."
    digits, letter = NUMBER.match(nb.name).groups()
    return int(digits), letter


def text_of(value): return value if isinstance(value, str) else ''.join(value)


def settings(project):
    "Return what settings.ini says, the only place for addresses."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(project/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def repository(project):
    "Return the address of the repository."
    told = settings(project)
    return f"https://github.com/{told['user']}/{told['repo']}"


def pages_url(project):
    "Return the address of the pages, without a slash at the end."
    return settings(project)['doc_url'].format_map(settings(project)).rstrip('/')


def raw_url(project):
    "Return the address under which GitHub serves the files of the repository as they are."
    told = settings(project)
    return f"https://raw.githubusercontent.com/{told['user']}/{told['repo']}/{told['branch']}"


def sidebar(nbs):
    "The sidebar, in the form that Quarto and smalldocs read."
    address = repository(nbs[0].parent.parent)
    lines = ['# Made by `make docs` from the names of the notebooks.', 'website:', f'  repo-url: {address}',
             '  sidebar:', f'    tools: [{{icon: github, href: "{address}", text: Repository}}]', '    contents:',
             '      - section: Start', '        contents:', '          - {text: Overview, href: index.ipynb}']
    for title, numbers in SECTIONS:
        if inside := [nb for nb in nbs[1:] if number(nb)[0] in numbers]:
            lines += [f'      - section: {title}', '        contents:'] + [f'          - {nb.name}' for nb in inside]
    return '\n'.join(lines) + '\n'


def options(source):
    "The `#|` directives of a cell, as a dict."
    return {m[1]: (m[2] or '').strip() for m in re.finditer(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', source, re.MULTILINE)}


def mixed_cells(nb):
    "The cells that import and do something else: nbdev would run them, lesson and all, to draw a page."
    found = []
    for n, cell in enumerate(json.loads(nb.read_text(encoding='utf-8'))['cells']):
        source = text_of(cell['source'])
        option = options(source)
        exported = {'export', 'exports', 'exporti'} & set(option)
        if cell['cell_type'] != 'code' or exported or option.get('eval') == 'false': continue
        try: tree = ast.parse(source)
        except SyntaxError: continue   # magics
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
        harmless = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
        if imports and not all(isinstance(s, harmless) or ast.unparse(s).startswith('warnings.') for s in tree.body):
            found.append(f'{nb.name}, cell {n}: put its imports in a cell of their own ({source.splitlines()[0]})')
    return found


def process(project):
    "Run nbdev over the notebooks (signatures, links, hidden cells); a notebook that fails is named."
    os.chdir(project)
    sys.path.insert(0, str(project))
    os.environ.setdefault('MPLBACKEND', 'Agg')
    from nbdev.serve import proc_nbs
    try: return proc_nbs(force=True, n_workers=0)
    except Exception as e: raise SystemExit(f'docs: {e}')


def plain_names(proc, nbs):
    "Drop the numbers from page names, and from every link between pages."
    pages = {nb.name: f'{page_name(nb)}.ipynb' for nb in nbs}
    for nb in nbs:
        text = (proc/nb.name).read_text(encoding='utf-8')
        text = NESTED.sub(lambda m: '[' + LINK.sub(r'\1', m['text']) + f"]({m['to']})", text)
        text = re.sub(r'\]\((?:\.\./|nbs/)?([\w.-]+\.ipynb)(#[^)]*)?\)',
                      lambda m: f"]({pages.get(m[1], m[1])}{m[2] or ''})", text)
        if nb.stem == 'index': text = text.replace(REPOSITORY, repository(proc.parent))
        (proc/nb.name).unlink()
        (proc/pages[nb.name]).write_text(text, encoding='utf-8')
    bar = (proc.parent/'nbs'/'sidebar.yml').read_text(encoding='utf-8')
    for old, new in pages.items(): bar = bar.replace(old, new)
    (proc/'sidebar.yml').write_text(bar, encoding='utf-8')


def picture_files(docs):
    "Move every picture that is inside a page into a file of its own."
    for page in sorted(docs.glob('*.html')):
        count = 0

        def out(m):
            nonlocal count
            count += 1
            name = f'{page.stem}_files/{count}.{m[1]}'
            (docs/name).parent.mkdir(exist_ok=True)
            (docs/name).write_bytes(base64.b64decode(m[2]))
            return f'src="{name}"'

        text = re.sub(r'src="data:image/(png|jpeg|gif);base64,([^"]+)"', out, page.read_text(encoding='utf-8'))
        page.write_text(text, encoding='utf-8')


def local_links(docs, own_url):
    """Links to our own hosted pages become links between files, so that the folder can be read where it lies.
    A name that has no heading on its page (a function chosen by type) leads to the top of the page."""
    ids = {p.name: set(re.findall(r'\bid="([^"]+)"', p.read_text(encoding='utf-8'))) for p in docs.glob('*.html')}
    link = re.compile(rf'href="(?:{re.escape(own_url.rstrip("/"))})?/*([\w.-]+\.html)(?:#([^"]*))?"')

    def local(m):
        if m[1] not in ids: return m[0]
        return f'href="./{m[1]}#{m[2]}"' if m[2] in ids[m[1]] else f'href="./{m[1]}"'

    for page in docs.glob('*.html'):
        page.write_text(link.sub(local, page.read_text(encoding='utf-8')), encoding='utf-8')


def formulas(docs):
    "TeX becomes MathML, which browsers draw by themselves; KaTeX would be fetched from the net."
    from latex2mathml.converter import convert
    span = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.DOTALL)
    display = dict(inline='inline', display='block')
    katex = re.compile(r'<(?:link|script)[^>]*/katex[^>]*>(?:</script>)?\s*')
    for page in docs.glob('*.html'):
        text = page.read_text(encoding='utf-8')
        text = span.sub(lambda m: convert(html.unescape(m[2]).strip(), display=display[m[1]]), text)
        page.write_text(katex.sub('', text), encoding='utf-8')


def search_script(docs):
    "Search that works from the file system: the index as a script."
    index = (docs/'search.json').read_text(encoding='utf-8')
    (docs/'search.js').write_text(f'window.searchIndex = {index};\n', encoding='utf-8')
    (docs/'search.json').unlink()


def finish_pages(docs):
    "Descriptions of pictures, code that wraps, tables that fit, and our script, on each page."
    for page in docs.glob('*.html'):
        text = page_html.finish(page.read_text(encoding='utf-8'))
        page.write_text(text.replace('</head>', f'{SCRIPT}\n</head>', 1), encoding='utf-8')


def head(nb):
    "Title and description of a notebook, from its first cell."
    first = text_of(json.loads(nb.read_text(encoding='utf-8'))['cells'][0]['source'])
    return (re.search(rf'^{mark} (.+)$', first, re.MULTILINE)[1].strip() for mark in '#>')


def llms_text(nbs):
    "llms.txt: what the library is, and each page with what it says, in the order of the sidebar."
    title, description = head(nbs[0])
    cells = [c for c in json.loads(nbs[0].read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    parts = re.split(r'\n\s*\n', '\n\n'.join(text_of(c['source']) for c in cells[1:]))
    about = next((' '.join(p.split()) for p in parts if re.match(r'[A-Za-z*`]', p)), '')
    link = re.compile(r'\]\((?:nbs/)?([\w.-]+)\.ipynb[^)]*\)')
    about = link.sub(lambda m: f'](./{NUMBER.sub("", m[1])}.html)', about)
    lines = [f'# {title}', '', f'> {description}', '', about, '', f'Source: {repository(nbs[0].parent.parent)}']
    for section, numbers in SECTIONS:
        if inside := [nb for nb in nbs[1:] if number(nb)[0] in numbers]: lines += ['', f'## {section}', '']
        for nb in inside:
            title, description = head(nb)
            lines.append(f'- [{title}]({page_name(nb)}.html): {description}')
    return '\n'.join(lines) + '\n'


class _Table(HTMLParser):
    "Collect the rows of the first table of a page, and the text of the paragraphs after it."
    def __init__(self, text):
        super().__init__()
        self.rows, self.paragraphs, self.into = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('th', 'td'): self.into = self.rows[-1]
        if tag == 'p': self.into = self.paragraphs
        if tag in ('th', 'td', 'p'): self.into.append('')

    def handle_endtag(self, tag):
        if tag in ('th', 'td', 'p'): self.into = None

    def handle_data(self, data):
        if self.into is not None: self.into[-1] += data


def markdown_table(text):
    "Return an HTML table, such as that of a DataFrame, as Markdown; a table with numbered rows loses their numbers."
    found = _Table(text)
    head, *rows = found.rows
    if not head or any(len(r) != len(head) for r in rows): raise SystemExit(f'docs: a table of index.ipynb is not a plain one: {head}')
    is_numbered = all(r[0].isdigit() for r in rows) and not head[0].strip()
    lines = [[' '.join(c.split()).replace('|', r'\|') for c in r[is_numbered:]] for r in [head, *rows]]
    lines.insert(1, ['---']*len(lines[0]))
    return '\n\n'.join(['\n'.join('| ' + ' | '.join(r) + ' |' for r in lines), *found.paragraphs])


def readme_output(output, alt, picture):
    "Return one output of a cell as Markdown; a picture has the description `alt` and the address `picture`."
    data = output.get('data', {})
    if 'image/png' in data: return f'![{alt}]({picture})'
    if 'text/markdown' in data: return text_of(data['text/markdown']).strip()
    if 'text/html' in data: return markdown_table(text_of(data['text/html']))
    plain = text_of(data.get('text/plain') or output.get('text', '')).strip('\n').rstrip()
    return plain and f'```\n{plain}\n```'


def readme_text(text, project):
    "Return the Markdown of a cell with the addresses of the repository and of the pages, since PyPI shows it, too."
    page = re.compile(r'\]\((?:nbs/)?([\w.-]+)\.ipynb(#[^)]*)?\)')
    text = page.sub(lambda m: f"]({pages_url(project)}/{NUMBER.sub('', m[1])}.html{m[2] or ''})", text)
    return text.replace(REPOSITORY, repository(project))


def readme(index):
    "Return index.ipynb as Markdown; its pictures are the ones that the docs show."
    project = index.parent.parent
    parts, count = ['<!-- Made from index.ipynb by `make docs`: edit that. -->'], 0
    for cell in json.loads(index.read_text(encoding='utf-8'))['cells']:
        source = text_of(cell['source'])
        option = options(source)
        if 'hide' in option or 'default_exp' in option: continue
        source = re.sub(r'^#\|.*\n?', '', source, flags=re.MULTILINE).strip('\n')
        if cell['cell_type'] == 'markdown': parts.append(readme_text(source, project))
        elif source and option.get('echo') != 'false': parts.append(f'```python\n{source}\n```')
        for output in cell.get('outputs', []):
            count += 'image/png' in output.get('data', {})
            parts.append(readme_output(output, option.get('fig-alt', ''), f'{raw_url(project)}/docs/index_files/{count}.png'))
    return '\n\n'.join(p for p in parts if p) + '\n'


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tool_versions():
    found = {'python': '.'.join(map(str, sys.version_info[:2]))}
    for name in TOOLS:
        try: found[name] = version(name).split('+')[0]
        except PackageNotFoundError: found[name] = None
    return found


def sources(project):
    "Checksums of all that the pages are made from."
    files = notebooks(project) + [project/'pyproject.toml', project/'settings.ini', project/'tools'/'docs.py',
                                  project/'tools'/'page_html.py', project/'nbs'/'_quarto.yml',
                                  project/'nbs'/'styles.css', project/'nbs'/'pages.js']
    return {p.relative_to(project).as_posix(): digest(p) for p in files}


def outputs(docs):
    return {p.relative_to(docs).as_posix(): digest(p) for p in sorted(docs.rglob('*'))
            if p.is_file() and p.name != 'build.json'}


def build(project, out):
    nbs = notebooks(project)
    if mixed := sum((mixed_cells(nb) for nb in nbs), []): raise SystemExit('\n'.join(f'docs: {m}' for m in mixed))
    (out/'nbs').mkdir(parents=True)
    (out/'nbs'/'sidebar.yml').write_text(sidebar(nbs), encoding='utf-8')
    (out/'README.md').write_text(readme(nbs[0]), encoding='utf-8')
    shutil.copy(out/'nbs'/'sidebar.yml', project/'nbs'/'sidebar.yml')
    proc = process(project)
    plain_names(proc, nbs)
    shutil.copy(project/'nbs'/'styles.css', proc)

    from nbdev.config import get_config
    try: from smalldocs.site import build as render
    except ImportError: raise SystemExit('docs: smalldocs is not installed: it needs Python 3.11 or newer.') from None
    for warning in render(proc, quiet=True).warnings:
        if NOT_READ not in warning: print('docs:', warning)
    docs = shutil.copytree(proc/'_site', out/'docs')
    picture_files(docs)
    formulas(docs)
    local_links(docs, get_config().doc_url)
    search_script(docs)
    finish_pages(docs)
    shutil.copy(project/'nbs'/'pages.js', docs)
    (docs/'llms.txt').write_text(llms_text(nbs), encoding='utf-8')
    if (sitemap := docs/'sitemap.xml').exists():   # dates of files differ from clone to clone
        sitemap.write_text(re.sub(r'\s*<lastmod>.*?</lastmod>', '', sitemap.read_text()))
    record = dict(tools=tool_versions(), sources=sources(project), pages=outputs(docs))
    (docs/'build.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': build(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
