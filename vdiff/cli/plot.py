"""``vdiff plot``: pictures of schedules, levels, runs and solvers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vdiff.cli.runs import run_config
from vdiff.evaluation import num_calls, plot_levels, plot_runs, plot_schedules, plot_solvers
from vdiff.registry import Config, build, signature
from vdiff.samplers import Sampler
from vdiff.training import read_log

SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc", "deis", "ipndm", "auto")
BUDGETS = (5, 8, 10, 16, 20, 32, 50)


def schedule(arguments: argparse.Namespace) -> int:
    """Schedules by name or from run files, and the levels that samplers visit."""
    schedules, samplers = {}, {}
    for word in arguments.what or ["edm", "scaled_linear", "cosine", "flow"]:
        if Path(word).suffix in (".yaml", ".yml"):
            engine = _engine(word, arguments)
            schedules[Path(word).stem] = build(engine["schedule"], "schedule")
            samplers[Path(word).stem] = build(engine["sampler"], "sampler")
        else:
            schedules[word] = build({"type": word}, "schedule")
    for name in arguments.discretizer or ():
        discretizer = build({"type": name}, "discretizer")
        samplers[name] = build({"type": "euler", "num_steps": arguments.steps}, "sampler")
        samplers[name].discretizer = discretizer
    return _save(plot_schedules(schedules, samplers or None), arguments.out or "schedule.png")


def levels(arguments: argparse.Namespace) -> int:
    """Levels drawn in training and visited while sampling."""
    if len(arguments.what) != 1:
        raise ValueError("plot levels: name one run file or run folder.")
    engine = _engine(arguments.what[0], arguments)
    parts = {slot: build(engine[slot], slot) for slot in ("sigma_sampler", "schedule", "sampler")}
    return _save(plot_levels(**parts), arguments.out or "levels.png")


def run(arguments: argparse.Namespace) -> int:
    """Training curves of one or several runs."""
    logs = {}
    for word in arguments.what:
        logs[Path(word).name] = read_log(Path(word) / "log.jsonl")
        if not logs[Path(word).name]:
            raise FileNotFoundError(f"plot run: {word} is not a run with a log; there is no entry in {word}/log.jsonl.")
    if not logs:
        raise ValueError("plot run: name at least one run folder.")
    return _save(plot_runs(logs), arguments.out or str(Path(arguments.what[0]) / "pictures" / "curves.png"))


def solvers(arguments: argparse.Namespace) -> int:
    """Error against network calls on a problem whose answer is known."""
    table = {name: _by_calls(name) for name in arguments.what or SOLVERS}
    return _save(plot_solvers(table), arguments.out or "solvers.png")


def plot(arguments: argparse.Namespace) -> int:
    if arguments.out and Path(arguments.out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {arguments.out}: a picture ends in .png, .pdf or .svg.")
    return {"schedule": schedule, "levels": levels, "run": run, "solvers": solvers}[arguments.picture](arguments)


def _by_calls(name: str) -> dict[int, Sampler]:
    """A solver by network calls: as many steps as fit into each budget, on the levels it likes."""
    given: dict[str, Any] = {"type": name}
    if name != "auto" and "discretizer" in signature(type(build({"type": name}, "sampler"))):
        given["discretizer"] = {"type": "karras"}
    found = {}
    for budget in BUDGETS:
        fitting = [
            s for n in range(1, budget + 1) if num_calls(s := build(given | {"num_steps": n}, "sampler")) <= budget
        ]
        if fitting:
            found[num_calls(fitting[-1])] = fitting[-1]
    return found


def _engine(word: str, arguments: argparse.Namespace) -> Config:
    return run_config(word, arguments.allow_imports)["engine"]


def _save(figure: Any, out: str) -> int:  # noqa: ANN401
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out)
    return 0
