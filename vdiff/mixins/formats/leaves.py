"""Names of weights at one site, in vdiff and in files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from vdiff.checkpoints import WeightFileError

# Leaves of every kind; those in brackets are there in some of its forms.
LEAVES = {
    "lora": ("A", "B"),
    "dora": ("A", "B", "magnitude"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
# What other programs have besides, by how names end, and what to do about it.
FUSE = "Fuse the adapter into the model with the program that it is from, and load the model's weights"
UNREAD = {
    r"\.(lora_B|lora_up)\.bias$": f"That is a bias of the pair (peft's lora_bias), which vdiff's LoRA lacks. {FUSE}",
    r"\.(diff|diff_b|set_weight|w_norm|b_norm)$": f"That is a whole weight's change, not one of low rank. {FUSE}",
    r"\.(oft_|boft|a1\.|b1\.|ia3|on_input)": f"That is of OFT, GLoRA or (IA)^3, and vdiff has none of them. {FUSE}",
    r"\.reshape_weight$": f"That is an adapter which makes layers wider. {FUSE}",
}


def sites_of(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], where: str, drop: str = ""
) -> dict[str, dict[str, Tensor]]:
    """Tensors by site and by vdiff's leaf.

    Args:
        table: How names end, and the leaf that it means.
        drop: Names that are left out, as a regular expression.

    Raises:
        WeightFileError: names that no entry fits, all of them counted.
    """
    found: dict[str, dict[str, Tensor]] = {}
    odd = []
    endings = sorted(table, key=len, reverse=True)
    for name, value in tensors.items():
        if drop and re.search(drop, name):
            continue
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None:
            odd.append(name)
        else:
            found.setdefault(name[: -len(ending)].rstrip("."), {})[table[ending]] = value
    if odd:
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        known = next((f" {what}." for pattern, what in UNREAD.items() if re.search(pattern, odd[0])), "")
        raise WeightFileError(f"{where}: {len(odd)} unknown names: {', '.join(odd[:8])}{more}.{known}")
    if not found:
        raise WeightFileError(f"{where}: no adapter's weights in it.")
    return found


def kind_of(found: Mapping[str, Mapping[str, Tensor]], where: str) -> str:
    """Which mixin these leaves are of.

    Raises:
        WeightFileError: several, or a site that lacks half of its weights.
    """
    kinds: Counter[str] = Counter()
    for site, tensors in found.items():
        leaves = {leaf for leaf in tensors if leaf != "alpha"}
        kind = next((k for k in ("dora", "lora", "loha", "lokr") if _is_whole(k, leaves)), None)
        if kind is None:
            decomposed = next((k for k in ("loha", "lokr") if _is_whole(k, leaves - {"dora_scale", "magnitude"})), None)
            why = (
                f"a {decomposed} with a dora_scale (LyCORIS' dora_wd), and vdiff has that for LoRA alone. {FUSE}"
                if decomposed
                else "which is no whole adapter"
            )
            raise WeightFileError(f"{where}: {site!r} has {', '.join(sorted(leaves)) or 'no weights'}, {why}.")
        kinds[kind] += 1
    if len(kinds) > 1:
        raise WeightFileError(
            f"{where}: sites of several kinds in one file: {dict(kinds)}. A mixin is of one kind: make a file of each, "
            "with read_weights and save_weights of vdiff.checkpoints, and attach one after the other."
        )
    return next(iter(kinds))


def rank_of(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank by the shapes; None where every factor is a full matrix."""
    if kind in ("lora", "dora"):
        return len(tensors["A"])
    if kind == "loha":
        return len(tensors["hada_w1_b"])
    pair = next((tensors[leaf] for leaf in ("lokr_w2_b", "lokr_w1_b") if leaf in tensors), None)
    return None if pair is None else len(pair)


def full_rank(tensors: Mapping[str, Tensor]) -> int:
    """A rank at which LoKr makes both factors full."""
    return max(max(tensors["lokr_w1"].shape), max(tensors["lokr_w2"].shape[:2]))


def commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _is_whole(kind: str, leaves: set[str]) -> bool:
    if kind == "lokr":
        return (
            bool(leaves)
            and all(f"lokr_w{i}" in leaves or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= leaves for i in (1, 2))
            and leaves <= set(LEAVES[kind])
        )
    needed = {leaf for leaf in LEAVES[kind] if not leaf.startswith("hada_t")}
    return needed <= leaves <= set(LEAVES[kind])
