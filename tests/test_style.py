"DSU and adversarial style: what moves, how far, and what stays as it was; contrast with earlier batches and with centroids."
import numpy as np, pytest, torch
from fastai.vision.all import Callback, CancelBatchException
from torch.nn import functional as F
from helpers import learner, quiet, refused
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError
from rcic_fastai.train.cutmix import CutMix
from rcic_fastai.train.domain import Contrast, ControlBatches, group_centroids, contrast
from rcic_fastai.train.recipes import Recipe, Stage, check_recipe, recipe_from_dict
from rcic_fastai.train.style import DSU, STYLES, AdversarialStyle, style_noise

BOTH = pytest.mark.parametrize('cb', [DSU, AdversarialStyle])

def loaders(screen, **kwargs): return screen_dls(screen, valid='HUVEC-03', **{**dict(bs=8, augs=None, device='cpu', seed=0), **kwargs})

def test_means_and_spreads_move_by_so_many_deviations_of_the_batch():
    g = torch.Generator().manual_seed(0)
    x, a, b = torch.rand(5, 3, 6, 6, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64), torch.rand(5, 3, generator=g, dtype=torch.float64)
    y = style_noise(x, a, b, eps=0.)
    mu, sd = x.mean((2, 3)), x.std((2, 3))
    assert torch.allclose(y.mean((2, 3)), mu + a*mu.std(0), atol=1e-12)
    assert torch.allclose(y.std((2, 3)), sd + b*sd.std(0), atol=1e-12)

@BOTH
@pytest.mark.parametrize('sites', [1, 2])
def test_in_training_only_and_nothing_is_left(screen, cb, sites):
    learn, style = learner(loaders(screen, sites=sites)), cb(p=1., seed=0)
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=style))
    assert np.isfinite(learn.recorder.losses).all() and not style.hooks
    assert not any(m._forward_hooks for m in learn.model.modules())

@BOTH
def test_the_sites_of_a_well_move_together(screen, cb):
    learn, style, steps = learner(loaders(screen, sites=2, bs=4)), cb(p=1., seed=0), []
    find = style.drawn
    style.drawn = lambda x: steps.append(find(x)) or steps[-1]
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=style))
    assert steps
    for e in steps: assert torch.equal(e[:, ::2], e[:, 1::2]) and not torch.equal(e[:, 0], e[:, 2])

def passed(learn, cbs):
    "Return the losses of the first batch, before any term is added, and BatchNorm's memory and the loss's own state after it"
    seen = []
    class See(Callback):
        run_valid, order = False, DSU.order - .1
        def after_loss(self):
            seen.append(self.loss.item())
            raise CancelBatchException
    quiet(learn, lambda: learn.fit(1, 0., cbs=[*cbs, See()]))
    memory = {k: v.clone() for k, v in learn.model.state_dict().items() if 'running' in k or 'tracked' in k}
    return seen, memory

def test_the_search_raises_the_loss_and_leaves_statistics_alone(screen):
    "BatchNorm remembers one pass per batch: the same number of them as without the search"
    res = {}
    for name, cb in dict(none=DSU(p=0.), drawn=DSU(p=1., seed=0), worst=AdversarialStyle(p=1., seed=0)).items():
        learn = learner(loaders(screen), seed=0)
        quiet(learn, lambda: learn.fit(2, 3e-3))
        res[name] = passed(learn, [cb])
    assert np.mean(res['none'][0]) < np.mean(res['worst'][0]) and np.mean(res['drawn'][0]) < np.mean(res['worst'][0])
    counts = {n: [v.item() for k, v in m.items() if 'tracked' in k] for n, (_, m) in res.items()}
    assert counts['none'] == counts['worst'] and max(counts['none']) > 0

def test_a_scale_that_follows_training_does_not_follow_the_search(screen):
    learn, style = learner(loaders(screen), loss='adacos'), AdversarialStyle(p=1., seed=0)
    scales = []
    class See(Callback):
        run_valid, order = False, DSU.order + .1
        def before_batch(self): scales.append((self.learn.loss_func.s.item(), self.learn.loss_func.training))
        def after_pred(self): raise CancelBatchException
    quiet(learn, lambda: learn.fit(1, 0., cbs=[style, See()]))
    assert len({s for s, _ in scales}) == 1 and all(t for _, t in scales)

