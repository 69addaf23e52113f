"The commands do nothing that the library cannot: names, defaults, help, time to the help, lines in a log."
import inspect, io, re, subprocess, sys, time
import pytest
from helpers import simulate_screen
from rcic_fastai import cli, core
from rcic_fastai.embed.hits import MEASURES, find_hits
from rcic_fastai.predict import plan
from rcic_fastai.predict.predict import VOTES
from rcic_fastai.predict.trained import TrainedModel
from rcic_fastai.results.explore import explore
from rcic_fastai.results.report import report_screen
from rcic_fastai.screen.cells import CELL_OPTIONS
from rcic_fastai.screen.download import download_rxrx1
from rcic_fastai.train.recipes import RECIPES, get_recipe
from rcic_fastai.workflow import run_demo, train_screen

COMMANDS = ['simulate', 'download', 'pack', 'show', 'train', 'predict', 'evaluate', 'ensemble', 'confidence', 'drift', 'embed', 'hits', 'report', 'explore', 'demo']
FUNCTIONS = dict(simulate=cli.simulate, download=cli.download, pack=cli.pack, show=cli.show, train=cli.train, predict=cli.predict, evaluate=cli.evaluate_csv, ensemble=cli.ensemble, confidence=cli.confidence, drift=cli.drift, embed=cli.embed, hits=cli.hits, report=cli.report, explore=cli.explore_screen, demo=cli.demo)

def parameters(f): return {n: p.default for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}

@pytest.mark.parametrize('command, function', [(cli.train, train_screen), (cli.demo, run_demo), (cli.download, download_rxrx1)])
def test_options_are_those_of_the_function(command, function):
    "But for what concerns the network, which only Python may set"
    mine, theirs = parameters(command), parameters(function)
    assert mine == {k: theirs[k] for k in mine} and not {*theirs} - {*mine} - {'progress', 'retries', 'timeout', 'unzip', 'wait'}

def test_predict_has_the_options_of_the_model():
    mine, theirs = parameters(cli.predict), {**parameters(plan.plan_prediction), **parameters(TrainedModel.predict)}
    assert {*mine} - {"model", "held_out", "device"} == {*theirs} - {'self', 'progress', 'model'}
    assert all(mine[k] == theirs[k] for k in mine if k not in ("model", "screen", "out", "held_out", "device"))

def test_profiles_and_hits_have_the_options_of_the_library():
    for command, function in ((cli.embed, TrainedModel.profile_file), (cli.hits, find_hits)):
        mine, theirs = parameters(command), parameters(function)
        assert {*mine} - {'model', 'device'} == {*theirs} - {'self', 'progress'}
        assert all(mine[k] == (theirs[k] or '') for k in mine if k in theirs and mine[k] is not inspect.Parameter.empty and not isinstance(mine[k], (bool, int, float)))

def test_report_has_the_options_of_the_function():
    mine, theirs = parameters(cli.report), parameters(report_screen)
    assert {*mine} - {'device'} == {*theirs} - {'more', 'progress'} and all(mine[k] == (theirs[k] or '') for k in mine if k in ('predictions', 'title', 'protocol', 'experiments'))
    assert all(mine[k] == theirs[k] for k in ('most', 'held_out', 'only_present', 'workers', 'bs'))

def test_explore_has_the_options_of_the_plan():
    mine, theirs = parameters(cli.explore_screen), {**parameters(plan.plan_prediction), **parameters(explore)}
    assert {*mine} - {'held_out', 'device'} == {*theirs} - {'progress', 'by', 'cells', 'cell_merge', *CELL_OPTIONS}
    assert all(mine[k] == theirs[k] for k in mine if k not in ('held_out', 'device', 'out', 'predictions', 'embeddings', 'hits'))

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

@pytest.mark.parametrize('name, choices', [('predict', plan.WELLS), ('predict', plan.ADAPT_FROM), ('predict', ['standardize', 'center', 'sphere', 'tvn']), ('train', RECIPES), ('predict', VOTES), ('predict', ['best', 'mean']), ('hits', MEASURES)])
def test_choices_are_in_the_help(name, choices):
    text = cli.command_parser(FUNCTIONS[name]).format_help()
    assert all(re.search(rf'\b{c}\b', text) for c in choices), [c for c in choices if c not in text]

def test_the_recipes_in_the_help_are_those_there_are():
    "Both ways: none is missing, and none is listed that does not exist"
    listed = re.search(r'# (.*), or a JSON file', next(l for l in inspect.getsource(cli.train).splitlines() if ' recipe:' in l))[1]
    assert set(listed.split(', ')) == set(RECIPES)
    for name in listed.split(', '): assert get_recipe(name).name == name

