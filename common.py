"""What masked image modelling methods share: ViT, masking, data, the plumbing of a training run.

This file knows MAE and none of the methods beyond it. Copy it together with one script
(mae_perceptual.py, ...) into a project.

    Part 1, what a training step needs     ViT, Decoder, random_masking, masked_mse
                                           TrainLoader: which images, which crops of them
                                           Run: seeds, autocast, accumulation, processes, logs
    Part 2, what is around it              settings and flags · data sets · weights and checkpoints
                                           kNN, validation, pictures

Conventions. Images are (B, C, H, W). Tokens are (B, 1+n, D), the cls token first. `visible` (B, n)
holds the indices of the kept patches; `mask` (B, L) is True where a patch is hidden. Patches run
row by row over the h x w grid. Pixels are in 0..255 until `normalize`, the one place that turns
them into network input, with ImageNet's mean and std.
"""

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm


class UserError(ValueError):
    """A mistake the user can mend: `entry_point` shows it as one line and exits with code 2."""


# ------------------------------------------------------------------------------ ViT and masking


def patch_grid(img_size, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `img_size`, an int or (H, W). UserError if the
    patch does not divide it."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch_size or width % patch_size:
        raise UserError(f"image size {height}x{width} is not divisible by patch size {patch_size}")
    return height // patch_size, width // patch_size


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (L, dim) of an h x w grid, as in MAE: the first half
    of the channels encodes the column, the second the row; each half is [sin, cos] of the
    coordinate times 10000^(-i / (dim/4)). UserError if dim is not divisible by 4."""
    if dim % 4:
        raise UserError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in grid)
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    h, w = grid
    embedding = torch.cat([column.expand(h, w, -1), row[:, None].expand(h, w, -1)], dim=2)
    return embedding.reshape(h * w, dim).float()


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """(1, 1+L, dim), zero for cls. A frozen parameter: it is saved, and can be unfrozen."""
    return nn.Parameter(F.pad(sincos_2d(dim, grid), (0, 0, 1, 0))[None], requires_grad=False)


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C); the order within a patch is row, column, channel."""
    b, c, height, width = imgs.shape
    p, (h, w) = patch_size, patch_grid((height, width), patch_size)
    return imgs.reshape(b, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int], channels=3) -> Tensor:
    """(B, L, p*p*C) -> (B, C, H, W), the inverse of `patchify`."""
    p, (h, w) = patch_size, grid
    x = patches.reshape(-1, h, w, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, h * p, w * p)


def random_masking(batch: int, num_patches: int, mask_ratio: float, device=None, generator=None):
    """Keep a uniformly random int(L * (1 - mask_ratio)) of the L patches of each image.

    Returns visible (B, keep) int64, in random order, and mask (B, L) bool, True = hidden.
    UserError if that would keep no patch or hide none."""
    keep = int(num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if not 0 < keep < num_patches:
        raise UserError(
            f"--mask-ratio {mask_ratio}: some of the {num_patches} patches must stay visible and "
            "some be hidden"
        )
    noise = torch.rand(batch, num_patches, device=device, generator=generator)
    visible = noise.argsort(dim=1)[:, :keep]
    mask = torch.ones(batch, num_patches, dtype=torch.bool, device=device)
    return visible, mask.scatter_(1, visible, False)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D), index (B, n) -> (B, n, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, L, 1) of each patch: unbiased variance, 1e-6 inside the root, as in MAE."""
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return patches.mean(dim=-1, keepdim=True), std


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """MAE's loss: squared error, mean over a patch's pixels, then over hidden patches, in fp32.

    pred, target (B, L, p*p*C); mask (B, L), True = hidden. With `normalize` the target is the patch
    minus its mean, over its std: the loss is in units of a patch's own contrast, not of pixels."""
    pred, target = pred.float(), target.float()
    if normalize:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (pred - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> list[Tensor]:
        """(B, n, D) -> queries, keys and values, each (B, heads, n, D / heads)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return [y.transpose(1, 2) for y in qkv]

    def forward(self, x: Tensor, attend=F.scaled_dot_product_attention) -> Tensor:
        """`attend`: from queries, keys and values to outputs like the queries."""
        return self.proj(attend(*self.heads(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block. In training, each residual branch of an image is dropped with
    probability `drop_path` (stochastic depth)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        layers = dict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, attend=F.scaled_dot_product_attention) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), attend))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation, for `model.apply`: Xavier-uniform linear layers with zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a linear layer on patches, and as one it need not
    touch the hidden ones. The weight keeps the convolution's shape (D, C, p, p), as in timm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:  # (B, n, p*p*C) -> (B, n, D)
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer encoder: parameter names and output of timm's VisionTransformer with
    num_classes=0, initialisation and fixed positions of MAE. `img_size` (int or (H, W)) and
    `patch_size` in pixels."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"width {embed_dim} is not divisible by {num_heads} heads")
        self.settings = dict(  # all that it takes to build this ViT again
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
        )
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = fixed_positions(embed_dim, self.grid)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # grows with depth
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, r) for r in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def embed(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens (B, 1+n, D), positions added, cls first; of the `visible` (B, n) if given."""
        expected = (self.in_chans, *(n * self.patch_size for n in self.grid))
        if imgs.shape[1:] != expected:
            raise UserError(f"this ViT takes images of {expected}, not {tuple(imgs.shape[1:])}")
        patches = patchify(imgs, self.patch_size)
        positions = self.pos_embed[:, 1:].expand(len(imgs), -1, -1)
        if visible is not None:
            patches, positions = take_tokens(patches, visible), take_tokens(positions, visible)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(imgs), -1, -1)
        return torch.cat([cls, x], dim=1)

    def forward(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """imgs (B, C, H, W), visible (B, n) int64 or None -> (B, 1+n, D) after the final norm."""
        x = self.embed(imgs, visible)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: the mask token at hidden positions, transformer blocks, a linear layer to
    pixels, or to `out_dim` numbers. Input width, grid, patch size and channels are those of
    `encoder`."""

    def __init__(self, encoder: ViT, dim: int = 512, depth: int = 8, num_heads: int = 16,
                 out_dim: int | None = None):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"decoder width {dim} is not divisible by {num_heads} heads")
        self.embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = fixed_positions(dim, encoder.grid)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim or encoder.patch_size**2 * encoder.in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_linear)

    def fill_in(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (B, 1+n, D), visible (B, n) -> (B, 1+L, dim): embedded, in their places, the mask
        token in the others, positions added."""
        x = self.embed(tokens)
        b, _, d = x.shape
        full = self.mask_token.to(x.dtype).expand(b, self.pos_embed.shape[1] - 1, d)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, d), x[:, 1:])
        return torch.cat([x[:, :1], full], dim=1) + self.pos_embed

    def decode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, 1+L, dim) with positions -> (B, L, p*p*C)."""
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (B, 1+n, D), visible (B, n) -> (B, L, p*p*C): every patch, visible ones too."""
        return self.decode(self.fill_in(tokens, visible))


# ------------------------------------------------------------------------------ images of a step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
STATISTICS = torch.tensor((MEAN, STD)).view(2, 3, 1, 1)


