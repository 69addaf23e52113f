"""Tables and plates of other laboratories: their names stay what they are, what is ambiguous is rejected by name, and ordinary screens are read."""
import json
import numpy as np, pandas as pd, pytest, tifffile
from rcic_fastai.core import *
from rcic_fastai.embed.correct import _names
from rcic_fastai.embed.table import *
from rcic_fastai.predict.assign import _plates
from rcic_fastai.screen.files import *
from rcic_fastai.screen.open import *
from rcic_fastai.screen.plates import *
from rcic_fastai.screen.tables import *
from rcic_fastai.screen.tables import _number
from rcic_fastai.cli import _mapping, _roles, rcic_pack

WELLS = ('A01', 'A02', 'B01')


def table(folder, wells=WELLS, plates=('P1',), sites=(1,), channels=('DNA', 'ER'), **more):
    "Write a TIFF per channel, and return the rows of load_data.csv; `more`: lists with a cell per row, or one cell for all"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for p, w, s in ((p, w, s) for p in plates for w in wells for s in sites):
        row = dict(Metadata_Plate=p, Metadata_Well=w, Metadata_Site=s)
        for c in channels:
            row[f'FileName_Orig{c}'] = name = f'{p}_{w}_{s}_{c}.tif'
            tifffile.imwrite(folder/name, np.full((8, 8), len(rows) + 1, np.uint16))
        rows.append(row)
    return pd.DataFrame(rows).assign(**more)


def saved(df, path):
    df.to_csv(path, index=False)
    return path


def plate(root, wells=('A/1', 'A/2'), labels=(('DNA', 'ER'),), acquisitions=None, name=None, shape=(2, 8, 8)):
    "Write a small OME-Zarr 0.4 plate with a field for each of `labels`"
    import zarr
    g = zarr.open_group(str(root), mode='w', zarr_format=2)
    rows, cols = (sorted({w.split('/')[i] for w in wells}) for i in (0, 1))
    at = [dict(path=w, rowIndex=rows.index(w.split('/')[0]), columnIndex=cols.index(w.split('/')[1])) for w in wells]
    g.attrs['plate'] = dict(version='0.4', rows=[dict(name=r) for r in rows], columns=[dict(name=c) for c in cols], wells=at,
                            **({} if name is None else dict(name=name)))
    kinds = [dict(name='c', type='channel'), dict(name='y', type='space'), dict(name='x', type='space')]
    for w in wells:
        well = g.require_group(w)
        images = [dict(path=str(i)) | ({} if acquisitions is None else dict(acquisition=acquisitions[i])) for i in range(len(labels))]
        well.attrs['well'] = dict(version='0.4', images=images)
        for i, names in enumerate(labels):
            f = well.require_group(str(i))
            scale = [dict(type='scale', scale=[1.]*len(shape))]
            f.attrs['multiscales'] = [dict(version='0.4', axes=kinds, datasets=[dict(path='0', coordinateTransformations=scale)])]
            f.attrs['omero'] = dict(channels=[dict(label=n, color='FFFFFF', window=dict(min=0, max=1, start=0, end=1)) for n in names])
            f.create_array('0', shape=shape, dtype='uint16', chunks=shape)[:] = np.arange(np.prod(shape)).reshape(shape) + i
    return root


def official(folder, **more):
    "Write an official metadata.csv of six wells and return its path"
    folder.mkdir(parents=True, exist_ok=True)
    t = pd.DataFrame([dict(experiment=e, plate=p, well=w, site=1, well_type='treatment', cell_type='U2OS', dataset='train', sirna=f's{w}')
                      for e in ('U2OS-01', 'U2OS-02') for p in ('1',) for w in WELLS]).assign(**more)
    t['well_id'] = t.experiment + '_' + t.plate.astype(str) + '_' + t.well
    t['site_id'] = t.well_id + '_1'
    return saved(t, folder/'metadata.csv')


# names are text

@pytest.mark.parametrize('given, want', [
    (['0012', '12'], ['0012', '12']), (['7', '7.0', '7.00'], ['7', '7', '7']), ([7., None], ['7', None]), ([7, 8], ['7', '8']),
    (['1E4', '2E10'], ['1E4', '2E10']), (['None', 'NA', 'nan', 'null', ''], ['None', 'NA', 'nan', 'null', None]),
    ([' a ', '  '], ['a', None]), (['7.5', '7.50'], ['7.5', '7.50']), (['007.0'], ['007.0']), (['20210607153012345'], ['20210607153012345'])])
def test_a_name_is_text_and_only_the_empty_cell_is_missing(given, want):
    got = identifiers(pd.Series(given))
    assert got.tolist() == want and got.dtype == object
    assert identifiers(pd.Series(given).astype('category')).tolist() == want
    assert identifiers(got).tolist() == want


@pytest.mark.parametrize('column', [pd.Series([2.0210607153012345e16]), pd.Series([2.**24], dtype='float32'), pd.Series(['2.02E+16'])])
def test_a_long_number_that_lost_its_digits_is_rejected(column, tmp_path):
    with pytest.raises(ScreenError, match='last digits are lost'): identifiers(column.rename('plate'))
    t = table(tmp_path)
    with pytest.raises(ScreenError, match='Metadata_Plate holds'): read_files(t.assign(Metadata_Plate=column.iloc[0]), tmp_path)


def test_leading_zeros_stay_in_every_reader(tmp_path):
    csv = saved(table(tmp_path/'files', plates=('0012345', '12345')), tmp_path/'files/load_data.csv')
    assert read_files(csv)[0].plate.unique().tolist() == ['0012345', '12345']
    for p in ('0012345', '12345'): plate(tmp_path/f'plates/{p}.zarr')
    wells = pd.DataFrame(dict(plate=['0012345']*2 + ['12345']*2, well=['A1', 'a02']*2, sirna=['01', '1', '2', '3']))
    for w in (None, wells, saved(wells, tmp_path/'wells.csv')):
        t = read_plates(tmp_path/'plates', wells=w, progress=False)[0]
        assert t.plate.unique().tolist() == ['0012345', '12345'] and (w is None or t.sirna.tolist() == ['01', '1', '2', '3'])
    plate(tmp_path/'named.zarr', name='007')
    assert read_plates(tmp_path/'named.zarr', progress=False)[0].plate.unique().tolist() == ['007']
    t = read_metadata(official(tmp_path/'official', plate=['01']*3 + ['1']*3))
    assert t.plate.unique().tolist() == ['01', '1']
    kaggle = tmp_path/'kaggle'
    kaggle.mkdir()
    (kaggle/'train.csv').write_text('id_code,experiment,plate,well,sirna\na,U2OS-01,01,B03,1E4\nb,U2OS-01,1,B03,2E4\n')
    t = read_metadata(kaggle, sites=1)
    assert t.plate.tolist() == ['01', '1'] and t.sirna.tolist() == ['1E4', '2E4']
    assert _plates(['01', '1']).tolist() == ['01', '1'] and _names(pd.Series(['01', '1'])).tolist() == ['01', '1']


