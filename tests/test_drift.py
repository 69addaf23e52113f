"Drift of new batches: how often it is seen where there is none, what is named where there is, and what a folder keeps of it."
import json
import numpy as np, pandas as pd, pytest
from rcic_fastai import cli, folder as F
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import json_hash
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import make_emb_table, unit_rows
from rcic_fastai.results import drift as D
from rcic_fastai.screen.exposure import EXPOSED, EXPOSURE_COLUMNS, batch_exposure
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.tables import read_metadata
from helpers import learner, refused, simulate_screen

NAMES, CHANNELS = [f'HUVEC-{i:02d}' for i in range(1, 9)] + [f'RPE-{i:02d}' for i in range(1, 5)], ('DNA', 'ER', 'actin')


def drawn(rng, names=NAMES, shift=0., dim=None, unlike=()):
    "Embeddings and exposures of experiments that differ as one another; those in `unlike` are shifted where no other is, those in `dim` have one dark channel"
    rows, x, exposed = [], [], []
    for e in names:
        cell, off = e.split('-')[0], rng.normal(size=24)*np.r_[.3, .3, np.full(22, .05)]
        if e in unlike: off[22] += shift
        for i in range(20):
            rows.append(dict(well_id=f'{e}_{i}', experiment=e, cell_type=cell, plate=1, well_type='treatment', sirna=f's{i}'))
            x.append(np.r_[3*(cell == 'RPE'), np.zeros(22), 3] + off + rng.normal(0, .3, 24))
        for c in CHANNELS:
            light = rng.normal(0, .1) + (np.log(dim[e, c]) if dim and (e, c) in dim else 0)
            exposed += [(e, cell, w, c, 20, light - 3, rng.normal(0, .05), 0., .1, .05, 0.) for w in EXPOSED]
    return make_emb_table(pd.DataFrame(rows), unit_rows(np.array(x))), pd.DataFrame(exposed, columns=EXPOSURE_COLUMNS)


def compared(emb, exposed, new, held=()):
    "Compare some experiments of a table with all others"
    is_new = emb.Metadata_experiment.isin([*new])
    index = EmbeddingIndex(emb[~is_new].reset_index(drop=True))
    known, asked = (exposed[exposed.experiment.isin(new) == k] for k in (False, True))
    return D._compared(D._Known(index), emb[is_new].reset_index(drop=True), known, asked, D._compared_wells(known, asked), set(held), .05)


def test_training_experiments_are_outside_as_rarely_as_said():
    "Each is left out in turn and compared with the others, from the start"
    found, alone = [], []
    for seed in range(4):
        emb, exposed = drawn(np.random.default_rng(seed))
        for e in NAMES:
            t = compared(emb, exposed, [e])
            found.append(t.outside.any())
            alone.append(t.outside.mean())
    assert .0 <= np.mean(found) < .12, np.mean(found)       # 48 experiments, asked: .05
    assert np.mean(alone) < .02


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_dark_channel_and_the_shift_are_named_and_nothing_else(seed):
    new = ['HUVEC-17', 'HUVEC-18', 'RPE-09']
    emb, exposed = drawn(np.random.default_rng(seed + 50), NAMES + new, shift=2., dim={('HUVEC-18', 'ER'): .3}, unlike=['RPE-09'])
    t = compared(emb, exposed, new)
    out = t[t.outside]
    assert set(zip(out[out.finding.isin(D.EXPOSURES)].experiment, out[out.finding.isin(D.EXPOSURES)].channel)) == {('HUVEC-18', 'ER')}
    assert 'new direction' in set(out[out.experiment == 'RPE-09'].finding) and 'HUVEC-17' not in set(out.experiment)
    said = ' '.join(D.Drift(t, .05, 'inductive').sentences())
    assert 'ER of HUVEC-18 is 0.' in said and '(negative controls)' in said and 'HUVEC-17 is inside' in said


def test_few_wells_are_not_taken_for_drift():
    "The mean of four wells is far from everything by chance"
    found = []
    for seed in range(12):
        emb, exposed = drawn(np.random.default_rng(seed + 100), NAMES + ['HUVEC-17'])
        few = emb[(emb.Metadata_experiment != 'HUVEC-17') | emb.Metadata_well_id.isin([f'HUVEC-17_{i}' for i in range(4)])].reset_index(drop=True)
        t = compared(few, exposed, ['HUVEC-17'])
        found.append(t[t.finding.isin(['distance', 'new direction', 'direction 1', 'direction 2'])].outside.any())
    assert np.mean(found) <= 1/12


