"Of scores within a millionth of the best the first counts, wherever an answer is chosen: the last digit depends on how many wells are scored at once."
import ast
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from rcic_fastai.embed.index import TIE, EmbeddingIndex
from rcic_fastai.embed.table import make_emb_table
from rcic_fastai.predict.cells import _best_two
from rcic_fastai.predict.classifier import ClassifierIndex
from rcic_fastai.predict.predict import best_class, name_scored, predict_wells, top_candidates
from rcic_fastai.predict.pseudo import _top_gap
from rcic_fastai.predict.scores import name_labels, score_table
from rcic_fastai.results import report

NAMES = np.array(['a', 'b', 'c', 'd', 'e', 'f'], object)

def noisy(seed=0, n=40):
    "Scores of many ties, and the same with noise of the size of the last digit"
    rng = np.random.default_rng(seed)
    s = rng.choice([.2, .5, .8], (n, len(NAMES)))
    return s, (s + rng.uniform(-.4, .4, s.shape)*TIE)

def first_of_best(row, k=1):
    "By hand: the columns of the `k` best, equal ones from the left"
    return [i for _, i in sorted((-v, i) for i, v in enumerate(row))][:k]

def wells(n, **more): return pd.DataFrame({'well_id': [f'w{i}' for i in range(n)], 'experiment': 'E', 'plate': 1, 'well_type': 'treatment', 'cell_type': 'HUVEC', **more})

@pytest.mark.parametrize('protocol', ['inductive', 'adapted'])
def test_answer_runner_up_and_the_five_best(protocol):
    s, moved = noisy()
    assert (moved.argmax(1) != s.argmax(1)).any()                   # without the rule, noise would decide
    a, b = (name_scored(wells(len(s)), x, SimpleNamespace(classes=[*NAMES], target='sirna'), protocol) for x in (s, moved))
    for pred in (a, b):
        want = [[NAMES[i] for i in first_of_best(row, 5)] for row in s]
        assert pred[[f'top_{i+1}' for i in range(5)]].to_numpy().tolist() == want
        assert pred.sirna.tolist() == [w[0] for w in want] and pred.runner_up.tolist() == [w[1] for w in want]

def test_labels_of_cells():
    s, moved = noisy(1)
    for x in (s, moved):
        first, *_, second = _best_two(x, NAMES)
        assert [*zip(first, second)] == [tuple(NAMES[first_of_best(row, 2)]) for row in s]

def test_pseudo_labels():
    s, moved = noisy(2)
    for x in (s, moved):
        first, second, gap = _top_gap(x)
        assert [*zip(first, second)] == [tuple(first_of_best(row, 2)) for row in s] and (gap > -TIE).all()

def test_the_label_of_an_image_that_reaches_no_threshold():
    s, moved = noisy(3)
    for x in (s/2, moved/2):
        t = score_table(x, wells(len(x)), NAMES, kind='probability')
        t.attrs.update(thresholds=[.5]*len(NAMES), no_label=False)
        assert name_labels(t).sirna.tolist() == [NAMES[first_of_best(row)[0]] for row in s]

def test_what_the_classifier_finds_is_what_it_answers():
    rows = pd.DataFrame(dict(well_id=NAMES, experiment='T', plate=1, well_type='treatment', cell_type='HUVEC', sirna=NAMES))
    index = ClassifierIndex(EmbeddingIndex(make_emb_table(rows, np.eye(len(NAMES), dtype=np.float32))), [*NAMES])
    s, moved = (x.astype(np.float32) for x in noisy(4))
    emb = make_emb_table(wells(len(s), protocol='inductive'), moved)
    pred, near = predict_wells(emb, index, merge='mean')
    want = [NAMES[first_of_best(row)[0]] for row in s]
    assert pred.set_index('id_code').sirna[emb.Metadata_well_id].tolist() == want
    assert near[near['rank'] == 1].set_index('id_code').label[emb.Metadata_well_id].tolist() == want and (pred.votes == 1).all()

def test_candidates_that_are_not_possible():
    "An answer that was assigned stands first whatever its score, and what is not allowed is left empty"
    x = np.array([[.5, -np.inf, .5 + TIE/2, .1, -np.inf, -np.inf], [-np.inf]*6])
    got = top_candidates(x, np.array([3, 1]), NAMES)
    assert got.fillna('-').to_numpy().tolist() == [['d', 'a', 'c', '-', '-'], ['b', '-', '-', '-', '-']]
    assert top_candidates(x[:, :2], best_class(x[:, :2]), NAMES[:2]).shape == (2, 2)

def test_small_probabilities_of_a_plate_are_no_ties():
    "Candidates after one-to-one assignment are ranked by probability, also far below a millionth; a control keeps a candidate whose score is 0"
    classes, known = [*'abcd'], pd.DataFrame(dict(sirna=[*'abcd'], plate_group=0, experiment='T', plate=1, well_type='treatment'))
    s = np.array([[.9, .1, .2, .3], [.1, .9, .3, .2], [.1, 0., .2, -.1]])
    w = wells(3, plate_group=pd.array([0, 0, pd.NA], 'Int64')).assign(well_type=['treatment', 'treatment', 'negative_control'])
    pred = name_scored(w, s, SimpleNamespace(classes=classes, target='sirna', labels=known, kind='exact'), 'transductive')
    assert pred[['top_1', 'top_2', 'top_3', 'top_4']].to_numpy().tolist() == [[*'adcb'], [*'bcda'], [*'cabd']]

def test_the_site_that_is_shown(monkeypatch):
    "Of two sites that are as near, the first"
    shown = []
    monkeypatch.setattr(report, 'neighbor_strip', lambda near, query, *args: shown.append(query))
    for more in (0, TIE/2, 10*TIE):
        near = pd.DataFrame(dict(id_code='w', query=['s1', 's2'], cosine=[.5, .5 + more]))
        report._strips(near, pd.DataFrame(dict(id_code=['w'], truth=['a'], predicted=['a'])), None)
    assert shown == ['s1', 's1', 's2']

# What else takes the largest of each row, and why it needs no rule
OTHERS = {'predict.best_class': 'the rule itself', 'losses.decodes': 'a metric while training', 'domain.term': 'a metric while training', 'tent._measured': 'how evenly the classes are answered',
          'domain.before_batch': 'random numbers', 'cutmix.lisa_partners': 'random numbers', 'report.same_batch_share': 'nearest wells that are counted', 'evaluate.right_wrong': 'yes or no', 'plots.principal_plane': 'the sign of an axis'}

TAKES = 'argmax', 'argmin', 'idxmax', 'idxmin', 'topk'

def largest_of_rows(folder):
    "Yield module.function where the largest or smallest of each row is taken, once for each place"
    for path in sorted(folder.rglob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        inside = {n: f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for n in ast.walk(tree):
            along = [ast.unparse(a) for a in [*n.args, *(k.value for k in n.keywords)]] if isinstance(n, ast.Call) else []
            if along and ast.unparse(n.func).endswith(TAKES) and {'1', '-1', "'columns'"} & {*along}: yield f'{path.stem}.{inside.get(n, "")}'

def test_no_other_place_chooses_an_answer():
    "A new function that takes the largest score of a well uses `best_class`, or says here why not"
    import rcic_fastai
    assert sorted(largest_of_rows(Path(rcic_fastai.__file__).parent)) == sorted(OTHERS)
