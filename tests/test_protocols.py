"Every embedding says what it used of its own batch, however it is asked for, and passes for nothing less."
import json
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from fastai.vision.all import Callback
from helpers import learner, quiet, simulate_screen
from rcic_fastai.train.controls import difference_learner
from rcic_fastai.batch.data import screen_dls, spec_dl
from rcic_fastai.embed.embed import embed_parts, embed_screen, highest_protocol, model_fingerprint, row_protocols
from rcic_fastai.folder import load_model
from rcic_fastai.screen.images import PngTree
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.predict.predict import predict_wells
from rcic_fastai.embed.table import emb_features
from rcic_fastai.predict.pseudo import *
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.screen.screen import Screen

ARCH, ONE = 'test_efficientnet', Recipe('one', [Stage('one', 1, 3e-3)])
HOW = dict(tta=1, progress=False)
TRAINED = {'HUVEC-01', 'HUVEC-02'}

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    d = tmp_path_factory.mktemp('protocols')/'s'
    simulate_screen(d, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17', 'HUVEC-18'], sirnas=8, plates=2, controls=1, size=32, test=['HUVEC-17', 'HUVEC-18'], n_workers=0, progress=False)
    t = read_metadata(d)
    return Screen(t, PngTree(d, t))

def dls_of(screen, **kw): return screen_dls(screen, **{**dict(valid='HUVEC-03', bs=8, device='cpu'), **kw})

def protocols(emb):
    "experiment → protocols of its rows"
    how = emb.get('Metadata_protocol', pd.Series('inductive', emb.index))
    return {e: set(p) for e, p in how.groupby(emb.Metadata_experiment)}

def index_of(learn):
    emb = learn.embed(learn.dls.train.items, **HOW)
    return EmbeddingIndex(emb)

def refused(emb, index, protocol='inductive', needs='transductive'):
    with pytest.raises(ScreenError, match=f"ask for protocol='{needs}'"): predict_wells(emb, index, protocol)

# ---- pseudo-labels

@pytest.fixture(scope='module')
def taught(screen):
    "A learner that was trained on HUVEC-17 under its own labels, its index and its folder"
    t, learn = screen.table, learner(dls_of(screen))
    rows = t[t.experiment == 'HUVEC-17']
    assert learn.protocol == 'inductive'
    quiet(learn, lambda: learn.fit_pseudo(rows, rounds=1, recipe=ONE, progress=False))
    return learn, index_of(learn)

ALL_OF = {'HUVEC-01': {'inductive'}, 'HUVEC-02': {'inductive'}, 'HUVEC-03': {'inductive'}, 'HUVEC-17': {'transductive'}, 'HUVEC-18': {'inductive'}}

def test_pseudo_labeled_experiments_are_transductive(screen, taught, tmp_path):
    t, source, (learn, index) = screen.table, screen.source, taught
    assert learn.protocol == 'transductive' and learn.model.pseudo_experiments == ('HUVEC-17',)
    m = load_model(learn.to_model(index).save(tmp_path/'m'))
    assert m.config['pseudo_experiments'] == ['HUVEC-17'] and 'HUVEC-17 under its own labels' in (tmp_path/'m/README.md').read_text()
    assert m.config['metrics'].get('protocol', 'inductive') == 'inductive'
    parts = embed_parts(tmp_path/'parts', m.model, m.spec, Screen(t, source), **HOW)
    for emb in (learn.embed(t, **HOW), m.embed(Screen(t, source), **HOW), pd.concat(list(parts.experiments())), learn.embed(spec_dl(learn.dls.spec, Screen(t, source), device='cpu'), **HOW)):
        assert protocols(emb) == ALL_OF
        test = emb[(emb.Metadata_experiment == 'HUVEC-17') & (emb.Metadata_well_type == 'treatment')]
        for p in ('inductive', 'adapted'): refused(test, index, p)
        assert set(predict_wells(test, index, 'transductive')[0].protocol) == {'transductive'}
        free = emb[(emb.Metadata_experiment == 'HUVEC-18') & (emb.Metadata_well_type == 'treatment')]
        assert set(predict_wells(free, index)[0].protocol) == {'inductive'}
    assert m.protocols(t[t.experiment == 'HUVEC-17']).tolist() == ['transductive']*(t.experiment == 'HUVEC-17').sum()
    assert protocols(m.embed(Screen(t[t.experiment != 'HUVEC-01'], source), adapt='experiment', **HOW)) == \
           {e: {'transductive' if e == 'HUVEC-17' else 'adapted'} for e in ALL_OF if e != 'HUVEC-01'}
    assert protocols(learn.embed(t[t.experiment == 'HUVEC-17'].assign(protocol='inductive'), **HOW)) == {'HUVEC-17': {'transductive'}}     # a table cannot say otherwise

def test_a_round_that_was_interrupted_counts(screen):
    class Stop(Callback):
        def after_step(self): raise KeyboardInterrupt
    learn = learner(dls_of(screen))
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.fit_pseudo(rounds=1, first=1., last=1., recipe=ONE, cbs=Stop(), progress=False))
    assert learn.protocol == 'transductive' and learn.model.pseudo_experiments == ('HUVEC-17', 'HUVEC-18')

