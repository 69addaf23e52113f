"Pseudo-labels: the greedy choice against plain loops, what must not matter, no label of a test well is ever used, bad input."
import tempfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback
from hypothesis import given, settings, strategies as st
from helpers import same, simulate_screen
from rcic_fastai.batch.augment import dihedral
from rcic_fastai.train.controls import difference_learner
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.index import EmbeddingIndex, merge_wells
from rcic_fastai.embed.table import *
from rcic_fastai.predict.pseudo import *
from rcic_fastai.predict.pseudo import _class_groups, _well_groups
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.screen.open import open_screen

ARCH = 'test_efficientnet'
ONE = Recipe('one', [Stage('one', 1, 3e-3)])

# ---- the choice

def plain_greedy(wells, scores, classes, groups, n):
    "At every step compute the gaps of all wells again, and take the largest, of the first well that has it"
    left, used, out = list(range(len(wells))), set(), []
    for _ in range(n):
        best = None
        for i in left:
            p = (wells.experiment[i], wells.plate[i])
            free = [k for k in range(len(classes)) if (p, k) not in used and (groups is None or groups[k] == wells.plate_group[i])]
            ranked = sorted(free, key=lambda k: (-scores[i][k], k))
            if not ranked: continue
            gap = scores[i][ranked[0]] - scores[i][ranked[1]] if len(ranked) > 1 else np.inf
            if best is None or gap > best[0]: best = gap, i, ranked[0], p
        gap, i, k, p = best
        left.remove(i); used.add((p, k)); out.append((wells.well_id[i], classes[k], gap))
    return out

def some_wells(rng, plates, k):
    "Wells of a few plates, scores, and groups of classes with room for every plate"
    groups = rng.permutation(np.arange(k) % 2)
    rows = [(f'E{p//2}_{p%2}_{i}', f'E{p//2}', p % 2, g) for p in range(plates) for g in [int(rng.integers(2))]
            for i in range(rng.integers(1, (groups == g).sum() + 1))]
    wells = pd.DataFrame(rows, columns=['well_id', 'experiment', 'plate', 'plate_group']).sample(frac=1, random_state=int(rng.integers(1000))).reset_index(drop=True)
    return wells, rng.normal(size=(len(wells), k)), [f'c{i}' for i in range(k)], groups

