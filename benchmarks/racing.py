"""How contenders are measured side by side: interleaved times, counts that no noise can touch, tables."""

from __future__ import annotations

import platform
import re
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def race(contenders, repeats, spell=0.005, took=None, trial=20):
    """Seconds a call of each contender by repeat, interleaved, each repeat in another order.

    Args:
        spell: About how many seconds of calls make one time.
        took: A clock, :func:`on_the_thread` unless it says otherwise.
        trial: Calls that tell how many make a spell.
    """
    took = took or on_the_thread
    times = {name: [] for name in contenders}
    calls = {name: max(1, round(spell / took(call, trial))) for name, call in contenders.items()}
    names = list(contenders)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(took(contenders[name], calls[name]))
    return times


def on_the_thread(call, calls):
    """CPU seconds of this thread for each of some calls, after one that does not count."""
    call()
    began = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - began) / calls


def on_the_device(call, calls):
    """Seconds of the CUDA device for each of some calls, after one that does not count."""
    call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / calls / 1e3


def ratio(times, name, of):
    """The median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(times[name], times[of], strict=True))


class Ops(TorchDispatchMode):
    """Counts what reaches the dispatcher: kernels, which on a GPU are launches, views, and reads of a scalar.

    Attributes:
        attention: The kernels that attended.
    """

    def __init__(self):
        super().__init__()
        self.kernels = self.views = self.reads = 0
        self.attention = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        is_view = func.is_view or "_unsafe_view" in name
        self.views += is_view
        self.kernels += not is_view
        self.reads += "_local_scalar_dense" in name or "is_nonzero" in name
        if found := re.match(r"aten::_scaled_dot_product_(\w+)_attention", name):
            self.attention.add(found[1])
        return func(*args, **(kwargs or {}))


def counted(call):
    """What one call asks of the dispatcher; in inference mode composite ops would arrive whole."""
    with Ops() as ops:
        call()
    return ops


def versions(*packages):
    """``vdiff 0.1.0, torch 2.14.1, Python 3.11.7``; what is not installed is left out."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])


def rows(header, *lines):
    """The lines of a table in Markdown."""
    yield "| " + " | ".join(map(str, header)) + " |"
    yield "|---" * len(header) + "|"
    for line in lines:
        yield "| " + " | ".join(map(str, line)) + " |"
