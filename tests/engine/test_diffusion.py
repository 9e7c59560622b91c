"""The engine: two sentences, whose randomness belongs to rows and whose parts know nothing of each other."""

import copy
import math
import pickle

import pytest
import torch

from vdiff.conditioners import ClassLabelEmbedder, EmbedderConditioner
from vdiff.data import Digits, Loader
from vdiff.denoisers import EDMDenoiser, EpsilonDenoiser, GaussianDenoiser, VDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import AutoencoderKL
from vdiff.hooks import is_port_key
from vdiff.losses import MSELoss
from vdiff.mixins import LoRA, RefModel
from vdiff.networks import UNet
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    LogNormalSigmaSampler,
    RowKeys,
    StratifiedSigmaSampler,
    UndefinedParameterizationError,
    UniformIndexSigmaSampler,
    UniformSigmaSampler,
    ZeroSNRSchedule,
)
from vdiff.samplers import CFGGuider, DDIMSampler, EulerAncestralSampler, EulerSampler, HeunSampler


def network(**options):
    return UNet(
        in_channels=1, out_channels=1, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,),
        num_heads=2, num_classes="sequential", vector_dim=8, norm_groups=8, **options,
    )  # fmt: skip


def shaken(engine):
    """Zero-initialised layers of the network would hide what a test looks for."""
    g = torch.Generator().manual_seed(1)
    for name, p in engine.named_parameters():
        if p.abs().max() == 0 and not is_port_key(name):
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return engine


def make(**options):
    parts = {
        "input_key": "image",
        "denoiser": EDMDenoiser(network(), sigma_data=0.75),
        "schedule": EDMSchedule(),
        "sigma_sampler": LogNormalSigmaSampler(),
        "loss": MSELoss(),
        "sampler": HeunSampler(3),
        "conditioner": EmbedderConditioner([ClassLabelEmbedder(10, 8, drop=0.3)]),
        "sample_shape": (1, 8, 8),
    }
    return shaken(DiffusionEngine(**(parts | options)))


@pytest.fixture(scope="module")
def loader():
    return Loader(Digits("test"), 8, seed=3)


def rows(batch, some):
    index = torch.tensor(some)
    return {k: v[index] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}


def test_a_training_step_is_one_loss_per_row(loader):
    engine = make()
    values = engine(loader.batch(0))
    assert values.per_row.shape == (8,) and values.per_row.dtype == torch.float32
    values.per_row.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in engine.parameters())


def test_the_loss_at_the_start_is_that_of_saying_nothing(loader):
    """An untrained EDM network says 0, and its target has unit variance by construction."""
    engine = make()
    for p in engine.denoiser.network.out[-1].parameters():
        torch.nn.init.zeros_(p)
    losses = torch.cat([engine(loader.batch(i)).per_row for i in range(40)])
    assert losses.mean().item() == pytest.approx(1.0, abs=0.1)


def test_a_row_learns_the_same_in_any_batch(loader):
    """Level, noise and drop depend on the row's key: the loss of a row alone is its loss among others."""
    engine, batch = make().train(), loader.batch(0)
    whole = engine(batch).per_row
    for i in (0, 5):
        assert torch.allclose(engine(rows(batch, [i])).per_row, whole[i : i + 1], rtol=1e-4)


def test_levels_and_noise_of_a_row_are_bitwise_those_of_its_key(loader):
    engine, batch = make(), loader.batch(2)
    level, noise = engine.draw(batch["image"], batch)
    part, part_noise = engine.draw(batch["image"][[6, 1]], rows(batch, [6, 1]))
    assert torch.equal(noise[[6, 1]], part_noise) and torch.equal(level.sigma[[6, 1]], part.sigma)
    again = loader.batch(2) | {"step": 3}
    assert not torch.equal(engine.draw(batch["image"], again)[1], noise)


def test_a_pair_shares_level_and_noise_and_two_streams_do_not(loader):
    engine, batch = make(sigma_sampler=StratifiedSigmaSampler(LogNormalSigmaSampler())), loader.batch(0)
    pair = rows(batch, [0, 0, 1, 1])
    level, noise = engine.draw(pair["image"], pair)
    assert torch.equal(level.sigma[0], level.sigma[1]) and torch.equal(noise[0], noise[1])
    streams = pair | {"noise_key": torch.tensor([10, 11, 12, 13])}
    level, noise = engine.draw(pair["image"], streams)
    assert not torch.equal(level.sigma[0], level.sigma[1]) and not torch.equal(noise[0], noise[1])