def test_seven_is_seven_from_every_kind_of_file(tmp_path):
    d = table(tmp_path, plates=('1', '2'), Metadata_Gene=['7', '8', '9', '7.0', '8.0', '9.0'], Metadata_Batch=['1']*3 + ['1.0']*3)
    t = read_files(saved(d, tmp_path/'load_data.csv'))[0]
    assert sorted(t.sirna.unique()) == ['7', '8', '9'] and t.experiment.unique().tolist() == ['1']
    d = d.assign(Metadata_Gene=[7., 8., None]*2, Metadata_Batch=1., Metadata_Plate=[1.]*3 + [2.]*3)
    d.to_parquet(tmp_path/'x.parquet')
    for f in (d, saved(d, tmp_path/'x.csv'), tmp_path/'x.parquet'):
        t = read_files(f, tmp_path)[0]
        assert t.sirna.tolist() == ['7', '8', None]*2 and t.plate.tolist() == [1]*3 + [2]*3 and set(t.experiment) == {'1'}
    wells = pd.DataFrame(dict(plate=7., well=['A01', 'A02'], sirna=[7., None], experiment=3.))
    plate(tmp_path/'7.zarr')
    for w in (wells, saved(wells, tmp_path/'w.csv')):
        t = read_plates(tmp_path/'7.zarr', wells=w, progress=False)[0]
        assert t.sirna.tolist() == ['7', None] and t.plate.tolist() == [7, 7] and set(t.experiment) == {'3'}
    t = read_metadata(official(tmp_path/'o', plate='1.0', sirna=['7', '8', '9', '7.0', '8.0', '9.0']))
    assert sorted(t.sirna.unique()) == ['7', '8', '9'] and t.plate.unique().tolist() == [1]


@pytest.mark.parametrize('given, want', [
    (['1', '2.5'], [1., 2.5]), (['1', '2'], [1, 2]), (['-3', '0'], [-3, 0]), (['1e-05', '2'], [1e-05, 2.]), (['1.0', '2'], [1., 2.]),
    (['1E4', '2E10'], None), (['007', '8'], None), (['2.50', '1'], None), (['1', 'x'], None), (['nan', '1'], None), (['inf', '1'], None),
    (['1_000', '2'], None), (['+1', '2'], None), (['-0', '1'], None), (['12345678901234567890', '1'], None),
    (['20210607153012345', '0.5'], None), (['0.1234567890123456789', '1'], None)])
def test_a_further_column_is_numeric_only_if_nothing_is_lost(given, want):
    got = numbers_if_exact(pd.Series(given))
    assert got.tolist() == (want or given) and pd.api.types.is_numeric_dtype(got) == (want is not None)


@pytest.mark.parametrize('gap', ['', None])
def test_long_numbers_beside_a_gap_keep_their_digits(gap, tmp_path):
    runs, maps = ['20210607153012345', '20210607153012346', gap], ['1E4', '2E10', '3E5']
    t = read_files(saved(table(tmp_path, Metadata_Run=runs, Metadata_PlateMap=maps), tmp_path/'load_data.csv'))[0]
    assert t.Run.tolist() == [int(runs[0]), int(runs[1]), pd.NA] and t.PlateMap.tolist() == maps
    plate(tmp_path/'P.zarr', wells=('A/1', 'A/2', 'A/3'))
    wells = pd.DataFrame(dict(plate='P', well=['A01', 'A02', 'A03'], Run=runs, PlateMap=maps))
    t = read_plates(tmp_path/'P.zarr', wells=saved(wells, tmp_path/'w.csv'), progress=False)[0]
    assert t.Run.tolist() == [int(runs[0]), int(runs[1]), pd.NA] and t.PlateMap.tolist() == maps
    t = read_plates(tmp_path/'P.zarr', wells=saved(wells[:2], tmp_path/'w.csv'), partial=True, progress=False)[0]
    assert t.Run.tolist() == [int(runs[0]), int(runs[1]), pd.NA]
    t = read_metadata(official(tmp_path, Run=runs*2, PlateMap=maps*2))
    assert t.Run.tolist()[:2] == [int(r) for r in runs[:2]] and t.PlateMap.tolist() == maps*2


def test_wells_have_one_spelling(tmp_path):
    wells = ['a1', ' A02', 'B001']
    assert read_files(table(tmp_path).assign(Metadata_Well=wells), tmp_path)[0].well.tolist() == list(WELLS)
    assert read_metadata(official(tmp_path, well=wells*2)).well.tolist() == list(WELLS)*2
    with pytest.raises(ScreenError, match="metadata.csv, row 3: 'r01c01' is not a well name"):
        read_metadata(official(tmp_path, well=['a1', 'r01c01', 'b1']*2))
    plate(tmp_path/'P.zarr')
    with pytest.raises(ScreenError, match="row 3: '01A' is not a well name"):
        read_plates(tmp_path/'P.zarr', wells=pd.DataFrame(dict(plate='P', well=['A1', '01A'])), progress=False)


def test_a_table_of_wells_from_a_spreadsheet_may_lack_the_zeros_of_its_plates(tmp_path):
    for p in ('007', '08'): plate(tmp_path/f'{p}.zarr')
    wells = pd.DataFrame(dict(plate=[7, 7, 8, 8], well=['A1', 'A2']*2, sirna=list('abcd')))
    assert read_plates(tmp_path, wells=wells, progress=False)[0].set_index('plate').sirna['08'].tolist() == ['c', 'd']
    plate(tmp_path/'7.zarr')
    with pytest.raises(ScreenError, match='the plate 008 .*did you mean 08'): read_plates(tmp_path, wells=wells.assign(plate=['7', '7', '008', '008']), progress=False)
    with pytest.raises(ScreenError, match='the plate 00007 .*did you mean 007'): read_plates(tmp_path, wells=wells.assign(plate=['00007']*2 + ['8']*2), progress=False)


