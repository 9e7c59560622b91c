"""The executor: few kernels, no reads of the device, one graph, rows that do not know of each other."""

import pytest
import torch
from oracles import noise, one_gaussian
from walks import Counter, Idle

from vdiff.denoisers import Denoiser
from vdiff.process import (
    Conditioning,
    EDMSchedule,
    EpsilonParameterization,
    FlowSchedule,
    Prediction,
    TrailingDiscretizer,
    UndefinedParameterizationError,
    X0Parameterization,
    ZeroSNRSchedule,
    parameterization,
)
from vdiff.registry import isolated
from vdiff.samplers import (
    CFGGuider,
    DDIMSampler,
    DPMpp2MSampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    IidNoiseSource,
)

SOLVERS = [EulerSampler, DDIMSampler, EulerAncestralSampler, HeunSampler, DPMpp2MSampler]


def ops(sampler, steps):
    start = torch.randn(2, 4)
    run = sampler.bind(Idle(), EDMSchedule(), start, seeds=[0, 1])
    with torch.no_grad(), Counter() as counter:
        run(start)
    assert not [name for name in counter.names if "_local_scalar_dense" in name or "is_nonzero" in name]
    return len(counter.names) / steps


@pytest.mark.parametrize("solver, most", [(EulerSampler, 2), (DDIMSampler, 2), (DPMpp2MSampler, 3), (HeunSampler, 6)])
def test_a_step_is_a_few_kernels_and_reads_nothing(solver, most):
    assert ops(solver(50), 50) <= most


def test_fresh_noise_is_drawn_only_where_it_is_used():
    """One draw a step and none in the step into data; deterministic solvers draw nothing."""
    drawn = []

    class Watched(IidNoiseSource, name="watched_for_this_test"):
        def bind(self, seeds, like):
            draw = super().bind(seeds, like)
            return lambda number: drawn.append(number) or draw(number)

    EulerAncestralSampler(5, noise_source=Watched())(one_gaussian(), EDMSchedule(), noise(), seeds=range(64))
    assert drawn == [1, 3, 5, 7]
    DDIMSampler(5, noise_source=Watched())(one_gaussian(), EDMSchedule(), noise())
    assert len(drawn) == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_whole_walk_is_one_graph_and_another_schedule_is_no_recompile(solver):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    walk = torch.compile(lambda run, x: run(x), fullgraph=True, backend=counter)
    sampler, start = solver(6), torch.randn(3, 4)
    for schedule in (EDMSchedule(), EDMSchedule(sigma_max=40.0), EDMSchedule(sigma_max=20.0)):
        run = sampler.bind(Idle(), schedule, start, seeds=[0, 1, 2]).draw_ahead()
        with torch.no_grad():
            assert (walk(run, start) - run(start)).abs().max() < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_know_its_batch(solver):
    """Bitwise with elementwise denoisers, whoever else is in the batch and in whatever order."""
    sampler, oracle = solver(7), one_gaussian()
    start, seeds = noise(8).float(), list(range(8))
    whole = sampler(oracle, EDMSchedule(), start, seeds=seeds)
    some = [5, 0, 3]
    part = sampler(oracle, EDMSchedule(), start[some], seeds=some)
    assert torch.equal(whole[some], part)


def test_the_state_is_float32_for_half_precision_noise_and_float64_for_float64():
    for dtype, want in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert DPMpp2MSampler(3)(one_gaussian(), EDMSchedule(), noise().to(dtype)).dtype == want


def test_float64_keeps_float64_coefficients():
    """In float32 the same walk is only right to float32."""
    sampler = DPMpp2MSampler(20)
    exact = sampler(one_gaussian(), EDMSchedule(), noise())
    rounded = sampler(one_gaussian(), EDMSchedule(), noise().float())
    assert 1e-9 < (exact - rounded).abs().max() < 1e-5


