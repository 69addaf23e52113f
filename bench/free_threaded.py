"""What `feed.py` starts in an interpreter without a lock: decode batches of sites with threads into a file in memory.

    python3.14t bench/free_threaded.py paths.json out

Reads one list of rows per line, and answers with the number of the place that holds the batch. Needs numpy, and
kornia_rs or Pillow.
"""
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def decoder():
    try: from kornia_rs import io
    except ImportError:
        from PIL import Image
        return lambda path: np.asarray(Image.open(path))
    return lambda path: io.read_image_png_u8(path, 'mono')[..., 0]


def main(facts, out):
    facts = json.loads(Path(facts).read_text())
    places, decode = np.memmap(out, np.uint8, 'r+', shape=tuple(facts['shape'])), decoder()
    def site(row, place):
        for path, plane in zip(facts['paths'][row], place): plane[:] = decode(path)
    with ThreadPoolExecutor(facts['threads']) as pool:
        for n, line in enumerate(sys.stdin):
            place = n % len(places)
            list(pool.map(site, json.loads(line), places[place]))
            print(place, flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
