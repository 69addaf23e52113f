"Nothing is removed but what the library wrote: a stranger's file, folder or link stays, wherever it lies."
import ast, json, re, shutil
from pathlib import Path
import pandas as pd, pytest
import rcic_fastai
from helpers import simulate_screen
from rcic_fastai import folder as F, workflow
from rcic_fastai.core import ScreenError
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.embed.embed import embed_parts
from rcic_fastai.predict.predict import write_predictions
from rcic_fastai.results.report import write_report
from rcic_fastai.screen.simulate.labels import LABELS_FOLDER
from rcic_fastai.results.explore import PAGE_FOLDER
from rcic_fastai.results.export import IMAGES_FOLDER, PLATES_FOLDER
from rcic_fastai.screen import download as D
from rcic_fastai.screen.simulate import layout as S
from rcic_fastai.screen.images import PngTree
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.train import checkpoints as C
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.screen.screen import Screen

LIBRARY = Path(rcic_fastai.__file__).parent
FACTS = dict(stage=0, epoch=1, facts={}, extra={}, state={})

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('removal')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=4, size=32, plates=1, controls=0, progress=False)
    table = read_metadata(d/'screen')
    source = PngTree(d/'screen', table)
    dls = screen_dls(Screen(table, source), valid='HUVEC-02', bs=8, device='cpu')
    class made: pass
    made.dir, made.table, made.source, made.learn = d, table, source, screen_learner(dls, 'test_efficientnet', emb_dim=16, pretrained=None)
    made.index = workflow.build_index(made.learn, 1, progress=False)
    return made

class Stranger:
    "Files, folders and links of somebody else in a folder, and what they looked like"
    def __init__(self, folder, outside):
        self.folder = folder
        outside.mkdir(exist_ok=True)
        (outside/'thesis.txt').write_text('years of work')
        folder.mkdir(parents=True, exist_ok=True)
        (folder/'notes.txt').write_text('look at this one')
        (folder/'mine').mkdir()
        (folder/'mine/part-00000.parquet').write_bytes(b'mine')
        (folder/'epoch_0009').mkdir()
        (folder/'epoch_0009/state.json').write_text('{}')
        (folder/'linked').symlink_to(outside)
        (folder/'linked.txt').symlink_to(outside/'thesis.txt')
        self.names, self.outside = ['notes.txt', 'mine/part-00000.parquet', 'epoch_0009/state.json', 'linked/thesis.txt', 'linked.txt'], outside
        self.were = self.now()
    def now(self): return {n: (self.folder/n).read_bytes() for n in self.names if (self.folder/n).exists()}
    def intact(self, where=None):
        self.folder = where or self.folder
        return self.now() == self.were and (self.outside/'thesis.txt').exists()

def tried(func, *args, **kw):
    "The call may refuse, in a sentence"
    try: func(*args, **kw)
    except ScreenError as e: assert '\n' not in str(e)

def parts_of(made, folder): return embed_parts(folder, made.learn.model, made.learn.dls.spec, Screen(made.table, made.source), bs=8, tta=1, part=8, progress=False)

# Each: (a folder that may be removed, a function that removes it); `ours`: after it was made by the library

def demo(made, d, ours):
    if ours: workflow.DEMO_FOLDER.make(d/'demo')
    def again():
        with pytest.MonkeyPatch.context() as m:
            m.setattr(workflow, 'simulate_screen', lambda out, **kw: (_ for _ in ()).throw(ScreenError('Far enough.')))
            workflow.run_demo(d/'demo', force=True)
    return d/'demo', again

def part_of_index(made, folder): made.learn.embed(made.learn.dls.train.items, tta=1, mask=workflow.INDUCTIVE_MASK, progress=False, folder=folder)

def embedding_parts(made, d, ours):
    parts = parts_of(made, d/'p')
    if not ours: shutil.rmtree(d/'p')
    return d/'p', parts.remove

def index_parts(made, d, ours):
    if ours: part_of_index(made, d/'index/plain')
    else: (d/'index').mkdir()
    return d/'index', lambda: workflow.build_index(made.learn, 1, progress=False, folder=d/'index')

def index_plain(made, d, ours):
    if ours: part_of_index(made, d/'index/plain')
    return d/'index/plain', lambda: workflow.build_index(made.learn, 1, progress=False, folder=d/'index')

