"""What settings.ini requires, one requirement a line, for uv to resolve.

    python tools/lock.py             what `make` installs and `make lock` resolves
    python tools/lock.py lowest      what `make test-lowest` resolves, with the lowest versions of all that is named
    python tools/lock.py extras      what `make test-extras` resolves: all of the first, and the packages of the extras
    python tools/lock.py check FILE  fails where FILE, a resolution, has another version than the lower bound
"""
import re, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
# fastai requires torchvision, and torch decides which: named here so that both are the lowest
TORCHVISION = 'torchvision>=0.21'


def settings():
    "The section of settings.ini."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def requirements(*extras):
    "Requirements of the library and of `extras`."
    cfg = settings()
    return [r for part in ('requirements', *(f'{e}_requirements' for e in extras)) for r in cfg[part].split()]


def extras():
    "Names of all extras."
    return [k.removesuffix('_requirements') for k in settings() if k.endswith('_requirements')]


def build_system():
    "What setup.py needs."
    return tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['build-system']['requires']


def name(requirement):
    "Name of the distribution that is required, as PyPI writes it in addresses."
    return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


def lowest():
    "All requirements; of what the library itself requires, a developer's pin of the same is left out."
    core = requirements()
    pinned = [r for r in requirements(*extras()) if '==' in r and name(r) in map(name, core)]
    return [r for r in requirements(*extras()) if r not in pinned] + [TORCHVISION] + build_system()


def check(path):
    "Lines about every requirement that is not at its lower bound in a resolution."
    got = dict(re.findall(r'^([\w.-]+)==([^\s;]+)', Path(path).read_text(), re.MULTILINE))
    bound = {name(r): re.search(r'[>=]=([\w.]+)', r)[1] for r in lowest()}
    parts = lambda v: re.sub(r'(\.0)+$', '', v)
    return [f'{n}>={low}, but the lowest that goes with the others is {got[n]}: raise it'
            for n, low in bound.items() if parts(got[n]) != parts(low)]


def main(what='lock', path=None):
    if what == 'check': sys.exit('\n'.join(check(path)) or None)
    lines = dict(lock=lambda: requirements('dev', 'lite', 'hcs') + ['setuptools', 'wheel'], lowest=lowest,
                 extras=lambda: requirements(*extras()) + ['setuptools', 'wheel'])
    print('\n'.join(lines[what]()))


if __name__ == '__main__': main(*sys.argv[1:])
