"Every argument that a sentence names exists on the route where it is said: read from the sources, and tried."
import ast, errno, io, os, re
from pathlib import Path
import pytest
import rcic_fastai
import rcic_fastai.workflow     # now, and not while a test has put something else in its place
from rcic_fastai import cli
from rcic_fastai.core import ScreenError, as_command, option

ROOT = Path(rcic_fastai.__file__).parent
# Functions that no command calls, or whose arguments are those of steps that a command chooses for itself: Python is their only route
PYTHON_ONLY = {'batch/augment.py', 'embed/correct.py', 'embed/metrics.py', 'embed/table.py', 'embed/plots.py', 'predict/assign.py', 'predict/pseudo.py',
               'train/channels.py', 'train/controls.py', 'train/cutmix.py', 'train/domain.py', 'results/report.py', 'results/plots.py', 'results/evaluate.py', 'results/wilds.py', 'results/submission.py', 'screen/look.py',
               'showdoc.py', '_modidx.py'}
COMMAND_OF = dict(screen='rcic_pack', batch='rcic_train', train='rcic_train', model='rcic_train', predict='rcic_predict', embed='rcic_predict')
OPTIONS = {name: cli._options(f) for name, f in {**cli._commands(), 'rcic_ensemble': cli.ensemble, 'rcic_confidence': cli.confidence, 'rcic_drift': cli.drift}.items()}
ANY = {k for o in [*OPTIONS.values(), cli._options(cli.explore_screen)] for k in o}

def sources():
    "The modules whose sentences a command can say, with their syntax trees"
    for f in sorted(ROOT.rglob('*.py')):
        name = f.relative_to(ROOT).as_posix()
        if name not in PYTHON_ONLY: yield name, ast.parse(f.read_text())

def docstrings(tree):
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and n.body and isinstance(n.body[0], ast.Expr)]
    return {id(n.body[0].value) for n in nodes}

def sentences(tree):
    "Texts of more than three words, with {} where a value stands"
    inner, skip = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}, docstrings(tree)
    for n in ast.walk(tree):
        if id(n) in skip or id(n) in inner: continue
        if isinstance(n, ast.JoinedStr): text = ''.join(v.value if isinstance(v, ast.Constant) else '{}' for v in n.values)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str): text = n.value
        else: continue
        if text.count(' ') > 3: yield n.lineno, text

def spelled(text): return re.findall(r'(?<![\w{.-])([a-z][a-z_]*)=(?!=)', text) + re.findall(r'(?<!\w)--([a-z][a-z-]*)', text)

def called(tree):
    "(line, name, value or None) of every argument that `option` is asked to name"
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'option' and n.args and isinstance(n.args[0], ast.Constant):
            yield n.lineno, n.args[0].value, n.args[1] if len(n.args) > 1 else None

ALLOWED = {('cli.py', 'experiment'), ('cli.py', 'resume'), ('cli.py', 'dataset'), ('model/backbones.py', 'n_channels'),
           ('screen/simulate/layout.py', 'test'), ('train/recipes.py', 'epochs'), ('embed/index.py', 'kind'), ('train/checkpoints.py', 'resume'), ('screen/tables.py', 'k'),
           ('embed/neck.py', 'shrink'), ('embed/neck.py', 'whiten')}     # what the text of --search may say

def test_no_sentence_spells_an_argument_itself():
    "`option` does, in the words of the caller's route"
    found = [(name, line, a, text) for name, tree in sources() for line, text in sentences(tree) for a in spelled(text) if (name, a) not in ALLOWED]
    assert not found, '\n'.join(map(str, found))

def test_the_test_sees_what_it_looks_for():
    assert spelled('or read with empty="fill" if') == ['empty'] and spelled('leave them out with --only-present.') == ['only-present']
    assert not spelled('a == b, dict(c=1)'.replace('c=1', 'c')) and not spelled('at most {}=')
    tree = ast.parse('''def f(): raise ScreenError(f"take a plane of it with {option('z', 0)} or z=1")''')
    assert [a for _, t in sentences(tree) for a in spelled(t)] == ['z'] and [n for _, n, _ in called(tree)] == ['z']

def test_every_argument_that_is_named_is_an_option():
    "Of the command that says it or, where another is meant, of any"
    python_only = {'views', 'adapt_rows', 'stem', 'input_bn', 'arch_args', 'label_smoothing', 'classifier', 'sites_join', 'n_sites', 'loss', 'norm_stats', 'separate', 'with_controls', 'batch_groups', 'lr', 'opt', 'schedule', 'augs', 'rare', 'several', 'private', 'restrict_cell_type', 'n_boot'}
    found = []
    for name, tree in sources():
        home = COMMAND_OF.get(name.split('/')[0])
        for line, a, value in called(tree):
            known = {*OPTIONS[home], 'target'} if home == 'rcic_pack' else ANY        # a target is of rcic_train, and option says so
            if a not in known | python_only | {'out', 'dest', 'screen', 'model'}: found.append((name, line, a))
    assert not found, found

