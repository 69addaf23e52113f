"Small screens: plates held out instead of an experiment, folds in turn, and a second training on everything; killed and resumed."
import json, os
import pandas as pd, pytest
from rcic_fastai import cli, workflow
from rcic_fastai.core import ScreenError
from rcic_fastai.batch.data import held_plates, labeled_rows, screen_dls
from rcic_fastai.folder import load_model, model_card
from rcic_fastai.results.report import settings_table
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pack import pack_screen
from rcic_fastai.train.controls import control_dls
from helpers import refused, same, simulate_screen

STAGES = [dict(name='all', epochs=2, lr=1e-2, loss='adacos')]


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('refit')
    simulate_screen(d/'screen', ['HUVEC-01', 'HUVEC-02', 'HUVEC-17'], sirnas=8, size=32, controls=2, progress=False)
    pack_screen(open_screen(d/'screen'), d/'s.zarr', progress=False)
    write_recipe(d, 'tiny', STAGES)
    write_recipe(d, 'best', [{**STAGES[0], 'epochs': 4, 'keep_best': 'valid_loss'}])
    return d


def write_recipe(d, name, stages): (d/f'{name}.json').write_text(json.dumps(dict(name=name, arch='test_resnet', model=dict(emb_dim=16), stages=stages)))


def train(here, out, more='', recipe='tiny', code=0):
    line = f'{here}/s.zarr {here}/{out} --recipe {here}/{recipe}.json --pretrained no --tta 1 {more}'
    assert cli.rcic_train(line.split()) == code
    return here/out


def weights(folder): return load_model(folder).model.state_dict()


def test_two_experiments_are_not_halved_but_lose_plates_and_it_is_said(here, capsys):
    out = train(here, 'auto')
    said = capsys.readouterr().out
    config = load_model(out).config
    assert len(config['held_plates']) == 2 and not config['held_out'] and {*config['trained_experiments']} == {'HUVEC-01', 'HUVEC-02'}
    assert 'are held out: the model knows the experiments of those plates' in said and '--refit trains again on everything' in said and '--valid EXP' in said
    assert config['metrics']['held_plates'] == config['held_plates'] and 'protocol' not in config['metrics']
    for text in (model_card(config), str(settings_table(load_model(out)).loc['validation', ''])): assert 'no result of a protocol' in text and config['held_plates'][0] in text
    assert cli.rcic_predict([str(out), str(here/'s.zarr'), str(here/'auto.csv'), '--tta', '1']) == 0
    assert cli.rcic_evaluate([str(here/'auto.csv'), str(here/'s.zarr')]) == 0
    assert 'of the model: Validation reached an accuracy' in capsys.readouterr().out
    assert cli.rcic_predict([str(out), str(here/'s.zarr'), str(here/'no.csv'), '--held-out']) == 2
    assert 'learned other plates of the same experiments' in capsys.readouterr().err


def test_no_well_is_on_both_sides_and_every_label_is_learned(here):
    screen = open_screen(here/'s.zarr')
    for more in (dict(), dict(controls=True), dict(norm='plate'), dict(sites=2)):
        dls = screen_dls(screen, 'plates', bs=4, **more)
        train, held = dls.train.items, dls.valid.items
        assert not {*zip(train.experiment, train.plate)} & {*zip(held.experiment, held.plate)} and len(held)
        assert {*held.sirna[held.well_type == 'treatment']} <= {*train.sirna}
    again = dls.rebuild(bs=2)
    assert again.held_plates == dls.held_plates and again.valid.items.site_id.tolist() == dls.valid.items.site_id.tolist()
    first = control_dls(dls)      # what is learned before is of no held-out plate
    assert not {*zip(first.train.items.experiment, first.train.items.plate.astype(str))} & {*dls.held_plates} and first.held_plates == dls.held_plates


def test_plates_that_would_take_labels_along_stay(here):
    rows = labeled_rows(open_screen(here/'s.zarr').table)
    held = held_plates(rows, share=.5)
    left = rows[[(e, str(p)) not in held for e, p in zip(rows.experiment, rows.plate)]]
    assert [e for e, _ in held] == ['HUVEC-02']*3 and {*left.sirna} == {*rows.sirna}, 'HUVEC-01 stays whole, and says how groups lie'
    refused(lambda: held_plates(rows[rows.experiment == 'HUVEC-01']), 'No plate can be held out', 'valid')


