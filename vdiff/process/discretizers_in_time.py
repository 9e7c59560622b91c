"""More discretizers that place their levels in time: under the names of the interfaces, and for flow models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdiff.process.discretizers import Discretizer, LeadingDiscretizer, TimeDiscretizer, end_with_data
from vdiff.process.discretizers_in_ratio import beta_quantile
from vdiff.process.level import HOST, NoiseLevel
from vdiff.process.schedules import NoiseSchedule


class NormalDiscretizer(TimeDiscretizer):
    """``normal`` of the interfaces: ``linspace`` without rounding, so levels lie between the rows of a table.

    Args:
        end: On continuous schedules, the last time before data.
        num_rows: Rows to count in.
    """

    def __init__(self, end: float = 1e-3, num_rows: int | None = None) -> None:
        super().__init__(num_rows)
        self.end = end

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, self.end, num_steps, **HOST)

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return torch.linspace(num_rows - 1, 0, num_steps, **HOST)


class SGMUniformDiscretizer(TimeDiscretizer, name="sgm_uniform"):
    """``sgm_uniform`` of the interfaces: as ``normal`` with a step more, whose last level is replaced by data.

    Args:
        num_rows: Rows to count in.
    """

    def times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, **HOST)[:-1]

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return torch.linspace(num_rows - 1, 0, num_steps + 1, **HOST)[:-1]


class SimpleDiscretizer(TimeDiscretizer):
    """``simple`` of the interfaces: rows counted from the noisy end, rounded towards it. Nearly ``trailing``.

    Args:
        num_rows: Rows to round to.
    """

    def times(self, num_steps: int) -> Tensor:
        return 1 - torch.arange(num_steps, **HOST) / num_steps

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return num_rows - 1 - torch.arange(num_steps, **HOST).mul(num_rows).div(num_steps).floor()


class DDIMUniformDiscretizer(LeadingDiscretizer, name="ddim_uniform"):
    """``ddim_uniform`` of the interfaces: ``leading`` with an offset of one row, as latent diffusion has it.

    Exactly as many steps as are asked for, where the published loop makes one more if they do not divide the table.

    Args:
        num_rows: Rows to round to.
    """

    def __init__(self, num_rows: int | None = None) -> None:
        super().__init__(1, num_rows)

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return super().rows(num_steps, num_rows).clamp(max=num_rows - 1)


class BetaIndexDiscretizer(TimeDiscretizer):
    """Quantiles of a beta distribution over the rows of a table: both ends of the walk are crowded.

    Args:
        a, b: Of the distribution.
        num_rows: Rows to round to.

    References:
        Lee et al., arXiv:2407.12173, section 4; over sigma, as diffusers has it, it is ``beta_sigma``.
    """

    def __init__(self, a: float = 0.6, b: float = 0.6, num_rows: int | None = None) -> None:
        super().__init__(num_rows)
        self.a, self.b = a, b

    def times(self, num_steps: int) -> Tensor:
        return beta_quantile(1 - torch.arange(num_steps, **HOST) / num_steps, self.a, self.b)

    def rows(self, num_steps: int, num_rows: int) -> Tensor:
        return (self.times(num_steps) * (num_rows - 1)).round()


class LinearQuadraticDiscretizer(Discretizer):
    r"""Small even steps in time at first, then quadratically longer ones: for video models on flow schedules.

    After step i of n, the time is :math:`1 - \theta i / L - q\,(i - L)_+^2`, with q such that it ends at 0.

    Args:
        threshold: The :math:`\theta` above: how much time the first, even steps take.
        linear_steps: The L above; by default half of them.

    References:
        Polyak et al., arXiv:2410.13720 (Movie Gen), section 3.4.2.
    """

    def __init__(self, threshold: float = 0.025, linear_steps: int | None = None) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"LinearQuadraticDiscretizer: threshold must lie in (0, 1), got {threshold}.")
        self.threshold, self.linear_steps = threshold, linear_steps

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        linear = max(num_steps // 2, 1) if self.linear_steps is None else self.linear_steps
        if num_steps == 1:
            return schedule(torch.tensor([1.0, 0.0], **HOST))
        if not 1 <= linear < num_steps:
            raise ValueError(
                f"LinearQuadraticDiscretizer: linear_steps must lie in 1 ... {num_steps - 1} for {num_steps} steps, "
                f"got {linear}."
            )
        step = torch.arange(num_steps, **HOST)
        bend = (linear - self.threshold * num_steps) / (linear * (num_steps - linear) ** 2)
        spent = self.threshold * step / linear + bend * (step - linear).clamp(min=0) ** 2
        return schedule(end_with_data(1 - spent))


class FlowDiscretizer(Discretizer):
    r"""Even in the time :math:`\tau = \sigma / (\alpha + \sigma)` of the straight flow, then shifted and stretched.

    The shift multiplies the ratio :math:`\sigma/\alpha` by s. It is measured from the straight flow whatever the
    schedule's own shift is, so a model trained with one is never shifted twice.

    Args:
        shift: The s above.
        tokens: Size of what is sampled in tokens of the network. If given, :math:`\log s` is not that of ``shift``
            but lies on the line from ``mu_low`` at ``tokens_low`` to ``mu_high`` at ``tokens_high``.
        terminal: If given, time before data, stretched so that the last level lies there.
        tokens_low, tokens_high, mu_low, mu_high: Of the line; by default those of FLUX.

    References:
        Esser et al., arXiv:2403.03206, eq. 23; FLUX (the line); HaCohen et al., arXiv:2501.00103 (the stretch).
    """

    def __init__(
        self,
        shift: float = 1.0,
        tokens: int | None = None,
        terminal: float | None = None,
        tokens_low: int = 256,
        tokens_high: int = 4096,
        mu_low: float = 0.5,
        mu_high: float = 1.15,
    ) -> None:
        if shift <= 0:
            raise ValueError(f"FlowDiscretizer: shift must be positive, got {shift}.")
        if terminal is not None and not 0 < terminal < 1:
            raise ValueError(f"FlowDiscretizer: terminal must lie in (0, 1), got {terminal}.")
        if tokens is not None:
            slope = (mu_high - mu_low) / (tokens_high - tokens_low)
            shift = math.exp(mu_low + slope * (tokens - tokens_low))
        self.shift, self.terminal = shift, terminal

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> NoiseLevel:
        if math.isfinite(schedule(1.0).ratio.item()):
            raise ValueError(
                f"FlowDiscretizer: begins at pure noise, which {type(schedule).__name__} never reaches. "
                "Use karras, exponential or trailing."
            )
        even = 1 - torch.arange(num_steps, **HOST) / num_steps
        time = self.shift * even / (1 + (self.shift - 1) * even)
        if self.terminal is not None and num_steps > 1:  # one step begins at pure noise, and nowhere else
            time = 1 - (1 - time) * (1 - self.terminal) / (1 - time[-1])
        return schedule.at_ratio(end_with_data(time / (1 - time)))
