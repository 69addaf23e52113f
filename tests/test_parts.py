"The model parts that published systems need: each system is built from plain data, trained, saved in a folder, opened, copied"
import copy, json, shutil
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from helpers import quiet, refused, same, simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import json_hash
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.folder import load_model
from rcic_fastai.model.backbones import TO_RGB, FixedColors, adapt_filters, create_backbone
from rcic_fastai.model.heads import unit_length
from rcic_fastai.model.losses import LOSSES, loss_from_config
from rcic_fastai.model.model import PARTS, create_screen_model, hold_statistics, part_modules
from rcic_fastai.screen.open import open_screen
from rcic_fastai.train.cutmix import CutMix, MixUp
from rcic_fastai.train.learner import screen_learner

VOCAB = dict(cell_type=5, plate_group=5, experiment=34)
PLAIN = dict(pool='average', neck='identity', classifier='linear', loss='cross_entropy')
TWO = dict(name='mix', a='cross_entropy', b=dict(name='arcface', s=30., m=.5), weights=[.8, .1])
RCIC16 = dict(stem='mean', input_bn=True, pool='average', neck='fc', loss=dict(name='cosface', s=30., m=.5))
RCIC117 = dict(arch='efficientnet-b3', stem='copy', metadata=VOCAB, neck='rcic117_meta')
SYSTEMS = dict(
    rcic117=RCIC117, rcic117_12d={**RCIC117, 'sites_join': 'concat', 'n_sites': 2},
    rcic117_b4={**RCIC117, 'arch': 'efficientnet-b4', 'act': 'mish', 'loss': dict(name='adacos', label_smoothing=.1)},
    rcic16_densenet=dict(RCIC16, arch='densenet201', emb_dim=256), rcic16_b4=dict(RCIC16, arch='efficientnet_b4', emb_dim=256),
    rcic16_xception=dict(RCIC16, arch='legacy_xception', emb_dim=1000), rcic16_se=dict(RCIC16, arch='seresnext101_32x4d', emb_dim=512),
    rcic16_cbam=dict(RCIC16, arch='resnet101', arch_args=dict(block_args=dict(attn_layer='cbam')), emb_dim=512),
    rcic1=dict(arch='densenet161', stem='fresh', pool='average', metadata=dict(cell_type=5), meta_dim='onehot', neck='rcic1_bn', emb_dim=1024,
               classifier='both', loss=TWO, bn_momentum=.05, n_classes=1139),
    rxrx1_paper=dict(PLAIN, arch='densenet161'), capstone_cnn=dict(PLAIN, arch='capstone_cnn'), capstone_resnet50=dict(PLAIN, arch='resnet50', stem='mean'),
    rxrx1_resnet50=dict(PLAIN, arch='resnet50'), rgb=dict(PLAIN, arch='resnet50', stem='rgb'), project=dict(PLAIN, arch='resnet50', stem='project'),
    wilds=dict(PLAIN, arch='resnet50', n_channels=3, n_classes=1139), six_channels=dict(PLAIN, arch='resnet50', n_channels=5),
    hpa46=dict(PLAIN, arch='tf_efficientnet_b0', n_channels=3, n_classes=19), hpa46_se=dict(PLAIN, arch='seresnext26d_32x4d', n_channels=3, n_classes=19))
SMALL = {k: dict(v) for k,v in SYSTEMS.items() if k in ('rcic117_12d', 'rcic117_b4', 'rcic16_cbam', 'rcic1', 'capstone_cnn', 'rgb', 'project')}
for k,v in SMALL.items():        # the same parts on a small network
    v.update(arch='capstone_cnn' if k == 'capstone_cnn' else 'resnet10t', n_classes=8)
    v.setdefault('emb_dim', 16)
SMALL['capstone_cnn']['arch_args'] = dict(side=2, width=24)

