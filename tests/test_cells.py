"Single cells: masks, cutting, embeddings, answers, the competition's masks and score."
import base64, json, os, zlib
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from helpers import learner, refused, simulate_screen
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.cells import merge_cells
from rcic_fastai.embed.correct import correct
from rcic_fastai.embed.table import META, emb_features, profile_table, read_embeddings, to_anndata, unit_rows
from rcic_fastai.folder import load_model
from rcic_fastai.predict.cells import cells_path, name_cells
from rcic_fastai.predict.predict import predict_wells, read_predictions
from rcic_fastai.results.submission import (cell_map, cell_map_of_masks, decode_mask, encode_mask, match_cells, run_lengths, runs_to_text,
                                            submission_rows, text_to_runs)
from rcic_fastai.screen.cells import (CELL_COLUMNS, CellSource, MaskFolder, WatershedMasks, cell_table, cut_window, find_cells,
                                      in_pieces, measure_cells, read_mask)
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen, verify_store
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.cells import named_rng
from rcic_fastai.screen.simulate.labels import draw_atlas_image

HOW = dict(cell_side=24, cell_radius=4.)
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A screen of 64 px, masks of all its sites, and a model that saw two of its experiments"
    d = tmp_path_factory.mktemp('cells')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, size=64, plates=1, controls=2, progress=False)
    screen = open_screen(d/'screen')
    water = WatershedMasks(screen.source, radius=4)
    (d/'masks').mkdir()
    for i in screen.table.site_id: cv2.imwrite(str(d/'masks'/f'{i}.png'), water[i].astype(np.uint16))
    learn = learner(screen_dls(screen.train.treatments, valid='none', bs=4))
    learn.to_model(tta=1, progress=False).save(d/'model')
    return d


@pytest.fixture(scope='module')
def plates(here): return open_screen(here/'screen')


@pytest.fixture(scope='module')
def model(here): return load_model(here/'model')


@pytest.fixture(scope='module')
def cells(here, plates): return plates.test.treatments.cells(here/'masks', **HOW)


# ---- masks

def labels(shape=(20, 30), n=5): return RNG.integers(0, n + 1, shape)


@pytest.mark.parametrize('kind', ['png8', 'png16', 'tiff8', 'tiff16', 'bool?', 'npy'])
def test_a_mask_is_read_as_it_was_written(tmp_path, kind):
    x = labels()
    if kind == 'bool?': x = np.zeros((9, 9), int); x[2:5, 2:5] = 1            # one cell, in one piece
    path = tmp_path/f'm.{dict(png8="png", png16="png", tiff8="tif", tiff16="tiff").get(kind, "npy")}'
    if kind.startswith('png'): cv2.imwrite(str(path), x.astype(f'uint{kind[3:]}'))
    elif kind.startswith('tiff'): tifffile.imwrite(path, x.astype(f'uint{kind[4:]}'))
    else: np.save(path, x > 0 if kind == 'bool?' else x)
    got = read_mask(path, x.shape)
    assert got.dtype == np.int32 and np.array_equal(got, x)


@pytest.mark.parametrize('x,says', [
    (np.full((4, 4), -1), 'below 0'), (np.full((4, 4), 2**31), 'above'), (np.zeros((4, 4, 3), int), 'whole numbers [H,W]'),
    (np.zeros((4, 4)), 'as integers'), (np.array([[{}]], object), 'cannot be read as an array'), (np.eye(4, dtype=np.uint8), 'number them 1, 2'),
    (np.ones((4, 5), int), 'is 4×5 px and its picture 4×4')])
def test_what_is_no_mask_is_said(tmp_path, x, says):
    np.save(tmp_path/'m.npy', x, allow_pickle=True)
    refused(lambda: read_mask(tmp_path/'m.npy', (4, 4)), 'm.npy', says)


@pytest.mark.parametrize('name,data,says', [('m.png', b'nothing', 'neither a PNG nor a TIFF'), ('m.npy', b'nothing', 'save it again with np.save'), ('m.tif', b'II*\0', 'damaged')])
def test_a_damaged_mask_is_named(tmp_path, name, data, says):
    (tmp_path/name).write_bytes(data)
    refused(lambda: read_mask(tmp_path/name), name, says)


def test_a_color_mask_is_named(tmp_path):
    cv2.imwrite(str(tmp_path/'m.png'), np.zeros((8, 8, 3), np.uint8))
    refused(lambda: read_mask(tmp_path/'m.png'), 'm.png', 'RGB color')


