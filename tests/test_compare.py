"""The plan of the experiment, in miniature and in this process."""

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
    """train/ (64 images) and val/ (32), 16 px, with all ten class folders in both."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 64, 16, seed=0)
    write_images(folder / "val", 32, 16, seed=2)
    return folder


def pixels_of(file: pathlib.Path) -> torch.Tensor:
    return v2.functional.pil_to_tensor(Image.open(file))


@pytest.fixture
def called(monkeypatch):
    """The commands that were run."""
    calls = []

    def call(command, log):
        calls.append(command)
        if command[0] == "tests/compare.py":
            return compare.main(command[1:])
        script = importlib.import_module(command[0].removesuffix(".py"))
        flags = [*command[1:], "--workers", "0"]
        script.main(common.parse(script.Config, getattr(script, "PRESETS", {}), flags))

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "pixels", lambda *arguments: "")  # takes a minute
    return calls


def run(out, data, *flags) -> None:
    compare.main(["--data", str(data), "--out", str(out), *flags])


def test_rows_are_run_once_and_printed(called, tmp_path, data_folder, capsys):
    seeds = ["--quick", "--seeds", "0", "1", "--rows"]
    run(tmp_path, data_folder, *seeds, "pixels")
    assert len(called) == 2 * 2
    capsys.readouterr()
    run(tmp_path, data_folder, *seeds, "mae", "pixels")
    assert len(called) == 2 * 2 + 2 * 3  # those that were not done
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| MAE |") for line in lines) == 3  # the baseline of three families
    assert sum(line.startswith("| + MIM of pixels |") for line in lines) == 1
    row = next(line for line in lines if line.startswith("| MAE |"))
    quick = tmp_path / "quick"
    found = [json.loads(f.read_text()) for f in sorted(quick.glob("mae-*/frozen.json"))]
    assert row.split(" | ")[2] == compare.cell([x["linear, mean"] for x in found])
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
            entry = entries[mode + "-mean" * (pool == "mean")]
            assert entry["top1"] == found[f"{key}, {pool}"]
            assert entry.get("retrieval_1nn", 0) == found[f"1-NN, {pool}"] * (mode == "knn")


def pictures(folder) -> torch.Tensor:
    """The images of all class folders (N, 3, H, W), in order, normalised."""
    files = sorted(folder.glob("*/*"))
    return common.normalize(torch.stack([pixels_of(file) for file in files]))


def test_pixels_are_those_of_the_files(tmp_path, data_folder, monkeypatch):
    """All of both splits, in fractions of 255, with the number of their class folder."""
    scored = []

    def score(*arguments):
        *_, train, val, classes = arguments
        scored.append((train, val, classes))
        return {"top1": 10.0 * len(scored)}

    common.write_text(tmp_path / "small.json", '{"linear": 1, "kNN": 2}')
    assert compare.pixels(data_folder, tmp_path / "small.json") == \
        "the pixels: linear 1.0, kNN 2.0"
    monkeypatch.setattr(eval_linear, "evaluate_cached", score)
    monkeypatch.setattr(eval_linear, "evaluate_knn", score)
    line = compare.pixels(data_folder, tmp_path / "pixels.json")
    assert line == "the pixels: linear 10.0, kNN 20.0" and (tmp_path / "pixels.json").exists()
    for *sets, classes in scored:
        assert classes == 10
        for (found, labels), split in zip(sets, ("train", "val"), strict=True):
            files = sorted((data_folder / split).glob("*/*"))
            names = sorted({file.parent.name for file in (data_folder / "train").glob("*/*")})
            assert labels.tolist() == [names.index(file.parent.name) for file in files]
            for i in range(0, len(files), 7):
                small = pixels_of(files[i])
                large = v2.functional.resize(small, [36], v2.InterpolationMode.BICUBIC)
                large = large[:, 2:34, 2:34].flatten() / 255
                torch.testing.assert_close(found[i], large, atol=1e-5, rtol=0)


def test_sharpness_by_loops(called, tmp_path, data_folder, capsys):
    run(tmp_path, data_folder, "--quick", "--seeds", "0", "--rows", "raw", "mae")
    header = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| method"))
    assert "| within | borders |" in header
    folder = tmp_path / "quick" / "raw-0"
    assert "within" not in json.loads((tmp_path / "quick" / "mae-0" / "frozen.json").read_text())
    model = mae_perceptual.build(mae_perceptual.Config(**json.loads(
        (folder / "config.json").read_text())))  # fmt: skip
    model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
    imgs = pictures(data_folder / "val")
    torch.manual_seed(0)
    with torch.no_grad():
        patches, mask = model(imgs)
    painted = common.denormalize(common.unpatchify(patches, 4, (4, 4)))
    true, total = common.denormalize(imgs), collections.Counter()
    for n, row, column in itertools.product(range(len(imgs)), range(16), range(16)):
        for below, right in ((row + 1, column), (row, column + 1)):
            places = (row // 4, column // 4), (below // 4, right // 4)
            if max(below, right) > 15 or not all(mask[n, r * 4 + c] for r, c in places):
                continue
            part = "within" if places[0] == places[1] else "borders"
            for name, x in (("painted", painted), ("true", true)):
                change = x[n, :, row, column] - x[n, :, below, right]
                total[part, name] += change.abs().mean().item()
    found = json.loads((folder / "frozen.json").read_text())
    for part in ("within", "borders"):
        assert found[part] == pytest.approx(total[part, "painted"] / total[part, "true"], rel=1e-4)


def test_rates_are_compared_on_held_out_images(called, tmp_path, data_folder, capsys):
    flags = ["--quick", "--seeds", "0", "--rows", "mae", "--rates", "1e-3", "1e-9"]
    run(tmp_path, data_folder, *flags)
    table, found = capsys.readouterr().out, []
    for rate in ("1e-3", "1e-9"):
        folder = tmp_path / "quick" / "rates" / f"mae-{rate}-0"
        config = json.loads((folder / "config.json").read_text())
        assert config["lr"] == float(rate) and "rates" in config["data"]
        found.append(json.loads((folder / "frozen.json").read_text())["linear, mean"])
    first, second = map(compare.cell, ([x] for x in found))
    assert f"| MAE | linear, mean | {first} | {second} |" in table
    assert len(called) == 2 * 2  # trained, evaluated


def test_held_out_images_are_training_images(tmp_path, data_folder):
    folder = compare.subset(data_folder, tmp_path, 3, held_out=True)
    train, val = ({x.resolve() for x in (folder / y).rglob("*.*")} for y in ("train", "val"))
    classes = len(list((data_folder / "train").iterdir()))
    assert len(train) == 2 * classes and len(val) == classes and not train & val
    ours = {x.resolve() for x in (data_folder / "train").rglob("*.*")}
    assert train | val <= ours
    folder = compare.subset(data_folder, tmp_path / "all", 3)
    assert {x.resolve() for x in (folder / "val").rglob("*.*")}.isdisjoint(ours)
    other = shutil.copytree(data_folder, tmp_path / "other")
    with pytest.raises(common.UserError, match=r"has other images than .*other; use another"):
        compare.subset(other, tmp_path / "all", 3)
    with pytest.raises(common.UserError, match="has other images than"):
        compare.subset(data_folder, tmp_path / "all", 2)  # fewer
    shutil.rmtree(other / "val")
    for data in (other, tmp_path / "nowhere"):
        with pytest.raises(common.UserError, match="no train/ and val/ with the same class"):
            compare.subset(data, tmp_path / "new", 3)


def test_the_folder_that_the_docstring_writes(tmp_path, monkeypatch):
    class Miniature(list):
        classes = "cat", "dog"

    def cifar10(root, train, download):
        colours = range(0, 60, 10) if train else range(100, 140, 10)
        return Miniature((Image.new("RGB", (4, 4), (c, 0, 0)), c // 10 % 2) for c in colours)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    lines = re.search(r"\n\n(    for split .*?)\n\n", compare.__doc__, re.DOTALL)[1]
    exec(textwrap.dedent(lines), {"torchvision": torchvision, "pathlib": pathlib})
    folder = compare.subset(tmp_path / "data" / "cifar10", tmp_path / "subset", 2)
    red = {split: [Image.open(x).getpixel((0, 0))[0] for x in sorted(folder.glob(f"{split}/*/*"))]
           for split in ("train", "val")}  # fmt: skip
    assert red == {"train": [0, 20, 10, 30], "val": [100, 120, 110, 130]}


def test_what_is_done_is_that_very_command(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(compare, "call", lambda command, log: calls.append(command))
    for _ in range(2):
        compare.once(tmp_path / "done", "mae.py --lr 1", "--out", "a folder")
    assert calls == [["mae.py", "--lr", "1", "--out", "a folder"]]
    with pytest.raises(common.UserError, match=r"is of `mae\.py --lr 1`, not of `mae\.py --lr 2`"):
        compare.once(tmp_path / "done", "mae.py --lr 2", "--out", "a folder")


def test_a_run_that_fails_does_not_end_the_others(monkeypatch, tmp_path, data_folder, capsys):
    calls = []

    def call(command, log):
        calls.append(command[0])
        if command[0] == "mixed_ae.py":
            raise common.UserError("exit code 2; see its log")

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "pixels", lambda *arguments: "")
    with pytest.raises(common.UserError, match="exit code 2; see its log"):
        run(tmp_path, data_folder, "--seeds", "0", "--rows", "mixed", "mae")
    evaluate = ["tests/compare.py", "eval_linear.py"]  # but not what was not trained
    assert calls == ["mixed_ae.py", "mae_perceptual.py", *evaluate]
    assert "The commands:" in capsys.readouterr().out


def test_a_command_that_fails_or_ends_well(tmp_path):
    compare.call(["-c", "print('well')"], tmp_path / "log")
    with pytest.raises(common.UserError, match="exit code 3"):
        compare.call(["-c", "exit(3)"], tmp_path / "log")
    assert "well" in (tmp_path / "log").read_text() and not compare.CHILDREN


def test_verdicts_follow_from_the_runs_files(tmp_path):
    """Hand-written files: CMAE is above MAE, MixedAE below, Perceptual MAE neither."""
    linear = {"mae": (50, 51, 52), "cmae": (53, 53.9, 55), "mixed": (49, 50.1, 51),
              "msg-ada": (49, 52, 52), "supervised": (1, 2, 3), "tokens": (9, 9, 9),
              "naive": (48, 48.9, 50)}  # fmt: skip
    for name, values in linear.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            found = {"linear, mean": value}
            if name in ("mae", "cmae"):
                found["kNN, mean"] = 2 * value
            (folder / "frozen.json").write_text(json.dumps(found))
            (folder / "config.json").write_text(json.dumps({"batch_size": 60}))
            line = {"step": 10, "images_per_s": 5.0, "val_top1": 70 - value}
            (folder / "metrics.jsonl").write_text(json.dumps(line))
            (folder / "trained").write_text(f"{compare.ROWS[name].command} --device cpu")
    lines = compare.tables(tmp_path, [0, 1, 2]).splitlines()
    verdicts = [line for line in lines if "above" in line or "less naive" in line]
    assert verdicts == [
        "| Perceptual MAE is above MAE |  | +0.0 ± 0.6 *not resolved* |  |  |",
        "| MixedAE is above MAE |  | **-1.0 ± 0.0** *contradicted* |  |  |",
        "| MixedAE, less naive mixing |  | **+1.1 ± 0.1** |  |  |",  # not declared
        "| CMAE is above MAE |  | **+3.0 ± 0.0** *confirmed* | **+5.9 ± 0.1** |  |",
        "| tokens are above the supervised baseline | **-7.0 ± 0.6** *contradicted* |",
    ]
    row = next(line for line in lines if line.startswith("| + positions: CMAE |"))
    assert "| 54.0 ± 1.0 |" in row and row.endswith("|  | **+3.0 ± 0.0** | **+5.9 ± 0.1** |  | 2 |")
    assert "is above" not in compare.tables(tmp_path, [0, 1])  # two seeds: no verdict
    assert compare.tables(tmp_path / "none", [0, 1, 2]) == ""  # no table without rows
    for file, command, found in (
        ("mae-2/tuned", "eval_linear.py --mode finetune --epochs 3", "--epochs 3"),
        ("mae-1/trained", compare.ROWS["raw"].command, "--no-norm-pix"),
    ):
        (tmp_path / file).write_text(f"{command} --device cpu")
        with pytest.raises(common.UserError, match=rf"{file} is of .*{found} .*, not of"):
            compare.tables(tmp_path, [0, 1, 2])


def test_every_row_s_command_is_accepted():
    for row in compare.ROWS.values():
        if row.command.startswith("supervised_mim.py"):
            assert "--decoder-depth 2" in row.command  # whatever the script's default is
        for more in ("", compare.QUICK):
            script, *flags = (row.command + more).split()
            module = importlib.import_module(script.removesuffix(".py"))
            cfg = common.parse(module.Config, module.PRESETS, flags)
            cfg.check()
            module.build(cfg, *[10] * (script == "supervised_mim.py"))


def test_differences_are_paired_by_seed():
    one = {0: {"x": 50.0}, 1: {"x": 40.0}, 2: {"x": 30.0}}
    two = {0: {"x": 52.0}, 1: {"x": 41.5}, 2: {"x": 32.5}, 3: {"x": 99.0}}
    assert compare.paired(two, one, "x") == ("**+2.0 ± 0.3**", 1)
    assert compare.paired(one, two, "x") == ("**-2.0 ± 0.3**", -1)
    two[2]["x"] = 27.0
    assert compare.paired(two, one, "x") == ("+0.2 ± 1.6", 0)
    assert compare.paired({0: {"x": 51.0}, 1: {"x": 39.5}}, one, "x") == ("", 0)
    assert compare.cell([0.5, 0.52, 0.54]) == "0.52 ± 0.02"
    assert compare.cell([50.0]) == "50.0 (n = 1)"
    assert compare.cell([50.0] * 5) == "50.0 ± 0.0 (n = 5)"
