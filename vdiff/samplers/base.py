"""Samplers walk noise to data: a discretizer, an update rule, a guider and one executor."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import (
    Conditioning,
    Discretizer,
    ExplicitDiscretizer,
    KarrasDiscretizer,
    NoiseLevel,
    NoiseSchedule,
    TrailingDiscretizer,
)
from vdiff.registry import Registered
from vdiff.samplers.executor import Run, SamplerStep
from vdiff.samplers.guiders import Guided, Guider, NoneGuider
from vdiff.samplers.noise import IidNoiseSource, NoiseSource, spans
from vdiff.samplers.plan import Node, Stage


class Sampler(Registered, kind="sampler"):
    """A solver: override :meth:`plan`, and it runs under every schedule, parameterization and guider.

    Args:
        num_steps: Steps of the walk; a discretizer that lists its levels knows better.
        discretizer: Which levels it visits. By default ``trailing``, or ``karras`` on a schedule without a
            table that never reaches pure noise (EDM).
        noise_source: Of stochastic samplers.
        init: Spread of the start: ``sigma`` (noise alone, as EDM and k-diffusion), ``vp``
            (:math:`\\sqrt{\\alpha^2 + \\sigma^2}`, the marginal of data of unit variance) or a number, the
            standard deviation of the data, for its marginal.
    """

    def __init__(
        self,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"{type(self).__name__}: num_steps must be at least 1, got {num_steps}.")
        self.num_steps = discretizer.num_steps if isinstance(discretizer, ExplicitDiscretizer) else num_steps
        self.discretizer = discretizer
        self.noise_source = IidNoiseSource() if noise_source is None else noise_source
        self.init = init

    @abstractmethod
    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        """The network calls between these levels (``num_steps + 1`` of them), on the host in float64."""

    def levels(self, schedule: NoiseSchedule) -> NoiseLevel:
        """The levels of the walk, float64 on the host, shape ``(num_steps + 1,)``."""
        discretizer = self.discretizer
        if discretizer is None:
            is_open = schedule.num_rows is None and math.isfinite(schedule(1.0).ratio.item())
            discretizer = KarrasDiscretizer() if is_open else TrailingDiscretizer()
        return discretizer(schedule, self.num_steps)

    def bind(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        like: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Run:
        """Plan a walk for a batch like ``like``; the result, called on a start state, can be compiled.

        Raises:
            UndefinedParameterizationError: the denoiser says nothing at a level it would be asked at.
        """
        levels = Node.of(self.levels(schedule))
        stages = list(self.plan(levels, schedule))
        if (planned := sum(stage.ends_step for stage in stages)) != len(levels) - 1:
            raise ValueError(
                f"{type(self).__name__}.plan ends {planned} steps between {len(levels)} levels, which are "
                f"{len(levels) - 1} steps. Each step has one stage with ends_step=True, its last."
            )
        nodes = [stage.node for stage in stages]
        asked = NoiseLevel(*Node.table(nodes).unbind(1))
        denoiser.check(asked, type(self).__name__)
        p, q = denoiser.language.reading(asked)
        guided = Guided(denoiser, guider or NoneGuider(), nodes, cond or Conditioning(), like)
        increments = None
        if any("noise" in terms for stage in stages for terms in (stage.ask, stage.update)):
            if seeds is None:
                raise ValueError(f"{type(self).__name__} draws fresh noise: give one seed per sample (seeds=[...]).")
            increments = self.noise_source.along(spans(stages, levels[-1])).bind(seeds, like)
        readings = list(zip(p.tolist(), q.tolist(), strict=True))
        return Run(stages, guided, denoiser.language, readings, increments)

    def start(self, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
        """The start state from standard Gaussian ``noise``: scaled to the first level, float32 or float64."""
        first = Node.of(self.levels(schedule))[0]
        data_std = {"sigma": 0.0, "vp": 1.0}.get(self.init, self.init)  # type: ignore[arg-type]
        state = noise.to(torch.promote_types(noise.dtype, torch.float32))
        return state * math.hypot(first.sigma, first.alpha * float(data_std))

    @torch.no_grad()
    def steps(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        noise: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[SamplerStep]:
        """The walk from ``noise``, step by step; each carries the state and a preview of x0."""
        x = self.start(schedule, noise)
        yield from self.bind(denoiser, schedule, x, cond, guider=guider, seeds=seeds).steps(x)

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        noise: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Walk standard Gaussian ``noise`` of shape ``(B, ...)`` to data.

        Args:
            denoiser, schedule: What was trained.
            noise: The start; the state keeps its device, in float32 (float64 if the noise is).
            cond: Conditions of the B rows.
            guider: By default the plain conditional prediction.
            seeds: One per row, for samplers that draw fresh noise.
            callback: Called after every step with a :class:`SamplerStep`.
            progress: Show a progress bar.

        Returns:
            The samples, in the space of the denoiser.
        """
        walk = self.steps(denoiser, schedule, noise, cond, guider=guider, seeds=seeds)
        x = noise
        for step in _with_progress(walk, type(self).__name__) if progress else walk:
            x = step.x
            if callback is not None:
                callback(step)
        return x


def _with_progress(walk: Iterator[SamplerStep], title: str) -> Iterator[SamplerStep]:
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = None
        for step in walk:
            task = bar.add_task(title, total=step.num_steps) if task is None else task
            bar.advance(task)
            yield step
