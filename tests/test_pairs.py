"Batches of pairs, and what mixes or compares pairs: partners are of one siRNA and two experiments, whatever the screen looks like."
import random
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback
from helpers import learner, quiet, refused
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.batch.loader import PairBatches, pair_up
from rcic_fastai.core import ScreenError
from rcic_fastai.train.cutmix import LISA, CutMix, lisa_partners
from rcic_fastai.train.domain import Contrast, ControlBatches, MixStyle, contrast, mix_style
from rcic_fastai.train.recipes import RECIPES, Recipe, Stage, check_batches, check_recipe, recipe_from_dict, stage_callback

PAIRS = dict(batch_by='pairs')

@pytest.mark.parametrize('seed', range(30))
def test_every_sample_comes_and_partners_are_of_two_experiments(seed):
    rng = random.Random(seed)
    groups = [rng.choice('abcd'[:rng.randint(1, 4)]) for _ in range(rng.randint(1, 12))]
    pairs = pair_up(groups, rng)
    assert {i for p in pairs for i in p} == set(range(len(groups)))
    most = max(map(groups.count, groups))
    assert len(pairs) == (max(-(-len(groups)//2), most) if len(set(groups)) > 1 else -(-len(groups)//2))
    if len(set(groups)) > 1: assert all(groups[i] != groups[j] for i, j in pairs)

def test_pairs_differ_between_epochs_and_not_between_seeds():
    a = [pair_up('aabbcc', random.Random(s)) for s in (0, 0, 1)]
    assert a[0] == a[1] != a[2]

@pytest.mark.parametrize('world', [1, 2, 4])
def test_each_process_has_whole_pairs(world):
    labels, groups = np.repeat(np.arange(12), 6), np.tile(list('aabbcc'), 12)
    pb = PairBatches(labels, groups, 16)
    order = pb.order(random.Random(3))
    assert len(order) == len(pb)*16 and len(set(order)) == len(order)
    for k in range(0, len(order), 16):
        for rank in range(world):
            mine = order[k + rank:k + 16:world]                       # as `ShardedDL.get_idxs` takes them
            for i, j in zip(mine[:len(mine)//2], mine[len(mine)//2:]): assert labels[i] == labels[j] and groups[i] != groups[j]

def test_few_pairs_fill_one_batch():
    pb = PairBatches([0, 0, 1, 1], list('abab'), 16)
    order = pb.order(random.Random(0))
    assert len(pb) == 1 and len(order) == 16 and set(order) == {0, 1, 2, 3}

def test_the_loader(screen):
    dls = screen_dls(screen, valid='HUVEC-03', bs=8, augs=None, device='cpu', seed=1, **PAIRS)
    seen = []
    for *_, e, y in dls.train:
        assert torch.equal(y[:4], y[4:]) and (e[:4] != e[4:]).all()
        seen.append(len(y))
    assert seen == [8]*len(dls.train) and dls.train.new(shuffle=False)._by_group is None
    assert sum(len(b[0]) for b in dls.valid) == len(dls.valid_ds)
    again = screen_dls(screen, valid='HUVEC-03', bs=8, augs=None, device='cpu', seed=1, **PAIRS)
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(again.train, screen_dls(screen, valid='HUVEC-03', bs=8, augs=None, device='cpu', seed=1, **PAIRS).train))

@pytest.mark.parametrize('kwargs, words', [(dict(bs=7), 'an even number'), (dict(batch_groups=2), 'of pairs'), (dict(valid=['HUVEC-02', 'HUVEC-03']), 'all samples are of HUVEC-01')])
def test_what_cannot_be_paired_is_refused(screen, kwargs, words):
    refused(lambda: screen_dls(screen, **{**dict(valid='HUVEC-03', bs=8, device='cpu'), **PAIRS, **kwargs}), words)

def test_labels_of_one_experiment_each_are_refused():
    refused(lambda: PairBatches([0, 0, 1, 1], list('aabb'), 4), 'no label is in two experiments')

# LISA

@pytest.mark.parametrize('same', [True, False])
@pytest.mark.parametrize('seed', range(10))
def test_partners_fit(seed, same):
    rng = np.random.default_rng(seed)
    y, e = (torch.from_numpy(rng.integers(n, size=20)) for n in (6, 4))
    p = lisa_partners(y, e, torch.from_numpy(rng.random((20, 20))), same)
    for i, j in enumerate(p.tolist()):
        fits = lambda j: e[i] > 0 and e[j] > 0 and ((y[i] == y[j] and e[i] != e[j]) if same else (y[i] != y[j] and e[i] == e[j]))
        assert fits(j) if any(fits(k) for k in range(20)) else j == i

def test_all_partners_are_drawn_alike():
    y, e = torch.zeros(5, dtype=int), torch.tensor([1, 2, 3, 4, 1])
    rng = np.random.default_rng(0)
    drawn = [lisa_partners(y, e, torch.from_numpy(rng.random((5, 5)).astype(np.float32)))[0].item() for _ in range(600)]
    n = np.bincount(drawn, minlength=5)
    assert n[[0, 4]].sum() == 0 and (abs(n[1:4] - 200) < 45).all()

class Watch(Callback):
    "Keeps what the model was given, and how often the loss was asked"
    order = 1000
    def before_batch(self):
        if self.training: self.last = (self.xb[0].clone(), self.yb[0].clone())

@pytest.mark.parametrize('how', ['cutmix', 'mixup'])
def test_the_loss_is_that_of_the_labels(screen, how):
    "No label is mixed, so the loss is the plain one of the mixed pictures"
    dls = screen_dls(screen, valid='none', bs=8, augs=None, device='cpu', **PAIRS)
    learn, watch, losses = learner(dls, loss='arcface'), Watch(), []
    class Compare(Callback):
        order = LISA.order + 1
        def after_loss(self):
            if not self.training: return
            assert self.lisa.by_label and self.lisa.lam is not None
            losses.append((self.loss_grad.item(), self.loss_func(self.pred, *self.yb).item()))
    quiet(learn, lambda: learn.fit(1, 0., cbs=[LISA(how, p=1., seed=0), watch, Compare()]))
    assert losses and all(a == b for a, b in losses)

def test_a_batch_is_mixed_once_and_both_shares_hold(screen):
    dls = screen_dls(screen, valid='none', bs=8, augs=None, device='cpu', **PAIRS)
    seen = []
    class Count(Callback):
        order = CutMix.order + 10
        def before_batch(self):
            if self.training: seen.append((self.lisa.lam is not None, self.cut_mix.lam is not None))
    learn = learner(dls)
    quiet(learn, lambda: learn.fit(30, 0., cbs=[CutMix(p=.5, seed=1), LISA(p=.5, seed=2), Count()]))
    n = np.array(seen)
    assert not (n[:, 0] & n[:, 1]).any() and n[:, 0].any() and n[:, 1].any()

def test_batches_that_are_not_mixed_are_left_alone(screen):
    "Also the first one, before anything was drawn"
    learn = learner(screen_dls(screen, valid='none', bs=8, augs=None, device='cpu', **PAIRS))
    quiet(learn, lambda: learn.fit(1, 0., cbs=LISA(p=0., seed=0)))
    assert np.isfinite(learn.recorder.losses).all()

def test_other_batches_are_refused_before_the_first(screen):
    for cb in (LISA(seed=0), Contrast()):
        learn = learner(screen_dls(screen, valid='none', bs=8, device='cpu'))
        with pytest.raises(ScreenError, match="batch_by='pairs'"): quiet(learn, lambda: learn.fit(1, cbs=cb))
        assert not learn.recorder.losses
    learn = learner(screen_dls(screen, valid='none', bs=8, device='cpu', batch_by='experiment'))
    quiet(learn, lambda: learn.fit(1, 0., cbs=LISA(same=0., p=1., seed=0)))           # partners of the same experiment are there

# Contrast and MixStyle

@pytest.mark.parametrize('seed', range(5))
def test_contrast_does_not_see_replicates_of_its_own_experiment(seed):
    g = torch.Generator().manual_seed(seed)
    z, y, e = torch.randn(8, 6, generator=g), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), torch.tensor([1, 1, 2, 1, 2, 1, 2, 1])
    near = z.clone()
    near[1] = z[0]                                                                    # the replicate of sample 0 moves onto it
    only = lambda z: contrast(z[[0, 2, 3, 5]], y[[0, 2, 3, 5]], e[[0, 2, 3, 5]])
    assert torch.isfinite(contrast(near, y, e)) and only(z) == only(near)

def test_contrast_pulls_experiments_together(screen):
    "In batches of pairs, a few steps on one batch bring partners nearer and leave others"
    torch.manual_seed(0)
    z, y, e = torch.randn(16, 8, requires_grad=True), torch.arange(8).repeat(2), torch.tensor([1]*8 + [2]*8)
    opt = torch.optim.SGD([z], 1.)
    def near(z):
        u = torch.nn.functional.normalize(z.detach(), dim=1)
        return (u[:8]*u[8:]).sum(1).mean().item()
    before = near(z)
    for _ in range(50):
        loss = contrast(z, y, e); opt.zero_grad(); loss.backward(); opt.step()
    assert near(z) > max(before + .3, .6)

@pytest.mark.parametrize('sites', [1, 2])
def test_style_of_another_experiment_in_training_only(screen, sites):
    dls = screen_dls(screen, valid='HUVEC-03', bs=8, sites=sites, augs=None, device='cpu')
    learn, cb = learner(dls), MixStyle(p=1., seed=0)
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=cb))
    assert np.isfinite(learn.recorder.losses).all()
    assert not any(m._forward_hooks for m in learn.model.body.modules()) and not cb.hooks

def test_mixed_statistics_are_those_of_the_mixture():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 5, 7, generator=g, dtype=torch.float64)*3 + 1
    p, lam = torch.tensor([3, 4, 5, 0, 1, 2]), torch.rand(6, generator=g, dtype=torch.float64)
    y = mix_style(x, p, lam)
    l = lam.view(-1, 1)
    assert torch.allclose(y.mean((2, 3)), l*x.mean((2, 3)) + (1 - l)*x[p].mean((2, 3)), atol=1e-6)
    assert torch.allclose(y.std((2, 3)), l*x.std((2, 3)) + (1 - l)*x[p].std((2, 3)), atol=1e-5)

