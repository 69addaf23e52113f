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
