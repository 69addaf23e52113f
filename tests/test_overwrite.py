"Every command: a file that is there is replaced only where the library wrote it as it is now."
import inspect, io, itertools, json, os
from pathlib import Path
import pandas as pd, pytest
from helpers import learner, simulate_screen
from rcic_fastai import cli
import rcic_fastai.folder                # learn.to_model
from rcic_fastai.core import ScreenError, check_replaceable
from rcic_fastai.batch.data import screen_dls
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen

# command: its words, the endings of OUT, and what else it writes beside OUT (instead of its ending, or behind it)
COMMANDS = dict(
    rcic_simulate=('{out}', [''], []), rcic_download=('{out}', [''], []), rcic_pack=('{d}/png {out}', ['.zarr'], []), rcic_train=('{d}/screen.zarr {out}', [''], []), rcic_demo=('{out}', [''], []),
    rcic_show=('{d}/screen.zarr {out}', ['.png', '.pdf', '.svg'], []),
    rcic_predict=('{d}/model {d}/screen.zarr {out} --scores', ['.csv'], ['.json', '.top.csv', '.scores.parquet']),
    rcic_ensemble=('{out} {d}/a.csv {d}/b.csv', ['.csv'], ['.json', '.top.csv', '.scores.parquet']),
    rcic_confidence=('{out} {d}/a.csv {d}/screen.zarr {d}/b.csv', ['.csv'], ['.json']),
    rcic_drift=('{d}/model {d}/screen.zarr {out}', ['.csv', '.html'], ['.json']),
    rcic_report=('{d}/model {d}/screen.zarr {out} --predictions {d}/a.csv', ['.html'], []),
    rcic_embed=('{d}/model {d}/screen.zarr {out} --tta 1', ['.parquet', '.csv', '.csv.gz', '.h5ad'], ['+.json']),
    rcic_hits=('{d}/profiles.csv {out}', ['.csv', '.parquet'], ['.png', '.json']),
    rcic_explore=('{d}/model {d}/screen.zarr {out}', ['.html', '.parquet', ''], []))
MORE = {'rcic_predict': ['--neighbors', '--embeddings']}       # options that name a file, too
TEXTS = {'.csv': ['id_code,sirna\nHUVEC-03_1_B02,s1\n', 'Metadata_plate,Metadata_well,f1\n1,B02,2\n', 'id_code,sirna,chance,names,n_names,experiment\n', 'sirna,p,q\n'],
         '.top.csv': ['id_code,top_1\nx,y\n'], '.json': ['{"protocol": "inductive", "sha256": {}}', '{"target": 1, "measure": 2, "n_null": 3, "level": 4}'],
         '.html': ['<!doctype html><html><title>mine</title></html>'], '.csv.gz': ['no gzip'], '.h5ad': ['\x89HDF mine'], '': ['my notes'], '.zarr': ['my notes']}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('overwrite')
    simulate_screen(d/'png', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=6, size=32, plates=1, controls=1, progress=False)
    pack_screen(open_screen(d/'png'), d/'screen.zarr', progress=False)
    learner(screen_dls(open_screen(d/'screen.zarr'), valid='HUVEC-02', bs=8, device='cpu')).to_model(tta=1, progress=False).save(d/'model')
    return d

def contents(ending):
    "What someone else could have in a file of this name, much like ours"
    if ending in ('.png', '.pdf', '.svg'):
        import matplotlib.pyplot as plt
        f = io.BytesIO()
        plt.figure(figsize=(1, 1)).savefig(f, format=ending[1:])
        plt.close('all')
        return [f.getvalue()]
    if ending.endswith('.parquet'):
        f = io.BytesIO()
        pd.DataFrame(dict(Metadata_plate=['1'], id_code=['a'], x=[1.])).to_parquet(f, index=False)
        return [f.getvalue()]
    return [t.encode('latin-1') for t in TEXTS[ending]]

def beside(out, how): return Path(f'{out}{how[1:]}') if how.startswith('+') else out.with_suffix(how)

def snapshot(folder): return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def cases():
    for command, (_, endings, others) in COMMANDS.items():
        for end in endings:
            yield command, end, ''
            for how in others if (command, end) != ('rcic_drift', '.html') else (): yield command, end, how     # a page has no record

def test_every_command_that_writes_is_here():
    "A new command with OUT or DEST has to be added"
    found = set()
    for name in (n for n in cli.__all__ if n.startswith('rcic_')):
        function = {'rcic_evaluate': 'evaluate_csv', 'rcic_explore': 'explore_screen'}.get(name, name.removeprefix('rcic_'))
        parameters = inspect.signature(getattr(cli, function)).parameters.values()
        if {'out', 'dest'} & {p.name for p in parameters if p.default is p.empty}: found.add(name)
    assert found - {'rcic_evaluate'} == set(COMMANDS)             # it reads OUT

