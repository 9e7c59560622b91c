"""The parts of image networks: identities, and naive loops beside the fused forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from vdiff.networks import (
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
    sinusoidal,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) * 0.3)
    return module.eval()


def test_the_embedding_is_cosines_then_sines():
    values, dim = torch.tensor([0.0, 1.0, 999.0]), 6
    omegas = [10000 ** (-i / 3) for i in range(3)]
    expected = [[f(v * w) for f in (math.cos, math.sin) for w in omegas] for v in values.tolist()]
    assert (sinusoidal(values, dim) - torch.tensor(expected)).abs().max() < 1e-4
    assert (sinusoidal(values.double(), dim) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
    assert (sinusoidal(values, 7)[:, :6] == sinusoidal(values, 6)).all() and (sinusoidal(values, 7)[:, 6] == 0).all()


def test_the_embedding_is_float32_whatever_comes():
    assert sinusoidal(torch.tensor([741]), 8).equal(sinusoidal(torch.tensor([741.0]), 8))
    assert sinusoidal(torch.tensor([0.5], dtype=torch.bfloat16), 8).dtype is torch.float32


def test_group_norm_computes_in_float32():
    """Numbers far from zero: in bfloat16 their mean has no digit left for the deviations."""
    norm = GroupNorm(2, 4)
    x = (draw(2, 4, 5, 5) + 300).bfloat16()
    out = norm.bfloat16()(x)
    assert out.dtype is torch.bfloat16
    assert (out - F.group_norm(x.double(), 2)).abs().max() < 0.02
    assert norm.double()(x.double()).dtype is torch.float64


@pytest.mark.parametrize(
    "module, eps",
    [
        (ResBlock(8, 12, norm_groups=4), 1e-5),
        (AttentionBlock(8, 2, 4), 1e-5),
        (SpatialTransformer(8, 2, 4, norm_groups=4), 1e-6),
    ],
)
def test_epsilons_are_upstreams(module, eps):
    """Too small to show in a comparison of outputs of order one."""
    norms = [m for m in module.modules() if isinstance(m, GroupNorm)]
    assert norms and all(norm.eps == eps for norm in norms)


def test_resampling_without_convolution_is_averaging_and_repeating():
    x = draw(2, 4, 6, 6)
    half, twice = Downsample(4, conv=False)(x), Upsample(4, conv=False)(x)
    assert torch.allclose(half[0, 1, 2, 0], x[0, 1, 4:6, :2].mean())
    assert all(torch.equal(twice[..., i::2, j::2], x) for i in (0, 1) for j in (0, 1))
    with pytest.raises(ValueError, match="keeps 4 channels"):
        Downsample(4, 8, conv=False)
    with pytest.raises(ValueError, match="keeps 4 channels"):
        Upsample(4, 8, conv=False)


def test_a_new_block_is_its_skip_connection():
    x, emb = draw(2, 8, 4, 4), draw(2, 12)
    assert torch.equal(ResBlock(8, 12, norm_groups=4)(x, emb), x)
    up, down = (ResBlock(8, 12, resample=way, norm_groups=4)(x, emb) for way in ("up", "down"))
    assert torch.equal(up, Upsample(8, conv=False)(x)) and torch.equal(down, Downsample(8, conv=False)(x))
    assert torch.equal(SpatialTransformer(8, 2, 4, norm_groups=4)(x), x)
    assert (AttentionBlock(8, 2, norm_groups=4)(x) == 0).all()


def test_scale_shift_is_the_formula():
    block = randomised(ResBlock(8, 12, 16, scale_shift_norm=True, norm_groups=4))
    x, emb = draw(2, 8, 4, 4), draw(2, 12)
    h = F.conv2d(F.silu(block.in_layers[0](x)), block.in_layers[2].weight, block.in_layers[2].bias, padding=1)
    scale, shift = F.linear(F.silu(emb), block.emb_layers[1].weight, block.emb_layers[1].bias).split(16, dim=1)
    h = block.out_layers[0](h) * (1 + scale[..., None, None]) + shift[..., None, None]
    h = F.conv2d(F.silu(h), block.out_layers[3].weight, block.out_layers[3].bias, padding=1)
    assert torch.allclose(block(x, emb), block.skip_connection(x) + h, atol=1e-5)


def test_scale_shift_by_nothing_is_no_embedding():
    """With a zero embedding layer, scale and shift are one and zero, and both forms are the same block."""
    plain, shifted = (randomised(ResBlock(8, 12, scale_shift_norm=flag, norm_groups=4)) for flag in (False, True))
    with torch.no_grad():
        shifted.load_state_dict(plain.state_dict() | {k: v for k, v in shifted.state_dict().items() if "emb" in k})
        for block in (plain, shifted):
            block.emb_layers[1].weight.zero_(), block.emb_layers[1].bias.zero_()
    x, emb = draw(2, 8, 4, 4), draw(2, 12)
    assert torch.allclose(plain(x, emb), shifted(x, emb), atol=1e-6)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_plain_attention_is_a_loop_over_heads(new_order, other):
    channels, heads = 8, 2
    dim = channels // heads
    block = randomised(AttentionBlock(channels, heads, norm_groups=4, new_attention_order=new_order))
    x = draw(2, channels, 3, 2)
    context = draw(2, channels, 2, 2, seed=5) if other else x

    def parts(x, head):
        qkv = block.qkv(block.norm(x).flatten(2))
        starts = [j * channels + head * dim if new_order else (head * 3 + j) * dim for j in range(3)]
        return [qkv[:, start : start + dim] for start in starts]

    outs = []
    for head in range(heads):
        (q, *_), (_, k, v) = parts(x, head), parts(context, head)
        weights = torch.einsum("bcq,bck->bqk", q, k).div(dim**0.5).softmax(-1)
        outs.append(torch.einsum("bqk,bck->bcq", weights, v))
    expected = block.proj_out(torch.cat(outs, dim=1)).view_as(x)
    assert torch.allclose(block(x, context if other else None), expected, atol=1e-5)


def test_cross_attention_without_context_is_self_attention():
    attention = randomised(CrossAttention(12, 3, 4))
    x = draw(2, 5, 12)
    assert torch.equal(attention(x), attention(x, x))
    assert not torch.allclose(attention(x), attention(x, x.flip(0)), atol=1e-3)


def test_a_transformer_block_is_three_residuals():
    block = randomised(BasicTransformerBlock(8, 2, 4, context_dim=6))
    x, context = draw(2, 5, 8), draw(2, 3, 6)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    value, gate = block.ff.net[0].proj(block.norm3(h)).chunk(2, dim=-1)
    h = h + block.ff.net[2](value * F.gelu(gate))
    assert torch.allclose(block(x, context), h, atol=1e-6)


def test_linear_and_convolutional_projections_are_the_same_function():
    conv, linear = (
        randomised(SpatialTransformer(8, 2, 4, context_dim=6, linear_projection=flag, norm_groups=4))
        for flag in (False, True)
    )
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in conv.state_dict().items()})
    x, context = draw(2, 8, 3, 4), draw(2, 5, 6)
    assert torch.allclose(conv(x, context), linear(x, context), atol=1e-5)


def test_pixels_have_no_order_in_a_transformer():
    """Permuted pixels in, permuted pixels out."""
    net = randomised(SpatialTransformer(8, 2, 4, context_dim=6, norm_groups=4))
    x, context = draw(2, 8, 3, 4), draw(2, 5, 6)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., shuffle].view_as(x)
    assert torch.allclose(net(moved, context).flatten(2), net(x, context).flatten(2)[..., shuffle], atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_a_transformer_keeps_the_memory_format(linear):
    net = randomised(SpatialTransformer(8, 2, 4, linear_projection=linear, norm_groups=4))
    x = draw(2, 8, 3, 4)
    assert net(x).is_contiguous()
    assert net(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
