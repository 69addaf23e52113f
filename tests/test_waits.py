"Nothing in a training batch, from its transforms to the step of the optimizer, asks the device for a number: the answer would have to wait for all that was begun."
import sys
import pytest, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastai.vision.all import Callback, GradientAccumulation, L, MixedPrecision, Tensor, TensorBase
from torch.amp import GradScaler, autocast
from torch.optim.swa_utils import AveragedModel
from helpers import simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.model.heads import MetadataOneHot
from rcic_fastai.model.losses import LOSSES, loss_from_config
from rcic_fastai.screen.open import open_screen
from rcic_fastai.train.checkpoints import Checkpoint, checkpointed
from rcic_fastai.train.controls import difference_learner
from rcic_fastai.train.cutmix import *
from rcic_fastai.train.domain import *
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.train.recipes import Recipe, Stage

WAITS = '_local_scalar_dense nonzero masked_select equal _unique2 unique_dim unique_consecutive _linalg_check_errors repeat_interleave'.split()
ASKS = {getattr(Tensor, n) for n in 'tolist numpy cpu item'.split()}
THEIRS = 'torch/optim/', 'torch/amp/'     # where PyTorch has another way on a GPU

class Waited(Exception): pass

def tensors(o): return [t for t in tree_leaves(o) if isinstance(t, Tensor)]
def theirs():
    f = sys._getframe(2)
    while f:
        if any(o in f.f_code.co_filename for o in THEIRS): return True
        f = f.f_back

class NoWait(TorchDispatchMode):
    "Notes which tensors would be on the device (given ones and what is computed of them) and raises where one is looked at"
    def __init__(self): super().__init__(); self.there, self.asked = {}, Asked(self)
    def put(self, *ts):
        "By its memory: `as_subclass` and saved tensors are other objects. What is noted is kept, so that no address comes twice"
        for t in ts: self.there[t.untyped_storage()._cdata] = t.untyped_storage()
    def has(self, o): return any(t.untyped_storage()._cdata in self.there for t in tensors(o))
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, there = func.overloadpacket.__name__, self.has((args, kwargs or {}))
        by_mask = name in ('index', 'index_put', 'index_put_') and any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if there and (name in WAITS or by_mask) and not theirs(): raise Waited(name)
        out = func(*args, **(kwargs or {}))
        if there: self.put(*tensors(out))
        return out
    def __enter__(self): self.asked.__enter__(); return super().__enter__()
    def __exit__(self, *e): super().__exit__(*e); self.asked.__exit__(*e)

class Asked(TorchFunctionMode):
    "`tolist` and `numpy` read a CPU tensor without an operator"
    def __init__(self, mode): super().__init__(); self.mode = mode
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ASKS and self.mode.has(args) and not theirs(): raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('look', [lambda x: x.item(), lambda x: x.sum().tolist(), lambda x: bool(x > 0), lambda x: float(x + 1), lambda x: x[x > 0], lambda x: x.nonzero(),
                                  lambda x: x.unique(), lambda x: x.expand(3).cpu().numpy(), lambda x: torch.equal(x, x), lambda x: x.masked_select(x > 0),
                                  lambda x: torch.linalg.solve(x.view(1, 1), x.view(1, 1)), lambda x: x.as_subclass(TensorBase)[x.as_subclass(Tensor) > 0],
                                  lambda x: x.detach().view(-1).tolist()])
def test_looking_is_seen(look):
    x, mode = torch.ones(1), NoWait()
    look(x)
    mode.put(x)
    with pytest.raises(Waited), mode: look(x)
    with mode: look(torch.ones(1))

class Watch(Callback):
    "From the begin of each training batch to its end"
    order = -1000
    def before_fit(self): self.mode, self.n = None, 0
    def before_batch(self):
        if not self.training or self.train_iter in (0, len(self.dls.train)): return     # the first of an epoch may look: a generator is seeded, an order compared
        self.mode = NoWait()
        made = [m for cb in self.learn.cbs for m in vars(cb).values() if isinstance(m, torch.nn.Module)]
        for m in (self.model, *(o.module if isinstance(o, AveragedModel) else o for o in made)): self.mode.put(*m.parameters(), *m.buffers())
        self.mode.put(*self.xb, *self.yb)
        self.mode.__enter__()
    def after_batch(self):
        if self.mode: self.mode.__exit__(None, None, None); self.n += 1
        self.mode = None

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp('waits')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=8, size=32, plates=1, controls=2, progress=False)
    return open_screen(path)