def test_messages_name_options_on_the_route_of_the_caller(capsys):
    def job(out, adapt='', only_present:cli.store_true=False): raise core.ScreenError(f'{core.option("adapt", "none")} and {core.option("out")} and {core.option("only_present", True)}')
    assert cli.run_command(job, ['x'], 'job') == 2
    assert capsys.readouterr().err == 'job: --adapt none and OUT and --only-present\n'
    def other(out): raise core.ScreenError(f'{core.option("adapt", "none")} and {core.option("only_present", True)} and {core.option("side", "plate")}')
    assert cli.run_command(other, ['x'], 'other') == 2
    assert capsys.readouterr().err == "other: --adapt none (rcic_predict) and --only-present (rcic_pack) and side='plate' (in Python)\n"
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

# What is there already

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    d = tmp_path_factory.mktemp('there')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-17'], sirnas=8, size=64, controls=0, progress=False)
    (d/'none.json').write_text('{"name": "none", "arch": "test_efficientnet", "stages": []}')
    assert cli.rcic_train(f'{d}/screen {d}/model --recipe {d}/none.json --valid none --pretrained no --tta 1'.split()) == 0
    return d

@pytest.mark.parametrize('command, more', [('predict', '{d}/x.csv'), ('embed', '{d}/x.parquet'), ('explore', '{d}/x.html'), ('drift', '{d}/x.csv'), ('report', '{d}/x.html --predictions {d}/p.csv')])
def test_every_command_that_runs_a_model_has_its_device(trained, capsys, monkeypatch, command, more):
    "The model is put on it, and one that is not there is said before anything is read"
    import rcic_fastai.folder as folder
    (trained/'p.csv').write_text('id_code,sirna\nHUVEC-02_1_B03,s1\n')
    line = f'{trained}/model {trained}/screen {more}'.format(d=trained).split()
    assert getattr(cli, f'rcic_{command}')([*line, '--device', 'tpu']) == 2
    assert '--device tpu' in capsys.readouterr().err and not [*trained.glob('x.*')]
    asked = []
    def load(path, device='cpu'):
        asked.append(str(device))
        raise core.ScreenError('seen')
    monkeypatch.setattr(folder, 'load_model', load)
    assert getattr(cli, f'rcic_{command}')([*line, '--device', 'cpu']) == 2 and asked == ['cpu']

@pytest.mark.parametrize('out, more, says', [
    ('screen/metadata.csv', '', 'would be overwritten, and rcic_fastai did not write it'), ('mine.csv', '', 'would be overwritten, and rcic_fastai did not write it'),
    ('a.csv', '--embeddings {d}/screen/metadata.csv', 'let --embeddings end in .parquet'),
    ('a.csv', '--neighbors {d}/mine.parquet', 'would be overwritten, and rcic_fastai did not write it')])
def test_no_prediction_is_written_over_something_else(trained, capsys, out, more, says):
    (trained/'mine.csv').write_text('id_code,plate,well\n')
    (trained/'mine.parquet').write_text('mine')
    before = {f: f.read_bytes() for f in trained.rglob('*') if f.is_file()}
    assert cli.rcic_predict(f'{trained}/model {trained}/screen {trained}/{out} --tta 1 {more}'.format(d=trained).split()) == 2
    assert says in capsys.readouterr().err
    assert {f: f.read_bytes() for f in trained.rglob('*') if f.is_file()} == before

def test_a_stranger_is_not_a_finished_model(trained, tmp_path, capsys):
    (tmp_path/'m').mkdir()
    (tmp_path/'m/config.json').write_text('{"model_type": "bert"}')
    (tmp_path/'m.checkpoints').mkdir()
    assert cli.rcic_train(f'{trained}/screen {tmp_path}/m --recipe {trained}/none.json --resume'.split()) == 2
    assert 'is not the configuration of a model folder' in capsys.readouterr().err and (tmp_path/'m.checkpoints').is_dir()

def test_the_folder_of_a_training_may_be_here(trained, tmp_path, monkeypatch):
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    assert cli.rcic_train(f'{trained}/screen . --recipe {trained}/none.json --valid none --pretrained no --tta 1'.split()) == 0
    assert (tmp_path/'here/config.json').is_file() and [f.name for f in tmp_path.iterdir()] == ['here']

def test_two_demos_do_not_share_a_folder(tmp_path):
    with core.only_one(tmp_path/'demo'), pytest.raises(core.ScreenError, match='is writing this output'): run_demo(tmp_path/'demo', force=True)

def test_where_a_model_answers_messages_send_to_its_predictions(capsys):
    "Other commands have options of the same name: `--tta` of rcic_train, `--wells` of rcic_pack"
    from rcic_fastai.core import option
    def of_model(
        model, # A folder
    ):
        "Ask"
        print(option('tta', 1), option('wells', 'all'), option('controls'))
    def of_screen(
        screen, # A folder
    ):
        "Ask"
        print(option('tta', 1), option('wells', 'all'))
    for func in (of_model, of_screen): assert cli.run_command(func, ['x']) == 0
    assert capsys.readouterr().out.splitlines() == ['--tta 1 (rcic_predict) --wells all (rcic_predict) --controls (rcic_pack)', '--tta 1 (rcic_train) --wells all (rcic_pack)']
