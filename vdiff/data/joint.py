"""Joint samples: a picture and a map of it, as two streams of one group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff.data.base import Dataset, Group
from vdiff.registry import Registered


class DerivedMap(Registered, kind="derived_map"):
    """What can be computed from a picture: its edges, say."""

    @abstractmethod
    def __call__(self, picture: Tensor) -> Tensor:
        """The map of ``(c, h, w)`` or ``(c, f, h, w)`` in [-1, 1], in the same shape and range."""


class SobelMap(DerivedMap, name="sobel"):
    r"""Strength of edges, :math:`\sqrt{g_x^2 + g_y^2}` of Sobel's differences of the mean channel, in all channels.

    -1 is flat. The border is repeated, so it is no edge.

    Args:
        full: What difference in grey value across an edge gives 1, as a share of the whole range; sharper ones
            are clipped.
    """

    def __init__(self, full: float = 1.0) -> None:
        if not full > 0:
            raise ValueError(f"SobelMap: full must be positive, got {full}.")
        self.full = full

    def __call__(self, picture: Tensor) -> Tensor:
        grey = picture.float().mean(0).reshape(-1, 1, *picture.shape[-2:])
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device) / 4
        kernels = torch.stack([across, across.T])[:, None]  # a step of height 1 gives 1
        strength = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1)
        unit = (strength / (2 * self.full)).clamp(max=1)
        return (2 * unit - 1).reshape(picture.shape[1:]).expand_as(picture).to(picture.dtype)


class JointDataset(Dataset, name="joint"):
    """Every example with a partner: a group of two rows, ``stream`` 0 the picture and ``stream`` 1 its map.

    Collation gives the streams noise keys of their own and each row its ``partner``, so joint attention can let
    each look at the other. Both rows have the same other fields.

    Args:
        dataset: One row per example, its pictures in [-1, 1].
        field: The field with the picture; the map goes into the same.
        map: How the partner is computed from the picture.
        partner_field: Or the field in which it already is, such as the depth in a file of arrays.
    """

    def __init__(
        self,
        dataset: Dataset,
        field: str = "image",
        map: DerivedMap | None = None,
        partner_field: str | None = None,
    ) -> None:
        if (map is None) == (partner_field is None):
            raise ValueError(
                "JointDataset: say either how the partner is made (map: sobel) or where it is (partner_field)."
            )
        if map is not None and tuple(dataset.ranges.get(field, (-1.0, 1.0))) != (-1.0, 1.0):
            raise ValueError(
                f"JointDataset: a map is made of pictures in [-1, 1]; {type(dataset).__name__} has {field!r} in "
                f"{list(dataset.ranges[field])}."
            )
        self.dataset, self.field, self.map, self.partner_field = dataset, field, map, partner_field
        self.ranges: Mapping[str, tuple[float, float]] = dataset.ranges
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Group:
        return self._with_partner(self.dataset[index])

    def visit(self, index: int, key: int) -> Group:
        """The map is made of the picture as this visit crops and flips it."""
        return self._with_partner(self.dataset.visit(index, key))

    @property
    def num_dropped(self) -> int:
        return self.dataset.num_dropped

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.dataset.dropped

    def _with_partner(self, row: Group) -> Group:
        wanted = [self.field] if self.partner_field is None else [self.field, self.partner_field]
        if not isinstance(row, Mapping) or any(name not in row for name in wanted):
            has = f"has {', '.join(row)}" if isinstance(row, Mapping) else "has groups of rows"
            raise ValueError(
                f"JointDataset: needs rows with {' and '.join(map(repr, wanted))}; {type(self.dataset).__name__} {has}."
            )
        others = {name: value for name, value in row.items() if name not in wanted}
        picture = torch.as_tensor(row[self.field])
        partner = self.map(picture) if self.map is not None else torch.as_tensor(row[wanted[1]])
        return [others | {self.field: x, "stream": stream} for stream, x in enumerate((picture, partner))]
