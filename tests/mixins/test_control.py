"""Control by hints and pictures: the numbers of diffusers on the same weights, and the sums written out by hand."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.checkpoints.maps.unet import unet as names
from vdiff.hooks import PORT, routed
from vdiff.mixins import ControlNet, IPAdapter, LoRA, T2IAdapter, load_mixin
from vdiff.networks import DiT, UNet
from vdiff.networks.transformer import CrossAttention
from vdiff.process import Conditioning

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
from test_unet import FIRST, TWIN  # noqa: E402

CONFIG = dict(attention_factors=(1,), num_heads=4, context_dim=16)
TABLE = names(1, (True, False))  # of a UNet like that, to those of diffusers


def stirred(module, std=0.1):
    for parameter in module.parameters():
        if not parameter.any() or parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
    return module


def unet(**changes):
    return stirred(UNet(4, 4, 32, (1, 2), 1, **CONFIG | changes)).eval()


def small(**changes):
    size = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,), num_heads=2, norm_groups=4)
    return stirred(UNet(1, 1, context_dim=6, **size | changes), 0.3).eval()


def inputs(rows=2, channels=4, width=16, size=8):
    return torch.randn(rows, channels, size, size), torch.tensor([3.0, 741.0])[:rows], torch.randn(rows, 7, width)


def little(rows=2, **conds):
    x, c_noise, text = inputs(rows, 1, 6)
    return x, c_noise, Conditioning({"cross_attention": text, **conds})


# ControlNet ---------------------------------------------------------------------------------------


def controls_of_diffusers(weights):
    """Weights of ours under the names of diffusers' ControlNetModel."""
    out, copied = {}, {}
    for name, value in weights.items():
        name = name.removeprefix("control_model.")
        hint = re.fullmatch(r"input_hint_block\.(\d+)\.(.*)", name)
        if hint:
            place = int(hint[1]) // 2
            where = "conv_in" if place == 0 else "conv_out" if place == 7 else f"blocks.{place - 1}"
            out[f"controlnet_cond_embedding.{where}.{hint[2]}"] = value
        elif name.startswith("zero_convs"):
            out[re.sub(r"zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", name)] = value
        elif name.startswith("middle_block_out"):
            out[name.replace("middle_block_out.0", "controlnet_mid_block")] = value
        else:
            copied[name] = value
    return out | TABLE(copied)


