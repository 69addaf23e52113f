"Groups of one sample, last batches of one, and screens of thousands of plates."
import time
from contextlib import contextmanager
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import load_learner
from helpers import simulate_screen
from rcic_fastai import workflow
from rcic_fastai.core import ScreenError
from rcic_fastai.batch.data import ScreenSpec, screen_dls
from rcic_fastai.embed import embed as E
from rcic_fastai.embed.table import emb_features
from rcic_fastai.model.batchnorm import adapted_batchnorm, batchnorms
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.screen.screen import Screen

# What BatchNorm sees

class Both(torch.nn.Module):
    "BatchNorm before the pooling, which sees sites, and behind it, which sees samples"
    def __init__(self): super().__init__(); self.a, self.b = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(3)
    def forward(self, x):
        n = x.shape[:-3]
        y = self.a(x.flatten(0, -4)).mean((-1, -2))
        return self.b(y.view(*n, 3).mean(1) if len(n) == 2 else y)

@pytest.mark.parametrize('sites', [1, 2, 3])
@pytest.mark.parametrize('sizes', [(8, 1), (1, 8), (1, 8, 1), (2,), (1,), ()])
def test_samples_count_not_sites(sites, sizes):
    model, g = Both(), torch.Generator().manual_seed(0)
    for m in batchnorms(model): m.running_mean.fill_(3.); m.running_var.fill_(2.)
    batches = [torch.randn(n, *([sites] if sites > 1 else []), 3, 4, 4, generator=g) for n in sizes]
    with adapted_batchnorm(model, [(b,) for b in batches], prior=0):
        used = [b for b in batches if len(b) > 1]
        want = torch.cat([b.reshape(-1, 3, 4, 4) for b in used]).mean((0, 2, 3)) if used else torch.full((3,), 3.)
        torch.testing.assert_close(model.a.running_mean, want)
        if not used: assert torch.equal(model.b.running_var, torch.full((3,), 2.))
    assert torch.equal(model.a.running_mean, torch.full((3,), 3.))

def test_batches_of_one_are_refused():
    with pytest.raises(ScreenError, match='batches of two or more'):
        with adapted_batchnorm(Both(), [(torch.randn(1, 3, 4, 4),)]*3): pass

# Screens with such groups

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('groups')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02', 'HUVEC-17'], sirnas=9, size=32, plates=1, controls=0, progress=False)
    table = read_metadata(d/'screen')
    class made: pass
    made.dir, made.table, made.source = d, table, PngTree(d/'screen', table)
    return made

def some(table, **wells):
    "So many treatment wells of each experiment"
    kept = [t[t.well_id.isin(t.well_id.unique()[:wells.get(e, 99)])] for e, t in table[table.well_type == 'treatment'].groupby('experiment')]
    return pd.concat(kept, ignore_index=True)

def learner(made, table, sites):
    dls = screen_dls(Screen(table, made.source), valid='HUVEC-02', bs=8, sites=sites, device='cpu')
    return screen_learner(dls, 'test_efficientnet', emb_dim=16, pretrained=None)

@pytest.mark.parametrize('sites', [1, 2])
@pytest.mark.parametrize('wells', [dict(), {'HUVEC-01': 1}, {'HUVEC-01': 1, 'RPE-01': 2}], ids=['last batch of one', 'group of one', 'group of two'])
def test_an_index_of_any_groups(made, sites, wells, capsys):
    table = some(made.table, **wells)
    if sites == 1: table = table[(table.site == 1) | ~table.experiment.isin(list(wells))]      # a single site
    learn = learner(made, table, sites)
    index = workflow.build_index(learn, 1, progress=False)
    rows, note = learn.dls.train.items, capsys.readouterr().err
    assert len(index) == 2*len(rows) and set(index.labels.protocol.dropna()) == {'adapted'}
    assert ('the remembered ones are used: HUVEC-01' in note) == bool(wells)
    again = learn.embed(rows, tta=1, mask=workflow.INDUCTIVE_MASK, progress=False, adapt='experiment')
    np.testing.assert_array_equal(emb_features(again), index.features[len(rows):])     # queries are treated as the index is
    if not wells: assert len(learn.embed(learn.dls.screen.table, tta=1, progress=False, adapt='experiment', bs=8)) == len(table)//sites    # 9 = 8 + 1
    plain, lone = index.features[:len(rows)], (rows.experiment == 'HUVEC-01').to_numpy()
    if wells: np.testing.assert_allclose(emb_features(again)[lone], plain[lone], atol=1e-6)
    assert np.abs(emb_features(again)[~lone] - plain[~lone]).max() > 1e-3

