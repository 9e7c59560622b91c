import math

import pytest
import torch
from torch import nn

from vdiff.registry import build


def rates(name, num_steps=10, **options):
    """The rate that the optimizer has in each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = build({"type": name, **options}, "lr_schedule")(optimizer, num_steps)
    out = []
    for _ in range(num_steps):
        out.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    return out


def test_the_formulas():
    assert rates("constant") == [1.0] * 10
    assert rates("linear", final=0.5) == pytest.approx([1 - 0.05 * s for s in range(10)])
    assert rates("cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])
    # EDM2: lr_ref / sqrt(max(t / t_ref, 1))
    assert rates("inverse_sqrt", decay_from=4) == pytest.approx([1 / math.sqrt(max(s / 4, 1)) for s in range(10)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_warmup_rises_in_a_straight_line_and_never_starts_at_zero(name):
    assert rates(name, warmup=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_decay_runs_over_what_the_warmup_leaves():
    assert rates("linear", num_steps=8, warmup=4)[4:] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates("cosine", num_steps=8, warmup=4, final=0.1)[4] == 1.0
