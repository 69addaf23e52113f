"Trainings of several steps as commands: channels, folds, a model for each cell type, controls first, pseudo-labels; killed and resumed."
import json
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.learner import Learner
from fastai.torch_core import no_random
from helpers import python, simulate_screen
from rcic_fastai import cli, workflow
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError
from rcic_fastai.embed import embed as embedding
from rcic_fastai.embed.table import emb_features, read_embeddings
from rcic_fastai.folder import CellTypeModels, load_model
from rcic_fastai.embed.index import VOTES
from rcic_fastai.predict import plan
from rcic_fastai.predict.ensemble import ensemble_files, ensemble_predictions, name_wells
from rcic_fastai.predict.plan import plan_prediction
from rcic_fastai.predict.predict import read_predictions
from rcic_fastai.screen import images
from rcic_fastai.predict.scores import read_scores, score_wells
from rcic_fastai.predict.trained import build_index
from rcic_fastai.results.report import how_table
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.tables import experiment_folds
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import _CHOICES, get_recipe, recipe_from_dict
from rcic_fastai.workflow import fold_experiments

EXPS = ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02', 'HUVEC-17', 'RPE-08']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('steps')
    simulate_screen(d/'screen', EXPS, sirnas=8, size=48, controls=2, progress=False)
    pack_screen(open_screen(d/'screen'), d/'s.zarr', progress=False)
    (d/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='test_resnet', model=dict(emb_dim=16), stages=[dict(name='all', epochs=2, lr=1e-2, loss='adacos')])))
    return d


def train(here, out, more='', code=0, screen='s.zarr'):
    line = f'{here}/{screen} {here}/{out} --recipe {here}/tiny.json --pretrained no --tta 1 {more}'
    assert cli.rcic_train(line.split()) == code
    return here/out


def written(folder, name, **changes):
    "Write a small recipe with some changes; where it is"
    recipe = dict(name=name, arch='test_resnet', model=dict(emb_dim=16), stages=[dict(name='all', epochs=1, lr=1e-3, loss='adacos')])
    (folder/f'{name}.json').write_text(json.dumps({**recipe, **changes}))
    return str(folder/f'{name}.json')


def predict(here, model, out, more='', code=0):
    assert cli.rcic_predict(f'{here}/{model} {here}/s.zarr {here}/{out}.csv --tta 1 {more}'.split()) == code
    return here/f'{out}.csv'


def refused(here, more, words, capsys, out='never'):
    "One sentence, and nothing is written"
    before = sorted(here.rglob('*'))
    capsys.readouterr()
    train(here, out, more, code=2)
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('rcic_train: ')]
    assert len(lines) == 1 and words in lines[0], lines
    assert sorted(here.rglob('*')) == before


def killed(here, out, more, when):
    "Run a training in a process of its own, which is killed at a moment that `when` tells: code that defines `Killed`"
    code = f'''
import os, signal, sys
from fastai.vision.all import *
from rcic_fastai import cli, workflow
class Killed(Callback):
    order = 90
    def after_batch(self):
        if self.training and {when}: os.kill(os.getpid(), signal.SIGKILL)
defaults.callbacks.append(Killed)
cli.rcic_train(sys.argv[1:])
'''
    line = f'{here}/s.zarr {here}/{out} --recipe {here}/tiny.json --pretrained no --tta 1 {more}'
    done = python(code, *line.split())
    assert done.returncode == -9, done.stderr[-2000:]


# Channels

class Three(ImageSource):
    "Three channels of a screen, as files of their own would be"
    def __init__(self, source, table, at):
        super().__init__(source.root, table, [source.channels[i] for i in at])
        self.of, self.at = source, at
    @property
    def shape(self): return (len(self.at), *self.of.shape[1:])
    @property
    def dtype(self): return self.of.dtype
    def _read(self, site_id, out): out[...] = self.of[site_id][self.at]


def batches(screen, **kwargs):
    dls = screen_dls(screen, valid='HUVEC-02', bs=8, seed=3, device='cpu', **kwargs)
    with no_random(0): return [b for _ in range(2) for b in dls.train] + list(dls.valid)


@pytest.mark.parametrize('how', [{}, dict(sites=2), dict(norm='plate'), dict(norm='global'), dict(size=32), dict(num_workers=2)], ids=str)
@pytest.mark.parametrize('held', [False, True], ids=['read', 'resident'])
def test_batches_are_those_of_a_screen_packed_with_these_channels(here, tmp_path, how, held):
    whole = open_screen(here/'s.zarr')
    packed = open_screen(pack_screen(Screen(whole.table, Three(whole.source, whole.table, [5, 0, 2])), tmp_path/'three.zarr', progress=False))
    mine = whole.pick('golgi,nucleus,actin')
    pd.testing.assert_frame_equal(mine.source.stats, packed.source.stats)
    if held: mine = mine.resident('cpu', progress=False)
    for a, b in zip(batches(packed, **{k: v for k, v in how.items() if k != 'num_workers'}), batches(mine, **how), strict=True):
        for u, v in zip(a, b, strict=True):
            assert type(u) is type(v) and torch.equal(u.as_subclass(torch.Tensor), v.as_subclass(torch.Tensor))


def test_channels_of_pictures_in_memory_are_picked_from_there(here):
    held = open_screen(here/'s.zarr').resident('cpu', progress=False)
    mine, ids = held.pick('ER,golgi'), held.table.site_id.tolist()[:3]
    assert mine.source.origin is held.source
    assert torch.equal(mine.source.take(ids), held.source.take(ids)[:, [1, 5]])
    assert len(mine.source.restrict(held.table[:2]).missing()) == 0


def test_only_files_of_picked_channels_are_opened(here, monkeypatch):
    screen, opened, real = open_screen(here/'screen'), [], images.read_plain
    picked, one = screen.pick('golgi,nucleus'), screen.table.site_id[0]
    picked.source.shape                                                          # a file of each plate is looked at first
    monkeypatch.setattr(images, 'read_plain', lambda path, *args: (opened.append(path[-6:]), real(path, *args))[1])
    assert np.array_equal(picked.source[one], screen.source[one][[5, 0]])
    assert opened == ['w6.png', 'w1.png', *(f'w{i}.png' for i in range(1, 7))]


def test_a_model_of_fewer_channels_reads_a_screen_of_all(here, tmp_path):
    train(here, 'two', '--channels golgi,ER --valid HUVEC-02')
    model = load_model(here/'two')
    assert model.spec.channels == ['golgi', 'ER'] and list(model.config['data']['channels']) == ['golgi', 'ER']
    file = predict(here, 'two', 'two_all')
    got = read_predictions(file)
    assert len([n for n in json.loads(Path(file).with_suffix('.json').read_text())['notes'] if 'the model reads golgi, ER of them, by name' in n]) == 1
    pack_screen(open_screen(here/'s.zarr').pick('ER,golgi'), tmp_path/'two.zarr', progress=False)
    alone = model.predict(tmp_path/'two.zarr', tta=1, progress=False)
    assert alone.sirna.tolist() == got.sirna.tolist() and np.allclose(alone.score, model.predict(here/'s.zarr', tta=1, progress=False).score, atol=1e-6)


