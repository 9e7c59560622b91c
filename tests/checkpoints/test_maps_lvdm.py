"""VideoCrafter's UNet in the layouts of others: every name led there and back, no tensor changed."""

import pytest
import torch

from vdiff.checkpoints.keymap import KeyMapError
from vdiff.checkpoints.maps.lvdm import dynamicrafter, image_unet, unet_3d
from vdiff.networks import LVDMUNet, UNet

PUBLISHED = dict(in_channels=4, out_channels=4, channels=320, context_dim=1024, head_dim=64)
SMALL = dict(
    in_channels=4, out_channels=4, channels=8, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(2,), head_dim=8, norm_groups=4,
)  # fmt: skip


def there_and_back(table, weights):
    there = table(weights)
    back = table.inverse(there)
    assert list(map(len, (there, back))) == [len(weights)] * 2
    assert all(back[name].shape == value.shape and torch.equal(back[name], value) for name, value in weights.items())
    return there


def test_diffusers_names_lead_there_and_back_bit_for_bit():
    torch.manual_seed(0)
    weights = LVDMUNet(**SMALL, fps=False).state_dict()
    there = there_and_back(unet_3d(1, (False, True)), weights)
    assert there["transformer_in.proj_in.weight"].shape == (64, 8)
    assert "up_blocks.0.upsamplers.0.conv.weight" in there and "mid_block.temp_convs.1.conv4.3.bias" in there


def test_every_published_name_has_one_of_diffusers_but_for_the_frames_per_second():
    with torch.device("meta"):
        names = list(LVDMUNet(**PUBLISHED).state_dict())
    table = unet_3d()
    rest = [name for name in names if not name.startswith("fps_embedding")]
    targets = [target for move in table.moves(rest) for target in move.targets]
    assert len(set(targets)) == len(rest) == 1480
    with pytest.raises(KeyMapError, match="fps_embedding.0.weight"):
        table.moves(names)


def test_dynamicrafter_spells_one_word_otherwise():
    weights = LVDMUNet(**SMALL).state_dict()
    there = there_and_back(dynamicrafter(), weights)
    assert set(there) == {name.replace("temopral", "temporal") for name in weights}
    there = there_and_back(dynamicrafter("framestride_embed"), weights)
    assert {name.replace("framestride_embed", "fps_embedding") for name in there} == {
        name.replace("temopral", "temporal") for name in weights
    }


@pytest.mark.parametrize("factors", [(2,), (1, 2), (1,)])
def test_an_image_network_fits_into_the_video_network_that_is_made_of_it(factors):
    config = SMALL | dict(attention_factors=factors)
    weights = UNet(**config, linear_projection=True).state_dict()
    there = there_and_back(image_unet(), weights)
    video = LVDMUNet(**config).state_dict()
    assert all(video[name].shape == value.shape for name, value in there.items())
    new = [name for name in video if name not in there]
    assert all("temopral" in n or n.startswith(("init_attn", "fps_")) or n.split(".transformer")[0][-2:] == ".2"
               or n.split(".")[-2] in ("norm", "proj_in", "proj_out") for n in new)  # fmt: skip


def test_stable_diffusion_fills_all_but_what_is_new():
    """686 of VideoCrafter 2's 1484."""
    with torch.device("meta"):
        names = list(UNet(4, 4, 320, head_dim=64, context_dim=1024, linear_projection=True).state_dict())
        video = set(LVDMUNet(**PUBLISHED).state_dict())
    targets = {target for move in image_unet().moves(names) for target in move.targets}
    assert len(targets) == 686 and targets <= video
