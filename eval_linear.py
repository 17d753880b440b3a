"""How good is an encoder? Linear probe (default), kNN, or fine-tuning of any encoder.pt.

    python eval_linear.py runs/mae_perceptual-demo --baseline           # linear probe beside an untrained encoder
    python eval_linear.py runs/mae_perceptual-demo --mode knn           # no training at all
    python eval_linear.py runs/mae_perceptual-demo --mode finetune --epochs 10
    torchrun --nproc-per-node 8 eval_linear.py runs/mae_perceptual-imagenet --no-cache-features --workers 10

Takes a run folder, an encoder.pt, or a flat timm or published MAE file (then with --data). Image size and data set
are those of the encoder. Writes eval.json into the run folder, one entry per mode, and ends with one line such as

    linear top-1 61.3 (untrained 38.2)

    mode      what is trained                     protocol
    linear    BatchNorm (no affine) + linear      MAE: LARS, base lr 0.1 x batch / 256, 90 epochs (50 for L and H), 10
                                                  warm-up, cosine, no weight decay; batch 16384; random crop (0.08, 1)
                                                  and flip. With --cache-features (the default for sets that fit in
                                                  memory) features are computed once, from test-time crops, and only
                                                  the head is trained on them, with batch 1024 [choice]
    knn       nothing                             DINO: k nearest by cosine, votes weighted by exp(cosine / 0.07)
    finetune  everything                          MAE: AdamW (0.9, 0.999), layer-wise lr decay, drop path, RandAugment,
                                                  random erasing, mixup, cutmix, label smoothing, mean pool + LayerNorm

Test images: shorter side to size * 256/224, bicubic, central crop; images of exactly the encoder's size stay whole.

Provenance
    linear, finetune   MAE's released recipe (He et al. 2022, appendix A and code)
    knn                Wu et al. 2018 as in DINO (Caron et al. 2021)
    RandAugment m9     torchvision's, with 11 magnitude bins: 9 of 10, as in timm, but without timm's noise on the magnitude
    cached features    our choice: no augmentation, a different (usually slightly lower) number than the full protocol
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import common
from common import UserError, extract_features, knn_scores


@dataclass(kw_only=True)
class Config(common.TrainConfig):
    encoder: str  # run folder, encoder.pt, or a published timm or MAE file
    mode: Literal["linear", "knn", "finetune"] = "linear"  # what to measure; knn is the fastest
    baseline: bool = False  # the same evaluation of an untrained encoder of the same shape, for comparison
    pool: Literal["cls", "mean"] | None = None  # feature: cls token or mean of patch tokens [cls; finetune mean]
    cache_features: bool | None = None  # linear: compute features once, without augmentation [if the set fits in memory]
    data: str | None = None  # as in pre-training, with labels [the encoder's]
    data_dir: str | None = None  # where cifar10, cifar100 and stl10 are downloaded to [the encoder's]
    min_crop: float = 0.08  # smallest area of a random crop, as a share of the image
    epochs: int | None = None  # [linear 90, L and H 50; finetune 100, L and H 50]
    batch_size: int | None = None  # over all processes [linear 16384, cached 1024; finetune 1024]
    base_lr: float | None = None  # per 256 images [linear 0.1; finetune 5e-4, L and H 1e-3]
    warmup_epochs: float | None = None  # never more than a fifth of --epochs [linear 10, finetune 5]
    weight_decay: float | None = None  # [linear 0, finetune 0.05]
    layer_decay: float | None = None  # finetune: lr factor from one layer to the one below [0.65, L and H 0.75]
    drop_path: float | None = None  # finetune: stochastic depth [0.1, L 0.2, H 0.3]
    mixup: float = 0.8  # finetune: alpha of mixup, 0 for none
    cutmix: float = 1.0  # finetune: alpha of cutmix, 0 for none
    smoothing: float = 0.1  # finetune: label smoothing
    erasing: float = 0.25  # finetune: probability of random erasing
    out: str | None = None  # where eval.json goes [the folder of the encoder]

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 0, "layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "erasing")
        if not Path(self.encoder).exists():
            raise UserError(f"{self.encoder}: no such run folder or file")


def recipe(mode: str, width: int, cached: bool) -> dict:
    """The published settings for an encoder of this width (1024 is L, 1280 is H)."""
    large, huge = width >= 1024, width >= 1280
    if mode == "finetune":
        return dict(
            epochs=50 if large else 100, batch_size=1024, base_lr=1e-3 if large else 5e-4, warmup_epochs=5, weight_decay=0.05,
            layer_decay=0.75 if large else 0.65, drop_path=0.3 if huge else 0.2 if large else 0.1, pool="mean",
        )
    return dict(
        epochs=50 if large else 90, batch_size=1024 if cached else 16384, base_lr=0.1, warmup_epochs=10, weight_decay=0.0,
        pool="cls",
    )


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017), as MAE's linear probe and MoCo v3 use it:
    the gradient (with weight decay) of a matrix is scaled by trust_coefficient * |weight| / |gradient|; 1-D parameters
    take plain momentum SGD without weight decay."""

    def __init__(self, params, lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    weight_norm, update_norm = p.norm(), update.norm()
                    trust = group["trust_coefficient"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * state["momentum_buffer"])


class FineTuned(nn.Module):
    """Encoder, then pooled tokens, a LayerNorm of their own instead of the encoder's final norm, and a linear head."""

    def __init__(self, encoder: common.ViT, num_classes: int, pool: str):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        encoder.norm = nn.Identity()
        encoder.pos_embed.requires_grad_(True)  # positions are trained too, as in timm's ViT
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, imgs: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        tokens = self.encoder(imgs)
        return self.head(self.norm(tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)))


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, decay: float) -> list[dict]:
    """Parameter groups with lr_scale = decay^(depth + 1 - id): id 0 for embeddings, 1..depth for blocks, depth + 1 for the
    final norm and the head. 1-D parameters, cls token and positions have no weight decay. `model` is a ViT or has one
    as `.encoder`; each group has "lr" = lr * lr_scale."""
    depth = len(getattr(model, "encoder", model).blocks)
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        name = name.removeprefix("encoder.")
        layer = depth + 1
        if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        plain = p.ndim <= 1 or name in ("cls_token", "pos_embed")
        scale = decay ** (depth + 1 - layer)
        group = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": 0.0 if plain else weight_decay}
        groups.setdefault((layer, plain), group)["params"].append(p)
    return list(groups.values())


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in % of scores (N, classes)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}


