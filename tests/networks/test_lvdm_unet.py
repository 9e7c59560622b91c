"""VideoCrafter's UNet: the upstream layout and counts, plain loops and diffusers' twin, its options and its errors."""

import hashlib
from itertools import product

import pytest
import torch
from peers import peer
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints.maps.lvdm import image_unet, unet_3d
from vdiff.conditioners import OpenCLIPTextEmbedder
from vdiff.first_stages import AutoencoderKL
from vdiff.networks import (
    FrameAttention,
    FrameTransformer,
    ImageCrossAttention,
    LVDMUNet,
    ResBlock,
    TemporalConvolution,
    UNet,
)
from vdiff.process import Conditioning
from vdiff.registry import build

VC2 = dict(in_channels=4, out_channels=4, channels=320, context_dim=1024, head_dim=64)
VC1 = VC2 | dict(temporal_kernels=None, max_distance=16)
SD21 = dict(in_channels=4, out_channels=4, channels=320, head_dim=64, context_dim=1024, linear_projection=True)
SMALL = dict(
    in_channels=4, out_channels=4, channels=32, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(1,), head_dim=8,
)  # fmt: skip
IMAGE = SMALL | dict(image_tokens=3, learned_image_scale=True, max_distance=2, temporal_kernels=None)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(net, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def inputs(net, rows=2, frames=3, size=4):
    """x, c_noise and every condition that the network takes, but ``concat``."""
    given = {
        "cross_attention": lambda: draw(rows, 7, net.context_dim, seed=2),
        "image_tokens": lambda: draw(rows, frames, net.image_tokens, net.context_dim, seed=3),
        "fps": lambda: torch.tensor([8.0, 24.0])[:rows],
        "guidance": lambda: torch.tensor([7.5, 2.0])[:rows],
        "concat": None,
    }
    cond = Conditioning({name: given[name]() for name in net.accepts if given[name]})
    return draw(rows, net.in_channels, frames, size, size), torch.tensor([3.0, 741.0])[:rows], cond


# --- layout --------------------------------------------------------------------------------------


def test_the_state_dict_is_videocrafters():
    """The digest is of the published model's sorted lines "name shape"."""
    with torch.device("meta"):
        net = LVDMUNet(**VC2)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert {
        "init_attn.0.proj_in.weight": (512, 320, 1),
        "middle_block.3.temopral_conv.conv4.3.weight": (1280, 1280, 3, 1, 1),
        "output_blocks.5.3.conv.weight": (1280, 1280, 3, 3),
        "fps_embedding.2.bias": (1280,),
    }.items() <= shapes.items()
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "06afad4f540dcb22fd40a2bcb65a2e0035cbadfe732365299e7793e4d93d4d67"


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [
        (VC1 | dict(fps=False), 1196, 1_144_485_956),  # VideoCrafter 1, 512
        (VC1, 1200, 1_146_536_516),  # 1024
        (VC2, 1484, 1_413_284_420),
        (VC2 | dict(fps=False), 1480, 1_411_233_860),  # ModelScope's
        (VC2 | dict(image_tokens=16), 1516, 1_438_843_460),  # VideoCrafter 1, image to video
        (VC2 | dict(image_tokens=16, in_channels=8), 1516, 1_438_854_980),  # DynamiCrafter 512 and 1024
        (VC2 | dict(image_tokens=16, in_channels=8, learned_image_scale=True), 1532, 1_438_854_996),  # 256
        (VC2 | dict(guidance_dim=256), 1485, 1_413_284_420 + 256 * 320),  # T2V-Turbo
    ],
)
def test_every_published_network_has_its_parameters(config, tensors, parameters):
    with torch.device("meta"):
        net = LVDMUNet(**config)
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == (tensors, parameters)


def test_the_census_of_a_videocrafter_checkpoint():
    """2039 tensors to fill, 1240 to fill them from (Stable Diffusion 2.1), 3523 with a UNet to compare with."""
    peer("open_clip")
    with torch.device("meta"):
        parts = LVDMUNet(**VC2), UNet(**SD21), AutoencoderKL(), OpenCLIPTextEmbedder()
    unet, image_unet, vae, text = (len(part.state_dict()) for part in parts)
    tables = 12  # betas, alphas_cumprod and ten more that a schedule of latent diffusion leaves in its file
    video = unet + vae + text + tables + 1  # scale_arr, the thirteenth
    assert (unet, image_unet, vae, text) == (1484, 686, 248, 294)
    assert (video, image_unet + vae + text + tables, video + unet) == (2039, 1240, 3523)


# --- parity --------------------------------------------------------------------------------------


