"Models that read channels one by one: against loops, from folder to prediction with fewer channels, sampling that leaves nothing behind, files of ChannelViT."
import json, pickle
import pytest, timm, torch
from fastai.vision.all import Callback
from safetensors.torch import save_file
from helpers import learner, quiet, refused, same, simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.table import emb_features
from rcic_fastai.folder import load_model
from rcic_fastai.model.backbones import BAGS, body_blocks, create_backbone
from rcic_fastai.model.model import create_screen_model, with_channels
from rcic_fastai.predict.plan import *
from rcic_fastai.predict.profiles import *
from rcic_fastai.results.explain import *
from rcic_fastai.screen.open import open_screen
from rcic_fastai.train.channels import ChannelSampling
from rcic_fastai.train.domain import MeanTeacher, MixStyle
from rcic_fastai.train.recipes import Recipe, Stage, check_recipe, recipe_from_dict

ONE = Recipe('one', [Stage('one', 1, 3e-3)])


def shown(model, f, *args):
    with torch.no_grad(): return f(*args) if f else model.eval()(*args)


# ---- backbones

@pytest.mark.parametrize('arch', ('test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_byobnet', 'efficientnet-b0', 'capstone_cnn'))
def test_a_bag_is_the_mean_over_channels(arch):
    "Whatever the architecture: what one channel alone gives, averaged; from the same weights as with three channels"
    torch.manual_seed(0); three = create_backbone(arch, 3)
    torch.manual_seed(0); bag = create_backbone(arch, 5, stem='bag').eval()
    torch.nn.init.normal_(bag.stem.channel)
    x = torch.rand(2, 5, 160, 160)
    alone = [shown(bag, bag.body.each, shown(bag, bag.stem.conv, x[:, c:c+1]) + bag.stem.channel[c].detach()[:, None, None]) for c in range(5)]
    assert torch.allclose(shown(bag, None, x), sum(alone)/5, atol=1e-4)
    if arch != 'capstone_cnn':                        # its first convolution is no pretrained one
        for (k, v), w in zip(bag.body.each.state_dict().items(), three.body.state_dict().values()): assert torch.equal(v, w), k
    assert len(body_blocks(bag.body)) == len(body_blocks(three.body)) and bag.n_features == three.n_features
    again = create_backbone(**bag.config).eval()
    again.load_state_dict(bag.state_dict())
    assert torch.equal(shown(again, None, x), shown(bag, None, x))


def test_own_weights_with_more_or_fewer_channels(tmp_path):
    "A file of six channels begins a model of four: every channel starts at the mean vector; of another stem it does not fit"
    six = create_backbone('test_resnet', 6, stem='bag')
    torch.nn.init.normal_(six.stem.channel)
    save_file(six.state_dict(), tmp_path/'six.safetensors')
    four = create_backbone('test_resnet', 4, tmp_path/'six.safetensors', 'bag')
    assert torch.allclose(four.stem.channel, six.stem.channel.mean(0).expand(4, -1)) and same(dict(four.body.state_dict()), dict(six.body.state_dict()))
    assert torch.equal(create_backbone('test_resnet', 6, tmp_path/'six.safetensors', 'bag').stem.channel, six.stem.channel)
    refused(lambda: create_backbone('test_resnet', 6, tmp_path/'six.safetensors'), 'do not fit test_resnet')
    refused(lambda: create_backbone('test_resnet', 6, stem='sack'), 'choose from', 'bag', 'tokens')


def channelvit(depth=2, dim=192, channels=4, grid=14, **changes):
    "Weights under the names of ChannelViT's own code"
    torch.manual_seed(1)
    net = timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=depth)
    state = {k: torch.randn_like(v)/10 if v.ndim > 1 else v for k, v in net.state_dict().items()}
    state['patch_embed.proj.weight'] = torch.randn(dim, 1, 1, 16, 16)/16
    return {**state, 'patch_embed.channel_embed': torch.randn(1, dim, channels, 1, 1), **changes}