def normalize(imgs: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255, uint8 or float -> network input, float32."""
    # Small copies are non_blocking: safe, as CUDA takes pageable values at once; and no step waits.
    mean, std = 255 * STATISTICS.to(imgs.device, non_blocking=True)
    return (imgs - mean) / std


def random_seed(*keys: int | str) -> int:
    """One well-mixed seed from several keys, such as ("crop", seed, step)."""
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seeded(*keys: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed(*keys))


@dataclass
class RandomCrop:
    """RandomResizedCrop and flip, as in MAE: the only augmentation, unless a method has its own."""

    size: int
    min_crop: float  # smallest area, as a share of the image

    def __call__(self, imgs: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        boxes = sample_crops(len(imgs), *imgs.shape[2:], (self.min_crop, 1.0))
        return (crop_resize(imgs, boxes, self.size, flip=torch.rand(len(imgs)) < 0.5),)


class Batches(torch.utils.data.Dataset):
    """Makes the batches of a set: for a key (epoch, number, index), the views of these images, then
    their labels.

    augment(imgs (b, 3, H, W) uint8, index (b,)) -> a tuple of views (b, 3, size, size) in 0..255.
    Images in memory go through it all at once, on their device; files, and images in memory if
    `single`, one by one on the CPU, where crops stay uint8. Its random numbers have to come from
    torch's default generator of the CPU, which is seeded for it."""

    def __init__(self, images: "Images", augment, seed: int = 0, single: bool = False):
        self.images, self.augment, self.seed = images, augment, seed
        self.single = single or images.pixels is None

    def __getitem__(self, key: tuple[int, int, list[int]]) -> tuple[Tensor, ...]:
        epoch, number, index = key
        if not self.single:
            torch.default_generator.manual_seed(random_seed("batch", self.seed, epoch, number))
            index = torch.tensor(index)
            pixels = self.images.pixels
            imgs = pixels[index.to(pixels.device, non_blocking=True)]
            return *self.augment(imgs, index), self.images.labels[index]
        rows, labels = [], []
        for i in index:
            torch.default_generator.manual_seed(random_seed("image", self.seed, epoch, i))
            image, label = self.images.read(i)
            rows.append(self.augment(image[None], torch.tensor([i])))
            labels.append(label)
        return *map(torch.cat, zip(*rows, strict=True)), torch.tensor(labels)


class TrainLoader:
    """Shuffled epochs, as micro-batches of normalised images (b, 3, size, size), one tensor for
    each view that `augment` makes (see Batches), and labels (b,). Batches of files, and of images
    in memory if `single`, are made by loader processes: then `augment` has to be picklable.

    A global batch is cut into processes x accumulate micro-batches, and each is the same whoever
    computes it: two processes see what one with --accumulate 2 sees. The incomplete last batch of
    an epoch is left out."""

    def __init__(self, images: "Images", cfg: "TrainConfig", run: "Run", augment, single=False):
        # Not the run, which has this loader: in a circle its processes would end late.
        self.images, self.cfg, self.augment = images, cfg, augment
        self.rank, self.world, self.device = run.rank, run.world, run.device
        parts = run.world * cfg.accumulate
        self.steps, self.micro_batch = len(images) // cfg.batch_size, cfg.batch_size // parts
        if cfg.batch_size % parts:
            raise UserError(
                f"--batch-size {cfg.batch_size} is not divisible by {run.world} processes x "
                f"--accumulate {cfg.accumulate}"
            )
        if self.steps == 0:
            raise UserError(
                f"--batch-size {cfg.batch_size} is more than the {len(images)} images of {cfg.data}"
            )
        self.keys = []  # the DataLoader's sampler is this very list, which each epoch fills anew
        self.loader = data_loader(Batches(images, augment, cfg.seed, single), self.keys, run.device,
                                  cfg.workers, persistent=True)  # fmt: skip

    def batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's micro-batches from global step `step` to the end of its epoch."""
        epoch, first = divmod(step, self.steps)
        order = torch.randperm(len(self.images), generator=seeded("order", self.cfg.seed, epoch))
        shape = self.steps, self.world, self.cfg.accumulate  # axes of an epoch's micro-batches
        order = order[: self.steps * self.cfg.batch_size].view(*shape, self.micro_batch)
        number = torch.arange(math.prod(shape)).view(shape)
        mine = (x[first:, self.rank].flatten(0, 1).tolist() for x in (number, order))
        self.keys[:] = [(epoch, j, index) for j, index in zip(*mine, strict=True)]
        return normalized(self.loader, self.device)


def normalized(batches, device) -> Iterator[tuple[Tensor, ...]]:
    """Views in 0..255 and labels -> network input on the device, and labels."""
    for batch in batches:
        *views, labels = (x.to(device, non_blocking=True) for x in batch)
        yield *map(normalize, views), labels


# ------------------------------------------------------------------------------ the run's loop


def adamw(model: nn.Module, weight_decay: float, lr: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:
    """AdamW of the trainable parameters, by default with MAE's betas, in two groups: weight decay,
    but none for biases and LayerNorm (1-D)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr, betas=betas, fused=True)


def warmup_cosine(step: float, total: float, warmup: float, peak: float, floor=0.0) -> float:
    """Learning rate of a step: linear from 0 to `peak` in `warmup` steps, then half a cosine down
    to `floor` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """One training run: its processes and device, its random numbers, its steps and their logs.

        run.start(loader, val, model=model, optimizer=optimizer)    # resumes
        ddp = run.wrap(model)
        for _ in run.epochs():
            for micro_batches in run.steps():
                run.set_lr(optimizer)
                for imgs, labels in micro_batches:
                    with run.autocast():
                        loss = ...
                    run.backward(loss)
                    run.log(loss=loss)
                run.update(optimizer)
            run.end_epoch(model.encoder)                            # logs, measures, saves
        finish(run)

    No state of a generator is stored: the order of images derives from (seed, epoch), crops from
    (seed, epoch, micro-batch or image), the model's random numbers from (seed, step, micro-batch).
    So a run that was stopped and resumed repeats the uninterrupted one; on the CPU, bit for bit."""

    caught, handlers = 0, {}  # the last signal, to any run of this process; what it did before

    def __init__(self, cfg: "TrainConfig"):
        self.script = Path(inspect.getfile(type(cfg))).name
        self.cfg, self.folder = cfg, Path(cfg.out or f"runs/{Path(self.script).stem}")
        self.found = checkpoints(self.folder)
        self.resumes = bool(self.found) and not cfg.restart
        self.device = set_up_process(cfg.device)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda, self.precision = self.device.type == "cuda", cfg.precision
        if cfg.precision == "auto":
            bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        torch.set_float32_matmul_precision("high")  # fp32 products may use TF32 on a GPU
        torch.manual_seed(random_seed("init", cfg.seed))
        self.step, self.ended, self.lr, self.ddp = 0, 0, 0.0, []  # ended: step of the last end
        self.sums, self.history, self.saved = {}, [], time.monotonic()

    def start(self, loader: TrainLoader, val: "Images | None" = None, **state) -> None:
        """Take the data and everything that has a state (model=, optimizer=, ...). If the folder
        has a checkpoint, `resume` compares its settings, then loads every state, the step and the
        metrics; `epochs` and `steps` go on from that step. Print what is about to happen. From now
        on SIGTERM and Ctrl-C only ask the run to save and stop, after the step."""
        cfg, self.loader, self.state = self.cfg, loader, state
        self.val = val if val and val.classes and loader.images.classes else None
        self.total = cfg.epochs * loader.steps
        self.last_step = min(cfg.steps or self.total, self.total)
        self.warmup = min(cfg.warmup_epochs, cfg.epochs / 5) * loader.steps
        self.peak_lr = cfg.base_lr * cfg.batch_size / 256 if cfg.lr is None else cfg.lr
        open_folder(self)
        announce(self)
        catch_signals(self)

    def wrap(self, model: nn.Module, compile: bool = True) -> nn.Module:
        """The model to call in the loop: compiled in place if --compile says so and `compile` does
        not forbid it, gradients averaged over processes. Buffers stay those of each process, so
        that the model may be called twice before a backward pass."""
        if self.cfg.compile and compile:
            model.compile()  # in place, so that the names in state_dict stay clean
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        model.broadcast_buffers = False  # the argument is deprecated since torch 2.15
        self.ddp.append(model)
        return model

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do, counted from 1. One that was stopped after its last step
        has no steps any more, but its end."""
        while self.step < self.last_step or self.ended < self.step:
            self.epoch = self.ended // self.loader.steps + 1
            yield self.epoch

    def steps(self) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """The epoch's steps that are still to do; each is an iterator over its micro-batches."""
        first, end = self.step, min(self.epoch * self.loader.steps, self.last_step)
        batches, begin, self.waited = self.loader.batches(first), time.perf_counter(), 0.0
        title, told, look = f"epoch {self.epoch}/{self.cfg.epochs}", begin, first + 1
        with tqdm(total=end - first, desc=title, disable=True if self.rank > 0 else None) as bar:
            while self.step < end:
                yield self._micro_batches(batches)
                self.step += 1
                bar.update()
                urgent = self.caught and self.world == 1
                if not urgent and self.step not in (look, end):
                    continue
                means, now = self._read_means(), time.perf_counter()
                images = (self.step - first) * self.cfg.batch_size
                self.speed = {"images_per_s": round(images / (now - begin), 1),
                              "data_wait": round(self.waited / (now - begin), 4)}  # fmt: skip
                values = dict(loss=f"{means['loss']:.4f}", lr=f"{self.lr:.2e}", **self.speed)
                bar.set_postfix(values)
                if bar.disable and now - told > 60:  # a sign of life in a log file
                    told, text = now, "  ".join(f"{k} {x}" for k, x in values.items())
                    self.print(f"{title}  step {self.step}  {text}")
                look = self.step + save_or_stop(self, end, (now - begin) / (self.step - first))

    def _micro_batches(self, batches: Iterator) -> Iterator[tuple[Tensor, ...]]:
        for micro in range(self.cfg.accumulate):
            begin = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            number = self.rank * self.cfg.accumulate + micro
            torch.manual_seed(random_seed("model", self.cfg.seed, self.step, number))
            for model in self.ddp:  # processes exchange gradients once a step
                model.require_backward_grad_sync = micro == self.cfg.accumulate - 1
            yield batch

    def set_lr(self, optimizer, floor: float = 0.0, lr: float | None = None) -> None:
        """This step's learning rate, times a group's own "lr_scale" if it has one: warm-up and
        cosine, or `lr`."""
        schedule = warmup_cosine(self.step, self.total, self.warmup, self.peak_lr, floor)
        self.lr = schedule if lr is None else lr
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def autocast(self):
        """Around forward passes and losses: --precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor, **options) -> None:
        self.scaler.scale(loss / self.cfg.accumulate).backward(**options)

    def update(self, *optimizers, norms: tuple[str, ...] = ("grad_norm",)) -> None:
        """Clip, step, and clear the gradients. `norms`: a name for each optimiser, under which the
        norm of its gradients before clipping is logged. Where fp16 overflows, the scaler leaves the
        step out; of these, the share is logged as `skipped`, and the norm as 0."""
        for optimizer, name in zip(optimizers, norms, strict=True):
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.cfg.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip_grad, norm)
            if self.scaler.is_enabled():
                self.log(skipped=~norm.isfinite())
                norm = norm.nan_to_num(0, 0)
            self.log(**{name: norm})
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def log(self, **values: Tensor) -> None:
        """Scalars of a micro-batch or step, among them `loss`; metrics.jsonl has their means over
        the epoch and all processes. A value need not come in every step."""
        for name, x in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + x.detach().double(), count + 1

    def _read_means(self) -> dict[str, float]:
        """Means of this epoch so far, of all processes, which then have the same sums. UserError if
        one is not finite: training has failed."""
        totals, counts = zip(*self.sums.values(), strict=True)
        totals = mean_over_processes(torch.stack(totals))
        self.sums = dict(zip(self.sums, zip(totals, counts, strict=True), strict=True))
        means = {k: x / n for k, x, n in zip(self.sums, totals.tolist(), counts, strict=True)}
        if not all(map(math.isfinite, means.values())):
            raise not_finite(self, means)
        return means

    def due(self, every: int) -> bool:
        """At an epoch's end: is it the turn of what is done every so many epochs and at the end?"""
        return every > 0 and (self.step >= self.last_step or self.epoch % every == 0)

    def end_epoch(self, encoder: ViT | None = None, picture=None, **results: float) -> None:
        """Log the epoch, with `results` if any; measure kNN and draw the picture if they are due;
        save the checkpoint and the encoder. `picture()` gives the rows of `save_grid`."""
        metrics = {"epoch": self.epoch, "step": self.step, **self._read_means()}
        metrics |= {"lr": self.lr, **self.speed, **results}
        if self.val is not None and self.due(self.cfg.knn_every):
            metrics |= knn_monitor(self, encoder)
        self.history.append(metrics)
        self.ended = self.step
        if self.step == self.epoch * self.loader.steps:  # not stopped in its middle by --steps
            self.sums = {}
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        self.print("  ".join(words))
        if picture and self.rank == 0 and self.due(self.cfg.recon_every):
            torch.manual_seed(random_seed("picture", self.cfg.seed))  # always the same masks
            save_grid(self.folder / f"recon_{self.epoch:04d}.png", picture())
        save(self, encoder)  # last, so that whatever a kill leaves undone is done again

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


# ==============================================================================================
# A reader of a method may stop here. Part 2: settings, data sets, weights, the run's folder,
# kNN and validation, pictures.
# ==============================================================================================

# ------------------------------------------------------------------------------ settings

VIT_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


@dataclass
class TrainConfig:
    """Settings of any training run. A trailing comment is the flag's --help text."""

    data: str = "shapes"  # shapes, cifar10, cifar100, stl10, or a folder (train/ + val/, or any)
    data_dir: str = "data"  # where cifar10, cifar100 and stl10 are downloaded to
    min_crop: float = 0.2  # smallest area of a random crop, as a share of the image
    epochs: int = 10  # length of the schedule: the learning rate has run out after so many
    steps: int | None = None  # stop after so many steps, all files written; rerun to go on
    batch_size: int = 256  # images per optimiser step, over all processes and accumulations
    accumulate: int = 1  # micro-batches per step and process; raise it when memory runs out
    base_lr: float = 1.5e-4  # learning rate per 256 images: lr = base_lr * batch_size / 256
    lr: float | None = None  # the peak learning rate itself; overrides --base-lr
    warmup_epochs: float = 1.0  # linear warm-up; never more than a fifth of --epochs
    weight_decay: float = 0.05  # decoupled, on matrices only
    clip_grad: float | None = None  # largest gradient norm; try 1 if the loss jumps
    out: str | None = None  # run folder; by default runs/<script>-<preset>
    save_minutes: float = 15.0  # save within an epoch, too, after so many minutes
    restart: bool = False  # delete the run that the folder holds and start over
    workers: int | None = None  # that decode images; by default cores / processes, at most 10
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, else fp32
    compile: bool = False  # torch.compile: a slow first step, then faster; for long runs on a GPU
    seed: int = 0  # of everything random

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        check_numbers(self, 1, "epochs", "steps", "batch_size", "accumulate")
        check_numbers(self, 0, "workers", "seed", "weight_decay", "warmup_epochs", "save_minutes")
        check_numbers(self, 1e-30, "base_lr", "lr", "clip_grad")
        if self.out and self.data not in (None, "shapes", *DOWNLOADED):
            root, out = Path(self.data).resolve(), Path(self.out).resolve()
            read = [root / "train", root / "val"] if (root / "train").is_dir() else [root]
            if out == root or any(out.is_relative_to(folder) for folder in read):
                raise UserError(f"--out {self.out} is where the images of --data {self.data} are; "
                                "choose a folder of its own")  # fmt: skip
        if not 0 < self.min_crop <= 1:
            raise UserError(f"--min-crop must be above 0 and at most 1, not {self.min_crop}")


@dataclass
class Config(TrainConfig):
    """Settings of every pre-training method."""

    img_size: int = 32  # side of the training crops in pixels; a multiple of the patch size
    patch_size: int = 4  # side of a patch in pixels: 16 at 224 px, 4 at 32 px
    size: Literal["tiny", "small", "base", "large", "huge"] = "tiny"  # of the ViT
    depth: int | None = None  # encoder blocks, if not those of --size; fewer is faster
    mask_ratio: float = 0.75  # share of hidden patches
    init_from: str | None = None  # start from an encoder.pt, checkpoint.pt, timm or MAE file
    knn_every: int = 0  # kNN accuracy every so many epochs and at the end; 0 is never
    recon_every: int = 10  # reconstruction picture every so many epochs and at the end

    def check(self) -> None:
        super().check()
        check_numbers(self, 1, "img_size", "patch_size", "depth", "recon_every")
        check_numbers(self, 0, "knn_every")
        random_masking(1, math.prod(patch_grid(self.img_size, self.patch_size)), self.mask_ratio)

    def vit(self) -> ViT:
        """A fresh encoder of these settings."""
        shape = VIT_SIZES[self.size] | ({"depth": self.depth} if self.depth else {})
        return ViT(self.img_size, self.patch_size, **shape)


# A resumed run may change these: they say where and how it runs, not what it computes. (Compared
# are: the product of `accumulate` and the number of processes, although means of an epoch that was
# stopped give its parts other weights if the one changes for the other; of `data`, what is in it.)
RESUMABLE = {"out", "restart", "steps", "save_minutes", "data", "data_dir", "init_from",
             "tokenizer", "workers", "device", "compile", "accumulate", "knn_every", "recon_every",
             "val_every"}


def check_numbers(cfg, least: float, *names: str) -> None:
    """UserError unless each named field is None or a finite number >= `least`."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not least <= value < math.inf:
            limit = f"at least {least}" if least in (0, 1) else "above 0"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


@functools.cache  # inspect takes 50 ms a class
def trailing_comments(config_class: type) -> dict[str, str]:
    """Of the fields of a dataclass and its parents, by name."""
    sources = map(inspect.getsource, reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", "\n".join(sources), re.MULTILINE))


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> checked Config. Flags are the dataclass's fields, their help the trailing
    comments; a field without default is positional. --preset, by default the first, changes the
    defaults of the others. A mistake ends the program with one line and exit code 2."""
    script = Path(inspect.getfile(config_class)).stem
    parser = argparse.ArgumentParser(
        prog=f"{script}.py", description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda text: parser.exit(2, f"{script}.py: error: {text} (see --help)\n")
    if presets:
        parser.add_argument("--preset", choices=presets, help="defaults for all other flags")
    comments, hints = trailing_comments(config_class), typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        text = comments[field.name].replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, help=text)
            continue
        defaults = {name: preset.get(field.name, field.default) for name, preset in presets.items()}
        different = set(defaults.values()) or {field.default}
        if len(different) > 1:
            text += f" [{', '.join(f'{name} {value}' for name, value in defaults.items())}]"
        elif different != {None}:
            text += f" [{different.pop()}]"
        kind = hints[field.name]
        if type(None) in typing.get_args(kind):
            kind, _ = typing.get_args(kind)  # of X | None
        options = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    values = vars(parser.parse_args(argv))
    preset = values.pop("preset", next(iter(presets), None))
    if "base_lr" in values:  # overrides a preset's lr, as --lr does its base_lr
        values = {"lr": None} | values
    cfg = config_class(**presets.get(preset, {}) | values)
    if preset and not cfg.out:
        cfg.out = f"runs/{script}-{preset}"
    try:
        cfg.check()
    except UserError as error:
        parser.error(str(error))
    return cfg


def entry_point(main):
    """Decorator of a script's main(cfg): a UserError becomes one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(cfg):
        try:
            main(cfg)
        except UserError as error:
            text = str(error).strip().splitlines()[-1]  # of a loader's worker: a whole traceback
            text = text.removeprefix("common.UserError: ")
            print(f"error: {text}", file=sys.stderr, flush=True)
            sys.exit(2)
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            reason = str(error).splitlines()[0]
            print(f"error: lost the other processes ({reason}); run the same command again to go "
                  "on", file=sys.stderr, flush=True)  # fmt: skip
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
            sys.exit(130)
        finally:
            while Run.handlers:
                signal.signal(*Run.handlers.popitem())
            Run.caught = 0
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ------------------------------------------------------------------------------ data sets

DOWNLOADED = ("cifar10", "cifar100", "stl10")  # torchvision's
RESIDENT_BYTES = 4 << 30  # each process keeps equally sized images up to this total on its device
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
BICUBIC = v2.InterpolationMode.BICUBIC
SHAPES = ("disk", "ring", "square", "triangle", "star",
          "cross", "crescent", "bar", "heart", "corner")  # fmt: skip


def data_loader(batches: Batches, keys: list, device, workers: int | None, persistent=False):
    """A DataLoader of the batches with these keys. Images that are made one by one are made by
    `workers` processes: by default one a core, at most 10; all of torchrun's share the cores."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = max(1, min(10, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    workers = workers if batches.single else 0
    outlive = functools.partial(outlive_signals, run_over(), os.getpid()) if workers else None
    return torch.utils.data.DataLoader(
        batches, sampler=keys, batch_size=None, num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=batches.single and torch.device(device).type == "cuda",
        worker_init_fn=outlive,
    )  # fmt: skip


def outlive_signals(over: Tensor, parent: int, worker: int) -> None:
    """A signal that all processes get leaves a loader's in place, for the run has to save first; in
    the end they are sent one more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over or os.getppid() != parent else 0)


@functools.cache
def run_over() -> Tensor:
    """Shared with loader processes: becomes True when this process ends, however it does."""
    over = torch.zeros((), dtype=torch.bool).share_memory_()
    Finalize(None, over.fill_, (True,), exitpriority=0)
    return over


class Images:
    """One split of a data set: `labels` (N,) int64, -1 where unknown; `classes`, their names, empty
    without labels; and either `pixels` (N, 3, H, W) uint8 on the training device, or `paths`."""

    def __init__(self, labels: Tensor, classes: list[str], pixels=None, paths=()):
        self.labels, self.classes, self.pixels = labels, classes, pixels
        # Bytes in one array: of a million objects, each loader worker would soon have its own copy.
        self.paths = np.array([os.fsencode(path) for path in paths])
        # Shared with loader workers, so that a broken file is named once and not tried again.
        self.unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image (3, H, W) uint8 and label. The next readable file stands in for an unreadable one,
        so that batches keep their size."""
        if self.pixels is not None:
            return self.pixels[index], int(self.labels[index])
        for i in itertools.chain(range(index, len(self)), range(index)):
            if not self.unreadable[i]:
                if (image := read_image(os.fsdecode(self.paths[i]))) is not None:
                    return torch.from_numpy(image), int(self.labels[i])
                self.unreadable[i] = True
        raise UserError(f"none of the {len(self)} images can be read any more")


def read_image(path: str) -> np.ndarray | None:
    """RGB (3, H, W) uint8, the first frame as it is stored: like torchvision, not turned by EXIF.
    None, with a warning that names the file, if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # convert() would clip 16 bits, not scale them
                deep = np.asarray(image)
                if image.mode == "F" or deep.min() < 0 or deep.max() >= 1 << 16:
                    raise ValueError("no range is agreed on for 32 bits a pixel")
                image = Image.fromarray((deep // 256).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
            return np.array(image).transpose(2, 0, 1)
    except Exception as error:  # damaged files make decoders raise anything, even SyntaxError
        print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr, flush=True)
        return None


def load_images(name: str, split: str, size: int, data_dir="data", device="cpu") -> Images | None:
    """A split of a data set: "pretrain" (all images for training without labels), "train" or "val";
    None where a folder has no such split. `name`: shapes, drawn at size x size; cifar10, cifar100,
    stl10, downloaded to `data_dir`; or a folder, with train/ and val/ and class folders in them, or
    any tree of images without labels."""
    if name == "shapes":
        count, seed = (4000, 1) if split == "val" else (20000, 0)
        pixels, labels = draw_shapes(count, size, seed)
        return Images(labels, list(SHAPES), pixels.to(device))
    if name in DOWNLOADED:
        return torchvision_images(name, split, data_dir, device)
    return folder_images(name, split, device)


def pretraining_images(cfg: Config, device) -> tuple[Images, Images | None]:
    """Training images and, if the data set has any, validation images."""
    splits = ("pretrain", "val")
    return tuple(load_images(cfg.data, s, cfg.img_size, cfg.data_dir, device) for s in splits)


def torchvision_images(name: str, split: str, data_dir, device) -> Images:
    part, stl10 = {"train": split != "val"}, name == "stl10"
    if stl10:
        parts = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}
        part = {"split": parts[split]}
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        dist.barrier()  # the first process downloads, then the others read
    try:
        data = getattr(torchvision.datasets, name.upper())(data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download {name} to {data_dir}: {error}") from error
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    pixels = torch.from_numpy(data.data if stl10 else data.data.transpose(0, 3, 1, 2))
    labels = torch.as_tensor(data.labels if stl10 else data.targets, dtype=torch.int64)
    return Images(labels, list(data.classes), pixels.contiguous().to(device))


def folder_images(name: str, split: str, device) -> Images | None:
    root = Path(name)
    if not name or not root.is_dir():
        raise UserError(f"--data {name}: no such folder, nor shapes, cifar10, cifar100 or stl10")
    has_splits = (root / "train").is_dir()
    folder = root / ("val" if split == "val" else "train") if has_splits else root
    if not folder.is_dir() or (split == "val" and not has_splits):
        return None
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent)
        files = (x for x in files if os.path.splitext(x)[1].lower() in IMAGE_SUFFIXES)
        paths += [os.path.join(parent, file) for file in files]
        above = {x.resolve() for x in (here, *here.absolute().parents)}  # a link there is a circle
        folders[:] = [x for x in folders if (here / x).resolve() not in above]
    paths.sort(key=lambda path: path.replace(os.sep, "\0"))  # folder by folder
    if not paths:
        raise UserError(f"no images under {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    start = len(os.path.join(folder, ""))
    names = [path[start:].split(os.sep)[0] for path in paths]  # of class folders, if any
    if (annotations := folder / "val_annotations.txt").is_file():  # Tiny-ImageNet's val/
        lines = (line.split("\t") for line in annotations.read_text().splitlines())
        class_of = {name: class_name for name, class_name, *_ in lines}
        names = [class_of.get(os.path.basename(path)) for path in paths]
    classes, labels = [], torch.full((len(paths),), -1)
    if has_splits:
        classes = sorted(entry.name for entry in (root / "train").iterdir()
                         if entry.is_dir() and entry.name[0] != ".")  # fmt: skip
    if classes:
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number.get(name, -1) for name in names])
        if (labels < 0).any():
            raise UserError(
                f"{paths[labels.argmin()]} is in none of the {len(classes)} class folders that "
                f"{root / 'train'} has"
            )
    images = Images(labels, classes, paths=paths)
    return decode_all(images, folder, device) or images


def decode_all(images: Images, folder: Path, device) -> Images | None:
    """The same images in memory, less the unreadable; None if they differ in size or are many."""
    pixels = None
    quiet = True if int(os.environ.get("RANK", 0)) > 0 else None  # None: only on a terminal
    for i, path in enumerate(tqdm(images.paths, f"reading {folder}", leave=False, disable=quiet)):
        if (image := read_image(os.fsdecode(path))) is None:
            images.unreadable[i] = True
            continue
        if pixels is None and len(images) * image.nbytes <= RESIDENT_BYTES:
            pixels = np.empty((len(images), *image.shape), np.uint8)  # faster to fill than a tensor
        if pixels is None or image.shape != pixels.shape[1:]:
            return None
        pixels[i] = image
    if pixels is None:
        raise UserError(f"none of the {len(images)} images under {folder} could be read")
    keep, pixels = ~images.unreadable, torch.from_numpy(pixels)
    if not keep.all():
        print(f"left out {int((~keep).sum())} unreadable of {len(keep)} images", file=sys.stderr)
        pixels = pixels[keep]
    return Images(images.labels[keep], images.classes, pixels.to(device))


def draw_shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Procedural images (count, 3, size, size) uint8 and classes (count,), indices into SHAPES.

    One shape each, on a textured ground. Its place, size, tilt, colours and both textures are
    random and independent of the class: only the outline tells it."""
    generator = seeded("shapes", seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    numbers = torch.rand(count, 23, generator=generator)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    chunk = max(1, (1 << 19) // size**2)  # as many as the processor's cache holds
    for kind, name in enumerate(SHAPES):
        for index in (labels == kind).nonzero()[:, 0].split(chunk):
            picture = _draw(name, x, y, numbers[index, :, None, None], pixel=2 / size)
            images[index] = picture.mul_(255).round_().to(torch.uint8)
    return images, labels


def _draw(name: str, x: Tensor, y: Tensor, r: Tensor, pixel: float) -> Tensor:
    """x, y (S, S) in -1..1, r (n, 23, 1, 1) uniform in 0..1 -> (n, 3, S, S) in 0..1."""
    radius, tilt = 0.7 + 0.3 * r[:, 0], r[:, 1] - 0.5  # tilt up to 29 degrees either way
    dx, dy = (x + 0.3 * (r[:, 2] - 0.5)) / radius, (y + 0.3 * (r[:, 3] - 0.5)) / radius
    u, v = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
    a, b, length = u.abs(), v.abs(), (u * u + v * v).sqrt()
    top, low = torch.maximum, torch.minimum
    outside = {  # about the distance to the outline, in radii, negative inside
        "disk": lambda: length - 0.85,
        "ring": lambda: (length - 0.72).abs() - 0.22,
        "square": lambda: top(a, b) - 0.75,
        "triangle": lambda: top(v, a * 0.866 - v * 0.5) - 0.5,
        "star": lambda: length - 0.68 - 0.32 * torch.sin(5 * torch.atan2(v, u)),
        "cross": lambda: low(top(a - 0.95, b - 0.3), top(b - 0.95, a - 0.3)),
        "crescent": lambda: top(length - 0.9, 0.75 - ((u - 0.5) ** 2 + v * v).sqrt()),
        "bar": lambda: top(a - 1.0, b - 0.32),
        "heart": lambda: (u * u + (v + 0.15 - 0.75 * a.sqrt()) ** 2).sqrt() - 0.8,
        "corner": lambda: top(top(a, b) - 0.8, low(u, v) + 0.15),
    }[name]()
    cover = (0.5 - outside * radius / pixel).clamp_(0, 1)[:, None]  # one pixel of anti-aliasing
    dark, bright = 0.35 + 0.25 * r[:, 4:5], 0.8 + 0.2 * r[:, 4:5]
    inverted = r[:, 5:6] > 0.5  # half of the shapes are darker than their ground
    hue = r[:, 6:7]
    ground = _paint(x, y, hue, torch.where(inverted, bright, dark), r[:, 7:15])
    front = 0.3 + 0.4 * r[:, 22:23] + hue
    shape = _paint(x, y, front, torch.where(inverted, dark, bright), r[:, 14:22])
    return torch.lerp(ground, shape, cover)


def _paint(x: Tensor, y: Tensor, hue: Tensor, value: Tensor, t: Tensor) -> Tensor:
    """Two related colours mixed by a texture: stripes, plaids or slow gradients, soft or sharp."""
    (k1, k2), (p1, p2) = (9 * t[:, i] ** 2 for i in (0, 1)), (6.28 * t[:, i] for i in (2, 3))
    wave = torch.sin(k1 * (x * p1.cos() + y * p1.sin()) + 6.28 * t[:, 4])
    second = torch.sin(k2 * (x * p2.cos() + y * p2.sin()) + 6.28 * t[:, 5])
    mix = torch.sigmoid((1 + 5 * t[:, 7]) * (wave + (t[:, 6] > 0.5) * second))[:, None]
    phase = torch.arange(3).view(3, 1, 1) / 3
    one, two = (0.5 + 0.5 * torch.cos(6.28 * (hue + shift + phase)) for shift in (0.0, 0.12))
    return torch.lerp(one * value, 0.25 + 0.6 * two * value, mix)


# ------------------------------------------------------------------------------ crops


def crop_sizes(count: int, height: int, width: int, scale, ratio=(3 / 4, 4 / 3)):
    """Sizes h, w (count,) int64 of RandomResizedCrop, and fits (count,) bool: area uniform in
    `scale`, aspect log-uniform in `ratio`, the first of 10 tries that fits into the image. Where
    none does, the largest size within `ratio`, whose place is the middle."""
    u = torch.rand(2, count, 10)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fit = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    fits, first = fit.any(dim=1), fit.int().argmax(dim=1, keepdim=True)
    h = torch.where(fits, h.gather(1, first)[:, 0], min(height, round(width / ratio[0])))
    w = torch.where(fits, w.gather(1, first)[:, 0], min(width, round(height * ratio[1])))
    return h, w, fits


def sample_crops(count: int, height: int, width: int, scale) -> Tensor:
    """RandomResizedCrop boxes (count, 4) int64: top, left, h, w in pixels."""
    h, w, fits = crop_sizes(count, height, width, scale)
    top, left = (
        torch.where(fits, torch.rand(count) * (room + 1), room / 2).long()
        for room in (height - h, width - w)
    )
    return torch.stack([top, left, h, w], dim=1)


def crop_resize(imgs: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """imgs (B, C, H, W) in 0..255, boxes (B, 4) as from `sample_crops`, flip (B,) bool: mirror
    left-right -> (B, C, size, size) in 0..255: bicubic, anti-aliased, nothing outside a box seen.

    A batch is resampled at once, wherever it is: that is linear and separable, hence one matrix per
    image and axis. One image, as in a loader's worker, is left to torch, which rounds and clips
    uint8 after each axis, as Pillow does."""
    if len(imgs) == 1 and imgs.device.type == "cpu":
        top, left, h, w = boxes[0].tolist()
        crop = imgs[:, :, top : top + h, left : left + w]
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
        return crop.flip(3) if flip is not None and flip[0] else crop
    (b, c, height, width), boxes = imgs.shape, boxes.to(imgs.device, non_blocking=True)
    rows = bicubic_matrix(boxes[:, 0], boxes[:, 2], height, size)
    columns = bicubic_matrix(boxes[:, 1], boxes[:, 3], width, size)
    if flip is not None:
        flip = flip.to(imgs.device, non_blocking=True)[:, None, None]
        columns = torch.where(flip, columns.flip(1), columns)
    x = torch.bmm(imgs.float().view(b, c * height, width), columns.mT)
    x = x.view(b, c, height, size).transpose(1, 2).reshape(b, height, c * size)
    return torch.bmm(rows, x).view(b, size, c, size).transpose(1, 2).clamp_(0, 255)


def bicubic_matrix(start: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """Start and length (B,) of a crop -> weights (B, n_out, n_in) of Keys' cubic with a = -1/2,
    widened when it shrinks, cut off at the crop's edges."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / n_out
    centre = start + (torch.arange(n_out, device=start.device) + 0.5)[:, None] * scale
    pixel = torch.arange(n_in, device=start.device)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (pixel >= start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


@dataclass
class CentreCrop:
    """The test crop: shorter side to size * 256/224, bicubic, then the central size x size; images
    of just that size stay whole."""

    size: int

    def __call__(self, imgs: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        if tuple(imgs.shape[2:]) != (self.size, self.size):
            imgs = v2.functional.resize(imgs, [self.size * 256 // 224], interpolation=BICUBIC)
            imgs = v2.functional.center_crop(imgs, [self.size])
        return (imgs,)


def evenly_spaced(images: Images, limit: int | None) -> Tensor:
    """Indices of all images or of at most `limit`, in order: labelled ones, if there are any."""
    known = (images.labels >= 0).nonzero()[:, 0]
    index = known if limit and len(known) else torch.arange(len(images))
    limit = min(limit or len(index), len(index))
    return index[torch.linspace(0, len(index) - 1, limit, dtype=torch.float64).long()]


def eval_batches(images: Images, size: int, device, limit: int | None = None,
                 workers: int | None = 0, share=True, view=None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised images (b, 3, size, size) and labels (b,), in order, by `view`, which is
    CentreCrop(size) unless given; see `evenly_spaced` for `limit`. With several processes each gets
    its `share`; `gather_rows` brings results together."""
    index = evenly_spaced(images, limit)
    if share and dist.is_initialized():
        index = index[dist.get_rank() :: dist.get_world_size()]
    if not len(index):  # fewer images than processes
        yield torch.empty(0, 3, size, size, device=device), torch.empty(0, device=device).long()
        return
    keys = [(0, i, part.tolist()) for i, part in enumerate(index.split(250))]
    batches = Batches(images, view or CentreCrop(size))
    yield from normalized(data_loader(batches, keys, device, workers), device)


def example_images(images: Images, size: int, device, count: int = 8, view=None) -> Tensor:
    """(count, 3, size, size), normalised: the same ones every time, for pictures."""
    return next(eval_batches(images, size, device, limit=count, share=False, view=view))[0]


# ------------------------------------------------------------------------------ weights

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"


def read_checkpoint(path) -> dict:
    """torch.load of tensors and primitives, on the CPU. UserError if that cannot be done."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it, such as encoder.pt") from None
    except Exception:  # of many types: zip, pickle, storage
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def load_weights(path) -> tuple[dict[str, Tensor], dict]:
    """The weights of a file as "encoder.…", "decoder.…" and others, and the settings of its ViT:
    our encoder.pt or checkpoint.pt, or the flat layout of timm and of the published MAE files, of
    which a classification head is ignored."""
    loaded = read_checkpoint(path)
    try:
        weights = {str(name): x for name, x in loaded.get("model", loaded).items()}
        if not any(name.startswith("encoder.") for name in weights):
            weights = {our_name(k): x for k, x in weights.items() if not k.startswith("head.")}
        dim, in_chans, patch_size, _ = weights["encoder.patch_embed.proj.weight"].shape
        _, tokens, _ = weights["encoder.pos_embed"].shape
    except (KeyError, ValueError, AttributeError):
        raise UserError(
            f"{path} holds no ViT: patch_embed or pos_embed is missing or misshapen"
        ) from None
    if isinstance(loaded.get("vit"), dict):
        return weights, loaded["vit"]
    heads = {size["embed_dim"]: size["num_heads"] for size in VIT_SIZES.values()}
    side = math.isqrt(tokens - 1)  # such files do not say: a square grid
    return weights, dict(
        img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=dim,
        depth=len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}),
        num_heads=heads.get(dim, dim // 64),
    )


def our_name(name: str) -> str:
    """"decoder.…" or "encoder.…", of a name in the flat layout of timm and the published MAE."""
    if name == "mask_token" or name.startswith("decoder_"):
        return f"decoder.{name.removeprefix('decoder_')}"
    return f"encoder.{name}"


def weights_of(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of one module, without its name."""
    return {k.removeprefix(f"{name}."): x for k, x in weights.items() if k.startswith(f"{name}.")}


def load_strictly(target, state: dict, path) -> None:
    """load_state_dict of a module or optimiser; its complaint, with every missing, unexpected and
    misshapen key, becomes a UserError of one line."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None


def load_encoder(path, drop_path: float = 0.0) -> ViT:
    """The ViT of our encoder.pt or checkpoint.pt, or of a flat timm or published MAE file, whose
    decoder is ignored. UserError that lists every missing, unexpected or misshapen key."""
    weights, settings = load_weights(path)
    try:
        encoder = ViT(**settings, drop_path=drop_path)
    except TypeError as error:
        raise UserError(f"{path} does not describe a ViT: {error}") from None
    load_strictly(encoder, weights_of("encoder", weights), path)
    return encoder


def save_encoder(path: Path, encoder: ViT, config: dict) -> None:
    """encoder.pt: weights under timm's names, the numbers that rebuild the ViT, the settings."""
    content = {"model": encoder.state_dict(), "vit": encoder.settings, "config": config}
    write_atomically(path, lambda file: torch.save(content, file))


def init_from(path, model: nn.Module) -> set[str]:
    """Load a file's weights into the modules (.encoder, .decoder, ...) that it and the model both
    have; all keys of these must fit. Says, and returns, which of the model's it lacks."""
    weights, missing = load_weights(path)[0], set()
    for name, module in model.named_children():
        if found := weights_of(name, weights):
            load_strictly(module, found, f"{path}: its {name}")
        else:
            missing.add(name)
    if missing:
        names = ", ".join(sorted(missing))
        print(f"{path} has no {names}: as at the start of a new run", file=sys.stderr)
    return missing


# ------------------------------------------------------------------------------ processes


def set_up_process(name: str) -> torch.device:
    """The device of this process for --device auto, cpu or cuda. Under torchrun, joins the rest."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable CUDA device here; --device cpu works everywhere")
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of all processes' x."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            for x in (norm.running_mean, norm.running_var):
                x.copy_(mean_over_processes(x))


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes, by rank; their numbers may differ. No gradient."""
    if not dist.is_initialized():
        return x
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(x))
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, max(counts) - len(x)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


# ------------------------------------------------------------------------------ the run's folder


def checkpoints(folder: Path) -> list[Path]:
    """Those that the folder holds, the newest first."""
    return [folder / name for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()]


def open_folder(run: Run) -> None:
    """Go on from the folder's checkpoint, if there is one; with --restart, delete it and the rest
    of the run, but not what a flag names. UserError if the checkpoint is of another run or damaged,
    or the folder in use or not to be written to."""
    cfg, folder, images = run.cfg, run.folder, run.loader.images
    named = {Path(x).resolve() for x in vars(cfg).values() if isinstance(x, str)}  # by a flag
    run.identity = dataclasses.asdict(cfg) | {  # what a run has in common with one it resumes
        "precision": run.precision, "images": len(images),
        "class names (checksum)": zlib.crc32(os.fsencode("/".join(images.classes))),
        "processes x accumulate": run.world * cfg.accumulate,
    }  # fmt: skip
    if run.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.lock = lock(folder)  # held as long as the run
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is training there") from None
        except OSError as error:
            raise UserError(f"--out {folder}: {error}") from error
        if checkpoints(folder) != run.found:
            raise UserError(f"--out {folder}: another process has trained there just now")
    if run.resumes:
        resume(run)
    if run.world > 1:
        dist.barrier()  # nobody writes before all have read
    if run.rank == 0:
        patterns = ("*.pt", "*.json", "*.jsonl", "*_[0-9][0-9][0-9][0-9].png")
        for pattern in patterns if run.found and cfg.restart else ():
            for path in folder.glob(pattern):
                if path.resolve() not in named:
                    path.unlink()
        write_text(folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")


def lock(folder: Path):
    """A file in the folder that is locked for this process while it is open, where the system has
    locks. BlockingIOError if another process holds it."""
    file = open(folder / ".lock", "w")
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # file systems without locks
        pass
    return file


def read_newest(found: list[Path]) -> dict:
    """The first of the checkpoints `found`. UserError if it is damaged."""
    try:
        return read_checkpoint(found[0])
    except UserError as error:
        older = f"delete it to go on from {found[1].name}, or " if found[1:] else ""
        raise UserError(f"{error}; {older}start over with --restart") from None


def resume(run: Run) -> None:
    """Take every state from the run's newest checkpoint, if it is of the same run."""
    path, saved = run.found[0], read_newest(run.found)
    if saved.get("script") != run.script:
        author = saved.get("script", "another program")
        raise UserError(f"{path} is by {author}, not {run.script}; choose another --out")
    if not {"identity", "history", "sums", "speed"} <= saved.keys():
        raise UserError(f"{path} is by another version of {run.script}; use another --out")
    new, old = run.identity, saved["identity"]
    differ = [k for k in new | old if k not in RESUMABLE and new.get(k) != old.get(k)]
    if differ:
        changes = ", ".join(f"{k} was {old.get(k)}, now {new.get(k)}" for k in differ)
        raise UserError(f"{path} has other settings: {changes}; use another --out or --restart")
    for k in ("data", "init_from", "tokenizer"):  # may have moved
        if new.get(k) and old.get(k) != new[k]:
            run.print(f"{k} was {old.get(k)}, now {new.get(k)}: taken to be the same")
    for name, target in (run.state | {"scaler": run.scaler}).items():
        load_strictly(target, saved.get(name), path)
    run.step, run.ended, run.lr, run.speed = (saved[k] for k in ("step", "ended", "lr", "speed"))
    # Without an epoch that --steps left unfinished.
    run.history = saved["history"][: run.ended // run.loader.steps]
    run.sums = {name: (torch.tensor(total, dtype=torch.float64, device=run.device), count)
                for name, (total, count) in saved["sums"].items()}  # fmt: skip


def announce(run: Run) -> None:
    """Print what is about to happen."""
    cfg, loader, cuda = run.cfg, run.loader, run.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)"
    count = sum(p.numel() for p in run.state["model"].parameters()) / 1e6
    rest = len(loader.images) % cfg.batch_size
    rest = f" ({rest} images left over)" if rest else ""
    rule = f" = {cfg.base_lr:g} x {cfg.batch_size} / 256" if cfg.lr is None else ""
    run.print(
        f"{run.script} · {count:.2f} M parameters · {device} · {run.precision} · "
        f"torch {torch.__version__} · git {git_hash()}\n"
        f"  data    {cfg.data}: {len(loader.images)} images, {loader.steps} steps an epoch"
        f"{rest}, {run.total} steps in {cfg.epochs} epochs\n"
        f"  batch   {cfg.batch_size} = {run.world} processes x {cfg.accumulate} accumulated x "
        f"{loader.micro_batch}\n"
        f"  lr      {run.peak_lr:.3g}{rule}; {run.warmup:g} steps of warm-up\n"
        f"  folder  {run.folder}" + (f", resumed after step {run.step}" if run.step else "")
    )
    if run.step >= run.last_step and run.ended == run.step:
        more = "--restart starts over" if run.step == run.total else "without --steps it goes on"
        run.print(f"nothing left to do: step {run.step} is done; {more}")
    if getattr(cfg, "knn_every", 0) and run.val is None:
        run.print("  no kNN: that takes labels, class folders in train/ and val/")


def catch_signals(run: Run) -> None:
    """From now on SIGTERM and Ctrl-C only ask the run to stop; `entry_point` ends this. A second
    one ends it at once; not if there are other processes, as launchers send several."""

    def remember(number: int, frame) -> None:
        Run.caught = number
        if run.rank == 0:
            os.write(2, b"stopping after this step\n")  # print could be interrupted by itself
        if run.world == 1:
            signal.signal(number, signal.SIG_DFL)

    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                Run.handlers.setdefault(number, signal.signal(number, remember))


def save_or_stop(run: Run, end: int, seconds: float) -> int:
    """Between two steps, which take so many seconds: save if it is time, save and stop if a signal
    came; all processes do the same. UserError, and all files stay as they are, if weights are not
    finite. Returns in how many steps to look again, as that waits for the GPU: in 20, or in about
    five seconds."""
    late = time.monotonic() - run.saved > 60 * run.cfg.save_minutes
    wishes = torch.tensor([run.caught, late, seconds], device=run.device)
    if run.world > 1:
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
    number, late, seconds = wishes.tolist()
    if run.step == end or number or late:
        for name, x in run.state.items():
            if isinstance(x, nn.Module):
                average_statistics(x)
                if not all(v.isfinite().all() for v in (*x.parameters(), *x.buffers())):
                    raise not_finite(run, {name: math.nan})
    if number or late:
        save(run)
    if number:
        again = "run the same command again, without --restart, to go on"
        run.print(f"stopped after step {run.step}; {again}")
        sys.exit(128 + int(number))
    return 1 if run.device.type == "cpu" else max(1, min(20, int(5 / seconds)))


def save(run: Run, encoder: ViT | None = None) -> None:
    """metrics.jsonl, encoder.pt if there is an encoder, and last checkpoint.pt."""
    run.saved = time.monotonic()
    if run.rank == 0:
        config, states = dataclasses.asdict(run.cfg), run.state | {"scaler": run.scaler}
        content = {k: x.state_dict() for k, x in states.items()}
        content |= {k: getattr(run, k) for k in ("script", "identity", "step", "ended", "history")}
        content |= {"config": config, "lr": run.lr, "speed": run.speed,
                    "sums": {k: (float(total), n) for k, (total, n) in run.sums.items()}}
        lines = "".join(json.dumps(line) + "\n" for line in run.history)
        write_text(run.folder / "metrics.jsonl", lines)
        if encoder:
            save_encoder(run.folder / "encoder.pt", encoder, config)
        file, before = run.folder / CHECKPOINT, run.folder / PREVIOUS
        write_atomically(file, lambda f: torch.save(content, f), keep=before)
    if run.world > 1:
        dist.barrier()  # a process that ends early makes launchers kill the others


def not_finite(run: Run, means: dict[str, float]) -> UserError:
    """What to say when training has failed."""
    last, terms = run.folder / CHECKPOINT, ", ".join(f"{k} {x:g}" for k, x in means.items())
    last = f"last good checkpoint: {last} (--init-from it, with a new --out)" if last.exists() \
        else "no checkpoint yet"
    return UserError(
        f"not finite by step {run.step}: {terms} (lr {run.lr:.3g}, {run.precision}); {last}; "
        "try a lower --lr, --clip-grad 1 or --precision fp32"
    )


def finish(run: Run) -> None:
    """Say what was left out, what came out, and what to do next."""
    say_unreadable(run.loader.images, run.val)
    run.print(f"encoder.pt, logs and pictures, if any, are in {run.folder}")
    if run.val is not None:
        run.print(f"next: python eval_linear.py {run.folder} --baseline")


def say_unreadable(*sets: Images | None) -> None:
    """How many images could not be read, by any of the processes."""
    for images in filter(None, sets):
        found = [images.unreadable.nonzero()[:, 0].tolist()]
        if dist.is_initialized():
            found *= dist.get_world_size()
            dist.all_gather_object(found, found[0])
        count = len(set(itertools.chain(*found)))
        if count and int(os.environ.get("RANK", 0)) == 0:
            print(f"skipped {count} unreadable of {len(images)} images; others stood in")


def write_atomically(path: Path, write, keep: Path | None = None) -> None:
    """write(file) to a temporary name, then rename: `path` is whole at every moment. The one before
    is kept as `keep`, if given. UserError if the disk is full or the folder read-only."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's for a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"could not write {path}: {reason}; earlier files are intact") from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def git_hash() -> str:
    """Short hash of the checkout that this file lies in, "-dirty" if changed, or "unknown"."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


# ------------------------------------------------------------------------------ kNN, validation


def nearest_neighbours(train_features: Tensor, test_features: Tensor, k: int):
    """Cosines (N, k), largest first, and indices (N, k) of the k of the training features (M, D),
    or all if they are fewer, that are nearest by cosine to each of (N, D). Memory does not grow
    with N x M."""
    train, k = F.normalize(train_features, dim=1).T, min(k, len(train_features))
    chunks = test_features.split(max(1, (1 << 26) // len(train_features)))  # 256 MB of cosines
    found = [(F.normalize(chunk, dim=1) @ train).topk(k, dim=1) for chunk in chunks]
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def knn_votes(cosine: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07):
    """Votes (N, num_classes) of neighbours with these cosines (N, k) and labels (N, k): each adds
    exp(cosine / temperature) to its class (Wu et al. 2018, as in DINO)."""
    votes = torch.zeros(len(labels), num_classes, device=labels.device)
    return votes.scatter_add_(1, labels, (cosine / temperature).exp())


def knn_scores(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20,
               temperature: float = 0.07, num_classes: int | None = None) -> Tensor:
    """The votes (N, num_classes) of the k nearest training features. train_features (M, D),
    train_labels (M,), test_features (N, D)."""
    cosine, index = nearest_neighbours(train_features, test_features, k)
    num_classes = num_classes or int(train_labels.max()) + 1
    return knn_votes(cosine, train_labels[index], num_classes, temperature)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in % of scores (N, classes) and labels (N,)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    return {"top1": round(100 * top1, 2), "top5": round(100 * top5, 2)}


@torch.no_grad()
def collect(model: nn.Module, forward, batches) -> tuple[Tensor, Tensor]:
    """forward(imgs) (N, ...) fp32 and labels (N,) of batches (imgs, labels); eval mode."""
    training = model.training
    model.eval()
    parts = [(forward(imgs).float(), labels) for imgs, labels in batches]
    model.train(training)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def outputs(run: Run, model: nn.Module, forward, images: Images, size: int, limit=None, view=None):
    """What `collect` gives of the images of `eval_batches`, in their order: each process does a
    part, and gets all."""
    batches = eval_batches(images, size, run.device, limit, run.cfg.workers, view=view)
    with run.autocast():
        results = [gather_rows(x) for x in collect(model, forward, batches)]
    # Process r had images r, r + world, ...
    order = torch.cat([torch.arange(r, len(results[1]), run.world) for r in range(run.world)])
    return tuple(x[order.argsort().to(x.device)] for x in results)


def knn_monitor(run: Run, encoder: ViT) -> dict[str, float]:
    """Top-1 in % of weighted 20-NN on the cls feature, and of the nearest neighbour, 1000
    validation images among 5000 training images. eval_linear.py --mode knn uses all."""

    def features(images: Images, limit: int) -> tuple[Tensor, Tensor]:
        size = run.cfg.img_size
        return outputs(run, encoder, lambda imgs: encoder(imgs)[:, 0], images, size, limit)

    train, (test, labels) = features(run.loader.images, 5000), features(run.val, 1000)
    ks = {"knn": 20, "retrieval_1nn": 1}
    return {x: accuracy(knn_scores(*train, test, k), labels)["top1"] for x, k in ks.items()}


# ------------------------------------------------------------------------------ pictures


def denormalize(imgs: Tensor) -> Tensor:
    """Network input -> RGB in 0..1, clipped, float32."""
    mean, std = STATISTICS.to(imgs.device, non_blocking=True)
    return (imgs * std + mean).clamp(0, 1)


def reconstruction_rows(imgs: Tensor, pred: Tensor, mask: Tensor, patch_size: int,
                        normalized: bool = True) -> dict[str, Tensor]:
    """Rows of a reconstruction picture, label -> (N, 3, H, W) normalised images. `pred` (N, L,
    p*p*3), mask (N, L), True = hidden; `normalized`: in units of each patch's own mean and std."""
    patches, hidden, note = patchify(imgs, patch_size), mask[:, :, None], ""
    if normalized:
        mean, std = patch_statistics(patches)
        pred, note = pred * std + mean, " (with the true mean and contrast of each patch)"
    rows = {
        "input": patches,
        "masked": patches.masked_fill(hidden, 0),
        f"prediction{note}": pred,
        "prediction + visible": torch.where(hidden, pred, patches),
    }
    grid = patch_grid(imgs.shape[2:], patch_size)
    return {k: unpatchify(x, patch_size, grid, imgs.shape[1]) for k, x in rows.items()}


def save_grid(path: Path, rows: dict[str, Tensor]) -> None:
    """PNG with one labelled row per entry, label -> normalised images (N, 3, H, W); small ones are
    enlarged to about 100 pixels."""
    strips = []
    for label, imgs in rows.items():
        zoom = max(1, 100 // imgs.shape[-1])
        imgs = F.interpolate(denormalize(imgs).cpu(), scale_factor=zoom, mode="nearest")
        strip = torchvision.utils.make_grid(imgs, nrow=len(imgs), padding=4, pad_value=1)
        picture = v2.functional.to_pil_image(F.pad(strip, (0, 0, 16, 0), value=1.0))
        ImageDraw.Draw(picture).text((4, 3), label, fill="black")
        strips.append(v2.functional.pil_to_tensor(picture))
    grid = v2.functional.to_pil_image(torch.cat(strips, dim=1))
    write_atomically(path, lambda file: grid.save(file, format="png"))
