"""The plan of the experiment, in miniature and in this process."""

import importlib
import json

import compare
import pytest

import common


@pytest.fixture
def called(monkeypatch):
    """The commands that were run."""
    calls = []

    def call(command, log):
        calls.append(command)
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
    run(tmp_path, shapes_folder, *seeds, "mae", "pixels")
    assert len(called) == 2 * 2 + 2 * 6  # those that were not done
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| MAE |") for line in lines) == 3  # the baseline of three families
    assert sum(line.startswith("| + MIM of pixels |") for line in lines) == 1
    scores = [json.loads(file.read_text())["linear"]["top1"]
              for file in sorted(tmp_path.glob("mae-*/linear-mean/eval.json"))]  # fmt: skip
    row = next(line for line in lines if line.startswith("| MAE |"))
    assert row.split(" | ")[2] == compare.cell(scores)
    count = len(called)
    run(tmp_path, shapes_folder, "--tables")
    assert len(called) == count


def test_held_out_images_are_training_images(tmp_path, shapes_folder):
    folder = compare.subset(shapes_folder, tmp_path, 3, held_out=1)
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
    assert compare.paired(two, one, "x") == "**+2.0 ± 0.3**"
    assert compare.paired({0: {"x": 51.0}, 1: {"x": 39.5}}, one, "x") == "+0.2 ± 0.7"
    assert compare.paired({0: {"x": 51.0}}, one, "x") == ""
    assert compare.cell([0.5, 0.52]) == "0.51 ± 0.01" and compare.cell([50.0]) == "50.0, one seed"
