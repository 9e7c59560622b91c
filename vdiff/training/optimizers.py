"""Optimizers: torch's own, as recipes that wait for their parameters.

A config says which one and with what numbers; the trainer calls it with parameter groups. Fused
kernels are used where the device has them: on one machine they are bitwise repeatable, and equal to
the unfused formulas up to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vdiff.registry import Registered

ParamGroup = dict[str, Any]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Optimizer(Registered, kind="optimizer"):
    """A recipe for a ``torch.optim.Optimizer``.

    Attributes:
        lr: Learning rate of groups that do not set their own.
        weight_decay: Of groups that do not set their own.
    """

    lr: float
    weight_decay: float

    @abstractmethod
    def __call__(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """The optimizer of these groups, each ``{"params": [...]}`` with ``lr`` or ``weight_decay`` of its own."""


class AdamW(Optimizer, name="adamw"):
    """Adam with weight decay apart from the gradient.

    References:
        Loshchilov and Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        _check(self, lr, weight_decay)
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps

    def __call__(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps, **kernels(groups)
        )


class Adam(Optimizer, name="adam"):
    """Adam; weight decay, if any, is added to the gradient.

    References:
        Kingma and Ba, arXiv:1412.6980.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        _check(self, lr, weight_decay)
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps

    def __call__(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            groups, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps, **kernels(groups)
        )


class SGD(Optimizer, name="sgd"):
    """Stochastic gradient descent with momentum."""

    def __init__(
        self, lr: float = 1e-2, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        _check(self, lr, weight_decay)
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov

    def __call__(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            **kernels(groups),
        )


def kernels(groups: list[ParamGroup]) -> dict[str, bool]:
    """``fused`` where every parameter lies on a device that has such kernels, else ``foreach``."""
    params = list(_params(groups))
    is_fusable = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in params)
    return {"fused": True} if is_fusable else {"foreach": True}


def optimizer_memory(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What an optimizer remembers, tensors and numbers, as ``"denoiser.network.out.weight/exp_avg"``."""
    memory = {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    tensors = {name: value for name, value in memory.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in memory.items() if isinstance(value, int | float)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], memory: Mapping[str, Tensor | float]
) -> None:
    """Put back what :func:`optimizer_memory` took; every value on its parameter's device.

    Raises:
        ValueError: it is of other parameters.
    """
    state: dict[str, dict[str, Any]] = {}
    for name, value in memory.items():
        param, _, key = name.rpartition("/")
        state.setdefault(param, {})[key] = value
    order = [names[p] for p in _params(optimizer.param_groups)]
    if odd := sorted(set(state) - set(order)):
        raise ValueError(
            f"optimizer: the checkpoint knows {len(odd)} parameters that are not trained now: {', '.join(odd[:4])}. "
            "Resume with the `train:` of the run, or start a new run from its weights with `init:`."
        )
    saved = optimizer.state_dict()
    saved["state"] = {i: state[name] for i, name in enumerate(order) if name in state}
    optimizer.load_state_dict(saved)


def _params(groups: list[ParamGroup]) -> Iterator[Tensor]:
    return (param for group in groups for param in group["params"])


def _check(recipe: Optimizer, lr: float, weight_decay: float) -> None:
    name = type(recipe).__name__
    if not lr >= 0 or not weight_decay >= 0:
        raise ValueError(f"{name}: lr and weight_decay must be 0 or more, got {lr} and {weight_decay}.")