def test_a_new_cell_type_is_said():
    emb, exposed = drawn(np.random.default_rng(0), NAMES + ['U2OS-01'])
    t = compared(emb, exposed, ['U2OS-01'])
    assert t[t.finding == 'cell type'].outside.all()
    assert any('U2OS, which training never saw' in s for s in D.Drift(t, .05, 'inductive').sentences())


def test_what_was_held_out_says_how_far_is_normal():
    emb, exposed = drawn(np.random.default_rng(4), NAMES + ['HUVEC-17', 'HUVEC-18'], shift=2., unlike=['HUVEC-17', 'HUVEC-18'])
    t = compared(emb, exposed, ['HUVEC-17', 'HUVEC-18'], held=['HUVEC-18'])
    far = t.finding.isin(D._ONE_SIDED)
    assert t[far & t.outside & ~t.held_out].shape[0]
    kept = D._not_farther(t.assign(t=t.t.where(t.held_out | ~far, t.t - 100)))       # nearer than the one that was held out
    assert not kept[far & ~kept.held_out].outside.any()
    assert D._not_farther(t.assign(t=t.t.where(t.held_out | ~far, t.t + 100)))[far & t.outside & ~t.held_out].outside.all()


# A model folder

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('drift')
    simulate_screen(d/'screen', [f'HUVEC-{i:02d}' for i in range(1, 5)] + ['HUVEC-17'], sirnas=3, size=32, plates=1, controls=0, progress=False)
    table = read_metadata(d/'screen')
    screen = Screen(table, PngTree(d/'screen', table))
    class made: pass
    made.dir, made.screen = d, screen
    made.learn = learner(screen_dls(screen, valid='none', bs=8, device='cpu'))
    made.model = made.learn.to_model(tta=1, progress=False)
    made.model.save(d/'model')
    return made


def test_a_folder_keeps_how_bright_training_was(made):
    again = F.load_model(made.dir/'model')
    kept = pd.DataFrame(again.config['data']['exposure'])
    t = made.screen.table
    pd.testing.assert_frame_equal(kept[list(EXPOSURE_COLUMNS)], batch_exposure(t[t.dataset == 'train'], made.screen.source).round(5))
    assert set(kept.wells) == {*EXPOSED}


@pytest.mark.parametrize('wrong', [dict(brightness='dark'), dict(wells='positive_control'), dict(n=-1), dict(more=1)])
def test_a_folder_that_says_it_in_another_way_is_rejected(made, wrong, tmp_path):
    import shutil
    shutil.copytree(made.dir/'model', tmp_path/'m')
    config = json.loads((tmp_path/'m/config.json').read_text())
    config['data']['exposure'][0].update(wrong)
    del config['sha256']
    (tmp_path/'m/config.json').write_text(json.dumps({**config, 'sha256': json_hash(config)}))
    refused(lambda: F.load_model(tmp_path/'m'), 'exposure')


def test_a_model_can_learn_where_pictures_of_controls_are_absent(made, tmp_path):
    from rcic_fastai.predict.trained import _exposure
    class Absent(PngTree):
        def __getitem__(self, i):
            if self._sites.well_type.iloc[self._rows[i]] != 'treatment': raise F.ScreenError(f'There is no picture of {i}.')
            return super().__getitem__(i)
    t = made.screen.table
    without = learner(screen_dls(Screen(t, Absent(made.dir/'screen', t)), valid='none', bs=8, device='cpu'))
    assert {r['wells'] for r in _exposure(without)['exposure']} == {'treatment'}


def test_command(made, tmp_path, capsys):
    out = tmp_path/'drift.html'
    assert not cli.rcic_drift([str(made.dir/'model'), str(made.dir/'screen'), str(out), '--tta', '1'])
    said = capsys.readouterr()
    assert 'HUVEC-17' in said.out and 'held out to see how far' in said.err and 'HUVEC-17' in out.read_text()
    assert not cli.rcic_drift([str(made.dir/'model'), str(made.dir/'screen'), str(tmp_path/'d.csv'), '--tta', '1', '--protocol', 'adapted'])
    assert list(pd.read_csv(tmp_path/'d.csv')) == list(D._COLUMNS)
    (tmp_path/'thesis.html').write_text('years of work')
    assert cli.rcic_drift([str(made.dir/'model'), str(made.dir/'screen'), str(tmp_path/'thesis.html')]) == 2
    assert (tmp_path/'thesis.html').read_text() == 'years of work'
    assert cli.rcic_drift([str(made.dir/'model'), str(made.dir/'screen'), str(out), '--experiments', 'HUVEC-01']) == 2
    assert 'would be memory' in capsys.readouterr().err


