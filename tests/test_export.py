"What other programs read: OME-Zarr plates by other readers, a table for Embedding Atlas, and the commands that write them"
import json, os, subprocess
import numpy as np, pandas as pd, pytest
from helpers import learner, refused
from rcic_fastai import cli, folder      # folder: `model.save`
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.results.explore import explore
from rcic_fastai.results.export import atlas_table, write_atlas, write_cytodataframe, write_plates
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.screen import Screen


class Wide(ImageSource):
    "16 bits, four channels with the names of another laboratory, all pixels different"
    def __init__(self, table):
        super().__init__('wide', table, ['DNA', 'a/b', 'c d', 'é'])
        self.shape, self.dtype = (4, 10, 12), np.dtype('u2')
    def _read(self, site_id, out): out[...] = np.random.default_rng(list(site_id.encode())).integers(0, 2**16, self.shape, np.uint16)


@pytest.fixture(scope='module')
def wide(screen):
    "Names with leading zeros, a comma, no perturbation in some wells, a column more"
    t = screen.table.copy()
    names = {s: f'00{i},x' for i, s in enumerate(sorted(t.sirna.unique()))}
    t['sirna'] = t.sirna.map(names).where(t.well != t.well.iloc[0])
    t['dose'] = np.arange(len(t))//2/4
    return Screen(t, Wide(t), 'wide')


def same_screen(a, b):
    table = b.table.set_index('site_id').loc[a.table.site_id].reset_index()
    for c in ('site_id', 'well_id', 'experiment', 'plate', 'well', 'site', 'well_type', 'cell_type', 'dataset', 'dose'):
        if c in a.table: assert table[c].tolist() == a.table[c].tolist(), c
    assert table.sirna.astype(object).where(table.sirna.notna(), None).tolist() == a.table.sirna.astype(object).where(a.table.sirna.notna(), None).tolist()
    assert tuple(b.channels) == tuple(a.channels) and b.source.dtype == a.source.dtype
    for i in a.table.site_id: assert np.array_equal(a.source[i], b.source[i])


@pytest.mark.parametrize('packed', [False, True])
def test_plates_come_back_as_they_were(wide, tmp_path, packed):
    screen = wide if not packed else open_screen(pack_screen(wide, tmp_path/'p.zarr', progress=False))
    same_screen(screen, open_screen(write_plates(screen, tmp_path/'plates', progress=False)))


def test_other_readers_open_the_plates(wide, tmp_path):
    import zarr
    from ome_zarr_models import v05 as models
    write_plates(wide, tmp_path/'plates', progress=False)
    r = wide.table.iloc[5]
    at = tmp_path/'plates'/r.experiment/f'{r.plate}.zarr'
    plate = models.HCS.from_zarr(zarr.open_group(str(at), mode='r'))
    assert len(plate.attributes.ome.plate.wells) == wide.wells.query('experiment == @r.experiment and plate == @r.plate').well.nunique()
    field = zarr.open_group(str(at/r.well[0]/str(int(r.well[1:]))/str(r.site - 1)), mode='r')
    assert np.array_equal(field['0'][:], wide.source[r.site_id]) and field['0'].metadata.dimension_names == ('c', 'y', 'x')
    models.Image.from_zarr(field)


def test_an_interrupted_writing_continues(wide, tmp_path, monkeypatch):
    "Plates that are complete are kept, the one that was not is written again"
    from rcic_fastai.results import export
    was, done = export._write_field, []
    def fails(folder, x, channels):
        if len(done) == 30: raise KeyboardInterrupt
        done.append(folder)
        was(folder, x, channels)
    monkeypatch.setattr(export, '_write_field', fails)
    with pytest.raises(KeyboardInterrupt): write_plates(wide, tmp_path/'plates', workers=1, progress=False)
    complete = {p.parent: (p.parent/'zarr.json').stat().st_mtime_ns for p in (tmp_path/'plates.part').glob('*/*.zarr/zarr.json')}
    assert complete and not (tmp_path/'plates').exists()
    monkeypatch.setattr(export, '_write_field', was)
    write_plates(wide, tmp_path/'plates', progress=False)
    for p, t in complete.items(): assert (tmp_path/'plates'/p.relative_to(tmp_path/'plates.part')/'zarr.json').stat().st_mtime_ns == t
    write_plates(wide, tmp_path/'whole', progress=False)
    files = lambda d: {str(p.relative_to(d)): p.read_bytes() for p in sorted(d.rglob('*')) if p.is_file()}
    assert files(tmp_path/'plates') == files(tmp_path/'whole')


@pytest.fixture(scope='module')
def made(screen, tmp_path_factory):
    "A model folder"
    out = tmp_path_factory.mktemp('export')
    model = learner(screen_dls(screen, valid='HUVEC-03', bs=8, device='cpu')).to_model(tta=1, progress=False)
    model.save(out/'model')
    return out, model


