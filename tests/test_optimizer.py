"FusedAdam takes the steps of fastai's Adam, whatever the groups, the layout in memory and the past of the state."
from copy import deepcopy

import pytest, torch
from fastai.optimizer import Adam
from torch import nn

from rcic_fastai.model.model import create_screen_model, model_parts
from rcic_fastai.train.learner import screen_splitter
from rcic_fastai.train.optimizer import FusedAdam


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4*16, 3))
    return net.to(memory_format=torch.channels_last)


def groups(net): return [[*net[:2].parameters()], [*net[2:4].parameters()], [*net[4:].parameters()]]


def steps(net, opt, n, seed=0, frozen=()):
    "Take n steps on numbers drawn with a seed"
    draws = torch.Generator().manual_seed(seed)
    for i in range(n):
        opt.freeze_to(1 if i in frozen else 0)
        net(torch.rand(4, 6, 8, 8, generator=draws)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def same(a, b, eps=2e-6):
    for (n, p), q in zip(a.named_parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=eps, rtol=1e-5, msg=n)


@pytest.mark.parametrize('hypers', [dict(), dict(wd=0.), dict(wd=.3), dict(mom=.5, sqr_mom=.9), dict(eps=1e-8)])
@pytest.mark.parametrize('frozen', [(), range(0, 4), range(4, 9)])
def test_steps_of_fastai(hypers, frozen):
    nets = [network(), network()]
    for net, kind in zip(nets, (Adam, FusedAdam)):
        opt = kind(groups(net), lr=1e-3, **hypers)
        opt.set_hyper('lr', [1e-4, 1e-3, 5e-3])
        for p in net[1].parameters(): opt.state[p]['do_wd'] = False
        steps(net, opt, 12, frozen=frozen)
    same(*nets)
    assert not torch.equal(nets[1][3].weight, network()[3].weight)


@pytest.mark.parametrize('past', [Adam, FusedAdam])
@pytest.mark.parametrize('layout', [torch.preserve_format, torch.contiguous_format])
def test_continues_from_a_saved_state(past, layout):
    "Whichever optimizer wrote it, and whatever the layout in which a file gives it back"
    whole = network()
    steps(whole, opt := Adam(groups(whole), lr=1e-3), 6)
    steps(whole, opt, 6, seed=1)
    net = network()
    steps(net, opt := past(groups(net), lr=1e-3), 6)
    saved = opt.state_dict()
    states = [{k: v.clone(memory_format=layout) if torch.is_tensor(v) else v for k, v in s.items()} for s in saved['state']]
    again = FusedAdam(groups(net), lr=1e-3)
    again.load_state_dict(dict(hypers=deepcopy(saved['hypers']), state=states))
    steps(net, again, 6, seed=1)
    same(whole, net)


def test_gradients_in_another_layout():
    "As a checkpoint or another process may give them"
    nets = [network(), network()]
    opts = [FusedAdam(groups(net), lr=1e-2) for net in nets]
    for net in nets: net(torch.ones(4, 6, 8, 8)).square().mean().backward()
    for p in nets[1].parameters(): p.grad = p.grad.clone(memory_format=torch.contiguous_format)
    assert nets[0][0].weight.grad.stride() != nets[1][0].weight.grad.stride()
    for opt in opts: opt.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()): assert torch.equal(p, q)


def test_no_gradient_no_step():
    net = network()
    before = deepcopy(net)
    opt = FusedAdam(groups(net), lr=1.)
    opt.step()
    same(net, before, 0)
    net[5].weight.sum().backward()
    opt.step()
    same(net[:5], before[:5], 0)
    assert not torch.equal(net[5].weight, before[5].weight)


@pytest.mark.parametrize('arch', ['efficientnet-lite0', 'efficientnet-b0', 'resnet10t'])
def test_maps_are_channels_last_and_weights_are_not(arch):
    "Every convolution gets its maps in the faster layout; weights keep the usual one, which every file format knows"
    model = create_screen_model(arch, 5, emb_dim=16)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    seen = []
    for m in convs: m.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    opt = FusedAdam(screen_splitter(model), lr=1e-3)
    model(torch.rand(2, 6, 32, 32)).sum().backward()
    opt.step()
    spread = [x for x in seen if x.shape[1] > 1 and x.shape[-1] > 1]
    assert spread and all(x.is_contiguous(memory_format=torch.channels_last) for x in spread)
    assert all(v.is_contiguous() for v in model.state_dict().values() if torch.is_tensor(v))
    assert all(opt.state[p]['grad_avg'].stride() == p.stride() for ps in model_parts(model).values() for p in ps if p.grad is not None)


def test_a_parameter_that_is_a_slice_is_trained_whole():
    "It lies in memory with gaps, which the fused operation of a CPU does not know"
    torch.manual_seed(0)
    whole = torch.rand(6, 3, 2, 2)
    first = nn.Parameter(whole[:, :1])
    start, others = first.detach().clone(), whole[:, 1:].clone()
    theirs = nn.Parameter(start.clone())
    for opt, p in ((FusedAdam([first], lr=.1), first), (Adam([theirs], lr=.1), theirs)):
        for _ in range(3):
            (p - 2).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert (first != start).all() and torch.equal(whole[:, 1:], others)
    torch.testing.assert_close(first.detach(), theirs.detach())