@torch.no_grad()
def validate(run: common.Run, predict, val: common.Images, size: int) -> dict[str, float]:
    """Accuracy of predict(imgs) -> scores on all of `val`; each process does its share."""
    scores, labels = [], []
    for imgs, label in common.eval_batches(val, size, run.device, workers=run.cfg.workers):
        scores.append(predict(imgs).float())
        labels.append(label)
    return accuracy(common.gather_rows(torch.cat(scores)), common.gather_rows(torch.cat(labels)))


def all_features(run: common.Run, encoder: common.ViT, images: common.Images, pool: str) -> tuple[Tensor, Tensor]:
    size, cfg = encoder.settings["img_size"], run.cfg
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        parts = extract_features(encoder, common.eval_batches(images, size, run.device, workers=cfg.workers), pool)
    return tuple(map(common.gather_rows, parts))


def evaluate_knn(run: common.Run, encoder: common.ViT, train: common.Images, val: common.Images) -> dict[str, float]:
    features, labels = all_features(run, encoder, train, run.cfg.pool)
    test_features, test_labels = all_features(run, encoder, val, run.cfg.pool)
    results = {}
    for k in (20, 10, 100, 200):  # 20 is the headline
        scores = accuracy(knn_scores(features, labels, test_features, k, num_classes=len(train.classes)), test_labels)
        results |= scores if k == 20 else {}
        results |= {f"{name}_k{k}": x for name, x in scores.items()}
    nearest = knn_scores(features, labels, test_features, 1, num_classes=len(train.classes))
    return results | {"retrieval_1nn": accuracy(nearest, test_labels)["top1"]}


def linear_head(width: int, num_classes: int) -> nn.Module:
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, num_classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


def evaluate_cached(run: common.Run, encoder: common.ViT, train: common.Images, val: common.Images) -> dict[str, float]:
    """Linear probe on features that are computed once. Every process trains the same head."""
    cfg = run.cfg
    features, labels = all_features(run, encoder, train, cfg.pool)
    test_features, test_labels = all_features(run, encoder, val, cfg.pool)
    torch.manual_seed(common.random_seed("head", cfg.seed))
    head = linear_head(features.shape[1], len(train.classes)).to(run.device)
    optimizer = LARS(head.parameters(), weight_decay=cfg.weight_decay)
    batch = min(cfg.batch_size, len(features))
    steps = len(features) // batch
    peak = cfg.lr if cfg.lr is not None else cfg.base_lr * batch / 256
    for step in range(cfg.epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(features), generator=common.seeded("order", cfg.seed, step)).to(run.device)
        index = order[step % steps * batch :][:batch]
        warmup = min(cfg.warmup_epochs, cfg.epochs / 5) * steps
        optimizer.param_groups[0]["lr"] = common.warmup_cosine(step, cfg.epochs * steps, warmup, peak)
        optimizer.zero_grad()
        F.cross_entropy(head(features[index]), labels[index]).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        return accuracy(head(test_features), test_labels)


