"Entropy lowered for a new experiment (Tent): the step by hand, everything put back, the guard, and predictions with adapt='tent'."
import copy, json, math
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from helpers import learner, quiet, refused
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import ScreenError
from rcic_fastai.embed import embed as E
from rcic_fastai.embed.embed import embed_parts, embed_screen
from rcic_fastai.embed.table import emb_features
import rcic_fastai.folder                # learn.to_model
from rcic_fastai.model import tent as T
from rcic_fastai.model.batchnorm import adapted_batchnorm
from rcic_fastai.model.tent import *
from rcic_fastai.predict.plan import plan_prediction
from rcic_fastai.results.report import _one_record
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.layout import simulate_screen

HOW = dict(tta=1, progress=False)
TEST = ['HUVEC-17', 'HUVEC-18']


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "Two experiments to learn and two to name, of 32 treated wells and 4 controls each"
    folder = tmp_path_factory.mktemp('tent')/'screen'
    simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', *TEST], sirnas=32, size=32, sites=1, plates=4, controls=0, test=TEST, progress=False)
    return open_screen(folder)

@pytest.fixture(scope='module')
def model(drawn):
    torch.manual_seed(0)
    learn = learner(screen_dls(drawn.train, valid='none', bs=16, device='cpu', seed=0), seed=0)
    quiet(learn, lambda: learn.fit(2, 5e-3))
    return learn.to_model(tta=1, progress=False)

@pytest.fixture
def eager(monkeypatch):
    "Steps that change a lot, and are kept"
    real = E.lowered_entropy
    monkeypatch.setattr(T, 'why_undone', lambda before, after: '')
    monkeypatch.setattr(E, 'lowered_entropy', lambda *args, **kwargs: real(*args, **{**kwargs, 'steps': 4, 'lr': .05}))

def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def unchanged(m, was): return all(torch.equal(v, was[k]) for k, v in m.state_dict().items())
def named(model, screen, protocol='adapted', adapt='tent', **kwargs): return model.predict(screen, protocol, adapt=adapt, **{**HOW, **kwargs})
def treated(drawn): return drawn.table[drawn.table.experiment.isin(TEST) & (drawn.table.well_type == 'treatment')]
def embedded(model, source, rows, **kwargs): return embed_screen(model.model, model.spec, Screen(rows, source), adapt='experiment', **{**HOW, 'bs': 8, 'tent_rows': rows, **kwargs})


# ---- the step

def small(K=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, K)).double().eval()

def softmax(m, b): return m(*b).softmax(1)

def by_hand(net, x, eps=1e-5):
    "The gradient of the mean entropy for scale and offset, number by number"
    u = net[0](x).detach().numpy()
    W, c = net[2].weight.detach().numpy(), net[2].bias.detach().numpy()
    gamma, beta = net[1].weight.detach().numpy(), net[1].bias.detach().numpy()
    n, d = u.shape
    dg, db, H = np.zeros(d), np.zeros(d), 0.
    mean, var = u.sum(0)/n, ((u - u.sum(0)/n)**2).sum(0)/n
    for i in range(n):
        h = [(u[i, j] - mean[j])/math.sqrt(var[j] + eps) for j in range(d)]
        z = [sum(W[k, j]*(gamma[j]*h[j] + beta[j]) for j in range(d)) + c[k] for k in range(len(c))]
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v)/total for v in z]
        own = -sum(v*math.log(v) for v in p)
        H += own/n
        for k in range(len(c)):
            dz = -p[k]*(math.log(p[k]) + own)
            for j in range(d):
                dg[j] += dz*W[k, j]*h[j]/n
                db[j] += dz*W[k, j]/n
    return dg, db, H

