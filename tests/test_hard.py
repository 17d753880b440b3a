"""Hard use: runs are killed at any moment, disks get full, processes are lost, and command lines
are random. The long versions take an hour and run with `pytest -m slow`."""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from conftest import (
    FORKS,
    METHODS,
    ROOT,
    TINY,
    assert_same_state,
    call_with,
    error_line,
    in_processes,
    metrics,
    train,
    weights,
    write_images,
)

import cmae
import common
import eval_linear
import mae_perceptual
import mixed_ae
import supervised_mim

# The five entry points; Perceptual MAE is run with and without a discriminator.
ENTRIES = ["mae", "msg-ada", "mixed_ae", "cmae", "supervised_mim", "finetune"]


def begin(entry: str, out, data, encoder, *flags) -> None:
    """Starts or resumes a run of the entry point."""
    if entry == "finetune":
        script, presets = eval_linear, {}
        flags = [encoder, "--mode", "finetune", "--data", data, "--epochs", "3", "--device", "cpu",
                 "--batch-size", "16", "--accumulate", "2", "--out", out, *flags]  # fmt: skip
        script.main(common.parse(script.Config, presets, [*map(str, flags), "--workers", "0"]))
    else:
        train(entry, out, data, *METHODS[entry].run_flags, *flags)


@pytest.fixture(scope="session")
def entry(whole_run, tmp_path_factory, shapes_folder):
    """entry(name) returns two things: the arguments of `begin` after `out`, and the folder of an
    uninterrupted run."""
    folder = tmp_path_factory.mktemp("finetune")

    def made(name: str):
        arguments = shapes_folder, whole_run("mae") / "encoder.pt"
        if name != "finetune":
            return arguments, whole_run(name)
        if not any(folder.iterdir()):
            begin(name, folder, *arguments)
        return arguments, folder

    return made


def assert_same_runs(one: Path, two: Path) -> None:
    """All checkpoints of two runs are equal bit for bit, and so are all metrics except speeds."""
    folders = sorted(x.parent for x in one.rglob("checkpoint.pt"))
    others = sorted(x.parent for x in two.rglob("checkpoint.pt"))
    assert folders and len(folders) == len(others)
    for folder, other in zip(folders, others, strict=True):
        assert_same_state(folder, other)
        for line, other_line in zip(metrics(folder), metrics(other), strict=True):
            for name in line.keys() - {"images_per_s", "data_wait"}:
                assert other_line[name] == line[name], name
    assert not list(two.rglob("*.tmp"))


# ------------------------------------------------------------------------------ killed


def start(function, *arguments) -> multiprocessing.Process:
    environment = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    process = FORKS.Process(target=call_with, args=(environment, function, arguments))
    process.start()
    return process


def die_at_write(number: int, moment: int, *arguments) -> None:
    """Begins a run and sends itself signal `number` when a file is renamed into place. Moments 0
    and 1 are just before and just after the first file is renamed; 2 and 3 belong to the second."""
    rename, moments = os.replace, itertools.count()

    def replace(*paths):
        if next(moments) == moment:
            os.kill(os.getpid(), number)
        rename(*paths)
        if next(moments) == moment:
            os.kill(os.getpid(), number)

    os.replace = replace
    begin(*arguments)


def kill_at_every_write(name, entry, folder: Path, moments) -> int:
    """Runs are killed at these moments, resumed, and compared with a run that was not killed.
    Returns how many were killed."""
    arguments, expected = entry(name)
    for moment in moments:
        out = folder / str(moment)
        process = start(die_at_write, signal.SIGKILL, moment, name, out, *arguments)
        process.join()
        if process.exitcode == 0:  # there are no more files to write
            return moment
        assert process.exitcode == -signal.SIGKILL
        begin(name, out, *arguments)
        assert_same_runs(expected, out)
        shutil.rmtree(out)
    return len(moments)


def test_killed_while_saving(entry, tmp_path):
    kill_at_every_write("mae", entry, tmp_path, (7, 14))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_killed_at_every_write(name, entry, tmp_path):
    print(kill_at_every_write(name, entry, tmp_path, range(1000)), "moments")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("name", ENTRIES)
