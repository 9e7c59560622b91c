"""Preference losses: closed forms, exact gradients, and one value per row that no other pair touches."""

import math

import pytest
import torch
import torch.nn.functional as F

from vdiff.data import Digits, Loader, PairsDataset
from vdiff.losses import DiffusionDPOLoss, IPOLoss, KTOLoss, MinSNRWeighting, MSELoss, SimPOLoss
from vdiff.process import CosineSchedule, Prediction, parameterization
from vdiff.registry import build

PAIRWISE = [DiffusionDPOLoss(50.0), DiffusionDPOLoss(50.0, label_smoothing=0.1), IPOLoss(20.0), SimPOLoss(30.0)]
UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking")


def problem(rows=6, seed=0, axes=(3, 2, 4, 4), same=False):
    """A policy and a reference over video rows in float64, pairs sharing level and noise."""
    g = torch.Generator().manual_seed(seed)
    level = CosineSchedule()(torch.linspace(0.2, 0.8, rows // 2, dtype=torch.float64).repeat_interleave(2))
    x0, said, theirs = (torch.randn(rows, *axes, generator=g, dtype=torch.float64) for _ in range(3))
    noise = torch.randn(rows // 2, *axes, generator=g, dtype=torch.float64).repeat_interleave(2, 0)
    v, x_t = parameterization("v"), level.mix(x0, noise)
    said.requires_grad_()
    reference = Prediction(v, said.detach() if same else theirs, x_t, level)
    return Prediction(v, said, x_t, level, reference), x0, noise, level


def errors(prediction, x0, noise, level):
    """Mean squared errors of policy and reference by row, over all other axes."""
    truth = parameterization("v").value(x0, noise, level)
    return [((p.value - truth) ** 2).mean((1, 2, 3, 4)) for p in (prediction, prediction.reference)]


def margins(*args):
    ours, theirs = errors(*args)
    return (ours - theirs)[1::2] - (ours - theirs)[0::2]


@pytest.mark.parametrize("beta", [1.0, 5000.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_where_policy_and_reference_agree_dpo_is_the_logarithm_of_two(beta, label_smoothing):
    prediction, *rest = problem(same=True)
    values = DiffusionDPOLoss(beta, label_smoothing)(prediction, *rest, {})
    assert torch.equal(values.per_row, torch.full((6,), math.log(2)))
    assert torch.equal(values.metrics["preference/margin"], torch.zeros(6))
    assert torch.equal(values.metrics["preference/accuracy"], torch.full((6,), 0.5))  # a tie is half a win


@pytest.mark.parametrize("beta", [1.0, 5000.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_there_its_gradient_by_the_margin_is_a_quarter_of_beta(beta, label_smoothing):
    margin = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    DiffusionDPOLoss(beta, label_smoothing).of_margin(margin).sum().backward()
    assert torch.equal(margin.grad, torch.full_like(margin, -beta / 4 * (1 - 2 * label_smoothing)))


def test_there_each_side_of_a_pair_pulls_with_a_quarter_of_beta():
    """d loss / d error of a row is beta / 4 for the preferred and -beta / 4 for the rejected one, in float64."""
    prediction, x0, noise, level = problem(same=True)
    DiffusionDPOLoss(8.0)(prediction, x0, noise, level, {}).per_row[::2].sum().backward()
    truth = parameterization("v").value(x0, noise, level)
    by_error = 2 * (prediction.value - truth).detach() / truth[0].numel()
    pull = torch.tensor([2.0, -2.0] * 3, dtype=torch.float64)[:, None, None, None, None]
    torch.testing.assert_close(prediction.value.grad, pull * by_error, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "loss, of",
    [
        (DiffusionDPOLoss(50.0), lambda m: -F.logsigmoid(25 * m)),
        (
            DiffusionDPOLoss(50.0, label_smoothing=0.1),
            lambda m: -0.9 * torch.sigmoid(25 * m).log() - 0.1 * torch.sigmoid(-25 * m).log(),
        ),
        (IPOLoss(20.0), lambda m: (m / 2 - 1 / 40) ** 2),
    ],
)
def test_loss_and_gradient_are_those_written_by_hand(loss, of):
    prediction, *rest = problem()
    values = loss(prediction, *rest, {})
    torch.testing.assert_close(values.per_row[::2], of(margins(prediction, *rest)).float())
    assert torch.equal(values.per_row[::2], values.per_row[1::2])
    values.per_row.mean().backward()
    (by_hand,) = torch.autograd.grad(of(margins(prediction, *rest)).mean(), prediction.value)
    torch.testing.assert_close(prediction.value.grad, by_hand, rtol=1e-6, atol=1e-12)  # the loss is float32


def test_ipo_is_least_where_the_margin_is_one_over_beta():
    margin = torch.tensor([1 / 20], dtype=torch.float64, requires_grad=True)
    IPOLoss(20.0).of_margin(margin).sum().backward()
    assert margin.grad.item() == 0 and IPOLoss(20.0).of_margin(margin).item() == 0


def test_simpo_asks_no_reference():
    prediction, *rest = problem()
    ours, _ = errors(prediction, *rest)
    values = SimPOLoss(30.0, gamma=0.7)(prediction.with_(reference=None), *rest, {})
    want = -F.logsigmoid(15 * (ours[1::2] - ours[0::2]) - 0.7)
    torch.testing.assert_close(values.per_row[::2], want.detach().float())
    assert not any("/reference_" in name for name in values.metrics)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_swapping_the_two_negates_the_margin(loss):
    prediction, x0, noise, level = problem()
    swap = torch.tensor([1, 0, 3, 2, 5, 4])
    swapped = Prediction(
        prediction.language,
        prediction.value[swap],
        prediction.x_t[swap],
        level,
        prediction.reference.with_(value=prediction.reference.value[swap], x_t=prediction.x_t[swap]),
    )
    a = loss(prediction, x0, noise, level, {}).metrics
    b = loss(swapped, x0[swap], noise, level, {}).metrics
    assert a["preference/margin"].abs().min() > 0
    assert torch.equal(a["preference/margin"], -b["preference/margin"])
    assert torch.equal(a["preference/accuracy"], 1 - b["preference/accuracy"])
    assert torch.equal(a["preference/win_error"][0::2], b["preference/lose_error"][1::2])


@pytest.mark.parametrize("loss", [*PAIRWISE, *(KTOLoss(3.0, baseline=0.1, utility=u) for u in UTILITIES)])
def test_a_pair_does_not_know_what_batch_it_is_in(loss):
    prediction, x0, noise, level = problem()
    wanted = torch.tensor([1, 0, 1, 1, 0, 0])
    whole = loss(prediction, x0, noise, level, {"wanted": wanted})
    for rows in (slice(0, 2), slice(2, 6)):
        part = Prediction(
            prediction.language,
            prediction.value[rows],
            prediction.x_t[rows],
            level[rows],
            prediction.reference.with_(value=prediction.reference.value[rows], x_t=prediction.x_t[rows]),
        )
        alone = loss(part, x0[rows], noise[rows], level[rows], {"wanted": wanted[rows]})
        assert torch.equal(alone.per_row, whole.per_row[rows])


def test_figures_are_by_side_and_without_gradient():
    prediction, *rest = problem()
    ours, theirs = errors(prediction, *rest)
    metrics = DiffusionDPOLoss(50.0)(prediction, *rest, {}).metrics
    for name, want, side in (("win", ours, 0), ("lose", ours, 1), ("reference_win", theirs, 0)):
        value = metrics[f"preference/{name}_error"]
        torch.testing.assert_close(value[side::2], want[side::2].detach().float())
        assert value[1 - side :: 2].isnan().all()
    torch.testing.assert_close(metrics["preference/margin"][::2], margins(prediction, *rest).detach().float())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_error_may_be_weighted_and_in_another_language():
    prediction, x0, noise, level = problem()
    error = MSELoss("x0", MinSNRWeighting(5.0))
    ours, theirs = (error.errors(p, x0, noise, level, {}) for p in (prediction, prediction.reference))
    want = -F.logsigmoid(2.0 * ((ours - theirs)[1::2] - (ours - theirs)[0::2]))
    got = DiffusionDPOLoss(4.0, error=error)(prediction, x0, noise, level, {}).per_row[::2]
    torch.testing.assert_close(got, want.float())
    built = build({"type": "diffusion_dpo", "beta": 4.0, "error": {"type": "mse", "parameterization": "x0"}}, "loss")
    assert isinstance(built.error, MSELoss)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("baseline, seed", [("batch", 0), ("batch", 14), (0.0, 0), (0.3, 0)])
def test_kto_is_the_closed_form(utility, baseline, seed):
    prediction, *rest = problem(seed=seed)
    ours, theirs = errors(prediction, *rest)
    gain = theirs - ours
    assert (gain.mean() > 0) == (seed > 0)  # below 0 the baseline of a batch is 0
    z = gain.mean().clamp(min=0).detach() if baseline == "batch" else baseline
    wanted = torch.tensor([True, False, True, True, False, False])
    x = torch.where(wanted, 1.0, -1.0) * 3.0 * (gain - z)
    felt = {"kahneman_tversky": 1 - x.sigmoid(), "loss_averse": -F.logsigmoid(x), "risk_seeking": F.logsigmoid(-x)}
    want = torch.where(wanted, 1.0, 0.5) * felt[utility]
    loss = KTOLoss(3.0, unwanted=0.5, baseline=baseline, utility=utility)
    got = loss(prediction, *rest, {"wanted": wanted}).per_row
    torch.testing.assert_close(got, want.detach().float())
    (a,) = torch.autograd.grad(got.sum(), prediction.value)
    (b,) = torch.autograd.grad(want.sum(), prediction.value)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)  # no gradient through the baseline; the loss is float32


def test_figures_of_kto_are_the_gain_and_the_errors_of_either_kind():
    prediction, *rest = problem()
    ours, theirs = (error.detach() for error in errors(prediction, *rest))
    wanted = torch.tensor([True, False, True, True, False, False])
    figures = KTOLoss(3.0, baseline=0.3)(prediction, *rest, {"wanted": wanted}).metrics
    figures = {name.removeprefix("preference/"): value for name, value in figures.items()}
    torch.testing.assert_close(figures["reward"], (theirs - ours).float())
    assert torch.equal(figures["accuracy"], ((theirs > ours) == wanted).float())
    assert torch.equal(figures["baseline"], torch.full((6,), 0.3))
    for name, rows in (("win_error", wanted), ("lose_error", ~wanted)):
        torch.testing.assert_close(figures[name][rows], ours[rows].float())
        assert figures[name][~rows].isnan().all()
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize("loss", [*PAIRWISE[:3], KTOLoss(3.0)])
def test_the_reference_has_no_gradient_and_the_loss_does_not_pull_at_it(loss):
    prediction, *rest = problem()
    moving = prediction.reference.value.clone().requires_grad_()
    prediction = prediction.with_(reference=prediction.reference.with_(value=moving))
    loss(prediction, *rest, {"wanted": torch.tensor([1, 0, 1, 0, 1, 0])}).per_row.sum().backward()
    assert prediction.value.grad.any() and moving.grad is None


def test_kto_where_policy_and_reference_agree_is_a_half_and_pulls_with_a_quarter_of_beta():
    prediction, x0, noise, level = problem(same=True)
    wanted = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    values = KTOLoss(8.0)(prediction, x0, noise, level, {"wanted": wanted})
    assert torch.equal(values.per_row, torch.full((6,), 0.5))
    assert torch.equal(values.metrics["preference/accuracy"], torch.full((6,), 0.5))  # a tie is half a win
    values.per_row.sum().backward()
    truth = parameterization("v").value(x0, noise, level)
    by_error = 2 * (prediction.value - truth).detach() / truth[0].numel()
    pull = 2.0 * wanted.double()[:, None, None, None, None]
    torch.testing.assert_close(prediction.value.grad, pull * by_error, rtol=1e-14, atol=0)


def test_without_a_reference_the_mixin_to_add_is_named():
    prediction, *rest = problem()
    for loss in (DiffusionDPOLoss(), IPOLoss(), KTOLoss()):
        with pytest.raises(ValueError, match="type: ref_model.*always: true"):
            loss(prediction.with_(reference=None), *rest, {"wanted": torch.ones(6)})


def test_what_is_no_pair_is_refused():
    prediction, x0, noise, level = problem()
    with pytest.raises(ValueError, match="5 rows are not pairs.*`pairs`"):
        DiffusionDPOLoss()(prediction, x0[:5], noise, level, {})
    keys = torch.tensor([3, 3, 4, 5, 6, 6])
    with pytest.raises(ValueError, match="rows 2 and 3 should be a pair, and have the noise keys 4 and 5"):
        DiffusionDPOLoss()(prediction, x0, noise, level, {"noise_key": keys})
    assert len(DiffusionDPOLoss(shared_noise=False)(prediction, x0, noise, level, {"noise_key": keys}).per_row) == 6


def test_batches_of_the_pairs_data_set_are_pairs():
    batch = Loader(PairsDataset(Digits("test"), [(4, 9), (0, 7), (1, 2)]), 3).batch(0)
    prediction, *_ = problem(axes=(1, 8, 8))
    level, noise = prediction.level, torch.zeros_like(batch["image"])
    assert len(DiffusionDPOLoss()(prediction, batch["image"], noise, level, batch).per_row) == 6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DiffusionDPOLoss(0.0), "beta must be positive"),
        (lambda: DiffusionDPOLoss(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (lambda: SimPOLoss(gamma=-1.0), "gamma must not be negative"),
        (lambda: KTOLoss(beta=0.0), "beta must be positive"),
        (lambda: KTOLoss(wanted=-1.0), "the weights not negative"),
        (lambda: KTOLoss(unwanted=-1.0), "the weights not negative"),
        (lambda: KTOLoss(baseline="mean"), "baseline is 'batch' or a number"),
        (lambda: KTOLoss(utility="bold"), "utility 'bold'"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kto_names_the_field_it_needs():
    prediction, *rest = problem()
    with pytest.raises(ValueError, match=r"a field 'wanted' of shape \(6,\).*has none.*label"):
        KTOLoss()(prediction, *rest, {"label": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"of shape \(6,\).*has one of shape \(6, 1\)"):
        KTOLoss()(prediction, *rest, {"wanted": torch.zeros(6, 1)})
