"""Keyed randomness: every number drawn depends on who asks, never on who asked before.

A draw is named by words (the seed, a purpose, a step, a row's key). The words are hashed to the key
of a counter-based stream of its own (Philox, Salmon et al. 2011), on the host, so that the same row gets
the same numbers on every device, in every batch, after every restart and on any number of processes.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdiff.process.level import HOST


def derive(*words: int | str) -> int:
    """A 63-bit seed from words; any change in any word gives an unrelated one. 3 and "3" are two words."""
    return int.from_bytes(_digest(words, 8), "big") >> 1


def stream(*words: int | str) -> np.random.Generator:
    """The stream of the draw named by ``words``, with a 128-bit key: no two draws of a run share one."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(words, 16), dtype="<u8")))


def normal(shape: Sequence[int], *words: int | str) -> Tensor:
    """Standard Gaussian numbers for the draw named by ``words``, float32 on the host."""
    return torch.from_numpy(np.asarray(stream(*words).standard_normal(tuple(shape), dtype=np.float32)))


def _digest(words: Sequence[int | str], size: int) -> bytes:
    text = "\x1f".join(_word(word) for word in words)
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _word(word: int | str) -> str:
    if isinstance(word, str):
        return "str:" + word.replace("\x1f", "\x1f\x1f")  # no word looks like two
    return f"int:{operator.index(word):d}"


def generator(*words: int | str) -> torch.Generator:
    """A torch generator on the host, for torch's own functions. It keeps 32 bits of its seed; see :func:`stream`."""
    return torch.Generator().manual_seed(derive(*words))


@contextmanager
def forked(*words: int | str) -> Iterator[None]:
    """Global randomness for layers that draw for themselves (dropout), on the host and the current CUDA device;
    put back afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive(*words))
        yield


@dataclass(frozen=True, eq=False)
class RowKeys:
    """What the draws of a training batch depend on.

    Attributes:
        seed: Of the run.
        step: Of the optimizer.
        keys: One per row; rows of a group (a preference pair) share theirs, and with it all draws.
        position: Place of the row's group within the global batch.
        global_size: Number of groups in the global batch, over all ranks and accumulation steps.
    """

    seed: int
    step: int
    keys: tuple[int, ...]
    position: tuple[int, ...]
    global_size: int

    @staticmethod
    def of(batch: Mapping[str, Any]) -> RowKeys:
        """The keys that a collated batch carries.

        Raises:
            KeyError: the batch has no ``noise_key``, or no ``step``.
        """
        for name in ("noise_key", "step"):
            if name not in batch:
                raise KeyError(
                    f"this batch has no {name!r}, so its noise cannot be drawn. vdiff.data.Loader and collate give it; "
                    "by hand: batch['noise_key'] = torch.arange(B), one integer per row, and batch['step'] = the "
                    f"number of the training step, or every step sees the same noise. It has: {', '.join(batch)}."
                )
        keys = tuple(_ints(batch["noise_key"]))
        position = tuple(_ints(batch["position"])) if "position" in batch else tuple(_rank(keys))
        size = int(batch.get("global_size", max(position, default=0) + 1))
        return RowKeys(int(batch.get("seed", 0)), int(batch["step"]), keys, position, size)

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.position):
            raise ValueError(f"RowKeys: {len(self.keys)} keys and {len(self.position)} positions; each row has one.")
        if self.position and not 0 <= min(self.position) <= max(self.position) < self.global_size:
            raise ValueError(
                f"RowKeys: positions {min(self.position)} to {max(self.position)} in a global batch of "
                f"{self.global_size} groups; they count from 0."
            )

    def uniform(self, purpose: str) -> Tensor:
        """One number in (0, 1) per row, float64, shape ``(B,)``."""
        draws = self._draw(purpose, lambda *words: torch.tensor(stream(*words).random(), **HOST))
        return draws.clamp(2**-54, 1 - 2**-53)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard Gaussian numbers, float32, shape ``(B, *shape)``."""
        return self._draw(purpose, lambda *words: normal(shape, *words))

    def stratum(self, purpose: str) -> Tensor:
        """A number of 0 ... ``global_size`` - 1 per row, shape ``(B,)``, all different over the global batch.

        Rows of a group share it where they share their key. The streams of a joint sample have a key each, so
        each stream is spread on its own; a group is never split between batches.
        """
        groups: dict[int, list[int]] = {}
        orders: dict[int, Tensor] = {}
        drawn = []
        for key, position in zip(self.keys, self.position, strict=True):
            group = groups.setdefault(position, [])
            if key not in group:
                group.append(key)
            place = group.index(key)
            if place not in orders:
                random = stream(self.seed, self.step, purpose, place)
                orders[place] = torch.from_numpy(random.permutation(self.global_size))
            drawn.append(orders[place][position])
        return torch.stack(drawn)

    def _draw(self, purpose: str, draw: Callable[..., Tensor]) -> Tensor:
        drawn = {key: draw(self.seed, self.step, purpose, key) for key in dict.fromkeys(self.keys)}
        return torch.stack([drawn[key] for key in self.keys])


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _rank(keys: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(key, len(first)) for key in keys]
