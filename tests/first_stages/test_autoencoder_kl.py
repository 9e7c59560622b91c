"""AutoencoderKL: the published layout, the numbers of its peer, shapes, tiles and the Gaussian in its middle."""

import hashlib
import math

import pytest
import torch
from peers import peer
from torch._dynamo.testing import CompileCounter

from vdiff.attention import use_backend
from vdiff.first_stages import AutoencoderKL, DiagonalGaussian, IdentityFirstStage
from vdiff.first_stages.tiles import ramp, starts, tiled
from vdiff.process import RowKeys
from vdiff.registry import build

TINY = dict(channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(**options):
    return AutoencoderKL(**(TINY | options)).eval()


# --- layout --------------------------------------------------------------------------------------


def test_the_state_dict_is_that_of_stable_diffusion():
    """The digest is of the published model's sorted lines "name shape"."""
    with torch.device("meta"):
        model = AutoencoderKL()
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    assert len(lines) == 248 and sum(v.numel() for v in model.parameters()) == 83_653_863
    assert sum(p.numel() for p in model.encoder.parameters()) == 34_163_592
    assert {
        "encoder.down.1.block.0.nin_shortcut.weight (256, 128, 1, 1)",
        "decoder.up.3.upsample.conv.weight (512, 512, 3, 3)",
        "decoder.mid.attn_1.proj_out.weight (512, 512, 1, 1)",
        "quant_conv.weight (8, 8, 1, 1)",
    } <= set(lines)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "50f3b11a29b7157160b560d7d5f6efb72f882aec8c53fda4aeb592ed800e4e5f"


@pytest.mark.parametrize(
    "options, shape, attends",
    [
        (dict(channel_mult=(1, 2, 4), latent_channels=3), (3, 64, 64), 1),
        (dict(channel_mult=(1, 2, 4, 4), mid_attention=False), (4, 32, 32), 0),
        (dict(channel_mult=(1, 1, 2, 2, 4), latent_channels=16, attention_factors=(16,)), (16, 16, 16), 3),
        (dict(channel_mult=(1, 1, 2, 2, 4, 4), latent_channels=64, attention_factors=(16, 32)), (64, 8, 8), 5),
    ],
)
def test_f4_to_f32_are_arguments(options, shape, attends):
    with torch.device("meta"):
        model = AutoencoderKL(**options)
    assert model.latent_shape((3, 256, 256)) == shape
    assert sum(getattr(m, "role", "") == "self_attention" for m in model.encoder.modules()) == attends


def test_without_quant_conv_its_keys_are_gone_and_the_code_is_what_the_encoder_says():
    model = tiny(quant_conv=False)
    assert not any("quant" in name for name in model.state_dict())
    x = draw(1, 3, 8, 8)
    assert torch.equal(model.encode(x), model.encoder(x)[:, :4])


# --- the peer's numbers --------------------------------------------------------------------------


def theirs(name, num_levels):
    """The name in diffusers of a weight of ours."""
    half, _, rest = name.partition(".")
    steps = rest.split(".")
    if steps[0] == "down":
        rest = f"down_blocks.{steps[1]}." + ".".join(steps[2:])
    elif steps[0] == "up":
        rest = f"up_blocks.{num_levels - 1 - int(steps[1])}." + ".".join(steps[2:])
    for ours, other in (
        (".block.", ".resnets."), ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."),
        ("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
        ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
        ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"), ("mid.attn_1.", "mid_block.attentions.0.to_"),
        ("norm_out", "conv_norm_out"), ("nin_shortcut", "conv_shortcut"),
    ):  # fmt: skip
        rest = rest.replace(ours, other)
    return f"{half}.{rest}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_says_what_diffusers_says(dtype, tolerance):
    blocks = {f"{w}_block_types": (f"{kind}Block2D",) * 2 for w, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))}
    other = peer("diffusers").AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=16, **blocks
    )
    ours, other = tiny().to(dtype), other.to(dtype).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and biases begin at 1 and 0
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    weights = {theirs(n, 2): v for n, v in ours.state_dict().items()}
    other.load_state_dict({n: v.reshape(shapes[n]) for n, v in weights.items()})
    x, z = draw(2, 3, 16, 16, dtype=dtype), draw(2, 4, 8, 8, dtype=dtype)
    with torch.no_grad():
        posterior, twin = ours.posterior(x), other.encode(x).latent_dist
        pairs = [(posterior.mean, twin.mean), (posterior.log_variance, twin.logvar)]
        pairs += [(posterior.kl(), twin.kl()), (ours.decode(z), other.decode(z).sample)]
    for a, b in pairs:
        assert (a - b).abs().max() < tolerance * b.abs().max()


