"Packed screens: every pixel, every interruption, every damage."
import errno, faulthandler, json, os, pickle, shutil, signal, struct, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest, zarr
from hypothesis import given, settings, strategies as st
from helpers import python, refused
from rcic_fastai.screen import pack
from rcic_fastai.screen.images import PngTree, only_present, screen_stats
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import CHANNELS, SITE_COLUMNS, read_metadata, real_data
from rcic_fastai.screen.pack import *
from rcic_fastai.screen.screen import Screen

real = pytest.mark.real('images')


def site_table(wells=('B02', 'C03', 'D04'), sites=(1, 2), experiment='HUVEC-01', plate=1):
    rows = [(f'{experiment}_{plate}_{w}_{s}', f'{experiment}_{plate}_{w}', experiment.split('-')[0], 'train', experiment, plate,
             w, s, 'treatment', f'sirna_{n}', n, 0) for n, w in enumerate(wells) for s in sites]
    t = pd.DataFrame(rows, columns=SITE_COLUMNS)
    return t.astype(dict(sirna_id='Int64', plate_group='Int64', sirna=object))


def picture(shape, dtype, seed):
    "Channels in turn: noise, few dim pixels, a ramp, one value"
    rng, full = np.random.default_rng(seed), np.iinfo(dtype).max
    kinds = [lambda: rng.integers(0, full, shape[1:], dtype, endpoint=True),
             lambda: (rng.random(shape[1:])**8*full).astype(dtype),
             lambda: np.linspace(0, full, shape[1]*shape[2]).reshape(shape[1:]).astype(dtype),
             lambda: np.full(shape[1:], rng.integers(0, full, endpoint=True), dtype)]
    return np.stack([kinds[(c + seed) % 4]() for c in range(shape[0])])


def write_site(root, row, x):
    folder = Path(root)/'images'/row.dataset/row.experiment/f'Plate{row.plate}'
    folder.mkdir(parents=True, exist_ok=True)
    for c, im in enumerate(x, 1): cv2.imwrite(str(folder/f'{row.well}_s{row.site}_w{c}.png'), im)


def make(root, table, shape=(6, 16, 16), dtype=np.uint8):
    "Write the PNGs of a table; → (source, {site_id: pixels})"
    pixels = {r.site_id: picture(shape, dtype, n) for n, r in enumerate(table.itertuples())}
    for r in table.itertuples(): write_site(root, r, pixels[r.site_id])
    return PngTree(root, table, CHANNELS if shape[0] == 6 else [f'w{c+1}' for c in range(shape[0])]), pixels


class Counted(PngTree):
    "Notes every site that is read, also from another process"
    pause = 0
    def _read(self, site_id, out):
        time.sleep(self.pause)
        with open(f'{self.root}.reads', 'ab') as f: f.write(b'x')
        super()._read(site_id, out)
    def reads(self):
        "How many since the last time"
        path = Path(f'{self.root}.reads')
        n = path.stat().st_size if path.exists() else 0
        path.unlink(missing_ok=True)
        return n


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}
def put(source, table, dest, **kwargs): return pack_screen(Screen(table, source), dest, **{'progress': False, **kwargs})
def chunk(store, row): return Path(store, 'images', 'c', str(row), '0', '0', '0')
def journalled(part):
    "Whole lines of the journal, 0 when there is none (any more)"
    try: return len([l for l in (part/'journal').read_bytes().split(b'\n') if l.endswith(b'}')])
    except FileNotFoundError: return 0
def png(source, table, row, channel=1): return Path(source._paths(table.site_id[row])[channel-1])


def flipped(data, at, bit=0):
    data = bytearray(data); data[at] ^= 1 << bit
    return bytes(data)


