"Screens at addresses: the right pixels or one sentence, whatever the server does."
import json, os, pickle, shutil, sys, threading, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, tifffile, zarr
from far import Far
from helpers import learner, refused, start_python
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
import rcic_fastai.folder                # learn.to_model
from rcic_fastai.core import is_remote, write_atomic
from rcic_fastai.screen import remote
from rcic_fastai.screen.files import read_files
from rcic_fastai.screen.open import open_screen, screen_kind
from rcic_fastai.screen.pack import PackedScreen, pack_screen, verify_store
from rcic_fastai.screen.plates import read_plates
from rcic_fastai.screen.remote import *
from rcic_fastai.screen.simulate.layout import simulate_screen

needs_obstore = pytest.mark.extra('obstore')
STAINS = ['DNA', 'ER']


@pytest.fixture(scope='module')
def far(tmp_path_factory):
    "A bucket with a packed screen, a plate, and JUMP's kind of table"
    d = tmp_path_factory.mktemp('far')
    simulate_screen(d/'png', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, size=32, plates=1, controls=1, progress=False)
    pack_screen(open_screen(d/'png'), d/'bucket/screen.zarr', progress=False)
    plate(d/'bucket/exp/P1.zarr')
    plate(d/'bucket/exp/P2.zarr', shards=True)
    table(d/'bucket/cpg/images/BR1', 's3://bucket/cpg/images/BR1/').to_csv(d/'load_data.csv', index=False)
    with Far(d, page=7) as server: yield server

@pytest.fixture(autouse=True)
def fresh(monkeypatch, request):
    "Little patience, and a server that has no faults"
    monkeypatch.setattr(remote, 'PATIENCE', dict(connect=2, silence=1, retries=3, minutes=1))
    remote._store.cache_clear()
    remote._reached.clear()
    for k in [k for k in os.environ if k.startswith(('AWS_', 'GOOGLE_'))]: monkeypatch.delenv(k)
    if 'far' in request.fixturenames:
        far = request.getfixturevalue('far')
        monkeypatch.setenv('AWS_ENDPOINT_URL', far.url)
        far.fault, far.lists, far.delay = lambda *a: None, True, 0.
        far.forget()

def plate(path, wells=('B/02', 'B/03'), shards=False):
    "An OME-Zarr plate of format 0.5, two channels, a field in a well"
    rng = np.random.default_rng(0)
    def group(at, ome): zarr.create_group(str(path/at), zarr_format=3, attributes=dict(ome=dict(version='0.5', **ome)))
    group('', dict(plate=dict(name=path.stem, rows=[dict(name='B')], columns=[dict(name='02'), dict(name='03')],
                              wells=[dict(path=w, rowIndex=0, columnIndex=i) for i, w in enumerate(wells)])))
    for w in wells:
        group(w, dict(well=dict(images=[dict(path='0')])))
        axes = [dict(name='c', type='channel'), dict(name='y', type='space'), dict(name='x', type='space')]
        how = [dict(type='scale', scale=[1., 1., 1.])]
        group(f'{w}/0', dict(multiscales=[dict(axes=axes, datasets=[dict(path='0', coordinateTransformations=how)])],
                             omero=dict(channels=[dict(label=s, color='FFFFFF', window=dict(min=0, max=255, start=0, end=255)) for s in STAINS])))
        more = dict(chunks=(1, 8, 8), shards=(1, 16, 16)) if shards else dict(chunks=(1, 16, 16))
        a = zarr.create_array(str(path/w/'0/0'), shape=(2, 16, 16), dtype='uint16', zarr_format=3, compressors=None, **more)
        a[:] = rng.integers(1, 4000, (2, 16, 16)).astype('u2')

def table(folder, address, wells=('A01', 'A02', 'B01'), sites=(1, 2)):
    "Write TIFFs, and return the rows of load_data.csv"
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(1), []
    for w in wells:
        for s in sites:
            row = dict(Metadata_Plate='BR1', Metadata_Well=w, Metadata_Site=s)
            for c in STAINS:
                row[f'FileName_Orig{c}'], row[f'PathName_Orig{c}'] = f'r {w}+{s}-{c}.tif', address
                tifffile.imwrite(folder/row[f'FileName_Orig{c}'], rng.integers(100, 4000, (24, 24)).astype('u2'))
            rows.append(row)
    return pd.DataFrame(rows)

def same_pixels(a, b):
    assert a.site_ids == b.site_ids
    for i in a.site_ids: np.testing.assert_array_equal(a[i], b[i])

