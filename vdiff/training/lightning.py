"""The same training under a Lightning trainer: a module around ``engine.training_step``, and a data module.

::

    import lightning
    from vdiff.training.lightning import DataModule, EngineModule

    module = EngineModule(engine, optimizer=AdamW(2e-3), ema=EMA(half_life=500))
    data = DataModule(Digits("train"), batch_size=128, validation=Digits("test"))
    lightning.Trainer(max_steps=1500).fit(module, data)

Levels, noise, dropped conditions and the order of the data stay functions of (seed, step), so the losses are
those of vdiff's own loop, on one device or on several; precision, devices, strategies, clipping and checkpoints are
Lightning's. Attach mixins before :meth:`Trainer.fit`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.data import Dataset, Loader
from vdiff.engine import Engine
from vdiff.hooks import attached
from vdiff.mixins import Companion
from vdiff.process import forked, upload
from vdiff.registry import Config, load_config
from vdiff.training.ema import EMA, lend
from vdiff.training.figures import Means
from vdiff.training.groups import TrainGroup, check_words, select
from vdiff.training.init import initialize
from vdiff.training.loop import ON_HOST, Trainer
from vdiff.training.lr_schedules import ConstantLRSchedule, LRSchedule
from vdiff.training.optimizers import AdamW, Optimizer
from vdiff.training.report import check_inputs
from vdiff.training.run import check_run

try:
    from lightning import LightningDataModule, LightningModule
except ImportError as error:
    raise ImportError(
        "vdiff.training.lightning needs the package lightning: pip install 'lightning>=2.6.6'."
    ) from error


class EngineModule(LightningModule):
    """Any engine as a ``LightningModule``; its weights are under ``engine.``.

    Args:
        engine: With its mixins attached.
        optimizer, lr_schedule: By default AdamW at a constant rate; the schedule runs over the trainer's steps.
        train: What is trained, first match wins, the rest is frozen; by default all that asks for a gradient.
        ema: An average of what is trained; it travels in the checkpoint, and validation reports it too.
        seed: Of layers that draw for themselves (dropout); the seed of the data is the data module's.
        new: What ``new`` means among what is trained, see :class:`vdiff.training.init.Initialised`.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: Optimizer | None = None,
        lr_schedule: LRSchedule | None = None,
        train: list[TrainGroup] | None = None,
        ema: EMA | None = None,
        seed: int = 0,
        new: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.ema, self.seed = engine, ema, seed
        self.recipe = AdamW() if optimizer is None else optimizer
        self.lr_schedule = ConstantLRSchedule() if lr_schedule is None else lr_schedule
        self.selection = select(engine, train, self.recipe, new)
        if ema is not None:
            ema.start(self.selection.trained)
        for mixin in attached(engine).values():
            if isinstance(mixin, Companion):
                mixin.begin()  # a copy of the weights that the run starts from; a checkpoint is loaded later
        self._means = Means()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The engine's loss values."""
        with lend(self.ema, self.engine):
            return self.engine(batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe(self.selection.groups)
        schedule = self.lr_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.selection.set_modes()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        with forked(self.seed, "step", self.global_step, self.global_rank):
            values = self(batch)
        self._means.add({"loss": values.per_row, **values.metrics})
        return values.per_row.mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.global_step
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if self.ema is not None:
            self.ema.update(self.selection.trained, step)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or step == self.trainer.max_steps:
            figures = {f"train/{name}": value for name, value in self._means.read().items()}
            self.log_dict(figures, sync_dist=True, batch_size=1)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._report(batch, batch_idx, "validation")
        if self.ema is not None:
            with self.ema.applied(self.engine):
                self._report(batch, batch_idx, "validation/ema")

    def _report(self, batch: Mapping[str, Any], batch_idx: int, name: str) -> None:
        with forked(self.seed, "validation", batch_idx):
            loss = self(batch).per_row
        self.log(f"{name}/loss", loss.mean(), on_epoch=True, sync_dist=True, batch_size=len(loss))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        return _move(batch, device)

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DataModule):
            check_inputs(self.engine, data.datasets, Loader(data.train, 1).batch(0))
        if self.ema is not None:
            self.ema.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])


