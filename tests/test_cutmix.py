"CutMix and Mixup: one λ and one partner for pixels, labels and metadata, whatever the batch looks like"
import numpy as np, pytest, torch, torch.nn.functional as F
import fastai.callback.progress  # brings learn.no_bar
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from torch import nn
from rcic_fastai.train.cutmix import CutMix, MixUp, cutmix_box, mix_meta, mixed_loss, paste_box
from rcic_fastai.model.heads import MixedMeta
from rcic_fastai.model.losses import AdaCos, ArcFace
from rcic_fastai.core import ScreenError
from rcic_fastai.model.model import create_screen_model

B = 8

def batch(b=B, s=None, dtype=torch.float32):
    "Every pixel of picture i is i, so that a pixel tells whose it is"
    shape = (b, *([s] if s else []), 6, 32, 24)
    x = torch.arange(b, dtype=dtype).view(-1, *[1]*(len(shape)-1)).expand(shape).contiguous()
    return x, torch.arange(b) % 5, torch.arange(b) % 3 + 10, torch.arange(b)

class Model(nn.Module):
    "Keeps what it was given; answers cosines that depend on the pixels"
    inputs = ('cell_type', 'plate')
    def __init__(self, loss=None, used=('cell_type',)):
        super().__init__()
        self.w,self.loss,self.seen,self.fail = nn.Parameter(torch.linspace(-.5, .5, B)),loss or ArcFace(),[],False
        self.metadata = nn.Module()
        self.metadata.vocab_sizes = {c:20 for c in used}
    def forward(self, *inputs):
        self.seen.append((self.training, inputs))
        if self.fail: raise RuntimeError('broken on purpose')
        x = inputs[0].float().flatten(1)
        return ((x.mean(1)[:, None] + torch.arange(B))*self.w).sin()*.9

def learner(model, b, cbs=None, n=1, loss_func=None):
    dl = DataLoader(list(range(n)), bs=1, create_batch=lambda _: b, num_workers=0)
    dls = DataLoaders(dl, dl, device='cpu'); dls.n_inp = len(b)-1
    return Learner(dls, model, loss_func=loss_func or model.loss, cbs=cbs)

def fit(learn, epochs=1, lr=0.):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)

def by_hand(cb, b, model=None, loss_func=None):
    "One training batch up to the loss"
    learn = learner(model or Model(), b, cb, loss_func=loss_func)
    learn.training = True
    learn._split(b); learn('before_batch')
    learn.pred = learn.model(*learn.xb)
    learn.loss_grad = learn.loss_func(learn.pred, *learn.yb); learn.loss = learn.loss_grad.clone()
    learn('after_loss')
    return learn

def force(cb, lam, partner):
    "Fix what a callback would draw"
    cb.draw = lambda n=None: lam
    if cb.rng is None: cb.rng = np.random.default_rng(0)
    rng = cb.rng
    class Fixed:
        def permutation(self, n): return np.asarray(partner)
        def __getattr__(self, name): return getattr(rng, name)
    cb.rng = Fixed()
    return cb

# --- pixels ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize('s', (None, 2))
@pytest.mark.parametrize('box', ('shared', 'site'))
def test_share_of_pixels_is_lambda_exactly(seed, s, box):
    b = batch(s=s)
    cb = CutMix(box=box, seed=seed)
    learn = by_hand(cb, b)
    x = learn.xb[0]
    own = (x == b[0]).flatten(1).float().mean(1)
    other = (x == b[0][cb.partner]).flatten(1).float().mean(1)
    moved = cb.partner != torch.arange(B)
    lam = cb.lam.expand(B)[moved]
    assert torch.allclose(own[moved], lam, atol=1e-6) and torch.allclose(other[moved], 1-lam, atol=1e-6)
    assert .5-.03 <= cb.lam <= 1
    assert torch.equal(b[0], batch(s=s)[0])                              # the batch itself was not written to
    if s: assert (box == 'site') == (len(cb.boxes) == 2)
    if s and box == 'shared': assert torch.equal(x[:, 0], x[:, 1])

def test_boxes():
    rng = np.random.default_rng(0)
    for _ in range(500):
        h,w,lam = int(rng.integers(1, 50)),int(rng.integers(1, 50)),rng.random()
        y1,y2,x1,x2 = cutmix_box(h, w, lam, rng)
        assert 0 <= y1 <= y2 <= h and 0 <= x1 <= x2 <= w
        assert y2-y1 <= round(h*(1-lam)**.5) and x2-x1 <= round(w*(1-lam)**.5)
    for h in range(1, 20):                                       # unclipped boxes have the wanted size, odd ones too
        sizes = {(lambda b: b[1]-b[0])(cutmix_box(4*h, 4*h, .9, rng)) for _ in range(200)}
        assert max(sizes) == round(4*h*.1**.5)

def test_type_is_kept():
    x,_ = paste_box(TensorImage(batch()[0]), torch.arange(B).flip(0), [(0, 5, 0, 5)])
    assert isinstance(x, TensorImage)

