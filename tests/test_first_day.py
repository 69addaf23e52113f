"What someone meets who packs plates of their own for the first time: the messages say what to do, and the advice works"
import io, shlex

import numpy as np, pandas as pd, pytest, tifffile
from matplotlib.text import Text
from helpers import learner, refused, simulate_screen
from rcic_fastai.batch.data import screen_dls, spec_source
from rcic_fastai.cli import rcic_pack
from rcic_fastai.core import _typed
from rcic_fastai.embed.hits import find_hits, show_hits
from rcic_fastai.predict.trained import validation_note
from rcic_fastai.results.explain import label_direction  # adds model.explain
from rcic_fastai.screen.open import open_screen
from rcic_fastai.workflow import training_notes

PATTERN = '{batch}/{plate}_{well}_s{site}_w{channel}.tif'


def plates(root, channels):
    "Write 16-bit pictures of three wells: {'batch/plate': numbers of channels}; return the layout"
    for place, numbers in channels.items():
        (root/place).parent.mkdir(parents=True, exist_ok=True)
        for well in ('B02', 'B03', 'C02'):
            for c in numbers: tifffile.imwrite(root/f'{place}_{well}_s1_w{c}.tif', np.full((16, 16), c, np.uint16))
    names = [p.split('/')[-1] for p in channels]
    rows = [(p, w, c) for p in names for w, c in zip(('B02', 'B03', 'C02'), ('DMSO', 'x', 'y'))]
    pd.DataFrame(rows, columns=['plate', 'well', 'compound']).to_csv(root.parent/'layout.csv', index=False)
    return root.parent/'layout.csv'


def said_by(capsys, *args):
    "Return what rcic_pack answers, and its status"
    status = rcic_pack([*map(str, args)])
    out = capsys.readouterr()
    return out.out + out.err, status


# ---- patterns

@pytest.mark.parametrize('wrong', ['{plate}_{well}_s{site}_w{channel}.tif', PATTERN + 'f', '{plate}_{well}_s{site}_w{channel}.png'])
def test_the_pattern_that_a_message_gives_can_be_typed(wrong, tmp_path, capsys):
    "folders are part of a name; --pattern imagexpress, which fits too, would make an experiment of each plate"
    folder = tmp_path/'my plates'
    layout = plates(folder, {'March 3/P0011': (1, 2), 'May/P0012': (1, 2)})
    told, status = said_by(capsys, folder, tmp_path/'x.zarr', '--pattern', wrong, '--layout', layout)
    assert status == 2 and 'give --pattern ' in told
    option, pattern = shlex.split(told.split(': give ')[1].split(', which fits')[0])
    assert option == '--pattern'
    told, status = said_by(capsys, folder, tmp_path/'x.zarr', '--pattern', pattern, '--layout', layout, '--dry-run')
    assert status == 0 and 'experiments: 2 (March 3: train, May: train)' in told


def test_a_folder_per_plate_is_the_plate(tmp_path):
    plates(tmp_path/'s', {'P1/x': (1,)})
    wrong = 'x_{well}_s{site}_w{channel}.tif'
    refused(lambda: open_screen(tmp_path/'s', pattern=wrong), "pattern='{plate}/x_{well}_s{site}_w{channel}.tif', which fits where each folder is a plate")


@pytest.mark.parametrize('value, want', [(['2026-05 May', 'June'], '2026-05 May,June'), ({'negative_control': ["mock 0.1%", "5'"]}, "mock 0.1%=negative_control,5'=negative_control"), (3, '3'), (None, 'no'), ('EXP,EXP', 'EXP,EXP')])
def test_values_in_advice_are_one_word_of_a_shell(value, want):
    assert shlex.split(_typed(value)) == [want]
    assert ("'" in _typed(value)) == (shlex.quote(want) != want)


# ---- channels

@pytest.mark.parametrize('numbers, words', [
    ({'May/P1': (1, 2, 3), 'May/P2': (1, 2)}, 'plate May P2 has no file of channel 3'),
    ({'May/P1': (1, 2), 'June/P2': (1, 2, 3, 4), 'May/P3': (1, 2)}, 'plates May P1, May P3 have no file of channels 3, 4')])
def test_a_plate_with_fewer_channels_is_named_and_can_be_packed(numbers, words, tmp_path, capsys):
    "nothing can be restored there, and --only-present would leave the whole plate out"
    layout = plates(tmp_path/'s', numbers)
    how = [tmp_path/'s', tmp_path/'x.zarr', '--pattern', PATTERN, '--layout', layout, '--controls', 'DMSO']
    for more in ([], ['--dry-run']):
        told, _ = said_by(capsys, *how, *more)
        assert words in told and 'choose channels that all plates have with --channels' in told
    assert said_by(capsys, *how, '--channels', '1,2')[1] == 0
    assert len(open_screen(tmp_path/'x.zarr')) == 3*len(numbers)


