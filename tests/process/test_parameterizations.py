import itertools
import math

import pytest
import torch
from every_schedule import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiff.process import (
    EDMParameterization,
    EDMSchedule,
    EpsilonParameterization,
    FlowSchedule,
    Prediction,
    ScaledLinearSchedule,
    UndefinedParameterizationError,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
    ZeroSNRSchedule,
    parameterization,
)
from vdiff.registry import ConfigError, build, entries

LANGUAGES = {
    "x0": X0Parameterization(),
    "epsilon": EpsilonParameterization(),
    "v": VParameterization(),
    "velocity": VelocityParameterization(),
    "edm": EDMParameterization(),
    "edm_2": EDMParameterization(sigma_data=2.0),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_language = pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)


def data(rows, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, 3, 4, dtype=dtype, generator=random)


def truth(language, x0, noise, level):
    return Prediction(language, language.value(x0, noise, level), level.mix(x0, noise), level)


# The table -----------------------------------------------------------------------------------------


@every_schedule
def test_the_table_is_that_of_the_papers(schedule):
    level = schedule(torch.tensor([0.3, 0.8], dtype=torch.float64))
    x0, noise = data(2)
    n = level.like(x0)
    says = {name: language.value(x0, noise, level) for name, language in LANGUAGES.items()}
    assert torch.equal(says["x0"], x0) and torch.equal(says["epsilon"], noise)
    torch.testing.assert_close(says["v"], n.alpha * noise - n.sigma * x0)
    torch.testing.assert_close(says["velocity"], n.d_alpha * x0 + n.d_sigma * noise)


