"""What happens to tensors between two layouts besides a new name; each with its way back, and bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Change(ABC):
    """From some tensors to some others."""

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    @property
    @abstractmethod
    def inverse(self) -> Change: ...


@dataclass(frozen=True)
class Same(Change):
    """As they are."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @property
    def inverse(self) -> Change:
        return self


@dataclass(frozen=True)
class Split(Change):
    """One tensor into ``parts`` along an axis, such as a fused projection into q, k and v.

    Attributes:
        length: Of a piece, where parts take turns: q, k and v of the first head, then of the next. None: each part
            lies in one piece.
    """

    parts: int
    dim: int = 0
    length: int | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (tensor,) = tensors
        length = self.length or tensor.shape[self.dim] // self.parts
        pieces = tensor.unflatten(self.dim, (-1, self.parts, length)).unbind(self.dim + 1)
        return tuple(piece.flatten(self.dim, self.dim + 1) for piece in pieces)

    @property
    def inverse(self) -> Change:
        return Join(self.parts, self.dim, self.length)


@dataclass(frozen=True)
class Join(Change):
    """The way back of :class:`Split`."""

    parts: int
    dim: int = 0
    length: int | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        length = self.length or tensors[0].shape[self.dim]
        pieces = [tensor.unflatten(self.dim, (-1, length)) for tensor in tensors]
        return (torch.stack(pieces, self.dim + 1).flatten(self.dim, self.dim + 2),)

    @property
    def inverse(self) -> Change:
        return Split(self.parts, self.dim, self.length)


@dataclass(frozen=True)
class DropOnes(Change):
    """Without ``num`` axes of length 1 at the end of what has them: a 1 x 1 convolution becomes a linear layer.

    A bias has none, and stays.
    """

    num: int = 2

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.flatten(1) if x.ndim == 2 + self.num else x for x in tensors)

    @property
    def inverse(self) -> Change:
        return AddOnes(self.num)


@dataclass(frozen=True)
class AddOnes(Change):
    """The way back of :class:`DropOnes`, of matrices."""

    num: int = 2

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.reshape(*x.shape, *[1] * self.num) if x.ndim == 2 else x for x in tensors)

    @property
    def inverse(self) -> Change:
        return DropOnes(self.num)


@dataclass(frozen=True)
class Unfold(Change):
    """The columns of a matrix as several axes, ``(n, c * k) -> (n, c, *sizes)``: of patches, a convolution.

    Attributes:
        sizes: Of the axes behind c, k in all; none leaves the matrix as it is. The way back flattens in either case.
    """

    sizes: tuple[int, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(1, (-1, *self.sizes)) if self.sizes and x.ndim == 2 else x for x in tensors)

    @property
    def inverse(self) -> Change:
        return Fold(self.sizes)


@dataclass(frozen=True)
class Fold(Change):
    """The way back of :class:`Unfold`."""

    sizes: tuple[int, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.flatten(1) if x.ndim > 2 else x for x in tensors)

    @property
    def inverse(self) -> Change:
        return Unfold(self.sizes)


@dataclass(frozen=True)
class Reorder(Change):
    """Pieces of equal length along an axis in another order: piece i is what was piece ``order[i]``."""

    order: tuple[int, ...]
    dim: int = 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (tensor,) = tensors
        pieces = tensor.chunk(len(self.order), self.dim)
        return (torch.cat([pieces[i] for i in self.order], self.dim),)

    @property
    def inverse(self) -> Change:
        return Reorder(tuple(self.order.index(i) for i in range(len(self.order))), self.dim)


@dataclass(frozen=True)
class Transpose(Change):
    """Rows for columns."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.t().contiguous() for x in tensors)

    @property
    def inverse(self) -> Change:
        return self


@dataclass(frozen=True)
class Tied(Change):
    """``num`` names of one tensor become one."""

    num: int = 2

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, *others = tensors
        if not first.is_meta and not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"{self.num} tensors {tuple(first.shape)} should be one under {self.num} names, and differ."
            )
        return (first,)

    @property
    def inverse(self) -> Change:
        return Shared(self.num)


@dataclass(frozen=True)
class Shared(Change):
    """The way back of :class:`Tied`."""

    num: int = 2

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors * self.num

    @property
    def inverse(self) -> Change:
        return Tied(self.num)


@dataclass(frozen=True)
class InTurn(Change):
    """One change after the other."""

    changes: tuple[Change, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for change in self.changes:
            tensors = change(*tensors)
        return tensors

    @property
    def inverse(self) -> Change:
        return InTurn(tuple(change.inverse for change in reversed(self.changes)))


@dataclass(frozen=True)
class Made(Change):
    """Nothing into a tensor that one layout has and a formula tells; the way back leaves it out."""

    make: Callable[[], Tensor]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (self.make(),)

    @property
    def inverse(self) -> Change:
        return LeftOut(self.make)


@dataclass(frozen=True)
class LeftOut(Change):
    """The way back of :class:`Made`."""

    make: Callable[[], Tensor]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return ()

    @property
    def inverse(self) -> Change:
        return Made(self.make)
