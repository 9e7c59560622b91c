import math
import statistics

import pytest
import torch

from vdiff.process import (
    EDMSchedule,
    FlowSchedule,
    GridSigmaSampler,
    KarrasDiscretizer,
    LevelPair,
    LogitNormalSigmaSampler,
    LogNormalSigmaSampler,
    RowKeys,
    ScaledLinearSchedule,
    StratifiedSigmaSampler,
    UniformIndexSigmaSampler,
    UniformSigmaSampler,
    ZeroSNRSchedule,
)
from vdiff.registry import build

SAMPLERS = {
    "log_normal": (LogNormalSigmaSampler(), EDMSchedule()),
    "uniform": (UniformSigmaSampler(0.1, 0.9), FlowSchedule()),
    "uniform_index": (UniformIndexSigmaSampler(), ScaledLinearSchedule()),
    "logit_normal": (LogitNormalSigmaSampler(), FlowSchedule()),
}
every = pytest.mark.parametrize("sampler, schedule", SAMPLERS.values(), ids=SAMPLERS)


def keys(values, position=None, global_size=None, step=0):
    position = tuple(range(len(values))) if position is None else tuple(position)
    return RowKeys(0, step, tuple(values), position, global_size or max(position) + 1)


def grid(num=20_000):
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


# A grid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule(), ScaledLinearSchedule()])
def test_a_grid_gives_neighbours_and_ends_where_data_begins(schedule):
    sampler = GridSigmaSampler(10)
    levels = sampler.grid(schedule)
    low = 0.002 if schedule.num_rows is None else schedule(1 / 1000).ratio.item()
    assert (levels.ratio.diff() > 0).all() and levels.ratio[0].item() == pytest.approx(low, rel=1e-9)
    assert levels.t[-1].item() == pytest.approx(1.0)
    drawn = sampler.quantile(grid(), schedule)
    assert isinstance(drawn, LevelPair) and isinstance(drawn.to(torch.float32)[:3], LevelPair)
    place = torch.searchsorted(levels.t, drawn.t)
    assert torch.equal(levels.t[place], drawn.t) and torch.equal(levels.t[place - 1], drawn.lower.t)
    assert place.min() == 1 and (place.bincount()[1:] / len(place)).max() == pytest.approx(
        1 / (len(levels) - 1), abs=1e-3
    )


