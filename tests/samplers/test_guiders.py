"""Guiders nest, ask no more than they need, and know neither the batch nor the last run."""

import pytest
import torch
from guided_walks import SHAPE, Told, conditions, guided, said, start, walk
from walks import Counter

from vdiff.process import Conditioning, EDMSchedule, ExplicitDiscretizer, FlowSchedule, Prediction, VParameterization
from vdiff.registry import build, isolated
from vdiff.samplers import (
    APGGuider,
    AutoguidanceGuider,
    CFGGuider,
    CFGPPGuider,
    CFGZeroStarGuider,
    DDIMSampler,
    DPMpp2MSampler,
    DynamicCFGGuider,
    DynamicThresholdGuider,
    EulerAncestralSampler,
    Guider,
    HeunSampler,
    IntervalGuider,
    LinearGuider,
    MultiCFGGuider,
    NoneGuider,
    RescaleGuider,
    SpatiotemporalGuider,
    TrapezoidGuider,
    TriangleGuider,
    WrappingGuider,
    X0ScaleGuider,
)

TWO = {"image": 1.5, "vector": 3.0}


def everyone():
    """Every guider, each doing something."""
    mixed = AutoguidanceGuider(Told(std=0.5), 1.5, CFGGuider(2.0))
    return {
        "none": NoneGuider(),
        "cfg": CFGGuider(2.5),
        "cfg by sample": CFGGuider([1.0, 2.0, 3.0, 4.0]),
        "cfg by frame": CFGGuider([[1.0, 2.0, 3.0]]),
        "nested": MultiCFGGuider(TWO),
        "apart": MultiCFGGuider(TWO, how="apart"),
        "interval": IntervalGuider(0.1, 10.0, CFGGuider(2.5)),
        "rescale": RescaleGuider(0.7, CFGGuider(2.5)),
        "dynamic threshold": DynamicThresholdGuider(0.9, guider=CFGGuider(4.0)),
        "autoguidance": AutoguidanceGuider(Told(std=0.5), 2.0),
        "apg": APGGuider(3.0, eta=0.2, momentum=-0.5, norm_threshold=2.0),
        "cfg_pp": CFGPPGuider(0.6),
        "cfg_zero_star": CFGZeroStarGuider(3.0),
        "x0_scale": X0ScaleGuider(guider=CFGGuider(2.0)),
        "linear": LinearGuider(3.0),
        "triangle": TriangleGuider(3.0),
        "trapezoid": TrapezoidGuider(3.0),
        "spatiotemporal": SpatiotemporalGuider(3.0, num_views=3),
        "dynamic_cfg": DynamicCFGGuider(),
        "all of it": RescaleGuider(0.5, IntervalGuider(0.1, 20.0, mixed)),
    }


EVERYONE = list(everyone())


# Identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guider",
    [
        CFGGuider(1.0),
        CFGGuider([1.0] * 4),
        LinearGuider(1.0),
        MultiCFGGuider({"image": 1.0, "vector": 1.0}),
        APGGuider(1.0),
        CFGZeroStarGuider(1.0, num_zero=0),
        DynamicCFGGuider(0.0),
        AutoguidanceGuider(Told(), 1.0),
        IntervalGuider(1e5, 1e6, CFGGuider(7.0)),
        RescaleGuider(0.7, CFGGuider(1.0)),
        RescaleGuider(0.0),
        X0ScaleGuider(last=1.0),
    ],
    ids=lambda g: type(g).__name__,
)
def test_scale_one_is_no_guider_bit_for_bit_and_costs_no_pass(guider):
    denoiser = Told()
    if isinstance(guider, X0ScaleGuider):
        assert (walk(guider, denoiser) - walk(None)).abs().max() < 1e-12  # the noise is carried over with a rounding
    else:
        assert torch.equal(walk(guider, denoiser), walk(None))
    assert denoiser.rows == 4 * 5


def test_a_share_of_nothing_changes_nothing():
    assert torch.equal(walk(RescaleGuider(0.0, CFGGuider(3.0))), walk(CFGGuider(3.0)))
    assert torch.equal(walk(DynamicThresholdGuider(1.0, 1e9, CFGGuider(3.0))), walk(CFGGuider(3.0)))


def test_apg_without_its_parts_is_cfg():
    assert (walk(APGGuider(3.0, eta=1.0)) - walk(CFGGuider(3.0))).abs().max() < 1e-12


