"""Ranges of values: declared, expected, and found.

Pictures travel in [0, 1], [-1, 1] or [0, 255], and nothing breaks when they are mixed up; training
just gets worse. So data sets declare, first stages expect, and these two checks compare.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

Range = tuple[float, float]

_USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
_TOLERANCE = 1e-3  # of the width of a range: resampling and half precision overshoot by less


def check_range(field: str, declared: Range | None, expected: Range | None, where: str = "data") -> None:
    """Compare what a data set declares with what a first stage expects (its ``pixel_range``).

    Args:
        field: Name of the field, for the message.
        declared: By the data set; None if it declares nothing for this field.
        expected: By the reader of the field; None if any range will do.
        where: Which data set this is about, for the message.

    Raises:
        ValueError: they differ, or nothing is declared where something is expected.
    """
    if expected is None:
        return
    if declared is None:
        raise ValueError(
            f"{where}: no range is declared for {field!r}, and the first stage expects {spell(expected)}. "
            f"Declare what the data has: ranges: {{{field}: [low, high]}}."
        )
    width = expected[1] - expected[0]
    if all(math.isclose(d, e, abs_tol=1e-6 * width) for d, e in zip(declared, expected, strict=True)):
        return
    raise ValueError(
        f"{where}: {field!r} is declared in {spell(declared)}, and the first stage expects {spell(expected)}. "
        f"Convert the data ({_recipe(declared, expected)}) and declare ranges: "
        f"{{{field}: [{expected[0]:g}, {expected[1]:g}]}}, or choose a first stage with another pixel_range."
    )


def check_values(field: str, values: Any, declared: Range, where: str = "data") -> None:
    """Compare values, such as the first batch's, with the range that was declared for them.

    Values well inside the range pass. Values of a narrower usual range, such as [0, 1] where [-1, 1] is
    declared, are legal but suspicious, and give a warning.

    Args:
        values: A tensor or array of numbers, any shape.

    Raises:
        ValueError: values that are not finite or outside of the declared range; it says what came.
    """
    low, high = declared
    values = torch.as_tensor(values)
    if values.numel() == 0:
        return
    if values.is_floating_point() and not (finite := torch.isfinite(values)).all():
        raise ValueError(
            f"{where}: {int((~finite).sum())} of {values.numel()} values of {field!r} are not finite. Look for "
            "unreadable examples and for divisions by zero in their preparation."
        )
    found = (values.min().item(), values.max().item())
    margin = _TOLERANCE * (high - low)
    if found[0] < low - margin or found[1] > high + margin:
        guess = _guess(found)
        recipe = f" That looks like {spell(guess)}; convert with {_recipe(guess, declared)}." if guess else ""
        raise ValueError(
            f"{where}: {field!r} is declared in {spell(declared)}, and values from {found[0]:g} to {found[1]:g} "
            f"came.{recipe or ' Convert the values, or declare the range they have.'}"
        )
    if low < 0 <= found[0] and found[0] != found[1]:
        warnings.warn(
            f"{where}: {field!r} is declared in {spell(declared)}, but its values run from {found[0]:g} to "
            f"{found[1]:g} only. If they are in [0, {high:g}], convert with {_recipe((0.0, high), declared)}.",
            stacklevel=2,
        )


def spell(values: Range) -> str:
    """``[-1, 1]``"""
    return f"[{values[0]:g}, {values[1]:g}]"


def _guess(found: Range) -> Range | None:
    """The narrowest usual range that holds the values."""
    return next((r for r in _USUAL if r[0] <= found[0] and found[1] <= r[1]), None)


def _recipe(source: Range, target: Range) -> str:
    """``x / 127.5 - 1``: the affine map from one range to another, as one would write it."""
    scale = (target[1] - target[0]) / (source[1] - source[0])
    shift = target[0] - source[0] * scale
    product = "x" if scale == 1 else f"x * {scale:g}" if scale > 1 else f"x / {1 / scale:g}"
    return product if shift == 0 else f"{product} {'+' if shift > 0 else '-'} {abs(shift):g}"
