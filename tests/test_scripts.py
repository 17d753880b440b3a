"""Every script is run end to end: what it writes, how it stops and resumes, several processes,
errors for wrong settings, and the commands that the README and the manuals show."""

import contextlib
import functools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    METHODS,
    ROOT,
    TINY,
    assert_same_state,
    error_line,
    error_of,
    in_processes,
    metrics,
    run_script,
    settings,
    train,
    weights,
    write_images,
)
from PIL import Image

import cmae
import common
import eval_linear
import mae_perceptual
import mixed_ae
import supervised_mim

MAE = METHODS["mae"].model_flags


def test_run_folder(whole_run):
    out = whole_run("mae")
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt", "encoder.pt", ".lock",
                     "recon_0002.png", "recon_0003.png"}  # fmt: skip
    lines = metrics(out)
    assert [(x["epoch"], x["step"]) for x in lines] == [(1, 4), (2, 8), (3, 12)]
    assert all({"loss", "lr", "images_per_s", "data_wait"} <= x.keys() for x in lines)
    assert ["knn" in x for x in lines] == [False, True, True]
    config = json.loads((out / "config.json").read_text())
    assert config["mask_ratio"] == 0.75 and config["decoder_dim"] == 16 and config["data_dir"]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12 and state["config"] == config and state["history"] == lines
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in state["model"])
    with Image.open(out / "recon_0003.png") as picture:
        assert picture.width > 8 * 90 and picture.height > 4 * 90


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_that_of_the_checkpoint_and_can_be_probed(
    method, whole_run, tmp_path, capsys
):
    folder, imgs = whole_run(method), torch.randn(2, 3, 16, 16)
    encoder = common.load_encoder(folder / "encoder.pt")
    assert torch.equal(encoder(imgs), common.load_encoder(folder / "checkpoint.pt")(imgs))
    model = weights(folder)
    assert all(torch.equal(x, model[f"encoder.{k}"]) for k, x in encoder.state_dict().items())
    capsys.readouterr()
    arguments = [str(folder), "--mode", "knn", "--device", "cpu", "--out", str(tmp_path)]
    eval_linear.main(common.parse(eval_linear.Config, {}, arguments))
    entry = json.loads((tmp_path / "eval.json").read_text())["knn"]
    assert capsys.readouterr().out.endswith(f"knn top-1 {entry['top1']:.1f}\n")


def test_the_imagenet_preset_is_the_published_recipe():
    """The numbers are copied from the MAE paper: appendix A, table 8, and section 4."""
    cfg = common.parse(mae_perceptual.Config, mae_perceptual.PRESETS, ["--preset", "imagenet-mae"])
    assert cfg.variant == "mae"
    assert (cfg.size, cfg.img_size, cfg.patch_size, cfg.mask_ratio) == ("base", 224, 16, 0.75)
    assert (cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads) == (512, 8, 16)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (800, 40, 4096)
    assert (cfg.base_lr, cfg.lr, cfg.weight_decay, cfg.clip_grad) == (1.5e-4, None, 0.05, None)
    assert (cfg.min_crop, cfg.norm_pix) == (0.2, True)


