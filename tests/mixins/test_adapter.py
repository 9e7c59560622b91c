"""Adapters read where they say and write where they say."""

import copy

import pytest
import torch
from torch import nn

from vdiff.hooks import PORT, checkpoint
from vdiff.mixins import Adapter
from vdiff.mixins.adapter import FORMS
from vdiff.networks import DiT, ExpertBlock, TemporalTransformerBlock, UNet
from vdiff.networks.modulated import ModulatedBlock
from vdiff.networks.resblock import ResBlock
from vdiff.networks.transformer import BasicTransformerBlock
from vdiff.process import Conditioning

CELLS = [(form, layer) for form in FORMS for layer in FORMS[form]]
# Every pair for which the study ships a configuration.
STUDY = (
    "attn1i-attn1i attn1i-attn2i attn1i-ffni attn1i-transo attn1o-attn2i attn1o-ffni attn1o-transo attn2c-attn2c "
    "attn2i-attn2i attn2i-ffni attn2i-transo attn2o-ffni attn2o-transo ffni-ffni ffni-transo ffno-transo "
    "transo-transo resi-resi resi-reso reso-reso"
).split()


def stirred(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def unet(**changes):
    size = dict(in_channels=1, out_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    return stirred(UNet(**size, attention_factors=(2,), num_heads=2, context_dim=6, **changes)).eval()


def inputs(rows=2):
    return torch.randn(rows, 1, 8, 8), torch.rand(rows), Conditioning({"cross_attention": torch.randn(rows, 3, 6)})


def by_hand(block, place, adapt, x, context):
    """The block with its residual stream written out, and the adapter where the place says."""
    reads, writes = place.split("-")
    seen, written = {}, None

    def at(name, value):
        nonlocal written
        if name == reads:
            written = adapt(value)
        return value + written if name == writes and written is not None else value

    x = at("attn1i", x)
    said = block.attn1(block.norm1(x))
    seen = at("attn1o", said)
    x = at("attn2i", x + seen)
    context = at("attn2c", context)
    x = at("ffni", x + at("attn2o", block.attn2(block.norm2(x), context)))
    proj = block.ff.net[0](block.norm3(x))
    proj = at("ffnm", proj)
    return at("transo", x + at("ffno", block.ff.net[2](proj)))


TOKENS = sorted(
    {p for p in STUDY if "res" not in p} | {p for f in FORMS.values() for p in f.values() if "res" not in p}
)


@pytest.mark.parametrize("place", TOKENS)
def test_it_reads_and_writes_where_it_says(place):
    block, x, context = stirred(BasicTransformerBlock(8, 2, 4, 6)).double(), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    x, context = x.double(), context.double()
    host = copy.deepcopy(block)
    adapter = Adapter(place, width=3, activation="gelu", learn_scale=True).attach(host)
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter).double()
    part = adapter._sites[""][1].double()
    want = by_hand(block, place, part.delta, x, context)
    assert (want - block(x, context)).abs().max() > 1e-3
    torch.testing.assert_close(host(x, context), want)


@pytest.mark.parametrize("place", ["resi-resi", "resi-reso", "reso-reso", "cross-res"])
def test_it_reads_and_writes_around_a_residual_block(place):
    block, x, emb = stirred(ResBlock(8, 6, 12, norm_groups=4)), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    host = copy.deepcopy(block)
    adapter = Adapter(place, width=3).attach(host)
    stirred(adapter)
    delta = adapter._sites[""][1].delta
    if place == "resi-resi":
        want = block(x + delta(x), emb)
    else:
        read = {"resi-reso": lambda: x, "reso-reso": lambda: block(x, emb), "cross-res": lambda: block.in_layers(x)}
        want = block(x, emb) + delta(read[place]())
    torch.testing.assert_close(host(x, emb), want)


@pytest.mark.parametrize("form, layer", CELLS)
def test_every_cell_begins_at_nothing_and_comes_off_bit_for_bit(form, layer):
    net, (x, c_noise, cond) = unet(), inputs()
    plain, keys = net(x, c_noise, cond), list(net.state_dict())
    adapter = Adapter(f"{form}-{layer}", width=3).attach(net)
    assert torch.equal(net(x, c_noise, cond), plain)
    stirred(adapter)
    assert (net(x, c_noise, cond) - plain).abs().max() > 1e-4
    with adapter.scaled(0.0):
        torch.testing.assert_close(net(x, c_noise, cond), plain)
    adapter.detach()
    assert torch.equal(net(x, c_noise, cond), plain) and list(net.state_dict()) == keys
    assert not any(PORT in module._modules or module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("place", [f"{form}-{layer}" for form, layer in CELLS if layer != "res"])
def test_blocks_told_the_noise_level_are_hosts_too(place):
    net = stirred(DiT(1, 1, 8, 2, 2, context_dim=6)).eval()
    x, c_noise, cond = inputs()
    adapter = Adapter(place, width=3).attach(net)
    plain = net(x, c_noise, cond)
    stirred(adapter)
    assert (net(x, c_noise, cond) - plain).abs().max() > 1e-4


def test_what_is_written_to_the_stream_passes_no_gate():
    """A new modulated block is the identity: what the adapter adds is what it returns."""
    block, x = ModulatedBlock(8, 2, 16), torch.randn(2, 5, 8)
    adapter = Adapter("parallel-ffn", width=3).attach(block)
    stirred(adapter)
    torch.testing.assert_close(block(x, torch.randn(2, 1, 8)), x + adapter._sites[""][1].delta(x))


@pytest.mark.parametrize("place", ["attn2o-ffni", "attn2i-ffni", "cross-attn2", "cross-ffn", "attn1i-transo"])
def test_the_gradient_under_checkpointing_is_the_gradient(place):
    net, (x, c_noise, cond) = unet(), inputs()
    adapter = stirred(Adapter(place, width=3).attach(net))
    twin = unet(checkpointing=True)
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if PORT not in k})
    again = Adapter(place, width=3).attach(twin)
    again.load_state_dict(adapter.state_dict())
    for one in (net, twin):
        one(x, c_noise, cond).square().sum().backward()
    for ours, theirs in zip(adapter.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_that_are_recomputed_have_the_same_gradient():
    net = stirred(DiT(1, 1, 8, 1, 2, context_dim=6, checkpointing=True))
    adapter = stirred(Adapter("parallel-attn2", width=3).attach(net))
    x, c_noise, cond = inputs()
    wanted = torch.autograd.grad(net(x, c_noise, cond).square().sum(), list(adapter.parameters()))
    # As DiffusionEngine.compile sets it: one part hands on a value to another inside what is recomputed.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x, c_noise, cond).square().sum(), list(adapter.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_where_sizes_differ_it_is_refused_or_matched():
    block, x, emb = stirred(ResBlock(8, 6, norm_groups=4, resample="down")), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    adapter = stirred(Adapter("resi-reso", width=3).attach(block))
    with pytest.raises(ValueError, match=r"gives \(2, 8, 4, 4\), where it writes there is \(2, 8, 2, 2\)"):
        block(x, emb)
    adapter.detach()
    plain = block(x, emb)
    adapter = stirred(Adapter("resi-reso", width=3, match="interpolate").attach(block))
    torch.testing.assert_close(block(x, emb), plain + adapter._sites[""][1].delta(x)[..., ::2, ::2])


@pytest.mark.parametrize(
    "place, text",
    [
        ("attn2o-attn1i", "in front of what it reads"),
        ("attn2c-transo", "attn2c-attn2c"),
        ("sequential-attn3", "no layer is called 'attn3'"),
        ("nonsense", "<reads>-<writes>"),
        ("reso-resi", "resi, resm, reso"),
    ],
)
def test_places_that_are_none_are_refused(place, text):
    with pytest.raises(ValueError, match=text):
        Adapter(place)


def test_in_a_block_of_text_and_video_it_reads_and_writes_the_stream():
    """Two normalisations are two layers: the second is that of the feed-forward."""
    block, x = stirred(ExpertBlock(8, 2, 16, 4)), torch.randn(2, 7, 8)
    emb = torch.randn(2, 1, 4)
    adapter = stirred(Adapter("ffni-transo", width=3).attach(block))
    part = block._port["adapter"]
    with adapter.disabled():
        seen = []
        handle = block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        plain = block(x, emb, 3)
        handle.remove()
    torch.testing.assert_close(block(x, emb, 3), plain + part.delta(seen[0]))


PLACES = (
    "sequential-attn1",
    "sequential-attn2",
    "sequential-ffn",
    "sequential-whole",
    "parallel-whole",
    "attn2c-attn2c",
)


def test_in_a_block_over_time_it_stays_on_one_side_of_the_folding():
    block, x, context = stirred(TemporalTransformerBlock(8, 2, 4, 6)), torch.randn(6, 3, 8), torch.randn(2, 2, 6)
    on = "role:temporal_transformer_block"
    plain = block(x, context, None, 3)
    for place in PLACES:
        adapter = Adapter(place, width=3, on=on).attach(block)
        assert torch.equal(block(x, context, None, 3), plain)
        stirred(adapter)
        assert (block(x, context, None, 3) - plain).abs().max() > 1e-3
        adapter.detach()
    for place in ("attn1i-attn2i", "parallel-ffn", "attn1o-transo", "cross-attn1"):  # as many frames as pixels here
        with pytest.raises(ValueError, match="lies on both sides. There are sequential-attn1"):
            Adapter(place, on=on).attach(block)


def test_a_block_without_the_layer_is_refused():
    with pytest.raises(ValueError, match=r"'0' \(ModulatedBlock\) has no attn2, .* It has attn1, ff"):
        Adapter().attach(nn.Sequential(ModulatedBlock(8, 2, 16)))
    with pytest.raises(ValueError, match="match"):
        Adapter("resi-reso").attach(nn.Sequential(nn.Linear(2, 2)))


def test_torch_s_initialisation_changes_the_output_at_once():
    net, (x, c_noise, cond) = unet(), inputs()
    plain = net(x, c_noise, cond)
    Adapter(width=3, init="default").attach(net)
    assert (net(x, c_noise, cond) - plain).abs().max() > 1e-4


def test_a_checkpoint_helper_of_our_own_recomputes_what_was_carried():
    block, x, context = stirred(BasicTransformerBlock(8, 2, 4, 6)), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    adapter = stirred(Adapter("attn2i-ffni", width=3).attach(block))
    wanted = torch.autograd.grad(block(x, context).square().sum(), list(adapter.parameters()))
    got = torch.autograd.grad(checkpoint(block, x, context, module=block).square().sum(), list(adapter.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
