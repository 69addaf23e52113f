"Predictions, profiles and records of several models, of cells, and of pictures that change between two runs"
import json, os
from pathlib import Path
import numpy as np, pytest, torch
import rcic_fastai.predict.plan as plan
from helpers import learner, refused, simulate_screen
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.embed import embed_parts
from rcic_fastai.embed.table import emb_features
from rcic_fastai.folder import CellTypeModels
from rcic_fastai.screen.cells import cell_screen
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.screen import Screen

def drawn(folder, names, test, **kwargs):
    simulate_screen(folder, names, test=test, **{'sirnas': 4, 'plates': 1, 'controls': 2, 'size': 32, 'n_workers': 0, 'progress': False, **kwargs})
    return open_screen(folder)

def untrained(screen, valid='none', **kwargs):
    torch.manual_seed(0)
    return learner(screen_dls(screen, valid=valid, bs=8, device='cpu', **kwargs)).to_model(tta=1, progress=False)

def change_pictures(root, experiment):
    "Give the wells of an experiment the pictures of others, with the same names and sizes, a second later"
    by_channel = {}
    for f in sorted(Path(root).rglob('*.png')):
        if experiment in str(f): by_channel.setdefault(f.name[-6:], []).append(f)
    for files in by_channel.values():
        data = [f.read_bytes() for f in files]
        for f, d in zip(files, data[2:] + data[:2]):
            f.write_bytes(d)
            os.utime(f, (f.stat().st_atime, f.stat().st_mtime + 2))
    return by_channel

def test_the_pictures_of_one_cell_type_change_between_two_runs(tmp_path, monkeypatch):
    "What was embedded of the old pictures is not used"
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02'], ['HUVEC-02', 'RPE-02'])
    both = CellTypeModels({c: untrained(screen[screen.table.cell_type == c]) for c in ('HUVEC', 'RPE')})
    out, whole = tmp_path/'o.csv', plan.embed_parts
    def once(folder, *args, **kwargs):
        if 'RPE' in str(folder): raise KeyboardInterrupt
        return whole(folder, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(plan, 'embed_parts', once)
        with pytest.raises(KeyboardInterrupt): both.predict(screen, out=out, tta=1, progress=False)
    assert list(tmp_path.glob('o.csv.*')), 'nothing was kept, so nothing is tested'
    before = both.predict(screen, tta=1, progress=False).set_index('id_code').score
    assert change_pictures(screen.source.root, 'HUVEC-02')
    now = open_screen(tmp_path/'screen')
    continued = both.predict(now, out=out, tta=1, progress=False).set_index('id_code').score
    anew = both.predict(now, tta=1, progress=False).set_index('id_code').score
    assert (before - anew).abs().max() > 1e-4                 # the pictures matter
    assert (continued - anew[continued.index]).abs().max() < 1e-5

@pytest.mark.parametrize('route', ['memory', 'file'])
def test_profiles_of_cells_are_their_embeddings(tmp_path, route):
    "Read at the same scale, whatever the side of the pictures that the model learned"
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], ['HUVEC-17'], size=64)
    model = untrained(screen, valid='HUVEC-02', size=32)
    cells, _ = cell_screen(screen.test, 'watershed', cell_side=16, cell_radius=3., cell_border='keep', cell_partial=True)
    assert model.spec_for(cells).size != model.spec.size
    a = model.embed(cells, tta=1, progress=False)
    if route == 'memory': b = model.profiles(cells, level='site', tta=1, progress=False)
    else:
        from rcic_fastai.embed.table import read_embeddings
        model.profile_file(cells, tmp_path/'p.parquet', level='site', tta=1, progress=False)
        b = read_embeddings(tmp_path/'p.parquet')
    b = b.set_index('Metadata_site_id').loc[a.Metadata_site_id].reset_index()
    np.testing.assert_allclose(emb_features(a), emb_features(b), atol=2e-5)

