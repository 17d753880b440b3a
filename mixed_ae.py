"""MixedAE (Chen, Liu, Hong, Xu, Li and Yeung, CVPR 2023, arXiv 2303.17152).

MAE (arXiv 2111.06377) hides 75 % of the patches of an image. MixedAE fills those places with the
patches of three other images: four images become one mixture, the encoder sees every patch of the
mixture, and the decoder reconstructs all four images. According to the paper, mixing alone makes
MAE worse. It raises the mutual information between input and target: a patch of another image
reveals more about the target than an empty place does. MixedAE therefore adds a second task,
homologous recognition: every patch has to find the other patches of its own image. The task enters
in two places. In homologous attention, a patch attends only to the K patches that are most similar
to it. The homologous contrastive loss pulls the encoded patches of the same image together. A
segment embedding, which is added to each token, marks the image that the patch comes from. There is
no second view and no other network. After pre-training all of this is dropped, and the encoder is
an ordinary ViT.

Usage
    python mixed_ae.py                                    # demo: 2 minutes on two CPU cores
    python mixed_ae.py --no-homologous-attention --no-homologous-loss --no-segment \\
        --out runs/naive                                  # the paper's baseline, naive mixing
    python mixed_ae.py --preset cifar                     # CIFAR-10, downloaded to data/
    python mixed_ae.py --preset imagenet --data /data/imagenet --accumulate 4      # one GPU
    torchrun --nproc-per-node 8 mixed_ae.py --preset imagenet --data /data/imagenet
    python eval_linear.py runs/mixed_ae-demo --pool mean  # linear probe on the mean patch token

Equations and functions. G images form a group (G = 1 / (1 - mask ratio) = 4), an image has L
patches, and K = L / G. Index i is an image of the group, l a place in the image.
    s(l)         the image that place l of the mixture is taken from: a random
                 assignment that gives every image exactly K places           random_mixing
    x_mix(l)     = x_s(l)(l); the patch stays at its place                    mix
    tokens(l)    = embed(x_mix(l)) + position(l) + segment(s(l))              MixedAE.encode
    attention    of a patch: softmax over the class token and the K patches
                 whose keys k have the largest product q k with its query q   homologous_attention
    unmix_i(l)   = encoded token l where s(l) = i, else the mask token        unmix
    L_recon      = MAE's loss on the patches of image i with s(l) != i        MixedAE.forward
    L_homo       = mean_l of -1/|P(l)| sum_{a in P(l)} log p(a | l), where    homologous_
                 P(l) are the other patches of the same image, and p is       contrastive_loss
                 softmax(cos(z_l, z_b) / tau) over all other patches b
    L            = L_recon + 0.1 L_homo                                       MixedAE.forward

Names in metrics.jsonl
    loss, recon, homo             L, L_recon and L_homo (homo is logged even if it is switched off)
    topk_accuracy                 share of the K patches of largest q k that come from the query's
                                  own image, in the last block; 1 / G by chance
    homo_content, topk_content    homo and topk_accuracy without segment embeddings, on 240
                                  validation images (training images if there are none) in fixed
                                  mixtures; homo is log(L - 1) if all tokens are equal
    own_image_auc                 probability that a token is closer to a token of its own image
                                  than to one of another, measured likewise; 0.5 by chance

What to watch. The segment embedding alone solves the recognition task, so a low `homo` or a high
`topk_accuracy` does not mean that the encoder compares content. A high `own_image_auc` does: it was
0.63 with segments, no better than raw pixels, and 0.86 with --no-segment (CIFAR-10, see
tests/RESULTS.md). The class token belongs to all images of a mixture: evaluate --pool mean, too.

What is not taken from the paper
    from memory, unverified    tau 0.25; loss weight 0.1; homologous attention in all blocks but
                               the first; segment embeddings added at the input
    inferred                   groups of four with one mixture each. Only this fits the paper's 3 %
                               of extra training time: groups of two would cost 46 %, and four
                               mixtures of each group 137 %. A summary of the paper names two
                               modes, compose and full; we take this one to be compose
    from MAE                   architecture, initialisation, reconstruction loss, recipe
    our choice                 the class token attends to all tokens, and all tokens attend to it;
                               no projector before the contrastive loss; segments start with
                               std 0.02 and have weight decay; topk_accuracy is a mean over heads;
                               the measures without segments; the presets "demo" and "cifar"

Deviations. Patches are mixed before they are embedded, which gives the same tokens for 1 / G of the
work. Groups are formed within a micro-batch, whose size must therefore be a multiple of G. The
contrastive loss is computed without autocast: in fp32 on a CPU, with TF32 products on a GPU.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common


@dataclass
class Config(common.Config):
    mask_ratio: float = 0.75  # share of each image that the others hide: 0.75 mixes 4, 0.5 mixes 2
    homologous_attention: bool = True  # patches attend to the few keys most like them
    homologous_loss: bool = True  # patches are told which others are of the same image
    segment: bool = True  # tokens are told the number of their image
    tau: float = 0.25  # temperature of the contrastive loss
    homo_weight: float = 0.1  # weight of the contrastive loss
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads")
        common.check_numbers(self, 0, "homo_weight")
        common.check_numbers(self, 1e-30, "tau")


PRESETS = {
    "demo": dict(  # ours, for two cores and two minutes
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=3,
        decoder_dim=64, decoder_depth=1, decoder_heads=2, min_crop=0.5,
        epochs=3, batch_size=64, base_lr=6e-3, warmup_epochs=0.3, knn_every=10,
    ),
    "cifar": dict(  # ours
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=96, decoder_depth=4, decoder_heads=3,
        epochs=200, batch_size=256, base_lr=1e-3, warmup_epochs=10,
    ),
    "imagenet": dict(  # the paper's batch and MAE's recipe; 1600 epochs are its best
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, min_crop=0.2,
        epochs=800, batch_size=1024, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05,
        tau=0.25, homo_weight=0.1,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ mixing


def check_multiple(number: int, factor: int, mistake: str) -> None:
    """UserError that names the nearest multiple of `factor` unless `number` is one."""
    if number % factor:
        nearest = max(factor, round(number / factor) * factor)
        raise common.UserError(f"{mistake}; the nearest is {nearest}")


def group_size_of(ratio: float, encoder: common.ViT) -> int:
    """Images in a group, 1 / ratio. UserError if that is no whole number above 1, or if they cannot
    share the patches, two or more for each: of one there is nothing to recognise."""
    size = max(2, round(1 / ratio))
    if abs(size * ratio - 1) > 0.002:
        raise common.UserError(
            f"a group of G images hides 1 - 1/G of each; not {1 - ratio:g}, but --mask-ratio "
            f"{1 - 1 / size:.3g} (G = {size}) can be had"
        )
    h, w = encoder.grid
    if h * w % size or h * w < 2 * size:
        possible = (n for n in range(1, 2 * (h + size)) if n * n % size == 0 and n * n >= 2 * size)
        nearest = min(possible, key=lambda n: abs(n - h)) * encoder.patch_size
        raise common.UserError(
            f"{h}x{w} = {h * w} patches cannot be shared by {size} images: that takes a multiple "
            f"of {size}, and two for each; the nearest is --img-size {nearest}"
        )
    return size


def random_mixing(groups: int, group_size: int, num_patches: int, device=None, generator=None):
    """source (groups, L) int64 in 0..group_size-1: the image that patch l of the mixture is of.
    Uniformly random among the assignments that give each image exactly L / group_size patches.
    UserError if that is no whole number."""
    mistake = f"{num_patches} patches cannot be shared equally by {group_size} images"
    check_multiple(num_patches, group_size, mistake)
    noise = torch.rand(groups, num_patches, device=device, generator=generator)
    return noise.argsort(dim=1) % group_size


def mix(tokens: Tensor, source: Tensor) -> Tensor:
    """tokens (groups*G, L, D), source (groups, L) -> (groups, L, D): patch l of image source(l) of
    the group, group by group. Patches stay where they were."""
    grouped = tokens.unflatten(0, (len(source), -1))
    return grouped.take_along_dim(source[:, None, :, None], dim=1)[:, 0]


def own_patches(source: Tensor, group_size: int) -> Tensor:
    """source (groups, L) -> (groups*G, L) bool: True where patch l of the mixture is image i's."""
    images = torch.arange(group_size, device=source.device)
    return (source[:, None] == images[:, None]).flatten(0, 1)


