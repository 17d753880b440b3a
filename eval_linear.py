"""How good is an encoder? Linear probe (default), kNN, fine-tuning, or segmentation.

    python eval_linear.py runs/mae_perceptual-demo --baseline     # beside an untrained encoder
    python eval_linear.py runs/mae_perceptual-demo --mode knn     # trains nothing
    python eval_linear.py runs/mae_perceptual-demo --mode finetune --epochs 10
    python eval_linear.py runs/mae_perceptual-demo --mode segment # which class is at which pixel
    torchrun --nproc-per-node 8 eval_linear.py runs/mae_perceptual-imagenet --data imagenet

The argument is a run folder, an encoder.pt, or a timm or published MAE file (with --data).
The data set and the image size are those of the encoder's training. --img-size N evaluates at
another size, for which the position embedding is interpolated. The last line printed is, for
example, `linear top-1 61.3 (untrained 38.2)`. eval.json beside the encoder has the latest scores.
Its entries are linear (the cached probe), linear-protocol (MAE's), knn, finetune and segment. If
--pool is not the mode's default, it is added to the name: linear-mean. So is --img-size if it is
not the encoder's size: knn-64px.
eval_linear.main(eval_linear.Config(encoder=...), (train, val)) evaluates on your own Datasets; with
mode="segment" they return (image, mask), where classes are counted from 0.

linear     MAE's protocol: a BatchNorm without affine and a linear layer on the class token of the
           frozen encoder; LARS, base learning rate 0.1 x batch / 256, no weight decay, batch
           16384, 90 epochs (50 for ViT-L and ViT-H), 10 of them warm-up, cosine schedule; random
           crops of area (0.08, 1) and flips. A batch is split into micro-batches of at most 512
           images, each with its own BatchNorm statistics, as on 32 GPUs.
           --cache-features, the default below 200 000 images, computes the features once, without
           augmentation, and fits a logistic regression to them: minutes instead of hours. Its
           accuracy is not comparable with the protocol's. Its L2 penalty is --weight-decay; by
           default it is chosen on a held-out tenth of the training images.
knn        As in DINO, the k training images of highest cosine similarity vote, each with weight
           exp(cosine / 0.07). The printed score has k = 20. eval.json also has other k, and the
           share of images whose nearest neighbour is of their class (1-NN retrieval).
finetune   MAE's recipe: AdamW, layer-wise learning rate decay, drop path, RandAugment, random
           erasing, mixup, cutmix, label smoothing; a LayerNorm and a linear layer on the mean of
           the patch tokens.
segment    The encoder is frozen. A BatchNorm without affine and a linear layer map each patch token
           to class logits, which are enlarged bilinearly to the size of the image. AdamW, learning
           rate 0.03, no weight decay, batch 64, 10 epochs; crops of area (0.5, 1) and flips of
           image and mask together. A mask has one class number per pixel; 255 means "no label". The
           score is the mIoU: TP / (TP + FP + FN) over all pixels of the validation images, averaged
           over the classes that occur in the masks or in the predictions. Pixel accuracy is
           printed, too, and that of predicting the most frequent class everywhere. segment.png
           (segment-64px.png at another size) shows eight images, their masks and the predictions.
           --data is shapes (its first 4000 training images), voc2012 (downloaded), or a folder in
           the published layout of ADE20K: images/training/*.jpg, annotations/training/*.png (0
           means "no label", k is class k - 1 of 150), and the same for validation.

Test images: the shorter side is resized to size * 256/224, bicubic, then the centre is cropped;
images of exactly the encoder's size stay whole. In segmentation, image and mask are resized to a
square (bicubic, nearest).

Sources and our choices
    linear, finetune   He et al. 2022, appendix A, and their published settings.
    knn                Wu et al. 2018, in the form of DINO (Caron et al. 2021).
    segment            The idea is iBOT's and DINOv2's, the settings are our choice. Masks are
                       compared at the encoder's size, so scores differ from those of others. The
                       loss is a mean over the labelled pixels of a micro-batch.
    our choices        The cached probe. ViT-B's settings for narrower encoders, too. Random
                       erasing's noise is clipped to the range of pixels. RandAugment "m9" is
                       torchvision's operations at magnitude 9 of 10, two of them with probability
                       1/2 each, as in timm. In contrast to timm, the magnitude has no noise, and
                       images are resampled bilinearly.
"""

