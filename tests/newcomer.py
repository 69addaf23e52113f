"A newcomer's files: 16-bit TIFFs of four channels whose names say plate, well, site and channel, and a layout with compounds and doses in three batches."
from pathlib import Path
import numpy as np, pandas as pd
import tifffile

CHANNELS = ('DNA', 'ER', 'AGP', 'Mito')
COMPOUNDS = ('DMSO', 'alpha', 'beta', 'gamma', 'delta')


def newcomer_layout(plates=6, batches=3, doses=('0.5', '5'), rows='BC', columns=range(2, 8)):
    "Return the table of wells: plate, well, batch, compound, dose"
    treated = [(c, d) for c in COMPOUNDS[1:] for d in doses]
    wells = [f'{r}{c:02d}' for r in rows for c in columns]
    what = [('DMSO', '')]*(len(wells) - len(treated)) + treated
    rng, lines = np.random.default_rng(0), []
    for p in range(plates):
        batch = f'batch{p*batches//plates + 1}'
        for well, i in zip(wells, rng.permutation(len(wells))):
            lines.append(dict(plate=f'P{p+1:04d}', well=well, batch=batch, compound=what[i][0], dose=what[i][1]))
    return pd.DataFrame(lines)


def newcomer_picture(rng, compound, dose, channel, size, gain):
    "Return one picture [size,size], uint16: cells as blobs, whose number, size and brightness a compound changes"
    k, strength = COMPOUNDS.index(compound), 0 if not dose else 1 + float(dose) > 2
    y, x = np.mgrid[:size, :size]
    out = np.full((size, size), 400.)
    for cy, cx in rng.uniform(0, size, (8 + 3*(k == 1)*(1 + strength), 2)):
        radius = 3 + 2*(k == 2)*(1 + strength) + (channel == 3)
        light = 6000*(1 + .8*(k == 3)*(channel == 1)*(1 + strength) - .6*(k == 4)*(channel == 2))
        out += light*np.exp(-((y - cy)**2 + (x - cx)**2)/(2*radius**2))
    return np.clip(gain*out + rng.normal(0, 60, out.shape), 0, 65535).astype(np.uint16)


def write_newcomer(
    folder, # Folder to write: pictures/ and layout.csv
    size=64, # Side of a picture, px
    sites=2, # Of each well
    **how # Arguments of `newcomer_layout`
):
    "Write a newcomer's files and return the folder of the pictures and the layout"
    folder, table = Path(folder), newcomer_layout(**how)
    (folder/'pictures').mkdir(parents=True)
    for i, w in enumerate(table.to_dict('records')):
        rng = np.random.default_rng(i)
        for s in range(1, sites + 1):
            for c in range(len(CHANNELS)):
                picture = newcomer_picture(rng, w['compound'], w['dose'], c, size, 1 + .3*int(w['batch'][-1]))
                tifffile.imwrite(folder/'pictures'/f'{w["plate"]}_{w["well"]}_s{s}_w{c+1}.tif', picture)
    table.to_csv(folder/'layout.csv', index=False)
    return folder/'pictures', folder/'layout.csv'


if __name__ == '__main__':
    import sys
    print(*write_newcomer(sys.argv[1]))