# --- the Gaussian --------------------------------------------------------------------------------


def test_the_divergence_is_torchs():
    q = DiagonalGaussian.of(draw(3, 8, 4, 4, dtype=torch.float64))
    normal = torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    want = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    assert torch.allclose(q.kl(), want, rtol=1e-12)
    assert DiagonalGaussian(torch.zeros(2, 4), torch.zeros(2, 4)).kl().tolist() == [0, 0]


def test_samples_have_the_mean_and_the_spread_they_claim():
    q = DiagonalGaussian(torch.tensor([[1.5]]), torch.tensor([[math.log(0.25)]]))
    drawn = q.sample(draw(100_000, 1))
    assert drawn.mean().item() == pytest.approx(1.5, abs=0.01) and drawn.std().item() == pytest.approx(0.5, abs=0.01)


def test_extreme_log_variances_are_held_in_bounds():
    q = DiagonalGaussian.of(torch.tensor([[0.0, 0.0, -1e4, 1e4]]))
    assert q.log_variance.tolist() == [[-30, 20]] and q.kl().isfinite().all()


def test_what_is_drawn_in_training_belongs_to_the_row():
    """The row's key decides, not the batch around it; without keys the code is the mean."""
    model, x = tiny(), draw(3, 3, 8, 8)
    keys = RowKeys(seed=1, step=2, keys=(5, 6, 7), position=(0, 1, 2), global_size=3)
    alone = RowKeys(seed=1, step=2, keys=(6,), position=(0,), global_size=1)
    with torch.no_grad():
        all_rows, one = model.reconstruct(x, keys), model.reconstruct(x[1:2], alone)
        mean = model.reconstruct(x)
        assert (all_rows.latents[1:2] - one.latents).abs().max() < 1e-5
        assert (all_rows.latents - mean.latents).abs().max() > 0.1
        assert torch.equal(mean.latents, model.encode(x))
        assert torch.allclose(mean.penalties["kl"], model.posterior(x).kl() / (3 * 8 * 8))


@pytest.mark.parametrize("name", ["autoencoder_kl", "temporal_decoder", "autoencoder_kl_cogvideox"])
def test_a_diffusion_model_trains_on_the_mean_or_on_samples_of_the_same_gaussian(name):
    """Drawn anew at every step and by the row's key: mean and spread are the posterior's, scaled and shifted."""
    torch.manual_seed(0)
    options = TINY | {"scale": 0.5, "shift": 0.25, "latent_channels": 4}
    options |= {"time_factor": 2} if name == "autoencoder_kl_cogvideox" else {}
    model = build({"type": name, **options}, "first_stage").eval()
    x = draw(2, 3, 8, 8) if name == "autoencoder_kl" else draw(2, 3, 1, 8, 8)

    def drawn(step, keys=(5, 6), rows=x):
        places = tuple(range(len(keys)))
        return model.encode_for_training(rows, RowKeys(1, step, keys, places, len(keys)))

    with torch.no_grad():
        mean, q = model.encode(x), model.posterior(x)
        assert torch.equal(drawn(0), mean)
        model.trains_on = "sample"
        assert torch.equal(model.encode(x), mean)
        noise = RowKeys(1, 0, (5, 6), (0, 1), 2).normal("posterior", q.mean.shape[1:])
        torch.testing.assert_close(drawn(0), (q.sample(noise) - 0.25) * 0.5)
        torch.testing.assert_close(drawn(0, (6,), x[1:]), drawn(0)[1:], rtol=1e-4, atol=1e-5)
        z = torch.stack([drawn(step) for step in range(100)])
    std = 0.5 * (0.5 * q.log_variance).exp()
    assert ((z.mean(0) - mean) / std).abs().mean() < 0.12  # sqrt(2 / pi / 100) = 0.08 for a Gaussian
    assert (z.std(0) / std).mean().item() == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="trains_on is 'mean' or 'sample'.*got 'mode'"):
        type(model)(**TINY, trains_on="mode")


