"""Cell types of the real sites by nearest neighbor: ImageNet features, own-image normalization, no training.

    RCIC_REAL=FOLDER python bench/real_sites.py

FOLDER has RxRx1's `metadata/` and some of its `images/`. Asked: the nearest neighbor outside the same plate has the
right cell type for all 18 sites.
"""
import sys
from pathlib import Path

from machine import save
from rcic_fastai.screen.tables import real_data


def main():
    root = real_data()
    if root is None or not (root/'images').is_dir():
        print('real_sites: no real images on this machine (set RCIC_REAL), nothing measured')
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tests'))
    from test_real import features_of_real_sites, nearest_outside_plate
    meta, x = features_of_real_sites(root)
    near = nearest_outside_plate(meta, x)
    right = (near.cell_type == near.found_cell_type)
    print(near[['site_id', 'found', 'cosine']].to_string(index=False))
    print(f'right cell type: {right.sum()} of {len(near)}')
    save('real_sites', right=int(right.sum()), sites=len(near), asked=18,
         hepg2_08_found=near[near.experiment == 'HEPG2-08'].found.tolist())


if __name__ == '__main__': main()
