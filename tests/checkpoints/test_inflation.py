"""A network of videos filled with an image network's weights says of every frame what that says of the image.

Both run the same layers on the same rows, so in float32 as in float64 the two differ by the order of sums alone: keys
and values are made for each video there and for each frame here.
"""

import pytest
import torch
from torch import nn

from vdiff.checkpoints import MismatchError, load_into
from vdiff.checkpoints.inflation import beyond_images
from vdiff.first_stages import AutoencoderKL, TemporalDecoderAutoencoder
from vdiff.networks import DiT, LVDMUNet, UNet, VideoUNet
from vdiff.process import Conditioning

SMALL = dict(
    in_channels=4, out_channels=4, channels=8, context_dim=12, channel_mult=(1, 2), num_res_blocks=1,
    attention_factors=(1, 2), num_heads=2, norm_groups=4,
)  # fmt: skip
SD2 = dict(in_channels=4, out_channels=4, channels=320, head_dim=64, context_dim=1024)
DTYPES = (torch.float32, torch.float64)
NUM_FRAMES = 3


def trained(module):
    """As after training: nothing in it is zero any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.2)
    return module.eval()


def image_unet(**options):
    torch.manual_seed(0)
    return trained(UNet(**(SMALL | options)))


def apart(a, b):
    """The largest difference in units of rounding at the size of ``b``: some tens of layers, each a sum in an order of
    the processor's own (0 on one, 8 on another)."""
    return float((a - b).abs().max() / b.abs().max() / torch.finfo(b.dtype).eps)


def frames(x):
    """Videos as rows of images."""
    return x.transpose(1, 2).flatten(0, 1)


def each(value):
    """One for every frame."""
    return value.repeat_interleave(NUM_FRAMES, dim=0)


def asked(dtype, channels=4):
    torch.manual_seed(1)
    x = torch.randn(2, channels, NUM_FRAMES, 8, 8, dtype=dtype)
    return x, torch.tensor([0.3, 2.0], dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)


@torch.no_grad()
def said_of_images(images, x, c_noise, context):
    cond = Conditioning({"cross_attention": each(context)})
    return images(frames(x), each(c_noise), cond).unflatten(0, (2, NUM_FRAMES)).transpose(1, 2)


@torch.no_grad()
def said_of_video(video, x, c_noise, context, **told):
    return video(x, c_noise, Conditioning({"cross_attention": context, **told}))


