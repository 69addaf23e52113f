"Downloads over bad connections from odd servers, and archives that are torn or mean harm."
import base64, contextlib, errno, hashlib, shutil, stat, struct, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from helpers import simulate_screen
from rcic_fastai.screen import download as D
from rcic_fastai.screen.download import *
from rcic_fastai.screen.images import PngTree
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import read_metadata

BLOB = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
MD5 = base64.b64encode(hashlib.md5(BLOB).digest()).decode()
FAST = dict(wait=.01, progress=False)

class Handler(BaseHTTPRequestHandler):
    "A server with every bad habit, chosen by the attributes of `server`"
    def do_GET(self):
        s, blob = self.server, self.server.files.get(self.path)
        have = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if s.codes and (code := s.codes.pop(0)): s.log.append(code); return self.send_error(code)
        if blob is None: s.log.append(404); return self.send_error(404)
        etag = s.etags.pop(0) if s.etags else s.etag
        version = etag if etag and etag.startswith('"') else s.date
        if_range = self.headers.get('If-Range')
        if not s.ranges or (if_range and (s.deaf if s.deaf is not None else if_range != version)): have = 0
        if have > len(blob) or (have and s.refuses_ranges): s.log.append(416); return self.send_error(416)
        stop = s.breaks.pop(0) if s.breaks else s.always_breaks or len(blob)
        self.send_response(206 if have else 200)
        if have: self.send_header('Content-Range', f'bytes {have + s.shift}-{len(blob) - 1}/{len(blob)}')
        if s.length is not None: self.send_header('Content-Length', s.length or len(blob) - have)
        if etag: self.send_header('ETag', etag)
        if s.ranges: self.send_header('Accept-Ranges', 'bytes')
        if s.date: self.send_header('Last-Modified', s.date)
        for h in s.sums: self.send_header('x-goog-hash', h)
        self.end_headers()
        s.log.append((have, min(stop, len(blob))))
        self.wfile.write(blob[have:stop])
        if s.stalls: self.wfile.flush(); s.stalls.pop(); s.woken.wait(5)
    def log_message(self, *args): pass

@pytest.fixture
def server(monkeypatch):
    for v in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(v, raising=False)
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.handle_error = lambda *args: None                              # those that hang up
    s.daemon_threads, s.block_on_close, s.woken = True, False, threading.Event()
    for k, v in dict(files={'/f.bin': BLOB}, codes=[], breaks=[], etags=[], stalls=[], log=[], sums=[f'md5={MD5}'], ranges=True, shift=0,
                     always_breaks=0, length=0, etag='"v1"', date='', deaf=None, refuses_ranges=False).items(): setattr(s, k, v)
    s.root = f'http://127.0.0.1:{s.server_port}'
    s.url = f'{s.root}/f.bin'
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    yield s
    s.woken.set(); s.shutdown(); s.server_close()

def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def whole(tmp_path): assert (tmp_path/'f.bin').read_bytes() == BLOB and names(tmp_path) == ['f.bin']

# ---- one file over a bad connection

def test_many_drops_bring_every_byte_once(server, tmp_path):
    cuts = [1, 70_000, 70_001, 200_000, 299_999]
    server.breaks = list(cuts)
    assert fetch_file(server.url, tmp_path/'f.bin', retries=1, **FAST) == tmp_path/'f.bin'
    assert server.log == list(zip([0, *cuts], [*cuts, len(BLOB)]))
    whole(tmp_path)
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert len(server.log) == 6                                       # what is there is not asked for

def test_no_progress_is_bounded_and_kept(server, tmp_path):
    server.always_breaks = 150_000
    with pytest.raises(ScreenError, match='was interrupted 4 times in a row.*150.0 kB of 300.0 kB.*150.0 kB are kept'):
        fetch_file(server.url, tmp_path/'f.bin', retries=3, **FAST)
    assert server.log == [(0, 150_000)] + 3*[(150_000, 150_000)]
    assert names(tmp_path) == ['f.bin.part', 'f.bin.part.json']       # never under its own name
    server.always_breaks = 0
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log[-1] == (150_000, len(BLOB))
    whole(tmp_path)

