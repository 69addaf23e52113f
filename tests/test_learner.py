"fastai's habits on a learner for screens: freezing and `fine_tune`, an architecture as a function, `lr_find`, `get_preds`, `predict`, `Interpretation`, `show_results`."
import numpy as np, pytest, sys, timm, torch
from functools import partial
from fastai.vision.all import Callback, ClassificationInterpretation, Interpretation, Learner, params, plt, steep, valley
from fastai.callback.fp16 import AMPMode, MixedPrecision
from helpers import same, simulate_screen
from rcic_fastai.core import ScreenError
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.model.backbones import create_backbone
from rcic_fastai.model.model import PARTS, model_parts
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.train.learner import *
from rcic_fastai.train.recipes import *

MODELS = sys.modules['torchvision.models']      # as fastai imports it

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp('learner')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02'], sirnas=4, size=32, plates=1, controls=0, progress=False)
    return open_screen(path)

def make(screen, **kwargs):
    dls = screen_dls(screen, bs=8, augs=None, device='cpu', valid='HUVEC-02')
    kwargs = {**dict(metadata='cell_type,experiment', emb_dim=16, pretrained=None, train_bn=False), **kwargs}
    return screen_learner(dls, 'test_efficientnet', **kwargs)

def kept(learn): return {n: [p.detach().clone() for p in ps] for n, ps in model_parts(learn.model).items()}
def moved(learn, before): return [n for n, ps in model_parts(learn.model).items() if any(not torch.equal(p, o) for p, o in zip(ps, before[n]))]

def quietly(learn, f):
    before = kept(learn)
    with learn.no_bar(), learn.no_logging(): f()
    return moved(learn, before)

NEW = ['metadata', 'neck', 'classifier']

def test_fine_tune_trains_what_is_new_and_then_all(screen):
    learn, stages = make(screen), []
    def fit(*args, **kwargs):
        before = kept(learn)
        Learner.fit_one_cycle(learn, *args, **kwargs)
        stages.append(moved(learn, before))
    learn.fit_one_cycle = fit
    quietly(learn, lambda: learn.fine_tune(1, 1e-2))
    assert stages == [NEW, [*PARTS]]

def test_without_metadata(screen):
    learn = make(screen, metadata=())
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == ['neck', 'classifier']

@pytest.mark.parametrize('first', [lambda l: l.unfreeze(), lambda l: l.train_only('stem,head'), lambda l: l.fit_recipe(Recipe('r', [Stage('all', 1, 1e-2)]))],
                         ids=['unfreeze', 'train_only', 'recipe'])
def test_freezing_after_a_training_of_other_parts(screen, first):
    "No stale gradient lets a frozen part decay"
    learn = make(screen)
    quietly(learn, lambda: (first(learn), learn.fit(1, 1e-2)))
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2, wd=.1)) == NEW
    learn.unfreeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == [*PARTS]

@pytest.mark.parametrize('n', [0, 1, 2, 3, 4, -1, -2])
def test_freeze_to_counts_groups(screen, n):
    learn = make(screen)
    quietly(learn, lambda: learn.fit(1, 1e-2))
    learn.freeze_to(n)
    assert quietly(learn, lambda: learn.fit(1, 1e-2, wd=.1)) == [*PARTS][n:]

def test_normalization_of_frozen_parts_is_trained_as_everywhere(screen):
    learn = make(screen, train_bn=True)
    learn.freeze()
    free = {n for n, p in learn.model.named_parameters() if p.requires_grad and n.split('.')[0] in ('stem', 'body')}
    assert free and all(isinstance(learn.model.get_submodule(n.rpartition('.')[0]), torch.nn.modules.batchnorm._BatchNorm) for n in free)