def test_the_karras_grid_is_that_of_consistency_models():
    """Song et al., arXiv:2303.01469: (eps^(1/7) + (i - 1) / (N - 1) (T^(1/7) - eps^(1/7)))^7 for i = 1 ... N."""
    levels = GridSigmaSampler(18, KarrasDiscretizer(sigma_min=0.002, sigma_max=80.0)).grid(EDMSchedule())
    ramp = torch.arange(18, dtype=torch.float64) / 17
    want = (0.002 ** (1 / 7) + ramp * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(levels.ratio, want, rtol=1e-9, atol=0)


def test_a_grid_may_be_drawn_as_a_log_normal_falls_between_its_levels():
    """Song & Dhariwal, arXiv:2310.14189, eq. 11."""
    sampler = GridSigmaSampler(18, mean=-1.1, std=2.0)
    logs, below = sampler.grid(EDMSchedule()).ratio.log().tolist(), statistics.NormalDist(-1.1, 2.0)
    want = torch.tensor([below.cdf(b) - below.cdf(a) for a, b in zip(logs, logs[1:], strict=False)])
    drawn = sampler.quantile(grid(), EDMSchedule()).ratio.log()
    share = torch.stack([(drawn - log).abs().lt(1e-9).double().mean() for log in logs[1:]])
    torch.testing.assert_close(share, want.double() / want.sum(), atol=1e-4, rtol=0)


def test_a_grid_says_what_it_cannot_be():
    with pytest.raises(ValueError, match="mean and std go together"):
        GridSigmaSampler(mean=-1.0)
    with pytest.raises(ValueError, match="needs a step and a sigma_min above 0"):
        GridSigmaSampler(0)
    with pytest.raises(ValueError, match="no level of KarrasDiscretizer in 10 steps lies above sigma_min = 100"):
        GridSigmaSampler(10, sigma_min=100.0).grid(EDMSchedule())


# Distributions -------------------------------------------------------------------------------------


def test_log_normal_has_its_mean_and_std():
    log = LogNormalSigmaSampler(mean=-1.2, std=1.2).quantile(grid(), EDMSchedule()).ratio.log()
    assert log.mean().item() == pytest.approx(-1.2, abs=1e-9) and log.std().item() == pytest.approx(1.2, abs=1e-3)
    below = statistics.NormalDist(-1.2, 1.2)
    for u in (1e-9, 0.01, 0.5, 0.9, 1 - 1e-9):
        value = LogNormalSigmaSampler().quantile(torch.tensor(u, dtype=torch.float64), EDMSchedule()).ratio.log().item()
        assert value == pytest.approx(below.inv_cdf(u), rel=1e-7)


def test_log_normal_is_about_the_ratio_on_any_schedule():
    u = grid(99)
    for schedule in (FlowSchedule(shift=3.0), ZeroSNRSchedule()):
        level = LogNormalSigmaSampler(0.0, 0.5).quantile(u, schedule)
        torch.testing.assert_close(level.ratio, LogNormalSigmaSampler(0.0, 0.5).quantile(u, EDMSchedule()).ratio)


def test_logit_normal_has_its_mean_and_std():
    logit = LogitNormalSigmaSampler(mean=0.3, std=0.8).quantile(grid(), FlowSchedule()).t.logit()
    assert logit.mean().item() == pytest.approx(0.3, abs=1e-9) and logit.std().item() == pytest.approx(0.8, abs=1e-3)


def test_uniform_is_uniform_in_time():
    t = UniformSigmaSampler(0.2, 0.6).quantile(grid(1000), FlowSchedule()).t
    torch.testing.assert_close(t, 0.2 + 0.4 * grid(1000))


def test_uniform_index_visits_every_row_equally_often_and_nothing_else():
    t = UniformIndexSigmaSampler().quantile(grid(5000), ScaledLinearSchedule()).t * 1000
    rows, counts = torch.unique(t.round(), return_counts=True)
    assert torch.equal(rows, torch.arange(1.0, 1001.0, dtype=torch.float64)) and set(counts.tolist()) == {5}
    assert (t - t.round()).abs().max() < 1e-9


def test_uniform_index_reaches_both_ends_of_the_table():
    ends = torch.tensor([2**-54, 1 - 2**-53], dtype=torch.float64)
    assert UniformIndexSigmaSampler().quantile(ends, ZeroSNRSchedule()).t.tolist() == [0.001, 1.0]
    assert UniformIndexSigmaSampler(num_rows=4).quantile(grid(4), FlowSchedule()).t.tolist() == [0.25, 0.5, 0.75, 1.0]


@every
def test_more_of_the_quantile_is_more_noise(sampler, schedule):
    level = sampler.quantile(grid(501), schedule)
    assert (level.ratio.diff() >= 0).all() and level.ratio[-1] > level.ratio[0]
    assert level.ratio.isfinite().all() and level.t.dtype == torch.float64


@every
def test_the_outermost_draws_are_levels_with_noise(sampler, schedule):
    u = torch.tensor([2**-54, 1 - 2**-53], dtype=torch.float64)
    for level in (sampler.quantile(u, schedule), sampler.quantile(u.clamp(max=1 - 2**-53) / 2**20, schedule)):
        assert level.ratio.isfinite().all() and (level.sigma > 0).all()


@every
def test_draws_follow_the_quantile_function(sampler, schedule):
    rows = keys(range(1000))
    level = sampler(schedule, rows)
    expected = sampler.quantile(rows.uniform("level"), schedule).to(torch.float32)
    assert torch.equal(level.alpha, expected.alpha) and torch.equal(level.sigma, expected.sigma)
    assert level.t.shape == (1000,) and level.t.dtype == torch.float32


# Keys ----------------------------------------------------------------------------------------------


@every
def test_the_same_key_gets_the_same_level(sampler, schedule):
    level = sampler(schedule, keys([4, 4, 5, 5], position=[0, 0, 1, 1]))
    assert level.t[0] == level.t[1] != level.t[2] == level.t[3]
    assert torch.equal(sampler(schedule, keys([9, 5])).t[1:], level.t[2:3])
    assert not torch.equal(sampler(schedule, keys([4, 5], step=1)).t, level.t[[0, 2]])


def test_joint_streams_are_equally_noisy_only_by_chance():
    num = 1000
    group = [k for i in range(num) for k in (i, num + i)]
    rows = keys(group, position=[i for i in range(num) for _ in range(2)])
    for sampler in (UniformSigmaSampler(), StratifiedSigmaSampler(UniformSigmaSampler())):
        t = sampler(FlowSchedule(), rows).t.reshape(num, 2)
        assert abs(torch.corrcoef(t.T)[0, 1]) < 0.1


# Strata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_stratified_puts_one_group_in_every_stratum_whatever_the_number_of_ranks(ranks):
    sampler, num = StratifiedSigmaSampler(UniformSigmaSampler()), 12
    parts = [range(r, num, ranks) for r in range(ranks)]
    t = torch.cat([sampler(FlowSchedule(), keys([50 + i for i in part], part, num)).t for part in parts])
    assert sorted((t * num).floor().int().tolist()) == list(range(num))
    whole = sampler(FlowSchedule(), keys(range(50, 50 + num), global_size=num)).t
    assert torch.equal(t, whole[[i for part in parts for i in part]])


@every
def test_stratified_keeps_the_distribution_and_narrows_its_mean(sampler, schedule):
    stratified = StratifiedSigmaSampler(sampler)
    assert torch.equal(stratified.quantile(grid(9), schedule).t, sampler.quantile(grid(9), schedule).t)
    means = {
        kind: torch.stack([kind(schedule, keys(range(64), step=s)).t.mean() for s in range(30)])
        for kind in (sampler, stratified)
    }
    assert means[stratified].std() < 0.3 * means[sampler].std()
    expected = sampler.quantile(grid(), schedule).t.mean()
    assert abs(means[stratified].mean() - expected) < 0.005


def test_a_group_is_not_bound_to_its_stratum():
    """Groups would learn the level of their place in the batch otherwise."""
    sampler = StratifiedSigmaSampler(UniformSigmaSampler())
    strata = torch.stack([(sampler(FlowSchedule(), keys(range(8), step=s)).t * 8).floor() for s in range(200)])
    assert all(len(strata[:, i].unique()) == 8 for i in range(8))


def test_within_its_stratum_a_level_is_drawn():
    sampler = StratifiedSigmaSampler(UniformSigmaSampler())
    part = torch.cat([sampler(FlowSchedule(), keys(range(8), step=s)).t * 8 % 1 for s in range(100)])
    assert abs(part.mean() - 0.5) < 0.05 and abs(part.std() - 12**-0.5) < 0.02


def test_the_last_number_of_the_last_stratum_is_below_one():
    """(n - 1 + u) / n rounds to 1 for u next to 1, and the quantile of 1 is infinite."""

    class Last(RowKeys):
        def stratum(self, purpose):
            return torch.tensor([self.global_size - 1])

        def uniform(self, purpose):
            return torch.tensor([1 - 2**-53], dtype=torch.float64)

    level = StratifiedSigmaSampler(LogNormalSigmaSampler())(EDMSchedule(), Last(0, 0, (1,), (0,), 1024))
    assert level.sigma.isfinite().all()


def test_pairs_share_under_strata():
    level = StratifiedSigmaSampler(LogNormalSigmaSampler())(EDMSchedule(), keys([4, 4, 5, 5], position=[0, 0, 1, 1]))
    assert level.sigma[0] == level.sigma[1] != level.sigma[2] == level.sigma[3]


# Errors and configs --------------------------------------------------------------------------------


def test_uniform_index_needs_a_table():
    with pytest.raises(ValueError, match="FlowSchedule has no table. Give num_rows, or use `uniform`"):
        UniformIndexSigmaSampler()(FlowSchedule(), keys([1]))


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.0, 1.1), (math.nan, 1.0)])
def test_uniform_needs_a_stretch_of_time(ends):
    with pytest.raises(ValueError, match="needs 0 <= low < high <= 1"):
        UniformSigmaSampler(*ends)


def test_sigma_samplers_are_built_by_name():
    node = {"type": "stratified", "sigma_sampler": {"type": "log_normal", "mean": -1, "std": 1.6}}
    built = build(node, "sigma_sampler")
    assert isinstance(built.sigma_sampler, LogNormalSigmaSampler) and built.sigma_sampler.mean == -1.0
