"Screens of strangers: codecs that run code, a kilobyte that becomes gigabytes, pipes and devices in the place of files."
import bz2, gzip, json, os, pickle, struct, subprocess, sys, textwrap, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest
from rcic_fastai.core import ScreenError

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
    pytest.importorskip('ome_zarr_models')
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
    pytest.importorskip('ome_zarr_models')
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
        inner = dict(chunk_shape=(1, 8, 8), index_codecs=[BYTES])
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
    pytest.importorskip('ome_zarr_models')
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
    pytest.importorskip('ome_zarr_models')
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
    pytest.importorskip('ome_zarr_models')
    for path in ('../0', '/tmp', '.', 'a/../../b', 'a//b', 'a\\b', 'a\0b'):
        field = plate(tmp_path/'p.zarr', 2)
        doc = json.loads((field/'.zattrs').read_text())
        doc['multiscales'][0]['datasets'][0]['path'] = path
        (field/'.zattrs').write_text(json.dumps(doc))
        sentence(lambda: read_plates(tmp_path/'p.zarr', progress=False), 'B/2/0')
