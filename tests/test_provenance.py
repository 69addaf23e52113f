"Which experiments the weights of a model learned from is known wherever the weights go."
import copy, json, pickle, shutil
import pytest, torch
from fastai.vision.all import Callback, SaveModelCallback, load_learner
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from helpers import simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError, file_facts, json_hash
from rcic_fastai.embed.embed import row_protocols, weights_fingerprint
from rcic_fastai.embed.index import EmbeddingIndex

from rcic_fastai.folder import load_model
from rcic_fastai.model.backbones import create_backbone
from rcic_fastai.model.model import EXTRA, ScreenModel, create_screen_model, provenance, read_provenance, set_provenance
from rcic_fastai.predict.predict import predict_wells
from rcic_fastai.predict.pseudo import *
from rcic_fastai.screen.images import PngTree
from rcic_fastai.train.domain import EMA
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.screen.screen import Screen

ARCH, ONE = 'test_resnet', Recipe('one', [Stage('one', 1, 1e-3)])
TRAINED, PSEUDO_LABELED = ['HUVEC-01', 'HUVEC-02'], ['HUVEC-17']
KNOWN = dict(trained_experiments=TRAINED, pseudo_experiments=PSEUDO_LABELED)
pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:You are shadowing')

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    d = tmp_path_factory.mktemp('provenance')/'s'
    t = simulate_screen(d, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17', 'HUVEC-18'], sirnas=4, plates=2, controls=1, size=32,
                        test=['HUVEC-17', 'HUVEC-18'], n_workers=1, progress=False)
    return Screen(t, PngTree(d, t))

def learner(screen, path=None, pretrained=None, valid='HUVEC-03', **kw):
    learn = screen_learner(screen_dls(screen, valid=valid, bs=4, device='cpu'), ARCH, pretrained=pretrained, emb_dim=8, path=path, **kw)
    learn.remove_cb(learn.progress)
    return learn

@pytest.fixture(scope='module')
def taught(screen, tmp_path_factory):
    "A learner that was trained on two experiments, and on a third under its own labels"
    t, learn = screen.table, learner(screen, tmp_path_factory.mktemp('taught'))
    with learn.no_logging():
        learn.fit_recipe(ONE)
        learn.fit_pseudo(t[t.experiment == 'HUVEC-17'], rounds=1, recipe=ONE, progress=False)
    return learn

@pytest.fixture(scope='module')
def folder(taught, tmp_path_factory):
    emb = taught.embed(taught.dls.train.items, tta=1, progress=False)
    return taught.to_model(EmbeddingIndex(emb)).save(tmp_path_factory.mktemp('folder')/'m')

def old_folder(folder, to):
    "As folders were written before"
    shutil.copytree(folder, to)
    save_file(load_file(folder/'weights.safetensors'), to/'weights.safetensors')
    c = json.loads((to/'config.json').read_text())
    del c['trained_experiments'], c['sha256']
    c['files']['weights.safetensors'] = file_facts(to/'weights.safetensors')
    (to/'config.json').write_text(json.dumps({**c, 'sha256': json_hash(c)}))
    return to

def resumed(learn, screen, tmp):
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    two, first = Recipe('two', [Stage('one', 2, 1e-3)]), learner(screen)
    set_provenance(first.model, provenance(learn.model))
    with first.no_logging(), pytest.raises(KeyboardInterrupt): first.fit_recipe(two, cbs=Stop(), folder=tmp/'c')
    second = learner(screen)
    with second.no_logging(): second.fit_recipe(two, folder=tmp/'c', resume=True)
    return second.model

def averaged(learn):
    model = AveragedModel(create_screen_model(**learn.model.config))
    other = AveragedModel(learn.model)
    model.load_state_dict(other.state_dict())
    return model.module

def loaded(learn, screen, **kw):
    again = learner(screen)
    again.load(learn.save('w', **kw).with_suffix(''))
    return again.model

def exported(learn):
    learn.export()
    return load_learner(learn.path/'export.pkl').model

def with_state(learn, state, **kw):
    model = create_screen_model(**learn.model.config)
    model.load_state_dict(state, **kw)
    return model

