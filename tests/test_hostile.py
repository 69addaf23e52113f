"Screens of strangers: codecs that run code, a kilobyte that becomes gigabytes, pipes and devices in the place of files."
import bz2, gzip, json, os, pickle, struct, subprocess, sys, textwrap, zlib
import numpy as np, pandas as pd, pytest
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.screen import Screen

POSIX = pytest.mark.skipif(os.name != 'posix', reason='pipes, devices and limits of memory are those of POSIX')

def sentence(f, *words):
    with pytest.raises(ScreenError) as e: f()
    said = str(e.value)
    for w in words: assert w in said, said
    assert '\n' not in said and said.endswith('.') and len(said) < 700, said

def limited(code, *args, room=300):
    "Run Python that may use `room` MB more than its imports"
    head = '''
        import resource, sys
        from pathlib import Path
        import numpy as np, pandas as pd
        from rcic_fastai.core import ScreenError
        def limit(room):
            used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room*2**20,)*2)
        def refused(name, f):
            try: f()
            except ScreenError as e:
                assert 'memory' not in str(e).lower() and 'alloc' not in str(e).lower(), (name, str(e))
                return print(name, 'refused')
            raise SystemExit(f'{name} was read')
        '''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(head) + textwrap.dedent(code.replace('ROOM', str(room))),
                           *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout.splitlines()

# ---- plates

def v2_array(folder, data, shape=(1, 8, 8), chunks=None, **how):
    "An image whose array is of zarr format 2, of one chunk"
    folder = folder/'0'; folder.mkdir(parents=True, exist_ok=True)
    meta = dict(zarr_format=2, shape=shape, chunks=chunks or shape, dtype='<u2', order='C', fill_value=0, compressor=None,
                filters=None, dimension_separator='.')
    (folder/'.zarray').write_text(json.dumps(meta | how))
    (folder/'.'.join('0'*len(shape))).write_bytes(data)

def v3_array(folder, data, shape=(1, 8, 8), chunks=None, codecs=(), **how):
    folder = folder/'0'; folder.mkdir(parents=True, exist_ok=True)
    keys = dict(name='v2', configuration=dict(separator='.'))
    meta = dict(zarr_format=3, node_type='array', shape=shape, data_type='uint16', fill_value=0, codecs=list(codecs), attributes={},
                chunk_grid=dict(name='regular', configuration=dict(chunk_shape=chunks or shape)), chunk_key_encoding=keys)
    (folder/'zarr.json').write_text(json.dumps(meta | how))
    (folder/'.'.join('0'*len(shape))).write_bytes(data)

BYTES = dict(name='bytes', configuration=dict(endian='little'))
def plate(root, fmt):
    "A plate of one field without its array; → the folder of the field"
    axes = [dict(name='c', type='channel'), dict(name='y', type='space'), dict(name='x', type='space')]
    scale = [dict(type='scale', scale=[1., 1., 1.])]
    docs = {'': dict(plate=dict(rows=[dict(name='B')], columns=[dict(name='2')], wells=[dict(path='B/2', rowIndex=0, columnIndex=0)])),
            'B': {}, 'B/2': dict(well=dict(images=[dict(path='0')])),
            'B/2/0': dict(multiscales=[dict(axes=axes, datasets=[dict(path='0', coordinateTransformations=scale)])])}
    docs['']['plate']['version'] = '0.4'
    for f, doc in docs.items():
        (root/f).mkdir(parents=True, exist_ok=True)
        if fmt == 2:
            (root/f/'.zgroup').write_text('{"zarr_format": 2}'); (root/f/'.zattrs').write_text(json.dumps(doc))
        else: (root/f/'zarr.json').write_text(json.dumps(dict(zarr_format=3, node_type='group', attributes=dict(ome=dict(version='0.5', **doc)))))
    return root/'B/2/0'

class Canary:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

STRANGE = ['pickle', 'msgpack2', 'json2', 'vlen-utf8', 'vlen-bytes', 'lzma', 'categorize', 'astype', 'fixedscaleoffset', 'quantize',
           'bitround', 'packbits', 'base64', 'zfpy', 'pcodec', 'no such codec', '../pickle', '', None, 7]
