"""How fast a sampler's error falls with its step, measured against exact flows."""

import functools
import math

import torch
from oracles import noise, two_gaussians

from vdiff.denoisers import GaussianMixtureDenoiser
from vdiff.process import EDMSchedule, ExplicitDiscretizer

START, STOP = 10.0, 0.1


def three_gaussians():
    """Two dimensions, three humps of unlike shape."""
    means = torch.tensor([[-0.5, 0.3], [0.6, 0.4], [0.1, -0.7]])
    return GaussianMixtureDenoiser(means, torch.tensor([[0.3, 0.2], [0.25, 0.4], [0.35, 0.3]]))


PROBLEMS = {"two_gaussians": (two_gaussians(), 1), "three_gaussians": (three_gaussians(), 2)}


def levels(num_steps, has_history):
    """Even in log(sigma / alpha); ever finer steps at the start stand for an accurate history."""
    step = math.log(START / STOP) / num_steps
    fine = [step * 2.0**-k for k in range(18, 0, -1)] if has_history else []
    return ExplicitDiscretizer(ratios=[START * math.exp(-u) for u in (0.0, *fine, *_even(step, num_steps))])


def _even(step, num_steps):
    return [step * k for k in range(1, num_steps + 1)]


@functools.cache
def exact(problem):
    oracle, dim = PROBLEMS[problem]
    ends = EDMSchedule().at_ratio(torch.tensor([START, STOP], dtype=torch.float64))
    return oracle.flow(START * noise(16, dim), ends[0], ends[1])


def error(solver, schedule, problem, num_steps, has_history=True):
    """Root mean square distance to the exact flow, in units of the data."""
    oracle, dim = PROBLEMS[problem]
    visited = levels(num_steps, has_history)
    sampler = solver(num_steps=visited.num_steps, discretizer=visited)
    x = sampler(oracle, schedule, noise(16, dim))
    return (x / sampler.levels(schedule).alpha[-1] - exact(problem)).pow(2).mean().sqrt().item()


def order(solver, schedule, problem, num_steps, has_history=True):
    """The measured order between ``num_steps`` and twice as many."""
    coarse, fine = (error(solver, schedule, problem, n, has_history) for n in (num_steps, 2 * num_steps))
    return math.log2(coarse / fine)
