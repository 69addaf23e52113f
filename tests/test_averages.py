"Means of many steps (SWA, SWAD): by hand, the window on made-up losses, what is in the model when, BatchNorm, and trainings that are broken off."
import math
import numpy as np, pytest, torch
from fastai.vision.all import Callback, CancelFitException, GradientAccumulation
from helpers import learner, quiet, refused
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError
from rcic_fastai.model.batchnorm import batchnorms
from rcic_fastai.model.model import hold_statistics
from rcic_fastai.train.averages import *
from rcic_fastai.train.domain import EMA
from rcic_fastai.train.recipes import *
from rcic_fastai.workflow import _check_refit


# ---- the window

def by_the_paper(losses, begin, end, tolerance):
    "Algorithm 1 of arXiv 2102.08604, iteration by iteration, from 0"
    first, limit = None, None
    for i in range(len(losses)):
        if limit is None:
            if i - begin + 1 < 0: continue
            row = [losses[i - k] for k in range(begin)]
            if losses[i - begin + 1] == min(row): first, limit = i - begin + 1, tolerance/begin*sum(row)
        elif i - end + 1 >= 0 and limit < min(losses[i - k] for k in range(end)): return first, i - end
    return first, None

@pytest.mark.parametrize('begin, end, tolerance', [(3, 6, 1.3), (1, 1, 1.), (2, 3, 1.1), (4, 2, 1.2), (5, 8, 1.05)])
def test_the_window_is_that_of_the_paper(begin, end, tolerance):
    rng, ended, begun = np.random.default_rng(0), 0, 0
    for _ in range(300):
        n = int(rng.integers(1, 30))
        losses = list(2*np.exp(-np.arange(n)/rng.uniform(1, 6)) + np.maximum(0, np.arange(n) - rng.integers(3, 30))*rng.uniform(0, .3) + rng.uniform(0, .3, n))
        got = swad_window(losses, begin, end, tolerance)
        assert got == by_the_paper(losses, begin, end, tolerance), losses
        begun, ended = begun + (got[0] is not None), ended + (got[1] is not None)
        if got[1] is not None:
            assert got[1] >= got[0] and all(swad_window(losses[:k], begin, end, tolerance)[1] in (None, got[1]) for k in range(1, n))
    assert begun > 30 and ended > 5

@pytest.mark.parametrize('losses, window', [([], (None, None)), ([1.]*3, (0, None)), ([3., 2., 1., .5, .2], (None, None)), ([math.inf]*5, (None, None)), ([5., 1., 2., math.nan, *[9.]*6], (4, None))])
def test_curves_of_a_special_kind(losses, window): assert swad_window(losses) == window


# ---- trainings

class Kept(Callback):
    "The weights after each step, by epoch, and what is in the model in each validation"
    order = 300
    def before_fit(self): self.steps, self.valid, self.trained = [], [], []
    def before_train(self): self.steps.append([])
    def after_step(self): self.steps[-1].append(flat(self.model))
    def after_train(self): self.trained.append(flat(self.model))
    def after_validate(self): self.valid.append(flat(self.model))

def flat(m): return torch.cat([p.detach().double().flatten() for p in m.parameters()])
def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
def mean(steps, first, last): return torch.stack([o for epoch in steps[first:last + 1] for o in epoch]).mean(0)

@pytest.fixture(scope='module')
def dls(screen): return lambda **kwargs: screen_dls(screen, **{**dict(bs=8, augs=None, device='cpu', valid='HUVEC-03', seed=0), **kwargs})

def trained(dls, *cbs, epochs=4, lr=3e-3, losses=None, **kwargs):
    "A fit; with `losses`, those are what the validations measure"
    learn, kept = learner(dls(**kwargs), seed=0), Kept()
    class Said(Callback):
        order = -100       # before a mean reads it
        def after_validate(self):
            if losses is not None: self.learn.recorder.loss.total, self.learn.recorder.loss.count = torch.tensor(losses[self.epoch]), 1
    torch.manual_seed(0)
    quiet(learn, lambda: learn.fit(epochs, lr, cbs=[kept, Said(), *cbs]))
    return learn, kept

@pytest.mark.parametrize('after, first', [(0., 0), (.5, 2), (.75, 3), (.9, 3)])
def test_swa_is_the_mean_of_all_steps_from_an_epoch_on(dls, after, first):
    swa = SWA(after)
    learn, kept = trained(dls, swa)
    want = mean(kept.steps, first, 3)
    close(flat(learn.model), want)
    close(kept.valid[3], want)
    for i in range(3): assert torch.equal(kept.valid[i], kept.trained[i])
    assert swa.averaged == (first, sum(map(len, kept.steps[first:]))) and not torch.allclose(want, kept.trained[3], atol=1e-4)