@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_a_screen_without_a_channel_of_the_model_is_refused(here, tmp_path, capsys):
    train(here, 'golgi', '--channels golgi --valid none')
    pack_screen(open_screen(here/'s.zarr').pick('ER,actin'), tmp_path/'er.zarr', progress=False)
    assert cli.rcic_predict(f'{here}/golgi {tmp_path}/er.zarr {tmp_path}/x.csv --tta 1'.split()) == 2
    assert 'the screen lacks golgi' in capsys.readouterr().err and not (tmp_path/'x.csv').exists()


def test_six_models_without_a_channel_each_are_resumed(here, capsys):
    killed(here, 'six', '--channels 5-of-6 --valid HUVEC-02', "'without_actin' in str(self.learn.checkpoint.folder) and self.epoch == 1")
    assert {p.name for p in (here/'six').iterdir() if (p/'config.json').exists()} == {'without_nucleus', 'without_ER'}
    train(here, 'six', '--channels 5-of-6 --valid HUVEC-02 --resume')
    said = capsys.readouterr().out
    assert said.count('is finished: there is nothing to continue') == 2
    assert len(list((here/'six').iterdir())) == 6
    assert load_model(here/'six/without_golgi').spec.channels == ['nucleus', 'ER', 'actin', 'nucleoli', 'mitochondria']
    models, screen = [load_model(f) for f in sorted((here/'six').iterdir())], open_screen(here/'s.zarr')
    both = ensemble_predictions([m.class_scores(screen, tta=1, progress=False) for m in models[:3]])
    assert both.id_code.tolist() == models[0].predict(screen, tta=1, progress=False).id_code.tolist()
    predict(here, 'six', 'six', code=2)
    assert 'holds 6 models' in capsys.readouterr().err and not (here/'six.csv').exists()
    train(here, 'actin', '--channels nucleus,ER,nucleoli,mitochondria,golgi --valid HUVEC-02')
    assert load_model(here/'actin').fingerprint == load_model(here/'six/without_actin').fingerprint


@pytest.mark.parametrize('more, words', [('--channels DNA,ER', 'no channel DNA'), ('--channels ER,ER', 'named twice'), ('--channels 4-of-6', 'ask for 5-of-6')])
def test_wrong_channels(here, more, words, capsys): refused(here, more, words, capsys)


# Folds

def test_folds_together_predict_every_training_well_once(here, capsys):
    files, held = [], []
    for i in (1, 2):
        train(here, f'fold{i}', f'--folds 2 --fold {i} --seed 4')
        config = load_model(here/f'fold{i}').config
        assert config['fold'] == dict(folds=2, fold=i) and {e[:3] for e in config['held_out']} == {'HUV', 'RPE'}
        assert not {*config['held_out']} & {*config['trained_experiments']}
        held += config['held_out']
        files.append(predict(here, f'fold{i}', f'fold{i}', '--held-out'))
    table = open_screen(here/'s.zarr').table
    wells = table[table.dataset.eq('train') & table.well_type.eq('treatment')].well_id.unique()
    assert sorted(held) == EXPS[:4] and sorted(pd.concat(map(read_predictions, files)).id_code) == sorted(wells)
    capsys.readouterr()
    assert cli.rcic_evaluate([','.join(map(str, files)), str(here/'s.zarr'), '--json']) == 0
    res = json.loads(capsys.readouterr().out)
    assert list(res['columns']) == ['inductive'] and res['columns']['inductive']['n_wells'] == len(wells)
    assert any('wells of training experiments are judged (HUVEC-01' in n for n in res['notes'])


@pytest.mark.parametrize('more, words', [('--fold 1', 'say how many with --folds'), ('--folds 2', 'add --fold'), ('--folds 9 --fold 1', 'cannot be made of 4 training experiments: choose 2 to 4'),
                                         ('--folds 2 --fold 3', 'choose 1 to 2'), ('--folds 2 --fold 1 --valid HUVEC-01', 'both say what is held out')])
def test_wrong_folds(here, more, words, capsys): refused(here, more, words, capsys)


@pytest.fixture(scope='module')
def unlabeled(here):
    "A screen whose training experiment HUVEC-17 has labels in its control wells only"
    whole = open_screen(here/'s.zarr')
    is_more, is_treated = whole.table.experiment == 'HUVEC-17', whole.table.well_type == 'treatment'
    table = whole.table.assign(dataset=whole.table.dataset.mask(is_more, 'train'))
    pack_screen(Screen(table.assign(**{k: table[k].mask(is_more & is_treated) for k in ('sirna', 'sirna_id')}), whole.source), here/'unlabeled.zarr', progress=False)
    return 'unlabeled.zarr'


def test_folds_are_those_of_the_screen_whatever_else_is_asked_for(here, unlabeled, tmp_path):
    once = written(tmp_path, 'once')
    held = fold_experiments(pd.DataFrame(dict(experiment=EXPS[:4], cell_type=['HUVEC']*2 + ['RPE']*2, dataset='train')), 2, 2)
    for i, more in enumerate(['', '--pretrain controls', '--norm plate', '--controls']):
        train(here, f'split{i}', f'--folds 2 --fold 2 --recipe {once} {more}', screen=unlabeled)
        config = load_model(here/f'split{i}').config
        assert config['held_out'] == held and config['fold'] == dict(folds=2, fold=2), more
    train(here, 'split_cells', f'--cell-types each --folds 2 --fold 2 --recipe {once}', screen=unlabeled)
    for m in [load_model(here/'split_cells/common'), *load_model(here/'split_cells').models.values()]:
        assert {*m.config['held_out']} <= {*held} and not {*held} & {*m.config['trained_experiments']}


def test_a_fold_without_an_experiment_of_the_recipe_is_refused(here, tmp_path, capsys):
    only = written(tmp_path, 'only_rpe', only=dict(cell_type='RPE'))
    folds = experiment_folds(open_screen(here/'s.zarr').table, 4)
    refused(here, f'--recipe {only} --folds 4 --fold {folds["HUVEC-01"] + 1}', 'has no experiment that the recipe is for', capsys)


def test_what_was_trained_on_is_not_named_as_held_out(here, capsys):
    train(here, 'all', '--valid none')
    predict(here, 'all', 'x', '--held-out', code=2)
    assert 'was trained on all training experiments' in capsys.readouterr().err and not (here/'x.csv').exists()
    assert cli.rcic_train(f'{here}/s.zarr {here}/later --recipe {here}/tiny.json --pretrained {here}/all --valid HUVEC-02 --tta 1'.split()) == 0
    predict(here, 'later', 'x', '--held-out', code=2)
    assert 'learned the labels of HUVEC-02 before' in capsys.readouterr().err and not (here/'x.csv').exists()


