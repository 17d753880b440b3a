"""Segmentation and other image sizes are compared with loops, timm and scikit-learn; then the
script is run as a user runs it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_state, error_line, error_of, in_processes, metrics
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

import common
import eval_linear
from eval_linear import MaskCrop, confusion, miou

# ------------------------------------------------------------------------------ the score


def labelled_pair(classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets (3, 8, 9). The last class is in neither, the first class is only
    predicted, and a third of the pixels have no label."""
    torch.manual_seed(0)
    pred = torch.randint(0, classes - 1, (3, 8, 9))
    target = torch.randint(1, classes - 1, (3, 8, 9))
    target[torch.rand(3, 8, 9) < 0.33] = 255
    return pred, target


def test_confusion_and_miou_equal_loops():
    pred, target = labelled_pair()
    expected = [[0] * 6 for _ in range(6)]
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != 255:
            expected[t][p] += 1
    got = confusion(pred, target, 6)
    assert got.dtype == torch.int64 and got.tolist() == expected
    assert torch.equal(got, confusion(pred, target.to(torch.uint8), 6))
    ious = []
    for k in range(6):
        union = sum(expected[k]) + sum(row[k] for row in expected) - expected[k][k]
        if union:
            ious.append(expected[k][k] / union)
    assert len(ious) == 5 and miou(got) == pytest.approx(100 * sum(ious) / 5)
    other = target.masked_fill(target == 255, 77)
    assert torch.equal(confusion(pred, other, 6, ignore=77), got)


def test_miou_equals_scikit_learns_jaccard_score():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    pred, target = labelled_pair()
    known = target != 255
    theirs = sklearn_metrics.jaccard_score(target[known], pred[known], average="macro")
    assert miou(confusion(pred, target, 6)) == pytest.approx(100 * theirs)


# ------------------------------------------------------------------------------ masks


def test_masks_are_the_cover_of_the_drawing(monkeypatch):
    """The ground is painted black and the shapes white, so the image shows which pixels a shape
    covers."""
    calls = []

    def paint(x, y, hue, value, t):  # the ground is painted first, then the shape
        calls.append(None)
        is_shape = len(calls) % 2 == 0
        return torch.full((len(hue), 3, *x.shape), 1.0 if is_shape else 0.0)

    images, labels = common.draw_shapes(200, 24, 3)
    same, same_labels, masks = common.draw_shapes(200, 24, 3, masks=True)
    assert torch.equal(images, same) and torch.equal(labels, same_labels)
    assert masks.shape == (200, 24, 24) and masks.dtype == torch.uint8
    monkeypatch.setattr(common, "_paint", paint)
    cover, _ = common.draw_shapes(200, 24, 3)
    expected = (cover[:, 0] >= 128) * (1 + labels[:, None, None])
    assert torch.equal(masks.long(), expected) and len(masks.unique()) == 11
    assert 0.1 < (masks > 0).float().mean() < 0.6


