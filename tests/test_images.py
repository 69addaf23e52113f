"Images: damaged and odd files, folder layouts, missing files, exact statistics."
import io, os, pickle, shutil
import cv2, numpy as np, pandas as pd, pytest
from PIL import Image
from helpers import refused
from rcic_fastai.screen.images import *
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import CHANNELS, read_metadata, real_data

real = pytest.mark.real('images')


def site_table(experiments=('HUVEC-01',), plates=(1, 2), wells=('B02', 'C03'), sites=(1, 2), dataset='train'):
    return pd.DataFrame([dict(site_id=f'{e}_{p}_{w}_{s}', well_id=f'{e}_{p}_{w}', cell_type=e.split('-')[0],
                              dataset=dataset,
                              experiment=e, plate=p, well=w, site=s)
                         for e in experiments for p in plates for w in wells for s in sites])


def write_tree(root, table, base='images/train', channels=6, size=16, dtype=np.uint8, seed=0):
    "Random pictures; → {site_id: array}"
    rng, pixels = np.random.default_rng(seed), {}
    for r in table.itertuples():
        folder = root/base/r.experiment/f'Plate{r.plate}'
        folder.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, np.iinfo(dtype).max, (channels, size, size), dtype, endpoint=True)
        for c in range(channels): cv2.imwrite(str(folder/f'{r.well}_s{r.site}_w{c+1}.png'), x[c])
        pixels[r.site_id] = x
    return pixels


@pytest.fixture
def tree(tmp_path):
    table = site_table()
    return tmp_path, table, write_tree(tmp_path, table)


def png(img, **kw):
    out = io.BytesIO(); img.save(out, 'png', **kw); return out.getvalue()


FILE = 'images/train/HUVEC-01/Plate1/B02_s1_w3.png'


# ---- one file

def test_every_bit_flip_is_refused():
    "All bits of a small PNG, one at a time: signature, lengths, types, header, data, checksums"
    data = cv2.imencode('.png', np.random.default_rng(0).integers(0, 255, (7, 9), np.uint8, endpoint=True))[1].tobytes()
    assert check_png(data) == (9, 7, 8, 0)
    for i in range(len(data)):
        for bit in range(8):
            bad = bytearray(data); bad[i] ^= 1 << bit
            with pytest.raises(ScreenError, match='x.png'): check_png(bytes(bad), 'x.png')


def test_every_truncation_is_refused():
    data = cv2.imencode('.png', np.zeros((8, 8), np.uint8))[1].tobytes()
    for n in range(len(data)):
        with pytest.raises(ScreenError): check_png(data[:n])
    check_png(data + b'garbage after the end')


@pytest.mark.parametrize('seed', range(5))
def test_random_bytes_are_refused(seed):
    rng = np.random.default_rng(seed)
    for n in (0, 1, 8, 33, 400):
        with pytest.raises(ScreenError): check_png(rng.bytes(n))
        with pytest.raises(ScreenError): check_png(PNG_SIGNATURE + rng.bytes(n))


@pytest.mark.parametrize('mode,word', [('RGB', 'RGB color'), ('RGBA', 'alpha'), ('P', 'palette'),
                                       ('LA', 'alpha'), ('1', '1 bits')])
def test_kinds_that_are_not_a_channel(mode, word):
    with pytest.raises(ScreenError, match=word): decode_png(png(Image.new('L', (8, 8)).convert(mode)), 'x.png')


def test_gray_with_a_transparent_value_is_still_gray():
    img = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    try: got = decode_png(png(img, transparency=3))
    except ScreenError: return
    assert (got == np.asarray(img)).all()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_pixels_come_back_exactly(dtype):
    x = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (13, 17), dtype, endpoint=True)
    got = decode_png(cv2.imencode('.png', x)[1].tobytes())
    assert got.dtype == dtype and (got == x).all()


# ---- the tree

@pytest.mark.parametrize('base,root', [('images/train', ''), ('images/test', ''), ('images', ''), ('train', ''),
                                       ('', ''), ('images/train', 'images'), ('images/train', 'images/train'),
                                       ('images/val', '')])
