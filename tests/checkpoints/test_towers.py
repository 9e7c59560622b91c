"""Towers for text and pictures, and the codebook: the same numbers in the layouts of others, and every bit kept."""

import pytest
import torch
from peers import peer
from published import CLIP, MODELS, T5, VISION, same, weights

from vdiff.checkpoints import convert_checkpoint, open_weights, read_weights, recognise, save_weights
from vdiff.checkpoints.maps import autoencoder, towers
from vdiff.conditioners import CLIPTextEmbedder, OpenCLIPImageEmbedder, OpenCLIPTextEmbedder, T5TextEmbedder
from vdiff.first_stages import VQAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
IDS = torch.tensor([[98, 5, 7, 9, 99, 0, 0, 0], [98, 3, 99, 0, 0, 0, 0, 0]])  # the last word of the vocabulary ends


def drawn(module):
    """With weights that are all different, so that a mistaken place shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator))
    return module.eval()


def text_twin(**config):
    transformers = peer("transformers")
    numbers = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100,
                   max_position_embeddings=8, eos_token_id=99, projection_dim=24)  # fmt: skip
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**numbers | config)).eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("quick", [False, True])
def test_open_clips_text_tower_is_that_of_transformers(quick, dtype, tolerance):
    arch = dict(embed_dim=24, width=16, heads=2, layers=3, context_length=8, vocab_size=100, quick_gelu=quick)
    ours = drawn(OpenCLIPTextEmbedder(arch, layer="penultimate", norm=False, pooled_feeds="vector")).to(dtype)
    ours.end_id = 99
    theirs = text_twin(hidden_act="quick_gelu" if quick else "gelu").to(dtype)
    table = towers.open_clip_text()
    there = table(ours.state_dict())
    found = theirs.load_state_dict(there, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], ["logit_scale"])  # of the loss
    assert same(table.inverse(there), ours.state_dict())
    said, expected = ours.encode(IDS), theirs(IDS, output_hidden_states=True)
    torch.testing.assert_close(said["tokens"], expected.hidden_states[-2], rtol=0, atol=tolerance)
    torch.testing.assert_close(said["pooled"], expected.text_embeds, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_open_clips_image_tower_is_that_of_transformers(dtype, tolerance):
    transformers = peer("transformers")
    ours = drawn(OpenCLIPImageEmbedder(VISION)).to(dtype)
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
            image_size=16, projection_dim=12, hidden_act="gelu",
        )
    ).to(dtype).eval()  # fmt: skip
    table = towers.open_clip_image()
    there = table(ours.state_dict())
    theirs.load_state_dict(there)
    assert same(table.inverse(there), ours.state_dict())
    pixels = torch.rand(2, 3, 16, 16, dtype=dtype)
    expected = theirs(ours.prepare(pixels), output_hidden_states=True)
    torch.testing.assert_close(ours(pixels)[:, 0], expected.image_embeds, rtol=0, atol=tolerance)
    ours.output = "hidden"
    torch.testing.assert_close(ours(pixels), expected.last_hidden_state, rtol=0, atol=tolerance)


def test_clip_and_t5_are_those_of_transformers_which_they_are_built_from():
    transformers = peer("transformers")
    ours = drawn(CLIPTextEmbedder(CLIP))
    theirs = text_twin(**CLIP).text_model
    theirs.load_state_dict(towers.clip_text("").under("transformer", "")(ours.state_dict()))
    expected = theirs(IDS).last_hidden_state
    torch.testing.assert_close(ours.encode(IDS)["tokens"], expected, rtol=0, atol=1e-5)
    ours = drawn(T5TextEmbedder(T5, length=6))
    theirs = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    there = towers.t5()(ours.state_dict())
    assert "encoder.embed_tokens.weight" not in there  # written once
    theirs.load_state_dict(there, strict=False)
    expected = theirs(IDS[:, :6] % 32).last_hidden_state
    torch.testing.assert_close(ours.encode(IDS[:, :6] % 32)["tokens"], expected, rtol=0, atol=1e-5)


def test_weights_that_should_be_one_and_differ_are_an_error():
    tensors = weights("t5_text")
    tensors["transformer.shared.weight"] = tensors["transformer.shared.weight"] + 1
    with pytest.raises(ValueError, match=r"2 tensors \(32, 12\) should be one under 2 names"):
        towers.t5()(tensors)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_codebooks_autoencoder_is_that_of_diffusers(dtype, tolerance):
    diffusers = peer("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
              "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}  # fmt: skip
    theirs = diffusers.VQModel(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=3, num_vq_embeddings=16, **blocks
    )
    theirs = theirs.to(dtype).eval()
    ours = VQAutoencoder(16, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,)).to(dtype)
    ours.quantize.embedding.weight.data.normal_()  # far enough apart for no word to be near two vectors
    table = autoencoder.vq(2)
    there = table(ours.state_dict())
    theirs.load_state_dict(there)
    assert same(table.inverse(there), ours.state_dict())
    pixels = torch.rand(1, 3, 16, 16, dtype=dtype) * 2 - 1
    latents = ours.encode(pixels)
    torch.testing.assert_close(latents, theirs.encode(pixels).latents, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=tolerance)


# --- as parts of whole checkpoints ---------------------------------------------------------------

NETWORK, STAGE = "model.diffusion_model.", "first_stage_model."
SECOND = "conditioner.embedders."
WHOLE = {
    "ldm": {NETWORK: "unet", STAGE: "autoencoder_kl", "cond_stage_model.": "clip_text"},
    "lvdm": {
        NETWORK: "lvdm_unet", STAGE: "autoencoder_kl", "cond_stage_model.": "open_clip_text",
        "embedder.": "open_clip_image", "image_proj_model.": "resampler",
    },
    "dynamicrafter_256": {
        NETWORK: "lvdm_unet", STAGE: "autoencoder_kl", "cond_stage_model.": "open_clip_text",
        "embedder.": "open_clip_image", "image_proj_model.": "resampler",
    },
    "sgm": {
        NETWORK: "unet", STAGE: "autoencoder_kl", f"{SECOND}0.": "clip_text", f"{SECOND}1.": "open_clip_text",
    },
    "sat": {NETWORK: "cogvideox", STAGE: "autoencoder_kl_cogvideox", f"{SECOND}0.": "t5_text"},
}  # fmt: skip
SVD = {
    NETWORK: "video_unet", STAGE: "temporal_decoder", f"{SECOND}0.open_clip.": "open_clip_image",
    f"{SECOND}3.encoder.": "autoencoder_kl",
}  # fmt: skip


def whole(layout, parts):
    return {n: v for prefix, name in parts.items() for n, v in weights(name, layout, prefix).items()}


def converted(tensors, tmp_path, *layouts, given=None):
    """Through layouts, one after the other."""
    at = tmp_path / "0.safetensors"
    save_weights(at, tensors)
    for number, to in enumerate(layouts, 1):
        out = tmp_path / (f"{number}" if to == "diffusers" else f"{number}.safetensors")
        convert_checkpoint(open_weights(at), out, to, given=given)
        at = out
    return at


@pytest.mark.parametrize("layout", WHOLE)
def test_whole_checkpoints_are_told_part_by_part(layout):
    tensors = whole(layout, WHOLE[layout])
    found = recognise({name: value.to("meta") for name, value in tensors.items()})
    assert [(p.prefix, p.family.name, p.layout) for p in found.parts] == [(*p, layout) for p in WHOLE[layout].items()]
    assert found.unknown == ()


@pytest.mark.parametrize("layout", ["ldm", "sgm", "sat"])
def test_whole_checkpoints_go_through_all_layouts_and_come_back_bit_for_bit(layout, tmp_path):
    tensors, given = whole(layout, WHOLE[layout]), MODELS["cogvideox"][1]
    at = converted(tensors, tmp_path, "vdiff", "diffusers", "vdiff", layout, given=given)
    assert same(read_weights(at), tensors)
    folders = {p.parent.name: p.stem for p in (tmp_path / "2").glob("*/*")}
    own = {"unet", "transformer", "vae"}
    assert all(stem == ("diffusion_pytorch_model" if f in own else "model") for f, stem in folders.items())
    assert {"text_encoder"} | ({"text_encoder_2"} if layout == "sgm" else set()) == folders.keys() - own


def test_videocrafters_picture_goes_into_one_embedder_and_comes_back(tmp_path):
    tensors = whole("lvdm", WHOLE["lvdm"])
    ours = read_weights(converted(tensors, tmp_path, "vdiff"))
    below = {name.split(".")[3] for name in ours if name.startswith(f"{SECOND}1.")}
    assert below == {"tower", "resampler"} and f"{SECOND}0.model.ln_final.weight" in ours
    assert same(read_weights(converted(tensors, tmp_path, "vdiff", "lvdm")), tensors)


def test_what_was_kept_of_a_text_tower_without_its_blocks_is_left_out_and_counted(tmp_path):
    tensors = whole("sgm", SVD)
    stump = {f"{SECOND}0.open_clip.model.{name}": torch.ones(2) for name in ("logit_scale", "ln_final.bias")}
    save_weights(tmp_path / "a.safetensors", tensors | stump)
    done = convert_checkpoint(open_weights(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "vdiff")
    assert done.beside == {"which its layout alone has": tuple(sorted(stump))}
    assert same(read_weights(converted(tensors, tmp_path, "vdiff", "sgm")), tensors)


def test_two_autoencoders_of_stable_video_diffusion_are_one_in_diffusers(tmp_path):
    """Which has the data's encoder and decoder and the condition's last convolution, and no decoder of pictures."""
    tensors = whole("sgm", SVD)
    shared = {n: v for n, v in tensors.items() if n.startswith(f"{STAGE}encoder.")}
    tensors = {n: v for n, v in tensors.items() if not n.startswith(f"{STAGE}quant_conv.")}
    condition = f"{SECOND}3.encoder."
    tensors |= {condition + n.removeprefix(STAGE): v for n, v in shared.items()}  # as published: one encoder, twice
    back = read_weights(converted(tensors, tmp_path, "vdiff", "diffusers", "sgm"))
    vae = open_weights(tmp_path / "2" / "vae" / "diffusion_pytorch_model.safetensors")
    assert recognise(vae.header).family.name == "temporal_decoder" and "quant_conv.weight" in vae.header
    lost = {n for n in tensors if n.startswith((f"{condition}decoder.", f"{condition}post_quant_conv."))}
    assert same(back, {n: v for n, v in tensors.items() if n not in lost})


def test_the_lone_tower_of_sdxls_refiner_is_diffusers_second(tmp_path):
    parts = {NETWORK: "unet", f"{SECOND}0.": "open_clip_text"}
    at = converted(whole("sgm", parts), tmp_path, "diffusers", "sgm")
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"unet", "text_encoder_2"}
    assert same(read_weights(at), whole("sgm", parts))
