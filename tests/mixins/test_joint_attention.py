"""Joint attention is the host's own attention, asked about the partner."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vdiff.hooks import routed
from vdiff.mixins import JointAttention, LoRA
from vdiff.networks import UNet
from vdiff.networks.transformer import AttentionBlock, CrossAttention
from vdiff.process import Conditioning


def attach(host, **options):
    joint = JointAttention(**options).attach(host)
    for parameter in joint.parameters():
        nn.init.normal_(parameter)
    return joint


def tokens(**options):
    host = nn.Sequential(CrossAttention(8, num_heads=2, head_dim=4, role="self_attention"))
    return host, attach(host, **options), torch.randn(4, 5, 8)


def naive(attention, x, context):
    """Multi-head attention of one row, head by head."""
    heads = [
        (layer(y).unflatten(-1, (attention.num_heads, -1))) for layer, y in zip(
            (attention.to_q, attention.to_k, attention.to_v), (x, context, context), strict=True)
    ]  # fmt: skip
    out = []
    for head in range(attention.num_heads):
        q, k, v = (y[:, head] for y in heads)
        out.append(F.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1) @ v)
    return attention.to_out(torch.cat(out, dim=-1))


def test_it_adds_what_the_partner_says_row_by_row():
    host, joint, x = tokens(scale=0.5)
    partners, gate = [1, 0, -1, 2], [1.0, 0.3, 1.0, 2.0]
    cond = Conditioning(gates={"joint_attention": torch.tensor(gate)}, partners=torch.tensor(partners))
    with routed(host, cond):
        y = host(x)
    project = host[0]._port["joint_attention"].project
    for row, partner in enumerate(partners):
        expected = naive(host[0], x[row], x[row])
        if partner >= 0:
            expected = expected + 0.5 * gate[row] * project(naive(host[0], x[row], x[partner]))
        torch.testing.assert_close(y[row], expected)


def test_without_partners_nothing_happens():
    host, joint, x = tokens()
    with joint.disabled():
        y = host(x)
    assert torch.equal(host(x), y)
    with routed(host, Conditioning(partners=torch.full((4,), -1))):
        assert torch.equal(host(x), y)


def test_rows_without_a_partner_are_untouched_whatever_the_others_hold():
    host, joint, x = tokens()
    x[0] = float("nan")
    with routed(host, Conditioning(partners=torch.tensor([-1, 2, 1, -1]))):
        y = host(x)
    assert y[0].isnan().all() and not y[1:].isnan().any()
    assert torch.equal(y[3], host(x)[3])


def test_frames_meet_the_same_frame_of_the_partner():
    host, joint, _ = tokens()
    video = torch.randn(2, 3, 5, 8)  # b f n c
    with routed(host, Conditioning(partners=torch.tensor([1, 0]))):
        folded = host(video.flatten(0, 1)).unflatten(0, (2, 3))
        by_frame = torch.stack([host(video[:, f]) for f in range(3)], dim=1)
    torch.testing.assert_close(folded, by_frame)


def test_partners_of_a_guided_batch_stay_in_their_branch():
    host, joint, x = tokens()
    pair = Conditioning({"label": torch.zeros(2)}, partners=torch.tensor([1, 0]))
    with routed(host, pair):
        alone = torch.cat([host(x[:2]), host(x[2:])])
    with routed(host, Conditioning.cat([pair, pair], rows=2)):
        torch.testing.assert_close(host(x), alone)
    with routed(host, Conditioning.cat([pair, pair.gated(joint_attention=0)], rows=2)):
        y = host(x)
    torch.testing.assert_close(y[:2], alone[:2])
    assert torch.equal(y[2:], host(x)[2:])


def test_attention_over_pixels_is_joined_as_well():
    host = nn.Sequential(AttentionBlock(8, num_heads=2, norm_groups=4))
    nn.init.normal_(host[0].proj_out.weight)
    attach(host)
    x = torch.randn(2, 8, 3, 4)
    with routed(host, Conditioning(partners=torch.tensor([1, -1]))):
        y = host(x)
    said = host[0].forward(x[:1], context=x[1:])
    weight = host[0]._port["joint_attention"].project.weight
    torch.testing.assert_close(y[:1], host(x)[:1] + torch.einsum("oc,bchw->bohw", weight, said))
    assert torch.equal(y[1], host(x)[1])


def test_both_terms_see_the_other_mixins_of_the_projections():
    host, joint, x = tokens()
    lora = LoRA(rank=2).attach(host)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    project = host[0]._port["joint_attention"].project
    with routed(host, Conditioning(partners=torch.tensor([1, 0, 3, 2]))):
        y = host(x)
    expected = naive(host[0], x[0], x[0]) + project(naive(host[0], x[0], x[1]))
    torch.testing.assert_close(y[0], expected)


def test_a_network_of_pairs_gives_gradients_to_both_rows_with_checkpointing():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        size = dict(num_heads=2, norm_groups=4, checkpointing=checkpointing)
        net = UNet(1, 1, 8, (1, 2), 1, (2,), **size)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3) if not parameter.any() else None
        joint = attach(net)
        x = torch.randn(2, 1, 8, 8, requires_grad=True)
        with routed(net, Conditioning(partners=torch.tensor([1, 0]))):
            y = net(x, torch.zeros(2))
        y[0].square().sum().backward()
        assert x.grad[1].any()
        grads.append([x.grad, *(p.grad for p in joint.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_hosts_that_it_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="neither linear layer nor convolution"):
        JointAttention(on="0").attach(nn.Sequential(nn.Identity()))
    host = CrossAttention(8, num_heads=2, head_dim=4)
    attach(host, on="")
    x = torch.randn(2, 5, 8)
    with routed(host, Conditioning(partners=torch.tensor([1, 0]))), pytest.raises(ValueError, match="without masks"):
        host(x, context=torch.randn(2, 3, 8))
