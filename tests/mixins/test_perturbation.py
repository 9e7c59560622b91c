"""A perturbation acts on the rows whose gate says so, and on nothing else."""

import pytest
import torch
import torch.nn.functional as F
from oracles import noise
from torch import nn

from vdiff.denoisers import VDenoiser
from vdiff.hooks import routed
from vdiff.mixins import PAG, SEG, LoRA, Mixin, SkipLayer
from vdiff.mixins.perturbation import _blur
from vdiff.networks import UNet
from vdiff.networks.modulated import TokenAttention
from vdiff.networks.positions import coordinates, rotate, rotations
from vdiff.networks.transformer import AttentionBlock, BasicTransformerBlock, CrossAttention
from vdiff.process import Conditioning, CosineSchedule
from vdiff.samplers import CFGGuider, DDIMSampler, PerturbedGuider

KINDS = {"pag": PAG, "seg": SEG, "skip_layer": SkipLayer}


def unet(context_dim=6):
    torch.manual_seed(0)
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, norm_groups=4, context_dim=context_dim)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3) if not parameter.any() else None
    return net.eval()


def call(net, x, **gates):
    rows = len(x)
    cond = Conditioning({"cross_attention": torch.linspace(-1, 1, 6).expand(rows, 2, 6)})
    cond = cond.with_(gates={name: torch.as_tensor(gate, dtype=torch.float32) for name, gate in gates.items()})
    with torch.no_grad(), routed(net, cond, rows=rows):
        return net(x, torch.full((rows,), 0.5), cond)


def pixels(rows=4):
    return noise(rows, 64).reshape(rows, 1, 8, 8).float()


def attention(**options):
    return nn.Sequential(CrossAttention(8, num_heads=2, head_dim=4, role="self_attention", **options))


def gated(host, x, mixin, gate):
    with torch.no_grad(), routed(host, Conditioning(gates={mixin.name: torch.as_tensor(gate)})):
        return host(x)


# What is disturbed --------------------------------------------------------------------------------


def test_pag_leaves_every_token_to_itself():
    """Attention of a row of one token is what the identity map makes of it."""
    host, x = attention(), torch.randn(2, 9, 8)
    pag = PAG().attach(host)
    alone = host(x.reshape(18, 1, 8)).reshape(2, 9, 8)
    torch.testing.assert_close(gated(host, x, pag, [1.0, 1.0]), alone)


def test_pag_does_the_same_to_attention_over_pixels():
    """Attention with a map that is the identity, by hand."""
    host, x = nn.Sequential(AttentionBlock(8, num_heads=2, norm_groups=4)), torch.randn(2, 8, 3, 4)
    nn.init.normal_(host[0].proj_out.weight)
    pag = PAG().attach(host)
    qkv = host[0].qkv(host[0].norm(x).flatten(2)).unflatten(1, (2, 3, -1))
    value = host[0].proj_out(qkv[:, :, 2].flatten(1, 2)).unflatten(2, (3, 4))
    torch.testing.assert_close(gated(host, x, pag, [1.0, 1.0]), value)


@pytest.mark.parametrize("keep", [None, [[True] * 10, [True] + [False] + [True] * 8]])
def test_pag_leaves_text_in_front_as_it_is(keep):
    """Rotary attention written out: text looks at all that counts, the others at text and themselves."""
    layer, x = TokenAttention(8, 2, qk_norm=True), torch.randn(2, 10, 8)
    host, turns = Host(layer), rotations(coordinates((2, 5)), 4)
    mask = None if keep is None else torch.tensor(keep)
    pag = PAG(text=3).attach(host)
    q, k = (layer.norm_q(part(x).unflatten(-1, (2, 4))) for part in (layer.to_q, layer.to_k))
    logits = torch.einsum("bqhd,bkhd->bhqk", rotate(q, turns), rotate(k, turns)) / 2
    sees = torch.eye(10, dtype=torch.bool).expand(2, 10, 10).clone()
    sees[:, :3] = sees[:, :, :3] = True
    sees = sees if mask is None else sees & mask[:, None]
    maps = logits.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
    want = layer.to_out(torch.einsum("bhqk,bkhd->bqhd", maps, layer.to_v(x).unflatten(-1, (2, 4))).flatten(2))
    with torch.no_grad(), routed(host, Conditioning(gates={"pag": torch.ones(2)})):
        torch.testing.assert_close(host(x, mask, turns), want)
    assert pag.arguments()["text"] == 3