@pytest.mark.parametrize('x', [0, 1, -7, 2.5, 1e-05, 1e22, 12345678901234567])
def test_a_number_that_was_written_is_read(x): assert _number(str(x)) == x


# missing is the empty cell, and controls are named as the table names them

COMPOUNDS = ['None', 'NA', 'cpd1']


def read_either(folder, names, how, **more):
    "Return the table of three wells, listed in a table of files or in a table of wells beside a plate"
    if how == 'files': return read_files(saved(table(folder, Metadata_Compound=names), folder/'load_data.csv'), **more)[0]
    folder.mkdir(parents=True, exist_ok=True)
    plate(folder/'P1.zarr', wells=('A/1', 'A/2', 'B/1'))
    wells = saved(pd.DataFrame(dict(plate='P1', well=WELLS, compound=names)), folder/'wells.csv')
    return read_plates(folder/'P1.zarr', wells=wells, progress=False, **more)[0]


either = pytest.mark.parametrize('how', ['files', 'plates'])


@either
def test_a_perturbation_may_be_called_none(tmp_path, how):
    t = read_either(tmp_path, COMPOUNDS, how, controls=dict(negative_control=['None'], positive_control='NA'))
    assert t.sirna.tolist() == COMPOUNDS and t.well_type.tolist() == ['negative_control', 'positive_control', 'treatment']


@either
@pytest.mark.parametrize('name', ['', [''], [None], None, [np.nan], [pd.NA], ['  ']])
def test_controls_can_be_the_empty_cell(tmp_path, how, name):
    t = read_either(tmp_path, [None, 'DMSO', 'x'], how, controls=dict(negative_control=name, positive_control=['DMSO']))
    assert t.well_type.tolist() == ['negative_control', 'positive_control', 'treatment'] and t.sirna.tolist() == [None, 'DMSO', 'x']


@either
def test_controls_that_are_not_in_the_table(tmp_path, how):
    def says(names, words, **controls):
        with pytest.raises(ScreenError) as e: read_either(tmp_path, names, how, controls=controls)
        for w in words: assert w in str(e.value), str(e.value)
    says(['DMSO', 'a', 'b'], ['dmso, which is no perturbation', 'did you mean DMSO?'], negative_control=['dmso'])
    says(['DM-SO', 'a', 'b'], ['did you mean DM-SO?'], negative_control=['dm so'])
    says(['DMSO', 'a', 'b'], ['water, which is no perturbation'], negative_control=['water'])
    says(['DMSO', 'dmso', 'b'], ['dmso differs from DMSO only in spelling', 'would be treatment', "controls=dict(KIND=['dmso'])"], negative_control=['DMSO'])
    says(['DMSO', 'a', 'b'], ['every well in', 'has a perturbation'], negative_control=[''])
    says([None, None, None], ['names no perturbation at all'], negative_control=[''])
    says(['DMSO', 'a', 'b'], ["makes 'DMSO' both negative_control and positive_control"], negative_control=['DMSO'], positive_control=['DMSO'])
    t = read_either(tmp_path, ['DMSO', 'dmso', 'b'], how, controls=dict(negative_control=['DMSO'], treatment=['dmso']))
    assert t.well_type.tolist() == ['negative_control', 'treatment', 'treatment']


@pytest.mark.parametrize('word', ['trt_xyz', 'control', 'blank', 'DMSO'])
def test_an_unknown_well_type_is_not_guessed(tmp_path, word):
    t = table(tmp_path, Metadata_pert_type=['trt', word, 'negcon'])
    with pytest.raises(ScreenError) as e: read_files(t, tmp_path)
    assert f"row 1: '{word}' is no known well type" in str(e.value) and f"controls=dict(KIND=['{word}'])" in str(e.value)
    assert 'negative_control=' not in str(e.value)
    with as_command(), pytest.raises(ScreenError, match=f'say what it is with --controls {word}=KIND'): read_files(t, tmp_path)
    assert read_files(t, tmp_path, controls=dict(positive_control=[word]))[0].well_type[1] == 'positive_control'


@pytest.mark.parametrize('word, kind', [
    ('trt_cp', 'treatment'), ('Negative control', 'negative_control'), ('ctl_vehicle', 'negative_control'), ('poscon_orf', 'positive_control'),
    ('NEGCON', 'negative_control'), ('positive-control', 'positive_control'), (' trt ', 'treatment')])
def test_usual_words_for_well_types(tmp_path, word, kind):
    assert set(read_files(table(tmp_path, Metadata_pert_type=word), tmp_path)[0].well_type) == {kind}
    plate(tmp_path/'P1.zarr')
    wells = pd.DataFrame(dict(plate='P1', well=['A1', 'A2'], well_type=word))
    assert set(read_plates(tmp_path/'P1.zarr', wells=wells, progress=False)[0].well_type) == {kind}
    assert set(read_metadata(official(tmp_path, well_type=word)).well_type) == {kind}


def test_controls_of_plates_need_a_table_of_wells(tmp_path):
    plate(tmp_path/'P1.zarr')
    for how in (dict(controls=dict(negative_control=['DMSO'])), dict(columns=dict(sirna='gene'))):
        with pytest.raises(ScreenError, match=f'{list(how)[0]} is about the table of wells, and there is none: give wells'):
            read_plates(tmp_path/'P1.zarr', progress=False, **how)


def test_the_command_line_names_the_empty_cell_and_no_column(tmp_path, capsys):
    assert _roles('=negative_control,a=b=treatment') == dict(negative_control=[''], treatment=['a=b'])
    assert _mapping('dataset=,plate=Bar=code', 'columns') == dict(dataset=None, plate='Bar=code')
    for f, s in ((_roles, 'DMSO='), (_roles, 'DMSO=treatment,DMSO=negative_control'),
                 (lambda o: _mapping(o, 'columns'), 'plate=a,plate=b'), (lambda o: _mapping(o, 'columns'), '=a')):
        with pytest.raises(ScreenError): f(s)
    csv = saved(table(tmp_path, Metadata_Compound=[None, 'a', 'b'], Metadata_Split='pilot'), tmp_path/'load_data.csv')
    assert rcic_pack([str(csv), str(tmp_path/'a.zarr'), '--controls', '=negative_control']) == 2
    assert 'for it with --columns dataset=.' in capsys.readouterr().err
    assert rcic_pack([str(csv), str(tmp_path/'a.zarr'), '--controls', '=negative_control', '--columns', 'dataset=']) == 0
    assert '1 negative_control, 2 treatment' in capsys.readouterr().out