WHERE = {
    'v2 compressor': (2, lambda c: dict(compressor=dict(id=c))), 'v2 filter': (2, lambda c: dict(filters=[dict(id=c)])),
    'v2 second filter': (2, lambda c: dict(filters=[dict(id='delta', dtype='<u2'), dict(id=c)])),
    'v3': (3, lambda c: dict(codecs=[BYTES, dict(name=c)])), 'v3 numcodecs': (3, lambda c: dict(codecs=[BYTES, dict(name=f'numcodecs.{c}')])),
    'v3 array to array': (3, lambda c: dict(codecs=[dict(name=c), BYTES])), 'v3 array to bytes': (3, lambda c: dict(codecs=[dict(name=c)])),
    'v3 shard': (3, lambda c: dict(codecs=[shard(codecs=[BYTES, dict(name=c)])])),
    'v3 nested shard': (3, lambda c: dict(codecs=[shard(codecs=[shard(codecs=[BYTES, dict(name=c)])])])),
    'v3 index': (3, lambda c: dict(codecs=[shard(codecs=[BYTES], index_codecs=[BYTES, dict(name=c)])]))}
def shard(**how):
    return dict(name='sharding_indexed', configuration=dict(chunk_shape=(1, 8, 8), index_codecs=[BYTES, dict(name='crc32c')]) | how)

def put(root, where, codec, data):
    fmt, how = WHERE[where]
    field = plate(root, fmt)
    (v2_array if fmt == 2 else v3_array)(field, data, **how(codec))

@pytest.mark.parametrize('where', WHERE)
def test_codecs_of_a_plate_are_those_of_a_list(tmp_path, where):
    "Whatever else is named is refused when the plate is opened, and nothing is unpickled"
    from rcic_fastai.screen.plates import read_plates
    data = pickle.dumps(Canary(tmp_path/'ran'))
    for n, codec in enumerate(STRANGE):
        put(root := tmp_path/f'{n}.zarr', where, codec, data)
        name = [codec[:30]] if isinstance(codec, str) and 'numcodecs' not in where else []
        sentence(lambda: read_plates(root, progress=False), str(root), *name)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('dtype', ['|O', '<U9', '|S4', '<M8[ns]', [['a', '<u2']], '|V2', '<f2', '<i2', '<u4', 'object', None, {}, 7])
def test_pixels_of_a_plate_are_plain(tmp_path, dtype):
    from rcic_fastai.screen.plates import read_plates
    v2_array(plate(tmp_path/'2.zarr', 2), b'', dtype=dtype)
    v3_array(plate(tmp_path/'3.zarr', 3), b'', codecs=[BYTES], data_type=dtype)
    for p in ('2.zarr', '3.zarr'): sentence(lambda: read_plates(tmp_path/p, progress=False), p)

def bombs():
    "{name: (format, metadata, chunk)}: chunks of 128 bytes of pixels that hold 200 MB"
    from numcodecs import LZ4, Blosc, Zstd
    zeros = np.zeros(2*10**8, np.uint8)
    packed = dict(gzip=gzip.compress(zeros, 1), zlib=zlib.compress(zeros, 1), bz2=bz2.compress(bytes(10**8))*2, blosc=Blosc('zstd').encode(zeros),
                  lz4=LZ4().encode(zeros), zstd=Zstd().encode(zeros))
    twice = gzip.compress(packed['gzip'])
    yield 'gzip in gzip', 3, dict(codecs=[BYTES, 'gzip', 'gzip']), twice
    for name, data in packed.items():
        yield f'v2 {name}', 2, dict(compressor=dict(id=name)), data
        yield f'v2 delta {name}', 2, dict(compressor=dict(id=name), filters=[dict(id='delta', dtype='<u2')]), data
        yield f'v3 {name}', 3, dict(codecs=[BYTES, dict(name=name)]), data
        index = struct.pack('<QQ', 0, len(data))
        yield f'shard {name}', 3, dict(codecs=[shard(codecs=[BYTES, name], index_codecs=[BYTES])]), data + index