@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 7), st.floats(0, 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_greedy_is_the_loop(seed, plates, k, share, masked):
    wells, scores, classes, groups = some_wells(np.random.default_rng(seed), plates, k)
    before, g = scores.copy(), groups if masked else None
    got = pseudo_labels(wells, scores, classes, g, share)
    want = plain_greedy(wells, scores, classes, g, round(share*len(wells)))
    assert list(zip(got.well_id, got.label)) == [w[:2] for w in want] and len(got) == round(share*len(wells))
    np.testing.assert_allclose(got.gap, [w[2] for w in want], atol=1e-12)
    np.testing.assert_array_equal(scores, before)
    assert not got.well_id.duplicated().any() and not got.duplicated(['experiment', 'plate', 'label']).any()
    if masked:
        of = dict(zip(classes, groups))
        assert [of[l] for l in got.label] == wells.set_index('well_id').plate_group[got.well_id].tolist()

@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_order_and_scale_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    wells, scores, classes, groups = some_wells(rng, 3, 7)
    got = pseudo_labels(wells, scores, classes, groups, .8)
    rows, cols = rng.permutation(len(wells)), rng.permutation(len(classes))
    other = pseudo_labels(wells.iloc[rows], scores[np.ix_(rows, cols)]*3 + rng.normal(size=(len(wells), 1)), np.array(classes)[cols], groups[cols], .8)
    ends = np.isinf(got.gap)                  # wells for which one class is left are equally sure
    assert other[~np.isinf(other.gap)].well_id.tolist() == got[~ends].well_id.tolist()
    if not ends.any(): assert other.label.tolist() == got.label.tolist()

def test_a_smaller_share_is_the_beginning_of_a_larger_one():
    wells, scores, classes, groups = some_wells(np.random.default_rng(4), 4, 7)
    full = pseudo_labels(wells, scores, classes, groups, 1.)
    for n in range(len(wells)): pd.testing.assert_frame_equal(pseudo_labels(wells, scores, classes, groups, n/len(wells)), full[:n], check_dtype=False)

W = pd.DataFrame(dict(well_id=['w1', 'w2', 'w3'], experiment='E', plate=1, plate_group=0))
S = np.random.default_rng(0).normal(size=(3, 4))
bad_score = lambda v: np.where(np.arange(12).reshape(3, 4) == 5, v, S)

@pytest.mark.parametrize('kw, word', [
    (dict(share=1.1), 'share=1.1 is not possible'), (dict(share=-.1), 'share=-0.1 is not possible'), (dict(scores=S[:2]), r'3 wells do not go with scores of shape \(2, 4\)'),
    (dict(scores=bad_score(np.nan)), 'scores of well w2 are not numbers'), (dict(scores=bad_score(np.inf)), 'scores of well w2 are not numbers'),
    (dict(wells=W.drop(columns='plate')), 'no column plate:'), (dict(wells=W.drop(columns='plate_group')), 'no column plate_group:'), (dict(groups=[0, 0]), '4 classes came with 2 groups'),
    (dict(groups=[0, 0, 1, 1]), 'Plate 1 of E has 3 wells for the 2 siRNAs'), (dict(wells=W.assign(plate_group=pd.NA)), '3 wells for the 0 siRNAs'),
    (dict(scores=np.where([[True, False, False, False]]*2 + [[True]*4], S, -np.inf)), 'No siRNA is left for well w')])
def test_bad_input_raises(kw, word):
    with pytest.raises(ScreenError, match=word): pseudo_labels(**{**dict(wells=W, scores=S, classes=list('abcd'), groups=[0]*4, share=1.), **kw})

def test_wells_without_a_group_are_not_needed_without_groups():
    assert len(pseudo_labels(W.drop(columns='plate_group'), S.astype(np.float32), list('abcd'), share=1.)) == 3

def test_schedule():
    assert pseudo_schedule(1) == [.41] and pseudo_schedule(3, .2, .8) == pytest.approx([.2, .5, .8]) and pseudo_schedule(40)[-1] == .98
    for bad in ((0,), (3, .9, .5), (3, 0., .5), (3, .5, 1.2)):
        with pytest.raises(ScreenError): pseudo_schedule(*bad)

# ---- groups

def toy(signal=1.5, **kw):
    emb = toy_profiles(n_sirnas=24, signal=signal, seed=2, **kw)
    m = emb_metadata(emb)
    treated, train = (m.well_type == 'treatment').to_numpy(), (m.dataset == 'train').to_numpy()
    index = EmbeddingIndex(emb[treated & train])
    scores, ids = merge_wells(index.class_scores(emb_features(emb[treated & ~train])), m.well_id[treated & ~train])
    return m, m.drop_duplicates('well_id').set_index('well_id').loc[ids].reset_index(), scores, index.classes

def test_groups_are_given_or_inferred():
    m, wells, scores, classes = toy()
    groups = _class_groups(m, [*classes, 'sirna_24'])
    truth = m[m.well_type == 'treatment'].groupby('sirna').plate_group.first()
    assert groups[classes].tolist() == truth[classes].tolist() and pd.isna(groups['sirna_24'])       # a control is in no group
    groups, unknown = groups[classes], wells.assign(plate_group=pd.array([pd.NA]*len(wells), dtype='Int64'))
    half = unknown.assign(plate_group=wells.plate_group.where(wells.experiment == 'RPE-08'))
    for w in (wells, unknown, half, wells.drop(columns='plate_group')): assert list(_well_groups(w, scores, groups, m)[0]) == wells.plate_group.tolist()
    wrong = (wells.plate_group + 1) % 4
    assert list(_well_groups(wells.assign(plate_group=wrong), scores, groups, m)[0]) == wrong.tolist()   # what is given is believed
    assert set(_well_groups(unknown, scores, groups*0, m)[0]) == {0}
    assert _well_groups(unknown, scores, groups, m)[1] > 2 and np.isnan(_well_groups(wells, scores, groups, m)[1])

def test_without_groups_all_treatments_are_one():
    m, _, _, classes = toy()
    for t in (m.drop(columns='plate_group'), m.assign(plate_group=pd.array([pd.NA]*len(m), dtype='Int64'))):
        g = _class_groups(t, [*classes, 'sirna_24'])
        assert set(g[classes]) == {0} and pd.isna(g['sirna_24'])
    with pytest.raises(ScreenError, match='on plates of several groups'): _class_groups(m.assign(plate_group=m.plate), classes)

def test_test_rows_say_nothing_about_groups():
    m, _, _, classes = toy()
    lie = m.assign(plate_group=m.plate_group.where(m.dataset == 'train', 7))
    assert _class_groups(lie, classes).equals(_class_groups(m, classes))

# ---- the table

def test_pseudo_table_holds_pseudo_labels_only():
    m, wells, _, classes = toy()
    rows, ids = m[(m.dataset == 'test') & (m.well_type == 'treatment')], m.drop_duplicates('sirna').set_index('sirna').sirna_id
    chosen = pd.DataFrame(dict(well_id=wells.well_id[:5], label=classes[:5]))
    t = pseudo_table(m, rows, chosen)
    assert len(t) == len(m) and set(t.site_id) == set(m.site_id)
    others, new = (t[t.experiment.isin(rows.experiment) & (t.well_type == 'treatment').eq(treated)] for treated in (False, True))
    assert len(new) == len(rows) and len(others) and (others.dataset == 'test').all() and others.sirna.isna().all() and others.sirna_id.isna().all()
    mine = new.well_id.isin(chosen.well_id)
    assert (new.dataset == np.where(mine, 'train', 'test')).all() and new.sirna[~mine].isna().all() and new.sirna_id[~mine].isna().all()
    label = new.well_id[mine].map(chosen.set_index('well_id').label)
    assert new.sirna[mine].tolist() == label.tolist() and new.sirna_id[mine].tolist() == ids[label].tolist()
    pd.testing.assert_frame_equal(t[~t.experiment.isin(rows.experiment)].reset_index(drop=True), m[m.dataset != 'test'].reset_index(drop=True), check_dtype=False)
    assert len(pseudo_table(m, rows, chosen[:0])) == len(t)

def test_wells_that_are_not_named_stay_without_a_label():
    "Controls and other test wells are there to take statistics of"
    m, wells, _, classes = toy()
    rows = m[(m.dataset == 'test') & (m.well_type == 'treatment') & (m.experiment == 'RPE-08')]
    t = pseudo_table(m, rows, pd.DataFrame(dict(well_id=rows.well_id[:1], label=classes[:1])))
    named = t.well_id == rows.well_id.iloc[0]
    test = t.experiment.isin(m.experiment[m.dataset == 'test'])
    assert len(t) == len(m) and not t.site_id.duplicated().any() and t.sirna[test & ~named].isna().all() and (t.dataset[named] == 'train').all()

# ---- training

@pytest.fixture(scope='module')
def screen():
    with tempfile.TemporaryDirectory() as d:
        simulate_screen(Path(d)/'s', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17'], sirnas=8, plates=2, controls=1, size=32, test=['HUVEC-17'], n_workers=0, progress=False)
        yield open_screen(Path(d)/'s')

def fit(screen, table=None, rows=None, rounds=2, recipe=ONE, data={}, **kw):
    dls = screen_dls(screen if table is None else screen[table], valid='HUVEC-03', bs=8, device='cpu', **data)
    learn = screen_learner(dls, ARCH, pretrained=None, emb_dim=16)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): return learn, learn.fit_pseudo(rows, rounds=rounds, recipe=recipe, progress=False, **kw)

def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

class Seen(Callback):
    def before_fit(self): self.fits = getattr(self, 'fits', []) + [(self.dls.train.items, self.dls.valid.items, self.dls.spec)]

def test_true_labels_are_never_read(screen):
    t = screen.table
    test = t.dataset == 'test'
    learn, history = fit(screen)
    shuffled = t.copy()
    shuffled.loc[test, ['sirna', 'sirna_id']] = t.loc[test, ['sirna', 'sirna_id']].sample(frac=1, random_state=1).to_numpy()
    blank = t.assign(sirna=t.sirna.mask(test), sirna_id=t.sirna_id.mask(test))
    without, rows = t[~test], blank[test]
    for kw in (dict(table=blank), dict(table=shuffled), dict(table=without, rows=rows), dict(table=t, rows=t[test].assign(sirna='nonsense', sirna_id=99))):
        other, again = fit(screen, **kw)
        pd.testing.assert_frame_equal(again, history)
        pd.testing.assert_frame_equal(other.pseudo, learn.pseudo)
        assert same(state(other), state(learn))

def test_what_is_trained_on(screen):
    t, seen = screen.table, Seen()
    learn, history = fit(screen, rounds=2, first=.5, last=1., cbs=seen)
    wells = t[(t.dataset == 'test') & (t.well_type == 'treatment')].well_id.nunique()
    assert history.wells.tolist() == [wells//2, wells] and history['share'].tolist() == [.5, 1.] and history['round'].tolist() == [1, 2]
    real = t[t.experiment.isin(['HUVEC-01', 'HUVEC-02']) & (t.well_type == 'treatment')]
    for (train, valid, spec), n in zip(seen.fits, history.wells):
        new = train[train.experiment == 'HUVEC-17']
        assert new.well_id.nunique() == n and len(new) == 2*n and (new.well_type == 'treatment').all()
        assert not new.drop_duplicates('well_id').duplicated(['plate', 'sirna']).any()
        assert set(train.site_id) - set(new.site_id) == set(real.site_id) and set(valid.experiment) == {'HUVEC-03'}
        assert spec.labels == learn.dls.spec.labels and spec.vocabs == learn.dls.spec.vocabs
    last = seen.fits[-1][0].drop_duplicates('well_id').set_index('well_id').sirna
    assert last[learn.pseudo.well_id].tolist() == learn.pseudo.label.tolist()

def test_it_says_what_it_is(screen):
    learn, history = fit(screen)
    assert set(history.protocol) == {'transductive'} == set(learn.pseudo.protocol) and history.attrs['protocol'] == learn.protocol == 'transductive'
    assert learn.history.stage.tolist() == ['one 1', 'one 2'] and pd.isna(history.changed[0]) and 0 <= history.changed[1] <= 1
    assert set(learn.dls.train.items.experiment) == {'HUVEC-01', 'HUVEC-02'} and learn.dls.held_out == ['HUVEC-03']

def test_two_sites_and_a_stage_that_changes_the_size(screen):
    learn, history = fit(screen, rounds=1, recipe=Recipe('r', [Stage('a', 1, 1e-3, size=24, bs=4), Stage('b', 1, 1e-3, cutmix=1.)]), data=dict(sites=2), tta=2)
    assert history.wells.tolist() == [round(.41*8)] and learn.dls.spec.size == 24 and learn.history.stage.tolist() == ['a 1', 'b 1']

@pytest.mark.parametrize('norm, norm_from', [('plate', 'controls'), ('experiment', 'controls'), ('plate', 'all')])
def test_statistics_of_plates_and_experiments(screen, norm, norm_from, monkeypatch):
    "The pixel statistics of named wells are taken of the same wells when they are named, when they are trained on and when they are embedded"
    from rcic_fastai.batch import data
    t, seen, was = screen.table, [], data.statistics_rows
    def noted(spec, rows, among=None):
        use = was(spec, rows, among)
        if 'HUVEC-17' in set(rows.experiment): seen.append(frozenset(use.site_id[use.experiment == 'HUVEC-17']))
        return use
    monkeypatch.setattr(data, 'statistics_rows', noted)
    want = frozenset(t.site_id[(t.experiment == 'HUVEC-17') & ((t.well_type != 'treatment') | (norm_from == 'all'))])
    for kw in ({}, dict(table=t[t.dataset != 'test'], rows=t[t.dataset == 'test'])):
        seen.clear()
        learn, history = fit(screen, rounds=1, last=1., first=1., data=dict(norm=norm, norm_from=norm_from), **kw)
        assert len(history) == 1 and len(seen) >= 2 and set(seen) == {want}
    seen.clear()
    learn, _ = fit(screen, rounds=1, data=dict(norm=norm, norm_from=norm_from))
    learn.embed(t[(t.experiment == 'HUVEC-17') & (t.well_type == 'treatment')].head(4), tta=1, progress=False)
    assert len(seen) >= 2 and all(s <= want for s in seen) and (norm != 'experiment' or set(seen) == {want})

def test_a_difference_learner_compares_named_wells_with_their_controls(screen):
    dls = screen_dls(screen, valid='HUVEC-03', bs=8, device='cpu')
    learn = difference_learner(dls, ARCH, pretrained=None, emb_dim=16, controls='all')
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit_pseudo(rounds=1, recipe=ONE, first=1., last=1., progress=False)
    assert learn.model.metadata.measured[1:].all()

def test_interrupted_between_rounds(screen):
    class Stop(Callback):
        def __init__(self): self.fits = 0
        def before_fit(self):
            self.fits += 1
            if self.fits == 2: raise KeyboardInterrupt
    dls = screen_dls(screen, valid='HUVEC-03', bs=8, device='cpu')
    learn = screen_learner(dls, ARCH, pretrained=None, emb_dim=16)
    learn.remove_cb(learn.progress)
    with learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit_pseudo(rounds=3, recipe=ONE, cbs=Stop(), progress=False)
        assert set(learn.dls.train.items.experiment) == {'HUVEC-01', 'HUVEC-02'} and learn.history.stage.tolist() == ['one 1']
        rest = learn.fit_pseudo(rounds=3, recipe=ONE, start=1, progress=False)
    assert rest['round'].tolist() == [2, 3] and rest['share'].tolist() == pseudo_schedule(3)[1:] and learn.history.stage.tolist() == ['one 1', 'one 2', 'one 3']

def test_scores_are_those_of_the_classifier(screen):
    dls = screen_dls(screen, valid='HUVEC-03', bs=8, device='cpu')
    model = screen_learner(dls, ARCH, pretrained=None, emb_dim=16).model
    rows = screen.table[(screen.table.dataset == 'test') & (screen.table.well_type == 'treatment')]
    scores, wells = well_scores(model, dls.spec, screen[rows], tta=2, bs=3, progress=False)
    assert model.training and wells.well_id.tolist() == rows.well_id.drop_duplicates().tolist() and scores.shape == (len(wells), 8)
    model.eval()
    for i in (0, len(wells)-1):
        cos = []
        for s in rows.site_id[rows.well_id == wells.well_id[i]]:
            x = torch.from_numpy(np.array(screen.source[s])).float()/255
            x = (x - x.mean((1, 2), keepdim=True))/x.std((1, 2), correction=0, keepdim=True)
            with torch.no_grad(): cos += [model(dihedral(x[None], k))[0] for k in range(2)]
        np.testing.assert_allclose(scores[i], torch.stack(cos).mean(0), atol=1e-4)

def test_what_cannot_be_labeled_raises(screen):
    t = screen.table
    rows_of = lambda e: t[t.experiment == e]
    for kw, word in ((dict(rows=rows_of('HUVEC-01')), 'Well HUVEC-01_1_.* trained on or held out'), (dict(rows=rows_of('HUVEC-03')), 'Well HUVEC-03_1_.* trained on or held out'),
                     (dict(table=t[t.dataset != 'test']), 'no test row'), (dict(rows=rows_of('HUVEC-17').query('well_type != "treatment"')), 'no test row'),
                     (dict(rounds=0), 'rounds=0'), (dict(data=dict(target='well_type')), 'the target is well_type'), (dict(tta=9), 'tta=9')):
        with pytest.raises(ScreenError, match=word): fit(screen, **kw)