@every_schedule
@every_language
def test_a_reading_of_the_truth_is_x0(language, schedule):
    x0, noise = torch.randn(2, 3, dtype=torch.float64)
    level = schedule(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p, q = language.reading(level)
    torch.testing.assert_close(p * level.mix(x0, noise) + q * language.value(x0, noise, level), x0)


def test_x0_is_read_where_there_is_no_noise_as_well():
    p, q = X0Parameterization().reading(FlowSchedule()(torch.zeros(1)))
    assert (p.item(), q.item()) == (0.0, 1.0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_edm_row_is_its_preconditioning(sigma_data):
    """Karras et al., table 1: D = c_skip x_t + c_out F, so the target is F = (x0 - c_skip x_t) / c_out."""
    sigma = torch.logspace(-3, 2, 21, dtype=torch.float64)
    level = EDMSchedule().at_ratio(sigma)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    language = EDMParameterization(sigma_data)
    x0, noise = torch.randn(2, 21, dtype=torch.float64)
    target = (x0 - c_skip * (x0 + sigma * noise)) / c_out
    torch.testing.assert_close(language.value(x0, noise, level), target, rtol=1e-9, atol=1e-9)
    a, b = language.coefficients(level)
    torch.testing.assert_close(a, (1 - c_skip) / c_out, rtol=1e-9, atol=0)
    torch.testing.assert_close(b, -c_skip * sigma / c_out, rtol=1e-12, atol=0)
    p, q = language.reading(level)
    torch.testing.assert_close(p, c_skip, rtol=1e-12, atol=0)
    torch.testing.assert_close(q, c_out, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [FlowSchedule(), ZeroSNRSchedule()], ids=["flow", "zero_snr"])
def test_the_edm_row_generalises_to_any_alpha(schedule):
    level, s = schedule(torch.linspace(0.05, 1, 20, dtype=torch.float64)), 0.5
    total = level.sigma**2 + level.alpha**2 * s**2
    c_skip, c_out = level.alpha * s**2 / total, level.sigma * s / total.sqrt()
    p, q = EDMParameterization(s).reading(level)
    torch.testing.assert_close(p, c_skip, rtol=1e-12, atol=0)
    torch.testing.assert_close(q, c_out, rtol=1e-12, atol=0)


def test_the_edm_row_is_accurate_in_float32_at_small_sigma():
    """(1 - c_skip) / c_out as written loses half of its digits at sigma = 0.002."""
    exact = EDMParameterization().coefficients(EDMSchedule().at_ratio(torch.tensor([0.002], dtype=torch.float64)))
    single = EDMParameterization().coefficients(EDMSchedule().at_ratio(torch.tensor([0.002])))
    for a, b in zip(exact, single, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=3e-7, atol=0)
    x0, noise = torch.randn(2, 1, 1000)
    level = EDMSchedule().at_ratio(torch.tensor([0.002]))
    said = truth(EDMParameterization(), x0, noise, level)
    torch.testing.assert_close(said.x0, x0, atol=3e-7, rtol=3e-7)


@every_schedule
def test_edm_targets_have_unit_variance_for_data_of_its_width(schedule):
    level = schedule(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    a, b = EDMParameterization(0.7).coefficients(level)
    torch.testing.assert_close((0.7 * a) ** 2 + b**2, torch.ones(3, dtype=torch.float64))


# Translation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", LANGUAGES.values(), ids=LANGUAGES)
@every_language
@every_schedule
def test_truth_converts_to_truth(schedule, language, into):
    level = schedule(torch.tensor([0.1, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64))
    x0, noise = data(5)
    said = truth(language, x0, noise, level)
    torch.testing.assert_close(said.to(into), into.value(x0, noise, level), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(said.x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(said.noise, noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, into", itertools.product(["v", "velocity", "edm", "x0"], LANGUAGES))
@pytest.mark.parametrize("schedule", ["flow", "flow_shift_3", "cosine", "zero_snr", "cogvideox_2b"])
def test_truth_converts_to_truth_at_pure_noise(schedule, name, into):
    level = SCHEDULES[schedule](torch.ones(2, dtype=torch.float64))
    x0, noise = data(2)
    said = truth(LANGUAGES[name], x0, noise, level)
    torch.testing.assert_close(said.to(LANGUAGES[into]), LANGUAGES[into].value(x0, noise, level))
    torch.testing.assert_close(said.x0, x0)


@pytest.mark.parametrize("name", ["v", "velocity", "epsilon", "edm", "x0"])
@pytest.mark.parametrize("schedule", ["flow", "cosine", "zero_snr", "scaled_linear"])
def test_x0_is_known_at_data(schedule, name):
    level = SCHEDULES[schedule](torch.zeros(2, dtype=torch.float64))
    x0, noise = data(2)
    said = truth(LANGUAGES[name], x0, noise, level)
    torch.testing.assert_close(said.x0, x0)
    torch.testing.assert_close(said.to("x0"), x0)


@pytest.mark.parametrize("name", ["v", "velocity", "epsilon"])
def test_the_noise_can_be_known_at_data(name):
    level = FlowSchedule()(torch.zeros(2, dtype=torch.float64))
    x0, noise = data(2)
    said = truth(LANGUAGES[name], x0, noise, level)
    torch.testing.assert_close(said.noise, noise)
    torch.testing.assert_close(said.to("velocity"), noise - x0)


@every_language
def test_levels_per_frame_convert_frame_by_frame(language):
    level = ScaledLinearSchedule()(torch.rand(2, 5, dtype=torch.float64).clamp(0.1, 0.9))
    x0, noise = torch.randn(2, 2, 3, 5, 4, 4, dtype=torch.float64)
    said = truth(language, x0, noise, level)
    torch.testing.assert_close(said.x0, x0)
    torch.testing.assert_close(said.to("v"), VParameterization().value(x0, noise, level))
    one = truth(language, x0[:, :, 3], noise[:, :, 3], level[:, 3])
    torch.testing.assert_close(said.value[:, :, 3], one.value)
    torch.testing.assert_close(said.noise[:, :, 3], one.noise)


@every_schedule
@pytest.mark.parametrize("one, other", itertools.permutations(LANGUAGES, 2))
def test_a_squared_error_changes_language_by_the_squared_ratio_of_determinants(schedule, one, other):
    one, other = LANGUAGES[one], LANGUAGES[other]
    level = schedule(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    x0, noise = data(3)
    right = truth(one, x0, noise, level)
    wrong = right.with_(value=right.value + 0.1 * torch.randn_like(x0))
    error = (wrong.to(other) - right.to(other)).pow(2).mean((1, 2))
    weight = (other.determinant(level) / one.determinant(level)) ** 2
    torch.testing.assert_close(error, weight * (wrong.value - right.value).pow(2).mean((1, 2)), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.1, 0.99),
    st.sampled_from(sorted(LANGUAGES)),
    st.sampled_from(sorted(LANGUAGES)),
    st.sampled_from(sorted(SCHEDULES)),
)
def test_there_and_back_is_the_same(t, one, other, schedule):
    level = SCHEDULES[schedule](torch.tensor([t], dtype=torch.float64))
    value, x_t = torch.randn(2, 1, 5, dtype=torch.float64)
    there = Prediction(LANGUAGES[one], value, x_t, level)
    back = Prediction(LANGUAGES[other], there.to(LANGUAGES[other]), x_t, level).to(LANGUAGES[one])
    torch.testing.assert_close(back, value, rtol=1e-4, atol=1e-4)


def test_determinants():
    level = ScaledLinearSchedule()(torch.tensor([0.2, 0.9], dtype=torch.float64))
    torch.testing.assert_close(LANGUAGES["x0"].determinant(level), -level.sigma)
    torch.testing.assert_close(LANGUAGES["epsilon"].determinant(level), level.alpha)
    torch.testing.assert_close(LANGUAGES["v"].determinant(level), torch.ones(2, dtype=torch.float64))


def test_velocity_is_v_times_a_constant_on_the_quarter_circle():
    """On alpha = cos, sigma = sin the two languages differ by the angular speed alone: no term in x_t."""
    level = SCHEDULES["cosine"](torch.linspace(0, 1, 9, dtype=torch.float64))
    p, q = LANGUAGES["v"].translation(level, LANGUAGES["velocity"])
    assert p.abs().max() < 1e-15 and torch.allclose(q, torch.full_like(q, math.pi / 2))


# Undefined -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flow", "cosine", "zero_snr"])
def test_epsilon_at_pure_noise_has_an_error_with_its_name(schedule):
    level = SCHEDULES[schedule](torch.tensor([1.0, 0.5]))
    with pytest.raises(UndefinedParameterizationError) as error:
        LANGUAGES["epsilon"].check(level, "EulerSampler")
    for part in ("EulerSampler: a network that speaks 'epsilon'", "at t = 1,", "alpha = 0", "Use another language"):
        assert part in str(error.value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_check_takes_levels_of_any_shape(shape):
    with pytest.raises(UndefinedParameterizationError, match="at t = 1,"):
        LANGUAGES["epsilon"].check(FlowSchedule()(torch.ones(shape)), "here")
    LANGUAGES["epsilon"].check(FlowSchedule()(torch.full(shape, 0.5)), "here")


def test_the_error_tells_the_time_at_which_it_happens():
    with pytest.raises(UndefinedParameterizationError, match=r"'velocity' says nothing about x0 at t = 0,"):
        LANGUAGES["velocity"].check(EDMSchedule()(torch.tensor([0.5, 0.0])), "here")  # d_sigma = 0 there


@pytest.mark.parametrize("name", ["x0", "v", "velocity", "edm"])
@pytest.mark.parametrize("schedule", ["flow", "cosine", "zero_snr"])
def test_other_languages_are_defined_everywhere(schedule, name):
    LANGUAGES[name].check(SCHEDULES[schedule](torch.linspace(0, 1, 11)), "here")


# Names and values ----------------------------------------------------------------------------------


def test_languages_are_known_by_name():
    assert sorted(entries("parameterization")) == ["edm", "epsilon", "v", "velocity", "x0"]
    assert parameterization("v") == VParameterization() and parameterization("v").name == "v"
    assert build({"type": "edm", "sigma_data": 1}, "parameterization") == EDMParameterization(1.0)
    language = EDMParameterization(3.0)
    assert parameterization(language) is language
    with pytest.raises(ConfigError, match="no parameterization is called 'epsilonn'. Did you mean 'epsilon'?"):
        parameterization("epsilonn")
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        EDMParameterization(0.0)


def test_languages_are_values():
    assert EDMParameterization(0.5) == EDMParameterization(0.5) != EDMParameterization(0.6)
    assert len({EDMParameterization(0.5), EDMParameterization(0.5), VParameterization(), X0Parameterization()}) == 3
    assert VParameterization() != VelocityParameterization() and VParameterization() != "v"
    assert repr(EDMParameterization(0.5)) == "EDMParameterization(sigma_data=0.5)"


def test_in_its_own_language_a_prediction_is_its_value():
    x_t = torch.zeros(1, 2)
    said = Prediction(EDMParameterization(0.5), torch.randn(1, 2), x_t, FlowSchedule()(torch.ones(1)))
    assert said.to("edm") is said.value and said.to(EDMParameterization(0.6)) is not said.value


def test_a_prediction_keeps_what_it_is_not_asked_to_change():
    said = truth(VParameterization(), *data(2), FlowSchedule()(torch.rand(2)))
    other = said.with_(reference=said, renoise=said.value)
    assert (
        other.reference is said and other.renoise is said.value and other.value is said.value and said.reference is None
    )


def test_half_precision_values_are_read_in_float32():
    level = FlowSchedule()(torch.rand(2))
    said = Prediction(VParameterization(), torch.randn(2, 3).bfloat16(), torch.randn(2, 3), level)
    assert said.x0.dtype == said.noise.dtype == said.to("velocity").dtype == torch.float32


def test_reading_compiles_to_one_graph():
    language = VParameterization()

    @torch.compile(fullgraph=True, backend="eager")
    def read(value, x_t, level):
        said = Prediction(language, value, x_t, level)
        return said.x0, said.noise, said.to(VelocityParameterization())

    value, x_t, level = torch.randn(2, 3), torch.randn(2, 3), FlowSchedule()(torch.rand(2))
    said = Prediction(language, value, x_t, level)
    for got, expected in zip(read(value, x_t, level), (said.x0, said.noise, said.to("velocity")), strict=True):
        torch.testing.assert_close(got, expected)
