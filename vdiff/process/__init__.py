"""The forward process and the values every room exchanges. No weights."""

from vdiff.process.conditioning import Conditioning
from vdiff.process.discretizers import (
    Discretizer,
    ExplicitDiscretizer,
    ExponentialDiscretizer,
    KarrasDiscretizer,
    LeadingDiscretizer,
    LinspaceDiscretizer,
    TrailingDiscretizer,
    UniformDiscretizer,
)
from vdiff.process.level import HOST, NoiseLevel, spread, upload
from vdiff.process.parameterizations import (
    EDMParameterization,
    EpsilonParameterization,
    Parameterization,
    UndefinedParameterizationError,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
    parameterization,
)
from vdiff.process.prediction import Prediction
from vdiff.process.randomness import RowKeys, derive, forked, generator, normal, stream
from vdiff.process.schedules import (
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    TabulatedSchedule,
    ZeroSNRSchedule,
)
from vdiff.process.sigma_samplers import (
    LogitNormalSigmaSampler,
    LogNormalSigmaSampler,
    SigmaSampler,
    StratifiedSigmaSampler,
    UniformIndexSigmaSampler,
    UniformSigmaSampler,
)

__all__ = [
    "HOST",
    "CosineSchedule",
    "Conditioning",
    "Discretizer",
    "EDMParameterization",
    "EDMSchedule",
    "EpsilonParameterization",
    "ExplicitDiscretizer",
    "ExponentialDiscretizer",
    "FlowSchedule",
    "KarrasDiscretizer",
    "LeadingDiscretizer",
    "LinearSchedule",
    "LinspaceDiscretizer",
    "LogNormalSigmaSampler",
    "LogitNormalSigmaSampler",
    "NoiseLevel",
    "NoiseSchedule",
    "Parameterization",
    "Prediction",
    "RowKeys",
    "ScaledLinearSchedule",
    "SigmaSampler",
    "StratifiedSigmaSampler",
    "TabulatedSchedule",
    "TrailingDiscretizer",
    "UndefinedParameterizationError",
    "UniformDiscretizer",
    "UniformIndexSigmaSampler",
    "UniformSigmaSampler",
    "VParameterization",
    "VelocityParameterization",
    "X0Parameterization",
    "ZeroSNRSchedule",
    "derive",
    "forked",
    "normal",
    "generator",
    "parameterization",
    "spread",
    "stream",
    "upload",
]
