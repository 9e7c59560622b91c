"""Motion: known paths are measured as what they are, and real moving digits as straight ones."""

import math

import pytest
import torch

from vdiff.data import MovingDigits
from vdiff.evaluation import Reference, Samples, Straightness, VideoClassifierAccuracy, evaluate
from vdiff.evaluation.motion import centres_of_mass, cut_out, strays


@pytest.fixture(scope="module")
def reference():
    return Reference.of(MovingDigits(paths=1), MovingDigits("test", paths=1), image="video")


def dots(path, size=32, width=1.5):
    """A round dot along a path ``(f, 2)``, as ink ``(1, 1, f, size, size)``."""
    place = torch.arange(size, dtype=torch.float64)
    rows, columns = (torch.exp(-((place - p[:, None]) ** 2) / (2 * width**2)) for p in path.double().T)
    return (rows[:, :, None] * columns[:, None, :])[None, None]


def line(start, velocity, num=8):
    return torch.tensor(start) + torch.arange(num)[:, None] * torch.tensor(velocity)


def test_the_centre_of_a_dot_is_where_it_is():
    path = line((9.3, 12.0), (1.21, -0.37))
    assert torch.allclose(centres_of_mass(dots(path))[0], path.double(), atol=1e-6)
    assert torch.allclose(centres_of_mass(dots(path), floor=0.1)[0], path.double(), atol=0.02)


def test_uniform_motion_does_not_stray_and_a_step_aside_does_by_its_size():
    path = line((8.0, 9.0), (1.0, 0.5))[None].double()
    away, way = strays(path)
    assert away.item() < 1e-12 and way.item() == pytest.approx(7 * math.hypot(1, 0.5))
    bent = path.clone()
    bent[:, 0, 1] += 1.2  # the first of eight: the line follows it by its leverage, 1/8 + 3.5**2 / 42
    assert strays(bent)[0].item() == pytest.approx(1.2 * (1 - 1 / 8 - 3.5**2 / 42))


def test_a_jerk_along_a_straight_path_is_no_uniform_motion():
    path = torch.tensor([0.0, 0, 0, 0, 7, 7, 7, 7])[:, None] * torch.tensor([0.6, 0.8])
    assert strays(path[None].double())[0].item() > 1


def test_a_blank_frame_strays_infinitely():
    ink = dots(line((9.0, 9.0), (1.0, 0.0)))
    ink[:, :, 3] = 0
    away, way = strays(centres_of_mass(ink))
    assert away.item() == math.inf and way.item() == 0
    figures = Straightness().figures(ink)
    assert figures["stray"] == math.inf and figures["straight"] == 0


def test_a_cut_out_is_the_same_wherever_the_thing_is():
    ink = dots(torch.cat([line((9.0, 9.0), (1.0, 2.0), num=4), line((12.5, 9.5), (1.0, 1.0), num=4)]))
    cuts = cut_out(ink, centres_of_mass(ink), 12)
    assert torch.allclose(cuts[:, :, :4], cuts[:, :, :1].expand(-1, -1, 4, -1, -1), atol=1e-6)
    assert (cuts[:, :, 4:] - cuts[:, :, :1]).abs().max() < 0.2  # a cut between pixels is a little softer
    corner = cut_out(ink, torch.zeros(1, 8, 2, dtype=ink.dtype), 12)
    assert (corner[..., :5, :] == 0).all() and (corner[..., :5] == 0).all()


def test_real_digits_go_straight_keep_their_shape_and_are_recognised(reference):
    samples = Samples(reference.test_images, reference.test_labels)
    figures = evaluate(samples, reference, [Straightness(), VideoClassifierAccuracy()])
    assert figures["straight"] == 1 and figures["stray_95"] < 0.1  # the floor cuts off a little of the blur
    assert 3 <= figures["travel"] <= 6 and figures["shape_change"] < 0.2
    assert figures["video_classifier_accuracy"] == figures["video_classifier_accuracy_real"] > 0.95
    for name in ("stray", "travel", "shape_change"):
        assert figures[name] == figures[f"{name}_real"]


def test_shuffled_frames_are_not_straight_and_mixed_digits_change_their_shape(reference):
    videos = reference.test_images
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = Straightness()(Samples(videos[:, :, order]), reference)
    assert shuffled["straight"] < 0.05 and shuffled["stray"] > 1
    mixed = videos.clone()
    mixed[:, :, 4:] = videos.roll(1, 0)[:, :, 4:]
    assert Straightness()(Samples(mixed), reference)["shape_change"] > 2 * shuffled["shape_change_real"]


def test_only_the_frame_that_is_asked_for_is_classified(reference):
    videos = reference.test_images.clone()
    videos[:, :, -1] = videos.roll(1, 0)[:, :, -1]
    samples = Samples(videos, reference.test_labels)
    last, first = (VideoClassifierAccuracy(frame=f)(samples, reference) for f in (-1, 0))
    assert last["video_classifier_accuracy"] < 0.3 < 0.95 < first["video_classifier_accuracy"]


def test_image_metrics_and_video_metrics_are_not_confused(reference):
    from vdiff.evaluation import ClassifierAccuracy

    samples = Samples(reference.test_images, reference.test_labels)
    with pytest.raises(ValueError, match="ClassifierAccuracy measures images, and the samples are videos"):
        evaluate(samples, reference, [ClassifierAccuracy()])


def test_a_reference_may_be_a_fixed_choice():
    data = MovingDigits("test", paths=2)
    one, same = (Reference.of(data, data, image="video", most=50) for _ in range(2))
    assert one.train_images.shape == (50, 1, 8, 16, 16) and torch.equal(one.train_images, same.train_images)
    assert one.train_labels.unique().numel() == 10