def own_pair(seed: int, height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red channel is 255 where its mask is 1, and 0 elsewhere."""
    torch.manual_seed(seed)
    mask = F.interpolate(torch.rand(1, 1, 4, 4).round(), (height, width))[0, 0].to(torch.uint8)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    image[0] = 255 * mask
    return image, mask


def test_image_and_mask_are_cut_and_flipped_together():
    """Away from edges, the cropped image and its mask agree. At edges they may differ, because the
    image is resized bicubically and the mask is not."""
    images = TensorDataset(torch.empty(1))
    images.classes = ["no", "yes"]
    crop = v2.RandomResizedCrop(64, scale=(0.2, 1.0), interpolation=common.BICUBIC)
    change, ones = MaskCrop(images, crop, v2.RandomHorizontalFlip()), []
    for seed in range(50):
        image, mask = own_pair(seed)
        for given in (mask, mask[None], Image.fromarray(mask.numpy())):
            torch.manual_seed(seed)
            new_image, new_mask = change(image, given, 0)
        assert new_image.shape == (3, 64, 64) and new_image.dtype == torch.uint8
        assert new_mask.shape == (64, 64) and new_mask.dtype == torch.int64
        plain = new_mask.float()[None]
        away_from_edges = F.max_pool2d(plain, 5, 1, 2) == -F.max_pool2d(-plain, 5, 1, 2)
        wrong = (new_image[0] > 127) != (new_mask == 1)
        assert not (wrong & away_from_edges[0]).any() and wrong.float().mean() < 0.1
        ones.append(new_mask.float().mean())
    assert torch.stack(ones).std() > 0.1  # the crops differ


# ------------------------------------------------------------------------------ other image sizes


def encoder_of(path, size: int = 16, **config):
    """Writes an untrained encoder to encoder.pt, whose path is returned."""
    torch.manual_seed(0)
    vit = common.ViT(size, 4, embed_dim=24, depth=2, num_heads=3)
    torch.nn.init.normal_(vit.pos_embed)  # without the symmetries of sines and cosines
    common.save_encoder(path / "encoder.pt", vit, config)
    return path / "encoder.pt"


def test_positions_stay_at_the_same_size_and_the_class_tokens_position_always(tmp_path):
    file = encoder_of(tmp_path)
    plain, same, large = (common.load_encoder(file, size) for size in (None, 16, 28))
    for a, b in zip(plain.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert large.grid == (7, 7) and large.num_patches == 49 and large.settings["img_size"] == 28
    assert torch.equal(large.pos_embed[:, 0], plain.pos_embed[:, 0])
    assert large(torch.randn(2, 3, 28, 28)).shape == (2, 50, 24)
    common.save_encoder(tmp_path / "large.pt", large, {})  # the file stores the new size
    again = common.load_encoder(tmp_path / "large.pt")
    assert again.grid == (7, 7) and torch.equal(again.pos_embed, large.pos_embed)


@pytest.mark.parametrize("size", [8, 12, 28, 64])
def test_positions_of_another_size_equal_timms(size, tmp_path):
    layers = pytest.importorskip("timm.layers")
    file = encoder_of(tmp_path)
    plain, ours = common.load_encoder(file).pos_embed, common.load_encoder(file, size).pos_embed
    theirs = layers.resample_abs_pos_embed(plain, [size // 4, size // 4], num_prefix_tokens=1)
    torch.testing.assert_close(ours.data, theirs.data, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ the script


class Squares(Dataset):
    """A user's data set: a bright square on a dark ground, which every working probe finds. The
    first row of pixels has no label."""

    def __init__(self, count: int, mask_of=lambda mask: mask, classes=("ground", "square")):
        self.count, self.mask_of, self.classes = count, mask_of, list(classes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        rng = np.random.default_rng(index)
        mask, (top, left) = np.zeros((20, 24), np.uint8), rng.integers(0, 12, 2)
        mask[top : top + 8, left : left + 8] = 1
        pixels = 60 + 120 * mask[:, :, None] + rng.integers(-40, 40, (20, 24, 3))
        mask[0] = 255
        return Image.fromarray(pixels.astype(np.uint8)), self.mask_of(torch.from_numpy(mask))


def probe(file, *flags, data=None) -> None:
    arguments = [str(file), "--mode", "segment", "--workers", "0", "--device", "cpu", *flags]
    eval_linear.main(common.parse(eval_linear.Config, {}, arguments), data)


def segment(file, *flags, data=None, key: str = "segment") -> dict:
    """Runs the probe; returns the entry in eval.json."""
    probe(file, *flags, data=data)
    return json.loads((file.parent / "eval.json").read_text())[key]


PAIR = Squares(64), Squares(20)


def test_segmentation_finds_a_bright_square(tmp_path, capsys):
    """Checks the score, the log, the picture and the baseline. An encoder whose tokens are all the
    same does not find the square."""
    file = encoder_of(tmp_path)
    entry = segment(file, "--batch-size", "16", "--baseline", data=PAIR)
    assert entry["miou"] > 75 and entry["pixel_accuracy"] > 90
    *_, frequent, _, last = capsys.readouterr().out.strip().splitlines()
    assert last == (f"segment mIoU {entry['miou']:.1f} (untrained {entry['untrained']['miou']:.1f})"
                    f", pixel accuracy {entry['pixel_accuracy']:.1f}")  # fmt: skip
    assert f"pixel accuracy {entry['most_frequent_class']:.1f}" in frequent
    resized = v2.functional.resize_mask(torch.stack([PAIR[1][i][1] for i in range(20)]), [16, 16])
    ground = (resized == 0).sum() / (resized != 255).sum()
    assert entry["most_frequent_class"] == pytest.approx(100 * ground.item(), abs=0.01)
    picture = np.asarray(Image.open(tmp_path / "segment.png"))
    assert picture.shape == (3 * (16 + 104), 8 * 100 + 4, 3)
    predictions = picture[-104:]  # the bottom row
    assert {tuple(c) for c in predictions.reshape(-1, 3)} >= {(0, 0, 0), (255, 255, 255)}

    content = torch.load(file, weights_only=True)
    content["model"]["norm.weight"].zero_()  # now all tokens are the same
    torch.save(content, file)
    blind = segment(file, "--batch-size", "16", data=PAIR)
    assert blind["miou"] < 60 and blind["pixel_accuracy"] < entry["pixel_accuracy"]


def test_the_score_is_that_of_the_final_head_pixel_by_pixel(tmp_path):
    """A slow version of the head, with the weights of the checkpoint, has the same score."""
    file = encoder_of(tmp_path)
    entry = segment(file, "--batch-size", "16", "--epochs", "2", data=PAIR)
    (folder,) = tmp_path.glob("eval-segment-*")
    head = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    vit, counts = common.load_encoder(file).eval(), torch.zeros(2, 2, dtype=torch.long)
    for image, mask in (PAIR[1][i] for i in range(20)):
        image = v2.functional.pil_to_tensor(image)
        image = v2.functional.resize(image, [16, 16], v2.InterpolationMode.BICUBIC)
        target = v2.functional.resize_mask(mask, [16, 16])
        with torch.no_grad():
            tokens = vit(common.normalize(image[None]))[0, 1:]
        tokens = (tokens - head["0.running_mean"]) / (head["0.running_var"] + 1e-6).sqrt()
        logits = tokens @ head["1.weight"][:, :, 0, 0].T + head["1.bias"]  # (16, classes)
        logits = logits.T.reshape(1, 2, 4, 4)
        pred = F.interpolate(logits, (16, 16), mode="bilinear")[0].argmax(dim=0)
        for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
            if t != 255:
                counts[t, p] += 1
    accuracy = (counts.trace() / counts.sum()).item()
    assert entry["miou"] == pytest.approx(miou(counts), abs=0.01)
    assert entry["pixel_accuracy"] == pytest.approx(100 * accuracy, abs=0.01)


def test_the_frozen_encoder_runs_once_an_image_and_step(tmp_path, monkeypatch):
    seen, forward = [], common.ViT.forward

    def spied(vit, imgs, visible=None):
        tokens = forward(vit, imgs, visible)
        assert not tokens.requires_grad and not vit.training
        seen.append(len(imgs))
        return tokens

    monkeypatch.setattr(common.ViT, "forward", spied)
    segment(encoder_of(tmp_path), "--batch-size", "16", "--epochs", "3", "--val-every", "0",
            data=PAIR)  # fmt: skip
    training, validation, picture = [16] * 12, [16, 4], [8]
    assert seen == training + validation + picture


def test_segmentation_is_resumed_bit_for_bit(tmp_path):
    file, folders = encoder_of(tmp_path), []
    for name, pieces in (("whole", [[]]), ("parts", [["--steps", "5"], []])):
        (tmp_path / name).mkdir()
        shutil.copy(file, tmp_path / name)
        for flags in pieces:
            flags = ["--batch-size", "16", "--epochs", "3", "--accumulate", "2", *flags]
            segment(tmp_path / name / "encoder.pt", *flags, data=PAIR)
        folders += (tmp_path / name).glob("eval-segment-*")
    assert_same_state(*folders)


def test_two_processes_count_every_pixel_once(tmp_path):
    """The number of images is odd, so the two processes get different numbers of them."""
    file, folder = encoder_of(tmp_path), tmp_path / "two"
    folder.mkdir()
    probe_odd(file)
    assert in_processes(2, probe_odd, Path(shutil.copy(file, folder))) == [0, 0]
    one, two = (json.loads((x / "eval.json").read_text())["segment"] for x in (tmp_path, folder))
    assert two["most_frequent_class"] == one["most_frequent_class"]
    assert abs(two["miou"] - one["miou"]) < 5  # BatchNorm gets 8 images instead of 16


def probe_odd(file) -> None:
    probe(file, "--batch-size", "16", "--epochs", "2", data=(Squares(64), Squares(19)))


def test_segmentation_has_its_recipe(tmp_path):
    """AdamW's learning rate is 0.03, whatever the batch size. --base-lr overrides it."""
    file = encoder_of(tmp_path)
    got = segment(file, data=PAIR)["settings"]
    recipe = dict(batch_size=64, epochs=10, lr=0.03, weight_decay=0.0, min_crop=0.5)
    assert recipe.items() <= got.items()
    (folder,) = tmp_path.glob("eval-segment-*")
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines) == pytest.approx(0.03, rel=0.1)
    small = segment(file, "--restart", "--base-lr", "0.1", data=(Squares(40), Squares(4)))
    assert small["settings"]["batch_size"] == 40 and small["settings"]["lr"] is None


