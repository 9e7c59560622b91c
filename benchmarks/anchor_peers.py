"""k-diffusion, diffusers and the published iPNDM, walking the anchor's problems in float64.

A peer is ``walk(denoise, x, ratios)`` with ``denoise(x, sigma) -> x0`` in the variance-exploding frame, and says how
many steps a number of network calls buys.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch


def k_diffusion(name, **options):
    if "k_diffusion" not in sys.modules:  # without the package's own imports, which need CLIP
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
        sys.modules["k_diffusion"] = package
    function = getattr(importlib.import_module("k_diffusion.sampling"), name)

    def walk(denoise, x, ratios):
        return function(lambda x, sigma, **_: denoise(x, sigma[0]), x, ratios, disable=True, **options)

    return walk


def dpm_fast(denoise, x, ratios):
    """Places its own levels; the last call denoises."""
    function = importlib.import_module("k_diffusion.sampling").sample_dpm_fast
    low, high, num = ratios[-2].item(), ratios[0].item(), len(ratios) - 2
    x = function(lambda x, sigma, **_: denoise(x, sigma.flatten()[0]), x, low, high, num, disable=True)
    return denoise(x, ratios[-2])


class InFloat64:
    """torch, whose float32 is float64: several schedulers force it."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def diffusers(scheduler, end=0.0, **options):
    """A scheduler in its own variance-preserving frame. ``end``: in place of 0, where it has a logarithm."""
    name = f"diffusers.schedulers.scheduling_{scheduler}"

    def walk(denoise, x, ratios):
        importlib.import_module("diffusers").utils.logging.set_verbosity_error()
        module = importlib.import_module(name)
        kinds = [v for k, v in vars(module).items() if k.endswith("Scheduler") and v.__module__ == name]
        levels = ratios.clone()
        levels[-1] = max(end, levels[-1].item())
        module.torch = InFloat64()
        try:
            steps = kinds[0](prediction_type="sample", **options)
            steps.set_timesteps(len(levels) - 1)
            steps.sigmas, steps.timesteps = levels, torch.arange(len(levels) - 1, 0, -1)
            steps.set_begin_index(0)
            x = x / (1 + levels[0] ** 2).sqrt()
            for sigma, t in zip(levels, steps.timesteps, strict=False):
                x = steps.step(denoise(x * (1 + sigma**2).sqrt(), sigma), t, x).prev_sample
        finally:
            module.torch = torch
        return x

    return walk


def ipndm(order):
    """Liu et al., arXiv:2202.09778, eq. 12: the weights of an even grid, on the noise."""
    table = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def walk(denoise, x, ratios):
        past = []
        for sigma, then in zip(ratios[:-1], ratios[1:], strict=True):
            past = [(x - denoise(x, sigma)) / sigma, *past][:order]
            x = x + (then - sigma) * sum(c * d for c, d in zip(table[len(past) - 1], past, strict=True))
        return x

    return walk


def one_call(num_calls):
    return num_calls


def two_calls(num_calls):
    """Two calls a step, one into data."""
    return (num_calls + 1) // 2


PEERS = {
    "k-diffusion euler": (k_diffusion("sample_euler"), one_call),
    "k-diffusion heun": (k_diffusion("sample_heun"), two_calls),
    "k-diffusion dpm_2": (k_diffusion("sample_dpm_2"), two_calls),
    "k-diffusion dpmpp_2s (eta 0)": (k_diffusion("sample_dpmpp_2s_ancestral", eta=0.0), two_calls),
    "k-diffusion lms 4": (k_diffusion("sample_lms"), one_call),
    "k-diffusion dpm_fast": (dpm_fast, one_call),
    "k-diffusion dpmpp_2m": (k_diffusion("sample_dpmpp_2m"), one_call),
    "k-diffusion dpmpp_3m (eta 0)": (
        k_diffusion("sample_dpmpp_3m_sde", eta=0.0, noise_sampler=lambda *_: 0.0),
        one_call,
    ),
    "diffusers DPM++ 3M": (diffusers("dpmsolver_multistep", solver_order=3), one_call),
    "diffusers DPM++ 3S": (diffusers("dpmsolver_singlestep", solver_order=3, final_sigmas_type="zero"), one_call),
    "diffusers UniPC 2": (diffusers("unipc_multistep", solver_order=2), one_call),
    "diffusers UniPC 3": (diffusers("unipc_multistep", solver_order=3), one_call),
    "diffusers DEIS 2": (diffusers("deis_multistep", end=1e-6, solver_order=2), one_call),
    "diffusers DEIS 3": (diffusers("deis_multistep", end=1e-6, solver_order=3), one_call),
    "iPNDM 2": (ipndm(2), one_call),
    "iPNDM 3": (ipndm(3), one_call),
    "iPNDM 4": (ipndm(4), one_call),
}
