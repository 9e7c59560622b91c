r"""Perturbations: a network disturbed on purpose, in the rows of a batch that ask for it.

What a disturbed network says is worse in a telling way, and guidance moves away from it
(:class:`~vdiff.samplers.PerturbedGuider`). A perturbation acts where its gate is 1 (between 0 and 1 in part) and
nowhere else: rows with gate 0, and calls without a gate such as those of training, are as without it, bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On, Part
from vdiff.mixins.base import Mixin


class PerturbationPart(Part):
    """Between what the host says and something worse, row by row as the gate says."""

    @abstractmethod
    def worse(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """What a disturbed host returns; shaped as ``output``."""

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self.gate is None:
            return output
        worse = self.worse(module, args, kwargs, output)
        if isinstance(output, Tensor):
            return self.between(output, worse)
        return type(output)(self.between(o, w) for o, w in zip(output, worse, strict=True))

    def between(self, value: Tensor, worse: Tensor) -> Tensor:
        """Exactly ``value`` at 0 and ``worse`` at 1."""
        return torch.lerp(value, worse.to(value.dtype), self.amount(value))


class PAG(Mixin, name="pag"):
    """Perturbed attention: every token attends to itself alone, the attention map is the identity.

    In UNets of videos that is attention over the pixels of each frame; over time (``role:temporal_self_attention``) it
    is left alone. In transformers over all frames no frame learns of another there.

    Args:
        text: How many tokens in front are not the picture's, where text stands in one sequence with it (226 in
            CogVideoX): they attend and are attended to as ever, as in diffusers' for Stable Diffusion 3. With 0
            the text is left to itself, too.
        on: Self-attention that keeps its values in ``to_v`` and its output in ``to_out``, or else takes ``mask=`` and
            hands it to :func:`vdiff.attention.attend`.
        name, scale: See :class:`Mixin`.

    References:
        Ahn et al., arXiv:2403.17377, eq. 14; they choose the layers in the middle of the network.
    """

    def __init__(
        self, text: int = 0, on: On = "role:self_attention", name: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(on, name, scale)
        self.text = checked_text(text, "PAG")

    def part(self, module: nn.Module, site: str) -> PAGPart:
        return PAGPart(self.text)


class PAGPart(PerturbationPart):
    def __init__(self, text: int = 0) -> None:
        super().__init__()
        self.text = text

    def worse(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = _input(args, kwargs)
        is_of_tokens = hasattr(module, "to_v") and hasattr(module, "to_out")
        if is_of_tokens and not self.text:
            return module.to_out(module.to_v(x))  # type: ignore[operator]
        num = x.shape[1] if is_of_tokens else math.prod(x.shape[2:])  # a feature map's pixels are normalised together
        own = torch.eye(num, dtype=torch.bool, device=x.device)
        own[: self.text] = own[:, : self.text] = True
        rest = {name: value for name, value in kwargs.items() if name not in ("x", "mask")}
        mask = kwargs.get("mask")
        own = own[None, None] if mask is None else own & mask[:, None, None]
        return module.forward(x, mask=own, **rest)  # not called: this part stays out of it


class SEG(Mixin, name="seg"):
    r"""Smoothed energy: queries blurred over the picture by a Gaussian, keys and values as they are.

    Of a video every frame is blurred by itself, whether frames are rows or lie one behind another in a row.

    Args:
        blur: Standard deviation of the Gaussian in tokens; infinite: all queries are their mean, which the paper
            found to work well and costs least.
        grid: Height and width of the picture in tokens, which come line by line; frames, height and width where
            several pictures lie one behind another in a row. By default tokens are one square picture.
        text: How many tokens in front are not the picture's and stay sharp, where text stands in one sequence with it.
        on: Self-attention with linear queries, ``to_q``, that takes ``context=``.
        name, scale: See :class:`Mixin`.

    References:
        Hong, arXiv:2408.00760, section 4.
    """

    def __init__(
        self,
        blur: float = math.inf,
        grid: tuple[int, ...] | None = None,
        text: int = 0,
        on: On = "role:self_attention",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if blur <= 0:
            raise ValueError(f"SEG: blur must be positive, got {blur}.")
        self.blur, self.grid, self.text = blur, checked_grid(grid, "SEG"), checked_text(text, "SEG")

    def part(self, module: nn.Module, site: str) -> SEGPart:
        if not hasattr(module, "to_q"):
            raise ValueError(
                f"SEG: {site!r} ({type(module).__name__}) has no queries of its own (to_q) to blur. Narrow `on`, or "
                "use PAG, which goes on every self-attention."
            )
        return SEGPart(self.blur, self.grid, self.text)


class SEGPart(Part):
    """Queries are linear in their input, so to blur them is to ask from a blurred input."""

    brings = ("context",)

    def __init__(self, blur: float, grid: tuple[int, ...] | None, text: int = 0) -> None:
        super().__init__()
        self.blur, self.grid, self.text = blur, grid, text

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.gate is None:
            return args, kwargs
        x = _input(args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in ("x", "context")}
        if any(value is not None for value in (*args[1:], kwargs.get("context"))):
            raise ValueError(f"SEG: a {type(module).__name__} was called with a context; it is for self-attention.")
        asking = torch.lerp(x, self._blurred(x), self.amount(x))
        return (asking,), {**rest, "context": x}

    def _blurred(self, x: Tensor) -> Tensor:
        text, tokens = pictures(x, self.grid, self.text, "SEG")
        if math.isinf(self.blur):
            blurred = tokens.mean((2, 3), keepdim=True).expand_as(tokens)
        else:
            rows, columns = (_blur(size, self.blur, x) for size in tokens.shape[2:4])
            blurred = torch.einsum("hi,wj,bfijc->bfhwc", rows, columns, tokens)
        return torch.cat([text, blurred.flatten(1, 3)], dim=1) if self.text else blurred.flatten(1, 3)


class SkipLayer(Mixin, name="skip_layer"):
    """Layers left out: skip-layer and spatiotemporal skip guidance.

    In UNets of videos the default leaves blocks over pixels out and those over time in; ``role:temporal_*`` are the
    others.

    Args:
        on: Layers, for example some ``["*.blocks.7", "*.blocks.8"]``; by default all transformer blocks, which is
            more than anybody wants.
        returns: What a left-out layer says: its own ``input`` (a block with its residual inside), or ``nothing``, zeros
            (a branch that is added to a residual outside).
        name, scale: See :class:`Mixin`.

    References:
        Hyung et al., arXiv:2411.18664, section 4; Stability AI, Stable Diffusion 3.5 (layers 7, 8 and 9 of medium).
    """

    def __init__(
        self,
        on: On = "role:transformer_block",
        returns: Literal["input", "nothing"] = "input",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if returns not in ("input", "nothing"):
            raise ValueError(f"SkipLayer: returns must be 'input' or 'nothing', got {returns!r}.")
        self.returns = returns

    def part(self, module: nn.Module, site: str) -> SkipLayerPart:
        return SkipLayerPart(self.returns)


class SkipLayerPart(PerturbationPart):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns = returns

    def worse(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        outputs = (output,) if isinstance(output, Tensor) else output
        given = [*args, *kwargs.values()][: len(outputs)]  # a block of two streams returns both, in the order given
        if self.returns == "nothing":
            worse = [torch.zeros_like(value) for value in outputs]
        else:
            for value, own in zip(outputs, given, strict=True):
                if not isinstance(own, Tensor) or own.shape != value.shape:
                    raise ValueError(
                        f"SkipLayer: a {type(module).__name__} returns {tuple(value.shape)} for an input of another "
                        "shape and cannot be left out. Narrow `on`, or set returns='nothing'."
                    )
            worse = given
        return worse[0] if isinstance(output, Tensor) else worse


def checked_text(text: int, who: str) -> int:
    if not isinstance(text, int) or text < 0:
        raise ValueError(f"{who}: text is how many tokens stand in front of the picture's, got {text!r}.")
    return text


def pictures(x: Tensor, grid: tuple[int, ...] | None, text: int, who: str) -> tuple[Tensor, Tensor]:
    """``(B, text + F h w, c)`` as text, and pictures ``(B, F, h, w, c)``.

    Args:
        grid: (h, w), and F is 1; or (F, h, w). None: F is 1, and the picture square.

    Raises:
        ValueError: the tokens are no such pictures.
    """
    num = x.shape[1] - text
    frames, height, width = (1,) * (3 - len(grid)) + tuple(grid) if grid else (1, *(math.isqrt(max(num, 0)),) * 2)
    if num < 1 or num != frames * height * width:
        behind = f" behind {text} of text" if text else ""
        of = f"{frames} pictures" if frames > 1 else "a picture"
        raise ValueError(
            f"{who}: {num} tokens{behind} are not {of} of {height} by {width}. Say how they lie: grid=(h, w) or "
            "(frames, h, w), and text=n where n others stand in front."
        )
    return x[:, :text], x[:, text:].unflatten(1, (frames, height, width))


def checked_grid(grid: Sequence[int] | None, who: str) -> tuple[int, ...] | None:
    if grid is not None and (len(grid) not in (2, 3) or any(not isinstance(n, int) or n < 1 for n in grid)):
        raise ValueError(f"{who}: grid is (height, width) or (frames, height, width) in tokens, got {grid!r}.")
    return None if grid is None else tuple(grid)


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["x"]


def _blur(size: int, std: float, like: Tensor) -> Tensor:
    """The Gaussian blur of a line, reflected at its ends, as a matrix ``(size, size)`` whose rows sum to 1."""
    reach = math.ceil(6 * std) // 2  # a kernel of the odd length next to 6 std, as the authors'
    offsets = torch.arange(-reach, reach + 1, device=like.device)
    weights = torch.exp(-0.5 * (offsets / std) ** 2).to(like.dtype)
    places = (torch.arange(size, device=like.device)[:, None] + offsets) % max(1, 2 * (size - 1))
    places = torch.minimum(places, max(1, 2 * (size - 1)) - places) if size > 1 else torch.zeros_like(places)
    return (F.one_hot(places, size).to(like.dtype) * (weights / weights.sum())[:, None]).sum(1)
