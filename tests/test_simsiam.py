"A start without labels: which wells it sees, what stays as it was, resumed to the same weights, and what it makes of the protocol."
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback
from helpers import learner, quiet, refused, same, simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.protocol import row_protocols
from rcic_fastai.screen.open import open_screen
from rcic_fastai.train.recipes import Recipe, Stage, recipe_from_dict
from rcic_fastai.train.simsiam import SimSiamHead, TwoViews, site_dls
from rcic_fastai.workflow import train_screen

TWO = Recipe('two', [Stage('two', 2, 3e-3, cutmix=.5, loss='adacos', keep_best='accuracy', callbacks=['ema'])])


@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    d = tmp_path_factory.mktemp('simsiam')/'s'
    simulate_screen(d, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, plates=1, controls=2, size=32, test=['HUVEC-17'], n_workers=0, progress=False)
    return open_screen(d)


def dls_of(screen, **kw): return screen_dls(screen, **{**dict(valid='HUVEC-02', bs=8, device='cpu'), **kw})


class Seen(Callback):
    "Notes the experiments and pictures that are trained on"
    def before_fit(self): self.rows, self.shapes, self.valid = self.dls.train.items, set(), self.dls.valid.n
    def after_pred(self): self.shapes.add(tuple(self.xb[0].shape))


def test_wells_without_labels_count_and_held_out_ones_do_not(screen):
    t = screen.table
    some = t.well_id.isin(t.well_id[(t.experiment == 'HUVEC-01') & (t.well_type == 'treatment')].unique()[:2])
    bare = screen[t.assign(sirna=t.sirna.mask(some), sirna_id=t.sirna_id.mask(some))]
    learn, seen = learner(dls_of(bare)), Seen()
    classifier, loss = learn.model.classifier, learn.model.loss
    start = {k: v.clone() for k, v in learn.model.state_dict().items()}
    quiet(learn, lambda: learn.pretrain_simsiam(TWO, cbs=seen))
    assert set(seen.rows.site_id) == set(t.site_id[t.experiment == 'HUVEC-01']) > set(learn.dls.train.items.site_id)
    assert seen.valid == 0 and all(s[0] % 2 == 0 for s in seen.shapes)
    assert learn.model.classifier is classifier and learn.model.loss is loss and learn.loss_func is loss and learn.model.use_metadata
    now = learn.model.state_dict()
    assert torch.equal(now['classifier.weight'], start['classifier.weight']) and not same({k: v for k, v in now.items() if k.startswith('body')}, {k: v for k, v in start.items() if k.startswith('body')})
    assert learn.model.trained_experiments == ('HUVEC-01',) and learn.model.pseudo_experiments == ()
    assert set(row_protocols(learn.model, learn.dls.spec, t, trained=['HUVEC-01'])) == {'inductive'}
    quiet(learn, lambda: learn.fit_recipe(Recipe('one', [Stage('one', 1, 3e-3)])))


def test_test_wells_make_it_transductive(screen):
    learn, seen, t = learner(dls_of(screen)), Seen(), screen.table
    quiet(learn, lambda: learn.pretrain_simsiam(TWO, cbs=seen, test=True))
    assert set(seen.rows.experiment) == {'HUVEC-01', 'HUVEC-17'}
    assert (learn.model.trained_experiments, learn.model.pseudo_experiments) == (('HUVEC-01',), ('HUVEC-17',))
    protocols = pd.Series(row_protocols(learn.model, learn.dls.spec, t, trained=['HUVEC-01']), t.experiment).groupby(level=0).unique()
    assert protocols.map(list).to_dict() == {'HUVEC-01': ['inductive'], 'HUVEC-02': ['inductive'], 'HUVEC-17': ['transductive']}