def built(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_screen_model(**{'n_classes': 1108, **kwargs})

def inputs(model, b=3, px=64):
    sites = [model.n_sites] if model.n_sites else []
    g = torch.Generator().manual_seed(0)
    return torch.rand(b, *sites, model.n_channels, px, px, generator=g), *[torch.arange(b) for _ in model.inputs]

# --- every system ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SYSTEMS)
def test_each_system_is_plain_data(name):
    "Built from JSON, and again from what it says of itself; a number per class and an embedding of length 1"
    model = built(**json.loads(json.dumps(SYSTEMS[name])))
    with torch.no_grad(): e,out = model.embed(*inputs(model)),model.eval()(*inputs(model))
    assert out.shape == (3, model.classifier.n_classes) and out.dtype == torch.float32
    assert torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-4) and e.shape[1] == model.classifier.weight.shape[1]
    with torch.device('meta'): again = create_screen_model(**json.loads(json.dumps(model.config)))
    assert {k: v.shape for k,v in again.state_dict().items()} == {k: v.shape for k,v in model.state_dict().items()}

@pytest.mark.parametrize('name', SMALL)
def test_saved_copied_and_channels_last(name):
    model = built(**SMALL[name]).eval()
    x = inputs(model)
    again = built(1, **json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = model(*x)
        assert not torch.equal(built(1, **model.config).eval()(*x), out)
        for m in (again, copy.deepcopy(model)): assert torch.equal(m(*x), out) and m.config == model.config
        assert torch.allclose(model.to(memory_format=torch.channels_last)(*x), out, atol=1e-4)

@pytest.mark.parametrize('name', SMALL)
def test_every_parameter_has_a_gradient(name):
    "DDP without unused parameters, and nothing that is frozen by mistake"
    model = built(**SMALL[name])
    model.loss(model(*inputs(model, 4)), torch.arange(4)).backward()
    lacks = [n for n,p in model.named_parameters() if p.grad is None]
    assert not lacks, lacks

def test_two_processes_share_everything(tmp_path):
    "Buffers and both heads under DDP (one process of a group of one)"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for name in ('rcic1', 'rgb'):
            model = built(**SMALL[name])
            ddp = nn.parallel.DistributedDataParallel(model)
            for _ in range(2): model.loss(ddp(*inputs(model, 4)), torch.arange(4)).backward()
            hold_statistics(model, ['body'])
            ddp.train()
            assert not any(m.training for m in model.body.modules() if isinstance(m, nn.BatchNorm2d)) and model.training
    finally: torch.distributed.destroy_process_group()

# --- learners and folders --------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp('parts')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02'], sirnas=6, size=32, plates=1, controls=2, progress=False)
    return open_screen(path)

def learn_of(screen, sites=1, **kwargs):
    dls = screen_dls(screen, bs=8, augs=None, device='cpu', valid='HUVEC-02', sites=sites)
    args = {k: v for k,v in kwargs.items() if k not in ('n_classes', 'n_sites', 'n_channels')}
    args['metadata'] = list(args.get('metadata', ()))
    learn = screen_learner(dls, **{**args, 'pretrained': None})
    return learn.remove_cb(learn.progress) or learn

@pytest.mark.parametrize('name', SMALL)
def test_a_learner_trains_it_and_a_folder_keeps_it(screen, name, tmp_path):
    learn = learn_of(screen, SMALL[name].get('n_sites', 1), **SMALL[name])
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=CutMix()))
    loss,accuracy = learn.validate()
    assert np.isfinite(loss) and 0 <= accuracy <= 1
    p,_ = learn.get_preds()
    assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-4)
    index = EmbeddingIndex(learn.embed(learn.dls.train.items, tta=1, progress=False))
    folder = learn.to_model(index).save(tmp_path/'m')
    opened,x = load_model(folder).model,learn.dls.one_batch()[:-1]
    learn.model.eval()
    with torch.no_grad(): assert torch.equal(opened(*x), learn.model(*x)) and torch.equal(opened.embed(*x), learn.model.embed(*x))
    assert opened.config == learn.model.config and same(opened.state_dict(), learn.model.state_dict())

@pytest.fixture(scope='module')
def folder(screen, tmp_path_factory):
    learn = learn_of(screen, arch='test_efficientnet', emb_dim=16, metadata=['cell_type'])
    index = EmbeddingIndex(learn.embed(learn.dls.train.items, tta=1, progress=False))
    return learn.to_model(index).save(tmp_path_factory.mktemp('folder')/'m')

