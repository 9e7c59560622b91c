"""Tables of names: read both ways, every name used, every bit kept; and those of the image and video families."""

import pytest
import torch
from peers import peer

from vdiff.checkpoints.changes import AddOnes, DropOnes, InTurn, Join, Made, Reorder, Split, Transpose
from vdiff.checkpoints.diffusers_names import to_diffusers
from vdiff.checkpoints.keymap import KeyMap, KeyMapError
from vdiff.checkpoints.maps.autoencoder import autoencoder_kl, temporal_decoder
from vdiff.checkpoints.maps.unet import plain_attention, unet, video_unet
from vdiff.first_stages import AutoencoderKL, TemporalDecoderAutoencoder
from vdiff.networks import UNet, VideoUNet

UNET = dict(in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), num_res_blocks=1, head_dim=16)
SDXL = dict(
    in_channels=4, out_channels=4, channels=320, channel_mult=(1, 2, 4), attention_factors=(2, 4), head_dim=64,
    transformer_depth=(1, 2, 10), context_dim=2048, linear_projection=True, num_classes="sequential", vector_dim=2816,
)  # fmt: skip
SVD = dict(
    in_channels=8, out_channels=4, channels=320, context_dim=1024, head_dim=64, num_classes="sequential", vector_dim=768
)  # fmt: skip
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbered(**shapes):
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


# --- the table -----------------------------------------------------------------------------------

FUSED = KeyMap(
    [
        ("blocks.{i}.qkv.{leaf}", tuple(f"layers.{{i}}.{x}.{{leaf}}" for x in ("q", "k", "v")), Split(3)),
        ("blocks.{i}.norm.*", "layers.{i}.ln.*"),
        ("*", "rest.*"),
    ]
)


def test_a_table_is_read_both_ways_and_keeps_every_bit():
    here = numbered(blocks__0__qkv__weight=(6, 2), blocks__11__qkv__bias=(6,), blocks__0__norm__weight=(2,), a__b=(1,))
    there = FUSED(here)
    assert shapes(there) == {
        "layers.0.q.weight": (2, 2), "layers.0.k.weight": (2, 2), "layers.0.v.weight": (2, 2),
        "layers.11.q.bias": (2,), "layers.11.k.bias": (2,), "layers.11.v.bias": (2,),
        "layers.0.ln.weight": (2,), "rest.a.b": (1,),
    }  # fmt: skip
    assert torch.equal(there["layers.0.k.weight"], here["blocks.0.qkv.weight"][2:4])
    assert same(FUSED.inverse(there), here) and same(FUSED.inverse.inverse(here), there)


def test_moves_say_the_same_place_by_place():
    here = numbered(blocks__0__qkv__weight=(6, 2), blocks__0__norm__weight=(2,))
    moves = FUSED.moves(here)
    assert [len(move.targets) for move in moves] == [3, 1]
    out = {}
    for move in moves:
        out |= move(*(here[name] for name in move.sources))
    assert same(out, FUSED(here))


def test_small_tables_make_large_ones():
    table = FUSED.under("net", "model") + KeyMap([("head.*", "out.*")])
    here = numbered(net__blocks__0__norm__weight=(2,), head__bias=(1,))
    assert list(table(here)) == ["model.layers.0.ln.weight", "out.bias"]
    assert same(table.inverse(table(here)), here)


def test_a_name_that_is_in_no_table_is_an_error():
    with pytest.raises(KeyMapError, match="no c.d, e"):
        KeyMap([("a.*", "b.*")])(numbered(a__x=(1,), c__d=(1,), e=(1,)))


def test_a_part_without_the_others_is_an_error():
    with pytest.raises(KeyMapError, match=r"layers.0.q.weight come with layers.0.k.weight, layers.0.v.weight"):
        FUSED.inverse(numbered(layers__0__q__weight=(2, 2)))


def test_a_table_that_does_not_lead_back_is_an_error():
    table = KeyMap([("a.*", "c.*"), ("b.*", "c.*")])
    assert list(table(numbered(a__x=(1,)))) == ["c.x"]
    with pytest.raises(KeyMapError, match="from b.x to c.x and not back"):
        table(numbered(b__x=(1,)))


def test_what_only_one_side_has_is_left_out_or_made():
    table = KeyMap([("a.*", "b.*"), ("junk", ()), ((), "table", Made(lambda: torch.arange(3)))])
    there = table(numbered(a__x=(1,), junk=(2,)))
    assert list(there) == ["b.x", "table"] and there["table"].tolist() == [0, 1, 2]
    assert list(table.inverse(there)) == ["a.x"]


@pytest.mark.parametrize(
    "change, tensor",
    [
        (Split(3), torch.randn(6, 4)),
        (Split(2, dim=1), torch.randn(6, 4)),
        (Split(3, length=2), torch.randn(12, 5)),
        (Reorder((2, 0, 1)), torch.randn(6, 2)),
        (DropOnes(), torch.randn(3, 4, 1, 1)),
        (DropOnes(), torch.randn(3)),
        (AddOnes(1), torch.randn(3, 4)),
        (Transpose(), torch.randn(3, 4)),
        (InTurn((DropOnes(1), Split(3, length=2), Join(3), Reorder((1, 0)))), torch.randn(12, 5, 1)),
    ],
)
def test_every_change_has_a_way_back(change, tensor):
    said = change(tensor)
    (back,) = change.inverse(*said)
    assert torch.equal(back, tensor) and back.shape == tensor.shape
    assert change.inverse.inverse == change


