"Control wells in training: what stays and what is new, who is measured and when, similarities against a loop, bad input."
import random, tempfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback, Learner
from hypothesis import given, settings, strategies as st
from helpers import learner, quiet, same, simulate_screen
from rcic_fastai.train.controls import *
from rcic_fastai.train.cutmix import CutMix
from rcic_fastai.train.domain import EMA
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.model.heads import MixedMeta
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.predict.predict import predict_wells
from rcic_fastai.embed.table import *
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.screen.open import open_screen

ARCH = 'test_efficientnet'
ONE = Recipe('one', [Stage('one', 1, 3e-3)])

@pytest.fixture(scope='module')
def screen():
    with tempfile.TemporaryDirectory() as d:
        simulate_screen(Path(d)/'s', ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02', 'HUVEC-17'], sirnas=4, plates=2, controls=2, size=32, test=['HUVEC-17'],
                        n_workers=0, progress=False)
        yield open_screen(Path(d)/'s')

def dls_of(screen, table=None, valid='HUVEC-02,RPE-02', **kw):
    return screen_dls(screen if table is None else screen[table], valid=valid, bs=8, device='cpu', **kw)

def weights(model, without=()): return {k: v.clone() for k, v in model.state_dict().items() if k.split('.')[0] not in without}

class Seen(Callback):
    "Notes what is trained and validated on"
    def before_fit(self): self.train, self.valid, self.spec = self.dls.train.items, self.dls.valid.items, self.dls.spec

# ---- control rows

def test_control_rows(screen):
    t = screen.table
    assert set(control_rows(t, 'negative').control) == {'EMPTY'} and len(set(control_rows(t, 'positive').control)) == 2
    assert len(control_rows(t)) == len(control_rows(t, 'negative')) + len(control_rows(t, 'positive')) == (t.well_type != 'treatment').sum()
    nameless = t.assign(sirna=t.sirna.mask(t.well_type == 'negative_control'))
    assert set(control_rows(nameless, 'negative').control) == {'negative_control'}
    with pytest.raises(ScreenError, match="controls='best' is not known"): control_rows(t, 'best')
    with pytest.raises(ScreenError, match='no column sirna'): control_rows(t.drop(columns='sirna'))

