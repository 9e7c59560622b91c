"""Words that a tower learned after its vocabulary was made: prompts that contain them, as token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vdiff.hooks import parts


def new_words(tower: nn.Module) -> dict[str, Sequence[int]]:
    """Token ids of every word that something attached to the tower brings along, as its attribute ``words``."""
    return {word: ids for part in parts(tower) for word, ids in getattr(part, "words", {}).items() if part.enabled}


def tokenize_around(
    words: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    tokenize: Callable[[Sequence[str]], Tensor],
    end_id: int,
    pad_id: int,
) -> Tensor:
    """Token ids ``(B, length)``: what stands between the new words goes through the tokenizer, piece by piece.

    Args:
        tokenize: Prompts to ids, each row a beginning (of no token or one), the text, ``end_id`` and padding.
    """
    ids = tokenize(list(prompts))
    pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    if not words or not any(pattern.search(prompt) for prompt in prompts):
        return ids
    begin = _until_end(tokenize([""])[0], end_id)
    for row, prompt in enumerate(prompts):
        if not pattern.search(prompt):
            continue
        found = [*pattern.findall(prompt), None]
        pieces = [piece.strip() for piece in pattern.split(prompt)]
        text = list(begin)
        for piece, word in zip(pieces, found, strict=True):
            text += _until_end(tokenize([piece])[0], end_id)[len(begin) :] if piece else []
            text += words[word] if word is not None else []
        text = [*text[: ids.shape[1] - 1], end_id]  # cut as the tokenizer cuts
        ids[row] = torch.tensor(text + [pad_id] * (ids.shape[1] - len(text)))
    return ids


def _until_end(row: Tensor, end_id: int) -> list[int]:
    ids = row.tolist()
    return ids[: ids.index(end_id)] if end_id in ids else ids
