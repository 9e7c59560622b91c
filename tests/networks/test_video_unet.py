"""The UNet over videos: the upstream layout, the same numbers as its peer, what time may see, and what is attached."""

import hashlib

import pytest
import torch
from peers import peer
from torch import nn
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints.maps.unet import video_unet
from vdiff.hooks import routed
from vdiff.mixins import JointAttention, LoRA
from vdiff.networks import AlphaBlender, VideoUNet, sinusoidal
from vdiff.networks.transformer import CrossAttention
from vdiff.process import Conditioning
from vdiff.registry import build

SVD = dict(
    in_channels=8, out_channels=4, channels=320, context_dim=1024, head_dim=64, num_classes="sequential", vector_dim=768
)  # fmt: skip
TINY = dict(
    in_channels=4, out_channels=4, channels=16, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(1,), head_dim=16, norm_groups=8,
)  # fmt: skip
FRAMES = 3


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(net, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def inputs(net, frames=FRAMES, tokens=5):
    """x, c_noise and every condition that the network needs, for two videos."""
    given = {
        "cross_attention": lambda: draw(2, tokens, net.context_dim, seed=2),
        "vector": lambda: draw(2, net.vector_dim, seed=3),
        "label": lambda: torch.arange(2),
    }
    cond = Conditioning({name: given[name]() for name in net.accepts if name in given})
    return draw(2, net.in_channels, frames, 4, 4), torch.tensor([0.3, -1.1]), cond


# --- layout --------------------------------------------------------------------------------------


def test_the_state_dict_is_that_of_stable_video_diffusion():
    """The digest is of the published model's sorted lines "name shape"."""
    with torch.device("meta"):
        net = VideoUNet(**SVD)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert {
        "input_blocks.1.0.time_stack.in_layers.2.weight": (320, 320, 3, 1, 1),
        "input_blocks.1.1.time_pos_embed.0.weight": (1280, 320),
        "middle_block.1.time_stack.0.ff_in.net.0.proj.weight": (10240, 1280),
        "output_blocks.11.1.time_mixer.mix_factor": (1,),
    }.items() <= shapes.items()
    assert (len(shapes), sum(p.numel() for p in net.parameters())) == (1428, 1_524_623_082)
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "4c255ec4230e4869a2de7019b039b9f67474f2522e2280594ed892e47e4bd9aa"


@pytest.mark.parametrize("vector_dim, parameters", [(256, 1_523_967_722), (1280, 1_525_278_442)])
def test_sv3d_counts_its_parameters(vector_dim, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VideoUNet(**SVD | {"vector_dim": vector_dim}).parameters()) == parameters


# --- parity with diffusers -----------------------------------------------------------------------


def twins(dtype):
    """A network and the same in diffusers, with one epsilon for all residual blocks.

    Generative-models has 1e-5 in all of them; diffusers' blocks of a level with attention, and those on the way up, say
    1e-6.
    """
    ours = randomised(
        VideoUNet(**TINY | dict(channels=32, norm_groups=32, num_classes="sequential", vector_dim=24, in_channels=8))
    )
    theirs = peer("diffusers").UNetSpatioTemporalConditionModel(
        in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    theirs.load_state_dict(video_unet(1, attends=(True, False))(ours.state_dict()))
    for name, module in theirs.named_modules():
        if isinstance(module, nn.GroupNorm) and "resnets" in name:
            module.eps = 1e-5
    return ours.to(dtype), theirs.to(dtype).eval()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_numbers_as_diffusers(dtype, tolerance, tokens, monkeypatch):
    if dtype is torch.float64:  # theirs makes sinusoids in float32 whatever it computes in
        embeddings = peer("diffusers.models.embeddings")
        monkeypatch.setattr(embeddings, "get_timestep_embedding", lambda t, dim, **_: sinusoidal(t.double(), dim))
    ours, theirs = twins(dtype)
    x, picture, context = (
        draw(2, 4, FRAMES, 4, 4, dtype=dtype), draw(2, 4, 4, 4, seed=5, dtype=dtype),
        draw(2, tokens, 12, seed=2, dtype=dtype),
    )  # fmt: skip
    c_noise, numbers = torch.tensor([0.3, -1.1], dtype=dtype), torch.tensor([[6.0, 127, 0.02], [9.0, 40, 0.1]])
    vector = sinusoidal(numbers.to(dtype), 8).flatten(1)
    cond = Conditioning({"cross_attention": context, "vector": vector, "concat": picture})
    video = torch.cat([x, picture[:, :, None].expand_as(x)], dim=1).transpose(1, 2)
    with torch.no_grad():
        expected = theirs(video, c_noise, context, numbers.to(dtype)).sample.transpose(1, 2)
        said = ours(x, c_noise, cond)
    assert expected.std() > 0.1
    assert (difference := (said - expected).abs().max()) < tolerance, difference


@pytest.mark.parametrize("strategy", ["fixed", "learned", "learned_with_images"])
def test_every_merge_strategy_is_that_of_diffusers(strategy):
    theirs = peer("diffusers.models.resnet").AlphaBlender(0.3, strategy)
    ours = AlphaBlender(0.3, strategy)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(
        ours.mix_factor, nn.Parameter
    ) == isinstance(theirs.mix_factor, nn.Parameter)
    spatial, temporal = draw(2, 5, FRAMES, 4, 4), draw(2, 5, FRAMES, 4, 4, seed=1)
    image_only = torch.tensor([[0, 1, 0], [0, 0, 1.0]])
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (spatial, temporal)]
    said = ours(*rows, image_only.flatten()).unflatten(0, (2, FRAMES)).transpose(1, 2)
    torch.testing.assert_close(said, theirs(spatial, temporal, image_only), rtol=0, atol=1e-6)


# --- time ----------------------------------------------------------------------------------------


def test_frames_that_are_images_are_each_as_if_alone_and_others_see_each_other():
    net = randomised(VideoUNet(**TINY))
    x, c_noise, cond = inputs(net)
    changed = x.clone()
    changed[:, :, 0] += 1
    images = Conditioning({**cond.tensors, "image_only": torch.ones(2)})
    with torch.no_grad():
        together = net(x, c_noise, images)
        alone = torch.cat([net(x[:, :, f : f + 1], c_noise, images) for f in range(FRAMES)], dim=2)
        assert (together - alone).abs().max() < 1e-5
        assert (net(changed, c_noise, images) - together)[:, :, 1:].abs().max() < 1e-6
        video = net(x, c_noise, cond)
        assert (net(changed, c_noise, cond) - video)[:, :, 1:].abs().amax(dim=(1, 3, 4)).min() > 1e-3
        mixed = Conditioning({**cond.tensors, "image_only": torch.tensor([[1, 1, 1], [0, 0, 0]])})
        said = net(x, c_noise, mixed)
    assert (said[0] - together[0]).abs().max() < 1e-5 and (said[1] - video[1]).abs().max() < 1e-5


def test_what_is_said_for_the_video_may_be_said_for_each_frame():
    net = randomised(VideoUNet(**TINY | dict(in_channels=6, num_classes="sequential", vector_dim=5)))
    x, c_noise, cond = draw(2, 4, FRAMES, 4, 4), torch.tensor([0.3, -1.1]), inputs(net)[2]
    picture, keep = draw(2, 2, 4, 4, seed=7), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    short = Conditioning({**cond.tensors, "concat": picture}, {"cross_attention": keep})
    tensors = {name: value[:, None].expand(-1, FRAMES, *value.shape[1:]) for name, value in cond.tensors.items()}
    tensors["concat"] = picture[:, :, None].expand(-1, -1, FRAMES, -1, -1)
    long = Conditioning(tensors, {"cross_attention": keep[:, None].expand(-1, FRAMES, -1)})
    with torch.no_grad():
        expected = net(x, c_noise, short)
        assert (net(x, c_noise[:, None].expand(-1, FRAMES), long) - expected).abs().max() < 1e-5
        for name in ("vector", "cross_attention", "concat"):
            other = tensors[name].clone()
            other[(0, slice(None), 1) if name == "concat" else (0, 1)] += 1
            said = net(x, c_noise, Conditioning({**tensors, name: other}, long.masks))
            assert (said[1] - expected[1]).abs().max() < 1e-5 < 1e-3 < (said[0, :, 1] - expected[0, :, 1]).abs().max()


def test_any_number_of_frames_is_taken():
    net = randomised(VideoUNet(**TINY))
    for frames in (1, 2, 7):
        with torch.no_grad():
            assert net(*inputs(net, frames)).shape == (2, 4, frames, 4, 4)


# --- one key -------------------------------------------------------------------------------------


def test_attention_to_a_single_key_takes_its_value_and_gradients_are_those_of_attention():
    attention = CrossAttention(8, num_heads=2, head_dim=4, context_dim=6)
    x, context = draw(6, 5, 8).requires_grad_(), draw(6, 1, 6, seed=1).requires_grad_()

    def gradients():
        for tensor in (x, context, *attention.parameters()):
            tensor.grad = None
        out = attention(x, context)
        out.square().sum().backward()
        return out, [x.grad, context.grad, attention.to_v.weight.grad, attention.to_out[0].weight.grad]

    in_full, expected = gradients()
    assert all(layer.weight.grad is not None for layer in (attention.to_q, attention.to_k))
    attention.to_q.requires_grad_(False)
    attention.to_k.requires_grad_(False)
    asked = []
    attention.to_q.register_forward_hook(lambda *_: asked.append(True))
    short, found = gradients()
    assert not asked
    torch.testing.assert_close(short, in_full, rtol=0, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 4])
