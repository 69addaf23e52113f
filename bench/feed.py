"""How fast whole sites are fed, from PNGs and packed, against the ways that people read them; what packing costs.

    python bench/feed.py [--quick] [--part feed|decoders|cold|codecs|memory|waiting]

Prints tables and stores bench/results/feed.json; `--part` measures one part and keeps the others as they are stored,
`--quick` measures little, to see that everything runs, and stores nothing. All contenders of a table run in turns, in
the same run; a figure is the median over the rounds, a ratio the median of the ratios within a round. Needs 2.5 GB in
the temporary folder, and a quiet machine: `cores_used_by_others` tells whether it was one.
"""
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('PYTHONWARNINGS', 'ignore::FutureWarning')  # for the processes that this one starts

import argparse, json, sys, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, product, repeat
from multiprocessing import get_context, set_start_method
from pathlib import Path
from shutil import which
from subprocess import PIPE, Popen

import cv2
import numpy as np
import pandas as pd
import torch
from numcodecs import blosc
from PIL import Image
from fastai.vision.all import (Callback, CategoryBlock, ColReader, DataBlock, PILImageBW, TfmdDL, ToTensor,
                               TransformBlock)
from machine import RESULTS, cores, save
from rcic_fastai.batch.data import META_COLUMNS, MetadataBlock, screen_dls
from rcic_fastai.screen.images import PngTree, only_present
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.batch.loader import ScreenDL, SiteReader
from rcic_fastai.screen.tables import read_metadata, real_data
from rcic_fastai.screen.pack import CODECS, PackedScreen, _differences, _undo_differences, pack_screen
from rcic_fastai.train.recipes import Recipe, get_recipe
from rcic_fastai.screen.simulate.layout import simulate_screen
from rcic_fastai.screen.screen import Screen

BATCH, WORKERS = 16, 2  # sites a batch; processes or threads of every contender that has any
SLACK = 6               # batches before and after those that are timed: workers start, queues fill and run dry
FULL = dict(sirnas=32, controls=4, rounds=5, seconds=1.5, codec_sites=12, packed_sites=96, small_sirnas=200,
            batches=10_000)
QUICK = dict(sirnas=4, controls=0, rounds=2, seconds=.1, codec_sites=3, packed_sites=8, small_sirnas=12, batches=300)


# the files

def screen_files(home, sirnas, controls):
    "A simulated screen of 512 px: PNGs, packed stores, their chunks in one flat file each, raw pixels in one file"
    table = simulate_screen(home/'png', ('HUVEC-01', 'HEPG2-01', 'RPE-01'), sirnas=sirnas, controls=controls, size=512,
                            progress=False)
    source = PngTree(home/'png', table)
    for codec in CODECS:
        pack_screen(Screen(table, source), home/f'{codec}.zarr', codec=codec, progress=False)
        write_flat(home/f'{codec}.flat', (p.read_bytes()[:-4] for p in chunks(home/f'{codec}.zarr')))
    with open(home/'raw', 'wb') as f:
        for i in table.site_id: f.write(source[i].tobytes())


def small_screen(home, sirnas):
    "A packed screen of 128 px"
    table = simulate_screen(home/'png', ('HUVEC-01', 'HUVEC-02', 'RPE-01'), sirnas=sirnas, controls=4, size=128,
                            progress=False)
    return pack_screen(Screen(table, PngTree(home/'png', table)), home/'small.zarr', progress=False)


def chunks(store): return [store/'images/c'/str(i)/'0/0/0' for i in range(len(read_metadata(store)))]


def png_kb(source, ids): return sum(os.path.getsize(p) for i in ids for p in source._paths(i))/1000/len(ids)


def write_flat(path, blobs):
    "Blobs one after the other, and where each begins"
    ends = [0]
    with open(path, 'wb') as f:
        for b in blobs: ends.append(ends[-1] + f.write(b))
    np.save(f'{path}.npy', ends)


