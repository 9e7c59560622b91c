"""A tensor in the place of a module's parameter, while the parameter stays what it is and where it is.

Python looks at an instance's attributes before :class:`nn.Module` is asked for its parameters, so an attribute of the
same name stands in front of one. The parameter remains registered, the same object with the same values: state dicts,
optimizers, averages, wrappers for several devices and other modules that share it go on as if nothing stood there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def own(host: nn.Module, name: str = "weight") -> Tensor:
    """The host's own parameter, whatever stands in its place; of a parametrised one, what it is now."""
    parameter = host._parameters.get(name)
    return getattr(host, name) if parameter is None else parameter


def stand_in(host: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Let ``value`` stand in the place of a parameter. It is in no state dict, and has no gradient."""
    assert host._parameters.get(name) is not None, f"{type(host).__name__} has no parameter {name!r}"
    vars(host)[name] = nn.Parameter(value, requires_grad=False)


def stand_down(host: nn.Module) -> None:
    """Let a module be its own parameters again."""
    for name in host._parameters.keys() & vars(host).keys():
        del vars(host)[name]


def move_stand_ins(host: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """What :meth:`nn.Module._apply` does to parameters, for what stands in their place."""
    for name in host._parameters.keys() & vars(host).keys():
        stand_in(host, function(vars(host)[name].data), name)


class Same:
    """Equal to another where both hold one tensor in one version; holding it keeps its identity unique."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = 0 if tensor.is_inference() else tensor._version

    @staticmethod
    def of(tensor: Tensor | None) -> Same | None:
        return None if tensor is None else Same(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.tensor is other.tensor and self.version == other.version

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> Any:  # noqa: ANN401
        return self.tensor

    def __setstate__(self, tensor: Tensor) -> None:  # a copy counts its versions anew
        self.__init__(tensor)  # type: ignore[misc]
