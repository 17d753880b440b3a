"""Perceptual MAE: each part is compared with a slow version of its equation; then the script is run
with every variant."""

import itertools
import math

import pytest
import torch
from conftest import metrics, settings, train, weights
from torch import nn
from torch.nn import functional as F

import common
import mae_perceptual as pm
from common import UserError

ADVERSARIAL = ["ls", "msg", "msg-ada"]


def players(variant):
    """The smallest model and its Adversary, with the paper's losses and loss weights."""
    torch.manual_seed(0)
    cfg = settings(variant, "--style-weight", 40, "--scale-weight", 0, "--no-normalize-features")
    return pm.build(cfg), pm.build_adversary(cfg)


def feature_maps(count=3):
    return [torch.randn(2, 4, 3, 5) for _ in range(count)]


# ------------------------------------------------------------------------------ losses


def test_gram_feature_and_style_loss_equal_loops():
    torch.manual_seed(0)
    fake, real = feature_maps(), feature_maps()

    def gram(f):
        b, c, h, w = f.shape
        out = torch.zeros(b, c, c)
        for n in range(b):
            for i in range(c):
                for j in range(c):
                    for y in range(h):
                        for x in range(w):
                            out[n, i, j] += f[n, i, y, x] * f[n, j, y, x]
        return out / (c * h * w)

    for f in fake:
        torch.testing.assert_close(pm.gram_matrix(f), gram(f), atol=1e-6, rtol=1e-5)
    feat, style = 0.0, 0.0
    for f, r in zip(fake, real, strict=True):
        feat += sum(abs(a - b) for a, b in zip(f.flatten(), r.flatten(), strict=True)) / f.numel()
        f, r = gram(f).flatten(), gram(r).flatten()
        style += sum(abs(a - b) for a, b in zip(f, r, strict=True)) / f.numel()
    torch.testing.assert_close(pm.feature_loss(fake, real), feat)
    torch.testing.assert_close(pm.style_loss(fake, real), style)


def test_gram_is_fp32_under_autocast():
    f = 100 * torch.rand(1, 2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        gram = pm.gram_matrix(f)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, pm.gram_matrix(f))


def test_adversarial_losses_equal_their_formulas_per_image():
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, -1.0, 0.5])
    assert pm.ls_d_loss(real, fake).item() == pytest.approx((1 + 1 + 4) / 6 + (1 + 1 + 0.25) / 6)
    assert pm.ls_g_loss(fake).item() == pytest.approx((0 + 4 + 0.25) / 6)
    logistic = [math.log(1 + math.exp(-r)) + math.log(1 + math.exp(f))
                for r, f in zip(real.tolist(), fake.tolist(), strict=True)]  # fmt: skip
    assert pm.logistic_d_loss(real, fake).item() == pytest.approx(sum(logistic) / 3)
    expected = sum(math.log(1 + math.exp(-f)) for f in fake.tolist()) / 3
    assert pm.logistic_g_loss(fake).item() == pytest.approx(expected)
    # Errors of opposite sign do not cancel: the mean scores are right, but the loss is not 0.
    assert pm.ls_d_loss(torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])).item() == 1


def test_r1_and_path_length_of_functions_whose_gradient_is_known():
    torch.manual_seed(0)
    images = [torch.randn(3, 3, s, s, requires_grad=True) for s in (8, 4)]
    weights = [torch.randn(3, s, s) for s in (8, 4)]
    square = sum((w * x.square()).sum(dim=(1, 2, 3)) for w, x in zip(weights, images, strict=True))
    expected = sum((2 * w * x).square().sum() for w, x in zip(weights, images, strict=True)) / 3
    torch.testing.assert_close(pm.r1_penalty(square, images), expected)
    assert torch.autograd.grad(pm.r1_penalty(square, images), images[0])[0].abs().sum() > 0

    matrix = nn.Parameter(torch.randn(3 * 4 * 4, 5 * 6))  # image = matrix @ tokens
    tokens, path = torch.randn(2, 5, 6, requires_grad=True), pm.PathLength()
    for seed in range(3):
        imgs = (tokens.flatten(1) @ matrix.T).view(2, 3, 4, 4)
        torch.manual_seed(seed)
        penalty = path(imgs, tokens)
        torch.manual_seed(seed)
        noise = torch.randn(2, 48) / math.sqrt(16)
        lengths = (noise @ matrix).view(2, 5, 6).square().sum(2).mean(1).sqrt()
        if seed == 0:  # the running mean starts at the first measurement
            mean = lengths.mean().item()
        torch.testing.assert_close(penalty, (lengths - mean).square().mean())
        path.update()
        mean += 0.01 * (lengths.mean().item() - mean)
        assert path.mean.item() == pytest.approx(mean, rel=1e-5)
        assert torch.autograd.grad(penalty, matrix)[0].abs().sum() > 0


# ------------------------------------------------------------------------------ ssim