class Host(nn.Module):
    """A block of tokens, text in front."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask, turns):
        return self.layer(x, mask=mask, rotations=turns)


def test_seg_blurs_every_frame_behind_the_text():
    host, x = attention(), torch.randn(2, 3 + 8, 8)
    seg = SEG(grid=(2, 2, 2), text=3).attach(host)
    mean = x[:, 3:].unflatten(1, (2, 4)).mean(2, keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2)
    want = host[0](torch.cat([x[:, :3], mean], dim=1), x)
    torch.testing.assert_close(gated(host, x, seg, [1.0, 1.0]), want)


@pytest.mark.parametrize("grid, blur", [(None, 1.0), ((3, 6), 1.4), ((2, 3, 3), float("inf")), ((3, 6), 9.0)])
def test_seg_blurs_the_queries_of_each_picture(grid, blur):
    """By torch's own reflected convolution of the queries, where the reflection reaches."""
    host, x = attention(), torch.randn(2, 18 if grid else 16, 8)
    seg = SEG(blur, grid).attach(host)
    h, w = grid[-2:] if grid else (4, 4)
    q = host[0].to_q(x).unflatten(1, (-1, h, w)).movedim(-1, 2)  # b f c h w
    if blur == float("inf"):
        q = q.mean((-1, -2), keepdim=True).expand(*q.shape)
    else:
        q = torch.einsum("hi,wj,bfcij->bfchw", _blur(h, blur, q), _blur(w, blur, q), q)
    heads = (2, 4)
    q = q.movedim(2, -1).flatten(1, 3).unflatten(-1, heads).transpose(1, 2)
    k, v = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (host[0].to_k, host[0].to_v))
    want = host[0].to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(gated(host, x, seg, [1.0, 1.0]), want)


