"Prediction in parts: killed at any moment the same command goes on, ends with the same files, and mixes nothing."
import json, os, signal, subprocess, sys
import numpy as np, pandas as pd, pytest
from helpers import simulate_screen
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.embed import embed_parts, embed_screen
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.screen import Screen
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.predict.predict import write_tables
from rcic_fastai.embed.table import emb_features

ENV = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore', MPLBACKEND='Agg')
HOW = dict(part=16, bs=8, tta=1, progress=False)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('stream')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17', 'RPE-08'], sirnas=8, size=32, controls=2, progress=False)
    table = read_metadata(d/'screen'); source = PngTree(d/'screen', table)
    dls = screen_dls(Screen(table, source), valid='HUVEC-02', bs=16, device='cpu')
    learn = screen_learner(dls, 'test_efficientnet', metadata='cell_type', emb_dim=16, pretrained=None)
    recipe = dict(name='tiny', arch='test_efficientnet', model=dict(emb_dim=16), stages=[])
    (d/'tiny.json').write_text(json.dumps(recipe))
    assert cli.rcic_train(f'{d}/screen {d}/model --recipe {d}/tiny.json --valid HUVEC-02 --pretrained no --tta 1'.split()) == 0
    class made: pass
    made.dir, made.table, made.source, made.learn, made.spec = d, table, source, learn, dls.spec
    return made

class Failing(PngTree):
    "A source that reads so many sites and then no more"
    def __init__(self, source, left):
        self.__dict__.update(source.__dict__, left=left)
    def _read(self, site_id, out):
        self.left -= 1
        if self.left < 0: raise ScreenError('The disk is gone.')
        super()._read(site_id, out)

def embed(made, folder, source=None, rows=None, **kw):
    return embed_parts(folder, made.learn.model, made.spec, Screen(made.table if rows is None else rows, source or made.source), **{**HOW, **kw})

@pytest.mark.parametrize('how', [dict(), dict(adapt='experiment'), dict(adapt='plate', prior=4), dict(views='random', tta=2, seed=3)])
def test_stopped_anywhere_the_parts_are_the_same(made, tmp_path, how):
    want = list(embed(made, tmp_path/'whole', **how))
    for left in (30,) if how else (3, 30, 77):
        with pytest.raises(ScreenError, match='disk is gone'): embed(made, tmp_path/str(left), Failing(made.source, left), **how)
        first = {p.name: p.stat().st_mtime_ns for p in (tmp_path/str(left)).glob('part-*')}
        parts = embed(made, tmp_path/str(left), **how)
        assert all(parts.file(i).stat().st_mtime_ns == first.get(parts.file(i).name, parts.file(i).stat().st_mtime_ns) for i in range(len(parts)))
        for a, b in zip(parts, want, strict=True): pd.testing.assert_frame_equal(a, b, check_exact=True)
    if not how: assert len(first) > 2

def test_in_memory_on_disk_and_in_any_order(made, tmp_path):
    rows = made.table.sample(frac=1, random_state=0)
    got = embed_screen(made.learn.model, made.spec, Screen(rows, made.source), folder=tmp_path/'p', **HOW)
    pd.testing.assert_frame_equal(got, embed_screen(made.learn.model, made.spec, Screen(rows, made.source), **HOW), check_exact=True)
    assert got.Metadata_site_id.tolist() == rows.site_id.tolist()
    one = got.set_index('Metadata_site_id').loc[made.table.site_id].reset_index()
    other = embed_screen(made.learn.model, made.spec, Screen(made.table, made.source), **{**HOW, 'bs': 5, 'part': 7})
    assert np.abs(emb_features(one) - emb_features(other)).max() < 1e-5

def test_every_sample_is_in_one_part_and_experiments_stay_together(made, tmp_path):
    parts = embed(made, tmp_path/'p')
    assert sorted(np.concatenate([p.at for p in parts.plan])) == list(range(len(made.table)))
    assert all(len(p.at) <= 16 and made.table.experiment.iloc[p.at].nunique() == 1 for p in parts.plan)
    exps = [t.Metadata_experiment.unique().tolist() for t in parts.experiments()]
    assert exps == [[e] for e in sorted(made.table.experiment.unique())]

def test_a_cut_part_is_made_again(made, tmp_path):
    want = list(embed(made, tmp_path/'p'))
    for i, data in ((1, b''), (2, embed(made, tmp_path/'p').file(2).read_bytes()[:-9])): (tmp_path/'p'/f'part-{i:05d}.parquet').write_bytes(data)
    for a, b in zip(embed(made, tmp_path/'p'), want, strict=True): pd.testing.assert_frame_equal(a, b, check_exact=True)

def test_other_arguments_are_refused(made, tmp_path):
    embed(made, tmp_path/'p')
    source, table = PngTree(made.dir/'screen', made.table), made.table
    for kw, what in [(dict(tta=2), 'tta'), (dict(bs=4), 'bs'), (dict(adapt='plate'), 'adapt'), (dict(mask=()), 'mask'), (dict(part=8), 'part'),
                     (dict(rows=table.iloc[::-1]), 'rows'), (dict(rows=table.assign(cell_type='A549')), 'rows'), (dict(seed=1), 'seed')]:
        with pytest.raises(ScreenError, match=f'with different .*{what} \\('): embed(made, tmp_path/'p', **kw)
    source.stamp = lambda i: 'another'
    with pytest.raises(ScreenError, match='pictures'): embed(made, tmp_path/'p', source)
    embed(made, tmp_path/'p', rows=table.assign(sirna=None))         # labels are not looked at
    (tmp_path/'p/parts.json').write_text('{')
    with pytest.raises(ScreenError, match='parts.json is damaged'): embed(made, tmp_path/'p')
    (tmp_path/'p/parts.json').unlink()
    with pytest.raises(ScreenError, match='no parts.json'): embed(made, tmp_path/'p')

