"""Several cameras: attention over the views of a moment and over the moments of a view."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints.maps.unet import sv4d
from vdiff.networks import Clip, MultiViewTransformer, VideoUNet
from vdiff.process import Conditioning
from vdiff.registry import build

SV4D = dict(
    in_channels=8, out_channels=4, channels=320, context_dim=1024, head_dim=64, num_classes="sequential",
    vector_dim=1280, merge_factor=0.0, motion_context_dim=4,
)  # fmt: skip
TINY = dict(
    in_channels=4, out_channels=4, channels=16, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(1,), head_dim=16, norm_groups=8, motion_context_dim=3, num_classes="sequential", vector_dim=5,
)  # fmt: skip
MOMENTS, VIEWS = 2, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def inputs():
    frames = MOMENTS * VIEWS
    cond = {
        "cross_attention": draw(2, MOMENTS, 1, 12, seed=2), "views": draw(2, 3, VIEWS, 8, 8, seed=3),
        "vector": draw(2, frames, 5, seed=4),
    }  # fmt: skip
    return draw(2, 4, frames, 4, 4), torch.tensor([0.3, -1.1]), Conditioning(cond)


@pytest.mark.parametrize(
    "change, tensors, parameters",
    [
        ({}, 1908, 1_996_625_322),  # SV4D
        (dict(camera_embedding=True, separate_motion_blend=True), 1924, 2_010_961_338),  # SV4D 2.0
    ],
)
def test_sv4d_counts_its_parameters(change, tensors, parameters):
    with torch.device("meta"):
        net = VideoUNet(**SV4D | change)
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == (tensors, parameters)


def test_its_names_go_to_the_original_and_back():
    with torch.device("meta"):
        ours = VideoUNet(**TINY).state_dict()
    theirs = sv4d()(ours)
    assert {
        "input_blocks.1.0.time_mix_blocks.in_layers.2.weight", "middle_block.0.time_mixer.mix_factor",
        "middle_block.1.time_mix_time_embed.0.weight", "output_blocks.3.1.time_mix_blocks.0.attn1.to_q.weight",
        "output_blocks.3.1.motion_blocks.0.attn2.to_k.weight", "input_blocks.1.1.time_mix_motion_embed.2.bias",
    } <= set(theirs)  # fmt: skip
    assert not any("time_stack" in name or "pos_embed" in name for name in theirs)
    assert list(sv4d().inverse(theirs)) == list(ours)


def test_views_meet_in_their_moment_and_moments_in_their_view():
    """Against a loop over moments, then over views, each alone."""
    layer = randomised(MultiViewTransformer(16, 2, 8, 3, context_dim=12, norm_groups=8, separate_motion_blend=True))
    x, context, views = draw(2 * MOMENTS * VIEWS, 16, 4, 4), draw(2 * MOMENTS, 1, 12, seed=2), draw(2, VIEWS, 3, 8, 8)
    with torch.no_grad():
        said = layer(x, Clip(MOMENTS * VIEWS, context=context, views=views))
        h = layer.transformer_blocks[0](layer.tokens(x), context.repeat_interleave(VIEWS, 0))
        h = h.unflatten(0, (2, MOMENTS, VIEWS))
        numbers = [layer.numbered(e, n, n, h) for e, n in (
            (layer.time_pos_embed, VIEWS), (layer.motion_pos_embed, MOMENTS)
        )]  # fmt: skip
        out = torch.empty_like(h)
        for b in range(2):
            for t in range(MOMENTS):
                one = context.unflatten(0, (2, MOMENTS))[b, t][None]
                told = layer.time_stack[0](h[b, t] + numbers[0], one, None, VIEWS)
                out[b, t] = layer.time_mixer(h[b, t], told)
        h = out.clone()
        for b in range(2):
            for v in range(VIEWS):
                picture = F.interpolate(views[b, v][None], size=(4, 4), mode="bilinear")[0].flatten(1).T[:, None]
                told = layer.motion_stack[0](h[b, :, v] + numbers[1], picture, None, MOMENTS)
                out[b, :, v] = layer.motion_mixer(h[b, :, v], told)
        expected = layer.added(x, out.flatten(0, 2))
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{}, dict(camera_embedding=True, separate_motion_blend=True, checkpointing=True)])
def test_it_uses_all_its_weights(change):
    net = randomised(build({"type": "video_unet", **TINY | change}, kind="network")).train()
    x, c_noise, cond = inputs()
    out = net(x, c_noise, cond)
    assert out.shape == x.shape
    out.square().mean().backward()
    # Attention to a single key does not depend on queries and keys.
    alone = ("attn2.to_q", "attn2.to_k", "norm2")
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert any(part in name for part in alone) or parameter.grad.abs().max() > 0, name


def test_one_graph_under_compile():
    small = TINY | dict(channel_mult=(1,), attention_factors=())  # tracing is what takes time here
    net, counter = randomised(VideoUNet(**small)), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs()), net(*inputs()))
    assert counter.frame_count == 1


def test_what_does_not_fit_is_said():
    net = VideoUNet(**TINY)
    x, c_noise, cond = inputs()
    with pytest.raises(ValueError, match=r"'views' is \(B, 3, V, h, w\), where V divides the 6 frames"):
        net(x, c_noise, Conditioning({**cond.tensors, "views": torch.zeros(2, 3, 4, 8, 8)}))
    with pytest.raises(ValueError, match="tokens for 3 moments, and x has 2"):
        net(x, c_noise, Conditioning({**cond.tensors, "cross_attention": torch.zeros(2, 3, 1, 12)}))
    with pytest.raises(ValueError, match="must be built with motion_context_dim"):
        VideoUNet(**TINY | dict(motion_context_dim=None))(x, c_noise, cond)
    with pytest.raises(ValueError, match="go with motion_context_dim"):
        VideoUNet(**TINY | dict(motion_context_dim=None, separate_motion_blend=True))
