"""Conditioners: from the fields of a batch to a :class:`Conditioning`, with its null made explicitly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vdiff.first_stages import FirstStage
from vdiff.process import Conditioning
from vdiff.registry import Registered, did_you_mean

# What collation adds to a batch and no embedder reads.
KEYS = ("noise_key", "position", "global_size", "seed", "step", "index")


@dataclass(frozen=True, eq=False)
class Embedding:
    """What one embedder says under one name.

    Attributes:
        tensor: ``(B, ...)``.
        mask: Which of its entries count, ``(B, n)``, True counts; None: all of them.
    """

    tensor: Tensor
    mask: Tensor | None = None

    def where(self, kept: Tensor, other: Embedding) -> Embedding:
        """This where ``kept``, ``(B,)``, is True, and ``other`` in the rows where it is not."""
        tensor = torch.where(kept[(...,) + (None,) * (self.tensor.ndim - 1)], self.tensor, other.tensor)
        if self.mask is None and other.mask is None:
            return Embedding(tensor)
        return Embedding(tensor, torch.where(kept[:, None], self.counts, other.counts))

    @property
    def counts(self) -> Tensor:
        """The mask, written out, ``(B, n)``."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tensor.shape[:2], dtype=torch.bool, device=self.tensor.device)


Feeds = dict[str, Embedding]
"""Embeddings by the name in the conditioning that they feed."""


class Embedder(Registered, nn.Module, kind="embedder"):
    """One field of the batch -> one embedding, or several under different names.

    Args:
        reads: The batch field.
        feeds: The name in the conditioning: ``cross_attention``, ``vector``, ``concat``, ``label``, ...
        drop: Probability with which training replaces a row's embedding by the null, see :meth:`dropped`.
        null: What the null is: ``zero``, ``learned`` where the embedder can learn one, ``empty``, the embedding
            of the empty prompt, where it reads text, or ``same``, the embedding itself: guidance leaves it alone, and
            training drops it to zero.

    Attributes:
        choices: All values that a row of the field may have, where they can be counted.
        is_picture: Whether a row of the field is a picture, ``(c, h, w)``.
        default: The value of every row where a batch has no such field; None: there must be one.
    """

    has_empty: ClassVar[bool] = False
    choices: Sequence[Any] | None = None
    is_picture: bool = False
    default: Any = None

    def __init__(
        self, reads: str, feeds: str, drop: float = 0.0, null: Literal["zero", "learned", "empty", "same"] = "zero"
    ) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise ValueError(f"{type(self).__name__}: drop is a probability, got {drop}.")
        if null == "learned" and type(self).null is Embedder.null:
            raise ValueError(f"{type(self).__name__}: learns no null; use null: zero.")
        if null == "empty" and not self.has_empty:
            raise ValueError(f"{type(self).__name__}: reads no text and has no empty prompt; use null: zero.")
        self.reads, self.feeds, self.drop, self.null_kind = reads, feeds, drop, null

    @abstractmethod
    def forward(self, value: Any) -> Tensor | Embedding | Mapping[str, Tensor | Embedding]:
        """The embedding of a batch field, ``(B, ...)``; with a mask as an :class:`Embedding`; several by name."""

    def null(self, like: Tensor) -> Tensor:
        """The embedding that says nothing, in the shape of ``like``, an embedding of B rows."""
        return torch.zeros_like(like)

    def read(self, batch: Mapping[str, Any], is_training: bool = False) -> Any:
        """What :meth:`forward` is given: the field. An embedder that needs more of the batch overrides it.

        Args:
            is_training: Whether the conditioner trains; a frozen embedder itself is in eval mode all the same.

        Raises:
            KeyError: the batch has no such field, and there is no default.
        """
        if self.reads not in batch and self.default is not None:
            value = torch.as_tensor(self.default, dtype=torch.float32)
            return value.expand(num_rows(batch, f"{type(self).__name__}: {self.reads!r}"), *value.shape)
        if self.reads not in batch:
            fields = [name for name in batch if name not in KEYS]
            raise KeyError(
                f"{type(self).__name__} reads {self.reads!r}, which this batch has not."
                f"{did_you_mean(self.reads, fields)} It has: {', '.join(fields) or 'nothing else'}."
            )
        return batch[self.reads]

    def with_null(self, value: Any) -> tuple[Feeds, Feeds]:
        """The embedding and its null, under the same names. Where both come out of one network, this is the place
        to ask it once."""
        said = self.named(self(value))
        return said, said if self.null_kind == "same" else self.silent(said)

    def dropped(self, said: Feeds, null: Feeds) -> Feeds:
        """What training puts in place of rows that it drops: the null, or :meth:`silent` where that is the embedding
        itself."""
        return self.silent(said) if self.null_kind == "same" else null

    def silent(self, said: Feeds) -> Feeds:
        """:meth:`null` under every name."""
        return {name: self._null(one) for name, one in said.items()}

    def _null(self, said: Embedding) -> Embedding:
        null = Embedding(self.null(said.tensor))
        # It counts in full: attention to nothing at all has no value.
        return null if said.mask is None else Embedding(null.tensor, null.counts)

    def share(self, first_stage: FirstStage) -> None:
        """Called by an engine with its own first stage, for embedders that may go through it."""

    def check(self, batch: Mapping[str, Any]) -> None:
        """Called by an engine with fields that a user gives it from Python, where they are; by default they will do.

        Raises:
            ValueError: this one's is of another type or shape, or its values are no pixels. Values are looked at where
                they are on the host.
        """

    def named(self, said: Tensor | Embedding | Mapping[str, Tensor | Embedding]) -> Feeds:
        """What :meth:`forward` gave, in its longest form."""
        by_name = said if isinstance(said, Mapping) else {self.feeds: said}
        return {n: one if isinstance(one, Embedding) else Embedding(one) for n, one in by_name.items()}

    def parse(self, word: str) -> Any:
        """The value of one row of the field, from a word on the command line.

        Raises:
            ValueError: a word cannot say it, or not this one.
        """
        raise ValueError(f"{type(self).__name__} takes no words; hand {self.reads!r} to engine.sample from Python.")


