r"""Perceptual MAE (Tukra, Hoffman and Chatfield, CVPR 2023, arXiv 2212.14504), and plain MAE.

MAE (arXiv 2111.06377) compares its reconstruction with the image pixel by pixel. Perceptual MAE
also compares their feature maps in a discriminator. This is trained alongside, so that it takes no
pretrained network and no more data. It learns to distinguish reconstructions from images, and the
generator (encoder and decoder) learns to deceive it. The paper adds two techniques of GAN training.
With multi-scale gradients, the decoder also takes the outputs of earlier encoder blocks, and it
makes images of several sizes, all of which the discriminator sees. StyleGAN2-ADA has a logistic
loss, two penalties (R1 and path length), and augmentation of the discriminator's input (ADA).

    --variant   decoder       discriminator                             loss of the generator
    mae         MAE's         none                                      L_MAE
    ssim        MAE's         none                                      L_ssim
    ls          MAE's         one scale, least squares                  L_G
    msg         multi-scale   multi-scale, least squares                L_G
    msg-ada     multi-scale   multi-scale, logistic loss with R1, ADA   L_G + path; the full method
With L_feat, L_style and L_adv all of weight 0, ls, msg and msg-ada have no discriminator.

Usage
    python mae_perceptual.py                                    # demo: 3 minutes on two CPU cores
    python mae_perceptual.py --variant mae --out runs/mae-demo  # the demo with plain MAE
    python mae_perceptual.py --preset cifar --variant ls        # CIFAR-10, downloaded to data/
    python mae_perceptual.py --preset imagenet --data /data/imagenet --accumulate 2   # 24 GB GPU
    torchrun --nproc-per-node 8 mae_perceptual.py --preset imagenet --data /data/imagenet
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        mae_perceptual.py --preset imagenet-mae --data /data/imagenet      # MAE's recipe, 16 GPUs
    python eval_linear.py runs/mae_perceptual-demo --baseline   # linear probe

Equations and functions. x is the image, and y is the reconstruction of all its patches, visible
ones too. Both are normalised. D is the discriminator, f_j a feature map of its frozen copy. The
numbers in the losses are those of "imagenet"; "demo" and "cifar" have others, see PRESETS.
    L_MAE   = mean over masked patches of (y - x)^2, x normalised per patch      common.masked_mse
    L_pix   = mean |y - x|                                                       pixel_loss
    L_feat  = sum_j mean |f_j(y) - f_j(x)|                                       feature_loss
    L_style = sum_j mean |G f_j(y) - G f_j(x)|, where G F = F F' / CHW           style_loss
    L_adv   = (D(y) - 1)^2 / 2, or in msg-ada softplus(-D(y))         ls_g_loss, logistic_g_loss
    L_G     = L_pix + 0.05 L_feat + 40 L_style + 0.7 L_adv                       Adversary.losses
    L_D     = (D(x) - 1)^2 / 2 + D(y)^2 / 2                                      ls_d_loss
              or in msg-ada softplus(-D(x)) + softplus(D(y))                     logistic_d_loss
    R1      = |dD(x)/dx|^2; every 16th step adds 16 * gamma/2 R1 to L_D, gamma 10  r1_penalty
    path    = (|J'n| - its running mean)^2; every 4th step adds 4 * 2 path to L_G  PathLength
              (J is the derivative of y by the decoder's input, n normal noise / side of y)
    p       = probability of each augmentation; it rises if mean sign D(x) is    AdaptiveAugment
              above 0.6, and falls if it is below
    L_ssim  = sum_s 0.85 mean clamp((1 - SSIM(y_s, x_s)) / 2, 0, 1)              ssim_loss, ssim
              + 0.15 mean |y_s - x_s|, for RGB images of sides S, S/2, S/4, S/8

Names in metrics.jsonl
    loss                      what the generator minimises, without path
    pix, feat, style, adv     the terms of L_G before their weights; ssim is L_ssim
    d_loss, r1, path          L_D without R1; R1 and path without weights, means over their steps
    real_score, fake_score    the means of D(x) and D(y)
    d_acc_real, d_acc_fake    shares of x and y scored on the right side of 1/2 (in msg-ada: of 0)
    g_norm, d_norm            gradient norms of the two; grad_norm if there is no discriminator
    grad_pix, grad_feat,      at an epoch's last step: root mean square over pixels of a weighted
      grad_style, grad_adv    term's gradient at the full-size y, in units of that of L_pix
    ada_p                     p at the end of the epoch

What to watch. Good values of d_acc_* are 0.55 to 0.95. Below, the discriminator teaches nothing:
raise --disc-lr or lower --r1-gamma. Above, it has won: lower --disc-lr. A term whose grad_* is
far below 0.1 does nothing; above 2 it dominates: change its weight. Look at grad_* of many epochs.

What is not taken from the paper
    a summary of the paper    structural similarity as another perceptual loss
    authors' code             preset "imagenet" with its weights; which features are compared; a new
                              copy every 5 epochs; L_pix at full size alone; discriminator layers;
                              the decoder's skips, image heads and their order; L_ssim
    Karras et al. 2020        named by the paper: logistic loss, R1, path length, p, augmentations
    MAE                       preset "imagenet-mae", initialisation, L_MAE
    our choice                presets "demo" and "cifar"; width of fromRGB; anti-aliased scales of
                              x; second convolution of a block widens; fewer convolutions (ls) for
                              small images; no random gamma and gain of colours; bf16 on GPUs

Deviations and their consequences
    "demo" and "cifar" change losses and recipe, as the comment at PRESETS explains.
    Without --lr-decay, the discriminator has warm-up and cosine, too, or it would win in the end.
    BatchNorm (ls) and minibatch std (msg, msg-ada) use one micro-batch: give it 4 images or more.
    Both players step at the same time, so that a step takes one forward pass of the generator.
    R1 is taken on augmented images. The authors' R1 has no factor 16 / 2: it counts 8 times less.
    lr and betas are not corrected for lazy penalties: lr is 17/16 (L_D), 5/4 (L_G) of StyleGAN2's.
    path covers neither the smaller images nor the skips, so these are not regularised.
    L_ssim is of RGB images. The authors' are normalised, but C1 and C2 are made for values in 0..1.
    Mended defects of the released code: perceptual losses without gradient, L1 counted twice,
      least squares of mean scores, a copy not frozen, one fromRGB for two scales, unused blocks.
"""