def test_the_optimiser_is_the_published_one(tmp_path, shapes_folder):
    flags = ["--epochs", "5", "--steps", "11", "--batch-size", "32", "--warmup-epochs", "0.3"]
    train("mae", tmp_path, shapes_folder, *flags)
    decayed, not_decayed = weights(tmp_path, "optimizer")["param_groups"]
    assert decayed["betas"] == not_decayed["betas"] == (0.9, 0.95)
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.05, 0.0)
    # The run has 10 steps. Its warm-up takes 0.3 epochs, which are 0.6 steps. An epoch's line has
    # the learning rate of its last step.
    peak = 1.2e-2 * 32 / 256
    for line in metrics(tmp_path):
        progress = (line["step"] - 1 - 0.6) / (10 - 0.6)
        assert line["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * progress)))


def test_a_log_file_gets_a_line_a_minute(tmp_path, shapes_folder, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # 25 seconds pass each time the script looks at the clock
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    flags = ["--epochs", "1", "--batch-size", "4", "--save-minutes", "1000"]
    train("mae", tmp_path, shapes_folder, *flags)
    lines = re.findall(r"epoch 1/1  step (\d+)  loss [\d.]+  lr \S+  \d+ images/s",
                       capsys.readouterr().out)  # fmt: skip
    steps = [int(step) for step in lines]
    assert 3 < len(steps) < 16 and steps == sorted(set(steps))


def test_warmup_cosine_equals_its_formula():
    lr_at = functools.partial(common.warmup_cosine, total=100, warmup=20, peak=2.0, floor=0.5)
    for step, lr in ((0, 0), (5, 0.5), (20, 2), (60, 1.25), (100, 0.5)):
        assert lr_at(step) == pytest.approx(lr)


def test_clipping_and_groups():
    cfg = mae_perceptual.Config(out="unused", device="cpu", clip_grad=0.1)
    run, model = common.Run(cfg), torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    groups = common.adamw(model, 0.0).param_groups
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run.backward(100 * model(torch.ones(1, 3)).sum())
    run.update(optimizer)
    assert run.sums["grad_norm"].item() == pytest.approx(100 * math.sqrt(8))  # before clipping
    changes = [(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]
    assert torch.cat(changes).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert [len(g["params"]) for g in groups] == [1, 1] and groups[1]["params"][0] is model.bias


def test_accumulated_steps_equal_whole_ones():
    """Run.backward and Run.update make one step of MAE's loss. The optimiser is plain SGD, because
    Adam would hide a wrong factor."""
    imgs, (visible, mask) = torch.randn(8, 3, 16, 16), common.random_masking(8, 16, 0.75)
    results = []
    for accumulate in (1, 4):
        run = common.Run(mae_perceptual.Config(out="unused", device="cpu", accumulate=accumulate))
        torch.manual_seed(0)
        vit = common.ViT(16, 4, embed_dim=24, depth=1, num_heads=3)
        decoder = common.Decoder(vit, 16, 1, 2)
        optimizer = torch.optim.SGD([*vit.parameters(), *decoder.parameters()], lr=0.1)
        for i in torch.arange(8).chunk(accumulate):
            pred = decoder(vit(imgs[i], visible[i]), visible[i])
            run.backward(common.masked_mse(pred, common.patchify(imgs[i], 4), mask[i]))
        run.update(optimizer)
        results.append((vit.state_dict(), decoder.state_dict()))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_the_loss_falls(tmp_path, shapes_folder):
    train("mae", tmp_path, shapes_folder, "--epochs", "30", "--lr", "0.01")
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]


# ------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_equals_uninterrupted(method, whole_run, tmp_path, shapes_folder):
    """A run in pieces ends with the same state, bit for bit, and with the same log."""
    for piece in METHODS[method].pieces:
        train(method, tmp_path, shapes_folder, *METHODS[method].run_flags, *piece)
        trains_model = "--train-tokenizer" not in piece
        assert (tmp_path / "checkpoint.pt").exists() == trains_model
        assert (tmp_path / "encoder.pt").exists() == trains_model
    assert_same_state(tmp_path, whole_run(method))

    for whole, resumed in zip(metrics(whole_run(method)), metrics(tmp_path), strict=True):
        # A stop adds kNN and gradient norms to its epoch's line.
        for name in whole:
            if name not in ("images_per_s", "data_wait") and not name.startswith("grad_"):
                assert resumed[name] == whole[name], name


def train_until(number: int, step: int, rank: int, *arguments) -> None:
    """Trains, and sends signal `number` to the process `rank` in the middle of step `step`."""
    update = common.Run.update

    def update_and_signal(run, *args, **kwargs):
        update(run, *args, **kwargs)
        if run.step == step and run.rank == rank:
            os.kill(os.getpid(), number)

    common.Run.update = update_and_signal
    train(*arguments)


@pytest.mark.parametrize("number, step, flags, code, saved", [
    (signal.SIGKILL, 6, [], -9, 4),  # in the second of three epochs of four steps
    (signal.SIGKILL, 6, ["--save-minutes", "0"], -9, 6),
    (signal.SIGTERM, 6, [], 143, 7),
    (signal.SIGINT, 7, [], 130, 8),  # after an epoch's last step, before its end
    (signal.SIGTERM, 5, ["--steps", "6"], 143, 6),  # the same in an epoch that --steps cuts off
])  # fmt: skip
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    number, step, flags, code, saved, whole_run, tmp_path, shapes_folder
):
    arguments = ["mae", tmp_path, shapes_folder, *METHODS["mae"].run_flags]
    assert in_processes(1, train_until, number, step, 0, *arguments, *flags) == [code]
    assert weights(tmp_path, "step") == saved
    if "--steps" in flags:
        train(*arguments, *flags)
        assert [line["step"] for line in metrics(tmp_path)] == [4, 6]
        assert (tmp_path / "recon_0002.png").exists()
    train(*arguments)
    assert_same_state(tmp_path, whole_run("mae"))
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses == [line["loss"] for line in metrics(whole_run("mae"))]


def evaluate_until(number: int, file) -> None:
    """Evaluates, and sends itself signal `number` before features are computed. An evaluation
    without training has nothing to save."""
    outputs = common.outputs

    def outputs_and_signal(*arguments):
        os.kill(os.getpid(), number)
        return outputs(*arguments)

    common.outputs = outputs_and_signal
    arguments = [str(file), "--mode", "knn", "--workers", "2", "--device", "cpu"]
    eval_linear.main(common.parse(eval_linear.Config, {}, arguments))


def test_a_signal_ends_an_evaluation_without_training_at_once(whole_run, tmp_path):
    file = shutil.copy(whole_run("mae") / "encoder.pt", tmp_path)
    assert in_processes(1, evaluate_until, signal.SIGTERM, file) == [143]
    assert in_processes(1, evaluate_until, signal.SIGINT, file) == [130]


def test_a_signal_to_one_process_stops_all_and_they_resume(tmp_path, shapes_folder):
    flags = [shapes_folder, "--epochs", "2"]
    assert in_processes(2, train, "mae", tmp_path / "whole", *flags) == [0, 0]
    parts = ["mae", tmp_path / "parts", *flags]
    assert in_processes(2, train_until, signal.SIGTERM, 5, 1, *parts) == [143, 143]
    assert in_processes(2, train, *parts) == [0, 0]
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    whole, resumed = (metrics(tmp_path / name)[-1]["loss"] for name in ("whole", "parts"))
    assert resumed == pytest.approx(whole, rel=1e-12)


def write_average_of_ranks(folder) -> None:
    run, model = common.Run(settings("mae", "--out", folder)), torch.nn.BatchNorm1d(3)
    model.running_mean.fill_(run.rank)
    common.average_statistics(model)
    torch.save(model.state_dict(), folder / f"{run.rank}.pt")


def test_processes_share_running_statistics(tmp_path):
    assert in_processes(2, write_average_of_ranks, tmp_path) == [0, 0]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt")["running_mean"].tolist() == [0.5] * 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path, shapes_folder, capsys, monkeypatch):
    train("mae", tmp_path, shapes_folder, "--epochs", "2", "--steps", "4")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    update = common.Run.update

    def update_and_spoil(run, *args, **options):
        update(run, *args, **options)
        if run.step == 7:
            next(run.state["model"].parameters()).data.fill_(math.nan)

    monkeypatch.setattr(common.Run, "update", update_and_spoil)
    flags = ["--out", tmp_path, "--data", shapes_folder, *TINY, *MAE, "--epochs", "2"]
    error = error_of(capsys, mae_perceptual, *flags)
    assert "not finite by step 8: model nan" in error and "last good checkpoint" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_folder_in_use_refuses_a_second_process(tmp_path, shapes_folder):
    with common.lock(tmp_path):
        assert in_processes(1, train, "mae", tmp_path, shapes_folder) == [2]
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.parametrize("method, flags", [
    ("mae", []), ("cmae", []),
    ("supervised_mim", ["--randaug", "15", "--mixup", "0.5", "--knn-every", "0"]),
])  # fmt: skip
def test_files_and_worker_processes_resume_bit_for_bit(
    method, flags, tmp_path, tokenizer
):
    """The main process starts and two workers go on: they decode, crop (CMAE: by boxes in the
    second epoch) and augment the images in the same way."""
    for split, count in (("train", 40), ("val", 10)):
        write_images(tmp_path / "data" / split, count, 24, seed=0)
    flags = [tmp_path / "data", "--epochs", "2", *flags]
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    train(method, tmp_path / "whole", *flags)
    train(method, tmp_path / "parts", *flags, "--steps", "1")
    train(method, tmp_path / "parts", *flags, "--workers", "2")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_an_fp16_overflow_skips_the_step_and_logs_no_infinity():
    run = common.Run(mae_perceptual.Config(out="unused", device="cpu", precision="fp16"))
    model = torch.nn.Linear(2, 1)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model.weight.detach().clone()
    run.backward(1e38 * model(torch.ones(1, 2)).sum())
    run.update(optimizer)
    assert torch.equal(model.weight, before) and run.sums["grad_norm"] == 0
    run.backward(model(torch.ones(1, 2)).sum())
    run.update(optimizer)
    assert run.sums["skipped"] == 1 and run.counts["skipped"] == 2 and run.sums["grad_norm"] > 0


def test_the_file_that_a_run_began_with_is_not_needed_to_resume(whole_run, tmp_path, shapes_folder):
    file, flags = tmp_path / "encoder.pt", ["--epochs", "2", "--init-from", tmp_path / "encoder.pt"]
    shutil.copy(whole_run("mae") / "encoder.pt", file)
    for name, steps in (("whole", []), ("parts", ["--steps", "3"])):
        train("mae", tmp_path / name, shapes_folder, *flags, *steps)
    file.unlink()
    train("mae", tmp_path / "parts", shapes_folder, *flags)
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_resuming_needs_the_same_images_and_number_of_parts(tmp_path, capsys):
    write_images(tmp_path / "data", 40, 16, seed=0, labelled=False)
    flags = ["--out", tmp_path / "run", "--data", tmp_path / "data", *TINY, *MAE, "--epochs", "2"]
    train("mae", tmp_path / "run", tmp_path / "data", "--epochs", "2", "--steps", "1")
    error = error_of(capsys, mae_perceptual, *flags, "--accumulate", "2")
    assert "processes x accumulate was 1, now 2" in error
    next((tmp_path / "data").iterdir()).unlink()
    assert "number of images was 40, now 39" in error_of(capsys, mae_perceptual, *flags)


def train_on_a_disk_that_gets_full(folder, *arguments) -> None:
    """Trains; from the end of the second epoch on, no file can grow beyond 20 kB."""
    end_epoch = common.Run.end_epoch

    def fill_disk_and_end_epoch(run, *args, **kwargs):
        if run.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        end_epoch(run, *args, **kwargs)

    common.Run.end_epoch = fill_disk_and_end_epoch
    with open(folder / "stderr.txt", "w") as file, contextlib.redirect_stderr(file):
        train("mae", folder, *arguments)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, shapes_folder):
    flags = [shapes_folder, "--epochs", "2", "--recon-every", "5"]
    (code,) = in_processes(1, train_on_a_disk_that_gets_full, tmp_path, *flags)
    error = error_line(code, (tmp_path / "stderr.txt").read_text())
    assert "could not write" in error and "intact" in error
    assert weights(tmp_path, "step") == 4 and not list(tmp_path.glob("*.tmp"))
    train("mae", tmp_path, *flags)
    assert weights(tmp_path, "step") == 8


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_draw_save_and_resume(tmp_path, shapes_folder):
    train("mae", tmp_path, shapes_folder, "--epochs", "2", "--steps", "5", "--compile")
    train("mae", tmp_path, shapes_folder, "--epochs", "2")  # --compile may change
    assert (tmp_path / "recon_0002.png").exists()
    assert not any("_orig_mod" in name for name in weights(tmp_path))


