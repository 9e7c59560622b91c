"""Videos for networks that know pictures only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vdiff.first_stages.base import FirstStage


class FramesAsChannelsFirstStage(FirstStage, name="frames_as_channels"):
    """A video of a few frames as one picture of many channels, up to a scale and a shift.

    Latents are ``(B, c * f, h, w)``, a channel's frames next to each other: what moves by a pixel or two from frame
    to frame is then within reach of a small filter. For short clips of a fixed length, and for small compute; it has
    no notion of time.

    Args:
        num_frames: f, of every video.
        scale, shift: ``latent = (pixel - shift) * scale``.
        pixel_range: The values of the pixels.
    """

    def __init__(
        self,
        num_frames: int,
        scale: float = 1.0,
        shift: float = 0.0,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if num_frames < 1 or scale == 0:
            raise ValueError(
                f"FramesAsChannelsFirstStage: num_frames must be at least 1 and scale not 0; got {num_frames}, {scale}."
            )
        self.num_frames, self.scale, self.shift, self.pixel_range = num_frames, scale, shift, pixel_range

    def encode(self, pixels: Tensor) -> Tensor:
        self.latent_shape(pixels.shape[1:])
        return (pixels.flatten(1, 2) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return latents.unflatten(1, (-1, self.num_frames)) / self.scale + self.shift

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, ...]:
        if len(pixel_shape) != 4 or pixel_shape[1] != self.num_frames:
            raise ValueError(
                f"FramesAsChannelsFirstStage: takes videos (c, {self.num_frames}, h, w); got {tuple(pixel_shape)}."
            )
        channels, frames, height, width = pixel_shape
        return channels * frames, height, width
