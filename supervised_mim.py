"""Supervised MIM (Chen, Salz, Chang, Sohn, Krishnan and Seyedhosseini, 2023, arXiv 2312.00950).

A ViT learns to classify images. In every step, the same encoder also sees the images with half of
their patches masked, and a shallow decoder predicts one token for each masked patch. A token is the
index of a code in the codebook of a VQ tokenizer, which stays frozen. MAE (arXiv 2111.06377) needs
no labels and predicts pixels; this method needs labels and predicts tokens. After training, the
decoder is dropped, so that inference costs as much as without masked image modelling (MIM). The
paper reports 81.72 % top-1 for ViT-B/14 on ImageNet-1K, and 79.71 % without MIM.

Usage
    python supervised_mim.py                                      # demo: 3 minutes on two CPU cores
    python supervised_mim.py --mim-weight 0 --out runs/baseline   # the supervised baseline
    python supervised_mim.py --target pixels --out runs/pixels    # MAE's pixels instead of tokens
    python supervised_mim.py --preset cifar                       # CIFAR-10, downloaded to data/
    python supervised_mim.py --preset imagenet --data /data/imagenet --accumulate 16     # one GPU
    torchrun --nproc-per-node 8 supervised_mim.py --preset imagenet --data /data/imagenet
    torchrun --nproc-per-node 8 supervised_mim.py --preset imagenet --data /data/imagenet \\
        --epochs 90 --batch-size 1024 --warmup-epochs 8 --out runs/90        # the shorter recipe
    python supervised_mim.py --preset imagenet --data /data/birds --out runs/birds --epochs 50 \\
        --batch-size 512 --lr 1e-4 --init-from runs/supervised_mim-imagenet/encoder.pt \\
        --tokenizer runs/supervised_mim-imagenet/tokenizer/tokenizer.pt      # fine-tuning with MIM
    python eval_linear.py runs/supervised_mim-demo --mode knn     # kNN with all images

The tokenizer. A run first trains its own tokenizer and finishes it even with --steps. Later runs in
the same folder use it again, also with --restart; --train-tokenizer --restart trains a new one and
stops. --tokenizer FILE uses a finished tokenizer with one token per patch and --codebook-size
codes. A resumed run needs FILE again, as its checkpoint stores only the tokenizer's checksum.

Fine-tuning. --init-from loads the encoder of any of our scripts from its encoder.pt; head and
decoder start anew. A checkpoint.pt of this script also has a head and a decoder. They are loaded,
too, so the number of classes, --codebook-size and --decoder-depth must be the same.

Equations and functions. x is an image, cropped and flipped; x' is x after RandAugment and mixup.
    z(l)     = output of the tokenizer's encoder for x at patch l              VQTokenizer.features
    t(l)     = argmin over the codes e of |z(l) - e|^2, the token of patch l   VQTokenizer.quantize
    L_vq     = mean |x - decoder(z + sg(e - z))| + 0.25 mean |z - sg(e)|^2;    VQTokenizer.forward
               e is the code of t, and sg stops the gradient
    e        = m / n; n and m are moving averages (decay 0.99) of the number   VQTokenizer.
               and the sum of the z whose nearest code is e. If n is below a     update_codebook
               tenth of the mean number of z per code, e restarts at one z
    L_class  = CE(head(class token of encoder(x')), labels mixed like x');     SupervisedMIM.forward
               with --pool mean, the mean of the patch tokens is classified
    L_token  = mean over the masked patches l of CE(prediction(l), t(l)) with  mim_token_loss
               label smoothing 0.1; prediction = decoder(encoder(visible x))
    L        = L_class + 1.0 L_token                                           SupervisedMIM.forward

Names in metrics.jsonl
    loss, class_loss, token_loss    L, L_class and L_token; pixel_loss with --target pixels
    top1                            training accuracy (%); mixed images count as their larger part
    token_acc                       share of the masked patches whose token is predicted correctly
    val_top1, best_top1             accuracy (%) on all validation images, and the best so far
    knn, retrieval_1nn              % by 20-NN and 1-NN of the class token, on 1000 of them
    in the folder tokenizer/        loss is L_vq, recon and commitment are its two means; psnr (dB),
                                    perplexity and codes_used (a share) are of 1000 images

What is not taken from the paper
    a summary of the paper    class loss on the whole image, MIM loss on the masked one; tokens of a
                              VQGAN; one decoder block; --pool cls and mean; fine-tuning with MIM
    inferred                  1024 codes of width 256 and 16 x 16 tokens, as in MaskGIT and MAGE by
                              two of the authors, because ViT-B/14 has 16 x 16 patches
    from other papers         AugReg: the recipe of "imagenet"; VQ-VAE: commitment, moving averages;
                              MaskGIT: label smoothing; MAE: encoder, masking, decoder, pixels
    our choice                mask ratio 0.5; loss weight 1; the decoder's width; x, not x', in the
                              MIM loss; a head that starts at zero; how the tokenizer is built and
                              trained; the fine-tuning recipe; the presets "demo" and "cifar"

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
    may_change = (*common.Config.may_change, "tokenizer", "val_every")

    mask_ratio: float = 0.5  # share of hidden patches in the masked pass
    mim_weight: float = 1.0  # of the loss of the masked pass; 0 is the supervised baseline
    target: Literal["tokens", "pixels"] = "tokens"  # pixels: MAE's, for comparison
    token_smoothing: float = 0.1  # label smoothing of the token loss
    decoder_depth: int = 1  # blocks of the decoder, as wide as the encoder
    pool: Literal["cls", "mean"] = "cls"  # classify by the class token, or by the mean patch token
    mixup: float = 0.5  # alpha of mixup, on the class branch; 0 is none
    randaug: int = 15  # magnitude of RandAugment's two operations, up to 30; 0 is none
    tokenizer: str | None = None  # a tokenizer.pt; it must exist to resume, too [one is trained]
    train_tokenizer: bool = False  # train the tokenizer, and nothing else
    tokenizer_epochs: int = 20  # length of its training
    tokenizer_lr: float = 1e-3  # its peak learning rate; its batch is --batch-size, up to about 256
    tokenizer_width: int = 64  # its channels at full resolution; up to four times as many below
    codebook_size: int = 1024  # its codes, the classes of the masked pass; as in --tokenizer FILE
    codebook_dim: int = 256  # width of a code
    val_every: int = 1  # top-1 of the validation images every so many epochs; 0 is never

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_depth", "tokenizer_epochs", "tokenizer_width",
                             "codebook_size", "codebook_dim")  # fmt: skip
        common.check_numbers(self, 0, "mim_weight", "token_smoothing", "mixup", "randaug",
                             "val_every")  # fmt: skip
        common.check_numbers(self, 1e-30, "tokenizer_lr")
        for name, most in (("token_smoothing", 1), ("randaug", 30)):
            if getattr(self, name) > most:
                raise common.UserError(f"--{name.replace('_', '-')} must be at most {most}")
        if self.tokenizer and (self.train_tokenizer or not self.takes_tokens):
            raise common.UserError("--tokenizer is of no use with --train-tokenizer, --target "
                                   "pixels or --mim-weight 0")  # fmt: skip

    @property
    def takes_tokens(self) -> bool:
        return self.mim_weight > 0 and self.target == "tokens" and not self.train_tokenizer


PRESETS = {
    "demo": dict(  # ours, for two cores and two minutes
        data="shapes", img_size=32, patch_size=8, size="tiny", depth=2, min_crop=0.5,
        epochs=3, batch_size=64, lr=1e-3, warmup_epochs=0.3, mixup=0, randaug=0,
        tokenizer_epochs=1, tokenizer_width=16, codebook_size=256, codebook_dim=64, knn_every=1,
    ),
    "cifar": dict(  # ours; the README's short runs, at batch 64: the baseline's best is 3e-4
        data="cifar10", img_size=32, patch_size=4, size="tiny", min_crop=0.4,
        epochs=200, batch_size=256, lr=1e-3, warmup_epochs=10, clip_grad=1.0, weight_decay=0.05,
        tokenizer_epochs=20, tokenizer_width=32, knn_every=1,
    ),
    "imagenet": dict(  # AugReg's recipe (Steiner et al. 2021) for training from scratch
        data=None, img_size=224, patch_size=14, size="base", mask_ratio=0.5, min_crop=0.05,
        epochs=300, batch_size=4096, lr=1e-3, warmup_epochs=10_000 / 312,  # 10 000 steps
        clip_grad=1.0, weight_decay=0.1,  # torch multiplies it by the lr: big_vision's 1e-4
        mixup=0.5, randaug=15, mim_weight=1.0, decoder_depth=1,
        codebook_size=1024, codebook_dim=256, val_every=5, knn_every=5,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ the model


def mim_token_loss(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy, mean over the hidden patches, in fp32. logits (B, L, K); ids (B, L) in 0..K-1;
    mask (B, L), True = hidden. The target is 1 - smoothing at the token, and `smoothing` is spread
    evenly over all K."""
    target = ids.masked_fill(~mask, -100)  # cross_entropy ignores these
    return F.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), ignore_index=-100, label_smoothing=smoothing
    )


