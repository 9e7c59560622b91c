"""What a mixin costs: the empty port, LoRA and its routing by rows beside peft, and the memory of DPO.

Everything in one process, interleaved, one thread. Times are CPU time of the thread, since a machine has other work;
a ratio is taken within each repeat, where both contenders met the same machine, and the median of them is reported.

    python benchmarks/mixins.py [--repeats 40] [--backend inductor] [--out docs/benchmarks/mixins.md]
    python benchmarks/mixins.py --instructions --out ...    # and the instructions of narrow layers, by valgrind
"""

from __future__ import annotations

import argparse
import copy
import statistics
import weakref
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import instructions
import torch
import torch.nn.functional as F
from racing import race, ratio, rows, versions
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdiff.denoisers import VDenoiser
from vdiff.hooks import Part, routed
from vdiff.hooks.attachment import insert
from vdiff.losses import DiffusionDPOLoss, MSELoss
from vdiff.mixins import LoRA, RefModel
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule

RANK, DEPTH, BUILDS = 16, 12, 12


@dataclass(frozen=True)
class Size:
    """A linear layer and what goes through it: rows of tokens."""

    width: int
    rows: int
    tokens: int

    def __str__(self):
        return f"{self.width} wide, {self.rows} x {self.tokens} tokens"

    def stack(self, depth=1):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(self.width, self.width) for _ in range(depth)]).requires_grad_(False)

    def input(self):
        return torch.randn(self.rows, self.tokens, self.width)


SMALL, BATCH, IMAGES, LARGE = Size(64, 1, 8), Size(64, 4, 8), Size(64, 4, 64), Size(768, 4, 64)
NAMES = {"plain": "LoRA", "mixins_off": "LoRA, DPO, mixins off", "copy": "LoRA, DPO, a copy"}


class Idle(Part):
    """Does nothing."""

    def after(self, module, args, kwargs, output):
        return output


class Wrapper(nn.Module):
    """LoRA as one would write it by hand."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(RANK, base.in_features) / RANK)
        self.B = nn.Parameter(torch.randn(base.out_features, RANK))
        self.scale = 2.0  # not 1, which a compiler would leave out

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A) * self.scale, self.B)


class Turnable(Wrapper):
    """The same with a scale that can be changed without compiling again, as ours can."""

    def __init__(self, base):
        super().__init__(base)
        del self.scale
        self.register_buffer("scale", torch.tensor(2.0))


# Contenders --------------------------------------------------------------------------------------


def ours(net, names=("one",)):
    """The same network with a LoRA of each name everywhere."""
    net = copy.deepcopy(net)
    for name in names:
        draw(LoRA(RANK, 2 * RANK, on="type:Linear", name=name).attach(net).parameters())
    return net


def peft(net, names=("one",)):
    """The same, by peft: the model, whose layers are at ``.base_model.model``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"\d+")
    model = get_peft_model(copy.deepcopy(net), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    draw(p for n, p in model.named_parameters() if "lora_" in n)
    return model


def draw(parameters):
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.05)


def idle(net):
    net = copy.deepcopy(net)
    part = Idle()
    part.mixin_name = "idle"
    insert([("0", net[0], part)], "Idle")
    return net


def forward(module, x, **kwargs):
    def call():
        with torch.no_grad():
            module(x, **kwargs)

    return call


def training(module, x):
    # The input asks for a gradient too, as it does everywhere but in a network's first layer.
    x = x.clone().requires_grad_()
    return lambda: module(x).sum().backward()


WAYS = {"forward, no gradient": forward, "forward and backward": training}

# What is measured --------------------------------------------------------------------------------


def ported(size):
    """Calls of a layer with something attached that does nothing."""
    net, x = size.stack(), size.input()
    hooked, off, theirs = copy.deepcopy(net), ours(net), peft(net)
    hooked[0].register_forward_hook(lambda module, args, output: None)
    off[0]._port["one"].enabled = False
    theirs.base_model.disable_adapter_layers()
    contenders = {
        "plain": net[0],
        "a hook": hooked[0],
        "vdiff, a part that does nothing": idle(net)[0],
        "vdiff, LoRA off": off[0],
        "peft, LoRA off": theirs.base_model.model[0],
    }
    return {name: lambda layer=layer: layer(x) for name, layer in contenders.items()}


def port(size, repeats):
    with torch.no_grad():
        return race(ported(size), repeats)


def lora(size, way, repeats):
    net, x = size.stack(), size.input()
    contenders = {"by hand": Wrapper(net[0]), "vdiff": ours(net)[0], "peft": peft(net).base_model.model[0]}
    return race({name: way(module, x) for name, module in contenders.items()}, repeats)


