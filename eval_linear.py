"""How good is an encoder? Linear probe (default), kNN, or fine-tuning.

    python eval_linear.py runs/mae_perceptual-demo --baseline     # beside an untrained encoder
    python eval_linear.py runs/mae_perceptual-demo --mode knn     # trains nothing
    python eval_linear.py runs/mae_perceptual-demo --mode finetune --epochs 10
    torchrun --nproc-per-node 8 eval_linear.py runs/mae_perceptual-imagenet --data imagenet

Takes a run folder, an encoder.pt, or a flat timm or published MAE file (with --data). Image size
and data set are the encoder's. Ends with one line such as `linear top-1 61.3 (untrained 38.2)`,
and writes eval.json beside the encoder. Its entries are linear, linear-protocol, knn and finetune,
with -cls or -mean added if that is not the mode's own --pool.

linear     MAE's protocol: a linear layer after a BatchNorm without affine, on the frozen cls token;
           LARS, base lr 0.1 x batch / 256, no weight decay, batch 16384, 90 epochs (50 for L and
           H), 10 of warm-up, cosine; random crops of area (0.08, 1) and flips. A batch comes in
           pieces of at most 512, each with BatchNorm statistics of its own, as on 32 GPUs.
           --cache-features, the default for fewer than 200 000 images, computes the features once,
           without augmentation, and fits a logistic regression to them: seconds instead of hours.
           Its accuracy is not comparable with the protocol's. The weight of its L2 penalty
           (weight_decay in eval.json) is --weight-decay or the best one
           for a tenth of the training images, held out.
knn        DINO's: the k nearest training images by cosine vote with weight exp(cosine / 0.07);
           k = 20 is the headline. Also the share of images whose nearest neighbour is of their
           class (1-NN retrieval).
finetune   MAE's recipe: AdamW, layer-wise lr decay, drop path, RandAugment, random erasing, mixup,
           cutmix, label smoothing; LayerNorm and a linear layer on the mean of the patch tokens.

Test images: shorter side to size * 256/224, bicubic, then the central crop; images of exactly the
encoder's size stay whole.

Provenance   linear, finetune: He et al. 2022, appendix A, and their published settings.
             knn: Wu et al. 2018, in the form of DINO (Caron et al. 2021).
             Our choices: the cached probe; for encoders narrower than ViT-B its settings;
             random erasing's noise is clipped to the range of pixels; RandAugment "m9" is
             torchvision's operations at magnitude 9 of 10, two of them with probability 1/2 each as
             in timm, without timm's magnitude noise, and bilinear.
"""

import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import common
from common import UserError, accuracy


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    may_change = (*common.TrainConfig.may_change, "val_every")

    encoder: str  # run folder, encoder.pt, or a flat timm or published MAE file
    mode: Literal["linear", "knn", "finetune"] = "linear"  # see above
    baseline: bool = False  # also evaluate an untrained encoder of the same shape
    pool: Literal["cls", "mean"] | None = None  # cls token or mean of patches [cls; finetune mean]
    cache_features: bool | None = None  # linear: features only once [if below 200 000 images]
    data: str | None = None  # as in pre-training, with labels [the encoder's]
    data_dir: str | None = None  # where downloaded sets live [the encoder's]
    min_crop: float = 0.08  # smallest area of a random crop, as a share of the image
    epochs: int | None = None  # [linear 90, L and H 50; finetune 100, L and H 50]
    batch_size: int | None = None  # [linear 16384; finetune 1024]
    accumulate: int | None = None  # micro-batches [linear: of at most 512 images; finetune 1]
    base_lr: float | None = None  # per 256 [linear 0.1; finetune 5e-4, L and H 1e-3]
    warmup_epochs: float | None = None  # at most a fifth of --epochs [linear 10, finetune 5]
    weight_decay: float | None = None  # [linear 0, cached chosen; finetune 0.05]
    layer_decay: float | None = None  # finetune: lr ratio of neighbour layers [0.65, L and H 0.75]
    drop_path: float | None = None  # finetune: stochastic depth [0.1, L 0.2, H 0.3]
    mixup: float = 0.8  # finetune: alpha of mixup; 0 is none
    cutmix: float = 1.0  # finetune: alpha of cutmix; 0 is none
    smoothing: float = 0.1  # finetune: label smoothing
    erasing: float = 0.25  # finetune: probability of random erasing
    val_every: int = 1  # validation every so many epochs and at the end; 0 is the end alone
    out: str | None = None  # where eval.json goes [beside the encoder]

    def check(self) -> None:
        super().check()
        names = ("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "erasing")
        common.check_numbers(self, 0, *names, "val_every")
        for name in names[:2] + names[4:]:
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"--{name.replace('_', '-')} must be at most 1")
        if not Path(self.encoder).exists():
            raise UserError(f"{self.encoder}: no such run folder or file")
        if not (file := Path(self.encoder, "encoder.pt")).exists() and file.parent.is_dir():
            raise UserError(f"{file}: no such file; it is written when an epoch ends")


