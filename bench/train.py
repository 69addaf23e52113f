"""What a training step costs beside a bare PyTorch loop, and where the time of the step goes.

    python bench/train.py [--rounds N]

Trains the demo's model (EfficientNet-Lite0, 96 px, batches of 32) on a small drawn screen. Rounds of the two loops
alternate, so that what else the machine does falls on both: the library's own `fit_recipe`, with all its callbacks,
and a loop of a dozen lines with the same batches, model and optimizer. The ratio is the median over the rounds. Below
it stand two older ways of doing the same: pictures with channels first, and fastai's optimizer.
"""
import argparse, statistics, tempfile, time
from pathlib import Path

import torch
from fastai.optimizer import Adam
from fastai.vision.all import set_seed
from rcic_fastai.all import *
from rcic_fastai.screen.simulate.layout import simulate_screen

from machine import save

EPOCHS, LIMIT = 2, 1.05


def learner(dls, **kwargs):
    "Return a new learner of the demo's kind"
    set_seed(0)
    return screen_learner(dls, **kwargs)


def library(dls, **kwargs):
    "Return milliseconds per batch of `fit_recipe`"
    learn = learner(dls, **kwargs)
    recipe = Recipe('bench', [Stage('all', EPOCHS, 2e-3)])
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_recipe(recipe)
    return 1000*(time.perf_counter() - start)/(EPOCHS*len(dls.train))


def channels_first(dls):
    "As `library`, with pictures as PyTorch has them by default"
    channels_last, torch.channels_last = torch.channels_last, torch.contiguous_format
    try: return library(dls)
    finally: torch.channels_last = channels_last


def bare(dls):
    "Return milliseconds per batch of a plain loop, and of its parts"
    learn = learner(dls)
    model, parts = learn.model, dict.fromkeys(('batch', 'forward', 'backward', 'optimizer'), 0.)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, EPOCHS*len(dls.train))
    model.train()
    begin = start = time.perf_counter()

    def lap(name):
        nonlocal start
        now = time.perf_counter()
        parts[name] += now - start
        start = now

    for _ in range(EPOCHS):
        for *xs, y in dls.train:
            lap('batch')
            loss = model.loss(model(*xs), y)
            lap('forward')
            loss.backward()
            lap('backward')
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            lap('optimizer')
    n = EPOCHS*len(dls.train)
    return 1000*(time.perf_counter() - begin)/n, {k: 1000*v/n for k, v in parts.items()}


def reading(dls):
    "Return milliseconds per batch of the batches alone, before their transforms"
    dl = dls.train.new(after_batch=None)
    start = time.perf_counter()
    n = sum(1 for _ in dl)
    return 1000*(time.perf_counter() - start)/n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='rounds of each loop')
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as tmp:
        screen = Path(tmp)/'screen'
        simulate_screen(screen, ['HUVEC-01', 'HUVEC-02', 'RPE-01', 'RPE-08'], sirnas=24, size=96, controls=2, progress=False)
        dls = screen_dls(open_screen(pack_screen(open_screen(screen), Path(tmp)/'screen.zarr', progress=False)), valid='none', device='cpu')
        loops = dict(bare=lambda: bare(dls)[0], library=lambda: library(dls), channels_first=lambda: channels_first(dls),
                     fastai_adam=lambda: library(dls, opt_func=Adam))
        bare(dls), library(dls)                                                # warm up
        times = {k: [] for k in loops}
        for _ in range(rounds):
            for k, f in loops.items(): times[k].append(f())
        parts = [bare(dls)[1] for _ in range(rounds)]
        step = {k: statistics.median(p[k] for p in parts) for k in parts[0]}
        step = {'reading': statistics.median(reading(dls) for _ in range(rounds)), **step}
        step['transforms'] = step.pop('batch') - step['reading']
    ratio = {k: statistics.median(a/b for a, b in zip(v, times['bare'])) for k, v in times.items()}
    names = dict(bare='bare PyTorch loop', library='fit_recipe', channels_first='with channels first', fastai_adam="with fastai's Adam")
    print(f"{'':24}{'ms per batch':>14}{'ratio':>8}")
    for k, v in times.items(): print(f'{names[k]:24}{statistics.median(v):14.0f}{ratio[k]:8.2f}')
    print(f'asked of fit_recipe: at most {LIMIT}\n\nparts of the bare loop, ms per batch')
    for k, v in step.items(): print(f'{k:24}{v:14.1f}')
    save('train', threads=torch.get_num_threads(), batch_size=32, pixels=96, rounds=rounds, asked=LIMIT,
         ms_per_batch={k: round(statistics.median(v), 1) for k, v in times.items()},
         range_ms={k: [round(min(v), 1), round(max(v), 1)] for k, v in times.items()},
         ratio={k: round(v, 3) for k, v in ratio.items()}, parts_ms={k: round(v, 1) for k, v in step.items()})


if __name__ == '__main__': main()
