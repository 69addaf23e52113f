"Only an empty cell is missing: a perturbation may be called None, NA or null, in every table that is read or written."
import numpy as np, pandas as pd, pytest
from pandas._libs.parsers import STR_NA_VALUES
from helpers import simulate_screen
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.screen import Screen
from rcic_fastai.embed.table import read_embeddings, write_embeddings
from rcic_fastai.predict.predict import read_predictions, write_predictions
from rcic_fastai.results.evaluate import right_wrong
from rcic_fastai.screen.files import read_files
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.tables import *

WORDS = sorted(STR_NA_VALUES - {''})                    # what pandas takes for missing unless told otherwise
NAMES = [*WORDS, None, 'sirna_7']
WELLS = [f'{r}{c:02d}' for r in 'BCD' for c in range(2, 12)][:len(NAMES)]

def sites(sirna=None, experiment='HUVEC-01', cell_type='HUVEC'):
    n = len(WELLS)
    t = pd.DataFrame(dict(experiment=experiment, plate=1, well=WELLS, site=1, cell_type=cell_type, dataset='train', well_type='treatment',
                          sirna=NAMES if sirna is None else sirna, sirna_id=pd.array(range(n), 'Int64')))
    t['well_id'] = t.experiment + '_1_' + t.well
    return t.assign(site_id=t.well_id + '_1')[[c for c in SITE_COLUMNS if c != 'plate_group']]

def same(got, want=NAMES):
    got, want = ([None if pd.isna(o) else o for o in side] for side in (got, want))
    assert got == want

def test_the_words_are_those_of_pandas():
    assert {'None', 'NA', 'null', 'nan', 'N/A', '<NA>', '#N/A'} <= set(WORDS) and len(WORDS) >= 15

@pytest.mark.parametrize('suffix', ['csv', 'csv.gz', 'csv.bz2'])
def test_csv(tmp_path, suffix):
    for t in (pd.DataFrame(dict(a=NAMES)), pd.DataFrame(dict(a=NAMES, b=NAMES[::-1])), pd.DataFrame(dict(a=[None, 'NA', None])),
              pd.DataFrame(dict(a=[None, None])), pd.DataFrame({w: ['x', w] for w in WORDS})):
        back = read_csv(write_csv(t, tmp_path/f't.{suffix}'))
        assert list(back.columns) == list(t.columns)
        for c in t: same(back[c], t[c])

def test_parquet(tmp_path):
    t = pd.DataFrame(dict(a=NAMES))
    t.to_parquet(tmp_path/'t.parquet')
    same(read_parquet(tmp_path/'t.parquet').a)
    e = pd.DataFrame(dict(Metadata_site_id=WELLS, Metadata_sirna=NAMES, emb_0000=np.float32(1)))
    same(read_embeddings(write_embeddings(e, tmp_path/'e.parquet')).Metadata_sirna)

def test_site_tables(tmp_path):
    write_metadata(sites(), tmp_path/'metadata.csv')
    same(read_metadata(tmp_path).sirna)
    some = sites(experiment=[f'{w}-01' for w in WORDS] + ['NA', 'null'], cell_type=[*WORDS, 'NA', 'null'])
    write_metadata(some, tmp_path/'metadata.csv')
    back = read_metadata(tmp_path, cell_types=[*WORDS])
    for c in ('experiment', 'cell_type', 'well_id', 'site_id'): same(back[c], some[c])

@pytest.mark.parametrize('column', ['site_id', 'well_id', 'experiment', 'cell_type', 'plate', 'well', 'well_type'])
def test_an_empty_cell_is_still_missing(tmp_path, column):
    t = sites().astype(object)
    t.loc[3, column] = None
    t.to_csv(tmp_path/'metadata.csv', index=False)
    with pytest.raises(ScreenError, match=f'row 5: {column} is empty'): read_metadata(tmp_path)

def test_a_word_is_no_number(tmp_path):
    sites().astype(object).assign(sirna_id=[*WORDS, 1, 2]).to_csv(tmp_path/'metadata.csv', index=False)
    with pytest.raises(ScreenError, match='row 2: sirna_id is .* which is not a whole number'): read_metadata(tmp_path)