def test_without_ranges_it_starts_again(server, tmp_path):
    server.ranges, server.breaks = False, [100_000, 250_000]
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [(0, 100_000), (0, 250_000), (0, len(BLOB))]
    whole(tmp_path)
    server.always_breaks = 100_000
    with pytest.raises(ScreenError, match='was interrupted 3 times'): fetch_file(server.url, tmp_path/'g.bin', retries=2, **FAST)

@pytest.mark.parametrize('ignores', [False, True])
def test_a_new_version_is_not_glued_to_the_old(server, tmp_path, ignores):
    server.files['/f.bin'], server.etags, server.breaks, server.sums = BLOB[::-1], ['"v0"'], [150_000], []
    server.deaf = False if ignores else None
    with pytest.raises(ScreenError): fetch_file(server.url, tmp_path/'f.bin', retries=0, **FAST)
    server.files['/f.bin'] = BLOB
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [(0, 150_000)] + ignores*[(150_000, len(BLOB))] + [(0, len(BLOB))]
    whole(tmp_path)

def test_a_server_deaf_to_if_range_is_asked_without(server, tmp_path):
    server.deaf, server.breaks = True, [100_000]
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert [l[0] for l in server.log] == [0, 0, 100_000]              # the second was hung up on
    whole(tmp_path)

def test_every_connection_another_version_ends(server, tmp_path):
    server.etags, server.breaks = [f'"{i}"' for i in range(50)], [100_000]*50
    with pytest.raises(ScreenError, match='was interrupted'): fetch_file(server.url, tmp_path/'f.bin', retries=3, **FAST)
    assert len(server.log) == 4

@pytest.mark.parametrize('etag, date, goes_on', [('', '', False), ('W/"v1"', '', False), ('W/"v1"', 'Tue, 01 Jan 2030 00:00:00 GMT', True)])
def test_only_a_strong_version_is_continued(server, tmp_path, etag, date, goes_on):
    server.etag, server.date, server.breaks = etag, date, [100_000]
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [(0, 100_000), (100_000 if goes_on else 0, len(BLOB))]
    whole(tmp_path)

def test_wrong_range_is_refused(server, tmp_path):
    server.breaks, server.shift = [100_000], 1
    with pytest.raises(ScreenError, match='another range or version'): fetch_file(server.url, tmp_path/'f.bin', retries=1, **FAST)
    assert names(tmp_path) == []

def test_416_starts_again(server, tmp_path):
    server.breaks, server.refuses_ranges = [100_000], True
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [(0, 100_000), 416, (0, len(BLOB))]
    whole(tmp_path)

@pytest.mark.parametrize('length, says', [(len(BLOB) + 5, 'was interrupted'), (len(BLOB) - 5, 'md5 is wrong'), (None, 'length of unknown')])
def test_wrong_length(server, tmp_path, length, says):
    server.length, server.ranges = length, False
    with pytest.raises(ScreenError, match=says): fetch_file(server.url, tmp_path/'f.bin', retries=1, **FAST)
    assert not (tmp_path/'f.bin').exists()

def crc32c(blob):
    table = []
    for i in range(256):
        for _ in range(8): i = i >> 1 ^ (0x82f63b78 if i & 1 else 0)
        table.append(i)
    c = 0xffffffff
    for b in blob: c = table[(c ^ b) & 255] ^ c >> 8
    return base64.b64encode((c ^ 0xffffffff).to_bytes(4, 'big')).decode()

@pytest.mark.parametrize('sums, says', [
    (['md5=' + MD5], None), (['crc32c=AAAAAA==', f'md5={MD5}'], None), ([f'crc32c=AAAAAA==,md5={MD5}'], None), ([], None), (['sha9=x'], None),
    (['md5=AAAAAAAAAAAAAAAAAAAAAA=='], 'md5 is wrong'), (['md5=?'], 'md5 is wrong')])
