"""Speed and memory, measured side by side; nothing is asserted.

    python tests/bench.py                                   # 32 px, patch 4, ViT-Tiny; CPU: 1-2 min
    python tests/bench.py --preset imagenet --batch 64      # ViT-B/16 at 224 px, on a GPU
    python tests/bench.py --methods ls msg msg-ada          # what Perceptual MAE costs beside MAE
    python tests/bench.py --methods mixed_ae naive-mixing   # and MixedAE
    python tests/bench.py --methods cmae cmae-one-view      # and CMAE, with and without contrast
    python tests/bench.py --methods mim-tokens mim-pixels   # Supervised MIM beside its baseline
    python tests/bench.py --methods mim-inference           # classification beside its baseline
    python tests/bench.py --decode FOLDER                   # images/s decoded and cropped by a core

A training step of MAE (mae_perceptual.py --variant mae) against the same model built from timm's
PatchEmbed and Block (if timm is installed), or against other methods: forward, losses, backward,
optimisers, in turn; Supervised MIM, with its tokenizer, against its own supervised baseline. The
median over --rounds; the mean over 16 for ls, msg and msg-ada, of which some steps do more. Peak
memory is that of a process of its own (CPU: Linux, the growth of its resident set).
"""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cmae
import common
import mae_perceptual
import mixed_ae
import supervised_mim

try:
    import timm
except ImportError:
    timm = None

ADVERSARIAL, MIXING = ("ls", "msg", "msg-ada"), ("mixed_ae", "naive-mixing")
TWO_VIEWS = ("cmae", "cmae-one-view")
BASELINE = {"mim-tokens": "supervised", "mim-pixels": "supervised",
            "mim-inference": "supervised-inference"}  # fmt: skip


