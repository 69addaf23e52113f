"The network as in training when it names wells (16th place): statistics of each batch and dropout, of one experiment at a time."
import copy
import numpy as np, pytest, torch
from torch import nn
from helpers import learner, quiet, refused, same
from rcic_fastai.batch.data import screen_dls, spec_dl
from rcic_fastai.embed import embed as E
import rcic_fastai.folder                # learn.to_model
from rcic_fastai.embed.table import emb_features
from rcic_fastai.model.batchnorm import as_in_training
from rcic_fastai.predict.plan import plan_prediction
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.layout import simulate_screen

HOW = dict(tta=1, progress=False)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('as_in_training')/'screen'
    simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17', 'HUVEC-18'], sirnas=9, size=32, sites=1, plates=1, controls=0, test=['HUVEC-17', 'HUVEC-18'], progress=False)
    return open_screen(folder)

@pytest.fixture(scope='module')
def model(drawn):
    torch.manual_seed(0)
    learn = learner(screen_dls(drawn.train, valid='none', bs=8, device='cpu'))
    quiet(learn, lambda: learn.fit(1, 1e-3))
    return learn.to_model(tta=1, progress=False)

def asked(drawn): return Screen(drawn.test.table[drawn.test.table.well_type == 'treatment'], drawn.source)
def embedded(model, screen, **kwargs): return E.embed_screen(model.model, model.spec, screen, **{**HOW, 'adapt': 'experiment', 'in_training': True, 'bs': 4, **kwargs})

@pytest.fixture
def without_dropout(model):
    layers = [m for m in model.model.modules() if isinstance(m, nn.Dropout)]
    was = [m.p for m in layers]
    assert any(was)
    for m in layers: m.p = 0.
    yield model
    for m, p in zip(layers, was): m.p = p

def test_batches_are_of_one_experiment_and_use_their_own_statistics(without_dropout, drawn):
    "By hand: nine wells of each experiment in batches of three, as one well alone would have no statistics"
    model, screen = without_dropout, asked(drawn)
    emb = embedded(model, screen)
    _, plan = E._planned(model.model, model.spec, screen.table, E.EmbedOptions(**HOW, adapt='experiment', in_training=True, bs=4))
    for p in plan:
        rows = screen.table.iloc[p.at]
        assert len(rows) == 9 and rows.experiment.nunique() == 1
        for at in (slice(0, 3), slice(3, 6), slice(6, 9)):          # 9 % 4 is one: three is the nearest size that leaves none
            (batch,) = spec_dl(model.spec, Screen(rows.iloc[at], drawn.source), bs=9, device='cpu', mask=('plate_group', 'experiment'))
            with as_in_training(model.model): want = nn.functional.normalize(model.model.embed(*batch[:1 + len(model.model.inputs)]), dim=1)
            mine = emb.set_index('Metadata_site_id').loc[rows.site_id.iloc[at]].reset_index()
            np.testing.assert_allclose(emb_features(mine), want.numpy(), atol=2e-5)

def test_the_order_of_a_table_does_not_matter(model, drawn):
    "One that is sorted by perturbation would tell of which perturbation a batch is"
    rows = asked(drawn).table
    a = embedded(model, Screen(rows, drawn.source)).set_index('Metadata_site_id')
    for other in (rows.sort_values('sirna'), rows[::-1]):
        b = embedded(model, Screen(other, drawn.source)).set_index('Metadata_site_id').loc[a.index]
        np.testing.assert_allclose(emb_features(a.reset_index()), emb_features(b.reset_index()), atol=2e-5)
    assert [*embedded(model, Screen(other, drawn.source)).Metadata_site_id] == [*other.site_id]

def test_dropout_is_drawn_and_repeated(model, drawn):
    a, b, c = (emb_features(embedded(model, asked(drawn), **how)) for how in ({}, {}, dict(seed=1)))
    assert np.array_equal(a, b) and not np.allclose(a, c, atol=1e-3)

def test_everything_is_as_before(model, drawn):
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    embedded(model, asked(drawn))
    assert same(before, model.model.state_dict()) and not any(m.training for m in model.model.modules())

