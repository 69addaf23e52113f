"Opening: a reader is one entry of `SCREEN_KINDS`, and channels that nobody named are said."
import shutil
import numpy as np, pandas as pd, pytest
from helpers import simulate_screen
from rcic_fastai.cli import run_command, pack
from rcic_fastai.core import ScreenError
from rcic_fastai.screen.images import ImageSource
from rcic_fastai.screen.open import SCREEN_KINDS, ScreenKind, open_screen, screen_kind
from rcic_fastai.screen.tables import check_table


@pytest.fixture
def folder(tmp_path):
    simulate_screen(tmp_path/'s', ['HUVEC-01'], sirnas=4, size=32, controls=0, sites=1, progress=False)
    return tmp_path/'s'


def add_channel(folder, n=7):
    for f in folder.rglob('*_w6.png'): shutil.copy(f, f.with_name(f.name.replace('_w6', f'_w{n}')))


def test_six_channels_need_no_note(folder, capsys):
    assert open_screen(folder).shape[0] == 6 and 'left out' not in capsys.readouterr().out


def test_a_seventh_channel_is_said_or_read(folder, capsys):
    add_channel(folder)
    assert open_screen(folder).shape[0] == 6
    said = capsys.readouterr().out
    assert '_w7.png, which are left out' in said and 'with channels' in said
    screen = open_screen(folder, channels=list('abcdefg'))
    assert screen.shape[0] == 7 and screen.channels == tuple('abcdefg') and capsys.readouterr().out == ''
    site = screen.source[screen.table.site_id[0]]
    assert (site[6] == site[5]).all()


def test_a_command_names_seven_channels_too(folder, tmp_path, capsys):
    add_channel(folder)
    assert run_command(pack, [str(folder), str(tmp_path/'six.zarr')], 'rcic_pack') == 0
    assert 'with --channels to read them' in capsys.readouterr().out
    assert run_command(pack, [str(folder), str(tmp_path/'s.zarr'), '--channels', 'a,b,c,d,e,f,g'], 'rcic_pack') == 0
    assert open_screen(tmp_path/'s.zarr').channels == tuple('abcdefg')


def test_a_channel_that_the_files_lack_is_named(folder):
    with pytest.raises(ScreenError, match='lack channel files'): open_screen(folder, channels=list('abcdefg'))


class Ones(ImageSource):
    shape, dtype = (2, 4, 4), np.dtype(np.uint8)
    def _read(self, site_id, out): out[:] = 1


def read_ones(path, well='B02'):
    row = dict(site_id=f'A_1_{well}_1', well_id=f'A_1_{well}', cell_type='X', dataset='train', experiment='A', plate=1, well=well, site=1,
               well_type='treatment', sirna='s', sirna_id=0, plate_group=1)
    table = check_table(pd.DataFrame([row]), path)
    return table, Ones(path, table, ['a', 'b'])


def test_one_entry_adds_a_reader(tmp_path, monkeypatch):
    (tmp_path/'x.ones').touch()
    assert screen_kind(tmp_path/'x.ones') == 'files'
    monkeypatch.setitem(SCREEN_KINDS, 'ones', ScreenKind(lambda p: p.suffix == '.ones', read_ones, 'a file of ones'))
    assert screen_kind(tmp_path/'x.ones') == 'ones'
    screen = open_screen(tmp_path/'x.ones', well='C03')       # complete: a source without files misses none
    assert screen.source['A_1_C03_1'].sum() == 32 and len(screen.source.missing()) == 0
    with pytest.raises(ScreenError, match='is a file of ones, for which root cannot be given'): open_screen(tmp_path/'x.ones', root='x')


def test_only_screens_without_a_table_of_their_own_need_options():
    assert {n for n, k in SCREEN_KINDS.items() if k.needs_options} == {'files', 'plates', 'pattern'}
