"""The linear probe, kNN and fine-tuning are compared with slow independent versions."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, error_of, in_processes, weights
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

import common
import eval_linear
from eval_linear import LARS, layer_decay_groups


def test_lars_equals_its_formula():
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2), torch.randn(3)
    p, b = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    optimizer = LARS([p, b], lr=0.3, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
    weight, weight_momentum = weight.double(), torch.zeros(3, 2).double()
    bias, bias_momentum = bias.double(), torch.zeros(3).double()
    for _ in range(5):
        p.grad, b.grad = torch.randn(3, 2), torch.randn(3)
        optimizer.step()
        step = p.grad.double() + 0.1 * weight
        step = step * 0.02 * math.sqrt((weight**2).sum()) / math.sqrt((step**2).sum())
        weight_momentum = 0.9 * weight_momentum + step
        weight = weight - 0.3 * weight_momentum
        bias_momentum = 0.9 * bias_momentum + b.grad.double()  # 1-D parameters are not scaled
        bias = bias - 0.3 * bias_momentum
    torch.testing.assert_close(p.double(), weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.double(), bias, atol=1e-5, rtol=1e-5)
    zero = nn.Parameter(torch.zeros(2, 2))  # its norm is 0, so its step is not scaled either
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=0.5).step()
    assert torch.equal(zero.data, torch.full((2, 2), -0.5))


def test_knn_scores_equal_a_loop():
    """Several k are tested; one of them is larger than the training set."""
    torch.manual_seed(0)
    train, labels, test = torch.randn(30, 4), torch.randint(0, 3, (30,)), torch.randn(7, 4)
    ks = (1, 5, 20, 99)
    got = common.knn_scores(train, labels, test, num_classes=4, ks=ks, temperature=0.07)
    assert tuple(got) == ks
    for i in range(7):
        cosines = [(a @ test[i] / a.norm() / test[i].norm()).item() for a in train]
        nearest = sorted(range(30), key=lambda j: -cosines[j])
        for k in ks:
            votes = [0.0] * 4
            for j in nearest[:k]:
                votes[labels[j]] += math.exp(cosines[j] / 0.07)
            torch.testing.assert_close(got[k][i], torch.tensor(votes), rtol=1e-4, atol=1e-2)
    scores = common.knn_scores(train, labels, test, num_classes=4, temperature=1.0)
    assert tuple(scores) == (20,)  # the default k
    assert scores[20].sum(dim=1).max() < 20 * math.e  # 20 votes of at most exp(1 / 1.0)


def test_knn_in_chunks_equals_one_image_at_a_time():
    """There are so many training images that 700 test images are divided into two chunks."""
    torch.manual_seed(0)
    train, labels, test = torch.randn(100_000, 8), torch.randint(5, (100_000,)), torch.randn(700, 8)
    scores = common.knn_scores(train, labels, test, num_classes=5)[20]
    assert scores.shape == (700, 5)
    for i in (0, 670, 671, 699):
        one = common.knn_scores(train, labels, test[i : i + 1], num_classes=5)[20]
        torch.testing.assert_close(scores[i], one[0], rtol=1e-4, atol=1.0)


def test_knn_against_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    train, labels = torch.randn(400, 8), torch.randint(0, 5, (400,))
    test = torch.randn(300, 8)
    scores = common.knn_scores(train, labels, test, num_classes=5)[20]

    def votes(distance):
        return np.exp((1 - distance) / 0.07)

    theirs = neighbors.KNeighborsClassifier(20, metric="cosine", weights=votes)
    theirs.fit(train.numpy(), labels.numpy())
    agree = (torch.from_numpy(theirs.predict(test.numpy())) == scores.argmax(1)).float().mean()
    assert agree > 0.99


def test_the_entry_of_knn_has_the_accuracy_of_every_k():
    torch.manual_seed(0)
    labels = torch.randint(0, 8, (700,))
    # All cosines are high, so that distant neighbours count, too, and the scores depend on k.
    features = 4 + torch.randn(8, 6)[labels] + torch.randn(700, 6)
    train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
    got = eval_linear.evaluate_knn(train, test, 8)
    expected = {}
    for k in (1, 10, 20, 100, 200):
        scores = common.knn_scores(*train, test[0], num_classes=8, ks=(k,))[k]
        expected[f"k{k}"] = common.accuracy(scores, test[1])
    assert len({x["top1"] for x in expected.values()}) > 2
    top1 = expected.pop("k1")["top1"]
    assert got == expected["k20"] | {"retrieval_1nn": top1} | expected


def test_layer_decay_equals_its_formula():
    encoder = common.ViT(16, 4, embed_dim=12, depth=3, num_heads=2)
    model = eval_linear.FineTuned(encoder, 5, "mean")
    groups = layer_decay_groups(model, 1e-3, 0.05, 0.65)
    found = {id(p): g for g in groups for p in g["params"]}
    expected = {
        "encoder.cls_token": (0, False), "encoder.pos_embed": (0, False),
        "encoder.patch_embed.proj.weight": (0, True), "encoder.patch_embed.proj.bias": (0, False),
        "encoder.blocks.0.attn.qkv.weight": (1, True), "encoder.blocks.2.mlp.fc2.weight": (3, True),
        "encoder.blocks.2.norm1.bias": (3, False), "norm.weight": (4, False),
        "head.weight": (4, True), "head.bias": (4, False),
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    for name, (layer, decays) in expected.items():
        group = found[id(parameters[name])]
        assert group["lr_scale"] == pytest.approx(0.65 ** (3 + 1 - layer)), name
        assert group["lr"] == pytest.approx(1e-3 * 0.65 ** (4 - layer))
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert found.keys() == {id(p) for p in parameters.values()}
    assert sum(len(g["params"]) for g in groups) == len(parameters)
    assert len(layer_decay_groups(encoder, 1e-3, 0.05, 0.65)) == 8  # a bare ViT works too


def test_recipes_are_the_published_table():
    table = {768: (100, 5e-4, 0.65, 0.1), 1024: (50, 1e-3, 0.75, 0.2), 1280: (50, 1e-3, 0.75, 0.3)}
    for width, row in table.items():
        r = eval_linear.recipe("finetune", width)
        assert (r["epochs"], r["base_lr"], r["layer_decay"], r["drop_path"]) == row
        assert (r["batch_size"], r["weight_decay"], r["warmup_epochs"]) == (1024, 0.05, 5)
        r = eval_linear.recipe("linear", width)
        assert r["epochs"] == (90 if width == 768 else 50)
        assert (r["base_lr"], r["batch_size"], r["weight_decay"]) == (0.1, 16384, 0)


def test_accuracy_is_a_count():
    scores = torch.tensor([[9, 1, 2, 3, 4, 5.0], [0, 1, 2, 3, 4, 5.0], [5, 4, 3, 2, 1, 0.0]])
    assert eval_linear.accuracy(scores, torch.tensor([0, 1, 5])) == {"top1": 33.33, "top5": 66.67}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_those_of_the_test_crops_one_by_one(pool):
    """There are more images than fit in a batch. Drop path is off while features are computed, and
    the encoder is in training mode again afterwards."""
    vit = common.ViT(16, 4, embed_dim=12, depth=2, num_heads=2, drop_path=0.5)
    images = TensorDataset(*common.draw_shapes(260, 20, 0))
    run = common.Run(eval_linear.Config(encoder="", device="cpu", workers=0, pool=pool))
    features, labels = eval_linear.all_features(run, vit, images)
    assert features.shape == (260, 12) and torch.equal(labels, images.tensors[1]) and vit.training
    vit.eval()
    for i in (0, 1, 249, 250, 259):
        image, label = images[i]
        crop = v2.functional.resize(image, [18], v2.InterpolationMode.BICUBIC)[:, 1:17, 1:17]
        with torch.no_grad():
            tokens = vit(common.normalize(crop[None]))[0]
        expected = tokens[0] if pool == "cls" else tokens[1:].mean(dim=0)
        torch.testing.assert_close(features[i], expected, atol=1e-5, rtol=1e-4)
        assert labels[i] == label


def test_fine_tuning_head_normalises_the_mean_of_unnormalised_patches():
    encoder = common.ViT(16, 4, embed_dim=12, depth=1, num_heads=2)
    imgs = torch.randn(2, 3, 16, 16)
    x = encoder.blocks[0](encoder.embed(imgs))[:, 1:].mean(1)
    model = eval_linear.FineTuned(encoder, 5, "mean")
    nn.init.normal_(model.head.weight)
    expected = model.head(F.layer_norm(x, (12,), eps=1e-6))
    torch.testing.assert_close(model(imgs), expected)


# ------------------------------------------------------------------------------ augmentation


def test_erased_pixels_are_normal_noise_and_the_rest_stays():
    """The box and the noise are torchvision's own, drawn from the same random numbers. The pixels
    follow the formula, computed in numpy."""
    image = torch.randint(256, (3, 32, 24), dtype=torch.uint8)
    mean, std = (np.array(x)[:, None, None] for x in (common.MEAN, common.STD))
    for seed in range(20):
        torch.manual_seed(seed)
        torch.rand(1)  # decides whether to erase at all
        box = v2.RandomErasing(1.0, value="random").make_params([image])
        top, left, h, w = (box[name] for name in "ijhw")
        expected = image.clone().numpy()
        noise = 255 * (mean + std * box["v"].numpy().astype(np.float64))
        expected[:, top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255)
        torch.manual_seed(seed)
        erased = eval_linear.NormalErasing(1.0, value="random")(image)
        assert erased.dtype == torch.uint8 and erased.shape == image.shape
        difference = (erased.int() - torch.from_numpy(expected).int()).abs()
        # fp32 and fp64 may round a value near .5 differently.
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
        outside = torch.ones(32, 24, dtype=torch.bool)
        outside[top : top + h, left : left + w] = False
        assert torch.equal(erased[:, outside], image[:, outside]) and h * w < 0.4 * 32 * 24


def test_erased_pixels_are_standard_normal_after_normalisation():
    """Pixels are integers from 0 to 255, so the noise is compared with normal random numbers of
    numpy that are rounded and clipped in the same way."""
    torch.manual_seed(0)
    erase, grey = eval_linear.NormalErasing(1.0, value="random"), 200
    image, found = torch.full((3, 64, 64), grey, dtype=torch.uint8), []
    for _ in range(60):
        erased = erase(image)
        found.append(erased[:, (erased != grey).any(dim=0)])
    found = torch.cat(found, dim=1)
    normalised = common.normalize(found[None, :, :, None])[0, :, :, 0].numpy()
    rng = np.random.default_rng(0)
    for channel in range(3):
        mean, std = common.MEAN[channel], common.STD[channel]
        pixels = np.clip(np.rint(255 * (mean + std * rng.standard_normal(200_000))), 0, 255)
        expected, ours = (pixels / 255 - mean) / std, normalised[channel]
        assert len(ours) > 30_000
        assert ours.mean() == pytest.approx(expected.mean(), abs=0.02)
        assert ours.std() == pytest.approx(expected.std(), abs=0.02)
        assert abs(ours.mean()) < 0.03 and 0.95 < ours.std() < 1.0
        for level in (-2, -1, 0, 1, 2):
            assert (ours < level).mean() == pytest.approx((expected < level).mean(), abs=0.01)


def test_an_image_in_which_no_box_fits_stays_as_it_is():
    image = torch.full((3, 1, 1), 7, dtype=torch.uint8)
    assert torch.equal(eval_linear.NormalErasing(1.0, value="random")(image), image)


def test_fine_tuning_augments_as_in_mae():
    """A random crop is followed by two operations of RandAugment, each with probability 1/2, and by
    erasing with the given probability. The label does not change."""
    never, always, half = (eval_linear.Augment(16, 0.5, p) for p in (0.0, 1.0, 0.5))
    assert len(half.change.transforms) == 2
    for sometimes in half.change.transforms:
        (one,) = sometimes.transforms
        assert sometimes.p == 0.5 and isinstance(one, v2.RandAugment)
        assert (one.num_ops, one.magnitude, one.num_magnitude_bins) == (1, 9, 11)
    image, erased = common.draw_shapes(1, 20, 0)[0][0], 0
    for seed in range(200):
        views = []
        for augment in (never, always, half):
            torch.manual_seed(seed)
            view, label = augment(image, 5, 0)
            assert view.shape == (3, 16, 16) and view.dtype == torch.uint8 and label == 5
            views.append(view)
        torch.manual_seed(seed)
        assert torch.equal(never.change(never.crop(image, 5, 0)[0]), views[0])
        changed = (views[1] != views[0]).any(dim=0)
        assert 0 < changed.float().mean() < 0.4
        assert torch.equal(views[2], views[0]) or torch.equal(views[2], views[1])
        erased += torch.equal(views[2], views[1])
    assert 75 < erased < 125


# ------------------------------------------------------------------------------ the script


def noise_of(rng, light: bool, *shape: int) -> np.ndarray:
    """Pixels of one of two classes that differ in brightness."""
    level = 160 if light else 60
    return rng.integers(level - 40, level + 40, shape).astype(np.uint8)


@pytest.fixture(scope="session")
def easy_folder(tmp_path_factory):
    """A folder with two classes that every working evaluation tells apart."""
    folder, rng = tmp_path_factory.mktemp("easy"), np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 16)):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = noise_of(rng, name == "light", 16, 16, 3)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


class OwnImages(Dataset):
    """A user's data set of the same two classes. Its PIL images differ in shape."""

    def __init__(self, count: int):
        self.count, self.classes = count, ["dark", "light"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        rng, label = np.random.default_rng(index), index % 2
        return Image.fromarray(noise_of(rng, label == 1, 20, 16 + index % 9, 3)), label


@pytest.fixture()
def encoder_file(easy_folder, tmp_path):
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=24, depth=2, num_heads=3)
    common.save_encoder(tmp_path / "encoder.pt", vit, {"data": str(easy_folder)})
    return tmp_path / "encoder.pt"


