"Terms against batch effects and averaged weights where they are easily wrong: mixed precision, nothing to compare, a validation outside a fit."
import numpy as np, pytest, torch
from fastai.vision.all import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                               CancelStepException, CancelTrainException, CancelValidException, GradientAccumulation, L, MixedPrecision,
                               SaveModelCallback)
from torch.amp import GradScaler, autocast
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from rcic_fastai.train.cutmix import CutMix
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.model.losses import AdaCos
from rcic_fastai.core import ScreenError

def make(screen, bs=8, **kwargs):
    kwargs = {**dict(valid='HUVEC-03', batch_by='experiment', batch_groups=2), **kwargs}
    return screen_learner(screen_dls(screen, bs=bs, augs=None, device='cpu', **kwargs), 'test_efficientnet', pretrained=None, emb_dim=16, seed=0)

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
    rows = screen.table[screen.table.experiment != 'HUVEC-02']
    learn = make(screen[rows], batch_by=None, batch_groups=1)
    with pytest.raises(ScreenError, match='no batch held two groups'): fit(learn, CORAL(), epochs=2000//len(learn.dls.train))
    assert learn.train_iter == 99

def test_a_short_training_without_comparison_is_refused_at_its_end(screen):
    rows = screen.table[screen.table.experiment != 'HUVEC-02']
    with pytest.raises(ScreenError, match='no batch held two groups'): fit(make(screen[rows], batch_by=None, batch_groups=1), CORAL())

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

class Reference(Callback):
    "PyTorch's average of a training without `EMA`; weights after each training, averages at each validation"
    order = 200
    def __init__(self, decay=.9): self.decay = decay
    def before_fit(self): self.mean, self.trained, self.means = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True), [], []
    def after_step(self): self.mean.update_parameters(self.model)
    def after_train(self): self.trained.append(state(self.model)); self.means.append(state(self.mean.module))

def state(m): return torch.cat([v.detach().double().flatten() for v in m.state_dict().values()])

@pytest.fixture(scope='module')
def reference(screen):
    ref = Reference()
    fit(make(screen), ref, epochs=3)
    return ref

class Seen(Callback):
    "Weights in the model at each event of an epoch"
    order = 300
    def before_fit(self): self.begin, self.valid, self.end = [], [], []
    def before_train(self): self.begin.append(state(self.model))
    def after_validate(self): self.valid.append(state(self.model))
    def after_epoch(self): self.end.append(state(self.model))

def close(a, b): assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)

def test_the_average_is_that_of_pytorch_and_is_what_is_validated(screen, reference):
    seen = Seen()
    learn = fit(make(screen), EMA(.9), seen, epochs=3)
    for i in range(3): close(seen.valid[i], reference.means[i]); close(seen.end[i], reference.means[i])
    for i in (1, 2): close(seen.begin[i], reference.trained[i - 1])
    close(state(learn.model), reference.means[2])

@pytest.mark.parametrize('turn', [1, -1], ids=['before', 'after'])
def test_what_is_saved_is_what_was_validated(screen, reference, tmp_path, turn):
    learn = make(screen)
    learn.path = tmp_path
    fit(learn, *[EMA(.9), SaveModelCallback(every_epoch=True)][::turn], epochs=3)
    for i in range(3): close(state(learn.load(f'model_{i}').model), reference.means[i])

def test_the_best_is_put_back_at_the_end(screen, reference, tmp_path):
    class First(SaveModelCallback):
        def after_epoch(self): self._save(self.fname) if self.epoch == 0 else None
    learn = make(screen)
    learn.path = tmp_path
    fit(learn, EMA(.9), First(), epochs=3)
    close(state(learn.model), reference.means[0])

class Raise(Callback):
    "Raises something at an event, in the second epoch"
    def __init__(self, event, what, order): self.order = order; setattr(self, event, self.go); self.what = what
    def go(self):
        if self.epoch == 1: raise self.what

ENDS = [(event, what, order) for event in ('before_validate', 'after_validate', 'after_epoch') for what in (KeyboardInterrupt, MemoryError('full'), SystemExit(143)) for order in (0, 1001)]

@pytest.mark.parametrize('event,what,order', ENDS)
def test_after_an_error_in_validation_the_model_has_its_training_weights(screen, reference, event, what, order):
    learn, ema = make(screen), EMA(.9)
    with pytest.raises(what if isinstance(what, type) else type(what)): fit(learn, ema, Raise(event, what, order), epochs=3)
    close(state(learn.model), reference.trained[1])
    close(state(ema.average.module), reference.means[1])
    seen = Seen()
    fit(learn, seen, epochs=1)     # and the next fit has nothing of it
    assert torch.equal(seen.valid[0], state(learn.model)) and '_with_events' not in vars(learn)

class InBatch(Raise):
    def go(self):
        if self.epoch == 1 and not self.training: raise self.what

def test_ctrl_c_in_a_validation_batch(screen, reference):
    learn = make(screen)
    with pytest.raises(KeyboardInterrupt): fit(learn, EMA(.9), InBatch('after_pred', KeyboardInterrupt, 0), epochs=3)
    close(state(learn.model), reference.trained[1])

