"How an index is searched: the same answers by name, by hand, from a folder and by command; chosen on held-out experiments, and kept."
import json
import numpy as np, pandas as pd, pytest
from helpers import refused, simulate_screen
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.neck import *
from rcic_fastai.embed.table import emb_features, make_emb_table, unit_rows
from rcic_fastai.folder import load_model
from rcic_fastai.predict.plan import plan_prediction
from rcic_fastai.predict.predict import predict_wells, read_predictions
from rcic_fastai.screen.open import open_screen
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.workflow import train_screen

def table(rng, experiments=4, classes=6, sites=2, d=10, cell_types=('HUVEC',), noise=.6):
    truth, rows, x = rng.normal(size=(classes, d)), [], []
    for e in range(experiments):
        shift = rng.normal(size=d)*.5
        for c in range(classes):
            for s in range(sites):
                rows.append(dict(site_id=f'E{e}_{c}_{s}', well_id=f'E{e}_{c}', experiment=f'E{e}', plate=1, cell_type=cell_types[e % len(cell_types)], well_type='treatment', sirna=f's{c}'))
                x.append(truth[c] + shift + noise*rng.normal(size=d))
    return make_emb_table(pd.DataFrame(rows), np.array(x, np.float32))

def split(emb, name):
    mine = emb.Metadata_experiment == name
    return emb[~mine].reset_index(drop=True), emb[mine].reset_index(drop=True)

@pytest.mark.parametrize('neck', ['shrink=0.3', 'whiten=0.2', 'whiten=0.5,shrink=0.7'])
@pytest.mark.parametrize('seed', range(3))
def test_scores_are_those_of_the_formulas(seed, neck):
    emb = table(np.random.default_rng(seed))
    known, new = split(emb, 'E3')
    index, n = EmbeddingIndex(known), neck_from(neck)
    x, q = (unit_rows(emb_features(o).astype(float)) for o in (known, new))
    y = known.Metadata_sirna.to_numpy()
    if n.whiten:
        means = {c: x[y == c].mean(0) for c in set(y)}
        s = sum(np.outer(v - means[c], v - means[c]) for v, c in zip(x, y))/(len(x) - len(means))
        s = (1 - n.whiten)*s + n.whiten*np.trace(s)/10*np.eye(10)
        values, vectors = np.linalg.eigh(s)
        turn, mean = vectors @ np.diag(values**-.5) @ vectors.T, np.mean(list(means.values()), 0)
        x, q = (unit_rows((o - mean) @ turn) for o in (x, q))
    x = unit_rows(np.stack([(1 - n.shrink)*v + n.shrink*x[y == c].mean(0) for v, c in zip(x, y)]))
    want = np.stack([(q @ x[y == c].T).max(1) for c in index.classes], 1)
    np.testing.assert_allclose(NeckIndex(index, n).class_scores(emb_features(new)), want, atol=2e-5)

def test_a_query_answers_alone():
    "Nothing of the other queries is used: inductive"
    known, new = split(table(np.random.default_rng(0)), 'E3')
    index, q = EmbeddingIndex(known), emb_features(new)
    for neck in SEARCHES:
        searched = NeckIndex(index, neck)
        whole = searched.class_scores(q)
        for i in (0, 7): np.testing.assert_allclose(searched.class_scores(q[i:i+1])[0], whole[i], atol=1e-5)

@pytest.mark.parametrize('neck', SEARCHES)
def test_restrictions_hold(neck):
    known, new = split(table(np.random.default_rng(1), cell_types=('HUVEC', 'RPE')), 'E3')
    searched, q = NeckIndex(EmbeddingIndex(known), neck), emb_features(new)
    only = searched.class_scores(q, cell_type=['HUVEC']*len(q))
    huvec = (known.Metadata_cell_type == 'HUVEC').to_numpy()
    assert np.isfinite(only).all()
    if neck in ('no', 'shrink=0.5', 'whiten=0.3', 'whiten=0.3,shrink=0.5'): assert not np.allclose(only, searched.class_scores(q))
    assert np.isneginf(searched.class_scores(q, cell_type=['U2OS']*len(q))).all() and huvec.any()
    pred, near = predict_wells(new, searched, restrict_cell_type=True, k=3)
    assert set(near.cell_type) == {'RPE'} and len(pred) == 6

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_approximate_indexes_have_necks(kind):
    known, new = split(table(np.random.default_rng(2), classes=60), 'E3')
    exact, other = (NeckIndex(EmbeddingIndex(known, kind=k), 'whiten=0.3,shrink=1') for k in ('exact', kind))
    assert other.kind == kind
    same = (exact.class_scores(emb_features(new)).argmax(1) == other.class_scores(emb_features(new)).argmax(1)).mean()
    assert same > .9

