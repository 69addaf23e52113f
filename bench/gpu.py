"""What a GPU makes of it: equal answers, pictures per second of training and embedding in every mode, and how long the GPU waits.

    python bench/gpu.py                    on a machine with a CUDA GPU, in less than 8 minutes
    python bench/gpu.py --device cpu --tiny    a rehearsal without one: small models, nothing stored

Two models with random weights: EfficientNet-B3 at 300 px (`rcic117`) and DenseNet-161 at 512 px (the RxRx1 paper). Each is
trained in 32 bits, bf16, fp16 and bf16 compiled, on batches from a packed screen, beside a bare PyTorch loop that is given one
batch on the device again and again: the difference is what the GPU waits for. Without a GPU nothing is measured and nothing stored.
"""
import argparse, tempfile, time
from contextlib import nullcontext
from pathlib import Path

import torch
from machine import save
from rcic_fastai.all import *
from rcic_fastai.train.learner import compile_model, precision_callbacks

MODELS = {'rcic117': ('efficientnet-b3', 300, 64), 'rxrx1_paper': ('densenet161', 512, 32)}
TINY = {'tiny': ('test_resnet', 32, 8)}
MODES = {'32': ('32', False), 'bf16': ('bf16', False), 'fp16': ('16', False), 'bf16, compiled': ('bf16', True)}
COSINE = .999       # least cosine of embeddings that should be the same


def drawn(folder, size, sites):
    "Return a packed screen of about as many sites"
    path = folder/f'{size}.zarr'
    if not path.exists():
        simulate_screen(folder/f's{size}', ['HUVEC-01', 'RPE-01'], sirnas=max(8, sites//4), size=size, controls=0, progress=False)
        pack_screen(open_screen(folder/f's{size}'), path, progress=False)
    return open_screen(path)


def made(screen, arch, bs, device, seed=0):
    return screen_learner(screen_dls(screen, valid='none', bs=bs, device=device, seed=seed), arch, pretrained=None, seed=seed)


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def per_second(n, what, device, seconds):
    "Return items per second of `what()`, which handles `n`, over at least so many seconds after one warm round"
    what()
    wait(device)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        what()
        wait(device)
        rounds += 1
    return rounds*n/(time.perf_counter() - start)


def autocast(mode, device):
    kind = {'bf16': torch.bfloat16, '16': torch.float16}.get(mode)
    return torch.autocast(device.type, kind) if kind else nullcontext()


def bare(learn, mode, device):
    "Return one step of a bare loop: the same model and optimizer, one batch that is on the device already"
    *xs, y = learn.dls.train.one_batch()
    optimizer = torch.optim.AdamW(learn.model.parameters(), lr=1e-3, fused=device.type == 'cuda')
    scaler = torch.amp.GradScaler(device.type, enabled=mode == '16')
    learn.model.train()
    def step():
        with autocast(mode, device): pred = learn.model(*xs)
        scaler.scale(learn.model.loss(pred.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


def training(screen, arch, bs, mode, compiled, device, seconds):
    "Return samples per second of `fit_recipe`, and of a bare loop, or what went wrong"
    learn, other = (made(screen, arch, bs, device) for _ in range(2))
    for o in (learn, other):
        if compiled: compile_model(o.model, device)
    step, n = bare(other, mode, device), len(learn.dls.train)
    def steps():
        for _ in range(n): step()
    recipe, cbs = Recipe('bench', [Stage('all', 1, 1e-3, cutmix=.5)]), precision_callbacks(mode, device)
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(recipe, cbs=cbs)
    ours = per_second(n*bs, epoch, device, seconds)
    plain = per_second(n*bs, steps, device, seconds)
    return dict(samples_per_s=round(ours, 1), bare_samples_per_s=round(plain, 1), share_of_time_waiting=round(1 - ours/plain, 3))


def embedding(screen, arch, bs, device, seconds):
    learn = made(screen, arch, bs, device)
    return round(per_second(len(screen), lambda: learn.embed(screen.table, tta=1, bs=bs, progress=False), device, seconds), 1)


def cosines(screen, arch, bs, device):
    "Return the least cosine between embeddings of the CPU and the device, and of full and half precision"
    learn = made(screen, arch, bs, device)
    model, batch = learn.model.eval(), [o for o in learn.dls.train.one_batch()[:-1]]
    with torch.no_grad():
        there = model.embed(*batch).float().cpu()
        found = {}
        for mode in ('bf16', '16') if device.type == 'cuda' else ('bf16',):
            with autocast(mode, device): half = model.embed(*batch).float().cpu()
            found[mode] = torch.cosine_similarity(there, half).min().item()
        here = model.cpu().embed(*[o.cpu() for o in batch]).float()
    found['cpu'] = torch.cosine_similarity(there, here).min().item()
    return {k: round(v, 6) for k, v in found.items()}


def same_batches(screen, bs, device):
    "Return whether the batches of a screen in the memory of the device are those of the packed one"
    def batches(s):
        dls = screen_dls(s, valid='none', bs=bs, device=device, augs=None)
        return [b[0].as_subclass(torch.Tensor) for b in dls.train]
    return all(torch.equal(a, b) for a, b in zip(batches(screen), batches(screen.resident(device, progress=False))))


def tried(f, *args):
    "Return what `f` gives, or the error: one mode that fails does not end the others"
    try: return f(*args)
    except Exception as e: return dict(error=f'{type(e).__name__}: {str(e).splitlines()[0][:200]}')


def measure(models, folder, device, seconds, sites):
    res = {}
    for name, (arch, size, bs) in models.items():
        screen = drawn(folder, size, sites)
        held = screen.resident(device, progress=False)
        modes = MODES if device.type == 'cuda' else {'32': MODES['32']}
        res[name] = dict(arch=arch, size=size, batch_size=bs, cosines=tried(cosines, screen, arch, bs, device),
                         resident_is_the_same=tried(same_batches, screen, bs, device),
                         embedding_samples_per_s=tried(embedding, screen, arch, bs, device, seconds),
                         training={m: tried(training, screen, arch, bs, *how, device, seconds) for m, how in modes.items()},
                         training_resident=tried(training, held, arch, bs, *list(modes.values())[-1], device, seconds))
        print(name, res[name], flush=True)
    return res


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda', help='where to measure (default: %(default)s)')
    parser.add_argument('--tiny', action='store_true', help='small models, nothing is stored')
    parser.add_argument('--seconds', type=float, default=8, help='time for each figure (default: %(default)s)')
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available(): return print('gpu: there is no CUDA GPU here: nothing is measured')
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        res = measure(TINY if args.tiny else MODELS, Path(folder), device, args.seconds, 64 if args.tiny else 512)
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not args.tiny: save('gpu', cards=cards, seconds_per_figure=args.seconds, cosine_asked=COSINE, models=res)


if __name__ == '__main__': main()