def test_one_context_serves_the_rows_folded_from_its_own(tokens):
    attention = CrossAttention(8, num_heads=2, head_dim=4, context_dim=6)
    x, context = draw(6, 5, 8), draw(2, tokens, 6, seed=1)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 2:] = False
    for is_recorded in (False, True):
        with torch.set_grad_enabled(is_recorded):
            for keep in (None, mask):
                many = None if keep is None else keep.repeat_interleave(3, 0)
                expected = attention(x, context.repeat_interleave(3, 0), many)
                torch.testing.assert_close(attention(x, context, keep), expected, rtol=0, atol=1e-6)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(merge_strategy="fixed", use_spatial_context=False, extra_ff_mix=False, linear_projection=False),
        dict(merge_strategy="learned", temporal_cross_attention=False, temporal_kernel=3, checkpointing=True),
        dict(num_classes="sequential", vector_dim=5, scale_shift_norm=True, resblock_updown=True, dropout=0.1),
        dict(num_classes=3, transformer_depth=(2, 1), transformer_depth_middle=2, resample_by_conv=False),
        dict(num_classes="continuous", head_dim=None, num_heads=2, attention_backend="math", merge_factor=0.1),
    ],
)
def test_every_option_builds_from_a_config_and_uses_all_its_weights(change):
    net = randomised(build({"type": "video_unet", **TINY | change}, kind="network")).train()
    x, c_noise, cond = inputs(net)
    out = net(x, c_noise, cond)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_new_network_says_zero():
    net = VideoUNet(**TINY)
    assert (net(*inputs(net)) == 0).all()


