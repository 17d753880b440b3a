"""--compile: each method is one graph, compiled once, and computes what it does without."""

import pytest
import torch
from conftest import assert_same_state, train
from torch import nn

PLAIN = ["--no-homologous-attention", "--no-homologous-loss", "--no-segment"]
RUNS = [("mae", []), ("ls", []), ("msg", []), ("msg-ada", []),
        ("mixed_ae", []), ("mixed_ae", PLAIN),
        ("cmae", ["--accumulate", "2"]), ("cmae", ["--contrastive-weight", "0"]),
        ("supervised_mim", []), ("supervised_mim", ["--target", "pixels"]),
        ("supervised_mim", ["--mim-weight", "0"])]  # fmt: skip
STEPS = ["--epochs", "2", "--steps", "6", "--knn-every", "0"]  # 4 of one epoch and 2 of the next


@pytest.mark.parametrize("method, flags", RUNS, ids=[" ".join([x, *y]) for x, y in RUNS])
def test_one_graph_serves_all_steps(method, flags, tmp_path, shapes_folder, request, monkeypatch):
    """Dynamo traces a graph anew for each break and each recompilation. What it traces is run by
    the same kernels as without, so that the results are equal bit for bit. (R1 and the path length
    differentiate twice, which compiled graphs cannot: these passes are not compiled.)"""
    graphs, compiled = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    if method == "supervised_mim" and not flags:
        flags = ["--tokenizer", request.getfixturevalue("tokenizer")]
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled(model, backend=backend))
    train(method, tmp_path / "plain", shapes_folder, *STEPS, *flags)
    assert len(graphs) == 0
    train(method, tmp_path / "compiled", shapes_folder, *STEPS, *flags, "--compile")
    assert len(graphs) == 1
    assert_same_state(tmp_path / "plain", tmp_path / "compiled")