READ_PLATES = '''
    from rcic_fastai.screen.plates import read_plates, PlateSource
    import numcodecs, google_crc32c, pyarrow
    root, names = Path(sys.argv[1]), sys.argv[2:]
    table, source = read_plates(root/'fine.zarr', progress=False)
    assert (source[table.site_id[0]] == 5).all()
    limit(ROOM)
    def read(p):
        t, s = read_plates(p, progress=False)
        s[t.site_id[0]]
    for n in names: refused(n, lambda: read(root/f'{n}.zarr'))
'''

@POSIX
def test_a_small_chunk_stays_small(tmp_path):
    "Each codec and container, with room for less than what is packed"
    v2_array(plate(tmp_path/'fine.zarr', 2), np.full(64, 5, '<u2').tobytes())
    names = []
    for name, fmt, how, data in bombs():
        (v2_array if fmt == 2 else v3_array)(plate(tmp_path/f'{name}.zarr', fmt), data, **how)
        names.append(name)
    assert len(limited(READ_PLATES, tmp_path, *names, room=120)) == len(names) == 25

ABSURD = {
    'picture': dict(shape=(1, 2**20, 2**20), chunks=(1, 64, 64)), 'chunk': dict(shape=(1, 8, 8), chunks=(1, 2**20, 2**20)),
    'channels': dict(shape=(2**30, 8, 8), chunks=(2**30, 8, 8)), 'tiny chunks': dict(shape=(1, 8000, 8000), chunks=(1, 1, 1)),
    'beyond integers': dict(shape=(1, 2**63, 2**63), chunks=(1, 2**63, 2**63)), 'negative': dict(shape=(1, -8, 8), chunks=(1, 8, 8)),
    'zero': dict(shape=(1, 8, 8), chunks=(1, 0, 8)), 'text': dict(shape=(1, 8, 8), chunks='188')}

@POSIX
def test_absurd_shapes_of_plates(tmp_path):
    v2_array(plate(tmp_path/'fine.zarr', 2), np.full(64, 5, '<u2').tobytes())
    names = []
    for name, how in ABSURD.items():
        v2_array(plate(tmp_path/f'2 {name}.zarr', 2), b'', **how)
        v3_array(plate(tmp_path/f'3 {name}.zarr', 3), b'', codecs=[BYTES], **how)
        names += [f'2 {name}', f'3 {name}']
    inner = shard(codecs=[BYTES], chunk_shape=(1, 1, 1))
    v3_array(plate(tmp_path/'3 index.zarr', 3), b'', shape=(1, 8, 8), chunks=(1, 2**15, 2**15), codecs=[inner])
    sparse = plate(tmp_path/'3 sparse.zarr', 3)
    v3_array(sparse, b'', codecs=[BYTES, 'gzip'])
    os.truncate(sparse/'0/0.0.0', 2**40)
    long = plate(tmp_path/'2 long.zarr', 2)
    v2_array(long, b'')
    os.truncate(long/'0/.zarray', 2**40)
    limited(READ_PLATES, tmp_path, *names, '3 index', '3 sparse', '2 long')

def test_paths_in_a_plate_stay_in_it(tmp_path):
    from rcic_fastai.screen.plates import read_plates
    for path in ('../0', '/tmp', '.', 'a/../../b', 'a//b', 'a\\b', 'a\0b'):
        field = plate(tmp_path/'p.zarr', 2)
        doc = json.loads((field/'.zattrs').read_text())
        doc['multiscales'][0]['datasets'][0]['path'] = path
        (field/'.zattrs').write_text(json.dumps(doc))
        sentence(lambda: read_plates(tmp_path/'p.zarr', progress=False), 'B/2/0')

@pytest.mark.parametrize('fmt', [2, 3])
@pytest.mark.parametrize('depth', [300, 500, 700, 900, 2000, 10**5])
def test_lists_in_lists_in_the_metadata_of_a_field(tmp_path, fmt, depth):
    from rcic_fastai.screen.plates import read_plates
    field = plate(tmp_path/'p.zarr', fmt)
    (v2_array if fmt == 2 else v3_array)(field, np.full(64, 5, '<u2').tobytes(), **({} if fmt == 2 else dict(codecs=[BYTES])))
    doc = field/('.zattrs' if fmt == 2 else 'zarr.json')
    doc.write_text(doc.read_text().replace('"multiscales"', '"deep": ' + '['*depth + ']'*depth + ', "multiscales"'))
    try: read_plates(tmp_path/'p.zarr', progress=False)
    except ScreenError as e: assert 'B/2/0' in str(e) and '\n' not in str(e)
    else: assert depth < 1000

