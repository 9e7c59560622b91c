"""What a call costs, against counts by hand and by papers."""

import pytest
import torch
from torch import nn

from vdiff.evaluation import count_costs, summary_table
from vdiff.hooks import attached
from vdiff.mixins import LoRA
from vdiff.networks import DiT, TokenAttention, UNet
from vdiff.process import Conditioning

SDXL = dict(
    in_channels=4, out_channels=4, channels=320, channel_mult=(1, 2, 4), attention_factors=(2, 4), head_dim=64,
    transformer_depth=(1, 2, 10), context_dim=2048, linear_projection=True, num_classes="sequential", vector_dim=2816,
)  # fmt: skip
both_devices = pytest.mark.parametrize("device", ["cpu", "meta"])


def perceptron(device="cpu"):
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)).to(device)


def cost(module, *args):
    return count_costs(module, lambda: module(*args))


@both_devices
def test_a_perceptron_costs_what_is_counted_by_hand(device):
    costs = cost(perceptron(device), torch.randn(3, 4, device=device))
    names = [c.name for c in costs.modules]
    assert names == ["", "0", "1", "2"] and [c.depth for c in costs.modules] == [0, 1, 1, 1]
    assert [c.type for c in costs.modules] == ["Sequential", "Linear", "SiLU", "Linear"]
    assert [c.parameters for c in costs.modules] == [5 * 8 + 9 * 2, 5 * 8, 0, 9 * 2]
    first, second = 2 * 3 * 4 * 8, 2 * 3 * 8 * 2
    assert [c.flops for c in costs.modules] == [first + second, first, 0, second]
    assert [c.activations for c in costs.modules] == [24, 96, 96, 24]
    # Each layer keeps its input: 3 x 4, 3 x 8 and 3 x 8 numbers.
    assert [c.saved for c in costs.modules] == [48 + 96 + 96, 48, 96, 96]
    # Backward, the first layer needs no gradient of its input.
    assert costs.training_flops == (first + second) + first + 2 * second
    assert (costs.weights, costs.gradients) == (4 * 58, 4 * 58)


def test_what_is_frozen_is_not_trained_and_keeps_less():
    net = perceptron()
    net[0].requires_grad_(False)
    costs = cost(net, torch.randn(3, 4))
    assert [c.trainable for c in costs.modules] == [18, 0, 0, 18]
    assert [c.saved for c in costs.modules] == [96, 0, 0, 96]
    assert costs.gradients == 4 * 18
    frozen = cost(net.requires_grad_(False), torch.randn(3, 4))
    assert (frozen["0"].flops, frozen[""].saved, frozen.training_flops) == (192, 0, 0)


@both_devices
def test_attention_keeps_its_operands_and_no_matrix(device):
    rows, n, dim, heads = 2, 64, 32, 4
    net = TokenAttention(dim, heads).to(device)
    costs = cost(net, torch.randn(rows, n, dim, device=device))
    linear, products = 2 * rows * n * dim * dim, 2 * (2 * rows * n * n * dim)
    assert costs[""].flops == 4 * linear + products
    tokens = 4 * rows * n * dim
    kept = 5 * tokens + 4 * rows * heads * n  # x, q, k, v, the output, and a sum per query
    assert kept <= costs[""].saved <= kept + 16  # and on devices the state of a random generator
    assert costs[""].saved < 4 * rows * heads * n * n + 5 * tokens


def test_the_meta_device_counts_what_the_cpu_counts():
    torch.manual_seed(0)
    options = dict(in_channels=3, out_channels=3, width=32, depth=2, num_heads=2, context_dim=8)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = DiT(**options)
            x, c_noise = torch.randn(2, 3, 8, 8), torch.ones(2)
            cond = Conditioning(
                {"cross_attention": torch.randn(2, 5, 8)}, {"cross_attention": torch.ones(2, 5, dtype=torch.bool)}
            )
        found.append(cost(net, x, c_noise, cond))
    cpu, meta = found
    assert [(c.name, c.flops, c.activations) for c in cpu.modules] == [
        (c.name, c.flops, c.activations) for c in meta.modules
    ]
    assert cpu.training_flops == meta.training_flops
    assert cpu[""].saved == pytest.approx(meta[""].saved, rel=0.05)  # kernels keep different masks and sums


