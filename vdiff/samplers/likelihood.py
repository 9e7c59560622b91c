r"""How likely data is under the probability flow: the change of variables along it, solved with adaptive steps.

With the flow :math:`dy/du = f(y, u)` from data to noise, :math:`\log p(y_0) = \log p(y_1) + \int \nabla\cdot f\,du`
(Chen et al., arXiv:1806.07366; Song et al., arXiv:2011.13456, section 4.3). Solved in the angle
:math:`\theta = \operatorname{atan}(r / \sigma_d)`, where the state
keeps its size and its prior is the standard Gaussian.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, NoiseSchedule, normal, upload
from vdiff.samplers.adaptive import TSIT5, Controller, State, integrate
from vdiff.samplers.guiders import Guider
from vdiff.samplers.row_flow import AngleAxis, RowFlow

Trace = Literal["rademacher", "gaussian", "exact"]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What :func:`log_likelihood` found, for B rows of d numbers.

    Attributes:
        nats: Logarithm of the density, ``(B,)``.
        dim: The d above.
        latent: Where the flow takes the data: standard Gaussian if the model is right, ``(B, ...)``.
        num_calls: Network calls, each with its gradient.
    """

    nats: Tensor
    dim: int
    latent: Tensor
    num_calls: int

    @property
    def bits_per_dim(self) -> Tensor:
        """``-nats / (d log 2)``, ``(B,)``: of the values as given. Of pixels with 256 values in [-1, 1]: 7 more."""
        return -self.nats / (self.dim * math.log(2.0))


def log_likelihood(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    cond: Conditioning | None = None,
    *,
    guider: Guider | None = None,
    seeds: Sequence[int] | None = None,
    trace: Trace = "rademacher",
    num_probes: int = 1,
    sigma_min: float = 0.002,
    sigma_data: float = 0.5,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_steps: int = 1000,
) -> Likelihood:
    """The log-density of data under the probability flow of a guided denoiser.

    It is the density of data with noise of ``sigma_min`` added, and at the other end the state is taken to be
    Gaussian with the spread of noise and data together, which pure noise is exactly.

    Args:
        denoiser, schedule: What was trained.
        x0: Data in the space of the denoiser, ``(B, ...)``.
        cond, guider: As when sampling.
        seeds: One per row, for the probes; a row's result does not depend on the batch around it.
        trace: How the divergence is found: by probes (Hutchinson), ``rademacher`` of less variance than
            ``gaussian``; or ``exact``, at one gradient per number of a row.
        num_probes: Probes per row, at one gradient each; the estimate of nats is unbiased for any.
        sigma_min: Ratio sigma / alpha at which the data is put; on a table at least that of its first row.
        sigma_data: Spread of the data.
        rtol, atol: Error of a step, of the state and of the nats per dimension.
        max_steps: Attempts at most.
    """
    if trace != "exact" and (seeds is None or len(seeds) != len(x0)):
        raise ValueError(f"log_likelihood: give one seed per row, seeds=[...] of {len(x0)}, or trace='exact'.")
    if num_probes < 1:
        raise ValueError(f"log_likelihood: num_probes must be at least 1, got {num_probes}.")
    if schedule.num_rows is not None:
        sigma_min = max(sigma_min, schedule(1 / schedule.num_rows).ratio.item())
    ends = schedule.at_ratio(torch.tensor([sigma_min, schedule(1.0).ratio.item()], dtype=torch.float64, device="cpu"))
    denoiser.check(ends, "log_likelihood")
    x = x0.detach().to(torch.promote_types(x0.dtype, torch.float32))
    axis, dim = AngleAxis(sigma_data), x[0].numel()
    flow = RowFlow(denoiser, schedule, axis, x, cond, guider, ends=ends)
    probes = _probes(x, trace, seeds, num_probes)
    shrink = (ends.alpha[0] / axis.scale(ends)[0]).item()

    def field(place: Tensor, state: State) -> State:
        """The slope of the state, and its divergence per dimension."""
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            slope = flow.slope(place, y)
            total = torch.zeros(len(y), dtype=y.dtype, device=y.device)
            for i, probe in enumerate(probes):
                (pulled,) = torch.autograd.grad(slope, y, probe.expand_as(y), retain_graph=i + 1 < len(probes))
                total = total + (pulled * probe).flatten(1).sum(1)
        share = 1 if trace == "exact" else len(probes)
        return slope.detach(), total / (share * dim)

    begin, end = axis.place(ends).tolist()
    state = (x * shrink, x.new_zeros(len(x)))
    controller = Controller(TSIT5.order, first=0.05)
    walk = integrate(field, state, begin, end, TSIT5, controller, rtol, atol, max_steps, "log_likelihood")
    (last,) = deque(walk, maxlen=1)
    latent, gained = last.state
    prior = -0.5 * (latent.pow(2).flatten(1).sum(1) + dim * math.log(2 * math.pi))
    return Likelihood(prior + dim * (gained + math.log(shrink)), dim, latent, last.num_calls)


def _probes(x: Tensor, trace: Trace, seeds: Sequence[int] | None, num_probes: int) -> list[Tensor]:
    """Tensors ``(B, ...)``, or the axes one by one, ``(1, ...)``."""
    if trace == "exact":
        return list(torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:]))
    assert seeds is not None
    drawn = [
        torch.stack([normal(x.shape[1:], "likelihood", seed, number) for seed in seeds]) for number in range(num_probes)
    ]
    if trace == "rademacher":
        drawn = [torch.where(probe >= 0, 1.0, -1.0) for probe in drawn]
    return [upload(probe.to(x.dtype), x.device) for probe in drawn]
