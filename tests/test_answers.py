"What must not change an answer (names, order, a plate more, test labels), and properties of splits, wells, groups and views."
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components
from rcic_fastai.batch.augment import dihedral
from rcic_fastai.screen.tables import (add_plate_groups, experiment_folds, rowcol_to_well,
                                       sirna_groups, split_experiments, well_to_rowcol)
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.predict.predict import predict_wells
from rcic_fastai.embed.table import toy_profiles
from rcic_fastai.screen.simulate.layout import screen_layout

TOY = toy_profiles(n_sirnas=24, dim=32, signal=.8, seed=3)
TREATED = TOY[(TOY.Metadata_well_type == 'treatment').to_numpy()]
TRAIN, TEST = (TREATED[(TREATED.Metadata_dataset == d).to_numpy()].reset_index(drop=True) for d in ('train', 'test'))
TEST = TEST.assign(Metadata_plate_group=pd.array([pd.NA]*len(TEST), dtype='Int64'))
INDEX = EmbeddingIndex(TRAIN)
PROTOCOLS = ['inductive', 'transductive']

def named(test, index, protocol): return predict_wells(test, index, protocol)[0].set_index('id_code').sirna

def moved(emb, names):
    "The table with other names of experiments, in ids too"
    out, ids = emb.copy(), emb.Metadata_experiment.map(names)
    for c in ('Metadata_well_id', 'Metadata_site_id'):
        out[c] = [new + i[len(old):] for old, new, i in zip(emb.Metadata_experiment, ids, emb[c])]
    return out.assign(Metadata_experiment=ids)


# ---- what must not matter

