"""How close the simulated screen is to RxRx1: brightness, looks, difficulty. Stores bench/results/calibration.json.

    python bench/calibration.py [--parts brightness,looks,difficulty]

brightness  channel means and standard deviations of all 51 experiments against the table of the real ones
looks       power spectrum, channel correlations, nuclei, of untreated wells beside the real ones (when they are present)
difficulty  what a linear classifier on channel means and standard deviations names
Parts that are not asked for, or cannot be measured, keep the figures that are stored.
"""
import argparse, json
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
from scipy import ndimage
from scipy.optimize import minimize

from machine import RESULTS, cores, save
from rcic_fastai.workflow import DEMO
from rcic_fastai.screen.tables import CELL_TYPES, package_table, real_data, treatment_wells
from rcic_fastai.screen.simulate.batches import Studio, batch_stats

BANDS = (2, 4, 8, 16, 32, 64, 128)  # px, wavelengths between which power is summed


# ---- brightness

def experiment_pixels(job):
    "Relative error of mean and standard deviation [2,6] and brightness of the plates [p,6] of one drawn experiment."
    experiment, size, wells, sites = job
    cv2.setNumThreads(1)
    studio, rng = Studio((experiment,), sirnas=1108, size=size), np.random.default_rng(1)
    at = rng.choice(treatment_wells(), wells, replace=False)
    ims = np.stack([[studio.site(experiment, p, w, s, int(rng.integers(1108))) for w in at for s in range(1, sites+1)]
                    for p in range(1, 5)]).astype(np.float32)
    mean, std, _ = batch_stats(experiment)
    return np.stack([ims.mean((0, 1, 3, 4))/mean - 1, ims.std((0, 1, 3, 4))/std - 1]), ims.mean((1, 3, 4))

def brightness(size, wells, sites):
    "Agreement with the table of all experiments at one size."
    names = list(package_table('experiment_pixel_stats').experiment)
    with ProcessPoolExecutor(cores()) as pool:
        done = list(pool.map(experiment_pixels, [(e, size, wells, sites) for e in names]))
    error, plates = np.abs([e for e, _ in done]), np.stack([p for _, p in done])
    ratio = plates.max(1)/plates.min(1)
    worst = np.unravel_index(error.argmax(), error.shape)
    return dict(size=size, sites=len(names)*4*wells*sites, median_error=round(float(np.median(error)), 4),
        median_error_mean=round(float(np.median(error[:, 0])), 4), median_error_std=round(float(np.median(error[:, 1])), 4),
        p95_error=round(float(np.quantile(error, .95)), 4), worst_error=round(float(error.max()), 4),
        worst=f'{names[worst[0]]} w{worst[2]+1} {("mean", "std")[worst[1]]}',
        plate_ratio_median=round(float(np.median(ratio)), 3), plate_ratio_max=round(float(ratio.max()), 3))


# ---- looks

def spectrum(im):
    "Share of the power [6] of a picture in octaves of wavelength, finest first."
    n = im.shape[-1]
    window = np.outer(np.hanning(n), np.hanning(n))
    power = np.abs(np.fft.rfft2((im-im.mean())*window))**2
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    bands = np.array([power[(f <= 1/a) & (f > 1/b)].sum() for a, b in zip(BANDS, BANDS[1:])])
    return bands/bands.sum()