def unmix(mixed: Tensor, source: Tensor, mask_token: Tensor, group_size: int) -> Tensor:
    """mixed (groups, L, D), source (groups, L), mask_token (D,) -> (groups*G, L, D): for each image
    of a group its own tokens in their places, the mask token in all others."""
    own = own_patches(source, group_size).unflatten(0, (-1, group_size))
    tokens = torch.where(own[..., None], mixed[:, None], mask_token.to(mixed.dtype))
    return tokens.flatten(0, 1)


# ------------------------------------------------------------------------------ recognition


@torch.no_grad()
def topk_mask(q: Tensor, k: Tensor, topk: int) -> Tensor:
    """q, k (B, heads, 1+L, d), cls first -> (B, heads, 1+L, 1+L), 0 where a query attends to a key,
    else minus infinity: a patch attends to the `topk` patches of largest product, exactly, and to
    cls; cls to all."""
    products = q[:, :, 1:] @ k[:, :, 1:].transpose(2, 3)
    largest = products.topk(topk, dim=3, sorted=False).indices
    mask = q.new_full((*q.shape[:3], k.shape[2]), -torch.inf)
    mask[:, :, 0] = 0
    mask[..., 0] = 0
    mask[:, :, 1:, 1:].scatter_(3, largest, 0)
    return mask


