"""Every script end to end: run folder, resume, processes, mistakes, README."""

import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script, write_images
from PIL import Image

import cmae
import common
import eval_linear
import mae_perceptual
import mixed_ae
import supervised_mim

MAE = ["--variant", "mae", "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2"]


def train(out, data, *flags):
    arguments = ["--out", str(out), "--data", str(data), *TINY, *MAE, *flags]
    mae_perceptual.main(common.parse(mae_perceptual.Config, mae_perceptual.PRESETS, arguments))


def weights(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(a, b, tolerance=0.0):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


def mistake(capsys, *arguments, script=mae_perceptual) -> str:
    """The one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        presets = getattr(script, "PRESETS", {})
        script.main(common.parse(script.Config, presets, [str(a) for a in arguments]))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


def test_run_folder(tmp_path, shapes_folder, capsys):
    out = tmp_path / "run"
    train(out, shapes_folder, "--epochs", "3", "--knn-every", "2", "--recon-every", "2")
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.prev.pt",
                     "encoder.pt", "recon_0002.png", "recon_0003.png"}  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["step"]) for x in lines] == [(1, 4), (2, 8), (3, 12)]
    assert all({"loss", "lr", "images_per_s", "data_wait"} <= x.keys() for x in lines)
    assert ["knn" in x for x in lines] == [False, True, True]
    config = json.loads((out / "config.json").read_text())
    assert config["mask_ratio"] == 0.75 and config["decoder_dim"] == 16 and config["data_dir"]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12 and state["config"] == config
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in state["model"])
    encoder = common.load_encoder(out / "encoder.pt")
    assert torch.equal(encoder.norm.weight, state["model"]["encoder.norm.weight"])
    with Image.open(out / "recon_0003.png") as picture:
        assert picture.width > 8 * 90 and picture.height > 4 * 90
    text = capsys.readouterr().out
    assert re.search(r"kNN top-1 [\d.]+ \(before training [\d.]+\)", text)
    assert "16 = 1 processes x 1 accumulated x 16" in text and "12 steps in 3 epochs" in text


def test_the_imagenet_preset_is_the_published_recipe():
    """MAE, appendix A, table 8, and section 4; every number written out once more."""
    cfg = common.parse(mae_perceptual.Config, mae_perceptual.PRESETS, ["--preset", "imagenet-mae"])
    assert cfg.variant == "mae"
    assert (cfg.size, cfg.img_size, cfg.patch_size, cfg.mask_ratio) == ("base", 224, 16, 0.75)
    assert (cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads) == (512, 8, 16)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (800, 40, 4096)
    assert (cfg.base_lr, cfg.lr, cfg.weight_decay, cfg.clip_grad) == (1.5e-4, None, 0.05, None)
    assert (cfg.min_crop, cfg.norm_pix) == (0.2, True)


def test_the_optimiser_is_the_published_one(tmp_path, shapes_folder):
    train(tmp_path, shapes_folder, "--epochs", "5", "--steps", "11", "--batch-size", "32")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    matrices, vectors = state["optimizer"]["param_groups"]
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.95)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    # 10 steps, 0.3 epochs of 2 steps of warm-up; the epoch's line has the rate of its last step.
    peak = 1.2e-2 * 32 / 256
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        progress = (line["step"] - 1 - 0.6) / (10 - 0.6)
        assert line["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * progress)))


def test_warmup_cosine_equals_its_formula():
    rate = functools.partial(common.warmup_cosine, total=100, warmup=20, peak=2.0, floor=0.5)
    assert [rate(0), rate(5), rate(20), rate(60)] == pytest.approx([0, 0.5, 2, 1.25])
    assert rate(100) == pytest.approx(0.5)


def test_clipping_and_groups():
    cfg = mae_perceptual.Config(out="unused", device="cpu", clip_grad=0.1)
    run, model = common.Run(cfg), torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    groups = common.adamw(model, 0.0).param_groups
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run.backward(100 * model(torch.ones(1, 3)).sum())
    run.update(optimizer)
    moved = [(a - b).norm() ** 2 for a, b in zip(model.parameters(), before, strict=True)]
    assert sum(moved).sqrt().item() == pytest.approx(0.1, rel=1e-3)
    assert [len(g["params"]) for g in groups] == [1, 1] and groups[1]["params"][0] is model.bias


def test_the_loss_falls_and_is_that_of_the_pictures(tmp_path, shapes_folder):
    train(tmp_path, shapes_folder, "--epochs", "30", "--lr", "0.01")
    losses = [json.loads(x)["loss"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.75 * losses[0]


KILL = """
import os, signal, sys
import torch, common, mae_perceptual as m
torch.set_num_threads(2)  # as here: bit for bit holds for equal numbers of threads
update = common.Run.update
def update_then_die(run, optimizer):
    update(run, optimizer)
    if run.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.update = update_then_die
m.main(common.parse(m.Config, m.PRESETS, sys.argv[1:]))
"""


def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(tmp_path, shapes_folder):
    """Bit for bit, with accumulation; a stop by --steps in mid-epoch is resumed where it was."""
    flags = ["--epochs", "3", "--accumulate", "2"]
    train(tmp_path / "whole", shapes_folder, *flags)

    arguments = ["--out", tmp_path / "killed", "--data", shapes_folder, *TINY, *MAE, *flags]
    killed = run_script("-c", KILL.format(step=6), *arguments)  # in the second of 3 epochs of 4
    assert killed.returncode == -9
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 4
    train(tmp_path / "killed", shapes_folder, *flags)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")

    for steps in ("3", "5", "12"):
        train(tmp_path / "steps", shapes_folder, *flags, "--steps", steps)
        assert (tmp_path / "steps" / "encoder.pt").exists()
    assert_same_weights(tmp_path / "steps", tmp_path / "whole")
    lines = (tmp_path / "steps" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [3, 4, 5, 8, 12]


def test_files_and_worker_processes_resume_bit_for_bit(tmp_path, monkeypatch):
    write_images(tmp_path / "data", 40, 24, seed=0, labelled=False)
    monkeypatch.setattr(common, "RESIDENT_BYTES", 0)
    train(tmp_path / "whole", tmp_path / "data", "--epochs", "2")
    train(tmp_path / "parts", tmp_path / "data", "--epochs", "2", "--steps", "1")
    train(tmp_path / "parts", tmp_path / "data", "--epochs", "2", "--workers", "2")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_the_checkpoint_before_is_used_if_the_last_rename_was_cut_off(tmp_path, shapes_folder):
    train(tmp_path, shapes_folder, "--epochs", "3")
    expected = weights(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    train(tmp_path, shapes_folder, "--epochs", "3")
    assert all(torch.equal(expected[k], v) for k, v in weights(tmp_path).items())


def test_two_processes_equal_one(tmp_path, shapes_folder):
    flags = ["--epochs", "2", "--data", shapes_folder, *TINY, *MAE, "--knn-every", "2"]
    script = ROOT / "mae_perceptual.py"
    done = run_script(script, *flags, "--out", tmp_path / "two", torchrun=2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "16 = 2 processes x 1 accumulated x 8" in done.stdout
    train(tmp_path / "one", shapes_folder, "--epochs", "2", "--accumulate", "2", "--knn-every", "2")
    # Adam divides by the gradient's size: where that is tiny, the order of a sum shows.
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-4)
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["knn"] == pytest.approx(one["knn"], abs=7)  # 2 of 32 images


def test_accumulation_and_gradients_equal_the_whole_batch():
    """The mean over micro-batches of the loss has the gradient of the whole batch's."""
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=24, depth=1, num_heads=3)
    decoder = common.Decoder(vit, 16, 1, 2)
    imgs, (visible, mask) = torch.randn(8, 3, 16, 16), common.random_masking(8, 16, 0.75)

    def gradient(parts: int):
        vit.zero_grad()
        for i in torch.arange(8).chunk(parts):
            pred = decoder(vit(imgs[i], visible[i]), visible[i])
            (common.masked_mse(pred, common.patchify(imgs[i], 4), mask[i]) / parts).backward()
        return vit.blocks[0].attn.qkv.weight.grad.clone()

    torch.testing.assert_close(gradient(4), gradient(1), atol=1e-6, rtol=1e-4)


