"""DPO on digits: does the policy draw thicker strokes than the base it began from, and still the right digit?

    python benchmarks/dpo_digits.py                                  # base, policy, figures, picture: minutes
    python benchmarks/dpo_digits.py --base outputs/digits_edm        # with a base that is trained already
    python benchmarks/dpo_digits.py --write-pairs                    # make the pairs of configs/ anew

The judge is the ink: the mean of a digit's pixels, 0 for paper and 1 for ink. Training pairs are real digits of one
class, the one with more ink preferred. Base and policy then draw from the same seeds with the same labels, and the
policy wins where its digit has more ink; a tie is half a win. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import textwrap
from pathlib import Path

import numpy as np
import torch

from vdiff.data import Digits
from vdiff.engine import DiffusionEngine
from vdiff.evaluation import save_picture, titled_rows
from vdiff.evaluation.classifier import class_accuracy, fitted_classifier
from vdiff.registry import load_config
from vdiff.training import read_log, train

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_dpo.yaml"
PAIRS = {"train": 1024, "test": 256}
GAP = 0.06  # least difference in ink of a pair; within a class its standard deviation is about 0.033


def ink(images):
    return ((images.clamp(-1, 1) + 1) / 2).flatten(1).mean(1)


def write_pairs(split, num):
    """``[more ink, less ink]`` by number, of one class each."""
    data, random = Digits(split), np.random.default_rng(0)
    score, labels = ink(data.images).tolist(), data.labels.tolist()
    pairs = []
    while len(pairs) < num:
        a, b = map(int, random.integers(0, len(labels), 2))
        if labels[a] == labels[b] and abs(score[a] - score[b]) >= GAP:
            pairs.append([a, b] if score[a] > score[b] else [b, a])
    (CONFIG.parent / f"digits_thicker_{split}.json").write_text(json.dumps(pairs) + "\n")


def wilson(share, num, z=1.96):
    middle, half = share + z**2 / (2 * num), z * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return tuple((middle + sign * half) / (1 + z**2 / num) for sign in (-1, 1))


def percent(share, num):
    low, high = wilson(share, num)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def draw(engine, labels, seed):
    """As many as there are labels; the reference has no part in sampling."""
    if reference := engine.mixins.get("reference"):
        reference.enabled = False
    return engine.sample({"label": labels}, seeds=seed)


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", help="run folder of the base; by default it is trained in outputs/digits_edm")
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "digits_dpo")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=100_000, help="none that the settings were chosen on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "dpo.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "dpo.png")
    parser.add_argument("--write-pairs", action="store_true")
    args = parser.parse_args()
    if args.write_pairs:
        for split, num in PAIRS.items():
            write_pairs(split, num)
        return
    base = Path(args.base or ROOT / "outputs" / "digits_edm").resolve()
    config = load_config(CONFIG, overrides=[f"training.init=[{{file: {base}}}]"] if args.base else [])
    train(config, args.run)  # a run that is finished has no steps left
    engines = {"base": DiffusionEngine.load(base), "policy": DiffusionEngine.load(args.run)}
    labels = torch.arange(args.num) % 10
    drawn = {name: draw(engine, labels, args.seed) for name, engine in engines.items()}
    save_picture(titled_rows({name: images[:20] for name, images in drawn.items()}), args.picture)
    args.out.write_text(wrapped(report(config, drawn, labels, engines["policy"], read_log(args.run / "log.jsonl"))))


def wrapped(text):
    """Paragraphs of prose filled, tables as they are."""
    filled = (p if p.startswith(("|", "#", "!")) else textwrap.fill(p, 118) for p in text.strip().split("\n\n"))
    return "\n\n".join(filled) + "\n"


def report(config, drawn, labels, policy, log):
    real, num = Digits("train"), len(labels)
    classifier = fitted_classifier(real.images, real.labels, 10.0, "scale")
    score = {name: ink(images) for name, images in drawn.items()}
    difference = score["policy"] - score["base"]
    win = ((difference.sign() + 1) / 2).mean().item()
    accuracy = {name: class_accuracy(classifier, images, labels) for name, images in drawn.items()}
    deviation = torch.stack([ink(real.images)[real.labels == label].std() for label in range(10)]).mean()
    training, mixins = config["training"], policy.mixins
    adapter = sum(p.numel() for p in mixins["lora"].parameters())
    figures = {name: value for entry in log for name, value in entry.items()}
    margin, preferred = (figures[f"validation/ema/preference/{name}"] for name in ("margin", "accuracy"))
    trained = log[-1]["time"] - log[0]["time"]
    return f"""# DPO on digits

`python benchmarks/dpo_digits.py`: a policy that prefers thick strokes, by Diffusion-DPO with LoRA from the demo's
weights ([configs/digits_dpo.yaml](../../configs/digits_dpo.yaml)). The judge is the mean ink of a digit.
{num:,} samples each, same seeds and labels; 95 % intervals by Wilson. The classifier is a support vector machine
trained on real digits.

|  | base | policy |
|---|---|---|
| wins (more ink; ties half) | 50 % by definition | {percent(win, num)} |
| classifier agrees with the label | {percent(accuracy["base"], num)} | {percent(accuracy["policy"], num)} |
| mean ink (real digits {ink(real.images).mean():.3f}) | {score["base"].mean():.3f} | {score["policy"].mean():.3f} |

![Base above, policy below, the same seeds](../images/dpo.png)

*Above the base, below the policy, from the same noise.* The policy's digits have
{difference.mean() / deviation:.1f} standard deviations more ink than the base's (of real digits of one class,
{deviation:.3f}).

On pairs of real digits that were not trained on the margin is {margin:.3f}, and the policy tells the thicker one better
than the base does in {preferred:.1%} of pairs. Trained: {adapter:,} numbers of LoRA beside
{sum(p.numel() for p in policy.parameters()) - adapter:,} frozen ones, {training["num_steps"]} steps of
{training["batch_size"]} pairs, {trained:.0f} s on a CPU with other work beside it ({torch.get_num_threads()} threads,
{platform.machine()}, torch {torch.__version__.split("+")[0]}). The reference is the same weights with LoRA off, so it
takes no memory of its own.
"""


if __name__ == "__main__":
    main()
