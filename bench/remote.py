"""How long a packed screen takes to be read from a server of the S3 kind, against the plain download of the same files.

    python bench/remote.py [--quick]

The server is tests/far.py in a process of its own on this machine, once over a line of 1 Gbit/s with an answer after
30 ms, as from a bucket, and once as fast as this machine sends to itself, where unpacking takes as long as sending. Contenders read the same chunks in turns, REQUESTS (16) at once: `plain` downloads them with Python's
own http.client over connections that stay open, and with curl where there is one; `read` gives pixels, which are
checked and unpacked, in batches of 32 sites, two of which are in work, as `ScreenDL` asks for them. A figure is the median over the rounds,
a ratio the median of the ratios within a round. At most 1.3 is asked. `here` reads the same store from the disk.
"""
import argparse, os, shutil, subprocess, sys, tempfile, time
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from machine import save
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.pack import PackedScreen, pack_screen
from rcic_fastai.screen.remote import REQUESTS
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.tables import SITE_COLUMNS

ROOT, BATCH, LIMIT = Path(__file__).resolve().parent.parent, 32, 1.3
SERVER = 'import sys; sys.path.insert(0, sys.argv[1]); from far import Far; f = Far(sys.argv[2]); f.delay, f.rate = map(float, sys.argv[3:]); print(f.url, flush=True); f.serve_forever()'


class Noise(ImageSource):
    "Pictures of blurred noise, which pack like cells"
    shape, dtype = (6, 512, 512), np.dtype('u1')
    def _read(self, site_id, out):
        rng = np.random.default_rng(self._rows[site_id])
        for c in out:
            x = cv2.GaussianBlur(rng.random(c.shape, np.float32), (0, 0), 4)
            c[:] = np.clip((x - .5)*600 + 40 + rng.normal(0, 2, c.shape), 0, 255)


def table(n):
    "A site table of one plate after the other"
    rows = [(f'E_{i//192 + 1}', f'{chr(66 + i//24 % 8)}{i % 24 + 1:02d}') for i in range(n)]
    t = pd.DataFrame(dict(experiment='E', plate=[int(p[2:]) for p, _ in rows], well=[w for _, w in rows], site=1))
    t['well_id'] = t.experiment + '_' + t.plate.astype(str) + '_' + t.well
    t = t.assign(site_id=t.well_id + '_1', cell_type='HUVEC', dataset='train', well_type='treatment', sirna='s',
                 sirna_id=pd.array([0]*n, 'Int64'), plate_group=pd.array([pd.NA]*n, 'Int64'))
    return t[SITE_COLUMNS]


def plain(url, keys):
    "Download with http.client"
    host, shares = url.removeprefix('http://'), [keys[i::REQUESTS] for i in range(REQUESTS)]
    def some(share):
        c, n = HTTPConnection(host), 0
        for k in share:
            c.request('GET', '/' + k)
            n += len(c.getresponse().read())
        c.close()
        return n
    with ThreadPoolExecutor(REQUESTS) as pool: return sum(pool.map(some, shares))


def curl(url, keys):
    "Download with curl"
    lines = ''.join(f'url = "{url}/{k}"\noutput = "/dev/null"\n' for k in keys)
    subprocess.run(['curl', '-sf', '--no-progress-meter', '--parallel', '--parallel-max', str(REQUESTS), '-K', '-'], input=lines, text=True, check=True)


def read(source, ids, threads):
    "Read pixels in batches, two of which are in work, as `ScreenDL` does"
    free = [np.empty((BATCH, *source.shape), source.dtype) for _ in range(2)]
    def batch(some):
        out = free.pop()
        source.read_into(some, out, threads)
        free.append(out)
    with ThreadPoolExecutor(2) as pool: list(pool.map(batch, [ids[k:k + BATCH] for k in range(0, len(ids), BATCH)]))


def timed(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def measure(home, delay, rate, rounds):
    "Seconds of every contender in every round"
    p = subprocess.Popen([sys.executable, '-c', SERVER, str(ROOT/'tests'), str(home), str(delay), str(rate)], stdout=subprocess.PIPE, text=True)
    try:
        url = os.environ['AWS_ENDPOINT_URL'] = p.stdout.readline().strip()
        from rcic_fastai.screen import remote
        remote._store.cache_clear()
        here, there = PackedScreen(home/'bucket/s.zarr'), PackedScreen('s3://bucket/s.zarr')
        ids = here.site_ids
        keys = [f'bucket/s.zarr/images/c/{i}/0/0/0' for i in range(len(ids))]
        ways = dict(plain=lambda: plain(url, keys), read=lambda: read(there, ids, REQUESTS), here=lambda: read(here, ids, 2))
        if shutil.which('curl'): ways['curl'] = lambda: curl(url, keys)
        for f in ways.values(): f()
        rows = [{k: timed(f) for k, f in ways.items()} for _ in range(rounds)]
    finally:
        p.kill()
        p.wait()
    return pd.DataFrame(rows), sum((home/k).stat().st_size for k in keys)


def main(quick=False):
    sites, rounds = (32, 2) if quick else (192, 9)
    res = []
    with tempfile.TemporaryDirectory() as home:
        home, t = Path(home), table(sites)
        (home/'bucket').mkdir()
        pack_screen(Screen(t, Noise(home, t, tuple('abcdef'))), home/'bucket/s.zarr', progress=False)
        for delay, rate in ((.03, 125e6), (0., 0.)):
            s, size = measure(home, delay, rate, rounds)
            row = dict(answer_after_ms=round(delay*1000), mb_per_s=rate/1e6 or None, sites=sites, mb=round(size/1e6, 1), **{f'{k}_s': round(float(s[k].median()), 3) for k in s},
                       read_to_plain=round(float((s['read']/s['plain']).median()), 2))
            if 'curl' in s: row['read_to_curl'] = round(float((s['read']/s['curl']).median()), 2)
            res.append(row)
            print(row, flush=True)
    if not quick: save('remote', limit=LIMIT, requests=REQUESTS, rounds=rounds, rows=res)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true')
    main(p.parse_args().quick)
