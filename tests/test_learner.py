"fastai's habits on a learner for screens: `freeze`, `unfreeze` and `fine_tune` train what is new and spare what is pretrained."
import pytest, torch
from fastai.vision.all import Learner, params
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.model.model import PARTS, model_parts
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.simulate.layout import simulate_screen
from rcic_fastai.train.learner import *
from rcic_fastai.train.recipes import *

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp('learner')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02'], sirnas=4, size=32, plates=1, controls=0, progress=False)
    return open_screen(path)

def make(screen, **kwargs):
    dls = screen_dls(screen, bs=8, augs=None, device='cpu', valid='HUVEC-02')
    kwargs = {**dict(metadata='cell_type,experiment', emb_dim=16, pretrained=None, train_bn=False), **kwargs}
    return screen_learner(dls, 'mobilenetv3_small_050', **kwargs)

def kept(learn): return {n: [p.detach().clone() for p in ps] for n, ps in model_parts(learn.model).items()}
def moved(learn, before): return [n for n, ps in model_parts(learn.model).items() if any(not torch.equal(p, o) for p, o in zip(ps, before[n]))]

def quietly(learn, f):
    before = kept(learn)
    with learn.no_bar(), learn.no_logging(): f()
    return moved(learn, before)

NEW = ['metadata', 'neck', 'classifier']

def test_fine_tune_trains_what_is_new_and_then_all(screen):
    learn, stages = make(screen), []
    def fit(*args, **kwargs):
        before = kept(learn)
        Learner.fit_one_cycle(learn, *args, **kwargs)
        stages.append(moved(learn, before))
    learn.fit_one_cycle = fit
    quietly(learn, lambda: learn.fine_tune(1, 1e-2))
    assert stages == [NEW, [*PARTS]]

def test_without_metadata(screen):
    learn = make(screen, metadata=())
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == ['neck', 'classifier']

@pytest.mark.parametrize('first', [lambda l: l.unfreeze(), lambda l: l.train_only('stem,head'), lambda l: l.fit_recipe(Recipe('r', [Stage('all', 1, 1e-2)]))],
                         ids=['unfreeze', 'train_only', 'recipe'])
def test_freezing_after_a_training_of_other_parts(screen, first):
    "No stale gradient lets a frozen part decay"
    learn = make(screen)
    quietly(learn, lambda: (first(learn), learn.fit(1, 1e-2)))
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2, wd=.1)) == NEW
    learn.unfreeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == [*PARTS]

@pytest.mark.parametrize('n', [0, 1, 2, 3, 4, -1, -2])
def test_freeze_to_counts_groups(screen, n):
    learn = make(screen)
    quietly(learn, lambda: learn.fit(1, 1e-2))
    learn.freeze_to(n)
    assert quietly(learn, lambda: learn.fit(1, 1e-2, wd=.1)) == [*PARTS][n:]

def test_normalization_of_frozen_parts_is_trained_as_everywhere(screen):
    learn = make(screen, train_bn=True)
    learn.freeze()
    free = {n for n, p in learn.model.named_parameters() if p.requires_grad and n.split('.')[0] in ('stem', 'body')}
    assert free and all(isinstance(learn.model.get_submodule(n.rpartition('.')[0]), torch.nn.modules.batchnorm._BatchNorm) for n in free)

def test_five_rates_stay_five(screen):
    learn = make(screen)
    learn.freeze()
    quietly(learn, lambda: learn.fit(1, [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))
    assert [h['lr'] for h in learn.opt.hypers] == [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]

def test_other_learners_freeze_as_before(screen):
    "Two groups of one's own: the last is trained"
    learn = make(screen, splitter=lambda m: [params(m.stem) + params(m.body) + params(m.neck), params(m.metadata) + params(m.classifier)])
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == ['metadata', 'classifier']