def test_bytes_are_cut_as_they_are():
    x,lam = paste_box(batch(dtype=torch.uint8)[0], torch.arange(B).flip(0), [(0, 32, 0, 12)])
    assert x.dtype == torch.uint8 and lam == .5

def test_lambda_has_the_wanted_distribution():
    "Beta(1,1) is uniform, so the larger share is uniform from .5 to 1"
    cb = CutMix(seed=0); cb.rng = np.random.default_rng(0)
    lam = np.array([cb.draw() for _ in range(4000)])
    assert np.allclose(np.quantile(lam, [0, .25, .5, .75, 1]), [.5, .625, .75, .875, 1], atol=.02)

@pytest.mark.parametrize('per_item', (True, False))
def test_mixup_pixels(per_item):
    b = batch(s=2)
    cb = MixUp(per_item=per_item, seed=1)
    x = by_hand(cb, b).xb[0]
    lam = cb.lam if per_item else cb.lam.expand(B)
    assert (cb.lam.ndim == 1) == per_item
    for i in range(B): assert torch.allclose(x[i], lam[i]*b[0][i] + (1-lam[i])*b[0][cb.partner[i]], atol=1e-5)

# --- labels ----------------------------------------------------------------------------------------------------

CALLBACKS = (lambda: CutMix(seed=3), lambda: MixUp(seed=3), lambda: MixUp(per_item=False, seed=3))

@pytest.mark.parametrize('make', CALLBACKS)
@pytest.mark.parametrize('reduction', ('mean', 'sum'))
def test_loss_by_hand(make, reduction):
    cb,b,loss = make(),batch(),ArcFace(reduction=reduction)
    learn = by_hand(cb, b, Model(loss))
    total = 0
    for i in range(B):
        one = lambda y: loss(learn.pred[i:i+1], y[i:i+1]).item()
        lam = cb.lam[i].item() if cb.lam.ndim else cb.lam.item()
        total += lam*one(b[3]) + (1-lam)*one(b[3][cb.partner])
    assert learn.loss.item() == pytest.approx(total/(B if reduction == 'mean' else 1), rel=1e-5)
    assert learn.loss_grad.requires_grad and loss.reduction == reduction

@pytest.mark.parametrize('make', CALLBACKS)
def test_lambda_one_is_no_mixing(make):
    cb,b = make(),batch()
    force(cb, 1. if cb.__class__ is CutMix or not cb.per_item else np.ones(B), np.arange(B)[::-1].copy())
    learn = by_hand(cb, b)
    assert torch.equal(learn.xb[0], b[0])
    assert learn.loss.item() == pytest.approx(learn.model.loss(learn.pred, b[3]).item(), rel=1e-6)

@pytest.mark.parametrize('make', CALLBACKS)
def test_own_partner_is_no_mixing(make):
    cb,b = make(),batch()
    force(cb, .6 if cb.__class__ is CutMix or not cb.per_item else np.full(B, .6), np.arange(B))
    learn = by_hand(cb, b)
    assert torch.allclose(learn.xb[0], b[0])
    assert learn.loss.item() == pytest.approx(learn.model.loss(learn.pred, b[3]).item(), rel=1e-6)

def test_loss_is_linear_in_lambda():
    pred,y,partner = torch.rand(B, B),torch.arange(B),torch.arange(B).flip(0)
    at = lambda lam: mixed_loss(F.cross_entropy, pred, (y,), partner, torch.tensor(lam)).item()
    assert at(.3) == pytest.approx(.3*at(1.) + .7*at(0.), rel=1e-6)
    assert at(1.) == pytest.approx(F.cross_entropy(pred, y).item())
    assert at(0.) == pytest.approx(F.cross_entropy(pred, y[partner]).item())

def test_losses_of_every_make():
    "One λ needs nothing of the loss; a λ for each item needs `reduction`, and says so"
    b = batch()
    plain = lambda p, y: F.cross_entropy(p, y)
    for cb in (CutMix(seed=0), MixUp(per_item=False, seed=0)): by_hand(cb, b, loss_func=plain)
    by_hand(MixUp(seed=0), b, loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ScreenError, match='per_item=False'): by_hand(MixUp(seed=0), b, loss_func=plain)

def test_soft_labels():
    x,a,p,y = batch()
    onehot = F.one_hot(y, B).float()
    for cb in (CutMix(seed=2), MixUp(seed=2)):
        learn = by_hand(cb, (x, a, p, onehot), loss_func=nn.CrossEntropyLoss())
        w = cb.lam.view(-1, 1) if cb.lam.ndim else cb.lam
        assert torch.allclose(learn.yb[0], w*onehot + (1-w)*onehot[cb.partner])
        assert learn.loss.item() == pytest.approx(F.cross_entropy(learn.pred, learn.yb[0]).item())

def test_adacos_learns_once_a_batch_and_from_the_first_labels():
    model,b = Model(AdaCos(B)),batch()
    learn = by_hand(CutMix(seed=0), b, model)
    alone = AdaCos(B); alone(learn.pred, b[3])
    assert model.loss.s.item() == alone.s.item()

