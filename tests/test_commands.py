"The commands do nothing that the library cannot: names, defaults, help, time to the help, lines in a log."
import inspect, io, re, subprocess, sys, time
import pytest
from rcic_fastai import cli, core
from rcic_fastai.predict import plan
from rcic_fastai.predict.predict import VOTES
from rcic_fastai.predict.trained import TrainedModel
from rcic_fastai.results.evaluate import evaluate_screen
from rcic_fastai.screen.download import download_rxrx1
from rcic_fastai.screen.simulate.layout import simulate_screen
from rcic_fastai.train.recipes import RECIPES
from rcic_fastai.workflow import run_demo, train_screen

COMMANDS = ['simulate', 'download', 'pack', 'train', 'predict', 'evaluate', 'demo']
FUNCTIONS = dict(simulate=cli.simulate, download=cli.download, pack=cli.pack, train=cli.train, predict=cli.predict, evaluate=cli.evaluate_csv, demo=cli.demo)

def parameters(f): return {n: p.default for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}

@pytest.mark.parametrize('command, function', [(cli.train, train_screen), (cli.demo, run_demo), (cli.download, download_rxrx1)])
def test_options_are_those_of_the_function(command, function):
    "But for what concerns the network, which only Python may set"
    mine, theirs = parameters(command), parameters(function)
    assert mine == {k: theirs[k] for k in mine} and not {*theirs} - {*mine} - {'progress', 'retries', 'timeout', 'unzip', 'wait'}

def test_predict_has_the_options_of_the_model():
    mine, theirs = parameters(cli.predict), {**parameters(plan.plan_prediction), **parameters(TrainedModel.predict)}
    assert {*mine} - {'model'} == {*theirs} - {'self', 'progress', 'model'}
    assert all(mine[k] == theirs[k] for k in mine if k not in ('model', 'screen', 'out'))

@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_quick_and_shows_every_option(name):
    "Without torch, fastai or pandas"
    code = f'import sys; from rcic_fastai import cli; sys.argv = ["rcic_{name}", "--help"]; cli.rcic_{name}()'
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-X', 'importtime', '-c', code], capture_output=True, text=True)
    heavy = {m for m in ('torch', 'fastai', 'pandas', 'matplotlib', 'scipy') if re.search(rf'\| +{m}$', done.stderr, re.M)}
    assert done.returncode == 0 and not heavy and time.monotonic() - start < 5
    for option in parameters(FUNCTIONS[name]): assert option.replace('_', '-') in done.stdout or option in done.stdout

def test_version(capsys):
    with pytest.raises(SystemExit, match='0'): cli.rcic_train(['--version'])
    assert capsys.readouterr().out.startswith('rcic_fastai ')

@pytest.mark.parametrize('name, choices', [('predict', plan.WELLS), ('predict', plan.ADAPT_FROM), ('predict', ['standardize', 'center', 'sphere', 'tvn']), ('train', RECIPES), ('predict', VOTES), ('predict', ['best', 'mean'])])
def test_choices_are_in_the_help(name, choices):
    text = cli.command_parser(FUNCTIONS[name]).format_help()
    assert all(re.search(rf'\b{c}\b', text) for c in choices), [c for c in choices if c not in text]

def test_messages_name_options_on_the_route_of_the_caller(capsys):
    def job(out): raise core.ScreenError(f'{core.option("adapt", "none")} and {core.option("out")} and {core.option("only_present", True)}')
    assert cli.run_command(job, ['x'], 'job') == 2
    assert capsys.readouterr().err == 'job: --adapt none and OUT and --only-present\n'
    with pytest.raises(core.ScreenError, match="adapt='none' and out and only_present=True"): job('x')

def test_bars_in_a_log_are_a_line_now_and_then(monkeypatch):
    now = [100.]
    monkeypatch.setattr(cli.time, 'monotonic', lambda: now[0])
    log = cli._OwnLines(io.StringIO())
    for i in range(100):
        log.write(f'\r{i}%')
        now[0] += 1
    log.write('done\n')
    assert log.f.getvalue() == '30%\n60%\n90%\ndone\n'

def test_bars_on_a_terminal_are_drawn():
    class Terminal(io.StringIO):
        def isatty(self): return True
    shown = cli._OwnLines(Terminal())
    shown.write('\r1%'); shown.write('done\n')
    assert shown.f.getvalue() == '\r1%\ndone\n'
