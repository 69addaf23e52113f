"What is done to each finished page: names of pictures, lines of code that wrap, tables that fit."
import html, re
from html.parser import HTMLParser

SHORT_CELL = 28    # characters of a cell of a printed table that never breaks
LONG_LINE = 44     # characters of a line of code that may have to wrap, on a narrow screen
WIDE_OUTPUT = 100  # characters of a line of output that never fits
COLUMNS = re.compile(r'\S {2,}\S')
TAGS = re.compile(r'<[^>]+>')


def plain(text):
    "Return the text of a piece of HTML in one line."
    return ' '.join(html.unescape(TAGS.sub('', text)).split())


def sentence(text, longest=140):
    "Return the first sentence of `text`, or its first words."
    first = re.split(r'(?<=[.:!?])\s', text, maxsplit=1)[0].rstrip('.:')
    return first if len(first) <= longest else first[:longest].rsplit(' ', 1)[0] + '…'


# ---- pictures

def alt_texts(page):
    """Give each picture without a description one: the caption of its figure, or the heading it stands under and the
    sentence that leads to it. `#| fig-alt:` in the notebook comes first, as it knows what is seen."""
    heading, lead, seen = '', '', {}

    def picture(tag):
        if re.search(r'\balt="[^"\s]', tag): return tag
        said = f'{heading}: {lead}' if lead else heading or 'Picture'
        seen[said] = seen.get(said, 0) + 1
        alt = said if seen[said] == 1 else f'{said} ({seen[said]})'
        return f'<img alt="{html.escape(alt)}"' + re.sub(r'\s*alt="[^"]*"', '', tag.removeprefix('<img'))

    def piece(m):
        nonlocal heading, lead
        if m['picture']: return picture(m[0])
        if m['level']: heading, lead = plain(m['title']), ''
        elif m['text']: lead = sentence(plain(m['text'])) or lead
        return m[0]

    pattern = (r'<h(?P<level>[1-4])\b[^>]*>(?P<title>.*?)</h[1-4]>|(?P<picture><img\b[^>]*>)'
               r'|<(?:p|figcaption)>(?P<text>(?:(?!<img\b|</p>).)*?)</(?:p|figcaption)>')
    return re.sub(pattern, piece, page, flags=re.DOTALL)


# ---- code and output

def code_lines(code):
    "Return highlighted code with each long line in a span of its own, which wraps under its own beginning."
    lines, line, is_open = [], '', []
    for part in re.split(r'(<span\b[^>]*>|</span>|\n)', code):
        if part == '\n':
            lines.append(line + '</span>'*len(is_open))
            line = ''.join(is_open)
            continue
        if part.startswith('<span'): is_open.append(part)
        elif part == '</span>': is_open.pop()
        line += part
    lines.append(line)

    def wrapped(line):
        text = html.unescape(TAGS.sub('', line))
        if len(text) <= LONG_LINE: return line
        indent = min(24, len(text) - len(text.lstrip()) + 4)
        return f'<span class="line" style="--in:{indent}ch">{line}</span>'
    return '\n'.join(map(wrapped, lines))


def wrap_code(page):
    "Let long lines of code and of output wrap; an output in columns that fit keeps them."
    code = re.compile(r'(<pre class="sourceCode[^"]*"><code[^>]*>)(.*?)(</code></pre>)', re.DOTALL)
    page = code.sub(lambda m: m[1] + code_lines(m[2]) + m[3], page)

    def output(m):
        lines = html.unescape(TAGS.sub('', m[1])).split('\n')
        has_columns = sum(1 for l in lines if COLUMNS.search(l.strip())) > 1 and max(map(len, lines)) <= WIDE_OUTPUT
        return m[0] if has_columns else f'<pre class="prose"><code>{m[1]}</code></pre>'
    return re.sub(r'<pre><code>(.*?)</code></pre>', output, page, flags=re.DOTALL)


# ---- tables

def long_cells(page):
    """Mark the cells of printed tables that hold a text: those may break, numbers and names may not. The name of a
    column may break behind an underscore."""
    def cell(m): return f'<{m[1]} class="long">' if len(plain(m[2])) > SHORT_CELL else m[0][:m[0].index('>')+1]

    def name(m): return m[0].replace('_', '_<wbr>')

    def table(m):
        body = re.sub(r'<(td|th)>(?=(.*?)</\1>)', cell, m[0], flags=re.DOTALL)
        head, end, rest = body.partition('</thead>')
        return re.sub(r'(?<=<th>)[^<]+', name, head) + end + rest
    return re.sub(r'<table border="1" class="dataframe">.*?</table>', table, page, flags=re.DOTALL)


def parameter_tables(page):
    "Name the tables of parameters and options, which a narrow window shows as a list."
    table = re.compile(r'<table class="caption-top table">(?=\s*<thead>\s*<tr>\s*<th>(?:Name|Option)</th>)')
    return table.sub('<table class="caption-top table parameters">', page)


# ---- what no page may hold

class Reader(HTMLParser):
    "Texts outside code, and pictures without a description, of the content of a page."
    VOID = {'img', 'br', 'hr', 'meta', 'link', 'input', 'wbr', 'col', 'source'}
    CODE = {'pre', 'code', 'script', 'style', 'math', 'title'}

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.unnamed = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == 'img' and not (found.get('alt') or '').strip(): self.unnamed.append(found.get('src'))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag: pass

    def handle_data(self, data):
        if 'main' in self.open and not self.CODE & set(self.open): self.texts.append(data)


RAW = re.compile(r'\*\*|\]\(|\|\s*:?-{3,}|`|^#{1,6} |^:::|\{\.\w', re.MULTILINE)


def raw_markdown(page):
    "Return what looks like Markdown in the text of a page, with its surroundings."
    return [t[max(0, m.start()-40):m.end()+40].strip() for t in Reader(page).texts for m in RAW.finditer(t)]


def unnamed_pictures(page):
    "Return the addresses of the pictures of a page that have no description."
    return Reader(page).unnamed


def finish(page):
    "Return a page with all of the above."
    return parameter_tables(long_cells(wrap_code(alt_texts(page))))
