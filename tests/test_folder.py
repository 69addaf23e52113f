"Model folders: kept whole, opened anywhere, and hostile ones: damaged by accident, damaged on purpose, and never run."
import copy, json, os, pickle, random, re, resource, shutil, sys, time, warnings, zipfile
from functools import lru_cache
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from rcic_fastai import folder as F
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.folder import MODEL_FILES, load_model
from rcic_fastai.predict import trained
from rcic_fastai.predict.trained import MODEL_LICENSE
from rcic_fastai.screen.images import PngTree
from rcic_fastai.train.learner import screen_learner
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.screen import Screen
from rcic_fastai.screen.simulate.layout import simulate_screen      # bench/soak.py takes this file alone
from rcic_fastai.screen.tables import read_metadata
from rcic_fastai.core import file_facts, json_hash
from rcic_fastai.embed.index import INDEX_FILES, EmbeddingIndex
from rcic_fastai.embed.table import emb_features, make_emb_table

CASES = int(os.environ.get('FUZZ', 500))     # a soak: FUZZ=10000
ALL = (*MODEL_FILES, 'config.json', 'README.md')
PROBE = torch.rand(2, 6, 64, 64, generator=torch.Generator().manual_seed(0))
WATCHED, SEEN = [False], []

def watch(event, args):
    "Notes what a model folder must never cause: code that is found or started, and the network"
    if WATCHED and WATCHED[0] and event in ('pickle.find_class', 'os.system', 'os.exec', 'subprocess.Popen', 'socket.connect', 'socket.getaddrinfo'): SEEN.append((event, args))
sys.addaudithook(watch)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A learner that was trained for no epoch, its screen, an index and the folder"
    d = tmp_path_factory.mktemp('folder')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=64, controls=2, progress=False)
    table = read_metadata(d/'screen'); source = PngTree(d/'screen', table)
    learn = screen_learner(screen_dls(Screen(table, source), valid='HUVEC-02', bs=16, device='cpu'), 'test_efficientnet',
                           metadata='cell_type', emb_dim=16, pretrained=None)
    learn.history = pd.DataFrame(dict(stage=['a', 'a'], epoch=[0, 1], valid_loss=[2., 1.], accuracy=[.25, .5]))
    emb = learn.embed(learn.dls.train.items, tta=1, progress=False)
    index = EmbeddingIndex(emb)
    learn.to_model(index, seed=3, license='Mine.', note=dict(path=d, nan=np.float32('nan'), n=np.int64(3))).save(d/'model')
    class made: pass
    made.dir, made.table, made.source, made.learn, made.index, made.folder, made.emb = d, table, source, learn, index, d/'model', emb
    made.answer = answer(load_model(d/'model'))
    return made

def answer(m):
    "What a model says: cosines, embeddings, neighbors, and the names of all of it"
    with torch.no_grad(): x, y = m.model(PROBE), m.model.embed(PROBE)
    return x.numpy(), y.numpy(), *m.index.search(y.numpy(), 3), repr(m.spec), m.index.labels.to_csv(), m.index.target, m.index.kind

def same(a, b): return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b, strict=True))

def seal(d):
    "Make sizes and hashes fit again, as somebody who means harm would; leaves alone what is not JSON"
    def entries(f):
        try: return json.loads((d/f).read_text())
        except (ValueError, OSError, RecursionError): return None
    def write(f, o): (d/f).write_text(json.dumps({**o, 'sha256': json_hash(o)}))
    facts = lambda names: {n: file_facts(d/n) for n in names if (d/n).is_file()}
    i, c = entries('index.json'), entries('config.json')
    try:
        if isinstance(i, dict) and isinstance(i.get('files'), dict): write('index.json', {**i, 'files': {**i['files'], **facts(INDEX_FILES)}})
        if isinstance(c, dict) and isinstance(c.get('files'), dict): write('config.json', {**c, 'files': {**c['files'], **facts(MODEL_FILES)}})
    except RecursionError: pass

def change(d, f, **entries):
    c = json.loads((d/f).read_text())
    for path, v in entries.items():
        *at, last = path.split('__')
        o = c
        for k in at: o = o[k]
        o[last] = v
    (d/f).write_text(json.dumps(c))
    seal(d)

@pytest.fixture
def hostile(made, tmp_path):
    shutil.copytree(made.folder, tmp_path/'m')
    return tmp_path/'m'

@pytest.fixture
def quick(monkeypatch):
    "The network of each description is built once: hundreds of folders differ in other things"
    build = F.create_screen_model
    kept = lru_cache(None)(lambda text, meta: build(**json.loads(text)))
    monkeypatch.setattr(F, 'create_screen_model', lambda **kw: kept(json.dumps(kw), torch.empty(0).device.type == 'meta'))

