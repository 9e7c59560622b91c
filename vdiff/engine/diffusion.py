"""The engine: two sentences, one to train and one to sample, over parts that know nothing of each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.checkpoints import load_into, read_run_weights, save_weights
from vdiff.conditioners import Conditioner, EmbedderConditioner
from vdiff.denoisers import Denoiser, NetworkDenoiser
from vdiff.first_stages import FirstStage, IdentityFirstStage
from vdiff.losses import Loss, LossValues
from vdiff.mixins import Mixin
from vdiff.networks import in_eval
from vdiff.process import HOST, Conditioning, NoiseLevel, NoiseSchedule, RowKeys, SigmaSampler, upload
from vdiff.registry import Config, Registered, build, load_config
from vdiff.samplers import Guider, NoneGuider, Sampler, SamplerStep, gaussian

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

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))


class DiffusionEngine(Engine, name="diffusion"):
    """A diffusion model that trains and samples.

    Args:
        input_key: The batch field with the data.
        denoiser: With its network.
        schedule: How much noise at each time.
        sigma_sampler: Which levels training draws.
        loss: Prediction against truth.
        sampler: From noise to data.
        conditioner: Batch fields to conditions; by default there are none.
        first_stage: Pixels to latents; by default pixels.
        guider: By default the plain conditional prediction.
        mixins: By name, attached to the engine in this order.
        offset_noise: Scale of a constant added per channel to the training noise.
        sample_shape: Shape of one sample in pixels, ``(c, h, w)`` or ``(c, f, h, w)``; what :meth:`sample`
            makes unless told otherwise.
    """

    def __init__(
        self,
        input_key: str,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        sigma_sampler: SigmaSampler,
        loss: Loss,
        sampler: Sampler,
        conditioner: Conditioner | None = None,
        first_stage: FirstStage | None = None,
        guider: Guider | None = None,
        mixins: dict[str, Mixin] | None = None,
        offset_noise: float = 0.0,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.input_key = input_key
        self.first_stage = first_stage if first_stage is not None else IdentityFirstStage()
        self.conditioner = conditioner if conditioner is not None else EmbedderConditioner()
        self.denoiser = denoiser
        self.schedule, self.sigma_sampler, self.loss = schedule, sigma_sampler, loss
        self.sampler, self.guider = sampler, guider if guider is not None else NoneGuider()
        self.offset_noise, self.sample_shape = offset_noise, sample_shape
        self.weights = "as constructed"
        hardest = sigma_sampler.quantile(torch.tensor([0.5, 1 - 2**-53], **HOST), schedule)
        denoiser.check(hardest, f"{type(schedule).__name__} with {type(sigma_sampler).__name__}")
        _check_rows(denoiser, schedule)
        self.mixins = {}
        for name, mixin in (mixins or {}).items():
            self.mixins[name] = mixin.attach(self, name=name)

    # Training ------------------------------------------------------------------------------------

    def training_step(self, batch: Batch) -> LossValues:
        """One value per row; the trainer averages."""
        x0 = self.first_stage.encode(batch[self.input_key])
        cond = self.conditioner(batch)
        level, noise = self.draw(x0, batch)
        prediction = self.denoiser(level.mix(x0, noise), level, cond)
        return self.loss(prediction, x0, noise, level, batch)

    def draw(self, x0: Tensor, batch: Batch) -> tuple[NoiseLevel, Tensor]:
        """The level of each row and noise in the shape of ``x0``, at least float32; functions of the batch's keys
        alone."""
        keys = RowKeys.of(batch)
        noise = keys.normal("noise", x0.shape[1:])
        if self.offset_noise:
            channels = keys.normal("offset_noise", x0.shape[1:2])
            noise = noise + self.offset_noise * channels[(...,) + (None,) * (x0.ndim - 2)]
        dtype = torch.promote_types(x0.dtype, torch.float32)
        return self.levels(batch).upload(x0.device), upload(noise, x0.device).to(dtype)

    def levels(self, batch: Batch) -> NoiseLevel:
        """The level that :meth:`draw` gives each row, on the host."""
        return self.sigma_sampler(self.schedule, RowKeys.of(batch))

    # Sampling ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning | Batch | None = None,
        shape: Sequence[int] | None = None,
        *,
        negative: Conditioning | Batch | None = None,
        num: int | None = None,
        seeds: int | Sequence[int] = 0,
        sampler: Sampler | None = None,
        guider: Guider | None = None,
        callback: Callable[[SamplerStep], None] | None = None,
        progress: bool = False,
        decode: bool = True,
    ) -> Tensor:
        """Noise to samples.

        Args:
            cond: Conditions, or batch fields for the conditioner such as ``{"label": [3, 7]}``; None: none.
            shape: Of one sample in pixels; by default ``sample_shape``.
            negative: What guidance moves away from instead of the conditioner's null, like ``cond``.
            num: How many; by default as many as ``cond`` has rows, or as there are seeds.
            seeds: One per sample, or the first of consecutive ones. A sample depends on its own seed and
                conditions, not on the batch around it.
            sampler, guider: Instead of the engine's own.
            callback, progress: See :meth:`Sampler.__call__`.
            decode: Pixels; otherwise latents.

        Returns:
            ``(num, *shape)`` in the first stage's pixel range.
        """
        with in_eval(self):
            cond = self._conditions(cond)
            if negative is not None:
                cond = cond.with_null(self._conditions(negative).with_(null=None))
            seeds = _one_per_sample(seeds, num, cond.num_rows)
            noise = self.noise(self._latent_shape(shape), seeds)
            x0 = (sampler or self.sampler)(
                self.denoiser,
                self.schedule,
                noise,
                cond,
                guider=guider or self.guider,
                seeds=seeds,
                callback=callback,
                progress=progress,
            )
            return self.first_stage.decode(x0) if decode else x0

    def noise(self, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """The start of each sample: standard Gaussian, one row per seed."""
        return gaussian(seeds, shape, "start").to(self.device)

    def _conditions(self, cond: Conditioning | Batch | None) -> Conditioning:
        if cond is None:
            return Conditioning()
        if isinstance(cond, Conditioning):
            return cond.to(self.device)
        return self.conditioner({k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in cond.items()})

    def _latent_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        shape = shape or self.sample_shape
        if shape is None:
            raise ValueError("sample: give a shape, such as (3, 64, 64), or set sample_shape in the engine's config.")
        return self.first_stage.latent_shape(shape)

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

    def compile(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the network in place; mixins, guiders and samplers stay as they are.

        With a reference model attached the network has two graphs, one with gradient and one without.
        """
        # A hook on the compiled module itself would otherwise be a graph of its own.
        torch._dynamo.config.wrap_top_frame = True
        network: nn.Module = getattr(self.denoiser, "network", self.denoiser)  # type: ignore[assignment]
        nn.Module.compile(network, **options)


def _check_rows(denoiser: Denoiser, schedule: NoiseSchedule) -> None:
    """A network that is told rows of a table must count in the rows of this one."""
    told = denoiser.num_rows if isinstance(denoiser, NetworkDenoiser) and denoiser.c_noise == "index" else None
    if told is not None and schedule.num_rows not in (None, told):
        raise ValueError(
            f"{type(denoiser).__name__} tells its network rows of a table of {told}, and {type(schedule).__name__} has "
            f"{schedule.num_rows}. Set denoiser.num_rows to {schedule.num_rows}."
        )


def _one_per_sample(seeds: int | Sequence[int], num: int | None, num_conditions: int | None) -> list[int]:
    """Seeds for as many samples as were asked for, in whichever way."""
    asked = {"num": num, "conditions": num_conditions, "seeds": None if isinstance(seeds, int) else len(seeds)}
    counts = {name: count for name, count in asked.items() if count is not None}
    if len(set(counts.values())) > 1 or min(counts.values(), default=1) < 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"sample: these say how many samples, at least one, and must agree: {said}.")
    rows = next(iter(counts.values()), 1)
    return list(range(seeds, seeds + rows)) if isinstance(seeds, int) else list(seeds)