def test_same_numbers_as_the_three_dimensional_unet_of_diffusers():
    diffusers = peer("diffusers")
    net = randomised(LVDMUNet(**SMALL | dict(context_dim=16, fps=False)))
    theirs = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=8,
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == 1_323_780
    theirs.load_state_dict(unet_3d(1, (True, False))(net.state_dict()))
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        expected = theirs(x, c_noise, cond["cross_attention"]).sample
        difference = (net(x, c_noise, cond) - expected).abs().max()
    assert expected.std() > 0.1
    assert difference < 1e-5, difference


def looked(q, k, v, by_distance=None, is_causal=False):
    """Attention of ``(F, d)``, one query at a time; ``by_distance`` holds the two tables of relative positions."""
    scale, out = q.shape[-1] ** -0.5, torch.zeros_like(q)
    for i in range(len(q)):
        seen = range(i + 1 if is_causal else len(k))
        keys, values = k, v
        if by_distance is not None:
            reach = len(by_distance[0]) // 2
            rows = [max(-reach, min(reach, j - i)) + reach for j in range(len(k))]
            keys, values = (x + table[rows] for x, table in zip((k, v), by_distance, strict=True))
        weights = torch.stack([scale * (q[i] @ keys[j]) for j in seen]).softmax(0)
        for weight, j in zip(weights, seen, strict=True):
            out[i] += weight * values[j]
    return out


@pytest.mark.parametrize("max_distance, is_causal", [(None, True), (2, False), (2, True)])
def test_frames_attend_as_plain_loops_do(max_distance, is_causal):
    """Float64; five frames, so that distances beyond the last of the table occur."""
    net = randomised(FrameAttention(6, 2, 4, max_distance, is_causal).double())
    x = draw(3, 5, 6, dtype=torch.float64)
    tables = None
    if max_distance is not None:
        tables = (net.relative_position_k.embeddings_table, net.relative_position_v.embeddings_table)
    with torch.no_grad():
        heads = [layer(x).unflatten(-1, (2, 4)) for layer in (net.to_q, net.to_k, net.to_v)]
        out = torch.zeros_like(heads[0])
        for row, head in product(range(3), range(2)):
            out[row, :, head] = looked(*(y[row, :, head] for y in heads), tables, is_causal)
        assert (net(x) - net.to_out(out.flatten(2))).abs().max() < 1e-10
        if is_causal:
            later = x.clone()
            later[:, 3:] += 1
            assert torch.equal(net(later)[:, :3], net(x)[:, :3])


def normalised(x, layer):
    """Group normalisation of one video ``(c, f, h, w)``, group by group."""
    groups = [(g - g.mean()) / (g.var(correction=0) + layer.eps).sqrt() for g in x.chunk(layer.num_groups)]
    return torch.cat(groups) * layer.weight[:, None, None, None] + layer.bias[:, None, None, None]


@pytest.mark.parametrize("is_linear", [False, True])
def test_a_transformer_over_time_runs_along_the_frames_of_each_pixel(is_linear):
    net = randomised(FrameTransformer(8, 2, 4, linear_projection=is_linear, norm_groups=4).double())
    x = draw(6, 8, 2, 3, dtype=torch.float64)  # two videos of three frames
    block = net.transformer_blocks[0]

    def attention(layer, y):
        q, k, v = (part(y).unflatten(-1, (2, 4)) for part in (layer.to_q, layer.to_k, layer.to_v))
        return layer.to_out(torch.cat([looked(q[:, h], k[:, h], v[:, h]) for h in range(2)], -1))

    def project(layer, y):
        return y @ layer.weight.flatten(1).T + layer.bias

    out = x.clone()
    with torch.no_grad():
        for video in range(2):
            rows = slice(3 * video, 3 * video + 3)
            h = normalised(x[rows].transpose(0, 1), net.norm)
            for i, j in product(range(2), range(3)):
                y = project(net.proj_in, h[:, :, i, j].T)
                y = y + attention(block.attn1, block.norm1(y))
                y = y + attention(block.attn2, block.norm2(y))
                y = y + block.ff(block.norm3(y))
                out[rows, :, i, j] += project(net.proj_out, y)
        assert (net(x, 3) - out).abs().max() < 1e-10


