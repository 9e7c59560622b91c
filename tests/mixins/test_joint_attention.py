"""Joint attention is the host's own attention, asked about the partner."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vdiff.hooks import is_port_key, parts, routed
from vdiff.mixins import JointAttention, LoRA, load_mixin
from vdiff.networks import DiT, UNet
from vdiff.networks.modulated import TokenAttention
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
    with pytest.raises(ValueError, match="cannot attend to anything but its input: its forward takes input"):
        JointAttention(on="0").attach(nn.Sequential(nn.Linear(2, 2)))
    host = CrossAttention(8, num_heads=2, head_dim=4)
    attach(host, on="")
    x = torch.randn(2, 5, 8)
    with routed(host, Conditioning(partners=torch.tensor([1, 0]))), pytest.raises(ValueError, match="with 'context'"):
        host(x, context=torch.randn(2, 3, 8))


# Routing by stream -------------------------------------------------------------------------------


def lora(host, name, seed, **options):
    made = LoRA(**({"rank": 2, "on": "*.to_[qkv]"} | options)).attach(host, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return made


def test_a_lora_of_one_stream_goes_with_its_tokens_wherever_they_are_looked_at():
    """Of the first row, the query is the plain network's, and the keys and values of its partner are the LoRA's."""
    host, joint, x = tokens()
    lora(host, "y", 1)
    changed = copy.deepcopy(host[0])  # the LoRA in every row
    plain = CrossAttention(8, num_heads=2, head_dim=4)
    plain.load_state_dict({n: v for n, v in host[0].state_dict().items() if not is_port_key(n)})
    gates = {"y": torch.tensor([0.0, 1.0])}
    with routed(host, Conditioning(gates=gates, partners=torch.tensor([1, 0]))):
        y = host(x[:2])

    def said(looks, looked_at, row, other):
        heads = (2, -1)
        q = looks.to_q(x[row : row + 1]).unflatten(-1, heads).transpose(1, 2)
        k, v = (f(x[other : other + 1]).unflatten(-1, heads).transpose(1, 2) for f in (looked_at.to_k, looked_at.to_v))
        return plain.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[0]

    project = host[0]._port["joint_attention"].project
    torch.testing.assert_close(y[0], said(plain, plain, 0, 0) + project(said(plain, changed, 0, 1)))
    torch.testing.assert_close(y[1], said(changed, changed, 1, 1) + project(said(changed, plain, 1, 0)))


def test_mixins_of_the_pair_act_on_the_joint_term_and_no_others_do_there():
    host, x = nn.Sequential(CrossAttention(8, num_heads=2, head_dim=4, role="self_attention")), torch.randn(2, 5, 8)
    bare = copy.deepcopy(host)
    lora(host, "y", 1)
    only_y = copy.deepcopy(host)
    with_pair = copy.deepcopy(bare)
    pair = lora(host, "pair", 2)
    lora(with_pair, "pair", 2)
    joint = attach(host, own=["pair"])
    project = host[0]._port["joint_attention"].project
    assert torch.equal(host(x), only_y(x))  # the pair's LoRA keeps out of the first term
    with routed(host, Conditioning(partners=torch.tensor([1, -1]))):
        y = host(x)
    torch.testing.assert_close(y[0], only_y(x)[0] + project(with_pair[0](x[:1], context=x[1:])[0]))
    assert torch.equal(y[1], only_y(x)[1])
    both = copy.deepcopy(only_y)
    lora(both, "pair", 2)
    with pytest.raises(ValueError, match="acts in the term of 'joint_attention' alone"):
        pair.merge()
    joint.detach()
    assert torch.equal(host(x), both(x))  # as before it was attached


def test_mixins_of_the_pair_are_attached_before():
    host = nn.Sequential(CrossAttention(8, num_heads=2, head_dim=4, role="self_attention"))
    before = list(host.state_dict())
    with pytest.raises(ValueError, match="own names 'pair', and no mixin of that name is attached. Attach it before"):
        JointAttention(own=["pair"]).attach(host)
    assert list(host.state_dict()) == before


def test_mixins_of_the_pair_are_not_attached_after_nor_outside():
    """There they would act in both terms, or in none."""
    attention = CrossAttention(8, num_heads=2, head_dim=4, role="self_attention")
    host = nn.Sequential(attention, nn.Linear(8, 8))
    pair = LoRA(rank=2, on=["0.to_q"], name="pair").attach(host)
    joint = JointAttention(own=["pair"]).attach(host)
    pair.detach()
    with pytest.raises(ValueError, match="'pair' is to act in its term alone. Detach 'joint_attention'"):
        pair.attach(host)
    joint.detach()
    wide = LoRA(rank=2, on=["0.to_q", "1"], name="pair").attach(host)
    before = list(host.state_dict())
    with pytest.raises(ValueError, match="'pair' is to act in the joint term alone, and sits outside"):
        joint.attach(host)
    assert list(host.state_dict()) == before
    assert all(part.term == "" for part in parts(host)) and wide.is_attached


def test_a_host_that_cannot_be_asked_for_a_row_takes_no_gates_on_its_layers():
    class Foreign(CrossAttention):
        def forward(self, x, context=None):
            return super().forward(x, context)

    host = nn.Sequential(Foreign(8, num_heads=2, head_dim=4, role="self_attention"))
    attach(host)
    lora(host, "y", 1)
    x, partners = torch.randn(2, 5, 8), torch.tensor([1, 0])
    with routed(host, Conditioning(partners=partners)):
        y = host(x)
    project = host[0]._port["joint_attention"].project
    torch.testing.assert_close(y[0], naive(host[0], x[0], x[0]) + project(naive(host[0], x[0], x[1])))
    told = Conditioning(gates={"y": torch.ones(2)}, partners=partners)
    with routed(host, told), pytest.raises(ValueError, match="by the gate of the row that looks"):
        host(x)


# More than pairs ---------------------------------------------------------------------------------


def test_several_partners_add_up_each_with_its_weight():
    host, joint, x = tokens()
    partners, weights = torch.tensor([[1, 2], [0, -1], [-1, 3], [-1, -1]]), torch.rand(4, 2)
    with routed(host, Conditioning(gates={"joint_attention": weights}, partners=partners)):
        y = host(x)
    project = host[0]._port["joint_attention"].project
    for row in range(4):
        expected = naive(host[0], x[row], x[row])
        for partner, weight in zip(partners[row].tolist(), weights[row], strict=True):
            if partner >= 0:
                expected = expected + weight * project(naive(host[0], x[row], x[partner]))
        torch.testing.assert_close(y[row], expected)


def test_three_streams_look_around_the_ring():
    host, joint, x = tokens()
    with routed(host, Conditioning(partners=torch.tensor([1, 2, 0, -1]))):
        y = host(x)
    project = host[0]._port["joint_attention"].project
    for row in range(3):
        expected = naive(host[0], x[row], x[row]) + project(naive(host[0], x[row], x[(row + 1) % 3]))
        torch.testing.assert_close(y[row], expected)


@pytest.mark.parametrize("post", ["conv", "conv_fuse"])
def test_a_pair_swapped_is_swapped(post):
    """Of a fused projection the two halves are swapped along: the row that stands first is the first."""
    host, joint, x = tokens(post=post)
    told = Conditioning(partners=torch.tensor([1, 0]))
    with routed(host, told):
        y = host(x[:2])
    if post == "conv_fuse":
        weight = host[0]._port["joint_attention"].project.weight
        weight.data = weight.data.roll((8, 8), (0, 1))
    with routed(host, told):
        torch.testing.assert_close(host(x[:2].flip(0)), y.flip(0))


def test_rows_do_not_depend_on_the_order_of_the_batch():
    host, joint, x = tokens()
    order, partners = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0, 3, 2])
    place = order.argsort()
    with routed(host, Conditioning(partners=partners)):
        y = host(x)
    with routed(host, Conditioning(partners=place[partners[order]])):
        torch.testing.assert_close(host(x[order]), y[order])


def test_a_fused_projection_sees_what_both_were_told():
    host, joint, x = tokens(post="conv_fuse")
    with routed(host, Conditioning(partners=torch.tensor([1, 0, -1, -1]))):
        y = host(x)
    told = torch.cat([naive(host[0], x[0], x[1]), naive(host[0], x[1], x[0])], dim=-1)
    first, second = host[0]._port["joint_attention"].project(told).chunk(2, dim=-1)
    torch.testing.assert_close(y[0], naive(host[0], x[0], x[0]) + first)
    torch.testing.assert_close(y[1], naive(host[0], x[1], x[1]) + second)
    torch.testing.assert_close(y[2], naive(host[0], x[2], x[2]))
    several = Conditioning(partners=torch.tensor([[1, 2], [0, 2], [0, 1], [0, 1]]))
    with routed(host, several), pytest.raises(ValueError, match="is for pairs"):
        host(x)


def test_masks_go_with_the_tokens_they_are_of():
    host = nn.Sequential(TokenAttention(8, num_heads=2))
    attach(host)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, False, False]])
    with routed(host, Conditioning(partners=torch.tensor([1, 0]))):
        y = host[0](x, mask=mask)
    project = host[0]._port["joint_attention"].project
    torch.testing.assert_close(y[0], naive(host[0], x[0], x[0]) + project(naive(host[0], x[0], x[1, :2])))
    torch.testing.assert_close(y[1], naive(host[0], x[1], x[1, :2]) + project(naive(host[0], x[1], x[0])))


# Whole networks ----------------------------------------------------------------------------------


def network(kind):
    torch.manual_seed(0)
    if kind == "dit":
        net = DiT(1, 1, width=16, depth=1, num_heads=2, positions="rotary")
    else:
        transformers = {"context_dim": 6, "use_spatial_transformer": True} if kind == "unet with text" else {}
        net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, norm_groups=4, **transformers)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3) if not parameter.any() else None
    return net


KINDS = ["unet", "dit"]


@pytest.mark.parametrize("post", ["conv", "conv_fuse"])
@pytest.mark.parametrize("kind", KINDS)
def test_attached_it_changes_nothing_and_detached_nothing_is_left(kind, post):
    net = network(kind)
    x, c_noise, keys = torch.randn(4, 1, 8, 8), torch.zeros(4), list(net.state_dict())
    plain = net(x, c_noise)
    joint = JointAttention(post=post).attach(net)
    with routed(net, Conditioning(partners=torch.tensor([1, 0, -1, 2]))):
        assert torch.equal(net(x, c_noise), plain)
    for parameter in joint.parameters():
        nn.init.normal_(parameter)
    for told in (None, Conditioning(partners=torch.full((4,), -1))):
        with routed(net, told):
            assert torch.equal(net(x, c_noise), plain)
    with routed(net, Conditioning(partners=torch.tensor([1, 0, -1, 2]))), joint.scaled(0.0):
        assert torch.equal(net(x, c_noise), plain)
    joint.detach()
    assert torch.equal(net(x, c_noise), plain) and list(net.state_dict()) == keys


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_projection_and_the_loras_learn(kind):
    net = network(kind).requires_grad_(False)
    on = ["*.qkv"] if kind == "unet" else ["*.to_[qkv]"]
    added = [lora(net, name, i, on=on) for i, name in enumerate(("x", "y", "pair"))]
    added.append(attach(net, own=["pair"]))
    stream = torch.tensor([0.0, 1.0])
    told = Conditioning(gates={"x": 1 - stream, "y": stream}, partners=torch.tensor([1, 0]))
    with routed(net, told):
        net(torch.randn(2, 1, 8, 8), torch.zeros(2)).square().sum().backward()
    for mixin in added:
        assert all(p.grad is not None and p.grad.any() for p in mixin.parameters()), mixin
    assert all(p.grad is None for name, p in net.named_parameters() if not is_port_key(name))


def test_recomputed_activations_have_the_terms_apart():
    grads = []
    for checkpointing in (False, True):
        net = network("dit")
        net.checkpointing = checkpointing
        added = [lora(net, "y", 1), lora(net, "pair", 2), attach(net, own=["pair"])]
        for parameter in added[2].parameters():
            nn.init.eye_(parameter)
        told = Conditioning(gates={"y": torch.tensor([0.0, 1.0])}, partners=torch.tensor([1, 0]))
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with routed(net, told):
            y = net(x, torch.zeros(2))
        y.square().sum().backward()
        grads.append([p.grad for mixin in added for p in mixin.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_other_partners_and_gates_are_the_same_graph(kind):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net, counter = network(kind), CompileCounter()
    on = ["*.qkv"] if kind == "unet" else ["*.to_[qkv]"]
    lora(net, "y", 0, on=on)
    lora(net, "pair", 1, on=on)
    joint = attach(net, own=["pair"])
    x, c_noise = torch.randn(4, 1, 8, 8), torch.zeros(4)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for partners, gate, scale in (([1, 0, 3, 2], [0, 1, 0, 1], 1.0), ([-1, 3, -1, 1], [1, 0.5, 0, 1], 0.3)):
        told = Conditioning(gates={"y": torch.tensor(gate).float()}, partners=torch.tensor(partners))
        joint.scale = scale
        with torch.no_grad(), routed(net, told):
            torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_copies_and_files_hold_all_of_it(tmp_path):
    net = network("dit")
    lora(net, "pair", 1)
    joint = attach(net, own=["pair"], post="conv_fuse", scale=0.7)
    x, c_noise, told = torch.randn(2, 1, 8, 8), torch.zeros(2), Conditioning(partners=torch.tensor([1, 0]))

    def said(net):
        with torch.no_grad(), routed(net, told):
            return net(x, c_noise)

    assert torch.equal(said(copy.deepcopy(net)), said(net))
    assert torch.equal(said(pickle.loads(pickle.dumps(net))), said(net))
    joint.save(tmp_path / "joint.safetensors")
    before = said(net)
    joint.detach()
    again = load_mixin(tmp_path / "joint.safetensors").attach(net)
    again.scale = 0.7
    assert again.post == "conv_fuse" and again.own == ["pair"] and torch.equal(said(net), before)


# What cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partners, said",
    [
        ([1, 0, 3], "given for 3 of 4 rows: row 3 has none. Give -1"),
        ([1, 0, 3, 2, 4], "given for 5 rows of 4: there is no row 4"),
        ([1, 0, 7, -1], "the partner of row 2 is 7; there are rows 0 to 3, and -1 is none"),
        ([1, 0, -2, -1], "the partner of row 2 is -2"),
        ([1, 0, 2, -1], "row 2 is its own partner"),
        ([[1, 2], [0, 9], [-1, -1], [-1, -1]], r"the partner of row 1 is \[0, 9\]"),
        ([1.0, 0.0, float("nan"), -1.0], "they are torch.float32"),
    ],
)
def test_partners_that_are_none_are_named_with_their_row(partners, said):
    host, joint, x = tokens()
    with pytest.raises(ValueError, match=said), routed(host, Conditioning(partners=torch.tensor(partners)), rows=4):
        host(x)
