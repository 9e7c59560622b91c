"""Conditioners: from the fields of a batch to a :class:`Conditioning`, with its null made explicitly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vdiff.first_stages import FirstStage
from vdiff.process import Conditioning, RowKeys, upload
from vdiff.registry import Registered, did_you_mean

# How two embeddings that feed the same name are joined: the axis of (B, ...), -1 the last.
JOINED_ALONG = {"vector": -1, "cross_attention": 2, "concat": 1}


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
        drop: Probability with which training replaces a row's embedding by the null.
        null: What the null is: ``zero``, ``learned`` where the embedder can learn one, ``empty``, the embedding
            of the empty prompt, where it reads text, or ``same``, the embedding itself: guidance leaves it alone.

    Attributes:
        choices: All values that a row of the field may have, where they can be counted.
    """

    has_empty: ClassVar[bool] = False
    choices: Sequence[Any] | None = None

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
        if null == "same" and drop:
            raise ValueError(f"{type(self).__name__}: with null: same there is nothing to drop to; use drop: 0.")
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
            KeyError: the batch has no such field.
        """
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
        if self.null_kind == "same":
            return said, said
        return said, {name: self._null(one) for name, one in said.items()}

    def _null(self, said: Embedding) -> Embedding:
        null = Embedding(self.null(said.tensor))
        # It counts in full: attention to nothing at all has no value.
        return null if said.mask is None else Embedding(null.tensor, null.counts)

    def share(self, first_stage: FirstStage) -> None:
        """Called by an engine with its own first stage, for embedders that may go through it."""

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


class Conditioner(Registered, nn.Module, kind="conditioner"):
    """``conditioner(batch) -> Conditioning``."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        """The conditions of a batch, and their null; in training with rows dropped by their keys."""


class EmbedderConditioner(Conditioner, name="embedders"):
    """Runs one embedder per field and composes them by the names they feed.

    Embeddings that feed the same name are joined in the order of the embedders: ``vector`` and
    ``cross_attention`` along features, ``concat`` along channels. A vector of the whole row, ``(B, c)``, joins one of
    each frame, ``(B, F, c)``, in every frame. Of tokens joined along features, those count that count in any of them.

    Args:
        embedders: In the order in which they are joined.
        joint_drop: Exclusive outcomes that drop several fields at once, such as
            ``[{probability: 0.05, drop: [caption]}, {probability: 0.05, drop: [caption, image]}]``
            (InstructPix2Pix, arXiv:2211.09800); on top of each embedder's own ``drop``.
        along: Other axes to join along, by name: ``{cross_attention: 1}`` puts tokens one after the other.
        gates: Which rows a mixin acts in, by its name: ``{y_lora: {stream: 1}}`` turns it on where the batch field
            ``stream`` is 1 and off where it is not; ``{stream: [1, 2]}`` lists several. A batch without the field
            counts as one that holds 0 everywhere, as collation counts streams.

    A batch field ``partner`` (see :func:`vdiff.data.collate`) becomes the conditioning's ``partners``.
    """

    def __init__(
        self,
        embedders: Sequence[Embedder] = (),
        joint_drop: Sequence[dict] = (),
        along: Mapping[str, int] | None = None,
        gates: Mapping[str, dict] | None = None,
    ) -> None:
        super().__init__()
        self.gates = dict(gates or {})
        self.embedders = nn.ModuleList(embedders)
        self.along = JOINED_ALONG | dict(along or {})
        if wrong := {name: axis for name, axis in (along or {}).items() if axis < 1}:
            raise ValueError(f"EmbedderConditioner: along counts axes after the rows, from 1, got {wrong}.")
        self.joint_drop = [self._outcome(row) for row in joint_drop]
        shares = [probability for probability, _ in self.joint_drop]
        if min(shares, default=0) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                "EmbedderConditioner: the probabilities of joint_drop are at least 0 and add up to at most 1, "
                f"got {shares}."
            )

    @property
    def gates(self) -> dict[str, dict]:
        """Which rows each mixin acts in, as given; to be set as a whole, where mixins come and go."""
        return {name: {field: list(values)} for name, (field, values) in self._rules.items()}

    @gates.setter
    def gates(self, gates: Mapping[str, dict]) -> None:
        self._rules = {name: _rule(name, rule) for name, rule in gates.items()}

    def _outcome(self, row: Mapping[str, Any]) -> tuple[float, frozenset[str]]:
        if set(row) != {"probability", "drop"}:
            raise ValueError(f"EmbedderConditioner.joint_drop: a row has probability and drop, got {sorted(row)}.")
        unknown = set(row["drop"]) - {e.reads for e in self.embedders}  # type: ignore[union-attr]
        if unknown:
            fields = ", ".join(str(e.reads) for e in self.embedders)
            raise ValueError(f"EmbedderConditioner.joint_drop: no embedder reads {sorted(unknown)}. Fields: {fields}.")
        return float(row["probability"]), frozenset(row["drop"])

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        drops = self.training and (self.joint_drop or any(e.drop for e in self.embedders))
        keys = RowKeys.of(batch) if drops else None
        said: dict[str, list[Embedding]] = {}
        silent: dict[str, list[Embedding]] = {}
        rows: dict[str, int] = {}
        for embedder in self.embedders:
            assert isinstance(embedder, Embedder)
            values, nulls = embedder.with_null(embedder.read(batch, self.training))
            kept = None
            for name, value in values.items():
                rows[embedder.reads] = len(value.tensor)
                if keys is not None:
                    _same_rows({"keys": len(keys.keys)} | rows)
                    kept = upload(~self._dropped(embedder, keys), value.tensor.device) if kept is None else kept
                    value = value.where(kept, nulls[name])
                said.setdefault(name, []).append(value)
                silent.setdefault(name, []).append(nulls[name])
        _same_rows(rows)
        null, partners = self._joined(silent), batch.get("partner")
        gates = {name: _gate(name, rule, batch, [*rows.values()]) for name, rule in self._rules.items()}
        return self._joined(said).with_(null=null if said else None, gates=gates, partners=partners)

    def _joined(self, parts: Mapping[str, list[Embedding]]) -> Conditioning:
        joined = {name: _join(name, embeddings, self.along.get(name)) for name, embeddings in parts.items()}
        masks = {name: one.mask for name, one in joined.items() if one.mask is not None}
        return Conditioning({name: one.tensor for name, one in joined.items()}, masks)

    def _dropped(self, embedder: Embedder, keys: RowKeys) -> Tensor:
        """Which rows lose this field, by their keys; bool ``(B,)`` on the host."""
        dropped = keys.uniform(f"drop/{embedder.reads}/{embedder.feeds}") < embedder.drop
        if self.joint_drop:
            outcome, edge = keys.uniform("drop/joint"), 0.0
            for probability, fields in self.joint_drop:
                if embedder.reads in fields:
                    dropped = dropped | ((outcome >= edge) & (outcome < edge + probability))
                edge += probability
        return dropped


def _rule(name: str, rule: Mapping[str, Any]) -> tuple[str, tuple]:
    """The field that a gate reads, and the values at which it is open."""
    if len(rule) != 1:
        raise ValueError(
            f"EmbedderConditioner.gates: {name!r} needs one field and its value, such as {{stream: 1}}, got {rule!r}."
        )
    ((field, values),) = rule.items()
    return field, tuple(values) if isinstance(values, list | tuple) else (values,)


def _gate(name: str, rule: tuple[str, tuple], batch: Mapping[str, Any], rows: list[int]) -> Tensor:
    """1 in the rows in which a mixin acts and 0 in the others, ``(B,)``."""
    field, values = rule
    if field in batch:
        held = batch[field]
        if isinstance(held, Tensor):
            return torch.stack([held == value for value in values]).any(0).float()
        return torch.tensor([float(one in values) for one in held])
    if not rows:
        raise ValueError(
            f"conditioner: the gate of {name!r} reads {field!r}, and this batch has neither that nor another field "
            f"that tells its rows. It has: {', '.join(batch) or 'nothing'}."
        )
    return torch.full((rows[0],), float(0 in values))


def _same_rows(rows: Mapping[str, int]) -> None:
    if len(set(rows.values())) > 1:
        said = ", ".join(f"{field} {count}" for field, count in rows.items())
        raise ValueError(f"conditioner: every field needs one value per row, and they differ in number: {said}.")


def _join(name: str, parts: list[Embedding], axis: int | None) -> Embedding:
    if len(parts) == 1:
        return parts[0]
    if axis is None:
        raise ValueError(f"conditioner: {len(parts)} embedders feed {name!r}, which takes one.")
    try:
        tensors = [one.tensor for one in parts]
        tensor = torch.cat(_in_every_frame(tensors) if name == "vector" else tensors, axis)
        if all(one.mask is None for one in parts):
            return Embedding(tensor)
        masks = [one.counts for one in parts]
        return Embedding(tensor, torch.cat(masks, 1) if axis == 1 else torch.stack(masks).any(0))
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(str(tuple(one.tensor.shape)) for one in parts)
        raise ValueError(
            f"conditioner: embeddings that feed {name!r} do not join along axis {axis}: {shapes}."
        ) from error


def _in_every_frame(tensors: list[Tensor]) -> list[Tensor]:
    """Vectors ``(B, c)`` as ``(B, F, c)`` where another is so."""
    frames = next((len(x[0]) for x in tensors if x.ndim == 3), None)
    return [x[:, None].expand(-1, frames, -1) if x.ndim == 2 and frames else x for x in tensors]