def test_groups_of_held_out_experiments_are_not_taken_from_their_labels(here):
    train(here, 'held', '--valid HUVEC-02,RPE-02')
    screen = open_screen(here/'s.zarr')
    mine = screen.table.experiment.isin(['HUVEC-02', 'RPE-02'])
    assert screen.table.plate_group[mine].notna().any()
    swapped = Screen(screen.table.assign(plate_group=screen.table.plate_group.where(~mine, 3 - screen.table.plate_group)), screen.source)
    model = load_model(here/'held')
    a, b = (model.predict(model.held_out(s), 'transductive', tta=1, progress=False) for s in (screen, swapped))
    assert a.group_source.eq('inferred').all() and a.sirna.tolist() == b.sirna.tolist()


@pytest.mark.parametrize('more', ['--valid HUVEC-02', '--folds 2 --fold 1', '--valid none', '', '--valid HUVEC-02 --pretrain controls'])
def test_what_is_asked_to_be_held_out_is_in_no_stage(here, tmp_path, capsys, more):
    stages = [dict(name='some', epochs=1, lr=1e-3, loss='adacos'), dict(name='everything', epochs=1, lr=1e-3, full_data=True)]
    full = written(tmp_path, 'full', stages=stages)
    train(here, f'{tmp_path.name}_full', f'{more} --recipe {full}')
    model = load_model(here/f'{tmp_path.name}_full')
    asked = more not in ('--valid none', '')
    assert ('everything' in set(model.history.stage)) is not asked
    assert bool({*model.config['held_out']} - {*model.config['trained_experiments']}) is asked
    assert capsys.readouterr().out.count('is left out of full: everything') == asked


def test_cell_types_hold_out_what_the_common_model_never_learned(here, tmp_path):
    stages = [dict(name='some', epochs=1, lr=1e-3, loss='adacos'), dict(name='everything', epochs=1, lr=1e-3, full_data=True)]
    train(here, 'cells_full', f'--cell-types each --recipe {written(tmp_path, "full", stages=stages)}')
    for c, m in load_model(here/'cells_full').models.items():
        assert m.config['held_out'] == [f'{c}-02'] and f'{c}-02' not in m.config['trained_experiments']
    train(here, 'cells_learned', '--valid none')
    for valid in ('auto', 'none'):
        line = f'{here}/s.zarr {here}/after_{valid} --recipe {here}/tiny.json --pretrained {here}/cells_learned --cell-types RPE --valid {valid} --tta 1'
        assert cli.rcic_train(line.split()) == 0
        assert load_model(here/f'after_{valid}').models['RPE'].config['held_out'] == []
    if not (here/'held').exists(): train(here, 'held', '--valid HUVEC-02,RPE-02')
    line = f'{here}/s.zarr {here}/without_held --recipe {here}/tiny.json --pretrained {here}/held --cell-types RPE --valid none --tta 1'
    assert cli.rcic_train(line.split()) == 0
    assert load_model(here/'without_held').models['RPE'].config['held_out'] == []


@pytest.mark.parametrize('begin', ['all', 'backbone'])
def test_a_model_that_is_continued_holds_out_the_same(here, tmp_path, capsys, begin):
    for name, valid in (('first_ones', 'HUVEC-01,RPE-01'), ('cells_learned', 'none')):
        if not (here/name).exists(): train(here, name, f'--valid {valid}')
    recipe = written(tmp_path, 'go', begin=begin)
    for name, held, said in (('first_ones', ['HUVEC-01', 'RPE-01'], 'the same is held out'), ('cells_learned', [], 'nothing is held out')):
        line = f'{here}/s.zarr {tmp_path}/{name} --recipe {recipe} --pretrained {here}/{name} --tta 1'
        capsys.readouterr()
        assert cli.rcic_train(line.split()) == 0
        assert capsys.readouterr().out.count(f'{said}; --valid can name others') == 1
        config = load_model(tmp_path/name).config
        assert config['held_out'] == held and not {*config['held_out']} & {*config['trained_experiments']}


@pytest.mark.parametrize('more, words', [('--valid HUVEC-99', 'HUVEC-99 cannot be held out'), ('--valid RPE-01,RPE-02', 'All training experiments of the cell type RPE are held out'),
                                         ('--pretrained {here}/held --valid HUVEC-99', 'HUVEC-99 cannot be held out'),
                                         ('--pretrained {here}/held --pretrain controls', 'is a step of the common model'),
                                         ('--pretrained {here}/held --metadata plate_group', 'is continued, which reads no metadata'),
                                         ('--target cell_type', 'would be read from the table'), ('--cell-types RPE --target experiment --valid RPE-02', 'have one experiment only')])
def test_cell_types_that_cannot_be_trained_are_refused_at_once(here, capsys, more, words):
    if not (here/'held').exists(): train(here, 'held', '--valid HUVEC-02,RPE-02')
    refused(here, f'--cell-types each {more.format(here=here)}', words, capsys)


def test_pseudo_labels_of_a_cell_type_without_test_wells_are_refused_at_once(here, capsys):
    screen = open_screen(here/'s.zarr')
    pack_screen(screen[screen.table.experiment != 'RPE-08'], here/'no_rpe.zarr', progress=False)
    train(here, 'never', '--cell-types each --pseudo 1', 2, 'no_rpe.zarr')
    assert 'no test row of a treatment well of the cell type RPE' in capsys.readouterr().err and not list(here.glob('never*'))


def test_what_tells_the_label_is_no_target(here, tmp_path, capsys):
    if not (here/'first').exists(): train(here, 'first', '--valid HUVEC-02,RPE-02 --metadata cell_type')
    refused(here, f'--recipe {written(tmp_path, "go", begin="all")} --pretrained {here}/first --target cell_type', 'The model reads cell_type, so it cannot be the target', capsys)
    refused(here, f'--recipe {written(tmp_path, "one", only=dict(cell_type="RPE"))} --target cell_type', 'All training wells have one cell_type, RPE', capsys)
    train(here, 'names_cells', f'--target cell_type --valid HUVEC-02,RPE-02 --recipe {written(tmp_path, "once")}')
    model = load_model(here/'names_cells')
    with pytest.raises(ScreenError, match='the cell type of a well chooses its model'): CellTypeModels(dict(HUVEC=model, RPE=model)).predict(here/'s.zarr', tta=1, progress=False)


def test_a_cell_type_that_the_recipe_is_not_for_is_refused(here, tmp_path, capsys):
    only = written(tmp_path, 'only', only=dict(cell_type='HUVEC'))
    refused(here, f'--cell-types RPE --recipe {only}', 'The recipe only is for the cell type HUVEC', capsys)
    refused(here, f'--recipe {written(tmp_path, "odd", cell_types=dict(RPE=only))}', 'is for the cell type HUVEC', capsys)


