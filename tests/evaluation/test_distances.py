"""Distances between sets of pictures: closed forms first."""

import math

import pytest
import torch

from vdiff.data import Digits
from vdiff.evaluation import FrechetDistance, NearestDistance, Reference, Samples
from vdiff.evaluation.distances import _CHUNK_VALUES, frechet, gaussian, nearest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_commuting_gaussians_are_apart_by_their_means_and_standard_deviations():
    """For a shared basis the distance is |m1 - m2|^2 + |s1 - s2|^2."""
    basis, _ = torch.linalg.qr(draw(5, 5))
    one, other = draw(5, seed=1).abs(), draw(5, seed=2).abs()
    mean, other_mean = draw(5, seed=3), draw(5, seed=4)
    found = frechet(mean, basis @ one.square().diag() @ basis.T, other_mean, basis @ other.square().diag() @ basis.T)
    assert found == pytest.approx(((mean - other_mean).square().sum() + (one - other).square().sum()).item(), abs=1e-12)


def test_general_gaussians_agree_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    one, other = (a @ a.T for a in (draw(6, 6), draw(6, 6, seed=1)))
    expected = (one + other).trace().item() - 2 * sqrtm((one @ other).numpy()).trace().real
    assert frechet(torch.zeros(6), one, torch.zeros(6), other) == pytest.approx(expected, rel=1e-9)


def test_two_dimensional_gaussians_agree_with_the_closed_form():
    """tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2)) in two dimensions."""
    one, other = (a @ a.T for a in (draw(2, 2), draw(2, 2, seed=1)))
    product = one @ other
    shared = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = (one + other).trace().item() - 2 * shared
    assert frechet(torch.zeros(2), one, torch.zeros(2), other) == pytest.approx(expected, rel=1e-9)


def test_gaussian_agrees_with_torch():
    images = draw(20, 1, 2, 3)
    mean, covariance = gaussian(images.float())
    assert mean.dtype == torch.float64
    assert torch.allclose(mean, images.flatten(1).mean(0), atol=1e-6)
    assert torch.allclose(covariance, images.flatten(1).T.cov(), atol=1e-6)


def test_a_set_is_at_distance_zero_from_itself_even_with_pixels_that_never_change():
    images = Digits("test").images
    assert (images.flatten(1).var(0) == 0).any()
    assert frechet(*gaussian(images), *gaussian(images)) < 1e-12


def test_the_distance_is_symmetric():
    one, other = gaussian(draw(50, 1, 3, 3)), gaussian(draw(40, 1, 3, 3, seed=1) * 2 + 1)
    assert frechet(*one, *other) == pytest.approx(frechet(*other, *one), rel=1e-10)


def test_the_distance_of_shifted_samples_is_the_shift_squared():
    images = draw(50, 1, 2, 2)
    reference = Reference(images, images + 0.5)
    figures = FrechetDistance()(Samples(images + 1.5), reference)
    assert figures["frechet_distance"] == pytest.approx(4, rel=1e-9)  # four pixels, each off by 1
    assert figures["frechet_distance_real"] == pytest.approx(1, rel=1e-9)  # four pixels, each off by 1/2
    assert figures["frechet_distance_ratio"] == pytest.approx(4, rel=1e-9)


def test_the_nearest_picture_is_found():
    others = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).reshape(2, 1, 1, 2)
    images = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 6.0]]).reshape(3, 1, 1, 2)
    assert nearest(images, others).tolist() == [0, 1, 2]


def test_a_copy_is_at_distance_zero_exactly():
    images = draw(200, 3, 4, 4) * 100
    figures = NearestDistance()(Samples(images[:50]), Reference(images, images + 1))
    assert figures["nearest_distance"] == 0 and figures["nearest_distance_ratio"] == 0
    assert figures["nearest_distance_real"] > 0


def test_the_median_forgives_a_few_copies():
    """And two thirds of copies are found out."""
    train = draw(30, 1, 2, 2)
    fresh = Samples(torch.cat([train[:10], draw(20, 1, 2, 2, seed=1)]))
    stolen = Samples(torch.cat([train[:20], draw(10, 1, 2, 2, seed=1)]))
    metric, reference = NearestDistance(), Reference(train, draw(9, 1, 2, 2, seed=2))
    assert metric(fresh, reference)["nearest_distance"] > 0 == metric(stolen, reference)["nearest_distance"]


def test_chunks_change_nothing(monkeypatch):
    one, other = draw(17, 1, 3, 3), draw(5, 1, 3, 3, seed=1)
    whole = nearest(one, other)
    monkeypatch.setattr("vdiff.evaluation.distances._CHUNK_VALUES", 100)
    assert torch.equal(nearest(one, other), whole) and _CHUNK_VALUES > 100


def test_what_cannot_be_measured_is_an_error():
    images = draw(3, 1, 2, 2)
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        FrechetDistance()(Samples(images[:1]), Reference(images, images))
    with pytest.raises(ValueError, match="4 x 4 covariance, more than max_features=3"):
        FrechetDistance(max_features=3)(Samples(images), Reference(images, images))


def test_real_digits_are_near_real_digits():
    """Real splits differ by chance alone; noise and blur do not."""
    reference = Reference.of(Digits("train"), Digits("test"))
    frechet_distance, nearest_distance = FrechetDistance(), NearestDistance()
    noise = Samples(draw(360, 1, 8, 8).float().clamp(-1, 1))
    blurred = Samples(torch.nn.functional.avg_pool2d(reference.test_images, 3, 1, 1))
    assert frechet_distance(noise, reference)["frechet_distance_ratio"] > 50
    assert frechet_distance(blurred, reference)["frechet_distance_ratio"] > 10
    assert nearest_distance(noise, reference)["nearest_distance_ratio"] > 2
    assert frechet_distance(noise, reference)["frechet_distance_real"] == pytest.approx(0.354, abs=1e-3)
    assert nearest_distance(noise, reference)["nearest_distance_real"] == pytest.approx(2.050, abs=1e-3)