def test_languages_are_read_alike():
    """A denoiser that says the same in another language makes the same samples."""

    class Translated(Denoiser):
        def __init__(self, language):
            super().__init__()
            self.oracle, self.language = one_gaussian(), parameterization(language)

        def forward(self, x_t, level, cond=None):
            said = self.oracle(x_t, level)
            return Prediction(self.language, said.to(self.language), x_t, level)

    for schedule in (EDMSchedule(), FlowSchedule()):
        discretizer = None if isinstance(schedule, EDMSchedule) else TrailingDiscretizer()
        want = HeunSampler(5, discretizer=discretizer)(one_gaussian(), schedule, noise())
        for language in ("v", "edm", "velocity"):
            got = HeunSampler(5, discretizer=discretizer)(Translated(language), schedule, noise())
            assert (got - want).abs().max() < 1e-9, language


def test_epsilon_at_pure_noise_is_refused_when_the_walk_is_planned():
    class Epsilon(Denoiser, name="epsilon_for_this_test"):
        language = EpsilonParameterization()

        def forward(self, x_t, level, cond=None):
            raise AssertionError("must not be asked")

    with pytest.raises(UndefinedParameterizationError, match="DPMpp2MSampler.*epsilon.*t = 1"):
        DPMpp2MSampler(5)(Epsilon(), ZeroSNRSchedule(), noise())


def test_fresh_noise_without_seeds_is_an_error():
    with pytest.raises(ValueError, match="one seed per sample"):
        EulerAncestralSampler(5)(one_gaussian(), EDMSchedule(), noise())
    with pytest.raises(ValueError, match="3 seeds for 64 samples"):
        EulerAncestralSampler(5)(one_gaussian(), EDMSchedule(), noise(), seeds=[1, 2, 3])


def test_callbacks_see_every_step_and_its_preview():
    seen = []
    out = HeunSampler(6)(one_gaussian(), EDMSchedule(), noise(), callback=seen.append, progress=True)
    assert [s.index for s in seen] == list(range(6)) and {s.num_steps for s in seen} == {6}
    assert torch.equal(seen[-1].x, out)
    first = next(DDIMSampler(6).steps(one_gaussian(), EDMSchedule(), noise()))
    exact = one_gaussian()(noise() * 80.0, EDMSchedule().at_ratio(torch.full((64,), 80.0, dtype=torch.float64)))
    assert (first.x0 - exact.x0).abs().max() < 1e-12


def test_the_start_has_the_spread_that_was_asked_for():
    schedule = FlowSchedule()
    levels = TrailingDiscretizer()
    unit = torch.ones(1, 1, dtype=torch.float64)
    first = EDMSchedule()(1.0)
    assert DDIMSampler(4, discretizer=levels).start(schedule, unit).item() == 1.0
    for init, data_std in (("sigma", 0.0), ("vp", 1.0), (0.5, 0.5)):
        got = DDIMSampler(4, init=init).start(EDMSchedule(), unit).item()
        assert got == pytest.approx((first.sigma.item() ** 2 + data_std**2) ** 0.5, rel=1e-15)


# Guiders ------------------------------------------------------------------------------------------


class Shifted(Denoiser):
    """A Gaussian around the condition: what it says depends on the row's own condition only."""

    language = X0Parameterization()

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x_t, level, cond=None):
        self.rows.append(len(x_t))
        mean = cond["vector"].to(x_t.dtype)
        sigma = level.sigma[:, None]
        return Prediction(self.language, mean + (x_t - mean) / (1 + sigma**2), x_t, level)


def conditions(rows=4):
    means = torch.linspace(-1, 1, rows)[:, None].expand(rows, 2)
    return Conditioning({"vector": means}, null=Conditioning({"vector": torch.zeros(rows, 2)}))


