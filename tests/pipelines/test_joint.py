"""Two Gaussians that belong together, sampled by their exact denoiser: together, apart, and one given the other."""

import pytest
import torch

from vdiff.conditioners import EmbedderConditioner
from vdiff.data.collate import collate
from vdiff.denoisers import Denoiser
from vdiff.engine import DiffusionEngine
from vdiff.first_stages import IdentityFirstStage
from vdiff.losses import MSELoss
from vdiff.pipelines import complete, sample_pairs, streams_of
from vdiff.process import Conditioning, EDMSchedule, LogNormalSigmaSampler, Prediction, X0Parameterization, spread
from vdiff.registry import isolated
from vdiff.samplers import CFGGuider, HeunSampler, JointGuider, RescaleGuider

RHO = 0.8

with isolated():

    class Couple(Denoiser):
        """Pixels of unit variance, correlated by RHO with those of the partner, whatever the levels of the two."""

        language = X0Parameterization()

        def forward(self, x_t, level, cond=None):
            z, r2 = x_t / spread(level.alpha, x_t), spread(level.ratio, x_t) ** 2
            alone = z / (1 + r2)
            if cond is None or cond.partners is None:
                return Prediction(self.language, alone, x_t, level)
            other, other_r2 = z[cond.partners], r2[cond.partners]
            together = ((1 + other_r2 - RHO**2) * z + RHO * r2 * other) / ((1 + r2) * (1 + other_r2) - RHO**2)
            gate = cond.gates.get("joint_attention", torch.ones(len(x_t)))
            return Prediction(self.language, torch.lerp(alone, together, spread(gate.to(x_t), x_t)), x_t, level)


def engine(**options):
    parts = {
        "input_key": "image",
        "denoiser": Couple(),
        "schedule": EDMSchedule(),
        "sigma_sampler": LogNormalSigmaSampler(-0.6, 1.2),
        "loss": MSELoss(),
        "sampler": HeunSampler(12),
        "first_stage": IdentityFirstStage(scale=2.0, shift=0.5, pixel_range=(0.0, 1.0)),
        "sample_shape": (1, 8, 8),
    }
    return DiffusionEngine(**(parts | options))


def latents(pixels):
    return (pixels - 0.5) * 2


def correlation(pairs):
    return torch.corrcoef(torch.stack([pairs[:, 0].flatten(), pairs[:, 1].flatten()]))[0, 1].item()


# 64 pairs of 64 pixels: an estimate of a correlation of 0.8 is off by (1 - 0.8^2) / 64 = 0.006, of 0 by 0.016; thrice.
def test_pairs_made_together_belong_together_as_much_as_their_weight():
    fine = HeunSampler(40)  # twelve steps are off by more than the draws
    assert correlation(sample_pairs(engine(), num=64, sampler=fine)) == pytest.approx(RHO, abs=0.02)
    weights = torch.arange(64) % 2
    pairs = sample_pairs(engine(), num=64, weights=weights, sampler=fine)
    assert correlation(pairs[1::2]) == pytest.approx(RHO, abs=0.03)
    assert correlation(pairs[::2]) == pytest.approx(0.0, abs=0.07)
    assert pairs.shape == (64, 2, 1, 8, 8) and latents(pairs).std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("stream", [0, 1])
def test_a_stream_made_for_a_given_one_has_the_exact_conditional_distribution(stream):
    """Mean RHO times the given, variance 1 - RHO^2; it is held with 3 % of noise, which moves neither by 0.01."""
    given = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    pairs = complete(engine(), {stream: given}, sampler=HeunSampler(40))
    assert torch.equal(pairs[:, stream], given)
    known, made = latents(given).flatten(), latents(pairs[:, 1 - stream]).flatten()
    assert ((known * made).mean() / known.square().mean()).item() == pytest.approx(RHO, abs=0.03)
    assert (made - RHO * known).std().item() == pytest.approx((1 - RHO**2) ** 0.5, abs=0.03)


def test_walking_along_tells_less_than_being_held():
    given = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    held, along = (correlation(complete(engine(), {0: given}, how=how)) for how in ("held", "along"))
    assert 0.1 < along < held


def test_the_first_stream_begins_as_a_sample_of_its_own():
    alone = engine().sample(num=2, seeds=5)
    apart = sample_pairs(engine(), num=2, seeds=5, weights=torch.zeros(2))
    torch.testing.assert_close(apart[:, 0], alone)
    assert not torch.equal(apart[:, 0], apart[:, 1])