def test_nothing_is_written_before_there_is_something(made, tmp_path):
    with pytest.raises(ScreenError, match='disk is gone'): embed(made, tmp_path/'p', Failing(made.source, 0))
    with pytest.raises(ScreenError, match='choose 1 to 8'): embed(made, tmp_path/'p', tta=9)
    with pytest.raises(ScreenError, match='nothing to embed'): embed(made, tmp_path/'p', rows=made.table.iloc[:0])
    assert not (tmp_path/'p').exists()

def test_columns_without_a_value_at_first(tmp_path):
    write_tables(tmp_path/'t.parquet', (pd.DataFrame(dict(a=[i], b=[b])) for i, b in enumerate([None, 'x', None])))
    assert pd.read_parquet(tmp_path/'t.parquet').b.tolist()[1] == 'x'
    with pytest.raises(ScreenError, match='no table'): write_tables(tmp_path/'none.parquet', [])
    assert not (tmp_path/'none.parquet').exists()

SLOW = '''
import sys, time
from rcic_fastai import cli
from rcic_fastai.embed import embed
was = embed._write_part
def slow(*args): was(*args); print('\\npart', flush=True); time.sleep(.3)
embed._write_part = slow
sys.exit(cli.rcic_predict(sys.argv[1:]))
'''

def test_killed_the_same_command_ends_with_the_same_files(made, tmp_path):
    def command(name): return f'{made.dir}/model {made.dir}/screen {tmp_path}/{name}.csv --tta 1 --bs 8 --wells all --protocol adapted ' \
                              f'--neighbors {tmp_path}/{name}_near.parquet --embeddings {tmp_path}/{name}_emb.parquet'.split()
    assert cli.rcic_predict(command('whole')) == 0
    p = subprocess.Popen([sys.executable, '-c', SLOW, *command('killed')], env=ENV, stdout=subprocess.PIPE, text=True)
    while not (line := p.stdout.readline()).startswith('part'): assert line, 'ended before a part was written'
    p.send_signal(signal.SIGKILL); p.wait()
    part = tmp_path/'killed.csv.part'
    assert list(part.glob('part-*.parquet')) and not (tmp_path/'killed.csv').exists() and not (tmp_path/'killed.json').exists()
    assert cli.rcic_predict(command('killed')) == 0
    for end in ('.csv', '.top.csv'): assert (tmp_path/f'killed{end}').read_bytes() == (tmp_path/f'whole{end}').read_bytes()
    for end in ('_near', '_emb'): pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path/f'{n}{end}.parquet') for n in ('killed', 'whole')), check_exact=True)
    records = [json.loads((tmp_path/f'{n}.json').read_text()) for n in ('killed', 'whole')]
    assert records[0] == records[1] and not list(tmp_path.glob('*.part'))

def test_unfinished_predictions_of_another_kind_are_refused(made, tmp_path, capsys):
    embed_parts(f'{tmp_path}/x.csv.part', made.learn.model, made.spec, Screen(made.table, made.source), **HOW)
    capsys.readouterr()
    assert cli.rcic_predict(f'{made.dir}/model {made.dir}/screen {tmp_path}/x.csv --tta 1'.split()) == 2
    assert 'x.csv.part was begun with different model' in capsys.readouterr().err and not (tmp_path/'x.csv').exists()

def test_wells_and_group_statistics(made, tmp_path):
    "Statistics of a plate or experiment are those of all its sites, though its wells are in several parts"
    for norm, sites in (('own', 2), ('plate', 1), ('experiment', 2)):
        dls = screen_dls(Screen(made.table, made.source), valid='HUVEC-02', bs=8, device='cpu', norm=norm, sites=sites)
        learn = screen_learner(dls, 'test_efficientnet', emb_dim=16, pretrained=None)
        test = made.table[made.table.dataset == 'test']
        few = learn.embed(test, part=8, bs=8, tta=1, progress=False, folder=tmp_path/norm)
        many = learn.embed(test, part=2048, bs=8, tta=1, progress=False)
        pd.testing.assert_frame_equal(few, many, check_exact=True)
        assert len(few) == test[dls.spec.key].nunique() and ('Metadata_protocol' in few) == (norm != 'own')

@pytest.mark.parametrize('by', ['experiment', 'plate'])
def test_groups_of_many_rows_are_found_in_one_pass(by):
    "As a scan for each group would find them, and 200,000 rows of 2,000 plates in about a second"
    import time
    from rcic_fastai.embed.embed import _adapted_groups, _plan
    from rcic_fastai.screen.images import stat_groups
    rng = np.random.default_rng(0)
    for n, plates in ((500, 12), (200_000, 2000)):
        g = rng.integers(0, plates, n)
        t = pd.DataFrame(dict(experiment=[f'E{i//4}' for i in g], plate=g % 4 + 1), index=rng.permutation(n))
        start = time.process_time()
        plan, groups = _plan(t, by, 8, 64), _adapted_groups(t, None, by)
        seconds = time.process_time() - start
        of = stat_groups(t, by).to_numpy()
        for part in plan[:30]: assert part.at.tolist() == np.flatnonzero(of == part.group)[part.start:part.stop].tolist()
        for k in list(groups.at)[:30]: assert groups[k].index.tolist() == t.index[of == k].tolist()
    assert sum(len(p.at) for p in plan) == n and set(groups.at) == set(of) and seconds < 8
