"""Ten solvers on the digits run: accuracy and Frechet distance against network calls.

    python benchmarks/digits_solvers.py outputs/digits_edm --write

The same seeds and labels for every cell, so that two cells differ by the solver alone. With ``--write`` the table goes
into docs/samplers.md.
"""

import argparse
import re
from pathlib import Path

import torch

import vdiff
from vdiff.engine import DiffusionEngine
from vdiff.evaluation import ClassifierAccuracy, FrechetDistance, Reference, Samples, num_calls
from vdiff.registry import build, load_config
from vdiff.samplers import Node

PAGE = Path(__file__).parents[1] / "docs" / "samplers.md"
MARKS = ("<!-- digits table -->", "<!-- end of digits table -->")
BUDGETS = (5, 8, 12, 20, 35)
KARRAS = {"discretizer": {"type": "karras"}}
SOLVERS = {
    "euler": KARRAS,
    "heun": KARRAS,
    "dpmpp_2m": KARRAS,
    "dpmpp_3m": KARRAS,
    "unipc": KARRAS,
    "deis": KARRAS,
    "ipndm": KARRAS,
    "auto": {},
    "euler_ancestral": KARRAS,
    "dpmpp_2m_sde": KARRAS,
}


def solver(name, budget, schedule):
    """As many steps as fit into the budget."""
    for steps in range(budget, 0, -1):
        sampler = build({"type": name, "num_steps": steps, **SOLVERS[name]}, "sampler")
        if num_calls(sampler, schedule) <= budget:
            return sampler
    return None


@torch.no_grad()
def drawn(engine, labels, sampler):
    images = torch.cat(
        [
            engine.sample({"label": part}, seeds=range(start, start + len(part)), sampler=sampler)
            for start, part in zip(range(0, len(labels), 600), labels.split(600), strict=True)
        ]
    )
    return Samples(images, labels)


def measure(engine, reference, labels, name, budget):
    sampler = solver(name, budget, engine.schedule)
    calls = sum(1 for _ in sampler.plan(Node.of(sampler.levels(engine.schedule)), engine.schedule))
    samples = drawn(engine, labels, sampler)
    figures = {**ClassifierAccuracy()(samples, reference), **FrechetDistance()(samples, reference)}
    print(f"{name:16} {calls:3} calls  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
    return calls, figures["classifier_accuracy"], figures["frechet_distance_ratio"]


def table(rows, budgets):
    head = "| solver | " + " | ".join(f"{budget} calls" for budget in budgets) + " |"
    lines = [head, "|" + "---|" * (len(budgets) + 1)]
    for name, cells in rows.items():
        words = [f"{accuracy:.3f}, {ratio:.2f}" for _, accuracy, ratio in cells]
        lines.append(f"| `{name}` | " + " | ".join(words) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run of configs/digits_edm.yaml")
    parser.add_argument("--num", type=int, default=1797, help="samples per cell; labels of the whole set")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/samplers.md")
    arguments = parser.parse_args()
    engine = DiffusionEngine.load(arguments.run)
    config = load_config(Path(arguments.run) / "config.yaml", interpolate=False)
    data = [build(config["data"][name], "dataset") for name in ("train", "validation")]
    reference = Reference.of(*data, image=engine.input_key)
    labels = torch.cat([reference.train_labels, reference.test_labels])
    labels = labels[torch.arange(arguments.num) % len(labels)]
    rows = {
        name: [measure(engine, reference, labels, name, budget) for budget in arguments.budgets] for name in SOLVERS
    }
    found = table(rows, arguments.budgets)
    text = (
        f"{found}\n\nAccuracy of a classifier of real digits, and the Frechet distance as a multiple of that of the "
        f"real training digits; {arguments.num} samples per cell of the run of `configs/digits_edm.yaml` with its "
        f"{engine.weights}, the same seeds and labels everywhere, without guidance. Two-call solvers take the largest "
        f"number of steps that fits. vdiff {vdiff.__version__}, torch {torch.__version__}. "
        "`python benchmarks/digits_solvers.py RUN --write` makes it anew."
    )
    print(text)
    if arguments.write:
        page = PAGE.read_text()
        assert all(mark in page for mark in MARKS), f"{PAGE} has no {MARKS}"
        pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
        PAGE.write_text(re.sub(pattern, lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", page, flags=re.S))


if __name__ == "__main__":
    main()
