import math

import pytest
import torch

from vdiff.process import CosineSchedule, FlowSchedule, NoiseLevel, ZeroSNRSchedule, spread, upload


def test_mixing_is_alpha_data_plus_sigma_noise():
    level = FlowSchedule()(torch.tensor([0.0, 0.25, 1.0]))
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    x_t = level.mix(x0, noise)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])


def test_a_level_per_frame_mixes_every_frame_by_its_own():
    level = CosineSchedule()(torch.rand(2, 5))
    x0, noise = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 5, 4, 4)
    x_t = level.mix(x0, noise)
    for b in range(2):
        for f in range(5):
            one = level.alpha[b, f] * x0[b, :, f] + level.sigma[b, f] * noise[b, :, f]
            torch.testing.assert_close(x_t[b, :, f], one)


@pytest.mark.parametrize(
    "shape, data, result",
    [
        ((), (2, 3), ()),
        ((2,), (2,), (2,)),
        ((2,), (2, 3), (2, 1)),
        ((2,), (2, 3, 4, 4), (2, 1, 1, 1)),
        ((2,), (2, 3, 5, 4, 4), (2, 1, 1, 1, 1)),
        ((2, 5), (2, 3, 5), (2, 1, 5)),
        ((2, 5), (2, 3, 5, 4, 4), (2, 1, 5, 1, 1)),
    ],
)
def test_levels_get_the_axes_of_the_data(shape, data, result):
    level = FlowSchedule()(torch.rand(shape)).like(torch.zeros(data))
    assert level.t.shape == level.alpha.shape == level.d_sigma.shape == torch.Size(result)
    assert torch.broadcast_shapes(spread(torch.zeros(shape), torch.zeros(data)).shape, data) == torch.Size(data)


def test_the_state_stays_float32_whatever_the_data():
    level = FlowSchedule()(torch.rand(2))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert level.mix(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)).dtype == torch.float32


def test_ratio_and_snr_say_the_same():
    level = CosineSchedule()(torch.rand(9, dtype=torch.float64))
    torch.testing.assert_close(level.ratio, torch.tan(level.t * math.pi / 2))
    torch.testing.assert_close(level.snr, level.ratio**-2)
    torch.testing.assert_close(level.log_snr, level.snr.log())


def test_without_noise_the_signal_to_noise_is_infinite():
    level = ZeroSNRSchedule()(torch.tensor([0.0, 1.0]))
    assert level.snr.tolist() == [math.inf, 0] and level.log_snr.tolist() == [math.inf, -math.inf]
    assert level.ratio.tolist() == [0, math.inf]


def test_levels_are_cut_and_joined_like_tensors():
    level = FlowSchedule()(torch.tensor([0.1, 0.2, 0.3]))
    again = NoiseLevel.cat([level[:1], level[1:]])
    assert len(level) == 3 and level[1].t.shape == ()
    for name in ("t", "alpha", "sigma", "d_alpha", "d_sigma"):
        assert torch.equal(getattr(again, name), getattr(level, name))
        assert torch.equal(getattr(level[[2, 0]], name), getattr(level, name)[[2, 0]])


def test_every_value_moves():
    level = FlowSchedule()(torch.rand(2)).to(torch.float64)
    assert {v.dtype for v in vars(level).values()} == {torch.float64}
    assert {v.device.type for v in vars(level.to("meta")).values()} == {"meta"}


def test_a_level_is_frozen():
    with pytest.raises(AttributeError):
        FlowSchedule()(0.5).t = 3


def test_uploading_changes_no_value():
    level = CosineSchedule()(torch.rand(2, 5))
    moved = level.upload(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, name), getattr(level, name)) for name in ("t", "alpha", "sigma", "d_alpha"))


@pytest.mark.gpu
def test_the_host_does_not_wait_for_an_upload():
    level, value = CosineSchedule()(torch.rand(4)), torch.randn(4, 3)
    upload(value, torch.device("cuda"))  # the first one makes the pool of pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved, on_device = level.upload(torch.device("cuda")), upload(value, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_device.cpu(), value) and torch.equal(moved.sigma.cpu(), level.sigma)
