"Each loss against a reference in float64 loops; its conventions, its state, its corner cases"
import copy, json, math, pickle
import pytest, torch
import fastai.callback.progress  # brings learn.no_bar
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.layers import NoneReduce
from fastai.learner import Learner
from rcic_fastai.model.losses import (LOSSES, AdaCos, ArcFace, CosFace, CrossEntropy, MixLoss, SoftmaxLoss, TripletLoss, loss_from_config)
from rcic_fastai.core import ScreenError


# --- references: plain Python, one item and one class at a time -------------------------------------------------

def cross_entropy(logits, target):
    "target: the wanted probability of each class"
    m = max(float(l.detach()) for l in logits)
    log_z = m + sum((l-m).exp() for l in logits).log()
    return sum(t*(log_z-l) for l,t in zip(logits, target) if t)

def one_hot(y, n, eps=0.): return [(1-eps)*(i == y) + eps/n for i in range(n)]

def ref_softmax(cos, y, s, eps=0.):
    return [cross_entropy([s*c for c in row], one_hot(t, len(row), eps)) for row,t in zip(cos, y)]

def ref_cosface(cos, y, s, m, eps=0.):
    moved = lambda row, t: [s*(c - m*(j == t)) for j,c in enumerate(row)]
    return [cross_entropy(moved(row, t), one_hot(t, len(row), eps)) for row,t in zip(cos, y)]

def ref_arcface(cos, y, s, m, eps=0.):
    losses = []
    for row,t in zip(cos, y):
        theta = row[t].acos()
        moved = (theta+m).cos() if float(theta.detach()) < math.pi-m else row[t] - m*math.sin(m)
        losses.append(cross_entropy([s*(moved if j == t else c) for j,c in enumerate(row)], one_hot(t, len(row), eps)))
    return losses

