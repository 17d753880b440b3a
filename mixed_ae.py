r"""MixedAE (Chen, Liu, Hong, Xu, Li and Yeung, CVPR 2023, arXiv 2303.17152).

MAE (arXiv 2111.06377) hides 75 % of the patches of an image. MixedAE fills those places with the
patches of three other images: four images become one mixture, the encoder sees every patch of the
mixture, and the decoder reconstructs all four images. According to the paper, mixing alone makes
MAE worse, because it makes reconstruction too easy: patches of other images reveal more about the
target than empty places do (the mutual information is higher). MixedAE therefore adds a second
task, homologous recognition: every patch has to find the other patches of its own image. The task
enters in two places. In homologous attention, a patch attends only to the class token and to the
quarter of the patches that is most similar to it. The homologous contrastive loss pulls the encoded
patches of the same image together. A segment embedding, added to each patch token, marks the image
that the patch comes from. There is no other network. After pre-training, the encoder is
used as an ordinary ViT, without segments and homologous attention.

Usage
    python mixed_ae.py                                    # demo: 2 minutes on two CPU cores
    python mixed_ae.py --no-homologous-attention --no-homologous-loss --no-segment \
        --out runs/naive                                  # the paper's baseline, naive mixing
    python mixed_ae.py --preset cifar                     # CIFAR-10, downloaded to data/
    python mixed_ae.py --preset imagenet --data /data/imagenet --accumulate 4      # a GPU of 24 GB
    torchrun --nproc-per-node 8 mixed_ae.py --preset imagenet --data /data/imagenet
    python eval_linear.py runs/mixed_ae-demo --pool mean  # linear probe on the mean patch token

Equations and functions. G images form a group (G = 1 / (1 - mask ratio) = 4), an image has L
patches, K = L / G. i is an image of the group, l a place, z(l) the encoder's output at place l.
    s(l)         the image that place l of the mixture is taken from: a random
                 assignment that gives every image exactly K places           random_mixing
    x_mix(l)     = x_s(l)(l); the patch stays at its place                    mix
    tokens(l)    = embed(x_mix(l)) + position(l) + segment(s(l))              MixedAE.encode
    attention    of a patch: softmax over the class token and the K patches
                 whose keys k have the largest product q k with its query q   homologous_attention
    unmix_i(l)   = z(l), in the decoder's width, if s(l) = i; else mask token unmix
    pred_i       = decoder(class token of the mixture, unmix_i)               MixedAE.decode
    L_recon      = MAE's loss of pred_i on the patches with s(l) != i         MixedAE.forward
    L_homo       = mean_l of -1/|P(l)| sum_{a in P(l)} log p(a | l), where
                 P(l) are the other patches of the same image, and p is
                 softmax(cos(z_l, z_b) / tau) over all b != l     homologous_contrastive_loss
    L            = L_recon + 0.1 L_homo                                       MixedAE.forward

Names in metrics.jsonl
    loss, recon, homo             L, L_recon and L_homo (homo is logged even if it is switched off)
    topk_accuracy                 share of the K patches of largest q k in the last block that come
                                  from the query's own image; 1 / G by chance
    homo_content, topk_content    homo and topk_accuracy without segment embeddings, on up to 240
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
                               of extra time: groups of two would cost 46 %, four mixtures of each
                               group 137 %. It is probably the mode that others call "compose"
    from MAE                   architecture, initialisation, reconstruction loss, recipe
    our choice                 the class token attends to all tokens, and all tokens attend to it;
                               no projector before the contrastive loss; segments start with
                               std 0.02 and have weight decay; topk_accuracy is a mean over heads;
                               the measures without segments; the presets "demo" and "cifar"

Deviations. Patches are mixed before they are embedded, which gives the same tokens for 1 / G of the
work. Groups are formed within a micro-batch, whose size must be a multiple of G. The contrastive
loss has no autocast. The paper's 3 % of extra training time has not been measured on a GPU.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common


@dataclass
class Config(common.Config):
    mask_ratio: float = 0.75  # share of masked patches, 1 - 1/G: 0.75 mixes 4 images, 0.5 mixes 2
    homologous_attention: bool = True  # a patch attends only to the patches most similar to it
    homologous_loss: bool = True  # add the contrastive loss that pulls patches of an image together
    segment: bool = True  # add an embedding to each token that marks the image it comes from
    tau: float = 0.25  # temperature of the contrastive loss
    homo_weight: float = 0.1  # weight of the contrastive loss
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads")
        common.check_numbers(self, 0, "homo_weight")
        common.check_numbers(self, common.POSITIVE, "tau")


PRESETS = {
    "demo": dict(  # our choice: it takes two minutes on two CPU cores
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=3,
        decoder_dim=64, decoder_depth=1, decoder_heads=2, min_crop=0.5,
        epochs=3, batch_size=64, base_lr=6e-3, warmup_epochs=0.3, knn_every=10,
    ),
    "cifar": dict(  # our choice
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=96, decoder_depth=4, decoder_heads=3,
        epochs=200, batch_size=256, base_lr=1e-3, warmup_epochs=10,
    ),
    "imagenet": dict(  # MAE's recipe, the paper's batch; the paper's best result takes 1600 epochs
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, min_crop=0.2,
        epochs=800, batch_size=1024, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05,
        tau=0.25, homo_weight=0.1,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ mixing


def check_multiple(number: int, factor: int, mistake: str) -> None:
    """Raises UserError if `number` is not a multiple of `factor`. The error consists of the text
    `mistake` and the nearest multiple."""
    if number % factor:
        nearest = max(factor, round(number / factor) * factor)
        raise common.UserError(f"{mistake}; the nearest is {nearest}")


def group_size_of(ratio: float, encoder: common.ViT) -> int:
    """The number G of images in a group, where `ratio` = 1 / G is the share of its patches that an
    image gives to the mixture.

    Raises UserError if 1 / ratio is not a whole number above 1, or if the G images cannot get
    equally many patches of the encoder's grid, at least two each. An image with a single patch
    would have no other patch to find."""
    size = max(2, round(1 / ratio))
    if abs(size * ratio - 1) > 0.002:  # --mask-ratio 0.667 is close enough to 2/3
        raise common.UserError(
            f"--mask-ratio {1 - ratio:g} does not fit: G images in a mixture mask 1 - 1/G of each; "
            f"the nearest possible value is --mask-ratio {1 - 1 / size:.3g} (G = {size})"
        )
    h, w = encoder.grid
    if h * w % size or h * w < 2 * size:
        # Sides of a square grid, in patches. Every multiple of `size` is possible.
        sides = range(1, h + 2 * size)
        possible = [n for n in sides if n * n % size == 0 and n * n >= 2 * size]
        nearest = min(possible, key=lambda n: abs(n - h))
        raise common.UserError(
            f"{h}x{w} = {h * w} patches cannot be shared by {size} images: the number of patches "
            f"must be a multiple of {size} and at least {2 * size}; the nearest is --img-size "
            f"{nearest * encoder.patch_size}"
        )
    return size


def random_mixing(groups: int, group_size: int, num_patches: int, device=None, generator=None):
    """Draws which image each patch of a mixture comes from: s(l) in the module docstring.

    Returns source (groups, L) int64 in 0..group_size-1, uniformly random among the assignments that
    give each image exactly L / group_size patches. Raises UserError if that is not a whole
    number."""
    mistake = f"{num_patches} patches cannot be shared equally by {group_size} images"
    check_multiple(num_patches, group_size, mistake)
    noise = torch.rand(groups, num_patches, device=device, generator=generator)
    permutation = noise.argsort(dim=1)  # each of 0..L-1 once, so each remainder equally often
    return permutation % group_size


def mix(tokens: Tensor, source: Tensor) -> Tensor:
    """Mixes each group of G consecutive images: x_mix in the module docstring.

    tokens (groups*G, L, D), source (groups, L) -> (groups, L, D). Patch l of a mixture is patch l
    of image source(l) of the group, so that every patch stays at its place."""
    grouped = tokens.unflatten(0, (len(source), -1))
    return grouped.take_along_dim(source[:, None, :, None], dim=1)[:, 0]


def own_patches(source: Tensor, group_size: int) -> Tensor:
    """The patches that each image gives to its mixture: source (groups, L) -> (groups*G, L) bool,
    True where source(l) is the number of the image in its group."""
    images = torch.arange(group_size, device=source.device)
    return (source[:, None, :] == images[None, :, None]).flatten(0, 1)


def unmix(mixed: Tensor, source: Tensor, mask_token: Tensor, group_size: int) -> Tensor:
    """Separates the images of a mixture again: unmix_i in the module docstring.

    mixed (groups, L, D), source (groups, L), mask_token (D,) -> (groups*G, L, D): for each image of
    a group, its own tokens at their places, and the mask token at all other places."""
    own = own_patches(source, group_size).unflatten(0, (-1, group_size))
    tokens = torch.where(own[..., None], mixed[:, None], mask_token.to(mixed.dtype))
    return tokens.flatten(0, 1)


# ------------------------------------------------------------------------------ recognition


@torch.no_grad()
def topk_mask(q: Tensor, k: Tensor, topk: int) -> Tensor:
    """The attention mask of homologous attention, which is added to the logits.

    q, k (B, heads, 1+L, d), class token first -> (B, heads, 1+L, 1+L): 0 where a query attends to a
    key, and minus infinity elsewhere. A patch attends to the class token and to exactly `topk`
    patches, those with the largest product q k. The class token attends to all tokens."""
    products = q[:, :, 1:] @ k[:, :, 1:].transpose(2, 3)
    largest = products.topk(topk, dim=3, sorted=False).indices
    mask = q.new_full((*q.shape[:3], k.shape[2]), -torch.inf)
    mask[:, :, 0] = 0  # the query of the class token
    mask[..., 0] = 0  # the key of the class token
    mask[:, :, 1:, 1:].scatter_(3, largest, 0)
    return mask


def homologous_attention(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    """Softmax attention of each patch to the class token and to the `topk` most similar patches.

    q, k, v (B, heads, 1+L, d), class token first -> (B, heads, 1+L, d). See `topk_mask` for the
    choice of the keys. Gradients flow through the logits that are kept, not through the choice."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=topk_mask(q, k, topk))


