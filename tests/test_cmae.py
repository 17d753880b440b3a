"""CMAE: each part is compared with a slow version of its formula; then the script is run."""

import math

import numpy as np
import pytest
import torch
from conftest import in_processes, metrics, settings, train, weights
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import cmae
import common

OFF = ["--crop", "random", "--contrastive-weight", "0", "--position-weight", "0"]


def model_of(depth=2, **options):
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=24, depth=depth, num_heads=3)
    decoder = common.Decoder(vit, 16, 1, 2)
    options = {"head_hidden": 32, "head_dim": 16, "mask_ratio": 0.5} | options
    model = cmae.CMAE(vit, decoder, **options)
    with torch.no_grad():  # biases that are 0 would hide mistakes
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


# ------------------------------------------------------------------------------ ContrastiveCrop


def limits(side, length, low, high):
    """The first and the last place of a crop of `length` pixels: c0 and c1 of Peng et al."""
    c0 = min(max(int(side * low) - length // 2, 0), side - length)
    c1 = min(max(int(side * high) - length // 2, 0), side - length)
    return c0, c1


def crops_of(count, *arguments, **options) -> torch.Tensor:
    """`count` crops for the same box (count, 4): top, left, h, w."""
    crops = [cmae.sample_contrastive_crop(*arguments, **options) for _ in range(count)]
    return torch.tensor(crops)


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_crops_equal_the_formula(alpha, monkeypatch):
    """For 300 boxes and known samples of Beta, every crop starts where the formula says."""
    torch.manual_seed(0)
    low = torch.rand(300, 2) * 0.7
    boxes = torch.cat([low, low + torch.rand(300, 2) * (1 - low)], dim=1)
    numbers = torch.distributions.Beta(alpha, alpha).sample((300, 2))
    given = iter(numbers.flatten().tolist())

    def sample(beta, shape=()):
        assert beta.concentration0 == beta.concentration1 == pytest.approx(alpha)
        return torch.tensor([next(given) for _ in range(math.prod(shape))]).view(shape)

    monkeypatch.setattr(torch.distributions.Beta, "sample", sample)
    for box, (down, right) in zip(boxes, numbers.tolist(), strict=True):
        top, left, h, w = cmae.sample_contrastive_crop(48, 80, box, alpha=alpha)
        h_min, w_min, h_max, w_max = box.tolist()
        c0, c1 = limits(48, h, h_min, h_max)
        assert top == c0 + int((c1 - c0) * down)
        c0, c1 = limits(80, w, w_min, w_max)
        assert left == c0 + int((c1 - c0) * right)


def slow_crop(rng, height, width, box, scale, alpha):
    """Peng et al.'s crop with numpy's random numbers. Its size is that of a RandomResizedCrop:
    there are ten tries, and then the largest crop with an allowed aspect is taken. A sample of
    Beta places it within the limits."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    place = []
    for side, length, low, high in ((height, h, box[0], box[2]), (width, w, box[1], box[3])):
        c0, c1 = limits(side, length, low, high)
        place.append(c0 + int((c1 - c0) * rng.beta(alpha, alpha)))
    return *place, h, w


def kolmogorov_smirnov(a, b) -> float:
    """The Kolmogorov-Smirnov statistic: the largest distance of two cumulative distributions."""
    values = np.concatenate([a, b])
    share_of_a = np.searchsorted(np.sort(a), values, side="right") / len(a)
    share_of_b = np.searchsorted(np.sort(b), values, side="right") / len(b)
    return np.abs(share_of_a - share_of_b).max()


@pytest.mark.parametrize("height, width, box, scale, alpha", [
    (64, 64, (0.25, 0.5, 0.75, 0.5), (0.05, 0.1), 0.1),
    (64, 48, (0.1, 0.3, 0.6, 0.9), (0.2, 1.0), 0.6),
    (20, 100, (0.0, 0.2, 0.5, 0.7), (0.2, 1.0), 0.1),  # often no size fits in ten tries
])  # fmt: skip
def test_crops_have_the_distribution_of_a_slow_version(height, width, box, scale, alpha):
    torch.manual_seed(0)
    rng, count, box = np.random.default_rng(0), 2000, torch.tensor(box)
    ours = crops_of(count, height, width, box, scale, alpha=alpha).numpy()
    box = box.tolist()  # rounded to fp32, which can move int(side * low) by one pixel
    slow = np.array([slow_crop(rng, height, width, box, scale, alpha) for _ in range(count)])
    for column in range(4):
        distance = kolmogorov_smirnov(ours[:, column], slow[:, column])
        assert distance < 0.06  # 1 sample in 700 exceeds this by chance
    for top, left, h, w in ours.tolist():
        assert 0 <= top <= height - h and 0 <= left <= width - w
        first, last = limits(height, h, box[0], box[2])
        assert first <= top <= last
        first, last = limits(width, w, box[1], box[3])
        assert first <= left <= last


def test_crops_are_u_shaped_within_the_box_and_sized_as_random_resized_crops():
    """The crops are small, so that each of them can lie anywhere in the box."""
    torch.manual_seed(0)
    box, scale = torch.tensor([0.25, 0.5, 0.75, 0.5]), (0.05, 0.1)
    top, left, h, w = crops_of(2000, 64, 64, box, scale, alpha=0.1).T
    middle = (top + h // 2).float()
    assert middle.min() == 16 and middle.max() >= 47 and ((left + w // 2) == 32).all()
    assert ((middle == 16).float().mean() - (middle >= 47).float().mean()).abs() < 0.05
    at_rim = ((middle < 19.2) | (middle > 44.8)).float().mean().item()
    share = torch.distributions.Beta(0.1, 0.1).sample((20000,))
    expected = ((share < 0.1) | (share > 0.9)).float().mean().item()
    assert 0.75 < expected and at_rim == pytest.approx(expected, abs=0.03)
    assert middle.mean().item() == pytest.approx(32, abs=1.0)
    crop, image = v2.RandomResizedCrop(8, scale), torch.empty(3, 64, 64)
    plain = [crop.make_params([image]) for _ in range(2000)]
    for ours, name in ((h, "height"), (w, "width")):
        theirs = torch.tensor([float(x[name]) for x in plain])
        assert ours.float().mean().item() == pytest.approx(theirs.mean().item(), rel=0.02)
        assert ours.float().std().item() == pytest.approx(theirs.std().item(), rel=0.06)
    top, _, h, _ = crops_of(2000, 64, 64, box, scale, alpha=1.0).T
    middle = (top + h // 2).float()
    assert middle.std().item() == pytest.approx(32 / math.sqrt(12), rel=0.05)


def test_a_crop_for_which_no_size_fits_is_placed_by_the_box_too():
    left = torch.tensor([0.0, 0.0, 1.0, 0.1])
    assert cmae.sample_contrastive_crop(10, 100, left, (1.0, 1.0))[2:] == (10, 13)
    _, places, _, _ = crops_of(200, 10, 100, left, (1.0, 1.0)).T
    assert places.min() == 0 and places.max() in (3, 4)  # of at most 10 - 13 // 2


def slow_box(heatmap, height, width):
    """Enlarges the heatmap bilinearly between the centres of patches, value by value."""
    h, w = heatmap.shape
    heat = ((heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())).tolist()

    def at(y, x):
        value, (y, x) = 0.0, (max(y, 0.0), max(x, 0.0))
        for i in (int(y), int(y) + 1):
            for j in (int(x), int(x) + 1):
                near = (1 - abs(y - i)) * (1 - abs(x - j))
                value += near * heat[min(i, h - 1)][min(j, w - 1)]
        return value

    hot = [(y, x) for y in range(height) for x in range(width)
           if at((y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5) > 0.1]  # fmt: skip
    rows, columns = [y for y, _ in hot], [x for _, x in hot]
    return [min(rows) / height, min(columns) / width, max(rows) / height, max(columns) / width]


def test_boxes_equal_a_slow_version():
    torch.manual_seed(0)
    heatmaps = torch.rand(20, 4, 6) ** 8
    heatmaps[0] = 0
    heatmaps[0, 1:3, 2:4] = 3.0
    boxes = cmae.boxes_from_heatmaps(heatmaps, (16, 48))
    for heatmap, box in zip(heatmaps, boxes.tolist(), strict=True):
        assert box == pytest.approx(slow_box(heatmap, 16, 48))
    # The bright patches are rows 4..11, columns 16..31; 0.1 is reached in the next half patch.
    assert boxes[0].tolist() == pytest.approx([2 / 16, 13 / 48, 13 / 16, 34 / 48])
    flat = cmae.boxes_from_heatmaps(torch.ones(1, 4, 4), (16, 16))[0].tolist()
    assert flat == [0, 0, 15 / 16, 15 / 16]


def test_saliency_equals_a_slow_version():
    vit, imgs = model_of().encoder, torch.randn(3, 3, 16, 16)
    for heat, img in zip(cmae.saliency(vit, imgs), imgs, strict=True):
        tokens = vit(img[None])[0, 1:]
        mean = sum(tokens) / 16
        distances = [math.dist(token.tolist(), mean.tolist()) for token in tokens]
        centre = sum(distances) / 16
        limit = centre + math.sqrt(sum((x - centre) ** 2 for x in distances) / 15)
        expected = torch.tensor([max(0, x - limit) for x in distances]).view(4, 4)
        torch.testing.assert_close(heat, expected, atol=1e-4, rtol=1e-3)
        assert (heat > 0).any()


def iou(a, b):
    """Intersection over union of boxes (B, 4), mean."""

    def area(x):
        return (x[:, 2:] - x[:, :2]).clamp(min=0).prod(dim=1)

    corners = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    overlap = area(torch.cat(corners, dim=1))
    return (overlap / (area(a) + area(b) - overlap)).mean().item()


def test_boxes_lie_where_the_object_is():
    """Shapes lie at random places of a large textured ground, and the encoder is untrained. The IoU
    of the boxes with the true ones is compared with that of the boxes of shuffled heatmaps, of
    distances without a threshold, and of whole images."""
    torch.manual_seed(0)
    side = 20
    ground = F.interpolate(common.draw_shapes(64, 16, 0)[0][:, :, :3, :3].float(), (64, 64))
    imgs = (ground + 20 * torch.randn(64, 3, 64, 64)).clamp(0, 255)
    corners = torch.randint(64 - side, (64, 2))
    for img, shape, (top, left) in zip(imgs, common.draw_shapes(64, side, 1)[0], corners.tolist(),
                                       strict=True):  # fmt: skip
        img[:, top : top + side, left : left + side] = shape
    true = torch.cat([corners, corners + side], dim=1) / 64
    vit = common.ViT(64, 8, embed_dim=48, depth=2, num_heads=3)
    with torch.no_grad():
        heat = cmae.saliency(vit, common.normalize(imgs))
        tokens = vit(common.normalize(imgs))[:, 1:]
    shuffled = heat.flatten(1).gather(1, torch.rand(64, 64).argsort(dim=1)).view_as(heat)
    distances = (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=2).view_as(heat)

    def iou_of(heatmaps):
        return iou(cmae.boxes_from_heatmaps(heatmaps, (64, 64)), true)

    iou_of_whole_images = (side / 64) ** 2
    assert iou_of(heat) > 0.5
    assert max(iou_of(shuffled), iou_of(distances), iou_of_whole_images) < 0.25


def corner_images(folder, size, count=8):
    """Writes black images with one white quarter; four images in a row have different ones."""
    folder.mkdir(parents=True)
    for i in range(count):
        img = Image.new("RGB", (size, size))
        y, x = divmod(i % 4, 2)
        img.paste((255, 255, 255), (x * size // 2, y * size // 2, (x + 1) * size // 2,
                                    (y + 1) * size // 2))  # fmt: skip
        img.save(folder / f"{i}.png")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_both_views_of_an_image_are_cropped_by_its_own_box(workers, tmp_path):
    corner_images(tmp_path / "data", 32)
    flags = ["--out", tmp_path, "--batch-size", "8", "--workers", workers]
    images = common.load_dataset(str(tmp_path / "data"), "pretrain", 16)
    crops = cmae.ContrastiveCrop(8, 16, min_crop=0.01, alpha=0.6, contrast=True)
    assert crops.scale == (0.01, 1.0)
    crops.scale = (0.01, 0.05)  # no crop reaches far beyond its box
    loader = common.TrainLoader(common.Run(settings("cmae", *flags)), images, crops)
    view1, view2, labels = next(loader.batches(0))
    assert view1.shape == view2.shape == (8, 3, 16, 16) and labels.tolist() == [-1] * 8
    bright = [(view > 0).float().mean().item() for view in (view1, view2)]
    assert max(bright) < 0.8  # without boxes, crops lie anywhere in the image
    for i in range(8):
        y, x = divmod(i % 4, 2)
        middle = torch.tensor([0.25 + 0.5 * y, 0.25 + 0.5 * x])
        crops.boxes[i] = torch.cat([middle - 0.05, middle + 0.05])
    crops.known.fill_(True)  # the workers of the next epoch see this
    view1, view2, _ = next(loader.batches(1))
    assert (view1 > 0).all() and (view2 > 0).all()


def test_views_are_random_resized_crops_until_there_are_boxes():
    """The first view is the one that MAE would get; the second is another crop, also flipped."""
    image = common.draw_shapes(1, 24, 0)[0][0]
    crops = cmae.ContrastiveCrop(1, 16, min_crop=0.3, alpha=0.1, contrast=True)
    single = cmae.ContrastiveCrop(1, 16, min_crop=0.3, alpha=0.1, contrast=False)
    crops.change_colours = torch.nn.Identity()
    for seed in range(5):
        torch.manual_seed(seed)
        first, _ = common.RandomCrop(16, 0.3)(image, 7, 0)
        second, _ = common.RandomCrop(16, 0.3)(image, 7, 0)
        torch.manual_seed(seed)
        view1, view2, label = crops(image, 7, 0)
        assert torch.equal(view1, first) and torch.equal(view2, second) and label == 7
        torch.manual_seed(seed)
        view1, label = single(image, 7, 0)
        assert torch.equal(view1, first) and label == 7
    assert view1.dtype == torch.uint8


def test_views_are_the_pixels_of_the_crop_flipped_or_not(monkeypatch):
    image = common.draw_shapes(1, 24, 0)[0][0, :, :20]

    def sample(height, width, box, scale, alpha):
        assert (height, width, box.tolist()) == (20, 24, [0, 0, 1, 1])
        assert (scale, alpha) == ((0.3, 1.0), 0.1)
        return 3, 5, 16, 16

    monkeypatch.setattr(cmae, "sample_contrastive_crop", sample)
    crops = cmae.ContrastiveCrop(1, 16, min_crop=0.3, alpha=0.1, contrast=False)
    crops.known.fill_(True)
    pixels = image[:, 3:19, 5:21]  # a view has the size of the crop, so nothing is resized
    torch.manual_seed(0)
    flipped = 0
    for _ in range(200):
        view, _ = crops(image, 0, 0)
        assert torch.equal(view, pixels) or torch.equal(view, pixels.flip(2))
        flipped += torch.equal(view, pixels.flip(2))
    assert 80 < flipped < 120


def test_colours_of_the_second_view_change_as_in_sdmae():
    """There is ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8, and then grey with probability
    0.2. On an image of one colour, crops and flips change nothing."""
    crops = cmae.ContrastiveCrop(1, 8, min_crop=0.5, alpha=0.1, contrast=True)
    sometimes, grey = crops.change_colours.transforms
    (jitter,) = sometimes.transforms
    assert isinstance(jitter, v2.ColorJitter) and isinstance(grey, v2.RandomGrayscale)
    assert (sometimes.p, grey.p) == (0.8, 0.2)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    assert [tuple(x) for x in ranges] == [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    torch.manual_seed(0)
    colour = torch.tensor([150, 100, 70], dtype=torch.uint8)
    image, found, count = colour[:, None, None].expand(3, 12, 12), [], 600
    for known in (False, True):
        crops.known.fill_(known)
        for _ in range(count // 2):
            view1, view2, _ = crops(image, 0, 0)
            assert torch.equal(view1, image[:, :8, :8]) and view2.dtype == torch.uint8
            found.append(view2[:, 0, 0])
    found = torch.stack(found)
    same = (found == colour).all(dim=1)
    greyed = (found == found[:, :1]).all(dim=1)
    assert same.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.05)
    assert greyed.float().mean().item() == pytest.approx(0.2, abs=0.05)
    rest = found[~same & ~greyed]
    assert len(rest.unique(dim=0)) > 0.95 * len(rest)  # every image has its own colours


def test_boxes_are_updated_kept_and_restored(tmp_path):
    """Boxes come from whole images, whatever their shape."""
    imgs, labels = common.draw_shapes(37, 24, 0)
    images = TensorDataset(imgs[:, :, :20], labels)
    run, model = common.Run(settings("cmae", "--out", tmp_path)), model_of()
    run.epoch = 2
    crops = cmae.ContrastiveCrop(37, 16, 0.2, 0.1, contrast=True)
    assert crops.boxes.unique(dim=0).tolist() == [[0, 0, 1, 1]] and not crops.known
    assert crops.areas.tolist() == [1, 1]
    crops.update(run, model.encoder, images)
    small = [v2.functional.resize(img, [16, 16], common.BICUBIC) for img, _ in images]
    with torch.no_grad():
        heat = cmae.saliency(model.encoder, common.normalize(torch.stack(small)))
    torch.testing.assert_close(crops.boxes, cmae.boxes_from_heatmaps(heat, (16, 16)))
    order = torch.randperm(16, generator=common.seeded("shuffle"))
    shuffled = torch.stack([x.flatten()[order].view(4, 4) for x in heat])
    for x, area in zip((heat, shuffled), crops.areas, strict=True):
        top, left, bottom, right = cmae.boxes_from_heatmaps(x, (16, 16)).T
        torch.testing.assert_close(area, ((bottom - top) * (right - left)).mean())
    assert crops.areas[0] != crops.areas[1]
    assert crops.known and model.encoder.training
    assert (tmp_path / "boxes_0002.png").exists()
    other = cmae.ContrastiveCrop(37, 16, 0.2, 0.1, contrast=True)
    other.load_state_dict({name: x.clone() for name, x in crops.state_dict().items()})
    assert torch.equal(other.boxes, crops.boxes) and other.known


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_info_nce_equals_loops(tau):
    torch.manual_seed(0)
    q, k = torch.randn(4, 6), torch.randn(7, 6)
    total = 0.0
    for i in range(4):
        cosine = [F.cosine_similarity(q[i], k[j], dim=0).item() for j in range(7)]
        right = math.exp(cosine[i] / tau)
        total -= math.log(right / sum(math.exp(c / tau) for c in cosine))
    expected = pytest.approx(2 * tau * total / 4, rel=1e-5)
    assert cmae.info_nce(q, k, tau).item() == expected
    assert cmae.info_nce(5 * q, 0.1 * k, tau).item() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert cmae.info_nce(q, k, tau).item() == expected


def test_position_loss_equals_loops():
    torch.manual_seed(0)
    logits, positions = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    ce = mse = 0.0
    for b in range(2):
        for n in range(3):
            row, right = logits[b, n].tolist(), int(positions[b, n])
            ce -= math.log(math.exp(row[right]) / sum(map(math.exp, row))) / 6
            mse += sum((x - (j == right)) ** 2 for j, x in enumerate(row)) / 30
    assert cmae.position_loss(logits, positions, "ce").item() == pytest.approx(ce)
    assert cmae.position_loss(logits, positions, "mse").item() == pytest.approx(mse)


def test_momentum_rises_from_its_start_to_one():
    assert cmae.momentum_at(0, 100, 0.99) == pytest.approx(0.99)
    assert cmae.momentum_at(50, 100, 0.99) == pytest.approx(0.995)
    assert cmae.momentum_at(25, 100, 0.9) == pytest.approx(1 - 0.05 * (1 + math.sqrt(0.5)))
    assert cmae.momentum_at(100, 100, 0.99) == pytest.approx(1)


def test_the_heads_are_those_of_moco_v3():
    names = [type(x).__name__ for x in cmae.mlp(8, 16, 4, depth=3)]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    head = cmae.mlp(8, 16, 4, depth=2)
    assert [type(x).__name__ for x in head] == names[3:]
    assert head[0].bias is None and head[3].bias is None
    assert head[1].affine and not head[4].affine
    assert (head[0].out_features, head[3].out_features) == (16, 4)


# ------------------------------------------------------------------------------ the model


def test_the_losses_are_those_of_both_views(monkeypatch):
    """All losses are computed once more from the parts of the model, one view at a time."""
    model = model_of(mask_ratio=0.25)
    view1, view2 = torch.randn(2, 4, 3, 16, 16)
    visible, mask = common.random_masking(4, 16, 0.25)
    monkeypatch.setattr(common, "random_masking", lambda *args: (visible, mask))
    loss, stats = model(view1, view2)

    vit, predicted = model.encoder, visible[:, :6]
    positions = vit.pos_embed[:, 1:].repeat(4, 1, 1)
    for b in range(4):
        positions[b, predicted[b]] = 0
    bare = F.conv2d(view1, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)
    x = common.take_tokens(bare.flatten(2).transpose(1, 2) + positions, visible)
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(4, -1, -1), x], dim=1)
    for block in vit.blocks:
        x = block(x)
    tokens1, tokens2 = vit.norm(x), vit(view2, visible)
    recon = sum(
        common.masked_mse(model.decoder(x, visible), common.patchify(view, 4), mask)
        for x, view in ((tokens1, view1), (tokens2, view2))
    )
    torch.testing.assert_close(stats["recon"], recon)
    q1, q2 = (model.predictor(model.projector(x[:, 0])) for x in (tokens1, tokens2))
    k1, k2 = (model.momentum_projector(model.momentum_encoder(view, visible)[:, 0])
              for view in (view1, view2))  # fmt: skip
    contrastive = cmae.info_nce(q1, k2, 0.2) + cmae.info_nce(q2, k1, 0.2)
    torch.testing.assert_close(stats["contrastive"], contrastive, atol=1e-4, rtol=1e-3)
    accuracy = (cmae.contrastive_accuracy(q1, k2) + cmae.contrastive_accuracy(q2, k1)) / 2
    assert stats["contrastive_acc"] == accuracy
    logits = model.position_head(tokens1[:, 1:7])
    torch.testing.assert_close(stats["position"], cmae.position_loss(logits, predicted, "ce"))
    assert stats["position_acc"] == (logits.argmax(2) == predicted).float().mean()
    torch.testing.assert_close(loss, recon + 0.1 * contrastive + 0.1 * stats["position"],
                               atol=1e-4, rtol=1e-3)  # fmt: skip
    assert loss.requires_grad and not any(x.requires_grad for x in stats.values())


def test_settings_reach_the_model_and_the_crops(tmp_path, shapes_folder, monkeypatch):
    made, alphas = [], []
    original = cmae.CMAE.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    def sample(height, width, box, scale, alpha):
        assert box.shape == (4,)
        alphas.append((scale, alpha))
        return 0, 0, height, width

    monkeypatch.setattr(cmae.CMAE, "__init__", init)
    monkeypatch.setattr(cmae, "sample_contrastive_crop", sample)
    flags = ["--epochs", "2", "--tau", "0.3", "--position-loss", "mse", "--position-input", "given",
             "--contrastive-weight", "0.2", "--mask-ratio", "0.5", "--crop-alpha", "0.4",
             "--min-crop", "0.3"]  # fmt: skip
    train("cmae", tmp_path, shapes_folder, *flags)
    (model,) = made
    assert (model.tau, model.position_kind, model.withhold, model.mask_ratio) == (
        0.3, "mse", False, 0.5)  # fmt: skip
    assert (model.contrastive_weight, model.position_weight, model.num_predicted) == (0.2, 1.0, 8)
    assert (model.projector[0].out_features, model.predictor[3].out_features) == (32, 16)
    assert alphas == [((0.3, 1.0), 0.4)] * 128  # two views of 64 images, in the second epoch


def test_contrastive_accuracy_is_a_count():
    q, k = torch.randn(50, 4), torch.randn(50, 4)
    hits = 0
    for i in range(50):
        cosine = [F.cosine_similarity(q[i], key, dim=0) for key in k]
        hits += max(range(50), key=lambda j: cosine[j]) == i
    assert cmae.contrastive_accuracy(q, k).item() == pytest.approx(hits / 50)
    assert cmae.contrastive_accuracy(q, 3 * q) == 1
    close = torch.ones(1, 512) + 0.01 * torch.randn(50, 512)  # cosines that bf16 cannot tell apart
    with torch.autocast("cpu", torch.bfloat16):
        assert cmae.contrastive_accuracy(close, 3 * close) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_all_that_is_trained_and_the_momentum_branch_moves(autocast):
    model = model_of()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.momentum_step(0.9)
        loss, _ = model(*torch.randn(2, 6, 3, 16, 16))
    loss.backward()
    frozen = ("momentum_", "encoder.patch_embed", "encoder.pos_embed", "decoder.pos_embed")
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(frozen), name
        assert p.grad is None or p.grad.abs().max() > 0, name
        if name.startswith("momentum_"):
            fast = before[name.removeprefix("momentum_")]
            torch.testing.assert_close(p, before[name] + 0.1 * (fast - before[name]))
        else:
            assert torch.equal(p, before[name])
    again = {k: v.clone() for k, v in model.named_parameters()}
    model(*torch.randn(2, 6, 3, 16, 16))
    assert all(torch.equal(again[k], v) for k, v in model.named_parameters())


def test_a_task_of_weight_0_leaves_nothing_behind():
    names = set(model_of(contrastive_weight=0, position_weight=0).state_dict())
    assert all(name.startswith(("encoder.", "decoder.")) for name in names)
    model = model_of(contrastive_weight=0)
    loss, stats = model(torch.randn(4, 3, 16, 16))
    assert stats.keys() == {"recon", "position", "position_acc"}
    assert all(p.requires_grad for p in model.encoder.patch_embed.parameters())
    loss, stats = model_of(position_weight=0)(*torch.randn(2, 4, 3, 16, 16))
    assert stats.keys() == {"recon", "contrastive", "contrastive_acc"}
    torch.testing.assert_close(loss, stats["recon"] + 0.1 * stats["contrastive"])
    for weight, given in ((0.1, 1), (0, 2)):
        with pytest.raises(common.UserError, match="two views if it has a contrastive loss"):
            model_of(contrastive_weight=weight)(*torch.randn(given, 4, 3, 16, 16))
    weights = [model_of(position_kind=kind).position_weight for kind in ("ce", "mse")]
    assert weights == [0.1, 1.0]


def position_accuracy(steps, imgs_of, **options) -> float:
    """Trains a model; the share of positions that it then predicts correctly for fresh images."""
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=48, depth=2, num_heads=3)
    model = cmae.CMAE(vit, common.Decoder(vit, 16, 1, 2), 0.5, contrastive_weight=0,
                      position_weight=1.0, **options)  # fmt: skip
    optimizer = common.adamw(model, 0.0, lr=3e-3)
    for _ in range(steps):
        model(imgs_of(64))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(imgs_of(2000))[1]["position_acc"].item()


def tinted(count: int) -> torch.Tensor:
    """Images in which the patch at each place has its own pattern, plus noise."""
    patches = torch.eye(16)[None] @ torch.randn(16, 48, generator=common.seeded("tint"))
    patches = patches + 0.3 * torch.randn(count, 16, 48)
    return common.unpatchify(patches, 4, (4, 4))


def shuffled(count: int) -> torch.Tensor:
    patches = common.patchify(tinted(count), 4)
    order = torch.rand(count, 16).argsort(dim=1)
    return common.unpatchify(common.take_tokens(patches, order), 4, (4, 4))


def test_positions_are_found_by_content_alone():
    """Withheld positions of shuffled patches are predicted at chance, which is 1 in 12, because 4
    of the 16 positions are given. If the content depends on the place, withheld positions are
    found. Given positions are found whatever the content."""
    assert position_accuracy(60, shuffled) < 0.12
    assert position_accuracy(60, tinted) > 0.9
    assert position_accuracy(60, shuffled, position_input="given") > 0.9


def test_a_withheld_position_has_no_influence(monkeypatch):
    """If the position embedding changes, all patch tokens that enter the first block change except
    tokens 1..4 of view 1, whose positions are withheld."""
    model, imgs, entered = model_of(), torch.randn(2, 2, 3, 16, 16), []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    visible, mask = common.random_masking(2, 16, 0.5)
    monkeypatch.setattr(common, "random_masking", lambda *args: (visible, mask))
    model(*imgs)
    with torch.no_grad():
        model.encoder.pos_embed[0, 1:] += torch.randn(16, 24)
    model(*imgs)
    changed = ((entered[1] - entered[0]).abs().amax(dim=2) > 0).tolist()
    assert changed == [[False] * 5 + [True] * 4] * 2 + [[False] + [True] * 8] * 2


# ------------------------------------------------------------------------------ several processes


def compute_part(folder) -> None:
    """Computes this process's part of views.pt, and writes stats, gradients and boxes to a file."""
    run, model = common.Run(settings("cmae", "--out", folder)), model_of()
    run.epoch = 2
    views, (visible, mask) = torch.load(f"{folder}/views.pt")
    part = slice(run.rank * 8 // run.world, (run.rank + 1) * 8 // run.world)
    ddp = run.wrap(model)
    model.momentum_step(0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "random_masking", lambda *args: (visible[part], mask[part]))
        loss, stats = ddp(views[0][part], views[1][part])
    loss.backward()
    crops = cmae.ContrastiveCrop(37, 16, 0.2, 0.1, contrast=True)
    crops.update(run, model.encoder, TensorDataset(*common.draw_shapes(37, 16, 0)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result = stats, gradients, dict(model.named_buffers()), crops.state_dict()
    torch.save(result, f"{folder}/{run.world}-{run.rank}.pt")


def test_two_processes_compute_what_one_does_with_the_whole_batch(tmp_path):
    """This is true of the contrastive loss, BatchNorm statistics, all gradients and 37 boxes."""
    views = torch.randn(2, 8, 3, 16, 16)
    torch.save((views, common.random_masking(8, 16, 0.5)), tmp_path / "views.pt")
    compute_part(tmp_path)
    assert in_processes(2, compute_part, tmp_path) == [0, 0]
    expected_stats, expected_gradients, expected_buffers, expected_crops = torch.load(
        tmp_path / "1-0.pt"
    )
    reconstruction_losses = []
    for rank in range(2):
        stats, gradients, buffers, crops = torch.load(tmp_path / f"2-{rank}.pt")
        expected = pytest.approx(expected_stats["contrastive"].item(), rel=1e-5)
        assert stats["contrastive"].item() == expected
        assert stats["contrastive_acc"] == expected_stats["contrastive_acc"]
        assert gradients.keys() == expected_gradients.keys()
        for name, x in gradients.items():
            torch.testing.assert_close(x, expected_gradients[name], atol=1e-5, rtol=1e-3, msg=name)
        for name, x in buffers.items():
            torch.testing.assert_close(x, expected_buffers[name], atol=1e-6, rtol=1e-4, msg=name)
        assert all(torch.equal(x, expected_crops[name]) for name, x in crops.items())
        assert crops["boxes"].min() < 0.5 < crops["boxes"].max() and crops["areas"].max() < 1
        reconstruction_losses.append(stats["recon"])
    assert reconstruction_losses[0] != reconstruction_losses[1]  # each process has its own images


# ------------------------------------------------------------------------------ runs


def test_with_all_parts_off_it_is_mae_bit_for_bit(tmp_path, shapes_folder):
    flags = ["--epochs", "2", "--lr", "1e-3", "--min-crop", "0.4", "--warmup-epochs", "0.3"]
    train("cmae", tmp_path / "off", shapes_folder, *flags, *OFF)
    train("mae", tmp_path / "mae", shapes_folder, *flags, "--depth", "2")
    a, b = weights(tmp_path / "off"), weights(tmp_path / "mae")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run(whole_run):
    folder = whole_run("cmae")
    names = {path.name for path in folder.iterdir()}
    assert {f"boxes_{n:04d}.png" for n in (2, 3, 4, 5)} == {n for n in names if "boxes" in n}
    lines = metrics(folder)
    terms = {"recon", "contrastive", "contrastive_acc", "position", "position_acc", "lr"}
    for line in lines:
        assert terms <= line.keys()
        expected = line["recon"] + 0.1 * line["contrastive"] + 0.1 * line["position"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    for name in ("box_area", "box_area_shuffled"):
        assert lines[0][name] == 1 and all(0 < x[name] < 1 for x in lines[1:])
    with Image.open(folder / "boxes_0005.png") as picture:
        assert picture.width > 8 * 90 and picture.height > 2 * 90


def test_the_momentum_encoder_starts_as_the_encoder_that_is_loaded(
    tmp_path, shapes_folder, whole_run
):
    file = whole_run("cmae") / "encoder.pt"
    train("cmae", tmp_path, shapes_folder, "--steps", "1", "--momentum", "1", "--init-from", file)
    started, name = weights(tmp_path), "blocks.0.attn.qkv.weight"
    loaded = torch.load(file, weights_only=True)["model"]
    assert torch.equal(started[f"momentum_encoder.{name}"], loaded[name])


def test_views_come_in_order_and_the_momentum_encoder_moves_once_a_step(
    tmp_path, shapes_folder, monkeypatch
):
    """The momentum encoder moves before the step's micro-batches."""
    forward, momentum_step, calls = cmae.CMAE.forward, cmae.CMAE.momentum_step, []
    black, white = (common.normalize(torch.full((1, 3, 1, 1), x)) for x in (0, 255))

    def marked(crops, image, label, index):
        view1 = torch.zeros(3, 16, 16, dtype=torch.uint8)
        return view1, 255 - view1, label

    def spied_forward(model, view1, view2):
        assert (view1 == black).all() and (view2 == white).all()
        calls.append("forward")
        return forward(model, view1, view2)

    def spied_step(model, momentum):
        calls.append(momentum)
        momentum_step(model, momentum)

    monkeypatch.setattr(cmae.CMAE, "forward", spied_forward)
    monkeypatch.setattr(cmae.CMAE, "momentum_step", spied_step)
    monkeypatch.setattr(cmae.ContrastiveCrop, "forward", marked)
    flags = ["--epochs", "2", "--accumulate", "2", "--momentum", "0.9"]
    train("cmae", tmp_path, shapes_folder, *flags)
    expected = []
    for step in range(8):
        expected += [cmae.momentum_at(step, 8, 0.9), "forward", "forward"]
    assert calls == expected


def test_boxes_are_renewed_every_fifth_of_the_epochs_and_not_in_mid_epoch(
    tmp_path, shapes_folder, monkeypatch
):
    updates, original = [], cmae.ContrastiveCrop.update

    def update(crops, run, *args):
        updates.append(run.step)
        return original(crops, run, *args)

    monkeypatch.setattr(cmae.ContrastiveCrop, "update", update)
    flags = ["--epochs", "10", "--batch-size", "32", "--steps"]
    for steps in ("5", "9", "20"):
        train("cmae", tmp_path, shapes_folder, *flags, steps)
    assert updates == [4, 8, 12, 16]  # of 20 steps, two an epoch
    pictures = sorted(path.name for path in tmp_path.glob("boxes_*.png"))
    assert pictures == [f"boxes_{epoch:04d}.png" for epoch in (3, 5, 7, 9)]


def test_the_tiny_imagenet_preset_is_the_published_recipe():
    cfg = common.parse(cmae.Config, cmae.PRESETS, ["--preset", "tiny-imagenet"])
    assert (cfg.size, cfg.img_size, cfg.patch_size, cfg.mask_ratio) == ("base", 224, 16, 0.75)
    assert (cfg.decoder_dim, cfg.decoder_depth, cfg.min_crop, cfg.crop_alpha) == (128, 1, 0.2, 0.1)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (300, 40, 64)
    assert (cfg.base_lr, cfg.lr, cfg.weight_decay, cfg.clip_grad) == (1e-3, None, 0.05, None)
    assert (cfg.contrastive_weight, cfg.tau, cfg.momentum) == (0.1, 0.2, 0.99)
    assert (cfg.head_hidden, cfg.head_dim) == (4096, 256)
    assert (cfg.crop, cfg.position_loss, cfg.position_input) == ("contrastive", "ce", "withheld")
