"""Data sets, crops and loaders are compared with torchvision, Pillow and slow versions."""

import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import METHODS, error_of, in_processes, settings, weights, write_images
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

import common
import eval_linear
import mae_perceptual
from common import UserError

CPU = torch.device("cpu")


def make_run(batch_size=8, accumulate=1, rank=0, world=1, workers=0):
    """The few attributes of a Run that a loader reads."""
    cfg = SimpleNamespace(batch_size=batch_size, accumulate=accumulate, seed=0, workers=workers)
    return SimpleNamespace(cfg=cfg, rank=rank, world=world, device=CPU)


def make_loader(images, augment=None, **options):
    return common.TrainLoader(make_run(**options), images, augment or common.RandomCrop(16, 0.2))


def shapes(count: int, size: int) -> TensorDataset:
    images = TensorDataset(*common.draw_shapes(count, size, 0))
    images.classes = list(common.SHAPES)
    return images


def test_shapes_are_reproducible_balanced_and_not_given_away_by_colour():
    imgs, labels = common.draw_shapes(2000, 32, seed=0)
    again, _ = common.draw_shapes(2000, 32, seed=0)
    other, _ = common.draw_shapes(2000, 32, seed=1)
    assert torch.equal(imgs, again) and not torch.equal(imgs, other)
    assert imgs.shape == (2000, 3, 32, 32) and imgs.dtype == torch.uint8
    assert torch.bincount(labels, minlength=10).min() > 140
    # A nearest-neighbour classifier of mean colours is near chance, which is 10 %.
    colour = imgs.float().mean((2, 3))
    nearest = torch.cdist(colour[1000:], colour[:1000]).argmin(1)
    assert (labels[:1000][nearest] == labels[1000:]).float().mean() < 0.2