CURVES = dict(rises=([3., 2., 2.5, 2.6, 9., 9., 9.5, 9.6, 1.], (1, 3)), goes_on=([3., 2., 2.5, 2.6, 2.2, 2.4, 1.], (1, 6)), never=([5., 4., 3., 2.], (3, 3)), too_short=([1.], (0, 0)))

@pytest.mark.parametrize('curve', CURVES)
def test_swad_is_the_mean_of_its_window(dls, curve):
    losses, (first, last) = CURVES[curve]
    swad = SWAD(begin=2, end=3, tolerance=1.2)
    learn, kept = trained(dls, swad, epochs=len(losses), losses=losses)
    want = mean(kept.steps, first, last)
    close(flat(learn.model), want)
    close(kept.valid[-1], want)
    assert swad.losses == pytest.approx(losses[:-1]) and swad.averaged[0] == first and not swad.parts

def test_the_means_that_are_kept_are_few(dls):
    "While nothing has begun, and in the valley"
    class Count(Callback):
        order = 400
        def before_fit(self): self.n = []
        def after_train(self): self.n.append(len(self.swad.parts))
    for losses, most in (([9. - i/2 for i in range(9)], 3), ([1.]*9, 4)):
        count = Count()
        trained(dls, SWAD(begin=3, end=3), count, epochs=9, losses=losses)
        assert max(count.n) <= most, count.n

def test_losses_are_those_of_the_table(dls):
    swad = SWAD(1, 1)
    learn, _ = trained(dls, swad)
    assert swad.losses == pytest.approx([row[1] for row in learn.recorder.values][:3], abs=1e-6)

def test_batchnorm_is_measured_again(dls):
    learn, kept = trained(dls, SWA(.5))
    model, found = learn.model.eval(), {}
    bn = batchnorms(model)[0]
    hook = bn.register_forward_pre_hook(lambda m, x: found.setdefault('x', []).append(x[0].detach()))
    with torch.no_grad():
        for b in learn.dls.train: model(*b[:-1])
    hook.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in found['x']]).mean(0)
    torch.testing.assert_close(bn.running_mean, means, rtol=1e-4, atol=1e-5)      # nothing is drawn in these batches but their order, and the layer before has no BatchNorm
    other, _ = trained(dls, SWA(.5))
    assert all(torch.equal(v, other.model.state_dict()[k]) for k, v in model.state_dict().items())

def test_statistics_that_are_held_stay(dls):
    learn = learner(dls(), seed=0)
    hold_statistics(learn.model, ['stem', 'body'])
    was = [m.running_mean.clone() for m in batchnorms(learn.model.body)]
    quiet(learn, lambda: learn.fit(2, 3e-3, cbs=SWA(.5)))
    assert all(torch.equal(a, m.running_mean) for a, m in zip(was, batchnorms(learn.model.body)))
    assert all((m.running_mean != 0).any() for m in batchnorms(learn.model.neck))

def test_steps_are_counted_not_batches(dls):
    learn, kept = trained(dls, SWA(0.), GradientAccumulation(16))
    close(flat(learn.model), mean(kept.steps, 0, 3))
    assert 0 < len(sum(kept.steps, [])) < 4*len(learn.dls.train)

class Stop(Callback):
    def __init__(self, event, what, at, order=0): self.what, self.at, self.order = what, at, order; setattr(self, event, self.go)
    def go(self):
        if self.epoch == self.at: raise self.what

def test_a_canceled_fit_ends_with_the_mean(dls):
    learn, kept = trained(dls, SWA(.25), Stop('after_epoch', CancelFitException, 2))
    assert len(kept.steps) == 3
    close(flat(learn.model), mean(kept.steps, 1, 2))

@pytest.mark.parametrize('at', [1, 3])
def test_after_ctrl_c_in_a_validation_the_model_has_its_training_weights(dls, at):
    learn, kept = learner(dls(), seed=0), Kept()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.fit(4, 3e-3, cbs=[kept, SWA(.5), Stop('after_validate', KeyboardInterrupt, at, 500)]))
    assert torch.equal(flat(learn.model), kept.trained[at]) and '_with_events' not in vars(learn)

