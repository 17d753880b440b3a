"""What all tests share: the smallest model and run of each method, helpers that compare runs and
start processes, and small data sets."""

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
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # with models this small, two threads mostly wait for each other

import simulated_gpu  # noqa: E402

import cmae  # noqa: E402
import common  # noqa: E402
import mae_perceptual  # noqa: E402
import mixed_ae  # noqa: E402
import supervised_mim  # noqa: E402

if simulated_gpu.AVAILABLE and not torch.cuda.is_available():
    simulated_gpu.add_device()  # before any test has made a backward pass


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long tests, which only `pytest -m slow` runs")
    config.terminal = os.dup(2)  # the real stderr, because pytest captures file descriptor 2


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(autouse=True)
def time_limit(request):
    """If a test takes ten minutes, it hangs: ends the session with a traceback that names it."""
    if "slow" not in request.keywords:
        faulthandler.dump_traceback_later(600, exit=True, file=request.config.terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


# ------------------------------------------------------------------------------ methods

# Flags that all pre-training scripts share, for the smallest model that has every part.
TINY = ["--img-size", "16", "--patch-size", "4", "--depth", "1", "--batch-size", "16",
        "--workers", "0", "--device", "cpu"]  # fmt: skip
DECODER = ["--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2"]
GAN = ["--depth", "3", *DECODER, "--decoder-depth", "3", "--disc-width", "32",
       "--refresh-epochs", "0.5", "--adv-weight", "0.7", "--variant"]  # fmt: skip


class Method(NamedTuple):
    script: ModuleType
    model_flags: list[str]  # these and TINY give the method's smallest model
    run_flags: list[str]  # added for the run of the fixture `whole_run`; an epoch has four steps
    pieces: list[list[str]]  # added by the calls that make the same run in pieces, one list a call


def stop_after(*steps: int) -> list[list[str]]:
    return [["--steps", str(n)] for n in steps]


# The pieces end in the middle and at the ends of epochs, and where resuming is difficult: just
# before CMAE's boxes are renewed; in the GAN variants, between two updates of p, two R1 steps and
# two copies of the discriminator; in Supervised MIM, during and just after tokenizer training.
GAN_RUN = ["--epochs", "6", "--accumulate", "2", "--recon-every", "3"]
GAN_PIECES = stop_after(3, 17, 24)
METHODS = {
    "mae": Method(
        mae_perceptual, [*DECODER, "--variant", "mae"],
        ["--epochs", "3", "--accumulate", "2", "--knn-every", "2", "--recon-every", "2"],
        stop_after(3, 5, 12),
    ),
    "ssim": Method(
        mae_perceptual, [*DECODER, "--variant", "ssim"],
        ["--epochs", "3", "--accumulate", "2", "--recon-every", "2"], stop_after(3, 12),
    ),
    "ls": Method(mae_perceptual, [*GAN, "ls"], GAN_RUN, GAN_PIECES),
    "msg": Method(mae_perceptual, [*GAN, "msg"], GAN_RUN, GAN_PIECES),
    "msg-ada": Method(mae_perceptual, [*GAN, "msg-ada"], GAN_RUN, GAN_PIECES),
    "mixed_ae": Method(
        mixed_ae, ["--depth", "2", *DECODER],
        ["--epochs", "3", "--accumulate", "2", "--knn-every", "1"], stop_after(3, 5, 12),
    ),
    "cmae": Method(
        cmae, ["--depth", "2", *DECODER, "--head-hidden", "32", "--head-dim", "16"],
        ["--epochs", "5", "--accumulate", "2", "--knn-every", "5"], stop_after(4, 6, 13, 20),
    ),
    "supervised_mim": Method(
        supervised_mim, ["--decoder-depth", "1", "--tokenizer-width", "4", "--codebook-size", "16",
                         "--codebook-dim", "8", "--tokenizer-epochs", "2"],
        ["--epochs", "3", "--mixup", "0.5"],
        [["--train-tokenizer", "--steps", "3"], ["--train-tokenizer"], *stop_after(3, 5), []],
    ),
}  # fmt: skip


def settings(method: str, *flags):
    """The Config of the method's smallest model, changed by flags."""
    script = METHODS[method].script
    flags = [*TINY, *METHODS[method].model_flags, *map(str, flags)]
    return common.parse(script.Config, script.PRESETS, flags)


def train(method: str, out, data, *flags) -> None:
    """Trains the method's smallest model in this process."""
    cfg = settings(method, "--out", out, "--data", data, *flags)
    METHODS[method].script.main(cfg)


def error_of(capsys, script: ModuleType, *arguments) -> str:
    """Runs a script that must fail with exit code 2 and returns its one-line error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        presets = getattr(script, "PRESETS", {})
        script.main(common.parse(script.Config, presets, [str(x) for x in arguments]))
    return error_line(end.value.code, capsys.readouterr().err)


def error_line(code: int, stderr: str) -> str:
    """The only line of stderr that is not a progress bar. The exit code must be 2."""
    lines = [x for x in stderr.splitlines() if x and not x.startswith("epoch ")]
    assert code == 2 and len(lines) == 1, stderr
    return lines[0]


# ------------------------------------------------------------------------------ runs


def weights(folder: Path, part: str = "model") -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)[part]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(a: Path, b: Path) -> None:
    """Two runs' checkpoints restore the same models, optimisers and other states, bit for bit."""
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
    """Runs a script as a user does: in one process, or in `torchrun` processes of torchrun."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(torchrun)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


# To import torch takes seconds, so one process imports it, and all others are forked from that one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.nn.parallel", "torchvision.transforms.v2"])


def in_processes(count: int, function, *arguments) -> list[int]:
    """Calls function(*arguments) in `count` processes that have torchrun's environment variables,
    and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
                  "MASTER_PORT": str(free.getsockname()[1])}  # fmt: skip
    processes = []
    for rank in range(count):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = FORKS.Process(target=call_with, args=(environment, function, arguments))
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


def call_with(environment: dict, function, arguments) -> None:
    """Calls function(*arguments) under these environment variables; runs in a forked process."""
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which outlives a killed process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of sh ignore SIGINT
    # The process group is not destroyed: with gloo in torch 2.6, that sometimes takes forever.
    function(*arguments)


# ------------------------------------------------------------------------------ data


def write_images(folder: Path, count: int, size: int, seed: int, labelled: bool = True) -> None:
    imgs, labels = common.draw_shapes(count, size, seed)
    for i, (img, label) in enumerate(zip(imgs, labels, strict=True)):
        parent = folder / common.SHAPES[label] if labelled else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(parent / f"{i:04d}.png")


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory) -> Path:
    """A folder with 64 images in train/ and 32 in val/, of 16 px, in class folders."""
    folder = tmp_path_factory.mktemp("shapes")
    write_images(folder / "train", 64, 16, seed=0)
    write_images(folder / "val", 32, 16, seed=1)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, shapes_folder):
    """whole_run(method) is the folder of a run without a stop. All tests share it, so they must not
    change it."""

    @functools.cache
    def run(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method)
        train(method, folder, shapes_folder, *METHODS[method].run_flags)
        return folder

    return run


@pytest.fixture(scope="session")
def tokenizer(whole_run) -> Path:
    """A tokenizer.pt for the smallest model of supervised_mim."""
    return whole_run("supervised_mim") / "tokenizer" / "tokenizer.pt"


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """A folder with the first 160 training and 20 test images of each class of CIFAR-10."""
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
