"OME-Zarr plates: both versions, shards, axes, damage and loss of chunks and metadata, tables of wells."
import json, os, pickle, random, shutil, subprocess, sys, tempfile, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pandas as pd, pytest, zarr
from numcodecs import LZ4, Blosc, GZip, Zlib, Zstd
from ome_zarr.format import FormatV04, FormatV05
from ome_zarr.writer import write_image, write_multiscales_metadata, write_plate_metadata, write_well_metadata
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from helpers import refused
from rcic_fastai.screen.plates import *
from rcic_fastai.screen.images import only_present
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import SITE_COLUMNS

V4, V5 = FormatV04(), FormatV05()
both = pytest.mark.parametrize('fmt', [V4, V5], ids=['0.4', '0.5'])
quiet = dict(progress=False)


def omero(names):
    return dict(channels=[dict(label=n, color='FFFFFF', window=dict(start=0, end=9, min=0, max=9)) for n in names])


MADE, KEPT = {}, tempfile.TemporaryDirectory()

def write_plate(path, *args, **kw):
    "A new plate at `path`, made once for each kind and then copied; → {'B/2/0': array}"
    key = repr((args, kw))
    if key not in MADE: MADE[key] = (made := Path(KEPT.name)/f'{len(MADE)}.zarr'), make_plate(made, *args, **kw)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(MADE[key][0], path)
    return {k:x.copy() for k, x in MADE[key][1].items()}


def make_plate(path, fmt=V5, wells=('B/2', 'C/3'), fields=2, shape=(2, 16, 16), axes='cyx', dtype=np.uint16,
               names='default', seed=0, name=None, acquisition=None, pyramid=False, **storage):
    "Random fields"
    rng, pixels = np.random.default_rng(seed), {}
    plate = zarr.open_group(path, mode='w', zarr_format=fmt.zarr_format)
    rows, cols = (sorted({w.split('/')[i] for w in wells}) for i in (0, 1))
    write_plate_metadata(plate, rows, cols, list(wells), fmt=fmt, name=name)
    if names == 'default': names = ['DNA', 'ER', 'Actin', 'RNA'][:dict(zip(axes, shape)).get('c', 1)]
    extra = dict(omero=omero(names)) if names else {}
    for w in wells:
        more = dict(acquisition=acquisition) if acquisition else {}
        write_well_metadata(plate.require_group(w), [dict(path=str(f)) | more for f in range(fields)], fmt=fmt)
        for f in range(fields):
            x = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
            field = plate.require_group(f'{w}/{f}')
            if pyramid: write_image(x, field, scale_factors=[2], fmt=fmt, axes=axes, **extra)
            else:
                rewrite(path/w/str(f), x, fmt.zarr_format, **storage)
                scale = [dict(type='scale', scale=[1.]*x.ndim)]
                write_multiscales_metadata(field, [dict(path='s0', coordinateTransformations=scale)], fmt, axes)
                edit(meta(path/w/str(f)), lambda doc: ome(doc).update(extra))
            pixels[f'{w}/{f}'] = x
    return pixels


def rewrite(path, x, zarr_format=3, **kw):
    "Another array in the place of a field's"
    if zarr_format == 2: kw.setdefault('chunk_key_encoding', dict(name='v2', separator='/'))
    kw = dict(shape=x.shape, dtype=x.dtype, zarr_format=zarr_format, overwrite=True, fill_value=0, chunks=x.shape) | kw
    zarr.create_array(path/'s0', **kw)[...] = x


def one(path, **kw):
    "The only field of the only well"
    table, source = read_plates(path, **quiet, **kw)
    return source[table.site_id[0]]


def complains(*words, f): return refused(f, *words)


def edit(file, change):
    doc = json.loads(file.read_text())
    change(doc)
    file.write_text(json.dumps(doc))


def meta(folder): return next(folder/n for n in ('zarr.json', '.zattrs') if (folder/n).is_file())
def ome(doc): return doc['attributes']['ome'] if 'attributes' in doc else doc
def chunks(field):
    return sorted(f for f in (field/'s0').rglob('*') if f.is_file() and f.name[0] != '.' and f.name != 'zarr.json')


# ---- reading

@both
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_bit_for_bit(tmp_path, fmt, dtype):
    pixels = write_plate(tmp_path/'EXP'/'Plate1.ome.zarr', fmt, dtype=dtype, pyramid=True)
    table, source = read_plates(tmp_path/'EXP'/'Plate1.ome.zarr', **quiet)
    assert table.columns.tolist() == SITE_COLUMNS + ['field']
    assert table.site_id.tolist() == [f'EXP_Plate1_{w}_{s}' for w in ('B02', 'C03') for s in (1, 2)]
    assert table.well_id[3] == 'EXP_Plate1_C03' and table.site.tolist() == [1, 2, 1, 2]
    assert (table[['cell_type', 'dataset', 'well_type']] == ['unknown', 'train', 'treatment']).all(axis=None)
    assert table.sirna.isna().all() and str(table.sirna_id.dtype) == str(table.plate_group.dtype) == 'Int64'
    assert source.shape == (2, 16, 16) and source.dtype == dtype and source.channels == ('DNA', 'ER')
    for i, f in zip(table.site_id, table.field):
        assert source[i].dtype == dtype and (source[i] == pixels[f.split('zarr/')[1]]).all()
        assert len(source._paths(i)) == len([p for p in source._paths(i) if os.path.isfile(p)]) > 0
    assert len(source.missing()) == 0
    assert only_present(table, source)[1] == 0
    assert source.sites_of('EXP_Plate1_B02') == table.site_id[:2].tolist()


