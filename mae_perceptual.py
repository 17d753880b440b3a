"""MAE, the baseline of this repository: `--variant mae`.

He, Chen, Xie, Li, Dollár, Girshick. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arXiv 2111.06377.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import common


@dataclass
class Config(common.Config):
    variant: Literal["mae"] = "mae"  # mae: masked MSE on pixels
    norm_pix: bool = True  # regress each patch in units of its own mean and std (MAE, table 1d)
    decoder_dim: int = 96  # width of the decoder
    decoder_depth: int = 4  # blocks of the decoder
    decoder_heads: int = 3  # attention heads of the decoder


PRESETS = {
    "demo": dict(
        depth=3, decoder_dim=64, decoder_depth=1, decoder_heads=2, min_crop=0.5, epochs=3, batch_size=64, lr=1.5e-3,
        warmup_epochs=0.3, knn_every=10,
    ),
    "cifar": dict(epochs=400, batch_size=256, base_lr=1e-3, warmup_epochs=20),
    "imagenet": dict(
        img_size=224, patch_size=16, size="base", decoder_dim=512, decoder_depth=8, decoder_heads=16, epochs=800, batch_size=4096,
        base_lr=1.5e-4, warmup_epochs=40, workers=10,
    ),
}


class MAE(nn.Module):
    def __init__(self, encoder: common.ViT, decoder: nn.Module, mask_ratio: float = 0.75):
        super().__init__()
        self.encoder, self.decoder, self.mask_ratio = encoder, decoder, mask_ratio

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """imgs (B, C, H, W) -> predicted patches (B, L, p*p*C), mask (B, L), True = hidden."""
        visible, mask = common.random_masking(len(imgs), self.encoder.num_patches, self.mask_ratio, imgs.device)
        return self.decoder(self.encoder(imgs, visible), visible), mask


def build(cfg: Config) -> MAE:
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return MAE(encoder, decoder, cfg.mask_ratio)


@torch.no_grad()
def reconstruct(model: MAE, imgs: Tensor, norm_pix: bool) -> dict[str, Tensor]:
    """Rows of the reconstruction picture, (N, 3, H, W) in 0..1 each."""
    p, grid = model.encoder.patch_size, model.encoder.grid
    pred, mask = model(imgs)
    patches, pred = common.patchify(imgs, p), pred.float()
    if norm_pix:
        mean, std = common.patch_statistics(patches)
        pred = pred * std + mean
    seen, hidden = patches * ~mask[:, :, None], mask[:, :, None]
    rows = {
        "input": patches,
        "masked": seen,
        "prediction" + (" (with each true patch's mean and contrast)" if norm_pix else ""): pred,
        "prediction + visible": torch.where(hidden, pred, patches),
    }
    return {label: common.denormalize(common.unpatchify(x, p, grid)) for label, x in rows.items()}


@common.entry_point
def main(cfg: Config) -> None:
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    if cfg.init_from:
        common.init_from(cfg.init_from, model.encoder, model.decoder)
    optimizer = torch.optim.AdamW(common.param_groups(model, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    train, val = common.pretraining_images(cfg, run.device)
    examples, _ = next(common.eval_batches(val or train, cfg.img_size, run.device, limit=8))
    run.start(common.TrainLoader(train, cfg, run, cfg.img_size), val, model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, _ in micro_batches:
                with run.forward(ddp):
                    pred, mask = ddp(imgs)
                    loss = common.masked_mse(pred, common.patchify(imgs, cfg.patch_size), mask, cfg.norm_pix)
                run.backward(loss)
                run.log(loss=loss)
            run.update(optimizer)
        run.end_epoch(model.encoder, picture=lambda: reconstruct(model, examples, cfg.norm_pix))
    run.finish()


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