def test_the_term_pulls_towards_the_plain_embedding(screen):
    "Its weight is `align`; the loss without it is the same"
    losses = {}
    for align in (0., 2.):
        learn, style, seen = learner(loaders(screen), seed=0), AdversarialStyle(p=1., align=align, seed=0), []
        class See(Callback):
            run_valid, order = False, DSU.order + .1
            def after_loss(self):
                apart = 1 - F.cosine_similarity(style.emb, style.plain, dim=1).mean()
                seen.append((self.loss.item(), apart.item(), style.plain.requires_grad))
                raise CancelBatchException
        torch.manual_seed(0)     # of dropout
        quiet(learn, lambda: learn.fit(1, 0., cbs=[style, See()]))
        losses[align] = seen
    for (a, apart, _), (b, same, grad) in zip(losses[0.], losses[2.]):
        assert b == pytest.approx(a + 2*apart, rel=1e-4) and same == pytest.approx(apart, rel=1e-4) and apart > 0 and not grad

@BOTH
def test_with_mixed_batches_and_with_controls(screen, with_controls, cb):
    from rcic_fastai.screen.open import open_screen
    learn = learner(loaders(screen))
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=[CutMix(p=1., seed=0), cb(p=1., seed=0)]))
    assert np.isfinite(learn.recorder.losses).all()
    learn = learner(screen_dls(open_screen(with_controls), valid='none', bs=4, batch_by='experiment', augs=None, device='cpu'))
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=[cb(p=1., seed=0), ControlBatches(2, seed=0)]))
    assert np.isfinite(learn.recorder.losses).all()

def test_an_interrupted_search_leaves_no_hook(screen):
    learn, style = learner(loaders(screen)), AdversarialStyle(p=1., seed=0)
    def stop(*args): raise KeyboardInterrupt
    learn.loss_func.forward = stop
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.fit(1, 1e-3, cbs=style))
    assert not any(m._forward_hooks for m in learn.model.modules())
    assert all(m.track_running_stats for m in learn.model.modules() if hasattr(m, 'track_running_stats'))

def test_by_name_and_refused():
    for name, cls in STYLES.items():
        r = recipe_from_dict(Recipe('r', [Stage('all', 1, 1e-3, callbacks=[{'name': name, 'p': .3}])]).to_dict())
        assert check_recipe(r).stages[0].callbacks[0]['p'] == .3
    for odd, words in (({'name': 'dsu', 'p': 2}, 'p from 0 to 1'), ({'name': 'dsu', 'step': 1.}, 'step'), ({'name': 'adversarial_style', 'align': -1.}, '0 or more'), ({'name': 'contrast', 'to': 'means'}, 'centroids'),
                       ({'name': 'contrast', 'memory': -1}, '0 or more')):
        refused(lambda: check_recipe(Recipe('r', [Stage('all', 1, 1e-3, callbacks=[odd])])), words)

def test_centroids_are_means_of_directions():
    g = torch.Generator().manual_seed(0)
    z, y, e = torch.randn(40, 6, generator=g, dtype=torch.float64), torch.randint(4, (40,), generator=g), torch.randint(3, (40,), generator=g)
    center, labels, groups = group_centroids(z, y, e)
    assert len(center) == len({*zip(y.tolist(), e.tolist())})
    for c, l, k in zip(center, labels, groups): assert torch.allclose(c, F.normalize(z[(y == l) & (e == k)], dim=1).mean(0))

def test_earlier_batches_count_as_if_they_were_in_the_batch():
    "The term of a batch and a memory is that of all of them, summed over the samples of the batch alone"
    g = torch.Generator().manual_seed(0)
    z, y, e = torch.randn(12, 5, generator=g, dtype=torch.float64), torch.arange(12) % 3, torch.arange(12) // 6
    cb = Contrast(memory=8)
    cb._begin()
    first, second = [tuple(o[s] for o in (z, y, e)) for s in (slice(0, 6), slice(6, 12))]
    assert all(torch.equal(a, b) for a, b in zip(cb.among(first), first))
    several = cb.among(second)
    assert [len(o) for o in several] == [12]*3 and [len(o) for o in cb.kept] == [8]*3
    got = contrast(*second, among=several)
    u = F.normalize(z, dim=1).numpy()
    def of(i):
        positive = [j for j in range(12) if y[j] == y[i] and e[j] != e[i]]
        other = [j for j in range(12) if y[j] != y[i]]
        total = sum(np.exp(u[i] @ u[a]/.1) for a in positive + other)
        return -np.mean([np.log(np.exp(u[i] @ u[p]/.1)/total) for p in positive])
    assert got.item() == pytest.approx(np.mean([of(i) for i in range(6, 12)]), rel=1e-9)

