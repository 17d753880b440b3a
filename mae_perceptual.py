"""MAE: masked autoencoder, the baseline of every method here (`--variant mae`).

He, Chen, Xie, Li, Dollar, Girshick. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022,
arXiv 2111.06377. An encoder sees a random quarter of the patches; a small decoder fills in mask
tokens and regresses the pixels of the hidden ones. (The variants of Perceptual MAE will join it.)

    python mae_perceptual.py                                    # built-in images
    python mae_perceptual.py --preset cifar                     # CIFAR-10, downloaded
    python mae_perceptual.py --preset imagenet --accumulate 16  # one GPU
    torchrun --nproc-per-node 8 mae_perceptual.py --preset imagenet --accumulate 2
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        mae_perceptual.py --preset imagenet --data /data/imagenet
    python eval_linear.py runs/mae_perceptual-demo --baseline   # then: is the encoder any good?

On two cores of a 2.5 GHz Xeon the first takes 2.5 minutes, and its linear probe gives 65.2 %
(untrained 47.5). On a GPU, and for the other presets: not yet measured; see the README.

Section of the paper -> code
    masking (3)                   common.random_masking
    encoder, decoder (3)          common.ViT, common.Decoder
    reconstruction target (3)     common.masked_mse, --norm-pix
    recipe (appendix A)           PRESETS["imagenet"], common.warmup_cosine, common.param_groups

Provenance   paper, and its published code: everything in PRESETS["imagenet"]; initialisation; the
             loss (mean over a patch's pixels, then over hidden patches; unbiased variance; 1e-6).
             Our choice: the presets "demo" and "cifar"; zero bias in the patch embedding; a warm-up
             of at most a fifth of --epochs.
Known deviations   none in the maths. Hidden patches are dropped before the patch embedding instead
             of after it: the same numbers for a quarter of its cost. Random numbers differ.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import common


@dataclass
class Config(common.Config):
    variant: Literal["mae"] = "mae"  # mae: masked MSE on pixels
    norm_pix: bool = True  # regress each patch in units of its own mean and std (MAE, section 3)
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder

    def check(self) -> None:
        super().check()
        common.check_numbers(self, 1, "decoder_dim", "decoder_depth", "decoder_heads")


PRESETS = {
    "demo": dict(  # ours, for two cores and two minutes
        data="shapes", img_size=32, patch_size=4, size="tiny", depth=3,
        decoder_dim=64, decoder_depth=1, decoder_heads=2, min_crop=0.5,
        epochs=3, batch_size=64, base_lr=6e-3, warmup_epochs=0.3, knn_every=10,
    ),
    "cifar": dict(  # ours
        data="cifar10", img_size=32, patch_size=4, size="tiny",
        decoder_dim=96, decoder_depth=4, decoder_heads=3,
        epochs=200, batch_size=256, base_lr=1.5e-3, warmup_epochs=10,
    ),
    "imagenet": dict(  # MAE, appendix A, table 8; 1600 epochs give the paper's best
        data="imagenet", img_size=224, patch_size=16, size="base", mask_ratio=0.75,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=True, min_crop=0.2,
        epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05,
        workers=10,
    ),
}  # fmt: skip


class MAE(nn.Module):
    def __init__(self, encoder: common.ViT, decoder: nn.Module, mask_ratio: float = 0.75):
        super().__init__()
        self.encoder, self.decoder, self.mask_ratio = encoder, decoder, mask_ratio

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """imgs (B, C, H, W) -> predicted patches (B, L, p*p*C), mask (B, L), True = hidden."""
        num_patches = self.encoder.num_patches
        visible, mask = common.random_masking(len(imgs), num_patches, self.mask_ratio, imgs.device)
        return self.decoder(self.encoder(imgs, visible), visible), mask


@torch.no_grad()
def reconstruct(model: MAE, imgs: Tensor, norm_pix: bool) -> dict[str, Tensor]:
    """Rows of the reconstruction picture: label -> (N, 3, H, W) in 0..1."""
    p, grid, channels = model.encoder.patch_size, model.encoder.grid, imgs.shape[1]
    pred, mask = model.forward(imgs)  # not compiled anew for this number of images
    pred, patches, hidden = pred.float(), common.patchify(imgs, p), mask[:, :, None]
    note = ""
    if norm_pix:
        mean, std = common.patch_statistics(patches)
        pred, note = pred * std + mean, " (with the true mean and contrast of each patch)"
    rows = {
        "input": patches,
        "masked": patches.masked_fill(hidden, 0),
        f"prediction{note}": pred,
        "prediction + visible": torch.where(hidden, pred, patches),
    }
    return {k: common.denormalize(common.unpatchify(x, p, grid, channels)) for k, x in rows.items()}


def build(cfg: Config) -> MAE:
    encoder = cfg.vit()
    decoder = common.Decoder(encoder, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads)
    return MAE(encoder, decoder, cfg.mask_ratio)


@common.entry_point
def main(cfg: Config) -> None:
    run = common.Run(cfg)
    model = build(cfg).to(run.device)
    if cfg.init_from:
        common.init_from(cfg.init_from, model.encoder, model.decoder)
    groups = common.param_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    train, val = common.pretraining_images(cfg, run.device)
    loader = common.TrainLoader(train, cfg, run, cfg.img_size)
    pictures = common.eval_batches(val or train, cfg.img_size, run.device, limit=8, share=False)
    examples, _ = next(pictures)
    run.start(loader, val, model=model, optimizer=optimizer)
    ddp = run.wrap(model)
    for _ in run.epochs():
        for micro_batches in run.steps():
            run.set_lr(optimizer)
            for imgs, _ in micro_batches:
                with run.forward(ddp):
                    pred, mask = ddp(imgs)
                    target = common.patchify(imgs, cfg.patch_size)
                    loss = common.masked_mse(pred, target, mask, cfg.norm_pix)
                run.backward(loss)
                run.log(loss=loss)
            run.update(optimizer)
        run.end_epoch(model.encoder, lambda: reconstruct(model, examples, cfg.norm_pix))
    run.finish()


if __name__ == "__main__":
    main(common.parse(Config, PRESETS))