def test_one_row_per_class_and_one_class():
    rng = np.random.default_rng(3)
    for emb in (table(rng, experiments=1, sites=1), table(rng, experiments=3, classes=1)):
        index = EmbeddingIndex(emb)
        for neck in SEARCHES: assert np.isfinite(NeckIndex(index, neck).class_scores(emb_features(emb))).all()

# Choosing

def test_the_choice_uses_the_held_out_experiment_and_no_other():
    emb = table(np.random.default_rng(4), noise=1.5)
    known, held = split(emb, 'E2')
    index = EmbeddingIndex(known)
    a = choose_neck(index, held)
    wrong = held.assign(Metadata_sirna=np.roll(held.Metadata_sirna, 4))
    b = choose_neck(index, wrong)
    assert a.tried.accuracy.max() > .3 and b.tried.accuracy.max() < a.tried.accuracy.max()
    assert (choose_neck(index, held).tried == a.tried).all().all() and len(a.notes) == 1

def test_chance_is_not_chosen():
    "Labels that mean nothing: in 30 screens hardly any choice is made"
    chosen = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        known, held = split(make_emb_table(table(rng).filter(like='Metadata').rename(columns=lambda c: c[9:]), rng.normal(size=(48, 10))), 'E3')
        chosen.append(choose_neck(EmbeddingIndex(known), held, ('shrink=1', 'whiten=0.3', 'expand=5')).neck)
    assert sum(c != 'no' for c in chosen) <= 5

def test_controls_and_unknown_labels_do_not_ask():
    emb = table(np.random.default_rng(5))
    emb.loc[emb.Metadata_sirna == 's0', 'Metadata_well_type'] = 'negative_control'
    known, held = split(emb, 'E3')
    held.loc[held.Metadata_sirna == 's1', 'Metadata_sirna'] = 'never seen'
    ranks = try_necks(EmbeddingIndex(known), held, ['no'])['no']
    assert sorted(ranks.well_id) == ['E3_2', 'E3_3', 'E3_4', 'E3_5']

def test_experiments_count_where_there_are_four():
    emb = table(np.random.default_rng(6), experiments=6, noise=1.2)
    found = try_necks(EmbeddingIndex(emb), candidates=('no', 'shrink=1'))
    gain = 1/found['shrink=1']['rank'] - 1/found['no']['rank']
    per = gain.groupby(found['no'].experiment).mean()
    want = max(gain.std()/len(gain)**.5, per.std()/6**.5)
    assert neck_table(found).error[1] == pytest.approx(want)

# Through training, folder and command

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('neck')/'screen'
    simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17'], sirnas=12, size=32, controls=1, progress=False)
    return folder

@pytest.fixture(scope='module')
def folder(drawn, tmp_path_factory):
    out, recipe = tmp_path_factory.mktemp('neck')/'model', drawn.parent/'small.json'
    model = dict(pretrained=None, emb_dim=16)
    lisa = Stage('all', 1, 1e-3, callbacks=[{'name': 'lisa', 'p': .5}, {'name': 'contrast', 'weight': .1}, 'mixstyle'])
    recipe.write_text(json.dumps(Recipe('small', [lisa], arch='test_efficientnet', model=model, data=dict(bs=16, batch_by='pairs')).to_dict()))
    train_screen(drawn, out, str(recipe), valid='HUVEC-03', search='auto', tta=1, device='cpu')
    return out

