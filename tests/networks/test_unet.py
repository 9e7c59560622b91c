"""The UNet: the upstream layout, the same numbers as peers, its options and its errors."""

import hashlib

import pytest
import torch
from peers import peer
from torch._dynamo.testing import CompileCounter

from vdiff.attention import use_backend
from vdiff.checkpoints.maps.unet import plain_attention, unet
from vdiff.networks import ResBlock, UNet
from vdiff.process import Conditioning
from vdiff.registry import ConfigError, build

SD15 = dict(in_channels=4, out_channels=4, channels=320, num_heads=8, context_dim=768)
SDXL = dict(
    in_channels=4, out_channels=4, channels=320, channel_mult=(1, 2, 4), attention_factors=(2, 4), head_dim=64,
    transformer_depth=(1, 2, 10), context_dim=2048, linear_projection=True, num_classes="sequential", vector_dim=2816,
)  # fmt: skip
SMALL = dict(in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))
PLAIN = SMALL | dict(head_dim=16)
TEXT = SMALL | dict(head_dim=16, context_dim=12)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def inputs(net, size=8, rows=2):
    """x, c_noise and every condition that the network takes, but ``concat``."""
    given = {
        "cross_attention": lambda: draw(rows, 7, net.context_dim, seed=2),
        "vector": lambda: draw(rows, net.label_emb[0][0].in_features, seed=3),
        "label": lambda: torch.arange(rows),
        "guidance": lambda: torch.tensor([7.5, 2.0])[:rows],
        "concat": None,
    }
    cond = Conditioning({name: given[name]() for name in net.accepts if given[name]})
    return draw(rows, net.in_channels, size, size), torch.tensor([3.0, 741.0])[:rows], cond


# --- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, tensors, parameters, digest, spelled",
    [
        (
            SD15, 686, 859_520_964, "2489855b740ba326b790207b1118e63205e3a533d068913c24787d987ad98626",
            {
                "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
                "input_blocks.3.0.op.weight": (320, 320, 3, 3),
                "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
                "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            },
        ),
        (
            SDXL, 1680, 2_567_463_684, "d8427731b1d2b4b612e3c50353d91f7c1eef2d8fb29d7539903578a9604a530a",
            {
                "label_emb.0.0.weight": (1280, 2816),
                "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
                "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
                "input_blocks.4.1.proj_in.weight": (640, 640),
            },
        ),
    ],
)  # fmt: skip
def test_the_state_dict_is_upstreams(config, tensors, parameters, digest, spelled):
    """The digest is of the published models' sorted lines "name shape"."""
    with torch.device("meta"):
        net = UNet(**config)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert spelled.items() <= shapes.items()
    assert (len(shapes), sum(p.numel() for p in net.parameters())) == (tensors, parameters)
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    "change, parameters",
    [
        ({"in_channels": 9}, 859_535_364),  # inpainting
        ({"context_dim": 1280}, 872_300_484),  # the first text-to-image latent diffusion
        ({"num_heads": None, "head_dim": 64, "context_dim": 1024, "linear_projection": True}, 865_910_724),  # 2.x
    ],
)
def test_relatives_of_stable_diffusion_count_the_same_parameters(change, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**SD15 | change).parameters()) == parameters


def test_the_refiner_has_its_parameters():
    with torch.device("meta"):
        net = UNet(
            4, 4, 384, attention_factors=(2, 4), transformer_depth=4, head_dim=64, context_dim=1280,
            linear_projection=True, num_classes="sequential", vector_dim=2560,
        )  # fmt: skip
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == (1220, 2_259_526_660)


# --- parity with diffusers -----------------------------------------------------------------------

TWIN = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16)
FIRST = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
SECOND = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
)


