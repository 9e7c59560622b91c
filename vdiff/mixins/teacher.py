"""A teacher beside the student: what few-step training learns to agree with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part, parts
from vdiff.mixins.companion import Companion, CompanionPart, Source, only
from vdiff.process import Conditioning, LevelPair, NoiseLevel, Prediction, spread

Asked = Callable[..., Prediction]
TOLD = "told"


class Teacher(Companion):
    r"""Where the teacher's next step leads, and what the student says there, in ``Prediction.target``.

    At a pair of levels, as the sigma sampler ``grid`` draws them, the teacher takes ``x_t`` one step of a solver down
    its trajectory to the lower level; the student is asked there, without gradient and in eval mode, and its answer is
    the target: two points of one trajectory have one end. At a single level, so in sampling, nothing is asked. The
    loss ``consistency`` compares, and the mixin ``consistency`` gives the trajectory its end.

    Args:
        source: Where the teacher comes from, see :class:`Companion`: ``copy``, what the run starts from;
            ``mixins_off`` where the student is a LoRA on the teacher; ``adapter`` or ``checkpoint``.
        adapter, file, weights, sha256: As the source wants them.
        solver: ``euler``, first order (DDIM, one call), or ``heun``, second order in the time of the straight flow (two
            calls).
        guidance: Scale of the teacher's classifier-free guidance, which the student then needs no more; 1 is the plain
            conditional prediction. ``told``: each row has its own, the condition ``guidance``, which tells it to the
            student and not to the teacher; see :class:`vdiff.conditioners.GuidanceScaleEmbedder`.
        target: Who is asked at the lower level: ``student`` as it is, or ``ema``, its average in the run (by hand,
            where no trainer keeps one, the student).
        on: The denoiser.
        name: See :class:`Mixin`.

    Attributes:
        average: Inside it the denoiser has averaged weights; a trainer with ``ema`` lends it while it trains.

    References:
        Song et al., arXiv:2303.01469, algorithm 2; Luo et al., arXiv:2310.04378, eq. 14, for the guided step; Song &
        Dhariwal, arXiv:2310.14189, section 3.2, for the student as its own target.
    """

    words = ("teacher", "student")

    def __init__(
        self,
        source: Source = "copy",
        adapter: str | list[str] | None = None,
        file: Path | None = None,
        weights: Literal["ema", "raw"] = "ema",
        sha256: str | None = None,
        solver: Literal["euler", "heun"] = "euler",
        guidance: float | Literal["told"] = 1.0,
        target: Literal["student", "ema"] = "student",
        on: On = "role:denoiser",
        name: str | None = None,
    ) -> None:
        super().__init__(source, adapter, file, weights, sha256, on, name)
        if solver not in ("euler", "heun") or target not in ("student", "ema"):
            raise ValueError(
                f"Teacher: solver is euler or heun, and target student or ema; got {solver!r} and {target!r}."
            )
        if isinstance(guidance, str) and guidance != TOLD:
            raise ValueError(f"Teacher: guidance is a scale or {TOLD!r}, got {guidance!r}.")
        self.solver, self.guidance, self.target = solver, guidance, target
        self.average: Callable[[], AbstractContextManager[None]] | None = None

    def companion_part(self) -> TeacherPart:
        scale = None if isinstance(self.guidance, str) else float(self.guidance)
        return TeacherPart(self.solver == "heun", scale, self.target == "ema")


class TeacherPart(CompanionPart):
    """At a denoiser, called with ``(x_t, level, cond)``: its prediction, with the target in it."""

    def __init__(self, is_second_order: bool, guidance: float | None, is_averaged: bool) -> None:
        super().__init__()
        self.is_second_order, self.guidance, self.is_averaged = is_second_order, guidance, is_averaged
        self._target: Prediction | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the student keeps anything for its gradient, as with a reference."""
        self._target = self._asked(module, *args, **kwargs)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        target, self._target = self._target, None
        prediction = self.checked(module, args, kwargs, output)
        return prediction if target is None else prediction.with_(target=target)

    def check(self, module: nn.Module, cond: Conditioning | None) -> None:
        super().check(module, cond)
        if self.guidance is None and (deaf := _deaf(module)):
            warnings.warn(
                f"Teacher: the scale does not reach the student: {deaf}, which it is told through, is zero and frozen, "
                "and no mixin that is on stands at it. Train it, or let the LoRA's `on` include '*.time_cond_proj'.",
                stacklevel=2,
            )

    @torch.no_grad()
    def _asked(
        self, module: nn.Module, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None
    ) -> Prediction | None:
        if not isinstance(level, LevelPair):
            return None
        with self.asked(module) as teacher:
            x_s = self.step(teacher, x_t, level, cond)
        average = self.mixin.average if self.is_averaged else None
        with nullcontext() if average is None else average(), only(module, _is_students):
            return module(x_s, level.lower, cond)

    def step(self, teacher: Asked, x_t: Tensor, level: LevelPair, cond: Conditioning | None) -> Tensor:
        """Where the teacher goes from ``x_t`` in one step to the lower level."""
        first = self._guided(teacher, x_t, level, cond)
        x_s = level.lower.mix(first.x0, first.noise)
        if not self.is_second_order:
            return x_s
        second = self._guided(teacher, x_s, level.lower, cond)
        slope = (first.noise - first.x0 + second.noise - second.x0) / 2
        own = level.like(x_t)
        x0 = (x_t - own.sigma * slope) / (own.alpha + own.sigma)  # with this slope, and x_t where it is
        return level.lower.mix(x0, x0 + slope)

    def _guided(self, teacher: Asked, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None) -> Prediction:
        if self.guidance == 1:
            return teacher(x_t, level, cond)
        if cond is None or cond.null is None:
            scale = TOLD if self.guidance is None else f"{self.guidance:g}"
            raise ValueError(
                f"Teacher: guidance {scale} moves away from the null of the conditions, and there is none. "
                "Give the conditioner an embedder, or set guidance: 1."
            )
        branches = [cond, cond.null]
        if self.guidance is None:
            branches = [
                one.with_(tensors={n: v for n, v in one.tensors.items() if n != "guidance"}) for one in branches
            ]
        both = Conditioning.cat([one.with_(null=None) for one in branches], len(x_t))
        said = teacher(torch.cat([x_t, x_t]), NoiseLevel.cat([level, level]), both)
        plain, null = said.value.chunk(2)
        factor = spread(_told(cond), x_t) if self.guidance is None else self.guidance
        return Prediction(said.language, null + factor * (plain - null), x_t, level)


def _told(cond: Conditioning) -> Tensor:
    """The scale of each row."""
    scale = cond.get("guidance")
    if scale is None or scale.ndim != 1:
        came = "is missing" if scale is None else f"is {tuple(scale.shape)}"
        raise ValueError(
            f"Teacher: with guidance: {TOLD} the condition 'guidance' has the scale of each row, (B,), and it {came}. "
            "Give the conditioner the embedder guidance_scale, and the network guidance_dim."
        )
    return scale


def _deaf(module: nn.Module) -> str | None:
    """The network's projection of the scale, by name, if it says nothing and will not learn to."""
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] == "time_cond_proj" and not any(part.enabled for part in parts(layer)):
            if not any(weight.requires_grad or weight.any() for weight in layer.parameters(recurse=False)):
                return name
    return None


def _is_students(part: Part) -> bool:
    return part.enabled and not isinstance(part, CompanionPart)