class DataModule(LightningDataModule):
    """vdiff's data sets under Lightning: batch ``n`` is a function of ``n``, on any number of devices.

    An epoch is ``len(train) // batch_size`` steps. Resuming from a checkpoint goes on where the run was, in the
    middle of an epoch too. Accumulation (``accumulate_grad_batches``) divides a step's batch.

    Args:
        train: What is trained on.
        batch_size: Examples per optimizer step, over all devices and accumulated parts.
        validation: Looked at in the same batches under the same noise every time; None validates nothing.
        seed: Of order, levels, noise and dropped conditions.
        num_workers: Processes that prepare data; never changes a batch.
        num_validation_batches: Of the size of a step.
    """

    def __init__(
        self,
        train: Dataset,
        batch_size: int,
        validation: Dataset | None = None,
        seed: int = 0,
        num_workers: int = 0,
        num_validation_batches: int = 4,
    ) -> None:
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed
        self.num_workers, self.num_validation_batches = num_workers, num_validation_batches

    def train_dataloader(self) -> Any:
        return _Epoch(self)

    def val_dataloader(self) -> Any:
        if self.validation is None:
            return []
        trainer = self._trainer
        size = min(self.batch_size, len(self.validation) // trainer.world_size * trainer.world_size)
        rank = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        loader = Loader(self.validation, size, self.seed, **rank)
        return _Held(loader, min(self.num_validation_batches, len(self.validation) // size))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        return _move(batch, device)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The data sets by their part in the run."""
        return {"train": self.train} | ({} if self.validation is None else {"validation": self.validation})

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("DataModule: its loaders need a trainer; call trainer.fit(module, data).")
        return self.trainer


class _Held:
    """The first batches, the same every time."""

    def __init__(self, loader: Loader, num: int) -> None:
        self.loader, self.num = loader, num

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.loader.batch(number) for number in range(self.num))


class _Epoch:
    """The batches of the present epoch from the trainer's present step on, part by part."""

    def __init__(self, data: DataModule) -> None:
        trainer = data._trainer
        self.trainer, self.accumulate = trainer, int(trainer.accumulate_grad_batches)
        self.steps = max(1, len(data.train) // data.batch_size)
        self.loader = Loader(
            data.train,
            data.batch_size,
            data.seed,
            self.accumulate,
            data.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        now = self.trainer.global_step
        for micros in self.loader.batches(now, (now // self.steps + 1) * self.steps):
            yield from micros


def from_run_file(
    config: str | Path | Config, overrides: list[str] | None = None, allow_imports: bool | list[str] = False
) -> tuple[EngineModule, DataModule, dict[str, Any]]:
    """A run file for Lightning: ``module, data, options``; then ``Trainer(**options).fit(module, data)``.

    Args:
        config: A file with the sections ``engine``, ``data`` and ``training``, or what was loaded from one.
        overrides, allow_imports: For a file, see :func:`vdiff.registry.load_config`.

    Returns:
        The module, the data, and what the file says about steps, accumulation, clipping and precision, in
        Lightning's words.

    Raises:
        ConfigError: something in the file cannot be built.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides=overrides or (), allow_imports=allow_imports)
    plans = check_run(config)
    loop = plans["training"].make()
    if not isinstance(loop, Trainer):
        raise TypeError(f"from_run_file: training.type is {type(loop).__name__}; the file's is read as a 'loop'.")
    with forked(loop.seed, "init"):
        engine = plans["engine"].make()
    check_words(engine, loop.train)
    new = initialize(engine, loop.init).new
    module = EngineModule(engine, loop.optimizer, loop.lr_schedule, loop.train, loop.ema, loop.seed, new)
    data = {name: plan.make() for name, plan in plans["data"].items()}
    batches = DataModule(
        data["train"],
        loop.batch_size,
        data.get("validation"),
        loop.seed,
        loop.num_workers,
        loop.validation.num_batches,
    )
    precision = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[loop.precision]
    options = {"max_steps": loop.num_steps, "accumulate_grad_batches": loop.accumulate, "precision": precision}
    return module, batches, options | ({} if loop.clip is None else {"gradient_clip_val": loop.clip})


def _move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the device; the keys of randomness stay on the host, where they are read."""
    return {k: upload(v, device) if isinstance(v, Tensor) and k not in ON_HOST else v for k, v in batch.items()}