# What is compared with what

def shuffled(screen, seed=3): return screen[screen.table.sample(frac=1, random_state=seed)]


def spreads(found): return found.table.set_index(['experiment', 'finding', 'channel']).t.sort_index()


@pytest.fixture(scope='module')
def held(tmp_path_factory):
    "A model that held out HUVEC-05 and reads any channels; HUVEC-06 is to be predicted"
    d = tmp_path_factory.mktemp('held')
    simulate_screen(d/'screen', [f'HUVEC-{i:02d}' for i in range(1, 7)], sirnas=3, size=32, plates=1, controls=2, test=['HUVEC-06'], progress=False)
    table = read_metadata(d/'screen')
    screen = Screen(table, PngTree(d/'screen', table))
    learn = learner(screen_dls(screen, valid='HUVEC-05', bs=8, device='cpu'), stem='bag')
    import torch
    with torch.no_grad(): learn.model.stem.channel.normal_()
    class held: pass
    held.screen, held.learn, held.model = screen, learn, learn.to_model(tta=1, progress=False, index_views=dict(tta=1))
    return held


def test_missing_channels_are_said(held):
    lack = held.screen.pick('nucleus,ER')
    found = held.model.drift(lack, progress=False)
    gone = found.table[found.table.finding == 'missing channel']
    assert {*gone.channel} == {*held.model.spec.channels} - {'nucleus', 'ER'} and gone.outside.all()
    assert any('is missing, and the model learned with it' in s for s in found.sentences()) and any('lacks' in n for n in found.notes)
    found.plot()
    whole = held.model.drift(held.screen, progress=False)
    assert 'missing channel' not in {*whole.table.finding} and not any('lacks' in n for n in whole.notes)


def test_held_out_experiments_stay_where_experiments_are_chosen(held):
    every, chosen = (held.model.drift(held.screen, experiments=e, progress=False) for e in ('', 'HUVEC-06'))
    assert {*zip(chosen.table.experiment, chosen.table.held_out)} == {('HUVEC-05', True), ('HUVEC-06', False)}
    pd.testing.assert_frame_equal(chosen.table, every.table)
    assert not any('draws them together' in n for n in chosen.notes)


@pytest.mark.parametrize('protocol', D.DRIFT_PROTOCOLS)
def test_the_order_of_rows_does_not_matter(held, protocol):
    a, b = (held.model.drift(s, protocol, progress=False, most=3) for s in (held.screen, shuffled(held.screen)))
    pd.testing.assert_series_equal(spreads(a), spreads(b), rtol=1e-4, atol=1e-4)
    assert a.sentences() == b.sentences()


def test_the_order_of_the_index_does_not_matter():
    emb, _ = drawn(np.random.default_rng(0))
    a, b = (D._Known(EmbeddingIndex(e.reset_index(drop=True)), most=8) for e in (emb, emb.sample(frac=1, random_state=1)))
    np.testing.assert_allclose(a.near, b.near, rtol=1e-5)
    means = [k.x[D._some(k.rows('HUVEC-01', 'treatment'), 5)].mean(0) for k in (a, b)]
    np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-6)


def test_exposure_of_some_sites_does_not_depend_on_their_order(held):
    t = held.screen.table
    a, b = (batch_exposure(s.table, held.screen.source, most=2) for s in (held.screen, shuffled(held.screen)))
    pd.testing.assert_frame_equal(a, b)
    assert not a[list(EXPOSURE_COLUMNS)].equals(batch_exposure(t, held.screen.source, most=100)[list(EXPOSURE_COLUMNS)])       # it was a choice


def with_views(model, views):
    "Return the model as if its index had been made in another way"
    from rcic_fastai.predict.trained import TrainedModel
    return TrainedModel(model.model, model.spec, model.index, {**model.config, 'index_views': views}, model.adapted_index)


