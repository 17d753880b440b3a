"""Every method beside its baseline: trains, evaluates, prints the README's tables.

    python tests/compare.py --data data/cifar10 --jobs 2           # runs or resumes all; hours
    python tests/compare.py --data data/cifar10 --rows mae cmae    # some rows
    python tests/compare.py --data data/cifar10 --tables           # of what is there
    python tests/compare.py --data data/cifar10 --quick            # a miniature of it all
    python tests/compare.py --data data/cifar10 --lr 5e-4 --held-out --out runs/rate-5e-4

--data is a folder with train/ and val/ and class folders in them, such as CIFAR-10 as JPEGs. Rows
are trained on the first 2000 images of each class and evaluated on all of val/; fine-tuning takes
the first 500. One thread and one process a run, --jobs of them at once. Ctrl-C stops all; the same
command goes on. Rates are chosen with --held-out: its val/ is a tenth of the training images, of
each class the last 200 of those 2000; in fine-tuning, the last 50 of those 500.

All rows: the same encoder, images seen, crops, learning rate, evaluation; seeds 0, 1, 2. ± is the
standard deviation over seeds. Differences are paired by seed: mean ± standard error.

What was said before the first run. A difference of more than two standard errors is a result:
*confirmed* with the sign of the claim, *contradicted* with the other; else it is *not resolved*.
Each column is judged by itself. The tables show differences to the baseline; those between other
rows are to be taken from the files eval.json and metrics.jsonl.
    Perceptual MAE    msg-ada is above MAE, and above ls     fine-tuned; linear (mean)
    MixedAE           above MAE; naive mixing below MAE      fine-tuned; linear (mean)
    CMAE              above MAE; each change adds to it      fine-tuned; linear (mean)
    Supervised MIM    tokens above the baseline, also of     top-1 of the classifier
                      twice the epochs; above pixels
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_linear

ROOT, SEEDS = Path(__file__).resolve().parent.parent, (0, 1, 2)
ENCODER = "--preset cifar --patch-size 4 --depth 4 --batch-size 64 --lr 1e-3 --warmup-epochs 1"
PRETRAIN = f"{ENCODER} --epochs 10 --decoder-dim 64 --decoder-heads 2"
PERCEPTUAL = f"mae_perceptual.py {PRETRAIN} --disc-width 64"
MIXED, CMAE = f"mixed_ae.py {PRETRAIN}", f"cmae.py {PRETRAIN}"
SUPERVISED = f"supervised_mim.py {ENCODER} --randaug 0 --mixup 0 --knn-every 10"
TUNING = ("--epochs 20 --warmup-epochs 2 --batch-size 125 --lr 1e-3 --mixup 0 --cutmix 0 "
          "--erasing 0")  # fmt: skip


class Row(NamedTuple):
    label: str
    command: str
    baseline: str | None = "mae"


ROWS = {
    "mae": Row("MAE", f"{PERCEPTUAL} --variant mae", None),
    "ls": Row("Perceptual MAE: `ls`", f"{PERCEPTUAL} --variant ls"),
    "msg": Row("`msg`", f"{PERCEPTUAL} --variant msg"),
    "msg-ada": Row("`msg-ada`", f"{PERCEPTUAL} --variant msg-ada"),
    "mixed": Row("MixedAE", MIXED),
    "no-segment": Row("MixedAE, `--no-segment`", f"{MIXED} --no-segment"),
    "naive": Row("naive mixing", f"{MIXED} --no-segment --no-homologous-attention "
                                 "--no-homologous-loss"),
    "small-decoder": Row("MAE, small decoder", f"{PERCEPTUAL} --variant mae --decoder-depth 1"),
    "crop": Row("+ ContrastiveCrop", f"{CMAE} --contrastive-weight 0 --position-weight 0"),
    "contrast": Row("+ contrast", f"{CMAE} --position-weight 0"),
    "cmae": Row("+ positions: CMAE", CMAE),
    "supervised": Row("supervised", f"{SUPERVISED} --epochs 5 --mim-weight 0", None),
    "twice": Row("twice the epochs", f"{SUPERVISED} --epochs 10 --mim-weight 0", "supervised"),
    "pixels": Row("+ MIM of pixels", f"{SUPERVISED} --epochs 5 --target pixels", "supervised"),
    "tokens": Row("+ MIM of tokens", f"{SUPERVISED} --epochs 5", "supervised"),
}  # fmt: skip
COLUMNS = {  # heading: where eval.json is, what in it
    "linear, cls": ("linear-cls", "linear"), "linear, mean": ("linear-mean", "linear"),
    "kNN, cls": ("knn-cls", "knn"), "kNN, mean": ("knn-mean", "knn"),
    "fine-tuned": ("finetune", "finetune"),
}  # fmt: skip


def subset(data: Path, folder: Path, count: int, held_out: int) -> Path:
    """Links to the first `count` training images of each class, and to val/; or, to all but the
    last `held_out` of these, and to them as val/."""
    for name in sorted(x.name for x in (data / "train").iterdir() if x.is_dir()):
        paths = sorted((data / "train" / name).iterdir())[:count]
        parts = {"train": paths[: len(paths) - held_out]}
        parts["val"] = paths[len(paths) - held_out :] or sorted((data / "val" / name).iterdir())
        for split, chosen in parts.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for path in chosen:
                with suppress(FileExistsError):
                    (folder / split / name / path.name).symlink_to(path.resolve())
    return folder


def commands(row: Row, seed: int, run: Path, data: Path, few: Path, args):
    """The commands of a run, as (folder, command): each writes into a folder of its own."""
    where = f"--device cpu --seed {seed}"
    small = "--img-size 16 --depth 1 --batch-size 16 --epochs 1" if args.quick else ""
    small += f" --lr {args.lr}" if args.lr else ""
    if args.quick and "supervised" in row.command:
        small += " --tokenizer-epochs 1 --tokenizer-width 4 --codebook-size 16"
    yield run, f"{row.command} {where} {small} --data {data}"
    if "supervised" in row.command:
        yield run / "knn-cls", f"eval_linear.py {run} --mode knn {where}"
        return
    baseline = "" if row.baseline else "--baseline"
    for mode, pool in itertools.product(("linear", "knn"), ("cls", "mean")):
        command = f"eval_linear.py {run} --mode {mode} --pool {pool} {where} {baseline}"
        yield run / f"{mode}-{pool}", command
    small = "--epochs 1 --batch-size 16" if args.quick else ""
    yield run / "finetune", (f"eval_linear.py {run} --mode finetune {TUNING} {where} {small} "
                             f"--data {few}")  # fmt: skip


def call(command: list[str], log: Path) -> None:
    """Run a script; UserError if it fails or is stopped."""
    with open(log, "a") as file:
        print("$", *command, file=file, flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        raise common.UserError(f"exit code {done.returncode}; see {log}")


def chain(name: str, seed: int, out: Path, data: Path, few: Path, args) -> str:
    """All of one run that is still to do."""
    run = out / f"{name}-{seed}"
    for folder, command in commands(ROWS[name], seed, run, data, few, args):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "done").exists():
            call([*command.split(), "--out", str(folder)], run / "log.txt")
            (folder / "done").touch()
    return f"{name}, seed {seed}: done"


# ------------------------------------------------------------------------------ tables


def scores(run: Path) -> dict[str, float]:
    """What a run's files say, by column."""
    found = {}
    for column, (folder, mode) in COLUMNS.items():
        if (file := run / folder / "eval.json").exists():
            entry = json.loads(file.read_text())[mode]
            found[column] = entry["top1"]
            if "retrieval_1nn" in entry:
                found[f"1-NN, {folder[4:]}"] = entry["retrieval_1nn"]
            if "untrained" in entry:
                found[f"untrained {column}"] = entry["untrained"]["top1"]
    if (file := run / "metrics.jsonl").exists() and (run / "done").exists():
        epochs = [json.loads(line) for line in file.read_text().splitlines()]
        names = {"val_top1": "top-1", "own_image_auc": "own_image_auc", "box_area": "box_area",
                 "box_area_shuffled": "shuffled"}  # fmt: skip
        found |= {column: epochs[-1][k] for k, column in names.items() if k in epochs[-1]}
        batch, last = json.loads((run / "config.json").read_text())["batch_size"], 0
        found["minutes"] = 0.0
        for x in epochs:
            found["minutes"] += (x["step"] - last) * batch / x["images_per_s"] / 60
            last = x["step"]
    if (file := run / "tokenizer" / "metrics.jsonl").exists():
        last = json.loads(file.read_text().splitlines()[-1])
        found |= {"PSNR": last["psnr"], "perplexity": last["perplexity"]}
    return found


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    digits = 2 if max(values) <= 1 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ", one seed"
    return f"{statistics.mean(values):.{digits}f}{spread}"