def from_file(learn, tmp):
    torch.save(learn.model.state_dict(), tmp/'s.pth')
    return with_state(learn, torch.load(tmp/'s.pth', weights_only=True))

def from_safetensors(learn, tmp):
    save_file(learn.model.state_dict(), tmp/'s.safetensors')
    return with_state(learn, load_file(tmp/'s.safetensors'))

SAME = dict(save=lambda l, s, f, tmp: loaded(l, s), save_without_opt=lambda l, s, f, tmp: loaded(l, s, with_opt=False),
            export=lambda l, s, f, tmp: exported(l), checkpoint=lambda l, s, f, tmp: resumed(l, s, tmp),
            folder=lambda l, s, f, tmp: load_model(f).model,
            state_dict=lambda l, s, f, tmp: with_state(l, l.model.state_dict()), not_strict=lambda l, s, f, tmp: with_state(l, l.model.state_dict(), strict=False),
            clones=lambda l, s, f, tmp: with_state(l, {k: v.detach().clone() for k, v in l.model.state_dict().items()}),
            pth=lambda l, s, f, tmp: from_file(l, tmp), safetensors=lambda l, s, f, tmp: from_safetensors(l, tmp),
            copy=lambda l, s, f, tmp: copy.copy(l.model), deepcopy=lambda l, s, f, tmp: copy.deepcopy(l.model),
            pickle=lambda l, s, f, tmp: pickle.loads(pickle.dumps(l.model)), averaged=lambda l, s, f, tmp: averaged(l))

@pytest.mark.parametrize('route', SAME)
def test_the_same_weights_know_the_same(screen, taught, folder, tmp_path, route):
    model = SAME[route](taught, screen, folder, tmp_path)
    assert provenance(model) == KNOWN
    how = dict(zip(screen.table.experiment, row_protocols(model, taught.dls.spec, screen.table)))
    assert how == {**dict.fromkeys(['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-18'], 'inductive'), 'HUVEC-17': 'transductive'}

def lone(path, to): return shutil.copy(path, to)
def saved(learn, tmp):
    torch.save(learn.model.state_dict(), tmp/'w.pth')
    return tmp/'w.pth'
def saved_safely(learn, tmp):
    save_file(learn.model.state_dict(), tmp/'w.safetensors')
    return tmp/'w.safetensors'

PRETRAINED = dict(folder=lambda l, f, tmp: f, folder_as_text=lambda l, f, tmp: str(f), weights=lambda l, f, tmp: f/'weights.safetensors',
                  lone_weights=lambda l, f, tmp: lone(f/'weights.safetensors', tmp/'lone.safetensors'),
                  old_folder=lambda l, f, tmp: old_folder(f, tmp/'old'), save=lambda l, f, tmp: l.save('w', with_opt=False),
                  pth=lambda l, f, tmp: saved(l, tmp), safetensors=lambda l, f, tmp: saved_safely(l, tmp))

@pytest.mark.parametrize('route', PRETRAINED)
def test_a_model_that_begins_with_weights_begins_with_their_past(screen, taught, folder, tmp_path, route):
    "Its own training comes on top; an experiment of the past that is held out now is not new to it"
    heir = learner(screen, pretrained=PRETRAINED[route](taught, folder, tmp_path), valid='HUVEC-01')
    torch.testing.assert_close(heir.model.body.state_dict(), taught.model.body.state_dict())
    assert provenance(heir.model) == KNOWN
    with heir.no_logging(): heir.fit_recipe(ONE)
    assert provenance(heir.model) == dict(trained_experiments=[*TRAINED, 'HUVEC-03'], pseudo_experiments=PSEUDO_LABELED)
    emb = heir.embed(screen.table, tta=1, progress=False)
    how = dict(zip(emb.Metadata_experiment, emb.Metadata_protocol))
    assert how == {'HUVEC-01': 'transductive', 'HUVEC-02': 'inductive', 'HUVEC-03': 'inductive', 'HUVEC-17': 'transductive', 'HUVEC-18': 'inductive'}
    train = heir.embed(heir.dls.train.items, tta=1, progress=False)
    index = EmbeddingIndex(train)
    with pytest.raises(ScreenError, match="ask for protocol='transductive'"): predict_wells(emb[emb.Metadata_experiment == 'HUVEC-01'], index)
    m = load_model(heir.to_model(index).save(tmp_path/'heir'))
    assert provenance(m.model) == provenance(heir.model)
    assert dict(zip(screen.table.experiment, m.protocols(screen.table))) == how
    assert 'learned the labels of HUVEC-01 before' in (m.folder/'README.md').read_text()
    assert any('HUVEC-01' in n and 'never seen' in n for n in m.screen_notes(screen))
    assert m.config['metrics']['protocol'] == 'transductive' and 'not trained on last, but before' in (m.folder/'README.md').read_text()