class SupervisedMIM(nn.Module):
    """A classifier, which is `encoder` and `head`, and beside it a `decoder` that predicts the
    hidden patches of masked images: their "tokens" (the decoder has an output for each code) or
    their "pixels", as `target` says. Without a decoder this is the supervised baseline. The head
    takes the class token ("cls") or the mean of the patch tokens ("mean"), as `pool` says."""

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
        """imgs (B, C, H, W) -> outputs of the decoder (B, L, K) and mask (B, L), True = hidden."""
        shape = len(imgs), self.encoder.num_patches
        visible, mask = common.random_masking(*shape, self.mask_ratio, imgs.device)
        return self.decoder(self.encoder(imgs, visible), visible), mask

    def forward(self, imgs: Tensor, labels: Tensor, token_ids: Tensor | None = None,
                clean: Tensor | None = None):
        """The loss, and stats without gradient: class_loss, top1; token_loss and token_acc, or
        pixel_loss. imgs (B, C, H, W); labels (B,), or (B, classes) of mixed images; `clean`: the
        images of the masked pass, by default imgs; token_ids (B, L): their tokens."""
        logits = self.classify(imgs)
        loss = F.cross_entropy(logits.float(), labels)
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        hits = (logits.argmax(dim=1) == classes).float()
        stats = dict(class_loss=loss, top1=100 * hits.mean())
        if self.decoder is not None:
            clean = imgs if clean is None else clean
            pred, mask = self.predict(clean)
            if self.target == "tokens":
                mim = mim_token_loss(pred, token_ids, mask, self.smoothing)
                hits = (pred.argmax(dim=2) == token_ids) & mask
                stats.update(token_loss=mim, token_acc=hits.sum() / mask.sum())
            else:
                patches = common.patchify(clean, self.encoder.patch_size)
                mim = common.masked_mse(pred, patches, mask)
                stats.update(pixel_loss=mim)
            loss = loss + self.mim_weight * mim
        return loss, {name: x.detach() for name, x in stats.items()}