def test_models_of_cell_types_read_pictures_as_the_one_they_begin_with(here, tmp_path):
    own = written(tmp_path, 'own', stages=[dict(name='mine', epochs=1, lr=1e-3)])
    how = dict(data=dict(norm='global'), channels='golgi,ER', stages=[dict(name='all', epochs=1, lr=1e-3, loss='adacos', size=32)])
    train(here, 'alike', f'--recipe {written(tmp_path, "alike", cell_types=dict(RPE=own), pseudo=dict(rounds=1), predict=dict(vote="mean"), **how)}')
    a, b = load_model(here/'alike/common'), load_model(here/'alike').models['RPE']
    for k in ('norm', 'norm_mean', 'norm_std', 'size', 'channels', 'sites', 'vocabs'): assert getattr(a.spec, k) == getattr(b.spec, k), k
    assert (b.spec.norm, b.spec.size, b.spec.channels) == ('global', 32, ['golgi', 'ER'])
    assert b.config['pseudo_experiments'] == ['RPE-08'] and b.config['recipe']['predict'] == dict(vote='mean')
    line = f'{here}/s.zarr {here}/smaller --recipe {own} --pretrained {here}/alike/common --cell-types RPE --size 40 --norm own --tta 1'
    assert cli.rcic_train(line.split()) == 0
    assert (load_model(here/'smaller').models['RPE'].spec.size, load_model(here/'smaller').models['RPE'].spec.norm) == (40, 'own')


@pytest.mark.parametrize('odd, words', [(dict(channels='ER'), 'has ER as its channels'), (dict(arch='resnet18'), 'has resnet18 as its arch'),
                                        (dict(stages=[dict(name='all', epochs=1, lr=1e-3, loss='cross_entropy')]), 'linear')])
def test_what_cannot_go_on_is_refused_before_the_common_model(here, tmp_path, capsys, odd, words):
    refused(here, f'--recipe {written(tmp_path, "cells", cell_types=dict(RPE=written(tmp_path, "own", **odd)))}', words, capsys)


# A model for each cell type

def test_cell_types_answer_as_one_and_are_resumed(here, capsys):
    killed(here, 'cells', '--cell-types each', "self.dls.train.items.cell_type.eq('RPE').all() and self.epoch == 1")
    assert {p.parent.name for p in (here/'cells').glob('*/config.json')} == {'common', 'HUVEC'} and not (here/'cells/cell_types.json').exists()
    train(here, 'cells', '--cell-types each --resume')
    assert capsys.readouterr().out.count('is finished: there is nothing to continue') == 2
    models, screen = load_model(here/'cells'), open_screen(here/'s.zarr')
    for c in ('HUVEC', 'RPE'):
        m = load_model(here/'cells'/c)
        assert set(m.index.labels.cell_type) == {c} and m.config['held_out'] == [f'{c}-02']
        assert {*m.config['trained_experiments']} == {'HUVEC-01', 'RPE-01'}
    got = read_predictions(predict(here, 'cells', 'cells')).set_index('id_code').sirna
    assert not list(here.glob('cells.csv.*')) and len(got) == screen.test.treatments.table.well_id.nunique()
    for c in ('HUVEC', 'RPE'):
        alone = load_model(here/'cells'/c).predict(screen[screen.table.cell_type == c], tta=1, progress=False)
        assert alone.sirna.tolist() == got[alone.id_code].tolist()
    assert models.evaluate(screen, ['inductive', 'adapted', 'transductive'], tta=1, progress=False).columns['adapted']['n_wells'] == len(got)
    emb = models.embed(screen, tta=1, progress=False)
    assert emb.Metadata_site_id.tolist() == screen.table.site_id.tolist()
    held = read_predictions(predict(here, 'cells', 'cells_held', '--held-out --protocol transductive'))
    assert {i.rsplit('_', 2)[0] for i in held.id_code} == {'HUVEC-02', 'RPE-02'}
    kept = predict(here, 'cells', 'kept', '--scores --protocol transductive')
    assert ensemble_files(here/'mean.csv', kept, kept).sirna.tolist() == read_predictions(kept).sirna.tolist() and not list(here.glob('kept.csv.*'))
    train(here, 'whole', '--cell-types each')
    assert load_model(here/'whole').fingerprint == models.fingerprint


def test_an_interrupted_prediction_of_cell_types_names_no_finished_one_again(here, tmp_path, monkeypatch):
    if not (here/'cells/cell_types.json').exists(): train(here, 'cells', '--cell-types each')
    models, screen, how = load_model(here/'cells'), open_screen(here/'s.zarr'), dict(tta=1, progress=False, scores=True)
    seen, embed = [], plan.embed_parts
    def counts(folder, model, *args, **kwargs):
        seen.append(Path(folder).name.split('.')[0])
        if len(seen) == 2: raise KeyboardInterrupt
        return embed(folder, model, *args, **kwargs)
    monkeypatch.setattr(plan, 'embed_parts', counts)
    def ask(name, **more): return models.predict(screen, 'adapted', tmp_path/f'{name}.csv', neighbors=tmp_path/f'{name}.n.parquet', embeddings=tmp_path/f'{name}.e.parquet', **{**how, **more})
    with pytest.raises(KeyboardInterrupt): ask('a')
    ask('a')
    assert seen == ['HUVEC', 'RPE', 'RPE'] and not list(tmp_path.glob('a.csv.*'))
    ask('b')
    assert len(seen) == 5
    for end in ('.csv', '.top.csv'): assert (tmp_path/f'a{end}').read_text() == (tmp_path/f'b{end}').read_text()
    for end in ('.n.parquet', '.e.parquet', '.scores.parquet'): pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path/f'{name}{end}') for name in 'ab'))
    a, b = (json.loads((tmp_path/f'{name}.json').read_text()) for name in 'ab')
    assert {k for k in a if a[k] != b[k]} <= {'scores_sha256', 'cell_types'}
    seen.clear()
    with pytest.raises(KeyboardInterrupt): ask('c')
    ask('c', k=3)                                     # another question: what was finished does not answer it
    assert seen == ['HUVEC', 'RPE', 'HUVEC', 'RPE']


@pytest.mark.parametrize('more', ['--cell-types each', '--channels 5-of-6'])
def test_killed_between_model_and_curves_each_part_gets_its_curves(here, monkeypatch, more):
    out, n = 'curves' + more[-1], []
    def dies(history, folder):
        n.append(folder)
        if len(n) == 2: raise KeyboardInterrupt
        draw(history, folder)
    draw = workflow.save_curve
    monkeypatch.setattr(workflow, 'save_curve', dies)
    train(here, out, more, code=130)
    folder = Path(n[-1])
    assert (folder/'config.json').exists() and not (folder/'history.png').exists()
    monkeypatch.undo()
    weights = (folder/'weights.safetensors').read_bytes()
    train(here, out, f'{more} --resume')
    assert (folder/'history.png').exists() and (folder/'weights.safetensors').read_bytes() == weights
    made = [f.parent for f in (here/out).glob('*/config.json')]
    assert len(made) == (3 if 'each' in more else 6) and all((f/'history.png').exists() for f in made)