def test_control_dls_hold_controls_only_and_hold_out_the_same(screen):
    dls = dls_of(screen, size=24, norm='none')
    c = control_dls(dls)
    assert set(c.spec.labels) == set(control_rows(screen.table).control) and c.held_out == dls.held_out
    assert (c.spec.vocabs, c.spec.size, c.spec.norm) == (dls.spec.vocabs, 24, 'none')
    for o, experiments in ((c.train, {'HUVEC-01', 'RPE-01'}), (c.valid, {'HUVEC-02', 'RPE-02'})):
        assert set(o.items.experiment) == experiments and (o.items.well_type != 'treatment').all()
    lacking = screen.table[(screen.table.experiment != 'RPE-02') | (screen.table.well_type == 'treatment')]
    assert control_dls(dls_of(screen, lacking)).held_out == ['HUVEC-02']
    again = control_dls(dls_of(screen, screen.table.set_index(screen.table.index//2)))            # an index need not be unique
    assert again.train.items.site_id.tolist() == c.train.items.site_id.tolist() and again.train.items.control.tolist() == c.train.items.control.tolist()

@pytest.mark.parametrize('kind, word', [(['treatment'], 'no control well'), (['treatment', 'negative_control'], 'only one kind of control well')])
def test_nothing_to_pretrain_on(screen, kind, word):
    with pytest.raises(ScreenError, match=word): control_dls(dls_of(screen, screen.table[screen.table.well_type.isin(kind)]))

# ---- other classes

LOSSES = ['adacos', dict(name='arcface', s=20., m=.3), dict(name='mix', a=dict(name='adacos'), b=dict(name='arcface'), weights=[.8, .1])]

@pytest.mark.parametrize('loss', LOSSES, ids=lambda l: l if isinstance(l, str) else l['name'])
def test_only_classifier_and_loss_change(screen, loss):
    dls = dls_of(screen)
    learn = learner(dls, metadata='cell_type', loss=loss, neck='rcic117')
    before, config = weights(learn.model, ('classifier', 'loss')), learn.model.loss.config()
    learn.change_classes(control_dls(dls))
    assert same(weights(learn.model, ('classifier', 'loss')), before)
    assert learn.model.classifier.n_classes == 3 and learn.loss_func is learn.model.loss and learn.model.config['n_classes'] == 3
    new = learn.model.loss.config()
    count = lambda c: [c[k] for k in c if k == 'n_classes'] + [n for v in c.values() if isinstance(v, dict) for n in count(v)]
    assert set(count(new)) <= {3} and len(count(new)) == len(count(config)) and new['name'] == config['name']
    quiet(learn, lambda: learn.fit(1, 1e-3))

def test_classes_of_the_same_name_keep_their_direction(screen):
    dls = dls_of(screen)
    learn = learner(dls)
    w, names = learn.model.classifier.weight.clone(), dls.spec.labels
    both = dls.rebuild(controls=True)
    learn.change_classes(both, seed=1)
    assert torch.equal(learn.model.classifier.weight[[both.spec.labels.index(l) for l in names]], w)
    rest = [i for i, l in enumerate(both.spec.labels) if l not in names]
    one = learn.model.classifier.weight[rest].clone()
    learn.change_classes(dls)
    assert torch.equal(learn.model.classifier.weight, w)
    learn.change_classes(both, seed=2)
    assert not torch.equal(learn.model.classifier.weight[rest], one)

def test_the_same_classes_are_left_alone(screen):
    dls = dls_of(screen)
    learn = learner(dls)
    learn.model.loss.s.fill_(5.)
    kept = learn.model.classifier
    learn.change_classes(dls.rebuild(size=24))
    assert learn.model.classifier is kept and learn.model.loss.s == 5 and learn.dls.spec.size == 24

def test_batches_of_another_screen_are_refused(screen):
    learn = learner(dls_of(screen))
    with pytest.raises(ScreenError, match='another vocabulary of experiment'): learn.change_classes(dls_of(screen, valid='HUVEC-02'))
    other = dls_of(screen).rebuild()
    other.spec.channels = list('abc')
    with pytest.raises(ScreenError, match='reads the channels'): learn.change_classes(other)

# ---- pre-training

def test_pretraining_sees_controls_of_training_experiments_only(screen):
    dls = dls_of(screen)
    learn, seen = learner(dls), Seen()
    start, w = weights(learn.model, ('classifier', 'loss')), learn.model.classifier.weight.clone()
    reached = quiet(learn, lambda: learn.pretrain_on_controls(ONE, seed=3, cbs=seen))
    assert (seen.train.well_type != 'treatment').all() and set(seen.train.experiment) == {'HUVEC-01', 'RPE-01'} and set(seen.valid.experiment) == {'HUVEC-02', 'RPE-02'}
    assert len(reached) == 1 and not same(weights(learn.model, ('classifier', 'loss')), start)
    assert learn.dls is dls and learn.model.classifier.n_classes == learn.model.loss.n_classes == 4
    assert torch.equal(learn.model.classifier.weight, w)          # the classifier of the treatments, as it was
    quiet(learn, lambda: learn.fit_recipe(ONE))

def test_interrupted_pretraining_leaves_the_treatments(screen):
    class Stop(Callback):
        def before_batch(self): raise KeyboardInterrupt
    dls = dls_of(screen)
    learn = learner(dls)
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.pretrain_on_controls(ONE, cbs=Stop()))
    assert learn.dls is dls and learn.model.classifier.n_classes == 4

# ---- the difference to the controls

def measured(learn, rows, controls):
    "Mean pooled features of the controls of each plate, by a loop"
    table, model = learn.dls.screen.table, learn.model.eval()
    res = {}
    for p in rows.plate_name.unique():
        kinds = dict(negative=['negative_control'], all=['negative_control', 'positive_control'])[controls]
        ids = table.site_id[(table.plate_name == p) & table.well_type.isin(kinds)]
        fs = []
        for i in ids:
            x = torch.from_numpy(np.array(learn.dls.screen.source[i])).float()/255
            x = (x - x.mean((1, 2), keepdim=True))/x.std((1, 2), correction=0, keepdim=True)
            with torch.no_grad(): fs.append(model.pooled(x[None])[0])
        res[p] = torch.stack(fs).mean(0)
    return res

@pytest.mark.parametrize('controls', ['negative', 'all'])
def test_means_are_those_of_the_controls(screen, controls):
    learn = learner(dls_of(screen), difference_learner, controls=controls)
    quiet(learn, lambda: learn.fit_recipe(ONE))
    part, names = learn.model.metadata, learn.dls.spec.vocabs['plate_name']
    train, held = learn.dls.train.items, learn.dls.valid.items
    means = measured(learn, pd.concat([train, held]), controls)
    for p, m in means.items(): torch.testing.assert_close(part.means[names.index(p)], m, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(part.means[0], torch.stack([means[p] for p in train.plate_name.unique()]).mean(0), rtol=1e-3, atol=1e-4)
    known = set(means)
    assert [bool(o) for o in part.measured] == [n in known for n in names] and not part.measured.all()      # the test plates were not looked at
    i = names.index('HUVEC-17_1')
    assert torch.equal(part.encode('plate_name', torch.tensor([i])), part.means[:1])
    test = learn.dls.screen.table[learn.dls.screen.table.experiment == 'HUVEC-17']
    before = part.means.clone()
    with pytest.raises(ScreenError, match='HUVEC-17, not trained on'): learn.measure_controls(test, controls, average=True)
    assert torch.equal(part.means, before)
    learn.measure_controls(test, controls)
    torch.testing.assert_close(part.encode('plate_name', torch.tensor([i]))[0], measured(learn, test, controls)['HUVEC-17_1'], rtol=1e-3, atol=1e-4)

def test_the_neck_reads_features_and_difference(screen):
    learn = learner(dls_of(screen), difference_learner, metadata='cell_type', controls='all')
    model = learn.model.eval()
    learn.measure_controls(learn.dls.train.items, 'all', average=True)
    b = learn.dls.train.one_batch()
    with torch.no_grad(): f, got = model.pooled(b[0]), model.neck[0](model.features(b[0], *b[1:-1]))
    n, plate = f.shape[1], b[4].as_subclass(torch.Tensor)
    assert got.shape[1] == 2*n + 128
    torch.testing.assert_close(got[:, :n], f); torch.testing.assert_close(got[:, -n:], f - model.metadata.means[plate])

def test_measuring_changes_nothing_else(screen):
    learn = learner(dls_of(screen), difference_learner)
    for batch_norm in (False, True):
        learn.model.train()
        before = {k: v for k, v in weights(learn.model).items() if k not in ('metadata.means', 'metadata.measured')}
        torch.manual_seed(0); random.seed(0)
        learn.measure_controls(learn.dls.train.items, batch_norm=batch_norm)
        assert (random.random(), torch.rand(1).item()) == (random.seed(0) or random.random(), torch.manual_seed(0) and torch.rand(1).item())
        assert all(m.training for m in learn.model.modules())
        assert same({k: v for k, v in weights(learn.model).items() if k not in ('metadata.means', 'metadata.measured')}, before)

def test_plates_are_mixed_with_the_pictures(screen):
    learn = learner(dls_of(screen), difference_learner, controls='all', dropout=.5)
    class Noted(CutMix):
        def after_pred(self): self.plates = self.xb[4]
    mix = Noted(p=1., seed=0)
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=mix))
    assert isinstance(mix.plates, tuple) and len(mix.plates) == 3 and all(torch.isfinite(p).all() for p in learn.model.parameters())
    part = learn.model.metadata.eval()
    a, b = torch.tensor([1, 2]), torch.tensor([2, 1])
    torch.testing.assert_close(part._column('plate_name', MixedMeta(a, b, torch.tensor(.25)), 2, 'cpu'), .25*part.means[a] + .75*part.means[b])

def test_a_plate_without_controls_cannot_be_compared(screen):
    t = screen.table
    for gone, word in (((t.experiment == 'HUVEC-01') & (t.plate == 2), 'HUVEC-01_2'), (t.experiment == 'RPE-02', 'RPE-02_1, RPE-02_2')):
        with pytest.raises(ScreenError, match=f'no negative control well on plate {word}:'): learner(dls_of(screen, t[~gone | (t.well_type != 'negative_control')]), difference_learner)
        learner(dls_of(screen, t[~gone | (t.well_type != 'negative_control')]), difference_learner, controls='positive')
    with pytest.raises(ScreenError, match='make it with difference_learner'): learner(dls_of(screen)).measure_controls(t)
    with pytest.raises(ScreenError, match="neck 'identity'"): learner(dls_of(screen), difference_learner, neck='identity')

# ---- similarity to the controls

TOY = toy_profiles(n_sirnas=16, dim=8, seed=1)
X, M = emb_features(TOY).astype(float), emb_metadata(TOY)

def close(a, b): np.testing.assert_allclose(emb_features(a), emb_features(b), atol=2e-5)
def table(x, m=M): return make_emb_table(m, x)

@pytest.mark.parametrize('by', ['plate', 'experiment'])
def test_similarity_is_the_loop(by):
    got = control_similarity(TOY, by)
    unit = lambda v: v/np.linalg.norm(v)
    x, names = np.stack([unit(r) for r in X]), got.attrs['controls']
    assert names == sorted(M.sirna[M.well_type != 'treatment'].unique())
    where = M.experiment + (M.plate.astype(str) if by == 'plate' else '')
    for i in range(0, len(M), 7):
        mine = (where == where[i]).to_numpy()
        c = [x[mine & (M.sirna == k).to_numpy()].mean(0) for k in names]
        z = np.array([unit(x[i] - np.mean(c, 0)) @ unit(k - np.mean(c, 0)) for k in c])
        np.testing.assert_allclose(emb_features(got)[i], unit(z), atol=1e-5)

@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_axes_and_lengths_do_not_matter(seed):
    rng, x = np.random.default_rng(seed), X.copy()
    for at in M.groupby(['experiment', 'plate']).indices.values(): x[at] = x[at] @ np.linalg.qr(rng.normal(size=(8, 8)))[0]*rng.uniform(.1, 9, (len(at), 1))
    close(control_similarity(table(x)), control_similarity(TOY))
    order = rng.permutation(len(M))
    close(control_similarity(TOY.iloc[order]), control_similarity(TOY).iloc[order])

def test_a_missing_control_is_a_zero():
    plate = ((M.experiment == 'HUVEC-01') & (M.plate == 1)).to_numpy()
    names = control_similarity(TOY).attrs['controls']
    gone = TOY[~(plate & (M.sirna == names[1]).to_numpy())]
    got, m = control_similarity(gone), emb_metadata(gone)
    mine = ((m.experiment == 'HUVEC-01') & (m.plate == 1)).to_numpy()
    assert (emb_features(got)[mine, 1] == 0).all() and (emb_features(got)[~mine, 1] != 0).all()
    np.testing.assert_allclose(np.linalg.norm(emb_features(got), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(emb_features(got)[~mine], emb_features(control_similarity(TOY))[~plate], atol=1e-6)

def test_marks_and_alignment():
    got = control_similarity(TOY)
    assert set(got.Metadata_protocol) == {'adapted'} and got.Metadata_correction.str.startswith("control_similarity(by='plate') #").all()
    twice = control_similarity(TOY.assign(Metadata_protocol='transductive', Metadata_correction='X'))
    assert set(twice.Metadata_protocol) == {'transductive'} and twice.Metadata_correction.iloc[0] == f'X + {got.Metadata_correction.iloc[0]}'
    few = TOY[(M.sirna != got.attrs['controls'][0]).to_numpy()]
    aligned = control_similarity(few, controls=got.attrs['controls'])
    assert set(aligned.Metadata_correction) == set(got.Metadata_correction) and (emb_features(aligned)[:, 0] == 0).all()
    assert set(control_similarity(few).Metadata_correction) != set(got.Metadata_correction)

def test_similarities_are_searched_like_embeddings():
    toy = toy_profiles(n_sirnas=8, plates=1, signal=3., batch=.3, noise=.2, seed=2)
    m = emb_metadata(toy)
    treated, train = (m.well_type == 'treatment').to_numpy(), (m.dataset == 'train').to_numpy()
    z = control_similarity(toy)
    index = EmbeddingIndex(z[treated & train])
    pred, _ = predict_wells(z[treated & ~train], index, 'adapted')
    truth = m.drop_duplicates('well_id').set_index('well_id').sirna
    assert (pred.sirna.to_numpy() == truth[pred.id_code].to_numpy()).mean() > 3/8
    with pytest.raises(ScreenError, match='not inductive'): predict_wells(z[treated & ~train], index)
    other = control_similarity(toy, by='experiment')
    with pytest.raises(ScreenError, match='The index was corrected by'): predict_wells(other[treated & ~train], index, 'adapted')

PLATE_1 = ((M.experiment == 'RPE-01') & (M.plate == 1)).to_numpy()

@pytest.mark.parametrize('emb, kw, word', [
    (TOY[~PLATE_1 | (M.well_type == 'treatment').to_numpy()], {}, 'Plate RPE-01_1 has no control well'),
    (TOY[~PLATE_1 | (M.well_type != 'positive_control').to_numpy()], {}, 'Plate RPE-01_1 has only one kind of control well'),
    (TOY, dict(by='cell'), "by='cell' is not known"), (TOY[:0], {}, 'empty or not finite'), (table(np.where(X > .2, np.nan, X)), {}, 'empty or not finite'),
    (TOY.drop(columns='Metadata_plate'), {}, 'no column Metadata_plate'), (TOY.drop(columns='Metadata_sirna'), {}, 'no column Metadata_sirna')])
def test_bad_tables_are_refused(emb, kw, word):
    with pytest.raises(ScreenError, match=word): control_similarity(emb, **kw)

def test_controls_of_the_experiment_stand_in():
    got = control_similarity(TOY[~PLATE_1 | (M.well_type == 'treatment').to_numpy()], by='experiment')
    assert np.isfinite(emb_features(got)).all()

# ---- a model for each cell type

def test_each_cell_type_has_a_model_of_its_own(screen):
    dls = dls_of(screen)
    learn, seen = learner(dls), Seen()
    before = weights(learn.model)
    tuned = quiet(learn, lambda: fine_tune_cell_types(learn, ONE, seed=1, cbs=seen))
    assert list(tuned) == ['HUVEC', 'RPE'] and same(weights(learn.model), before) and learn.dls is dls
    for c, t in tuned.items():
        assert isinstance(t, Learner) and set(t.dls.train.items.experiment) == {f'{c}-01'} and t.dls.held_out == [f'{c}-02']
        assert not same(weights(t.model), before) and t.loss_func is t.model.loss and t.dls.spec.vocabs == dls.spec.vocabs and len(t.history) == 1
        assert not hasattr(t, 'progress')
    assert not same(weights(tuned['HUVEC'].model), weights(tuned['RPE'].model))
    assert set(seen.train.experiment) == {'RPE-01'}

def test_fine_tuning_one_type_does_not_depend_on_the_others(screen):
    learn = learner(dls_of(screen))
    both, one = (quiet(learn, lambda c=c: fine_tune_cell_types(learn, ONE, c)) for c in (None, ['RPE']))
    assert list(one) == ['RPE'] and same(weights(one['RPE'].model), weights(both['RPE'].model))

def test_a_cell_type_with_fewer_classes_keeps_theirs(screen):
    t = screen.table
    gone = sorted(t.sirna[t.well_type == 'treatment'].unique())[0]
    dls = dls_of(screen, t[(t.cell_type != 'RPE') | (t.sirna != gone)], valid='HUVEC-02')
    learn = learner(dls)
    tuned = quiet(learn, lambda: fine_tune_cell_types(learn, Recipe('none', []), ['RPE']))['RPE']
    keep = [dls.spec.labels.index(l) for l in tuned.dls.spec.labels]
    assert gone not in tuned.dls.spec.labels and len(keep) == 3 and not tuned.dls.held_out
    assert torch.equal(tuned.model.classifier.weight, learn.model.classifier.weight[keep])

def test_callbacks_come_along_and_strangers_do_not(screen):
    learn = learner(dls_of(screen), difference_learner)
    tuned = quiet(learn, lambda: fine_tune_cell_types(learn, ONE, ['RPE']))['RPE']
    mine = [cb for cb in tuned.cbs if isinstance(cb, ControlMeans)]
    assert len(mine) == 1 and mine[0].learn is tuned and learn.control_means is not mine[0] and learn.control_means.learn is learn
    with pytest.raises(ScreenError, match='U2OS is not a cell type that was trained on: choose from HUVEC, RPE'): fine_tune_cell_types(learn, ONE, ['U2OS'])

def test_the_average_is_measured_where_it_is_validated(screen):
    "`EMA` and the controls of a plate: of the weights that are in the model"
    class Note(Callback):
        order = 500
        def after_validate(self): self.found = (weights(self.model), self.learn.model.metadata.means.clone(), self.learn.model.metadata.measured.clone())
    note, learn = Note(), learner(dls_of(screen), difference_learner)
    quiet(learn, lambda: learn.fit(2, 1e-2, cbs=[EMA(.9), note]))
    again = learner(dls_of(screen), difference_learner)
    again.model.load_state_dict(note.found[0])
    for rows, average in ((again.dls.train.items, True), (again.dls.valid.items, False)): again.measure_controls(rows, average=average)
    assert torch.allclose(again.model.metadata.means, note.found[1], atol=1e-5) and note.found[2].sum() == 8
    assert same(weights(learn.model), note.found[0])
