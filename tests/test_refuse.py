"A model shown what it does not know: one clear sentence and exit code 2, or a note that is kept with the predictions."
import json, re, shutil
import numpy as np, pandas as pd, pytest
from helpers import simulate_screen
from rcic_fastai import cli
from rcic_fastai.folder import load_model
from rcic_fastai.screen.images import ImageSource, PngTree
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.embed.index import EmbeddingIndex
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.screen.screen import Screen

class View(ImageSource):
    "A source of which every picture goes through a function"
    def __init__(self, source, table, f, channels=None):
        super().__init__(source.root, table, channels or source.channels)
        self.source, self.f, self.one = source, f, f(source[table.site_id.iloc[0]])
    shape, dtype = property(lambda self: self.one.shape), property(lambda self: self.one.dtype)
    def _read(self, site_id, out): out[...] = self.f(self.source[site_id])
    def missing(self): return pd.DataFrame(columns=['site_id', 'missing', 'file'])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('refuse')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, controls=0, progress=False)
    table = read_metadata(d/'screen'); source = PngTree(d/'screen', table)
    pack_screen(Screen(table, source), d/'screen.zarr', progress=False)
    (d/'tiny.json').write_text(json.dumps(dict(name='tiny', arch='test_efficientnet', model=dict(emb_dim=16), stages=[])))
    for screen, model in (('screen', 'from_files'), ('screen.zarr', 'model')):
        assert cli.rcic_train(f'{d}/{screen} {d}/{model} --recipe {d}/tiny.json --valid none --pretrained no --tta 1'.split()) == 0
    class made: pass
    made.dir, made.table, made.source = d, table, source
    return made

def packed(made, dest, f=lambda x: x, channels=None, rows=None):
    t = made.table if rows is None else rows
    return pack_screen(Screen(t, View(made.source, t, f, channels)), dest, progress=False)

def predict(made, screen, out, model='model', more=''): return cli.rcic_predict(f'{made.dir/model} {screen} {out} --tta 1 {more}'.split())

def refused(made, capsys, tmp_path, screen, says, **kw):
    capsys.readouterr()
    code, err = predict(made, screen, tmp_path/'x.csv', **kw), capsys.readouterr().err
    lines = [l for l in err.strip().splitlines() if l.startswith('rcic_predict: ')]
    assert code == 2 and len(lines) == 1 and re.search(says, lines[0]), (code, err[-2000:])
    assert not list(tmp_path.glob('x.*'))

def notes(made, capsys, tmp_path, screen, **kw):
    "What is said on the way and what is kept are the same"
    capsys.readouterr()
    assert predict(made, screen, tmp_path/'x.csv', **kw) == 0
    said = [l.removeprefix('note: ') for l in capsys.readouterr().err.splitlines() if l.startswith('note: ')]
    record = json.loads((tmp_path/'x.json').read_text())
    assert said == record['notes']
    return said, record

def test_what_the_model_knows_needs_no_note(made, capsys, tmp_path):
    for model in ('model', 'from_files'):
        assert notes(made, capsys, tmp_path, made.dir/'screen.zarr', model=model)[0] == []
    assert notes(made, capsys, tmp_path, made.dir/'screen')[0] == []

CH = ('nucleus', 'ER', 'actin', 'nucleoli', 'mitochondria', 'golgi')
@pytest.mark.parametrize('f, channels, says', [
    (lambda x: x[:5], CH[:5], r'trained on 6 channels .* the screen lacks golgi'),
    (lambda x: x, ('DNA', *CH[1:]), r'the screen lacks nucleus \(it has DNA, ER'),
    (lambda x: x.astype(np.uint16)*257, None, r'8-bit images and the screen has 16-bit'),
])
def test_other_channels_and_depths_are_refused(made, capsys, tmp_path, f, channels, says):
    refused(made, capsys, tmp_path, packed(made, tmp_path/'s.zarr', f, channels), says)

