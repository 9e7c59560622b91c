"""Instance and class side by side: the data of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping

from vdiff.data.base import Dataset, Group, Row
from vdiff.process import derive


class DreamBoothDataset(Dataset, name="dreambooth"):
    """Each example of the instance beside one of its class; ``{type: dreambooth, instance: {...}, prior: {...}}``.

    A group of two rows with the fields that both data sets have, and ``is_prior``, False and True, for the loss
    ``prior_preservation``. Each row is a stream with a noise key of its own. Pictures of the class are usually made
    by the model before it is trained, see docs/preferences.md; each visit draws one of them.

    Args:
        instance: What is to be learned, such as five pictures of one dog.
        prior: What it is an example of, such as two hundred pictures of dogs.
        repeats: How often each instance example counts: a batch needs as many examples as it has groups.
    """

    def __init__(self, instance: Dataset, prior: Dataset, repeats: int = 1) -> None:
        if not len(instance) or not len(prior) or repeats < 1:
            raise ValueError(
                f"DreamBoothDataset: needs examples of both kinds and repeats of at least 1, got {len(instance)} of "
                f"the instance, {len(prior)} of the class and repeats {repeats}."
            )
        self.instance, self.prior, self.repeats = instance, prior, repeats
        self.classes = instance.classes
        for field in instance.ranges.keys() & prior.ranges.keys():
            if instance.ranges[field] != prior.ranges[field]:
                raise ValueError(
                    f"DreamBoothDataset: {field!r} is in {list(instance.ranges[field])} in the instance and in "
                    f"{list(prior.ranges[field])} in the class. Convert one of them."
                )
        self.ranges = {field: span for field, span in instance.ranges.items() if field in prior.ranges}

    def __len__(self) -> int:
        return self.repeats * len(self.instance)

    def __getitem__(self, index: int) -> Group:
        own = self._own(index)
        return self._paired(self.instance[own], self.prior[index % len(self.prior)])

    def visit(self, index: int, key: int) -> Group:
        own, other = self._own(index), derive("prior", key) % len(self.prior)
        return self._paired(self.instance.visit(own, key), self.prior.visit(other, derive("visit", key)))

    @property
    def num_dropped(self) -> int:
        return self.instance.num_dropped + self.prior.num_dropped

    @property
    def dropped(self) -> Mapping[str, str]:  # type: ignore[override]
        return {**self.instance.dropped, **self.prior.dropped}

    def _own(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"DreamBoothDataset: no example {index}; there are {len(self)}.")
        return index % len(self.instance)

    def _paired(self, own: Group, other: Group) -> Group:
        if not isinstance(own, Mapping) or not isinstance(other, Mapping):
            raise ValueError("DreamBoothDataset: both data sets need one row per example, and one of them has groups.")
        fields = [name for name in own if name in other]
        if not fields:
            raise ValueError(
                f"DreamBoothDataset: the instance has {', '.join(own)}, the class {', '.join(other)}; no field in "
                "common."
            )
        rows: list[Row] = [{name: row[name] for name in fields} for row in (own, other)]
        return [rows[0] | {"is_prior": False, "stream": 0}, rows[1] | {"is_prior": True, "stream": 1}]
