import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

import common  # noqa: E402

# The smallest model that has every part; flags of all pre-training scripts.
TINY = ["--img-size", "16", "--patch-size", "4", "--depth", "1", "--batch-size", "16",
        "--workers", "0", "--device", "cpu"]  # fmt: skip


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
def cifar_folder(tmp_path_factory) -> Path:
    """train/ (4000 images) and val/ (400) of CIFAR-10: the first of each class."""
    whole = ROOT / "data" / "cifar10"
    if not whole.is_dir():
        pytest.skip("no data/cifar10 (class folders of JPEGs in train/ and val/)")
    folder = tmp_path_factory.mktemp("cifar10")
    for split, count in (("train", 400), ("val", 40)):
        for source in (whole / split).iterdir():
            (folder / split / source.name).mkdir(parents=True)
            for path in sorted(source.iterdir())[:count]:
                (folder / split / source.name / path.name).symlink_to(path)
    return folder


def run_script(*arguments, torchrun: int = 0, **env) -> subprocess.CompletedProcess:
    """A script of this repository as a user starts it, in the given number of processes."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(torchrun)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
