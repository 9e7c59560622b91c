"""ControlNet in the layouts it is published in, and on videos: the numbers of diffusers, and the sums by hand."""

import pytest
import torch
from peers import peer
from torch import nn
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints import (
    KeyMapError,
    WeightFileError,
    convert_checkpoint,
    open_weights,
    read_weights,
    recognise,
    save_weights,
)
from vdiff.hooks import PORT, routed
from vdiff.mixins import ControlNet
from vdiff.networks import LVDMUNet, UNet, VideoUNet, sinusoidal
from vdiff.process import Conditioning

SD15 = dict(in_channels=4, out_channels=4, channels=320, num_heads=8, context_dim=768)
SVD = dict(
    in_channels=8, out_channels=4, channels=320, context_dim=1024, head_dim=64, num_classes="sequential", vector_dim=768
)  # fmt: skip
SMALL = dict(in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), context_dim=16)
DOWN, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {DOWN: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}

# Networks of each Stable Diffusion, and the same in diffusers.
STYLES = {
    "sd1": (
        dict(num_res_blocks=1, attention_factors=(1,), num_heads=4),
        dict(down_block_types=(DOWN, PLAIN), layers_per_block=1, attention_head_dim=4),
    ),
    "sd2": (
        dict(num_res_blocks=2, attention_factors=(1, 2), head_dim=16, linear_projection=True),
        dict(
            down_block_types=(DOWN, DOWN), layers_per_block=2, attention_head_dim=(2, 4), use_linear_projection=True
        ),
    ),
    "sdxl": (
        dict(
            num_res_blocks=1, attention_factors=(2,), transformer_depth=(1, 2), head_dim=16, linear_projection=True,
            num_classes="sequential", vector_dim=64,
        ),
        dict(
            down_block_types=(PLAIN, DOWN), layers_per_block=1, attention_head_dim=(2, 4), use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
    ),
}  # fmt: skip
VIDEO = SMALL | dict(
    in_channels=8, num_res_blocks=1, attention_factors=(1,), head_dim=16, num_classes="sequential", vector_dim=24
)
TINY = dict(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,), head_dim=8, norm_groups=4, context_dim=6
)
FRAMES = 3


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(thing, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in thing.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return thing


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def copied(control):
    """The copy of the network."""
    return control._sites[""][1].control_model


def host_weights(net):
    return {name: value for name, value in net.state_dict().items() if PORT not in name}


@pytest.fixture
def sinusoids_in_float64(monkeypatch):
    """Theirs are float32 whatever else is."""
    embeddings = peer("diffusers.models.embeddings")
    monkeypatch.setattr(embeddings, "get_timestep_embedding", lambda t, dim, **_: sinusoidal(t.double(), dim))


# --- the numbers of diffusers --------------------------------------------------------------------


def theirs_of(net, control, style, tmp_path):
    """UNet and ControlNet of diffusers with our weights, which they read from files in their layout."""
    diffusers, twin = peer("diffusers"), STYLES[style][1]
    common = dict(block_out_channels=(32, 64), cross_attention_dim=16) | twin
    ups = tuple(UP[kind] for kind in reversed(twin["down_block_types"]))
    base = diffusers.UNet2DConditionModel(sample_size=8, up_block_types=ups, **common).eval()
    save_weights(tmp_path / "unet.safetensors", host_weights(net))
    convert_checkpoint(open_weights(tmp_path / "unet.safetensors"), tmp_path / "theirs.safetensors", "diffusers")
    base.load_state_dict(read_weights(tmp_path / "theirs.safetensors"))
    theirs = diffusers.ControlNetModel(**common).eval()
    control.write(tmp_path / "control.safetensors", "diffusers")
    theirs.load_state_dict(read_weights(tmp_path / "control.safetensors"))
    return base, theirs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_numbers_as_diffusers(style, dtype, tolerance, tmp_path, request):
    net = randomised(UNet(**SMALL | STYLES[style][0])).eval()
    control = randomised(ControlNet(scale=0.75).attach(net), seed=2)
    base, theirs = theirs_of(net, control, style, tmp_path)
    if dtype is torch.float64:
        request.getfixturevalue("sinusoids_in_float64")
    for model in (net, base, theirs):
        model.to(dtype)
    x, c_noise = draw(2, 4, 8, 8, dtype=dtype), torch.tensor([3.0, 741.0], dtype=dtype)
    context, hint, added = draw(2, 7, 16, seed=2, dtype=dtype), draw(2, 3, 64, 64, seed=3, dtype=dtype), None
    cond = {"cross_attention": context, "controlnet": hint}
    if style == "sdxl":
        added = {"text_embeds": draw(2, 16, seed=4, dtype=dtype), "time_ids": torch.arange(12.0).reshape(2, 6) * 100}
        numbers = theirs.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
        cond["vector"] = torch.cat([added["text_embeds"], numbers], dim=1)
    call = dict(added_cond_kwargs=added, return_dict=False)
    with torch.no_grad():
        down, mid = theirs(x, c_noise, context, hint, conditioning_scale=0.75, **call)
        extra = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        (expected,) = base(x, c_noise, context, **extra, **call)
        assert (expected - base(x, c_noise, context, **call)[0]).abs().max() > 0.1
        assert (difference := (net(x, c_noise, Conditioning(cond)) - expected).abs().max()) < tolerance, difference


class Controlled:
    """diffusers' UNet of videos with a ControlNet from hooks alone; there is no such class there.

    The names within are svd-temporal-controlnet's, whose file holds them all: a UNet without its way up, and
    ``controlnet_*``.
    """

    def __init__(self, base, weights, dtype):
        self.base, self.said = base, {}
        self.copy = type(base).from_config(base.config).eval()
        for name, module in self.copy.named_modules():
            if isinstance(module, nn.GroupNorm) and "resnets" in name:
                module.eps = 1e-5
        own = {name: value for name, value in weights.items() if not name.startswith("controlnet_")}
        missing, unexpected = self.copy.load_state_dict(own, strict=False)
        assert not unexpected and all(
            name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in missing
        )
        self.copy.to(dtype)
        embed = peer("diffusers.models.controlnets.controlnet").ControlNetConditioningEmbedding(32)
        embed.load_state_dict(self._below("controlnet_cond_embedding.", weights))
        self.embed = embed.to(dtype)
        count = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("controlnet_down_blocks."))
        self.zeros = [self._conv(f"controlnet_down_blocks.{i}.", weights, dtype) for i in range(count)]
        self.zero_mid = self._conv("controlnet_mid_block.", weights, dtype)

    @staticmethod
    def _below(begin, weights):
        return {name.removeprefix(begin): value for name, value in weights.items() if name.startswith(begin)}

    def _conv(self, begin, weights, dtype):
        own = self._below(begin, weights)
        conv = nn.Conv2d(*own["weight"].shape[1::-1], 1)
        conv.load_state_dict(own)
        return conv.to(dtype)

    def __call__(self, hint, *inputs):
        hint = torch.cat([self.embed(frame) for video in hint.transpose(1, 2) for frame in video[:, None]])
        outs = []

        def first(module, args, out):
            outs.append(out + hint)
            return outs[0]

        hooks = [self.copy.conv_in.register_forward_hook(first)]
        hooks += [b.register_forward_hook(lambda m, a, out: outs.extend(out[1])) for b in self.copy.down_blocks]
        hooks += [self.copy.mid_block.register_forward_hook(lambda m, a, out: outs.append(out))]
        self.copy(*inputs)
        said = [zero(out) for zero, out in zip([*self.zeros, self.zero_mid], outs, strict=True)]
        mid = said.pop()

        def adds(module, args, kwargs):
            skips = kwargs["res_hidden_states_tuple"]
            added = [said.pop() for _ in skips][::-1]
            return args, kwargs | {"res_hidden_states_tuple": tuple(a + b for a, b in zip(skips, added, strict=True))}

        hooks += [b.register_forward_pre_hook(adds, with_kwargs=True) for b in self.base.up_blocks]
        hooks += [self.base.mid_block.register_forward_hook(lambda m, a, out: out + mid)]
        out = self.base(*inputs).sample
        for hook in hooks:
            hook.remove()
        return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_numbers_as_a_video_network_of_diffusers_with_hooks(dtype, tolerance, tmp_path, sinusoids_in_float64):
    net = randomised(VideoUNet(**VIDEO)).eval()
    base = peer("diffusers").UNetSpatioTemporalConditionModel(
        in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ).eval()  # fmt: skip
    save_weights(tmp_path / "unet.safetensors", net.state_dict())
    convert_checkpoint(open_weights(tmp_path / "unet.safetensors"), tmp_path / "base.safetensors", "diffusers")
    base.load_state_dict(read_weights(tmp_path / "base.safetensors"))
    for name, module in base.named_modules():  # generative-models has one epsilon for all
        if isinstance(module, nn.GroupNorm) and "resnets" in name:
            module.eps = 1e-5
    control = randomised(ControlNet().attach(net), seed=2)
    control.write(tmp_path / "control.safetensors", "diffusers")
    theirs = Controlled(base, read_weights(tmp_path / "control.safetensors"), dtype)
    net.to(dtype), base.to(dtype)
    x, hint = draw(2, 8, FRAMES, 4, 4, dtype=dtype), draw(2, 3, FRAMES, 32, 32, seed=3, dtype=dtype)
    c_noise, numbers = torch.tensor([0.3, -1.1], dtype=dtype), torch.tensor([[6.0, 127, 0.02], [9.0, 40, 0.1]])
    cond = {"cross_attention": draw(2, 5, 16, seed=2, dtype=dtype)}
    cond["vector"] = sinusoidal(numbers.to(dtype), 8).flatten(1)
    video = (x.transpose(1, 2), c_noise, cond["cross_attention"], numbers.to(dtype))
    with torch.no_grad():
        expected = theirs(hint, *video).transpose(1, 2)
        assert (expected - base(*video).sample.transpose(1, 2)).abs().max() > 0.1
        said = net(x, c_noise, Conditioning({**cond, "controlnet": hint}))
    assert (difference := (said - expected).abs().max()) < tolerance, difference


