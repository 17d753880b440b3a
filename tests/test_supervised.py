"""Supervised MIM: tokenizer and losses are compared with slow versions of their equations; then the
script is run."""

import functools
import json
import math
import shutil

import pytest
import torch
from conftest import (
    METHODS,
    TINY,
    error_of,
    in_processes,
    metrics,
    settings,
    train,
    weights,
    write_images,
)
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

import common
import supervised_mim
from supervised_mim import SupervisedMIM, VQTokenizer

METHOD = "supervised_mim"
FLAGS = [*TINY, *METHODS[METHOD].model_flags]


def tokenizer_of(channels=3, **options) -> VQTokenizer:
    """A tokenizer with random weights, 4 x 4 tokens per image and 16 codes."""
    torch.manual_seed(0)
    return VQTokenizer(16, 4, 16, dim=8, width=4, in_chans=channels, **options)


def model_of(target="tokens", channels=3, **options) -> SupervisedMIM:
    torch.manual_seed(0)
    vit = common.ViT(16, 4, channels, embed_dim=24, depth=2, num_heads=3)
    outputs = 16 if target == "tokens" else None
    decoder = common.Decoder(vit, 24, 1, 3, outputs)
    model = SupervisedMIM(vit, torch.nn.Linear(24, 5), decoder, target=target, **options)
    with torch.no_grad():  # parameters that are still zero could hide mistakes
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def load(path) -> VQTokenizer:
    return supervised_mim.read_tokenizer(path)


def images_of(folder, split: str) -> tuple[torch.Tensor, list[int]]:
    """All images of a split, normalised, 16 x 16 pixels, and their labels."""
    images = common.load_dataset(str(folder), split, 16)
    pairs = [images[i] for i in range(len(images))]
    pixels = torch.stack([common.rgb_tensor(image) for image, _ in pairs])
    return common.normalize(pixels), [label for _, label in pairs]


@pytest.fixture()
def trained(whole_run):
    """The folder of a whole run of three epochs; tests must not change it."""
    return whole_run(METHOD)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory, shapes_folder) -> dict:
    """pool -> the folder of a run whose classifier takes the class token or the mean of the patch
    tokens; tests must not change it."""
    folders = {pool: tmp_path_factory.mktemp(pool) for pool in ("cls", "mean")}
    for pool, folder in folders.items():
        train(METHOD, folder, shapes_folder, "--pool", pool, "--mim-weight", "0", "--epochs", "3")
    return folders


# ------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("size, stride, channels", [(16, 4, 3), ((16, 24), 8, 1), (32, 1, 5),
                                                    (32, 16, 3), ((8, 4), 2, 3)])  # fmt: skip