def test_checksum(server, tmp_path, sums, says):
    server.sums = sums
    if says is None: fetch_file(server.url, tmp_path/'f.bin', **FAST); return whole(tmp_path)
    with pytest.raises(ScreenError, match=says): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert names(tmp_path) == [] and len(server.log) == 1

def test_crc32c(server, tmp_path):
    server.sums = ['crc32c=' + crc32c(BLOB)]
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    whole(tmp_path)
    server.sums = ['crc32c=' + crc32c(BLOB[:-1])]
    with pytest.raises(ScreenError, match='crc32c is wrong'): fetch_file(server.url, tmp_path/'g.bin', **FAST)

@pytest.mark.parametrize('code', [400, 401, 403, 404, 410])
def test_a_plain_no_is_said_at_once(server, tmp_path, code):
    server.codes = [code]
    with pytest.raises(ScreenError, match=f'answered {code}, .*check the address'): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [code] and names(tmp_path) == []

@pytest.mark.parametrize('code', [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, code):
    server.codes = [code, code]
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [code, code, (0, len(BLOB))]
    server.codes = [code]*9
    with pytest.raises(ScreenError, match=f'3 times in a row .it answered {code}'): fetch_file(server.url, tmp_path/'g.bin', retries=2, **FAST)

def test_no_network(server, tmp_path):
    server.breaks = [100_000]
    with pytest.raises(ScreenError): fetch_file(server.url, tmp_path/'f.bin', retries=0, **FAST)
    server.shutdown(); server.server_close()
    start = time.monotonic()
    with pytest.raises(ScreenError, match='cannot be reached .*check the network'): fetch_file(server.url, tmp_path/'f.bin', wait=5, progress=False)
    assert time.monotonic() - start < 5 and (tmp_path/'f.bin.part').stat().st_size == 100_000

@pytest.mark.parametrize('url', ['ftp://x/y', 'file:///etc/passwd', '/etc/passwd', 'http://', 'http://[', 'http://127.0.0.1:abc/x', 'http://127.0.0.1/a b'])
def test_not_an_address(url, tmp_path):
    with pytest.raises(ScreenError, match='not a web address|cannot be reached'): fetch_file(url, tmp_path/'f.bin', retries=0, **FAST)
    assert names(tmp_path) == []

def test_a_stalled_connection_is_left(server, tmp_path):
    server.breaks, server.stalls = [100_000], [1]
    fetch_file(server.url, tmp_path/'f.bin', timeout=.5, **FAST)
    assert server.log == [(0, 100_000), (100_000, len(BLOB))]
    whole(tmp_path)
    server.always_breaks, server.stalls = 100_000, [1]*9
    with pytest.raises(ScreenError, match='timed out'): fetch_file(server.url, tmp_path/'g.bin', timeout=.1, retries=1, **FAST)

def test_waits_are_doubled_and_bounded(server, tmp_path, monkeypatch):
    server.codes, waits = [500]*10, []
    monkeypatch.setattr(D, 'time', SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    with pytest.raises(ScreenError): fetch_file(server.url, tmp_path/'f.bin', progress=False)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

# ---- what an earlier call left

def stopped(server, tmp_path, at=150_000):
    server.breaks = [at]
    with pytest.raises(ScreenError): fetch_file(server.url, tmp_path/'f.bin', retries=0, **FAST)
    server.log.clear()
    return tmp_path/'f.bin.part', tmp_path/'f.bin.part.json'

@pytest.mark.parametrize('spoil, goes_on', [
    (lambda part, note: None, True),
    (lambda part, note: note.write_text(note.read_text().replace('/f.bin', '/g.bin')), False),
    (lambda part, note: part.unlink(), False),
    (lambda part, note: part.write_bytes(BLOB + b'more'), False)])
def test_only_a_known_part_is_continued(server, tmp_path, spoil, goes_on):
    spoil(*stopped(server, tmp_path))
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == [(150_000 if goes_on else 0, len(BLOB))]
    whole(tmp_path)

@pytest.mark.parametrize('spoil', [lambda note: note.unlink(), lambda note: note.write_text(note.read_text()[:20]), lambda note: note.write_text('[1]'),
                                   lambda note: note.write_text(note.read_text().replace('300000', '"300000"'))])
def test_a_part_that_nobody_knows_is_kept(server, tmp_path, spoil):
    part, note = stopped(server, tmp_path)
    spoil(note)
    with pytest.raises(ScreenError, match='move both elsewhere'): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert part.stat().st_size == 150_000 and not server.log
    part.unlink(); note.unlink(missing_ok=True)
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    whole(tmp_path)

def test_a_whole_part_is_only_checked(server, tmp_path):
    part, note = stopped(server, tmp_path)
    part.write_bytes(BLOB)
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == []
    whole(tmp_path)

def test_a_spoilt_part_is_found_out(server, tmp_path):
    part, note = stopped(server, tmp_path)
    part.write_bytes(BLOB[:149_999] + b'!')
    with pytest.raises(ScreenError, match='md5 is wrong'): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert names(tmp_path) == []
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    whole(tmp_path)

def test_ctrl_c_keeps_the_part(server, tmp_path, monkeypatch):
    add = D._Bar.add
    def stop(self, n):
        add(self, n)
        if self.done > 50_000: raise KeyboardInterrupt
    monkeypatch.setattr(D._Bar, 'add', stop)
    with pytest.raises(KeyboardInterrupt): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    monkeypatch.undo()
    have = (tmp_path/'f.bin.part').stat().st_size
    assert have > 50_000 and not (tmp_path/'f.bin').exists()
    server.log.clear()
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert server.log == ([(have, len(BLOB))] if have < len(BLOB) else [])
    whole(tmp_path)

def little_room(monkeypatch, free):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(total=1e12, used=0, free=free))

def test_no_room_is_said_before_the_first_byte(server, tmp_path, monkeypatch):
    little_room(monkeypatch, 299_999)
    with pytest.raises(ScreenError, match='300.0 kB free but f.bin needs 300.0 kB'): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    assert names(tmp_path) == []
    little_room(monkeypatch, 599_999)
    with pytest.raises(ScreenError, match='f.bin, unpacked too, needs 600.0 kB'): fetch_file(server.url, tmp_path/'f.bin', room=1, **FAST)
    little_room(monkeypatch, 600_000)
    fetch_file(server.url, tmp_path/'f.bin', room=1, **FAST)
    whole(tmp_path)

def test_a_continued_part_needs_room_for_the_rest_only(server, tmp_path, monkeypatch):
    stopped(server, tmp_path, 250_000)
    little_room(monkeypatch, 50_000)
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    whole(tmp_path)

def test_a_disk_that_fills_up(server, tmp_path, monkeypatch):
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *a): self.f.close()
        def write(self, b): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(D, 'open', lambda p, mode: Full(open(p, mode)) if mode == 'ab' else open(p, mode), raising=False)
    with pytest.raises(ScreenError, match='f.bin cannot be written .No space left'): fetch_file(server.url, tmp_path/'f.bin', **FAST)
    monkeypatch.undo()
    fetch_file(server.url, tmp_path/'f.bin', **FAST)
    whole(tmp_path)