def recipe(mode: str, width: int) -> dict:
    """The published settings for an encoder of this width; 1024 is ViT-L, 1280 ViT-H."""
    large, huge = width >= 1024, width >= 1280
    if mode == "finetune":
        return dict(epochs=50 if large else 100, batch_size=1024, base_lr=1e-3 if large else 5e-4,
                    warmup_epochs=5, weight_decay=0.05, layer_decay=0.75 if large else 0.65,
                    drop_path=0.3 if huge else 0.2 if large else 0.1, pool="mean",
                    accumulate=1)  # fmt: skip
    return dict(epochs=50 if large else 90, batch_size=16384, base_lr=0.1, warmup_epochs=10,
                weight_decay=0.0, pool="cls")  # fmt: skip


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
    """Encoder without its last LayerNorm, pooled tokens, LayerNorm, linear layer."""

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
    """Features (N, D) fp32, after the final norm, and labels (N,) of all images. UserError if a
    feature is not finite: the score would be that of chance."""
    crop, pool = common.CentreCrop(encoder.settings["img_size"]), run.cfg.pool

    def features(imgs: Tensor) -> Tensor:
        return pooled(encoder(imgs), pool)

    found, labels = common.outputs(run, encoder, features, images, crop)
    if not found.isfinite().all():
        raise UserError("features are not finite: this encoder is of no use")
    return found, labels


def evaluate_knn(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> dict:
    """The scores of features and labels, both as `all_features` returns them."""
    (features, labels), (test_features, test_labels) = train, test
    votes = common.knn_scores(features, labels, test_features, classes, ks=(1, 10, 20, 100, 200))
    results = {f"k{k}": accuracy(votes[k], test_labels) for k in (10, 20, 100, 200)}
    nearest = accuracy(votes[1], test_labels)["top1"]
    return results["k20"] | {"retrieval_1nn": nearest} | results


def logistic_regression(x: Tensor, labels: Tensor, test: Tensor, num_classes: int, l2: float):
    """Scores (N, classes) of test (N, D) by the linear classifier with the least cross-entropy +
    l2 / 2 * |weight|^2 for x (M, D), of mean about 0, and labels (M,)."""
    # The unknowns are along the principal axes, in units of 1 / sqrt(curvature): LBFGS takes tens
    # of iterations for them, hundreds for the weight itself. With few images and a small l2, which
    # hardly bound the weight, it stops before the minimum.
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    units = axes / (variance / num_classes + l2).clamp(min=1e-9).sqrt()
    unknown = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknown, bias], max_iter=200, tolerance_grad=1e-4,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight = unknown @ units.T
        value = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (test @ units @ unknown.T + bias).detach()


def evaluate_cached(run: common.Run, train: tuple, test: tuple, classes: int) -> dict:
    """Logistic regression on features and labels, as for `evaluate_knn`; every process does it."""
    (features, labels), (test, test_labels) = train, test
    # From here in float64: a GPU may round the products of float32 too roughly for a line search.
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


def train_and_validate(run, model: nn.Module, optimizer, loader, loss_of, predict, val, size: int,
                       floor: float = 0.0) -> dict:
    """Minimises loss_of(ddp, imgs, labels), `ddp` being the model to call; validates predict(imgs)
    every --val-every epochs on test crops of `size` pixels. Returns the last accuracy."""

    def validate() -> dict:
        scores, labels = common.outputs(run, model, predict, val, common.CentreCrop(size))
        return accuracy(scores, labels)

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
        results = validate() if run.due(run.cfg.val_every) else {}
        run.end_epoch(**results)
    return results or validate()


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
        raise UserError("BatchNorm takes 2 images in a micro-batch: a larger --batch-size, or less "
                        "--accumulate")  # fmt: skip

    def feature(imgs: Tensor) -> Tensor:
        return pooled(encoder(imgs), cfg.pool)

    return train_and_validate(
        run, head, optimizer, loader, val=val, size=size,
        predict=lambda imgs: head(feature(imgs)),
        loss_of=lambda ddp, imgs, labels: F.cross_entropy(ddp(feature(imgs)), labels),
    )  # fmt: skip


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

    return train_and_validate(run, model, optimizer, loader, loss_of, model, val, size, floor=1e-6)