# In recipes

def test_a_recipe_that_lacks_pairs_is_refused_before_it_is_trained():
    for c in ('lisa', 'contrast', {'name': 'lisa', 'p': 1.}):
        refused(lambda: check_batches(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[c])])), 'batch_by be pairs')
        check_batches(check_recipe(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[c])], data=dict(batch_by='pairs'))))
    check_batches(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[{'name': 'lisa', 'same': 0.}, 'mixstyle'])], data=dict(batch_by='experiment', batch_groups=2)))
    refused(lambda: check_batches(Recipe('r', [Stage('a', 1, 1e-3, callbacks=['mixstyle'])], data=dict(batch_by='experiment'))), 'nothing to mix')
    r = Recipe('r', [Stage('a', 1, 1e-3, callbacks=({'name': 'lisa', 'how': 'mixup'}, {'name': 'contrast', 'temperature': .2}))], data=dict(batch_by='pairs'))
    assert recipe_from_dict(r.to_dict()) == r
    assert stage_callback({'name': 'lisa', 'how': 'mixup'}, seed=4).seed == 4
    for odd in ({'name': 'lisa', 'how': 'box'}, {'name': 'lisa', 'same': '1'}, {'name': 'contrast', 'temperature': -1.}, {'name': 'mixstyle', 'depth': 0.}):
        with pytest.raises(ScreenError): check_recipe(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[odd])], data=dict(batch_by='pairs')))