def test_folder_that_cannot_be(server, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ScreenError, match='cannot be written'): fetch_file(server.url, tmp_path/'file'/'f.bin', **FAST)

def test_progress_counts_and_measures(server, tmp_path, capsys):
    server.files['/f.bin'], server.sums = BLOB*20, []
    fetch_file(server.url, tmp_path/'f.bin')
    out = capsys.readouterr().out
    assert '100.00% [6/6' in out and 'MB of f.bin, ' in out and 'B/s' in out

# ---- archives

FILES = {'a/one.txt': b'one'*500, 'a/two.bin': BLOB[:5000], 'b/c/three.txt': b'', 'four.txt': b'4'}

def zipped(path, files=FILES, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', kind) as z:
        for name, data in files.items() if isinstance(files, dict) else files:
            if isinstance(name, str):
                i = zipfile.ZipInfo('x'); i.compress_type = kind; i.external_attr = 0o644 << 16
                i.filename = name                                     # after its birth: ZipInfo would tidy the name up
            else: i = name
            with contextlib.suppress(UserWarning): z.writestr(i, data)
    return path

def unpacked(folder): return {n: (folder/n).read_bytes() for n in names(folder)}

@pytest.mark.parametrize('kind', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_unpack_is_what_was_packed(tmp_path, kind):
    assert unpack_archive(zipped(tmp_path/'z.zip', kind=kind), tmp_path/'out', progress=False) == (4, 6501)
    assert unpacked(tmp_path/'out') == FILES

def special(name, mode): i = zipfile.ZipInfo(name); i.external_attr = mode << 16; return i

def encrypted(path):
    raw = bytearray(zipped(path).read_bytes())
    for mark, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)): raw[raw.index(mark) + at] |= 1
    path.write_bytes(raw)
    return path

