"""Samples made jointly: an image and its edges, say, both anew or one to fit the other.

A group is one such sample, its streams are what belongs together. Rows are those of training: the streams of a group
are adjacent, each with the next of its group as partner, and with noise of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vdiff.data.collate import noise_key
from vdiff.denoisers import Denoiser
from vdiff.engine import Batch, DiffusionEngine
from vdiff.networks import in_eval
from vdiff.pipelines.images import encoded
from vdiff.process import HOST, Conditioning, NoiseLevel, Prediction, spread
from vdiff.samplers import Callback, Edit, Guider, Inpainting, Sampler, in_turn


def streams_of(fields: Batch | None = None, streams: int = 2, num: int | None = None) -> Batch:
    """The batch fields of B groups as those of their ``B * streams`` rows, with ``stream`` and ``partner``.

    Args:
        fields: One entry per group each, tensors or lists, such as ``{"label": [3, 7]}``.
        streams: How many there are.
        num: B, where no field tells.
    """
    fields = {} if fields is None else fields
    counts = {name: len(values) for name, values in fields.items()} | ({} if num is None else {"num": num})
    if len(set(counts.values())) != 1 or streams < 2:
        said = ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"
        raise ValueError(f"joint sampling: it takes two streams or more, here {streams}, of as many groups: {said}.")
    groups = next(iter(counts.values()))
    stream = torch.arange(streams).repeat(groups)
    partner = torch.arange(groups * streams) - stream + (stream + 1) % streams
    group = torch.arange(groups).repeat_interleave(streams)
    rows = {
        name: values[group.to(values.device)] if isinstance(values, Tensor) else [values[i] for i in group.tolist()]
        for name, values in fields.items()
    }
    return {**rows, "stream": stream, "partner": partner}


@torch.no_grad()
def sample_pairs(
    engine: DiffusionEngine,
    cond: Batch | Conditioning | None = None,
    *,
    num: int | None = None,
    streams: int = 2,
    weights: Tensor | None = None,
    mixin: str = "joint_attention",
    seeds: int | Sequence[int] = 0,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
    edit: Edit | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """All streams of every group, made together.

    Args:
        engine: With joint attention attached, trained on groups (:class:`~vdiff.data.JointDataset`).
        cond: Batch fields, one entry per group; or a conditioning of all ``B * streams`` rows, partners included.
        num: How many groups, where ``cond`` does not tell.
        streams: How many rows a group has, as in training; each has the next as its partner, around.
        weights: How much is heard of the partner: ``(B,)`` by group or ``(B, streams)`` by row; by default 1.
        mixin: Name of the joint attention, which ``weights`` are for.
        seeds: One per group, or the first of consecutive ones. The first stream has the noise that a sample of its own
            with that seed would have.
        sampler, guider, edit, callback, progress: See :meth:`DiffusionEngine.sample`; rows are group by group.

    Returns:
        Pixels, ``(B, streams, c, ...)``.
    """
    told = _told(engine, cond, num, streams, weights, mixin)
    out = engine.sample(
        told,
        seeds=_seeds(seeds, told.num_rows or 0, streams),
        sampler=sampler,
        guider=guider,
        edit=edit,
        callback=callback,
        progress=progress,
    )
    return out.unflatten(0, (-1, streams))


@torch.no_grad()
def complete(
    engine: DiffusionEngine,
    given: Mapping[int, Tensor],
    cond: Batch | Conditioning | None = None,
    *,
    streams: int = 2,
    how: Literal["held", "along"] = "held",
    held_at: float = 0.01,
    weights: Tensor | None = None,
    mixin: str = "joint_attention",
    seeds: int | Sequence[int] = 0,
    sampler: Sampler | None = None,
    guider: Guider | None = None,
    edit: Edit | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """The streams that are not given, made to fit those that are: an image for these edges, or the edges of an image.

    Args:
        engine: See :func:`sample_pairs`.
        given: By number of the stream its pixels, ``(B, c, ...)``, in the first stage's range.
        how: ``held``: a given stream is shown with hardly any noise all the way, which a model can read that was
            trained with a level of its own for each stream. ``along``: it walks down beside the others, with the
            noise it began with (:class:`~vdiff.samplers.Inpainting`).
        held_at: The quantile of the levels of training at which it is held.
        cond, streams, weights, mixin, seeds, sampler, guider, edit, callback, progress: See :func:`sample_pairs`.

    Returns:
        Pixels, ``(B, streams, c, ...)``, the given ones as they came.

    References:
        Li et al., arXiv:2410.11439, section 3.3, for levels apart.
    """
    if how not in ("held", "along"):
        raise ValueError(f"complete: how must be 'held' or 'along', got {how!r}.")
    pixels = _placed(given, streams).to(engine.device)
    told = _told(engine, cond, len(pixels), streams, weights, mixin)
    seeds = _seeds(seeds, told.num_rows or 0, streams)
    is_given = torch.tensor([s in given for s in range(streams)], device=engine.device).repeat(len(pixels))
    x0 = encoded(engine, pixels.flatten(0, 1))
    noise = engine.noise(x0.shape[1:], seeds)
    keep = Inpainting(x0, spread(~is_given, x0))
    denoiser: Denoiser = engine.denoiser
    if how == "held":
        low = engine.sigma_sampler.quantile(torch.tensor([held_at], **HOST), engine.schedule).to(torch.float32)
        denoiser = HeldRows(denoiser, x0, noise, is_given, low.to(engine.device))
    with in_eval(engine):
        made = (sampler or engine.sampler)(
            denoiser,
            engine.schedule,
            noise,
            told,
            guider=guider or engine.guider,
            seeds=seeds,
            x0=torch.where(spread(is_given, x0), x0, 0) if how == "along" else None,
            edit=keep if edit is None else in_turn(edit, keep),
            callback=callback,
            progress=progress,
        )
        out = engine.first_stage.decode(made)
    return torch.where(spread(is_given, out), pixels.flatten(0, 1).to(out), out).unflatten(0, (-1, streams))


class HeldRows(Denoiser, abstract=True):
    """A denoiser that sees some rows at a level of their own, whatever level the walk is at.

    What it says of those rows is about what it saw; an :class:`~vdiff.samplers.Inpainting` puts them right.

    Args:
        denoiser: Whom it asks.
        x0, noise: What the rows hold, ``(B, ...)``; the others are not looked at.
        is_held: Which rows, ``(B,)``.
        level: At which level, ``(1,)``.
    """

    def __init__(self, denoiser: Denoiser, x0: Tensor, noise: Tensor, is_held: Tensor, level: NoiseLevel) -> None:
        super().__init__()
        self.denoiser, self.language = denoiser, denoiser.language
        self.is_held, self.level, self.seen = is_held, level, level.mix(x0, noise)

    def forward(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning | None = None) -> Prediction:
        branches = len(x_t) // len(self.is_held)  # a guider's, one after the other
        is_held, seen = self.is_held.repeat(branches), torch.cat([self.seen] * branches).to(x_t)
        x = torch.where(spread(is_held, x_t), seen, x_t)
        own = [getattr(level, name) for name in ("t", "alpha", "sigma", "d_alpha", "d_sigma")]
        low = [getattr(self.level, name) for name in ("t", "alpha", "sigma", "d_alpha", "d_sigma")]
        mixed = NoiseLevel(*(torch.where(spread(is_held, a), b.to(a), a) for a, b in zip(own, low, strict=True)))
        said = self.denoiser(x, mixed, cond)
        return Prediction(said.language, said.value, x_t, level)

    def prepared(self, cond: Conditioning) -> Conditioning:
        return self.denoiser.prepared(cond)

    def check(self, level: NoiseLevel, where: str) -> None:
        self.denoiser.check(level, where)


def _told(
    engine: DiffusionEngine,
    cond: Batch | Conditioning | None,
    num: int | None,
    streams: int,
    weights: Tensor | None,
    mixin: str,
) -> Conditioning:
    """The conditions of all rows, with partners."""
    if not isinstance(cond, Conditioning):
        _check_streams(engine, streams)
    with in_eval(engine):
        told = engine.conditions(cond if isinstance(cond, Conditioning) else streams_of(cond, streams, num))
    rows = told.num_rows or 0
    if told.partners is None or rows % streams or num not in (None, rows // streams):
        raise ValueError(
            f"joint sampling: a conditioning of {rows} rows{'' if told.partners is not None else ' without partners'} "
            f"for {'groups' if num is None else f'{num} groups'} of {streams} streams. Hand over the batch fields of "
            "the groups instead, or conditions of all rows that name their partners."
        )
    if weights is None:
        return told
    if tuple(weights.shape) not in ((rows // streams,), (rows // streams, streams)):
        raise ValueError(
            f"joint sampling: weights of shape {tuple(weights.shape)} for {rows // streams} groups of {streams} "
            "streams; they are one number per group, or per row of each group."
        )
    by_row = weights if weights.ndim == 2 else weights[:, None].expand(-1, streams)
    return told.gated(rows, **{mixin: by_row.reshape(-1).float().to(engine.device)})


def _check_streams(engine: DiffusionEngine, streams: int) -> None:
    """The gates of the conditioner know some of the streams, so that there are at least so many."""
    gates: Mapping[str, dict] = getattr(engine.conditioner, "gates", {})
    for name, rule in gates.items():
        last = max((value for value in rule.get("stream", ()) if isinstance(value, int)), default=0)
        if last >= streams:
            raise ValueError(
                f"joint sampling: the gate of {name!r} knows stream {last}, and {streams} streams end before it: say "
                f"streams={last + 1}, or as many as a group of training has. For other groups hand over the conditions "
                "of all rows."
            )


def _seeds(seeds: int | Sequence[int], rows: int, streams: int) -> list[int]:
    groups = rows // streams
    first = list(range(seeds, seeds + groups)) if isinstance(seeds, int) else list(seeds)
    if len(first) != groups:
        raise ValueError(f"joint sampling: {len(first)} seeds for {groups} groups; each group has one.")
    return [noise_key(seed, stream) for seed in first for stream in range(streams)]


def _placed(given: Mapping[int, Tensor], streams: int) -> Tensor:
    """The given pixels in a batch of all rows, ``(B, streams, c, ...)``; zeros where a stream is to be made."""
    if not given or len(given) >= streams or not all(0 <= stream < streams for stream in given):
        raise ValueError(
            f"complete: give some of the streams 0 to {streams - 1} and leave at least one to be made; given are "
            f"{sorted(given)}."
        )
    first = next(iter(given))
    like = given[first]
    for stream, pixels in given.items():
        if pixels.shape != like.shape:
            raise ValueError(
                f"complete: stream {stream} is {tuple(pixels.shape)} and stream {first} {tuple(like.shape)}; rows that "
                "look at each other are rows of one batch."
            )
    return torch.stack([given.get(stream, torch.zeros_like(like)) for stream in range(streams)], dim=1)
