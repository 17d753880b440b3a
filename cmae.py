"""CMAE (Mao, Yin, Chang and Zhou, 2022, arXiv 2205.10546). It is not "Contrastive Masked
Autoencoders" (arXiv 2207.13532), which has the same acronym.

The method changes MAE (arXiv 2111.06377) in three ways. A small decoder makes the encoder do more
of the work. The encoder gets two tasks of its own: a contrastive loss brings two views of an image
together, and a head predicts the positions of tokens. ContrastiveCrop (Peng et al., CVPR 2022)
crops both views around the main object; we look for it where the encoder's tokens differ most from
their mean. An encoder that gets all positions as input only has to copy them. So a random half of
the visible patches of view 1 has no position embedding, and only their positions are predicted.

Usage
    python cmae.py                                        # demo: 3 minutes on two CPU cores
    python cmae.py --crop random --contrastive-weight 0 --position-weight 0 --decoder-depth 4 \\
        --out runs/cmae-off                               # all three off: this is MAE
    python cmae.py --preset cifar                         # CIFAR-10, downloaded to data/
    python cmae.py --preset tiny-imagenet --data tiny-imagenet-200                 # one GPU
    torchrun --nproc-per-node 8 cmae.py --preset tiny-imagenet --data tiny-imagenet-200
    python eval_linear.py runs/cmae-demo --baseline       # probe, also of an untrained encoder

Equations and functions. Views 1 and 2 of an image have the same masked patches; L patches, tau 0.2.
    L_rec    = MAE's loss on view 1 + MAE's loss on view 2                    CMAE.forward
    q_v      = predictor(projector(class token of view v))                    CMAE.forward
    k_v      = the same without the predictor, from momentum networks, whose
               weights are w' = m w' + (1 - m) w                              momentum_step
    m        = 1 - (1 - 0.99) (1 + cos(pi step / steps)) / 2                  momentum_at
    nce      = 2 tau CE(cos(q, k) / tau), over the keys k of all images       info_nce
    L_con    = nce(q_1, k_2) + nce(q_2, k_1)                                  CMAE.forward
    L_pos    = CE over the L places, mean over the withheld positions         position_loss
    L        = L_rec + 0.1 L_con + 0.1 L_pos                                  CMAE.forward
    heat(l)  = max(0, d(l) - mean(d) - std(d)), where d(l) is the distance of
               the token of patch l from the mean token of its image          saliency
    box      = the rows and columns where heat exceeds 0.1 of its maximum     boxes_from_heatmaps
    crop     = a RandomResizedCrop with its centre drawn from the box        sample_contrastive_crop
Boxes are computed after about every fifth of the epochs. Until the first ones, crops are random.

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
    heat         Peng et al. sum the channels of the last feature map. After a LayerNorm this sum is
                 constant but for the affine weights, and the class token often attends to the
                 background. With our heat, an object that fills its image is missed.
    pixels       SDMAE predicts raw pixels. MAE's are normalised, so flat patches count like others.
    positions    SDMAE gives all positions and predicts those of both views. Here view 2 trains no
                 positions, and L_rec of view 1 and q_1 see half of its positions; the keys see all.
                 SDMAE's head has no GELU, so that its two linear layers amount to one.
    momentum     SDMAE has a momentum copy of the heads only, with m 0.999 and tau 1. Here keys lag
                 behind in the encoder, too, and the contrast is sharper.
    batch        BatchNorm and negatives use the images of all processes, but with --accumulate only
                 those of one micro-batch.
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
    decoder_dim: int = 128  # width of the decoder; MAE's is 512
    decoder_depth: int = 1  # blocks of the decoder; MAE has 8
    decoder_heads: int = 4  # attention heads of the decoder
    crop: Literal["contrastive", "random"] = "contrastive"  # random is RandomResizedCrop
    crop_alpha: float = 0.1  # of Beta: below 1 crops keep to the rim of the box; ImageNet 0.6
    contrastive_weight: float = 0.1  # of the contrastive loss; 0: one view, no momentum encoder
    position_weight: float | None = None  # of the position loss, by default 0.1 for ce, 1 for mse
    position_loss: Literal["ce", "mse"] = "ce"  # mse: of the one-hot position, as in SDMAE
    position_input: Literal["withheld", "given"] = "withheld"  # given: too easy, for comparison
    tau: float = 0.2  # temperature of the contrastive loss
    momentum: float = 0.99  # of the momentum encoder at the start; rises to 1
    head_hidden: int = 4096  # hidden width of projector and predictor
    head_dim: int = 256  # width in which views are compared

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads",
                             "head_hidden", "head_dim")  # fmt: skip
        common.check_numbers(self, 0, "contrastive_weight", "position_weight", "momentum")
        common.check_numbers(self, 1e-30, "tau")
        if self.momentum > 1:
            raise common.UserError(f"--momentum must be at most 1, not {self.momentum}")
        if not 0.01 <= self.crop_alpha < math.inf:  # Beta's samples underflow below
            raise common.UserError(f"--crop-alpha must be at least 0.01, not {self.crop_alpha}")


PRESETS = {
    "demo": dict(  # ours, for two cores and two minutes
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=2,
        decoder_dim=64, decoder_heads=2, min_crop=0.5, head_hidden=256, head_dim=64,
        epochs=2, batch_size=64, base_lr=6e-3, warmup_epochs=0.2, knn_every=10,
    ),
    "cifar": dict(  # ours
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=64, decoder_heads=2, head_hidden=512, head_dim=128,
        epochs=200, batch_size=256, base_lr=1e-3, warmup_epochs=10,
    ),
    # Of the authors' later code, but tau, momentum and heads, which are MoCo v3's, and crop_alpha,
    # which is Peng et al.'s for small images. Images are enlarged to 224 px.
    "tiny-imagenet": dict(
        data=None, img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=128, decoder_depth=1, min_crop=0.2, crop_alpha=0.1,
        contrastive_weight=0.1, tau=0.2, momentum=0.99, head_hidden=4096, head_dim=256,
        epochs=300, batch_size=64, base_lr=1e-3, warmup_epochs=40, weight_decay=0.05,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------ losses


def gather_with_gradient(x: Tensor) -> Tensor:
    """x (n, ...) of every process, n being the same in all -> (processes * n, ...). Gradients go
    back to the process that a row came from."""
    if not dist.is_initialized():
        return x
    parts = list(common.gather(x))
    # All processes compute the same loss, and DDP averages their gradients. So the gradient of this
    # process's own part is scaled by the number of processes; its value stays.
    parts[dist.get_rank()] = x + (len(parts) - 1) * (x - x.detach())
    return torch.cat(parts)


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """Queries (B, d), keys (N, d) -> (B, N), in fp32."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T