# ---- pictures

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def png(h, w, bits=8, data=None, extra=b''):
    from rcic_fastai.screen.images import PNG_SIGNATURE
    data = zlib.compress(bytes(h*(w*bits//8 + 1))) if data is None else data
    return PNG_SIGNATURE + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, 0, 0, 0, 0)) + extra + chunk(b'IDAT', data) + chunk(b'IEND', b'')

def tiff(h, w, data, compression=8, bits=8, samples=1, tile=None, **tags):
    "A TIFF of one page whose pixels are `data`, whatever else it says"
    entries = {256: w, 257: h, 258: bits, 259: compression, 262: 1, 277: samples}
    entries |= {322: tile[1], 323: tile[0], 324: 8, 325: len(data)} if tile else {273: 8, 278: h, 279: len(data)}
    entries |= {int(k[1:]): v for k, v in tags.items()}
    at = 8 + len(data) + len(data) % 2
    out = struct.pack('<2sHI', b'II', 42, at) + data + b'\0'*(len(data) % 2) + struct.pack('<H', len(entries))
    for k, v in sorted(entries.items()): out += struct.pack('<HHII', k, *((4, 1, v) if isinstance(v, int) else v))
    return out + bytes(4)

def pictures():
    "{name: file}: small, and each promises or holds more than 200 MB"
    zeros = bytes(2*10**8)
    packed = zlib.compress(zeros, 9)
    yield 'held.png', png(16, 16, data=packed)
    yield 'promised.png', png(30_000, 30_000, data=packed)
    yield 'promised16.png', png(2**31 - 1, 2**31 - 1, 16, data=packed)
    yield 'wide.png', png(1, 2**31 - 1, data=packed)
    for kind, start in ((b'iCCP', b'x\0\0'), (b'zTXt', b'x\0\0'), (b'iTXt', b'x\0\1\0\0\0')):
        yield f'fine {kind.decode()}.png', png(16, 16, extra=chunk(kind, start + packed))
    yield 'held.tif', tiff(16, 16, packed)
    yield 'promised.tif', tiff(30_000, 30_000, packed)
    yield 'tiles.tif', tiff(16, 16, packed, tile=(2**15, 2**15))
    yield 'tiles of nothing.tif', tiff(16, 16, b'12345678', 1, tile=(2**20, 2**20))
    yield 'samples.tif', tiff(2**13, 2**13, packed, samples=60_000)
    yield 'a row a page.tif', tiff(2**31, 1, packed)
    for code, data in ((5, b'\x80\x00\x00' + bytes(10**5)), (32773, b'\x81\x00'*10**5), (34925, lzma_zeros()), (50000, zstd_zeros())):
        yield f'{"fine " if code > 34000 else ""}held {code}.tif', tiff(16, 16, data, code)    # only the first strip is unpacked
        yield f'promised {code}.tif', tiff(2**15, 2**15, data, code)
    yield 'fine text.tif', tiff(16, 16, bytes(256), 1, t270=(2, 2**31, 8))
    yield 'offsets.tif', tiff(16, 16, bytes(256), 1, t273=(4, 2**29, 8), t279=(4, 2**29, 8))

def lzma_zeros():
    import lzma
    return lzma.compress(bytes(10**8))

def zstd_zeros():
    from numcodecs import Zstd
    return Zstd().encode(np.zeros(10**8, np.uint8))

@POSIX
def test_a_small_picture_stays_small(tmp_path):
    "PNG and TIFF, read by this thread and by another, with room for less than what is packed; sparse files too"
    names = []
    for name, data in pictures():
        (tmp_path/name).write_bytes(data)
        names.append(name)
        if name in ('fine text.tif', 'offsets.tif', 'held.png', 'held.tif'):
            names.append(sparse := 'sparse ' + name.removeprefix('fine '))
            (tmp_path/sparse).write_bytes(data)
            os.truncate(tmp_path/sparse, 2**33)
    code = '''
        from rcic_fastai.screen.tiff import read_planes
        from concurrent.futures import ThreadPoolExecutor
        import tifffile, time
        from PIL import Image
        folder, names = Path(sys.argv[1]), sys.argv[2:]
        def read(p):
            x = read_planes(p)
            if 'fine' in p.name and x.shape == (1, 16, 16): raise ScreenError('fine')
        with ThreadPoolExecutor(1) as pool:
            for p in [folder/n for n in names if 'fine' in n]: pool.submit(read_planes, p).result(); read_planes(p)
            limit(ROOM)
            for n in names:
                start = time.monotonic()
                refused(n, lambda: read(folder/n))
                refused(n, lambda: pool.submit(read, folder/n).result())
                assert time.monotonic() - start < 10, n
        '''
    assert len(limited(code, tmp_path, *names, room=150)) == 2*len(names)

def stack(n, h, w, tile):
    "A TIFF of `n` pages of h × w px, all in the same tile, which is larger than they are"
    data = zlib.compress(bytes(tile[0]*tile[1]), 9)
    entries = {256: w, 257: h, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile[1], 323: tile[0], 324: 8, 325: len(data)}
    out = struct.pack('<2sHI', b'II', 42, 8 + len(data) + len(data) % 2) + data + b'\0'*(len(data) % 2)
    for i in range(n):
        page = struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', k, 4, 1, v) for k, v in sorted(entries.items()))
        out += page + struct.pack('<I', (len(out) + len(page) + 4)*(i < n-1))
    return out

@POSIX
def test_a_small_stack_stays_small(tmp_path):
    "Tiles that are larger than the picture: a channel a page, and a row a page"
    for name, data in {'fine.tif': stack(16, 8, 8, (1024, 1024)), 'fine rows.tif': stack(100, 8, 6, (1024, 1024)),
                       'tiles.tif': stack(16, 8, 8, (8192, 8192)), 'rows.tif': stack(100, 8, 6, (8192, 8192))}.items():
        assert len(data) < 10**5
        (tmp_path/name).write_bytes(data)
    code = '''
        from rcic_fastai.screen.tiff import read_planes
        folder = Path(sys.argv[1])
        read_planes(folder/'fine.tif', 16)
        limit(ROOM)
        assert read_planes(folder/'fine.tif', 16).shape == (16, 8, 8) and read_planes(folder/'fine rows.tif', 6).shape == (6, 100, 8)
        refused('tiles.tif', lambda: read_planes(folder/'tiles.tif', 16))
        refused('rows.tif', lambda: read_planes(folder/'rows.tif', 6))
        '''
    assert len(limited(code, tmp_path, room=60)) == 2

# ---- tables

@POSIX
def test_a_small_table_stays_small(tmp_path, monkeypatch):
    "Text packed a thousandfold; a million rows in a kilobyte of parquet; a megabyte of text that a million rows point to"
    from rcic_fastai.screen import tables
    from rcic_fastai.screen.files import read_files
    monkeypatch.setattr(tables, '_MOST_TABLE', 10**6)
    text = b'Metadata_Plate,Metadata_Well,FileName_DNA\n' + b'P,A01,x\n'*2*10**5
    for name, pack in {'t.csv': bytes, 't.csv.gz': gzip.compress, 't.csv.bz2': bz2.compress}.items():
        (tmp_path/name).write_bytes(pack(text))
        sentence(lambda: read_files(tmp_path/name), name, '1,000,000')
    n = 2*10**5
    pd.DataFrame(dict(a=np.zeros(n, np.int8))).to_parquet(tmp_path/'rows.parquet')
    pd.DataFrame(dict(a=['x'*10**5]*100)).to_parquet(tmp_path/'text.parquet')
    assert all((tmp_path/f).stat().st_size < 2*10**5 for f in ('rows.parquet', 'text.parquet'))
    for f in ('rows.parquet', 'text.parquet'): sentence(lambda: read_files(tmp_path/f), f, 'more')

def packed_columns():
    "Columns of a hundred times more than a file of their size can hold without tricks, of every kind that has such"
    import pyarrow as pa
    long, n = 'x'*10**4, 1000
    kinds = dict(text=pa.array([long]*n), large=pa.array([long]*n, pa.large_string()), binary=pa.array([long.encode()]*n, pa.binary()),
                 dictionary=pa.array([long]*n).dictionary_encode(), fixed=pa.array([b'x'*10**3]*10*n, pa.binary(10**3)),
                 numbers=pa.array([[7]*2*10**6], pa.list_(pa.int64())), texts=pa.array([[long]*n]), of_lists=pa.array([[[long]]*n]),
                 structure=pa.array([dict(a=[dict(b=long)])]*n), keys=pa.array([[(long, 1)]]*n, pa.map_(pa.string(), pa.int8())))
    return {**kinds, **(dict(view=kinds['text'].cast(pa.string_view())) if hasattr(pa, 'string_view') else {})}

@pytest.mark.parametrize('kind', packed_columns())
def test_a_small_column_stays_small(tmp_path, monkeypatch, kind):
    import pyarrow as pa, pyarrow.parquet as pq
    from rcic_fastai.screen import tables
    f = tmp_path/'t.parquet'
    pq.write_table(pa.table(dict(some=[1]*len(packed_columns()[kind]), a=packed_columns()[kind])), f)
    whole = tables.read_parquet(f).a
    assert f.stat().st_size < 2*10**5 and len(whole) == len(packed_columns()[kind])
    monkeypatch.setattr(tables, '_MOST_TABLE', 10**6)
    sentence(lambda: tables.read_parquet(f), f.name, 'more')

def test_a_small_file_of_embeddings_stays_small(tmp_path, monkeypatch):
    "A few bytes do not become a billion numbers; a table that is as large as its file is read, whatever its size"
    from rcic_fastai.embed.table import make_emb_table, read_embeddings, write_embeddings
    from rcic_fastai.screen import tables
    monkeypatch.setattr(tables, '_MOST_TABLE', 10**5)
    n, rng = 10**6, np.random.default_rng(0)
    bomb = pd.DataFrame(dict(Metadata_site_id=['x'*100]*n, emb_0000=np.zeros(n, np.float32)))
    bomb.to_parquet(tmp_path/'bomb.parquet')
    assert (tmp_path/'bomb.parquet').stat().st_size < 10**5
    sentence(lambda: read_embeddings(tmp_path/'bomb.parquet'), 'bomb.parquet', 'more')
    good = make_emb_table(pd.DataFrame(dict(site_id=[f'a_{i}' for i in range(1000)])), rng.normal(size=(1000, 64)))
    assert write_embeddings(good, tmp_path/'good.parquet').stat().st_size > 2*10**5
    pd.testing.assert_frame_equal(read_embeddings(tmp_path/'good.parquet'), good, check_dtype=False)

# ---- packed screens

@pytest.fixture
def packed(tmp_path):
    from rcic_fastai.screen.images import PngTree
    from rcic_fastai.screen.pack import pack_screen
    from helpers import simulate_screen
    t = simulate_screen(tmp_path/'png', ['HUVEC-01'], sirnas=2, plates=1, size=32, controls=0, progress=False, n_workers=0)
    return pack_screen(Screen(t, PngTree(tmp_path/'png', t)), tmp_path/'packed', progress=False), t

def reseal(store):
    "Make the sums of a store right again"
    from rcic_fastai.screen.pack import _sums
    (store/'sums.json').write_text(json.dumps(_sums(store)))

@pytest.mark.parametrize('change', [lambda m: m['codecs'].insert(1, dict(name='numcodecs.pickle')), lambda m: m['codecs'].pop(),
                                    lambda m: m.update(codecs=[dict(name='vlen-utf8')]), lambda m: m.update(data_type='float32'),
                                    lambda m: m.update(data_type='object'), lambda m: m.update(shape=[1, 6, 2**20, 2**20]),
                                    lambda m: m.update(shape=[1, 6, -32, 32]), lambda m: m.update(shape=[1, 6, '32', 32])])
def test_metadata_of_packed_screens(packed, change):
    from rcic_fastai.screen.pack import PackedScreen
    file = packed[0]/'images/zarr.json'
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))
    reseal(packed[0])
    sentence(lambda: PackedScreen(packed[0]), 'images/zarr.json', 'does not describe')

