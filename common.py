"""What masked image modelling methods share: ViT, masking, data, and the plumbing of a training run.

This file knows no paper. Copy it together with one script (`mae_perceptual.py`, …) into your own project.

    ViT and masking   sincos_2d, patchify, unpatchify, random_masking, masked_mse, ViT, Decoder, load_encoder
    Data              Images (shapes, torchvision sets, folders), train_batches, eval_batches
    Settings          Config, parse
    A training run    Run: device, processes, run folder, exact resume, logs; schedules, parameter groups, kNN

Conventions. Images are (B, C, H, W); tokens are (B, 1+n, D) with the cls token first; `visible` (B, n) holds the indices
of the kept patches and `mask` (B, L) is True where a patch is hidden. Patches run row by row over the h x w grid.
Pixels are uint8 until `normalize`, the one place that turns them into network input (ImageNet mean and std).
"""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
import typing
import zlib
from contextlib import contextmanager, nullcontext
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
    """A mistake that the user can mend. `entry_point` shows it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------- ViT and masking

VIT_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


def patch_grid(img_size, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid; `img_size` is an int or (H, W). UserError if the patch does not fit."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if patch_size < 1 or min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise UserError(f"image size {height}x{width} is not divisible by the patch size {patch_size}")
    return height // patch_size, width // patch_size


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (L, dim) of an h x w grid, as MAE: the first half of the channels
    encodes the column, the second the row; each half is [sin, cos] at the frequencies 10000^(-i / (dim/4))."""
    if dim % 4:
        raise UserError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns))  # (h|w, dim/2)
    h, w = grid
    embedding = torch.cat([columns.expand(h, w, -1), rows[:, None].expand(h, w, -1)], dim=2)
    return embedding.reshape(h * w, dim).float()


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C); within a patch the order is row, column, channel."""
    b, c, height, width = imgs.shape
    h, w = patch_grid((height, width), patch_size)
    x = imgs.reshape(b, c, h, patch_size, w, patch_size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, h * w, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """(B, L, p*p*C) -> (B, C, H, W), the inverse of `patchify`."""
    h, w = grid
    x = patches.reshape(-1, h, w, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, h * patch_size, w * patch_size)


def random_masking(batch, num_patches, mask_ratio, device=None, generator=None) -> tuple[Tensor, Tensor]:
    """Keep a uniformly random subset of int(L * (1 - mask_ratio)) patches of each image.

    Returns visible (B, keep) int64, in random order, and mask (B, L) bool, True = hidden.
    UserError if no patch would be kept, or none hidden."""
    keep = int(num_patches * (1 - mask_ratio))
    if not 0 < keep < num_patches:
        raise UserError(f"mask ratio {mask_ratio} keeps {keep} of {num_patches} patches; need at least one kept, one hidden")
    noise = torch.rand(batch, num_patches, device=device, generator=generator)
    visible = noise.argsort(dim=1)[:, :keep]
    mask = torch.ones(batch, num_patches, dtype=torch.bool, device=device).scatter_(1, visible, False)
    return visible, mask


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D), index (B, n) -> (B, n, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, L, 1) of each patch, as in MAE's normalised target: unbiased variance, 1e-6 inside the root."""
    mean = patches.mean(dim=-1, keepdim=True)
    return mean, (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """MAE's loss: squared error, mean over the pixels of a patch, then over the hidden patches (scalar, fp32).

    pred, target (B, L, p*p*C); mask (B, L) True = hidden. With `normalize`, the target is each patch minus its mean,
    over its std, so that the loss lives in units of a patch's own contrast; otherwise in those of `target`."""
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

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, n, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth: each residual branch of an image is dropped with
    probability `drop_path` in training."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + torchvision.ops.stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + torchvision.ops.stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers, zero biases, unit LayerNorm. For `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """(1, 1+L, dim), the cls row zero. A frozen parameter, so that it travels in state_dict and can be unfrozen."""
    return nn.Parameter(F.pad(sincos_2d(dim, grid), (0, 0, 1, 0))[None], requires_grad=False)


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel is a linear layer on patches; as one, it need not touch hidden patches.
    The weight keeps the convolution's shape (D, C, p, p), which is what everyone's checkpoints have."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:  # (B, n, p*p*C) -> (B, n, D)
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision transformer encoder. Parameter names and outputs are those of timm's VisionTransformer (num_classes=0);
    initialisation and fixed sin-cos positions are those of MAE. `img_size` is an int or (H, W), in pixels."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12,
                 mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"width {embed_dim} is not divisible by {num_heads} heads")
        self.settings = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
                             depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)  # all that rebuilds this ViT
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = fixed_positions(embed_dim, self.grid)
        self.blocks = nn.ModuleList(  # drop path grows linearly with depth
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def embed(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> tokens with positions (B, 1+n, D), cls first; only the `visible` (B, n) patches if given."""
        expected = (self.in_chans, self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        if imgs.shape[1:] != expected:
            raise UserError(f"this ViT takes images (channels, height, width) of {expected}, not {tuple(imgs.shape[1:])}")
        patches = patchify(imgs, self.patch_size)
        positions = self.pos_embed[:, 1:].expand(len(imgs), -1, -1)
        if visible is not None:
            patches, positions = take_tokens(patches, visible), take_tokens(positions, visible)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def forward(self, imgs: Tensor, visible: Tensor | None = None) -> Tensor:
        """imgs (B, C, H, W), visible (B, n) int64 or None for all -> (B, 1+n, D) after the final norm."""
        x = self.embed(imgs, visible)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: a learned mask token at hidden positions, transformer blocks, one linear layer to pixels.
    `encoder` gives the input width, the grid, the patch size and the channels."""

    def __init__(self, encoder: ViT, dim: int = 512, depth: int = 8, num_heads: int = 16, mlp_ratio: float = 4.0):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"decoder width {dim} is not divisible by {num_heads} heads")
        self.embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = fixed_positions(dim, encoder.grid)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, encoder.patch_size**2 * encoder.in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """tokens (B, 1+n, D) of the encoder, visible (B, n) -> (B, L, p*p*C): every patch, visible ones too."""
        x = self.embed(tokens)
        b, _, d = x.shape
        full = self.mask_token.to(x.dtype).expand(b, self.pos_embed.shape[1] - 1, d)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, d), x[:, 1:])
        x = torch.cat([x[:, :1], full], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x)[:, 1:])


# ---------------------------------------------------------------------------------------- data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set
RESIDENT_BYTES = 4 << 30  # a set of equally sized images up to this size is decoded once and kept on the device
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SHAPES = ("disk", "ring", "square", "triangle", "star", "cross", "crescent", "bar", "heart", "corner")


def normalize(imgs: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255, uint8 or float -> float network input."""
    mean, std = (torch.tensor(x, device=imgs.device).view(1, 3, 1, 1) * 255 for x in (MEAN, STD))
    return (imgs.float() - mean) / std


def denormalize(imgs: Tensor) -> Tensor:
    """Network input -> RGB in 0..1, clipped."""
    mean, std = (torch.tensor(x, device=imgs.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (imgs.float() * std + mean).clamp(0, 1)


def random_seed(*keys: int | str) -> int:
    """One well-mixed seed from several keys, such as ("crop", seed, epoch, step)."""
    numbers = [zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeded(*keys: int | str, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(random_seed(*keys))


def draw_shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Procedural images (count, 3, size, size) uint8 and their classes (count,) int64, indices into SHAPES.

    One shape per image. Place, size, rotation, colours and the textures of shape and background are random and
    independent of the class, so that only the outline tells it."""
    g = seeded("shapes", seed)
    labels = torch.randint(len(SHAPES), (count,), generator=g)
    # Columns: centre x, y; radius; rotation; hue, value and two free numbers; texture numbers of background and shape.
    numbers = torch.rand(count, 22, generator=g)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    chunk = max(1, (1 << 19) // size**2)  # small enough for the processor's cache
    for kind in range(len(SHAPES)):
        for index in (labels == kind).nonzero()[:, 0].split(chunk):
            r = numbers[index, :, None, None]
            images[index] = _draw(kind, x, y, r, 2 / size).mul_(255).add_(0.5).to(torch.uint8)
    return images, labels


def _draw(kind: int, x: Tensor, y: Tensor, r: Tensor, pixel: float) -> Tensor:
    """x, y (S, S) in -1..1; r (n, 22, 1, 1) uniform numbers -> (n, 3, S, S) in 0..1."""
    radius, angle = 0.7 + 0.3 * r[:, 2], r[:, 3] - 0.5
    dx, dy = (x - (r[:, 0] - 0.5) * 0.3) / radius, (y - (r[:, 1] - 0.5) * 0.3) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    a, b = u.abs(), v.abs()
    outside = {  # about the distance to the outline, in radii; negative inside
        "disk": lambda: (u * u + v * v).sqrt() - 0.85,
        "ring": lambda: ((u * u + v * v).sqrt() - 0.72).abs() - 0.22,
        "square": lambda: torch.maximum(a, b) - 0.75,
        "triangle": lambda: torch.maximum(v, a * 0.866 - v * 0.5) - 0.5,
        "star": lambda: (u * u + v * v).sqrt() - 0.68 - 0.32 * torch.sin(5 * torch.atan2(v, u)),
        "cross": lambda: torch.minimum(torch.maximum(a - 0.95, b - 0.3), torch.maximum(b - 0.95, a - 0.3)),
        "crescent": lambda: torch.maximum((u * u + v * v).sqrt() - 0.9, 0.75 - ((u - 0.5) ** 2 + v * v).sqrt()),
        "bar": lambda: torch.maximum(a - 1.0, b - 0.32),
        "heart": lambda: ((u * u + (v + 0.15 - 0.75 * a.sqrt()) ** 2).sqrt() - 0.8),
        "corner": lambda: torch.maximum(torch.maximum(a, b) - 0.8, torch.minimum(u, v) + 0.15),
    }[SHAPES[kind]]()
    cover = (0.5 - outside * radius / pixel).clamp_(0, 1)[:, None]  # one pixel of anti-aliasing

    def paint(hue: Tensor, value: Tensor, t: Tensor) -> Tensor:
        """Two related colours mixed by a texture: stripes, plaids, slow gradients or checks, soft or sharp."""
        k1, k2 = 9 * t[:, 0] ** 2, 9 * t[:, 1] ** 2
        p1, p2 = 6.3 * t[:, 2], 6.3 * t[:, 3]
        wave = torch.sin(k1 * (x * p1.cos() + y * p1.sin()) + 6.3 * t[:, 4])
        wave += (t[:, 5] > 0.5) * torch.sin(k2 * (x * p2.cos() + y * p2.sin()) + 6.3 * t[:, 6])
        mix = torch.sigmoid_((1 + 5 * t[:, 7]) * wave)[:, None]
        thirds = torch.arange(3).view(1, 3, 1, 1) / 3
        c1, c2 = (0.5 + 0.5 * torch.cos(2 * math.pi * (hue + shift + thirds)) for shift in (0.0, 0.12))
        return torch.lerp(c1 * value, 0.25 + 0.6 * c2 * value, mix)

    dark, bright = 0.35 + 0.25 * r[:, 5:6], 0.8 + 0.2 * r[:, 5:6]
    swap = r[:, 6:7] > 0.5  # the shape is the darker one in half the images
    back = paint(r[:, 4:5], torch.where(swap, bright, dark), r[:, 6:14])
    front = paint(r[:, 4:5] + 0.3 + 0.4 * r[:, 13:14], torch.where(swap, dark, bright), r[:, 14:22])
    return torch.lerp(back, front, cover)


def sample_crops(count: int, height: int, width: int, scale, ratio=(3 / 4, 4 / 3), device=None, generator=None) -> Tensor:
    """RandomResizedCrop boxes (count, 4) int64, columns top, left, h, w in pixels: the distribution of torchvision's
    RandomResizedCrop.get_params, for a whole batch. Area is uniform in `scale`, aspect log-uniform in `ratio`; the first
    of 10 tries that fits is taken, else the largest central crop whose aspect is within `ratio`."""
    u = torch.rand(4, count, 10, device=device, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w, u_top, u_left = (x.gather(1, first)[:, 0] for x in (h, w, u[2], u[3]))
    top, left = (u_top * (height - h + 1)).long(), (u_left * (width - w + 1)).long()
    central_w, central_h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    central = ((height - central_h) // 2, (width - central_w) // 2, central_h, central_w)
    boxes = torch.stack([top, left, h, w], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, torch.tensor(central, device=device))


def crop_resize(imgs: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Cut a box of its own from each image and resize it to size x size: anti-aliased bicubic, as
    `interpolate(crop, mode="bicubic", antialias=True)` on each, but the whole batch at once.

    imgs (B, C, H, W) uint8 or float; boxes (B, 4) as `sample_crops`; flip (B,) bool mirrors left-right.
    Returns float (B, C, size, size), not clamped: bicubic overshoots. Resampling is linear and separable, so it
    is one matrix per image and axis."""
    top, left, h, w = boxes.unbind(1)
    rows = _bicubic_matrix(top, h, imgs.shape[2], size)
    columns = _bicubic_matrix(left, w, imgs.shape[3], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    b, c, height, width = imgs.shape
    x = torch.bmm(imgs.float().reshape(b, c * height, width), columns.transpose(1, 2))  # (B, C*H, size)
    x = x.view(b, c, height, size).transpose(1, 2).reshape(b, height, c * size)
    return torch.bmm(rows, x).view(b, size, c, size).transpose(1, 2)


def _bicubic_matrix(start: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """(B,) start and length of a crop -> (B, n_out, n_in) weights of Keys' cubic (a = -1/2), widened when shrinking."""
    scale = (length / n_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(n_out, device=start.device) + 0.5)[:, None] * scale
    pixel = torch.arange(n_in, device=start.device)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weight = weight * ((pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None]))
    return weight / weight.sum(dim=2, keepdim=True)


def read_image(path: Path) -> Image.Image | None:
    """RGB image; None, with a warning that names the file, where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise anything from OSError to SyntaxError on damaged files
        print(f"warning: skipping unreadable image {path}: {error}", file=sys.stderr, flush=True)
        return None


def git_hash() -> str:
    """Short hash of the checkout that this file lies in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Images:
    """One split of a data set: `labels` (N,) int64, -1 where unknown; the names of the `classes`, empty if unlabelled;
    and either `pixels` (N, 3, H, W) uint8 in memory, on the training device, or `paths` to decode when needed."""

    def __init__(self, labels: Tensor, classes: list[str], pixels: Tensor | None = None, paths: list[Path] | None = None):
        self.labels, self.classes, self.pixels, self.paths = labels, classes, pixels, paths
        # Shared with the loader's workers, so that a broken file is met by all and named once.
        self.unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> tuple[Image.Image, int]:
        """Image and label; an unreadable file is replaced by the next readable one, so that batches keep their size."""
        if self.pixels is not None:
            return v2.functional.to_pil_image(self.pixels[index]), int(self.labels[index])
        for i in (*range(index, len(self)), *range(index)):
            if not self.unreadable[i]:
                image = read_image(self.paths[i])
                if image is not None:
                    return image, int(self.labels[i])
                self.unreadable[i] = True
        raise UserError("no image could be read")


def load_images(name: str, split: str, size: int = 32, data_dir="data", device="cpu") -> Images | None:
    """The `split` ("pretrain": all images for training without labels, "train", "val") of a data set, or None where a
    folder has no such split. `name`: shapes (drawn at `size`), cifar10, cifar100, stl10 (downloaded to `data_dir`),
    or a folder: train/ and val/ with class folders, or any tree of images without labels."""
    if name == "shapes":
        count, seed = (4000, 1) if split == "val" else (20000, 0)
        pixels, labels = draw_shapes(count, size, seed)
        return Images(labels, list(SHAPES), pixels.to(device))
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision_images(name, split, data_dir, device)
    return _folder_images(Path(name), split, device)


def pretraining_images(cfg, device) -> tuple[Images, Images | None]:
    """Training images of a method's settings, and validation images if the data set has any."""
    train, val = (load_images(cfg.data, s, cfg.img_size, cfg.data_dir, device) for s in ("pretrain", "val"))
    if cfg.knn_every and (val is None or not train.classes):
        raise UserError(f"--knn-every: {cfg.data} has no labels; they need train/ and val/ with class folders")
    return train, val


def _torchvision_images(name: str, split: str, data_dir, device) -> Images:
    sets = torchvision.datasets
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()  # rank 0 downloads, the others wait and then read
    try:
        if name == "stl10":
            part = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            data = sets.STL10(data_dir, split=part, download=True)
            pixels, labels = torch.from_numpy(data.data), torch.as_tensor(data.labels).long()
        else:
            data = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[name](data_dir, train=split != "val", download=True)
            pixels, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.as_tensor(data.targets).long()
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not get {name}: {error}; give its place with --data-dir, or a folder with --data") from error
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return Images(labels, list(data.classes), pixels.contiguous().to(device))


def _folder_images(root: Path, split: str, device) -> Images | None:
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder, nor one of shapes, cifar10, cifar100, stl10")
    folder = root
    if (root / "train").is_dir():
        folder = root / ("val" if split == "val" else "train")
    elif split == "val":
        return None
    if not folder.is_dir():
        return None
    paths = sorted(
        Path(parent) / file
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise UserError(f"no images under {folder}; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    parents = [path.relative_to(folder).parts[:-1] for path in paths]
    classes = []
    if folder != root and all(parents):  # train/ or val/, every image in a class folder
        classes = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    if unknown := sorted({parts[0] for parts in parents} - number.keys()) if classes else []:
        raise UserError(f"{folder} has class folders that {root / 'train'} lacks: {', '.join(unknown[:5])}")
    labels = torch.tensor([number[parts[0]] if classes else -1 for parts in parents])
    images = Images(labels, classes, paths=paths)
    return _decode_all(images, device) or images


def _decode_all(images: Images, device) -> Images | None:
    """The same images in memory; None where they differ in size or are too many. Unreadable ones are left out."""
    pixels = None
    for i, path in enumerate(images.paths):
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
        raise UserError(f"none of the {len(images)} images could be read, the first is {images.paths[0]}")
    if images.unreadable.any():
        keep = ~images.unreadable
        print(f"left out {int(images.unreadable.sum())} unreadable of {len(keep)} images", file=sys.stderr)
        return Images(images.labels[keep], images.classes, pixels[keep].to(device))
    return Images(images.labels, images.classes, pixels.to(device))


class _Decoding(torch.utils.data.Dataset):
    """What a DataLoader's workers do: decode, `transform` (PIL -> PIL), return uint8. Keys are (epoch, index)."""

    def __init__(self, images: Images, transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        torch.manual_seed(random_seed("image", self.seed, epoch, index))
        image, label = self.images.pil(index)
        return v2.functional.pil_to_tensor(self.transform(image)), label


class TrainLoader:
    """Epochs in random order, as micro-batches of (normalised images, labels) for this process, on its device.

    A global batch is cut into world x accumulate micro-batches; number j of them depends on (seed, epoch, step, j)
    alone, so that 2 processes and 1 process with --accumulate 2 see the same images. Images in memory are cropped and
    flipped on the device, a batch at a time; files are decoded by workers, where `transform` (PIL -> PIL; default: the
    same crop and flip) runs. The last incomplete batch of an epoch is dropped."""

    def __init__(self, images: Images, cfg, run: "Run", size: int, transform=None):
        self.images, self.cfg, self.run, self.size = images, cfg, run, size
        self.steps = len(images) // cfg.batch_size
        if self.steps == 0:
            raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(images)} images of {cfg.data}")
        self.workers = None
        if images.paths is not None or transform is not None:
            crop = v2.RandomResizedCrop(size, (cfg.min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
            self.workers = torch.utils.data.DataLoader(
                _Decoding(images, transform or v2.Compose([crop, v2.RandomHorizontalFlip()]), cfg.seed),
                batch_sampler=_Keys(self), num_workers=cfg.workers, persistent_workers=cfg.workers > 0,
                pin_memory=run.device.type == "cuda",
            )

    def batches(self, step: int):
        """Iterator over the micro-batches of the epoch in which global step `step` lies, beginning with that step."""
        self.epoch, self.first_step = divmod(step, self.steps)
        if self.workers is None:
            return map(self.crop, self.micro_batches())
        device = self.run.device
        return ((normalize(imgs.to(device, non_blocking=True)), labels.to(device)) for imgs, labels in self.workers)

    def micro_batches(self):
        """Yields (step in the epoch, j, image indices) of this process."""
        run, cfg = self.run, self.cfg
        order = torch.randperm(len(self.images), generator=seeded("order", cfg.seed, self.epoch))
        for step in range(self.first_step, self.steps):
            parts = order[step * cfg.batch_size : (step + 1) * cfg.batch_size].split(run.micro_batch)
            for j in range(run.rank * cfg.accumulate, (run.rank + 1) * cfg.accumulate):
                yield step, j, parts[j]

    def crop(self, micro_batch) -> tuple[Tensor, Tensor]:
        step, j, index = micro_batch
        device = self.run.device
        g = seeded("crop", self.cfg.seed, self.epoch, step, j, device=device)
        imgs = self.images.pixels[index.to(device)]
        boxes = sample_crops(len(imgs), *imgs.shape[2:], (self.cfg.min_crop, 1.0), device=device, generator=g)
        flip = torch.rand(len(imgs), device=device, generator=g) < 0.5
        return normalize(crop_resize(imgs, boxes, self.size, flip).clamp_(0, 255)), self.images.labels[index].to(device)


class _Keys:
    """Batch sampler of a TrainLoader's DataLoader: lists of (epoch, index)."""

    def __init__(self, loader: TrainLoader):
        self.loader = loader

    def __iter__(self):
        for _, _, index in self.loader.micro_batches():
            yield [(self.loader.epoch, i) for i in index.tolist()]


def eval_batches(images: Images, size: int, device, limit: int | None = None, workers: int = 0):
    """Yields (normalised images, labels) in order, with the test-time crop: shorter side to size * 256/224, bicubic, then
    the central size x size; images of exactly that size stay whole. At most `limit` images, evenly spaced. Under
    torchrun each process gets its share; `gather_rows` brings results together."""
    batch_size = 500
    index = torch.linspace(0, len(images) - 1, min(limit or len(images), len(images))).round().long()
    if dist.is_initialized():
        index = index[dist.get_rank() :: dist.get_world_size()]
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.Compose([v2.Resize(round(size * 256 / 224), interpolation=bicubic), v2.CenterCrop(size)])
    if images.pixels is not None:
        whole = tuple(images.pixels.shape[2:]) == (size, size)
        for part in index.split(batch_size):
            imgs = images.pixels[part.to(images.pixels.device)].to(device)
            yield normalize(imgs if whole else crop(imgs)), images.labels[part].to(device)
        return
    loader = torch.utils.data.DataLoader(
        _Decoding(images, crop, seed=0), sampler=[(0, i) for i in index.tolist()], batch_size=batch_size, num_workers=workers
    )
    for imgs, labels in loader:
        yield normalize(imgs.to(device)), labels.to(device)


# ---------------------------------------------------------------------------------------- settings


@dataclass
class TrainConfig:
    """Settings of any training run. A trailing comment is the flag's --help text."""

    data: str = "shapes"  # shapes, cifar10, cifar100, stl10, or a folder: train/ and val/, or any images
    data_dir: str = "data"  # where cifar10, cifar100 and stl10 are downloaded to
    min_crop: float = 0.2  # smallest area of a random crop, as a share of the image
    epochs: int = 10  # length of the schedule; the learning rate ends at its lowest
    steps: int | None = None  # stop after this many optimiser steps, all files written; rerun to go on
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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
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
    """Settings that every pre-training method has."""

    img_size: int = 32  # side of the training crops in pixels; a multiple of the patch size
    patch_size: int = 4  # side of a patch in pixels: 16 at 224 px, 4 at 32 px
    size: Literal["tiny", "small", "base", "large", "huge"] = "tiny"  # width, depth and heads of the ViT
    depth: int | None = None  # encoder blocks, if not those of --size; fewer is faster
    mask_ratio: float = 0.75  # share of hidden patches
    init_from: str | None = None  # start from encoder.pt, checkpoint.pt, or a published MAE or timm file
    knn_every: int = 0  # kNN accuracy every so many epochs and at the end; 0 for never; needs labels
    recon_every: int = 10  # reconstruction picture every so many epochs and at the end

    def check(self) -> None:
        super().check()
        check_numbers(self, 1, "img_size", "patch_size", "depth", "recon_every")
        check_numbers(self, 0, "knn_every")
        h, w = patch_grid(self.img_size, self.patch_size)
        if not 0 < self.mask_ratio < 1 or not 0 < int(h * w * (1 - self.mask_ratio)) < h * w:
            raise UserError(
                f"--mask-ratio {self.mask_ratio} must leave some of the {h * w} patches visible and hide some"
            )
        if self.init_from and not Path(self.init_from).is_file():
            raise UserError(f"--init-from {self.init_from}: no such file")

    def vit(self) -> "ViT":
        """The encoder of these settings."""
        size = VIT_SIZES[self.size] | ({"depth": self.depth} if self.depth else {})
        return ViT(self.img_size, self.patch_size, **size)


# Fields that may change when a run is resumed: they say where and how it runs, not what it computes.
RESUMABLE = {"out", "restart", "steps", "data_dir", "workers", "device", "compile", "knn_every", "recon_every"}


def check_numbers(cfg, least: float, *names: str) -> None:
    """UserError unless each named field is None or a finite number >= `least`."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not least <= value < math.inf:
            limit = f"at least {least}" if least in (0, 1) else "above 0"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None = None):
    """Command line -> Config. Flags come from the dataclass's fields, their help from the trailing comments; a field
    without default is positional. --preset (the first one by default) gives defaults for the other flags.
    A mistake ends the program with one line and exit code 2."""
    script = Path(inspect.getfile(config_class)).stem
    help_texts = {}
    for base in reversed(config_class.__mro__[:-1]):
        help_texts |= dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(base), re.MULTILINE))

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{script}: error: {message}; see --help\n")

    parser = Parser(
        prog=f"{script}.py", description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )
    if presets:
        parser.add_argument("--preset", choices=presets, help="a full set of defaults; other flags override it")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, optional = hints[field.name], type(None) in typing.get_args(hints[field.name])
        if optional:
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        text = help_texts.get(field.name, "").replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, help=text)
            continue
        values = {name: preset.get(field.name, field.default) for name, preset in presets.items()} or {"": field.default}
        shown = ", ".join(f"{k} {v}" for k, v in values.items()) if len({*values.values()}) > 1 else [*values.values()][0]
        arguments = {"help": f"{text} [{shown}]" if shown is not None else text}
        if typing.get_origin(kind) is Literal:
            arguments["choices"] = typing.get_args(kind)
        elif kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = kind
            arguments["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        parser.add_argument("--" + field.name.replace("_", "-"), **arguments)
    values = vars(parser.parse_args(argv))
    preset = values.pop("preset", next(iter(presets), None))
    cfg = config_class(**(presets.get(preset, {}) | values))
    if "out" in hints and cfg.out is None and preset:
        cfg.out = f"runs/{script}-{preset}"
    try:
        cfg.check()
    except UserError as error:
        parser.error(str(error))
    return cfg


def entry_point(main):
    """Decorator of a script's main(cfg): a UserError becomes one line and exit code 2; processes are wound up."""

    @functools.wraps(main)
    def wrapped(cfg):
        try:
            main(cfg)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
            sys.exit(130)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


def read_checkpoint(path) -> dict:
    """torch.load of tensors and primitives on the CPU; UserError if the file is missing, truncated or no checkpoint."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # zip, pickle and storage errors of many types
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def split_weights(path) -> tuple[dict, dict, dict]:
    """(encoder weights, decoder weights, ViT settings) of a file: our encoder.pt or checkpoint.pt, or a dict in the flat
    layout of timm and of the published MAE checkpoints, whose classification head, if any, is left out."""
    loaded = read_checkpoint(path)
    weights = loaded.get("model", loaded)
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise UserError(f"{path} holds no weights")
    encoder, decoder = {}, {}
    for name, value in weights.items():
        if name.startswith("encoder."):
            encoder[name.removeprefix("encoder.")] = value
        elif name.startswith(("decoder.", "decoder_")):
            decoder[name[len("decoder_") :]] = value
        elif name == "mask_token":
            decoder[name] = value
        elif not name.startswith("head."):
            encoder[name] = value
    if missing := [k for k in ("patch_embed.proj.weight", "pos_embed") if k not in encoder]:
        raise UserError(f"{path} is not a ViT: missing {', '.join(missing)}")
    if "vit" in loaded:
        return encoder, decoder, loaded["vit"]
    embed_dim, in_chans, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    heads = {size["embed_dim"]: size["num_heads"] for size in VIT_SIZES.values()}.get(embed_dim, embed_dim // 64)
    side = math.isqrt(encoder["pos_embed"].shape[1] - 1) * patch_size  # such files do not say: square images
    settings = dict(img_size=side, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=heads)
    return encoder, decoder, settings


def load_strictly(module: nn.Module, weights: dict, path) -> None:
    """load_state_dict that names every missing, unexpected or misshapen key in one UserError."""
    own = module.state_dict()
    problems = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    problems += [
        f"{k} has shape {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
        for k in own if k in weights and weights[k].shape != own[k].shape
    ]
    if problems:
        raise UserError(f"{path} does not fit this {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(weights)


def save_encoder(path: Path, encoder: ViT, config: dict) -> None:
    """encoder.pt: the weights under timm's names, the numbers that rebuild the ViT, and the run's settings."""
    content = {"model": encoder.state_dict(), "vit": encoder.settings, "config": config}
    write_atomically(path, lambda file: torch.save(content, file))


def load_encoder(path, drop_path: float = 0.0) -> ViT:
    """The ViT of our encoder.pt (or checkpoint.pt), or of a flat timm or published MAE file, whose decoder is ignored.
    Every missing, unexpected or misshapen key is an error."""
    encoder, _, settings = split_weights(path)
    vit = ViT(**settings, drop_path=drop_path)
    load_strictly(vit, encoder, path)
    return vit


def init_from(path, encoder: ViT, decoder: nn.Module) -> None:
    """Load a file's weights into the encoder and, if the file has one, the decoder; all keys must fit."""
    encoder_weights, decoder_weights, _ = split_weights(path)
    load_strictly(encoder, encoder_weights, path)
    if decoder_weights:
        load_strictly(decoder, decoder_weights, path)
    else:
        print(f"{path} has no decoder; the decoder starts from random weights")


# ---------------------------------------------------------------------------------------- a training run


def pick_device(name: str) -> torch.device:
    """The device of this process for --device auto, cpu or cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable CUDA device; --device cpu works everywhere")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def warmup_cosine(step: float, total: float, warmup: float, peak: float, floor: float = 0.0) -> float:
    """Learning rate of a step: linear from 0 to `peak` over `warmup` steps, then half a cosine to `floor` at `total`."""
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices with weight decay, biases and LayerNorm (1-D) without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes, in order of rank; the processes may have different numbers of rows. No gradient."""
    if not dist.is_initialized():
        return x
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(x))
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


@torch.no_grad()
def extract_features(encoder: ViT, loader, pool: str = "cls") -> tuple[Tensor, Tensor]:
    """Features (M, D) fp32 and labels (M,) of all (images, labels) of `loader`, encoder in eval mode, nothing hidden.
    pool: "cls" token, or "mean" of the patch tokens, both after the final norm."""
    training = encoder.training
    encoder.eval()
    features, labels = [], []
    for imgs, label in loader:
        tokens = encoder(imgs).float()
        features.append(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
        labels.append(label)
    encoder.train(training)
    return torch.cat(features), torch.cat(labels)


def knn_scores(train_features, train_labels, test_features, k=20, temperature=0.07, num_classes=None) -> Tensor:
    """Weighted kNN votes (N, num_classes): each of the k nearest training features, by cosine, adds exp(cosine / T) to its
    class (Wu et al. 2018, as used by DINO). train_features (M, D), train_labels (M,), test_features (N, D)."""
    k = min(k, len(train_features))
    num_classes = num_classes or int(train_labels.max()) + 1
    train = F.normalize(train_features, dim=1).T
    scores = []
    for test in test_features.split(max(1, (1 << 26) // train.shape[1])):  # at most 256 MB of similarities at once
        similarity, index = (F.normalize(test, dim=1) @ train).topk(k, dim=1)
        votes = torch.zeros(len(test), num_classes, device=test.device)
        scores.append(votes.scatter_add_(1, train_labels[index], (similarity / temperature).exp()))
    return torch.cat(scores)


def save_grid(path: Path, rows: dict[str, Tensor]) -> None:
    """PNG with one labelled row of images per entry: label -> (N, 3, H, W) in 0..1. Small images are enlarged."""
    side = next(iter(rows.values())).shape[-1]
    zoom, label_height, gap = max(1, 96 // side), 18, 4
    strips = []
    for label, imgs in rows.items():
        tile = torchvision.utils.make_grid(imgs.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), len(imgs), gap, pad_value=1)
        strip = F.pad(tile, (0, 0, label_height, 0), value=1.0)
        picture = v2.functional.to_pil_image(strip)
        ImageDraw.Draw(picture).text((gap, 4), label, fill="black")
        strips.append(v2.functional.pil_to_tensor(picture))
    grid = v2.functional.to_pil_image(torch.cat(strips, dim=1))
    write_atomically(path, lambda file: grid.save(file, format="png"))


def write_atomically(path: Path, write, keep: Path | None = None) -> None:
    """`write(file)` to a temporary name, then rename, so that `path` is whole at every moment; an existing `path` is
    renamed to `keep` first, if given. UserError if the disk is full or the folder cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        raise UserError(f"could not write {path}: {str(error).splitlines()[0]}; what was there before is intact") from error


class Run:
    """One training run: its processes and device, its folder, its random numbers, its logs. A script's loop reads

        for epoch in run.epochs():
            for micro_batches in run.steps():
                for imgs, labels in micro_batches:
                    with run.forward(model):
                        loss = ...
                    run.backward(loss)
                    run.log(loss=loss)
                run.update(optimizer)
            run.end_epoch(...)

    All random numbers of a step derive from (seed, step, rank, micro-batch) when the step begins, so a run that is
    stopped and resumed repeats the uninterrupted one; on the CPU, bit for bit."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.script = Path(inspect.getfile(type(cfg))).name
        self.folder = Path(cfg.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if cfg.batch_size % (self.world * cfg.accumulate):
            raise UserError(
                f"--batch-size {cfg.batch_size} is not divisible by {self.world} processes x --accumulate {cfg.accumulate}"
            )
        self.micro_batch = cfg.batch_size // (self.world * cfg.accumulate)
        self.device = pick_device(cfg.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.precision = cfg.precision
        if cfg.precision == "auto":
            self.precision = "fp32" if self.device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        torch.set_float32_matmul_precision("high")  # fp32 matrix products may use TF32
        torch.manual_seed(random_seed("init", cfg.seed))
        self.step, self.micro, self.lr = 0, 0, 0.0
        self.knn_before = self.knn_after = None
        self.pending, self.sums = [], {}

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in the loop: compiled in place, with gradients averaged over processes."""
        if self.cfg.compile:
            model.compile()  # in place: state_dict keeps its names
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)

    def start(self, loader: TrainLoader, val: Images | None = None, **parts) -> None:
        """Take the data and everything that has a state (model=…, optimizer=…), restore it from the folder's checkpoint
        if there is one, and print what is about to happen."""
        cfg, self.loader, self.val, self.parts = self.cfg, loader, val, parts
        self.last_step = min(cfg.steps or math.inf, cfg.epochs * loader.steps)
        self.checkpoint, self.previous = self.folder / "checkpoint.pt", self.folder / "checkpoint.prev.pt"
        if self.world > 1:
            dist.barrier()  # nobody writes before all have looked
        if cfg.restart and self.rank == 0:
            for path in (self.checkpoint, self.previous, self.folder / "metrics.jsonl"):
                path.unlink(missing_ok=True)
        if not cfg.restart:
            self._resume()
        if self.world > 1:
            dist.barrier()
        self.warmup_steps = min(cfg.warmup_epochs, cfg.epochs / 5) * loader.steps
        self.peak_lr = cfg.lr if cfg.lr is not None else cfg.base_lr * cfg.batch_size / 256
        parameters = sum(p.numel() for p in parts["model"].parameters())
        lr = f"lr {self.peak_lr:.3g}" + ("" if cfg.lr is not None else f" = {cfg.base_lr:g} x {cfg.batch_size} / 256")
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        self.print(
            f"{self.script}: {parameters / 1e6:.2f} M parameters · {where} · {self.precision} · torch {torch.__version__} · git {git_hash()}\n"
            f"data    {cfg.data}: {len(loader.images)} images = {loader.steps} steps an epoch, {cfg.epochs * loader.steps} steps in {cfg.epochs} epochs\n"
            f"batch   {cfg.batch_size} = {self.world} processes x {cfg.accumulate} accumulated x {self.micro_batch}\n"
            f"rate    {lr}, warm-up {self.warmup_steps:g} steps, cosine to 0\n"
            f"folder  {self.folder}" + (f", resuming after step {self.step}" if self.step else "")
        )
        if self.step >= self.last_step:
            self.print(f"nothing left to do: step {self.step} is done; --restart starts over")
        if val is not None and cfg.knn_every and self.step == 0:
            self.knn_before = self.knn(parts["model"].encoder)

    def _resume(self) -> None:
        path = self.checkpoint if self.checkpoint.exists() else self.previous
        if not path.exists():
            return
        try:
            state = read_checkpoint(path)
        except UserError as error:
            hint = f"{self.previous.name} is the one before, rename it to go on from there, or " if self.previous.exists() else ""
            raise UserError(f"{error}; {hint}start over with --restart") from None
        if state.get("script") != self.script:
            raise UserError(f"{path} was written by {state.get('script', 'another program')}, not {self.script}; choose another --out")
        mine, theirs = ({k: v for k, v in c.items() if k not in RESUMABLE} for c in (dataclasses.asdict(self.cfg), state["config"]))
        if differ := [k for k in mine | theirs if mine.get(k) != theirs.get(k)]:
            changes = ", ".join(f"{k} {theirs.get(k)} (now {mine.get(k)})" for k in differ)
            raise UserError(f"{self.folder} holds a run with other settings: {changes}; choose another --out, or --restart")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.knn_before = state["step"], state["knn_before"]

    def epochs(self):
        """The epochs that are still to do, counted from 1."""
        while self.step < self.last_step:
            self.epoch = self.step // self.loader.steps + 1
            yield self.epoch

    def steps(self):
        """The rest of the epoch, step by step; each is an iterator over the step's micro-batches."""
        first, end = self.step, min(self.epoch * self.loader.steps, self.last_step)
        batches = self.loader.batches(first)
        self.sums, self.waited, begin = {}, 0.0, time.perf_counter()
        with tqdm(total=end - first, desc=f"epoch {self.epoch}/{self.cfg.epochs}", disable=True if self.rank else None) as bar:
            while self.step < end:
                yield self._take(batches)
                self.step += 1
                if self.step == end or len(self.pending) >= (1 if self.device.type == "cpu" else 20) * self.cfg.accumulate:
                    means = self._flush()
                    seconds = time.perf_counter() - begin
                    self.speed = {
                        "images_per_s": round((self.step - first) * self.cfg.batch_size / seconds, 1),
                        "data_wait": round(self.waited / seconds, 4),
                    }
                    bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{self.lr:.2e}", **self.speed, refresh=False)
                bar.update()

    def _take(self, batches):
        for self.micro in range(self.cfg.accumulate):
            begin = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            yield batch

    @contextmanager
    def forward(self, model: nn.Module):
        """Around a micro-batch's forward pass and loss: seeds, autocast, and no gradient exchange before the last one."""
        torch.manual_seed(random_seed("model", self.cfg.seed, self.step, self.rank * self.cfg.accumulate + self.micro))
        exchange = self.world == 1 or self.micro == self.cfg.accumulate - 1
        with nullcontext() if exchange else model.no_sync():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.cfg.accumulate).backward()

    def set_lr(self, optimizer, floor: float = 0.0) -> None:
        """This step's learning rate; a group's "lr_scale", if it has one, multiplies it."""
        total = self.cfg.epochs * self.loader.steps
        self.lr = warmup_cosine(self.step, total, self.warmup_steps, self.peak_lr, floor)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def update(self, optimizer) -> None:
        """Clip, optimiser step, gradients to None."""
        if self.cfg.clip_grad:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.cfg.clip_grad)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def log(self, **values: Tensor) -> None:
        """Values of a micro-batch under their names, `loss` (the total) among them; metrics.jsonl gets their means."""
        self.pending.append((self.step, {name: value.detach().float() for name, value in values.items()}))

    def _flush(self) -> dict[str, float]:
        """Read the pending values from the device (one wait for all), stop if one is not finite; means so far."""
        numbers = torch.stack([torch.stack([*values.values()]) for _, values in self.pending]).tolist()
        for (step, values), row in zip(self.pending, numbers):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(f"{name} {x:g}" for name, x in zip(values, row))
                good = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint yet"
                raise UserError(f"not finite at step {step}: {terms} (lr {self.lr:.3g}, {self.precision}); {good}; try a lower --lr or --clip-grad 1")
            for name, x in zip(values, row):
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = (total + x, count + 1)
        self.pending = []
        return {name: total / count for name, (total, count) in self.sums.items()}

    def end_epoch(self, encoder: ViT | None = None, picture=None, **results: float) -> None:
        """Log the epoch with its `results`, measure kNN and draw the picture when they are due, save everything.
        `picture()` gives the rows of `save_grid`."""
        cfg, last = self.cfg, self.step >= self.last_step
        means = torch.tensor([total / count for total, count in self.sums.values()], device=self.device)
        if self.world > 1:
            dist.all_reduce(means)
        metrics = {"epoch": self.epoch, "step": self.step, **dict(zip(self.sums, (means / self.world).tolist()))}
        metrics |= {"lr": self.lr, **self.speed, **results}
        if encoder and cfg.knn_every and (last or self.epoch % cfg.knn_every == 0):
            metrics["knn"] = self.knn_after = self.knn(encoder)
        if self.rank:
            return
        if picture and (last or self.epoch % cfg.recon_every == 0):
            torch.manual_seed(random_seed("picture", cfg.seed))  # the same masks every time
            save_grid(self.folder / f"recon_{self.epoch:04d}.png", picture())
        self.print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
        config = dataclasses.asdict(cfg)
        state = {"script": self.script, "config": config, "step": self.step, "epoch": self.step / self.loader.steps,
                 "knn_before": self.knn_before, "scaler": self.scaler.state_dict()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        write_atomically(self.folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(self.metrics_lines(metrics).encode()))
        write_atomically(self.checkpoint, lambda file: torch.save(state, file), keep=self.previous)
        if encoder:
            save_encoder(self.folder / "encoder.pt", encoder, config)

    def metrics_lines(self, metrics: dict) -> str:
        """metrics.jsonl with the new line; lines of a part that is being repeated after a resume make way."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < self.step) + json.dumps(metrics) + "\n"

    def knn(self, encoder: ViT) -> float:
        """Top-1 accuracy in % of weighted 20-NN on the cls feature, as a monitor: 1000 validation against 5000 training
        images, evenly spaced. eval_linear.py --mode knn uses all."""
        sets = []
        for images, limit in ((self.loader.images, 5000), (self.val, 1000)):
            batches = eval_batches(images, self.cfg.img_size, self.device, limit, self.cfg.workers)
            features, labels = map(gather_rows, extract_features(encoder, batches))
            sets += [features[labels >= 0], labels[labels >= 0]]
        scores = knn_scores(sets[0], sets[1], sets[2])
        return 100 * (scores.argmax(dim=1) == sets[3]).float().mean().item()

    def finish(self) -> None:
        """Say what was left out, what came out, and what to do next."""
        if skipped := int(self.loader.images.unreadable.sum()):
            self.print(f"{skipped} of {len(self.loader.images)} images could not be read; others took their place")
        if self.knn_after is not None:
            before = "" if self.knn_before is None else f" (before training {self.knn_before:.1f})"
            self.print(f"kNN top-1 {self.knn_after:.1f}{before}")
        self.print(f"pictures and encoder.pt are in {self.folder}")
        if self.loader.images.classes:
            self.print(f"next: python eval_linear.py {self.folder} --baseline")