@pytest.mark.parametrize("guess", [False, True])
def test_controlnet_says_what_diffusers_says(guess):
    diffusers = peer("diffusers")
    net, (x, c_noise, text) = unet(), inputs()
    hint = torch.rand(2, 3, 64, 64)
    control = ControlNet(guess=guess, scale=0.7).attach(net)
    for parameter in control.parameters():
        nn.init.normal_(parameter, std=0.05)
    twin = TWIN | FIRST | dict(attention_head_dim=4)
    base = diffusers.UNet2DConditionModel(**twin).eval()
    plain = unet()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if PORT not in k})
    base.load_state_dict(TABLE(plain.state_dict()))
    config = {k: v for k, v in twin.items() if k not in ("sample_size", "up_block_types")}
    theirs = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32, 96, 256)).eval()
    theirs.load_state_dict(controls_of_diffusers(control.state_dict()))
    with torch.no_grad():
        down, mid = theirs(x, c_noise, text, hint, conditioning_scale=0.7, guess_mode=guess, return_dict=False)
        want = base(x, c_noise, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        ours = net(x, c_noise, Conditioning({"cross_attention": text, "controlnet": hint}))
        without = plain(x, c_noise, Conditioning({"cross_attention": text}))
    assert (want - without).abs().max() > 0.05
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_a_new_one_changes_nothing_and_a_published_file_fits_by_its_names(tmp_path):
    net, (x, c_noise, cond) = small(), little(controlnet=torch.rand(2, 3, 64, 64))
    plain = net(x, c_noise, Conditioning({"cross_attention": cond["cross_attention"]}))
    control = ControlNet().attach(net)
    assert torch.equal(net(x, c_noise, cond), plain)
    names = {name.removeprefix("control_model.") for name in control.state_dict()}
    encoder = {name for name in net.state_dict() if PORT not in name and not name.startswith(("output_blocks", "out."))}
    assert encoder <= names
    more = {"input_hint_block.14.weight", "zero_convs.0.0.weight", "zero_convs.3.0.bias", "middle_block_out.0.weight"}
    assert more <= names - encoder
    stirred(control)
    control.write(tmp_path / "control.safetensors")
    said = net(x, c_noise, cond)
    control.detach()
    whole = {"model.diffusion_model.out.0.weight": torch.ones(1), **read_weights(tmp_path / "control.safetensors")}
    bare = {k.removeprefix("control_model."): v for k, v in whole.items() if k.startswith("control_model.")}
    for i, weights in enumerate((whole, bare)):
        save_weights(tmp_path / f"{i}.safetensors", weights)
        again = ControlNet()
        again.read(tmp_path / f"{i}.safetensors")
        assert torch.equal(again.attach(net).host and net(x, c_noise, cond), said)
        again.detach()


def test_several_add_up_and_each_has_its_own_hint_scale_and_rows():
    net = small()
    x, c_noise, cond = little(edges=torch.rand(2, 1, 8, 8), depth=torch.rand(2, 3, 16, 16))
    edges = stirred(ControlNet(hint_channels=1, hint_factor=1).attach(net, name="edges"))
    stirred(ControlNet(hint_factor=2).attach(net, name="depth"))
    both = net(x, c_noise, cond)
    with edges.disabled():
        one = net(x, c_noise, cond)
    with edges.scaled(0.0):
        torch.testing.assert_close(net(x, c_noise, cond), one)
    assert (both - one).abs().max() > 1e-3
    with routed(net, gated := cond.gated(edges=torch.tensor([1.0, 0.0]))):
        rows = net(x, c_noise, gated)
    torch.testing.assert_close(rows, torch.stack([both[0], one[1]]))


def test_pooled_hints_are_the_same_everywhere():
    net, (x, c_noise, cond) = small(), little(controlnet=torch.rand(2, 3, 8, 8))
    control = stirred(ControlNet(hint_factor=1, pool=True).attach(net))
    (part,) = [part for _, part in control._sites.values()]
    assert {tuple(one.shape[2:]) for one in part.said(cond["controlnet"], x, c_noise, cond)} == {(1, 1)}
    assert net(x, c_noise, cond).isfinite().all()


def test_the_copy_is_of_the_host_alone():
    net = small()
    LoRA(rank=2).attach(net)
    control = ControlNet(hint_factor=1).attach(net)
    assert not any(PORT in name for name in control.state_dict())
    assert sum(len(m._forward_hooks) for m in control._sites[""][1].modules()) == 0


# T2I-Adapter --------------------------------------------------------------------------------------


def test_t2i_features_are_those_of_diffusers(tmp_path):
    diffusers = peer("diffusers")
    net, (x, c_noise, text) = unet(), inputs()
    plain = unet()
    plain.load_state_dict(net.state_dict())
    adapter, hint = T2IAdapter().attach(net), torch.rand(2, 3, 64, 64)
    theirs = diffusers.T2IAdapter(in_channels=3, channels=(32, 64), num_res_blocks=2, downscale_factor=8).eval()
    save_weights(tmp_path / "theirs.safetensors", theirs.state_dict())
    adapter.read(tmp_path / "theirs.safetensors")
    base = diffusers.UNet2DConditionModel(**TWIN | FIRST | dict(attention_head_dim=4)).eval()
    base.load_state_dict(TABLE(plain.state_dict()))
    with torch.no_grad():
        want = base(x, c_noise, text, down_intrablock_additional_residuals=theirs(hint)).sample
        ours = net(x, c_noise, Conditioning({"cross_attention": text, "t2i_adapter": hint}))
    assert (want - plain(x, c_noise, Conditioning({"cross_attention": text}))).abs().max() > 1e-2
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    adapter.write(tmp_path / "ours.safetensors")
    assert {"body.0.block1.weight", "body.2.in_conv.weight", "conv_in.bias"} <= set(
        read_weights(tmp_path / "ours.safetensors")
    )
    adapter.read(tmp_path / "ours.safetensors")


# IP-Adapter ---------------------------------------------------------------------------------------


def test_attention_to_a_picture_is_that_of_diffusers():
    processors = peer("diffusers.models.attention_processor")
    ours, x, text, tokens = (
        CrossAttention(32, 4, 8, 16),
        torch.randn(2, 9, 32),
        torch.randn(2, 7, 16),
        torch.randn(2, 4, 16),
    )
    theirs = processors.Attention(32, 16, heads=4, dim_head=8)
    theirs.load_state_dict(ours.state_dict())

    class Host(nn.Module):
        role = "network"

        def __init__(self):
            super().__init__()
            self.attn2 = ours

        def forward(self, x, c_noise, cond):
            return self.attn2(x, cond["cross_attention"])

    host = Host()
    ip = stirred(IPAdapter(embed_dim=None, on="", scale=0.6).attach(host))
    processor = processors.IPAdapterAttnProcessor2_0(32, 16, num_tokens=(4,), scale=0.6)
    layer = ip._sites[""][1].ip_adapter["1"]
    processor.load_state_dict({"to_k_ip.0.weight": layer.to_k_ip.weight, "to_v_ip.0.weight": layer.to_v_ip.weight})
    theirs.set_processor(processor)
    want = theirs(x, encoder_hidden_states=(text, [tokens]))
    cond = Conditioning({"cross_attention": text, "ip_adapter": tokens})
    torch.testing.assert_close(host(x, None, cond), want)


def test_a_whole_network_looks_at_a_picture_as_that_of_diffusers_does():
    diffusers, net, (x, c_noise, text) = peer("diffusers"), unet(), inputs()
    plain = copy.deepcopy(net)
    ip, picture = stirred(IPAdapter(embed_dim=12, num_tokens=4).attach(net), 0.3), torch.randn(2, 12)
    base = diffusers.UNet2DConditionModel(**TWIN | FIRST | dict(attention_head_dim=4)).eval()
    base.load_state_dict(TABLE(plain.state_dict()))
    groups = {"image_proj": {}, "ip_adapter": {}}
    for name, value in ip.state_dict().items():
        group, _, rest = name.partition(".")
        groups[group][rest] = value.clone()
    base._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    with torch.no_grad():
        want = base(x, c_noise, text, added_cond_kwargs={"image_embeds": [picture[:, None]]}).sample
        ours = net(x, c_noise, Conditioning({"cross_attention": text, "ip_adapter": picture}))
    assert (want - plain(x, c_noise, Conditioning({"cross_attention": text}))).abs().max() > 1e-3
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_the_numbers_of_stable_diffusion_are_those_of_published_files():
    with torch.device("meta"):
        net = UNet(4, 4, 320, num_heads=8, context_dim=768)
        ip = IPAdapter().attach(net)
    shapes = {name: tuple(value.shape) for name, value in ip.state_dict().items()}
    assert [n for n in range(40) if f"ip_adapter.{n}.to_k_ip.weight" in shapes] == list(range(1, 32, 2))
    first, last = shapes["ip_adapter.1.to_k_ip.weight"], shapes["ip_adapter.31.to_v_ip.weight"]
    assert (first, last, shapes["ip_adapter.29.to_k_ip.weight"]) == ((320, 768), (1280, 768), (320, 768))
    assert shapes["image_proj.proj.weight"] == (4 * 768, 1024)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_ip_files_are_read_flat_and_in_groups(ending, tmp_path):
    net, picture = small(), torch.randn(2, 12)
    x, c_noise, cond = little(ip_adapter=picture)
    ip = stirred(IPAdapter(embed_dim=12).attach(net))
    said, weights = net(x, c_noise, cond), ip.state_dict()
    file = tmp_path / f"ip.{ending}"
    if ending == "bin":
        cut = {
            g: {n.removeprefix(f"{g}."): v for n, v in weights.items() if n.startswith(g)}
            for g in ("image_proj", "ip_adapter")
        }
        torch.save(cut, file)
    else:
        ip.write(file)
    ip.detach()
    again = IPAdapter(embed_dim=12)
    again.read(file)
    again.attach(net)
    assert torch.equal(net(x, c_noise, cond), said)
    tokens = again._sites[""][1].image_proj(picture)
    again.detach()
    bare = IPAdapter(embed_dim=None)
    bare.read(file)
    bare.attach(net)
    told = Conditioning({"cross_attention": cond["cross_attention"], "ip_adapter": tokens})
    torch.testing.assert_close(net(x, c_noise, told), said)


PLUS = dict(embed_dim=12, num_tokens=5, resampler=dict(depth=4, num_heads=1))  # theirs: heads of 64, four layers


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_resampler_of_plus_is_that_of_diffusers(dtype, tolerance):
    diffusers = peer("diffusers")
    ip = stirred(IPAdapter(**PLUS).attach(net := unet()), 0.3)
    weights = {n.removeprefix("image_proj."): v for n, v in ip.state_dict().items() if n.startswith("image_proj.")}
    twin = diffusers.UNet2DConditionModel(**TWIN | FIRST | dict(attention_head_dim=4))
    theirs = twin._convert_ip_adapter_image_proj_to_diffusers(weights, low_cpu_mem_usage=False).to(dtype)
    tokens = torch.randn(2, 9, 12, dtype=dtype)
    with torch.no_grad():
        ours, want = net.to(dtype)._port["ip_adapter"].image_proj(tokens), theirs(tokens)
    assert ours.shape == (2, 5, 16) and ours.std() > 0.1
    assert (difference := (ours - want).abs().max()) < tolerance, difference


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_plus_is_read_and_written_whole_and_looks_as_in_diffusers(ending, tmp_path):
    diffusers, net, (x, c_noise, text) = peer("diffusers"), unet(), inputs()
    plain, seen = copy.deepcopy(net), torch.randn(2, 9, 12)
    ip = stirred(IPAdapter(**PLUS, scale=0.6).attach(net), 0.3)
    weights = {name: value.clone() for name, value in ip.state_dict().items()}
    groups = {"image_proj": {}, "ip_adapter": {}}
    for name, value in weights.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = value
    base = diffusers.UNet2DConditionModel(**TWIN | FIRST | dict(attention_head_dim=4)).eval()
    base.load_state_dict(TABLE(plain.state_dict()))
    base._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    for processor in base.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    told = Conditioning({"cross_attention": text, "ip_adapter": seen})
    with torch.no_grad():
        want = base(x, c_noise, text, added_cond_kwargs={"image_embeds": [seen[:, None]]}).sample
        ours = net(x, c_noise, told)
    assert (want - plain(x, c_noise, Conditioning({"cross_attention": text}))).abs().max() > 1e-3
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
    file = tmp_path / f"plus.{ending}"
    torch.save(groups, file) if ending == "bin" else ip.write(file)
    ip.detach()
    again = IPAdapter(**PLUS, scale=0.6)
    again.read(file)
    again.attach(net)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    assert torch.equal(net(x, c_noise, told), ours)


@pytest.mark.parametrize(
    "host, arguments, widths",
    [
        (dict(num_heads=8, context_dim=768), {}, (768, 768, 768)),
        (
            dict(
                channel_mult=(1, 2, 4), attention_factors=(2, 4), head_dim=64, transformer_depth=(1, 2, 10),
                linear_projection=True, context_dim=2048,
            ), dict(dim=1280, num_heads=20), (1280, 1280, 2048),
        ),
    ],
)  # fmt: skip
def test_plus_has_the_sizes_of_published_files(host, arguments, widths):
    """ip-adapter-plus of Stable Diffusion 1 and of SDXL, over the 1280 wide tokens of ViT-H."""
    with torch.device("meta"):
        ip = IPAdapter(embed_dim=1280, num_tokens=16, resampler=arguments).attach(UNet(4, 4, 320, **host))
    dim, inner, out = widths
    assert {
        "image_proj.latents": (1, 16, dim), "image_proj.proj_in.weight": (dim, 1280),
        "image_proj.layers.3.0.to_kv.weight": (2 * inner, dim), "image_proj.layers.3.1.1.weight": (4 * dim, dim),
        "image_proj.proj_out.weight": (out, dim), "image_proj.norm_out.bias": (out,),
    }.items() <= {name: tuple(value.shape) for name, value in ip.state_dict().items()}.items()  # fmt: skip


def test_a_file_that_makes_its_tokens_otherwise_says_how_it_is_built(tmp_path):
    file, net = tmp_path / "ip.safetensors", small()

    def written(**arguments):
        ip = IPAdapter(**arguments).attach(net)
        ip.write(file)
        ip.detach()

    written(embed_dim=12, num_tokens=5, resampler={"num_heads": 3, "depth": 2})
    with pytest.raises(
        WeightFileError,
        match=r"is an IPAdapter\(embed_dim=12, num_tokens=5, resampler={'dim': 6, 'depth': 2, 'num_heads': 3}\)",
    ):
        IPAdapter(embed_dim=12).read(file)
    IPAdapter(embed_dim=None).read(file)
    written(embed_dim=12, num_tokens=3)
    with pytest.raises(WeightFileError, match=r"is an IPAdapter\(embed_dim=12, num_tokens=3\)"):
        IPAdapter(embed_dim=12, resampler={}).read(file)
    weights = {n.replace("proj.weight", "proj.0.weight"): v for n, v in read_weights(file).items()}
    save_weights(file, weights)
    with pytest.raises(WeightFileError, match="neither a linear projection nor a resampler"):
        IPAdapter(embed_dim=12).read(file)
    with pytest.raises(ValueError, match="a resampler takes dim, depth, .*; got width and embed_dim=1024"):
        IPAdapter(resampler={"width": 3})
    with pytest.raises(ValueError, match="embed_dim=None"):
        IPAdapter(embed_dim=None, resampler={})


def test_a_saved_plus_is_built_again_from_its_file(tmp_path):
    net, (x, c_noise, cond) = small(), little(ip_adapter=torch.randn(2, 9, 12))
    ip = stirred(IPAdapter(embed_dim=12, num_tokens=5, resampler={"num_heads": 3, "depth": 2}).attach(net))
    said = net(x, c_noise, cond)
    ip.save(tmp_path / "ip.safetensors")
    ip.detach()
    load_mixin(tmp_path / "ip.safetensors").attach(net)
    assert torch.equal(net(x, c_noise, cond), said)
    with pytest.raises(ValueError, match=r"a picture is \(B, n, 12\), got \(2, 12\)"):
        net(x, c_noise, cond.with_(tensors={**cond.tensors, "ip_adapter": torch.randn(2, 12)}))


def test_a_transformer_looks_at_pictures_too_and_from_zero_changes_nothing():
    net = stirred(DiT(1, 1, 8, 2, 2, context_dim=6), 0.3).eval()
    x, c_noise, cond = little(ip_adapter=torch.randn(2, 12))
    plain = net(x, c_noise, Conditioning({"cross_attention": cond["cross_attention"]}))
    ip = IPAdapter(embed_dim=12, init="zero").attach(net)
    torch.testing.assert_close(net(x, c_noise, cond), plain)
    stirred(ip)
    assert (net(x, c_noise, cond) - plain).abs().max() > 1e-3


# Conditions ---------------------------------------------------------------------------------------


def test_what_an_attachment_reads_is_accepted_while_it_is_attached():
    net, (x, c_noise, cond) = small(), little(ip_adapter=torch.randn(2, 12))
    with pytest.raises(ValueError, match="takes no condition 'ip_adapter'"):
        net(x, c_noise, cond)
    ip = IPAdapter(embed_dim=12).attach(net)
    net(x, c_noise, cond)
    with ip.disabled():  # a reference model sees the same conditions
        plain = net(x, c_noise, cond)
    ip.detach()
    assert torch.equal(net(x, c_noise, cond.with_(tensors={"cross_attention": cond["cross_attention"]})), plain)
    with pytest.raises(ValueError, match="takes no condition 'ip_adapter'"):
        net(x, c_noise, cond)


def test_errors_say_what_is_missing_and_what_does_not_fit(tmp_path):
    net, (x, c_noise, cond) = small(), little(controlnet=torch.rand(2, 3, 8, 8))
    control = ControlNet().attach(net)
    with pytest.raises(ValueError, match=r"a hint for \(8, 8\) is \(B, 3, 64, 64\), got \(2, 3, 8, 8\)"):
        net(x, c_noise, cond)
    with pytest.raises(
        ValueError, match="'controlnet', which is missing. It got: cross_attention.*switch the mixin off"
    ):
        net(x, c_noise, Conditioning({"cross_attention": cond["cross_attention"]}))
    control.detach()
    with pytest.raises(ValueError, match="DiT.*matches 'role:unet'"):
        ControlNet().attach(DiT(1, 1, 8, 1, 2))
    with pytest.raises(ValueError, match="without cross-attention"):
        IPAdapter().attach(DiT(1, 1, 8, 1, 2))
    IPAdapter(embed_dim=12).attach(net)
    with pytest.raises(ValueError, match=r"a picture is \(B, 12\), got \(2, 5\)"):
        net(x, c_noise, Conditioning({"cross_attention": cond["cross_attention"], "ip_adapter": torch.randn(2, 5)}))
    save_weights(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    with pytest.raises(WeightFileError, match="holds no ControlNet"):
        ControlNet().read(tmp_path / "x.safetensors")
    with pytest.raises(WeightFileError, match="holds no IP-Adapter"):
        IPAdapter().read(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        ControlNet(hint_factor=3)
