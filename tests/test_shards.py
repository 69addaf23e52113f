"Shards of `rcic_embed`, and a Ray cluster, end with the bytes of the whole run."
import json, os, subprocess, sys
import pytest
from helpers import learner, refused, simulate_screen, start_python
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.folder import load_model
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen

EXPERIMENTS = ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'RPE-01', 'RPE-02', 'RPE-03', 'U2OS-01']
RUN = 'import sys; from rcic_fastai.cli import rcic_embed; sys.exit(rcic_embed(sys.argv[1:]))'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('shards')
    simulate_screen(d/'png', EXPERIMENTS, sirnas=6, size=32, plates=2, controls=1, test=['RPE-03'], progress=False)
    pack_screen(open_screen(d/'png'), d/'screen.zarr', progress=False)
    learner(screen_dls(open_screen(d/'screen.zarr'), valid='HUVEC-02', bs=8, device='cpu')).to_model(tta=1, progress=False).save(d/'model')
    return d

def args(made, out, *more): return [str(o) for o in (made/'model', made/'screen.zarr', out, '--tta', 1, '--bs', 8, *more)]
def embed(made, out, *more): return cli.rcic_embed(args(made, out, *more))

@pytest.mark.parametrize('how', [(), ('--level', 'site', '--adapt', 'plate')])
def test_shards_end_with_the_bytes_of_the_whole_run(made, tmp_path, how, capsys):
    assert embed(made, tmp_path/'whole.parquet', *how) == 0
    whole = (tmp_path/'whole.parquet').read_bytes()
    for k in (3, 1, 3): assert embed(made, tmp_path/'a.parquet', '--shard', f'{k}/3', *how) == 0
    assert not (tmp_path/'a.parquet').exists() and (tmp_path/'a.parquet.part').is_dir()
    said = capsys.readouterr().out
    assert 'when all are, the same command without --shard' in said
    assert embed(made, tmp_path/'a.parquet', *how) == 0          # makes what the second one has not
    assert (tmp_path/'a.parquet').read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.parquet', 'a.parquet.json', 'whole.parquet', 'whole.parquet.json']

def test_a_shard_after_the_merge_leaves_nothing(made, tmp_path, capsys):
    assert embed(made, tmp_path/'a.parquet') == 0
    was = (tmp_path/'a.parquet').read_bytes()
    assert embed(made, tmp_path/'a.parquet', '--shard', '1/2') == 2 and 'is there already' in capsys.readouterr().err
    assert (tmp_path/'a.parquet').read_bytes() == was and not (tmp_path/'a.parquet.part').exists()

@pytest.mark.parametrize('when', [0, 1])
def test_a_shard_during_the_merge_leaves_nothing(made, tmp_path, capsys, monkeypatch, when):
    "Another run puts all together, and removes the folder, while this one makes a part"
    from rcic_fastai.predict import profiles as P
    real = P.embed_features
    def slow(*args):
        for n, made_part in enumerate(real(*args)):
            if n == when:
                P.PARTS_FOLDER.remove(tmp_path/'a.parquet.part')
                (tmp_path/'a.parquet').write_bytes(b'put together')
            yield made_part
    monkeypatch.setattr(P, 'embed_features', slow)
    assert embed(made, tmp_path/'a.parquet', '--shard', '1/2') == 0 and 'not needed any more' in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.parquet']

def test_a_shard_that_runs_twice_at_once(made, tmp_path):
    assert embed(made, tmp_path/'whole.csv') == 0
    twice = [start_python(RUN, *args(made, tmp_path/'a.csv', '--shard', '1/2')) for _ in range(2)]
    for p in twice:
        done = p.wait(200)
        assert done.returncode == 0, done.stderr[-2000:]
    assert embed(made, tmp_path/'a.csv', '--shard', '2/2') == 0
    names = sorted(p.name for p in (tmp_path/'a.csv.part').iterdir())
    assert names == ['.rcic_fastai.json', *[f'part-{i:05d}.parquet' for i in range(len(EXPERIMENTS))], 'parts.json']
    assert embed(made, tmp_path/'a.csv') == 0 and (tmp_path/'a.csv').read_bytes() == (tmp_path/'whole.csv').read_bytes()

def test_each_shard_makes_its_own_parts_only(made, tmp_path):
    model, screen, found = load_model(made/'model'), open_screen(made/'screen.zarr'), []
    for k in (1, 2, 3):
        model.profile_file(screen, tmp_path/f'{k}.csv', tta=1, bs=8, progress=False, shard=f'{k}/3')
        found.append({p.name for p in (tmp_path/f'{k}.csv.part').glob('*.parquet')})
    assert sum(map(len, found)) == len(set.union(*found)) == len(EXPERIMENTS) and min(map(len, found)) >= 2

def test_shards_with_other_options_are_refused(made, tmp_path, capsys):
    assert embed(made, tmp_path/'a.csv', '--shard', '1/2') == 0
    assert embed(made, tmp_path/'a.csv', '--shard', '2/2', '--adapt', 'plate') == 2
    assert 'begun with different adapt' in capsys.readouterr().err
    assert embed(made, tmp_path/'a.csv', '--shard', '3/2') == 2 and 'such as 3/8' in capsys.readouterr().err

