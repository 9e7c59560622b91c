"""Runs in processes of their own, to be killed. They fork from a clean server in which the libraries are loaded."""

import multiprocessing
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "sklearn.datasets", "rich.progress", "children", "vdiff.training", "vdiff.engine"]
SERVER.set_forkserver_preload(PRELOADED)


def start(function, *arguments):
    """A running process; ``process.kill()`` is SIGKILL."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    return process


def train_demo(out, *overrides):
    """The demo's config, shortened."""
    import torch

    from vdiff.registry import load_config
    from vdiff.training import train

    torch.set_num_threads(1)
    train(load_config(ROOT / "configs" / "digits_edm.yaml", overrides=overrides), out)