@pytest.mark.parametrize('more', ['', '--scores', '--protocol adapted'])
def test_a_search_among_the_same_cell_type_does_not_name_the_cell_type(here, capsys, monkeypatch, more):
    "The answer would be read from the table, and be right always"
    if not (here/'kinds').exists(): train(here, 'kinds', '--target cell_type --valid none')
    capsys.readouterr()
    monkeypatch.setattr(plan, 'embed_parts', None)      # it is said before a picture is read
    predict(here, 'kinds', 'kinds', f'--same-cell-type {more}', code=2)
    said = capsys.readouterr().err
    assert '--same-cell-type would give the answer away' in said and not (here/'kinds.csv').exists()
    monkeypatch.undo()
    m = load_model(here/'kinds')
    with pytest.raises(ScreenError, match='would give the answer away'): m.class_scores(open_screen(here/'s.zarr'), same_cell_type=True, tta=1, progress=False)
    emb = m.embed(open_screen(here/'s.zarr').test, tta=1, progress=False)
    with pytest.raises(ScreenError, match='restrict_cell_type=True would give the answer away'): score_wells(emb, m.index, restrict_cell_type=True)


OWN = dict(RPE=dict(by='index', merge='mean'), HUVEC=dict(by='classifier', merge='mean'))


def of_own_ways(here, *cells):
    "Return models of cell types with a way to predict each; that of RPE learned from wells of RPE-08 under its own labels"
    if not (here/'cells/cell_types.json').exists(): train(here, 'cells', '--cell-types each')
    models = load_model(here/'cells')
    for c, m in models.models.items(): m.config['recipe'] = {**(m.config.get('recipe') or {}), 'predict': OWN[c]}
    models.models['RPE'].model.pseudo_experiments = ('RPE-08',)
    models.models = {c: models.models[c] for c in cells}
    return models


@pytest.mark.parametrize('cells', [('HUVEC', 'RPE'), ('RPE', 'HUVEC')])
def test_what_cell_types_write_as_one_says_all_of_each(here, tmp_path, cells):
    models, how = of_own_ways(here, *cells), dict(tta=1, adapt='no', progress=False)
    screen = open_screen(here/'s.zarr')
    pred = models.predict(screen, 'transductive', tmp_path/'a.csv', embeddings=tmp_path/'e.parquet', neighbors=tmp_path/'n.parquet', scores=True, by='index', **how)
    emb = read_embeddings(tmp_path/'e.parquet')
    protocols = emb.Metadata_protocol.fillna('inductive').groupby(emb.Metadata_cell_type).unique()
    assert {c: p.tolist() for c, p in protocols.items()} == dict(HUVEC=['inductive'], RPE=['transductive'])
    assert emb_features(emb).shape == (screen.test.treatments.table.site_id.nunique(), 16) and np.isfinite(emb_features(emb)).all()
    near, scores = (f(screen, 'transductive', by='index', **how) for f in (models.neighbors, models.class_scores))
    pd.testing.assert_frame_equal(near.drop(columns='protocol'), pd.read_parquet(tmp_path/'n.parquet').sort_values(['id_code', 'query', 'rank'], ignore_index=True).drop(columns='protocol'), check_dtype=False)
    assert name_wells(scores).sirna.tolist() == name_wells(read_scores(tmp_path/'a.scores.parquet')).sirna.tolist() == pred.sirna.tolist()
    models.predict(screen, 'transductive', tmp_path/'b.csv', **how)
    record = json.loads((tmp_path/'b.json').read_text())
    assert 'by' not in record and {c: r['by'] for c, r in record['cell_types'].items()} == dict(HUVEC='classifier', RPE='index') and record['merge'] == 'mean'
    assert how_table({'b': read_predictions(tmp_path/'b.csv')}).b['answered by'].startswith(f'{cells[0]}: ')


@pytest.mark.parametrize('more, words', [(dict(scores=True), "different kind"), (dict(embeddings='e.parquet'), 'are no embeddings'), (dict(neighbors='n.parquet'), 'without looking for neighbors'),
                                         (dict(neighbors='n.parquet', by='classifier'), 'without looking for neighbors')])
def test_what_cell_types_cannot_write_as_one_is_said_first(here, tmp_path, more, words):
    models = of_own_ways(here, 'RPE', 'HUVEC')
    given = {k: tmp_path/v if k in ('embeddings', 'neighbors') else v for k, v in more.items()}
    with pytest.raises(ScreenError, match=words): models.predict(here/'s.zarr', 'transductive', tmp_path/'out.csv', tta=1, progress=False, **given)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != '.lock'] == []
    if 'scores' in more:
        with pytest.raises(ScreenError, match=words): models.class_scores(here/'s.zarr', 'transductive', tta=1, progress=False)


@pytest.mark.parametrize('of', ['HUVEC', 'both'])
def test_scores_are_written_over_nothing_but_scores(here, tmp_path, of):
    models, how = of_own_ways(here, 'RPE', 'HUVEC'), dict(tta=1, progress=False, by='index', protocol='transductive')
    model, screen = (models, here/'s.zarr') if of == 'both' else (models.models['HUVEC'], open_screen(here/'s.zarr'))
    mine = tmp_path/'a.scores.parquet'
    for write in (lambda: mine.write_text('my notes'), lambda: pd.DataFrame(dict(x=[1])).to_parquet(mine), mine.mkdir):
        write()
        with pytest.raises(ScreenError, match='a.scores.parquet (would be overwritten, and rcic_fastai did not write it|is a folder)'): model.predict(screen, out=tmp_path/'a.csv', scores=True, **how)
        if mine.is_file(): mine.unlink()
    mine.rmdir()
    with pytest.raises(ScreenError, match='written twice, as its scores and as embeddings'): model.predict(screen, out=tmp_path/'a.csv', scores=True, embeddings=mine, **how)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != '.lock'] == []
    if of == 'both': return
    for _ in range(2): model.predict(screen[screen.table.cell_type == 'HUVEC'], out=tmp_path/'a.csv', scores=True, **how)      # over its own


def test_stages_of_one_name_are_refused(here, tmp_path, capsys):
    twice = [dict(name='all', epochs=1, lr=1e-3), dict(name='all', epochs=2, lr=1e-3)]
    refused(here, f'--recipe {written(tmp_path, "twice", stages=twice)}', "two stages called 'all'", capsys)


def test_models_of_other_lengths_are_not_put_in_one_table(here, tmp_path, monkeypatch):
    models = of_own_ways(here, 'RPE', 'HUVEC')
    monkeypatch.setattr(models.models['RPE'].model, 'classifier', torch.nn.Linear(7, 8))
    for f in (models.embed, models.profiles, partial(models.predict, protocol='transductive', by='index', out=tmp_path/'o.csv', embeddings=tmp_path/'e.parquet')):
        with pytest.raises(ScreenError, match='embed into different lengths'): f(here/'s.zarr', tta=1, progress=False)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != '.lock'] == []