# ------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("height, width", [(32, 32), (20, 61)])
def test_the_random_crop_equals_torchvisions_transforms(height, width):
    """The same random numbers give the same pixels, and about half of the crops are flipped."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    ours, flips = common.RandomCrop(24, 0.3), 0
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.RandomResizedCrop(24, scale=(0.3, 1.0), interpolation=bicubic, antialias=True)
    for seed in range(200):
        torch.manual_seed(seed)
        got, label = ours(image, 7, 0)
        torch.manual_seed(seed)
        expected = theirs(image)
        if torch.rand(1) < 0.5:
            expected = expected.flip(2)
            flips += 1
        assert torch.equal(got, expected) and label == 7 and got.dtype == torch.uint8
    assert 70 < flips < 130


def test_pixels_of_a_crop_equal_pillows_to_one_grey_level():
    image = common.draw_shapes(1, 40, seed=0)[0][0, :, :, 8:32]
    crop = common.RandomCrop(32, 0.1)
    for seed in range(40):
        torch.manual_seed(seed)
        got, _ = crop(image, 0, 0)
        torch.manual_seed(seed)
        top, left, h, w = v2.RandomResizedCrop.get_params(image, [0.1, 1.0], [3 / 4, 4 / 3])
        picture = v2.functional.to_pil_image(image).crop((left, top, left + w, top + h))
        expected = v2.functional.pil_to_tensor(picture.resize((32, 32), Image.BICUBIC))
        expected = expected.flip(2) if torch.rand(1) < 0.5 else expected
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("height, width, scale", [(32, 32, 0.2), (20, 60, 0.5)])
def test_crops_are_distributed_as_the_definition_says(height, width, scale):
    """The area is uniform, the aspect ratio is log-uniform, and the first of ten tries that fits is
    taken. Means, deviations and quantiles are compared with those of a slow version."""
    rng, crop = np.random.default_rng(0), common.RandomCrop(8, scale)
    torch.manual_seed(0)
    image, expected = torch.zeros(3, height, width, dtype=torch.uint8), []
    for _ in range(6000):
        for _ in range(10):
            area = height * width * rng.uniform(scale, 1)
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if w <= width and h <= height:
                box = rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
                break
        else:  # the largest crop of an allowed aspect ratio, in the middle
            h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
            box = (height - h) // 2, (width - w) // 2, h, w
        expected.append(box)
    theirs = torch.tensor(np.array(expected)).double()
    ours = [list(crop.crop.make_params([image]).values()) for _ in range(6000)]
    ours = torch.tensor(ours).double()
    error = (ours.var(0) / 6000 + theirs.var(0) / 6000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error + 1e-9).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.06, atol=0.05)
    grid = torch.linspace(0.05, 0.95, 10).double()
    torch.testing.assert_close(ours.quantile(grid, 0), theirs.quantile(grid, 0), atol=1.01, rtol=0)


def test_the_centre_crop_equals_pillows():
    image = common.draw_shapes(1, 40, 0)[0][0]
    crop, label = common.CentreCrop(24)(image, 3, 0)
    picture = v2.functional.to_pil_image(image).resize((27, 27), Image.BICUBIC)  # 24 * 256 / 224
    expected = v2.functional.pil_to_tensor(picture.crop((2, 2, 26, 26)))
    assert label == 3 and (crop.int() - expected.int()).abs().max() <= 1
    assert common.CentreCrop(40)(image, 3, 0)[0] is image
    wide, _ = common.CentreCrop(24)(image[:, :20], 3, 0)
    assert wide.shape == (3, 24, 24)


def test_normalize_and_back():
    imgs = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for channel, mean, std in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):
        expected, got = (imgs[:, channel] / 255 - mean) / std, common.normalize(imgs)[:, channel]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    back = common.denormalize(common.normalize(imgs))
    torch.testing.assert_close(back, imgs / 255, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ loaders


def numbered(image, label, index):
    """An augmentation with two views: the image, and an image whose pixels are all its index."""
    return image, torch.full_like(image, index), label


@pytest.mark.parametrize("workers", [0, 2])
def test_views_and_labels_are_of_the_image_whose_index_they_get(workers, shapes_folder):
    images, seen = common.load_dataset(str(shapes_folder), "train", 16), []
    loader = make_loader(images, numbered, workers=workers)
    for imgs, numbers, labels in loader.batches(0):
        numbers = (255 * common.denormalize(numbers)).round().long()
        assert (numbers == numbers[:, :1, :1, :1]).all()
        for img, i, label in zip(imgs, numbers[:, 0, 0, 0].tolist(), labels, strict=True):
            expected, expected_label = images[i]
            expected = common.normalize(v2.functional.pil_to_tensor(expected))
            assert torch.equal(img, expected) and label == expected_label
            assert images.classes[label] == Path(images.samples[i][0]).parent.name
            seen.append(i)
    assert sorted(seen) == list(range(64)) != seen


def test_an_epoch_sees_every_image_once_and_processes_share_it():
    images = shapes(200, 16)
    batches = list(make_loader(images, numbered, batch_size=100).batches(0))
    assert len(batches) == 2
    indices = [(255 * common.denormalize(x)).round()[:, 0, 0, 0].long() for _, x, _ in batches]
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(200))
    # Two processes get the batches that one process with two micro-batches per step gets.
    one = list(make_loader(images, batch_size=100, accumulate=2).batches(0))
    for rank in range(2):
        own = list(make_loader(images, batch_size=100, rank=rank, world=2).batches(0))
        for (imgs, labels), (expected, expected_labels) in zip(own, one[rank::2], strict=True):
            assert torch.equal(imgs, expected) and torch.equal(labels, expected_labels)
    _, labels = next(make_loader(images, batch_size=100).batches(0))
    _, next_labels = next(make_loader(images, batch_size=100).batches(2))  # the next epoch
    assert not torch.equal(labels, next_labels)


def test_a_loader_can_start_in_the_middle_of_an_epoch(shapes_folder):
    images = common.load_dataset(str(shapes_folder), "train", 16)
    epoch = list(make_loader(images).batches(8))  # the second epoch, of 8 steps
    for workers in (0, 2):
        rest = list(make_loader(images, workers=workers).batches(8 + 3))
        assert len(rest) == 5
        for (imgs, labels), (expected, expected_labels) in zip(rest, epoch[3:], strict=True):
            assert torch.equal(imgs, expected) and torch.equal(labels, expected_labels)


def test_crops_are_new_in_every_epoch_and_with_every_seed():
    images, crop = shapes(8, 32), common.RandomCrop(16, 0.2)

    def crop_of(seed, epoch):
        view, _ = common.Views(images, crop, seed, epoch)[3]
        return view

    assert torch.equal(crop_of(seed=0, epoch=0), crop_of(seed=0, epoch=0))
    assert not torch.equal(crop_of(seed=0, epoch=0), crop_of(seed=0, epoch=1))
    assert not torch.equal(crop_of(seed=0, epoch=0), crop_of(seed=1, epoch=0))
    same_image_twice = TensorDataset(images.tensors[0][:1].expand(2, -1, -1, -1), torch.zeros(2))
    views = common.Views(same_image_twice, crop)
    assert not torch.equal(views[0][0], views[1][0])


@pytest.mark.parametrize("cores, processes, expected", [
    (6, 1, 6), (64, 1, 16), (64, 16, 4), (7, 2, 3), (2, 4, 1),
])  # fmt: skip
def test_a_gpu_is_by_default_fed_by_as_many_workers_as_there_are_cores(
    cores, processes, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    views = common.Views(shapes(8, 4), common.CentreCrop(4))
    for device, workers, found in (("cuda", None, expected), ("cpu", None, 0),
                                   ("cuda", 0, 0), ("cpu", 3, 3)):  # fmt: skip
        run = make_run(workers=workers)
        run.device = torch.device(device)
        assert common.data_loader(run, views, [[0]]).num_workers == found
    assert common.Config().workers is None


def means_of_all(folder) -> None:
    """Computes the mean colours of 601 images, then of 10 of them, and writes both to a file."""
    run, images = common.Run(common.Config(device="cpu")), shapes(601, 8)

    def mean_colour(imgs):
        return imgs.mean(dim=(2, 3))

    model, crop = torch.nn.Identity(), common.CentreCrop(8)
    results = [common.outputs(run, model, mean_colour, images, crop, n) for n in (None, 10)]
    torch.save(results, f"{folder}/{run.world}-{run.rank}.pt")


def test_outputs_keep_the_order_of_the_data_set_with_any_number_of_processes(tmp_path):
    pixels, labels = common.draw_shapes(601, 8, 0)
    means = common.normalize(pixels).mean(dim=(2, 3))
    means_of_all(tmp_path)
    assert in_processes(2, means_of_all, tmp_path) == [0, 0]
    for name in ("1-0", "2-0", "2-1"):
        (all_means, all_labels), (some_means, some_labels) = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(all_labels, labels)
        torch.testing.assert_close(all_means, means)
        index = common.evenly_spaced(labels, 10)
        assert index[0] == 0 and index[-1] == 600 and torch.equal(some_labels, labels[index])
        torch.testing.assert_close(some_means, means[index])


def test_outputs_do_not_change_the_mode_of_the_model():
    run, images, seen = common.Run(common.Config(device="cpu")), shapes(4, 8), []
    model = torch.nn.Dropout().train()

    def forward(imgs):
        seen.append(model.training)
        return imgs[:, 0, 0]

    common.outputs(run, model, forward, images, common.CentreCrop(8))
    assert seen == [False] and model.training


def test_loaders_leave_no_files_open_and_no_workers(shapes_folder):
    images, counts = common.load_dataset(str(shapes_folder), "val", 16), []
    for workers in [1] + 10 * [0] + [1, 1]:
        assert len(list(make_loader(images, workers=workers).batches(0))) == 4
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] < counts[0] + 5
    batches = make_loader(images, workers=2, batch_size=1).batches(0)
    next(batches)
    begun = time.monotonic()
    batches.close()  # in the middle of an epoch, as when a run is stopped
    assert time.monotonic() - begun < 4 and not torch.multiprocessing.active_children()


# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_replaces_a_broken_one_which_is_named(workers, tmp_path, capfd):
    write_images(tmp_path, 16, 16, seed=0, labelled=False)
    broken = sorted(tmp_path.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "0015b.jpg").write_text("no image")  # the last one, which the first one replaces
    (tmp_path / "notes.txt").write_text("this file is ignored")
    images = common.load_dataset(str(tmp_path), "train", 16)
    assert len(images) == 17
    loader = make_loader(images, workers=workers)
    assert [len(imgs) for imgs, _ in loader.batches(0)] == [8, 8]
    views = common.Views(images, common.CentreCrop(16))
    assert torch.equal(views[5][0], views[6][0]) and torch.equal(views[16][0], views[0][0])
    error = capfd.readouterr().err
    assert "skipping unreadable image" in error and "0005.png" in error and "notes" not in error
    for path in images.samples:
        Path(path[0]).unlink()
    with pytest.raises(UserError, match="none of the 17 images"):
        images[3]


def test_an_image_that_replaces_another_keeps_its_own_label(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 1, 16, seed=0, labelled=False)
    (tmp_path / "train" / "a" / "0000.png").write_text("no image")
    images = common.load_dataset(str(tmp_path), "train", 16)
    assert images[0][1] == images[1][1] == 1


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
    turned[0x112] = 6  # asks for a rotation, which torchvision and we ignore
    grey.save(tmp_path / "turned.png", exif=turned)
    expected = torch.from_numpy(ramp // 256).to(torch.uint8).expand(3, -1, -1)
    views = common.Views(common.load_dataset(str(tmp_path), "train", 8), common.CentreCrop(8))
    assert len(views) == 6 and all(torch.equal(views[i][0], expected) for i in range(6))
    for kind in (np.float32, np.int32):  # such pixels have no agreed range
        with pytest.raises(ValueError, match="has no agreed range"):
            common.rgb(Image.fromarray(100 * ramp.astype(kind)))


def test_tensors_of_one_three_and_four_channels():
    pixels = torch.randint(0, 256, (4, 5, 6), dtype=torch.uint8)
    assert torch.equal(common.rgb_tensor(pixels), pixels[:3])  # the alpha channel is dropped
    assert torch.equal(common.rgb_tensor(pixels[:3]), pixels[:3])
    assert torch.equal(common.rgb_tensor(pixels[:1]), pixels[:1].repeat(3, 1, 1))


def test_folder_layouts(tmp_path, shapes_folder):
    train = common.load_dataset(str(shapes_folder), "train", 16)
    val = common.load_dataset(str(shapes_folder), "val", 16)
    names = sorted(path.name for path in (shapes_folder / "train").iterdir())
    assert train.classes == val.classes == names == common.shared_classes(train, val)
    write_images(tmp_path / "any" / "tree", 4, 16, 0, labelled=False)
    (tmp_path / "linked").symlink_to(tmp_path / "any")
    for name in ("any", "linked"):
        tree = common.load_dataset(str(tmp_path / name), "pretrain", 16)
        assert len(tree) == 4 and tree.classes == [] and [y for _, y in tree] == [-1] * 4
        assert common.load_dataset(str(tmp_path / name), "val", 16) is None
        assert common.shared_classes(tree, None) == common.shared_classes(tree, val) == []


def test_val_may_lack_a_class_of_train_but_not_have_another(tmp_path):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            write_images(tmp_path / split / name, 2, 16, seed=0, labelled=False)
    val = common.load_dataset(str(tmp_path), "val", 16)
    assert val.classes == ["a", "b", "c"] and [label for _, label in val] == [0, 0, 2, 2]
    write_images(tmp_path / "val" / "d", 1, 16, seed=0, labelled=False)
    with pytest.raises(UserError, match="val has class d, but train/ has not"):
        common.load_dataset(str(tmp_path), "val", 16)


def test_any_file_name_is_found_and_read(tmp_path, capfd):
    names = ("a/1", "a b/1", "a-b/1", "a/b/1", "a.b/1", "a/b-1", "ö/ä", os.fsdecode(b"\xff/\xfe"))
    for split in ("train", "val"):
        for name in names:
            path = tmp_path / split / f"{name}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (names.index(name), 0, 0)).save(path)
    images = pickle.loads(pickle.dumps(common.load_dataset(str(tmp_path), "val", 2)))
    assert len(images) == len(names)
    for (image, label), (path, _) in zip(images, images.samples, strict=True):
        folder, *_ = Path(path).relative_to(tmp_path / "val").parts
        assert images.classes[label] == folder
        name = names[image.getpixel((0, 0))[0]]
        assert name == str(Path(path).relative_to(tmp_path / "val").with_suffix(""))
    for path, _ in images.samples:
        Path(path).write_text("no image")
    with pytest.raises(UserError):
        images[0]
    assert capfd.readouterr().err.count("unreadable") == len(names)  # every name can be printed


def test_the_layout_of_tiny_imagenet(tmp_path):
    for i, name in enumerate(("n01", "n02", "n03")):
        write_images(tmp_path / "train" / name / "images", 2 + i, 16, seed=i, labelled=False)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0001.png\t0\t0\t9\t9\n")
    write_images(tmp_path / "val" / "images", 3, 16, seed=9, labelled=False)
    lines = "0002.png\tn01\t0\t32\t44\t62\n" + "0000.png\tn03\t0\t32\t44\t62\n"
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(lines + "0001.png\tn02\t1\t1\t1\t1\n")
    train, val = (common.load_dataset(str(tmp_path), split, 16) for split in ("pretrain", "val"))
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert [label for _, label in train] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [label for _, label in val] == [2, 1, 0]
    annotations.write_text(lines)
    with pytest.raises(UserError, match=r"0001\.png is in none of the class folders"):
        common.load_dataset(str(tmp_path), "val", 16)


def test_folder_mistakes(tmp_path, shapes_folder):
    with pytest.raises(UserError, match="no such folder, nor shapes, cifar10"):
        common.load_dataset(str(tmp_path / "absent"), "train", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images under"):
        common.load_dataset(str(tmp_path / "empty"), "train", 16)
    write_images(tmp_path / "stray" / "train" / "cat", 2, 16, 0, labelled=False)
    write_images(tmp_path / "stray" / "val", 2, 16, 0, labelled=False)  # not in class folders
    with pytest.raises(UserError, match="no images under"):
        common.load_dataset(str(tmp_path / "stray"), "val", 16)
    with pytest.raises(UserError, match="--batch-size 80 is more than the 64 images"):
        make_loader(common.load_dataset(str(shapes_folder), "train", 16), batch_size=80)


# ------------------------------------------------------------------------------ a user's own data


class Own(Dataset):
    """A user's data set: its items are PIL images of several sizes and modes, and uint8 tensors."""

    def __init__(self, count: int, classes: int = 0, broken: int | None = None):
        self.pixels, self.labels = common.draw_shapes(count, 24, seed=count)
        self.classes, self.broken = list("abcdefghij"[:classes]), broken

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        if index == self.broken:
            raise OSError("the disk is gone")
        img, label = self.pixels[index], int(self.labels[index]) if self.classes else -1
        picture = v2.functional.to_pil_image(img)
        forms = (picture, picture.resize((31, 18)), picture.convert("L"), picture.convert("RGBA"),
                 img, img[:1], picture.convert("P"))  # fmt: skip
        return forms[index % len(forms)], label


