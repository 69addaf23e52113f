"Every term of the loss has exactly its weight: with accumulated batches, in mixed precision, and with each other."
import random
from copy import deepcopy
import numpy as np, pytest, torch
from torch.nn.functional import cross_entropy, normalize
from fastai.vision.all import Callback, CancelFitException, GradientAccumulation, L, MixedPrecision
from torch.amp import GradScaler, autocast
from rcic_fastai.batch.augment import dihedral
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train import domain
from rcic_fastai.train.cutmix import *
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner

BS = 8

def make(screen, cbs):
    "A learner without chance in its model: no dropout, a loss with a fixed scale"
    dls = screen_dls(screen, bs=BS, augs=None, device='cpu', valid='HUVEC-03', batch_by='experiment', batch_groups=2)
    learn = screen_learner(dls, 'test_efficientnet', pretrained=None, emb_dim=16, seed=0, loss='softmax', cbs=cbs)
    for m in learn.model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    return learn

class Watch(Callback):
    "Seeds each batch, notes what came, and ends the fit at the first step of the optimizer"
    order = -5
    def __init__(self): self.batches, self.losses = [], []
    def seed(i): torch.manual_seed(i); random.seed(i)
    def before_batch(self): self.batches.append((self.xb, self.yb, self.pct_train)); Watch.seed(self.iter)
    def after_pred(self): Watch.seed(self.iter)
    def after_batch(self): self.losses.append(self.loss)

class Stop(Callback):
    order = 99
    def before_step(self): self.grads = gradients(self.model); raise CancelFitException

def gradients(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

def fit(learn, *cbs):
    watch, stop = Watch(), Stop()
    torch.manual_seed(0)      # the head of GradientReversal
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[*cbs, watch, stop])
    return watch, stop.grads

def pairs(by, e, term):
    a, b = (e[by == i] for i in by.unique())
    return term(a, b)*e.shape[1]

def domain_by_hand(e, by, head, pct):
    x = reverse_gradient(e, 2/(1 + 2.718281828459045**(-10*pct)) - 1)
    return cross_entropy(head(x*x.shape[1]**.5), by)

def by_hand(what, weight, model, teacher, head, batches):
    "Gradients of mean over batches of (loss + weight·term), without a callback"
    model.zero_grad()
    for i, ((x, *meta), (y,), pct) in enumerate(batches):
        Watch.seed(i)
        z = model.neck(model.features(x, *meta))
        loss, e, by = model.loss(model.classifier(z), y), normalize(z, dim=1), meta[2].as_subclass(torch.Tensor)
        order = by.argsort(stable=True)
        term = (pairs(by, e, coral) if what is CORAL else pairs(by, e, sliced_wasserstein) if what is SlicedWasserstein else
                domain_by_hand(e[order], by[order], head, pct) if what is GradientReversal else
                (1 - (model.embed(x, *meta)*teacher.embed(dihedral(x, random.randrange(8)), *meta).detach()).sum(1)).mean())
        ((loss + weight*term)/len(batches)).backward()
    return gradients(model)

TERMS = [CORAL, SlicedWasserstein, GradientReversal, MeanTeacher]

@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('what', TERMS)
def test_a_term_has_its_weight_with_accumulated_batches(screen, what, n):
    cb = what(weight=3.)
    learn = make(screen, [GradientAccumulation(n*BS)] if n > 1 else [])
    model = deepcopy(learn.model).train()
    watch, grads = fit(learn, cb)
    assert len(watch.batches) == n
    hand = by_hand(what, 3., model, deepcopy(model).eval(), getattr(cb, 'head', None), watch.batches)
    assert torch.allclose(grads, hand, rtol=1e-3, atol=1e-5*hand.abs().max()), (grads/hand).median()
    plain = by_hand(what, 0., model, deepcopy(model).eval(), getattr(cb, 'head', None), watch.batches)
    assert not torch.allclose(plain, hand, rtol=.05, atol=1e-3*hand.abs().max()) or what is GradientReversal     # the test can fail

# Mixed precision on a CPU: fastai's asks for a GPU

class Mixed(MixedPrecision):
    def before_fit(self):
        self.autocast, self.scales, self.learn.scaler = autocast('cpu', dtype=torch.bfloat16), L(), GradScaler('cpu', enabled=False)

class Same(Callback):
    "Every batch is the first one, with the same chance and progress"
    order = -4
    def before_fit(self): self.first = None
    def before_batch(self):
        self.first = self.first or (self.xb, self.yb)
        (self.learn.xb, self.learn.yb), self.learn.pct_train = self.first, .5
        for cb in self.learn.cbs:
            if isinstance(cb, BatchMix): cb.rng = np.random.default_rng(3)
        Watch.seed(0)
    def after_pred(self): Watch.seed(0)

@pytest.mark.parametrize('mixed', [False, True], ids=['full', 'bf16'])
@pytest.mark.parametrize('what', [*TERMS, CutMix, MixUp])
def test_four_times_the_same_batch_is_its_gradient(screen, what, mixed, monkeypatch):
    "Also in mixed precision: a quarter is exact in every format"
    monkeypatch.setattr(domain, '_drawn_groups', lambda *_: None)      # they are not those of the batch here
    one, four = (fit(make(screen, [*([Mixed()] if mixed else []), *([GradientAccumulation(n*BS)] if n > 1 else [])]), what(), Same())[1] for n in (1, 4))
    assert torch.allclose(one, four, rtol=1e-3, atol=1e-5*one.abs().max()), (four/one).median()

def types_of(learn, *cbs):
    "Types of what body, neck and teacher answer in training, and of each loss"
    seen = {}
    def note(name, m): return m.register_forward_hook(lambda m, i, o: seen.setdefault(name, set()).add(o.dtype))
    class Note(Callback):
        order = 8     # the terms are added, mixed precision is not over
        def before_train(self):
            note('student', self.model.body)
            for cb in self.learn.cbs:
                if hasattr(cb, 'average'): note('teacher', cb.average.module.body)
                if hasattr(cb, 'head'): note('head', cb.head)
        def after_loss(self):
            if self.training: seen.setdefault('loss', set()).add(self.loss_grad.dtype)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[*cbs, Note()])
    return seen

@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('what', TERMS)
def test_networks_are_in_half_precision_and_losses_in_full(screen, what, n):
    cb, half, full = what(), {torch.bfloat16}, {torch.float32}
    seen = types_of(make(screen, [Mixed(), *([GradientAccumulation(n*BS)] if n > 1 else [])]), cb)
    want = dict(student=half, loss=full, **(dict(teacher=half) if what is MeanTeacher else {}), **(dict(head=full) if what is GradientReversal else {}))
    assert {k: v for k, v in seen.items() if k in want} == want

def test_orders_are_those_of_other_callbacks():
    "Mixing, then the terms, then the division by accumulation, then the loss scale"
    for term in TERMS: assert CutMix.order < term.order < GradientAccumulation.order < MixedPrecision.order, term