import colorsys
import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.transforms import v2

import common
from common import UserError, accuracy


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    may_change = (*common.TrainConfig.may_change, "val_every")

    encoder: str  # run folder, encoder.pt, or a timm or published MAE file
    mode: Literal["linear", "knn", "finetune", "segment"] = "linear"  # see above
    baseline: bool = False  # also evaluate an untrained encoder of the same shape
    img_size: int | None = None  # evaluate at this size; positions are interpolated [encoder's]
    pool: Literal["cls", "mean"] | None = None  # cls token or mean of patches [cls; finetune mean]
    cache_features: bool | None = None  # linear: features only once [if below 200 000 images]
    data: str | None = None  # as in pre-training, with labels [the encoder's]
    data_dir: str | None = None  # where downloaded sets live [the encoder's]
    min_crop: float | None = None  # smallest area of a random crop [0.08; segment 0.5]
    epochs: int | None = None  # [linear 90 (L, H: 50), finetune 100 (L, H: 50), segment 10]
    batch_size: int | None = None  # images per step [linear 16384; finetune 1024; segment 64]
    accumulate: int | None = None  # micro-batches per step [1; linear: until each is <= 512 images]
    base_lr: float | None = None  # lr per 256 images [linear 0.1; finetune 5e-4, L and H 1e-3]
    lr: float | None = None  # the peak learning rate itself; overrides --base-lr [segment 0.03]
    warmup_epochs: float | None = None  # at most a fifth of --epochs [10; finetune 5; segment 1]
    weight_decay: float | None = None  # [0; cached: chosen on held-out images; finetune 0.05]
    layer_decay: float | None = None  # finetune: lr ratio of neighbour layers [0.65, L and H 0.75]
    drop_path: float | None = None  # finetune: stochastic depth [0.1, L 0.2, H 0.3]
    mixup: float = 0.8  # finetune: alpha of mixup; 0 is none
    cutmix: float = 1.0  # finetune: alpha of cutmix; 0 is none
    smoothing: float = 0.1  # finetune: label smoothing
    erasing: float = 0.25  # finetune: probability of random erasing
    val_every: int | None = None  # validate every so many epochs; 0: at the end [1; segment 0]
    out: str | None = None  # where eval.json goes [beside the encoder]

    def check(self) -> None:
        super().check()
        names = ("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "erasing")
        common.check_numbers(self, 0, *names, "val_every")
        common.check_numbers(self, 1, "img_size")
        for name in ("layer_decay", "drop_path", "smoothing", "erasing"):
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"--{name.replace('_', '-')} must be at most 1")
        if self.mode == "segment" and self.pool:
            raise UserError("--pool: segmentation uses every patch token, none is pooled")
        if not Path(self.encoder).exists():
            raise UserError(f"{self.encoder}: no such run folder or file")
        folder = Path(self.encoder)
        if folder.is_dir() and not (folder / "encoder.pt").exists():
            raise UserError(f"{folder}/encoder.pt: no such file; it is written when an epoch ends")


