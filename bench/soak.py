"""A hundred kills and ten thousand damaged inputs.

    python bench/soak.py [--kills 100] [--fuzz 10000] [--seed 0] [--dry]

Kills: rcic_pack, rcic_train and rcic_predict (with neighbors and embeddings) run in a process of their own that SIGKILL
ends at a drawn moment between the start and the end of their work, a quarter of the moments in its last sixth; then the
same command runs again (rcic_train with --resume), is perhaps killed again, and ends. What lies there then must be what a
run that nobody disturbed wrote, byte for byte (but for the seconds that a stage of training took), and nothing else may lie beside it. The processes are forked from this one,
which has imported the library and computed nothing, so that a command begins at once.

Damaged inputs: model folders, tables and PNGs, changed at random; half the folders and PNGs get checksums that fit again,
as somebody who means harm would write them. Each must work or end in a `ScreenError` within five seconds, run no code and
reach for no network. They are tried in a forked process as well, so that one that hangs or crashes ends only itself.
"""
import os
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
os.environ.update(OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='Agg')

import argparse, collections, importlib.util, io, json, random, re, select, shutil, signal, struct, sys, tempfile, time, traceback, warnings, zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import save
from rcic_fastai import cli, folder as F
from rcic_fastai.screen.images import decode_png
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.open import open_screen

HERE, SECONDS = Path(__file__).resolve().parent, 5
torch.set_num_threads(1)


def by_path(path):
    "A module from a file that is in no package"
    spec = importlib.util.spec_from_file_location(f'soak_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- kills

RECIPE = dict(name='two', arch='test_efficientnet', model=dict(emb_dim=16), stages=[
    dict(name='head', epochs=2, lr=1e-2, parts='stem,head', loss='adacos', metadata=False), dict(name='all', epochs=2, lr=1e-3, cutmix=.5)])
COMMANDS = dict(pack=lambda d, out: ['rcic_pack', d/'screen', out/'screen.zarr', '--workers', 1],
                train=lambda d, out: ['rcic_train', d/'screen.zarr', out/'model', '--recipe', d/'two.json', '--valid', 'HUVEC-02', '--bs', 8,
                                      '--pretrained', 'no', '--tta', 1],
                predict=lambda d, out: ['rcic_predict', d/'model', d/'screen.zarr', out/'p.csv', '--tta', 1, '--bs', 8, '--wells', 'all', '--protocol', 'adapted',
                                        '--embeddings', out/'emb.parquet', '--neighbors', out/'near.parquet'])


def start(line, log):
    "Fork, and run a console script in the child; its number"
    sys.stdout.flush(); sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 99
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1); os.dup2(fd, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, 'wb', closefd=False)) for n in (1, 2))
        warnings.simplefilter('ignore')
        code = getattr(cli, line[0])([str(o) for o in line[1:]])
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def ended(pid, after=None):
    "Wait for a process, perhaps kill it after so many seconds; → exit code, −9 when it was killed"
    end = after is not None and time.perf_counter() + after
    while end and time.perf_counter() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None: time.sleep(.002)
    if end: os.kill(pid, signal.SIGKILL)                # of one that is over already this changes nothing
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder): return {str(p.relative_to(folder)): untimed(p) for p in sorted(folder.rglob('*')) if p.is_file()}
def untimed(path):
    "Bytes of a file; config.json without the seconds that a stage took, and so without the checksum over them"
    if path.name != 'config.json': return path.read_bytes()
    c = json.loads(path.read_text())
    return {**c, 'sha256': None, 'stages': [{**s, 'seconds': None} for s in c['stages']]}
def names(folder): return {str(p.relative_to(folder)) for p in folder.rglob('*')}


def prepare(home):
    "A screen of 32 px, its packed store and a model, all as undisturbed runs wrote them; {command: (files, seconds)}"
    line = ['rcic_simulate', home/'screen', '--experiments', 'HUVEC-01,HUVEC-02,HUVEC-17,HUVEC-18,HUVEC-19,RPE-08', '--sirnas', 6,
            '--size', 32, '--plates', 1, '--controls', 1, '--workers', 1]
    if ended(start(line, home/'log')): raise SystemExit((home/'log').read_text())
    (home/'two.json').write_text(json.dumps(RECIPE))
    whole = {}
    for command, line in COMMANDS.items():
        for turn in ('first', 'again'):                 # the first also warms the file cache
            out = home/f'{command}_{turn}'
            out.mkdir()
            begun = time.perf_counter()
            if ended(start(line(home, out), home/'log')): raise SystemExit((home/'log').read_text())
            whole[command] = files(out), time.perf_counter() - begun
        if files(home/f'{command}_first') != whole[command][0]: raise SystemExit(f'two undisturbed runs of rcic_{command} differ')
        made = dict(pack='screen.zarr', train='model').get(command)
        if made: shutil.copytree(out/made, home/made)
    return whole


