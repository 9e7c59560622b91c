"""A denoiser as a consistency function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin
from vdiff.process import Boundary, EDMBoundary, Prediction, X0Parameterization, spread

X0 = X0Parameterization()


class Consistency(Mixin):
    r"""Holds the denoiser to its boundary: it says :math:`c_{skip}\,x_t + c_{out}\,\hat x_0` in the place of
    :math:`\hat x_0`, and so returns ``x_t`` itself at the level that counts as data.

    Attached, it acts in training and under every sampler alike. It has no weights.

    Args:
        boundary: The coefficients; by default EDM's.
        on: The denoiser.
        name, scale: See :class:`Mixin`.

    References:
        Song et al., arXiv:2303.01469, section 3.
    """

    def __init__(
        self,
        boundary: Boundary | None = None,
        on: On = "role:denoiser",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        self.boundary = EDMBoundary() if boundary is None else boundary

    def part(self, module: nn.Module, site: str) -> ConsistencyPart:
        return ConsistencyPart(self.boundary)

    def arguments(self) -> dict[str, Any]:
        kind = type(self.boundary).registered_name
        return super().arguments() | {"boundary": {"type": kind, **vars(self.boundary)}}


class ConsistencyPart(Part):
    """At a denoiser: its prediction, in its own language, within the boundary."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Prediction:
        if not isinstance(output, Prediction):
            raise TypeError(
                f"Consistency is attached to a {type(module).__name__}, which returned a {type(output).__name__}; "
                "it goes on a denoiser, which returns a Prediction. Set its `on`."
            )
        x_t, x0 = output.x_t, output.x0
        c_skip, c_out = (spread(value, x_t) for value in self.boundary(output.level))
        x0 = torch.lerp(x0, c_skip * x_t + c_out * x0, self.amount(x0))
        return output.with_(value=output.with_(language=X0, value=x0).to(output.language))

    def extra_repr(self) -> str:
        return str(self.boundary.registered_name)