@pytest.mark.parametrize('how', [dict(sites=2, bs=4), dict(norm='global'), dict(norm='plate'), dict(valid='plates')])
def test_other_batches(screen, how):
    if how.get('valid') == 'plates': screen = screen[screen.table.assign(plate=np.where(screen.table.well_id.str[-1].astype(int) % 2, 1, 2))]
    dls = dls_of(screen, **how)
    mine = site_dls(dls)
    assert (mine.spec.norm_mean, mine.spec.vocabs, mine.spec.sites) == (dls.spec.norm_mean, dls.spec.vocabs, dls.spec.sites)
    assert not dls.is_held(mine.train.items).any()
    learn = learner(dls)
    quiet(learn, lambda: learn.pretrain_simsiam(Recipe('one', [Stage('one', 1, 1e-3)])))
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_resumed_to_the_same_weights(screen, tmp_path):
    class BreakOff(Callback):
        at = None
        def before_batch(self):
            if self.epoch == self.at and self.iter == 1: raise KeyboardInterrupt
    def train(cb, **kwargs):
        learn = learner(dls_of(screen, bs=4), stem='bag')
        quiet(learn, lambda: learn.pretrain_simsiam(Recipe('r', [Stage('a', 3, 3e-3, callbacks=['channel_sampling'])], model=dict(stem='bag')), seed=2, cbs=cb, **kwargs))
        return dict(learn.model.state_dict())
    whole, BreakOff.at = train(BreakOff()), 2                # of the class: a checkpoint would bring it back to the callback
    with pytest.raises(KeyboardInterrupt): train(BreakOff(), folder=tmp_path/'cp')
    BreakOff.at = None
    assert same(train(BreakOff(), folder=tmp_path/'cp', resume=True), whole)


def test_a_collapse_ends_it(screen):
    class Same(Callback):
        def before_batch(self): self.learn.xb = (self.xb[0]*0, *self.xb[1:])
    learn = learner(dls_of(screen))
    with pytest.raises(ScreenError, match='all embeddings are the same.*lower the learning rate'): quiet(learn, lambda: learn.pretrain_simsiam(TWO, cbs=Same()))
    assert learn.model.classifier.n_classes == 4 and not isinstance(learn.model.classifier, SimSiamHead)


def test_views_differ_and_keep_their_order(screen):
    "The second half of a batch are other views of the first, item by item"
    learn = learner(dls_of(screen, augs=None))
    x = torch.zeros(4, 6, 32, 32) + torch.arange(4.)[:, None, None, None]*10
    cb = TwoViews(min_scale=1.)
    learn.xb, cb.learn = (x + torch.rand_like(x), torch.arange(4)), learn
    cb.before_batch()
    a, b = learn.xb[0].chunk(2)
    assert learn.xb[1].tolist() == [0, 1, 2, 3]*2 and not torch.allclose(a, b)
    for half in (a, b): assert (half.mean((1, 2, 3)).argsort() == torch.arange(4)).all()


def test_from_the_command_to_the_folder(screen, tmp_path):
    how = dict(recipe='demo', arch='test_efficientnet', pretrained='no', epochs=1, valid='HUVEC-02', tta=1, bs=8)
    m = train_screen(screen, tmp_path/'m', pretrain='simsiam', **how)
    assert m.config['pretrain'] == 'simsiam' and m.config['pretrain_stages'] and set(m.model.trained_experiments) == {'HUVEC-01'}
    assert not list(tmp_path.glob('*checkpoints*'))
    m.predict(screen, tta=1, progress=False)
    seen = train_screen(screen, tmp_path/'seen', pretrain='simsiam_test', **how)
    refused(lambda: seen.predict(screen, 'inductive', tta=1, progress=False), 'transductive')
    assert len(seen.predict(screen, 'transductive', tta=1, progress=False))
    bare = screen[screen.table[screen.table.dataset != 'test']]
    refused(lambda: train_screen(bare, tmp_path/'bare', pretrain='simsiam_test', **how), 'the screen has none')
    refused(lambda: train_screen(screen, tmp_path/'odd', pretrain='simclr', **how), 'choose from controls, simsiam, simsiam_test')
    refused(lambda: recipe_from_dict(dict(name='r', stages=[], pretrain='dino')), 'choose from controls, simsiam')