def test_cells_are_measured_as_by_hand():
    x = labels((25, 17), 40)*3
    got = measure_cells(x).set_index('cell')
    assert set(got.index) == set(np.unique(x)) - {0}
    for n, r in got.iterrows():
        at = np.argwhere(x == n)
        assert [r.top, r.left, r.bottom, r.right] == [*at.min(0), *(at.max(0) + 1)] and r.area == len(at)
        assert r.at_border == bool((at == 0).any() or (at == np.array(x.shape) - 1).any())


def test_a_folder_of_masks_is_matched_by_site(here, plates, tmp_path):
    ids = plates.table.site_id.tolist()
    for i, end in zip(ids[:4], ('', '_cellmask', '_cp_masks', '_mask')): cv2.imwrite(str(tmp_path/f'{i}{end}.png'), np.ones((64, 64), np.uint8))
    few = plates[:4]
    assert set(MaskFolder(tmp_path, plates.source).files) == set(ids[:4])
    (tmp_path/'notes.txt').write_text('not a mask')
    refused(lambda: plates.cells(tmp_path), f'{len(ids) - 4} of {len(ids)} pictures have no mask', ids[4], 'cell_partial=True')
    cv2.imwrite(str(tmp_path/'stranger.png'), np.ones((64, 64), np.uint8))
    refused(lambda: few.cells(tmp_path), '1 of the masks', 'belong to no picture', 'stranger')
    got = few.cells(tmp_path, cell_border='keep', cell_partial=True, cell_side=64)
    assert got.table.image_id.tolist() == ids[:4]
    os.mkdir(tmp_path/'more')
    cv2.imwrite(str(tmp_path/'more'/f'{ids[0]}.png'), np.ones((64, 64), np.uint8))
    refused(lambda: few.cells(tmp_path), 'are both masks of', ids[0])


@pytest.mark.parametrize('how,says', [
    (dict(cell_side=7), 'cell_side=7 is not possible'), (dict(cell_border='cut'), "cell_border='cut' is not known"), (dict(cell_radius=1), 'cell_radius=1'),
    (dict(cell_channels='nucleus,tubulin'), 'tubulin'), (dict(cell_channels='nucleus'), 'has to name the nuclear stain and a stain')])
def test_impossible_cuttings_are_said(plates, how, says):
    refused(lambda: plates.cells('watershed', **how), says)


def test_border_cells_are_counted_and_kept_when_asked(here, plates, capsys):
    masks = MaskFolder(here/'masks', plates.source)
    kept, _ = cell_table(plates.table, masks, 'keep')
    dropped, said = cell_table(plates.table, masks)
    n = int(kept.at_border.sum())
    assert 0 < n == len(kept) - len(dropped) and said == [f'{n} of {len(kept)} cells are cut by the border and dropped']
    plates.cells(here/'masks', **HOW)
    assert f'note: {said[0]}' in capsys.readouterr().out


def test_an_empty_mask_is_an_error_or_counted(here, plates, tmp_path):
    few = plates[:2]
    for i, x in zip(few.table.site_id, (np.pad(np.ones((9, 9), np.uint8), ((9, 46), (9, 46))), np.zeros((64, 64), np.uint8))): cv2.imwrite(str(tmp_path/f'{i}.png'), x)
    refused(lambda: few.cells(tmp_path), '1 of 2 masks hold no cell', few.table.site_id[1])
    assert len(few.cells(tmp_path, cell_partial=True)) == 1


def test_the_watershed_divides_what_touches():
    yy, xx = np.mgrid[:100, :100]
    at = [(30, 30), (30, 60), (65, 45)]
    nucleus = sum(((yy - y)**2 + (xx - x)**2 < 49).astype(float) for y, x in at)
    body = np.max([np.exp(-((yy - y)**2 + (xx - x)**2)/450) for y, x in at], 0)
    got = find_cells(nucleus, body, radius=7)
    nearest = np.argmin([(yy - y)**2 + (xx - x)**2 for y, x in at], 0)
    assert got.max() == 3
    of = [Counter(nearest[got == n].tolist()).most_common(1)[0] for n in (1, 2, 3)]
    assert {n for n, _ in of} == {0, 1, 2} and sum(n for _, n in of) > .98*(got > 0).sum()       # borders where brightness has its valley


def test_no_cell_of_the_watershed_is_torn(plates):
    "Also where a nucleus is seen in two pieces, of which only the larger one begins a cell"
    water = WatershedMasks(plates.source, radius=4)
    for i in plates.table.site_id:
        mask = water[i]
        assert not in_pieces(mask, measure_cells(mask)).any()


