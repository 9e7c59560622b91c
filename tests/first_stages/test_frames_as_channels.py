import pytest
import torch

from vdiff.first_stages import FramesAsChannelsFirstStage


def test_decode_undoes_encode_and_frames_of_a_channel_are_neighbours():
    stage, x = FramesAsChannelsFirstStage(4, scale=2.0, shift=0.5), torch.rand(2, 3, 4, 5, 6, dtype=torch.float64)
    latents = stage.encode(x)
    assert latents.shape == (2, *stage.latent_shape((3, 4, 5, 6))) == (2, 12, 5, 6)
    assert torch.equal(latents[:, 4:8], (x[:, 1] - 0.5) * 2) and torch.allclose(stage.decode(latents), x)


def test_another_number_of_frames_is_refused():
    with pytest.raises(ValueError, match=r"takes videos \(c, 4, h, w\); got \(1, 8, 14, 14\)"):
        FramesAsChannelsFirstStage(4).encode(torch.zeros(2, 1, 8, 14, 14))
    with pytest.raises(ValueError, match="at least 1"):
        FramesAsChannelsFirstStage(0)
