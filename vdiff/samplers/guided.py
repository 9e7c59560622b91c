"""A denoiser under a guider, laid out for one batch."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser
from vdiff.hooks import check_partners
from vdiff.process import HOST, Conditioning, NoiseLevel, Prediction, spread, upload
from vdiff.samplers.guiders import Answers, Guider, Weight
from vdiff.samplers.plan import Node


@dataclass(frozen=True, eq=False)
class Question:
    """One call of one denoiser: its branches as one batch."""

    denoiser: Denoiser
    branches: tuple[str, ...]
    cond: Conditioning


class Guided:
    """A denoiser under a guider, bound to the levels, conditions and batch of one run.

    Conditions, levels and weights of all branches are laid out once, before the walk, and conditions cast to what
    the network computes in. It remembers nothing itself; a walk hands it a memory.

    Args:
        nodes: The level of each call, by which the guider plans.
        like: The state, ``(B, ...)``.
        frames: What the denoiser is told: for each call the level of every frame, or one for all. By default the nodes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guider: Guider,
        nodes: Sequence[Node],
        cond: Conditioning,
        like: Tensor,
        frames: Sequence[Sequence[Node]] | None = None,
    ) -> None:
        self.denoiser, self.guider = denoiser, guider
        self.dtype, self.device, self.rows = like.dtype, like.device, len(like)
        if cond.num_rows not in (None, self.rows):
            raise ValueError(f"sampling: conditions of {cond.num_rows} rows for {self.rows} samples; each has its own.")
        if cond.partners is not None:
            check_partners(cond.partners.cpu(), self.rows)  # once per walk, wherever they are
        told = [(node,) for node in nodes] if frames is None else frames
        levels = NoiseLevel(*torch.stack([Node.table(row) for row in told]).unbind(-1))  # (N, 1) or (N, F)
        self._guidance = guider.planned(nodes)
        assert len(self._guidance) == len(nodes), f"{type(guider).__name__}.plan: one entry per call"
        # A plain call takes the short way; it is what the default combination of a lone branch amounts to.
        self._is_plain = [
            g.branches == ("cond",) and not g.changes and getattr(g.combine, "__func__", None) is Guider.combine
            for g in self._guidance
        ]
        laid_out = {b: self._lay_out(b, cond, levels) for b in dict.fromkeys(g.branches for g in self._guidance)}
        self._questions = [laid_out[g.branches] for g in self._guidance]
        sizes = {len(question.branches) for questions in laid_out.values() for question in questions} | {1}
        self._levels = {size: _upload_levels(levels, self.rows * size, like) for size in sizes}
        self._weights, self._numbers = self._upload_weights(like)

    def __call__(self, x: Tensor, call: int, memory: MutableMapping[str, Tensor] | None = None) -> Prediction:
        """What the guided denoiser says about ``x`` at the level of this call.

        ``memory`` is the walk's, for guiders that remember; without one nothing is remembered.
        """
        level, questions = self._levels[1][call], self._questions[call]
        if self._is_plain[call]:
            return questions[0].denoiser(x, level, questions[0].cond)
        said: dict[str, Prediction] = {}
        for question in questions:
            said.update(self._ask(question, x, call))
        guidance = self._guidance[call]
        memory = {} if memory is None else memory
        answers = Answers(said, self._weights[call], x, level, self.denoiser.language, memory)
        assert guidance.combine is not None
        prediction = guidance.combine(answers)
        for change, number in zip(guidance.changes, self._numbers[call], strict=True):
            prediction = change.apply(prediction, answers, number)
        return prediction

    def _ask(self, question: Question, x: Tensor, call: int) -> dict[str, Prediction]:
        level, size = self._levels[1][call], len(question.branches)
        many = question.denoiser(torch.cat([x] * size) if size > 1 else x, self._levels[size][call], question.cond)
        values = many.value.chunk(size) if size > 1 else (many.value,)
        return {b: Prediction(many.language, v, x, level) for b, v in zip(question.branches, values, strict=True)}

    def _lay_out(self, branches: tuple[str, ...], cond: Conditioning, levels: NoiseLevel) -> list[Question]:
        """The fewest calls for these branches: one per denoiser, or one per branch."""
        groups: dict[tuple[Denoiser, str], list[str]] = {}
        for branch in branches:
            denoiser = self.guider.denoiser(branch, self.denoiser)
            groups.setdefault((denoiser, "" if self.guider.batched else branch), []).append(branch)
        questions = []
        for (denoiser, _), names in groups.items():
            if denoiser is not self.denoiser:  # a companion: nobody else moves it or knows its limits
                denoiser.to(self.device)
                denoiser.check(levels, f"{type(self.guider).__name__}: the companion {type(denoiser).__name__}")
            conds = [self.guider.condition(b, cond, self.rows).with_(null=None).to(self.device) for b in names]
            told = denoiser.prepared(conds[0] if len(conds) == 1 else Conditioning.cat(conds, self.rows))
            questions.append(Question(denoiser, tuple(names), told))
        return questions

    def _upload_weights(self, like: Tensor) -> tuple[list[dict[str, Tensor]], list[list[Tensor]]]:
        """One table, one upload; per call the weights by branch and the numbers of the changes, ready to multiply."""
        wanted: list[tuple[int, str | None, Tensor]] = []
        for call, guidance in enumerate(self._guidance):
            named: list[tuple[str | None, Weight]] = [*guidance.weights.items()]
            named += [(None, change.number) for change in guidance.changes]
            wanted += [(call, name, self._shaped(name, weight, like)) for name, weight in named]
        table = torch.cat([t.reshape(-1) for *_, t in wanted]) if wanted else torch.zeros(0, **HOST)
        parts = upload(table.to(self.dtype), self.device).split([t.numel() for *_, t in wanted])
        weights: list[dict[str, Tensor]] = [{} for _ in self._guidance]
        numbers: list[list[Tensor]] = [[] for _ in self._guidance]
        for (call, name, shape), part in zip(wanted, parts, strict=True):
            value = spread(part.view(shape.shape), like)
            if name is None:
                numbers[call].append(value)
            else:
                weights[call][name] = value
        return weights, numbers

    def _shaped(self, name: str | None, weight: Weight, like: Tensor) -> Tensor:
        """A weight on the host: ``()``, ``(B,)``, ``(1, F)`` or ``(B, F)``."""
        who = type(self.guider).__name__
        what = "numbers" if name is None else f"weights of branch {name!r}"
        if callable(weight):
            _check_frames(who, what, like)
            weight = [list(weight(like.shape[_frame_axis(like)]))]
        value = torch.as_tensor(weight, **HOST)
        if value.ndim == 1 and len(value) != self.rows:
            raise ValueError(f"{who}: {len(value)} {what} for {self.rows} samples.")
        if value.ndim == 2:
            _check_frames(who, what, like)
            frames = like.shape[_frame_axis(like)]
            if len(value) not in (1, self.rows) or value.shape[1] != frames:
                raise ValueError(
                    f"{who}: {what} of shape {tuple(value.shape)} for {self.rows} samples of {frames} frames; "
                    f"they must be (1, {frames}) or ({self.rows}, {frames})."
                )
        return value


def _frame_axis(x: Tensor) -> int:
    return 2 if x.ndim > 2 else 1


def _check_frames(who: str, what: str, like: Tensor) -> None:
    if like.ndim not in (2, 5):
        raise ValueError(
            f"{who}: {what} per frame need a video, b c f h w; this batch is {tuple(like.shape)}. "
            "Use cfg for images, with one scale per sample."
        )


def _upload_levels(levels: NoiseLevel, rows: int, like: Tensor) -> list[NoiseLevel]:
    """The levels on the device, one upload, each ``(rows,)`` or by frame ``(rows, F)``; at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    table = torch.stack([levels.t, levels.alpha, levels.sigma, levels.d_alpha, levels.d_sigma], 1).to(dtype)
    table = upload(table, like.device)[:, :, None].expand(-1, -1, rows, -1)  # (N, 5, rows, F)
    table = table.squeeze(-1) if table.shape[-1] == 1 else table
    return [NoiseLevel(*row.unbind()) for row in table.unbind()]