def evaluate_linear(run: common.Run, encoder: common.ViT, train: common.Images, val: common.Images) -> dict[str, float]:
    """The full linear probe: the frozen encoder sees a new random crop of every image in every epoch."""
    cfg, size = run.cfg, encoder.settings["img_size"]
    encoder.eval().requires_grad_(False)
    head = linear_head(encoder.embed_dim, len(train.classes)).to(run.device)
    optimizer = LARS(head.parameters(), weight_decay=cfg.weight_decay)
    run.start(common.TrainLoader(train, cfg, run, size), model=head, optimizer=optimizer)
    ddp = run.wrap(head)

    def feature(imgs: Tensor) -> Tensor:
        tokens = encoder(imgs)
        return tokens[:, 0] if cfg.pool == "cls" else tokens[:, 1:].mean(dim=1)

    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, labels in micro_batches:
                with run.forward(ddp):
                    with torch.no_grad():
                        features = feature(imgs)
                    loss = F.cross_entropy(ddp(features), labels)
                run.backward(loss)
                run.log(loss=loss)
            run.update(optimizer)
        head.eval()
        results = validate(run, lambda imgs: head(feature(imgs)), val, size)
        head.train()
        run.end_epoch(**results)
    return results


def evaluate_finetune(run: common.Run, encoder: common.ViT, train: common.Images, val: common.Images) -> dict[str, float]:
    """Fine-tune everything with MAE's recipe."""
    cfg, size, classes = run.cfg, encoder.settings["img_size"], len(train.classes)
    bicubic = v2.InterpolationMode.BICUBIC
    augment = v2.Compose([  # in the loader's workers, image by image
        v2.RandomResizedCrop(size, (cfg.min_crop, 1.0), interpolation=bicubic),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11, interpolation=bicubic),
    ])
    erase = v2.RandomErasing(cfg.erasing, value="random")
    mixes = [v2.MixUp(alpha=cfg.mixup, num_classes=classes)] if cfg.mixup else []
    mixes += [v2.CutMix(alpha=cfg.cutmix, num_classes=classes)] if cfg.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else lambda imgs, labels: (imgs, labels)

    model = FineTuned(encoder, classes, cfg.pool).to(run.device)
    groups = layer_decay_groups(model, cfg.base_lr, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    run.start(common.TrainLoader(train, cfg, run, size, augment), model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer, floor=1e-6)
            for imgs, labels in micro_batches:
                with run.forward(ddp):
                    imgs, targets = mix(torch.stack([erase(img) for img in imgs]), labels)
                    loss = F.cross_entropy(ddp(imgs), targets, label_smoothing=cfg.smoothing)
                run.backward(loss)
                run.log(loss=loss)
            run.update(optimizer)
        model.eval()
        results = validate(run, model, val, size)
        model.train()
        run.end_epoch(**results)
    return results


@common.entry_point
def main(cfg: Config) -> None:
    path = Path(cfg.encoder)
    path = path / "encoder.pt" if path.is_dir() else path
    encoder = common.load_encoder(path)
    trained = common.read_checkpoint(path).get("config", {})
    name = cfg.data or trained.get("data")
    if name is None:
        raise UserError(f"{path} does not say what it was trained on; give --data")
    # Fine-tuning augments image by image in the loader's workers, so its images stay in main memory.
    place = "cpu" if cfg.mode == "finetune" else common.pick_device(cfg.device)
    data_dir = cfg.data_dir or trained.get("data_dir", "data")
    size = encoder.settings["img_size"]
    train, val = (common.load_images(name, split, size, data_dir, place) for split in ("train", "val"))
    if val is None or not train.classes:
        raise UserError(f"--data {name}: evaluation needs labels, that is train/ and val/ with class folders")

    cached = cfg.mode == "linear" and (train.pixels is not None if cfg.cache_features is None else cfg.cache_features)
    chosen = {field: x for field, x in dataclasses.asdict(cfg).items() if x is not None}
    settings = dataclasses.asdict(cfg) | recipe(cfg.mode, encoder.embed_dim, cached) | chosen
    folder = Path(settings["out"] or path.parent)
    settings |= dict(data=name, data_dir=data_dir, cache_features=cached)
    evaluate = {"knn": evaluate_knn, "finetune": evaluate_finetune, "linear": evaluate_cached if cached else evaluate_linear}

    def measure(encoder: common.ViT, name: str) -> dict[str, float]:
        run = common.Run(Config(**settings | {"out": str(folder / name)}))
        return run, evaluate[cfg.mode](run, encoder.to(run.device), train, val)

    drop_path = settings["drop_path"] if cfg.mode == "finetune" else 0.0
    run, results = measure(common.load_encoder(path, drop_path), f"eval-{cfg.mode}")
    line = f"{cfg.mode} top-1 {results['top1']:.1f}"
    entry = {"encoder": str(path), "data": name, **results}
    if cfg.baseline:
        torch.manual_seed(common.random_seed("untrained", cfg.seed))
        _, untrained = measure(common.ViT(**encoder.settings, drop_path=drop_path), f"eval-{cfg.mode}-untrained")
        line += f" (untrained {untrained['top1']:.1f})"
        entry["untrained"] = untrained
    if run.rank == 0:
        file = folder / "eval.json"
        entries = json.loads(file.read_text()) if file.exists() else {}
        entries[cfg.mode] = entry | {"settings": settings}
        common.write_atomically(file, lambda f: f.write(json.dumps(entries, indent=2).encode()))
        print(line)


if __name__ == "__main__":
    main(common.parse(Config, {}))
