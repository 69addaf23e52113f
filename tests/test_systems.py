"""Every published recipe, in small, through the commands: train, predict, evaluate; and the settings that its source names."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import AvgMetric, Callback
from helpers import learner, quiet, same, simulate_screen
from rcic_fastai import cli
from rcic_fastai.batch.augment import PUBLISHED_AUGS
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed import embed
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.train.recipes import RECIPES, Recipe, Stage, get_recipe
from rcic_fastai.train.systems import *  # noqa: F401,F403  (adds the recipes)

LABELS = [n for n, r in RECIPES.items() if r.data.get('several')]      # tests/test_labels.py runs them
SYSTEMS = [n for n in RECIPES if n not in ('demo', 'features', *LABELS)]
CELLS = 'HUVEC-01,HUVEC-02,RPE-01,U2OS-01,HEPG2-01,HUVEC-17'.split(',')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('systems')/'screen'
    simulate_screen(folder, CELLS, sirnas=8, size=48, controls=1, progress=False)
    return Path(pack_screen(open_screen(folder), folder.with_suffix('.zarr'), progress=False))


def tiny(name, folder=None):
    "Return a recipe for seconds: another network, few epochs, small pictures; all else as it is"
    r = RECIPES[name].scaled(min(3, len(RECIPES[name].stages)), side=48)
    arch = r.arch if r.arch == 'capstone_cnn' else 'test_efficientnet'
    model = {**{k: v for k, v in r.model.items() if k != 'arch_args'}, **({'arch_args': dict(side=4, width=16)} if arch == 'capstone_cnn' else {})}
    cells = {c: str(folder/f'{c}.json') for c in r.cell_types}
    for c, file in cells.items():
        if r.cell_types[c]: Path(file).write_text(json.dumps(tiny(r.cell_types[c]).to_dict()))
        else: cells[c] = ''
    return replace(r, cell_types=cells, channels=r.channels.replace('5-of-6', ''), arch=arch, model={**model, 'emb_dim': 16} if 'neck' not in model else model, stages=[replace(s, bs=s.bs and 8) for s in r.stages], data={**r.data, 'bs': 8, **({'batch_groups': 2} if 'batch_groups' in r.data else {})})


def protocols_of(recipe):
    "Return the protocols that a recipe can be asked for: one plate group alone has no pattern, pseudo-labels are of the test plates"
    if 'plate_group' in recipe.only: return ['inductive']
    return ['transductive'] if recipe.pseudo else ['inductive', 'transductive']


def with_groups(screen, folder):
    "Return a copy of a screen, with the files that were drawn, whose test plates say which group they hold"
    folder.mkdir()
    screen = screen.with_suffix('')
    (folder/'images').symlink_to(screen/'images')
    table = read_metadata(screen)
    table.assign(plate_group=table.plate_group.fillna(table.plate - 1).where(table.well_type == 'treatment')).to_csv(folder/'metadata.csv', index=False)
    return folder


@pytest.mark.parametrize('name', SYSTEMS)
def test_a_system_runs_through_the_commands(name, drawn, tmp_path, capsys):
    recipe, model = tmp_path/'recipe.json', tmp_path/'model'
    recipe.write_text(json.dumps(tiny(name, tmp_path).to_dict()))
    assert not cli.rcic_train([str(drawn), str(model), '--recipe', str(recipe), '--pretrained', 'no', '--tta', '1'])
    assert RECIPES[name].about.split('.')[0] in capsys.readouterr().out
    said, only = RECIPES[name].predict, RECIPES[name].only
    if only.get('cell_type', 'HUVEC') != 'HUVEC':
        assert cli.rcic_predict([str(model), str(drawn), str(tmp_path/'x.csv'), '--tta', '1']) == 2
        assert 'and the test wells are all others' in capsys.readouterr().err
        return
    asked = drawn
    if 'plate_group' in only:
        assert cli.rcic_predict([str(model), str(drawn), str(tmp_path/'x.csv'), '--tta', '1']) == 2
        assert 'the plate_group of 8 test wells is not known: give the table a column plate_group' in capsys.readouterr().err
        asked = with_groups(drawn, tmp_path/'groups')
    for protocol in protocols_of(RECIPES[name]):
        out = tmp_path/f'{protocol}.csv'
        assert not cli.rcic_predict([str(model), str(asked), str(out), '--protocol', protocol, '--tta', '1'])
        record = json.loads(out.with_suffix('.json').read_text())
        assert (record['protocol'], record['by'], record['views']) == (protocol, said.get('by', 'index'), said.get('views', 'dihedral'))
        assert record['tell'] == (said.get('tell', 'no') if protocol == 'transductive' else 'no')
        assert len(pd.read_csv(out)) == (2 if 'plate_group' in only else 8)
        assert any('left out: the model was trained on wells with plate_group 0 only' in n for n in record.get('notes', ())) == ('plate_group' in only)
    partial = ['--partial'] if only else []
    assert not cli.rcic_evaluate([str(out), str(drawn), '--json', *partial])
    assert protocol in capsys.readouterr().out


def test_a_recipe_of_one_cell_type_is_trained_on_it_alone(drawn, tmp_path):
    recipe, model = tmp_path/'recipe.json', tmp_path/'model'
    recipe.write_text(json.dumps(tiny('rcic117_rpe').to_dict()))
    cli.rcic_train([str(drawn), str(model), '--recipe', str(recipe), '--pretrained', 'no', '--tta', '1', '--valid', 'none'])
    config = json.loads((model/'config.json').read_text())
    assert set(config['data']['sites']) == {'RPE-01'}


SAID = dict( # what the sources name: recipe → stage → field → value
    rcic117=[(0, 'epochs', 4), (0, 'lr', 1e-2), (0, 'bs', 16), (0, 'pct_start', .2), (0, 'div_final', 1e3), (0, 'published', .007), (3, 'published', .096), (7, 'published', .262),
             (12, 'published', .331), (14, 'published', .356), (18, 'published', .392), (18, 'cutmix', 1.), (18, 'schedule', dict(name='plateau', patience=4)), (21, 'published', .404),
             (21, 'cutmix', 0.), (23, 'epochs', 84), (23, 'keep_best', 'accuracy'), (24, 'published', .613), (26, 'lr', 1e-5), (26, 'full_data', True)],
    rcic117_b4=[(0, 'size', 380), (0, 'bs', 7), (0, 'opt', dict(name='ranger', mom=.95, sqr_mom=.99, eps=1e-4)), (0, 'schedule', dict(name='flat_cosine', start=.7)), (5, 'published', .327), (7, 'published', .356)],
    rcic16=[(0, 'lr', 5e-4), (0, 'schedule', dict(name='step', every=10, gamma=.1)), (0, 'accumulate', 2), (0, 'bs', 16), (0, 'patience', 5), (0, 'loss', dict(name='cosface', s=30., m=.5)), (0, 'epochs', 100)],
    rcic16_cyclic=[(0, 'lr', 2.5e-3), (0, 'schedule', dict(name='cyclic', low=.2, up=3, gamma=.96))],
    rcic1=[(0, 'lr', 1.5e-4), (0, 'epochs', 90), (0, 'schedule', 'cosine'), (0, 'cutmix', 1.), (0, 'augs', 'rcic1')],
    rxrx1_paper=[(0, 'epochs', 100), (0, 'bs', 512), (0, 'published', .751)],
    capstone_cnn=[(0, 'epochs', 2), (0, 'lr', 3e-4), (0, 'published', .002)],
    capstone_resnet50=[(0, 'epochs', 2), (0, 'parts', 'classifier'), (0, 'lr', 3e-4), (1, 'patience', 6), (1, 'published', .104)],
    rxrx1_resnet50=[(0, 'lr', .2), (0, 'bs', 512), (0, 'wd', 1e-4), (0, 'schedule', dict(name='restarts', every=10)), (0, 'opt', dict(name='sgd', mom=.9, nesterov=True))],
    wilds_erm=[(0, 'epochs', 90), (0, 'size', 256), (0, 'published', .299)], wilds_coral=[(0, 'published', .284)], wilds_irm=[(0, 'published', .082)],
    wilds_groupdro=[(0, 'published', .23)])

@pytest.mark.parametrize('name, i, field, value', [(n, *o) for n, rows in SAID.items() for o in rows])
def test_settings_are_those_of_the_source(name, i, field, value): assert getattr(get_recipe(name).stages[i], field) == value


TOLD = Path(__file__).with_name('recipes.json')     # all settings of all recipes, as they were when they were compared with their sources

def told():
    "Return what each recipe says beside the defaults, and the defaults"
    def more(o, usual): return {k: v for k, v in o.items() if k not in usual or v != usual[k]}
    stage, recipe = ({k: v for k, v in o.items() if k not in ('name', 'epochs', 'lr', 'about', 'stages')} for o in (
        asdict(Stage('', 1, 1.)), Recipe('', []).to_dict()))
    found = {n: more({**r.to_dict(), 'stages': [more(s, stage) for s in r.to_dict()['stages']]}, recipe) for n, r in RECIPES.items()}
    for r in found.values(): del r['about'], r['name']
    return json.loads(json.dumps({'stage': stage, 'recipe': recipe, **found}))


@pytest.mark.parametrize('name', ['stage', 'recipe', *RECIPES])
def test_no_setting_changes_unseen(name):
    "A default or a constant that several recipes share changes all of them; `python tests/test_systems.py` writes the file again"
    assert told()[name] == json.loads(TOLD.read_text())[name]


def test_models_are_those_of_the_source():
    assert [(RECIPES[n].arch, RECIPES[n].model['emb_dim']) for n in ('rcic16', 'rcic16_efficientnet_b4', 'rcic16_xception', 'rcic16_resnet101_cbam', 'rcic16_se_resnext101')] == [
        ('densenet201', 256), ('tf_efficientnet_b4', 256), ('legacy_xception', 1000), ('resnet101', 512), ('seresnext101_32x4d', 512)]
    assert RECIPES['rcic1'].model['loss']['weights'] == [.8, .1] and RECIPES['rcic1'].model['bn_momentum'] == .05
    assert RECIPES['rcic117_12d'].model['sites_join'] == 'concat' and RECIPES['rcic117_12d'].data['sites'] == 2
    assert RECIPES['rcic117'].valid == ('HEPG2-06', 'HEPG2-07', 'HUVEC-15', 'HUVEC-16', 'RPE-06', 'RPE-07', 'U2OS-03')
    assert RECIPES['wilds_erm'].valid == ('HEPG2-08', 'HUVEC-17', 'RPE-08', 'U2OS-04')
    assert RECIPES['rcic1_pseudo'].pseudo == dict(rounds=3, first=.41, last=.98, lr=6e-5, cutmix=1.)
    assert (RECIPES['six_channels'].channels, RECIPES['six_channels'].pretrain) == ('5-of-6', 'controls') and RECIPES['six_channels_pseudo'].pseudo['rounds'] == 3
    for n in ('rcic16', 'capstone'): assert RECIPES[f'{n}_cell_types'].cell_types == {'each': ''} and f'{n}_cell_types' in RECIPES[{'capstone': 'capstone_resnet50'}.get(n, n)].about
    assert RECIPES['wilds_coral'].channels == 'nucleus,ER,actin' and RECIPES['wilds_coral'].data['batch_groups'] == 9
    assert RECIPES['rxrx1_paper'].arch == RECIPES['rcic1'].arch == 'densenet161'


def test_a_run_reports_the_accuracy_of_the_epoch_that_it_kept(screen):
    accuracies, states = [.2, .9, .1], []
    def accuracy(pred, y): return torch.tensor(accuracies[min(len(states), 2)])
    class States(Callback):
        def after_epoch(self): states.append({k: v.clone() for k, v in self.model.state_dict().items()})
    learn = learner(screen_dls(screen, valid='HUVEC-02', bs=8, device='cpu'))
    learn.metrics = [AvgMetric(accuracy)]
    reached = quiet(learn, lambda: learn.fit_recipe(Recipe('r', [Stage('all', 3, 1e-2, keep_best='accuracy')]), cbs=[States()]))
    assert reached.accuracy.tolist() == [pytest.approx(.9)] and learn.history.kept.tolist() == [False, True, False]
    assert same(learn.model.state_dict(), states[1]) and not same(states[1], states[2])


@pytest.mark.parametrize('augs, said', [('wilds', PUBLISHED_AUGS['wilds']), (dict(max_rotate=7.), dict(max_rotate=7.)), (None, {})])
def test_random_views_are_augmented_as_the_recipe_says(screen, monkeypatch, augs, said):
    asked, real = [], embed.site_augs
    monkeypatch.setattr(embed, 'site_augs', lambda **kwargs: (asked.append(kwargs), real(**kwargs))[1])
    test = Screen(screen.table.assign(dataset=np.where(screen.table.experiment == 'HUVEC-03', 'test', 'train')), screen.source)
    learn = learner(screen_dls(test.train, valid='HUVEC-02', bs=8, device='cpu'))
    model = learn.to_model(tta=1, progress=False)
    model.config.pop('augs')           # as in folders of before
    model.config['recipe'] = Recipe('r', [Stage('all', 1, 1e-3, augs=augs), Stage('on', 1, 1e-3)]).to_dict()
    model.predict(test, views='random', tta=1, progress=False)
    assert asked == [said]


if __name__ == '__main__': TOLD.write_text('{\n' + ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in told().items()) + '\n}\n')
