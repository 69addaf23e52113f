"""Telling a model the plate group: what it uses, what it changes, and what it leaves alone."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import refused, simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.table import emb_features
from rcic_fastai.folder import load_model
from rcic_fastai.predict.ensemble import ensemble_files, ensemble_predictions, name_wells
from rcic_fastai.predict.plan import *
from rcic_fastai.predict.predict import read_predictions
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.train.learner import screen_learner


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tell')/'screen'
    simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=16, size=48, controls=1, progress=False)
    return open_screen(folder)


@pytest.fixture(scope='module')
def model(drawn):
    dls = screen_dls(drawn.train, valid='none', bs=16, device='cpu')
    learn = screen_learner(dls, 'test_efficientnet', metadata='plate_group', pretrained=None, emb_dim=32, meta_dropout=.2)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(2, 5e-3)
    return learn.to_model(tta=1, progress=False)


def silent(model):
    "Return a copy of a model whose vectors of known groups are zero"
    twin = copy.copy(model)
    twin.model = copy.deepcopy(model.model)
    with torch.no_grad(): twin.model.metadata.tables['plate_group'].weight[1:] = 0
    return twin


def told(model, screen, **kwargs): return model.predict(screen, 'transductive', tta=1, progress=False, tell='plate_group', **kwargs)


def test_the_vectors_matter_when_told(model, drawn):
    a, b = told(model, drawn), told(silent(model), drawn)
    assert not np.allclose(a.score, b.score, atol=1e-4)
    assert not np.allclose(a.score, model.predict(drawn, 'transductive', tta=1, progress=False).score, atol=1e-4)


@pytest.mark.parametrize('protocol', ['inductive', 'adapted', 'transductive'])
def test_nothing_changes_where_nobody_is_told(model, drawn, protocol):
    a, b = (m.predict(drawn, protocol, tta=1, progress=False) for m in (model, silent(model)))
    pd.testing.assert_frame_equal(a, b)


def test_the_second_pass_tells_the_groups_of_the_first(model, drawn):
    plan = plan_prediction(model, drawn, 'transductive', tta=1, tell='plate_group')
    first = model.predict(drawn, 'transductive', tta=1, progress=False)
    second = told_plan(plan, first)
    assert second.told is None and second.index is model.told_adapted_index and second.options.mask == ('experiment',)
    per = second.screen.table.groupby(['experiment', 'plate']).plate_group
    assert (per.nunique() == 1).all()
    assert per.first().to_dict() == first.groupby(['experiment', 'plate']).plate_group.first().to_dict()
    assert second.options.adapt_rows.plate_group.notna().all()


def test_files_and_memory_agree_and_leave_nothing_beside(model, drawn, tmp_path):
    out = tmp_path/'answers.csv'
    written = told(model, drawn, out=out)
    pd.testing.assert_frame_equal(written, told(model, drawn))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != '.lock') == ['answers.csv', 'answers.json', 'answers.top.csv']


def test_a_folder_keeps_the_rows_that_were_told(model, drawn, tmp_path):
    again = load_model(model.save(tmp_path/'model'))
    for name in ('index', 'adapted_index', 'told_index', 'told_adapted_index'):
        assert np.allclose(getattr(again, name).features, getattr(model, name).features, atol=1e-6)
    pd.testing.assert_frame_equal(told(again, drawn), told(model, drawn))


def test_the_classifier_can_be_told_too(model, drawn):
    a = told(model, drawn, by='classifier')
    assert not np.allclose(a.score, model.predict(drawn, 'transductive', tta=1, progress=False, by='classifier').score, atol=1e-4)


def test_wrong_requests(model, drawn):
    refused(lambda: model.predict(drawn, tell='plate_group'), "tell='plate_group'", "ask for protocol='transductive'")
    refused(lambda: model.predict(drawn, 'transductive', tell='experiment'), 'choose from plate_group')
    refused(lambda: model.predict(drawn, 'transductive', tell='plate_group', correct='standardize'), 'cannot be had together')
    refused(lambda: model.predict(drawn, by='classifier', correct='standardize', protocol='adapted'), 'corrects embeddings')
    refused(lambda: model.predict(drawn, by='classifier', same_cell_type=True), 'restricts a search')
    refused(lambda: model.predict(drawn, by='oracle'), "by='oracle'", 'choose from index, classifier')
    refused(lambda: model.predict(drawn, assign='perhaps'), 'choose from yes, no')


def test_class_scores_are_those_of_the_classifier(model, drawn):
    "The mean over sites of the logarithms of the probabilities, from the model itself"
    pred = model.predict(drawn, by='classifier', tta=1, progress=False)
    emb = model.embed(drawn.test.treatments, tta=1, output='scores', progress=False)
    x = pd.DataFrame(emb_features(emb), columns=model.spec.labels).groupby(emb.Metadata_well_id.to_numpy()).mean()
    best = pd.Series(x.columns[(x.to_numpy() >= x.max(axis=1).to_numpy()[:, None] - 1e-6).argmax(1)], x.index)         # of a tie, the first
    assert (best.loc[pred.id_code].to_numpy() == pred.sirna.to_numpy()).all()
    assert np.allclose(x.max(axis=1).loc[pred.id_code], pred.score, atol=1e-5)
    assert np.allclose(np.exp(emb_features(emb)).sum(1), 1, atol=1e-4)


FOUND = ['plate_group', 'group_source', 'group_confidence']


def some_given(drawn):
    "Return a screen of two test experiments, the plate groups of one of them given: other groups than a weak model may find"
    t = drawn.table
    rest = t[t.experiment != 'HUVEC-17'].assign(plate_group=pd.NA)
    rest = rest[rest.experiment == 'HUVEC-02'].assign(dataset='test')
    last = t[t.experiment == 'HUVEC-17']
    last = last.assign(plate_group=(last.plate.astype(int) + 1) % 4)
    return Screen(pd.concat([rest, last], ignore_index=True).astype({'plate_group': 'Int64'}), drawn.source)


@pytest.mark.parametrize('by, adapt', [('index', 'auto'), ('index', 'no'), ('classifier', 'auto')])
def test_groups_are_not_inferred_from_scores_that_were_told_them(model, drawn, by, adapt):
    how, screen = dict(tell='plate_group', tta=1, progress=False, by=by, adapt=adapt), some_given(drawn)
    alone, scores = model.predict(screen, 'transductive', **how), model.class_scores(screen, 'transductive', **how)
    for pred in (name_wells(scores), ensemble_predictions([scores, scores.iloc[::-1]])):
        pd.testing.assert_frame_equal(pred[['id_code', 'sirna', *FOUND]], alone[['id_code', 'sirna', *FOUND]], check_dtype=False, atol=1e-4)
        assert np.allclose(pred.score, alone.score, atol=1e-5)
    assert alone.groupby('experiment').group_source.first().to_dict() == {'HUVEC-02': 'inferred', 'HUVEC-17': 'given'}
    untold = model.class_scores(screen, 'transductive', **{**how, 'tell': 'no'})
    for tables in ([scores, untold], [untold, scores]):
        pd.testing.assert_frame_equal(ensemble_predictions(tables)[FOUND], alone[FOUND], check_dtype=False, atol=1e-4)


def test_files_of_told_predictions_are_averaged_as_they_answer(model, drawn, tmp_path):
    screen = some_given(drawn)
    files = [tmp_path/'a.csv', tmp_path/'b.csv']
    for f in files: alone = told(model, screen, out=f, scores=True)
    mean = ensemble_files(tmp_path/'mean.csv', *files)
    pd.testing.assert_frame_equal(mean[['id_code', 'sirna', *FOUND]], alone[['id_code', 'sirna', *FOUND]], check_dtype=False, atol=1e-4)
    assert read_predictions(tmp_path/'mean.csv').attrs['record']['plate_groups'] == read_predictions(files[0]).attrs['record']['plate_groups']
    assert not list(tmp_path.glob('*part*'))
