"""What the tests share: the smallest run of each method, checks of runs, processes, data."""

import faulthandler
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # models are too small for two, which wait for each other

import cmae  # noqa: E402
import common  # noqa: E402
import mae_perceptual  # noqa: E402
import mixed_ae  # noqa: E402
import supervised_mim  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long tests, which only -m slow runs")
    config.terminal = os.dup(2)  # what pytest does not capture


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(autouse=True)
def time_limit(request):
    """A test that hangs ends the session, with a traceback that names it."""
    if "slow" not in request.keywords:
        faulthandler.dump_traceback_later(600, exit=True, file=request.config.terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


# ------------------------------------------------------------------------------ methods

# The smallest model that has every part; flags of all pre-training scripts.
TINY = ["--img-size", "16", "--patch-size", "4", "--depth", "1", "--batch-size", "16",
        "--workers", "0", "--device", "cpu"]  # fmt: skip
DECODER = ["--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2"]
GAN = ["--depth", "3", *DECODER, "--decoder-depth", "3", "--disc-width", "32",
       "--refresh-epochs", "0.5", "--adv-weight", "0.7", "--variant"]  # fmt: skip


class Method(NamedTuple):
    script: ModuleType
    small: list[str]  # beside TINY
    whole: list[str]  # of the run that the fixture `whole` makes, in epochs of four steps
    stops: list[list[str]]  # flags of the pieces in which the same run is made once more


def at(*steps: int) -> list[list[str]]:
    return [["--steps", str(n)] for n in steps]


# Stops are in the middle and at the ends of epochs: with boxes to be renewed (cmae), between two
# checks of p, two R1 steps, two copies of D (gan), in the tokenizer's training and between it and
# the model's (supervised).
gan = ["--epochs", "6", "--accumulate", "2", "--recon-every", "3"], at(3, 17, 24)
METHODS = {
    "mae": Method(
        mae_perceptual, [*DECODER, "--variant", "mae"],
        ["--epochs", "3", "--accumulate", "2", "--knn-every", "2", "--recon-every", "2"],
        at(3, 5, 12),
    ),
    "ssim": Method(
        mae_perceptual, [*DECODER, "--variant", "ssim"],
        ["--epochs", "3", "--accumulate", "2", "--recon-every", "2"], at(3, 12),
    ),
    "ls": Method(mae_perceptual, [*GAN, "ls"], *gan),
    "msg": Method(mae_perceptual, [*GAN, "msg"], *gan),
    "msg-ada": Method(mae_perceptual, [*GAN, "msg-ada"], *gan),
    "mixed_ae": Method(
        mixed_ae, ["--depth", "2", *DECODER],
        ["--epochs", "3", "--accumulate", "2", "--knn-every", "1"], at(3, 5, 12),
    ),
    "cmae": Method(
        cmae, ["--depth", "2", *DECODER, "--head-hidden", "32", "--head-dim", "16"],
        ["--epochs", "5", "--accumulate", "2", "--knn-every", "5"], at(4, 6, 13, 20),
    ),
    "supervised_mim": Method(
        supervised_mim, ["--decoder-depth", "1", "--tokenizer-width", "4", "--codebook-size", "16",
                         "--codebook-dim", "8", "--tokenizer-epochs", "2"],
        ["--epochs", "3", "--mixup", "0.5"],
        [["--train-tokenizer", "--steps", "3"], ["--train-tokenizer"], *at(3, 5), []],
    ),
}  # fmt: skip


def settings(method: str, *flags):
    """The checked Config of the method's smallest model."""
    script, small, *_ = METHODS[method]
    return common.parse(script.Config, script.PRESETS, [*TINY, *small, *map(str, flags)])


def train(method: str, out, data, *flags) -> None:
    """Run the method's script, in this process."""
    cfg = settings(method, "--out", out, "--data", data, *flags)
    METHODS[method].script.main(cfg)


def mistake(capsys, script: ModuleType, *arguments) -> str:
    """The one line with which a script refuses its arguments, or ends a run, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        presets = getattr(script, "PRESETS", {})
        script.main(common.parse(script.Config, presets, [str(x) for x in arguments]))
    return refusal(end.value.code, capsys.readouterr().err)


def refusal(code: int, stderr: str) -> str:
    """The one line of stderr, apart from bars of progress."""
    lines = [x for x in stderr.splitlines() if x and not x.startswith("epoch ")]
    assert code == 2 and len(lines) == 1, stderr
    return lines[0]


# ------------------------------------------------------------------------------ runs


def weights(folder: Path, part: str = "model") -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)[part]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(a: Path, b: Path) -> None:
    """All that two checkpoints restore is equal, bit for bit: models, optimisers, the rest."""
    states = []
    for folder in (a, b):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        for name in ("config", "identity", "history"):
            del state[name]
        states.append(state)
    assert {"model", "optimizer", "step"} <= states[0].keys()
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ------------------------------------------------------------------------------ processes


def run_script(*arguments, torchrun: int = 0) -> subprocess.CompletedProcess:
    """A script of this repository as a user starts it, in the given number of processes."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(torchrun)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


# One process imports torch, which takes seconds, and all others are forks of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.nn.parallel", "torchvision.transforms.v2"])


def in_processes(count: int, function, *arguments) -> list[int]:
    """Call function(*arguments) in as many processes, which find what torchrun would tell them.
    Returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
                 "MASTER_PORT": str(free.getsockname()[1])}  # fmt: skip
    processes = []
    for rank in range(count):
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = FORKS.Process(target=_call, args=(environment, function, arguments))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(240)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"{function.__name__} did not end in processes {hung} within 240 s"
    return [process.exitcode for process in processes]


def _call(environment: dict, function, arguments) -> None:
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `sh -c "pytest &"` ignores it
    function(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------ data


def write_images(folder: Path, count: int, size: int, seed: int, labelled: bool = True) -> None:
    imgs, labels = common.draw_shapes(count, size, seed)
    for i, (img, label) in enumerate(zip(imgs, labels, strict=True)):
        parent = folder / common.SHAPES[label] if labelled else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(parent / f"{i:04d}.png")


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory) -> Path:
    """train/ (64 images) and val/ (32), 16 px, in class folders."""
    folder = tmp_path_factory.mktemp("shapes")
    write_images(folder / "train", 64, 16, seed=0)
    write_images(folder / "val", 32, 16, seed=1)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory, shapes_folder):
    """whole(method): the folder of its run without a stop, made once; for reading only."""

    @functools.cache
    def run(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method)
        train(method, folder, shapes_folder, *METHODS[method].whole)
        return folder

    return run


@pytest.fixture(scope="session")
def tokenizer(whole) -> Path:
    """A tokenizer.pt for the smallest model of supervised_mim."""
    return whole("supervised_mim") / "tokenizer" / "tokenizer.pt"


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """train/ (1600 images) and val/ (200) of CIFAR-10: the first of each class."""
    source = ROOT / "data" / "cifar10"
    if not source.is_dir():
        pytest.skip("no data/cifar10 (class folders of JPEGs in train/ and val/)")
    folder = tmp_path_factory.mktemp("cifar10")
    for split, count in (("train", 160), ("val", 20)):
        for name in (source / split).iterdir():
            (folder / split / name.name).mkdir(parents=True)
            for path in sorted(name.iterdir())[:count]:
                (folder / split / name.name / path.name).symlink_to(path)
    return folder