def topk_accuracy(q: Tensor, k: Tensor, source: Tensor, topk: int) -> Tensor:
    """The share of the `topk` most similar patches that come from the query's own image.

    q, k (B, heads, 1+L, d), source (B, L) -> scalar, the mean over heads and patch queries. A patch
    can be among its own `topk`, and then counts as a hit. By chance the share is 1 / G."""
    keep = topk_mask(q, k, topk)[:, :, 1:, 1:] == 0
    homologous = source[:, None, :, None] == source[:, None, None, :]
    return (keep & homologous).sum() / keep.sum()


def homologous_contrastive_loss(z: Tensor, source: Tensor, tau: float) -> Tensor:
    """L_homo in the module docstring: among all other patches of its mixture, each patch has to
    pick the patches of its own image by the cosine of their tokens.

    z (groups, L, D), source (groups, L) -> scalar, computed without autocast. If all tokens are
    equal, it is log(L - 1)."""
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=2)
        logits = z @ z.transpose(1, 2) / tau
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(dim=2, keepdim=True)
    positive = (source[:, :, None] == source[:, None, :]) & ~itself
    return -((log_p * positive).sum(dim=2) / positive.sum(dim=2)).mean()


def own_image_auc(z: Tensor, source: Tensor) -> Tensor:
    """The probability that a token is closer to a token of its own image than to one of another.

    z (groups, L, D), source (groups, L) -> scalar. Of all patches l, a and b of a mixture, where a
    is another patch of l's image and b is of another image, it is the share with cos(z_l, z_a) >
    cos(z_l, z_b); a tie counts as a half. This is the area under the ROC curve of each patch l,
    averaged over the patches: 1 is perfect, and 0.5 is chance."""
    z = F.normalize(z.float(), dim=2)
    cosine = z @ z.mT
    own = source[:, :, None] == source[:, None]
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    # All images have equally many patches, so every patch l has K - 1 values in `mine` and L - K in
    # `others`, and the selected values form rectangular tensors.
    mine = cosine[own & ~itself].view(*source.shape, -1)
    others = cosine[~own].view(*source.shape, -1).sort(dim=2).values
    below = torch.searchsorted(others, mine)  # how many others are smaller
    not_above = torch.searchsorted(others, mine, right=True)  # how many are smaller or equal
    return ((below + not_above) / 2 / others.shape[2]).mean()


