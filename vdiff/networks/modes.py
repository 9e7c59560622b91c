"""Modes of modules: training or eval, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(root: nn.Module) -> Iterator[None]:
    """``root`` in eval mode inside; afterwards every module is in its own mode again, frozen ones in eval."""
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
