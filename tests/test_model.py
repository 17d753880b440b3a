"""The ViT, masking, MAE's loss and files of weights are compared with slow independent versions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import mae_perceptual
from common import Decoder, UserError, ViT


def small_vit(img_size=16, patch_size=4, in_chans=3, **changes) -> ViT:
    shape = dict(embed_dim=24, depth=2, num_heads=3) | changes
    return ViT(img_size, patch_size, in_chans, **shape)


def test_sincos_2d_equals_its_formula():
    dim, (h, w) = 16, (3, 5)
    table = common.sincos_2d(dim, (h, w))
    for row in range(h):
        for column in range(w):
            for half, coordinate in enumerate((column, row)):  # the column comes first
                for i in range(dim // 4):
                    angle = coordinate * 10000 ** (-i / (dim / 4))
                    got = table[row * w + column, half * dim // 2 :]
                    assert got[i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                    assert got[dim // 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(UserError, match="divisible by 4"):
        common.sincos_2d(18, (2, 2))


def test_positions_are_there_and_matter():
    """Shuffling the patches changes the class token, unless the position embedding is zero."""
    torch.manual_seed(0)
    vit = small_vit().eval()
    assert vit.pos_embed[0, 0].abs().max() == 0  # the class token has no position
    assert vit.pos_embed[0, 1:].abs().sum(1).min() > 1
    imgs = torch.randn(2, 3, 16, 16)
    patches = common.patchify(imgs, 4)
    shuffled = common.unpatchify(patches[:, torch.randperm(16)], 4, (4, 4))
    assert (vit(imgs)[:, 0] - vit(shuffled)[:, 0]).abs().max() > 1e-3
    nn.init.zeros_(vit.pos_embed)
    torch.testing.assert_close(vit(imgs)[:, 0], vit(shuffled)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels, size, p", [(1, (8, 8), 4), (3, (6, 9), 3), (5, (4, 12), 2)])
def test_patchify_equals_loops_and_inverts(channels, size, p):
    imgs = torch.randn(2, channels, *size)
    patches, (h, w) = common.patchify(imgs, p), common.patch_grid(size, p)
    for row in range(h):
        for column in range(w):
            block = imgs[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            for y in range(p):
                for x in range(p):
                    got = patches[:, row * w + column].view(2, p, p, channels)[:, y, x]
                    assert torch.equal(got, block[:, :, y, x])
    assert torch.equal(common.unpatchify(patches, p, (h, w), channels), imgs)
    with pytest.raises(UserError, match="not divisible"):
        common.patchify(imgs, 5)


def test_random_masking_is_a_uniform_partition():
    g = torch.Generator().manual_seed(0)
    visible, mask = common.random_masking(4000, 10, 0.75, generator=g)
    assert visible.shape == (4000, 2) and visible.dtype == torch.int64
    assert mask.dtype == torch.bool and (mask.sum(1) == 8).all()
    for i in range(50):
        assert set(visible[i].tolist()) == set((~mask[i]).nonzero()[:, 0].tolist())
    kept = (~mask).float().mean(0)  # each patch is visible with probability 0.2
    standard_error = math.sqrt(0.2 * 0.8 / 4000)
    assert (kept - 0.2).abs().max() < 5 * standard_error
    again, _ = common.random_masking(4000, 10, 0.75, generator=torch.Generator().manual_seed(0))
    assert torch.equal(visible, again)
    for ratio in (0.0, 0.95, 1.0):
        with pytest.raises(UserError, match=f"--mask-ratio {ratio}: some of the 10 patches"):
            common.random_masking(1, 10, ratio)


@pytest.mark.parametrize("normalize", [True, False])
def test_masked_mse_equals_a_loop(normalize):
    torch.manual_seed(1)
    pred, target = torch.randn(2, 5, 12), torch.randn(2, 5, 12) * 3 + 1
    mask = torch.rand(2, 5) < 0.6
    total, count = 0.0, 0
    for b in range(2):
        for l in range(5):  # noqa: E741
            if not mask[b, l]:
                continue
            values = target[b, l].tolist()
            mean = sum(values) / 12
            variance = sum((v - mean) ** 2 for v in values) / 11
            if normalize:
                values = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            pairs = zip(pred[b, l].tolist(), values, strict=True)
            total += sum((a - v) ** 2 for a, v in pairs) / 12
            count += 1
    loss = common.masked_mse(pred, target, mask, normalize)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert common.masked_mse(pred.bfloat16(), target, mask).dtype == torch.float32


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = common.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
    })  # fmt: skip
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


def slow_vit(vit: ViT, imgs: torch.Tensor) -> torch.Tensor:
    """The same encoder, built from torch's own strided convolution and TransformerEncoderLayer."""
    x = F.conv2d(imgs, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, vit.patch_size)
    x = torch.cat([vit.cls_token.expand(len(imgs), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + vit.pos_embed
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(
            vit.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features, dropout=0.0,
            activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True,
        )  # fmt: skip
        ours_of = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
                   "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.",
                   "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
        weights, renamed = block.state_dict(), {}
        for theirs, ours in ours_of.items():
            for kind in ("weight", "bias"):
                renamed[theirs + kind] = weights[ours + kind]
        layer.load_state_dict(renamed)
        x = layer(x)
    return vit.norm(x)


@pytest.mark.parametrize("channels, size, p", [(1, 16, 4), (3, (8, 24), 4), (5, (12, 6), 3)])
def test_vit_equals_torch_layers(channels, size, p):
    torch.manual_seed(0)
    vit = small_vit(size, p, channels)
    for parameter in vit.parameters():  # biases that are zero would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    height, width = (size, size) if isinstance(size, int) else size
    imgs = torch.randn(2, channels, height, width)
    torch.testing.assert_close(vit(imgs), slow_vit(vit, imgs), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="takes images of"):
        vit(imgs[:, :, :-1])


def test_visible_tokens_are_those_of_the_whole_image():
    torch.manual_seed(0)
    vit = small_vit()
    imgs = torch.randn(3, 3, 16, 16)
    visible, _ = common.random_masking(3, 16, 0.5)
    all_tokens = vit.embed(imgs)
    expected = torch.stack([all_tokens[i, 1 + visible[i]] for i in range(3)])
    torch.testing.assert_close(vit.embed(imgs, visible)[:, 1:], expected)
    reverse = torch.arange(16).expand(3, -1).flip(1)  # the order of tokens does not matter
    torch.testing.assert_close(vit(imgs, reverse)[:, 0], vit(imgs)[:, 0], atol=1e-5, rtol=1e-5)


def test_decoder_equals_a_loop():
    torch.manual_seed(0)
    vit = small_vit()
    decoder = Decoder(vit, dim=16, depth=1, num_heads=2)
    tokens, (visible, mask) = torch.randn(2, 5, 24), common.random_masking(2, 16, 0.75)
    rows = torch.zeros(2, 17, 16)
    for b in range(2):
        rows[b, 0] = decoder.embed(tokens[b, 0])
        for position in range(16):
            rows[b, 1 + position] = decoder.mask_token[0, 0]
        for i, position in enumerate(visible[b].tolist()):
            assert not mask[b, position]
            rows[b, 1 + position] = decoder.embed(tokens[b, 1 + i])
    x = decoder.norm(decoder.blocks[0](rows + decoder.pos_embed))
    expected = decoder.pred(x[:, 1:])
    torch.testing.assert_close(decoder(tokens, visible), expected, atol=1e-5, rtol=1e-5)


def test_initialisation_follows_mae():
    torch.manual_seed(0)
    vit = ViT(32, 4, embed_dim=192, depth=1, num_heads=3)
    for weight in (vit.patch_embed.proj.weight.flatten(1), vit.blocks[0].attn.qkv.weight):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier-uniform
        assert bound * 0.98 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(p.abs().max() == 0 for n, p in vit.named_parameters() if n.endswith(".bias"))


def test_drop_path_drops_whole_branches_of_images():
    torch.manual_seed(0)
    block = common.Block(8, 2, drop_path=0.5)
    x = torch.randn(400, 3, 8)
    untouched = (block(x) == x).all(2).all(1).float().mean()
    assert 0.15 < untouched < 0.35  # both branches of an image are dropped with probability 1/4
    plain = common.Block(8, 2)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), plain(x))  # eval mode neither drops nor scales
    assert [b.drop_path.p for b in small_vit(depth=3, drop_path=0.2).blocks] == [0.0, 0.1, 0.2]


def tiny_mae(**changes) -> mae_perceptual.PerceptualMAE:
    vit = small_vit(**changes)
    return mae_perceptual.PerceptualMAE(vit, Decoder(vit, 16, 1, 2), mask_ratio=0.75)


@pytest.mark.parametrize("channels, size", [(1, 16), (3, (8, 16)), (5, 16)])
def test_every_trainable_parameter_gets_a_gradient_and_positions_none(channels, size):
    torch.manual_seed(0)
    model = tiny_mae(in_chans=channels, img_size=size)
    imgs = torch.randn(4, channels, *((size, size) if isinstance(size, int) else size))
    pred, mask = model(imgs)
    common.masked_mse(pred, common.patchify(imgs, 4), mask).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.endswith("pos_embed"), name
        assert p.grad is None or p.grad.abs().max() > 0, name


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_picture_of_a_perfect_prediction_is_the_input(norm_pix, monkeypatch):
    model, imgs = tiny_mae(), common.normalize(common.draw_shapes(3, 16, 0)[0])
    patches = common.patchify(imgs, 4)
    mean, std = common.patch_statistics(patches)
    _, mask = common.random_masking(3, 16, 0.75)
    perfect = (patches - mean) / std if norm_pix else patches
    monkeypatch.setattr(model, "forward", lambda imgs: (perfect, mask))
    rows = mae_perceptual.reconstruct(model, imgs, norm_pix)
    for label, row in rows.items():
        if label != "masked":
            torch.testing.assert_close(row, imgs, atol=1e-4, rtol=0, msg=label)
    masked = common.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4, (4, 4))
    torch.testing.assert_close(rows["masked"], imgs.masked_fill(masked, 0))  # 0 is shown as grey