@pytest.mark.parametrize('name', ['replace', 'z', 't', 'empty', 'partial', 'cell_types', 'experiment', 'controls', 'test', 'columns', 'root', 'wells'])
def test_rcic_pack_has_it(name):
    assert name in OPTIONS['rcic_pack'] and f'--{name.replace("_", "-")}' in cli.command_parser(cli.pack).format_help()

PARSED = [('columns', dict(plate='Barcode', dataset=None)), ('controls', dict(negative_control=['DMSO', 'water'], positive_control=['x'])),
          ('replace', {'s3://a/b=1/': '/data'}), ('channels', ['DNA', 'ER']), ('channels', dict(nucleus='DNA')), ('z', 0), ('z', 'max'), ('cell_types', ['A', 'B'])]

@pytest.mark.parametrize('name,value', PARSED)
def test_what_is_said_can_be_typed(name, value, monkeypatch):
    "The value that a sentence names in a shell is read as the value that it names in Python"
    seen = {}
    def opened(path, only_present, **how):
        seen.update(how)
        raise ScreenError('enough')
    monkeypatch.setattr('rcic_fastai.screen.open.open_screen', opened)
    with as_command(): words = option(name, value).split(' ')
    assert cli.rcic_pack(['a', 'b', *words]) == 2 and seen == {name: value}
    assert eval(f'dict({option(name, value)})') == {name: value}

def test_an_option_of_another_command_says_so():
    with as_command(['screen'], OPTIONS['rcic_train'], {k: o for k, o in OPTIONS.items() if k != 'rcic_train'}):
        assert option('z', 0) == '--z 0 (rcic_pack)' and option('controls', dict(negative_control=['DMSO'])) == '--controls DMSO=negative_control (rcic_pack)'
        assert option('controls', True) == '--controls' and option('side', 'plate') == "side='plate' (in Python)" and option('screen') == 'SCREEN'


NOUNS = 'experiments wells sites plates files rows classes channels labels pictures perturbations samples pages predictions embeddings groups siRNAs models'.split()
COUNT = re.compile(r'len\(.*\)|.*\.(sum|nunique)\(\)|n')

def bare_counts(tree):
    "(line, text) of every number of things that a sentence writes without `plural`, so that it could say '1 wells'; 'of 5 wells' counts nothing"
    for n in ast.walk(tree):
        if not isinstance(n, ast.JoinedStr): continue
        before = [None, *n.values]
        for last, v, text in zip(before, n.values, n.values[1:]):
            if not isinstance(v, ast.FormattedValue) or not isinstance(text, ast.Constant): continue
            of = isinstance(last, ast.Constant) and last.value == ' of '
            found = re.match(rf' (?:\w+ )?({"|".join(NOUNS)})\b', str(text.value))
            if found and not of and COUNT.fullmatch(ast.unparse(v.value)): yield n.lineno, ast.unparse(v.value) + found[0]

def test_no_sentence_says_1_wells():
    "A number and its noun agree, by `plural`, wherever the number is counted"
    found = [(name, *o) for f in sorted(ROOT.rglob('*.py')) if (name := f.relative_to(ROOT).as_posix()) not in ('_modidx.py', 'showdoc.py') for o in bare_counts(ast.parse(f.read_text()))]
    assert not found, '\n'.join(map(str, found))

def test_the_test_of_counts_sees_what_it_looks_for():
    assert [o for _, o in bare_counts(ast.parse("f'{len(a)} test wells are'"))] == ['len(a) test wells']
    assert not [*bare_counts(ast.parse("f'{k} of {len(a)} wells, {plural(len(a), 1)} wells, {size} wells'"))]


@pytest.mark.parametrize('code, says', [(errno.EACCES, 'choose a place where you may'), (errno.EROFS, 'choose a place where you may'), (errno.ENOSPC, 'check the path and the space left')])
def test_what_the_system_refuses_is_said_of_the_file_that_was_asked_for(code, says, tmp_path):
    "Not of the temporary one, and with what helps against just that"
    from rcic_fastai import cli
    from rcic_fastai.core import write_atomic
    def work():
        def write(p): raise OSError(code, os.strerror(code), str(p))
        write_atomic(tmp_path/'h.csv', write)
    err = io.StringIO()
    assert cli._called(work, {}, 'rcic_hits', err) == 2
    assert err.getvalue() == f'rcic_hits: {tmp_path}/h.csv could not be read or written ({os.strerror(code)}): {says}.\n'
