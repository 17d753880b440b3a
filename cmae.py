r"""CMAE (Mao, Yin, Chang and Zhou, 2022, arXiv 2205.10546). It is not "Contrastive Masked
Autoencoders" (arXiv 2207.13532), which has the same acronym.

The method changes MAE (arXiv 2111.06377) in three ways. A small decoder makes the encoder do more
of the work. The encoder gets two tasks of its own: a contrastive loss brings two views of an image
together, and a head predicts the positions of tokens. ContrastiveCrop (Peng et al., CVPR 2022)
crops both views around the main object; we look for it where the encoder's tokens differ most from
their mean. If the input contained all positions, the encoder could just copy them. So a random half
of the visible patches of view 1 has no position embedding, and only their positions are predicted.

Usage
    python cmae.py                                        # demo: 3 minutes on two CPU cores
    python cmae.py --crop random --contrastive-weight 0 --position-weight 0 --decoder-depth 4 \
        --out runs/cmae-off                               # all off: MAE with 4 decoder blocks
    python cmae.py --preset cifar                         # CIFAR-10, downloaded to data/
    python cmae.py --preset tiny-imagenet --data tiny-imagenet-200                 # one GPU
    torchrun --nproc-per-node 8 cmae.py --preset tiny-imagenet --data tiny-imagenet-200
    python eval_linear.py runs/cmae-tiny-imagenet --mode finetune --batch-size 64 --base-lr 1e-3 \
        --layer-decay 0.75 --mixup 0 --cutmix 0           # as in the authors' later code

Equations and functions. Views 1 and 2 of an image have the same masked patches; L patches, tau 0.2.
    L_rec    = MAE's loss on view 1 + MAE's loss on view 2                    CMAE.forward
    q_v      = predictor(projector(class token of view v))                    CMAE.compare_views
    k_v      = the same without the predictor, from momentum networks, whose
               weights are w' = m w' + (1 - m) w                              momentum_step
    m        = 1 - (1 - 0.99) (1 + cos(pi step / steps)) / 2                  momentum_at
    nce      = 2 tau CE(cos(q, k) / tau), over the keys k of all images       info_nce
    L_con    = nce(q_1, k_2) + nce(q_2, k_1)                                  CMAE.compare_views
    L_pos    = CE over the L places, mean over the withheld positions         position_loss
    L        = L_rec + 0.1 L_con + 0.1 L_pos                                  CMAE.forward
    heat(l)  = max(0, d(l) - mean(d) - std(d)), where d(l) is the distance of
               the token of patch l from the mean token of its image          saliency
    box      = the rows and columns where heat exceeds 0.1 of its maximum     boxes_from_heatmaps
    crop     = a RandomResizedCrop with its centre drawn from the box        sample_contrastive_crop
New boxes come every 20 % of the epochs (rounded, at least 1 epoch). Before, crops are random.

Names in metrics.jsonl
    loss, recon                      L and L_rec, which is the sum over the views
    contrastive, contrastive_acc     L_con; share of queries whose nearest key is of their own image
    position, position_acc           L_pos; share of correct predictions. Chance is 1 / (L - n) if n
                                     visible patches keep their position embedding
    box_area, box_area_shuffled      mean share of the image that a box covers, 1 without boxes; the
                                     same after the cells of each heatmap are permuted. If both are
                                     equal, the heat is scattered instead of lying in one place

What is not taken from the paper
    inferred                    the contrastive loss acts on the encoder's output: the abstract
                                speaks of tasks for the encoder
    the authors' later code,    decoder 128 x 1; colours of view 2; one mask for both views, both
    SDMAE (arXiv 2212.05677)    reconstructed; a momentum network, weight 0.1, frozen random patch
                                embedding; position head, --position-loss mse; "tiny-imagenet"
    other papers                MoCo v3: projector, predictor, contrastive loss, tau and m; Peng et
                                al.: boxes, their schedule, crops; MAE: architecture, masking,
                                reconstruction loss, initialisation
    our choice                  heat; withheld positions; cross-entropy with weight 0.1 (mse: 1);
                                flips of both views; 4 decoder heads; one view and a trained patch
                                embedding if there is no contrastive loss; other presets

Deviations
    heat         Peng et al. sum the channels of the last feature map. After a LayerNorm, this sum
                 is constant up to the affine weights. The class token often attends to the
                 background. With our heat, an object that fills its image is missed.
    pixels       SDMAE predicts raw pixels. MAE's are normalised, so flat patches count like others.
    positions    SDMAE gives all positions and predicts those of both views. Here only tokens of
                 view 1 lack positions, and only these are predicted. SDMAE's head has no GELU, so
                 that its two linear layers amount to one.
    momentum     SDMAE has a momentum copy of the heads only, with m 0.999 and tau 1. Here keys lag
                 behind in the encoder, too, and the contrast is sharper.
    batch        With --accumulate, BatchNorm and negatives use one micro-batch of every process.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes

import common


@dataclass
class Config(common.Config):
    decoder_dim: int = 128  # width of the decoder; MAE's decoder has 512
    decoder_depth: int = 1  # blocks of the decoder; MAE's decoder has 8
    decoder_heads: int = 4  # attention heads of the decoder; MAE's decoder has 16
    crop: Literal["contrastive", "random"] = "contrastive"  # random: always a RandomResizedCrop
    crop_alpha: float = 0.1  # Beta's alpha: small values crop near the box's edges; ImageNet 0.6
    contrastive_weight: float = 0.1  # weight of the contrastive loss; if it is 0, there is one view
    position_weight: float | None = None  # weight of the position loss [0.1 for ce, 1 for mse]
    position_loss: Literal["ce", "mse"] = "ce"  # mse: squared error to one-hot positions (SDMAE)
    position_input: Literal["withheld", "given"] = "withheld"  # given: none is left out
    tau: float = 0.2  # temperature of the contrastive loss
    momentum: float = 0.99  # momentum of the momentum encoder in the first step; it rises to 1
    head_hidden: int = 4096  # hidden width of the projector and the predictor
    head_dim: int = 256  # output width of the projector and the predictor

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads",
                             "head_hidden", "head_dim")  # fmt: skip
        common.check_numbers(self, 0, "contrastive_weight", "position_weight", "momentum")
        common.check_numbers(self, common.POSITIVE, "tau")
        if self.momentum > 1:
            raise common.UserError(f"--momentum must be at most 1, not {self.momentum}")
        if not 0.01 <= self.crop_alpha < math.inf:  # samples of Beta underflow if alpha is smaller
            raise common.UserError(f"--crop-alpha must be at least 0.01, not {self.crop_alpha}")


PRESETS = {
    "demo": dict(  # our choice: it takes three minutes on two CPU cores
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=2,
        decoder_dim=64, decoder_heads=2, min_crop=0.5, head_hidden=256, head_dim=64,
        epochs=2, batch_size=64, base_lr=6e-3, warmup_epochs=0.2, knn_every=10,
    ),
    "cifar": dict(  # our choice
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=64, decoder_heads=2, head_hidden=512, head_dim=128,
        epochs=200, batch_size=256, base_lr=1e-3, warmup_epochs=10,
    ),
    # The settings of the authors' later code, except for tau, momentum and the widths of the heads
    # (MoCo v3's) and crop_alpha (Peng et al.'s for small images). Images are enlarged from 64 px to
    # 224 px.
    "tiny-imagenet": dict(
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=128, decoder_depth=1, min_crop=0.2, crop_alpha=0.1,
        contrastive_weight=0.1, tau=0.2, momentum=0.99, head_hidden=4096, head_dim=256,
        epochs=300, batch_size=64, base_lr=1e-3, warmup_epochs=40, weight_decay=0.05,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ losses


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenates the rows of all processes: x (n, ...), where n is the same in every process ->
    (processes * n, ...). The gradient of a row flows back to the process that the row comes
    from."""
    if not dist.is_initialized():
        return x
    parts = list(common.gather(x))
    # All processes compute the same loss, but each has gradients only for its own rows, and DDP
    # averages gradients. So the gradient of the local part is scaled by the number of processes.
    # The value of the local part stays the same.
    parts[dist.get_rank()] = x + (len(parts) - 1) * (x - x.detach())
    return torch.cat(parts)


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """The cosine of each query with each key: q (B, d), k (N, d) -> (B, N), without autocast."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T


def info_nce(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """MoCo v3's contrastive loss, `nce` in the module docstring: 2 tau times the cross-entropy of
    the logits cosine / tau. q (B, d), k (N, d) with N >= B -> scalar. k[i] is the right key of
    q[i], and all other keys are negatives."""
    own = torch.arange(len(q), device=q.device)
    return 2 * tau * F.cross_entropy(cosines(q, k) / tau, own)


def position_loss(logits: Tensor, positions: Tensor, kind: str) -> Tensor:
    """L_pos of the module docstring: logits (B, n, L), positions (B, n) in 0..L-1 -> scalar.

    With kind "ce", it is the cross-entropy. With "mse", it is the squared error between the logits
    and the one-hot position, averaged over the L classes, too."""
    if kind == "ce":
        return F.cross_entropy(logits.float().flatten(0, 1), positions.flatten())
    return F.mse_loss(logits.float(), F.one_hot(positions, logits.shape[2]).float())


def mlp(width: int, hidden: int, out: int, depth: int) -> nn.Sequential:
    """MoCo v3's projector (depth 3) or predictor (depth 2): `depth` linear layers without bias,
    with BatchNorm and ReLU between them, and a BatchNorm without affine weights at the end."""
    layers = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    last = nn.Linear(width, out, bias=False)
    return nn.Sequential(*layers, last, nn.BatchNorm1d(out, affine=False))


class CMAE(nn.Module):
    """MAE on one or two views, with a contrastive task and a position task for the encoder.

    A task with weight 0 has no parameters; if both weights are 0, this is MAE. The default of
    `position_weight` depends on `position_kind`: 0.1 for "ce", 1 for "mse". `position_input` is
    "withheld" or "given": whether the tokens whose position is predicted lack their position
    embedding."""

    def __init__(self, encoder: common.ViT, decoder: common.Decoder, mask_ratio: float = 0.75,
                 contrastive_weight: float = 0.1, position_weight: float | None = None,
                 position_kind: str = "ce", position_input: str = "withheld", tau: float = 0.2,
                 head_hidden: int = 4096, head_dim: int = 256):  # fmt: skip
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio, self.tau = mask_ratio, tau
        if position_weight is None:
            position_weight = 0.1 if position_kind == "ce" else 1.0
        self.contrastive_weight, self.position_weight = contrastive_weight, position_weight
        self.position_kind = position_kind
        self.withhold = position_input == "withheld"
        dim, num_patches = encoder.embed_dim, encoder.num_patches
        visible = common.num_visible(num_patches, mask_ratio)
        # The number of visible patches of view 1 whose position is predicted.
        self.num_predicted = max(1, visible // 2) if self.withhold else visible
        if contrastive_weight:
            encoder.patch_embed.requires_grad_(False)  # not trained, for stability (MoCo v3)
            self.projector = mlp(dim, head_hidden, head_dim, depth=3)
            self.predictor = mlp(head_dim, head_hidden, head_dim, depth=2)
            self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if position_weight:
            self.position_head = nn.Sequential(
                nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, num_patches)
            )

    @torch.no_grad()
    def momentum_step(self, momentum: float) -> None:
        """Moves the weights w' of the momentum encoder and the momentum projector to
        m w' + (1 - m) w, where m is `momentum` and w are the trained weights."""
        averages = [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]
        trained = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(averages, trained, 1 - momentum)

    def forward(self, view1: Tensor, view2: Tensor | None = None):
        """The loss L of the module docstring. The views are (B, C, H, W). Raises UserError if their
        number is wrong: the model takes two views with a contrastive loss, and one without.

        Returns the loss and, without gradient, the stats: recon, always; contrastive and
        contrastive_acc with a contrastive loss; position and position_acc with a position loss."""
        if (view2 is not None) != (self.contrastive_weight > 0):
            raise common.UserError(
                "the model takes two views if it has a contrastive loss, and one view otherwise"
            )
        vit, count = self.encoder, len(view1)
        imgs = view1 if view2 is None else torch.cat([view1, view2])
        num_views = 1 if view2 is None else 2
        visible, mask = common.random_masking(count, vit.num_patches, self.mask_ratio, imgs.device)
        # Visible patches come in random order, so the first half of them is a random half.
        predicted = visible[:, : self.num_predicted]  # the positions to predict
        predicted_tokens = slice(1, 1 + self.num_predicted)  # their tokens, after the class token
        all_visible = visible.repeat(num_views, 1)  # both views have the same mask

        x = vit.embed(imgs, all_visible)
        if self.position_weight and self.withhold:
            # These tokens of view 1 are replaced by their embedding without positions.
            patches = common.take_tokens(common.patchify(view1, vit.patch_size), predicted)
            x[:count, predicted_tokens] = vit.patch_embed(patches)
        for block in vit.blocks:
            x = block(x)
        tokens = vit.norm(x)

        pred, target = self.decoder(tokens, all_visible), common.patchify(imgs, vit.patch_size)
        # masked_mse is the mean over the views, and L_rec is their sum.
        recon = num_views * common.masked_mse(pred, target, mask.repeat(num_views, 1))
        loss, stats = recon, dict(recon=recon)
        if self.contrastive_weight:
            contrastive, accuracy = self.compare_views(imgs, all_visible, tokens[:, 0])
            loss = loss + self.contrastive_weight * contrastive
            stats.update(contrastive=contrastive, contrastive_acc=accuracy)
        if self.position_weight:
            logits = self.position_head(tokens[:count, predicted_tokens])
            position = position_loss(logits, predicted, self.position_kind)
            loss = loss + self.position_weight * position
            accuracy = (logits.argmax(dim=2) == predicted).float().mean()
            stats.update(position=position, position_acc=accuracy)
        return loss, {name: x.detach() for name, x in stats.items()}

    def compare_views(self, imgs: Tensor, visible: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
        """L_con of the module docstring, and the mean `contrastive_accuracy` of both directions.

        imgs (2B, C, H, W) holds all first views and then all second views, `visible` (2B, n) their
        visible patches, and `cls` (2B, D) their class tokens from the encoder."""
        with torch.no_grad():
            key_cls1, key_cls2 = self.momentum_encoder(imgs, visible)[:, 0].chunk(2)
            k1 = self.momentum_projector(common.gather(key_cls1).flatten(0, 1))
            k2 = self.momentum_projector(common.gather(key_cls2).flatten(0, 1))
        cls1, cls2 = cls.chunk(2)
        q1 = self.predictor(self.projector(gather_with_gradient(cls1)))
        q2 = self.predictor(self.projector(gather_with_gradient(cls2)))
        loss = info_nce(q1, k2, self.tau) + info_nce(q2, k1, self.tau)
        return loss, (contrastive_accuracy(q1, k2) + contrastive_accuracy(q2, k1)) / 2


@torch.no_grad()
def contrastive_accuracy(q: Tensor, k: Tensor) -> Tensor:
    """The share of queries whose nearest key by cosine is their own: q, k (B, d) -> scalar."""
    own = torch.arange(len(q), device=q.device)
    return (cosines(q, k).argmax(dim=1) == own).float().mean()


def momentum_at(step: int, total: int, start: float) -> float:
    """The momentum m of a step: `start` at step 0, then half a cosine up to 1 at step `total`,
    which comes after the last step."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))


# ------------------------------------------------------------------------------ ContrastiveCrop


def saliency(encoder: common.ViT, imgs: Tensor) -> Tensor:
    """The heat of each patch, as in the module docstring: imgs (B, C, H, W) -> heatmaps (B, h, w).

    The heat is the distance between the token of a patch and the mean patch token of its image,
    minus the mean and the standard deviation of these distances, and at least 0. Patches that
    resemble the majority get heat 0. Usually they are the background, where Peng et al.'s rule
    needs values near 0; but if an object fills its image, they are the object."""
    tokens = encoder(imgs)[:, 1:].float()
    distance = (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=2)
    std, mean = torch.std_mean(distance, dim=1, keepdim=True)
    return (distance - mean - std).relu().unflatten(1, encoder.grid)


def scale_and_enlarge(heatmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales each heatmap to 0..1 and enlarges it to `size` (H, W) by bilinear interpolation:
    heatmaps (B, h, w) -> (B, H, W). A constant heatmap becomes 1 everywhere."""
    low, high = heatmaps.amin(dim=(1, 2), keepdim=True), heatmaps.amax(dim=(1, 2), keepdim=True)
    heat = torch.where(high > low, (heatmaps - low) / (high - low), 1.0)
    return F.interpolate(heat[:, None], size, mode="bilinear")[:, 0]


def boxes_from_heatmaps(heatmaps: Tensor, size: tuple[int, int], threshold=0.1) -> Tensor:
    """Finds the box around the hot part of each heatmap by Peng et al.'s rule.

    heatmaps (B, h, w) -> boxes (B, 4): h_min, w_min, h_max, w_max, as shares of the image's height
    and width. Each heatmap is scaled to 0..1 and enlarged to `size` (H, W). Its box extends from
    the first to the last row, and from the first to the last column, that has a value above the
    threshold. The last row H - 1 gives (H - 1) / H, so that no box reaches 1."""
    hot = scale_and_enlarge(heatmaps, size) > threshold
    rows = first_and_last(hot.any(dim=2))
    columns = first_and_last(hot.any(dim=1))
    return torch.stack([rows, columns], dim=2).flatten(1)


def first_and_last(hot: Tensor) -> Tensor:
    """The first and the last index that is True, divided by n: hot (B, n) bool -> (B, 2)."""
    values, count = hot.int(), hot.shape[1]
    first = values.argmax(dim=1)  # argmax returns the first of several equal values
    last = count - 1 - values.flip(1).argmax(dim=1)
    return torch.stack([first, last], dim=1) / count


def sample_contrastive_crop(height: int, width: int, box: Tensor, scale=(0.2, 1.0),
                            ratio=(3 / 4, 4 / 3), alpha: float = 0.6) -> tuple:  # fmt: skip
    """Draws a ContrastiveCrop (top, left, h, w) in pixels, from an image of height x width pixels.

    Height and width of the crop are those of a RandomResizedCrop. `box` (4,) is h_min, w_min,
    h_max, w_max as shares of the image. Along each axis, a share is drawn from Beta(alpha, alpha),
    and the centre of the crop lies at this share of the way between the two edges of the box. See
    `crop_start` for crops that would leave the image."""
    _, _, h, w = v2.RandomResizedCrop.get_params(torch.empty(1, height, width), scale, ratio)
    h_min, w_min, h_max, w_max = box.tolist()
    beta = torch.distributions.Beta(alpha, alpha, validate_args=False)
    down, right = beta.sample((2,)).tolist()
    top = crop_start(height, h, h_min, h_max, down)
    left = crop_start(width, w, w_min, w_max, right)
    return top, left, h, w


def crop_start(side: int, length: int, low: float, high: float, share: float) -> int:
    """The first row (or column) of a crop of `length` pixels from an image of `side` pixels.

    The edges of the box are `low` and `high`, as shares of the side. Consider the two crops whose
    centres lie on these edges; if necessary, they are moved into the image. The result lies at the
    given `share` of the way between the first rows of these two crops."""
    room = side - length
    first = min(max(int(side * low) - length // 2, 0), room)
    last = min(max(int(side * high) - length // 2, 0), room)
    return first + int((last - first) * share)


class ContrastiveCrop(nn.Module):
    """The augmentation of a training set of `count` images; it holds the boxes of these images.

    It makes one view of an image or, with `contrast`, two. Each view is cropped by
    `sample_contrastive_crop` and flipped with probability 1/2, and the colours of the second view
    are changed. Before the first `update` there are no boxes, and views are RandomResizedCrops
    instead. `size` is the side of a view in pixels, `min_crop` the smallest area of a crop as a
    share of the image, and `alpha` that of `sample_contrastive_crop`."""

    def __init__(self, count: int, size: int, min_crop: float, alpha: float, contrast: bool):
        super().__init__()
        self.size, self.scale = size, (min_crop, 1.0)
        self.alpha, self.contrast = alpha, contrast
        self.random_crop = common.RandomCrop(size, min_crop)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        self.change_colours = v2.Compose([jitter, v2.RandomGrayscale(0.2)])
        self.register_buffer("boxes", torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))  # True after an update
        self.register_buffer("areas", torch.ones(2))  # box_area and box_area_shuffled

    def forward(self, image: Tensor, label, index: int) -> tuple:
        """Returns view 1, view 2 if there are two, and the label; see common.Views."""
        view1 = self.crop(image, index)
        if not self.contrast:
            return view1, label
        return view1, self.change_colours(self.crop(image, index)), label

    def crop(self, image: Tensor, index: int) -> Tensor:
        """One view (3, size, size) of an image (3, H, W)."""
        if not self.known:
            view, _ = self.random_crop(image, None, index)
            return view
        _, height, width = image.shape
        box = self.boxes[index]
        crop = sample_contrastive_crop(height, width, box, self.scale, alpha=self.alpha)
        return self.random_crop.cut(image, *crop)

    def resize(self, image: Tensor, label, index: int) -> tuple:
        """The augmentation for `update`: the whole image, resized to (3, size, size)."""
        return v2.functional.resize(image, [self.size, self.size], common.BICUBIC), label

    def update(self, run: common.Run, encoder: common.ViT, images) -> None:
        """Computes the boxes anew from the encoder's tokens of the whole images, and their mean
        area. For comparison, it also computes the mean area of boxes of shuffled heatmaps. Draws
        some images with their boxes, in boxes_NNNN.png."""
        size = (self.size, self.size)
        order = torch.randperm(encoder.num_patches, generator=common.seeded("shuffle"))

        def find_boxes(imgs: Tensor) -> Tensor:
            """(B, C, H, W) -> (B, 2, 4): the boxes of the heatmaps and of the shuffled ones."""
            heat = saliency(encoder, imgs)
            shuffled = heat.flatten(1)[:, order].view_as(heat)
            both = [boxes_from_heatmaps(heat, size), boxes_from_heatmaps(shuffled, size)]
            return torch.stack(both, dim=1)

        found, _ = common.outputs(run, encoder, find_boxes, images, self.resize)
        self.boxes.copy_(found[:, 0])
        self.known.fill_(True)
        heights_and_widths = found[:, :, 2:] - found[:, :, :2]
        self.areas.copy_(heights_and_widths.prod(dim=2).mean(dim=0))
        if run.rank == 0:
            imgs = common.example_images(images, self.resize, run.device)
            boxes = self.boxes[common.evenly_spaced(images, len(imgs))]  # those of the examples
            path = run.folder / f"boxes_{run.epoch:04d}.png"
            common.save_grid(path, draw_boxes(encoder, imgs, boxes))


@torch.no_grad()
def draw_boxes(encoder: common.ViT, imgs: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Draws whole images with their boxes, and the heatmaps that gave the boxes.

    imgs (N, 3, H, W), boxes (N, 4) -> the picture's rows: a dict of labels and normalised images
    (N, 3, H, W)."""
    height, width = imgs.shape[2:]
    # draw_bounding_boxes takes corners in the order x_min, y_min, x_max, y_max, in pixels.
    corners = boxes.cpu()[:, None, [1, 0, 3, 2]] * torch.tensor([width, height, width, height])
    pixels = (255 * common.denormalize(imgs)).to(torch.uint8)
    outlined = []
    for img, box in zip(pixels, corners, strict=True):
        outlined.append(draw_bounding_boxes(img, box, colors="red"))
    heat = scale_and_enlarge(saliency(encoder, imgs), (height, width))
    return {
        "input and box": common.normalize(torch.stack(outlined)),
        "heat: far from the mean token": common.normalize(255 * heat[:, None].expand_as(imgs)),
    }


# ------------------------------------------------------------------------------ training


@torch.no_grad()
def reconstruct(model: CMAE, imgs: Tensor) -> dict[str, Tensor]:
    """Reconstructs imgs (N, 3, H, W), with all positions given, and returns the picture's rows: a
    dict of labels and normalised images (N, 3, H, W)."""
    vit = model.encoder
    visible, mask = common.random_masking(len(imgs), vit.num_patches, model.mask_ratio, imgs.device)
    pred = model.decoder(vit(imgs, visible), visible)
    return common.reconstruction_rows(imgs, pred, mask, vit.patch_size)


def build(cfg: Config) -> CMAE:
    """The model of these settings, with fresh weights."""
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return CMAE(
        encoder, decoder, cfg.mask_ratio, cfg.contrastive_weight, cfg.position_weight,
        cfg.position_loss, cfg.position_input, cfg.tau, cfg.head_hidden, cfg.head_dim,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """Pre-trains a CMAE and writes the run's folder. `data` is a pair of torch Datasets: the
    training images, and the validation images or None. Without `data`, cfg.data is loaded."""
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    contrast = cfg.contrastive_weight > 0
    if contrast and cfg.batch_size // cfg.accumulate < 2:
        raise common.UserError(
            "the contrastive loss needs at least 2 images at a time, over all processes: raise "
            "--batch-size or lower --accumulate"
        )
    if cfg.init_from and not run.resumes:
        missing = common.init_from(cfg.init_from, model)
        if "momentum_encoder" in missing:  # it starts as a copy of the encoder
            model.momentum_encoder.load_state_dict(model.encoder.state_dict())
    optimizer = common.adamw(model, cfg.weight_decay)

    train, val = data or common.load_pair(cfg)
    crops = ContrastiveCrop(len(train), cfg.img_size, cfg.min_crop, cfg.crop_alpha, contrast)
    loader = common.TrainLoader(run, train, crops)
    examples = common.example_images(val or train, common.CentreCrop(cfg.img_size), run.device)
    run.start(loader, val, model=model, optimizer=optimizer, crops=crops)
    ddp = run.wrap(model)
    fifth = max(1, round(0.2 * cfg.epochs))  # in epochs; boxes are computed after each
    for epoch in run.epochs():
        boxes_are_due = cfg.crop == "contrastive" and epoch > 1 and (epoch - 1) % fifth == 0
        # A run that was stopped within this epoch has its boxes from the checkpoint.
        in_mid_epoch = run.step > (epoch - 1) * loader.steps
        if boxes_are_due and not in_mid_epoch:
            crops.update(run, model.encoder, train)
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            if contrast:
                model.momentum_step(momentum_at(run.step, run.total, cfg.momentum))
            for *views, _ in micro_batches:
                with run.autocast():
                    loss, stats = ddp(*views)
                run.backward(loss)
                run.log(loss=loss, **stats)
            run.update(optimizer)
        area, shuffled = crops.areas.tolist()
        run.end_epoch(model.encoder, picture=lambda: reconstruct(model, examples),
                      box_area=area, box_area_shuffled=shuffled)  # fmt: skip


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