def paired(found: dict, other: dict, column: str) -> str:
    """Mean and standard error of the difference, over the seeds that both have; in bold if it is
    more than two standard errors."""
    both = [s for s in found if s in other and column in found[s] and column in other[s]]
    differences = [found[s][column] - other[s][column] for s in both]
    if len(differences) < 2:
        return ""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(both) ** 0.5
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def table(names: list[str], columns: list[str], out: Path, differences: tuple[str, ...]) -> str:
    found = {n: {s: x for s in SEEDS if (x := scores(out / f"{n}-{s}"))} for n in ROWS}
    heads = ["method", *columns, *(f"paired, {x}" for x in differences), "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in (x for x in names if found[x]):
        cells = [ROWS[name].label]
        for column in columns:
            values = [x[column] for x in found[name].values() if column in x]
            cells.append(cell(values) if values else "")
        base = ROWS[name].baseline
        cells += [paired(found[name], found[base], x) if base else "" for x in differences]
        times = [x["minutes"] for x in found[name].values() if "minutes" in x]
        cells.append(f"{statistics.mean(times):.0f}" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    if "linear, cls" in columns:
        cells = ["untrained encoder"]
        for column in columns:
            values = [x[f"untrained {column}"] for x in found["mae"].values()
                      if f"untrained {column}" in x]  # fmt: skip
            cells.append(cell(values) if values else "")
        lines.append("| " + " | ".join(cells + [""] * (len(differences) + 1)) + " |")
    return "\n".join(lines)


class Pixels(nn.Module):
    """In place of an encoder: the floor that features have to beat."""

    def __init__(self):
        super().__init__()
        self.settings = {"img_size": 32}

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        return imgs.flatten(1)[:, None]


def pixels(data: Path, file: Path) -> str:
    """A line with the scores of the pixels themselves, measured once."""
    if not file.exists():
        cfg = eval_linear.Config(encoder="", pool="cls", device="cpu", workers=0)
        run = common.Run(cfg)
        train, val = (common.load_images(str(data), split, 32) for split in ("train", "val"))
        evaluate = {"linear": eval_linear.evaluate_cached, "kNN": eval_linear.evaluate_knn}
        found = {mode: f(run, Pixels(), train, val)["top1"] for mode, f in evaluate.items()}
        file.write_text(json.dumps(found))
    return "the pixels: linear {linear:.1f}, kNN {kNN:.1f}".format(**json.loads(file.read_text()))


TABLES = {  # heading: rows, columns, those of which paired differences are shown
    "Perceptual MAE": (["mae", "ls", "msg", "msg-ada"], list(COLUMNS)),
    "MixedAE": (["mae", "mixed", "no-segment", "naive"], [*COLUMNS, "own_image_auc"]),
    "CMAE": (["mae", "small-decoder", "crop", "contrast", "cmae"],
             [*COLUMNS, "box_area", "shuffled"]),
    "Supervised MIM": (["supervised", "twice", "pixels", "tokens"],
                       ["top-1", "kNN, cls", "1-NN, cls", "PSNR", "perplexity"]),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lr", help="instead of the plan's, in pre-training")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    data, few = (subset(args.data, out / f"first-{n}", n, args.held_out * n // 10)
                 for n in (2000, 500))  # fmt: skip
    if not args.tables:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(chain, name, seed, out, data, few, args)
                    for seed in args.seeds for name in args.rows]  # fmt: skip
            try:
                for job in concurrent.futures.as_completed(jobs):
                    print(job.result(), flush=True)
            except BaseException:  # the scripts themselves save and stop at Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise
    for heading, (names, columns) in TABLES.items():
        first = ("top-1",) if heading == "Supervised MIM" else ("linear, mean", "fine-tuned")
        print(f"\n**{heading}**\n\n{table(names, columns, out, first)}")
    print(f"\n{pixels(data, out / 'pixels.json')}\ntorch {torch.__version__}, git "
          f"{common.git_hash()}\n\nThe commands:")  # fmt: skip
    for name in args.rows:
        print(f"    python {ROWS[name].command}  # {ROWS[name].label}")


if __name__ == "__main__":
    try:
        main()
    except (common.UserError, KeyboardInterrupt) as error:
        sys.exit(f"stopped: {error}; the same command goes on")