NEST = ShardingCodec(chunk_shape=(1, 8, 8), codecs=[ShardingCodec(chunk_shape=(1, 4, 4))])
TURN = TransposeCodec(order=(2, 0, 1))
STORED = {
    'v2 none': (V4, dict(compressors=None)), 'v2 Blosc': (V4, dict(compressors=Blosc('lz4'))),
    'v2 zstd': (V4, dict(compressors=Zstd())), 'v2 gzip': (V4, dict(compressors=GZip())),
    'v2 zlib': (V4, dict(compressors=Zlib())), 'v2 LZ4': (V4, dict(compressors=LZ4())),
    'v2 dots': (V4, dict(chunk_key_encoding=dict(name='v2', separator='.'))), 'v2 F': (V4, dict(order='F')),
    'v2 big endian': (V4, dict(dtype='>u2')), 'v2 null fill': (V4, dict(fill_value=None)),
    'v3 none': (V5, dict(compressors=None)), 'v3 Blosc': (V5, dict(compressors=BloscCodec(cname='lz4'))),
    'v3 gzip': (V5, dict(compressors=GzipCodec())), 'v3 checksum': (V5, dict(compressors=ZstdCodec(checksum=True))),
    'v3 crc': (V5, dict(compressors=[ZstdCodec(), Crc32cCodec()])), 'v3 transposed': (V5, dict(filters=TURN)),
    'v3 big endian': (V5, dict(serializer=BytesCodec(endian='big'))),
    'v3 dots': (V5, dict(chunk_key_encoding=dict(name='v2', separator='.'))),
    'v3 sharded': (V5, dict(shards=(2, 16, 16))),
    'v3 sharded crc': (V5, dict(shards=(2, 16, 16), compressors=[ZstdCodec(), Crc32cCodec()])),
    'v3 sharded Blosc': (V5, dict(shards=(2, 16, 16), compressors=BloscCodec(cname='lz4'))),
    'v3 nested shards': (V5, dict(serializer=NEST,
                                  compressors=None, chunks=(2, 16, 16))),
    'v3 turned shards': (V5, dict(filters=TURN, serializer=ShardingCodec(chunk_shape=(8, 4, 8)), compressors=None,
                                  chunks=(16, 16, 16))),
}


@pytest.fixture
def stored(tmp_path, request):
    fmt, how = STORED[request.param]
    x = write_plate(tmp_path/'p.zarr', fmt, ['B/2'], 1, (2, 20, 24))['B/2/0'] % 4000 + 1
    field = tmp_path/'p.zarr/B/2/0'
    rewrite(field, x, fmt.zarr_format, **dict(dict(chunks=(1, 8, 8) if 'shards' in how else (1, 12, 24)), **how))
    return field, x