@pytest.mark.parametrize("method", METHODS)
def test_every_script_trains_on_a_users_data(method, tmp_path):
    """The files of such a run name no data set."""
    script, data = METHODS[method].script, (Own(48, classes=10), Own(24, classes=10))
    cfg = settings(method, "--out", tmp_path, "--epochs", "1", "--knn-every", "1")
    script.main(cfg, data)
    assert cfg.data == "shapes"  # main does not change the caller's Config
    assert weights(tmp_path, "config")["data"] is None and weights(tmp_path, "step") == 3
    assert common.read_checkpoint(tmp_path / "encoder.pt")["config"]["data"] is None
    if method != "supervised_mim":
        script.main(settings(method, "--out", tmp_path / "2", "--epochs", "1"), (Own(48), None))
        assert weights(tmp_path / "2", "step") == 3


def test_a_probe_of_a_run_on_own_data_needs_data(tmp_path, capsys):
    data = Own(48, classes=10), Own(24, classes=10)
    METHODS["mae"].script.main(settings("mae", "--out", tmp_path, "--epochs", "1"), data)
    error = error_of(capsys, eval_linear, tmp_path, "--device", "cpu")
    assert "does not say what it was trained on: --data is needed" in error
    cfg = eval_linear.Config(encoder=str(tmp_path), mode="knn", device="cpu", workers=0)
    eval_linear.main(cfg, data)
    assert "knn top-1" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_exception_of_a_users_data_set_is_raised(workers, tmp_path):
    cfg = settings("mae", "--out", tmp_path, "--workers", workers)
    with pytest.raises(OSError, match="the disk is gone"):
        METHODS["mae"].script.main(cfg, (Own(48, broken=5), None))


