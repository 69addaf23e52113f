"The 18 real sites: ImageNet features, own-image normalization and the FAISS index find the cell type across plates and batches."
import os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from rcic_fastai.screen.tables import real_data, read_metadata
from rcic_fastai.screen.images import PngTree, only_present
from rcic_fastai.batch.data import ScreenSpec, META_COLUMNS, meta_vocab, spec_dl
from rcic_fastai.model.model import create_screen_model
from rcic_fastai.embed.embed import embed_dl
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import make_emb_table
from rcic_fastai.screen.screen import Screen

ROOT = Path(__file__).resolve().parents[1]
REAL = real_data()

def features_of_real_sites(root, size=320):
    "(site table of the complete sites, average-pooled ImageNet features [N,F] over eight views)"
    table = read_metadata(root)
    table, _ = only_present(table, PngTree(root, table))
    source = PngTree(root, table)
    model = create_screen_model('efficientnet-lite0', 2, pretrained=True, neck='identity').eval()
    spec = ScreenSpec('cell_type', [], list(source.channels), {c: meta_vocab([]) for c in META_COLUMNS}, size=size)
    pooled = embed_dl(model, spec_dl(spec, Screen(table, source), bs=6, device='cpu'), tta=8, progress=False)
    return table, pooled[:, :pooled.shape[1]//2]            # the average half of the concat pool

def nearest_outside_plate(meta, x):
    "One row a site: its nearest neighbor that is not on its own plate"
    meta = meta.reset_index(drop=True)
    index = EmbeddingIndex(make_emb_table(meta, x), target='cell_type')
    cos, rows = index.search(x, k=len(x))
    plate = (meta.experiment + '_' + meta.plate.astype(str)).to_numpy()
    first = (plate[rows] != plate[:, None]).argmax(1)
    at = rows[np.arange(len(x)), first]
    return meta.assign(found=meta.site_id.to_numpy()[at], found_cell_type=meta.cell_type.to_numpy()[at],
                       found_experiment=meta.experiment.to_numpy()[at], cosine=cos[np.arange(len(x)), first])

@pytest.mark.real('images')
def test_nearest_neighbor_has_the_right_cell_type():
    near = nearest_outside_plate(*features_of_real_sites(REAL))
    assert len(near) == 18
    assert (near.cell_type == near.found_cell_type).all(), near[near.cell_type != near.found_cell_type][['site_id', 'found']]

@pytest.mark.real('images')
def test_hepg2_08_finds_hepg2_01_across_batches():
    meta, x = features_of_real_sites(REAL)
    new = (meta.experiment == 'HEPG2-08').to_numpy()
    index = EmbeddingIndex(make_emb_table(meta[~new], x[~new]), target='experiment')
    _, rows = index.search(x[new], k=1)
    assert index.labels.experiment.to_numpy()[rows[:, 0]].tolist() == ['HEPG2-01']*2


# ---- where they are looked for

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A clone in a folder of another name, with `shared` a link beside it"
    top = tmp_path_factory.mktemp('clone')
    (top/'elsewhere/data/rxrx1/metadata').mkdir(parents=True)
    (top/'shared').symlink_to(top/'elsewhere')
    shutil.copytree(ROOT/'rcic_fastai', top/'project/rcic_fastai', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', top/'project')
    (top/'link').mkdir()
    (top/'link/project').symlink_to(top/'project')
    return top

def found(folder, cwd, **env):
    "What `real_data` says for tables and images, in a process of its own"
    text = 'from rcic_fastai.screen.tables import real_data\nprint(real_data())\nprint(real_data("images"))'
    done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, cwd=cwd,
                          env={k: v for k, v in os.environ.items() if k != 'RCIC_REAL'} | dict(PYTHONPATH=str(folder)) | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()

@pytest.mark.parametrize('project', ['project', 'link/project'])
@pytest.mark.parametrize('cwd', ['project', '.'])
def test_real_tables_are_found_beside_any_checkout(checkout, project, cwd):
    (tables, images) = found(checkout/project, checkout/cwd)
    assert Path(tables).resolve() == checkout/'elsewhere/data/rxrx1' and images == 'None'

def test_the_named_folder_is_the_only_one(checkout, tmp_path):
    for d in ('metadata', 'images'): (tmp_path/d).mkdir()
    assert found(checkout/'project', tmp_path, RCIC_REAL=str(tmp_path)) == [str(tmp_path)]*2
    assert found(checkout/'project', tmp_path, RCIC_REAL=str(tmp_path/'images')) == ['None']*2

def test_nothing_but_the_helper_looks_for_real_files():
    "No test, notebook, bench or module has a way of its own to the real files, or a skip of its own"
    for f in [p for d in ('tests', 'nbs', 'bench', 'rcic_fastai') for p in (ROOT/d).rglob('*') if p.suffix in ('.py', '.ipynb')]:
        if f == Path(__file__).resolve() or f.name in ('conftest.py', '01_screen.tables.ipynb', 'tables.py'): continue
        text = f.read_text(encoding='utf-8')
        assert not re.search(r"""environ[^\n]{0,9}RCIC_REAL|getenv\(.RCIC_REAL|shared/data|real_data\(\) is None|skipif\(REAL""", text), f.name