MODES = {
    "cached": ["--mode", "linear"],
    "linear": ["--mode", "linear", "--no-cache-features", "--epochs", "20", "--batch-size", "16",
               "--lr", "8", "--min-crop", "0.9"],
    "knn": ["--mode", "knn"],
    "finetune": ["--mode", "finetune", "--epochs", "10", "--batch-size", "16", "--lr", "0.002",
                 "--accumulate", "2"],
}  # fmt: skip


def evaluate(file, mode: str, *flags, data=None) -> dict:
    """Evaluates an encoder.pt, or the folder that contains it; returns the entry in eval.json."""
    arguments = [str(file), *MODES[mode], "--workers", "0", "--device", "cpu"]
    eval_linear.main(common.parse(eval_linear.Config, {}, [*arguments, *flags]), data)
    folder = file if file.is_dir() else file.parent
    key = "linear-protocol" if mode == "linear" else MODES[mode][1]
    return json.loads((folder / "eval.json").read_text())[key]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_solves_an_easy_task_with_the_encoder_it_is_given(mode, encoder_file, capsys):
    entry = evaluate(encoder_file, mode, "--baseline")
    top1, untrained = entry["top1"], entry["untrained"]["top1"]
    assert top1 > 90 and untrained > 90 and entry["top5"] == 100
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{MODES[mode][1]} top-1 {top1:.1f} (untrained {untrained:.1f})"
    if mode == "finetune":
        return
    content = torch.load(encoder_file, weights_only=True)
    content["model"]["norm.weight"].zero_()  # now all features are the same
    torch.save(content, encoder_file)
    assert evaluate(encoder_file, mode)["top1"] < 60


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_evaluates_on_a_users_own_data_sets(mode, encoder_file):
    """eval.json then names no data set, although the encoder's own has a name."""
    short = ["--epochs", "4"] if mode == "finetune" else []
    entry = evaluate(encoder_file, mode, *short, data=(OwnImages(64), OwnImages(16)))
    assert entry["top1"] > 90 and entry["settings"]["data"] is None