def undisturbed(home, command):
    "Seconds that a command takes now: other programs come and go"
    out, begun = Path(tempfile.mkdtemp(dir=home)), time.perf_counter()
    ended(start(COMMANDS[command](home, out), home/'log'))
    seconds = time.perf_counter() - begun
    shutil.rmtree(out)
    return seconds


def killed(home, command, whole, dice, log):
    "One run, killed once or more often and ended; → (kills, what is wrong with it or '')"
    want, seconds = whole
    out, dirs = Path(tempfile.mkdtemp(prefix=command, dir=home)), {str(q) for f in want for q in Path(f).parents if str(q) != '.'}
    line, kills, aim, moments, wrong = COMMANDS[command](home, out), 0, dice.choice([1, 1, 2]), [], ''
    tries = iter(range(6))
    whole_now = lambda: names(out) == set(want) | dirs and files(out) == want
    resume = lambda: ['--resume'] if command == 'train' and moments else []
    while kills < aim and not wrong and next(tries, None) is not None:
        moment = dice.uniform(.84, 1) if dice.random() < .25 else dice.uniform(0, 1)
        begun = time.perf_counter()
        code = ended(start(line + resume(), log), moment*seconds)
        moments.append(round(moment, 3)); kills += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL): wrong = f'exit code {code}'
        elif code and whole_now(): break                # everything was written: nothing to go on with
        elif not code and not kills: shutil.rmtree(out); out.mkdir(); moments.clear(); seconds = time.perf_counter() - begun     # over before its moment came: anew
        elif not code: break
    if not wrong and not whole_now() and (code := ended(start(line + resume(), log))): wrong = f'exit code {code}'
    if not wrong and not whole_now():
        got = files(out)
        differ, left = sorted(f for f in want if got.get(f) != want[f]), sorted(names(out) - set(want) - dirs)
        wrong = '; '.join(f'{what}: {", ".join(o[:5])}' for what, o in (('not the same', differ), ('left over', left)) if o)
    if wrong:
        said = re.findall(r'rcic_\w+: .*|\w+Error.*', log.read_text() if log.exists() else '')[-1:]
        wrong += f' (killed at {moments} of {seconds:.2f} s{"; " if said else ""}{"".join(said).replace(str(home), "…")})'
    shutil.rmtree(out)
    return kills, wrong


def soak_kills(
    home, # An empty folder
    kills:int, # How many, divided over the three commands
    seed:int=0, # Of the moments
)->tuple: # (one row a command, failures)
    "Kill each command and let it end, until so many kills were made"
    whole, rows, failures = prepare(home), [], []
    for n, command in enumerate(COMMANDS):
        made, runs, same, begun, aim = 0, 0, 0, time.perf_counter(), kills//3 + (n < kills % 3)
        while made < aim:
            dice, log = random.Random(f'{seed} {command} {runs}'), home/'run.log'
            log.unlink(missing_ok=True)
            if runs % 5 == 0: whole[command] = whole[command][0], undisturbed(home, command)
            more, wrong = killed(home, command, whole[command], dice, log)
            made += more; runs += 1; same += not wrong
            if wrong: failures.append(f'rcic_{command}, seed {seed}, run {runs-1}: {wrong}')
            if runs > 6*aim + 6: failures.append(f'rcic_{command} is always over before it is killed'); break
        rows.append(dict(command=f'rcic_{command}', kills=made, runs=runs, identical=same, undisturbed_seconds=round(whole[command][1], 2),
                         seconds=round(time.perf_counter() - begun, 1)))
    return rows, failures


def alike(failures):
    "Failures that differ in numbers only are told once, with how many there are"
    kinds = collections.defaultdict(list)
    for f in failures: kinds[re.sub(r'\d+', '#', f)].append(f)
    return [f[0] + (f' (and {len(f)-1} alike)' if len(f) > 1 else '') for f in kinds.values()]


# ---- damaged inputs

