"A folder of files whose names say what they show: patterns, layouts, and what is rejected by name."
import numpy as np, pandas as pd, pytest, tifffile
from helpers import refused
from rcic_fastai.cli import rcic_pack
from rcic_fastai.screen.files import check_files
from rcic_fastai.screen.open import open_screen
from rcic_fastai.screen.pattern import PATTERNS, name_fields, pattern_files, read_pattern

PLAIN = '{plate}_{well}_s{site}_w{channel}.tif'
WELLS = ('A01', 'A02')


def draw(folder, names):
    "Write a picture of 16×16 px under each name; its pixels are the number of the name, from 1"
    for i, name in enumerate(names, 1):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder/name, np.full((16, 16), i, np.uint16))
    return folder


def plain(folder, plates=('P0012', 'P0013'), wells=WELLS, sites=(1,), channels=(1, 2)):
    return draw(folder, [f'{p}_{w}_s{s}_w{c}.tif' for p in plates for w in wells for s in sites for c in channels])


def layout(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


@pytest.fixture
def folder(tmp_path): return plain(tmp_path/'s')


@pytest.fixture
def by_well(tmp_path): return layout(tmp_path/'layout.csv', Well=['a1', 'A2'], Compound=['DMSO', 'x'], Dose=[0, .5])


# a pattern

@pytest.mark.parametrize('path, pattern, want', [
    ('P_0012_A01_s01_w2.tif', PLAIN, dict(plate='P_0012', well='A01', site='1', channel='2')),
    ('P1_b2_s10_wDNA.TIF', PLAIN, dict(plate='P1', well='B02', site='10', channel='DNA')),
    ('P1_AF48_s1_wAlexa 488.tif', PLAIN, dict(plate='P1', well='AF48', site='1', channel='Alexa 488')),
    ('May/P1/A01/DNA.png', '{experiment}/{plate}/{well}/{channel}.png', dict(experiment='May', plate='P1', well='A01', channel='DNA')),
    ('May/P1/P1_A01.png', '{batch}/{barcode}/{plate}_{well}.png', dict(experiment='May', plate='P1', well='A01')),
    ('x/y/P1_A01_z3_t02.png', '**/{plate}_{well}_z{z}_t{t}.png', dict(plate='P1', well='A01', z='3', t='2')),
    ('P1_A01_5uM.tif', '{plate}_{well}_{dose}uM.tif', dict(plate='P1', well='A01', dose='5')),
    ('run7_x/r02c03f01.tif', '{plate}_*/r{row}c{column}f{fov}.tif', dict(plate='run7', well='B03', site='1')),
    ('P10102.tif', '{plate:2}{row:2}{column:2}.tif', dict(plate='P1', well='A02'))])
def test_what_a_pattern_reads(path, pattern, want): assert name_fields(path, pattern) == want


@pytest.mark.parametrize('path, pattern', [
    ('a/P1_A01_s1_w1.tif', PLAIN), ('P1_A01_s1_w1.tiff', PLAIN), ('P1_AAA1_s1_w1.tif', PLAIN), ('P1_A01_sx_w1.tif', PLAIN),
    ('P1_A01_s1_w_1.tif', PLAIN), ('P2/P1_A01.png', '{plate}/{plate}_{well}.png'), ('P1/x/A01.tif', '{plate}/*/{well}/*.tif')])
def test_what_does_not_fit(path, pattern): assert name_fields(path, pattern) is None


@pytest.mark.parametrize('path, pattern, words', [
    ('May_01_P1_A01.tif', '{experiment}_{plate}_{well}.tif', ['in two ways', 'experiment May; plate 01_P1', 'experiment May_01; plate P1', '{experiment:3}']),
    ('P1_A01_w12345.tif', '{plate}_{well}_w{channel}*.tif', ['in two ways', '{channel:1}']),
    ('P1_A00.tif', '{plate}_{well}.tif', ['P1_A00.tif', "'A00' is not a well name"]), ('r0c1.tif', 'r{row}c{column}.tif', ['r0c1.tif', 'count from 1']),
    ('P1_1.tif', '{plate}_{row}.tif', ['name the well', '{row}{column}']), ('P1.tif', '{plate}.tif', ['name the well']),
    ('A01r1c1.tif', '{well}r{row}c{column}.tif', ['name the well', 'once']), ('a', '{plate', ['not understood', 'in pairs']),
    ('a', '{well}[_{site}', ['not understood', 'in pairs']), ('a', '{well:x}', ['number of characters']), ('a', '{file}_{well}', ['{file}', 'choose from'])])
def test_what_is_rejected(path, pattern, words): refused(lambda: name_fields(path, pattern), *words)


# a folder

def test_the_pictures_are_those_that_the_names_say(folder):
    table, source = read_pattern(folder, PLAIN)
    assert table.plate.tolist() == ['P0012', 'P0012', 'P0013', 'P0013'] and table.experiment.tolist() == table.plate.tolist()
    assert source.channels == ('1', '2') and source.dtype == np.uint16 and source.shape == (2, 16, 16)
    assert [source[i][:, 0, 0].tolist() for i in table.site_id] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert check_files(source) is source


def test_channels_by_number_name_and_order(tmp_path):
    plain(tmp_path, plates=['P1'], wells=['A01'], channels=[f'{c:02}' for c in range(1, 12)])
    assert read_pattern(tmp_path, PLAIN)[1].channels == tuple(map(str, range(1, 12)))
    for channels in (dict(DNA=2, ER='01'), dict(DNA='2', ER=1)):
        table, source = read_pattern(tmp_path, PLAIN, channels=channels)
        assert source.channels == ('DNA', 'ER') and source[table.site_id[0]][:, 0, 0].tolist() == [2, 1]
    assert read_pattern(tmp_path, PLAIN, channels='3')[1].channels == ('3',)
    refused(lambda: read_pattern(tmp_path, PLAIN, channels=['DNA']), 'no channel DNA', 'it has 1, 2')


def test_names_of_channels_that_are_numbers_are_told_how(folder, capsys):
    refused(lambda: read_pattern(folder, PLAIN, channels=['DNA', 'ER']), 'it has 1, 2; to name them, say which is which, such as', "channels=dict(DNA='1', ER='2')")
    for odd in (['1', 'ER'], ['3'], dict(DNA='3'), ['a', 'b', 'c']): assert 'which is which' not in refused(lambda: read_pattern(folder, PLAIN, channels=odd), 'has no channel')
    assert rcic_pack([str(folder), 'no.zarr', '--pattern', PLAIN, '--channels', 'DNA,ER']) == 2 and '--channels DNA=1,ER=2.' in capsys.readouterr().err
    assert rcic_pack([str(folder), 'no.zarr', '--pattern', PLAIN, '--test', 'P7']) == 2 and 'P7 cannot be test: the experiments are P0012, P0013; correct --test.' in capsys.readouterr().err


def test_one_file_with_all_channels(tmp_path):
    for i, w in enumerate(WELLS): tifffile.imwrite(tmp_path/f'P1_{w}.tif', np.full((3, 16, 16), i, np.uint16), photometric='minisblack')
    table, source = read_pattern(tmp_path, '{plate}_{well}.tif', channels=['DNA', 'ER', 'Mito'])
    assert source.shape == (3, 16, 16) and source[table.site_id[1]].max() == 1


def test_other_files_are_counted_and_one_is_named(folder, capsys):
    for name in ('Index.xml', 'P0012_A01_thumb.tif', '.hidden'): (folder/name).touch()
    assert len(pattern_files(folder, PLAIN)) == 8
    assert 'left out: 2 of 10 files' in (out := capsys.readouterr().out) and 'P0012_A01_thumb.tif' in out
    refused(lambda: pattern_files(folder, '{plate}-{well}.tif'), 'None of 10 files', 'P0012_A01_s1_w1.tif')
    (folder/'empty').mkdir()
    refused(lambda: pattern_files(folder/'empty', PLAIN), 'holds no files')
    refused(lambda: pattern_files(folder/'Index.xml', PLAIN), 'is not a folder')


@pytest.mark.parametrize('name, pattern', [('{p}_{w}_s{s}_DNA.tif', '{plate}_{well}_{channel}.tif'), ('{p}_{w}_S{s}_DNA.tif', '{plate}_{well}_{channel}.tif'),
                                           ('{p}/{w}_t{s}.tif', '{plate}_{well}.tif'), ('{p}/{w}_f{s}.tif', '**/{plate}_{well}.tif')])
def test_the_number_of_a_site_is_not_taken_for_a_well(tmp_path, name, pattern):
    "S1 is a well on a plate of 1536, but not beside A01"
    draw(tmp_path, [name.format(p=p, w=w, s=s) for p in ('P1', 'P2') for w in WELLS for s in (1, 2)])
    refused(lambda: pattern_files(tmp_path, pattern), 'A01' if '/' not in name or '**' in pattern else 'None of')


def test_a_plate_of_one_row_is_one(tmp_path):
    plain(tmp_path, plates=['P1'], wells=['s1', 's2'])
    plain(tmp_path, plates=['P2_C03'], wells=['C01', 'C02'])
    assert set(pattern_files(tmp_path, PLAIN).well) == {'S01', 'S02', 'C01', 'C02'}


def test_a_folder_without_plates_is_a_plate(tmp_path):
    draw(tmp_path/'BR7', [f'{w}_w{c}.tif' for w in WELLS for c in (1, 2)])
    assert set(read_pattern(tmp_path/'BR7', '{well}_w{channel}.tif')[0].plate) == {'BR7'}


def test_links_are_followed_once(tmp_path):
    plain(tmp_path/'far/P1', plates=['P1'])
    (tmp_path/'s').mkdir()
    (tmp_path/'s/P1').symlink_to(tmp_path/'far/P1')
    (tmp_path/'s/again').symlink_to(tmp_path/'s')
    assert len(pattern_files(tmp_path/'s', f'**/{PLAIN}')) == 4


def test_two_files_of_one_place_are_rejected(tmp_path):
    draw(tmp_path, ['a/P1_A01_w1.tif', 'b/P1_A01_w1.tif'])
    refused(lambda: read_pattern(tmp_path, '*/{plate}_{well}_w{channel}.tif'), 'a/P1_A01_w1.tif', 'b/P1_A01_w1.tif', 'plate P1, well A01, channel 1')
    assert len(read_pattern(tmp_path, '{experiment}/{plate}_{well}_w{channel}.tif')[0]) == 2


def test_a_field_that_some_names_lack_is_rejected(tmp_path):
    draw(tmp_path, ['P1_A01_s1_w1.tif', 'P1_A02_w1.tif'])
    refused(lambda: read_pattern(tmp_path, '{plate}_{well}[_s{site}]_w{channel}.tif'), 'P1_A01_s1_w1.tif has a site', 'P1_A02_w1.tif has none')


def test_an_absent_file_is_missed_under_its_name(folder, capsys):
    (folder/'P0012_A02_s1_w2.tif').unlink()
    refused(lambda: open_screen(folder, pattern=PLAIN), '1 of 4 sites', 'P0012_A02_s1_w2.tif', 'only_present=True')
    assert len(open_screen(folder, True, pattern=PLAIN)) == 3 and '1 of 4 sites' in capsys.readouterr().out
    assert len(open_screen(folder, pattern=PLAIN, channels=['1'])) == 4


PLANES = 'P1_{well}_p{z}_ch{channel}_t{t}.tif'

def test_planes_and_times_are_numbers_in_the_names(tmp_path):
    draw(tmp_path, [f'P1_{w}_p0{z}_ch{c}_t{t}.tif' for w in WELLS for z in (1, 2) for c in (1, 2) for t in (0, 5)])
    refused(lambda: read_pattern(tmp_path, PLANES, t=0), 'have z 1, 2', 'z=1')
    refused(lambda: read_pattern(tmp_path, PLANES, z=1, t='max'), 'have t 0, 5', 't=0')
    refused(lambda: read_pattern(tmp_path, PLANES, z=0, t=0), 'have z 1, 2')
    table, source = read_pattern(tmp_path, PLANES, z=2, t=5)
    assert [source[i][:, 0, 0].tolist() for i in table.site_id] == [[6, 8], [14, 16]] and not {'z', 't'} & set(table)
    (tmp_path/'P1_A02_p02_ch1_t5.tif').unlink()
    (tmp_path/'P1_A02_p02_ch2_t5.tif').unlink()
    refused(lambda: open_screen(tmp_path, pattern=PLANES, z=2, t=5), '1 of 2 sites', 'P1_A02_p02_ch1_t5.tif')


# a layout

def test_a_layout_by_well_is_of_every_plate(folder, by_well):
    table, _ = read_pattern(folder, PLAIN, by_well, controls=dict(negative_control=['DMSO']), test='P0013', cell_type='U2OS')
    assert table.sirna.tolist() == ['DMSO', 'x']*2 and table.Dose.tolist() == [0, .5]*2
    assert table.well_type.tolist() == ['negative_control', 'treatment']*2 and set(table.cell_type) == {'U2OS'}
    assert table.dataset.tolist() == ['train', 'train', 'test', 'test']


def test_a_layout_by_plate_names_batches_and_data_sets(folder, tmp_path):
    f = layout(tmp_path/'l.csv', Barcode=['P0012']*2 + ['P0013']*2, Well=[*WELLS]*2, gene=['a', 'b', 'b', 'a'], Batch=['May']*2 + ['June']*2, split=['', '', 'test', 'test'])
    table, _ = read_pattern(folder, PLAIN, f)
    assert table.sirna.tolist() == ['a', 'b', 'b', 'a'] and table.experiment.tolist() == ['May', 'May', 'June', 'June']
    assert table.dataset.tolist() == ['train', 'train', 'test', 'test']


def test_a_spreadsheet_takes_zeros_off(tmp_path):
    plain(tmp_path/'s', plates=['0012', '0013'])
    f = layout(tmp_path/'l.csv', plate=[12, 12, 13, 13], well=[*WELLS]*2, sirna=list('abcd'))
    assert read_pattern(tmp_path/'s', PLAIN, f)[0].sirna.tolist() == list('abcd')


def test_what_only_one_of_them_has_is_counted_and_named(folder, tmp_path, capsys):
    f = layout(tmp_path/'l.csv', plate=['P0012', 'P0012', 'P0014'], well=['A01', 'H12', 'A01'], sirna=list('abc'))
    refused(lambda: read_pattern(folder, PLAIN, f), 'l.csv lacks 3 wells of the pictures (P0012 A02, P0013 (2 wells))',
            'has 2 wells without pictures (P0012 H12, P0014 (1 well))', 'partial=True')
    assert read_pattern(folder, PLAIN, f, partial=True)[0].sirna.tolist() == ['a']
    out = capsys.readouterr().out
    assert 'lacks 3 wells' in out and 'has 2 wells' in out
    f = layout(tmp_path/'none.csv', plate=['X'], well=['A01'], sirna=['a'])
    for partial in (False, True): refused(lambda: read_pattern(folder, PLAIN, f, partial=partial), 'No well of', 'X (1 well)', 'P0012 (2 wells)')


def columns_of(plates='P0012 P0012 P0013 P0013', **more):
    return {'Well': [*WELLS]*2, 'Compound': list('abcd'), 'Assay plate name': plates.split(), **more}


def test_plates_in_a_column_of_no_usual_name_are_not_those_of_all(folder, tmp_path, capsys):
    f = layout(tmp_path/'l.csv', **columns_of())
    refused(lambda: read_pattern(folder, PLAIN, f), "l.csv: the column 'Assay plate name' holds plates of the pictures (P0012, P0013)", "columns=dict(plate='Assay plate name')")
    assert read_pattern(folder, PLAIN, f, columns=dict(plate='Assay plate name'))[0].sirna.tolist() == list('abcd')
    one = pd.DataFrame(columns_of())[:2]
    for odd in (one, one.rename(columns={'Assay plate name': 'where'}), one.assign(**{'Assay plate name': 'p_0012'})): refused(lambda: read_pattern(folder, PLAIN, odd), 'holds plates of the pictures (P0012)')
    assert rcic_pack([str(folder), 'no.zarr', '--dry-run', '--pattern', PLAIN, '--layout', str(f)]) == 2
    assert "--columns 'plate=Assay plate name', or, if it means something else, --columns plate=" in capsys.readouterr().err
    assert read_pattern(folder, PLAIN, one, columns=dict(plate=None))[0].sirna.tolist() == list('abab')
    assert "note: the table of wells names no plate: it is used for each of 2 plates; if its column 'Assay plate name' does, say columns=" in capsys.readouterr().out
    assert read_pattern(folder, 'P0012_{well}_s{site}_w{channel}.tif', one)[0].sirna.tolist() == ['a', 'b']         # one plate, all of it


def test_numbers_are_plates_only_where_a_column_is_called_so(tmp_path, capsys):
    plain(tmp_path/'s', plates=['1', '2'])
    wells = pd.DataFrame(dict(well=[*WELLS], sirna=['a', 'b'], dose=[1, 2], plate_row=[1, 1]))
    assert len(read_pattern(tmp_path/'s', PLAIN, wells)[0]) == 4 and 'names no plate: it is used for each of 2 plates.' in capsys.readouterr().out
    refused(lambda: read_pattern(tmp_path/'s', PLAIN, wells.assign(**{'plate no': 1.0})), "the column 'plate no' holds plates of the pictures (1)")


def test_experiments_in_a_column_of_no_usual_name(tmp_path):
    for e in ('May', 'June'): plain(tmp_path/f's/{e}', plates=['P1'])
    wells = pd.DataFrame(dict(plate='P1', well=[*WELLS]*2, sirna=list('abcd'), imaged=['May', 'May', 'June', 'June']))
    pattern = '{experiment}/' + PLAIN
    refused(lambda: read_pattern(tmp_path/'s', pattern, wells), "the column 'imaged' holds experiments of the pictures (May, June)", "columns=dict(experiment='imaged')")
    refused(lambda: read_pattern(tmp_path/'s', pattern, wells.assign(imaged='x')), '2 wells more than once', 'no column of the experiment was found (it has plate, well, sirna, imaged)', "columns=dict(experiment='COLUMN')")
    plain(tmp_path/'s/June', plates=['P2']), [f.unlink() for f in (tmp_path/'s/June').glob('P1*')]
    assert read_pattern(tmp_path/'s', pattern, wells.assign(plate=['P1', 'P1', 'P2', 'P2']))[0].sirna.tolist() == list('cdab')          # each plate is of one experiment


def test_wells_in_two_rows_are_told_with_their_rows(folder, tmp_path):
    f = layout(tmp_path/'l.csv', Well=[*WELLS]*2, Compound=list('abcd'))
    refused(lambda: read_pattern(folder, PLAIN, f), 'lists 2 wells more than once (A01, A02), and no column of the plate was found (it has Well, Compound)', "columns=dict(plate='COLUMN')")
    f = layout(tmp_path/'l.csv', **columns_of('X X Y Y'))
    refused(lambda: read_pattern(folder, PLAIN, f), 'more than once', "columns=dict(plate='Assay plate name')")
    f = layout(tmp_path/'l.csv', plate='P0012', well=['A01', 'A02', 'a1'], sirna=list('abc'), dose=1)
    refused(lambda: read_pattern(folder, PLAIN, f), 'lists 1 well more than once (P0012 A01 in rows 2, 4), which differ in sirna: keep one row')
    refused(lambda: read_pattern(folder, PLAIN, layout(tmp_path/'l.csv', plate='P0012', well=['A01', 'a1'])), 'rows 2, 3), which say the same: keep one row')


def test_empty_wells_without_pictures_need_no_partial(folder, tmp_path, capsys):
    f = layout(tmp_path/'l.csv', plate=['P0012']*3 + ['P0013']*3, well=[*WELLS, 'A03']*2, sirna=['DMSO', 'x', '']*2)
    assert read_pattern(folder, PLAIN, f, controls='DMSO')[0].sirna.tolist() == ['DMSO', 'x']*2
    assert 'l.csv lists 2 wells without a perturbation and without pictures (P0012 A03, P0013 A03): taken for empty' in capsys.readouterr().out
    refused(lambda: read_pattern(folder, PLAIN, f, controls={'negative_control': ['']}), 'has 2 wells without pictures', 'partial=True')         # controls are no empty wells
    refused(lambda: read_pattern(folder, PLAIN, layout(tmp_path/'l.csv', well=['A01', 'A02', 'A03'], note='x')), 'has 1 well without pictures')


@pytest.mark.parametrize('other, is_near', [('p0013', True), ('P-13', True), ('P0014', False), ('Q0013', False)])
def test_a_plate_in_another_spelling_is_no_missing_plate(folder, other, is_near):
    wells = pd.DataFrame(dict(plate=['P0012']*2 + [other]*2, well=[*WELLS]*2, sirna=list('abcd')))
    if is_near:
        for partial in (False, True): refused(lambda: read_pattern(folder, PLAIN, wells, partial=partial), f'has the plate {other} (2 wells) without pictures', 'P0013 (2 wells)', 'did you mean P0013?', f'take the rows of {other} out')
        assert read_pattern(folder, PLAIN, wells[:2], partial=True)[0].sirna.tolist() == ['a', 'b']
    else: assert read_pattern(folder, PLAIN, wells, partial=True)[0].sirna.tolist() == ['a', 'b']


@pytest.mark.parametrize('columns, words', [
    (dict(well=['A01', 'a1', 'A02']), ['more than once', 'A01']), (dict(well=['A01', 'X', 'A02']), ['row 3', "'X' is not a well name"]),
    (dict(drug=['a', 'b']), ['no column of the well', 'well=']), (dict(well=[*WELLS], channel=['1', '2']), ['both give channel']),
    (dict(well=[*WELLS], dataset=['train', 'held out']), ['row 3', "'held out'"]), (dict(well=[*WELLS], batch=['May', '']), ['row 3', 'experiment is empty']),
    (dict(well=[*WELLS], well_type=['treatment', 'odd']), ['row 3', "'odd' is no known well type"]), (dict(plate=['P0012', ''], well=[*WELLS]), ['row 3', 'plate is empty'])])
def test_mistakes_in_a_layout_are_named_by_row(folder, tmp_path, columns, words):
    refused(lambda: read_pattern(folder, PLAIN, layout(tmp_path/'l.csv', **columns)), 'l.csv', *words)


def test_plates_of_one_name_need_their_experiment(tmp_path):
    plain(tmp_path/'s/May', plates=['1']), plain(tmp_path/'s/June', plates=['1'])
    wells = dict(plate=[1, 1], well=[*WELLS], sirna=['a', 'b'])
    pattern = '{experiment}/' + PLAIN
    refused(lambda: read_pattern(tmp_path/'s', pattern, layout(tmp_path/'l.csv', **wells)), 'add a column experiment')
    both = pd.concat([pd.DataFrame(wells).assign(Batch=e) for e in ('May', 'June')])
    both['sirna'] = list('abcd')
    table = read_pattern(tmp_path/'s', pattern, both)[0]
    assert dict(zip(table.well_id, table.sirna)) == {'May_1_A01': 'a', 'May_1_A02': 'b', 'June_1_A01': 'c', 'June_1_A02': 'd'}


def test_controls_of_names_without_a_layout(tmp_path):
    draw(tmp_path, ['P1_A01_DMSO_w1.tif', 'P1_A02_x_w1.tif'])
    table, _ = read_pattern(tmp_path, '{plate}_{well}_{compound}_w{channel}.tif', controls=dict(negative_control=['DMSO']))
    assert table.sirna.tolist() == ['DMSO', 'x'] and table.well_type.tolist() == ['negative_control', 'treatment']
    table, _ = read_pattern(tmp_path, '{plate}_{well}_{compound}_w{channel}.tif', pd.DataFrame(dict(well=[*WELLS], cell_line=['A', 'B'])), controls=dict(negative_control=['DMSO']))
    assert table.well_type.tolist() == ['negative_control', 'treatment'] and table.cell_type.tolist() == ['A', 'B']
    refused(lambda: read_pattern(tmp_path, '{plate}_{well}_*_w{channel}.tif', columns=dict(sirna='x')), 'about the layout', 'there is none')


# the command

def test_one_command_packs_it(folder, by_well, tmp_path, capsys):
    out = tmp_path/'s.zarr'
    said = rcic_pack([str(folder), str(out), '--pattern', PLAIN, '--layout', str(by_well), '--channels', 'DNA=1,ER=2', '--controls', 'DMSO=negative_control',
                      '--test', 'P0013', '--cell-type', 'U2OS', '--verify'])
    assert said == 0, capsys.readouterr().err
    screen = open_screen(out)
    assert screen.channels == ('DNA', 'ER') and screen.table.Dose.tolist() == [0, .5]*2 and len(screen.test) == 2
    assert screen.source['P0013_P0013_A02_1'][:, 0, 0].tolist() == [7, 8]
    assert '4 sites are the same' in capsys.readouterr().out


# the names that instruments give

GUID = '07447158-AC76-4844-8431-E6A954BD117'

def imagexpress(stem='17/TimePoint_1/Week1_150607', sites=(1, 2), guid=False):
    names = [f'{stem}_{w}' + (f'_s{s}' if sites else '') + f'_w{c}' for w in ('B02', 'B03') for s in sites or (1,) for c in (1, 2)]
    return [f'{n}{GUID}{i % 10}.tif' if guid else f'{n}.TIF' for i, n in enumerate(names)]

def phenix(stem, sites=(1, 2), planes=(1,)):
    return [f'{stem}r02c0{c}f0{s}p0{z}-ch{k}sk1fk1fl1.tiff' for c in (2, 3) for s in sites for z in planes for k in (1, 2)]

def voyager(stem): return [f'{stem}_{w}_T0001F00{s}L01A0{c}Z01C0{c}.tif' for w in ('B02', 'B03') for s in (1, 2) for c in (1, 2)]

MEASURED = 'BR00116991__2020-11-05T19_51_35-Measurement 1'
GALLERY = f'2021_04_26_Batch1/images/{MEASURED}/Images/'
INSTRUMENTS = [
    ('imagexpress', imagexpress(), 'Week1_150607', ['17/TimePoint_1/Week1_150607_B02_s1_w1_thumb.TIF']),
    ('imagexpress', imagexpress('p/Week1_22123', guid=True), 'Week1_22123', [f'p/Week1_22123_B02_s1_w1_thumb{GUID}9.tif']),
    ('imagexpress', imagexpress('IXM_A01', sites=()), 'IXM_A01', []),
    ('phenix', phenix(f'x/{MEASURED}/Images/'), 'BR00116991', [f'x/{MEASURED}/Images/Index.idx.xml']),
    ('phenix', phenix('Images/'), 's', ['Images/Index.idx.xml']), ('phenix', phenix(''), 's', []),
    ('operetta', phenix(f'x/{MEASURED}/Images/'), 'BR00116991', [f'x/{MEASURED}/Images/Index.idx.xml']),
    ('cellvoyager', voyager('AssayPlate_Greiner_#655090'), 'AssayPlate_Greiner_#655090', ['MeasurementData.mlf', 'DC_sCMOS #1_CAM1.tif']),
    ('cellvoyager', voyager('20200812-Differentiation14-Cycle1'), '20200812-Differentiation14-Cycle1', []),
    ('cell-painting-gallery', phenix(f'cpg0016-jump/source_4/images/{GALLERY}'), 'BR00116991', ['cpg0016-jump/source_4/images/illum.npy']),
    ('cell-painting-gallery', phenix(GALLERY), 'BR00116991', []), ('cell-painting-gallery', phenix(GALLERY.partition('/')[2]), 'BR00116991', []),
    ('rxrx1', [f'images/train/HUVEC-01/Plate1/B0{w}_s{s}_w{c}.png' for w in (2, 3) for s in (1, 2) for c in (1, 2)], 1, []),
    ('rxrx1', [f'HUVEC-01/Plate1/B0{w}_s{s}_w{c}.png' for w in (2, 3) for s in (1, 2) for c in (1, 2)], 1, [])]

@pytest.mark.parametrize('name, files, plate, others', INSTRUMENTS)
def test_known_patterns_read_the_names_of_their_instruments(tmp_path, capsys, name, files, plate, others):
    draw(tmp_path/'s', files)
    for o in others: (tmp_path/'s'/o).touch()
    table, source = read_pattern(tmp_path/'s', name, test=())
    sites = 1 if 'IXM' in files[0] else 2
    assert table.plate.unique().tolist() == [plate] and table.well.tolist() == [w for w in ('B02', 'B03') for _ in range(sites)]
    assert table.site.tolist() == [*range(1, sites+1)]*2 and source.channels == ('1', '2')
    if name != 'rxrx1': assert [source[i][:, 0, 0].tolist() for i in table.site_id] == [[i, i+1] for i in range(1, 4*sites, 2)]
    assert table.experiment.unique().tolist() == [dict(rxrx1='HUVEC-01').get(name, '2021_04_26_Batch1' if files[0].count('Batch1') else str(plate))]
    assert bool(others) == ('left out: ' in capsys.readouterr().out)


def test_every_known_pattern_is_tried(): assert set(PATTERNS) == {o[0] for o in INSTRUMENTS}


def test_time_points_and_planes_of_imagexpress(tmp_path):
    draw(tmp_path, [f'TimePoint_{t}/ZStep_{z}/P_{w}_s1_w1.tif' for t in (1, 2) for z in (1, 2) for w in WELLS])
    refused(lambda: read_pattern(tmp_path, 'imagexpress', z=1), 'have t 1, 2')
    table, source = read_pattern(tmp_path, 'imagexpress', z=2, t=1)
    assert [source[i].max() for i in table.site_id] == [3, 4]
    draw(tmp_path, ['TimePoint_1/P_A01_s1_w1.tif'])
    refused(lambda: read_pattern(tmp_path, 'imagexpress', z=1, t=1), 'has none')


def test_planes_of_phenix(tmp_path):
    draw(tmp_path, phenix('', sites=(1,), planes=(1, 2, 3)))
    refused(lambda: read_pattern(tmp_path, 'phenix'), 'have z 1, 2, 3', 'z=1')
    table, source = read_pattern(tmp_path, 'phenix', z=3)
    assert [source[i][:, 0, 0].tolist() for i in table.site_id] == [[5, 6], [11, 12]]


def test_one_name_for_two_plates_of_cellvoyager_is_rejected(tmp_path):
    draw(tmp_path, [f'{p}/{f}' for p in ('P1', 'P2') for f in voyager('AssayPlate')])
    refused(lambda: read_pattern(tmp_path, 'cellvoyager'), 'P1/AssayPlate_B02_T0001F001L01A01Z01C01.tif and P2/')
    own = '{plate}/*_{well}_T*F{site}L*Z{z}C{channel}.tif'
    assert set(read_pattern(tmp_path, own)[0].plate) == {'P1', 'P2'}


def test_a_pattern_of_your_own_has_a_name(folder, monkeypatch):
    refused(lambda: read_pattern(folder, 'mine'), "pattern='mine' is not known", 'imagexpress', '{plate}_{well}')
    monkeypatch.setitem(PATTERNS, 'mine', PLAIN)
    assert len(read_pattern(folder, 'mine')[0]) == 4


def test_a_known_name_in_a_shell(tmp_path, capsys):
    draw(tmp_path/'s', phenix(f'{MEASURED}/Images/'))
    assert rcic_pack([str(tmp_path/'s'), str(tmp_path/'o.zarr'), '--pattern', 'phenx']) == 2 and '--pattern phenx is not known' in capsys.readouterr().err
    assert rcic_pack([str(tmp_path/'s'), str(tmp_path/'o.zarr'), '--pattern', 'phenix', '--channels', 'DNA=1,ER=2']) == 0
    assert open_screen(tmp_path/'o.zarr').channels == ('DNA', 'ER')


# what a screen is taken for

def unchanged(folder, f):
    "Call `f` and return what it returns; no file in the folder may be made, removed or changed by it"
    def state(): return {o: (o.stat().st_mtime_ns, o.stat().st_size) for o in sorted(folder.rglob('*'))}
    before = state()
    result = f()
    assert state() == before
    return result


def test_a_dry_run_says_what_a_pattern_and_a_layout_give(folder, by_well, tmp_path, capsys):
    (folder/'P0012_A02_s1_w2.tif').unlink()
    call = [str(folder), str(tmp_path/'s.zarr'), '--dry-run', '--pattern', PLAIN, '--layout', str(by_well), '--channels', 'DNA=1,ER=2',
            '--controls', 'DMSO=negative_control', '--test', 'P0013', '--cell-type', 'U2OS']
    assert unchanged(tmp_path, lambda: rcic_pack(call)) == 1            # packing would stop
    out = capsys.readouterr().out
    for words in ('a folder of files with names', '4 sites of 16×16 px, 16 bits, 2 channels (DNA, ER)', 'experiments: 2 (P0012: train, P0013: test)',
                  'plates: 2 (P0012, P0013), of 2×3 wells, 2 in use', 'wells: 4 (2 negative_control, 2 treatment), sites of each: 1', 'cell types: U2OS',
                  'negative_control: DMSO in 2 wells', 'perturbations: 1 (x), wells of each: 2', 'doses (Dose): 0.0, 0.5\n', 'further columns: Dose',
                  'packing would stop: files of 1 of 4 sites are missing (', 'P0012_A02_s1_w2.tif'): assert words in out, (words, out)
    assert 'left out (' not in out and 'no experiment is a test' not in out and 'no well is a control' not in out
    assert rcic_pack([*call, '--only-present']) == 0 and ': they are left out' in capsys.readouterr().out
    sites = sorted({f.name[:-len('_w1.tif')] for f in folder.glob('*.tif')})
    for i, site in enumerate(sites): (folder/f'{site}_w{2 - i%2}.tif').unlink(missing_ok=True)      # each lacks one stain: nothing would be left
    assert rcic_pack([*call, '--only-present']) == 1 and 'packing would stop: none of the 3 sites has all its files (' in capsys.readouterr().out
    assert rcic_pack([o for o in [*call, '--only-present'] if o != '--dry-run']) == 2


def test_a_dry_run_says_what_a_prediction_lacks(folder, tmp_path, capsys):
    f = layout(tmp_path/'l.csv', well=[*WELLS]*2, plate=['P0012']*2 + ['P0013']*2, compound=['a', 'b', 'a', ''], dose_um=[1, 2, 5, ''])
    assert rcic_pack([str(folder), 'no.zarr', '--dry-run', '--pattern', PLAIN, '--layout', str(f)]) == 0
    out = capsys.readouterr().out
    for words in ('no well is a control', 'no experiment is a test', '--test EXP,EXP', '1 treatment well has no name', 'perturbations: 2 (a, b), wells of each: 1 to 2',
                  'doses (dose_um): 1, 2, 5', '1 perturbation has wells of several doses in the column dose_um (a)', '--target sirna+dose_um (rcic_train)',
                  '1 training well names no perturbation and is left out of training (P0013_P0013_A02)', 'missing: no file'): assert words in out, (words, out)


def test_a_dry_run_of_every_kind(folder, tmp_path, capsys):
    from rcic_fastai.screen.open import SCREEN_KINDS, describe_screen
    from rcic_fastai.screen.simulate.labels import simulate_labels
    from helpers import simulate_screen
    from test_own_tables import plate
    simulate_screen(tmp_path/'folder', ['HUVEC-01'], sirnas=4, size=32, controls=0, sites=1, progress=False)
    plate(tmp_path/'plates/P.zarr')
    (folder/'files.csv').write_text('plate,well,channel,path\nP,A01,DNA,P0012_A01_s1_w1.tif\nP,A02,DNA,P0012_A02_s1_w1.tif\n')
    assert rcic_pack([str(tmp_path/'folder'), str(tmp_path/'packed')]) == 0
    at = dict(folder=tmp_path/'folder', plates=tmp_path/'plates', files=folder/'files.csv', packed=tmp_path/'packed', pattern=folder,
              images=simulate_labels(tmp_path/"images", images=4, size=48, progress=False))
    assert set(at) == set(SCREEN_KINDS)
    for kind, path in at.items():
        more = ['--pattern', PLAIN] if kind == 'pattern' else []
        capsys.readouterr()
        assert unchanged(tmp_path, lambda: rcic_pack([str(path), str(tmp_path/'no.zarr'), '--dry-run', *more])) == 0
        out = capsys.readouterr().out
        assert f'{path}: {SCREEN_KINDS[kind].what}\n' in out and 'missing: no file' in out, out
    def same(screen): return [line for line in describe_screen(screen).split('\n')[1:] if not line.startswith('no experiment is a test')]     # how to mark one differs
    assert same(open_screen(at['packed'])) == same(at['folder'])


def test_a_dry_run_of_a_mistake_is_the_same_sentence(folder, tmp_path, capsys):
    for more in ([], ['--dry-run']):
        assert rcic_pack([str(folder), str(tmp_path/'o.zarr'), '--pattern', PLAIN, '--channels', '7', *more]) == 2
        assert 'has no channel 7' in capsys.readouterr().err and not (tmp_path/'o.zarr').exists()


# who does not know the door

@pytest.mark.parametrize('files, says', [
    (imagexpress(), "pattern='imagexpress'"), (phenix(f'{MEASURED}/Images/'), "pattern='phenix'"), (voyager('A'), "pattern='cellvoyager'"),
    (phenix(GALLERY), "pattern='cell-painting-gallery'"), (['HUVEC-01/Plate1/B02_s1_w1.png'], "pattern='rxrx1'"), (['a/x_1.tif', 'x.xml'], "pattern='{plate}_{well}_s{site}_w{channel}.tif'")])
def test_a_folder_that_nothing_fits_shows_a_file_and_the_way_in(tmp_path, files, says):
    draw(tmp_path, files)
    for f in (lambda: open_screen(tmp_path), lambda: open_screen(tmp_path, cell_types=['X'])):
        refused(f, 'is no kind of screen', 'neither metadata.csv', f'{len(files)} files' if len(files) > 1 else '1 file', min(o for o in files if 'xml' not in o), says)


BY_FOLDER = [f'B{b}/Plate{p}/{w}_s{s}_w{c}.tif' for b in (1, 2) for p in 'AB' for w in WELLS for s in (1, 2) for c in (1, 2)]

@pytest.mark.parametrize('at, pattern', [('', '{experiment}/{plate}/{well}_s{site}_w{channel}.tif'), ('B1', '{plate}/{well}_s{site}_w{channel}.tif')])
def test_no_pattern_is_offered_that_takes_sites_for_wells(tmp_path, at, pattern):
    draw(tmp_path, BY_FOLDER)
    says = refused(lambda: open_screen(tmp_path/at))
    assert f"pattern='{pattern}', which fits" in says and 'imagexpress, which' not in says
    assert set(read_pattern(tmp_path/at, pattern)[0].well) == {*WELLS}
    refused(lambda: open_screen(tmp_path/at, pattern='{plate}-{well}.tif'), f"pattern='{pattern}', which fits")


def test_a_folder_too_deep_is_told_the_one_above(tmp_path, monkeypatch):
    draw(tmp_path/'s', BY_FOLDER)
    pattern = '{experiment}/{plate}/{well}_s{site}_w{channel}.tif'
    refused(lambda: open_screen(tmp_path/'s/B1', pattern=pattern), f"give the folder {tmp_path/'s'}, from which it fits, or pattern='{{plate}}/{{well}}_s{{site}}_w{{channel}}.tif', which fits")
    refused(lambda: open_screen(tmp_path/'s/B1/PlateA', pattern=pattern), f"give the folder {tmp_path/'s'}, from which it fits, or pattern='{{well}}_s{{site}}_w{{channel}}.tif', which fits")
    monkeypatch.chdir(tmp_path/'s/B1')
    refused(lambda: open_screen('.', pattern=pattern), f"give the folder {tmp_path/'s'}, from which it fits")


@pytest.mark.parametrize('wrong, right', [('chanel', 'channel'), ('sit', 'site')])
def test_a_misspelled_field_is_asked_about(tmp_path, wrong, right, capsys):
    plain(tmp_path, sites=(1, 2))
    refused(lambda: read_pattern(tmp_path, PLAIN.replace(right, wrong)), f'{{{wrong}}} is taken for a further column; did you mean {{{right}}}?', 'put into braces')
    read_pattern(tmp_path, '{batc:1}{plate}_{well}_s{site}_w{channel}.tif')
    assert 'note: {batc} is taken for a further column; did you mean {batch}?' in capsys.readouterr().out
    for fine in ('{date:1}{plate}_{well}_s{site}_w{channel}.tif', '{sites:1}{plate}_{well}_s{site}_w{channel}.tif', PLAIN): read_pattern(tmp_path, fine)
    assert 'did you mean' not in capsys.readouterr().out


def test_what_the_message_names_works_when_it_fits(tmp_path):
    for pattern, files in dict(imagexpress=imagexpress(), phenix=phenix(f'{MEASURED}/Images/')).items():
        draw(tmp_path/pattern, files)
        says = refused(lambda: open_screen(tmp_path/pattern))
        assert f"pattern='{pattern}'" in says and len(open_screen(tmp_path/pattern, pattern=pattern)) == 4
        refused(lambda: open_screen(tmp_path/pattern, pattern=PLAIN.replace('_s', '-s')), f"give pattern='{pattern}', which fits")


def test_it_is_said_in_a_shell_and_of_tables_and_layouts(folder, by_well, tmp_path, capsys):
    assert rcic_pack([str(folder), 'no.zarr']) == 2
    assert "P0012_A01_s1_w1.tif" in (err := capsys.readouterr().err) and '--pattern ' in err and err.count('\n') == 1
    refused(lambda: open_screen(folder, layout=by_well), 'layout is about files', 'pattern=')
    (tmp_path/'empty').mkdir()
    refused(lambda: open_screen(tmp_path/'empty'), 'holds no files')
    (folder/'export.csv').write_text('plate,well,channel,path\nP,A01,DNA,P0012_A01_s1_w1.tif\n')
    refused(lambda: open_screen(folder), 'export.csv, which names files')


@pytest.mark.parametrize('column', ['folder', 'page'])
def test_a_column_of_the_layout_is_not_about_files(tmp_path, folder, column):
    f = layout(tmp_path/'layout.csv', Well=WELLS, Compound=['DMSO', 'x'], **{column: ['3', '4']})
    t, source = read_pattern(folder, PLAIN, f)
    assert source[t.site_id[0]].shape[0] == 2 and t[column].astype(str).unique().tolist() == ['3', '4']
