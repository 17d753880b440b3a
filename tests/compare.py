"""Every method beside its baseline: trains, evaluates, prints the README's numbers.

    python tests/compare.py --data data/cifar10 --jobs 2           # runs or resumes all; hours
    python tests/compare.py --data data/cifar10 --rows mae cmae    # some rows
    python tests/compare.py --data data/cifar10 --tables           # of what is there
    python tests/compare.py --data data/cifar10 --quick            # a miniature of it all
    python tests/compare.py --data data/cifar10 --rows mae --rates 3e-4 1e-3 3e-3

--data is a folder with train/ and val/ and class folders in them. The lines below write it for
CIFAR-10. Every run decodes its image files anew in every epoch. The README's runs read JPEGs of
CIFAR-10; with other files the scores differ a little.

    for split in ("train", "val"):
        data = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        for i, (image, label) in enumerate(data):
            path = pathlib.Path("data/cifar10", split, data.classes[label], f"{i:05}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

Rows are trained on the first 2000 images of each class and evaluated on all of val/. FINETUNED rows
are also fine-tuned on the first 500: on a CPU, that takes longer than to train them. (Of the parts
of Perceptual MAE, `ls` was chosen for that as its probe is the best; L_pix alone when two runs of
`ls` were known.) One thread and one process a run, --jobs of them at once. Ctrl-C stops all; the
same command goes on.

All rows of a table: the same encoder, images, size of crops, batch, evaluation, seeds 0, 1, 2, and,
but for those that say otherwise, epochs and learning rate. CMAE's contrast sees two crops of an
image in a step, one of them in other colours; ContrastiveCrop chooses where they are.
The rate is the best of 3e-4, 1e-3 and 3e-3 for MAE, and for MixedAE (--rates: 5 epochs on nine
tenths of the training images of each class; the last tenth is their val/); the other rows have the
same rate, not tuned for them. The supervised baseline is better at 3e-4 (than at 1e-4, 1e-3 and
3e-3): that was tried late, when the rows of 1e-3 were known, so there are rows at 3e-4, too. Of
the methods below MAE, MixedAE's own rate is 1e-3, too, and `msg-ada` has a second try: half the
adversarial weight, as grad_adv, in the logs of two of its seeds, was above 2. Fine-tuning is not
tuned; from scratch, it has the same settings.

± is the standard deviation over seeds. Differences are paired by seed: mean ± standard error.
Minutes are those of training steps at the median speed of the epochs, and the median of the seeds:
on one core if --device is cpu, without CMAE's boxes. To run a row again, delete its folders.

CLAIMS are the papers' (of twice the epochs and of pixels: ours), written down before the first run;
shorter runs on the same images were known. Those of --lr 3e-4 and of half the adversarial weight
were written before these runs, when the rows above them and most rates were known (of `own-tokens`:
two seeds of `own`, too). Claims are about mean-pooled features, as MixedAE's cls is of four images;
in a classifier, about its top-1. A difference of more than two standard errors is a result, in
bold: *confirmed* with the sign of the claim, *contradicted* with the other; else it is *not
resolved*. Of kNN, of the probe of cls and of LATER's pairs nothing was declared: no verdict.
Two standard errors of three seeds are weak evidence: where nothing differs, about one cell in five
is bold all the same (5 % would take 4.3); an error of 0.0 is chance; all rows share the baseline's
runs; other images would differ more.
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
TUNING = ("--epochs 20 --warmup-epochs 2 --batch-size 125 --lr 1e-3 --mixup 0 --cutmix 0 "
          "--erasing 0 --val-every 0 --workers 0")  # fmt: skip

QUICK = " --img-size 16 --epochs 1 --batch-size 16"
CHILDREN = []  # running scripts


class Row(NamedTuple):
    label: str
    command: str
    baseline: str | None = "mae"


ROWS = {
    "untrained": Row("untrained encoder", f"{PERCEPTUAL} --variant mae --steps 1 --lr 1e-12"),
    "mae": Row("MAE", f"{PERCEPTUAL} --variant mae", None),
    "mae-twice": Row("MAE, twice the epochs", f"{PERCEPTUAL} --variant mae --epochs 20"),
    "raw": Row("MAE of raw pixels", f"{PERCEPTUAL} --variant mae --no-norm-pix"),
    "l1": Row("`ls`, L_pix alone", f"{PERCEPTUAL} --variant ls --feature-weight 0 --style-weight 0 "
                             "--adv-weight 0"),
    "ls": Row("Perceptual MAE: `ls`", f"{PERCEPTUAL} --variant ls"),
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
    "crop": Row("+ ContrastiveCrop", f"{CMAE} --contrastive-weight 0 --position-weight 0"),
    "contrast": Row("+ contrast", f"{CMAE} --position-weight 0"),
    "cmae": Row("+ positions: CMAE", CMAE),
    "supervised": Row("supervised", f"{SUPERVISED} --mim-weight 0", None),
    "twice": Row("twice the epochs", f"{SUPERVISED} --mim-weight 0 --epochs 10", "supervised"),
    "pixels": Row("+ MIM of pixels", f"{SUPERVISED} --target pixels", "supervised"),
    "tokens": Row("+ MIM of tokens", SUPERVISED, "supervised"),
    "own": Row("supervised, `--lr 3e-4`", f"{SUPERVISED} --mim-weight 0 --lr 3e-4", None),
    "own-twice": Row("twice the epochs, `--lr 3e-4`",
                     f"{SUPERVISED} --mim-weight 0 --epochs 10 --lr 3e-4", "own"),
    "own-tokens": Row("+ MIM of tokens, `--lr 3e-4`", f"{SUPERVISED} --lr 3e-4", "own"),
}  # fmt: skip
FINETUNED = ("untrained", "mae", "mae-twice", "raw", "l1", "ls", "msg-ada", "half", "mixed",
             "no-segment", "naive", "cmae")  # fmt: skip
PRETRAINED = ["linear, cls", "linear, mean", "kNN, cls", "kNN, mean", "fine-tuned"]
TABLES = {  # heading: rows, columns
    "Perceptual MAE": (["untrained", "mae", "raw", "l1", "ls", "msg", "msg-ada", "half"],
                       [*PRETRAINED, "within", "borders"]),
    "MixedAE": (["mae", "mixed", "no-segment", "naive"], [*PRETRAINED, "own_image_auc"]),
    "CMAE": (["mae", "mae-twice", "small-decoder", "crop", "contrast", "cmae"],
             [*PRETRAINED, "box_area", "shuffled"]),
    "Supervised MIM": (["supervised", "twice", "pixels", "tokens", "own", "own-twice",
                        "own-tokens"],
                       ["top-1", "kNN, cls", "1-NN, cls", "PSNR", "perplexity"]),
}  # fmt: skip
JUDGED = ("linear, mean", "fine-tuned", "top-1")  # what the claims are about
PAIRED = (*JUDGED, "linear, cls", "kNN, mean")  # columns of which differences are shown
CLAIMS = {  # the claim: the row that is above, the row below
    "Perceptual MAE is above MAE": ("msg-ada", "mae"),
    "`msg-ada` is above `ls`": ("msg-ada", "ls"),
    "with half the adversarial weight, it is above MAE": ("half", "mae"),
    "MixedAE is above MAE": ("mixed", "mae"),
    "naive mixing is below MAE": ("mae", "naive"),
    "CMAE is above MAE": ("cmae", "mae"),
    "CMAE is above MAE of twice the epochs": ("cmae", "mae-twice"),
    "a decoder of one block, not four, helps": ("small-decoder", "mae"),
    "ContrastiveCrop helps": ("crop", "small-decoder"),
    "contrast helps": ("contrast", "crop"),
    "positions help": ("cmae", "contrast"),
    "tokens are above the supervised baseline": ("tokens", "supervised"),
    "and above twice its epochs": ("tokens", "twice"),
    "and above pixels": ("tokens", "pixels"),
    "at 1e-3, they are above the baseline at 3e-4": ("tokens", "own"),
    "and above twice its epochs at 3e-4": ("tokens", "own-twice"),
    "at 3e-4, they are above the baseline at 3e-4": ("own-tokens", "own"),
    "at 3e-4, they are above twice its epochs": ("own-tokens", "own-twice"),
}
LATER = {  # differences that were looked at when runs of these rows were known
    "`ls`, less MAE of raw pixels": ("ls", "raw"),
    "`msg-ada`, less MAE of raw pixels": ("msg-ada", "raw"),
    "L_pix alone, less MAE of raw pixels": ("l1", "raw"),
    "`ls`, less L_pix alone": ("ls", "l1"),
    "`msg`, less `ls`": ("msg", "ls"),
    "`msg-ada`, less `msg`": ("msg-ada", "msg"),
    "the supervised baseline at 3e-4, less at 1e-3": ("own", "supervised"),
    "MixedAE, less naive mixing": ("mixed", "naive"),
    "MixedAE, `--no-segment`, less naive mixing": ("no-segment", "naive"),
}


def subset(data: Path, folder: Path, count: int, held_out: bool = False) -> Path:
    """Links to the first `count` training images of each class, and to val/. If held_out, the last
    tenth of these are val/ instead. UserError if there are other links, or no classes."""
    names = sorted(x.name for x in (data / "train").glob("*") if x.is_dir())
    if not names or not all((data / "val" / name).is_dir() for name in names):
        raise common.UserError(
            f"--data {data}: no train/ and val/ with the same class folders; "
            "--help says how to write them for CIFAR-10"
        )
    for name in names:
        train, val = sorted((data / "train" / name).iterdir())[:count], data / "val" / name
        keep = len(train) - held_out * max(1, len(train) // 10)
        parts = {"train": train[:keep], "val": train[keep:] or sorted(val.iterdir())}
        for split, chosen in parts.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for path in chosen:
                link = folder / split / name / path.name
                with suppress(FileExistsError):
                    link.symlink_to(path.resolve())
            links = sorted((folder / split / name).iterdir())
            if [x.resolve() for x in links] != [x.resolve() for x in chosen]:
                raise common.UserError(f"{folder} has other images than {data}; use another --out")
    return folder


def sharpness(run: common.Run, folder: Path, settings: dict, images: Dataset) -> dict:
    """How sharp hidden patches are painted: the mean difference of neighbouring hidden pixels, as a
    share of that in the image itself, within patches and across their borders. The run must predict
    images (not normalised patches); they are clipped to 0..1. Every batch has the same masks."""
    model = mae_perceptual.build(mae_perceptual.Config(**settings)).to(run.device)
    model.load_state_dict(common.read_checkpoint(folder / "checkpoint.pt")["model"])
    size, patch = settings["img_size"], settings["patch_size"]
    borders = torch.arange(1, size, device=run.device) % patch == 0

    def sums(imgs: torch.Tensor) -> torch.Tensor:  # (B, 4)
        torch.manual_seed(0)  # here, because loading an image seeds the same generator
        painted, mask = model(imgs)
        hidden = mask.unflatten(1, model.encoder.grid)
        hidden = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        parts = []
        for x in map(common.denormalize, (model.images(painted)[0], imgs)):
            directions = (x, hidden), (x.mT, hidden.mT)  # across, down
            total = sum((y.diff().abs().mean(1) * (h[..., 1:] & h[..., :-1])).sum(1)
                        for y, h in directions)  # fmt: skip
            parts += [total[:, ~borders].sum(1), total[:, borders].sum(1)]
        return torch.stack(parts, dim=1)

    found, _ = common.outputs(run, model, sums, images, common.CentreCrop(size))
    painted, true = found.sum(0).view(2, 2)
    return dict(zip(("within", "borders"), (painted / true).tolist(), strict=True))


def frozen(folder: Path, data: Path, device: str) -> None:
    """Write what `eval_linear.py FOLDER` has to say in its modes linear and knn, of cls and mean,
    to FOLDER/frozen.json. The encoder is called once for all four. And `sharpness`, if the run
    predicts images, not normalised patches."""
    settings = json.loads((folder / "config.json").read_text())
    cfg = eval_linear.Config(encoder=str(folder), device=device, workers=0, seed=settings["seed"])
    run = common.Run(cfg)
    encoder = common.load_encoder(folder / "encoder.pt").to(run.device)
    size, found = encoder.settings["img_size"], {}
    train, val = (common.load_dataset(str(data), split, size) for split in ("train", "val"))

    def both(imgs: torch.Tensor) -> torch.Tensor:
        tokens = encoder(imgs)
        return torch.stack([eval_linear.pooled(tokens, pool) for pool in POOLS], dim=1)

    crop = common.CentreCrop(size)
    sets = [common.outputs(run, encoder, both, images, crop) for images in (train, val)]
    if not all(features.isfinite().all() for features, _ in sets):
        raise common.UserError(f"the features of {folder} are not finite")
    for i, pool in enumerate(POOLS):
        features, classes = [(x[:, i], labels) for x, labels in sets], len(train.classes)
        scores = eval_linear.evaluate_knn(*features, classes)
        found |= {f"kNN, {pool}": scores["top1"], f"1-NN, {pool}": scores["retrieval_1nn"]}
        found[f"linear, {pool}"] = eval_linear.evaluate_cached(run, *features, classes)["top1"]
    if "variant" in settings and not (settings["variant"] == "mae" and settings["norm_pix"]):
        found |= sharpness(run, folder, settings, val)
    common.write_text(folder / "frozen.json", json.dumps(found))


def terminate(*_) -> None:
    for child in list(CHILDREN):  # the threads take theirs out
        child.terminate()
    raise KeyboardInterrupt


def call(command: list[str], log: Path) -> None:
    """Run a script; UserError if it fails or is stopped."""
    with open(log, "a") as file:
        print("$", *command, file=file, flush=True)
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        CHILDREN.append(child)
        child.wait()
        CHILDREN.remove(child)
    if child.returncode:
        raise common.UserError(f"exit code {child.returncode}; see {log}")


def once(done: Path, command: str, *paths: object) -> None:
    """Call a command, with paths to come after it, unless the file `done` says that this was done.
    UserError if another command was."""
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        call([*command.split(), *map(str, paths)], done.parent / "log")
        common.write_text(done, command)
    if (was := done.read_text()) != command:
        raise common.UserError(f"{done} is of `{was}`, not of `{command}`; use another --out")


def run_folder(name: str, seed: int, out: Path, rate: str = "") -> Path:
    return out / "-".join([name, *[rate] * bool(rate), str(seed)])


def pretrain(name: str, seed: int, out: Path, args, rate: str = "") -> str:
    """Train, and evaluate the frozen encoder, as far as that is still to do."""
    run, data = run_folder(name, seed, out, rate), out / "first-2000"
    command = f"{ROWS[name].command} --device {args.device} --seed {seed}"
    command += f" --lr {rate} --epochs 5" * bool(rate) + QUICK * args.quick
    if args.quick and "supervised" in command:
        command += " --tokenizer-epochs 1 --tokenizer-width 4 --codebook-size 16"
    once(run / "trained", command, "--data", data, "--out", run)
    once(run / "evaluated", f"tests/compare.py --device {args.device}",
         "--data", data, "--frozen", run)  # fmt: skip
    return f"{run}: trained, evaluated"


def finetune(name: str, seed: int, out: Path, args) -> str:
    run, few = run_folder(name, seed, out), out / "first-500"
    command = f"eval_linear.py --mode finetune {TUNING} --device {args.device} --seed {seed}"
    command += " --epochs 1 --batch-size 16" * args.quick
    if name not in FINETUNED or not (run / "trained").exists():
        return f"{run}: not to be fine-tuned"
    once(run / "tuned", command, run, "--data", few, "--out", run / "finetune")
    return f"{run}: fine-tuned"


# ------------------------------------------------------------------------------ tables


def scores(run: Path, command: str) -> dict[str, float]:
    """What a run's files say, by column. UserError if it is of another command."""
    found, trained, tuned = {"minutes": 0.0}, run / "trained", run / "tuned"
    for done, of in ((trained, command), (tuned, f"eval_linear.py --mode finetune {TUNING}")):
        if done.exists() and not (was := done.read_text()).startswith(f"{of} --device "):
            raise common.UserError(f"{done} is of `{was}`, not of `{of}`; use another --out")
    if (file := run / "frozen.json").exists():
        found |= json.loads(file.read_text())
    if (file := run / "finetune" / "eval.json").exists():
        found["fine-tuned"] = json.loads(file.read_text())["finetune"]["top1"]
    for folder in (run, run / "tokenizer") if trained.exists() else ():
        if not (file := folder / "metrics.jsonl").exists():
            continue
        epochs = [json.loads(line) for line in file.read_text().splitlines()]
        names = {"val_top1": "top-1", "own_image_auc": "own_image_auc", "box_area": "box_area",
                 "box_area_shuffled": "shuffled", "psnr": "PSNR",
                 "perplexity": "perplexity"}  # fmt: skip
        found |= {column: epochs[-1][k] for k, column in names.items() if k in epochs[-1]}
        batch = json.loads((folder / "config.json").read_text())["batch_size"]
        speed = statistics.median(x["images_per_s"] for x in epochs)
        found["minutes"] += epochs[-1]["step"] * batch / speed / 60
    return found


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    digits = 2 if max(values) < 2 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    number = f" (n = {len(values)})" if len(values) != len(SEEDS) else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{number}"


