"The model: sites and wells, metadata known, unknown, missing and mixed, what is saved, what is refused"
import copy, json, pickle
import pytest, torch
import fastai.callback.progress  # brings learn.no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import TensorCategory, TensorImage
from torch import nn
from rcic_fastai.model.heads import (NECKS, ConcatPool, CosineClassifier, MetadataEmbedding, MetadataOneHot, MixedMeta,
                               create_neck, mlp_neck, unit_length)
from rcic_fastai.model.losses import AdaCos
from rcic_fastai.core import ScreenError
from rcic_fastai.model.model import PARTS, create_screen_model, model_parts, parts_table

VOCAB = dict(cell_type=5, plate_group=5, experiment=9)

def made(**kwargs):
    torch.manual_seed(0)
    return create_screen_model('test_resnet', **(dict(n_classes=11, emb_dim=24, metadata=VOCAB, meta_dim=6) | kwargs))

def batch(b=4, s=None, c=6, px=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(b, *([s] if s else []), c, px, px, generator=g)
    return x, torch.arange(b) % 5, torch.arange(b).flip(0) % 5, torch.arange(b)*2 % 9

@pytest.fixture
def model(): return made().eval()

@pytest.fixture(autouse=True)
def no_gradients_unless_wanted(request):
    with torch.set_grad_enabled('learn' in request.node.name): yield

# --- pictures --------------------------------------------------------------------------------------------------

def test_answers(model):
    x,*meta = batch()
    cos,e = model(x, *meta),model.embed(x, *meta)
    assert cos.shape == (4, 11) and cos.abs().max() <= 1 and cos.dtype == torch.float32
    assert e.shape == (4, 24) and torch.allclose(e.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(e @ unit_length(model.classifier.weight).T, cos, atol=1e-5)

def test_wells_share_one_backbone(model):
    "A well is the average of its sites' averages and the maximum of their maxima, in any order"
    x,*meta = batch(s=3)
    maps = [model.body(model.stem(x[:, i])) for i in range(3)]
    mean,most = torch.stack([m.mean((2, 3)) for m in maps]).mean(0),torch.stack([m.amax((2, 3)) for m in maps]).amax(0)
    expected = torch.cat([mean, most], 1)
    assert torch.allclose(model.pooled(x), expected, atol=1e-4)
    assert torch.allclose(model(x[:, [2, 0, 1]], *meta), model(x, *meta), atol=1e-5)
    assert torch.allclose(model(x[:, :1], *meta), model(x[:, 0], *meta), atol=1e-5)

def test_fastai_types_become_plain(model):
    x,*meta = batch()
    out = model(TensorImage(x), *map(TensorCategory, meta))
    assert type(out) is torch.Tensor and torch.equal(out, model(x, *meta))

@pytest.mark.parametrize('shape', ((2, 3, 64, 64), (2, 2, 3, 64, 64), (6, 64, 64), (2, 1, 1, 6, 64, 64)))
def test_wrong_pictures(model, shape):
    with pytest.raises(ScreenError, match='6 channels') as e: model(torch.zeros(shape))
    assert '\n' not in str(e.value)

def test_bytes(model):
    with pytest.raises(ScreenError, match='from 0 to 1'): model(torch.zeros(1, 6, 64, 64, dtype=torch.uint8))

def test_channels_last_and_half(model):
    x,*meta = batch(s=2)
    expected = model(x, *meta)
    cl = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.allclose(cl(x, *meta), expected, atol=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16): cos,e = model(x, *meta),model.embed(x, *meta)
    assert cos.dtype == e.dtype == torch.float32 and torch.allclose(cos, expected, atol=.1)
    assert torch.allclose(e.norm(dim=1), torch.ones(4), atol=1e-5)

# --- metadata --------------------------------------------------------------------------------------------------

def test_missing_is_unknown(model):
    x,a,b,c = batch()
    zero = torch.zeros(4, dtype=torch.long)
    for given in ((), (None, None, None), (zero,), (zero, zero, zero)): assert torch.equal(model(x, *given), model(x))
    assert torch.equal(model(x, a, None, c), model(x, a, zero, c))
    assert not torch.allclose(model(x, a, b, c), model(x))
    assert torch.equal(model(x, a, b, torch.full((4,), 99)), model(x, a, b))     # outside the vocabulary

def test_switch(model):
    x,*meta = batch()
    model.use_metadata = False
    assert torch.equal(model(x, *meta), model(x))
    assert model.config['use_metadata'] is False and not create_screen_model(**model.config).use_metadata

def test_columns_are_picked_by_name():
    "The batch gives more columns than the model embeds, and in another order"
    m = made(metadata=dict(experiment=9, cell_type=5), inputs=('cell_type', 'plate_group', 'experiment')).eval()
    x,a,b,c = batch()
    assert torch.equal(m(x, a, b, c), m(x, a, b*0, c)) and not torch.equal(m(x, a, b, c), m(x, a, b, c*0))
    table = m.metadata.tables
    assert torch.equal(m.features(x, a, b, c)[:, -12:], torch.cat([table['experiment'](c), table['cell_type'](a)], 1))
    plain = made(metadata=None, inputs=('cell_type',)).eval()
    assert plain.metadata is None and torch.equal(plain(x, a, b, c), plain(x))
    with pytest.raises(ScreenError, match='plate'): made(metadata=dict(plate=3), inputs=('cell_type',))

@pytest.mark.parametrize('lam', (0., .25, 1., [0., .3, .5, 1.]))
@pytest.mark.parametrize('dim', (6, 'onehot'))
def test_mixed_metadata(lam, dim):
    m = made(meta_dim=dim).eval()
    x,*meta = batch()
    partner,lam = torch.tensor([2, 3, 1, 0]),torch.tensor(lam)
    mixed = [MixedMeta(o, o[partner], lam) for o in meta]
    f,pure = m.features(x, *mixed),m.features(x, *meta)
    n = m.metadata.n_out
    w = lam[:, None] if lam.ndim else lam
    assert torch.allclose(f[:, -n:], w*pure[:, -n:] + (1-w)*pure[partner, -n:], atol=1e-6)
    assert torch.equal(f[:, :-n], pure[:, :-n])
    assert torch.equal(m(x, *mixed), m(x, *[tuple(o) for o in mixed]))           # fastai turns it into a plain tuple

def test_dropout_replaces_each_entry_by_itself():
    emb = MetadataOneHot(dict(a=2, b=2), dropout=dict(a=.2, b=.6)).train()
    torch.manual_seed(0)
    one = torch.ones(20_000, dtype=torch.long)
    out = emb(dict(a=one, b=one), len(one))
    assert out.mean(0).tolist() == pytest.approx([.8, .4], abs=.02)
    assert (out[:, 0]*out[:, 1]).mean().item() == pytest.approx(.32, abs=.02)     # independent columns
    emb.eval()
    assert emb(dict(a=one, b=one), len(one)).min() == 1

def test_mixed_entries_are_dropped_together():
    emb = MetadataOneHot(dict(a=3), dropout=.5).train()
    n = torch.ones(1000, dtype=torch.long)
    out = emb(dict(a=MixedMeta(n, 2*n, torch.tensor(.7))), 1000)
    assert {tuple(round(v, 3) for v in r) for r in out.tolist()} == {(0., 0.), (.7, .3)}

@pytest.mark.parametrize('bad', (dict(vocab_sizes=dict(a=0)), dict(vocab_sizes=dict(a=3), dropout=1.5)))
def test_bad_vocabulary(bad):
    with pytest.raises(ScreenError, match='of a'): MetadataEmbedding(**bad)

def test_column_names_with_dots(): assert MetadataEmbedding({'plate.group': 4})({}, 2).shape == (2, 128)

def test_unknown_entry_learns():
    m = made(meta_dropout=.5).train()
    before = m.metadata.tables['experiment'].weight[0].clone()
    learn = learner(m, (*batch(8), torch.arange(8)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert not torch.equal(before, m.metadata.tables['experiment'].weight[0])

# --- training --------------------------------------------------------------------------------------------------

def learner(m, b, n=2, **kwargs):
    dl = DataLoader(list(range(n)), bs=1, create_batch=lambda _: b, num_workers=0)
    dls = DataLoaders(dl, dl, device='cpu'); dls.n_inp = len(b)-1
    return Learner(dls, m, loss_func=m.loss, **kwargs)

def test_all_parts_learn():
    m = made().train()
    x,*meta = batch(8)
    m.loss(m(x, *meta), torch.arange(8)).backward()
    for name, params in model_parts(m).items():
        assert params and all(p.grad is not None and p.grad.isfinite().all() for p in params), name
        assert any(p.grad.abs().sum() > 0 for p in params), name

def test_scale_learns_with_the_model():
    "AdaCos lives in the model: it moves in training, rests in validation, is saved and loaded"
    m = made(loss='adacos')
    learn = learner(m, (*batch(8), torch.arange(8)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        s = m.loss.s.item()
        assert s != AdaCos(11).s.item()
        learn.validate()
    assert m.loss.s.item() == s and 'loss.s' in m.state_dict()
    again = create_screen_model(**m.config)
    again.load_state_dict(m.state_dict())
    assert again.loss.s.item() == s

def test_parts_cover_the_model_once(model):
    class GeM(nn.Module):
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.ones(1))
    model.pool = GeM()
    ids = [id(p) for ps in model_parts(model).values() for p in ps]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert tuple(model_parts(model)) == PARTS and model_parts(made(metadata=None))['metadata'] == []

def test_parts_can_be_replaced(model):
    x,*meta = batch()
    model.classifier = CosineClassifier(24, 3)
    assert model(x, *meta).shape == (4, 3)
    model.neck = mlp_neck(model.neck[0].num_features, (16, 24), (.1, .1)).eval()
    assert model.embed(x, *meta).shape == (4, 24)

# --- plain data ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kwargs', [dict(neck=n) for n in NECKS] + [
    dict(meta_dim='onehot'), dict(metadata=None, inputs=('plate',)), dict(n_channels=3), dict(bn_momentum=.05),
    dict(meta_dropout=dict(experiment=.9)), dict(loss=dict(name='mix', weights=[1, 2])), dict(drop_path_rate=.1)])
def test_config_builds_the_same_model(kwargs):
    m = made(**kwargs)
    c = json.loads(json.dumps(m.config))
    assert 'pretrained' not in c and 'stem' not in c
    again = create_screen_model(**c)
    assert again.config == m.config and again.inputs == m.inputs
    again.load_state_dict(m.state_dict())
    x,*meta = batch(c=m.n_channels)
    assert torch.equal(again.eval()(x, *meta), m.eval()(x, *meta))

def test_copies(model):
    x,*meta = batch()
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(m(x, *meta), model(x, *meta))

def test_hand_made_model_cannot_be_written_down(model):
    model.backbone_config = None
    with pytest.raises(ScreenError, match='create_screen_model'): model.config

@pytest.mark.parametrize('kwargs,word', (
    (dict(neck='mlp'), 'linear, rcic117'), (dict(loss='arc'), 'adacos'), (dict(n_channels=0), '1 to 16')))
def test_bad_arguments(kwargs, word):
    with pytest.raises(ScreenError, match=word): made(**kwargs)

def test_parts_table(model):
    t = parts_table(model, 64, sites=2)
    assert list(t.index) == ['stem', 'body', 'pool', 'metadata', 'neck', 'classifier']
    assert t.answers['classifier'] == (1, 11)
    assert t.parameters.sum() == sum(p.numel() for p in model.parameters())

# --- heads -----------------------------------------------------------------------------------------------------

def test_necks():
    layers = lambda name: ' '.join(type(m).__name__ for m in create_neck(name, 8))
    assert layers('rcic117') == 'BatchNorm1d Dropout Linear ReLU BatchNorm1d Dropout Linear'
    assert layers('linear') == 'BatchNorm1d Dropout Linear BatchNorm1d'
    assert create_neck('linear', 8, dropout=.7)[1].p == .7

def test_classifier_is_safe_to_learn_from():
    c = CosineClassifier(5, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        e = torch.cat([torch.zeros(1, 5), torch.full((1, 5), 1e-7), 1e4*torch.ones(1, 5)]).to(dtype).requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16): cos = c(e)
        assert cos.dtype in (torch.float32, torch.float64) and cos.abs().max() <= 1 and (cos[0] == 0).all()
        cos.sum().backward()
        assert e.grad.isfinite().all() and (e.grad[0] == 0).all() and c.weight.grad.isfinite().all()

def test_pool():
    x = torch.randn(2, 3, 5, 4, 6)
    p = ConcatPool()(x)
    assert torch.allclose(p[:, :5], x.mean((1, 3, 4))) and torch.equal(p[:, 5:], x.amax((1, 3, 4)))
