"""Instance and class side by side: the data of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping

from vdiff.data.base import Dataset, Group, Row
from vdiff.data.mixture import common_ranges
from vdiff.data.order import index as shuffled
from vdiff.process import derive


class DreamBoothDataset(Dataset, name="dreambooth"):
    """Each example of the instance beside one of its class; ``{type: dreambooth, instance: {...}, prior: {...}}``.

    A group of two rows with the fields that both data sets have, and ``is_prior``, False and True, for the loss
    ``prior_preservation``. Each row is a stream with a noise key of its own. Pictures of the class are usually made
    by the model before it is trained, see docs/preferences.md; they are gone through in another order every time.

    Args:
        instance: What is to be learned, such as five pictures of one dog.
        prior: What it is an example of, such as two hundred pictures of dogs.
        repeats: How often each instance example counts; with few of them an epoch is short.
        seed: Another one gives another order of the class.
    """

    def __init__(self, instance: Dataset, prior: Dataset, repeats: int = 1, seed: int = 0) -> None:
        if not len(instance) or not len(prior) or repeats < 1:
            raise ValueError(
                f"DreamBoothDataset: needs examples of both kinds and repeats of at least 1, got {len(instance)} of the "
                f"instance, {len(prior)} of the class and repeats {repeats}."
            )
        self.instance, self.prior, self.repeats, self.seed = instance, prior, repeats, seed
        self.classes = instance.classes
        self.ranges = common_ranges([instance, prior], "DreamBoothDataset")

    def __len__(self) -> int:
        return self.repeats * len(self.instance)

    def __getitem__(self, index: int) -> Group:
        own, other = self._places(index, 0)
        return self._paired(self.instance[own], self.prior[other])

    def visit(self, index: int, key: int) -> Group:
        own, other = self._places(index, key)
        return self._paired(self.instance.visit(own, derive("instance", key)), self.prior.visit(other, key))

    @property
    def num_dropped(self) -> int:
        return self.instance.num_dropped + self.prior.num_dropped

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return {**self.instance.dropped, **self.prior.dropped}

    def _places(self, index: int, key: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"DreamBoothDataset: no example {index}; there are {len(self)}.")
        size = len(self.prior)
        epoch, place = divmod(index, size)
        return index % len(self.instance), shuffled(derive("prior", self.seed, key), epoch, place, size)

    def _paired(self, own: Group, other: Group) -> Group:
        if not isinstance(own, Mapping) or not isinstance(other, Mapping):
            raise ValueError("DreamBoothDataset: both data sets need one row per example, and one of them has groups.")
        fields = [name for name in own if name in other]
        if not fields:
            raise ValueError(
                f"DreamBoothDataset: the instance has {', '.join(own)}, the class {', '.join(other)}; no field in common."
            )
        rows: list[Row] = [{name: row[name] for name in fields} for row in (own, other)]
        return [rows[0] | {"is_prior": False, "stream": 0}, rows[1] | {"is_prior": True, "stream": 1}]