def test_a_lost_file_is_no_plate_of_fewer_channels(tmp_path, capsys):
    layout = plates(tmp_path/'s', {'May/P1': (1, 2), 'May/P2': (1, 2)})
    (tmp_path/'s'/'May'/'P2_B03_s1_w2.tif').unlink()
    told, status = said_by(capsys, tmp_path/'s', tmp_path/'x.zarr', '--pattern', PATTERN, '--layout', layout)
    assert status == 2 and 'P2_B03_s1_w2.tif' in told and '--channels' not in told and 'restore them, or leave' in told


def test_channels_of_other_names_are_told_how_to_get_those_of_the_model(tmp_path):
    plates(tmp_path/'s', {'May/P1': (1, 2)})
    one, two = (open_screen(tmp_path/'s', pattern=PATTERN, channels=c) for c in (dict(DNA=1, ER=2), None))
    spec = screen_dls(one, valid='none', bs=2, device='cpu', target='well').spec
    refused(lambda: spec_source(spec, two.source), 'lacks DNA, ER (it has 1, 2)', 'pack it with the names of the model', "channels='DNA=1'")
    assert 'names of the model' not in refused(lambda: spec_source(spec, one.pick('DNA').source), 'lacks ER')


def test_wells_without_a_layout_are_told_of_one(tmp_path, capsys):
    plates(tmp_path/'s', {'May/P1': (1, 2)})
    told, _ = said_by(capsys, tmp_path/'s', tmp_path/'x.zarr', '--pattern', PATTERN, '--dry-run')
    assert 'no well has a perturbation' in told and 'in the table of --layout' in told


# ---- hits

def wells(n=6, doses=(1., 10.), length=8., seed=0):
    "Profiles of four plates: twenty controls and `n` compounds at each dose, all of which act"
    rng, rows = np.random.default_rng(seed), []
    effect = rng.normal(size=(n, 12))
    for plate in range(4):
        named = [('DMSO', np.nan)]*20 + [(f'compound-{i}', d) for i in range(n) for d in doses]
        for w, (c, d) in enumerate(named):
            x = rng.normal(size=12) + (0 if c == 'DMSO' else length*effect[int(c[-1])]/np.linalg.norm(effect[int(c[-1])]))
            rows.append((f'P{plate}', f'{"ABCDEFGH"[w % 8]}{w//8+1:02d}', c, d, *x))
    return pd.DataFrame(rows, columns=[*(f'Metadata_{k}' for k in ('Plate', 'Well', 'compound', 'dose')), *(f'f{i}' for i in range(12))])


def test_doses_that_are_taken_together_are_said():
    both = find_hits(wells(), controls='DMSO', n_null=200, progress=False)
    note = next(o for o in both.attrs['notes'] if 'several doses' in o)
    assert '6 perturbations have wells of several doses in the column dose' in note and "target='sirna+dose'" in note
    for one in (find_hits(wells(), controls='DMSO', target='compound+dose', n_null=200, progress=False),
                find_hits(wells(doses=(1.,)), controls='DMSO', n_null=200, progress=False)):
        assert not any('several doses' in o for o in one.attrs['notes'])


def test_names_of_the_strongest_hits_can_be_read(close_figures):
    "all of them have the smallest p that there is, and stood on top of each other"
    hits = find_hits(wells(), controls='DMSO', target='compound+dose', n_null=200, progress=False)
    fig = show_hits(hits)
    fig.savefig(io.BytesIO())
    boxes = [Text.get_window_extent(t) for t in fig.axes[0].texts]          # without the line to the point
    assert len(boxes) == 8 and fig.axes[0].texts[0].get_text().endswith((' 1', ' 10'))
    for i, a in enumerate(boxes):
        assert a.x0 > 0 and a.x1 < fig.bbox.x1
        assert not any(a.overlaps(b) for b in boxes[:i])


# ---- models

def test_what_is_said_of_shared_batches_is_not_denied_by_figures():
    "an accuracy on held-out plates may be below that of a new experiment: nothing may say that it is more"
    note = validation_note(dict(held_plates=['May plate 2'], metrics=dict(accuracy=.125, held_plates=['May plate 2'])))
    table = pd.DataFrame(dict(well_id=['a', 'b'], experiment='May', plate='1', well=['A01', 'A02'], sirna=['x', 'y'], well_type='treatment', dataset='train'))
    for said in (note, *training_notes(table, 'sirna', plates=['May plate 2'])):
        assert 'may reach less' in said and 'no result of a protocol' in said and 'more than' not in said


@pytest.mark.parametrize('norm', ['own', 'plate'])
def test_a_model_that_plates_normalize_explains_its_answers(norm, tmp_path, close_figures):
    simulate_screen(tmp_path/'s', ['HUVEC-01', 'HUVEC-17'], sirnas=4, size=32, plates=1, controls=0, progress=False)
    screen = open_screen(tmp_path/'s')
    model = learner(screen_dls(screen.train, valid='none', bs=4, norm=norm, device='cpu')).to_model(tta=1, progress=False)
    why = model.explain(screen, screen.test.wells.well_id[:1], steps=1)
    assert len(why) == 2 and label_direction(model, why.table.label[0]).norm() > 0
