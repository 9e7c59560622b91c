"""Plots show what is measured, and the measurement is right."""

import pytest
import torch

from vdiff.denoisers import GaussianDenoiser
from vdiff.evaluation import num_calls, plot_levels, plot_runs, plot_schedules, plot_solvers, solver_errors
from vdiff.process import EDMSchedule, FlowSchedule, LogNormalSigmaSampler
from vdiff.samplers import DPMpp2MSampler, EulerSampler, HeunSampler


class Gaussian(GaussianDenoiser, name="gaussian_in_three_dimensions"):
    def draw(self, num, seed=0):
        return super().draw((num, 3), seed)


def test_calls_are_counted():
    assert [num_calls(s) for s in (EulerSampler(7), HeunSampler(7), DPMpp2MSampler(7))] == [7, 13, 7]


def test_errors_fall_with_calls_by_the_order():
    table = {"euler": {n: EulerSampler(n) for n in (64, 128)}, "heun": {2 * n - 1: HeunSampler(n) for n in (64, 128)}}
    errors = solver_errors(table, Gaussian(mean=0.3, std=0.5), num=8)
    assert errors["euler"][64] / errors["euler"][128] == pytest.approx(2, abs=0.1)
    assert errors["heun"][127] / errors["heun"][255] == pytest.approx(4, abs=0.6)
    assert errors["heun"][127] < errors["euler"][128]


def test_the_curves_are_those_of_the_schedule():
    figure = plot_schedules({"flow": FlowSchedule()}, {"euler": EulerSampler(5)})
    alpha, sigma = figure.axes[0].get_lines()
    t = torch.tensor(alpha.get_xdata())
    assert torch.allclose(torch.tensor(alpha.get_ydata()), 1 - t) and torch.allclose(torch.tensor(sigma.get_ydata()), t)
    assert len(figure.axes[2].get_lines()[0].get_xdata()) == 6


def test_the_density_of_levels_is_the_density():
    figure = plot_levels(LogNormalSigmaSampler(mean=-1.0, std=1.0), EDMSchedule())
    (area,) = figure.axes[0].collections
    top = area.get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx((2 * torch.pi) ** -0.5, rel=0.01)  # of a Gaussian, at its middle


def test_curves_of_a_run_leave_out_what_was_not_logged():
    entries = [{"step": s, "train/loss": 1.0, "train/grad_norm": 2.0} for s in (20, 40)]
    entries.append({"step": 40, "validation/loss": 0.5, "train/loss": None})
    figure = plot_runs({"a": entries})
    raw, smooth = figure.axes[0].get_lines()
    assert list(raw.get_xdata()) == [20, 40] and list(smooth.get_ydata()) == pytest.approx([1, 1])
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [0.5]


def test_solvers_have_a_curve_each():
    figure = plot_solvers({"euler": {5: EulerSampler(5), 8: EulerSampler(8)}}, Gaussian(std=0.5))
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [5, 8] and line.get_ydata()[0] > line.get_ydata()[1]
