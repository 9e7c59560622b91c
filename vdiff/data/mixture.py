"""Several data sets as one, in chosen proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vdiff.data.base import Dataset, Group
from vdiff.data.order import index as shuffled
from vdiff.process import derive


class MixtureDataset(Dataset, name="mixture"):
    """Examples of several data sets by weight; ``{type: mixture, datasets: [...], weights: [3, 1]}``.

    Example i belongs to the data set whose share is furthest behind after i examples, so that any stretch of
    numbers has the right proportions to within one example. Each data set is gone through again and again,
    every time in another order: none is repeated before all of it was used.

    Rows of all data sets need the same fields; collation names what differs.

    Args:
        datasets: All declare the same ranges for the fields they share.
        weights: One per data set, in any unit; by default their sizes.
        num: How many examples the mixture has; by default as many as all data sets together.
        seed: Another one gives another order.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float] | None = None,
        num: int | None = None,
        seed: int = 0,
    ) -> None:
        if not datasets or any(len(data) == 0 for data in datasets):
            raise ValueError(f"MixtureDataset: needs data sets with examples, got sizes {[len(d) for d in datasets]}.")
        weights = [float(len(data)) for data in datasets] if weights is None else list(weights)
        if len(weights) != len(datasets) or not all(w > 0 for w in weights):
            raise ValueError(
                f"MixtureDataset: {len(datasets)} data sets need as many weights above 0, got {weights}. Leave out a "
                "data set that is not wanted."
            )
        self.datasets, self.seed = list(datasets), seed
        self.ranges = _common_ranges(self.datasets)
        names = {None if data.classes is None else tuple(data.classes) for data in datasets}
        self.classes: Sequence[str] | None = next(iter(names)) if len(names) == 1 else None
        self.shares = [w / sum(weights) for w in weights]
        self.num = sum(len(data) for data in datasets) if num is None else num
        self._members, self._places = _dealt(self.shares, self.num)

    def __len__(self) -> int:
        return self.num

    def place(self, index: int) -> tuple[int, int]:
        """Which data set an example is from, and its number there."""
        if not 0 <= index < self.num:
            raise IndexError(f"MixtureDataset: no example {index}; there are {self.num}.")
        member, nth = self._members[index], self._places[index]
        size = len(self.datasets[member])
        epoch, place = divmod(nth, size)
        return member, shuffled(derive("mixture", self.seed, member), epoch, place, size)

    def __getitem__(self, index: int) -> Group:
        member, number = self.place(index)
        return self.datasets[member][number]

    def visit(self, index: int, key: int) -> Group:
        member, number = self.place(index)
        return self.datasets[member].visit(number, key)

    @property
    def num_dropped(self) -> int:
        return sum(data.num_dropped for data in self.datasets)

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return {name: reason for data in self.datasets for name, reason in data.dropped.items()}


def _dealt(shares: Sequence[float], num: int) -> tuple[bytes | list[int], list[int]]:
    """For every example its data set, and how many of that came before."""
    counts = [0] * len(shares)
    members, places = [], []
    for total in range(1, num + 1):
        member = max(range(len(shares)), key=lambda m: total * shares[m] - counts[m])
        members.append(member)
        places.append(counts[member])
        counts[member] += 1
    return members, places


def _common_ranges(datasets: Sequence[Dataset]) -> Mapping[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for data in datasets:
        for field, declared in data.ranges.items():
            if ranges.setdefault(field, declared) != declared:
                raise ValueError(
                    f"MixtureDataset: {field!r} is in {list(ranges[field])} in one data set and in {list(declared)} in "
                    f"another ({type(data).__name__}). Convert one of them."
                )
    return ranges