VIDEO = {
    "svd_of_sd1": (VideoUNet, {}),
    "svd_of_sd2": (VideoUNet, dict(num_classes="sequential", vector_dim=6, temporal_kernel=3)),
    "videocrafter1": (LVDMUNet, dict(temporal_kernels=None, max_distance=4, fps=False, initial_attention=False)),
    "videocrafter2": (LVDMUNet, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIDEO)
def test_every_frame_is_told_what_the_image_was(name, dtype):
    """From Stable Diffusion 1 (convolutions around attention) and 2 (matrices) alike; and time is not dead."""
    network, options = VIDEO[name]
    images = image_unet(linear_projection=name != "svd_of_sd1")
    video = network(**SMALL, **options).eval()
    report = load_into(video, images.state_dict(), inflate=True)
    assert set(report.loaded) | set(report.new) == set(video.state_dict()) and len(report.loaded) == 286
    images.to(dtype), video.to(dtype)
    x, c_noise, context = asked(dtype)
    told = {"vector": torch.randn(2, 6, dtype=dtype)} if name == "svd_of_sd2" else {}
    told |= {"fps": torch.tensor([8.0, 24.0])} if name == "videocrafter2" else {}
    expected = said_of_images(images, x, c_noise, context)
    assert expected.std() > 0.5
    assert apart(said_of_video(video, x, c_noise, context, **told), expected) < 32
    trained(video)
    assert (said_of_video(video, x, c_noise, context, **told) - expected).abs().max() > 0.05


def test_images_among_videos_stay_images_whatever_time_has_learned():
    """Where ``image_only`` is not 0 the share of time is exactly 0, so the equality is bitwise."""
    images = image_unet(linear_projection=True)
    video = VideoUNet(**SMALL)
    load_into(video, images.state_dict(), inflate=True)
    trained(video)
    x, c_noise, context = asked(torch.float64)
    images.double(), video.double()
    by_frame = [each(value).unflatten(0, (2, NUM_FRAMES)) for value in (c_noise, context)]
    said = said_of_video(video, x, *by_frame, image_only=torch.ones(2, NUM_FRAMES))
    assert torch.equal(said, said_of_images(images, x, c_noise, context))


def test_what_is_new_learns_from_the_first_step_on():
    """Zero is where it begins and not where it stays: every last layer has a gradient, and no image layer is moved."""
    video = VideoUNet(**SMALL)
    load_into(video, image_unet(linear_projection=True).state_dict(), inflate=True)
    x, c_noise, context = asked(torch.float32)
    video(x, c_noise, Conditioning({"cross_attention": context})).square().mean().backward()
    lasts = ("time_stack.out_layers.3.weight", "to_out.0.weight", "net.2.weight", "time_pos_embed.2.weight")
    grads = {n: p.grad for n, p in video.named_parameters() if ".time_" in n and n.endswith(lasts)}
    assert len(grads) == 8 + 7 * 5 and all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_with_layers_over_time_begins_as_the_image_decoder(dtype):
    torch.manual_seed(0)
    tiny = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    images = trained(AutoencoderKL(**tiny, scale=0.18215)).to(dtype)
    video = TemporalDecoderAutoencoder(**tiny, quant_conv=True, post_quant_conv=True).to(dtype).eval()
    load_into(video, images.state_dict(), inflate=True)
    pixels = torch.rand(2, 3, NUM_FRAMES, 8, 8, dtype=dtype) * 2 - 1
    with torch.no_grad():
        latents = video.encode(pixels)
        assert torch.equal(latents, images.encode(pixels))
        expected = images.decode(latents)
        assert apart(video.decode(latents), expected) < 32
        assert (trained(video).decode(latents) - expected).abs().max() > 0.05


def test_a_picture_that_stands_still_is_a_volume():
    """Kernels over three frames with the image's in the middle: every slice of a still volume is told what the picture
    was. Normalisation and attention see the whole volume, so of one that moves this does not hold."""
    options = dict(context_dim=None, attention_factors=(2,))
    images = image_unet(**options).double()
    volumes = UNet(**(SMALL | options), dims=3).double()
    report = load_into(volumes, images.state_dict(), inflate=True)
    assert not report.new
    assert set(report.reshaped.values()) == {"kernel in the middle of 3 frames", "kernel in the middle of 1 frame"}
    x, c_noise, _ = asked(torch.float64)
    still = x[:, :, :1].expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        expected = images(x[:, :, 0], c_noise)
        assert (volumes(still, c_noise) - expected[:, :, None]).abs().max() < 1e-13
        kernel = volumes.input_blocks[0][0].weight
    assert torch.equal(kernel[:, :, 1], images.input_blocks[0][0].weight) and not kernel[:, :, [0, 2]].any()


@pytest.mark.parametrize("network", [UNet, VideoUNet, LVDMUNet])
def test_a_picture_given_besides_says_nothing_at_first(network):
    """8 input channels in SVD, 9 for inpainting: the columns of what is new are zero, and behind the others."""
    images = image_unet(linear_projection=True).double()
    options = dict(linear_projection=True) | ({"default_fps": 8.0} if network is LVDMUNet else {})
    wide = network(**(SMALL | {"in_channels": 9}), **options).double().eval()
    report = load_into(wide, images.state_dict(), inflate=True)
    assert report.reshaped == {"input_blocks.0.0.weight": "4 to 9 input channels, the new at zero"}
    x, c_noise, context = asked(torch.float64)
    besides = torch.randn(2, 5, NUM_FRAMES, 8, 8, dtype=torch.float64)
    expected = said_of_images(images, x, c_noise, context)
    if network is UNet:
        cond = Conditioning({"cross_attention": each(context), "concat": frames(besides)})
        said = wide(frames(x), each(c_noise), cond).unflatten(0, (2, NUM_FRAMES)).transpose(1, 2)
    else:
        said = said_of_video(wide, x, c_noise, context, concat=besides)
    assert (said - expected).abs().max() < 1e-13


def test_more_channels_of_a_diffusion_transformer_begin_at_zero_as_well():
    torch.manual_seed(0)
    tiny = dict(out_channels=4, width=32, depth=1, num_heads=2)
    images, wide = trained(DiT(4, **tiny)), DiT(7, **tiny)
    load_into(wide, images.state_dict(), inflate=True)
    x, besides, c_noise = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        said, expected = wide(x, c_noise, Conditioning({"concat": besides})), images(x, c_noise)
    assert (said - expected).abs().max() < 1e-5 and expected.std() > 0.5


def test_a_diffusion_transformer_has_no_layers_over_time_and_a_patch_over_frames_is_another_network():
    torch.manual_seed(0)
    tiny = dict(out_channels=4, width=32, depth=1, num_heads=2)
    weights = DiT(4, **tiny).state_dict()
    load_into(DiT(4, **tiny, patch_size=(1, 2, 2)), weights)
    with pytest.raises(MismatchError, match="out.*of another shape|of another shape.*out"):
        load_into(DiT(4, **tiny, patch_size=(2, 2, 2)), weights, inflate=True)


def test_what_is_new_adds_up_to_the_published_counts():
    """Tensors and parameters: the video network's less the image network's, which has fewer columns at its entrance."""
    with torch.device("meta"):
        images = UNet(**SD2, linear_projection=True)
        svd = VideoUNet(**(SD2 | {"in_channels": 8}), num_classes="sequential", vector_dim=768)
        videocrafter2 = LVDMUNet(**SD2)
    weights = images.state_dict()
    report = load_into(svd, weights, inflate=True, where="init: sd21.safetensors into denoiser.network")
    assert (len(report.loaded), len(report.new)) == (686, 1428 - 686)
    assert report.num_new == 1_524_623_082 - 865_910_724 - 320 * 4 * 9
    assert str(report) == (
        "init: sd21.safetensors into denoiser.network: 686 tensors loaded; new: 742 tensors, 658,700,838 parameters: "
        "label_emb.* (4), *.time_stack.* (636), *.time_mixer.* (38), *.time_pos_embed.* (64); 1 brought to another "
        "shape (4 to 8 input channels, the new at zero: input_blocks.0.0.weight)."
    )
    report = load_into(videocrafter2, weights, inflate=True)
    assert (len(report.loaded), len(report.new)) == (686, 1484 - 686)
    assert report.num_new == 1_413_284_420 - 865_910_724
    assert (
        "new: 798 tensors, 547,373,696 parameters: fps_embedding.* (4), *.temopral_conv.* (352), "
        "input_blocks.*.2.* (156), middle_block.2.* (26), output_blocks.*.2.* (234), init_attn.* (26)." in str(report)
    )


def test_svds_decoder_has_the_image_decoders_weights_and_as_many_more_as_published():
    with torch.device("meta"):
        images = AutoencoderKL()
        video = TemporalDecoderAutoencoder(quant_conv=True, post_quant_conv=True)
    report = load_into(video, images.state_dict(), inflate=True)
    post = 4 * 4 + 4  # which Stable Video Diffusion leaves out
    assert (len(report.loaded), len(report.new)) == (248, 374 + 2 - 248)
    assert report.num_new == 97_742_847 + post - 83_653_863


def test_names_below_a_prefix_are_moved_as_well():
    """As in a whole engine: what stands behind an attention makes room for VideoCrafter's transformer over time."""
    images, video = nn.ModuleDict({"network": image_unet(linear_projection=True)}), nn.ModuleDict()
    video["network"] = LVDMUNet(**SMALL)
    report = load_into(video, images.state_dict(), inflate=True)
    moved = video["network"].middle_block[3].state_dict()
    kept = {name: value for name, value in moved.items() if "temopral" not in name}
    expected = images["network"].middle_block[2].state_dict()
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)
    assert "network.middle_block.2.* (26)" in str(report)


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