def test_the_commands(made, screen, tmp_path, capsys):
    out, model = made
    assert cli.rcic_pack([str(screen.source.root), str(tmp_path/'plates'), '--to', 'ome-zarr']) == 0
    same_screen(screen, open_screen(tmp_path/'plates'))
    words = [str(out/'model'), str(screen.source.root)]
    common = '--held-out --tta 1 --umap no --side 16'.split()
    assert cli.rcic_explore([*words, str(tmp_path/'page'), *common]) == 0 and (tmp_path/'page'/'index.html').is_file()
    assert cli.rcic_explore([*words, str(tmp_path/'wells.parquet'), *common]) == 0
    said = capsys.readouterr().out
    assert 'Embedding Atlas' in said and 'pictures in 1 file' in said
    t = pd.read_parquet(tmp_path/'wells.parquet')
    assert set(t.experiment) == {'HUVEC-01', 'HUVEC-02', 'HUVEC-03'} and (t['inductive: answer'].notna() == (t.experiment == 'HUVEC-03')).all()
    assert cli.rcic_pack([str(screen.source.root), str(tmp_path/'other'), '--to', 'tiff']) == 2
    assert cli.rcic_explore([*words, str(tmp_path/'wells.csv')]) == 2
    assert not (tmp_path/'other').exists() and not (tmp_path/'wells.csv').exists()


def test_neighbors_of_the_table_are_those_of_the_model(made, screen):
    out, model = made
    held = model.held_out(screen)
    page = explore(model, held, side=0, umap='no', tta=1, progress=False)
    t = atlas_table(page, held, side=0)
    near = model.neighbors(held, tta=1, progress=False)
    for r in t[t['inductive: answer'].notna()].itertuples():
        best = near[near.id_code == r.well_id].groupby('well_id').cosine.max().sort_values(ascending=False)
        ids, distances = r.neighbors['ids'], np.array(r.neighbors['distances'])
        assert t.well_id[ids[0]] == best.index[0] or abs(best.iloc[0] - (1 - distances[0])) < 1e-3
        np.testing.assert_allclose(1 - distances, best.iloc[:len(ids)], atol=1e-3)
        assert (np.diff(distances) >= 0).all() and 'image' not in t


def test_a_screen_without_places_is_one_sentence(screen, tmp_path):
    refused(lambda: write_plates(screen[screen.table.assign(well='')], tmp_path/'p'), 'have no well')
    refused(lambda: write_plates(screen[screen.table.assign(experiment='..')], tmp_path/'p'), "'..' cannot be the name of a folder")
    assert not list(tmp_path.iterdir())


class Again(Wide):
    "The same wells, photographed again"
    def _read(self, site_id, out):
        super()._read(site_id, out)
        out[...] = ~out
    def stamp(self, site_id): return 'again'


def test_plates_of_another_screen_are_not_continued(wide, tmp_path, monkeypatch):
    "Same wells, shape and type, other pictures: complete plates of the first would stay"
    from rcic_fastai.results import export
    was, done = export._write_field, []
    def fails(folder, x, channels):
        if len(done) == 30: raise KeyboardInterrupt
        done.append(folder)
        was(folder, x, channels)
    monkeypatch.setattr(export, '_write_field', fails)
    with pytest.raises(KeyboardInterrupt): write_plates(wide, tmp_path/'plates', workers=1, progress=False)
    monkeypatch.setattr(export, '_write_field', was)
    before = {p: p.read_bytes() for p in (tmp_path/'plates.part').rglob('*') if p.is_file()}
    refused(lambda: write_plates(Screen(wide.table, Again(wide.table), 'again'), tmp_path/'plates', progress=False), 'plates.part was begun with different pictures', 'remove the folder')
    refused(lambda: write_plates(wide[wide.table.iloc[::-1]], tmp_path/'plates', progress=False), 'begun with different', 'sites')
    assert before == {p: p.read_bytes() for p in (tmp_path/'plates.part').rglob('*') if p.is_file()}
    (tmp_path/'plates.part/writing.json').unlink()      # of an earlier version, which did not note it
    refused(lambda: write_plates(wide, tmp_path/'plates', progress=False), 'was begun with different')
    assert not [*tmp_path.glob('*.lock')]


def test_a_table_is_not_written_over_something_else(made, screen, tmp_path, capsys):
    out, model = made
    page = explore(None, screen, side=0)
    (tmp_path/'folder.parquet').mkdir()
    (tmp_path/'mine.parquet').write_text('my own words')
    for name, words in (('folder.parquet', 'folder.parquet is a folder'), ('mine.parquet', 'mine.parquet would be overwritten, and rcic_fastai did not write it'), ('table.csv', 'end in .parquet')):
        refused(lambda: write_atlas(page, screen, tmp_path/name, 0), words)
    assert cli.rcic_explore([str(out), str(screen.source.root), str(tmp_path/'mine.parquet')]) == 2 and 'would be overwritten, and rcic_fastai did not write it' in capsys.readouterr().err
    assert (tmp_path/'mine.parquet').read_text() == 'my own words'


