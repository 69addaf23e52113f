"What a TIFF says about its pages is believed: planes and time points are chosen, never read as channels; names are never swapped."
import struct
import numpy as np, pandas as pd, pytest, tifffile
from PIL import Image
from rcic_fastai.core import ScreenError, as_command
from rcic_fastai.screen.files import read_files
from rcic_fastai.screen.tiff import check_channel_names, read_planes

GRAY = dict(photometric='minisblack')
KINDS = dict(imagej=dict(imagej=True), ome=dict(ome=True), shaped={})
NAMES = ['DNA', 'ER', 'AGP']

def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(1, 4000, (*shape, 12, 14)).astype(np.uint16)

def write(path, x, axes, kind='ome', **metadata):
    tifffile.imwrite(path, x, metadata=dict(axes=axes, **metadata), **GRAY, **KINDS[kind])
    return path

def refused(f, *words):
    with pytest.raises(ScreenError) as e: f()
    text = str(e.value)
    assert text.count('\n') == 0 and all(w in text for w in words), text
    return text

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('axis', 'zt')
@pytest.mark.parametrize('n', [1, 3])
def test_planes_are_no_channels(tmp_path, kind, axis, n):
    "As many planes as channels are asked for, and the planes of a field of several channels"
    x = pixels(3, n) if n > 1 else pixels(3)
    f = write(tmp_path/'x.tif', x, f'{axis.upper()}{"C"*(n > 1)}YX', kind)
    word = dict(z='3 planes', t='3 time points')[axis]
    for asked in (n, 3, 3*n): refused(lambda: read_planes(f, asked), 'x.tif', word, f'{axis}=0', f"{axis}='max'")
    x = x.reshape(3, n, 12, 14)
    for i in range(3): assert (read_planes(f, n, **{axis: i}) == x[i]).all()
    assert (read_planes(f, n, **{axis: 'max'}) == x.max(0)).all()
    refused(lambda: read_planes(f, n, **{axis: 3}), f'{axis}=3', word)
    assert read_planes(f, n, header=True, **{axis: 'max'}) == (12, 14, 16)

@pytest.mark.parametrize('kind', KINDS)
def test_planes_and_time_points_together(tmp_path, kind):
    x = pixels(2, 3, 4)
    f = write(tmp_path/'x.tif', x, 'TZCYX', kind)
    assert (read_planes(f, 4, t=1, z=2) == x[1, 2]).all()
    assert (read_planes(f, 4, t='max', z=0) == x[:, 0].max(0)).all()
    assert (read_planes(f, 4, t='max', z='max') == x.max((0, 1))).all()
    refused(lambda: read_planes(f, 4, z=0), '2 time points')
    refused(lambda: read_planes(f, 4, t=0), '3 planes')
    refused(lambda: read_planes(f, 24), '2 time points')
    refused(lambda: read_planes(f, 3, t=0, z=0), 'holds 4 channels', '3 would be read')

@pytest.mark.parametrize('axes', ['CZYX', 'ZCYX', 'ZTCYX', 'CTZYX', 'TCZYX'])
def test_every_order_of_ome(tmp_path, axes):
    x = pixels(*(dict(T=2, Z=3, C=4)[a] for a in axes[:-2]))
    f = write(tmp_path/'x.tif', x, axes)
    at = dict(T=1, Z=2)
    want = x[tuple(at.get(a, slice(None)) for a in axes[:-2])]
    assert (read_planes(f, 4, z=2, t=1 if 'T' in axes else None) == want).all()

@pytest.mark.parametrize('kind', KINDS)
def test_channels_that_are_said_to_be_channels(tmp_path, kind):
    x = pixels(3)
    f = write(tmp_path/'x.tif', x, 'CYX', kind)
    assert (read_planes(f, 3) == x).all() and (read_planes(f, 3, z=0, t=0) == x).all() and (read_planes(f, 3, z='max') == x).all()
    refused(lambda: read_planes(f, 3, z=1), 'z=1', '1 plane,')
    refused(lambda: read_planes(f, 2), '3 channels')

def test_imagej_stack_of_stains_says_what_to_do(tmp_path):
    "ImageJ's `Images to Stack` calls stains slices: a table that names the page of each is believed"
    x = pixels(3)
    f = write(tmp_path/'x.tif', x, 'ZYX', 'imagej')
    refused(lambda: read_planes(f, 3), 'if they are channels, name the page of each channel')
    assert (read_planes(f, 3, pages=[0, 1, 2]) == x).all()
    refused(lambda: read_planes(f, 3, pages=[0, 1, 2], z=1), 'names the page', 'z=1')