@pytest.mark.slow  # of each network one is traced in test_every_network.py, with its backward pass
@pytest.mark.parametrize("tokens", [1, 5])
def test_one_graph_under_compile(tokens):
    small = TINY | dict(channel_mult=(1,), attention_factors=())  # tracing is what takes time here
    net, counter = randomised(VideoUNet(**small, checkpointing=True)), CompileCounter()
    x, c_noise, cond = inputs(net, tokens=tokens)
    cond = Conditioning({**cond.tensors, "image_only": torch.zeros(2)})
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, c_noise, cond), net(x, c_noise, cond))
        compiled(x + 1, c_noise + 1, cond)
        assert counter.frame_count == 1
    compiled(x, c_noise, cond).square().mean().backward()
    assert counter.frame_count == 2  # one more, with gradients


# --- attachments ---------------------------------------------------------------------------------


def test_lora_attaches_everywhere_and_comes_off_bit_for_bit():
    net = randomised(VideoUNet(**TINY))
    x, c_noise, cond = inputs(net, tokens=1)
    with torch.no_grad():
        before, keys = net(x, c_noise, cond), list(net.state_dict())
        lora = LoRA(on="*.attn*.to_[qkv]", rank=2).attach(net)
        assert (net(x, c_noise, cond) - before).abs().max() < 1e-6  # frozen or trained, one key or its softmax
        for name, parameter in lora.named_parameters():
            if name.endswith("B"):
                nn.init.normal_(parameter)
        assert (net(x, c_noise, cond) - before).abs().max() > 1e-3
    net(x, c_noise, cond).square().mean().backward()
    assert all(p.grad is not None for p in lora.parameters())
    lora.detach()
    with torch.no_grad():
        assert torch.equal(net(x, c_noise, cond), before) and list(net.state_dict()) == keys


