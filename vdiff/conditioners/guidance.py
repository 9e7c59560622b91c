"""The scale of guidance, for networks that stand for a guided one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
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
        default: When sampling, of every row where the batch has no such field. A scale beyond ``low`` and ``high`` is
            taken with a warning.
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
        value = super().read(batch, is_training)
        scales = torch.as_tensor(value, dtype=torch.float32)
        is_outside = scales.device.type == "cpu" and bool(((scales < self.low) | (scales > self.high)).any())
        if is_outside:  # on a device nobody looks: that would wait for it
            least, most = scales.min().item(), scales.max().item()
            warnings.warn(
                f"GuidanceScaleEmbedder: {self.reads} goes from {least:g} to {most:g}, and training draws it between "
                f"{self.low:g} and {self.high:g}: what the network says beyond is a guess.",
                stacklevel=2,
            )
        return value