@pytest.mark.parametrize("method, term, limit, precision", [
    ("mae", "loss", 3, "fp16"), ("msg-ada", "pix", 3, "bf16"),
    pytest.param("msg-ada", "pix", 3, "fp16", marks=pytest.mark.slow),
    ("mixed_ae", "recon", 2, "bf16"), ("cmae", "loss", 5, "fp16"),
    ("supervised_mim", "loss", 7, "bf16"),
])  # fmt: skip
def test_half_precision_trains_and_resumes(
    method, term, limit, precision, tmp_path, shapes_folder
):
    flags = ["--epochs", "5" if method == "msg-ada" else "2", "--precision", precision]
    train(method, tmp_path, shapes_folder, *flags, "--steps", "3")
    train(method, tmp_path, shapes_folder, *flags)
    assert all(0 < line[term] < limit for line in metrics(tmp_path))


# ------------------------------------------------------------------------------ processes


def weights_without_key_bias(folder) -> dict:
    """All weights but the keys' bias. Its true gradient is 0, because softmax ignores it, so Adam,
    which divides by the gradient's size, turns its rounding errors into steps of full size."""
    state = weights(folder)
    for name, x in state.items():
        if name.endswith("qkv.bias"):
            query, _, value = x.chunk(3)
            state[name] = torch.cat([query, value])
    return state