def trained(made, d, ours):
    if ours: C.write_checkpoint(d/'m.checkpoints', 1, FACTS, {})
    made.learn.to_model(made.index).save(d/'m')
    return d/'m.checkpoints', lambda: workflow.is_finished(d/'m')

def trained_index(made, d, ours):
    if ours: parts_of(made, d/'m.index.part/plain')
    folder = d/('m.index.part/plain' if ours else 'm.index.part')
    if not ours: (folder/'x').mkdir(parents=True); (folder/'x/parts.json').write_text('{}')
    return folder, lambda: workflow._index_parts(d/'m', made.learn, dict(tta=2))

def checkpoint(name, keep=1):
    def one(made, d, ours):
        if ours and not name.endswith('.part'): C.write_checkpoint(d/'c', int(name[6:]), FACTS, {})
        return d/'c'/name, lambda: [C.write_checkpoint(d/'c', n, FACTS, {}, keep) for n in (2, 3)]
    return one

def model_part(made, d, ours):
    if ours: F.MODEL_FOLDER.make(d/'m.part')
    return d/'m.part', lambda: made.learn.to_model(made.index).save(d/'m')

def store_part(made, d, ours):
    if ours:
        with pytest.MonkeyPatch.context() as m:
            m.setattr('rcic_fastai.screen.pack._finish', lambda *a: (_ for _ in ()).throw(OSError(28, 'full')))
            tried(pack_screen, Screen(made.table, made.source), d/'s.zarr', progress=False)
    return d/'s.zarr.part', lambda: pack_screen(Screen(made.table, made.source), d/'s.zarr', progress=False, force=True)

def store_begun(made, d, ours):
    folder, _ = store_part(made, d, ours)
    return folder, lambda: pack_screen(Screen(made.table, made.source), d/'s.zarr', progress=False)

def cell_types(made, d, ours):
    if ours: F.CELLS_FOLDER.make(d/'o.csv.cells')
    return d/'o.csv.cells', lambda: F.CELLS_FOLDER.remove(d/'o.csv.cells')

def images_with_labels(made, d, ours):
    if ours: LABELS_FOLDER.make(d/'atlas')
    return d/'atlas', lambda: LABELS_FOLDER.remove(d/'atlas')

def page(made, d, ours):
    if ours: PAGE_FOLDER.make(d/'page')
    return d/'page', lambda: PAGE_FOLDER.remove(d/'page')

def plates(made, d, ours):
    if ours: PLATES_FOLDER.make(d/'plates')
    return d/'plates', lambda: PLATES_FOLDER.remove(d/'plates')

def images_of_profiles(made, d, ours):
    if ours: IMAGES_FOLDER.make(d/'pictures')
    return d/'pictures', lambda: IMAGES_FOLDER.remove(d/'pictures')

def validation(made, d, ours):
    if ours: workflow._VALIDATED.make(d/'m.validated')
    return d/'m.validated', lambda: workflow.remove_unfinished(d/'m')

REMOVE = dict(demo=demo, page=page, plates=plates, images_of_profiles=images_of_profiles, validation=validation, images_with_labels=images_with_labels, cell_types=cell_types, embedding_parts=embedding_parts, index_parts=index_parts, index_plain=index_plain, trained=trained,
              trained_index=trained_index, checkpoint_old=checkpoint('epoch_0001'), checkpoint_same=checkpoint('epoch_0003'),
              checkpoint_part=checkpoint('epoch_0004.part'), model_part=model_part, store_part=store_part, store_begun=store_begun)
MOVED = dict(store_part='s.zarr', store_begun='s.zarr', model_part='m', checkpoint_same='c/epoch_0003')    # what was finished has a new name

@pytest.mark.parametrize('ours', [True, False], ids=['ours', 'somebody else\'s'])
@pytest.mark.parametrize('what', REMOVE)
def test_a_stranger_stays(made, tmp_path, what, ours):
    folder, remove = REMOVE[what](made, tmp_path, ours)
    stranger = Stranger(folder, tmp_path/'outside')
    tried(remove)
    moved = tmp_path/MOVED.get(what, 'nowhere')
    assert stranger.intact(folder if folder.exists() else moved)

