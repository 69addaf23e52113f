"""Draw each site of simulated screens once in a run of all notebooks, or of all tests.

Their screens have wells in common. What a site looks like depends on its place, its perturbation and what the camera of its
experiment was set by, and on nothing else of its screen (tests/test_simulate.py). So it is drawn the first time, and read
from a folder afterwards. The folder is of one run: it never holds what other code has drawn.
"""
import hashlib, importlib.abc, importlib.util, os, pickle, sys, tempfile
from functools import partial
from pathlib import Path

LAYOUT = 'rcic_fastai.screen.simulate.layout'


def kept(folder, key, make):
    "Return what `make` returned for this key, now or earlier, in this process or in another one with the same folder"
    path = Path(folder)/hashlib.sha256(repr(key).encode()).hexdigest()
    if path.exists(): return pickle.loads(path.read_bytes())
    made = make()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as f: f.write(pickle.dumps(made))
    os.replace(f.name, path)
    return made


def _site(folder, settings, studio, *where):
    return kept(folder, ('site', *where, *settings), lambda: type(studio).site(studio, *where))


def kept_studio(Studio, folder, experiments, *settings):
    "Return `Studio(experiments, *settings)`, whose calibrated cameras and drawn sites are kept in the folder"
    studio = Studio((), *settings)
    studio.cameras = {e: kept(folder, ('camera', e, *settings), lambda: Studio((e,), *settings).cameras[e]) for e in experiments}
    studio.site = partial(_site, folder, settings, studio)
    return studio


class KeepDrawn(importlib.abc.MetaPathFinder):
    "Let the module that draws screens take a `kept_studio`, as soon as it is imported"
    def __init__(self, folder): self.folder = folder

    def find_spec(self, name, path, target=None):
        if name != LAYOUT: return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.Studio = partial(kept_studio, module.Studio, self.folder)
        spec.loader.exec_module = exec_module
        return spec