# ---- profiles beside their pictures

def profiles_of(screen, level):
    "Profiles as `rcic_embed` writes them, in another order than the screen, not of all wells"
    t = screen.table if level == 'site' else screen.table.drop_duplicates('well_id')
    t = t.iloc[::-3]
    return pd.DataFrame({'Metadata_well_id': t.well_id, **({'Metadata_site_id': t.site_id} if level == 'site' else {}), 'emb_0000': np.arange(len(t), dtype='f4')})


@pytest.mark.parametrize('level', ['well', 'site'])
def test_pictures_of_profiles_are_those_of_the_screen(wide, tmp_path, level):
    import tifffile
    given = profiles_of(wide, level)
    given.to_parquet(tmp_path/'p.parquet')
    given.attrs['notes'] = object()
    out = write_cytodataframe(given if level == 'well' else tmp_path/'p.parquet', wide, tmp_path/'out', progress=False)
    t = pd.read_parquet(out/'profiles.parquet')
    assert t[given.columns].to_dict('list') == given.to_dict('list') and [*t.columns[-4:]] == [f'Image_FileName_{c}' for c in wide.channels]
    first = wide.table.drop_duplicates('well_id').set_index('well_id').site_id
    for r in t.itertuples():
        site = r.Metadata_site_id if level == 'site' else first[r.Metadata_well_id]
        for k, name in enumerate(r[-4:]):
            x = tifffile.imread(out/'images'/name)
            assert x.dtype == np.uint16 and np.array_equal(x, wide.source[site][k])
    assert {p.name for p in (out/'images').iterdir()} == {*t.iloc[:, -4:].to_numpy().ravel()} and {p.name for p in tmp_path.iterdir()} == {'out', 'p.parquet'}


def test_pictures_of_other_profiles_are_refused(wide, tmp_path, monkeypatch):
    given = profiles_of(wide, 'well')
    refused(lambda: write_cytodataframe(given.assign(Metadata_well_id='x'), wide, tmp_path/'a'), 'are of no well of the screen (x)')
    refused(lambda: write_cytodataframe(given[['emb_0000']], wide, tmp_path/'a'), 'no column Metadata_well_id')
    refused(lambda: write_cytodataframe(given, Screen(wide.table, None), tmp_path/'a'), 'without pictures')
    given.to_csv(tmp_path/'p.csv')
    refused(lambda: write_cytodataframe(tmp_path/'p.csv', wide, tmp_path/'a'), 'p.csv is no parquet file')
    assert [p.name for p in tmp_path.iterdir()] == ['p.csv']
    monkeypatch.setattr('rcic_fastai.results.export._write_tiffs', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): write_cytodataframe(given, wide, tmp_path/'a', progress=False)
    monkeypatch.undo()
    assert not (tmp_path/'a').exists() and write_cytodataframe(given, wide, tmp_path/'a', progress=False).is_dir() and not (tmp_path/'a.part').exists()
    refused(lambda: write_cytodataframe(given, wide, tmp_path/'a'), 'exists already')


SHOW = """
import json, re, sys
from cytodataframe import CytoDataFrame
t = CytoDataFrame(sys.argv[1], display_options={'render_whole_image': True})
html = t._generate_jupyter_dataframe_html()
print(json.dumps([len(t), t.find_image_columns(), len(re.findall('src="data:image/png;base64,', html))]))
"""

def test_cytodataframe_shows_the_pictures(screen, tmp_path):
    "With CytoDataFrame, which needs another package of OpenCV than this library: EXPORT_CYTODATAFRAME names the Python of an environment that has it"
    theirs = os.environ.get('EXPORT_CYTODATAFRAME')
    if not theirs: pytest.skip('CytoDataFrame is not here (pip install cytodataframe in an environment of its own, and name its Python with EXPORT_CYTODATAFRAME)')
    given = profiles_of(screen, 'site').head(4)
    out = write_cytodataframe(given, screen, tmp_path/'p', progress=False)
    out.rename(tmp_path/'moved')
    said = subprocess.run([theirs, '-c', SHOW, str(tmp_path/'moved/profiles.parquet')], capture_output=True, text=True, timeout=300, env={'PATH': os.environ['PATH']})
    n, columns, pictures = json.loads(next(o for o in said.stdout.splitlines() if o.startswith('[')))
    assert n == 4 and columns == [f'Image_FileName_{c}' for c in screen.channels] and pictures == 4*len(columns), said.stderr