@pytest.mark.parametrize(
    "style, config, twin, parameters",
    [
        ("sd1", dict(attention_factors=(1,), num_heads=4), FIRST | dict(attention_head_dim=4), 787_844),
        (
            "sd2", dict(attention_factors=(1,), head_dim=16, linear_projection=True),
            FIRST | dict(attention_head_dim=(2, 4), use_linear_projection=True), 787_844,
        ),
        (
            "sdxl", dict(
                attention_factors=(2,), transformer_depth=(1, 2), head_dim=16, linear_projection=True,
                num_classes="sequential", vector_dim=64,
            ),
            SECOND | dict(
                transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
            ), 1_309_540,
        ),
        (
            "deep", dict(attention_factors=(1, 2), head_dim=16, num_res_blocks=2, transformer_depth=(2, 1)),
            dict(
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
                layers_per_block=2, attention_head_dim=(2, 4), transformer_layers_per_block=(2, 1),
            ), None,
        ),
        (
            "lcm", dict(attention_factors=(2,), head_dim=16, guidance_dim=256),
            SECOND | dict(attention_head_dim=(2, 4), time_cond_proj_dim=256), None,
        ),
    ],
)  # fmt: skip
def test_same_numbers_as_the_conditional_unet_of_diffusers(style, config, twin, parameters):
    diffusers = peer("diffusers")
    net = randomised(UNet(**SMALL | dict(context_dim=16) | config))
    theirs = diffusers.UNet2DConditionModel(**TWIN | twin).eval()
    attends = [factor in config["attention_factors"] for factor in (1, 2)]
    theirs.load_state_dict(unet(config.get("num_res_blocks", 1), attends)(net.state_dict()))
    assert parameters in (None, sum(p.numel() for p in net.parameters()))
    x, c_noise, context = draw(2, 4, 8, 8), torch.tensor([3.0, 741.0]), draw(2, 7, 16, seed=2)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 4:] = False
    cond, added, waves = {"cross_attention": context}, None, None
    if style == "lcm":
        cond["guidance"] = torch.tensor([8.5, 1.0])
        waves = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, cond["guidance"] - 1, 256)
    if style == "sdxl":
        added = {"text_embeds": draw(2, 16, seed=3), "time_ids": torch.arange(12.0).reshape(2, 6) * 100}
        times = theirs.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
        cond["vector"] = torch.cat([added["text_embeds"], times], dim=1)
    with torch.no_grad():
        for mask in (None, keep):
            ours = net(x, c_noise, Conditioning(cond, {} if mask is None else {"cross_attention": mask}))
            expected = theirs(
                x, c_noise, context, timestep_cond=waves, encoder_attention_mask=mask, added_cond_kwargs=added
            ).sample
            assert expected.std() > 0.1
            assert (difference := (ours - expected).abs().max()) < 1e-5, difference


@pytest.mark.parametrize(
    "config, twin",
    [
        ({}, {}),
        ({"scale_shift_norm": True}, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}),
        ({"resblock_updown": True}, {"downsample_type": "resnet", "upsample_type": "resnet"}),
        ({"num_classes": 5}, {"num_class_embeds": 5}),
    ],
)
def test_same_numbers_as_the_unconditional_unet_of_diffusers(config, twin):
    diffusers = peer("diffusers")
    net = randomised(UNet(**PLAIN | {"attention_factors": (1, 2)} | config))
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, freq_shift=0,
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, attention_head_dim=16,
        **twin,
    ).eval()  # fmt: skip
    table = unet(1, (True, True), "resblock_updown" in config, attention=plain_attention(16))
    theirs.load_state_dict(table(net.state_dict()))
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        expected = theirs(x, c_noise, class_labels=cond.get("label")).sample
        assert (net(x, c_noise, cond) - expected).abs().max() < 1e-5


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        PLAIN | dict(new_attention_order=True),
        PLAIN | dict(scale_shift_norm=True, resblock_updown=True),
        PLAIN | dict(resample_by_conv=False),
        PLAIN | dict(num_classes=10),
        PLAIN | dict(num_classes="continuous"),
        PLAIN | dict(num_classes="sequential", vector_dim=5),
        PLAIN | dict(attention_factors=()),
        PLAIN | dict(guidance_dim=8),
        PLAIN | dict(channels=16, norm_groups=16),
        PLAIN | dict(channel_mult=(1, 2, 3), num_res_blocks=(1, 2, 1), attention_factors=(1, 4)),
        TEXT,
        TEXT | dict(transformer_depth=(1, 2), transformer_depth_middle=3, linear_projection=True),
        TEXT | dict(disable_self_attentions=(False, True), dropout=0.1),
        TEXT | dict(head_dim=None, num_heads=2, checkpointing=True, attention_backend="math"),
    ],
)
def test_every_option_builds_from_a_config_and_uses_all_its_weights(config):
    net = randomised(build({"type": "unet", **config}, kind="network")).train()
    x, c_noise, cond = inputs(net)
    out = net(x, c_noise, cond)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_new_network_says_zero():
    net = UNet(**TEXT)
    assert (net(*inputs(net)) == 0).all()