@pytest.mark.parametrize('f, says', [(lambda x: x//16, r'1/\d+ of the contrast'), (lambda x: np.where(x > np.median(x), 255, 0).astype(np.uint8), r'\d+ times the contrast')])
def test_pictures_on_another_scale_are_noted(made, capsys, tmp_path, f, says):
    said, _ = notes(made, capsys, tmp_path, packed(made, tmp_path/'s.zarr', f, rows=made.table[made.table.dataset == 'test']))
    assert re.search(says, ' '.join(said))

def test_fewer_bits_than_the_file_are_noted(made, capsys, tmp_path):
    "12 bits in a 16-bit file, for a model of 16 bits that fill it"
    full = packed(made, tmp_path/'full.zarr', lambda x: x.astype(np.uint16)*257)
    assert cli.rcic_train(f'{full} {made.dir}/deep --recipe {made.dir}/tiny.json --valid none --pretrained no --tta 1'.split()) == 0
    test = made.table[made.table.dataset == 'test']
    said, _ = notes(made, capsys, tmp_path, packed(made, tmp_path/'s.zarr', lambda x: x.astype(np.uint16)*16, rows=test), model='deep')
    assert len(said) == 1 and re.search(r'1/[12]\d of the contrast', said[0])

def test_an_unknown_cell_type_is_allowed_and_counted(made, capsys, tmp_path):
    t = made.table.copy()
    new = (t.dataset == 'test') & (t.plate == 1) & (t.well_type == 'treatment')
    t.loc[new, 'cell_type'] = 'A549'
    said, record = notes(made, capsys, tmp_path, packed(made, tmp_path/'s.zarr', rows=t[t.dataset == 'test']))
    assert record['unknown'] == {'cell_type': {'A549': int(new.sum())}} and len(said) == 1 and f'A549 ({new.sum()})' in said[0]

def test_a_store_packed_again_is_noted(made, capsys, tmp_path):
    t = made.table.copy()
    first = t.index[t.dataset == 'train'][0]
    t.loc[first, 'sirna'] = 'sirna_3'
    store = packed(made, tmp_path/'s.zarr', rows=t)
    said, _ = notes(made, capsys, tmp_path, store)
    assert len(said) == 1 and f'holds {((t.dataset == "train") & (t.well_type == "treatment")).sum()} sites of the index' in said[0]
    assert notes(made, capsys, tmp_path, store, model='from_files')[0] == []        # it was never trained on a store
    other = packed(made, tmp_path/'test.zarr', rows=t[t.dataset == 'test'])
    assert notes(made, capsys, tmp_path, other)[0] == []                            # holds nothing that was trained on

def test_a_store_that_was_changed_is_refused(made, capsys, tmp_path):
    shutil.copytree(made.dir/'screen.zarr', tmp_path/'s.zarr')
    test = made.table[made.table.dataset == 'test']
    t = pd.read_parquet(tmp_path/'s.zarr/sites.parquet'); t.loc[0, 'plate'] = 9; t.to_parquet(tmp_path/'s.zarr/sites.parquet')
    refused(made, capsys, tmp_path, tmp_path/'s.zarr', 'sites.parquet is damaged or was changed')
    shutil.rmtree(tmp_path/'s.zarr'); shutil.copytree(made.dir/'screen.zarr', tmp_path/'s.zarr')
    a, b = (tmp_path/f's.zarr/images/c/{i}/0/0/0' for i in test.index[test.well_type == 'treatment'][:2])
    a.write_bytes(b.read_bytes())
    refused(made, capsys, tmp_path, tmp_path/'s.zarr', 'its checksum is wrong')

def test_the_index_of_another_model_is_refused(made, capsys, tmp_path):
    assert cli.rcic_train(f'{made.dir}/screen {tmp_path}/m --recipe {made.dir}/tiny.json --valid none --pretrained no --tta 1 --seed 7'.split()) == 0
    for f in ('index.json', 'index.safetensors', 'index.rows.json'): shutil.copy(made.dir/'model'/f, tmp_path/'m'/f)
    capsys.readouterr()
    refused(made, capsys, tmp_path, made.dir/'screen', 'index.* is not the file that was saved|built by another model', model=str(tmp_path/'m'))
    mine = load_model(made.dir/'model')
    with pytest.raises(ValueError, match='built by another model'): EmbeddingIndex.load(made.dir/'model', 'f'*64)
    with pytest.raises(ValueError, match='built by another model'): mine.index.check_model('f'*64)