@pytest.mark.parametrize('dataset', ['train', 'val', 'id_test', 'test'])
def test_layouts(tmp_path, base, root, dataset):
    table = site_table(plates=(1,), wells=('B02',), dataset=dataset)
    pixels = write_tree(tmp_path, table, base)
    if base == 'images/val' and dataset != 'val':
        with pytest.raises(ScreenError): PngTree(tmp_path, table)[table.site_id[0]]
        return
    source = PngTree(tmp_path/root, table)
    for i in table.site_id: assert (source[i] == pixels[i]).all()


@pytest.mark.parametrize('dtype,channels', [(np.uint8, 6), (np.uint16, 6), (np.uint8, 1), (np.uint16, 4),
                                            (np.uint8, 9)])
def test_any_channels_and_both_depths(tmp_path, dtype, channels):
    table = site_table(plates=(1,))
    pixels = write_tree(tmp_path, table, channels=channels, dtype=dtype)
    source = PngTree(tmp_path, table, [f'w{i+1}' for i in range(channels)])
    assert source.shape == (channels, 16, 16) and source.dtype == dtype
    buffer = np.zeros((5, *source.shape), dtype)
    for threads in (1, 3):
        buffer[:] = 0
        assert source.read_into(table.site_id, buffer, threads) is buffer
        for b, i in zip(buffer, table.site_id): assert (b == pixels[i]).all()
        assert not buffer[4].any()


def test_read_into_a_tensor(tree):
    import torch
    root, table, pixels = tree
    source = PngTree(root, table)
    t = torch.zeros(2, *source.shape, dtype=torch.uint8)
    source.read_into(table.site_id[:2], t)
    assert (t[1].numpy() == pixels[table.site_id[1]]).all()


def test_buffer_must_fit(tree):
    root, table, _ = tree
    source = PngTree(root, table)
    for shape, dtype in [((1, 6, 16, 16), np.uint8), ((2, 5, 16, 16), np.uint8), ((2, 6, 16, 16), np.float32)]:
        bad = np.zeros(shape, dtype)
        with pytest.raises(ScreenError, match='allocate it from source.shape'): source.read_into(table.site_id[:2], bad)


def test_sites_of_a_well_in_order(tmp_path):
    table = site_table(plates=(1,), sites=(10, 2, 1))
    source = PngTree(tmp_path, table)
    assert source.sites_of('HUVEC-01_1_B02') == [f'HUVEC-01_1_B02_{s}' for s in (1, 2, 10)]
    with pytest.raises(ScreenError, match='Z99'): source.sites_of('HUVEC-01_1_Z99')


def test_pickle_and_workers(tree):
    "In a worker process, started afresh"
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    root, table, pixels = tree
    source = PngTree(root, table)
    assert (pickle.loads(pickle.dumps(source))[table.site_id[0]] == pixels[table.site_id[0]]).all()
    with ProcessPoolExecutor(1, get_context('forkserver')) as pool:
        assert (pool.submit(source.__getitem__, table.site_id[1]).result() == pixels[table.site_id[1]]).all()


# ---- bad input: one sentence, the file's name, what to do

@pytest.mark.parametrize('data,words', [
    (b'', ['not a PNG']), (b'GIF89a', ['not a PNG']), ('truncate', ['truncated', 'copy it again']),
    ('flip', ['damaged']),
    (png(Image.new('RGB', (16, 16))), ['RGB color', 'gray']), (png(Image.new('L', (16, 12))), ['12×16', '16×16']),
    (cv2.imencode('.png', np.zeros((16, 16), np.uint16))[1].tobytes(), ['16 bits', '8 bits'])])
def test_bad_file(tree, data, words):
    root, table, pixels = tree
    path = root/FILE
    if data == 'truncate': data = path.read_bytes()[:-30]
    elif data == 'flip': data = bytearray(path.read_bytes()); data[60] ^= 4
    path.write_bytes(data)
    source = PngTree(root, table)
    refused(lambda: source['HUVEC-01_1_B02_1'], str(path), *words)
    assert (source['HUVEC-01_1_B02_2'] == pixels['HUVEC-01_1_B02_2']).all()