def ref_adacos_scale(cos, y, s):
    "The new scale, in floats"
    b = sum(sum(math.exp(s*float(c.detach())) for j,c in enumerate(row) if j != t) for row,t in zip(cos, y))/len(cos)
    theta = sorted(math.acos(float(row[t].detach())) for row,t in zip(cos, y))[(len(cos)-1)//2]
    return math.log(b)/math.cos(min(math.pi/4, theta))

MADE = dict(
    softmax=(lambda: SoftmaxLoss(12.), lambda c, y: ref_softmax(c, y, 12.)),
    smooth=(lambda: SoftmaxLoss(12., label_smoothing=.1), lambda c, y: ref_softmax(c, y, 12., .1)),
    cosface=(lambda: CosFace(), lambda c, y: ref_cosface(c, y, 30., .5)),
    arcface=(lambda: ArcFace(), lambda c, y: ref_arcface(c, y, 30., .5)),
    arcface_wide=(lambda: ArcFace(8., 1.2), lambda c, y: ref_arcface(c, y, 8., 1.2)),
    fixed=(lambda: AdaCos(7, dynamic=False), lambda c, y: ref_softmax(c, y, 2**.5*math.log(6))),
    adacos=(lambda: AdaCos(7), lambda c, y: ref_softmax(c, y, ref_adacos_scale(c, y, 2**.5*math.log(6)))),
    cosface_smooth=(lambda: CosFace(label_smoothing=.1), lambda c, y: ref_cosface(c, y, 30., .5, .1)),
    arcface_smooth=(lambda: ArcFace(label_smoothing=.2), lambda c, y: ref_arcface(c, y, 30., .5, .2)),
    adacos_smooth=(lambda: AdaCos(7, label_smoothing=.1),
                   lambda c, y: ref_softmax(c, y, ref_adacos_scale(c, y, 2**.5*math.log(6)), .1)),
    plain=(lambda: CrossEntropy(), lambda c, y: ref_softmax(c, y, 1.)),
    plain_smooth=(lambda: CrossEntropy(.1), lambda c, y: ref_softmax(c, y, 1., .1)),
    mix=(lambda: MixLoss(SoftmaxLoss(12.), ArcFace(), (.8, .1)),
         lambda c, y: [.8*a + .1*b for a,b in zip(ref_softmax(c, y, 12.), ref_arcface(c, y, 30., .5))]))

def batch(b=5, k=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    cos = (torch.rand(b, k, generator=g, dtype=torch.float64)*1.98 - .99).to(dtype).requires_grad_()
    return cos, torch.randint(0, k, (b,), generator=g)

@pytest.mark.parametrize('name', MADE)
@pytest.mark.parametrize('b', (1, 2, 5, 8))
@pytest.mark.parametrize('seed', range(4))
def test_value_and_gradient(name, b, seed):
    make,ref = MADE[name]
    cos,y = batch(b, seed=seed)
    mine,ours = cos.detach().clone().requires_grad_(),make().double()
    expected = sum(ref(cos, y.tolist()))/b
    got = ours(mine, y)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward(); got.backward()
    assert torch.allclose(mine.grad, cos.grad, rtol=1e-5, atol=1e-8)

@pytest.mark.parametrize('name', MADE)
def test_every_angle(name):
    "The right class at every angle, both sides of ArcFace's turning point, for one item at a time"
    make,ref = MADE[name]
    for theta in torch.linspace(.05, math.pi-.05, 23, dtype=torch.float64):
        cos = torch.tensor([[.1, -.2, .3, 0, .05, -.4, .2]], dtype=torch.float64)
        cos[0, 2] = theta.cos()
        got = make().double()(cos.requires_grad_(), torch.tensor([2]))
        assert got.item() == pytest.approx(ref(cos, [2])[0].item(), rel=1e-6)

@pytest.mark.parametrize('name', MADE)
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_half_precision(name, dtype):
    "Half cosines are computed on in 32 bits: the loss is that of the rounded cosines, not a rounded loss"
    make,ref = MADE[name]
    cos,y = batch(dtype=dtype)
    got = make()(cos, y)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx((sum(ref(cos.detach().double(), y.tolist()))/5).item(), rel=1e-5)
    got.backward()
    assert cos.grad.dtype == dtype and cos.grad.isfinite().all()
    with torch.autocast('cpu', dtype=torch.bfloat16): assert make()(batch()[0].float(), y).dtype == torch.float32

@pytest.mark.parametrize('name', MADE)
@pytest.mark.parametrize('lam', (0., .3, 1.))
def test_mixing_labels(name, lam):
    "Two calls on the same cosines, weighted, as mixing callbacks make them"
    make,ref = MADE[name]
    cos,y = batch()
    loss,other = make().double(),y.flip(0)
    with NoneReduce(loss) as lf: a,b = lf(cos, y),lf(cos, other)
    assert a.shape == b.shape == (5,)
    if name.startswith('adacos'):                      # the second call does not change the scale again
        s = ref_adacos_scale(cos, y.tolist(), 2**.5*math.log(6))
        ref = lambda c, y: ref_softmax(c, y, s, loss.label_smoothing)
    expected = [lam*p + (1-lam)*q for p,q in zip(ref(cos, y.tolist()), ref(cos, other.tolist()))]
    assert torch.lerp(b, a, lam).tolist() == pytest.approx([e.item() for e in expected], rel=1e-6)
    assert loss.reduction == 'mean'

@pytest.mark.parametrize('name', MADE)
def test_reductions(name):
    cos,y = batch()
    losses = {}
    for r in ('mean', 'sum', 'none'):
        loss = MADE[name][0](); loss.reduction = r
        losses[r] = loss(cos.detach(), y)
    assert losses['none'].shape == (5,)
    assert losses['sum'].item() == pytest.approx(losses['none'].sum().item(), rel=1e-6)
    assert losses['mean'].item() == pytest.approx(losses['none'].mean().item(), rel=1e-6)

@pytest.mark.parametrize('name', MADE)
def test_fastai_conventions(name):
    loss = MADE[name][0]()
    cos,y = batch()
    assert loss.y_int is True and loss.reduction == 'mean'
    p = loss.activation(cos)
    assert torch.allclose(p.sum(1), torch.ones(5).to(p)) and (p.argmax(1) == loss.decodes(cos)).all()
    assert torch.allclose(p.double().log(), (cos*loss.s).log_softmax(1), atol=1e-5)
    assert (loss.decodes(cos) == cos.argmax(1)).all()

@pytest.mark.parametrize('name', MADE)
def test_evaluation_is_plain(name):
    "No margin, no smoothing, no update"
    loss = MADE[name][0]().double().eval()
    state = copy.deepcopy(loss.state_dict())
    cos,y = batch()
    parts = [(.8, loss.a), (.1, loss.b)] if name == 'mix' else [(1, loss)]
    expected = sum(w*sum(ref_softmax(cos, y.tolist(), l.s.item()))/5 for w,l in parts)
    assert loss(cos, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.equal(v, state[k]) for k,v in loss.state_dict().items())

# --- AdaCos ----------------------------------------------------------------------------------------------------

def test_adacos_follows_the_reference_over_many_batches():
    loss,s = AdaCos(7).double(),2**.5*math.log(6)
    for i in range(30):
        cos,y = batch(9, seed=i)
        cos = (cos*.3).detach().requires_grad_()
        s = ref_adacos_scale(cos, y.tolist(), s)
        loss(cos, y)
        assert loss.s.item() == pytest.approx(s, rel=1e-9)

def test_adacos_learns_only_in_training():
    loss = AdaCos(7)
    s = loss.s.item()
    cos,y = batch(dtype=torch.float32)
    loss(cos.detach(), y); assert loss.s.item() == s                 # no gradient: not training
    with torch.no_grad(): loss(cos*1, y)
    assert loss.s.item() == s
    loss.eval()(cos, y); assert loss.s.item() == s
    loss.train()(cos, y); assert loss.s.item() != s
    s = loss.s.item()
    loss(cos, y); assert loss.s.item() == s                          # the same tensor
    loss(cos.detach().clone().requires_grad_(), y); assert loss.s.item() != s
    assert AdaCos(7, dynamic=False).train()(cos, y) and not list(loss.parameters())

def test_adacos_scale_is_saved_copied_and_moved():
    loss = AdaCos(7)
    loss(*batch(dtype=torch.float32))
    for other in (AdaCos(7), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        other.load_state_dict(loss.state_dict())
        assert other.s == loss.s
    assert loss.to('meta').s.device.type == 'meta'

def test_gradient_survives_a_later_update():
    "Gradients may be computed after another batch has changed the scale (gradient accumulation)"
    loss = AdaCos(7)
    a,b = batch(seed=1, dtype=torch.float32),batch(seed=2, dtype=torch.float32)
    (loss(*a) + loss(*b)).backward()
    assert a[0].grad.isfinite().all()

@pytest.mark.parametrize('k', (1, 2, 3, 1108))
@pytest.mark.parametrize('value', (-1., 0., 1.))
def test_adacos_is_always_defined(k, value):
    loss = AdaCos(k)
    for _ in range(300):
        cos = torch.full((2, k), value, requires_grad=True)
        out = loss(cos, torch.zeros(2, dtype=torch.long))
        out.backward()
        assert out.isfinite() and cos.grad.isfinite().all() and .5 <= loss.s <= 200

def test_adacos_ignores_a_broken_batch():
    loss = AdaCos(7); s = loss.s.item()
    loss(torch.full((2, 7), float('nan'), requires_grad=True), torch.zeros(2, dtype=torch.long))
    assert loss.s.item() == s
    loss(torch.zeros(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert loss.s.item() == s

def test_first_scale():
    for c in (3, 4, 31, 1108, 1139): assert AdaCos(c).s.item() == pytest.approx(2**.5*math.log(c-1), rel=1e-6)

class Cosines(torch.nn.Module):
    def __init__(self): super().__init__(); self.w,self.loss = torch.nn.Parameter(batch()[0].detach().float()),AdaCos(7)
    def forward(self, x): return (x*self.w).clamp(-1, 1)

def test_under_fastais_own_mixup():
    "fastai's MixUp calls the loss twice a batch: one update a batch, none in validation"
    model,updates = Cosines(),[]
    copy_ = model.loss.update
    model.loss.update = lambda cos, y: (updates.append(model.loss.s.item()), copy_(cos, y))
    dl = DataLoader([0, 1], bs=1, create_batch=lambda _: (torch.ones(5, 7), batch()[1]), num_workers=0)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), model, loss_func=model.loss, cbs=FastaiMixUp())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert len(updates) == 4 and len(set(updates)) == 3          # 2 batches × 2 calls: s₀, s₁, s₁, s₂
    assert learn.loss_func is model.loss and model.loss.reduction == 'mean'

# --- margins ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('m', (0., .3, .5, 1.))
@pytest.mark.parametrize('cls', (ArcFace, CosFace))
def test_margin_is_monotone(cls, m):
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    moved = cls(m=m).double().moved(theta.cos())
    assert (moved.diff() < 1e-9).all() and (moved <= theta.cos()+1e-6).all()
    if m == 0: assert torch.allclose(moved, theta.cos(), atol=1e-6)

@pytest.mark.parametrize('c', (-1., 1.))
@pytest.mark.parametrize('dtype', (torch.float16, torch.float32, torch.float64))
def test_margin_at_the_poles(c, dtype):
    cos = torch.full((2, 4), c, dtype=dtype, requires_grad=True)
    loss = ArcFace()(cos, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and cos.grad.isfinite().all()

# --- plain data ------------------------------------------------------------------------------------------------

def test_config_round_trip():
    made = [m() for m,_ in MADE.values()] + [MixLoss(AdaCos(5), MixLoss(CosFace(m=.2), SoftmaxLoss()), (1, 2))]
    for loss in made:
        again = loss_from_config(json.loads(json.dumps(loss.config())))
        assert again.config() == loss.config() and type(again) is type(loss)
        again.load_state_dict(loss.state_dict())

@pytest.mark.parametrize('config,word', (
    ('adacoss', 'adacos, arcface, cosface, softmax, mix'), (dict(), 'None'), ('adacos', 'n_classes'),
    (dict(name='arcface', margin=1), "'margin'"), (dict(name='mix', a='arc'), "'arc'")))
def test_bad_configs(config, word):
    with pytest.raises(ScreenError) as e: loss_from_config(config)
    assert word in str(e.value) and '\n' not in str(e.value)

# --- two heads -------------------------------------------------------------------------------------------------

def test_two_heads_by_hand():
    "0.8·softmax of the logits + 0.2·ArcFace of the cosines / 2, one number per item"
    (cos,y),(logits,_) = batch(),batch(seed=1)
    loss = loss_from_config(dict(name='mix', a='cross_entropy', b=dict(name='arcface', s=30., m=.5), weights=[.8, .1]))
    expected = [.8*a + .1*b for a,b in zip(ref_softmax(logits, y, 1.), ref_arcface(cos, y, 30., .5))]
    with NoneReduce(loss): assert torch.allclose(loss((logits, cos), y), torch.stack(expected), rtol=1e-6)
    loss((logits, cos), y).backward()
    assert all(o.grad.abs().sum() > 0 for o in (logits, cos))
    assert torch.allclose(loss.eval()(logits, y), torch.stack(ref_softmax(logits, y, 1.)).mean())

def test_a_mix_in_a_mix_reads_the_pair():
    (cos,y),(logits,_) = batch(),batch(seed=1)
    inner = MixLoss(CrossEntropy(), CosFace())
    outer = MixLoss(inner, ArcFace(), (1., .5))
    assert outer.reads == 'both' and outer.main is inner
    assert torch.allclose(outer((logits, cos), y), inner((logits, cos), y) + .5*ArcFace()(cos, y))
    assert torch.allclose(outer.eval()(logits, y), CrossEntropy()(logits, y))

# --- triplets --------------------------------------------------------------------------------------------------

def ref_triplet(e, y, m):
    "The farthest of its class and the nearest of another, for each item that has both"
    losses = []
    unit = [[float(v)/math.sqrt(sum(float(w)**2 for w in row)) for v in row] for row in e]
    for i in range(len(y)):
        far = [math.dist(unit[i], unit[j]) for j in range(len(y)) if j != i and y[j] == y[i]]
        near = [math.dist(unit[i], unit[j]) for j in range(len(y)) if y[j] != y[i]]
        losses.append(max(0., max(far) - min(near) + m) if far and near else 0.)
    return losses

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('dtype, tol', ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)))
def test_triplets_by_hand(seed, dtype, tol):
    g = torch.Generator().manual_seed(seed)
    e,y = torch.randn(12, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_(),torch.randint(0, 5, (12,), generator=g)
    loss = TripletLoss(.3)
    with NoneReduce(loss), torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16): found = loss(e, y)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(ref_triplet(e.double().tolist(), y.tolist(), .3), abs=tol)
    loss(e, y).backward()
    assert e.grad.isfinite().all() and e.grad.abs().sum() > 0

def test_triplets_pull_a_class_together():
    torch.manual_seed(0)
    e,y = torch.randn(16, 3, requires_grad=True),torch.arange(16) % 4
    opt,loss = torch.optim.Adam([e], .05),TripletLoss(.5)
    for _ in range(300): opt.zero_grad(); loss(e, y).backward(); opt.step()
    d = torch.cdist(*[torch.nn.functional.normalize(e.detach())]*2) + 9*torch.eye(16)
    assert (y[d.argmin(1)] == y).all() and loss(e, y) < .05

@pytest.mark.parametrize('turned', (False, True))
def test_triplets_with_two_heads(turned):
    "((logits, cosines), embeddings): a mix in a mix, in either order"
    (cos,y),(logits,_) = batch(),batch(seed=1)
    e,heads,triplet = torch.randn(5, 3, dtype=torch.float64),MixLoss(CrossEntropy(), ArcFace()),TripletLoss()
    mix = MixLoss(triplet, heads, (.5, 1.)) if turned else MixLoss(heads, triplet, (1., .5))
    assert mix.reads == 'both' and mix.embeds and mix.main is heads
    assert torch.allclose(mix(((logits, cos), e), y), heads((logits, cos), y) + .5*triplet(e, y))
    assert torch.allclose(mix.eval()(logits, y), CrossEntropy()(logits, y))
    assert torch.equal(mix.activation(((logits, cos), e)), mix.activation(logits))
    inner = MixLoss(MixLoss(CrossEntropy(), triplet), CosFace())            # the triplets inside
    assert inner.reads == 'both' and inner.embeds
    expected = .8*(.8*CrossEntropy()(logits, y) + .1*triplet(e, y)) + .1*CosFace()(cos, y)
    assert torch.allclose(inner(((logits, cos), e), y), expected)

def test_a_loss_of_your_own_cannot_be_written_down():
    class Mine(CosFace): pass
    with pytest.raises(ScreenError, match='Mine'): Mine().config()

@pytest.mark.parametrize('name', [n for n in LOSSES if n != 'triplet'])
def test_learns(name):
    "A small problem is learned by each loss"
    torch.manual_seed(0)
    w,x,y = torch.nn.Parameter(torch.randn(4, 16)),torch.randn(32, 16),torch.arange(32) % 4
    x = x + 2*torch.randn(4, 16)[y]
    loss,opt = loss_from_config(name, 4),torch.optim.Adam([w], .05)
    target = torch.eye(4)[y] if loss.several else y
    cosines = lambda: torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    for _ in range(60): opt.zero_grad(); loss(cosines(), target).backward(); opt.step()
    assert (cosines().argmax(1) == y).float().mean() > .95
