"Ensembles: the average is the average, nothing but the same wells, classes and protocol is averaged, nothing is half-written"
import json
import numpy as np, pandas as pd, pytest
from scipy.optimize import linear_sum_assignment
from helpers import refused
from rcic_fastai import cli
from rcic_fastai.core import file_facts
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, toy_profiles
from rcic_fastai.predict.ensemble import average_scores, ensemble_files, ensemble_predictions, name_wells
from rcic_fastai.predict.predict import predict_wells, read_predictions, write_predictions
from rcic_fastai.predict.scores import SCORE, read_scores, score_classes, score_matrix, score_table, scores_path, score_wells, write_scores

EMB = toy_profiles(signal=.7, seed=1)
META, X = emb_metadata(EMB), emb_features(EMB)
TREATED, TRAIN = (META.well_type == 'treatment').to_numpy(), (META.dataset == 'train').to_numpy()

def member(i, protocol='inductive', controls=False):
    half = make_emb_table(META, X[:, 32*i:32*(i+1)])
    keep = TREATED | controls
    return score_wells(half[keep & ~TRAIN], EmbeddingIndex(half[keep & TRAIN]), protocol)

def write(folder, name, scores):
    path = write_predictions(name_wells(scores), folder/f'{name}.csv')
    write_scores(scores, scores_path(path))
    return path

@pytest.mark.parametrize('weights', [None, [1, 3], [.2, .2]])
def test_the_average_is_that_of_a_loop_in_double_precision(weights):
    tables, w = [member(0), member(1)], weights or [1, 1]
    got = score_matrix(average_scores(tables, weights))
    assert got.dtype == np.float64
    for i in range(0, len(got), 17):
        for j in range(0, got.shape[1], 5):
            hand = sum(a*float(t.iloc[i][SCORE + score_classes(t)[j]]) for a, t in zip(w, tables))/sum(w)
            assert abs(hand - got[i, j]) < 1e-12

def test_transductive_answers_are_the_best_assignment_of_the_averages():
    "By hand, with the true groups"
    tables = [member(0, 'transductive'), member(1, 'transductive')]
    pred, mean = ensemble_predictions(tables), score_matrix(average_scores(tables))
    groups = META[TRAIN & TREATED].groupby('sirna').plate_group.first()
    of_class = groups.loc[score_classes(tables[0])].to_numpy()
    for (e, p), at in pred.groupby(['experiment', 'plate']).indices.items():
        s = mean[at][:, of_class == tables[0].plate_group.iloc[at[0]]]
        rows, cols = linear_sum_assignment(-s)
        names = np.array(score_classes(tables[0]))[of_class == tables[0].plate_group.iloc[at[0]]]
        assert pred.sirna.iloc[at].tolist() == names[cols].tolist()
    assert set(pred.group_source) == {'given'}

def test_groups_are_inferred_from_the_averages():
    tables = [member(i, 'transductive') for i in (0, 1)]
    blind = [t.assign(plate_group=pd.NA) for t in tables]
    for b, t in zip(blind, tables): b.attrs.update(t.attrs)
    pred = ensemble_predictions(blind)
    assert set(pred.group_source) == {'inferred'} and (pred.group_confidence > 3).all()
    assert pred.sirna.tolist() == ensemble_predictions(tables).sirna.tolist()

def test_controls_are_named_as_predict_wells_names_them():
    half = make_emb_table(META, X[:, :32])
    theirs = predict_wells(half[~TRAIN], EmbeddingIndex(half[TRAIN]))[0]
    mine = name_wells(member(0, controls=True))
    assert mine.sirna.tolist() == theirs.sirna.tolist() and mine.attrs['classes'] == theirs.attrs['classes']
    assert np.isneginf(score_matrix(average_scores([member(0, controls=True), member(1, controls=True)]))).any()

def test_other_kinds_of_scores_are_not_averaged():
    wells = pd.DataFrame(dict(well_id=['a'], experiment=['e'], plate=[1], well_type=['treatment']))
    cos, logit = (score_table([[.1, .9]], wells, ['x', 'y'], kind=k) for k in ('cosine', 'logit'))
    refused(lambda: average_scores([cos, logit]), 'kind logit', 'cosine')
    refused(lambda: average_scores([cos, pd.concat([cos, cos])]), 'two rows of well a')