# --- layouts -------------------------------------------------------------------------------------


def test_stable_diffusion_15s_has_its_published_parameters():
    with torch.device("meta"):
        control = ControlNet().attach(UNet(**SD15))
    assert sum(p.numel() for p in control.parameters()) == 361_279_120


@pytest.mark.parametrize(
    "config, twin",
    [
        (SD15, dict(cross_attention_dim=768)),
        (
            dict(
                in_channels=4, out_channels=4, channels=320, channel_mult=(1, 2, 4), attention_factors=(2, 4),
                head_dim=64, transformer_depth=(1, 2, 10), context_dim=2048, linear_projection=True,
                num_classes="sequential", vector_dim=2816,
            ),
            dict(
                block_out_channels=(320, 640, 1280), down_block_types=(PLAIN, DOWN, DOWN), cross_attention_dim=2048,
                transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        ),
    ],
)  # fmt: skip
def test_the_published_sizes_have_every_name_of_diffusers(config, twin, tmp_path):
    diffusers = peer("diffusers")
    with torch.device("meta"):
        control = ControlNet().attach(UNet(**config))
        theirs = diffusers.ControlNetModel(**twin)
    assert shapes(in_diffusers(control)) == shapes(theirs.state_dict())


def in_diffusers(control):
    """Without a file, which the meta device has none for."""
    (part,) = recognise(control.state_dict()).parts
    from vdiff.checkpoints.architecture import Told

    ours = {name: control.state_dict()[full] for name, full in part.names.items()}
    return part.family.layout("diffusers").table(Told(ours))(ours)


def test_that_of_stable_video_diffusion_is_its_network_without_the_way_up():
    """682,021,537: the way down and middle as diffusers counts them, the hint's encoder, and convolutions of size 1."""
    diffusers = peer("diffusers")
    with torch.device("meta"):
        control = ControlNet().attach(VideoUNet(**SVD))
        unet = diffusers.UNetSpatioTemporalConditionModel()
        embed = diffusers.ControlNetModel(cross_attention_dim=8).controlnet_cond_embedding
    theirs = {n: v for n, v in unet.state_dict().items() if not n.startswith(("up_", "conv_norm_out", "conv_out"))}
    theirs |= {f"controlnet_cond_embedding.{name}": value for name, value in embed.state_dict().items()}
    widths = [320] * 4 + [640] * 3 + [1280] * 5
    for i, width in enumerate(widths):
        theirs |= {
            f"controlnet_down_blocks.{i}.{n}": v
            for n, v in nn.Conv2d(width, width, 1, device="meta").state_dict().items()
        }
    theirs |= {f"controlnet_mid_block.{n}": v for n, v in nn.Conv2d(1280, 1280, 1, device="meta").state_dict().items()}
    assert shapes(in_diffusers(control)) == shapes(theirs)
    assert sum(value.numel() for value in theirs.values()) == 682_021_537
    assert sum(p.numel() for p in control.parameters()) == 682_021_537


HOSTS = {
    "sd1": lambda: UNet(**SMALL | STYLES["sd1"][0]),
    "sdxl": lambda: UNet(**SMALL | STYLES["sdxl"][0]),
    "svd": lambda: VideoUNet(**VIDEO),
}


@pytest.mark.parametrize("host", HOSTS)
def test_files_go_from_layout_to_layout_bit_for_bit(host, tmp_path):
    control = randomised(ControlNet().attach(HOSTS[host]()))
    weights = control.state_dict()
    control.write(tmp_path / "authors.safetensors")
    control.write(tmp_path / "diffusers.safetensors", "diffusers")
    assert same(read_weights(tmp_path / "authors.safetensors"), weights)
    names = set(read_weights(tmp_path / "diffusers.safetensors"))
    assert {"controlnet_cond_embedding.blocks.5.bias", "controlnet_mid_block.weight", "conv_in.weight"} <= names
    for layout in ("authors", "diffusers"):
        again = ControlNet()
        again.read(tmp_path / f"{layout}.safetensors")
        assert same(again.state_dict(), weights)
        again.attach(HOSTS[host]())
        again.write(tmp_path / "back.safetensors", "diffusers")
        assert same(*(read_weights(tmp_path / f"{name}.safetensors") for name in ("back", "diffusers")))


def test_one_is_found_beside_a_whole_models_weights(tmp_path):
    net = UNet(**SMALL | STYLES["sd1"][0])
    weights = ControlNet().attach(net).state_dict()
    whole = {f"model.diffusion_model.{name}": value for name, value in host_weights(net).items()} | weights
    save_weights(tmp_path / "whole.safetensors", whole | {"cond_stage_model.x": torch.zeros(1)})
    found = recognise(open_weights(tmp_path / "whole.safetensors").header)
    assert [(part.family.name, part.layout) for part in found.parts] == [("unet", "sgm"), ("controlnet", "sgm")]
    convert_checkpoint(
        open_weights(tmp_path / "whole.safetensors"), tmp_path / "pipeline", "diffusers", parts=["unet", "controlnet"]
    )
    torch.save({"state_dict": whole}, tmp_path / "whole.ckpt")
    bare = {name.removeprefix("control_model."): value for name, value in weights.items()}
    save_weights(tmp_path / "bare.safetensors", bare)
    for file in ("whole.safetensors", "whole.ckpt", "bare.safetensors", "pipeline"):
        control = ControlNet()
        control.read(tmp_path / file)
        assert same(control.state_dict(), weights)


def test_what_is_strange_or_missing_is_named_and_changes_nothing(tmp_path):
    control = ControlNet().attach(HOSTS["sd1"]())
    control.write(tmp_path / "theirs.safetensors", "diffusers")
    control.write(tmp_path / "ours.safetensors")
    before = {name: value.clone() for name, value in control.state_dict().items()}
    theirs, ours = (read_weights(tmp_path / f"{name}.safetensors") for name in ("theirs", "ours"))

    def refused(weights, error, match, **arguments):
        save_weights(tmp_path / "bad.safetensors", weights)
        one = ControlNet(**arguments) if arguments else control
        with pytest.raises(error, match=match):
            one.read(tmp_path / "bad.safetensors")
        assert same(control.state_dict(), before)

    zeros = torch.zeros(1)
    refused(theirs | {"conv_out.weight": zeros}, KeyMapError, r"bad.safetensors \(controlnet\).*no conv_out.weight")
    lacking = {name: value for name, value in theirs.items() if name != "controlnet_down_blocks.2.bias"}
    refused(lacking, ValueError, "control_model.zero_convs.2.0.bias is missing")
    refused(ours | {"control_model.odd": zeros}, ValueError, "control_model.odd belongs to no site")
    nan = {name: value * torch.nan for name, value in theirs.items()}
    refused(nan, ValueError, "not finite")
    refused(host_weights(HOSTS["sd1"]()), WeightFileError, "holds no ControlNet; looked for control_model.input_hint")
    wide = ControlNet().attach(UNet(**SMALL | STYLES["sd1"][0] | dict(channels=64)))
    refused(wide.state_dict(), ValueError, r"time_embed.0.weight is \(256, 64\), here \(128, 32\)")
    refused(theirs, ValueError, "a hint is 8 times as large as x, and hint_factor is 1", hint_factor=1)
    film = ControlNet().attach(HOSTS["svd"]())
    refused(film.state_dict(), ValueError, "belongs to no site")
    with pytest.raises(ValueError, match="not written in the layout 'sat'. Known: vdiff, ldm, sgm, diffusers"):
        control.write(tmp_path / "x.safetensors", "sat")
    with pytest.raises(ValueError, match="hint_factor is 2"):
        ControlNet(hint_factor=2).attach(HOSTS["sd1"]()).write(tmp_path / "x.safetensors", "diffusers")
    views = ControlNet().attach(VideoUNet(4, 4, **TINY, motion_context_dim=4))
    with pytest.raises(ValueError, match="sv4d_controlnet is not written in the layout 'diffusers'"):
        views.write(tmp_path / "x.safetensors", "diffusers")
    plain = ControlNet().attach(UNet(4, 4, **{k: v for k, v in TINY.items() if k != "context_dim"}))
    with pytest.raises(KeyMapError, match="no attention without a context"):
        plain.write(tmp_path / "x.safetensors", "diffusers")
    for way in (dict(resblock_updown=True), dict(resample_by_conv=False)):
        with pytest.raises(ValueError, match="Nothing tells where a level ends among input_blocks"):
            ControlNet().attach(UNet(4, 4, **TINY, **way)).write(tmp_path / "x.safetensors", "diffusers")
    assert not (tmp_path / "x.safetensors").exists()


# --- videos --------------------------------------------------------------------------------------


def film(kind, rows=2):
    """A network of videos, and what it is asked."""
    if kind == "crafter":
        net = LVDMUNet(4, 4, **TINY, fps=True)
    else:
        more = dict(num_classes="sequential", vector_dim=5) if kind == "frames" else {}
        more |= dict(motion_context_dim=4) if kind == "views" else {}
        net = VideoUNet(4, 4, **TINY, **more)
    frames = 4 if kind == "views" else FRAMES
    cond = {
        "plain": {}, "images": {"image_only": torch.tensor([[0.0, 1, 0], [1, 1, 1]])},
        "frames": {"vector": draw(rows, frames, 5, seed=4)}, "crafter": {"fps": torch.tensor([8.0, 24.0])},
        "views": {"views": draw(rows, 4, 2, 8, 8, seed=5)},
    }[kind]  # fmt: skip
    cond = {name: value[:rows] for name, value in cond.items()} | {"cross_attention": draw(rows, 5, 6, seed=2)}
    c_noise = draw(rows, frames, seed=6) if kind == "frames" else torch.tensor([0.3, -1.1])[:rows]
    hint = draw(rows, 2, frames, 16, 16, seed=3)
    return randomised(net).eval(), draw(rows, 4, frames, 8, 8), c_noise, cond, hint


KINDS = pytest.mark.parametrize("kind", ["plain", "images", "frames", "views", "crafter"])


def by_hand(net, copy, x, c_noise, cond, hint, scale=1.0):
    """What the host says with what a copy says added to its skips and to its middle."""
    num_rows, _, frames, *_ = x.shape
    rows = [copy.input_hint_block(hint[row, :, frame][None]) for row in range(num_rows) for frame in range(frames)]
    h, told = copy.begin(x, c_noise, cond)
    h = h + torch.cat(rows)
    added = [copy.zero_convs[0](h)]
    for block, zero in zip(list(copy.input_blocks)[1:], list(copy.zero_convs)[1:], strict=True):
        h = block(h, *told)
        added.append(zero(h))
    middle = copy.middle_block_out(copy.middle_block(h, *told))
    h, told = net.begin(x, c_noise, cond)
    skips = [h]
    for block in list(net.input_blocks)[1:]:
        h = block(h, *told)
        skips.append(h)
    h = net.middle_block(h, *told) + scale * middle
    for block in net.output_blocks:
        h = block(torch.cat([h, skips.pop() + scale * added.pop()], dim=1), *told)
    return net.out(h).unflatten(0, (num_rows, frames)).transpose(1, 2)


@KINDS
def test_what_is_said_of_each_frame_is_added_to_its_skips_and_middle(kind):
    net, x, c_noise, cond, hint = film(kind)
    control = randomised(ControlNet(hint_channels=2, hint_factor=2, scale=0.6).attach(net), seed=7)
    copy = copied(control)
    with torch.no_grad():
        said = net(x, c_noise, Conditioning({**cond, "controlnet": hint}))
        with control.disabled():
            expected = by_hand(net, copy, x, c_noise, Conditioning(cond), hint, 0.6)
            assert (expected - net(x, c_noise, Conditioning(cond))).abs().max() > 0.1
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)


