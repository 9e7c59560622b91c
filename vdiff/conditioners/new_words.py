"""Words that a tower learned after its vocabulary was made: prompts that contain them, as token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from vdiff.hooks import parts


def new_words(tower: nn.Module) -> dict[str, Sequence[int]]:
    """Token ids of every word that something attached to the tower brings along, as its attribute ``words``."""
    return {word: ids for part in parts(tower) for word, ids in getattr(part, "words", {}).items() if part.enabled}


def tokenize_around(
    words: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    tokenize: Callable[[Sequence[str]], list[list[int]]],
) -> list[list[int]]:
    """Token ids of each prompt: what stands between the new words goes through the tokenizer, piece by piece.

    Args:
        tokenize: Prompts to ids, each row a beginning (of no token or one), the text, and the token that ends it.
    """
    ids = tokenize(list(prompts))
    pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    if not words or not any(pattern.search(prompt) for prompt in prompts):
        return ids
    *begin, end = tokenize([""])[0]
    for row, prompt in enumerate(prompts):
        if not pattern.search(prompt):
            continue
        found = [*pattern.findall(prompt), None]
        pieces = [piece.strip() for piece in pattern.split(prompt)]
        text = list(begin)
        for piece, word in zip(pieces, found, strict=True):
            text += tokenize([piece])[0][len(begin) : -1] if piece else []
            text += words[word] if word is not None else []
        ids[row] = [*text, end]
    return ids