def test_resuming_wants_the_same_images_and_number_of_parts(tmp_path, shapes_folder, capsys):
    write_images(tmp_path / "data", 40, 16, seed=0, labelled=False)
    out = tmp_path / "run"
    train(out, tmp_path / "data", "--epochs", "2", "--steps", "1")
    capsys.readouterr()
    flags = ["--out", out, "--data", tmp_path / "data", *TINY, *MAE, "--epochs", "2"]
    assert "processes x accumulate was 1, now 2" in mistake(capsys, *flags, "--accumulate", "2")
    next((tmp_path / "data").iterdir()).unlink()
    assert "images was 40, now 39" in mistake(capsys, *flags)


def test_accumulated_steps_equal_whole_ones(shapes_folder):
    """Run.backward and Run.update under plain SGD, where a wrong factor would show."""
    imgs, results = torch.randn(8, 3), []
    for accumulate in (1, 4):
        run = common.Run(mae_perceptual.Config(out="unused", device="cpu", accumulate=accumulate))
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for part in imgs.chunk(accumulate):
            run.backward(model(part).square().mean())
        run.update(optimizer)
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_draw_save_and_resume(tmp_path, shapes_folder):
    train(tmp_path, shapes_folder, "--epochs", "2", "--steps", "5", "--compile")
    train(tmp_path, shapes_folder, "--epochs", "2")  # --compile may change
    assert (tmp_path / "recon_0002.png").exists()
    assert not any("_orig_mod" in name for name in weights(tmp_path))


