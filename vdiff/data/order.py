"""The order in which examples are visited, as a pure function.

An epoch is a permutation of the examples. It is never stored: a small keyed cipher over the numbers
``0 ... size - 1`` computes any place of it on its own. So the whole state of a data set in training is
one integer, how many examples have been consumed, and any process can ask for any place at once.

The cipher is a Feistel network over a rectangle of about ``sqrt(size)`` rows; places of the rectangle
that lie beyond ``size`` are walked over.

References:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002: cycle walking (section 3) and
    generalised Feistel (section 4).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from vdiff.process import derive

_NUM_ROUNDS = 8
_MASK = (1 << 64) - 1


def index(seed: int, epoch: int, i: int, size: int) -> int:
    """The example at place ``i`` of an epoch.

    For fixed ``(seed, epoch, size)`` a bijection of ``0 ... size - 1``; O(1) time and memory in ``size``.

    Raises:
        IndexError: ``i`` is not in ``0 ... size - 1``.
    """
    if not 0 <= i < size:
        raise IndexError(
            f"order.index: place {i} is not in an epoch of {size} examples; places run from 0 to size - 1."
        )
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(seed, epoch)
    place = _encipher(i, rows, columns, keys)
    while place >= size:  # fewer than one place in sqrt(size) lies beyond, so the walk is short
        place = _encipher(place, rows, columns, keys)
    return place


def _encipher(place: int, rows: int, columns: int, keys: tuple[int, ...]) -> int:
    row, column = divmod(place, columns)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _mix(column ^ first)) % rows
        column = (column + _mix(row ^ second)) % columns
    return row * columns + column


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive("order", seed, epoch, number) for number in range(_NUM_ROUNDS))


def _mix(x: int) -> int:
    """Every bit of the result depends on every bit of ``x``: the finaliser of SplitMix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