def addresses(far): return ['s3://bucket', f'{far.url}/bucket']

# ---- addresses

def test_addresses_are_told_from_paths():
    assert [is_remote(o) for o in ('s3://a/b', Path('s3://a/b'), 'gs://a', 'https://a/b', 's3:', 'a/s3://b', r'C:\s3', 'ftp://a')] == [True]*4 + [False]*4
    assert str(as_path(Path('HTTPS://a.org/b'))) == 'https://a.org/b' and str(as_path('s3://a/b/')/'c') == 's3://a/b/c'
    a = pickle.loads(pickle.dumps(as_path('s3://a/b.zarr')))
    assert str(a) == 's3://a/b.zarr' and (a.name, a.suffix, str(a.parent)) == ('b.zarr', '.zarr', 's3://a')

@pytest.mark.parametrize('out', ['s3://bucket/x.zarr', Path('s3://bucket/x.zarr')])
def test_nothing_is_written_to_an_address(out, tmp_path, monkeypatch, screen):
    monkeypatch.chdir(tmp_path)
    refused(lambda: write_atomic(out, lambda p: p.write_text('')), 'written on disks only')
    refused(lambda: pack_screen(screen, out, progress=False), 'written on disks only')
    assert not list(tmp_path.iterdir())

def test_without_obstore_the_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'obstore', None)
    monkeypatch.setitem(sys.modules, 'obstore.store', None)
    for address in ('s3://bucket/screen.zarr', 'https://a.org/load_data.csv', 'gs://bucket/plate.zarr'):
        refused(lambda: open_screen(address), 'pip install "rcic_fastai[remote]"')

@needs_obstore
def test_what_is_not_read_at_an_address(tmp_path):
    refused(lambda: open_screen('s3://b/folder', pattern='{well}.tif'), 'is for a folder on the disk')
    refused(lambda: read_remote('https://a.org/a.tif?token=1'), 'has a query')
    refused(lambda: read_files(pd.DataFrame(dict(plate=1, well='A01', file=['azure://a/b.tif'], channel='DNA')), tmp_path), 'addresses that are not read', 'replace=')

# ---- every kind of screen

@needs_obstore
def test_a_packed_screen_is_the_same_anywhere(far):
    here = open_screen(far.folder/'bucket/screen.zarr')
    for top in addresses(far):
        there = open_screen(f'{top}/screen.zarr')
        assert there.name == f'{top}/screen.zarr' and there.fingerprint == here.fingerprint
        pd.testing.assert_frame_equal(there.table, here.table)
        pd.testing.assert_frame_equal(there.source.stats, here.source.stats)
        same_pixels(there.source, here.source)
        same_pixels(pickle.loads(pickle.dumps(there.source)), here.source)
        assert verify_store(f'{top}/screen.zarr', here, progress=False) == len(here)
    assert not far.signed       # anonymous

@needs_obstore
def test_keys_in_the_environment_are_used(far, monkeypatch):
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'me')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    read_remote('s3://bucket/screen.zarr/zarr.json')
    assert far.signed

@needs_obstore
def test_google(far, monkeypatch):
    key = dict(gcs_base_url=far.url, disable_oauth=True, client_email='', private_key='', private_key_id='')
    monkeypatch.setenv('GOOGLE_SERVICE_ACCOUNT_KEY', json.dumps(key))
    same_pixels(PackedScreen('gs://bucket/screen.zarr'), PackedScreen(far.folder/'bucket/screen.zarr'))

@needs_obstore
def test_plates_are_the_same_anywhere(far):
    here, source = read_plates(far.folder/'bucket/exp', progress=False)
    for given in ('s3://bucket/exp', [f'{far.url}/bucket/exp/P{i}.zarr' for i in (1, 2)]):
        t, there = read_plates(given, progress=False)
        pd.testing.assert_frame_equal(t, here)
        same_pixels(there, source)
        assert not len(there.missing()) and 'absent' not in map(there.stamp, there.site_ids)
    assert screen_kind('s3://bucket/exp/P1.zarr') == 'plates' and len(open_screen('s3://bucket/exp/P1.zarr', progress=False)) == 2
    refused(lambda: open_screen(f'{far.url}/bucket/exp'), 'does not list')
    refused(lambda: open_screen('s3://bucket/nothing'), 'Nothing that can be read is at', 'no packed screen', 'correct the address')
    refused(lambda: read_plates(['s3://bucket/exp', far.folder/'bucket/exp/P1.zarr'], progress=False), 'on the disk and others elsewhere')

