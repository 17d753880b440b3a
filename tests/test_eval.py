"""Linear probe, kNN and fine-tuning against slow independent versions."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import eval_linear
from eval_linear import LARS, layer_decay_groups


def test_lars_equals_its_formula():
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2), torch.randn(3)
    p, b = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    optimizer = LARS([p, b], lr=0.3, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
    w, v, u, s = weight.double(), torch.zeros(3, 2).double(), bias.double(), torch.zeros(3).double()
    for _ in range(5):
        gw, gb = torch.randn(3, 2), torch.randn(3)
        p.grad, b.grad = gw, gb
        optimizer.step()
        d = gw.double() + 0.1 * w
        d = d * 0.02 * math.sqrt((w**2).sum()) / math.sqrt((d**2).sum())
        v = 0.9 * v + d
        w = w - 0.3 * v
        s = 0.9 * s + gb.double()  # 1-D: plain momentum
        u = u - 0.3 * s
    torch.testing.assert_close(p.double(), w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.double(), u, atol=1e-5, rtol=1e-5)
    zero = nn.Parameter(torch.zeros(2, 2))  # no norm to scale with: a plain step
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=0.5).step()
    assert torch.equal(zero.data, torch.full((2, 2), -0.5))


def test_knn_scores_equal_a_loop():
    torch.manual_seed(0)
    train, labels, test = torch.randn(30, 4), torch.randint(0, 3, (30,)), torch.randn(7, 4)
    got = common.knn_scores(train, labels, test, k=5, temperature=0.07, num_classes=4)
    for i in range(7):
        cosines = [(a @ test[i] / a.norm() / test[i].norm()).item() for a in train]
        votes = [0.0] * 4
        for j in sorted(range(30), key=lambda j: -cosines[j])[:5]:
            votes[labels[j]] += math.exp(cosines[j] / 0.07)
        torch.testing.assert_close(got[i], torch.tensor(votes), rtol=1e-4, atol=1e-2)


def test_knn_in_chunks_and_against_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    train, labels = torch.randn(400, 8), torch.randint(0, 5, (400,))
    test = torch.randn(300, 8)
    scores = common.knn_scores(train, labels, test, k=20)
    single = torch.cat([common.knn_scores(train, labels, x[None], k=20) for x in test])
    torch.testing.assert_close(scores, single, rtol=1e-4, atol=1e-3)
    votes = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    theirs = neighbors.KNeighborsClassifier(20, metric="cosine", weights=votes)
    theirs.fit(train.numpy(), labels.numpy())
    agree = (torch.from_numpy(theirs.predict(test.numpy())) == scores.argmax(1)).float().mean()
    assert agree > 0.99
    everything = common.knn_scores(train[:3], torch.arange(3), test[:2], k=20)  # k above M
    assert everything.shape == (2, 3) and (everything > 0).all()


def test_layer_decay_equals_its_formula():
    encoder = common.ViT(16, 4, embed_dim=12, depth=3, num_heads=2)
    model = eval_linear.FineTuned(encoder, 5, "mean")
    groups = layer_decay_groups(model, 1e-3, 0.05, 0.65)
    found = {id(p): g for g in groups for p in g["params"]}
    expected = {
        "encoder.cls_token": (0, False), "encoder.pos_embed": (0, False),
        "encoder.patch_embed.proj.weight": (0, True), "encoder.patch_embed.proj.bias": (0, False),
        "encoder.blocks.0.attn.qkv.weight": (1, True), "encoder.blocks.2.mlp.fc2.weight": (3, True),
        "encoder.blocks.2.norm1.bias": (3, False), "norm.weight": (4, False),
        "head.weight": (4, True), "head.bias": (4, False),
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    for name, (layer, decays) in expected.items():
        group = found[id(parameters[name])]
        assert group["lr_scale"] == pytest.approx(0.65 ** (3 + 1 - layer)), name
        assert group["lr"] == pytest.approx(1e-3 * 0.65 ** (4 - layer))
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert found.keys() == {id(p) for p in parameters.values()}
    assert sum(len(g["params"]) for g in groups) == len(parameters)
    assert len(layer_decay_groups(encoder, 1e-3, 0.05, 0.65)) == 8  # a bare ViT works too


def test_recipes_are_the_published_table():
    table = {768: (100, 5e-4, 0.65, 0.1), 1024: (50, 1e-3, 0.75, 0.2), 1280: (50, 1e-3, 0.75, 0.3)}
    for width, row in table.items():
        r = eval_linear.recipe("finetune", width)
        assert (r["epochs"], r["base_lr"], r["layer_decay"], r["drop_path"]) == row
        assert (r["batch_size"], r["weight_decay"], r["warmup_epochs"]) == (1024, 0.05, 5)
        r = eval_linear.recipe("linear", width)
        assert r["epochs"] == (90 if width == 768 else 50)
        assert (r["base_lr"], r["batch_size"], r["weight_decay"]) == (0.1, 16384, 0)


def test_accuracy_and_features():
    scores = torch.tensor([[9, 1, 2, 3, 4, 5.0], [0, 1, 2, 3, 4, 5.0], [5, 4, 3, 2, 1, 0.0]])
    assert eval_linear.accuracy(scores, torch.tensor([0, 1, 5])) == {"top1": 33.33, "top5": 66.67}
    vit = common.ViT(16, 4, embed_dim=12, depth=1, num_heads=2, drop_path=0.5)
    imgs = torch.randn(4, 3, 16, 16)
    tokens = vit.eval()(imgs)
    vit.train()
    for pool, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        batches = [(imgs[:3], torch.arange(3)), (imgs[3:], torch.arange(1))]
        features, labels = common.extract_features(vit, batches, pool)
        torch.testing.assert_close(features, expected)
        assert labels.tolist() == [0, 1, 2, 0] and vit.training


def test_fine_tuning_head_normalises_the_mean_of_unnormalised_patches():
    encoder = common.ViT(16, 4, embed_dim=12, depth=1, num_heads=2)
    imgs = torch.randn(2, 3, 16, 16)
    x = encoder.blocks[0](encoder.embed(imgs))[:, 1:].mean(1)
    model = eval_linear.FineTuned(encoder, 5, "mean")
    nn.init.normal_(model.head.weight)
    expected = model.head(F.layer_norm(x, (12,), eps=1e-6))
    torch.testing.assert_close(model(imgs), expected)


@pytest.fixture()
def encoder_file(shapes_folder, tmp_path):
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=24, depth=2, num_heads=3)
    common.save_encoder(tmp_path / "encoder.pt", vit, {"data": str(shapes_folder)})
    return tmp_path / "encoder.pt"


FEW = ["--epochs", "2", "--batch-size", "16", "--workers", "0", "--device", "cpu"]


@pytest.mark.parametrize("mode", [
    ["linear"], ["linear", "--no-cache-features"], ["knn"], ["finetune", "--accumulate", "2"],
])  # fmt: skip
def test_every_mode_end_to_end(mode, encoder_file, capsys):
    arguments = [str(encoder_file.parent), "--baseline", "--mode", *mode, *FEW]
    eval_linear.main(common.parse(eval_linear.Config, {}, arguments))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    entry = json.loads((encoder_file.parent / "eval.json").read_text())[mode[0]]
    untrained = entry["untrained"]["top1"]
    assert last == f"{mode[0]} top-1 {entry['top1']:.1f} (untrained {untrained:.1f})"
    assert 0 <= entry["top1"] <= entry["top5"] <= 100


def test_eval_json_keeps_other_modes_and_the_head_learns(encoder_file, capsys):
    for mode in ("linear", "knn"):
        eval_linear.main(common.parse(eval_linear.Config, {}, [str(encoder_file), "--mode", mode]))
    entries = json.loads((encoder_file.parent / "eval.json").read_text())
    assert entries.keys() == {"linear", "knn"}
    assert {"k10", "k20", "k100", "k200", "retrieval_1nn"} <= entries["knn"].keys()


def test_cached_probe_reaches_the_score_of_logistic_regression():
    """Gaussian classes in place of features: LARS and BatchNorm against scikit-learn's solver."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    centres = torch.randn(6, 16) * torch.logspace(-1, 1, 16)  # channels of very different scale
    labels = torch.randint(0, 6, (4000,))
    features = centres[labels] + torch.randn(4000, 16) * torch.logspace(-1, 1, 16)
    sets = iter([(features[:3000], labels[:3000]), (features[3000:], labels[3000:])])
    settings = eval_linear.recipe("linear", 192, cached=3000)
    cfg = eval_linear.Config(encoder="", device="cpu", out="", **settings)
    run = common.Run(cfg)
    encoder, images = common.ViT(16, 4, embed_dim=16, depth=1, num_heads=1), common.Images
    original, eval_linear.all_features = eval_linear.all_features, lambda *a: next(sets)
    try:
        train = images(labels[:3000], list("abcdef"))
        got = eval_linear.evaluate_cached(run, encoder, train, train)["top1"]
    finally:
        eval_linear.all_features = original
    std = features[:3000].std(0)
    theirs = linear_model.LogisticRegression(max_iter=500).fit(features[:3000] / std, labels[:3000])
    assert got > 100 * theirs.score(features[3000:] / std, labels[3000:]) - 1.5


@pytest.mark.parametrize("arguments, message", [
    (["absent"], "no such run folder or file"),
    (["ENCODER", "--mode", "walk"], "invalid choice: 'walk'"),
    (["ENCODER", "--data", "absent"], "no such folder"),
    (["ENCODER", "--epochs", "0"], "--epochs must be at least 1"),
    (["ENCODER", "--drop-path", "2"], "--drop-path must be at most 1"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, encoder_file, capsys):
    arguments = [str(encoder_file) if a == "ENCODER" else a for a in arguments]
    with pytest.raises(SystemExit) as end:
        eval_linear.main(common.parse(eval_linear.Config, {}, arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
