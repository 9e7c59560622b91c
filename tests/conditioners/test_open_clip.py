"""CLIP towers of open_clip: what comes out is what open_clip's own model says."""

import warnings

import numpy
import pytest
import torch
from peers import peer

from vdiff.conditioners import EmbedderConditioner, OpenCLIPImageEmbedder, OpenCLIPTextEmbedder
from vdiff.registry import build

ARCH = {"embed_dim": 24, "width": 32, "heads": 4, "layers": 3, "context_length": 16}
PICTURES = {"embed_dim": 24, "width": 32, "head_width": 8, "layers": 2, "patch_size": 8, "image_size": 32}
PROMPTS = ["a handwritten three", "a cat", "the number seven, written by hand"]


@pytest.fixture(scope="module", autouse=True)
def whole():
    """open_clip's own model, text and pictures."""
    model = peer("open_clip.model")
    torch.manual_seed(0)
    text = {k: v for k, v in ARCH.items() if k != "embed_dim"}
    vision = {k: v for k, v in PICTURES.items() if k != "embed_dim"}
    return model.CLIP(24, vision, text).eval()


@pytest.fixture(scope="module")
def file(whole, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "open_clip.safetensors"
    save_file({k: v.clone() for k, v in whole.state_dict().items()}, path)
    return path


def embedder(file, **options):
    return OpenCLIPTextEmbedder(ARCH, file, **options).eval()


def ids(prompts=PROMPTS, length=16):
    return peer("open_clip").tokenizer.SimpleTokenizer(context_length=length)(prompts)


def hidden(whole, num_blocks):
    """The text tower by hand, block after block."""
    x = whole.token_embedding(ids()) + whole.positional_embedding
    for block in whole.transformer.resblocks[:num_blocks]:
        x = block(x, attn_mask=whole.attn_mask)
    return x


def test_the_pooled_vector_is_what_open_clip_encodes(whole, file):
    pooled = embedder(file, layer="pooled", feeds="vector")(PROMPTS)["vector"].tensor
    assert torch.allclose(pooled, whole.encode_text(ids()), atol=1e-6)


@pytest.mark.parametrize("layer, num_blocks", [("last", 3), ("penultimate", 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_the_tokens_are_those_of_the_block_that_was_asked_for(whole, file, layer, num_blocks, norm):
    said = embedder(file, layer=layer, norm=norm, pooled_feeds="vector")(PROMPTS)
    expected = hidden(whole, num_blocks)
    expected = whole.ln_final(expected) if norm else expected
    assert torch.allclose(said["cross_attention"].tensor, expected, atol=1e-6)
    assert torch.allclose(said["vector"].tensor, whole.encode_text(ids()), atol=1e-6)


def test_the_penultimate_layer_is_open_clips_own_intermediate(whole, file):
    text = peer("open_clip.model")._build_text_tower(24, {k: v for k, v in ARCH.items() if k != "embed_dim"})
    text.load_state_dict({k: v for k, v in whole.state_dict().items() if k in text.state_dict()})
    theirs = text.eval().forward_intermediates(ids(), indices=[1], output_fmt="NLC", normalize_intermediates=True)
    ours = embedder(file, layer="penultimate")(PROMPTS)["cross_attention"].tensor
    assert torch.allclose(ours, theirs["text_intermediates"][0], atol=1e-6)


def test_names_of_weights_are_open_clips_own(whole, file):
    ours = embedder(file).state_dict()
    theirs = {f"model.{name}" for name in whole.state_dict() if not name.startswith("visual.")}
    assert set(ours) == theirs


def test_a_checkpoint_around_the_tower_is_read_too(whole, tmp_path):
    saved = {f"cond_stage_model.model.{k}": v for k, v in whole.state_dict().items()}
    torch.save({"state_dict": {**saved, "first_stage_model.conv.weight": torch.zeros(1)}}, tmp_path / "sd.ckpt")
    assert torch.equal(embedder(tmp_path / "sd.ckpt").model.token_embedding.weight, whole.token_embedding.weight)


def test_weights_of_another_tower_are_refused(file):
    with pytest.raises(ValueError, match="the weights do not fit"):
        OpenCLIPTextEmbedder({**ARCH, "width": 48}, file)
    with pytest.raises(ValueError, match="knows no architecture 'ViT-H14'. Did you mean 'ViT-H-14'"):
        OpenCLIPTextEmbedder("ViT-H14")


def test_random_weights_are_said_aloud_once_and_loaded_ones_are_not(file):
    made = OpenCLIPTextEmbedder(ARCH)
    with pytest.warns(UserWarning, match="width 32, 3 layers has random weights: its embeddings mean nothing"):
        made(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(PROMPTS)
        embedder(file)(PROMPTS)
        fresh = OpenCLIPTextEmbedder(ARCH)
        fresh.load_state_dict(made.state_dict())
        fresh(PROMPTS)
    with pytest.warns(UserWarning, match="it learns from scratch"):
        OpenCLIPTextEmbedder(ARCH, trainable=True)(PROMPTS)


# open_clip's published sizes: the text towers of Stable Diffusion 2 and SDXL.
@pytest.mark.parametrize(
    "arch, tensors, count",
    [("ViT-H-14", 294, 354_032_641), ("ViT-bigG-14", 390, 694_659_841), ("ViT-L-14", 150, 123_650_305)],
)
def test_published_towers_are_built_without_memory(arch, tensors, count):
    with torch.device("meta"):
        made = build({"type": "open_clip_text", "arch": arch, "weights": "not/there.safetensors"}, "embedder")
    assert all(p.is_meta for p in made.parameters())
    assert (len(made.state_dict()), sum(p.numel() for p in made.parameters())) == (tensors, count)


def test_the_image_tower_of_stable_video_diffusion_is_built_without_memory():
    with torch.device("meta"):
        made = OpenCLIPImageEmbedder("ViT-H-14")
    assert sum(p.numel() for p in made.parameters()) == 632_076_800
    assert {name.split(".")[0] for name in made.state_dict()} == {"model"}


# Pictures ------------------------------------------------------------------------------------------


def pictures(file, **options):
    return OpenCLIPImageEmbedder(PICTURES, file, **options).eval()


def prepared():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_picture_is_encoded_as_open_clip_does(whole, file):
    x = prepared()
    constants = peer("open_clip.constants")
    mean, std = (torch.tensor(v)[:, None, None] for v in (constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD))
    theirs = whole.encode_image(((x + 1) / 2 - mean) / std)
    ours = pictures(file)(x)
    assert ours.shape == (2, 1, 24) and torch.allclose(ours[:, 0], theirs, atol=1e-6)
    assert torch.allclose(pictures(file, feeds="vector")(x), theirs, atol=1e-6)


def test_patches_are_open_clips_tokens_and_hidden_are_those_before_the_norm(whole, file):
    whole.visual.output_tokens = True
    made = pictures(file, output="patches")
    _, tokens = whole.visual(made.prepare(prepared()))
    whole.visual.output_tokens = False
    assert torch.allclose(made(prepared()), tokens, atol=1e-6)
    raw = pictures(file, output="hidden")(prepared())
    assert raw.shape == (2, 17, 32) and torch.allclose(whole.visual.ln_post(raw)[:, 1:], tokens, atol=1e-6)


def test_penultimate_tokens_are_those_that_the_last_block_reads(whole, file):
    raw = pictures(file, output="hidden")
    blocks = raw.tower.transformer.resblocks
    made = pictures(file, output="penultimate")
    seen = made(prepared())
    assert seen.shape == (2, 17, 32) and (seen - raw(prepared())).abs().max() > 0.01
    assert torch.allclose(blocks[-1](seen), raw(prepared()), atol=1e-6)
    assert f"model.visual.transformer.resblocks.{len(blocks) - 1}.*" in made.idle_weights()


def test_an_empty_picture_is_zeros_to_the_tower(whole, file):
    made = pictures(file, output="hidden", null="empty", feeds="ip_adapter", pixel_range=(0.0, 1.0))
    pixels = (prepared() + 1) / 2
    null = EmbedderConditioner([made]).eval()({"image": pixels}).null["ip_adapter"]
    zeros = whole.visual.transformer(whole.visual._embeds(torch.zeros(1, 3, 32, 32)))
    assert torch.allclose(null, zeros.expand(2, -1, -1), atol=1e-5)
    film = torch.stack([pixels] * 3, 2)
    assert EmbedderConditioner([made]).eval()({"image": film}).null["ip_adapter"].shape == (2, 51, 32)


def test_a_picture_of_another_size_is_resized_and_a_grey_one_is_grey(file):
    made = pictures(file)
    flat = torch.full((1, 1, 70, 50), 0.5)
    assert torch.allclose(made(flat), made(torch.full((1, 3, 32, 32), 0.5)), atol=1e-5)


def unprepared(made, x):
    return (made.prepare(x) * made.std + made.mean) * 2 - 1


@pytest.mark.parametrize("size", [(160, 288), (33, 250), (20, 90), (16, 24), (32, 40)])
def test_pictures_are_resized_as_diffusers_does_for_stable_video_diffusion(file, size):
    theirs = peer("diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion")
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    ours = unprepared(pictures(file).double(), x)
    expected = theirs._resize_with_antialiasing(x, (32, 32))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)  # the kernels there are made in float32
    low = unprepared(pictures(file), x.float())
    torch.testing.assert_close(low, expected.float(), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unprepared(pictures(file), x.float()), low)


def test_antialiased_pictures_are_resized_as_pillow_does_for_clip(file):
    from PIL import Image

    x = torch.rand(1, 1, 75, 110, generator=torch.Generator().manual_seed(2)) * 2 - 1
    ours = unprepared(pictures(file, resize="antialiased"), x)
    expected = torch.tensor(numpy.array(Image.fromarray(x[0, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(ours, expected.expand(1, 3, -1, -1), rtol=0, atol=2e-6)
    assert (ours - unprepared(pictures(file), x)).abs().max() > 0.1  # the two ways differ


def test_the_frames_of_a_video_are_tokens_in_order(file):
    made = pictures(file)
    video = torch.stack([prepared(), -prepared()], 2)
    assert torch.allclose(made(video), torch.cat([made(prepared()), made(-prepared())], 1), atol=1e-6)


def test_gradients_reach_the_picture_through_a_frozen_tower(file):
    x = prepared().requires_grad_()
    made = pictures(file)
    made(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in made.parameters())


def test_a_picture_in_another_range_is_an_error(file):
    with pytest.raises(ValueError, match="values from 0 to 255, and pixel_range is -1 to 1"):
        pictures(file)(torch.linspace(0, 255, 3 * 32 * 32).view(1, 3, 32, 32))
    with pytest.raises(ValueError, match="holds pictures"):
        pictures(file)(torch.zeros(1, 4, 8, 8))


# In a conditioner ------------------------------------------------------------------------------------


def test_a_frozen_tower_stays_as_it_is_under_training(file):
    made = embedder(file)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert made.train().training and not made.model.training and made.train() is made
    head = torch.nn.Linear(32, 1)
    optimizer = torch.optim.AdamW([*(p for p in made.parameters() if p.requires_grad), *head.parameters()], lr=0.1)
    for _ in range(2):
        head(made(PROMPTS)["cross_attention"].tensor).sum().backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_a_trainable_tower_learns(file):
    made = OpenCLIPTextEmbedder(ARCH, file, layer="pooled", feeds="vector", trainable=True, null="empty")
    batch = {"caption": PROMPTS, "noise_key": torch.arange(3), "step": 0}
    cond = EmbedderConditioner([made]).train()(batch)
    (cond["vector"].sum() + cond.null["vector"].sum()).backward()
    assert made.model.token_embedding.weight.grad[ids()[1]].abs().sum() > 0
    assert made.model.text_projection.grad.abs().sum() > 0


def test_two_towers_are_joined_along_features_as_in_sdxl(file):
    first, second = embedder(file), embedder(file, layer="penultimate", norm=False, pooled_feeds="vector")
    cond = EmbedderConditioner([first, second]).eval()({"caption": PROMPTS})
    assert cond["cross_attention"].shape == (3, 16, 64) and cond["vector"].shape == (3, 24)
    assert torch.equal(cond["cross_attention"][..., 32:], second(PROMPTS)["cross_attention"].tensor)