def test_training_does_not_touch_global_randomness(loader):
    engine = make().train()
    state = torch.get_rng_state()
    engine(loader.batch(0))
    engine.sample({"label": [1, 2]})
    assert torch.equal(torch.get_rng_state(), state)


def test_offset_noise_shifts_whole_channels(loader):
    plain, batch = make(), loader.batch(0)
    offset = make(offset_noise=0.5)
    difference = offset.draw(batch["image"], batch)[1] - plain.draw(batch["image"], batch)[1]
    assert (difference - difference[:, :, :1, :1]).abs().max() < 1e-6 and difference.std() > 0.1


@pytest.mark.parametrize("sampler", [HeunSampler(3), DDIMSampler(3), EulerAncestralSampler(3)])
def test_a_sample_belongs_to_its_seed_and_label(sampler):
    """To rounding of the network's own kernels, which work on whole batches."""
    engine = make(sampler=sampler)
    whole = engine.sample({"label": [0, 1, 2, 3]}, seeds=[4, 5, 6, 7])
    alone = engine.sample({"label": [2]}, seeds=6)
    assert (whole[2:3] - alone).abs().max() < 1e-5 * whole.abs().max()
    assert torch.equal(whole, engine.sample({"label": [0, 1, 2, 3]}, seeds=4))
    assert (whole[:1] - engine.sample({"label": [0]}, seeds=5)).abs().max() > 1e-2


def test_sampling_leaves_the_engine_as_it_was():
    engine = make().train()
    before = {k: v.clone() for k, v in engine.state_dict().items()}
    engine.conditioner.embedders.eval()  # a frozen part of a training engine
    modes = [m.training for m in engine.modules()]
    out = engine.sample({"label": [1]}, guider=CFGGuider(2.0), progress=True)
    assert [m.training for m in engine.modules()] == modes and True in modes and not out.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())


def test_guidance_moves_samples():
    engine = make()
    a, b = (engine.sample({"label": [1, 2]}, guider=CFGGuider(s)) for s in (1.0, 4.0))
    assert torch.equal(a, engine.sample({"label": [1, 2]})) and (a - b).abs().max() > 1e-3


def test_an_engine_with_an_exact_denoiser_draws_its_distribution():
    """The whole walk, end to end: mean and spread of what comes out are those of the data."""
    engine = make(
        denoiser=GaussianDenoiser(0.3, 0.5), schedule=CosineSchedule(), sampler=DDIMSampler(100), conditioner=None
    )
    out = engine.sample(num=400, shape=(1, 4, 4))
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.03)