def assert_same_training(one, two, names, tolerance: float, rel: float) -> None:
    """Two runs' weights, and their metrics of these names, are equal up to the order of sums."""
    a, b = weights_without_key_bias(one), weights_without_key_bias(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=tolerance, rtol=0, msg=name)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        for name in names:
            assert other[name] == pytest.approx(line[name], rel=rel), name
        for name in line.keys() & {"knn", "val_top1"}:
            assert other[name] == pytest.approx(line[name], abs=7), name  # 2 of 32 images


def test_torchrun_with_two_processes_equals_one(tmp_path, shapes_folder):
    flags = ["--epochs", "2", "--knn-every", "2"]
    arguments = [*flags, "--data", shapes_folder, *TINY, *MAE, "--out", tmp_path / "two"]
    done = run_script(ROOT / "mae_perceptual.py", *arguments, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert "16 = 2 processes x 1 accumulated x 8" in done.stdout
    assert "8 steps in 2 epochs" in done.stdout
    assert re.search(r"  knn [\d.]+", done.stdout)
    train("mae", tmp_path / "one", shapes_folder, *flags, "--accumulate", "2")
    assert_same_training(tmp_path / "one", tmp_path / "two", ["loss"], 2e-4, 1e-4)


# CMAE is tested in test_cmae.py: its contrastive loss compares images across processes, but not
# across micro-batches.
GAN_TERMS = ["loss", "feat", "style", "adv", "d_loss", "g_norm", "d_norm"]
GAN_FLAGS = ["--steps", "7", "--refresh-epochs", "2"]


@pytest.mark.parametrize("method, flags, names, tolerance, rel", [
    ("mixed_ae", [], ["loss", "recon", "homo", "topk_accuracy"], 2e-4, 1e-3),
    ("ls", GAN_FLAGS, GAN_TERMS, 2e-3, 0.01),
    ("msg-ada", GAN_FLAGS, [*GAN_TERMS, "path"], 2e-3, 0.01),
    ("supervised_mim", [], ["loss", "class_loss", "token_loss"], 2e-4, 1e-3),
])  # fmt: skip
def test_two_processes_equal_accumulation(
    method, flags, names, tolerance, rel, tmp_path, shapes_folder, tokenizer
):
    flags = [shapes_folder, "--epochs", "2", *flags]
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    # Each process has two micro-batches, so that a wrong order or an early exchange would show.
    arguments = [method, tmp_path / "two", *flags, "--accumulate", "2"]
    assert in_processes(2, train, *arguments) == [0, 0]
    train(method, tmp_path / "one", *flags, "--accumulate", "4")
    assert_same_training(tmp_path / "one", tmp_path / "two", names, tolerance, rel)
    if method == "msg-ada":  # what p and the path length have accumulated is equal, too
        a, b = (weights(tmp_path / name, "adversary") for name in ("one", "two"))
        assert a["augment._extra_state"] == b["augment._extra_state"]
        torch.testing.assert_close(a["path_length.mean"], b["path_length.mean"], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------ other weights


@pytest.mark.parametrize("method, lacking", [
    ("mae", "decoder"), ("msg-ada", "decoder"), ("mixed_ae", "decoder, segment"),
    ("cmae", "decoder, momentum_encoder, momentum_projector, position_head, predictor, projector"),
    ("supervised_mim", "decoder, head"),
])  # fmt: skip
def test_init_from_a_run_and_from_an_encoder(
    method, lacking, whole_run, tmp_path, shapes_folder, tokenizer, capsys
):
    """Modules that the file has come from it; the others start as in a new run."""
    flags = [shapes_folder, "--steps", "1", "--lr", "1e-9"]
    flags += ["--momentum", "1"] if method == "cmae" else []
    flags += ["--tokenizer", tokenizer] if method == "supervised_mim" else []
    trained = weights(whole_run(method))
    for file, lacks in (("checkpoint.pt", ""), ("", lacking)):  # a run's folder has its encoder.pt
        out = tmp_path / (file or "encoder")
        train(method, out, *flags, "--init-from", whole_run(method) / file)
        error = capsys.readouterr().err
        message = f"encoder.pt has no {lacks}: initialised as in a new run"
        assert message in error if lacks else "no " not in error
        started, changed = weights(out), set()
        assert started.keys() == trained.keys()
        for name, x in started.items():
            if x.is_floating_point() and "running_" not in name:
                if not torch.allclose(x, trained[name], atol=1e-6, rtol=0):
                    changed.add(name.partition(".")[0])
        assert ", ".join(sorted(changed)) == lacks


def test_init_from_weights_that_do_not_fit(whole_run, tmp_path, capsys):
    arguments = [*TINY, *MAE, "--depth", "2", "--out", tmp_path / "run"]
    file = whole_run("mae") / "encoder.pt"
    error = error_of(capsys, mae_perceptual, *arguments, "--init-from", file)
    assert error == f"error: --init-from {file}: its encoder has depth 1, not 2"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ mistakes

MISTAKES = {
    mae_perceptual: [
        (["--img-size", "30"], "image size 30x30 is not divisible by patch size 4"),
        (["--mask-ratio", "0"], "--mask-ratio 0.0"),
        (["--mask-ratio", "1.5"], "--mask-ratio 1.5"),
        (["--mask-ratio", "nan"], "--mask-ratio nan"),
        (["--mask-ratio", "0.99"], "some of the 64 patches must stay visible"),
        (["--mask-ratio", "0.001", "--img-size", "4"], "some of the 1 patches"),
        (["--data", "no/such/folder"], "no such folder"),
        (["--preset", "cifar11"], "invalid choice: 'cifar11'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--epochs", "three"], "invalid int value: 'three'"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--accumulate", "3"], "--batch-size 32 is not divisible by 1 processes x --accumulate 3"),
        (["--batch-size", "30000"], "--batch-size 30000 is more than the 20000 images"),
        (["--init-from", "absent.pt"], "absent.pt: No such file"),
        (["--decoder-heads", "5"], "decoder width 64 is not divisible by 5 heads"),
        (["--decoder-depth", "0"], "--decoder-depth must be at least 1"),
        (["--variant", "ls2"], "invalid choice: 'ls2'"),
        (["--decoder-depth", "2"], "--decoder-depth 4, not 2"),
        (["--depth", "3"], "--depth 4 or more, not 3"),
        (["--disc-width", "48"], "--disc-width must be a multiple of 32"),
        (["--variant", "mae", "--preset", "imagenet"], "use --preset imagenet-mae"),
        (["--variant", "ls", "--img-size", "4", "--patch-size", "2", "--mask-ratio", "0.5"],
         "images of 4 px have no half"),
        (["--lr-decay", "0.9"], "--lr-decay has no warm-up: add --warmup-epochs 0"),
    ],
    mixed_ae: [
        (["--img-size", "28"], "7x7 = 49 patches cannot be shared by 4 images: the number of "
                               "patches must be a multiple of 4 and at least 8; the nearest is "
                               "--img-size 24"),
        (["--img-size", "8"], "2x2 = 4 patches cannot be shared by 4 images: the number of patches "
                              "must be a multiple of 4 and at least 8; the nearest is "
                              "--img-size 16"),
        (["--mask-ratio", "0.7"], "--mask-ratio 0.7 does not fit: G images in a mixture mask "
                                  "1 - 1/G of each; the nearest possible value is --mask-ratio "
                                  "0.667 (G = 3)"),
        (["--mask-ratio", "0.1"], "the nearest possible value is --mask-ratio 0.5 (G = 2)"),
        (["--batch-size", "30"], "--batch-size 30 is not divisible by 1 processes x --accumulate 1 "
                                 "x groups of 4; the nearest is 32"),
        (["--batch-size", "34", "--accumulate", "3"], "groups of 4; the nearest is 36"),
        (["--tau", "0"], "--tau must be above 0"),
        (["--homo-weight", "-1"], "--homo-weight must be at least 0"),
        (["--decoder-heads", "5"], "decoder width 64 is not divisible by 5 heads"),
    ],
    cmae: [
        (["--batch-size", "1"], "needs at least 2 images at a time, over all processes: "
                                "raise --batch-size or lower --accumulate"),
        (["--batch-size", "4", "--accumulate", "4"],
         "needs at least 2 images at a time, over all processes"),
        (["--momentum", "1.5"], "--momentum must be at most 1"),
        (["--crop-alpha", "0.001"], "--crop-alpha must be at least 0.01"),
        (["--contrastive-weight", "-1"], "--contrastive-weight must be at least 0"),
        (["--crop", "centre"], "invalid choice: 'centre'"),
        (["--preset", "imagenet"], "invalid choice: 'imagenet'"),
        (["--preset", "tiny-imagenet"], "--data has to name the folder of the images"),
    ],
    supervised_mim: [
        (["--mim-weight", "-1"], "--mim-weight must be at least 0"),
        (["--token-smoothing", "1.5"], "--token-smoothing must be at most 1"),
        (["--randaug", "31"], "--randaug must be at most 30"),
        (["--tokenizer", "absent.pt"], "absent.pt: No such file"),
        (["--tokenizer", __file__, "--train-tokenizer"], "--tokenizer cannot be combined with --t"),
        (["--tokenizer", __file__], "is truncated or not a checkpoint"),
        (["--codebook-size", "0"], "--codebook-size must be at least 1"),
        (["--tokenizer-lr", "0"], "--tokenizer-lr must be above 0"),
        (["--target", "colours"], "invalid choice: 'colours'"),
        (["--preset", "imagenet"], "--data has to name the folder of the images, for ImageNet"),
        (["--decoder-depth", "0"], "--decoder-depth must be at least 1"),
        # These are found before a tokenizer is trained:
        (["--batch-size", "10", "--accumulate", "3"], "divisible by 1 processes x --accumulate 3"),
        (["--batch-size", "20001"], "is more than the 20000 images"),
        (["--init-from", __file__], "is truncated or not a checkpoint"),
        (["--batch-size", "4", "--accumulate", "4", "--mixup", "1"], "mixup needs at least 2"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script, flags, message", [
    pytest.param(script, flags, message, id=f"{script.__name__} {' '.join(flags)}"[:60])
    for script, mistakes in MISTAKES.items() for flags, message in mistakes
])  # fmt: skip
def test_mistakes_are_one_line_errors_and_leave_nothing(script, flags, message, tmp_path, capsys):
    assert message in error_of(capsys, script, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path, capsys):
    error = error_of(capsys, mae_perceptual, "--device", "cuda", "--out", tmp_path / "run")
    assert "no usable CUDA device" in error and not (tmp_path / "run").exists()


def test_mistakes_in_a_run_folder(whole_run, tmp_path, shapes_folder, capsys):
    flags = ["--data", shapes_folder, *TINY, *MAE, *METHODS["mae"].run_flags]
    refused = functools.partial(error_of, capsys, mae_perceptual, *flags)
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole_run("mae"), out)
    error = refused("--out", out, "--mask-ratio", "0.5", "--seed", "1")
    assert "mask_ratio was 0.75, now 0.5" in error and "seed was 0, now 1" in error

    other.mkdir()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    identity = state["identity"] | {"script": "cmae.py"}
    torch.save(state | {"identity": identity}, other / "checkpoint.pt")
    assert "is a run of cmae.py, not mae_perceptual.py" in refused("--out", other)
    content = (out / "checkpoint.pt").read_bytes()
    for broken in (content[:5000], b"?"):
        (other / "checkpoint.pt").write_bytes(broken)
        assert "truncated or not a checkpoint" in refused("--out", other)
    (tmp_path / "file").write_text("")
    assert "--out" in refused("--out", tmp_path / "file")


def test_restart_ignores_the_checkpoint_and_says_so(whole_run, tmp_path, shapes_folder, capsys):
    shutil.copytree(whole_run("mae"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "eval.json").write_text("{}")
    flags = ["--epochs", "1", "--mask-ratio", "0.5", "--init-from", tmp_path / "encoder.pt"]
    train("mae", tmp_path, shapes_folder, *flags, "--restart")
    assert "checkpoint.pt is ignored and will be overwritten" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["mask_ratio"] == 0.5
    assert [line["step"] for line in metrics(tmp_path)] == [4] and weights(tmp_path, "step") == 4
    assert (tmp_path / "eval.json").exists()  # no file is deleted


def test_without_labels_a_run_has_no_knn(tmp_path, capsys):
    write_images(tmp_path / "data", 16, 16, seed=0, labelled=False)
    train("mae", tmp_path / "run", tmp_path / "data", "--epochs", "1", "--knn-every", "1")
    assert "no kNN, because it needs labelled images" in capsys.readouterr().out
    assert (tmp_path / "run" / "recon_0001.png").exists()
    error = error_of(capsys, eval_linear, tmp_path / "run")
    assert "in class folders in train/ and val/" in error


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, shapes_folder, capsys, monkeypatch):
    original, calls = common.masked_mse, []

    def explode(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(common, "masked_mse", explode)
    flags = ["--out", tmp_path, "--data", shapes_folder, *TINY, *MAE, "--epochs", "3"]
    error = error_of(capsys, mae_perceptual, *flags)
    assert "not finite by step 7: loss nan" in error
    assert f"last good checkpoint: {tmp_path}" in error
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize("name", ["mae_perceptual", "mixed_ae", "cmae", "supervised_mim"])
def test_common_and_one_script_are_all_that_a_project_needs(name, tmp_path, shapes_folder):
    """A script and common.py are copied into an empty folder and train there."""
    for file in ("common.py", f"{name}.py"):
        shutil.copy(ROOT / file, tmp_path)
    method = {"mae_perceptual": "msg-ada"}.get(name, name)
    flags = [*TINY, *METHODS[method].model_flags, "--data", shapes_folder, "--steps", "2"]
    command = [sys.executable, f"{name}.py", *map(str, flags), "--knn-every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "runs" / f"{name}-demo", "step") == 2


def test_running_out_of_memory_is_a_one_line_error_that_says_what_to_do(
    tmp_path, shapes_folder, capsys, monkeypatch
):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")

    monkeypatch.setattr(common, "masked_mse", too_large)
    flags = ["--out", tmp_path, "--data", shapes_folder, *TINY, *MAE]
    error = error_of(capsys, mae_perceptual, *flags)
    assert error.startswith("error: CUDA out of memory. Tried") and "Raise --accumulate" in error


def test_more_processes_than_gpus_are_a_one_line_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="has no GPU: --nproc-per-node 2"):
        common.set_up_process("auto")


def test_an_error_in_a_real_process_is_one_line_without_traceback():
    done = run_script(ROOT / "mae_perceptual.py", "--img-size", "30")
    assert done.stdout == "" and "not divisible" in error_line(done.returncode, done.stderr)


# ------------------------------------------------------------------------------ real images


@pytest.mark.parametrize("method, flags, ranges", [
    ("mae", ["--decoder-depth", "2", "--variant", "mae"], {"loss": (0.5, 1.3)}),
    ("msg-ada", ["--depth", "4", "--decoder-depth", "4", "--batch-size", "16"],
     {"pix": (1.6, 3.4)}),
    ("mixed_ae", ["--decoder-depth", "1"], {"recon": (0.5, 1.3), "topk_accuracy": (0.2, 0.4)}),
    ("cmae", [], {"recon": (1.0, 2.6), "contrastive_acc": (2 / 64, 1)}),
    ("supervised_mim",
     ["--decoder-depth", "1", "--tokenizer-epochs", "2", "--tokenizer-width", "4",
      "--codebook-size", "64", "--patch-size", "8", "--knn-every", "0", "--lr", "1e-3"],
     {"class_loss": (0, math.log(10)), "token_loss": (0, math.log(64))}),
])  # fmt: skip
def test_real_images_learn(method, flags, ranges, cifar_folder, tmp_path):
    """The scripts learn from 30 steps of CIFAR-10. Before training, MAE's loss is about 1.4, and
    the L1 loss of msg-ada, which is a sum over four scales, is about 4."""
    script = METHODS[method].script
    arguments = [
        "--preset", "cifar", "--data", str(cifar_folder), "--device", "cpu", "--workers", "0",
        "--depth", "2", "--batch-size", "32", "--steps", "30", "--epochs", "2",
        "--warmup-epochs", "0.25", "--lr", "4e-4", "--out", str(tmp_path), *flags,
    ]  # fmt: skip
    script.main(common.parse(script.Config, script.PRESETS, arguments))
    (line,) = metrics(tmp_path)
    assert line["step"] == 30
    for name, (low, high) in ranges.items():
        assert low < line[name] < high, name
    if method == "supervised_mim":  # it also trains a tokenizer, for 100 steps
        _, tokenizer = metrics(tmp_path / "tokenizer")
        assert tokenizer["psnr"] > 14 and tokenizer["codes_used"] > 0.2


# ------------------------------------------------------------------------------ what users read

SCRIPTS = {script.__name__: script for script in (*MISTAKES, eval_linear)}


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in a README or manual that calls one of the scripts."""
    text = re.sub(r"\\+\n", " ", text)  # in a docstring the backslash is doubled
    script = rf"(?:{'|'.join(SCRIPTS)})\.py"
    lines = re.findall(rf"(?:python|torchrun)\S* [^\n#|]*?{script}[^\n#`|&]*", text)
    return [shlex.split(line) for line in lines]


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    """A custom Dataset, pre-training and an evaluation, as a user copies them."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "knn top-1" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "runs" / "mine" / "encoder.pt").exists()


@pytest.mark.parametrize("file", ["README.md", *(f"{name}.py" for name in SCRIPTS)])
def test_every_command_that_we_show_is_accepted(file, tmp_path, monkeypatch):
    commands = commands_in((ROOT / file).read_text())
    assert len(commands) >= 3
    monkeypatch.chdir(tmp_path)
    for command in commands:
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        script, flags = SCRIPTS[command[at].removesuffix(".py")], command[at + 1 :]
        for word in flags:  # files and folders that the command needs
            if word.endswith(".pt"):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
            elif word.startswith("runs/"):
                (tmp_path / word).mkdir(parents=True, exist_ok=True)
                (tmp_path / word / "encoder.pt").touch()
        cfg = common.parse(script.Config, getattr(script, "PRESETS", {}), flags)
        cfg.check()
        if hasattr(script, "build"):
            with torch.device("meta"):  # tensors have shapes but take no memory
                script.build(cfg, *([1000] if script is supervised_mim else []))


def test_help_has_every_flag_with_advice(capsys):
    with pytest.raises(SystemExit) as end:
        settings("mae", "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("preset", "data", "out", "epochs", "steps", "batch-size", "lr", "size", "img-size",
                 "patch-size", "mask-ratio", "device", "precision", "compile", "accumulate",
                 "workers", "seed", "init-from", "variant"):  # fmt: skip
        assert f"--{flag}" in text, flag
    assert "share of masked patches" in text
    with pytest.raises(SystemExit):
        common.parse(supervised_mim.Config, supervised_mim.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "overrides --base-lr [0.001]" in text  # the default of the presets, not of the Config


def test_a_learning_rate_that_is_given_overrides_any_of_the_preset():
    for flags, base_lr, lr in (
        ([], 1.5e-4, 1e-3), (["--base-lr", "0.05"], 0.05, None),
        (["--lr", "0.2"], 1.5e-4, 0.2), (["--lr", "0.2", "--base-lr", "0.05"], 0.05, 0.2),
    ):  # fmt: skip
        cfg = common.parse(supervised_mim.Config, supervised_mim.PRESETS, flags)
        assert (cfg.base_lr, cfg.lr) == (base_lr, lr)


def test_messages_say_what_is_still_to_do(tmp_path, shapes_folder, capsys):
    (tmp_path / "begun").mkdir()
    assert "it is written when an epoch ends" in error_of(capsys, eval_linear, tmp_path / "begun")
    for flags, advice in ((["--steps", "1"], "without --steps it goes on"),
                          ([], "--restart starts over")):  # fmt: skip
        for repeats in (False, True):
            train("mae", tmp_path / "run", shapes_folder, "--epochs", "1", *flags)
            text = capsys.readouterr().out
            assert ("nothing left to do" in text) == (advice in text) == repeats