def test_a_nested_guider_is_the_same_by_hand():
    """{rescale of {interval of cfg}}: inside the interval rescaled guidance, outside it nothing."""
    tree = {
        "type": "rescale",
        "phi": 0.7,
        "guider": {"type": "interval", "lo": 0.5, "hi": 10.0, "guider": {"type": "cfg", "scale": 6.0}},
    }
    nested = build(tree, "guider")
    for ratio in (20.0, 2.0, 0.2):
        got, plain, null = said(nested, ratio)
        cfg = null.x0 + 6.0 * (plain.x0 - null.x0)
        std = [v.flatten(1).std(1)[:, None, None, None, None] for v in (plain.x0, cfg)]
        want = 0.7 * cfg * std[0] / std[1] + 0.3 * cfg if ratio == 2.0 else plain.x0
        assert (got.x0 - want).abs().max() < 1e-12


def test_a_call_that_asks_the_condition_alone_is_seen_by_those_around():
    """Outside an interval those inside have no say, those around it do."""
    inside = IntervalGuider(0.5, 10.0, X0ScaleGuider(guider=CFGGuider(2.0)))
    around = DynamicThresholdGuider(1.0, 0.01, IntervalGuider(0.5, 10.0, CFGGuider(2.0)))
    got, plain, _ = said(inside, 20.0)
    assert torch.equal(got.value, plain.value) and got.renoise is None
    assert said(around, 20.0)[0].x0.abs().max() < 0.0101


def test_a_guider_of_ones_own_is_a_few_lines():
    with isolated():

        class HalfGuider(WrappingGuider):
            def change(self, guided, answers, number):
                return guided.with_(value=guided.value * 0.5)

        got, plain, null = said(HalfGuider(CFGGuider(3.0)))
        assert (got.x0 - 0.5 * (3 * plain.x0 - 2 * null.x0)).abs().max() < 1e-12
        assert build({"type": "half"}, "guider").guider.plan([]) == []


# What is asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guider, calls, rows",
    [
        (NoneGuider(), 5, 1),
        (CFGGuider(2.0), 5, 2),
        (CFGGuider(2.0, batched=False), 10, 1),
        (MultiCFGGuider(TWO), 5, 3),
        (MultiCFGGuider({"image": 2.0, "vector": 2.0}), 5, 2),  # the middle branch has weight 0
        (CFGPPGuider(0.0), 5, 1),
        (LinearGuider(2.0), 5, 2),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Guider) else str(v),
)
def test_branches_are_asked_once_together_or_one_by_one(guider, calls, rows):
    denoiser = Told()
    walk(guider, denoiser)
    assert denoiser.calls == calls and denoiser.rows == calls * rows * 4


def test_outside_the_interval_no_second_pass_is_asked():
    """lo < sigma / alpha <= hi, whatever the schedule."""
    ratios = [80.0, 10.0, 9.0, 0.5, 0.4]
    for schedule in (EDMSchedule(), FlowSchedule()):
        denoiser = Told()
        run = guided(IntervalGuider(0.5, 10.0, CFGGuider(2.0)), ratios, denoiser, schedule=schedule)
        asked = []
        for call in range(5):
            before = denoiser.rows
            run(start(), call)
            asked.append(denoiser.rows - before)
        assert asked == [4, 8, 8, 4, 4]


def test_a_call_that_stands_still_asks_no_network():
    denoiser = Told()
    x = start()
    steps = list(DDIMSampler(5).steps(denoiser, FlowSchedule(), x, conditions(), guider=CFGZeroStarGuider(3.0, 2)))
    assert denoiser.calls == 3
    assert (steps[1].x - x).abs().max() < 1e-12 and (steps[2].x - x).abs().max() > 1e-3


def test_the_companion_is_asked_only_where_it_counts_and_stays_as_it_is():
    weak, strong = Told(std=0.5), Told()
    weak.train()
    guider = IntervalGuider(0.1, 10.0, AutoguidanceGuider(weak, 2.0))
    walk(guider, strong, DDIMSampler(6))
    assert strong.calls == 6 and 0 < weak.calls < 6 and not weak.training
    assert not any("weak" in name for name in dict(strong.named_modules()))


def test_dynamic_guidance_asks_no_null_where_its_scale_is_one():
    denoiser = Told()
    walk(DynamicCFGGuider(), denoiser)
    assert denoiser.rows == 4 + 4 * 8


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYONE)
def test_a_sample_does_not_know_its_batch(name):
    guider = everyone()[name]
    if name == "cfg by sample":
        pytest.skip("says itself how many samples there are")
    whole = walk(guider)
    cond, pick = conditions(), torch.tensor([2, 0])
    some = Conditioning({k: v[pick] for k, v in cond.tensors.items()})
    some = some.with_null(Conditioning({k: v[pick] for k, v in cond.null.tensors.items()}))
    part = walk(guider, cond=some, x=start()[pick])
    assert (whole[pick] - part).abs().max() < 1e-12