@pytest.mark.parametrize('views,asked', [(dict(tta=1), dict(tta=1, views='dihedral')), (dict(tta=8), dict(tta=8, views='dihedral')), (dict(tta=3, views='scaled'), dict(tta=3, views='scaled')),
    (dict(tta=3, views='random'), dict(tta=3, views='random', augs={})), (dict(tta=3, views='random', separate=True), dict(tta=1, views='random', augs={}))])
def test_sites_are_shown_as_those_of_the_index(held, views, asked):
    how, notes = D._index_views(with_views(held.model, views), 0)
    assert {k: how[k] for k in asked if k != 'augs'} == {k: v for k, v in asked.items() if k != 'augs'} and not notes
    assert ('augs' in how) == ('augs' in asked)
    refused(lambda: D._index_views(with_views(held.model, views), 7), 'embeddings of other views lie elsewhere')


def test_views_of_the_index_are_used(held, monkeypatch):
    from rcic_fastai.predict.trained import TrainedModel
    seen, embed = [], TrainedModel.embed
    monkeypatch.setattr(TrainedModel, 'embed', lambda self, s, **k: seen.append((k['tta'], k['views'])) or embed(self, s, **k))
    with_views(held.model, dict(tta=2)).drift(held.screen, progress=False)
    with_views(held.model, dict(tta=2, views='random')).drift(held.screen, progress=False)
    assert seen == [(2, 'dihedral'), (2, 'random')]


@pytest.mark.parametrize('views', [None, 'many', dict(tta='8')])
def test_unknown_views_are_said(held, views):
    model = with_views(held.model, views)
    assert any('does not say how many views' in n for n in model.drift(held.screen, progress=False).notes)
    assert not any('does not say how many views' in n for n in model.drift(held.screen, tta=1, progress=False).notes)


def test_random_views_that_cannot_be_drawn_again(held):
    model = with_views(held.model, dict(tta=2, views='random'))
    model.config['augs'] = None
    refused(lambda: model.drift(held.screen, progress=False), 'does not say how they were drawn')


@pytest.mark.parametrize('wrong', [dict(bs=0), dict(bs=-1), dict(workers=-1), dict(tta=-1), dict(most=1), dict(level=0)])
def test_impossible_numbers_are_refused(held, wrong):
    refused(lambda: held.model.drift(held.screen, progress=False, **wrong), next(iter(wrong)))


# What a model says of the wells that it is for

def test_wells_that_a_model_cannot_name_are_left_out(held):
    "As in a prediction, and it is said"
    table = held.screen.table
    wells = table.well_id[table.experiment == 'HUVEC-06'].unique()[:2]
    mixed = held.screen[table.assign(cell_type=table.cell_type.where(~table.well_id.isin(wells), 'RPE'))]
    held.model.config['recipe'] = dict(only=dict(cell_type='HUVEC'))
    try:
        found = held.model.drift(mixed, progress=False)
        alone = held.model.drift(held.screen[table[~table.well_id.isin(wells)]], progress=False)
    finally: held.model.config.pop('recipe')
    assert any('trained on wells with cell_type HUVEC only' in n for n in found.notes)
    pd.testing.assert_frame_equal(found.table, alone.table)


def test_absent_pictures_are_left_out_where_training_left_them_out(held, tmp_path):
    import shutil
    shutil.copytree(held.screen.source.root, tmp_path/'s')
    table = read_metadata(tmp_path/'s')
    screen = Screen(table, PngTree(tmp_path/'s', table))
    site = table[(table.experiment == 'HUVEC-06') & (table.well_type == 'treatment')].iloc[0]
    next((tmp_path/'s').glob(f'images/*/HUVEC-06/Plate{site.plate}/{site.well}_s{site.site}_w1.png')).unlink()
    with pytest.raises(Exception): held.model.drift(screen, progress=False)
    held.model.config['only_present'] = True
    try: assert len(held.model.drift(screen, progress=False).table)
    finally: held.model.config.pop('only_present')


def test_plates_are_normalized_whole(made):
    "A few wells that are embedded have the statistics of their plate, not their own"
    model = learner(screen_dls(made.screen, valid='none', bs=8, device='cpu', norm='plate')).to_model(tta=1, progress=False)
    every = made.screen.test.table
    how = dict(tta=1, progress=False)
    few, all_ = (D._embedded(model, made.screen, rows, every, model.index, how) for rows in (every[:1], every))
    np.testing.assert_allclose(few.filter(like='emb_'), all_[:1].filter(like='emb_'), atol=1e-5)
