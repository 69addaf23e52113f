"RICAP and Blend: shares are those of the pixels, and labels and metadata have the same; nothing is left behind"
import numpy as np, pytest, torch, torch.nn.functional as F
import fastai.callback.progress  # brings learn.no_bar
from torch import nn
from test_cutmix import B, Model, batch, by_hand, fit, learner
from rcic_fastai.core import ScreenError
from rcic_fastai.model.losses import AdaCos, ArcFace
from rcic_fastai.model.model import create_screen_model
from rcic_fastai.train.cutmix import BatchMix, CutMix
from rcic_fastai.train.mixing import MIXERS, RICAP, Blend, four_boxes, grid_boxes, many_loss, mix_callback

CALLBACKS = (lambda: RICAP(alpha=2., seed=3), lambda: Blend(.25, seed=3), lambda: Blend(.25, how='mix', seed=3))

def shares_of(cb): return [1 - sum(cb.shares), *cb.shares]
def partners_of(cb): return [torch.arange(B), *cb.partners]

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('s', (None, 2))
@pytest.mark.parametrize('make', (lambda n: RICAP(seed=n), lambda n: Blend(.2, seed=n)))
def test_shares_are_those_of_the_pixels(seed, s, make):
    "Every pixel of picture i is i, so that counting tells whose pixels there are"
    cb, b = make(seed), batch(s=s)
    x = by_hand(cb, b).xb[0]
    for i in range(B):
        expected = np.zeros(B)
        for p, share in zip(partners_of(cb), shares_of(cb)): expected[int(p[i])] += share
        got = torch.bincount(x[i].flatten().long(), minlength=B).double().numpy()/x[i].numel()
        assert np.abs(got - expected).max() < 1e-12 and abs(expected.sum() - 1) < 1e-12
    assert torch.equal(b[0], batch(s=s)[0])                              # the batch itself was not written to
    if s: assert torch.equal(x[:, 0], x[:, 1])

@pytest.mark.parametrize('make', CALLBACKS)
@pytest.mark.parametrize('reduction', ('mean', 'sum'))
def test_loss_by_hand_in_double_precision(make, reduction):
    cb, b, loss = make(), batch(), ArcFace(reduction=reduction)
    learn = by_hand(cb, b, Model(loss))
    total = sum(share*loss(learn.pred.double()[i:i+1], b[3][p][i:i+1]).item() for p, share in zip(partners_of(cb), shares_of(cb)) for i in range(B))
    assert learn.loss.item() == pytest.approx(total/(B if reduction == 'mean' else 1), rel=1e-6)
    assert learn.loss_grad.requires_grad and loss.reduction == reduction

@pytest.mark.parametrize('make', CALLBACKS)
def test_gradients_are_those_of_the_weighted_sum(make):
    cb, b = make(), batch()
    learn = by_hand(cb, b)
    w = learn.model.w
    got = torch.autograd.grad(learn.loss_grad, w, retain_graph=True)[0]
    ref = sum(share*torch.autograd.grad(learn.model.loss(learn.pred, b[3][p]), w, retain_graph=True)[0] for p, share in zip(partners_of(cb), shares_of(cb)))
    assert torch.allclose(got, ref, atol=1e-6)

@pytest.mark.parametrize('make', CALLBACKS)
def test_soft_labels_are_mixed_as_numbers(make):
    x, a, p, y = batch()
    onehot, cb = F.one_hot(y, B).float(), make()
    learn = by_hand(cb, (x, a, p, onehot), loss_func=nn.CrossEntropyLoss())
    ref = sum(share*onehot[q] for q, share in zip(partners_of(cb), shares_of(cb)))
    assert torch.allclose(learn.yb[0], ref, atol=1e-6) and torch.allclose(learn.yb[0].sum(1), torch.ones(B))

def real_model(dropout=0.):
    torch.manual_seed(0)
    return create_screen_model('resnet10t', B, metadata=dict(cell_type=20), inputs=('cell_type', 'plate'), emb_dim=16, loss='arcface')

@pytest.mark.parametrize('make', CALLBACKS)
def test_metadata_of_the_model_have_the_shares_of_the_pixels(make):
    model, cb, b = real_model().eval(), make(), batch()
    b = (b[0]/8, *b[1:])
    learn = by_hand(cb, b, model)
    e = model.metadata.encode('cell_type', b[1]).double()
    e = sum(share*e[p] for p, share in zip(partners_of(cb), shares_of(cb)))
    ref = model.classifier(model.neck(torch.cat([model.pooled(learn.xb[0]), e.float()], 1)))
    assert torch.allclose(learn.pred, ref, atol=1e-6)
    plain = model.classifier(model.neck(torch.cat([model.pooled(learn.xb[0]), model.metadata.encode('cell_type', b[1])], 1)))
    assert not torch.allclose(learn.pred, plain, atol=1e-5)

