"""Do jointly sampled digits and edges belong together? Digits fine-tuned on pairs (digit, its Sobel edges).

Agreement is Pearson's correlation over the pixels of a picture between its edges as sampled and the edges that Sobel's
operator finds in the digit beside it, and the RMS difference of the two, in pictures of [-1, 1]; means over pairs.

    python benchmarks/joint.py [--run outputs/digits_joint] [--num 200] [--out docs/benchmarks/joint.md]

Trains the run if it is not there, and digits_edm before it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from vdiff.data import Digits, SobelMap
from vdiff.engine import DiffusionEngine
from vdiff.evaluation.classifier import class_accuracy, fitted_classifier
from vdiff.evaluation.pictures import save_picture, titled_rows
from vdiff.pipelines import complete, sample_pairs, streams_of
from vdiff.process import Conditioning
from vdiff.registry import load_config
from vdiff.samplers import DPMpp2MSampler, JointGuider

ROOT = Path(__file__).parents[1]
SHOWN = 14


def edges_of(digits: Tensor) -> Tensor:
    return torch.stack([SobelMap()(digit) for digit in digits.clamp(-1, 1)])


def agreement(pairs: Tensor) -> tuple[float, float]:
    """Mean correlation and mean RMS difference of ``pairs[:, 1]`` and the edges of ``pairs[:, 0]``."""
    drawn, found = pairs[:, 1].flatten(1).double(), edges_of(pairs[:, 0]).flatten(1).double()
    a, b = (x - x.mean(1, keepdim=True) for x in (drawn, found))
    correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)
    return correlation.mean().item(), (drawn - found).square().mean(1).sqrt().mean().item()


def others_of_the_class(labels: Tensor) -> Tensor:
    """For every row another row of its class: the next one, around."""
    found = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        found[rows] = rows.roll(-1)
    return found


def without_labels(engine: DiffusionEngine, labels: Tensor) -> Conditioning:
    """All rows with the null label: what is known of the class then comes from the partner alone."""
    told = engine.conditions(streams_of({"label": labels}))
    return told.null.with_(gates=told.gates, partners=told.partners, null=None)


def measure(engine: DiffusionEngine, num: int) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """By title the pairs and the labels they were asked for; and the seconds of one joint walk."""
    test = Digits("test")
    digits, labels = test.images[:num], test.labels[:num]
    edges, asked = edges_of(digits), {"label": labels}
    joint = engine.mixins["joint_attention"]
    begun = time.perf_counter()
    together = sample_pairs(engine, asked)
    seconds = time.perf_counter() - begun
    found = {"together": together}
    for scale in (1.5, 2.0, 3.0):
        found[f"together, joint guidance {scale:g}"] = sample_pairs(engine, asked, guider=JointGuider(scale))
    with joint.disabled():
        found["apart: joint attention off"] = sample_pairs(engine, asked)
    for how in ("held", "along"):
        found[f"edges of a digit, {how}"] = complete(engine, {0: digits}, asked, how=how)
    for how in ("held", "along"):
        found[f"digit for edges, {how}"] = complete(engine, {1: edges}, asked, how=how)
    unlabelled = without_labels(engine, labels)
    found["edges of a digit, no label"] = complete(engine, {0: digits}, unlabelled)
    found["digit for edges, no label"] = complete(engine, {1: edges}, unlabelled)
    with joint.disabled():
        found["digit, no label, joint attention off"] = complete(engine, {1: edges}, unlabelled)
    found["real digit, edges of another of its class"] = torch.stack([digits, edges[others_of_the_class(labels)]], 1)
    found["real pairs"] = torch.stack([digits, edges], 1)
    return {title: (pairs.cpu(), labels) for title, pairs in found.items()}, seconds


def table(found: dict[str, tuple[Tensor, Tensor]], right: Callable[[Tensor, Tensor], float]) -> str:
    lines = ["| sampled | correlation | RMS | digit recognised |", "|---|---|---|---|"]
    for title, (pairs, labels) in found.items():
        correlation, rms = agreement(pairs)
        lines.append(f"| {title} | {correlation:.3f} | {rms:.3f} | {right(pairs[:, 0], labels):.3f} |")
    return "\n".join(lines)


def picture(found: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    rows = {}
    for name, title in (
        ("together", "together"),
        ("apart", "apart: joint attention off"),
        ("edges given", "digit for edges, held"),
        ("digit given", "edges of a digit, held"),
    ):
        pairs = found[title][0][:SHOWN]
        rows |= {f"{name}: digit": pairs[:, 0], f"{name}: edges": pairs[:, 1]}
        rows[f"{name}: edges of the digit"] = edges_of(pairs[:, 0])
    file.parent.mkdir(parents=True, exist_ok=True)
    save_picture(titled_rows(rows), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "digits_joint")
    parser.add_argument("--num", type=int, default=200, help="pairs of each kind, at most the 360 of the test split")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    if not (args.run / "config.yaml").is_file():
        from vdiff.training import train

        train(load_config(ROOT / "configs" / "digits_joint.yaml"), args.run)
    engine = DiffusionEngine.load(args.run)
    assert isinstance(engine, DiffusionEngine)
    engine.sampler = DPMpp2MSampler(16)
    train_split = Digits("train")
    classifier = fitted_classifier(train_split.images, train_split.labels, 10.0, "scale")
    found, seconds = measure(engine, args.num)
    sizes = {name: sum(p.numel() for p in mixin.parameters()) for name, mixin in engine.mixins.items()}
    text = "\n".join(
        [
            "# Joint attention: digits and their edges",
            "",
            f"`python benchmarks/joint.py --num {args.num} --out docs/benchmarks/joint.md --picture "
            f"docs/images/joint.png`: vdiff {version('vdiff')}, torch {torch.__version__.split('+')[0]}, Python "
            f"{platform.python_version()}, CPU; {engine.weights}, {args.num} pairs with the labels of the test split, "
            f"{type(engine.sampler).__name__} with {engine.sampler.num_steps} steps; one walk of all pairs "
            f"{seconds:.0f} s.",
            "",
            "`configs/digits_joint.yaml` trains "
            + ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
            + " on pairs of a digit and the strength of its edges; the digits' network stays as it was.",
            "",
            "Agreement between the edges sampled and those that Sobel's operator finds in the digit beside them: mean "
            "correlation over the pixels, mean RMS difference in [-1, 1]. *Recognised*: share of digits that a support "
            "vector machine, trained on the real training split, puts into the class asked for.",
            "",
            table(found, lambda images, labels: class_accuracy(classifier, images, labels)),
            "",
            "With joint attention off the digits are the base's, and the edges are a LoRA's that never trained alone; "
            "the floor for a pair that knows of each other nothing but the class is therefore rather that of real "
            "digits beside the edges of others. What a row without a label shows of its class came through joint "
            "attention.",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.picture:
        picture(found, args.picture)


if __name__ == "__main__":
    main()
