"The answers on a small screen are those that are stored: the same screen, seed and thread count give the same predictions in every version."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch

STORED = Path(__file__).parent/'data'/'answers.json'
RUN = '''
import contextlib, io, json, sys
from pathlib import Path
import pandas as pd
from rcic_fastai import cli
d = Path(sys.argv[1])
recipe = dict(name='tiny', arch='test_efficientnet', stages=[
    dict(name='head', epochs=1, lr=1e-2, parts='stem,head', loss='adacos'), dict(name='all', epochs=2, lr=2e-3, cutmix=.3)])
(d/'tiny.json').write_text(json.dumps(recipe))
def run(line):
    command, *rest = line.format(d=d).split()
    with contextlib.redirect_stdout(io.StringIO()): assert getattr(cli, f'rcic_{command}')(rest) == 0, line
run('simulate {d}/screen --experiments HUVEC-01,HUVEC-02,HUVEC-17,RPE-01,RPE-08 --sirnas 8 --size 64 --plates 2 --controls 1 --seed 3 --workers 1')
run('pack {d}/screen {d}/screen.zarr --workers 1')
run('train {d}/screen.zarr {d}/model --recipe {d}/tiny.json --valid HUVEC-02 --pretrained no --metadata cell_type --tta 2 --seed 5')
answers = {}
for protocol in ('inductive', 'adapted', 'transductive'):
    run('predict {d}/model {d}/screen.zarr {d}/%s.csv --tta 2 --protocol %s --neighbors {d}/%s.parquet' % (protocol, protocol, protocol))
    near = pd.read_parquet(d/f'{protocol}.parquet')
    answers[protocol] = dict(pd.read_csv(d/f'{protocol}.csv').values.tolist())
    answers[protocol + ' cosine'] = round(float(near.cosine.mean()), 4)
print('ANSWERS' + json.dumps(answers))
'''

def answers(folder):
    "Return what a new process with one thread answers"
    env = {**os.environ, **{k: '1' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', RUN, str(folder)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split('ANSWERS')[1])

def test_the_stored_answers(tmp_path):
    stored = json.loads(STORED.read_text())
    if stored['torch'] != torch.__version__.split('+')[0]: pytest.skip(f'stored with torch {stored["torch"]}: another one may round otherwise')
    assert answers(tmp_path) == stored['answers']

if __name__ == '__main__':       # python tests/test_stored_answers.py FOLDER: store the answers of this version
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps(dict(torch=torch.__version__.split('+')[0], answers=answers(sys.argv[1])), indent=1, sort_keys=True) + '\n')
