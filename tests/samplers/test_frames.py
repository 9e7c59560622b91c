"""Levels that differ by frame: every frame walks as if it were alone, and rests without being touched."""

import functools
import math

import pytest
import torch
from every_sampler import make, names
from walks import Counter, Idle

from vdiff.denoisers import Denoiser, GaussianDenoiser, VDenoiser
from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    KarrasDiscretizer,
    KnownFramesDiscretizer,
    Prediction,
    PyramidDiscretizer,
    RollingDiscretizer,
    X0Parameterization,
    ZeroSNRSchedule,
)
from vdiff.registry import build
from vdiff.samplers import (
    BrownianNoiseSource,
    CFGGuider,
    DDIMSampler,
    DPMpp2MSampler,
    DPMpp2MSDESampler,
    HeunSampler,
    NoiseSource,
    RestartInterval,
    RestartSampler,
    UniPCSampler,
)

SCHEDULES = {"edm": EDMSchedule(), "cosine": CosineSchedule(), "flow": FlowSchedule(shift=3.0)}
# Not restart, whose levels rise, nor auto, which picks its solver by the steps of the whole walk.
NAMES = [name for name in names() if name not in ("restart", "auto")]

# Ratios by level and frame: together, then behind by one, two steps at once, a wait in the middle, clean throughout.
RATIOS = [
    [40.0, 40.0, 40.0, 40.0, 0.0],
    [9.0, 40.0, 40.0, 9.0, 0.0],
    [2.0, 9.0, 40.0, 9.0, 0.0],
    [0.5, 2.0, 5.0, 9.0, 0.0],
    [0.1, 0.5, 1.0, 2.0, 0.0],
    [0.0, 0.1, 0.2, 0.5, 0.0],
    [0.0, 0.0, 0.0, 0.1, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
]


class Constant(NoiseSource, name="constant_for_these_tests"):
    """The same noise for every draw, so that frames that draw at other calls draw alike."""

    def bind(self, seeds, like):
        noise = torch.randn(2, 3, 5, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return lambda number: noise if like.ndim == 5 else noise[:, :, self.frame]


def own(frame):
    """The levels at which a frame moves."""
    column = [row[frame] for row in RATIOS]
    return [r for i, r in enumerate(column) if not i or r != column[i - 1]]


def video(seed=0):
    return torch.randn(2, 3, 5, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("name", NAMES)
def test_every_frame_walks_as_if_it_were_alone(name, schedule):
    oracle, noise, x0 = GaussianDenoiser(0.2, 0.6), video(), video(1)
    source = Constant()
    together = make(name, len(RATIOS) - 1, discretizer=ExplicitDiscretizer(RATIOS), noise_source=source)
    got = together(oracle, schedule, noise, seeds=[0, 1], x0=x0)
    for frame in range(4):
        source.frame = frame
        ratios = own(frame)
        alone = make(name, len(ratios) - 1, discretizer=ExplicitDiscretizer(ratios), noise_source=source)
        want = alone(oracle, schedule, noise[:, :, frame], seeds=[0, 1], x0=x0[:, :, frame])
        scale = want.abs().max().clamp(min=1)
        assert (got[:, :, frame] - want).abs().max() < 1e-12 * scale, frame
    assert torch.equal(got[:, :, 4], x0[:, :, 4])  # a frame that is clean is not touched


def test_frames_of_the_same_levels_are_the_walk_of_all():
    for solver in (DPMpp2MSampler, HeunSampler, DPMpp2MSDESampler):
        for init in ("sigma", "vp", 0.5):
            together = solver(6, discretizer=PyramidDiscretizer(5, delay=0, discretizer=KarrasDiscretizer()), init=init)
            plain = solver(6, discretizer=KarrasDiscretizer(), init=init)
            oracle, noise = GaussianDenoiser(0.2, 0.6), video()
            got, want = (s(oracle, EDMSchedule(), noise, seeds=[0, 1]) for s in (together, plain))
            assert (got - want).abs().max() < 1e-12


def test_each_frame_reads_its_own_stretches_of_the_brownian_path():
    """The walk of a frame hardly changes when others set out at other times."""
    oracle, noise = GaussianDenoiser(0.2, 0.6), video()
    own, source = KarrasDiscretizer(sigma_max=20.0), BrownianNoiseSource()
    ends = {}
    for delay, num in ((0, 40), (3, 52)):
        sampler = DPMpp2MSDESampler(num, discretizer=PyramidDiscretizer(5, delay, own), noise_source=source)
        ends[delay] = sampler(oracle, EDMSchedule(), noise, seeds=[0, 1])
    assert (ends[0] - ends[3]).abs().max() < 1e-12


class Neighbourly(Denoiser, name="neighbourly_for_these_tests"):
    """What a frame is depends on the frame before it, as a video network's answer does."""

    language = X0Parameterization()

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, x_t, level, cond=None):
        assert level.t.shape == (len(x_t), x_t.shape[2])
        self.told.append(level)
        alpha, sigma = level.alpha[:, None, :, None, None], level.sigma[:, None, :, None, None]
        own = alpha * x_t / (alpha**2 + sigma**2)
        return Prediction(self.language, own + 0.1 * own.roll(1, 2), x_t, level)


def test_the_denoiser_is_told_the_level_of_every_frame():
    denoiser, sampler = Neighbourly(), DDIMSampler(7, discretizer=PyramidDiscretizer(5, 1))
    sampler(denoiser, FlowSchedule(), video())
    told = torch.stack([level.t[0] for level in denoiser.told])
    want = torch.tensor([[1 - max(0, min(i - f, 3)) / 3 for f in range(5)] for i in range(7)], dtype=torch.float64)
    assert torch.allclose(told, want)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_keeps_frames_apart(batched):
    """With a null that says the same, guided is plain."""
    from vdiff.process import Conditioning

    cond = Conditioning({"vector": torch.zeros(2, 1)}, null=Conditioning({"vector": torch.zeros(2, 1)}))
    sampler = DPMpp2MSampler(7, discretizer=PyramidDiscretizer(5, 1))
    plain = sampler(Neighbourly(), FlowSchedule(), video(), cond)
    guided = sampler(Neighbourly(), FlowSchedule(), video(), cond, guider=CFGGuider(4.0, batched))
    assert (plain - guided).abs().max() < 1e-12


@functools.cache
def _fine():
    return HeunSampler(480, discretizer=_straight(480))(Neighbourly(), FlowSchedule(), video())


@pytest.mark.parametrize("solver", [DDIMSampler, HeunSampler, DPMpp2MSampler, UniPCSampler])
def test_a_pyramid_of_many_steps_is_of_one_mind_whatever_the_solver(solver):
    """Frames that depend on each other have a flow too: the one that the levels by frame describe."""
    errors = [
        (solver(n, discretizer=_straight(n))(Neighbourly(), FlowSchedule(), video()) - _fine()).abs().max().item()
        for n in (60, 120)
    ]
    # Of first order at least, from an error of a tenth of the data's spread at most.
    assert errors[0] < 0.1 and errors[0] / errors[1] > 1.8


def _straight(num_steps):
    """The second half of the frames is behind, and all end before data."""
    left = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:, None]
    return ExplicitDiscretizer(times=(0.05 + left * torch.tensor([0.6, 0.7, 0.75, 0.8, 0.9])).tolist())


def test_a_pyramid_is_a_few_kernels_and_reads_nothing():
    start = torch.randn(2, 3, 5, 2, 2)
    run = DPMpp2MSampler(50, discretizer=PyramidDiscretizer(5, 2)).bind(Idle(), FlowSchedule(), start)
    with torch.no_grad(), Counter() as counter:
        run(start)
    assert not [name for name in counter.names if "_local_scalar_dense" in name or "is_nonzero" in name]
    assert len(counter.names) / 50 <= 6  # three for the state, up to three for a history that some frames keep


def test_a_pyramid_is_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, start = CompileCounter(), torch.randn(2, 3, 5, 2, 2)
    walk = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    for schedule in (FlowSchedule(), FlowSchedule(shift=3.0), CosineSchedule()):
        run = DPMpp2MSampler(7, discretizer=PyramidDiscretizer(5, 1)).bind(Idle(), schedule, start)
        with torch.no_grad():
            assert (walk(run, start) - run(start)).abs().max() < 1e-5
    assert counter.frame_count == 1


def test_known_frames_stay_and_the_others_are_sampled():
    levels = KnownFramesDiscretizer(known=[0, -1], num_frames=5)
    x0, oracle = video(1), GaussianDenoiser(0.2, 0.6)
    out = DPMpp2MSampler(6, discretizer=levels)(oracle, ZeroSNRSchedule(), video(), x0=x0)
    assert torch.equal(out[:, :, [0, 4]], x0[:, :, [0, 4]])
    plain = DPMpp2MSampler(6)(oracle, ZeroSNRSchedule(), video())
    assert (out - plain)[:, :, 1:4].abs().max() < 1e-12
    with pytest.raises(ValueError, match="begins at data .*x0="):
        DPMpp2MSampler(6, discretizer=levels)(oracle, ZeroSNRSchedule(), video())


def test_a_rolling_window_goes_on_where_it_stopped():
    levels = RollingDiscretizer(5).levels(FlowSchedule(), 4)
    assert torch.allclose(levels.t[-1, 1:], levels.t[0, :-1]) and levels.t[-1, 0] == 0 and levels.t[0, -1] == 1
    rows = RollingDiscretizer(3)(ZeroSNRSchedule(), 7).t * 1000
    assert torch.allclose(rows, rows.round())


def test_networks_that_are_told_the_logarithm_need_levels_short_of_data():
    network = torch.nn.Identity()
    denoiser = VDenoiser(network, c_noise="log_sigma")
    denoiser.network.forward = lambda x, c_noise, cond: x
    pyramid = functools.partial(PyramidDiscretizer, 5, 1)
    with pytest.raises(ValueError, match="cannot be told pure noise or pure data"):
        DDIMSampler(7, discretizer=pyramid())(denoiser, EDMSchedule(), video())
    short = pyramid(discretizer=KarrasDiscretizer(denoise=False))
    assert torch.isfinite(DDIMSampler(7, discretizer=short)(denoiser, EDMSchedule(), video())).all()


def test_impossible_frames_are_errors():
    with pytest.raises(ValueError, match="levels of 4 frames for samples of shape"):
        DDIMSampler(7, discretizer=PyramidDiscretizer(4, 1))(Neighbourly(), FlowSchedule(), video())
    with pytest.raises(ValueError, match="sets out after 8 steps"):
        DDIMSampler(8, discretizer=PyramidDiscretizer(5, 2))(Neighbourly(), FlowSchedule(), video())
    with pytest.raises(ValueError, match="some frames of 5"):
        KnownFramesDiscretizer([5], 5)
    with pytest.raises(ValueError, match="falling"):
        ExplicitDiscretizer(times=[[1.0, 0.5], [0.5, 0.6]])


def test_a_restart_is_of_all_frames():
    inner = DDIMSampler(7, discretizer=PyramidDiscretizer(5, 1))
    with pytest.raises(ValueError, match="cannot differ by frame"):
        RestartSampler(inner, [RestartInterval(0.1, 1.0)])(Neighbourly(), FlowSchedule(), video(), seeds=[0, 1])


def test_they_are_written_in_a_config():
    built = build({"type": "pyramid", "num_frames": 3, "delay": 2, "discretizer": {"type": "karras"}}, "discretizer")
    assert built(EDMSchedule(), 6).t.shape == (7, 3)
    explicit = build({"type": "explicit", "times": [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]}, "discretizer")
    assert explicit.num_steps == 2 and explicit(FlowSchedule(), 2).t.tolist() == [[1, 1], [0, 1], [0, 0]]
    rolling = build({"type": "known_frames", "known": [0], "num_frames": 2}, "discretizer")
    assert math.isinf(rolling(FlowSchedule(), 2).ratio[0, 1]) and rolling(FlowSchedule(), 2).t[:, 0].tolist() == [0] * 3
