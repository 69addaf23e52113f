"Files that are written whole: many of them in linear time, and nothing left of processes that were killed."
import os, signal, subprocess, sys, time
import pytest
from rcic_fastai import core
from rcic_fastai.core import write_atomic

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='processes of other systems are not asked whether they live')

def write_many(folder, n):
    for i in range(n): write_atomic(folder/f'{i}.txt', lambda p: p.write_text('x'))

def ended():
    "The id of a process that has ended"
    p = subprocess.Popen([sys.executable, '-c', ''])
    p.wait()
    return p.pid

def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    "However many files are written into it: every call that lists a folder is counted"
    looked = []
    for name in ('scandir', 'listdir'):
        monkeypatch.setattr(os, name, lambda *a, real=getattr(os, name), **kw: (looked.append(a), real(*a, **kw))[1])
    monkeypatch.setattr(core, '_cleaned', {}, raising=False)
    write_many(tmp_path/'few', 10)
    few = len(looked)
    write_many(tmp_path/'many', 2000)
    assert few <= 2 and len(looked) <= 4 and len(os.listdir(tmp_path/'many')) == 2000

def test_what_was_killed_leaves_nothing(tmp_path):
    "Killed while it writes; the next process that writes anything into the folder cleans it"
    code = ('import sys, time; from pathlib import Path; from rcic_fastai.core import write_atomic\n'
            'def slow(p): p.write_text("half"); print("now", flush=True); time.sleep(60)\n'
            'write_atomic(Path(sys.argv[1]), slow)')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'a.txt'], stdout=subprocess.PIPE)
    p.stdout.readline()
    write_atomic(tmp_path/'first.txt', lambda p: p.write_text('x'))
    assert len(os.listdir(tmp_path)) == 2                                # the other one is alive: its file stays
    p.send_signal(signal.SIGKILL); p.wait()
    core._cleaned.clear()                                                # as in a new process
    write_atomic(tmp_path/'b.txt', lambda p: p.write_text('x'))
    assert sorted(os.listdir(tmp_path)) == ['b.txt', 'first.txt']

def test_only_what_was_left_here_is_removed(tmp_path, monkeypatch):
    dead, host = ended(), core._HOST
    mine = [f'{host}{dead}.a.txt', f'{host}{dead}.b.c.parquet']
    kept = [f'.0badcafe-{dead}.a.txt', f'{host}{os.getppid()}.a.txt', f'{host}x.a.txt', f'{host}{dead}', f'{host}{dead}x.a', '.hidden', f'{dead}.a.txt']
    for name in mine + kept: (tmp_path/name).write_text('x')
    (tmp_path/f'{host}{dead}.folder').mkdir()
    monkeypatch.setattr(core, '_cleaned', {}, raising=False)
    write_atomic(tmp_path/'new.txt', lambda p: p.write_text('x'))
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, 'new.txt', f'{host}{dead}.folder'])

def test_a_folder_is_looked_through_again_later(tmp_path, monkeypatch):
    write_many(tmp_path, 1)
    stale = tmp_path/f'{core._HOST}{ended()}.late.txt'
    stale.write_text('x')
    write_many(tmp_path, 1)
    assert stale.exists()
    real = time.monotonic
    monkeypatch.setattr(time, 'monotonic', lambda: real() + 61)
    write_many(tmp_path, 1)
    assert not stale.exists()

def test_what_another_user_left_is_in_nobodys_way(tmp_path, monkeypatch):
    "In a folder where each may remove only what is their own"
    stale = tmp_path/f'{core._HOST}{ended()}.theirs.txt'
    stale.write_text('x')
    real = os.unlink
    def unlink(path, *args, **kw):
        if os.fspath(path) == str(stale): raise PermissionError(1, 'Operation not permitted', str(path))
        real(path, *args, **kw)
    monkeypatch.setattr(os, 'unlink', unlink)
    monkeypatch.setattr(core, '_cleaned', {}, raising=False)
    write_atomic(tmp_path/'new.txt', lambda p: p.write_text('x'))
    with core.only_one(tmp_path/'out'): pass
    assert sorted(os.listdir(tmp_path)) == sorted([stale.name, 'new.txt'])

APART = ['unshare', '--user', '--map-root-user', '--pid', '--fork', '--mount-proc']

def can_be_apart():
    try: return not subprocess.run([*APART, 'true'], capture_output=True).returncode
    except OSError: return False

@pytest.mark.skipif(not can_be_apart(), reason='this machine gives processes no numbers of their own')
def test_containers_of_one_name_leave_each_other_alone(tmp_path):
    "Each numbers its processes itself, so that a number says nothing of the other's"
    code = ('import sys; from pathlib import Path; from rcic_fastai.core import write_atomic\n'
            'def slow(p): p.write_text("half"); print("now", flush=True); sys.stdin.readline(); p.write_text("whole")\n'
            'write_atomic(Path(sys.argv[1]), slow)')
    many = 'for i in 1 2 3 4 5 6 7 8 9; do /bin/true; done; "$0" "$@"; exit $?'      # a number that the other does not have
    p = subprocess.Popen([*APART, 'sh', '-c', many, sys.executable, '-W', 'ignore', '-c', code, tmp_path/'a.txt'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    p.stdout.readline()
    begun, = os.listdir(tmp_path)
    other = 'import sys; from pathlib import Path; from rcic_fastai.core import write_atomic; write_atomic(Path(sys.argv[1]), lambda p: p.write_text("x"))'
    subprocess.run([*APART, sys.executable, '-W', 'ignore', '-c', other, tmp_path/'b.txt'], check=True)
    assert begun in os.listdir(tmp_path)
    p.communicate(b'\n')
    assert p.returncode == 0 and (tmp_path/'a.txt').read_text() == 'whole'


def test_a_temporary_name_is_said_as_the_name_that_it_will_have(tmp_path):
    from pathlib import Path
    from rcic_fastai.core import final_name
    seen = []
    def write(p):
        seen.append(p)
        if len(seen) < 2: write_atomic(p, write)       # a library that writes through a file of its own
        else: Path(p).touch()
    write_atomic(tmp_path/'h.csv', write)
    assert {p.name for p in seen}.isdisjoint({'h.csv'}) and {final_name(p) for p in [*seen, tmp_path/'h.csv']} == {str(tmp_path/'h.csv')}
    assert final_name('.hidden.csv') == '.hidden.csv'