@POSIX
def test_chunks_of_packed_screens_are_bounded(packed):
    "A chunk of a terabyte, and one that would become 200 MB: refused by reader and by verification"
    from numcodecs import blosc
    from google_crc32c import value as crc32c
    store, t = packed
    file = store/'images/c/0/0/0/0'
    bomb = blosc.compress(np.zeros(2*10**8, np.uint8), b'zstd', 5, 0)
    file.write_bytes(bomb + crc32c(bomb).to_bytes(4, 'little'))
    chunks = pd.read_parquet(store/'chunks.parquet')
    chunks.iloc[0, chunks.columns.get_loc('crc32c')] = crc32c(bomb)
    chunks.to_parquet(store/'chunks.parquet')
    reseal(store)
    os.truncate(store/'images/c/1/0/0/0', 2**40)
    code = '''
        from rcic_fastai.screen.pack import PackedScreen, verify_store
        s = PackedScreen(sys.argv[1])
        s[s.site_ids[2]]
        limit(ROOM)
        for i in s.site_ids[:2]: refused(i, lambda: s[i])
        refused('verify', lambda: verify_store(sys.argv[1], workers=1, progress=False))
        '''
    assert len(limited(code, store, room=150)) == 3

# ---- pipes, devices and folders in the place of files

ODD = dict(pipe=os.mkfifo if hasattr(os, 'mkfifo') else None, device=lambda p: os.symlink('/dev/zero', p), folder=os.mkdir,
           terabyte=lambda p: (open(p, 'w').close(), os.truncate(p, 2**40)))