# two columns of one meaning, and two columns of one name

@pytest.mark.parametrize('text', [b'Plate,Well,FileName_DNA,FileName_DNA\n1,A01,a,b\n', b'FileName_DNA,Plate,Well,FileName_DNA,FileName_DNA.1\na,1,A01,b,c\n',
                                  b'\xef\xbb\xbf"FileName_DNA",Plate,Well,FileName_DNA\r\na,1,A01,b\r\n'])
def test_a_repeated_header_is_rejected_by_every_reader(tmp_path, text):
    import gzip
    (tmp_path/'t.csv').write_bytes(text)
    (tmp_path/'t.csv.gz').write_bytes(gzip.compress(text))
    plate(tmp_path/'1.zarr')
    for f in (tmp_path/'t.csv', tmp_path/'t.csv.gz'):
        for read in (read_csv, read_files, read_metadata, lambda f: read_plates(tmp_path/'1.zarr', wells=f, progress=False)):
            with pytest.raises(ScreenError, match='t.csv.* has the column FileName_DNA more than once: rename one of them'): read(f)


def test_a_repeated_header_of_parquet_and_columns_without_a_name(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table([[1], ['A01'], ['a'], ['b']], names=['Plate', 'Well', 'FileName_DNA', 'FileName_DNA']), tmp_path/'t.parquet')
    with pytest.raises(ScreenError, match='column FileName_DNA more than once'): read_files(tmp_path/'t.parquet')
    d = table(tmp_path)
    d.index.name = ''
    d.assign(x=1).rename(columns=dict(x='')).to_csv(tmp_path/'t.csv')            # two columns without a name
    assert len(read_files(tmp_path/'t.csv')[0]) == 3
    d.rename(columns=dict(Metadata_Site='DNA.1')).assign(DNA=1).to_csv(tmp_path/'t.csv', index=False)
    assert read_files(tmp_path/'t.csv')[0]['DNA.1'].tolist() == [1]*3                 # DNA.1 is what its writer called it


DIFFER = [
    ('plate', dict(Plate='P2')), ('plate', dict(Barcode='BR1')), ('well', dict(well_position=['A02', 'A01', 'B01'])), ('site', dict(Field=2)),
    ('sirna', dict(Compound=['a', 'b', 'c'], Gene=['x', 'y', 'z'])), ('sirna', dict(Compound=['a', 'b', 'c'], Gene=['a', 'b', None])),
    ('experiment', dict(Batch='b1', experiment='b2')), ('cell_type', dict(cell_type='U2OS', cell_line='A549')),
    ('dataset', dict(split='train', dataset='test')), ('well_type', dict(control_type='negcon', pert_type='trt'))]


@pytest.mark.parametrize('key, more', DIFFER)
def test_two_columns_of_one_meaning_that_differ_are_named(tmp_path, key, more):
    d = table(tmp_path, **more)
    with pytest.raises(ScreenError) as e: read_files(d, tmp_path)
    both = [c for c in d if c in more or c == f'Metadata_{key.capitalize()}']
    assert f'both mean {key} and differ (row ' in str(e.value) and all(c in str(e.value) for c in both), str(e.value)
    with as_command(), pytest.raises(ScreenError, match=f'say which with --columns {key}='): read_files(d, tmp_path)
    for c in both: assert len(read_files(d, tmp_path, columns={key: c})[0]) == 3
    if key != 'site':
        plate(tmp_path/'P1.zarr', wells=('A/1', 'A/2', 'B/1'))
        with pytest.raises(ScreenError, match=f'both mean {key} and differ'): read_plates(tmp_path/'P1.zarr', wells=d, progress=False)


def test_two_columns_that_say_the_same_are_one(tmp_path):
    d = table(tmp_path, Plate='P1', Barcode=['P1', ' P1', 'P1'], well_position=['a1', 'A002', 'B1'], FOV=['1.0']*3, Compound=['7', '8', '9'],
              Gene=[7., 8., 9.], split='Validation', dataset='val')
    t = read_files(d, tmp_path)[0]
    assert t.plate.tolist() == ['P1']*3 and set(t.dataset) == {'val'} and t.sirna.tolist() == ['7', '8', '9']
    assert list(t.columns) == SITE_COLUMNS
    jump = table(tmp_path, Metadata_pert_type=['trt', 'control', 'control'], Metadata_control_type=[None, 'negcon', 'poscon_diverse'])
    assert read_files(jump, tmp_path)[0].well_type.tolist() == ['treatment', 'negative_control', 'positive_control']
    t = read_files(jump, tmp_path, controls=dict(treatment=['poscon_diverse']))[0]
    assert t.well_type.tolist() == ['treatment', 'negative_control', 'treatment']
    with pytest.raises(ScreenError, match="'control' is no known well type"): read_files(jump.assign(Metadata_control_type=[None, 'negcon', None]), tmp_path)


@pytest.mark.parametrize('name', ['Image_FileName_OrigDNA', 'filename_origdna'])
def test_two_columns_of_files_of_one_channel(tmp_path, name):
    d = table(tmp_path)
    with pytest.raises(ScreenError, match=f'FileName_OrigDNA and {name}, which both mean the filename of one channel'):
        read_files(d.assign(**{name: 'old.tif'}), tmp_path)
    assert read_files(d.assign(**{name: d.FileName_OrigDNA}), tmp_path)[1].channels == ('DNA', 'ER')


def test_columns_that_are_not_read_may_differ(tmp_path):
    assert len(read_files(table(tmp_path, file='a', path='b', stain='c', channel='d'), tmp_path)[0]) == 3
    d = pd.DataFrame(dict(Plate='P1', Well=WELLS, file=[f'P1_{w}_1_DNA.tif' for w in WELLS], url='s3://bucket/x.tif'))
    assert len(read_files(d, tmp_path, channels=['DNA'])[0]) == 3


# what a table is, its columns say