def test_shapes(size, stride, channels):
    tokenizer = VQTokenizer(size, stride, 10, dim=6, width=4, in_chans=channels)
    h, w = (size, size) if isinstance(size, int) else size
    imgs = torch.randn(2, channels, h, w)
    recon, ids, losses = tokenizer(imgs)
    assert tokenizer.grid == (h // stride, w // stride)
    assert recon.shape == imgs.shape and ids.shape == (2, h * w // stride**2)
    assert ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 10
    assert losses.keys() == {"loss", "recon", "commitment"}
    assert tokenizer.decode(ids).shape == imgs.shape
    large = F.interpolate(imgs, (50, 70), mode="bicubic")
    assert tokenizer.encode(large).shape == ids.shape


def test_a_token_is_the_nearest_code():
    tokenizer, z = tokenizer_of(), torch.randn(3, 16, 8)
    tokenizer.codebook.mul_(torch.rand(16, 1) * 3)  # codes of different norms
    ids = tokenizer.quantize(z)
    for b in range(3):
        for i in range(16):
            distances = [(z[b, i] - code).square().sum().item() for code in tokenizer.codebook]
            assert ids[b, i] == distances.index(min(distances))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.quantize(z), ids)


def test_tokens_are_in_the_order_of_the_patches():
    """A feature changes most, on average, when the patch of the same index changes. The residual
    branches are switched off, because they see more than these small images."""
    tokenizer, imgs = tokenizer_of().eval(), torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for module in tokenizer.modules():
            if isinstance(module, supervised_mim.ResBlock):
                module.branch[-1].weight.zero_()
        z, moves = tokenizer.features(imgs), []
        for i in range(16):
            patches = common.patchify(imgs, 4).clone()
            patches[:, i] += torch.randn(64, 48)
            changed = tokenizer.features(common.unpatchify(patches, 4, (4, 4)))
            moves.append((changed - z).norm(dim=2).mean(dim=0))
        assert torch.stack(moves).argmax(dim=0).tolist() == list(range(16))
        ids = torch.zeros(1, 16, dtype=torch.int64)
        ids[0, 6] = 3  # row 1, column 2
        moved = (tokenizer.decode(ids) - tokenizer.decode(0 * ids)).abs().sum(dim=1)[0]
    top, left = divmod(int(moved.argmax()), 16)
    assert (top // 4, left // 4) == (1, 2)


def test_losses_and_straight_through_gradients_equal_their_definitions():
    tokenizer, imgs = tokenizer_of(), torch.randn(2, 3, 16, 16)
    kept, features = [], tokenizer.features

    def keep(x):
        kept.append(features(x))
        kept[0].retain_grad()
        return kept[0]

    tokenizer.features, before = keep, tokenizer.codebook.clone()
    recon, ids, losses = tokenizer(imgs)
    z, codes = kept[0], before[ids].requires_grad_()
    slow = tokenizer.decoder(codes.transpose(1, 2).reshape(2, 8, 4, 4))
    torch.testing.assert_close(recon, slow)
    l1 = (slow - imgs).abs().mean()
    commitment = (z - codes).square().sum() / z.numel()
    torch.testing.assert_close(losses["recon"], l1)
    torch.testing.assert_close(losses["commitment"], commitment)
    torch.testing.assert_close(losses["loss"], l1 + 0.25 * commitment)
    losses["loss"].backward(inputs=[z])
    (l1_gradient,) = torch.autograd.grad(l1, codes)  # straight-through: z gets this gradient
    expected = l1_gradient + 0.25 * 2 * (z - codes).detach() / z.numel()
    torch.testing.assert_close(z.grad, expected, atol=1e-7, rtol=1e-4)
    assert not tokenizer.codebook.requires_grad


def update(tokenizer, z, ids) -> None:
    """Updates the codebook as if these features (N, dim) had been assigned to these codes (N,)."""
    tokenizer.seen = [(z, ids)]
    tokenizer.update_codebook()


def test_the_codebook_follows_moving_averages():
    """Three batches are compared with a loop. Usage is so high that no code is restarted."""
    tokenizer = tokenizer_of(decay=0.9)
    usage, sums = torch.rand(16) + 3, torch.randn(16, 8)
    tokenizer.usage.copy_(usage)
    tokenizer.sums.copy_(sums)
    usage, sums = usage.tolist(), sums.tolist()
    for _ in range(3):
        z, ids = torch.randn(40, 8), torch.randint(16, (40,))
        update(tokenizer, z, ids)
        for code in range(16):
            mine = [z[i].tolist() for i in range(40) if ids[i] == code]
            usage[code] = 0.9 * usage[code] + 0.1 * len(mine)
            for d in range(8):
                sums[code][d] = 0.9 * sums[code][d] + 0.1 * sum(vector[d] for vector in mine)
                expected = sums[code][d] / usage[code]
                assert tokenizer.codebook[code, d].item() == pytest.approx(expected, abs=1e-5)
    assert tokenizer.usage.tolist() == pytest.approx(usage, rel=1e-5)


def test_dead_codes_restart_at_vectors_of_the_batch():
    tokenizer, z = tokenizer_of(decay=0.5), torch.randn(40, 8)
    update(tokenizer, z, torch.zeros(40, dtype=torch.int64))
    distances = (tokenizer.codebook[:, None] - z).norm(dim=2)
    # The first update restarts all codes except the one that is used.
    assert (distances[1:].amin(dim=1) < 1e-3).all() and distances[0].min() > 1e-3
    assert len(set(distances[1:].argmin(dim=1).tolist())) == 15  # at different vectors
    assert tokenizer.usage[1:].tolist() == [2.5] * 15  # 40 vectors / 16 codes
    tokenizer.usage[:] = 2.5
    tokenizer.usage[3] = 0.4  # halved, it falls below the limit of 0.25, so the code restarts
    tokenizer.usage[4] = 0.6  # halved, it stays above the limit
    before = tokenizer.sums / tokenizer.usage[:, None]
    update(tokenizer, torch.randn(40, 8), torch.full((40,), 7))
    moved = (tokenizer.codebook - before).norm(dim=1) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == [3, 7]
    few = tokenizer_of()
    update(few, z[:3], torch.zeros(3, dtype=torch.int64))  # fewer vectors than codes
    assert (few.codebook[1:, None] - z[:3]).norm(dim=2).amin(dim=1).max() < 1e-3


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128, 40])
def test_no_channel_is_normalised_alone(width):
    """A channel that is normalised alone loses its mean, and the image loses its colours."""
    norms = [m for m in VQTokenizer(16, 8, 32, dim=16, width=width).modules()
             if isinstance(m, torch.nn.GroupNorm)]  # fmt: skip
    assert len(norms) > 5
    assert all(norm.num_channels // norm.num_groups >= min(width, 16) for norm in norms)


def test_only_training_moves_the_codebook():
    tokenizer, imgs = tokenizer_of(), torch.randn(4, 3, 16, 16)
    tokenizer.eval()
    before = {name: x.clone() for name, x in tokenizer.named_buffers()}
    tokenizer(imgs), tokenizer.encode(imgs)
    assert all(torch.equal(x, before[name]) for name, x in tokenizer.named_buffers())
    tokenizer.train()
    tokenizer.encode(imgs)
    assert not tokenizer.seen
    tokenizer(imgs)
    assert torch.equal(tokenizer.codebook, before["codebook"])
    tokenizer.update_codebook()
    assert not tokenizer.seen
    assert not torch.equal(tokenizer.codebook, before["codebook"]) and tokenizer.updates == 1
    resumed = tokenizer_of()
    resumed.load_state_dict(tokenizer.state_dict())
    assert resumed.num_updates == tokenizer.num_updates == 1


def test_psnr_and_perplexity_equal_their_formulas():
    imgs = common.normalize(torch.rand(3, 3, 8, 8) * 255)
    others = imgs + 0.2 * torch.randn_like(imgs)
    for i, value in enumerate(supervised_mim.psnr(imgs, others).tolist()):
        a, b = (common.denormalize(x[i]).double().numpy() for x in (imgs, others))
        assert value == pytest.approx(10 * math.log10(1 / ((a - b) ** 2).mean()), abs=1e-3)
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])
    perplexity, share_used = supervised_mim.codebook_use(ids, 8)
    assert perplexity == pytest.approx(4) and share_used == 0.5
    perplexity, share_used = supervised_mim.codebook_use(torch.tensor([0, 0, 0, 1]), 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity == pytest.approx(math.exp(entropy)) and share_used == 0.5


def train_tokenizer_on(folder, micro_batches=1) -> None:
    run = common.Run(supervised_mim.Config(out=str(folder), device="cpu"))
    tokenizer, imgs = tokenizer_of(), torch.load(f"{folder}/imgs.pt")
    ddp = run.wrap(tokenizer)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    for batch in imgs:
        for part in batch.chunk(run.world)[run.rank].chunk(micro_batches):
            _, _, losses = ddp(part)
            (losses["loss"] / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.update_codebook()
    name = f"{run.world}-{run.rank}-{micro_batches}"
    torch.save(tokenizer.state_dict(), f"{folder}/{name}.pt")


def test_processes_and_micro_batches_train_the_tokenizer_of_the_whole_batch(tmp_path):
    torch.save(torch.randn(4, 8, 3, 16, 16), tmp_path / "imgs.pt")
    train_tokenizer_on(tmp_path)
    train_tokenizer_on(tmp_path, 2)
    assert in_processes(2, train_tokenizer_on, tmp_path) == [0, 0]
    names = ("1-0-1", "1-0-2", "2-0-1", "2-1-1")
    one, *others = (torch.load(tmp_path / f"{name}.pt") for name in names)
    assert one["updates"] == 4
    for state in others:
        for name, x in state.items():
            torch.testing.assert_close(x, one[name], atol=1e-5, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss_equals_a_loop_over_masked_patches(dtype, smoothing):
    logits, ids = torch.randn(3, 6, 5).to(dtype).requires_grad_(), torch.randint(5, (3, 6))
    mask = common.random_masking(3, 6, 0.5)[1]
    mask[0] = True  # so the images have different numbers of masked patches
    terms = []
    for b in range(3):
        for i in range(6):
            if mask[b, i]:
                p = [math.exp(x) for x in logits[b, i].tolist()]
                target = [smoothing / 5 + (1 - smoothing) * (k == int(ids[b, i])) for k in range(5)]
                log_p = [math.log(x / sum(p)) for x in p]
                terms.append(-sum(t * x for t, x in zip(target, log_p, strict=True)))
    loss = supervised_mim.mim_token_loss(logits, ids, mask, smoothing)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    loss.backward()
    assert torch.equal(logits.grad.abs().amax(dim=2) > 0, mask)


@pytest.mark.parametrize("target", ["tokens", "pixels"])
@pytest.mark.parametrize("mixed, pool", [(False, "cls"), (True, "cls"), (False, "mean")])
def test_forward_equals_two_passes_by_hand(target, mixed, pool, monkeypatch):
    model = model_of(target, mim_weight=0.7, smoothing=0.2, pool=pool)
    imgs, clean = torch.randn(2, 4, 3, 16, 16)
    labels, ids = torch.tensor([0, 4, 2, 2]), torch.randint(16, (4, 16))
    targets = F.one_hot(labels, 5).float()
    if mixed:
        targets = 0.6 * targets + 0.4 * targets.roll(1, 0)
    visible, mask = common.random_masking(4, 16, 0.5)
    ratios = []

    def fixed_masking(batch, num_patches, mask_ratio, *_):
        ratios.append(mask_ratio)
        return visible, mask

    monkeypatch.setattr(common, "random_masking", fixed_masking)
    loss, stats = model(imgs, targets if mixed else labels, ids, clean)
    assert ratios == [0.5]

    tokens = model.encoder(imgs)
    logits = model.head(tokens[:, 0] if pool == "cls" else sum(tokens[:, 1:].unbind(1)) / 16)
    class_loss = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    pred = model.decoder(model.encoder(clean, visible), visible)
    assert pred.shape == (4, 16, 16 if target == "tokens" else 48)
    if target == "tokens":
        mim = supervised_mim.mim_token_loss(pred, ids, mask, 0.2)
        hits = [(pred[b, i].argmax() == ids[b, i]).item()
                for b in range(4) for i in range(16) if mask[b, i]]  # fmt: skip
        assert stats["token_acc"].item() == pytest.approx(sum(hits) / 32)
        assert stats["token_loss"].item() == pytest.approx(mim.item(), rel=1e-5)
    else:
        mim = common.masked_mse(pred, common.patchify(clean, 4), mask)
        assert stats["pixel_loss"].item() == pytest.approx(mim.item(), rel=1e-5)
    torch.testing.assert_close(loss, class_loss + 0.7 * mim)
    assert stats["class_loss"].item() == pytest.approx(class_loss.item(), rel=1e-5)
    # If images are mixed, the label of the larger part is the right one.
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    assert stats["top1"].item() == pytest.approx(100 * accuracy.item())
    assert not any(x.requires_grad for x in stats.values())
    torch.testing.assert_close(model(clean, labels, ids)[0], model(clean, labels, ids, clean)[0])


def test_gradients_reach_what_they_should():
    imgs, labels, ids = torch.randn(4, 3, 16, 16), torch.arange(4), torch.randint(16, (4, 16))
    for weight in (1.0, 0.0):
        model = model_of(mim_weight=weight)
        loss, _ = model(imgs, labels, ids)
        loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                expected = weight > 0 or not name.startswith("decoder")
                assert (p.grad.abs().max() > 0) == expected, name
    model = model_of(mim_weight=1.0)
    both, stats = model(imgs, labels, ids)
    baseline = model_of()
    baseline.decoder = None
    class_only, _ = baseline(imgs, labels)
    both.backward()
    assert stats["class_loss"] == class_only  # the masked pass does not change it
    with_mim = model.head.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model.classify(imgs), labels).backward()
    torch.testing.assert_close(model.head.weight.grad, with_mim)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels):
    model, tokenizer = model_of(channels=channels), tokenizer_of(channels)
    imgs = torch.randn(2, channels, 16, 16)
    loss, _ = model(imgs, torch.tensor([0, 1]), tokenizer.encode(imgs))
    assert loss.isfinite()


def test_one_batch_can_be_over_fitted():
    model, tokenizer = model_of(), tokenizer_of()
    imgs, labels = common.draw_shapes(8, 16, 0)
    imgs, labels = common.normalize(imgs), labels % 5
    tokenizer(imgs)
    tokenizer.update_codebook()
    ids, optimizer = tokenizer.encode(imgs), torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert len(ids.unique()) > 8
    for _ in range(150):
        loss, stats = model(imgs, labels, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stats["top1"] == 100 and stats["token_acc"] > 0.6 and stats["class_loss"] < 0.1


# ------------------------------------------------------------------------------ alignment


def watch(monkeypatch) -> list:
    """Collects the arguments of each forward pass, and asserts that the tokenizer is frozen."""
    calls, original, encode = [], SupervisedMIM.forward, VQTokenizer.encode

    def encode_in_eval_mode(tokenizer, imgs):
        assert not tokenizer.training
        assert not any(p.requires_grad for p in tokenizer.parameters())
        return encode(tokenizer, imgs)

    def forward(model, imgs, labels, token_ids=None, clean=None):
        calls.append((imgs, labels, token_ids, clean))
        return original(model, imgs, labels, token_ids, clean)

    monkeypatch.setattr(SupervisedMIM, "forward", forward)
    monkeypatch.setattr(VQTokenizer, "encode", encode_in_eval_mode)
    return calls


def test_tokens_are_those_of_the_pixels_before_mixup(
    tokenizer, shapes_folder, monkeypatch, tmp_path
):
    calls, flags = watch(monkeypatch), ["--mixup", "0.5", "--steps", "3", "--tokenizer", tokenizer]
    train(METHOD, tmp_path, shapes_folder, *flags)
    encode, shares = load(tokenizer).eval().requires_grad_(False).encode, []
    for imgs, labels, ids, clean in calls:
        assert torch.equal(encode(clean), ids)
        other = clean.roll(1, 0)
        share = ((imgs - other) * (clean - other)).sum() / (clean - other).square().sum()
        torch.testing.assert_close(imgs, share * clean + (1 - share) * other, atol=1e-4, rtol=1e-3)
        assert labels.sum(dim=1).tolist() == pytest.approx([1] * 16)
        most = max(share.item(), 1 - share.item())
        assert most - 1e-3 <= labels.max().item() <= 1 + 1e-6
        shares.append(round(share.item(), 4))
    assert len(set(shares)) == 3


def test_tokens_are_those_of_the_crop_before_randaugment(
    tokenizer, shapes_folder, monkeypatch, tmp_path
):
    """About half of the crops are flipped; the tokens are those of the flipped crop."""
    calls = watch(monkeypatch)
    monkeypatch.setattr(v2, "RandAugment", lambda *args, **kwargs: v2.RandomInvert(p=1))
    flags = ["--steps", "4", "--tokenizer", tokenizer, "--randaug", "9", "--min-crop", "0.999"]
    train(METHOD, tmp_path, shapes_folder, *flags)
    encode, flips = load(tokenizer).eval().requires_grad_(False).encode, 0
    originals, _ = images_of(shapes_folder, "train")
    for imgs, _, ids, clean in calls:
        pixels, changed = (common.denormalize(x) for x in (clean, imgs))
        torch.testing.assert_close(changed, 1 - pixels, atol=1e-4, rtol=0)
        assert torch.equal(encode(clean), ids)
        for img in clean:
            upright = (originals - img).abs().mean(dim=(1, 2, 3)).min()
            flipped = (originals.flip(3) - img).abs().mean(dim=(1, 2, 3)).min()
            assert min(upright, flipped) < 0.15  # the crop lacks at most one row or column
            flips += int(flipped < upright)
    assert 10 < flips < 54


def test_augment_changes_one_of_two_equal_crops():
    image = common.draw_shapes(1, 40, 0)[0][0]
    crop = common.RandomCrop(16, 0.5)
    augment, changed = supervised_mim.Augment(crop, 15), 0
    unchanged = supervised_mim.Augment(crop, 0)
    for seed in range(20):
        torch.manual_seed(seed)
        after, before, label = augment(image, 3, 0)
        torch.manual_seed(seed)
        assert torch.equal(crop(image, 3, 0)[0], before) and label == 3
        torch.manual_seed(seed)
        one, two, label = unchanged(image, 3, 0)
        assert torch.equal(one, before) and torch.equal(two, before) and label == 3
        assert after.shape == before.shape == (3, 16, 16)
        assert after.dtype == before.dtype == torch.uint8
        changed += not torch.equal(after, before)
    assert changed > 12
    assert (augment.rand_augment.num_ops, augment.rand_augment.magnitude) == (2, 15)
    assert augment.rand_augment.num_magnitude_bins == 31


# ------------------------------------------------------------------------------ runs


def test_a_run_and_its_classifiers(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"classifier.pt", "classifier.best.pt", "encoder.pt", "recon_0003.png"} <= names
    assert {"tokenizer.pt", "metrics.jsonl", "recon_0002.png"} <= {
        path.name for path in (trained / "tokenizer").iterdir()
    }
    for line in metrics(trained):
        expected = line["class_loss"] + line["token_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert {"top1", "token_acc", "val_top1", "knn", "retrieval_1nn"} <= line.keys()
    for line in metrics(trained / "tokenizer"):
        expected = line["recon"] + 0.25 * line["commitment"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert 5 < line["psnr"] < 30 and 1 <= line["perplexity"] <= 16 * line["codes_used"] + 1e-6
    for name in ("recon_0003.png", "tokenizer/recon_0002.png"):
        with Image.open(trained / name) as picture:
            assert picture.width > 8 * 90 and picture.height > 2 * 90

    classifier = torch.load(trained / "classifier.pt", weights_only=True)
    model, plain = weights(trained), common.ViT(16, 4, embed_dim=192, depth=1, num_heads=3)
    assert set(classifier["model"]) == {*plain.state_dict(), "head.weight", "head.bias"}
    assert torch.equal(classifier["model"]["head.weight"], model["head.weight"])
    assert classifier["classes"] == sorted(common.SHAPES)
    best = torch.load(trained / "classifier.best.pt", weights_only=True)["model"]
    assert best.keys() == classifier["model"].keys()
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(*(common.load_encoder(trained / f"{name}.pt")(imgs)
                         for name in ("encoder", "classifier")))  # fmt: skip


def test_the_tokenizer_is_measured_on_the_validation_images(trained, shapes_folder):
    folder = trained / "tokenizer"
    tokenizer, last = load(folder / "tokenizer.pt"), metrics(folder)[-1]
    imgs, _ = images_of(shapes_folder, "val")
    recon, ids, _ = tokenizer.eval()(imgs)
    assert last["psnr"] == pytest.approx(supervised_mim.psnr(imgs, recon).mean().item(), abs=1e-3)
    expected = pytest.approx(supervised_mim.codebook_use(ids, 16), abs=1e-4)
    assert (last["perplexity"], last["codes_used"]) == expected


@pytest.mark.parametrize("pool, name", [("cls", "token"), ("mean", "avg")])
def test_timm_takes_the_classifier(pool, name, pooled):
    timm = pytest.importorskip("timm")
    content = torch.load(pooled[pool] / "classifier.pt", weights_only=True)
    assert content["global_pool"] == name
    theirs = timm.models.VisionTransformer(
        16, 4, num_classes=10, embed_dim=192, depth=1, num_heads=3,
        global_pool=content["global_pool"], fc_norm=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(content["model"])
    ours = supervised_mim.build(settings(METHOD, "--pool", pool, "--mim-weight", "0"), 10).eval()
    ours.load_state_dict(weights(pooled[pool]))
    imgs = torch.randn(8, 3, 16, 16)
    logits = ours.classify(imgs)
    assert logits.std() > 0.01
    torch.testing.assert_close(theirs(imgs), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_validation_equals_a_loop(pool, pooled, shapes_folder):
    """val_top1 in the last line of the log, computed again from the exported encoder and head."""
    content = torch.load(pooled[pool] / "classifier.pt", weights_only=True)
    assert content["global_pool"] == {"cls": "token", "mean": "avg"}[pool]
    state, hits = content["model"], 0
    encoder = common.load_encoder(pooled[pool] / "classifier.pt").eval()
    imgs, labels = images_of(shapes_folder, "val")
    for img, label in zip(imgs, labels, strict=True):
        cls, *patches = encoder(img[None])[0]
        taken = cls if pool == "cls" else sum(patches) / len(patches)
        hits += int((state["head.weight"] @ taken + state["head.bias"]).argmax() == label)
    assert metrics(pooled[pool])[-1]["val_top1"] == pytest.approx(100 * hits / 32, abs=0.01)


def test_without_mim_it_is_the_supervised_baseline_bit_for_bit(tmp_path, shapes_folder):
    """The comparison is a training loop without masks, tokens or a decoder."""
    flags = ["--epochs", "2", "--mixup", "0.5", "--clip-grad", "1", "--depth", "2"]
    train(METHOD, tmp_path, shapes_folder, *flags, "--mim-weight", "0")
    assert not (tmp_path / "tokenizer").exists() and not list(tmp_path.glob("recon_*"))
    cfg = settings(METHOD, *flags)
    train_set = common.load_dataset(str(shapes_folder), "train", 16)
    crop = common.RandomCrop(16, cfg.min_crop)
    loader = common.TrainLoader(common.Run(cfg), train_set, crop)
    torch.manual_seed(common.random_seed("init", 0))
    vit, head = common.ViT(16, 4, embed_dim=192, depth=2, num_heads=3), torch.nn.Linear(192, 10)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    parameters = [p for m in (vit, head) for p in m.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    not_decayed = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW([
        {"params": decayed, "weight_decay": 0.05}, {"params": not_decayed, "weight_decay": 0.0},
    ], betas=(0.9, 0.999), fused=True)  # fmt: skip
    mixup, losses = v2.MixUp(alpha=0.5, num_classes=10), []
    for step in range(8):
        if step % 4 == 0:
            batches = loader.batches(step)
        lr = common.warmup_cosine(step, 8, 0.3 * 4, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = lr
        imgs, labels = next(batches)
        torch.manual_seed(common.random_seed("model", 0, step, 0))
        imgs, labels = mixup(imgs, labels)
        loss = F.cross_entropy(head(vit(imgs)[:, 0]), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed + not_decayed, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected = {f"encoder.{k}": x for k, x in vit.state_dict().items()}
    expected |= {f"head.{k}": x for k, x in head.state_dict().items()}
    got = weights(tmp_path)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(sum(losses[:4]) / 4, rel=1e-6)
    assert losses[0] == pytest.approx(math.log(10), rel=1e-5)  # the head starts at zero


def test_the_class_branch_of_the_first_step_equals_the_baseline(tmp_path, shapes_folder, tokenizer):
    """The masked pass changes neither the weights at the start nor the images or their mixup."""
    flags = ["--steps", "1", "--mixup", "0.5", "--randaug", "5"]
    train(METHOD, tmp_path / "mim", shapes_folder, *flags, "--tokenizer", tokenizer)
    train(METHOD, tmp_path / "baseline", shapes_folder, *flags, "--mim-weight", "0")
    train(METHOD, tmp_path / "pixels", shapes_folder, *flags, "--target", "pixels")
    assert not (tmp_path / "pixels" / "tokenizer").exists()
    mim, baseline, pixels = (metrics(tmp_path / x)[0] for x in ("mim", "baseline", "pixels"))
    assert mim["class_loss"] == pixels["class_loss"] == baseline["class_loss"] == baseline["loss"]
    assert "token_loss" in mim and "pixel_loss" in pixels
    assert not {"token_loss", "pixel_loss"} & baseline.keys()
    mim, baseline = (torch.load(tmp_path / x / "encoder.pt")["model"] for x in ("mim", "baseline"))
    assert mim.keys() == baseline.keys()


def test_the_checkpoint_keeps_only_the_checksum_of_the_tokenizer(trained):
    tokenizer = load(trained / "tokenizer" / "tokenizer.pt")
    assert tokenizer.updates == 8  # two epochs of four steps, none in the main run
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    kept = checkpoint["identity"]["checksum of the tokenizer"]
    assert kept == supervised_mim.checksum(tokenizer) and "tokenizer" not in checkpoint
    for x in (*tokenizer.parameters(), *tokenizer.buffers()):
        before = x.data.clone()
        x.data += 1
        assert supervised_mim.checksum(tokenizer) != kept
        x.data.copy_(before)
    assert supervised_mim.checksum(tokenizer) == kept


def test_a_finished_tokenizer_is_taken_as_it_is(tmp_path, shapes_folder, capsys):
    """Also with another number of micro-batches, another batch or precision, or --restart."""
    train(METHOD, tmp_path, shapes_folder, "--train-tokenizer", "--steps", "5")
    assert not (tmp_path / "tokenizer" / "tokenizer.pt").exists()
    train(METHOD, tmp_path, shapes_folder, "--train-tokenizer")
    for flags in (["--accumulate", "2"], ["--batch-size", "8", "--precision", "bf16"]):
        train(METHOD, tmp_path, shapes_folder, "--steps", "1", *flags, "--seed", "1", "--restart")
        assert load(tmp_path / "tokenizer" / "tokenizer.pt").updates == 8
    arguments = ["--data", shapes_folder, "--out", tmp_path, *TINY, *METHODS[METHOD].model_flags]
    error = error_of(capsys, supervised_mim, *arguments, "--codebook-size", "17", "--restart")
    assert "codebook_size was 16, now 17; use another --out, or train a new one" in error
    anew = ["--train-tokenizer", "--restart"]
    train(METHOD, tmp_path, shapes_folder, *anew, "--codebook-size", "17")
    file = tmp_path / "tokenizer" / "tokenizer.pt"
    assert len(load(file).codebook) == 17
    train(METHOD, tmp_path, shapes_folder, *anew, "--steps", "1")
    assert not file.exists()


def test_a_run_is_resumed_only_with_the_tokenizer_that_it_began_with(
    tmp_path, shapes_folder, tokenizer, capsys
):
    given, moved, other = (tmp_path / f"{name}.pt" for name in ("given", "moved", "other"))
    shutil.copy(tokenizer, given)
    content = torch.load(tokenizer, weights_only=True)
    content["tokenizer"]["codebook"][3, 1] += 1e-3
    torch.save(content, other)
    flags, run = ["--mixup", "0.5", "--epochs", "2"], tmp_path / "run"
    train(METHOD, tmp_path / "whole", shapes_folder, *flags, "--tokenizer", given)
    train(METHOD, run, shapes_folder, *flags, "--tokenizer", given, "--steps", "5")
    before = (run / "checkpoint.pt").read_bytes()
    given.rename(moved)
    refused = functools.partial(error_of, capsys, supervised_mim, *FLAGS, *flags, "--data",
                                shapes_folder, "--out", run)  # fmt: skip
    was, now = (supervised_mim.checksum(load(path)) for path in (moved, other))
    expected = f"of another run: checksum of the tokenizer was {was}, now {now}; use another --out"
    assert expected in refused("--tokenizer", other)
    assert "given.pt: No such file" in refused("--tokenizer", given)
    # Without --tokenizer, the run is refused as well; it does not train a tokenizer of its own.
    assert "is missing: add the --tokenizer FILE, if" in refused()
    assert (run / "checkpoint.pt").read_bytes() == before and not (run / "tokenizer").exists()
    train(METHOD, run, shapes_folder, *flags, "--tokenizer", moved)
    torch.testing.assert_close(weights(run), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_run_without_tokens_does_not_become_one_with_tokens(tmp_path, shapes_folder, capsys):
    train(METHOD, tmp_path, shapes_folder, "--mim-weight", "0", "--steps", "1")
    flags = [*FLAGS, "--data", shapes_folder, "--out", tmp_path]
    error = error_of(capsys, supervised_mim, *flags)
    assert "tokenizer.pt is missing: add the --tokenizer FILE" in error
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("batch, accumulate, expected", [
    (32, 1, 32), (300, 1, 256), (300, 3, 255), (600, 300, 300),
])  # fmt: skip
def test_the_batch_of_the_tokenizer_can_be_divided(batch, accumulate, expected, tmp_path):
    flags = ["--out", tmp_path, "--batch-size", batch, "--accumulate", accumulate]
    cfg = supervised_mim.tokenizer_config(common.Run(settings(METHOD, *flags)))
    assert cfg.batch_size == expected and expected % accumulate == 0


@pytest.mark.parametrize("every, validated", [(0, []), (2, [2, 4, 5])])
def test_validation_and_knn_have_switches_of_their_own(every, validated, tmp_path, shapes_folder):
    """val_top1 follows --val-every, and kNN follows --knn-every; 0 means never."""
    flags = ["--mim-weight", "0", "--epochs", "5", "--val-every", every, "--knn-every", "3"]
    train(METHOD, tmp_path, shapes_folder, *flags)
    lines = metrics(tmp_path)
    assert [line["epoch"] for line in lines if "val_top1" in line] == validated
    assert [line["epoch"] for line in lines if "best_top1" in line] == validated
    assert [line["epoch"] for line in lines if "knn" in line] == [3, 5]
    assert (tmp_path / "classifier.best.pt").exists() == bool(validated)


def test_the_best_and_the_last_classifier_are_kept(tmp_path, shapes_folder, monkeypatch):
    scores = iter([30.0, 50.0, 40.0, 50.0])
    monkeypatch.setattr(common, "knn_monitor", lambda *args: {})
    monkeypatch.setattr(common, "accuracy", lambda *args: {"top1": next(scores)})
    flags = ["--epochs", "5", "--mim-weight", "0"]
    for steps, every in ((8, 1), (12, 2), (16, 3)):  # a resumed run knows the best value so far
        train(METHOD, tmp_path, shapes_folder, *flags, "--steps", steps, "--val-every", every)
        if steps == 8:
            best = weights(tmp_path)
    assert [x["val_top1"] for x in metrics(tmp_path)] == [30, 50, 40, 50]
    assert [x["best_top1"] for x in metrics(tmp_path)] == [30, 50, 50, 50]
    for name, model in (("classifier.best.pt", best), ("classifier.pt", weights(tmp_path))):
        state = torch.load(tmp_path / name, weights_only=True)["model"]
        assert torch.equal(state["cls_token"], model["encoder.cls_token"])
        assert torch.equal(state["head.bias"], model["head.bias"])
    assert not torch.equal(best["head.bias"], weights(tmp_path)["head.bias"])


def test_the_tokenizer_trains_in_half_precision():
    tokenizer, imgs = tokenizer_of(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, ids, losses = tokenizer(imgs)
    losses["loss"].backward()
    tokenizer.update_codebook()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())
    assert tokenizer.codebook.dtype == losses["recon"].dtype == torch.float32
    assert len(ids.unique()) > 1


def test_a_compiled_model_computes_the_same(monkeypatch):
    """Both passes are traced as one graph, but not compiled to C++, which takes long."""
    model, imgs = model_of(), torch.randn(4, 3, 16, 16)
    labels, ids = torch.arange(4), torch.randint(16, (4, 16))
    masking = common.random_masking(4, 16, 0.5)  # compiled code would draw other random numbers
    monkeypatch.setattr(common, "random_masking", lambda *args: masking)
    loss, stats = model(imgs, labels, ids)
    model.compile(backend="aot_eager", fullgraph=True)
    compiled, compiled_stats = model(imgs, labels, ids)
    torch.testing.assert_close((compiled, compiled_stats), (loss, stats))
    gradients = [torch.autograd.grad(x, model.head.weight)[0] for x in (loss, compiled)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name, loaded", [
    ("encoder.pt", {"encoder"}), ("classifier.pt", {"encoder"}),
    ("checkpoint.pt", {"encoder", "head", "decoder"}),
])  # fmt: skip
def test_fine_tuning_with_mim_starts_from_the_file(
    name, loaded, tmp_path, shapes_folder, trained, tokenizer, capsys, monkeypatch
):
    """A module that the file lacks starts as in a new run of the same seed."""
    starts, run_start = [], common.Run.start

    def start(run, loader, val, model, optimizer):
        starts.append({k: x.clone() for k, x in model.state_dict().items()})
        run_start(run, loader, val, model=model, optimizer=optimizer)

    monkeypatch.setattr(common.Run, "start", start)
    flags = ["--tokenizer", tokenizer, "--seed", "7", "--steps", "2"]
    train(METHOD, tmp_path / "new", shapes_folder, *flags)
    capsys.readouterr()
    train(METHOD, tmp_path / "tuned", shapes_folder, *flags, "--init-from", trained / name)
    assert ("has no decoder, head" in capsys.readouterr().err) == (name != "checkpoint.pt")
    new, tuned = starts
    before, file = weights(trained), common.load_encoder(trained / name).state_dict()
    for key, x in tuned.items():
        module, _, key_of_module = key.partition(".")
        expected = before[key] if module in loaded else new[key]
        assert torch.equal(x, expected), key
        if module == "encoder":
            assert torch.equal(x, file[key_of_module]), key
    for key in ("encoder.cls_token", "decoder.pred.weight", "head.weight"):
        assert not torch.equal(before[key], new[key])  # so the test can tell them apart
    after, (line,) = weights(tmp_path / "tuned"), metrics(tmp_path / "tuned")
    assert line["step"] == 2 and weights(tmp_path / "tuned", "step") == 2
    assert line["loss"] == pytest.approx(line["class_loss"] + line["token_loss"], rel=1e-5)
    for key in ("encoder.cls_token", "decoder.pred.weight", "head.weight"):
        assert not torch.equal(after[key], tuned[key])


def test_every_flag_reaches_its_part(tmp_path, shapes_folder, monkeypatch):
    flags = ["--mask-ratio", "0.7", "--mim-weight", "0.3", "--token-smoothing", "0.2",
             "--tokenizer-lr", "7e-4", "--tokenizer-epochs", "5", "--seed", "3",
             "--min-crop", "0.3", "--decoder-depth", "2", "--pool", "mean",
             "--train-tokenizer"]  # fmt: skip
    cfg = settings(METHOD, "--out", tmp_path, "--data", shapes_folder, *flags)
    model, tokenizer = supervised_mim.build(cfg, 7), supervised_mim.build_tokenizer(cfg)
    assert (model.mask_ratio, model.mim_weight, model.smoothing) == (0.7, 0.3, 0.2)
    assert (len(model.decoder.blocks), model.decoder.pred.out_features) == (2, 16)
    assert (model.head.out_features, model.target, model.pool) == (7, "tokens", "mean")
    assert (tokenizer.codebook.shape, tokenizer.settings["width"]) == ((16, 8), 4)
    assert tokenizer.encoder[0].out_channels == 4 and tokenizer.decoder[0].out_channels == 16
    pixels = supervised_mim.build(settings(METHOD, "--target", "pixels"), 7)
    assert pixels.decoder.pred.out_features == 48 and pixels.target == "pixels"
    supervised_mim.main(cfg)
    used = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    assert (used["lr"], used["epochs"], used["seed"], used["min_crop"]) == (7e-4, 5, 3, 0.3)
    assert (used["batch_size"], used["clip_grad"], used["weight_decay"]) == (16, 1, 1e-4)
    loaders = []
    monkeypatch.setattr(common.Run, "start", lambda run, loader, *_, **_s: loaders.append(loader))
    train(METHOD, tmp_path / "run", shapes_folder, "--steps", "1", "--mim-weight", "0",
          "--randaug", "7", "--min-crop", "0.3")  # fmt: skip
    augment = loaders[0].augment
    assert augment.crop.crop.scale == (0.3, 1.0) and augment.crop.size == [16, 16]
    assert augment.rand_augment.magnitude == 7


def test_the_picture_shows_masked_patches_predicted_and_visible_ones_as_they_are(monkeypatch):
    model, tokenizer, imgs = model_of(), tokenizer_of().eval(), torch.randn(2, 3, 16, 16)
    visible, mask = common.random_masking(2, 16, 0.5)
    monkeypatch.setattr(common, "random_masking", lambda *args: (visible, mask))
    with torch.no_grad():
        rows = supervised_mim.reconstruct(model, tokenizer, imgs)
        pred = model.decoder(model.encoder(imgs, visible), visible).argmax(dim=2)
    given, masked, tokens, predicted = rows.values()
    visible_patches = common.patchify(given, 4) * ~mask[:, :, None]
    assert torch.equal(common.patchify(masked, 4), visible_patches)
    ids = tokenizer.encode(imgs)
    assert torch.equal(tokens, tokenizer.decode(ids))
    assert torch.equal(predicted, tokenizer.decode(torch.where(mask, pred, ids)))


def test_the_imagenet_preset_is_the_published_recipe():
    arguments = ["--preset", "imagenet"]
    cfg = common.parse(supervised_mim.Config, supervised_mim.PRESETS, arguments)
    assert (cfg.size, cfg.img_size, cfg.patch_size) == ("base", 224, 14)
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.clip_grad) == (300, 4096, 1e-3, 1.0)
    assert cfg.lr * cfg.weight_decay == pytest.approx(1e-4)
    assert round(cfg.warmup_epochs * (1281167 // 4096)) == 10000
    assert (cfg.mixup, cfg.randaug, cfg.min_crop) == (0.5, 15, 0.05)
    assert (cfg.mask_ratio, cfg.mim_weight, cfg.target, cfg.pool) == (0.5, 1.0, "tokens", "cls")
    assert (cfg.decoder_depth, cfg.token_smoothing) == (1, 0.1)
    assert (cfg.codebook_size, cfg.codebook_dim) == (1024, 256)
    with torch.device("meta"):
        model, tokenizer = supervised_mim.build(cfg, 1000), supervised_mim.build_tokenizer(cfg)
    assert tokenizer.grid == model.encoder.grid == (16, 16) and tokenizer.img_size == (256, 256)
    assert model.decoder.pred.out_features == 1024 and len(model.decoder.blocks) == 1
    assert model.decoder.mask_token.shape[2] == 768
    assert model.decoder.blocks[0].attn.num_heads == 12
    assert supervised_mim.Config().decoder_depth == 1


@pytest.mark.parametrize("patch_size, stride", [(4, 4), (8, 8), (14, 16), (16, 16), (7, 8), (1, 1)])
def test_the_stride_matches_the_patches(patch_size, stride):
    cfg = supervised_mim.Config(img_size=4 * patch_size, patch_size=patch_size, tokenizer_width=4)
    tokenizer = supervised_mim.build_tokenizer(cfg)
    assert tokenizer.grid == (4, 4) and tokenizer.img_size == (4 * stride, 4 * stride)


# ------------------------------------------------------------------------------ mistakes


def test_labels_are_needed_but_not_by_the_tokenizer(tmp_path, capsys):
    write_images(tmp_path / "flat", 32, 16, seed=0, labelled=False)
    write_images(tmp_path / "half" / "train", 32, 16, seed=0)
    write_images(tmp_path / "loose" / "train", 32, 16, seed=0)
    write_images(tmp_path / "loose" / "val", 8, 16, seed=0, labelled=False)
    no_labels, no_class_folders = "are needed, in class folders", "or none in folders of classes"
    for data, message in (("flat", no_labels), ("half", no_labels), ("loose", no_class_folders)):
        flags = [*FLAGS, "--data", tmp_path / data, "--out", tmp_path / "run"]
        assert message in error_of(capsys, supervised_mim, *flags)
        assert not (tmp_path / "run").exists()
    train(METHOD, tmp_path / "run", tmp_path / "flat", "--train-tokenizer")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.pt").exists()
    assert not (tmp_path / "run" / "encoder.pt").exists()


def test_a_tokenizer_of_another_grid_is_refused_with_sizes_that_fit(
    tmp_path, shapes_folder, tokenizer, capsys
):
    """The fixture's tokenizer has 4 x 4 tokens per image."""
    flags = [*FLAGS, "--data", shapes_folder, "--out", tmp_path / "run", "--tokenizer"]
    error = error_of(capsys, supervised_mim, *flags, tokenizer, "--img-size", "32")
    assert "has 4x4 tokens per image" in error
    assert "gives 8x8 patches: --img-size 16 would fit" in error
    other = tmp_path / "other.pt"
    torch.save({"model": {}}, other)
    assert "holds no tokenizer" in error_of(capsys, supervised_mim, *flags, other)
    content = torch.load(tokenizer)
    content["tokenizer"].pop("codebook")
    torch.save(content, other)
    assert "does not fit: " in error_of(capsys, supervised_mim, *flags, other)
    error = error_of(capsys, supervised_mim, *flags, tokenizer, "--codebook-size", "50")
    assert "tokenizer.pt has 16 codes, not 50: --codebook-size 16 would fit" in error
    # Its width and image size may differ from the settings if its grid is that of the patches.
    flags = ["--img-size", "32", "--patch-size", "8", "--tokenizer-width", "8", "--steps", "1"]
    train(METHOD, tmp_path / "fits", shapes_folder, *flags, "--tokenizer", tokenizer)
    assert metrics(tmp_path / "fits")[0]["token_loss"] > 0
