"""The loader: batches by number.

Batch ``n`` is a pure function of ``n``, the seed and the data set. Resuming needs one integer, the
optimizer's step; the number of workers changes when a batch is ready and never what is in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch.utils.data

from vdiff.data.base import Dataset
from vdiff.data.collate import Batch, collate
from vdiff.data.order import index
from vdiff.process import derive, generator


class Loader:
    """Random access to the batches of a run.

    The examples form one endless stream, epoch after epoch, each in an order of its own; step ``s``
    consumes examples ``s * batch_size`` to ``(s + 1) * batch_size - 1`` of it. A batch may span two
    epochs, so nothing is dropped at the end of one. An example's noise key is its place in the stream.

    Args:
        dataset: Examples by number.
        batch_size: Examples per optimizer step, over all ranks and accumulation steps. A preference pair is
            one example and two rows.
        seed: Of the run; decides the order and is handed on for the noise.
        accumulate: Micro-batches per optimizer step.
        num_workers: Processes that prepare batches ahead; 0 prepares them when asked.
        shuffle: Whether each epoch has an order of its own; otherwise examples come by number.
        rank, world_size: This process among those that share the work.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        accumulate: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"Loader: {type(dataset).__name__} is no vdiff.data.Dataset. Derive from that instead of torch's: "
                "__len__ and __getitem__ stay, and `ranges` declares the lowest and highest value of each field."
            )
        if len(dataset) == 0:
            raise ValueError(f"Loader: {type(dataset).__name__} has no examples ({dataset.num_dropped} were dropped).")
        if min(batch_size, accumulate, world_size) < 1 or num_workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"Loader: batch_size {batch_size}, accumulate {accumulate} and world_size {world_size} must be at "
                f"least 1, num_workers {num_workers} at least 0, and rank {rank} below world_size."
            )
        if batch_size % (accumulate * world_size):
            raise ValueError(
                f"Loader: batch_size counts all ranks and accumulation steps, and {batch_size} does not divide into "
                f"{accumulate} micro-batches on {world_size} ranks. Use a multiple of {accumulate * world_size}."
            )
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.accumulate, self.num_workers = accumulate, num_workers
        self.rank, self.world_size = rank, world_size

    @property
    def micro_size(self) -> int:
        """Examples in one micro-batch of this rank."""
        return self.batch_size // (self.accumulate * self.world_size)

    def epoch_at(self, step: int) -> float:
        """Epochs consumed before ``step``."""
        return step * self.batch_size / len(self.dataset)

    def index(self, consumed: int) -> int:
        """Number of the example at one place of the stream."""
        epoch, place = divmod(consumed, len(self.dataset))
        return index(self.seed, epoch, place, len(self.dataset)) if self.shuffle else place

    def batch(self, step: int, micro: int = 0) -> Batch:
        """This rank's part of one micro-batch of one step.

        Raises:
            IndexError: a negative step, or a micro-batch beyond ``accumulate``.
        """
        if step < 0 or not 0 <= micro < self.accumulate:
            raise IndexError(
                f"Loader: no micro-batch {micro} of step {step}; steps start at 0, and a step has {self.accumulate}."
            )
        first = (micro * self.world_size + self.rank) * self.micro_size
        positions = range(first, first + self.micro_size)
        keys = [step * self.batch_size + position for position in positions]
        indices = [self.index(key) for key in keys]
        return collate(
            [self.dataset.visit(i, derive(self.seed, "visit", key)) for i, key in zip(indices, keys, strict=True)],
            positions=positions,
            keys=keys,
            global_size=self.batch_size,
            seed=self.seed,
            step=step,
            indices=indices,
        )

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list[Batch]]:
        """The micro-batches of each step from ``start_step`` up to but without ``stop_step``; endless by default."""
        ready = self._prepared(_StepOrder(start_step, stop_step, self.accumulate))
        while micros := list(itertools.islice(ready, self.accumulate)):
            yield micros

    def epoch(self) -> Iterator[Batch]:
        """Every example once, by number, for validation; the last batch is as small as what is left.

        Batches are as large as micro-batches of training. Keys are the examples' numbers and the step is
        always 0, so every pass meets the same noise. A rank with nothing left of the last batch skips it.
        """
        share, size = self.micro_size, len(self.dataset)
        whole = share * self.world_size
        for start in range(0, size, whole):
            stop = min(start + whole, size)
            indices = range(start + self.rank * share, min(start + (self.rank + 1) * share, stop))
            if len(indices):
                yield collate(
                    [self.dataset[i] for i in indices],
                    positions=[i - start for i in indices],
                    keys=indices,
                    global_size=stop - start,
                    seed=self.seed,
                    indices=indices,
                )

    def _prepared(self, order: _StepOrder) -> Iterator[Batch]:
        if self.num_workers == 0:
            return (self.batch(step, micro) for step, micro in order)
        return iter(
            torch.utils.data.DataLoader(
                _ByStep(self),
                sampler=order,
                batch_size=None,  # an element is a finished batch
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                num_workers=self.num_workers,
                generator=generator(self.seed, "workers"),  # it would draw from the global state otherwise
            )
        )


class _StepOrder(Iterable[tuple[int, int]]):
    """(step, micro-batch) one after the other."""

    def __init__(self, start: int, stop: int | None, accumulate: int) -> None:
        self.start, self.stop, self.accumulate = start, stop, accumulate

    def __iter__(self) -> Iterator[tuple[int, int]]:
        steps = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        return ((step, micro) for step in steps for micro in range(self.accumulate))


class _ByStep(torch.utils.data.Dataset):
    """A loader in the shape that worker processes want."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        return self.loader.batch(*place)


def _as_it_is(batch: Batch) -> Batch:
    return batch
