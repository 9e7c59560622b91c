"""Multistep weights: exact for polynomials, in every form, coordinate and frame, at both ends."""

import math
from fractions import Fraction

import numpy as np
import pytest

from vdiff.process import CosineSchedule, EDMSchedule, FlowSchedule
from vdiff.samplers.plan import Node, transfer
from vdiff.samplers.quadrature import EpsilonForm, TrigForm, VelocityForm, X0Form, coordinate, form, weights

FORMS = {"x0": X0Form(), "x0_sde": X0Form(eta=1.0), "epsilon": EpsilonForm(), "trig": TrigForm(0.5)}
FORMS["velocity"] = VelocityForm()
COORDINATES = ["log_sigma", "sigma", "sigma_root", "angle"]
SCHEDULES = [EDMSchedule(), CosineSchedule(), FlowSchedule(shift=3.0)]
STD = 0.5


def node(ratio, schedule=None):
    return Node.of((schedule or EDMSchedule()).at_ratio(ratio))[0]


def reference(name, power, place, now, then):
    """The integral of ``coordinate ** power`` over a step of the variance-exploding frame, by adaptive quadrature."""
    quad = pytest.importorskip("scipy.integrate").quad
    at = coordinate(place, sigma_data=STD)
    value = lambda u: float(at(np.exp(u))) ** power  # noqa: E731
    measure = {
        "x0": lambda u: -then * math.exp(-u),
        "x0_sde": lambda u: -2 * then**2 * math.exp(-2 * u),
        "epsilon": lambda u: math.exp(u),
        "velocity": lambda u: (1 + then) * math.exp(u) / (1 + math.exp(u)) ** 2,
        "trig": lambda u: math.hypot(then, STD) * STD * math.exp(u) / (math.exp(2 * u) + STD**2),
    }[name]
    low, high = (math.log(then) if then else math.log(now) - 60, math.log(now))
    return -quad(lambda u: value(u) * measure(u), low, high, epsabs=0, epsrel=1e-13, limit=400)[0]