def test_adaptation_by_batches_of_one_is_refused(made):
    learn = learner(made, some(made.table), 1)
    with pytest.raises(ScreenError, match='batches of two or more'): learn.embed(adapt='experiment', bs=1, progress=False)

# Learners without a screen

def test_an_exported_learner_embeds_as_before(made, tmp_path):
    learn = learner(made, some(made.table), 1)
    want = learn.embed(made.table.head(6), tta=1, progress=False)
    learn.dls.rebuild = None
    learn.export(tmp_path/'e.pkl')
    got = load_learner(tmp_path/'e.pkl').embed(made.table.head(6), tta=1, progress=False)
    np.testing.assert_array_equal(emb_features(got), emb_features(want))

def test_a_learner_without_a_screen_says_what_to_do(made):
    learn = learner(made, some(made.table), 1)
    del learn.dls.screen
    with pytest.raises(ScreenError, match='no screen to read rows of.*load_model'): learn.embed(made.table)

# Thousands of groups

PLATES, EACH = 2000, 100

@pytest.fixture(scope='module')
def wide():
    plate = np.repeat(np.arange(PLATES), EACH)
    names = np.array([f'E-{i:03d}' for i in range(PLATES//4)])
    well = np.tile([f'{r}{c:02d}' for r in 'BCDEFGHIJK' for c in range(2, 12)], PLATES)
    t = pd.DataFrame(dict(experiment=names[plate//4], plate=plate % 4 + 1, well=well, site=1, cell_type='E', plate_group=None, well_type='treatment'))
    t['well_id'] = t.experiment + '_' + t.plate.astype(str) + '_' + t.well
    return t.assign(site_id=t.well_id + '_1').sample(frac=1, random_state=0)

def old_plan(samples, by, bs, part):
    "The definition, group by group"
    of, exps = E.stat_groups(samples, by).astype(str).to_numpy(), samples.experiment.astype(str).to_numpy()
    first = {g: exps[i] for g, i in zip(*np.unique(of, return_index=True))}
    seen = {g: i for i, g in enumerate(dict.fromkeys(of))}
    names, n = sorted(seen, key=lambda g: (first[g], seen[g])), max(part//bs, 1)*bs
    at = {g: np.flatnonzero(of == g) for g in names}
    return [(g, i, first[g], at[g][k:k+n].tolist(), k, min(k+n, len(at[g]))) for i, g in enumerate(names) for k in range(0, len(at[g]), n)]

@pytest.mark.parametrize('by', ['plate', 'experiment'])
def test_the_plan_is_as_it_was(wide, by):
    samples = wide.head(3000).reset_index(drop=True)
    got = [(p.group, p.number, p.experiment, p.at.tolist(), p.start, p.stop) for p in E._plan(samples, by, 8, 20)]
    assert got == old_plan(samples, by, 8, 20)

def test_planning_grows_with_the_rows_only(wide):
    begun = time.process_time()
    plan = E._plan(wide.reset_index(drop=True), 'plate', 32, 2048)
    assert len(plan) == PLATES and time.process_time() - begun < 1.5

class Looked:
    "How many rows are looked at, in all"
    def __init__(self): self.n = 0
    def rows(self, *tables): self.n += sum(len(t) for t in tables if t is not None)

@pytest.mark.parametrize('norm', ['own', 'plate'])
def test_embedding_looks_at_each_row_a_few_times(wide, monkeypatch, norm):
    looked, spec = Looked(), ScreenSpec('sirna', ['a'], ['c'], {}, norm=norm)
    if norm == 'plate': wide = wide[wide.experiment < 'E-100']
    class Loader: _pool = None
    def loader(spec, screen, stat_rows=None, **kw):
        rows = screen.table
        looked.rows(rows, stat_rows if norm == 'plate' else None)
        assert norm == 'own' or set(rows.plate) == set(stat_rows.plate)
        return Loader()
    @contextmanager
    def adapted(model, spec, rows, *args): looked.rows(rows); yield
    monkeypatch.setattr(E, 'spec_dl', loader); monkeypatch.setattr(E, '_adapted', adapted)
    monkeypatch.setattr(E, '_part_features', lambda model, dl, part, *args: np.zeros((len(part.at), 2), np.float32))
    plan = E._plan(wide.reset_index(drop=True), 'plate', 32, 2048)
    begun = time.process_time()
    options = E.EmbedOptions(tta=1, mask=(), adapt='plate', adapt_rows=wide, stat_rows=wide, progress=False)
    done = E.embed_features(torch.nn.Linear(1, 1), spec, Screen(wide, None), plan, list(range(len(plan))), options)
    assert sum(len(x) for _, x in done) == len(wide) and looked.n <= 4*len(wide)
    assert time.process_time() - begun < 3