# Controls in every batch

def test_controls_change_the_statistics_and_not_the_loss(with_controls):
    "BatchNorm sees wells and controls; the loss is that of the wells in such a batch, by hand"
    from rcic_fastai.screen.open import open_screen
    dls = screen_dls(open_screen(with_controls), valid='none', bs=4, batch_by='experiment', augs=None, device='cpu')
    learn, seen = learner(dls, loss='arcface', dropout=0.), []
    class Hand(Callback):
        order = ControlBatches.order + 1
        def before_batch(self): self.given, self.was = [o.clone() for o in self.xb], self.model.training
        def after_loss(self):
            assert self.was
            pred = self.model(*self.given)                                # statistics of the whole batch, again
            seen.append((self.loss.item(), self.loss_func(pred[:4], *self.yb).item(), self.loss_func(self.model(*(o[:4] for o in self.given)), *self.yb).item(), len(pred)))
    quiet(learn, lambda: learn.fit(1, 0., cbs=[ControlBatches(2, seed=0), Hand()]))
    a, by_hand, without, n = map(np.array, zip(*seen))
    assert np.allclose(a, by_hand, atol=1e-4) and not np.allclose(a, without, atol=1e-4) and (n == 6).all()

def test_what_controls_need_is_said(with_controls, screen):
    from rcic_fastai.screen.open import open_screen
    whole = open_screen(with_controls)
    bare = whole[whole.table[whole.table.well_type == 'treatment']]
    for dls, kwargs, words in ((screen_dls(bare, valid='none', bs=4, batch_by='experiment', device='cpu'), {}, 'no negative control'),
                               (screen_dls(whole, valid='none', bs=4, batch_by='experiment', batch_groups=2, device='cpu'), {}, "batch_by='experiment'"),
                               (screen_dls(whole, valid='none', bs=4, batch_by='experiment', device='cpu'), dict(metadata='cell_type'), 'mixed metadata')):
        learn = learner(dls, **kwargs)
        with pytest.raises(ScreenError, match=words): quiet(learn, lambda: learn.fit(1, cbs=[ControlBatches(), *([CutMix()] if kwargs else [])]))
    for data in ({}, dict(batch_by='pairs'), dict(batch_by='experiment', batch_groups=2)):
        refused(lambda: check_batches(Recipe('r', [Stage('a', 1, 1e-3, callbacks=['control_batches'])], data=data)), 'batches of one experiment')

