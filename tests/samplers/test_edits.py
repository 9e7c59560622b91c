"""Edits of the clean sample, and callbacks that look, change and stop."""

import pytest
import torch
from every_sampler import is_deterministic, make, names
from oracles import noise, one_gaussian, two_gaussians

from vdiff.process import CosineSchedule, EDMSchedule, FlowSchedule
from vdiff.samplers import (
    Clamp,
    DDIMSampler,
    DDPMSampler,
    DPMpp2MSampler,
    EarlyStop,
    EulerAncestralSampler,
    HeunSampler,
    Inpainting,
    in_turn,
)

SCHEDULES = {"edm": EDMSchedule(), "cosine": CosineSchedule(), "flow": FlowSchedule(shift=3.0)}
MASK = torch.tensor([1.0, 0.0], dtype=torch.float64)  # the second number is known


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("name", names())
def test_what_is_known_stays_on_its_straight_line_and_ends_at_itself(name, schedule):
    """With deterministic samplers at every level alpha x0 + sigma noise, with the one noise of the start."""
    known, z = one_gaussian().draw((8, 2), seed=5), noise(8)
    sampler = make(name, 6, schedule=schedule)
    options = {"seeds": range(8), "x0": known, "edit": Inpainting(known, MASK)}
    steps = list(sampler.steps(one_gaussian(), schedule, z, **options))
    if is_deterministic(sampler, schedule):
        levels = sampler.levels(schedule)
        for step, alpha, sigma in zip(steps, levels.alpha[1:], levels.sigma[1:], strict=True):
            assert (step.x - (alpha * known + sigma * z))[:, 1].abs().max() < 1e-9  # of 80: rounding
    assert (steps[-1].x - known)[:, 1].abs().max() < 1e-9
    assert (steps[-1].x - known)[:, 0].abs().max() > 0.01


def test_the_known_parts_of_a_stochastic_walk_have_the_spread_of_their_level():
    rows = 4000
    known, z = torch.full((rows, 2), 0.7, dtype=torch.float64), noise(rows)
    sampler, schedule = EulerAncestralSampler(6), CosineSchedule()
    walk = sampler.steps(one_gaussian(), schedule, z, seeds=range(rows), x0=known, edit=Inpainting(known, MASK))
    levels = sampler.levels(schedule)
    for step, alpha, sigma in zip(walk, levels.alpha[1:-1], levels.sigma[1:-1], strict=False):
        assert (step.x[:, 1] - 0.7 * alpha).std().item() == pytest.approx(sigma.item(), rel=0.05)  # 4,000 samples


def test_what_is_made_anew_knows_what_is_known():
    """A denoiser that sees both numbers draws the unknown one to the hump of the known one; by chance it would be
    half of them. That it is not all is the limit of the method: the unknown is noised independently of the known."""
    oracle = two_humps()
    known = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64).repeat(64, 1)
    out = HeunSampler(30)(oracle, CosineSchedule(), noise(128), x0=known, edit=Inpainting(known, MASK))
    agree = (out[:, 0].sign() == known[:, 1].sign()).double().mean()
    assert agree > 0.7


def two_humps():
    from vdiff.denoisers import GaussianMixtureDenoiser

    means = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    return GaussianMixtureDenoiser(means, torch.full((2, 2), 0.2))


def test_clamping_keeps_the_end_within_the_range():
    out = DDIMSampler(6)(one_gaussian(), EDMSchedule(), noise(), edit=Clamp(-0.5, 0.5))
    free = DDIMSampler(6)(one_gaussian(), EDMSchedule(), noise())
    assert out.abs().max() <= 0.5 < free.abs().max()
    with pytest.raises(ValueError, match="low < high"):
        Clamp(1.0, -1.0)