@pytest.mark.parametrize("mode, key", [
    (["knn"], "knn-24px"), (["linear"], "linear-24px"), (["segment"], "segment-24px"),
    (["finetune", "--epochs", "1", "--batch-size", "16"], "finetune-24px"),
    (["linear", "--no-cache-features", "--epochs", "1", "--batch-size", "16"],
     "linear-protocol-24px"),
])  # fmt: skip
def test_every_mode_evaluates_at_another_size(mode, key, tmp_path, shapes_folder):
    file = encoder_of(tmp_path, data=str(shapes_folder))
    data = PAIR if mode == ["segment"] else None
    arguments = [str(file), "--mode", *mode, "--img-size", "24", "--workers", "0", "--baseline"]
    cfg = common.parse(eval_linear.Config, {}, [*arguments, "--device", "cpu"])
    eval_linear.main(cfg, data)
    entries = json.loads((tmp_path / "eval.json").read_text())
    assert list(entries) == [key] and "untrained" in entries[key]


def test_an_evaluation_at_another_size_resizes_encoder_and_images(tmp_path, shapes_folder):
    """The score equals that of features which are computed here at this size."""
    file = encoder_of(tmp_path, data=str(shapes_folder))
    arguments = [str(file), "--mode", "knn", "--img-size", "24", "--workers", "0"]
    cfg = common.parse(eval_linear.Config, {}, [*arguments, "--device", "cpu"])
    eval_linear.main(cfg)
    vit, crop, sets = common.load_encoder(file, 24).eval(), common.CentreCrop(24), []
    for split in ("train", "val"):
        images = common.load_dataset(str(shapes_folder), split, 24)
        views = common.Views(images, crop)
        imgs, labels = zip(*(views[i] for i in range(len(views))), strict=True)
        with torch.no_grad():
            features = vit(common.normalize(torch.stack(imgs)))[:, 0]
        sets.append((features, torch.tensor(labels)))
    expected = eval_linear.evaluate_knn(*sets, len(images.classes))
    entry = json.loads((tmp_path / "eval.json").read_text())["knn-24px"]
    assert expected.items() <= entry.items()