def test_predictions_take_controls_where_the_index_did(with_controls, tmp_path):
    from rcic_fastai.folder import load_model
    from rcic_fastai.predict.plan import plan_prediction
    from rcic_fastai.workflow import train_screen
    r = Recipe('c', [Stage('a', 1, 1e-3, callbacks=[{'name': 'control_batches', 'n': 2}])], arch='test_efficientnet', model=dict(pretrained=None, emb_dim=16),
               data=dict(bs=4, batch_by='experiment'), index=dict(with_controls=True, tta=1), predict=dict(search='auto'))
    train_screen(with_controls, tmp_path/'m', r, valid='HUVEC-02', device='cpu')
    again = load_model(tmp_path/'m')
    assert set(again.adapted_index.labels.batchnorm) == {'experiment and controls'} and set(again.adapted_index.labels.well_type) == {'treatment'}
    plan = plan_prediction(again, with_controls, 'adapted')
    assert set(plan.options.adapt_rows.well_type) == {'treatment', 'negative_control', 'positive_control'} and set(plan.screen.table.well_type) == {'treatment'}
    assert len(again.predict(with_controls, 'adapted', tta=1, progress=False)) == 8
    from rcic_fastai.screen.open import open_screen
    whole = open_screen(with_controls)
    bare = whole[whole.table[whole.table.well_type == 'treatment']]
    assert [sum(f'no {kind} control' in n for n in plan_prediction(again, bare, 'adapted').notes) for kind in ('negative', 'positive')] == [1, 1]
    some = whole[whole.table[whole.table.well_type != 'positive_control']]
    assert [sum(f'no {kind} control' in n for n in plan_prediction(again, some, 'adapted').notes) for kind in ('negative', 'positive')] == [0, 1]

def test_models_that_were_adapted_with_negative_controls_alone_stay_so(with_controls, tmp_path):
    "As version 0.2 wrote them, and as a screen without positive controls makes them"
    from rcic_fastai.folder import load_model
    from rcic_fastai.predict.plan import plan_prediction
    from rcic_fastai.screen.open import open_screen
    from rcic_fastai.workflow import train_screen
    whole = open_screen(with_controls)
    some = whole[whole.table[whole.table.well_type != 'positive_control']]
    r = Recipe('c', [Stage('a', 1, 1e-3)], arch='test_efficientnet', model=dict(pretrained=None, emb_dim=16), data=dict(bs=4), index=dict(with_controls=True, tta=1))
    train_screen(some, tmp_path/'m', r, valid='HUVEC-02', device='cpu')
    again = load_model(tmp_path/'m')
    assert set(again.adapted_index.labels.batchnorm) == {'experiment and negative controls'}
    assert set(plan_prediction(again, whole, 'adapted').options.adapt_rows.well_type) == {'treatment', 'negative_control'}

