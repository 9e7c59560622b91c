"""UNets as mixins see them: networks whose ``role`` is ``unet``, of pictures or, frames being rows, of videos."""

from __future__ import annotations

from torch import Tensor, nn

from vdiff.networks.layers import Downsample, Upsample
from vdiff.networks.resblock import ResBlock


def check_unet(module: nn.Module, site: str, who: str) -> None:
    """Raise a ValueError where there are no stages with skips, or not of pictures."""
    where = f"{who}: {site or 'the module itself'} is a {type(module).__name__}"
    if getattr(module, "role", None) != "unet":
        raise ValueError(f"{where}, not a UNet.")
    if (dims := getattr(module, "dims", 2)) != 2:
        raise ValueError(f"{where} with dims={dims}; it goes on those of pictures or frames, dims=2.")


def hint_rows(hint: Tensor, x: Tensor, channels: int, factor: int, who: str) -> Tensor:
    """A hint for x, ``factor`` times as large, as pictures: ``(B, ...)``, or ``(b f)`` where each frame has its own.

    Raises:
        ValueError: of another shape than ``(B, channels, f H, f W)`` or, for a video, ``(B, channels, F, f H, f W)``.
    """
    *frames, height, width = x.shape[2:]
    one = (channels, height * factor, width * factor)
    each = (channels, *frames, *one[1:])
    if hint.shape[1:] not in (one, each):
        wanted = " or ".join(f"(B, {', '.join(map(str, shape))})" for shape in dict.fromkeys((each, one)))
        raise ValueError(f"{who}: a hint for {tuple(x.shape[2:])} is {wanted}, got {tuple(hint.shape)}.")
    return hint if hint.ndim == 4 else hint.transpose(1, 2).flatten(0, 1)


def resamples(stage: nn.Module) -> bool:
    """Whether height and width behind a stage are others than in front of it."""
    return any(
        isinstance(m, Downsample | Upsample) or (isinstance(m, ResBlock) and m.resample is not None)
        for m in stage.modules()
    )
