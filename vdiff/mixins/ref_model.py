"""The reference policy beside the trained one: what preference losses compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vdiff.hooks import On
from vdiff.mixins.companion import Companion, CompanionPart, Source
from vdiff.process import Prediction


class RefModel(Companion):
    """Asks the reference policy about the same ``(x_t, level, cond)`` and puts it in ``Prediction.reference``.

    It is in eval mode, so a host with dropout of its own differs from its reference while it trains.

    Args:
        source: ``mixins_off``, ``copy``, ``adapter`` or ``checkpoint``: where the reference comes from, see
            :class:`Companion`.
        adapter, file, weights, sha256: As the source wants them.
        always: Also where no gradient is recorded (validation; but sampling too, which then costs twice).
        on: The denoiser.
        name: See :class:`Mixin`.

    References:
        Wallace et al., arXiv:2311.12908.
    """

    words = ("reference", "policy")

    def __init__(
        self,
        source: Source = "mixins_off",
        adapter: str | list[str] | None = None,
        file: Path | None = None,
        weights: Literal["ema", "raw"] = "ema",
        sha256: str | None = None,
        always: bool = False,
        on: On = "role:denoiser",
        name: str | None = None,
    ) -> None:
        super().__init__(source, adapter, file, weights, sha256, on, name)
        self.always = always

    def companion_part(self) -> RefModelPart:
        return RefModelPart(self.always)


class RefModelPart(CompanionPart):
    """At a denoiser: its prediction, with the reference's in it."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self._said: Prediction | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The reference answers first: what it needs in memory is free again before the policy keeps anything."""
        self._said = None  # of a call that failed
        if self.always or torch.is_grad_enabled():
            with self.asked(module) as reference:
                self._said = reference(*args, **kwargs)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        said, self._said = self._said, None
        prediction = self.checked(module, args, kwargs, output)
        return prediction if said is None else prediction.with_(reference=said)