def test_equal_pictures_have_no_style_to_move(screen):
    "Also where a bag of channels is read one by one: what differs between stains is none"
    for stem in ('tile', 'bag'):
        learn = learner(loaders(screen), stem=stem)
        x, *more = learn.dls.one_batch()
        model, maps = learn.model.train(), []
        for p in (0., 1.):
            style = DSU(p=p, seed=0)
            style.learn = learn
            learn.xb = (x[:1].repeat(len(x), 1, 1, 1), *more[:-1])
            style.before_fit()
            style.before_batch()
            seen = style.places[-1].register_forward_hook(lambda m, i, o: maps.append(o.detach()))
            with torch.no_grad(): model(*learn.xb)
            seen.remove()
            style.after_pred()
        plain, moved = maps[-2:]
        assert style.channels == (6 if stem == 'bag' else 1)
        assert (moved - plain).norm()/plain.norm() < .15, stem            # the floor of the variances; .7 where stains are compared with each other

def test_features_that_stand_last_are_refused_before_training(screen):
    from rcic_fastai.train.domain import MixStyle
    from rcic_fastai.train.learner import screen_learner
    learn = learner(loaders(screen), lambda dls, arch, **kw: screen_learner(dls, 'test_mambaout', **kw))
    for cb in (DSU(), AdversarialStyle(), MixStyle()):
        with pytest.raises(ScreenError, match='return features last: .* leave the callback out'): quiet(learn, lambda: learn.fit(1, 0., cbs=cb))

def test_maps_of_one_place_stay(screen):
    x = torch.rand(4, 3, 1, 1)
    assert torch.equal(style_noise(x, torch.ones(4, 3), torch.ones(4, 3)), x)
    from rcic_fastai.train.domain import mix_style
    assert torch.equal(mix_style(x, torch.tensor([1, 0, 3, 2]), torch.full((4,), .5)), x)

@pytest.mark.parametrize('cb', [DSU, AdversarialStyle])
def test_a_training_whose_last_maps_are_of_one_place(screen, cb):
    from rcic_fastai.train.learner import screen_learner
    learn = screen_learner(loaders(screen, size=32), 'efficientnet-lite0', pretrained=None, emb_dim=16)
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=cb(p=1., depth=1., seed=0)))
    assert np.isfinite(learn.recorder.losses).all()

def test_the_search_has_the_precision_of_the_training(screen):
    "Which begins after it"
    from fastai.callback.fp16 import MixedPrecision
    class Bf16(MixedPrecision):
        name = 'mixed_precision'
        def before_fit(self):
            self.autocast, self.scaler = torch.autocast('cpu', dtype=torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False)
            self.learn.scaler = self.scaler
        def before_batch(self): self.autocast.__enter__()
        def after_loss(self): self.autocast.__exit__(None, None, None)
        def before_backward(self): pass
        def before_step(self): pass
        def after_step(self): pass
        def after_fit(self): pass
    learn, style, seen = learner(loaders(screen)), AdversarialStyle(p=1., seed=0), []
    learn.model.neck.register_forward_hook(lambda m, given, e: seen.append(torch.is_autocast_enabled('cpu')))
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=[style, Bf16()]))
    assert seen and all(seen[:2])

@pytest.mark.parametrize('enabled', [True, False])
def test_the_searched_loss_is_scaled_as_that_of_the_training(enabled):
    "Where half precision scales it"
    from types import SimpleNamespace
    style, scaler = AdversarialStyle(), SimpleNamespace(is_enabled=lambda: enabled, get_scale=lambda: 8.)
    style.learn = SimpleNamespace(mixed_precision=SimpleNamespace(scaler=scaler))
    assert style.scaled(2.) == (16. if enabled else 2.)
    style.learn = SimpleNamespace()
    assert style.scaled(2.) == 2.