def test_five_rates_stay_five(screen):
    learn = make(screen)
    learn.freeze()
    quietly(learn, lambda: learn.fit(1, [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))
    assert [h['lr'] for h in learn.opt.hypers] == [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]

def test_other_learners_freeze_as_before(screen):
    "Two groups of one's own: the last is trained"
    learn = make(screen, splitter=lambda m: [params(m.stem) + params(m.body) + params(m.neck), params(m.metadata) + params(m.classifier)])
    learn.freeze()
    assert quietly(learn, lambda: learn.fit(1, 1e-2)) == ['metadata', 'classifier']

# An architecture given as a function

@pytest.mark.parametrize('arch,name', [(MODELS.resnet18, 'resnet18.tv_in1k'), (MODELS.convnext_tiny, 'convnext_tiny'),
                                       (timm.models.resnet18, 'resnet18')], ids=['torchvision', 'without tv weights', 'timm'])
def test_architecture_as_a_function(screen, arch, name):
    a, b = (screen_learner(screen_dls(screen, bs=8, device='cpu', valid='HUVEC-02'), o, emb_dim=16, pretrained=None) for o in (arch, name))
    assert a.model.config == b.model.config and a.model.config['arch'] == name
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))

def test_a_function_of_torchvision_computes_what_torchvision_computes():
    "timm's architecture of that name takes torchvision's weights and gives torchvision's feature map"
    ref = MODELS.resnet18().eval()
    state = {k: v for k, v in ref.state_dict().items() if not k.startswith('fc.')}
    ours = create_backbone(MODELS.resnet18, 3).eval()
    assert ours.body.net.load_state_dict(state, strict=False).missing_keys == []
    ours.stem.load_state_dict({'weight': state['conv1.weight']})
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.allclose(ours(x), torch.nn.Sequential(*list(ref.children())[:-2])(x), atol=1e-5)

def resnet18(): "A function of one's own, of a well-known name"

@pytest.mark.parametrize('arch,says', [(MODELS.swin_t, "There is no architecture 'swin_t': did you mean"), (resnet18, 'resnet18 is no function of torchvision or timm'),
    (lambda: 0, 'is no function of torchvision or timm'), (partial(MODELS.resnet18), 'architecture partial is no'), (torch.nn.ReLU(), 'architecture ReLU is no'),
    (torch.nn.ReLU, 'architecture ReLU is no'), (MODELS.ResNet, 'architecture ResNet is no')])
def test_functions_that_are_no_architecture(screen, arch, says):
    dls = screen_dls(screen, bs=8, device='cpu', valid='HUVEC-02')
    with pytest.raises(ScreenError, match=says) as e: screen_learner(dls, arch)
    assert '\n' not in str(e.value)

# lr_find, get_preds, predict, Interpretation, show_results

@pytest.fixture(scope='module', params=[('cell_type', 1), ('', 1), ('cell_type,experiment', 2)], ids=['metadata', 'no metadata', 'wells'])
def trained(screen, tmp_path_factory, request):
    metadata, sites = request.param
    dls = screen_dls(screen, bs=8, augs=None, device='cpu', valid='HUVEC-02', sites=sites)
    learn = screen_learner(dls, 'test_efficientnet', metadata=metadata, emb_dim=16, pretrained=None, path=tmp_path_factory.mktemp('learn'))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
        yield learn
    plt.close('all')

def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

def test_lr_find_leaves_the_model_as_it_was(screen, tmp_path):
    learn = make(screen, path=tmp_path)
    before = state(learn)
    with learn.no_bar(): found = learn.lr_find(num_it=12, suggest_funcs=(valley, steep), show_plot=False)
    assert found.valley > 0 and found.steep > 0 and len(learn.recorder.lrs) > 6
    assert same(state(learn), before) and learn.model.trained_experiments == ()
    assert not any((tmp_path/'models').iterdir())
    quietly(learn, lambda: learn.fit(1, 1e-3))
    assert learn.model.trained_experiments == ('HUVEC-01',)

def test_an_interrupted_lr_find_has_trained(screen, tmp_path):
    "Its weights are not put back, so the record says what they saw"
    class Interrupt(Callback):
        def after_batch(self):
            if self.train_iter == 2: raise KeyboardInterrupt
    learn = make(screen, path=tmp_path, cbs=Interrupt())
    before = state(learn)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=12, show_plot=False)
    assert not same(state(learn), before) and learn.model.trained_experiments == ('HUVEC-01',)