def test_every_condition_changes_the_output_of_its_own_row_only():
    net = randomised(UNet(**TEXT | dict(num_classes="sequential", vector_dim=5, in_channels=6, guidance_dim=8)))
    tensors = {
        "cross_attention": draw(2, 7, 12, seed=2), "vector": draw(2, 5, seed=3), "concat": draw(2, 2, 8, 8, seed=4),
        "guidance": torch.tensor([7.5, 2.0]),
    }  # fmt: skip
    x, c_noise = draw(2, 4, 8, 8), torch.tensor([3.0, 741.0])
    with torch.no_grad():
        before = net(x, c_noise, Conditioning(tensors))
        for name, value in tensors.items():
            changed = torch.stack([value[0], value[1] + 1])
            after = net(x, c_noise, Conditioning(tensors | {name: changed}))
            assert (after[0] - before[0]).abs().max() < 1e-6 < 1e-3 < (after[1] - before[1]).abs().max()


def test_masked_tokens_do_not_count():
    net = randomised(UNet(**TEXT))
    x, c_noise, cond = inputs(net)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    other = cond["cross_attention"].masked_fill(~mask[..., None], 100.0)
    with torch.no_grad():
        masked = net(x, c_noise, cond.with_(masks={"cross_attention": mask}))
        elsewhere = net(x, c_noise, Conditioning({"cross_attention": other}, {"cross_attention": mask}))
        short = net(x[1:], c_noise[1:], Conditioning({"cross_attention": cond["cross_attention"][1:, :4]}))
    assert torch.equal(masked, elsewhere)
    assert (masked[1:] - short).abs().max() < 1e-5


@pytest.mark.parametrize("config", [PLAIN | dict(attention_factors=(1, 2)), TEXT])
def test_every_attention_backend_gives_the_same_output(config):
    net = randomised(UNet(**config))
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        expected = net(x, c_noise, cond)
        for backend in ("math", "flash"):
            with use_backend(backend):
                assert (net(x, c_noise, cond) - expected).abs().max() < 1e-5
    built = randomised(UNet(**config, attention_backend="math"))
    assert (built(x, c_noise, cond) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("config", [PLAIN | dict(attention_factors=(1, 2), num_classes=5), TEXT])
def test_checkpointing_changes_no_gradient(config):
    plain, lean = (randomised(UNet(**config, checkpointing=flag)) for flag in (False, True))
    kept = []
    for net in (plain, lean):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = net(*inputs(net)).square().mean()
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < kept[0]
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), lean.parameters(), strict=True))


@pytest.mark.parametrize("config", [PLAIN, TEXT | dict(num_classes="sequential", vector_dim=5)])
def test_bfloat16_is_near_float32(config):
    net = randomised(UNet(**config))
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        exact = net(x, c_noise, cond)
        half = net.bfloat16()(x.bfloat16(), c_noise, cond.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert (half - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow  # of each network one is traced in test_every_network.py, with its backward pass
@pytest.mark.parametrize("config", [PLAIN | dict(num_classes=5), TEXT])
def test_one_graph_under_compile(config):
    net, counter = randomised(UNet(**config)), CompileCounter()
    x, c_noise, cond = inputs(net)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x, c_noise, cond), net(x, c_noise, cond))
    compiled(x + 1, c_noise + 1, cond)
    assert counter.frame_count == 1


