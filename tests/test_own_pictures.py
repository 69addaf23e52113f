"Pictures of one's own, from the table or plate to the packed screen: what a sentence advises can be typed, and gives the right pixels."
import contextlib, io
import numpy as np, pandas as pd, pytest, tifffile
from helpers import simulate_screen
from rcic_fastai import cli
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.plates import read_plates

def pixels(*shape, seed=0): return np.random.default_rng(seed).integers(1, 4000, shape).astype(np.uint16)

def run(command, *args):
    "Return (exit code, all that was printed)"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): code = command([str(a) for a in args])
    return code, out.getvalue()

def ok(command, *args):
    code, text = run(command, *args)
    assert code == 0, text
    return text

def refused(command, *args):
    code, text = run(command, *args)
    assert code == 2 and text.count('\n') == 1, text
    return text

def plate(folder, shape=(2, 16, 16), axes='cyx', wells=('A/1', 'A/2'), labels=('DNA', 'ER'), absent=()):
    "Write an OME-Zarr 0.4 plate; return its folder and the pixels of its wells"
    import zarr
    g = zarr.open_group(str(folder), mode='w', zarr_format=2)
    rows, cols = (sorted({w.split('/')[i] for w in wells}) for i in (0, 1))
    g.attrs['plate'] = dict(version='0.4', rows=[dict(name=r) for r in rows], columns=[dict(name=c) for c in cols],
                            wells=[dict(path=w, rowIndex=rows.index(w[0]), columnIndex=cols.index(w[2:])) for w in wells])
    kind, x = dict(t='time', c='channel', z='space', y='space', x='space'), {}
    for n, w in enumerate(wells):
        if w in absent: continue
        o = g.require_group(w)
        o.attrs['well'] = dict(version='0.4', images=[dict(path='0')])
        f = o.require_group('0')
        f.attrs['multiscales'] = [dict(version='0.4', axes=[dict(name=a, type=kind[a]) for a in axes],
                                       datasets=[dict(path='0', coordinateTransformations=[dict(type='scale', scale=[1.]*len(axes))])])]
        if labels: f.attrs['omero'] = dict(channels=[dict(label=o, color='FFFFFF', window=dict(min=0, max=1, start=0, end=1)) for o in labels])
        x[w] = pixels(*shape, seed=n)
        f.create_array('0', shape=shape, dtype='uint16', chunks=(1, *shape[1:]))[:] = x[w]
    return folder, x

def files(folder, channels=('DNA', 'ER'), wells=('A01', 'A02'), **columns):
    "Write a TIFF per channel; return the table's path and the pixels of its wells"
    folder.mkdir(exist_ok=True)
    rows, x = [], {}
    for n, w in enumerate(wells):
        x[w] = pixels(len(channels), 16, 16, seed=n)
        for c, o in zip(channels, x[w]): tifffile.imwrite(folder/f'{w}_{c}.tif', o)
        rows.append(dict(Plate='P1', Well=w, **{f'FileName_{c}': f'{w}_{c}.tif' for c in channels}, **columns))
    pd.DataFrame(rows).to_csv(folder/'load_data.csv', index=False)
    return folder/'load_data.csv', x

def same(packed, x):
    s = open_screen(packed)
    for i, w in zip(s.table.site_id, s.table.well): assert (s.source[i] == x[w]).all()
    return s

@pytest.mark.parametrize('axis,word', [('z', 'planes'), ('t', 'time points')])
@pytest.mark.parametrize('choice', ['0', '2', 'max'])
def test_planes_of_a_plate(tmp_path, axis, word, choice):
    p, x = plate(tmp_path/'P.zarr', (2, 3, 16, 16) if axis == 'z' else (3, 2, 16, 16), 'czyx' if axis == 'z' else 'tcyx')
    said = refused(cli.rcic_pack, p, tmp_path/'a.zarr')
    assert f'3 {word}' in said and f'--{axis} 0 to 2' in said and f'--{axis} max' in said
    ok(cli.rcic_pack, p, tmp_path/'a.zarr', f'--{axis}', choice)
    at = 1 if axis == 'z' else 0
    same(tmp_path/'a.zarr', {f'A0{w[2]}': o.max(at) if choice == 'max' else o.take(int(choice), at) for w, o in x.items()})

