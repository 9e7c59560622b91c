"""Few-step training: the target is where the teacher's step leads; the exact consistency function is at home there."""

import math
import warnings

import pytest
import torch
from oracles import one_gaussian
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdiff.checkpoints import read, save_weights
from vdiff.conditioners import ClassLabelEmbedder, EmbedderConditioner, GuidanceScaleEmbedder
from vdiff.data import Digits, Loader
from vdiff.denoisers import Denoiser, VDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.hooks import parts
from vdiff.losses import ConsistencyLoss
from vdiff.mixins import ByLevel, Consistency, LoRA, RefModel, Teacher
from vdiff.networks import UNet
from vdiff.process import (
    Conditioning,
    CosineSchedule,
    EDMSchedule,
    ExplicitDiscretizer,
    FlowSchedule,
    GridSigmaSampler,
    LCMBoundary,
    Prediction,
    ScaledLinearSchedule,
    X0Parameterization,
    ZeroSNRSchedule,
    spread,
)
from vdiff.samplers import CFGGuider, ConsistencySampler, DDIMSampler, HeunSampler
from vdiff.training import EMA, Checkpointing, Logging, Trainer, TrainGroup
from vdiff.training.ema import lend

SCHEDULES = {"edm": EDMSchedule(), "cosine": CosineSchedule(), "flow": FlowSchedule(), "sd": ScaledLinearSchedule()}


class ExactConsistency(Denoiser, name="exact_consistency_for_tests"):
    """Where the flow of Gaussian data ends, in closed form."""

    language = X0Parameterization()

    def __init__(self, oracle):
        super().__init__()
        self.oracle = (oracle,)  # not a denoiser of this module

    def forward(self, x_t, level, cond=None):
        (oracle,) = self.oracle
        alpha, sigma = spread(level.alpha, x_t), spread(level.sigma, x_t)
        scale = (oracle.variance / (alpha**2 * oracle.variance + sigma**2)).sqrt()
        return Prediction(self.language, oracle.mean + scale * (x_t - alpha * oracle.mean), x_t, level)


def part_of(mixin):
    ((_, part),) = mixin._sites.values()
    return part


def taught(student, teacher, **options):
    part_of(Teacher(**options).attach(student)).hold(teacher)
    return student


