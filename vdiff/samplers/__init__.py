"""Samplers, guiders and noise sources: how noise becomes data."""

from vdiff.samplers.adaptive_samplers import (
    AdaptiveSampler,
    AdaptiveStep,
    Dopri5Sampler,
    DPMAdaptiveSampler,
    Tsit5Sampler,
)
from vdiff.samplers.auto import AutoSampler
from vdiff.samplers.base import Callback, Sampler
from vdiff.samplers.brownian import BrownianNoiseSource
from vdiff.samplers.calibrated import GaussianCalibratedSampler
from vdiff.samplers.calibration import GaussianPrior
from vdiff.samplers.consistency import ConsistencySampler, LCMSampler, TCDSampler
from vdiff.samplers.dpmpp import DPMpp2MSampler, DPMpp3MSampler, RES2MSampler, RES3MSampler, UniPCSampler
from vdiff.samplers.edits import Clamp, Inpainting, in_turn
from vdiff.samplers.er_sde import ERSDESampler
from vdiff.samplers.euler import ChurnSampler, DDIMSampler, EulerAncestralSampler, EulerSampler
from vdiff.samplers.executor import EarlyStop, Edit, Run, SamplerStep
from vdiff.samplers.exponential import DPMFastSampler, RES2SSampler, RES3SSampler, SEEDSSampler
from vdiff.samplers.frames import FrameStage
from vdiff.samplers.guidance_branches import AutoguidanceGuider, AwayGuider, JointGuider, PerturbedGuider
from vdiff.samplers.guidance_conditions import MultiCFGGuider
from vdiff.samplers.guidance_directions import APGGuider, CFGPPGuider, CFGZeroStarGuider
from vdiff.samplers.guidance_frames import (
    FrameGuider,
    LinearGuider,
    SpatiotemporalGuider,
    TrapezoidGuider,
    TriangleGuider,
)
from vdiff.samplers.guidance_ranges import DynamicThresholdGuider, RescaleGuider
from vdiff.samplers.guidance_schedules import DynamicCFGGuider, IntervalGuider, X0ScaleGuider
from vdiff.samplers.guided import Guided
from vdiff.samplers.guiders import Answers, CFGGuider, Guidance, Guider, NoneGuider, WrappingGuider
from vdiff.samplers.heun import HeunSampler
from vdiff.samplers.likelihood import Likelihood, log_likelihood
from vdiff.samplers.multistep import (
    ABSampler,
    DEISSampler,
    GradientEstimationSampler,
    IPNDMSampler,
    LMSSampler,
    MultistepSampler,
)
from vdiff.samplers.noise import IidNoiseSource, NoiseSource, gaussian
from vdiff.samplers.plan import Node, Stage, ancestral, transfer
from vdiff.samplers.restart import RestartInterval, RestartSampler
from vdiff.samplers.sde import DPMpp2MSDESampler, DPMpp3MSDESampler, DPMppSDESampler, SASampler
from vdiff.samplers.search import search_levels
from vdiff.samplers.single_step import (
    DDPMSampler,
    DPM2AncestralSampler,
    DPM2Sampler,
    DPMpp2SAncestralSampler,
    DPMpp2SSampler,
    EulerAncestralFlowSampler,
)

__all__ = [
    "ABSampler",
    "APGGuider",
    "AdaptiveSampler",
    "AdaptiveStep",
    "Answers",
    "AutoSampler",
    "AutoguidanceGuider",
    "AwayGuider",
    "BrownianNoiseSource",
    "CFGGuider",
    "CFGPPGuider",
    "CFGZeroStarGuider",
    "Callback",
    "ChurnSampler",
    "Clamp",
    "ConsistencySampler",
    "DDIMSampler",
    "DDPMSampler",
    "DEISSampler",
    "DPM2AncestralSampler",
    "DPM2Sampler",
    "DPMAdaptiveSampler",
    "DPMFastSampler",
    "DPMpp2MSDESampler",
    "DPMpp2MSampler",
    "DPMpp2SAncestralSampler",
    "DPMpp2SSampler",
    "DPMpp3MSDESampler",
    "DPMpp3MSampler",
    "DPMppSDESampler",
    "Dopri5Sampler",
    "DynamicCFGGuider",
    "DynamicThresholdGuider",
    "ERSDESampler",
    "EarlyStop",
    "Edit",
    "EulerAncestralFlowSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "FrameGuider",
    "FrameStage",
    "GaussianCalibratedSampler",
    "GaussianPrior",
    "GradientEstimationSampler",
    "Guidance",
    "Guided",
    "Guider",
    "HeunSampler",
    "IPNDMSampler",
    "IidNoiseSource",
    "Inpainting",
    "IntervalGuider",
    "JointGuider",
    "LCMSampler",
    "LMSSampler",
    "Likelihood",
    "LinearGuider",
    "MultiCFGGuider",
    "MultistepSampler",
    "Node",
    "NoiseSource",
    "NoneGuider",
    "PerturbedGuider",
    "RES2MSampler",
    "RES2SSampler",
    "RES3MSampler",
    "RES3SSampler",
    "RescaleGuider",
    "RestartInterval",
    "RestartSampler",
    "Run",
    "SASampler",
    "SEEDSSampler",
    "Sampler",
    "SamplerStep",
    "SpatiotemporalGuider",
    "Stage",
    "TCDSampler",
    "TrapezoidGuider",
    "TriangleGuider",
    "Tsit5Sampler",
    "UniPCSampler",
    "WrappingGuider",
    "X0ScaleGuider",
    "ancestral",
    "gaussian",
    "in_turn",
    "log_likelihood",
    "search_levels",
    "transfer",
]