def pipeline_of_skimage(nucleus, body, radius):
    "Return cells by another watershed: floods of scikit-image, from the peaks of the distance to the border of the nuclei"
    from scipy import ndimage as ndi
    from skimage.feature import peak_local_max
    from skimage.filters import gaussian, threshold_otsu
    from skimage.segmentation import watershed
    n, b = (gaussian(x.astype(float), radius/6, preserve_range=True) for x in (nucleus, body))
    is_nucleus = n > threshold_otsu(n)
    depth = gaussian(ndi.distance_transform_edt(is_nucleus), radius/6)
    seeds = np.zeros(depth.shape, int)
    at = peak_local_max(depth, min_distance=int(.7*radius), labels=ndi.label(is_nucleus)[0], exclude_border=False)
    seeds[tuple(at.T)] = np.arange(1, len(at) + 1)
    return watershed(-b, watershed(-depth, seeds, mask=is_nucleus), mask=(b > threshold_otsu(b)) | is_nucleus)


@pytest.mark.extra('skimage')
@pytest.mark.parametrize('size,most,radius', [(128, 5, 11.), (160, 12, 13.)])
def test_the_watershed_finds_cells_as_another_one_does(size, most, radius):
    "On drawn cells whose outlines are known: 95 % are found (IoU .6), no more than another pipeline misses and 3 %; 98 % of the pixels are alike"
    n, mine, theirs, alike = 0, 0, 0, []
    for i in range(8):
        im, true, shown = draw_atlas_image(size, named_rng(0, 'watershed', i), most)
        a, b = find_cells(im[2], im[3], radius), pipeline_of_skimage(im[2], im[3], radius)
        n, mine, theirs = n + len(shown), mine + len(match_cells(a, true)), theirs + len(match_cells(b, true))
        pairs, name = match_cells(a, b, .51), np.zeros(a.max() + 1, int)
        name[pairs.cell] = pairs.true_cell
        alike.append((name[a] == b).mean())
    assert n > 25 and mine >= .95*n and mine >= theirs - .03*n and np.mean(alike) > .98, (n, mine, theirs, alike)