def pair(schedule, ratios, share):
    """From these ratios to that share of each."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    return schedule.at_ratio(ratios).paired(schedule.at_ratio(ratios * share))


def drawn(rows, *shape):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, *shape, generator=draw, dtype=torch.float64) for _ in range(2)]


def distance(schedule, step, solver, oracle):
    """Of the exact consistency function from its target, by row."""
    student, level, (x0, noise) = taught(ExactConsistency(oracle), oracle, solver=solver), None, drawn(3, 2)
    level = pair(schedule, [5.0, 1.0, 0.3], 1 - step)
    return ConsistencyLoss(huber=0.0)(student(level.mix(x0, noise), level), x0, noise, level, {}).per_row


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_exact_consistency_function_misses_its_target_by_the_solvers_local_error(solver, order, schedule):
    """Halving the step divides it by 2^(p + 1)."""
    misses = [distance(schedule, step, solver, one_gaussian()) for step in (0.05, 0.025)]
    ratio = misses[0] / misses[1]
    assert ((ratio / 2 ** (order + 1) - 1).abs() < 0.1).all(), ratio


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), ZeroSNRSchedule()])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_teachers_step_is_a_step_of_the_sampler(solver, schedule):
    """From pure noise, too, where the schedule has it."""
    high, low = (0.95, 0.6) if isinstance(schedule, EDMSchedule) else (1.0, 0.6)
    oracle, (x, _) = one_gaussian(), drawn(4, 2)
    levels = [schedule(torch.full((4,), t, dtype=torch.float64)) for t in (high, low)]
    step = part_of(Teacher(solver=solver).attach(ExactConsistency(oracle))).step
    options = {"discretizer": ExplicitDiscretizer(times=[high, low])}
    sampler = DDIMSampler(1, **options) if solver == "euler" else HeunSampler(1, coordinate="flow", **options)
    want = sampler.bind(oracle, schedule, x)(x)
    got = step(oracle, x, levels[0].paired(levels[1]), None)
    assert (got - want).abs().max() < 1e-10


# A network ---------------------------------------------------------------------------------------


def make(**changes):
    torch.manual_seed(0)
    net = UNet(1, 1, 8, (1, 2), 1, (2,), num_heads=2, context_dim=6, norm_groups=4, **changes)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return VDenoiser(net)


def question(rows=4):
    draw = torch.Generator().manual_seed(1)
    t = torch.linspace(0.9, 0.3, rows)
    level = CosineSchedule()(t).paired(CosineSchedule()(t - 0.1))
    tensors = [{"cross_attention": torch.randn(rows, 3, 6, generator=draw)} for _ in range(2)]
    cond = Conditioning(tensors[0], null=Conditioning(tensors[1]))
    return torch.randn(rows, 1, 8, 8, generator=draw), level, cond


def test_the_target_is_the_student_where_the_teachers_step_leads_and_has_no_gradient():
    denoiser, (x_t, level, cond) = make().requires_grad_(False), question()
    lora = LoRA(rank=2).attach(denoiser)
    plain = denoiser(x_t, level, cond)  # LoRA begins as nothing: this is the teacher
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    Consistency(LCMBoundary()).attach(denoiser)
    Teacher("mixins_off").attach(denoiser)
    x_s = level.lower.mix(plain.x0, plain.noise)
    prediction = denoiser.train()(x_t, level, cond)
    want = denoiser(x_s, level.lower, cond)
    torch.testing.assert_close(prediction.target.x0, want.x0, rtol=1e-4, atol=1e-5)
    assert want.target is None  # at a single level, as in sampling, nobody is asked
    assert not prediction.target.value.requires_grad and prediction.value.requires_grad
    assert denoiser.training
    part = next(p for p in parts(denoiser) if p.mixin_name == "teacher")
    assert not [*part.parameters(), *part.buffers(), *part.companions()]  # it costs not a byte


def test_the_gradient_is_that_of_the_student_against_a_constant():
    denoiser, (x_t, level, cond) = make(), question()
    Teacher().attach(denoiser).begin()
    x0, noise = (value.float() for value in drawn(4, 1, 8, 8))
    grads = []
    for is_fixed in (False, True):
        denoiser.zero_grad()
        prediction = denoiser(x_t, level, cond)
        target = prediction.target.x0.detach().clone()
        if is_fixed:
            ((prediction.x0 - target) ** 2).flatten(1).mean(1).sum().backward()
        else:
            ConsistencyLoss(huber=None)(prediction, x0, noise, level, {}).per_row.sum().backward()
        grads.append([p.grad.clone() for p in denoiser.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_rows_know_nothing_of_each_other(solver):
    denoiser, (x_t, level, cond) = make(), question()
    Consistency().attach(denoiser)
    Teacher(solver=solver, guidance=3.0).attach(denoiser).begin()
    whole = denoiser(x_t, level, cond).target.x0
    null = Conditioning({"cross_attention": cond.null["cross_attention"][2:3]})
    alone = denoiser(x_t[2:3], level[2:3], Conditioning({"cross_attention": cond["cross_attention"][2:3]}, null=null))
    torch.testing.assert_close(alone.target.x0, whole[2:3], rtol=1e-4, atol=1e-5)


def test_a_guided_teacher_takes_the_step_of_classifier_free_guidance():
    denoiser, (x_t, level, cond) = make(), question(2)
    level = level[[0, 0]]
    part = part_of(Teacher(guidance=3.0).attach(denoiser))
    with torch.no_grad():
        got = part.step(denoiser.forward, x_t, level, cond)
        sampler = DDIMSampler(1, discretizer=ExplicitDiscretizer(times=[level.t[0].item(), level.lower.t[0].item()]))
        want = sampler.bind(denoiser, CosineSchedule(), x_t, cond, guider=CFGGuider(3.0))(x_t)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance 3 moves away from the null"):
        denoiser(x_t, level, cond.with_(null=None))


def test_a_teacher_guides_each_row_by_the_scale_that_the_student_is_told():
    """As that row alone under a fixed one; and knows nothing of it otherwise, even where it is a copy that could."""
    denoiser, (x_t, level, cond) = make(guidance_dim=8), question(2)
    nn.init.normal_(denoiser.network.time_cond_proj.weight)
    part, scales = part_of(Teacher(guidance="told").attach(denoiser)), [2.0, 7.5]
    told = {"guidance": torch.tensor(scales)}
    both = cond.with_(tensors={**cond.tensors, **told}, null=cond.null.with_(tensors={**cond.null.tensors, **told}))
    with torch.no_grad():
        got = part.step(denoiser.forward, x_t, level, both)
        for row, scale in enumerate(scales):
            fixed = part_of(Teacher(guidance=scale).attach(make(guidance_dim=8)))
            torch.testing.assert_close(got[row], fixed.step(denoiser.forward, x_t, level, cond)[row])
    assert not torch.equal(denoiser.forward(x_t, level, both).value, denoiser.forward(x_t, level, cond).value)
    with pytest.raises(ValueError, match="'guidance' has the scale of each row, .B,., and it is missing"):
        denoiser(x_t, level, cond)


@pytest.mark.parametrize(
    "on, is_zero, is_trained, guidance, is_warned",
    [
        (["*.to_q"], True, False, "told", True),
        (["*.to_q", "*.time_cond_proj"], True, False, "told", False),
        (["*.to_q"], False, False, "told", False),
        (["*.to_q"], True, True, "told", False),
        (["*.to_q"], True, False, 2.0, False),
    ],
)
def test_of_a_scale_that_cannot_reach_the_student_one_is_warned_once(on, is_zero, is_trained, guidance, is_warned):
    denoiser, (x_t, level, cond) = make(guidance_dim=8).requires_grad_(False), question()
    projection = denoiser.network.time_cond_proj
    nn.init.constant_(projection.weight, 0.0 if is_zero else 0.1)
    lora = LoRA(rank=2, on=on).attach(denoiser)
    Teacher("mixins_off", guidance=guidance).attach(denoiser)
    projection.requires_grad_(is_trained)

    def ask(scale):
        told = {"guidance": torch.full((4,), scale)}
        null = cond.null.with_(tensors={**cond.null.tensors, **told})
        return denoiser(x_t, level, cond.with_(tensors={**cond.tensors, **told}, null=null)).value

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            ask(2.0).mean().backward()
    assert sum("the scale does not reach the student" in str(one.message) for one in seen) == is_warned
    for parameter in lora.parameters():  # as if trained
        nn.init.normal_(parameter, std=0.3)
    assert torch.equal(ask(2.0), ask(5.0)) == (is_zero and on == ["*.to_q"])


def test_a_student_is_told_scales_that_its_rows_draw():
    """Evenly between the two, by key: the same in every batch. Sampling takes the field or the default."""
    made = EmbedderConditioner([GuidanceScaleEmbedder(2.0, 6.0, default=4.0)])
    batch = Loader(Digits("train"), 64, seed=0).batch(0)
    drawn = made.train()(batch)["guidance"]
    assert 2 <= drawn.min() < 2.5 and 5.5 < drawn.max() <= 6 and torch.equal(made(batch)["guidance"], drawn)
    some = {
        name: value[:5] if isinstance(value, torch.Tensor) and value.ndim else value for name, value in batch.items()
    }
    assert torch.equal(made(some)["guidance"], drawn[:5])
    assert (made.eval()(batch)["guidance"] == 4).all() and torch.equal(
        made(batch).null["guidance"], torch.full((64,), 4.0)
    )
    assert made.train()({**batch, "guidance_scale": torch.full((64,), 3.0)})["guidance"].unique() == 3
    with pytest.warns(UserWarning, match="guidance_scale goes from 3 to 7.5, and training draws it between 2 and 6"):
        made.eval()({"guidance_scale": [3.0, 7.5]})
    with pytest.raises(ValueError, match="low is at most high, got 6 and 2"):
        GuidanceScaleEmbedder(6.0, 2.0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_target_is_the_same_wherever_the_teacher_stands(solver):
    """Whatever else changes the arguments at the denoiser: it does so once, at the level that is asked about."""
    found = []
    for is_first in (True, False):
        denoiser, (x_t, level, cond) = make().requires_grad_(False), question()
        torch.manual_seed(2)
        lora = LoRA(rank=2).attach(denoiser)
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.3)
        teacher, gate = Teacher("mixins_off", solver=solver), ByLevel("lora", {0.1: 0.2, 10.0: 0.8})
        for mixin in (teacher, gate) if is_first else (gate, teacher):
            mixin.attach(denoiser)
        found.append(denoiser(x_t, level, cond))
    x_s = part_of(teacher).step(make(), x_t, level, cond)  # the plain network is the teacher
    want = denoiser(x_s, level.lower, cond)
    for prediction in found:
        torch.testing.assert_close(prediction.target.x0, want.x0, rtol=1e-4, atol=1e-5)


def test_a_reference_and_a_teacher_go_together_in_either_order():
    denoiser, (x_t, level, cond) = make(), question()
    said = denoiser(x_t, level, cond).value
    for kinds in ((RefModel, Teacher), (Teacher, RefModel)):
        student = make()
        for kind in kinds:
            kind(source="copy").attach(student).begin()
        prediction = student(x_t, level, cond)
        assert torch.equal(prediction.reference.value, said) and prediction.target.reference is None
        assert torch.equal(prediction.target.level.t, level.lower.t)


def test_a_teacher_from_a_file_must_fit(tmp_path):
    save_weights(tmp_path / "other.safetensors", make(scale_shift_norm=True).state_dict(), {})
    with pytest.raises(ValueError, match="Teacher: .*other.safetensors"):
        Teacher("checkpoint", file=tmp_path / "other.safetensors").attach(make())
    denoiser, (x_t, level, cond) = make(), question()
    save_weights(tmp_path / "teacher.safetensors", denoiser.state_dict(), {})
    first = denoiser(x_t, level, cond)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
    part = part_of(Teacher("checkpoint", file=tmp_path / "teacher.safetensors").attach(denoiser))
    with part.asked(denoiser) as teacher:
        assert torch.equal(teacher(x_t, level, cond).value, first.value)


def test_what_is_missing_is_named():
    denoiser, (x_t, level, cond) = make(), question()
    prediction = denoiser(x_t, level, cond)
    with pytest.raises(ValueError, match="no target to agree with.*type: teacher.*type: grid"):
        ConsistencyLoss()(prediction, x_t, x_t, level, {})
    Teacher("mixins_off").attach(denoiser)
    Consistency().attach(denoiser)  # which has no weights, so it is no student
    with pytest.raises(ValueError, match="the teacher is the student itself.*source: copy"):
        denoiser.train()(x_t, level, cond)
    with pytest.raises(ValueError, match="solver is euler or heun"):
        Teacher(solver="dpm")
    with pytest.raises(ValueError, match="huber must not be negative"):
        ConsistencyLoss(huber=-1.0)


# The boundary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_level", [EDMSchedule().at_ratio, CosineSchedule().at_ratio])
def test_at_the_level_that_counts_as_data_the_student_returns_its_input(make_level):
    denoiser = make().double()
    Consistency().attach(denoiser)
    x_t, _, cond = question(2)
    level = make_level(torch.full((2,), 0.002, dtype=torch.float64))
    x0 = denoiser(x_t.double(), level, cond.with_(null=None).to(torch.float64)).x0
    torch.testing.assert_close(x0 * level.alpha[0], x_t.double(), rtol=1e-9, atol=1e-9)


# An engine ---------------------------------------------------------------------------------------


def engine(**teacher):
    torch.manual_seed(0)
    net = UNet(1, 1, 8, (1,), 1, (), num_heads=2, norm_groups=4, num_classes="sequential", vector_dim=4)
    made = DiffusionEngine(
        "image",
        VDenoiser(net, c_noise="time_1000"),
        CosineSchedule(),
        GridSigmaSampler(8),
        ConsistencyLoss(),
        ConsistencySampler(2),
        EmbedderConditioner([ClassLabelEmbedder(10, 4, drop=0.1)]),
        mixins={"consistency": Consistency(), "teacher": Teacher(**teacher)},
    )
    made.conditioner.requires_grad_(False)  # the conditions are the teacher's as well
    return made


def trained(run, num_steps, ema=True, **teacher):
    student = engine(**teacher)
    quiet = {"logging": Logging(loggers=[]), "checkpoint": Checkpointing(every=2), "train": [TrainGroup("denoiser")]}
    Trainer(num_steps, 4, device="cpu", ema=EMA(0.9) if ema else None, **quiet).fit(student, Digits("test"), run)
    return student


@pytest.mark.parametrize("target", ["student", "ema"])
def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path, target):
    whole = trained(tmp_path / "whole", 4, target=target)
    trained(tmp_path / "parts", 2, target=target)
    resumed = trained(tmp_path / "parts", 4, target=target)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_teacher_is_in_no_optimizer_average_or_checkpoint_and_the_average_makes_a_difference(tmp_path):
    student = trained(tmp_path / "ema", 2, target="ema")
    names = {name for name, _ in student.denoiser.named_parameters(prefix="denoiser")}
    files, _ = read(tmp_path / "ema" / "checkpoints" / "step-00000002")
    assert set(files["model"]) == set(student.state_dict()) and set(files["ema"]) == names
    assert {name.partition("/")[0] for name in files["optimizer"]} == names
    assert not any("_port" in name for name in student.state_dict())
    plain = trained(tmp_path / "plain", 2, target="student")
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ValueError, match="nothing keeps one. Set training.ema"):
        trained(tmp_path / "none", 1, ema=False, target="ema")


def lent(student, is_moved):
    """An average of all parameters; moved, it is another one than the student."""
    ema = EMA(0.9)
    ema.start(dict(student.named_parameters()))
    if is_moved:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.1)
    return lend(ema, student)


def test_under_autocast_the_student_is_trained_at_its_own_weights():
    batch, found = Loader(Digits("test"), 4).batch(0), []
    for is_on in (True, False):
        student = engine(target="ema")
        student.denoiser.register_forward_hook(lambda module, args, output: found.append(output.value))
        part_of(student.mixins["teacher"]).enabled = is_on
        level, noise = student.draw(batch["image"], batch)
        with lent(student, is_moved=True), torch.autocast("cpu", torch.bfloat16):
            cond = student.conditioner(batch)
            for _ in range(2):
                student.denoiser(level.mix(batch["image"], noise), level, cond)
    target, asked, second_target, second, alone, _ = found
    assert torch.equal(asked, alone) and torch.equal(second, alone) and not torch.equal(target, asked)
    assert torch.equal(second_target, target)  # and not the student's, though autocast holds casts of its weights


@pytest.mark.parametrize("source", ["copy", "mixins_off"])
def test_a_teacher_that_is_told_what_is_trained_is_refused(source):
    student, batch = engine(source=source), Loader(Digits("test"), 4).batch(0)
    LoRA(rank=1, on="*.time_embed.0").attach(student.denoiser.requires_grad_(False))
    student.conditioner.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Teacher: the condition 'vector' asks for a gradient.*the teacher"):
        student(batch)
    with torch.no_grad():
        student(batch)
    student.conditioner.requires_grad_(False)
    student(batch).per_row.mean().backward()


def test_an_average_is_lent_for_the_run_and_no_longer(tmp_path):
    student = trained(tmp_path, 1, target="ema")
    teacher = student.mixins["teacher"]
    assert teacher.average is None
    with pytest.raises(KeyError), lent(student, is_moved=False):
        assert teacher.average is not None
        raise KeyError
    assert teacher.average is None


def test_compiled_is_eager_in_three_graphs():
    """The copied teacher, asked about both branches of guidance at once; the student without gradient and with."""
    teacher = {"solver": "heun", "guidance": 2.0}
    batch = Loader(Digits("test"), 4).batch(0)
    want = engine(**teacher)(batch).per_row
    student, counter = engine(**teacher), CompileCounterWithBackend("aot_eager")
    student.mixins["teacher"].begin()
    student.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        got = student(batch).per_row
        got.mean().backward()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 3


def test_it_samples_with_the_boundary_and_without_the_teacher():
    student = engine().eval()
    one = student.sample({"label": [3, 7]}, shape=(1, 8, 8), sampler=ConsistencySampler(1), num=2)
    noise, top = student.noise((1, 8, 8), [0, 1]), student.schedule(torch.ones(2))
    x0 = student.denoiser(noise, top, student.conditions({"label": torch.tensor([3, 7])})).x0
    torch.testing.assert_close(one, x0, rtol=1e-4, atol=1e-5)
    assert not part_of(student.mixins["teacher"]).companions() and math.isfinite(one.sum().item())
