"""Prior preservation: rows of the class count lambda times, whatever the loss inside."""

import numpy as np
import pytest
import torch

from vdiff.data import ArraysDataset, Digits, DreamBoothDataset, Loader
from vdiff.losses import HuberLoss, MinSNRWeighting, MSELoss, PriorPreservationLoss
from vdiff.process import CosineSchedule, Prediction, parameterization
from vdiff.registry import build


def problem(rows=6):
    g = torch.Generator().manual_seed(0)
    level = CosineSchedule()(torch.linspace(0.2, 0.8, rows, dtype=torch.float64))
    x0, noise, said = (torch.randn(rows, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    return Prediction(parameterization("v"), said.requires_grad_(), level.mix(x0, noise), level), x0, noise, level


@pytest.mark.parametrize("inner", [MSELoss(), HuberLoss(), MSELoss(weighting=MinSNRWeighting())])
def test_the_mean_is_half_of_dreambooths_sum(inner):
    prediction, *rest = problem()
    is_prior = torch.tensor([False, True] * 3)
    values = PriorPreservationLoss(inner, weight=0.3)(prediction, *rest, {"is_prior": is_prior})
    plain = inner(prediction, *rest, {}).per_row
    torch.testing.assert_close(2 * values.per_row.mean(), plain[0::2].mean() + 0.3 * plain[1::2].mean())
    assert torch.equal(values.metrics["prior/instance_loss"][0::2], plain[0::2])
    assert torch.equal(values.metrics["prior/class_loss"][1::2], plain[1::2])
    assert values.metrics["prior/instance_loss"][1::2].isnan().all() and "loss/sigma_0_0.1" in values.metrics


def test_at_weight_zero_the_class_has_no_gradient():
    prediction, *rest = problem()
    loss = build({"type": "prior_preservation", "loss": {"type": "mse"}, "weight": 0.0}, "loss")
    loss(prediction, *rest, {"is_prior": torch.tensor([0, 1, 0, 1, 0, 1])}).per_row.mean().backward()
    assert not prediction.value.grad[1::2].any() and prediction.value.grad[0::2].any()


def test_a_batch_that_does_not_say_which_is_which_is_refused():
    prediction, *rest = problem()
    with pytest.raises(ValueError, match="field 'is_prior'.*`dreambooth`"):
        PriorPreservationLoss(MSELoss())(prediction, *rest, {})
    with pytest.raises(ValueError, match="weight must not be negative"):
        PriorPreservationLoss(MSELoss(), weight=-1.0)


def arrays(file, ranges=None, **fields):
    np.savez(file, **fields)
    return ArraysDataset(file, ranges=ranges)


def test_the_data_set_pairs_instance_and_class(tmp_path):
    images = torch.full((5, 1, 8, 8), 0.5)
    instance = arrays(tmp_path / "a.npz", {"image": (-1.0, 1.0)}, image=images.numpy(), label=np.full(5, 3))
    data = DreamBoothDataset(instance, Digits("test"), repeats=4)
    assert len(data) == 20
    batch = Loader(data, 8, seed=1).batch(3)
    assert batch["is_prior"].tolist() == [False, True] * 8
    assert torch.equal(batch["image"][0::2], images[:1].expand(8, -1, -1, -1))
    assert len({tuple(image.flatten().tolist()) for image in batch["image"][1::2]}) > 4
    assert batch["noise_key"].unique().numel() == 16  # levels and noise of the two are unrelated
    again = Loader(data, 8, seed=1).batch(3)
    assert torch.equal(batch["image"], again["image"])


def test_data_that_cannot_be_paired_are_named(tmp_path):
    grey = arrays(tmp_path / "grey.npz", {"image": (0.0, 1.0)}, image=np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="'image' is in"):
        DreamBoothDataset(grey, Digits("test"))
    other = arrays(tmp_path / "other.npz", video=np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match="no field in common"):
        DreamBoothDataset(other, Digits("test"))[0]
    with pytest.raises(IndexError, match="no example 2"):
        DreamBoothDataset(other, other)[2]
