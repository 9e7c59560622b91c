"""Networks beside diffusers': the same weights, the same answer, and then how long it takes.

Everything in one process, interleaved, one thread, tiny networks and middling ones. Times are CPU time of the thread,
since a machine has other work; a ratio is taken within each repeat, where both met the same machine, and the median of
them is reported. Beside them stands what no noise can touch: how many kernels and views reach the dispatcher, and how
many instructions valgrind counts.

    python benchmarks/forward.py [--only unet ...] [--sizes tiny] [--repeats 15] [--out docs/benchmarks/forward.md]
    python benchmarks/forward.py --only dit --sizes tiny --instructions    # and by valgrind, many minutes
    python benchmarks/forward.py --device cuda     # denoising steps at published sizes, see full_size.py
    python benchmarks/forward.py --device cpu --full-size --tiny    # that, rehearsed
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import full_size
import instructions
import torch
from racing import counted, race, ratio, rows, versions
from twins import TWINS, drawn

WAYS, SIDES = ("forward", "forward and backward"), ("vdiff", "diffusers")


def contenders(twin, diffusers):
    """What each side says when called, after it was seen that both say the same."""
    torch.manual_seed(0)
    ours, theirs = drawn(twin.ours()), twin.theirs(diffusers).eval()
    twin.match(theirs, ours)
    given = twin.inputs()
    calls = {"vdiff": lambda: twin.ask(ours, given), "diffusers": lambda: twin.ask_theirs(theirs, given)}
    with torch.no_grad():
        said, expected = (call() for call in calls.values())
    assert (said - expected).norm() < 1e-4 * expected.norm()
    return calls


def as_(way, call, grad_mode=torch.inference_mode):
    """The call without gradients, or with them and through backward."""
    return grad_mode()(call) if way == "forward" else lambda: call().square().mean().backward()


def chosen(only):
    return {name: twins for name, twins in TWINS.items() if not only or any(word in name for word in only)}


def measured(only, sizes, repeats):
    """A row of figures for each network and size."""
    diffusers = importlib.import_module("diffusers")
    for name, twins in chosen(only).items():
        for size in sizes:
            calls = contenders(twins[size], diffusers)
            cells = [name, size]
            for way in WAYS:
                times = race({side: as_(way, call) for side, call in calls.items()}, repeats, 0.02, trial=1)
                cells += [f"{1e3 * min(times['vdiff']):.1f}", f"{ratio(times, 'vdiff', 'diffusers'):.3f}"]
            for way in WAYS:
                ops = [counted(as_(way, call, torch.no_grad)) for call in calls.values()]
                cells.append(f"{ops[0].kernels} / {ops[1].kernels}, {ops[0].views} / {ops[1].views}")
            print(*cells, file=sys.stderr)
            yield cells


# Instructions ------------------------------------------------------------------------------------


def counted_instructions(only, sizes):
    """A row of millions of instructions and their ratio for each network and size."""
    options = ["--sizes", *sizes, *(["--only", *only] if only else [])]
    counts = instructions.count(__file__, "--counted", *options)
    for name, size in dict.fromkeys(key[:2] for key in counts):
        cells = [name, size]
        for way in WAYS:
            ours, theirs = (counts[name, size, way, side] for side in SIDES)
            cells += [f"{ours / 1e6:.1f}", f"{ours / theirs:.4f}"]
        yield cells


def run_to_be_counted(only, sizes):
    diffusers = importlib.import_module("diffusers")
    for name, twins in chosen(only).items():
        for size in sizes:
            for side, call in contenders(twins[size], diffusers).items():
                for way in WAYS:
                    instructions.run((name, size, way, side), as_(way, call))


# Report ------------------------------------------------------------------------------------------


def report(only, sizes, repeats, with_instructions):
    torch.set_num_threads(1)
    lines = [
        "# Forward beside diffusers",
        "",
        f"`python benchmarks/forward.py`: {versions('vdiff', 'torch', 'diffusers')}, CPU, one thread, float32, eager. "
        "The same random weights through the tables of names, and the same answer to 1e-4 of its norm before anything "
        f"is measured. Milliseconds are the thread's least CPU time of {repeats} interleaved repeats, ratios medians "
        "of those within a repeat; forward is in inference mode. Kernels and views are what reaches the dispatcher, "
        "here / in diffusers.",
        "",
        *rows(
            [
                "network", "size", "forward, ms", "of diffusers'", "and backward, ms", "of diffusers'",
                "kernels, views of forward", "and backward",
            ],
            *measured(only, sizes, repeats),
        ),
    ]  # fmt: skip
    lines += [
        "",
        "Steps at published sizes on a GPU, eager and compiled: `python benchmarks/forward.py --device cuda`.",
    ]
    if with_instructions:
        lines += [
            "",
            "## Instructions",
            "",
            "Millions for one call, counted by valgrind's callgrind with the plainest kernels of each library "
            f"(`{instructions.spelled()}`).",
            "",
            *rows(
                ["network", "size", "forward", "of diffusers'", "and backward", "of diffusers'"],
                *counted_instructions(only, sizes),
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), help="networks whose name has one of these words")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "middle"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true", help="published sizes on the CPU as well")
    parser.add_argument("--tiny", action="store_true", help="--full-size with tiny networks")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.counted:
        run_to_be_counted(options.only, options.sizes)
    elif options.device != "cpu" or options.full_size:
        full_size.report(options.device, options.only, options.repeats, options.tiny, options.backend, options.out)
    else:
        text = report(options.only, options.sizes, options.repeats, options.instructions)
        print(text)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