class Flat:
    "What reading can cost at least: blobs of one open file, decoded into their places by threads that do nothing else"
    def __init__(self, path, threads, differs):
        self.ends, self.file, self.threads = np.load(f'{path}.npy').tolist(), os.open(path, os.O_RDONLY), threads
        self.pool, self.differs = ThreadPoolExecutor(threads), differs

    def some(self, rows, out):
        for r, o in zip(rows, out):
            blosc.decompress(os.pread(self.file, self.ends[r+1] - self.ends[r], self.ends[r]), o)
            if self.differs: _undo_differences(o.reshape(-1, o.shape[-1]))

    def batch(self, rows, out):
        if self.threads == 1: self.some(rows, out)
        else: list(self.pool.map(lambda k: self.some(rows[k::self.threads], out[k::self.threads]), range(self.threads)))
        return out

    def close(self): self.pool.shutdown(); os.close(self.file)


# 1 feeding: each contender is made from the folder and gives a function: lists of rows → their batches

class PilSites(torch.utils.data.Dataset):
    "rxrx1-utils' way: six pictures opened one by one, stacked"
    def __init__(self, home): self.paths = site_paths(home)
    def __getitem__(self, i): return torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in self.paths[i]]))


def site_paths(home):
    source = PngTree(home/'png', read_metadata(home/'png'))
    return [source._paths(i) for i in source.site_ids]


def pil(home, workers):
    return lambda lists: torch.utils.data.DataLoader(PilSites(home), batch_sampler=lists, num_workers=workers)


def fastai_blocks(home):
    "Six image blocks, one a channel"
    paths = site_paths(home)
    def channel(i, c): return paths[i][c]
    block = DataBlock([TransformBlock(PILImageBW.create)]*6, getters=[partial(channel, c=c) for c in range(6)], n_inp=6,
                      splitter=all_rows)
    sites = block.datasets(range(len(paths)), verbose=False).train
    dl = TfmdDL(sites, bs=BATCH, num_workers=WORKERS, after_item=ToTensor())
    return lambda lists: (torch.cat(b, 1) for b in epoch(dl, lists))


def all_rows(items): return range(len(items)), []


def epoch(dl, lists):
    "One pass of a fastai loader, in a given order"
    dl.get_idxs = lambda: list(chain(*lists))
    return iter(dl)


def spdl(home, packed):
    "SPDL's pipeline of threads; OpenCV decodes its PNGs, since SPDL's own decoder needs FFmpeg's libraries"
    from spdl.pipeline import PipelineBuilder
    source, paths = PackedScreen(home/'fast.zarr'), site_paths(home)
    def site(i):
        if packed: return source[source.site_ids[i]]
        return np.stack([cv2.imread(p, cv2.IMREAD_UNCHANGED) for p in paths[i]])
    def read(lists):
        sites = PipelineBuilder().add_source(chain(*lists)).pipe(site, concurrency=WORKERS, output_order='input')
        pipeline = sites.aggregate(BATCH).pipe(np.stack).add_sink(2).build(num_threads=WORKERS)
        with pipeline.auto_stop(): yield from map(torch.from_numpy, pipeline)
    return read


def free_python():
    "The interpreter without a lock that is installed, if one is"
    return next(filter(None, map(which, ('python3.14t', 'python3.13t'))), None)


def free_threaded(home):
    "Threads of an interpreter without a lock, in a process of its own, that decode into shared memory"
    slots, size = 4, shape(home)
    (home/'free.json').write_text(json.dumps(dict(paths=site_paths(home), threads=WORKERS, shape=[slots, BATCH, *size])))
    out = np.memmap(home/'free', np.uint8, 'w+', shape=(slots, BATCH, *size))
    command = [free_python(), str(Path(__file__).with_name('free_threaded.py')), str(home/'free.json'), str(home/'free')]
    def read(lists):
        with Popen(command, stdin=PIPE, stdout=PIPE, text=True, env={**os.environ, 'PYTHON_GIL': '0'}) as child:
            ask = partial(print, file=child.stdin, flush=True)
            for rows in lists[:2]: ask(json.dumps(rows))
            for n in range(len(lists)):
                slot = child.stdout.readline()
                if not slot: raise RuntimeError(f'{command[0]} needs numpy, and kornia_rs or Pillow')
                if n + 2 < len(lists): ask(json.dumps(lists[n + 2]))
                yield torch.from_numpy(out[int(slot)])
            child.stdin.close()
    return read