def homologous_attention(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    """q, k, v (B, heads, 1+L, d), cls first -> (B, heads, 1+L, d): softmax attention in which each
    patch query has all but cls and its `topk` best patch keys at minus infinity. The choice of the
    keys has no gradient, the kept logits have."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=topk_mask(q, k, topk))


def topk_accuracy(q: Tensor, k: Tensor, source: Tensor, topk: int) -> Tensor:
    """Share of the kept patch keys that are of the query's own image (itself among them), over
    heads and queries; 1 / group size by chance. q, k (B, heads, 1+L, d), source (B, L)."""
    keep = topk_mask(q, k, topk)[:, :, 1:, 1:] == 0
    homologous = source[:, None, :, None] == source[:, None, None]
    return (keep & homologous).sum() / keep.sum()


def homologous_contrastive_loss(z: Tensor, source: Tensor, tau: float) -> Tensor:
    """z (groups, L, D), source (groups, L) -> scalar: among all other patches of its mixture, each
    patch has to pick those of its own image, one or more, by cosine. Without autocast. log(L - 1)
    if z tells nothing."""
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=2)
        logits = z @ z.transpose(1, 2) / tau
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(dim=2, keepdim=True)
    positive = (source[:, :, None] == source[:, None]) & ~itself
    return -((log_p * positive).sum(dim=2) / positive.sum(dim=2)).mean()


def own_image_auc(z: Tensor, source: Tensor) -> Tensor:
    """z (groups, L, D), source (groups, L) -> scalar: of all patches l, a, b of a mixture, a and l
    of one image, b of another, the share with cos(z_l, z_a) > cos(z_l, z_b), a tie as a half. It is
    the mean area under the patches' ROC curves: 1 is best, 0.5 chance."""
    z = F.normalize(z.float(), dim=2)
    cosine, own = z @ z.mT, source[:, :, None] == source[:, None]
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    mine = cosine[own & ~itself].view(*source.shape, -1)  # of each patch l the same number
    others = cosine[~own].view(*source.shape, -1).sort(dim=2).values
    lower, ties = torch.searchsorted(others, mine), torch.searchsorted(others, mine, right=True)
    return ((lower + ties) / 2 / others.shape[2]).mean()


class MixedAE(nn.Module):
    """Groups of G = 1 / `ratio` images become one mixture each; it is encoded and un-mixed, and all
    G images are decoded. `plain_blocks`: how many of the first blocks have ordinary attention.

    The encoder stays an ordinary ViT: with the same weights it is evaluated with ordinary attention
    on whole images. UserError if the images of a group cannot share the places equally."""

    def __init__(self, encoder: common.ViT, decoder: common.Decoder, ratio: float = 0.25,
                 tau: float = 0.25, homo_weight: float = 0.1, homologous_attention: bool = True,
                 segment: bool = True, plain_blocks: int = 1):
        super().__init__()
        self.encoder, self.decoder, self.tau, self.homo_weight = encoder, decoder, tau, homo_weight
        self.homologous_attention, self.plain_blocks = homologous_attention, plain_blocks
        self.group_size = group_size_of(ratio, encoder)
        self.topk = encoder.num_patches // self.group_size
        self.segment = nn.Embedding(self.group_size, encoder.embed_dim) if segment else None
        if segment:
            nn.init.normal_(self.segment.weight, std=0.02)

    def encode(self, imgs: Tensor, source: Tensor, segments=True) -> tuple[Tensor, Tensor]:
        """imgs (groups*G, C, H, W), source (groups, L) -> tokens (groups, 1+L, D) after the norm,
        and topk_accuracy of the last block. `segments` False leaves their embedding out."""
        vit, queries, keys = self.encoder, [], []  # queries and keys of each block
        x = vit.embed_patches(mix(common.patchify(imgs, vit.patch_size), source))
        if segments and self.segment is not None:
            x = x + F.pad(self.segment(source), (0, 0, 1, 0))  # none for the class token

        def attend(q: Tensor, k: Tensor, v: Tensor, homologous: bool) -> Tensor:
            queries.append(q.detach())
            keys.append(k.detach())
            if homologous:
                return homologous_attention(q, k, v, self.topk)
            return F.scaled_dot_product_attention(q, k, v)

        for i, block in enumerate(vit.blocks):
            homologous = self.homologous_attention and i >= self.plain_blocks
            x = block(x, functools.partial(attend, homologous=homologous))
        return vit.norm(x), topk_accuracy(queries[-1], keys[-1], source, self.topk)

    def decode(self, tokens: Tensor, source: Tensor) -> Tensor:
        """tokens (groups, 1+L, D), source (groups, L) -> (groups*G, L, p*p*C), every patch of all
        images. cls, which stands for the whole mixture, goes to each of them."""
        x = self.decoder.embed(tokens)
        cls = x[:, :1].repeat_interleave(self.group_size, dim=0)
        patches = unmix(x[:, 1:], source, self.decoder.mask_token[0, 0], self.group_size)
        return self.decoder.decode(torch.cat([cls, patches], dim=1) + self.decoder.pos_embed)

    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """imgs (B, C, H, W), B divisible by G -> prediction (B, L, p*p*C), source (B/G, L), tokens
        (B/G, 1+L, D), topk_accuracy. UserError for an incomplete group."""
        mistake = f"{len(imgs)} images do not fill groups of {self.group_size}"
        check_multiple(len(imgs), self.group_size, mistake)
        groups, num_patches = len(imgs) // self.group_size, self.encoder.num_patches
        source = random_mixing(groups, self.group_size, num_patches, imgs.device)
        tokens, accuracy = self.encode(imgs, source)
        return self.decode(tokens, source), source, tokens, accuracy

    def forward(self, imgs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """imgs (B, C, H, W), B divisible by G; consecutive images make a group. -> the loss, and
        stats: recon, homo, topk_accuracy, without gradient."""
        pred, source, tokens, accuracy = self.predict(imgs)
        target = common.patchify(imgs, self.encoder.patch_size)
        recon = common.masked_mse(pred, target, ~own_patches(source, self.group_size))
        homo = homologous_contrastive_loss(tokens[:, 1:], source, self.tau)
        loss = recon + self.homo_weight * homo if self.homo_weight else recon
        return loss, dict(recon=recon.detach(), homo=homo.detach(), topk_accuracy=accuracy)


# ------------------------------------------------------------------------------ training


@torch.no_grad()
def recognition(model: MixedAE, imgs: Tensor) -> dict[str, float]:
    """topk_content, homo_content and own_image_auc, so without segments: of imgs (N, C, H, W),
    in groups and mixtures that are random, but the same every time."""
    size, generator = model.group_size, common.seeded("recognition")
    groups = max(1, len(imgs) // size)
    order = torch.randperm(max(size, len(imgs)), generator=generator)[: groups * size]
    imgs = imgs[order % len(imgs)]
    source = random_mixing(groups, size, model.encoder.num_patches, generator=generator)
    source = source.to(imgs.device)
    tokens, accuracy = model.encode(imgs, source, segments=False)
    z = tokens[:, 1:]
    results = dict(topk_content=accuracy, own_image_auc=own_image_auc(z, source),
                   homo_content=homologous_contrastive_loss(z, source, model.tau))  # fmt: skip
    return {name: x.item() for name, x in results.items()}


@torch.no_grad()
def reconstruct(model: MixedAE, imgs: Tensor) -> dict[str, Tensor]:
    """Rows of the reconstruction picture, label -> (N, 3, H, W) normalised images; consecutive
    images make a group, and the first ones fill up the last group."""
    vit, size = model.encoder, model.group_size
    imgs = imgs[torch.arange(math.ceil(len(imgs) / size) * size) % len(imgs)]
    pred, source, _, _ = model.predict(imgs)
    rows = common.reconstruction_rows(imgs, pred, ~own_patches(source, size), vit.patch_size)
    mixed = mix(common.patchify(imgs, vit.patch_size), source).repeat_interleave(size, dim=0)
    return {
        "input": rows.pop("input"),
        f"mixture of {size}": common.unpatchify(mixed, vit.patch_size, vit.grid, vit.in_chans),
        "own part of it": rows.pop("masked"),
        **rows,
    }


def build(cfg: Config) -> MixedAE:
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return MixedAE(
        encoder, decoder, ratio=1 - cfg.mask_ratio, tau=cfg.tau,
        homo_weight=cfg.homo_weight * cfg.homologous_loss,
        homologous_attention=cfg.homologous_attention, segment=cfg.segment,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """`data`: (training images, validation images or None), torch Datasets; None loads cfg.data."""
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    parts = f"{run.world} processes x --accumulate {cfg.accumulate} x groups of {model.group_size}"
    check_multiple(cfg.batch_size, run.world * cfg.accumulate * model.group_size,
                   f"--batch-size {cfg.batch_size} is not divisible by {parts}")  # fmt: skip
    if cfg.init_from and not run.resumes:
        common.init_from(cfg.init_from, model)
    optimizer = common.adamw(model, cfg.weight_decay)

    train, val = data or common.load_pair(cfg)
    loader = common.TrainLoader(run, train, common.RandomCrop(cfg.img_size, cfg.min_crop))
    crop = common.CentreCrop(cfg.img_size)
    examples = common.example_images(val or train, crop, run.device)
    held_out = common.example_images(val or train, crop, run.device, count=240)
    run.start(loader, val, model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, _ in micro_batches:
                with run.autocast():
                    loss, stats = ddp(imgs)
                run.backward(loss)
                run.log(loss=loss, **stats)
            run.update(optimizer)
        results = recognition(model, held_out)
        run.end_epoch(model.encoder, picture=lambda: reconstruct(model, examples), **results)


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