# ---- loaders and rows

@pytest.mark.parametrize('norm, norm_from', [('plate', 'all'), ('plate', 'controls'), ('experiment', 'all'), ('own', 'all')])
def test_a_loader_and_its_rows_are_the_same(screen, norm, norm_from):
    learn = learner(dls_of(screen, norm=norm, norm_from=norm_from), metadata='cell_type,plate_group')
    a, b = learn.embed(learn.dls.valid, **HOW), learn.embed(None, **HOW)
    want = {'HUVEC-03': {'inductive' if norm == 'own' else 'adapted'}}
    assert protocols(a) == protocols(b) == want
    np.testing.assert_allclose(emb_features(a), emb_features(b), atol=1e-5)
    if norm != 'own': refused(a, index_of(learn), needs='adapted')
    for rows in (learn.dls.valid, None): assert protocols(learn.embed(rows, mask=(), **HOW)) == {'HUVEC-03': {'transductive'}}
    told = learn.embed(learn.dls.valid, mask=(), **HOW)
    assert np.abs(emb_features(told) - emb_features(a)).max() > 1e-4                 # the group makes a difference

def test_statistics_of_a_plate_are_those_of_training(screen):
    "Of whole plates, whatever rows of them are asked for"
    t, learn = screen.table, learner(dls_of(screen, norm='plate'))
    some = t[(t.experiment == 'HUVEC-17') & (t.well_type == 'treatment')]
    whole = learn.embed(t[t.experiment == 'HUVEC-17'], **HOW).set_index('Metadata_site_id').loc[some.site_id].reset_index()
    np.testing.assert_allclose(emb_features(learn.embed(some.iloc[:3], **HOW)), emb_features(whole)[:3], atol=1e-5)
    few = screen[some.iloc[:3]]
    np.testing.assert_allclose(emb_features(embed_screen(learn.model, learn.dls.spec, few, **HOW)), emb_features(whole)[:3], atol=1e-5)
    own = embed_screen(learn.model, learn.dls.spec, few, stat_rows=few.table, **HOW)
    assert np.abs(emb_features(own) - emb_features(whole)[:3]).max() > 1e-4
    without = learner(dls_of(screen[t[t.dataset != 'test']], norm='plate'))         # rows that the table does not have
    test = t[t.experiment == 'HUVEC-17']
    np.testing.assert_allclose(emb_features(without.embed(test, **HOW)), emb_features(embed_screen(without.model, without.dls.spec, screen[test], **HOW)), atol=1e-6)

@pytest.mark.parametrize('what, kw, word', [('train', {}, 'shuffled'), ('valid', dict(adapt='experiment'), 'adapt cannot be given'), ('valid', dict(views='random', seed=1), 'views, seed cannot')])
def test_loaders_that_are_not_a_table(screen, what, kw, word):
    learn = learner(dls_of(screen))
    with pytest.raises(ScreenError, match=word): learn.embed(getattr(learn.dls, what), **HOW, **kw)

# ---- metadata that is told

@pytest.mark.parametrize('metadata, mask, use, blank, told', [
    ('plate_group', (), True, False, True), ('plate_group', ('experiment',), True, False, True), ('cell_type,plate_group', (), True, False, True),
    ('plate_group', ('plate_group',), True, False, False), ('plate_group', (), False, False, False), ('plate_group', (), True, True, False),
    ('cell_type', (), True, False, False), ((), (), True, False, False),
    ('experiment', (), True, False, False)])                                        # no name of an experiment that was not trained on is known
def test_plate_groups_that_are_told(screen, tmp_path, metadata, mask, use, blank, told):
    t = screen.table.assign(plate_group=pd.NA if blank else screen.table.plate_group.fillna(screen.table.plate % 2).astype('Int64'))
    learn = learner(dls_of(screen), metadata=metadata)
    learn.model.use_metadata = use
    index = index_of(learn)
    m = load_model(learn.to_model(index).save(tmp_path/'m'))
    want = {e: {'transductive' if told and e not in TRAINED else 'inductive'} for e in ALL_OF}
    for emb in (learn.embed(t, mask=mask, **HOW), m.embed(screen[t], mask=mask, **HOW), embed_screen(learn.model, learn.dls.spec, screen[t], mask=mask, **HOW)):
        assert protocols(emb) == want
        test = emb[(emb.Metadata_dataset == 'test').to_numpy() & (emb.Metadata_well_type == 'treatment').to_numpy()]
        if told: refused(test, index); refused(test, index, 'adapted')
        else: predict_wells(test, index)