def test_another_batch_is_not_mixed_even_after_an_error():
    model, b = real_model().eval(), batch()
    cb = RICAP(alpha=2., seed=0)
    learn = learner(model, b, cb)
    learn.training = True
    learn._split(b); learn('before_batch')                               # … and the model never ran
    assert len(model.metadata._forward_hooks) == 1
    known = dict(cell_type=b[1].clone())
    assert torch.equal(model.metadata(known, B), model.metadata.encode('cell_type', b[1]))
    learn('after_fit')
    assert len(model.metadata._forward_hooks) == 0

@pytest.mark.parametrize('make', CALLBACKS)
def test_a_fit_leaves_nothing_behind_and_validates_unmixed(make):
    model, b = Model(), batch()
    learn = learner(model, b, make())
    fit(learn, 2)
    assert [torch.equal(i[0], b[0]) for t, i in model.seen] == [False, True]*2 and learn.loss_func is model.loss

def test_adacos_learns_once_a_batch_and_from_the_own_labels():
    model, b = Model(AdaCos(B)), batch()
    learn = by_hand(Blend(.25, seed=0), b, model)
    alone = AdaCos(B); alone(learn.pred, b[3])
    assert model.loss.s.item() == alone.s.item()

def test_a_batch_is_mixed_once():
    b = batch()
    first, second = CutMix(seed=1), RICAP(seed=1)
    by_hand([first, second], b)
    assert first.lam is not None and second.lam is None

def test_zero_and_noise_leave_labels_and_metadata_alone():
    for how in ('zero', 'noise'):
        cb, b = Blend(.25, how=how, seed=2), batch()
        learn = by_hand(cb, b)
        assert cb.lam is None and learn.loss.item() == learn.model.loss(learn.pred, b[3]).item()
        changed = (learn.xb[0] != b[0]).flatten(1).any(1)
        assert changed[1:].all() and isinstance(cb, BatchMix)

@pytest.mark.parametrize('make', (RICAP, Blend))
def test_seeds(make):
    a, b, c = (by_hand(make(seed=s), batch()).xb[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    by_hand(make(seed=1), batch())
    assert np.array_equal(state[0], np.random.get_state()[1]) and torch.equal(state[1], torch.get_rng_state())

def test_the_point_has_the_wanted_distribution():
    "Distance of the point from an edge is Beta(.3, .3) of the side: its variance is 1/(4·(2·.3 + 1))"
    rng = np.random.default_rng(0)
    y = np.array([min(b[1] for b in four_boxes(1000, 10, .3, rng) if b[0] == 0) for _ in range(4000)])/1000
    assert abs(y.mean() - .5) < .02 and abs(y.var() - 1/(4*1.6)) < .006

@pytest.mark.parametrize('size', (.05, .1, .3, .5, .6, 1.))
def test_a_grid_covers_the_picture_once(size):
    seen = np.zeros((37, 50), int)
    for y1, y2, x1, x2 in grid_boxes(37, 50, size):
        assert y1 < y2 and x1 < x2
        seen[y1:y2, x1:x2] += 1
    assert (seen == 1).all()

def test_share_of_changed_patches():
    "1−λ with λ uniform from .5 to 1"
    cb = Blend(.1, seed=0)
    cb.rng = np.random.default_rng(0)
    n = [len(cb.mix_many(torch.zeros(2, 1, 40, 40))[1]) for _ in range(1000)]
    assert max(n) <= 50 and abs(np.mean(n) - 24.5) < 1

def test_p():
    b = batch()
    mixed = [not torch.equal(by_hand(RICAP(p=.3, alpha=5., seed=s), b).xb[0], b[0]) for s in range(200)]
    assert .2 < np.mean(mixed) < .4

@pytest.mark.parametrize('name', MIXERS)
def test_by_name(name):
    cb = mix_callback({'name': name, 'p': .5}, seed=7)
    assert type(cb) is MIXERS[name] and (cb.p, cb.seed) == (.5, 7)
    with pytest.raises(ScreenError, match='has no argument zeta'): mix_callback({'name': name, 'zeta': 1})

def test_loss_of_no_partner_is_the_loss():
    pred, y = torch.rand(B, B), torch.arange(B)
    assert torch.equal(many_loss(F.cross_entropy, pred, (y,), [], []), F.cross_entropy(pred, y))