def test_joint_attention_meets_the_partner_frame_by_frame():
    net = randomised(VideoUNet(**TINY))
    x, c_noise, cond = inputs(net)
    cond = Conditioning({**cond.tensors, "image_only": torch.ones(2)}, partners=torch.tensor([1, -1]))
    with torch.no_grad():
        before = net(x, c_noise, cond)
        joint = JointAttention().attach(net)
        for parameter in joint.parameters():
            nn.init.normal_(parameter, std=0.1)
        changed = x.clone()
        changed[1, :, 2] += 1
        with routed(net, cond):
            apart = (net(changed, c_noise, cond) - net(x, c_noise, cond))[0]
        assert apart[:, :2].abs().max() < 1e-6 < 1e-3 < apart[:, 2].abs().max()
        joint.detach()
        assert torch.equal(net(x, c_noise, cond), before)


def test_attention_over_pixels_and_over_time_are_told_apart_by_role():
    roles = {n: m.role for n, m in VideoUNet(**TINY).named_modules() if getattr(m, "role", "").endswith("attention")}
    assert roles["middle_block.1.transformer_blocks.0.attn1"] == "self_attention"
    assert roles["middle_block.1.time_stack.0.attn1"] == "temporal_self_attention"
    assert roles["middle_block.1.time_stack.0.attn2"] == "temporal_cross_attention"
    alone = VideoUNet(**TINY, use_spatial_context=False).middle_block[1].time_stack[0]
    assert alone.attn2.role == "temporal_self_attention"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, c_noise, tensors, message",
    [
        ((2, 4, 4, 4), (2,), {}, r"\(B, 4, F, H, W\), got \(2, 4, 4, 4\)"),
        ((2, 3, 3, 4, 4), (2,), {}, r"\(B, 4, F, H, W\), got \(2, 3, 3, 4, 4\)"),
        ((2, 4, 3, 4, 5), (2,), {}, r"multiples of 2, got \(4, 5\)"),
        ((2, 4, 3, 4, 4), (2, 4), {}, r"\(B,\) or \(B, 3\)"),
        ((2, 4, 3, 4, 4), (2,), {"cross_attention": None}, "'cross_attention' is missing"),
        ((2, 4, 3, 4, 4), (2,), {"cross_attention": (2, 4, 5, 12)}, "tokens for 4 frames, and x has 3"),
        ((2, 4, 3, 4, 4), (2,), {"vector": (2, 5)}, "must be built with num_classes='sequential'"),
        ((2, 4, 3, 4, 4), (2,), {"concat": (2, 1, 4, 4)}, r"'concat' \(1 channels\)"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(x, c_noise, tensors, message):
    shapes = {"cross_attention": (2, 5, 12)} | tensors
    cond = Conditioning({name: torch.zeros(shape) for name, shape in shapes.items() if shape})
    with pytest.raises(ValueError, match=message):
        VideoUNet(**TINY)(torch.zeros(x), torch.zeros(c_noise), cond)


def test_a_vector_that_fits_neither_video_nor_frames_is_named():
    net = VideoUNet(**TINY, num_classes="sequential", vector_dim=5)
    x, c_noise, cond = inputs(net)
    cond = Conditioning({**cond.tensors, "vector": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match=r"'vector' is \(5,\) or, per frame, \(3, 5\) .* is \(6,\)"):
        net(x, c_noise, cond)


def test_an_image_flag_needs_a_blend_that_knows_images():
    net = VideoUNet(**TINY, merge_strategy="learned")
    x, c_noise, cond = inputs(net)
    with pytest.raises(ValueError, match="learned_with_images"):
        net(x, c_noise, Conditioning({**cond.tensors, "image_only": torch.ones(2)}))


@pytest.mark.parametrize("kernel", [2, (3, 1)])
def test_kernels_that_do_not_fit_are_errors(kernel):
    with pytest.raises(ValueError, match="a kernel is odd and has sizes for f, h and w"):
        VideoUNet(**TINY, temporal_kernel=kernel)