def test_controls_are_taken_by_themselves_where_many_differ(tmp_path):
    "As `best` does: index and queries alike, and a few wells of a new experiment are no reason for a note then"
    from dataclasses import replace
    from helpers import simulate_screen
    from rcic_fastai.folder import load_model
    from rcic_fastai.predict.plan import plan_prediction
    from rcic_fastai.screen.open import open_screen
    from rcic_fastai.workflow import train_screen
    small = replace(RECIPES['best'], stages=[Stage('a', 1, 1e-3)], arch='test_efficientnet', model=dict(pretrained=None, emb_dim=16))
    kinds = {}
    for n in (2, 20, 30):
        simulate_screen(tmp_path/f's{n}', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=n, sites=1, progress=False)
        screen = open_screen(tmp_path/f's{n}')
        train_screen(screen, tmp_path/f'm{n}', small, valid='none', bs=4, device='cpu')
        model = load_model(tmp_path/f'm{n}')
        plan = plan_prediction(model, screen, 'adapted')
        kinds[n] = set(model.adapted_index.labels.batchnorm), set(plan.options.adapt_rows.well_type)
        assert not any('BatchNorm statistics of' in o for o in plan.notes) and set(plan.screen.table.well_type) == {'treatment'}
        assert set(model.adapted_index.labels.well_type) == {'treatment'} and len(model.predict(screen, 'adapted', tta=1, progress=False)) == 8
        assert plan_prediction(model, screen, 'inductive').options.adapt_rows is None
    assert kinds == {2: ({'experiment'}, {'treatment'}), 20: ({'experiment'}, {'treatment'}), 30: ({'experiment and controls'}, {'treatment', 'negative_control', 'positive_control'})}

def test_what_an_index_with_controls_needs_is_said(with_controls, tmp_path):
    from rcic_fastai.predict.trained import build_index
    from rcic_fastai.screen.open import open_screen
    whole = open_screen(with_controls)
    bare = whole[whole.table[(whole.table.well_type == 'treatment') | (whole.table.experiment != 'HUVEC-01')]]
    refused(lambda: build_index(learner(screen_dls(bare, valid='none', bs=4, device='cpu')), with_controls=True, progress=False), 'HUVEC-01 has no control well', 'with_controls=True')
    split = whole[whole.table[(whole.table.well_type == 'treatment') | ((whole.table.well_type == 'negative_control') == (whole.table.experiment == 'HUVEC-01'))]]
    refused(lambda: build_index(learner(screen_dls(split, valid='none', bs=4, device='cpu')), with_controls=True, progress=False), 'No kind of control wells is in every experiment')
    refused(lambda: build_index(learner(screen_dls(whole, valid='none', bs=4, device='cpu')), with_controls='no', progress=False), "with_controls='no'", 'choose from')
    refused(lambda: recipe_from_dict({**RECIPES['best'].to_dict(), 'index': dict(with_controls='some')}), "with_controls='some'", 'true, false or auto')

# A model that is continued

def test_experiments_that_the_model_does_not_know_are_not_taken_for_one(screen):
    "Its vocabulary is kept, in which new experiments are all unknown: each method says so, by itself and before a training"
    from rcic_fastai.train.domain import CORAL, GroupDRO
    from rcic_fastai.train.recipes import check_known
    known = screen_dls(screen[screen.table[screen.table.experiment != 'HUVEC-01']], valid='none', bs=4, device='cpu').spec.vocabs
    def dls(**kwargs): return screen_dls(screen, valid='HUVEC-03', vocabs=known, bs=4, device='cpu', **kwargs)
    for name, cb, data in (('lisa', LISA(p=1.), PAIRS), ('contrast', Contrast(), PAIRS), ('mixstyle', MixStyle(), {}), ('coral', CORAL(), {}), ('groupdro', GroupDRO(), {}),
                           ('control_batches', ControlBatches(), dict(batch_by='experiment'))):
        made = dls(**data)
        learn = learner(made)
        with pytest.raises(ScreenError, match='never learned of HUVEC-01'): quiet(learn, lambda: learn.fit(1, cbs=[cb]))
        refused(lambda: check_known(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[name])]), made), f'{name} needs to know the experiment', 'HUVEC-01')
        check_known(Recipe('r', [Stage('a', 1, 1e-3, callbacks=[name])]), made.rebuild(vocabs=None))
    check_known(Recipe('r', [Stage('a', 1, 1e-3)]), made)