def alone(func, *args, timeout=120, before=()):
    "Run a function of this file in a Python of its own; → what it returns, through JSON"
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, test_pack; '
            f'print(json.dumps(test_pack.{func.__name__}(*{[str(a) if isinstance(a, Path) else a for a in args]!r})))')
    if before: got = subprocess.run([*before, sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=timeout)
    else: got = python(code, timeout=timeout)
    assert got.returncode == 0, f'exit {got.returncode}\n{got.stdout[-2000:]}\n{got.stderr[-4000:]}'
    return json.loads(got.stdout.splitlines()[-1])


def in_child(do, when=None, sig=signal.SIGKILL):
    "Run in a forked process, perhaps killed after so many seconds, or once `when()` is true; → exit code, negative for a signal"
    pid = os.fork()
    if not pid:
        code = 2
        signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell ignores it for what runs in the background
        try: do(); code = 0
        except KeyboardInterrupt: code = 4
        except ScreenError as e: print(e, file=sys.stderr); code = 3
        except BaseException as e: print(repr(e), file=sys.stderr)
        finally: sys.stderr.flush(); os._exit(code)
    end = time.time() + 30
    if callable(when):
        while not when() and time.time() < end: time.sleep(.002)
    elif when is not None: time.sleep(when)
    if when is not None: os.kill(pid, sig)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def screen(tmp_path):
    "(table, source, pixels) of six sites"
    table = site_table()
    source, pixels = make(tmp_path/'screen', table)
    return table, Counted(source.root, table), pixels


@pytest.fixture
def store(tmp_path, screen): return put(screen[1], screen[0], tmp_path/'screen.zarr')


def half(source, table, dest, n=3, **kwargs):
    "A pack that stops after `n` sites"
    class Stops(type(source)):
        left = n
        def _read(self, site_id, out):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            super()._read(site_id, out)
    with pytest.raises(KeyboardInterrupt): put(Stops(source.root, table, source.channels), table, dest, workers=1, **kwargs)
    part = dest.with_name(dest.name + '.part')
    assert part.is_dir() and not dest.exists() and 0 < journalled(part) <= n
    if isinstance(source, Counted): source.reads()
    return part


# ---- round trip

SIZES = {1: (1, 1), 5: (7, 13), 6: (33, 64), 16: (20, 9)}

@pytest.mark.parametrize('codec', CODECS)
@pytest.mark.parametrize('channels', SIZES)
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_round_trip(tmp_path, dtype, channels, codec):
    "The same pixels by our reader and by plain zarr; the table; wells of one site and of two"
    table = pd.concat([site_table(), site_table(('E05',), sites=(2,))], ignore_index=True)
    source, pixels = make(tmp_path/'screen', table, (channels, *SIZES[channels]), dtype)
    dest = tmp_path/'screen.zarr'
    assert put(source, table, dest, codec=codec) == dest
    packed, whole = PackedScreen(dest), np.stack(list(pixels.values()))
    assert (packed.shape, packed.dtype, packed.channels, len(packed)) == (source.shape, dtype, source.channels, 7)
    for i, x in pixels.items(): assert packed[i].dtype == dtype and (packed[i] == x).all()
    for threads in (1, 3):
        buffer = np.zeros_like(whole)
        packed.read_into(table.site_id, buffer, threads)
        assert (buffer == whole).all()
    wide = np.zeros((*whole.shape[1:3], 2*whole.shape[3]), dtype)
    packed._read(table.site_id[2], wide[..., ::2])
    assert (wide[..., ::2] == whole[2]).all() and not wide[..., 1::2].any()
    assert packed.sites_of('HUVEC-01_1_E05') == ['HUVEC-01_1_E05_2'] and len(packed.sites_of('HUVEC-01_1_B02')) == 2
    named = table.astype(dict(experiment=object, cell_type=object))          # names are objects in every site table
    pd.testing.assert_frame_equal(packed.table, named)
    pd.testing.assert_frame_equal(read_metadata(dest), named)
    array = zarr.open_group(str(dest), mode='r')['images']
    assert array.dtype == dtype and (array[:] == whole).all()


@pytest.mark.extra('tensorstore')
@pytest.mark.parametrize('dtype,codec', [(np.uint8, 'plain'), (np.uint16, 'plain'), (np.uint16, 'fast'), (np.uint16, 'small')])
def test_tensorstore_reads_a_store(tmp_path, dtype, codec):
    "Those that are written with zarr's own codecs alone"
    import tensorstore as ts
    table = site_table()
    source, pixels = make(tmp_path/'screen', table, (6, *SIZES[6]), dtype)
    path = put(source, table, tmp_path/'screen.zarr', codec=codec)/'images'
    opened = ts.open(dict(driver='zarr3', kvstore=dict(driver='file', path=str(path)))).result()
    assert (opened.read().result() == np.stack(list(pixels.values()))).all()


def test_zarr_metadata(store):
    meta = json.loads((store/'images/zarr.json').read_text())
    assert [c['name'] for c in meta['codecs']] == ['transpose', 'numcodecs.delta', 'bytes', 'numcodecs.shuffle', 'blosc', 'crc32c']
    assert meta['dimension_names'] == ['site', 'channel', 'y', 'x']
    group = zarr.open_group(str(store), mode='r')
    assert group.attrs['rcic_fastai'] == dict(format=STORE_FORMAT, channels=list(CHANNELS), codec='fast')
    assert group['images'].chunks == (1, 6, 16, 16)
    chunk(store, 1).write_bytes(flipped(chunk(store, 1).read_bytes(), 40))
    with pytest.raises(Exception): group['images'][1]                 # plain zarr checks the checksum too
    group['images'][0]


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('codec', CODECS)
def test_chunks_are_what_zarr_writes(tmp_path, codec, dtype):
    for n, shape in enumerate([(6, 40, 30), (5, 7, 13), (2, 33, 1), (3, 1, 2), (1, 20, 30), (1, 1, 9), (1, 1, 1)]):
        x, path = picture(shape, dtype, 1), tmp_path/f'{n}.zarr'
        a = zarr.create_array(str(path), shape=(1, *shape), dtype=dtype, chunks=(1, *shape), **pack._codecs(codec, shape, np.dtype(dtype)))
        a[0] = x
        ours, file = pack._compress(x, codec)[0], path/'c/0/0/0/0'
        if min(shape[:2]) > 1: assert file.read_bytes() == ours     # numcodecs' delta takes other arrays in the order of memory, but reads them right
        file.write_bytes(ours)
        assert (a[0] == x).all()


@given(rows=st.integers(1, 700), columns=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_differences_are_undone(rows, columns, seed):
    "Against a plain sum over the pixels in the order of the codec: column after column"
    x = np.random.default_rng(seed).integers(0, 256, (1, rows, columns), np.uint8)
    d = pack._differences(x)
    assert (np.cumsum(d.T.ravel(), dtype=np.uint8) == x[0].T.ravel()).all()
    pack._undo_differences(d)
    assert (d == x[0]).all()


def as_before(store, codec='fast'):
    "Turn a store of the codec 'plain' into one of layout version 1, in which the codec 'fast' had no differences"
    for name, where in (('zarr.json', ('attributes', 'rcic_fastai')), ('pack.json', ())):
        facts = whole = json.loads((store/name).read_text())
        for k in where: facts = facts[k]
        facts.update(format=1, codec=codec)
        (store/name).write_text(json.dumps(whole))
    (store/'sums.json').write_text(json.dumps(pack._sums(store)))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_a_store_of_version_1_is_still_read(tmp_path, dtype):
    table = site_table()
    source, pixels = make(tmp_path/'screen', table, dtype=dtype)
    store = put(source, table, tmp_path/'a.zarr', codec='plain')
    as_before(store)
    packed = PackedScreen(store)
    for i, x in pixels.items(): assert (packed[i] == x).all()
    assert verify_store(store, source, progress=False) == len(table)


@pytest.mark.parametrize('at,key,value', [(0, 'order', [0, 1, 2, 3]), (0, 'order', None), (1, 'dtype', '|i1'), (1, 'astype', '|u2'), (3, 'elementsize', 16),
                                          (3, 'elementsize', None)])
def test_other_differences_are_not_read_as_ours(store, at, key, value):
    meta = json.loads((store/'images/zarr.json').read_text())
    meta['codecs'][at]['configuration'][key] = value
    (store/'images/zarr.json').write_text(json.dumps(meta))
    (store/'sums.json').write_text(json.dumps(pack._sums(store)))
    refused(lambda: PackedScreen(store), 'images/zarr.json', 'pack the screen again')


def test_packing_and_reading_need_no_warning(tmp_path, recwarn):
    "zarr warns of codecs that are not in its specification; whoever packs did not choose them"
    table = site_table()
    source, _ = make(tmp_path/'screen', table)
    PackedScreen(put(source, table, tmp_path/'a.zarr'))[table.site_id[0]]
    assert [str(w.message) for w in recwarn] == []


def test_any_number_of_workers_and_a_bar_write_the_same(tmp_path, screen, store):
    table, source, _ = screen
    for n, kwargs in enumerate([dict(workers=1), dict(workers=7), dict(progress=True)]):
        assert files(put(source, table, tmp_path/f'{n}.zarr', **kwargs)) == files(store)


def test_threads_are_a_few_sites_ahead_of_the_journal(tmp_path, monkeypatch):
    table = site_table(tuple(f'B{n:02d}' for n in range(2, 22)))
    root, seen, most, add = make(tmp_path/'screen', table)[0].root, [], [0], pack._Journal.add
    class Noted(PngTree):
        def _read(self, site_id, out): seen.append(site_id); super()._read(site_id, out)
    def slow(self, row, written=iter(range(99))):
        time.sleep(.005)
        most.append(len(seen) - next(written)); add(self, row)
    monkeypatch.setattr(pack._Journal, 'add', slow)
    put(Noted(root, table), table, tmp_path/'a.zarr', workers=2)
    assert len(seen) == 40 and max(most) <= 10


def test_order_and_index_are_the_tables(tmp_path, screen):
    table, source, pixels = screen
    mixed = table.iloc[[4, 1, 3]]
    packed = PackedScreen(put(source, mixed, tmp_path/'a.zarr'))
    assert packed.site_ids == mixed.site_id.tolist() and packed.table.index.tolist() == [0, 1, 2]
    for i in mixed.site_id: assert (packed[i] == pixels[i]).all()


@real
def test_real_sites(tmp_path):
    table = read_metadata(real_data())
    refused(lambda: put(PngTree(real_data(), table), table, tmp_path/'all.zarr'), f'{len(table)-18} of {len(table)} sites', 'only_present')
    some = table[(table.well == 'B02') & table.experiment.isin(['HEPG2-01', 'HUVEC-01', 'RPE-01', 'U2OS-01', 'HEPG2-08'])]
    source = PngTree(real_data(), some)
    keep, out = only_present(some, source)
    assert len(keep) == 18 and out >= 18 and set(keep.site) == {1}
    for codec, rows in (('fast', keep), ('small', keep[:3])):
        packed = PackedScreen(put(source, rows, tmp_path/f'{codec}.zarr', codec=codec))
        assert packed.shape == (6, 512, 512) and verify_store(packed.root, PngTree(real_data(), rows), progress=False) == len(rows)
        pd.testing.assert_frame_equal(packed.table, rows, check_dtype=False)
        array = zarr.open_group(str(packed.root), mode='r')['images']
        for n, i in enumerate(rows.site_id[:3]): assert (array[n] == source[i]).all()
        png = PngTree(real_data(), rows).compute_stats(progress=False)
        assert (packed.stats[png.columns].values == png.values).all() and packed.stats.index.tolist() == png.index.tolist()


# ---- statistics

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 13), (33, 65), (100, 100)])
def test_statistics(tmp_path, dtype, size):
    "Means and deviations as `compute_stats` has them, to the last bit; percentiles as numpy has them"
    table = site_table()
    source, pixels = make(tmp_path/'screen', table, (6, *size), dtype)
    stats, png = PackedScreen(put(source, table, tmp_path/'a.zarr')).stats, source.compute_stats(progress=False)
    pd.testing.assert_frame_equal(stats[list(png.columns)], png, check_exact=True)
    assert list(stats) == measure_columns(CHANNELS) and stats.index.name == 'site_id'
    for i, x in pixels.items():
        want = np.percentile(x, PERCENTILES, axis=(1, 2), method='inverted_cdf')/np.iinfo(dtype).max
        assert (stats.loc[i].values[12:].reshape(3, 6) == want).all()