@pytest.mark.parametrize("kernels", [((3, 1, 1),) * 4, ((3, 3, 3), (3, 3, 1), (3, 1, 3), (3, 1, 1))])
def test_convolutions_over_time_are_sums_over_neighbours(kernels):
    net = randomised(TemporalConvolution(4, kernels, norm_groups=2).double())
    x = draw(3, 4, 3, 2, dtype=torch.float64)

    def convolved(y, conv):
        f, h, w = y.shape[1:]
        out = conv.bias[:, None, None, None].expand(-1, f, h, w).clone()
        half = [n // 2 for n in conv.kernel_size]
        for place in product(range(f), range(h), range(w)):
            for tap in product(*(range(n) for n in conv.kernel_size)):
                there = [p + t - m for p, t, m in zip(place, tap, half, strict=True)]
                if all(0 <= p < n for p, n in zip(there, (f, h, w), strict=True)):
                    out[:, *place] += conv.weight[:, :, *tap] @ y[:, *there]
        return out

    y = video = x.transpose(0, 1)
    with torch.no_grad():
        for layers in (net.conv1, net.conv2, net.conv3, net.conv4):
            y = normalised(y, layers[0])
            y = convolved(y * y.sigmoid(), layers[-1])
        assert (net(x, 3) - (video + y).transpose(0, 1)).abs().max() < 1e-10


@pytest.mark.parametrize("learned_scale", [False, True])
def test_a_picture_is_attended_to_beside_the_text_and_added(learned_scale):
    net = randomised(ImageCrossAttention(6, 2, 4, 5, num_image_tokens=3, learned_scale=learned_scale).double())
    x, context = draw(2, 4, 6, dtype=torch.float64), draw(2, 10, 5, seed=2, dtype=torch.float64)

    def attention(to_k, to_v, told):
        out = torch.zeros(2, 4, 2, 4, dtype=torch.float64)
        q, k, v = (y.unflatten(-1, (2, 4)) for y in (net.to_q(x), to_k(told), to_v(told)))
        for row, head in product(range(2), range(2)):
            out[row, :, head] = looked(q[row, :, head], k[row, :, head], v[row, :, head])
        return out.flatten(2)

    with torch.no_grad():
        scale = 1 + net.alpha.tanh() if learned_scale else 1
        text = attention(net.to_k, net.to_v, context[:, :7])
        image = attention(net.to_k_ip, net.to_v_ip, context[:, 7:])
        assert (net(x, context) - net.to_out(text + scale * image)).abs().max() < 1e-10


# --- truths --------------------------------------------------------------------------------------


def test_an_image_network_becomes_a_video_network_that_says_the_same_of_each_frame():
    """Layers over time begin at zero, and so do the frames per second and attention's new projections' ends."""
    config = SMALL | dict(attention_factors=(1, 2))
    image_net = randomised(UNet(**config, linear_projection=True))
    net = LVDMUNet(**config).eval()
    report = net.load_state_dict(image_unet()(image_net.state_dict()), strict=False)
    assert report.missing_keys and not report.unexpected_keys
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        video = net(x, c_noise, cond)
        text = Conditioning({"cross_attention": cond["cross_attention"]})
        frames = [image_net(x[:, :, f], c_noise, text) for f in range(x.shape[2])]
    assert (video - torch.stack(frames, 2)).abs().max() < 1e-5  # other sizes of batch, other rounding


def test_order_counts_through_convolutions_and_relative_positions_alone():
    order = torch.tensor([2, 0, 1])
    blind = dict(temporal_kernels=None, fps=False)
    for change, is_blind in ((blind, True), (blind | dict(max_distance=2), False), (dict(fps=False), False)):
        net = randomised(LVDMUNet(**SMALL | change))
        x, c_noise, cond = inputs(net, rows=1)
        with torch.no_grad():
            difference = (net(x[:, :, order], c_noise, cond) - net(x, c_noise, cond)[:, :, order]).abs().max()
        assert difference < 1e-5 if is_blind else difference > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | dict(temporal_kernels=((3, 3, 1), (3, 1, 3)) * 2, temporal_dropout=0.0, default_fps=8.0),
        IMAGE,
        SMALL | dict(is_causal=True, initial_attention=False, fps=False, guidance_dim=6, linear_projection=False),
        SMALL | dict(resblock_updown=True, scale_shift_norm=True, temporal_depth=2, head_dim=None, num_heads=2),
        SMALL | dict(resample_by_conv=False, checkpointing=True, attention_backend="math", attention_factors=()),
    ],
)
def test_every_option_builds_from_a_config_and_uses_all_its_weights(config):
    net = randomised(build({"type": "lvdm_unet", **config}, kind="network")).train()
    x, c_noise, cond = inputs(net)
    out = net(x, c_noise, cond)
    assert out.shape == x.shape
    out.square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle


def test_a_new_network_says_zero():
    net = LVDMUNet(**SMALL)
    assert (net(*inputs(net)) == 0).all()


