"""What some tests need beyond the requirements.

`@pytest.mark.real('metadata')` or `real('images')`: RxRx1's own files. They are skipped, with the places that were looked
at, where `real_data` finds none.

`@pytest.mark.extra('anndata')`: a package that no requirement brings. They are skipped where it is not installed;
`pytest --extras` runs them alone, and a missing package fails them.
"""
import gc, os
from importlib.util import find_spec
import pytest


@pytest.fixture(scope='session')
def screen(tmp_path_factory):
    "A small screen of three experiments; a file that needs another one defines its own"
    from rcic_fastai.screen.open import open_screen
    from helpers import simulate_screen
    path = tmp_path_factory.mktemp('three')/'screen'
    simulate_screen(path, ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'], sirnas=8, size=32, plates=1, controls=0, progress=False)
    return open_screen(path)


@pytest.fixture(scope='session', autouse=True)
def sites_drawn_once(tmp_path_factory):
    "Sites of simulated screens are kept for all tests of a run, in a folder that the workers of pytest-xdist share"
    import helpers
    base = tmp_path_factory.getbasetemp()
    helpers.DRAWN = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'drawn'
    helpers.DRAWN.mkdir(exist_ok=True)


@pytest.fixture(scope='session', autouse=True)
def curves_drawn_once():
    "Every command that trains draws its curves: one history of each kind is drawn, the others become empty pictures"
    import matplotlib.pyplot as plt
    from rcic_fastai import workflow
    draw, seen = workflow.training_curve, set()
    def training_curve(history):
        kind = tuple(history), len(history) > 1
        if kind in seen: return plt.figure(figsize=(1, 1))
        seen.add(kind)
        return draw(history)
    workflow.training_curve = training_curve
    yield
    workflow.training_curve = draw


@pytest.fixture
def close_figures():
    "Close all figures at the end; use it with `pytestmark`"
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


def pytest_addoption(parser):
    parser.addoption('--extras', action='store_true', help='run the tests marked `extra` only, and skip none of them')


def pytest_configure(config):
    config.addinivalue_line('markers', 'real(part): needs the metadata or the images of RxRx1 itself')
    config.addinivalue_line('markers', 'extra(package): needs a package that no requirement brings')


def why_not_real(part):
    "Why a test that needs RxRx1's tables or images cannot run; None where it can"
    from rcic_fastai.screen.tables import _real_places, real_data
    if real_data(part): return None
    places = ', '.join(map(str, _real_places())) or 'no place, as this is no checkout'
    return f'no {part} of RxRx1 on this machine (looked in {places}; name a folder with RCIC_REAL)'


def why_not_extra(package): return None if find_spec(package) else f'{package} is not installed (make test-extras)'


def skip_reasons(item):
    "Why a test cannot run here, a sentence for each thing that it lacks"
    reasons = [why_not_real(*m.args) for m in item.iter_markers('real')]
    if not item.config.getoption('--extras'): reasons += [why_not_extra(*m.args) for m in item.iter_markers('extra')]
    return [r for r in reasons if r]


def pytest_collection_finish():
    "What was imported stays: the garbage collector need not walk over it again and again"
    gc.collect()
    gc.freeze()


def pytest_unconfigure(): gc.unfreeze()


def pytest_collection_modifyitems(config, items):
    if config.getoption('--extras'):
        config.hook.pytest_deselected(items=[i for i in items if not i.get_closest_marker('extra')])
        items[:] = [i for i in items if i.get_closest_marker('extra')]
    for item in items:
        for reason in skip_reasons(item): item.add_marker(pytest.mark.skip(reason=reason))

@pytest.fixture(scope='session')
def with_controls(tmp_path_factory):
    "Folder of a small screen with controls"
    from helpers import simulate_screen
    folder = tmp_path_factory.mktemp('controls')/'screen'
    simulate_screen(folder, ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, plates=1, controls=1, progress=False)
    return folder