def test_scale_one_is_the_plain_prediction_and_asks_nothing_else():
    plain, guided = Shifted(), Shifted()
    want = DDIMSampler(4)(plain, EDMSchedule(), noise(4), conditions())
    got = DDIMSampler(4)(guided, EDMSchedule(), noise(4), conditions(), guider=CFGGuider(1.0))
    assert torch.equal(got, want) and guided.rows == [4] * 4


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_is_the_line_through_both_predictions(batched):
    """u + w (c - u), at every call; batched or one by one."""
    scale, denoiser, cond = 2.5, Shifted(), conditions()
    start = EDMSchedule().at_ratio(torch.tensor(80.0, dtype=torch.float64))
    steps = list(DDIMSampler(4).steps(denoiser, EDMSchedule(), noise(4), cond, guider=CFGGuider(scale, batched)))
    assert denoiser.rows == ([8] * 4 if batched else [4] * 8)
    level = EDMSchedule().at_ratio(start.sigma.expand(4))
    x = noise(4) * 80.0
    c, u = denoiser(x, level, cond).x0, denoiser(x, level, cond.null).x0
    assert (steps[0].x0 - (u + scale * (c - u))).abs().max() < 1e-12


def test_each_sample_may_have_its_own_scale():
    scales = [1.0, 1.5, 3.0, 7.0]
    together = DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), conditions(), guider=CFGGuider(scales))
    for i, scale in enumerate(scales):
        alone = DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), conditions(), guider=CFGGuider(scale))
        assert (alone[i] - together[i]).abs().max() < 1e-12


def test_a_negative_takes_the_place_of_the_null():
    negative = Conditioning({"vector": torch.full((4, 2), 0.7)})
    cond = conditions()
    a = DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), cond.with_null(negative), guider=CFGGuider(3.0))
    b = DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), cond, guider=CFGGuider(3.0))
    assert (a - b).abs().max() > 0.1


def test_guidance_without_a_null_is_an_error():
    with pytest.raises(ValueError, match="no null to guide away from"):
        DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), conditions().with_(null=None), guider=CFGGuider(3.0))
    with pytest.raises(ValueError, match="2 weights .* for 4 samples"):
        DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), conditions(), guider=CFGGuider([2.0, 3.0]))


def test_conditions_of_another_number_of_rows_are_an_error():
    """One row would be spread over all samples in silence."""
    with pytest.raises(ValueError, match="conditions of 1 rows for 4 samples"):
        DDIMSampler(4)(Shifted(), EDMSchedule(), noise(4), conditions(1))


@pytest.mark.parametrize("batched", [True, False])
def test_the_null_branch_has_the_gates_and_partners_of_the_conditions(batched):
    """What guidance takes away is the condition, not the company; a null with its own keeps them."""
    seen = []

    class Watching(Shifted, name="watching_for_this_test"):
        def forward(self, x_t, level, cond=None):
            seen.append((None if cond.partners is None else cond.partners.tolist(), cond.gates["lora"].tolist()))
            return super().forward(x_t, level, cond)

    cond = conditions(2).with_(partners=torch.tensor([1, 0]), gates={"lora": torch.tensor([0.5, 0.25])})
    own = cond.with_null(cond.null.with_(partners=torch.tensor([-1, -1])))
    for asked, null in ((cond, [1, 0]), (own, [-1, -1])):
        seen.clear()
        DDIMSampler(1)(Watching(), EDMSchedule(), noise(2), asked, guider=CFGGuider(3.0, batched))
        if batched:
            assert seen == [([1, 0] + [p + 2 if p >= 0 else p for p in null], [0.5, 0.25, 0.5, 0.25])]
        else:
            assert seen == [([1, 0], [0.5, 0.25]), (null, [0.5, 0.25])]


@pytest.mark.gpu
def test_the_loop_never_waits_for_the_device():
    start = torch.randn(4, 8, device="cuda")
    sampler = DPMpp2MSampler(20)
    run = sampler.bind(Idle(), EDMSchedule(), start)
    run(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(start)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plan_that_stops_early_is_refused():
    with isolated():

        class OneStepSampler(DDIMSampler):
            def plan(self, nodes, schedule):
                yield next(iter(super().plan(nodes, schedule)))

    with pytest.raises(ValueError, match="OneStepSampler.plan ends 1 steps between 6 levels"):
        OneStepSampler(5)(one_gaussian(), EDMSchedule(), noise())