NASTY = ['', ' ', 'NaN', 'None', '-1', '0', '1e308', '1.5', 'inf', '9'*30, 'x'*5000, 'A0', 'ZZ99', 'B02', 'é漢\u202e', '\x1b]0;x\x07', '../../x', '/etc/passwd', "=cmd|' /C calc'!A0",
         'test', 'train', 'val', 'treatment', 'positive_control', 'HUVEC', 'HUVEC-01', '"', "'", ',', '\n', '\0', '٣', '1_000', '0x10', 'True']


def spoil_table(r, data):
    "Another cell, column, row, separator, encoding, or a few other bytes in a CSV; what was done"
    rows = [l.split(',') for l in data.decode().splitlines()]
    how = r.choice(['cell']*6 + ['column', 'name', 'twice', 'row', 'gone', 'short', 'long', 'order', 'empty', 'separator', 'encoding', 'mark', 'bytes', 'bytes', 'cut', 'noise'])
    i, j = r.randrange(len(rows)), r.randrange(len(rows[0]))
    if how == 'cell':
        for _ in range(r.choice([1, 1, 5])): rows[r.randrange(len(rows))][r.randrange(len(rows[0]))] = r.choice(NASTY)
    elif how == 'column': rows = [l[:j] + l[j+1:] for l in rows]
    elif how == 'name': rows[0][j] = r.choice(NASTY + rows[0])
    elif how == 'twice': rows = [l + [l[j]] for l in rows]
    elif how == 'row': rows.insert(i, rows[r.randrange(len(rows))])
    elif how == 'gone': del rows[i:i + r.randrange(1, len(rows))]
    elif how == 'short': rows[i] = rows[i][:j]
    elif how == 'long': rows[i] = rows[i] + [r.choice(NASTY)]*r.randrange(1, 9)
    elif how == 'order': rows = rows[:1] + r.sample(rows[1:], len(rows) - 1)
    elif how == 'empty':
        for l in rows[1:]: l[j] = r.choice(['', l[j]])
    mark = r.choice(';\t|') if how == 'separator' else ','
    b = bytearray('\n'.join(mark.join(l) for l in rows).encode())
    if how == 'encoding': b = bytearray(bytes(b).decode().encode(r.choice(['utf-16', 'utf-32', 'utf-16-le'])))
    elif how == 'mark': b = bytearray(b'\xef\xbb\xbf' + b)
    elif how == 'bytes':
        for _ in range(r.choice([1, 1, 20])): b[r.randrange(len(b))] = r.randrange(256)
    elif how == 'cut': b = b[:r.randrange(len(b))]
    elif how == 'noise': k = r.randrange(len(b)); b[k:k] = r.randbytes(r.randrange(1, 99))
    return how, bytes(b)


def chunks(data):
    "(kind, content) of the chunks of a sound PNG"
    at, found = 8, []
    while at < len(data):
        n, kind = struct.unpack_from('>I4s', data, at)
        found.append([kind, data[at+8:at+8+n]]); at += 12 + n
    return found


def spoil_png(r, data, other):
    "A PNG with other bytes; what was done"
    how, b = r.choice(['flip', 'flip', 'many', 'cut', 'grow', 'zero', 'swap', 'empty', 'sealed', 'sealed', 'header', 'header', 'pixels', 'pixels', 'chunk']), bytearray(data)
    at = lambda: r.randrange(len(b)) if r.random() < .5 else r.randrange(60)
    if how == 'flip': b[at()] ^= 1 << r.randrange(8)
    elif how == 'many':
        for _ in range(20): b[at()] = r.randrange(256)
    elif how == 'cut': b = b[:at()]
    elif how == 'grow': b += r.randbytes(r.randrange(1, 99))
    elif how == 'zero': i = at(); b[i:i+16] = bytes(len(b[i:i+16]))
    elif how == 'swap': i, j = sorted((at(), at())); b = b[:8] + b[j:] + b[i:j] + b[8:i]
    elif how == 'empty': b = bytearray()
    else: return how, sealed_png(r, how, chunks(data), chunks(other))
    return how, bytes(b)