@needs_obstore
def test_one_chunk_is_one_request_and_a_shard_is_read_in_parts(far):
    t, source = read_plates('s3://bucket/exp', progress=False)
    whole, sharded = t.site_id[0], t.site_id[2]
    far.forget()
    source[whole]
    assert (far.n('GET'), far.n('HEAD')) == (2, 0)
    far.forget()
    source[sharded]
    assert far.n('HEAD') == 2 and far.n('GET') == 2*(1 + 4)

@needs_obstore
def test_a_table_of_files_is_packed_from_addresses(far, tmp_path, capsys):
    whole = pd.read_csv(far.folder/'load_data.csv', dtype=str)
    local = whole.assign(**{f'PathName_Orig{c}': str(far.folder/'bucket/cpg/images/BR1') for c in STAINS})
    t, here = read_files(local)
    for top in addresses(far):
        out, csv = (tmp_path/f'{len(top)}.{end}' for end in ('zarr', 'csv'))
        whole.replace(r'^s3://bucket', top, regex=True).to_csv(csv, index=False)
        assert cli.rcic_pack([str(csv), str(out), '--cache', str(tmp_path/'cache')]) == 0, capsys.readouterr().err
        same_pixels(PackedScreen(out), here)
    # the table may lie there, too, with paths that start from it
    whole.drop(columns=[f'PathName_Orig{c}' for c in STAINS]).to_csv(far.folder/'bucket/cpg/images/BR1/load_data.csv', index=False)
    same_pixels(open_screen('s3://bucket/cpg/images/BR1/load_data.csv').source, here)
    assert len(list((tmp_path/'cache').rglob('*.tif'))) == 2*here._names.size

@needs_obstore
def test_training_and_prediction_read_an_address(far, tmp_path):
    screen = open_screen('s3://bucket/screen.zarr')
    dls = screen_dls(screen, valid='HUVEC-02', bs=4, device='cpu')
    assert dls.train.threads == REQUESTS and dls.train.fake_l.num_workers == 0
    model = learner(dls).to_model(tta=1, progress=False)
    here = model.profiles(far.folder/'bucket/screen.zarr', tta=1, progress=False)
    pd.testing.assert_frame_equal(model.profiles('s3://bucket/screen.zarr', tta=1, progress=False), here)
    model.profile_file('s3://bucket/screen.zarr', tmp_path/'a.parquet', tta=1, progress=False)
    plates = open_screen('s3://bucket/exp', progress=False)
    assert screen_dls(plates[plates.table.assign(sirna=['a', 'b']*2, sirna_id=[0, 1]*2)], valid='none', bs=2, device='cpu', num_workers=2).train.fake_l.num_workers == 0

# ---- servers that fail

FAULTS = ['503', '500', 'cut', 'stall']

@needs_obstore
@pytest.mark.parametrize('fault', FAULTS)
def test_a_server_that_fails_now_and_then(far, fault):
    far.fault = lambda method, key, n: fault if n == 1 else None        # every file once
    here = PackedScreen(far.folder/'bucket/screen.zarr')
    ids = here.site_ids[:3]
    for top in addresses(far):
        far.forget()
        there = PackedScreen(f'{top}/screen.zarr')
        for i in ids: np.testing.assert_array_equal(there[i], here[i])

@needs_obstore
@pytest.mark.parametrize('fault', [*FAULTS, '403', '404', 'short', 'other'])
def test_a_server_that_always_fails_is_a_sentence(far, fault):
    there = [PackedScreen(f'{top}/screen.zarr') for top in addresses(far)]
    plates = [read_plates(f'{top}/exp/P1.zarr', progress=False)[1] for top in addresses(far)]
    far.fault = lambda method, key, n: fault
    for source in (*there, *(plates if fault != 'other' else ())):      # uncompressed pixels without a checksum: nobody can tell zeros
        refused(lambda: source[source.site_ids[0]], source.site_ids[0] if fault in ('404', 'short', 'other') else '127.0.0.1' if 'http' in str(source.root) else 's3://bucket')
    for top in addresses(far): refused(lambda: open_screen(f'{top}/screen.zarr'))

@needs_obstore
def test_what_is_not_permitted_is_never_filled(far):
    "A chunk that is absent may be read as zeros; one that is refused must not"
    t, source = read_plates('s3://bucket/exp/P1.zarr', empty='fill', progress=False)
    far.fault = lambda method, key, n: '404' if '/c/0/' in key else None
    assert not source[t.site_id[0]][0].any() and source[t.site_id[0]][1].any()
    for fault in ('403', '503', 'cut'):
        far.fault = lambda method, key, n: fault if '/c/0/' in key else None
        refused(lambda: source[t.site_id[0]], 's3://bucket/exp/P1.zarr/')

