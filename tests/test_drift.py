"Drift of new batches: how often it is seen where there is none, what is named where there is, and what a folder keeps of it."
import json
import numpy as np, pandas as pd, pytest
from rcic_fastai import cli, folder as F
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError, json_hash
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import make_emb_table, unit_rows
from rcic_fastai.results import drift as D
from rcic_fastai.screen.exposure import EXPOSED, EXPOSURE_COLUMNS, batch_exposure
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.layout import simulate_screen
from rcic_fastai.screen.tables import read_metadata
from helpers import learner, refused

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
    of, is_new = emb.Metadata_experiment, emb.Metadata_experiment.isin([*new])
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
    sha = config.pop('sha256')
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


def test_it_does_not_depend_on_the_order_of_rows(made):
    "More sites than are looked at"
    def found(screen): return made.model.drift(screen, most=2, tta=1, progress=False).table
    turned = Screen(made.screen.table.sample(frac=1, random_state=3).reset_index(drop=True), made.screen.source)
    pd.testing.assert_frame_equal(found(turned), found(made.screen))


def test_views_are_those_of_the_index(made):
    loaded = F.load_model(made.dir/'model')
    loaded.config['index_views'] = dict(tta=1)
    def found(**how): return loaded.drift(made.screen, progress=False, **how).table
    pd.testing.assert_frame_equal(found(), found(tta=1))
    assert not found().equals(found(tta=4))


def test_numbers_that_cannot_be_are_refused(made):
    for wrong in (dict(bs=0), dict(workers=-1), dict(tta=9)):
        with pytest.raises(ScreenError, match='is not possible'): made.model.drift(made.screen, progress=False, **wrong)