def test_screen_stats_read_no_pixel(screen, store):
    table, source, _ = screen
    packed = PackedScreen(store)
    packed._read = None
    pd.testing.assert_frame_equal(screen_stats(packed, table, 'plate'), screen_stats(source, table, 'plate'), check_exact=True)


# ---- interruptions

WATCHED = ('open', 'os.rename', 'os.remove')

def watch(part, at=None):
    "Every change of a file from here on; the process dies just before number `at`"
    seen = []
    def hook(event, args):
        if event not in WATCHED or not str(args[0]).startswith(part): return
        if event == 'open' and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR): return
        seen.append((event, str(args[0])[len(part):]))
        if len(seen) == at: os._exit(9)
    sys.addaudithook(hook)
    return seen


def kill_everywhere(folder):
    "Pack three sites again and again, dying once before every change of a file; → a record of each"
    folder, table = Path(folder), site_table(('B02',), sites=(1, 2, 3))
    source = Counted(folder/'screen', table)
    def do(dest, at=None, log=None):
        seen = watch(f'{dest}.part', at)
        put(source, table, dest, workers=1)
        if log: log.write_text(json.dumps(seen))
    assert in_child(lambda: do(folder/'whole.zarr', log=folder/'log')) == 0
    whole, events, rows = files(folder/'whole.zarr'), json.loads((folder/'log').read_text()), []
    last_chunk = max(n for n, (e, p) in enumerate(events) if e == 'os.rename' and p.endswith('.tmp'))
    for n in range(1, len(events) + 1):
        dest = folder/f'{n}.zarr'
        died, there = in_child(lambda: do(dest, n)), dest.exists()
        source.reads()
        again, got = in_child(lambda: do(dest)), files(dest) if dest.exists() else {}
        rows.append(dict(event=events[n-1], died=died, there=there, again=again, reads=source.reads(), finishing=n-1 > last_chunk,
                         extra=sorted(set(got) - set(whole)), wrong=sorted(f for f in whole if got.get(f) != whole[f])))
        shutil.rmtree(dest, ignore_errors=True)
    return rows


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('killed')
    make(folder/'screen', site_table(('B02',), sites=(1, 2, 3)))
    return alone(kill_everywhere, folder)


