"""What masked image modelling methods share: ViT, masking, data loading, the training loop.

This file knows MAE and no method beyond it. Copy it together with one script (mae_perceptual.py,
...) into a project of your own.

    Part 1, what a training step needs     ViT, Decoder, random_masking, masked_mse
                                           TrainLoader: which images, which views of them
                                           Run: steps, autocast, accumulation, logs, epochs
    Part 2, what is around it              settings and flags · data sets · weights · processes
                                           the run's folder and signals · kNN · pictures

Conventions. Images are (B, C, H, W). Tokens are (B, 1+n, D), the class token first. `visible`
(B, n) holds the indices of the visible patches; `mask` (B, L) is True where a patch is masked.
Patches are numbered row by row over the h x w grid. Pixels are uint8 until `normalize`, the one
place that makes network input, with ImageNet's mean and std.

Data sets are torch's: images[i] is (image, label), a PIL image or a uint8 tensor (C, H, W) and an
int. A data set with labels has the names of its classes in `.classes`. Augmentations are
torchvision's; they run on one image at a time, in the loader's worker processes.
"""

import argparse
import atexit
import dataclasses
import datetime
import functools
import inspect
import json
import math
import multiprocessing
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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm


class UserError(ValueError):
    """Raised for invalid settings, files or data; `entry_point` prints it as one line."""


# ------------------------------------------------------------------------------ ViT and masking