def num_rows(batch: Mapping[str, Any], who: str) -> int:
    """How many rows a batch has, by its keys or else by its fields.

    Raises:
        ValueError: nothing tells, or fields differ.
    """
    if "noise_key" in batch:
        return len(batch["noise_key"])
    rows = {name: len(value) for name, value in batch.items() if name not in KEYS and _has_rows(value)}
    if len(set(rows.values())) != 1:
        said = ", ".join(f"{name} {count}" for name, count in rows.items()) or "no other field tells"
        raise ValueError(f"{who} has a default for every row, and how many there are is not clear: {said}. Give it.")
    return next(iter(rows.values()))


def _has_rows(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list | tuple)


def is_on_host(value: Tensor) -> bool:
    """Whether values may be looked at without waiting for a device."""
    return value.device.type == "cpu"


def check_is_tensor(value: Any, field: str, wanted: str) -> None:
    """That a field is a tensor.

    Raises:
        ValueError: it is an array, a list or what else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{field!r} holds {wanted} as a tensor, and a {type(value).__name__} came. Arrays: torch.from_numpy(x); "
            "a list of tensors: torch.stack(x)."
        )


class Conditioner(Registered, nn.Module, kind="conditioner"):
    """``conditioner(batch) -> Conditioning``."""

    def fields(self, feeds: str | None = None) -> list[str]:
        """The batch fields that it cannot do without; of these, where given, those that feed one name."""
        return []

    def check(self, batch: Mapping[str, Any]) -> None:
        """See :meth:`Embedder.check`."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        """The conditions of a batch, and their null; in training with rows dropped by their keys."""