def sealed_png(r, how, parts, other):
    "Damage below the checksums"
    if how == 'sealed':
        p = r.choice(parts); b = bytearray(p[1] or b'\0')
        for _ in range(r.choice([1, 1, 9])): b[r.randrange(len(b))] = r.randrange(256)
        p[1] = bytes(b)
    elif how == 'header':
        h = list(struct.unpack('>IIBBBBB', parts[0][1]))
        n = r.randrange(7)
        h[n] = r.choice([0, 1, 63, 65, 4096, 2**20, 2**31 - 1, 2**31, 2**32 - 1]) if n < 2 else r.choice([0, 1, 2, 3, 4, 6, 8, 16, 32, 255])
        parts[0][1] = struct.pack('>IIBBBBB', *h)
    elif how == 'pixels':
        raw = b''.join(c for k, c in parts if k == b'IDAT')
        raw = r.choice([lambda: zlib.compress(zlib.decompress(raw)[:r.randrange(4000)]), lambda: zlib.compress(bytes(10_000_000)), lambda: zlib.compress(r.randbytes(5000)),
                        lambda: raw[:r.randrange(len(raw))], lambda: raw + r.randbytes(20), lambda: r.randbytes(500), lambda: b''])()
        parts = [p for p in parts if p[0] != b'IDAT']; parts[-1:-1] = [[b'IDAT', raw]]
    else:
        k = r.randrange(len(parts)); p = r.choice(parts + other + [[b'acTL', bytes(8)], [b'iCCP', r.randbytes(40)], [b'PLTE', r.randbytes(30)], [b'tRNS', r.randbytes(2)], [b'zTXt', r.randbytes(99)]])
        if r.random() < .4: del parts[k]
        else: parts.insert(k, p)
    return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(c)) + k + c + struct.pack('>I', zlib.crc32(k + c)) for k, c in parts)


class Inputs:
    "Sound inputs, and `try_one(kind, seed)` → (what was done, 'worked' or 'refused'); anything else is raised"
    kinds = dict(folder=.4, table=.3, image=.3)

    def __init__(self, home):
        self.home, self.tests = home, by_path(HERE.parent/'tests/test_folder.py')
        t = pd.read_csv(home/'screen/metadata.csv', keep_default_na=False, na_values=[''])
        kaggle = t[t.site == 1].rename(columns=dict(well_id='id_code'))[['id_code', 'experiment', 'plate', 'well', 'well_type', 'sirna']]
        self.tables = {'metadata.csv': (home/'screen/metadata.csv').read_bytes(),
                       **{f'{n}.csv': kaggle[t.dataset[t.site == 1] == n].to_csv(index=False).encode() for n in ('train', 'test')}}
        pngs = sorted((home/'screen').rglob('*.png'))[:8]
        import cv2
        deep = [cv2.imencode('.png', np.random.default_rng(i).integers(0, 65535, (64, 48), np.uint16))[1].tobytes() for i in range(2)]
        self.pngs = [p.read_bytes() for p in pngs] + deep
        self.work, self.ran = home/f'fuzz{os.getpid()}', home/'ran'
        self.work.mkdir(exist_ok=True)
        build = F.create_screen_model                       # the network of each description is built once
        kept = lru_cache(None)(lambda text, meta: build(**json.loads(text)))
        F.create_screen_model = lambda **kw: kept(json.dumps(kw), torch.empty(0).device.type == 'meta')

    def folder(self, r):
        t, d = self.tests, self.work/'m'
        shutil.rmtree(d, ignore_errors=True); shutil.copytree(self.home/'model', d)
        meant, name = r.random() < .5, r.choice((*F.MODEL_FILES, 'config.json', 'config.json'))
        what = t.spoil_entry(r, d, name) if name.endswith('.json') and r.random() < .7 else t.spoil_bytes(r, d, name, self.ran)
        if meant: t.seal(d)
        return f'{what}{", sealed" if meant else ""}', lambda: F.load_model(d)

    def table(self, r):
        name = r.choice(['metadata.csv', 'metadata.csv', 'train.csv', 'test.csv'])
        d = self.work/name[:-4]
        if not d.exists():
            d.mkdir(); os.symlink(self.home/'screen/images', d/'images')
            if name != 'metadata.csv': (d/'test.csv').write_bytes(self.tables['test.csv']); (d/'train.csv').write_bytes(self.tables['train.csv'])
        how, data = spoil_table(r, self.tables[name])
        (d/name).write_bytes(data)
        return f'{how} {name}', lambda: open_screen(d).shape

    def image(self, r):
        i, j = r.randrange(len(self.pngs)), r.randrange(len(self.pngs))
        how, data = spoil_png(r, self.pngs[i], self.pngs[j])
        def work():
            x = decode_png(data, 'x.png', (32, 32, 8) if r.random() < .3 else None)
            meant = how in ('sealed', 'header', 'pixels', 'chunk')
            if not meant and not np.array_equal(x, decode_png(self.pngs[i])): raise AssertionError('other pixels and no complaint')
        return how, work

    def try_one(self, kind, seed):
        what, work = getattr(self, kind)(random.Random(f'{kind} {seed}'))
        t = self.tests
        t.WATCHED[0] = True
        try: work(); done = 'worked'
        except ScreenError as e:
            done = 'refused'
            if '\n' in str(e) or str(e)[-1] not in '.?': raise AssertionError(f'not one sentence: {str(e)!r}') from e
        finally: t.WATCHED[0] = False
        if t.SEEN: raise AssertionError(f'code or network: {t.SEEN.pop()}')
        if self.ran.exists(): self.ran.unlink(); raise AssertionError('a file of the input ran')
        return what, done


