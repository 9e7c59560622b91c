"""Classifier-free guidance that takes the direction from null to condition apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.process import Parameterization, Prediction, VelocityParameterization, X0Parameterization
from vdiff.samplers.guidance_ranges import check_language
from vdiff.samplers.guiders import Answers, Guidance, Guider, away_from_null
from vdiff.samplers.plan import Node

X0, VELOCITY = X0Parameterization(), VelocityParameterization()


class APGGuider(Guider, name="apg"):
    r"""Adaptive projected guidance: :math:`c + (w - 1)(g_\perp + \eta\,g_\parallel)`, parts of g across and along c.

    :math:`g = c - u`, to which the g of the calls before is added with weight ``momentum``, then shortened to
    ``norm_threshold``. What lies along c saturates. With eta 1, no momentum and no threshold it is ``cfg``.

    Args:
        scale: The :math:`w` above; 1 is the plain conditional prediction. A list gives each sample its own.
        eta: The :math:`\eta` above.
        momentum: Usually negative, such as -0.5: away from where the last call went.
        norm_threshold: Largest norm of g, over all of a sample; None: any.
        language: In which it acts; by default x0, as in the paper.
        batched: See :class:`CFGGuider`.

    References:
        Sadat et al., arXiv:2410.02416, algorithm 1.
    """

    def __init__(
        self,
        scale: float | list[float] = 4.0,
        eta: float = 0.0,
        momentum: float = 0.0,
        norm_threshold: float | None = None,
        language: Parameterization | None = None,
        batched: bool = True,
    ) -> None:
        if norm_threshold is not None and norm_threshold <= 0:
            raise ValueError(f"APGGuider: norm_threshold must be positive or None, got {norm_threshold}.")
        self.scale, self.eta, self.momentum, self.norm_threshold = scale, eta, momentum, norm_threshold
        self.language, self.batched = language or X0, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        check_language(self, self.language, nodes)
        return [away_from_null(self.scale) for _ in nodes]

    def combine(self, answers: Answers) -> Prediction:
        if "null" not in answers.weights:
            return answers["cond"]
        cond = answers["cond"].to(self.language)
        g = cond - answers["null"].to(self.language)
        if self.momentum:
            if (before := answers.memory.get("apg_momentum")) is not None:
                g = g + self.momentum * before
            answers.memory["apg_momentum"] = g
        if self.norm_threshold is not None:
            g = g * (self.norm_threshold / _dot(g, g).sqrt().clamp(min=self.norm_threshold))
        along = _dot(g, cond) / _dot(cond, cond).clamp(min=1e-24) * cond
        value = cond + (answers.weights["cond"] - 1) * (g + (self.eta - 1) * along)
        return answers.prediction(value, self.language)


class CFGPPGuider(Guider, name="cfg_pp"):
    r"""CFG++: x0 is guided, the noise that goes on is the unconditional one.

    :math:`\hat x_0 = u + \lambda (c - u)`, then on to the next level with the noise of u. It says so in
    ``Prediction.renoise``, so every solver does it. Each call pushes x by :math:`\alpha\lambda (c - u)` whatever the
    length of its step, so a share belongs to a number of steps.

    Args:
        share: The :math:`\lambda` above, in [0, 1]; 0.6 does about what ``cfg`` does at 7.5. 1 is not the plain
            prediction: the noise is still the unconditional one.
        batched: See :class:`CFGGuider`.

    References:
        Chung et al., arXiv:2406.08070, algorithm 2.
    """

    def __init__(self, share: float = 0.6, batched: bool = True) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"CFGPPGuider: share is the lambda of the paper, in [0, 1]; got {share}. For w use cfg.")
        self.share, self.batched = share, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        weights = {"cond": self.share, "null": 1 - self.share} if self.share else {"null": 1.0}
        return [Guidance(weights) for _ in nodes]

    def combine(self, answers: Answers) -> Prediction:
        if "cond" not in answers.weights:
            return answers["null"]
        cond, null = answers["cond"].x0, answers["null"].x0
        return answers.prediction(torch.lerp(null, cond, answers.weights["cond"]), X0, renoise=null)


class CFGZeroStarGuider(Guider, name="cfg_zero_star"):
    r"""CFG-Zero*: the null is scaled to fit the condition, :math:`s u + w (c - s u)`, and the first calls stand still.

    :math:`s = \langle c, u \rangle / \|u\|^2`. c and u are velocities, :math:`dx_t/dt`, whatever the network speaks;
    a call that stands still says velocity 0 and asks no network.

    Args:
        scale: The :math:`w` above; 1 is the plain conditional prediction after the zero calls. A list gives each
            sample its own.
        num_zero: How many calls stand still (the paper's zero-init: 1).
        batched: See :class:`CFGGuider`.

    References:
        Fan et al., arXiv:2503.18886, algorithm 1.
    """

    def __init__(self, scale: float | list[float] = 4.0, num_zero: int = 1, batched: bool = True) -> None:
        if num_zero < 0:
            raise ValueError(f"CFGZeroStarGuider: num_zero must not be negative, got {num_zero}.")
        self.scale, self.num_zero, self.batched = scale, num_zero, batched

    def plan(self, nodes: Sequence[Node]) -> list[Guidance]:
        check_language(self, VELOCITY, nodes)
        return [Guidance({}) if call < self.num_zero else away_from_null(self.scale) for call in range(len(nodes))]

    def combine(self, answers: Answers) -> Prediction:
        if not answers.weights:
            return answers.prediction(torch.zeros_like(answers.x_t), VELOCITY)
        if "null" not in answers.weights:
            return answers["cond"]
        cond, null = answers["cond"].to(VELOCITY), answers["null"].to(VELOCITY)
        null = _dot(cond, null) / (_dot(null, null) + 1e-8) * null  # the constant of the authors' code
        return answers.prediction(torch.lerp(null, cond, answers.weights["cond"]), VELOCITY)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over all of a sample, with the axes of ``a``."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)
