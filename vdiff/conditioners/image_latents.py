"""The latents of pictures and videos as conditions, with noise that belongs to the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vdiff.conditioners.base import Embedder, Embedding, Feeds, check_is_tensor, is_on_host
from vdiff.first_stages import FirstStage
from vdiff.networks import sinusoidal
from vdiff.process import RowKeys, normal, spread, upload


@dataclass(frozen=True, eq=False)
class Noised:
    """A picture, and how much noise each row gets.

    Attributes:
        pixels: ``(B, c, h, w)`` or ``(B, c, f, h, w)``.
        sigma: ``(B,)`` float32 on the host; zero: none.
        keys: Of the rows' noise; None: the same noise for all rows.
        given: Which rows have a picture, ``(B,)``, True where there is one; None: all.
    """

    pixels: Tensor
    sigma: Tensor
    keys: RowKeys | None
    given: Tensor | None = None


class ImageLatentsEmbedder(Embedder, name="image_latents"):
    r"""The latents of a picture, noised a little, for ``concat``; and how much, for the network to know.

    :math:`\mathrm{encode}(x + \sigma \epsilon)` (Stable Video Diffusion, CogVideoX) or, with ``noised: latents``,
    :math:`\mathrm{encode}(x) + \sigma \epsilon`. How much, the batch field ``sigma_field`` says where there is one.
    Otherwise training draws :math:`\ln\sigma` from a normal distribution, by the row's key, and sampling takes
    ``sigma``.

    Args:
        first_stage: Frozen, with the scale and shift that belong to these latents. Stable Video Diffusion has its
            own encoder for them, whose latents are not scaled. None: the engine's, which both then share.
        reads: Pictures ``(B, c, h, w)`` in the first stage's range, or videos ``(B, c, f, h, w)``.
        feeds: The name that the latents feed.
        drop: See :class:`Embedder`.
        null: Of the latents: ``zero``, or ``same`` where guidance leaves the picture alone (CogVideoX, DynamiCrafter);
            training drops them to zero in both cases.
        scale: Latents are multiplied by it.
        log_mean, log_std: Of :math:`\ln\sigma` in training; -3 and 0.5 in both papers. ``log_mean`` None: ``sigma`` in
            training too.
        sigma: When sampling; 0.02 in Stable Video Diffusion.
        noised: ``pixels``, ``latents`` or ``nothing``.
        level_feeds: The name that the level feeds as sines and cosines of ``sigma``; None: none.
        level_width: Of these.
        level_null: Whether the null, as a row that is dropped, keeps the level (Stable Video Diffusion) or has zero
            for its waves (SV4D).
        sigma_field: The field with the level of each row, ``(B,)``, in training and sampling.
        frames: Of the video in pixels. A picture's latents become those of so many frames: as many as the engine's
            first stage makes of them, 13 of 49 in CogVideoX.
        fill: What the frames after the first are: the picture again (Stable Video Diffusion), zero (CogVideoX); or
            ``each``: every frame in turn, equally often, as the video that all views of SV4D see.
        given_field: A field ``(B,)``, 0 in rows that have no picture, whatever stands in its place: their latents are
            zero in the null as well as outside it, as where SV4D 2.0 begins. A batch without it has all pictures.

    References:
        Blattmann et al., arXiv:2311.15127, appendix D; Yang et al., arXiv:2408.06072; noise augmentation, Ho et al.,
        arXiv:2106.15282.
    """

    def __init__(
        self,
        first_stage: FirstStage | None = None,
        reads: str = "image",
        feeds: str = "concat",
        drop: float = 0.0,
        null: Literal["zero", "same"] = "zero",
        scale: float = 1.0,
        log_mean: float | None = -3.0,
        log_std: float = 0.5,
        sigma: float = 0.02,
        noised: Literal["pixels", "latents", "nothing"] = "pixels",
        level_feeds: str | None = None,
        level_width: int = 256,
        level_null: Literal["same", "zero"] = "same",
        sigma_field: str = "cond_aug",
        frames: int | None = None,
        fill: Literal["repeat", "zero", "each"] = "repeat",
        given_field: str | None = None,
    ) -> None:
        super().__init__(reads, feeds, drop, null)
        if sigma < 0 or log_std < 0 or (frames is not None and frames < 1):
            raise ValueError("ImageLatentsEmbedder: sigma and log_std are at least 0, frames at least 1.")
        self.is_picture = fill != "each" and feeds != "views"  # which are videos of moments and of views
        self.first_stage = None if first_stage is None else first_stage.requires_grad_(False).eval()
        self._shared: tuple[FirstStage, ...] = ()  # not a child: it is the engine's
        self.scale = scale
        self.log_mean, self.log_std, self.sigma, self.noised = log_mean, log_std, sigma, noised
        self.level_feeds, self.level_width, self.level_null = level_feeds, level_width, level_null
        self.sigma_field, self.given_field, self.frames, self.fill = sigma_field, given_field, frames, fill

    def share(self, first_stage: FirstStage) -> None:
        self._shared = (first_stage,)

    @property
    def stage(self) -> FirstStage:
        """What makes these latents."""
        stage = self.first_stage if self.first_stage is not None else next(iter(self._shared), None)
        if stage is None:
            raise ValueError("ImageLatentsEmbedder: no first stage; give one, or put the embedder into an engine.")
        return stage

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels, as they are scaled here."""
        return self.stage.encode(pixels) * self.scale

    def check(self, batch: Mapping[str, Any]) -> None:
        pixels, who = batch[self.reads], f"ImageLatentsEmbedder: {self.reads!r}"
        check_is_tensor(pixels, self.reads, "pictures (B, c, h, w)")
        if pixels.ndim not in (4, 5):
            raise ValueError(
                f"{who} holds pictures (B, c, h, w) or videos (B, c, f, h, w); its shape is {tuple(pixels.shape)}."
            )
        if pixels.is_floating_point() and not is_on_host(pixels):
            return
        given = self.read(batch).given
        pixels = pixels if given is None else pixels[given.to(pixels.device)]
        if pixels.numel():
            self.stage.check_pixels(pixels, who)

    def idle_weights(self) -> list[str]:
        """Globs over weights that nothing reads: what decodes."""
        return ["first_stage.decoder.*", "first_stage.post_quant_conv.*"]

    def read(self, batch: Mapping[str, Any], is_training: bool = False) -> Noised:
        pixels = super().read(batch)
        keys = RowKeys.of(batch) if "noise_key" in batch and "step" in batch else None
        if self.sigma_field in batch:
            sigma = torch.as_tensor(batch[self.sigma_field]).float().cpu()
        elif is_training and self.log_mean is not None:
            drawn = RowKeys.of(batch).normal(f"augmentation/{self.reads}/level", ())
            sigma = torch.exp(self.log_mean + self.log_std * drawn)
        else:
            sigma = torch.full((len(pixels),), self.sigma)
        given = None
        if self.given_field is not None and self.given_field in batch:
            given = torch.as_tensor(batch[self.given_field]) != 0
        for field, numbers in ((self.sigma_field, sigma), (self.given_field, given)):
            if numbers is not None and numbers.shape != (len(pixels),):
                raise ValueError(
                    f"ImageLatentsEmbedder: {field} holds one number per row, ({len(pixels)},); "
                    f"its shape is {tuple(numbers.shape)}."
                )
        return Noised(pixels, sigma, keys, given)

    def forward(self, value: Noised) -> dict[str, Embedding]:
        pixels, sigma = value.pixels, upload(value.sigma, value.pixels.device)
        if self.noised == "pixels":
            pixels = self._with_noise(pixels, sigma, value.keys)
        latents = self.encode(pixels)
        if self.noised == "latents":
            latents = self._with_noise(latents, sigma, value.keys)
        if self.frames is not None:
            frames = self._num_latents(pixels.shape, self.frames)
            latents = self._filled(latents if latents.ndim == 5 else latents[:, :, None], frames)
        if value.given is not None:
            latents = torch.where(spread(upload(value.given, latents.device), latents), latents, 0)
        feeds = {self.feeds: Embedding(latents)}
        if self.level_feeds is not None:
            feeds[self.level_feeds] = Embedding(sinusoidal(sigma, self.level_width))
        return feeds

    def silent(self, said: Feeds) -> Feeds:
        null = super().silent(said)
        return null if self.level_null == "zero" else {**said, self.feeds: null[self.feeds]}

    def _with_noise(self, x: Tensor, sigma: Tensor, keys: RowKeys | None) -> Tensor:
        purpose = f"augmentation/{self.reads}/noise"
        # Without keys, one noise for all rows: a row must not depend on its place in the batch.
        noise = keys.normal(purpose, x.shape[1:]) if keys is not None else normal(x.shape[1:], purpose)
        return x + spread(sigma, x) * upload(noise, x.device).to(x.dtype)

    def _num_latents(self, shape: Sequence[int], frames: int) -> int:
        """Of a video of so many frames, in the first stage that makes what is sampled."""
        stage = next(iter(self._shared), self.first_stage)
        assert stage is not None
        made = stage.latent_shape((shape[1], frames, *shape[-2:]))
        if len(made) != 4:
            raise ValueError(f"ImageLatentsEmbedder: {type(stage).__name__} has latents without frames; set no frames.")
        return made[1]

    def _filled(self, latents: Tensor, frames: int) -> Tensor:
        came = latents.shape[2]
        more = frames - came
        if more < 0 or (self.fill == "each" and more % came):
            whole = " With fill: each it is a multiple of them." if self.fill == "each" else ""
            raise ValueError(f"ImageLatentsEmbedder: {came} latent frames came, and the video has {frames}.{whole}")
        if self.fill == "each":
            return latents.repeat_interleave(frames // came, dim=2)
        last = latents[:, :, -1:].expand(-1, -1, more, -1, -1)
        return torch.cat([latents, last if self.fill == "repeat" else torch.zeros_like(last)], 2)
