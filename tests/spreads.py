"""The spread of what a stochastic sampler makes, exactly: no number is drawn."""

import torch

from vdiff.denoisers import GaussianDenoiser
from vdiff.process import EDMSchedule, KarrasDiscretizer
from vdiff.registry import isolated
from vdiff.samplers import Node, NoiseSource

STD = 0.5

with isolated():

    class OneHotNoiseSource(NoiseSource):
        """Draw ``n`` is 1 in row ``n + 1`` and 0 elsewhere; row 0 is for the start."""

        def bind(self, seeds, like):
            def draw(number):
                out = torch.zeros_like(like)
                out[number + 1] = 1.0
                return out

            return draw


def spread_error(solver, num_steps, std=STD):
    """Percent by which the spread of the samples is off, exactly: for Gaussian data all is linear in the noise."""
    schedule = EDMSchedule()
    sampler = solver(num_steps=num_steps, discretizer=KarrasDiscretizer(), noise_source=OneHotNoiseSource(), init=std)
    rows = 2 * len(list(sampler.plan(Node.of(sampler.levels(schedule)), schedule))) + 2
    start = torch.zeros(rows, 1, dtype=torch.float64)
    start[0] = 1
    x = sampler(GaussianDenoiser(0.0, std), schedule, start, seeds=range(rows))
    return 100 * (x.pow(2).sum().sqrt().item() / std - 1)
