"""--compile: each method is one graph, which is compiled once and computes the same as without."""

import json

import pytest
import torch
from conftest import assert_same_state, train
from torch import nn

import common
import eval_linear

PLAIN = ["--no-homologous-attention", "--no-homologous-loss", "--no-segment"]
RUNS = [("mae", []), ("ssim", []), ("ls", []), ("msg", []), ("msg-ada", []),
        ("mixed_ae", []), ("mixed_ae", PLAIN),
        ("cmae", ["--accumulate", "2"]), ("cmae", ["--contrastive-weight", "0"]),
        ("supervised_mim", []), ("supervised_mim", ["--target", "pixels"]),
        ("supervised_mim", ["--mim-weight", "0"])]  # fmt: skip
STEPS = ["--epochs", "2", "--steps", "6", "--knn-every", "0"]  # stops within the second epoch


@pytest.fixture
def graphs(monkeypatch):
    """A list of the graphs that --compile traces. Each graph break and each recompilation adds one.
    The graphs run with the same kernels as eager code, so that results are equal bit for bit."""
    traced, compile_in_place = [], nn.Module.compile

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda x: compile_in_place(x, backend=backend))
    return traced


@pytest.mark.parametrize("method, flags", RUNS, ids=[" ".join([x, *y]) for x, y in RUNS])
def test_one_graph_serves_all_steps(method, flags, graphs, tmp_path, shapes_folder, request):
    """Two parts are never compiled: steps with path-length regularisation, which is differentiated
    twice, and the discriminator."""
    if method == "supervised_mim" and not flags:
        flags = ["--tokenizer", request.getfixturevalue("tokenizer")]
    train(method, tmp_path / "plain", shapes_folder, *STEPS, *flags)
    assert len(graphs) == 0
    train(method, tmp_path / "compiled", shapes_folder, *STEPS, *flags, "--compile")
    assert len(graphs) == 1
    assert_same_state(tmp_path / "plain", tmp_path / "compiled")


def test_fine_tuning_is_one_graph_and_validation_another(
    graphs, whole_run, shapes_folder, tmp_path
):
    arguments = [whole_run("mae"), "--mode", "finetune", "--data", shapes_folder, "--epochs", "2",
                 "--batch-size", "32", "--workers", "0", "--device", "cpu", "--out"]  # fmt: skip
    scores = []
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        flags = map(str, [*arguments, tmp_path / out, *more])
        eval_linear.main(common.parse(eval_linear.Config, {}, list(flags)))
        scores.append(json.loads((tmp_path / out / "eval.json").read_text())["finetune"]["top5"])
    assert len(graphs) == 2 and scores[0] == scores[1]
