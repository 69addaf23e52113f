"A short turn of bench/soak.py: kills at drawn moments, damaged inputs; and that it would notice"
import importlib.util, json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

SCRIPT = Path(__file__).resolve().parent.parent/'bench/soak.py'
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')

def test_a_short_soak():
    "In a process that has computed nothing, so that it may be forked"
    done = subprocess.run([sys.executable, '-W', 'ignore', SCRIPT, '--kills', '10', '--fuzz', '300', '--dry'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert [r['kills'] for r in got['kills']] >= [4, 3, 3] and all(r['identical'] == r['runs'] for r in got['kills'])
    assert sum(r['cases'] for r in got['inputs']) == 300 and all(r['worked'] and r['refused'] and not r['other'] for r in got['inputs'])

@pytest.fixture(scope='module')
def soak():
    spec = importlib.util.spec_from_file_location('soak', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))
    try: spec.loader.exec_module(module)
    finally: sys.path.remove(str(SCRIPT.parent))
    return module

def whole(argv):
    "Writes under another name"
    out = Path(argv[0])
    with open(out/'a.part', 'w') as f:
        for i in range(10): f.write(f'{i}\n'); f.flush(); time.sleep(.01)
    os.replace(out/'a.part', out/'a')

def appends(argv):
    "Forgets what it wrote before"
    for i in range(10):
        with open(Path(argv[0])/'a', 'a') as f: f.write(f'{i}\n')
        time.sleep(.01)

def litters(argv):
    "Leaves its unfinished file behind"
    out = Path(argv[0])
    (out/f'.{os.getpid()}.a').touch(); time.sleep(.1); (out/'a').write_text(''.join(f'{i}\n' for i in range(10))); (out/f'.{os.getpid()}.a').unlink()

def stuck(argv):
    "Cannot go on"
    out = Path(argv[0])
    if (out/'lock').exists(): return 3
    (out/'lock').touch(); whole(argv); (out/'lock').unlink()

@pytest.mark.parametrize('command,says', [(whole, ''), (appends, 'not the same: a '), (litters, 'left over: .'), (stuck, 'exit code 3')])
def test_what_a_kill_leaves_is_noticed(soak, tmp_path, monkeypatch, command, says):
    monkeypatch.setattr(soak.cli, 'rcic_bad', lambda argv: command(argv) or 0, raising=False)
    monkeypatch.setitem(soak.COMMANDS, 'bad', lambda d, out: ['rcic_bad', out])
    want, found, kills = ({'a': ''.join(f'{i}\n' for i in range(10)).encode()}, .1), [], 0
    for n in range(8):
        made, wrong = soak.killed(tmp_path, 'bad', want, random.Random(n), tmp_path/'log')
        kills += made; found.append(wrong)
    assert kills >= 4 and (any(says in w for w in found) if says else not any(found)), found

class Odd:
    "Inputs that work, are refused, raise, end the process, and take for ever"
    def __init__(self, home): self.work = home
    def try_one(self, kind, seed):
        if seed == 2: raise KeyError('x')
        if seed == 3: os.kill(os.getpid(), signal.SIGKILL)
        if seed == 4: time.sleep(60)
        if seed == 5: time.sleep(.4)
        return 'nothing', 'refused' if seed == 1 else 'worked'

def test_what_an_input_does_is_noticed(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, 'Inputs', Odd); monkeypatch.setattr(soak, 'SECONDS', .3)
    got = {s: (done, what) for s, done, what, _ in soak.tried(tmp_path, 'odd', range(7), tmp_path/'log')}
    assert [got[s][0] for s in range(7)] == ['worked', 'refused', 'other', 'other', 'other', 'other', 'worked']
    assert 'KeyError' in got[2][1] and 'ended (-9)' in got[3][1] and 'no answer' in got[4][1]
    assert soak.alike(['a 1', 'a 2', 'b']) == ['a 1 (and 1 alike)', 'b']
