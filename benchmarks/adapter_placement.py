"""Where an adapter reads and writes: every form at every layer of a small UNet, a table of the placement study again.

A text-conditioned UNet learns upright digits. Then, its weights frozen, an adapter learns the same digits turned by a
quarter from ten pictures of each class, and the loss is measured on pictures it has not seen, at fixed noise and
levels. One network hosts all of them, one after the other: attach, train, measure, detach.

    python benchmarks/adapter_placement.py [--steps 120] [--seeds 2] [--out docs/benchmarks/adapter_placement.md]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vdiff.data import Digits
from vdiff.denoisers import VDenoiser
from vdiff.mixins import Adapter
from vdiff.mixins.adapter import FORMS
from vdiff.networks import UNet
from vdiff.process import Conditioning, CosineSchedule

SCHEDULE = CosineSchedule()
TOKENS, RES = 16, 2  # hidden widths of adapters of tokens and of feature maps
LR, FULL_LR = 3e-3, 1e-3
# Score in the notes of such a study (Stable Diffusion 1, DreamBooth); more is better.
STUDY = {
    "sequential-attn2": 0.895, "cross-attn2": 0.877, "parallel-ffn": 0.840, "sequential-whole": 0.831,
    "parallel-res": 0.816, "sequential-res": 0.749, "parallel-attn1": 0.745, "sequential-ffn": 0.725,
    "parallel-whole": 0.709, "parallel-attn2": 0.707, "sequential-attn1": 0.693,
}  # fmt: skip


READING = """
Where an adapter reads decides here too: those that read the residual stream (0.45 to 0.47) lie apart from those that
read what a layer says (0.56 to 0.58), and where they write matters little. Which reading is best is another than in the
study: a small network of digits, told a label, has little to read behind cross-attention. Adapters of residual blocks
have about twice the parameters (they are at every resolution) and are not to be compared with the others;
nor is `cross ffn`, whose input is four times as wide.
"""


class Digit(nn.Module):
    """The label as four tokens, beside the denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4 * 16)
        network = UNet(1, 1, 16, (1, 2), 1, (2,), num_heads=2, context_dim=16, norm_groups=8)
        self.denoiser = VDenoiser(network)

    def losses(self, x0: Tensor, label: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        level = SCHEDULE(t)
        cond = Conditioning({"cross_attention": self.table(label).unflatten(1, (4, 16))})
        said = self.denoiser(level.mix(x0, noise), level, cond).value
        alpha, sigma = level.like(x0).alpha, level.like(x0).sigma
        return (said - (alpha * noise - sigma * x0)).square().mean((1, 2, 3))


def batches(images: Tensor, labels: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=draw)
        t = torch.rand(32, generator=draw) * 0.98 + 0.01
        yield images[rows], labels[rows], t, torch.randn(32, 1, 8, 8, generator=draw)


def train(model: Digit, weights: Iterable[nn.Parameter], data: Iterable[tuple[Tensor, ...]], lr: float) -> None:
    optimizer = torch.optim.Adam(weights, lr)
    for x0, label, t, noise in data:
        loss = model.losses(x0, label, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def held_out(model: Digit, images: Tensor, labels: Tensor) -> float:
    draw = torch.Generator().manual_seed(10**6)
    found = []
    for t in (torch.arange(8) + 0.5) / 8:
        noise = torch.randn(images.shape, generator=draw)
        found.append(model.losses(images, labels, t.expand(len(images)), noise).mean())
    return float(torch.stack(found).mean())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=120)
    options.add_argument("--pretrain", type=int, default=800)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--out", type=Path)
    args = options.parse_args()

    torch.manual_seed(0)
    model, digits, test = Digit(), Digits("train"), Digits("test")
    pictures, labels = test.images[::2], test.labels[::2]  # of every class, and twice as fast to look at
    began = time.perf_counter()
    train(model, model.parameters(), batches(digits.images, digits.labels, args.pretrain, 0), 2e-3)
    print(f"base trained, {time.perf_counter() - began:.0f} s", flush=True)

    few = torch.cat([(digits.labels == label).nonzero()[:10, 0] for label in range(10)])
    turned, turned_labels = digits.images[few].rot90(1, (2, 3)), digits.labels[few]
    unseen = pictures.rot90(1, (2, 3))
    base, upright = held_out(model, unseen, labels), held_out(model, pictures, labels)

    model.requires_grad_(False)
    network, rows = model.denoiser.network, {}
    cells = [f"{form}-{layer}" for layer in FORMS["cross"] for form in FORMS]
    for cell in cells:
        losses, num = [], 0
        began = time.perf_counter()
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            adapter = Adapter(cell, width=RES if cell.endswith("-res") else TOKENS).attach(network)
            num = sum(p.numel() for p in adapter.parameters())
            train(model, adapter.parameters(), batches(turned, turned_labels, args.steps, seed + 1), LR)
            losses.append(held_out(model, unseen, labels))
            adapter.detach()
        rows[cell] = (num, losses)
        print(cell, num, losses, f"{(time.perf_counter() - began) / args.seeds:.1f} s", flush=True)
    assert held_out(model, unseen, labels) == base, "the host is not what it was"

    whole = []
    for seed in range(args.seeds):
        twin = copy.deepcopy(model)
        twin.denoiser.requires_grad_(True)
        train(twin, twin.denoiser.parameters(), batches(turned, turned_labels, args.steps, seed + 1), FULL_LR)
        whole.append(held_out(twin, unseen, labels))
    total = sum(p.numel() for p in network.parameters())
    text = report(rows, (total, whole), base, upright, args)
    print(text)
    if args.out:
        args.out.write_text(text)


def report(
    rows: dict[str, tuple[int, list[float]]], whole: tuple[int, list[float]], base: float, upright: float,
    args: argparse.Namespace,
) -> str:  # fmt: skip
    """The table, best first."""

    def spread(losses: list[float]) -> str:
        return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.4f}"

    lines = [
        "# Where an adapter is put",
        "",
        f"`python benchmarks/adapter_placement.py`: torch {torch.__version__}, Python {platform.python_version()}, "
        f"CPU, {args.steps} steps of 32 rows, {args.seeds} seeds, Adam at {LR:g} ({FULL_LR:g} for all weights).",
        "",
        f"A UNet of {whole[0]:,} parameters, trained for {args.pretrain} steps on upright digits (loss {upright:.4f} "
        "on unseen ones), learns them turned by a quarter from ten pictures of each class. Loss: squared error of v "
        "on unseen pictures at eight fixed levels, mean and deviation over seeds.",
        "",
        "| adapter | place | parameters | of the host | loss | in the study |",
        "|---|---|---|---|---|---|",
        f"| none | | 0 | 0 | {base:.4f} | |",
    ]
    for cell, (num, losses) in sorted(rows.items(), key=lambda row: statistics.mean(row[1][1])):
        form, layer = cell.split("-")
        share = f"{100 * num / whole[0]:.2f} %"
        lines.append(
            f"| {form} {layer} | {FORMS[form][layer]} | {num:,} | {share} | {spread(losses)} | {STUDY.get(cell, '-')} |"
        )
    lines.append(f"| all weights | | {whole[0]:,} | 100 % | {spread(whole[1])} | 0.894 |")
    return "\n".join(lines) + "\n" + READING


if __name__ == "__main__":
    main()