@KINDS
def test_a_new_one_changes_nothing_and_comes_off_bit_for_bit(kind):
    net, x, c_noise, cond, hint = film(kind)
    plain, names = net(x, c_noise, Conditioning(cond)), list(net.state_dict())
    control = ControlNet(hint_channels=2, hint_factor=2).attach(net)
    assert torch.equal(net(x, c_noise, Conditioning({**cond, "controlnet": hint})), plain)
    randomised(control)
    assert not torch.allclose(net(x, c_noise, Conditioning({**cond, "controlnet": hint})), plain, atol=1e-2)
    control.detach()
    assert list(net.state_dict()) == names and torch.equal(net(x, c_noise, Conditioning(cond)), plain)


def test_it_is_of_the_hosts_type():
    net, x, c_noise, cond, hint = film("frames")
    control = ControlNet(hint_channels=2, hint_factor=2).attach(net.bfloat16())
    assert {p.dtype for p in control.parameters()} == {torch.bfloat16}
    cond = {name: value.bfloat16() for name, value in cond.items()}
    said = net(x.bfloat16(), c_noise, Conditioning({**cond, "controlnet": hint}))  # a hint comes as it is
    control.detach()
    assert torch.equal(said, net(x.bfloat16(), c_noise, Conditioning(cond)))