@pytest.mark.parametrize('what', REMOVE)
def test_a_folder_of_links_stays(made, tmp_path, what):
    "The folder itself is a link to somebody else's"
    folder, remove = REMOVE[what](made, tmp_path, False)
    stranger = Stranger(tmp_path/'work', tmp_path/'outside')
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(tmp_path/'work')
    tried(remove)
    assert stranger.intact()

@pytest.mark.parametrize('what', REMOVE)
def test_a_file_of_the_right_name_is_no_marker(made, tmp_path, what):
    folder, remove = REMOVE[what](made, tmp_path, False)
    stranger = Stranger(folder, tmp_path/'outside')
    markers = [folder/o for o in ('.rcic_demo', '.rcic_fastai.json', 'screen/x', 'parts.json', 'pack.json', 'state.json', 'SHA256SUMS')]
    for o in markers:
        o.parent.mkdir(exist_ok=True)
        o.touch()
    tried(remove)
    assert stranger.intact() and all(o.exists() for o in markers)

def test_what_is_ours_goes(made, tmp_path):
    for what in REMOVE:
        if what in ('demo', 'checkpoint_same', 'checkpoint_part'): continue
        (tmp_path/what).mkdir()
        folder, remove = REMOVE[what](made, tmp_path/what, True)
        remove()
        assert not folder.exists(), what

def test_every_kind_of_folder_is_tried():
    from rcic_fastai.core import OwnFolder
    assert {k for k in OwnFolder.kinds} == {'demo', 'embedding parts', 'checkpoint', 'unfinished model', 'packed screen', 'simulated screen', 'simulated images with labels', 'predictions of cell types', 'page', 'OME-Zarr plates', 'profiles with images', 'validation'}

def test_a_demo_with_something_in_the_way_removes_nothing(tmp_path):
    out = workflow.DEMO_FOLDER.make(tmp_path/'demo')
    (out/'report.html').touch()
    (out/'model').mkdir(); (out/'model/my.txt').touch()
    with pytest.raises(ScreenError, match='model/my.txt, which rcic_demo did not write: move it elsewhere'): workflow.run_demo(out, force=True)
    assert (out/'report.html').exists()

def test_what_a_demo_writes_is_all_its_own(made, tmp_path):
    out = workflow.DEMO_FOLDER.make(tmp_path/'demo')
    simulate_screen(out/'screen', ['HUVEC-01'], sirnas=2, size=32, plates=1, controls=0, progress=False)
    pack_screen(Screen(made.table, made.source), out/'screen.zarr', progress=False)
    made.learn.to_model(made.index).save(out/'model')
    C.write_checkpoint(out/'model.checkpoints', 1, FACTS, {})
    parts_of(made, out/'inductive.csv.part')
    for f in ('report.html', 'explore.html', 'adapted.embeddings.parquet', 'adapted.csv', 'adapted.json', 'adapted.top.csv', 'neighbors.parquet', 'results.json', 'model.lock'): (out/f).touch()
    assert workflow.DEMO_FOLDER.strangers(out) == []
    assert workflow.DEMO_FOLDER.remove(out) and not out.exists()

def test_killed_when_only_the_marker_was_left(made, tmp_path):
    from rcic_fastai.core import OwnFolder
    pack_screen(Screen(made.table, made.source), tmp_path/'s.zarr', progress=False)
    made.learn.to_model(made.index).save(tmp_path/'m')
    were = {f: sorted(p.name for p in (tmp_path/f).iterdir()) for f in ('s.zarr', 'm')}
    for f, kind in (('s.zarr', 'packed screen'), ('m', 'unfinished model')):
        (tmp_path/f/'.rcic_fastai.json').write_text(json.dumps(OwnFolder.kinds[kind]._facts()))
    pack_screen(Screen(made.table, made.source), tmp_path/'s.zarr', progress=False)
    assert workflow.is_finished(tmp_path/'m')
    assert {f: sorted(p.name for p in (tmp_path/f).iterdir()) for f in were} == were

# Single files