def test_one_batch_can_be_over_fitted():
    torch.manual_seed(0)
    model, imgs = tiny_mae(embed_dim=48), common.normalize(common.draw_shapes(4, 16, 0)[0])
    visible, mask = common.random_masking(4, 16, 0.5)
    optimizer = common.adamw(model, 0.0, lr=5e-3)
    losses = []
    for _ in range(300):
        pred = model.decoder(model.encoder(imgs, visible), visible)
        loss = common.masked_mse(pred, common.patchify(imgs, 4), mask)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 < 1 < losses[0]


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("size", common.VIT_SIZES)
def test_encoder_loads_into_timm_and_gives_the_same_features(size, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    shape = common.VIT_SIZES[size]
    if size != "tiny":  # two blocks test the other widths as well as all blocks would
        shape = shape | {"depth": 2}
    vit = ViT(64, 16, **shape)
    for parameter in vit.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    common.save_encoder(tmp_path / "encoder.pt", vit, {})
    theirs = timm.models.VisionTransformer(64, 16, num_classes=0, **shape).eval()
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)["model"]
    theirs.load_state_dict(weights, strict=True)
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            vit.eval()(imgs), theirs.forward_features(imgs), atol=1e-5, rtol=1e-5
        )
        again = common.load_encoder(tmp_path / "encoder.pt").eval()
        assert torch.equal(again(imgs), vit(imgs))


