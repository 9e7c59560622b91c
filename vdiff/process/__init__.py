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
from vdiff.process.discretizers_by_frame import KnownFramesDiscretizer, PyramidDiscretizer, RollingDiscretizer
from vdiff.process.discretizers_in_ratio import (
    AYSDiscretizer,
    BetaSigmaDiscretizer,
    PolyexponentialDiscretizer,
    VPDiscretizer,
)
from vdiff.process.discretizers_in_time import (
    BetaIndexDiscretizer,
    DDIMUniformDiscretizer,
    FlowDiscretizer,
    LinearQuadraticDiscretizer,
    NormalDiscretizer,
    SGMUniformDiscretizer,
    SimpleDiscretizer,
)
from vdiff.process.gits import GITSDiscretizer
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
from vdiff.process.x0_scale import X0Scale

__all__ = [
    "HOST",
    "AYSDiscretizer",
    "BetaIndexDiscretizer",
    "BetaSigmaDiscretizer",
    "Conditioning",
    "CosineSchedule",
    "DDIMUniformDiscretizer",
    "Discretizer",
    "EDMParameterization",
    "EDMSchedule",
    "EpsilonParameterization",
    "ExplicitDiscretizer",
    "ExponentialDiscretizer",
    "FlowDiscretizer",
    "FlowSchedule",
    "GITSDiscretizer",
    "KarrasDiscretizer",
    "KnownFramesDiscretizer",
    "LeadingDiscretizer",
    "LinearQuadraticDiscretizer",
    "LinearSchedule",
    "LinspaceDiscretizer",
    "LogNormalSigmaSampler",
    "LogitNormalSigmaSampler",
    "NoiseLevel",
    "NoiseSchedule",
    "NormalDiscretizer",
    "Parameterization",
    "PolyexponentialDiscretizer",
    "PyramidDiscretizer",
    "Prediction",
    "RollingDiscretizer",
    "RowKeys",
    "SGMUniformDiscretizer",
    "ScaledLinearSchedule",
    "SigmaSampler",
    "SimpleDiscretizer",
    "StratifiedSigmaSampler",
    "TabulatedSchedule",
    "TrailingDiscretizer",
    "UndefinedParameterizationError",
    "UniformDiscretizer",
    "UniformIndexSigmaSampler",
    "UniformSigmaSampler",
    "VPDiscretizer",
    "VParameterization",
    "VelocityParameterization",
    "X0Parameterization",
    "X0Scale",
    "ZeroSNRSchedule",
    "derive",
    "forked",
    "generator",
    "normal",
    "parameterization",
    "spread",
    "stream",
    "upload",
]