def shrink(imgs, k):
    """Shrinks images to 1/k of their side, by a triangle filter of half-width k that is cut off at
    the borders."""
    centres = torch.arange(imgs.shape[-1], dtype=imgs.dtype) + 0.5  # of the pixels
    small_centres = k * centres[: imgs.shape[-1] // k, None]
    matrix = (1 - (centres - small_centres).abs() / k).clamp(min=0)
    matrix /= matrix.sum(1, keepdim=True)
    return matrix @ imgs @ matrix.T


def slow_ssim_loss(fake, real, factors):
    """L_ssim from its equation, window by window, for the sides S / k with k in `factors`."""
    total = 0.0
    for k in factors:
        dissimilarities, errors = [], []
        for x, y in zip(shrink(fake, k).flatten(0, 1), shrink(real, k).flatten(0, 1), strict=True):
            side, x, y = len(x), x.tolist(), y.tolist()
            around = [[i - 1, i, i + 1] for i in range(side)]
            around[0], around[-1] = [1, 0, 1], [side - 2, side - 1, side - 2]  # reflected
            for i, j in itertools.product(range(side), range(side)):
                places = list(itertools.product(around[i], around[j]))
                u, v = [x[a][b] for a, b in places], [y[a][b] for a, b in places]
                m_u, m_v = sum(u) / 9, sum(v) / 9
                var_u = sum((p - m_u) ** 2 for p in u) / 9
                var_v = sum((q - m_v) ** 2 for q in v) / 9
                cov = sum((p - m_u) * (q - m_v) for p, q in zip(u, v, strict=True)) / 9
                luminance = (2 * m_u * m_v + 0.0001) / (m_u**2 + m_v**2 + 0.0001)
                structure = (2 * cov + 0.0009) / (var_u + var_v + 0.0009)
                dissimilarities.append(min(max((1 - luminance * structure) / 2, 0), 1))
                errors.append(abs(x[i][j] - y[i][j]))
        total += 0.85 * sum(dissimilarities) / len(dissimilarities)
        total += 0.15 * sum(errors) / len(errors)
    return total


def image_pair(side, channels=3, dtype=torch.float64):
    """A reconstruction, with values outside 0..1, and an image. They are equal at the left edge and
    differ more and more to the right. The image is dark on the left and uniform at the top."""
    torch.manual_seed(side)
    real = torch.rand(1, channels, side, side, dtype=dtype)
    real[..., : side // 3] *= 0.02
    real[..., : side // 4, :] = 0.3
    fake = real + torch.randn_like(real) * torch.linspace(0, 1, side, dtype=dtype)
    return fake, real


@pytest.mark.parametrize("side, channels, factors", [
    (32, 3, [1, 2, 4, 8]), (224, 1, [1, 2, 4, 8]), (16, 3, [1, 2, 4]), (8, 3, [1, 2]), (4, 3, [1]),
])  # fmt: skip
def test_ssim_loss_equals_loops_at_all_scales_of_4_pixels_or_more(side, channels, factors):
    fake, real = image_pair(side, channels)
    expected = slow_ssim_loss(fake, real, factors)
    assert pm.ssim_loss(fake, real).item() == pytest.approx(expected, rel=1e-9)
    assert pm.ssim_loss(fake.float(), real.float()).item() == pytest.approx(expected, rel=1e-4)
    if side == 32:
        assert pm.ssim_loss(fake, real, scales=2).item() == pytest.approx(
            slow_ssim_loss(fake, real, [1, 2]), rel=1e-9)  # fmt: skip


def test_ssim_loss_of_uniform_images_is_the_formula():
    """The windows of uniform images have no variance, so only the luminance differs."""
    fake, real = (torch.full((1, 3, 32, 32), x, dtype=torch.float64) for x in (0.2, 0.6))
    similarity = (2 * 0.2 * 0.6 + 0.0001) / (0.2**2 + 0.6**2 + 0.0001)
    expected = 4 * (0.85 * (1 - similarity) / 2 + 0.15 * 0.4)
    assert pm.ssim_loss(fake, real).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [32, 224])
def test_ssim_loss_of_equal_images_is_exactly_0(side):
    for image in image_pair(side, dtype=torch.float32):  # also of an image that leaves 0..1
        assert pm.ssim_loss(image.clone(), image).item() == 0.0


def test_ssim_loss_has_a_gradient_at_every_pixel():
    """This also holds where the reconstruction leaves 0..1, and where the image is uniform."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels[0, :, :16], pixels[1, :, 16:] = 0, 255
    imgs, reconstruction = common.normalize(pixels), 2 * torch.randn(2, 3, 32, 32)
    reconstruction.requires_grad_()
    fake, real = pm.to_rgb(reconstruction), pm.to_rgb(imgs)
    torch.testing.assert_close(real, pixels / 255)
    assert ((fake < 0) | (fake > 1)).float().mean() > 0.2
    (gradient,) = torch.autograd.grad(pm.ssim_loss(fake, real), reconstruction)
    assert gradient.isfinite().all() and (gradient != 0).all()
    equal = imgs.clone().requires_grad_()  # a perfect reconstruction, whose loss is 0
    (gradient,) = torch.autograd.grad(pm.ssim_loss(pm.to_rgb(equal), real), equal)
    assert gradient.isfinite().all()


def test_ssim_loss_is_fp32_under_autocast():
    fake, real = image_pair(32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pm.ssim_loss(fake, real)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pm.ssim_loss(fake, real), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------ generator


def test_pyramid_is_a_triangle_filter():
    assert pm.image_scales(224) == [224, 112, 56, 28, 14, 7]
    assert pm.image_scales(32) == [32, 16, 8, 4]
    assert pm.image_scales(96) == [96, 48, 24, 12, 6] and pm.image_scales(36) == [36, 18, 9]
    imgs = torch.randn(2, 3, 16, 16)
    pyramid = pm.image_pyramid(imgs, [16, 8, 4])
    assert pyramid[0] is imgs and [x.shape[-1] for x in pyramid] == [16, 8, 4]
    for small, k in ((pyramid[1], 2), (pyramid[2], 4)):
        torch.testing.assert_close(small, shrink(imgs, k), atol=1e-5, rtol=1e-5)


def test_msg_decoder_equals_a_slow_version():
    """The slow version takes one image at a time and puts tokens in their places one by one."""
    torch.manual_seed(0)
    vit = common.ViT(16, 4, embed_dim=12, depth=6, num_heads=3)
    dec = pm.MSGDecoder(vit, dim=8, depth=5, num_heads=2)
    nn.init.normal_(dec.mask_token)
    imgs, (visible, _) = torch.randn(2, 3, 16, 16), common.random_masking(2, 16, 0.75)
    x, maps = vit.embed(imgs, visible), []
    for block in vit.blocks:
        x = block(x)
        maps.append(x)
    got = dec(vit.norm(x), visible, maps)
    assert [image.shape[-1] for image in got] == [16, 8, 4]

    def place(tokens, n):
        full = [dec.embed(tokens[n, 0])] + [dec.mask_token[0, 0]] * 16
        for k, position in enumerate(visible[n].tolist()):
            full[1 + position] = dec.embed(tokens[n, 1 + k])
        return torch.stack(full)[None] + dec.pos_embed

    def paint(patches):  # (1, 16, 48)
        image = torch.zeros(1, 3, 16, 16)
        for at in range(16):
            block = patches[0, at].view(4, 4, 3).permute(2, 0, 1)
            row, column = 4 * (at // 4), 4 * (at % 4)
            image[0, :, row : row + 4, column : column + 4] = block
        return image

    for n in range(2):
        y = dec.blocks[0](place(vit.norm(maps[5]), n))
        outputs = [y]
        # After its first block, the decoder also takes the encoder's maps, the latest first.
        for i, encoder_block in ((1, 4), (2, 3), (3, 2), (4, 1)):
            y = torch.cat([y, place(maps[encoder_block], n)], dim=-1)
            y = dec.blocks[i](y @ dec.fuse[i - 1].weight.T + dec.fuse[i - 1].bias)
            outputs.append(y)
        full = paint(dec.pred(dec.norm(outputs[4]))[:, 1:])
        half = paint(dec.preds[0](outputs[2])[:, 1:])  # an earlier block makes a larger image
        half = F.conv2d(half, dec.convs[0].weight, dec.convs[0].bias, 2, 1)
        quarter = F.avg_pool2d(paint(dec.preds[1](outputs[3])[:, 1:]), 2)
        quarter = F.conv2d(quarter, dec.convs[1].weight, dec.convs[1].bias, 2, 2)
        for image, expected in zip(got, (full, half, quarter), strict=True):
            torch.testing.assert_close(image[n : n + 1], expected, atol=1e-5, rtol=1e-4)
    assert dec.convs[0].kernel_size == (3, 3) and dec.convs[1].kernel_size == (5, 5)


@pytest.mark.parametrize("size, patch, scales", [
    (32, 4, [32, 16, 8, 4]), (64, 8, [64, 32, 16, 8, 4]), (96, 8, [96, 48, 24, 12, 6]),
    (224, 16, [224, 112, 56, 28, 14, 7]),
])  # fmt: skip
def test_shapes_and_gradients_at_all_sizes(size, patch, scales):
    vit = common.ViT(size, patch, embed_dim=8, depth=8, num_heads=2)
    model = pm.PerceptualMAE(vit, pm.MSGDecoder(vit, 8, 8, 2))
    imgs = torch.randn(2, 3, size, size)
    fake = model.images(model(imgs)[0])
    assert [x.shape for x in fake] == [(2, 3, s, s) for s in scales]
    single_scale = pm.Discriminator(size, 16)
    for disc, images in ((pm.MSGDiscriminator(size, 16), fake), (single_scale, fake[:1])):
        score, features = disc(images)
        assert score.shape == (2,) and score.dtype == torch.float32 and features
        model.zero_grad()
        (score.sum() + sum(f.sum() for f in features)).backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.norm() > 1e-5 for p in disc.parameters())
    _, features = single_scale(fake[:1])
    assert len(features) == {32: 3, 64: 4, 96: 4, 224: 4}[size]


def test_too_few_blocks_are_refused_with_numbers_that_fit():
    vit = common.ViT(32, 4, embed_dim=24, depth=4, num_heads=3)
    with pytest.raises(UserError, match="--decoder-depth 4, not 3; or --img-size below 32"):
        pm.MSGDecoder(vit, 16, 3, 2)
    with pytest.raises(UserError, match="--depth 5 or more, not 4"):
        pm.MSGDecoder(vit, 16, 5, 2)
    with pytest.raises(UserError, match="no half of at least 4 px"):
        pm.MSGDecoder(common.ViT(4, 4, embed_dim=24, depth=4, num_heads=3), 16, 3, 2)


# ------------------------------------------------------------------------------ discriminators


def test_widths_are_those_of_the_paper_at_224():
    single_scale, msg = pm.Discriminator(224), pm.MSGDiscriminator(224)
    convs = [m for m in single_scale.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (64, 7, 2), (128, 5, 2), (256, 5, 2), (512, 3, 2), (512, 3, 2)]  # fmt: skip
    assert sum(isinstance(m, nn.BatchNorm2d) for m in single_scale.modules()) == 4
    assert [block[2].out_channels for block in msg.blocks] == [64, 128, 256, 256, 256]
    assert msg.final[0].out_channels == 512
    assert len({id(layer.weight) for layer in msg.from_rgb}) == 6


def test_msg_discriminator_equals_a_slow_version():
    torch.manual_seed(0)
    disc = pm.MSGDiscriminator(16, 32)
    images = [torch.randn(3, 3, s, s) for s in (16, 8, 4)]
    score, features = disc(images)

    def conv(x, layer, padding=0):
        return F.conv2d(x, layer.weight, layer.bias, padding=padding)

    def lrelu(x):
        return torch.where(x > 0, x, 0.2 * x)

    x = lrelu(conv(images[0], disc.from_rgb[0]))
    for k in range(2):
        x = lrelu(conv(x, disc.blocks[k][0], 1))
        x = lrelu(conv(x, disc.blocks[k][2], 1))
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        torch.testing.assert_close(features[k], x, atol=1e-5, rtol=1e-4)
        x = torch.cat([x, lrelu(conv(images[k + 1], disc.from_rgb[k + 1]))], 1)
    spread = torch.stack([x[:, c, i, j].std(correction=0) for c in range(x.shape[1])
                          for i in range(4) for j in range(4)]).mean()  # fmt: skip
    x = torch.cat([x, torch.full((3, 1, 4, 4), spread.item())], 1)
    x = lrelu(conv(lrelu(conv(lrelu(conv(x, disc.final[0], 1)), disc.final[2])), disc.final[4]))
    expected = x.flatten(1) @ disc.score.weight[0] + disc.score.bias
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ augmentation


def test_rule_for_p_rises_falls_and_stays_in_bounds():
    augment = pm.AdaptiveAugment()
    sure = torch.ones(10)  # r_t = 1
    unsure = torch.cat([torch.ones(7), -torch.ones(3)])  # r_t = 0.4
    for call in range(1, 9):  # p changes after every fourth call
        augment.update(sure, 1000)
        assert augment.p == pytest.approx(call // 4 * 4 * 1000 / 500_000)
    # The mean r_t of four steps decides. Here it is (1 + 1 + 0.4 + 0.4) / 4 = 0.7, so p rises.
    for scores in (sure, sure, unsure, unsure):
        augment.update(scores, 1000)
    assert augment.p == pytest.approx(0.024)
    for _ in range(4):
        augment.update(unsure, 1000)
    assert augment.p == pytest.approx(0.016)
    for _ in range(12):
        augment.update(unsure, 1000)
    assert augment.p == 0.0
    augment.p = 0.999
    for _ in range(4):
        augment.update(sure, 1000)
    assert augment.p == 1.0


def test_augmentation_is_the_identity_at_0_and_the_same_at_all_scales():
    torch.manual_seed(0)
    augment = pm.AdaptiveAugment()
    axis = (torch.arange(64) + 0.5) / 64
    waves = [torch.sin(3 * axis[:, None] + k * axis + k) for k in range(3)]
    pyramid = pm.image_pyramid(torch.stack(waves).expand(40, 3, 64, 64).contiguous(), [64, 32, 16])
    assert all(torch.equal(a, b) for a, b in zip(augment(pyramid), pyramid, strict=True))
    augment.p = 1e-9  # p = 0 returns the images at once; a tiny p runs through all the arithmetic
    for a, b in zip(augment(pyramid), pyramid, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    augment.p = 1.0
    torch.manual_seed(1)
    result = augment(pyramid)
    assert (result[0] - pyramid[0]).abs().mean(dim=(1, 2, 3)).min() > 0.05
    for small in result[1:]:
        expected = pm.image_pyramid(result[0], [64, small.shape[-1]])[1]
        error = (small - expected).square().mean().sqrt() / expected.std()
        assert error < 0.12, error  # the error of resampling
    first, second = result[1][:2]
    assert (first - second).abs().mean() > 0.05  # each image has its own augmentation


def test_augmentation_has_gradients_and_changes_its_share_of_images():
    torch.manual_seed(0)
    imgs = torch.randn(8, 3, 16, 16, requires_grad=True)
    augment = pm.AdaptiveAugment()
    augment.p = 0.7
    sum(x.square().sum() for x in augment(pm.image_pyramid(imgs, [16, 8]))).backward()
    assert (imgs.grad.abs().sum(dim=(1, 2, 3)) > 0).all()

    n, p = 20000, 0.3
    affine, (colour, offset) = pm.random_affine(n, p, 32), pm.random_colour(n, p)
    same = (affine - torch.eye(2, 3)).abs().amax((1, 2)) < 1e-5
    # Each operation is chosen with probability p; of two rotations, at least one is. A chosen flip
    # does nothing in 1 of 2 cases, a chosen turn in 1 of 4, and a chosen shift by up to 4 whole
    # pixels in 1 of 64. All other operations always change the image.
    chance = (1 - p / 2) * (1 - 3 * p / 4) * (1 - 63 * p / 64) * (1 - p) ** 4
    assert same.float().mean().item() == pytest.approx(chance, abs=0.012)
    same = ((colour - torch.eye(3)).abs().amax((1, 2)) < 1e-5) & (offset.abs().amax((1, 2)) < 1e-5)
    assert same.float().mean().item() == pytest.approx((1 - p) ** 4 * (1 - p / 2), abs=0.012)


def sometimes(x, p):
    """Sets each element of x to 0 with probability 1 - p."""
    return x * (torch.rand(len(x)) < p)


def rotation_matrix(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_affine_map_is_the_product_of_its_operations():
    """The random numbers are drawn once more, in the order in which random_affine draws them."""
    n, p, size = 50, 0.6, 32
    torch.manual_seed(3)
    got = pm.random_affine(n, p, size)
    torch.manual_seed(3)
    p_rotation = 1 - math.sqrt(1 - p)  # for each of two rotations
    scale, aspect = sometimes(0.2 * torch.randn(n), p), sometimes(0.2 * torch.randn(n), p)
    shifts_pixels, shifts_fraction = sometimes(torch.ones(n), p), sometimes(torch.ones(n), p)
    flip = sometimes((2 * torch.rand(n) - 1 > 0).float(), p)
    quarter_turns = sometimes((4 * torch.rand(n)).floor(), p)
    tx, ty = (shifts_pixels * (0.125 * size * (2 * torch.rand(n) - 1)).round() for _ in range(2))
    first = sometimes(math.pi * (2 * torch.rand(n) - 1), p_rotation)
    second = sometimes(math.pi * (2 * torch.rand(n) - 1), p_rotation)
    fx, fy = (shifts_fraction * 0.125 * torch.randn(n) for _ in range(2))  # fractions of the side
    for i in range(n):
        s, a = 2 ** scale[i].item(), 2 ** aspect[i].item()
        point = torch.tensor([[0.3], [-0.7]])  # a place in the result; the map gives its source
        x = point + 2 * torch.tensor([[fx[i].item()], [fy[i].item()]])
        x = rotation_matrix(second[i].item()) @ x
        x = torch.diag(torch.tensor([a, 1 / a])) @ x
        x = s * (rotation_matrix(first[i].item()) @ x)
        x = x + torch.tensor([[tx[i].item()], [ty[i].item()]]) * 2 / size
        x = rotation_matrix(quarter_turns[i].item() * math.pi / 2) @ x
        x = torch.diag(torch.tensor([1 - 2 * flip[i].item(), 1.0])) @ x
        expected = got[i, :, :2] @ point + got[i, :, 2:]
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-4)


def test_colour_map_is_the_product_of_its_operations():
    """The random numbers are drawn once more, in the order in which random_colour draws them."""
    n, p = 50, 0.6
    torch.manual_seed(4)
    colour, offset = pm.random_colour(n, p)
    torch.manual_seed(4)
    brightness = sometimes(0.2 * torch.randn(n), p)
    contrast = sometimes(0.5 * torch.randn(n), p)
    flip = sometimes((torch.rand(n) < 0.5).float(), p)
    hue = sometimes(math.pi * (2 * torch.rand(n) - 1), p)
    saturation = sometimes(torch.randn(n), p)
    grey = torch.ones(3) / math.sqrt(3)
    cross = torch.linalg.cross(torch.eye(3), grey.expand(3, 3)).T * -1  # cross @ v = grey x v
    mean, std = torch.tensor(common.MEAN), torch.tensor(common.STD)
    for i in range(n):
        x = torch.randn(3)
        y = (x * std + mean) * 2 - 1  # colours in -1..1
        y = (y + brightness[i]) * 2 ** contrast[i]
        y = y - 2 * flip[i] * (y @ grey) * grey
        y = torch.matrix_exp(hue[i] * cross) @ y
        along = (y @ grey) * grey
        y = along + (y - along) * 2 ** saturation[i]
        y = ((y + 1) / 2 - mean) / std
        torch.testing.assert_close(colour[i] @ x + offset[i, :, 0], y, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------ the two players


def two_pass_gradients(variant, adversary, model, imgs):
    """Each player's loss has its own forward passes, as in a textbook. The discriminator's loss
    takes detached reconstructions."""
    disc = adversary.discriminator
    fake = model.images(model(imgs)[0])
    real = pm.image_pyramid(imgs, [x.shape[-1] for x in fake])
    scores = disc(real)[0], disc([x.detach() for x in fake])[0]
    d_loss = pm.logistic_d_loss(*scores) if variant == "msg-ada" else pm.ls_d_loss(*scores)
    d_gradients = torch.autograd.grad(d_loss, list(disc.parameters()))
    disc.requires_grad_(False)
    fake_maps, real_maps = adversary.frozen(fake)[1], adversary.frozen(real)[1]
    score = disc(fake)[0]
    adv = pm.logistic_g_loss(score) if variant == "msg-ada" else pm.ls_g_loss(score)
    g_loss = (fake[0] - imgs).abs().mean() + 0.05 * pm.feature_loss(fake_maps, real_maps)
    g_loss = g_loss + 40 * pm.style_loss(fake_maps, real_maps) + 0.7 * adv
    disc.requires_grad_(True)
    return g_loss, torch.autograd.grad(g_loss, pm.trainable(model)), d_loss, d_gradients


@pytest.mark.parametrize("variant", ADVERSARIAL)
def test_one_forward_pass_gives_the_gradients_of_two(variant):
    model, adversary = players(variant)
    disc, imgs = adversary.discriminator, torch.randn(4, 3, 16, 16)
    for parameter in adversary.frozen.parameters():
        parameter.mul_(1.1)  # so that the copy differs from the discriminator
    before = {k: v.clone() for k, v in adversary.frozen.state_dict().items()}
    torch.manual_seed(5)
    g_loss, d_loss, _ = adversary.losses(model, disc, imgs, step=1)  # step 1 has no regulariser
    d_loss.backward(inputs=pm.trainable(disc), retain_graph=True)
    g_loss.backward(inputs=pm.trainable(model))
    torch.manual_seed(5)
    expected_g, g_gradients, expected_d, d_gradients = two_pass_gradients(
        variant, adversary, model, imgs
    )
    torch.testing.assert_close(g_loss, expected_g)
    torch.testing.assert_close(d_loss, expected_d)
    assert adversary.real_scores[0].shape == (4,)
    for player, gradients in ((disc, d_gradients), (model, g_gradients)):
        for p, gradient in zip(pm.trainable(player), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-3)
            assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in adversary.frozen.parameters())
    assert all(torch.equal(v, before[k]) for k, v in adversary.frozen.state_dict().items())


@pytest.mark.parametrize("variant", ADVERSARIAL)
def test_perceptual_terms_reach_the_decoder(variant):
    model, adversary = players(variant)
    _, _, terms = adversary.losses(model, adversary.discriminator, torch.randn(4, 3, 16, 16), 1)
    for name in ("feat", "style"):
        gradient = torch.autograd.grad(terms[name], model.decoder.pred.weight, retain_graph=True)[0]
        assert gradient.abs().sum() > 1e-4, name


def test_normalised_features_are_in_units_of_the_real_maps():
    """The unit is the root mean square of the real image's map; that of Gram matrices is its
    square."""
    model, adversary = players("msg-ada")
    adversary.normalize_features, imgs = True, torch.randn(4, 3, 16, 16)
    torch.manual_seed(3)
    _, _, stats = adversary.losses(model, adversary.discriminator, imgs, 1)
    torch.manual_seed(3)
    fake = model.images(model(imgs)[0])
    _, fake_maps = adversary.frozen(fake)
    _, real_maps = adversary.frozen(pm.image_pyramid(imgs, [16, 8, 4]))
    feat, style = 0.0, 0.0
    for f, r in zip(fake_maps, real_maps, strict=True):
        size = (r**2).mean() ** 0.5
        feat += (f - r).abs().mean() / size
        style += (pm.gram_matrix(f) - pm.gram_matrix(r)).abs().mean() / size**2
    torch.testing.assert_close(stats["feat"], feat)
    torch.testing.assert_close(stats["style"], style)


@pytest.mark.parametrize("variant", ADVERSARIAL)
def test_gradient_sizes_and_accuracy_equal_slow_versions(variant):
    """grad_* is the gradient of each weighted term alone by the full-size image."""
    model, adversary = players(variant)
    adversary.scale_weight, imgs = 0.5, torch.randn(8, 3, 16, 16)
    seen_scores, disc = [], adversary.discriminator

    def watched(images):
        score, features = disc(images)
        seen_scores.append(score)
        return score, features

    adversary.losses(model, watched, imgs, 1)
    border = 0.0 if variant == "msg-ada" else 0.5
    with torch.no_grad():  # so that the discriminator is right for some images and wrong for others
        disc.score.bias += border - torch.cat(seen_scores).median()
    torch.manual_seed(3)
    fake = [x.detach() for x in model.images(model(imgs)[0])]
    fake[0].requires_grad_()
    scores, real = disc(fake)[0], pm.image_pyramid(imgs, [x.shape[-1] for x in fake])
    maps = adversary.frozen(fake)[1], adversary.frozen(real)[1]
    pix = [(a - b).abs().mean() for a, b in zip(fake, real, strict=True)]  # the full size first
    logistic, least_squares = F.softplus(-scores).mean(), (scores - 1).square().mean() / 2
    terms = {
        "pix": pix[0] + 0.5 * sum(pix[1:]),
        "feat": 0.05 * pm.feature_loss(*maps),
        "style": 40 * pm.style_loss(*maps),
        "adv": 0.7 * (logistic if variant == "msg-ada" else least_squares),
    }
    torch.manual_seed(3)
    _, _, stats = adversary.losses(model, disc, imgs, 1, measure=True)
    torch.testing.assert_close(stats["pix"], terms["pix"])
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, fake[0], retain_graph=True)
        expected = gradient.norm() * (8 * 3 * 16 * 16) ** 0.5
        torch.testing.assert_close(stats[f"grad_{name}"], expected, rtol=1e-4, atol=1e-6)
    assert stats["grad_pix"].item() == pytest.approx(1)
    right_real = sum(x > border for x in adversary.real_scores[-1].tolist())
    right_fake = sum(x < border for x in scores.tolist())
    assert 0 < right_real + right_fake < 16
    assert stats["d_acc_real"].item() == right_real / 8
    assert stats["d_acc_fake"].item() == right_fake / 8
    assert not adversary.losses(model, disc, imgs, 1)[2].keys() & {"grad_pix", "grad_adv"}


def test_lazy_regularisers_come_at_their_steps_and_with_their_weights():
    model, adversary = players("msg-ada")
    adversary.r1_gamma, imgs = 10.0, torch.randn(4, 3, 16, 16)
    for step, names in ((0, {"r1", "path"}), (1, set()), (4, {"path"}), (16, {"r1", "path"})):
        torch.manual_seed(step)
        adversary.path_length.mean.zero_()
        g_loss, d_loss, terms = adversary.losses(model, adversary.discriminator, imgs, step)
        assert terms.keys() & {"r1", "path"} == names
        path, r1 = terms.get("path", torch.zeros(())), terms.get("r1", torch.zeros(()))
        torch.testing.assert_close(g_loss, terms["loss"] + 4 * 2 * path)
        torch.testing.assert_close(d_loss, terms["d_loss"] + 16 * 10 / 2 * r1)
    adversary.r1_gamma = adversary.path_weight = 0.0  # weights of 0 switch both off
    assert not adversary.losses(model, adversary.discriminator, imgs, 0)[2].keys() & {"r1", "path"}
    adversary.r1_gamma, adversary.path_weight = 10.0, 2.0
    real = [x.requires_grad_() for x in pm.image_pyramid(imgs, [16, 8, 4])]  # R1 sums over scales
    gradients = torch.autograd.grad(adversary.discriminator(real)[0].sum(), real)
    expected = sum(g.square().sum() for g in gradients) / 4
    torch.testing.assert_close(terms["r1"], expected, rtol=1e-3, atol=1e-5)


def test_both_players_see_augmented_images_and_gradients_go_through(monkeypatch):
    model, adversary = players("msg-ada")
    adversary.augment.p, imgs = 1.0, torch.randn(4, 3, 16, 16)
    given, augmented, judged = [], [], []
    augment, disc = adversary.augment.forward, adversary.discriminator

    def watched_augment(pyramid):
        given.append(pyramid)
        augmented.append(augment(pyramid))
        return augmented[-1]

    def watched_discriminator(images):
        judged.append(images)
        return disc(images)

    monkeypatch.setattr(adversary.augment, "forward", watched_augment)
    adversary.losses(model, watched_discriminator, imgs, 1)
    fake, real = given
    assert torch.equal(real[0], imgs) and not torch.equal(fake[0], imgs)
    for images, expected in zip(judged, augmented, strict=True):
        assert all(map(torch.equal, images, expected))
    judged_fake, judged_real = judged
    assert judged_fake[0].requires_grad and not judged_real[0].requires_grad


def test_r1_is_computed_in_fp32_whatever_the_precision():
    model, adversary = players("msg-ada")
    imgs, penalties = torch.randn(4, 3, 16, 16), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            penalties.append(adversary.losses(model, adversary.discriminator, imgs, 16)[2]["r1"])
    torch.testing.assert_close(*penalties, rtol=1e-5, atol=0)


def test_end_of_a_step_hands_over_real_scores_and_the_global_batch_size(monkeypatch):
    model, adversary = players("msg-ada")
    calls, imgs = [], torch.randn(2, 4, 3, 16, 16)
    monkeypatch.setattr(adversary.augment, "update", lambda *arguments: calls.append(arguments))
    for step in range(2):
        for part in imgs:
            adversary.losses(model, adversary.discriminator, part, step)
        adversary.end_step(64)
    real = [pm.image_pyramid(part, [16, 8, 4]) for part in imgs]
    expected = torch.cat([adversary.discriminator(x)[0] for x in real])
    for scores, batch in calls:
        torch.testing.assert_close(scores, expected)
        assert batch == 64
    assert len(calls) == 2 and not adversary.path_length.pending


# ------------------------------------------------------------------------------ the script


def test_the_imagenet_preset_has_the_authors_numbers():
    cfg = common.parse(pm.Config, pm.PRESETS, ["--preset", "imagenet"])
    assert (cfg.variant, cfg.size, cfg.img_size, cfg.patch_size) == ("msg-ada", "base", 224, 16)
    assert (cfg.decoder_depth, cfg.decoder_dim, cfg.decoder_heads, cfg.mask_ratio) == (
        8, 512, 16, 0.75)  # fmt: skip
    assert (cfg.lr, cfg.disc_lr, cfg.lr_decay, cfg.warmup_epochs) == (1.5e-4, 1.5e-4, 0.9, 0)
    assert (cfg.weight_decay, cfg.epochs, cfg.batch_size, cfg.min_crop) == (0, 300, 64, 0.2)
    assert (cfg.feature_weight, cfg.style_weight, cfg.adv_weight) == (0.05, 40, 0.7)
    assert (cfg.r1_gamma, cfg.path_weight, cfg.refresh_epochs, cfg.disc_width) == (10, 2, 5, 512)
    assert cfg.scale_weight == 0  # only the full-size image has a pixel loss


@pytest.mark.parametrize("variant", ADVERSARIAL)
def test_a_run(variant, whole_run):
    lines, adversary = metrics(whole_run(variant)), weights(whole_run(variant), "adversary")
    assert lines[-1].keys() >= {"loss", "pix", "feat", "style", "adv", "d_loss", "real_score",
                                "fake_score", "d_acc_real", "d_acc_fake", "g_norm", "d_norm",
                                "grad_pix", "grad_feat", "grad_style", "grad_adv"}  # fmt: skip
    assert ("path" in lines[-1]) == (variant == "msg-ada") == ("ada_p" in lines[-1])
    assert lines[-1].get("ada_p", 0.0) == adversary["augment._extra_state"]["p"]
    assert (whole_run(variant) / "recon_0003.png").exists()


def test_ssim_trains_on_rgb_without_a_discriminator(
    whole_run, tmp_path, shapes_folder, monkeypatch
):
    seen, ssim_loss = [], pm.ssim_loss

    def watched(fake, real):
        seen.append((fake, real))
        return ssim_loss(fake, real)

    monkeypatch.setattr(pm, "ssim_loss", watched)
    train("ssim", tmp_path, shapes_folder, "--epochs", "15", "--lr", "0.01")
    first, *_, last = metrics(tmp_path)
    assert last["loss"] < 0.9 * first["loss"]
    for fake, real in seen[:2]:  # both are RGB; the reconstruction is not clipped to 0..1
        assert fake.shape == real.shape == (16, 3, 16, 16) and fake.requires_grad
        pixels = (255 * real).round().clamp(0, 255)
        torch.testing.assert_close(255 * real, pixels, rtol=0, atol=1e-3)
        assert fake.min() < 0 or fake.max() > 1
    losses = torch.stack([ssim_loss(*args) for args in seen])
    assert first["loss"] == pytest.approx(losses[:4].mean().item(), rel=1e-6)
    for line in metrics(whole_run("ssim")):
        assert line["loss"] == line["ssim"]
        assert not line.keys() & {"pix", "feat", "adv", "d_loss", "grad_pix", "ada_p"}
    assert (whole_run("ssim") / "recon_0003.png").exists()
    state = torch.load(whole_run("ssim") / "checkpoint.pt", weights_only=True)
    assert "model" in state and not state.keys() & {"adversary", "d_optimizer"}


def test_the_copy_of_the_discriminator_changes_only_when_it_is_due(
    tmp_path, shapes_folder, monkeypatch
):
    """With --refresh-epochs 0.5, the copy and its BatchNorm statistics change at every second step
    of an epoch of four, but not between micro-batches. Gradients are measured on the epoch's last
    step."""
    copies, measured, losses = [], [], pm.Adversary.losses

    def watched(self, model, discriminator, imgs, step, measure):
        state = self.frozen.state_dict()
        copies.append(torch.cat([v.flatten().float() for v in state.values()]))
        measured.append(measure)
        return losses(self, model, discriminator, imgs, step, measure)

    monkeypatch.setattr(pm.Adversary, "losses", watched)
    train("ls", tmp_path, shapes_folder, "--epochs", "2", "--accumulate", "2")
    first_of_step, second_of_step = copies[::2], copies[1::2]  # each step has two micro-batches
    assert len(copies) == 2 * 8 and all(map(torch.equal, first_of_step, second_of_step))
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(first_of_step)]
    assert changed == [step % 2 == 0 for step in range(1, 8)]
    assert measured == 2 * (6 * [False] + 2 * [True])


def test_one_generator_and_two_discriminator_passes_a_step(tmp_path, shapes_folder, monkeypatch):
    calls = []

    def count_calls(kind):
        forward = kind.forward

        def counted(self, *args, **kwargs):
            calls.append((kind, self.training))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)

    count_calls(pm.PerceptualMAE)
    count_calls(pm.MSGDiscriminator)
    train("msg-ada", tmp_path, shapes_folder, "--steps", "4", "--epochs", "1")
    assert calls.count((pm.PerceptualMAE, True)) == 4 + 1  # four steps and the picture
    assert calls.count((pm.MSGDiscriminator, True)) == 2 * 4
    assert calls.count((pm.MSGDiscriminator, False)) == 2 * 4  # the copy, in eval mode


@pytest.mark.parametrize("variant, accumulate, warned", [
    ("msg", 8, True), ("msg-ada", 8, True), ("msg", 4, False), ("ls", 8, False),
])  # fmt: skip
def test_micro_batches_of_too_few_images_are_reported(
    variant, accumulate, warned, tmp_path, shapes_folder, capsys
):
    """The batch has 16 images, so 8 micro-batches have 2 each."""
    flags = ["--accumulate", accumulate, "--steps", "1", "--epochs", "1"]
    train(variant, tmp_path, shapes_folder, *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert len(lines) == (1 if warned else 0)
    assert all("at least 4 images, not 2" in line for line in lines)


def test_learning_rates_decay_every_30_epochs(tmp_path, shapes_folder):
    flags = ["--epochs", "31", "--batch-size", "64", "--knn-every", "0", "--recon-every", "40"]
    decay = ["--lr", "0.001", "--lr-decay", "0.5", "--warmup-epochs", "0"]
    train("ls", tmp_path, shapes_folder, *flags, *decay)
    assert [x["lr"] for x in metrics(tmp_path)] == [0.001] * 30 + [0.0005]
    groups = weights(tmp_path, "d_optimizer")["param_groups"]
    assert all(group["lr"] == 5e-4 and group["betas"] == (0.9, 0.95) for group in groups)


def test_without_a_decay_both_players_follow_the_cosine(tmp_path, shapes_folder):
    flags = ["--epochs", "1", "--lr", "0.002", "--disc-lr", "0.01", "--warmup-epochs", "0"]
    train("ls", tmp_path, shapes_folder, *flags)  # four steps
    last = 0.5 * (1 + math.cos(math.pi * 3 / 4))
    for name, peak in (("optimizer", 0.002), ("d_optimizer", 0.01)):
        groups = weights(tmp_path, name)["param_groups"]
        assert all(group["lr"] == pytest.approx(peak * last) for group in groups)


@pytest.mark.parametrize("variant", ["ls", "msg"])
def test_without_its_losses_there_is_no_discriminator(
    variant, tmp_path, shapes_folder, monkeypatch
):
    """If all three weights are 0, L1 on all pixels of all scales trains the model alone."""
    flags = ["--feature-weight", "0", "--style-weight", "0", "--adv-weight", "0"]
    flags += ["--scale-weight", "0.5", "--lr", "0.01"]
    scale_weights, pixel_loss = set(), pm.pixel_loss

    def watched(fake, real, scale_weight):
        scale_weights.add(scale_weight)
        return pixel_loss(fake, real, scale_weight)

    monkeypatch.setattr(pm, "pixel_loss", watched)
    train(variant, tmp_path, shapes_folder, "--epochs", "15", *flags)
    assert scale_weights == {0.5}
    first, *_, last = metrics(tmp_path)
    assert last["loss"] < 0.9 * first["loss"]
    assert first["pix"] == first["loss"]
    assert not first.keys() & {"d_loss", "feat", "grad_pix", "ada_p"}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert "model" in state and not state.keys() & {"adversary", "d_optimizer"}
    torch.manual_seed(0)
    model = pm.build(settings(variant))
    fake = model.images(model(torch.randn(4, 3, 16, 16))[0])
    real = [torch.randn_like(x) for x in fake]
    errors = [(f - r).abs().mean() for f, r in zip(fake, real, strict=True)]
    loss = pixel_loss(fake, real, 0.5)
    torch.testing.assert_close(loss, errors[0] + 0.5 * sum(errors[1:]))
    loss.backward()
    assert all(p.grad is not None for p in pm.trainable(model))