@pytest.mark.filterwarnings('ignore:Combining a `sharding_indexed` codec')
@pytest.mark.parametrize('stored', STORED, indirect=True)
def test_every_way_to_store(tmp_path, stored):
    "Whole; each file cut anywhere; each file gone"
    field, x = stored
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    site = table.site_id[0]
    assert (source[site] == x).all() and source[site].dtype.isnative
    assert sorted(map(str, chunks(field))) == sorted(source._paths(site))
    for file in chunks(field)[::3]:
        whole = file.read_bytes()
        n = len(whole)
        for cut in sorted({0, 1, 12, 17, n//2, n-9, n-1} & set(range(n))):
            file.write_bytes(whole[:cut])
            complains(site, 'p.zarr/B/2/0/s0', f=lambda: source[site])
        file.unlink()
        said = complains(site, 'lacks ', "empty='fill'", f=lambda: source[site])
        assert str(file.relative_to(field/'s0')) in said
        m = source.missing()
        assert m.site_id.tolist() == [site] and m.file[0] == str(file)
        assert m.missing[0] and set(m.missing[0]) <= {'DNA', 'ER'}
        with pytest.raises(ScreenError): only_present(table, source)
        filled = read_plates(tmp_path/'p.zarr', empty='fill', **quiet)[1]
        assert len(filled.missing()) == 0
        got = filled[site]
        assert (got[got != x] == 0).all() and (got != x).any()
        file.write_bytes(whole)
    assert (source[site] == x).all()


@pytest.mark.parametrize('stored', ['v2 gzip', 'v3 checksum', 'v3 crc', 'v3 sharded crc'], indirect=True)
def test_flipped_bits_never_pass_where_there_is_a_checksum(tmp_path, stored):
    field, x = stored
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    rng, refused = np.random.default_rng(0), 0
    for file in chunks(field)[::3]:
        whole = file.read_bytes()
        for bit in rng.integers(0, 8*len(whole), 30):
            bad = bytearray(whole); bad[bit//8] ^= 1 << bit % 8
            file.write_bytes(bad)
            try: assert (source[table.site_id[0]] == x).all()
            except ScreenError as e: refused += table.site_id[0] in str(e)
        file.write_bytes(whole)
    assert refused > 20


@pytest.mark.parametrize('stored', ['v2 Blosc', 'v3 Blosc', 'v2 LZ4', 'v3 sharded Blosc', 'v3 none'], indirect=True)
def test_any_flip_is_an_error_or_pixels(tmp_path, stored):
    "Without a checksum wrong pixels cannot be told; crashes and other exceptions can"
    field, x = stored
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    file = chunks(field)[0]
    whole = file.read_bytes()
    for bit in range(0, 8*len(whole), max(1, len(whole)//8)):
        bad = bytearray(whole); bad[bit//8] ^= 1 << bit % 8
        file.write_bytes(bad)
        try: assert source[table.site_id[0]].shape == x.shape
        except ScreenError: pass


def test_longer_files(tmp_path):
    write_plate(tmp_path/'p.zarr', V5, ['B/2'], 1, compressors=BloscCodec())
    file = chunks(tmp_path/'p.zarr/B/2/0')[0]
    file.write_bytes(file.read_bytes() + b'x')
    complains('is truncated', f=lambda: one(tmp_path/'p.zarr'))


@pytest.mark.parametrize('shards', [None, (2, 16, 16), (1, 8, 8)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_empty_chunks(tmp_path, shards, dtype):
    "A writer that leaves out what is 0; the same file, written in full; and pixels of the values used to find them"
    x = write_plate(tmp_path/'p.zarr', V5, ['B/2'], 1, (2, 20, 24), dtype=dtype)['B/2/0'].clip(1)
    x[1, 8:16, 16:] = 0
    field = tmp_path/'p.zarr/B/2/0'
    how = dict(chunks=(1, 8, 8), shards=shards)
    rewrite(field, x, **how)
    complains('c/', "empty='fill'", f=lambda: one(tmp_path/'p.zarr'))
    assert (one(tmp_path/'p.zarr', empty='fill') == x).all()
    rewrite(field, x, **how, config=dict(write_empty_chunks=True))
    assert (one(tmp_path/'p.zarr') == x).all()
    for v in (0, 4, 5):
        x[:, 8:16, 8:16] = np.iinfo(dtype).max - v
        rewrite(field, x, **how, config=dict(write_empty_chunks=True))
        assert (one(tmp_path/'p.zarr') == x).all()


@pytest.mark.filterwarnings('ignore:Combining a `sharding_indexed` codec')
@pytest.mark.parametrize('kind', ['v3 nested shards', 'v3 turned shards'])
def test_empty_parts_of_unusual_shards(tmp_path, kind):
    x = write_plate(tmp_path/'p.zarr', V5, ['B/2'], 1, (2, 20, 24))['B/2/0'].clip(1)
    x[1:, 4:8, 8:12] = 0
    if 'turned' in kind: x[:, 8:16, :8] = 0
    rewrite(tmp_path/'p.zarr/B/2/0', x, **STORED[kind][1])
    complains('part of c/', f=lambda: one(tmp_path/'p.zarr'))
    assert (one(tmp_path/'p.zarr', empty='fill') == x).all()


def test_shards_with_their_index_in_front(tmp_path):
    x = write_plate(tmp_path/'p.zarr', V5, ['B/2'], 1)['B/2/0']
    front = lambda codec: ShardingCodec(chunk_shape=(1, 8, 8), codecs=[BytesCodec(), codec], index_location='start')
    rewrite(tmp_path/'p.zarr/B/2/0', x, serializer=front(ZstdCodec()), compressors=None)
    assert (one(tmp_path/'p.zarr') == x).all()
    rewrite(tmp_path/'p.zarr/B/2/0', x, serializer=front(BloscCodec()), compressors=None)
    assert (one(tmp_path/'p.zarr') == x).all()
    file, = chunks(tmp_path/'p.zarr/B/2/0')
    whole = file.read_bytes()
    for cut in range(0, len(whole), 97):
        file.write_bytes(whole[:cut])
        complains('is truncated', f=lambda: one(tmp_path/'p.zarr'))


# ---- axes, planes, time points

@both
@pytest.mark.parametrize('axes', 'tczyx tcyx czyx cyx zyx yx tyx cxy tczxy xy cyxz cyzx'.split())
def test_axes(tmp_path, fmt, axes):
    size = dict(t=1, c=2, z=1, y=8, x=12)
    x = np.random.default_rng(0).integers(0, 60000, [size[a] for a in axes], np.uint16)
    write_plate(tmp_path/'p.zarr', fmt, ['B/2'], 1, *(((2, 8, 12), 'cyx') if 'c' in axes else ((8, 12), 'yx')))
    rewrite(tmp_path/'p.zarr/B/2/0', x, fmt.zarr_format, chunks=[min(5, n) for n in x.shape])
    kind = dict(t='time', c='channel')
    def other_axes(doc):
        m = ome(doc)['multiscales'][0]
        m['axes'] = [dict(name=a, type=kind.get(a, 'space')) for a in axes]
        m['datasets'][0]['coordinateTransformations'] = [dict(type='scale', scale=[1.]*len(axes))]
    edit(meta(tmp_path/'p.zarr/B/2/0'), other_axes)
    expect = np.einsum(f'{axes}->tczyx'.replace('->tczyx', '->' + ''.join(a for a in 'tczyx' if a in axes)), x)
    assert (one(tmp_path/'p.zarr') == expect.reshape(size['c'] if 'c' in axes else 1, 8, 12)).all()


@both
@pytest.mark.parametrize('change,words', [
    (lambda a: a.insert(0, dict(name='lifetime')), 'lifetime'), (lambda a: a[1].update(name='v'), 'v, x'),
    (lambda a: a.reverse(), 'space axes'), (lambda a: a.pop(), 'space axes'),
    (lambda a: a[1].update(name='x'), 'nique'),
    (lambda a: a.insert(1, dict(name='z', type='space')), 'the metadata 4'), (lambda a: a.clear(), 'axes'),
    (lambda a: a[1].update(type='time'), 'space axes')])
def test_other_axes_are_refused(tmp_path, fmt, change, words):
    write_plate(tmp_path/'p.zarr', fmt)
    def broken(doc):
        m = ome(doc)['multiscales'][0]
        change(m['axes'])
        m['datasets'][0]['coordinateTransformations'] = [dict(type='scale', scale=[1.]*len(m['axes']))]
    edit(meta(tmp_path/'p.zarr/B/2/1'), broken)
    complains('p.zarr/B/2/1', words, f=lambda: read_plates(tmp_path/'p.zarr', **quiet))


@both
@pytest.mark.parametrize('chunks', [(1, 1, 1, 8, 8), (3, 2, 4, 16, 16)])
def test_planes_and_time_points(tmp_path, fmt, chunks):
    x = write_plate(tmp_path/'p.zarr', fmt, ['B/2'], 1, (3, 2, 4, 16, 16), 'tczyx', chunks=chunks)['B/2/0']
    p = tmp_path/'p.zarr'
    assert (one(p, t=1, z=2) == x[1, :, 2]).all()
    assert (one(p, t=0, z='max') == x[0].max(1)).all()
    assert (one(p, t='max', z=np.int64(3)) == x[:, :, 3].max(0)).all()
    assert (one(p, t='max', z='max') == x.max((0, 2))).all()
    complains('3 time points', 't=0 to 2', f=lambda: one(p, z=0))
    complains('4 planes', "z='max'", f=lambda: one(p, t=0))
    complains('z=4', 'it has 4 planes', f=lambda: one(p, t=0, z=4))
    for bad in (-1, 1.5, 'mean', True - 2): complains('is not known', f=lambda: one(p, t=0, z=bad))


@both
def test_only_the_chunks_that_are_read_are_asked_for(tmp_path, fmt):
    x = write_plate(tmp_path/'p.zarr', fmt, ['B/2'], 1, (2, 4, 16, 16), 'czyx', chunks=(1, 1, 16, 16))['B/2/0']
    gone = next(f for f in chunks(tmp_path/'p.zarr/B/2/0') if str(f).endswith('1/2/0/0'))
    gone.unlink()
    for z in (0, 1, 3): assert (one(tmp_path/'p.zarr', z=z) == x[:, z]).all()
    for z in (2, 'max'):
        complains('1/2/0/0', f=lambda: one(tmp_path/'p.zarr', z=z))
        m = read_plates(tmp_path/'p.zarr', z=z, **quiet)[1].missing()
        assert m.missing.tolist() == [('ER',)] and m.file[0] == str(gone)


def test_sharded_planes_name_the_right_shard(tmp_path):
    x = write_plate(tmp_path/'p.zarr', V5, ['B/2'], 1, (2, 4, 16, 16), 'czyx')['B/2/0'].clip(1)
    x[1, 3, 8:, :8] = 0
    rewrite(tmp_path/'p.zarr/B/2/0', x, chunks=(1, 1, 8, 8), shards=(1, 2, 16, 16))
    assert (one(tmp_path/'p.zarr', z=2) == x[:, 2]).all()
    complains('part of c/1/1/0/0', f=lambda: one(tmp_path/'p.zarr', z=3))


# ---- threads and processes

def _sum(source, site): return int(source[site].sum())

@pytest.mark.parametrize('fmt,start', [(V4, 'fork'), (V5, 'fork'), (V5, 'spawn')])
def test_processes(tmp_path, fmt, start):
    "In a worker, forked after zarr has run its threads here, or started afresh"
    pixels = write_plate(tmp_path/'p.zarr', fmt)
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    source[table.site_id[0]]
    with ProcessPoolExecutor(1, get_context(start)) as pool:
        got = list(pool.map(_sum, [source]*4, table.site_id, timeout=60))
    assert got == [int(x.sum()) for x in pixels.values()]


@pytest.mark.parametrize('how', [{}, dict(chunks=(1, 8, 8), shards=(2, 16, 16))], ids=['chunks', 'shards'])
def test_threads(tmp_path, how):
    pixels = write_plate(tmp_path/'p.zarr', V5, fields=6, **how)
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    ids, expect = table.site_id.tolist()*4, list(pixels.values())*4
    buffer = np.zeros((len(ids) + 1, *source.shape), source.dtype)
    source.read_into(ids, buffer, threads=6)
    assert (buffer[:-1] == expect).all() and not buffer[-1].any()


def test_pickle_is_small(tmp_path):
    write_plate(tmp_path/'p.zarr', V5, fields=12)
    table, source = read_plates(tmp_path/'p.zarr', **quiet)
    assert len({id(layout) for _, layout in source._where.values()}) == 1
    assert len(pickle.dumps(source)) < 10_000


# ---- several plates

def test_a_folder_of_plates_of_both_versions(tmp_path):
    root = tmp_path/'EXP'
    pixels = {'1': write_plate(root/'1.zarr', V4, seed=1), '2': write_plate(root/'2.ome.zarr', V5, seed=2)}
    (root/'notes.txt').write_text('x'); (root/'thumbs').mkdir()
    for given in (root, str(root), [root/'1.zarr', root/'2.ome.zarr']):
        table, source = read_plates(given, **quiet)
        assert table['plate'].tolist() == [1]*4 + [2]*4 and str(table['plate'].dtype) == 'int64'
        assert (source.root, table.field[4]) == (root, '2.ome.zarr/B/2/0')
        for r in table.itertuples(): assert (source[r.site_id] == pixels[str(r.plate)][r.field.split('zarr/')[1]]).all()


def test_experiments_are_the_folders_of_plates(tmp_path):
    for e in 'AB': write_plate(tmp_path/e/'Plate1.zarr', name='same')
    table, source = read_plates([tmp_path/'A', tmp_path/'B'], **quiet)
    assert table.experiment.unique().tolist() == ['A', 'B'] and set(table['plate']) == {'same'}
    assert source.root == tmp_path and table.field[0] == 'A/Plate1.zarr/B/2/0'
    complains('second plate Plate1 of experiment E', 'rename',
              f=lambda: read_plates([tmp_path/'A', tmp_path/'B'], experiment='E', **quiet))
    t, _ = read_plates(tmp_path/'A', experiment='E', **quiet)
    assert set(t.experiment) == {'E'}


def test_names_of_plates(tmp_path):
    for i, name in enumerate(['x', 'x', None, '']): write_plate(tmp_path/f'P{i}.ome.zarr', name=name, fields=1)
    assert read_plates(tmp_path, **quiet)[0]['plate'].unique().tolist() == ['P0', 'P1', 'P2', 'P3']
    assert read_plates(tmp_path/'P0.ome.zarr', **quiet)[0]['plate'].unique().tolist() == ['x']
    for i, name in enumerate(['007', '8', '9', '10']): write_plate(tmp_path/f'P{i}.ome.zarr', name=name, fields=1)
    assert read_plates(tmp_path, **quiet)[0]['plate'].unique().tolist() == ['007', '8', '9', '10']
    write_plate(tmp_path/'P0.ome.zarr', name='P1', fields=1)
    write_plate(tmp_path/'P1.ome.zarr', name='', fields=1)
    complains('P1.ome.zarr', 'second plate P1', f=lambda: read_plates(tmp_path, **quiet))
    complains('given twice', f=lambda: read_plates([tmp_path, tmp_path/'P0.ome.zarr'], **quiet))


def test_paths_that_are_no_plates(tmp_path):
    complains('nowhere is not a folder', f=lambda: read_plates(tmp_path/'nowhere', **quiet))
    complains('holds none', f=lambda: read_plates(tmp_path, **quiet))
    complains('no plate is given', f=lambda: read_plates([], **quiet))
    write_plate(tmp_path/'p.zarr')
    complains('B/2 ', 'plate: Field required', f=lambda: read_plates(tmp_path/'p.zarr/B/2', **quiet))
    complains('B/2/0', 'plate: Field required', f=lambda: read_plates(tmp_path/'p.zarr/B/2/0', **quiet))
    complains('s0', f=lambda: read_plates(tmp_path/'p.zarr/B/2/0/s0', **quiet))
    (tmp_path/'q.zarr').mkdir()
    complains('q.zarr', f=lambda: read_plates(tmp_path, **quiet))


@pytest.mark.parametrize('kw,words', [
    (dict(shape=(2, 16, 8)), ['[2, 16, 8]', '[2, 16, 16]']), (dict(dtype=np.uint8), ['uint8', 'uint16']),
    (dict(shape=(3, 16, 16)), ['[3, 16, 16]']), (dict(names=['DNA', 'GFP']), ['DNA, GFP', 'DNA, ER', 'channels='])])
def test_plates_that_differ(tmp_path, kw, words):
    write_plate(tmp_path/'1.zarr', V4)
    write_plate(tmp_path/'2.zarr', V5, fields=1, **kw)
    complains('2.zarr/B/2/0', *words, f=lambda: read_plates(tmp_path, **quiet))
    if 'names' in kw: assert read_plates(tmp_path, channels=['a', 'b'], **quiet)[1].channels == ('a', 'b')


@both
@pytest.mark.parametrize('dtype', ['int16', 'uint32', 'float32', 'int8', 'bool', 'uint64'])
def test_pixels_that_are_not_gray_bytes(tmp_path, fmt, dtype):
    write_plate(tmp_path/'p.zarr', fmt, ['B/2'], 1)
    rewrite(tmp_path/'p.zarr/B/2/0', np.ones((2, 16, 16), dtype), fmt.zarr_format)
    complains(dtype, 'convert the plate to uint8 or uint16', f=lambda: one(tmp_path/'p.zarr'))


# ---- channels

@both
def test_names_of_channels(tmp_path, fmt):
    p = tmp_path/'p.zarr'
    def channels(**kw): return read_plates(p, **quiet, **kw)[1].channels
    write_plate(p, fmt, ['B/2'], 1, names=None)
    assert channels() == ('c1', 'c2') and channels(channels=['x', 'y']) == ('x', 'y')
    complains('has 1 names', f=lambda: channels(channels=['x']))
    for names, expect in [(['', 'ER'], ('c1', 'ER')), ([None, 'é µ'], ('c1', 'é µ'))]:
        write_plate(p, fmt, ['B/2'], 1, names=names)
        assert channels() == expect
    for names, word in [('aa', 'one name'), ('a', 'the array 2'), ('abc', 'the array 2'), ([1, 'b'], 'not text')]:
        write_plate(p, fmt, ['B/2'], 1, names=['a', 'b'])
        edit(meta(p/'B/2/0'), lambda doc: ome(doc).update(omero=omero(names)))
        complains('p.zarr/B/2/0', word, 'channels=', f=channels)
        assert channels(channels=['x', 'y']) == ('x', 'y')
    edit(meta(p/'B/2/0'), lambda doc: ome(doc)['omero']['channels'][0].pop('window'))
    complains('window: Field required', f=channels)


# ---- metadata that does not hold

def damage(change, file='', words=(), **kw):
    @both
    def test(tmp_path, fmt):
        p = tmp_path/'p.zarr'
        write_plate(p, fmt)
        edit(meta(p/file), lambda doc: change(ome(doc)))
        complains('p.zarr', *words, f=lambda: read_plates(p, **quiet, **kw))
    return test

test_no_plate_key = damage(lambda o: o.pop('plate'), words=['plate: Field required'])
test_no_rows = damage(lambda o: o['plate'].pop('rows'), words=['plate.rows: Field required'])
test_unknown_row = damage(lambda o: o['plate']['wells'][0].update(path='Q/2'), words=['Q'])
test_wrong_index = damage(lambda o: o['plate']['wells'][0].update(columnIndex=1), words=['B/2', 'column 1'])
test_well_twice = damage(lambda o: o['plate']['wells'].append(o['plate']['wells'][0]), words=['B02 twice'])
test_field_twice = damage(lambda o: o['well']['images'].append(dict(path='0', acquisition=7)), 'B/2', ['field 0 twice'])
test_no_images = damage(lambda o: o['well'].pop('images'), 'C/3', ['C/3', 'well.images: Field required'])
test_no_multiscales = damage(lambda o: o.pop('multiscales'), 'C/3/1', ['C/3/1', 'multiscales: Field required'])
test_empty_datasets = damage(lambda o: o['multiscales'][0].update(datasets=[]), 'C/3/1', ['C/3/1'])
test_outside = damage(lambda o: o['multiscales'][0]['datasets'][0].update(path='../1/s0'), 'C/3/0', ['C/3/0'])


@both
def test_row_and_column_names(tmp_path, fmt):
    p = tmp_path/'p.zarr'
    for wells, expect in [(['b/02', 'C/010'], ['B02', 'C10']), (['AA/1', 'AF/48'], ['AA01', 'AF48'])]:
        write_plate(p, fmt, wells, 1)
        assert read_plates(p, **quiet)[0].well.tolist() == expect
    for wells in (['1/1'], ['B/B'], ['B1/2'], ['B/0']):
        write_plate(p, fmt, wells, 1)
        complains(wells[0], 'such as B/2', f=lambda: read_plates(p, **quiet))
    write_plate(p, fmt, ['B/2', 'B/02'], 1)
    complains('B02 twice', f=lambda: read_plates(p, **quiet))


@pytest.mark.parametrize('version', ['0.1', '0.2', '0.3', '0.6', 5, None])
def test_other_versions(tmp_path, version):
    write_plate(tmp_path/'4.zarr', V4)
    write_plate(tmp_path/'5.zarr', V5)
    if version:
        edit(meta(tmp_path/'4.zarr'), lambda doc: doc['plate'].update(version=version))
        words = 'plate.version' if version == 5 else f'is OME-Zarr {version}'
        complains('4.zarr', words, f=lambda: read_plates(tmp_path/'4.zarr', **quiet))
    edit(meta(tmp_path/'5.zarr'), lambda doc: ome(doc).update(version=version))
    complains('5.zarr', 'version', "'0.5'", f=lambda: read_plates(tmp_path/'5.zarr', **quiet))


@both
@pytest.mark.parametrize('file', ['', 'B/2', 'B/2/1'])
def test_broken_json(tmp_path, fmt, file):
    p = tmp_path/'p.zarr'
    write_plate(p, fmt)
    whole = meta(p/file).read_bytes()
    for bad in (whole[:len(whole)//2], b'', b'[]', b'null', b'\xff\xfe', b'{"a":'*2000):
        meta(p/file).write_bytes(bad)
        complains(str(p/file), f=lambda: read_plates(p, **quiet))


@both
def test_wells_that_are_not_there(tmp_path, fmt):
    p = tmp_path/'p.zarr'
    write_plate(p, fmt, [f'B/{c}' for c in range(1, 25)], 1)
    for c in range(3, 20): shutil.rmtree(p/f'B/{c}')
    edit(meta(p/'B/2'), lambda doc: ome(doc)['well'].update(images=[]))
    complains('18 listed wells have no field', 'p.zarr B02, p.zarr B03', 'and 8 more', 'partial=True',
              f=lambda: read_plates(p, **quiet))
    table, source = read_plates(p, partial=True, **quiet)
    assert table.well.tolist() == ['B01', 'B20', 'B21', 'B22', 'B23', 'B24'] and len(source) == 6
    for c in (1, 20, 21, 22, 23, 24): shutil.rmtree(p/f'B/{c}')
    complains('no field in any well', f=lambda: read_plates(p, partial=True, **quiet))


@both
def test_fields_that_are_not_there(tmp_path, fmt):
    p = tmp_path/'p.zarr'
    pixels = write_plate(p, fmt, fields=3)
    shutil.rmtree(p/'B/2/1'); shutil.rmtree(p/'C/3/2/s0')
    table, source = read_plates(p, **quiet)
    assert len(table) == 6
    m = source.missing()
    assert m.site_id.tolist() == [table.site_id[1], table.site_id[5]] and m.missing[0] == ('DNA', 'ER')
    complains(table.site_id[1], 'B/2/1', 'only_present', f=lambda: source[table.site_id[1]])
    assert source.stamp(table.site_id[1]) == 'absent' != source.stamp(table.site_id[0])
    keep, n = only_present(table, source)
    assert n == 2
    for i, f in zip(keep.site_id, keep.field): assert (source[i] == pixels[f.split('zarr/')[1]]).all()
    for w in ('B/2', 'C/3'):
        for f in range(3): shutil.rmtree(p/w/str(f), ignore_errors=True)
    complains('none of the 6 fields', f=lambda: read_plates(p, **quiet))
    complains("'nowhere'", f=lambda: source['nowhere'])


def test_acquisitions_come_along(tmp_path):
    write_plate(tmp_path/'p.zarr', acquisition=3)
    assert read_plates(tmp_path/'p.zarr', **quiet)[0].acquisition.tolist() == [3]*4


def test_a_source_from_a_stored_table(tmp_path):
    pixels = write_plate(tmp_path/'p.zarr')
    table, _ = read_plates(tmp_path/'p.zarr', **quiet)
    table.to_csv(tmp_path/'t.csv', index=False)
    some = pd.read_csv(tmp_path/'t.csv').iloc[[3, 1]]
    source = PlateSource(tmp_path, some, **quiet)
    assert (source[table.site_id[3]] == pixels['C/3/1']).all() and len(source) == 2
    complains("column 'field'", f=lambda: PlateSource(tmp_path, table.drop(columns='field'), **quiet))
    complains('empty=', f=lambda: PlateSource(tmp_path, table, empty='zero', **quiet))
    complains('twice', f=lambda: PlateSource(tmp_path, pd.concat([table, table]), **quiet))
    complains('empty', f=lambda: PlateSource(tmp_path, table[:0], **quiet))


# ---- many fields

@both
def test_metadata_of_many_fields(tmp_path, fmt, monkeypatch):
    "Each file is read once, by threads, and what most fields say is validated once, although names and places differ"
    from rcic_fastai.screen import plates
    p = tmp_path/"p.zarr"
    write_plate(p, fmt, [f"{r}/{c}" for r in "BCDE" for c in range(2, 7)], 3, shape=(2, 8, 8))
    for n, f in enumerate(sorted(p.glob("*/*/[0-9]"))):
        def own(doc):
            m = ome(doc)["multiscales"][0]
            m["name"] = f"field {n}"
            m["datasets"][0]["coordinateTransformations"].append(dict(type="translation", translation=[0, n*.5, n]))
        edit(meta(f), own)
    read, validated = [], []
    plain, model = plates.read_any, plates._validated
    monkeypatch.setattr(plates, "read_any", lambda path, *a: (read.append(str(path)), plain(path, *a))[1])
    monkeypatch.setattr(plates, "_validated", lambda folder, kind, *a: (validated.append(kind), model(folder, kind, *a))[1])
    table, source = read_plates(p, **quiet)
    assert len(table) == 60 and len(source) == 60 and len({id(layout) for _, layout in source._where.values()}) == 1
    found = [f for f in read if os.path.isfile(f)]
    assert len(found) == len(set(found)) and len(found) <= (1 + 20 + 60)*(2 if fmt is V4 else 1) + 60
    assert Counter(validated)["image"] <= plates._READERS and Counter(validated)["well"] == 20


# ---- fuzz of the metadata

JUNK = [None, -1, 0, 3, 10**9, 1.5, 'junk', '', '../0', '0', [], {}, [[]], True, float('nan'), 'é\x00', '9'*5000]

def places(doc, at=()):
    "All paths into a JSON document"
    yield at
    inside = doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    for k, v in inside: yield from places(v, at + (k,))


def broken(doc, rng):
    "A document with one thing wrong, as text"
    *way, last = rng.choice([p for p in places(doc) if p])
    inner = doc
    for k in way: inner = inner[k]
    how = rng.randrange(5)
    if how == 0: del inner[last]
    elif how == 1: inner[last] = rng.choice(JUNK)
    elif how == 2 and isinstance(inner, list): inner.append(inner[last])
    elif how == 3:
        text = json.dumps(doc)
        i = rng.randrange(len(text))
        return text[:i] + rng.choice(['', '{', ']', '"', ',', '\\', '\x00']) + text[i+1:]
    else: inner[last] = [inner[last]] if rng.random() < .5 else {str(last): inner[last]}
    return json.dumps(doc)


@both
def test_fuzzed_metadata(tmp_path, fmt):
    "200 damages: a ScreenError, or each site that is left has the pixels of its field"
    p, rng = tmp_path/'p.zarr', random.Random(5)
    pixels = write_plate(p, fmt, fields=1, shape=(2, 8, 8), chunks=(1, 8, 8))
    docs = [f for f in p.rglob('*') if f.is_file() and (f.name in ('zarr.json', '.zattrs', '.zarray', '.zgroup'))
            and not any(part in ('C', 'c') for part in f.relative_to(p).parts)]
    refused = right = 0
    for _ in range(100):
        file = rng.choice(docs)
        whole = file.read_text()
        if not (doc := json.loads(whole)): continue
        file.write_text(broken(doc, rng))
        start = time.monotonic()
        try:
            table, source = read_plates(p, partial=True, **quiet)
            for i, f in zip(table.site_id, table.field): assert np.array_equal(source[i], pixels[f.split('zarr/')[1]])
            right += 1
        except ScreenError as e:
            refused += 1
            assert '\n' not in str(e)
        assert time.monotonic() - start < 10
        file.write_text(whole)
    assert refused > 30 and right > 10


# ---- tables of wells

WELLS = pd.DataFrame(dict(
    plate=['P1', 'P1', 'P2', 'P2'], well=['b2', 'C3', 'B02', 'C03'], sirna=['b', 'DMSO', None, 'a'],
    well_type=['treatment', 'negative_control', None, 'positive_control'], cell_type=['RPE', None, 'RPE', 'U2OS'],
    dataset=['train', 'train', 'test', 'test'], dose=[1., 2., 3., 4.]))


@pytest.fixture
def two(tmp_path):
    for n in (1, 2): write_plate(tmp_path/f'EXP/P{n}.zarr', fields=2)
    return tmp_path/'EXP'


@pytest.mark.parametrize('as_csv', [False, True])
def test_wells(two, tmp_path, as_csv):
    wells = WELLS.copy()
    if as_csv: wells.to_csv(tmp_path/'wells.csv', index=False); wells = tmp_path/'wells.csv'
    t, source = read_plates(two, wells, cell_type='HUVEC', **quiet)
    per_well = t.drop_duplicates('well_id')
    assert per_well.sirna.tolist() == ['b', 'DMSO', None, 'a']
    assert per_well.sirna_id.tolist() == [2, 0, pd.NA, 1]
    assert per_well.well_type.tolist() == ['treatment', 'negative_control', 'treatment', 'positive_control']
    assert per_well.cell_type.tolist() == ['RPE', 'HUVEC', 'RPE', 'U2OS']
    assert per_well.dataset.tolist() == ['train', 'train', 'test', 'test']
    assert per_well.dose.astype(float).tolist() == [1, 2, 3, 4]
    assert t.columns.tolist()[:len(SITE_COLUMNS)] == SITE_COLUMNS and len(t) == len(source) == 8
    assert (t.plate_group.isna()).all()


def test_perturbations_that_are_numbers(two):
    for sirna in ([7., None, 12., 7.], pd.array([7, None, 12, 7], 'Int64'), ['7', ' ', '12 ', '7']):
        t, _ = read_plates(two, WELLS.assign(sirna=sirna), **quiet)
        assert t.sirna[::2].tolist() == ['7', None, '12', '7'] and t.sirna_id[::2].tolist() == [1, pd.NA, 0, 1]


def test_wells_that_do_not_fit(two):
    read = lambda wells, **kw: read_plates(two, wells, **quiet, **kw)
    complains('1 well not on the plates (P1 D05)', '1 well not in it (P1 B02)', 'partial=True',
              f=lambda: read(WELLS.replace('b2', 'd5')))
    t, _ = read(WELLS.replace('b2', 'd5'), partial=True)
    assert t.sirna[t.well_id == 'EXP_P1_B02'].isna().all() and len(t) == 8
    complains('the plates have 1', f=lambda: read(WELLS[1:]))
    many = pd.concat([WELLS, pd.DataFrame(dict(plate='P1', well=[f'F{c:02d}' for c in range(1, 15)], sirna='x'))])
    complains('14 wells', 'P1 F10 and 4 more', '(none)', f=lambda: read(many))
    complains('4 wells', f=lambda: read(WELLS.assign(plate='X' + WELLS.plate), partial=True))
    complains('the plate p1 (2 wells) without pictures', 'did you mean P1?', f=lambda: read(WELLS.assign(plate=WELLS.plate.replace('P1', 'p1')), partial=True))
    blank = pd.concat([WELLS, pd.DataFrame(dict(plate='P1', well=['F01'], sirna=[None]))])
    assert len(read(blank)[0]) == len(read(WELLS)[0])
    complains('1 well more than once (P1 B02)', f=lambda: read(pd.concat([WELLS, WELLS[:1]])))
    complains('no column of the well', f=lambda: read(WELLS.drop(columns='well')))
    complains('no rows', f=lambda: read(WELLS[:0]))
    complains('row 3: well is empty', f=lambda: read(WELLS.replace('C3', None)))
    complains('not a well name', f=lambda: read(WELLS.replace('b2', '22')))
    complains('_B02', "dataset is 'learn'", f=lambda: read(WELLS.replace('train', 'learn')))
    assert set(read(WELLS.replace('train', 'Train'))[0].dataset) == set(read(WELLS)[0].dataset)
    complains('well_type', "'odd'", f=lambda: read(WELLS.assign(well_type='odd')))
    complains('nowhere.csv', f=lambda: read('nowhere.csv'))


def test_wells_csv_that_is_none(two, tmp_path):
    for n, data in enumerate([b'', b'\xff\xfe\x00', b'plate,well\nP1,"B2\n', b'plate,well\n', b'PK\x03\x04']):
        (tmp_path/f'{n}.csv').write_bytes(data)
        complains(f'{n}.csv', f=lambda: read_plates(two, tmp_path/f'{n}.csv', **quiet))


@pytest.mark.parametrize('plates', [[1, 2], ['1', '2'], ['01', '02'], [1., 2.]])
def test_plate_numbers(tmp_path, plates):
    for n in (1, 2): write_plate(tmp_path/f'{n}.zarr', wells=['B/2'], fields=1)
    t, _ = read_plates(tmp_path, pd.DataFrame(dict(plate=plates, well='B02', sirna=['x', 'y'])), **quiet)
    assert t['plate'].tolist() == [1, 2] and t.sirna.tolist() == ['x', 'y']


def test_wells_give_the_experiment(two):
    t, _ = read_plates(two, WELLS.assign(experiment=['E1', None, 'E2', 'E2']), **quiet)
    assert t.site_id.iloc[[0, 2, 4]].tolist() == ['E1_P1_B02_1', 'E1_P1_C03_1', 'E2_P2_B02_1']
    w = WELLS.assign(experiment=['E1', 'E1', 'E2', 'E3'])
    complains('plate P2 in the experiments E2, E3', f=lambda: read_plates(two, w, **quiet))


def test_one_plate_name_in_two_experiments(tmp_path):
    for e in 'AB': write_plate(tmp_path/e/'P1.zarr', fields=1)
    w = pd.DataFrame(dict(plate='P1', well=['B02', 'C03'], sirna=['x', 'y']))
    complains('column experiment', f=lambda: read_plates([tmp_path/'A', tmp_path/'B'], w, **quiet))
    w = pd.concat([w.assign(experiment='A'), w.assign(experiment='B', sirna=['u', 'v'])])
    t, _ = read_plates([tmp_path/'A', tmp_path/'B'], w, **quiet)
    assert t.sirna.tolist() == ['x', 'y', 'u', 'v'] and t.experiment.tolist() == ['A', 'A', 'B', 'B']


# ---- without the packages

def test_packages_are_loaded_when_asked_and_their_absence_is_said(tmp_path):
    code = '''
import sys
import rcic_fastai.screen.plates as h
assert not {'zarr', 'ome_zarr', 'ome_zarr_models', 'pydantic_zarr'} & set(sys.modules), 'heavy import'
sys.modules['ome_zarr_models'] = None
try: h.read_plates(sys.argv[1])
except h.ScreenError as e: assert 'pip install "rcic_fastai[hcs]"' in str(e); print('said')
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == 'said', done.stderr
