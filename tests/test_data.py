"""Images, crops and loaders against torchvision and slow versions."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import in_processes, write_images
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

import common
from common import UserError


def make_loader(images, batch_size=8, accumulate=1, rank=0, world=1, workers=0,
                augment=None, single=False):
    cfg = SimpleNamespace(batch_size=batch_size, accumulate=accumulate, seed=0, data="x",
                          workers=workers)  # fmt: skip
    run = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    augment = augment or common.RandomCrop(16, 0.2)
    return common.TrainLoader(images, cfg, run, augment, single)


def test_shapes_are_reproducible_balanced_and_not_given_away_by_colour():
    imgs, labels = common.draw_shapes(2000, 32, seed=0)
    again, _ = common.draw_shapes(2000, 32, seed=0)
    other, _ = common.draw_shapes(2000, 32, seed=1)
    assert torch.equal(imgs, again) and not torch.equal(imgs, other)
    assert imgs.shape == (2000, 3, 32, 32) and imgs.dtype == torch.uint8
    assert torch.bincount(labels, minlength=10).min() > 140
    # The best guess from the mean colour of an image, by nearest neighbour, is near chance (10 %).
    colour = imgs.float().mean((2, 3))
    nearest = torch.cdist(colour[1000:], colour[:1000]).argmin(1)
    assert (labels[:1000][nearest] == labels[1000:]).float().mean() < 0.2


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (20, 31, 24), (40, 24, 8)])
def test_crop_resize_equals_torch_on_each_crop(height, width, size):
    g = torch.Generator().manual_seed(0)
    imgs = torch.randint(0, 256, (40, 3, height, width), generator=g).to(torch.uint8)
    torch.manual_seed(0)
    boxes = common.sample_crops(40, height, width, (0.1, 1.0))
    flip = torch.rand(40, generator=g) < 0.5
    got = common.crop_resize(imgs, boxes, size, flip)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        crop = imgs[i : i + 1, :, top : top + h, left : left + w].float()
        expected = F.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        expected = expected.flip(3) if flip[i] else expected
        torch.testing.assert_close(got[i : i + 1], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (20, 31, 24), (40, 24, 8)])
def test_crop_resize_of_one_uint8_image_equals_pillow_s(height, width, size):
    torch.manual_seed(0)
    imgs = torch.randint(0, 256, (20, 1, 3, height, width), dtype=torch.uint8)
    boxes = common.sample_crops(20, height, width, (0.1, 1.0))
    for img, box, flip in zip(imgs, boxes, torch.arange(20) % 2 == 0, strict=True):
        got = common.crop_resize(img, box[None], size, flip[None])
        top, left, h, w = box.tolist()
        picture = v2.functional.to_pil_image(img[0]).crop((left, top, left + w, top + h))
        expected = v2.functional.pil_to_tensor(picture.resize((size, size), Image.BICUBIC))
        expected = expected.flip(2) if flip else expected
        assert got.dtype == torch.uint8
        difference = (got[0].int() - expected.int()).abs()  # both round twice
        assert difference.max() <= 2 and difference.float().mean() < 0.1


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.2, 1.0)), (20, 60, (0.5, 1.0))])
def test_crops_are_distributed_as_torchvision_s(height, width, scale):
    torch.manual_seed(0)
    ours = common.sample_crops(8000, height, width, scale).double()
    image, ratio = torch.zeros(3, height, width), [3 / 4, 4 / 3]
    params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([params(image, list(scale), ratio) for _ in range(8000)]).double()
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    error = (ours.var(0) / 8000 + theirs.var(0) / 8000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error + 1e-9).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.06, atol=0.05)
    grid = torch.linspace(0.05, 0.95, 10).double()
    torch.testing.assert_close(ours.quantile(grid, 0), theirs.quantile(grid, 0), atol=1.01, rtol=0)


def test_the_fallback_crop_is_torchvision_s():
    for height, width in ((10, 100), (100, 10)):
        box = common.sample_crops(1, height, width, (1.0, 1.0))[0].tolist()
        image = torch.zeros(3, height, width)
        params = torchvision.transforms.RandomResizedCrop.get_params
        assert box == list(params(image, [1.0, 1.0], [3 / 4, 4 / 3]))


def test_normalize_and_back():
    imgs = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        expected = (imgs[:, c] / 255 - mean) / std
        torch.testing.assert_close(common.normalize(imgs)[:, c], expected, atol=1e-5, rtol=1e-5)
    back = common.denormalize(common.normalize(imgs))
    torch.testing.assert_close(back, imgs / 255, atol=1e-5, rtol=0)


def test_an_epoch_sees_every_image_once_and_processes_share_it():
    images = common.load_images("shapes", "val", 16)
    whole = make_loader(images, batch_size=100)
    first = list(whole.batches(0))
    assert len(first) == len(whole.keys) == 40
    assert sorted(i for _, _, index in whole.keys for i in index) == list(range(4000))
    # Two processes see what one process with two accumulated micro-batches sees.
    one = list(make_loader(images, batch_size=100, accumulate=2).batches(0))
    two = [make_loader(images, batch_size=100, rank=r, world=2).batches(0) for r in range(2)]
    for i, pair in enumerate(zip(*two, strict=True)):
        for (imgs, labels), expected in zip(pair, one[2 * i : 2 * i + 2], strict=True):
            assert torch.equal(imgs, expected[0]) and torch.equal(labels, expected[1])
    assert not torch.equal(next(whole.batches(40))[1], first[0][1])  # the next epoch


@pytest.mark.parametrize("path", ["memory", "files"])
def test_a_loader_started_in_mid_epoch_goes_on_where_it_was(path, shapes_folder, monkeypatch):
    if path == "files":
        monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    images = common.load_images(str(shapes_folder), "train", 16)
    assert (images.pixels is None) == (path == "files")
    loader = make_loader(images)
    every = list(loader.batches(8))  # the second epoch of 8 steps
    for workers in (0, 2) if path == "files" else (0,):
        rest = list(make_loader(images, workers=workers).batches(8 + 3))
        assert len(rest) == 5
        for (a, x), (b, y) in zip(every[3:], rest, strict=True):
            assert torch.equal(a, b) and torch.equal(x, y)


def test_labels_follow_their_images(shapes_folder, monkeypatch):
    resident = common.load_images(str(shapes_folder), "train", 16)
    monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    files = common.load_images(str(shapes_folder), "train", 16)
    for i in range(len(files)):
        image, label = files.read(i)
        assert files.classes[label] == Path(os.fsdecode(files.paths[i])).parent.name
        assert torch.equal(image, resident.pixels[i])
        assert label == resident.labels[i] == resident.read(i)[1]
        assert torch.equal(image, resident.read(i)[0])


def numbered(imgs, index):
    """Two views: the image, and its number in all pixels."""
    return imgs, index[:, None, None, None].expand(imgs.shape)


@pytest.mark.parametrize("place, single, workers", [
    ("memory", False, 0), ("memory", True, 0), ("memory", True, 2),
    ("files", False, 0), ("files", False, 2),
])  # fmt: skip
def test_views_and_labels_are_of_the_image_whose_number_they_get(
    place, single, workers, shapes_folder, monkeypatch
):
    if place == "files":
        monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    images, seen = common.load_images(str(shapes_folder), "train", 16), []
    assert (images.pixels is None) == (place == "files")
    loader = make_loader(images, workers=workers, augment=numbered, single=single)
    evaluated = common.eval_batches(images, 16, "cpu", workers=workers, view=numbered)
    for batches in (loader.batches(0), evaluated):
        seen.append([])
        for imgs, numbers, labels in batches:
            numbers = (255 * common.denormalize(numbers)).round().long()
            assert (numbers == numbers[:, :1, :1, :1]).all()
            for img, i, label in zip(imgs, numbers[:, 0, 0, 0].tolist(), labels, strict=True):
                expected, expected_label = images.read(i)
                assert torch.equal(img, common.normalize(expected)) and label == expected_label
                seen[-1].append(i)
    assert seen[1] == list(range(64)) == sorted(seen[0]) != seen[0]


def means_of_all(folder) -> None:
    """The mean colours of 601 images, and of 10 of them, to a file of this process."""
    run, (pixels, labels) = common.Run(common.Config(device="cpu")), common.draw_shapes(601, 8, 0)
    images = common.Images(labels, list(common.SHAPES), pixels)
    results = [
        common.outputs(run, torch.nn.Identity(), lambda x: x.mean(dim=(2, 3)), images, 8, limit)
        for limit in (None, 10)
    ]
    torch.save(results, f"{folder}/{run.world}-{run.rank}.pt")


def test_outputs_are_in_the_set_s_order_however_many_processes_make_them(tmp_path):
    pixels, labels = common.draw_shapes(601, 8, 0)
    means = common.normalize(pixels).mean(dim=(2, 3))
    means_of_all(tmp_path)
    assert in_processes(2, means_of_all, tmp_path) == [0, 0]
    for name in ("1-0", "2-0", "2-1"):
        every, some = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(every[1], labels)
        torch.testing.assert_close(every[0], means)
        index = common.evenly_spaced(common.Images(labels, [], pixels), 10)
        assert index[0] == 0 and index[-1] == 600 and torch.equal(some[1], labels[index])
        torch.testing.assert_close(some[0], means[index])


def test_loaders_leave_no_files_open(tmp_path):
    write_images(tmp_path, 4, 16, seed=0, labelled=False)
    images, counts = common.Images(torch.zeros(4), [], paths=sorted(tmp_path.iterdir())), []
    for workers in (1, *10 * [0], 1, 1):
        assert len(list(common.eval_batches(images, 16, "cpu", workers=workers))) == 1
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] < counts[0] + 5


def test_eval_batches_equal_torchvision_s_test_crop(tmp_path):
    write_images(tmp_path, 3, 40, seed=0, labelled=False)
    images = common.load_images(str(tmp_path), "train", 24)
    got = torch.cat([x for x, _ in common.eval_batches(images, 24, "cpu")])
    for i, path in enumerate(sorted(tmp_path.iterdir())):
        image = Image.open(path).resize((27, 27), Image.BICUBIC)  # 27 = 24 * 256 / 224
        expected = v2.functional.pil_to_tensor(image.crop((2, 2, 26, 26)))
        difference = common.denormalize(got[i : i + 1])[0] * 255 - expected
        assert difference.abs().max() < 3 and difference.abs().mean() < 0.5
    whole = torch.cat([x for x, _ in common.eval_batches(images, 40, "cpu")])
    torch.testing.assert_close(whole, common.normalize(images.pixels))
    some = [y for _, y in common.eval_batches(images, 40, "cpu", limit=2)]
    assert sum(map(len, some)) == 2


# ------------------------------------------------------------------------------ folders


def test_a_broken_file_is_named_once_counted_and_replaced(tmp_path, capfd, monkeypatch):
    write_images(tmp_path, 16, 16, seed=0, labelled=False)
    broken = sorted(tmp_path.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "0005b.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    images = common.load_images(str(tmp_path), "train", 16)
    error = capfd.readouterr().err
    assert len(images) == 15 and error.count("0005.png:") == error.count("0005b.jpg:") == 1
    assert "left out 2 unreadable of 17 images" in error and "notes" not in error

    monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    images = common.load_images(str(tmp_path), "train", 16)
    loader = make_loader(images, workers=2)
    for epoch in range(3):
        assert [len(imgs) for imgs, _ in loader.batches(epoch * 2)] == [8, 8]
    error = capfd.readouterr().err
    assert error.count("0005.png:") == error.count("0005b.jpg:") == 1
    assert images.unreadable.sum() == 2


def test_a_stand_in_brings_its_own_label_and_there_must_be_one(tmp_path):
    write_images(tmp_path, 1, 16, seed=0, labelled=False)
    (tmp_path / "bad.png").write_text("no image")
    paths = [tmp_path / "bad.png", tmp_path / "0000.png"]
    images = common.Images(torch.tensor([5, 7]), [], paths=paths)
    assert images.read(0)[1] == images.read(1)[1] == 7
    paths[1].unlink()
    with pytest.raises(UserError, match="none of the 2 images can be read any more"):
        images.read(1)


@pytest.mark.parametrize("cores, processes, expected", [
    (6, 1, 6), (64, 1, 10), (64, 16, 4), (7, 2, 3), (2, 4, 1),
])  # fmt: skip
def test_workers_are_by_default_as_many_as_a_process_has_cores(
    cores, processes, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    images = common.Images(torch.zeros(8), [], torch.zeros(8, 3, 4, 4, dtype=torch.uint8))
    for workers, found in ((None, expected), (0, 0), (1, 1)):
        assert make_loader(images, workers=workers, single=True).loader.num_workers == found
        assert make_loader(images, workers=workers).loader.num_workers == 0
    assert common.Config().workers is None


@pytest.mark.parametrize("single", [False, True])
def test_crops_are_new_in_every_epoch(single):
    images = common.load_images("shapes", "val", 32)
    batches = common.Batches(images, common.RandomCrop(16, 0.2), single=single)
    first, second, again = (batches[epoch, 0, [3, 4]][0] for epoch in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first[0], second[0])


def test_modes_of_images(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    grey = Image.fromarray((ramp // 256).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("P").save(tmp_path / "palette.png", transparency=3)
    grey.convert("RGBA").save(tmp_path / "rgba.png")
    frames = dict(save_all=True, append_images=[grey.transpose(Image.Transpose.ROTATE_90)])
    grey.save(tmp_path / "animated ö.WebP", lossless=True, **frames)
    turned = Image.Exif()
    turned[0x112] = 6  # to be shown turned, which is left out, as by torchvision
    grey.save(tmp_path / "turned.png", exif=turned)
    (tmp_path / "circle").symlink_to(tmp_path)
    for name, kind in (("float", np.float32), ("integer", np.int32)):
        Image.fromarray(100 * ramp.astype(kind)).save(tmp_path / f"{name}.tif")
    expected = torch.from_numpy(ramp // 256).to(torch.uint8).expand(3, -1, -1)
    images = common.load_images(str(tmp_path), "train", 8)
    assert len(images) == 6 and all(torch.equal(pixels, expected) for pixels in images.pixels)


def test_folder_layouts(tmp_path, shapes_folder):
    train = common.load_images(str(shapes_folder), "train", 16)
    val = common.load_images(str(shapes_folder), "val", 16)
    names = sorted(path.name for path in (shapes_folder / "train").iterdir())
    assert train.classes == val.classes == names
    write_images(tmp_path / "any" / "tree", 4, 16, 0, labelled=False)
    tree = common.load_images(str(tmp_path / "any"), "pretrain", 16)
    assert len(tree) == 4 and tree.classes == [] and (tree.labels == -1).all()
    assert common.load_images(str(tmp_path / "any"), "val", 16) is None
    write_images(tmp_path / "mixed", 2, 16, 0, labelled=False)
    write_images(tmp_path / "mixed", 1, 20, 1, labelled=False)
    (tmp_path / "mixed" / "0000.png").rename(tmp_path / "mixed" / "big.png")
    write_images(tmp_path / "mixed", 1, 16, 1, labelled=False)
    assert common.load_images(str(tmp_path / "mixed"), "train", 16).pixels is None  # sizes differ


def test_any_file_name_is_found_in_the_order_of_paths_and_read(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    names = ("a/1", "a b/1", "a-b/1", "a/b/1", "a.b/1", "a/b-1", "ö/ä", os.fsdecode(b"\xff/\xfe"))
    for split, name in ((split, name) for split in ("train", "val") for name in names):
        path = tmp_path / split / f"{name}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (names.index(name), 0, 0)).save(path)
    expected = sorted((tmp_path / "val").rglob("*.PNG"))
    images = pickle.loads(pickle.dumps(common.load_images(str(tmp_path), "val", 2)))
    assert [Path(os.fsdecode(path)) for path in images.paths] == expected
    for i, path in enumerate(expected):
        image, label = images.read(i)
        folder, *_ = path.relative_to(tmp_path / "val").parts
        assert images.classes[label] == folder
        assert names[image[0, 0, 0]] == str(path.relative_to(tmp_path / "val").with_suffix(""))
        path.write_text("no image")
    with pytest.raises(UserError):
        images.read(0)
    assert capfd.readouterr().err.count("unreadable") == len(names)  # whose names can be printed


def test_the_layout_of_tiny_imagenet(tmp_path):
    for i, name in enumerate(("n01", "n02", "n03")):
        write_images(tmp_path / "train" / name / "images", 2 + i, 16, seed=i, labelled=False)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0001.png\t0\t0\t9\t9\n")
    write_images(tmp_path / "val" / "images", 3, 16, seed=9, labelled=False)
    lines = [f"{i:04d}.png\t{name}\t0\t32\t44\t62\n" for i, name in ((2, "n01"), (0, "n03"))]
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines) + "0001.png\tn02\t1\t1\t1\t1\n")
    train, val = (common.load_images(str(tmp_path), split, 16) for split in ("pretrain", "val"))
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert val.labels.tolist() == [2, 1, 0]
    annotations.write_text("".join(lines))
    with pytest.raises(UserError, match=r"0001\.png is in none of the 3 class folders"):
        common.load_images(str(tmp_path), "val", 16)


def test_folder_mistakes(tmp_path, shapes_folder):
    with pytest.raises(UserError, match="no such folder, nor shapes, cifar10"):
        common.load_images(str(tmp_path / "absent"), "train", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images under"):
        common.load_images(str(tmp_path / "empty"), "train", 16)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 images"):
        common.load_images(str(tmp_path / "bad"), "train", 16)
    write_images(tmp_path / "odd" / "train" / "cat", 1, 16, 0, labelled=False)
    write_images(tmp_path / "odd" / "val" / "dog", 1, 16, 0, labelled=False)
    with pytest.raises(UserError, match=r"dog/0000\.png is in none of the 1 class folders"):
        common.load_images(str(tmp_path / "odd"), "val", 16)
    for split in ("train", "val"):  # one image beside class folders
        write_images(tmp_path / "stray" / split / "cat", 2, 16, 0, labelled=False)
        write_images(tmp_path / "stray" / split, 1, 16, 0, labelled=False)
        with pytest.raises(UserError, match=rf"{split}/0000\.png is in none of the 1 class"):
            common.load_images(str(tmp_path / "stray"), split, 16)
    with pytest.raises(UserError, match="--batch-size 80 is more than the 64 images"):
        make_loader(common.load_images(str(shapes_folder), "train", 16), batch_size=80)


# ------------------------------------------------------------------------------ torchvision's sets


def test_cifar10_and_cifar100_from_miniatures_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "classes", ["a", "b"], raising=False)
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, folder, key, files in (
        ("cifar10", "cifar-10-batches-py", "labels",
         [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
        ("cifar100", "cifar-100-python", "fine_labels", ["train", "test"]),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        for file in files:
            content = pickle.dumps({"data": rows, key: [0, 1, 0, 1]})
            (tmp_path / folder / file).write_bytes(content)
        train = common.load_images(name, "pretrain", 32, tmp_path)
        val = common.load_images(name, "val", 32, tmp_path)
        assert len(train) == (20 if name == "cifar10" else 4) and len(val) == 4
        assert torch.equal(val.pixels, torch.from_numpy(rows).view(4, 3, 32, 32))  # planes R, G, B
        assert val.labels.tolist() == [0, 1, 0, 1] and val.classes == ["a", "b"]


def test_stl10_from_a_miniature_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    for part, count in (("train", 2), ("test", 2), ("unlabeled", 2)):
        rows[:count].tofile(folder / f"{part}_X.bin")
        np.array([1, 2], dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1\n")
    pretrain = common.load_images("stl10", "pretrain", 96, tmp_path)
    assert pretrain.labels.tolist() == [0, 1, -1, -1] and pretrain.pixels.shape == (4, 3, 96, 96)
    assert common.evenly_spaced(pretrain, 2).tolist() == [0, 1]  # for monitors, labelled ones
    assert common.evenly_spaced(pretrain, None).tolist() == [0, 1, 2, 3]
    train = common.load_images("stl10", "train", 96, tmp_path)
    assert train.labels.tolist() == [0, 1]
    stored = torch.from_numpy(rows).transpose(2, 3)  # the files are column by column
    assert torch.equal(train.pixels, stored)


def test_a_failed_download_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(UserError, match="could not download cifar10"):
        common.load_images("cifar10", "train", 32, tmp_path)