def test_killed_before_any_change_of_a_file(killed):
    "There is no DEST, and the next call ends with the same bytes"
    assert len(killed) > 20 and {r['event'][0] for r in killed} == set(WATCHED)
    assert [r for r in killed if r['died'] != 9 or r['there'] or r['again'] or r['wrong']] == []


def test_killed_leaves_no_rubbish_in_the_store(killed): assert [r for r in killed if r['extra']] == []


def test_killed_at_the_end_packs_nothing_again(killed):
    ends = [r for r in killed if r['finishing']]
    assert len(ends) >= 4 and [r for r in ends if r['reads']] == []


def kill_at_random(folder, rounds=10):
    folder, table = Path(folder), site_table(tuple(f'B{n:02d}' for n in range(2, 9)))
    source, rng = Counted(folder/'screen', table), np.random.default_rng(0)
    source.pause = .004
    start = time.time()
    assert in_child(lambda: put(source, table, folder/'whole.zarr', workers=2)) == 0
    whole, lasts, rows = files(folder/'whole.zarr'), time.time() - start, []
    for n in range(rounds):
        dest = folder/f'{n}.zarr'; part = dest.with_name(dest.name + '.part')
        when = rng.uniform(0, lasts) if n % 2 else lambda: journalled(part) > n or dest.exists()
        died, there, done = in_child(lambda: put(source, table, dest, workers=2), when), dest.exists(), journalled(part)
        source.reads()
        again = 0 if there else in_child(lambda: put(source, table, dest, workers=2))
        rows.append(dict(died=died, there=there, done=done, again=again, reads=source.reads(), same=files(dest) == whole))
    return rows


def test_sigkill_at_random_moments(tmp_path):
    table = site_table(tuple(f'B{n:02d}' for n in range(2, 9)))
    make(tmp_path/'screen', table)
    rows = alone(kill_at_random, tmp_path)
    assert any(0 < r['done'] < 14 for r in rows)                      # some were really in the middle
    for r in rows:
        assert r['died'] in (0, -signal.SIGKILL) and r['again'] == 0 and r['same'], r
        assert r['there'] or r['reads'] == 14 - r['done'], r          # it may have been faster than the signal


def interrupt(folder):
    "Ctrl-C in the middle"
    folder, table = Path(folder), site_table()
    source = Counted(folder/'screen', table)
    source.pause = .5                                                 # the signal comes in time on a busy machine, too
    part = folder/'a.zarr.part'
    code = in_child(lambda: put(source, table, folder/'a.zarr', workers=1), lambda: journalled(part) > 1, signal.SIGINT)
    there, done = (folder/'a.zarr').exists(), journalled(part)
    source.pause, _ = 0, source.reads()
    put(source, table, folder/'a.zarr'); put(source, table, folder/'b.zarr')
    return [code, there, done, source.reads() - 6, files(folder/'a.zarr') == files(folder/'b.zarr')]


def test_keyboard_interrupt(tmp_path):
    make(tmp_path/'screen', site_table())
    code, there, done, reads, same = alone(interrupt, tmp_path)
    assert (code, there, same) == (4, False, True) and done + reads == 6 and 0 < done < 6


@pytest.mark.parametrize('progress', [False, True])
def test_run_again_while_the_interrupt_is_still_on_the_screen(tmp_path, screen, store, monkeypatch, progress):
    "A notebook keeps the traceback, and with it everything that it refers to"
    table, source, _ = screen
    source.pause, add, n = .05, pack._Journal.add, iter(range(99))
    def interrupted(self, row):
        if next(n) == 1: raise KeyboardInterrupt
        add(self, row)
    with monkeypatch.context() as m:
        m.setattr(pack._Journal, 'add', interrupted)
        with pytest.raises(KeyboardInterrupt) as kept: put(source, table, tmp_path/'a.zarr', workers=3, progress=progress)
    source.reads(); time.sleep(.2)
    assert source.reads() == 0                                        # no thread reads on
    assert files(put(source, table, tmp_path/'a.zarr', workers=3)) == files(store)
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize('damage', ['cut', 'cut to one byte', 'half a line more', 'zeros', 'garbage', 'a number', 'gone'])
def test_damaged_journal(tmp_path, screen, store, damage):
    table, source, _ = screen
    journal = half(source, table, tmp_path/'a.zarr')/'journal'
    data = journal.read_bytes()
    last = data[:-1].rindex(b'\n') + 1 if b'\n' in data[:-1] else 0
    journal.write_bytes({'cut': data[:-30], 'cut to one byte': data[:last+1], 'half a line more': data + data[:40], 'gone': b'',
                         'zeros': data + bytes(64), 'garbage': data + b'\xff\xfe{"row": \n', 'a number': data + b'17\n'}[damage])
    assert files(put(source, table, tmp_path/'a.zarr')) == files(store)
    assert source.reads() <= {'cut': 4, 'cut to one byte': 4, 'gone': 6}.get(damage, 3) + 1


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'gone', 'another'])
def test_damaged_chunk_of_an_unfinished_store(tmp_path, screen, store, damage):
    table, source, _ = screen
    part = half(source, table, tmp_path/'a.zarr')
    done, path = journalled(part), chunk(part, 0)
    data = path.read_bytes()
    if damage == 'gone': path.unlink()
    else: path.write_bytes({'flip': flipped(data, 50), 'cut': data[:-1], 'empty': b'', 'another': chunk(part, 1).read_bytes()}[damage])
    assert files(put(source, table, tmp_path/'a.zarr')) == files(store)
    assert source.reads() == 6 - done + 1