def test_weights_of_channelvit(tmp_path):
    "Under their own names, against the sum that their code makes of tokens; the filters pass through three colors and back"
    state, f = channelvit(), tmp_path/'cvit.safetensors'
    save_file(state, f)
    b = create_backbone('vit_tiny_patch16_224', 4, f, 'tokens', arch_args=dict(depth=2)).eval()
    assert torch.allclose(b.stem.conv.weight[:, 0], state['patch_embed.proj.weight'][:, 0, 0], atol=1e-6)
    x = torch.rand(1, 4, 224, 224)
    patches = torch.nn.functional.conv3d(x[:, None], state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], (1, 16, 16)) + state['patch_embed.channel_embed']
    tokens = torch.cat([state['cls_token'], patches.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + torch.cat([state['pos_embed'][:, :1], state['pos_embed'][:, 1:].repeat(1, 4, 1)], 1)
    net = timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=2).eval()
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith('patch_embed')}, strict=False)
    expected = shown(net, lambda: net.norm(net.blocks(tokens))[:, 1:]).unflatten(1, (4, 196)).mean(1)
    assert torch.allclose(shown(b, None, x).flatten(2).transpose(1, 2), expected, atol=1e-4)
    with pytest.warns(UserWarning, match='4 channels and the pictures have 6'): six = create_backbone('vit_tiny_patch16_224', 6, f, 'tokens', arch_args=dict(depth=2))
    assert torch.allclose(six.stem.channel, b.stem.channel.mean(0).expand(6, -1), atol=1e-6)


@pytest.mark.parametrize('changes,stem,words', [
    ({}, 'tile', "stem='tokens'"), ({'patch_embed.channel_embed': torch.zeros(4, 192)}, 'tokens', 'has the shape [4, 192]'),
    ({'patch_embed.channel_embed': torch.zeros(1, 64, 4, 1, 1)}, 'tokens', '64 numbers a channel'), ({'patch_embed.proj.weight': torch.zeros(64, 1, 1, 16, 16)}, 'tokens', 'do not fit'),
    ({'blocks.0.attn.qkv.weight': torch.zeros(3, 3)}, 'tokens', 'do not fit'), ({'patch_embed.channel_embed': torch.zeros(1, 192, 4, 2, 2)}, 'tokens', 'has the shape')])
def test_files_that_do_not_fit(tmp_path, changes, stem, words):
    save_file(channelvit(**changes), tmp_path/'odd.safetensors')
    refused(lambda: create_backbone('vit_tiny_patch16_224', 4, tmp_path/'odd.safetensors', stem, arch_args=dict(depth=2)), 'odd.safetensors', words)


class Armed:
    def __reduce__(self): return print, ('this ran',)


def test_a_hostile_file_runs_nothing(tmp_path, capsys):
    state = channelvit()
    (tmp_path/'armed.pth').write_bytes(pickle.dumps({**state, 'patch_embed.channel_embed': Armed()}))
    torch.save({**state, 'patch_embed.channel_embed': Armed()}, tmp_path/'armed2.pth')
    for f in ('armed.pth', 'armed2.pth'): refused(lambda: create_backbone('vit_tiny_patch16_224', 4, tmp_path/f, 'tokens'), 'nothing but tensors')
    assert 'this ran' not in capsys.readouterr().out


# ---- from a training to a prediction with fewer channels

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    d = tmp_path_factory.mktemp('channels')/'s'
    simulate_screen(d, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, plates=1, controls=2, size=32, test=['HUVEC-17'], n_workers=0, progress=False)
    return open_screen(d)


@pytest.fixture(scope='module')
def model(screen, tmp_path_factory):
    "A model folder whose channels differ, loaded again"
    learn = learner(screen_dls(screen, valid='HUVEC-02', bs=8, norm='global', device='cpu'), stem='bag')
    torch.nn.init.normal_(learn.model.stem.channel)
    folder = tmp_path_factory.mktemp('channels')/'model'
    learn.to_model(tta=1, progress=False).save(folder)
    return load_model(folder)


def test_the_folder_says_bag(model, screen):
    assert model.config['model']['stem'] == 'bag' and model.model.config['stem'] == 'bag'
    assert model.screen_notes(screen.test) == []


def test_predictions_with_fewer_channels(model, screen, capsys):
    "The same answers in any order; others than with all; and the note says so"
    five = [c for c in screen.channels if c != 'actin']
    turned = five[::-1]
    whole = model.predict(screen, tta=1, progress=False)
    assert 'lacks' not in capsys.readouterr().err
    a, b = (model.predict(screen.pick(c), tta=1, progress=False) for c in (five, turned))
    assert capsys.readouterr().err.count('lacks actin: the model answers from nucleus, ER, nucleoli') == 2
    assert (a.score - b.score).abs().max() < 1e-5 and (a.sirna == b.sirna).all() and (a.score - whole.score).abs().max() > 1e-4
    emb = model.embed(screen.test.pick(turned), tta=1, progress=False)
    net = with_channels(model.model, [screen.channels.index(c) for c in five])
    spec = model.spec
    x = torch.from_numpy(screen.source[emb.Metadata_site_id[0]].astype('float32')/255)
    at = [list(screen.channels).index(c) for c in five]
    mean, std = (torch.tensor(o)[at][:, None, None] for o in (spec.norm_mean, spec.norm_std))
    by_hand = shown(net, net.eval().embed, ((x[at] - mean)/std)[None])
    assert torch.allclose(by_hand[0], torch.from_numpy(emb_features(emb)[0]), atol=1e-4)