# ------------------------------------------------------------------------------ data sets


def test_shapes_are_limited_and_say_so(tmp_path, capsys):
    segment(encoder_of(tmp_path, size=8, data="shapes"), "--steps", "1")
    out = capsys.readouterr().out
    assert "shapes: 4000 images" in out and "first 4000 training images" in out
    images = eval_linear.load_masked("shapes", "train", 8, "data")
    drawn = common.draw_shapes(20000, 8, 0, masks=True)
    assert torch.equal(images[3999][0], drawn[0][3999]) and len(images) == 4000
    assert torch.equal(images[3999][1], drawn[2][3999]) and len(images.classes) == 11


def write_pair(image, mask, seed: int, shift: int = 0) -> None:
    """Writes a JPEG with a bright square, and its mask as a palette PNG. `shift` is added to all
    class numbers; with shift 1, 255 becomes 0."""
    photo, numbers = Squares(40)[seed]
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(image, quality=95)
    picture = Image.frombytes("P", photo.size, (numbers + shift).numpy().tobytes())
    picture.putpalette([i * 7 % 256 for i in range(768)])
    picture.save(mask)


@pytest.fixture()
def voc(tmp_path):
    """32 training and 8 validation images in VOC2012's layout, with 2 of its 21 classes."""
    root = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, numbers in (("train", range(32)), ("val", range(32, 40))):
        (lists / f"{split}.txt").write_text("".join(f"2007_{i:06d}\n" for i in numbers))
        for i in numbers:
            write_pair(root / "JPEGImages" / f"2007_{i:06d}.jpg",
                       root / "SegmentationClass" / f"2007_{i:06d}.png", i)  # fmt: skip
    return tmp_path / "data"