def recipe(mode: str, width: int) -> dict:
    """The settings for an encoder of this width; 1024 is ViT-L, 1280 ViT-H."""
    large, huge = width >= 1024, width >= 1280
    if mode in ("knn", "cached"):
        return dict(pool="cls")
    if mode == "segment":
        return dict(epochs=10, batch_size=64, lr=0.03, warmup_epochs=1, weight_decay=0.0,
                    min_crop=0.5, accumulate=1, pool=None, val_every=0)  # fmt: skip
    if mode == "finetune":
        return dict(epochs=50 if large else 100, batch_size=1024, base_lr=1e-3 if large else 5e-4,
                    warmup_epochs=5, weight_decay=0.05, layer_decay=0.75 if large else 0.65,
                    drop_path=0.3 if huge else 0.2 if large else 0.1, min_crop=0.08, pool="mean",
                    accumulate=1, val_every=1)  # fmt: skip
    return dict(epochs=50 if large else 90, batch_size=16384, base_lr=0.1, warmup_epochs=10,
                weight_decay=0.0, min_crop=0.08, pool="cls", val_every=1)  # fmt: skip


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise rates (You et al. 2017), in the form of MAE and MoCo v3: the
    gradient of a matrix, with weight decay, is scaled by trust_coefficient * |weight| / |gradient|;
    1-D parameters have neither scaling nor weight decay."""

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust_coefficient": trust_coefficient})  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    ratio = group["trust_coefficient"] * p.norm() / update.norm()
                    usable = (ratio > 0) & ratio.isfinite()  # not if either norm is 0
                    update = update * torch.where(usable, ratio, 1.0)
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(group["lr"] * buffer.mul_(group["momentum"]).add_(update))


class FineTuned(nn.Module):
    """The encoder without its last LayerNorm; then pooling, a LayerNorm and a linear layer."""

    def __init__(self, encoder: common.ViT, num_classes: int, pool: str):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.norm = encoder.norm
        if pool == "mean":  # a feature that the encoder's LayerNorm has not been trained for
            self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        encoder.norm = nn.Identity()
        encoder.pos_embed.requires_grad_(True)  # trained in fine-tuning, as in timm's ViT
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, imgs: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.head(self.norm(pooled(self.encoder(imgs), self.pool)))


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, decay: float):
    """List of parameter groups with "lr_scale" = decay^(depth + 1 - id), "lr" = lr * lr_scale: id 0
    for the embeddings, 1..depth for the blocks, depth + 1 for the rest. No weight decay on 1-D
    parameters, cls token and positions. `model` is a ViT or has one as .encoder."""
    depth, groups = len(getattr(model, "encoder", model).blocks), {}
    for name, p in model.named_parameters():
        name = name.removeprefix("encoder.")
        layer = depth + 1
        if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        scale = decay ** (depth + 1 - layer)
        wd = 0.0 if p.ndim <= 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": wd}
        if p.requires_grad:
            groups.setdefault((layer, wd), group)["params"].append(p)
    return list(groups.values())


def pooled(tokens: Tensor, pool: str) -> Tensor:
    """(B, 1+L, D) -> (B, D): the "cls" token, or the "mean" of the patch tokens."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


def all_features(run: common.Run, encoder: common.ViT, images) -> tuple[Tensor, Tensor]:
    """Features (N, D) in fp32, after the final norm, and labels (N,) of all images. UserError if a
    feature is not finite, because every score would then be that of chance."""
    crop, pool = common.CentreCrop(encoder.settings["img_size"]), run.cfg.pool

    def features(imgs: Tensor) -> Tensor:
        return pooled(encoder(imgs), pool)

    run.print(f"computing the features of {len(images)} images")
    found, labels = common.outputs(run, encoder, features, images, crop)
    if not found.isfinite().all():
        raise UserError("the features are not finite: this encoder cannot be evaluated")
    return found, labels


def evaluate_knn(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> dict:
    """The scores of features and labels, both as `all_features` returns them."""
    (features, labels), (test_features, test_labels) = train, test
    votes = common.knn_scores(features, labels, test_features, classes, ks=(1, 10, 20, 100, 200))
    results = {f"k{k}": accuracy(votes[k], test_labels) for k in (10, 20, 100, 200)}
    nearest = accuracy(votes[1], test_labels)["top1"]
    return results["k20"] | {"retrieval_1nn": nearest} | results


def logistic_regression(x: Tensor, labels: Tensor, test: Tensor, num_classes: int, l2: float):
    """Scores (N, classes) of test (N, D) by the linear classifier that minimises cross-entropy +
    l2 / 2 * |weight|^2 on x (M, D), whose mean is about 0, and labels (M,)."""
    # The unknowns are the weight's coordinates along the principal axes of x, in units of
    # 1 / sqrt(curvature): LBFGS needs tens of iterations for them, and hundreds for the weight
    # itself. With few images and a small l2, the loss is flat: LBFGS ends a bit above the minimum.
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    scaled_axes = axes / (variance / num_classes + l2).clamp(min=1e-9).sqrt()
    unknown = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknown, bias], max_iter=200, tolerance_grad=1e-4,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight = unknown @ scaled_axes.T
        value = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (test @ scaled_axes @ unknown.T + bias).detach()