def test_an_encoder_of_own_data_sets_needs_data_to_be_evaluated_on(
    easy_folder, encoder_file, capsys
):
    content = torch.load(encoder_file, weights_only=True)
    torch.save(content | {"config": {"data": None, "data_dir": "data"}}, encoder_file)
    line = error_of(capsys, eval_linear, encoder_file, "--mode", "knn", "--device", "cpu")
    assert "does not say what it was trained on" in line and "--data" in line
    named = evaluate(encoder_file, "knn", "--data", str(easy_folder))
    assert named["top1"] > 90 and named["settings"]["data"] == str(easy_folder)
    assert evaluate(encoder_file, "knn", data=(OwnImages(64), OwnImages(16)))["top1"] > 90


@pytest.mark.parametrize("classes, message", [
    (None, "labels are needed"), ([], "labels are needed"),
    (["light", "dark"], "different .classes"),
])  # fmt: skip
def test_own_data_sets_need_the_same_classes(classes, message, encoder_file, capsys):
    train, val = OwnImages(64), OwnImages(16)
    if classes is None:
        del val.classes
    else:
        val.classes = classes
    pairs = [(train, val)]
    if message == "labels are needed":
        pairs.append((train, None))
    for data in pairs:
        with pytest.raises(SystemExit) as end:
            evaluate(encoder_file, "knn", data=data)
        assert message in error_line(end.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("mode, flags, expected", [
    ("linear", [], 1), ("linear", ["--batch-size", "2048"], 4), ("finetune", [], 2),
    ("linear", ["--batch-size", "2048", "--accumulate", "2"], 2),
    ("linear", ["--batch-size", "2000"], 4), ("linear", ["--batch-size", "511"], 1),
    ("linear", ["--batch-size", "1537"], 29),
])  # fmt: skip
def test_the_full_probe_takes_512_images_at_a_time(
    mode, flags, expected, encoder_file, monkeypatch
):
    seen = []

    def trained(run, *arguments) -> dict:
        seen.append(run.cfg.accumulate)
        return {"top1": 0.0}

    monkeypatch.setattr(eval_linear, f"evaluate_{mode}", trained)
    evaluate(encoder_file, mode, *flags)
    assert seen == [expected]


def test_fine_tuning_mixes_smooths_and_erases(encoder_file, monkeypatch):
    seen, made = [], []
    cross_entropy, augment = F.cross_entropy, eval_linear.Augment

    def spied_loss(scores, targets, **options):
        seen.append((targets, options))
        return cross_entropy(scores, targets, **options)

    def spied_augment(*arguments):
        made.append(arguments)
        return augment(*arguments)

    monkeypatch.setattr(eval_linear.F, "cross_entropy", spied_loss)
    monkeypatch.setattr(eval_linear, "Augment", spied_augment)
    evaluate(encoder_file, "finetune", "--steps", "3")
    assert made == [(16, 0.08, 0.25)]
    for targets, options in seen:
        assert targets.shape == (8, 2) and options == {"label_smoothing": 0.1}
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert any(((t > 0.01) & (t < 0.99)).any() for t, _ in seen)  # some labels are mixed
    seen.clear()
    flags = ["--steps", "1", "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--restart",
             "--erasing", "0.5", "--min-crop", "0.3"]  # fmt: skip
    evaluate(encoder_file, "finetune", *flags)
    assert seen[0][0].dtype == torch.int64 and seen[0][1] == {"label_smoothing": 0.0}
    assert made[1:] == [(16, 0.3, 0.5)]


def test_layer_decay_reaches_the_optimiser(encoder_file):
    evaluate(encoder_file, "finetune", "--steps", "7")
    (folder,) = encoder_file.parent.glob("eval-finetune-*")
    groups = weights(folder, "optimizer")["param_groups"]
    peak = max(group["lr"] for group in groups)
    assert {round(g["lr_scale"], 6) for g in groups} == {round(0.65**i, 6) for i in range(4)}
    for group in groups:
        assert group["lr"] == pytest.approx(peak * group["lr_scale"])
        assert group["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("every, epochs", [(1, [1, 2, 3]), (2, [2, 3]), (0, [])])
def test_validation_is_due_every_so_many_epochs_and_at_the_end(every, epochs, encoder_file):
    entry = evaluate(encoder_file, "finetune", "--epochs", "3", "--val-every", str(every))
    (file,) = encoder_file.parent.glob("eval-finetune-*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [x["epoch"] for x in lines if "top1" in x] == epochs
    evaluate(encoder_file, "finetune", "--epochs", "3", "--restart")
    last = json.loads(file.read_text().splitlines()[-1])
    assert entry["top1"] == last["top1"]  # validations in between do not change the result


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_training_is_resumed_whoever_asks_for_it(mode, encoder_file, capsys):
    """A training is resumed with --baseline or without, and by the encoder's file or its folder. A
    training of other weights is not resumed."""
    first = evaluate(encoder_file, mode, "--steps", "5")
    assert "resumed after" not in capsys.readouterr().out
    both = evaluate(encoder_file.parent, mode, "--steps", "5", "--baseline")
    assert capsys.readouterr().out.count("resumed after step 5") == 1  # the baseline is new
    again = evaluate(encoder_file, mode, "--steps", "5", "--baseline")
    assert capsys.readouterr().out.count("resumed after step 5") == 2
    assert first["top1"] == both["top1"] == again["top1"]
    assert both["untrained"] == again["untrained"]
    evaluate(encoder_file, mode, "--steps", "9")
    assert capsys.readouterr().out.count("resumed after step 5") == 1
    content = torch.load(encoder_file, weights_only=True)
    content["model"]["norm.bias"] += 1
    torch.save(content, encoder_file)
    evaluate(encoder_file, mode, "--steps", "1")
    assert "resumed after" not in capsys.readouterr().out


def test_a_training_on_other_images_of_the_same_number_is_not_resumed(encoder_file, capsys):
    """A head of other images, of which some may be the validation images, has a wrong score."""
    data = OwnImages(64), OwnImages(16)
    evaluate(encoder_file, "linear", "--steps", "5", data=data)
    evaluate(encoder_file, "linear", "--steps", "5", data=data)
    assert capsys.readouterr().out.count("resumed after step 5") == 1

    class Swapped(OwnImages):
        def __getitem__(self, index: int):
            return super().__getitem__(index + 1)

    for other in ((Swapped(64), data[1]), (data[0], Swapped(16))):
        evaluate(encoder_file, "linear", "--steps", "5", data=other)
        assert "resumed after" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_features_that_are_not_finite_have_no_score(mode, encoder_file, capsys):
    content = torch.load(encoder_file, weights_only=True)
    content["model"]["norm.bias"][0] = torch.nan
    torch.save(content, encoder_file)
    flags = [encoder_file, "--mode", mode, "--device", "cpu"]
    assert "features are not finite" in error_of(capsys, eval_linear, *flags)


def test_two_processes_evaluate_as_one(encoder_file):
    """The number of images is odd, so the two processes get different numbers of them."""
    folder = common.read_checkpoint(encoder_file)["config"]["data"]
    next((Path(folder) / "val" / "dark").iterdir()).unlink()
    one = evaluate(encoder_file, "knn")
    assert in_processes(2, evaluate, encoder_file, "knn") == [0, 0]
    two = json.loads((encoder_file.parent / "eval.json").read_text())["knn"]
    assert one == two


def test_eval_json_keeps_other_evaluations(encoder_file):
    first = evaluate(encoder_file, "cached")
    evaluate(encoder_file, "cached", "--pool", "mean")
    evaluate(encoder_file, "linear", "--epochs", "1")
    evaluate(encoder_file, "knn", "--pool", "cls")
    entries = json.loads((encoder_file.parent / "eval.json").read_text())
    assert entries.keys() == {"linear", "linear-mean", "linear-protocol", "knn"}
    assert entries["linear"] == first
    assert {"k10", "k20", "k100", "k200", "retrieval_1nn"} <= entries["knn"].keys()


def test_logistic_regression_equals_newtons_method():
    """Newton's method with a dense Hessian of all weights finds the same minimum."""
    torch.manual_seed(0)
    x = torch.randn(300, 5).double() @ torch.randn(5, 5).double() * torch.logspace(-2, 1, 5)
    x, labels = x - x.mean(0), (x[:, 1:4] + 0.5 * torch.randn(300, 3)).argmax(1)

    def objective_of(w, l2):  # (18,): weight (3, 5), bias (3,)
        scores = x @ w[:15].view(3, 5).T + w[15:]
        loss = (scores.exp().sum(1).log() - scores[torch.arange(300), labels]).mean()
        return loss + l2 / 2 * (w[:15] ** 2).sum()

    for l2 in (1.0, 1e-2, 1e-4):
        objective = functools.partial(objective_of, l2=l2)
        w = torch.zeros(18).double()
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(objective, w)
            step = torch.linalg.pinv(torch.autograd.functional.hessian(objective, w)) @ gradient
            while objective(w - step) > objective(w):
                step = step / 2
            w = w - step
        # Five unit vectors and zero as test images: their scores reveal the weight and the bias.
        scores = eval_linear.logistic_regression(x, labels, torch.eye(6, 5).double(), 3, l2)
        weight, bias = (scores[:5] - scores[5]).T, scores[5]
        best, got = objective(w), objective(torch.cat([weight.flatten(), bias]))
        assert 0 <= got - best + 1e-12 < 1e-6
        limit = 0.02 * w[:15].abs().max()
        torch.testing.assert_close(weight.flatten(), w[:15], atol=limit, rtol=0)
        torch.testing.assert_close(bias - bias.mean(), w[15:] - w[15:].mean(), atol=limit, rtol=0)


def probe(train, test, **settings) -> dict:
    """The result of the cached probe for pairs of features and labels."""
    run = common.Run(eval_linear.Config(encoder="", device="cpu", out="", **settings))
    return eval_linear.evaluate_cached(run, train, test, int(train[1].max()) + 1)


def test_cached_probe_is_as_good_as_the_best_linear_classifier():
    """The features are Gaussian classes. No classifier beats Bayes' rule, which is linear here."""
    torch.manual_seed(0)
    scale = torch.logspace(-1, 1, 16)  # the channels have very different scales
    centres, labels = 0.7 * torch.randn(6, 16) * scale, torch.randint(0, 6, (8000,))
    features = 100 + centres[labels] + torch.randn(8000, 16) * scale
    distance = torch.cdist((features - 100) / scale, centres / scale)
    bayes = eval_linear.accuracy(-distance[4000:], labels[4000:])["top1"]
    train, test = (features[:4000], labels[:4000]), (features[4000:], labels[4000:])
    got = probe(train, test)
    assert 60 < bayes < 95 and abs(got["top1"] - bayes) < 1.5
    # The probe standardises channels itself, so scaling them beforehand changes nothing.
    scaled = [((x - 100) / scale, y) for x, y in (train, test)]
    assert probe(*scaled, weight_decay=1.0) == probe(train, test, weight_decay=1.0)


def test_cached_probe_holds_training_images_out_to_choose_its_weight():
    torch.manual_seed(2)
    labels = torch.randint(0, 2, (4500,))
    features = torch.randn(4500, 150)
    features[:, 0] += 2 * labels
    few, many = (features[:500], labels[:500]), (features[500:], labels[500:])
    chosen = probe(few, many)
    weakest = probe(few, many, weight_decay=1e-5)
    assert chosen["top1"] > weakest["top1"] + 3 and weakest["weight_decay"] == 1e-5
    again = probe(few, many, weight_decay=chosen["weight_decay"])
    assert again == chosen
    # The final classifier is trained on all training images.
    std, mean = torch.std_mean(few[0].double(), dim=0)
    train, test = (few[0] - mean) / std, (many[0] - mean) / std
    scores = eval_linear.logistic_regression(train, few[1], test, 2, chosen["weight_decay"])
    expected = common.accuracy(scores, many[1])["top1"]
    assert chosen["top1"] == pytest.approx(expected, abs=0.05)
    wrong = probe(few, (many[0], 1 - many[1]))  # test labels have no influence on the choice
    assert wrong["weight_decay"] == chosen["weight_decay"]
    assert wrong["top1"] == pytest.approx(100 - chosen["top1"], abs=0.02)


@pytest.mark.parametrize("arguments, message", [
    (["absent"], "no such run folder or file"),
    (["ENCODER", "--mode", "walk"], "invalid choice: 'walk'"),
    (["ENCODER", "--data", "absent"], "no such folder"),
    (["ENCODER", "--epochs", "0"], "--epochs must be at least 1"),
    (["ENCODER", "--drop-path", "2"], "--drop-path must be at most 1"),
    (["ENCODER", "--mode", "finetune", "--erasing", "1.5"], "--erasing must be at most 1"),
    (["ENCODER", "--lr", "1"], "--lr belongs to the full protocol"),
    (["ENCODER", "--batch-size", "16", "--cache-features"], "add --no-cache-features"),
    (["ENCODER", "--batch-size", "1", "--no-cache-features"], "BatchNorm needs at least 2 images"),
])  # fmt: skip
def test_mistakes_are_one_line_errors_with_exit_code_2(arguments, message, encoder_file, capsys):
    arguments = [encoder_file if a == "ENCODER" else a for a in arguments]
    assert message in error_of(capsys, eval_linear, *arguments)