@pytest.fixture()
def ade(tmp_path):
    """32 training and 8 validation images in ADE20K's layout, with 2 of its 150 classes."""
    root = tmp_path / "ade"
    for split, numbers in (("training", range(32)), ("validation", range(32, 40))):
        for i in numbers:
            write_pair(root / "images" / split / f"ADE_{i}.jpg",
                       root / "annotations" / split / f"ADE_{i}.png", i, shift=1)  # fmt: skip
    return root


def test_voc2012_and_ade20k_are_read_from_their_published_layouts(voc, ade, tmp_path):
    """Both hold the same images and masks, and a probe of either ends with a score."""
    file = encoder_of(tmp_path)
    for images, classes in (
        (eval_linear.load_masked("voc2012", "val", 16, str(voc)), 21),
        (eval_linear.load_masked(str(ade), "val", 16, "data"), 150),
    ):
        assert len(images) == 8 and len(images.classes) == classes
        change = MaskCrop(images, v2.Identity())
        for i in range(8):
            image, mask = images[i]
            _, mask = change(common.rgb_tensor(image), mask, i)
            assert torch.equal(mask, Squares(40)[32 + i][1].long())
    for name in ("voc2012", str(ade)):
        entry = segment(file, "--batch-size", "4", "--epochs", "5", "--data", name,
                        "--data-dir", str(voc), "--restart")  # fmt: skip
        assert 20 < entry["miou"] < 100 and entry["pixel_accuracy"] > 75, name


def test_numbers_without_a_label_in_ade20k(ade):
    """0 and 255 mean "no label", and k is class k - 1."""
    numbers = np.array([[0, 1], [150, 255]], np.uint8)
    change_mask(ade, lambda _: Image.fromarray(numbers))
    images = eval_linear.load_masked(str(ade), "train", 16, "data")
    index = [path.stem for path in images.masks].index("ADE_5")
    assert images[index][1].tolist() == [[[255, 0], [149, 255]]]