def refused(d, says=None):
    "One sentence, nothing run, no network, little memory, at once"
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    WATCHED[0] = True
    try:
        with pytest.raises(ScreenError, match=says) as e: load_model(d)
    finally: WATCHED[0] = False
    text = str(e.value)
    assert '\n' not in text and text[-1] in '.?' and text.isprintable() and len(text) < 600, text
    assert not SEEN and time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000      # kB

# kept whole

def test_the_same_model_comes_back(made):
    m = load_model(made.folder)
    emb = m.embed(Screen(made.learn.dls.train.items, made.source), tta=1, progress=False)
    np.testing.assert_array_equal(emb_features(emb), emb_features(made.emb))
    assert emb.attrs['model'] == m.fingerprint == F.model_fingerprint(made.learn.model, made.learn.dls.spec) == m.index.model
    np.testing.assert_array_equal(m.index.features, made.index.features)
    assert m.spec == made.learn.dls.spec and m.model.config == made.learn.model.config and not m.model.training
    c = m.config
    assert (c['seed'], c['license'], c['note']) == (3, 'Mine.', dict(path=str(made.dir), nan=None, n=3))
    assert c['metrics']['accuracy'] == .5 and c['metrics']['protocol'] == 'inductive' and c['held_out'] == ['HUVEC-02']
    facts = trained.data_fingerprint(made.learn.dls.train.items, made.source)
    assert {k: v for k, v in c['data'].items() if k != 'exposure'} == json.loads(json.dumps(facts))
    assert {r['experiment'] for r in c['data']['exposure']} == {*made.learn.dls.train.items.experiment}
    assert {p.name for p in made.folder.iterdir()} == set(ALL) and set(c['files']) == set(MODEL_FILES)