def changed(folder, to, change):
    shutil.copytree(folder, to)
    c = json.loads((to/'config.json').read_text())
    change(c['model'])
    c.pop('sha256')
    (to/'config.json').write_text(json.dumps({**c, 'sha256': json_hash(c)}))
    return to

NEW = ('classifier', 'pool', 'sites_join', 'n_sites', 'act')

def test_folders_of_before_are_opened(folder, tmp_path):
    "They say nothing of what is new, and their weights have the names that they had"
    old = changed(folder, tmp_path/'m', lambda m: [m.pop(k) for k in NEW])
    model = load_model(old).model
    assert model.config == load_model(folder).model.config
    names = {k for k in model.state_dict() if not k.startswith('body.')}
    neck = {f'neck.{i}.{k}' for i in (0, 3) for k in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')} | {'neck.2.weight'}
    assert names == {'_extra_state', 'stem.weight', 'metadata.tables.cell_type.weight', 'classifier.weight', 'loss.s'} | neck

@pytest.mark.parametrize('entry', [
    dict(classifier='svm'), dict(classifier='linear'), dict(classifier=['cosine']), dict(pool='max'), dict(pool=1), dict(sites_join='concat'), dict(n_sites=10**9),
    dict(sites_join='concat', n_sites=2), dict(sites_join='concat', n_sites='2'), dict(act='os.system'), dict(act=3), dict(input_bn='yes'), dict(input_bn=True), dict(stem='tile'), dict(stem='project'),
    dict(arch_args='cbam'), dict(arch_args=dict(checkpoint_path='/etc/passwd')), dict(arch_args=dict(pretrained=True)), dict(arch_args=dict(pretrained_cfg=dict(url='http://x'))),
    dict(arch_args=dict(width_mult=10**9)), dict(arch_args=dict(act_layer='os.system')), dict(arch_args=dict(a=[[[['deep']]]])), dict(arch_args={'a b': 1})], ids=str)
def test_folders_that_lie(folder, tmp_path, entry):
    refused(partial(load_model, changed(folder, tmp_path/'m', lambda m: m.update(entry))))

# --- stems -----------------------------------------------------------------------------------------------------

def test_mean_stem_by_hand():
    "Each filter over any channel is the mean of its three; nothing is rescaled"
    w = torch.randn(4, 3, 5, 5)
    mean = adapt_filters(w, 6, 'mean')
    for o in range(4):
        for c in range(6): assert torch.allclose(mean[o, c], (w[o, 0] + w[o, 1] + w[o, 2])/3)

def test_mean_stem_of_published_weights():
    a,b = (create_backbone('efficientnet-lite0', n, 'lite0', s).stem.weight for n,s in ((3, 'tile'), (6, 'mean')))
    assert torch.allclose(b, a.mean(1, keepdim=True).expand(-1, 6, -1, -1))
    assert torch.allclose(create_backbone('efficientnet-lite0', 3, 'lite0', 'mean').stem.weight, b[:, :3])

def test_fixed_colors_are_the_published_picture():
    "As rxrx1-utils computes it for bytes, where it cuts nothing off"
    table = {1: ((19, 0, 249), 51), 2: ((42, 255, 31), 107), 3: ((255, 0, 25), 64), 4: ((45, 255, 252), 191), 5: ((250, 0, 253), 89), 6: ((254, 255, 40), 191)}
    t = np.random.default_rng(0).integers(0, 9, (5, 5, 6))
    rgb = sum(np.outer(t[..., i]/255/(table[i+1][1]/255), table[i+1][0]).reshape(5, 5, 3) for i in range(6))
    assert rgb.max() < 255
    ours = FixedColors()(torch.tensor(t/255, dtype=torch.float32).permute(2, 0, 1)[None])[0]*255
    assert np.allclose(ours.permute(1, 2, 0).numpy(), rgb, atol=1e-2)

@pytest.mark.parametrize('n', (1, 2, 4, 6, 16))
def test_projection_begins_where_tile_begins(n):
    torch.manual_seed(0); a = create_backbone('test_resnet', n, stem='tile').eval()
    torch.manual_seed(0); b = create_backbone('test_resnet', n, stem='project').eval()
    x = torch.rand(2, n, 64, 64)
    with torch.no_grad(): assert torch.allclose(a(x), b(x), atol=1e-4)
    assert b.stem.colors.weight.requires_grad and b.stem.conv.in_channels == 3

def test_input_batchnorm_standardizes():
    b = create_backbone('test_resnet', input_bn=True)
    x = torch.rand(8, 6, 64, 64)*torch.arange(1, 7)[:, None, None] + 3
    y = b.stem.norm(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(6), atol=1e-4) and torch.allclose(y.std((0, 2, 3)), torch.ones(6), atol=1e-3)

@pytest.mark.parametrize('stem', (*TO_RGB, 'mean'))
@pytest.mark.parametrize('input_bn', (False, True))
def test_own_weights_with_every_stem(stem, input_bn, tmp_path):
    "The second step of a training in two steps: the same stem, weights of a model of this library"
    make = partial(create_screen_model, 'test_resnet', 5, stem=stem, input_bn=input_bn, emb_dim=8)
    first = make().eval()
    torch.save(first.state_dict(), tmp_path/'w.pth')
    x = torch.rand(2, 6, 64, 64)
    with torch.no_grad(): assert torch.equal(make(pretrained=tmp_path/'w.pth').eval().pooled(x), first.pooled(x))

def test_wrong_stems():
    refused(lambda: create_backbone('test_resnet', stem='zero'), 'tile', 'rgb')
    refused(lambda: create_backbone('test_resnet', 5, stem='rgb'), 'six stains', 'project')

# --- architectures ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, args', [('resnet10t', dict(depth=3)), ('resnet10t', dict(act_layer='none such')), ('resnet10t', dict(block_args=dict(attn_layer='x'))),
    ('resnet10t', dict(block_args=3)), ('efficientnet-b0', dict(depth=3)), ('capstone_cnn', dict(depth=3)), ('resnet10t', dict(pretrained=True)),
    ('resnet10t', dict(checkpoint_path='x.pth')), ('resnet10t', dict(in_chans=6)), ('resnet10t', dict(act_layer=nn.ReLU)), ('resnet10t', 'cbam'), ('resnet10t', [1])], ids=str)