@pytest.mark.parametrize("name", EVERYONE)
def test_batched_and_one_by_one_are_the_same(name):
    together, alone = everyone()[name], everyone()[name]
    leaf = alone
    while isinstance(leaf, WrappingGuider):
        leaf = leaf.guider
    leaf.batched = False
    assert (walk(together) - walk(alone)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [CFGGuider, APGGuider, RescaleGuider])
def test_each_sample_may_have_its_own_scale(kind):
    scales = [0.5, 1.5, 3.0, 7.0]
    make = (lambda s: RescaleGuider(s, CFGGuider(3.0))) if kind is RescaleGuider else kind
    together = walk(make(scales))
    for i, scale in enumerate(scales):
        assert (walk(make(scale))[i] - together[i]).abs().max() < 1e-11


def test_each_frame_may_have_its_own_scale():
    whole = walk(CFGGuider([[1.0, 2.0, 5.0]]))
    for frame, scale in enumerate([1.0, 2.0, 5.0]):
        assert (walk(CFGGuider(scale))[:, :, frame] - whole[:, :, frame]).abs().max() < 1e-12
    both = walk(CFGGuider([[1.0, 2.0, 5.0]] * 3 + [[4.0, 4.0, 4.0]]))
    assert torch.equal(both[:3], whole[:3]) and (both[3] - walk(CFGGuider(4.0))[3]).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DDIMSampler, HeunSampler, DPMpp2MSampler, EulerAncestralSampler])
@pytest.mark.parametrize("name", EVERYONE)
@pytest.mark.parametrize("language", ["x0", "v", "edm"])
def test_every_guider_runs_with_every_solver_and_language(solver, name, language):
    """The language of the network makes no difference."""
    options = dict(sampler=solver(4), seeds=[0, 1, 2, 3])
    got = walk(everyone()[name], Told(language), **options)
    assert got.shape == (4, *SHAPE) and got.isfinite().all()
    assert (got - walk(everyone()[name], Told(), **options)).abs().max() < 1e-8  # sigma 80 times rounding


@pytest.mark.parametrize("name", EVERYONE)
def test_frames_may_have_levels_of_their_own(name):
    """Alike for all frames they are the walk with one level; staggered they run, some being data already."""
    times = [1.0, 0.7, 0.3, 0.0]
    staggered = [[1.0, 1.0, 1.0], [0.7, 0.9, 1.0], [0.3, 0.6, 0.9], [0.0, 0.3, 0.6], [0.0, 0.0, 0.0]]
    one, alike, apart = (
        walk(everyone()[name], Told("v"), DDIMSampler(discretizer=ExplicitDiscretizer(times=t)), FlowSchedule())
        for t in (times, [[t] * 3 for t in times], staggered)
    )
    assert (one - alike).abs().max() < 1e-12 and apart.isfinite().all()


# State, graphs, precision -------------------------------------------------------------------------


def test_a_run_remembers_nothing_of_the_last():
    guider = APGGuider(3.0, momentum=-0.5)
    x = start() * 80.0
    run = DDIMSampler(5).bind(Told(), EDMSchedule(), x, conditions(), guider=guider)
    before = dict(vars(guider))
    first = run(x)
    interrupted = run.steps(x)
    next(interrupted)
    next(interrupted)
    assert torch.equal(run(x), first) and vars(guider) == before
    assert torch.equal(list(interrupted)[-1].x, first)  # two walks of one run, side by side
    assert not torch.allclose(first, walk(APGGuider(3.0)))


def test_a_walk_goes_on_with_what_its_guider_remembers():
    x = start() * 80.0
    run = DDIMSampler(5).bind(Told(), EDMSchedule(), x, conditions(), guider=APGGuider(3.0, momentum=-0.5))
    steps = list(run.steps(x))
    assert torch.equal(list(run.steps(steps[1].x, after=steps[1]))[-1].x, steps[-1].x)


class Quiet(Told, name="quiet_for_tests"):
    """The same without a count, which a compiled walk would have to check."""

    def forward(self, x_t, level, cond=None):
        mean = cond["vector"].to(x_t.dtype).reshape(-1, 1, 1, 1, 1)
        return Prediction(self.language, mean + 0.1 * (x_t - mean), x_t, level)


