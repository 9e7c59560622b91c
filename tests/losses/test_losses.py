"""Losses: zero at the truth, the same in every language, weighted as the papers say."""

import math

import pytest
import torch
import torch.nn.functional as F

from vdiff.losses import (
    BUCKETS,
    EDMWeighting,
    EpsilonWeighting,
    HuberLoss,
    L1Loss,
    LossValues,
    MinSNRWeighting,
    MSELoss,
    SNRWeighting,
    UnitWeighting,
    VWeighting,
)
from vdiff.process import CosineSchedule, EDMSchedule, FlowSchedule, Prediction, ZeroSNRSchedule, parameterization

LANGUAGES = ["x0", "epsilon", "v", "velocity", "edm"]


def problem(schedule=None, rows=6, seed=0):
    """Truth, and a prediction of it that is wrong by a known amount of x0."""
    g = torch.Generator().manual_seed(seed)
    schedule = schedule or CosineSchedule()
    level = schedule(torch.linspace(0.1, 0.9, rows, dtype=torch.float64))
    x0, noise = (torch.randn(rows, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, noise, level


def predict(language, x0, noise, level, wrong=0.0):
    language = parameterization(language)
    return Prediction(language, language.value(x0, noise, level) + wrong, level.mix(x0, noise), level)


@pytest.mark.parametrize("loss", [MSELoss(), L1Loss(), HuberLoss(), MSELoss("x0", MinSNRWeighting()), L1Loss("v")])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_truth_costs_nothing(loss, language):
    x0, noise, level = problem()
    values = loss(predict(language, x0, noise, level), x0, noise, level, {})
    assert values.per_row.shape == (6,) and values.per_row.dtype == torch.float32
    assert values.per_row.abs().max() < 1e-5


@pytest.mark.parametrize("loss, of", [(MSELoss(), F.mse_loss), (L1Loss(), F.l1_loss)])
def test_errors_are_those_of_torch(loss, of):
    x0, noise, level = problem()
    said = predict("v", x0, noise, level, wrong=torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 4, 4))
    want = of(said.value, said.language.value(x0, noise, level), reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(loss(said, x0, noise, level, {}).per_row, want.float())


def test_what_a_network_says_in_half_precision_is_compared_with_the_exact_truth():
    x0, noise, level = problem()
    said = predict("v", x0, noise, level, wrong=0.1)
    half = said.with_(value=said.value.bfloat16())
    want = MSELoss()(half.with_(value=half.value.double()), x0, noise, level, {}).per_row
    torch.testing.assert_close(MSELoss()(half, x0, noise, level, {}).per_row, want)


@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule(), EDMSchedule(sigma_max=5.0, rho=2.0)])
@pytest.mark.parametrize(
    "weighting", [EDMWeighting(), MinSNRWeighting(), VWeighting(), EpsilonWeighting(), SNRWeighting()]
)
def test_a_weighted_loss_is_the_same_in_every_language(schedule, weighting):
    """The weight is one of the error of x0; changing the language multiplies error and weight inversely."""
    x0, noise, level = problem(schedule)
    said = predict("v", x0, noise, level, wrong=0.1)
    results = [MSELoss(name, weighting)(said, x0, noise, level, {}).per_row for name in LANGUAGES]
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-4)


@pytest.mark.parametrize(
    "weighting, language, want",
    [
        (EDMWeighting(0.5), "edm", lambda s: torch.ones_like(s)),
        (EDMWeighting(0.5), "x0", lambda s: 1 / 0.25 + s),
        (VWeighting(), "v", lambda s: torch.ones_like(s)),
        (EpsilonWeighting(), "epsilon", lambda s: torch.ones_like(s)),
        (EpsilonWeighting(), "x0", lambda s: s),
        (MinSNRWeighting(5.0), "x0", lambda s: s.clamp(max=5)),
        (MinSNRWeighting(0.5), "x0", lambda s: s.clamp(max=0.5)),
        (MinSNRWeighting(5.0), "epsilon", lambda s: s.clamp(max=5) / s),  # Hang et al., arXiv:2303.09556
        (MinSNRWeighting(5.0), "v", lambda s: s.clamp(max=5) / (s + 1)),
        (SNRWeighting(low=1.0), "x0", lambda s: s.clamp(min=1)),  # truncated SNR, arXiv:2202.00512
        (SNRWeighting(power=0.5), "x0", lambda s: s.sqrt()),
        (UnitWeighting(), "v", lambda s: torch.ones_like(s)),
    ],
)
def test_weights_are_those_of_the_papers(weighting, language, want):
    _, _, level = problem()
    got = weighting(level, parameterization(language))
    assert torch.allclose(got, want(level.snr), rtol=1e-10)


