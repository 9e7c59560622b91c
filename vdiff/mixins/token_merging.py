"""Token merging: self-attention among fewer tokens, those that are alike as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff.hooks import On, Part, bringer
from vdiff.mixins.base import Mixin
from vdiff.mixins.perturbation import checked_grid, checked_text, pictures


class TokenMerging(Mixin):
    """Tokens that are most alike are averaged before self-attention, and get the same answer after it.

    One token of every cell of 2 by 2 takes others in, the first: nothing is drawn, so that a run repeats. Attention
    costs :math:`(1 - r)^2` of what it did. Tokens are merged within their frame, whether frames are rows or lie one
    behind another in a row. Whatever else is attached to the attention acts among the merged tokens.

    Args:
        ratio: Share r of the tokens that are merged into others, up to three quarters.
        grid: Height and width of the picture in tokens, which come line by line; frames, height and width where
            several pictures lie one behind another in a row. By default tokens are one square picture.
        text: How many tokens in front are not the picture's and stay, where text stands in one sequence with it.
        on: Self-attention over tokens ``(B, N, c)`` without masks; the authors take the highest resolution alone.
        name: See :class:`Mixin`.
        scale: Multiplies the ratio. It changes shapes, so that every value is a graph of its own, and rows cannot have
            different ones.

    References:
        Bolya & Hoffman, arXiv:2303.17604; Bolya et al., arXiv:2210.09461.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        grid: tuple[int, ...] | None = None,
        text: int = 0,
        on: On = "role:self_attention",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if not 0 <= ratio <= 0.75:
            raise ValueError(f"TokenMerging: ratio is in [0, 0.75], got {ratio}.")
        self.ratio, self.grid = ratio, checked_grid(grid, "TokenMerging")
        self.text = checked_text(text, "TokenMerging")

    def part(self, module: nn.Module, site: str) -> TokenMergingPart:
        if not hasattr(module, "to_q"):
            raise ValueError(f"TokenMerging: {site!r} ({type(module).__name__}) does not attend over tokens (to_q).")
        return TokenMergingPart(self.ratio, self.grid, self.text)


class TokenMergingPart(Part):
    is_innermost = True

    def __init__(self, ratio: float, grid: tuple[int, ...] | None, text: int = 0) -> None:
        super().__init__()
        self.ratio, self.grid, self.text = ratio, grid, text
        self.merge: Merge | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["x"]
        rest = {name: value for name, value in kwargs.items() if name != "x"}
        if self.gate is not None:
            raise ValueError(
                f"TokenMerging {self.mixin_name!r}: rows cannot be merged differently; take its gate away."
            )
        if any(value is not None for value in (*args[1:], *rest.values())):
            name = next((name for name in rest if bringer(module, name)), None)
            also = f"; {bringer(module, name)!r}, attached there as well, brings {name!r}" if name else ""
            raise ValueError(
                f"TokenMerging: a {type(module).__name__} was called with a context, a mask or positions, which know "
                f"nothing of merged tokens{also}. Narrow `on`{' of one of them' if also else ''}."
            )
        text, tokens = pictures(x, self.grid, self.text, "TokenMerging")
        height, width = tokens.shape[2:4]
        num = int(height * width * min(self.ratio * self.strength, 0.75))
        self.merge = None
        if num:
            tokens = tokens.flatten(2, 3).flatten(0, 1)  # (b f, h w, c)
            self.merge = Merge.of(tokens, num, height, width)
            x = torch.cat([text, self.merge(tokens).unflatten(0, (len(x), -1)).flatten(1, 2)], dim=1)
        return (x, *args[1:]), rest

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        merge, self.merge = self.merge, None
        if merge is None:
            return output
        text, tokens = output[:, : self.text], output[:, self.text :]
        tokens = merge.undone(tokens.unflatten(1, (-1, merge.left)).flatten(0, 1))
        return torch.cat([text, tokens.unflatten(0, (len(output), -1)).flatten(1, 2)], dim=1)


class Merge:
    """Which tokens go into which.

    Attributes:
        size: N, the number of tokens.
        taking: Tokens that take others in, ``(T,)``.
        staying: Others that stay, ``(B, N - T - num, 1)``.
        going: Those that are merged, ``(B, num, 1)``.
        into: The place in ``taking`` that each of them goes into, ``(B, num, 1)``.
    """

    def __init__(self, size: int, taking: Tensor, staying: Tensor, going: Tensor, into: Tensor) -> None:
        self.size, self.taking, self.staying, self.going, self.into = size, taking, staying, going, into

    @classmethod
    def of(cls, x: Tensor, num: int, height: int, width: int) -> Merge:
        """The ``num`` tokens most alike to one that takes them in, by the cosine."""
        place = torch.arange(height * width, device=x.device)
        first = ((place // width) % 2 == 0) & ((place % width) % 2 == 0)
        order = torch.argsort(first.to(torch.uint8), descending=True, stable=True)
        num_taking = -(-height // 2) * -(-width // 2)
        taking, others = order[:num_taking], order[num_taking:]
        with torch.no_grad():
            unit = F.normalize(x, dim=-1)
            alike, best = (unit[:, others] @ unit[:, taking].mT).max(-1)
            rank = alike.argsort(dim=-1, descending=True, stable=True)
        num = min(num, len(others))
        going, staying = rank[:, :num], rank[:, num:]
        return cls(
            len(place), taking, others[staying][..., None], others[going][..., None], best.gather(1, going)[..., None]
        )

    @property
    def left(self) -> int:
        """How many tokens there are after merging."""
        return self.size - self.going.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, N, c)`` to ``(B, N - num, c)``: those that stay, then those that took others in, as means."""
        width = x.shape[-1]
        stay = x.gather(1, self.staying.expand(-1, -1, width))
        go = x.gather(1, self.going.expand(-1, -1, width))
        take = x[:, self.taking].scatter_reduce(1, self.into.expand(-1, -1, width), go, "mean")
        return torch.cat([stay, take], dim=1)

    def undone(self, x: Tensor) -> Tensor:
        """``(B, N - num, c)`` to ``(B, N, c)``; tokens that were merged are the same."""
        width, num = x.shape[-1], self.staying.shape[1]
        stay, take = x[:, :num], x[:, num:]
        out = x.new_zeros(len(x), self.size, width)
        out[:, self.taking] = take
        out = out.scatter(1, self.staying.expand(-1, -1, width), stay)
        return out.scatter(1, self.going.expand(-1, -1, width), take.gather(1, self.into.expand(-1, -1, width)))