def test_saved_again_it_is_the_same_folder(made, tmp_path):
    for n in ('a', 'b'): made.learn.to_model(load_model(made.folder).index).save(tmp_path/n)
    assert all((tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes() for f in ALL)
    assert all((tmp_path/'a'/f).read_bytes() == (made.folder/f).read_bytes() for f in INDEX_FILES)

def test_loading_draws_no_random_number(made):
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    load_model(made.folder)
    got = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    assert got == (torch.rand(1).item(), np.random.rand(), random.random())

def test_pictures_of_another_size(made):
    "A model that takes pictures as they are says when they are of another side"
    from dataclasses import replace
    from types import SimpleNamespace
    data, spec = trained.data_fingerprint(made.learn.dls.train.items, made.source), made.learn.dls.spec
    side, wide = made.source.shape[-1], SimpleNamespace(shape=(6, 128, 128))
    assert data['side'] == side and trained._size_notes(data, spec, made.source) == []
    assert f'are 128 px wide and the model was trained on {side}' in trained._size_notes(data, replace(spec, size=None), wide)[0]
    assert trained._size_notes(data, replace(spec, size=64), wide) == [] and trained._size_notes({}, spec, wide) == []

def test_data_fingerprint(made):
    rows = made.learn.dls.train.items
    one = trained.data_fingerprint(rows)
    assert one == trained.data_fingerprint(rows.iloc[::-1].reset_index(drop=True)) and one['sites'] == {'HUVEC-01': len(rows)}
    backwards = (trained.data_fingerprint(r, made.source, most=3) for r in (rows, rows.iloc[::-1].reset_index(drop=True)))
    assert next(backwards) == next(backwards)            # the same sites are measured
    assert one['sha256'] != trained.data_fingerprint(rows.iloc[1:])['sha256'] != trained.data_fingerprint(rows.assign(sirna='x'))['sha256']
    pixels = np.stack([made.source[i] for i in rows.site_id])/255
    for i, (name, s) in enumerate(trained.data_fingerprint(rows, made.source)['channels'].items()):
        assert name == made.source.channels[i]
        assert s['mean'] == pytest.approx(pixels[:, i].mean(), abs=1e-5) and s['std'] == pytest.approx(pixels[:, i].std(), abs=1e-5)

def test_card(made):
    card = (made.folder/'README.md').read_text()
    for part in ('license: other', 'HUVEC-01', '**0.500** (protocol inductive', '| 6 | golgi |', 'Mine.', 'Limits'): assert part in card
    config = json.loads((made.folder/'config.json').read_text())
    assert 'CC BY-NC-SA 4.0' in F.model_card({**config, 'license': MODEL_LICENSE}) and 'no_experiment' not in card
    assert 'nothing is known of its accuracy' in F.model_card({**config, 'metrics': {}})
    (copy_of := made.dir/'edited'); shutil.copytree(made.folder, copy_of)
    (copy_of/'README.md').write_text('# Edited by a person'); (copy_of/'.gitattributes').write_text('')
    assert same(answer(load_model(copy_of)), made.answer)

def test_strangers_in_the_folder_are_named_and_not_read(hostile, made):
    (hostile/'optimizer.pkl').write_bytes(pickle.dumps(Evil(hostile/'ran')))
    with pytest.warns(UserWarning, match='optimizer.pkl'): assert same(answer(load_model(hostile)), made.answer)

@pytest.mark.parametrize('versions, says', [(dict(torch='1.13.1+cu117'), 'torch 1.13.1'), (dict(torch='9', timm='0.1'), 'torch 9 .*timm 0.1'),
                                            (dict(torch=torch.__version__.split('+')[0] + '+cu999'), None), ({'faiss-cpu': None}, None)])
def test_versions(hostile, made, versions, says):
    now = json.loads((hostile/'config.json').read_text())['versions']
    change(hostile, 'config.json', versions={**now, **versions})
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert same(answer(load_model(hostile)), made.answer)
    said = [str(o.message) for o in w if 'was saved with' in str(o.message)]
    assert len(said) == (says is not None)
    if says: assert re.search(says, said[0])

def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(trained, '_PACKAGES', ('faiss-gpu-of-tomorrow', 'torch'))
    assert trained.library_versions()['faiss-gpu-of-tomorrow'] is None and trained.library_versions()['torch']

# whole or not at all

def test_killed_while_writing(made, tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(F, 'model_card', stop)
    with pytest.raises(KeyboardInterrupt): made.learn.to_model(made.index).save(tmp_path/'m')
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    F.MODEL_FOLDER.make(tmp_path/'m.part'); (tmp_path/'m.part/weights.safetensors').write_text('of a run that was killed')
    (tmp_path/'m').mkdir()
    assert same(answer(load_model(made.learn.to_model(made.index).save(tmp_path/'m'))), made.answer)
    assert [p.name for p in tmp_path.iterdir()] == ['m']

def spoiled(learn, **how):
    "A learner with a changed copy of the model"
    o = copy.copy(learn)
    o.model = copy.deepcopy(learn.model)
    if 'nan' in how: o.model.neck[2].weight.data[0, 0] = np.nan
    if 'other' in how: o.model.neck[2].weight.data[0, 0] += 1
    if 'kwargs' in how: o.model.backbone_config = {**o.model.backbone_config, 'pretrained_cfg': 'x'}
    return o

@pytest.mark.parametrize('how, info, says', [
    (dict(nan=1), {}, r'neck\.2\.weight of the model holds numbers that are not finite'), ({}, dict(files=3), 'files is what a model folder says'),
    (dict(other=1), {}, 'built by another model'), (dict(kwargs=1), {}, "'pretrained_cfg' is 'x', which must be left out")])
def test_what_could_not_be_read_is_not_written(made, tmp_path, how, info, says):
    index = load_model(made.folder).index
    if 'nan' in how: index.model = None      # else its fingerprint is what differs first
    with pytest.raises(ScreenError, match=says): spoiled(made.learn, **how).to_model(index, **info).save(tmp_path/'m')
    assert not list(tmp_path.iterdir())

# a screen for the model

class Fake:
    "As much of a source as is looked at before a picture is read"
    def __init__(self, channels, dtype='uint8'): self.channels, self.dtype = channels, np.dtype(dtype)

NAMES = ['nucleus', 'ER', 'actin', 'nucleoli', 'mitochondria', 'golgi']

@pytest.mark.parametrize('source, says', [
    (Fake(NAMES[:3]), '6 channels'), (Fake(['x', *NAMES[1:]]), 'lacks nucleus.*same names'), (Fake(NAMES, 'uint16'), '8-bit')])
def test_another_screen(made, source, says):
    with pytest.raises(ScreenError, match=says): load_model(made.folder).embed(Screen(made.table, source))

def test_unknown_cell_types(made):
    m, rows = load_model(made.folder), made.table.head(4).reset_index(drop=True)
    odd = rows.assign(cell_type=['A549', 'A549', None, 'HUVEC'])
    assert trained.unknown_metadata(m.spec, odd) == dict(cell_type={'A549': 2, 'none': 1}) and trained.unknown_metadata(m.spec, rows) == {}
    with pytest.warns(UserWarning, match=r'3 of 4 sites have a cell_type.*A549 \(2\)'): emb = m.embed(Screen(odd, made.source), tta=1, progress=False)
    assert np.isfinite(emb_features(emb)).all()
    assert trained.unknown_metadata(m.spec, odd, mask=('cell_type', 'experiment', 'plate_group')) == {}

# hostile, one by one

class Evil:
    "Leaves a file behind when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (Path(self.path),)

def zipped(o, path):
    "As torch.save writes"
    with zipfile.ZipFile(path, 'w') as z: z.writestr('archive/data.pkl', pickle.dumps(o))

@pytest.mark.parametrize('name', ALL[:-1])
@pytest.mark.parametrize('how', ['pickle', 'zip', 'npy'])
def test_a_pickle_of_another_name(hostile, name, how):
    ran = hostile.parent/'ran'
    if how == 'pickle': (hostile/name).write_bytes(pickle.dumps(Evil(ran)))
    elif how == 'zip': zipped(Evil(ran), hostile/name)
    else:
        with open(hostile/name, 'wb') as f: np.save(f, np.array([Evil(ran)], dtype=object), allow_pickle=True)
    refused(hostile)
    seal(hostile)
    if name == 'history.csv': load_model(hostile)          # for people: compared and not read
    else: refused(hostile)
    assert not ran.exists()

@pytest.mark.parametrize('arch', ['os.system', '../../x', 'hf-hub:evil/model', 'hf_hub:evil/model', 'file:///etc/passwd', 'local-dir:/tmp', '/etc/passwd', 'resnet18.hf-hub:evil/model',
                                  'https://evil/x.pth', '', 'a'*5000, None, 3, ['resnet18'], {'a': 1}, True, 'resnet18\n', '__import__("os")', 'timm.models'])
def test_architectures(hostile, arch):
    change(hostile, 'config.json', model__arch=arch)
    refused(hostile, 'architecture')

@pytest.mark.parametrize('path, value', [
    ('model__n_classes', 10**12), ('model__n_classes', 0), ('model__n_classes', 7), ('model__n_classes', 8.), ('model__n_classes', True), ('model__n_classes', 2**20),
    ('model__emb_dim', 10**9), ('model__emb_dim', -16), ('model__emb_dim', 2**14), ('model__n_channels', 10**6), ('model__n_channels', 5), ('model__meta_dim', 10**9),
    ('model__meta_dim', 'os.system'), ('model__meta_dim', 2**12), ('model__metadata', {'cell_type': 10**12}), ('model__metadata', {'cell_type': 2**20}), ('model__metadata', {'x': 2}),
    ('model__metadata', []), ('model__neck', '__class__'), ('model__neck', 'identity'), ('model__neck', ['linear']), ('model__loss', 'os.system'), ('model__loss', {'name': 'os.system'}),
    ('model__loss', {'name': 'mix', 'a': {'name': 'mix', 'a': {'name': 'mix', 'a': {'name': 'mix', 'a': {'name': 'mix'}}}}}), ('model__loss', {'name': 'adacos', 'n_classes': 'x'}),
    ('model__loss', {'name': 'softmax', 'evil': 1}), ('model__inputs', ['x']*101), ('model__inputs', 'cell_type'), ('model__dropout', float('inf')), ('model__dropout', 2),
    ('model__pretrained', 'evil.pth'), ('model__checkpoint_path', 'evil.pth'), ('model__pretrained_cfg', {'url': 'http://evil'}), ('model__img_size', 10**6), ('model__stem', 'tile'),
    ('model', []), ('model', None), ('spec', 'x'), ('spec__labels', ['a']*8), ('spec__labels', list('abcdefg')), ('spec__labels', [1]*8), ('spec__labels', {}),
    ('spec__channels', ['a']*6), ('spec__channels', ['\x1b]0;evil\x07', *'bcdef']), ('spec__vocabs', {'cell_type': []}), ('spec__vocabs', {'cell_type': ['HUVEC']}), ('spec__sites', 10**6),
    ('spec__size', 10**9), ('spec__norm', '__import__'), ('spec__norm', 'global'), ('spec__bits', 7), ('spec__bits', 10**18), ('spec__clahe', 'yes'), ('spec__evil', 1), ('spec__target', ''),
    ('format', F.FORMAT + 1), ('format', 1), ('format', '2'), ('format', None), ('format', True), ('format', 10**18), ('versions', {'torch': '\x1b[2J'}), ('versions', []), ('held_out', 'x'), ('fingerprint', 'x'),
    ('fingerprint', '0'*64), ('files', {}), ('files', []), ('files__weights.safetensors', None), ('files__weights.safetensors', {'size': 10**18, 'sha256': '0'*64}),
    ('files', {'a': {'size': -1, 'sha256': '0'*64}}), ('spec__size', 2**14), ('pseudo_experiments', 'x'), ('pseudo_experiments', [3]), ('data', None), ('data', {}), ('data', []),
    ('data__channels', {'nucleus': {}}), ('data__channels', {}), ('data__channels', {c: dict(mean=.1, std=.1) for c in 'abcdef'}), ('data__sites', {'a': 'x'}), ('data__sites', []),
    ('data__store', 'x'), ('data__rows', '9'), ('data__evil', 1), ('search', 'x'), ('search', {'plain': {}}), ('search', {'plain': {'neck': 'no', 'notes': ['\x1b]0;evil\x07']}}),
    ('recipe', [1]), ('recipe', {'stages': 5}), ('recipe', {'stages': [], 'predict': [1]}), ('recipe', {'stages': [], 'predict': {'k': {}}}), ('recipe', {'stages': [], 'only': 5}), ('recipe', {'stages': [{}]}),
    ('only_present', 'x')])
def test_entries(hostile, path, value):
    if path.startswith('files'):
        c = json.loads((hostile/'config.json').read_text())
        if path == 'files': c['files'] = value
        else: c['files'][path.split('__')[1]] = value
        (hostile/'config.json').write_text(json.dumps({**c, 'sha256': json_hash(c)}))
    else: change(hostile, 'config.json', **{path: value})
    refused(hostile)

@pytest.mark.parametrize('arch', ['vit_gigantic_patch14_clip_224', 'efficientnet-b7', 'resnet18', 'mobilenetv3_small_075'])
def test_another_architecture(hostile, arch):
    "Two thousand million weights are refused without memory for them"
    change(hostile, 'config.json', model__arch=arch)
    refused(hostile, 'does not hold the weights')

def test_entries_that_are_absent(hostile, quick):
    "Without any one of them, in each place: a sentence, or nothing that was needed"
    c, i = (json.loads((hostile/f).read_text()) for f in ('config.json', 'index.json'))
    places = [('config.json', c, c), ('config.json', c, c['model']), ('config.json', c, c['spec']), ('index.json', i, i)]
    opened = set()
    for f, whole, o in places:
        for k in list(o):
            kept = o.pop(k)
            (hostile/f).write_text(json.dumps(whole))
            if k != 'sha256': seal(hostile)
            try: load_model(hostile); opened.add(k)
            except ScreenError: pass
            o[k] = kept
            for g, w in (('config.json', c), ('index.json', i)): (hostile/g).write_text(json.dumps(w))
            seal(hostile)
    assert opened <= {'augs', 'metrics', 'trained_experiments', 'license', 'seed', 'note', 'bn_momentum', 'use_metadata', 'meta_dropout', 'dropout', 'classifier', 'pool', 'sites_join', 'n_sites', 'act', 'sites', 'size', 'norm', 'norm_mean', 'norm_std', 'bits', 'clahe', 'norm_from', 'several', 'no_label'}

@pytest.mark.parametrize('name', ['/etc/passwd', '../../secret', '..', '.', '', 'sub/weights.safetensors', 'con\x00fig', 'README.md', 'evil.pkl'])
def test_manifest_paths(hostile, name):
    (hostile.parent/'secret').write_text('x')
    c = json.loads((hostile/'config.json').read_text())
    c['files'][name] = c['files']['history.csv']
    (hostile/'config.json').write_text(json.dumps({**c, 'sha256': json_hash(c)}))
    refused(hostile)

@pytest.mark.parametrize('name', ALL[:-1])
@pytest.mark.parametrize('how', ['link', 'dangling', 'absent', 'folder', 'fifo', 'zero', 'empty'])
def test_no_plain_file(hostile, name, how):
    f = hostile/name
    if how == 'link': f.rename(hostile.parent/'outside'); f.symlink_to(hostile.parent/'outside')
    else: f.unlink()
    if how == 'dangling': f.symlink_to('/nowhere')
    elif how == 'folder': f.mkdir()
    elif how == 'fifo': os.mkfifo(f)
    elif how == 'zero': f.symlink_to('/dev/zero')
    elif how == 'empty': f.touch()
    refused(hostile, name)

BOMBS = dict(deep='['*100_000, deep_tables='{"a":'*100_000, digits='{"format": ' + '9'*100_000 + '}', exponent='{"format": 1e999999}', nan='{"format": NaN}',
             twice='{"format": 2, "format": 2}', list='[]', text='"x"', number='2', null='null', half='{"format": 2, "model": {}, "spec": {}', bytes='\xff\xfe{}', surrogate='{"format": "\\ud800"}', blank='')

@pytest.mark.parametrize('name', ['config.json', 'index.json'])
@pytest.mark.parametrize('bomb', BOMBS)
def test_json_bombs(hostile, name, bomb):
    (hostile/name).write_text(BOMBS[bomb], encoding='latin-1')
    seal(hostile)
    refused(hostile, 'config.json|index.json')

@pytest.mark.parametrize('name', ALL[:-1])
@pytest.mark.parametrize('size', [2**30, 2**42])
def test_sparse_files(hostile, name, size):
    "A file that claims to be huge and takes no room: refused by its size or its first bytes, before it is hashed"
    for keep in (True, False):
        with open(hostile/name, 'r+b') as f:
            if not keep: f.truncate(0)
            f.truncate(size)
        c, i = (json.loads((hostile/f).read_text()) if f != name else None for f in ('config.json', 'index.json'))
        for o, f in ((i, 'index.json'), (c, 'config.json')):
            if o is None: continue
            if name in o['files']: o['files'][name]['size'] = size
            (hostile/f).write_text(json.dumps({**o, 'sha256': json_hash(o)}))
            if f == 'index.json' and c is not None: c['files'].update({f: file_facts(hostile/f), **o['files']})
        refused(hostile)

def test_sparse_vectors_of_the_right_size(hostile):
    "Rows and dimensions, header and sizes agree: the first rows of zeros are the end of it"
    n, d = 2**28, 512
    header = json.dumps(dict(features=dict(dtype='F32', shape=[n, d], data_offsets=[0, 4*n*d]))).encode()
    size = 8 + len(header) + 4*n*d
    with open(hostile/'index.safetensors', 'wb') as f: f.write(len(header).to_bytes(8, 'little') + header); f.truncate(size)
    i = json.loads((hostile/'index.json').read_text())
    i.update(rows=n, dim=d); i['files']['index.safetensors']['size'] = size
    (hostile/'index.json').write_text(json.dumps({**i, 'sha256': json_hash(i)}))
    c = json.loads((hostile/'config.json').read_text())
    c['files'].update({'index.json': file_facts(hostile/'index.json'), 'index.safetensors': i['files']['index.safetensors']})
    (hostile/'config.json').write_text(json.dumps({**c, 'sha256': json_hash(c)}))
    refused(hostile, 'not of length 1|memory')

def rewrite(d, **how):
    t = load_file(d/'weights.safetensors')
    for k, f in how.items(): k = k.replace('__', '.'); t[k] = f(t[k]) if k in t else f(None)
    save_file({k: v for k, v in t.items() if v is not None}, d/'weights.safetensors')
    seal(d)

W = 'neck__2__weight'
@pytest.mark.parametrize('how, says', [
    ({W: lambda t: t.T.contiguous()}, r'neck.2.weight is torch.float32 \[\d+, 16\]'), ({W: lambda t: t.double()}, 'float64'), ({W: lambda t: t.half()}, 'float16'), ({W: lambda t: t*np.nan}, 'not finite'),
    ({W: lambda t: t/0}, 'not finite'), ({W: lambda t: None}, 'absent'), (dict(evil=lambda t: torch.zeros(1)), 'too many'), ({W: lambda t: t[:0].clone()}, 'neck.2.weight'),
    ({W: lambda t: t + 1}, 'fingerprint'), (dict(classifier__weight=lambda t: t[:, :8].contiguous()), 'classifier.weight'), (dict(classifier__weight=lambda t: t[:5].contiguous()), 'classifier.weight'),
    (dict(loss__s=lambda t: t*np.inf), 'not finite'), (dict(stem__weight=lambda t: t[:, :3].contiguous()), 'stem.weight')])
def test_tensors(hostile, how, says):
    rewrite(hostile, **how)
    refused(hostile, says)

def header(d, text=None, n=None, **entries):
    "Weights with another header"
    b = (d/'weights.safetensors').read_bytes()
    size = int.from_bytes(b[:8], 'little')
    h = json.loads(b[8:8+size])
    h.update(entries)
    h = json.dumps(h).encode() if text is None else text
    (d/'weights.safetensors').write_bytes((len(h) if n is None else n).to_bytes(8, 'little') + h + b[8+size:])
    seal(d)

@pytest.mark.parametrize('how', [
    dict(n=2**63), dict(n=2**64-1), dict(n=2**24+1), dict(n=0), dict(n=10), dict(text=b'{}'), dict(text=b'['*50_000), dict(text=b'{"a": ' + b'9'*50_000 + b'}'), dict(text=b'\xff'*100), dict(text=b'[]'),
    dict(evil=dict(dtype='F32', shape=[10**12], data_offsets=[0, 4*10**12])), dict(evil=dict(dtype='F32', shape=[2**62, 2**62], data_offsets=[0, 0])), dict(evil=dict(dtype='F32', shape=[-1], data_offsets=[0, 4])),
    dict(evil=dict(dtype='os.system', shape=[1], data_offsets=[0, 4])), dict(evil=dict(dtype='F32', shape='x', data_offsets=[0, 4])), dict(evil=[]), dict(evil=dict(dtype=[], shape=[1])),
    {'classifier.weight': dict(dtype='F32', shape=[8, 16], data_offsets=[0, 8*16*4])}, {'classifier.weight': dict(dtype='F32', shape=[8, 16], data_offsets=[10**18, 10**18+512])},
    {'classifier.weight': dict(dtype='F32', shape=[8, 16], data_offsets='x')}, {'classifier.weight': dict(dtype='F32', shape=[8, 16])}])
def test_safetensors_header(hostile, how):
    header(hostile, **how)
    refused(hostile, 'weights.safetensors')

@pytest.mark.parametrize('entries, says', [
    (dict(dim=8), 'index.safetensors'), (dict(rows=10**12), 'index.json'), (dict(rows=3), 'index.safetensors'), (dict(dim=10**9), 'index.json'), (dict(kind='os.system'), 'index.json'), (dict(target='nothing'), 'index.json'),
    (dict(model='0'*64), 'another model'), (dict(model=None), 'which is not named'), (dict(model='\x1b'), 'index.json'), (dict(columns=[]), 'index.json'), (dict(columns=['sirna']), 'index.rows.json'), (dict(columns=[['sirna']]), 'index.json'),
    (dict(format=9), 'newer'), (dict(format=1), 'rcic_fastai==0.1.0'), (dict(files={'/etc/passwd': {'size': 1, 'sha256': '0'*64}}), 'index.json')])
def test_index_entries(hostile, entries, says):
    change(hostile, 'index.json', **entries)
    refused(hostile, says)

@pytest.mark.parametrize('dim', [8, 17])
def test_index_of_another_dimension(made, hostile, dim):
    EmbeddingIndex(make_emb_table(made.index.labels, np.random.default_rng(0).normal(size=(len(made.index), dim)))).save(hostile, made.learn and load_model(made.folder).fingerprint)
    seal(hostile)
    refused(hostile, f'rows of {dim} numbers and the model embeds into 16')

def test_index_of_another_model(made, hostile):
    other = EmbeddingIndex(made.index.table(), model='a'*64)
    other.save(hostile); seal(hostile)
    refused(hostile, r'another model \(aaaaaaaa\)')
    with pytest.raises(ScreenError, match='another model'): made.learn.to_model(other).save(hostile.parent/'x')

@pytest.mark.parametrize('sirna', [
    None, [], 'x', {}, dict(kind='text'), dict(kind='object', values=['a']*16), dict(kind='text', names='ab', values=[0]*16), dict(kind='text', names=[1], values=[0]*16),
    dict(kind='text', names=[['a']], values=[0]*16), dict(kind='text', names=['a'], values=[1]*16), dict(kind='text', names=['a'], values=[-2]*16), dict(kind='text', names=['a'], values=[0]*15),
    dict(kind='text', names=['a'], values=[0.]*16), dict(kind='text', names=['a'], values=[True]*16), dict(kind='text', names=['a'], values=[[0]]*16), dict(kind='text', names=['a'], values=[10**19]*16),
    dict(kind='text', names=['a'], values=[-1]*16), dict(kind='text', names=['a'], values={}), dict(kind='int64', values=['os.system']*16), dict(kind='int64', values=[None]*16),
    dict(kind='int8', values=[1000]*16), dict(kind='Int64', values=[[1]]*16), dict(kind='float64', values=['x']*16), dict(kind='float64', values=[{}]*16), dict(kind='datetime64[ns]', values=[0]*16),
    dict(kind=['text'], values=[0]*16), dict(kind={}, values=[0]*16)])
def test_rows(hostile, sirna):
    rows = json.loads((hostile/'index.rows.json').read_text())
    (hostile/'index.rows.json').write_text(json.dumps({**rows, 'sirna': sirna}))
    seal(hostile)
    refused(hostile, 'index.rows.json|no sirna')

@pytest.mark.parametrize('tensors', [
    {}, dict(evil=[16, 16]), dict(features=[16, 15]), dict(features=[15, 16]), dict(features=[256]), dict(features=[16, 16], evil=[1]), dict(features=[16, 16, 1])])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int32'])
def test_vectors_of_another_shape(hostile, tensors, dtype):
    from safetensors.numpy import save_file as save_numpy
    if dtype == 'float32' and not tensors: tensors = dict(features=[16, 17])
    rows = lambda shape: np.ones(shape, dtype)
    save_numpy({k: rows(shape) for k, shape in tensors.items()}, hostile/'index.safetensors')
    seal(hostile)
    refused(hostile, 'index.safetensors')

def vectors_header(d, text=None, n=None, **entries):
    "The vectors with another header, in a file of the size that is claimed"
    b = (d/'index.safetensors').read_bytes()
    size = int.from_bytes(b[:8], 'little')
    h = {**json.loads(b[8:8+size]), **entries}
    h = json.dumps({k: v for k, v in h.items() if v is not None}).encode() if text is None else text
    (d/'index.safetensors').write_bytes((len(h) if n is None else n).to_bytes(8, 'little') + h + b[8+size:])
    seal(d)

ROWS = dict(dtype='F32', shape=[16, 16], data_offsets=[0, 1024])
@pytest.mark.parametrize('how', [
    dict(n=2**63), dict(n=2**64-1), dict(n=0), dict(n=10), dict(text=b'{}'), dict(text=b'['*500), dict(text=b'{"a": ' + b'9'*500 + b'}'), dict(text=b'\xff'*100), dict(text=b'[]'),
    dict(features=None), dict(features=dict(ROWS, dtype='F64')), dict(features=dict(ROWS, dtype='I32')), dict(features=dict(ROWS, shape=[8, 16])), dict(features=dict(ROWS, shape=[2**62, 16])),
    dict(features=dict(ROWS, shape=[-16, -16])), dict(features=dict(ROWS, data_offsets=[4, 1028])), dict(features=dict(ROWS, data_offsets=[0, 10**18])), dict(features=dict(ROWS, data_offsets='x')),
    dict(features=[]), dict(features=dict(dtype='F32', shape=[16, 16])), dict(evil=dict(dtype='F32', shape=[1], data_offsets=[0, 4])), dict(evil=dict(dtype='F32', shape=[0], data_offsets=[1024, 1024]), features=None)])
def test_vectors_header(hostile, how):
    vectors_header(hostile, **how)
    refused(hostile, 'index.safetensors')

@pytest.mark.parametrize('form', [1, 2, 3])
def test_folders_of_before(hostile, form):
    "Which version opens them is said, whatever else is in the folder"
    (hostile/'index.safetensors').rename(hostile/'index.faiss')
    c = json.loads((hostile/'config.json').read_text())
    for config in ({**c, 'format': form}, dict(format=form, model={}, spec={})):
        (hostile/'config.json').write_text(json.dumps(config))
        refused(hostile, rf"written by rcic_fastai 0.1 \(format {form}\): open it with that version, pip install 'rcic_fastai==0.1.0'")

# hostile, by the hundred

NASTY = [None, True, -1, 0, 1, 2**40, 10**18, 1.5, 1e308, '', 'x', 'x'*10_000, '../../x', '/etc/passwd', 'hf-hub:evil/model', 'os.system', '\x1b]0;x\x07', [], {}, [[]], {'': None}, ['a', 'a'], '0'*64]

def spoil_bytes(r, d, name, ran):
    "One accident with one file"
    f = d/name
    b = bytearray(f.read_bytes())
    at = lambda: r.randrange(len(b)) if r.random() < .5 else r.randrange(min(len(b), 400)) if r.random() < .5 else max(0, len(b) - 1 - r.randrange(min(len(b), 400)))
    how = r.choice(['flip', 'flip', 'flip', 'many', 'cut', 'grow', 'zero', 'noise', 'swap', 'other', 'gone', 'empty', 'pickle'])
    if how == 'flip': b[at()] ^= 1 << r.randrange(8)
    elif how == 'many':
        for _ in range(20): b[at()] = r.randrange(256)
    elif how == 'cut': b = b[:at()]
    elif how == 'grow': b += r.randbytes(r.randrange(1, 99))
    elif how in ('zero', 'noise'):
        i, n = at(), r.randrange(1, 64)
        b[i:i+n] = bytes(len(b[i:i+n])) if how == 'zero' else r.randbytes(len(b[i:i+n]))
    elif how == 'swap':
        i, j = sorted((at(), at()))
        b = b[j:] + b[i:j] + b[:i]
    elif how == 'other': b = bytearray((d/r.choice(ALL)).read_bytes())
    elif how == 'empty': b = bytearray()
    elif how == 'pickle': b = bytearray(pickle.dumps(Evil(ran)))
    f.unlink()
    if how != 'gone': f.write_bytes(b)
    return f'{how} {name}'

def spoil_entry(r, d, name):
    "Another value, no value, or one value too many, anywhere in a JSON file"
    o = json.loads((d/name).read_text())
    at, key, path = o, None, []
    while isinstance(at, (dict, list)) and len(at):
        parent, key = at, r.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at = parent[key]; path.append(key)
        if r.random() < .3: break
    how = r.choice(['value', 'value', 'value', 'gone', 'more'])
    if how == 'value': parent[key] = r.choice(NASTY)
    elif how == 'gone': del parent[key]
    elif isinstance(parent, dict): parent[r.choice(['evil', '', '../x', 'pretrained'])] = r.choice(NASTY)
    else: parent.append(r.choice(NASTY))
    (d/name).write_text(json.dumps(o))
    return f'{how} {name} {path}'

def opened(d):
    "The model, or None when it was refused with a sentence; anything else is an error"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        WATCHED[0], start = True, time.process_time()
        try: return load_model(d)
        except ScreenError as e: assert '\n' not in str(e) and str(e)[-1] in '.?', str(e)
        finally: WATCHED[0] = False; assert time.process_time() - start < 5 and not SEEN

def test_fuzzed_folders(made, tmp_path, quick):
    "By accident: the same answers or a sentence. On purpose, with hashes that fit: a model or a sentence. Never code, never a hang"
    d, ran, count = tmp_path/'m', tmp_path/'ran', dict(same=0, refused=0, opened=0)
    for seed in range(CASES):
        r = random.Random(seed)
        shutil.rmtree(d, ignore_errors=True); shutil.copytree(made.folder, d)
        meant = seed % 2
        name = r.choice((*MODEL_FILES, *MODEL_FILES, 'config.json', 'config.json') if meant else (*MODEL_FILES, *MODEL_FILES, 'config.json', 'config.json', 'README.md'))
        what = spoil_entry(r, d, name) if name.endswith('.json') and r.random() < .7 else spoil_bytes(r, d, name, ran)
        if meant: seal(d)
        try: m = opened(d)
        except BaseException as e: raise AssertionError(f'case {seed}, {what}, meant {meant}: {type(e).__name__} {e}') from e
        if m is None: count['refused'] += 1
        elif not meant: assert same(answer(m), made.answer), (seed, what); count['same'] += 1
        else: count['opened'] += 1
        assert not ran.exists(), (seed, what)
    print(count)
    assert count['refused'] > .5*CASES and count['same'] and count['opened']


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ScreenError, match='There is no .*typo: point to what rcic_train wrote'): load_model(tmp_path/'typo')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ScreenError, match='is not a model folder'): load_model(tmp_path/'empty')
