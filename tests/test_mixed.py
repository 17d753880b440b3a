"""MixedAE: each part is compared with a slow version of its equation; then the script is run."""

import math
import shutil

import pytest
import torch
from conftest import metrics, settings, train, weights
from PIL import Image
from torch.nn import functional as F

import common
import mixed_ae
from common import UserError

SWITCHES = ["--no-homologous-attention", "--no-homologous-loss", "--no-segment"]


def model_of(size=2, channels=3, img_size=16, depth=3, **options):
    """A small MixedAE with groups of `size` images, which have 16 patches by default."""
    torch.manual_seed(0)
    vit = common.ViT(img_size, 4, channels, embed_dim=24, depth=depth, num_heads=3)
    model = mixed_ae.MixedAE(vit, common.Decoder(vit, 16, 2, 2), ratio=1 / size, **options)
    with torch.no_grad():  # biases that are 0 would hide mistakes
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def queries(dtype=torch.float32, batch=2, heads=3, length=17, dim=5):
    torch.manual_seed(1)
    return [torch.randn(batch, heads, length, dim).to(dtype).requires_grad_() for _ in range(3)]


# ------------------------------------------------------------------------------ mixing


@pytest.mark.parametrize("length, size", [(64, 2), (64, 4), (64, 8), (64, 16), (64, 32), (64, 64),
                                          (196, 2), (196, 4), (196, 7), (12, 3), (6, 6)])
