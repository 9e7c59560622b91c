"""Conditioners: from the fields of a batch to a :class:`Conditioning`, with its null made explicitly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.process import Conditioning, RowKeys, upload
from vdiff.registry import Registered

# How two embeddings that feed the same name are joined: the axis of (B, ...).
JOINED_ALONG = {"vector": 1, "cross_attention": 2, "concat": 1}


class Embedder(Registered, nn.Module, kind="embedder"):
    """One field of the batch -> one embedding.

    Args:
        reads: The batch field.
        feeds: The name in the conditioning: ``cross_attention``, ``vector``, ``concat``, ``label``, ...
        drop: Probability with which training replaces a row's embedding by the null.
        null: What the null is: ``zero``, or ``learned`` where the embedder can learn one.
    """

    def __init__(self, reads: str, feeds: str, drop: float = 0.0, null: Literal["zero", "learned"] = "zero") -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise ValueError(f"{type(self).__name__}: drop is a probability, got {drop}.")
        if null == "learned" and type(self).null is Embedder.null:
            raise ValueError(f"{type(self).__name__}: learns no null; use null: zero.")
        self.reads, self.feeds, self.drop, self.null_kind = reads, feeds, drop, null

    @abstractmethod
    def forward(self, value: Any) -> Tensor:
        """The embedding of a batch field, ``(B, ...)``."""

    def null(self, like: Tensor) -> Tensor:
        """The embedding that says nothing, in the shape of ``like``, an embedding of B rows."""
        return torch.zeros_like(like)


class Conditioner(Registered, nn.Module, kind="conditioner"):
    """``conditioner(batch) -> Conditioning``."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        """The conditions of a batch, and their null; in training with rows dropped by their keys."""


class EmbedderConditioner(Conditioner, name="embedders"):
    """Runs one embedder per field and composes them by the names they feed.

    Embeddings that feed the same name are joined: ``vector`` and ``cross_attention`` along features,
    ``concat`` along channels.

    Args:
        embedders: In the order in which they are joined.
        joint_drop: Exclusive outcomes that drop several fields at once, such as
            ``[{probability: 0.05, drop: [caption]}, {probability: 0.05, drop: [caption, image]}]``
            (InstructPix2Pix, arXiv:2211.09800); on top of each embedder's own ``drop``.

    A batch field ``partner`` (see :func:`vdiff.data.collate`) becomes the conditioning's ``partners``.
    """

    def __init__(self, embedders: Sequence[Embedder] = (), joint_drop: Sequence[dict] = ()) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(embedders)
        self.joint_drop = [self._outcome(row) for row in joint_drop]
        shares = [probability for probability, _ in self.joint_drop]
        if min(shares, default=0) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                "EmbedderConditioner: the probabilities of joint_drop are at least 0 and add up to at most 1, "
                f"got {shares}."
            )

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
        said: dict[str, list[Tensor]] = {}
        silent: dict[str, list[Tensor]] = {}
        for embedder in self.embedders:
            assert isinstance(embedder, Embedder)
            if embedder.reads not in batch:
                raise KeyError(
                    f"{type(embedder).__name__} reads {embedder.reads!r}, which this batch has not. "
                    f"It has: {', '.join(batch)}."
                )
            value = embedder(batch[embedder.reads])
            null = embedder.null(value)
            if keys is not None:
                dropped = upload(self._dropped(embedder, keys), value.device)
                value = torch.where(dropped[(...,) + (None,) * (value.ndim - 1)], null, value)
            said.setdefault(embedder.feeds, []).append(value)
            silent.setdefault(embedder.feeds, []).append(null)
        null = Conditioning({name: _join(name, parts) for name, parts in silent.items()})
        tensors = {name: _join(name, parts) for name, parts in said.items()}
        return Conditioning(tensors, null=null if said else None, partners=batch.get("partner"))

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


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if name not in JOINED_ALONG:
        raise ValueError(f"conditioner: {len(parts)} embedders feed {name!r}, which takes one.")
    axis = JOINED_ALONG[name]
    try:
        return torch.cat(parts, axis)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(p.shape)) for p in parts)
        raise ValueError(
            f"conditioner: embeddings that feed {name!r} do not join along axis {axis}: {shapes}."
        ) from error
