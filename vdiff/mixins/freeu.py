"""FreeU: more of a UNet's stream and less of the low frequencies in its skips, without training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin
from vdiff.mixins.controlnet import skip_widths
from vdiff.mixins.unets import check_unet, resamples


class FreeU(Mixin, name="freeu"):
    """In the decoder's lowest resolutions, half of the stream's channels times b, the skip's low frequencies times s.

    In a UNet of videos every frame is a picture, and its frequencies are those of height and width.

    Args:
        b, s: A number for each resolution, from the lowest; those for Stable Diffusion 1 are b (1.5, 1.6) and
            s (0.9, 0.2), for 2.1 (1.4, 1.6), for SDXL b (1.3, 1.4).
        on: UNets of pictures or videos.
        name: See :class:`Mixin`.
        scale: 0 is b and s of 1.

    References:
        Si et al., arXiv:2309.11497, version 1, as in diffusers: b is one number everywhere. In version 2 it goes from 1
            to b as the stream's mean over channels goes from its least to its greatest, which is not done here.
    """

    def __init__(
        self,
        b: tuple[float, ...] = (1.5, 1.6),
        s: tuple[float, ...] = (0.9, 0.2),
        on: On = "role:unet",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if len(b) != len(s) or not b:
            raise ValueError(f"FreeU: b and s have one number for each resolution, got {b} and {s}.")
        self.b, self.s = tuple(b), tuple(s)

    def part(self, module: nn.Module, site: str) -> Part:
        check_unet(module, site, "FreeU")
        return FreeUPart(self.b, self.s)


class FreeUPart(Part):
    """At a UNet; what is done is done by its helpers at blocks of the decoder."""

    def __init__(self, b: tuple[float, ...], s: tuple[float, ...]) -> None:
        super().__init__()
        self.b, self.s = b, s

    def helpers(self, module: Any) -> dict[str, Part]:
        widths, level, found = skip_widths(module)[::-1], 0, {}
        for i, block in enumerate(module.output_blocks):
            if level < len(self.b):
                found[f"output_blocks.{i}"] = Freed(self.b[level], self.s[level], widths[i])
            level += resamples(block)
        return found


class Freed(Part):
    """At a block of a decoder, called with the stream and a skip of ``width`` channels as one."""

    def __init__(self, b: float, s: float, width: int) -> None:
        super().__init__()
        self.b, self.s, self.width = b, s, width

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stream, skip = args[0].split([args[0].shape[1] - self.width, self.width], dim=1)
        half = stream.shape[1] // 2
        amount = self.amount(stream)
        more = stream[:, :half] * (1 + amount * (self.b - 1))
        skip = skip + amount * (filtered(skip, self.s) - skip)
        return (torch.cat([more.to(stream.dtype), stream[:, half:], skip.to(stream.dtype)], dim=1), *args[1:]), kwargs


def filtered(x: Tensor, factor: float) -> Tensor:
    """``(B, C, H, W)`` with frequencies 0 and -1 along both axes times ``factor``; float32 within."""
    height, width = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    low = ((rows == 0) | (rows == height - 1))[:, None] & ((columns == 0) | (columns == width - 1))
    spectrum = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)))
    return torch.fft.ifft2(torch.where(low, spectrum * factor, spectrum)).real.to(x.dtype)