def screen_dl(home, packed, workers=0, whole=True):
    "Ours: a complete iteration, with metadata and labels, or the bytes alone, from the store of a codec or from PNGs"
    table = read_metadata(home/'png')
    source = PackedScreen(home/f'{packed}.zarr') if packed else PngTree(home/'png', table)
    dl = screen_batches(table, source, whole, num_workers=workers)
    if whole: return lambda lists: (b[0] for b in epoch(dl, lists))
    return lambda lists: (b[0] for b in dl.create_batches(list(chain(*lists))))


def screen_batches(table, source, whole=True, **kwargs):
    "A `ScreenDL` of bytes, with metadata and labels or without"
    blocks, columns = [TransformBlock(SiteReader(source))], ['site_id']
    if whole:
        blocks += [*(MetadataBlock() for _ in META_COLUMNS), CategoryBlock()]
        columns += [*META_COLUMNS, 'sirna']
    block = DataBlock(blocks, getters=[ColReader(c) for c in columns], splitter=all_rows)
    sites = block.datasets(table, verbose=False).train
    return ScreenDL(sites, bs=BATCH, threads=WORKERS, device=torch.device('cpu'), **kwargs)


def zarr_python(home, codec, whole):
    import zarr
    warnings.filterwarnings('ignore', 'Numcodecs codecs are not in')
    images = zarr.open_group(home/f'{codec}.zarr', mode='r')['images']
    if whole: return lambda lists: (torch.from_numpy(images.oindex[np.array(rows)]) for rows in lists)
    return lambda lists: (torch.from_numpy(np.stack([images[i] for i in rows])) for rows in lists)


def tensorstore(home):
    import tensorstore as ts
    limits = {'data_copy_concurrency': {'limit': WORKERS}, 'file_io_concurrency': {'limit': WORKERS}}
    images = ts.open({'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{home}/plain.zarr/images/'},
                      'context': limits}).result()
    return lambda lists: (torch.from_numpy(images[rows].read().result()) for rows in lists)


def wilds(home):
    "WILDS' own class and layout: three of the channels in one RGB PNG (here of 512 px instead of its 256)"
    from wilds.datasets.rxrx1_dataset import RxRx1Dataset
    table, root = read_metadata(home/'png'), home/'wilds/rxrx1_v1.0'
    def write(row, paths):
        file = root/f'images/{row.experiment}/Plate{row.plate}/{row.well}_s{row.site}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.merge('RGB', [Image.open(p) for p in paths[:3]]).save(file)
    with ThreadPoolExecutor() as pool: list(pool.map(write, table.itertuples(), site_paths(home)))
    table.assign(sirna_id=pd.factorize(table.sirna)[0]).to_csv(root/'metadata.csv', index=False)
    (root/'RELEASE_v1.0.txt').touch()
    sites = RxRx1Dataset(root_dir=home/'wilds')
    def three(items): return torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x, *_ in items])
    return lambda lists: torch.utils.data.DataLoader(sites, batch_sampler=lists, num_workers=WORKERS, collate_fn=three)


def flat(home, codec):
    blobs, out = Flat(home/f'{codec}.flat', WORKERS, codec != 'plain'), np.empty((BATCH, *shape(home)), np.uint8)
    return lambda lists: (torch.from_numpy(blobs.batch(rows, out)) for rows in lists)


def memmap(home):
    raw, out = np.memmap(home/'raw', np.uint8).reshape(-1, *shape(home)), np.empty((BATCH, *shape(home)), np.uint8)
    return lambda lists: (torch.from_numpy(np.take(raw, rows, 0, out)) for rows in lists)


@lru_cache
def shape(home): return PackedScreen(home/'fast.zarr').shape