def test_a_table_of_files_may_have_any_name(tmp_path):
    d = table(tmp_path/'a', Metadata_Compound=list(WELLS))
    for name in ('metadata.csv', 'train.csv', 'test.csv', 'sites.csv', 'sites.parquet', 'files.table', 'x.csv.gz'):
        f = tmp_path/'a'/name
        if 'csv' in name: d.to_csv(f, index=False)
        else: d.to_parquet(f)
        assert screen_kind(f) == 'files'
        assert open_screen(f, columns=dict(sirna='Metadata_Compound')).table.sirna.tolist() == list(WELLS)
        if name == 'metadata.csv':
            assert screen_kind(tmp_path/'a') == 'files' and len(open_screen(tmp_path/'a')) == 3
        f.unlink()


def test_a_site_table_may_have_any_name(tmp_path):
    f = official(tmp_path/'a')
    assert screen_kind(f) == screen_kind(tmp_path/'a') == 'folder'
    want = read_metadata(f)
    for name in ('sites.csv', 'train.csv', 'load_it.csv'):
        assert screen_kind(f.rename(tmp_path/'a'/name)) == 'folder'
        pd.testing.assert_frame_equal(read_metadata(tmp_path/'a'/name), want)
        (tmp_path/'a'/name).rename(f)
    pd.read_csv(f, dtype=str).to_parquet(tmp_path/'a/x.table')
    assert screen_kind(tmp_path/'a/x.table') == 'folder'
    pd.testing.assert_frame_equal(read_metadata(tmp_path/'a/x.table'), want)
    d = pd.read_csv(f).assign(picture='a.tif')                 # the same columns, and one of files that only the caller knows
    with pytest.raises(ScreenError, match='6 of 6 sites lack channel files'):
        open_screen(saved(d.assign(picture=[f'{i}.tif' for i in range(6)]), tmp_path/'m.csv'), columns=dict(file='picture'), channels=['DNA'])


def test_a_table_of_wells_beside_plates_may_be_called_metadata(tmp_path):
    plate(tmp_path/'P1.zarr')
    for name in ('metadata.csv', 'train.csv'):
        saved(pd.DataFrame(dict(plate='P1', well=['A1', 'A2'], sirna=['x', 'y'])), tmp_path/name)
        assert screen_kind(tmp_path) == 'plates'
    assert open_screen(tmp_path, wells=tmp_path/'metadata.csv', progress=False).table.sirna.tolist() == ['x', 'y']


@pytest.mark.parametrize('columns', [('Plate', 'Well', 'sirna'), ('Metadata_Plate', 'Metadata_Well', 'Metadata_pert_iname'), ('Barcode', 'well_position', 'gene'),
                                     ('plate', 'well', 'sirna')])
def test_tables_of_wells_have_the_names_of_tables_of_files(tmp_path, columns):
    plate(tmp_path/'P1.zarr')
    d = pd.DataFrame([['P1', 'A1', 'x'], ['P1', 'a02', 'DMSO']], columns=columns)
    d = d.assign(Metadata_control_type=[None, 'negcon'], Metadata_Batch='b1', Split='Validation', Cell_Line='U2OS', Metadata_Dose=['1', '2.5'])
    for w in (d, saved(d, tmp_path/'w.csv')):
        t = read_plates(tmp_path/'P1.zarr', wells=w, progress=False)[0]
        assert t.sirna.tolist() == ['x', 'DMSO'] and t.well_type.tolist() == ['treatment', 'negative_control']
        assert (set(t.experiment), set(t.dataset), set(t.cell_type), t.Dose.tolist()) == ({'b1'}, {'val'}, {'U2OS'}, [1, 2.5])
    d.to_parquet(tmp_path/'w.parquet')
    assert read_plates(tmp_path/'P1.zarr', wells=tmp_path/'w.parquet', progress=False)[0].sirna.tolist() == ['x', 'DMSO']
    t = read_plates(tmp_path/'P1.zarr', wells=d.rename(columns={columns[2]: 'lot'}), columns=dict(sirna='lot'), progress=False)[0]
    assert t.sirna.tolist() == ['x', 'DMSO']


# ordinary screens are not rejected whole

def sites(batches=('b1', 'b2'), only_controls='b1'):
    "Return a site table in which one batch has a second plate of controls only"
    rows = [dict(experiment=b, plate=p, well=w, site=1, well_type='negative_control' if w == 'A01' or p == 'C' else 'treatment', cell_type='U2OS',
                 dataset='test' if b == batches[-1] else 'train', sirna='DMSO' if w == 'A01' or p == 'C' else f's{w}')
            for b in batches for p in ('P', 'C')[:1 + (b == only_controls)] for w in WELLS]
    t = pd.DataFrame(rows)
    t['well_id'] = t.experiment + '_' + t.plate + '_' + t.well
    t['sirna_id'] = t.sirna.map(dict(DMSO=0, sA02=1, sB01=2)).astype('Int64')
    return t.assign(site_id=t.well_id + '_1', plate_group=pd.array([pd.NA]*len(t), 'Int64'))[SITE_COLUMNS]


def test_a_plate_of_controls_is_left_out_with_a_note(capsys):
    from rcic_fastai.batch.data import control_plates_note
    from rcic_fastai.predict.plan import prediction_rows
    from rcic_fastai.workflow import training_rows
    t = sites()
    assert control_plates_note(t) == 'b1 plate C holds controls only, so there is no siRNA to name there: left out.'
    assert set(training_rows(t).plate) == {'P'} and 'note: b1 plate C holds controls only' in capsys.readouterr().out
    assert set(training_rows(t, controls=True).plate) == {'P', 'C'} and capsys.readouterr().out == ''
    assert set(training_rows(t, norm='experiment').plate) == {'P', 'C'}
    assert set(training_rows(t, target='cell_type').plate) == {'P', 'C'}
    test = sites(only_controls='b2')
    assert set(prediction_rows(test).plate) == {'P'} and set(prediction_rows(test, 'all').plate) == {'P', 'C'}
    assert control_plates_note(sites(('b1', 'b2', 'b3'), 'none')) == ''
    nothing = t.assign(well_type='negative_control')
    for f in (control_plates_note, lambda t: prediction_rows(t.assign(dataset='test'))):
        with pytest.raises(ScreenError, match='No plate has a treatment well .b1 plate C, b1 plate P, b2 plate P|No plate has a treatment well'): f(nothing)
    with pytest.raises(ScreenError, match='No training row has a value of sirna and is a treatment well'): training_rows(nothing)