def patch_grid(img_size, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `img_size`, an int or (H, W). UserError if it is
    not divisible by the patch size."""
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
    """Frozen parameter (1, 1+L, dim): a zero row for the class token, then `sincos_2d`. As a
    parameter it is saved and can be fine-tuned."""
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


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many of L patches stay visible: int(L * (1 - mask_ratio)), as in MAE. UserError if no
    patch or every patch would be visible."""
    visible = int(num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if not 0 < visible < num_patches:
        raise UserError(
            f"--mask-ratio {mask_ratio}: some of the {num_patches} patches must stay visible and "
            "some must be masked"
        )
    return visible


def random_masking(batch: int, num_patches: int, mask_ratio: float, device=None, generator=None):
    """Keeps a uniformly random subset of the L patches of each image.

    Returns visible (B, keep) int64, in random order, and mask (B, L) bool, True = masked, with
    keep = `num_visible`."""
    keep = num_visible(num_patches, mask_ratio)
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
    """MAE's loss: the squared error, averaged over the pixels of a patch and then over the masked
    patches, in fp32.

    pred, target (B, L, p*p*C); mask (B, L), True = masked. With `normalize` the target is
    (patch - mean) / std of each patch."""
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
        """x (B, n, D) -> (B, n, D). attend(q, k, v) computes the attention; its output has the
        shape of q."""
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
    """Embeds patches by a linear layer, so that the masked ones need not be computed. This equals a
    convolution whose stride is its kernel size. The weight keeps the convolution's shape
    (D, C, p, p), as in timm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:  # (B, n, p*p*C) -> (B, n, D)
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer encoder. It has the parameter names and the output of timm's
    VisionTransformer(num_classes=0), and MAE's initialisation and fixed positions. `img_size`, an
    int or (H, W), and `patch_size` are in pixels."""

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
        """imgs (B, C, H, W) -> tokens (B, 1+L, D) with positions, the class token first. If the
        indices `visible` (B, n) are given, only these patches are embedded: (B, 1+n, D)."""
        expected = (self.in_chans, *(n * self.patch_size for n in self.grid))
        if imgs.shape[1:] != expected:
            raise UserError(f"this ViT takes images of {expected}, not {tuple(imgs.shape[1:])}")
        return self.embed_patches(patchify(imgs, self.patch_size), visible)

    def embed_patches(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """As `embed`, for patches (B, L, p*p*C)."""
        batch = len(patches)
        positions = self.pos_embed[:, 1:].expand(batch, -1, -1)
        if visible is not None:
            patches, positions = take_tokens(patches, visible), take_tokens(positions, visible)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        return torch.cat([cls, x], dim=1)

    def forward(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """imgs (B, C, H, W), visible (B, n) int64 or None -> (B, 1+n, D) after the final norm."""
        x = self.embed(imgs, visible)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder. It puts the mask token at the masked positions. Then transformer blocks and a
    linear layer predict the pixels of every patch, or `out_dim` numbers for each. Input width,
    grid, patch size and channels are those of `encoder`."""

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
        """tokens (B, 1+n, D), visible (B, n) -> (B, 1+L, dim): the embedded tokens at their places,
        the mask token at all others, plus positions."""
        x = self.embed(tokens)
        b, _, d = x.shape
        full = self.mask_token.to(x.dtype).expand(b, self.pos_embed.shape[1] - 1, d)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, d), x[:, 1:])
        return torch.cat([x[:, :1], full], dim=1) + self.pos_embed

    def decode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, 1+L, dim) with positions -> (B, L, p*p*C or out_dim)."""
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (B, 1+n, D), visible (B, n) -> (B, L, p*p*C or out_dim), predictions for all
        patches."""
        return self.decode(self.fill_in(tokens, visible))


# ------------------------------------------------------------------------------ images of a step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
STATISTICS = torch.tensor((MEAN, STD)).view(2, 3, 1, 1)
BICUBIC = v2.InterpolationMode.BICUBIC


def normalize(imgs: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255, uint8 or float -> network input, float32."""
    # non_blocking does not wait for the GPU. CUDA copies so small a tensor before the call returns.
    mean, std = 255 * STATISTICS.to(imgs.device, non_blocking=True)
    return (imgs - mean).div_(std)


def random_seed(*keys: int | str) -> int:
    """One well-mixed seed from several keys, such as ("order", seed, epoch)."""
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1  # 63 bits


def seeded(*keys: int | str) -> torch.Generator:
    """A generator on the CPU with the seed `random_seed(*keys)`."""
    return torch.Generator().manual_seed(random_seed(*keys))


class RandomCrop:
    """RandomResizedCrop and horizontal flip, the augmentation of MAE. `min_crop` is the smallest
    area of a crop, as a share of the image."""

    def __init__(self, size: int, min_crop: float):
        self.size = [size, size]
        self.crop = v2.RandomResizedCrop(size, scale=(min_crop, 1.0))

    def __call__(self, image: Tensor, label, index: int) -> tuple:
        box = self.crop.make_params([image])  # top, left, height, width
        return self.cut(image, **box), label

    def cut(self, image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
        """Cuts out this box, resizes it, and flips it with probability 1/2."""
        # self.crop(image) and v2.RandomHorizontalFlip() would give the same, but they dispatch over
        # types of input, which takes longer than cropping a small image.
        box = top, left, height, width
        image = v2.functional.resized_crop_image(image, *box, self.size, BICUBIC)
        if torch.rand(()) < 0.5:
            image = v2.functional.horizontal_flip_image(image)
        return image


class CentreCrop:
    """The test crop: the shorter side is resized to size * 256/224, bicubic, and the central
    size x size pixels are taken. An image of exactly that size stays whole."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor, label, index: int) -> tuple:
        if image.shape[1:] != (self.size, self.size):
            image = v2.functional.resize(image, [self.size * 256 // 224], BICUBIC)
            image = v2.functional.center_crop(image, [self.size])
        return image, label


class Views(Dataset):
    """The views that `augment` makes of each image, uint8 tensors (3, H, W), and then its label.

    augment(image, label, index) -> (*views, label): `image` is a uint8 tensor (3, H, W), `index`
    its number in the data set. torch's default generator, which torchvision's transforms use, is
    seeded for each image from (seed, epoch, index), so that a view does not depend on the worker or
    process that makes it."""

    def __init__(self, images: Dataset, augment, seed: int = 0, epoch: int = 0):
        self.images, self.augment = images, augment
        self.first_seed = random_seed("image", seed, epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        torch.default_generator.manual_seed(self.first_seed + index)
        item = self.images[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"a data set must return pairs (image, label), not {type(item)}")
        image, label = item
        classes = getattr(self.images, "classes", [])
        if classes and isinstance(label, int) and not -1 <= label < len(classes):
            raise UserError(f"image {index} has label {label}, of {len(classes)} classes")
        *views, label = self.augment(rgb_tensor(image), label, index)
        if any(view.dtype != torch.uint8 for view in views):
            raise UserError("the augmentation must return images in uint8, from 0 to 255")
        if not isinstance(label, int | np.integer | Tensor):
            raise UserError(f"image {index} has a label of {type(label)}; it must be an int")
        return *views, label


class TrainLoader:
    """Shuffled epochs of micro-batches: normalised views (b, 3, size, size), one tensor for each
    view that `augment` makes (see Views), and labels (b,).

    A global batch is cut into processes x accumulate micro-batches: two processes see what one
    process with --accumulate 2 sees. The last batch of an epoch is left out if it is
    incomplete."""

    def __init__(self, run: "Run", images: Dataset, augment):
        self.run, self.images, self.augment = run, images, augment
        batch_size, parts = run.cfg.batch_size, run.world * run.cfg.accumulate
        self.steps = len(images) // batch_size  # an epoch
        self.micro_batch = batch_size // parts
        if batch_size % parts:
            raise UserError(
                f"--batch-size {batch_size} is not divisible by {run.world} processes x "
                f"--accumulate {run.cfg.accumulate}"
            )
        if self.steps == 0:
            raise UserError(f"--batch-size {batch_size} is more than the {len(images)} images")

    def batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's micro-batches from global step `step` to the end of its epoch."""
        cfg, device = self.run.cfg, self.run.device
        epoch, first = divmod(step, self.steps)
        order = torch.randperm(len(self.images), generator=seeded("order", cfg.seed, epoch))
        order = order[: self.steps * cfg.batch_size]
        order = order.view(self.steps, self.run.world, cfg.accumulate, self.micro_batch)
        # order[step, process, micro-batch, image]
        mine = order[first:, self.run.rank].flatten(0, 1)  # (micro-batches, images)
        views = Views(self.images, self.augment, cfg.seed, epoch)
        for *imgs, labels in data_loader(self.run, views, mine.tolist()):
            imgs = [normalize(x.to(device, non_blocking=True)) for x in imgs]
            yield *imgs, labels.to(device, non_blocking=True)


def data_loader(run: "Run", views: Views, batches: list[list[int]]) -> DataLoader:
    """torch's DataLoader of these batches, which are lists of indices. By default there is one
    worker process for each core (at most 16) with a GPU, and none on a CPU."""
    workers = run.cfg.workers
    if workers is None and run.device.type == "cpu":
        workers = 0
    elif workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # Every epoch starts its workers anew: forking takes milliseconds, spawning takes seconds.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        views, batch_sampler=batches, num_workers=workers, worker_init_fn=outlive_signals,
        pin_memory=run.device.type == "cuda", multiprocessing_context=context,
    )  # fmt: skip


# ------------------------------------------------------------------------------ the run's loop


def adamw(model: nn.Module, weight_decay: float, lr: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:
    """AdamW of the trainable parameters, by default with MAE's betas. Biases and LayerNorm (1-D)
    have no weight decay."""
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

    A checkpoint stores no state of random numbers. The order of the images is drawn from (seed,
    epoch), their views from (seed, epoch, image), the model's random numbers from (seed, step,
    micro-batch). So a run that was stopped and resumed repeats the uninterrupted one; on the CPU,
    bit for bit."""

    caught = 0  # the number of the last signal that this process received

    def __init__(self, cfg: "TrainConfig"):
        self.cfg = cfg
        self.script = Path(inspect.getfile(type(cfg))).name
        self.folder = Path(cfg.out or f"runs/{Path(self.script).stem}")
        self.resumes = (self.folder / CHECKPOINT).exists() and not cfg.restart
        self.device = set_up_process(cfg.device)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.precision = cfg.precision
        if cfg.precision == "auto":
            self.precision = best_precision(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        torch.set_float32_matmul_precision("high")  # fp32 products may use TF32 on a GPU
        torch.manual_seed(random_seed("init", cfg.seed))
        # The rest is set by `start`, the steps and the epochs.
        self.loader: TrainLoader | None = None
        self.val: Dataset | None = None  # with labels; None without
        self.state = {}  # name -> model, optimizer, ...: what a checkpoint stores
        self.identity, self.lock = {}, None  # of the folder, see `open_folder`
        self.total = self.last_step = 0  # steps of the schedule; the step to stop after
        self.warmup = self.peak_lr = self.lr = 0.0  # in steps; learning rates
        self.step = self.epoch = 0  # steps that are done; the epoch they are in, from 1
        self.ddp = []  # the models that DDP wraps
        self.sums, self.counts = {}, {}  # of the values that `log` takes, in this epoch
        self.history = []  # the lines of metrics.jsonl
        self.speed, self.waited = {}, 0.0  # for the log; seconds without data in this epoch
        self.saved = self.printed = time.monotonic()  # when a checkpoint, a line was last written

    def start(self, loader: TrainLoader, val: Dataset | None = None, **state) -> None:
        """Takes the data and everything that has a state (model=, optimizer=, ...). If the folder
        holds a checkpoint of the same settings, takes every state, the step and the metrics from
        it. From now on SIGTERM and Ctrl-C let the run save and stop after a step."""
        cfg, self.loader, self.state = self.cfg, loader, state
        self.val = val if shared_classes(loader.images, val) else None
        self.total = cfg.epochs * loader.steps
        self.last_step = min(cfg.steps or self.total, self.total)
        self.warmup = min(cfg.warmup_epochs, cfg.epochs / 5) * loader.steps
        self.peak_lr = cfg.base_lr * cfg.batch_size / 256 if cfg.lr is None else cfg.lr
        open_folder(self)
        announce(self)
        catch_signals(self)

    def wrap(self, model: nn.Module, compile: bool = True) -> nn.Module:
        """The model to call in the loop: compiled in place if both --compile and `compile` are
        true, and wrapped in DDP if there are several processes. Each process keeps its own buffers:
        DDP would overwrite them at each call, and a backward pass after two calls would fail."""
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
        """The epochs that are still to do, counted from 1."""
        while self.step < self.last_step:
            self.epoch = self.step // self.loader.steps + 1
            yield self.epoch

    def steps(self) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """The epoch's steps that are still to do; each is an iterator over its micro-batches.

        Between two steps, the loss is checked, and the run is saved if it is time, or stopped if a
        signal came. On a GPU this happens after every tenth step, as reading the loss waits for
        the GPU. A single process stops at once after the step in which a signal came."""
        first, end = self.step, min(self.epoch * self.loader.steps, self.last_step)
        every = 1 if self.device.type == "cpu" else 10
        self.waited, begin = 0.0, time.perf_counter()
        disable = True if self.rank > 0 else None  # None: a bar only where there is a terminal
        bar = tqdm(total=end - first, desc=self._title(), disable=disable)
        with bar, closing(self.loader.batches(first)) as batches:  # ends the loader's workers
            while self.step < end:
                yield self._micro_batches(batches)
                self.step += 1
                bar.update()
                must_stop = Run.caught != 0 and self.world == 1
                if self.step % every == 0 or self.step == end or must_stop:
                    self._show_progress(bar, self.step - first, time.perf_counter() - begin)
                    if self.step < end:  # after an epoch's last step, `end_epoch` saves
                        save_or_stop(self)

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

    def _show_progress(self, bar: tqdm, steps: int, seconds: float) -> None:
        """Mean loss and speed of the epoch's `steps` so far: in the bar, or as a line a minute."""
        loss, images_per_s = self._read_means()["loss"], steps * self.cfg.batch_size / seconds
        self.speed = dict(images_per_s=round(images_per_s, 1),
                          data_wait=round(self.waited / seconds, 4))  # fmt: skip
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr:.2e}", **self.speed)
        if bar.disable and time.monotonic() - self.printed > 60:
            self.print(f"{self._title()}  step {self.step}  loss {loss:.4f}  lr {self.lr:.2e}  "
                       f"{images_per_s:.0f} images/s")  # fmt: skip

    def _title(self) -> str:
        return f"epoch {self.epoch}/{self.cfg.epochs}"

    def set_lr(self, optimizer, floor: float = 0.0, lr: float | None = None) -> None:
        """Sets this step's learning rate: `lr`, or else warm-up and cosine down to `floor`. It is
        multiplied by the "lr_scale" of a parameter group that has one."""
        schedule = warmup_cosine(self.step, self.total, self.warmup, self.peak_lr, floor)
        self.lr = schedule if lr is None else lr
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def autocast(self):
        """The context of forward passes and losses, for --precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor, **options) -> None:
        self.scaler.scale(loss / self.cfg.accumulate).backward(**options)

    def update(self, *optimizers, norms: tuple[str, ...] = ("grad_norm",)) -> None:
        """Clips the gradients, steps, and clears the gradients. `norms` has a name for each
        optimiser, under which the norm of its gradients before clipping is logged. Where fp16
        overflows, the scaler skips the step: then the norm is logged as 0, and `skipped` is the
        share of such steps."""
        for optimizer, name in zip(optimizers, norms, strict=True):
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.cfg.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip_grad, norm)
            if self.scaler.is_enabled():
                self.log(skipped=~norm.isfinite())
                norm = norm.nan_to_num(nan=0, posinf=0)
            self.log(**{name: norm})
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()

    def log(self, **values: Tensor) -> None:
        """Takes scalars of a micro-batch or step, among them `loss`. metrics.jsonl has their means
        over the epoch and all processes. A value need not come in every step."""
        for name, x in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + x.detach().double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def _read_means(self) -> dict[str, float]:
        """The means of this epoch so far. UserError if a mean is not finite. Each process's sums
        are replaced by the mean of all processes' sums, which does not alter later means."""
        sums = mean_over_processes(torch.stack(list(self.sums.values())))
        self.sums = dict(zip(self.sums, sums, strict=True))
        means = {}
        for name, total in zip(self.sums, sums.tolist(), strict=True):
            means[name] = total / self.counts[name]
        if not all(math.isfinite(mean) for mean in means.values()):
            raise not_finite(self, means)
        return means

    def due(self, every: int) -> bool:
        """True at the end of every `every`-th epoch and of the run; never if `every` is 0."""
        return every > 0 and (self.step >= self.last_step or self.epoch % every == 0)

    def end_epoch(self, encoder: ViT | None = None, picture=None, **results: float) -> None:
        """Logs the epoch, with `results` if any; measures kNN and draws the picture if they are
        due; saves the checkpoint and the encoder. `picture()` returns the rows of `save_grid`."""
        metrics = {"epoch": self.epoch, "step": self.step, **self._read_means()}
        metrics |= {"lr": self.lr, **self.speed, **results}
        if self.val is not None and self.due(self.cfg.knn_every):
            metrics |= knn_monitor(self, encoder)
        self.history.append(metrics)
        if self.step == self.epoch * self.loader.steps:  # --steps did not cut the epoch off
            self.sums, self.counts = {}, {}
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        self.print("  ".join(words))
        if picture and self.rank == 0 and self.due(self.cfg.recon_every):
            torch.manual_seed(random_seed("picture", self.cfg.seed))  # always the same masks
            save_grid(self.folder / f"recon_{self.epoch:04d}.png", picture())
        # This comes last: if a run is killed earlier, it repeats all of the above when resumed.
        save_or_stop(self, encoder, save_now=True)
        if self.step == self.last_step:
            self.print(f"step {self.step} of {self.total} is done; results are in {self.folder}")

    def print(self, text: str) -> None:
        if self.rank == 0:
            self.printed = time.monotonic()
            print(text, flush=True)


# ==============================================================================================
# A reader of a method may stop here. Part 2: settings, data sets, weights, processes, the run's
# folder and signals, kNN and validation, pictures.
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

    # What a resumed run may change: where and how it runs, not what it computes.
    may_change = ("out", "restart", "steps", "save_minutes", "data", "data_dir", "workers",
                  "device", "compile", "accumulate")  # fmt: skip

    data: str | None = "shapes"  # shapes, cifar10, cifar100, stl10, or a folder: see the README
    data_dir: str = "data"  # where cifar10, cifar100 and stl10 are downloaded to
    min_crop: float = 0.2  # smallest area of a random crop, as a share of the image
    epochs: int = 10  # length of the training and of the learning rate schedule
    steps: int | None = None  # stop after so many steps and write all files; leave it out to go on
    batch_size: int = 256  # images per optimiser step, over all processes and accumulations
    accumulate: int = 1  # micro-batches per step and process; raise it when memory runs out
    base_lr: float = 1.5e-4  # learning rate per 256 images: lr = base_lr * batch_size / 256
    lr: float | None = None  # the peak learning rate itself; overrides --base-lr
    warmup_epochs: float = 1.0  # linear warm-up; never more than a fifth of --epochs
    weight_decay: float = 0.05  # of AdamW; none for biases and LayerNorm
    clip_grad: float | None = None  # largest gradient norm; try 1 if the loss jumps
    out: str | None = None  # run folder; by default runs/<script>-<preset>
    save_minutes: float = 15.0  # save within an epoch, too, after so many minutes
    restart: bool = False  # ignore the checkpoint in the run folder and start over
    workers: int | None = None  # processes that load images [GPU: one a core, up to 16; CPU: 0]
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # [GPU: bf16, or fp16; CPU: fp32]
    compile: bool = False  # torch.compile: a slow first step, then faster; for long runs on a GPU
    seed: int = 0  # seed of all random numbers

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        check_numbers(self, 1, "epochs", "steps", "batch_size", "accumulate")
        check_numbers(self, 0, "workers", "seed", "weight_decay", "warmup_epochs", "save_minutes")
        check_numbers(self, POSITIVE, "base_lr", "lr", "clip_grad", "min_crop")
        if self.min_crop is not None and self.min_crop > 1:
            raise UserError(f"--min-crop must be at most 1, not {self.min_crop}")
        for name, kind in typing.get_type_hints(type(self)).items():
            choices, value = typing.get_args(kind), getattr(self, name)
            if typing.get_origin(kind) is Literal and value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, not {value}")


@dataclass
class Config(TrainConfig):
    """Settings of every pre-training method."""

    may_change = (*TrainConfig.may_change, "init_from", "knn_every", "recon_every")

    img_size: int = 32  # side of the training crops in pixels; a multiple of the patch size
    patch_size: int = 4  # side of a patch in pixels; smaller patches cost more
    size: Literal["tiny", "small", "base", "large", "huge"] = "tiny"  # of the ViT
    depth: int | None = None  # encoder blocks, if not those of --size; fewer is faster
    mask_ratio: float = 0.75  # share of masked patches
    init_from: str | None = None  # start from a run, encoder.pt, checkpoint.pt, timm or MAE file
    knn_every: int = 0  # kNN accuracy every so many epochs and at the end; 0 is never
    recon_every: int = 10  # reconstruction picture every so many epochs and at the end

    def check(self) -> None:
        super().check()
        check_numbers(self, 1, "img_size", "patch_size", "depth", "recon_every")
        check_numbers(self, 0, "knn_every")
        rows, columns = patch_grid(self.img_size, self.patch_size)
        num_visible(rows * columns, self.mask_ratio)

    def vit(self) -> ViT:
        """A fresh encoder of these settings."""
        shape = VIT_SIZES[self.size] | ({"depth": self.depth} if self.depth else {})
        return ViT(self.img_size, self.patch_size, **shape)


POSITIVE = 1e-30  # the `least` of numbers that must be above 0


def check_numbers(cfg, least: float, *names: str) -> None:
    """UserError unless each named field is None or a finite number >= `least`."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not least <= value < math.inf:
            limit = f"at least {least}" if least in (0, 1) else "above 0"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


@functools.cache  # inspect takes 50 ms a class
def trailing_comments(config_class: type) -> dict[str, str]:
    """Maps each field of a dataclass and of its parents to the comment at the end of its line."""
    sources = map(inspect.getsource, reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", "\n".join(sources), re.MULTILINE))


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> Config. The flags are the dataclass's fields, their help texts the trailing
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
    return cfg


def entry_point(main):
    """Decorator of a script's main(cfg, data=None): checks cfg and data; a UserError becomes one
    line and exit code 2. If `data` is given, cfg.data becomes None, so that nothing that the run
    stores names a data set that it did not see."""

    @functools.wraps(main)
    def wrapped(cfg, data=None):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, end_at_once)
            if data is not None:
                check_pair(data)
                cfg = dataclasses.replace(cfg, data=None)
            cfg.check()
            main(cfg, data)
        except UserError as error:
            # An error in a loader's worker comes with its traceback, of which this is the end.
            text = str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")
            print(f"error: {text}", file=sys.stderr, flush=True)
            sys.exit(2)
        except torch.OutOfMemoryError as error:
            print(f"error: {str(error).splitlines()[0]} Raise --accumulate: a micro-batch then has "
                  "fewer images.", file=sys.stderr)  # fmt: skip
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last checkpoint, if there is one",
                  file=sys.stderr, flush=True)  # fmt: skip
            sys.exit(130)
        finally:
            Run.caught = 0
            with suppress(ValueError):  # not the main thread
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ------------------------------------------------------------------------------ data sets

SHAPES = ("disk", "ring", "square", "triangle", "star",
          "cross", "crescent", "bar", "heart", "corner")  # fmt: skip
SHAPES_SPLITS = {split: dict(count=20000, seed=0) for split in ("pretrain", "train")}
SHAPES_SPLITS["val"] = dict(count=4000, seed=1)


def load_dataset(name: str, split: str, size: int, data_dir="data") -> Dataset | None:
    """A split of a data set: "pretrain" (all images for training without labels), "train" or "val";
    None where a folder has no such split. `name` is shapes, drawn at size x size pixels; cifar10,
    cifar100 or stl10, downloaded to `data_dir`; or a folder: one that holds train/ and val/ with
    one folder per class, or any tree of images, which then have no labels."""
    if name == "shapes":
        images = TensorDataset(*draw_shapes(**SHAPES_SPLITS[split], size=size))
        images.classes = list(SHAPES)
        return images
    if name == "stl10":
        part = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
        images = download(torchvision.datasets.STL10, data_dir, split=part)
        images.labelled = (images.labels >= 0).nonzero()[0]  # see `evenly_spaced`
        return images
    if name in ("cifar10", "cifar100"):
        return download(getattr(torchvision.datasets, name.upper()), data_dir, train=split != "val")
    if name is None:
        raise UserError("--data has to name the folder of the images, for ImageNet the one that "
                        "holds train/ and val/")  # fmt: skip
    if not name or not Path(name).is_dir():
        raise UserError(f"--data {name}: no such folder, nor shapes, cifar10, cifar100 or stl10")
    return load_folder(Path(name), split)


def load_pair(cfg: TrainConfig, split: str = "pretrain") -> tuple[Dataset, Dataset | None]:
    """Training images and, if the data set has any, validation images."""
    train = load_dataset(cfg.data, split, cfg.img_size, cfg.data_dir)
    return train, load_dataset(cfg.data, "val", cfg.img_size, cfg.data_dir)


def shared_classes(train: Dataset, val: Dataset | None) -> list[str]:
    """Names of the classes, an empty list unless both sets have labels. UserError if their classes
    differ."""
    classes, others = (list(getattr(images, "classes", [])) for images in (train, val))
    if classes and others and classes != others:
        raise UserError("training and validation images have different .classes")
    return classes if others else []


def required_classes(train: Dataset, val: Dataset | None, name: str | None) -> list[str]:
    """`shared_classes` where labels are needed. UserError if there are none; `name` is --data, or
    None for data that main was given."""
    if classes := shared_classes(train, val):
        return classes
    if name is None:
        raise UserError("labels are needed: training and validation images with .classes, names of "
                        "the classes (a Subset has lost them: set them again)")  # fmt: skip
    raise UserError(f"--data {name}: labelled images for training and for validation are needed, "
                    "in class folders in train/ and val/")  # fmt: skip


def check_pair(data) -> None:
    """UserError unless `data` is (training images, validation images or None) and none is empty."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise UserError("data must be a pair: training images, and validation images or None")
    if any(images is not None and len(images) == 0 for images in data):
        raise UserError("a data set has no images; for no validation images, pass None")


def download(kind: type, data_dir: str, folder: str | None = None, **part) -> Dataset:
    """One of torchvision's data sets. The first process downloads it, then all read it. `folder`
    is where a data set lies in `data_dir` that torchvision would download again each time."""
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            exists = folder is not None and Path(data_dir, folder).is_dir()
            kind(data_dir, download=not exists, **part)
        if dist.is_initialized():
            dist.barrier()
        return kind(data_dir, **part)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download {kind.__name__} to {data_dir}: {error}") from error


def load_folder(root: Path, split: str) -> Dataset | None:
    """A split of the images in a folder; see `load_dataset`. UserError if there are none."""
    train, folder = root / "train", root / ("val" if split == "val" else "train")
    if (root / "images").is_dir() and (root / "annotations").is_dir():
        raise UserError(f"{root} has masks in annotations/: use {root / 'images' / 'training'}")
    if not train.is_dir():
        return None if split == "val" else ImageFiles(root, classes=[])
    if not folder.is_dir():
        return None
    classes = folders_in(train)
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        return ImageFiles(folder, classes)
    images = ImageFiles(folder, classes=[])  # Tiny-ImageNet's val/: a table has the classes
    class_of = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines())
    for i, (path, _) in enumerate(images.samples):
        name = class_of.get(Path(path).name)
        if name not in classes:
            raise UserError(f"{path} is in none of the class folders of {train}: {annotations}")
        images.samples[i] = path, classes.index(name)
    images.classes = classes
    return images


def folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


class ImageFiles(ImageFolder):
    """torchvision's ImageFolder with the numbers of given `classes`, some of which may have no
    images, as in a small val/. Without classes, all images in `root` and below, labelled -1.

    UserError if there are no images, or a class is unknown. An unreadable image is named, and the
    next one stands in for it."""

    def __init__(self, root: Path, classes: list[str]):
        self.given = classes
        super().__init__(root, loader=read_image, allow_empty=True)
        if not self.samples:
            raise UserError(f"no images under {root}, or none in folders of classes")

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        if not self.given:
            return [], {"": -1}  # ImageFolder looks for images in directory/"", which is all of it
        if unknown := set(folders_in(Path(directory))) - set(self.given):
            raise UserError(f"{directory} has class {min(unknown)}, but train/ has not")
        return self.given, {name: number for number, name in enumerate(self.given)}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= len(self):
            raise IndexError(index)  # so that a loop over the data set ends
        for i in range(index, index + len(self)):
            path, label = self.samples[i % len(self)]
            try:
                return self.loader(path), label
            except Exception as error:  # damaged files make decoders raise anything
                print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr)
        raise UserError(f"none of the {len(self)} images under {self.root} can be read")


def read_image(path: str) -> Image.Image:
    """The first frame in RGB, as it is stored: like torchvision, not turned by EXIF."""
    with Image.open(path) as image:
        image.load()
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode in RGB; 16 bits are scaled to 8, where PIL would clip them."""
    if image.mode[0] in "IF":
        deep = np.asarray(image)
        if image.mode == "F" or deep.min() < 0 or deep.max() >= 1 << 16:
            raise UserError(f"an image of mode {image.mode} has no agreed range of values")
        image = Image.fromarray((deep // 256).astype(np.uint8))
    if image.mode == "P":  # a palette may have transparent colours
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def rgb_tensor(image) -> Tensor:
    """A PIL image, or a uint8 tensor of 1, 3 or 4 (RGBA) channels -> uint8 (3, H, W)."""
    if isinstance(image, Image.Image):
        return v2.functional.pil_to_tensor(rgb(image))
    if not isinstance(image, Tensor):
        raise UserError(f"images must be PIL images or uint8 tensors, not {type(image)}")
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) not in (1, 3, 4):
        raise UserError("images must be PIL images or uint8 tensors (C, H, W) with C = 1, 3 or 4, "
                        f"not {image.dtype} {tuple(image.shape)}")  # fmt: skip
    return image.expand(3, -1, -1) if len(image) == 1 else image[:3]


def draw_shapes(count: int, size: int, seed: int, masks: bool = False) -> tuple[Tensor, ...]:
    """Procedural images (count, 3, size, size) uint8 and classes (count,), indices into SHAPES.

    Each image has one shape on a textured ground. Its place, size, tilt, colours and both textures
    are random and independent of the class: only the outline shows the class. With `masks`, also
    returns masks (count, size, size) uint8: 0 is the ground, 1 + class the pixels of which the
    shape covers at least half."""
    generator = seeded("shapes", seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    numbers = torch.rand(count, 23, generator=generator)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    segments = torch.empty(count, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    chunk = max(1, (1 << 19) // size**2)  # as many as the processor's cache holds
    for kind, name in enumerate(SHAPES):
        for index in (labels == kind).nonzero()[:, 0].split(chunk):
            picture, cover = _draw(name, x, y, numbers[index, :, None, None], pixel=2 / size)
            images[index] = picture.mul_(255).round_().to(torch.uint8)
            segments[index] = (cover >= 0.5).to(torch.uint8) * (1 + kind)
    return (images, labels, segments) if masks else (images, labels)


def _draw(name: str, x: Tensor, y: Tensor, r: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
    """x, y (S, S) in -1..1, r (n, 23, 1, 1) uniform in 0..1 -> pictures (n, 3, S, S) in 0..1, and
    the share of each pixel that the shape covers (n, S, S)."""
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
    cover = (0.5 - outside * radius / pixel).clamp_(0, 1)  # one pixel of anti-aliasing
    dark, bright = 0.35 + 0.25 * r[:, 4:5], 0.8 + 0.2 * r[:, 4:5]
    inverted = r[:, 5:6] > 0.5  # half of the shapes are darker than their ground
    hue = r[:, 6:7]
    ground = _paint(x, y, hue, torch.where(inverted, bright, dark), r[:, 7:15])
    front = 0.3 + 0.4 * r[:, 22:23] + hue
    shape = _paint(x, y, front, torch.where(inverted, dark, bright), r[:, 14:22])
    return torch.lerp(ground, shape, cover[:, None]), cover


def _paint(x: Tensor, y: Tensor, hue: Tensor, value: Tensor, t: Tensor) -> Tensor:
    """Two related colours mixed by a texture: stripes, plaids or slow gradients, soft or sharp."""
    (k1, k2), (p1, p2) = (9 * t[:, i] ** 2 for i in (0, 1)), (6.28 * t[:, i] for i in (2, 3))
    wave = torch.sin(k1 * (x * p1.cos() + y * p1.sin()) + 6.28 * t[:, 4])
    second = torch.sin(k2 * (x * p2.cos() + y * p2.sin()) + 6.28 * t[:, 5])
    mix = torch.sigmoid((1 + 5 * t[:, 7]) * (wave + (t[:, 6] > 0.5) * second))[:, None]
    phase = torch.arange(3).view(3, 1, 1) / 3
    one, two = (0.5 + 0.5 * torch.cos(6.28 * (hue + shift + phase)) for shift in (0.0, 0.12))
    return torch.lerp(one * value, 0.25 + 0.6 * two * value, mix)


# ------------------------------------------------------------------------------ weights

CHECKPOINT = "checkpoint.pt"


def read_checkpoint(path) -> dict:
    """torch.load of tensors and primitives, on the CPU. UserError if that cannot be done."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception:  # of many types: zip, pickle, storage
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def load_weights(path) -> tuple[dict[str, Tensor], dict]:
    """Reads our encoder.pt or checkpoint.pt, or a flat file of timm or of MAE, whose classification
    head is ignored. Returns the weights, under the names "encoder....", "decoder...." and so on,
    and the settings of the ViT."""
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
    """Our name, "encoder.…" or "decoder.…", of a weight in the flat layout of timm and MAE."""
    if name == "mask_token" or name.startswith("decoder_"):
        return f"decoder.{name.removeprefix('decoder_')}"
    return f"encoder.{name}"


def weights_of(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the module `name`, without that prefix."""
    return {k.removeprefix(f"{name}."): x for k, x in weights.items() if k.startswith(f"{name}.")}


def load_strictly(target, state: dict, path) -> None:
    """load_state_dict of a module or optimiser; its complaint, with every missing, unexpected and
    misshapen key, becomes a UserError of one line."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None


def load_encoder(path, img_size: int | None = None, drop_path: float = 0.0) -> ViT:
    """The ViT of our encoder.pt or checkpoint.pt, or of a flat timm or published MAE file, whose
    decoder is ignored. If `img_size` is given, its positions are interpolated to that size.
    UserError that lists every missing, unexpected or misshapen key."""
    weights, settings = load_weights(path)
    try:
        encoder = ViT(**settings, drop_path=drop_path)
    except TypeError as error:
        raise UserError(f"{path} does not describe a ViT: {error}") from None
    load_strictly(encoder, weights_of("encoder", weights), path)
    if img_size is not None:
        resize_positions(encoder, img_size)
    return encoder


def resize_positions(encoder: ViT, img_size: int) -> None:
    """Lets the encoder take images of `img_size` pixels: interpolates its position embedding over
    the grid, bicubic with antialiasing, as timm does. The class token's stays as it is."""
    grid = patch_grid(img_size, encoder.patch_size)
    encoder.settings["img_size"] = img_size
    if grid == encoder.grid:
        return
    cls, patches = encoder.pos_embed.data.split([1, encoder.num_patches], dim=1)
    patches = patches.transpose(1, 2).unflatten(2, encoder.grid)  # (1, D, h, w)
    patches = F.interpolate(patches, grid, mode="bicubic", antialias=True)
    positions = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
    encoder.pos_embed = nn.Parameter(positions, requires_grad=False)
    encoder.grid, encoder.num_patches = grid, grid[0] * grid[1]


def save_encoder(path: Path, encoder: ViT, config: dict) -> None:
    """encoder.pt: weights under timm's names, the numbers that rebuild the ViT, the settings."""
    content = {"model": encoder.state_dict(), "vit": encoder.settings, "config": config}
    write_atomically(path, lambda file: torch.save(content, file))


def init_from(path, model: nn.Module) -> set[str]:
    """Loads every module (.encoder, .decoder, ...) that both the file and the model have. UserError
    unless all weights of such a module fit. Prints a line that names the model's modules that the
    file lacks, and returns their names."""
    path = Path(path, "encoder.pt") if Path(path).is_dir() else path
    weights, vit = load_weights(path)
    for name, value in model.encoder.settings.items():
        if vit.get(name, value) != value:
            raise UserError(f"--init-from {path}: its encoder has {name} {vit[name]}, not {value}")
    missing = set()
    for name, module in model.named_children():
        if found := weights_of(name, weights):
            load_strictly(module, found, f"{path}: its {name}")
        else:
            missing.add(name)
    if missing:
        names = ", ".join(sorted(missing))
        print(f"{path} has no {names}: initialised as in a new run", file=sys.stderr)
    return missing


# ------------------------------------------------------------------------------ processes


def set_up_process(name: str) -> torch.device:
    """The device of this process for --device auto, cpu or cuda. Under torchrun, joins the other
    processes. UserError if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable CUDA device here; --device cpu works everywhere")
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"process {number} of this node has no GPU: --nproc-per-node {count}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # The others wait while the first process downloads a data set.
        patience = datetime.timedelta(hours=2)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device


def best_precision(device: torch.device) -> str:
    """What --precision auto stands for: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of all processes' x."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def average_statistics(model: nn.Module) -> None:
    """Gives all processes the mean of their running statistics."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            for x in (norm.running_mean, norm.running_var):
                x.copy_(mean_over_processes(x))


def gather(x: Tensor) -> Tensor:
    """x (n, ...) of every process, n being the same in all -> (processes, n, ...), no gradient."""
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


# ------------------------------------------------------------------------------ the run's folder


def open_folder(run: Run) -> None:
    """Locks the run's folder and goes on from its checkpoint, if it holds one. UserError if the
    folder is in use or cannot be written to, or the checkpoint is damaged or of another run."""
    cfg, folder = run.cfg, run.folder
    images, file = run.loader.images, folder / CHECKPOINT
    settings = dataclasses.asdict(cfg)
    classes = "/".join(getattr(images, "classes", []))
    # Settings that must be equal for a run to be resumed; a script may have added to them.
    run.identity |= {name: value for name, value in settings.items() if name not in cfg.may_change}
    run.identity |= {
        "script": run.script, "precision": run.precision, "number of images": len(images),
        "classes": f"checksum {zlib.crc32(os.fsencode(classes)):08x}" if classes else "none",
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
    if file.exists() and cfg.restart:
        run.print(f"--restart: {file} is ignored and will be overwritten")
    elif file.exists():
        resume(run, read_checkpoint(file), file)
    if run.world > 1:
        dist.barrier()  # nobody writes before all have read
    if run.rank == 0:
        write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")


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


def resume(run: Run, saved: dict, file: Path) -> None:
    """Takes every state from the content of a checkpoint. UserError if it is of another run."""
    old = saved.get("identity", {})
    if old.get("script", run.script) != run.script:
        raise UserError(f"{file} is a run of {old['script']}, not {run.script}; use another --out")
    differ = [name for name in run.identity if run.identity[name] != old.get(name)]
    if differ:
        changes = ", ".join(f"{name} was {old.get(name)}, now {run.identity[name]}"
                            for name in differ)  # fmt: skip
        raise UserError(f"{file} is of another run: {changes}; use another --out or --restart")
    data = saved["config"].get("data")
    if data != run.cfg.data:
        run.print(f"note: --data was {data}, now {run.cfg.data}; it must hold the same images")
    for name, target in (run.state | {"scaler": run.scaler}).items():
        load_strictly(target, saved.get(name), file)
    run.step, run.counts = saved["step"], saved["counts"]
    for name, total in saved["sums"].items():
        run.sums[name] = torch.tensor(total, dtype=torch.float64, device=run.device)
    # An epoch that --steps cut off has a line in the log, which is written again at its real end.
    run.history = [line for line in saved["history"] if line["step"] % run.loader.steps == 0]


def announce(run: Run) -> None:
    """Prints what is about to happen."""
    cfg, loader, cuda = run.cfg, run.loader, run.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)"
    count = sum(p.numel() for p in run.state["model"].parameters() if p.requires_grad)
    rest = len(loader.images) % cfg.batch_size
    rest = f" ({rest} images left over)" if rest else ""
    rule = f" = {cfg.base_lr:g} x {cfg.batch_size} / 256" if cfg.lr is None else ""
    data = cfg.data or "your Dataset"
    run.print(
        f"{run.script} · {count:,} parameters to train · {device} · {run.precision} · "
        f"torch {torch.__version__} · git {git_hash()}\n"
        f"  data    {data}: {len(loader.images)} images, {loader.steps} steps an epoch{rest}, "
        f"{run.total} steps in {cfg.epochs} epochs\n"
        f"  batch   {cfg.batch_size} = {run.world} processes x {cfg.accumulate} accumulated x "
        f"{loader.micro_batch}\n"
        f"  lr      {run.peak_lr:.3g}{rule}; {run.warmup:g} steps of warm-up\n"
        f"  folder  {run.folder}" + (f", resumed after step {run.step}" if run.step else "")
    )
    if run.step >= run.last_step:
        more = "--restart starts over" if run.step == run.total else "without --steps it goes on"
        run.print(f"nothing left to do: step {run.step} is done; {more}")
    if getattr(cfg, "knn_every", 0) and run.val is None:
        run.print("  no kNN, because it needs labelled images for training and for validation")


def catch_signals(run: Run) -> None:
    """From now on, the first SIGTERM or Ctrl-C lets the run save and stop after a step. In a
    single process, a second one ends it at once; launchers of several processes send several
    signals. `entry_point` restores the handlers."""

    def remember(number: int, frame) -> None:
        Run.caught = number
        if run.rank == 0:
            os.write(2, b"stopping after a step\n")  # print could be interrupted by itself
        if run.world == 1:
            signal.signal(number, end_at_once)

    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, remember)


def end_at_once(number: int, frame) -> None:
    """A handler of signals, which ends the loaders' workers, too."""
    sys.exit(128 + number)


def outlive_signals(worker: int) -> None:
    """In a loader's worker process: a signal that a whole process group gets is for the run, which
    still needs the worker to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """At exit, multiprocessing would end a loader's workers by SIGTERM, which they ignore."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for worker in workers:
        worker.kill()


def save_or_stop(run: Run, encoder: ViT | None = None, save_now: bool = False) -> None:
    """Between two steps: saves if it is time, saves and stops if a signal came; all processes do
    the same. UserError, and all files stay as they are, if a weight is not finite."""
    late = time.monotonic() - run.saved > 60 * run.cfg.save_minutes
    wishes = torch.tensor([Run.caught, save_now or late], device=run.device)
    if run.world > 1:
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
    number, must_save = wishes.tolist()
    if number or must_save:
        sync_and_check(run)
        save(run, encoder)
    if number:
        again = "run the same command again, without --restart, to go on"
        run.print(f"stopped after step {run.step}; {again}")
        sys.exit(128 + number)


def sync_and_check(run: Run) -> None:
    """Gives all processes the same BatchNorm statistics. UserError if a weight is not finite."""
    for name, module in run.state.items():
        if isinstance(module, nn.Module):
            average_statistics(module)
            finite = [x.isfinite().all() for x in (*module.parameters(), *module.buffers())]
            if not torch.stack(finite).all():
                raise not_finite(run, {name: math.nan})


def save(run: Run, encoder: ViT | None) -> None:
    """Writes metrics.jsonl, encoder.pt if there is an encoder, and then checkpoint.pt."""
    run.saved = time.monotonic()
    if run.rank == 0:
        config = dataclasses.asdict(run.cfg)
        content = {k: x.state_dict() for k, x in (run.state | {"scaler": run.scaler}).items()}
        content |= {"identity": run.identity, "config": config, "step": run.step,
                    "history": run.history, "counts": run.counts,
                    "sums": {name: float(total) for name, total in run.sums.items()}}  # fmt: skip
        lines = "".join(json.dumps(line) + "\n" for line in run.history)
        write_text(run.folder / "metrics.jsonl", lines)
        if encoder:
            save_encoder(run.folder / "encoder.pt", encoder, config)
        write_atomically(run.folder / CHECKPOINT, lambda file: torch.save(content, file))
    if run.world > 1:
        dist.barrier()  # a process that ends early makes launchers kill the others


def not_finite(run: Run, means: dict[str, float]) -> UserError:
    """The error for a training that has failed."""
    last, terms = run.folder / CHECKPOINT, ", ".join(f"{k} {x:g}" for k, x in means.items())
    last = f"last good checkpoint: {last} (--init-from it, with a new --out)" if last.exists() \
        else "no checkpoint yet"
    return UserError(
        f"not finite by step {run.step}: {terms} (lr {run.lr:.3g}, {run.precision}); {last}; "
        "try a lower --lr, --clip-grad 1 or --precision fp32"
    )


def write_atomically(path: Path, write) -> None:
    """Calls write(file) for a temporary name, then renames it: `path` is whole at every moment.
    UserError if the disk is full or the folder read-only."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
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


def evenly_spaced(images: Dataset, limit: int | None = None) -> list[int]:
    """Indices of all images, or of at most `limit`, in order. Where only a part of a data set has
    labels, its attribute `labelled` lists that part, and the limited choice is made from it."""
    index = range(len(images))
    if limit:
        index = getattr(images, "labelled", index)
    count = min(limit or len(index), len(index))
    return [int(index[int(i)]) for i in np.linspace(0, len(index) - 1, count)]


def example_images(images: Dataset, augment, device, count: int = 8) -> Tensor:
    """(N, 3, size, size), normalised, N <= count: the same images every time."""
    views = Views(images, augment)
    imgs = torch.stack([views[i][0] for i in evenly_spaced(images, count)])
    return normalize(imgs.to(device))


@torch.no_grad()
def outputs(run: Run, model: nn.Module, forward, images: Dataset, augment,
            limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Outputs of `forward`, (N, ...) in fp32, and labels (N,) of all images, or of `limit`, in
    order. `model` is in eval mode meanwhile. Each process does a share of the work and gets all
    results; some do an image twice, so that all shares are equal."""
    index, training, parts = evenly_spaced(images, limit), model.training, []
    each = math.ceil(len(index) / run.world)
    share = [index[(run.rank + i * run.world) % len(index)] for i in range(each)]
    batches = [share[i : i + 250] for i in range(0, each, 250)]
    model.eval()
    disable = True if run.rank > 0 else None  # None: a bar only where there is a terminal
    loader = data_loader(run, Views(images, augment), batches)
    for imgs, labels in tqdm(loader, "evaluating", len(batches), leave=False, disable=disable):
        with run.autocast():
            result = forward(normalize(imgs.to(run.device)))
        parts.append((result.float(), labels.to(run.device)))
    model.train(training)
    results, labels = (gather(torch.cat(part)) for part in zip(*parts, strict=True))
    # Process r has the images r, r + world, ... of the list.
    results, labels = (x.transpose(0, 1).flatten(0, 1)[: len(index)] for x in (results, labels))
    return results, labels


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, ks=(20,),
               temperature: float = 0.07) -> dict[int, Tensor]:
    """For each k of `ks` the votes (N, num_classes) of the k training features (M, D), with labels
    (M,), that are nearest by cosine to each of the test features (N, D). A neighbour adds
    exp(cosine / temperature) to its class (Wu et al. 2018, as in DINO). Memory does not grow with
    N x M."""
    train, votes = F.normalize(train, dim=1).T, {k: [] for k in ks}
    for chunk in test.split(max(1, (1 << 26) // len(labels))):  # 256 MB of cosines
        cosines = F.normalize(chunk, dim=1) @ train
        cosines, index = cosines.topk(min(max(ks), len(labels)), dim=1)
        weights, classes = (cosines / temperature).exp(), labels[index]
        for k in ks:
            empty = torch.zeros(len(chunk), num_classes, device=test.device)
            votes[k].append(empty.scatter_add(1, classes[:, :k], weights[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in % of scores (N, classes) and labels (N,)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    return {"top1": round(100 * top1, 2), "top5": round(100 * top5, 2)}


def knn_monitor(run: Run, encoder: ViT) -> dict[str, float]:
    """Top-1 (%) of 20-NN and 1-NN by the class token, of 1000 validation images against 5000
    training images. An evaluation with all images is more exact."""
    crop = CentreCrop(run.cfg.img_size)

    def features(images: Dataset, limit: int) -> tuple[Tensor, Tensor]:
        return outputs(run, encoder, lambda imgs: encoder(imgs)[:, 0], images, crop, limit)

    train, labels = features(run.loader.images, 5000)
    test, test_labels = features(run.val, 1000)
    num_classes = len(run.val.classes)
    votes = knn_scores(train, labels, test, num_classes, ks=(1, 20))
    return {"knn": accuracy(votes[20], test_labels)["top1"],
            "retrieval_1nn": accuracy(votes[1], test_labels)["top1"]}  # fmt: skip


# ------------------------------------------------------------------------------ pictures


def denormalize(imgs: Tensor) -> Tensor:
    """Network input -> RGB in 0..1, clipped, float32."""
    mean, std = STATISTICS.to(imgs.device, non_blocking=True)
    return (imgs * std + mean).clamp(0, 1)


def reconstruction_rows(imgs: Tensor, pred: Tensor, mask: Tensor, patch_size: int,
                        normalized: bool = True) -> dict[str, Tensor]:
    """Rows of a reconstruction picture, label -> (N, 3, H, W) normalised images. `pred` (N, L,
    p*p*3), mask (N, L), True = masked. `normalized` says that pred is in units of each patch's own
    mean and std."""
    patches, masked, note = patchify(imgs, patch_size), mask[:, :, None], ""
    if normalized:
        mean, std = patch_statistics(patches)
        pred, note = pred * std + mean, " (with the true mean and contrast of each patch)"
    rows = {
        "input": patches,
        "masked": patches.masked_fill(masked, 0),
        f"prediction{note}": pred,
        "prediction + visible": torch.where(masked, pred, patches),
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
