"""Speed and memory of training, measured side by side; nothing is asserted.

    python tests/bench.py                                        # MAE, and with timm's blocks
    python tests/bench.py --preset imagenet --batch 64 --compile # ViT-B/16 at 224 px, on a GPU
    python tests/bench.py --methods mae ls msg msg-ada           # Perceptual MAE
    python tests/bench.py --methods mae mixed_ae naive-mixing
    python tests/bench.py --methods mae cmae cmae-one-view       # with and without contrast
    python tests/bench.py --methods supervised mim-tokens mim-pixels
    python tests/bench.py --epoch 200 --data FOLDER              # the scripts' own loop, too
    python tests/bench.py --decode FOLDER                        # loading alone: files, 224 px
    python tests/bench.py --decode shapes --workers 2            # and from memory, 32 px

A step is forward, losses, backward and optimisers, on random images, all methods in turn. The
median over --rounds; the mean over 16 where ls, msg or msg-ada is among them, of which some steps
do more. `of peak` is its arithmetic beside a large matrix product's in the same number format, 0
where it is not counted. Peak memory is that of a process of its own (CPU: Linux, the growth of its
resident set). `loop` is the images/s of --epoch so many steps of the script, and the share of time
it waited for data.

--decode measures how fast images are loaded, cropped and resized, without any training: by one core
on its own, then as batches of the training loader, without worker processes and with --workers of
them (by default one a core). Each number is the images/s of five seconds, starting the workers
included, or of one epoch if that is shorter.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cmae
import common
import mae_perceptual
import mixed_ae
import supervised_mim

try:
    from timm.models.vision_transformer import Block as TimmBlock
except ImportError:
    TimmBlock = None

OFF = dict(homologous_attention=False, homologous_loss=False, segment=False)
METHODS = {  # name -> script, the settings that make it
    "mae": (mae_perceptual, dict(variant="mae", lr_decay=None)),
    "timm": (mae_perceptual, dict(variant="mae", lr_decay=None)),
    "ls": (mae_perceptual, dict(variant="ls")),
    "msg": (mae_perceptual, dict(variant="msg")),
    "msg-ada": (mae_perceptual, dict(variant="msg-ada")),
    "mixed_ae": (mixed_ae, {}),
    "naive-mixing": (mixed_ae, OFF),
    "cmae": (cmae, {}),
    "cmae-one-view": (cmae, dict(contrastive_weight=0)),
    "supervised": (supervised_mim, dict(mim_weight=0)),
    "mim-tokens": (supervised_mim, {}),
    "mim-pixels": (supervised_mim, dict(target="pixels")),
}
ADVERSARIAL = {"ls", "msg", "msg-ada"}


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def preset_of(script, preset: str) -> str:
    return preset if preset in script.PRESETS else "tiny-imagenet"  # CMAE's largest


def make_step(name: str, args, device: torch.device):
    """A function without arguments: one training step of the method."""
    script, settings = METHODS[name]
    cfg = script.Config(**script.PRESETS[preset_of(script, args.preset)] | settings)
    batch = args.batch
    size = cfg.img_size
    imgs, labels = torch.randn(batch, 3, size, size, device=device), torch.arange(batch)
    if name in ADVERSARIAL:
        return adversarial_step(cfg, imgs, args.compile)
    if script is supervised_mim:
        model, labels = script.build(cfg, 1000), labels.to(device) % 1000
        tokenizer = script.move_to(device, script.build_tokenizer(cfg))
        tokenizer.eval().requires_grad_(False)
    else:
        model = script.build(cfg)
    if name == "timm":
        for part in (model.encoder, model.decoder):
            part.blocks = nn.ModuleList(timm_block(block) for block in part.blocks)

    def loss() -> torch.Tensor:
        if script is mae_perceptual:
            pred, mask = model(imgs)
            return common.masked_mse(pred, common.patchify(imgs, cfg.patch_size), mask)
        if name == "cmae":
            model.momentum_step(0.99)
            return model(imgs, imgs.flip(3))[0]
        if script is supervised_mim:
            token_ids = tokenizer.encode(imgs) if name == "mim-tokens" else None
            return model(imgs, labels, token_ids)[0]
        return model(imgs)[0]

    optimizer = common.adamw(model.to(device), weight_decay=0.05, lr=1e-4)
    if args.compile:
        model.compile()

    def step() -> None:
        with autocast(device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timm_block(ours: common.Block) -> nn.Module:
    """timm's block of the same shape."""
    dim, heads, eps = ours.norm1.normalized_shape[0], ours.attn.num_heads, ours.norm1.eps
    return TimmBlock(dim, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=eps))


def adversarial_step(cfg: mae_perceptual.Config, imgs: torch.Tensor, compile: bool):
    model = mae_perceptual.build(cfg).to(imgs.device)
    if compile:
        model.compile()
    adversary = mae_perceptual.build_adversary(cfg).to(imgs.device)
    adversary.augment.p = 0.3  # at 0 it costs nothing
    players, counter = (model, adversary.discriminator), itertools.count()
    optimizers = [common.adamw(player, 0.0, lr=1e-4) for player in players]
    parameters = [mae_perceptual.trainable(player) for player in players]

    def step() -> None:
        with autocast(imgs.device):
            g_loss, d_loss, _ = adversary.losses(*players, imgs, next(counter))
        d_loss.backward(inputs=parameters[1], retain_graph=True)
        g_loss.backward(inputs=parameters[0])
        adversary.end_step(len(imgs))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(name: str, args, device: torch.device) -> float:
    """MiB that the model and its first steps need."""

    def high_water_mark() -> int:  # of this process; ru_maxrss would include its parent's
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    before, step = high_water_mark(), make_step(name, args, device)
    for _ in range(3):
        step()
    return (high_water_mark() - before) / 2**20


