"Models on the Hub: there and back against a stub of its server, and repositories that mean harm."
import base64, io, json, pickle, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest, torch
from rcic_fastai import cli
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.core import sha256
from rcic_fastai.folder import load_model
from helpers import learner, refused, same


class Hub(BaseHTTPRequestHandler):
    "The part of the Hub's API that is used: repositories are {owner/name: {file: bytes}}"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def answer(self, code=200, body=b'', **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(code)
        for k, v in {'Content-Length': len(body), 'Content-Type': 'application/json', **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def missing(self, kind='RepoNotFound'): self.answer(404, {'error': kind}, X_Error_Code=kind, X_Error_Message=kind)

    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        s, path = self.server, unquote(urlsplit(self.path).path).strip('/')
        s.seen.append((self.command, path))
        if path.startswith('api/models/'):
            name, _, revision = path.removeprefix('api/models/').partition('/revision/')
            if name not in s.repos: return self.missing()
            if revision not in ('', 'main', s.commit): return self.missing('RevisionNotFound')
            files = [dict(rfilename=k, size=s.sizes.get(k, len(v)), blobId='0'*40) for k, v in s.repos[name].items()]
            return self.answer(body=dict(id=name, sha=s.commit, private=s.private, siblings=files, tags=[], downloads=0))
        if path.startswith('cdn/'):
            s.tokens.append(self.headers.get('Authorization'))
            return self.answer(body=s.large[path.removeprefix('cdn/')], Content_Type='application/octet-stream')
        name, _, rest = path.partition('/resolve/')
        file = rest.partition('/')[2]
        data = s.repos.get(name, {}).get(file)
        if data is None: return self.missing('EntryNotFound')
        if sha256(data) in s.large:      # as the Hub does: elsewhere, and the headers say what will come
            return self.answer(302, Location=f'http://localhost:{s.server_port}/cdn/{sha256(data)}', X_Linked_Size=len(data), X_Linked_Etag=f'"{sha256(data)}"',
                               ETag='"of the pointer"', X_Repo_Commit=s.commit)
        self.answer(body=data, ETag=f'"{sha256(data)[:40]}"', X_Repo_Commit=s.commit, Content_Type='application/octet-stream')

    def do_POST(self):
        s, path = self.server, urlsplit(self.path).path.strip('/')
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        s.seen.append(('POST', path))
        if path == 'api/repos/create':
            said = json.loads(body)
            name = f'{said["organization"]}/{said["name"]}' if said.get('organization') else said['name']
            if name in s.repos: return self.answer(409, {'error': 'exists', 'url': f'{s.url}/{name}'})
            s.repos[name], s.private = {}, bool(said.get('private')) or said.get('visibility') == 'private'
            return self.answer(body={'url': f'{s.url}/{name}', 'id': name, 'name': name})
        if path == 'api/validate-yaml': return self.answer(body={'warnings': [], 'errors': []})
        if path.endswith('.git/info/lfs/objects/batch'):
            wanted = json.loads(body)['objects']
            return self.answer(body={'transfer': 'basic', 'objects': [{**o, 'actions': {'upload': {'href': f'{s.url}/lfs/{o["oid"]}'}}} for o in wanted]})
        name = path.removeprefix('api/models/').partition('/preupload')[0].partition('/commit')[0]
        mode = lambda f: 'lfs' if s.takes_large and f.endswith('.safetensors') else 'regular'
        if '/preupload/' in path: return self.answer(body={'files': [{'path': f['path'], 'uploadMode': mode(f['path']), 'shouldIgnore': False} for f in json.loads(body)['files']]})
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'lfsFile': s.repos[name][line['value']['path']] = s.large[line['value']['oid']]
            if line['key'] == 'file': s.repos[name][line['value']['path']] = base64.b64decode(line['value']['content'])
        self.answer(body={'success': True, 'commitOid': s.commit, 'commitUrl': f'{s.url}/{name}/commit/{s.commit}', 'hookOutput': ''})


    def do_PUT(self):
        data, oid = self.rfile.read(int(self.headers['Content-Length'])), self.path.removeprefix('/lfs/')
        assert sha256(data) == oid
        self.server.large[oid] = data
        self.answer()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.daemon_threads, server.repos, server.sizes, server.seen, server.private, server.commit = True, {}, {}, [], True, 'ab12'*10
    server.large, server.takes_large, server.tokens = {}, False, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setenv('HF_TOKEN', 'hf_stub')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def model(screen, tmp_path_factory):
    learn = learner(screen_dls(screen, valid='HUVEC-02', bs=4, device='cpu'))
    m = learn.to_model(tta=1, progress=False)
    m.folder = m.save(tmp_path_factory.mktemp('hub')/'model')
    return m


@pytest.fixture
def shared(hub, model):
    "A repository with the model; its files can be changed"
    hub.repos['lab/model'] = {f.name: f.read_bytes() for f in Path(model.folder).iterdir()}
    return hub.repos['lab/model']


def test_there_and_back(hub, model, screen):
    (Path(model.folder)/'notes.txt').write_text('mine')
    try:
        with pytest.warns(UserWarning, match='notes.txt'): address = model.push_to_hub('lab/model')
    finally: (Path(model.folder)/'notes.txt').unlink()
    assert address == f'hf://lab/model@{hub.commit}' and hub.private
    assert {*hub.repos['lab/model']} == {f.name for f in Path(model.folder).iterdir()} and 'notes.txt' not in hub.repos['lab/model']
    again = load_model('hf://lab/model')
    assert same(again.model.state_dict(), model.model.state_dict()) and again.config == load_model(model.folder).config and len(again.history) == len(model.history)
    n = len(hub.seen)
    assert load_model(address).fingerprint == model.fingerprint and len(hub.seen) == n        # a commit that lies here needs no network


def test_there_and_back_by_the_way_of_large_files(hub, model):
    "The Hub stores weights apart (LFS), and answers with the address of another server, which gets no token"
    hub.takes_large = True
    model.push_to_hub('lab/large')
    weights = (Path(model.folder)/'weights.safetensors').read_bytes()
    assert hub.large[sha256(weights)] == weights and hub.repos['lab/large']['weights.safetensors'] == weights
    again = load_model('hf://lab/large')
    assert again.fingerprint == model.fingerprint and same(again.model.state_dict(), model.model.state_dict())
    assert hub.tokens and {*hub.tokens} == {None}
    hub.large[sha256(weights)] = weights[:-1]
    (again.folder/'weights.safetensors').unlink()
    refused(lambda: load_model('hf://lab/large'), 'hf://lab/large')


def test_a_model_that_was_never_saved_can_be_shared(hub, model):
    twin = load_model(model.folder)
    assert twin.history is not None      # read before there is no folder any more
    twin.folder = None
    twin.push_to_hub('lab/new')
    assert load_model('hf://lab/new').fingerprint == model.fingerprint


def test_commands_take_addresses(hub, shared, capsys):
    assert cli.rcic_predict(['hf://lab/none', 'screen', 'out.csv']) == 2
    assert 'hf://lab/none does not exist, or is private' in capsys.readouterr().err


def test_a_model_is_not_made_public_by_accident(hub, model, shared):
    hub.private = False
    was = dict(shared)
    refused(lambda: model.push_to_hub('lab/model'), 'is public, so everybody would see the model')
    assert shared == was
    model.push_to_hub('lab/model', private=False)


class Evil:
    def __reduce__(self): return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pkl', 'load.py', '../../escaped', '/tmp/escaped', 'sub/../../escaped', '.git/config'])
def test_what_else_lies_there_is_neither_brought_nor_run(hub, shared, name, tmp_path):
    shared[name] = pickle.dumps(Evil())
    with pytest.warns(UserWarning, match='is no part of the model and is not read'): m = load_model('hf://lab/model')
    here = {f.name for f in Path(m.folder).rglob('*') if f.is_file() and '.cache' not in f.parts}
    assert here == {*shared} - {name, 'README.md', 'history.png'} and not [*tmp_path.rglob('escaped')]
    assert not [p for verb, p in hub.seen if 'resolve' in p and name in p]


def pickled(): 
    f = io.BytesIO()
    torch.save({'a': torch.ones(2)}, f)
    return f.getvalue()


@pytest.mark.parametrize('name', ['weights.safetensors', 'config.json', 'index.json', 'history.csv'])
@pytest.mark.parametrize('content', [pickle.dumps(Evil()), pickled(), b'', b'/etc/passwd', b'../../../secret'])
def test_other_content_under_a_known_name_is_refused(hub, shared, name, content):
    "Pickles, nothing, and what a link in a repository holds: its target"
    shared[name] = content
    refused(lambda: load_model('hf://lab/model'))


def test_a_changed_byte_is_refused(hub, shared):
    w = bytearray(shared['weights.safetensors'])
    w[-5] ^= 1
    shared['weights.safetensors'] = bytes(w)
    refused(lambda: load_model('hf://lab/model'), 'weights.safetensors')


@pytest.mark.parametrize('name', ['weights.safetensors', 'config.json', 'history.csv'])
def test_missing_and_too_large_files_are_refused_before_anything_is_brought(hub, shared, name):
    hub.sizes[name] = 2**40
    refused(lambda: load_model('hf://lab/model'), name, 'at most')
    del hub.sizes[name], shared[name]
    refused(lambda: load_model('hf://lab/model'), f'lacks {name}')
    assert not [p for _, p in hub.seen if 'resolve' in p]


def test_a_size_that_is_not_true_is_refused(hub, shared):
    hub.sizes['config.json'] = len(shared['config.json']) + 1
    refused(lambda: load_model('hf://lab/model'), 'did not arrive whole')


def test_a_link_in_the_cache_is_not_followed(hub, shared, tmp_path):
    folder = load_model('hf://lab/model').folder
    (tmp_path/'other').write_bytes(shared['config.json'])
    (folder/'config.json').unlink()
    (folder/'config.json').symlink_to(tmp_path/'other')
    refused(lambda: load_model(f'hf://lab/model@{hub.commit}'), 'link')


def test_wrong_addresses_and_no_server(hub, shared, monkeypatch):
    refused(lambda: load_model('hf://lab/model@v9'), 'has no such revision')
    for odd in ('hf://lab', 'hf://lab/model/weights.safetensors', 'hf://../x', 'hf://lab/model@../../x'): refused(lambda: load_model(odd), 'is no address on the Hub')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    refused(lambda: load_model('hf://lab/model'), 'could not be read', 'check the connection')