def test_cell_types_begin_with_a_given_model(here):
    train(here, 'base', '--valid HUVEC-02,RPE-02')
    (here/'still.json').write_text(json.dumps(dict(name='still', arch='test_resnet', stages=[])))
    line = f'{here}/s.zarr {here}/from_base --recipe {here}/still.json --pretrained {here}/base --cell-types RPE --tta 1'
    assert cli.rcic_train(line.split()) == 0
    a, b = load_model(here/'base'), load_model(here/'from_base').models['RPE']
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items() if v.is_floating_point() and k != 'classifier.weight')
    assert torch.equal(a.model.classifier.weight, b.model.classifier.weight) and list(load_model(here/'from_base').models) == ['RPE']


def test_each_cell_type_has_its_own_stages(here):
    own = dict(name='own', arch='test_resnet', stages=[dict(name='mine', epochs=1, lr=1e-3)])
    (here/'own.json').write_text(json.dumps(own))
    (here/'cells.json').write_text(json.dumps({**json.loads((here/'tiny.json').read_text()), 'cell_types': dict(RPE=str(here/'own.json'))}))
    assert cli.rcic_train(f'{here}/s.zarr {here}/own --recipe {here}/cells.json --pretrained no --tta 1'.split()) == 0
    assert list(load_model(here/'own').models) == ['RPE'] and load_model(here/'own/RPE').history.stage.tolist() == ['mine']


def test_a_well_of_a_cell_type_without_a_model_is_refused(here, capsys):
    predict(here, 'from_base', 'none', code=2)
    assert 'no model of the cell type HUVEC: the folder has RPE' in capsys.readouterr().err and not list(here.glob('none*'))


@pytest.mark.parametrize('more, words', [('--cell-types A549', 'No training well has the cell type A549'), ('--cell-types each --channels DNA', 'no channel DNA')])
def test_wrong_cell_types(here, more, words, capsys): refused(here, more, words, capsys)


@pytest.mark.parametrize('data, stage, want', [(dict(augs=dict(crop=32)), {}, dict(crop=32)), ({}, {}, {}), (dict(augs=dict(crop=32)), dict(augs=dict(max_rotate=0., crop=(24, 40))), dict(max_rotate=0., crop=[24, 40]))],
                         ids=['data', 'default', 'stage'])
def test_random_views_are_augmented_as_in_training_in_index_and_queries(here, tmp_path, monkeypatch, data, stage, want):
    seen, augs = [], embedding.site_augs
    monkeypatch.setattr(embedding, 'site_augs', lambda **kwargs: seen.append(kwargs) or augs(**kwargs))
    out = f'views_{tmp_path.name}'
    recipe = written(tmp_path, 'views', data=data, index=dict(tta=2, views='random'), stages=[dict(name='all', epochs=1, lr=1e-3, loss='adacos', **stage)])
    train(here, out, f'--recipe {recipe} --valid HUVEC-02')
    assert load_model(here/out).config['augs'] == want
    model, n = load_model(here/out), len(seen)
    model.predict(open_screen(here/'s.zarr'), views='random', tta=1, progress=False)
    assert n and len(seen) > n and all(json.loads(json.dumps(o)) == want for o in seen[n-2:])          # before them, a rehearsal
    del model.config['augs']                                          # as in a folder that was written before
    assert json.loads(json.dumps(plan_prediction(model, here/'s.zarr', views='random').options.augs)) == want


def test_without_augmentation_there_are_no_random_views(here, tmp_path):
    bare = written(tmp_path, 'bare', data=dict(augs=None))
    train(here, 'bare_views', f'--recipe {bare} --valid HUVEC-02')
    model = load_model(here/'bare_views')
    for _ in range(2):
        with pytest.raises(ScreenError, match='augmented nothing'): plan_prediction(model, here/'s.zarr', views='random')
        model.config.pop('augs', None)
    dls = screen_dls(open_screen(here/'s.zarr'), valid='HUVEC-02', bs=8, device='cpu', augs=None)
    with pytest.raises(ScreenError, match='augmented nothing'): build_index(screen_learner(dls, 'test_resnet', pretrained=None), views='random', progress=False)


# Entries of a recipe

OF_ANOTHER_KIND = [dict(valid=5), dict(stages=5), dict(name=5), dict(arch=5), dict(channels=5), dict(begin=5), dict(about=5), dict(only=dict(cell_type=['RPE'])), dict(cell_types=dict(RPE=5)),
    *[dict(model=o) for o in (5, dict(loss=7), dict(emb_dim='x'), dict(metadata=3), dict(loss=dict(name='mix', b=3)), dict(pretrained=3), dict(input_bn='no'))],
    *[dict(data=o) for o in (dict(bs='x'), dict(bs=1), dict(controls='no'), dict(norm=5), dict(augs='rcic'), dict(augs=dict(blur=1)), dict(size=True))],
    *[dict(index=o) for o in (dict(tta='many'), dict(tta=9), dict(views='rondom'), dict(separate=True), dict(separate='no'))],
    *[dict(predict=o) for o in (dict(tta='x'), dict(k='x'), dict(vote='nearst'), dict(same_cell_type='no'))],
    *[dict(pseudo=o) for o in (dict(first='x'), dict(first=.9, last=.5), dict(lr='fast'), dict(cutmix=3), dict(rounds=True))],
    *[dict(stages=[dict(dict(name='a', epochs=1, lr=1e-3), **o)]) for o in (dict(callbacks=5), dict(callbacks=[5]), dict(full_data='no'), dict(train_bn='no'), dict(metadata='x'), dict(neck=5), dict(loss=7),
        dict(loss=dict(name='arcface', m='x')), dict(parts=5), dict(opt=5), dict(opt=dict(name='sgd', mom='x')), dict(schedule=5), dict(published='x'), dict(callbacks=[dict(name='ema', decay='x')]))],
    dict(model=dict(neck='identity'), stages=[dict(name='a', epochs=1, lr=1e-3, neck='rcic117')])]

@pytest.mark.parametrize('odd', OF_ANOTHER_KIND, ids=lambda o: str(o)[:60])
def test_an_entry_of_another_kind_is_refused(tmp_path, odd):
    plain = json.loads(Path(written(tmp_path, 'plain')).read_text())
    with pytest.raises(ScreenError): recipe_from_dict({**plain, **odd})


def test_entries_of_the_right_kind_are_taken(tmp_path):
    recipe = get_recipe(written(tmp_path, 'good', valid='HUVEC-01, RPE-01', index=dict(tta=16, views='random'), data=dict(controls=None, size=None), model=dict(bn_momentum=None, meta_dropout=dict(cell_type=.5))))
    assert recipe.valid == ('HUVEC-01', 'RPE-01')


def test_choices_of_a_recipe_are_those_of_predictions():
    assert [_CHOICES[k] for k in ('by', 'vote', 'adapt', 'tell')] == [plan.BY, VOTES, plan.ADAPT, plan.TELL] and _CHOICES['correct'] == ('no', 'auto', *plan._CORRECT)