def test_wrong_arguments_of_an_architecture(arch, args): refused(lambda: create_backbone(arch, arch_args=args))

def test_added_layers_start_at_random_and_this_is_said(monkeypatch):
    "Published weights of a ResNet in one with attention"
    import timm, timm.models._builder as builder
    net = timm.create_model('resnet10t')
    monkeypatch.setattr(builder, 'load_state_dict_from_hf', lambda *_, **__: dict(net.state_dict()))
    with pytest.warns(UserWarning, match='attn_layer|start at random'): b = create_backbone('resnet10t', 3, True, arch_args=dict(block_args=dict(attn_layer='se')))
    state = b.state_dict()
    assert torch.equal(state['body.net.layer1.0.conv1.weight'], net.layer1[0].conv1.weight) and 'body.net.layer1.0.se.fc1.weight' in state

@pytest.mark.parametrize('arch', ('efficientnet-b4', 'resnet10t', 'densenet121', 'efficientnet_b0'))
def test_mish_everywhere(arch):
    model = create_screen_model(arch, 5, act='mish', neck='rcic117', emb_dim=8)
    kinds = {type(m) for m in model.modules()}
    assert nn.Mish in kinds and not kinds & {nn.ReLU, nn.SiLU, nn.ReLU6}
    model.set_neck('rcic117_meta')
    assert not any(isinstance(m, nn.ReLU) for m in model.neck)
    plain = create_screen_model(arch, 5, neck='rcic117', emb_dim=8).eval()
    plain.load_state_dict(create_screen_model(arch, 5, act='mish', neck='rcic117', emb_dim=8).state_dict())
    refused(lambda: create_screen_model(arch, 5, act='swish'), 'mish')

@pytest.mark.parametrize('px', (32, 65, 256, 512))
def test_capstone_cnn_reads_any_size(px):
    model = built(arch='capstone_cnn', n_classes=9, arch_args=dict(side=4, width=30), **PLAIN).eval()
    with torch.no_grad(): assert model(torch.rand(2, 6, px, px)).shape == (2, 9)