def test_wrong_requests_say_what_is_wrong():
    engine = make(sample_shape=None)
    with pytest.raises(ValueError, match="sample_shape"):
        engine.sample({"label": [1]})
    with pytest.raises(ValueError, match="must agree: num 3, conditions 2"):
        engine.sample({"label": [1, 2]}, (1, 8, 8), num=3)
    with pytest.raises(ValueError, match="must agree: conditions 2, seeds 3"):
        engine.sample({"label": [1, 2]}, (1, 8, 8), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="at least one, and must agree: num 0"):
        engine.sample({"label": [1]}, (1, 8, 8), num=0)
    with pytest.raises(ValueError, match="one class per row"):
        engine.sample({"label": 7}, (1, 8, 8))
    with pytest.raises(KeyError, match="noise_key"):
        engine({"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2)})


def test_epsilon_on_a_zero_snr_table_is_refused_at_construction():
    with pytest.raises(UndefinedParameterizationError, match="ZeroSNRSchedule.*epsilon"):
        make(denoiser=EpsilonDenoiser(network()), schedule=ZeroSNRSchedule(), sigma_sampler=UniformIndexSigmaSampler())
    make(denoiser=VDenoiser(network()), schedule=ZeroSNRSchedule(), sigma_sampler=UniformSigmaSampler())


def test_a_network_must_count_in_the_rows_of_the_schedule():
    with pytest.raises(ValueError, match="Set denoiser.num_rows to 100"):
        make(denoiser=VDenoiser(network()), schedule=ZeroSNRSchedule(num_rows=100))
    make(denoiser=VDenoiser(network(), num_rows=100), schedule=ZeroSNRSchedule(num_rows=100))
    make(denoiser=VDenoiser(network(), c_noise="time"), schedule=ZeroSNRSchedule(num_rows=100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_noise_is_not_rounded_to_the_type_of_the_data(dtype, loader):
    engine, batch = make(), loader.batch(0)
    level, noise = engine.draw(batch["image"].to(dtype), batch)
    assert torch.equal(noise, engine.draw(batch["image"], batch)[1]) and noise.dtype == torch.float32


def test_an_engine_is_where_its_buffers_are():
    assert make(denoiser=GaussianDenoiser(), conditioner=None).to("meta").device.type == "meta"


@pytest.mark.gpu
def test_drawing_and_dropping_do_not_wait_for_the_device(loader):
    engine, batch = make().cuda().train(), loader.batch(0)
    batch = batch | {name: batch[name].cuda() for name in ("image", "label")}

    def step():
        return engine.draw(batch["image"], batch), engine.conditioner(batch)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_are_independent(copier):
    engine = make(mixins={"lora": LoRA(rank=2, on="*.qkv")})
    twin = copier(engine)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert (engine.sample({"label": [1]}) - twin.sample({"label": [1]})).abs().max() > 0


# Mixins through the engine ------------------------------------------------------------------------


def test_mixins_attach_in_order_and_come_off_bit_for_bit(loader):
    plain = make()
    want = plain.sample({"label": [1, 2]})
    keys = list(plain.state_dict())
    lora = LoRA(rank=2, on="*.qkv").attach(plain)
    with torch.no_grad():
        for p in lora.parameters():
            p.add_(0.3)
    assert (plain.sample({"label": [1, 2]}) - want).abs().max() > 1e-4
    assert [k for k in plain.state_dict() if k in keys] == keys
    lora.detach()
    assert torch.equal(plain.sample({"label": [1, 2]}), want) and list(plain.state_dict()) == keys


def test_a_copy_of_conditions_that_need_no_first_stage_holds_none():
    engine = make(first_stage=AutoencoderKL(1, channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4))
    before = len(pickle.dumps(make().conditioner))
    assert len(pickle.dumps(engine.conditioner)) == before


@pytest.mark.parametrize("trains_on", ["mean", "sample"])
def test_it_trains_on_what_the_first_stage_says(trains_on):
    """And a preference pair, whose rows have one key, on one draw of noise."""
    sizes = dict(channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4, latent_channels=1)
    engine = make(first_stage=AutoencoderKL(1, **sizes, trains_on=trains_on))
    batch = Loader(Digits("train"), 4).batch(0)
    pixels = batch["image"]
    with torch.no_grad():
        posterior = engine.first_stage.posterior(pixels)
        x0 = posterior.mean if trains_on == "mean" else posterior.drawn(RowKeys.of(batch))
        level, noise = engine.draw(x0, batch)
        expected = engine.loss(
            engine.denoiser(level.mix(x0, noise), level, engine.conditioner(batch)), x0, noise, level, batch
        )
        assert torch.equal(engine(batch).per_row, expected.per_row)
        keys = RowKeys(0, 0, (3, 3), (0, 0), 1)
        twice = engine.first_stage.encode_for_training(pixels[:1].expand(2, -1, -1, -1), keys)
        torch.testing.assert_close(twice[0], twice[1])


def test_dpo_starts_at_ln_2(loader):
    """A reference that is the same weights with mixins off: at step 0 policy and reference agree."""
    engine = make(mixins={"lora": LoRA(rank=2, on="*.qkv"), "ref": RefModel()})
    engine.train().conditioner.requires_grad_(False)
    batch = rows(loader.batch(0), [0, 1, 2, 3])
    pair = batch | {"noise_key": torch.tensor([0, 0, 1, 1]), "position": torch.tensor([0, 0, 1, 1])}

    def dpo(prediction, x0, noise, level, batch):
        truth = prediction.language.value(x0, noise, level)
        gap = [((p.value - truth) ** 2).flatten(1).mean(1) for p in (prediction, prediction.reference)]
        margin = (gap[0] - gap[1])[0::2] - (gap[0] - gap[1])[1::2]
        return -torch.nn.functional.logsigmoid(-2500.0 * margin)

    engine.loss = dpo
    loss = engine(pair)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    loss.mean().backward()
    grads = [p.grad.abs().max() for p in engine.mixins["lora"].parameters() if p.grad is not None]
    assert max(grads) > 0


def test_compiled_with_a_reference_there_are_two_graphs(loader):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    engine = make(mixins={"lora": LoRA(rank=2, on="*.qkv"), "ref": RefModel()})
    engine.conditioner.eval().requires_grad_(False)
    want = engine(loader.batch(0)).per_row
    engine.compile(backend=counter, fullgraph=True)
    for step in range(3):
        got = engine(loader.batch(step)).per_row
        if step == 0:
            assert torch.allclose(got, want, rtol=1e-5)
        got.mean().backward()
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_compiled_engine_trains_and_samples_like_an_eager_one(loader):
    """With torch's own compiler, which needs a C++ compiler on the machine."""
    torch._dynamo.reset()
    engine, batch = make(), loader.batch(0)
    want, samples = engine(batch).per_row, engine.sample({"label": [1, 2]})
    engine.compile()
    got = engine(batch).per_row
    got.mean().backward()
    assert torch.allclose(got, want, rtol=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in engine.parameters())
    assert (engine.sample({"label": [1, 2]}) - samples).abs().max() < 1e-3 * samples.abs().max()


def test_joint_streams_train_together_through_the_engine():
    """Two streams of a group, each with its own level, attend to each other once the projection has learned."""
    from vdiff.data import collate
    from vdiff.mixins import JointAttention

    digits = Digits("test")
    groups = [[digits[i] | {"stream": 0}, digits[i + 4] | {"stream": 1}] for i in range(2)]
    batch = collate(groups, seed=0, step=0)
    assert batch["partner"].tolist() == [1, 0, 3, 2]
    engine = make(mixins={"joint": JointAttention()}).eval()
    level = engine.levels(batch)
    assert level.sigma[0] != level.sigma[1]
    alone = engine({k: v for k, v in batch.items() if k != "partner"}).per_row
    together = engine(batch).per_row
    assert torch.equal(alone, together)  # zero-initialised: nothing yet
    together.mean().backward()
    optimizer = torch.optim.SGD(engine.mixins["joint"].parameters(), lr=100.0)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in engine.mixins["joint"].parameters())
    optimizer.step()
    other = batch | {"partner": torch.tensor([2, 3, 0, 1])}
    assert not torch.allclose(engine(batch).per_row, engine(other).per_row)
    sampled = engine.sample({"label": [1, 2], "partner": torch.tensor([1, 0])}, guider=CFGGuider(2.0))
    assert (sampled - engine.sample({"label": [1, 2]}, guider=CFGGuider(2.0))).abs().max() > 0


def test_a_negative_takes_the_place_of_the_null():
    engine, guider = make(), CFGGuider(3.0)
    plain = engine.sample({"label": [1, 2]}, guider=guider)
    away = engine.sample({"label": [1, 2]}, negative={"label": [5, 5]}, guider=guider)
    by_hand = (
        engine.eval()
        .conditioner({"label": torch.tensor([1, 2])})
        .with_null(engine.conditioner({"label": torch.tensor([5, 5])}).with_(null=None))
    )
    assert torch.equal(away, engine.sample(by_hand, guider=guider)) and not torch.allclose(away, plain)


def test_a_name_and_a_scale_do_for_a_sampler_and_a_guider():
    engine, label = make(), {"label": [3, 4]}
    by_name = engine.sample(label, sampler="euler", guider=2.0)
    assert torch.equal(by_name, engine.sample(label, sampler=EulerSampler(), guider=CFGGuider(2.0)))
    with pytest.raises(ValueError, match="no sampler is called 'eulr'. Did you mean 'euler'"):
        engine.sample(label, sampler="eulr")


def test_a_negative_without_guidance_is_refused():
    engine = make()
    with pytest.raises(ValueError, match="guider asks for none"):
        engine.sample({"label": [3]}, negative={"label": [4]})
    assert engine.sample({"label": [3]}, negative={"label": [4]}, guider=1.5).shape == (1, 1, 8, 8)


def test_a_misspelt_field_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="Did you mean 'lable'"):
        make().sample({"lable": [3]})
