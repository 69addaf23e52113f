"From plates to hits: foreign profiles, hits against loops and copairs, what must not matter, corrections that are chosen, mistakes."
import json, sys
import numpy as np, pandas as pd, pytest
from rcic_fastai import cli
from rcic_fastai.core import ScreenError
from rcic_fastai.embed.choose import CANDIDATES, choose_correction, try_corrections
from rcic_fastai.embed.correct import CORRECTIONS
from rcic_fastai.embed.hits import MEASURES, activity, find_hits, hit_notes, write_hits
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.metrics import energy_distance, map_significance, precision_null, retrieval_map
from rcic_fastai.embed.profiles import read_profiles, without_gaps
from rcic_fastai.embed.table import emb_features, emb_metadata, make_emb_table, merge_sites, toy_profiles, write_profiles
from rcic_fastai.predict.profiles import write_any_profiles
from rcic_fastai.results.plots import embedding_map
from rcic_fastai.screen.tables import rowcol_to_well
from helpers import refused

def profiles(compounds=6, active=2, doses=(1, 3, 10), plates=4, dmso=8, length=12., seed=0):
    "A table as CellProfiler's: plates of two batches, each with DMSO and all compounds at all doses"
    rng, rows = np.random.default_rng(seed), []
    effect = rng.normal(size=(compounds, 10))*length/10**.5
    effect[active:] = 0
    for p in range(plates):
        shift = rng.normal(size=10)*5
        wells = [('DMSO', None)]*dmso + [(f'C{c}', d) for c in range(compounds) for d in doses]
        for w, (name, d) in enumerate(wells):
            x = shift + rng.normal(size=10) + (0 if d is None else effect[int(name[1:])]*d/(3 + d))
            rows.append((f'B{p % 2}', f'P{p}', rowcol_to_well(w//24, w % 24), name, d, *x))
    return pd.DataFrame(rows, columns=[f'Metadata_{c}' for c in ('Batch', 'Plate', 'Well', 'pert_iname', 'dose')] + [f'Cells_x{i}' for i in range(10)])

TABLE = profiles()
HOW = dict(controls='DMSO', target='sirna+dose', n_null=199, progress=False)
HITS = find_hits(TABLE, **HOW)

# ---- foreign profiles

def test_a_table_of_another_program_is_an_embeddings_table(tmp_path):
    "Search, pictures, metrics, corrections: none knows where it came from"
    emb = read_profiles(TABLE, controls='DMSO')
    np.testing.assert_allclose(emb_features(emb), TABLE.filter(like='Cells_').to_numpy(np.float32))
    assert EmbeddingIndex(emb).search(emb_features(emb)[:3], 1)[1][:, 0].tolist() == [0, 1, 2]
    assert retrieval_map(emb)[0]['n_sirnas'] == 6
    assert len(embedding_map(emb, 'experiment', 'sirna').axes) >= 2
    for method in ('center', 'standardize', 'sphere', 'tvn'):
        assert set(CORRECTIONS[method]().fit_transform(emb).Metadata_protocol) == {'adapted'}
    assert len(read_profiles(write_profiles(emb, tmp_path/'p.parquet'))) == len(emb)

@pytest.mark.parametrize('ending', ['csv', 'csv.gz', 'parquet'])
def test_forms_of_file(tmp_path, ending):
    f = tmp_path/f'p.{ending}'
    TABLE.to_parquet(f) if ending == 'parquet' else TABLE.to_csv(f, index=False)
    got, want = read_profiles(f, controls='DMSO'), read_profiles(TABLE, controls='DMSO')
    np.testing.assert_allclose(emb_features(got), emb_features(want), rtol=1e-6)
    pd.testing.assert_frame_equal(emb_metadata(got)[['well_id', 'well_type', 'sirna', 'experiment']], emb_metadata(want)[['well_id', 'well_type', 'sirna', 'experiment']])

def test_gaps_and_constants_are_left_out_and_said(capsys):
    t = TABLE.assign(Cells_gap=[np.nan]*60 + [*range(len(TABLE) - 60)], Cells_same=1., ImageNumber=range(len(TABLE)))
    emb = read_profiles(t, controls='DMSO')
    assert emb.attrs['features'] == [f'Cells_x{i}' for i in range(10)]
    said = capsys.readouterr().out
    assert 'Cells_gap' in said and 'Cells_same' in said

def test_sites_become_wells():
    sites = pd.concat([TABLE.assign(Metadata_Site=1), TABLE.assign(Metadata_Site=2, Cells_x0=TABLE.Cells_x0 + 2)])
    emb = read_profiles(sites, controls='DMSO')
    assert len(emb) == len(TABLE) and (emb.Metadata_n_sites == 2).all()
    np.testing.assert_allclose(emb_features(emb)[:, 0], TABLE.Cells_x0 + 1, rtol=1e-5)

@pytest.mark.parametrize('make, words', [
    (lambda t: read_profiles(t.assign(Metadata_gene='x'), controls='DMSO'), ['Metadata_pert_iname', 'Metadata_gene', 'both mean sirna']),
    (lambda t: read_profiles(t.assign(Cells_x1='high')), ["'high'", 'no number']),
    (lambda t: read_profiles(t.drop(columns='Metadata_Well')), ['no column for the well']),
    (lambda t: read_profiles(t, columns=dict(plate='Barcode')), ['no column Barcode']),
    (lambda t: read_profiles(t.rename(columns=lambda c: c.removeprefix('Metadata_'))), ['begins with Metadata_']),
    (lambda t: find_hits(t, **{**HOW, 'controls': ''}), ['no negative control']),
    (lambda t: find_hits(t, **{**HOW, 'target': 'drug'}), ['drug', 'no column']),
    (lambda t: find_hits(t, **{**HOW, 'measure': 'cosine'}), ['energy', 'map']),
    (lambda t: find_hits(t, **{**HOW, 'correct': 'whiten'}), ['auto', 'standardize']),
    (lambda t: find_hits(t.assign(Metadata_dose='low'), **HOW), ["'low'", 'one unit']),
    (lambda t: find_hits(t[t.Metadata_Plate == 'P0'], **HOW), ['No perturbation has two wells'])])
def test_mistakes_are_one_sentence(make, words): refused(lambda: make(TABLE), *words)

def test_a_control_in_another_spelling_is_asked_for():
    with pytest.raises(ScreenError, match='controls names dmso, .* did you mean DMSO'): find_hits(TABLE, **{**HOW, 'controls': 'dmso'})

# ---- hits

def test_what_acts_is_found_and_nothing_else():
    assert set(HITS.sirna[HITS.hit]) == {'C0', 'C1'} and set(HITS.sirna[HITS.trend_q <= .05]) == {'C0', 'C1'}
    found = HITS.drop_duplicates('sirna').set_index('sirna')
    assert (found.loc[['C0', 'C1'], 'ec50'].between(1, 10)).all() and (HITS.q >= HITS.p - 1e-12).all()

def test_energy_is_that_of_centered_wells():
    "Against a loop: the mean of the compared wells of each plate is subtracted"
    rng = np.random.default_rng(0)
    x, plate, treated = rng.normal(size=(12, 3)), np.repeat([0, 1, 2], 4), np.tile([True, False, False, False], 3)
    z = x.copy()
    for p in range(3): z[plate == p] -= x[plate == p].mean(0)
    got = activity(x, plate, treated, 'energy', 9)
    assert got['activity'] == pytest.approx(energy_distance(z[treated], z[~treated])) and got['floor'] == .1

@pytest.mark.parametrize('measure', MEASURES)
def test_what_must_not_matter(measure):
    "The order of rows, the origin of each plate, the unit of each number"
    how = {**HOW, 'measure': measure, 'n_null': 49}
    a = find_hits(TABLE, **how)
    cells = [c for c in TABLE if c.startswith('Cells_')]
    other = TABLE.copy()
    other[cells] = (TABLE[cells] + 7*TABLE.Metadata_Plate.str[1:].astype(int).to_numpy()[:, None])*np.geomspace(.01, 100, len(cells))
    b = find_hits(other.sample(frac=1, random_state=0), **how)
    key = ['sirna', 'dose']
    pd.testing.assert_frame_equal(a.sort_values(key, ignore_index=True)[[*key, 'activity', 'p', 'q', 'hit']],
                                  b.sort_values(key, ignore_index=True)[[*key, 'activity', 'p', 'q', 'hit']], rtol=1e-3)

@pytest.mark.parametrize('measure', MEASURES)
def test_p_values_are_those_of_chance_when_nothing_acts(measure):
    p = np.concatenate([find_hits(profiles(active=0, doses=(1,), compounds=20, dmso=4, seed=s), **{**HOW, 'measure': measure, 'n_null': 99}).p for s in range(5)])
    assert .01 < (p <= .1).mean() < .2 and (p <= .5).mean() == pytest.approx(.5, abs=.15)

def test_a_perturbation_with_one_well_is_left_out_and_counted():
    rare = TABLE.Metadata_pert_iname.eq('C5') & TABLE.Metadata_dose.eq(10) & (TABLE.Metadata_Plate != 'P0')
    found = find_hits(TABLE[~rare], **HOW)
    assert len(found) == 17 and found.attrs['left_out'] == 1 and any('single well' in n and 'C5 10' in n for n in found.attrs['notes'])

def test_wells_that_were_trained_on_are_said():
    found = find_hits(TABLE.assign(Metadata_trained=TABLE.Metadata_Plate.eq('P0')), **HOW)
    assert any('were trained on (Metadata_trained)' in n and n.startswith('26 of 104') for n in found.attrs['notes'])
    assert not any('trained' in n for n in HITS.attrs['notes'])


def test_hits_of_trained_wells_say_which_profiles_to_search_instead():
    "A model makes the wells that it learned differ from controls without an effect, so the advice is to leave them out"
    m = pd.DataFrame(dict(experiment=['B1', 'B2', 'B3', 'B3'], trained=[True, True, False, False]))
    table = pd.DataFrame(dict(floor=[.001]))
    assert 'hits may be false: embed only the experiments that it did not learn (B3).' in hit_notes(m, table, table[:0], .05)[0]
    everything = hit_notes(m[:2], table, table[:0], .05)[0]
    assert 'experiments that it did not' not in everything and 'recipe features' in everything

def test_few_controls_are_said_and_more_shuffles_are_made_where_needed():
    weak = find_hits(profiles(dmso=1, plates=2), **HOW)
    assert any('cannot reach' in n for n in weak.attrs['notes']) and not weak.hit.any()
    many = find_hits(TABLE, **{**HOW, 'n_null': 19})
    assert many.p.min() < 1/20 and set(many.sirna[many.hit]) == {'C0', 'C1'}

def test_positive_controls_are_measured_too():
    found = find_hits(TABLE, **{**HOW, 'controls': dict(negative_control=['DMSO'], positive_control=['C0'])})
    assert found.hit[(found.sirna == 'C0') & (found.dose == 10)].all()

def test_the_command_writes_table_picture_and_record(tmp_path, capsys):
    TABLE.assign(Metadata_pert_iname=TABLE.Metadata_pert_iname.replace('C0', '=C0')).to_csv(tmp_path/'p.csv', index=False)
    words = [str(tmp_path/'p.csv'), str(tmp_path/'hits.csv'), '--controls', 'DMSO', '--target', 'compound+dose', '--n-null', '99']
    assert cli.rcic_hits(words) == 0
    said, record = capsys.readouterr().out, json.loads((tmp_path/'hits.json').read_text())
    table = pd.read_csv(tmp_path/'hits.csv')
    assert 'of 18 perturbations differ from the controls' in said and record['target'] == ['sirna', 'dose'] and record['left_out'] == 0
    assert len(table) == 18 and table.sirna.str.startswith("'=C0").any() and (tmp_path/'hits.png').read_bytes()[:4] == b'\x89PNG'
    assert cli.rcic_hits([*words[:2], '--controls', 'water']) == 2
    said = capsys.readouterr().err
    assert '--controls' in said and 'water' in said and said.count('\n') == 1

def test_nothing_half_written(tmp_path):
    with pytest.raises(ScreenError): write_hits(HITS, tmp_path/'hits.txt')
    with pytest.raises(ScreenError): find_hits(TABLE, tmp_path/'hits.csv', **{**HOW, 'controls': 'water'})
    assert not list(tmp_path.iterdir())

# ---- mAP and its p-values, against copairs 0.5.5 (cosine, null of 200,000)

SIZES = [2, 3, 3, 4, 2, 4]
AP = [.5, .5, .642857, .309524, .833333, .583333, .45, .666667, .805556, .680556, .666667, .916667, .5, .5, .436601, .165812, .219907, .310256]
P = [.05961, .06581, .10248, .012, .05961, .41612]

def test_map_and_p_are_those_of_copairs():
    "copairs counts orders that are better, we those that are as good, too: a tie lies between"
    rng, y = np.random.default_rng(7), np.repeat(np.arange(6), SIZES)
    x = rng.normal(size=(6, 8))[y]*np.array([0, .3, .6, .9, 1.2, .2])[y][:, None] + rng.normal(size=(len(y), 8))
    m = pd.DataFrame(dict(well_id=[f'w{i:02d}' for i in range(len(y))], well_type='treatment', sirna=[f't{i}' for i in y], experiment='A', plate=1))
    _, t = retrieval_map(make_emb_table(m, x), across='well_id')
    np.testing.assert_allclose(t.ap, AP, atol=1e-6)
    found = map_significance(t)
    assert found.exact.all()
    for p, their, seen, n in zip(found.p, P, found['map'], SIZES):
        values, shares = precision_null(n - 1, 17)
        assert shares[values > seen + 1e-6].sum() - .003 < their < p + .003
        assert p == pytest.approx(shares[values >= seen - 1e-6].sum())

# ---- corrections are chosen

def test_only_batches_of_the_table_are_read_and_the_best_wins():
    emb = merge_sites(toy_profiles([f'HUVEC-0{i}' for i in range(1, 5)], (), 24, plates=1, batch=2.))
    choice = choose_correction(emb)
    t = choice.tried.set_index('candidate')
    assert choice.name == t.retrieval.idxmax() and t.gain['no'] == 0 and choice.notes[0].startswith(f'The correction {choice.name} was chosen')
    assert set(t.protocol[['no', 'sphere beforehand']]) == {'inductive'} and set(t.protocol.drop(['no', 'sphere beforehand'])) == {'adapted'}

def test_a_left_out_batch_teaches_nothing():
    "What a correction learns comes from the other batches: a label or a number of one batch changes no other batch's score"
    emb = merge_sites(toy_profiles([f'HUVEC-0{i}' for i in range(1, 5)], (), 24, plates=1, batch=2.))
    one = {k: CANDIDATES[k] for k in ('no', 'sphere beforehand')}
    odd = emb.copy()
    last = (odd.Metadata_experiment == 'HUVEC-04').to_numpy()
    odd.loc[last, 'Metadata_sirna'] = odd.Metadata_sirna[last].to_numpy()[::-1]
    a, b = try_corrections(emb, candidates=one), try_corrections(odd, candidates=one)
    assert (a['HUVEC-04'] > b['HUVEC-04']).all()

def test_corrections_are_scored_alike_in_any_order_of_rows():
    "Of the wells of a batch a few look: the same ones, however the table is sorted"
    emb = merge_sites(toy_profiles([f'HUVEC-0{i}' for i in range(1, 4)], (), 24, plates=1, batch=2.))
    two = {k: CANDIDATES[k] for k in ('no', 'standardize')}
    a, b = (try_corrections(e, candidates=two, most=5) for e in (emb, emb.sample(frac=1, random_state=1).reset_index(drop=True)))
    np.testing.assert_allclose(a.retrieval, b.retrieval, rtol=1e-4)
    assert abs(a.retrieval - try_corrections(emb, candidates=two).retrieval).max() > 1e-3      # it was a choice


# ---- wells and files that cannot be used

def test_one_failed_well_takes_no_number_along(capsys):
    "A well in which no cell was found has no numbers: it is left out, not the numbers of all others"
    cells = [c for c in TABLE if c.startswith('Cells_')]
    failed = TABLE.astype(dict.fromkeys(cells, float))
    failed.loc[5, cells] = np.nan
    emb = read_profiles(failed, controls='DMSO')
    assert emb.attrs['features'] == cells and len(emb) == len(TABLE) - 1 and '1 row of' in capsys.readouterr().out
    assert set(find_hits(failed, **HOW).sirna[lambda s: find_hits(failed, **HOW).hit]) == {'C0', 'C1'}


@pytest.mark.parametrize('seed', range(3))
def test_no_gap_is_left_and_a_full_table_stays(seed):
    rng = np.random.default_rng(seed)
    gap = rng.random((40, 25)) < rng.choice([.01, .1, .5])
    gap[rng.integers(40)] = True
    rows, cols = without_gaps(gap)
    assert not gap[rows][:, cols].any() and rows.any() and all(o.all() for o in without_gaps(np.zeros((3, 2), bool)))


def test_plates_without_controls_and_wells_without_a_name_are_left_out_and_counted():
    bare = TABLE[~((TABLE.Metadata_Plate == 'P1') & (TABLE.Metadata_pert_iname == 'DMSO'))]
    found = find_hits(bare, **HOW)
    alone = find_hits(TABLE[TABLE.Metadata_Plate != 'P1'], **HOW)
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(alone))
    assert any('wells of 1 plate without a negative control left out' in n and 'plate P1 of B1' in n for n in found.attrs['notes'])
    unnamed = find_hits(TABLE.assign(Metadata_pert_iname=TABLE.Metadata_pert_iname.where(TABLE.Metadata_pert_iname != 'C3')), **HOW)
    assert 'C3' not in set(unnamed.sirna) and any('without a name left out' in n for n in unnamed.attrs['notes'])
    refused(lambda: find_hits(TABLE[TABLE.Metadata_pert_iname == 'DMSO'], **HOW), 'all wells are negative controls')


@pytest.mark.parametrize('said', ['true', 'True', '1', '1.0', 1., True])
def test_trained_wells_are_known_in_any_spelling(said, tmp_path):
    TABLE.assign(Metadata_trained=[said]*3 + ['']*(len(TABLE) - 3)).to_csv(tmp_path/'t.csv', index=False)
    assert any(n.startswith('3 of 104') for n in find_hits(tmp_path/'t.csv', **HOW).attrs['notes'])


def test_no_file_of_others_is_overwritten(tmp_path, capsys):
    TABLE.to_csv(tmp_path/'p.csv', index=False)
    was = (tmp_path/'p.csv').read_bytes()
    words = lambda out: [str(tmp_path/'p.csv'), str(tmp_path/out), '--controls', 'DMSO', '--target', 'compound+dose', '--n-null', '19']
    (tmp_path/'a.json').write_text('{"mine": 1}')
    (tmp_path/'b.png').write_text('my picture')
    for out in ('p.csv', 'a.csv', 'b.csv'):
        assert cli.rcic_hits(words(out)) == 2 and 'would be overwritten, and rcic_fastai did not write it' in capsys.readouterr().err
    assert (tmp_path/'p.csv').read_bytes() == was and (tmp_path/'a.json').read_text() == '{"mine": 1}' and (tmp_path/'b.png').read_text() == 'my picture'
    assert cli.rcic_hits(words('c.csv')) == 0 and cli.rcic_hits(words('c.csv')) == 0      # an earlier search may be


def test_profiles_are_not_written_over_another_table(tmp_path):
    emb = read_profiles(TABLE, controls='DMSO')
    for name, content in (('l.csv', b'well,compound\n'), ('l.csv.gz', b'no gzip'), ('l.parquet', b'PAR1 but no'), ('l.h5ad', b'text')):
        (tmp_path/name).write_bytes(content)
        refused(lambda: write_any_profiles([emb], tmp_path/name), 'would be overwritten, and rcic_fastai did not write it')
    for name in ('p.csv', 'p.csv.gz', 'p.parquet'):
        for _ in range(2): write_any_profiles([emb], tmp_path/name)


@pytest.mark.extra('anndata')
def test_hits_of_an_anndata_file_are_those_of_the_table(tmp_path):
    emb = read_profiles(TABLE, controls='DMSO')
    for name in ('p.h5ad', 'p.parquet'): write_any_profiles([emb], tmp_path/name)
    a, b = (find_hits(tmp_path/name, **{**HOW, 'target': 'sirna+dose'}) for name in ('p.h5ad', 'p.parquet'))
    pd.testing.assert_frame_equal(pd.DataFrame(a), pd.DataFrame(b))


def test_an_anndata_file_without_the_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'anndata', None)
    (tmp_path/'p.h5ad').write_bytes(b'x')
    refused(lambda: read_profiles(tmp_path/'p.h5ad'), 'anndata is not installed')


def test_the_argument_that_is_wrong_is_named():
    from rcic_fastai.embed.hits import target_columns
    m = emb_metadata(toy_profiles(n_sirnas=4, dim=4))
    with pytest.raises(ScreenError, match="^dose='foo' is no column of the profiles"): target_columns(m, 'sirna', 'foo')
    with pytest.raises(ScreenError, match="^target='bar' names bar, which is no column"): target_columns(m, 'bar', 'foo')