HOSTILE = {
    'absolute': [('/tmp/x', b'')], 'absolute folder': [('/tmp/', b'')], 'up': [('../x', b'')], 'up in the middle': [('a/../../x', b'')],
    'up at the end': [('a/..', b'')], 'up, a folder': [('../x/', b'')], 'drive': [('C:x', b'')], 'drive folder': [('c:/x', b'')],
    'backslash': [('a\\x', b'')], 'up by backslash': [('..\\x', b'')], 'network': [('\\\\host\\x', b'')], 'stream': [('a.txt:x', b'')],
    'NUL': [('a.txt\0.png', b'')], 'newline': [('a\nb', b'')], 'twice': [('a', b'1'), ('a', b'2')], 'twice by dots': [('a/b', b'1'), ('a/./b', b'2')],
    'twice by slashes': [('a/b', b'1'), ('a//b', b'2')], 'twice by case': [('A.png', b'1'), ('a.png', b'2')],
    'twice by accents': [('\u00e9', b'1'), ('e\u0301', b'2')], 'file and folder': [('a', b'1'), ('a/b/c', b'2')], 'only dots': [('.', b'')],
    'symlink': [(special('l', stat.S_IFLNK | 0o777), b'/etc')], 'symlink to a folder': [(special('l/', stat.S_IFLNK | 0o777), b'/etc')],
    'pipe': [(special('p', stat.S_IFIFO | 0o666), b'')], 'device': [(special('d', stat.S_IFBLK | 0o666), b'')]}

@pytest.mark.parametrize('kind', HOSTILE)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_hostile_archives_write_nothing(tmp_path, kind):
    for members in (HOSTILE[kind], [('good.txt', b'good'), *HOSTILE[kind]]):
        zipped(tmp_path/'z.zip', members)
        for into in ('', 'images'):
            with pytest.raises(ScreenError, match='z.zip is not safe to unpack .*nothing was unpacked'):
                unpack_archive(tmp_path/'z.zip', tmp_path/'out', into, progress=False)
    assert names(tmp_path) == ['z.zip']

def test_locked_and_strange_members(tmp_path):
    with pytest.raises(ScreenError, match='encrypted'): unpack_archive(encrypted(tmp_path/'z.zip'), tmp_path/'out', progress=False)
    zipped(tmp_path/'z.zip', kind=zipfile.ZIP_LZMA)
    with pytest.raises(ScreenError, match='unknown way'): unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    assert names(tmp_path) == ['z.zip']

PATHS = st.text(st.sampled_from('./\\:\0aA~\u00e9\u0131 '), min_size=1, max_size=8)