def test_a_record_says_what_an_answer_depends_on(tmp_path):
    "The channels that are read, and the batch size where BatchNorm takes statistics of batches"
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17'], ['HUVEC-17'])
    model = untrained(screen, valid='HUVEC-03')
    def record(name, *args, **kwargs):
        p = model.predict(screen, *args, out=tmp_path/name, tta=1, progress=False, **kwargs).set_index('id_code')
        return p, json.loads((tmp_path/name).with_suffix('.json').read_text())
    (a, few), (b, many) = (record(f'{bs}.csv', 'adapted', bs=bs) for bs in (3, 32))
    assert (a.score - b.score).abs().max() > 1e-6 and (few['bs'], many['bs']) == (3, 32)
    (a, few), (b, many) = (record(f'i{bs}.csv', bs=bs) for bs in (3, 32))
    assert (a.score - b.score).abs().max() < 1e-5 and few.get('bs') == many.get('bs')
    assert many['channels'] == list(model.spec.channels)

def test_a_record_names_the_channels_that_are_there(tmp_path):
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], ['HUVEC-17'])
    torch.manual_seed(0)
    model = learner(screen_dls(screen, valid='HUVEC-02', bs=8, device='cpu'), stem='bag').to_model(tta=1, progress=False)
    model.predict(screen.pick('nucleus,ER'), out=tmp_path/'two.csv', tta=1, progress=False)
    assert sorted(json.loads((tmp_path/'two.json').read_text())['channels']) == ['ER', 'nucleus']

@pytest.mark.parametrize('norm', ['own', 'plate'])
def test_the_pictures_that_statistics_are_of_change_between_two_runs(tmp_path, norm):
    "Of BatchNorm or of pixels: wells that are not embedded themselves"
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], ['HUVEC-17'], sites=1)
    model = untrained(screen, valid='HUVEC-02', norm=norm)
    test = screen.test.table
    few, how = test[:3], dict(tta=1, bs=2, part=2, progress=False, **(dict(adapt='experiment', adapt_rows=test) if norm == 'own' else dict(stat_rows=test)))
    def parts(): return embed_parts(tmp_path/'p', model.model, model.spec, Screen(few, open_screen(tmp_path/'screen').source), **how)
    parts()
    sorted((tmp_path/'p').glob('part-*'))[-1].unlink()
    def touch(well):
        for f in (f for f in Path(screen.source.root).rglob('*.png') if 'HUVEC-17' in str(f) and f.name.startswith(f'{well}_')): os.utime(f, (1, f.stat().st_mtime + 2))
    parts()
    sorted((tmp_path/'p').glob('part-*'))[-1].unlink()
    touch(test.well.iloc[-1])
    refused(parts, 'different pictures')

def test_scores_of_an_earlier_prediction_do_not_stay_beside_the_next(tmp_path):
    "An average would read them as those of the record; scores of somebody else stay"
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02'], ['HUVEC-02', 'RPE-02'], sites=1)
    models = CellTypeModels({c: untrained(screen[screen.table.cell_type == c]) for c in ('HUVEC', 'RPE')})
    for model, asked in ((models, screen), (models.models['RPE'], screen[screen.table.cell_type == 'RPE'])):
        out, file = tmp_path/'o.csv', tmp_path/'o.scores.parquet'
        model.predict(asked, out=out, tta=1, scores=True, progress=False)
        assert file.is_file()
        model.predict(asked, out=out, tta=1, progress=False)
        assert not file.exists()
        model.predict(asked, out=out, tta=1, scores=True, progress=False)
        file.write_bytes(b'mine')
        model.predict(asked, out=out, tta=1, progress=False)
        assert file.read_bytes() == b'mine'
        file.unlink()

def test_class_scores_are_not_written_as_embeddings(tmp_path):
    screen = drawn(tmp_path/'screen', ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-02'], ['HUVEC-02', 'RPE-02'], sites=1)
    models = CellTypeModels({c: untrained(screen[screen.table.cell_type == c]) for c in ('HUVEC', 'RPE')})
    for model, asked in ((models, screen), (models.models['RPE'], screen[screen.table.cell_type == 'RPE'])):
        refused(lambda: model.predict(asked, out=tmp_path/'o.csv', embeddings=tmp_path/'o.parquet', by='classifier', tta=1, progress=False), 'are no embeddings', 'profile_file')
    assert not list(tmp_path.glob('o.*parquet')) and not (tmp_path/'o.csv').exists()
