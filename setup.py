"Packaging: everything that changes is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')}
repository = f"https://github.com/{cfg['user']}/{cfg['repo']}"
extras['dev'] += extras['lite'] + extras['hcs']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], keywords=cfg['keywords'].split(), license='Apache-2.0',
    project_urls=dict(Documentation=cfg['doc_url'].format_map(cfg), Source=repository,
                      Changelog=f"{repository}/blob/{cfg['branch']}/CHANGELOG.md"),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['rcic_fastai', 'rcic_fastai.*']),
    package_data={'rcic_fastai': ['tables/*.csv'], 'rcic_fastai.results': ['explore.html', 'explore.css', 'explore.js']}, zip_safe=False,
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Natural Language :: English', 'Topic :: Scientific/Engineering :: Image Recognition']
                + [f'Programming Language :: Python :: 3.{v}' for v in range(11, 14)],
)