@pytest.mark.parametrize("flags", [
    ["--precision", "bf16"], ["--precision", "fp16"], ["--clip-grad", "0.1"],
])  # fmt: skip
def test_precisions_and_clipping_run_and_resume(flags, tmp_path, shapes_folder):
    train(tmp_path, shapes_folder, "--epochs", "2", "--steps", "3", *flags)
    train(tmp_path, shapes_folder, "--epochs", "2", *flags)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] < 3


def test_init_from_a_run_and_from_an_encoder(tmp_path, shapes_folder, capsys):
    train(tmp_path / "a", shapes_folder, "--epochs", "1")
    for file, has_decoder in (("checkpoint.pt", True), ("encoder.pt", False)):
        vit = common.ViT(16, 4, embed_dim=192, depth=1, num_heads=3)
        decoder = common.Decoder(vit, 16, 1, 2)
        new = mae_perceptual.PerceptualMAE(vit, decoder)
        missing = common.init_from(tmp_path / "a" / file, new)
        assert missing == (set() if has_decoder else {"decoder"})
        model = weights(tmp_path / "a")
        assert torch.equal(vit.cls_token, model["encoder.cls_token"])
        assert torch.equal(decoder.mask_token, model["decoder.mask_token"]) == has_decoder
        assert ("no decoder" in capsys.readouterr().err) == (not has_decoder)
    flags = ["--data", shapes_folder, *TINY, *MAE, "--depth", "2", "--out", tmp_path / "b"]
    error = mistake(capsys, *flags, "--init-from", tmp_path / "a" / "encoder.pt")
    assert "Missing key" in error and "blocks.1.attn.proj.bias" in error
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("flags, message", [
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
    (["--init-from", "absent.pt"], "--init-from absent.pt: no such file"),
    (["--decoder-heads", "5"], "decoder width 64 is not divisible by 5 heads"),
    (["--decoder-depth", "0"], "--decoder-depth must be at least 1"),
    (["--variant", "ls2"], "invalid choice: 'ls2'"),
])  # fmt: skip
def test_bad_values_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    assert message in mistake(capsys, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path, capsys):
    error = mistake(capsys, "--device", "cuda", "--out", tmp_path / "run")
    assert "no usable CUDA device" in error and not (tmp_path / "run").exists()


def test_mistakes_in_a_run_folder(tmp_path, shapes_folder, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    flags = ["--data", shapes_folder, *TINY, *MAE, "--epochs", "2"]
    train(out, shapes_folder, "--epochs", "2")
    capsys.readouterr()
    error = mistake(capsys, "--out", out, *flags, "--mask-ratio", "0.5", "--seed", "1")
    assert "mask_ratio was 0.75, now 0.5" in error and "seed was 0, now 1" in error
    for name in ("boxes_0002.png", "recon_0009.png", "notes.txt"):
        (out / name).write_text("")
    train(out, shapes_folder, "--epochs", "2", "--mask-ratio", "0.5", "--restart")
    assert {"recon_0002.png", "notes.txt"} <= {path.name for path in out.iterdir()}
    assert not (out / "boxes_0002.png").exists() and not (out / "recon_0009.png").exists()
    assert json.loads((out / "config.json").read_text())["mask_ratio"] == 0.5
    capsys.readouterr()

    other.mkdir()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"script": "cmae.py"}, other / "checkpoint.pt")
    assert "is by cmae.py, not mae_perceptual.py" in mistake(capsys, "--out", other, *flags)
    whole = (out / "checkpoint.pt").read_bytes()
    for content in (whole[:5000], b"?"):
        (other / "checkpoint.pt").write_bytes(content)
        assert "truncated or not a checkpoint" in mistake(capsys, "--out", other, *flags)
    (out / "checkpoint.pt").write_bytes(b"?")
    assert "delete it to go on from checkpoint.prev.pt" in mistake(capsys, "--out", out, *flags)
    (tmp_path / "file").write_text("")
    assert "--out" in mistake(capsys, "--out", tmp_path / "file", *flags)


def test_without_labels_there_is_no_knn_but_a_run(tmp_path, capsys):
    write_images(tmp_path / "data", 16, 16, seed=0, labelled=False)
    train(tmp_path / "run", tmp_path / "data", "--epochs", "1", "--knn-every", "1")
    assert "no kNN: that takes labels" in capsys.readouterr().out
    assert (tmp_path / "run" / "recon_0001.png").exists()
    error = mistake(capsys, tmp_path / "run", script=eval_linear)
    assert "has no labels: they need class folders in train/ and val/" in error