@pytest.mark.parametrize('command, end, how', list(cases()))
def test_files_of_others_stay(made, tmp_path, capsys, command, end, how):
    out = tmp_path/f'mine{end}'
    file = beside(out, how) if how else out
    words = COMMANDS[command][0].format(d=made, out=out).split()
    for content in contents(how.lstrip('+') or end):
        file.write_bytes(content)
        before = snapshot(tmp_path)
        assert getattr(cli, command)(words) == 2
        err = capsys.readouterr().err.strip()
        assert err.count('\n') == 0 and file.name in err, err
        assert snapshot(tmp_path) == before

@pytest.mark.parametrize('name', MORE['rcic_predict'])
def test_files_of_options_stay(made, tmp_path, capsys, name):
    file = tmp_path/'mine.parquet'
    file.write_bytes(contents('.parquet')[0])
    before = snapshot(tmp_path)
    assert cli.rcic_predict([*map(str, (made/'model', made/'screen.zarr', tmp_path/'out.csv', name, file))]) == 2
    assert 'mine.parquet would be overwritten, and rcic_fastai did not write it' in capsys.readouterr().err and snapshot(tmp_path) == before

def test_what_the_library_wrote_is_replaced_until_someone_edits_it(made, tmp_path, capsys):
    near = tmp_path/'near.parquet'
    words = [*map(str, (made/'model', made/'screen.zarr', tmp_path/'out.csv', '--tta', 1, '--neighbors', near, '--scores'))]
    for _ in range(2): assert cli.rcic_predict(words) == 0
    (tmp_path/'out.csv').write_text((tmp_path/'out.csv').read_text() + '\n')
    assert cli.rcic_predict(words) == 2 and 'out.csv would be overwritten, and rcic_fastai did not write it' in capsys.readouterr().err
    (tmp_path/'out.csv').unlink()
    assert cli.rcic_predict(words) == 0
    pd.read_parquet(near).to_parquet(near)
    assert cli.rcic_predict(words) == 2 and 'near.parquet would be overwritten, and rcic_fastai did not write it' in capsys.readouterr().err

@pytest.mark.parametrize('command, end', [('rcic_show', '.png'), ('rcic_show', '.pdf'), ('rcic_show', '.svg'), ('rcic_explore', '.html'), ('rcic_drift', '.html')])
def test_an_edited_page_or_picture_stays(made, tmp_path, capsys, command, end):
    "They have no record: the checksum is in their mark"
    out = tmp_path/f'mine{end}'
    words = COMMANDS[command][0].format(d=made, out=out).split() + ([] if command == 'rcic_show' else ['--tta', '1'])
    if command == 'rcic_drift': written(out)
    else:
        for _ in range(2): assert getattr(cli, command)(words) == 0
    data = out.read_bytes()
    for at in (len(data)//2, len(data)):
        out.write_bytes(data[:at] + b'mine' + data[at:])
        before = snapshot(tmp_path)
        assert getattr(cli, command)(words) == 2
        assert f'mine{end} would be overwritten, and rcic_fastai did not write it as it is now' in capsys.readouterr().err and snapshot(tmp_path) == before

def written(out):
    "The pages of rcic_drift and rcic_report are of `write_report`"
    from rcic_fastai.results.report import write_report
    for _ in range(2): write_report(out, 'Drift', [])

@pytest.mark.parametrize('sums', [dict(a=['x']), dict(a=1), ['x'], None])
def test_an_odd_record_makes_no_file_ours(tmp_path, sums):
    (tmp_path/'a.csv').write_text('1')
    (tmp_path/'a.json').write_text(json.dumps(dict(written_by='rcic_fastai', kind='hits', sha256=sums)))
    with pytest.raises(ScreenError, match='a.csv would be overwritten'): check_replaceable(tmp_path/'a.json', 'hits', tmp_path/'a.csv')

@pytest.mark.parametrize('is_first', [True, False])
@pytest.mark.parametrize('step', [0, 1, 2, 3])
def test_a_run_that_was_killed_while_it_replaced_can_be_repeated(tmp_path, monkeypatch, step, is_first):
    "Whatever was moved into place before, the record knows it"
    from rcic_fastai.predict.predict import read_predictions, write_predictions
    def answers(label): return pd.DataFrame(dict(id_code=['a'], sirna=[label], top_1=[label], protocol='inductive'))
    if not is_first: write_predictions(answers('s1'), tmp_path/'p.csv')
    real, count = os.replace, itertools.count()
    def killed(a, b):
        if next(count) == step: raise KeyboardInterrupt
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt): write_predictions(answers('s2'), tmp_path/'p.csv')
    write_predictions(answers('s3'), tmp_path/'p.csv')
    assert read_predictions(tmp_path/'p.csv').sirna.tolist() == ['s3'] and sorted(p.name for p in tmp_path.iterdir()) == ['p.csv', 'p.json', 'p.top.csv']
