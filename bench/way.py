"""The way from `rcic_predict --protocol adapted` to the changed BatchNorm layer: functions, modules and changes of file on it.

    python bench/way.py

The way is the stack of calls at the moment when `adapted_batchnorm` begins: what a reader follows who asks where AdaBN happens.
Beside it, all functions of the library that ran until then."""
import argparse, contextlib, io, json, sys, tempfile
from pathlib import Path
from machine import save
import rcic_fastai
from rcic_fastai import cli
from rcic_fastai.model import batchnorm

HOME = Path(rcic_fastai.__file__).parent

def module_of(frame):
    "Return the module of the library that a frame runs in, or None"
    file = Path(frame.f_code.co_filename)
    return str(file.relative_to(HOME).with_suffix('')).replace('/', '.') if HOME in file.parents else None

class Watch:
    "Record the functions of the library until AdaBN begins, and the stack at that moment"
    def __init__(self): self.ran, self.stack = [], None
    def __call__(self, frame, event, arg):
        if event != 'call' or self.stack: return
        module = module_of(frame)
        if module is None: return
        self.ran.append((module, frame.f_code.co_name))
        if frame.f_code is batchnorm.adapted_batchnorm.__wrapped__.__code__: self.stack = stack_of(frame)

def stack_of(frame):
    "Return (module, function) of every frame of the library, the outermost first"
    found = []
    while frame:
        if module_of(frame): found.append((module_of(frame), frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]

def changes(way): return sum(a[0] != b[0] for a, b in zip(way, way[1:]))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dry', action='store_true', help='print only')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        Path(d, 'none.json').write_text(json.dumps(dict(name='none', arch='mobilenetv3_small_050', stages=[])))
        watch = Watch()
        with contextlib.redirect_stdout(io.StringIO()):
            for line in ('simulate {d}/screen --experiments HUVEC-01,HUVEC-17 --sirnas 8 --size 64 --controls 0 --workers 1',
                         'train {d}/screen {d}/model --recipe {d}/none.json --valid none --pretrained no --tta 1'):
                command, *rest = line.format(d=d).split()
                if getattr(cli, f'rcic_{command}')(rest): raise SystemExit(f'rcic_{command} failed')
            sys.setprofile(watch)
            code = cli.rcic_predict(f'{d}/model {d}/screen {d}/a.csv --tta 1 --protocol adapted'.split())
            sys.setprofile(None)
    if code or not watch.stack: raise SystemExit('rcic_predict did not reach AdaBN')
    way, once = watch.stack, list(dict.fromkeys(watch.ran))
    for module, name in way: print(f'{module:24s} {name}')
    figures = dict(functions=len(way), modules=len({m for m, _ in way}), changes_of_file=changes(way),
                   ran=len(once), ran_in_modules=len({m for m, _ in once}), ran_changes=changes(once))
    print(figures)
    if not args.dry: save('way', **figures, way=[f'{m}.{n}' for m, n in way])

if __name__ == '__main__': main()