def test_a_member_that_is_not_alike_leaves_nothing(tmp_path):
    a, b = write(tmp_path, 'a', member(0)), write(tmp_path, 'b', member(1)[5:])
    before = sorted(tmp_path.iterdir())
    refused(lambda: ensemble_files(tmp_path/'out.csv', a, b), 'other wells')
    c = write(tmp_path, 'c', member(1, 'adapted'))
    refused(lambda: ensemble_files(tmp_path/'out.csv', a, c), 'protocol adapted')
    refused(lambda: ensemble_files(tmp_path/'out.txt', a, a), 'not the name of a CSV')
    assert not list(tmp_path.glob('out*')) and set(before) <= set(tmp_path.iterdir())

def test_edited_answers_have_no_protocol_and_are_not_averaged(tmp_path):
    a, b = write(tmp_path, 'a', member(0)), write(tmp_path, 'b', member(1))
    a.write_text(a.read_text().replace('sirna_0', 'sirna_9'))
    a.write_text(a.read_text() + '\n')
    refused(lambda: ensemble_files(tmp_path/'out.csv', a, b), 'No record beside')

@pytest.mark.parametrize('protocol', ['inductive', 'transductive'])
def test_the_command_writes_what_the_function_returns(tmp_path, protocol, capsys):
    tables = [member(0, protocol), member(1, protocol)]
    a, b = (write(tmp_path, n, t) for n, t in zip('ab', tables))
    assert cli.rcic_ensemble([str(tmp_path/'out.csv'), str(a), str(b), '--weights', '1,2']) == 0
    assert f'2 predictions averaged, protocol {protocol}' in capsys.readouterr().out
    back, record = read_predictions(tmp_path/'out.csv'), json.loads((tmp_path/'out.json').read_text())
    assert back.sirna.tolist() == ensemble_predictions(tables, [1, 2]).sirna.tolist()
    assert [(m['file'], m['weight']) for m in record['ensemble']] == [(str(a), .333333), (str(b), .666667)]
    assert record['protocol'] == protocol and record['n_wells'] == len(back)

@pytest.mark.parametrize('weights, words', [('1,x', '--weights'), ('1', '1 weights for 2 members'), ('1,0', 'numbers above 0'), ('1,nan', 'numbers above 0'), ('inf,1', 'numbers above 0')])
def test_wrong_weights_are_one_line(tmp_path, weights, words, capsys):
    a, b = write(tmp_path, 'a', member(0)), write(tmp_path, 'b', member(1))
    assert cli.rcic_ensemble([str(tmp_path/'out.csv'), str(a), str(b), '--weights', weights]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and not (tmp_path/'out.csv').exists()

def test_scores_come_back_bit_for_bit(tmp_path):
    t = member(0, 'transductive')
    write_scores(t.iloc[::-1], tmp_path/'s.parquet')
    back = read_scores(tmp_path/'s.parquet')
    assert np.array_equal(score_matrix(back), score_matrix(t)) and back.attrs == t.attrs and back.id_code.tolist() == t.id_code.tolist()

@pytest.mark.parametrize('protocol', ['inductive', 'transductive'])
def test_scores_of_another_prediction_of_the_same_model_are_rejected(tmp_path, protocol):
    "Of a record with a checksum even where they give the same answers; of one without, by the answers, which are assigned where they are transductive"
    mine, path, other = member(0, protocol), tmp_path/'mine.csv', write(tmp_path, 'other', member(1, protocol))
    again = mine.assign(**{c: mine[c]*.99 for c in mine if c.startswith(SCORE)})
    again.attrs.update(mine.attrs)
    made = file_facts(write_scores(mine, scores_path(path)))['sha256']
    write_predictions(name_wells(mine), path, dict(scores_sha256=made))
    ensemble_files(tmp_path/'fine.csv', path, other)
    assert name_wells(again).sirna.tolist() == name_wells(mine).sirna.tolist()
    write_scores(again, scores_path(path))
    refused(lambda: ensemble_files(tmp_path/'mean.csv', path, other), 'mine.scores.parquet holds the scores of another prediction')
    write_predictions(name_wells(mine), path)
    ensemble_files(tmp_path/'fine.csv', path, other)
    swapped = again.assign(id_code=again.id_code.to_numpy()[::-1])
    swapped.attrs.update(mine.attrs)
    write_scores(swapped, scores_path(path))
    refused(lambda: ensemble_files(tmp_path/'mean.csv', path, other), 'mine.scores.parquet holds the scores of another prediction')
    assert not list(tmp_path.glob('mean*'))
