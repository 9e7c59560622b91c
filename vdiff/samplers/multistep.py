r"""Linear multistep solvers: one call a step, the order from what was said before.

All of them are one walk. At each level the network's answer joins those stored; a corrector may first redo
the previous step with the new answer among its nodes, at no further call, by adding the difference of the
two rules' weights to the state; then the predictor steps on. A solver is its weights: those of
:mod:`~vdiff.samplers.quadrature` for a form and a coordinate, or a published table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from vdiff.process import Discretizer, NoiseSchedule
from vdiff.samplers import quadrature
from vdiff.samplers.base import Sampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node, Stage
from vdiff.samplers.quadrature import Coordinate, CoordinateName, EpsilonForm, Form, FormName, X0Form


class MultistepSampler(Sampler, abstract=True):
    """The walk of every multistep solver; a subclass may override :meth:`weights`.

    The first steps are of lower order, for want of history. A level visited twice is remembered once.

    Args:
        form: What is interpolated.
        coordinate: In which variable.
        order: Nodes of the predictor.
        corrector: Nodes of the corrector, the newest included; 0 is none.
        lower_order_final: Never use more nodes than steps are left.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.
    """

    max_order = 4

    def __init__(
        self,
        form: Form,
        coordinate: Coordinate,
        order: int,
        corrector: int = 0,
        lower_order_final: bool = False,
        *,
        num_steps: int = 30,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(num_steps, discretizer, noise_source, init)
        if not 1 <= order <= self.max_order:
            raise ValueError(f"{type(self).__name__}: order must lie in 1 ... {self.max_order}, got {order}.")
        if corrector not in (0, *range(2, order + 2)):
            raise ValueError(
                f"{type(self).__name__}: a corrector has 2 to {order + 1} nodes, one more than the order at most, "
                f"or is 0 for none; got {corrector}."
            )
        self.form, self.coordinate = form, coordinate
        self.order, self.corrector, self.lower_order_final = order, corrector, lower_order_final

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        """The weights of the outputs at ``nodes`` for the step from ``now`` to ``then``.

        Args:
            form: The sampler's own, or x0 from pure noise where its own is not finite.
            nodes: Newest first. Those of a predictor begin with ``now``, those of a corrector with ``then``.
            now, then: Both ends of the step.
        """
        return quadrature.weights(form, self.coordinate, nodes, now, then)

    def plan(self, nodes: Sequence[Node], schedule: NoiseSchedule) -> Iterable[Stage]:
        past: list[Node] = []  # levels whose answers are stored, newest first
        last: tuple[Node, list[float]] | None = None  # where the previous step began, and its weights
        depth = self.order if self.corrector else self.order - 1  # a corrector takes back what was predicted
        for i, (now, then) in enumerate(pairwise(nodes)):
            known = [now, *past]
            current = self.form if self.form.is_finite_at(now) else X0Form()
            keep = current.keep(now, then)
            order = min(self.order, len(nodes) - 1 - i) if self.lower_order_final else self.order
            predictor = list(self.weights(current, known[:order], now, then))
            shares = predictor + [0.0] * (len(known) - len(predictor))  # one per known answer, newest first
            if last is not None:
                shares = [s + keep * c for s, c in zip(shares, self._correction(known, *last), strict=True)]
            update = {"x": keep}
            for age, (node, share) in enumerate(zip(known, shares, strict=True)):
                on_x, on_x0 = current.reading(node)
                for name, part in ((_stored("x", age), on_x), (_stored("x0", age), on_x0)):
                    if share and part or name == "x0":
                        update[name] = update.get(name, 0.0) + share * part
            fresh = current.fresh(now, then) if isinstance(current, X0Form) else 0.0
            if fresh:
                update["noise"] = fresh
            if now.ratio == then.ratio:
                yield Stage(now, update)
                last = None
                continue
            yield Stage(now, update, store=self._shift(min(depth, len(known))))
            past = known[:depth]
            last = (now, predictor) if self.corrector and math.isfinite(now.ratio) else None

    def _correction(self, known: Sequence[Node], start: Node, predictor: Sequence[float]) -> list[float]:
        """What the corrector adds to the state at ``known[0]``, per known answer."""
        size = min(self.corrector, len(predictor) + 1)
        corrector = self.weights(self.form, known[:size], start, known[0])
        out = [*corrector] + [0.0] * (len(known) - size)
        for age, weight in enumerate(predictor, 1):
            out[age] -= weight
        return out

    def _shift(self, depth: int) -> dict[str, str]:
        names = ("x0", "x") if self.form.reads_state else ("x0",)
        return {_stored(name, age): _stored(name, age - 1) for name in names for age in range(1, depth + 1)}


def _stored(name: str, age: int) -> str:
    return f"{name}_{age}" if age else name


class ABSampler(MultistepSampler, name="ab"):
    """Adams and Bashforth in any form and coordinate, by exact quadrature; with a corrector, Adams and Moulton.

    Args:
        form: ``x0``, ``epsilon``, ``velocity`` (of the straight flow) or ``trig`` (EDM's own output).
        coordinate: ``log_sigma``, ``sigma``, ``sigma_root`` (the ramp of the Karras levels) or ``angle``.
        order: 1 to 4.
        corrector: Nodes of the corrector, the newest included, up to ``order + 1``; 0 is none.
        lower_order_final: Never use more nodes than steps are left.
        rho: Of ``sigma_root``.
        sigma_data: Of ``trig`` and ``angle``.
        eta: Fresh noise, with the form ``x0``: 1 is the reverse SDE.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Zhang & Chen, arXiv:2204.13902, eq. 14; Zhao et al., arXiv:2302.04867 (the corrector).
    """

    def __init__(
        self,
        num_steps: int = 30,
        form: FormName = "epsilon",
        coordinate: CoordinateName = "sigma_root",
        order: int = 4,
        corrector: int = 0,
        lower_order_final: bool = False,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        eta: float = 0.0,
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            quadrature.form(form, eta, sigma_data),
            quadrature.coordinate(coordinate, rho, sigma_data),
            order,
            corrector,
            lower_order_final,
            num_steps=num_steps,
            discretizer=discretizer,
            noise_source=noise_source,
            init=init,
        )


class LMSSampler(MultistepSampler, name="lms"):
    """The linear multistep method of k-diffusion: the noise as a polynomial in sigma / alpha.

    Args:
        order: 1 to 4.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Crowson, k-diffusion.
    """

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 4,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            EpsilonForm(),
            quadrature.coordinate("sigma"),
            order,
            num_steps=num_steps,
            discretizer=discretizer,
            init=init,
        )


class DEISSampler(MultistepSampler, name="deis"):
    r"""DEIS in :math:`\log(\sigma/\alpha)`: the noise as a polynomial in it.

    Args:
        order: 1 to 4.
        lower_order_final: Never use more nodes than steps are left.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Zhang & Chen, arXiv:2204.13902, eq. 15 (:math:`\rho`\ AB in the logarithm, as diffusers has it).
    """

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 3,
        lower_order_final: bool = False,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            EpsilonForm(),
            quadrature.coordinate("log_sigma"),
            order,
            lower_order_final=lower_order_final,
            num_steps=num_steps,
            discretizer=discretizer,
            init=init,
        )


class IPNDMSampler(MultistepSampler, name="ipndm"):
    """Improved PNDM: the weights of an even grid, whatever the levels are.

    Of its order on levels even in sigma / alpha, of second order at most on other smooth grids; and yet among the
    best of all below ten calls.

    Args:
        order: 1 to 4.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Liu et al., arXiv:2202.09778, eq. 12; Zhang & Chen, arXiv:2204.13902, appendix.
    """

    table = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 3,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            EpsilonForm(),
            quadrature.coordinate("sigma"),
            order,
            num_steps=num_steps,
            discretizer=discretizer,
            init=init,
        )

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        total = form.total(now, then)
        return [total * share for share in self.table[len(nodes) - 1]]


class GradientEstimationSampler(MultistepSampler, name="gradient_estimation"):
    r"""DDIM along :math:`\gamma\,\epsilon_i + (1 - \gamma)\,\epsilon_{i-1}`: away from what was said before.

    Of first order, but the error of few steps is small; 3/2 is ``ipndm`` of order 2.

    Args:
        gamma: The :math:`\gamma` above; 1 is DDIM.
        num_steps, discretizer, init: See :class:`Sampler`.

    References:
        Permenter & Yuan, arXiv:2306.04848, algorithm 2.
    """

    def __init__(
        self,
        num_steps: int = 30,
        gamma: float = 2.0,
        discretizer: Discretizer | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        coordinate = quadrature.coordinate("sigma")
        super().__init__(EpsilonForm(), coordinate, 2, num_steps=num_steps, discretizer=discretizer, init=init)
        self.gamma = gamma

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        total = form.total(now, then)
        return [total] if len(nodes) == 1 else [total * self.gamma, total * (1 - self.gamma)]
