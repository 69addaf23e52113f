"""What accuracy a user has after the same minutes of training: the `demo` recipe, the last release's, and what one would write otherwise.

    python bench/time_to_accuracy.py [--seconds 90,180] [--seeds 0,1,2] [--only demo,plain] [--speeds] [--runs FOLDER]

Four trainings of EfficientNet-Lite0 on one drawn screen (8 training and 4 unseen experiments, 40 siRNAs, 96 px):

demo      the recipe `demo`, as many epochs as fit
release   that of version 0.1, with what else is faster since: any angle, pictures channels first, fastai's optimizer
plain     a loop in PyTorch: each picture's own normalization, quarter turns, CutMix, softmax with label smoothing, AdamW, 1cycle
fastai    the model that `vision_learner` builds, `fine_tune`, the screen's own normalization, fastai's augmentations

How many epochs fit is known from the speed of each, which is measured first: two epochs of each in turns, several rounds, on a quiet machine. The
accuracy after so many epochs does not depend on how busy the machine is, so the trainings may run at any time. The first two answer with the nearest neighbor (inductive), the others with their classifier, both sites of a well averaged. What a run
gave is kept in FOLDER (default: bench/runs), so that an interrupted benchmark continues. Settings were chosen on held-out
training experiments of other screens; the four unseen experiments are read here only.
"""
import argparse, json, time
from dataclasses import replace
from pathlib import Path

from fastai.optimizer import Adam
from fastai.vision.all import *
from machine import save
from rcic_fastai.all import *

TRAIN = ['HUVEC-01', 'HUVEC-02', 'HUVEC-03', 'RPE-01', 'RPE-02', 'RPE-03', 'U2OS-01', 'U2OS-02']
UNSEEN = ['HUVEC-17', 'HUVEC-18', 'RPE-08', 'U2OS-04']
EXACT = dict(max_rotate=0, max_zoom=1, max_warp=0)


def drawn(folder):
    "Return the screen, drawn and packed once"
    store = folder/'time_to_accuracy.zarr'
    if not store.exists():
        simulate_screen(folder/'time_to_accuracy', TRAIN + UNSEEN, sirnas=40, size=96, controls=2, seed=7, progress=False)
        pack_screen(open_screen(folder/'time_to_accuracy'), store, progress=False)
    return open_screen(store)


def loaders(screen, seed, **kwargs): return screen_dls(screen.train, valid='none', device='cpu', seed=seed, **kwargs)


def right(named, screen):
    "Return the share of unseen wells that are named right: a Series of names by well"
    truth = screen.table.drop_duplicates('well_id').set_index('well_id').sirna
    return float((named == truth.loc[named.index]).mean())


def by_index(learn, screen):
    pred = learn.to_model(tta=1, progress=False).predict(screen, progress=False, tta=1)
    return right(pred.set_index('id_code').sirna, screen)


def by_classifier(model, spec, screen):
    "Name wells by the mean of the probabilities of their sites"
    dl, found = spec_dl(spec, screen.test.treatments, device='cpu'), []
    model.eval()
    with torch.no_grad():
        for x, *meta in dl: found.append(model(x, *meta).softmax(1))
    wells = pd.DataFrame(torch.cat(found).numpy()).groupby(dl.rows.well_id.to_numpy()).mean()
    return right(pd.Series([spec.labels[i] for i in wells.to_numpy().argmax(1)], wells.index), screen)


def recipe(learn, epochs, augs=None):
    stages = get_recipe('demo').stages
    head, body = [replace(s, augs=s.augs if augs is None else augs) for s in stages]
    head_epochs = min(head.epochs, max(epochs - 1, 0))
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(Recipe('bench', [replace(head, epochs=head_epochs), replace(body, epochs=epochs - head_epochs)]), seed=learn.bench_seed)


def demo(screen, seed):
    learn = screen_learner(loaders(screen, seed), seed=seed)
    learn.bench_seed = seed
    return partial(recipe, learn), partial(by_index, learn, screen)


def release(screen, seed):
    learn = screen_learner(loaders(screen, seed), seed=seed, opt_func=Adam)
    learn.bench_seed = seed
    def train(epochs):
        channels_last, torch.channels_last = torch.channels_last, torch.contiguous_format
        try: recipe(learn, epochs, augs={})
        finally: torch.channels_last = channels_last
    return train, partial(by_index, learn, screen)


class Pictures(nn.Module):
    "A model of pictures alone, which is given metadata too"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x, *meta): return self.net(x.as_subclass(torch.Tensor))


def lite0(pretrained=True):
    "EfficientNet-Lite0 for three channels as fastai takes an architecture: a stem, a body and a head to cut off"
    b = create_backbone('efficientnet-lite0', 3, True)
    return nn.Sequential(b.stem, b.body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b.n_features, 1000)))


def fastai(screen, seed):
    set_seed(seed)
    dls = loaders(screen, seed, norm='global')
    net = create_vision_model(lite0, len(dls.spec.labels), n_in=6, cut=-1)
    def halves(model): return [params(model.net[0]), params(model.net[1])]
    learn = Learner(dls, Pictures(net), loss_func=CrossEntropyLossFlat(), splitter=halves, metrics=accuracy)
    def train(epochs):
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(max(epochs - 1, 1))
    return train, lambda: by_classifier(learn.model, dls.spec, screen)