def paired(found: dict, other: dict, column: str) -> tuple[str, int]:
    """Mean and standard error of the difference over the seeds that both have, at least three; in
    bold if it is more than two standard errors. And its sign, 0 if it is not."""
    both = [s for s in found if s in other and column in found[s] and column in other[s]]
    differences = [found[s][column] - other[s][column] for s in both]
    if len(differences) < 3:
        return "", 0
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(both) ** 0.5
    text = f"{mean:+.1f} ± {error:.1f}"
    return (f"**{text}**", 1 if mean > 0 else -1) if abs(mean) > 2 * error else (text, 0)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(out: Path, seeds: list[int]) -> str:
    found = {}
    for name, row in ROWS.items():
        runs = {seed: scores(run_folder(name, seed, out), row.command) for seed in seeds}
        found[name] = {seed: x for seed, x in runs.items() if x["minutes"]}
    parts, words = [], {1: " *confirmed*", 0: " *not resolved*", -1: " *contradicted*"}
    for heading, (names, columns) in TABLES.items():
        rows, shown, verdicts = [], [c for c in columns if c in PAIRED], []
        for name in (x for x in names if found[x]):
            values = [[x[c] for x in found[name].values() if c in x] for c in columns]
            base = found.get(ROWS[name].baseline, {})
            pairs = [paired(found[name], base, c)[0] for c in shown]
            minutes = statistics.median(x["minutes"] for x in found[name].values())
            rows.append([ROWS[name].label, *map(cell, values), *pairs, f"{minutes:.0f}"])
        heads = ["method", *columns, *(f"paired, {c}" for c in shown), "minutes"]
        parts += [f"**{heading}**\n\n{markdown(heads, rows)}"] * bool(rows)
        for claim, (above, below) in (CLAIMS | LATER).items():
            cells = []
            for column in shown if above in names and below in names else ():
                text, sign = paired(found[above], found[below], column)
                declared = text and claim in CLAIMS and column in JUDGED
                cells.append(text + (words[sign] if declared else ""))
            verdicts += [[claim, *cells]] * any(cells)
        parts += [markdown(["claim, or pair", *shown], verdicts)] * bool(verdicts)
    return "\n\n".join(parts)


