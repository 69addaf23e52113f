"Screens in memory: the same batches and the same model as from the packed screen, for both bit depths, sites and wells."
import copy

import numpy as np
import pytest
import torch
from fastai.torch_core import no_random
from helpers import simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.batch.resident import ResidentSource, check_memory
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.screen import Screen
from rcic_fastai.train.learner import compile_model, screen_learner
from rcic_fastai.train.recipes import Recipe, Stage
from rcic_fastai.workflow import train_screen

TINY = Recipe('tiny', [Stage('all', 1, 1e-3, cutmix=.5)], arch='test_resnet')


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resident')
    simulate_screen(folder/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01'], sirnas=8, size=48, controls=1, progress=False)
    return open_screen(pack_screen(open_screen(folder/'screen'), folder/'screen.zarr', progress=False))


class Deep(ImageSource):
    "The sites of a screen with 16 bits"
    shape, dtype = (6, 48, 48), np.dtype(np.uint16)
    def __init__(self, source, table):
        super().__init__(source.root, table, source.channels)
        self.of = source
    def _read(self, site_id, out): out[...] = self.of[site_id].astype(np.uint16)*257
    def missing(self): return self.of.missing()


def batches(screen, **kwargs):
    dls = screen_dls(screen, valid='HUVEC-02', bs=8, seed=3, device='cpu', **kwargs)
    with no_random(0): return [b for _ in range(2) for b in dls.train] + list(dls.valid)


@pytest.mark.parametrize('deep', [False, True], ids=['8 bits', '16 bits'])
@pytest.mark.parametrize('how', [{}, dict(sites=2), dict(clahe=True), dict(norm='plate'), dict(norm='global'), dict(size=32),
                                 dict(num_workers=2), dict(batch_by='experiment')], ids=str)
def test_batches_are_the_same(packed, how, deep):
    if deep and how.get('clahe'): pytest.skip('CLAHE of 16 bits is tested elsewhere')
    screen = Screen(packed.table, Deep(packed.source, packed.table)) if deep else packed
    plain = {k: v for k, v in how.items() if k != 'num_workers'}
    for a, b in zip(batches(screen, **plain), batches(screen.resident('cpu', progress=False), **how), strict=True):
        for u, v in zip(a, b, strict=True):
            assert type(u) is type(v) and u.dtype == v.dtype
            assert torch.equal(u.as_subclass(torch.Tensor), v.as_subclass(torch.Tensor))


def test_a_batch_does_not_change_what_is_held(packed):
    held = ResidentSource(packed, 'cpu', progress=False)
    ids = packed.table.site_id.tolist()[:4]
    held.take(ids).zero_()
    assert np.array_equal(held[ids[0]], packed.source[ids[0]])


def test_pixels_are_shared_by_parts_of_a_screen(packed):
    held = packed.resident('cpu', progress=False)
    for part in (held.source.restrict(held.table[:5]), copy.copy(held.source)):
        assert part._pixels.data_ptr() == held.source._pixels.data_ptr()
    few = held.source.restrict(held.table[:5])
    with pytest.raises(ScreenError, match='is not in the table'): few.take([held.table.site_id.iloc[7]])


def test_an_exported_learner_holds_no_pixels(packed, tmp_path):
    learn = screen_learner(screen_dls(packed.resident('cpu', progress=False), valid='none', bs=8, device='cpu'), 'test_resnet', pretrained=None, emb_dim=16)
    plain = screen_learner(screen_dls(packed, valid='none', bs=8, device='cpu'), 'test_resnet', pretrained=None, emb_dim=16)
    sizes = []
    for n, one in enumerate((learn, plain)):
        one.path = tmp_path
        one.export(f'{n}.pkl')
        sizes.append((tmp_path/f'{n}.pkl').stat().st_size)
    assert sizes[0] - sizes[1] < learn.dls.screen.source._pixels.nbytes/2


def test_training_gives_the_same_model(packed, tmp_path):
    made = [train_screen(packed, tmp_path/str(r), TINY, valid='none', pretrained='no', tta=1, resident=r) for r in (False, True)]
    assert made[0].fingerprint == made[1].fingerprint


def test_what_does_not_fit_is_said_before_reading(packed, monkeypatch):
    class Unread(Deep):
        def _read(self, site_id, out): raise AssertionError('a picture was read')
    monkeypatch.setattr('rcic_fastai.batch.resident._free_memory', lambda device: 10**5)
    with pytest.raises(ScreenError, match=r'need \d+\.\d GB and cpu has 0\.0 GB free: .*size=256'):
        Screen(packed.table, Unread(packed.source, packed.table)).resident('cpu')
    monkeypatch.setattr('rcic_fastai.batch.resident._free_memory', lambda device: None)
    check_memory(10**12, (6, 512, 512), np.uint8, torch.device('cpu'))


def test_a_compiled_model_trains_and_keeps_its_names(packed, tmp_path, monkeypatch):
    with pytest.raises(ScreenError, match='pays on a GPU only'): train_screen(packed, tmp_path/'m', TINY, pretrained='no', compile=True)
    learn = screen_learner(screen_dls(packed, valid='none', bs=8, device='cpu'), 'test_resnet', pretrained=None, emb_dim=16, metadata=['cell_type'])
    monkeypatch.setattr('rcic_fastai.train.learner.default_device', lambda: torch.device('cuda'))
    names = list(learn.model.state_dict())
    compile_model(learn.model, backend='eager')            # traced, not translated: that takes minutes
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(TINY)
    assert list(learn.model.state_dict()) == names
    assert learn.to_model().save(tmp_path/'compiled').is_dir()
