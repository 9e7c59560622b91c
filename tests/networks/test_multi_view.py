"""Several cameras: attention over the views of a moment and over the moments of a view."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints import load_into
from vdiff.checkpoints.maps.unet import sv4d
from vdiff.networks import Clip, MultiViewTransformer, UNet, VideoUNet
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


SV4D_2 = dict(camera_embedding=True, separate_motion_blend=True)


@pytest.mark.parametrize(
    "change, tensors, parameters",
    [
        ({}, 1908, 1_996_625_322),  # SV4D
        (SV4D_2, 1924, 2_010_961_338),  # SV4D 2.0, eight views
        (SV4D_2 | dict(view_attention="released"), 1924, 2_010_961_338),  # and four
    ],
)
def test_sv4d_counts_its_parameters(change, tensors, parameters):
    with torch.device("meta"):
        net = VideoUNet(**SV4D | change)
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == (tensors, parameters)


@pytest.mark.parametrize("change", [{}, SV4D_2])
def test_its_names_go_to_the_original_and_back(change):
    with torch.device("meta"):
        ours = VideoUNet(**TINY | change).state_dict()
    theirs = sv4d()(ours)
    assert {
        "input_blocks.1.0.time_mix_blocks.in_layers.2.weight", "middle_block.0.time_mixer.mix_factor",
        "middle_block.1.time_mix_time_embed.0.weight", "output_blocks.3.1.time_mix_blocks.0.attn1.to_q.weight",
        "output_blocks.3.1.motion_blocks.0.attn2.to_k.weight", "input_blocks.1.1.time_mix_motion_embed.2.bias",
    } <= set(theirs)  # fmt: skip
    assert not any(ours in name for name in theirs for ours in ("time_stack", "pos_embed", "motion_mixer"))
    assert ("middle_block.1.time_mixer_motion.mix_factor" in theirs) == bool(change)
    assert list(sv4d().inverse(theirs)) == list(ours)


def look(block, tokens, context):
    """One sequence ``(n, c)`` through a block, attending to ``(1, d)``."""
    x = tokens[None]
    x = x + block.ff_in(block.norm_in(x))
    x = x + block.attn1(block.norm1(x))
    x = x + block.attn2(block.norm2(x), context[None])
    return (x + block.ff(block.norm3(x)))[0]


def sequences(view_attention, pixels):
    """Which (view, pixel) attend to each other at a moment t, and the moment whose context they are told."""
    grid = [(v, p) for v in range(VIEWS) for p in range(pixels)]
    if view_attention == "pixel":
        return [([(v, p) for v in range(VIEWS)], lambda t: t) for p in range(pixels)]
    if view_attention == "moment":
        return [(grid, lambda t: t)]
    # Generative-models: groups lie by number and moment, their contexts by moment and pixel.
    groups = [grid[i : i + VIEWS] for i in range(0, len(grid), VIEWS)]
    told = {(g, t): i for i, (g, t) in enumerate(itertools.product(range(len(groups)), range(MOMENTS)))}
    contexts = [t for t in range(MOMENTS) for _ in range(pixels)]
    return [(group, lambda t, g=g: contexts[told[g, t]]) for g, group in enumerate(groups)]


@pytest.mark.parametrize("has_camera", [False, True])
@pytest.mark.parametrize("view_attention", ["pixel", "moment", "released"])
def test_views_meet_in_their_moment_and_moments_in_their_view(view_attention, has_camera):
    """Against loops over sequences, one at a time: over views, then over moments."""
    camera_dim, mixed = (7 if has_camera else None), dict(separate_motion_blend=True, view_attention=view_attention)
    layer = MultiViewTransformer(16, 2, 8, 3, camera_dim, context_dim=12, norm_groups=8, **mixed)
    layer = randomised(layer).double()
    x, context, views = draw(2 * MOMENTS * VIEWS, 16, 4, 4), draw(2 * MOMENTS, 1, 12, seed=2), draw(2, VIEWS, 3, 8, 8)
    x, context, views, embedding = (a.double() for a in (x, context, views, draw(len(x), 7, seed=3)))
    with torch.no_grad():
        said = layer(x, Clip(MOMENTS * VIEWS, context=context, views=views, embedding=embedding))
        h = layer.transformer_blocks[0](layer.tokens(x), context.repeat_interleave(VIEWS, 0))
        h, context = h.unflatten(0, (2, MOMENTS, VIEWS)), context.unflatten(0, (2, MOMENTS))
        embedding = embedding.unflatten(0, (2, MOMENTS, VIEWS))
        moment = layer.numbered(layer.motion_pos_embed, MOMENTS, MOMENTS, h)[:, 0]
        over_views, over_moments = torch.empty_like(h), torch.empty_like(h)
        for b, t in itertools.product(range(2), range(MOMENTS)):
            if has_camera:
                view = layer.time_pos_embed(embedding[b, 0])
            else:
                view = layer.numbered(layer.time_pos_embed, VIEWS, VIEWS, h)[:, 0]
            for places, whose in sequences(view_attention, 16):
                tokens = torch.stack([h[b, t, v, p] + view[v] for v, p in places])
                for place, told in zip(places, look(layer.time_stack[0], tokens, context[b, whose(t)]), strict=True):
                    over_views[b, t, *place] = told
        h = layer.time_mixer(h, over_views)
        for b, v in itertools.product(range(2), range(VIEWS)):
            picture = F.interpolate(views[b, v][None], size=(4, 4), mode="bilinear")[0].flatten(1).T
            for p in range(16):
                over_moments[b, :, v, p] = look(layer.motion_stack[0], h[b, :, v, p] + moment, picture[p][None])
        expected = layer.added(x, layer.motion_mixer(h, over_moments).flatten(0, 2))
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", [{}, SV4D_2])
def test_with_weights_of_images_every_frame_is_an_image(change):
    """Told its moment's context and its own vector; what looks over views and moments adds nothing yet."""
    own = {k: v for k, v in TINY.items() if k != "motion_context_dim"}
    images, net = randomised(UNet(**own, linear_projection=True)), VideoUNet(**TINY | change).eval()
    load_into(net, images.state_dict(), inflate=True)
    x, c_noise, cond = inputs()
    with torch.no_grad():
        said = net(x, c_noise, cond)
        for frame in range(MOMENTS * VIEWS):
            told = {"cross_attention": cond["cross_attention"][:, frame // VIEWS], "vector": cond["vector"][:, frame]}
            alone = images(x[:, :, frame], c_noise, Conditioning(told))
            torch.testing.assert_close(said[:, :, frame], alone, rtol=1e-5, atol=1e-4)


def test_of_one_pixel_all_views_are_all_there_is():
    """Whichever way they are grouped."""
    said = []
    for view_attention in ("pixel", "moment", "released"):
        layer = MultiViewTransformer(16, 2, 8, 3, context_dim=12, norm_groups=8, view_attention=view_attention)
        context, views = draw(2 * MOMENTS, 1, 12, seed=2), draw(2, VIEWS, 3, 1, 1)
        with torch.no_grad():
            clip = Clip(MOMENTS * VIEWS, context=context, views=views)
            said.append(randomised(layer)(draw(2 * MOMENTS * VIEWS, 16, 1, 1), clip))
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{}, SV4D_2 | dict(checkpointing=True), dict(view_attention="moment"), SV4D_2 | dict(view_attention="released")],
)
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


@pytest.mark.parametrize("change", [pytest.param({}, marks=pytest.mark.slow), SV4D_2 | dict(view_attention="released")])
def test_one_graph_under_compile(change):
    small = TINY | dict(channel_mult=(1,), attention_factors=()) | change  # tracing is what takes time here
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
