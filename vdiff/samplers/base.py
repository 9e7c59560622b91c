"""Samplers walk noise to data: a discretizer, an update rule, a guider and one executor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.process import (
    Conditioning,
    Discretizer,
    ExplicitDiscretizer,
    NoiseLevel,
    NoiseSchedule,
    usual_discretizer,
)
from vdiff.registry import Registered
from vdiff.samplers.ends import begin_at, noise_at, state_at, upward
from vdiff.samplers.executor import EarlyStop, Edit, Run, SamplerStep
from vdiff.samplers.frames import FrameStage, along, check_frames, noise_by_frame, side_by_side
from vdiff.samplers.guided import Guided
from vdiff.samplers.guiders import Guider, NoneGuider
from vdiff.samplers.noise import IidNoiseSource, NoiseSource, spans
from vdiff.samplers.plan import Node, Stage

# Called after every step. What it returns, if anything, is the state from which the walk goes on.
Callback = Callable[[SamplerStep], Tensor | None]


class Sampler(Registered, kind="sampler"):
    """A solver: override :meth:`plan`, and it runs under every schedule, parameterization and guider.

    Args:
        num_steps: Steps of the walk; a discretizer that lists its levels knows better.
        discretizer: Which levels it visits. By default ``trailing``, or ``karras`` on a schedule without a
            table that never reaches pure noise (EDM).
        noise_source: Of stochastic samplers.
        init: Spread of a start from noise alone: ``sigma`` (as EDM and k-diffusion), ``vp``
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
        """The levels of the walk, float64 on the host: ``(num_steps + 1,)``, or by frame ``(num_steps + 1, F)``."""
        return (self.discretizer or usual_discretizer(schedule))(schedule, self.num_steps)

    def bind(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        like: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
    ) -> Run:
        """Plan a walk for a batch like ``like``; the result, called on a start state, can be compiled.

        Raises:
            UndefinedParameterizationError: the denoiser says nothing at a level it would be asked at.
        """
        columns = Node.columns(begin_at(self.levels(schedule), schedule, strength))
        return self._run(lambda nodes: self.plan(nodes, schedule), columns, denoiser, like, cond, guider, seeds, edit)

    def start(self, schedule: NoiseSchedule, noise: Tensor, x0: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The start state from standard Gaussian ``noise`` at the first level, float32 or float64.

        ``alpha * x0 + sigma * noise`` if there is an ``x0``, otherwise the noise with the spread of ``init``.
        """
        levels = begin_at(self.levels(schedule), schedule, strength)
        return state_at(levels[0], noise, x0, self.init, type(self).__name__)

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
        x0: Tensor | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
        after: SamplerStep | None = None,
    ) -> Generator[SamplerStep, Tensor | None, None]:
        """The walk from ``noise``, step by step; each carries the state and a preview of x0.

        Args:
            after: A step of the same walk to go on from, as if it had never stopped; the noise is then not looked at.

        The others are those of :meth:`__call__`.
        """
        x = self.start(schedule, noise, x0, strength) if after is None else after.x
        run = self.bind(denoiser, schedule, x, cond, guider=guider, seeds=seeds, strength=strength, edit=edit)
        yield from run.steps(x, after)

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        noise: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        seeds: Sequence[int] | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Walk standard Gaussian ``noise`` of shape ``(B, ...)`` to data.

        Args:
            denoiser, schedule: What was trained.
            noise: The start; the state keeps its device, in float32 (float64 if the noise is).
            cond: Conditions of the B rows.
            guider: By default the plain conditional prediction.
            seeds: One per row, for samplers that draw fresh noise.
            x0: Samples to begin at instead of noise alone: the start is ``alpha * x0 + sigma * noise``.
            strength: The time in (0, 1] at which the walk begins, on a table its nearest row; below it the levels
                are those of the whole walk. With ``x0``: how much is done anew (SDEdit, image to image).
            edit: ``edit(x0, node, call) -> x0`` changes what the network says of the clean sample, at every call:
                to inpaint, to clamp. See :mod:`vdiff.samplers.edits`.
            callback: Called after every step with a :class:`SamplerStep`; a tensor that it returns takes the place
                of the state, and :class:`EarlyStop` ends the walk with the clean sample as last seen.
            progress: Show a progress bar.

        Returns:
            The samples, in the space of the denoiser.
        """
        walk = self.steps(
            denoiser, schedule, noise, cond, guider=guider, seeds=seeds, x0=x0, strength=strength, edit=edit
        )
        x, changed = noise, None
        with _progress_bar(type(self).__name__) if progress else nullcontext() as advance:
            while True:
                try:
                    step = walk.send(changed)
                except StopIteration:
                    return x
                x, changed = step.x, None
                if advance is not None:
                    advance(step)
                if callback is not None:
                    try:
                        changed = callback(step)
                    except EarlyStop:
                        return step.x0
                    x = x if changed is None else changed

    @torch.no_grad()
    def invert(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x0: Tensor,
        cond: Conditioning | None = None,
        *,
        guider: Guider | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
    ) -> Tensor:
        """The noise that this sampler walks to ``x0``: its own plan from data to noise.

        From data itself the walk sets out by undoing its last step, to fourth order in the sigma of the level before
        it; into pure noise the step is of first order.

        Args:
            strength: How far up. Below 1 the noise belongs with x0: give both to a walk of the same strength.

        The others are those of :meth:`__call__`.

        Raises:
            ValueError: the sampler draws fresh noise, which no walk takes back.
        """
        name = type(self).__name__
        levels = begin_at(self.levels(schedule), schedule, strength)
        down = Node.columns(levels)
        if any(_is_noisy(stage) for nodes in down for stage in self.plan(nodes, schedule)):
            raise ValueError(f"{name} draws fresh noise, so its walk cannot be inverted. Use a deterministic sampler.")
        x = state_at(levels[-1], torch.zeros_like(x0), x0, self.init, name)
        run = self._run(
            lambda nodes: upward(lambda n: self.plan(n, schedule), nodes, name),
            [nodes[::-1] for nodes in down],
            denoiser,
            x,
            cond,
            guider,
            None,
            edit,
        )
        return noise_at(levels[0], run(x), x0 if strength < 1 else None, self.init)

    def _run(
        self,
        plan: Callable[[Sequence[Node]], Iterable[Stage]],
        columns: Sequence[Sequence[Node]],
        denoiser: Denoiser,
        like: Tensor,
        cond: Conditioning | None,
        guider: Guider | None,
        seeds: Sequence[int] | None,
        edit: Edit | None,
    ) -> Run:
        """Plan along levels, one list of them or one per frame, and bind the plan to a batch."""
        name, num_levels = type(self).__name__, len(columns[0])
        by_frame = len(columns) > 1
        stages: list[Stage] | list[FrameStage]
        if by_frame:
            stages, lanes = side_by_side(plan, columns)
        else:
            stages = along(plan, columns[0])
            lanes = [stages]
        if (planned := sum(stage.ends_step for stage in stages)) != num_levels - 1:
            raise ValueError(
                f"{name}.plan ends {planned} steps between {num_levels} levels, which are {num_levels - 1} steps. "
                "Each step has one stage with ends_step=True, its last."
            )
        frames = [stage.frames if isinstance(stage, FrameStage) else (stage.node,) for stage in stages]
        asked = NoiseLevel(*torch.stack([Node.table(nodes) for nodes in frames]).unbind(-1))
        denoiser.check(asked, name)
        p, q = denoiser.language.reading(asked if by_frame else asked[:, 0])
        if by_frame:
            check_frames(len(columns), like, name)
        nodes = [stage.node for stage in stages]
        guided = Guided(denoiser, guider or NoneGuider(), nodes, cond or Conditioning(), like, frames)
        increments = None
        if any(_is_noisy(stage) for stage in stages):
            if seeds is None:
                raise ValueError(f"{name} draws fresh noise: give one seed per sample (seeds=[...]).")
            ends = [nodes[-1] for nodes in columns]
            if by_frame:
                increments = noise_by_frame(self.noise_source, lanes, ends, seeds, like)
            else:
                increments = self.noise_source.along(spans(lanes[0], ends[0])).bind(seeds, like)
        readings = list(zip(p.tolist(), q.tolist(), strict=True))
        axes = (len(columns),) + (1,) * max(like.ndim - 3, 0) if by_frame else ()
        return Run(stages, guided, denoiser.language, readings, increments, edit, axes)


def _is_noisy(stage: Stage | FrameStage) -> bool:
    return "noise" in stage.ask or "noise" in stage.update


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[SamplerStep], None]]:
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda step: bar.update(task, advance=1, total=step.num_steps)