def test_the_odd_first_file_is_the_one_blamed(tmp_path):
    table = site_table(plates=(1, 2, 3))
    write_tree(tmp_path, table)
    cv2.imwrite(str(tmp_path/'images/train/HUVEC-01/Plate1/B02_s1_w1.png'), np.zeros((99, 99), np.uint8))
    source = PngTree(tmp_path, table)
    assert source.shape == (6, 16, 16)
    refused(lambda: source['HUVEC-01_1_B02_1'], 'B02_s1_w1.png', '99×99')


def test_expected_size(tree):
    root, table, _ = tree
    refused(lambda: PngTree(root, table, size=512)[table.site_id[0]], 'B02_s1_w1.png', '512×512')
    assert PngTree(root, table, size=16)[table.site_id[0]].shape == (6, 16, 16)


def test_missing_files(tree):
    root, table, _ = tree
    for c in (5, 6): (root/f'images/train/HUVEC-01/Plate2/C03_s2_w{c}.png').unlink()
    source = PngTree(root, table)
    m = source.missing()
    assert m.site_id.tolist() == ['HUVEC-01_2_C03_2'] and m.missing[0] == ('mitochondria', 'golgi')
    assert m.file[0].endswith('C03_s2_w5.png')
    refused(lambda: source['HUVEC-01_2_C03_2'], 'HUVEC-01_2_C03_2', 'w5 (mitochondria), w6 (golgi)', 'only_present=True')
    keep, n = only_present(table, source)
    assert n == 1 and len(keep) == len(table)-1 and keep.index.tolist() == list(range(len(keep)))


def test_missing_plate_experiment_and_everything(tree, tmp_path):
    root, table, _ = tree
    shutil.rmtree(root/'images/train/HUVEC-01/Plate2')
    both = pd.concat([table, site_table(('RPE-09',))], ignore_index=True)
    source = PngTree(root, both)
    assert len(source.missing()) == 4 + 8
    assert source.shape == (6, 16, 16)
    refused(lambda: source['RPE-09_1_B02_1'], 'no folder of RPE-09', 'only_present')
    keep, n = only_present(both, source)
    assert (len(keep), n) == (4, 12)
    empty = tmp_path/'empty'; empty.mkdir()
    with pytest.raises(ScreenError, match='no picture of any site'): PngTree(empty, table).shape
    with pytest.raises(ScreenError, match='none of the 8 sites'): only_present(table, PngTree(empty, table))


def test_only_present_keeps_what_the_source_knows(tree):
    root, table, _ = tree
    keep, n = only_present(table, PngTree(root, table.iloc[:3]))
    assert (len(keep), n) == (3, 5)


def test_bad_tables(tree):
    root, table, _ = tree
    for bad, word in [(table.iloc[:0], 'empty'), (table.drop(columns='plate'), "'plate'"),
                      (pd.concat([table, table.iloc[:1]], ignore_index=True),
                       'HUVEC-01_1_B02_1 is in the table twice (row 8)')]:
        with pytest.raises(ScreenError) as e: PngTree(root, bad)
        assert word in str(e.value)
    with pytest.raises(ScreenError, match='is not a folder'): PngTree(root/'nowhere', table)
    with pytest.raises(ScreenError, match='channels is empty'): PngTree(root, table, ())


def test_unreadable_file(tree):
    if os.geteuid() == 0: pytest.skip('root reads everything')
    root, table, _ = tree
    (root/FILE).chmod(0)
    refused(lambda: PngTree(root, table)['HUVEC-01_1_B02_1'], FILE, 'permissions')


def test_a_folder_where_a_file_should_be(tree):
    root, table, _ = tree
    (root/FILE).unlink(); (root/FILE).mkdir()
    refused(lambda: PngTree(root, table)['HUVEC-01_1_B02_1'], FILE, 'cannot be read')