def test_one_acquisition_of_several(tmp_path, capsys):
    p = plate(tmp_path/'P.zarr', labels=[('DAPI', 'ER'), ('DAPI', 'Ki67'), ('DAPI', 'Ki67')], acquisitions=(0, 3, 3))
    with pytest.raises(ScreenError, match='choose one of the acquisitions 0, 3 with acquisition=0'): read_plates(p, progress=False)
    t, source = read_plates(p, acquisition=0, progress=False)
    assert source.channels == ('DAPI', 'ER') and t.site.tolist() == [1, 1] and (source[t.site_id[0]] == np.arange(128).reshape(2, 8, 8)).all()
    t, source = read_plates(p, acquisition=3, progress=False)
    assert source.channels == ('DAPI', 'Ki67') and t.site.tolist() == [1, 2]*2 and t.acquisition.tolist() == [3]*4
    assert source[t.site_id[0]][0, 0, 0] == 1 and source[t.site_id[1]][0, 0, 0] == 2
    with pytest.raises(ScreenError, match='acquisition=1 is not in .*: choose from 0, 3'): read_plates(p, acquisition=1, progress=False)
    with pytest.raises(ScreenError, match='name no acquisition; leave it out'): read_plates(plate(tmp_path/'Q.zarr'), acquisition=0, progress=False)
    assert rcic_pack([str(p), str(tmp_path/'x.zarr')]) == 2 and 'with --acquisition 0.' in capsys.readouterr().err
    assert rcic_pack([str(p), str(tmp_path/'x.zarr'), '--acquisition', '0']) == 0
    assert open_screen(tmp_path/'x.zarr').channels == ('DAPI', 'ER')


def test_an_acquisition_that_a_well_lacks(tmp_path):
    p = plate(tmp_path/'P.zarr', labels=[('DNA', 'ER')]*2, acquisitions=(0, 1))
    attrs = json.loads((p/'A/1/.zattrs').read_text())
    attrs['well']['images'] = attrs['well']['images'][:1]
    (p/'A/1/.zattrs').write_text(json.dumps(attrs))
    with pytest.raises(ScreenError, match='1 listed well has no field of acquisition 1 .P.zarr A01'): read_plates(p, acquisition=1, progress=False)
    assert read_plates(p, acquisition=1, partial=True, progress=False)[0].well.tolist() == ['A02']
    assert len(read_plates(p, progress=False)[0]) == 3


# paths and names are taken apart at their borders

@pytest.mark.parametrize('replace, path, want', [
    ({'/o/P1': '/x', '/o/P10': '/y'}, '/o/P10/a.tif', '/y/a.tif'), ({'/o/P10': '/y', '/o/P1': '/x'}, '/o/P1/a.tif', '/x/a.tif'),
    ({'/o': '/x', '/o/P1': '/y'}, '/o/P1/a.tif', '/y/a.tif'), ({'/o/': '/x'}, '/o/a.tif', '/x/a.tif'), ({'/': '/x'}, '/o/a.tif', '/x/o/a.tif'),
    ({'s3://b/': '/x'}, 's3://b/o/a.tif', '/x/o/a.tif'), ({'s3://b': '/x', 's3://b2': '/y'}, 's3://b2/a.tif', '/y/a.tif'),
    ({'D:\\scr': '/x', 'D:\\scr2': '/y'}, 'D:\\scr2\\a.tif', '/y/a.tif'), ({'': '/x'}, 'a.tif', '/x/a.tif'), ({'P1': '/x', 'P10': '/y'}, 'P10/a.tif', '/y/a.tif')])
def test_beginnings_of_paths_end_at_a_folder(replace, path, want):
    from rcic_fastai.screen.files import _local
    unused = [a for a in replace if not path.replace('\\', '/').startswith(a.replace('\\', '/'))]
    others = [f'{a.rstrip("/")}/other' for a in replace if a]
    assert _local([path, *others], replace, 'x.csv')[0] == want, unused


def test_a_beginning_that_no_folder_has_is_said():
    from rcic_fastai.screen.files import _local
    with pytest.raises(ScreenError, match='No path in x.csv begins with /o/P1:'): _local(['/o/P10/a.tif'], {'/o/P1': '/x'}, 'x.csv')
    assert _local(['/o/P1/a.tif'], {'/o': '/x', '/o/P1': '/y'}, 'x.csv')[0] == '/y/a.tif'


@pytest.mark.parametrize('how', ['files', 'official'])
def test_a_well_id_is_of_one_well(tmp_path, how):
    "B_1 with plate P, and B with plate 1_P, are both B_1_P; and a column well_id may hold positions"
    if how == 'files':
        d = table(tmp_path, plates=('P', '1_P'), sites=(1,))
        d['Metadata_Batch'], d['Metadata_Site'] = ['B_1']*3 + ['B']*3, [1]*3 + [2]*3
        with pytest.raises(ScreenError, match='calls two wells B_1_P_A01 .B_1, plate P, A01 and B, plate 1_P, A01.: give each'): read_files(d, tmp_path)
        d = table(tmp_path, plates=('P', 'Q')).assign(well_id=list(WELLS)*2, site_id=list('abcdef'))
        with pytest.raises(ScreenError, match='calls two wells A01 .P, plate P, A01 and Q, plate Q, A01'): read_files(d, tmp_path)
    else:
        t = pd.read_csv(official(tmp_path)).assign(well_id='w', site_id=list('abcdef'))
        with pytest.raises(ScreenError, match='calls two wells w '): read_metadata(saved(t, tmp_path/'m.csv'))


def test_groups_of_plates_do_not_mix_at_the_border():
    t = sites(('B_1', 'B')).assign(dataset='train')
    t = pd.concat([t[t.experiment == 'B_1'].assign(plate='P', sirna='s1', sirna_id=1), t[t.experiment == 'B'].assign(plate='1_P', sirna='s2', sirna_id=2)])
    assert sirna_groups(t.assign(well_type='treatment')).to_dict() == dict(s1=0, s2=1)
    given = pd.DataFrame(dict(experiment=['B_1', 'B'], plate_1=[3, 4], group_plate2=[5, 6]))
    groups = add_plate_groups(t.assign(plate=['plate_1']*3 + ['1']*3), given)
    assert groups.plate_group.tolist() == [3]*3 + [4]*3
    assert add_plate_groups(t.assign(plate=2), given).plate_group.tolist() == [5]*3 + [6]*3


