"""The scale of guidance, for networks that stand for a guided one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdiff.conditioners.embedders import FieldEmbedder
from vdiff.process import RowKeys


class GuidanceScaleEmbedder(FieldEmbedder, name="guidance_scale"):
    """The scale of classifier-free guidance that a distilled network is told in place of a null.

    Training draws it by the row's key, evenly between two scales, where the batch has none; sampling takes the field or
    the default. A teacher with ``guidance: told`` guides every row by the scale that the student is told. Guidance of
    the outside, if there is any, leaves it alone.

    Args:
        low, high: Between which training draws. 1 is the conditional prediction alone, as in diffusers'
            ``guidance_scale``; the paper counts from 0, and its range 2 to 14 is 3 to 15 here.
        default: When sampling, of every row where the batch has no such field.
        reads, feeds: See :class:`Embedder`.

    References:
        Meng et al., arXiv:2210.03142, section 3.1; Luo et al., arXiv:2310.04378, section 4.2.
    """

    def __init__(
        self,
        low: float = 3.0,
        high: float = 15.0,
        default: float = 8.5,
        reads: str = "guidance_scale",
        feeds: str = "guidance",
    ) -> None:
        if not low <= high:
            raise ValueError(f"GuidanceScaleEmbedder: low is at most high, got {low:g} and {high:g}.")
        super().__init__(reads, feeds, null="same", default=default)
        self.low, self.high = low, high

    def read(self, batch: Mapping[str, Any], is_training: bool = False) -> Tensor:
        if is_training and self.reads not in batch:
            drawn = RowKeys.of(batch).uniform(f"guidance/{self.reads}")
            return (self.low + (self.high - self.low) * drawn).float()
        return super().read(batch, is_training)
