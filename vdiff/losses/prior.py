"""Prior preservation: learning something new without forgetting what it is an example of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdiff.losses.base import Loss, LossValues
from vdiff.process import NoiseLevel, Prediction


class PriorPreservationLoss(Loss, name="prior_preservation"):
    r"""DreamBooth's loss around any other: rows of the class count :math:`\lambda` times, rows of the instance once.

    The data set ``dreambooth`` gives both kinds of rows, as many of each. The trainer averages over all of them, which
    is half of the paper's sum of two means. Metrics: ``prior/instance_loss`` and ``prior/class_loss``, not
    weighted, and those of the loss inside.

    Args:
        loss: Of a row, whichever kind it is; by level it is weighted alike for both.
        weight: The :math:`\lambda` above; 0 forgets the prior.
        field: Batch field that says which rows are of the class, ``(B,)``.

    References:
        Ruiz et al., arXiv:2208.12242, eq. 2.
    """

    def __init__(self, loss: Loss, weight: float = 1.0, field: str = "is_prior") -> None:
        if weight < 0:
            raise ValueError(f"PriorPreservationLoss: weight must not be negative, got {weight}.")
        self.loss, self.weight, self.field = loss, weight, field

    def __call__(
        self, prediction: Prediction, x0: Tensor, noise: Tensor, level: NoiseLevel, batch: Mapping[str, Any]
    ) -> LossValues:
        is_prior = batch.get(self.field)
        if not isinstance(is_prior, Tensor) or is_prior.shape != (len(x0),):
            raise ValueError(
                f"PriorPreservationLoss: the batch needs a field {self.field!r} of shape ({len(x0)},) that says which "
                f"rows are of the class; the data set `dreambooth` gives it. It has: {', '.join(batch)}."
            )
        values = self.loss(prediction, x0, noise, level, batch)
        plain, is_prior = values.per_row.detach(), is_prior.to(x0.device) > 0
        nan = torch.full_like(plain, float("nan"))
        figures = {
            "prior/instance_loss": torch.where(is_prior, nan, plain),
            "prior/class_loss": torch.where(is_prior, plain, nan),
        }
        per_row = torch.where(is_prior, self.weight * values.per_row, values.per_row)
        return LossValues(per_row, {**values.metrics, **figures})
