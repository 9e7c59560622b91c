"""The UNet over sequences and volumes, and its head that says codes."""

import pytest
import torch

from vdiff.networks import Downsample, UNet, Upsample
from vdiff.process import Conditioning
from vdiff.registry import build

SMALL = dict(
    in_channels=2, out_channels=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,),
    head_dim=8, norm_groups=4,
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def middle_taps(net, like, axis):
    """Weights of kernels with one axis less: what they do where that axis is one long and padded with zeros."""
    shapes = {name: value.shape for name, value in like.state_dict().items()}
    taps = {}
    for name, value in net.state_dict().items():
        is_cut = value.ndim > len(shapes[name])
        taps[name] = value.select(axis, value.shape[axis] // 2) if is_cut else value
    like.load_state_dict(taps)
    return like.eval()


@pytest.mark.parametrize("change", [{}, dict(context_dim=5, linear_projection=True), dict(resblock_updown=True)])
def test_a_volume_one_slice_deep_is_a_picture(change):
    volumes = randomised(UNet(**SMALL | change, dims=3))
    pictures = middle_taps(volumes, UNet(**SMALL | change), axis=2)
    x, c_noise = draw(2, 2, 4, 6), torch.tensor([3.0, 741.0])
    cond = Conditioning({"cross_attention": draw(2, 7, 5, seed=2)}) if "context_dim" in change else None
    with torch.no_grad():
        expected = pictures(x, c_noise, cond)
        assert expected.std() > 0.1
        assert (volumes(x[:, :, None], c_noise, cond)[:, :, 0] - expected).abs().max() < 1e-5


def test_a_picture_one_pixel_wide_is_a_sequence():
    """On one level: a width of one cannot be halved."""
    one = SMALL | dict(channel_mult=(1,), attention_factors=(1,))
    pictures = randomised(UNet(**one))
    sequences = middle_taps(pictures, UNet(**one, dims=1), axis=-1)
    x, c_noise = draw(2, 2, 6), torch.tensor([3.0, 741.0])
    with torch.no_grad():
        assert (sequences(x, c_noise) - pictures(x[..., None], c_noise)[..., 0]).abs().max() < 1e-5


@pytest.mark.parametrize("dims, size, half", [(1, (8,), (4,)), (2, (8, 6), (4, 3)), (3, (5, 8, 6), (5, 4, 3))])
@pytest.mark.parametrize("conv", [True, False])
def test_of_a_volume_only_height_and_width_are_resampled(dims, size, half, conv):
    x = draw(1, 4, *size)
    small = Downsample(4, conv=conv, dims=dims)(x)
    assert small.shape[2:] == half
    assert Upsample(4, conv=conv, dims=dims)(small).shape[2:] == size


@pytest.mark.parametrize("dims, size", [(1, (8,)), (3, (3, 4, 6))])
@pytest.mark.parametrize(
    "change", [{}, dict(resblock_updown=True, scale_shift_norm=True), dict(resample_by_conv=False)]
)
def test_every_option_uses_all_its_weights(dims, size, change):
    net = randomised(build({"type": "unet", "dims": dims, **SMALL, **change}, kind="network")).train()
    out = net(draw(2, 2, *size), torch.tensor([3.0, 741.0]))
    assert out.shape == (2, 2, *size)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_head_for_codes_reads_what_the_sample_is_made_of():
    """As latent diffusion's id_predictor: normalisation and a 1 x 1 convolution, without SiLU."""
    net = randomised(UNet(**SMALL, num_codes=7))
    x, c_noise = draw(2, 2, 4, 6), torch.tensor([3.0, 741.0])
    norm, conv = net.id_predictor
    seen = []
    net.output_blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        logits = net(x, c_noise)
        assert logits.shape == (2, 7, 4, 6)
        expected = torch.einsum("nc,bchw->bnhw", conv.weight[..., 0, 0], norm(seen[0])) + conv.bias[:, None, None]
    assert (logits - expected).abs().max() < 1e-5
    names = {n for n in net.state_dict() if n.startswith("id_predictor")}
    assert names == {f"id_predictor.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
    assert set(net.state_dict()) - names == set(UNet(**SMALL).state_dict())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="over 3 axes want linear_projection"):
        UNet(**SMALL, context_dim=5, dims=3)
    with pytest.raises(ValueError, match=r"to be \(B, 2, D, H, W\), got \(1, 2, 4, 4\)"):
        UNet(**SMALL, dims=3)(draw(1, 2, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="must be multiples of 2"):
        UNet(**SMALL, dims=1)(draw(1, 2, 5), torch.zeros(1))
