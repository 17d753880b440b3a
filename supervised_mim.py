r"""Supervised MIM (Chen, Salz, Chang, Sohn, Krishnan and Seyedhosseini, 2023, arXiv 2312.00950).

A ViT learns to classify images. Masked image modelling (MIM) is a second task: in every step, the
same encoder also sees the images with half of their patches masked, and a shallow decoder predicts
the tokens of the masked ones. A token is the index of a code of a frozen VQ tokenizer. Unlike MAE,
the method needs labels and predicts tokens instead of pixels. After training the decoder is dropped
and costs nothing. The paper reports 81.72 % for ViT-B/14 on ImageNet-1K, 79.71 % without MIM.

Usage
    python supervised_mim.py                                      # demo: 3 minutes on two CPU cores
    python supervised_mim.py --mim-weight 0 --out runs/baseline   # the supervised baseline
    python supervised_mim.py --target pixels --out runs/pixels    # MAE's pixels instead of tokens
    python supervised_mim.py --preset cifar                       # CIFAR-10, downloaded to data/
    python supervised_mim.py --preset imagenet --data imagenet --accumulate 16     # a GPU of 80 GB
    torchrun --nproc-per-node 8 supervised_mim.py --preset imagenet --data imagenet --accumulate 2
    torchrun --nproc-per-node 8 supervised_mim.py --preset imagenet --data imagenet \
        --epochs 90 --batch-size 1024 --warmup-epochs 8 --out runs/90        # the shorter recipe
    python supervised_mim.py --preset imagenet --data /data/birds --out runs/birds --epochs 50 \
        --batch-size 512 --lr 1e-4 --init-from runs/supervised_mim-imagenet/encoder.pt \
        --tokenizer runs/supervised_mim-imagenet/tokenizer/tokenizer.pt      # fine-tuning with MIM
    python eval_linear.py runs/supervised_mim-demo --mode knn     # kNN with all images

The tokenizer. A run first trains its own tokenizer to the end, whatever --steps is. --restart keeps
a finished tokenizer. --train-tokenizer trains only the tokenizer (with --restart, a new one), and
--steps counts its steps. --tokenizer FILE uses a finished one, which must fit. A resumed run needs
FILE again, because its checkpoint stores only the tokenizer's checksum.

Fine-tuning. Use MIM in pre-training and in fine-tuning for the best result. --init-from takes the
encoder from the encoder.pt of any script here. From a checkpoint.pt of this script it also takes
head and decoder: --target, --decoder-depth, --codebook-size and the number of classes must match.

Equations and functions. x is an image, cropped and flipped; x' is x after RandAugment and mixup.
The codes are e_k, G is the tokenizer's decoder, sg stops gradients.
    z(l)     = output of the tokenizer's encoder for x at patch l              VQTokenizer.features
    t(l)     = argmin over k of |z(l) - e_k|^2, the token of patch l           VQTokenizer.quantize
    L_vq     = mean over pixels of |x - G(z + sg(e - z))| + 0.25 mean over     VQTokenizer.forward
               components of (z - sg(e))^2; e(l) is the code of t(l)
    e_k      = m_k / n_k: moving averages (decay 0.99) of the sum and   VQTokenizer.update_codebook
               number of the z(l) with t(l) = k. A step has N vectors z. If n_k
               is below 0.1 N / K (K codes), a random z of the step becomes e_k
    L_class  = CE(head(class token of encoder(x')), labels mixed like x');     SupervisedMIM.forward
               with --pool mean, the mean of the patch tokens is classified
    L_token  = mean over the masked patches l of CE(prediction(l), t(l)) with  mim_token_loss
               label smoothing 0.1; prediction = decoder(encoder(x, visible))
    L        = L_class + 1.0 L_token                                           SupervisedMIM.forward

Names in metrics.jsonl
    loss, class_loss, token_loss    L, L_class and L_token; pixel_loss with --target pixels
    top1                            training accuracy (%); mixed images count as their larger part
    token_acc                       share of the masked patches whose token is predicted correctly
    val_top1, best_top1             validation accuracy (%), its best so far (classifier.best.pt)
    knn, retrieval_1nn              accuracy (%) of 20-NN and 1-NN of the class token, 1000 images
    in the folder tokenizer/        loss is L_vq; recon and commitment are the two means in it; psnr
                                    (dB), perplexity and codes_used (a share) are of 1000 images

What is not taken from the paper
    a summary of the paper    class loss on the whole image, MIM loss on the masked one; tokens of a
                              VQGAN; one decoder block; --pool cls and mean; fine-tuning with MIM
    inferred                  1024 codes of dimension 256, as in MaskGIT and MAGE, which share
                              authors with this paper; 16 x 16 tokens, one for each patch
    from other papers         AugReg: the recipe of "imagenet"; VQ-VAE: commitment, moving averages;
                              MaskGIT: label smoothing; MAE: encoder, masking, decoder, pixels
    our choice                mask ratio 0.5; loss weight 1; the decoder's width; x, not x', in the
                              MIM loss; a head that starts at zero; the tokenizer's layers and
                              training; fine-tuning's recipe; the presets "demo" and "cifar"

Deviations. Without VQGAN's adversarial and perceptual losses, our tokens are probably weaker
targets. Mixup draws one mixing ratio per micro-batch, so that results depend on processes x
--accumulate. torchvision's RandAugment is milder than TensorFlow's.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import common


@dataclass
class Config(common.Config):
    # What a resumed run may change. The tokenizer's checksum is compared instead of its path.
    may_change = (*common.Config.may_change, "tokenizer", "val_every")

    mask_ratio: float = 0.5  # share of masked patches in the images of the MIM loss
    mim_weight: float = 1.0  # weight of the MIM loss; 0 trains the supervised baseline
    target: Literal["tokens", "pixels"] = "tokens"  # the decoder predicts tokens, or MAE's pixels
    token_smoothing: float = 0.1  # label smoothing of the token loss
    decoder_depth: int = 1  # number of decoder blocks; they are as wide as the encoder's
    pool: Literal["cls", "mean"] = "cls"  # classify the class token, or the mean patch token
    mixup: float = 0.5  # alpha of mixup, which changes only the class loss; 0 switches it off
    randaug: int = 15  # magnitude of RandAugment's two operations, at most 30; 0 switches it off
    tokenizer: str | None = None  # a finished tokenizer.pt [by default a run trains its own]
    train_tokenizer: bool = False  # train only the tokenizer, then stop
    tokenizer_epochs: int = 20  # length of the tokenizer's training
    tokenizer_lr: float = 1e-3  # the tokenizer's peak learning rate; its batch is at most about 256
    tokenizer_width: int = 64  # its channels at full resolution; at lower ones up to 4 x as many
    codebook_size: int = 1024  # number of codes; it must match that of --tokenizer FILE
    codebook_dim: int = 256  # dimension of a code
    val_every: int = 1  # validation top-1 every so many epochs and at the end; 0 is never

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_depth", "tokenizer_epochs", "tokenizer_width",
                             "codebook_size", "codebook_dim")  # fmt: skip
        common.check_numbers(self, 0, "mim_weight", "token_smoothing", "mixup", "randaug",
                             "val_every")  # fmt: skip
        common.check_numbers(self, common.POSITIVE, "tokenizer_lr")
        for name, most in (("token_smoothing", 1), ("randaug", 30)):
            if getattr(self, name) > most:
                raise common.UserError(f"--{name.replace('_', '-')} must be at most {most}")
        if self.tokenizer and not self.needs_tokenizer:
            raise common.UserError("--tokenizer cannot be combined with --train-tokenizer, "
                                   "--target pixels or --mim-weight 0")  # fmt: skip

    @property
    def needs_tokenizer(self) -> bool:
        """True if the run predicts tokens, which are those of a frozen tokenizer."""
        return self.mim_weight > 0 and self.target == "tokens" and not self.train_tokenizer


PRESETS = {
    "demo": dict(  # our choice: about three minutes on two CPU cores
        data="shapes", img_size=32, patch_size=8, size="tiny", depth=2, min_crop=0.5,
        epochs=3, batch_size=64, lr=1e-3, warmup_epochs=0.3, mixup=0, randaug=0,
        tokenizer_epochs=1, tokenizer_width=16, codebook_size=256, codebook_dim=64, knn_every=1,
    ),
    "cifar": dict(  # our choice
        data="cifar10", img_size=32, patch_size=4, size="tiny", min_crop=0.4,
        epochs=200, batch_size=256, lr=1e-3, warmup_epochs=10, clip_grad=1.0, weight_decay=0.05,
        tokenizer_epochs=20, tokenizer_width=32, knn_every=1,
    ),
    "imagenet": dict(  # AugReg's recipe (Steiner et al. 2021) for training from scratch
        data=None, img_size=224, patch_size=14, size="base", mask_ratio=0.5, min_crop=0.05,
        epochs=300, batch_size=4096, lr=1e-3,
        warmup_epochs=10_000 / 312,  # 10 000 steps; an epoch has 312
        clip_grad=1.0, weight_decay=0.1,  # lr * 0.1 = 1e-4 per step, as in big_vision
        mixup=0.5, randaug=15, mim_weight=1.0, decoder_depth=1,
        codebook_size=1024, codebook_dim=256, val_every=5, knn_every=5,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ the model


def mim_token_loss(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """L_token: the cross-entropy of the predicted tokens, averaged over the masked patches of all
    images, in fp32. logits (B, L, K); ids (B, L), tokens in 0..K-1; mask (B, L), True = masked.

    The target probability of the true token is 1 - smoothing + smoothing / K, that of every other
    token smoothing / K."""
    target = ids.masked_fill(~mask, -100)  # -100 marks visible patches; they have no loss
    return F.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), ignore_index=-100, label_smoothing=smoothing
    )


class SupervisedMIM(nn.Module):
    """A classifier (`encoder` and `head`) with a decoder for the MIM loss. Without a decoder, it is
    the supervised baseline.

    With target="tokens" the decoder has K outputs per patch, one for each code; with "pixels" it
    has p*p*C, as in MAE. With pool="cls" the head takes the class token, with "mean" the mean of
    the patch tokens. `smoothing` is the label smoothing of the token loss."""

    def __init__(self, encoder: common.ViT, head: nn.Linear, decoder: common.Decoder | None = None,
                 mask_ratio: float = 0.5, mim_weight: float = 1.0, target: str = "tokens",
                 smoothing: float = 0.1, pool: str = "cls"):
        super().__init__()
        self.encoder, self.head, self.decoder = encoder, head, decoder
        self.mask_ratio, self.mim_weight = mask_ratio, mim_weight
        self.target, self.smoothing, self.pool = target, smoothing, pool

    def classify(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> logits (B, classes)."""
        tokens = self.encoder(imgs)  # (B, 1+L, D), after the final norm
        return self.head(tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1))

    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Masks the images at random and predicts all of their patches. imgs (B, C, H, W) ->
        outputs of the decoder (B, L, K) or (B, L, p*p*C), and mask (B, L), True = masked."""
        visible, mask = common.random_masking(
            len(imgs), self.encoder.num_patches, self.mask_ratio, imgs.device
        )
        tokens = self.encoder(imgs, visible)  # (B, 1+keep, D)
        return self.decoder(tokens, visible), mask

    def forward(self, imgs: Tensor, labels: Tensor, token_ids: Tensor | None = None,
                clean: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """L = L_class + mim_weight * L_token, and the values for the log, without gradient:
        class_loss and top1 (%); with a decoder also token_loss and token_acc, or pixel_loss.

        imgs (B, C, H, W) are classified. labels are (B,), or (B, classes) if images were mixed.
        `clean` (B, C, H, W) are the same images without RandAugment and mixup, by default imgs. The
        MIM loss masks their patches. token_ids (B, L) are the tokens of `clean`; they are needed
        with target="tokens"."""
        logits = self.classify(imgs)
        class_loss = F.cross_entropy(logits.float(), labels)
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        correct = logits.argmax(dim=1) == classes
        stats = {"class_loss": class_loss, "top1": 100 * correct.float().mean()}
        loss = class_loss
        if self.decoder is not None:
            clean = imgs if clean is None else clean
            pred, mask = self.predict(clean)
            if self.target == "tokens":
                mim_loss = mim_token_loss(pred, token_ids, mask, self.smoothing)
                correct = (pred.argmax(dim=2) == token_ids) & mask
                stats["token_loss"] = mim_loss
                stats["token_acc"] = correct.sum() / mask.sum()
            else:
                patches = common.patchify(clean, self.encoder.patch_size)
                mim_loss = common.masked_mse(pred, patches, mask)
                stats["pixel_loss"] = mim_loss
            loss = class_loss + self.mim_weight * mim_loss
        return loss, {name: x.detach() for name, x in stats.items()}


# ------------------------------------------------------------------------------ the tokenizer


class ResBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions, (B, in_dim, H, W) -> (B, out_dim, H, W)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.skip = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        self.branch = nn.Sequential(
            *norm_silu_conv(in_dim, out_dim, 3), *norm_silu_conv(out_dim, out_dim, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


def norm_silu_conv(in_dim: int, out_dim: int, kernel: int) -> list[nn.Module]:
    """GroupNorm, SiLU and a convolution of kernel x kernel pixels, where `kernel` is odd."""
    # A group has at least 16 channels, if there are so many. If each channel were normalised alone,
    # its mean would be lost, and with it the colours of the image. gcd, because the number of
    # groups must divide in_dim.
    groups = math.gcd(in_dim, max(1, in_dim // 16))
    conv = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2)
    return [nn.GroupNorm(groups, in_dim), nn.SiLU(), conv]


class VQTokenizer(nn.Module):
    """Convolutional VQ-VAE (van den Oord et al. 2017) with one token for each square of
    stride x stride pixels, row by row.

    Images are normalised (B, C, H, W). They may have any size and are resized to `img_size`, an int
    or (H, W). UserError unless img_size is a multiple of `stride` and `stride` is a power of two.
    `dim` is the dimension of a code, `width` the number of channels at full resolution.

    In training, call `update_codebook` once per step, after the forward passes. Without it, the
    codebook stays random, and the vectors that each pass stores fill the memory."""

    def __init__(self, img_size=256, stride: int = 16, codebook_size: int = 1024, dim: int = 256,
                 width: int = 64, in_chans: int = 3, commitment: float = 0.25,
                 decay: float = 0.99):
        super().__init__()
        self.settings = dict(  # the arguments that build this tokenizer again
            img_size=img_size, stride=stride, codebook_size=codebook_size, dim=dim, width=width,
            in_chans=in_chans, commitment=commitment, decay=decay,
        )  # fmt: skip
        levels = stride.bit_length() - 1  # how often the resolution is halved
        if stride != 2**levels:
            raise common.UserError(f"a tokenizer's stride must be a power of two, not {stride}")
        h, w = common.patch_grid(img_size, stride)
        self.grid, self.img_size = (h, w), (h * stride, w * stride)
        self.commitment, self.decay = commitment, decay

        widths = [width * min(2**level, 4) for level in range(levels + 1)]  # at each resolution
        down = [nn.Conv2d(in_chans, width, 3, padding=1)]
        up = []
        for fine, coarse in itertools.pairwise(widths):
            down += [nn.AvgPool2d(2), ResBlock(fine, coarse)]
            # The decoder goes from coarse to fine: each level is put before the finer ones.
            up = [nn.Upsample(scale_factor=2), ResBlock(coarse, fine), *up]
        coarsest = widths[-1]
        self.encoder = nn.Sequential(
            *down, ResBlock(coarsest, coarsest), *norm_silu_conv(coarsest, dim, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, coarsest, 1), ResBlock(coarsest, coarsest), *up,
            *norm_silu_conv(width, in_chans, 3),
        )  # fmt: skip

        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        # The moving averages n and m: for each code, the number and the sum of its vectors.
        self.register_buffer("usage", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.num_updates = 0  # equals `updates`; reading that from a GPU would make the host wait
        self.seen = []  # (vectors, ids) of each forward pass since the last update

    def get_extra_state(self) -> dict:
        """What state_dict stores beside the weights; see `read_tokenizer`."""
        return self.settings

    def set_extra_state(self, settings: dict) -> None:
        """Ignores `settings`: the tokenizer has already been built with them.
        load_state_dict calls this method after it has loaded the buffers."""
        self.num_updates = int(self.updates)

    def features(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> z (B, L, dim), the vectors before quantisation, in fp32."""
        return self.encoder(self.resized(imgs)).float().flatten(2).transpose(1, 2)

    def resized(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> (B, C, *img_size), bicubic."""
        if tuple(imgs.shape[2:]) == self.img_size:
            return imgs
        return F.interpolate(imgs, self.img_size, mode="bicubic", antialias=True)

    @torch.no_grad()
    def quantize(self, z: Tensor) -> Tensor:
        """The tokens t(l): z (B, L, dim) in fp32 -> ids (B, L) int64 of the nearest codes."""
        with torch.autocast(z.device.type, enabled=False):
            # |z - e|^2 without the term |z|^2, which is the same for all codes e.
            distance = self.codebook.square().sum(dim=1) - 2 * z @ self.codebook.T
        return distance.argmin(dim=2)

    def encode(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> ids (B, L) int64. In bf16 a few tokens differ from those in fp32."""
        return self.quantize(self.features(imgs))

    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> imgs (B, C, *img_size)."""
        return self.to_pixels(F.embedding(ids, self.codebook))

    def to_pixels(self, codes: Tensor) -> Tensor:
        """codes (B, L, dim) -> imgs (B, C, *img_size)."""
        return self.decoder(codes.transpose(1, 2).unflatten(2, self.grid))

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """imgs (B, C, H, W) -> reconstruction (B, C, *img_size), ids (B, L) and three losses:
        `recon`, the mean absolute error of the normalised pixels; `commitment`, the mean of
        (z - sg(e))^2 over all components; and `loss`, which is L_vq = recon + 0.25 commitment."""
        z = self.features(imgs)
        ids = self.quantize(z)
        codes = F.embedding(ids, self.codebook)
        # Straight-through estimator: the value is that of the codes, and the gradient goes to z.
        pred = self.to_pixels(z + (codes - z).detach())
        recon = F.l1_loss(pred.float(), self.resized(imgs))
        commitment = F.mse_loss(z, codes)
        if self.training:
            self.seen.append((z.detach().flatten(0, 1), ids.flatten()))
        loss = recon + self.commitment * commitment
        return pred, ids, dict(loss=loss, recon=recon, commitment=commitment)

    @torch.no_grad()
    def update_codebook(self) -> None:
        """e = m / n: moves each code towards the mean of the vectors z whose nearest code it is.
        The vectors of all micro-batches and processes count. A code that is hardly used restarts at
        one of the vectors."""
        z = torch.cat([vectors for vectors, _ in self.seen])
        ids = torch.cat([ids for _, ids in self.seen])
        self.seen.clear()
        # bincount would make the host wait for a GPU, and so would a branch on `dead` below.
        count = torch.zeros_like(self.usage).index_add_(0, ids, z.new_ones(len(z)))
        total = torch.zeros_like(self.sums).index_add_(0, ids, z)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.usage.lerp_(count, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        mean_count = count.sum() / len(count)  # this step's number of vectors per code
        dead = self.usage < 0.1 * mean_count  # first step: usage is 0.01 count, so nearly all
        rows = common.gather(z).flatten(0, 1)
        # Dead codes restart. Every process draws the same order of the rows. The first dead code
        # takes the first of them, and so on. If there are too few, some are taken repeatedly.
        generator = common.seeded("restart", self.num_updates)
        order = torch.randperm(len(rows), generator=generator).to(z.device, non_blocking=True)
        number = dead.cumsum(dim=0) - 1  # 0, 1, ... for the dead codes; others are not used
        # A new code counts as if mean_count vectors equal to its row had been assigned to it.
        self.usage.copy_(torch.where(dead, mean_count, self.usage))
        new_sums = mean_count * rows[order][number % len(rows)]
        self.sums.copy_(torch.where(dead[:, None], new_sums, self.sums))
        self.codebook.copy_(self.sums / self.usage[:, None])
        self.updates += 1
        self.num_updates += 1


def psnr(imgs: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB between normalised images (B, 3, H, W), after both are
    converted to RGB in 0..1 and clipped; at most 100 dB."""
    error = (common.denormalize(imgs) - common.denormalize(others)).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def codebook_use(ids: Tensor, codebook_size: int) -> tuple[float, float]:
    """How evenly the tokens `ids` (any shape) use the codebook: the perplexity, which is
    exp(entropy of the codes' frequencies), and the share of the codes that occur.

    The perplexity is 1 if all tokens are the same, and codebook_size if all codes are equally
    frequent."""
    p = torch.bincount(ids.flatten(), minlength=codebook_size).double() / ids.numel()
    return torch.special.entr(p).sum().exp().item(), (p > 0).double().mean().item()


# ------------------------------------------------------------------------------ its training


def measure_tokenizer(run: common.Run, tokenizer: VQTokenizer, images) -> dict:
    """Mean psnr (dB), perplexity and codes_used (a share) of at most 1000 images."""

    def measure(imgs: Tensor) -> Tensor:
        """imgs (B, 3, H, W) -> (B, 1+L): each image's PSNR and tokens in one tensor, because
        `common.outputs` collects one. fp32 stores the tokens exactly."""
        parts = []
        for part in imgs.split(32):  # large images need much memory
            recon, ids, _ = tokenizer(part)
            quality = psnr(tokenizer.resized(part), recon)
            parts.append(torch.cat([quality[:, None], ids], dim=1))
        return torch.cat(parts)

    crop = common.CentreCrop(run.cfg.img_size)
    measured, _ = common.outputs(run, tokenizer, measure, images, crop, limit=1000)
    quality, ids = measured[:, 0], measured[:, 1:].long()
    perplexity, codes_used = codebook_use(ids, len(tokenizer.codebook))
    return dict(psnr=quality.mean().item(), perplexity=perplexity, codes_used=codes_used)


def build_tokenizer(cfg: Config) -> VQTokenizer:
    """An untrained tokenizer with one token for each patch.

    Its stride is the power of two nearest to the patch size on a logarithmic scale, and images are
    resized accordingly: for 224 px and patches of 14 px, the stride is 16 and the size 256 px."""
    stride = 2 ** round(math.log2(cfg.patch_size))
    img_size = cfg.img_size // cfg.patch_size * stride
    return VQTokenizer(img_size, stride, cfg.codebook_size, cfg.codebook_dim, cfg.tokenizer_width)


def move_to(device: torch.device, tokenizer: VQTokenizer) -> VQTokenizer:
    """Moves the tokenizer to the device, in the memory layout that is faster there. On a CPU that
    is channels_last. On a GPU, group norm returns contiguous tensors, which the next convolution
    would have to copy into channels_last."""
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return tokenizer.to(device, memory_format=layout)


OWN_TOKENIZER = Path("tokenizer", "tokenizer.pt")  # relative to the folder of a run


def get_tokenizer(run: common.Run, train, val) -> VQTokenizer:
    """The frozen tokenizer of a run: that of --tokenizer FILE, or the run's own, which is trained
    now unless it is finished.

    The tokenizer's checksum is added to run.identity, so that the run cannot be resumed with
    another tokenizer. UserError if the tokenizer does not fit the settings of the run, or if it is
    missing when the run is resumed."""
    cfg, own_file = run.cfg, run.folder / OWN_TOKENIZER
    if cfg.tokenizer:
        tokenizer = read_tokenizer(Path(cfg.tokenizer))
        check_given_tokenizer(tokenizer, cfg)
    elif own_file.exists():
        tokenizer = read_tokenizer(own_file)
        check_own_tokenizer(tokenizer, own_file, cfg)
    elif run.resumes:  # a newly trained tokenizer would have another checksum
        raise common.UserError(
            f"{own_file} is missing: add the --tokenizer FILE, if the run was started with one, or "
            "use another --out or --restart"
        )
    else:
        tokenizer = train_tokenizer(run, train, val)
    run.identity["checksum of the tokenizer"] = checksum(tokenizer)
    h, w = tokenizer.grid
    run.print(f"tokenizer {cfg.tokenizer or own_file}: {cfg.codebook_size} codes, "
              f"{h}x{w} tokens per image")  # fmt: skip
    return move_to(run.device, tokenizer).eval().requires_grad_(False)


def read_tokenizer(file: Path) -> VQTokenizer:
    """Builds the tokenizer that is stored in a tokenizer.pt. UserError if the file holds none."""
    content = common.read_checkpoint(file)
    try:
        state = content["tokenizer"]
        tokenizer = VQTokenizer(**state["_extra_state"])
    except (KeyError, TypeError):
        raise common.UserError(f"{file} holds no tokenizer: it must be a tokenizer.pt") from None
    common.load_strictly(tokenizer, state, file)
    return tokenizer


def check_given_tokenizer(tokenizer: VQTokenizer, cfg: Config) -> None:
    """UserError unless the tokenizer of --tokenizer FILE has one token for each patch, and
    --codebook-size codes."""
    h, w = tokenizer.grid
    rows, columns = common.patch_grid(cfg.img_size, cfg.patch_size)
    if (h, w) != (rows, columns):
        raise common.UserError(
            f"{cfg.tokenizer} has {h}x{w} tokens per image, but --img-size {cfg.img_size} gives "
            f"{rows}x{columns} patches: --img-size {h * cfg.patch_size} would fit"
        )
    codes = len(tokenizer.codebook)
    if codes != cfg.codebook_size:
        raise common.UserError(f"{cfg.tokenizer} has {codes} codes, not {cfg.codebook_size}: "
                               f"--codebook-size {codes} would fit")  # fmt: skip


def check_own_tokenizer(tokenizer: VQTokenizer, file: Path, cfg: Config) -> None:
    """UserError unless the run's own tokenizer, read from `file`, has the sizes that the present
    settings give. Other settings of its training are not compared."""
    present, changes = build_tokenizer(cfg).settings, []
    for name, value in tokenizer.settings.items():
        if value != present[name]:
            changes.append(f"{name} was {value}, now {present[name]}")
    if changes:
        raise common.UserError(
            f"{file} has other sizes: {', '.join(changes)}; use another --out, or train a new one "
            "with --train-tokenizer --restart"
        )


def checksum(module: nn.Module) -> int:
    """CRC-32 of the bytes of all parameters and buffers."""
    crc = 0
    for x in (*module.parameters(), *module.buffers()):
        crc = zlib.crc32(x.detach().cpu().numpy().tobytes(), crc)
    return crc


def tokenizer_config(run: common.Run) -> Config:
    """The settings with which the tokenizer of `run` is trained.

    Flags that only the classifier uses are not copied, so that the user may change them and still
    resume the tokenizer's training. The batch is that of `run`, but at most the largest multiple of
    m = processes x --accumulate up to 256, or m if m exceeds 256."""
    cfg = run.cfg
    micro_batches = run.world * cfg.accumulate  # in one step
    largest_batch = micro_batches * max(1, 256 // micro_batches)
    copied = ("data", "data_dir", "img_size", "patch_size", "min_crop", "accumulate", "workers",
              "device", "precision", "seed", "restart", "save_minutes", "tokenizer_width",
              "codebook_size", "codebook_dim")  # fmt: skip
    return Config(
        **{name: getattr(cfg, name) for name in copied}, out=str(run.folder / OWN_TOKENIZER.parent),
        steps=cfg.steps if cfg.train_tokenizer else None, epochs=cfg.tokenizer_epochs,
        batch_size=min(cfg.batch_size, largest_batch), lr=cfg.tokenizer_lr,
        clip_grad=1.0, weight_decay=1e-4, recon_every=5, knn_every=0,
    )  # fmt: skip


def train_tokenizer(main_run: common.Run, train, val) -> VQTokenizer:
    """Trains a tokenizer in the folder tokenizer/ of `main_run`, or resumes its training there.
    When the training is finished, writes tokenizer.pt."""
    cfg, file = tokenizer_config(main_run), main_run.folder / OWN_TOKENIZER
    run = common.Run(cfg)
    if cfg.restart:
        file.unlink(missing_ok=True)  # if this training is stopped, no run may use the old file
    tokenizer = move_to(run.device, build_tokenizer(cfg))
    optimizer = common.adamw(tokenizer, cfg.weight_decay)
    loader = common.TrainLoader(run, train, common.RandomCrop(cfg.img_size, cfg.min_crop))
    examples = common.example_images(val or train, common.CentreCrop(cfg.img_size), run.device)
    picture = functools.partial(reconstruct_by_tokens, tokenizer, examples)
    run.print(f"training a tokenizer, {cfg.epochs} epochs (--tokenizer FILE uses a finished one):")
    run.start(loader, model=tokenizer, optimizer=optimizer)
    ddp = run.wrap(tokenizer, compile=False)  # --compile concerns the classifier alone
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, _ in micro_batches:
                with run.autocast():
                    _, _, losses = ddp(imgs)
                run.backward(losses["loss"])
                run.log(**losses)
            run.update(optimizer)
            tokenizer.update_codebook()
        results = measure_tokenizer(run, tokenizer, val or train)
        run.end_epoch(picture=picture, **results)
    if run.step < run.total:
        run.print("the tokenizer is not finished: to go on, leave out --steps and --restart")
    elif run.rank == 0:
        content = {"tokenizer": tokenizer.state_dict()}
        common.write_atomically(file, functools.partial(torch.save, content))
        run.print(f"the tokenizer was saved to {file}")
    return tokenizer


@torch.no_grad()
def reconstruct_by_tokens(tokenizer: VQTokenizer, imgs: Tensor) -> dict[str, Tensor]:
    """Rows of the tokenizer's picture, label -> (N, 3, H, W) normalised images."""
    tokens = tokenizer.encode(imgs)
    return {"input": tokenizer.resized(imgs), "tokens, decoded": tokenizer.decode(tokens)}


# ------------------------------------------------------------------------------ training


class Augment:
    """Two views of one random crop: after RandAugment for the classifier, and unchanged for the
    tokenizer and the MIM loss. RandAugment moves pixels, so that the tokens of the crop would not
    fit its result. With a magnitude of 0, both views are the crop."""

    def __init__(self, crop: common.RandomCrop, magnitude: int):
        self.crop = crop
        self.rand_augment = nn.Identity()
        if magnitude:
            # The colour of the area that a shift or a rotation leaves empty.
            fill = [round(255 * x) for x in common.MEAN]
            bilinear = v2.InterpolationMode.BILINEAR
            self.rand_augment = v2.RandAugment(2, magnitude, interpolation=bilinear, fill=fill)

    def __call__(self, image: Tensor, label, index: int) -> tuple:
        crop, label = self.crop(image, label, index)
        return self.rand_augment(crop), crop, label


def build_mixup(alpha: float, num_classes: int, micro_batch: int) -> nn.Module:
    """mixup(imgs, labels), which returns mixed images and their labels (B, num_classes), the share
    of each class. With alpha = 0 it returns images and labels as they are.

    UserError if a micro-batch has a single image, which cannot be mixed."""
    if not alpha:
        return v2.Identity()  # which, unlike nn.Identity, takes several arguments
    if micro_batch < 2:
        raise common.UserError("mixup needs at least 2 images in a micro-batch: use a larger "
                               "--batch-size or a smaller --accumulate")  # fmt: skip
    return v2.MixUp(alpha=alpha, num_classes=num_classes)


@torch.no_grad()
def reconstruct(model: SupervisedMIM, tokenizer: VQTokenizer | None, imgs: Tensor) -> dict:
    """Rows of the reconstruction picture, label -> (N, 3, H, W) normalised images. Without a
    tokenizer, the model predicts pixels."""
    pred, mask = model.predict(imgs)
    patch_size = model.encoder.patch_size
    if tokenizer is None:
        return common.reconstruction_rows(imgs, pred, mask, patch_size)

    def decode(ids: Tensor) -> Tensor:
        size = imgs.shape[2:]
        return F.interpolate(tokenizer.decode(ids), size, mode="bilinear", antialias=True)

    patches = common.patchify(imgs, patch_size).masked_fill(mask[:, :, None], 0)
    ids = tokenizer.encode(imgs)
    predicted = torch.where(mask, pred.argmax(dim=2), ids)
    return {
        "input": imgs,
        "masked": common.unpatchify(patches, patch_size, model.encoder.grid, imgs.shape[1]),
        "true tokens, decoded: the best possible prediction": decode(ids),
        "predicted tokens if masked, else true ones, decoded": decode(predicted),
    }


def validate(run: common.Run, model: SupervisedMIM, val) -> dict[str, float]:
    """val_top1, the accuracy (%) on all validation images, and best_top1, the best one so far."""
    crop = common.CentreCrop(run.cfg.img_size)
    scores, labels = common.outputs(run, model, model.classify, val, crop)
    top1 = common.accuracy(scores, labels)["top1"]
    return dict(val_top1=top1, best_top1=max(top1, best_so_far(run)))


def best_so_far(run: common.Run) -> float:
    """The largest best_top1 of earlier epochs; -1 if there are none. `end_epoch` adds the present
    epoch to the log later."""
    return max((line.get("best_top1", -1.0) for line in run.history), default=-1.0)


def save_classifier(run: common.Run, model: SupervisedMIM, classes: list[str],
                    results: dict[str, float]) -> None:
    """Writes classifier.pt, and also classifier.best.pt if `results`, which `validate` returned,
    are the best so far. `results` is empty after an epoch without validation.

    A file holds encoder and head under timm's parameter names, the numbers that rebuild the ViT,
    the global_pool of timm's model (for "avg", also pass fc_norm=False to timm), the names of the
    classes and the settings."""
    if run.rank > 0:
        return
    head = {f"head.{name}": x for name, x in model.head.state_dict().items()}
    content = {"model": model.encoder.state_dict() | head, "vit": model.encoder.settings,
               "global_pool": "token" if model.pool == "cls" else "avg",
               "classes": classes, "config": dataclasses.asdict(run.cfg)}  # fmt: skip
    names = ["classifier.pt"]
    if results and results["val_top1"] > best_so_far(run):
        names.append("classifier.best.pt")
    for name in names:
        common.write_atomically(run.folder / name, functools.partial(torch.save, content))


def build(cfg: Config, num_classes: int) -> SupervisedMIM:
    """A new model; with --mim-weight 0, it has no decoder. The head starts at zero, so that the
    first class loss is log(num_classes)."""
    encoder = cfg.vit()
    head = nn.Linear(encoder.embed_dim, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    decoder = None
    if cfg.mim_weight:
        # The decoder is built last, so that encoder and head start as those of the baseline.
        heads = encoder.settings["num_heads"]
        outputs = cfg.codebook_size if cfg.target == "tokens" else None
        decoder = common.Decoder(encoder, encoder.embed_dim, cfg.decoder_depth, heads, outputs)
    return SupervisedMIM(
        encoder, head, decoder, mask_ratio=cfg.mask_ratio, mim_weight=cfg.mim_weight,
        target=cfg.target, smoothing=cfg.token_smoothing, pool=cfg.pool,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """Trains the classifier, or only the tokenizer. `data` is a pair of torch Datasets, training
    and validation images, with labels unless only the tokenizer is trained. If it is None, cfg.data
    is loaded."""
    run = common.Run(cfg)
    train, val = data or common.load_pair(cfg, "train")
    if cfg.train_tokenizer:
        train_tokenizer(run, train, val)
        return
    classes = common.required_classes(train, val, cfg.data)
    model = build(cfg, len(classes)).to(run.device)
    if cfg.init_from and not run.resumes:
        common.init_from(cfg.init_from, model)
    optimizer = common.adamw(model, cfg.weight_decay, betas=(0.9, 0.999))

    augment = Augment(common.RandomCrop(cfg.img_size, cfg.min_crop), cfg.randaug)
    loader = common.TrainLoader(run, train, augment)
    mixup = build_mixup(cfg.mixup, len(classes), loader.micro_batch)
    # This may train a tokenizer, which takes long. So it comes after all that checks the flags.
    tokenizer = get_tokenizer(run, train, val) if cfg.needs_tokenizer else None
    examples = common.example_images(val, common.CentreCrop(cfg.img_size), run.device)
    picture = functools.partial(reconstruct, model, tokenizer, examples)
    run.start(loader, val, model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for augmented, clean, labels in micro_batches:
                with run.autocast():
                    token_ids = tokenizer.encode(clean) if tokenizer else None
                    # Only the classifier's images are mixed: tokens of a mixture mean nothing.
                    mixed, targets = mixup(augmented, labels)
                    loss, stats = ddp(mixed, targets, token_ids, clean)
                run.backward(loss)
                run.log(loss=loss, **stats)
            run.update(optimizer)
        results = validate(run, model, val) if run.due(cfg.val_every) else {}
        save_classifier(run, model, classes, results)
        run.end_epoch(model.encoder, picture if model.decoder else None, **results)


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
