"""compare.py: its runs are made in miniature and in this process; its tables are made from
hand-written files."""

import collections
import importlib
import itertools
import json
import pathlib
import re
import shutil
import textwrap

import compare
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image
from torchvision.transforms import v2

import common
import eval_linear
import mae_perceptual


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> pathlib.Path:
    """A folder with 64 images in train/ and 32 in val/, of 16 px, in the same ten class folders."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 64, 16, seed=0)
    write_images(folder / "val", 32, 16, seed=2)
    return folder


def pixels_of(file: pathlib.Path) -> torch.Tensor:
    return v2.functional.pil_to_tensor(Image.open(file))


@pytest.fixture
def called(monkeypatch):
    """A list of the commands that compare.py calls. They run in this process."""
    calls = []

    def call(command, log):
        calls.append(command)
        if command[0] == "tests/compare.py":
            return compare.main(command[1:])
        script = importlib.import_module(command[0].removesuffix(".py"))
        flags = [*command[1:], "--workers", "0"]
        script.main(common.parse(script.Config, getattr(script, "PRESETS", {}), flags))

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "scores_of_pixels", lambda *arguments: "")  # takes a minute
    return calls


def run(out, data, *flags) -> None:
    compare.main(["--data", str(data), "--out", str(out), *flags])


def test_rows_are_run_once_and_printed(called, tmp_path, data_folder, capsys):
    seeds = ["--quick", "--seeds", "0", "1", "--rows"]
    run(tmp_path, data_folder, *seeds, "pixels")
    assert len(called) == 2 * 2
    capsys.readouterr()
    run(tmp_path, data_folder, *seeds, "mae", "pixels")
    assert len(called) == 2 * 2 + 2 * 3  # only the runs of MAE are new, and they are fine-tuned
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| MAE |") for line in lines) == 3  # the baseline of three tables
    assert sum(line.startswith("| MIM of pixels |") for line in lines) == 1
    row = next(line for line in lines if line.startswith("| MAE |"))
    quick = tmp_path / "quick"
    frozen = [json.loads(f.read_text()) for f in sorted(quick.glob("mae-*/frozen.json"))]
    assert row.split(" | ")[2] == compare.cell([x["linear, mean"] for x in frozen])
    tuned = [json.loads(f.read_text()) for f in sorted(quick.glob("mae-*/finetune/eval.json"))]
    assert row.split(" | ")[5] == compare.cell([x["finetune"]["top1"] for x in tuned])
    run(tmp_path, data_folder, "--quick", "--tables")
    assert len(called) == 2 * 2 + 2 * 3


def test_features_of_one_pass_have_the_scores_of_eval_linear(called, tmp_path, data_folder):
    run(tmp_path, data_folder, "--quick", "--seeds", "1", "--rows", "mae")
    folder = tmp_path / "quick" / "mae-1"
    found = json.loads((folder / "frozen.json").read_text())
    for mode, key in (("linear", "linear"), ("knn", "kNN")):
        for pool in compare.POOLS:
            flags = [str(folder), "--mode", mode, "--pool", pool, "--seed", "1"]
            flags += ["--device", "cpu", "--workers", "0"]
            eval_linear.main(common.parse(eval_linear.Config, {}, flags))
            entries = json.loads((folder / "eval.json").read_text())
            entry = entries[f"{mode}-mean" if pool == "mean" else mode]
            assert entry["top1"] == found[f"{key}, {pool}"]
            if mode == "knn":
                assert entry["retrieval_1nn"] == found[f"1-NN, {pool}"]


def normalized_images(folder) -> torch.Tensor:
    """The images of all class folders (N, 3, H, W), in order, normalised."""
    files = sorted(folder.glob("*/*"))
    return common.normalize(torch.stack([pixels_of(file) for file in files]))


def test_pixels_are_those_of_the_files(tmp_path, data_folder, monkeypatch):
    """The classifiers get all images of both splits, in 0..1, with the right labels."""
    calls = []

    def evaluate(*arguments):
        *_, train, val, classes = arguments
        calls.append((train, val, classes))
        return {"top1": 10.0 * len(calls)}

    common.write_text(tmp_path / "small.json", '{"linear": 1, "kNN": 2}')
    line = compare.scores_of_pixels(data_folder, tmp_path / "small.json")
    assert line == "Pixels as features: linear 1.0, kNN 2.0"
    monkeypatch.setattr(eval_linear, "evaluate_cached", evaluate)
    monkeypatch.setattr(eval_linear, "evaluate_knn", evaluate)
    line = compare.scores_of_pixels(data_folder, tmp_path / "pixels.json")
    assert line == "Pixels as features: linear 10.0, kNN 20.0"
    assert (tmp_path / "pixels.json").exists()
    names = sorted(path.name for path in (data_folder / "train").iterdir())
    for train, val, classes in calls:
        assert classes == 10
        for split, (features, labels) in (("train", train), ("val", val)):
            files = sorted((data_folder / split).glob("*/*"))
            assert labels.tolist() == [names.index(file.parent.name) for file in files]
            for i in range(0, len(files), 7):
                small = pixels_of(files[i])
                large = v2.functional.resize(small, [36], v2.InterpolationMode.BICUBIC)
                large = large[:, 2:34, 2:34].flatten() / 255
                torch.testing.assert_close(features[i], large, atol=1e-5, rtol=0)


def test_sharpness_by_loops(called, tmp_path, data_folder, capsys):
    run(tmp_path, data_folder, "--quick", "--seeds", "0", "--rows", "raw", "mae")
    header = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| method"))
    assert "| within | borders |" in header
    folder = tmp_path / "quick" / "raw-0"
    assert "within" not in json.loads((tmp_path / "quick" / "mae-0" / "frozen.json").read_text())
    model = mae_perceptual.build(mae_perceptual.Config(**json.loads(
        (folder / "config.json").read_text())))  # fmt: skip
    model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
    imgs = normalized_images(data_folder / "val")
    torch.manual_seed(0)
    with torch.no_grad():
        patches, mask = model(imgs)
    prediction = common.denormalize(common.unpatchify(patches, 4, (4, 4)))
    original, total = common.denormalize(imgs), collections.Counter()
    for n, row, column in itertools.product(range(len(imgs)), range(16), range(16)):
        for other_row, other_column in ((row + 1, column), (row, column + 1)):
            if max(other_row, other_column) > 15:
                continue
            patch = 4 * (row // 4) + column // 4
            other_patch = 4 * (other_row // 4) + other_column // 4
            if not (mask[n, patch] and mask[n, other_patch]):
                continue
            part = "within" if patch == other_patch else "borders"
            for name, x in (("prediction", prediction), ("original", original)):
                change = x[n, :, row, column] - x[n, :, other_row, other_column]
                total[part, name] += change.abs().mean().item()
    found = json.loads((folder / "frozen.json").read_text())
    for part in ("within", "borders"):
        expected = total[part, "prediction"] / total[part, "original"]
        assert found[part] == pytest.approx(expected, rel=1e-4)


def test_learning_rates_are_compared_on_held_out_images(called, tmp_path, data_folder, capsys):
    flags = ["--quick", "--seeds", "0", "--rows", "mae", "--lr", "1e-3", "1e-9"]
    run(tmp_path, data_folder, *flags)
    table, cells = capsys.readouterr().out, []
    for lr in ("1e-3", "1e-9"):
        folder = tmp_path / "quick" / "learning-rates" / f"mae-{lr}-0"
        config = json.loads((folder / "config.json").read_text())
        assert config["lr"] == float(lr) and "learning-rates" in config["data"]
        score = json.loads((folder / "frozen.json").read_text())["linear, mean"]
        cells.append(compare.cell([score]))
    assert f"| MAE | linear, mean | {cells[0]} | {cells[1]} |" in table
    assert len(called) == 2 * 2  # each run is trained and evaluated


def files_in(folder) -> set[pathlib.Path]:
    return {path.resolve() for path in folder.rglob("*.*")}


def test_held_out_images_are_training_images(tmp_path, data_folder):
    folder = compare.link_subset(data_folder, tmp_path, 3, held_out=True)
    train, val = files_in(folder / "train"), files_in(folder / "val")
    classes = len(list((data_folder / "train").iterdir()))
    assert len(train) == 2 * classes and len(val) == classes and not train & val
    training_images = files_in(data_folder / "train")
    assert train | val <= training_images
    folder = compare.link_subset(data_folder, tmp_path / "all", 3)
    assert files_in(folder / "val").isdisjoint(training_images)
    other = shutil.copytree(data_folder, tmp_path / "other")
    with pytest.raises(common.UserError, match=r"has other images than .*other; use another"):
        compare.link_subset(other, tmp_path / "all", 3)
    with pytest.raises(common.UserError, match="has other images than"):
        compare.link_subset(data_folder, tmp_path / "all", 2)  # fewer images
    shutil.rmtree(other / "val")
    for data in (other, tmp_path / "nowhere"):
        with pytest.raises(common.UserError, match="no train/ and val/ with the same class"):
            compare.link_subset(data, tmp_path / "new", 3)


def test_the_folder_that_the_docstring_writes(tmp_path, monkeypatch):
    """The lines are run on a miniature CIFAR-10, in which every image has its own shade of red."""

    class Miniature(list):
        classes = "cat", "dog"

    def cifar10(root, train, download):
        shades = range(0, 60, 10) if train else range(100, 140, 10)
        return Miniature((Image.new("RGB", (4, 4), (x, 0, 0)), x // 10 % 2) for x in shades)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    lines = re.search(r"\n\n(    for split .*?)\n\n", compare.__doc__, re.DOTALL)[1]
    exec(textwrap.dedent(lines), {"torchvision": torchvision, "pathlib": pathlib})
    folder = compare.link_subset(tmp_path / "data" / "cifar10", tmp_path / "subset", 2)
    for split, expected in (("train", [0, 20, 10, 30]), ("val", [100, 120, 110, 130])):
        files = sorted(folder.glob(f"{split}/*/*"))
        assert [int(pixels_of(file)[0, 0, 0]) for file in files] == expected


def test_a_command_is_called_once_and_another_one_is_refused(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(compare, "call", lambda command, log: calls.append(command))
    for _ in range(2):
        compare.call_once(tmp_path / "done", "mae.py --lr 1", "--out", "a folder")
    assert calls == [["mae.py", "--lr", "1", "--out", "a folder"]]
    message = r"belongs to `mae\.py --lr 1`, not to `mae\.py --lr 2`"
    with pytest.raises(common.UserError, match=message):
        compare.call_once(tmp_path / "done", "mae.py --lr 2", "--out", "a folder")


def test_a_run_that_fails_does_not_end_the_others(monkeypatch, tmp_path, data_folder, capsys):
    calls = []

    def call(command, log):
        calls.append(command[0])
        if command[0] == "mixed_ae.py":
            raise common.UserError("exit code 2; see its log")

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "scores_of_pixels", lambda *arguments: "")
    with pytest.raises(common.UserError, match="exit code 2; see its log"):
        run(tmp_path, data_folder, "--seeds", "0", "--rows", "mixed", "mae")
    evaluations = ["tests/compare.py", "eval_linear.py"]  # of MAE; MixedAE was not trained
    assert calls == ["mixed_ae.py", "mae_perceptual.py", *evaluations]
    assert "The commands:" in capsys.readouterr().out


def test_a_command_that_fails_or_ends_well(tmp_path):
    compare.call(["-c", "print('well')"], tmp_path / "log")
    with pytest.raises(common.UserError, match="exit code 3"):
        compare.call(["-c", "exit(3)"], tmp_path / "log")
    assert "well" in (tmp_path / "log").read_text() and not compare.CHILDREN


def test_verdicts_follow_from_the_runs_files(tmp_path):
    """The files are hand-written: CMAE is better than MAE, MixedAE and naive mixing are worse, and
    the difference between Perceptual MAE and MAE is not resolved."""
    linear = {"mae": (50, 51, 52), "cmae": (53, 53.9, 55), "mixed": (49, 50.1, 51),
              "msg-ada": (49, 52, 52), "supervised": (1, 2, 3), "tokens": (9, 9, 9),
              "naive": (48, 48.9, 50)}  # fmt: skip
    for name, values in linear.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            scores = {"linear, mean": value}
            if name in ("mae", "cmae"):
                scores["kNN, mean"] = 2 * value
            (folder / "frozen.json").write_text(json.dumps(scores))
            (folder / "config.json").write_text(json.dumps({"batch_size": 60}))
            line = {"step": 10, "images_per_s": 5.0, "val_top1": 70 - value}
            (folder / "metrics.jsonl").write_text(json.dumps(line))
            (folder / "trained").write_text(f"{compare.ROWS[name].command} --device cpu")
    text = compare.tables(tmp_path, [0, 1, 2])
    lines = text.splitlines()
    assert [line for line in lines if " minus " in line and line.startswith("|")] == [
        "| Perceptual MAE is better than MAE | `msg-ada` minus MAE |"
        "  | +0.0 ± 0.6 *not resolved* |  |  |",
        "| MixedAE is better than MAE | MixedAE minus MAE |"
        "  | **-1.0 ± 0.0** *contradicted* |  |  |",
        "| naive mixing is worse than MAE | naive mixing minus MAE |"
        "  | **-2.0 ± 0.0** *confirmed* |  |  |",
        "| (not a claim) | MixedAE minus naive mixing |  | **+1.1 ± 0.1** |  |  |",
        "| CMAE is better than MAE | CMAE minus MAE |"
        "  | **+3.0 ± 0.0** *confirmed* | **+5.9 ± 0.1** |  |",
        "| MIM of tokens is better than the supervised baseline | MIM of tokens minus supervised |"
        " **-7.0 ± 0.6** *contradicted* |",
    ]
    row = next(line for line in lines if line.startswith("| CMAE |"))
    assert "| 54.0 ± 1.0 |" in row and row.endswith("|  | **+3.0 ± 0.0** | **+5.9 ± 0.1** |  | 2 |")
    assert "| vs MAE, linear, mean |" in text and "| vs supervised, top-1 |" in text
    assert '"vs MAE" is this row minus MAE with the same seed' in text
    assert " minus MAE |" not in compare.tables(tmp_path, [0, 1])  # two seeds give no difference
    assert compare.tables(tmp_path / "none", [0, 1, 2]) == ""  # no table without rows
    for file, command, part in (
        ("mae-2/tuned", "eval_linear.py --mode finetune --epochs 3", "--epochs 3"),
        ("mae-1/trained", compare.ROWS["raw"].command, "--no-norm-pix"),
    ):
        (tmp_path / file).write_text(f"{command} --device cpu")
        with pytest.raises(common.UserError, match=rf"{file} belongs to .*{part} .*, not to"):
            compare.tables(tmp_path, [0, 1, 2])


def test_every_difference_is_printed_in_one_direction():
    pairs = [(name, row.baseline) for name, row in compare.ROWS.items()]
    pairs += [(claim.first, claim.second) for claim in compare.CLAIMS] + compare.LATER
    for first, second in pairs:
        assert (second, first) not in pairs


def test_a_verdict_follows_from_the_sign_of_the_claim():
    positive, negative = compare.Difference(2.0, 0.5), compare.Difference(-2.0, 0.5)
    assert positive.verdict(1) == negative.verdict(-1) == "confirmed"
    assert positive.verdict(-1) == negative.verdict(1) == "contradicted"
    small = compare.Difference(-1.0, 0.5)  # no more than two standard errors
    assert small.verdict(1) == small.verdict(-1) == "not resolved"


def test_the_command_of_every_row_is_accepted():
    for row in compare.ROWS.values():
        if row.command.startswith("supervised_mim.py"):
            assert "--decoder-depth 2" in row.command  # it must not depend on the script's default
        for more in ("", compare.QUICK):
            script, *flags = (row.command + more).split()
            module = importlib.import_module(script.removesuffix(".py"))
            cfg = common.parse(module.Config, module.PRESETS, flags)
            cfg.check()
            if script == "supervised_mim.py":
                module.build(cfg, 10)  # the number of classes
            else:
                module.build(cfg)


def test_differences_are_paired_by_seed():
    one = {0: {"x": 50.0}, 1: {"x": 40.0}, 2: {"x": 30.0}}
    two = {0: {"x": 52.0}, 1: {"x": 41.5}, 2: {"x": 32.5}, 3: {"x": 99.0}}
    assert compare.difference(two, one, "x").text() == "**+2.0 ± 0.3**"
    assert compare.difference(one, two, "x").text() == "**-2.0 ± 0.3**"
    two[2]["x"] = 27.0
    assert compare.difference(two, one, "x").text() == "+0.2 ± 1.6"
    assert compare.difference({0: {"x": 51.0}, 1: {"x": 39.5}}, one, "x") is None
    assert compare.cell([0.5, 0.52, 0.54]) == "0.52 ± 0.02"
    assert compare.cell([50.0]) == "50.0 (n = 1)"
    assert compare.cell([50.0] * 5) == "50.0 ± 0.0 (n = 5)"