@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PATHS, min_size=1, max_size=3), st.sampled_from(['', 'images']))
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_no_name_leads_out(tmp_path_factory, members, into):
    top = tmp_path_factory.mktemp('n')
    zipped(top/'z.zip', [(m, m.encode()) for m in members])
    try: unpack_archive(top/'z.zip', top/'in'/'out', into, progress=False)
    except ScreenError as e: assert '\n' not in str(e)
    outside = [n for n in names(top) if not n.startswith('in/out/' + into)]
    assert outside == ['z.zip']
    shutil.rmtree(top)

def with_size(path, size, name=b'x'):
    "Edit what the directory of a zip says of the size of its only member"
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b'PK\x01\x02') + 24
    raw[at:at+4] = struct.pack('<I', size)
    path.write_bytes(raw)
    return path

@pytest.mark.parametrize('kind', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('size, says', [(10, 'longer than it says'), (49_999, 'longer than it says'), (50_001, 'shorter than it says'), (4_000_000_000, 'shorter|free but')])
def test_sizes_that_lie(tmp_path, kind, size, says):
    zipped(tmp_path/'z.zip', {'x': bytes(50_000)}, kind)
    with pytest.raises(ScreenError, match=says): unpack_archive(with_size(tmp_path/'z.zip', size), tmp_path/'out', progress=False)
    assert names(tmp_path) == ['z.zip']

def test_a_bomb_is_weighed_first(tmp_path, monkeypatch):
    zipped(tmp_path/'z.zip', {f'{i}.bin': bytes(10**6) for i in range(20)})
    little_room(monkeypatch, 19_999_999)
    with pytest.raises(ScreenError, match='20.0 MB free but z.zip, unpacked, needs 20.0 MB'): unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    assert names(tmp_path) == ['z.zip']
    little_room(monkeypatch, 20_000_000)
    unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    little_room(monkeypatch, 0)                                       # what is there needs no room
    unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)

def test_overlapping_members(tmp_path):
    "Many entries of the directory share one body, as in the famous bombs"
    raw = zipped(tmp_path/'z.zip', {'x': BLOB}).read_bytes()
    at = raw.rindex(b'PK\x01\x02'); end = raw.rindex(b'PK\x05\x06')
    entry = bytearray(raw[at:end]); many = b''
    for c in b'xyz': entry[46] = c; many += bytes(entry)
    tail = bytearray(raw[end:]); tail[8:12] = struct.pack('<HH', 3, 3); tail[12:16] = struct.pack('<I', len(many))
    (tmp_path/'z.zip').write_bytes(raw[:at] + many + tail)
    with pytest.raises(ScreenError, match='on top of each other'): unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)

def test_interrupted_unpacking_goes_on(tmp_path, monkeypatch):
    files = {f'd{i%3}/{i}.bin': BLOB[i:i + 3000] for i in range(30)}
    zipped(tmp_path/'z.zip', files)
    chunks, count = D._chunks, []
    def stop(*args):
        count.append(1)
        for c in chunks(*args):
            yield c[:1000]
            if len(count) == 12: raise KeyboardInterrupt
            yield c[1000:]
    monkeypatch.setattr(D, '_chunks', stop)
    with pytest.raises(KeyboardInterrupt): unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    monkeypatch.undo()
    first = {n: (tmp_path/'out'/n).stat().st_mtime_ns for n in names(tmp_path/'out')}
    assert len(first) == 11 and unpacked(tmp_path/'out').items() <= files.items()     # whole files only
    spoilt, short = list(first)[:2]
    (tmp_path/'out'/spoilt).write_bytes(BLOB[-3000:]); (tmp_path/'out'/short).write_bytes(b'short')
    unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    assert unpacked(tmp_path/'out') == files
    assert all((tmp_path/'out'/n).stat().st_mtime_ns == t for n, t in first.items() if n not in (spoilt, short))

