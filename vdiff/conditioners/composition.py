"""The conditioner of embedders: each reads its field, and what feeds one name is joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.conditioners.base import Conditioner, Embedder, Embedding, Feeds
from vdiff.process import Conditioning, RowKeys, upload

# How two embeddings that feed the same name are joined: the axis of (B, ...), -1 the last.
JOINED_ALONG = {"vector": -1, "cross_attention": 2, "concat": 1}


class EmbedderConditioner(Conditioner, name="embedders"):
    """Runs one embedder per field and composes them by the names they feed.

    Embeddings that feed the same name are joined in the order of the embedders: ``vector`` and
    ``cross_attention`` along features, ``concat`` along channels. A vector of the whole row, ``(B, c)``, joins one of
    each frame, ``(B, F, c)``, in every frame. Of tokens joined along features, those count that count in any of them.

    Args:
        embedders: In the order in which they are joined.
        joint_drop: Exclusive outcomes that drop several fields at once, such as
            ``[{probability: 0.05, drop: [caption]}, {probability: 0.05, drop: [caption, image]}]``
            (InstructPix2Pix, arXiv:2211.09800); on top of each embedder's own ``drop``. A word there is a field, and
            all embedders that read it lose it; or, to tell apart several that read one field, a name that is fed, and
            those that feed it do. One that is both is a field.
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

    def _outcome(self, row: Mapping[str, Any]) -> tuple[float, frozenset[int]]:
        """The probability of an outcome, and which embedders lose their rows in it, by place."""
        if set(row) != {"probability", "drop"}:
            raise ValueError(f"EmbedderConditioner.joint_drop: a row has probability and drop, got {sorted(row)}.")
        fields, names = ([getattr(e, kind) for e in self.embedders] for kind in ("reads", "feeds"))
        if unknown := set(row["drop"]) - {*fields, *names}:
            raise ValueError(
                f"EmbedderConditioner.joint_drop: no embedder reads or feeds {sorted(unknown)}. "
                f"Fields: {_listed(fields)}. Names that are fed: {_listed(names)}."
            )
        meant = (fields if word in fields else names for word in row["drop"])
        lost = {i for word, known in zip(row["drop"], meant, strict=True) for i, k in enumerate(known) if k == word}
        return float(row["probability"]), frozenset(lost)

    def fields(self, feeds: str | None = None) -> list[str]:
        needed = (e for e in self.embedders if e.default is None and feeds in (None, e.feeds))
        return list(dict.fromkeys(e.reads for e in needed))  # type: ignore[misc]

    def check(self, batch: Mapping[str, Any]) -> None:
        for embedder in self.embedders:
            if embedder.reads in batch:
                embedder.check(batch)  # type: ignore[operator]

    def forward(self, batch: Mapping[str, Any]) -> Conditioning:
        drops = self.training and (self.joint_drop or any(e.drop for e in self.embedders))
        keys = RowKeys.of(batch) if drops else None
        kept = self._kept(keys) if keys is not None else []
        said: dict[str, list[Embedding]] = {}
        silent: dict[str, list[Embedding]] = {}
        rows: dict[str, int] = {}
        for place, embedder in enumerate(self.embedders):
            assert isinstance(embedder, Embedder)
            values, nulls = embedder.with_null(embedder.read(batch, self.training))
            for name, null in nulls.items():
                rows[embedder.reads] = len(null.tensor)
                silent.setdefault(name, []).append(null)
            if keys is not None:
                _same_rows({"keys": len(keys.keys)} | rows)
                values = _where(kept[place], values, embedder.dropped(values, nulls))
            for name, value in values.items():
                said.setdefault(name, []).append(value)
        _same_rows(rows)
        null, partners = self._joined(silent), batch.get("partner")
        gates = {name: _gate(name, rule, batch, [*rows.values()]) for name, rule in self._rules.items()}
        return self._joined(said).with_(null=null if said else None, gates=gates, partners=partners)

    def _joined(self, parts: Mapping[str, list[Embedding]]) -> Conditioning:
        joined = {name: _join(name, embeddings, self.along.get(name)) for name, embeddings in parts.items()}
        masks = {name: one.mask for name, one in joined.items() if one.mask is not None}
        return Conditioning({name: one.tensor for name, one in joined.items()}, masks)

    def _kept(self, keys: RowKeys) -> list[Tensor]:
        """Which rows keep what each embedder says, by their keys; bool ``(B,)`` on the host."""
        kept = [self._keeps(embedder, keys) for embedder in self.embedders]  # type: ignore[arg-type]
        if self.joint_drop:
            outcome, edge = keys.uniform("drop/joint"), 0.0
            for probability, places in self.joint_drop:
                is_another = (outcome < edge) | (outcome >= edge + probability)
                edge += probability
                for place in places:
                    kept[place] = kept[place] & is_another
        return kept

    def _keeps(self, embedder: Embedder, keys: RowKeys) -> Tensor:
        if embedder.drop == 0:
            return torch.ones(len(keys.keys), dtype=torch.bool)
        return keys.uniform(f"drop/{embedder.reads}/{embedder.feeds}") >= embedder.drop


def _where(kept: Tensor, values: Feeds, others: Feeds) -> Feeds:
    return {name: value.where(upload(kept, value.tensor.device), others[name]) for name, value in values.items()}


def _listed(words: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(words))


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