def test_a_shard_that_began_differently_meanwhile_is_noticed(made, tmp_path, monkeypatch):
    "Both shards found no folder, and the other one was first"
    from rcic_fastai.embed import embed as e
    model, screen, write = load_model(made/'model'), open_screen(made/'screen.zarr'), e.write_json
    def first(path, d, **kw): return write(path, dict(d, tta=8), **kw)
    monkeypatch.setattr(e, 'write_json', first)
    refused(lambda: model.profile_file(screen, tmp_path/'a.csv', tta=1, bs=8, progress=False, shard='1/2'), 'begun with different tta')
    assert not list((tmp_path/'a.csv.part').glob('*.parquet'))

def test_parts_of_a_gpu_are_put_together_without_one(made, tmp_path):
    for k in (1, 2): assert embed(made, tmp_path/'a.csv', '--shard', f'{k}/2') == 0
    facts = json.loads((tmp_path/'a.csv.part/parts.json').read_text())
    (tmp_path/'a.csv.part/parts.json').write_text(json.dumps(dict(facts, device='cuda')))
    last = sorted((tmp_path/'a.csv.part').glob('*.parquet'))[-1]
    kept = last.read_bytes()
    last.unlink()
    assert embed(made, tmp_path/'a.csv') == 2 and not (tmp_path/'a.csv').exists()
    last.write_bytes(kept)
    assert embed(made, tmp_path/'a.csv') == 0 and (tmp_path/'a.csv').exists()

# ---- Ray

CLUSTER = '''
import os, sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, object_store_memory=10**8))
workers = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(workers[1], allow_graceful=False)
print('killed', flush=True)
sys.stdin.readline()
cluster.shutdown()
'''

@pytest.fixture(scope='module')
def cluster():
    "A Ray cluster of two workers in processes of this machine; its address and a function that kills one worker"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), RAY_USAGE_STATS_ENABLED='0', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    p = subprocess.Popen([sys.executable, '-c', CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    address = p.stdout.readline().strip()
    assert ':' in address, 'the cluster did not start'
    def kill():
        p.stdin.write('\n')
        p.stdin.flush()
        return p.stdout.readline().strip()
    yield address, kill
    p.stdin.close()
    p.wait(60)

@pytest.mark.extra('ray')
def test_a_ray_cluster_ends_with_the_bytes_of_the_whole_run(made, tmp_path, cluster, monkeypatch):
    "Also when one of its two workers dies in the middle"
    from rcic_fastai.embed import embed as e
    address, kill = cluster
    assert embed(made, tmp_path/'whole.parquet') == 0
    assert embed(made, tmp_path/'a.parquet', '--ray', address) == 0
    assert (tmp_path/'a.parquet').read_bytes() == (tmp_path/'whole.parquet').read_bytes()
    write, said = e._write_part, []
    def kills(*a):
        write(*a)
        if not said: said.append(kill())
    monkeypatch.setattr(e, '_write_part', kills)
    assert embed(made, tmp_path/'b.parquet', '--ray', address) == 0 and said == ['killed']
    assert (tmp_path/'b.parquet').read_bytes() == (tmp_path/'whole.parquet').read_bytes()
    assert embed(made, tmp_path/'c.parquet', '--ray', address, '--level', 'site', '--adapt', 'plate') == 0
    assert embed(made, tmp_path/'d.parquet', '--level', 'site', '--adapt', 'plate') == 0
    assert (tmp_path/'c.parquet').read_bytes() == (tmp_path/'d.parquet').read_bytes()

@pytest.mark.extra('ray')
def test_what_goes_wrong_on_the_cluster_is_said_here(made, tmp_path, cluster, capsys):
    pack_screen(open_screen(made/'png'), tmp_path/'s.zarr', progress=False)
    chunk = tmp_path/'s.zarr/images/c/3/0/0/0'
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert cli.rcic_embed([str(o) for o in (made/'model', tmp_path/'s.zarr', tmp_path/'a.csv', '--tta', 1, '--ray', cluster[0])]) == 2
    assert 'its checksum is wrong' in capsys.readouterr().err

@pytest.mark.extra('ray')
def test_a_cluster_that_is_not_there(made, tmp_path, capsys):
    import ray
    ray.shutdown()       # of another test of this process
    assert embed(made, tmp_path/'a.csv', '--ray', '127.0.0.1:1') == 2
    assert 'cannot be reached' in capsys.readouterr().err
    ray.init('local', log_to_driver=False, logging_level='error', include_dashboard=False, num_cpus=1)
    try:
        assert embed(made, tmp_path/'a.csv', '--ray', '127.0.0.1:1') == 2
        assert 'is another cluster than that at' in capsys.readouterr().err and not (tmp_path/'a.csv').exists()
    finally: ray.shutdown()
