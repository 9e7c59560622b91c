"""Samplers, guiders and noise sources: how noise becomes data."""

from vdiff.samplers.base import Sampler
from vdiff.samplers.brownian import BrownianNoiseSource
from vdiff.samplers.consistency import ConsistencySampler, LCMSampler, TCDSampler
from vdiff.samplers.dpmpp import DPMpp2MSampler, DPMpp3MSampler, RES2MSampler, RES3MSampler, UniPCSampler
from vdiff.samplers.euler import ChurnSampler, DDIMSampler, EulerAncestralSampler, EulerSampler
from vdiff.samplers.executor import Run, SamplerStep
from vdiff.samplers.guiders import CFGGuider, Guidance, Guided, Guider, NoneGuider
from vdiff.samplers.heun import HeunSampler
from vdiff.samplers.multistep import ABSampler, DEISSampler, IPNDMSampler, LMSSampler, MultistepSampler
from vdiff.samplers.noise import IidNoiseSource, NoiseSource, gaussian
from vdiff.samplers.plan import Node, Stage, ancestral, transfer
from vdiff.samplers.sde import DPMpp2MSDESampler, DPMpp3MSDESampler, DPMppSDESampler, SASampler
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
    "BrownianNoiseSource",
    "CFGGuider",
    "ChurnSampler",
    "ConsistencySampler",
    "DDIMSampler",
    "DDPMSampler",
    "DEISSampler",
    "DPM2AncestralSampler",
    "DPM2Sampler",
    "DPMpp2MSDESampler",
    "DPMpp2MSampler",
    "DPMpp2SAncestralSampler",
    "DPMpp2SSampler",
    "DPMpp3MSDESampler",
    "DPMpp3MSampler",
    "DPMppSDESampler",
    "EulerAncestralFlowSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "Guidance",
    "Guided",
    "Guider",
    "HeunSampler",
    "IPNDMSampler",
    "IidNoiseSource",
    "LCMSampler",
    "LMSSampler",
    "MultistepSampler",
    "Node",
    "NoiseSource",
    "NoneGuider",
    "RES2MSampler",
    "RES3MSampler",
    "Run",
    "SASampler",
    "Sampler",
    "SamplerStep",
    "Stage",
    "TCDSampler",
    "UniPCSampler",
    "ancestral",
    "gaussian",
    "transfer",
]
