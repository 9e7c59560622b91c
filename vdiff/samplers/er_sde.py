r"""Extended reverse-time SDE: how much fresh noise is a function of the level, chosen freely.

For any growing :math:`\phi` with :math:`\phi(r)/r` not falling, in the ratio :math:`r = \sigma/\alpha`,

.. math:: x'/\alpha' = \tfrac{\phi'}{\phi}\,x/\alpha + \phi' \int m\,d(1/\phi) + \sqrt{r'^2 - (r\,\phi'/\phi)^2}\;z

has the marginals of the forward process, with :math:`m` what the network says of x0. :math:`\phi = r` is the
probability flow and :math:`\phi = r^2` the reverse SDE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from vdiff.process import Discretizer
from vdiff.samplers import quadrature
from vdiff.samplers.multistep import MultistepSampler
from vdiff.samplers.noise import NoiseSource
from vdiff.samplers.plan import Node
from vdiff.samplers.quadrature import Form, X0Form

ScalerName = Literal["er", "sde", "ode"]


class ExtendedForm(X0Form):
    r"""x0 under the measure of a noise scaler.

    Args:
        scaler: :math:`\phi`: ``er`` is the paper's choice, :math:`r(e^{r^{0.3}} + 10)`; ``sde`` and ``ode`` see above.
    """

    def __init__(self, scaler: ScalerName = "er") -> None:
        super().__init__(eta=0.0)
        self.scaler = scaler

    def surplus(self, log_ratio: np.ndarray) -> np.ndarray:
        r""":math:`\log(\phi(r)/r)`."""
        if self.scaler == "er":
            return np.logaddexp(np.exp(0.3 * log_ratio), math.log(10.0))
        return log_ratio if self.scaler == "sde" else np.zeros_like(log_ratio)

    def fall(self, now: Node, then: Node) -> float:
        r""":math:`(\phi'/\phi)(r/r')`, at most 1."""
        if now.ratio == then.ratio:
            return 1.0
        if not math.isfinite(now.ratio) or not then.sigma:
            return 0.0 if self.scaler != "ode" else 1.0
        high, low = self.surplus(np.log([now.ratio, then.ratio]))
        return math.exp(low - high)

    def keep(self, now: Node, then: Node) -> float:
        return super().keep(now, then) * self.fall(now, then)

    def total(self, now: Node, then: Node) -> float:
        return then.alpha * (1.0 - quadrature.shrink(now, then) * self.fall(now, then))

    def fresh(self, now: Node, then: Node) -> float:
        return then.sigma * math.sqrt(max(0.0, 1.0 - self.fall(now, then) ** 2))

    def density(self, log_ratio: np.ndarray, then: Node) -> np.ndarray:
        own, end = self.surplus(log_ratio), self.surplus(np.array(math.log(then.ratio)))
        if self.scaler == "er":
            root = np.exp(0.3 * log_ratio)
            slope = 0.3 * root * np.exp(root - own)  # of the surplus, per unit of log r
        else:
            slope = np.full_like(log_ratio, float(self.scaler == "sde"))
        return then.alpha * (1.0 + slope) * np.exp(math.log(then.ratio) - log_ratio + end - own)


class ERSDESampler(MultistepSampler, name="er_sde"):
    """ER-SDE-Solver: x0 as a polynomial in sigma / alpha, and less fresh noise where it does the least good.

    The published code takes the last difference for the slope at the newest level, which lowers the order of its
    third by one; here the polynomial through all answers is integrated exactly. The step into data is what the network
    says.

    Args:
        order: 1 to 3.
        scaler: How much fresh noise: ``er`` as recommended, ``sde`` the reverse SDE, ``ode`` none.
        num_steps, discretizer, noise_source, init: See :class:`Sampler`.

    References:
        Cui et al., arXiv:2309.06169, propositions 1 and 2, algorithms 1 to 3; the scaler is their ER-SDE 5.
    """

    max_order = 3

    def __init__(
        self,
        num_steps: int = 30,
        order: int = 3,
        scaler: ScalerName = "er",
        discretizer: Discretizer | None = None,
        noise_source: NoiseSource | None = None,
        init: Literal["sigma", "vp"] | float = "sigma",
    ) -> None:
        super().__init__(
            ExtendedForm(scaler),
            quadrature.coordinate("sigma"),
            order,
            num_steps=num_steps,
            discretizer=discretizer,
            noise_source=noise_source,
            init=init,
        )

    def weights(self, form: Form, nodes: Sequence[Node], now: Node, then: Node) -> Sequence[float]:
        nodes = nodes if then.sigma else nodes[:1]
        return super().weights(form, nodes, now, then)