def test_the_output_lies_in_memory_in_order():
    """A block that left its permuted layout behind would slow every later layer."""
    net = randomised(UNet(**TEXT))
    layouts = []
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(lambda _, args: layouts.append(args[0].is_contiguous()))
    net(*inputs(net))
    assert layouts and all(layouts)


# --- roles and errors ----------------------------------------------------------------------------


def test_attention_is_found_by_role():
    def roles(net):
        return {n: m.role for n, m in net.named_modules() if getattr(m, "role", "").endswith("_attention")}

    assert roles(UNet(**TEXT))["middle_block.1.transformer_blocks.0.attn1"] == "self_attention"
    assert roles(UNet(**TEXT))["middle_block.1.transformer_blocks.0.attn2"] == "cross_attention"
    assert roles(UNet(**PLAIN)) == {
        "input_blocks.3.1": "self_attention",
        "middle_block.1": "self_attention",
        "output_blocks.0.1": "self_attention",
        "output_blocks.1.1": "self_attention",
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(channels=40), "multiple of norm_groups=32, got 40"),
        (dict(num_heads=2), "num_heads or head_dim, one of them; got 2 and 16"),
        (dict(head_dim=None), "got None and None"),
        (dict(head_dim=24), "head_dim=24 does not divide the width 64 at downsampling factor 2"),
        (dict(attention_factors=(4,)), r"attention_factors has 4, but the levels downsample by \[1, 2\]"),
        (dict(num_res_blocks=(1, 1, 1)), "num_res_blocks has 3 values for 2 levels"),
        (dict(num_classes="sequential"), "go together"),
        (dict(vector_dim=5), "go together"),
        (dict(linear_projection=True), "Give context_dim"),
        (dict(transformer_depth=(1, 2)), "Give context_dim"),
    ],
)
def test_what_cannot_be_built_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**PLAIN | change)


def test_unknown_keywords_are_errors():
    with pytest.raises(TypeError, match="use_spatial_transformer"):
        UNet(**PLAIN, use_spatial_transformer=True)
    with pytest.raises(ConfigError, match="Did you mean 'channel_mult'"):
        build({"type": "unet", **PLAIN, "channels_mult": [1]}, kind="network")


@pytest.mark.parametrize(
    "config, cond, message",
    [
        (PLAIN, {"vector": draw(2, 5)}, "'vector', for which it must be built with num_classes='sequential'"),
        (PLAIN, {"fps": draw(2)}, "takes no condition 'fps'. This one takes: concat"),
        (PLAIN, {"concat": draw(2, 1, 8, 8)}, r"'concat' \(1 channels\) to be \(B, 4, H, W\), got \(2, 5, 8, 8\)"),
        (TEXT, {}, "'cross_attention' is missing, .* built with context_dim. It got: none"),
        (PLAIN | dict(num_classes=3), None, "'label' is missing"),
        (PLAIN | dict(num_classes="sequential", vector_dim=5), None, "'vector' is missing"),
    ],
)
def test_conditions_that_do_not_fit_are_errors(config, cond, message):
    net = UNet(**config)
    with pytest.raises(ValueError, match=message):
        net(draw(2, 4, 8, 8), torch.zeros(2), None if cond is None else Conditioning(cond))


def test_sizes_that_do_not_fit_are_errors():
    net = UNet(**PLAIN | dict(channel_mult=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(8, 7\); the nearest is \(8, 8\)"):
        net(draw(2, 4, 8, 7), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\), got \(2, 3, 8, 8\)"):
        net(draw(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="one number per row"):
        net(draw(2, 4, 8, 8), torch.zeros(()))


def test_a_vector_of_another_width_is_named():
    net = UNet(1, 1, 16, (1,), 1, (), num_heads=1, num_classes="sequential", vector_dim=8, norm_groups=8)
    with pytest.raises(ValueError, match=r"vector_dim is 8, .* are \(6,\) wide"):
        net(torch.zeros(2, 1, 4, 4), torch.zeros(2), Conditioning({"vector": torch.zeros(2, 6)}))