@pytest.mark.parametrize('event,what', [('before_validate', CancelValidException), ('after_validate', CancelEpochException), ('before_validate', CancelEpochException)])
@pytest.mark.parametrize('order', [0, 1001])
def test_a_canceled_validation_leaves_the_training_alone(screen, reference, event, what, order):
    seen, ema = Seen(), EMA(.9)
    learn = fit(make(screen), ema, seen, Raise(event, what, order), epochs=3)
    close(seen.begin[2], reference.trained[1])
    close(state(learn.model), state(ema.average.module))

def test_a_canceled_fit_ends_with_the_average(screen, reference):
    for event, order in (('before_validate', 0), ('after_epoch', 0), ('after_epoch', 1001)):
        learn = fit(make(screen), EMA(.9), Raise(event, CancelFitException, order), epochs=3)
        close(state(learn.model), reference.means[1])

def test_two_averages_give_the_training_weights_back(screen, reference):
    seen = Seen()
    fit(make(screen), EMA(.5), EMA(.9), seen, epochs=3)
    for i in (1, 2): close(seen.begin[i], reference.trained[i - 1])
    close(seen.valid[1], reference.means[1])

def test_an_interrupted_batch_leaves_nothing_on_the_neck(screen):
    learn, cb = make(screen), CORAL()
    class Stop(Callback):
        def before_batch(self):
            self.learn.model.body.register_forward_hook(self.stop)
        def stop(self, *_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, cb, Stop())
    learn.model.body._forward_hooks.clear()
    fit(learn, cb, epochs=1)
    assert not learn.model.neck._forward_hooks and len(cb.terms) == len(learn.dls.train)

class Turn(Callback):
    order = 1
    def __init__(self, first): self.first = first
    def before_batch(self):
        if self.training and self.iter >= self.first: self.learn.xb, self.learn.yb = tuple(o.flip(0) for o in self.xb), tuple(o.flip(0) for o in self.yb)

def test_groups_of_reordered_batches_are_those_of_the_batch(screen):
    cbs = [CORAL() for _ in range(3)]
    def certain(*cbs):
        learn = make(screen)
        for m in learn.model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        return fit(learn, *cbs, epochs=1)
    certain(cbs[0])
    certain(cbs[1], Turn(0))
    assert cbs[1].terms[0] == pytest.approx(cbs[0].terms[0], rel=1e-4)
    with pytest.raises(ScreenError, match='reorders the samples of some batches'): fit(make(screen), cbs[2], Turn(1))

class Skip(Callback):
    "Cancels a part of each epoch, as fastai's own callbacks do"
    order = 90
    def __init__(self, event, what): setattr(self, event, self.cancel); self.what = what
    def cancel(self):
        if self.training and self.iter: raise self.what

def begun(screen, *cbs):
    "Weights and buffers at the begin of each epoch"
    class Note(Callback):
        def before_epoch(self): seen.append(state(self.model))
    seen = []
    fit(make(screen), *cbs, Note(), epochs=4)
    return seen

CANCELED = dict(accumulated=lambda: GradientAccumulation(24), batch=lambda: Skip('before_batch', CancelBatchException),
                backward=lambda: Skip('before_backward', CancelBackwardException), step=lambda: Skip('before_step', CancelStepException),
                training=lambda: Skip('before_batch', CancelTrainException))

@pytest.mark.parametrize('what', CANCELED)
def test_what_is_canceled_inside_an_epoch_leaves_the_training_weights_alone(screen, what):
    "An average changes nothing of a training, whatever is skipped in it"
    alone, averaged = begun(screen, CANCELED[what]()), begun(screen, CANCELED[what](), EMA(.5))
    assert len(alone) == 4 and not torch.equal(alone[1], alone[3])
    for a, b in zip(alone, averaged): assert torch.equal(a, b)

# The loss of each group

class Keep(Callback):
    "Keep predictions, labels and groups of each batch, before any term"
    order = DomainLoss.order - 1
    run_valid = False
    def before_fit(self): self.kept, self.at = [], 1 + list(self.learn.dls.spec.vocabs).index('experiment')
    def after_loss(self): self.kept.append((self.pred.detach().double(), self.yb[0].clone(), self.xb[self.at].tolist(), self.loss.item()))
    def after_batch(self): self.kept[-1] = (*self.kept[-1], self.loss.item())

def cross_entropy_learner(screen, **kwargs):
    learn = make(screen, **kwargs)
    learn.loss_func = torch.nn.CrossEntropyLoss()
    return learn

def ce(p, y): return float(torch.logsumexp(p, 0) - p[y])