def test_a_batch_without_labels_trains_nothing_and_a_validation_without_labels_fails(
    tmp_path, capsys
):
    file, unlabelled = encoder_of(tmp_path), lambda mask: torch.full_like(mask, 255)
    entry = segment(file, "--steps", "2", data=(Squares(16, unlabelled), Squares(4)))
    assert 0 <= entry["miou"] <= 100
    (folder,) = tmp_path.glob("eval-segment-*")
    assert metrics(folder)[-1]["loss"] == 0
    with pytest.raises(SystemExit) as end:
        segment(file, "--restart", "--steps", "2", data=(Squares(16), Squares(4, unlabelled)))
    assert "no pixel of the validation masks" in error_line(end.value.code, capsys.readouterr().err)


def change_mask(root, function) -> None:
    """Applies `function` to one training mask."""
    path = root / "annotations/training/ADE_5.png"
    with Image.open(path) as mask:
        new = function(mask)
    new.save(path)


@pytest.mark.parametrize("harm, message", [
    (lambda root: (root / "images/training/ADE_3.jpg").unlink(), "ADE_3.jpg is missing"),
    (lambda root: [x.unlink() for x in root.glob("*/validation/*")], "no images "),
    (lambda root: (root / "annotations/validation/ADE_33.png").unlink(), "ADE_33.png is missing"),
    (lambda root: change_mask(root, lambda x: x.resize((10, 10))),
     "has the shape (10, 10), its image"),
    (lambda root: change_mask(root, lambda x: x.convert("RGB")), "one number per pixel"),
    (lambda root: change_mask(root, lambda x: x.point(lambda k: 151 if k == 2 else k)),
     "has the number 151, but the classes are 1 to 150"),
    (lambda root: (root / "annotations/training/ADE_5.png").write_bytes(b""), "cannot identify"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_one_line_errors(harm, message, ade, tmp_path, capsys):
    harm(ade)
    flags = [encoder_of(tmp_path), "--mode", "segment", "--data", ade, "--device", "cpu"]
    flags += ["--batch-size", 16, "--workers", int("pixel" in message)]
    line = error_of(capsys, eval_linear, *flags)
    assert message in line and "ade" in line.lower()



@pytest.mark.parametrize("mask_of, message", [
    (lambda mask: 1, "has the shape (), its image (20, 24)"),
    (lambda mask: mask[:, :10], "has the shape (20, 10), its image (20, 24)"),
    (lambda mask: mask + 1, "has the number 2, but the classes are 0 to 1"),
    (lambda mask: Image.fromarray(mask.numpy()).convert("RGB"), "one number per pixel"),
])  # fmt: skip
def test_own_masks_that_do_not_fit_are_one_line_errors(mask_of, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        segment(encoder_of(tmp_path), data=(Squares(64, mask_of), Squares(4)))
    assert message in error_line(end.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("flags, message", [
    (["--data", "cifar10"], "cifar10 has no masks: use shapes, voc2012, or a folder like ADE20K"),
    (["--data", "absent"], "--data absent has no masks"),
    (["--data", "shapes", "--img-size", "18"], "image size 18x18 is not divisible by patch size 4"),
    (["--data", "shapes", "--pool", "mean"], "--pool"),
    (["--data", "shapes", "--min-crop", "2"], "--min-crop must be at most 1"),
    (["--data", "voc2012", "--data-dir", "absent"], "could not download VOCSegmentation"),
])  # fmt: skip
def test_mistakes_are_one_line_errors(flags, message, tmp_path, capsys, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", no_network)
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, eval_linear, encoder_of(tmp_path), "--mode", "segment", *flags)
    assert message in line


def test_an_encoder_of_wide_images_needs_a_size(tmp_path, capsys):
    vit = common.ViT((8, 16), 4, embed_dim=24, depth=1, num_heads=3)
    common.save_encoder(tmp_path / "encoder.pt", vit, {})
    line = error_of(capsys, eval_linear, tmp_path / "encoder.pt", "--data", "shapes")
    assert "--img-size N" in line
    assert segment(tmp_path / "encoder.pt", "--img-size", "16", "--batch-size", "16", data=PAIR,
                   key="segment-16px")["miou"] > 30  # fmt: skip