class TimmMAE(nn.Module):
    """The published form of MAE: all patches are embedded, then most are dropped."""

    def __init__(self, ours: mae_perceptual.PerceptualMAE):
        super().__init__()
        vit, decoder = ours.encoder, ours.decoder
        block, norm = timm.models.vision_transformer.Block, lambda d: nn.LayerNorm(d, eps=1e-6)
        shape, self.mask_ratio = vit.settings, ours.mask_ratio
        dim, decoder_dim = vit.embed_dim, decoder.embed.out_features
        side, p = shape["img_size"], shape["patch_size"]
        self.patch_embed = timm.layers.PatchEmbed(side, p, shape["in_chans"], dim)
        self.cls_token, self.mask_token = vit.cls_token, decoder.mask_token
        self.pos_embed, self.decoder_pos_embed = vit.pos_embed, decoder.pos_embed
        heads = shape["num_heads"]
        self.blocks = nn.Sequential(
            *(block(dim, heads, 4.0, qkv_bias=True, norm_layer=norm_layer) for _ in vit.blocks)
        )
        heads = decoder.blocks[0].attn.num_heads
        self.decoder_blocks = nn.Sequential(
            *(block(decoder_dim, heads, 4.0, qkv_bias=True, norm_layer=norm_layer)
              for _ in decoder.blocks)
        )  # fmt: skip
        self.norm, self.decoder_norm = norm(dim), norm(decoder_dim)
        self.embed = nn.Linear(dim, decoder_dim)
        self.pred = nn.Linear(decoder_dim, decoder.pred.out_features)

    def forward(self, imgs):
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        b, length, d = x.shape
        visible, mask = common.random_masking(b, length, self.mask_ratio, x.device)
        x = torch.gather(x, 1, visible[:, :, None].expand(-1, -1, d))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1), x], 1)
        x = self.embed(self.norm(self.blocks(x)))
        full = self.mask_token.to(x.dtype).repeat(b, length, 1)
        full = full.scatter(1, visible[:, :, None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        return self.pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:], mask


def norm_layer(dim, **kwargs):
    return nn.LayerNorm(dim, eps=1e-6)


def mae_loss(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    pred, mask = model(imgs)
    return common.masked_mse(pred, common.patchify(imgs, model.patch_size), mask)


def own_loss(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    return model(imgs)[0]


def two_view_loss(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    return model(imgs, cmae.change_colours(imgs), momentum=0.99)[0]


def plain_step(model: nn.Module, loss_of, imgs: torch.Tensor):
    optimizer = common.adamw(model.to(imgs.device), weight_decay=0.05, lr=1e-4)

    def step() -> None:
        with autocast(imgs.device):
            loss = loss_of(model, imgs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adversarial_step(cfg, imgs: torch.Tensor):
    model = mae_perceptual.build(cfg).to(imgs.device)
    adversary = mae_perceptual.build_adversary(cfg).to(imgs.device)
    discriminator, adversary.augment.p = adversary.discriminator, 0.3  # at 0 it costs nothing
    players = (model, discriminator)
    optimizers = [common.adamw(player, 0.0, lr=1e-4) for player in players]
    parameters = [mae_perceptual.trainable(player) for player in players]
    counter = itertools.count()

    def step() -> None:
        with autocast(imgs.device):
            g_loss, d_loss, _ = adversary.losses(model, discriminator, imgs, next(counter))
        d_loss.backward(inputs=parameters[1], retain_graph=True)
        g_loss.backward(inputs=parameters[0])
        adversary.end_step(len(imgs))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def supervised_step(name: str, preset: str, batch: int, device: torch.device):
    cfg = supervised_mim.Config(**supervised_mim.PRESETS[preset])
    cfg = dataclasses.replace(cfg, mim_weight=float(name.startswith("mim")),
                              target="pixels" if name == "mim-pixels" else "tokens")  # fmt: skip
    model = supervised_mim.build(cfg, 1000).to(device)
    imgs = torch.randn(batch, 3, cfg.img_size, cfg.img_size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    tokenizer = supervised_mim.build_tokenizer(cfg).to(device).eval().requires_grad_(False)

    def loss_of(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):  # in fp32, as in the script
            token_ids = tokenizer.encode(imgs) if name == "mim-tokens" else None
        return model(imgs, labels, token_ids)[0]

    @torch.no_grad()
    def classify() -> None:
        with autocast(device):
            model.classify(imgs)

    return classify if name.endswith("inference") else plain_step(model, loss_of, imgs)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_step(name: str, preset: str, batch: int, device: torch.device):
    if name in BASELINE or name in BASELINE.values():
        return supervised_step(name, preset, batch, device)
    cfg = mae_perceptual.Config(**mae_perceptual.PRESETS[preset] | {"lr_decay": None})
    imgs = torch.randn(batch, 3, cfg.img_size, cfg.img_size, device=device)
    if name in ADVERSARIAL:
        return adversarial_step(dataclasses.replace(cfg, variant=name), imgs)
    if name in MIXING:
        on = name == "mixed_ae"
        switches = dict(homologous_attention=on, homologous_loss=on, segment=on)
        model = mixed_ae.build(mixed_ae.Config(**mixed_ae.PRESETS[preset], **switches))
        return plain_step(model, own_loss, imgs)
    if name in TWO_VIEWS:
        preset = preset if preset in cmae.PRESETS else "tiny-imagenet"
        cfg = cmae.Config(**cmae.PRESETS[preset])
        if name == "cmae-one-view":
            model = cmae.build(dataclasses.replace(cfg, contrastive_weight=0))
            return plain_step(model, own_loss, imgs)
        return plain_step(cmae.build(cfg), two_view_loss, imgs)
    model = mae_perceptual.build(dataclasses.replace(cfg, variant="mae"))
    model = TimmMAE(model) if name == "timm" else model
    model.patch_size = cfg.patch_size
    return plain_step(model, mae_loss, imgs)


def peak_memory(name: str, preset: str, batch: int, device: torch.device) -> float:
    """MiB that the model and its first steps need."""

    def high_water_mark() -> int:  # of this process; ru_maxrss would include its parent's
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    before = high_water_mark()
    step = make_step(name, preset, batch, device)
    for _ in range(3):
        step()
    return (high_water_mark() - before) / 2**20


def decode(folder: str, size: int = 224) -> None:
    torch.set_num_threads(1)
    images = common.load_images(folder, "pretrain", size)
    images = common.Images(images.labels, [], paths=images.paths or [])
    crop = common.v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=common.BICUBIC)
    decoding, count = common._Decoding(images, seed=0, transform=crop), min(len(images), 400)
    begin = time.perf_counter()
    for i in range(count):
        decoding[0, i]
    print(f"{count / (time.perf_counter() - begin):.0f} images/s per core, decoded and cropped")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=mixed_ae.PRESETS, default="cifar")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode", metavar="FOLDER")
    choices = ("timm", *ADVERSARIAL, *MIXING, *TWO_VIEWS, *BASELINE)
    parser.add_argument("--methods", nargs="+", choices=choices)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        return decode(args.decode)

    device = common.set_up_process(args.device)
    if args.memory_of:
        return print(peak_memory(args.memory_of, args.preset, args.batch, device))

    methods = args.methods or ["timm"] * bool(timm)
    baselines = {BASELINE.get(name, "mae") for name in methods} or {"mae"}
    if len(baselines) > 1:
        parser.error(f"these have different baselines: {', '.join(sorted(baselines))}")
    baseline, = baselines
    names = [baseline, *methods]
    rounds, average = args.rounds, statistics.median
    if set(names) & set(ADVERSARIAL):
        rounds, average = 16, statistics.mean
    steps = {name: make_step(name, args.preset, args.batch, device) for name in names}
    times = {name: [] for name in names}
    for i in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # warm-up
                times[name].append(time.perf_counter() - begin)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{args.preset}, batch {args.batch}, {where}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {rounds} rounds")  # fmt: skip
    for name, seconds in times.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        middle, ratio = average(seconds), average(seconds) / average(times[baseline])
        print(f"{name:20s} {1000 * middle:8.1f} ms a step {args.batch / middle:8.0f} images/s"
              f" {memory:8.0f} MiB peak {ratio:8.3f} x {baseline}'s time")  # fmt: skip


if __name__ == "__main__":
    main()