def readers(d):
    "{what: (file to replace, what reads it)}; each reads once while it is whole"
    from rcic_fastai.model.backbones import read_weights
    from rcic_fastai.embed.table import read_embeddings, write_embeddings
    from rcic_fastai.predict.predict import read_predictions, write_predictions
    from rcic_fastai.screen.files import read_files
    from rcic_fastai.screen.images import PngTree
    from rcic_fastai.screen.pack import PackedScreen, pack_screen, verify_store
    from helpers import simulate_screen
    from rcic_fastai.screen.tables import read_metadata
    from rcic_fastai.train.recipes import RECIPES, get_recipe
    import tifffile, torch
    t = simulate_screen(d/'png', ['HUVEC-01'], sirnas=2, plates=1, size=32, controls=0, progress=False, n_workers=0)
    site, first = t.site_id[0], d/f'png/images/train/HUVEC-01/Plate1/{t.well[0]}_s1_w1.png'
    store = pack_screen(Screen(t, PngTree(d/'png', t)), d/'packed', progress=False)
    yield 'png', first, lambda: PngTree(d/'png', t)[site]
    yield 'png, other first', first, lambda: PngTree(d/'png', t, size=32)[site]
    yield 'metadata.csv', d/'png/metadata.csv', lambda: read_metadata(d/'png')
    yield 'chunk', store/'images/c/0/0/0/0', lambda: PackedScreen(store)[site]
    yield 'verified chunk', store/'images/c/0/0/0/0', lambda: verify_store(store, progress=False)
    for f in ('zarr.json', 'images/zarr.json', 'sums.json', 'pack.json', 'sites.parquet', 'stats.parquet', 'chunks.parquet'):
        yield f, store/f, lambda: PackedScreen(store)
    files = pd.DataFrame(dict(plate='P', well=['A01', 'A02'], file=['a.tif', 'b.png'], channel='DNA'))
    tifffile.imwrite(d/'a.tif', np.ones((8, 8), np.uint8)); (d/'b.png').write_bytes(png(8, 8))
    files.to_csv(d/'files.csv', index=False); files.to_parquet(d/'files.parquet')
    sites_of = lambda f: (lambda s: [s[1][i] for i in s[0].site_id])(read_files(d/f))
    for f in ('a.tif', 'b.png', 'files.csv'): yield f, d/f, lambda: sites_of('files.csv')
    yield 'files.parquet', d/'files.parquet', lambda: sites_of('files.parquet')
    kaggle = t.drop_duplicates('well_id').rename(columns=dict(well_id='id_code'))[['id_code', 'experiment', 'plate', 'well', 'sirna']]
    (d/'kaggle').mkdir(); kaggle.to_csv(d/'kaggle/train.csv', index=False)
    pd.DataFrame(dict(sirna_int=[1], sirna_name=['x'])).to_csv(d/'kaggle/sirna_int_to_name.csv', index=False)
    pd.DataFrame(dict(experiment=['HUVEC-01'], group_plate1=[0])).to_csv(d/'kaggle/groups.csv', index=False)
    for f in ('train.csv', 'sirna_int_to_name.csv', 'groups.csv'):
        yield f, d/'kaggle'/f, lambda: read_metadata(d/'kaggle', plate_groups=d/'kaggle/groups.csv')
    pred = pd.DataFrame(dict(id_code=['a'], sirna=['x'], top_1=['x'], protocol='inductive'))
    write_predictions(pred, d/'pred.csv')
    for f in ('pred.csv', 'pred.json', 'pred.top.csv'): yield f, d/f, lambda: read_predictions(d/'pred.csv').top_1[0]
    (d/'recipe.json').write_text(json.dumps(next(iter(RECIPES.values())).to_dict()))
    yield 'recipe', d/'recipe.json', lambda: get_recipe(str(d/'recipe.json'))
    torch.save({'a': torch.ones(1)}, d/'w.pth')
    yield 'weights', d/'w.pth', lambda: read_weights(d/'w.pth')
    e = pd.DataFrame(dict(Metadata_site_id=['a'], emb_0000=np.ones(1, np.float32)))
    write_embeddings(e, d/'e.parquet')
    yield 'embeddings', d/'e.parquet', lambda: read_embeddings(d/'e.parquet')
    try: import ome_zarr_models     # is it there?
    except ImportError: return
    from rcic_fastai.screen.plates import read_plates
    sources = lambda p, **kw: (lambda s: [s[1][i] for i in s[0].site_id])(read_plates(p, progress=False, **kw))
    pd.DataFrame(dict(plate=['3'], well=['B2'], sirna=['x'])).to_csv(d/'wells.csv', index=False)
    v2_array(plate(d/'2.zarr', 2), bytes(128)); v3_array(plate(d/'3.zarr', 3), bytes(128), codecs=[BYTES])
    for f in ('.zattrs', '.zgroup', 'B/2/.zattrs', 'B/2/0/.zattrs', 'B/2/0/.zgroup', 'B/2/0/0/.zarray', 'B/2/0/0/0.0.0'):
        yield f'2.zarr/{f}', d/'2.zarr'/f, lambda: sources(d/'2.zarr')
    for f in ('zarr.json', 'B/2/zarr.json', 'B/2/0/zarr.json', 'B/2/0/0/zarr.json', 'B/2/0/0/0.0.0'):
        yield f'3.zarr/{f}', d/'3.zarr'/f, lambda: sources(d/'3.zarr', wells=d/'wells.csv')
    yield 'wells.csv', d/'wells.csv', lambda: sources(d/'3.zarr', wells=d/'wells.csv')

@POSIX
@pytest.mark.parametrize('how', ODD)
def test_what_is_no_file_is_refused_at_once(tmp_path, how):
    "In the place of every file that is read of a screen: one sentence, within 5 seconds; a link to the file is read"
    import signal
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    for what, file, read in readers(tmp_path):
        kept = file.with_name(file.name + '.kept')
        read()
        file.rename(kept)
        if how == 'pipe':
            file.symlink_to(kept.name)
            read()
            file.unlink()
        ODD[how](file)
        signal.alarm(5)
        try: sentence(read)
        except TimeoutError: pytest.fail(f'{what}: waits for a {how}')
        except BaseException as e: raise AssertionError(f'{what}: {how}') from e
        finally: signal.alarm(0)
        file.rmdir() if how == 'folder' else file.unlink()
        kept.rename(file)
