"""The first stage of Stable Video Diffusion: the published layout, the numbers of its peer, chunks and tiles."""

import hashlib

import pytest
import torch
from peers import peer
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints.maps.autoencoder import temporal_decoder
from vdiff.first_stages import AutoencoderKL, TemporalDecoderAutoencoder
from vdiff.process import RowKeys
from vdiff.registry import build

TINY = dict(channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(**options):
    """The same weights every time, norms and biases drawn, too, and layers over time, which begin at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = TemporalDecoderAutoencoder(**(TINY | options)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def test_the_state_dict_is_that_of_stable_video_diffusion():
    """The digest is of the published first stage's sorted lines "name shape"; 266 of them are the decoder's."""
    with torch.device("meta"):
        model = TemporalDecoderAutoencoder()
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    assert len(lines) == 372 and len(model.decoder.state_dict()) == 266
    assert sum(p.numel() for p in model.decoder.parameters()) == 63_579_183
    assert {
        "decoder.mid.block_1.mix_factor (1,)",
        "decoder.up.1.block.0.time_stack.out_layers.3.weight (256, 256, 3, 1, 1)",
        "decoder.conv_out.time_mix_conv.weight (3, 3, 3, 1, 1)",
    } <= set(lines)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "4126ecc84fc350ce69f85d9a3447c8c34f6778ea2bb5c4a859dabb04b95c60cc"


def test_with_quant_conv_it_counts_what_diffusers_counts():
    with torch.device("meta"):
        model = TemporalDecoderAutoencoder(quant_conv=True)
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == (374, 97_742_847)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_says_what_diffusers_says(dtype, tolerance):
    theirs = peer("diffusers").AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 2
    )
    ours = tiny(channels=32, num_res_blocks=2, norm_groups=32, quant_conv=True, scale=1.0)
    theirs.load_state_dict(temporal_decoder(2)(ours.state_dict()))
    ours, theirs = ours.to(dtype), theirs.to(dtype).eval()
    x, z = draw(2, 3, 8, 8, dtype=dtype), draw(2, 4, 5, 4, 4, dtype=dtype)
    rows = z.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        posterior, twin = ours.posterior(x), theirs.encode(x).latent_dist
        whole = theirs.decode(rows, num_frames=5).sample.unflatten(0, (2, 5)).transpose(1, 2)
        parts = [theirs.decode(part, num_frames=len(part)).sample for part in rows[:5].split(2)]
        pairs = [(posterior.mean, twin.mean), (ours.decode(z), whole)]
        ours.chunk = 2
        pairs += [(ours.decode(z)[0], torch.cat(parts).transpose(0, 1))]
    for a, b in pairs:
        assert (a - b).abs().max() < tolerance * b.abs().max()


def test_a_chunk_as_long_as_the_video_is_none_and_a_shorter_one_changes_what_it_cannot_see():
    model, z = tiny(), draw(1, 4, 4, 4, 4)
    with torch.no_grad():
        whole = model.decode(z)
        model.chunk = 4
        assert torch.equal(model.decode(z), whole)
        model.chunk = 2
        halves = torch.cat([model.decode(part) for part in z.split(2, dim=2)], dim=2)
        assert torch.equal(model.decode(z), halves)
    assert (halves - whole).abs().max() > 1e-3


def test_the_encoder_is_that_of_images_and_scale_is_undone():
    model, images = tiny(), AutoencoderKL(**TINY, quant_conv=False, scale=0.18215).eval()
    images.encoder.load_state_dict(model.encoder.state_dict())
    video = draw(2, 3, 3, 8, 8)
    with torch.no_grad():
        latents = model.encode(video)
        assert torch.equal(latents, images.encode(video)) and latents.shape == (2, *model.latent_shape((3, 3, 8, 8)))
        plain = tiny(scale=1.0)
        assert (model.decode(0.18215 * latents) - plain.decode(latents)).abs().max() < 1e-5


def test_a_picture_is_a_video_of_one_frame():
    model, z = tiny(), draw(2, 4, 4, 4)
    with torch.no_grad():
        assert (model.decode(z) - model.decode(z[:, :, None])[:, :, 0]).abs().max() < 1e-6


def test_a_tile_that_covers_all_changes_nothing_and_smaller_ones_give_the_same_size():
    model, z = tiny(tile=16, tile_overlap=8), draw(1, 4, 2, 12, 12)
    with torch.no_grad():
        assert model.decode(z).shape == (1, 3, 2, 24, 24)
        model.tile = 24
        covered = model.decode(z)
        model.tile = None
        assert torch.equal(model.decode(z), covered)


def test_it_trains_through_every_weight():
    model = build({"type": "temporal_decoder", **TINY, "checkpointing": True}, kind="first_stage")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    keys = RowKeys.of({"noise_key": torch.arange(2), "step": 3, "seed": 0})
    out = model.reconstruct(draw(2, 3, 3, 8, 8), keys)
    (out.pixels.square().mean() + out.penalties["kl"].mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_one_graph_under_compile():
    model, counter = tiny(), CompileCounter()
    decode = torch.compile(model.decode, backend=counter, fullgraph=True)
    z = draw(1, 4, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(decode(z), model.decode(z))
    assert counter.frame_count == 1


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        tiny(chunk=0)
    with pytest.raises(ValueError, match=r"latents are \(B, 4, h, w\) or \(B, 4, f, h, w\), got \(1, 3, 4, 4\)"):
        tiny().decode(draw(1, 3, 4, 4))