@pytest.mark.parametrize(
    "weighting",
    [UnitWeighting(), EDMWeighting(), SNRWeighting(), MinSNRWeighting(), VWeighting(), EpsilonWeighting()],
)
def test_a_weight_of_an_error_of_x0_is_its_weight_in_the_language_x0(weighting):
    _, _, level = problem()
    torch.testing.assert_close(weighting(level, parameterization("x0")), weighting.on_x0(level))


def test_weights_are_finite_at_pure_noise_in_the_languages_that_live_there():
    level = ZeroSNRSchedule()(torch.ones(1, dtype=torch.float64))
    for weighting in (VWeighting(), MinSNRWeighting(), SNRWeighting(), EDMWeighting()):
        for language in ("v", "x0", "edm"):
            assert torch.isfinite(weighting(level, parameterization(language))).all()
    assert MinSNRWeighting()(level, parameterization("v")).item() == 0.0


def test_per_frame_levels_weigh_each_frame():
    level = CosineSchedule()(torch.tensor([[0.2, 0.8]], dtype=torch.float64))
    x0, noise = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64), torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
    said = predict("x0", x0, noise, level, wrong=1.0)
    got = MSELoss(weighting=MinSNRWeighting())(said, x0, noise, level, {}).per_row
    assert got.item() == pytest.approx(level.snr.clamp(max=5).mean().item(), rel=1e-6)


def test_a_mask_says_what_counts():
    x0, noise, level = problem()
    wrong = torch.zeros_like(x0)
    wrong[:, :, :2] = 1.0
    said = predict("x0", x0, noise, level, wrong=wrong)
    mask = torch.zeros(6, 1, 4, 4)
    mask[:, :, :2] = 1
    batch = {"keep": mask}
    assert torch.allclose(MSELoss(mask="keep")(said, x0, noise, level, batch).per_row, torch.ones(6))
    batch = {"keep": 1 - mask}
    assert MSELoss(mask="keep")(said, x0, noise, level, batch).per_row.abs().max() < 1e-10
    nothing = MSELoss(mask="keep")(said, x0, noise, level, {"keep": torch.zeros(6)})
    assert torch.equal(nothing.per_row, torch.zeros(6))
    with pytest.raises(KeyError, match="no field 'keep'"):
        MSELoss(mask="keep")(said, x0, noise, level, {"image": x0})
    with pytest.raises(ValueError, match="does not fit"):
        MSELoss(mask="keep")(said, x0, noise, level, {"keep": torch.ones(6, 1, 5, 5)})


def test_a_mask_per_frame_counts_frames():
    """Also where there are as many channels as frames."""
    x0, level = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64), CosineSchedule()(torch.full((2,), 0.5).double())
    wrong = torch.zeros_like(x0)
    wrong[:, :, 0] = 1.0
    said = predict("x0", x0, torch.randn_like(x0), level, wrong=wrong)
    for mask, want in (([[1, 0, 0], [0, 1, 1]], [1.0, 0.0]), ([1, 1], [1 / 3, 1 / 3])):
        got = MSELoss(mask="keep")(said, x0, x0, level, {"keep": torch.tensor(mask)}).per_row
        assert got.tolist() == pytest.approx(want)


def test_huber_is_squared_where_small_and_linear_where_large():
    loss = HuberLoss(delta=0.1)
    small, large = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e3, dtype=torch.float64)
    assert loss.pointwise(small).item() == pytest.approx(1e-6, rel=1e-3)
    assert loss.pointwise(large).item() == pytest.approx(2 * 0.1 * 1e3, rel=1e-3)
    want = 2 * 0.1**2 * (math.sqrt(1 + (0.3 / 0.1) ** 2) - 1)
    assert loss.pointwise(torch.tensor(0.3, dtype=torch.float64)).item() == pytest.approx(want, rel=1e-12)


def test_buckets_share_out_the_rows():
    x0, noise, level = problem(EDMSchedule())
    values = MSELoss()(predict("edm", x0, noise, level, wrong=0.3), x0, noise, level, {})
    assert len(values.metrics) == len(BUCKETS) + 1
    counted = torch.stack([~v.isnan() for v in values.metrics.values()])
    assert (counted.sum(0) == 1).all()
    low, high = ("loss/sigma_0_0.1", level.ratio <= 0.1), ("loss/sigma_10_inf", level.ratio > 10)
    for name, inside in (low, high):
        assert torch.equal(~values.metrics[name].isnan(), inside)
    assert not any(v.requires_grad for v in values.metrics.values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MinSNRWeighting(0.0), "gamma must be positive"),
        (lambda: HuberLoss(delta=0.0), "delta must be positive"),
        (lambda: HuberLoss(like="line"), "like is square or distance"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_loss_is_one_value_per_row(shape):
    with pytest.raises(ValueError, match="one value per row"):
        LossValues(torch.zeros(shape))
