"""Speed, memory and arithmetic of training; nothing is asserted.

    python tests/bench.py                                        # MAE, and with timm's blocks
    python tests/bench.py --preset imagenet --batch 64 --compile # ViT-B/16 at 224 px, on a GPU
    python tests/bench.py --methods mae ls msg msg-ada           # Perceptual MAE
    python tests/bench.py --methods mae mixed_ae naive-mixing
    python tests/bench.py --methods mae cmae cmae-one-view       # with and without contrast
    python tests/bench.py --methods supervised mim-tokens mim-pixels
    python tests/bench.py --epoch 200 --data FOLDER              # also the loop of the scripts
    python tests/bench.py --decode FOLDER                        # only loading: files, 224 px
    python tests/bench.py --decode shapes --workers 2            # and from memory, 32 px
    python tests/bench.py --arithmetic                           # computed, not measured: no GPU
    python tests/bench.py --arithmetic --preset imagenet --batch 64 --json

By default, steps are timed. A step is the forward pass, the losses, the backward pass and the
optimisers, on random images; the methods take turns. Times are the median of --rounds steps, or the
mean of 16 steps if ls, msg or msg-ada is among the methods, because some of their steps do more.
`of peak` is the step's arithmetic per second divided by that of a large matrix product in the same
number format; it is 0 where the arithmetic is not counted. Peak memory is that of a process of its
own (on a CPU: the growth of its resident set, Linux only). --epoch adds the images/s of that many
steps of the script itself, and the share of time in which it waited for data.

--decode measures how fast images are loaded, cropped and resized, without any training: by one core
on its own, then as batches of the training loader, without worker processes and with --workers of
them (by default one a core). Each number is the images/s of five seconds, starting the workers
included, or of one epoch if that is shorter.

--arithmetic runs the steps on a simulated GPU whose tensors have shapes and no values. It counts
    GFLOP per image    in matrix products, convolutions and attention, forward and backward: two
                       FLOPs for each multiply-add; what attention computes twice in its backward
                       pass to save memory is counted once
    ratio              to MAE, and for Supervised MIM to the supervised baseline
    GiB                the largest amount of live tensors (bf16 autocast, AdamW's states included);
                       CUDA's own workspaces come on top, and a resuming run holds its checkpoint
    operators          calls of PyTorch's operators per step; each takes the host about 8 us, so
                       that a fast GPU waits for the host if there are many small ones
For msg-ada, GFLOP and operators are the mean over its cycle of 16 steps, and GiB is that of the
largest step, which has both penalties. It takes one or two minutes.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path

import simulated_gpu
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
    "ssim": (mae_perceptual, dict(variant="ssim", lr_decay=None)),
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
    """A function of the step's number: one training step of the method."""
    script, settings = METHODS[name]
    cfg = script.Config(**script.PRESETS[preset_of(script, args.preset)] | settings)
    batch = args.batch
    size = cfg.img_size
    imgs, labels = torch.randn(batch, 3, size, size).to(device), torch.arange(batch)
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
        if name == "ssim":
            fake, _, _ = mae_perceptual.generate(model, imgs)
            return mae_perceptual.ssim_loss(*map(mae_perceptual.to_rgb, (fake[0], imgs)))
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

    def step(number: int) -> None:
        with autocast(device):
            value = loss()
        value.backward()
        del value  # frees the graph before the optimiser's step
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
    players = model, adversary.discriminator
    optimizers = [common.adamw(player, 0.0, lr=1e-4) for player in players]
    parameters = [mae_perceptual.trainable(player) for player in players]

    def step(number: int) -> None:
        with autocast(imgs.device):
            g_loss, d_loss, stats = adversary.losses(*players, imgs, number)
        d_loss.backward(inputs=parameters[1], retain_graph=True)
        g_loss.backward(inputs=parameters[0])
        del g_loss, d_loss, stats  # frees the graph before the optimisers' steps
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
    for number in range(3):
        step(number)
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