def stacks(size):
    net = size.stack(DEPTH)
    by_hand, turnable = (nn.Sequential(*[kind(layer) for layer in net]) for kind in (Wrapper, Turnable))
    return {
        "by hand": by_hand,
        "by hand, turnable": turnable,
        "vdiff": ours(net),
        "peft": peft(net).base_model.model,
    }


def compiled(size, way, repeats, backend):
    """Times of networks that are built anew in every order: where one comes to lie makes some hundredths."""
    x, times = size.input(), {}
    for order in [*permutations(range(4))][:: 24 // BUILDS]:
        torch._dynamo.reset()
        nets = list(stacks(size).items())
        named = [nets[i] for i in order]
        calls = {name: way(torch.compile(net, backend=backend, fullgraph=True), x) for name, net in named}
        # Longer spells than elsewhere: what runs after another's kernels is slower for a while.
        for name, found in race(calls, max(1, repeats // 6), spell=0.03, trial=3).items():
            times.setdefault(name, []).extend(found)
    return {name: times[name] for name, _ in nets}


def routing(size, repeats):
    """Whole networks through their public calls: two adapters, rows in turn."""
    net, x, names = size.stack(DEPTH), size.input(), ("one", "two")
    turn = [names[row % 2] for row in range(size.rows)]
    gates = {name: torch.tensor([float(n == name) for n in turn]) for name in names}
    cond = Conditioning(gates=gates)
    mine, theirs = ours(net, names), peft(net, names).eval()
    with torch.no_grad():
        for host, layer in zip(mine, theirs.base_model.model, strict=True):
            for name in names:
                host._port[name].A.copy_(layer.lora_A[name].weight)
                host._port[name].B.copy_(layer.lora_B[name].weight)

    def call():
        with torch.no_grad(), routed(mine, cond):
            return mine(x)

    def peft_call():
        with torch.no_grad():
            return theirs(x, adapter_names=turn)

    torch.testing.assert_close(call(), peft_call())
    return race({"plain": forward(net, x), "vdiff": call, "peft": peft_call}, repeats)


class Live(TorchDispatchMode):
    """Bytes of storages made inside that are alive, and their greatest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known | given:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, size):
        self.now -= size


def peak(kind, num_rows=8):
    """Greatest number of bytes alive that a step of training allocated; of plain training, or with a reference."""
    torch.manual_seed(0)
    denoiser = VDenoiser(UNet(1, 1, 32, (1, 2), 1, (2,), num_heads=2)).requires_grad_(False)
    LoRA(RANK, on=["*.qkv", "type:Conv2d"]).attach(denoiser)
    if kind != "plain":
        RefModel(source=kind).attach(denoiser)
    x0, noise = torch.randn(2, num_rows, 1, 16, 16)
    level = CosineSchedule()(torch.linspace(0.2, 0.8, num_rows // 2, dtype=torch.float64).repeat_interleave(2))
    level = level.to(torch.float32)
    loss = MSELoss() if kind == "plain" else DiffusionDPOLoss(100.0)
    with Live() as live:
        loss(denoiser(level.mix(x0, noise), level), x0, noise, level, {}).per_row.mean().backward()
    return live.peak


# Instructions ------------------------------------------------------------------------------------


def run_to_be_counted(what):
    if what == "port":
        for size in (SMALL, BATCH, IMAGES):
            with torch.no_grad():
                for name, call in ported(size).items():
                    instructions.run((f"The port, {size}", name), call, 100)
        return
    x = SMALL.input()
    for way, made in WAYS.items():
        for name, net in stacks(SMALL).items():
            torch._dynamo.reset()
            title = f"LoRA in {DEPTH} layers, compiled, {SMALL}, {way}"
            instructions.run((title, name), made(torch.compile(net, fullgraph=True), x), 100)


def counted_instructions():
    """Tables of thousands of instructions and their ratios."""
    yield from (
        "",
        "## Instructions",
        "",
        "Thousands for one call, counted by valgrind's callgrind, which no other work of the machine disturbs.",
    )
    for what, settings, kernels in (
        ("port", instructions.AVX2, "Kernels are those of AVX2, the last that valgrind knows"),
        ("lora", instructions.PLAIN, "What is compiled has the plainest kernels of each library"),
    ):
        counts = instructions.count(__file__, "--counted", what, settings=settings)
        yield from ("", f"{kernels} (`{instructions.spelled(settings)}`).")
        for title in dict.fromkeys(title for title, _ in counts):
            found = {name: n for (one, name), n in counts.items() if one == title}
            of = next(iter(found))
            lines = [[name, f"{n / 1e3:.1f}", f"{n / found[of]:.3f}"] for name, n in found.items()]
            yield from ("", f"{title}:", "", *rows(["", "thousands", f"of {of}"], *lines))


# Report ------------------------------------------------------------------------------------------


def nodes(module, x):
    """Operations in the graph that a compiler is given."""
    found = []

    def backend(graph, inputs):
        found.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(x)
    return sum(found)


def table(times, of, each=1):
    """Microseconds of each contender, and how many times those of another."""
    yield "| | us, median | us, least | " + " | ".join(f"of {name}" for name in of) + " |"
    yield "|---" * (3 + len(of)) + "|"
    for name, values in times.items():
        figures = [statistics.median(values) / each * 1e6, min(values) / each * 1e6]
        cells = [f"{figure:.1f}" for figure in figures] + [f"{ratio(times, name, other):.3f}" for other in of]
        yield f"| {name} | " + " | ".join(cells) + " |"


def report(repeats, backend, with_instructions):
    torch.set_num_threads(1)
    lines = [
        "# What a mixin costs",
        "",
        f"`python benchmarks/mixins.py`: {versions('vdiff', 'torch', 'peft')}, CPU, one thread, float32. "
        f"Microseconds of the thread's CPU time, of {repeats} interleaved repeats; ratios are medians of "
        "those within a repeat.",
        "",
        f"LoRA here has rank {RANK} and alpha {2 * RANK}: with a factor of 1, compilers leave the multiplication out.",
        "",
        "## The port",
        "",
        "A linear layer with something attached that does nothing. *A hook* is torch's own forward hook, a function "
        "that returns nothing: what torch takes for calling any hook at all.",
    ]
    for size in (SMALL, BATCH, IMAGES):
        lines += ["", f"{size}:", "", *table(port(size, repeats), ["plain", "a hook"])]
    lines += ["", "## LoRA at one layer", "", "*By hand* is a wrapper of two products, without any of the options."]
    for size in (SMALL, LARGE):
        for name, way in WAYS.items():
            lines += ["", f"{size}, {name}:", "", *table(lora(size, way, repeats), ["peft", "by hand"])]
    lines += [
        "",
        "## LoRA, compiled",
        "",
        f"`torch.compile(fullgraph=True, backend={backend!r})`, {DEPTH} layers, times of one. Of vdiff's the scale can "
        "be changed without compiling again, as in *by hand, turnable*; by hand and in peft it is a constant. "
        f"Each is built and compiled {BUILDS} times, in every order: where one comes to lie makes some hundredths.",
        "",
        f"Operations in the graph: {', '.join(f'{n} {nodes(m, SMALL.input())}' for n, m in stacks(SMALL).items())}. "
        "What a narrow layer pays more for a scale that can be changed is one more input of the graph a layer.",
    ]
    for size in (SMALL, LARGE):
        for name, way in WAYS.items():
            lines += ["", f"{size}, {name}:", ""]
            lines += table(compiled(size, way, repeats, backend), ["by hand", "by hand, turnable"], DEPTH)
    lines += [
        "",
        "## Two LoRAs, rows in turn",
        "",
        f"A network of {DEPTH} layers through its public call, times of one layer: gates of a `Conditioning` here, "
        "`adapter_names` in peft, the same outputs. *LoRAs* is what they add to the plain network.",
    ]
    for size in (BATCH, LARGE):
        times = routing(size, repeats)
        added = [
            statistics.median(a - b for a, b in zip(times[name], times["plain"], strict=True))
            for name in ("peft", "vdiff")
        ]
        lines += ["", f"{size}:", "", *table(times, ["vdiff"], DEPTH)]
        lines += ["", f"LoRAs: peft's take {added[0] / added[1]:.2f} times as long as vdiff's."]
    peaks = {name: peak(name) for name in ("plain", "mixins_off", "copy")}
    lines += [
        "",
        "## Memory of DPO",
        "",
        "Greatest number of bytes alive that a step allocated (forward, loss, backward), a small U-Net with LoRA and "
        "8 rows: the plain loss, and Diffusion-DPO with a reference that is the policy with mixins off, or a copy.",
        "",
        "| | MB at its peak | of plain |",
        "|---|---|---|",
    ]
    for name, size in peaks.items():
        lines.append(f"| {NAMES[name]} | {size / 1e6:.2f} | {size / peaks['plain']:.3f} |")
    if with_instructions:
        lines += counted_instructions()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--counted", choices=("port", "lora"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.counted:
        run_to_be_counted(options.counted)
    else:
        text = report(options.repeats, options.backend, options.instructions)
        print(text)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
