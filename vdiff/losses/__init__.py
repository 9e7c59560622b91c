"""Losses and weightings: a prediction against the truth, one value per row."""

from vdiff.losses.base import BUCKETS, Loss, LossValues, PointwiseLoss, by_bucket
from vdiff.losses.consistency import ConsistencyLoss
from vdiff.losses.latent_diffusion import LatentDiffusionLoss, VLBWeighting
from vdiff.losses.pointwise import HuberLoss, L1Loss, MSELoss
from vdiff.losses.preference import DiffusionDPOLoss, IPOLoss, PairwiseLoss, SimPOLoss
from vdiff.losses.prior import PriorPreservationLoss
from vdiff.losses.steps import SPOLoss
from vdiff.losses.unpaired import KTOLoss
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
    "ConsistencyLoss",
    "BUCKETS",
    "DiffusionDPOLoss",
    "EDMWeighting",
    "EpsilonWeighting",
    "HuberLoss",
    "IPOLoss",
    "KTOLoss",
    "L1Loss",
    "LatentDiffusionLoss",
    "Loss",
    "LossValues",
    "MSELoss",
    "MinSNRWeighting",
    "PairwiseLoss",
    "PointwiseLoss",
    "PriorPreservationLoss",
    "SNRWeighting",
    "SPOLoss",
    "SimPOLoss",
    "UnitWeighting",
    "VLBWeighting",
    "VWeighting",
    "Weighting",
    "by_bucket",
]
