"""CogVideoX's video autoencoder: the published layout, its peer's numbers, whole clips and chunks, and their memory."""

import pytest
import torch
from peers import peer
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdiff.checkpoints.maps.cogvideox import diffusers_autoencoder, sat_autoencoder
from vdiff.first_stages import AutoencoderKLCogVideoX
from vdiff.networks.causal import CausalConv3d, Chunk
from vdiff.networks.layers import GroupNorm
from vdiff.process import RowKeys
from vdiff.registry import build

TINY = dict(channels=8, channel_mult=(1, 2, 2, 2), num_res_blocks=1, latent_channels=4, norm_groups=4)
SIZE = (16, 16)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(**options):
    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(**(TINY | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms begin at 1 and 0
    return model


def without_statistics(model):
    """What is left are convolutions, which remember everything they need."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GroupNorm):
                setattr(module, name, Untold() if module.__class__.__name__ != "LatentNorm" else nn.Identity())
    return model


class Untold(nn.Module):
    def forward(self, x, z, chunk):
        return x


# --- layout --------------------------------------------------------------------------------------


def test_the_state_dict_is_the_published_one():
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 436 and sum(p.numel() for p in model.parameters()) == 215_583_907
    assert sum(p.numel() for p in model.encoder.parameters()) == 92_215_456
    assert sum(p.numel() for p in model.decoder.parameters()) == 123_368_451
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1, 1)
    assert shapes["decoder.up.3.block.3.norm1.conv_y.conv.weight"] == (512, 16, 1, 1, 1)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (256, 256, 3, 3)
    assert model.latent_shape((3, 49, 480, 720)) == (16, 13, 60, 90)


def twin(dtype=torch.float32):
    """diffusers' autoencoder and ours with the same weights."""
    other = peer("diffusers").AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    ours, other = tiny().to(dtype), other.to(dtype).eval()
    other.load_state_dict(diffusers_autoencoder()(ours.state_dict()))
    return ours, other


def test_weights_go_to_both_layouts_and_back_bit_for_bit():
    weights = tiny().state_dict()
    diffusers, sat = diffusers_autoencoder(), sat_autoencoder()
    theirs = diffusers(weights)
    shapes = {name: value.shape for name, value in twin()[1].state_dict().items()}
    assert {name: value.shape for name, value in theirs.items()} == shapes
    original = sat(diffusers.inverse(theirs))
    back = sat.inverse(original | {"loss.logvar": torch.zeros(1)})
    assert sorted(back) == sorted(weights) == sorted(original)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


# --- the peer's numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_chunk_by_chunk_it_says_what_diffusers_says(dtype, tolerance):
    ours, other = twin(dtype)
    with torch.no_grad():
        for frames in (1, 5, 13, 17):
            x = draw(1, 3, frames, *SIZE, dtype=dtype)
            posterior, theirs = ours.posterior(x), other.encode(x).latent_dist
            assert (posterior.mean - theirs.mean).abs().max() < tolerance * theirs.mean.abs().max()
            assert (posterior.log_variance - theirs.logvar).abs().max() < tolerance * theirs.logvar.abs().max()
        for frames in (1, 3, 7):
            z = draw(1, 4, frames, 2, 2, dtype=dtype)
            expected = other.decode(z).sample
            assert expected.shape[2] == 4 * (frames - 1) + 1
            assert (ours.decode(z) - expected).abs().max() < tolerance * expected.abs().max()


def test_whole_it_says_what_diffusers_says_in_one_go():
    ours, other = twin()
    ours.mode = "whole"
    other.num_sample_frames_batch_size = other.num_latent_frames_batch_size = 1000
    x, z = draw(1, 3, 17, *SIZE), draw(1, 4, 5, 2, 2)
    with torch.no_grad():
        assert (ours.encode(x) - other.encode(x).latent_dist.mean).abs().max() < 1e-5
        assert (ours.decode(z) - other.decode(z).sample).abs().max() < 1e-5


# --- whole clips and chunks ----------------------------------------------------------------------


def both(model, function, x):
    answers = []
    for model.mode in ("whole", "streaming"):
        with torch.no_grad():
            answers.append(getattr(model, function)(x))
    return answers


def test_what_fits_into_one_chunk_is_the_same_in_both_modes():
    model = tiny()
    for function, x in (("encode", draw(1, 3, 13, *SIZE)), ("decode", draw(1, 4, 3, 2, 2))):
        whole, streamed = both(model, function, x)
        assert torch.equal(whole, streamed)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("latents", [4, 5, 8])
def test_without_statistics_chunks_make_no_difference(chunk, latents):
    """All that the modes differ by is what the normalisations see: convolutions remember what they need."""
    model = without_statistics(tiny(chunk=chunk)).double()
    x, z = draw(1, 3, 4 * latents - 3, *SIZE).double(), draw(1, 4, latents, 2, 2).double()
    for function, given in (("encode", x), ("decode", z)):
        whole, streamed = both(model, function, given)
        assert whole.abs().max() > 1e-3 and (whole - streamed).abs().max() < 1e-12 * whole.abs().max()


def test_with_statistics_they_differ():
    """With drawn weights by 0.30 of the spread of latents and 0.21 of that of pixels, from the second chunk on."""
    model = tiny()
    for function, x in (("encode", draw(1, 3, 17, *SIZE)), ("decode", draw(1, 4, 5, 2, 2))):
        whole, streamed = both(model, function, x)
        assert 0.1 < (whole - streamed).std() / whole.std() < 0.5


def test_a_chunk_knows_nothing_of_later_ones():
    model, x = tiny(), draw(1, 3, 17, *SIZE)
    other = x.clone()
    other[:, :, 9:] = draw(1, 3, 8, *SIZE, seed=1)
    with torch.no_grad():
        here, there = model.encode(x), model.encode(other)
    assert torch.equal(here[:, :, :3], there[:, :, :3]) and not torch.allclose(here[:, :, 3:], there[:, :, 3:])


def test_no_layer_looks_ahead():
    model = without_statistics(tiny(mode="whole"))
    z = draw(1, 4, 4, 2, 2).requires_grad_()
    grad = torch.autograd.grad(model.decode(z)[:, :, : 1 + 2 * 4].sum(), z)[0]
    assert (grad[:, :, 3:] == 0).all() and (grad[:, :, :3] != 0).any()


def test_gradients_pass_from_chunk_to_chunk():
    """Also to the first frame, which stands in for the two that never were."""
    conv, x = CausalConv3d(2, 3).double(), draw(1, 2, 7, 4, 4).double().requires_grad_()
    past = {}
    chunks = [conv(part, Chunk(i == 0, past)) for i, part in enumerate(x.split([3, 1, 3], dim=2))]
    streamed, whole = torch.cat(chunks, 2), conv(x, Chunk())
    assert torch.allclose(streamed, whole, atol=1e-14, rtol=0)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (streamed, whole)]
    assert torch.allclose(*grads, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: conv(x, Chunk()), x[:, :, :3, :2, :2].detach().requires_grad_())


class Live(TorchDispatchMode):
    """The most bytes that live at once of the tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.stores, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.stores = {key: (ref, n) for key, (ref, n) in self.stores.items() if not ref.expired()}
        for tensor in tree_leaves(out):
            store = tensor.untyped_storage()
            if store._cdata not in given:
                self.stores[store._cdata] = StorageWeakRef(store), store.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self.stores.values()))
        return out


def peak(function, *args):
    with torch.no_grad(), Live() as live:
        function(*args)
    return live.peak


def test_memory_of_a_stream_does_not_grow_with_the_clip():
    """Beyond one chunk, where what is handed out is not kept: equal to the byte. A whole clip takes ever more."""
    model = tiny(channel_mult=(1, 2, 2))

    def run(function, x):
        for _ in function(x):
            pass

    for by_chunk, shape, lengths in (
        (model.encode_by_chunk, (1, 3, 8, 8), (17, 25, 49)),
        (model.decode_by_chunk, (1, 4, 2, 2), (5, 7, 13)),
    ):
        peaks = [peak(run, by_chunk, draw(*shape[:2], n, *shape[2:])) for n in lengths]
        assert peaks[0] == peaks[1] == peaks[2]
    model.mode = "whole"
    shorter, longer = (peak(model.decode, draw(1, 4, n, 2, 2)) for n in (5, 13))
    assert shorter > 1.3 * peaks[0] and longer > 2 * shorter


def test_all_that_a_streaming_decode_keeps_is_its_output():
    model = tiny(channel_mult=(1, 2, 2))
    peaks = [peak(model.decode, draw(1, 4, n, 2, 2)) for n in (7, 15)]
    output = 3 * 32 * 8 * 8 * 4  # bytes of the 32 frames that are more
    assert peaks[1] - peaks[0] <= 2 * output  # the parts, and then all in one


# --- a latent in front ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["whole", "streaming"])
def test_a_latent_in_front_is_the_first_again_and_is_not_decoded(mode):
    """CogVideoX 1.5: diffusers decodes ``latents[:, additional_frames:]``, SAT ``z[:, :, 1:]``. To drop the first four
    frames instead is something else, for the others then have seen what is dropped."""
    ours, other = twin()
    if mode == "whole":
        other.num_sample_frames_batch_size = other.num_latent_frames_batch_size = 1000
    model = tiny(front_latents=1, mode=mode)
    model.load_state_dict(ours.state_dict())
    ours.mode = mode
    x, z = draw(1, 3, 9, *SIZE), draw(1, 4, 6, 2, 2)
    with torch.no_grad():
        assert torch.equal(model.encode(x), torch.cat([ours.encode(x)[:, :, :1], ours.encode(x)], 2))
        assert model.encode(x).shape[1:] == model.latent_shape((3, 9, *SIZE)) == (4, 4, 2, 2)
        assert torch.equal(model.decode(model.encode(x)), ours.decode(ours.encode(x)))
        video, expected = model.decode(z), other.decode(z[:, :, 1:]).sample
        assert video.shape[2] == 17 and (video - expected).abs().max() < 1e-5
        assert (ours.decode(z)[:, :, 4:] - video).std() > 0.1 * video.std()
        for picture in (x[:, :, 0], x[:, :, :1]):
            assert torch.equal(model.encode(picture), ours.encode(picture))
            assert model.encode(picture).shape[1:] == model.latent_shape(picture.shape[1:])
            assert torch.equal(model.decode(ours.encode(picture)), ours.decode(ours.encode(picture)))


@pytest.mark.parametrize("time_factor, frames", [(1, 6), (4, 13)])
def test_chunks_have_it_once(time_factor, frames):
    model, x = tiny(front_latents=2, chunk=1, time_factor=time_factor), draw(1, 3, frames, *SIZE)
    with torch.no_grad():
        z = torch.cat(list(model.encode_by_chunk(x)), 2)
        assert torch.equal(z, model.encode(x)) and torch.equal(z[:, :, 0], z[:, :, 2])
        assert torch.equal(torch.cat(list(model.decode_by_chunk(z)), 2), model.decode(z))
        assert model.decode(z).shape == x.shape and model.reconstruct(x).latents.shape == z.shape
        with pytest.raises(ValueError, match="2 frames of latents, of which 2 stand in front; a clip has at least 3"):
            model.decode(z[:, :, :2])


def test_what_is_drawn_stands_in_front_as_it_was_drawn():
    model, x = tiny(front_latents=1, trains_on="sample"), draw(1, 3, 9, *SIZE)
    with torch.no_grad():
        z = model.encode_for_training(x, RowKeys(seed=1, step=2, keys=(5,), position=(0,), global_size=1))
    assert z.shape[2] == 4 and torch.equal(z[:, :, 0], z[:, :, 1]) and not torch.equal(z, model.encode(x))


@pytest.mark.parametrize("has_picture", [False, True])
def test_a_network_with_patches_of_two_latents_learns_from_odd_clips_and_samples_them(has_picture):
    """81 frames are 21 latents; here 9 are 3."""
    embedders = [{"type": "field", "reads": "text", "feeds": "cross_attention"}]
    if has_picture:
        embedders.append({"type": "image_latents", "reads": "image", "frames": 9, "fill": "zero", "null": "same"})
    network = {
        "type": "cogvideox", "in_channels": 8 if has_picture else 4, "out_channels": 4, "width": 64, "depth": 1,
        "num_heads": 2, "patch_size": (2, 2, 2), "text_dim": 8, "positions": "rotary", "emb_dim": 16,
        "trained_size": None,
    }  # fmt: skip
    engine = build(
        {
            "type": "diffusion", "input_key": "video", "sample_shape": (3, 9, *SIZE),
            "first_stage": {"type": "autoencoder_kl_cogvideox", "front_latents": 1} | TINY,
            "conditioner": {"type": "embedders", "embedders": embedders},
            "schedule": {"type": "zero_snr"}, "sigma_sampler": {"type": "uniform_index"},
            "denoiser": {"type": "v", "network": network}, "loss": {"type": "mse"},
            "sampler": {"type": "ddim", "num_steps": 2, "discretizer": {"type": "trailing"}},
        },
        "engine",
    )  # fmt: skip
    video = draw(2, 3, 9, *SIZE)
    told = {"text": draw(2, 5, 8)} | ({"image": video[:, :, 0]} if has_picture else {})
    engine({"video": video, "noise_key": torch.arange(2), "step": 0} | told).per_row.mean().backward()
    assert all(p.grad is not None for p in engine.denoiser.parameters())
    assert engine.sample(told).shape == video.shape and engine.sample(told, decode=False).shape[2] == 4


# --- shapes, options, errors ---------------------------------------------------------------------


def test_a_clip_has_4_k_plus_1_frames_and_an_error_says_the_nearest():
    model = tiny()
    for frames in (1, 5, 9, 49, 81):
        assert model.latent_shape((3, frames, *SIZE)) == (4, (frames - 1) // 4 + 1, 2, 2)
    with pytest.raises(ValueError, match=r"number of frames must be 4 k \+ 1, got 48. The nearest legal: 45 and 49"):
        model.encode(draw(1, 3, 48, *SIZE))
    with pytest.raises(ValueError, match="number of frames .* got 0. The nearest legal: 1"):
        model.latent_shape((3, 0, *SIZE))
    with pytest.raises(ValueError, match="height must be a multiple of 8, got 20. The nearest legal: 16 and 24"):
        model.latent_shape((3, 5, 20, 16))
    with pytest.raises(ValueError, match=r"a sample is \(3, f, h, w\)"):
        model.latent_shape((1, 5, 16, 16))
    with pytest.raises(ValueError, match=r"latents are \(B, 4, f, h, w\)"):
        model.decode(draw(1, 3, 1, 2, 2))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(scale=0.0), "scale must not be 0"),
        (dict(chunk=0), "chunk must be at least 1"),
        (dict(front_latents=-1), "front_latents must be at least 0"),
        (dict(time_factor=3), "by which time can shrink 1, 2, 4, 8 times, got 3"),
        (dict(tile=12), "multiples of 8 pixels"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


def test_a_picture_is_a_clip_of_one():
    model, x = tiny(), draw(2, 3, *SIZE)
    with torch.no_grad():
        z = model.encode(x)
        assert torch.equal(z, model.encode(x[:, :, None])[:, :, 0]) and z.shape == (2, *model.latent_shape(x.shape[1:]))
        assert torch.equal(model.decode(z), model.decode(z[:, :, None])[:, :, 0])


@pytest.mark.parametrize("mode", ["whole", "streaming"])
@pytest.mark.parametrize("time_factor, frames", [(1, 6), (2, 9), (4, 9), (8, 17)])
def test_every_compression_of_time_comes_back(mode, time_factor, frames):
    model, x = tiny(mode=mode, time_factor=time_factor), draw(1, 3, frames, *SIZE)
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape[1:] == model.latent_shape(x.shape[1:]) and model.decode(z).shape == x.shape


def test_scale_and_shift_move_latents_and_not_pixels():
    plain, model, x = tiny(), tiny(scale=0.7, shift=0.25), draw(1, 3, 5, *SIZE)
    with torch.no_grad():
        assert torch.allclose(model.encode(x), (plain.encode(x) - 0.25) * 0.7)
        assert torch.allclose(model.decode(model.encode(x)), plain.decode(plain.encode(x)), atol=1e-4)
        parts = torch.cat(list(model.encode_by_chunk(x)), 2), torch.cat(list(model.decode_by_chunk(model.encode(x))), 2)
        assert torch.equal(parts[0], model.encode(x)) and torch.equal(parts[1], model.decode(parts[0]))


def test_slices_and_covering_tiles_change_nothing():
    model, x = tiny(), draw(2, 3, 5, *SIZE)
    with torch.no_grad():
        z = model.encode(x)
        model.tile = 16
        assert torch.equal(model.encode(x), z)
        model.max_rows = 1
        assert (model.encode(x) - z).abs().max() < 1e-5
        wide = draw(1, 3, 5, 16, 40)
        assert model.encode(wide).shape == (1, 4, 2, 2, 5) and model.decode(model.encode(wide)).shape == wide.shape


def test_it_is_trained_whole_with_recomputed_activations():
    x, grads = draw(1, 3, 5, *SIZE), []
    for checkpointing in (False, True):
        model = tiny(mode="whole", checkpointing=checkpointing).train()
        said = model.reconstruct(x, RowKeys(seed=1, step=2, keys=(5,), position=(0,), global_size=1))
        (said.pixels.square().mean() + said.penalties["kl"].mean()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_graph_each_way():
    model, counter = tiny(mode="whole", channel_mult=(1, 2), time_factor=2), CompileCounter()
    x = draw(1, 3, 3, 4, 4)
    z = torch.compile(model.encode, backend=counter, fullgraph=True)(x)
    torch.compile(model.decode, backend=counter, fullgraph=True)(z)
    assert counter.frame_count == 2


def test_it_is_built_from_a_config():
    node = {"type": "autoencoder_kl_cogvideox", "scale": 0.7, "mode": "whole"} | TINY
    model = build(node, "first_stage")
    assert isinstance(model, AutoencoderKLCogVideoX) and model.mode == "whole" and model.scale == 0.7


@pytest.mark.parametrize("front", [0, 1])
def test_a_mask_of_one_frame_is_that_of_the_latent_that_stands_for_it(front):
    """The first for one frame, the next for four, and so on; one in front stands where the first does."""
    stage = AutoencoderKLCogVideoX(channels=8, channel_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=4,
                                   front_latents=front)  # fmt: skip
    _, *size = stage.latent_shape((3, 9, 16, 16))
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        mask = torch.zeros(1, 1, 9, 16, 16)
        mask[:, :, frame, 3, 12] = 1
        found = stage.latent_mask(mask, size).nonzero()[:, 2:].tolist()
        assert found == [[i, 0, 1] for i in ([0] * front + [front] if latent == 0 else [latent + front])]
    with pytest.raises(ValueError, match="a mask of 8 frames; a clip has 4 k"):
        stage.latent_mask(torch.zeros(1, 1, 8, 16, 16), size)
