"""The engine: two sentences, one to train and one to sample, over parts that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.conditioners import Conditioner, Embedder, EmbedderConditioner
from vdiff.denoisers import Denoiser, NetworkDenoiser
from vdiff.engine.base import Batch, Engine
from vdiff.first_stages import FirstStage, IdentityFirstStage
from vdiff.hooks import parts
from vdiff.losses import Loss, LossValues
from vdiff.mixins import Mixin
from vdiff.networks import in_eval
from vdiff.process import HOST, Conditioning, NoiseLevel, NoiseSchedule, RowKeys, SigmaSampler, X0Scale, spread, upload
from vdiff.registry import build
from vdiff.samplers import Callback, CFGGuider, Edit, Guider, NoneGuider, Sampler, X0ScaleGuider, gaussian


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
        first_stage: Pixels to latents; by default pixels. It is frozen, unless ``training.train`` names it.
        guider: By default the plain conditional prediction.
        mixins: By name, attached to the engine in this order.
        offset_noise: Scale of a constant added per channel to the training noise.
        sample_shape: Shape of one sample in pixels, ``(c, h, w)`` or ``(c, f, h, w)``; what :meth:`sample`
            makes unless told otherwise.
        x0_scale: What x0 is multiplied by at each level (VideoCrafter, DynamiCrafter), in training and sampling alike;
            a mapping such as ``{last: 0.7}``. By default nothing.
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
        x0_scale: X0Scale | None = None,
    ) -> None:
        super().__init__()
        self.input_key = input_key
        self.first_stage = first_stage if first_stage is not None else IdentityFirstStage()
        self.first_stage.requires_grad_(False)
        self.conditioner = conditioner if conditioner is not None else EmbedderConditioner()
        self.denoiser = denoiser
        self.schedule, self.sigma_sampler, self.loss = schedule, sigma_sampler, loss
        self.sampler, self.guider = sampler, guider if guider is not None else NoneGuider()
        self.offset_noise, self.sample_shape, self.x0_scale = offset_noise, sample_shape, x0_scale
        self.weights = "as constructed"
        hardest = sigma_sampler.quantile(torch.tensor([0.5, 1 - 2**-53], **HOST), schedule)
        denoiser.check(hardest, f"{type(schedule).__name__} with {type(sigma_sampler).__name__}")
        _check_rows(denoiser, schedule)
        self.attach(mixins)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("first_stage", "conditioner") and {"first_stage", "conditioner"} <= self._modules.keys():
            for module in self.conditioner.modules():
                if isinstance(module, Embedder):
                    module.share(self.first_stage)

    # Training ------------------------------------------------------------------------------------

    def training_step(self, batch: Batch) -> LossValues:
        """One value per row; the trainer averages."""
        x0 = self.first_stage.encode_for_training(batch[self.input_key], RowKeys.of(batch))
        cond = self.conditioner(batch)
        level, noise = self.draw(x0, batch)
        x0 = self.scaled(x0, level)
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

    def scaled(self, x0: Tensor, level: NoiseLevel) -> Tensor:
        """The clean sample as the network is to know it at a level."""
        return x0 if self.x0_scale is None else self.x0_scale(x0, level)

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
        sampler: Sampler | str | None = None,
        guider: Guider | float | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        edit: Edit | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        decode: bool = True,
    ) -> Tensor:
        """Noise to samples.

        Args:
            cond: Conditions, or batch fields for the conditioner such as ``{"label": [3, 7]}``; None for an
                engine that is told nothing.
            shape: Of one sample in pixels; by default ``sample_shape``.
            negative: What guidance moves away from instead of the conditioner's null, like ``cond``.
            num: How many; by default as many as ``cond`` has rows, or as there are seeds.
            seeds: One per sample, or the first of consecutive ones. A sample depends on its own seed and
                conditions, not on the batch around it.
            sampler, guider: Instead of the engine's own; a sampler's name and a scale of classifier-free guidance do
                as well.
            x0: Latents to begin at instead of noise alone, ``(num, ...)``; :mod:`vdiff.pipelines` take pixels.
            strength, edit, callback, progress: See :meth:`Sampler.__call__`.
            decode: Pixels; otherwise latents.

        Returns:
            ``(num, *shape)`` in the first stage's pixel range.
        """
        sampler, guider = self._chosen(sampler, guider, negative is not None)
        with in_eval(self):
            cond = self.conditions(cond, negative)
            seeds = _one_per_sample(seeds, num if x0 is None else len(x0), cond.num_rows)
            noise = self.noise(self._latent_shape(shape) if x0 is None else x0.shape[1:], seeds)
            self._check_concat(cond, noise)
            x0 = sampler(
                self.denoiser,
                self.schedule,
                noise,
                cond,
                guider=self._scaling(guider),
                seeds=seeds,
                x0=None if x0 is None else self.scaled(x0, self.schedule(strength)),
                strength=strength,
                edit=edit,
                callback=callback,
                progress=progress,
            )
            return self.first_stage.decode(x0) if decode else x0

    def noise(self, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """The start of each sample: standard Gaussian, one row per seed."""
        return gaussian(seeds, shape, "start").to(self.device)

    def conditions(
        self, cond: Conditioning | Batch | None, negative: Conditioning | Batch | None = None
    ) -> Conditioning:
        """What :meth:`sample` makes of its conditions, on the engine's device.

        Raises:
            ValueError: there are none and the conditioner cannot do without, or they are not what it reads.
        """
        if negative is not None:
            return self.conditions(cond).with_null(self.conditions(negative).with_(null=None))
        if cond is None:
            if missing := self.conditioner.fields():
                given = ", ".join(f"{field!r}: ..." for field in missing)
                raise ValueError(f"sample: this engine is told {', '.join(missing)}. Say it: sample({{{given}}}).")
            return Conditioning()
        if isinstance(cond, Conditioning):
            return cond.to(self.device)
        self.conditioner.check(cond)
        return self.conditioner({k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in cond.items()})

    def _chosen(
        self, sampler: Sampler | str | None, guider: Guider | float | None, has_negative: bool
    ) -> tuple[Sampler, Guider]:
        solver: Sampler = build(sampler, "sampler", "sampler") if isinstance(sampler, str) else sampler or self.sampler
        guider = self.guider if guider is None else CFGGuider(guider) if isinstance(guider, int | float) else guider
        if has_negative and isinstance(guider, NoneGuider):
            raise ValueError(
                "sample: a negative is what guidance moves away from, and this engine's guider asks for none. "
                "Give one: guider=2.0 is classifier-free guidance of that scale."
            )
        return solver, guider

    def _scaling(self, guider: Guider) -> Guider:
        """The guider, by which x0 is scaled along the walk as it was in training."""
        scale = self.x0_scale
        if scale is None or isinstance(guider, X0ScaleGuider):
            return guider
        return X0ScaleGuider(scale.last, scale.num_falling, scale.num_rows, guider)

    def _check_concat(self, cond: Conditioning, noise: Tensor) -> None:
        """What is put behind the noisy sample agrees with it in all but channels; a picture may be for all frames."""
        behind = cond.get("concat")
        if behind is None:
            return
        axes, wanted = tuple(behind.shape[2:]), tuple(noise.shape[2:])
        if axes not in (wanted, wanted[-2:], (1, *wanted[-2:])[-len(wanted) :]):
            fields = ", ".join(map(repr, self.conditioner.fields("concat"))) or "nothing by name"
            raise ValueError(
                f"sample: 'concat', fed by {fields}, is {tuple(behind.shape)}, and lies behind samples that are (B, "
                f"{', '.join(map(str, noise.shape[1:]))}) to the network: all axes after the channels must agree."
            )

    def _latent_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        shape = shape or self.sample_shape
        if shape is None:
            raise ValueError("sample: give a shape, such as (3, 64, 64), or set sample_shape in the engine's config.")
        return self.first_stage.latent_shape(shape)

    # Around it -----------------------------------------------------------------------------------

    def pictures(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """Inputs, noised, denoised and samples; the columns go from little noise to much."""
        pixels = batch[self.input_key]
        x0, cond = self.first_stage.encode(pixels), self.conditioner(batch)
        level, noise = self.draw(x0, batch)
        x0 = self.scaled(x0, level)
        x_t = level.mix(x0, noise)
        denoised = self.denoiser(x_t, level, cond).x0
        samples = self.sample(cond, tuple(pixels.shape[1:]), num=len(pixels), seeds=seed)
        order = level.ratio.argsort().to(pixels.device)
        size = (level.alpha**2 + level.sigma**2).sqrt()  # without it much noise is just black and white
        return {
            "inputs": pixels[order],
            "noised": self.first_stage.decode(x_t / spread(size, x_t))[order],
            "denoised": self.first_stage.decode(denoised)[order],
            "samples": samples[order],
        }

    def compile(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the network in place, and those of companions that mixins hold; mixins, guiders and samplers stay as
        they are.

        With a reference model attached there are two graphs, one with gradient and one without.
        """
        # A hook on the compiled module itself would otherwise be a graph of its own.
        torch._dynamo.config.wrap_top_frame = True
        # Parts of one mixin hand values on inside a block; where it is recomputed, they do so again.
        if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        companions = [companion for part in parts(self) for companion in part.companions()]
        for denoiser in (self.denoiser, *companions):
            network: nn.Module = getattr(denoiser, "network", denoiser)  # type: ignore[assignment]
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