def test_names_of_experiments_that_were_not_trained_on(screen):
    "A vocabulary that knows them, such as that of an earlier split, does not make them trained on"
    dls = dls_of(screen)
    learn = learner(dls_of(screen, vocabs={**dls.spec.vocabs, 'experiment': ['#unknown#', *sorted(screen.table.experiment.unique())]}), metadata='experiment')
    assert protocols(learn.embed(screen.table, mask=(), **HOW)) == {e: {'inductive' if e in TRAINED else 'transductive'} for e in ALL_OF}
    assert 'Metadata_protocol' not in learn.embed(screen.table, **HOW)

def test_accuracy_of_training_is_called_what_it_is(screen, tmp_path):
    for name, kw, data, want in [('a', dict(metadata='plate_group'), {}, 'transductive'), ('b', {}, dict(norm='plate'), 'adapted'), ('c', dict(metadata='cell_type'), {}, 'inductive')]:
        learn = learner(dls_of(screen, **data), **kw)
        learn.history = pd.DataFrame(dict(stage=['a'], epoch=[0], valid_loss=[1.], accuracy=[.5]))
        folder = learn.to_model(index_of(learn)).save(tmp_path/name)
        assert load_model(folder).config['metrics']['protocol'] == want == highest_protocol(row_protocols(learn.model, learn.dls.spec, learn.dls.valid.items, mask=()))

# ---- control wells of the plate

def test_plates_that_are_compared_with_their_controls(screen):
    learn = learner(dls_of(screen), difference_learner, controls='all')
    quiet(learn, lambda: learn.fit_recipe(ONE))
    t, index = learn.dls.screen.table, index_of(learn)
    test = t[(t.experiment == 'HUVEC-17') & (t.well_type == 'treatment')]
    before = learn.embed(test, **HOW)
    assert protocols(before) == {'HUVEC-17': {'inductive'}}           # not measured: the mean of the training plates
    learn.measure_controls(test, 'all')
    emb = learn.embed(test, **HOW)
    assert protocols(emb) == {'HUVEC-17': {'adapted'}} and np.abs(emb_features(emb) - emb_features(before)).max() > 1e-4
    refused(emb, index, needs='adapted')
    assert protocols(learn.embed(None, **HOW)) == {'HUVEC-03': {'adapted'}}
    hidden = learn.embed(test, mask=('plate_group', 'experiment', 'plate_name'), **HOW)
    assert protocols(hidden) == {'HUVEC-17': {'inductive'}} and np.array_equal(emb_features(hidden), emb_features(before))
    with pytest.raises(ScreenError, match='no column plate_name'): learn.embed(test.drop(columns='plate_name'), **HOW)

# ---- one fingerprint

def test_the_fingerprint_changes_with_what_makes_embeddings(screen, tmp_path):
    learn = learner(dls_of(screen), metadata='cell_type')
    spec, was = learn.dls.spec, model_fingerprint(learn.model, learn.dls.spec)
    index = index_of(learn); index.model = was
    learn.to_model(index).save(tmp_path/'right')
    for k in dict(size=24, norm='plate', clahe=True, bits=16, sites=2, channels=spec.channels[::-1]).items():
        assert model_fingerprint(learn.model, replace(spec, **dict([k]))) != was
    assert model_fingerprint(learn.model, replace(spec, labels=spec.labels[::-1])) == was
    assert model_fingerprint(learn.model, replace(spec, vocabs={**spec.vocabs, 'cell_type': ['#unknown#', 'RPE']})) != was
    learn.model.use_metadata = False
    assert model_fingerprint(learn.model, spec) != was
    with pytest.raises(ScreenError, match='built by another model'): learn.to_model(index).save(tmp_path/'flag')
    learn.model.use_metadata, learn.dls.spec.size = True, 24
    with pytest.raises(ScreenError, match='built by another model'): learn.to_model(index).save(tmp_path/'size')

def test_parts_know_the_same_fingerprint(screen, tmp_path):
    learn = learner(dls_of(screen))
    embed_parts(tmp_path/'p', learn.model, learn.dls.spec, screen, **HOW)
    assert json.loads((tmp_path/'p/parts.json').read_text())['model'] == model_fingerprint(learn.model, learn.dls.spec)

def test_the_order_of_protocols_is_that_of_predictions():
    assert highest_protocol([]) == 'inductive' and highest_protocol(['adapted', 'inductive']) == 'adapted'
