"""Recording and comparing, token merging, FreeU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peers import peer
from torch import nn

from vdiff.checkpoints import read_weights
from vdiff.checkpoints.maps.unet import unet as unet_names
from vdiff.hooks import attached, checkpoint, routed
from vdiff.mixins import PAG, SEG, ControlNet, FreeU, JointAttention, LoRA, Record, TokenMerging
from vdiff.mixins.comparison import compare, linear_cka, samples
from vdiff.mixins.controlnet import skip_widths
from vdiff.mixins.freeu import filtered
from vdiff.mixins.token_merging import Merge
from vdiff.networks import DiT, FrameAttention, ImageCrossAttention, UNet
from vdiff.networks.modulated import TokenAttention
from vdiff.networks.transformer import CrossAttention
from vdiff.process import Conditioning


def stirred(module, std=0.3):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def unet(**changes):
    size = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(1, 2), num_heads=2, norm_groups=4)
    return stirred(UNet(1, 1, context_dim=6, **size | changes)).eval()


def inputs(rows=2):
    return torch.randn(rows, 1, 8, 8), torch.rand(rows), Conditioning({"cross_attention": torch.randn(rows, 3, 6)})


# Recording ----------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_was_said_and_nothing_changes(tmp_path):
    net, (x, c_noise, cond) = unet(), inputs()
    plain, said = net(x, c_noise, cond), {}
    handles = [
        net.middle_block[i].register_forward_hook(lambda m, a, o, i=i: said.update({i: (a[0], o)})) for i in (0, 2)
    ]
    net(x, c_noise, cond)
    for handle in handles:
        handle.remove()
    outputs = Record(on=["middle_block.0", "middle_block.2"], keep="all").attach(net)
    inputs_ = Record("input", on="middle_block.2", name="inputs").attach(net)
    assert torch.equal(net(x, c_noise, cond), plain) and torch.equal(net(x, c_noise, cond), plain)
    assert {site: len(kept) for site, kept in outputs.values.items()} == {"middle_block.0": 2, "middle_block.2": 2}
    assert (
        torch.equal(outputs.last()["middle_block.2"], said[2][1]) and not outputs.last()["middle_block.2"].requires_grad
    )
    assert torch.equal(inputs_.last()["middle_block.2"], said[2][0])
    outputs.write(tmp_path / "seen.safetensors")
    seen = read_weights(tmp_path / "seen.safetensors")
    assert torch.equal(seen["middle_block.0.1"], said[0][1]) and len(seen) == 4
    outputs.clear()
    assert outputs.values == {}
    with pytest.raises(ValueError, match="has recorded nothing"):
        outputs.write(tmp_path / "none.safetensors")


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_maps_are_those_that_the_output_is_made_with(rotary):
    if rotary:
        from vdiff.networks.positions import coordinates, rotations

        attention, turns = TokenAttention(8, 2, qk_norm=True), rotations(coordinates((3, 3)), 4)
        call = lambda host, x: host[0](x, rotations=turns)  # noqa: E731
    else:
        attention = CrossAttention(8, 2, 4, role="self_attention")
        call = lambda host, x: host(x)  # noqa: E731
    host, x = nn.Sequential(attention), torch.randn(2, 9, 8)
    record = Record("attention", on="role:self_attention").attach(host)
    out = call(host, x)
    (maps,) = record.last().values()
    assert maps.shape == (2, 2, 9, 9)
    v = attention.to_v(x).unflatten(-1, (2, -1))
    torch.testing.assert_close(attention.to_out(torch.einsum("bhqk,bkhd->bqhd", maps, v).flatten(2)), out)


@pytest.mark.parametrize("is_causal", [False, True])
def test_maps_of_frames_folded_into_rows_and_of_attention_back_in_time(is_causal):
    """Three rows of each video look at one context, some of which does not count."""
    attention = FrameAttention(8, 2, 4, is_causal=True) if is_causal else CrossAttention(8, 2, 4, 6)
    x, context, keep = torch.randn(6, 5, 8), torch.randn(2, 4, 6), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    context, keep = (None, None) if is_causal else (context, keep)
    host = nn.ModuleList([attention])
    record = Record("attention", on="0").attach(host)
    out = attention(x, context, keep)
    (maps,) = record.last().values()
    v = attention.to_v(x if is_causal else context.repeat_interleave(3, 0)).unflatten(-1, (2, -1))
    torch.testing.assert_close(attention.to_out(torch.einsum("bhqk,bkhd->bqhd", maps, v).flatten(2)), out)


def test_recomputation_is_not_recorded_and_copies_begin_empty():
    host, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)
    record = Record(on="0", keep="all").attach(host)
    checkpoint(host, x, module=host).sum().backward()
    assert len(record.values["0"]) == 1
    assert attached(copy.deepcopy(host))["record"].values == {}


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match="no to_q and to_k"):
        Record("attention", on="type:Linear").attach(unet())
    for heads in (ImageCrossAttention(8, 2, 4, 6, 2), FrameAttention(8, 2, 4, max_distance=2)):
        with pytest.raises(ValueError, match=f"{type(heads).__name__}.* attends to .*, which is no one map"):
            Record("attention", on="0").attach(nn.Sequential(heads))
    with pytest.raises(ValueError, match="what is output, input or attention"):
        Record("maps")


# Comparing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_does_not_see_rotations_scales_and_shifts(unbiased):
    x, y = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(linear_cka(x, 3 * x @ turn + 2, unbiased), one)
    torch.testing.assert_close(linear_cka(x, y, unbiased), linear_cka(y, x @ turn, unbiased))
    assert linear_cka(x, y, unbiased) < 0.5
    doubled = torch.cat([y, y], dim=1)
    torch.testing.assert_close(linear_cka(x, doubled, unbiased), linear_cka(x, y, unbiased))


def test_cka_is_the_squared_correlation_in_one_dimension_and_the_same_by_either_matrix():
    x, y = torch.randn(30, 1, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    torch.testing.assert_close(linear_cka(x, y), torch.corrcoef(torch.cat([x, y], 1).T)[0, 1] ** 2)
    wide, other = torch.randn(8, 50, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    c, d = wide - wide.mean(0), other - other.mean(0)
    want = (d.T @ c).square().sum() / ((c.T @ c).norm() * (d.T @ d).norm())
    torch.testing.assert_close(linear_cka(wide, other), want)


def test_noise_of_many_features_looks_alike_unless_the_estimate_is_unbiased():
    x, y = torch.randn(20, 500), torch.randn(20, 500)
    assert linear_cka(x, y) > 0.9 and linear_cka(x, y, unbiased=True).abs() < 0.1


def test_before_and_after_are_compared_site_by_site():
    net, (x, c_noise, cond) = unet(), inputs()
    record = Record(on=["middle_block.0", "output_blocks.0"]).attach(net)
    net(x, c_noise, cond)
    before = record.last()
    same = compare(before, before)["middle_block.0"]
    assert same.relative == 0 and abs(same.cka - 1) < 1e-12 and abs(same.cosine - 1) < 1e-12
    stirred(LoRA(rank=2, on="output_blocks.0.*.to_q").attach(net))
    net(x, c_noise, cond)
    after = compare(before, record.last())
    assert after["middle_block.0"].relative == 0 and after["output_blocks.0"].relative > 0
    assert after["output_blocks.0"].cka < 1
    assert samples(torch.zeros(2, 3, 4, 5)).shape == (40, 3) and samples(torch.zeros(2, 7, 3)).shape == (14, 3)
    with pytest.raises(ValueError, match="no site is in both"):
        compare(before, {"x": before["middle_block.0"]})


# Token merging ------------------------------------------------------------------------------------


def test_merging_nothing_is_the_identity_and_everything_that_is_equal_loses_nothing():
    net, (x, c_noise, cond) = unet(), inputs()
    plain = net(x, c_noise, cond)
    merging = TokenMerging(0.0).attach(net)
    assert torch.equal(net(x, c_noise, cond), plain)
    merging.detach()
    host, tokens = nn.Sequential(CrossAttention(8, 2, 4, role="self_attention")), torch.randn(2, 1, 8).expand(2, 16, 8)
    want = host(tokens)
    TokenMerging(0.75).attach(host)
    torch.testing.assert_close(host(tokens), want)


@pytest.mark.parametrize("num", [1, 5, 12])
def test_merged_tokens_are_means_and_come_back_in_their_places(num):
    x = torch.randn(2, 16, 3)
    merge = Merge.of(x, num, 4, 4)
    merged = merge(x)
    assert merged.shape == (2, 16 - num, 3) and merge.taking.tolist() == [0, 2, 8, 10]
    back = merge.undone(merged)
    for row in range(2):
        groups = {int(t): [int(t)] for t in merge.taking}
        for token, place in zip(merge.going[row, :, 0], merge.into[row, :, 0], strict=True):
            groups[int(merge.taking[place])].append(int(token))
        for members in groups.values():
            torch.testing.assert_close(back[row, members], x[row, members].mean(0).expand(len(members), 3))
        for token in merge.staying[row, :, 0]:
            assert torch.equal(back[row, token], x[row, token])


def test_those_most_alike_go_first_and_to_whom_they_are_most_alike():
    x = torch.randn(1, 16, 5)
    merge = Merge.of(x, 4, 4, 4)
    others = [i for i in range(16) if i not in merge.taking]
    alike = F.cosine_similarity(x[0, others][:, None], x[0, merge.taking][None], dim=-1)
    best = alike.max(1).values.topk(4).indices
    assert set(merge.going[0, :, 0].tolist()) == {others[i] for i in best}
    for token, place in zip(merge.going[0, :, 0], merge.into[0, :, 0], strict=True):
        assert int(place) == int(alike[others.index(int(token))].argmax())


def test_a_grid_that_is_no_square_and_odd_sizes():
    host, x = nn.Sequential(CrossAttention(8, 2, 4, role="self_attention")), torch.randn(2, 15, 8)
    merging = TokenMerging(0.5, grid=(3, 5)).attach(host)
    assert host(x).shape == x.shape
    with merging.scaled(0.0):
        plain = host(x)
    merging.detach()
    assert torch.equal(host(x), plain)
    TokenMerging().attach(host)
    with pytest.raises(ValueError, match=r"15 tokens are not a picture of 3 by 3. Say how they lie"):
        host(x)


def test_tokens_are_merged_within_their_frame_and_text_stays():
    """Frames behind each other in a row are merged as if each was a row."""

    class Same(nn.Module):  # what attention says of a token is the token
        role, to_q = "self_attention", None

        def forward(self, x):
            sizes.append(tuple(x.shape))
            return x

    sizes, host, x = [], nn.Sequential(Same()), torch.randn(2, 5 + 3 * 8, 6)
    TokenMerging(0.5, grid=(3, 2, 4), text=5).attach(host)
    said = host(x)
    frames = x[:, 5:].reshape(6, 8, 6)
    merge = Merge.of(frames, 4, 2, 4)
    assert sizes == [(2, 5 + 3 * 4, 6)] and torch.equal(said[:, :5], x[:, :5])
    assert torch.equal(said[:, 5:], merge.undone(merge(frames)).reshape(2, 24, 6))


def test_what_cannot_be_merged_is_refused():
    net = stirred(DiT(1, 1, 8, 1, 2, positions="rotary")).eval()
    TokenMerging().attach(net)
    with pytest.raises(ValueError, match="positions, which know nothing of merged tokens"):
        net(*inputs()[:2])
    with pytest.raises(ValueError, match=r"\[0, 0.75\]"):
        TokenMerging(0.9)
    with pytest.raises(ValueError, match="does not attend over tokens"):
        TokenMerging().attach(UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, norm_groups=4))


OTHERS = {
    "pag": (PAG, {"gates": {"pag": torch.ones(2)}}),
    "joint": (JointAttention, {"partners": torch.tensor([1, 0])}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_attached_beside_it_acts_among_merged_tokens_whatever_the_order(other):
    make, said = OTHERS[other]
    (x, c_noise, cond), given = inputs(), []
    cond = cond.with_(**said)
    torch.manual_seed(3)
    host = unet()
    for is_first in (True, False):
        net = copy.deepcopy(host)
        mixins = [TokenMerging(0.5), make(name=other)]
        for mixin in mixins if is_first else mixins[::-1]:
            mixin.attach(net)
        for parameter in mixins[1].parameters():
            nn.init.eye_(parameter)
        with routed(net, cond, 2):
            given.append(net(x, c_noise, cond))
    assert torch.equal(*given) and not torch.allclose(given[0], host(x, c_noise, cond), atol=1e-3)


@pytest.mark.parametrize("make", [TokenMerging, JointAttention])
def test_who_brings_a_context_that_is_refused_is_named(make):
    net, (x, c_noise, cond) = unet(), inputs()
    make().attach(net)
    SEG(name="blur").attach(net)
    cond = cond.with_(gates={"blur": torch.ones(2)}, partners=torch.tensor([1, 0]))
    with routed(net, cond, 2), pytest.raises(ValueError, match="'blur', attached .* brings"):
        net(x, c_noise, cond)


# FreeU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (5, 7), (2, 2)])
def test_the_filter_is_that_of_diffusers(size):
    theirs = peer("diffusers.utils.torch_utils").fourier_filter
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(filtered(x, 0.3), theirs(x, threshold=1, scale=0.3), rtol=1e-5, atol=1e-6)


def test_the_decoder_gets_what_diffusers_would_give_it():
    theirs = peer("diffusers.utils.torch_utils").apply_freeu
    net, (x, c_noise, cond) = unet(channel_mult=(1, 2, 2)), inputs()
    widths = skip_widths(net)[::-1]
    given = {}

    def by_hand(level, i, module, args):
        width = widths[i]
        stream, skip = args[0][:, :-width].clone(), args[0][:, -width:]
        given[i] = torch.cat(theirs(level, stream, skip, b1=1.5, b2=1.6, s1=0.9, s2=0.2), dim=1)
        return (given[i], *args[1:])

    # Two blocks for each resolution.
    handles = [
        block.register_forward_pre_hook(lambda m, a, i=i: by_hand(i // 2, i, m, a))
        for i, block in enumerate(net.output_blocks)
    ]
    want = net(x, c_noise, cond)
    for handle in handles:
        handle.remove()
    plain = net(x, c_noise, cond)
    freeu = FreeU().attach(net)
    torch.testing.assert_close(net(x, c_noise, cond), want, rtol=1e-4, atol=1e-5)
    assert (want - plain).abs().max() > 1e-3
    with freeu.scaled(0.0):
        torch.testing.assert_close(net(x, c_noise, cond), plain)
    freeu.detach()
    assert torch.equal(net(x, c_noise, cond), plain)


@pytest.mark.parametrize("order", [["freeu"], ["freeu", "control"], ["control", "freeu"]])
def test_the_whole_network_says_what_diffusers_says_with_freeu(order):
    import sys
    from pathlib import Path

    diffusers = peer("diffusers")
    sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
    from test_unet import FIRST, TWIN, randomised

    net = randomised(UNet(4, 4, 32, (1, 2), 1, (1,), num_heads=4, context_dim=16))
    base = diffusers.UNet2DConditionModel(**TWIN | FIRST | dict(attention_head_dim=4)).eval()
    base.load_state_dict(unet_names(1, (True, False))(net.state_dict()))
    base.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    mixins = {"freeu": FreeU((1.2, 1.4), (0.9, 0.2)), "control": ControlNet(hint_factor=1, name="control")}
    for name in order:
        mixins[name].attach(net)
    x, c_noise, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 741.0]), torch.randn(2, 7, 16)
    cond, added = Conditioning({"cross_attention": text}), {}
    with torch.no_grad():
        if "control" in order:
            cond = cond.with_(tensors={"cross_attention": text, "control": torch.rand(2, 3, 8, 8)})
            *skips, middle = stirred(net._port["control"], 0.1).said(cond["control"], x, c_noise, cond)
            assert middle.std() > 0.1  # it has something to say
            added = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
        want = base(x, c_noise, text, **added).sample
        ours = net(x, c_noise, cond)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