def test_a_simulation_that_fails(tmp_path, monkeypatch):
    def draw(jobs, studio, folder, *args): Stranger(folder, tmp_path/'outside'); raise KeyboardInterrupt
    monkeypatch.setattr(S, '_draw_all', draw)
    with pytest.raises(KeyboardInterrupt): simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=4, size=32, plates=1, progress=False)
    left, = tmp_path.glob('.s.*')
    assert (left/'notes.txt').exists() and (left/'mine/part-00000.parquet').exists() and (tmp_path/'outside/thesis.txt').exists()

@pytest.mark.parametrize('files', [['f.bin.part'], ['f.bin.part.json'], ['f.bin.part', 'f.bin.part.json']])
def test_the_part_of_another_download(tmp_path, monkeypatch, files):
    for f in files: (tmp_path/f).write_text('{"of": "my browser"}')
    monkeypatch.setattr(D, '_ask', lambda *a: pytest.fail('asked'))
    with pytest.raises(ScreenError, match='move both elsewhere'): D.fetch_file('http://localhost:1/f.bin', tmp_path/'f.bin', progress=False)
    assert all((tmp_path/f).read_text() == '{"of": "my browser"}' for f in files)

@pytest.mark.parametrize('ours', [True, False])
def test_the_archive_of_the_user(tmp_path, monkeypatch, ours):
    archive = tmp_path/'rx/archives/rxrx1-metadata.zip'
    def fetch(url, path, *args): Path(path).parent.mkdir(parents=True); Path(path).write_bytes(b'zip')
    if not ours: fetch('', archive)
    monkeypatch.setattr(D, 'fetch_file', fetch)
    monkeypatch.setattr(D, 'unpack_archive', lambda *a: (1, 1))
    D.download_rxrx1(tmp_path/'rx', progress=False)
    assert archive.exists() == (not ours) and sorted(p.name for p in archive.parent.iterdir())[0] == 'metadata.json'

@pytest.mark.parametrize('name', ['p.json', 'p.top.csv'])
@pytest.mark.parametrize('tops', [True, False])
def test_files_beside_predictions(tmp_path, name, tops):
    pred = pd.DataFrame(dict(id_code=['a'], sirna=['s'], protocol='inductive', **(dict(top_1='s') if tops else {})))
    (tmp_path/name).write_text('{"mine": 1}')
    with pytest.raises(ScreenError, match=f'{re.escape(name)} would be overwritten, and rcic_fastai did not write it'): write_predictions(pred, tmp_path/'p.csv')
    assert (tmp_path/name).read_text() == '{"mine": 1}' and not (tmp_path/'p.csv').exists()
    write_predictions(pred, tmp_path/'q.csv'); write_predictions(pred, tmp_path/'q.csv')

def test_files_beside_a_report(tmp_path):
    (tmp_path/'r.html.part').write_text('mine')
    write_report(tmp_path/'r.html', 'title', [])
    assert (tmp_path/'r.html.part').read_text() == 'mine'

# The source

REMOVERS = {'core.py': {'remove', 'remove_empty', 'unmark', '_temporary', '_remove_stale', '_put_lock', 'release'},
            'screen/download.py': {'_forget', '_receive', '_remove_fetched'}, 'screen/pack.py': {'_finish', '_name'},
            'predict/predict.py': {'write_predictions'}, 'predict/plan.py': {'drop_earlier'}, 'folder.py': {'save'}, 'workflow.py': {'_several_in'},
            'results/export.py': {'_write_all'}}      # records of their own, looked at before

def removals(path):
    "(function, what it calls) of each call that removes something"
    tree, found = ast.parse(path.read_text()), []
    def look(node, func):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)): func = getattr(node, 'name', func)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ''
        if name in ('rmtree', 'unlink', 'rmdir', 'removedirs', 'delete_dir', 'move'): found.append((func, name))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == 'os.remove': found.append((func, 'remove'))
        for child in ast.iter_child_nodes(node): look(child, func)
    look(tree, '')
    return found

@pytest.mark.parametrize('path', sorted(LIBRARY.rglob('*.py')), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_nothing_else_removes(path):
    found = removals(path)
    assert 'rmtree' not in [name for _, name in found]
    assert {func for func, _ in found} <= REMOVERS.get(str(path.relative_to(LIBRARY)), set())
    assert not re.search(r"open_group\([^)]*mode='w'|overwrite=True", path.read_text())
