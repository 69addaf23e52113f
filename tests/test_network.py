"Nothing reaches for another machine unless a download was asked for."
import json, os, subprocess, sys
import pytest

BLOCKED = 'the network is blocked here'
SITE = f'''
import socket, sys
def block(event, args):
    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr', 'socket.getnameinfo'): raise OSError({BLOCKED!r})
    if event in ('socket.connect', 'socket.sendto', 'socket.sendmsg') and args[0].family != getattr(socket, 'AF_UNIX', None): raise OSError({BLOCKED!r})
sys.addaudithook(block)
'''

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "Run Python in a process that, like all it starts, can reach no other machine"
    d = tmp_path_factory.mktemp('site')
    (d/'sitecustomize.py').write_text(SITE)
    env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE') and 'proxy' not in k.lower()}
    env.update(PYTHONPATH=str(d), OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTHONWARNINGS='ignore', MPLBACKEND='Agg')
    return lambda code, *args: subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)

TRY = '''
import concurrent.futures, multiprocessing, socket, urllib.request
def one(how):
    try: how()
    except OSError as e: return str(e)
def two(): return one(lambda: socket.create_connection(('127.0.0.1', 9), 1))
if __name__ == '__main__':
    a, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'
    with concurrent.futures.ProcessPoolExecutor(1) as p: print(p.submit(two).result())
    print(one(lambda: socket.socket().connect(('127.0.0.1', 9))))
    print(one(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))))
    print(one(lambda: urllib.request.urlopen('http://localhost:9/', timeout=1)))
'''

def test_the_block_blocks(alone):
    done = alone(TRY)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(BLOCKED in l for l in lines), done.stdout + done.stderr[-2000:]

RUN = 'import sys; from rcic_fastai import cli; sys.exit(getattr(cli, sys.argv[1])(sys.argv[2:]))'

def test_a_download_that_was_asked_for_says_so_in_one_sentence(alone, tmp_path):
    done = alone(RUN, 'rcic_download', tmp_path/'d', '--base-url', 'http://192.0.2.1/rxrx1')
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(said) == 1 and BLOCKED in said[0] and said[0].startswith('rcic_download: ') and said[0].endswith('.'), done.stderr[-2000:]
    assert not list(tmp_path.rglob('*.zip'))

STEPS = '''
import sys
from rcic_fastai import cli
for line in sys.argv[1:]:
    name, *args = line.split()
    print(name, flush=True)
    if code := getattr(cli, name)(args): sys.exit(code)
'''

def test_from_a_screen_to_its_accuracy_without_a_network(alone, tmp_path):
    d = tmp_path
    recipe = dict(name='short', arch='efficientnet-lite0', model=dict(emb_dim=16), stages=[dict(name='all', epochs=1, lr=1e-3, loss='adacos')])
    (d/'short.json').write_text(json.dumps(recipe))
    done = alone(STEPS, f'rcic_simulate {d}/screen --experiments HUVEC-01,HUVEC-02,HUVEC-17 --sirnas 4 --size 64 --plates 1 --controls 1 --workers 2',
                 f'rcic_pack {d}/screen {d}/screen.zarr --verify',
                 f'rcic_train {d}/screen.zarr {d}/model --recipe {d}/short.json --valid HUVEC-02 --bs 8 --tta 1 --pretrained yes',
                 f'rcic_predict {d}/model {d}/screen.zarr {d}/p.csv --tta 1 --embeddings {d}/emb.parquet',
                 f'rcic_evaluate {d}/p.csv {d}/screen')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert BLOCKED not in done.stdout + done.stderr and 'inductive' in done.stdout.rpartition('rcic_evaluate')[2]
    config = json.loads((d/'model/config.json').read_text())
    assert config['model']['arch'] == recipe['arch'] and (d/'p.csv').is_file()