def error_of_data(capsys, method: str, data, tmp_path) -> str:
    """The one-line error with which a script ends when main gets these data sets."""
    with pytest.raises(SystemExit) as end:
        METHODS[method].script.main(settings(method, "--out", tmp_path / "run"), data)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in error.split("epoch")[0].strip()
    return error


class Odd(Own):
    """A data set whose items are item(image, label)."""

    def __init__(self, count: int, item, classes: int = 10):
        super().__init__(count, classes)
        self.item = item

    def __getitem__(self, index: int):
        return self.item(self.pixels[index], int(self.labels[index]))


def test_data_that_does_not_fit_is_a_one_line_error(capsys, tmp_path):
    pair = Own(48, classes=10), Own(24, classes=10)
    for method, data, message in (
        ("mae", (Odd(48, lambda x, y: (x / 255, y)), None), "not torch.float32 (3, 24, 24)"),
        ("mae", (Odd(48, lambda x, y: (x.permute(1, 2, 0), y)), None), "C = 1, 3 or 4, not"),
        ("mae", (Odd(48, lambda x, y: (x.numpy(), y)), None), "PIL images or uint8 tensors"),
        ("mae", (Odd(48, lambda x, y: x), None), "must return pairs (image, label)"),
        ("mae", (Odd(48, lambda x, y: (x, y + 9)), None), ", of 10 classes"),
        ("mae", (pair[0], Own(24, classes=9)), "validation images have different .classes"),
        ("mae", (pair[0], Own(0)), "a data set has no images"),
        ("mae", pair[0], "data must be a pair"),
        ("supervised_mim", (pair[0], None), "labels are needed: training and validation images"),
        ("supervised_mim", (Subset(pair[0], range(40)), pair[1]), "a Subset has lost them"),
        ("cmae", (Own(12), None), "--batch-size 16 is more than the 12 images"),
    ):  # fmt: skip
        assert message in error_of_data(capsys, method, data, tmp_path), message