@common.entry_point
def main(cfg: Config, data=None) -> None:
    """`data`: (training, validation) images with labels, torch Datasets; None loads cfg.data."""
    path = Path(cfg.encoder)
    path = path / "encoder.pt" if path.is_dir() else path
    shape = common.load_encoder(path).settings
    trained = common.read_checkpoint(path).get("config", {})
    name, data_dir = None, cfg.data_dir or trained.get("data_dir", "data")
    common.set_up_process(cfg.device)
    if data is None:
        name = cfg.data or trained.get("data")
        if name is None:
            raise UserError(f"{path} does not say what it was trained on: --data is needed")
        size = shape["img_size"]
        data = [common.load_dataset(name, split, size, data_dir) for split in ("train", "val")]
    train, val = data
    classes = len(common.required_classes(train, val, name))

    cached = cfg.mode == "linear" and cfg.cache_features is not False
    if cfg.cache_features is None and len(train) >= 200_000:
        cached = False
    given = {name: value for name, value in dataclasses.asdict(cfg).items() if value is not None}
    for flag in ("epochs", "batch_size", "accumulate", "lr", "base_lr", "warmup_epochs"):
        if cached and flag in given:
            raise UserError(f"--{flag.replace('_', '-')} is of the full protocol, not of cached "
                            "features: add --no-cache-features, or leave it out")  # fmt: skip
    trains = not cached and cfg.mode != "knn"
    defaults = recipe(cfg.mode, shape["embed_dim"]) if trains else {"pool": "cls"}
    settings = dataclasses.asdict(cfg) | defaults | given
    settings |= {"data": name, "data_dir": data_dir, "cache_features": cached}
    drop_path = settings["drop_path"] if cfg.mode == "finetune" else 0.0
    folder = Path(cfg.out or path.parent)
    file = folder / "eval.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {} | (json.loads(file.read_text()) if file.exists() else {})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read or written: {error}") from error
    # A training is resumed only with the very weights that it was begun with.
    run_name = f"eval-{cfg.mode}-{zlib.crc32(path.read_bytes()):08x}"
    if trains and cfg.mode == "linear" and cfg.accumulate is None:
        part = max(1, settings["batch_size"] // int(os.environ.get("WORLD_SIZE", 1)))
        counts = range((part + 511) // 512, part + 1)
        settings["accumulate"] = next(n for n in counts if part % n == 0)

    def measure(untrained: bool) -> dict:
        # A training is resumed whoever asks for it: what it computes does not depend on these.
        out = folder / (f"{run_name}-untrained" if untrained else run_name)
        same = {"encoder": "", "baseline": False, "out": str(out)}
        run = common.Run(Config(**settings | same))
        encoder = common.ViT(**shape, drop_path=drop_path)
        if not untrained:
            encoder = common.load_encoder(path, drop_path)
        encoder = encoder.to(run.device)
        if trains:
            evaluate = evaluate_finetune if cfg.mode == "finetune" else evaluate_linear
            return evaluate(run, encoder, train, val)
        sets = [all_features(run, encoder, images) for images in (train, val)]
        if cached:
            return evaluate_cached(run, *sets, classes)
        return evaluate_knn(*sets, classes)

    results = measure(untrained=False)
    line = f"{cfg.mode} top-1 {results['top1']:.1f}"
    if cfg.baseline:
        results["untrained"] = measure(untrained=True)
        line += f" (untrained {results['untrained']['top1']:.1f})"
    key = "linear-protocol" if trains and cfg.mode == "linear" else cfg.mode
    if settings["pool"] != defaults["pool"]:
        key += f"-{settings['pool']}"
    entries[key] = results | {"encoder": str(path), "settings": settings}
    if int(os.environ.get("RANK", 0)) == 0:
        common.write_text(file, json.dumps(entries, indent=2))
        print(f"details in {file}\n{line}")


if __name__ == "__main__":
    main(common.parse(Config, {}))
