"Prints what settings.ini requires for `make`, one requirement a line: what `make lock` resolves."
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
parts = ['requirements', *(f'{extra}_requirements' for extra in ('dev', 'lite', 'hcs'))]
print('\n'.join([r for part in parts for r in ini['DEFAULT'][part].split()] + ['setuptools', 'wheel']))