# --- scale, shapes, videos -----------------------------------------------------------------------


def test_scale_and_shift_move_latents_and_not_pixels():
    plain, moved, x = tiny(), tiny(scale=0.5, shift=0.25), draw(1, 3, 8, 8)
    moved.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.allclose(moved.encode(x), (plain.encode(x) - 0.25) * 0.5)
        assert torch.allclose(moved.decode(moved.encode(x)), plain.decode(plain.encode(x)), atol=1e-5)
        assert torch.allclose(moved.reconstruct(x).pixels, plain.reconstruct(x).pixels, atol=1e-6)
        assert torch.allclose(moved.reconstruct(x).latents, moved.encode(x))


def test_shapes_that_do_not_fit_name_the_nearest_that_do():
    with torch.device("meta"):
        model = AutoencoderKL()
    assert model.latent_shape((3, 256, 320)) == (4, 32, 40)
    assert model.latent_shape((3, 7, 256, 320)) == (4, 7, 32, 40)
    with pytest.raises(ValueError, match="the height 250 is no multiple of 8.*248 and 256"):
        model.latent_shape((3, 250, 256))
    with pytest.raises(ValueError, match=r"the width 4 is no multiple of 8. The nearest that are: 8\."):
        model.latent_shape((3, 64, 4))
    with pytest.raises(ValueError, match=r"a sample is \(3, h, w\) or \(3, f, h, w\), got \(1, 8, 8\)"):
        model.latent_shape((1, 8, 8))
    with pytest.raises(ValueError, match="the height 12 "):
        model.encode(torch.empty(1, 3, 12, 16, device="meta"))
    with pytest.raises(ValueError, match=r"latents are \(B, 4, h, w\)"):
        model.decode(torch.empty(1, 3, 8, 8, device="meta"))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(scale=0.0), "scale must not be 0"),
        (dict(attention_factors=(4,)), "4 is the factor of no level; these levels have: 1, 2"),
        (dict(quant_conv=False, code_channels=8), "leave out code_channels"),
        (dict(tile=9), "multiples of 2 pixels"),
        (dict(tile=8, tile_overlap=8), "smaller than the tile"),
        (dict(max_rows=0), "max_rows must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


@torch.no_grad()
def test_a_video_is_its_frames():
    model, video = tiny(), draw(2, 3, 5, 8, 8)
    latents = model.encode(video)
    assert latents.shape == (2, *model.latent_shape((3, 5, 8, 8)))
    for f in range(5):
        assert torch.allclose(latents[:, :, f], model.encode(video[:, :, f]), atol=1e-5)
        assert torch.allclose(model.decode(latents)[:, :, f], model.decode(latents[:, :, f]), atol=1e-5)


# --- slices and tiles ----------------------------------------------------------------------------


@torch.no_grad()
def test_slices_give_what_the_whole_batch_gives():
    """To rounding: kernels choose their order of sums by the size of the batch."""
    model, x = tiny(), draw(5, 3, 8, 8)
    whole = model.encode(x), model.decode(model.encode(x))
    model.max_rows = 2
    assert (model.encode(x) - whole[0]).abs().max() < 1e-5 and (model.decode(whole[0]) - whole[1]).abs().max() < 1e-5


@torch.no_grad()
def test_a_tile_that_covers_all_is_the_whole_bit_for_bit():
    model, x = tiny(), draw(1, 3, 16, 12)
    whole = model.encode(x)
    pixels = model.decode(whole)
    model.tile = 16
    assert torch.equal(model.encode(x), whole) and torch.equal(model.decode(whole), pixels)


@torch.no_grad()
def test_tiles_of_convolutions_alone_are_exact_away_from_their_edges():
    """Normalisation and attention look at a whole tile; without them a cell sees 12 cells around it. Of 40 cells the
    first 8 lie in the first tile of 32 alone, 24 from its edge."""
    model, x = tiny(mid_attention=False), draw(1, 3, 80, 64)
    for module in list(model.modules()):
        for name in [name for name, child in module.named_children() if isinstance(child, torch.nn.GroupNorm)]:
            setattr(module, name, torch.nn.Identity())
    whole = model.encode(x)
    pixels = model.decode(whole)
    model.tile = 64
    latents, back = model.encode(x), model.decode(whole)
    assert latents.shape == whole.shape and back.shape == pixels.shape
    assert (latents - whole)[..., :8, :].abs().max() < 1e-5 * whole.abs().max() < 10 * (latents - whole).abs().max()
    assert (back - pixels)[..., :16, :].abs().max() < 1e-5 * pixels.abs().max() < 10 * (back - pixels).abs().max()


def test_tiles_of_a_function_without_neighbours_are_exact():
    x = draw(2, 3, 26, 40, dtype=torch.float64)
    calls = []

    def halved(part):
        calls.append(part.shape[-2:])
        return part[..., ::2, ::2] ** 2

    assert torch.allclose(tiled(halved, x, 8, 3, enter=2), halved(x), atol=1e-12)
    assert set(calls[:-1]) == {(16, 16)} and len(calls) - 1 == 2 * 4


@pytest.mark.parametrize("length, side, overlap", [(10, 10, 3), (11, 10, 3), (64, 16, 4), (65, 16, 0), (100, 7, 6)])
def test_tiles_cover_everything_and_overlap_enough(length, side, overlap):
    begins = starts(length, side, overlap)
    assert begins[0] == 0 and begins[-1] + side == max(length, side)
    assert all(0 < b - a <= side - overlap for a, b in zip(begins, begins[1:], strict=False))


def test_the_weights_of_two_neighbours_add_up_to_one_where_they_overlap():
    weight = ramp(16, 4)
    assert (
        torch.allclose(weight[-4:] + weight[:4], torch.ones(4, dtype=torch.float64))
        and weight.min() > 0
        and weight[4:12].eq(1).all()
    )


# --- training and compiling ----------------------------------------------------------------------


def test_recomputed_activations_give_the_same_gradients():
    x, grads = draw(1, 3, 8, 8), []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = AutoencoderKL(**TINY, checkpointing=checkpointing)
        model.reconstruct(x).pixels.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_every_backend_attends_alike():
    model, x = tiny(attention_factors=(2,)), draw(1, 3, 16, 16)
    plain = model.encode(x)
    with use_backend("math"):
        assert (model.encode(x) - plain).abs().max() < 1e-5


def test_one_graph_each_way():
    model = tiny()
    x, z = draw(1, 3, 8, 8), draw(1, 4, 4, 4)
    for function, value in ((model.encode, x), (model.decode, z)):
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        assert torch.equal(compiled(value), function(value)) and counter.frame_count == 1


@torch.no_grad()
def test_in_bfloat16_it_says_nearly_the_same():
    """8 bits of mantissa through some twenty layers."""
    model, x = tiny(), draw(1, 3, 8, 8)
    plain = model.decode(model.encode(x))
    model.bfloat16()
    low = model.decode(model.encode(x.bfloat16()))
    assert low.dtype == torch.bfloat16 and (low - plain).abs().max() < 0.05 * plain.abs().max()


def test_it_is_built_from_a_config():
    model = build({"type": "autoencoder_kl", **TINY, "channel_mult": [1, 2], "scale": 0.18215}, "first_stage")
    assert isinstance(model, AutoencoderKL) and model.scale == 0.18215 and model.factor == 2
    assert model.pixel_range == IdentityFirstStage().pixel_range