def test_capstone_cnn_has_the_widths_of_the_capstone():
    with torch.device('meta'): model = create_screen_model('capstone_cnn', 1108, **PLAIN)
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(65536, 2216), (2216, 1108)]

def test_momentum_reaches_the_neck():
    model = create_screen_model('test_resnet', 5, neck='rcic1_bn', bn_momentum=.05)
    model.set_neck('rcic117')
    assert {m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {.05}

# --- sites and classifiers -------------------------------------------------------------------------------------

def test_sites_side_by_side():
    model = create_screen_model('test_resnet', 5, sites_join='concat', n_sites=3, metadata=VOCAB, meta_dim=4, emb_dim=8).eval()
    x = torch.rand(2, 3, 6, 64, 64)
    one = create_screen_model('test_resnet', 5, emb_dim=8).eval()
    one.stem,one.body = model.stem,model.body
    with torch.no_grad():
        assert torch.allclose(model.pooled(x), torch.cat([one.pooled(x[:, i]) for i in range(3)], 1), atol=1e-4)
        assert not torch.allclose(model(x), model(x.flip(1)))
        assert model.features(x).shape == (2, model.n_pooled)
    for wrong in (x[:, :2], x[:, 0], x[:, [0, 0, 1, 2]]): refused(lambda: model(wrong), '3 sites')
    for n in (None, 0, 2., '2', True): refused(lambda: create_screen_model('test_resnet', 5, sites_join='concat', n_sites=n), 'n_sites')
    refused(lambda: create_screen_model('test_resnet', 5, sites_join='sum'), 'pool, concat')

@pytest.mark.parametrize('loss', [*LOSSES, TWO])
@pytest.mark.parametrize('classifier', ('cosine', 'linear', 'both'))
def test_a_loss_reads_what_the_classifier_returns(loss, classifier):
    reads = loss_from_config(loss, 5).reads
    make = partial(create_screen_model, 'test_resnet', 5, loss=loss, classifier=classifier, emb_dim=8)
    if reads == 'embedding': refused(make, "b='triplet'")
    elif reads != classifier: refused(make, f"classifier='{reads}'")
    else: assert make().loss(make()(torch.rand(4, 6, 64, 64)), torch.eye(4, 5) if make().loss.several else torch.arange(4)).isfinite()

def test_logits_by_hand():
    model = create_screen_model('test_resnet', 5, emb_dim=8, **{**PLAIN, 'neck': 'linear'}).eval()
    x = torch.rand(3, 6, 64, 64)
    with torch.no_grad():
        e,c = model.neck(model.features(x)),model.classifier
        assert torch.allclose(model(x), e @ c.weight.T + c.bias, atol=1e-5)
        assert torch.allclose(model.embed(x), unit_length(e), atol=1e-6)

def test_two_heads_predict_by_the_linear_one(screen):
    learn = learn_of(screen, **SMALL['rcic1'])
    for cb in (CutMix(), MixUp(per_item=True)): quiet(learn, lambda: learn.fit(1, 1e-3, cbs=cb))
    model,b = learn.model,learn.dls.one_batch()
    with torch.no_grad(): logits,cosines = model.train()(*b[:-1]); alone = model.eval()(*b[:-1])
    assert logits.shape == cosines.shape == alone.shape and cosines.abs().max() <= 1
    p,y = learn.get_preds()
    scores = torch.cat([model(*b[:-1]) for b in learn.dls.valid])
    assert torch.allclose(p, scores.softmax(1), atol=1e-4)
    assert learn.validate()[1] == pytest.approx((scores.argmax(1) == y).float().mean().item())

@pytest.mark.parametrize('classifier, loss', [('cosine', dict(name='mix', a='adacos', b=dict(name='triplet', margin=.1), weights=[1., .5])),
    ('both', dict(name='mix', a=TWO, b='triplet', weights=[1., .5]))])
def test_triplets_in_a_learner(screen, classifier, loss, tmp_path):
    "Trained with and without CutMix, evaluated by the classifier alone, kept in a folder"
    learn = learn_of(screen, arch='resnet10t', emb_dim=8, classifier=classifier, loss=loss)
    for cbs in (None, CutMix(), MixUp(per_item=True)): quiet(learn, lambda: learn.fit(1, 1e-3, cbs=cbs))
    assert np.isfinite(learn.validate()[0]) and learn.get_preds()[0].shape[1] == len(learn.dls.spec.labels)
    index = EmbeddingIndex(learn.embed(learn.dls.train.items, tta=1, progress=False))
    opened,x = load_model(learn.to_model(index).save(tmp_path/'m')).model,learn.dls.one_batch()[:-1]
    with torch.no_grad(): assert torch.equal(opened(*x), learn.model.eval()(*x))
    assert opened.config == learn.model.config
    learn.model.train()
    out,e = learn.model(*x)
    assert e.shape == (8, 8)

@pytest.mark.parametrize('classifier, loss', [('linear', 'cross_entropy'), ('both', TWO)])
def test_controls_first_with_any_classifier(screen, classifier, loss):
    "Classes of the same name keep their weights and bias"
    learn = learn_of(screen, arch='resnet10t', emb_dim=8, classifier=classifier, loss=loss)
    before,labels = {k: v.clone() for k,v in learn.model.classifier.state_dict().items()},list(learn.dls.spec.labels)
    table = learn.dls.screen.table
    keep = table[table.sirna.isin(labels[2:])]
    learn.change_classes(learn.dls.rebuild(screen=learn.dls.screen[keep]))
    new = learn.dls.spec.labels
    assert learn.model.classifier.kind == classifier and learn.model.classifier.n_classes == len(new) < len(labels)
    for k,v in learn.model.classifier.state_dict().items(): assert torch.equal(v, before[k][[labels.index(l) for l in new]])
    quiet(learn, lambda: learn.fit(1, 1e-3))

# --- frozen normalization --------------------------------------------------------------------------------------

def statistics(modules):
    layers = [m for o in modules if o is not None for m in o.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return torch.cat([t.clone().float().flatten() for m in layers for t in (m.running_mean, m.running_var, m.num_batches_tracked)]) if layers else None

@pytest.mark.parametrize('parts', ('stem,head', 'classifier', 'body', 'all'))
@pytest.mark.parametrize('train_bn', (True, False))
def test_statistics_of_frozen_parts(screen, parts, train_bn):
    learn = learn_of(screen, arch='resnet10t', emb_dim=8, input_bn=True)
    learn.train_only(parts, train_bn=train_bn)
    learn.model = copy.deepcopy(learn.model)
    learn.loss_func = learn.model.loss
    before = {k: statistics(o) for k,o in part_modules(learn.model).items()}
    quiet(learn, lambda: learn.fit(1, 1e-3))
    trained = dict(all=PARTS).get(parts, ('stem', 'metadata', 'neck', 'classifier') if parts == 'stem,head' else (parts,))
    for k,o in part_modules(learn.model).items():
        if before[k] is not None: assert torch.equal(statistics(o), before[k]) is (k not in trained and not train_bn), k
    learn.train_only('all')
    learn.model.train()
    assert all(m.training for m in learn.model.modules())

@pytest.mark.parametrize('free', ('unfreeze', 'freeze'))
def test_fastais_own_freezing_lets_statistics_go(screen, free):
    learn = learn_of(screen, arch='resnet10t', emb_dim=8)
    learn.train_only('head', train_bn=False)
    assert not learn.model.train().body.net.bn1.training
    getattr(learn, free)()
    assert all(m.training for m in learn.model.train().modules())

def test_the_other_arguments_reach_the_model(screen):
    learn = learn_of(screen, arch='resnet10t', metadata=['cell_type'], meta_dim='onehot', dropout=.4, use_metadata=False, emb_dim=8)
    model = learn.model
    assert [m.p for m in model.neck if isinstance(m, nn.Dropout)] == [.4] and not model.use_metadata
    assert model.n_pooled == 2*512 + len(learn.dls.spec.vocabs['cell_type']) - 1
    assert learn_of(screen, arch='resnet10t', metadata=['cell_type'], meta_dim=3, emb_dim=8).model.n_pooled == 2*512 + 3
    with pytest.raises(TypeError): learn_of(screen, arch='resnet10t', clasifier='linear')