def matrix_peak(device: torch.device) -> float:
    """Arithmetic a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, times = torch.randn(n, n, device=device), []
    with autocast(device):
        for _ in range(8):
            synchronize(device)
            begin = time.perf_counter()
            a @ a
            synchronize(device)
            times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def loop(name: str, args) -> dict:
    """What metrics.jsonl says after --epoch steps of the script itself, on a new folder."""
    script, settings = METHODS[name]
    flags = ["--preset", preset_of(script, args.preset), "--data", args.data, "--device",
             args.device, "--batch-size", args.batch, "--steps", args.epoch, "--knn-every", 0,
             "--recon-every", 10**6, "--epochs", 10**6]  # fmt: skip
    flags += ["--compile"] if args.compile else []
    flags += ["--workers", args.workers] if args.workers is not None else []
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        elif value is not None:
            flags += [f"--{flag}", value]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        flags = [str(x) for x in (*flags, "--out", out)]
        script.main(common.parse(script.Config, script.PRESETS, flags))
        *_, last = (Path(out) / "metrics.jsonl").read_text().splitlines()
    line = json.loads(last)
    return {"loop_images_per_s": line["images_per_s"], "data_wait": line["data_wait"]}


def images_per_s(batches, size: int, seconds: float = 5.0) -> float:
    """How many images a second an iterator over batches of `size` yields, in the given time."""
    count, begin = 0, time.perf_counter()
    for _ in batches:
        count += size
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin)


def decode(name: str, args) -> None:
    torch.set_num_threads(1)
    size = 32 if name == "shapes" else 224
    images, crop = common.load_dataset(name, "pretrain", size), common.RandomCrop(size, 0.2)
    batch, views = min(len(images), args.batch), common.Views(images, crop)
    print(f"{name}, {size} px, batch {batch}, {os.cpu_count()} cores")
    one_by_one = (views[i] for i in range(len(views)))
    print(f"{images_per_s(one_by_one, 1):6.0f} images/s by one core, without a loader")
    for workers in (0, os.cpu_count() if args.workers is None else args.workers):
        cfg = common.Config(batch_size=batch, workers=workers, device=args.device)
        loader = common.TrainLoader(common.Run(cfg), images, crop)
        with contextlib.closing(loader.batches(0)) as batches:  # ends the workers
            speed = images_per_s(batches, batch)
        print(f"{speed:6.0f} images/s by the loader with {workers} workers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=mixed_ae.PRESETS, default="cifar")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--epoch", type=int, default=0, metavar="STEPS")
    parser.add_argument("--data", default="shapes", help="of --epoch")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each method")
    parser.add_argument("--workers", type=int, help="of --epoch and --decode")
    parser.add_argument("--decode", metavar="DATA", help="a folder, or a data set's name")
    parser.add_argument("--methods", nargs="+", choices=METHODS,
                        default=["mae", "timm"] if TimmBlock else ["mae"])  # fmt: skip
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        return decode(args.decode, args)
    device = common.set_up_process(args.device)
    torch.set_float32_matmul_precision("high")  # as in a run
    if args.memory_of:
        return print(peak_memory(args.memory_of, args, device))

    steps = {name: make_step(name, args, device) for name in args.methods}
    rounds, average = args.rounds, statistics.median
    if ADVERSARIAL & set(steps):
        rounds, average = 16, statistics.mean
    times, arithmetic = {name: [] for name in steps}, {}
    for name, step in steps.items():
        if name in ADVERSARIAL:  # the counter's hooks do not bear a gradient of a gradient
            continue
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            step()
        arithmetic[name] = counter.get_total_flops()
    for i in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            synchronize(device)
            if i >= 2:  # warm-up
                times[name].append(time.perf_counter() - begin)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = matrix_peak(device)
    print(f"{args.preset}, batch {args.batch}, {where}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {rounds} rounds{', compiled' * args.compile}; matrix product "
          f"{peak / 1e12:.2f} TFLOP/s", file=sys.stderr if args.json else None)  # fmt: skip
    for name, seconds in times.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = float(done.stdout.split()[-1])  # an import may print, too
        middle, first = average(seconds), average(times[args.methods[0]])
        row = {"method": name, "ms": 1000 * middle, "images_per_s": args.batch / middle,
               "beside_first": middle / first, "of_peak": arithmetic.get(name, 0) / middle / peak,
               "peak_MiB": memory}  # fmt: skip
        row |= loop(name, args) if args.epoch and name != "timm" else {}
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        text = (f"{name:14s} {row['ms']:8.1f} ms {row['images_per_s']:8.0f} images/s "
                f"{row['beside_first']:7.3f} x {args.methods[0]} {row['of_peak']:6.2f} of peak "
                f"{memory:7.0f} MiB")  # fmt: skip
        if "data_wait" in row:
            text += f"  loop {row['loop_images_per_s']:.0f} images/s, {row['data_wait']:.2f} waited"
        print(text, flush=True)


if __name__ == "__main__":
    main()