def test_lr_find_of_a_trained_model(trained):
    before = state(trained)
    trained.lr_find(num_it=8, show_plot=False)
    assert same(state(trained), before) and trained.model.trained_experiments == ('HUVEC-01',)

def test_get_preds_are_the_models_own(trained):
    p, y = trained.get_preds()
    dl, model = trained.dls.valid, trained.model.eval()
    with torch.no_grad(): own = torch.cat([model.loss.activation(model(*b[:-1])) for b in dl])
    assert torch.allclose(p, own, atol=1e-5) and torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
    assert [trained.dls.spec.labels[i] for i in y] == list(dl.items.sirna)
    loss, acc = trained.validate()
    _, _, decoded, losses = trained.get_preds(with_decoded=True, with_loss=True)
    assert torch.equal(decoded, p.argmax(1)) and (decoded == y).float().mean().item() == pytest.approx(acc) and losses.mean().item() == pytest.approx(loss, abs=1e-5)

def test_get_preds_of_some_rows(trained):
    p, _ = trained.get_preds()
    some, none = trained.get_preds(dl=trained.dls.test_dl(trained.dls.valid.items.iloc[[2, 0]]))
    assert torch.allclose(some, p[[2, 0]], atol=1e-5) and none is None

def test_predict_one_row(trained):
    p, _ = trained.get_preds()
    for i in (0, 3):
        name, number, own = trained.predict(trained.dls.valid.items.iloc[i])
        assert torch.allclose(own, p[i], atol=1e-5) and number == p[i].argmax() and name == trained.dls.spec.labels[number]

def test_predict_a_row_of_an_unseen_experiment(trained):
    row = trained.dls.valid.items.iloc[0].copy()
    p = trained.predict(row)[2]
    row['experiment'] = 'never seen'
    assert torch.allclose(trained.predict(row)[2], p, atol=1e-5)       # HUVEC-02 is as unknown

def test_top_losses(trained):
    interp = Interpretation.from_learner(trained)
    losses, at = interp.top_losses()
    p, y = trained.get_preds()
    each = -(p[range(len(y)), y]).log()
    assert torch.allclose(losses, each.sort(descending=True).values, atol=1e-3) and torch.allclose(each[at], losses, atol=1e-3)
    plt.close('all')
    interp.plot_top_losses(3)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    items = trained.dls.valid.items.iloc[at[:3]]
    assert len(titles) == 3 and all(f'{s} → ' in t and f'loss {l:.2f}' in t for t, s, l in zip(titles, items.sirna, losses))

def test_confusion_matrix(trained):
    interp = ClassificationInterpretation.from_learner(trained)
    p, y = trained.get_preds()
    want = torch.zeros(len(trained.dls.spec.labels), len(trained.dls.spec.labels), dtype=torch.int64)
    for a, b in zip(y, p.argmax(1)): want[a, b] += 1
    assert (interp.confusion_matrix() == want.numpy()).all() and list(interp.vocab) == trained.dls.spec.labels
    assert sum(n for *_, n in interp.most_confused()) == (p.argmax(1) != y).sum()

def test_show_results(trained):
    plt.close('all')
    trained.show_results(max_n=3, shuffle=False)
    p, _ = trained.get_preds()
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    want = [f'{s} → {trained.dls.spec.labels[i]}' for s, i in zip(trained.dls.valid.items.sirna, p.argmax(1))]
    assert len(titles) == 3 and all(w in t for w, t in zip(want, titles))

class FirstChannels(ImageSource):
    "The first `n` channels of a screen, which begin again after the last"
    def __init__(self, screen, n):
        super().__init__(screen.source.root, screen.table, [f'c{i}' for i in range(n)])
        self.source, self.shape, self.dtype = screen.source, (n, *screen.source.shape[1:]), screen.source.dtype
    def _read(self, site_id, out): out[...] = self.source[site_id][np.arange(len(self.channels)) % 6]