def test_a_validation_outside_a_fit_reads_the_model_as_it_is(dls):
    learn, _ = trained(dls)
    learn.add_cb(SWA(.5))
    was = flat(learn.model)
    quiet(learn, learn.validate)
    assert torch.equal(flat(learn.model), was)

def test_two_means_cannot_stay_in_one_model(dls):
    for cbs, said in (([EMA(.9), SWA(.5)], 'SWA and EMA'), ([SWAD(), EMA(.9)], 'SWAD and EMA')):
        learn = learner(dls(), seed=0)
        was = flat(learn.model)
        with pytest.raises(ScreenError, match=f'{said} each leave a mean'): quiet(learn, lambda: learn.fit(2, 3e-3, cbs=cbs))
        assert torch.equal(flat(learn.model), was)


# ---- recipes

def stage(*callbacks, epochs=3, **kwargs): return Recipe('x', [Stage('x', epochs, 3e-3, callbacks=callbacks, **kwargs)])

def test_a_stage_that_stops_earlier_is_measured_where_it_stops(dls):
    learn, kept = learner(dls(), seed=0), Kept()
    quiet(learn, lambda: learn.fit_recipe(stage(dict(name='swa', after=.5), epochs=6, stop=4), cbs=kept))
    assert len(kept.steps) == 4
    close(kept.valid[3], mean(kept.steps, 2, 3))
    close(flat(learn.model), kept.valid[3])

def test_what_a_recipe_cannot_have(dls):
    refused(lambda: check_recipe(stage('swa', keep_best='accuracy')), "'swa'", 'keep_best')
    refused(lambda: check_recipe(stage('swad', patience=2)), "'swad'", 'patience')
    refused(lambda: check_recipe(stage('swad', 'swa')), 'swa and swad')
    for other in ('ema', 'mean_teacher'):
        for mean in ('swa', 'swad'): refused(lambda: check_recipe(stage(other, mean)), f'{mean} and {other}', 'one mean')
    refused(lambda: check_recipe(stage('mean_teacher', 'ema')), 'ema and mean_teacher')
    check_recipe(stage('ema', keep_best='accuracy'))
    refused(lambda: check_recipe(stage(dict(name='swa', after=1.))), 'after 1.0 of the epochs')
    refused(lambda: check_recipe(stage(dict(name='swad', begin=0))), 'begin=0')
    refused(lambda: check_recipe(stage(dict(name='swad', begin=1.5))), 'begin=1.5', 'whole number')
    nothing = dls(valid='none')
    refused(lambda: check_known(stage('swad'), nothing), 'none is held out', 'take swa')
    with pytest.raises(ScreenError, match='none is held out'): learner(nothing).fit_recipe(stage('swad'))
    refused(lambda: _check_refit(dict(cell_types=None, valid=''), stage('swad')), 'swad', 'refit')
    check_known(stage('swa'), nothing)

def test_without_anything_held_out_swa_ends_with_the_mean(dls):
    learn, kept = learner(dls(valid='none'), seed=0), Kept()
    quiet(learn, lambda: learn.fit_recipe(stage(dict(name='swa', after=.3)), cbs=kept))
    close(flat(learn.model), mean(kept.steps, 0, 2))

class BreakOff(Callback):
    order, at = 2000, None
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('what, at', [('swa', (1, 1)), ('swad', (1, 1)), ('swad', (4, 0)), ('later', (4, 0))])
def test_a_training_that_is_broken_off_ends_the_same(screen, tmp_path, what, at):
    recipe = stage(dict(swa=dict(name='swa', after=.2), swad=dict(name='swad', begin=1, end=2, tolerance=1.), later=dict(name='swad', begin=4))[what], epochs=5, cutmix=.5)
    def new():
        learn = learner(screen_dls(screen, bs=8, device='cpu', valid='HUVEC-03', seed=0), seed=0)
        learn.add_cb(BreakOff())
        return learn
    def run(**kwargs):
        learn = new()
        quiet(learn, lambda: learn.fit_recipe(recipe, **kwargs))
        return learn
    whole = run()
    BreakOff.at = at
    try:
        with pytest.raises(KeyboardInterrupt): run(folder=tmp_path/'run')
    finally: BreakOff.at = None
    again = run(folder=tmp_path/'run', resume=True)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert str(whole.history) == str(again.history)
    last = run(folder=tmp_path/'run', resume=True)        # all epochs are done, and only the end is left
    assert all(torch.equal(v, last.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