@pytest.mark.parametrize('protocol', PROTOCOLS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_names_of_experiments_do_not_matter(protocol, seed):
    rng, all_ = np.random.default_rng(seed), sorted(set(TOY.Metadata_experiment))
    names = {e: f'X{i}-{e.split("-")[1]}' for e, i in zip(all_, rng.permutation(len(all_)))}
    train = moved(TRAIN, names)
    there = named(moved(TEST, names), EmbeddingIndex(train), protocol)
    here = named(TEST, INDEX, protocol)
    here.index = [names[i.rsplit('_', 2)[0]] + i[len(i.rsplit('_', 2)[0]):] for i in here.index]
    assert there.sort_index().to_dict() == here.sort_index().to_dict()

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_an_experiment_more_changes_no_other_answer(protocol):
    first = TEST.Metadata_experiment.iloc[0]
    copy = moved(TEST[TEST.Metadata_experiment == first], {first: f'{first}9'})
    both = named(pd.concat([TEST, copy], ignore_index=True), INDEX, protocol)
    alone = named(TEST, INDEX, protocol)
    assert both.loc[alone.index].equals(alone)
    twins = both[[f'{first}9' in i for i in both.index]]
    assert (twins.to_numpy() == alone[[i.startswith(f'{first}_') for i in alone.index]].to_numpy()).all()

def test_a_plate_twice_changes_no_answer_inductively():
    plate = TEST[(TEST.Metadata_experiment == TEST.Metadata_experiment.iloc[0]) & (TEST.Metadata_plate == 1)]
    copy = plate.assign(Metadata_plate=9, Metadata_well_id=plate.Metadata_well_id + '_again', Metadata_site_id=plate.Metadata_site_id + '_again')
    both, alone = named(pd.concat([TEST, copy], ignore_index=True), INDEX, 'inductive'), named(TEST, INDEX, 'inductive')
    assert both.loc[alone.index].equals(alone)
    assert all(both[i] == alone[i[:-6]] for i in both.index if i.endswith('_again'))

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('labels', ['blank', 'wrong'])
def test_labels_of_the_test_wells_are_never_read(protocol, labels):
    other = TEST.assign(Metadata_sirna=None if labels == 'blank' else 's0000', Metadata_sirna_id=pd.array([pd.NA if labels == 'blank' else 0]*len(TEST), dtype='Int64'))
    assert named(other, INDEX, protocol).equals(named(TEST, INDEX, protocol))

def test_the_same_training_wells_twice_change_no_nearest_neighbor():
    twice = pd.concat([TRAIN, TRAIN], ignore_index=True)
    assert named(TEST, EmbeddingIndex(twice), 'inductive').equals(named(TEST, INDEX, 'inductive'))


# ---- properties

@given(st.integers(0, 31), st.integers(0, 47))
def test_wells_go_there_and_back(row, col): assert well_to_rowcol(rowcol_to_well(row, col)) == (row, col)

@given(st.integers(0, 31), st.integers(0, 47), st.sampled_from([str.lower, str.upper, lambda w: f' {w} ', lambda w: w[0] + w[1:].lstrip('0') if w[1:].isdigit() else w]))
def test_writings_of_a_well(row, col, write): assert well_to_rowcol(write(rowcol_to_well(row, col))) == (row, col)

VIEWS = st.integers(0, 7)

@given(VIEWS, VIEWS, st.integers(1, 5), st.integers(1, 5))
def test_views_are_a_group(a, b, h, w):
    x = torch.arange(2*h*w).view(2, h, w)
    assert torch.equal(dihedral(dihedral(x, a), a, inverse=True), x)
    views = [dihedral(torch.arange(9).view(3, 3), k) for k in range(8)]
    both = dihedral(dihedral(torch.arange(9).view(3, 3), a), b)
    assert sum(torch.equal(both, v) for v in views) == 1 and len({tuple(v.flatten().tolist()) for v in views}) == 8

@st.composite
def screens(draw):
    names = [f'{c}-{i:02}' for c in ('HUVEC', 'RPE', 'U2OS') for i in range(1, draw(st.integers(0, 4)) + 1)]
    names = names if len(names) > 1 else ['HUVEC-01', 'RPE-01']
    plates = draw(st.integers(1, 4))
    return screen_layout(names, sirnas=draw(st.integers(plates, 12)), plates=plates, controls=1, sites=1, seed=draw(st.integers(0, 99)), test=[])

@settings(max_examples=30, deadline=None)
@given(screens(), st.integers(2, 5), st.integers(0, 99))
def test_folds_and_splits_share_no_experiment(table, k, seed):
    n = table.experiment.nunique()
    fold = experiment_folds(table, min(k, n), seed)
    assert set(fold.index) == set(table.experiment) and set(fold) == set(range(min(k, n)))
    assert fold.value_counts().max() - fold.value_counts().min() <= table.cell_type.nunique()
    for f in set(fold):
        train, valid = split_experiments(table, [e for e in fold.index if fold[e] == f])
        assert not set(train.experiment) & set(valid.experiment) and len(train) + len(valid) == len(table)
        assert not set(train.well_id) & set(valid.well_id)

@settings(max_examples=30, deadline=None)
@given(screens(), st.integers(0, 99))
def test_groups_are_the_connected_components(table, seed):
    groups = sirna_groups(table.sample(frac=1, random_state=seed))
    t = table[table.well_type == 'treatment']
    names = sorted(t.sirna.unique())
    together = np.zeros((len(names),)*2, bool)
    for _, on in t.groupby(['experiment', 'plate']).sirna:
        at = [names.index(s) for s in on]
        together[np.ix_(at, at)] = True
    _, comp = connected_components(together)
    mine = groups[names].to_numpy()
    assert all((mine[i] == mine[j]) == (comp[i] == comp[j]) for i in range(len(names)) for j in range(i))
    assert groups[t.sort_values('sirna_id').sirna.iloc[0]] == 0
    again = add_plate_groups(table.drop(columns='plate_group').sample(frac=1, random_state=seed)).sort_index()
    assert (again.plate_group == add_plate_groups(table.drop(columns='plate_group')).plate_group).all()