WILDS, TENSORSTORE = 'WILDS, three channels in one PNG, 2 workers', 'tensorstore, plain, a batch at once, 2 threads'
SPDL, SPDL_PACKED, FREE = 'SPDL, PNG, 2 threads', 'SPDL, packed, 2 threads', 'free-threaded Python, PNG, 2 threads'
REFERENCE, LIMIT = 'PIL ×6, DataLoader, 2 workers', 'flat file of blobs, 2 threads (the limit)'
OURS, OURS_PNG = 'ScreenDL, packed, complete', 'ScreenDL, PNG, 2 threads'
OURS_BYTES, OURS_PNG_WORKERS = 'ScreenDL, packed, bytes alone', 'ScreenDL, PNG, 2 workers'
OURS_PLAIN, LIMIT_PLAIN = 'ScreenDL, packed plain, complete', 'flat file of plain blobs, 2 threads (its limit)'
CONTENDERS = {
    REFERENCE: partial(pil, workers=WORKERS),
    'PIL ×6, DataLoader, no workers': partial(pil, workers=0),
    'fastai, six ImageBlocks, 2 workers': fastai_blocks,
    WILDS: wilds,
    SPDL: partial(spdl, packed=False),
    FREE: free_threaded,
    OURS_PNG: partial(screen_dl, packed=None),
    OURS_PNG_WORKERS: partial(screen_dl, packed=None, workers=WORKERS),
    'zarr-python, fast, site by site': partial(zarr_python, codec='fast', whole=False),
    'zarr-python, plain, site by site': partial(zarr_python, codec='plain', whole=False),
    'zarr-python, plain, oindex of a batch': partial(zarr_python, codec='plain', whole=True),
    TENSORSTORE: tensorstore,
    SPDL_PACKED: partial(spdl, packed=True),
    OURS: partial(screen_dl, packed='fast'),
    OURS_BYTES: partial(screen_dl, packed='fast', whole=False),
    LIMIT: partial(flat, codec='fast'),
    'ScreenDL, packed small, complete': partial(screen_dl, packed='small'),
    OURS_PLAIN: partial(screen_dl, packed='plain'),
    LIMIT_PLAIN: partial(flat, codec='plain'),
    'raw memmap': memmap}
OPTIONAL = {WILDS: 'wilds', TENSORSTORE: 'tensorstore', SPDL: 'spdl', SPDL_PACKED: 'spdl', FREE: None}  # and their packages


def is_installed(name):
    package = OPTIONAL.get(name, 'numpy')
    return bool(find_spec(package) if package else free_python())


@lru_cache
def contender(name, home):
    "A contender, made once in its process, after a look at whether it delivers the right pixels"
    read, rows = CONTENDERS[name](home), list(range(BATCH))[::-1]
    got, *_ = read([rows])
    source = PackedScreen(home/'fast.zarr')
    wanted = np.stack([source[source.site_ids[i]] for i in rows])[:, :got.shape[1]]
    if not np.array_equal(got, wanted): raise AssertionError(f'{name} delivers other pixels')
    return read


def turn(name, home, batches, seed):
    "ms a site over `batches` batches of random sites, in the middle of a longer run"
    read, rng, n = contender(name, home), np.random.default_rng(seed), len(read_metadata(home/'png'))
    lists = [rng.choice(n, BATCH, replace=False).tolist() for _ in range(batches + 2*SLACK)]
    for i, x in enumerate(read(lists)):
        if x.dtype != torch.uint8 or len(x) != BATCH: raise AssertionError(f'{name} delivers {x.dtype} {list(x.shape)}')
        if i == SLACK - 1: start = time.perf_counter()
        if i == SLACK - 1 + batches: stop = time.perf_counter()
    return 1000*(stop - start)/batches/BATCH


def measure_feed(home, rounds, seconds, **_):
    "One contender at work at a time; those with worker processes apart, as tensorstore cannot be forked"
    times, notes = {}, {n: 'not installed' for n in OPTIONAL if not is_installed(n)}
    with ExitStack() as stack:
        forks, threads = stack.enter_context(process()), stack.enter_context(process())
        def ask(n, batches, seed):
            return (forks if 'workers' in n else threads).submit(turn, n, home, batches, seed).result()
        batches = {}
        for n in [n for n in CONTENDERS if n not in notes]:
            try: batches[n] = 2*int(np.clip(seconds/(ask(n, 4, 0)/1000*BATCH)/2, 4, 100))
            except Exception as e:
                if n not in OPTIONAL: raise
                notes[n] = f'does not run with these versions ({type(e).__name__}: {e})'
        for r in range(rounds):
            for n in batches: times.setdefault(n, []).append(ask(n, batches[n], r + 1))
    rows = [dict(way=n, **feed_row(times, n)) if n in times else dict(way=n, note=notes[n]) for n in CONTENDERS]
    table = pd.DataFrame(rows).set_index('way')
    times = {n: np.array(v) for n, v in times.items()}
    asked = [ask_least('packed × reference', table.times_reference[OURS], 15),
             ask_least('packed plain × reference', table.times_reference[OURS_PLAIN], 20),
             ask_most('packed ÷ limit', table.over_limit[OURS], 1.2),
             ask_most('packed plain ÷ its limit', np.median(times[OURS_PLAIN]/times[LIMIT_PLAIN]), 1.2),
             ask_least('PNG × reference', max(table.times_reference[[OURS_PNG, OURS_PNG_WORKERS]]), 2),
             ask_most('PNG, threads ÷ processes', np.median(times[OURS_PNG]/times[OURS_PNG_WORKERS]), 1)]
    sites = read_metadata(home/'png').site_id
    kb = dict(png=png_kb(PngTree(home/'png', read_metadata(home/'png')), sites), raw=file_kb(home/'raw', sites),
              **{codec: file_kb(home/f'{codec}.flat', sites) for codec in CODECS})
    kb = {f'kB_per_site_{k}': round(v, 1) for k, v in kb.items()}
    return dict(sites=len(sites), batch=BATCH, **kb, rounds=rounds, timed='steady state: workers started, '
                f'{SLACK} batches before and after not timed; warm cache'), rows, asked