def test_every_image_has_exactly_its_share_of_the_mixture(length, size):
    source = mixed_ae.random_mixing(50, size, length)
    assert source.shape == (50, length) and source.dtype == torch.int64
    for row in source.tolist():
        assert [row.count(i) for i in range(size)] == [length // size] * size


def test_the_assignment_is_uniform_and_repeatable():
    source = mixed_ae.random_mixing(20000, 4, 16, generator=common.seeded("a"))
    share = F.one_hot(source, 4).double().mean(dim=0)  # how often each image is at each place
    assert (share - 0.25).abs().max() < 0.015
    equal = (source[:, :, None] == source[:, None]).double().mean(dim=0)
    expected = torch.full((16, 16), 3 / 15, dtype=torch.double).fill_diagonal_(1)
    assert (equal - expected).abs().max() < 0.015
    assert torch.equal(source, mixed_ae.random_mixing(20000, 4, 16, generator=common.seeded("a")))
    assert not torch.equal(source[0], source[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_mix_and_unmix_equal_loops(size, dtype):
    groups, length, dim = 3, 8, 5
    tokens = torch.randn(groups * size, length, dim).to(dtype)
    source, mask_token = mixed_ae.random_mixing(groups, size, length), torch.randn(dim)
    mixed = mixed_ae.mix(tokens, source)
    back = mixed_ae.unmix(mixed, source, mask_token, size)
    own = mixed_ae.own_patches(source, size)
    assert mixed.dtype == back.dtype == dtype and back.shape == tokens.shape
    for g in range(groups):
        for place in range(length):
            i = int(source[g, place])
            assert torch.equal(mixed[g, place], tokens[g * size + i, place])
            for j in range(size):
                expected = tokens[g * size + i, place] if i == j else mask_token.to(dtype)
                assert torch.equal(back[g * size + j, place], expected)
                assert own[g * size + j, place] == (i == j)


def test_the_gradient_of_unmix_reaches_each_token_once_and_the_mask_token_elsewhere():
    source = mixed_ae.random_mixing(3, 4, 8)
    mixed, mask_token = torch.randn(3, 8, 5, requires_grad=True), torch.zeros(5, requires_grad=True)
    weight = torch.randn(12, 8, 5)
    (mixed_ae.unmix(mixed, source, mask_token, 4) * weight).sum().backward()
    torch.testing.assert_close(mixed.grad, mixed_ae.mix(weight, source))
    masked = ~mixed_ae.own_patches(source, 4)
    torch.testing.assert_close(mask_token.grad, weight[masked].sum(dim=0))


# ------------------------------------------------------------------------------ attention


def slow_attention(q, k, v, topk, keep=None):
    """Computes a softmax over the kept keys only, query by query."""
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                logits = [(q[b, h, i] * key).sum() / math.sqrt(q.shape[3]) for key in k[b, h]]
                keys = list(range(len(logits)))
                if keep is not None:
                    keys = keep[b, h, i].nonzero()[:, 0].tolist()
                elif i > 0:
                    keys = [0, *sorted(keys[1:], key=lambda j: -logits[j].item())[:topk]]
                weight = torch.stack([logits[j] for j in keys]).softmax(dim=0)
                out.append(sum(w * v[b, h, j] for w, j in zip(weight, keys, strict=True)))
    return torch.stack(out).view_as(q)


@pytest.mark.parametrize("topk", [1, 4, 8, 16])
def test_homologous_attention_and_its_gradients_equal_loops(topk):
    q, k, v = queries()
    weight = torch.randn_like(q)
    results = []
    for attend in (mixed_ae.homologous_attention, slow_attention):
        out = attend(q, k, v, topk)
        gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
        results.append([out, *gradients])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_homologous_attention_in_half_precision(autocast):
    """Even where rounding makes products equal, exactly K keys are kept, and none of them has a
    clearly smaller product than a key that is dropped."""
    q, k, v = queries(torch.float32 if autocast else torch.bfloat16, length=65, dim=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        keep = mixed_ae.topk_mask(q, k, 16) == 0
        out = mixed_ae.homologous_attention(q, k, v, 16)
    assert out.dtype == torch.bfloat16
    assert (keep[:, :, 1:, 1:].sum(dim=3) == 16).all()
    assert keep[:, :, 0].all() and keep[:, :, :, 0].all()
    q, k, v = (x.detach().bfloat16().float() for x in (q, k, v))
    products, chosen = (q @ k.transpose(2, 3))[:, :, 1:, 1:], keep[:, :, 1:, 1:]
    worst = products.masked_fill(~chosen, torch.inf).amin(dim=3)
    best_dropped = products.masked_fill(chosen, -torch.inf).amax(dim=3)
    assert (best_dropped <= worst + 0.01 * worst.abs()).all()
    torch.testing.assert_close(out.float(), slow_attention(q, k, v, 16, keep), atol=0.02, rtol=0.02)


def slow_accuracy(q, k, source, topk) -> float:
    hits = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(16):
                products = [(q[b, h, 1 + i] @ k[b, h, 1 + j]).item() for j in range(16)]
                best = sorted(range(16), key=lambda j: -products[j])[:topk]
                hits += [source[b, i].item() == source[b, j].item() for j in best]
    return sum(hits) / len(hits)


def test_topk_accuracy_equals_a_count_and_its_extremes():
    source = mixed_ae.random_mixing(2, 4, 16)
    q, k, _ = queries()
    accuracy = mixed_ae.topk_accuracy(q, k, source, 4)
    assert accuracy.item() == pytest.approx(slow_accuracy(q, k, source, 4))
    assert not accuracy.requires_grad
    alike = F.pad(F.one_hot(source, 4).float()[:, None], (0, 0, 1, 0))
    assert mixed_ae.topk_accuracy(alike, alike, source, 4) == 1
    assert mixed_ae.topk_accuracy(alike, -alike, source, 4) == 0
    q, k, _ = queries(batch=100)
    chance = mixed_ae.topk_accuracy(q, k, mixed_ae.random_mixing(100, 4, 16), 4).item()
    assert chance == pytest.approx(0.25, abs=0.02)


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_homologous_contrastive_loss_equals_loops(size, dtype):
    torch.manual_seed(0)
    z, tau = torch.randn(3, 8, 6).to(dtype), 0.25
    source = mixed_ae.random_mixing(3, size, 8)
    terms = []
    for g in range(3):
        tokens = z[g].float()
        for place in range(8):
            similarity = {}  # of every other patch
            for other in range(8):
                if other != place:
                    cosine = F.cosine_similarity(tokens[place], tokens[other], dim=0)
                    similarity[other] = math.exp(cosine / tau)
            total = sum(similarity.values())
            positive = [math.log(x / total) for other, x in similarity.items()
                        if source[g, other] == source[g, place]]  # fmt: skip
            terms.append(-sum(positive) / len(positive))
    expected = pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert mixed_ae.homologous_contrastive_loss(z, source, tau).item() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed_ae.homologous_contrastive_loss(z, source, tau).item() == expected


def slow_auc(score, own) -> float:
    """The area under the ROC curve. Thresholds fall, and equal scores make one step."""
    hits, alarms, area = 0, 0, 0.0
    for threshold in sorted(set(score), reverse=True):
        step = [is_own for x, is_own in zip(score, own, strict=True) if x == threshold]
        new_hits = sum(step)
        new_alarms = len(step) - new_hits
        area += new_alarms * (hits + new_hits / 2)  # one trapezoid
        hits, alarms = hits + new_hits, alarms + new_alarms
    return area / (hits * alarms)


def slow_own_image_auc(z, source) -> float:
    areas = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        score = [F.cosine_similarity(z[i], z[j], dim=0).item() for j in others]
        areas.append(slow_auc(score, [bool(source[i] == source[j]) for j in others]))
    return sum(areas) / len(areas)


def test_own_image_auc_equals_the_area_under_curves():
    """Also with ties, which the signs of numbers have, and at its extremes."""
    source = mixed_ae.random_mixing(3, 3, 12)
    for z in (torch.randn(3, 12, 4), torch.randn(3, 12, 4).sign()):
        expected = sum(map(slow_own_image_auc, z, source)) / 3
        assert mixed_ae.own_image_auc(z, source).item() == pytest.approx(expected, abs=1e-6)
    assert mixed_ae.own_image_auc(F.one_hot(source, 3), source) == 1
    assert mixed_ae.own_image_auc(torch.ones(3, 12, 4), source) == 0.5
    many = mixed_ae.random_mixing(300, 3, 12)
    chance = mixed_ae.own_image_auc(torch.randn(300, 12, 4), many)
    assert chance.item() == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------ the model


def slow_tokens(model, imgs, source, topk, segments=True):
    """Embeds every image, adds positions, and then mixes. The blocks have the slow attention."""
    vit, size = model.encoder, model.group_size
    whole = F.conv2d(imgs, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)
    whole = whole.flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    rows = []
    for g in range(len(source)):
        row = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
        for place, i in enumerate(source[g].tolist()):
            row.append(whole[g * size + i, place])
            if segments:
                row[-1] = row[-1] + model.segment.weight[i]
        rows.append(torch.stack(row))
    x = torch.stack(rows)
    for number, block in enumerate(vit.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=2)
        q, k, v = (y.unflatten(2, (3, 8)).transpose(1, 2) for y in (q, k, v))
        accuracy = slow_accuracy(q, k, source, topk)
        out = slow_attention(q, k, v, topk if number > 0 else 10**6)
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return vit.norm(x), accuracy


@pytest.mark.parametrize("size", [2, 4])
def test_the_encoder_equals_a_slow_one_that_mixes_embedded_tokens(size):
    model = model_of(size)
    imgs, source = torch.randn(2 * size, 3, 16, 16), mixed_ae.random_mixing(2, size, 16)
    for segments in (True, False):
        tokens, accuracy = model.encode(imgs, source, segments)
        slow, slow_accuracy = slow_tokens(model, imgs, source, 16 // size, segments)
        torch.testing.assert_close(tokens, slow, atol=1e-4, rtol=1e-4)
        assert accuracy.item() == pytest.approx(slow_accuracy)
    dense, _ = slow_tokens(model, imgs, source, 16, segments=False)
    assert (dense - slow).abs().max() > 1e-2


def test_recognition_is_measured_on_a_fixed_mixture_without_segments(monkeypatch):
    model, imgs = model_of(4), torch.randn(8, 3, 16, 16)
    calls, encode = [], model.encode

    def record(imgs, source, segments):
        calls.append((imgs, source))
        return encode(imgs, source, segments)

    monkeypatch.setattr(model, "encode", record)
    with torch.no_grad():
        model.segment.weight.mul_(100)
    state = torch.get_rng_state()
    results = mixed_ae.measure_recognition(model, imgs)
    assert torch.equal(torch.get_rng_state(), state)  # so the measurement does not change training
    assert mixed_ae.measure_recognition(model, imgs) == results
    mixed, source = calls[0]
    assert all(torch.equal(mixed, x) and torch.equal(source, y) for x, y in calls)
    index = [int((imgs == img).flatten(1).all(dim=1).nonzero()) for img in mixed]
    assert sorted(index) == list(range(8)) != index  # shuffled: folders list class by class

    tokens, accuracy = encode(mixed, source, segments=False)
    z = tokens[:, 1:]
    expected = {
        "topk_content": accuracy.item(),
        "homo_content": mixed_ae.homologous_contrastive_loss(z, source, 0.25).item(),
        "own_image_auc": sum(map(slow_own_image_auc, z, source)) / 2,
    }
    assert results == pytest.approx(expected, abs=1e-4)
    _, accuracy_with_segments = encode(mixed, source, segments=True)
    assert abs(accuracy_with_segments - results["topk_content"]) > 0.01


def test_segments_alone_solve_the_task_but_not_what_is_measured():
    """In noise, there is nothing else to recognise."""
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=48, depth=2, num_heads=3)
    model = mixed_ae.MixedAE(vit, common.Decoder(vit, 24, 1, 2), ratio=0.25, homo_weight=1.0)
    with torch.no_grad():
        model.segment.weight.mul_(20)  # otherwise this takes 200 steps
    optimizer = common.adamw(model, 0.0, lr=3e-3)
    for _ in range(40):
        loss, stats = model(torch.randn(32, 3, 16, 16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stats["homo"] < 1.3
    results = mixed_ae.measure_recognition(model, torch.randn(240, 3, 16, 16))
    assert results["homo_content"] > 2.6  # log(15) = 2.71
    assert results["own_image_auc"] == pytest.approx(0.5, abs=0.03)
    assert results["topk_content"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("size", [2, 4])
def test_the_losses_are_those_of_all_images_over_their_masked_patches(size, monkeypatch):
    model, imgs = model_of(size), torch.randn(2 * size, 3, 16, 16)
    source = mixed_ae.random_mixing(2, size, 16)
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    loss, stats = model(imgs)
    pred, _, tokens, _ = model.predict(imgs)
    errors = []
    for n, img in enumerate(imgs):
        for place in range(16):
            if source[n // size, place] == n % size:
                continue
            y, x = divmod(place, 4)
            target = img[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((pred[n, place] - target).square().mean())
    assert len(errors) == 2 * size * (16 - 16 // size)
    torch.testing.assert_close(stats["recon"], sum(errors) / len(errors))
    homo = mixed_ae.homologous_contrastive_loss(tokens[:, 1:], source, 0.25)
    torch.testing.assert_close(stats["homo"], homo)
    torch.testing.assert_close(loss, stats["recon"] + 0.1 * stats["homo"])
    assert loss.requires_grad and not any(x.requires_grad for x in stats.values())


def test_temperature_and_weight_are_those_of_the_command_line(monkeypatch):
    source = mixed_ae.random_mixing(2, 4, 16)
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    model = mixed_ae.build(settings("mixed_ae", "--tau", "0.5", "--homo-weight", "0.3"))
    imgs = torch.randn(8, 3, 16, 16)
    loss, stats = model(imgs)
    _, _, tokens, _ = model.predict(imgs)
    homo = mixed_ae.homologous_contrastive_loss(tokens[:, 1:], source, 0.5)
    torch.testing.assert_close(stats["homo"], homo)
    torch.testing.assert_close(loss, stats["recon"] + 0.3 * homo)


def test_the_picture_shows_mixtures_own_parts_and_predictions(monkeypatch):
    model, imgs = model_of(2), torch.randn(4, 3, 16, 16)
    source = mixed_ae.random_mixing(2, 2, 16)
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    given, mixture, own, prediction, complete = mixed_ae.reconstruct(model, imgs).values()
    assert torch.equal(given, imgs)
    pred, *_ = model.predict(imgs)
    for n in range(4):
        place = source[n // 2].view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
        pair = imgs[n // 2 * 2 : n // 2 * 2 + 2]
        assert torch.equal(mixture[n], torch.where(place == 0, pair[0], pair[1]))
        mine = place == n % 2
        assert torch.equal(own[n], imgs[n] * mine)
        assert torch.equal(complete[n], torch.where(mine, imgs[n], prediction[n]))
    mean, std = common.patch_statistics(common.patchify(imgs, 4))
    torch.testing.assert_close(common.patchify(prediction, 4), pred * std + mean)


def test_the_picture_of_a_group_that_is_not_full_has_the_first_images_twice():
    model, imgs = model_of(4), torch.randn(6, 3, 16, 16)
    rows = mixed_ae.reconstruct(model, imgs)
    assert torch.equal(rows["input"], torch.cat([imgs, imgs[:2]]))
    assert all(row.shape == (8, 3, 16, 16) for row in rows.values())


def test_a_masked_patch_is_never_seen_and_groups_do_not_touch(monkeypatch):
    model, imgs = model_of(2), torch.randn(4, 3, 16, 16)
    source = mixed_ae.random_mixing(2, 2, 16)
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    before, *_ = model.predict(imgs)

    def changed_predictions(image, place):
        """The images whose predictions change when this patch of this image changes."""
        other = imgs.clone()
        y, x = divmod(place, 4)
        other[image, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 1
        after, *_ = model.predict(other)
        changed = (after - before).abs().amax(dim=(1, 2)) > 1e-6
        return changed.nonzero()[:, 0].tolist()

    place = int((source[0] == 0).nonzero()[0])  # visible in image 0, masked in image 1
    assert changed_predictions(1, place) == []
    assert changed_predictions(0, place) == [0, 1]
    place = int((source[1] == 1).nonzero()[0])  # visible in image 3, the second of its group
    assert changed_predictions(3, place) == [2, 3]


def test_without_the_switches_it_is_naive_mixing(monkeypatch):
    """The ordinary ViT encodes the mixed picture, and MAE's decoder is called for each image."""
    options = dict(homologous_attention=False, homo_weight=0, segment=False)
    model, imgs = model_of(4, **options), torch.randn(8, 3, 16, 16)
    source = mixed_ae.random_mixing(2, 4, 16)
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    loss, stats = model(imgs)
    assert torch.equal(loss, stats["recon"]) and model.segment is None

    losses = []
    for g in range(2):
        place = source[g].view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        mixed = sum(imgs[4 * g + i] * (place[0] == i) for i in range(4))
        tokens = model.encoder(mixed[None])
        for i in range(4):
            visible = (source[g] == i).nonzero().T
            kept = torch.cat([tokens[:, :1], tokens[:, 1:][:, visible[0]]], dim=1)
            pred = model.decoder(kept, visible)
            target = common.patchify(imgs[4 * g + i][None], 4)
            losses.append(common.masked_mse(pred, target, source[g][None] != i))
    torch.testing.assert_close(loss, sum(losses) / 8)


@pytest.mark.parametrize("channels, size, autocast", [(1, 2, False), (3, 4, True), (5, 4, False)])
def test_gradients_reach_every_parameter_but_the_positions(channels, size, autocast):
    model = model_of(size, channels, img_size=(16, 32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model(torch.randn(2 * size, channels, 16, 32))
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.endswith("pos_embed"), name
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.abs().max() > 0), name


def test_each_switch_changes_what_it_names_alone():
    imgs, results = torch.randn(8, 3, 16, 16), {}
    state = model_of(4).state_dict()
    for name, options in (
        ("all", {}), ("no attention", {"homologous_attention": False}),
        ("no loss", {"homo_weight": 0}), ("no segment", {"segment": False}),
    ):  # fmt: skip
        model = model_of(4, **options)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        torch.manual_seed(0)
        results[name] = model(imgs)
    loss, stats = results["all"]
    loss_without, stats_without = results["no loss"]
    assert stats_without == stats  # homo is still logged
    assert loss_without == stats["recon"] != loss
    for name in ("no attention", "no segment"):
        _, stats_without = results[name]
        assert abs(stats_without["recon"] - stats["recon"]) > 1e-4, name


def test_patches_learn_to_recognise_their_image():
    """They learn it from content. The loss reaches its minimum, at which the cosine is 1 for the
    other 7 of 8 patches of the same image, and -1 for the rest."""
    torch.manual_seed(0)
    imgs = torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 16, 16)
    vit = common.ViT(16, 4, embed_dim=48, depth=2, num_heads=3)
    decoder = common.Decoder(vit, 24, 1, 2)
    model = mixed_ae.MixedAE(vit, decoder, ratio=0.5, homo_weight=1.0, segment=False)
    optimizer, history = common.adamw(model, 0.0, lr=3e-3), []
    for _ in range(100):
        loss, stats = model(imgs)
        history.append(stats)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    minimum = math.log(7 + 8 * math.exp(-2 / 0.25))
    assert history[0]["homo"] > minimum + 0.15 and minimum < history[-1]["homo"] < minimum + 0.01
    assert history[-1]["recon"] < 0.2 * history[0]["recon"]


# ------------------------------------------------------------------------------ runs


def test_the_imagenet_preset_is_the_published_recipe():
    cfg = common.parse(mixed_ae.Config, mixed_ae.PRESETS, ["--preset", "imagenet"])
    assert (cfg.size, cfg.img_size, cfg.patch_size, cfg.mask_ratio) == ("base", 224, 16, 0.75)
    assert (cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads) == (512, 8, 16)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (800, 40, 1024)
    assert (cfg.base_lr, cfg.lr, cfg.weight_decay, cfg.clip_grad) == (1.5e-4, None, 0.05, None)
    assert (cfg.min_crop, cfg.tau, cfg.homo_weight) == (0.2, 0.25, 0.1)
    with torch.device("meta"):
        model = mixed_ae.build(cfg)
    assert (model.group_size, model.topk, model.plain_blocks) == (4, 49, 1)
    assert model.homologous_attention and model.segment is not None
    assert (model.tau, model.homo_weight) == (0.25, 0.1)


@pytest.mark.parametrize("naive", [False, True])
def test_a_run(naive, tmp_path, shapes_folder, whole_run):
    folder = tmp_path if naive else whole_run("mixed_ae")
    if naive:
        train("mixed_ae", folder, shapes_folder, "--epochs", "2", "--knn-every", "1",
              "--mask-ratio", "0.5", *SWITCHES)  # fmt: skip
    for line in metrics(folder):
        assert 0 < line["topk_accuracy"] < 1 and {"knn", "lr"} <= line.keys()
        expected = line["recon"] + (0 if naive else 0.1 * line["homo"])
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    with Image.open(sorted(folder.glob("recon_*.png"))[-1]) as picture:
        assert picture.width > 8 * 90 and picture.height > 5 * 90
    assert ("segment.weight" in weights(folder)) == (not naive)


def test_a_compiled_model_computes_the_same(monkeypatch):
    """The model is traced, forward and backward, but not translated to C++, which takes long."""
    model, imgs = model_of(4, depth=2), torch.randn(8, 3, 16, 16)
    source = mixed_ae.random_mixing(2, 4, 16)  # compiled code draws other random numbers
    monkeypatch.setattr(mixed_ae, "random_mixing", lambda *args: source)
    loss, stats = model(imgs)
    model.compile(backend="aot_eager")
    compiled, compiled_stats = model(imgs)
    gradients = [torch.autograd.grad(x, model.segment.weight)[0] for x in (loss, compiled)]
    torch.testing.assert_close((compiled, compiled_stats), (loss, stats))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------ mistakes


def test_bad_numbers_are_named_with_the_nearest_that_would_do():
    with pytest.raises(UserError, match=r"49 patches .* by 4 images; the nearest is 48"):
        mixed_ae.random_mixing(1, 4, 49)
    with pytest.raises(UserError, match="6 images do not fill groups of 4; the nearest is 8"):
        model_of(4)(torch.randn(6, 3, 16, 16))


def test_images_that_do_not_fill_a_batch_are_left_out_and_a_small_val_split_will_do(
    tmp_path, shapes_folder, capsys
):
    shutil.copytree(shapes_folder, tmp_path / "data")
    for path in sorted((tmp_path / "data" / "val").rglob("*.png"))[3:]:
        path.unlink()
    flags = ["--epochs", "1", "--batch-size", "24"]
    train("mixed_ae", tmp_path / "run", tmp_path / "data", *flags)
    assert "64 images, 2 steps an epoch (16 images left over)" in capsys.readouterr().out
    assert (tmp_path / "run" / "recon_0001.png").exists()