# --- metadata --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', CALLBACKS)
def test_metadata_has_the_same_partner_and_lambda_as_the_pixels(make):
    cb,b = make(),batch()
    learn = by_hand(cb, b, Model(used=('cell_type', 'plate')))
    for given,mixed in zip(b[1:3], learn.xb[1:]):
        m = MixedMeta(*mixed)
        assert torch.equal(m.a, given) and torch.equal(m.b, given[cb.partner]) and torch.equal(m.lam, cb.lam)

def test_only_what_the_model_embeds():
    b = batch()
    learn = by_hand(CutMix(seed=0), b, Model(used=('plate',)))
    assert torch.equal(learn.xb[1], b[1]) and isinstance(learn.xb[2], tuple)
    assert torch.equal(by_hand(CutMix(seed=0), b, Model(used=())).xb[2], b[2])
    assert isinstance(by_hand(CutMix(seed=0, meta=(0,)), b, Model(used=())).xb[1], tuple)
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(6*32*24, B))
    learn = by_hand(CutMix(seed=0), (b[0], b[3]), foreign, nn.CrossEntropyLoss())       # a batch of pictures only
    assert len(learn.xb) == 1

def test_mix_meta():
    a,b = torch.tensor([1, 2]),torch.tensor([3, 4])
    out = mix_meta((a, b), torch.tensor([1, 0]), torch.tensor(.8))
    assert all(isinstance(o, MixedMeta) for o in out) and out[1].b.tolist() == [4, 3]

def test_through_the_real_model():
    torch.manual_seed(0)
    m = create_screen_model('test_resnet', B, metadata=dict(cell_type=5), inputs=('cell_type', 'plate'), emb_dim=8)
    x,*rest = batch(s=2)
    x = torch.rand(B, 2, 6, 64, 64)
    for cb in (CutMix(box='site'), MixUp()):
        learn = learner(m, (x, *rest), cb, n=2)
        fit(learn, lr=1e-3)
        assert np.isfinite(learn.recorder.losses[-1].item()) and learn.loss_func is m.loss

# --- in a fit --------------------------------------------------------------------------------------------------

def test_training_only():
    model,b = Model(),batch()
    fit(learner(model, b, CutMix(seed=0), n=3))
    for training,inputs in model.seen: assert torch.equal(inputs[0], b[0]) != training
    assert len(model.seen) == 6

def test_probability():
    model,b = Model(),batch()
    fit(learner(model, b, CutMix(p=.3, seed=0), n=300))
    mixed = np.mean([isinstance(i[1], tuple) for t,i in model.seen if t])
    assert mixed == pytest.approx(.3, abs=.08)
    model = Model(); cb = CutMix(p=0)
    learn = by_hand(cb, b, model)
    assert torch.equal(learn.xb[0], b[0]) and cb.lam is None
    assert learn.loss.item() == model.loss(learn.pred, b[3]).item()

def test_seeds():
    b = batch()
    def boxes(**kwargs):
        cb,model = CutMix(**kwargs),Model()
        fit(learner(model, b, cb, n=4))
        return [MixedMeta(*i[1]).lam.item() for t,i in model.seen if t]
    assert boxes(seed=1) == boxes(seed=1) != boxes(seed=2)
    torch.manual_seed(5); a = boxes(); torch.manual_seed(5); assert a == boxes() != boxes()
    assert len(set(boxes(seed=1))) > 1

def test_comes_and_goes():
    model,b = Model(),batch()
    learn = learner(model, b)
    with learn.added_cbs(CutMix()): fit(learn)
    fit(learn)
    learn.add_cb(MixUp()); fit(learn); learn.remove_cb(MixUp); fit(learn)
    assert [isinstance(i[1], tuple) for t,i in model.seen if t] == [True, False, True, False]

@pytest.mark.parametrize('make', CALLBACKS)
def test_crash_leaves_the_loss_alone(make):
    model,b = Model(),batch()
    model.fail = True
    learn = learner(model, b, make())
    with pytest.raises(RuntimeError, match='on purpose'): fit(learn)
    assert learn.loss_func is model.loss and model.loss.reduction == 'mean'
    assert any(isinstance(cb, MixHandler) for cb in learn.cbs)

def test_gradient_accumulation_still_divides():
    "Other callbacks that change the loss after us find the mixed one"
    b = batch()
    grads = {}
    for acc in (False, True):
        model = Model()
        cbs = [CutMix(seed=4)] + ([GradientAccumulation(B)] if acc else [])
        learn = learner(model, b, cbs)
        step = {}
        learn._step = lambda: step.setdefault('grad', model.w.grad.clone())
        fit(learn)
        grads[acc] = step['grad']
    assert torch.allclose(grads[False], grads[True])

def test_before_mixed_precision():
    assert CutMix().order < MixedPrecision.order and CutMix().order < GradientAccumulation.order

BAD = lambda: CutMix(alpha=0), lambda: CutMix(p=1.1), lambda: MixUp(alpha=-1), lambda: CutMix(box='both')

@pytest.mark.parametrize('make', BAD)
def test_bad_arguments(make):
    with pytest.raises(ScreenError): make()