@pytest.mark.parametrize('route', [k for k in PRETRAINED if not k.startswith(('folder', 'old'))])
def test_a_model_on_a_backbone_with_these_weights_has_their_past(taught, folder, tmp_path, route):
    "Put together by hand"
    weights = PRETRAINED[route](taught, folder, tmp_path)
    model = ScreenModel(create_backbone(taught.model.arch, 6, weights), 3)
    assert provenance(model) == KNOWN
    fresh = ScreenModel(create_backbone(taught.model.arch, 6), 3)
    assert provenance(fresh) == dict(trained_experiments=[], pseudo_experiments=[])

def test_weights_of_others_have_no_past(tmp_path):
    model = create_screen_model('test_resnet', 3)
    torch.save({k: v for k, v in model.state_dict().items() if k != EXTRA}, tmp_path/'w.pth')
    save_file({k: v for k, v in model.state_dict().items() if k != EXTRA}, tmp_path/'w.safetensors')
    (tmp_path/'config.json').write_text('{"architecture": "test_resnet", "data": NaN}')
    for f in ('w.pth', 'w.safetensors'):
        assert read_provenance(tmp_path/f) == {}
        assert provenance(create_screen_model('test_resnet', 3, pretrained=tmp_path/f)) == dict(trained_experiments=[], pseudo_experiments=[])

def test_weights_of_before_load_and_leave_what_is_known(taught):
    old = {k: v for k, v in taught.model.state_dict().items() if k != EXTRA}
    model = with_state(taught, old)
    assert provenance(model) == dict(trained_experiments=[], pseudo_experiments=[])
    set_provenance(model, KNOWN)
    model.load_state_dict(old)
    assert provenance(model) == KNOWN

def test_models_pickled_before_have_no_past():
    model = create_screen_model('test_resnet', 3)
    old = copy.copy(model)
    for k in KNOWN: vars(old).pop(k, None)
    assert provenance(pickle.loads(pickle.dumps(old))) == dict(trained_experiments=[], pseudo_experiments=[])

@pytest.mark.parametrize('said', [b'', b'[]', b'{"pseudo_experiments": "HUVEC-01"}', b'{"trained_experiments": [1]}', b'\xff'])
def test_a_past_that_cannot_be_read_is_refused(said):
    model = create_screen_model('test_resnet', 3)
    state = {**model.state_dict(), EXTRA: torch.tensor(list(said), dtype=torch.uint8)}
    with pytest.raises(ScreenError): model.load_state_dict(state)

def test_the_past_is_not_part_of_the_fingerprint(taught):
    was, other = weights_fingerprint(taught.model), copy.deepcopy(taught.model)
    set_provenance(other, {})
    assert weights_fingerprint(other) == was

@pytest.mark.parametrize('cbs', [lambda: EMA(), lambda: SaveModelCallback(monitor='train_loss'), lambda: None], ids=['EMA', 'SaveModel', 'none'])
def test_training_is_noted_whatever_takes_part(screen, tmp_path, cbs):
    learn = learner(screen, tmp_path)
    with learn.no_logging():
        learn.fit(1, 1e-3, cbs=cbs())
        assert provenance(learn.model)['trained_experiments'] == TRAINED
        learn.dls = learn.dls.rebuild(valid='none')
        learn.fit(1, 1e-3, cbs=cbs())
        assert provenance(learn.model)['trained_experiments'] == [*TRAINED, 'HUVEC-03']
        learn.dls = learn.dls.rebuild(valid='HUVEC-03')
    emb = learn.embed(None, tta=1, progress=False)
    assert set(emb.Metadata_protocol) == {'transductive'}        # held out again, and yet learned
