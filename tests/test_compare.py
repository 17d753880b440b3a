"""The plan of the experiment, in miniature and in this process."""

import importlib
import json
from pathlib import Path

import compare
import pytest

import common
import eval_linear


@pytest.fixture
def called(monkeypatch):
    """The commands that were run."""
    calls = []

    def call(command, log):
        calls.append(command)
        if command[0] == str(Path(compare.__file__)):
            return compare.main(command[1:])
        script = importlib.import_module(command[0].removesuffix(".py"))
        flags = [*command[1:], "--workers", "0"]
        script.main(common.parse(script.Config, getattr(script, "PRESETS", {}), flags))

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "pixels", lambda *arguments: "")  # takes a minute
    return calls


def run(out, data, *flags) -> None:
    compare.main(["--data", str(data), "--out", str(out), "--quick", *flags])


def test_rows_are_run_once_and_printed(called, tmp_path, shapes_folder, capsys):
    seeds = ["--seeds", "0", "1", "--rows"]
    run(tmp_path, shapes_folder, *seeds, "pixels")
    assert len(called) == 2 * 2
    capsys.readouterr()
    run(tmp_path, shapes_folder, *seeds, "mae", "untrained", "pixels")
    assert len(called) == 2 * 2 + 2 * 6  # those that were not done
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| MAE |") for line in lines) == 3  # the baseline of three families
    assert sum(line.startswith("| + MIM of pixels |") for line in lines) == 1
    row = next(line for line in lines if line.startswith("| MAE |"))
    found = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("mae-*/frozen.json"))]
    assert row.split(" | ")[2] == compare.cell([x["linear, mean"] for x in found])
    assert "| confirmed |" not in "".join(lines)  # none of the claims has both its rows
    count = len(called)
    run(tmp_path, shapes_folder, "--tables")
    assert len(called) == count


def test_features_of_one_pass_have_the_scores_of_eval_linear(called, tmp_path, shapes_folder):
    run(tmp_path, shapes_folder, "--seeds", "1", "--rows", "mae")
    found = json.loads((tmp_path / "mae-1" / "frozen.json").read_text())
    for mode, key in (("linear", "linear"), ("knn", "kNN")):
        for pool in compare.POOLS:
            flags = [str(tmp_path / "mae-1"), "--mode", mode, "--pool", pool, "--seed", "1"]
            flags += ["--device", "cpu", "--workers", "0"]
            eval_linear.main(common.parse(eval_linear.Config, {}, flags))
            entry = json.loads((tmp_path / "mae-1" / "eval.json").read_text())[mode]
            assert entry["top1"] == found[f"{key}, {pool}"]
            assert entry.get("retrieval_1nn", 0) == found[f"1-NN, {pool}"] * (mode == "knn")


def test_rates_are_compared_on_held_out_images(called, tmp_path, shapes_folder, capsys):
    run(tmp_path, shapes_folder, "--seeds", "0", "--rows", "mae", "--rates", "1e-3", "1e-9")
    table = capsys.readouterr().out
    assert "| MAE | linear, mean | " in table
    for rate in ("1e-3", "1e-9"):
        config = json.loads((tmp_path / "rates" / f"mae-{rate}-0" / "config.json").read_text())
        assert config["lr"] == float(rate) and "rates" in config["data"]
    assert len(called) == 2 * 2  # trained, evaluated


def test_held_out_images_are_training_images(tmp_path, shapes_folder):
    folder = compare.subset(shapes_folder, tmp_path, 3, held_out=True)
    train, val = ({x.name for x in (folder / split).rglob("*.*")} for split in ("train", "val"))
    ours = {x.name for x in (shapes_folder / "train").rglob("*.*")}
    classes = len(list((shapes_folder / "train").iterdir()))
    assert len(train) == 2 * classes and len(val) == classes
    assert not train & val and train | val <= ours


def test_every_row_s_command_is_accepted():
    for row in compare.ROWS.values():
        script, *flags = row.command.split()
        module = importlib.import_module(script.removesuffix(".py"))
        common.parse(module.Config, module.PRESETS, flags)


def test_differences_are_paired_by_seed():
    one = {0: {"x": 50.0}, 1: {"x": 40.0}, 2: {"x": 30.0}}
    two = {0: {"x": 52.0}, 1: {"x": 41.5}, 2: {"x": 32.5}, 3: {"x": 99.0}}
    assert compare.paired(two, one, "x") == ("**+2.0 ± 0.3**", 1)
    assert compare.paired(one, two, "x") == ("**-2.0 ± 0.3**", -1)
    assert compare.paired({0: {"x": 51.0}, 1: {"x": 39.5}}, one, "x") == ("+0.2 ± 0.7", 0)
    assert compare.paired({0: {"x": 51.0}}, one, "x") == ("", 0)
    assert compare.cell([0.5, 0.52]) == "0.51 ± 0.01" and compare.cell([50.0]) == "50.0, one seed"
