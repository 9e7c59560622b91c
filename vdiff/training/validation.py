"""Validation: the same inputs under the same noise, raw and averaged, so that figures differ by the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.data import Dataset, Loader
from vdiff.networks import in_eval
from vdiff.process import forked
from vdiff.training.ema import EMA
from vdiff.training.figures import Means

MoveBatch = Callable[[Mapping[str, Any]], dict[str, Any]]

Autocast = Callable[[], AbstractContextManager[Any]]


class Validation:
    """When and on how much.

    Args:
        every: Steps between validations; the last step is always validated.
        num_batches: Of the size of a training step; fewer if the data has fewer.
        seed: Fixes which examples and which noise, over all steps and runs.
        num_pictures: Columns of the picture, see :meth:`vdiff.engine.Engine.pictures`; 0 draws none. Of joint samples
            as many whole groups as fit, and one at least.
    """

    def __init__(self, every: int = 500, num_batches: int = 4, seed: int = 0, num_pictures: int = 8) -> None:
        if every < 1 or num_batches < 1 or num_pictures < 0:
            raise ValueError(
                f"validation: every and num_batches must be at least 1 and num_pictures at least 0, "
                f"got {every}, {num_batches} and {num_pictures}."
            )
        self.every, self.num_batches, self.seed, self.num_pictures = every, num_batches, seed, num_pictures

    def loader(self, dataset: Dataset, batch_size: int) -> Loader:
        """Batches for validation; a set smaller than a batch is one batch."""
        return Loader(dataset, min(batch_size, len(dataset)), seed=self.seed)

    @torch.no_grad()
    def figures(
        self,
        engine: nn.Module,
        loader: Loader,
        move: MoveBatch,
        ema: EMA | None = None,
        autocast: Autocast = nullcontext,
    ) -> dict[str, float]:
        """``validation/loss`` and metrics, and ``validation/ema/...`` if there is an average."""
        out = self._figures(engine, loader, move, autocast, "validation")
        if ema is not None:
            with ema.applied(engine):
                out |= self._figures(engine, loader, move, autocast, "validation/ema")
        return out

    def _figures(
        self, engine: nn.Module, loader: Loader, move: MoveBatch, autocast: Autocast, name: str
    ) -> dict[str, float]:
        means = Means()
        num = min(self.num_batches, len(loader.dataset) // loader.batch_size)
        with in_eval(engine):
            for number in range(num):
                with forked(self.seed, "validation", number), autocast():
                    values = engine(move(loader.batch(number)))
                means.add({"loss": values.per_row, **values.metrics})
        return {f"{name}/{key}": value for key, value in means.read().items()}

    @torch.no_grad()
    def picture(
        self, engine: Any, loader: Loader, move: MoveBatch, ema: EMA | None = None, autocast: Autocast = nullcontext
    ) -> Any:
        """The engine's rows of pictures under each other, as a PIL image, or those of videos as a list of frames;
        None if the data are neither."""
        from vdiff.evaluation import titled_film, titled_rows

        batch = move(loader.batch(0))
        pixels: Any = batch.get(getattr(engine, "input_key", ""))
        if not self.num_pictures or not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            return None
        if pixels.shape[1] not in (1, 3):
            return None
        batch = _rows(batch, len(pixels), self.num_pictures)
        averaged: AbstractContextManager[None] = nullcontext() if ema is None else ema.applied(engine)
        with averaged, in_eval(engine), forked(self.seed, "picture"), autocast():
            rows = engine.pictures(batch, self.seed)
        if not rows:
            return None
        low, high = engine.first_stage.pixel_range
        draw = titled_rows if pixels.ndim == 4 else titled_film
        return draw({title: images.float().cpu() for title, images in rows.items()}, low, high)


def _rows(batch: Mapping[str, Any], size: int, num: int) -> dict[str, Any]:
    """The first ``num`` rows of a batch, or fewer, so that none is without its partners; the first group at least."""
    partner = batch.get("partner")
    if partner is not None:
        reach = partner.reshape(size, -1).amax(1).cummax(0).values.tolist()  # how far the first rows' partners go
        ends = [end for end in range(1, size + 1) if reach[end - 1] < end]
        num = max((end for end in ends if end <= num), default=ends[0])
    return {k: v[:num] if isinstance(v, Tensor | list) and len(v) == size else v for k, v in batch.items()}