def test_an_augmentation_must_return_uint8():
    images = Own(4)
    with pytest.raises(common.UserError, match="must return images in uint8"):
        common.Views(images, lambda image, label, index: (image / 255, label))[0]
    with pytest.raises(common.UserError, match="must return images in uint8"):
        common.Views(images, lambda image, label, index: (image, image / 255, label))[0]


def test_choices_are_checked_without_the_command_line():
    for cfg, message in (
        (mae_perceptual.Config(variant="gan"), "variant must be one of mae, ssim, ls, msg"),
        (mae_perceptual.Config(size="gigantic"), "size must be one of tiny, small"),
        (eval_linear.Config(encoder=".", mode="kNN"), "mode must be one of linear, knn"),
    ):
        with pytest.raises(common.UserError, match=message):
            cfg.check()


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
        train = common.load_dataset(name, "pretrain", 32, tmp_path)
        val = common.load_dataset(name, "val", 32, tmp_path)
        assert len(train) == (20 if name == "cifar10" else 4) and len(val) == 4
        views = common.Views(val, common.CentreCrop(32))
        pixels = torch.stack([views[i][0] for i in range(4)])
        assert torch.equal(pixels, torch.from_numpy(rows).view(4, 3, 32, 32))  # R, then G, then B
        assert [y for _, y in val] == [0, 1, 0, 1] and list(val.classes) == ["a", "b"]


def test_stl10_from_a_miniature_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test", "unlabeled"):
        rows.tofile(folder / f"{part}_X.bin")
        np.array([1, 2], dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1\n")
    pretrain = common.load_dataset("stl10", "pretrain", 96, tmp_path)
    assert [y for _, y in pretrain] == [0, 1, -1, -1]
    assert common.evenly_spaced(pretrain, 2) == [0, 1]  # only images with labels, for the kNN
    assert common.evenly_spaced(pretrain) == [0, 1, 2, 3]
    train = common.load_dataset("stl10", "train", 96, tmp_path)
    assert [y for _, y in train] == [0, 1]
    stored = torch.from_numpy(rows).transpose(2, 3)  # the files store column after column
    views = common.Views(train, common.CentreCrop(96))
    assert torch.equal(torch.stack([views[0][0], views[1][0]]), stored)


def test_a_failed_download_is_one_clear_error(tmp_path, monkeypatch):
    class Failing:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Failing)
    with pytest.raises(UserError, match="could not download"):
        common.load_dataset("cifar10", "train", 32, tmp_path)