def test_killed_at_random_moments(name, number, entry, tmp_path):
    """Runs are interrupted by 20 signals in all. An interrupted run is resumed until it ends; then
    the next one starts."""
    (arguments, expected), draw = entry(name), random.Random(name)
    interruptions, finished, seconds = 0, 0, 20.0
    while interruptions < 20:
        begun = time.monotonic()
        process = start(begin, name, tmp_path / str(finished), *arguments, "--save-minutes",
                        draw.choice(["0", "0.005", "15"]))  # fmt: skip
        process.join(draw.uniform(0.2, 1) * seconds)
        with contextlib.suppress(ProcessLookupError):  # the process may have just ended
            os.kill(process.pid, number)
        process.join()
        if process.exitcode == 0:
            seconds = time.monotonic() - begun
            assert_same_runs(expected, tmp_path / str(finished))
            finished += 1
        else:  # -number: SIGKILL, or a signal before the run has installed its handler
            assert process.exitcode in (-number, 128 + number)
            interruptions += 1
    begin(name, tmp_path / str(finished), *arguments)
    assert_same_runs(expected, tmp_path / str(finished))
    print(f"{interruptions} signals in {finished + 1} runs of {seconds:.1f} s")


def signal_all(number: int, step: int, *arguments) -> None:
    """Trains, and sends signal `number` in step `step` to the run and to its loader's processes."""
    update = common.Run.update

    def update_and_signal(run, *args, **kwargs):
        update(run, *args, **kwargs)
        if run.step == step:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)

    common.Run.update = update_and_signal
    train(*arguments)


def test_a_signal_to_all_processes_does_not_stop_the_loader(tmp_path):
    """The loader's processes deliver the images with which the step is finished. They end with the
    run."""
    write_images(tmp_path / "data", 64, 24, seed=0, labelled=False)
    flags = ["mae", tmp_path / "run", tmp_path / "data", "--epochs", "2", "--accumulate", "4"]
    begun = time.monotonic()
    arguments = (signal.SIGTERM, 5, *flags, "--workers", "2")
    assert in_processes(1, signal_all, *arguments) == [143]
    assert time.monotonic() - begun < 60 and weights(tmp_path / "run", "step") == 6
    train(*flags)
    assert weights(tmp_path / "run", "step") == 8


# ------------------------------------------------------------------------------ processes