@pytest.mark.parametrize('plates', [('BR00117035', 'BR00117036'), ('0012345', '12345'), ('1', '2')])
@pytest.mark.parametrize('level', [None, 'site', 'well'])
def test_barcodes_reach_the_profiles(tmp_path, plates, level):
    csv = saved(table(tmp_path, plates=plates, sites=(1, 2), Metadata_Batch='2021_04_26_Batch1'), tmp_path/'load_data.csv')
    t = read_files(csv)[0]
    f = write_profiles(make_emb_table(t, np.ones((len(t), 4))), tmp_path/'p.parquet', level)
    p = pd.read_parquet(f)
    assert sorted(p.Metadata_Barcode.unique()) == sorted(plates) and set(p.Metadata_Plate) == {f'2021_04_26_Batch1_{b}' for b in plates}
    codes = pd.DataFrame(dict(Barcode=plates, Plate_Map=['m1', 'm2']))
    assert len(p.merge(codes, left_on='Metadata_Barcode', right_on='Barcode')) == len(p)
    taken = make_emb_table(t.assign(barcode='mine'), np.ones((len(t), 4)))
    assert sorted(profile_table(taken).Metadata_Barcode_.unique()) == sorted(plates)


def test_a_further_column_is_never_a_second_plate_of_the_profiles(tmp_path):
    d = table(tmp_path, Metadata_Barcode='BR1', Metadata_Batch='day', Run='b1', dose=['1', '2', '3'], Dose=['a', 'b', 'c'])
    t = read_files(d, tmp_path, columns=dict(plate='Metadata_Barcode', experiment='Run'))[0]
    assert [c for c in t if c not in SITE_COLUMNS] == ['Plate_', 'Batch_', 'dose', 'Dose_']
    p = profile_table(make_emb_table(t, np.ones((3, 4))))
    assert set(p.Metadata_Barcode) == {'BR1'} and set(p.Metadata_Plate_) == {'P1'} and set(p.Metadata_Plate) == {'b1_BR1'}


# channels by name, on every route

def test_channels_of_a_plate_are_renamed_by_name(tmp_path):
    "Whatever the order of the names: a new name belongs to the pixels of the old one"
    p = plate(tmp_path/'P.zarr')
    plain = read_plates(p, progress=False)[1]
    first = plain.site_ids[0]
    t, s = read_plates(p, channels=dict(reticulum='ER', nucleus='dna'), progress=False)
    assert s.channels == ('nucleus', 'reticulum') and (s[first] == plain[first]).all()
    for odd in (dict(a='nothing', b='such'), dict(a='DNA'), dict(a='DNA', b='DNA')):
        with pytest.raises(ScreenError, match='each channel of the plates once: DNA, ER'): read_plates(p, channels=odd, progress=False)
    with pytest.raises(ScreenError, match='1 names .DNA.'): read_plates(p, channels='DNA', progress=False)


def test_channels_by_number_in_a_table_of_files(tmp_path):
    df = table(tmp_path/'f', channels=('1', '2'))
    for channels in ([2], ['2'], {'ER': 2}): assert len(read_files(df, tmp_path/'f', channels)[1].channels) == 1
    assert read_files(df, tmp_path/'f', {'ER': 2})[1].channels == ('ER',)


def test_names_of_rxrx1_stay_with_their_files(tmp_path):
    from helpers import simulate_screen
    simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=4, size=32, controls=0, sites=1, progress=False)
    plain = open_screen(tmp_path/'s')
    site = plain.table.site_id[0]
    named = open_screen(tmp_path/'s', channels=dict(DNA='nucleus', MT='actin', reticulum='ER'))
    assert named.channels == ('DNA', 'reticulum', 'MT') and (named.source[site] == plain.source[site][:3]).all()
    for odd in (['nucleus', 'actin'], dict(DNA='nucleus', MT='mitochondria')):
        with pytest.raises(ScreenError, match='channels'): open_screen(tmp_path/'s', channels=odd)


# tables as people store them

@pytest.mark.parametrize('index', ['Metadata_Plate', ['Metadata_Plate', 'Metadata_Well']], ids=str)
def test_the_index_of_a_parquet_table_is_columns(tmp_path, index):
    df = table(tmp_path/'f', plates=('P1', 'P2'))
    df.set_index(index).to_parquet(tmp_path/'f/t.parquet')
    got, want = read_files(tmp_path/'f/t.parquet')[0], read_files(df, tmp_path/'f')[0]
    assert got.well_id.tolist() == want.well_id.tolist()


def test_a_column_of_lists_is_left_alone(tmp_path):
    df = table(tmp_path/'f')
    df['tags'] = [['a', 'b']]*len(df)
    df.to_parquet(tmp_path/'f/t.parquet')
    assert len(read_files(tmp_path/'f/t.parquet')[0]) == len(df)


def test_an_empty_dataset_is_the_default(tmp_path):
    df = table(tmp_path/'f', split=['test', None, None])
    assert read_files(df, tmp_path/'f', dataset='val')[0].dataset.tolist() == ['test', 'val', 'val']


@pytest.mark.parametrize('word', ['valid', 'Test', 'holdout'])
def test_an_official_table_has_the_official_words_for_datasets(tmp_path, word):
    with pytest.raises(ScreenError, match=f"dataset '{word}'; use train, val, test, id_test"): read_metadata(official(tmp_path, dataset=word))