@pytest.mark.parametrize("std, size", [(0.7, 5), (1.0, 4), (1.1, 8)])
def test_the_blur_is_a_reflected_convolution(std, size):
    """Kernel of the odd length next to 6 std, as in the authors' code."""
    line = torch.randn(1, 1, size, dtype=torch.float64)
    length = int(-(-6 * std // 1)) // 2 * 2 + 1
    kernel = torch.exp(-0.5 * ((torch.arange(length, dtype=torch.float64) - length // 2) / std) ** 2)
    padded = F.pad(line, (length // 2,) * 2, mode="reflect")
    want = F.conv1d(padded, (kernel / kernel.sum())[None, None])
    torch.testing.assert_close(torch.einsum("hi,bci->bch", _blur(size, std, line), line), want)


def test_a_wide_blur_is_the_mean_up_to_its_edges():
    """diffusers has the two the other way round: its mean is taken where the blur is finite."""
    rows = _blur(4, 300.0, torch.zeros((), dtype=torch.float64))
    assert (rows.sum(1) - 1).abs().max() < 1e-12 and (rows[:, 1:3] - 1 / 3).abs().max() < 2e-3
    assert (rows[:, [0, 3]] - 1 / 6).abs().max() < 2e-3  # an end is met once a period, what lies between twice


def test_a_skipped_block_returns_its_input_and_a_skipped_branch_nothing():
    host, x = nn.Sequential(BasicTransformerBlock(8, 2, 4)), torch.randn(2, 5, 8)
    skip = SkipLayer().attach(host)
    assert torch.equal(gated(host, x, skip, [1.0, 1.0]), x)
    skip.detach()
    branch = SkipLayer(on="role:self_attention", returns="nothing").attach(host)
    assert torch.equal(gated(host[0].attn1, host[0].norm1(x), branch, [1.0, 1.0]), torch.zeros_like(x))


def test_a_block_of_two_streams_is_skipped_in_both():
    class Both(nn.Module):
        role = "transformer_block"

        def forward(self, x, text, emb=None):
            return x + 1, text * 2

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Both()

        def forward(self, x, text):
            return self.block(x, text, emb=None)

    host, x, text = Chain(), torch.randn(2, 3), torch.randn(2, 4)
    skip = SkipLayer().attach(host)
    with routed(host, Conditioning(gates={skip.name: torch.tensor([1.0, 0.0])})):
        a, b = host(x, text)
    assert torch.equal(a, torch.stack([x[0], x[1] + 1])) and torch.equal(b, torch.stack([text[0], text[1] * 2]))


# Which rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_gates_choose_rows_within_a_batch_bit_for_bit(name):
    net, x = unet(), pixels()
    plain = call(net, x)
    mixin = KINDS[name]().attach(net)
    assert torch.equal(call(net, x), plain)  # without a gate nothing happens: it may stay attached in training
    assert torch.equal(call(net, x, **{name: [0.0] * 4}), plain)
    all_of_it = call(net, x, **{name: [1.0] * 4})
    mixed = call(net, x, **{name: [0.0, 1.0, 0.0, 1.0]})
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and torch.equal(mixed[[1, 3]], all_of_it[[1, 3]])
    assert (all_of_it - plain).abs().max() > 1e-3
    mixin.detach()
    assert torch.equal(call(net, x), plain) and not any("_port" in key for key in net.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_a_half_open_gate_lies_between(name):
    host, x = nn.Sequential(BasicTransformerBlock(8, 2, 4)), torch.randn(3, 4, 8)
    KINDS[name](on="*.attn1" if name != "skip_layer" else "0").attach(host)
    named = KINDS[name]()
    none, half, all_ = (gated(host, x, named, [g] * 3) for g in (0.0, 0.5, 1.0))
    assert 0 < (half - none).abs().max() < 2 * (all_ - none).abs().max()
    if name == "skip_layer":
        torch.testing.assert_close(half, (none + all_) / 2)


def test_frames_folded_into_rows_follow_their_video():
    host, x = attention(), torch.randn(2, 3, 4, 8)
    pag = PAG().attach(host)
    folded = gated(host, x.flatten(0, 1), pag, [0.0, 1.0]).unflatten(0, (2, 3))
    assert torch.equal(folded[0], host(x[0]))
    torch.testing.assert_close(folded[1], gated(host, x[1], pag, [1.0]))


def test_other_mixins_act_on_the_disturbed_pass_too():
    host, x = attention(), torch.randn(2, 4, 8)
    lora = LoRA(rank=2).attach(host)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    pag = PAG().attach(host)
    torch.testing.assert_close(gated(host, x, pag, [1.0, 1.0]), host(x.reshape(8, 1, 8)).reshape(2, 4, 8))


# One graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_gates_are_tensors_of_one_graph(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    host, x, counter = nn.Sequential(BasicTransformerBlock(8, 2, 4)), torch.randn(3, 4, 8), CompileCounter()
    mixin = KINDS[name]().attach(host)
    compiled = torch.compile(lambda x, gate: gated(host, x, mixin, gate), fullgraph=True, backend=counter)
    for gate in (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])):
        torch.testing.assert_close(compiled(x, gate), gated(host, x, mixin, gate))
    assert counter.frame_count == 1


# With the guider ----------------------------------------------------------------------------------


def told(rows=2):
    cond = Conditioning({"cross_attention": torch.linspace(-1, 1, 6).expand(rows, 2, 6).contiguous()})
    return cond.with_null(Conditioning({"cross_attention": torch.zeros(rows, 2, 6)}))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_perturbed_branch_is_one_more_row_of_the_batch(name, batched):
    """u + w (c - u) + s (c - d), the three of them asked apart by hand."""
    net = unet()
    KINDS[name]().attach(net)
    denoiser, schedule, x, seen = VDenoiser(net), CosineSchedule(), pixels(2), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    guider = PerturbedGuider(name, 2.0, guider=CFGGuider(3.0, batched))
    sampler = DDIMSampler(3)
    step = next(sampler.steps(denoiser, schedule, x, told(), guider=guider))
    assert seen == ([6] if batched else [2, 2, 2])
    level = sampler.levels(schedule)[[0, 0]].to(torch.float32)
    with torch.no_grad():
        c, d, u = (denoiser(x, level, who).value for who in (told(), told().gated(**{name: 1}), told().null))
    want = u + 3.0 * (c - u) + 2.0 * (c - d)
    alpha, sigma = level.like(x).alpha, level.like(x).sigma
    torch.testing.assert_close(step.x0, alpha * x - sigma * want, rtol=1e-4, atol=1e-4)


def test_two_perturbations_have_a_branch_each():
    net, seen = unet(), []
    for kind in KINDS.values():
        kind().attach(net)
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    guider = PerturbedGuider("pag", 1.0, guider=PerturbedGuider("seg", 2.0, hi=1.0, guider=CFGGuider(3.0)))
    out = DDIMSampler(4)(VDenoiser(net), CosineSchedule(), pixels(2), told(), guider=guider)
    assert out.isfinite().all() and seen == [6, 6, 8, 8]  # ratio inf, 2.4, 1, 0.41: seg up to 1 alone


def test_a_network_without_conditions_is_guided_by_perturbation_alone():
    net = unet(context_dim=None)
    PAG().attach(net)
    walk = lambda guider: DDIMSampler(3)(VDenoiser(net), CosineSchedule(), pixels(2), guider=guider)  # noqa: E731
    assert torch.equal(walk(PerturbedGuider("pag", 0.0)), walk(None))
    assert (walk(PerturbedGuider("pag", 2.0)) - walk(None)).abs().max() > 1e-3


# Errors -------------------------------------------------------------------------------------------


def test_what_cannot_be_disturbed_is_refused():
    with pytest.raises(ValueError, match="SEG.*AttentionBlock.*no queries of its own"):
        SEG().attach(unet(context_dim=None))
    host = attention()
    seg = SEG().attach(host)
    with pytest.raises(ValueError, match=r"7 tokens are not a picture of 2 by 2. Say how they lie"):
        gated(host, torch.randn(1, 7, 8), seg, [1.0])
    with pytest.raises(ValueError, match="no mixin of that name"):
        DDIMSampler(1)(VDenoiser(unet()), CosineSchedule(), pixels(2), told(), guider=PerturbedGuider("pag"))
    wide = nn.Sequential(nn.Linear(4, 6))
    skip = SkipLayer(on="0").attach(wide)
    with pytest.raises(ValueError, match="cannot be left out"):
        gated(wide, torch.randn(2, 4), skip, [1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS.values())
def test_they_are_saved_and_built_as_other_mixins(kind, tmp_path):
    from vdiff.mixins import load_mixin

    mixin = kind().attach(unet())
    mixin.save(tmp_path / "mixin.safetensors")
    again = load_mixin(tmp_path / "mixin.safetensors")
    assert isinstance(again, Mixin) and again.arguments() == mixin.arguments()