def test_something_in_the_way(tmp_path):
    zipped(tmp_path/'z.zip')
    (tmp_path/'out'/'four.txt').mkdir(parents=True)
    with pytest.raises(ScreenError, match='four.txt cannot be written'): unpack_archive(tmp_path/'z.zip', tmp_path/'out', progress=False)
    with pytest.raises(ScreenError, match='cannot be unpacked into|cannot be written'): unpack_archive(tmp_path/'z.zip', tmp_path/'z.zip', progress=False)
    zipped(tmp_path/'long.zip', {'n'*300: b''})
    with pytest.raises(ScreenError, match='cannot be'): unpack_archive(tmp_path/'long.zip', tmp_path/'out2', progress=False)

def test_empty_and_absent(tmp_path):
    with pytest.raises(ScreenError, match='no archive'): unpack_archive(tmp_path/'no.zip', tmp_path)
    (tmp_path/'e.zip').write_bytes(b'')
    with pytest.raises(ScreenError, match='e.zip is damaged'): unpack_archive(tmp_path/'e.zip', tmp_path)
    zipped(tmp_path/'n.zip', {})
    with pytest.raises(ScreenError, match='holds no files'): unpack_archive(tmp_path/'n.zip', tmp_path)

def test_more_members_than_16_bits_count(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for i in range(65_600): z.writestr(zipfile.ZipInfo(f'{i}'), b'')
    assert D._count(tmp_path/'z.zip') == 65_600 and D._count(zipped(tmp_path/'y.zip')) == len(FILES)

def right_or_said(top, raw):
    "Unpack `raw`: all of it right, or one sentence; whatever happens, nothing outside and nothing wrong inside"
    (top/'z.zip').write_bytes(raw)
    try:
        unpack_archive(top/'z.zip', top/'in'/'out', progress=False)
        said = False
    except ScreenError as e:
        said = True
        assert 'z.zip' in str(e) and '\n' not in str(e)
    assert [n for n in names(top) if not n.startswith('in/out/')] == ['z.zip']
    got = unpacked(top/'in'/'out') if (top/'in'/'out').exists() else {}
    shutil.rmtree(top/'in', ignore_errors=True)
    return said, got

def test_a_cut_archive_is_damaged(tmp_path):
    raw = zipped(tmp_path/'z.zip').read_bytes()
    for n in range(0, len(raw), 97):
        said, got = right_or_said(tmp_path, raw[:n])
        assert said and got.items() <= FILES.items()

@pytest.mark.filterwarnings('ignore')
def test_damaged_archives(tmp_path):
    rng, verdicts = np.random.default_rng(0), []
    whole = {k: zipped(tmp_path/'z.zip', kind=k).read_bytes() for k in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)}
    for n in range(240):
        raw = bytearray(whole[(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[n % 2]])
        low = 0 if n % 3 else len(raw) - 350                          # a third of the damage in the directory
        at, k = int(rng.integers(low, len(raw))), int(rng.integers(1, 6))
        how = n % 5
        if how == 0: raw[at] ^= 1 << int(rng.integers(8))
        elif how == 1: raw[at:at+k] = rng.integers(0, 256, len(raw[at:at+k]), np.uint8).tobytes()
        elif how == 2: del raw[at:at+k]
        elif how == 3: raw[at:at] = rng.integers(0, 256, k, np.uint8).tobytes()
        else: raw[at:at+k] = b'\xff'*len(raw[at:at+k])
        said, got = right_or_said(tmp_path, bytes(raw))
        verdicts.append(said)
        assert (got.items() <= FILES.items()) if said else (got == FILES), n
    assert .3 < np.mean(verdicts) < 1

# ---- the whole of it

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')/'s'
    return folder, simulate_screen(folder, ['HUVEC-01', 'RPE-08'], sirnas=2, size=32, plates=2, controls=1, n_workers=0, progress=False)

def serve(server, drawn, tmp_path, flat):
    "The archives as the official ones are (`flat`), or with train and test folders"
    folder, _ = drawn
    pngs = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob('*.png')}
    if flat: pngs = {'rxrx1/images/' + n.split('/', 2)[2]: b for n, b in pngs.items()} | {'rxrx1/README.md': b'about'}
    table = {('rxrx1/' if flat else '') + 'metadata.csv': (folder/'metadata.csv').read_bytes()}
    for name, files in dict(images=pngs, metadata=table, embeddings={'rxrx1/embeddings.csv': b'site_id,feature_0\n'}).items():
        server.files['/' + RXRX1_FILES[name]] = zipped(tmp_path/'tmp.zip', files).read_bytes()
    server.sums = []