def test_tables_of_kaggle(tmp_path):
    t = sites().assign(id_code=lambda t: t.well_id)[['id_code', 'experiment', 'plate', 'well', 'sirna']]
    write_csv(t, tmp_path/'train.csv')
    same(read_metadata(tmp_path, sites=1).sirna)
    write_csv(t.assign(sirna=range(len(t))), tmp_path/'train.csv')
    write_csv(pd.DataFrame(dict(sirna_int=range(len(WORDS)), sirna_name=WORDS)), tmp_path/'sirna_int_to_name.csv')
    same(read_metadata(tmp_path, sites=1).sirna, [*WORDS, *(f'sirna_{i}' for i in range(len(WORDS), len(t)))])

def test_plate_groups(tmp_path):
    t = sites(experiment=[*WORDS, 'x', 'y'])
    write_csv(pd.DataFrame(dict(experiment=WORDS, group_plate1=range(len(WORDS)))), tmp_path/'plate_group.csv')
    got = add_plate_groups(t, tmp_path/'plate_group.csv').plate_group
    assert got[:-2].tolist() == list(range(len(WORDS))) and got[-2:].isna().all()

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_tables_of_files(tmp_path, kind):
    t = pd.DataFrame(dict(Metadata_Plate='P1', Metadata_Well=WELLS, Metadata_Compound=NAMES, Metadata_note=NAMES,
                          FileName_OrigDNA=[f'{w}.tif' for w in WELLS]))
    t.to_csv(tmp_path/'t.csv', index=False) if kind == 'csv' else t.to_parquet(tmp_path/'t.parquet')
    got, _ = read_files(tmp_path/f't.{kind}', controls=dict(negative_control=WORDS))
    same(got.sirna)
    same(got.note)
    assert (got.well_type == 'negative_control').tolist() == [w in WORDS for w in NAMES]

def test_tables_of_wells(tmp_path):
    from rcic_fastai.screen.plates import read_wells
    write_csv(pd.DataFrame(dict(plate=[*WORDS, 'P', 'Q'], well=WELLS, sirna=NAMES, dose=NAMES)), tmp_path/'wells.csv')
    w, _ = read_wells(tmp_path/'wells.csv')
    same(w.sirna)
    same(w.dose)
    same(w.plate, [*WORDS, 'P', 'Q'])

def test_packed_screens(tmp_path):
    t = simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=20, plates=1, size=32, controls=0, progress=False, n_workers=0)
    ids = t.well_id.unique()
    names = dict(zip(ids, NAMES))
    t = t.assign(sirna=t.well_id.map(names).astype(object).where(t.well_id.map(names).notna(), None))
    store = pack_screen(Screen(t, PngTree(tmp_path/'s', t)), tmp_path/'s.zarr', progress=False)
    same(read_metadata(store).sirna, t.sirna)

@pytest.mark.parametrize('target', ['sirna', 'cell_type'])
def test_predictions(tmp_path, target):
    pred = pd.DataFrame({'id_code': [*WORDS, 'a'], target: [*WORDS[::-1], 'b'], 'protocol': 'inductive', 'top_1': [*WORDS[::-1], 'b'],
                         'top_2': [*WORDS[1:], None, 'NA']})
    pred.attrs['target'] = target
    back = read_predictions(write_predictions(pred, tmp_path/'p.csv'))
    for c in pred: same(back[c], pred[c])
    (tmp_path/'q.csv').write_text(f'id_code,{target}\na,NA\nb,\n')
    with pytest.raises(ScreenError, match='empty cell in row 3'): read_predictions(tmp_path/'q.csv')

@pytest.mark.parametrize('empty', [None, np.nan, pd.NA])
def test_no_candidate_is_not_a_candidate_of_that_name(empty):
    "With few classes allowed, a well has fewer candidates than others"
    names = ['None', 'nan', '<NA>', 's1']
    t = sites(names + ['s2']*(len(WELLS) - 4)).iloc[:5]
    pred = pd.DataFrame(dict(id_code=t.well_id, sirna='s1', top_1='s1', top_2=pd.Series([empty, empty, empty, empty, 's1'], dtype=object)))
    assert right_wrong(pred, t)['rank'].fillna(0).tolist() == [0, 0, 0, 1, 0]