def test_torn_cells_and_cells_larger_than_their_pictures_are_counted(plates, tmp_path, capsys):
    "More than 255 cells that were saved with 8 bits begin again at 0, so that two have one number"
    few = plates[:1]
    i, x = few.table.site_id[0], np.zeros((64, 64), np.int64)
    for n in range(1, 260): x[3*(n//20):3*(n//20) + 2, 3*(n % 20):3*(n % 20) + 2] = n
    cv2.imwrite(str(tmp_path/f'{i}.png'), (x % 256).astype(np.uint8))
    (tmp_path/f'._{i}.png').write_bytes(b'of macOS')
    few.cells(tmp_path, cell_side=24, cell_border='keep')
    said = capsys.readouterr().out
    assert '3 of 255 cells are in pieces that do not touch' in said and f'{i}_c1, {i}_c2, {i}_c3' in said and '3 of 255 cells are larger than their pictures of 24 px' in said
    cv2.imwrite(str(tmp_path/f'{i}.png'), x.astype(np.uint16))
    few.cells(tmp_path, cell_side=24, cell_border='keep')
    assert 'pieces' not in (said := capsys.readouterr().out) and 'larger' not in said


@pytest.mark.parametrize('x', [np.ones((4, 4), np.int32), np.ones((4, 4), np.float32), np.ones((2, 4, 4), np.uint16), np.ones((4, 4, 3), np.uint8)])
def test_a_tiff_that_is_no_mask_says_how_to_save_one(tmp_path, x):
    tifffile.imwrite(tmp_path/'m.tif', x)
    assert 'channel' not in refused(lambda: read_mask(tmp_path/'m.tif'), 'm.tif', 'which is no mask', 'np.save')


# ---- cutting

@pytest.mark.parametrize('side', [3, 8, 31])
def test_windows_are_those_of_a_padded_picture(side):
    x = RNG.integers(1, 255, (2, 11, 14)).astype(np.uint8)
    wide = np.pad(x, ((0, 0), (40, 40), (40, 40)))
    for top in range(-side - 1, 13, 3):
        for left in range(-side - 1, 16, 4): assert np.array_equal(cut_window(x, top, left, side), wide[:, top+40:top+40+side, left+40:left+40+side])


class Counting(ImageSource):
    "A source that counts how often each site is read"
    def __init__(self, origin, table):
        super().__init__(origin.root, table, origin.channels)
        self.origin, self.reads = origin, Counter()
    shape, dtype = property(lambda self: self.origin.shape), property(lambda self: self.origin.dtype)
    def _read(self, site_id, out):
        self.reads[site_id] += 1
        self.origin._read(site_id, out)


@pytest.mark.parametrize('threads', [1, 2, 4])
def test_a_site_is_read_once_for_all_its_cells(here, plates, cells, threads):
    counting = Counting(plates.source, plates.table)
    source = CellSource(counting, cells.source.masks, cells.table, 24)
    buffer = np.empty((len(cells), *source.shape), source.dtype)
    source.read_into(cells.table.site_id, buffer, threads)
    assert set(counting.reads.values()) == {1} and set(counting.reads) == set(cells.table.image_id)
    for r, x in zip(cells.table.itertuples(), buffer):
        site = plates.source[r.image_id]
        assert np.array_equal(x, cut_window(site, (r.top + r.bottom)//2 - 12, (r.left + r.right)//2 - 12, 24))


def test_an_unknown_cell_is_said_by_threads_too(cells):
    buffer = np.empty((3, *cells.shape), np.uint8)
    refused(lambda: cells.source.read_into([*cells.table.site_id[:2], 'other'], buffer, 2), "'other' is not in the table")


def test_outside_of_a_masked_cell_is_dark(here, plates):
    shown = plates[:2].cells(here/'masks', cell_masked=True, **HOW)
    for r in shown.table.head(5).itertuples():
        mask = read_mask(here/'masks'/f'{r.image_id}.png')
        mine = cut_window(mask, (r.top + r.bottom)//2 - 12, (r.left + r.right)//2 - 12, 24) == r.cell
        x = shown.source[r.site_id]
        assert mine.sum() == r.area and not x[:, ~mine].any() and x[:, mine].any()
    water = plates[:2].cells('watershed', cell_masked=True, **HOW)
    assert np.array_equal(water.source[r.site_id], x)


def test_what_a_cell_shows_is_known_by_its_stamp(here, plates, tmp_path):
    few = plates[:1]
    i = few.table.site_id[0]
    x = read_mask(here/'masks'/f'{i}.png').astype(np.uint16)
    np.save(tmp_path/f'{i}.npy', x)
    def stamps(**how): return [s.source.stamp(s.table.site_id[0]) for s in [few.cells(tmp_path, **{**HOW, **how})]][0]
    first = stamps()
    assert first == stamps() != stamps(cell_side=16) and first != stamps(cell_masked=True)
    os.utime(tmp_path/f'{i}.npy', ns=(1, 1))
    assert stamps() != first


def test_packed_cells_are_a_screen(cells, tmp_path):
    some = cells[:9].complete()
    packed = open_screen(pack_screen(some, tmp_path/'cells.zarr', progress=False))
    assert verify_store(tmp_path/'cells.zarr', some, progress=False) == 9
    assert packed.table[CELL_COLUMNS].astype(str).equals(some.table[CELL_COLUMNS].astype(str))
    assert packed.table.dataset.tolist() == some.table.dataset.tolist()


def test_absent_files_of_a_site_are_those_of_its_cells(here, plates, cells):
    class Lacking(Counting):
        def missing(self): return pd.DataFrame(dict(site_id=cells.table.image_id[:1], missing=[('ER',)], file=['x.png']))
    source = CellSource(Lacking(plates.source, plates.table), cells.source.masks, cells.table, 24)
    assert set(source.missing().site_id) == set(cells.table.site_id[cells.table.image_id == cells.table.image_id[0]])
    refused(lambda: Screen(cells.table, source).complete(), 'lack channel files')


# ---- embeddings and answers

def test_cells_are_embedded_as_pictures_of_their_own(model, cells):
    emb = model.embed(cells, tta=1, progress=False)
    assert emb[f'{META}site_id'].tolist() == cells.table.site_id.tolist()
    back = cells.source.origin
    alone = model.embed(cells[3:4], tta=1, progress=False)
    assert np.allclose(emb_features(alone), emb_features(emb)[3:4], atol=1e-5) and back.shape[-1] == 64
    wells = merge_cells(emb)
    first = emb_features(emb)[(cells.table.well_id == cells.table.well_id[0]).to_numpy()]
    assert np.allclose(emb_features(wells)[0], unit_rows(first.mean(0)[None])[0], atol=1e-5)
    assert profile_table(emb).Metadata_Batch.nunique() == 1
    assert set(correct(wells, 'standardize')[f'{META}protocol']) == {'adapted'}


@pytest.mark.extra('anndata')
def test_cells_become_anndata(model, cells):
    a = to_anndata(model.embed(cells, tta=1, progress=False))
    assert a.obs_names.tolist() == cells.table.site_id.tolist() and a.obs.Metadata_area.tolist() == cells.table.area.tolist()


@pytest.mark.parametrize('merge', ['mean', 'median'])
def test_wells_are_named_after_their_cells(here, model, plates, cells, merge):
    got = model.predict(plates, cells=here/'masks', cell_merge=merge, tta=1, progress=False, **HOW)
    emb = model.embed(cells, tta=1, progress=False)
    want, _ = predict_wells(merge_cells(emb, merge), model.index)
    assert got[['id_code', 'sirna', 'protocol']].equals(want[['id_code', 'sirna', 'protocol']]) and np.allclose(got.score, want.score, atol=1e-5)
    assert set(got.protocol) == {'inductive'}


def run(command, code=0): assert getattr(cli, command.split()[0])(command.split()[1:]) == code


@pytest.mark.parametrize('protocol,used,more', [
    ('inductive', 'inductive', '--by classifier'), ('adapted', 'adapted', '--embeddings'), ('adapted', 'adapted', '--correct standardize --embeddings'), ('transductive', 'adapted', '--cell-merge median --embeddings')])
def test_the_command_writes_cells_beside_wells(here, model, plates, tmp_path, protocol, used, more):
    is_embedded, file = more.endswith('--embeddings'), f' {tmp_path}/e.parquet'
    run(f'rcic_predict {here}/model {here}/screen {tmp_path}/a.csv --tta 1 --protocol {protocol} --cells {here}/masks --cell-side 24 --scores {more}{file if is_embedded else ""}')
    wells, named = read_predictions(tmp_path/'a.csv'), pd.read_parquet(tmp_path/'a.cells.parquet')
    assert set(wells.protocol) == {protocol} and set(named.protocol) == {used}
    assert set(named.well_id) == set(wells.id_code) == set(plates.test.treatments.table.well_id)
    if is_embedded: assert read_embeddings(tmp_path/'e.parquet')[f'{META}site_id'].tolist() == named.id_code.tolist()
    x = named[[c for c in named if c.startswith('score:')]]
    best = [x.columns[(row >= row.max() - 1e-6).argmax()].removeprefix('score:') for row in x.to_numpy()]         # of a tie, the first
    assert best == named.sirna.tolist() and x.max().max() <= 1.0001
    record = json.loads((tmp_path/'a.json').read_text())
    assert (record['n_cells'], record['cell_side'], record['cells']) == (len(named), 24, str(here/'masks')) and 'cells_sha256' in record
    assert any('cut by the border' in n for n in record['notes'])
    assert any('whole pictures' in n for n in record['notes']) == ('classifier' not in more)


def test_a_model_of_cells_answers_from_cells(here, plates, tmp_path):
    "Packed cells are trained on like sites, and cells are looked up among cells"
    run(f'rcic_pack {here}/screen {tmp_path}/c.zarr --cells {here}/masks --cell-side 24 --verify')
    packed = open_screen(tmp_path/'c.zarr')
    assert packed.shape == (6, 24, 24) and set(packed.wells.well_id) == set(plates.wells.well_id)
    learn = learner(screen_dls(packed.train.treatments, valid='none', bs=4, size=48))
    m = learn.to_model(tta=1, progress=False)
    assert m.spec_for(plates.cells(here/'masks', cell_side=12)).size == 24           # half the field, half the pixels
    pred = m.predict(plates, cells=here/'masks', cell_side=24, tta=1, progress=False, out=tmp_path/'a.csv')
    assert len(pred) and not any('whole pictures' in n for n in json.loads((tmp_path/'a.json').read_text())['notes'])
    direct = m.predict(packed, tta=1, progress=False)
    assert set(direct.id_code) == set(pred.id_code)


def test_packing_says_what_cells_lack(here, tmp_path, capsys):
    for options, says in (('--cell-side 24', '--cell-side 24 is of single cells'), (f'--cells {tmp_path}/no', 'There is no folder'), ('--cells watershed --cell-channels a,b', '--cell-channels a,b')):
        run(f'rcic_pack {here}/screen {tmp_path}/c.zarr {options}', 2)
        assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_python_and_the_command_name_the_same_cells(here, model, plates, tmp_path):
    of_python = model.predict_cells(plates, here/'masks', by='classifier', tta=1, progress=False, cell_side=24)
    run(f'rcic_predict {here}/model {here}/screen {tmp_path}/a.csv --tta 1 --by classifier --cells {here}/masks --cell-side 24')
    of_command = pd.read_parquet(cells_path(tmp_path/'a.csv'))
    pd.testing.assert_frame_equal(of_python.astype(object), of_command.astype(object), check_exact=False, atol=1e-5)


@pytest.mark.parametrize('options,says', [
    ('--cell-side 24', '--cell-side 24 is of single cells'), ('--cells {d}/nowhere', 'There is no folder'), ('--cells {d}/masks --cell-merge best', '--cell-merge best is not known'),
    ('--cells {d}/masks --cell-border cut', '--cell-border cut'), ('--cells watershed --cell-channels DNA,ER', '--cell-channels DNA,ER'), ('--cells watershed --cell-radius 0.5', '--cell-radius 0.5'),
    ('--cells {d}/small', 'is 32×32 px and its picture 64×64'), ('--cells {d}/few', 'have no mask'), ('--cells {d}/masks --embeddings {t}/a.cells.parquet', 'answers of the cells'),
    ('--cells {d}/masks --cell-side 5000', '--cell-side 5000')])
def test_wrong_requests_are_one_sentence_and_write_nothing(here, plates, tmp_path, capsys, options, says):
    for name, n, side in (('small', None, 32), ('few', 2, 64)):
        (here/name).mkdir(exist_ok=True)
        for i in plates.table.site_id[:n]: cv2.imwrite(str(here/name/f'{i}.png'), np.pad(np.ones((9, 9), np.uint8), (5, side - 14)))
    before = set(tmp_path.iterdir())
    run(f'rcic_predict {here}/model {here}/screen {tmp_path}/a.csv --tta 1 ' + options.format(d=here, t=tmp_path), 2)
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1, err
    assert set(tmp_path.iterdir()) == before


def test_a_well_without_cells_has_no_answer_and_is_named(here, model, plates, tmp_path, capsys):
    test = plates.test.treatments.table
    for i in plates.table.site_id:
        lost = i in set(test.site_id[test.well_id == test.well_id.iloc[0]])
        x = np.zeros((64, 64), np.uint8)
        if not lost: x[20:30, 20:30] = 1
        cv2.imwrite(str(tmp_path/f'{i}.png'), x)
    refused(lambda: model.predict(plates, cells=tmp_path, tta=1, progress=False), 'hold no cell')
    pred = model.predict(plates, cells=tmp_path, cell_partial=True, tta=1, progress=False)
    assert set(pred.id_code) == set(test.well_id) - {test.well_id.iloc[0]}
    assert '1 of ' in (err := capsys.readouterr().err) and f'have no cell left and no answer ({test.well_id.iloc[0]})' in err


def test_an_interrupted_prediction_does_not_continue_with_other_masks(here, model, plates, tmp_path, monkeypatch):
    from rcic_fastai.predict import plan
    def stop(*args, **kwargs): raise KeyboardInterrupt
    how = dict(cells=here/'masks', tta=1, progress=False)
    with monkeypatch.context() as m:
        m.setattr(plan, 'predict_tables', stop)
        with pytest.raises(KeyboardInterrupt): model.predict(plates, out=tmp_path/'a.csv', cell_side=24, **how)
    refused(lambda: model.predict(plates, out=tmp_path/'a.csv', cell_side=32, **how), 'a.csv.part')
    assert len(model.predict(plates, out=tmp_path/'a.csv', cell_side=24, **how)) and not (tmp_path/'a.csv.part').exists()


def test_answers_of_cells_do_not_outlive_those_of_wells(here, model, plates, tmp_path):
    how = dict(out=tmp_path/'a.csv', tta=1, progress=False)
    model.predict(plates, cells=here/'masks', cell_side=24, **how)
    assert cells_path(tmp_path/'a.csv').is_file()
    model.predict(plates, **how)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['a.csv', 'a.json', 'a.top.csv']
    cells_path(tmp_path/'a.csv').write_bytes(b'PAR1, of another program')
    model.predict(plates, **how)
    assert cells_path(tmp_path/'a.csv').is_file()


def test_no_test_label_is_read(here, model, plates):
    blind = Screen(plates.table.assign(sirna=plates.table.sirna.where(plates.table.dataset != 'test', 'x')), plates.source)
    how = dict(tta=1, progress=False, cell_side=24)
    a, b = (model.predict_cells(s, here/'masks', **how) for s in (plates, blind))
    pd.testing.assert_frame_equal(a, b)


def test_cells_among_cells_are_found(model, cells):
    "An index of the same cells names each after itself"
    from rcic_fastai.embed.index import EmbeddingIndex
    emb = model.embed(cells, tta=1, progress=False)
    named = name_cells(emb, EmbeddingIndex(emb))
    assert np.allclose(named.score, 1, atol=1e-5)
    assert (named.sirna == cells.table.sirna).mean() > .95           # but for twins


# ---- the competition

YY, XX = np.mgrid[:40, :50]
SHAPES = dict(disc=(YY - 20)**2 + (XX - 25)**2 < 100, empty=np.zeros((5, 7), bool), full=np.ones((5, 7), bool), first=(YY == 0) & (XX == 0),
              last=(YY == 39) & (XX == 49), ring=np.abs(np.hypot(YY - 20, XX - 20) - 12) < 2, one=np.ones((1, 1), bool),
              rows=np.broadcast_to(np.arange(6)[:, None] % 2 == 0, (6, 6)), random=np.random.default_rng(0).random((9, 11)) < .5)
COCO = dict(disc='`d09n02M4N0O2N2O0000000000000001N2N102L3NYb0', empty='S1', full='0S1', first='01_n1', last='_n11', one='01',
            ring='W9;k04M2NH[O0c0ME09OK030O00O20M130LO60J060J060J060JO80H160J060J060J060J140MO30N10010M051G0;3]O0e082N3Lcc0',
            rows='0110000000000000000000000000000000000', random='1122OO3OO1N0000O01002OO1O04O10K12OO1OO10O010O00101211')


@pytest.mark.parametrize('name', COCO)
def test_run_lengths_are_those_of_pycocotools(name):
    "The texts are what pycocotools 2.0 wrote for these masks"
    m = SHAPES[name]
    text = runs_to_text(run_lengths(np.flatnonzero(m.T), m.size))
    assert text.decode() == COCO[name] and zlib.decompress(base64.b64decode(encode_mask(m))) == text
    assert np.array_equal(decode_mask(encode_mask(m), m.shape), m)


@pytest.mark.extra('pycocotools')
def test_pycocotools_reads_and_writes_the_same():
    from pycocotools import mask as coco
    for shape in [(1, 1), (1, 40), (40, 1), (37, 53), (700, 900)]:
        for p in (0, .001, .1, .5, 1):
            m = np.asfortranarray(RNG.random(shape) < p, dtype=np.uint8)
            theirs = coco.encode(m)['counts']
            assert runs_to_text(run_lengths(np.flatnonzero(m.T), m.size)) == theirs
            assert np.array_equal(coco.decode(dict(size=list(shape), counts=zlib.decompress(base64.b64decode(encode_mask(m))))), m)


def test_any_mask_comes_back():
    for _ in range(100):
        shape = tuple(RNG.integers(1, 40, 2))
        m = RNG.random(shape) < RNG.random()
        assert np.array_equal(decode_mask(encode_mask(m), shape), m)
    runs = RNG.integers(0, 2**30, 999)
    assert np.array_equal(text_to_runs(runs_to_text(runs)), runs)


@pytest.mark.parametrize('text', ['', 'eNpL', '====', 'é', base64.b64encode(zlib.compress(b'o'*9)).decode(), base64.b64encode(zlib.compress(b'0'*10**6)).decode()])
def test_a_damaged_mask_text_is_one_sentence(text): refused(lambda: decode_mask(text, (40, 50)), 'mask')


def test_a_submission_holds_every_cell(here, model, plates):
    named = model.predict_cells(plates, here/'masks', by='classifier', scores=True, tta=1, progress=False, cell_side=24)
    masks = MaskFolder(here/'masks', plates.source)
    rows = submission_rows(named, masks, images=plates.test.treatments.table.site_id)
    assert rows.ID.tolist() == plates.test.treatments.table.site_id.tolist() and set(rows.ImageWidth) == {64}
    classes = [c.removeprefix('score:') for c in named if c.startswith('score:')]
    for r in rows.itertuples():
        entries, mine = r.PredictionString.split(), named[named.image_id == r.ID]
        assert len(entries) == 3*len(mine)*len(classes)
        for n, cell in zip(range(0, len(entries), 3*len(classes)), mine.cell):
            assert np.array_equal(decode_mask(entries[n+2], (64, 64)), masks[r.ID] == cell) and entries[n:n+3*len(classes):3] == classes


def test_the_score_is_that_of_a_loop():
    truth = RNG.random((60, 4)) < [.5, .2, .05, 0]
    truth[0, 2] = True
    sure = np.round(RNG.random((60, 4)), 1)
    each = []
    for y, s in zip(truth.T, sure.T):
        positive = np.flatnonzero(y)
        each.append(np.mean([y[s >= s[i]].sum()/(s >= s[i]).sum() for i in positive]) if len(positive) else np.nan)
    score, of = cell_map(truth, sure, list('abcd'))
    assert abs(score - np.nanmean(each)) < 1e-12 and np.allclose(of.average_precision, each, equal_nan=True)


def slow_map(cells, masks, truth, true_masks, labels, iou):
    "The score with matched masks by loops: down the confidences of a label, each cell takes the best true cell that is left"
    each = []
    for k in labels:
        true = [(t.image_id, t.cell) for t in truth.itertuples() if k in t.labels.split('|')]
        if not true: continue
        said, taken, hits = sorted(cells.to_dict('records'), key=lambda r: -r[f'score:{k}']), set(), []
        for r in said:
            best, at = 0, None
            for image, cell in true:
                if image != r['image_id'] or (image, cell) in taken: continue
                a, b = masks[image] == r['cell'], true_masks[image] == cell
                share = (a & b).sum()/(a | b).sum()
                if share >= iou and share > best: best, at = share, (image, cell)
            if at: taken.add(at)
            hits.append(at is not None)
        right, points = 0, []
        for n, h in enumerate(hits, 1):
            right += h
            points.append((right/len(true), right/n))
        area, before = 0, 0
        for n, (recall, _) in enumerate(points):
            area += (recall - before)*max(p for _, p in points[n:])
            before = recall
        each.append(area)
    return np.mean(each)


@pytest.mark.parametrize('seed', range(4))
def test_the_score_with_masks_is_that_of_loops(seed):
    "Cells that are moved, merged, lost and made up; label 3 is of no true cell"
    rng, masks, true_masks, truth, cells = np.random.default_rng(seed), {}, {}, [], []
    for i in 'abc':
        true = np.zeros((40, 60), np.int32)
        for n in range(8): true[2 + 20*(n//4):14 + 20*(n//4), 2 + 15*(n % 4):12 + 15*(n % 4)] = 3*n + 1
        found = np.roll(true, rng.integers(0, 3, 2), (0, 1))
        for n in rng.choice(8, 2, replace=False): found[found == 3*n + 1] = [0, 99][int(rng.integers(2))]
        found[34:39, 2:9] = np.where(found[34:39, 2:9] == 0, 50, found[34:39, 2:9])
        masks[i], true_masks[i] = found, true
        truth += [dict(image_id=i, cell=int(n), labels='|'.join(map(str, np.flatnonzero(rng.random(3) < .6)))) for n in np.unique(true[true > 0])]
        cells += [dict(image_id=i, cell=int(n), **{f'score:{k}': rng.random() for k in range(4)}) for n in np.unique(found[found > 0])]
    truth, cells = pd.DataFrame(truth), pd.DataFrame(cells)
    for iou in (.51, .6, .8):
        score, each = cell_map_of_masks(cells, masks, truth, true_masks, iou=iou)
        assert abs(score - slow_map(cells, masks, truth, true_masks, '0123', iou)) < 1e-12 and 0 <= score < 1
        assert each.found.max() < each.cells.max() and np.isnan(each.average_precision[3])
    assert cell_map_of_masks(cells, masks, truth, true_masks, iou=.51)[0] > score


def test_perfect_masks_and_confidences_score_one(atlas_cells):
    cells, truth, masks = atlas_cells
    assert cell_map_of_masks(cells, masks, truth, masks)[0] == 1
    assert 0 < cell_map_of_masks(cells[::2], masks, truth, masks)[0] < .8                    # half of the cells are not found


@pytest.fixture
def atlas_cells(tmp_path):
    "Cells of drawn images, as a segmentation and a model without faults would give them; the truth; and the masks"
    from rcic_fastai.screen.simulate.labels import simulate_labels
    folder = simulate_labels(tmp_path/'atlas', images=6, size=48, cells=3, progress=False)
    truth = pd.read_csv(folder/'cells.csv', dtype=str).rename(columns=dict(ID='image_id', Label='labels'))
    scores = pd.DataFrame({f'score:{k}': [float(str(k) in o.split('|')) for o in truth.labels] for k in range(8)})
    return truth[['image_id', 'cell']].join(scores), truth, MaskFolder(folder/'masks', open_screen(folder).source)