@pytest.mark.parametrize('how', ['pixels', 'time', 'channels swapped'])
def test_source_changed_between(tmp_path, screen, how):
    table, source, pixels = screen
    part = half(source, table, tmp_path/'a.zarr')
    done, a, b = journalled(part), png(source, table, 0, 1), png(source, table, 0, 2)
    if how == 'pixels': cv2.imwrite(str(a), pixels[table.site_id[0]][0] ^ 1)
    elif how == 'time': os.utime(a)
    else: a.rename(a.with_suffix('.x')); b.rename(a); a.with_suffix('.x').rename(b)
    packed = PackedScreen(put(source, table, tmp_path/'a.zarr'))
    assert source.reads() == 6 - done + 1
    for i in table.site_id: assert (packed[i] == source[i]).all()
    assert verify_store(packed.root, source, progress=False) == 6


def test_begun_otherwise(tmp_path, screen):
    "Another table, codec, channels or size is refused; `force` begins anew"
    table, source, _ = screen
    part = half(source, table, tmp_path/'a.zarr')
    before = files(part)
    five = PngTree(source.root, table, CHANNELS[:5])
    renamed = PngTree(source.root, table, ['dna', *CHANNELS[1:]])
    for other, rows, kwargs in [(source, table[:5], {}), (source, table[::-1], {}), (source, table, dict(codec='small')), (five, table, {}),
                                (renamed, table, {}), (source, table.assign(sirna='x'), {}), (source, table.assign(more=1), {}),
                                (source, table.drop(columns='plate_group'), {})]:
        refused(lambda: put(other, rows, tmp_path/'a.zarr', **kwargs), str(part), 'was begun with different', 'force')
        assert files(part) == before
    packed = PackedScreen(put(five, table, tmp_path/'a.zarr', codec='small', force=True))
    assert packed.channels == CHANNELS[:5] and not part.exists() and verify_store(packed.root, five, progress=False) == 6


def test_begun_with_this_table(tmp_path, screen):
    "Whatever its further columns hold, a table is still the same one after an interruption"
    table, source, _ = screen
    table = table.assign(dose=pd.Series([1, None, 2, 3, None, 4], dtype=object), flag=pd.Series([True, None]*3, dtype=object),
                         conc=[.1, None, 1/3, 1e-9, 2, 3], kind=pd.Categorical(list('ababab')), day=pd.Timestamp('2019-06-27'),
                         n=pd.array([1, None, 3, 4, 5, 6], 'Int64'), sirna=None, note=['', 'a', None, 'b', 'c', ' '])
    half(source, table, tmp_path/'a.zarr')
    packed = PackedScreen(put(source, table, tmp_path/'a.zarr'))
    assert packed.table.site_id.tolist() == table.site_id.tolist()
    again = half(source, packed.table, tmp_path/'b.zarr')
    put(source, packed.table, tmp_path/'b.zarr')
    assert not again.exists()


@pytest.mark.parametrize('name,data', [('pack.json', b''), ('pack.json', b'[]'), ('sites.parquet', b'PAR1'), ('sites.parquet', None)])
def test_damaged_beginning(tmp_path, screen, store, name, data):
    "Refused in a sentence that tells of `force`, or begun anew"
    table, source, _ = screen
    part = half(source, table, tmp_path/'a.zarr')
    for f in [f for f in part.iterdir() if f.name.endswith(name) and f.name != 'zarr.json']: f.write_bytes(data) if data is not None else f.unlink()
    try: put(source, table, tmp_path/'a.zarr')
    except ScreenError as e:
        assert 'force' in str(e) and '\n' not in str(e), str(e)
        put(source, table, tmp_path/'a.zarr', force=True)
    assert files(tmp_path/'a.zarr') == files(store)


def test_everything_was_packed_but_not_finished(tmp_path, screen, store, monkeypatch):
    table, source, _ = screen
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(pack, '_finish', full)
        refused(lambda: put(source, table, tmp_path/'a.zarr'), 'the 6 sites packed so far are kept')
    source.reads()
    assert files(put(source, table, tmp_path/'a.zarr', progress=True)) == files(store) and source.reads() == 0


# ---- a full disk

@pytest.mark.parametrize('where', ['open', 'replace', 'journal'])
def test_full_disk(tmp_path, screen, store, where, monkeypatch):
    table, source, _ = screen
    part, left = tmp_path/'a.zarr.part', iter(range(99))
    def full(): raise OSError(errno.ENOSPC, 'No space left on device')
    def of_open(name, *args, real=open, **kwargs): return full() if str(name).endswith('0.tmp') and next(left) > 2 else real(name, *args, **kwargs)
    def of_replace(a, b, real=os.replace): return full() if str(a).endswith('0.tmp') and next(left) > 2 else real(a, b)
    def of_add(self, row, real=pack._Journal.add): return full() if next(left) > 2 else real(self, row)
    with monkeypatch.context() as m:
        if where == 'open': m.setattr('builtins.open', of_open)
        elif where == 'replace': m.setattr(os, 'replace', of_replace)
        else: m.setattr(pack._Journal, 'add', of_add)
        text = refused(lambda: put(source, table, tmp_path/'a.zarr', workers=1), str(part), 'No space left on device', 'free some space')
    done = journalled(part)
    assert f'the {done} sites packed so far are kept' in text and done >= 2 and not (tmp_path/'a.zarr').exists()
    source.reads()
    assert files(put(source, table, tmp_path/'a.zarr')) == files(store) and source.reads() == 6 - done


def fill_disk(folder, mount):
    "On a disk too small for the store, then enlarged, as often as it takes"
    table = site_table(tuple(f'B{n:02d}' for n in range(2, 9)))
    source, texts = Counted(Path(folder)/'screen', table), []
    for kb in range(40, 2000, 24):
        subprocess.run(['mount', '-o', f'remount,size={kb}k', mount], check=True)
        try: dest = put(source, table, Path(mount)/'a.zarr', workers=2); break
        except ScreenError as e: texts.append(str(e))
    same = files(dest) == files(put(source, table, Path(folder)/'whole.zarr'))
    return [texts, source.reads() - 14, same]


