"""Plots of schedules, levels, runs and solvers. Each returns a matplotlib figure; nothing is global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdiff.denoisers import Denoiser, PowerLawDenoiser
from vdiff.process import HOST, EDMSchedule, NoiseSchedule, SigmaSampler
from vdiff.samplers import Node, Sampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = (1e-3, 1e3)  # of a ratio axis: beyond them a level is as good as data or noise


def plot_schedules(schedules: Mapping[str, NoiseSchedule], samplers: Mapping[str, Sampler] | None = None) -> Figure:
    """Signal, noise and their ratio over time; below, the levels that samplers visit.

    Args:
        schedules: By title.
        samplers: By title; each is shown under the first schedule.
    """
    figure, axes = _figure(3 if samplers else 2, height=3.4)
    t = torch.linspace(0, 1, 401, **HOST)
    for place, (title, schedule) in enumerate(schedules.items()):
        level = schedule(t)
        scale = level.sigma.max().clamp(min=1)  # EDM's sigma reaches 80: shown as a share of it
        axes[0].plot(t, level.alpha, f"C{place}-", label=title)
        axes[0].plot(t, level.sigma / scale, f"C{place}--")
        axes[1].plot(t, _shown(level.ratio), f"C{place}-", label=title)
    axes[0].set(xlabel="t", title="alpha (line), sigma (dashed, of its largest)")
    axes[1].set(xlabel="t", yscale="log", title="sigma / alpha")
    axes[0].legend(fontsize="small")
    if samplers:
        schedule = next(iter(schedules.values()))
        for place, (_, sampler) in enumerate(samplers.items()):
            ratios = _shown(sampler.levels(schedule).ratio)
            axes[2].plot(ratios, torch.full_like(ratios, -float(place)), ".-")
        axes[2].set(xscale="log", xlabel="sigma / alpha", title=f"levels visited under {next(iter(schedules))}")
        axes[2].set_yticks([-float(place) for place in range(len(samplers))], list(samplers))
    return figure


def plot_levels(sigma_sampler: SigmaSampler, schedule: NoiseSchedule, sampler: Sampler | None = None) -> Figure:
    """How often training draws each level, and where the sampler asks.

    The density over ``log(sigma / alpha)`` is exact, from the quantiles; nothing is drawn.
    """
    figure, (axis,) = _figure(1)
    shares = torch.linspace(0.0005, 0.9995, 400, **HOST)
    logs = _shown(sigma_sampler.quantile(shares, schedule).ratio).log()
    middle, width = (logs[1:] + logs[:-1]) / 2, (logs[1:] - logs[:-1]).clamp(min=1e-9)
    density = ((shares[1] - shares[0]) / width).clamp(max=5.0)  # a table's rows are spikes
    axis.fill_between(middle.exp(), density, alpha=0.4, step="mid", label="drawn in training")
    if sampler is not None:
        ratios = sampler.levels(schedule).ratio
        axis.plot(_shown(ratios), torch.zeros_like(ratios), "k|", markersize=14, label="visited while sampling")
    axis.set(xscale="log", xlabel="sigma / alpha", ylabel="density of its logarithm", ylim=(0, None))
    axis.legend(fontsize="small")
    return figure


def plot_runs(logs: Mapping[str, Sequence[Mapping[str, Any]]], smooth: float = 0.9) -> Figure:
    """Training curves: loss in training and in validation, gradient norm and learning rate.

    Args:
        logs: By title, the entries of ``log.jsonl`` (:func:`vdiff.training.read_log`).
        smooth: Of the running mean over the training loss, in [0, 1); the raw curve is behind it.
    """
    figure, axes = _figure(3)
    for place, (title, entries) in enumerate(logs.items()):
        steps, losses = _column(entries, "train/loss")
        axes[0].plot(steps, losses, f"C{place}-", alpha=0.25)
        axes[0].plot(steps, _running_mean(losses, smooth), f"C{place}-", label=title)
        for name, style in (("validation/loss", "o--"), ("validation/ema/loss", "s-")):
            steps, losses = _column(entries, name)
            if steps:
                label = title if name == "validation/loss" else f"{title}, averaged"
                axes[1].plot(steps, losses, f"C{place}{style}", label=label, markersize=4)
        axes[2].plot(*_column(entries, "train/grad_norm"), f"C{place}-", label=title)
    for axis, text in zip(axes, ("training loss", "validation loss", "gradient norm"), strict=True):
        axis.set(title=text, xlabel="step")
        if any(float(v) > 0 for line in axis.get_lines() for v in line.get_ydata()):
            axis.set_yscale("log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return figure


def plot_solvers(samplers: Mapping[str, Mapping[int, Sampler]], problem: Denoiser | None = None) -> Figure:
    """Error against network calls, on a problem whose flow is known.

    Args:
        samplers: By title, samplers by the network calls they are to take.
        problem: With ``flow``; by default a mixture of Gaussians with the spectrum of images in 64 dimensions.
    """
    figure, (axis,) = _figure(1, width=7.5, height=5.0)
    for title, errors in solver_errors(samplers, problem).items():
        axis.plot(list(errors), list(errors.values()), ".-", label=title)
    axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="root mean square error")
    axis.legend(fontsize="small")
    return figure


def solver_errors(
    samplers: Mapping[str, Mapping[int, Sampler]], problem: Any = None, num: int = 128
) -> dict[str, dict[int, float]]:
    """Root mean square distance to the exact end, by title and network calls, in float64 from sigma 80."""
    problem = PowerLawDenoiser() if problem is None else problem
    schedule = EDMSchedule()
    start, end = schedule.at_ratio(torch.tensor([80.0, 0.0], **HOST))
    dim = problem.draw(1).shape[1]
    noise = torch.randn(num, dim, generator=torch.Generator("cpu").manual_seed(0), **HOST)
    exact = problem.flow(80.0 * noise, start, end)
    seeds = list(range(num))
    return {
        title: {
            calls: (s(problem, schedule, noise, seeds=seeds) - exact).pow(2).mean().sqrt().item()
            for calls, s in by_calls.items()
        }
        for title, by_calls in samplers.items()
    }


def num_calls(sampler: Sampler, schedule: NoiseSchedule | None = None) -> int:
    """Network calls of one walk."""
    schedule = EDMSchedule() if schedule is None else schedule
    return sum(1 for _ in sampler.plan(Node.of(sampler.levels(schedule)), schedule))


def _figure(columns: int, width: float = 4.6, height: float = 3.8) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need the package matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, list(axes)


def _shown(ratio: Tensor) -> Tensor:
    return ratio.clamp(*ENDS)


def _column(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def _running_mean(values: Sequence[float], smooth: float) -> list[float]:
    """Exponential, and without the pull of where it starts."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = smooth * total + (1 - smooth) * value, smooth * weight + (1 - smooth)
        out.append(total / weight)
    return out