def test_a_model_that_learned_the_experiments_cannot_be_validated_on_their_plates(here, capsys):
    train(here, 'first', '--valid HUVEC-02')
    train(here, 'second', f'--valid plates --pretrained {here}/first', code=2)
    assert 'would be memory' in capsys.readouterr().err
    train(here, 'third', '--valid plates --cell-types each', code=2)
    assert '--valid plates is of one model' in capsys.readouterr().err


def test_refit_keeps_a_model_of_everything_with_what_was_measured(here, capsys):
    one = train(here, 'refit', '--refit --valid HUVEC-02')
    said = capsys.readouterr().out
    config = load_model(one).config
    measured = train(here, 'measured', '--valid HUVEC-02')
    assert config['validation']['runs'] == [load_model(measured).config['metrics']]
    assert not config['held_out'] and not config['metrics'] and {*config['data']['sites']} == {'HUVEC-01', 'HUVEC-02'} and not (here/'refit.validated').exists()
    assert same(weights(one), weights(train(here, 'none', '--valid none')))
    for text in (said, model_card(config)): assert 'is itself not validated; the same training reached an accuracy of' in text and 'HUVEC-02, which it held out' in text
    assert load_model(one).predict(open_screen(here/'s.zarr'), tta=1, progress=False).attrs['record']['validation'] in said
    assert cli.rcic_predict([str(one), str(here/'s.zarr'), str(here/'no.csv'), '--held-out']) == 2


@pytest.mark.parametrize('first', ['simsiam', 'controls'])
def test_the_first_step_is_that_which_was_measured(here, first, monkeypatch):
    "The main stage may choose another epoch than the first step, and did in the measured training"
    chosen = iter(dict(simsiam=[[2]], controls=[[3], [2]])[first])
    monkeypatch.setattr('rcic_fastai.workflow._chosen_epochs', lambda *_: next(chosen))
    config = load_model(train(here, f'first_{first}', f'--refit --valid HUVEC-02 --pretrain {first}', 'best')).config
    assert config['pretrain_stages'][0]['epochs'] == dict(simsiam=4, controls=3)[first] and config['stages'][0]['epochs'] == 2


def test_the_epoch_that_validation_chose_is_the_last_one_of_the_second_training(here):
    chosen = load_model(train(here, 'chosen', '--refit --valid HUVEC-02', 'best'))
    h = load_model(train(here, 'looked', '--valid HUVEC-02', 'best')).history
    best = int(h.valid_loss.idxmin()) + 1
    assert chosen.config['validation']['epochs'] == [best] and len(chosen.history) == best
    assert chosen.config['recipe']['stages'][0]['stop'] == best and chosen.config['recipe']['stages'][0]['epochs'] == 4


def test_folds_in_turn(here, capsys):
    config = load_model(train(here, 'turns', '--refit --folds 2')).config
    assert sorted(m['held_out'] for m in config['validation']['runs']) == [['HUVEC-01'], ['HUVEC-02']] and 'fold' not in config
    assert 'in the mean' in model_card(config) and '== validation (2 of 2)' in capsys.readouterr().out


class Killed(BaseException): pass


@pytest.mark.parametrize('where', ['validation', 'between', 'second', 'saved'])
def test_killed_in_either_phase_it_ends_with_the_same_weights(here, where, monkeypatch, capsys):
    whole = here/'whole'
    if not whole.exists(): train(here, 'whole', '--refit', 'best')
    name, seen = f'cut_{where}', []
    def dies(*_, **__): raise Killed
    if where == 'validation':
        from rcic_fastai.train.checkpoints import Checkpoint
        save = Checkpoint.save
        def first_epoch(self):
            save(self)
            raise Killed
        monkeypatch.setattr(Checkpoint, 'save', first_epoch)
    if where == 'between': monkeypatch.setattr(workflow, '_chosen_epochs', dies)
    if where == 'second':
        from rcic_fastai.train.checkpoints import Checkpoint
        save = Checkpoint.save
        def second(self):
            save(self)
            seen.append(str(self.folder))
            if 'validated' not in seen[-1]: raise Killed
        monkeypatch.setattr(Checkpoint, 'save', second)
        built, build = [], workflow.build_index
        def last(*args, **kwargs):      # a second training of one epoch keeps no checkpoint: it is killed at its end
            built.append(1)
            if len(built) == 2: raise Killed
            return build(*args, **kwargs)
        monkeypatch.setattr(workflow, 'build_index', last)
    if where == 'saved': monkeypatch.setattr(workflow, 'save_curve', lambda history, out: dies() if 'validated' not in str(out) else None)
    with pytest.raises(Killed): train(here, name, '--refit', 'best')
    monkeypatch.undo()
    assert (here/f'{name}.validated').exists()
    train(here, name, '--refit', 'best', code=2)
    train(here, name, '--refit --resume', 'best')
    assert same(weights(here/name), weights(whole)) and load_model(here/name).config['validation'] == load_model(whole).config['validation']
    assert not [*here.glob(f'{name}.*')] and (here/name/'history.png').exists()
    train(here, name, '--refit --resume --seed 3', 'best', code=2)
    assert 'different arguments.seed' in capsys.readouterr().err