def test_the_folder_keeps_the_choice_and_the_recipe(folder):
    m = load_model(folder)
    assert m.config['recipe']['predict'] == {'search': 'auto'} and m.config['recipe']['data']['batch_by'] == 'pairs'
    for way in ('plain', 'adapted'):
        kept = m.config['search'][way]
        assert {r['search'] for r in kept['tried']} == set(SEARCHES) and 'held out' in kept['notes'][0]
        assert kept['neck'] == 'no' or kept['neck'] in SEARCHES

def test_predictions_follow_the_choice(folder, drawn):
    m = load_model(folder)
    for way, protocol in (('plain', 'inductive'), ('adapted', 'adapted'), ('adapted', 'transductive')):
        m.config['search'][way]['neck'] = 'whiten=0.3,shrink=1'                       # as if it had been chosen
        auto, asked, plain = (m.predict(drawn, protocol, tta=1, progress=False, **k) for k in ({}, dict(search='whiten=0.3,shrink=1'), dict(search='no')))
        pd.testing.assert_frame_equal(auto, asked)
        assert not np.allclose(auto.score, plain.score)
        plan = plan_prediction(m, drawn, protocol)
        assert plan.record['search'] == 'whiten=0.3,shrink=1' and m.config['search'][way]['notes'][0] in plan.notes
        index = m.adapted_index if way == 'adapted' else m.index
        screen = open_screen(drawn).test
        screen = screen[screen.table[screen.table.well_type == 'treatment']]
        emb = m.embed(screen, tta=1, progress=False, **({'adapt': 'experiment'} if way == 'adapted' else {}))
        by_hand, _ = predict_wells(emb, NeckIndex(index, 'whiten=0.3,shrink=1'), protocol)
        assert by_hand.sirna.tolist() == asked.sirna.tolist()

def test_the_prototype_is_the_prototype(folder, drawn):
    m = load_model(folder)
    a, b = (m.predict(drawn, tta=1, progress=False, **k) for k in (dict(search='shrink=1'), dict(vote='prototype')))
    assert a.sirna.tolist() == b.sirna.tolist() and np.allclose(a.score, b.score, atol=1e-5)

def test_without_a_kept_choice_the_nearest_row_answers(folder, drawn):
    "A network has learned the experiments of its index, so leaving these out says little about a new one"
    m = load_model(folder)
    assert any('not corrected' in n for n in plan_prediction(m, drawn, 'adapted', search='auto', correct='standardize').notes)
    del m.config['search']
    plan = plan_prediction(m, drawn, search='auto')
    assert plan.record['search'] == 'no' and any('made no choice' in n for n in plan.notes)
    m.config['recipe']['stages'] = []                                                 # nothing was trained: the experiments of the index can tell
    assert any('each left out in turn' in n for n in plan_prediction(m, drawn, search='auto').notes)

@pytest.mark.parametrize('kwargs, words', [(dict(search='shrunk'), 'is not understood'), (dict(search='shrink=1', vote='mean'), 'both say how rows vote'),
                                           (dict(search='shrink=1', by='classifier'), 'says how the index is searched'), (dict(search='whiten=2'), 'from 0 to 1')])
def test_what_cannot_be_is_refused_before_the_work(folder, drawn, kwargs, words):
    refused(lambda: load_model(folder).predict(drawn, **kwargs), words)

def test_training_refuses_a_search_that_is_none_at_once(drawn, tmp_path):
    refused(lambda: train_screen(drawn, tmp_path/'m', search='best'), 'is not understood')
    assert not (tmp_path/'m').exists()

def test_by_command(folder, drawn, tmp_path, capsys):
    from rcic_fastai.cli import rcic_predict
    out = tmp_path/'test.csv'
    assert rcic_predict([str(folder), str(drawn), str(out), '--search', 'whiten=0.3,shrink=1', '--tta', '1', '--device', 'cpu', '--scores']) == 0
    record = read_predictions(out).attrs['record']
    assert record['search'] == 'whiten=0.3,shrink=1'
    assert rcic_predict([str(folder), str(drawn), str(tmp_path/'b.csv'), '--search', 'shrnk=1']) == 2
    assert '--search shrnk=1 is not understood' in capsys.readouterr().err