@needs_obstore
def test_a_server_without_ranges_or_with_403_for_what_is_absent(far):
    source = read_plates('s3://bucket/exp/P2.zarr', progress=False)[1]
    far.fault = lambda method, key, n: 'no ranges'
    refused(lambda: source[source.site_ids[0]])
    far.fault = lambda method, key, n: None if (far.folder/key).exists() else '403'
    assert len(read_plates('s3://bucket/exp/P2.zarr', progress=False)[0]) == 2
    refused(lambda: open_screen('s3://bucket/private'), 'does not permit it')

@needs_obstore
def test_no_server(monkeypatch):
    start = time.monotonic()
    refused(lambda: open_screen('http://127.0.0.1:9/screen.zarr'), 'cannot be reached')
    monkeypatch.setattr(remote, 'PATIENCE', dict(connect=10, silence=30, retries=10, minutes=5))
    remote._store.cache_clear()
    refused(lambda: open_screen('http://127.0.0.1:9/screen.zarr'), 'cannot be reached')
    assert time.monotonic() - start < 15

@needs_obstore
def test_requests_at_once_are_bounded(far):
    here = PackedScreen(far.folder/'bucket/screen.zarr')
    there, far.delay = PackedScreen('s3://bucket/screen.zarr'), .05
    far.forget()
    ids = (here.site_ids*4)[:80]
    out = np.empty((len(ids), *here.shape), here.dtype)
    there.read_into(ids, out, threads=40)
    assert 8 <= far.most <= REQUESTS
    np.testing.assert_array_equal(out, here.read_into(ids, np.empty_like(out)))

FORKED = '''
import os, sys
from rcic_fastai.screen.remote import read_remote
read_remote(sys.argv[1])
pid = os.fork()
if not pid:
    try: read_remote(sys.argv[1])
    except Exception as e: print(type(e).__name__, e, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
'''

@needs_obstore
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
def test_a_forked_process_says_so_and_does_not_wait_for_ever(far):
    done = start_python(FORKED, 's3://bucket/screen.zarr/zarr.json').wait(60)
    assert 'ScreenError' in done.stdout and 'let threads read' in done.stdout, done.stdout + done.stderr[-2000:]

# ---- packing from a bucket

def pack(far, tmp_path, *more): return cli.rcic_pack([str(o) for o in (far.folder/'load_data.csv', tmp_path/'a.zarr', *more)])

@needs_obstore
def test_an_interrupted_pack_continues_and_fetches_the_rest(far, tmp_path, capsys):
    far.fault = lambda method, key, n: '503' if 'B01+2-ER' in key and n > 1 else None      # not when headers are looked at
    assert pack(far, tmp_path, '--workers', 1) == 2
    assert '503' in capsys.readouterr().err and (tmp_path/'a.zarr.part').is_dir() and not (tmp_path/'a.zarr').exists()
    assert len((tmp_path/'a.zarr.part/journal').read_text().split('\n')) > 3
    far.fault = lambda *a: None
    assert pack(far, tmp_path) == 0
    whole = tmp_path/'whole'
    whole.mkdir()
    assert pack(far, whole) == 0
    for p in (tmp_path/'a.zarr').rglob('*'):
        if p.is_file(): assert p.read_bytes() == (whole/'a.zarr'/p.relative_to(tmp_path/'a.zarr')).read_bytes(), p

@needs_obstore
def test_a_file_that_changed_meanwhile_is_packed_again(far, tmp_path, capsys):
    name = far.folder/'bucket/cpg/images/BR1/r A01+1-DNA.tif'
    old = name.read_bytes()
    far.fault = lambda method, key, n: '503' if 'B01+2-ER' in key and n > 1 else None      # not when headers are looked at
    try:
        assert pack(far, tmp_path, '--workers', 1) == 2 and (tmp_path/'a.zarr.part/journal').exists()
        new = np.full((24, 24), 7, 'u2')
        tifffile.imwrite(name, new)
        os.utime(name, (time.time() + 5,)*2)
        far.fault = lambda *a: None
        assert pack(far, tmp_path) == 0
        store = PackedScreen(tmp_path/'a.zarr')
        np.testing.assert_array_equal(store[store.site_ids[0]][0], new)
    finally: name.write_bytes(old)