def test_controls_have_a_style_of_their_own(with_controls):
    "Both together: partners are drawn of all samples of the batch, controls included"
    from rcic_fastai.screen.open import open_screen
    s = open_screen(with_controls)
    dls = screen_dls(s[s.table.assign(plate_group=pd.array([1, 2]*(len(s)//2) + [1]*(len(s) % 2), 'Int64'))], valid='none', bs=4, batch_by='experiment', augs=None, device='cpu')
    for n in (2, 4):
        learn, cb = learner(dls), MixStyle(p=1., by='plate_group', seed=0)
        quiet(learn, lambda: learn.fit(1, 1e-3, cbs=[cb, ControlBatches(n, seed=0)]))
        assert np.isfinite(learn.recorder.losses).all() and not cb.hooks

def test_controls_that_lack_are_told_before_a_training(with_controls, tmp_path):
    "Also of an experiment that has neither the most nor the fewest wells"
    from rcic_fastai.screen.open import open_screen
    from rcic_fastai.workflow import train_screen
    whole = open_screen(with_controls)
    t = whole.table.assign(dataset='train')
    wells = {e: n for e, n in zip(sorted(t.experiment.unique()), (8, 7, 6))}
    kept = [w for e, n in wells.items() for w in t[(t.experiment == e) & (t.well_type == 'treatment')].well_id.unique()[:n]]
    middle = sorted(wells)[1]
    rows = t[t.well_id.isin(kept) | (t.well_type != 'treatment') & (t.experiment != middle)]
    r = Recipe('c', [Stage('a', 1, 1e-3)], arch='test_efficientnet', model=dict(pretrained=None, emb_dim=16), data=dict(bs=4), index=dict(with_controls=True, tta=1))
    refused(lambda: train_screen(whole[rows], tmp_path/'m', r, valid='none', device='cpu'), f'{middle} has no control well')
    assert not list(tmp_path.iterdir())

def test_controls_without_pictures_are_left_out(tmp_path, capsys):
    "A download of the treated wells alone: `best` trains and adapts without the others, and says so"
    from dataclasses import replace
    from helpers import simulate_screen
    from rcic_fastai.folder import load_model
    from rcic_fastai.screen.open import open_screen
    from rcic_fastai.workflow import train_screen
    small = replace(RECIPES['best'], stages=[Stage('a', 1, 1e-3)], arch='test_efficientnet', model=dict(pretrained=None, emb_dim=16))
    simulate_screen(tmp_path/'s', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=30, sites=1, progress=False)
    screen = open_screen(tmp_path/'s')
    gone = screen.table[(screen.table.well_type == 'positive_control') & screen.table.experiment.isin(['HUVEC-01', 'HUVEC-17'])]
    for r in gone.itertuples():
        for f in (tmp_path/'s').rglob(f'{r.experiment}/Plate{r.plate}/{r.well}_s{r.site}_*'): f.unlink()
    screen = open_screen(tmp_path/'s', check=False)
    train_screen(screen, tmp_path/'m', small, valid='none', bs=4, device='cpu')
    said = capsys.readouterr()
    assert 'sites of control wells, for BatchNorm statistics, have no pictures' in said.out and 'HUVEC-01 of 2 experiments has fewer than 30 different controls' in said.err
    model = load_model(tmp_path/'m')
    assert set(model.adapted_index.labels.batchnorm) == {'experiment'} and len(model.predict(screen, 'adapted', tta=1, progress=False)) == 8
    simulate_screen(tmp_path/'w', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=30, sites=1, progress=False)
    train_screen(tmp_path/'w', tmp_path/'n', small, valid='none', bs=4, device='cpu')
    from rcic_fastai.predict.plan import plan_prediction
    plan = plan_prediction(load_model(tmp_path/'n'), screen, 'adapted', tta=1)
    assert any('30 sites of control wells without pictures' in o for o in plan.notes) and set(plan.options.adapt_rows.well_type) == {'treatment', 'negative_control'}