def test_the_first_step_is_that_of_the_formula():
    net, x = small(), torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad(): net[1].weight.uniform_(.5, 1.5), net[1].bias.uniform_(-.5, .5)
    was, (dg, db, H) = state(net), by_hand(net, x)
    with lowered_entropy(net, [(x,)], answer=softmax, steps=1, lr=.01) as tent:
        for now, key, g in ((net[1].weight, '1.weight', dg), (net[1].bias, '1.bias', db)):
            np.testing.assert_allclose(now.detach().numpy(), was[key].numpy() - .01*g/(np.abs(g) + 1e-8), rtol=0, atol=1e-8)
        others = [k for k in was if k.split('.')[0] != '1']
        assert all(torch.equal(net.state_dict()[k], was[k]) for k in others)
    assert abs(tent.steps[0] - H) < 1e-10 and len(tent.steps) == 1 and not tent.undone

def test_steps_are_whole_passes_and_lower_the_entropy():
    net, x = small(), torch.randn(42, 4).double()
    batches = [(x[:20],), (x[20:40],), (x[40:41],), (x[41:],)]                # two of a single sample, which takes no step
    with lowered_entropy(net, batches, answer=softmax, steps=9) as tent: assert len(tent.steps) == 3*2
    assert tent.after.entropy < tent.before.entropy

def test_statistics_are_of_all_and_scales_of_those_that_are_named():
    "As in a screen with controls that the model does not name"
    net, x, others = small(), torch.randn(20, 4).double(), torch.randn(20, 4).double() + 3
    with adapted_batchnorm(net, [(x,), (others,)]): both = net[1].running_mean.clone()
    with lowered_entropy(net, [(x,)], [(x,), (others,)], softmax) as tent: torch.testing.assert_close(net[1].running_mean, both)     # the layer before has no scale
    assert not tent.undone


# ---- everything is put back

