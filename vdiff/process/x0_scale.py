r"""VideoCrafter's smaller clean signal: :math:`x_t = \alpha\,s(t)\,x_0 + \sigma\,\epsilon`."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff.process.level import NoiseLevel, spread


class X0Scale:
    r"""What the clean sample is multiplied by before it is noised, in training and in sampling alike.

    :math:`s` falls in a straight line from 1 in the table's first row to ``last`` in row ``num_falling - 1`` and stays
    there. :math:`s(t)\,x_0` is then the clean sample in every respect: it is what a network that speaks x0 or v says.

    Args:
        last: Of :math:`s`: 0.7 in VideoCrafter 2, 0.3 in VideoCrafter 1 and DynamiCrafter (``scale_b``).
        num_falling: Rows in which it falls (``mid_step``).
        num_rows: Length of the table.

    References:
        Chen et al., arXiv:2310.19512 and arXiv:2401.09047, ``use_scale`` in their code.
    """

    def __init__(self, last: float = 0.7, num_falling: int = 400, num_rows: int = 1000) -> None:
        if last <= 0 or not 1 < num_falling <= num_rows:
            raise ValueError(
                f"X0Scale: needs last > 0 and 1 < num_falling <= num_rows, got {last}, {num_falling} and {num_rows}."
            )
        self.last, self.num_falling, self.num_rows = last, num_falling, num_rows

    def at(self, t: Tensor) -> Tensor:
        """:math:`s` at times in [0, 1], any shape."""
        row = (t * self.num_rows - 1).clamp(0, self.num_falling - 1)
        return 1 + (self.last - 1) * row / (self.num_falling - 1)

    def __call__(self, x0: Tensor, level: NoiseLevel) -> Tensor:
        r""":math:`s(t)\,x_0`, at least float32, ``(B, ...)``."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        return x0 * spread(self.at(level.t), x0).to(x0.dtype)