def test_what_comes_after_the_stages_may_be_corrected(here, tmp_path):
    killed(here, 'corrected', f'--valid HUVEC-02 --pretrain controls --recipe {written(tmp_path, "cor", index=dict(tta=1))}', 'len(self.dls.spec.labels) == 8')
    train(here, 'corrected', f'--valid HUVEC-02 --pretrain controls --resume --tta 2 --recipe {written(tmp_path, "cor", index=dict(tta=2, views="random", separate=True), predict=dict(vote="mean"))}')
    model = load_model(here/'corrected')
    assert model.config['recipe']['predict'] == dict(vote='mean') and len(model.index.labels) == 2*len(model.index.labels.drop_duplicates('site_id'))


# A recipe that goes on with a model

@pytest.mark.parametrize('name, begin', [('rcic117_huvec', 'all'), ('rcic117_groups', 'features')])
def test_a_recipe_begins_with_all_weights_of_a_model(here, tmp_path, capsys, name, begin):
    if not (here/'first').exists(): train(here, 'first', '--valid HUVEC-02,RPE-02 --metadata cell_type')
    still = {**get_recipe(name).to_dict(), 'stages': [], 'data': {}}
    (tmp_path/'still.json').write_text(json.dumps(still))
    group = open_screen(here/'s.zarr').table.plate_group.dropna().min()
    if begin == 'features': (tmp_path/'still.json').write_text(json.dumps({**still, 'only': dict(plate_group=int(group))}))
    line = f'{here}/s.zarr {here}/{name} --recipe {tmp_path}/still.json --pretrained {here}/first --valid HUVEC-02 --tta 1'
    capsys.readouterr()
    assert cli.rcic_train(line.split()) == 0
    assert 'is meant to begin' not in capsys.readouterr().out
    a, b = load_model(here/'first').model, load_model(here/name).model
    names = [k for k in a.state_dict() if not k.startswith(('classifier', 'loss', '_extra'))]
    assert any(k.startswith('metadata') for k in names) and all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in names)
    old, new = load_model(here/'first').spec.labels, load_model(here/name).spec.labels
    kept = torch.equal(a.classifier.weight[[old.index(l) for l in new]], b.classifier.weight)
    assert kept is (begin == 'all') and (len(new) < len(old)) is (begin == 'features')
    held = load_model(here/name).held_out(here/'s.zarr').test.treatments.table
    assert begin == 'all' and held.plate_group.isna().all() or held.plate_group.unique().tolist() == [group]


def test_a_recipe_that_goes_on_says_so_without_a_model(here, tmp_path, capsys):
    train(here, 'alone', f'--recipe {written(tmp_path, "on", begin="all")}')
    assert capsys.readouterr().out.count('note: on is meant to begin with a trained model: give its folder with --pretrained.') == 1


@pytest.mark.parametrize('more, words, changes', [
    ('--metadata plate_group', 'is continued, which reads cell_type', {}), ('--arch resnet18', 'is a test_resnet', {}),
    ('', 'reads logits', dict(stages=[dict(name='b', epochs=1, lr=1e-3, loss='cross_entropy')], model=dict(classifier='linear', loss='cross_entropy')))])
def test_what_a_model_that_is_continued_would_undo_is_refused(here, tmp_path, capsys, more, words, changes):
    if not (here/'first').exists(): train(here, 'first', '--valid HUVEC-02,RPE-02 --metadata cell_type')
    refused(here, f'--recipe {written(tmp_path, "go", begin="all", **changes)} --pretrained {here}/first {more}', words, capsys)


def test_a_model_that_is_continued_keeps_its_classifier_over_the_controls_and_may_be_normalized_otherwise(here, tmp_path):
    if not (here/'first').exists(): train(here, 'first', '--valid HUVEC-02,RPE-02 --metadata cell_type')
    still = written(tmp_path, 'still', begin='all', stages=[])
    for name, more in (('controls', '--pretrain controls'), ('global', '--norm global')):
        assert cli.rcic_train(f'{here}/s.zarr {tmp_path}/{name} --recipe {still} --pretrained {here}/first --tta 1 {more}'.split()) == 0
        assert torch.equal(load_model(tmp_path/name).model.classifier.weight, load_model(here/'first').model.classifier.weight)
    assert load_model(tmp_path/'global').spec.norm == 'global'


# Continued, but not the same

def test_a_finished_part_of_another_training_is_refused(here, tmp_path, capsys):
    once, other = written(tmp_path, 'once'), written(tmp_path, 'other', stages=[dict(name='all', epochs=1, lr=1e-4, loss='arcface')])
    how = f'--valid HUVEC-02,RPE-02 --recipe {once}'
    (here/'mixed').mkdir()
    train(here, 'mixed/common', how)
    for more, words in (('--seed 5', 'arguments.seed (0 then, 5 now)'), (f'--recipe {other}', 'recipe.name'), ('--valid HUVEC-01', 'arguments.valid'), ('--tta 2', 'index_views.tta (1 then, 2 now)')):
        train(here, 'mixed', f'{how} --cell-types each {more} --resume', 2)
        assert words in capsys.readouterr().err and not (here/'mixed/HUVEC').exists()
    train(here, 'mixed', f'{how} --cell-types each --resume')
    assert capsys.readouterr().out.count('is finished') == 1
    for more, code in (('--seed 5', 2), ('', 0)): train(here, 'mixed', f'{how} --cell-types each {more} --resume', code)
    train(here, 'mixed/common', f'{how} --resume', 0)
    train(here, 'mixed/common', f'{how} --resume --norm plate', 2)
    assert 'arguments.norm' in capsys.readouterr().err


# Control wells first

def test_the_part_after_controls_begins_as_the_recipe_builds_the_model(here, tmp_path, monkeypatch):
    stages = [dict(name='a', epochs=1, lr=1e-3, loss='adacos', metadata=False), dict(name='b', epochs=1, lr=1e-3, neck='rcic117', loss=dict(name='arcface', s=16.), opt='ranger', metadata=True)]
    recipe, seen, fit = written(tmp_path, 'necks', stages=stages, model=dict(emb_dim=16, metadata=['cell_type'])), [], Learner.fit_recipe
    def looked(learn, *args, **kwargs):
        seen.append((learn.model._args['neck'], learn.model.loss.config()['name'], learn.model.use_metadata, learn.opt_func))
        return fit(learn, *args, **kwargs)
    monkeypatch.setattr(Learner, 'fit_recipe', looked)
    train(here, 'necks', f'--pretrain controls --valid HUVEC-02 --recipe {recipe}')
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0][0] == 'linear'
    assert load_model(here/'necks').model._args['neck'] == 'rcic117'