def plain(screen, seed):
    set_seed(seed)
    dls, classes = loaders(screen, seed, augs=site_augs(**EXACT, max_lighting=0, gain=0, offset=0)), screen.train.treatments.table.sirna.nunique()
    b = create_backbone('efficientnet-lite0', 6, True)
    net = nn.Sequential(b.stem, b.body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2), nn.Linear(b.n_features, classes))
    model, draw, loss = Pictures(net.to(memory_format=torch.channels_last)), np.random.default_rng(seed), nn.CrossEntropyLoss(label_smoothing=.1)
    def train(epochs):
        opt = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, epochs*len(dls.train))
        model.train()
        for _ in range(epochs):
            for x, *meta, y in dls.train:
                x, y, share = x.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last), y.as_subclass(torch.Tensor), 1.
                other = torch.from_numpy(draw.permutation(len(y)))
                if draw.random() < .5:
                    h, w = x.shape[-2:]
                    side, cy, cx = (1 - draw.beta(1, 1))**.5/2, draw.integers(h), draw.integers(w)
                    y1, y2, x1, x2 = max(0, int(cy - side*h)), min(h, int(cy + side*h)), max(0, int(cx - side*w)), min(w, int(cx + side*w))
                    x[..., y1:y2, x1:x2] = x[other][..., y1:y2, x1:x2]
                    share = 1 - (y2 - y1)*(x2 - x1)/(h*w)
                pred = model(x)
                (share*loss(pred, y) + (1 - share)*loss(pred, y[other])).backward()
                opt.step()
                schedule.step()
                opt.zero_grad()
    return train, lambda: by_classifier(model, dls.spec, screen)


CONTENDERS = dict(demo=demo, release=release, plain=plain, fastai=fastai)


def speeds(screen, rounds):
    "Return the training samples per second of each contender: the median over rounds, in which they take turns"
    n, found, trains = len(screen.train.treatments), {c: [] for c in CONTENDERS}, {c: make(screen, 0)[0] for c, make in CONTENDERS.items()}
    for train in trains.values(): train(2)                  # warm
    for _ in range(rounds):
        for name, train in trains.items():
            start = time.perf_counter()
            train(2)                                        # `fine_tune` trains two epochs at least
            found[name].append(2*n/(time.perf_counter() - start))
    return {c: round(float(np.median(v)), 1) for c, v in found.items()}


def one(name, screen, seconds, speed, seed):
    "Return what a contender reaches with the epochs that fit into so many seconds"
    train, judge = CONTENDERS[name](screen, seed)
    n = len(screen.train.treatments)
    epochs = max(2, round(seconds*speed/n))
    train(epochs)
    return dict(contender=name, seed=seed, asked_seconds=seconds, epochs=epochs, seconds=round(epochs*n/speed, 1), samples_per_s=speed, accuracy=round(judge(), 4))


def summary(lines):
    "Return one row per contender and time"
    t = pd.DataFrame(lines).groupby(['asked_seconds', 'contender'], sort=False)
    return t.agg(epochs=('epochs', 'mean'), samples_per_s=('samples_per_s', 'mean'), mean=('accuracy', 'mean'), low=('accuracy', 'min'),
                 high=('accuracy', 'max'), seeds=('seed', 'count')).round(3).reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', default='90,180', help='seconds of training (default: %(default)s)')
    parser.add_argument('--seeds', default='0,1,2', help='(default: %(default)s)')
    parser.add_argument('--only', default=','.join(CONTENDERS), help='(default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='in which the speeds are measured (default: %(default)s)')
    parser.add_argument('--speeds', action='store_true', help='measure the speeds only')
    parser.add_argument('--runs', type=Path, default=Path(__file__).parent/'runs', help='(default: %(default)s)')
    args = parser.parse_args()
    args.runs.mkdir(exist_ok=True)
    screen, kept = drawn(args.runs), args.runs/'time_to_accuracy.json'
    said = json.loads(kept.read_text()) if kept.exists() else dict(lines=[])
    if 'speeds' not in said:
        said['speeds'] = speeds(screen, args.rounds)
        kept.write_text(json.dumps(said))
    print('samples/s:', said['speeds'], flush=True)
    if args.speeds: return
    lines = said['lines']
    for seed in map(int, args.seeds.split(',')):
        for seconds in map(int, args.seconds.split(',')):
            for name in args.only.split(','):
                if any((l['contender'], l['seed'], l['asked_seconds']) == (name, seed, seconds) for l in lines): continue
                lines.append(one(name, screen, seconds, said['speeds'][name], seed))
                print(lines[-1], flush=True)
                kept.write_text(json.dumps(said))
    print(summary(lines).to_string(index=False))
    save('time_to_accuracy', lines=lines, speeds=said['speeds'], chance=1/40, unseen=UNSEEN, training=TRAIN)


if __name__ == '__main__': main()