@pytest.mark.parametrize('more, words', [('--refit --valid none', 'holds out nothing'), ('--refit --cell-types each', 'is of one model'), ('--refit --fold 1', 'say how many with --folds'),
                                         ('--refit --folds 2 --valid plates', 'both say what is held out'), ('--folds 2', 'or --refit for all of them'), ('--refit --experiments HUVEC-01', 'so there is nothing to validate with')])
def test_what_cannot_be_trained_twice_is_said(here, more, words, capsys):
    train(here, 'odd', more, code=2)
    assert words in capsys.readouterr().err and not (here/'odd').exists()


def test_a_search_is_not_chosen_on_plates_of_known_experiments(here):
    "Wells of the same experiment are in the index: what finds those best is not what finds new experiments best"
    config = load_model(train(here, 'plates_search', '--valid plates --search auto')).config
    assert config['held_plates'] and config['search']['plain']['neck'] == 'no' and 'no experiment was held out to choose by' in config['search']['plain']['notes'][0]


# ---- experiments that the table marks as val, and labels that were corrected

@pytest.fixture(scope='module')
def marked(here):
    "Four experiments, of which one is marked as val and one is for testing"
    simulate_screen(here/'four', ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'HUVEC-17'], sirnas=8, size=32, controls=2, progress=False)
    s = open_screen(here/'four')
    return s[s.table.assign(dataset=s.table.dataset.where(s.table.experiment != 'HUVEC-03', 'val'))]


def learned(screen, here, out, recipe='tiny', **kwargs): return workflow.train_screen(screen, here/out, str(here/f'{recipe}.json'), pretrained='no', tta=1, **kwargs)


def test_what_is_trained_again_learns_what_the_table_marks_as_val(marked, here, capsys):
    model = learned(marked, here, 'val_refit', refit=True)
    assert sorted(model.trained) == ['HUVEC-01', 'HUVEC-02', 'HUVEC-03'] and model.config['validation']['runs'][0]['held_out'] == ['HUVEC-03']
    assert sorted(learned(marked, here, 'val_fold', folds=3, fold=1).trained + load_model(here/'val_fold').config['held_out']) == ['HUVEC-01', 'HUVEC-02', 'HUVEC-03']
    write_recipe(here, 'full', [STAGES[0], dict(name='more', epochs=1, lr=1e-3, full_data=True)])
    assert sorted(learned(marked, here, 'val_full', 'full').trained) == ['HUVEC-01', 'HUVEC-02', 'HUVEC-03']
    assert 'is marked as val' not in capsys.readouterr().out
    for out, valid in (('val_none', 'none'), ('val_other', 'HUVEC-02')):
        model = learned(marked, here, out, valid=valid)
        assert 'HUVEC-03' not in [*model.trained, *model.config['held_out']] and 'HUVEC-03 is marked as val in the table, so neither learned nor' in capsys.readouterr().out


def test_folds_of_cell_types_learn_what_the_table_marks_as_val(marked, here, capsys):
    "As those of one model do: nothing is left aside"
    models = learned(marked, here, 'val_cells', folds=3, fold=1, cell_types='each').models
    assert 'is marked as val' not in capsys.readouterr().out
    assert sorted([*models['HUVEC'].trained, *models['HUVEC'].config['held_out']]) == ['HUVEC-01', 'HUVEC-02', 'HUVEC-03']