import copy
import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import common


@dataclass
class Config(common.Config):
    variant: Literal["mae", "ssim", "ls", "msg", "msg-ada"] = "msg-ada"  # see the table of variants
    norm_pix: bool = True  # mae only: predict each patch minus its mean, divided by its std
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder; msg, msg-ada: at least one for each image scale
    decoder_heads: int = 16  # attention heads of the decoder
    lr_decay: float | None = None  # multiplies lr every 30 epochs; replaces warm-up and cosine
    disc_width: int = 512  # channels of the discriminator's last layers; its cost grows with them
    disc_lr: float = 1.5e-4  # peak lr of the discriminator; with --lr-decay, it is constant
    feature_weight: float = 0.05  # weight of L_feat in the generator's loss
    style_weight: float = 40.0  # weight of L_style
    adv_weight: float = 0.7  # weight of L_adv; lower it if grad_adv stays above 2
    normalize_features: bool = False  # divide features by the rms of the real images' maps
    scale_weight: float = 0.0  # msg, msg-ada: weight of each smaller image in L_pix
    r1_gamma: float = 10.0  # msg-ada: weight of R1 in L_D; lower it if d_acc_* stay below 0.55
    path_weight: float = 2.0  # msg-ada: weight of the path length penalty in L_G
    refresh_epochs: float = 5.0  # renew the frozen copy every so many epochs; may be below 1

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads")
        common.check_numbers(self, 0, "feature_weight", "style_weight", "adv_weight",
                             "scale_weight", "r1_gamma", "path_weight")  # fmt: skip
        common.check_numbers(self, common.POSITIVE, "lr_decay", "disc_lr", "refresh_epochs")
        if self.variant == "mae" and self.lr_decay is not None:
            raise common.UserError("--variant mae has no --lr-decay: use --preset imagenet-mae")
        if self.lr_decay is not None and self.warmup_epochs:
            raise common.UserError("--lr-decay has no warm-up: add --warmup-epochs 0")
        if self.disc_width < 32 or self.disc_width % 32:
            raise common.UserError(f"--disc-width must be a multiple of 32, not {self.disc_width}")


