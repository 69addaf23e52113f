"Names: `from rcic_fastai.all import *` gives what users call, and each helper has one home."
import ast
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [f for f in sorted((ROOT/'rcic_fastai').rglob('*.py')) if f.name not in ('__init__.py', '_modidx.py')]
HELPERS = '''parse_json is_facts read_json write_json write_atomic open_plain read_plain plain_file first_few first_line plural
    as_names as_plain option check_choice check_numbers check_unchanged differing copy_again digest sha256 json_hash file_facts
    html_text markdown_text csv_text sync_path only_one n_cores read_csv most_frequent store_fingerprint eval_mode
    weights_fingerprint checked_rows check_tta path_top info_path mlp_neck cutmix_box paste_box pack_state crop_mat'''.split()
CONSTANTS = {'CELL_TYPES', 'CHANNELS', 'CORRECTIONS', 'PROTOCOLS', 'RECIPES'}       # for people to look at


def defined(module): return getattr(import_module(module), '__all__', [])


def library(): return import_module('rcic_fastai.all')


def own_names():
    "Return the names that are in `rcic_fastai.all` and not in fastai's"
    import fastai.vision.all as theirs
    return {n for n in library().__all__ if getattr(library(), n) is not getattr(theirs, n, None)}


@pytest.mark.parametrize('name', [*HELPERS, 'FORMAT', 'META', 'EMB', 'KINDS', 'LOOK', 'EXTRA', 'PARTS', 'PIECE', 'WELLS'])
def test_helpers_are_not_in_all(name): assert name not in library().__all__


def test_all_has_few_constants():
    assert {n for n in own_names() if n.isupper() and not isinstance(getattr(library(), n), type)} == CONSTANTS


def test_all_stays_small(): assert 150 < len(own_names()) <= 240


def test_all_has_the_verbs():
    assert {'open_screen', 'screen_dls', 'screen_learner', 'train_screen', 'load_model', 'evaluate_screen', 'plate_map', 'pack_screen',
            'read_files', 'read_pattern', 'read_plates', 'Recipe', 'Stage', 'TrainedModel', 'embedding_map', 'CutMix', 'ScreenError'} <= own_names()


def test_what_other_modules_patch_is_there_too():
    assert all(hasattr(library().Learner, n) for n in ('to_model', 'fit_recipe', 'fit_pseudo', 'embed'))


def test_a_public_name_has_one_home():
    homes = defaultdict(set)
    for f in MODULES:
        module = '.'.join(f.relative_to(ROOT).with_suffix('').parts)
        if module == 'rcic_fastai.all': continue
        for name in defined(module): homes[name].add(module)
    assert {n: m for n, m in homes.items() if len(m) > 1} == {}


def test_no_function_is_written_twice():
    "The same body in two modules is a helper without a home"
    homes = defaultdict(set)
    for f in MODULES:
        for node in ast.parse(f.read_text(encoding='utf-8')).body:
            is_method = isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list)
            if not isinstance(node, ast.FunctionDef) or is_method: continue
            has_doc = ast.get_docstring(node) is not None
            homes[ast.unparse(node.body[has_doc:])].add(f.name)
    assert {body: fs for body, fs in homes.items() if len(fs) > 1} == {}


@pytest.mark.parametrize('call,home', [('sched_getaffinity', 'core.py'), ('os.cpu_count', 'core.py')])
def test_what_core_has_is_not_called_elsewhere(call, home):
    assert {f.name for f in MODULES if call in f.read_text(encoding='utf-8')} == {home}


def test_no_module_imports_a_private_name_of_another():
    "What another module needs is public, or at home there"
    found = []
    for f in MODULES:
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or '').startswith('rcic_fastai')): continue
            found += [f'{f.name}: {node.module}.{a.name}' for a in node.names if a.name.startswith('_') and not a.name.startswith('__')]
    assert found == []


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.name)
def test_no_set_is_made_again_for_each_name(file):
    "`[n for n in names if n not in set(rows)]` takes names times rows"
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if not isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)): continue
        own = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        for test in (n for g in node.generators for i in g.ifs for n in ast.walk(i) if isinstance(n, ast.Compare)):
            for of in test.comparators:
                is_made = isinstance(of, ast.Set) and any(isinstance(e, ast.Starred) for e in of.elts) or isinstance(of, ast.Call) and ast.unparse(of.func) == 'set'
                if is_made and not own & {n.id for n in ast.walk(of) if isinstance(n, ast.Name)}: found.append(ast.unparse(test))
    assert found == []


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.name)
def test_nothing_is_defined_twice(file):
    "A second definition hides the first, which then is nowhere used; methods that are patched in count by their class"
    names = []
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        of = node.args.args[0].annotation if getattr(node, 'decorator_list', []) and isinstance(node, ast.FunctionDef) and node.args.args else None
        names.append(f'{ast.unparse(of)}.{node.name}' if of is not None else node.name)
    assert sorted(n for n in {*names} if names.count(n) > 1) == []
