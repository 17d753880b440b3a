"""Hard use: runs killed at any moment, disks filled, processes lost, command lines of nonsense. The
long versions take an hour: pytest -m slow."""

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

# The five entry points, of Perceptual MAE with and without D.
ENTRIES = ["mae", "msg-ada", "mixed_ae", "cmae", "supervised_mim", "finetune"]


def begin(entry: str, out, data, encoder, *flags) -> None:
    """A run of the entry point, or what is left of it."""
    if entry == "finetune":
        script, presets = eval_linear, {}
        flags = [encoder, "--mode", "finetune", "--data", data, "--epochs", "3", "--device", "cpu",
                 "--batch-size", "16", "--accumulate", "2", "--out", out, *flags]  # fmt: skip
        script.main(common.parse(script.Config, presets, [*map(str, flags), "--workers", "0"]))
    else:
        train(entry, out, data, *METHODS[entry].run_flags, *flags)


@pytest.fixture(scope="session")
def entry(whole_run, tmp_path_factory, shapes_folder):
    """entry(name): the arguments of begin, but for the folder, and the folder of a whole run."""
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
    """All checkpoints, bit for bit, and all metrics but speeds."""
    found = [sorted(x.rglob("checkpoint.pt")) for x in (one, two)]
    assert found[0] and len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert_same_state(a.parent, b.parent)
        for x, y in zip(metrics(a.parent), metrics(b.parent), strict=True):
            names = x.keys() - {"images_per_s", "data_wait"}
            assert {k: x[k] for k in names} == {k: y[k] for k in names}
    assert not list(two.rglob("*.tmp"))


# ------------------------------------------------------------------------------ killed


def start(function, *arguments) -> multiprocessing.Process:
    place = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    process = FORKS.Process(target=call_with, args=(place, function, arguments))
    process.start()
    return process


def die_at_write(number: int, moment: int, *arguments) -> None:
    """The signal comes before (an even moment) or after a file is renamed into place."""
    rename, calls = os.replace, iter(range(10**9))

    def replace(*paths):
        call = next(calls)
        if moment == 2 * call:
            os.kill(os.getpid(), number)
        rename(*paths)
        if moment == 2 * call + 1:
            os.kill(os.getpid(), number)

    os.replace = replace
    begin(*arguments)


def kill_at_every_write(name, entry, folder: Path, moments) -> int:
    """Runs killed, gone on with, and compared with one that was not. Returns how many."""
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
    """20 signals land in runs, of which the next may go on with what the last has left."""
    (arguments, expected), draw = entry(name), random.Random(name)
    landed, finished, length = 0, 0, 20.0
    while landed < 20:
        begun = time.monotonic()
        process = start(begin, name, tmp_path / str(finished), *arguments, "--save-minutes",
                        draw.choice(["0", "0.005", "15"]))  # fmt: skip
        process.join(draw.uniform(0.2, 1) * length)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, number)
        process.join()
        if process.exitcode == 0:
            length = time.monotonic() - begun
            assert_same_runs(expected, tmp_path / str(finished))
            finished += 1
        else:  # a signal before the run has begun is not ours
            assert process.exitcode in (-number, 128 + number)
            landed += 1
    begin(name, tmp_path / str(finished), *arguments)
    assert_same_runs(expected, tmp_path / str(finished))
    print(f"{landed} signals in {finished + 1} runs of {length:.1f} s")


def signal_all(number: int, step: int, *arguments) -> None:
    """The signal comes to the run and to its loader's processes."""
    update = common.Run.update

    def update_and_signal(run, *args, **kwargs):
        update(run, *args, **kwargs)
        if run.step == step:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)

    common.Run.update = update_and_signal
    train(*arguments)


def test_a_signal_to_all_processes_spares_the_loader_s(tmp_path):
    """The step is finished with the images that they bring, and they do not outlive the run."""
    write_images(tmp_path / "data", 64, 24, seed=0, labelled=False)
    flags = ["mae", tmp_path / "run", tmp_path / "data", "--epochs", "2", "--accumulate", "4"]
    begun = time.monotonic()
    arguments = (signal.SIGTERM, 5, *flags, "--workers", "2")
    assert in_processes(1, signal_all, *arguments) == [143]
    assert time.monotonic() - begun < 60 and weights(tmp_path / "run", "step") == 6
    train(*flags)
    assert weights(tmp_path / "run", "step") == 8


# ------------------------------------------------------------------------------ processes


def one_step_epochs(method: str, out, data, encoder) -> list:
    flags = ["--epochs", "10", "--batch-size", "48", "--knn-every", "0", "--recon-every", "50"]
    flags += ["--tokenizer", encoder] if method == "supervised_mim" else []
    return [method, out, data, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "cmae"])
def test_two_and_three_processes_have_the_losses_of_one(method, tmp_path, shapes_folder, tokenizer):
    """Ten steps of 48 of 64 images. (cmae compares images of all processes: see its own test. In
    `ls`, BatchNorm's running statistics move once a micro-batch, in each process.)"""
    losses = {}
    for world in (1, 2, 3):
        flags = one_step_epochs(method, tmp_path / str(world), shapes_folder, tokenizer)
        assert in_processes(world, train, *flags, "--accumulate", str(6 // world)) == [0] * world
        losses[world] = [line["loss"] for line in metrics(tmp_path / str(world))]
    apart = [max(abs(b / a - 1) for a, b in zip(losses[1], losses[n], strict=True)) for n in (2, 3)]
    print(f"relative differences {apart}")
    assert max(apart) < (1e-2 if method == "ls" else 1e-5)


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
    """Disks of all sizes up to one that suffices; then the same one, larger."""
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
    """The mean loss of 48 to 50 steps, within 2 %; of pixels, where the loss has a D's in it."""
    flags = ["--steps", "50", "--epochs", "20", "--knn-every", "0", "--recon-every", "50"]
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    ends = []
    for precision in ("fp32", "bf16"):
        train(method, tmp_path / precision, shapes_folder, *flags, "--precision", precision)
        *_, line = metrics(tmp_path / precision)
        ends.append(line["loss" if "pix" not in line else "pix"])
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
        if type(None) in typing.get_args(kind):
            kind, _ = typing.get_args(kind)  # of X | None
        if kind is bool:
            flags += [draw.choice([flag, flag.replace("--", "--no-", 1)])]
        else:
            pool = VALUES.get(name) or VALUES.get(kind) or [*typing.get_args(kind), "bogus"]
            flags += [flag, draw.choice(pool)]
    return flags


@pytest.fixture(scope="session")
def playground(tmp_path_factory, whole_run, tokenizer, shapes_folder):
    """A folder of good and bad files."""
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
    """So many random command lines: each trains for two steps, or ends in one line. How many did,
    and what the others ended in."""
    draw, tally, presets = random.Random(seed), [0, 0], getattr(script, "PRESETS", {})
    failures = []
    fields = [field.name for field in dataclasses.fields(script.Config)]
    known = [x for x in fields if x not in ("compile", "encoder", "steps")]  # one takes a minute
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
        tally[code > 0] += 1
        for path in (out, folder / "other"):
            shutil.rmtree(path, ignore_errors=True)
    return *tally, failures


@pytest.mark.parametrize("count", [5, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", [mae_perceptual, mixed_ae, cmae, supervised_mim, eval_linear])
def test_random_command_lines_train_or_end_in_one_line(script, count, playground, monkeypatch):
    monkeypatch.chdir(playground)
    trained, refused, failures = fuzz(script, count, count, playground)
    print(f"{trained} trained, {refused} refused")
    assert trained and refused and not failures, "\n\n".join(failures)
