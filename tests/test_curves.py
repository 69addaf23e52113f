"Learning curves: what is drawn of a history, and when a picture is written."
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from rcic_fastai.results.plots import training_curve
from rcic_fastai.workflow import save_curve

pytestmark = pytest.mark.usefixtures('close_figures')
HISTORY = pd.DataFrame(dict(stage=['head', 'head', 'all', 'all', 'on'], train_loss=[3., 2., 1.5, 1., .8], valid_loss=[3.1, 2.2, np.nan, 1.4, 1.3],
                            accuracy=[.1, .2, .3, .25, .4], macro_f1=[.2, .3, .4, .5, .6], micro_f1=[.3, .4, .5, .6, .7]))

def drawn(ax):
    "Return the curves of a plot by label, and where its vertical lines are"
    lines = {l.get_label(): l.get_xydata() for l in ax.get_lines()}
    upright = sorted(xy[0, 0] for xy in lines.values() if len(xy) == 2 and xy[0, 0] == xy[1, 0])
    return {k: xy for k, xy in lines.items() if not k.startswith('_')}, upright

@pytest.mark.parametrize('without, columns, title', [(['macro_f1', 'micro_f1'], ['accuracy'], 'accuracy, held-out sites'), ([], ['macro_f1', 'micro_f1'], 'F1 at .5, held-out images')])
def test_curves_are_the_columns_of_the_history(without, columns, title):
    history = HISTORY.drop(columns=without)
    axs = training_curve(history).axes
    assert [ax.get_title() for ax in axs] == ['loss', title]
    for ax, names in zip(axs, (['train_loss', 'valid_loss'], columns)):
        curves, upright = drawn(ax)
        assert list(curves) == [n.replace('_', ' ') for n in names] and upright == [2.5, 4.5]       # between the stages
        for n in names: np.testing.assert_array_equal(curves[n.replace('_', ' ')], np.stack([np.arange(1, 6), history[n]], 1))
        assert (ax.get_legend() is not None) == (len(names) > 1) and ax.get_xlabel() == 'epoch'

def test_without_held_out_experiments_there_is_one_curve():
    fig = training_curve(HISTORY[['stage', 'train_loss']])
    assert [list(drawn(ax)[0]) for ax in fig.axes] == [['train loss']] and not any(ax.get_legend() for ax in fig.axes)

def test_a_picture_is_written_once_and_closed(tmp_path):
    save_curve(HISTORY, tmp_path)
    assert (tmp_path/'history.png').read_bytes()[:4] == b'\x89PNG' and [p.name for p in tmp_path.iterdir()] == ['history.png']
    assert plt.imread(tmp_path/'history.png').std() > 0 and not plt.get_fignums()

@pytest.mark.parametrize('history', [HISTORY[:0], HISTORY.drop(columns='stage'), HISTORY.drop(columns='train_loss')], ids=['empty', 'no stage', 'no loss'])
def test_where_nothing_was_trained_nothing_is_written(tmp_path, history):
    save_curve(history, tmp_path)
    assert not list(tmp_path.iterdir())