# ------------------------------------------------------------------------------ the tokenizer


class ResBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.skip = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        self.branch = nn.Sequential(*convolve(in_dim, out_dim, 3), *convolve(out_dim, out_dim, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


def convolve(in_dim: int, out_dim: int, kernel: int) -> tuple[nn.Module, ...]:
    # 16 channels in a group: alone, a channel would lose its mean, and images their colours.
    norm = nn.GroupNorm(math.gcd(in_dim, max(1, in_dim // 16)), in_dim)
    return norm, nn.SiLU(), nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2)


class VQTokenizer(nn.Module):
    """Convolutional VQ-VAE with one token for each stride x stride pixels, row by row. Normalised
    images (B, C, H, W) of any size are resized to `img_size`, an int or (H, W), which is a multiple
    of `stride`, a power of two. In training, call `update_codebook` once a step, after the forward
    passes: otherwise the codebook stays random, and memory fills with the vectors of each pass."""

    def __init__(self, img_size=256, stride: int = 16, codebook_size: int = 1024, dim: int = 256,
                 width: int = 64, in_chans: int = 3, commitment: float = 0.25,
                 decay: float = 0.99):
        super().__init__()
        self.settings = dict(  # all that it takes to build this tokenizer again
            img_size=img_size, stride=stride, codebook_size=codebook_size, dim=dim, width=width,
            in_chans=in_chans, commitment=commitment, decay=decay,
        )  # fmt: skip
        levels = stride.bit_length() - 1
        if stride != 1 << levels:
            raise common.UserError(f"the stride of a tokenizer is a power of two, not {stride}")
        self.grid = h, w = common.patch_grid(img_size, stride)
        self.img_size, self.commitment, self.decay = (h * stride, w * stride), commitment, decay
        widths = [width * min(1 << level, 4) for level in range(levels + 1)]
        down, up = [nn.Conv2d(in_chans, width, 3, padding=1)], []
        for fine, coarse in itertools.pairwise(widths):
            down += [nn.AvgPool2d(2), ResBlock(fine, coarse)]
            up = [nn.Upsample(scale_factor=2), ResBlock(coarse, fine), *up]
        self.encoder = nn.Sequential(
            *down, ResBlock(widths[-1], widths[-1]), *convolve(widths[-1], dim, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, widths[-1], 1), ResBlock(widths[-1], widths[-1]), *up,
            *convolve(width, in_chans, 3),
        )  # fmt: skip
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("usage", torch.zeros(codebook_size))  # vectors of a batch at each code
        self.register_buffer("sums", torch.zeros(codebook_size, dim))  # of these vectors
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.seen = []  # vectors and ids since the last update
        self.to(memory_format=torch.channels_last)  # a sixth faster on a CPU

    def get_extra_state(self) -> dict:
        return self.settings

    def set_extra_state(self, settings: dict) -> None:
        """They are for whoever builds a tokenizer to load the rest into."""

    def features(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> vectors (B, L, dim) before quantisation, fp32."""
        return self.encoder(self.resized(imgs)).float().flatten(2).transpose(1, 2)

    def resized(self, imgs: Tensor) -> Tensor:
        if tuple(imgs.shape[2:]) == self.img_size:
            return imgs
        return F.interpolate(imgs, self.img_size, mode="bicubic", antialias=True)

    @torch.no_grad()
    def quantize(self, z: Tensor) -> Tensor:
        """z (B, L, dim) -> ids (B, L) int64 of the nearest codes, without autocast."""
        with torch.autocast(z.device.type, enabled=False):
            distance = self.codebook.square().sum(dim=1) - 2 * z @ self.codebook.T  # minus |z|^2
        return distance.argmin(dim=2)

    def encode(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> ids (B, L) int64. Autocast in bf16 changes about one token in a
        hundred, as noise of one grey level does."""
        return self.quantize(self.features(imgs))

    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> imgs (B, C, *img_size)."""
        return self.to_pixels(F.embedding(ids, self.codebook))

    def to_pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(codes.transpose(1, 2).unflatten(2, self.grid))

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """imgs (B, C, H, W) -> reconstruction (B, C, *img_size), ids (B, L) and losses: `recon` is
        the mean absolute error of normalised pixels, `loss` is recon + weight * `commitment`."""
        z = self.features(imgs)
        ids = self.quantize(z)
        codes = F.embedding(ids, self.codebook)
        pred = self.to_pixels(z + (codes - z).detach())  # straight through: as if z were the code
        recon, commitment = F.l1_loss(pred.float(), self.resized(imgs)), F.mse_loss(z, codes)
        if self.training:
            self.seen.append((z.detach().flatten(0, 1), ids.flatten()))
        loss = recon + self.commitment * commitment
        return pred, ids, dict(loss=loss, recon=recon, commitment=commitment)

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Moves the codes towards the mean of the vectors nearest to them, in all micro-batches of
        all processes. Codes that are hardly used restart at one of the vectors."""
        z = torch.cat([vectors for vectors, _ in self.seen])
        ids = torch.cat([ids for _, ids in self.seen])
        self.seen.clear()
        count = torch.bincount(ids, minlength=len(self.usage)).float()
        total = torch.zeros_like(self.sums).index_add_(0, ids, z)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.usage.lerp_(count, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        even = count.sum() / len(count)  # the mean use of a code
        dead = self.usage < 0.1 * even  # in the first step, nearly all of them
        if dead.any():
            rows, needed = common.gather(z).flatten(0, 1), int(dead.sum())
            # The same rows in every process; more than once if there are too few.
            generator = common.seeded("restart", int(self.updates))
            order = torch.randperm(max(needed, len(rows)), generator=generator)[:needed]
            self.usage[dead] = even
            self.sums[dead] = even * rows[order.to(z.device) % len(rows)]
        self.codebook.copy_(self.sums / self.usage[:, None])
        self.updates += 1


def psnr(imgs: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of normalised images, as RGB in 0..1, clipped."""
    error = (common.denormalize(imgs) - common.denormalize(others)).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def perplexity(ids: Tensor, codebook_size: int) -> tuple[float, float]:
    """exp(entropy) of how often codes occur in ids, and the share of the codes that occur."""
    p = torch.bincount(ids.flatten(), minlength=codebook_size).double() / ids.numel()
    return torch.special.entr(p).sum().exp().item(), (p > 0).double().mean().item()


# ------------------------------------------------------------------------------ training it


def measure_tokenizer(run: common.Run, tokenizer: VQTokenizer, images) -> dict:
    """psnr, perplexity and codes_used of 1000 images."""

    def measure(imgs: Tensor) -> Tensor:  # (B, 1+L): psnr, and then the ids as numbers
        recon, ids, _ = tokenizer(imgs)
        return torch.cat([psnr(tokenizer.resized(imgs), recon)[:, None], ids], dim=1)

    def in_parts(imgs: Tensor) -> Tensor:  # because large images need much memory
        return torch.cat([measure(part) for part in imgs.split(32)])

    crop = common.CentreCrop(run.cfg.img_size)
    numbers, _ = common.outputs(run, tokenizer, in_parts, images, crop, limit=1000)
    even, used = perplexity(numbers[:, 1:].long(), len(tokenizer.codebook))
    return dict(psnr=numbers[:, 0].mean().item(), perplexity=even, codes_used=used)


def build_tokenizer(cfg: Config) -> VQTokenizer:
    """A tokenizer with one token for each patch. Its stride is the power of two nearest to the
    patch size."""
    stride = 2 ** round(math.log2(cfg.patch_size))
    img_size = cfg.img_size // cfg.patch_size * stride
    return VQTokenizer(img_size, stride, cfg.codebook_size, cfg.codebook_dim, cfg.tokenizer_width)


OWN_TOKENIZER = Path("tokenizer", "tokenizer.pt")  # in the folder of a run


def get_tokenizer(run: common.Run, train, val) -> VQTokenizer:
    """The frozen tokenizer of a run: that of --tokenizer FILE, or the run's own, which is trained
    now unless it is finished. Its checksum becomes a part of run.identity: a run cannot be resumed
    with another one. UserError if the tokenizer does not fit the settings of the run."""
    cfg, own = run.cfg, run.folder / OWN_TOKENIZER
    if cfg.tokenizer:
        tokenizer = read_tokenizer(Path(cfg.tokenizer))
        check_fit(tokenizer, cfg)
    elif own.exists():
        tokenizer = read_tokenizer(own)
        check_settings(tokenizer, own, cfg)
    elif run.resumes:  # a newly trained tokenizer would have another checksum
        raise common.UserError(
            f"the run in {run.folder} has no tokenizer of its own: add the --tokenizer that it "
            "began with, or use another --out or --restart"
        )
    else:
        tokenizer = train_tokenizer(run, train, val)
    run.identity["checksum of the tokenizer"] = checksum(tokenizer)
    h, w = tokenizer.grid
    run.print(f"tokenizer {cfg.tokenizer or own}: {cfg.codebook_size} codes, {h}x{w} tokens")
    return tokenizer.to(run.device).eval().requires_grad_(False)


def read_tokenizer(file: Path) -> VQTokenizer:
    """The tokenizer that a tokenizer.pt holds. UserError if there is none."""
    content = common.read_checkpoint(file)
    try:
        state = content["tokenizer"]
        tokenizer = VQTokenizer(**state["_extra_state"])
    except (KeyError, TypeError):
        raise common.UserError(f"{file} holds no tokenizer; a tokenizer.pt does") from None
    common.load_strictly(tokenizer, state, file)
    return tokenizer


def check_fit(tokenizer: VQTokenizer, cfg: Config) -> None:
    """UserError unless --tokenizer FILE has one token for each patch and --codebook-size codes."""
    h, w = tokenizer.grid
    rows, columns = common.patch_grid(cfg.img_size, cfg.patch_size)
    if (h, w) != (rows, columns):
        raise common.UserError(
            f"{cfg.tokenizer} makes {h}x{w} tokens of an image, but --img-size {cfg.img_size} has "
            f"{rows}x{columns} patches: --img-size {h * cfg.patch_size} would fit"
        )
    codes = len(tokenizer.codebook)
    if codes != cfg.codebook_size:
        raise common.UserError(f"{cfg.tokenizer} has {codes} codes, not {cfg.codebook_size}: "
                               f"--codebook-size {codes} would fit")  # fmt: skip


def check_settings(tokenizer: VQTokenizer, file: Path, cfg: Config) -> None:
    """UserError unless the run's own tokenizer was trained with the settings of the run."""
    wanted, differ = build_tokenizer(cfg).settings, []
    for name, value in tokenizer.settings.items():
        if value != wanted[name]:
            differ.append(f"{name} {value}, not {wanted[name]}")
    if differ:
        raise common.UserError(f"{file} was made otherwise: {', '.join(differ)}; use another "
                               "--out, or --train-tokenizer --restart")  # fmt: skip


def checksum(module: nn.Module) -> int:
    """CRC-32 of all parameters and buffers."""
    crc = 0
    for x in (*module.parameters(), *module.buffers()):
        crc = zlib.crc32(x.detach().cpu().numpy().tobytes(), crc)
    return crc


def tokenizer_config(run: common.Run) -> Config:
    """The settings with which the tokenizer of `run` is trained. None of them is the classifier's,
    so that the flags of the classifier may change before the tokenizer is finished."""
    cfg, parts = run.cfg, run.world * run.cfg.accumulate
    same = ("data", "data_dir", "img_size", "patch_size", "min_crop", "accumulate", "workers",
            "device", "precision", "seed", "restart", "save_minutes", "tokenizer_width",
            "codebook_size", "codebook_dim")  # fmt: skip
    return Config(
        **{name: getattr(cfg, name) for name in same}, out=str(run.folder / OWN_TOKENIZER.parent),
        steps=cfg.steps if cfg.train_tokenizer else None, epochs=cfg.tokenizer_epochs,
        batch_size=min(cfg.batch_size, parts * max(1, 256 // parts)), lr=cfg.tokenizer_lr,
        clip_grad=1.0, weight_decay=1e-4, recon_every=5, knn_every=0,
    )  # fmt: skip


def train_tokenizer(main_run: common.Run, train, val) -> VQTokenizer:
    """Trains a tokenizer in the folder tokenizer/ of `main_run`, or goes on with one that is not
    finished. At the end, tokenizer.pt is written."""
    cfg, file = tokenizer_config(main_run), main_run.folder / OWN_TOKENIZER
    run = common.Run(cfg)
    if cfg.restart:
        file.unlink(missing_ok=True)  # a run that is started now must not take the old one
    tokenizer = build_tokenizer(cfg).to(run.device)
    optimizer = common.adamw(tokenizer, cfg.weight_decay)
    loader = common.TrainLoader(run, train, common.RandomCrop(cfg.img_size, cfg.min_crop))
    examples = common.example_images(val or train, common.CentreCrop(cfg.img_size), run.device)
    run.print(f"tokenizer, {cfg.epochs} epochs (--tokenizer FILE takes a finished one):")
    run.start(loader, model=tokenizer, optimizer=optimizer)
    ddp = run.wrap(tokenizer, compile=False)  # its codebook changes at every step
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
        run.end_epoch(picture=lambda: decoded(tokenizer, examples), **results)
    content = {"tokenizer": tokenizer.state_dict()}
    if run.step < run.total:
        run.print("the tokenizer is not finished: without --steps its training goes on")
    elif run.rank == 0:
        common.write_atomically(file, lambda f: torch.save(content, f))
        run.print(f"the tokenizer is in {file}")
    return tokenizer


@torch.no_grad()
def decoded(tokenizer: VQTokenizer, imgs: Tensor) -> dict[str, Tensor]:
    """Rows of a picture, label -> (N, 3, H, W) normalised images."""
    tokens = tokenizer.encode(imgs)
    return {"input": tokenizer.resized(imgs), "decoded tokens": tokenizer.decode(tokens)}


# ------------------------------------------------------------------------------ training


class Augment:
    """Two views of a random crop: changed by RandAugment for the classifier, and unchanged for the
    tokenizer and the masked pass. A magnitude of 0 changes nothing."""

    def __init__(self, crop: common.RandomCrop, magnitude: int):
        self.crop, self.change = crop, nn.Identity()
        if magnitude:
            fill = [round(255 * x) for x in common.MEAN]
            bilinear = v2.InterpolationMode.BILINEAR
            self.change = v2.RandAugment(2, magnitude, interpolation=bilinear, fill=fill)

    def __call__(self, image: Tensor, label, index: int) -> tuple:
        crop, label = self.crop(image, label, index)
        return self.change(crop), crop, label


def build_mixup(alpha: float, num_classes: int, micro_batch: int) -> nn.Module:
    """From images and labels of a micro-batch to mixed images and the shares of the classes; with
    `alpha` 0, images and labels stay as they are. UserError if there is nothing to mix with."""
    if not alpha:
        return v2.Identity()
    if micro_batch < 2:
        raise common.UserError("mixup takes 2 images in a micro-batch: a larger --batch-size, "
                               "or less --accumulate")  # fmt: skip
    return v2.MixUp(alpha=alpha, num_classes=num_classes)


@torch.no_grad()
def reconstruct(model: SupervisedMIM, tokenizer: VQTokenizer | None, imgs: Tensor) -> dict:
    """Rows of the reconstruction picture, label -> (N, 3, H, W) normalised images."""
    (pred, mask), p = model.predict(imgs), model.encoder.patch_size
    if tokenizer is None:
        return common.reconstruction_rows(imgs, pred, mask, p)
    rows = common.reconstruction_rows(imgs, common.patchify(imgs, p), mask, p, normalized=False)
    ids = tokenizer.encode(imgs)
    tokens = {"its tokens, decoded: the best that can be had": ids,
              "hidden tokens predicted, all decoded": torch.where(mask, pred.argmax(dim=2), ids)}
    return {"input": imgs, "masked": rows["masked"]} | {
        label: F.interpolate(tokenizer.decode(x), imgs.shape[2:], mode="bilinear", antialias=True)
        for label, x in tokens.items()
    }  # fmt: skip


def validate(run: common.Run, model: SupervisedMIM, val) -> dict[str, float]:
    """val_top1, in % of all validation images, and best_top1, the best of the run so far."""
    crop = common.CentreCrop(run.cfg.img_size)
    scores, labels = common.outputs(run, model, model.classify, val, crop)
    top1 = common.accuracy(scores, labels)["top1"]
    return dict(val_top1=top1, best_top1=max(top1, best_so_far(run)))


def best_so_far(run: common.Run) -> float:
    """best_top1 of the epochs that are logged; -1 if none of them was validated."""
    return max((line.get("best_top1", -1.0) for line in run.history), default=-1.0)


def save_classifier(run: common.Run, model: SupervisedMIM, classes: list[str],
                    results: dict[str, float]) -> None:
    """Writes classifier.pt: encoder and head under timm's names, the numbers that rebuild the ViT,
    timm's global_pool (in timm, "avg" needs fc_norm=False, too), and the names of the classes. If
    `results`, those of `validate`, are the best so far, writes classifier.best.pt, too."""
    head = {f"head.{name}": x for name, x in model.head.state_dict().items()}
    content = {"model": model.encoder.state_dict() | head, "vit": model.encoder.settings,
               "global_pool": "token" if model.pool == "cls" else "avg",
               "classes": classes, "config": dataclasses.asdict(run.cfg)}  # fmt: skip
    names = ["classifier.pt"]
    if results and results["val_top1"] > best_so_far(run):
        names.append("classifier.best.pt")
    for name in names if run.rank == 0 else []:
        common.write_atomically(run.folder / name, lambda file: torch.save(content, file))


def build(cfg: Config, num_classes: int) -> SupervisedMIM:
    encoder, decoder = cfg.vit(), None
    head = nn.Linear(encoder.embed_dim, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if cfg.mim_weight:  # last, so that encoder and head start as the baseline's do
        heads = encoder.settings["num_heads"]
        outputs = cfg.codebook_size if cfg.target == "tokens" else None
        decoder = common.Decoder(encoder, encoder.embed_dim, cfg.decoder_depth, heads, outputs)
    return SupervisedMIM(
        encoder, head, decoder, mask_ratio=cfg.mask_ratio, mim_weight=cfg.mim_weight,
        target=cfg.target, smoothing=cfg.token_smoothing, pool=cfg.pool,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """`data`: (training, validation) images with labels, torch Datasets; None loads cfg.data."""
    run = common.Run(cfg)
    train, val = data or common.load_pair(cfg, "train")  # first: the head has a row for each class
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
    # Training a tokenizer takes long: by now, mistakes in the flags have come out.
    tokenizer = get_tokenizer(run, train, val) if cfg.takes_tokens else None
    examples = common.example_images(val, common.CentreCrop(cfg.img_size), run.device)
    picture = functools.partial(reconstruct, model, tokenizer, examples)
    run.start(loader, val, model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, clean, labels in micro_batches:
                with run.autocast():
                    token_ids = tokenizer.encode(clean) if tokenizer else None
                    imgs, targets = mixup(imgs, labels)
                    loss, stats = ddp(imgs, targets, token_ids, clean)
                run.backward(loss)
                run.log(loss=loss, **stats)
            run.update(optimizer)
        results = validate(run, model, val) if run.due(cfg.val_every) else {}
        save_classifier(run, model, classes, results)
        run.end_epoch(model.encoder, picture if model.decoder else None, **results)


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
