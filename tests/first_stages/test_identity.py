import pytest
import torch

from vdiff.first_stages import IdentityFirstStage


def test_plain_pixels_pass_untouched():
    x = torch.randn(2, 3, 4, 4)
    stage = IdentityFirstStage()
    assert stage.encode(x) is x and stage.decode(x) is x and stage.latent_shape((3, 4, 4)) == (3, 4, 4)


def test_decode_undoes_encode():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    stage = IdentityFirstStage(scale=2.0, shift=0.5, pixel_range=(0, 1))
    assert torch.allclose(stage.encode(x), (x - 0.5) * 2) and torch.allclose(stage.decode(stage.encode(x)), x)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="scale"):
        IdentityFirstStage(scale=0.0)