@pytest.mark.parametrize("place", COORDINATES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ratios", [(20.0, 12.0, 9.0, 5.0), (1.4, 1.0, 0.6, 0.15), (0.02, 0.011, 0.006, 0.005)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rule_of_k_nodes_integrates_polynomials_below_degree_k_exactly(size, ratios, name, place):
    nodes = [node(r) for r in (*ratios[-2::-1],)][:size] if size < 4 else [node(r) for r in reversed(ratios)]
    now, then = (nodes[0], node(ratios[-1])) if size < 4 else (node(ratios[-2]), node(ratios[-1]))
    found = weights(FORMS[name], coordinate(place, sigma_data=STD), nodes, now, then)
    at = coordinate(place, sigma_data=STD)(np.array([n.ratio for n in nodes]))
    for power in range(len(nodes)):
        want = reference(name, power, place, now.ratio, then.ratio)
        scale = sum(abs(w * a**power) for w, a in zip(found, at, strict=True)) + abs(want)
        assert abs(sum(w * a**power for w, a in zip(found, at, strict=True)) - want) < 1e-12 * scale


@pytest.mark.parametrize("place", COORDINATES)
@pytest.mark.parametrize("name", ["epsilon", "velocity", "trig"])
@pytest.mark.parametrize("first", [0.002, 0.3])
def test_the_step_into_data_is_of_full_order_where_the_form_is_finite_there(first, name, place):
    nodes = [node(first * k) for k in (1.0, 1.7, 3.0)]
    found = weights(FORMS[name], coordinate(place, sigma_data=STD), nodes, nodes[0], node(0.0))
    at = coordinate(place, sigma_data=STD)(np.array([n.ratio for n in nodes]))
    for power in range(3):
        want = reference(name, power, place, first, 0.0)
        scale = sum(abs(w * a**power) for w, a in zip(found, at, strict=True)) + abs(want)
        assert abs(sum(w * a**power for w, a in zip(found, at, strict=True)) - want) < 1e-12 * scale


def test_x0_into_data_is_what_the_polynomial_says_at_data():
    """In log sigma data is infinitely far, so the last answer stands; elsewhere the line goes on to it."""
    nodes = [node(0.1), node(0.3)]
    assert weights(X0Form(), coordinate("log_sigma"), nodes, nodes[0], node(0.0)) == [1.0, 0.0]
    assert weights(X0Form(), coordinate("sigma"), nodes, nodes[0], node(0.0)) == pytest.approx([1.5, -0.5], abs=1e-15)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_noise_on_an_even_grid_of_sigma_has_the_weights_of_adams_and_bashforth(order):
    table = {2: "3/2 -1/2", 3: "23/12 -16/12 5/12", 4: "55/24 -59/24 37/24 -9/24"}
    nodes = [node(1.0 + 0.1 * j) for j in range(order)]
    found = weights(EpsilonForm(), coordinate("sigma"), nodes, nodes[0], node(0.9))
    assert found == pytest.approx([-0.1 * float(Fraction(f)) for f in table[order].split()], abs=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_x0_in_log_sigma_has_the_weights_of_the_exponential_integrators(eta):
    """phi_2 and phi_3 of DPM-Solver++ (3M) with the factor 2 that the published code lacks."""
    h, h1, h2 = 0.3, 0.2, 0.4
    now = 1.0
    nodes = [node(now), node(now * math.exp(h1)), node(now * math.exp(h1 + h2))]
    whole = (1 + eta) * h
    phi_2 = 1 - (1 - math.exp(-whole)) / whole
    phi_3 = 0.5 - phi_2 / whole
    r0, r1 = h1 / h, h2 / h
    first, second = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    d2 = (first - second) / (r0 + r1)
    d1 = first + r0 * d2
    want = np.array([1 - math.exp(-whole), 0, 0]) + phi_2 * d1 + 2 * phi_3 * d2
    found = weights(X0Form(eta), coordinate("log_sigma"), nodes, nodes[0], node(math.exp(-h)))
    assert found == pytest.approx(want.tolist(), abs=1e-13)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_truth_stays_truth(schedule, name):
    """Where the output never changes, one node is exact: x0 fixed, noise fixed, or data of the spread in question."""
    now, then = node(3.0, schedule), node(0.7, schedule)
    kind = FORMS[name]
    (weight,) = weights(kind, coordinate("angle"), [now], now, then)
    x0, noise = 0.4, -1.3
    if name == "x0_sde":  # the mean of the reverse SDE: the noise shrinks twice as fast
        x = now.alpha * x0 + now.sigma * noise
        want = then.alpha * x0 + then.sigma * noise * (0.7 / 3.0)
    elif name == "trig":  # Gaussian data of spread sigma_data: x / T does not change and the output is zero
        x = 0.9 * math.hypot(now.sigma, now.alpha * STD)
        x0 = now.alpha * STD**2 / (now.alpha**2 * STD**2 + now.sigma**2) * x
        want = 0.9 * math.hypot(then.sigma, then.alpha * STD)
    else:
        x, want = (n.alpha * x0 + n.sigma * noise for n in (now, then))
    p, q = kind.reading(now)
    assert kind.keep(now, then) * x + weight * (p * x + q * x0) == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("place", COORDINATES)
@pytest.mark.parametrize("name", FORMS)
def test_frames_differ_by_the_scale_of_the_signal_only(name, place):
    """x' / alpha' in terms of x / alpha is the same in every frame."""
    ratios, rules = (2.0, 3.0, 5.0), []
    for schedule in SCHEDULES:
        nodes, then = [node(r, schedule) for r in ratios], node(1.2, schedule)
        found = weights(FORMS[name], coordinate(place), nodes, nodes[0], then)
        row = [FORMS[name].keep(nodes[0], then) * nodes[0].alpha / then.alpha]
        for n, w in zip(nodes, found, strict=True):
            p, q = FORMS[name].reading(n)
            row += [w * p * n.alpha / then.alpha, w * q / then.alpha]
        rules.append(row)
    for other in rules[1:]:
        assert other == pytest.approx(rules[0], abs=1e-12)


def test_a_first_step_is_that_of_ddim():
    for schedule in SCHEDULES:
        now, then = node(3.0, schedule), node(0.7, schedule)
        keep, gain = transfer(now, then)
        for kind in (X0Form(), EpsilonForm(), VelocityForm()):
            (weight,) = weights(kind, coordinate("sigma"), [now], now, then)
            p, q = kind.reading(now)
            assert (kind.keep(now, then) + weight * p, weight * q) == pytest.approx((keep, gain), abs=1e-14)


@pytest.mark.parametrize("place, drops", [("log_sigma", 1), ("sigma", 1), ("sigma_root", 1), ("angle", 0)])
def test_a_node_at_pure_noise_counts_where_the_coordinate_reaches_it(place, drops):
    """In an unbounded coordinate it is infinitely far, and the polynomial goes through the others."""
    far, *near = (node(r, CosineSchedule()) for r in (math.inf, 5.0, 2.0))
    found = weights(X0Form(), coordinate(place), [near[1], near[0], far], near[1], node(1.0, CosineSchedule()))
    assert np.isfinite(found).all() and (found[2] == 0) == bool(drops)
    if drops:
        assert found[:2] == weights(X0Form(), coordinate(place), near[::-1], near[1], node(1.0, CosineSchedule()))


@pytest.mark.parametrize("kind", [X0Form(), X0Form(1.0), VelocityForm(), TrigForm()])
def test_a_step_from_pure_noise_is_finite(kind):
    now, then = node(math.inf, CosineSchedule()), node(2.0, CosineSchedule())
    (weight,) = weights(kind, coordinate("log_sigma"), [now], now, then)
    assert math.isfinite(weight) and math.isfinite(kind.keep(now, then))
    assert np.isfinite(kind.reading(now)).all() and np.isfinite(EpsilonForm().reading(now)).all()


def test_levels_that_coincide_count_once():
    nodes = [node(1.0), node(1.0), node(2.0)]
    found = weights(EpsilonForm(), coordinate("sigma"), nodes, nodes[0], node(0.5))
    once = weights(EpsilonForm(), coordinate("sigma"), [nodes[0], nodes[2]], nodes[0], node(0.5))
    assert found == [once[0], 0.0, once[1]]
    assert weights(EpsilonForm(), coordinate("sigma"), [nodes[0], nodes[2]], nodes[0], nodes[1]) == [0.0, 0.0]


def test_fresh_noise_goes_with_x0_only():
    with pytest.raises(ValueError, match="goes with the form x0, got 'trig'"):
        form("trig", eta=1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_noise_of_the_reverse_sde_keeps_the_spread_of_noise(schedule):
    """Pure noise stays of spread sigma: keep^2 sigma^2 + fresh^2 = sigma'^2."""
    now, then, kind = node(3.0, schedule), node(0.7, schedule), X0Form(eta=0.6)
    total = math.hypot(kind.keep(now, then) * now.sigma, kind.fresh(now, then))
    assert total == pytest.approx(then.sigma, rel=1e-14)