@pytest.mark.parametrize('n', [9, 12, 110])
def test_leading_zeros_that_a_spreadsheet_took_off_some_plates(tmp_path, n):
    "Also where some plates need none"
    width = len(str(n))
    for i in range(1, n + 1, max(n//11, 1)): plate(tmp_path/'all'/f'{i:0{width}d}.zarr', wells=('A/1',))
    names = [int(p.stem) for p in sorted((tmp_path/'all').glob('*.zarr'))]
    wells = pd.DataFrame(dict(plate=[str(i) for i in names], well='A01', sirna=[f's{i}' for i in names]))
    t = read_plates(tmp_path/'all', wells, progress=False)[0]
    assert t.sirna.tolist() == [f's{int(p)}' for p in t.plate]


# advice that works

@pytest.mark.parametrize('kind', ['folder', 'packed', 'files'])
def test_advice_about_what_is_missing_is_of_the_kind_of_screen(tmp_path, kind):
    from rcic_fastai.screen.pack import pack_screen
    if kind == 'files': s = open_screen(saved(table(tmp_path/'f'), tmp_path/'f/load_data.csv'))
    else:
        from helpers import simulate_screen
        simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=4, size=32, controls=0, sites=1, progress=False)
        s = open_screen(tmp_path/'s')
        if kind == 'packed': s = open_screen(pack_screen(s, tmp_path/'s.zarr', progress=False))
    said = '; '.join(missing_parts(s))
    assert ('test=' in said) == (kind != 'folder') and ('column dataset' in said) == (kind == 'folder')     # nobody edits the table of a packed screen
    assert 'a prediction needs' not in said      # a trained model names experiments that it did not learn, marked or not
    if kind == 'files': assert "controls=dict(negative_control=['DMSO'])" in said


# what a newcomer met

@pytest.mark.parametrize('sep, word', [(';', 'semicolons'), ('\t', 'tabs')])
def test_another_separator_is_said(tmp_path, sep, word):
    table(tmp_path/'f').to_csv(tmp_path/'f/t.csv', index=False, sep=sep)
    with pytest.raises(ScreenError, match=f'separated by {word}: save it as comma-separated'): read_files(tmp_path/'f/t.csv')


def test_plates_taken_for_experiments_are_said(tmp_path, capsys):
    df = table(tmp_path/'f', plates=('P1', 'P2'))
    read_files(df, tmp_path/'f')
    assert 'each plate is taken for one' in capsys.readouterr().out
    read_files(df.assign(batch='May'), tmp_path/'f')
    read_files(df[df.Metadata_Plate == 'P1'], tmp_path/'f')
    assert 'taken for' not in capsys.readouterr().out


def test_a_screen_without_names_of_perturbations_is_said(tmp_path):
    said = '; '.join(missing_parts(open_screen(saved(table(tmp_path/'f', molecule='x'), tmp_path/'f/load_data.csv'))))
    assert "no well has a perturbation" in said and "columns=dict(sirna='COLUMN')" in said
    named = '; '.join(missing_parts(open_screen(saved(table(tmp_path/'g', compound='x'), tmp_path/'g/load_data.csv'))))
    assert 'no well has' not in named


def test_controls_without_a_column_of_perturbations_ask_for_the_column(tmp_path):
    "The name is in the table, in a column whose name nothing knows: the spelling is not what is wrong"
    df = table(tmp_path/'f', cpd='DMSO')
    with pytest.raises(ScreenError, match=r"has no column of perturbations by any usual name: name it with columns=dict\(sirna='COLUMN'\)"):
        read_files(df, tmp_path/'f', controls=dict(negative_control=['DMSO']))
    assert set(read_files(df, tmp_path/'f', controls=dict(negative_control=['DMSO']), columns=dict(sirna='cpd'))[0].well_type) == {'negative_control'}


@pytest.mark.parametrize('given, said', [('DMS0', 'did you mean DMSO[?]'), ('dmso', 'did you mean DMSO[?]'), ('water', 'it has DMSO[.]')])
def test_a_misspelled_control_is_told_what_there_is(tmp_path, given, said):
    with pytest.raises(ScreenError, match=said): read_files(table(tmp_path/'f', compound='DMSO'), tmp_path/'f', controls=dict(negative_control=[given]))


def test_text_among_doses_is_said(tmp_path):
    from rcic_fastai.screen.open import dose_notes
    def said(doses):
        df = table(tmp_path/'f', compound='x', plates=('P1', 'P2'), batch='May')
        df['dose'] = [doses[p == 'P2'] for p in df.Metadata_Plate]
        return '; '.join(dose_notes(open_screen(saved(df, tmp_path/'f/load_data.csv')).wells))
    for doses in (('0.1', '1 uM'), ('1 uM', '100 nM')): assert "the column dose has '1 uM', which is no number" in said(doses)
    assert 'which is no number' not in said(('0.1', '1')) + said(('low', 'high'))


def test_no_weights_are_advised_as_each_route_says_it():
    assert option('pretrained', None) == 'pretrained=None'
    with as_command(): assert option('pretrained', None) == '--pretrained no'


def test_perturbations_that_differ_only_in_spelling_are_said(tmp_path):
    from rcic_fastai.screen.open import missing_parts
    def said(*names):
        df = table(tmp_path/'f', compound='x', plates=('P1', 'P2'), batch='May')
        df['compound'] = [names[p == 'P2'] for p in df.Metadata_Plate]
        return '; '.join(missing_parts(open_screen(saved(df, tmp_path/'f/load_data.csv'))))
    assert 'Taxol and taxol differ only in spelling' in said('Taxol', 'taxol')
    assert 'differ only' not in said('Taxol', 'taxol 2')


def test_wells_without_a_dose_are_said(tmp_path):
    from rcic_fastai.screen.open import dose_notes
    from rcic_fastai.workflow import training_notes
    df = table(tmp_path/'f', compound='x', plates=('P1', 'P2'), batch='May')
    for doses, n in (([1, None], 1), ([None, None], 0), ([1, 2], 0)):
        wells = open_screen(saved(df.assign(dose=[doses[p == 'P2'] for p in df.Metadata_Plate]), tmp_path/'f/load_data.csv')).wells
        said = dose_notes(wells)
        assert sum('a perturbation and no dose in the column dose (' in o and 'x beside x @ 1' in o for o in said) == n
        assert sum('no dose in the column dose' in o for o in training_notes(wells, 'sirna+dose')) == n == sum('no dose' in o for o in training_notes(wells, 'sirna'))


@pytest.mark.parametrize('word, is_said', [('NA', 1), ('n/a', 1), ('nan', 1), ('None', 1), ('empty', 1), ('-', 1), ('NAC', 0), ('x', 0)])
def test_a_word_for_an_empty_well_is_said(tmp_path, word, is_said):
    df = table(tmp_path/'f', compound=word, batch='May')
    said = '; '.join(missing_parts(open_screen(saved(df, tmp_path/'f/load_data.csv'))))
    assert (f'{word} is the perturbation of' in said and 'leave the cell empty' in said and f"controls=dict(negative_control=['{word}'])" in said) == bool(is_said)


def test_a_row_with_too_many_cells_is_named(tmp_path):
    (tmp_path/'l.csv').write_text('well,compound\nA01,x\nA02,x,y,z\n')
    with pytest.raises(ScreenError, match='l.csv, row 3, has 4 cells, and the rows before it 2'): read_table(tmp_path/'l.csv')