@needs_obstore
def test_the_cache_is_read_the_next_time_and_never_half_written(far, tmp_path):
    cache = tmp_path/'cache'
    t, here = read_files(far.folder/'load_data.csv', cache=cache)
    pixels = [here[i] for i in here.site_ids]
    kept = sorted(p for p in cache.rglob('*') if p.is_file())
    assert len(kept) == 12 and kept[0].parent == cache/'s3/bucket/cpg/images/BR1' and not [p for p in kept if p.name.startswith('.')]
    far.forget()
    again = read_files(far.folder/'load_data.csv', cache=cache)[1]
    for i, x in zip(again.site_ids, pixels): np.testing.assert_array_equal(again[i], x)
    assert sum(n for (m, k), n in far.asked.items() if k.endswith('.tif')) == 0        # a list, and no file
    kept[0].write_bytes(kept[0].read_bytes()[:99])                                     # someone cut it
    for i, x in zip(again.site_ids, pixels): np.testing.assert_array_equal(again[i], x)
    for fault in ('cut', 'short'):
        shutil.rmtree(cache, ignore_errors=True)
        far.fault = lambda method, key, n: fault if method == 'GET' and key.endswith('.tif') else None
        refused(lambda: again[again.site_ids[0]])
        assert not any(files for *_, files in os.walk(cache))

@needs_obstore
def test_two_threads_fetch_a_file_once(far, tmp_path):
    far.delay = .05
    address, got = 's3://bucket/cpg/images/BR1/r A01+1-DNA.tif', []
    threads = [threading.Thread(target=lambda: got.append(cached(address, tmp_path).read_bytes())) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert set(got) == {(far.folder/address[5:]).read_bytes()} and len(got) == 6 and far.n('GET') == 1

@needs_obstore
@pytest.mark.parametrize('lists', [True, False])
def test_absent_files_are_named(far, tmp_path, lists, capsys):
    far.lists = lists
    d = pd.read_csv(far.folder/'load_data.csv', dtype=str)
    d.loc[0, 'FileName_OrigER'] = 'gone.tif'
    d.to_csv(tmp_path/'load_data.csv', index=False)
    assert cli.rcic_pack([str(tmp_path/'load_data.csv'), str(tmp_path/'a.zarr')]) == 2
    said = capsys.readouterr().err
    assert '1 of 6 sites lack channel files (s3://bucket/cpg/images/BR1/gone.tif)' in said and '--only-present' in said
    assert cli.rcic_pack([str(tmp_path/'load_data.csv'), str(tmp_path/'a.zarr'), '--only-present']) == 0
    assert len(PackedScreen(tmp_path/'a.zarr')) == 5

@needs_obstore
def test_a_dry_run_reads_no_more_than_it_says(far, capsys):
    assert cli.rcic_pack([str(far.folder/'load_data.csv'), 'x.zarr', '--dry-run']) == 0
    assert 'pictures: 6 sites of 24×24 px, 16 bits, 2 channels (DNA, ER)' in capsys.readouterr().out

# ---- what is read is what was named, in one version

def test_a_key_is_kept_byte_for_byte():
    for text in ('s3://b/a//b', 's3://b/a/./b', 's3://b//a', r's3://b/a\b', 'gs://b/a///b.tif'):
        assert str(as_path(text)) == text and str(as_path(as_path(text))) == text, text
    assert str(as_path('s3://b/a')/'c//d.tif') == 's3://b/a/c//d.tif' and str(as_path('s3://b/a//b').parent) == 's3://b/a/'
    assert str(pickle.loads(pickle.dumps(as_path('s3://b/a//b')))) == 's3://b/a//b'

@needs_obstore
def test_another_key_is_never_read_instead(far):
    (far.folder/'bucket/a').mkdir()
    (far.folder/'bucket/a/b.txt').write_bytes(b'of another key')
    for key in ('a//b.txt', 'a/./b.txt', '/a/b.txt'): refused(lambda: read_remote(f's3://bucket/{key}'), 'empty or dotted part')
    assert read_remote('s3://bucket/a/b.txt') == b'of another key'

@needs_obstore
@pytest.mark.parametrize('size', [8, 12])
def test_parts_of_two_versions_are_not_mixed(far, size):
    f = far.folder/'bucket/parts.bin'
    f.write_bytes(b'a'*8)
    file = RemoteFile('s3://bucket/parts.bin')
    assert file[0:4] == b'aaaa'
    f.write_bytes(b'b'*size)
    refused(lambda: file[4:8], 'parts.bin changed while it was read')
