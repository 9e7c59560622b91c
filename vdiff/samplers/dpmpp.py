"""DPM-Solver++ and its kin: x0 as a polynomial in the logarithm of the signal-to-noise ratio, one call a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from vdiff.process import Discretizer
from vdiff.samplers import quadrature
from vdiff.samplers.multistep import MultistepSampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node
from vdiff.samplers.quadrature import Form, X0Form


class X0MultistepSampler(MultistepSampler, abstract=True):
    """A multistep solver that interpolates x0 in log(sigma / alpha), with fresh noise if ``eta`` is not 0."""

    def __init__(
        self,
        order: int,
        corrector: int = 0,
        lower_order_final: bool = False,
        eta: float = 0.0,
        *,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        if eta < 0:
            raise ValueError(f"{type(self).__name__}: eta must not be negative, got {eta}.")
        super().__init__(
            X0Form(eta),
            quadrature.coordinate("log_sigma"),
            order,
            corrector,
            lower_order_final,
            num_steps=num_steps,
            discretizer=discretizer,
            noise_source=noise_source,
            init=init,
        )


class DPMpp2MSampler(X0MultistepSampler, name="dpmpp_2m"):
    """Second order with one call a step: x0 is extrapolated from the last two answers.

    The first step, a step from pure noise and the step into data are of first order.

    Args:
        variant: ``midpoint`` takes x0 at the middle of the step, ``heun`` integrates its line exactly.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Lu et al., arXiv:2211.01095, algorithm 2.
    """

    def __init__(
        self,
        num_steps: int = 30,
        variant: Literal["midpoint", "heun"] = "midpoint",
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(2, num_steps=num_steps, discretizer=discretizer, init=init)
        self.variant = variant

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        if self.variant == "midpoint":
            return two_node_weights(form, nodes, now, then, form.total(now, then) / 2)
        return super().weights(form, nodes, now, then)


class DPMpp3MSampler(X0MultistepSampler, name="dpmpp_3m"):
    """Third order with one call a step.

    Args:
        variant: ``exact``; ``legacy`` has half the weight on the second difference, as the published code, and is
            of second order, but steadier below 16 steps.
        lower_order_final: Never use more nodes than steps are left.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Lu et al., arXiv:2211.01095, appendix B.
    """

    def __init__(
        self,
        num_steps: int = 30,
        variant: Literal["exact", "legacy"] = "exact",
        lower_order_final: bool = False,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            3, lower_order_final=lower_order_final, num_steps=num_steps, discretizer=discretizer, init=init
        )
        self.variant = variant

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        exact = super().weights(form, nodes, now, then)
        return halved_second_difference(form, exact, nodes, now, then) if self.variant == "legacy" else exact


class RES2MSampler(X0MultistepSampler, name="res_2m"):
    """The refined exponential solver with two nodes, which is ``dpmpp_2m`` in its variant ``heun``.

    Args:
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhang et al., arXiv:2308.02157.
    """

    def __init__(
        self,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(2, num_steps=num_steps, discretizer=discretizer, init=init)


class RES3MSampler(X0MultistepSampler, name="res_3m"):
    """The refined exponential solver with three nodes, which is ``dpmpp_3m`` in its variant ``exact``.

    Args:
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhang et al., arXiv:2308.02157.
    """

    def __init__(
        self,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(3, num_steps=num_steps, discretizer=discretizer, init=init)


class UniPCSampler(X0MultistepSampler, name="unipc"):
    """UniPC: a corrector that costs no call raises the order by one, to ``order + 1``.

    The variants differ in rules of two nodes only; the larger ones are exact in all of them.

    Args:
        order: Nodes of the predictor: 1 to 3.
        variant: ``bh2`` or ``bh1`` of the paper (bh1 is of first order into data, where the published one is not
            finite), or ``exact``.
        lower_order_final: Never use more nodes than steps are left, as released pipelines do.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhao et al., arXiv:2302.04867, algorithms 1 and 2.
    """

    max_order = 3

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 2,
        variant: Literal["bh1", "bh2", "exact"] = "bh2",
        lower_order_final: bool = True,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(order, order + 1, lower_order_final, num_steps=num_steps, discretizer=discretizer, init=init)
        self.variant = variant

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        if len(nodes) != 2 or self.variant == "exact":
            return super().weights(form, nodes, now, then)
        half = form.total(now, then) / 2
        if self.variant == "bh1":
            half = then.alpha * (then.log_snr_half - now.log_snr_half) / 2
        return two_node_weights(form, nodes, now, then, half)


def two_node_weights(form: Form, nodes: Sequence[Node], now: Node, then: Node, half: float) -> list[float]:
    """The answer at ``now``, and ``half`` times how much x0 changes over the step by the line through the nodes.

    Of first order where that line is not finite: from pure noise, or after it, or into data.
    """
    total = form.total(now, then)
    if len(nodes) == 1:
        return [total]
    (base,) = [i for i, node in enumerate(nodes) if node.ratio == now.ratio]
    apart = now.log_snr_half - nodes[1 - base].log_snr_half
    width = then.log_snr_half - now.log_snr_half
    other = -half * width / apart if math.isfinite(width) and math.isfinite(apart) else 0.0
    return [total - other, other] if base == 0 else [other, total - other]


def halved_second_difference(
    form: Form, exact: Sequence[float], nodes: Sequence[Node], now: Node, then: Node
) -> list[float]:
    """The weights of DPM-Solver++ (3M) as published, whose second difference lacks a factor of two."""
    rate = 1 + form.eta if isinstance(form, X0Form) else 1.0
    width = then.log_snr_half - now.log_snr_half
    places = [node.log_snr_half for node in nodes]
    if len(nodes) < 3 or not all(map(math.isfinite, (width, *places))) or width == 0:
        return list(exact)
    whole = rate * width
    phi_3 = 0.5 - (1 + math.expm1(-whole) / whole) / whole
    half = then.alpha * phi_3 * width**2
    # Newton's second divided difference, as weights of the three answers.
    difference = [1 / math.prod(own - other for other in places if other != own) for own in places]
    return [weight - half * part for weight, part in zip(exact, difference, strict=True)]