def test_really_full_disk(tmp_path):
    table = site_table(tuple(f'B{n:02d}' for n in range(2, 9)))
    make(tmp_path/'screen', table)
    mount = tmp_path/'disk'; mount.mkdir()
    own = ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o size=40k none {mount} && exec "$@"', 'sh']
    try: able = os.geteuid() == 0 and subprocess.run([*own, 'mount', '-o', 'remount,size=80k', str(mount)], capture_output=True).returncode == 0
    except OSError: able = False
    if not able: pytest.skip('a small disk cannot be mounted here')
    texts, reads, same = alone(fill_disk, tmp_path, mount, before=own)
    assert same and len(texts) > 3 and all('No space left' in t and '\n' not in t for t in texts), texts
    kept = [int(t.split('the ')[-1].split()[0]) for t in texts]
    assert kept == sorted(kept) and kept[-1] > 0, kept               # nothing packed is lost
    assert reads <= 14 + 5*len(texts)                                # nor packed again, but for what was under way


# ---- refusals

def test_missing_files_are_counted_and_some_named(tmp_path):
    table = site_table(tuple(f'B{n:02d}' for n in range(2, 10)))
    source, _ = make(tmp_path/'screen', table)
    for n in range(12): png(source, table, n, 1 + n % 6).unlink()
    text = refused(lambda: put(source, table, tmp_path/'a.zarr'), '12 of 16 sites', 'and 8 more', 'only_present=True')
    assert text.count('.png') == 4 and not (tmp_path/'a.zarr.part').exists()
    keep, _ = only_present(table, source)
    assert len(PackedScreen(put(source, keep, tmp_path/'a.zarr'))) == 4


def test_bad_calls(tmp_path, screen, store):
    table, source, _ = screen
    dest, strange = tmp_path/'a.zarr', table.assign(site_id=table.site_id + 'x')
    refused(lambda: put(source, pd.concat([table, table[:2]]), dest), '2 sites more than once', table.site_id[0])
    refused(lambda: put(source, table[:0], dest), 'no rows')
    refused(lambda: put(source, table.drop(columns='well_type'), dest), 'well_type')
    refused(lambda: put(source, strange, dest), strange.site_id[0], 'not in the table')
    refused(lambda: put(source, table, dest, codec='zip'), "'zip'", 'fast, small, plain')
    refused(lambda: put(source, table, store), str(store), 'exists already')
    (tmp_path/'a file').write_text('x')
    refused(lambda: put(source, table, tmp_path/'a file'), 'exists already')
    refused(lambda: put(source, table, tmp_path/'a file'/'a.zarr'), 'a.zarr.part cannot be written')
    assert not dest.exists() and not (tmp_path/'a.zarr.part').exists()


