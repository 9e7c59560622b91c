"""Latent diffusion's loss terms against its formulas in numpy."""

import numpy as np
import pytest
import torch

from vdiff.losses import LatentDiffusionLoss, MinSNRWeighting, MSELoss, VLBWeighting
from vdiff.process import (
    CosineSchedule,
    LinearSchedule,
    Prediction,
    ScaledLinearSchedule,
    X0Scale,
    ZeroSNRSchedule,
    parameterization,
)
from vdiff.registry import build

SD = ScaledLinearSchedule()
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def lvlb_weights(betas, posterior=0.0, language="epsilon"):
    """As latent diffusion tabulates them."""
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    variance = (1 - posterior) * betas * (1 - before) / (1 - kept) + posterior * betas
    if language == "epsilon":
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2 * variance * (1 - betas) * (1 - kept))
    elif language == "x0":
        weights = 0.5 * np.sqrt(kept) / (2 * 1 - kept)  # as their code has it
    else:
        weights = np.ones_like(betas)
    weights[0] = weights[1]
    return weights


def every_row(schedule):
    return schedule(torch.arange(1, schedule.num_rows + 1, dtype=torch.float64) / schedule.num_rows)


def problem(rows=(0, 1, 500, 999), schedule=SD, language="epsilon", scale=1.0, seed=0):
    """Truth at some rows of the table, and a prediction that is wrong."""
    g = torch.Generator().manual_seed(seed)
    level = every_row(schedule)[torch.tensor(rows)]
    x0, noise, wrong = (torch.randn(len(rows), 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    language = parameterization(language)
    said = language.value(x0, noise, level) + scale * wrong
    return Prediction(language, said, level.mix(x0, noise), level), x0, noise, level, {}


@pytest.mark.parametrize("posterior", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "schedule, betas", [(SD, BETAS), (LinearSchedule(num_rows=50), np.linspace(1e-4, 2e-2, 50))], ids=["sd", "short"]
)
def test_the_bound_weighs_epsilon_as_latent_diffusion_does(schedule, betas, posterior):
    weights = VLBWeighting(schedule, posterior)(every_row(schedule), parameterization("epsilon"))
    np.testing.assert_allclose(weights.numpy(), lvlb_weights(betas, posterior), rtol=1e-9)


def test_the_weights_are_those_of_stable_diffusion():
    """Rows 1, 500 and 999, as upstream's code computes them."""
    weights = VLBWeighting(SD)(every_row(SD)[torch.tensor([1, 500, 999])], parameterization("epsilon")).numpy()
    # Their tables are float32.
    np.testing.assert_allclose(weights, [0.50319237, 0.0033490562, 0.0061016544], rtol=1e-5)


@pytest.mark.parametrize("schedule", [SD, ZeroSNRSchedule(num_rows=40)], ids=["sd", "zero_snr"])
def test_the_bound_on_x0_is_half_the_fall_of_the_snr(schedule):
    level = every_row(schedule)
    weights = VLBWeighting(schedule)(level, parameterization("x0"))
    assert torch.allclose(weights[1:], -level.snr.diff() / 2, rtol=1e-6)
    assert weights.isfinite().all()


def test_the_bound_is_the_same_in_every_language():
    said, *truth = problem()
    results = [MSELoss(name, VLBWeighting(SD))(said, *truth).per_row for name in ("epsilon", "x0", "v")]
    assert all(torch.allclose(other, results[0], rtol=1e-5) for other in results[1:])


@pytest.mark.parametrize("language", ["epsilon", "x0", "v"])
def test_what_latent_diffusions_code_does_can_be_asked_for(language):
    weights = VLBWeighting(SD, published=True)(every_row(SD), parameterization(language))
    np.testing.assert_allclose(weights.numpy(), lvlb_weights(BETAS, language=language), rtol=1e-9)


def test_float32_levels_find_their_row():
    level = SD((torch.arange(1, 1001) / 1000).float())
    weights = VLBWeighting(SD)(level, parameterization("v"))
    exact = VLBWeighting(SD)(every_row(SD), parameterization("v"))
    assert weights.dtype is torch.float32
    assert torch.allclose(weights.double(), exact, rtol=1e-5)


# --- the loss ------------------------------------------------------------------------------------


def test_with_its_defaults_it_is_the_squared_error():
    given = problem()
    assert torch.equal(LatentDiffusionLoss(SD)(*given).per_row, MSELoss()(*given).per_row)


@pytest.mark.parametrize("language", ["epsilon", "v"])
def test_its_terms_add_up_as_in_latent_diffusions_code(language):
    rows = (0, 1, 500, 999)
    given = problem(rows, language=language)
    loss = LatentDiffusionLoss(
        SD, simple_weight=0.7, elbo_weight=0.01, posterior=0.2, published=True, log_variance=0.3,
    )  # fmt: skip
    values = loss(*given)
    simple = MSELoss()(*given).per_row.numpy()
    vlb = lvlb_weights(BETAS, 0.2, language)[list(rows)] * simple
    np.testing.assert_allclose(values.per_row, 0.7 * (simple / np.exp(0.3) + 0.3) + 0.01 * vlb, rtol=1e-6)
    np.testing.assert_allclose(values.metrics["ldm/vlb"], vlb, rtol=1e-6)
    np.testing.assert_allclose(values.metrics["ldm/simple"], simple, rtol=1e-6)
    assert (values.metrics["ldm/log_variance"] == torch.tensor(0.3)).all()


def test_a_log_variance_learns_the_logarithm_of_its_rows_error():
    """Where L e^-l + l is least; rows that were not drawn stay as they are."""
    rows, given = [3, 700], problem((3, 700), scale=2.0)
    loss = LatentDiffusionLoss(SD, learn_log_variance=True)
    optimizer = torch.optim.LBFGS(loss.parameters(), line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        total = loss(*given).per_row.sum()
        total.backward()
        return total

    optimizer.step(closure)
    errors = MSELoss()(*given).per_row
    assert torch.allclose(loss.log_variance[rows], errors.log(), atol=1e-3)
    others = torch.ones(1000, dtype=torch.bool)
    others[rows] = False
    assert (loss.log_variance[others] == 0).all()


def test_a_learned_log_variance_is_the_modules_own():
    loss = build(
        {"type": "latent_diffusion", "schedule": {"type": "scaled_linear"}, "learn_log_variance": True}, kind="loss"
    )
    assert [(name, tuple(p.shape)) for name, p in loss.named_parameters()] == [("log_variance", (1000,))]
    assert not list(LatentDiffusionLoss(SD).parameters())
    holder = torch.nn.Module()
    holder.loss = loss
    assert list(holder.state_dict()) == ["loss.log_variance"]


def test_pure_noise_costs_nothing_but_itself():
    """The bound has no form in epsilon where no signal is left; without it in the loss nothing breaks."""
    schedule = ZeroSNRSchedule()
    given = problem((998, 999), schedule, "v")
    for weight in (0.0, 0.1):
        assert LatentDiffusionLoss(schedule, elbo_weight=weight)(*given).per_row.isfinite().all()


def test_what_makes_no_sense_is_said():
    with pytest.raises(ValueError, match="weighted by MinSNRWeighting, on top of"):
        LatentDiffusionLoss(SD, MSELoss(weighting=MinSNRWeighting()))
    with pytest.raises(ValueError, match="CosineSchedule is no table of rows"):
        VLBWeighting(CosineSchedule())
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        VLBWeighting(SD, posterior=2.0)
    said, x0, noise, _, batch = problem((0, 1))
    level = SD(torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match=r"every frame has its own: \(2, 3\)"):
        LatentDiffusionLoss(SD)(said, x0, noise, level, batch)


# --- the scale of x0 -----------------------------------------------------------------------------


def test_the_scale_of_x0_is_videocrafters_table():
    """1 to 0.7 in 400 rows, then 0.7: numpy's linspace, and a constant."""
    table = np.concatenate([np.linspace(1, 0.7, 400), np.full(600, 0.7)])
    level = every_row(SD)
    np.testing.assert_allclose(X0Scale().at(level.t), table, rtol=1e-12)
    assert X0Scale().at(torch.tensor(0.0)) == 1
    video = torch.ones(1000, 2, 3, 1, 1)
    np.testing.assert_allclose(X0Scale()(video, level)[:, 1, 2, 0, 0], table, rtol=1e-6)
    with pytest.raises(ValueError, match="needs last > 0"):
        X0Scale(last=0.0)
