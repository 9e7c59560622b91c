"""Few-step digits: one, two and four calls of distilled students beside the best their teacher does with as many.

    python benchmarks/distil_digits.py                                # teacher, student, figures, picture
    python benchmarks/distil_digits.py --teacher outputs/digits_edm   # with a teacher that is trained already
    python benchmarks/distil_digits.py --lora                         # and a second student

The whole network is trained by configs/digits_lcm.yaml; the second student is a LoRA on the teacher, which is the
teacher with the LoRA off. The same seeds and labels everywhere; figures are those of ``vdiff evaluate``.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from digits_solvers import drawn

from vdiff.engine import DiffusionEngine
from vdiff.evaluation import ClassifierAccuracy, FrechetDistance, Reference, num_calls, save_picture, titled_rows
from vdiff.registry import build, load_config
from vdiff.training import train

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_lcm.yaml"
LORA = [
    "engine.mixins.lora={type: lora, rank: 16, on: "
    "['*.qkv', '*.proj_out', '*.in_layers.2', '*.emb_layers.1', '*.out_layers.3']}",
    "engine.mixins.teacher.source=mixins_off",
    "training.train=[{on: mixins.lora}]",
    "training.optimizer.lr=1e-3",
]
BUDGETS = (1, 2, 4)
TEACHER = [
    {"type": "auto"},
    *(
        {"type": name, "discretizer": {"type": grid}}
        for name in ("heun", "dpmpp_2m")
        for grid in ("karras", "trailing")
    ),
]
STUDENT = [{"type": "consistency"}, {"type": "lcm"}]


def within(options, budget, schedule):
    """The sampler with as many steps as fit into so many calls."""
    for steps in range(budget, 0, -1):
        sampler = build({**options, "num_steps": steps}, "sampler")
        if num_calls(sampler, schedule) <= budget:
            return sampler
    raise ValueError(f"{options} has no step of {budget} calls.")


def measured(who, engine, reference, labels, options, budget):
    samples = drawn(engine, labels, within(options, budget, engine.schedule))
    accuracy = ClassifierAccuracy()(samples, reference)["classifier_accuracy"]
    distance = FrechetDistance()(samples, reference)["frechet_distance_ratio"]
    name = " ".join([options["type"], options.get("discretizer", {}).get("type", "")]).strip()
    print(f"{who:8} {name:18} {budget:3} calls  accuracy {accuracy:.4f}  distance {distance:.3f}", flush=True)
    return name, accuracy, distance, samples.images[:20]


def best(found):
    """The least distance; what else it is called follows it."""
    return min(found, key=lambda cell: cell[2])


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--teacher", help="run folder of the teacher; by default it is trained in outputs/digits_edm")
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "digits_lcm")
    parser.add_argument("--lora", action="store_true", help="train and measure the LoRA too")
    parser.add_argument("--lora-run", type=Path, default=ROOT / "outputs" / "digits_lcm_lora")
    parser.add_argument("--num", type=int, default=600, help="samples per cell")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "distillation.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "distillation.png")
    arguments = parser.parse_args()
    teacher = Path(arguments.teacher or ROOT / "outputs" / "digits_edm").resolve()
    given = [f"training.init=[{{file: {teacher}}}]"] if arguments.teacher else []
    runs = {"student": (arguments.run, [])} | ({"LoRA": (arguments.lora_run, LORA)} if arguments.lora else {})
    for run, overrides in runs.values():
        train(load_config(CONFIG, overrides=given + overrides), run)  # a run that is finished has no steps left

    config = load_config(teacher / "config.yaml", interpolate=False)
    data = [build(config["data"][name], "dataset") for name in ("train", "validation")]
    reference = Reference.of(*data, image="image")
    labels = torch.cat([reference.train_labels, reference.test_labels])[torch.arange(arguments.num) % 1797]
    engines = {"teacher": DiffusionEngine.load(teacher)}
    engines |= {who: DiffusionEngine.load(run) for who, (run, _) in runs.items()}
    cells = {
        (who, budget): [measured(who, engine, reference, labels, options, budget) for options in samplers]
        for who, engine in engines.items()
        for samplers in [TEACHER if who == "teacher" else STUDENT]
        for budget in BUDGETS
    }
    goal = measured("teacher", engines["teacher"], reference, labels, TEACHER[1], 35)
    pictures = {f"{who}, {budget}": best(cells[who, budget])[3] for who in engines for budget in (1, 2)}
    save_picture(titled_rows(pictures | {"teacher, 35": goal[3]}), arguments.picture)
    arguments.out.write_text(report(load_config(CONFIG), engines, cells, goal, arguments.num))


def report(config, engines, cells, goal, num):
    def row(title, who, number=None):
        chosen = [best(cells[who, budget]) if number is None else cells[who, budget][number] for budget in BUDGETS]
        words = [f"{accuracy:.1%}, {distance:.2f}" + ("" if number is not None else f" (`{name}`)")
                 for name, accuracy, distance, _ in chosen]  # fmt: skip
        return f"| {title} | " + " | ".join(words) + " |"

    rows = [row("teacher, its best solver", "teacher")]
    for who, title in (("student", "student, all weights"), ("LoRA", "student, LoRA")):
        if who in engines:
            rows += [row(f"{title}, `{options['type']}`", who, i) for i, options in enumerate(STUDENT)]
    training = config["training"]
    lora = ""
    if "LoRA" in engines:
        own, frozen = (
            sum(p.numel() for p in t.parameters())
            for t in (engines["LoRA"].mixins["lora"], engines["teacher"].denoiser)
        )
        lora = f"The LoRA has {own:,} numbers beside {frozen:,} frozen ones, and its teacher is those without it. "
    table = "\n".join(["| accuracy, Frechet ratio | 1 call | 2 calls | 4 calls |", "|---|---|---|---|", *rows])
    prose = f"""
`python benchmarks/distil_digits.py`: consistency distillation of the demo's weights
([configs/digits_lcm.yaml](../../configs/digits_lcm.yaml)), and what the teacher makes of as many calls with the best
(least distance) of `auto`, and `heun` and `dpmpp_2m` on `karras` and `trailing` levels. {num:,} samples a cell, the
same seeds and labels, no guidance. Accuracy is that of a classifier trained on real digits; the ratio is the Frechet
distance as a multiple of that of the real training digits, by `vdiff evaluate`'s metrics.

{table}

With `heun` in 35 calls the teacher has {goal[1]:.1%}, {goal[2]:.2f}. In few calls it draws averages of digits, which
are smooth and easy to classify and far from the data: read both figures of a cell together.

![Teacher and students in one and two calls, from the same noise](../images/distillation.png)

A student is trained for {training["num_steps"]} steps of {training["batch_size"]} pairs, on the grid of
{config["engine"]["sigma_sampler"]["sigma_sampler"]["num_steps"]} levels, on a CPU. {lora}Two calls are one at sigma 80
and one at 0.625, four at 80, 10.7, 0.625 and 0.005 (`trailing`).
"""
    filled = (p if p.startswith(("|", "!")) else textwrap.fill(p, 118) for p in prose.strip().split("\n\n"))
    return "# Distillation on digits\n\n" + "\n\n".join(filled) + "\n"


if __name__ == "__main__":
    main()
