"A server for tests and bench/remote.py: a folder as a bucket of S3 (GET, HEAD, ranges, ListObjectsV2) and as plain HTTP, which can fail."
import hashlib, threading, time
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@lru_cache(4096)
def md5(path, when): return hashlib.md5(path.read_bytes()).hexdigest()


class Far(ThreadingHTTPServer):
    "Serve a folder; the first part of a path is the bucket"
    daemon_threads, request_queue_size = True, 128
    def __init__(self, folder, page=1000):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.folder, self.page, self.lock = Path(folder), page, threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.fault = lambda method, key, n: None        # (GET or HEAD, key, how often it was asked for) → name of a fault
        self.lists, self.delay, self.rate, self.free = True, 0., 0., 0.        # seconds before an answer, bytes per second of all answers
        self.forget()
    def forget(self): self.asked, self.now, self.most, self.signed = {}, 0, 0, False
    def n(self, method='GET'): return sum(k for (m, _), k in self.asked.items() if m == method)
    def handle_error(self, request, address): pass      # who asked has gone
    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True, kwargs=dict(poll_interval=.05)).start()
        return self
    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()

    def answer(self):
        far, url = self.server, urlsplit(self.path)
        key = unquote(url.path).strip('/')
        with far.lock:
            far.now += 1
            far.most = max(far.most, far.now)
            n = far.asked[self.command, key] = far.asked.get((self.command, key), 0) + 1
            far.signed |= 'Authorization' in self.headers
        try:
            if far.delay: time.sleep(far.delay)
            self.reply(far, key, parse_qs(url.query, keep_blank_values=True), far.fault(self.command, key, n))
        finally:
            with far.lock: far.now -= 1

    def reply(self, far, key, query, fault):
        if fault in ('403', '404', '500', '503'): return self.put(int(fault), b'no')
        if 'list-type' in query: return self.put(200, self.listing(far, key, query)) if far.lists else self.put(403, b'no')
        path = far.folder/key
        if not path.is_file(): return self.put(404, b'no')
        data = path.read_bytes()
        if fault == 'other': data = bytes(len(data))
        s = path.stat()
        headers = {'ETag': f'"{md5(path, s.st_mtime_ns)}"', 'Last-Modified': formatdate(s.st_mtime, usegmt=True), 'Accept-Ranges': 'bytes'}
        code, part = 200, self.headers.get('Range')
        if part and fault != 'no ranges':
            first, _, last = part.removeprefix('bytes=').partition('-')
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers['Content-Range'], code, data = f'bytes {first}-{last}/{len(data)}', 206, data[first:last + 1]
        self.put(code, data, headers, fault)

    def put(self, code, data, headers={}, fault=None):
        if fault == 'short': data = data[:len(data)//2]         # and says so: a proxy that lies
        self.send_response(code)
        for k, v in {**headers, 'Content-Length': len(data)}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command == 'HEAD': return
        if fault in ('cut', 'stall'):
            self.wfile.write(data[:len(data)//2])
            self.wfile.flush()
            if fault == 'stall': time.sleep(3)
            self.close_connection = True
            return
        if self.server.rate: return self.slowly(memoryview(data))
        self.wfile.write(data)

    def slowly(self, data, piece=2**16):
        "Write as over a line that all answers share"
        far = self.server
        for k in range(0, len(data), piece):
            with far.lock: far.free = turn = max(far.free, time.monotonic()) + len(data[k:k + piece])/far.rate
            time.sleep(max(0, turn - time.monotonic()))
            self.wfile.write(data[k:k + piece])

    def listing(self, far, bucket, query):
        "Return the XML of a page of ListObjectsV2"
        top, prefix, slash = far.folder/bucket, query.get('prefix', [''])[0], query.get('delimiter', [''])[0]
        keys = sorted(p.relative_to(top).as_posix() for p in top.rglob('*') if p.is_file())
        entries = {}
        for k in keys:
            if not k.startswith(prefix): continue
            head, found, _ = k[len(prefix):].partition(slash) if slash else (k, '', '')
            entries[prefix + head + '/' if found else k] = bool(found)
        start = int(query.get('continuation-token', ['0'])[0])
        some, more = list(entries.items())[start:start + far.page], start + far.page < len(entries)
        def one(k, is_folder):
            if is_folder: return f'<CommonPrefixes><Prefix>{escape(k)}</Prefix></CommonPrefixes>'
            p = top/k
            when = time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(p.stat().st_mtime))
            return f'<Contents><Key>{escape(k)}</Key><LastModified>{when}</LastModified><ETag>"{md5(p, p.stat().st_mtime_ns)}"</ETag><Size>{p.stat().st_size}</Size></Contents>'
        token = f'<NextContinuationToken>{start + far.page}</NextContinuationToken>' if more else ''
        return (f'<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>{str(more).lower()}</IsTruncated>{token}'
                + ''.join(one(*o) for o in some) + '</ListBucketResult>').encode()
