"Every way of fastai to batches of rows that were never seen: normalized as `spec_dl` does, to the bit, or refused."
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import load_learner, noop
from fastai.data.core import test_set as make_test_set
from helpers import simulate_screen
from rcic_fastai.batch.data import screen_dls, spec_dl
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.embed import embed_screen   # and learners have .embed
from rcic_fastai.embed.table import emb_features
from rcic_fastai.screen.images import PngTree
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.screen.screen import Screen

EXPERIMENTS = ['HUVEC-01', 'HUVEC-02', 'RPE-08', 'U2OS-04']       # trained on, held out, test, not in the table
NORMS = [('plate', 'all'), ('plate', 'controls'), ('experiment', 'all'), ('experiment', 'controls'), ('own', 'all'), ('global', 'all'),
         ('none', 'all')]
pytestmark = pytest.mark.filterwarnings('ignore:load_learner')

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp('routes')/'screen'
    table = simulate_screen(folder, EXPERIMENTS, sirnas=4, size=32, plates=2, controls=1, n_workers=1, progress=False)
    return table, PngTree(folder, table)

@pytest.fixture(scope='module', params=[(*n, s) for n in NORMS for s in (1, 2) if s == 1 or n[0] == 'plate'], ids=str)
def learners(request, screen, tmp_path_factory):
    "A learner, the same from a file, and rows: of the table's test experiment, and of an experiment that is not in it"
    (table, source), (norm, norm_from, sites) = screen, request.param
    known = table[table.experiment != 'U2OS-04']
    dls = screen_dls(Screen(known, source), bs=8, valid='HUVEC-02', norm=norm, norm_from=norm_from, sites=sites, device='cpu', augs=None)
    learn = screen_learner(dls, 'test_resnet', pretrained=None, emb_dim=8, path=tmp_path_factory.mktemp('learner'))
    learn.export()
    with learn.no_bar(): yield learn, load_learner(learn.path/'export.pkl'), known, table[table.experiment == 'U2OS-04']

def samples(learn, rows): return (rows if learn.dls.spec.sites == 1 else rows.drop_duplicates('well_id')).reset_index(drop=True)

def wanted(learn, rows, stat_rows=None):
    "Pictures and cosines by `spec_dl`"
    dl = spec_dl(learn.dls.spec, Screen(rows, learn.dls.screen.source), bs=8, device='cpu', stat_rows=stat_rows)
    batches = list(dl)
    with torch.no_grad(): out = torch.cat([learn.model.eval()(*b[:4]) for b in batches])
    return torch.cat([b[0].as_subclass(torch.Tensor) for b in batches]), out

def pictures(dl): return torch.cat([b[0].as_subclass(torch.Tensor) for b in dl])

def check(learn, rows, want):
    "All routes to `rows` give what is wanted"
    pics, out = want
    one_each = samples(learn, rows)
    make = lambda **kw: learn.dls.test_dl(one_each, bs=8, device='cpu', **kw)
    torch.testing.assert_close(pictures(make()), pics, rtol=0, atol=0)
    torch.testing.assert_close(pictures(make().new()), pics, rtol=0, atol=0)
    with learn.no_bar(), learn.no_logging():
        for got in (learn.get_preds(dl=make(), act=noop)[0], learn.get_preds(dl=make(), act=noop, with_input=True)[1]):
            torch.testing.assert_close(got.as_subclass(torch.Tensor), out, rtol=0, atol=0)
    torch.testing.assert_close(pictures(learn.dls.test_dl(one_each.iloc[::-1], bs=8, device='cpu')).flip(0), pics, rtol=0, atol=0)

def test_rows_of_the_table_are_normalized_as_the_whole_table_says(learners):
    learn, _, table, _ = learners
    for e in EXPERIMENTS[:3]:
        rows = table[table.experiment == e]
        check(learn, rows, wanted(learn, rows, table))
        some = rows[rows.well_type == 'treatment'].head(5)
        check(learn, some, wanted(learn, some, table))

def test_rows_of_another_experiment_are_normalized_by_themselves(learners):
    learn, again, table, strange = learners
    for l in (learn, again): check(l, strange, wanted(l, strange))
    both = pd.concat([table[table.experiment == 'HUVEC-01'], strange])
    check(learn, both, wanted(learn, both, pd.concat([table, strange])))
    check(again, both, wanted(learn, both, pd.concat([table, strange])))

def test_a_learner_from_a_file_knows_the_groups_that_it_saw(learners):
    learn, again, table, _ = learners
    seen = table[table.experiment == 'HUVEC-01'].head(3)
    check(again, seen, wanted(learn, seen, table))

