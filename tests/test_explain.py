"Which stain decided: shares that sum up, a channel that the network cannot see, any number of channels, wells of several sites"
import numpy as np, pytest, torch
from helpers import learner, refused
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.results.explain import integrated_gradients
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.screen import Screen

pytestmark = pytest.mark.usefixtures('close_figures')


class Repeated(ImageSource):
    "`n` channels: those of a screen, which begin again after the last"
    def __init__(self, screen, n):
        super().__init__(screen.source.root, screen.table, [f'c{i}' for i in range(n)])
        self.source, self.shape, self.dtype = screen.source, (n, *screen.source.shape[1:]), screen.source.dtype
    def _read(self, site_id, out): out[...] = self.source[site_id][np.arange(len(self.channels)) % 6]


def trained(screen, **kwargs):
    return learner(screen_dls(screen, valid='none', bs=8, device='cpu', **kwargs)).to_model(tta=1, progress=False)


@pytest.mark.parametrize('channels', [4, 5, 6, 8])
def test_shares_sum_to_the_score(screen, channels):
    screen = Screen(screen.table, Repeated(screen, channels))
    model = trained(screen)
    wells = screen.wells.well_id[:3]
    why = model.explain(screen, wells, label=model.spec.labels[0], steps=96)
    names = list(screen.channels)
    gained = why.table[names].sum(axis=1)
    np.testing.assert_allclose(gained, why.table.score - why.table.baseline, atol=.02)
    assert why.maps.shape[1] == channels and len(why) == screen.table.well_id.isin(wells).sum()
    assert len([ax for ax in why.show(0).axes if ax.images]) == channels + 1


def test_the_score_is_that_of_the_embedding(screen):
    from rcic_fastai.embed.table import emb_features, unit_rows
    model, well = trained(screen), screen.wells.well_id[0]
    label = model.spec.labels[1]
    why = model.explain(screen, well, label=label, steps=1)
    emb = model.embed(screen[screen.table.well_id == well], tta=1, progress=False)
    means = {n: unit_rows(emb_features(model.index.table()[model.index.labels.sirna == n])).mean(0) for n in model.spec.labels}
    means = {n: m/np.linalg.norm(m) for n, m in means.items()}
    direction = means[label] - np.mean(list(means.values()), axis=0)
    np.testing.assert_allclose(why.table.score, unit_rows(emb_features(emb)) @ direction, atol=1e-4)


def test_a_channel_that_is_not_seen_gets_nothing(screen):
    model = trained(screen)
    stem = next(m for m in model.model.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad(): stem.weight[:, 2] = 0
    t = model.explain(screen, screen.wells.well_id[:2], steps=4).table
    assert (t[screen.channels[2]] == 0).all() and (t[list(screen.channels)].abs().sum(axis=1) > 0).all()


def test_wells_of_two_sites(screen):
    model = trained(screen, sites=2)
    why = model.explain(screen, screen.wells.well_id[:2], label=model.spec.labels[0], steps=32)
    assert len(why) == 2 and why.maps.shape[-1] == 2*why.maps.shape[-2]
    np.testing.assert_allclose(why.table[list(screen.channels)].sum(axis=1), why.table.score - why.table.baseline, atol=.05)
    assert len(why.show(1).axes)


def test_shares_agree_with_a_slow_reference():
    "A sum over many points on the line, each gradient by finite differences"
    torch.manual_seed(0)
    x, w = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    score = lambda x: torch.tanh((x*w).sum((1, 2, 3)))
    shares, *_ = integrated_gradients(score, x, 200)
    base = x.mean((-2, -1), keepdim=True).expand_as(x)
    slow, e = torch.zeros_like(x), 1e-5
    for k in range(50):
        at = base + (k + .5)/50*(x - base)
        for i in np.ndindex(*x.shape):
            d = torch.zeros_like(x)
            d[i] = e
            slow[i] += (score(at + d) - score(at - d))[0]/(2*e)/50
    np.testing.assert_allclose(shares, slow*(x - base), atol=2e-4)


def test_what_cannot_be_explained_is_one_sentence(screen):
    model = trained(screen)
    refused(lambda: model.explain(screen, 'Z99'), 'has no well Z99')
    refused(lambda: model.explain(screen, screen.wells.well_id[0], label='none of them'), 'did not learn none of them')