def published_layout(model: mae_perceptual.PerceptualMAE) -> dict:
    """The model's weights under the names that the published MAE checkpoints use."""
    flat = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("encoder.").replace("decoder.mask_token", "mask_token")
        flat[name.replace("decoder.", "decoder_")] = value
    return flat


def test_published_mae_layout_loads_into_encoder_and_decoder(tmp_path):
    torch.manual_seed(0)
    source, target = (tiny_mae(img_size=64, patch_size=16, embed_dim=192) for _ in range(2))
    flat = published_layout(source)
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "norm.bias",
                "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_embed.weight",
                "decoder_blocks.0.mlp.fc2.bias", "decoder_norm.weight",
                "decoder_pred.bias"}  # fmt: skip
    assert expected <= flat.keys()
    torch.save({"model": flat}, tmp_path / "mae.pth")
    assert common.init_from(tmp_path / "mae.pth", target) == set()
    loaded = target.state_dict()
    for name, x in source.state_dict().items():
        assert torch.equal(loaded[name], x), name
    encoder = common.load_encoder(tmp_path / "mae.pth")
    assert encoder.settings["img_size"] == 64 and encoder.settings["num_heads"] == 3

    for change, message in (
        (lambda d: d.pop("blocks.1.norm1.weight"), "Missing .*blocks.1.norm1.weight"),
        (lambda d: d.update(extra=torch.zeros(1)), "Unexpected .*extra"),
        (lambda d: d.pop("decoder_pred.bias"), "Missing .*pred.bias"),
        (lambda d: d.update(decoder_foo=torch.zeros(1)), "Unexpected .*foo"),
        (lambda d: d.update(cls_token=torch.zeros(1, 1, 7)), "size mismatch for cls_token"),
    ):
        broken = dict(flat)
        change(broken)
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(UserError, match=message):
            common.init_from(tmp_path / "broken.pth", target)


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "head.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    vit = small_vit()
    weights = vit.state_dict()
    torch.save({1: torch.zeros(1)}, tmp_path / "keys.pt")
    torch.save(weights | {"pos_embed": torch.zeros(3)}, tmp_path / "odd.pt")
    torch.save({"model": weights, "vit": vit.settings | {"colour": 1}}, tmp_path / "shape.pt")
    common.save_encoder(tmp_path / "whole.pt", vit, {})
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.pt").mkdir()
    for name, message in (
        ("tensor", "holds a Tensor"), ("head", "holds no ViT"), ("text", "not a checkpoint"),
        ("keys", "holds no ViT"), ("odd", "holds no ViT"), ("shape", "does not describe a ViT"),
        ("truncated", "truncated"), ("absent", "No such file"), ("folder", "Is a directory"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            common.load_encoder(tmp_path / f"{name}.pt")
