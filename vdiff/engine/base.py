"""What every engine promises: it trains, and it is kept as a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.checkpoints import load_into, read_run_weights, save_weights
from vdiff.losses import LossValues
from vdiff.mixins import Mixin
from vdiff.registry import Config, Registered, build, load_config

Batch = Mapping[str, Any]


class Engine(Registered, nn.Module, kind="engine"):
    """What a training loop trains: ``training_step(batch) -> LossValues``."""

    input_key: str
    mixins: dict[str, Mixin]
    weights: str  # which weights it holds, in words

    @abstractmethod
    def training_step(self, batch: Batch) -> LossValues:
        """One loss per row; the trainer averages."""

    def forward(self, batch: Batch) -> LossValues:
        """:meth:`training_step`, under the name that wrappers call."""
        return self.training_step(batch)

    def pictures(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """Rows of pictures by title for validation to show, each ``(N, 1 or 3, h, w)``; by default none."""
        return {}

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def attach(self, mixins: Mapping[str, Mixin] | None) -> None:
        """Attach mixins, each under its key.

        Raises:
            ValueError: a mixin was given another name of its own, or cannot be attached.
        """
        self.mixins = {}
        for name, mixin in (mixins or {}).items():
            if mixin.name not in (name, type(mixin).registered_name, type(mixin).__name__):
                raise ValueError(
                    f"mixins.{name}: its key is its name, and it is called {mixin.name!r} as well. "
                    f"Leave out `name`, or write it under {mixin.name!r}."
                )
            self.mixins[name] = mixin.attach(self, name=name)

    # Keeping -------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: str | Path | Config | Mapping[str, Any],
        overrides: Sequence[str] = (),
        allow_imports: bool | Sequence[str] = False,
    ) -> Engine:
        """An engine from a YAML file (its ``engine:`` section, or the whole file) or a loaded config.

        Args:
            overrides, allow_imports: For a file, see :func:`vdiff.registry.load_config`.
        """
        if isinstance(config, str | Path):
            config = load_config(config, overrides=overrides, allow_imports=allow_imports)
        return build(config.get("engine", config), "engine", "engine")

    @classmethod
    def load(
        cls,
        run: str | Path,
        weights: Literal["ema", "raw"] = "ema",
        step: int | Literal["last", "best"] = "last",
        allow_imports: bool | Sequence[str] = False,
    ) -> Engine:
        """The engine of a run folder, with its weights, in eval mode; ``engine.weights`` says which weights.

        Args:
            run: The folder; it holds ``config.yaml`` and ``checkpoints``.
            weights: ``ema`` (averaged, the default) or ``raw``.
            step: Of which checkpoint; ``last`` is the newest valid one.
            allow_imports: Whether modules that the run's config names may be imported; they run code.

        Raises:
            FileNotFoundError: no such run or checkpoint, or it kept no averaged weights.
            DamagedCheckpointError: the checkpoint does not match its checksums.
        """
        run = Path(run)
        if run.parent.name == "checkpoints" and (run.parent.parent / "config.yaml").is_file():
            number = run.name.removeprefix("step-").lstrip("0") or "0"
            raise FileNotFoundError(
                f"{run} is a checkpoint of the run {run.parent.parent}. Load the run, and say which checkpoint: "
                f"load({str(run.parent.parent)!r}, step={number})."
            )
        if not (run / "config.yaml").is_file():
            raise FileNotFoundError(
                f"{run} is not a run, it has no config.yaml. Make one: vdiff train CONFIG --out {run}"
            )
        tensors, folder = read_run_weights(run, weights, step)
        engine = cls.from_config(load_config(run / "config.yaml", interpolate=False, allow_imports=allow_imports))
        load_into(engine, tensors, where=str(folder))
        engine.weights = f"{weights} weights of {folder.name}"
        return engine.eval()

    def save(self, file: str | Path) -> None:
        """All weights as one safetensors file; :func:`vdiff.checkpoints.load_into` reads it back."""
        save_weights(Path(file), self.state_dict(), {"weights": self.weights, "engine": type(self).__name__})