@pytest.mark.parametrize("width, depth, heads, gflops", [(384, 12, 6, 6.06), (1152, 28, 16, 118.64)])
def test_the_flops_of_dit_are_the_papers(width, depth, heads, gflops):
    """Table 4 of arXiv:2212.09748, which counts a multiplication with its addition once."""
    with torch.device("meta"):
        net = DiT(4, 8, width, depth, heads, num_classes=1001)
        x, c_noise, label = torch.randn(1, 4, 32, 32), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    costs = cost(net, x, c_noise, Conditioning({"label": label}))
    assert costs[""].flops / 2e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.slow
def test_a_network_of_billions_is_counted_without_memory():
    with torch.device("meta"):
        net = UNet(**SDXL)
        cond = Conditioning({"cross_attention": torch.randn(1, 77, 2048), "vector": torch.randn(1, 2816)})
        x = torch.randn(1, 4, 128, 128)
    costs = cost(net, x, torch.ones(1, device="meta"), cond)
    assert costs[""].parameters == 2_567_463_684
    assert costs[""].flops / 1e12 == pytest.approx(6.76, rel=0.002)  # counted on diffusers' twin
    assert costs["middle_block.1"].flops > 0 and costs[""].saved > 2**30


def test_checkpointing_keeps_less_and_computes_more():
    def counted(checkpointing):
        with torch.device("meta"):
            net = DiT(3, 3, 64, 4, 4, checkpointing=checkpointing)
            return cost(net, torch.randn(2, 3, 16, 16), torch.ones(2))

    plain, lean = counted(False), counted(True)
    assert lean["blocks"].saved < plain["blocks"].saved / 5
    assert lean[""].flops == plain[""].flops and lean["blocks.0"].activations == plain["blocks.0"].activations
    assert lean.training_flops == plain.training_flops + plain["blocks"].flops


def test_lists_cost_what_their_entries_cost():
    with torch.device("meta"):
        net = DiT(3, 3, 64, 4, 4)
        costs = cost(net, torch.randn(2, 3, 16, 16), torch.ones(2))
    blocks = [costs[f"blocks.{i}"] for i in range(4)]
    for figure in ("parameters", "flops", "activations", "saved"):
        assert getattr(costs["blocks"], figure) == sum(getattr(block, figure) for block in blocks)


@both_devices
def test_what_is_attached_counts_at_its_host(device):
    net = perceptron(device).requires_grad_(False)
    lora = LoRA(rank=2, on=["0", "2"]).attach(net)
    costs = cost(net, torch.randn(3, 4, device=device))
    assert not any("_port" in c.name for c in costs.modules)
    assert (costs["0"].parameters, costs["0"].trainable) == (40 + 2 * (4 + 8), 2 * (4 + 8))
    assert costs["0"].flops == 2 * 3 * (4 * 8 + 4 * 2 + 2 * 8)
    assert [c.mixins for c in costs.modules] == [{"lora": 2}, {"lora": 1}, {}, {"lora": 1}]
    assert "lora (2)" in summary_table(costs)
    assert attached(net) == {"lora": lora}


def test_counting_leaves_nothing_behind():
    net, x = perceptron(), torch.randn(3, 4)
    before = net(x)
    cost(net, x)
    assert torch.equal(net(x), before) and all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cost(net, torch.randn(3, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_table_is_a_tree_and_says_what_is_alike_once():
    with torch.device("meta"):
        costs = cost(DiT(3, 3, 64, 4, 4), torch.randn(2, 3, 16, 16), torch.ones(2))
    text = summary_table(costs, depth=2)
    assert all(f"\n {label} " in text for label in ("(all)", "  blocks", "    0")) and "attn1" not in text
    assert "\n     1 ... 3, each " in text  # the first keeps the embedding, which the others share
    assert f"{costs['blocks.1'].parameters:,}" in text and "mixins" not in text
    assert "attn1" in summary_table(costs, depth=3)
    assert text.splitlines()[-1].startswith("forward ")