def test_stacks_without_a_word(tmp_path):
    x = pixels(3)
    tifffile.imwrite(f := tmp_path/'x.tif', x, **GRAY, metadata=None)
    assert (read_planes(f, 3) == x).all() and (read_planes(f, 3, z='max') == x).all()
    assert (read_planes(f, 1, z=2) == x[2]).all() and (read_planes(f, 1, t='max') == x.max(0)).all()
    refused(lambda: read_planes(f), '1 page of 1 sample', 'z=0')
    refused(lambda: read_planes(f, z=0, t=0), 'does not say which')
    refused(lambda: read_planes(f, 2, z=0), 'does not say which')
    samples = np.moveaxis(pixels(3, 2), 1, -1)
    tifffile.imwrite(f, samples, **GRAY, planarconfig='contig', metadata=None)
    assert (read_planes(f, 2, z=1) == np.moveaxis(samples[1], -1, 0)).all()

@pytest.mark.parametrize('kind', ['ome', 'shaped'])
def test_samples_and_planes(tmp_path, kind):
    x = pixels(3, 2)
    f = tmp_path/'x.tif'
    tifffile.imwrite(f, np.moveaxis(x, 1, -1), **GRAY, planarconfig='contig', metadata=dict(axes='ZYXC' if kind == 'shaped' else 'ZYXS'), **KINDS[kind])
    assert (read_planes(f, 2, z=1) == x[1]).all() and (read_planes(f, 2, z='max') == x.max(0)).all()
    refused(lambda: read_planes(f, 2), '3 planes')

def test_planes_in_samples_and_rows(tmp_path):
    "A description that fits no pages is no licence to read planes as channels"
    f = tmp_path/'x.tif'
    tifffile.imwrite(f, pixels(3), **GRAY, planarconfig='separate', metadata=dict(axes='ZYX'))
    refused(lambda: read_planes(f, 3), '3 planes')
    tifffile.imwrite(f, np.moveaxis(pixels(3), 0, -1), **GRAY, metadata=dict(axes='YXZ'))
    refused(lambda: read_planes(f, 3), '3 planes')

def test_one_plane_of_a_file_that_was_cut(tmp_path):
    "A description that came along with one page says nothing about others"
    x = pixels()
    tifffile.imwrite(f := tmp_path/'x.tif', x, description='ImageJ=1.53t\nslices=3\n', metadata=None)
    assert (read_planes(f)[0] == x).all()

def lsm(path, x, channels=1):
    "A file of a Zeiss confocal: planes as pages, numbers in the tag CZ_LSMINFO"
    n = len(x)
    info = struct.pack('<7i', 0x0400494C, 500, x.shape[-1], x.shape[-2], n, channels, 1) + bytes(472)
    tifffile.imwrite(path, x, **GRAY, metadata=None, extratags=[(34412, 'B', len(info), info, True)])
    return path

def test_lsm(tmp_path):
    x = pixels(3)
    f = lsm(tmp_path/'x.lsm', x)
    refused(lambda: read_planes(f, 3), '3 planes')
    assert (read_planes(f, z=2) == x[2]).all()

def test_names_in_the_file(tmp_path):
    x = pixels(3)
    f = write(tmp_path/'x.tif', x, 'CYX', Channel=dict(Name=NAMES))
    for ok in (NAMES, ['dna', 'er', 'agp'], ['DAPI', 'ConA', 'actin'], ()): assert (read_planes(f, 3, names=ok) == x).all()
    for bad in (['ER', 'DNA', 'AGP'], ['DNA', 'AGP', 'Mito'], ['DAPI', 'DNA', 'actin']):
        refused(lambda: read_planes(f, 3, names=bad), 'says that it holds DNA, ER, AGP', bad[0])
    assert (read_planes(f, 2, pages=[2, 0], names=['AGP', 'DNA']) == x[[2, 0]]).all()
    refused(lambda: read_planes(f, 2, pages=[0, 2], names=['AGP', 'DNA']), 'DNA, AGP')

def test_two_channels_may_have_one_name():
    check_channel_names(['DNA', 'DNA'], ['DNA', 'DNA 2'])
    check_channel_names(['', ''], ['DNA', 'ER'])
    with pytest.raises(ScreenError): check_channel_names(['DNA 2', 'DNA'], ['DNA', 'DNA 2'])