@pytest.mark.parametrize('flat', [True, False])
def test_a_downloaded_screen_opens(server, drawn, tmp_path, capsys, flat):
    serve(server, drawn, tmp_path, flat)
    server.breaks = [500, 9000, 20_000]
    dest = download_rxrx1(tmp_path/'rx', ('images', 'metadata'), server.root + '/', **FAST)
    out = capsys.readouterr().out
    assert out.count('CC BY-NC-SA 4.0') == 1 and 'metadata: 1 file unpacked' in out
    table = read_metadata(dest)
    assert table.site_id.tolist() == drawn[1].site_id.tolist()
    source, real = PngTree(dest, table), PngTree(*drawn)
    assert len(source.missing()) == 0
    for i in table.site_id[::5]: np.testing.assert_array_equal(source[i], real[i])
    assert names(dest/'archives') == ['images.json', 'metadata.json']
    server.log.clear()
    download_rxrx1(dest, 'metadata,images', server.root, **FAST)
    assert server.log == [] and 'images: already there' in capsys.readouterr().out
    shutil.rmtree(dest/'metadata')
    download_rxrx1(dest, 'all', server.root, **FAST)
    assert len(server.log) == 2 and names(dest/'embeddings') == ['embeddings.csv'] and len(read_metadata(dest)) == len(table)

def test_archives_only_and_kept(server, drawn, tmp_path):
    serve(server, drawn, tmp_path, True)
    dest = download_rxrx1(tmp_path/'rx', 'metadata', server.root, unzip=False, **FAST)
    assert names(dest) == ['archives/rxrx1-metadata.zip']
    download_rxrx1(dest, 'metadata', server.root, keep=True, **FAST)
    assert names(dest) == ['archives/metadata.json', 'archives/rxrx1-metadata.zip', 'metadata/metadata.csv'] and len(server.log) == 1

def test_room_for_archive_and_files(server, drawn, tmp_path, monkeypatch):
    serve(server, drawn, tmp_path, True)
    size = len(server.files['/rxrx1-images.zip'])
    little_room(monkeypatch, 2*size - 1)
    with pytest.raises(ScreenError, match='rxrx1-images.zip, unpacked too, needs'): download_rxrx1(tmp_path/'rx', 'images', server.root, **FAST)
    assert names(tmp_path/'rx') == []

def test_a_bad_archive_stays_for_inspection(server, tmp_path):
    server.files['/rxrx1-metadata.zip'], server.sums = b'<html>sign in</html>', []
    for _ in range(2):
        with pytest.raises(ScreenError, match='rxrx1-metadata.zip is damaged .*delete it'): download_rxrx1(tmp_path/'rx', 'metadata', server.root, **FAST)
    assert len(server.log) == 1 and names(tmp_path/'rx') == ['archives/rxrx1-metadata.zip', 'archives/rxrx1-metadata.zip.json']

@pytest.mark.parametrize('what', ['', None, 'pictures', 'images;metadata', [], ['images', 'all'], 'metadata,'])
def test_unknown_what(what, tmp_path):
    with pytest.raises(ScreenError, match='metadata, images, embeddings'): download_rxrx1(tmp_path/'rx', what)
    assert names(tmp_path) == []

def test_dest_is_a_file(tmp_path):
    (tmp_path/'f').write_text('')
    with pytest.raises(ScreenError, match='is a file'): download_rxrx1(tmp_path/'f')