def test_parts_that_were_interrupted_are_those_of_one_run(model, drawn, tmp_path, monkeypatch):
    def parts(folder, **kwargs): return E.embed_parts(folder, model.model, model.spec, asked(drawn), **{**HOW, 'adapt': 'experiment', 'in_training': True, 'bs': 2, 'part': 4, **kwargs})
    whole, write, made = [emb_features(t) for t in parts(tmp_path/'whole')], E._write_part, []
    def stop(*args):
        if len(made) == 3: raise KeyboardInterrupt
        made.append(write(*args))
    with monkeypatch.context() as m:
        m.setattr(E, '_write_part', stop)
        with pytest.raises(KeyboardInterrupt): parts(tmp_path/'p')
    assert all(map(np.array_equal, whole, [emb_features(t) for t in parts(tmp_path/'p')])) and len(whole) > 3
    refused(lambda: parts(tmp_path/'whole', in_training=False), 'different adapt', 'as in training')

def test_an_experiment_of_one_well_keeps_what_is_remembered(model, drawn, capsys):
    one = asked(drawn).table.iloc[:1]
    a = embedded(model, Screen(one, drawn.source))
    assert 'the remembered ones are used: HUVEC-17' in capsys.readouterr().err
    b = E.embed_screen(model.model, model.spec, Screen(one, drawn.source), **HOW)
    np.testing.assert_allclose(emb_features(a), emb_features(b), atol=1e-6)

@pytest.mark.parametrize('sizes, bs, want', [([9], 4, 3), ([8], 4, 4), ([3], 2, 3), ([2], 9, 9), ([9, 4], 8, 7), ([1, 8], 7, 6), ([5, 1], 3, 3)])
def test_no_batch_holds_one_sample(sizes, bs, want):
    assert E._of_two(sizes, bs) == want and all(n % want != 1 for n in sizes if n > 1)

def test_predictions(model, drawn):
    how = dict(HOW, adapt='batch', by='classifier')
    a, b = (model.predict(drawn, p, **how) for p in ('adapted', 'transductive'))
    assert a.protocol.eq('adapted').all() and b.protocol.eq('transductive').all() and len(a) == 18
    other = model.predict(drawn, 'adapted', **{**how, 'adapt': 'experiment'})
    assert (a.score - other.score).abs().max() > 1e-3
    assert 'as in training' in repr(plan_prediction(model, drawn, 'adapted', adapt='batch', by='classifier'))

def test_what_does_not_fit(model, drawn):
    refused(lambda: model.predict(drawn, 'adapted', adapt='batch', **HOW), "adapt='batch'", "by='classifier'")
    refused(lambda: model.predict(drawn, 'inductive', adapt='batch', by='classifier', **HOW), 'uses pictures of the test batch')
    refused(lambda: model.predict(drawn, 'adapted', adapt='batch', by='classifier', adapt_from='controls', **HOW), 'adapt_from')
    refused(lambda: E.EmbedOptions(in_training=True), "adapt='experiment'")
    for more in ('adapt_rows', 'tent_rows'): refused(lambda: E.EmbedOptions(in_training=True, adapt='experiment', **{more: drawn.test.table}), 'leave out adapt_rows and tent_rows')

def test_a_well_that_is_alone_is_said_whatever_others_there_are(model, drawn):
    "Controls beside it give no statistics of batches, so the record does not say that they did"
    rows = drawn.test.table
    alone = rows[(rows.well_type == 'treatment') & (rows.experiment == 'HUVEC-17')].index[1:]
    beside = rows.assign(well_type=rows.well_type.where(~rows.index.isin(alone), 'negative_control'))
    index = copy.copy(model.adapted_index)
    index.labels = index.labels.assign(well_type=['negative_control', *index.labels.well_type[1:]])       # one that takes statistics of controls, too
    other = copy.copy(model)
    other.adapted_index = index
    plans = {a: plan_prediction(other, Screen(beside, drawn.source), 'adapted', adapt=a, by='classifier') for a in ('batch', 'experiment')}
    said = {a: [n for n in p.record['notes'] if 'the remembered ones are used: HUVEC-17' in n] for a, p in plans.items()}
    assert len(said['batch']) == 1 and not said['experiment']

def test_a_recipe_that_says_so_gives_way(model, drawn):
    "An index and the inductive protocol are used without"
    said = copy.copy(model)
    said.config = {**model.config, 'recipe': dict(stages=[dict(epochs=1)], predict=dict(by='classifier', adapt='batch'))}
    made = {p: plan_prediction(said, drawn, p).options for p in ('inductive', 'adapted', 'transductive')}
    assert [o.in_training for o in made.values()] == [False, True, True] and made['inductive'].adapt is None
    assert not plan_prediction(said, drawn, 'adapted', by='index').options.in_training
