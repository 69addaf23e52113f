"The real RxRx1 tables against the published figures, and every malformed table against its sentence."
import numpy as np, pandas as pd, pytest
from rcic_fastai.core import *
from rcic_fastai.screen.tables import *
from rcic_fastai.screen.tables import SITE_COLUMNS

REAL = real_data()
real = pytest.mark.real('metadata')

@pytest.fixture(scope='module')
def table(): return read_metadata(REAL)

@pytest.fixture
def small():
    rows = [(f'{e}_{p}_{w}_{s}', f'{e}_{p}_{w}', e[:-3], d, e, p, w, s, 'treatment', f's{k+3*(p-1)}', k+3*(p-1))
            for e, d in [('HUVEC-01', 'train'), ('HUVEC-02', 'train'), ('RPE-09', 'test')]
            for p in (1, 2) for k, w in enumerate(['B03', 'B04', 'B05']) for s in (1, 2)]
    return pd.DataFrame(rows, columns=SITE_COLUMNS[:-1])

def written(tmp_path, t):
    t.to_csv(tmp_path/'metadata.csv', index=False)
    return tmp_path

# --- the real tables -------------------------------------------------------------------------------------------

@real
def test_published_counts(table):
    assert len(table) == 125_510 and table.experiment.nunique() == 51
    assert table.groupby('cell_type').experiment.nunique().to_dict() == dict(HUVEC=24, HEPG2=11, RPE=11, U2OS=5)
    assert table.groupby('dataset').experiment.nunique().to_dict() == dict(train=33, test=18)
    assert list(table.columns) == SITE_COLUMNS and table.site_id.is_unique
    assert table.groupby('experiment').plate.nunique().eq(4).all()
    assert table.groupby('well_id').size().eq(2).all()

@real
def test_wells_and_controls(table):
    assert set(table.well) <= set(inner_wells()) and len(inner_wells()) == 308
    wells = table.drop_duplicates('well_id')
    pos = wells[wells.well_type == 'positive_control']
    assert set(pos.well) == set(control_wells()['positive_control'])
    neg = wells[wells.well_type == 'negative_control'].groupby(['experiment', 'plate']).well.agg(set)
    assert len(neg) == 204 and neg.map(lambda s: s & {'B02'}).map(bool).sum() >= 200
    per_plate = pos.groupby(['experiment', 'plate']).size()
    assert per_plate.mode().item() == 30
    n = wells[wells.well_type == 'treatment'].groupby(['experiment', 'plate']).size()
    assert n.max() == 277 and n.min() >= 270

@real
def test_labels(table):
    ids = table.groupby('well_type').sirna_id.agg(['min', 'max'])
    assert ids.loc['positive_control'].tolist() == [1108, 1137] and ids.loc['negative_control'].tolist() == [1138, 1138]
    treat = table[(table.well_type == 'treatment') & (table.dataset == 'train')]
    assert treat.sirna_id.nunique() == 1108 and treat.sirna_id.min() == 0 and treat.sirna_id.max() == 1107
    assert not treat.drop_duplicates('well_id').duplicated(['experiment', 'sirna']).any()      # at most once an experiment
    assert table[(table.well_type == 'treatment') & (table.dataset == 'test')].sirna.isna().all()

@real
def test_missing_wells(table):
    wells = table.drop_duplicates('well_id')
    gap = 1108 - wells[wells.well_type == 'treatment'].groupby('experiment').size()            # of treatment wells
    assert gap[['HUVEC-14', 'HUVEC-15', 'RPE-11', 'U2OS-05']].tolist() == [18, 14, 14, 11]
    by = wells.drop_duplicates('experiment').set_index('experiment').dataset
    assert gap.groupby(by).sum().to_dict() == dict(train=49, test=47)
    controls = wells[wells.well_type != 'treatment'].groupby(['experiment', 'plate']).size()
    assert controls.value_counts().to_dict() == {31: 181, 32: 13, 30: 6, 34: 4}

@real
def test_plate_groups_given_and_derived(table):
    derived = add_plate_groups(table)
    known = derived.plate_group.notna()
    assert known.eq(derived.dataset == 'train').all()
    assert (derived.plate_group[known] == table.plate_group[known]).all()
    published = pd.read_csv(REAL/'metadata/sirna_group.csv')
    names = package_table('sirna_int_to_name').set_index('sirna_int').sirna_name
    ours = sirna_groups(table)
    assert ours.value_counts().tolist() == [277]*4
    assert (ours[names[published.sirna_int]].values == published.group.values).all()
    order = table.drop_duplicates(['experiment', 'plate']).sort_values(['experiment', 'plate']).groupby('experiment').plate_group
    assert {tuple(np.diff(g.tolist()) % 4) for _, g in order} == {(1, 1, 1)}                   # cyclic rotations only