def test_training_begins_at_the_convolutions_and_reaches_all_of_the_copy():
    net, x, c_noise, cond, hint = film("frames")
    net.requires_grad_(False)
    control = ControlNet(hint_channels=2, hint_factor=2).attach(net)
    given = Conditioning({**cond, "controlnet": hint})

    def reached():
        """Names of its parameters with a gradient that is not zero."""
        for parameter in control.parameters():
            parameter.grad = None
        net(x, c_noise, given).square().sum().backward()
        return {name for name, p in control.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    own = {name for name, _ in control.named_parameters()}
    zeros = {name for name in own if ".zero_convs." in name or ".middle_block_out." in name}
    assert reached() == zeros
    randomised(control)
    assert own - reached() == set() and all(p.grad is None for n, p in net.named_parameters() if PORT not in n)


def test_frames_have_hints_of_their_own_and_one_hint_is_for_all():
    net, x, c_noise, cond, hint = film("images")
    randomised(ControlNet(hint_channels=2, hint_factor=2).attach(net))
    ask = lambda hint: net(x, c_noise, Conditioning({**cond, "controlnet": hint}))  # noqa: E731
    said, changed = ask(hint), hint.clone()
    changed[1, :, 2] += 1
    differs = (ask(changed) - said).abs().amax((1, 3, 4)) > 0
    assert differs.tolist() == [[False] * 3, [False, False, True]]  # the second row's frames are images
    still = hint[:, :, 0]
    torch.testing.assert_close(ask(still), ask(still[:, :, None].expand_as(hint)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"for \(3, 8, 8\) is \(B, 2, 3, 16, 16\) or \(B, 2, 16, 16\), got \(2, 2, 2,"):
        ask(hint[:, :, :2])


def test_gates_are_for_videos_not_for_frames():
    net, x, c_noise, cond, hint = film("plain")
    control = randomised(ControlNet(hint_channels=2, hint_factor=2).attach(net))
    given = Conditioning({**cond, "controlnet": hint}).gated(controlnet=torch.tensor([1.0, 0.0]))
    both = net(x, c_noise, Conditioning({**cond, "controlnet": hint}))
    with control.disabled():
        neither = net(x, c_noise, Conditioning(cond))
    with routed(net, given):
        torch.testing.assert_close(net(x, c_noise, given), torch.stack([both[0], neither[1]]), rtol=0, atol=1e-5)


def test_guess_mode_grows_tenfold_from_the_first_skip_to_the_middle_and_pooling_is_by_frame():
    net, x, c_noise, cond, hint = film("plain")
    control = randomised(ControlNet(hint_channels=2, hint_factor=2, guess=True, pool=True).attach(net))
    part = control._sites[""][1]
    amounts = torch.tensor([hand.unit for hand in part.hands])
    torch.testing.assert_close(amounts, torch.logspace(-1, 0, len(part.hands)), rtol=1e-6, atol=0)
    said = part.said(hint, x, c_noise, Conditioning(cond))
    assert {tuple(one.shape[i] for i in (0, 2, 3)) for one in said} == {(2 * FRAMES, 1, 1)}
    assert net(x, c_noise, Conditioning({**cond, "controlnet": hint})).isfinite().all()


def test_one_graph_with_a_video_whatever_the_scale():
    _, x, c_noise, cond, hint = film("frames")
    one_level = TINY | dict(channel_mult=(1,), attention_factors=(), num_classes="sequential", vector_dim=5)
    net = randomised(VideoUNet(4, 4, **one_level)).eval()
    control = randomised(ControlNet(hint_channels=2, hint_factor=2).attach(net))
    inputs, counter = (x, c_noise, Conditioning({**cond, "controlnet": hint})), CompileCounter()
    with torch.no_grad():
        # Hooks of the outermost module are compiled with it only where something is around them, as a denoiser is.
        compiled = torch.compile(lambda *inputs: net(*inputs), backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), net(*inputs))
        with control.scaled(0.3):
            torch.testing.assert_close(compiled(*inputs), net(*inputs))
    assert counter.frame_count == 1


def test_other_hosts_are_refused():
    with pytest.raises(ValueError, match="a UNet with dims=3; it goes on those of pictures or frames, dims=2"):
        ControlNet().attach(UNet(4, 4, **TINY, dims=3, linear_projection=True))