def batches(screen, **kwargs):
    return screen_dls(screen, **{**dict(bs=8, device='cpu', valid='HUVEC-03', batch_by='experiment', batch_groups=2), **kwargs})

def fit(learn, *cbs, epochs=2):
    watch = Watch()
    try:
        with learn.no_bar(), learn.no_logging(), checkpointed(learn, Checkpoint()): learn.fit_one_cycle(epochs, 1e-3, cbs=[*cbs, watch])
    finally:
        if watch.mode: watch.mode.__exit__(None, None, None)
    assert watch.n > 1

class Mixed(MixedPrecision):
    def before_fit(self):
        self.autocast, self.scales, self.learn.scaler = autocast('cpu', dtype=torch.bfloat16), L(), GradScaler('cpu', enabled=False)

CBS = dict(plain=list, coral=lambda: [CORAL()], wasserstein=lambda: [SlicedWasserstein(directions=4)], reversal=lambda: [GradientReversal(hidden=4)],
           ema=lambda: [EMA(.9)], teacher=lambda: [MeanTeacher(.9)], cutmix=lambda: [CutMix(seed=1)], mixup=lambda: [MixUp(seed=1)], one_mixup=lambda: [MixUp(per_item=False)],
           accumulation=lambda: [GradientAccumulation(16), CORAL()], bf16=lambda: [Mixed(), GradientReversal(hidden=4)])

@pytest.mark.parametrize('what', CBS)
def test_a_callback_does_not_wait(screen, what):
    learn = screen_learner(batches(screen), 'test_efficientnet', metadata='cell_type,experiment', pretrained=None, emb_dim=16)
    fit(learn, *CBS[what]())

@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('mixed', [False, True], ids=['one_label', 'mixed'])
def test_a_loss_does_not_wait(loss, mixed):
    f, x, y, mode = loss_from_config(loss, 5).train(), torch.rand(4, 5).requires_grad_(), torch.tensor([0, 4, 2, 2]), NoWait()
    if f.several: y = torch.eye(5)[y]
    f(x, y)      # numbers for each label are put on the device once
    mode.put(x, y, *f.buffers(), *getattr(f, '_made', {}).values())
    with mode:
        loss = f(x*.9, y)
        if mixed: loss = mixed_loss(f, x*.9, (y,), torch.tensor([1, 0, 3, 2]), torch.tensor([.7]*4), loss)
        loss.backward()

def test_the_default_recipe_does_not_wait(screen):
    from rcic_fastai.train.recipes import RECIPES
    demo = RECIPES['demo']
    learn = screen_learner(batches(screen), 'test_efficientnet', pretrained=None, emb_dim=16)
    watch = Watch()
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(Recipe('short', [Stage(**{**vars(s), 'epochs': 1}) for s in demo.stages]), cbs=[watch])
    assert watch.n

def test_metadata_and_control_wells_do_not_wait(screen):
    fit(difference_learner(batches(screen), 'test_efficientnet', metadata='experiment', pretrained=None, emb_dim=16), EMA(.9), epochs=1)
    part, i, mode = MetadataOneHot(dict(a=4)).train(), torch.tensor([0, 3, 9]), NoWait()
    mode.put(i)
    with mode: part(dict(a=i), 3)

@pytest.mark.parametrize('norm', ['own', 'plate', 'experiment', 'global', 'none'])
@pytest.mark.parametrize('sites', [1, 2])
def test_the_transforms_of_a_batch_do_not_wait(screen, norm, sites):
    dls = batches(screen, norm=norm, sites=sites)
    dl, mode = dls.train, NoWait()
    b = dl.create_batch([dl.dataset[i] for i in range(4)]) if sites == 1 else dl.create_batch([dl.dataset[i] for i in range(2)])
    mode.put(*b)
    with mode: dl.after_batch(b)