@pytest.mark.parametrize('channels', [1, 4, 5, 6, 8])
def test_other_channel_counts(screen, channels, tmp_path):
    "Nothing of this counts to six"
    dls = screen_dls(Screen(screen.table, FirstChannels(screen, channels)), bs=8, augs=None, device='cpu', valid='HUVEC-02')
    learn = screen_learner(dls, 'test_efficientnet', emb_dim=16, pretrained=None, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
        learn.fine_tune(1, 1e-2)
        assert learn.predict(dls.valid.items.iloc[0])[2].shape == (len(dls.spec.labels),)
        interp = Interpretation.from_learner(learn)
        for how in ('3d+3d', 'composite', 'panels'):
            for show in (partial(dls.show_batch, max_n=2), partial(learn.show_results, max_n=2), partial(interp.plot_top_losses, 2)):
                plt.close('all')
                show(how=how)
                axs = [ax for ax in plt.gcf().axes if ax.images]
                h, w = axs[0].images[0].get_array().shape[:2]
                columns = {'3d+3d': -(-channels//3), 'composite': 1, 'panels': min(channels, 3)}[how]
                assert len(axs) == 2 and w == 32*columns + columns - 1 and h == (32 if how != 'panels' else 33*-(-channels//3) - 1)
                if how == 'panels': assert [t.get_text() for t in axs[0].texts] == [f'c{i}' for i in range(channels)]
    plt.close('all')


def tfms(learn): return [type(f).__name__ for f in learn.dls.train.after_batch.fs]
NOTHING = Recipe('nothing', [Stage('a', 0, 1e-3, augs=dict(max_rotate=0, max_zoom=1, max_warp=0))])

def test_a_recipe_does_not_replace_your_own_augmentation(screen):
    for augs in (None, []):
        learn = screen_learner(screen_dls(screen, bs=8, augs=augs, device='cpu', valid='HUVEC-02'), 'test_resnet', pretrained=None, emb_dim=16)
        before = tfms(learn)
        quietly(learn, lambda: learn.fit_recipe(NOTHING))
        assert tfms(learn) == before and 'SiteDihedral' not in before
    for augs in ('default', dict(max_rotate=45)):
        learn = screen_learner(screen_dls(screen, bs=8, augs=augs, device='cpu', valid='HUVEC-02'), 'test_resnet', pretrained=None, emb_dim=16)
        assert 'SiteAffine' in tfms(learn)
        quietly(learn, lambda: learn.fit_recipe(NOTHING))
        assert 'SiteAffine' not in tfms(learn) and 'SiteDihedral' in tfms(learn)

@pytest.mark.parametrize('augs', [dict(max_rotat=0), dict(size=16), ['flip'], 5, dict(max_rotate='a lot')], ids=str)
def test_augmentation_of_any_stage_is_checked_before_the_first(screen, augs):
    learn = make(screen)
    before = kept(learn)
    with pytest.raises(ScreenError, match='Stage 2 of the recipe'): learn.fit_recipe(Recipe('r', [Stage('a', 1, 1e-3), Stage('b', 1, 1e-3, augs=augs)]))
    assert not moved(learn, before)

def test_a_training_begun_in_half_precision_goes_on_in_full(screen, tmp_path):
    class Stop(Callback):
        order = 90
        def before_train(self):
            if self.epoch == 1 and on: raise KeyboardInterrupt
    recipe = Recipe('two', [Stage('a', 2, 1e-3)])
    for on, cbs in ((True, [MixedPrecision(AMPMode.BF16)]), (False, [])):
        learn = screen_learner(screen_dls(screen, bs=8, device='cpu', valid='HUVEC-02'), 'test_resnet', pretrained=None, emb_dim=16)
        fit = lambda: learn.fit_recipe(recipe, cbs=[*cbs, Stop()], folder=tmp_path/'c', resume=not on)
        if not on: quietly(learn, fit)
        else:
            with pytest.raises(KeyboardInterrupt): quietly(learn, fit)
    assert len(learn.history) == 2