@pytest.mark.parametrize('what', [None, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('when', ['inside', 'in a step', 'measured again'])
def test_the_model_is_what_it_was(what, when):
    net, x = small(), torch.randn(40, 4).double()
    net.train()
    net[2].eval()
    net[1].bias.requires_grad_(False)
    net[1].weight.grad = torch.arange(6.).double()
    net[1].weight.data[0] = -0.
    was, grad, calls = state(net), net[1].weight.grad, []
    def answer(m, b):
        calls.append(torch.is_grad_enabled())
        if what and when == 'in a step' and len(calls) == 5: raise what
        if what and when == 'measured again' and True in calls and not calls[-1]: raise what
        return softmax(m, b)
    def go():
        with lowered_entropy(net, [(x[:20],), (x[20:],)], answer=answer, lr=.1, steps=4):
            assert not torch.equal(net[1].weight, was['1.weight'])
            if what and when == 'inside': raise what
    if what is None: go()
    else:
        with pytest.raises(what): go()
    assert unchanged(net, was) and torch.signbit(net[1].weight[0])
    assert net[1].weight.grad is grad and torch.equal(grad, torch.arange(6.).double()) and all(p.grad is None for k, p in net.named_parameters() if k != '1.weight')
    assert [p.requires_grad for p in net[1].parameters()] == [True, False]
    assert [m.training for m in net.modules()] == [True, True, True, False]


# ---- the guard

@pytest.mark.parametrize('after, undone', [((1.9, .1), ''), ((2.1, .05), 'rose'), ((1., .21), 'from 10.0% to 21.0%'), ((1., .2), ''), ((math.nan, .1), 'no number'), ((math.inf, .1), 'infinite')])
def test_what_is_not_trusted(after, undone):
    why = why_undone(Sureness(2., .1), Sureness(*after))
    assert undone in why and bool(why) == bool(undone)

def test_half_of_the_other_answers_may_not_join_a_frequent_one():
    assert not why_undone(Sureness(.6, .6), Sureness(.3, .8)) and '60.0% to 81.0%' in why_undone(Sureness(.6, .6), Sureness(.3, .81))

def test_a_collapse_is_undone():
    "Answers that all become one: the offset behind BatchNorm reaches all of them"
    net, x = small(12), torch.randn(60, 4).double()
    with adapted_batchnorm(net, [(x,)]): alone = state(net)
    with lowered_entropy(net, [(x,)], answer=softmax, steps=100, lr=.3) as tent: assert unchanged(net, alone)
    assert 'most frequent answer' in tent.undone and tent.after.most > 2*tent.before.most and tent.after.entropy < tent.before.entropy

def test_a_step_into_nothing_is_undone():
    net, x = small(), torch.randn(40, 4).double()
    with adapted_batchnorm(net, [(x,)]): alone = state(net)
    with lowered_entropy(net, [(x,)], answer=softmax, steps=5, lr=math.inf) as tent: assert unchanged(net, alone)
    assert 'no number' in tent.undone and len(tent.steps) == 2


# ---- embeddings

def test_an_undone_experiment_is_that_of_adabn(model, drawn, monkeypatch, capsys):
    rows = treated(drawn)
    alone = embedded(model, drawn.source, rows, tent_rows=None)
    monkeypatch.setattr(T, 'why_undone', lambda before, after: 'it was asked for' if before.entropy else '')
    got = embedded(model, drawn.source, rows)
    assert np.array_equal(emb_features(got), emb_features(alone))
    said = capsys.readouterr().err
    assert [said.count(f'The entropy is not lowered in {e}, where BatchNorm statistics alone are used: it was asked for.') for e in TEST] == [1, 1]

def test_each_experiment_for_itself_in_any_order(model, drawn, eager):
    rows, was = treated(drawn), state(model.model)
    both = embedded(model, drawn.source, rows)
    assert unchanged(model.model, was) and not any(m.training for m in model.model.modules())
    assert not np.allclose(emb_features(both), emb_features(embedded(model, drawn.source, rows, tent_rows=None)), atol=1e-3)
    one = embedded(model, drawn.source, rows[rows.experiment == TEST[1]])
    assert np.array_equal(emb_features(both)[(rows.experiment == TEST[1]).to_numpy()], emb_features(one))
    mixed = rows.sample(frac=1, random_state=0)
    got = embedded(model, drawn.source, mixed).set_index('Metadata_site_id').loc[rows.site_id].reset_index()
    np.testing.assert_allclose(emb_features(got), emb_features(both), atol=1e-5)
    assert set(both.Metadata_protocol) == {'adapted'} and set(both.Metadata_batchnorm) == {'experiment, entropy lowered'}

def test_few_wells_are_left_to_adabn(model, drawn, eager, capsys):
    rows = treated(drawn)
    rows = rows.drop(rows.index[rows.experiment == TEST[0]][:1])                  # 31 wells
    got, alone = embedded(model, drawn.source, rows), embedded(model, drawn.source, rows, tent_rows=None)
    is_few = (rows.experiment == TEST[0]).to_numpy()
    assert np.array_equal(emb_features(got)[is_few], emb_features(alone)[is_few])
    assert not np.allclose(emb_features(got)[~is_few], emb_features(alone)[~is_few], atol=1e-3)
    assert f'fewer than 32 wells to name, BatchNorm statistics alone are used and the entropy is not lowered: {TEST[0]}.' in capsys.readouterr().err

class Failing(PngTree):
    "A source that reads so many sites and then no more"
    def __init__(self, source, left): self.__dict__.update(source.__dict__, left=left)
    def _read(self, site_id, out):
        self.left -= 1
        if self.left < 0: raise ScreenError('The disk is gone.')
        super()._read(site_id, out)

def test_stopped_anywhere_the_parts_are_the_same(model, drawn, tmp_path):
    rows = treated(drawn)
    def parts(folder, source=drawn.source, **kwargs):
        return embed_parts(folder, model.model, model.spec, Screen(rows, source), adapt='experiment', **{**HOW, 'bs': 8, 'part': 8, 'tent_rows': rows, **kwargs})
    want, was = parts(tmp_path/'whole'), state(model.model)
    done = []
    for left in (100, 32*9 + 20, 32*10 + 100):             # in a step, among the answers of the first experiment, in a step of the second
        with pytest.raises(ScreenError, match='disk is gone'): parts(tmp_path/str(left), Failing(drawn.source, left))
        assert unchanged(model.model, was)
        done.append(len(list((tmp_path/str(left)).glob('part-*'))))
        got = parts(tmp_path/str(left))
        for a, b in zip(got, want, strict=True): pd.testing.assert_frame_equal(a, b, check_exact=True)
        assert got.said() == want.said() and [*got.said()] == TEST and all('entropy' in o for o in got.said().values())
    assert done[0] == 0 < done[1] < done[2] == 4, done
    refused(lambda: parts(tmp_path/'whole', tent_rows=None), 'different adapt')
    refused(lambda: parts(tmp_path/'whole', tent_rows=rows[1:]), 'different adapt')
    other = copy.deepcopy(model)
    with torch.no_grad(): other.model.classifier.weight.mul_(-1)                   # embeddings depend on what the classifier says
    refused(lambda: embed_parts(tmp_path/'whole', other.model, model.spec, Screen(rows, drawn.source), adapt='experiment', **HOW, bs=8, part=8, tent_rows=rows), 'different adapt')

def test_rows_without_statistics_are_refused(): refused(lambda: E.EmbedOptions(tent_rows=pd.DataFrame()), 'tent_rows', "adapt='experiment'")


# ---- predictions

def test_labels_of_the_test_are_never_read(model, drawn, eager):
    t = drawn.table
    is_test, mixed = t.experiment.isin(TEST), t.copy()
    for c in ('sirna', 'sirna_id'): mixed.loc[is_test, c] = t.loc[is_test, c].sample(frac=1, random_state=0).to_numpy()
    a, b = named(model, drawn), named(model, Screen(mixed, drawn.source))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert set(a.protocol) == {'adapted'}
    assert not np.allclose(a.score, named(model, drawn, adapt='experiment').score, atol=1e-3)

def test_inductive_answers_are_as_before(model, drawn, eager):
    before = named(model, drawn, 'inductive', adapt='')
    named(model, drawn)
    pd.testing.assert_frame_equal(named(model, drawn, 'inductive', adapt=''), before, check_exact=True)
    refused(lambda: named(model, drawn, 'inductive'), "adapt='tent'", 'uses pictures of the test batch', "protocol='adapted'")
    said = copy.copy(model)
    said.config = {**model.config, 'recipe': dict(stages=[dict(epochs=1)], predict=dict(adapt='tent'))}
    assert plan_prediction(said, drawn, 'inductive').options.tent_rows is None
    plan = plan_prediction(said, drawn, 'adapted')
    assert plan.record['adapt'] == 'tent' and plan.options.adapt == 'experiment' and set(plan.options.tent_rows.experiment) == {*TEST} and 'entropy lowered' in repr(plan)

@pytest.mark.parametrize('by', ['index', 'classifier'])
def test_the_index_is_that_of_adabn(model, drawn, by):
    plans = [plan_prediction(model, drawn, 'adapted', adapt=a, by=by) for a in ('experiment', 'tent')]
    vectors = [getattr(p.index, 'rows', p.index) for p in plans]
    assert len({len(p.index) for p in plans}) == 1 and type(vectors[0]) is type(vectors[1])
    if by == 'index': assert plans[0].index is plans[1].index is model.adapted_index

def test_wells_that_the_model_cannot_name_are_not_made_surer(model, drawn):
    "Those of other plate groups, for a model of one: their answers are all wrong"
    one = copy.copy(model)
    one.config = {**model.config, 'recipe': dict(stages=[dict(epochs=1)], only=dict(plate_group=1))}
    asked = Screen(drawn.table.assign(plate_group=(drawn.table.plate % 2).astype('Int64')), drawn.source)
    plan = plan_prediction(one, asked, 'adapted', adapt='tent')
    assert set(plan.options.tent_rows.site_id) == set(plan.screen.table.site_id) and set(plan.options.tent_rows.plate) == {1, 3}

def test_pixel_statistics_are_of_the_plates_that_are_made_surer(drawn, monkeypatch):
    "A learner that has not seen these experiments looks for their plates in the source"
    monkeypatch.setattr(E, 'FEW_WELLS', 4)
    learn = learner(screen_dls(drawn.train, valid='none', bs=16, norm='plate', device='cpu', seed=0), seed=0)
    rows = treated(drawn)
    emb = learn.embed(Screen(rows[rows.plate == 1], drawn.source), adapt='experiment', tent_rows=rows, **HOW)
    assert len(emb) == (rows.plate == 1).sum() and set(emb.Metadata_batchnorm) == {'experiment, entropy lowered'}

def test_what_cannot_be_asked_for(model, drawn):
    refused(lambda: named(model, drawn, adapt_from='controls'), "adapt='tent'", 'adapt_from')
    untrained = copy.copy(model)
    untrained.config = {**model.config, 'recipe': dict(stages=[dict(epochs=0)])}
    refused(lambda: named(untrained, drawn), "adapt='tent'", 'trains none', "adapt='experiment'")
    several = copy.copy(model)
    several.spec = SimpleNamespace(**{**vars(model.spec), 'several': True, 'per_group': False})
    refused(lambda: named(several, drawn), "adapt='tent'", 'several labels')
    refused(lambda: named(model, drawn, adapt='tents'), 'tent')

def test_the_command_records_what_it_did(model, drawn, tmp_path, monkeypatch, capsys):
    model.save(tmp_path/'model')
    monkeypatch.setattr(T, 'why_undone', lambda before, after: '')       # whatever this model would do
    rest = '--adapt tent --tta 1 --bs 8 --protocol'
    assert cli.rcic_predict(f'{tmp_path}/model {drawn.source.root} {tmp_path}/a.csv {rest} adapted'.split()) == 0
    record = json.loads((tmp_path/'a.json').read_text())
    assert record['adapt'] == 'tent' and record['protocol'] == 'adapted' and [*record['tent']] == TEST
    assert all(o.startswith('entropy') for o in record['tent'].values()), record['tent']
    assert _one_record(record)['BatchNorm statistics'] == 'of each experiment, entropy lowered'
    monkeypatch.setattr(T, 'why_undone', lambda before, after: 'it was asked for')
    assert cli.rcic_predict(f'{tmp_path}/model {drawn.source.root} {tmp_path}/b.csv {rest} adapted'.split()) == 0
    record = json.loads((tmp_path/'b.json').read_text())
    assert sum('it was asked for' in n for n in record['notes']) == 2 and record['tent'] == dict.fromkeys(TEST, 'undone, as it was asked for')
    assert cli.rcic_predict(f'{tmp_path}/model {drawn.source.root} {tmp_path}/c.csv --adapt experiment --tta 1 --bs 8 --protocol adapted'.split()) == 0
    assert 'tent' not in json.loads((tmp_path/'c.json').read_text())
    b, c = (pd.read_csv(tmp_path/f'{o}.csv') for o in 'bc')
    pd.testing.assert_frame_equal(b, c)
    assert cli.rcic_predict(f'{tmp_path}/model {drawn.source.root} {tmp_path}/d.csv {rest} inductive'.split()) == 2 and '--adapt tent uses pictures' in capsys.readouterr().err
    assert cli.rcic_predict(f'{tmp_path}/model {drawn.source.root} {tmp_path}/e.csv {rest} transductive'.split()) == 0
    assert json.loads((tmp_path/'e.json').read_text())['tent'].keys() == {*TEST}