# ---- statistics

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('by', [None, 'plate', 'experiment'])
def test_screen_stats_are_exact(tmp_path, dtype, by):
    table = site_table(('HUVEC-01', 'RPE-02'))
    pixels = write_tree(tmp_path, table, dtype=dtype, size=33)
    source = PngTree(tmp_path, table)
    got = screen_stats(source, table, by)
    groups = stat_groups(table, by)
    assert got.index.tolist() == sorted(groups.unique()) and got.n_sites.sum() == len(table)
    for g, row in got.iterrows():
        x = np.stack([pixels[i] for i in table.site_id[groups == g]]).astype(np.float64)/np.iinfo(dtype).max
        np.testing.assert_allclose(row.filter(like='mean_').values.astype(float), x.mean((0, 2, 3)), rtol=1e-10)
        np.testing.assert_allclose(row.filter(like='std_').values.astype(float), x.std((0, 2, 3)), rtol=1e-9)


def test_stats_are_kept_and_completed(tree):
    root, table, _ = tree
    source = PngTree(root, table)
    assert source.stats is None
    part = source.compute_stats(table.site_id[:3], progress=False)
    assert len(part) == 3 and source.stats is part
    assert len(source.compute_stats(progress=False)) == len(table)
    assert pickle.loads(pickle.dumps(source)).stats.equals(source.stats)
    with pytest.raises(ScreenError, match='empty'): screen_stats(source, table.iloc[:0])


def test_stats_of_a_constant_channel(tmp_path):
    table = site_table(plates=(1,))
    for r in table.itertuples():
        folder = tmp_path/'HUVEC-01'/'Plate1'; folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder/f'{r.well}_s{r.site}_w1.png'), np.full((8, 8), 51, np.uint8))
    got = screen_stats(PngTree(tmp_path, table, ['dna']), table)
    assert got.mean_dna.iloc[0] == pytest.approx(.2) and got.std_dna.iloc[0] == pytest.approx(0, abs=1e-9)


# ---- by name

def test_load_site(tree):
    root, table, pixels = tree
    assert (load_site(root, 'HUVEC-01_2_C03_1') == pixels['HUVEC-01_2_C03_1']).all()
    for bad in ('HUVEC-01', 'a_b_c_d', 'HUVEC-01_1_B02_x'):
        with pytest.raises(ScreenError, match='is not a site id'): load_site(root, bad)
    with pytest.raises(ScreenError): load_site(root, 'HUVEC-01_9_B02_1')


# ---- real images

@real
def test_real_sites():
    table = read_metadata(real_data())
    source = PngTree(real_data(), table)
    assert source.shape == (6, 512, 512) and source.dtype == np.uint8
    keep, n = only_present(table, source)
    assert len(keep) == 18 and n == len(table)-18
    assert set(keep.well) == {'B02'} and set(keep.site) == {1}
    assert set(keep.experiment) == {'HEPG2-01', 'HUVEC-01', 'RPE-01', 'U2OS-01', 'HEPG2-08'}
    x = source['HEPG2-08_1_B02_1']
    path = real_data()/'images/test/HEPG2-08/Plate1/B02_s1_w4.png'
    assert (x[3] == np.asarray(Image.open(path))).all()
    refused(lambda: source['HUVEC-01_1_B02_2'], 'HUVEC-01_1_B02_2', 'w5 (mitochondria), w6 (golgi)', 'only_present')
    m = source.missing().set_index('site_id').missing
    assert m['U2OS-01_3_B02_2'] == ('mitochondria', 'golgi') and m['U2OS-01_3_B03_1'] == CHANNELS


@real
def test_real_plate_brightness():
    "Plates 2 and 3 of HEPG2-01 differ by about two in the nucleus channel"
    table = read_metadata(real_data())
    table = table[(table.experiment == 'HEPG2-01') & (table.well == 'B02') & (table.site == 1)]
    got = screen_stats(PngTree(real_data(), table), table, 'plate').mean_nucleus*255
    assert 1.5 < got['HEPG2-01_2']/got['HEPG2-01_3'] < 2.5
