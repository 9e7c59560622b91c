"""Samplers, guiders and noise sources: how noise becomes data."""

from vdiff.samplers.base import Sampler
from vdiff.samplers.dpmpp import DPMpp2MSampler
from vdiff.samplers.euler import ChurnSampler, DDIMSampler, EulerAncestralSampler, EulerSampler
from vdiff.samplers.executor import Run, SamplerStep
from vdiff.samplers.guiders import CFGGuider, Guidance, Guided, Guider, NoneGuider
from vdiff.samplers.heun import HeunSampler
from vdiff.samplers.noise import IidNoiseSource, NoiseSource, gaussian
from vdiff.samplers.plan import Node, Stage, ancestral, transfer

__all__ = [
    "CFGGuider",
    "ChurnSampler",
    "DDIMSampler",
    "DPMpp2MSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "Guidance",
    "Guided",
    "Guider",
    "HeunSampler",
    "IidNoiseSource",
    "Node",
    "NoiseSource",
    "NoneGuider",
    "Run",
    "Sampler",
    "SamplerStep",
    "Stage",
    "ancestral",
    "gaussian",
    "transfer",
]
