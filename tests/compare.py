"""Trains and evaluates every method beside its baseline, and prints tables of their scores.

A row of a table is one method, and a run is one row with one seed (0, 1, 2). All rows of a table
have the same encoder size, images, batch size and evaluation. Epochs and learning rate are the
same, too, unless the row's name says otherwise. CMAE differs in its crops: a step takes two crops
of an image, one of them with changed colours, and ContrastiveCrop chooses where they lie. The
tables are copied to tests/RESULTS.md by hand.

Usage
    python tests/compare.py --data data/cifar10 --jobs 2          # everything; takes many hours
    python tests/compare.py --data data/cifar10 --rows mae cmae   # only these rows
    python tests/compare.py --data data/cifar10 --tables          # only print what is finished
    python tests/compare.py --data data/cifar10 --quick           # everything, in miniature
    python tests/compare.py --data data/cifar10 --rows mae --lr 3e-4 1e-3 3e-3

A run takes one process with one thread, and --jobs runs are made at the same time. Ctrl-C stops all
runs; the same command resumes them. To repeat a run, delete its folder. The last command compares
learning rates: it trains for 5 epochs and holds out a tenth of the training images for evaluation.

--data is a folder with train/ and val/, which contain class folders of images. These lines write it
for CIFAR-10. The results of commit 7faec16 were measured on JPEG files; PNG files give slightly
different scores.

    for split in ("train", "val"):
        data = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        for i, (image, label) in enumerate(data):
            path = pathlib.Path("data/cifar10", split, data.classes[label], f"{i:05}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

Encoders are trained on the first 2000 training images of each class and evaluated on all of val/.
Some rows (FINETUNED) are also fine-tuned, on the first 500 training images of each class.

How to read the tables
    score           mean over seeds ± standard deviation; linear, kNN, 1-NN, fine-tuned and top-1
                    are accuracies in %, of the class token (cls) or the mean patch token (mean)
    vs MAE          this row minus MAE with the same seed: mean over seeds ± standard error
    A minus B       the same for any two rows; every difference is given in one direction only
    bold            the difference is more than two standard errors from zero
    within, borders how sharp the predictions of masked patches are, within patches and across their
                    borders: the mean difference between neighbouring pixels, as a share of that in
                    the original image
    own_image_auc, box_area, PSNR, perplexity
                    the last epoch's values from the log, which the scripts' manuals explain;
                    `shuffled` is the box_area of shuffled heatmaps
    minutes         duration of all training steps of a run, on one core if --device is cpu: median
                    over seeds. The renewal of CMAE's boxes, and all evaluations, are not included.

Three seeds are weak evidence. About one cell in five would be bold by chance (a t-test at the 5 %
level needs 4.3 standard errors), and a standard error of 0.0 is a coincidence. The differences of a
table are not independent, because they share the runs of the baseline. All seeds have the same
images; with other images, scores and differences would vary more.

Claims. CLAIMS were written down before their runs; LATER lists differences that were looked at
afterwards and have no verdict. A claim is about the linear probe of mean tokens (MixedAE's class
token belongs to four images), fine-tuning, and the top-1 of classifiers. It is *confirmed* if its
difference is bold and has the expected sign, *contradicted* if it is bold and has the other sign,
and *not resolved* otherwise. The claims are the papers', except those about twice the epochs and
about pixels, which are ours. When the first claims were written, shorter runs on the same images
were known. The claims about half the adversarial weight and about a learning rate of 3e-4 were
added when the rows above these and most of the learning rates were known. Before the claims about
tokens at 3e-4, two seeds of the baseline at 3e-4 were known, too.

What was tuned. 1e-3 is the best of the learning rates 3e-4, 1e-3 and 3e-3 for MAE and MixedAE. The
other rows use it without a search of their own. The supervised baseline is better at 3e-4 than at
1e-4, 1e-3 and 3e-3. This was found late, so there are rows with both. Half the adversarial weight
is a second try, because grad_adv was above 2 in the logs of two seeds of `msg-ada`. `ls` was chosen
for fine-tuning because it had the best linear probe, and `ls` with L_pix only was added when two
runs of `ls` were known. Fine-tuning was not tuned; the untrained encoder has the same settings.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_linear
import mae_perceptual

ROOT, SEEDS, POOLS = Path(__file__).resolve().parent.parent, (0, 1, 2), ("cls", "mean")
ENCODER = "--preset cifar --patch-size 4 --depth 4 --batch-size 64 --warmup-epochs 1"
PRETRAIN = f"{ENCODER} --lr 1e-3 --epochs 10 --decoder-dim 64 --decoder-heads 2"
PERCEPTUAL = f"mae_perceptual.py {PRETRAIN} --disc-width 64"
MIXED, CMAE = f"mixed_ae.py {PRETRAIN}", f"cmae.py {PRETRAIN}"
SUPERVISED = (f"supervised_mim.py {ENCODER} --decoder-depth 2 --lr 1e-3 --epochs 5 --randaug 0 "
              "--mixup 0 --val-every 10 --knn-every 10 --tokenizer-epochs 5")  # fmt: skip
FINETUNE = ("eval_linear.py --mode finetune --epochs 20 --warmup-epochs 2 --batch-size 125 "
            "--lr 1e-3 --mixup 0 --cutmix 0 --erasing 0 --val-every 0 --workers 0")  # fmt: skip
QUICK = " --img-size 16 --epochs 1 --batch-size 16"
CHILDREN = []  # the processes of all scripts that are running


class Row(NamedTuple):
    label: str
    command: str
    baseline: str | None = "mae"


ROWS = {
    "untrained": Row("untrained encoder", f"{PERCEPTUAL} --variant mae --steps 1 --lr 1e-12"),
    "mae": Row("MAE", f"{PERCEPTUAL} --variant mae", None),
    "mae-twice": Row("MAE, twice the epochs", f"{PERCEPTUAL} --variant mae --epochs 20"),
    "raw": Row("MAE of raw pixels", f"{PERCEPTUAL} --variant mae --no-norm-pix"),
    "l1": Row("`ls` with L_pix only", f"{PERCEPTUAL} --variant ls --feature-weight 0 "
                                      "--style-weight 0 --adv-weight 0"),
    "ls": Row("`ls`", f"{PERCEPTUAL} --variant ls"),
    "msg": Row("`msg`", f"{PERCEPTUAL} --variant msg"),
    "msg-ada": Row("`msg-ada`", f"{PERCEPTUAL} --variant msg-ada"),
    "half": Row("`msg-ada`, `--adv-weight 0.05`",
                f"{PERCEPTUAL} --variant msg-ada --adv-weight 0.05"),
    "mixed": Row("MixedAE", MIXED),
    "no-segment": Row("MixedAE, `--no-segment`", f"{MIXED} --no-segment"),
    "naive": Row("naive mixing", f"{MIXED} --no-segment --no-homologous-attention "
                                 "--no-homologous-loss"),
    "small-decoder": Row("MAE, decoder of one block",
                         f"{PERCEPTUAL} --variant mae --decoder-depth 1"),
    "crop": Row("CMAE, only ContrastiveCrop",
                f"{CMAE} --contrastive-weight 0 --position-weight 0"),
    "contrast": Row("CMAE without positions", f"{CMAE} --position-weight 0"),
    "cmae": Row("CMAE", CMAE),
    "supervised": Row("supervised", f"{SUPERVISED} --mim-weight 0", None),
    "twice": Row("supervised, twice the epochs", f"{SUPERVISED} --mim-weight 0 --epochs 10",
                 "supervised"),
    "pixels": Row("MIM of pixels", f"{SUPERVISED} --target pixels", "supervised"),
    "tokens": Row("MIM of tokens", SUPERVISED, "supervised"),
    "own": Row("supervised, `--lr 3e-4`", f"{SUPERVISED} --mim-weight 0 --lr 3e-4", None),
    "own-twice": Row("supervised, twice the epochs, `--lr 3e-4`",
                     f"{SUPERVISED} --mim-weight 0 --epochs 10 --lr 3e-4", "own"),
    "own-tokens": Row("MIM of tokens, `--lr 3e-4`", f"{SUPERVISED} --lr 3e-4", "own"),
}  # fmt: skip
FINETUNED = ("untrained", "mae", "mae-twice", "raw", "l1", "ls", "msg-ada", "half", "mixed",
             "no-segment", "naive", "cmae")  # fmt: skip


class Table(NamedTuple):
    rows: list[str]
    columns: list[str]
    baseline: str = "MAE"  # its name in the heads
    note: str = '"vs MAE" is this row minus MAE with the same seed'


PRETRAINED = ["linear, cls", "linear, mean", "kNN, cls", "kNN, mean", "fine-tuned"]
TABLES = {
    "Perceptual MAE": Table(
        ["untrained", "mae", "raw", "l1", "ls", "msg", "msg-ada", "half"],
        [*PRETRAINED, "within", "borders"],
    ),
    "MixedAE": Table(["mae", "mixed", "no-segment", "naive"], [*PRETRAINED, "own_image_auc"]),
    "CMAE": Table(
        ["mae", "mae-twice", "small-decoder", "crop", "contrast", "cmae"],
        [*PRETRAINED, "box_area", "shuffled"],
    ),
    "Supervised MIM": Table(
        ["supervised", "twice", "pixels", "tokens", "own", "own-twice", "own-tokens"],
        ["top-1", "kNN, cls", "1-NN, cls", "PSNR", "perplexity"],
        baseline="supervised",
        note='"vs supervised" is this row minus the row "supervised" with the same learning rate '
             "and seed",
    ),
}  # fmt: skip
JUDGED = ("linear, mean", "fine-tuned", "top-1")  # the columns that claims are about
COMPARED = (*JUDGED, "linear, cls", "kNN, mean")  # the columns of which differences are printed


class Claim(NamedTuple):
    """The claim is that `first` minus `second` (keys of ROWS) has this sign."""

    text: str
    first: str
    second: str
    sign: int = 1


CLAIMS = [
    Claim("Perceptual MAE is better than MAE", "msg-ada", "mae"),
    Claim("`msg-ada` is better than `ls`", "msg-ada", "ls"),
    Claim("with half the adversarial weight, `msg-ada` is better than MAE", "half", "mae"),
    Claim("MixedAE is better than MAE", "mixed", "mae"),
    Claim("naive mixing is worse than MAE", "naive", "mae", sign=-1),
    Claim("CMAE is better than MAE", "cmae", "mae"),
    Claim("CMAE is better than MAE with twice the epochs", "cmae", "mae-twice"),
    Claim("a decoder of one block is better than one of four", "small-decoder", "mae"),
    Claim("ContrastiveCrop helps", "crop", "small-decoder"),
    Claim("the contrastive loss helps", "contrast", "crop"),
    Claim("predicting positions helps", "cmae", "contrast"),
    Claim("MIM of tokens is better than the supervised baseline", "tokens", "supervised"),
    Claim("MIM of tokens is better than the baseline with twice the epochs", "tokens", "twice"),
    Claim("MIM of tokens is better than MIM of pixels", "tokens", "pixels"),
    Claim("MIM of tokens at 1e-3 is better than the baseline at 3e-4", "tokens", "own"),
    Claim("MIM of tokens at 1e-3 is better than the baseline with twice the epochs at 3e-4",
          "tokens", "own-twice"),
    Claim("MIM of tokens at 3e-4 is better than the baseline at 3e-4", "own-tokens", "own"),
    Claim("MIM of tokens at 3e-4 is better than the baseline with twice the epochs at 3e-4",
          "own-tokens", "own-twice"),
]  # fmt: skip
LATER = [  # rows whose difference was looked at when their runs were known: first minus second
    ("ls", "raw"), ("msg-ada", "raw"), ("l1", "raw"), ("ls", "l1"), ("msg", "ls"),
    ("msg-ada", "msg"), ("own", "supervised"), ("mixed", "naive"), ("no-segment", "naive"),
]  # fmt: skip


class Run(NamedTuple):
    """A row of ROWS with one seed and, if learning rates are compared, one learning rate."""

    row: str
    seed: int
    lr: str | None = None

    def folder(self, out: Path) -> Path:
        return out / "-".join(str(x) for x in (self.row, self.lr, self.seed) if x is not None)


def link_subset(data: Path, folder: Path, count: int, held_out: bool = False) -> Path:
    """Links the first `count` training images of each class, and all of val/, into `folder`. If
    `held_out`, the last tenth of the chosen training images becomes val/ instead.

    Raises UserError if `folder` has links to other images, or if `data` has no class folders."""
    names = sorted(x.name for x in (data / "train").glob("*") if x.is_dir())
    if not names or not all((data / "val" / name).is_dir() for name in names):
        raise common.UserError(
            f"--data {data}: no train/ and val/ with the same class folders; "
            "--help shows how to write them for CIFAR-10"
        )
    for name in names:
        train = sorted((data / "train" / name).iterdir())[:count]
        val = sorted((data / "val" / name).iterdir())
        if held_out:
            tenth = max(1, len(train) // 10)
            train, val = train[:-tenth], train[-tenth:]
        for split, images in (("train", train), ("val", val)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for path in images:
                with suppress(FileExistsError):
                    (folder / split / name / path.name).symlink_to(path.resolve())
            links = sorted((folder / split / name).iterdir())
            if [x.resolve() for x in links] != [x.resolve() for x in images]:
                raise common.UserError(f"{folder} has other images than {data}; use another --out")
    return folder


# ------------------------------------------------------------------------------ evaluation


def neighbour_changes(imgs: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """For each pair of neighbouring columns (B, W - 1): the absolute difference of their pixels,
    mean over channels, sum over the rows in which both pixels are masked. masked: (B, H, W)."""
    both_masked = masked[..., 1:] & masked[..., :-1]
    changes = imgs.diff().abs().mean(dim=1)  # (B, H, W - 1)
    return (changes * both_masked).sum(dim=1)


def sharpness(run: common.Run, folder: Path, settings: dict, images: Dataset) -> dict:
    """How sharp the reconstructions of masked patches are, `within` patches and across their
    `borders`: the mean absolute difference between neighbouring masked pixels, divided by that of
    the original images.

    The model must predict images, not normalised patches; predictions are clipped to 0..1. All
    batches have the same masks."""
    model = mae_perceptual.build(mae_perceptual.Config(**settings)).to(run.device)
    model.load_state_dict(common.read_checkpoint(folder / "checkpoint.pt")["model"])
    size, patch = settings["img_size"], settings["patch_size"]
    is_border = torch.arange(1, size, device=run.device) % patch == 0

    def change_sums(imgs: torch.Tensor) -> torch.Tensor:
        """(B, 4): prediction within patches and at borders, original within and at borders."""
        torch.manual_seed(0)  # here, because loading an image seeds the same generator
        prediction, mask = model(imgs)
        masked = mask.unflatten(1, model.encoder.grid)
        masked = masked.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        sums = []
        for x in (model.images(prediction)[0], imgs):
            x = common.denormalize(x)
            changes = neighbour_changes(x, masked) + neighbour_changes(x.mT, masked.mT)
            sums += [changes[:, ~is_border].sum(dim=1), changes[:, is_border].sum(dim=1)]
        return torch.stack(sums, dim=1)

    sums, _ = common.outputs(run, model, change_sums, images, common.CentreCrop(size))
    within, borders, original_within, original_borders = sums.sum(dim=0).tolist()
    return {"within": within / original_within, "borders": borders / original_borders}


def evaluate_frozen(folder: Path, data: Path, device: str) -> None:
    """Evaluates a run's frozen encoder and writes FOLDER/frozen.json: the scores of `eval_linear.py
    FOLDER --mode linear` and `--mode knn`, of class token and mean patch token. Features are
    computed once for all of them. Adds `sharpness` if the run predicts images."""
    settings = json.loads((folder / "config.json").read_text())
    cfg = eval_linear.Config(encoder=str(folder), device=device, workers=0, seed=settings["seed"])
    run = common.Run(cfg)
    encoder = common.load_encoder(folder / "encoder.pt").to(run.device)
    size, scores = encoder.settings["img_size"], {}
    train, val = (common.load_dataset(str(data), split, size) for split in ("train", "val"))

    def pooled_both(imgs: torch.Tensor) -> torch.Tensor:  # (B, 2, D)
        tokens = encoder(imgs)
        return torch.stack([eval_linear.pooled(tokens, pool) for pool in POOLS], dim=1)

    crop, classes = common.CentreCrop(size), len(train.classes)
    features, labels = common.outputs(run, encoder, pooled_both, train, crop)
    val_features, val_labels = common.outputs(run, encoder, pooled_both, val, crop)
    if not (features.isfinite().all() and val_features.isfinite().all()):
        raise common.UserError(f"the features of {folder} are not finite")
    for i, pool in enumerate(POOLS):
        pairs = (features[:, i], labels), (val_features[:, i], val_labels)
        knn = eval_linear.evaluate_knn(*pairs, classes)
        scores[f"kNN, {pool}"], scores[f"1-NN, {pool}"] = knn["top1"], knn["retrieval_1nn"]
        scores[f"linear, {pool}"] = eval_linear.evaluate_cached(run, *pairs, classes)["top1"]
    if "variant" in settings:  # a run of mae_perceptual.py
        predicts_normalised = settings["variant"] == "mae" and settings["norm_pix"]
        if not predicts_normalised:
            scores |= sharpness(run, folder, settings, val)
    common.write_text(folder / "frozen.json", json.dumps(scores))


# ------------------------------------------------------------------------------ runs


def terminate(*_) -> None:
    for child in list(CHILDREN):  # a copy, because `call` removes children in other threads
        child.terminate()
    raise KeyboardInterrupt


def call(command: list[str], log: Path) -> None:
    """Runs a script. Raises UserError if it fails or is stopped."""
    with open(log, "a") as file:
        print("$", *command, file=file, flush=True)
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        CHILDREN.append(child)
        child.wait()
        CHILDREN.remove(child)
    if child.returncode:
        raise common.UserError(f"exit code {child.returncode}; see {log}")


def call_once(done: Path, command: str, *paths: object) -> None:
    """Calls a command, with `paths` at its end, unless the file `done` exists, which contains the
    command that was called. Raises UserError if that was another command."""
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        call([*command.split(), *map(str, paths)], done.parent / "log")
        common.write_text(done, command)
    if done.read_text() != command:
        raise wrong_command(done, command)


def wrong_command(done: Path, command: str) -> common.UserError:
    return common.UserError(
        f"{done} belongs to `{done.read_text()}`, not to `{command}`; use another --out"
    )


def pretrain(run: Run, out: Path, args) -> str:
    """Trains a run and evaluates its frozen encoder, unless this is done. Returns a message."""
    folder, data = run.folder(out), out / "first-2000"
    command = f"{ROWS[run.row].command} --device {args.device} --seed {run.seed}"
    if run.lr is not None:
        command += f" --lr {run.lr} --epochs 5"
    if args.quick:
        command += QUICK
        if "supervised" in command:
            command += " --tokenizer-epochs 1 --tokenizer-width 4 --codebook-size 16"
    call_once(folder / "trained", command, "--data", data, "--out", folder)
    call_once(folder / "evaluated", f"tests/compare.py --device {args.device}",
              "--data", data, "--frozen", folder)  # fmt: skip
    return f"{folder}: trained, evaluated"


def finetune(run: Run, out: Path, args) -> str:
    """Fine-tunes the encoder of a run if its row is in FINETUNED. Returns a message."""
    folder, data = run.folder(out), out / "first-500"
    if run.row not in FINETUNED or not (folder / "trained").exists():
        return f"{folder}: not to be fine-tuned"
    command = f"{FINETUNE} --device {args.device} --seed {run.seed}"
    if args.quick:
        command += " --epochs 1 --batch-size 16"
    call_once(folder / "tuned", command, folder, "--data", data, "--out", folder / "finetune")
    return f"{folder}: fine-tuned"


def call_all(stage, runs: list[Run], out: Path, args) -> list[str]:
    """Calls stage(run, out, args) for all runs, args.jobs at a time. Returns the errors."""
    errors = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(stage, run, out, args) for run in runs]
        try:
            for job in concurrent.futures.as_completed(jobs):
                try:
                    print(job.result(), flush=True)
                except common.UserError as error:
                    errors.append(str(error))
        except BaseException:  # at Ctrl-C, the scripts themselves save and stop
            pool.shutdown(cancel_futures=True)
            raise
    return errors


# ------------------------------------------------------------------------------ tables

LOGGED = {"val_top1": "top-1", "own_image_auc": "own_image_auc", "box_area": "box_area",
          "box_area_shuffled": "shuffled", "psnr": "PSNR", "perplexity": "perplexity"}  # fmt: skip


def read_scores(folder: Path, command: str) -> dict[str, float]:
    """A run's scores by column, from its files. `minutes` is 0 if nothing is trained yet. Raises
    UserError if the files belong to another command."""
    scores, trained, tuned = {"minutes": 0.0}, folder / "trained", folder / "tuned"
    for done, expected in ((trained, command), (tuned, FINETUNE)):
        if done.exists() and not done.read_text().startswith(f"{expected} --device "):
            raise wrong_command(done, expected)
    if (file := folder / "frozen.json").exists():
        scores |= json.loads(file.read_text())
    if (file := folder / "finetune" / "eval.json").exists():
        scores["fine-tuned"] = json.loads(file.read_text())["finetune"]["top1"]
    if not trained.exists():
        return scores
    for part in (folder, folder / "tokenizer"):
        if not (file := part / "metrics.jsonl").exists():
            continue
        epochs = [json.loads(line) for line in file.read_text().splitlines()]
        last = epochs[-1]
        scores |= {column: last[name] for name, column in LOGGED.items() if name in last}
        batch = json.loads((part / "config.json").read_text())["batch_size"]
        images_per_s = statistics.median(x["images_per_s"] for x in epochs)
        scores["minutes"] += last["step"] * batch / images_per_s / 60
    return scores


def cell(values: list[float]) -> str:
    """Mean ± standard deviation, with the number of values if it is not the usual one."""
    if not values:
        return ""
    digits = 2 if max(values) < 2 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    number = f" (n = {len(values)})" if len(values) != len(SEEDS) else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{number}"


class Difference(NamedTuple):
    mean: float
    error: float  # standard error

    def is_bold(self) -> bool:
        return abs(self.mean) > 2 * self.error

    def text(self) -> str:
        text = f"{self.mean:+.1f} ± {self.error:.1f}"
        return f"**{text}**" if self.is_bold() else text

    def verdict(self, sign: int) -> str:
        """The verdict on a claim that the mean has this sign, +1 or -1."""
        if not self.is_bold():
            return "not resolved"
        return "confirmed" if self.mean * sign > 0 else "contradicted"


def difference(first: dict, second: dict, column: str) -> Difference | None:
    """`first` minus `second` in this column, over the seeds that both have; None if these are fewer
    than three. Both are scores by column by seed."""
    differences = []
    for seed, scores in first.items():
        if column in scores and column in second.get(seed, {}):
            differences.append(scores[column] - second[seed][column])
    if len(differences) < 3:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(statistics.mean(differences), error)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table_of_scores(table: Table, found: dict) -> str:
    """`found` has the scores by column by seed by row, here and below."""
    compared, rows = [c for c in table.columns if c in COMPARED], []
    for name in table.rows:
        runs, baseline = found[name], found.get(ROWS[name].baseline, {})
        if not runs:
            continue
        cells = [ROWS[name].label]
        for column in table.columns:
            cells.append(cell([scores[column] for scores in runs.values() if column in scores]))
        for column in compared:
            result = difference(runs, baseline, column)
            cells.append(result.text() if result else "")
        minutes = statistics.median(scores["minutes"] for scores in runs.values())
        rows.append([*cells, f"{minutes:.0f}"])
    heads = ["method", *table.columns, *(f"vs {table.baseline}, {c}" for c in compared), "minutes"]
    return markdown(heads, rows)


def table_of_claims(table: Table, found: dict) -> str:
    """All claims and later differences between rows of the table; "" if there are none yet."""
    compared, rows = [c for c in table.columns if c in COMPARED], []
    later = [Claim("(not a claim)", first, second) for first, second in LATER]
    for claim in CLAIMS + later:
        if claim.first not in table.rows or claim.second not in table.rows:
            continue
        cells = []
        for column in compared:
            result = difference(found[claim.first], found[claim.second], column)
            text = result.text() if result else ""
            if result and claim in CLAIMS and column in JUDGED:
                text += f" *{result.verdict(claim.sign)}*"
            cells.append(text)
        if any(cells):
            names = f"{ROWS[claim.first].label} minus {ROWS[claim.second].label}"
            rows.append([claim.text, names, *cells])
    return markdown(["claim", "difference", *compared], rows) if rows else ""


def tables(out: Path, seeds: list[int]) -> str:
    found = {}
    for name, row in ROWS.items():
        runs = {seed: read_scores(Run(name, seed).folder(out), row.command) for seed in seeds}
        found[name] = {seed: scores for seed, scores in runs.items() if scores["minutes"]}
    parts = []
    for heading, table in TABLES.items():
        if any(found[name] for name in table.rows):
            note = (f"{table.note} (mean ± standard error); bold: more than two standard errors "
                    'from zero. "minutes" is the duration of the training steps.')  # fmt: skip
            parts += [f"**{heading}**", table_of_scores(table, found), note]
            parts.append(table_of_claims(table, found))
    return "\n\n".join(part for part in parts if part)


def table_of_learning_rates(names: list[str], lrs: list[str], out: Path, seeds: list[int]) -> str:
    rows = []
    for name in names:
        column = "top-1" if "supervised" in ROWS[name].command else "linear, mean"
        cells = [ROWS[name].label, column]
        for lr in lrs:
            folders = [Run(name, seed, lr).folder(out) for seed in seeds]
            scores = [read_scores(folder, ROWS[name].command) for folder in folders]
            cells.append(cell([x[column] for x in scores if column in x]))
        rows.append(cells)
    return markdown(["method", "score on held-out images", *lrs], rows)


def raw_pixels(run: common.Run, data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3072) in 0..1 of all images of a split, at 32 x 32, and their labels (N,)."""
    images, crop = common.load_dataset(str(data), split, 32), common.CentreCrop(32)

    def flat(imgs: torch.Tensor) -> torch.Tensor:
        return common.denormalize(imgs).flatten(1)

    return common.outputs(run, torch.nn.Identity(), flat, images, crop)


def scores_of_pixels(data: Path, file: Path) -> str:
    """A line with the scores of raw pixels as features, which are computed once and kept in `file`.
    Every encoder should exceed them."""
    if not file.exists():
        run = common.Run(eval_linear.Config(encoder="", device="cpu", workers=0))
        train, val = (raw_pixels(run, data, split) for split in ("train", "val"))
        classes = len(train[1].unique())
        found = {"linear": eval_linear.evaluate_cached(run, train, val, classes)["top1"],
                 "kNN": eval_linear.evaluate_knn(train, val, classes)["top1"]}  # fmt: skip
        common.write_text(file, json.dumps(found))
    found = json.loads(file.read_text())
    return f"Pixels as features: linear {found['linear']:.1f}, kNN {found['kNN']:.1f}"


def hardware(out: Path) -> str:
    """A line with this machine's processor, and the versions that the logs of the runs name."""
    name = platform.machine()
    with suppress(OSError, TypeError):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    logs = "".join(log.read_text() for log in out.glob("*/log"))
    versions = sorted(set(re.findall(r"torch \S+ · git \S+", logs)))
    return ", ".join([f"{name}, {os.cpu_count()} cores", *versions])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare",
                        help="folder for the runs")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS),
                        help="default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--lr", nargs="+", default=[], help="compare these learning rates instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables", action="store_true", help="run nothing, only print")
    parser.add_argument("--quick", action="store_true", help="tiny images and one epoch")
    parser.add_argument("--frozen", type=Path, help="only evaluate the frozen encoder of this run")
    args = parser.parse_args(argv)
    if args.frozen:
        return evaluate_frozen(args.frozen, args.data, args.device)
    out = args.out.resolve()
    if args.quick:
        out = out / "quick"
    if args.lr:
        out = out / "learning-rates"
    link_subset(args.data, out / "first-2000", 2000, held_out=bool(args.lr))
    link_subset(args.data, out / "first-500", 500)
    runs = [Run(name, seed, lr) for name in args.rows for seed in args.seeds
            for lr in args.lr or [None]]  # fmt: skip
    errors = []
    if not args.tables:
        errors += call_all(pretrain, runs, out, args)
        if not args.lr:
            errors += call_all(finetune, runs, out, args)
    if args.lr:
        print(table_of_learning_rates(args.rows, args.lr, out, args.seeds))
    else:
        print(tables(out, args.seeds), "\nThe commands:", sep="\n")
        for name in args.rows:
            print(f"    python {ROWS[name].command}  # {ROWS[name].label}")
        print(scores_of_pixels(out / "first-2000", out / "pixels.json"), hardware(out), sep="\n")
    if errors:
        raise common.UserError("; ".join(errors))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except common.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes the runs")
