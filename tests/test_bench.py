"""The computed costs of tests/bench.py against a closed formula and the CPU's allocator."""

import contextlib
import json
from types import SimpleNamespace

import bench
import pytest
import simulated_gpu
import torch

import mae_perceptual

if not simulated_gpu.AVAILABLE or torch.cuda.is_available():
    pytest.skip("needs torch 2.10 or newer, and no GPU", allow_module_level=True)
ARGS = SimpleNamespace(preset="demo", batch=8, compile=False, methods=None, json=True)


def test_flops_of_mae_equal_the_closed_formula():
    """Multiply-adds of a ViT's linear layers and attention, twice for FLOPs; a backward pass costs
    twice the forward pass, but the images have no gradient."""
    cfg = mae_perceptual.Config(**mae_perceptual.PRESETS["demo"])
    vit = cfg.vit()
    pixels, visible, everything = 3 * cfg.patch_size**2, 16, 64

    def blocks(depth: int, dim: int, tokens: int) -> int:
        linear = tokens * (3 * dim * dim + dim * dim + 2 * 4 * dim * dim)
        return depth * (linear + 2 * tokens**2 * dim)

    embed = visible * pixels * vit.embed_dim
    rest = blocks(len(vit.blocks), vit.embed_dim, 1 + visible)
    rest += (1 + visible) * vit.embed_dim * cfg.decoder_dim
    rest += blocks(cfg.decoder_depth, cfg.decoder_dim, 1 + everything)
    rest += everything * cfg.decoder_dim * pixels
    expected = 2 * (2 * embed + 3 * rest)
    assert bench.count("mae", ARGS)["gflop"] * 1e9 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["mae", "mixed_ae", "supervised"])
def test_memory_equals_that_of_the_cpus_allocator(method, monkeypatch, tmp_path):
    """In fp32: the growth within the second step, real and computed."""
    monkeypatch.setattr(bench, "autocast", lambda device: contextlib.nullcontext())
    with simulated_gpu.registered(), bench.CountingGPU().plugged_in() as gpu:
        step = bench.make_step(method, ARGS, torch.device("cuda", 0))
        step(1)
        gpu.peak = start = gpu.live
        step(1)
        computed = gpu.peak - start
    step = bench.make_step(method, ARGS, torch.device("cpu"))
    step(1)
    with torch.profiler.profile(profile_memory=True) as profile:
        step(1)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [x["args"] for x in events if x["name"] == "[memory]"]
    start = events[0]["Total Allocated"] - events[0]["Bytes"]
    real = max(x["Total Allocated"] for x in events) - start
    assert computed == pytest.approx(real, rel=0.02)


def test_a_line_of_json_for_each_method(capsys):
    """Ratios are to MAE, and those of Supervised MIM to the supervised baseline."""
    methods = ["mixed_ae", "supervised", "mim-pixels"]
    bench.arithmetic(SimpleNamespace(**vars(ARGS) | {"methods": methods}))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row.keys() == {"method", "gflop", "ratio", "peak_gib", "operators"}
        first = {"mixed_ae": "mae"}.get(row["method"], "supervised")
        expected = row["gflop"] / bench.count(first, ARGS)["gflop"]
        assert row["ratio"] == pytest.approx(expected)
