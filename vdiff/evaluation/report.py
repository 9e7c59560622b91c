"""Figures as text to read and as JSON to keep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from vdiff.evaluation.files import write_whole

_COLUMNS = {"": "samples", "_real": "real", "_ratio": "ratio"}


def table(figures: Mapping[str, float]) -> str:
    """One line per metric: the samples' figure, that of real data, their ratio.

    ::

                               samples      real     ratio
        classifier accuracy     0.9983    0.9917
        frechet distance        0.5172    0.3540    1.4610
    """
    rows: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        suffix = next((s for s in ("_real", "_ratio") if name.endswith(s) and name.removesuffix(s) in figures), "")
        rows.setdefault(name.removesuffix(suffix), {})[suffix] = _number(value)
    used = [suffix for suffix in _COLUMNS if any(suffix in row for row in rows.values())]
    width = max((len(name) for name in rows), default=0)
    lines = [" " * width + "".join(f"{_COLUMNS[suffix]:>10}" for suffix in used)]
    for name, row in rows.items():
        lines.append(f"{name.replace('_', ' '):<{width}}" + "".join(f"{row.get(suffix, ''):>10}" for suffix in used))
    return "\n".join(line.rstrip() for line in lines)


def save_figures(figures: Mapping[str, float], file: str | Path) -> None:
    """Write figures as JSON; a figure that is not finite is ``null``, as JSON has no word for it."""
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    write_whole(Path(file), (json.dumps(finite, indent=2) + "\n").encode())


def _number(value: float) -> str:
    return f"{value:.4f}" if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