FULL_DISK = """
import resource, sys
import common, mae_perceptual as m
end_epoch = common.Run.end_epoch
def on_full_disk(run, *args, **kwargs):
    if run.epoch == 2:  # no file may grow beyond 20 kB from now on
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    end_epoch(run, *args, **kwargs)
common.Run.end_epoch = on_full_disk
m.main(common.parse(m.Config, m.PRESETS, sys.argv[1:]))
"""


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, shapes_folder):
    arguments = ["--out", tmp_path, "--data", shapes_folder, *TINY, *MAE, "--epochs", "2"]
    done = run_script("-c", FULL_DISK, *arguments, "--recon-every", "5")
    assert done.returncode == 2, done.stderr
    error = [x for x in done.stderr.splitlines() if "epoch " not in x]
    assert len(error) == 1 and "could not write" in error[0] and "intact" in error[0], done.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))
    train(tmp_path, shapes_folder, "--epochs", "2", "--recon-every", "5")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 8


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, shapes_folder, capsys, monkeypatch):
    original, calls = common.masked_mse, []

    def explode(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(common, "masked_mse", explode)
    flags = ["--out", tmp_path, "--data", shapes_folder, *TINY, *MAE, "--epochs", "3"]
    error = mistake_after_progress(capsys, *flags)
    assert "not finite in step 7: loss nan" in error
    assert f"last good checkpoint: {tmp_path}" in error
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(x.isfinite().all() for x in state["model"].values())


def mistake_after_progress(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        arguments = [str(a) for a in arguments]
        mae_perceptual.main(common.parse(mae_perceptual.Config, mae_perceptual.PRESETS, arguments))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_error_in_a_real_process_is_one_line_without_traceback():
    done = run_script(ROOT / "mae_perceptual.py", "--img-size", "30")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "not divisible" in done.stderr


# ------------------------------------------------------------------------------ real images


@pytest.mark.parametrize("variant, depth, term, low, high", [
    ("mae", "2", "loss", 0.5, 1.3), ("msg-ada", "4", "pix", 0.4, 0.95),
])  # fmt: skip
def test_real_images_learn(variant, depth, term, low, high, cifar_folder, tmp_path):
    """CIFAR-10 as a user has it: the loss falls within a few dozen steps. Untrained: about 1.4
    (mae), and 1 (pix)."""
    flags = ["--preset", "cifar", "--data", str(cifar_folder), "--depth", depth, "--device", "cpu",
             "--decoder-depth", depth, "--batch-size", "32", "--steps", "50", "--epochs", "2",
             "--warmup-epochs", "0.25", "--lr", "4e-4", "--variant", variant,
             "--out", str(tmp_path)]  # fmt: skip
    mae_perceptual.main(common.parse(mae_perceptual.Config, mae_perceptual.PRESETS, flags))
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert low < metrics[term] < high and metrics["step"] == 50


# ------------------------------------------------------------------------------ what we tell people


SCRIPTS = {"mae_perceptual": mae_perceptual, "mixed_ae": mixed_ae, "cmae": cmae,
           "supervised_mim": supervised_mim, "eval_linear": eval_linear}  # fmt: skip


def commands_in(text: str) -> list[list[str]]:
    text = re.sub(r"\\+\n", " ", text)  # in a docstring the backslash is doubled
    script = rf"(?:{'|'.join(SCRIPTS)})\.py"
    lines = re.findall(rf"(?:python|torchrun)\S* [^\n#|]*?{script}[^\n#`|&]*", text)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("file", ["README.md", *(f"{name}.py" for name in SCRIPTS)])
def test_every_command_that_we_show_is_accepted(file, tmp_path, monkeypatch):
    commands = commands_in((ROOT / file).read_text())
    assert len(commands) >= 3
    monkeypatch.chdir(tmp_path)
    for command in commands:
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        script = SCRIPTS[command[at].removesuffix(".py")]
        for word in command[at + 1 :]:
            if word.endswith(".pt"):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
            elif word.startswith("runs/"):
                (tmp_path / word).mkdir(parents=True, exist_ok=True)
        cfg = common.parse(script.Config, getattr(script, "PRESETS", {}), command[at + 1 :])
        if hasattr(script, "build"):
            with torch.device("meta"):  # shapes, no memory
                script.build(cfg, *([1000] if script is supervised_mim else []))


def test_help_has_every_flag_with_advice():
    done = subprocess.run(
        [sys.executable, ROOT / "mae_perceptual.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for flag in ("preset", "data", "out", "epochs", "steps", "batch-size", "lr", "size", "img-size",
                 "patch-size", "mask-ratio", "device", "precision", "compile", "accumulate",
                 "workers", "seed", "init-from", "variant"):  # fmt: skip
        assert f"--{flag}" in done.stdout, flag
    assert "share of hidden patches" in done.stdout