def file_kb(path, sites): return os.path.getsize(path)/1000/len(sites)


def feed_row(times, name):
    "Median, and ratios within the rounds"
    t = {n: np.array(v) for n, v in times.items()}
    times_ref = t[REFERENCE]/t[name]
    return dict(ms_per_site=round(float(np.median(t[name])), 3), times_reference=round(float(np.median(times_ref)), 2),
                times_reference_range=[round(float(f(times_ref)), 2) for f in (min, max)],
                over_limit=round(float(np.median(t[name]/t[LIMIT])), 2))


def ask_least(what, value, least): return asked_for(what, value, f'≥ {least}', value >= least)
def ask_most(what, value, most): return asked_for(what, value, f'≤ {most}', value <= most)
def asked_for(what, value, asked, met):
    return dict(what=what, measured=round(float(value), 3), asked=asked, met=bool(met))


# 2 decoders of PNG: what threads gain by each

def decoders():
    "Functions: the bytes of a PNG → its pixels"
    from io import BytesIO
    from kornia_rs import io
    yield 'kornia_rs', lambda data: io.decode_image_png_u8(data, (512, 512), 'mono')
    yield 'OpenCV', lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    yield 'Pillow', lambda data: np.asarray(Image.open(BytesIO(data)))
    if find_spec('pywuffs'): yield 'Wuffs', wuffs()
    if find_spec('imagecodecs'):
        import imagecodecs
        yield 'imagecodecs, libpng', imagecodecs.png_decode
        yield 'imagecodecs, libspng', imagecodecs.spng_decode


def wuffs():
    from pywuffs import ImageDecoderType, PixelFormat
    from pywuffs.aux import ImageDecoder, ImageDecoderConfig
    config = ImageDecoderConfig()
    config.enabled_decoders, config.pixel_format = [ImageDecoderType.PNG], PixelFormat.Y
    return lambda data: ImageDecoder(config).decode(data).pixbuf


def measure_decoders(home, rounds, codec_sites, **_):
    "ms of wall clock and of processor per site, by one thread and by two that share Python's lock"
    sites = site_paths(home)[:2*codec_sites]
    files, times = [Path(p).read_bytes() for paths in sites for p in paths], {}
    for _, (name, decode) in product(range(rounds), list(decoders())):
        if not np.array_equal(np.asarray(decode(files[0])).squeeze(), cv2.imdecode(np.frombuffer(files[0], np.uint8), -1)):
            raise AssertionError(f'{name} decodes other pixels')
        for threads in (1, WORKERS): times.setdefault((name, threads), []).append(decode_ms(decode, files, threads))
    rows = []
    for name, threads in times:
        if threads > 1: continue
        (one, cpu), (more, _) = (np.median(times[name, n], 0) for n in (1, WORKERS))
        rows.append(dict(decoder=name, ms_per_site_1=round(one, 2), cpu_ms_per_site=round(cpu, 2),
                         ms_per_site_2=round(more, 2), gained=round(one/more, 2)))
    return dict(sites=len(sites), rounds=rounds, note='gained: 1 thread ÷ 2 threads; 1 where a decoder keeps the lock'), \
        rows, []


