"""What a sampler costs beside the network: dispatched ops, scalar reads and CPU time per step.

vdiff's executor beside k-diffusion and diffusers, in one process, interleaved, one thread, with a
denoiser that does nothing. Ops are what reaches the dispatcher (on a GPU: kernel launches and views);
a scalar read is a synchronisation where the tensor is on a GPU.

    python benchmarks/sampler_overhead.py [--steps 50] [--repeats 15] [--out docs/benchmarks/sampler_overhead.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from racing import Ops, versions

from vdiff.denoisers import Denoiser
from vdiff.process import EDMSchedule, KarrasDiscretizer, Prediction, X0Parameterization
from vdiff.samplers import DDIMSampler, DPMpp2MSampler, EulerAncestralSampler, EulerSampler, HeunSampler

SHAPE = (1, 4, 8, 8)


class Idle(Denoiser):
    """Says that everything is clean already."""

    language = X0Parameterization()

    def forward(self, x_t, level, cond=None):
        return Prediction(self.language, x_t, x_t, level)


def k_diffusion_sampling():
    """``k_diffusion.sampling`` without the package's own imports, which need CLIP."""
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def ours(sampler):
    """The walk alone: planned and bound beforehand, as the peers get their sigmas beforehand."""
    start = torch.randn(SHAPE)
    run = sampler.bind(Idle(), EDMSchedule(), start, seeds=[0])
    return torch.no_grad()(lambda: run(start))


def k_diffusion(name, steps, **options):
    function = getattr(k_diffusion_sampling(), name)
    sigmas = KarrasDiscretizer()(EDMSchedule(), steps).ratio.float()
    start = torch.randn(SHAPE)

    def walk():
        with torch.no_grad():
            return function(lambda x, sigma, **_: x, start, sigmas, disable=True, **options)

    return walk


def diffusers(name, steps, **options):
    module = importlib.import_module("diffusers")
    start = torch.randn(SHAPE)

    def make():
        scheduler = getattr(module, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
        scheduler.set_timesteps(steps)
        return scheduler

    prepared = [make() for _ in range(2)]

    def walk():
        scheduler = prepared.pop() if prepared else make()
        began = time.process_time()
        with torch.no_grad():
            x = start
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(x, t, x).prev_sample
        return time.process_time() - began  # set_timesteps left out

    return walk


def table(steps):
    """Rows of contenders by solver."""
    return {
        "Euler": {
            "vdiff": ours(EulerSampler(steps)),
            "k-diffusion": k_diffusion("sample_euler", steps),
            "diffusers": diffusers("EulerDiscreteScheduler", steps),
        },
        "Heun": {"vdiff": ours(HeunSampler(steps)), "k-diffusion": k_diffusion("sample_heun", steps)},
        "DPM++ 2M": {
            "vdiff": ours(DPMpp2MSampler(steps)),
            "k-diffusion": k_diffusion("sample_dpmpp_2m", steps),
            "diffusers": diffusers("DPMSolverMultistepScheduler", steps),
        },
        "Euler ancestral": {
            "vdiff": ours(EulerAncestralSampler(steps)),
            "k-diffusion": k_diffusion("sample_euler_ancestral", steps),
            "diffusers": diffusers("EulerAncestralDiscreteScheduler", steps),
        },
        "DDIM": {"vdiff": ours(DDIMSampler(steps)), "diffusers": diffusers("DDIMScheduler", steps)},
    }


def count(walk, steps):
    with Ops() as ops:
        walk()
    return (ops.kernels + ops.views) / steps, ops.reads / steps


def cpu_times(contenders, repeats, walks=8):
    """CPU seconds a walk of each contender, interleaved; several walks at a time, so that caches are warm for all."""
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, walk in contenders.items():
            began = time.process_time()
            own = [walk() for _ in range(walks)]
            spent = sum(own) if isinstance(own[0], float) else time.process_time() - began
            times[name].append(spent / walks)
    return times


def compiled_graphs(steps):
    """Graphs and recompiles of a whole 2M walk under fullgraph compilation, over three runs and two schedules."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    sampler, start = DPMpp2MSampler(steps), torch.randn(SHAPE)
    walk = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    for schedule in (EDMSchedule(), EDMSchedule(), EDMSchedule(sigma_max=40.0)):
        run = sampler.bind(Idle(), schedule, start)
        with torch.no_grad():
            got, want = walk(run, start), run(start)
        assert (got - want).abs().max() < 1e-5
    return counter.frame_count


def report(steps, repeats):
    torch.set_num_threads(1)
    lines = [
        "# What a sampler costs beside the network",
        "",
        f"`python benchmarks/sampler_overhead.py`: {versions('vdiff', 'torch', 'k-diffusion', 'diffusers')}, CPU, one "
        f"thread, {steps} steps of a no-op denoiser on {list(SHAPE)}, median of {repeats} interleaved repeats.",
        "",
        "| solver | library | ops per step | scalar reads per step | CPU us per step | of k-diffusion's |",
        "|---|---|---|---|---|---|",
    ]
    for solver, contenders in table(steps).items():
        counts = {name: count(walk, steps) for name, walk in contenders.items()}
        times = cpu_times(contenders, repeats)
        median = {name: statistics.median(values) / steps * 1e6 for name, values in times.items()}
        pairs = {n: [a / b for a, b in zip(times[n], times.get("k-diffusion", []), strict=False)] for n in times}
        for name in contenders:
            ratio = f"{statistics.median(pairs[name]):.2f}" if pairs[name] else "-"
            ops, reads = counts[name]
            lines.append(f"| {solver} | {name} | {ops:.1f} | {reads:.1f} | {median[name]:.1f} | {ratio} |")
    lines += [
        "",
        "A whole 2M walk under `torch.compile(fullgraph=True)`, three runs, two schedules: "
        f"{compiled_graphs(10)} graph(s).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = report(options.steps, options.repeats)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
