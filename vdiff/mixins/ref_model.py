"""The reference policy beside the trained one: what preference losses compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from vdiff.hooks import On, Part, parts
from vdiff.mixins.base import Mixin
from vdiff.networks import in_eval
from vdiff.process import Prediction


class RefModel(Mixin):
    """Asks the reference policy about the same ``(x_t, level, cond)`` and puts it in ``Prediction.reference``.

    With ``source="mixins_off"`` the reference is the denoiser itself with every mixin below it off: no second
    copy of the weights, and right as long as only mixins are trained. It runs without gradient and in eval
    mode, so a host with dropout of its own differs from its reference while it trains.

    Args:
        source: Where the reference comes from.
        always: Also where no gradient is recorded; by default only in training.
        on: The denoiser.
        name: See :class:`Mixin`.

    References:
        Wallace et al., arXiv:2311.12908.
    """

    def __init__(
        self,
        source: Literal["mixins_off"] = "mixins_off",
        always: bool = False,
        on: On = "role:denoiser",
        name: str | None = None,
    ) -> None:
        super().__init__(on, name)
        if source != "mixins_off":
            raise ValueError(f"RefModel: source must be 'mixins_off', got {source!r}.")
        self.source, self.always = source, always

    def part(self, module: nn.Module, site: str) -> RefModelPart:
        return RefModelPart(self.always)


class RefModelPart(Part):
    """At a denoiser: its prediction, with the reference's in it."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        if not isinstance(output, Prediction):
            raise TypeError(
                f"RefModel is attached to a {type(module).__name__}, which returned a {type(output).__name__}; "
                "it goes on a denoiser, which returns a Prediction. Set its `on`."
            )
        if not (self.always or torch.is_grad_enabled()):
            return output
        with torch.no_grad(), _mixins_off(module):
            reference = module.forward(*args, **kwargs)  # not called: the hooks of the denoiser stay out of it
        return output.with_(reference=reference)


@contextmanager
def _mixins_off(module: nn.Module) -> Iterator[None]:
    switched = [part for part in parts(module) if part.enabled]
    for part in switched:
        part.enabled = False
    try:
        with in_eval(module):
            yield
    finally:
        for part in switched:
            part.enabled = True
