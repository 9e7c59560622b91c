"""One path of noise per sample: its increments, and samples that stay when the number of steps changes."""

import functools
import math

import pytest
import torch
from oracles import noise, one_gaussian, two_gaussians

from vdiff.process import EDMSchedule, UniformDiscretizer
from vdiff.samplers import (
    BrownianNoiseSource,
    DDIMSampler,
    DPMpp2MSDESampler,
    DPMppSDESampler,
    HeunSampler,
    Node,
    Stage,
)
from vdiff.samplers.noise import spans

SEEDS = list(range(16))


def increments(spans, rows=400):
    like = torch.zeros(rows, 8, dtype=torch.float64)
    draw = BrownianNoiseSource().along(dict(enumerate(spans))).bind(range(rows), like)
    return [draw(i) for i in range(len(spans))]


def test_increments_are_standard_and_those_of_separate_stretches_independent():
    drawn = increments([(math.inf, 5.0), (5.0, 2.0), (2.0, 1.9), (1.9, 0.01)])
    for i, a in enumerate(drawn):
        assert abs(a.std().item() - 1) < 0.05 and abs(a.mean().item()) < 0.06
        assert all(abs((a * b).mean().item()) < 0.06 for b in drawn[:i])


def test_increments_add_up_in_the_clock_of_the_signal_to_noise_ratio():
    whole, first, second = increments([(5.0, 1.0), (5.0, 2.0), (2.0, 1.0)], rows=4)
    clock = lambda a, b: b**-2 - a**-2  # noqa: E731
    want = first * math.sqrt(clock(5, 2) / clock(5, 1)) + second * math.sqrt(clock(2, 1) / clock(5, 1))
    assert (whole - want).abs().max() < 1e-3  # places are rounded


@pytest.mark.parametrize(
    "solver",
    [
        DPMpp2MSDESampler,
        DPMppSDESampler,
        functools.partial(DDIMSampler, eta=1.0),
        # Noise in the last step as well.
        functools.partial(DDIMSampler, eta=1.0, discretizer=UniformDiscretizer(start=1.0, stop=0.6)),
    ],
)
def test_a_sample_hardly_changes_with_the_number_of_steps(solver):
    """With independent noise it is another sample every time."""
    oracle, moved = two_gaussians(), {}
    for name, source in (("path", BrownianNoiseSource()), ("independent", None)):
        samples = [
            solver(num_steps=n, noise_source=source)(oracle, EDMSchedule(), noise(16, 1), seeds=SEEDS)
            for n in (60, 120)
        ]
        moved[name] = (samples[0] - samples[1]).abs().median().item()
    assert moved["path"] < 0.05 and moved["independent"] > 4 * moved["path"]


def test_noise_is_of_its_own_step_and_of_all_its_calls_since_the_noise_before():
    a, b, c = Node.of(EDMSchedule().at_ratio(torch.tensor([4.0, 2.0, 1.0]).double()))
    still, noisy = {"x": 0.5, "x0": 0.5}, {"x": 0.5, "x0": 0.4, "noise": 0.1}
    assert spans([Stage(a, still), Stage(b, noisy)], c) == {3: (b.ratio, c.ratio)}
    assert spans([Stage(a, still, ends_step=False), Stage(b, noisy)], c) == {3: (a.ratio, c.ratio)}
    assert spans([Stage(a, noisy, ends_step=False), Stage(b, noisy)], c) == {
        1: (a.ratio, b.ratio),
        3: (b.ratio, c.ratio),
    }


def test_a_sample_does_not_know_its_batch():
    sampler, start = DPMppSDESampler(5, noise_source=BrownianNoiseSource()), noise(8).float()
    whole = sampler(one_gaussian(), EDMSchedule(), start, seeds=range(8))
    part = sampler(one_gaussian(), EDMSchedule(), start[[5, 0]], seeds=[5, 0])
    assert torch.equal(whole[[5, 0]], part)


def test_noise_that_goes_back_up_is_of_no_path():
    sampler = HeunSampler(5, churn=2.0, noise_source=BrownianNoiseSource())
    assert torch.isfinite(sampler(one_gaussian(), EDMSchedule(), noise(16), seeds=SEEDS)).all()


def test_a_path_needs_a_walk_and_a_seed_per_sample():
    with pytest.raises(ValueError, match="only a walk knows"):
        BrownianNoiseSource().bind([0], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="3 seeds for 16 samples"):
        DPMpp2MSDESampler(3, noise_source=BrownianNoiseSource())(
            one_gaussian(), EDMSchedule(), noise(16), seeds=[1, 2, 3]
        )
