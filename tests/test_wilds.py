"""WILDS: its split and its scores, against a plain loop.

Both were compared once with the package `wilds` 2.0.0 itself (`RxRx1Dataset.split_array` and `.eval` on a toy screen of
eight experiments): the split is equal, and no accuracy differs by more than its 32 bits do."""
import numpy as np, pandas as pd, pytest
from helpers import refused, simulate_screen
from rcic_fastai import cli
from rcic_fastai.embed.table import emb_metadata, toy_profiles
from rcic_fastai.results.wilds import WILDS_PARTS, wilds_parts, wilds_scores
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.tables import WILDS_VAL, wilds_split

TABLE = emb_metadata(toy_profiles(('HUVEC-01', 'RPE-01', 'U2OS-01'), ('HUVEC-17', 'U2OS-04', 'HUVEC-18', 'RPE-09'), n_sirnas=12))


def guesses(rows, share=.4, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(id_code=rows.site_id.to_numpy(), sirna=np.where(rng.random(len(rows)) < share, rows.sirna, rng.permutation(rows.sirna))))


def part_of(site):
    "The split in words: its site for training experiments, four experiments for validation"
    if site.experiment in WILDS_VAL: return 'val'
    if site.dataset == 'test': return 'test'
    return 'train' if site.site == 1 else 'id_test'


@pytest.mark.parametrize('table', [TABLE, wilds_split(TABLE)])
def test_parts(table):
    parts = wilds_parts(table)
    assert all(parts[s.site_id] == part_of(s) for s in TABLE.itertuples())


@pytest.mark.parametrize('seed', range(5))
def test_scores_are_the_loop(seed):
    pred = guesses(TABLE, seed=seed).sample(frac=1, random_state=seed)
    named, count = dict(zip(pred.id_code, pred.sirna)), {}
    for s in TABLE.itertuples():
        for group in ('all', s.cell_type):
            right, n = count.get((part_of(s), group), (0, 0))
            count[part_of(s), group] = right + (named[s.site_id] == s.sirna), n + 1
    scores = wilds_scores(pred, TABLE)
    assert scores.part.unique().tolist() == list(WILDS_PARTS)
    for r in scores.itertuples():
        if r.group == 'worst': assert r.accuracy == min(a/n for (p, g), (a, n) in count.items() if p == r.part and g != 'all')
        else:
            right, n = count[r.part, r.name or 'all']
            assert (r.accuracy, r.sites) == (pytest.approx(right/n, abs=1e-12), n)


def test_controls_count():
    "Naming all treatments and no control is not perfect"
    right = TABLE.assign(sirna=TABLE.sirna.where(TABLE.well_type == 'treatment', TABLE.sirna[TABLE.well_type == 'treatment'].iloc[0]))
    scores = wilds_scores(right.rename(columns=dict(site_id='id_code'))[['id_code', 'sirna']], TABLE)
    share = (TABLE[[part_of(s) == 'test' for s in TABLE.itertuples()]].well_type == 'treatment').mean()
    assert scores[(scores.part == 'test') & (scores.group == 'all')].accuracy.item() == pytest.approx(share) and share < 1


def test_half_a_part_is_no_result():
    pred = guesses(TABLE[TABLE.experiment == 'HUVEC-18'])
    refused(lambda: wilds_scores(pred, TABLE), 'of test are not predicted')
    assert wilds_scores(pred, TABLE, partial=True).sites[0] == len(pred)


def test_a_screen_is_packed_with_the_split(tmp_path, capsys):
    simulate_screen(tmp_path/'screen', ['HUVEC-01', 'HUVEC-16', 'HUVEC-17', 'HUVEC-18'], sirnas=4, size=32, plates=1, controls=1, progress=False)
    assert cli.rcic_pack(f'{tmp_path}/screen {tmp_path}/w.zarr --split wilds'.split()) == 0
    packed, plain = open_screen(tmp_path/'w.zarr').table, open_screen(tmp_path/'screen').table
    assert {s.site_id: s.dataset for s in packed.itertuples()} == {s.site_id: part_of(s) for s in plain.itertuples()}
    assert set(packed.dataset) == {'train', 'id_test', 'val', 'test'}
    assert cli.rcic_pack(f'{tmp_path}/screen {tmp_path}/k.zarr --split kaggle'.split()) == 2
    assert '--split kaggle is not known: choose from wilds.' in capsys.readouterr().err