@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "cmae"])
def test_two_and_three_processes_have_the_losses_of_one(method, tmp_path, shapes_folder, tokenizer):
    """There are ten epochs of one step, with 48 of 64 images. CMAE is left out, because its
    contrastive loss compares images across processes; test_cmae.py tests it. `ls` has a larger
    tolerance, because BatchNorm's running statistics change once per micro-batch of a process."""
    flags = ["--epochs", "10", "--batch-size", "48", "--knn-every", "0", "--recon-every", "50"]
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    losses = {}
    for world in (1, 2, 3):
        arguments = [method, tmp_path / str(world), shapes_folder, *flags]
        arguments += ["--accumulate", str(6 // world)]
        assert in_processes(world, train, *arguments) == [0] * world
        losses[world] = [line["loss"] for line in metrics(tmp_path / str(world))]
    tolerance = 1e-2 if method == "ls" else 1e-5
    for world in (2, 3):
        assert losses[world] == pytest.approx(losses[1], rel=tolerance)


def launch(*arguments, nodes=1, port=29555, processes=2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes),
               "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"localhost:{port}", *map(str, arguments)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path, shapes_folder):
    flags = [*TINY, *METHODS["mae"].model_flags, "--data", shapes_folder, "--out", tmp_path]
    job = launch("mae_perceptual.py", *flags, "--epochs", "3000", "--knn-every", "0")
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    begun = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, errors = job.communicate(timeout=90)
    print(f"all had ended after {time.monotonic() - begun:.1f} s\n{errors}")
    assert job.returncode and time.monotonic() - begun < 60
    assert "stopped after step" in output or "gloo" in errors or "SIGTERM" in errors
    step = weights(tmp_path, "step")
    job = launch("mae_perceptual.py", *flags, "--epochs", "3000", "--steps", str(step + 5))
    output, errors = job.communicate(timeout=90)
    assert job.returncode == 0 and f"resumed after step {step}" in output, errors


@pytest.mark.slow
def test_two_nodes(tmp_path, shapes_folder):
    flags = [*TINY, *METHODS["mae"].model_flags, "--data", shapes_folder, "--epochs", "2"]
    jobs = [launch("mae_perceptual.py", *flags, "--out", tmp_path / "two", nodes=2,
                   processes=1) for _ in range(2)]  # fmt: skip
    for job in jobs:
        _, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors
    train("mae", tmp_path / "one", shapes_folder, "--epochs", "2", "--accumulate", "2")
    one, two = (metrics(tmp_path / name)[-1]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


# ------------------------------------------------------------------------------ disks


def begin_on_a_small_disk(stderr, *arguments) -> None:
    with open(stderr, "w") as file, contextlib.redirect_stderr(file):
        begin(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid(), reason="mounts a disk")
@pytest.mark.parametrize("name", ENTRIES)
def test_a_full_disk(name, entry, tmp_path):
    """Larger and larger disks are tried until one suffices. A run whose disk is too small must end
    with a one-line error; then its disk is enlarged, and it is resumed."""
    (arguments, expected), stderr, disk = entry(name), tmp_path / "stderr", tmp_path / "disk"
    needed = sum(path.stat().st_size for path in expected.rglob("*")) // 1024
    failed = 0
    for size in itertools.chain((8, 12), itertools.count(needed // 12, needed // 12)):
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        subprocess.run(mount, check=True)
        try:
            process = start(begin_on_a_small_disk, stderr, name, disk / "run", *arguments)
            process.join()
            if process.exitcode:
                error = error_line(process.exitcode, stderr.read_text())
                assert "No space left" in error or "could not write" in error
                assert not list(disk.rglob("*.tmp"))
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                start(begin, name, disk / "run", *arguments).join()
            assert_same_runs(expected, disk / "run")
        finally:
            subprocess.run(["umount", disk], check=True)
            disk.rmdir()
        if not process.exitcode:
            break
        failed += 1
    print(f"{failed} disks were too small, {size} KiB suffice")
    assert failed > 5


# ------------------------------------------------------------------------------ numbers


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bf16_ends_where_fp32_does(method, tmp_path, shapes_folder, tokenizer):
    """The last epoch's mean loss differs by at most 2 %. Where the loss depends on a discriminator,
    the pixel loss is compared."""
    flags = ["--steps", "50", "--epochs", "20", "--knn-every", "0", "--recon-every", "50"]
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    ends = []
    for precision in ("fp32", "bf16"):
        train(method, tmp_path / precision, shapes_folder, *flags, "--precision", precision)
        *_, line = metrics(tmp_path / precision)
        ends.append(line["pix"] if "pix" in line else line["loss"])
    print(f"fp32 {ends[0]:.5f}, bf16 {ends[1]:.5f}")
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


# ------------------------------------------------------------------------------ command lines

VALUES = {
    int: ["-1", "0", "1", "2", "3", "4", "8", "16", "x", "1.5", ""],
    float: ["-1", "0", "1e-9", "0.1", "0.3", "0.5", "0.75", "1", "2", "nan", "inf", "1e400", "x"],
    "size": ["tiny", "small", "bogus"],
    "img_size": ["8", "16", "20", "24", "0", "-4", "17"],
    "epochs": ["1", "3", "0", "100000"],
    "seed": ["0", "7", "-1", str(2**40)],
    "batch_size": ["1", "2", "3", "8", "16", "64", "65", "0"],
    "workers": ["0", "1", "-1"],
    "device": ["cpu", "auto", "cuda", "tpu"],
    "out": ["other", "", "data"],
    "data_dir": ["here", ""],
    "data": ["data", "flat", "data/val", "missing", "", "junk.pt", "broken"],
    "init_from": ["encoder.pt", "junk.pt", "missing", "data", "tokenizer.pt"],
    "tokenizer": ["tokenizer.pt", "junk.pt", "missing", "encoder.pt"],
    "encoder": ["encoder.pt", "run", "junk.pt", "missing", "data"],
}


def random_flags(draw: random.Random, config_class, names: list[str]) -> list[str]:
    hints, flags = typing.get_type_hints(config_class), []
    for name in names:
        kind, flag = hints[name], f"--{name.replace('_', '-')}"
        if type(None) in typing.get_args(kind):  # kind is X | None
            kind, _ = typing.get_args(kind)
        if kind is bool:
            flags += [draw.choice([flag, flag.replace("--", "--no-", 1)])]
        else:
            choices = [*typing.get_args(kind), "bogus"]  # if kind is a Literal
            values = VALUES.get(name) or VALUES.get(kind) or choices
            flags += [flag, draw.choice(values)]
    return flags


@pytest.fixture(scope="session")
def playground(tmp_path_factory, whole_run, tokenizer, shapes_folder):
    """A folder with good and bad files, which random command lines name."""
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(shapes_folder, folder / "data")
    write_images(folder / "flat", 64, 16, seed=0, labelled=False)
    write_images(folder / "broken", 20, 20, seed=0, labelled=False)
    for path in sorted((folder / "broken").iterdir())[:10]:
        path.write_bytes(path.read_bytes()[:60])
    shutil.copytree(whole_run("mae"), folder / "run")
    shutil.copy(whole_run("mae") / "encoder.pt", folder)
    shutil.copy(tokenizer, folder)
    (folder / "junk.pt").write_text("junk")
    return folder


def fuzz(script, count: int, seed: int, folder: Path) -> tuple[int, int, list[str]]:
    """Runs `count` random command lines, each of which should train for two steps or end with a
    one-line error. Returns how many trained, how many were refused, and what else happened."""
    draw, presets = random.Random(seed), getattr(script, "PRESETS", {})
    trained, refused, failures = 0, 0, []
    fields = [field.name for field in dataclasses.fields(script.Config)]
    known = [x for x in fields if x not in ("compile", "encoder", "steps")]  # compiling is slow
    small = {mae_perceptual: "msg-ada", supervised_mim: "supervised_mim", eval_linear: None,
             mixed_ae: "mixed_ae", cmae: "cmae"}[script]  # fmt: skip
    for _ in range(count):
        out = folder / "out"
        flags = random_flags(draw, script.Config, draw.sample(known, draw.randint(0, 4)))
        if small:
            base = [*TINY, *METHODS[small].model_flags, "--knn-every", "0", "--recon-every", "9"]
            if script is mae_perceptual:
                base += ["--variant", draw.choice(["mae", "ls", "msg", "msg-ada"])]
            if script is supervised_mim and draw.random() < 0.7:
                base += ["--tokenizer", "tokenizer.pt"]
        else:
            encoder = draw.choice(["encoder.pt"] * 8 + VALUES["encoder"])
            mode = draw.choice(["linear", "knn", "finetune"])
            base = [encoder, "--mode", mode, "--workers", "0", "--device", "cpu"]
            base += ["--batch-size", "16"] if mode == "finetune" else []
        command = [*base, "--data", "data", "--out", str(out), "--steps", "2", *flags]
        stdout, stderr, code = io.StringIO(), io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                script.main(common.parse(script.Config, presets, command))
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            failures.append(f"{type(error)}: {error}: {' '.join(command)}")
        lines = re.sub(r"warning: skipping unreadable .*\n", "", stderr.getvalue())
        if code and (code != 2 or lines.count("\n") != 1):
            failures.append(f"{code}, {lines}: {' '.join(command)}")
        if code:
            refused += 1
        else:
            trained += 1
        for path in (out, folder / "other"):
            shutil.rmtree(path, ignore_errors=True)
    return trained, refused, failures


@pytest.mark.parametrize("count", [5, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", [mae_perceptual, mixed_ae, cmae, supervised_mim, eval_linear])
def test_random_command_lines_train_or_end_with_a_one_line_error(
    script, count, playground, monkeypatch
):
    monkeypatch.chdir(playground)
    trained, refused, failures = fuzz(script, count, count, playground)
    print(f"{trained} trained, {refused} refused")
    assert trained and refused and not failures, "\n\n".join(failures)