def evaluate_cached(run: common.Run, train: tuple, test: tuple, classes: int) -> dict:
    """Logistic regression on features and labels, as for `evaluate_knn`; every process does it."""
    (features, labels), (test, test_labels) = train, test
    # A GPU may round float32 products too roughly for a line search, hence float64.
    std, mean = torch.std_mean(features.double(), dim=0)
    features, test = ((x - mean) / (std + 1e-6) for x in (features, test))
    order = torch.randperm(len(labels), generator=common.seeded("held out", run.cfg.seed))
    held, rest = order.to(run.device).tensor_split([max(1, len(labels) // 10)])
    l2 = run.cfg.weight_decay

    def held_out_loss(l2: float) -> float:
        fit = features[rest], labels[rest], features[held], classes, l2
        return F.cross_entropy(logistic_regression(*fit), labels[held]).item()

    if l2 is None:
        l2 = min((10.0**-i for i in range(7)), key=held_out_loss)
    run.print(f"logistic regression on cached features, L2 weight {l2:g}")
    scores = logistic_regression(features, labels, test, classes, l2)
    return accuracy(scores, test_labels) | {"weight_decay": l2}


def train_and_validate(run, model: nn.Module, optimizer, loader, loss_of, validate,
                       floor: float = 0.0) -> dict:
    """Minimises loss_of(ddp, imgs, labels), where `ddp` is `model`, wrapped for several processes.
    Every --val-every epochs, logs the scores that validate() returns for the model in eval mode.
    Returns the scores of the last validation."""

    def validate_model() -> dict:
        common.average_statistics(model)  # of BatchNorm, over the processes
        model.eval()
        scores = validate()
        model.train()
        return scores

    run.start(loader, model=model, optimizer=optimizer)
    ddp, results = run.wrap(model), {}
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer, floor)
            for imgs, labels in micro_batches:
                with run.autocast():
                    loss = loss_of(ddp, imgs, labels)
                run.backward(loss)
                run.log(loss=loss)
            run.update(optimizer)
        results = validate_model() if run.due(run.cfg.val_every) else {}
        run.end_epoch(**results)
    return results or validate_model()  # {} with --val-every 0, or if nothing was left to do


def evaluate_linear(run, encoder: common.ViT, train, val) -> dict:
    """The full linear probe: the frozen encoder sees a new crop of each image in every epoch."""
    cfg, size = run.cfg, encoder.settings["img_size"]
    encoder.eval().requires_grad_(False)
    norm = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
    head = nn.Sequential(norm, nn.Linear(encoder.embed_dim, len(train.classes))).to(run.device)
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    optimizer = LARS(head.parameters(), weight_decay=cfg.weight_decay)
    loader = common.TrainLoader(run, train, common.RandomCrop(size, cfg.min_crop))
    if loader.micro_batch < 2:
        raise UserError("BatchNorm needs at least 2 images in a micro-batch: use a larger "
                        "--batch-size or a smaller --accumulate")  # fmt: skip

    def feature(imgs: Tensor) -> Tensor:
        return pooled(encoder(imgs), cfg.pool)

    def loss_of(ddp: nn.Module, imgs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(ddp(feature(imgs)), labels)

    def validate() -> dict:
        crop = common.CentreCrop(size)
        return accuracy(*common.outputs(run, head, lambda x: head(feature(x)), val, crop))

    return train_and_validate(run, head, optimizer, loader, loss_of, validate)


class NormalErasing(v2.RandomErasing):
    """Random erasing with MAE's normal noise, in the units of normalised pixels, for uint8 images:
    torchvision would cast the noise itself to uint8."""

    def make_params(self, flat_inputs: list) -> dict:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:  # None: no box fits, the image stays as it is
            mean, std = common.STATISTICS
            pixels = 255 * (mean + std * params["v"])
            params["v"] = pixels.round().clamp(0, 255).to(torch.uint8)
        return params


class Augment:
    """MAE's augmentation for fine-tuning: a random crop, up to two operations of RandAugment,
    random erasing with probability `erasing`."""

    def __init__(self, size: int, min_crop: float, erasing: float):
        self.crop = common.RandomCrop(size, min_crop)
        self.erase = NormalErasing(erasing, value="random")
        bilinear, fill = v2.InterpolationMode.BILINEAR, [round(255 * x) for x in common.MEAN]
        one = v2.RandAugment(1, 9, num_magnitude_bins=11, interpolation=bilinear, fill=fill)
        self.change = v2.Compose([v2.RandomApply([one], p=0.5)] * 2)

    def __call__(self, image: Tensor, label, index: int) -> tuple:
        crop, label = self.crop(image, label, index)
        return self.erase(self.change(crop)), label


def evaluate_finetune(run, encoder: common.ViT, train, val) -> dict:
    """Trains everything, with MAE's recipe."""
    cfg, classes = run.cfg, len(train.classes)
    model = FineTuned(encoder, classes, cfg.pool).to(run.device)
    groups = layer_decay_groups(model, 0.0, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    size = encoder.settings["img_size"]
    loader = common.TrainLoader(run, train, Augment(size, cfg.min_crop, cfg.erasing))
    mixes = [v2.MixUp(alpha=cfg.mixup, num_classes=classes)] if cfg.mixup else []
    mixes += [v2.CutMix(alpha=cfg.cutmix, num_classes=classes)] if cfg.cutmix else []

    def loss_of(ddp: nn.Module, imgs: Tensor, labels: Tensor) -> Tensor:
        if mixes:
            imgs, labels = v2.RandomChoice(mixes)(imgs, labels)
        return F.cross_entropy(ddp(imgs), labels, label_smoothing=cfg.smoothing)

    def validate() -> dict:
        return accuracy(*common.outputs(run, model, model, val, common.CentreCrop(size)))

    return train_and_validate(run, model, optimizer, loader, loss_of, validate, floor=1e-6)


# ------------------------------------------------------------------------------ segmentation

IGNORED = 255  # the number of a pixel without a label


class MaskFiles(Dataset):
    """Images and masks from two lists of files. A mask is a palette or grey image with one class
    number per pixel. In the files, class 0 has the number `first_class`; smaller numbers and 255
    mean "no label"."""

    def __init__(self, images: list, masks: list, num_classes: int, first_class: int):
        for path in (*images, *masks):
            if not Path(path).is_file():
                raise UserError(f"{path} is missing: every image needs a mask with the same name, "
                                "and every mask an image")  # fmt: skip
        self.images, self.masks, self.first_class = images, masks, first_class
        self.classes = [str(first_class + i) for i in range(num_classes)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        try:
            image = common.read_image(self.images[index])
            stored = v2.functional.pil_to_tensor(Image.open(self.masks[index])).int()
        except Exception as error:  # damaged files make decoders raise anything
            files = f"{self.images[index]} or {self.masks[index]}"
            raise UserError(f"cannot read {files}: {error}") from error
        unlabelled = (stored < self.first_class) | (stored == IGNORED)
        return image, (stored - self.first_class).masked_fill(unlabelled, IGNORED)


def load_masked(name: str, split: str, size: int, data_dir: str) -> Dataset:
    """The split "train" or "val" of a data set of images and masks: shapes, drawn at size x size
    pixels; voc2012, downloaded to `data_dir`; or a folder in the layout of ADE20K."""
    if name == "shapes":
        images, _, masks = common.draw_shapes(**common.SHAPES_SPLITS[split], size=size, masks=True)
        # 4000 images keep a probe at two minutes on a CPU; clone() frees the memory of the others.
        shapes = TensorDataset(images[:4000].clone(), masks[:4000].clone())
        shapes.classes = ["background", *common.SHAPES]
        return shapes
    if name == "voc2012":
        voc = common.download(VOCSegmentation, data_dir, "VOCdevkit/VOC2012", image_set=split)
        return MaskFiles(voc.images, voc.masks, num_classes=21, first_class=0)
    part = "training" if split == "train" else "validation"
    images, masks = Path(name, "images", part), Path(name, "annotations", part)
    if not (images.is_dir() and masks.is_dir()):
        raise UserError(f"--data {name} has no masks: use shapes, voc2012, or a folder like ADE20K "
                        f"with {images} and {masks}")  # fmt: skip
    stems = sorted({path.stem for path in (*images.glob("*.jpg"), *masks.glob("*.png"))})
    if not stems:
        raise UserError(f"no images {images}/*.jpg and no masks {masks}/*.png")
    image_files = [images / f"{stem}.jpg" for stem in stems]
    mask_files = [masks / f"{stem}.png" for stem in stems]
    return MaskFiles(image_files, mask_files, num_classes=150, first_class=1)


class MaskCrop:
    """Applies transforms of torchvision to an image and its mask together. UserError if the mask
    does not fit the image or has a number beyond the classes of `images`."""

    def __init__(self, images: Dataset, *transforms):
        self.images, self.transform = images, v2.Compose(transforms)

    def __call__(self, image: Tensor, mask, index: int) -> tuple[Tensor, Tensor]:
        name, first = f"mask {index}", 0
        if isinstance(self.images, MaskFiles):
            name, first = self.images.masks[index], self.images.first_class
        if isinstance(mask, Image.Image):
            mask = v2.functional.pil_to_tensor(mask)
        mask = torch.as_tensor(mask)
        mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
        if mask.shape != image.shape[1:]:
            raise UserError(
                f"{name} has the shape {tuple(mask.shape)}, its image {tuple(image.shape[1:])}: a "
                "mask must have one number per pixel (a palette or grey image, not RGB)"
            )
        last = len(self.images.classes) - 1
        wrong = mask[((mask < 0) | (mask > last)) & (mask != IGNORED)]
        if len(wrong):
            raise UserError(f"{name} has the number {int(wrong[0]) + first}, but the classes are "
                            f"{first} to {first + last}")  # fmt: skip
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()  # plain, to be collated


def confusion(pred: Tensor, target: Tensor, classes: int, ignore: int = IGNORED) -> Tensor:
    """Entry (t, p) of the result (classes, classes) int64 is the number of pixels of class t that
    are predicted as class p. pred, target (B, H, W); pixels with target `ignore` do not count."""
    labelled = target != ignore
    pairs = classes * target[labelled].long() + pred[labelled]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def miou(confusion: Tensor) -> float:
    """Mean in % of TP / (TP + FP + FN) over the classes that occur in targets or predictions."""
    true_positives = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - true_positives
    return 100 * (true_positives / union)[union > 0].mean().item()


def evaluate_segment(run, encoder: common.ViT, train, val, picture: Path | None) -> dict:
    """The segmentation probe: the frozen encoder's patch tokens, a BatchNorm, a linear layer to
    class logits, enlarged to pixels. Draws eight validation images into the file `picture`. Returns
    miou, pixel_accuracy and most_frequent_class, in %."""
    cfg, size, classes = run.cfg, encoder.settings["img_size"], len(train.classes)
    encoder.eval().requires_grad_(False)
    norm = nn.BatchNorm2d(encoder.embed_dim, affine=False, eps=1e-6)
    head = nn.Sequential(norm, nn.Conv2d(encoder.embed_dim, classes, kernel_size=1)).to(run.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=cfg.weight_decay, fused=True)
    crop = v2.RandomResizedCrop(size, scale=(cfg.min_crop, 1.0), interpolation=common.BICUBIC)
    loader = common.TrainLoader(run, train, MaskCrop(train, crop, v2.RandomHorizontalFlip()))
    test_views = common.Views(val, MaskCrop(val, v2.Resize([size, size], common.BICUBIC)))

    def pixel_logits(model: nn.Module, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> logits (B, classes, H, W)."""
        tokens = encoder(imgs)[:, 1:].transpose(1, 2).unflatten(2, encoder.grid)  # (B, D, h, w)
        return F.interpolate(model(tokens).float(), (size, size), mode="bilinear")

    def loss_of(ddp: nn.Module, imgs: Tensor, masks: Tensor) -> Tensor:
        logits = pixel_logits(ddp, imgs)
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
        num_labelled = (masks != IGNORED).sum()
        return loss / num_labelled.clamp(min=1)  # a micro-batch may have no label at all

    @torch.no_grad()
    def predict(imgs: Tensor) -> Tensor:  # (B, C, H, W) -> classes (B, H, W)
        with run.autocast():
            return pixel_logits(head, imgs).argmax(dim=1)

    def validate() -> dict:
        total = torch.zeros(classes, classes, dtype=torch.int64, device=run.device)
        share = list(range(run.rank, len(val), run.world))
        batch = loader.micro_batch
        batches = [share[i : i + batch] for i in range(0, len(share), batch)]
        for imgs, masks in common.data_loader(run, test_views, batches):
            pred = predict(common.normalize(imgs.to(run.device)))
            total += confusion(pred, masks.to(run.device), classes)
        total = common.gather(total).sum(dim=0)
        pixels, most_frequent = total.sum().item(), total.sum(dim=1).max().item()
        if pixels == 0:
            raise UserError("no pixel of the validation masks has a label")
        return {"miou": round(miou(total), 2),
                "pixel_accuracy": round(100 * total.trace().item() / pixels, 2),
                "most_frequent_class": round(100 * most_frequent / pixels, 2)}  # fmt: skip

    results = train_and_validate(run, head, optimizer, loader, loss_of, validate)
    run.print("the most frequent class of the validation masks, predicted everywhere: pixel "
              f"accuracy {results['most_frequent_class']:.1f}")  # fmt: skip
    if picture and run.rank == 0:
        imgs, masks = default_collate([test_views[i] for i in common.evenly_spaced(val, 8)])
        imgs = common.normalize(imgs.to(run.device))
        head.eval()
        rows = {"image": imgs, "mask": coloured(masks), "prediction": coloured(predict(imgs))}
        common.save_grid(picture, rows)
    return results


def coloured(masks: Tensor) -> Tensor:
    """Classes (B, H, W) in fixed colours, as network input (B, 3, H, W): class 0 is black, a pixel
    without a label white, other classes have different hues."""
    # Steps of the golden ratio give neighbouring classes distant hues.
    hues, values = [0.618 * i % 1 for i in range(256)], [1 - 0.2 * (i % 3) for i in range(256)]
    colours = [colorsys.hsv_to_rgb(h, 0.8, v) for h, v in zip(hues, values, strict=True)]
    colours[0], colours[IGNORED] = (0, 0, 0), (1, 1, 1)
    colours = 255 * torch.tensor(colours, device=masks.device)
    return common.normalize(colours[masks].permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------ the script


def data_checksum(images: Dataset, start: int) -> int:
    """CRC-32 of 16 images and their labels, continuing the CRC-32 `start`."""

    # In the place of an augmentation, because `Views` makes a uint8 tensor of any image.
    def with_checksum(image: Tensor, label, index: int) -> tuple[Tensor, int]:
        return image, zlib.crc32(np.asarray(label).tobytes())

    views = common.Views(images, with_checksum)
    for i in common.evenly_spaced(images, 16):
        image, label = views[i]
        start = zlib.crc32(image.numpy().tobytes() + label.to_bytes(4, "little"), start)
    return start


def fill_in(cfg: Config, width: int, num_images: int) -> dict:
    """All settings for an encoder of this width and this number of training images: those that are
    given, and the others from the mode's recipe. UserError if settings of a training are given for
    the cached probe."""
    cached = cfg.mode == "linear" and cfg.cache_features is not False
    if cfg.cache_features is None and num_images >= 200_000:
        cached = False
    given = {name: value for name, value in dataclasses.asdict(cfg).items() if value is not None}
    of_training = ("epochs", "batch_size", "accumulate", "lr", "base_lr", "warmup_epochs",
                   "min_crop")  # fmt: skip
    for name in of_training:
        if cached and name in given:
            raise UserError(f"--{name.replace('_', '-')} belongs to the full protocol, not to the "
                            "cached probe: add --no-cache-features, or leave it out")  # fmt: skip
    settings = dataclasses.asdict(cfg) | recipe("cached" if cached else cfg.mode, width) | given
    settings["cache_features"] = cached
    if cfg.base_lr is not None and cfg.lr is None:
        settings["lr"] = None  # --base-lr replaces the recipe's --lr
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.mode == "segment" and cfg.batch_size is None:  # 64, or fewer for a small data set
        parts = processes * settings["accumulate"]
        settings["batch_size"] = max(parts, min(64, num_images) // parts * parts)
    if cfg.mode == "linear" and not cached and cfg.accumulate is None:
        # The fewest equal micro-batches of at most 512 images.
        share = max(1, settings["batch_size"] // processes)
        counts = range((share + 511) // 512, share + 1)
        settings["accumulate"] = next(n for n in counts if share % n == 0)
    return settings


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """`data`: (training, validation) images with labels, torch Datasets; None loads cfg.data. For
    segmentation the labels are masks: PIL images or tensors (H, W), with classes from 0 and 255
    for "no label"."""
    path = Path(cfg.encoder)
    path = path / "encoder.pt" if path.is_dir() else path
    shape = common.load_encoder(path).settings
    size, own_size = cfg.img_size or shape["img_size"], shape["img_size"]
    if not isinstance(size, int):
        raise UserError(f"{path} takes images of {own_size}: --img-size N makes them square")
    common.patch_grid(size, shape["patch_size"])  # checks the size
    trained = common.read_checkpoint(path).get("config", {})
    name, data_dir = None, cfg.data_dir or trained.get("data_dir", "data")
    common.set_up_process(cfg.device)
    if data is None:
        name = cfg.data or trained.get("data")
        if name is None:
            raise UserError(f"{path} does not say what it was trained on: --data is needed, or "
                            "Datasets as eval_linear.main(config, (train, val))")  # fmt: skip
        load = load_masked if cfg.mode == "segment" else common.load_dataset
        data = [load(name, split, size, data_dir) for split in ("train", "val")]
    train, val = data
    classes = len(common.required_classes(train, val, name))
    if name == "shapes" and cfg.mode == "segment" and int(os.environ.get("RANK", 0)) == 0:
        print(f"segmentation uses the first {len(train)} training images of shapes")
    settings = fill_in(cfg, shape["embed_dim"], len(train))
    settings |= {"data": name, "data_dir": data_dir}
    cached = settings["cache_features"]

    key = "linear-protocol" if cfg.mode == "linear" and not cached else cfg.mode
    if settings["pool"] != recipe(cfg.mode, shape["embed_dim"])["pool"]:
        key += f"-{settings['pool']}"
    if size != own_size:
        key += f"-{size}px"
    folder = Path(cfg.out or path.parent)
    file = folder / "eval.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {} | (json.loads(file.read_text()) if file.exists() else {})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read or written: {error}") from error
    # A training is resumed only if the encoder's file and 16 images of each set are the same.
    checksum = data_checksum(val, data_checksum(train, zlib.crc32(path.read_bytes())))
    run_name = f"eval-{key}-{checksum:08x}"

    def measure(untrained: bool) -> dict:
        out = folder / (f"{run_name}-untrained" if untrained else run_name)
        # Not compared when a run is resumed: `out` has the checksum of the encoder, wherever it is.
        neutral = {"encoder": "", "baseline": False, "out": str(out)}
        run = common.Run(Config(**settings | neutral))
        drop_path = settings["drop_path"] if cfg.mode == "finetune" else 0.0
        if untrained:
            encoder = common.ViT(**shape, drop_path=drop_path)
            common.resize_positions(encoder, size)
        else:
            encoder = common.load_encoder(path, size, drop_path)
        encoder = encoder.to(run.device)
        if cfg.mode == "segment":
            picture = None if untrained else folder / f"{key}.png"
            return evaluate_segment(run, encoder, train, val, picture)
        if cfg.mode == "finetune":
            return evaluate_finetune(run, encoder, train, val)
        if cfg.mode == "linear" and not cached:
            return evaluate_linear(run, encoder, train, val)
        sets = [all_features(run, encoder, images) for images in (train, val)]
        return evaluate_cached(run, *sets, classes) if cached else evaluate_knn(*sets, classes)

    results = measure(untrained=False)
    score, title = ("miou", "mIoU") if cfg.mode == "segment" else ("top1", "top-1")
    line = f"{cfg.mode} {title} {results[score]:.1f}"
    if cfg.baseline:
        results["untrained"] = measure(untrained=True)
        line += f" (untrained {results['untrained'][score]:.1f})"
    if cfg.mode == "segment":
        line += f", pixel accuracy {results['pixel_accuracy']:.1f}"
    entries[key] = results | {"encoder": str(path), "settings": settings}
    if int(os.environ.get("RANK", 0)) == 0:
        common.write_text(file, json.dumps(entries, indent=2))
        print(f"details in {file}\n{line}")


if __name__ == "__main__":
    main(common.parse(Config, {}))
