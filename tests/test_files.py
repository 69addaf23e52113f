"Screens from tables of files: shapes of tables, kinds of files, bad input, damaged files."
import io, os, pickle, threading, time, warnings
import cv2, numpy as np, pandas as pd, pytest, tifffile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from PIL import Image
from helpers import refused
from rcic_fastai.screen.files import *
from rcic_fastai.screen.tiff import *
from rcic_fastai.screen.images import only_present, screen_stats
from rcic_fastai.screen.open import open_screen
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import SITE_COLUMNS, check_table, rowcol_to_well, split_experiments

NAMES = ['DNA', 'ER', 'RNA', 'AGP', 'Mito']


def pixels(n, h=12, w=16, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (n, h, w), dtype, endpoint=True)


def save(path, img, ext='tif', **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    if ext == 'png': assert cv2.imwrite(str(path), img)
    else: tifffile.imwrite(path, img, **kw)


def write_screen(root, names=NAMES, dtype=np.uint16, ext='tif', wells=('A01', 'A02', 'H12'), plates=('P1', 'P2'),
                 sites=2, h=12,
                 w=16, **kw):
    "Random pictures and load_data.csv → (the table, {site_id: pixels})"
    rows, got = [], {}
    for p in plates:
        for i, well in enumerate(wells):
            for s in range(1, sites + 1):
                x = pixels(len(names), h, w, dtype, seed=len(rows))
                row = dict(Metadata_Batch=f'batch{p[-1]}', Metadata_Plate=p, Metadata_Well=well, Metadata_Site=s,
                           Metadata_Perturbation=['DMSO', 'a', 'b'][i % 3], Metadata_Dose=[0, .5, 10][i % 3])
                for c, img in zip(names, x):
                    row[f'FileName_Orig{c}'], row[f'PathName_Orig{c}'] = f'{well}_{s}_{c}.{ext}', f'images/{p}'
                    save(root/row[f'PathName_Orig{c}']/row[f'FileName_Orig{c}'], img, ext, **kw)
                got[f'batch{p[-1]}_{p}_{well}_{s}'] = x
                rows.append(row)
    df = pd.DataFrame(rows)
    df.to_csv(root/'load_data.csv', index=False)
    return df, got


def as_long(df, names=NAMES):
    meta = [c for c in df if c.startswith('Metadata_')]
    rows = [df[meta].assign(Channel=c, PathName=df[f'PathName_Orig{c}'], FileName=df[f'FileName_Orig{c}'],
                            order=range(len(df))) for c in names]
    return pd.concat(rows).sort_values('order', kind='stable', ignore_index=True).drop(columns='order')


def same_pixels(source, got):
    assert source.site_ids == list(got)
    for i, x in got.items():
        y = source[i]
        assert y.dtype == x.dtype and (y == x).all(), i


@pytest.fixture
def screen(tmp_path):
    df, got = write_screen(tmp_path)
    return tmp_path, df, got


# ---- the shapes of tables

def test_wide_long_and_mapped_are_equal(screen):
    root, df, got = screen
    kw = dict(controls=dict(negative_control=['DMSO']), test=['batch2'])
    table, source = read_files(root/'load_data.csv', **kw)
    same_pixels(source, got)
    check_table(table)
    assert list(table)[:12] == SITE_COLUMNS and list(table)[12:] == ['Dose'] and source.channels == tuple(NAMES)
    assert table.Dose.tolist()[:4] == [0, 0, .5, .5] and table.sirna_id.tolist()[:6:2] == [0, 1, 2]
    assert table.groupby('experiment').dataset.unique().str[0].to_dict() == dict(batch1='train', batch2='test')
    assert (table.well_type == 'negative_control').eq(table.sirna == 'DMSO').all()
    mapped = df.rename(columns=lambda c: dict(Metadata_Batch='lot', Metadata_Plate='Code', Metadata_Well='pos',
                                              Metadata_Site='n',
                                              Metadata_Perturbation='what').get(c, c))
    for c in NAMES:
        mapped[f'{c}_file'] = mapped.pop(f'PathName_Orig{c}') + '\\' + mapped.pop(f'FileName_Orig{c}')
    for other, args in [(df, {}), (as_long(df), {}),
                        (as_long(df).sample(frac=1, random_state=1).sort_values(['Metadata_Plate', 'Metadata_Well',
                                                                      'Metadata_Site'], kind='stable'),
                         dict(channels=NAMES)),
                        (mapped, dict(columns=dict(experiment='lot', plate='Code', well='pos', site='n', sirna='what'),
                                      channels={c: f'{c}_file' for c in NAMES}))]:
        t, s = read_files(other, root, **args, **kw)
        pd.testing.assert_frame_equal(t, table)
        same_pixels(s, got)


def test_files_of_a_table(screen):
    root, df, got = screen
    table, _ = read_files(root/'load_data.csv')
    df.to_csv(root/'load_data.csv.gz', index=False)
    df.to_parquet(root/'load_data.parquet')
    for name in ('load_data.csv.gz', 'load_data.parquet'):
        t, s = read_files(str(root/name))
        pd.testing.assert_frame_equal(t, table, check_dtype=False)
        same_pixels(s, got)


def test_usual_names_of_jump_and_pycytominer(tmp_path):
    _, got = write_screen(tmp_path, ['DNA'], sites=1)
    df = pd.read_csv(tmp_path/'load_data.csv').rename(columns=dict(Metadata_Perturbation='Metadata_pert_iname',
                                                                   Metadata_Dose='Metadata_Source'))
    df['Metadata_control_type'] = ['negcon', None, 'poscon_diverse']*2
    df['FileName_IllumDNA'], df['PathName_IllumDNA'], df['FileName_Outlines'] = 'illum.npy', '/illum', 'o.png'
    t, s = read_files(df, tmp_path)
    same_pixels(s, got)
    assert t.well_type.tolist() == ['negative_control', 'treatment', 'positive_control']*2
    assert t.sirna.tolist()[:3] == ['DMSO', 'a', 'b'] and list(t)[12:] == ['Source'] and s.channels == ('DNA',)
    cp = df.rename(columns=lambda c: f'Image_{c}')
    t2, s2 = read_files(cp, tmp_path)
    pd.testing.assert_frame_equal(t, t2)


def test_only_what_is_needed(tmp_path):
    got = {}
    for w in ('A1', 'b12'):
        got[f'77_77_{w[0].upper()}{int(w[1:]):02d}_1'] = x = pixels(1, seed=len(got), dtype=np.uint8)
        save(tmp_path/f'{w}.png', x[0], 'png')
    t, s = read_files(pd.DataFrame(dict(Barcode=[77., 77.], Well=['A1', 'b12'], Filename=['A1.png', 'b12.png'])),
                      tmp_path, 'DNA')
    same_pixels(s, got)
    assert t.plate.dtype == int and t.well.tolist() == ['A01', 'B12'] and t.site.tolist() == [1, 1]
    assert (t.experiment == '77').all() and (t.cell_type == 'unknown').all() and (t.well_type == 'treatment').all()
    assert t.sirna.tolist() == [None, None] and t.sirna_id.isna().all() and t.plate_group.isna().all()
    assert str(t.sirna_id.dtype) == str(t.plate_group.dtype) == 'Int64'


@pytest.mark.parametrize('plates,kind', [(['1', '2'], 'int'), (['1.0', '12.0'], 'int'), (['007', '008'], 'text'),
                                         (['1', 'B'], 'text'),
                                         ([3, 4], 'int'), ([3., 4.], 'int'), (['9'*30, '1'], 'text')])
def test_plates_are_numbers_or_text(tmp_path, plates, kind):
    for n in 'ab': save(tmp_path/f'{n}.tif', pixels(1)[0])
    t, _ = read_files(pd.DataFrame(dict(plate=plates, well='C03', file=['a.tif', 'b.tif'])), tmp_path, ['x'])
    assert (pd.api.types.is_integer_dtype(t.plate)) == (kind == 'int')
    assert t.well_id.tolist() == [f'{p}_{p}_C03' for p in (t.plate if kind == 'int' else plates)]


def test_one_stack_a_site_in_every_layout(tmp_path):
    x = pixels(5)
    layouts = dict(pages=(x, {}), planes=(x, dict(photometric='minisblack', planarconfig='separate')), imagej=(x,
                                                                      dict(imagej=True)),
                   samples=(x.transpose(1, 2, 0), dict(photometric='minisblack', planarconfig='contig')),
                   rows=(x.transpose(1, 2, 0), {}), ome=(x, dict(ome=True, metadata=dict(axes='CYX'))), big=(x,
                                                                      dict(bigtiff=True)),
                   tiles=(x, dict(tile=(16, 16), compression='zlib')))
    for name, (a, kw) in layouts.items(): save(tmp_path/f'{name}.tif', a, **kw)
    df = pd.DataFrame(dict(plate=1, well=[f'A{i+1}' for i in range(len(layouts))], path=[f'{k}.tif' for k in layouts]))
    t, s = read_files(df, tmp_path, NAMES)
    assert s.shape == (5, 12, 16) and len(s) == len(layouts)
    for i in t.site_id: assert (s[i] == x).all(), i
    rgb = pixels(3, dtype=np.uint8)
    save(tmp_path/'rgb.tif', rgb.transpose(1, 2, 0), photometric='rgb')
    _, s = read_files(df.iloc[:1].assign(path='rgb.tif'), tmp_path, ['r', 'g', 'b'])
    assert (s['1_1_A01_1'] == rgb).all()
    _, s = read_files(df.iloc[:1], tmp_path, NAMES[:4])
    refused(lambda: s.shape, 'pages.tif', 'more than 4 pages', '4 channels would be read')
    _, s = read_files(df.iloc[:1], tmp_path, NAMES + ['sixth'])
    refused(lambda: s.shape, '5 pages', '6 channels would be read')


@pytest.mark.parametrize('column', ['Frame', 'Series'])
def test_pages_of_a_shared_stack(tmp_path, column):
    x = pixels(6)
    save(tmp_path/'well.tif', x)
    df = pd.DataFrame([dict(Plate='p', Well='A01', Site=s, **{f'FileName_Orig{c}': 'well.tif' for c in NAMES[:3]},
                            **{f'{column}_Orig{c}': 3*s + k for k, c in enumerate(NAMES[:3])}) for s in (0, 1)])
    t, s = read_files(df, tmp_path)
    assert (s['p_p_A01_0'] == x[:3]).all() and (s['p_p_A01_1'] == x[3:]).all()
    assert (read_files(df, tmp_path, ['RNA', 'DNA'])[1]['p_p_A01_1'] == x[[5, 3]]).all()
    assert s._paths('p_p_A01_1') == [str(tmp_path/'well.tif')] and '@' in s.stamp('p_p_A01_1')
    long = pd.DataFrame([dict(Plate='p', Well='A01', Site=i, channel=c, file='well.tif', page=3*i + k) for i in (0, 1)
                         for k, c in enumerate(NAMES[:3])])
    t2, s2 = read_files(long, tmp_path)
    pd.testing.assert_frame_equal(t, t2)
    assert (s2['p_p_A01_1'] == x[3:]).all()
    _, far = read_files(df.assign(**{f'{column}_OrigER': [4, 9]}), tmp_path)
    refused(lambda: far['p_p_A01_1'], 'well.tif has 6 pages and no page 9')
    refused(lambda: read_files(df.assign(**{f'{column}_OrigER': 0}), tmp_path), 'lists well.tif for',
            'DNA of p_p_A01_0', 'ER of p_p_A01_0')
    refused(lambda: read_files(df.assign(**{f'{column}_OrigER': [-1, 2]}), tmp_path), 'negative')
    both = df.assign(**{f'{"Series" if column == "Frame" else "Frame"}_OrigER': 1})
    refused(lambda: read_files(both, tmp_path), 'both a series and a frame')
    (tmp_path/'well.tif').unlink()
    refused(lambda: check_files(s), '1 of 1 files', 'well.tif')


def test_paths_that_are_absolute_or_from_elsewhere(screen):
    root, df, got = screen
    path = [c for c in df if c.startswith('PathName')]
    away = df.copy(); away[path] = 'D:\\data\\run\\' + df[path]
    here = df.copy(); here[path] = str(root) + '/' + df[path]
    urls = df.copy()
    here_url = 'file://' + str(root).replace(' ', '%20') + '/'
    for c in NAMES:
        urls[f'URL_Orig{c}'] = here_url + urls.pop(f'PathName_Orig{c}') + '/' + urls.pop(f'FileName_Orig{c}')
    for d, kw in [(away, dict(replace={'D:\\data\\run': root})), (away, dict(replace={'D:/data/': root/'x/..'})),
                  (here, {}), (urls, {})]:
        if 'x/..' in str(kw): d = d.assign(**{c: d[c].str.replace('run\\', '') for c in path}); (root/'x').mkdir()
        same_pixels(read_files(d, **kw)[1], got)
    ftp = urls.apply(lambda s: s.str.replace('file://', 'ftp://server') if s.name.startswith('URL_OrigE') else s)
    refused(lambda: read_files(ftp, root), '12 of 60 files in the table are at addresses that are not read (the first: ftp://server/',
            'replace=')
    refused(lambda: read_files(df, root, replace={'/elsewhere/': '/here'}), 'begins with /elsewhere/')


# ---- files

@pytest.mark.parametrize('n', [1, 3, 5, 16])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('ext', ['png', 'tif'])
def test_channels_depths_and_formats(tmp_path, n, dtype, ext):
    names = [f'c{i}' for i in range(n)]
    _, got = write_screen(tmp_path, names, dtype, ext, wells=['B02'], plates=['P1'], h=9, w=7)
    t, s = read_files(tmp_path/'load_data.csv')
    assert s.shape == (n, 9, 7) and s.dtype == dtype and s.channels == tuple(names)
    same_pixels(s, got)
    buffer = np.zeros((2, *s.shape), dtype)
    for threads in (1, 2):
        buffer[:] = 0; s.read_into(t.site_id, buffer, threads)
        assert (buffer == np.stack(list(got.values()))).all()


TIFFS = [dict(), dict(byteorder='>'), dict(bigtiff=True, byteorder='>'), dict(compression='zlib'),
         dict(compression='zlib', predictor=True),
         dict(compression='zlib', predictor=True, byteorder='>'), dict(rowsperstrip=5), dict(compression='zlib',
                                                                      rowsperstrip=5), dict(tile=(16, 32)),
         dict(tile=(16, 32), compression='zlib', predictor=True), dict(compression='lzma')]


@pytest.mark.parametrize('kw', TIFFS, ids=str)
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_tiff_layouts(tmp_path, kw, dtype):
    x = pixels(1, 37, 41, dtype)
    save(tmp_path/'x.tif', x[0], **kw)
    assert (read_planes(tmp_path/'x.tif') == x).all()
    assert read_planes(tmp_path/'x.tif', header=True) == (37, 41, 8*x.itemsize)


@pytest.mark.parametrize('how', ['raw', 'tiff_lzw', 'packbits', 'tiff_deflate', 'tiff_adobe_deflate', 'zstd', 'lzma'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('size', [(3, 5), (300, 411)])
def test_tiffs_that_pillow_writes(tmp_path, how, dtype, size):
    "libtiff's strips: several a file, the last one short"
    x = np.add.outer(np.arange(size[0]), 3*np.arange(size[1])).astype(dtype)
    Image.fromarray(x).save(tmp_path/'x.tif', compression=how)
    if size[0] == 300 and how != 'raw':
        with tifffile.TiffFile(tmp_path/'x.tif') as t: assert len(t.pages[0].dataoffsets) > 1
    assert (read_planes(tmp_path/'x.tif')[0] == x).all()


PREDICTOR = 317      # the TIFF tag, which OpenCV has a name for since 4.10

@pytest.mark.parametrize('predictor', [1, 2])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_lzw_of_opencv_with_and_without_differences(tmp_path, predictor, dtype):
    x = pixels(1, 70, 91, dtype)[0]
    assert cv2.imwrite(str(tmp_path/'x.tif'), x, [cv2.IMWRITE_TIFF_COMPRESSION, 5, PREDICTOR, predictor])
    assert (read_planes(tmp_path/'x.tif')[0] == x).all()


def test_tifffile_reads_the_same(tmp_path):
    "An independent reader, on random layouts"
    rng = np.random.default_rng(0)
    for i in range(60):
        n, h, w = rng.integers(1, 5), *rng.integers(1, 60, 2)
        dtype = [np.uint8, np.uint16][i % 2]
        kw = dict(byteorder='<>'[rng.integers(2)], compression=[None, 'zlib', 'lzma'][rng.integers(3)],
                  photometric='minisblack', metadata=None)
        if rng.random() < .3: kw['tile'] = tuple(int(v) for v in 16*rng.integers(1, 4, 2))
        elif rng.random() < .5: kw['rowsperstrip'] = int(rng.integers(1, h+1))
        if kw['compression'] == 'zlib' and rng.random() < .5: kw['predictor'] = True
        x, how = pixels(n, h, w, dtype, i), rng.integers(3)
        if how and n > 1: kw['planarconfig'] = ['separate', 'contig'][how-1]
        save(tmp_path/'x.tif', x.transpose(1, 2, 0) if kw.get('planarconfig') == 'contig' else x, **kw)
        ref = tifffile.imread(tmp_path/'x.tif')
        if kw.get('planarconfig') == 'contig': ref = ref.transpose(2, 0, 1)
        got = read_planes(tmp_path/'x.tif', int(n))
        assert got.dtype == dtype and (got == ref.reshape(got.shape)).all() and (got == x).all(), (i, kw)


def test_thumbnails_and_masks_are_not_channels(tmp_path):
    x = pixels(1)
    with tifffile.TiffWriter(tmp_path/'x.tif') as f:
        f.write(x[0], metadata=None); f.write(x[0, ::2, ::2], subfiletype=1, metadata=None)
    assert (read_planes(tmp_path/'x.tif') == x).all()


def test_pictures_without_a_page_of_their_own(tmp_path):
    "Large ImageJ stacks and MetaMorph stacks have one page for many pictures; the first of them alone is not the site"
    x = pixels(1)[0]
    for kw in (dict(description='ImageJ=1.54f\nimages=5\nslices=5\n'), dict(extratags=[(33629, 4, 5, [0]*5, True)])):
        save(tmp_path/'x.tif', x, metadata=None, **kw)
        for n in (1, 5): refused(lambda: read_planes(tmp_path/'x.tif', n), 'x.tif says that it holds 5 pictures, but '
                                 'has 1 page')


@pytest.mark.parametrize('img,kw,words', [
    (np.zeros((8, 8), np.float32), {}, ['float32']), (np.zeros((8, 8), np.int16), {}, ['int16']),
                                          (np.zeros((8, 8), np.uint32), {}, ['uint32']),
    (np.zeros((8, 8), bool), {}, ['gray']), (np.zeros((8, 8, 3), np.uint8), dict(photometric='rgb'), ['RGB color']),
    (np.zeros((8, 8), np.uint8), dict(photometric='miniswhite'), ['white-is-zero']),
    (np.zeros((8, 8), np.uint8), dict(photometric='palette', colormap=np.zeros((3, 256), np.uint16)), ['palette']),
    (np.zeros((3, 8, 8), np.uint16), dict(photometric='minisblack'), ['more than 1 page']),
                                          (np.zeros((3, 8, 8), np.uint16), dict(photometric='minisblack',
                                                                      truncate=True), ['says that it holds']),
    (np.zeros((8, 8, 2), np.uint16), dict(photometric='minisblack', planarconfig='contig'), ['2 samples'])])
def test_tiffs_that_are_not_a_channel(tmp_path, img, kw, words):
    save(tmp_path/'x.tif', img, **kw)
    refused(lambda: read_planes(tmp_path/'x.tif'), 'x.tif', *words)


def test_other_files_that_are_not_a_channel(tmp_path):
    f = tmp_path/'x.tif'
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(f, compression='jpeg')
    refused(lambda: read_planes(f), 'x.tif', 'JPEG', 'LZW or Deflate')
    for data in (b'', b'II*', b'\xff\xd8\xff\xe0 a JPEG', b'PK\3\4'):
        f.write_bytes(data); refused(lambda: read_planes(f), 'x.tif', 'neither a PNG nor a TIFF')
    f.write_bytes(cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    refused(lambda: read_planes(f), 'RGB color')
    f.write_bytes(cv2.imencode('.png', np.zeros((8, 8), np.uint8))[1].tobytes())
    refused(lambda: read_planes(f, 2), 'PNG', 'one channel')
    assert read_planes(f).shape == (1, 8, 8)       # by what is in it, not by its name
    refused(lambda: read_planes(tmp_path), 'cannot be read')
    refused(lambda: read_planes(tmp_path/'none.tif'), 'is not there')
    refused(lambda: read_planes(str(tmp_path) + '/a\0b.tif'), 'damaged')


def test_strips_of_no_length_are_not_black(tmp_path):
    "tifffile gives zeros for a strip whose length or place is 0"
    x = pixels(1, 20, 16)[0]
    for k, tag in enumerate(('StripByteCounts', 'StripOffsets')):
        f = tmp_path/f'{k}.tif'
        save(f, x, rowsperstrip=10, metadata=None)
        with tifffile.TiffFile(f, mode='r+') as t:
            old = list(t.pages[0].tags[tag].value); old[1] = 0
            t.pages[0].tags[tag].overwrite(old)
        assert not tifffile.imread(f)[10:].any()
        refused(lambda: read_planes(f), f.name, 'truncated')


# ---- a source

def test_mixed_sizes_and_depths_name_the_odd_file(tmp_path):
    df, got = write_screen(tmp_path, sites=1)
    t, s = read_files(df, tmp_path)
    odd = tmp_path/'images/P1/A01_1_DNA.tif'    # the first file of all
    for img, words in [(pixels(1, 20, 16)[0], ['20×16 px of 16 bits', '12×16 px of 16 bits']),
                       (pixels(1, dtype=np.uint8)[0], ['12×16 px of 8 bits'])]:
        save(odd, img)
        s = read_files(df, tmp_path)[1]
        assert s.shape == (5, 12, 16) and s.dtype == np.uint16
        refused(lambda: s[t.site_id[0]], str(odd), *words)
        assert (s[t.site_id[1]] == got[t.site_id[1]]).all()


def test_missing_files_are_counted_and_ten_named(tmp_path):
    df, got = write_screen(tmp_path, wells=[f'A{i:02d}' for i in range(1, 8)])
    t, s = read_files(tmp_path/'load_data.csv')
    assert check_files(s) is s and not len(s.missing())
    gone = [tmp_path/f'images/P1/A0{i}_{j}_{c}.tif' for i in (1, 2, 3) for j in (1, 2) for c in ('ER', 'Mito')]
    for f in gone: f.unlink()
    m = s.missing()
    assert m.site_id.tolist() == t.site_id[:6].tolist() and set(m.missing) == {('ER',
                                                                      'Mito')} and m.file[0] == str(gone[0])
    refused(lambda: check_files(s), '12 of 140 files in load_data.csv are not there', *[str(f) for f in gone[:10]],
            'and 2 more', 'only_present')
    refused(lambda: s[t.site_id[0]], t.site_id[0], 'lacks ER', str(gone[0]), 'only_present')
    keep, n = only_present(t, s)
    assert n == 6 and len(keep) == 22
    assert s.stamp(t.site_id[0]) == 'absent'
    import shutil
    shutil.rmtree(tmp_path/'images/P2')
    assert len(s.missing()) == 6 + 14 and s.shape == (5, 12, 16)
    shutil.rmtree(tmp_path/'images')
    refused(lambda: read_files(tmp_path/'load_data.csv')[1].shape, 'None of the files in load_data.csv is there',
            'A01_1_DNA.tif', 'root')


@pytest.mark.parametrize('at', [0, 3, -1])
def test_missing_files_of_some_rows(screen, at):
    "A source that was narrowed down speaks of its own rows only, whatever row the file is missing in"
    root, *_ = screen
    t, s = read_files(root/'load_data.csv')
    victim = t.site_id.iloc[at]
    os.unlink(s._paths(victim)[2])
    for rows in (t, t[::-1], t[t.site_id == victim], t[t.well_id == t.well_id.iloc[at]], t[t.plate == t.plate.iloc[at]]):
        some = s.restrict(rows)
        assert some.missing().site_id.tolist() == [victim] and some.missing().missing.tolist() == [(s.channels[2],)]
        assert some.missing().file.tolist() == [s._paths(victim)[2]]
        with pytest.raises(ScreenError, match='^1 of '): check_files(some)
        if len(rows) > 1: assert sorted(only_present(rows, some)[0].site_id) == sorted(set(rows.site_id) - {victim})
    others = s.restrict(t[t.site_id != victim])
    assert not len(others.missing()) and check_files(others) is others and len(only_present(t[t.site_id != victim], others)[0]) == len(t) - 1
    some = open_screen(root/'load_data.csv', check=False)
    some = some[some.table.site_id != victim].complete()
    rows, left = some.table, some.source
    assert len(rows) == len(t) - 1 == len(left.site_ids)

def test_threads_pickle_and_processes(screen):
    root, df, got = screen
    t, s = read_files(df, root)
    s2 = pickle.loads(pickle.dumps(s))
    same_pixels(s2, got)
    wrong, ids = [], list(got)*20
    def work(k):
        for i in ids[k::4]:
            if not (s[i] == got[i]).all(): wrong.append(i)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not wrong
    with ProcessPoolExecutor(1, get_context('forkserver')) as pool:
        assert (pool.submit(s.__getitem__, ids[1]).result() == got[ids[1]]).all()


def test_the_rest_of_the_library_takes_it(screen):
    root, df, got = screen
    t, s = read_files(df, root)
    stats = screen_stats(s, t, 'plate')
    x = np.stack([got[i] for i in t.site_id[t.plate == 'P1']])/65535
    np.testing.assert_allclose(stats.iloc[0, :5].astype(float), x.mean((0, 2, 3)), rtol=1e-9)
    assert stats.index.tolist() == ['batch1_P1', 'batch2_P2']
    train, valid = split_experiments(t)
    assert set(train.experiment) == {'batch1'} and set(valid.experiment) == {'batch2'}
    assert s.sites_of('batch1_P1_A01') == ['batch1_P1_A01_1', 'batch1_P1_A01_2']


def test_a_large_table_is_small_and_quick(tmp_path):
    "100 000 files: addresses only"
    n = 20_000
    i = np.arange(n)
    df = pd.DataFrame(dict(Plate=1 + i//3072, Well=[rowcol_to_well(*divmod(int(k) % 1536, 48)) for k in i],
                           Site=1 + i % 3072//1536))
    for c in NAMES: df[f'FileName_Orig{c}'], df[f'PathName_Orig{c}'] = [f'r{k:06d}-{c}.tif'
                                                                      for k in i], ('p' + df.Plate.astype(str))
    start = time.monotonic()
    t, s = read_files(df, tmp_path)
    assert len(s.missing()) == n
    assert time.monotonic() - start < 20
    assert len(pickle.dumps((s._names, s._folder, s._folders))) < 40*5*n
    assert plate_format(t.well) == (32, 48)


# ---- plates

@pytest.mark.parametrize('n,shape', [(6, (2, 3)), (12, (3, 4)), (24, (4, 6)), (48, (6, 8)), (96, (8, 12)), (384,
                                                                      (16, 24)), (1536, (32, 48))])
def test_plate_formats(n, shape):
    wells = [rowcol_to_well(r, c) for r in range(shape[0]) for c in range(shape[1])]
    assert len(wells) == n and plate_format(wells) == plate_format(pd.Series(wells*2),
                                                                   n) == plate_format(wells[-1]) == shape
    off = rowcol_to_well(shape[0], 0)
    refused(lambda: plate_format(wells + [off], n), off, f'{n} wells', wells[-1])
    assert n == 1536 or plate_format(wells + [off]) > shape


def test_wells_off_the_plate(screen):
    root, df, _ = screen
    assert len(read_files(df, root, plate_wells=96)[0]) == len(df)
    refused(lambda: read_files(df, root, plate_wells=24), 'H12 is not on a plate of 24 wells')
    refused(lambda: read_files(df.assign(Metadata_Well='AG50'), root, columns=dict(site=None)), 'rows')
    refused(lambda: read_files(df.iloc[:1].assign(Metadata_Well='AG50'), root), 'AG50', '1536')
    for bad in ('22B', 'well 3', 'A00'): refused(lambda: read_files(df.iloc[:1].assign(Metadata_Well=bad), root),
                                                 'row 0', bad, 'not a well name')
    refused(lambda: plate_format([]), 'no wells')
    refused(lambda: plate_format(['A01'], 95), '95')


# ---- bad tables

def without(df, *columns): return df.drop(columns=list(columns))


@pytest.mark.parametrize('change,kw,words', [
    (lambda d: d.iloc[:0], {}, ['no rows']),
    (lambda d: without(d, 'Metadata_Well'), {}, ['no column for the well', 'columns=dict(well=']),
    (lambda d: without(d, 'Metadata_Plate'), {}, ['no column for the plate']),
    (lambda d: d[[c for c in d if 'Name' not in c]], {}, ['names no image files', 'FileName_']),
    (lambda d: d, dict(columns=dict(batch='Metadata_Batch')), ['batch', 'experiment']),
    (lambda d: d, dict(columns=dict(experiment='Batch')), ['no column Batch', 'Metadata_Batch']),
    (lambda d: d, dict(channels=['DNA', 'dapi']), ['no channel dapi', 'Mito']),
    (lambda d: d, dict(channels=[]), ['0 channels']),
    (lambda d: d, dict(controls=dict(negative=['DMSO'])), ['negative', 'negative_control']),
    (lambda d: d, dict(controls=dict(negative_control='water')), ['water']),
    (lambda d: d, dict(test='batch1,batch7'), ['batch7', 'batch1, batch2']),
    (lambda d: d, dict(dataset='training'), ['training']),
    (lambda d: d, dict(root='/no/such/folder'), ['/no/such/folder is not a folder']),
    (lambda d: d.assign(split='cpg0016'), {}, ['row 0', "'cpg0016'", 'columns=dict(dataset=None)']),
    (lambda d: d.assign(pert_type='control'), {}, ['row 0', "'control'", 'controls=dict']),
    (lambda d: pd.concat([d, d.iloc[[3]]], ignore_index=True), {}, ['site batch1_P1_A02_2 in rows 3, 12']),
    (lambda d: without(d, 'Metadata_Site'), {}, ['rows 0, 1', 'columns=dict(site=']),
    (lambda d: d.assign(FileName_OrigER='x.tif'), {}, ['x.tif', 'ER of batch1_P1_A01_1', 'correct the table']),
    (lambda d: pd.concat([d, d[['Metadata_Well']]], axis=1), {}, ['Metadata_Well more than once'])])
def test_bad_tables(screen, change, kw, words):
    root, df, _ = screen
    refused(lambda: read_files(change(df), **{'root': root, **kw}), *words)


@pytest.mark.parametrize('column', ['Metadata_Batch', 'Metadata_Plate', 'Metadata_Well', 'Metadata_Site',
                                    'FileName_OrigER', 'PathName_OrigER'])
@pytest.mark.parametrize('value', [None, '', '  '])
def test_empty_cells_that_are_needed(screen, column, value):
    root, df, _ = screen
    df[column] = df[column].astype(object); df.loc[4, column] = value
    refused(lambda: read_files(df, root), 'row 4', column, 'fill that cell')
    df.to_csv(root/'bad.csv', index=False)
    refused(lambda: read_files(root/'bad.csv'), 'bad.csv, row 6', column)


def test_empty_cells_that_are_not_needed(screen):
    root, df, _ = screen
    df.loc[4:, 'Metadata_Perturbation'] = None
    t, _ = read_files(df.assign(cell_line=['A549'] + [None]*11, control_type=['poscon'] + [None]*11), root)
    assert t.sirna.tolist() == ['DMSO', 'DMSO', 'a', 'a'] + [None]*8 and t.sirna_id.isna().sum() == 8
    assert t.cell_type.tolist() == ['A549'] + ['unknown']*11
    assert t.well_type.tolist() == ['positive_control'] + ['treatment']*11


def test_bad_long_tables(screen):
    root, df, got = screen
    long = as_long(df)
    for bad, kw, words in [
            (long.drop(index=7), {}, ['1 of 12 sites', 'batch1_P1_A01_2 has none for RNA']),
            (pd.concat([long, long.iloc[[7]]], ignore_index=True), {}, ['channel RNA of site batch1_P1_A01_2 in rows '
                                                                      '7, 60']),
            (long.assign(Channel=long.Channel.mask(long.index == 9)), {}, ['row 9', 'Channel is empty']),
            (long.assign(Metadata_Perturbation=long.Metadata_Perturbation.mask(long.index == 3, 'z')), {},
             ['batch1_P1_A01_1 more than one sirna']),
            (long.drop(columns='Channel'), {}, ['no column of channels', 'channels=']),
            (long.assign(Channel=range(60)), {}, ['60 channels']),
            (long.drop(columns='Metadata_Site'), {}, ['in rows 0, 5', 'columns=dict(site='])]:
        refused(lambda: read_files(bad, root, **kw), *words)
    some = {i: x[[4, 0]] for i, x in got.items()}
    same_pixels(read_files(long.drop(index=7), root, dict(m='Mito', d='DNA'))[1], some)
    own = long.assign(exposure=range(60), note='n')
    assert list(read_files(own, root)[0])[12:] == ['Dose', 'note']  # what differs inside a site is no fact of it


def test_bad_table_files(tmp_path):
    for name, data in [('a.csv', b''), ('b.csv', b'\xff\xfe\x00\x01garbage'), ('c.csv', b'a,b\n1,2,3\n"'),
                       ('d.csv.gz', b'not gzip'),
                       ('e.parquet', b'PAR1 no'), ('f.csv', b'a,b\n'), ('g.csv.gz', b'\x1f\x8b\x08\0\0\0\0\0')]:
        (tmp_path/name).write_bytes(data)
        refused(lambda: read_files(tmp_path/name), name)
    refused(lambda: read_files(tmp_path/'none.csv'), 'none.csv', 'cannot be read')
    refused(lambda: read_files(tmp_path), 'cannot be read')


def test_names_that_are_taken(screen):
    root, df, _ = screen
    t, _ = read_files(df.assign(dataset='cpg', well_id='w'), root, columns=dict(dataset=None, well_id=None))
    assert list(t)[12:] == ['Dose', 'dataset_',
                            'well_id_'] and (t.dataset_ == 'cpg').all() and (t.dataset == 'train').all()
    t, _ = read_files(df.assign(site_id=[f's{i}' for i in range(12)]), root)
    assert t.site_id.tolist()[:2] == ['s0', 's1'] and t.well_id[0] == 'batch1_P1_A01'


# ---- damaged files

def damaged(data, rng, kind):
    if kind == 'truncated': return data[:rng.integers(len(data))]
    if kind == 'random': return data[:8] + rng.bytes(int(rng.integers(400)))
    bad = bytearray(data)
    if kind == 'header':    # anywhere but in the pixels: what the file says about itself
        for _ in range(rng.integers(1, 4)): bad[rng.integers(8, min(len(bad), 300))] = rng.integers(256)
    if kind == 'flip':
        for _ in range(rng.integers(1, 4)): bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
    if kind == 'burst':
        i, n = rng.integers(len(bad)), rng.integers(1, 64)
        bad[i:i+n] = rng.bytes(len(bad[i:i+n]))
    return bytes(bad)


def tiff(x, **kw): b = io.BytesIO(); tifffile.imwrite(b, x, photometric='minisblack', **kw); return b.getvalue()
def pil(x, how): b = io.BytesIO(); Image.fromarray(x).save(b, 'tiff', compression=how); return b.getvalue()


def victims():
    x = pixels(3, 24, 20)
    smooth = np.add.outer(np.arange(90), np.arange(80)).astype(np.uint16)
    return [('png', 1, x[:1], cv2.imencode('.png', x[0])[1].tobytes(), True), ('raw', 1, x[:1], tiff(x[0]), False),
            ('deflate', 1, x[:1], tiff(x[0], compression='zlib', rowsperstrip=7), False), ('lzw', 1, smooth[None],
                                                                      pil(smooth, 'tiff_lzw'), False),
            ('stack', 3, x, tiff(x, byteorder='>'), False), ('tiles', 3, x, tiff(x, tile=(16, 16), compression='zlib',
                                                                      bigtiff=True), False),
            ('packbits', 1, smooth[None], pil(smooth, 'packbits'), False)]


@pytest.mark.parametrize('kind', ['truncated', 'random', 'flip', 'header', 'burst'])
@pytest.mark.parametrize('which', range(7))
def test_damaged_files(tmp_path, kind, which):
    """Right pixels or a ScreenError, soon. Pixels of a TIFF carry no checksum unless Deflate made them: for the others
    a changed byte can be a changed picture, and the promise is only its shape and type."""
    name, n, x, data, sure = victims()[which]
    f, rng, read = tmp_path/f'{name}.tif', np.random.default_rng(100*which + len(kind)), 0
    expect = (*x.shape[1:], 8*x.itemsize)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for i in range(30):
            bad = damaged(data, rng, kind)
            f.write_bytes(bad)
            start = time.monotonic()
            for header in (True, False):
                try: y = read_planes(f, n, expect=None if header else expect, header=header)
                except ScreenError as e: assert f.name in str(e) and '\n' not in str(e); continue
                if header: continue
                read += 1
                assert y.shape == x.shape and y.dtype == x.dtype
                if sure or kind == 'truncated' or bad == data: assert (y == x).all(), (name, kind, i)
            assert time.monotonic() - start < 5
    assert read < 30 or kind in ('flip', 'burst', 'header')


def test_tifffile_is_imported_when_it_is_needed():
    import subprocess, sys
    code = 'import sys, rcic_fastai.screen.files; assert not {"tifffile", "imagecodecs"} & set(sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_damage_inside_deflated_pixels_is_found(tmp_path):
    x = pixels(1, 24, 20)
    f, data = tmp_path/'x.tif', tiff(x[0], compression='zlib', metadata=None)
    with tifffile.TiffFile(io.BytesIO(data)) as t: a, n = t.pages[0].dataoffsets[0], t.pages[0].databytecounts[0]
    for i in range(a, a + n, 7):
        for bit in (1, 128):
            bad = bytearray(data); bad[i] ^= bit
            f.write_bytes(bad)
            try: y = read_planes(f)
            except ScreenError: continue
            assert (y == x).all(), i            # a few bits of a Deflate stream mean nothing


def test_a_deflated_strip_without_its_end_is_refused(tmp_path):
    "All pixels may be there, but not the checksum that says whether they are right"
    f = tmp_path/'x.tif'
    save(f, pixels(1, 24, 20)[0], compression='zlib', metadata=None)
    with tifffile.TiffFile(f, mode='r+') as t:
        tag = t.pages[0].tags['StripByteCounts']
        tag.overwrite(tag.value[0] - 4)
    refused(lambda: read_planes(f), 'x.tif is damaged', 'does not end where it should')


@pytest.mark.parametrize('how', ['raw', 'deflate', 'packbits', 'tiff_lzw'])
def test_strips_that_are_too_short_are_not_filled_with_black(tmp_path, how):
    "Whole in themselves, but of fewer bytes than the picture needs"
    x, f = np.full((20, 16), 7, np.uint16), tmp_path/'x.tif'
    if how == 'raw':
        save(f, x, rowsperstrip=10, metadata=None)
        with tifffile.TiffFile(f, mode='r+') as t:
            tag = t.pages[0].tags['StripByteCounts']
            tag.overwrite([tag.value[0], tag.value[1] - 32])
    else:                                               # a picture of 20 rows that says it has 24, in one strip
        if how == 'deflate': save(f, x, compression='zlib', metadata=None)
        else: Image.fromarray(x).save(f, compression=how)
        with tifffile.TiffFile(f, mode='r+') as t:
            for tag in ('ImageLength', 'RowsPerStrip'): t.pages[0].tags[tag].overwrite(24)
    refused(lambda: read_planes(f), 'x.tif is damaged', 'a strip')


def test_huge_claims_are_refused_before_memory_is(tmp_path):
    f = tmp_path/'x.tif'
    for tag, value in [('ImageWidth', 2**31), ('ImageLength', 2**31), ('RowsPerStrip', 0)]:
        save(f, pixels(1, 24, 20)[0], compression='zlib', metadata=None)
        with tifffile.TiffFile(f, mode='r+') as t: t.pages[0].tags[tag].overwrite(value, dtype='I')
        start = time.monotonic()
        try: y = read_planes(f, expect=(24, 20, 16))
        except ScreenError: y = None
        assert time.monotonic() - start < 2 and (y is None or tag == 'RowsPerStrip')
        refused(lambda: read_planes(f), 'x.tif') if y is None else None


def test_a_chain_of_pages_that_bites_its_tail(tmp_path):
    data = bytearray(tiff(pixels(2), metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t: a, b = t.pages[0].offset, t.pages[1].offset
    n = int.from_bytes(data[b:b+2], 'little')
    data[b+2+12*n:b+6+12*n] = a.to_bytes(4, 'little')
    (tmp_path/'x.tif').write_bytes(data)
    for n in (1, 2, 3):
        start = time.monotonic()
        try: assert read_planes(tmp_path/'x.tif', n).shape == (n, 12, 16)
        except ScreenError: pass
        assert time.monotonic() - start < 2
