"""One denoising step at the published size in bfloat16: eager and compiled, here and in diffusers, on one device.

Weights are drawn from a normal with 0.02, cut off at twice that. Eager steps come first, since they are cheap, and the
table is written anew after every row: a run that is cut off leaves what it has, and a row that fails says why. Where
diffusers is not installed its columns stay empty.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
import traceback

import torch
from racing import counted, on_the_device, on_the_thread, race, ratio, rows, versions
from torch.utils.flop_counter import FlopCounterMode
from twins import TWINS, drawn

WARM_UP, SLOW = 5, 0.5  # calls; seconds of a step, beyond which five repeats are enough
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 operations per second, without sparsity
KEPT = ("c_noise", "ids", "turns")  # inputs that stay in float32
HEADER = (
    "network", "mode", "ms", "diffusers', ms", "of diffusers'", "host, ms", "of the peak", "GiB beside weights",
    "diffusers', GiB", "attention", "apart", "first call, s",
)  # fmt: skip


class Bench:
    """A device, and how time and memory are read there."""

    def __init__(self, device):
        self.device, self.is_cuda = device, device != "cpu"
        self.took = on_the_device if self.is_cuda else on_the_thread
        name = torch.cuda.get_device_name() if self.is_cuda else "CPU"
        self.name = name
        self.peak = next((flops for part, flops in PEAKS.items() if part in name), None)

    def wait(self):
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call):
        """Of the wall, until all work is done."""
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def asking(self, call):
        """Seconds until a call returns, of a device that works on behind it."""
        times = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        self.wait()
        return statistics.median(times)

    def memory(self, call):
        """GiB that a call takes at most, beside what was there before."""
        if not self.is_cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def prepared(twin, device):
    """The networks, ours and, where there is diffusers, theirs with the same weights; and what they are asked."""
    torch.manual_seed(0)
    with torch.device(device):
        nets = {"vdiff": drawn(twin.ours(), 0.02).bfloat16()}
        if importlib.util.find_spec("diffusers"):
            nets["diffusers"] = twin.theirs(importlib.import_module("diffusers")).eval().bfloat16()
            twin.match(nets["diffusers"], nets["vdiff"])
        given = {name: value if name in KEPT else value.bfloat16() for name, value in twin.inputs().items()}
    return nets, given


def calls(twin, nets, given):
    """What each side says when called."""
    ways = {"vdiff": twin.ask, "diffusers": twin.ask_theirs}

    def call(side):
        return torch.inference_mode()(lambda: ways[side](nets[side], given))

    return {side: call(side) for side in nets}


def step(bench, twin, mode, repeats, backend):
    """The cells of one network in one mode, after its name."""
    nets, given = prepared(twin, bench.device)
    with torch.no_grad():
        ops = counted(lambda: twin.ask(nets["vdiff"], given))
        with FlopCounterMode(display=False) as flops:
            twin.ask(nets["vdiff"], given)
    if mode == "compiled":
        torch._dynamo.reset()
        nets = {side: torch.compile(net, backend=backend, fullgraph=True) for side, net in nets.items()}
    asked = calls(twin, nets, given)
    first = {side: bench.seconds(call) for side, call in asked.items()}
    for call in asked.values():
        for _ in range(WARM_UP):
            call()
    said = {side: call() for side, call in asked.items()}
    if not said["vdiff"].isfinite().all():
        raise ValueError("it says what is not finite")
    memory = {side: bench.memory(call) for side, call in asked.items()}
    is_slow = bench.seconds(asked["vdiff"]) > SLOW
    times = race(asked, min(repeats, 5) if is_slow else repeats, 0.1, bench.took, 1)
    best = {side: statistics.median(values) for side, values in times.items()}
    beside = None if "diffusers" not in asked else ratio(times, "vdiff", "diffusers")
    apart = None if beside is None else (said["vdiff"] - said["diffusers"]).norm() / said["diffusers"].norm()
    of_peak = bench.peak and flops.get_total_flops() / best["vdiff"] / bench.peak
    return [
        mode, shown(best["vdiff"], 1e3), shown(best.get("diffusers"), 1e3), shown(beside, digits=3),
        shown(bench.asking(asked["vdiff"]), 1e3), shown(of_peak, digits=3), shown(memory["vdiff"]),
        shown(memory.get("diffusers")), ", ".join(sorted(ops.attention)), shown(apart, digits=4), shown(first["vdiff"]),
    ]  # fmt: skip


def shown(value, factor=1, digits=2):
    """A number for the table."""
    return "" if value is None else f"{factor * float(value):.{digits}f}"


def report(device, only=(), repeats=20, tiny=False, backend="inductor", out=None):
    """Measure, and write the table after every row."""
    bench, lines = Bench(device), []
    size = "tiny" if tiny else "full"
    chosen = {n: t[size] for n, t in TWINS.items() if "full" in t and (not only or any(word in n for word in only))}
    for mode in ("eager", "compiled"):
        for name, twin in chosen.items():
            try:
                cells = step(bench, twin, mode, repeats, backend)
            except Exception as error:  # one row's trouble is not the next one's
                traceback.print_exc()
                cells = [mode, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
                cells += [""] * (len(HEADER) - 1 - len(cells))
            lines.append([name, *cells])
            text = page(bench, size, repeats, backend, lines)
            print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(text, encoding="utf-8")
            if bench.is_cuda:
                torch.cuda.empty_cache()
    print(text)


def page(bench, size, repeats, backend, lines):
    shapes = {"full": "published sizes", "tiny": "tiny networks, a rehearsal"}[size]
    return "\n".join(
        [
            f"# A denoising step on one {bench.name}",
            "",
            f"`python benchmarks/forward.py --device {bench.device}`: {versions('vdiff', 'torch', 'diffusers')}, "
            f"bfloat16, {shapes}, random weights, in inference mode; SDXL 2 x 1024 x 1024, SVD 2 x 14 x 576 x 1024, "
            "CogVideoX 2 x 49 x 480 x 720. Medians of up to "
            f"{repeats} interleaved repeats after {WARM_UP} calls of warming up; a ratio is taken within a repeat. "
            f"Compiled is `torch.compile(fullgraph=True, backend={backend!r})`. *Host* is the time until the call "
            "returns: near the step's own, the host is what it waits for. *Of the peak* are counted operations, "
            "attention included, by time and the device's peak in bfloat16. *Attention* are the kernels that ran in "
            "eager mode, *apart* the distance of both answers by the norm of one.",
            "",
            *rows(HEADER, *lines),
            "",
        ]
    )