def test_every_condition_changes_the_output_of_its_own_row_only():
    net = randomised(LVDMUNet(**IMAGE | dict(in_channels=6, guidance_dim=6)))
    x, c_noise, cond = inputs(net)
    x, tensors = x[:, :4], dict(cond.tensors) | {"concat": draw(2, 2, 4, 4, seed=5)}
    with torch.no_grad():
        before = net(x, c_noise, Conditioning(tensors))
        for name, value in tensors.items():
            changed = torch.stack([value[0], value[1] + 1])
            after = net(x, c_noise, Conditioning(tensors | {name: changed}))
            assert (after[0] - before[0]).abs().max() < 1e-5 < 1e-3 < (after[1] - before[1]).abs().max(), name
        by_frame = net(x, c_noise[:, None].expand(-1, 3), Conditioning(tensors))
        assert (by_frame - before).abs().max() < 1e-5
        still = tensors | {"image_tokens": tensors["image_tokens"][:, 0]}
        repeated = tensors | {"image_tokens": tensors["image_tokens"][:, :1].expand(-1, 3, -1, -1)}
        told = [net(x, c_noise, Conditioning(each)) for each in (still, repeated)]
        assert (told[0] - told[1]).abs().max() < 1e-5


def test_masked_words_do_not_count_and_the_picture_does():
    net = randomised(LVDMUNet(**IMAGE))
    x, c_noise, cond = inputs(net)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    other = cond["cross_attention"].masked_fill(~mask[..., None], 100.0)
    with torch.no_grad():
        masked = net(x, c_noise, cond.with_(masks={"cross_attention": mask}))
        swapped = Conditioning(dict(cond.tensors) | {"cross_attention": other}, {"cross_attention": mask})
        assert torch.equal(masked, net(x, c_noise, swapped))
        words = {name: value[1:] for name, value in cond.tensors.items()}
        words["cross_attention"] = words["cross_attention"][:, :4]
        assert (masked[1:] - net(x[1:], c_noise[1:], Conditioning(words))).abs().max() < 1e-5


@pytest.mark.slow  # of each network one is traced in test_every_network.py, with its backward pass
def test_one_graph_under_compile():
    small = dict(temporal_kernels=((3, 1, 1),) * 4, channel_mult=(1,), attention_factors=())
    net, counter = randomised(LVDMUNet(**IMAGE | small)), CompileCounter()
    x, c_noise, cond = inputs(net)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x, c_noise, cond), net(x, c_noise, cond))
    compiled(x + 1, c_noise + 1, cond)
    assert counter.frame_count == 1


def test_the_output_lies_in_memory_in_order():
    """A block that left its permuted layout behind would slow every later layer."""
    net = randomised(LVDMUNet(**SMALL))
    layouts = []
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(lambda _, args: layouts.append(args[0].is_contiguous()))
    net(*inputs(net))
    assert layouts and all(layouts)


def test_attention_over_time_is_found_by_role():
    net = LVDMUNet(**IMAGE)
    roles = {n: m.role for n, m in net.named_modules() if getattr(m, "role", "").endswith("attention")}
    assert roles["middle_block.1.transformer_blocks.0.attn1"] == "self_attention"
    assert roles["middle_block.1.transformer_blocks.0.attn2"] == "cross_attention"
    assert roles["middle_block.2.transformer_blocks.0.attn2"] == "temporal_self_attention"


@pytest.mark.parametrize(
    "config, change, message",
    [
        (IMAGE, {"image_tokens": draw(2, 4, 12)}, r"'image_tokens' are 3 for each row, or \(3, 3\) for its frames"),
        (IMAGE, {"image_tokens": None}, "'image_tokens' is missing"),
        (SMALL, {"fps": None}, "'fps' is missing, .* built with fps"),
        (SMALL, {"image_tokens": draw(2, 3, 12)}, "'image_tokens', for which it must be built with image_tokens"),
        (SMALL, {"cross_attention": None}, "'cross_attention' is missing"),
        (SMALL | dict(guidance_dim=6), {"guidance": draw(2, 6)}, r"one scale per row, \(B,\); got \(2, 6\)"),
        (SMALL, {"concat": draw(2, 1, 4, 4)}, r"\(1 channels\) to be \(B, 4, F, H, W\), got \(2, 5, 3, 4, 4\)"),
    ],
)
def test_conditions_that_do_not_fit_are_errors(config, change, message):
    net = LVDMUNet(**config)
    x, c_noise, cond = inputs(net)
    tensors = {name: value for name, value in (dict(cond.tensors) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        net(x, c_noise, Conditioning(tensors))


def test_what_cannot_be_built_or_run_is_said():
    with pytest.raises(ValueError, match="kernels are four, each of three odd sizes"):
        LVDMUNet(**SMALL | dict(temporal_kernels=((3, 1, 1),) * 3))
    net = LVDMUNet(**SMALL)
    x, c_noise, cond = inputs(net)
    with pytest.raises(ValueError, match=r"\(B,\) or \(B, 3\); got the shape \(2, 5\)"):
        net(x, c_noise[:, None].expand(-1, 5), cond)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(4, 3\)"):
        net(x[..., :3], c_noise, cond)
