"""Attachments that bring a condition of their own: a hint, an image.

At the network itself stands a part with the weights. It takes its condition out of the ones the network is called with
(which need not know it), works out what it has to say, and leaves that to its helpers at the modules inside, for this
call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vdiff.hooks import Part
from vdiff.process import Conditioning


class ConditionedPart(Part):
    """At a network.

    Args:
        reads: The name of the condition; None: that of the mixin.
    """

    def __init__(self, reads: str | None) -> None:
        super().__init__()
        self.reads = reads
        self.hands: list[Part] = []  # its helpers; they belong to other modules

    @property
    def accepts(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.reads or self.mixin_name,)

    @abstractmethod
    def said(self, value: Tensor, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Sequence[Tensor]:
        """One tensor for each of the helpers, or one for all of them."""

    @abstractmethod
    def hands_at(self, module: nn.Module) -> dict[str, Part]:
        """The helpers, by the modules they go to, in the order of :meth:`said`."""

    def helpers(self, module: nn.Module) -> dict[str, Part]:
        found = self.hands_at(module)
        self.hands = list(found.values())
        return found

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, c_noise, cond = _called(module, args, kwargs)
        (name,) = self.accepts
        value = None if cond is None else cond.get(name)
        if cond is None or value is None:
            raise ValueError(
                f"{self.mixin_name!r} reads the condition {name!r}, which is missing. It got: "
                f"{', '.join(cond.tensors) if cond is not None and cond.tensors else 'none'}. An embedder with "
                f"feeds: {name} brings it; without it, switch the mixin off (mixin.disabled())."
            )
        if len(value) != len(x):
            raise ValueError(f"{self.mixin_name!r}: {len(value)} rows of {name!r} for a batch of {len(x)}.")
        said = self.said(value, x, c_noise, cond)
        for i, hand in enumerate(self.hands):
            hand.given = said[i if len(said) > 1 else 0]
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:  # noqa: ANN401
        for hand in self.hands:
            hand.given = None
        return output


def _called(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Conditioning | None]:
    values = dict(zip(("x", "c_noise", "cond"), args, strict=False)) | kwargs
    return values["x"], values["c_noise"], values.get("cond")