def info_nce(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """Queries (B, d), keys (N, d) with N >= B -> cross-entropy of cosine / tau, times 2 tau, in
    fp32. The key of query i is k[i]."""
    own = torch.arange(len(q), device=q.device)
    return 2 * tau * F.cross_entropy(cosines(q, k) / tau, own)


def position_loss(logits: Tensor, positions: Tensor, kind: str) -> Tensor:
    """logits (B, n, L), positions (B, n) in 0..L-1; kind "ce": cross-entropy, or "mse": squared
    error of the logits to the one-hot position, mean over L as well."""
    if kind == "ce":
        return F.cross_entropy(logits.float().flatten(0, 1), positions.flatten())
    return F.mse_loss(logits.float(), F.one_hot(positions, logits.shape[2]).float())


def mlp(width: int, hidden: int, out: int, depth: int) -> nn.Sequential:
    """MoCo v3's head: `depth` linear layers without bias, BatchNorm and ReLU between, BatchNorm
    without affine at the end."""
    layers = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    last = nn.Linear(width, out, bias=False)
    return nn.Sequential(*layers, last, nn.BatchNorm1d(out, affine=False))


class CMAE(nn.Module):
    """MAE of one or two views with tasks for the encoder. A task of weight 0 has no parameters;
    with both at 0 this is MAE. `position_weight` None: 0.1 for "ce", 1 for "mse"."""

    def __init__(self, encoder: common.ViT, decoder: common.Decoder, mask_ratio: float = 0.75,
                 contrastive_weight: float = 0.1, position_weight: float | None = None,
                 position_kind: str = "ce", position_input: str = "withheld", tau: float = 0.2,
                 head_hidden: int = 4096, head_dim: int = 256):  # fmt: skip
        super().__init__()
        self.encoder, self.decoder, self.mask_ratio, self.tau = encoder, decoder, mask_ratio, tau
        if position_weight is None:
            position_weight = 0.1 if position_kind == "ce" else 1.0
        self.contrastive_weight, self.position_weight = contrastive_weight, position_weight
        self.position_kind, self.withhold = position_kind, position_input == "withheld"
        dim, num_patches = encoder.embed_dim, encoder.num_patches
        keep = common.num_visible(num_patches, mask_ratio)
        self.asked = max(1, keep // 2) if self.withhold else keep  # tokens, for their position
        if contrastive_weight:
            encoder.patch_embed.requires_grad_(False)  # random, for stability (MoCo v3)
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
        """The momentum encoder and projector approach the others."""
        pairs = (self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector)
        for slow, fast in pairs:
            torch._foreach_lerp_([*slow.parameters()], [*fast.parameters()], 1 - momentum)

    def forward(self, view1: Tensor, view2: Tensor | None = None):
        """Views (B, C, H, W), the second one with contrast only -> the loss, and stats without
        gradient: recon; with contrast contrastive, contrastive_acc; with prediction position,
        position_acc."""
        if (view2 is None) == (self.contrastive_weight > 0):
            raise common.UserError("contrast takes two views; without it there is one")
        imgs, count = view1 if view2 is None else torch.cat([view1, view2]), len(view1)
        views, vit = len(imgs) // count, self.encoder
        visible, mask = common.random_masking(count, vit.num_patches, self.mask_ratio, imgs.device)
        asked = visible[:, : self.asked]  # in random order: the first half is a random half
        all_visible = visible.repeat(views, 1)
        x = vit.embed(imgs, all_visible)
        if self.position_weight and self.withhold:  # once more, without position
            patches = common.take_tokens(common.patchify(view1, vit.patch_size), asked)
            x[:count, 1 : 1 + self.asked] = vit.patch_embed(patches)
        for block in vit.blocks:
            x = block(x)
        tokens = vit.norm(x)

        pred, target = self.decoder(tokens, all_visible), common.patchify(imgs, vit.patch_size)
        loss = views * common.masked_mse(pred, target, mask.repeat(views, 1))
        stats = dict(recon=loss)
        if self.contrastive_weight:
            with torch.no_grad():
                slow = self.momentum_encoder(imgs, all_visible)[:, 0].chunk(2)
                k1, k2 = (self.momentum_projector(gather_with_gradient(x)) for x in slow)
            cls = (gather_with_gradient(x) for x in tokens[:, 0].chunk(2))
            q1, q2 = (self.predictor(self.projector(x)) for x in cls)
            contrastive = info_nce(q1, k2, self.tau) + info_nce(q2, k1, self.tau)
            loss = loss + self.contrastive_weight * contrastive
            hits = nearest(q1, k2) + nearest(q2, k1)
            stats.update(contrastive=contrastive, contrastive_acc=hits / 2)
        if self.position_weight:
            logits = self.position_head(tokens[:count, 1 : 1 + self.asked])
            position = position_loss(logits, asked, self.position_kind)
            loss = loss + self.position_weight * position
            hits = (logits.argmax(dim=2) == asked).float().mean()
            stats.update(position=position, position_acc=hits)
        return loss, {name: x.detach() for name, x in stats.items()}


@torch.no_grad()
def nearest(q: Tensor, k: Tensor) -> Tensor:
    """Share of the queries (B, d) whose nearest key (B, d) by cosine is their own."""
    return (cosines(q, k).argmax(dim=1) == torch.arange(len(q), device=q.device)).float().mean()


def momentum_at(step: int, total: int, start: float) -> float:
    """`start` at step 0, half a cosine up to 1 at step `total`, one after the last."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))


# ------------------------------------------------------------------------------ ContrastiveCrop


def saliency(encoder: common.ViT, imgs: Tensor) -> Tensor:
    """imgs (B, C, H, W) -> heatmaps (B, h, w): how far each patch's token lies from the mean of its
    image's, less the mean + std of these distances, and not below 0. What most patches are like is
    0: the background that Peng et al.'s rule needs, or else an object that fills the image."""
    tokens = encoder(imgs)[:, 1:].float()
    distance = (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=2)
    std, mean = torch.std_mean(distance, dim=1, keepdim=True)
    return (distance - mean - std).relu().unflatten(1, encoder.grid)


def stretched(heatmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """heatmaps (B, h, w) -> (B, H, W): each scaled to 0..1, a constant one to 1, then enlarged."""
    low, high = heatmaps.amin(dim=(1, 2), keepdim=True), heatmaps.amax(dim=(1, 2), keepdim=True)
    heat = torch.where(high > low, (heatmaps - low) / (high - low), 1.0)
    return F.interpolate(heat[:, None], size, mode="bilinear")[:, 0]


def boxes_from_heatmaps(heatmaps: Tensor, size: tuple[int, int], threshold=0.1) -> Tensor:
    """Peng et al.'s rule: heatmaps (B, h, w) -> boxes (B, 4) as shares of the image's height and
    width: h_min, w_min, h_max, w_max, the first and last row and column that exceed the threshold,
    once the map is scaled to 0..1 and enlarged to `size` (H, W). A constant map gives all rows
    but the last: 0 to (H - 1) / H, and columns likewise."""
    hot = stretched(heatmaps, size) > threshold
    spans = []
    for line in (hot.any(dim=2).int(), hot.any(dim=1).int()):
        first, last = line.argmax(dim=1), line.shape[1] - 1 - line.flip(1).argmax(dim=1)
        spans.append(torch.stack([first, last], dim=1) / line.shape[1])
    return torch.stack(spans, dim=2).flatten(1)


def sample_contrastive_crop(height: int, width: int, box: Tensor, scale=(0.2, 1.0),
                            ratio=(3 / 4, 4 / 3), alpha: float = 0.6) -> tuple:  # fmt: skip
    """A crop (top, left, h, w) in pixels, of the size of a RandomResizedCrop. `box` (4,) holds
    shares of the image. The centre of the crop lies in the box, at a share of its height and width
    that is drawn from Beta(alpha, alpha) for each axis; the crop is kept inside the image."""
    _, _, h, w = v2.RandomResizedCrop.get_params(torch.empty(1, height, width), scale, ratio)
    h_min, w_min, h_max, w_max = box.tolist()
    beta = torch.distributions.Beta(alpha, alpha, validate_args=False)
    down, right = beta.sample((2,)).tolist()
    top = crop_start(height, h, h_min, h_max, down)
    left = crop_start(width, w, w_min, w_max, right)
    return top, left, h, w


def crop_start(side: int, length: int, low: float, high: float, share: float) -> int:
    """Where a crop of `length` pixels starts: at `share` of the way between the two places that put
    its middle on the box's edges, `low` and `high`, shares of the image's `side`."""
    room = side - length
    first = min(max(int(side * low) - length // 2, 0), room)
    last = min(max(int(side * high) - length // 2, 0), room)
    return first + int((last - first) * share)


class ContrastiveCrop(nn.Module):
    """The augmentation of a training set: one view of an image or, with `contrast`, a second one
    whose colours change. A view is a crop by the image's box, flipped or not; before the first
    `update` it is a random resized crop."""

    def __init__(self, count: int, size: int, min_crop: float, alpha: float, contrast: bool):
        super().__init__()
        self.size, self.scale, self.alpha, self.contrast = size, (min_crop, 1.0), alpha, contrast
        self.random_crop = common.RandomCrop(size, min_crop)
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        self.change_colours = v2.Compose([jitter, v2.RandomGrayscale(0.2)])
        self.register_buffer("boxes", torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))
        self.register_buffer("areas", torch.ones(2))  # of the boxes, and of shuffled maps' boxes

    def forward(self, image: Tensor, label, index: int) -> tuple:
        """See common.Views; -> view 1, view 2 if there is one, label."""
        view1 = self.crop(image, index)
        if not self.contrast:
            return view1, label
        return view1, self.change_colours(self.crop(image, index)), label

    def crop(self, image: Tensor, index: int) -> Tensor:
        """One crop (3, size, size) of an image (3, H, W), flipped or not."""
        if not self.known:
            view, _ = self.random_crop(image, None, index)
            return view
        _, height, width = image.shape
        box = self.boxes[index]
        crop = sample_contrastive_crop(height, width, box, self.scale, alpha=self.alpha)
        return self.random_crop.cut(image, *crop)

    def whole(self, image: Tensor, label, index: int) -> tuple:
        """The whole image (3, size, size), for `update`."""
        return v2.functional.resize(image, [self.size, self.size], common.BICUBIC), label

    def update(self, run: common.Run, encoder: common.ViT, images) -> None:
        """New boxes from the encoder's tokens of whole images, and a picture of some. Their mean
        area, and that of boxes of the same maps with their cells permuted."""
        size = (self.size, self.size)
        order = torch.randperm(encoder.num_patches, generator=common.seeded("shuffle"))

        def find(imgs: Tensor) -> Tensor:  # (B, 2, 4): the boxes, and those of the shuffled maps
            heat = saliency(encoder, imgs)
            shuffled = heat.flatten(1)[:, order].view_as(heat)
            return torch.stack([boxes_from_heatmaps(x, size) for x in (heat, shuffled)], dim=1)

        found, _ = common.outputs(run, encoder, find, images, self.whole)
        self.boxes.copy_(found[:, 0])
        self.known.fill_(True)
        self.areas.copy_((found[:, :, 2:] - found[:, :, :2]).prod(dim=2).mean(dim=0))
        if run.rank == 0:
            imgs = common.example_images(images, self.whole, run.device)
            boxes = self.boxes[common.evenly_spaced(images, len(imgs))]
            path = run.folder / f"boxes_{run.epoch:04d}.png"
            common.save_grid(path, draw_boxes(encoder, imgs, boxes))


@torch.no_grad()
def draw_boxes(encoder: common.ViT, imgs: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Whole images (N, 3, H, W) and their boxes (N, 4) -> rows of a picture, label -> (N, 3, H, W)
    normalised images: the boxes, and the heatmaps that gave them."""
    height, width = imgs.shape[2:]
    corners = boxes.cpu()[:, None, [1, 0, 3, 2]] * torch.tensor([width, height, width, height])
    pairs = zip((255 * common.denormalize(imgs)).to(torch.uint8), corners, strict=True)
    outlined = torch.stack([draw_bounding_boxes(img, box, colors="red") for img, box in pairs])
    heat = 255 * stretched(saliency(encoder, imgs), (height, width))[:, None].expand_as(imgs)
    rows = {"input and box": outlined, "unlike the mean of the image": heat}
    return {label: common.normalize(row) for label, row in rows.items()}


# ------------------------------------------------------------------------------ training


@torch.no_grad()
def reconstruct(model: CMAE, imgs: Tensor) -> dict[str, Tensor]:
    """Rows of the reconstruction picture, label -> (N, 3, H, W) normalised images."""
    vit = model.encoder
    visible, mask = common.random_masking(len(imgs), vit.num_patches, model.mask_ratio, imgs.device)
    pred = model.decoder(vit(imgs, visible), visible)
    return common.reconstruction_rows(imgs, pred, mask, vit.patch_size)


def build(cfg: Config) -> CMAE:
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return CMAE(
        encoder, decoder, cfg.mask_ratio, cfg.contrastive_weight, cfg.position_weight,
        cfg.position_loss, cfg.position_input, cfg.tau, cfg.head_hidden, cfg.head_dim,
    )  # fmt: skip


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """`data`: (training images, validation images or None), torch Datasets; None loads cfg.data."""
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    contrast = cfg.contrastive_weight > 0
    if contrast and cfg.batch_size // cfg.accumulate < 2:
        raise common.UserError("contrast takes 2 images in a micro-batch: a larger --batch-size, "
                               "or less --accumulate")  # fmt: skip
    if cfg.init_from and not run.resumes:
        if "momentum_encoder" in common.init_from(cfg.init_from, model):
            model.momentum_encoder.load_state_dict(model.encoder.state_dict())
    optimizer = common.adamw(model, cfg.weight_decay)

    train, val = data or common.load_pair(cfg)
    crops = ContrastiveCrop(len(train), cfg.img_size, cfg.min_crop, cfg.crop_alpha, contrast)
    loader = common.TrainLoader(run, train, crops)
    examples = common.example_images(val or train, common.CentreCrop(cfg.img_size), run.device)
    run.start(loader, val, model=model, optimizer=optimizer, crops=crops)
    ddp = run.wrap(model)
    fifth = max(1, round(0.2 * cfg.epochs))
    for epoch in run.epochs():
        boxes_are_due = cfg.crop == "contrastive" and epoch > 1 and (epoch - 1) % fifth == 0
        in_mid_epoch = run.step > (epoch - 1) * loader.steps  # resumed there, with its boxes
        if boxes_are_due and not in_mid_epoch:
            crops.update(run, model.encoder, train)
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            if contrast:
                model.momentum_step(momentum_at(run.step, run.total, cfg.momentum))
            for view1, *view2, _ in micro_batches:
                with run.autocast():
                    loss, stats = ddp(view1, *view2)
                run.backward(loss)
                run.log(loss=loss, **stats)
            run.update(optimizer)
        area, shuffled = crops.areas.tolist()
        run.end_epoch(model.encoder, picture=lambda: reconstruct(model, examples),
                      box_area=area, box_area_shuffled=shuffled)  # fmt: skip


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