def decode_ms(decode, files, threads):
    "ms of wall clock, and of processor, per site of six files"
    def some(k):
        for data in files[k::threads]: decode(data)
    with ThreadPoolExecutor(threads) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        list(pool.map(some, range(threads)))
        return [1000*o/len(files)*6 for o in (time.perf_counter() - start, time.process_time() - cpu)]


# 3 cold cache

def drop(paths):
    "Have the system forget the pages of files"
    for p in paths:
        fd = os.open(p, os.O_RDONLY)
        os.fsync(fd); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.close(fd)


def from_disk():
    "Bytes that this process has had fetched from the disk"
    return int(Path('/proc/self/io').read_text().split('\nread_bytes:')[1].split()[0])


def measure_cold(home, rounds, **_):
    "A pass over the store after its pages were dropped: the bytes of the files alone, against ScreenDL"
    if not hasattr(os, 'posix_fadvise') or not Path('/proc/self/io').exists():
        return dict(note='this system cannot be told to drop pages: not measured'), [], []
    files, read = chunks(home/'fast.zarr'), screen_dl(home, packed='fast')
    total, times, fetched = sum(f.stat().st_size for f in files), {'bytes': [], 'ScreenDL': []}, []
    with ThreadPoolExecutor(WORKERS) as pool:
        for r in range(rounds):
            order = np.random.default_rng(r).permutation(len(files)//BATCH*BATCH).tolist()
            lists = np.array(order).reshape(-1, BATCH).tolist()
            ways = {'bytes': lambda: pool.map(lambda i: len(files[i].read_bytes()), order),
                    'ScreenDL': lambda: read(lists)}
            for way in list(ways)[::1 if r % 2 else -1]:
                drop(files)
                before, start = from_disk(), time.perf_counter()
                for x in ways[way](): pass
                times[way].append(1000*(time.perf_counter() - start)/len(order))
                fetched.append((from_disk() - before)/(total*len(order)/len(files)))
    b, s = (np.array(times[k]) for k in ('bytes', 'ScreenDL'))
    mb = total/len(files)/1e6
    rows = [dict(way=k, ms_per_site=round(float(np.median(v)), 3), MB_per_s=round(float(mb/np.median(v)*1000)))
            for k, v in times.items()]
    if min(fetched) < .9:
        return dict(note=f'only {min(fetched):.0%} of the bytes came from the disk: not cold', rounds=rounds), rows, []
    return dict(rounds=rounds, threads=WORKERS, share_fetched_from_disk=round(min(fetched), 2),
                note='pages of the chunks dropped in this system; what lies below it may have a cache of its own'), \
        rows, [ask_most('ScreenDL ÷ bytes alone', np.median(s/b), 1.5)]


# 4 codecs

LEVELS = [*product(('lz4', 'lz4hc', 'zstd'), (1, 5, 9), (False,)), ('zstd', 7, False),  # Blosc's codec, level, differences
          *product(('lz4hc',), (1, 5, 6, 7, 9), (True,)), *product(('zstd',), (1, 5, 7, 9), (True,))]


def measure_codecs(home, rounds, codec_sites, packed_sites, **_):
    "Size, packing and reading of each codec and level; whole packing with those that are offered"
    png, real = PngTree(home/'png', read_metadata(home/'png')), real_source()
    ids = png.site_ids[::max(1, len(png)//codec_sites)][:codec_sites]
    simulated, real_sites = [png[i] for i in ids], [real[i] for i in real.site_ids] if real else []
    kb, real_kb = png_kb(png, ids), png_kb(real, real.site_ids) if real else None
    rows, times = [], {}
    for name, level, differs in LEVELS:
        cpu = time.thread_time()
        blobs = [compress(s, name, level, differs) for s in simulated]
        cpu = time.thread_time() - cpu
        write_flat(home/f'{name}{level}{differs}', blobs)
        row = dict(codec=name, level=level, differences=differs, pack_ms_per_site_core=round(1000*cpu/len(ids), 1),
                   times_png=round(np.mean([len(b) for b in blobs])/1000/kb, 3))
        if real:
            real_size = np.mean([len(compress(s, name, level, differs)) for s in real_sites])
            row['times_png_real'] = round(real_size/1000/real_kb, 3)
        rows.append(row)
    for _ in range(rounds):
        for key in product(LEVELS, (1, 2)):
            path = home/'{}{}{}'.format(*key[0])
            times.setdefault(key, []).append(read_ms(path, key[1], key[0][2], simulated))
    for row, (level, threads) in product(rows, product(LEVELS, (1, 2))):
        if (row['codec'], row['level'], row['differences']) == level:
            row[f'read_ms_{threads}'] = round(float(np.median(times[level, threads])), 3)
    packing = [packing_row(home, png, codec, packed_sites) for codec in CODECS]
    default = next(r for r in rows if (r['codec'], r['level']) == CODECS['fast'] and r['differences'])
    asked = [ask_least('default codec, sites/s a core', packing[0]['sites_per_s_core'], 10),
             ask_most('default codec × PNG, simulated', default['times_png'], 1.45)]
    if real: asked.append(ask_most('default codec × PNG, real sites', default['times_png_real'], 1.45))
    facts = dict(simulated_sites=len(ids), kB_per_site_png=round(kb, 1), real_sites=len(real_sites),
                 kB_per_site_png_real=real and round(real_kb, 1), rounds=rounds, packing=packing,
                 note='read_ms: ms a site with 1 and 2 threads, warm; packing by codec alone is CPU time of one core')
    return facts, rows, asked


def compress(site, name, level, differs):
    return blosc.compress(_differences(site) if differs else site, name.encode(), level, blosc.NOSHUFFLE)


def real_source():
    "The complete real sites of this machine, if there are any"
    root = real_data()
    if root is None or not (root/'images').is_dir(): return None
    table, _ = only_present(read_metadata(root), PngTree(root, read_metadata(root)))
    return PngTree(root, table)


def read_ms(path, threads, differs, like):
    "ms a site to read and decode all blobs of a flat file, over and over for a tenth of a second"
    blobs, out = Flat(path, threads, differs), np.empty((len(like), *like[0].shape), np.uint8)
    rows = list(range(len(like)))
    blobs.batch(rows, out)
    start, passes = time.perf_counter(), 0
    while time.perf_counter() < start + .1: blobs.batch(rows, out); passes += 1
    ms = 1000*(time.perf_counter() - start)/passes/len(rows)
    blobs.close()
    if not np.array_equal(out[-1], like[-1]): raise AssertionError(f'{path} decodes to other pixels')
    return ms


def packing_row(home, png, codec, n):
    "Whole packing of n sites: read, measured, compressed, written"
    table = read_metadata(home/'png').iloc[:n]
    start, cpu = time.perf_counter(), time.process_time()
    pack_screen(Screen(table, png), home/f'again_{codec}.zarr', codec=codec, progress=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return dict(codec=codec, blosc=CODECS[codec], sites=len(table), sites_per_s=round(len(table)/wall, 1),
                sites_per_s_core=round(len(table)/wall/cores(), 1), sites_per_cpu_s=round(len(table)/cpu, 1))


# 5 memory

def memory(store, batches):
    "Memory of a process that does nothing but read batches, MB"
    table, source = read_metadata(store), PackedScreen(store)
    dl, found = screen_batches(table, source, shuffle=True, drop_last=True), {}
    for n, batch in enumerate(chain.from_iterable(repeat(dl)), 1):
        if n in (100, batches): found[n] = resident()
        if n == batches: return found


def resident():
    "Memory now, and the most so far, MB"
    lines = dict(o.split(':', 1) for o in Path('/proc/self/status').read_text().splitlines())
    return {k: round(int(lines[v].split()[0])/1024, 1) for k, v in (('now', 'VmRSS'), ('peak', 'VmHWM'))}


def measure_memory(store, batches, **_):
    if not Path('/proc/self/status').exists(): return dict(note='this system does not tell: not measured'), [], []
    found = alone(memory, store, batches)
    rows = [dict(batches=n, rss_MB=v['now'], peak_MB=v['peak']) for n, v in found.items()]
    growth = rows[-1]['peak_MB'] - rows[0]['rss_MB']
    asked = [ask_most('growth of the peak, MB', growth, 200)]
    return dict(batch=BATCH, size=128, sites=len(read_metadata(store))), rows, asked


def alone(func, *args):
    "What a function gives in a fresh process"
    with process() as p: return p.submit(func, *args).result()


def process(): return ProcessPoolExecutor(1, get_context('spawn'), initializer=forking)


def forking():
    "Start worker processes as a script would, not as this fresh process was started"
    set_start_method('fork' if sys.platform == 'linux' else None, force=True)


# 6 waiting for data

class EpochTime(Callback):
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.learn.epoch_seconds = time.perf_counter() - self.start


def waiting(store):
    "An epoch of the demo model: how long it took, and how long it waited for batches"
    source, waits = PackedScreen(store), []
    dls = screen_dls(Screen(source.table, source), valid='none', bs=32)
    learn, create = screen_learner(dls, pretrained=None, cbs=EpochTime()), dls.train.create_batches
    def timed(samples):
        batches, done = create(samples), object()
        while True:
            start = time.perf_counter()
            batch = next(batches, done)
            waits.append(time.perf_counter() - start)
            if batch is done: return
            yield batch
            del batch
    dls.train.create_batches = timed
    stage = replace(get_recipe('demo').stages[-1], epochs=1, loss='adacos')
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(Recipe('demo', [stage]))
    return dict(steps=len(waits) - 1, epoch_s=learn.epoch_seconds, first_s=waits[0], wait_s=sum(waits))


def measure_waiting(store, **_):
    w = alone(waiting, store)
    share = 100*w['wait_s']/w['epoch_s']
    row = dict(steps=w['steps'], bs=32, size=128, device='cuda' if torch.cuda.is_available() else 'cpu',
               epoch_s=round(w['epoch_s'], 2), wait_ms=round(1000*w['wait_s'], 1),
               of_that_first_batch_ms=round(1000*w['first_s'], 1), percent_waiting=round(share, 2))
    return dict(recipe='demo', arch=get_recipe('demo').arch), [row], [ask_most('waiting, % of the epoch', share, 5)]


# all of it

PARTS = dict(feed=measure_feed, decoders=measure_decoders, cold=measure_cold, codecs=measure_codecs, memory=measure_memory,
             waiting=measure_waiting)
SMALL = ('memory', 'waiting')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='a smoke test: few sites and rounds, nothing stored')
    p.add_argument('--part', choices=list(PARTS), help='measure one part only')
    args = p.parse_args()
    size, parts = QUICK if args.quick else FULL, [args.part] if args.part else list(PARTS)
    figures = {}
    with tempfile.TemporaryDirectory() as d:
        big, small = Path(d)/'big', Path(d)/'small'
        if not set(parts) <= set(SMALL): big.mkdir(); screen_files(big, size['sirnas'], size['controls'])
        if set(parts) & set(SMALL): small.mkdir(); store = small_screen(small, size['small_sirnas'])
        for part in parts:
            load, start = round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None, busy()
            facts, rows, asked = PARTS[part](store if part in SMALL else big, **size)
            figures[part] = dict(load_before=load, cores_used_by_others=others(start), **facts, rows=rows, asked=asked)
            show(part, figures[part])
    if args.quick: print('quick: nothing stored')
    else: store_figures(figures)


def store_figures(figures):
    "Beside the parts that were measured before"
    stored = RESULTS/'feed.json'
    figures = {**(json.loads(stored.read_text()) if stored.exists() else {}), **figures}
    save('feed', **{k: figures[k] for k in PARTS if k in figures})


def busy():
    "Now; seconds that this process and its children, and all processes, have computed"
    stat = Path('/proc/stat')
    used = [int(o) for o in stat.read_text().split('\n')[0].split()[1:]] if stat.exists() else None
    return time.perf_counter(), sum(os.times()[:4]), used and (sum(used[:3]) + sum(used[5:8]))/os.sysconf('SC_CLK_TCK')


def others(start):
    "Cores that other processes kept busy since then, on average: above 0, the machine was shared"
    seconds, own, used = (b - a if a is not None else None for a, b in zip(start, busy()))
    return None if used is None else round(max(used - own, 0)/seconds, 2)


def show(part, figures):
    print(f'\n== {part}')
    for k, v in figures.items():
        if k in ('rows', 'asked', 'packing'):
            if v: print('\n' + pd.DataFrame(v).to_string(index=False, na_rep='') + '\n')
        else: print(f'{k}: {v}')


if __name__ == '__main__': main()