def test_a_weight_of_images_that_is_missing_or_misspelled_is_an_error_by_its_name():
    weights = image_unet(linear_projection=True).state_dict()
    video = VideoUNet(**SMALL)
    before = {name: value.clone() for name, value in video.state_dict().items()}
    name = "input_blocks.1.0.in_layers.2.weight"
    with pytest.raises(MismatchError, match=f"1 missing in the file: {name}"):
        load_into(video, without(weights, name), inflate=True)
    with pytest.raises(MismatchError) as error:
        load_into(video, without(weights, name) | {"input_block.1.0.in_layers.2.weight": weights[name]}, inflate=True)
    assert f"1 missing in the file: {name}" in str(error.value)
    assert "1 unexpected in the file: input_block.1.0.in_layers.2.weight" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in video.state_dict().items())


def test_a_part_of_a_layer_over_time_is_an_error_for_no_image_network_has_it():
    video = VideoUNet(**SMALL)
    weights = video.state_dict()
    lost = "middle_block.0.time_stack.out_layers.3.bias"
    with pytest.raises(MismatchError, match=f"1 missing in the file: {lost}"):
        load_into(video, without(weights, lost), inflate=True)
    assert not load_into(video, weights, inflate=True).new  # the whole of it is loaded as ever


@pytest.mark.parametrize("options", [{"context_dim": 16}, {"out_channels": 8}, {"channel_mult": (1, 3)}])
def test_no_other_shape_is_made_to_fit(options):
    """Longer text is another text encoder's; what more output channels mean, the file does not say."""
    weights = image_unet(linear_projection=True).state_dict()
    with pytest.raises(MismatchError, match="of another shape or type"):
        load_into(VideoUNet(**(SMALL | options)), weights, inflate=True)


def test_fewer_channels_at_the_entrance_are_an_error():
    weights = image_unet(in_channels=9, linear_projection=True).state_dict()
    with pytest.raises(MismatchError, match=r"input_blocks.0.0.weight: \(8, 9, 3, 3\) float32 in the file, \(8, 4,"):
        load_into(VideoUNet(**SMALL), weights, inflate=True)


def test_without_the_word_the_layers_over_time_are_missed_and_the_error_says_it():
    with pytest.raises(MismatchError, match="305 missing in the file") as error:
        load_into(VideoUNet(**SMALL), image_unet(linear_projection=True).state_dict())
    assert str(error.value).endswith("Then `inflate` keeps what is new as it was built.")


def test_a_picture_for_videocrafter_and_several_cameras_are_beyond_images():
    i2v = LVDMUNet(**SMALL, image_tokens=2, learned_image_scale=True)
    names = beyond_images(i2v)
    assert {name.rpartition(".")[2] for name in names if "attn2" in name} == {"to_k_ip", "to_v_ip", "alpha"}
    load_into(i2v, image_unet(linear_projection=True).state_dict(), inflate=True)
