"""Levels by search: the shortest path is the shortest, the costs are those of the steps, and the table pays."""

import itertools

import pytest
import torch

from vdiff.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from vdiff.process import EDMSchedule, FlowSchedule, GITSDiscretizer, KarrasDiscretizer, NoiseLevel
from vdiff.process.gits import euler_costs, shortest_walk
from vdiff.registry import build
from vdiff.samplers import ABSampler, DDIMSampler, HeunSampler, search_levels

EDM = EDMSchedule()


def noise(rows=32, dim=2, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def humps():
    return GaussianMixtureDenoiser(
        torch.tensor([[-0.6, 0.2], [0.5, -0.1]]), torch.tensor([[0.15, 0.3], [0.3, 0.05]]), torch.tensor([0.4, 0.6])
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4, 6])
@pytest.mark.parametrize("growth", [1.0, 1.2])
def test_the_path_is_the_best_of_all_paths(num_steps, growth):
    costs = torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).triu(1)
    costs[costs == 0] = float("inf")

    def cost(path):
        return sum(growth**k * costs[i, j].item() for k, (i, j) in enumerate(itertools.pairwise(path)))

    every = [(0, *middle, 6) for middle in itertools.combinations(range(1, 6), num_steps - 1)]
    assert shortest_walk(costs, num_steps, growth) == list(min(every, key=cost))


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="1 to 6 steps between 7 levels, got 7"):
        shortest_walk(torch.ones(7, 7), 7)
    with pytest.raises(ValueError, match="no path"):
        shortest_walk(torch.full((3, 3), float("inf")), 2)


def test_a_step_costs_what_ddim_strays_from_the_exact_flow():
    denoiser = GaussianDenoiser(std=[0.7, 0.1])
    levels = KarrasDiscretizer()(EDM, 5)
    points = [NoiseLevel(*(v[i] for v in vars(levels).values())) for i in range(6)]
    states = torch.stack([denoiser.flow(80 * noise(), points[0], point) for point in points])
    x0s = torch.stack(
        [
            denoiser(x, NoiseLevel(*(v.expand(32) for v in vars(p).values()))).x0
            for x, p in zip(states, points[:-1], strict=False)
        ]
    )
    costs = euler_costs(levels, states, x0s)
    keep = levels.sigma[4] / levels.sigma[1]
    strayed = keep * states[1] + (1 - keep) * x0s[1] - states[4]
    assert costs[1, 4].item() == pytest.approx((strayed**2).mean(-1).sqrt().mean().item(), rel=1e-12)
    assert torch.equal(torch.isinf(costs), torch.ones(6, 6).tril().bool())


def test_data_at_one_point_costs_nothing_anywhere():
    """There first-order steps are exact, whatever the frame."""
    point = GaussianDenoiser(mean=[0.3, -0.4], std=0.0)
    for schedule in (EDM, FlowSchedule()):
        levels = KarrasDiscretizer(sigma_max=80.0)(schedule, 6)
        points = [NoiseLevel(*(v[i] for v in vars(levels).values())) for i in range(7)]
        start = points[0].sigma * noise() + points[0].alpha * point.mean
        states = torch.stack([point.flow(start, points[0], p) for p in points])
        costs = euler_costs(levels, states, point.mean.expand(6, 32, 2))
        assert costs[torch.isfinite(costs)].max() < 1e-12


def test_searched_levels_beat_those_everyone_uses():
    """For the solver that the costs are those of, on noise that the search did not see."""
    denoiser, start = humps(), noise(256, seed=1)
    want = ABSampler(400)(denoiser, EDM, start)
    found = search_levels(denoiser, EDM, noise(64), 6)
    errors = {
        levels: ((DDIMSampler(6, discretizer=levels)(denoiser, EDM, start) - want) ** 2).mean().sqrt().item()
        for levels in (found, KarrasDiscretizer())
    }
    assert errors[found] < 0.8 * errors[next(d for d in errors if d is not found)]


def test_the_table_is_a_subset_of_the_teachers_levels():
    teacher = ABSampler(40, discretizer=KarrasDiscretizer(5.0))
    found = search_levels(humps(), EDM, noise(), 7, teacher=teacher)
    fine = teacher.levels(EDM).ratio
    assert len(found.ratios) == 7 and found.ratios[0] == fine[0]
    assert all((fine - ratio).abs().min() < 1e-12 * ratio for ratio in found.ratios)
    assert found(EDM, 7).ratio.tolist() == pytest.approx([*found.ratios.tolist(), 0.0], rel=1e-12)


def test_other_numbers_of_steps_lie_between_and_keep_the_ends():
    table = GITSDiscretizer([80.0, 10.0, 1.0, 0.1])
    for num_steps in (2, 3, 5, 9):
        ratios = table(EDM, num_steps).ratio
        assert len(ratios) == num_steps + 1 and (ratios.diff() < 0).all()
        assert ratios[[0, -2, -1]].tolist() == pytest.approx([80.0, 0.1, 0.0])


def test_a_config_holds_the_table():
    built = build({"type": "gits", "ratios": [80.0, 3.0, 0.2]}, "discretizer")
    assert isinstance(built, GITSDiscretizer) and built.ratios.tolist() == [80.0, 3.0, 0.2]


def test_what_is_no_table_or_no_teacher_is_refused():
    for bad in ([], [1.0, 2.0], [1.0, 0.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="GITSDiscretizer: a table"):
            GITSDiscretizer(bad)
    with pytest.raises(ValueError, match="from a finite sigma / alpha to data"):
        search_levels(humps(), FlowSchedule(), noise(), 5)
    with pytest.raises(ValueError, match="once a step"):
        search_levels(humps(), EDM, noise(), 5, teacher=HeunSampler(20))