@pytest.mark.parametrize(
    "name", [name if name in ("cfg", "all of it") else pytest.param(name, marks=pytest.mark.slow) for name in EVERYONE]
)
def test_a_whole_walk_is_one_graph_and_another_schedule_is_no_recompile(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, x = CompileCounter(), start().float()
    compiled = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    guider, denoiser = everyone()[name], Quiet("v")
    for part in (guider, getattr(guider, "guider", None)):
        if isinstance(part, AutoguidanceGuider):
            part.weak = Quiet()
    if name == "all of it":
        guider.guider.guider.weak = Quiet()
    for sigma_max in (80.0, 70.0):  # the same calls lie within the interval
        sampler = DPMpp2MSampler(4)
        run = sampler.bind(denoiser, EDMSchedule(sigma_max), x, conditions(), guider=guider)
        with torch.no_grad():
            assert (compiled(run, x) - run(x)).abs().max() < 1e-3
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", EVERYONE)
def test_guidance_reads_nothing_from_the_device(name):
    x = start()
    run = DDIMSampler(5).bind(Told(), EDMSchedule(), x, conditions(), guider=everyone()[name])
    with torch.no_grad(), Counter() as counter:
        run(x)
    assert not [n for n in counter.names if "_local_scalar_dense" in n or "is_nonzero" in n]


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERYONE)
def test_guidance_never_waits_for_the_device(name):
    x = start().float().cuda()
    guider = everyone()[name]
    denoiser = Told().cuda()
    run = DDIMSampler(5).bind(denoiser, EDMSchedule(), x, conditions().to("cuda"), guider=guider)
    run(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (out.cpu() - walk(guider, Told(), x=start().float())).isfinite().all()


def test_conditions_are_cast_once():
    from vdiff.denoisers import X0Denoiser
    from vdiff.networks import Network

    with isolated():

        class Linear(Network):
            accepts = ("vector", "image")

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
                self.seen = []

            def forward(self, x, c_noise, cond=None):
                self.seen.append((cond["vector"].dtype, cond["vector"].data_ptr()))
                return x * self.weight

    network = Linear()
    walk(CFGGuider(2.0), X0Denoiser(network, c_noise="sigma"))
    assert len(set(network.seen)) == 1 and network.seen[0][0] == torch.bfloat16


# Errors -------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_when_the_walk_is_planned():
    with pytest.raises(ValueError, match="no condition 'audio' to take away"):
        walk(MultiCFGGuider({"audio": 2.0, "vector": 3.0}))
    with pytest.raises(ValueError, match="share is the lambda"):
        CFGPPGuider(7.5)
    with pytest.raises(ValueError, match="6 frames are not made of 4 views"):
        SpatiotemporalGuider(2.0, num_views=4).scales(6)
    with pytest.raises(ValueError, match=r"per frame need a video, b c f h w; this batch is \(4, 3, 2, 2\)"):
        walk(LinearGuider(2.0), x=start()[:, 0])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 4 samples of 3 frames"):
        walk(CFGGuider([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="two nested guiders ask the branch 'weak'"):
        walk(AutoguidanceGuider(Told(), 2.0, AutoguidanceGuider(Told(), 2.0)))


def test_a_companion_is_asked_only_where_it_can_be_read():
    from vdiff.process import UndefinedParameterizationError

    with pytest.raises(UndefinedParameterizationError, match="the companion Told.*epsilon.*t = 1"):
        walk(AutoguidanceGuider(Told("epsilon"), 2.0), Told("v"), schedule=FlowSchedule())


def test_a_language_that_cannot_be_read_is_refused():
    from vdiff.process import EpsilonParameterization, UndefinedParameterizationError

    guider = RescaleGuider(0.5, CFGGuider(2.0), language=EpsilonParameterization())
    with pytest.raises(UndefinedParameterizationError, match="RescaleGuider.*t = 1"):
        walk(guider, Told("v"), schedule=FlowSchedule())
    assert build({"type": "rescale", "language": "v"}, "guider").language == VParameterization()


def test_the_scale_of_a_nest_is_that_of_the_guider_inside():
    nest = RescaleGuider(0.7, IntervalGuider(0.1, 1.0, CFGGuider(2.0)))
    nest.scale = 5.0
    assert nest.guider.guider.scale == 5.0
    assert not hasattr(RescaleGuider(0.7), "scale") and AutoguidanceGuider(Told(), 3.0).scale == 3.0
