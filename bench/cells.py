"""Time of reading and cutting single cells: 10,000 cells from 100 images of 1024 px, of six channels as PNGs, with 16-bit masks.

    python bench/cells.py [--images N] [--cells N] [--side N] [--dry]

A few fields are drawn, and shifted into different images; their masks are those of the watershed, written as PNG. `table` reads all
masks and measures the cells, `cut` reads every image once and cuts its cells into a buffer, as a loader without shuffling does, and
`masked` sets what is outside of each cell to 0. `watershed` finds the cells of some images instead of reading masks.
"""
import argparse, tempfile, time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from machine import save


def timed(f):
    "What `f` gives; seconds on the clock, and of all cores together"
    start, cpu = time.perf_counter(), time.process_time()
    res = f()
    return res, time.perf_counter() - start, time.process_time() - cpu


def site_rows(n):
    "A site table of `n` sites"
    wells = [f'{"BCDEFGHIJKLMN"[i // 22]}{i % 22 + 2:02d}' for i in range(n)]
    ids = [f'U2OS-01_1_{w}' for w in wells]
    return pd.DataFrame(dict(site_id=[f'{i}_1' for i in ids], well_id=ids, cell_type='U2OS', dataset='train', experiment='U2OS-01', plate=1,
                             well=wells, site=1, well_type='treatment', sirna=[f's{i % 8}' for i in range(n)]))


def write_images(root, rows, size, fields=4):
    "Write the images and masks of a screen"
    from rcic_fastai.screen.cells import find_cells
    from rcic_fastai.screen.simulate.batches import Studio
    studio = Studio(['U2OS-01'], size=size)
    drawn = [studio.site('U2OS-01', 1, f'C{i + 2:02d}', 1, sirna_id=i) for i in range(fields)]
    masks = [find_cells(d[0], d[1], radius=10*size/512) for d in drawn]
    images, of_masks = root/'images'/'U2OS-01'/'Plate1', root/'masks'
    for folder in (images, of_masks): folder.mkdir(parents=True)
    for n, r in enumerate(rows.itertuples()):
        shift = 16*(n//fields)
        for c, x in enumerate(drawn[n % fields], 1): cv2.imwrite(str(images/f'{r.well}_s1_w{c}.png'), np.roll(x, shift, 1))
        cv2.imwrite(str(of_masks/f'{r.site_id}.png'), np.roll(masks[n % fields], shift, 1).astype(np.uint16))


def cut_all(cells, threads, bs=32):
    "Read all cells in batches, in the order of the table; return how many"
    source, ids = cells.source, cells.table.site_id.tolist()
    buffer = np.empty((bs, *source.shape), source.dtype)
    for i in range(0, len(ids), bs): source.read_into(ids[i:i+bs], buffer, threads)
    return len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--cells', type=int, default=10_000)
    parser.add_argument('--side', type=int, default=128)
    parser.add_argument('--size', type=int, default=1024)
    parser.add_argument('--dry', action='store_true', help='print, and store nothing')
    args = parser.parse_args()
    from rcic_fastai.screen.cells import find_cells
    from rcic_fastai.screen.images import PngTree
    from rcic_fastai.screen.screen import Screen
    results = []
    with tempfile.TemporaryDirectory() as d:
        root, rows = Path(d), site_rows(args.images)
        write_images(root, rows, args.size)
        screen = Screen(rows, PngTree(root, rows), 'drawn')
        def add(what, n, seconds, cpu):
            results.append(dict(what=what, cells=n, seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), cells_per_second=round(n/seconds)))
            print(f'{what:<40}{n:>8,} cells {seconds:>7.1f} s {cpu:>7.1f} s of the cores {n/seconds:>8,.0f} cells/s', flush=True)
        def cells_of(**how): return screen.cells(root/'masks', cell_side=args.side, cell_border='keep', **how)
        cells, table_s, table_cpu = timed(cells_of)
        if len(cells) < args.cells: raise SystemExit(f'{len(cells)} cells were found, {args.cells} were asked for')
        add('table: masks read, cells measured', len(cells), table_s, table_cpu)
        for what, how in dict(cut={}, masked=dict(cell_masked=True)).items():
            some = cells_of(**how)[:args.cells]
            for threads in (1, 2):
                n, s, cpu = timed(lambda: cut_all(some, threads))
                add(f'{what}: images read, {threads} thread{"s"*(threads > 1)}', n, s, cpu)
                if what == 'cut' and threads == 2: add('table and cut, 2 threads', n, table_s + s, table_cpu + cpu)
                some = cells_of(**how)[:args.cells]
        few = rows.site_id[:5]
        found, s, cpu = timed(lambda: sum(int(find_cells(*screen.source[i][[0, 1]], 10*args.size/512).max()) for i in few))
        add(f'watershed of {len(few)} images, read too', found, s, cpu)
    if not args.dry: save('cells', images=args.images, size_px=args.size, side_px=args.side, channels=6, results=results)


if __name__ == '__main__': main()