def rates_table(names: list[str], rates: list[str], out: Path, seeds: list[int]) -> str:
    rows = []
    for name in names:
        column = "top-1" if "supervised" in ROWS[name].command else "linear, mean"
        found = [[scores(run_folder(name, seed, out, rate), ROWS[name].command) for seed in seeds]
                 for rate in rates]  # fmt: skip
        cells = [cell([x[column] for x in runs if column in x]) for runs in found]
        rows.append([ROWS[name].label, column, *cells])
    return markdown(["method", "held out", *rates], rows)


def raw_pixels(run: common.Run, data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3072) in 0..1 of all images of a set, at 32 x 32, and their labels (N,)."""
    images, crop = common.load_dataset(str(data), split, 32), common.CentreCrop(32)

    def flat(imgs: torch.Tensor) -> torch.Tensor:
        return common.denormalize(imgs).flatten(1)

    return common.outputs(run, torch.nn.Identity(), flat, images, crop)


def pixels(data: Path, file: Path) -> str:
    """A line with the scores of the pixels themselves, measured once: a floor for features."""
    if not file.exists():
        run = common.Run(eval_linear.Config(encoder="", device="cpu", workers=0))
        train, val = (raw_pixels(run, data, split) for split in ("train", "val"))
        classes = len(train[1].unique())
        found = {"linear": eval_linear.evaluate_cached(run, train, val, classes)["top1"],
                 "kNN": eval_linear.evaluate_knn(train, val, classes)["top1"]}  # fmt: skip
        common.write_text(file, json.dumps(found))
    return "the pixels: linear {linear:.1f}, kNN {kNN:.1f}".format(**json.loads(file.read_text()))


def hardware(out: Path) -> str:
    """This machine, and the versions that the runs say they had."""
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
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rates", nargs="+", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--frozen", type=Path, help="only evaluate the encoder of this run")
    args = parser.parse_args(argv)
    if args.frozen:
        return frozen(args.frozen, args.data, args.device)
    out = args.out.resolve() / ("quick" if args.quick else "") / ("rates" if args.rates else "")
    failed = []
    subset(args.data, out / "first-2000", 2000, held_out=bool(args.rates))
    subset(args.data, out / "first-500", 500)
    for stage in () if args.tables else (pretrain,) if args.rates else (pretrain, finetune):
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(stage, name, seed, out, args, *rate)
                    for name in args.rows for seed in args.seeds
                    for rate in [[x] for x in args.rates] or [[]]]  # fmt: skip
            try:
                for job in concurrent.futures.as_completed(jobs):
                    try:
                        print(job.result(), flush=True)
                    except common.UserError as error:
                        failed.append(str(error))
            except BaseException:  # the scripts themselves save and stop at Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise
    if args.rates:
        print(rates_table(args.rows, args.rates, out, args.seeds))
    else:
        print(tables(out, args.seeds), "\nThe commands:", sep="\n")
        for name in args.rows:
            print(f"    python {ROWS[name].command}  # {ROWS[name].label}")
        print(pixels(out / "first-2000", out / "pixels.json"), hardware(out), sep="\n")
    if failed:
        raise common.UserError("; ".join(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except common.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