def test_corrected_labels_are_another_training(here, monkeypatch):
    "Also where they are in a column of their own: two columns of the same labels, in other wells"
    s = open_screen(here/'s.zarr')
    first = s.table.assign(compound='c ' + s.table.sirna.astype(str))
    treated = first.well_type == 'treatment'
    names = sorted(first.compound[treated].unique())
    second = first.assign(compound=first.compound.where(~treated, first.compound.map(dict(zip(names, names[1:] + names[:1])))))
    how = dict(target='compound', valid='HUVEC-02', log='csv')
    from rcic_fastai.train import recipes
    was = recipes.EpochLog.after_epoch
    def dies(self):
        was(self)
        if self.epoch: raise Killed
    monkeypatch.setattr(recipes.EpochLog, 'after_epoch', dies)
    with pytest.raises(Killed): learned(s[first], here, 'labels', **how)
    monkeypatch.setattr(recipes.EpochLog, 'after_epoch', was)
    refused(lambda: learned(s[second], here, 'labels', resume=True, **how), 'was begun with different')
    learned(s[first], here, 'labels', resume=True, **how)
    refused(lambda: learned(s[second], here, 'labels', resume=True, **how), 'was begun with different training_rows')


def test_a_log_keeps_all_rows_and_no_file_of_others(here, monkeypatch):
    "Killed after the control wells were learned, and continued; a CSV that is no log stays"
    from rcic_fastai.train import recipes
    s, how = open_screen(here/'s.zarr'), dict(valid='HUVEC-02', log='csv', pretrain='controls')
    whole = learned(s, here, 'log_whole', **how).history.stage.tolist()
    was, n = recipes.EpochLog.after_epoch, []
    def dies(self):
        was(self)
        n.append(1)
        if len(n) == 3: raise Killed
    monkeypatch.setattr(recipes.EpochLog, 'after_epoch', dies)
    with pytest.raises(Killed): learned(s, here, 'log_cut', **how)
    monkeypatch.setattr(recipes.EpochLog, 'after_epoch', was)
    learned(s, here, 'log_cut', resume=True, **how)
    rows = [len(pd.read_csv(here/f'log_{k}.log.csv')) for k in ('whole', 'cut')]
    assert rows == [len(whole)]*2
    (here/'mine.log.csv').write_text('what,when\nscreen,May\n')
    refused(lambda: learned(s, here, 'mine', **how), 'mine.log.csv would be overwritten and is no log')
    assert (here/'mine.log.csv').read_text() == 'what,when\nscreen,May\n' and not (here/'mine').exists()


def test_brightness_of_controls_is_kept_though_only_treatments_are_learned(here):
    "Also those of negative controls, by which a later drift is told"
    config = load_model(train(here, 'bright', '--valid none')).config
    assert {(e['experiment'], e['wells']) for e in config['data']['exposure']} == {(e, w) for e in ('HUVEC-01', 'HUVEC-02') for w in ('treatment', 'negative_control')}


def test_one_sample_is_refused(here, tmp_path, capsys):
    simulate_screen(tmp_path/'one', ['HUVEC-01'], sirnas=1, size=32, plates=1, controls=0, sites=1, progress=False)
    assert cli.rcic_train([str(tmp_path/'one'), str(tmp_path/'m'), '--recipe', str(here/'tiny.json'), '--pretrained', 'no', '--tta', '1']) == 2
    said = capsys.readouterr().err
    assert '1 training sample' in said and 'BatchNorm needs two' in said and not (tmp_path/'m').exists()


def test_files_can_be_read_by_whom_the_umask_lets(here):
    before = os.umask(0o022)
    try: out = train(here, 'shared', '--valid none')
    finally: os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in out.iterdir()} == {'0o644'}


def test_a_screen_of_learned_experiments_is_refused_at_once(here, tmp_path, capsys):
    known = load_model(train(here, 'knows', '--valid none'))
    screen = open_screen(here/'s.zarr')
    with pytest.raises(ScreenError, match='would be memory: give a screen with new experiments'): known.predict(screen[screen.table.dataset == 'train'], tta=1, progress=False)
    assert 'are predicted' not in capsys.readouterr().err
