"""What masked image modelling methods share: ViT, masking, data, the plumbing of a training run.

This file knows no paper. Copy it together with one script (mae_perceptual.py, ...) into a project.

    ViT and masking   sincos_2d, patchify, unpatchify, random_masking, masked_mse, ViT, Decoder
    Weights           load_encoder, save_encoder, init_from
    Data              draw_shapes, load_images, TrainLoader, eval_batches
    Settings          TrainConfig, Config, parse, entry_point
    A training run    Run: device, processes, folder, exact resume, logs, kNN monitor, pictures

Conventions. Images are (B, C, H, W). Tokens are (B, 1+n, D), the cls token first. `visible` (B, n)
holds the indices of the kept patches; `mask` (B, L) is True where a patch is hidden. Patches run
row by row over the h x w grid. Pixels are uint8 until `normalize`, the one place that turns them
into network input, with ImageNet's mean and std.
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
import subprocess
import sys
import time
import typing
import weakref
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from torchvision.transforms import v2
from tqdm import tqdm


class UserError(ValueError):
    """A mistake the user can mend: `entry_point` shows it as one line and exits with code 2."""


# ------------------------------------------------------------------------------ ViT and masking

VIT_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


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
    keep = int(num_patches * (1 - mask_ratio))
    if not 0 < keep < num_patches:
        raise UserError(
            f"mask ratio {mask_ratio} keeps {keep} of {num_patches} patches; "
            "at least one must stay visible and one be hidden"
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


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. In training, each residual branch of an image is dropped with
    probability `drop_path` (stochastic depth)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, attend=F.scaled_dot_product_attention) -> Tensor:
        drop = functools.partial(
            torchvision.ops.stochastic_depth, p=self.drop_path, mode="row", training=self.training
        )
        x = x + drop(self.attn(self.norm1(x), attend))
        return x + drop(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation, for `model.apply`: Xavier-uniform linear layers with zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """(1, 1+L, dim), zero for cls. A frozen parameter: it is saved, and can be unfrozen."""
    return nn.Parameter(F.pad(sincos_2d(dim, grid), (0, 0, 1, 0))[None], requires_grad=False)


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

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (B, 1+n, D), visible (B, n) -> (B, L, p*p*C): every patch, visible ones too."""
        return self.decode(self.fill_in(tokens, visible))

    def decode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, 1+L, dim) with positions -> (B, L, p*p*C)."""
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))


# ------------------------------------------------------------------------------ weights


def read_checkpoint(path) -> dict:
    """torch.load of tensors and primitives, on the CPU. UserError if that cannot be done."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # of many types: zip, pickle, storage
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def split_weights(path) -> tuple[dict[str, dict], dict]:
    """The weights of a file by part, "encoder", "decoder" and others, and its ViT's settings: our
    encoder.pt or checkpoint.pt, or the flat layout of timm and of the published MAE files, of which
    a classification head is ignored."""
    loaded = read_checkpoint(path)
    weights, parts = loaded.get("model", loaded), {}
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} holds no weights")
    ours = any(name.startswith("encoder.") for name in weights)
    for name, value in weights.items():
        part = "encoder"
        if ours:
            part, _, name = name.partition(".")
        elif name.startswith("decoder_") or name == "mask_token":
            part, name = "decoder", name.removeprefix("decoder_")
        elif name.startswith("head."):
            continue
        parts.setdefault(part, {})[name] = value
    encoder = parts.get("encoder", {})
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
        if not isinstance(encoder.get(name), Tensor) or encoder[name].ndim != ndim:
            raise UserError(f"{path} holds no ViT: {name} is missing or misshapen")
    if isinstance(loaded.get("vit"), dict):
        return parts, loaded["vit"]
    dim, in_chans, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    heads = {size["embed_dim"]: size["num_heads"] for size in VIT_SIZES.values()}
    side = math.isqrt(encoder["pos_embed"].shape[1] - 1)  # such files do not say: a square grid
    return parts, dict(
        img_size=side * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=dim,
        depth=len({name.split(".")[1] for name in encoder if name.startswith("blocks.")}),
        num_heads=heads.get(dim, dim // 64),
    )


def load_strictly(part, state: dict, path) -> None:
    """load_state_dict of a module or optimiser; its complaint, with every missing, unexpected and
    misshapen key, becomes a UserError of one line."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None


def load_encoder(path, drop_path: float = 0.0) -> ViT:
    """The ViT of our encoder.pt or checkpoint.pt, or of a flat timm or published MAE file, whose
    decoder is ignored. UserError that lists every missing, unexpected or misshapen key."""
    parts, settings = split_weights(path)
    try:
        encoder = ViT(**settings, drop_path=drop_path)
    except TypeError as error:
        raise UserError(f"{path} does not describe a ViT: {error}") from None
    load_strictly(encoder, parts["encoder"], path)
    return encoder


def save_encoder(path: Path, encoder: ViT, config: dict) -> None:
    """encoder.pt: weights under timm's names, the numbers that rebuild the ViT, the settings."""
    content = {"model": encoder.state_dict(), "vit": encoder.settings, "config": config}
    write_atomically(path, lambda file: torch.save(content, file))


def init_from(path, model: nn.Module) -> set[str]:
    """Load a file's weights into the parts of the model (.encoder, .decoder, ...) that it has; all
    keys of these must fit. Says, and returns, which parts it lacks."""
    parts, _ = split_weights(path)
    for name, module in model.named_children():
        if name in parts:
            load_strictly(module, parts[name], path)
    missing = {name for name, _ in model.named_children() if name not in parts}
    if missing:
        names = ", ".join(sorted(missing))
        print(f"{path} has no {names}: as at the start of a new run", file=sys.stderr)
    return missing


# ------------------------------------------------------------------------------ data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
RESIDENT_BYTES = 4 << 30  # equally sized images up to this total are kept decoded on the device
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
BICUBIC = v2.InterpolationMode.BICUBIC
SHAPES = ("disk", "ring", "square", "triangle", "star",
          "cross", "crescent", "bar", "heart", "corner")  # fmt: skip


def random_seed(*keys: int | str) -> int:
    """One well-mixed seed from several keys, such as ("crop", seed, epoch, step)."""
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seeded(*keys: int | str, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(random_seed(*keys))


def normalize(imgs: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255, uint8 or float -> network input, float32."""
    mean, std = (torch.tensor(x, device=imgs.device).view(3, 1, 1) * 255 for x in (MEAN, STD))
    return (imgs - mean) / std


def denormalize(imgs: Tensor) -> Tensor:
    """Network input -> RGB in 0..1, clipped, float32."""
    mean, std = (torch.tensor(x, device=imgs.device).view(3, 1, 1) for x in (MEAN, STD))
    return (imgs * std + mean).clamp(0, 1)


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


def sample_crops(count: int, height: int, width: int, scale, ratio=(3 / 4, 4 / 3),
                 place=None) -> Tensor:
    """RandomResizedCrop boxes (count, 4) int64, columns top, left, h, w in pixels, distributed as
    torchvision's get_params: area uniform in `scale`, aspect log-uniform in `ratio`, the first of
    10 tries that fits, else the largest central crop within `ratio`. place(h, w) -> top, left
    chooses the place of crops of these sizes (count,), by default uniformly."""
    u = torch.rand(4, count, 10)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w, top, left = (x.gather(1, first)[:, 0] for x in (h, w, u[2], u[3]))
    top, left = (top * (height - h + 1)).long(), (left * (width - w + 1)).long()
    boxes = torch.stack([*(place(h, w) if place else (top, left)), h, w], dim=1)
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    central = torch.tensor(((height - h) // 2, (width - w) // 2, h, w))
    return torch.where(fits.any(dim=1, keepdim=True), boxes, central)


def crop_resize(imgs: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut its own box from each image and resize it to size x size, a whole batch at once: equal to
    `interpolate(crop, mode="bicubic", antialias=True)` on each. Resampling is linear and separable,
    hence one matrix per image and axis.

    imgs (B, C, H, W) uint8 or float; boxes (B, 4) as from `sample_crops`; flip (B,) bool mirrors
    left-right. Returns float32 (B, C, size, size); not clamped, and bicubic overshoots."""
    b, c, height, width = imgs.shape
    rows = _bicubic_matrix(boxes[:, 0], boxes[:, 2], height, size)
    columns = _bicubic_matrix(boxes[:, 1], boxes[:, 3], width, size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = torch.bmm(imgs.float().view(b, c * height, width), columns.transpose(1, 2))
    x = x.view(b, c, height, size).transpose(1, 2).reshape(b, height, c * size)
    return torch.bmm(rows, x).view(b, size, c, size).transpose(1, 2)


def _bicubic_matrix(start: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
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


def read_image(path: Path) -> Image.Image | None:
    """RGB image; None, with a warning that names the file, if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip, not scale
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
    except Exception as error:  # damaged files make decoders raise anything, even SyntaxError
        print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr, flush=True)
        return None


class Images:
    """One split of a data set: `labels` (N,) int64, -1 where unknown; `classes`, their names, empty
    without labels; and either `pixels` (N, 3, H, W) uint8 on the training device, or `paths`."""

    def __init__(self, labels: Tensor, classes: list[str], pixels=None, paths=None):
        self.labels, self.classes, self.pixels, self.paths = labels, classes, pixels, paths
        # Shared with loader workers, so that a broken file is named once and not tried again.
        self.unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> tuple[Image.Image, int]:
        """Image and label. The next readable file stands in for an unreadable one, so that batches
        keep their size."""
        if self.pixels is not None:
            return v2.functional.to_pil_image(self.pixels[index]), int(self.labels[index])
        while True:
            if not self.unreadable[index]:
                if (image := read_image(self.paths[index])) is not None:
                    return image, int(self.labels[index])
                self.unreadable[index] = True
            index = (index + 1) % len(self)


def load_images(name: str, split: str, size: int, data_dir="data", device="cpu") -> Images | None:
    """A split of a data set: "pretrain" (all images for training without labels), "train" or "val";
    None where a folder has no such split. `name`: shapes, drawn at size x size; cifar10, cifar100,
    stl10, downloaded to `data_dir`; or a folder, with train/ and val/ and class folders in them, or
    any tree of images without labels."""
    if name == "shapes":
        count, seed = (4000, 1) if split == "val" else (20000, 0)
        pixels, labels = draw_shapes(count, size, seed)
        return Images(labels, list(SHAPES), pixels.to(device))
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision_images(name, split, data_dir, device)
    return _folder_images(Path(name), split, device)


def pretraining_images(cfg: "Config", device) -> tuple[Images, Images | None]:
    """Training images and, if the data set has any, validation images."""
    splits = ("pretrain", "val")
    return tuple(load_images(cfg.data, s, cfg.img_size, cfg.data_dir, device) for s in splits)


def _torchvision_images(name: str, split: str, data_dir, device) -> Images:
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        dist.barrier()  # the first process downloads, then the others read
    sets = torchvision.datasets
    try:
        if name == "stl10":
            part = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            data = sets.STL10(data_dir, split=part, download=True)
            pixels, labels = torch.from_numpy(data.data), data.labels
        else:
            cifar = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[name]
            data = cifar(data_dir, train=split != "val", download=True)
            pixels, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download {name} to {data_dir}: {error}") from error
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Images(labels, list(data.classes), pixels.contiguous().to(device))


def _folder_images(root: Path, split: str, device) -> Images | None:
    if root == Path() or not root.is_dir():
        raise UserError(f"--data {root}: no such folder, nor shapes, cifar10, cifar100 or stl10")
    has_splits = (root / "train").is_dir()
    folder = root / ("val" if split == "val" else "train") if has_splits else root
    if not folder.is_dir() or (split == "val" and not has_splits):
        return None
    paths = sorted(
        Path(parent) / file
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise UserError(f"no images under {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    parents = [path.relative_to(folder).parts[:-1] for path in paths]
    if (annotations := folder / "val_annotations.txt").is_file():  # Tiny-ImageNet's val/
        lines = (line.split("\t") for line in annotations.read_text().splitlines())
        class_of = {name: class_name for name, class_name, *_ in lines}
        parents = [(class_of.get(path.name, f"(unknown, of {path.name})"),) for path in paths]
    labels, classes = torch.full((len(paths),), -1), []
    if has_splits and all(parents):  # every image lies in a class folder
        classes = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
        if unknown := sorted({parent[0] for parent in parents} - set(classes)):
            raise UserError(f"{folder} has classes that train/ lacks: {', '.join(unknown[:5])}")
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[parent[0]] for parent in parents])
    images = Images(labels, classes, paths=paths)
    return _decode_all(images, folder, device) or images


def _decode_all(images: Images, folder: Path, device) -> Images | None:
    """The same images in memory, less the unreadable; None if they differ in size or are many."""
    pixels = None
    quiet = True if int(os.environ.get("RANK", 0)) > 0 else None  # None: only on a terminal
    for i, path in enumerate(tqdm(images.paths, f"reading {folder}", leave=False, disable=quiet)):
        image = read_image(path)
        if image is None:
            images.unreadable[i] = True
            continue
        if pixels is None:
            width, height = image.size
            if len(images) * 3 * height * width > RESIDENT_BYTES:
                return None
            pixels = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
        if image.size != (width, height):
            return None
        pixels[i] = v2.functional.pil_to_tensor(image)
    if pixels is None:
        raise UserError(f"none of the {len(images)} images under {folder} could be read")
    keep = ~images.unreadable
    if not keep.all():
        print(f"left out {int((~keep).sum())} unreadable of {len(keep)} images", file=sys.stderr)
        pixels = pixels[keep]
    return Images(images.labels[keep], images.classes, pixels.to(device))


def _random_resized_crop(index: Tensor, height: int, width: int, min_crop: float) -> Tensor:
    return sample_crops(len(index), height, width, (min_crop, 1.0))


class _Decoding(torch.utils.data.Dataset):
    """The work of loader processes: decode, then crop and flip `views` times, or `transform` to one
    image or a tuple of them. Keys are (epoch, index), and all random numbers derive from (seed,
    epoch, index)."""

    def __init__(self, images: Images, seed: int, transform=None, sample=None, size=0, views=1):
        self.images, self.seed, self.transform = images, seed, transform
        self.sample, self.size, self.views = sample, size, views

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        torch.manual_seed(random_seed("image", self.seed, *key))
        image, label = self.images.pil(key[1])
        if self.transform:
            views = self.transform(image)
            views = views if isinstance(views, tuple) else (views,)
        else:
            views = [self._crop(image, key[1]) for _ in range(self.views)]
        return *map(v2.functional.pil_to_tensor, views), label

    def _crop(self, image: Image.Image, index: int) -> Image.Image:
        box = self.sample(torch.tensor([index]), image.height, image.width)[0].tolist()
        image = v2.functional.resized_crop(image, *box, [self.size, self.size], BICUBIC)
        return v2.functional.horizontal_flip(image) if torch.rand(()) < 0.5 else image


class TrainLoader:
    """Shuffled epochs, as micro-batches of normalised images (b, 3, size, size) and labels (b,);
    with `views` > 1 of so many crops of the same images, then labels.

    A global batch is cut into processes x accumulate micro-batches, of which number j depends on
    (seed, epoch, step, j) alone: two processes see what one with --accumulate 2 sees. Images in
    memory are cropped and flipped on the device, a batch at a time; files are decoded by workers,
    image by image, as are images in main memory if a `transform` (PIL -> PIL, or a tuple of them,
    the views) is to be applied instead of crop and flip. The incomplete last batch of an epoch is
    dropped.

    `sample(index (b,), height, width)` gives the crops (b, 4) of the images of these numbers, as
    `sample_crops` does, which is the default; it draws from torch's default generator and has to be
    picklable."""

    def __init__(self, images: Images, cfg: "TrainConfig", run: "Run", size: int, transform=None,
                 sample=None, views: int = 1):
        self.images, self.cfg, self.run, self.size, self.views = images, cfg, run, size, views
        self.sample = sample or functools.partial(_random_resized_crop, min_crop=cfg.min_crop)
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
        self.workers = None
        if images.paths is not None or transform is not None:
            self.workers = torch.utils.data.DataLoader(
                _Decoding(images, cfg.seed, transform, self.sample, size, views),
                batch_sampler=weakref.proxy(self),  # a cycle would hold up the end by 5 s a worker
                num_workers=cfg.workers, persistent_workers=cfg.workers > 0,
                pin_memory=run.device.type == "cuda",
            )

    def batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches of this process, from global step `step` to the end of its epoch."""
        self.epoch, self.first = divmod(step, self.steps)
        if self.workers is None:
            return map(self._crop, self.indices())
        to = functools.partial(Tensor.to, device=self.run.device, non_blocking=True)
        return (
            (*(normalize(to(imgs)) for imgs in views), to(labels))
            for *views, labels in self.workers
        )

    def indices(self) -> Iterator[tuple[int, int, Tensor]]:
        """(step of the epoch, j, image indices) of this process's micro-batches."""
        cfg, run = self.cfg, self.run
        generator = seeded("order", cfg.seed, self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for step in range(self.first, self.steps):
            batch = order[step * cfg.batch_size :][: cfg.batch_size]
            for j in range(run.rank * cfg.accumulate, (run.rank + 1) * cfg.accumulate):
                yield step, j, batch[j * self.micro_batch :][: self.micro_batch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """As the batch sampler of its own DataLoader: keys for `_Decoding`."""
        for _, _, index in self.indices():
            yield [(self.epoch, i) for i in index.tolist()]

    def _crop(self, key: tuple[int, int, Tensor]) -> tuple[Tensor, ...]:
        (step, j, index), device = key, self.run.device
        torch.manual_seed(random_seed("crop", self.cfg.seed, self.epoch, step, j))
        pixels, views = self.images.pixels, []
        imgs = pixels[index.to(pixels.device)].to(device)
        for _ in range(self.views):
            boxes = self.sample(index, *imgs.shape[2:])
            boxes, flip = (x.to(device) for x in (boxes, torch.rand(len(index)) < 0.5))
            views.append(normalize(crop_resize(imgs, boxes, self.size, flip).clamp_(0, 255)))
        return *views, self.images.labels[index].to(device)


def evenly_spaced(count: int, limit: int | None) -> Tensor:
    """Indices of at most `limit` of `count` images, in order."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).long()


def eval_batches(images: Images, size: int, device, limit: int | None = None, workers: int = 0,
                 share: bool = True, squeeze: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised images (b, 3, size, size) and labels (b,), in order, without augmentation:
    shorter side to size * 256/224, bicubic, then the central size x size; images of just that size
    stay whole. With `squeeze` nothing is cut off: height and width to size. At most `limit` images,
    evenly spaced. With several processes each gets its `share`; `gather_rows` brings results
    together."""
    index = evenly_spaced(len(images), limit)
    if share and dist.is_initialized():
        index = index[dist.get_rank() :: dist.get_world_size()]
    crop = v2.Compose([v2.Resize(size * 256 // 224, interpolation=BICUBIC), v2.CenterCrop(size)])
    crop = v2.Resize((size, size), interpolation=BICUBIC) if squeeze else crop
    if images.pixels is not None:
        whole = tuple(images.pixels.shape[2:]) == (size, size)
        for part in index.split(250):
            imgs = images.pixels[part.to(images.pixels.device)].to(device)
            yield normalize(imgs if whole else crop(imgs)), images.labels[part].to(device)
        return
    keys = [(0, i) for i in index.tolist()]
    decoding = _Decoding(images, seed=0, transform=crop)
    loader = torch.utils.data.DataLoader(decoding, 250, sampler=keys, num_workers=workers)
    for imgs, labels in loader:
        yield normalize(imgs.to(device)), labels.to(device)


# ------------------------------------------------------------------------------ settings


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
    restart: bool = False  # start over in a folder that holds a run, instead of resuming it
    workers: int = 4  # processes that decode images, where the set does not fit in memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, else fp32
    compile: bool = False  # torch.compile: a slow first step, then faster; for long runs on a GPU
    seed: int = 0  # of everything random

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        check_numbers(self, 1, "epochs", "steps", "batch_size", "accumulate")
        check_numbers(self, 0, "workers", "seed", "weight_decay", "warmup_epochs")
        check_numbers(self, 1e-30, "base_lr", "lr", "clip_grad")
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
        h, w = patch_grid(self.img_size, self.patch_size)
        if not 0 < self.mask_ratio < 1 or not 0 < int(h * w * (1 - self.mask_ratio)) < h * w:
            raise UserError(
                f"--mask-ratio {self.mask_ratio}: some of the {h * w} patches must stay visible "
                "and some be hidden"
            )
        if self.init_from and not Path(self.init_from).is_file():
            raise UserError(f"--init-from {self.init_from}: no such file")

    def vit(self) -> ViT:
        """A fresh encoder of these settings."""
        shape = VIT_SIZES[self.size] | ({"depth": self.depth} if self.depth else {})
        return ViT(self.img_size, self.patch_size, **shape)


# A resumed run may change these: they say where and how it runs, not what it computes. (Of
# `accumulate`, the product with the number of processes counts, and Run.start compares that.)
RESUMABLE = {"out", "restart", "steps", "data_dir", "workers", "device", "compile", "accumulate",
             "knn_every", "recon_every", "baseline", "encoder"}  # fmt: skip


def check_numbers(cfg, least: float, *names: str) -> None:
    """UserError unless each named field is None or a finite number >= `least`."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not least <= value < math.inf:
            limit = f"at least {least}" if least in (0, 1) else "above 0"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> checked Config. Flags are the dataclass's fields, their help the trailing
    comments; a field without default is positional. --preset, by default the first, changes the
    defaults of the others. A mistake ends the program with one line and exit code 2."""
    script = Path(inspect.getfile(config_class)).stem
    comments = {}
    for base in reversed(config_class.__mro__[:-1]):
        found = re.findall(r"^    (\w+): [^#\n]*# *(.*)$", inspect.getsource(base), re.MULTILINE)
        comments.update(found)

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            self.exit(2, f"{script}.py: error: {message} (see --help)\n")

    parser = Parser(
        prog=f"{script}.py", description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if presets:
        parser.add_argument("--preset", choices=presets, help="defaults for all other flags")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        text = comments[field.name].replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, help=text)
            continue
        defaults = {name: preset.get(field.name, field.default) for name, preset in presets.items()}
        if len(set(defaults.values())) > 1:
            text += f" [{', '.join(f'{name} {value}' for name, value in defaults.items())}]"
        elif field.default is not None:
            text += f" [{field.default}]"
        kind = hints[field.name]
        if type(None) in typing.get_args(kind):  # X | None
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        options = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    values = vars(parser.parse_args(argv))
    preset = values.pop("preset", next(iter(presets), None))
    cfg = config_class(**(presets.get(preset, {}) | values))
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
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
            sys.exit(130)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ------------------------------------------------------------------------------ a training run


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


def warmup_cosine(step: float, total: float, warmup: float, peak: float, floor=0.0) -> float:
    """Learning rate of a step: linear from 0 to `peak` in `warmup` steps, then half a cosine down
    to `floor` at step `total`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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


@torch.no_grad()
def extract_features(encoder: ViT, loader, pool: str = "cls") -> tuple[Tensor, Tensor]:
    """Features (M, D) fp32 and labels (M,) of the (images, labels) of `loader`: encoder in eval
    mode, nothing hidden; "cls" token or "mean" of the patch tokens, after the final norm."""
    training = encoder.training
    encoder.eval()
    device = encoder.pos_embed.device
    features = [torch.empty(0, encoder.embed_dim, device=device)]  # a process may have no images
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for imgs, label in loader:
        tokens = encoder(imgs).float()
        features.append(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
        labels.append(label)
    encoder.train(training)
    return torch.cat(features), torch.cat(labels)


def knn_scores(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20,
               temperature: float = 0.07, num_classes: int | None = None) -> Tensor:
    """Class votes (N, num_classes) of weighted kNN: each of the k training features nearest by
    cosine adds exp(cosine / temperature) to its class (Wu et al. 2018, as in DINO).

    train_features (M, D), train_labels (M,), test_features (N, D). Memory does not grow with N."""
    k = min(k, len(train_features))
    num_classes = num_classes or int(train_labels.max()) + 1
    train, scores = F.normalize(train_features, dim=1).T, []
    for test in test_features.split(max(1, (1 << 26) // len(train_features))):  # 256 MB of cosines
        cosine, index = (F.normalize(test, dim=1) @ train).topk(k, dim=1)
        votes = torch.zeros(len(test), num_classes, device=test.device)
        scores.append(votes.scatter_add_(1, train_labels[index], (cosine / temperature).exp()))
    return torch.cat(scores)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in % of scores (N, classes) and labels (N,)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    return {"top1": round(100 * top1, 2), "top5": round(100 * top5, 2)}


@torch.no_grad()
def validate(run: "Run", model: nn.Module, predict, val: Images, size: int) -> dict[str, float]:
    """Accuracy of predict(imgs) on all of `val`, `model` in eval mode; each process does a part."""
    model.eval()
    scores, labels = [], []
    for imgs, label in eval_batches(val, size, run.device, workers=run.cfg.workers):
        with run.autocast():
            scores.append(predict(imgs).float())
        labels.append(label)
    model.train()
    return accuracy(*(gather_rows(torch.cat(x)) for x in (scores, labels)))


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


def git_hash() -> str:
    """Short hash of the checkout that this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


class Run:
    """One training run: its processes and device, its folder, its random numbers, its logs.

        run.start(loader, val, model=model, optimizer=optimizer)    # resumes
        ddp = run.wrap(model)
        for _ in run.epochs():
            for micro_batches in run.steps():
                run.set_lr(optimizer)
                for imgs, labels in micro_batches:
                    with run.forward(ddp):
                        loss = ...
                    run.backward(loss)
                    run.log(loss=loss)
                run.update(optimizer)
            run.end_epoch(model.encoder)                            # logs, measures, saves
        run.finish()

    The random numbers of every forward pass derive from (seed, step, micro-batch) at that moment,
    so a run that was stopped and resumed repeats the uninterrupted one; on the CPU, bit for bit."""

    def __init__(self, cfg: TrainConfig):
        self.script = Path(inspect.getfile(type(cfg))).name
        self.cfg, self.folder = cfg, Path(cfg.out or f"runs/{Path(self.script).stem}")
        self.device = set_up_process(cfg.device)
        cuda = self.device.type == "cuda"
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.precision = cfg.precision
        if cfg.precision == "auto":
            bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        torch.set_float32_matmul_precision("high")  # fp32 products may use TF32 on a GPU
        torch.manual_seed(random_seed("init", cfg.seed))
        self.step, self.micro, self.lr = 0, 0, 0.0
        self.knn_before = self.knn_after = None
        self.pending, self.sums = [], {}

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def start(self, loader: TrainLoader, val: Images | None = None, **parts) -> None:
        """Take the data and everything that has a state (model=, optimizer=, ...); restore it from
        the folder's checkpoint, if there is one; print what is about to happen."""
        cfg, self.loader, self.parts = self.cfg, loader, parts
        self.val = val if loader.images.classes else None
        self.total = cfg.epochs * loader.steps
        self.last_step = min(cfg.steps or self.total, self.total)
        self.warmup = min(cfg.warmup_epochs, cfg.epochs / 5) * loader.steps
        self.peak_lr = cfg.base_lr * cfg.batch_size / 256 if cfg.lr is None else cfg.lr
        self.checkpoint = self.folder / "checkpoint.pt"
        self.previous = self.folder / "checkpoint.prev.pt"
        # What a run must have in common with the one that it resumes.
        self.identity = dataclasses.asdict(cfg) | {
            "precision": self.precision, "images": len(loader.images),
            "class names (checksum)": zlib.crc32("/".join(loader.images.classes).encode()),
            "processes x accumulate": self.world * cfg.accumulate,
        }  # fmt: skip
        if not cfg.restart:
            self._resume()
        if self.world > 1:
            dist.barrier()  # nobody writes before all have read
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                names = ("checkpoint.*", "metrics.jsonl", "*_????.png", "encoder.pt",
                         "classifier*.pt", "tokenizer.pt", "eval.json")  # fmt: skip
                for name in names if cfg.restart else ():
                    for path in self.folder.glob(name):
                        path.unlink()
            except OSError as error:
                raise UserError(f"--out {self.folder}: {error}") from error
            self._write_text("config.json", json.dumps(dataclasses.asdict(cfg), indent=2))

        cuda = self.device.type == "cuda"
        threads = f"cpu ({torch.get_num_threads()} threads)"
        device = torch.cuda.get_device_name() if cuda else threads
        count = sum(p.numel() for p in parts["model"].parameters()) / 1e6
        rest = len(loader.images) % cfg.batch_size
        rest = f" ({rest} images left over)" if rest else ""
        rule = f" = {cfg.base_lr:g} x {cfg.batch_size} / 256" if cfg.lr is None else ""
        self.print(
            f"{self.script} · {count:.2f} M parameters · {device} · {self.precision} · "
            f"torch {torch.__version__} · git {git_hash()}\n"
            f"  data    {cfg.data}: {len(loader.images)} images, {loader.steps} steps an epoch"
            f"{rest}, {self.total} steps in {cfg.epochs} epochs\n"
            f"  batch   {cfg.batch_size} = {self.world} processes x {cfg.accumulate} accumulated x "
            f"{loader.micro_batch}\n"
            f"  lr      {self.peak_lr:.3g}{rule}; {self.warmup:g} steps of warm-up\n"
            f"  folder  {self.folder}" + (f", resumed after step {self.step}" if self.step else "")
        )
        if self.step >= self.last_step:
            self.print(f"nothing left to do: step {self.step} is done; --restart starts over")
        if getattr(cfg, "knn_every", 0) and self.val is None:
            self.print("  no kNN: that takes labels, class folders in train/ and val/")
        elif self.val is not None and cfg.knn_every and self.step == 0:
            self.knn_before = self.knn(parts["model"].encoder)

    def _resume(self) -> None:
        path = self.checkpoint if self.checkpoint.exists() else self.previous
        if not path.exists():
            return
        try:
            state = read_checkpoint(path)
        except UserError as error:
            older = f"delete it to go on from {self.previous.name}, or "
            older = older if path != self.previous and self.previous.exists() else ""
            raise UserError(f"{error}; {older}start over with --restart") from None
        if state.get("script") != self.script:
            author = state.get("script", "another program")
            raise UserError(f"{path} is by {author}, not {self.script}; choose another --out")
        new, old = self.identity, state["identity"]
        differ = [k for k in new | old if k not in RESUMABLE and new.get(k) != old.get(k)]
        if differ:
            changes = ", ".join(f"{k} was {old.get(k)}, now {new.get(k)}" for k in differ)
            raise UserError(f"{path} has other settings: {changes}; use another --out or --restart")
        for name, part in (self.parts | {"scaler": self.scaler}).items():
            load_strictly(part, state.get(name), path)
        self.step, self.knn_before = state["step"], state["knn_before"]

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
        return model

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do, counted from 1."""
        while self.step < self.last_step:
            self.epoch = self.step // self.loader.steps + 1
            yield self.epoch

    def steps(self) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """The epoch's steps that are still to do; each is an iterator over its micro-batches."""
        first, end = self.step, min(self.epoch * self.loader.steps, self.last_step)
        batches = self.loader.batches(first)
        self.sums, self.waited, begin = {}, 0.0, time.perf_counter()
        # Reading values waits for the GPU, so there it is done for several steps at once.
        every = self.cfg.accumulate * (1 if self.device.type == "cpu" else 20)
        title = f"epoch {self.epoch}/{self.cfg.epochs}"
        with tqdm(total=end - first, desc=title, disable=True if self.rank > 0 else None) as bar:
            while self.step < end:
                yield self._micro_batches(batches)
                self.step += 1
                bar.update()
                if self.step == end or len(self.pending) >= every:
                    loss, seconds = self._read_pending(), time.perf_counter() - begin
                    images = (self.step - first) * self.cfg.batch_size
                    self.speed = {"images_per_s": round(images / seconds, 1),
                                  "data_wait": round(self.waited / seconds, 4)}  # fmt: skip
                    bar.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr:.2e}", **self.speed)

    def _micro_batches(self, batches: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        for micro in range(self.cfg.accumulate):
            self.micro, begin = micro, time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            yield batch

    def set_lr(self, optimizer, floor: float = 0.0, lr: float | None = None) -> None:
        """This step's learning rate, times a group's own "lr_scale" if it has one: warm-up and
        cosine, or `lr`."""
        schedule = warmup_cosine(self.step, self.total, self.warmup, self.peak_lr, floor)
        self.lr = schedule if lr is None else lr
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    @contextmanager
    def forward(self, *models: nn.Module):
        """Around the forward passes and losses of a micro-batch: seeds, autocast, and no exchange
        of the models' gradients before the last micro-batch of a step."""
        number = self.rank * self.cfg.accumulate + self.micro
        torch.manual_seed(random_seed("model", self.cfg.seed, self.step, number))
        last = self.micro == self.cfg.accumulate - 1
        with ExitStack() as stack:
            for model in () if last or self.world == 1 else models:
                stack.enter_context(model.no_sync())
            stack.enter_context(self.autocast())
            yield

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor, **options) -> None:
        self.scaler.scale(loss / self.cfg.accumulate).backward(**options)

    def update(self, *optimizers, log_norms: tuple[str, ...] = ()) -> None:
        """Clip, step, and clear the gradients. `log_norms`: names, one per optimiser, under which
        the norms of the gradients before clipping are logged."""
        for optimizer, name in itertools.zip_longest(optimizers, log_norms):
            if self.cfg.clip_grad is not None or name:
                self.scaler.unscale_(optimizer)
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = nn.utils.get_total_norm([p.grad for p in parameters])
                if self.cfg.clip_grad is not None:
                    nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip_grad, norm)
                # In fp16 a norm that is not finite is normal: the scaler skips that step.
                if name and not (self.scaler.is_enabled() and not norm.isfinite()):
                    self.log(**{name: norm})
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def log(self, **values: Tensor) -> None:
        """Scalars of a micro-batch, with `loss`, the total; metrics.jsonl has their means."""
        self.pending.append((self.step, {name: x.detach() for name, x in values.items()}))

    def _read_pending(self) -> float:
        """Add pending values to the epoch's sums; stop if one is not finite. Mean loss so far."""
        flat = torch.stack([x.float() for _, values in self.pending for x in values.values()])
        numbers = iter(flat.tolist())
        for step, values in self.pending:
            row = {name: next(numbers) for name in values}
            if not all(map(math.isfinite, row.values())):
                terms = ", ".join(f"{name} {x:g}" for name, x in row.items())
                last = f"last good checkpoint: {self.checkpoint} (--init-from it, with a new --out)"
                last = last if self.checkpoint.exists() else "no checkpoint yet"
                raise UserError(
                    f"not finite in step {step + 1}: {terms} (lr {self.lr:.3g}, {self.precision}); "
                    f"{last}; try a lower --lr, --clip-grad 1 or --precision fp32"
                )
            for name, x in row.items():
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = (total + x, count + 1)
        self.pending = []
        total, count = self.sums["loss"]
        return total / count

    def due(self, every: int) -> bool:
        """At an epoch's end: is it the turn of what is done every so many epochs and at the end?"""
        return every > 0 and (self.step >= self.last_step or self.epoch % every == 0)

    def end_epoch(self, encoder: ViT | None = None, picture=None, **results: float) -> None:
        """Log the epoch, with `results` if any; measure kNN and draw the picture if they are due;
        save the checkpoint and the encoder. `picture()` gives the rows of `save_grid`."""
        cfg = self.cfg
        means = [total / count for total, count in self.sums.values()]
        means = torch.tensor(means, device=self.device) / self.world
        if self.world > 1:
            dist.all_reduce(means)
        metrics = {"epoch": self.epoch, "step": self.step}
        metrics |= dict(zip(self.sums, means.tolist(), strict=True))
        metrics |= {"lr": self.lr, **self.speed, **results}
        if self.val is not None and self.due(cfg.knn_every):
            self.knn_after = self.knn(encoder)
            metrics |= self.knn_after
        if self.rank > 0:
            return
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        self.print("  ".join(words))
        config = dataclasses.asdict(cfg)
        state = {"script": self.script, "config": config, "identity": self.identity,
                 "step": self.step, "epoch": self.epoch, "knn_before": self.knn_before,
                 "scaler": self.scaler.state_dict()}  # fmt: skip
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        lines = [*self._earlier_metrics(), json.dumps(metrics)]
        self._write_text("metrics.jsonl", "\n".join(lines))
        if encoder:
            save_encoder(self.folder / "encoder.pt", encoder, config)
        # After encoder.pt, so that whatever a kill leaves undone is done again after resuming.
        write_atomically(self.checkpoint, lambda file: torch.save(state, file), keep=self.previous)
        if picture and self.due(cfg.recon_every):
            torch.manual_seed(random_seed("picture", cfg.seed))  # the same masks every time
            save_grid(self.folder / f"recon_{self.epoch:04d}.png", picture())

    def _earlier_metrics(self) -> list[str]:
        """Lines of metrics.jsonl before this step: a resumed run repeats what it logged since."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        with suppress(ValueError, KeyError, TypeError):  # lines that are not ours
            lines = [line for line in lines if json.loads(line)["step"] < self.step]
        return lines

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda file: file.write(f"{text}\n".encode()))

    def knn(self, encoder: ViT) -> dict[str, float]:
        """A monitor: top-1 in % of weighted 20-NN on the cls feature, and of the nearest neighbour,
        1000 validation images among 5000 training images. eval_linear.py --mode knn uses all."""
        sets = []
        for images, limit in ((self.loader.images, 5000), (self.val, 1000)):
            batches = eval_batches(images, self.cfg.img_size, self.device, limit, self.cfg.workers)
            with self.autocast():
                features, labels = map(gather_rows, extract_features(encoder, batches))
            sets += [features[labels >= 0], labels[labels >= 0]]
        train_features, train_labels, features, labels = sets
        ks = {"knn": 20, "retrieval_1nn": 1}
        scores = {x: knn_scores(train_features, train_labels, features, k) for x, k in ks.items()}
        return {x: accuracy(score, labels)["top1"] for x, score in scores.items()}

    def finish(self) -> None:
        """Say what was left out, what came out, and what to do next."""
        images = self.loader.images
        if skipped := int(images.unreadable.sum()):
            self.print(f"skipped {skipped} unreadable of {len(images)} images; others stood in")
        for result, name in (("knn", "kNN top-1"), ("retrieval_1nn", "1-NN retrieval")):
            if self.knn_after:
                before = self.knn_before and f" (before training {self.knn_before[result]:.1f})"
                self.print(f"{name} {self.knn_after[result]:.1f}{before or ''}")
        self.print(f"pictures, logs and encoder.pt are in {self.folder}")
        if self.val is not None:
            self.print(f"next: python eval_linear.py {self.folder} --baseline")