def test_controls_first_and_resumed(here):
    killed(here, 'after_controls', '--pretrain controls --valid HUVEC-02', "len(self.dls.spec.labels) < 8 and self.epoch == 1")
    assert (here/'after_controls.controls.checkpoints').is_dir() and not (here/'after_controls').exists()
    killed(here, 'after_controls', '--pretrain controls --valid HUVEC-02 --resume', "len(self.dls.spec.labels) == 8 and self.epoch == 1")
    train(here, 'after_controls', '--pretrain controls --valid HUVEC-02 --resume')
    train(here, 'at_once', '--pretrain controls --valid HUVEC-02')
    a, b = load_model(here/'after_controls'), load_model(here/'at_once')
    assert a.fingerprint == b.fingerprint and not list(here.glob('after_controls.*'))
    assert b.config['pretrain'] == 'controls' and len(b.config['pretrain_stages']) == 1
    assert b.history.stage.unique().tolist() == ['controls: all', 'all'] and set(b.index.labels.well_type) == {'treatment'}
    assert set(b.config['trained_experiments']) == {'HUVEC-01', 'RPE-01', 'RPE-02'} and len(b.spec.labels) == 8
    train(here, 'plain', '--valid HUVEC-02')
    assert load_model(here/'plain').fingerprint != b.fingerprint


def test_without_controls_there_is_nothing_to_learn_first(here, tmp_path, capsys):
    simulate_screen(here/'bare', EXPS[:2], sirnas=8, size=48, controls=0, progress=False)
    t = open_screen(here/'bare').treatments
    pack_screen(t, here/'bare.zarr', progress=False)
    capsys.readouterr()
    train(here, 'never', '--pretrain controls', 2, 'bare.zarr')
    assert 'no control well' in capsys.readouterr().err and not list(here.glob('never*'))
    refused(here, '--pretrain everything', "choose from controls", capsys)


# Pseudo-labels

def test_pseudo_labels_are_transductive_and_resumed(here, capsys):
    killed(here, 'pseudo', '--pseudo 3 --valid HUVEC-02', "len(getattr(self.learn, 'history', ())) == 4")
    assert (here/'pseudo.pseudo.checkpoints').is_dir()
    train(here, 'pseudo', '--pseudo 3 --valid HUVEC-02 --resume')
    assert '2 rounds of pseudo-labels were finished' in capsys.readouterr().out
    train(here, 'pseudo_at_once', '--pseudo 3 --valid HUVEC-02')
    a, b = load_model(here/'pseudo'), load_model(here/'pseudo_at_once')
    assert a.fingerprint == b.fingerprint and not list(here.glob('pseudo.p*')) + list(here.glob('pseudo.c*'))
    assert b.config['pseudo_experiments'] == ['HUVEC-17', 'RPE-08'] and [round(r['share'], 2) for r in b.config['pseudo_rounds']] == [.41, .7, .98]
    assert set(b.index.labels.experiment) == {'HUVEC-01', 'RPE-01', 'RPE-02'}
    predict(here, 'pseudo', 'pseudo_inductive', code=2)
    assert '--protocol transductive' in capsys.readouterr().err and not (here/'pseudo_inductive.csv').exists()
    predict(here, 'pseudo', 'pseudo_all', '--protocol transductive')
    predict(here, 'pseudo', 'pseudo_held', '--held-out')                        # it was not used, so this is inductive


def test_rounds_of_pseudo_labels_are_trained_as_the_last_stage(here, tmp_path):
    stages = [dict(name='a', epochs=1, lr=1e-3, loss='adacos', opt='ranger'), dict(name='b', epochs=1, lr=1e-3, wd=.2)]
    train(here, 'like_last', f'--valid HUVEC-02 --recipe {written(tmp_path, "like", stages=stages, pseudo=dict(rounds=1, lr=6e-5))}')
    stage, = load_model(here/'like_last').config['pseudo']['recipe']['stages']
    assert (stage['wd'], stage['opt'], stage['schedule'], stage['lr']) == (.2, 'ranger', 'constant', 6e-5)


def test_no_label_of_a_test_well_is_read(here, tmp_path):
    whole = open_screen(here/'s.zarr')
    blank = whole.table.assign(sirna=whole.table.sirna.mask(whole.table.dataset == 'test'), sirna_id=whole.table.sirna_id.mask(whole.table.dataset == 'test'))
    pack_screen(Screen(blank, whole.source), here/'blank.zarr', progress=False)
    train(here, 'pseudo_blank', '--pseudo 3 --valid HUVEC-02', screen='blank.zarr')
    assert load_model(here/'pseudo_blank').fingerprint == load_model(here/'pseudo_at_once').fingerprint


def test_pseudo_labels_need_test_wells(here, capsys):
    pack_screen(open_screen(here/'s.zarr').train, here/'train.zarr', progress=False)
    capsys.readouterr()
    train(here, 'never', '--pseudo 3', 2, 'train.zarr')
    assert 'no test row of a treatment well' in capsys.readouterr().err and not list(here.glob('never*'))
    refused(here, '--pseudo -1', '--pseudo -1', capsys)


def test_a_model_that_learned_nothing_goes_the_whole_way(here, tmp_path, capsys):
    "The four commands of the README: a folder without an epoch is read back"
    recipe = written(tmp_path, 'none', stages=[])
    assert cli.rcic_train(f'{here}/s.zarr {tmp_path}/m --recipe {recipe} --pretrained no --tta 1 --norm plate --valid none'.split()) == 0
    assert list(load_model(tmp_path/'m').history) == ['stage', 'epoch'] and not len(load_model(tmp_path/'m').history)
    assert cli.rcic_embed(f'{tmp_path}/m {here}/s.zarr {tmp_path}/p.parquet --tta 1'.split()) == 0
    assert cli.rcic_hits(f'{tmp_path}/p.parquet {tmp_path}/hits.csv'.split()) == 0
    assert cli.rcic_report(f'{tmp_path}/m {here}/s.zarr {tmp_path}/r.html'.split()) == 0
    assert (tmp_path/'r.html').stat().st_size > 10_000 and 'Traceback' not in capsys.readouterr().err
    again = load_model(tmp_path/'m')
    (tmp_path/'m'/'history.csv').write_text('\n')      # as it was written once
    assert not len(again.history)


def test_typos_in_recipes_are_answered_with_what_was_meant(tmp_path):
    from helpers import refused
    refused(lambda: get_recipe('demoo'), 'did you mean demo?')
    refused(lambda: get_recipe(tmp_path/'mine.json'), 'There is no file', 'mine.json')
    odd = written(tmp_path, 'odd', stages=[dict(name='all', epochs=1, lr=1e-3, loss='adacoss')])
    refused(lambda: get_recipe(odd), 'odd.json: ', 'adacoss')


def test_a_stage_without_an_epoch_is_said(here, tmp_path, capsys):
    two = written(tmp_path, 'two', stages=[dict(name='head', epochs=1, lr=1e-3, parts='head', loss='adacos'), dict(name='all', epochs=9, lr=1e-3, loss='adacos')])
    assert cli.rcic_train(f'{here}/s.zarr {tmp_path}/m --recipe {two} --pretrained no --tta 1 --valid none --epochs 1'.split()) == 0
    assert 'note: --epochs 1 leaves no epoch for 1 stage of two, head.' in capsys.readouterr().out