@pytest.mark.parametrize('choice', ['0', '2', 'max'])
def test_planes_of_files(tmp_path, choice):
    x = pixels(3, 2, 16, 16)
    tifffile.imwrite(tmp_path/'a.tif', x, imagej=True, metadata=dict(axes='ZCYX'))
    pd.DataFrame([dict(plate='P1', well='A01', file='a.tif')]).to_csv(tmp_path/'files.csv', index=False)
    how = [tmp_path/'files.csv', tmp_path/'a.zarr', '--channels', 'DNA,ER']
    assert '--z 0 to 2' in refused(cli.rcic_pack, *how)
    ok(cli.rcic_pack, *how, '--z', choice)
    same(tmp_path/'a.zarr', dict(A01=x.max(0) if choice == 'max' else x[int(choice)]))

@pytest.mark.parametrize('z', ['-1', 'mean', '1.5', '99999999999'])
def test_a_plane_that_cannot_be(tmp_path, z):
    p, _ = plate(tmp_path/'P.zarr', (2, 3, 16, 16), 'czyx')
    assert '--z' in refused(cli.rcic_pack, p, tmp_path/'a.zarr', f'--z={z}')
    assert not (tmp_path/'a.zarr').exists()

def test_chunks_that_are_absent(tmp_path):
    p, x = plate(tmp_path/'P.zarr')
    (p/'A/2/0/0/1.0.0' if (p/'A/2/0/0/1.0.0').exists() else p/'A/2/0/0/1/0/0').unlink()
    assert '--only-present' in refused(cli.rcic_pack, p, tmp_path/'a.zarr')
    with pytest.raises(ScreenError, match="empty='fill'"):
        t, s = read_plates(p, progress=False)
        [s[i] for i in t.site_id]
    ok(cli.rcic_pack, p, tmp_path/'a.zarr', '--empty', 'fill')
    x['A/2'][1] = 0
    same(tmp_path/'a.zarr', {f'A0{w[2]}': o for w, o in x.items()})
    assert 'choose from error, fill' in refused(cli.rcic_pack, p, tmp_path/'b.zarr', '--empty', 'black')

def test_wells_without_a_field(tmp_path):
    p, x = plate(tmp_path/'P.zarr', absent=['A/2'])
    assert '--partial' in refused(cli.rcic_pack, p, tmp_path/'a.zarr')
    ok(cli.rcic_pack, p, tmp_path/'a.zarr', '--partial')
    assert len(same(tmp_path/'a.zarr', dict(A01=x['A/1']))) == 1

def wells_table(path, rows):
    pd.DataFrame(rows, columns=['plate', 'well', 'sirna']).to_csv(path, index=False)
    return path

def test_controls_and_test_experiments_of_plates(tmp_path):
    "As for a table of files, from the command and from Python"
    for e in ('E1', 'E2'): plate(tmp_path/e/f'{e}.zarr')
    paths = [tmp_path/e/f'{e}.zarr' for e in ('E1', 'E2')]
    w = wells_table(tmp_path/'wells.csv', [(e, o, s) for e in ('E1', 'E2') for o, s in (('A01', 'x'), ('A02', 'DMSO'))])
    t, _ = read_plates(paths, w, controls=dict(negative_control=['DMSO']), test='E2', progress=False)
    assert t.well_type.tolist() == ['treatment', 'negative_control']*2 and t.dataset.tolist() == ['train']*2 + ['test']*2
    ok(cli.rcic_pack, paths[1], tmp_path/'a.zarr', '--wells', wells_table(tmp_path/'one.csv', [('E2', 'A01', 'x'), ('E2', 'A02', 'DMSO')]),
       '--controls', 'DMSO=negative_control', '--test', 'E2', '--experiment', 'E2', '--cell-type', 'U2OS')
    s = open_screen(tmp_path/'a.zarr').table
    assert s.well_type.tolist() == ['treatment', 'negative_control'] and set(s.dataset) == {'test'} and set(s.cell_type) == {'U2OS'}
    for bad, words in ((dict(test='E3'), 'E3 cannot be test'), (dict(controls=dict(negative_control=['water'])), 'water'), (dict(controls=dict(blank=['DMSO'])), 'blank')):
        with pytest.raises(ScreenError, match=words): read_plates(paths, w, progress=False, **bad)