class MixedAE(nn.Module):
    """Mixes each group of G = 1 / `ratio` images, encodes the mixture, separates its tokens again,
    and decodes all G images. The first `plain_blocks` blocks of the encoder have ordinary
    attention. With `homo_weight` 0, the contrastive loss is computed but not added.

    The encoder stays an ordinary ViT: it is evaluated on whole images, with ordinary attention and
    the same weights. Raises UserError if the images of a group cannot get equally many patches (see
    `group_size_of`)."""

    def __init__(self, encoder: common.ViT, decoder: common.Decoder, ratio: float = 0.25,
                 tau: float = 0.25, homo_weight: float = 0.1, homologous_attention: bool = True,
                 segment: bool = True, plain_blocks: int = 1):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.tau, self.homo_weight = tau, homo_weight
        self.homologous_attention, self.plain_blocks = homologous_attention, plain_blocks
        self.group_size = group_size_of(ratio, encoder)
        self.topk = encoder.num_patches // self.group_size
        self.segment = nn.Embedding(self.group_size, encoder.embed_dim) if segment else None
        if segment:
            nn.init.normal_(self.segment.weight, std=0.02)

    def encode(self, imgs: Tensor, source: Tensor, segments=True) -> tuple[Tensor, Tensor]:
        """Mixes and encodes images. With `segments` False, the segment embedding is left out.

        imgs (groups*G, C, H, W), source (groups, L) -> tokens (groups, 1+L, D) after the final
        norm, and the topk_accuracy of the last block."""
        vit = self.encoder
        # Each patch stays at its place, so mixing before the embedding gives the same tokens.
        x = vit.embed_patches(mix(common.patchify(imgs, vit.patch_size), source))
        if segments and self.segment is not None:
            x = x + F.pad(self.segment(source), (0, 0, 1, 0))  # the class token gets none
        last = {}  # queries and keys; each block overwrites them, and those of the last one remain

        def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            last.update(queries=q.detach(), keys=k.detach())
            return F.scaled_dot_product_attention(q, k, v)

        def attend_to_similar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            last.update(queries=q.detach(), keys=k.detach())
            return homologous_attention(q, k, v, self.topk)

        for i, block in enumerate(vit.blocks):
            homologous = self.homologous_attention and i >= self.plain_blocks
            x = block(x, attend_to_similar if homologous else attend_to_all)
        return vit.norm(x), topk_accuracy(last["queries"], last["keys"], source, self.topk)

    def decode(self, tokens: Tensor, source: Tensor) -> Tensor:
        """Predicts every patch of every image: tokens (groups, 1+L, D), source (groups, L) ->
        (groups*G, L, p*p*C). All images of a group get the class token of their mixture."""
        x = self.decoder.embed(tokens)
        cls = x[:, :1].repeat_interleave(self.group_size, dim=0)
        patches = unmix(x[:, 1:], source, self.decoder.mask_token[0, 0], self.group_size)
        return self.decoder.decode(torch.cat([cls, patches], dim=1) + self.decoder.pos_embed)

    def predict(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixes images at random, encodes the mixtures and decodes all images.

        imgs (B, C, H, W) -> the prediction (B, L, p*p*C), source (B/G, L), the encoder's tokens
        (B/G, 1+L, D), and topk_accuracy. Raises UserError if B is not a multiple of G."""
        mistake = f"{len(imgs)} images do not fill groups of {self.group_size}"
        check_multiple(len(imgs), self.group_size, mistake)
        groups, num_patches = len(imgs) // self.group_size, self.encoder.num_patches
        source = random_mixing(groups, self.group_size, num_patches, imgs.device)
        tokens, accuracy = self.encode(imgs, source)
        return self.decode(tokens, source), source, tokens, accuracy

    def forward(self, imgs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss L of the module docstring. imgs (B, C, H, W), where B is a multiple of G:
        consecutive images form a group. Returns the loss and, without gradient, the stats recon,
        homo and topk_accuracy."""
        pred, source, tokens, accuracy = self.predict(imgs)
        target = common.patchify(imgs, self.encoder.patch_size)
        recon = common.masked_mse(pred, target, ~own_patches(source, self.group_size))
        homo = homologous_contrastive_loss(tokens[:, 1:], source, self.tau)
        loss = recon
        if self.homo_weight:  # with weight 0, an infinite homo would still give nan
            loss = loss + self.homo_weight * homo
        return loss, dict(recon=recon.detach(), homo=homo.detach(), topk_accuracy=accuracy)


# ------------------------------------------------------------------------------ training


@torch.no_grad()
def measure_recognition(model: MixedAE, imgs: Tensor) -> dict[str, float]:
    """Measures how well patches recognise their image by content: topk_content, own_image_auc and
    homo_content of imgs (N, C, H, W), without segment embeddings. The groups and mixtures are
    random, but the same in every call."""
    size, generator = model.group_size, common.seeded("recognition")
    groups = max(1, len(imgs) // size)
    # The images are shuffled, because neighbours in a data set are often of the same class. If they
    # are too few for a group, they are repeated.
    order = torch.randperm(max(size, len(imgs)), generator=generator)[: groups * size]
    imgs = imgs[order % len(imgs)]
    source = random_mixing(groups, size, model.encoder.num_patches, generator=generator)
    source = source.to(imgs.device)
    tokens, accuracy = model.encode(imgs, source, segments=False)
    patch_tokens = tokens[:, 1:]
    homo = homologous_contrastive_loss(patch_tokens, source, model.tau)
    auc = own_image_auc(patch_tokens, source)
    return dict(topk_content=accuracy.item(), own_image_auc=auc.item(), homo_content=homo.item())


@torch.no_grad()
def reconstruct(model: MixedAE, imgs: Tensor) -> dict[str, Tensor]:
    """Reconstructs imgs (N, 3, H, W) and returns the rows of the picture, label -> normalised
    images (N', 3, H, W). Consecutive images form a group. If the last group is incomplete, the
    first images fill it up, so that N' is a multiple of G."""
    vit, size = model.encoder, model.group_size
    filled_up = math.ceil(len(imgs) / size) * size
    imgs = imgs[torch.arange(filled_up) % len(imgs)]
    pred, source, _, _ = model.predict(imgs)
    rows = common.reconstruction_rows(imgs, pred, ~own_patches(source, size), vit.patch_size)
    mixed = mix(common.patchify(imgs, vit.patch_size), source).repeat_interleave(size, dim=0)
    return {  # what is left of `rows` are the predictions
        "input": rows.pop("input"),
        f"mixture of {size}": common.unpatchify(mixed, vit.patch_size, vit.grid, vit.in_chans),
        "own part of it": rows.pop("masked"),
        **rows,
    }


def build(cfg: Config) -> MixedAE:
    """The model of these settings, with fresh weights."""
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return MixedAE(
        encoder, decoder, ratio=1 - cfg.mask_ratio, tau=cfg.tau,
        homo_weight=cfg.homo_weight if cfg.homologous_loss else 0.0,
        homologous_attention=cfg.homologous_attention, segment=cfg.segment,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """Pre-trains a MixedAE and writes the run's folder. `data` is a pair of torch Datasets: the
    training images, and the validation images or None. Without `data`, cfg.data is loaded."""
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    size = model.group_size
    parts = f"{run.world} processes x --accumulate {cfg.accumulate} x groups of {size}"
    mistake = f"--batch-size {cfg.batch_size} is not divisible by {parts}"
    check_multiple(cfg.batch_size, run.world * cfg.accumulate * size, mistake)
    if cfg.init_from and not run.resumes:
        common.init_from(cfg.init_from, model)
    optimizer = common.adamw(model, cfg.weight_decay)

    train, val = data or common.load_pair(cfg)
    loader = common.TrainLoader(run, train, common.RandomCrop(cfg.img_size, cfg.min_crop))
    crop = common.CentreCrop(cfg.img_size)
    examples = common.example_images(val or train, crop, run.device)
    recognition_images = common.example_images(val or train, crop, run.device, count=240)
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
        results = measure_recognition(model, recognition_images)
        run.end_epoch(model.encoder, picture=lambda: reconstruct(model, examples), **results)


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