def nuclei(im):
    "Number, median radius (px) and mean elongation of the bright regions of w1; touching ones are split."
    im = ndimage.gaussian_filter(im.astype(float), 1)
    im = np.minimum(im/np.percentile(im, 99), 1) - ndimage.gaussian_filter(np.minimum(im/np.percentile(im, 99), 1), 40)
    level, _ = cv2.threshold(cv2.normalize(im, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    mask = ndimage.binary_opening(im > im.min() + level/255*(im.max()-im.min()), iterations=2)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = (ndimage.maximum_filter(depth, 9) == depth) & (depth > 2)
    labels, count = ndimage.label(peaks)
    if not count: return 0, 0., 0.
    _, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    parts = np.where(mask, labels[tuple(nearest)], 0)
    area = ndimage.sum_labels(mask, parts, range(1, count+1))
    return int((area > 40).sum()), float(np.sqrt(np.median(area[area > 40])/np.pi)), float(mask.mean())

def site_looks(site):
    "Summary statistics of one site [6,512,512]."
    count, radius, covered = nuclei(site[0])
    r = np.corrcoef(site.reshape(6, -1))[np.triu_indices(6, 1)]
    z = (site-site.mean((1, 2), keepdims=True))/site.std((1, 2), keepdims=True)
    return dict(spectrum=np.array([spectrum(im) for im in z]), correlation=r, skew=(z**3).mean((1, 2)),
                cv=site.std((1, 2))/site.mean((1, 2)), floor=np.percentile(site, 1, axis=(1, 2))/site.mean((1, 2)),
                nuclei=np.array([count, radius, covered]))

def average(sites): return {k: np.mean([s[k] for s in sites], 0, dtype=float).round(3).tolist() for k in sites[0]}

def real_sites(cell_type):
    "All complete real sites of a cell type, float32 [6,512,512]."
    root = real_data()
    found = sorted(root.glob(f'images/*/{cell_type}-*/Plate*/*_s1_w1.png')) if root else []
    read = lambda f: np.stack([cv2.imread(str(f)[:-5] + f'{w}.png', cv2.IMREAD_UNCHANGED) for w in range(1, 7)])
    return [read(f).astype(np.float32) for f in found]

def drawn_sites(cell_type):
    "Untreated drawn sites of a cell type, each of another experiment; HEPG2 of those as dense as the real ones here."
    names = [f'{cell_type}-{i:02}' for i in ((1, 2, 6, 8, 10) if cell_type == 'HEPG2' else range(1, 6))]
    studio = Studio(tuple(names), sirnas=48, size=512)
    return [studio.site(e, 1 + k%4, 'B02', 1, 1, 'negative_control').astype(np.float32) for k, e in enumerate(names)]

def looks(stored):
    "Statistics of real and drawn untreated sites by cell type; the real ones are kept when the images are away."
    out = {}
    for ct in CELL_TYPES:
        real = real_sites(ct)
        out[ct] = dict(real=average([site_looks(s) for s in real]) if real else stored.get(ct, {}).get('real'),
                       drawn=average([site_looks(s) for s in drawn_sites(ct)]))
    return out


# ---- difficulty

def logistic(x, y, classes, ridge=1e-4):
    "Weights [f+1,k] of a multinomial logistic regression on standardized features."
    x = np.c_[x, np.ones(len(x))]
    target = np.eye(classes)[y]
    def loss(w):
        z = x @ w.reshape(-1, classes)
        z -= z.max(1, keepdims=True)
        p = np.exp(z); p /= p.sum(1, keepdims=True)
        return -(np.log(p[np.arange(len(y)), y] + 1e-12)).mean() + ridge*(w**2).sum(), (x.T @ (p-target)/len(y)).ravel() + 2*ridge*w
    return minimize(loss, np.zeros(x.shape[1]*classes), jac=True, method='L-BFGS-B', options=dict(maxiter=400)).x.reshape(-1, classes)

def linear_accuracy(train, test, classes):
    "Accuracy on `test` of a linear classifier trained on `train`; both (features, labels)."
    mean, std = train[0].mean(0), train[0].std(0) + 1e-9
    w = logistic((train[0]-mean)/std, train[1], classes)
    z = np.c_[(test[0]-mean)/std, np.ones(len(test[0]))] @ w
    return float((z.argmax(1) == test[1]).mean())

def features(site): return np.r_[site.mean((1, 2)), site.std((1, 2))]

def draw_features(job):
    "Features of the two sites of each treatment well of one experiment [sirnas,2,12]."
    e, sirnas, size, seed = job
    cv2.setNumThreads(1)
    studio, rng = Studio((e,), sirnas=sirnas, size=size, seed=seed), np.random.default_rng(3)
    wells = rng.permutation(treatment_wells())[:sirnas]
    return np.array([[features(studio.site(e, 1 + i%4, w, s, i).astype(np.float32)) for s in (1, 2)] for i, w in enumerate(wells)])

def difficulty(experiments=None, sirnas=24, size=96, seed=0):
    "Linear classifiers on raw channel means and standard deviations: the experiment, and the siRNA in a batch never seen."
    names = experiments or list(package_table('experiment_pixel_stats').experiment)
    with ProcessPoolExecutor(cores()) as pool: x = np.stack(list(pool.map(draw_features, [(e, sirnas, size, seed) for e in names])))
    x = np.log(x + .5)
    e = np.broadcast_to(np.arange(len(names))[:, None, None], x.shape[:3])
    half = np.broadcast_to(np.arange(sirnas)[None, :, None]//4 % 2, x.shape[:3]) == 0  # other wells of the same plates
    out = dict(experiments=len(names), sirnas=sirnas, size=size,
               experiment_accuracy=round(linear_accuracy((x[half], e[half]), (x[~half], e[~half]), len(names)), 4))
    held = np.array([n.rsplit('-')[-1] in ('04', '08', '17', '18') for n in names])
    s = np.broadcast_to(np.arange(sirnas)[None, :, None], x.shape[:3])
    flat = lambda a, keep: a[keep].reshape(-1, *a.shape[3:])
    found = linear_accuracy((flat(x, ~held), flat(s, ~held)), (flat(x, held), flat(s, held)), sirnas)
    return dict(out, sirna_accuracy_unseen_batch=round(found, 4), sirna_times_chance=round(sirnas*found, 2))


def main():
    cv2.setNumThreads(1)  # OpenCV's threads do not survive the forks below
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--parts', default='brightness,looks,difficulty', help='with commas')
    parts = p.parse_args().parts.split(',')
    path = RESULTS/'calibration.json'
    out = json.loads(path.read_text()) if path.exists() else {}
    out.pop('machine', None)
    def keep(**part):
        out.update(part); save('calibration', **out)
    if 'brightness' in parts:
        keep(brightness=[brightness(*o) for o in ((128, 8, 2), (512, 8, 1))], asked=dict(median_error=.1, worst_error=.25))
        for o in out['brightness']: print(o)
    if 'looks' in parts:
        keep(looks=looks(out.get('looks', {})))
    if 'difficulty' in parts:
        found = []
        for o in (dict(experiments=DEMO['experiments'], sirnas=48), dict(sirnas=48)):
            found.append(difficulty(**o)); print(found[-1])
            keep(difficulty=found, difficulty_asked=dict(experiment_accuracy=.95, sirna_times_chance=3))


if __name__ == '__main__': main()