# "demo" and "cifar" are our choice. Their losses differ from the paper's in three ways:
# - L_pix includes the smaller images (scale_weight). Otherwise these stay noise in short runs, and
#   the discriminator falls to chance.
# - Features are divided by the size of the real maps (normalize_features). Otherwise L_style grows
#   while the discriminator learns.
# - L_style, L_adv and R1 have smaller weights, chosen by grad_* and d_acc_*, and the frozen copy is
#   renewed more often. With msg-ada, grad_adv may still end above 2. Half of adv_weight lowers it
#   to about 2, but the encoder is not better (tests/RESULTS.md).
# Their recipe is MAE's (warm-up, cosine, weight decay 0.05), with other learning rates.
PRESETS = {
    "demo": dict(  # two to three minutes on two CPU cores
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=4,
        decoder_dim=64, decoder_depth=4, decoder_heads=2, min_crop=0.5,
        epochs=1, batch_size=32, base_lr=1.2e-2, warmup_epochs=0.2, knn_every=10,
        disc_width=64, disc_lr=5e-4, style_weight=2.0, adv_weight=0.1, scale_weight=1.0,
        normalize_features=True, r1_gamma=0.1, refresh_epochs=0.1,
    ),
    "cifar": dict(
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=96, decoder_depth=4, decoder_heads=3,
        epochs=200, batch_size=256, base_lr=1e-3, warmup_epochs=10,
        disc_width=128, disc_lr=5e-4, style_weight=2.0, adv_weight=0.1, scale_weight=1.0,
        normalize_features=True, r1_gamma=0.1, refresh_epochs=0.5,
    ),
    "imagenet": dict(  # Perceptual MAE: the numbers of the authors' code
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, min_crop=0.2,
        epochs=300, batch_size=64, lr=1.5e-4, lr_decay=0.9, warmup_epochs=0, weight_decay=0.0,
        disc_width=512, disc_lr=1.5e-4, feature_weight=0.05, style_weight=40.0, adv_weight=0.7,
        r1_gamma=10.0, refresh_epochs=5.0,
    ),
    "imagenet-mae": dict(  # MAE, appendix A, table 8; its best result takes 1600 epochs
        variant="mae",
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=True, min_crop=0.2,
        epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ generator


def image_scales(img_size: int) -> list[int]:
    """Sides in pixels of the image pyramid: img_size, then its half, quarter, ..., as long as they
    are whole numbers of at least 4. UserError if the half is no such number."""
    scales = [img_size]
    while scales[-1] % 2 == 0 and scales[-1] >= 8:
        scales.append(scales[-1] // 2)
    if len(scales) == 1:
        raise common.UserError(
            f"images of {img_size} px have no half of at least 4 px: --img-size must be even "
            "and at least 8"
        )
    return scales


def image_pyramid(imgs: Tensor, scales: list[int]) -> list[Tensor]:
    """Resizes imgs (B, C, S, S) to each side in `scales`, of which the first is S (bilinear,
    anti-aliased) -> list of images, largest first."""
    smaller = [F.interpolate(imgs, (s, s), mode="bilinear", antialias=True) for s in scales[1:]]
    return [imgs, *smaller]


class MSGDecoder(common.Decoder):
    """MAE's decoder with multi-scale gradients: it makes an image at every scale of `image_scales`.

    Each block but the first has a skip connection: it also takes the output of an encoder block.
    Decoder block 2 takes that of the last encoder block but one, block 3 that of the encoder block
    before, and so on.

    The last block makes the full-size image, and the blocks just before it make the smaller images.
    The earliest of these makes the largest, as in the authors' code. MSG-GAN has the reverse order,
    but here all blocks have the same grid of tokens, so that either order is possible.

    UserError if there are fewer decoder blocks than scales, or fewer encoder blocks than decoder
    blocks."""

    def __init__(self, encoder: common.ViT, dim: int = 512, depth: int = 8, num_heads: int = 16):
        super().__init__(encoder, dim, depth, num_heads)
        self.layout = encoder.patch_size, encoder.grid, encoder.in_chans
        size, channels = encoder.grid[0] * encoder.patch_size, encoder.in_chans
        scales = image_scales(size)
        if depth < len(scales):
            raise common.UserError(
                f"images of {size} px have {len(scales)} scales, and each needs a decoder block: "
                f"use --decoder-depth {len(scales)}, not {depth}; or --img-size below "
                f"{4 * 2**depth}; or --variant ls"
            )
        if depth > len(encoder.blocks):
            raise common.UserError(
                f"--decoder-depth {depth} needs as many encoder blocks: use --depth {depth} or "
                f"more, not {len(encoder.blocks)}"
            )
        self.fuse = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth - 1))
        # A head for each smaller image: a linear layer to pixels, then a convolution of stride 2.
        kernels = [3] + [5] * (len(scales) - 2)
        patch_dim = self.pred.out_features
        self.preds = nn.ModuleList(nn.Linear(dim, patch_dim) for _ in kernels)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, k, 2, k // 2) for k in kernels)
        self.apply(common.init_linear)

    def forward(self, tokens: Tensor, visible: Tensor,
                encoder_outputs: list[Tensor]) -> list[Tensor]:
        """Returns the images (B, C, s, s), largest first. tokens (B, 1+n, D): the encoder's output;
        visible (B, n); encoder_outputs: the outputs (B, 1+n, D) of all encoder blocks in order."""
        x = self.fill_in(tokens, visible)
        smaller = []
        first = len(self.blocks) - 1 - len(self.preds)  # the first block that makes an image
        for i, block in enumerate(self.blocks):
            if i > 0:
                skip = self.fill_in(encoder_outputs[-1 - i], visible)
                x = self.fuse[i - 1](torch.cat([x, skip], dim=2))
            x = block(x)
            level = i - first
            if 0 <= level < len(self.preds):
                image = common.unpatchify(self.preds[level](x[:, 1:]), *self.layout)
                smaller.append(self.convs[level](F.avg_pool2d(image, 2**level)))
        return [common.unpatchify(self.pred(self.norm(x[:, 1:])), *self.layout), *smaller]


class PerceptualMAE(nn.Module):
    """MAE's encoder with either decoder: common.Decoder predicts patches, as in MAE, MSGDecoder
    predicts images of several sizes."""

    def __init__(self, encoder: common.ViT, decoder: nn.Module, mask_ratio: float = 0.75):
        super().__init__()
        self.encoder, self.decoder, self.mask_ratio = encoder, decoder, mask_ratio

    def forward(self, imgs: Tensor, for_path: bool = False):
        """imgs (B, C, H, W) -> reconstruction and mask (B, L), True = masked. The reconstruction is
        a list of images, largest first (MSGDecoder), or patches (B, L, p*p*C) (common.Decoder).

        With `for_path`, also returns the tokens (B, 1+n, D) that the decoder took, and the decoder
        can be differentiated twice, as the path length requires."""
        num_patches = self.encoder.num_patches
        visible, mask = common.random_masking(len(imgs), num_patches, self.mask_ratio, imgs.device)
        x = self.encoder.embed(imgs, visible)
        encoder_outputs = []
        for block in self.encoder.blocks:
            x = block(x)
            encoder_outputs.append(x)
        tokens = self.encoder.norm(x)
        # Fused attention kernels have no second derivative; the plain one has.
        with sdpa_kernel(SDPBackend.MATH) if for_path else nullcontext():
            if isinstance(self.decoder, MSGDecoder):
                reconstruction = self.decoder(tokens, visible, encoder_outputs)
            else:
                reconstruction = self.decoder(tokens, visible)
        return (reconstruction, mask, tokens) if for_path else (reconstruction, mask)

    def images(self, reconstruction: Tensor | list[Tensor]) -> list[Tensor]:
        """Turns the reconstruction that `forward` returned, images or patches, into a list of fp32
        images (B, C, s, s), largest first."""
        if isinstance(reconstruction, Tensor):
            layout = self.encoder.patch_size, self.encoder.grid, self.encoder.in_chans
            reconstruction = [common.unpatchify(reconstruction, *layout)]
        return [image.float() for image in reconstruction]


# ------------------------------------------------------------------------------ losses


def gram_matrix(f: Tensor) -> Tensor:
    """Gram matrices F F' / CHW (B, C, C) of feature maps (B, C, H, W), whose rows are the channels.
    They are computed in fp32, as half precision would lose the small differences between two."""
    with torch.autocast(f.device.type, enabled=False):
        rows = f.float().flatten(2)
        return rows @ rows.mT / rows[0].numel()


def feature_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """L_feat: the mean absolute difference of feature maps (B, C, H, W), summed over the maps."""
    return sum((f.float() - r.float()).abs().mean() for f, r in zip(fake, real, strict=True))


def style_loss(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """L_style: the mean absolute difference of the Gram matrices of feature maps (B, C, H, W),
    summed over the maps."""
    return feature_loss([gram_matrix(f) for f in fake], [gram_matrix(r) for r in real])


def pixel_loss(fake: list[Tensor], real: list[Tensor], scale_weight: float = 0.0) -> Tensor:
    """L_pix: the mean absolute difference of the full-size images (B, C, S, S), which come first,
    plus `scale_weight` times that of each smaller size."""
    errors = [(f - r).abs().mean() for f, r in zip(fake, real, strict=True)]
    return errors[0] + scale_weight * sum(errors[1:])


def to_rgb(imgs: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) -> RGB. Values are in 0..1, but a reconstruction may leave
    this range. It is not clipped, because clipped pixels have no gradient."""
    mean, std = common.STATISTICS.to(imgs.device, non_blocking=True)
    return imgs * std + mean


def ssim_loss(fake: Tensor, real: Tensor, scales: int = 4) -> Tensor:
    """L_ssim of RGB images (B, 3, S, S), where `real` is in 0..1: dissimilarity and absolute
    difference, summed over the sides S, S/2, S/4, ... There are `scales` sides, fewer if one would
    be below 4 pixels."""
    sides = [fake.shape[-1]]
    while len(sides) < scales and sides[-1] >= 8:
        sides.append(sides[-1] // 2)
    loss = 0.0
    for f, r in zip(image_pyramid(fake, sides), image_pyramid(real, sides), strict=True):
        dissimilarity = ((1 - ssim(f, r)) / 2).clamp(0, 1)  # removes rounding errors only
        loss = loss + 0.85 * dissimilarity.mean() + 0.15 * (f - r).abs().mean()
    return loss


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) with values in 0..1. The
    result (B, C, H, W) is in -1..1 and compares the 3 x 3 windows around each pixel:

        (2 m_a m_b + C1) (2 c_ab + C2) / ((m_a^2 + m_b^2 + C1) (v_a + v_b + C2))

    with the windows' means m, biased variances v and covariance c, C1 = 0.01^2 and C2 = 0.03^2.
    The images are reflected at their borders."""

    def window_mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel_size=3, stride=1)

    mean_a, mean_b = window_mean(a), window_mean(b)
    variance_a = window_mean(a * a) - mean_a * mean_a
    variance_b = window_mean(b * b) - mean_b * mean_b
    covariance = window_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return similar / ((mean_a * mean_a + mean_b * mean_b + c1) * (variance_a + variance_b + c2))


def ls_d_loss(real_score: Tensor, fake_score: Tensor) -> Tensor:
    """L_D of ls and msg, from raw scores (B,): D(image) should be 1, D(reconstruction) 0."""
    return 0.5 * (real_score - 1).square().mean() + 0.5 * fake_score.square().mean()


def ls_g_loss(fake_score: Tensor) -> Tensor:
    """L_adv of ls and msg, from raw scores (B,): D(reconstruction) should be 1."""
    return 0.5 * (fake_score - 1).square().mean()


def logistic_d_loss(real_score: Tensor, fake_score: Tensor) -> Tensor:
    """L_D of msg-ada without R1, from raw scores (B,): the logistic loss of StyleGAN2."""
    return F.softplus(-real_score).mean() + F.softplus(fake_score).mean()


def logistic_g_loss(fake_score: Tensor) -> Tensor:
    """L_adv of msg-ada, from raw scores (B,): the non-saturating logistic loss, which has a large
    gradient even where the discriminator recognises reconstructions with certainty."""
    return F.softplus(-fake_score).mean()


# ------------------------------------------------------------------------------ discriminators


def fp32_score(layer: nn.Linear, x: Tensor) -> Tensor:
    """Scores (B,) of features (B, C, H, W) by a discriminator's last layer, always in fp32: with
    bf16, scores near 1 would change in steps of 1/128."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float().flatten(1))[:, 0]


class Discriminator(nn.Module):
    """The discriminator of `ls`, for one scale: convolutions of stride 2, then a linear layer. It
    has one convolution for each halving in `image_scales`, at most 5."""

    def __init__(self, img_size: int, width: int = 512, in_chans: int = 3):
        super().__init__()
        kernels = (7, 5, 5, 3, 3)
        widths = (width // 8, width // 4, width // 2, width, width)
        halvings = len(image_scales(img_size)) - 1
        stages, side = [], img_size
        for i in range(min(5, halvings)):
            conv = nn.Conv2d(in_chans, widths[i], kernels[i], 2, kernels[i] // 2, bias=i == 0)
            norm = nn.BatchNorm2d(widths[i]) if i > 0 else nn.Identity()
            stages.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            in_chans, side = widths[i], side // 2
        self.stages = nn.ModuleList(stages)
        self.score = nn.Linear(in_chans * side * side, 1)

    def forward(self, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A list of one tensor (B, 3, S, S) -> scores (B,) in fp32, and a list of feature maps,
        which are the outputs of the first four stages."""
        [x] = images
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return fp32_score(self.score, x), features[:4]


class MSGDiscriminator(nn.Module):
    """The discriminator of `msg` and `msg-ada`. It takes images of all scales. Each scale enters
    where the feature maps have its size, through a 1 x 1 convolution of its own (fromRGB)."""

    def __init__(self, img_size: int, width: int = 512, in_chans: int = 3):
        super().__init__()
        scales = image_scales(img_size)
        rgb = width // 16  # channels that each scale adds to the feature maps
        in_width = 0
        self.from_rgb = nn.ModuleList(nn.Conv2d(in_chans, rgb, 1) for _ in scales)
        self.blocks = nn.ModuleList()
        for i in range(len(scales) - 1):
            in_width += rgb
            out_width = min(width // 8 * 2**i, width // 2)
            self.blocks.append(nn.Sequential(
                nn.Conv2d(in_width, in_width, 3, padding=1), nn.LeakyReLU(0.2),
                nn.Conv2d(in_width, out_width, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2),
            ))  # fmt: skip
            in_width = out_width
        self.final = nn.Sequential(
            nn.Conv2d(in_width + rgb + 1, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.score = nn.Linear(width * (scales[-1] - 3) ** 2, 1)

    def forward(self, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 3, s, s), largest first -> scores (B,) in fp32, and a list of feature maps,
        which are the outputs of the blocks."""
        rgb = [F.leaky_relu(layer(x), 0.2) for layer, x in zip(self.from_rgb, images, strict=True)]
        x, features = rgb[0], []
        for block, smaller in zip(self.blocks, rgb[1:], strict=True):
            features.append(block(x))
            x = torch.cat([features[-1], smaller], dim=1)
        # Minibatch standard deviation (Karras et al. 2018): it reveals a generator whose images
        # resemble each other too much.
        spread = (x.float().var(dim=0, unbiased=False) + 1e-8).sqrt().mean().to(x.dtype)
        x = torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], dim=1)
        return fp32_score(self.score, self.final(x)), features


# ------------------------------------------------------------------------------ the two players


class Adversary(nn.Module):
    """Everything that the generator trains against: the discriminator; its frozen copy, in whose
    feature maps images are compared; and with `ada` (msg-ada) augmentation and path length.

    `losses` computes L_G and L_D of a micro-batch; call `end_step` once after all micro-batches of
    a step, and `refresh` whenever the frozen copy should be renewed. `r1_every` and `path_every`
    say at every how many steps the two penalties are computed."""

    def __init__(self, discriminator: nn.Module, ada: bool = True, feature_weight: float = 0.05,
                 style_weight: float = 40.0, adv_weight: float = 0.7, scale_weight: float = 0.0,
                 normalize_features: bool = False, r1_gamma: float = 10.0,
                 path_weight: float = 2.0, r1_every: int = 16, path_every: int = 4):
        super().__init__()
        self.discriminator, self.frozen = discriminator, copy.deepcopy(discriminator)
        self.frozen.eval().requires_grad_(False)
        self.augment, self.path_length = AdaptiveAugment(), PathLength()
        self.ada, self.real_scores = ada, []
        self.generator_loss = logistic_g_loss if ada else ls_g_loss
        self.discriminator_loss = logistic_d_loss if ada else ls_d_loss
        self.threshold = 0.0 if ada else 0.5  # a higher score means: real
        self.weights = dict(pix=1.0, feat=feature_weight, style=style_weight, adv=adv_weight)
        self.scale_weight, self.normalize_features = scale_weight, normalize_features
        self.r1_gamma, self.r1_every = r1_gamma, r1_every
        self.path_weight, self.path_every = path_weight, path_every

    def refresh(self) -> None:
        """Renews the frozen copy. The running statistics of BatchNorm are averaged over the
        processes first, so that all have the same copy."""
        common.average_statistics(self.discriminator)
        self.frozen.load_state_dict(self.discriminator.state_dict())

    def losses(self, model: nn.Module, discriminator: nn.Module, imgs: Tensor, step: int,
               measure: bool = False):
        """Returns L_G, L_D and a dict of scalars for the log, for imgs (B, 3, S, S). `model` and
        `discriminator` are the modules to call, which DDP may wrap. With `measure`, the dict also
        has the sizes of the gradients (grad_*).

        Both losses come from the same forward passes. The caller must differentiate L_D by the
        parameters of the discriminator alone and L_G by those of the generator alone. The gradients
        are then the same as with a forward pass for each loss."""
        with_r1 = self.ada and self.r1_gamma > 0 and step % self.r1_every == 0
        with_path = self.ada and self.path_weight > 0 and step % self.path_every == 0
        fake, real, tokens = generate(model, imgs, for_path=with_path)
        fake_features, real_features = self.features(fake, real)
        fake_score, real_score, scored = self.scores(discriminator, fake, real, for_r1=with_r1)
        self.real_scores.append(real_score.detach())

        terms = dict(
            pix=pixel_loss(fake, real, self.scale_weight),
            feat=feature_loss(fake_features, real_features),
            style=style_loss(fake_features, real_features),
            adv=self.generator_loss(fake_score),
        )
        weighted = {name: self.weights[name] * term for name, term in terms.items()}
        g_loss = sum(weighted.values())
        d_loss = self.discriminator_loss(real_score, fake_score)
        stats = dict(loss=g_loss, **terms, d_loss=d_loss)
        stats |= self.score_statistics(fake_score, real_score)
        if measure:
            stats |= gradient_sizes(weighted, fake[0])

        if with_r1:
            stats["r1"] = r1_penalty(real_score, scored)
            d_loss = d_loss + self.r1_every * self.r1_gamma / 2 * stats["r1"]
        if with_path:
            stats["path"] = self.path_length(fake[0], tokens)
            g_loss = g_loss + self.path_every * self.path_weight * stats["path"]
        return g_loss, d_loss, stats

    def features(self, fake: list[Tensor], real: list[Tensor]) -> tuple[list, list]:
        """Feature maps of fakes and of real images in the frozen copy. Those of real images have no
        gradient. With `normalize_features`, both are divided by the root mean square of the real
        map."""
        with torch.no_grad():
            _, real_features = self.frozen(real)
        _, fake_features = self.frozen(fake)
        if self.normalize_features:
            sizes = [f.float().square().mean().sqrt() for f in real_features]
            fake_features = [f / size for f, size in zip(fake_features, sizes, strict=True)]
            real_features = [f / size for f, size in zip(real_features, sizes, strict=True)]
        return fake_features, real_features

    def scores(self, discriminator: nn.Module, fake: list[Tensor], real: list[Tensor],
               for_r1: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Scores (B,) of fakes and of real images, and the real images that were scored: in msg-ada
        they are augmented, and with `for_r1` they require a gradient. Fakes and real images get
        different random augmentations."""
        if self.ada:
            fake, real = self.augment(fake), self.augment(real)
        fake_score, _ = discriminator(fake)
        real = [image.detach().requires_grad_(for_r1) for image in real]
        # R1 needs fp32: autocast would also round the products in its gradient.
        with torch.autocast(real[0].device.type, enabled=False) if for_r1 else nullcontext():
            real_score, _ = discriminator(real)
        return fake_score, real_score, real

    def score_statistics(self, fake_score: Tensor, real_score: Tensor) -> dict[str, Tensor]:
        """The mean scores, and the shares of images that are judged correctly, from scores (B,)."""
        return dict(
            real_score=real_score.mean(), d_acc_real=(real_score > self.threshold).float().mean(),
            fake_score=fake_score.mean(), d_acc_fake=(fake_score < self.threshold).float().mean(),
        )  # fmt: skip

    def end_step(self, batch_size: int) -> None:
        """Updates the running mean of the path length and the probability p of augmentations. Call
        it once a step; `batch_size` counts the images of the step in all processes."""
        self.path_length.update()
        if self.ada:
            self.augment.update(torch.cat(self.real_scores), batch_size)
        self.real_scores = []


def generate(model: nn.Module, imgs: Tensor, for_path: bool = False):
    """Reconstructs imgs (B, 3, S, S) by `model`, a PerceptualMAE that DDP may wrap.

    Returns fake, real and tokens. `fake` are the reconstructions and `real` the images themselves:
    lists of (B, 3, s, s) with the same sizes, largest first. With `for_path`, `tokens` (B, 1+n, D)
    are those that the decoder took, and `fake` has a second derivative; else `tokens` is None."""
    if for_path:
        # A compiled model has no second derivative.
        with torch.compiler.set_stance("force_eager"):
            reconstruction, _, tokens = model(imgs, for_path=True)
    else:
        reconstruction, _ = model(imgs)
        tokens = None
    fake = getattr(model, "module", model).images(reconstruction)
    return fake, image_pyramid(imgs, [image.shape[-1] for image in fake]), tokens


def gradient_sizes(terms: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """The root mean square over pixels of each term's gradient at the reconstruction `image` (B, 3,
    S, S), for the log (grad_*). The unit is the size of L_pix's gradient, which is equal in all
    pixels."""
    sizes = {}
    for name, term in terms.items():
        total = term * image.numel()  # L_pix is a mean: its gradient in a pixel is +-1 / numel
        (gradient,) = torch.autograd.grad(total, image, retain_graph=True)
        sizes[f"grad_{name}"] = gradient.square().mean().sqrt()
    return sizes


# ------------------------------------------------------------------------------ StyleGAN2-ADA


def r1_penalty(real_score: Tensor, images: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018): the squared norm of the gradient of a score by its image, summed
    over the scales of the image, mean over images. `images` must require a gradient, and real_score
    (B,) must have been computed from them in fp32."""
    with torch.autocast(real_score.device.type, enabled=False):
        gradients = torch.autograd.grad(real_score.sum(), images, create_graph=True)
        return sum(gradient.square().sum(dim=(1, 2, 3)) for gradient in gradients).mean()


class PathLength(nn.Module):
    """Path length penalty (Karras et al. 2020, StyleGAN2), with the decoder's input tokens in the
    place of StyleGAN2's latent code: a small change of the tokens should change the image by an
    amount that does not depend on the tokens or on the direction.

    For each image, |J'n| is measured, where J is the derivative of the image by the tokens and n is
    random noise. The penalty is the squared difference between |J'n| and its running mean. The
    running mean starts at the first measurement: if it started at 0, it would pull all lengths to
    0, and the penalty would outweigh L_pix."""

    def __init__(self, decay: float = 0.01):
        super().__init__()
        self.decay = decay
        self.pending = []  # mean lengths of the micro-batches since the last update
        self.register_buffer("mean", torch.zeros(()))  # 0 before the first measurement

    def forward(self, imgs: Tensor, tokens: Tensor) -> Tensor:
        """The penalty for imgs (B, C, H, W) that were computed from tokens (B, n, D), mean over the
        images. Everything between the two must have a second derivative. The norm |.| is the root
        mean square over tokens of the Euclidean norm over their D channels."""
        noise = torch.randn_like(imgs) / math.sqrt(imgs[0, 0].numel())
        (gradient,) = torch.autograd.grad((imgs * noise).sum(), tokens, create_graph=True)
        lengths = (gradient.float().square().sum(dim=2).mean(dim=1) + 1e-12).sqrt()
        mean_length = lengths.detach().mean()
        self.pending.append(mean_length)
        return (lengths - torch.where(self.mean > 0, self.mean, mean_length)).square().mean()

    def update(self) -> None:
        """Updates the running mean. Call it once a step, so that all micro-batches are compared
        with the same mean."""
        if self.pending:
            lengths = common.mean_over_processes(torch.stack(self.pending).mean())
            share = torch.where(self.mean > 0, self.decay, 1.0)  # 1: the first measurement
            self.mean.lerp_(lengths, share)
            self.pending = []


class AdaptiveAugment(nn.Module):
    """Augmentation of all images that the discriminator sees (Karras et al. 2020, "bgc"): flips,
    turns by 90 degrees, shifts, scaling, rotation, change of aspect, and colour. Each operation is
    switched on with probability p. Every `every` steps, p rises if the mean sign of the scores of
    real images is above `target`, and falls if it is below: from 0 to 1 within `ramp` images.

    Images are resampled bilinearly, without the low-pass filters of Karras et al."""

    def __init__(self, target: float = 0.6, every: int = 4, ramp: int = 500_000):
        super().__init__()
        self.target, self.every, self.ramp = target, every, ramp
        self.p = 0.0
        self.signs = []  # of the real scores: the mean in each step since the last adjustment
        self.images = 0  # number of images since the last adjustment

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Augments normalised images (B, 3, s, s), largest first. All scales of an image undergo
        the same affine map and the same colour map. Images are reflected at their borders."""
        if self.p == 0:
            return pyramid
        count, _, _, size = pyramid[0].shape
        device = pyramid[0].device
        with torch.autocast(device.type, enabled=False):
            affine = random_affine(count, self.p, size).to(device, non_blocking=True)
            matrix, offset = random_colour(count, self.p)
            matrix = matrix.to(device, non_blocking=True)
            offset = offset.to(device, non_blocking=True)
            result = []
            for imgs in pyramid:
                grid = F.affine_grid(affine, list(imgs.shape), align_corners=False)
                imgs = F.grid_sample(imgs, grid, padding_mode="reflection", align_corners=False)
                result.append((matrix @ imgs.flatten(2) + offset).view_as(imgs))
        return result

    def update(self, real_scores: Tensor, batch_size: int) -> None:
        """Adjusts p. Call it once a step with the scores (b,) of the real images in this process;
        `batch_size` counts the images of the step in all processes."""
        self.signs.append(common.mean_over_processes(real_scores.detach().sign().mean()))
        self.images += batch_size
        if len(self.signs) == self.every:
            mean_sign = sum(self.signs).item() / self.every
            change = self.images / self.ramp
            if mean_sign > self.target:
                self.p = min(self.p + change, 1.0)
            elif mean_sign < self.target:
                self.p = max(self.p - change, 0.0)
            self.signs, self.images = [], 0

    def get_extra_state(self) -> dict:
        return dict(p=self.p, signs=self.signs, images=self.images)

    def set_extra_state(self, state: dict) -> None:
        self.p, self.signs, self.images = state["p"], state["signs"], state["images"]


def random_affine(count: int, p: float, size: int) -> Tensor:
    """Random affine maps (count, 2, 3) for images of `size` pixels a side.

    Each map takes a point of the result to the point of the image that is shown there, as torch's
    affine_grid expects; the sides of the image are at -1 and 1. It is therefore the product of the
    inverses of the operations, in the order of `operations` below. The inverse has the negative
    parameter, which has the same distribution, so that the parameter of the inverse is drawn
    directly. An operation is switched on with probability p. If it is off, its parameter is 0 and
    it changes nothing.

    The maps are computed on the CPU, because they take many operations on a few numbers."""

    def switched(x: Tensor, chance: float = p) -> Tensor:
        return x * (torch.rand(count) < chance)

    def uniform() -> Tensor:  # in -1..1
        return 2 * torch.rand(count) - 1

    def matrix(a=1.0, b=0.0, c=0.0, d=1.0, x=0.0, y=0.0) -> Tensor:  # homogeneous (count, 3, 3)
        entries = [a, b, x, c, d, y, 0.0, 0.0, 1.0]  # row by row: numbers or tensors (count,)
        columns = [torch.as_tensor(entry).expand(count) for entry in entries]
        return torch.stack(columns, dim=1).view(count, 3, 3)

    def rotation(angle: Tensor) -> Tensor:
        return matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

    # There are two rotations; with this probability for each, p is the probability of any.
    rotation_chance = 1 - math.sqrt(1 - p)
    scale = 2 ** switched(0.2 * torch.randn(count))
    aspect = 2 ** switched(0.2 * torch.randn(count))
    # The widths of a pixel and of the image, or 0 where a shift is off, along both x and y.
    pixel = switched(torch.ones(count)) * 2 / size  # for shifts by whole pixels
    side = switched(torch.ones(count)) * 2  # for shifts by fractions
    operations = [
        matrix(a=1 - 2 * switched((uniform() > 0).float())),  # horizontal flip
        rotation(switched((4 * torch.rand(count)).floor()) * (math.pi / 2)),
        matrix(x=pixel * (size / 8 * uniform()).round(), y=pixel * (size / 8 * uniform()).round()),
        matrix(a=scale, d=scale),
        rotation(switched(math.pi * uniform(), rotation_chance)),
        matrix(a=aspect, d=1 / aspect),
        rotation(switched(math.pi * uniform(), rotation_chance)),
        matrix(x=side * torch.randn(count) / 8, y=side * torch.randn(count) / 8),
    ]
    product = operations[0]
    for operation in operations[1:]:
        product = product @ operation
    return product[:, :2]


def random_colour(count: int, p: float) -> tuple[Tensor, Tensor]:
    """Random colour maps for normalised RGB: matrices (count, 3, 3) and offsets (count, 3, 1).

    The operations are brightness, contrast, luma flip, hue rotation and saturation, in this order,
    for colours in -1..1. Each is switched on with probability p. The last four keep the grey axis
    and the plane across it apart, so that their product has a closed form."""

    def switched(x: Tensor) -> Tensor:
        return (x * (torch.rand(count) < p)).view(count, 1, 1)

    brightness = switched(0.2 * torch.randn(count))
    contrast = 2 ** switched(0.5 * torch.randn(count))
    flip = switched((torch.rand(count) < 0.5).float())
    hue = switched(math.pi * (2 * torch.rand(count) - 1))
    saturation = 2 ** switched(torch.randn(count))
    # Projections on the grey axis and on the plane across it; a turn by 90 degrees in this plane.
    grey = torch.full((3, 3), 1 / 3)
    plane = torch.eye(3) - grey
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotated = hue.cos() * plane + hue.sin() * turn
    matrix = contrast * ((1 - 2 * flip) * grey + saturation * rotated)
    # scale * x + origin takes a normalised colour x to -1..1, where the matrix is applied.
    mean, std = (torch.tensor(x).view(3, 1) for x in (common.MEAN, common.STD))
    scale, origin = 2 * std, 2 * mean - 1
    # matrix * scale.T / scale is diag(1 / scale) @ matrix @ diag(scale).
    return matrix * scale.T / scale, (matrix @ (origin + brightness) - origin) / scale


# ------------------------------------------------------------------------------ training


def generator_lr(run: common.Run) -> float:
    """The generator's learning rate at this step: warm-up and cosine, or with --lr-decay the peak
    learning rate, multiplied by that number every 30 epochs."""
    if run.cfg.lr_decay is None:
        return common.warmup_cosine(run.step, run.total, run.warmup, run.peak_lr)
    return run.peak_lr * run.cfg.lr_decay ** ((run.epoch - 1) // 30)


def discriminator_lr(run: common.Run) -> float:
    """The discriminator's learning rate at this step. With --lr-decay it is constant, as in the
    authors' code. Otherwise it follows the generator's warm-up and cosine: with a constant learning
    rate, the discriminator would win when that of the generator goes to 0."""
    if run.cfg.lr_decay is None:
        return run.cfg.disc_lr * run.lr / run.peak_lr
    return run.cfg.disc_lr


def mae_step(run: common.Run, model: nn.Module, optimizer, micro_batches) -> None:
    """One optimiser step with MAE's loss."""
    cfg = run.cfg
    for imgs, _ in micro_batches:
        with run.autocast():
            pred, mask = model(imgs)
            target = common.patchify(imgs, cfg.patch_size)
            loss = common.masked_mse(pred, target, mask, cfg.norm_pix)
        run.backward(loss)
        run.log(loss=loss)
    run.update(optimizer)


def image_step(run: common.Run, model: nn.Module, optimizer, micro_batches) -> None:
    """One optimiser step with L_ssim or with L_pix alone, without a discriminator."""
    cfg = run.cfg
    for imgs, _ in micro_batches:
        with run.autocast():
            fake, real, _ = generate(model, imgs)
            if cfg.variant == "ssim":
                loss = ssim_loss(to_rgb(fake[0]), to_rgb(imgs))
                run.log(loss=loss, ssim=loss)
            else:
                loss = pixel_loss(fake, real, cfg.scale_weight)
                run.log(loss=loss, pix=loss)
        run.backward(loss)
    run.update(optimizer)


def gan_step(run: common.Run, model: nn.Module, discriminator: nn.Module, adversary: Adversary,
             optimizer, d_optimizer, micro_batches) -> None:
    """One optimiser step of generator and discriminator, both at the same time. If the frozen copy
    is due, it is renewed first. The sizes of gradients are measured at the last step of an epoch
    and of the run."""
    for group in d_optimizer.param_groups:
        group["lr"] = discriminator_lr(run)
    if run.step % max(1, round(run.cfg.refresh_epochs * run.loader.steps)) == 0:
        adversary.refresh()
    measure = run.step + 1 == run.last_step or (run.step + 1) % run.loader.steps == 0
    for imgs, _ in micro_batches:
        with run.autocast():
            g_loss, d_loss, stats = adversary.losses(model, discriminator, imgs, run.step, measure)
        run.backward(d_loss, inputs=trainable(discriminator), retain_graph=True)
        run.backward(g_loss, inputs=trainable(model))
        run.log(**stats)
        del g_loss, d_loss, stats  # frees the graph before the next one is built
    adversary.end_step(run.cfg.batch_size)
    run.update(optimizer, d_optimizer, norms=("g_norm", "d_norm"))


def warn_of_few_images(run: common.Run) -> None:
    """Prints a warning if micro-batches are too small for the minibatch standard deviation of an
    MSGDiscriminator: for one image it is 0, for two or three a rough estimate."""
    count = run.loader.micro_batch
    if run.cfg.variant in ("msg", "msg-ada") and count < 4:
        run.print(
            f"  warning: a micro-batch should have at least 4 images, not {count}, because the "
            "discriminator compares them: use fewer processes, a smaller --accumulate or a larger "
            "--batch-size"
        )


def epoch_results(adversary: Adversary | None) -> dict[str, float]:
    """What the log has in addition to the means of an epoch: p of the augmentation at its end."""
    if adversary is None or not adversary.ada:
        return {}
    return dict(ada_p=adversary.augment.p)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, which excludes the fixed position embeddings."""
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def reconstruct(model: PerceptualMAE, imgs: Tensor, norm_pix: bool) -> dict[str, Tensor]:
    """Rows of the reconstruction picture, label -> normalised images (N, 3, H, W)."""
    # forward, not model(...): a compiled model would be compiled again for this number of images.
    reconstruction, mask = model.forward(imgs)
    whole, *smaller = model.images(reconstruction)
    p = model.encoder.patch_size
    rows = common.reconstruction_rows(imgs, common.patchify(whole, p), mask, p, norm_pix)
    for image in smaller:
        label = f"prediction at {image.shape[-1]} px"
        rows[label] = F.interpolate(image, imgs.shape[-2:], mode="nearest")
    return rows


def build(cfg: Config) -> PerceptualMAE:
    """The generator of a variant: encoder and decoder."""
    encoder = cfg.vit()
    kind = MSGDecoder if cfg.variant.startswith("msg") else common.Decoder
    decoder = kind(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return PerceptualMAE(encoder, decoder, cfg.mask_ratio)


def build_adversary(cfg: Config) -> Adversary | None:
    """The discriminator and what belongs to it. None for mae and ssim, and if the weights of
    L_feat, L_style and L_adv are all 0."""
    weights = cfg.feature_weight, cfg.style_weight, cfg.adv_weight
    if cfg.variant in ("mae", "ssim") or max(weights) == 0:
        return None
    kind = MSGDiscriminator if cfg.variant.startswith("msg") else Discriminator
    discriminator = kind(cfg.img_size, cfg.disc_width)
    return Adversary(
        discriminator.to(memory_format=torch.channels_last), cfg.variant == "msg-ada",
        cfg.feature_weight, cfg.style_weight, cfg.adv_weight, cfg.scale_weight,
        cfg.normalize_features, cfg.r1_gamma, cfg.path_weight,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """Trains. `data`: two torch Datasets, (training images, validation images or None); without it,
    cfg.data is loaded."""
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    if cfg.init_from and not run.resumes:
        common.init_from(cfg.init_from, model)
    optimizer = common.adamw(model, cfg.weight_decay)
    state = dict(model=model, optimizer=optimizer)
    adversary = build_adversary(cfg)
    if adversary is not None:
        adversary.to(run.device)
        d_optimizer = common.adamw(adversary.discriminator, weight_decay=0.0)
        state |= dict(adversary=adversary, d_optimizer=d_optimizer)

    train, val = data or common.load_pair(cfg)
    loader = common.TrainLoader(run, train, common.RandomCrop(cfg.img_size, cfg.min_crop))
    examples = common.example_images(val or train, common.CentreCrop(cfg.img_size), run.device)
    picture = functools.partial(reconstruct, model, examples, cfg.variant == "mae" and cfg.norm_pix)
    run.start(loader, val, **state)
    ddp = run.wrap(model)
    if cfg.variant == "mae":
        step = functools.partial(mae_step, run, ddp, optimizer)
    elif adversary is None:
        step = functools.partial(image_step, run, ddp, optimizer)
    else:
        warn_of_few_images(run)
        ddp_d = run.wrap(adversary.discriminator, compile=False)
        step = functools.partial(gan_step, run, ddp, ddp_d, adversary, optimizer, d_optimizer)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer, lr=generator_lr(run))
            step(micro_batches)
        run.end_epoch(model.encoder, picture, **epoch_results(adversary))


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