def test_adapted_profiles_and_explanations_with_fewer_channels(model, screen):
    four = screen.pick([c for c in screen.channels if c not in ('actin', 'ER')])
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    assert len(model.predict(four, 'adapted', tta=1, progress=False))
    assert len(model.profiles(four, tta=1, progress=False))
    why = model.explain(four, four.test.wells.well_id[:1], steps=2)
    assert list(why.table.columns[-4:]) == list(four.channels)
    assert same(before, dict(model.model.state_dict()))


def test_unknown_channels_are_refused_by_name(model, screen):
    odd = screen.pick([c for c in screen.channels if c != 'ER'])
    odd.source.channels = tuple('DNA' if c == 'nucleus' else c for c in odd.source.channels)
    for f in (lambda: model.predict(odd, tta=1, progress=False), lambda: model.embed(odd, tta=1, progress=False), lambda: model.profiles(odd, tta=1, progress=False)):
        refused(f, 'lacks nucleus, ER and has DNA', "channels='nucleus=DNA'")


def test_other_models_refuse_as_ever(screen):
    learn = learner(screen_dls(screen, valid='HUVEC-02', bs=8, device='cpu'))
    m = learn.to_model(tta=1, progress=False)
    refused(lambda: m.predict(screen.pick('nucleus,ER'), tta=1, progress=False), 'the screen lacks actin')


# ---- channel sampling

class Watch(Callback):
    "Notes what the body was shown, and what validation was"
    def before_fit(self):
        self.n, self.valid = [], []
        self.hook = self.learn.model.body.register_forward_hook(lambda m, i, o: (self.n if self.training else self.valid).append(i[0].shape[1]))
    def after_fit(self): self.hook.remove()


def test_sampling_in_a_training(screen):
    "Fewer channels in training, all in validation; nothing is left behind; the same seed draws the same"
    stage = Stage('one', 3, 3e-3, callbacks=[{'name': 'channel_sampling', 'least': 2}], cutmix=.5)
    def train():
        learn, w = learner(screen_dls(screen, valid='HUVEC-02', bs=4, device='cpu'), stem='bag'), Watch()
        quiet(learn, lambda: learn.fit_recipe(Recipe('r', [stage], model=dict(stem='bag')), seed=1, cbs=w))
        return learn, w
    a, w = train()
    assert set(w.valid) == {6} and min(w.n) >= 2 and len(set(w.n)) > 1 and a.model.stem.drawn is None
    b, v = train()
    assert v.n == w.n and same(dict(a.model.state_dict()), dict(b.model.state_dict()))


def test_sampling_goes_with_other_callbacks(screen):
    learn = learner(screen_dls(screen, valid='HUVEC-02', bs=8, device='cpu'), stem='bag')
    quiet(learn, lambda: learn.fit_recipe(ONE, cbs=[ChannelSampling(seed=0), MeanTeacher(.9), MixStyle(p=1., by='cell_type') if len(learn.dls.spec.vocabs['cell_type']) > 2 else Watch()]))
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_a_fit_after_an_interrupted_one_reads_all_channels(screen):
    "Interrupted between the draw and the end of the batch, where no event of the callback comes"
    learn, read = learner(screen_dls(screen, valid='HUVEC-02', bs=8, device='cpu'), stem='bag'), set()
    def stop(*_): raise KeyboardInterrupt
    hook = learn.model.neck.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.fit_recipe(ONE, cbs=[ChannelSampling(seed=3)]))
    hook.remove()
    assert learn.model.stem.drawn is not None
    learn.model.body.register_forward_pre_hook(lambda m, a: read.add(a[0].shape[1]))
    quiet(learn, lambda: learn.fit(1, 1e-3))
    assert read == {learn.model.n_channels}


def test_recipes_say_what_they_need():
    some = dict(name='s', stages=[dict(name='a', epochs=1, lr=1e-3, callbacks=['channel_sampling'])])
    refused(lambda: recipe_from_dict(some), 'reads all channels together', 'let stem be bag')
    for stem in BAGS: assert recipe_from_dict(json.loads(json.dumps(dict(some, model=dict(stem=stem))))).model == dict(stem=stem)
    flat = create_screen_model('test_resnet', 3, stem='tile')
    refused(lambda: check_recipe(recipe_from_dict(dict(some, model=dict(stem='bag'))), flat), 'reads all channels together')
    refused(lambda: recipe_from_dict(dict(some, stages=[dict(some['stages'][0], callbacks=[dict(name='channel_sampling', least=0)])], model=dict(stem='bag'))), 'leaves no channel')
