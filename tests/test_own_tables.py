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
    with pytest.raises(ScreenError, match='008 A01'): read_plates(tmp_path, wells=wells.assign(plate=['7', '7', '008', '008']), progress=False)
    with pytest.raises(ScreenError, match='00007 A01'): read_plates(tmp_path, wells=wells.assign(plate=['00007']*2 + ['8']*2), progress=False)


@pytest.mark.parametrize('x', [0, 1, -7, 2.5, 1e-05, 1e22, 12345678901234567])
def test_a_number_that_was_written_is_read(x): assert _number(str(x)) == x