class CountingGPU(simulated_gpu.SimulatedGPU):
    """A GPU whose tensors have no values. It counts `flops` and `operators`, and the bytes of live
    tensors: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__(place="meta")
        self.flops = self.operators = self.live = self.peak = 0
        self.known = set()  # storages of live tensors

    def dispatch(self, func, args: tuple, kwargs: dict):
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if name == "_local_scalar_dense":  # x.item(), and x has no value
            return 0.0
        out = super().dispatch(func, args, kwargs)
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            q, k = args[1:3] if name.endswith("backward") else args[:2]
            products = 4 if name.endswith("backward") else 2
            self.flops += 2 * products * q.numel() * k.shape[2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        self.operators += not (func.is_view or name in ("detach", "empty", "empty_like"))
        for x in tree_leaves(out):
            if isinstance(x, simulated_gpu.GPUTensor):
                self.track(x.inner.untyped_storage())
        return out

    def track(self, storage) -> None:
        if storage._cdata in self.known:
            return
        size = -(-storage.nbytes() // 512) * 512  # CUDA's allocator rounds up
        self.known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, storage._cdata, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def count(name: str, args) -> dict:
    """GFLOP per image, GiB and operators of a training step of the method."""
    with simulated_gpu.registered(), CountingGPU().plugged_in() as gpu:
        step = make_step(name, args, torch.device("cuda", 0))
        step(1)  # creates the optimisers' states
        # How many of 16 steps are like this one. Only msg-ada has penalties, in steps 0 and 4.
        frequencies = {0: 1, 4: 3, 1: 12} if name == "msg-ada" else {1: 16}
        flops = operators = peak = 0
        for number, frequency in frequencies.items():
            gpu.flops, gpu.operators, gpu.peak = 0, 0, gpu.live
            step(number)
            flops += frequency * gpu.flops / 16
            operators += frequency * gpu.operators / 16
            peak = max(peak, gpu.peak)
    return {"method": name, "gflop": flops / args.batch / 1e9, "peak_gib": peak / 2**30,
            "operators": round(operators)}  # fmt: skip


def arithmetic(args) -> None:
    """Prints the table of --arithmetic."""
    if not simulated_gpu.AVAILABLE:
        sys.exit("--arithmetic needs a newer torch, for its simulated GPU")
    names = args.methods or [name for name in METHODS if name != "timm"]
    first = {}  # the GFLOP of the methods that others are compared with
    print(f"{args.preset}, batch {args.batch}, bf16, computed with torch {torch.__version__}",
          file=sys.stderr if args.json else None)  # fmt: skip
    for name in names:
        row = count(name, args)
        group = "supervised" if METHODS[name][0] is supervised_mim else "mae"
        if group not in first:
            first[group] = row["gflop"] if name == group else count(group, args)["gflop"]
        row["ratio"] = row["gflop"] / first[group]
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{name:14s} {row['gflop']:8.2f} GFLOP per image {row['ratio']:6.2f} x "
                  f"{group:10s} {row['peak_gib']:6.1f} GiB {row['operators']:6d} operators",
                  flush=True)  # fmt: skip


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
                        help="by default mae and timm; with --arithmetic all")
    parser.add_argument("--arithmetic", action="store_true", help="compute costs; needs no GPU")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        return decode(args.decode, args)
    if args.arithmetic:
        return arithmetic(args)
    args.methods = args.methods or (["mae", "timm"] if TimmBlock else ["mae"])
    device = common.set_up_process(args.device)
    torch.set_float32_matmul_precision("high")  # as in a run
    if args.memory_of:
        return print(peak_memory(args.memory_of, args, device))

    steps = {name: make_step(name, args, device) for name in args.methods}
    rounds, average = args.rounds, statistics.median
    if ADVERSARIAL & set(steps):
        rounds, average = 16, statistics.mean
    times, flops = {name: [] for name in steps}, {}
    for name, step in steps.items():
        if name in ADVERSARIAL:  # the counter's hooks do not bear a gradient of a gradient
            continue
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            step(0)
        flops[name] = counter.get_total_flops()
    for i in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(i)
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
               "beside_first": middle / first, "of_peak": flops.get(name, 0) / middle / peak,
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