def test_destination_without_a_name(screen, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for dest in ('.', '/', '..'): refused(lambda: put(screen[1], screen[0], dest), 'exists already')


def test_a_table_that_parquet_cannot_hold(tmp_path, screen):
    table, source, _ = screen
    refused(lambda: put(source, table.assign(dose=[1, 'high', 2., None, 3, 4]), tmp_path/'a.zarr'), 'dose')


def test_workers_below_one(tmp_path, screen): refused(lambda: put(screen[1], screen[0], tmp_path/'a.zarr', workers=-1), 'workers')


@pytest.mark.parametrize('what', ['size', 'bits', 'damage', 'color'])
def test_an_odd_file_in_the_middle(tmp_path, screen, what):
    "Named: before anything is written where the header tells; else what is packed is kept; put right, the same call ends well"
    table, source, pixels = screen
    path = png(source, table, 3, 2)
    good = path.read_bytes()
    if what == 'damage': path.write_bytes(flipped(good, len(good)//2))
    else: cv2.imwrite(str(path), {'size': np.zeros((9, 16), np.uint8), 'bits': np.zeros((16, 16), np.uint16), 'color': np.zeros((16, 16, 3), np.uint8)}[what])
    refused(lambda: put(source, table, tmp_path/'a.zarr', workers=1), str(path))
    assert not (tmp_path/'a.zarr').exists() and (journalled(tmp_path/'a.zarr.part') >= 1) == (what == 'damage')
    path.write_bytes(good)
    packed = PackedScreen(put(source, table, tmp_path/'a.zarr'))
    for i in table.site_id: assert (packed[i] == pixels[i]).all()


def test_read_only_folder(tmp_path, screen):
    if os.geteuid() == 0: pytest.skip('root writes everywhere')
    folder = tmp_path/'locked'; folder.mkdir(mode=0o555)
    refused(lambda: put(screen[1], screen[0], folder/'a.zarr'), 'a.zarr.part cannot be written', 'permissions')


# ---- reading

def test_some_rows(tmp_path, screen, store):
    "A part of the table, in another order; sites that are not packed are told"
    table, source, pixels = screen
    some = table.iloc[[5, 0, 2]]
    packed = PackedScreen(store, some)
    assert packed.site_ids == some.site_id.tolist() and len(packed.table) == 6 and len(packed.missing()) == 0
    for i in packed.site_ids: assert (packed[i] == pixels[i]).all()
    refused(lambda: packed[table.site_id[1]], table.site_id[1], 'not in the table')
    assert packed.sites_of('HUVEC-01_1_B02') == ['HUVEC-01_1_B02_1']
    more = pd.concat([table, site_table(('H08',))], ignore_index=True)
    packed = PackedScreen(store, more)
    assert packed.missing().site_id.tolist() == ['HUVEC-01_1_H08_1', 'HUVEC-01_1_H08_2'] and packed.missing().missing[0] == CHANNELS
    refused(lambda: packed['HUVEC-01_1_H08_1'], 'HUVEC-01_1_H08_1', 'not packed')
    refused(lambda: packed.read_into(packed.site_ids, np.empty((8, *packed.shape), np.uint8), 2), 'H08', 'not packed')
    keep, out = only_present(more, packed)
    pd.testing.assert_frame_equal(keep, table); assert out == 2
    with pytest.raises(ScreenError, match='empty'): PackedScreen(store, table[:0])
    assert PackedScreen(str(store))[table.site_id[0]].shape == (6, 16, 16) and str(store) in repr(packed)


def test_pickle_and_threads(screen, store):
    table, _, pixels = screen
    packed = pickle.loads(pickle.dumps(PackedScreen(store)))
    pd.testing.assert_frame_equal(packed.stats, PackedScreen(store).stats)
    with ThreadPoolExecutor(8) as pool:
        for i, x in zip(table.site_id.tolist()*30, pool.map(packed.__getitem__, table.site_id.tolist()*30)): assert (x == pixels[i]).all()


class Sites:
    def __init__(self, source): self.source, self.ids = source, source.site_ids
    def __len__(self): return len(self.ids)
    def __getitem__(self, n): return self.source.read_into([self.ids[n]]*2, np.empty((2, *self.source.shape), self.source.dtype), 2)[1]


def test_used_here_and_then_in_forked_workers(tmp_path):
    from torch.utils.data import DataLoader
    table = site_table()
    source, pixels = make(tmp_path/'screen', table, (6, 256, 256))
    packed = PackedScreen(put(source, table, tmp_path/'a.zarr'))
    packed.read_into(table.site_id, np.empty((6, *packed.shape), np.uint8), 3)
    assert (packed[table.site_id[0]] == pixels[table.site_id[0]]).all()
    for _ in range(2):
        got = list(DataLoader(Sites(packed), batch_size=2, num_workers=2, multiprocessing_context='fork', timeout=30))
        assert (np.concatenate([b.numpy() for b in got]) == np.stack(list(pixels.values()))).all()
        assert (packed[table.site_id[1]] == pixels[table.site_id[1]]).all()


def test_neither_store_nor_finished(tmp_path, screen, store):
    table, source, _ = screen
    assert is_store(store) and not is_store(source.root) and not is_store(tmp_path/'nowhere') and not is_store(store/'zarr.json')
    for path in (source.root, tmp_path/'nowhere', store/'zarr.json', store/'images'):
        refused(lambda: PackedScreen(path), str(path), 'not a packed screen')
    part = half(source, table, tmp_path/'a.zarr')
    for path in (part, tmp_path/'a.zarr'): refused(lambda: PackedScreen(path), 'not finished', 'rcic_pack')


@pytest.mark.parametrize('text,words', [
    ('{"attributes": {"rcic_fastai": {"format": 3, "channels": []}}}', ['version 3', 'versions 1 and 2', 'newer']),
    ('{"attributes": {"rcic_fastai": {"format": [1], "channels": []}}}', ['version [1]', 'newer']),
    ('{"attributes": {"rcic_fastai": {"format": 99}}}', ['version 99', 'newer']),
    ('{"attributes": {"rcic_fastai": {"format": 1, "codec": "fast"}}}', ['zarr.json', 'pack the screen again']),
    ('{"attributes": {"rcic_fastai": {"format": 1, "channels": 6}}}', ['zarr.json', 'pack the screen again']),
    ('{"attributes": {"rcic_fastai": [1]}}', ['zarr.json', 'pack the screen again']),
    ('{"attributes": {}}', ['zarr.json', 'pack the screen again']), ('[]', ['zarr.json']), ('', ['zarr.json'])])
def test_other_versions_and_other_groups(store, text, words):
    (store/'zarr.json').write_text(text)
    refused(lambda: PackedScreen(store), *words)


def test_tables_of_another_store(tmp_path, screen, store):
    table, source, _ = screen
    other = put(source, table[::-1], tmp_path/'b.zarr')
    for name in ('sites.parquet', 'chunks.parquet', 'stats.parquet'):
        kept = (store/name).read_bytes()
        (store/name).write_bytes((other/name).read_bytes())
        refused(lambda: PackedScreen(store), 'pack the screen again')
        (store/name).write_bytes(kept)
    assert len(PackedScreen(store)) == 6


# ---- verify

def test_verify(tmp_path, screen, store):
    table, source, pixels = screen
    ids = table.site_id.tolist()
    assert verify_store(store, progress=False) == 6 == verify_store(store, source, workers=3, progress=True)
    bad = {1: flipped(chunk(store, 1).read_bytes(), 99, 3), 2: chunk(store, 2).read_bytes()[:-9], 4: None, 5: chunk(store, 3).read_bytes()}
    for row, data in bad.items(): chunk(store, row).write_bytes(data) if data is not None else chunk(store, row).unlink()
    for kwargs in ({}, dict(screen=source)):
        refused(lambda: verify_store(store, progress=False, **kwargs), str(store), '4 sites are damaged', *[ids[r] for r in bad])
    shutil.rmtree(store); put(source, table, store)
    write_site(source.root, table.iloc[3], pixels[ids[3]] ^ 1)
    more = pd.concat([table, site_table(('H08',))], ignore_index=True)
    make(source.root, more[6:].reset_index(drop=True))
    chunk(store, 0).write_bytes(b'')
    text = refused(lambda: verify_store(store, PngTree(source.root, more), progress=False), f'1 site is damaged ({ids[0]})',
                f'1 site differs from the source ({ids[3]})', '2 sites of the source are not packed (HUVEC-01_1_H08_1, HUVEC-01_1_H08_2)')
    assert ids[1] not in text


def test_verify_with_a_source_that_lost_sites(screen, store):
    table, source, _ = screen
    text = refused(lambda: verify_store(store, PngTree(source.root, table[1:]), progress=False), '1 site differs', table.site_id[0])
    assert table.site_id[1] not in text
    for row in (1, 4): png(source, table, row).unlink()
    refused(lambda: verify_store(store, source, progress=False), table.site_id[1], table.site_id[4])


# ---- damage

def outcome(path, table, stats, pixels):
    "'refused', or what is wrong with what was read; '' when everything is right"
    try:
        packed = PackedScreen(path)
        got = {i: packed[i] for i in packed.site_ids}
    except ScreenError as e: return 'refused' if '\n' not in str(e) else 'two lines'
    except BaseException as e: return repr(e)[:200]
    if packed.channels != CHANNELS or packed.shape != (6, 16, 16) or packed.dtype != np.uint8: return 'other channels or shape'
    if not packed.table.equals(table): return 'another table'
    if not packed.stats.equals(stats): return 'other statistics'
    return '' if list(got) == list(pixels) and all((got[i] == x).all() for i, x in pixels.items()) else 'other pixels'


def damaged(data, rng):
    "One random damage; → (its name, the new content or None)"
    kind = rng.choice([*['flip']*9, 'flips', 'cut', 'gone', 'garbage', 'stretch', 'more', 'zeros', 'empty', 'swap'])
    n, at = len(data), int(rng.integers(max(len(data), 1)))
    if kind == 'flip': return f'flip {at}', flipped(data, at, int(rng.integers(8)))
    if kind == 'flips':
        for at in rng.integers(n, size=5): data = flipped(data, int(at), int(rng.integers(8)))
    m = int(rng.integers(1, 40))
    data = {'cut': data[:at], 'gone': None, 'garbage': rng.bytes(n), 'stretch': data[:at] + rng.bytes(m) + data[at+m:], 'more': data + rng.bytes(m),
            'zeros': data[:at] + bytes(min(m, n-at)) + data[at+m:], 'empty': b'', 'swap': data[at:] + data[:at], 'flips': data}[kind]
    return f'{kind} {at}', data


def fuzz_store(path, rounds=300):
    "Damage one file at a time; → [what went wrong], {outcome: how often}"
    path, right = Path(path), PackedScreen(path)
    table, stats, pixels, wrong, counts = right.table, right.stats, {i: right[i] for i in right.site_ids}, [], {}
    whole = files(path)
    heads = [f for f in whole if not f.startswith('images/c')]
    def one(seed, name, what, data):
        (path/name).write_bytes(data) if data is not None else (path/name).unlink()
        print(seed, name, what, flush=True, file=sys.stderr)
        faulthandler.dump_traceback_later(5, exit=True)
        got = outcome(path, table, stats, pixels)
        faulthandler.cancel_dump_traceback_later()
        counts[got] = counts.get(got, 0) + 1
        if got not in ('refused', ''): wrong.append([seed, name, what, got])
        (path/name).write_bytes(whole[name])
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        name = str(rng.choice(heads if seed % 4 else sorted(set(whole) - set(heads))))
        one(seed, name, *damaged(whole[name], rng))
    for name in heads:                                                # and one bit here and there, all through the tables
        for n, at in enumerate(range(0, len(whole[name]), len(whole[name])//90 + 1)): one('', name, f'flip {at}', flipped(whole[name], at, n % 8))
    assert outcome(path, table, stats, pixels) == ''
    return [wrong, counts]


def test_no_damage_goes_unnoticed(store):
    wrong, counts = alone(fuzz_store, store)
    assert sum(counts.values()) > 600 and counts['refused'] > 300
    assert not wrong, f'{len(wrong)} of {sum(counts.values())}: ' + '\n'.join(map(str, wrong[:12]))


def forgeries(size):
    "(what, [(offset, format, value), …]) of a Blosc header: nbytes at 4, blocksize at 8, cbytes at 12, starts of the blocks at 16"
    huge = (0, 1, 15, size-1, size+1, 10**7, 2**31-17, 2**31-1, 2**31, 2**32-1)
    for at, name in ((4, 'nbytes'), (8, 'blocksize'), (12, 'cbytes'), (16, 'start')):
        for v in huge: yield f'{name} {v}', [(at, '<I', v)]
    for at in range(4):
        for v in (0, 2, 7, 64, 128, 255): yield f'byte {at} {v}', [(at, '<B', v)]
    for start in (10**6, 10**9): yield f'far beyond {start}', [(12, '<I', 2**31-1), (16, '<I', start)]
    rng = np.random.default_rng(0)
    for n in range(60): yield f'random {n}', [(int(rng.integers(16, size-4)), '<B', int(rng.integers(256))) for _ in range(3)]


def read_forged(path, start):
    "Read forged chunks from number `start` on; the number under way is in the file `at`"
    from google_crc32c import value as crc32c
    path, wrong = Path(path), []
    whole, chunks = files(path), PackedScreen(path)
    ids, keep = chunks.site_ids, chunks[chunks.site_ids[0]]
    for n, (what, edits) in enumerate(list(forgeries(len(whole['images/c/0/0/0/0'])))):
        if n < start: continue
        (path.parent/'at').write_text(f'{n} {what}')
        packed = PackedScreen(path)
        data = bytearray(whole['images/c/0/0/0/0'][:-4])
        for at, form, v in edits: struct.pack_into(form, data, at, v)
        crc = crc32c(bytes(data))
        chunk(path, 0).write_bytes(bytes(data) + crc.to_bytes(4, 'little'))
        packed._at[ids[0]] = (0, crc)
        faulthandler.dump_traceback_later(5, exit=True)
        try: packed[ids[0]]
        except ScreenError: pass
        except BaseException as e: wrong.append([what, repr(e)[:100]])
        faulthandler.cancel_dump_traceback_later()
        chunk(path, 0).write_bytes(whole['images/c/0/0/0/0'])
    assert (PackedScreen(path)[ids[0]] == keep).all()
    return wrong


def test_forged_chunks_with_right_checksums(tmp_path):
    "Somebody else's file: lies about sizes end in a sentence, never in a crash"
    table = site_table(('B02',))
    for r in table.itertuples(): write_site(tmp_path/'screen', r, np.stack([np.arange(4096).reshape(64, 64).astype(np.uint8)//(c+1) for c in range(6)]))
    store, start, wrong = put(PngTree(tmp_path/'screen', table), table, tmp_path/'a.zarr'), 0, []
    good = files(store)
    while start is not None and len(wrong) < 40:
        try: wrong += alone(read_forged, store, start); start = None
        except AssertionError as e:                                   # it crashed: note it, go on behind it
            n, what = (tmp_path/'at').read_text().split(' ', 1)
            wrong.append([what, str(e).splitlines()[0]]); start = int(n) + 1
            chunk(store, 0).write_bytes(good['images/c/0/0/0/0'])
    assert not wrong, f'{len(wrong)}: {wrong[:12]}'