def test_heads_take_turns_in_a_fused_projection():
    """Two heads of length 2: q, k and v of the first, then of the second."""
    q, k, v = Split(3, length=2)(torch.arange(12))
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])


# --- families ------------------------------------------------------------------------------------


def both_ways(table, ours, theirs):
    """Names and shapes are those of the peer, which takes them; and back, bit for bit."""
    theirs.load_state_dict(table(ours.state_dict()))
    assert same(table.inverse(theirs.state_dict()), ours.state_dict())
    assert same(table(ours.state_dict()), theirs.state_dict())


@pytest.mark.parametrize(
    "config, attends, twin",
    [
        (
            dict(attention_factors=(1,), context_dim=16), (True, False),
            dict(down_block_types=(DOWN, "DownBlock2D"), up_block_types=("UpBlock2D", UP)),
        ),
        (
            dict(
                attention_factors=(2,), context_dim=16, linear_projection=True, num_classes="sequential", vector_dim=64,
                transformer_depth=(1, 2), num_res_blocks=2,
            ), (False, True),
            dict(
                down_block_types=("DownBlock2D", DOWN), up_block_types=(UP, "UpBlock2D"), layers_per_block=2,
                transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
                addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
            ),
        ),
        (
            dict(attention_factors=(1,), context_dim=16, guidance_dim=256), (True, False),
            dict(down_block_types=(DOWN, "DownBlock2D"), up_block_types=("UpBlock2D", UP), time_cond_proj_dim=256),
        ),
    ],
)  # fmt: skip
def test_unets_of_stable_diffusion_go_to_diffusers_and_back(config, attends, twin):
    theirs = peer("diffusers").UNet2DConditionModel(
        **dict(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
            attention_head_dim=(2, 4),
        ) | twin
    )  # fmt: skip
    ours = UNet(**UNET | config)
    both_ways(unet(config.get("num_res_blocks", 1), attends), ours, theirs)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_unets_without_a_context_go_to_diffusers_and_back(resblock_updown):
    sampling = {f"{way}sample_type": "resnet" for way in ("down", "up")} if resblock_updown else {}
    theirs = peer("diffusers").UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, freq_shift=0,
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, attention_head_dim=16,
        num_class_embeds=5, **sampling,
    )  # fmt: skip
    ours = UNet(**UNET, attention_factors=(1, 2), num_classes=5, resblock_updown=resblock_updown)
    table = unet(1, (True, True), resblock_updown, attention=plain_attention(16))
    both_ways(table, ours, theirs)


def test_the_video_unet_goes_to_diffusers_and_back():
    theirs = peer("diffusers").UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12, num_attention_heads=(2, 4),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    ours = VideoUNet(
        8, 4, 32, 12, (1, 2), 1, (1,), head_dim=16, num_classes="sequential", vector_dim=768
    )  # fmt: skip
    both_ways(video_unet(1, (True, False)), ours, theirs)


def test_autoencoders_go_to_diffusers_and_back():
    diffusers = peer("diffusers")
    blocks = {f"{w}_block_types": (f"{kind}Block2D",) * 2 for w, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))}
    theirs = diffusers.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, **blocks)
    both_ways(autoencoder_kl(2), AutoencoderKL(channels=32, channel_mult=(1, 2), num_res_blocks=1), theirs)
    theirs = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 2
    )
    ours = TemporalDecoderAutoencoder(channels=32, channel_mult=(1, 2), num_res_blocks=2, quant_conv=True)
    both_ways(temporal_decoder(2), ours, theirs)


def test_the_published_sizes_have_every_name_of_diffusers():
    """1428, 1680 and 374 tensors: Stable Video Diffusion, SDXL and the former's autoencoder."""
    diffusers = peer("diffusers")
    with torch.device("meta"):
        video, image, stage = VideoUNet(**SVD), UNet(**SDXL), TemporalDecoderAutoencoder(quant_conv=True)
        twin = diffusers.UNetSpatioTemporalConditionModel()
        decoder = diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4
        )
    assert shapes(video_unet()(video.state_dict())) == shapes(twin.state_dict()) and len(twin.state_dict()) == 1428
    assert shapes(temporal_decoder()(stage.state_dict())) == shapes(decoder.state_dict())
    assert len(decoder.state_dict()) == 374
    names = {
        name: move.targets[0]
        for move in unet(2, (False, True, True)).moves(image.state_dict())
        for name in move.sources
    }
    assert len(names) == 1680
    for ours, theirs in names.items():  # adapters' files go by the same names
        assert to_diffusers(ours.rsplit(".", 1)[0]) == theirs.rsplit(".", 1)[0]