def set_of_files(folder, swapped=False):
    "An OME set of a file per channel, each of which describes all of them"
    x, files = pixels(2), ['a.tif', 'b.tif']
    for k, f in enumerate(files):
        entries = ''.join(f'<TiffData IFD="0" FirstC="{c}" FirstZ="0" FirstT="0" PlaneCount="1"><UUID FileName="{n}">urn:uuid:{c}</UUID></TiffData>' for c, n in enumerate(files))
        text = (f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{k}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
                f'DimensionOrder="XYCZT" Type="uint16" SizeX="14" SizeY="12" SizeZ="1" SizeC="2" SizeT="1"><Channel ID="Channel:0:0" Name="DNA"/><Channel ID="Channel:0:1" Name="ER"/>{entries}</Pixels></Image></OME>')
        tifffile.imwrite(folder/f, x[k], description=text, metadata=None)
    return x, files[::-1] if swapped else files

def table(folder, files, **columns):
    pd.DataFrame([dict(plate='P1', well='A01', **{f'FileName_{c}': f for c, f in zip(('DNA', 'ER'), files)}, **columns)]).to_csv(folder/'load_data.csv', index=False)
    return folder/'load_data.csv'

def test_a_set_of_ome_files(tmp_path):
    x, files = set_of_files(tmp_path)
    t, s = read_files(table(tmp_path, files))
    assert (s[t.site_id[0]] == x).all()
    t, s = read_files(table(tmp_path, files[::-1]))
    refused(lambda: s[t.site_id[0]], 'says that it holds ER, and not DNA')

@pytest.mark.parametrize('text', ['<!DOCTYPE a [<!ENTITY b "c">]><OME>&b;</OME>', '<OME><Image></OME>',
    '<OME><Image><Pixels DimensionOrder="XYQCZ" SizeZ="3"/></Image></OME>', '<OME><Image><Pixels SizeZ="99999999" SizeT="99999999"/></Image></OME>',
    '<OME><Image><Pixels SizeZ="three"/></Image></OME>', '<OME><Image><Pixels SizeZ="3"><TiffData IFD="0"/></Pixels></Image></OME>',
    '<OME><Image><Pixels SizeZ="3"><TiffData FirstZ="7"/></Pixels></Image></OME>'])
def test_ome_that_describes_nothing(tmp_path, text):
    "Several pages with a description that cannot be understood are rejected; one page is a picture"
    x = pixels(3)
    tifffile.imwrite(f := tmp_path/'x.tif', x, **GRAY, description=text, metadata=None)
    refused(lambda: read_planes(f, 3), 'x.tif', 'save it again')
    tifffile.imwrite(f, x[0], description=text, metadata=None)
    assert (read_planes(f)[0] == x[0]).all()

def test_several_fields_in_one_file(tmp_path):
    f = tmp_path/'x.tif'
    with tifffile.TiffWriter(f, ome=True) as w:
        for i in range(3): w.write(pixels(seed=i), **GRAY, metadata=dict(axes='YX'))
    refused(lambda: read_planes(f, 3), 'several fields')

def test_a_screen_of_stacks_with_planes(tmp_path):
    "The option reaches every file of a table, and the message the caller on his route"
    x = {w: pixels(4, 2, seed=i) for i, w in enumerate(('A01', 'A02'))}
    for w, o in x.items(): write(tmp_path/f'{w}.tif', o, 'ZCYX', 'imagej')
    pd.DataFrame([dict(plate='P1', well=w, file=f'{w}.tif') for w in x]).to_csv(tmp_path/'files.csv', index=False)
    how = dict(table=tmp_path/'files.csv', channels=['DNA', 'ER'])
    t, s = read_files(**how)
    refused(lambda: s.shape, 'A01.tif', '4 planes', 'z=0')
    with as_command(): refused(lambda: s.shape, '--z 0 to 3', '--z max')
    for z, want in ((1, lambda o: o[1]), ('max', lambda o: o.max(0))):
        t, s = read_files(**how, z=z)
        for i, w in zip(t.site_id, t.well): assert (s[i] == want(x[w])).all()
    for bad in (-1, 'mean', True, 1.5): refused(lambda: read_files(**how, z=bad), 'z=', 'max')

def test_a_png_is_one_plane(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path/'x.png')
    assert read_planes(tmp_path/'x.png', z='max', t=0).shape == (1, 8, 8)
    refused(lambda: read_planes(tmp_path/'x.png', z=1), 'z=1')
