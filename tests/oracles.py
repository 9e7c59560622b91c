"""Exact problems to hold solvers against."""

import torch

from vdiff.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from vdiff.process import CosineSchedule, Discretizer, EDMSchedule, FlowSchedule, NoiseLevel, NoiseSchedule

SCHEDULES = {
    "edm": EDMSchedule(sigma_max=80.0),
    "cosine": CosineSchedule(),
    "flow": FlowSchedule(),
    "flow_shift_3": FlowSchedule(shift=3.0),
}


class LogRatioDiscretizer(Discretizer):
    """Even in log(sigma / alpha) between two ratios, without an end at data: smooth grids to measure orders on."""

    def __init__(self, start: float = 20.0, stop: float = 0.05) -> None:
        self.start, self.stop = start, stop

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        ends = torch.tensor([self.start, self.stop], dtype=torch.float64).log()
        return schedule.at_ratio(torch.linspace(*ends.tolist(), num_steps + 1, dtype=torch.float64).exp())


def two_gaussians():
    """One dimension, two humps: the flow bends to one of them."""
    return GaussianMixtureDenoiser(
        torch.tensor([[-0.6], [0.5]]), torch.tensor([[0.15], [0.3]]), torch.tensor([0.4, 0.6])
    )


def one_gaussian():
    return GaussianDenoiser(mean=[0.3, -0.2], std=[0.7, 0.1])


def noise(rows=64, dim=2, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
