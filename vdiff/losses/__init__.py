"""Losses and weightings: a prediction against the truth, one value per row."""

from vdiff.losses.base import BUCKETS, Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.pointwise import HuberLoss, L1Loss, MSELoss
from vdiff.losses.weightings import (
    EDMWeighting,
    EpsilonWeighting,
    MinSNRWeighting,
    SNRWeighting,
    UnitWeighting,
    VWeighting,
    Weighting,
)

__all__ = [
    "BUCKETS",
    "EDMWeighting",
    "EpsilonWeighting",
    "HuberLoss",
    "L1Loss",
    "Loss",
    "LossValues",
    "MSELoss",
    "MinSNRWeighting",
    "PointwiseLoss",
    "SNRWeighting",
    "UnitWeighting",
    "VWeighting",
    "Weighting",
    "by_bucket",
]
