"Terms against batch effects and averaged weights where they are easily wrong: mixed precision, nothing to compare, a validation outside a fit."
import pytest, torch
from fastai.vision.all import Callback, CancelFitException, L, MixedPrecision
from torch.amp import GradScaler, autocast
from rcic_fastai.train.cutmix import CutMix
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.simulate.layout import simulate_screen

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp('domain')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    return open_screen(path)

def make(screen, bs=8, **kwargs):
    kwargs = {**dict(valid='HUVEC-03', batch_by='experiment', batch_groups=2), **kwargs}
    return screen_learner(screen_dls(*screen, bs=bs, augs=None, device='cpu', **kwargs), 'mobilenetv3_small_050', pretrained=None, emb_dim=16, seed=0)

def fit(learn, *cbs, epochs=2):
    torch.manual_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=list(cbs))
    return learn

def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])

class Half(MixedPrecision):
    "fastai's, on a CPU; with a scale that doubles after each step"
    def __init__(self, on=True): super().__init__(); self.on = on
    def before_fit(self):
        self.autocast, self.scales = autocast('cpu', dtype=torch.float16, enabled=self.on), L()
        self.learn.scaler = GradScaler('cpu', init_scale=8., growth_interval=1, growth_factor=16.)
    def after_fit(self): self.autocast = self.learn.scaler = None

# Mixed precision

@pytest.mark.parametrize('cb', [CORAL, SlicedWasserstein, GradientReversal])
def test_terms_in_mixed_precision(screen, cb):
    one, half = cb(), cb()
    fit(make(screen), one, epochs=1); fit(make(screen), half, Half(), epochs=1)
    assert len(one.terms) == len(half.terms) > 0 and abs(one.terms[0] - half.terms[0]) < .02*one.terms[0]

@pytest.mark.parametrize('term', [coral, sliced_wasserstein])
def test_a_term_is_that_of_full_precision(term):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(16, 512, generator=g) + s, dim=1) for s in (0, .3))
    whole = term(a, b) if term is coral else term(a, b, generator=torch.Generator().manual_seed(1))
    with autocast('cpu', dtype=torch.float16): half = term(a, b) if term is coral else term(a, b, generator=torch.Generator().manual_seed(1))
    assert half.dtype == torch.float32 and torch.equal(whole, half)

def test_the_head_learns_without_the_loss_scale(screen):
    plain, scaled = GradientReversal(hidden=8), GradientReversal(hidden=8)
    fit(make(screen), plain); fit(make(screen), scaled, Half(on=False))
    assert torch.allclose(weights(plain.head), weights(scaled.head), atol=1e-6)

def test_the_head_leaves_out_gradients_that_are_no_numbers(screen):
    class Spoil(Callback):
        def after_backward(self):
            if self.train_iter == 1:
                for p in self.gradient_reversal.head.parameters(): p.grad.fill_(float('inf'))
    cb = GradientReversal(hidden=8)
    learn = fit(make(screen), cb, Spoil())
    assert weights(cb.head).isfinite().all() and weights(learn.model).isfinite().all() and len(cb.terms) > 2

# Nothing to compare

@pytest.mark.parametrize('how,cbs', [(dict(batch_groups=1), []), (dict(bs=2), []), ({}, [CutMix(p=1., seed=0)])], ids=['one group', 'two samples', 'all mixed'])
def test_batches_that_never_hold_two_groups_are_refused_at_once(screen, how, cbs):
    learn = make(screen, **how)
    with pytest.raises(ScreenError, match="no batch held two groups of experiment.*batch_groups=2"): fit(learn, CORAL(), *cbs)
    assert learn.train_iter == 0

def test_batches_that_happen_to_hold_one_group_are_refused_after_a_while(screen):
    rows = screen[0][screen[0].experiment != 'HUVEC-02']
    learn = make((rows, screen[1]), batch_by=None, batch_groups=1)
    with pytest.raises(ScreenError, match='no batch held two groups'): fit(learn, CORAL(), epochs=2000//len(learn.dls.train))
    assert learn.train_iter == 99

def test_a_short_training_without_comparison_is_refused_at_its_end(screen):
    rows = screen[0][screen[0].experiment != 'HUVEC-02']
    with pytest.raises(ScreenError, match='no batch held two groups'): fit(make((rows, screen[1]), batch_by=None, batch_groups=1), CORAL())

def test_a_validation_has_nothing_to_compare_and_need_not(screen):
    learn = make(screen)
    learn.add_cb(CORAL())
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[0] > 0

# Averaged weights

@pytest.mark.parametrize('cb', [EMA, MeanTeacher])
def test_only_a_fit_shows_the_average(screen, cb):
    learn = make(screen)
    learn.add_cb(cb(.9))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        fit(learn, epochs=1)
        with torch.no_grad():
            for p in learn.model.parameters(): p.mul_(.5)
        changed, seen = weights(learn.model), []
        class See(Callback):
            def before_batch(self): seen.append(weights(self.model))
        learn.validate(cbs=See())
    assert seen and all(torch.equal(o, changed) for o in seen) and torch.equal(weights(learn.model), changed)

def test_a_fit_that_did_not_begin_leaves_the_model_alone(screen):
    class Refuse(Callback):
        order = 1
        def before_fit(self): raise CancelFitException
    learn = make(screen)
    learn.add_cb(EMA(.9))
    fit(learn, epochs=1)
    with torch.no_grad():
        for p in learn.model.parameters(): p.mul_(.5)
    changed = weights(learn.model)
    fit(learn, Refuse())
    assert torch.equal(weights(learn.model), changed)