def test_ways_of_searching_are_compared_by_the_same_wells(monkeypatch):
    "Also where an index without one experiment is small enough for mutual neighbors and that without another is not"
    from rcic_fastai.embed import neck
    emb = table(np.random.default_rng(7))
    first = emb.Metadata_experiment == 'E0'
    emb = pd.concat([emb, emb[first].assign(Metadata_site_id=emb.Metadata_site_id[first] + 'x')], ignore_index=True)
    monkeypatch.setattr(neck, 'MUTUAL_ROWS', int((emb.Metadata_experiment != 'E0').sum()))
    found = try_necks(EmbeddingIndex(emb), candidates=('no', 'rerank=5', 'shrink=1'))
    assert set(found) == {'no', 'shrink=1'} and found['no'].well_id.tolist() == found['shrink=1'].well_id.tolist()
    monkeypatch.setattr(neck, 'MUTUAL_ROWS', len(emb))
    found = try_necks(EmbeddingIndex(emb), candidates=('no', 'rerank=5'))
    assert found['no'].well_id.tolist() == found['rerank=5'].well_id.tolist() and set(found['no'].experiment) == {'E0', 'E1', 'E2', 'E3'}

def test_what_would_end_a_training_at_its_end_is_refused_before_it(drawn, tmp_path):
    "Several labels have no search; a recipe that votes otherwise could not predict"
    def recipe(**kwargs):
        (tmp_path/'r.json').write_text(json.dumps(dict(name='r', arch='test_resnet', model=dict(emb_dim=16), stages=[dict(name='a', epochs=1, lr=1e-3)], **kwargs)))
        return str(tmp_path/'r.json')
    several = dict(data=dict(several=True))
    refused(lambda: train_screen(drawn, tmp_path/'m', recipe(predict=dict(search='auto', vote='mean'))), 'both say how wells are named')
    refused(lambda: train_screen(drawn, tmp_path/'m', recipe(predict=dict(search='auto', by='classifier'))), 'both say how wells are named')
    many = Recipe('many', [Stage('a', 1, 1e-3, loss='bce')], arch='test_resnet', model=dict(emb_dim=16, loss='bce', classifier='linear'), **several)
    refused(lambda: train_screen(drawn, tmp_path/'m', many, search='auto'), 'several labels are answered by probability')
    refused(lambda: train_screen(drawn, tmp_path/'m', Recipe('many', many.stages, arch=many.arch, model=many.model, predict=dict(search='auto'), **several)), 'several labels are answered by probability')
    assert not (tmp_path/'m').exists()

def test_a_search_is_chosen_for_an_index_of_many_random_views(drawn, tmp_path):
    r = Recipe('views', [Stage('a', 1, 1e-3)], arch='test_resnet', model=dict(emb_dim=16), index=dict(tta=9, views='random'), predict=dict(search='auto', tta=1))
    m = train_screen(drawn, tmp_path/'m', r, valid='HUVEC-03', pretrained='no', device='cpu')
    assert {o['search'] for o in m.config['search']['plain']['tried']} == set(SEARCHES)

def test_search_no_leaves_the_classifier_of_the_recipe(folder, drawn):
    m = load_model(folder)
    m.config['recipe']['predict'] = dict(by='classifier')
    assert [plan_prediction(m, drawn, search=s).record['by'] for s in ('', 'no', 'shrink=1')] == ['classifier', 'classifier', 'index']

def test_wells_by_which_the_search_was_chosen_are_known_as_such(folder, drawn):
    m = load_model(folder)
    held, said = m.held_out(open_screen(drawn)), 'was chosen by wells of HUVEC-03'
    for neck, kwargs, is_said in (('shrink=1', {}, True), ('no', {}, False), ('shrink=1', dict(search='shrink=1'), False)):
        m.config['search']['plain']['neck'] = neck
        plan = plan_prediction(m, held, tta=1, **kwargs)
        assert any(said in n for n in plan.notes) == is_said == (said in plan.record.get('validation', ''))
        assert not any(said in n for n in plan_prediction(m, drawn, tta=1, **kwargs).notes)