@real
def test_wilds_split_counts(table):
    w = wilds_split(table)
    exps = w.groupby('dataset').experiment.nunique()
    assert exps.to_dict() == dict(train=33, id_test=33, val=4, test=14)
    assert (w.dataset == 'train').sum() == (w.dataset == 'id_test').sum() == 40_612

@real
def test_package_tables_are_the_published_ones():
    for name in ('experiment_pixel_stats', 'sirna_int_to_name'):
        pd.testing.assert_frame_equal(package_table(name), pd.read_csv(REAL/f'metadata/{name}.csv'))

# --- the Kaggle shapes -----------------------------------------------------------------------------------------

def kaggle(folder, sirna, control):
    pd.DataFrame(dict(id_code=['HUVEC-01_1_B03', 'HUVEC-01_1_B04'], experiment='HUVEC-01', plate=1,
                      well=['B03', 'B04'], sirna=sirna)).to_csv(folder/'train.csv', index=False)
    pd.DataFrame(dict(id_code=['RPE-08_2_C04'], experiment='RPE-08', plate=2, well='C04')).to_csv(folder/'test.csv', index=False)
    pd.DataFrame(dict(id_code=['RPE-08_2_B02'], experiment='RPE-08', plate=2, well='B02', sirna=[control],
                      well_type='negative_control')).to_csv(folder/'test_controls.csv', index=False)
    return read_metadata(folder)

def test_kaggle_integers_and_names_agree(tmp_path):
    names = package_table('sirna_int_to_name').set_index('sirna_int').sirna_name
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    a = kaggle(tmp_path/'a', [513, 840], 1138)
    b = kaggle(tmp_path/'b', [names[513], names[840]], names[1138])
    pd.testing.assert_frame_equal(a, b)
    assert len(a) == 8 and a.sirna_id.tolist() == [513, 513, 840, 840, pd.NA, pd.NA, 1138, 1138]
    assert a.sirna[a.site_id == 'RPE-08_2_C04_1'].isna().all()

# --- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('spoil, says', [
    (lambda t: t.iloc[:0], 'has no rows'),
    (lambda t: t.drop(columns='plate'), 'no column plate'),
    (lambda t: t.assign(cell_type='A549'), 'unknown cell type A549'),
    (lambda t: pd.concat([t, t.iloc[[3]]]), 'HUVEC-01_1_B04_2'),
    (lambda t: t.assign(well=['B3x']+t.well.tolist()[1:]), "'B3x' is not a well name"),
    (lambda t: t.assign(plate=[None]+t.plate.tolist()[1:]), 'row 2: plate is empty'),
    (lambda t: t.assign(experiment=[None]+t.experiment.tolist()[1:]), 'row 2: experiment is empty'),
    (lambda t: t.assign(well_type='control'), "well_type 'control'"),
])
def test_refused(tmp_path, small, spoil, says):
    with pytest.raises(ScreenError, match=says): read_metadata(written(tmp_path, spoil(small)))

def test_empty_and_binary_files(tmp_path):
    (tmp_path/'metadata.csv').write_bytes(b'')
    with pytest.raises(ScreenError, match='no rows'): read_metadata(tmp_path)
    (tmp_path/'metadata.csv').write_bytes(bytes(range(128, 256))*20)
    with pytest.raises(ScreenError, match='metadata.csv'): read_metadata(tmp_path)

def test_blank_test_labels_change_nothing(tmp_path, small):
    a = read_metadata(written(tmp_path, small))
    test = small.dataset == 'test'
    small.loc[test, ['sirna', 'sirna_id']] = None
    b = read_metadata(written(tmp_path, small))
    pd.testing.assert_series_equal(a.plate_group, b.plate_group)

def test_splits_never_share_an_experiment(small):
    for valid in ('HUVEC-01', ['HUVEC-02'], 'auto'):
        train, val = split_experiments(small, valid)
        assert not set(train.experiment) & set(val.experiment) and 'test' not in set(train.dataset) | set(val.dataset)
    with pytest.raises(ScreenError, match='All training experiments'): split_experiments(small, 'HUVEC-01,HUVEC-02')
    assert len(split_experiments(small, 'none')[1]) == 0

def test_round_trip(tmp_path, small):
    a = read_metadata(written(tmp_path, small))
    write_metadata(a, tmp_path/'metadata.csv')
    pd.testing.assert_frame_equal(read_metadata(tmp_path), a)