def trial(home, kind, seeds, fd):
    "In a child: try the inputs of these seeds, and write a line for each to `fd`"
    with os.fdopen(fd, 'w', buffering=1) as out:
        inputs = Inputs(home)
        for seed in seeds:
            begun = time.perf_counter()
            out.write(f'{seed}\n')
            try:
                with warnings.catch_warnings(): warnings.simplefilter('ignore'); what, done = inputs.try_one(kind, seed)
            except BaseException as e:
                frames = traceback.extract_tb(e.__traceback__)
                at = next((f for f in frames[::-1] if 'rcic_fastai' in Path(f.filename).parts), frames[-1])
                what, done = f'{type(e).__name__}: {str(e).replace(str(inputs.work), "…")[:200]} ({Path(at.filename).name}, {at.name})', 'other'
            out.write(json.dumps([seed, done, what, time.perf_counter() - begun]) + '\n')


def tried(home, kind, seeds, log):
    "Yields (seed, outcome, what, seconds); a child that hangs or dies is replaced"
    seeds = list(seeds)
    while seeds:
        read, write = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                err = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.dup2(err, 1); os.dup2(err, 2)
                trial(home, kind, seeds, write)
            finally: os._exit(0)
        os.close(write)
        rest, at, limit = b'', None, 60
        while (ready := select.select([read], [], [], limit)[0]) and (data := os.read(read, 1 << 16)):
            *lines, rest = (rest + data).split(b'\n')
            for l in lines:
                if l[:1] != b'[': at, limit = int(l), 2*SECONDS; continue
                _, done, what, seconds = json.loads(l)
                seeds.remove(at)
                yield at, 'other' if seconds > SECONDS else done, what, seconds
        os.close(read)
        if not ready: os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if not seeds: return
        if at not in seeds: raise SystemExit(f'the process that tries inputs ended by itself ({code}): {log.read_text()[-2000:]}')
        seeds.remove(at)
        yield at, 'other', f'the process ended ({code})' if ready else f'no answer in {limit} s', float(limit)


def soak_inputs(
    home, # The folder that `prepare` filled
    cases:int, # How many, divided over the kinds
    seed:int=0, # Of the first case
)->tuple: # (one row a kind, failures)
    "Damaged inputs: worked, refused, or a failure"
    rows, failures = [], []
    for kind, share in Inputs.kinds.items():
        n, count, slowest, begun = round(cases*share), collections.Counter(), 0, time.perf_counter()
        for s, done, what, seconds in tried(home, kind, range(seed, seed + n), home/'fuzz.log'):
            count[done] += 1; slowest = max(slowest, seconds)
            if done == 'other': failures.append(f'{kind}, seed {s}: {what}')
        rows.append(dict(kind=kind, cases=n, **{k: count[k] for k in ('worked', 'refused', 'other')}, slowest_seconds=round(slowest, 2),
                         seconds=round(time.perf_counter() - begun, 1)))
    return rows, failures


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(kills=100, fuzz=10000, seed=0).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--dry', action='store_true', help='store nothing')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as home:
        kills, wrong = soak_kills(Path(home), a.kills, a.seed)
        print(pd.DataFrame(kills).to_string(index=False), flush=True)
        inputs, more = soak_inputs(Path(home), a.fuzz, a.seed)
        print(pd.DataFrame(inputs).to_string(index=False))
    failures = alike(wrong + more)
    print('\n'.join(failures) or 'no failure')
    if a.dry: print(json.dumps(dict(kills=kills, inputs=inputs, failures=failures)))
    else: save('soak', seed=a.seed, kills=kills, inputs=inputs, failures=failures, met=not failures)
    return bool(failures)


if __name__ == '__main__': sys.exit(main())