def test_edits_come_in_turn_and_know_the_level_and_the_call():
    seen = []

    def watch(x0, node, call):
        seen.append((node.sigma, call))
        return x0

    known = torch.full((64, 2), 3.0, dtype=torch.float64)
    edit = in_turn(Inpainting(known, MASK), Clamp(), watch)
    out = HeunSampler(3)(one_gaussian(), EDMSchedule(), noise(), edit=edit)
    assert torch.equal(out[:, 1], torch.ones(64, dtype=torch.float64))
    assert [call for _, call in seen] == list(range(5)) and seen[0][0] == 80.0


def test_an_edit_is_part_of_the_graph():
    from torch._dynamo.testing import CompileCounter
    from walks import Idle

    torch._dynamo.reset()
    counter, start = CompileCounter(), torch.randn(3, 4)
    walk = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    edit = in_turn(Inpainting(torch.ones(3, 4), torch.tensor([1.0, 0, 0, 1])), Clamp())
    for schedule in (EDMSchedule(), EDMSchedule(sigma_max=40.0)):
        run = DPMpp2MSampler(5).bind(Idle(), schedule, start, edit=edit)
        with torch.no_grad():
            assert (walk(run, start) - run(start)).abs().max() < 1e-5
    assert counter.frame_count == 1


# Callbacks ---------------------------------------------------------------------------------------


def test_a_callback_that_returns_nothing_changes_nothing():
    want = DPMpp2MSampler(6)(one_gaussian(), EDMSchedule(), noise())
    assert torch.equal(DPMpp2MSampler(6)(one_gaussian(), EDMSchedule(), noise(), callback=lambda step: None), want)


def test_a_state_that_a_callback_returns_is_walked_on_from():
    """With a solver without memory, exactly as if the walk had begun there."""
    oracle, schedule, sampler = two_gaussians(), CosineSchedule(), DDIMSampler(4)
    other = noise(64, 1, seed=7)
    got = sampler(oracle, schedule, noise(64, 1), callback=lambda step: other if step.index == 1 else None)
    x = other
    for step in list(sampler.steps(oracle, schedule, noise(64, 1)))[2:]:
        level = schedule(torch.full((64,), step.stage.node.t, dtype=torch.float64))
        keep, gain = step.stage.update["x"], step.stage.update["x0"]
        x = keep * x + gain * oracle(x, level).x0
    assert (got - x).abs().max() < 1e-12
    last = sampler(oracle, schedule, noise(64, 1), callback=lambda step: other if step.index == 3 else None)
    assert torch.equal(last, other)


@pytest.mark.parametrize("progress", [False, True])
def test_a_callback_may_stop_with_what_it_saw(progress):
    seen = []

    def stop(step):
        seen.append(step)
        if step.index == 2:
            raise EarlyStop

    out = DPMpp2MSampler(6)(one_gaussian(), EDMSchedule(), noise(), callback=stop, progress=progress)
    assert len(seen) == 3 and torch.equal(out, seen[-1].x0)


def test_ddpm_clips_what_the_network_says():
    z, schedule, narrow = noise(8), CosineSchedule(), (-0.2, 0.3)
    walk = lambda sampler, **options: sampler(one_gaussian(), schedule, z, seeds=range(8), **options)  # noqa: E731
    clipped = walk(DDPMSampler(6, clip=narrow))
    assert torch.equal(clipped, walk(DDPMSampler(6), edit=Clamp(*narrow)))
    assert not torch.equal(clipped, walk(DDPMSampler(6)))
    assert clipped.min() >= -0.2 and clipped.max() <= 0.3  # into data no noise is added


def test_an_edit_has_the_last_word_over_the_clip():
    known, z = torch.full((8, 2), 0.7, dtype=torch.float64), noise(8)
    sampler = DDPMSampler(6, clip=(-0.2, 0.3))
    x = sampler(one_gaussian(), CosineSchedule(), z, seeds=range(8), x0=known, edit=Inpainting(known, MASK))
    assert (x[:, 1] - 0.7).abs().max() < 1e-12 and x[:, 0].max() <= 0.3
