"""Runs in processes of their own, to be killed. They fork from a clean server in which the libraries are loaded."""

import multiprocessing
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch", "sklearn.datasets", "rich.progress", "omegaconf", "omegaconf.grammar_parser", "children", "vdiff.training",
    "vdiff.engine", "vdiff.evaluation",
]  # fmt: skip
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


def train_under_lightning(rank, port, weights, out, overrides):
    """One of two processes that train the demo's engine together for the steps that the overrides say."""
    import os

    import lightning
    import torch

    from vdiff.data import Digits
    from vdiff.training import SGD
    from vdiff.training.lightning import DataModule, EngineModule, from_run_file

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    module, data, options = from_run_file(ROOT / "configs" / "digits_edm.yaml", overrides)
    module.engine.load_state_dict(torch.load(weights))
    module = EngineModule(module.engine, SGD(0.1))
    losses = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].detach())

    lightning.Trainer(
        max_steps=options["max_steps"],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[Losses()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=out,
    ).fit(module, DataModule(Digits("train"), data.batch_size))
    torch.save(torch.stack(losses), out / f"losses{rank}.pt")
    if rank == 0:
        torch.save(module.engine.state_dict(), out / "both.pt")