def test_a_few_rows_are_normalized_as_their_whole_group(learners):
    "Of an experiment that the learner's screen has not, by what the source has of it; `embed` as `test_dl`"
    learn, again, table, strange = learners
    one = strange[strange.well_id == strange.well_id[strange.well_type == 'treatment'].iloc[-1]]
    want = wanted(learn, one, strange)
    for l in (learn, again): check(l, one, want)
    torch.testing.assert_close(wanted(learn, one), want, rtol=0, atol=0)
    spec, source = learn.dls.spec, learn.dls.screen.source
    how = dict(tta=1, progress=False)
    got = learn.embed(strange, **how)
    known = emb_features(got)[got.Metadata_well_id.isin(one.well_id)]
    for emb in (learn.embed(one, **how), embed_screen(learn.model, spec, Screen(one, source), **how)):
        np.testing.assert_allclose(emb_features(emb), known, atol=1e-5)
    alone = Screen(one, source.restrict(one))                                # a source that has these sites only
    if spec.per_group and spec.norm_from == 'all':
        dl = spec_dl(spec, alone, bs=8, device='cpu')
        torch.testing.assert_close(pictures(dl), wanted(learn, one, one)[0], rtol=0, atol=0)

def test_sites_with_absent_files_give_no_statistics(learners, monkeypatch):
    learn, _, table, strange = learners
    source, lost = learn.dls.screen.source, strange[strange.well_type == 'treatment'].site_id.iloc[0]
    one = strange[(strange.well_type == 'treatment') & (strange.site_id != lost)].tail(1)
    there = strange[strange.site_id != lost]
    want = wanted(learn, one, there)[0]
    stamp = type(source).stamp
    monkeypatch.setattr(type(source), 'stamp', lambda self, i: 'absent' if i == lost else stamp(self, i))
    torch.testing.assert_close(wanted(learn, one)[0], want, rtol=0, atol=0)

def test_controls_that_are_not_there_are_asked_for(learners, monkeypatch):
    learn, again, table, strange = learners
    if learn.dls.spec.norm_from != 'controls': return
    treated = samples(learn, strange[strange.well_type == 'treatment'])
    for l in (learn, again):
        monkeypatch.setattr(l.dls.screen, 'source', l.dls.screen.source.restrict(pd.concat([table, strange[strange.well_type == 'treatment']])))
        with pytest.raises(ScreenError, match='U2OS-04.* not known.*its control wells included'): l.dls.test_dl(treated)

def test_predict_of_one_row(learners):
    "Right where the group's statistics are known, else refused: one site does not tell them"
    learn, again, table, strange = learners
    spec = learn.dls.spec
    unknown = strange.assign(experiment='U2OS-99')                           # a name that the source has not
    for l, rows, fails in ((learn, table, False), (again, table[table.experiment == 'HUVEC-01'], False), (learn, strange, False),
                           (again, strange, False), (again, table[table.experiment == 'RPE-08'], False),
                           (learn, unknown, spec.per_group), (again, unknown, spec.per_group)):
        row = samples(l, rows).iloc[-1]
        with l.no_bar():
            if fails:
                with pytest.raises(ScreenError, match=f'{row.experiment}.*one site does not tell.*learn.embed'): l.predict(row)
            else:
                at = rows[rows.site_id == row.site_id] if spec.sites == 1 else rows[rows.well_id == row.well_id]
                got = l.predict(row)[2].as_subclass(torch.Tensor)
                act = l.loss_func.activation if hasattr(l.loss_func, 'activation') else noop
                torch.testing.assert_close(got, act(wanted(learn, at, pd.concat([table, rows[~rows.site_id.isin(table.site_id)]]))[1])[0].as_subclass(torch.Tensor), rtol=0, atol=1e-6)

def test_batches_made_by_hand_of_rows_without_statistics_are_refused(learners):
    learn, _, table, strange = learners
    dl = learn.dls.train.new(make_test_set(learn.dls.train_ds, samples(learn, strange)), shuffle=False)
    if learn.dls.spec.per_group:
        with pytest.raises(ScreenError, match='statistics of U2OS-04.* not known'): dl.one_batch()
    else: assert len(dl.one_batch()[0])

def test_embeddings_of_such_batches_are_those_of_the_rows(learners):
    learn, _, table, strange = learners
    for rows in (strange, table[table.experiment == 'RPE-08']):
        dl = learn.dls.test_dl(samples(learn, rows), bs=8, device='cpu')
        a, b = learn.embed(dl, tta=1, progress=False), learn.embed(rows, tta=1, bs=8, progress=False)
        np.testing.assert_allclose(a.filter(like='emb_').to_numpy(), b.filter(like='emb_').to_numpy(), rtol=0, atol=1e-6)

def test_labels_and_validation(learners):
    learn, _, table, strange = learners
    dl = learn.dls.test_dl(samples(learn, strange[strange.well_type == 'treatment']).assign(sirna=learn.dls.spec.labels[0]) if
                           learn.dls.spec.norm_from == 'all' else samples(learn, table[(table.experiment == 'RPE-08') & (table.well_type == 'treatment')]),
                           with_labels=True, device='cpu')
    with learn.no_bar(), learn.no_logging(): assert np.isfinite(learn.validate(dl=dl)).all()