def test_a_pair_depends_on_its_own_seed_alone():
    both = sample_pairs(engine(), num=2, seeds=[3, 9])
    torch.testing.assert_close(both[1:], sample_pairs(engine(), num=1, seeds=9))
    given = torch.rand(2, 1, 8, 8)
    both = complete(engine(), {1: given}, seeds=[3, 9])
    torch.testing.assert_close(both[1:], complete(engine(), {1: given[1:]}, seeds=9))


def test_rows_are_laid_out_as_collation_does():
    for streams in (2, 3):
        groups = [[{"label": label, "name": str(label), "stream": s} for s in range(streams)] for label in (4, 7)]
        batch = collate(groups)
        rows = streams_of({"label": torch.tensor([4, 7]), "name": ["4", "7"]}, streams)
        assert rows["name"] == batch["name"]
        assert all(torch.equal(rows[name], batch[name]) for name in ("label", "stream", "partner"))
    assert collate([[{"x": 0, "stream": 1}], [{"x": 0, "stream": 1}]])["partner"].tolist() == [-1, -1]  # alone


@pytest.mark.parametrize("guider", [JointGuider(1.0), JointGuider([1.0] * 8), JointGuider(3.0, lo=100.0)])
def test_a_joint_scale_of_one_is_the_plain_walk_to_the_bit(guider):
    assert torch.equal(sample_pairs(engine(), num=4, guider=guider), sample_pairs(engine(), num=4))


@pytest.mark.parametrize("batched", [True, False])
def test_joint_guidance_is_apart_plus_scale_times_the_difference(batched):
    """The oracle is linear in its gate, so a scale is a weight; also around other guiders."""
    weights = torch.tensor([0.5, 1.5, 1.5, 1.0])
    scales = weights.repeat_interleave(2).tolist()
    inside = CFGGuider(1.0, batched)
    guided = sample_pairs(engine(), num=4, guider=JointGuider(scales, guider=inside))
    torch.testing.assert_close(guided, sample_pairs(engine(), num=4, weights=weights), rtol=1e-4, atol=1e-4)
    around = sample_pairs(engine(), num=4, guider=RescaleGuider(guider=JointGuider(scales, guider=inside), phi=0.0))
    torch.testing.assert_close(around, guided)


def test_an_engine_whose_gates_know_three_streams_makes_no_two():
    """In silence the third would be missing, and the second look at the first, which it never did in training."""
    three = engine(conditioner=EmbedderConditioner(gates={"joint_attention": {"stream": [0, 1, 2]}}))
    given = torch.zeros(2, 1, 8, 8)
    for make in (lambda **said: complete(three, {0: given}, **said), lambda **said: sample_pairs(three, num=2, **said)):
        with pytest.raises(ValueError, match="'joint_attention' knows stream 2, and 2 streams .*: say streams=3"):
            make()
        assert make(streams=3).shape == (2, 3, 1, 8, 8)


def test_what_does_not_make_groups_is_an_error():
    given = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="label 3, num 2"):
        sample_pairs(engine(), {"label": [1, 2, 3]}, num=2)
    with pytest.raises(ValueError, match="of 4 rows without partners"):
        sample_pairs(engine(), Conditioning({"label": torch.zeros(4)}))
    with pytest.raises(ValueError, match="3 seeds for 2 groups"):
        sample_pairs(engine(), num=2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 2 groups"):
        sample_pairs(engine(), num=2, weights=torch.ones(3))
    for streams in ({}, {0: given, 1: given}, {2: given}):
        with pytest.raises(ValueError, match="leave at least one to be made"):
            complete(engine(), streams)
    with pytest.raises(ValueError, match=r"stream 2 is \(2, 1, 4, 4\) and stream 0 \(2, 1, 8, 8\)"):
        complete(engine(), {0: given, 2: torch.zeros(2, 1, 4, 4)}, streams=3)
    with pytest.raises(ValueError, match="held' or 'along', got 'clean'"):
        complete(engine(), {0: given}, how="clean")
    told = Conditioning(partners=torch.tensor([1, 0, 7, 2]))
    with pytest.raises(ValueError, match="the partner of row 2 is 7"):
        sample_pairs(engine(), told)
