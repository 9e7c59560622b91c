"""Learned words in the files that others read and write.

Three layouts: one tensor per word under its name, ``{"<cat>": (n, dim)}`` (diffusers; a vector alone is one row); the
older ``{"string_to_param": {"*": (n, dim)}}`` (stable-diffusion-webui, .pt), whose word is the name of the file; and
one tensor per tower, ``{"clip_l": (n, 768), "clip_g": (n, 1280)}`` (SDXL).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.checkpoints import WeightFileError, read_weights, save_weights

TOWERS = ("clip_l", "clip_g", "t5xxl")
PLAIN = ("string_to_param", "emb_params")  # instead of a word: older files say nothing about it


def read_embeddings(file: str | Path, word: str | None = None, key: str | None = None) -> dict[str, Tensor]:
    """Vectors ``(n, dim)`` by word, in float32.

    Args:
        word: What the word is called; by default as in the file or, where it is not said there, as the file.
        key: Which tower's, where it has several.

    Raises:
        WeightFileError: not such a file, or of several towers, or several words and one name for them.
    """
    try:
        tensors = read_weights(file, inside="string_to_param")
    except WeightFileError:
        tensors = read_weights(file)
    stem = word or Path(file).stem
    if any(name in TOWERS for name in tensors):
        if key not in tensors:
            raise WeightFileError(
                f"{file}: has vectors for {', '.join(tensors)}; say which: key={next(iter(tensors))!r}."
            )
        found = {stem: tensors[key]}
    elif key is not None and key not in tensors:
        raise WeightFileError(f"{file}: nothing under {key!r}. It holds: {', '.join(tensors)}.")
    else:
        chosen = {key: tensors[key]} if key is not None else tensors
        found = {stem if name in ("*", *PLAIN) else name: value for name, value in chosen.items()}
        if word is not None:
            if len(found) > 1:
                raise WeightFileError(f"{file}: holds {len(found)} words, {', '.join(found)}, and one name for them.")
            found = {word: next(iter(found.values()))}
    wrong = next((name for name, value in found.items() if value.ndim not in (1, 2)), None)
    if wrong is not None:
        raise WeightFileError(f"{file}: {wrong!r} is {tuple(found[wrong].shape)}; the vectors of a word are (n, dim).")
    return {name: value.float().reshape(-1, value.shape[-1]) for name, value in found.items()}


def save_embeddings(file: str | Path, vectors: Mapping[str, Tensor]) -> None:
    """One tensor per name: words, or towers for one word of several (``clip_l``, ``clip_g``)."""
    save_weights(file, {name: value.detach().contiguous() for name, value in vectors.items()})