@pytest.mark.parametrize('option', [('--root', '.'), ('--replace', 'a=b'), ('--plate-wells', '96'), ('--cell-types', 'A549')])
def test_options_of_another_kind_of_screen(tmp_path, option):
    "One line that names the option, never a traceback"
    p, _ = plate(tmp_path/'P.zarr')
    text = refused(cli.rcic_pack, p, tmp_path/'a.zarr', *option)
    assert option[0] in text and 'is OME-Zarr plates' in text

@pytest.mark.parametrize('option', [('--wells', 'w.csv'), ('--empty', 'fill'), ('--partial',), ('--experiment', 'E'), ('--cell-types', 'A549')])
def test_options_of_plates_with_a_table(tmp_path, option):
    f, _ = files(tmp_path/'a')
    text = refused(cli.rcic_pack, f, tmp_path/'a.zarr', *option)
    assert option[0] in text and 'a table of files' in text

def test_paths_that_begin_elsewhere(tmp_path):
    f, x = files(tmp_path/'a')
    t = pd.read_csv(f)
    for c in ('DNA', 'ER'): t[f'PathName_{c}'] = 's3://bucket/run=1/Images/'
    t.to_csv(f, index=False)
    said = refused(cli.rcic_pack, f, tmp_path/'a.zarr')
    assert '--replace s3://bucket/=FOLDER' in said
    ok(cli.rcic_pack, f, tmp_path/'a.zarr', '--replace', f's3://bucket/run=1/Images/={tmp_path}/a')
    same(tmp_path/'a.zarr', x)

def test_no_column_of_data_sets(tmp_path):
    "A column called dataset that means something else"
    f, x = files(tmp_path/'a', Metadata_Dataset='cpg0016')
    assert '--columns dataset=' in refused(cli.rcic_pack, f, tmp_path/'a.zarr')
    ok(cli.rcic_pack, f, tmp_path/'a.zarr', '--columns', 'dataset=', '--dataset', 'test')
    assert set(same(tmp_path/'a.zarr', x).table.dataset) == {'test'}

def test_new_names_of_channels(tmp_path):
    f, x = files(tmp_path/'a')
    ok(cli.rcic_pack, f, tmp_path/'a.zarr', '--channels', 'reticulum=ER,nucleus=DNA')
    s = same(tmp_path/'a.zarr', {w: o[::-1] for w, o in x.items()})
    assert s.channels == ('reticulum', 'nucleus')

def test_cell_types_that_rxrx1_does_not_have(tmp_path):
    simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=4, size=32, plates=1, controls=1, n_workers=1, progress=False)
    m = pd.read_csv(tmp_path/'s/metadata.csv')
    m.assign(cell_type='A549').to_csv(tmp_path/'s/metadata.csv', index=False)
    said = refused(cli.rcic_pack, tmp_path/'s', tmp_path/'a.zarr')
    assert 'A549' in said and '--cell-types ' in said
    said = refused(cli.rcic_train, tmp_path/'s', tmp_path/'m', '--recipe', 'demo')
    assert 'pack the screen and allow others' in said
    ok(cli.rcic_pack, tmp_path/'s', tmp_path/'a.zarr', '--cell-types', 'A549')
    assert set(open_screen(tmp_path/'a.zarr').table.cell_type) == {'A549'}
    assert len(open_screen(tmp_path/'s', cell_types=['A549']))

def test_plates_whose_channels_are_called_otherwise(tmp_path):
    "New words for stains are fine, an exchange of them is not"
    p, x = plate(tmp_path/'P.zarr')
    t, s = read_plates(p, channels=['nucleus', 'reticulum'], progress=False)
    assert s.channels == ('nucleus', 'reticulum')
    with pytest.raises(ScreenError, match='holds DNA, ER, and not ER, DNA'): read_plates(p, channels=['ER', 'DNA'], progress=False)
    assert 'the order of --channels' in refused(cli.rcic_pack, p, tmp_path/'a.zarr', '--channels', 'ER,DNA')
    q, _ = plate(tmp_path/'Q.zarr', labels=None)
    assert read_plates(q, channels=['ER', 'DNA'], progress=False)[1].channels == ('ER', 'DNA')