def test_irm_of_a_training_is_that_of_a_loop_in_double_precision(screen):
    irm, keep = IRM(weight=3.), Keep()
    fit(cross_entropy_learner(screen), irm, keep, epochs=1)
    assert len(irm.terms) == len(keep.kept) > 1
    def slope(p, y, rows): return sum(float((p[i].softmax(0)*p[i]).sum() - p[i, y[i]]) for i in rows)/len(rows)      # d/dw of log Σe^(wp) − wp_y at 1
    for term, (p, y, groups, plain, total) in zip(irm.terms, keep.kept):
        rows = [[i for i, o in enumerate(groups) if o == g] for g in sorted(set(groups))]
        hand = sum(slope(p, y, r[::2])*slope(p, y, r[1::2]) for r in rows)/len(rows)
        assert abs(term - hand) < 1e-6 and abs(total - plain - 3*hand) < 1e-5

def test_groupdro_of_a_training_is_that_of_a_loop_in_double_precision(screen):
    dro, keep = GroupDRO(step=.5), Keep()
    learn = fit(cross_entropy_learner(screen), dro, keep)
    known = set(learn.dls.train.items.experiment)
    q = {i: 1/len(known) for i, n in enumerate(learn.dls.spec.vocabs['experiment']) if n in known}
    for p, y, groups, plain, total in keep.kept:
        losses = {g: [ce(p[i], y[i]) for i, o in enumerate(groups) if o == g] for g in q}
        losses = {g: sum(l)/len(l) if l else 0. for g, l in losses.items()}
        q = {g: v*torch.tensor(.5*losses[g], dtype=torch.float64).exp().item() for g, v in q.items()}
        q = {g: v/sum(q.values()) for g, v in q.items()}
        assert abs(total - sum(q[g]*losses[g] for g in q)) < 1e-5
    assert all(abs(dro.q[g].item() - v) < 1e-5 for g, v in q.items()) and abs(dro.q.sum().item() - 1) < 1e-6 and len(q) == 2

def test_groupdro_takes_batches_of_one_group(screen):
    dro = GroupDRO()
    fit(make(screen, batch_groups=1), dro, epochs=1)
    assert len(dro.terms) > 1

@pytest.mark.parametrize('make_cb', [IRM, GroupDRO])
def test_mixed_batches_keep_their_loss(screen, make_cb):
    cb, keep = make_cb(), Keep()
    fit(make(screen), cb, CutMix(p=.6, seed=0), keep, epochs=3)
    same = sum(k[3] == k[4] for k in keep.kept)
    assert len(cb.terms) == len(keep.kept) - same and 0 < same < len(keep.kept)

@pytest.mark.parametrize('make_cb', [IRM, GroupDRO])
def test_adacos_learns_once_a_batch_beside_a_term_of_the_loss(screen, make_cb):
    def scale(*cbs):
        learn = make(screen, bs=16)
        learn.loss_func = learn.model.loss = AdaCos(len(learn.dls.spec.labels))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=[*cbs, One()])
        return learn.model.loss.s.item()
    class One(Callback):
        def after_batch(self):
            if self.training: raise CancelFitException
    torch.manual_seed(0); alone = scale()
    torch.manual_seed(0); assert scale(make_cb()) == alone

@pytest.mark.parametrize('name', DOMAIN_METHODS)
def test_methods_by_name(screen, name):
    cb = domain_callback({'name': name, 'by': 'experiment'})
    fit(make(screen, **(dict(batch_by='pairs', batch_groups=1) if name == 'contrast' else {})), cb, epochs=1)
    assert type(cb) is DOMAIN_METHODS[name] and (name == 'mixstyle' or len(cb.terms) > 0)

def test_a_loss_without_reduction_is_refused(screen):
    learn = make(screen)
    learn.loss_func = lambda p, y: torch.nn.functional.cross_entropy(p, y)
    with pytest.raises(ScreenError, match='The loss has no reduction'): fit(learn, IRM())

@pytest.mark.parametrize('unit', [True, False])
def test_coral_of_a_training_is_that_of_a_loop_in_double_precision(screen, unit):
    "On directions times their length, and as WILDS has it, on the output of the neck"
    class KeepNeck(Callback):
        order, run_valid = DomainLoss.order - 1, False
        def before_fit(self): self.kept, self.at = [], 1 + list(self.learn.dls.spec.vocabs).index('experiment')
        def after_loss(self): self.kept.append((self.coral.emb.detach().double().numpy(), self.xb[self.at].tolist()))
    cb, keep = CORAL(unit=unit), KeepNeck()
    fit(make(screen), cb, keep, epochs=1)
    assert len(cb.terms) == len(keep.kept) > 1
    for term, (x, groups) in zip(cb.terms, keep.kept):
        if unit: x = x/np.linalg.norm(x, axis=1, keepdims=True)
        clouds, total = [x[np.array(groups) == g] for g in sorted(set(groups))], []
        for i, a in enumerate(clouds):
            for b in clouds[i+1:]:
                means, covariances = a.mean(0) - b.mean(0), np.cov(a.T) - np.cov(b.T)
                total.append(((means**2).mean() + (covariances**2).mean())*(x.shape[1] if unit else 1))
        assert abs(term - np.mean(total)) < 1e-5*max(1, np.mean(total))
