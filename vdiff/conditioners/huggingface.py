"""Text towers of transformers: CLIP's and T5's. Built from numbers, never downloaded; weights from a file or folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.conditioners.open_clip import check_names, open_clip_tokens
from vdiff.conditioners.text import TextEmbedder

CLIP_ARCHS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    ),
    "clip-vit-base-patch32": dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, projection_dim=512
    ),
}
T5_ARCHS: dict[str, dict[str, Any]] = {
    name: dict(d_model=width, d_ff=inner, num_layers=layers, num_heads=heads, d_kv=64,
               feed_forward_proj="gated-gelu", vocab_size=32128)
    for name, width, inner, layers, heads in (
        ("t5-v1_1-small", 512, 1024, 8, 6), ("t5-v1_1-base", 768, 2048, 12, 12), ("t5-v1_1-large", 1024, 2816, 24, 16),
        ("t5-v1_1-xl", 2048, 5120, 24, 32), ("t5-v1_1-xxl", 4096, 10240, 24, 64),
    )
}  # fmt: skip

_BEGINNINGS = ("cond_stage_model.transformer.", *(f"conditioner.embedders.{i}.transformer." for i in range(8)))


class CLIPTextEmbedder(TextEmbedder, name="clip_text"):
    """Text through the CLIP text tower of transformers.

    Stable Diffusion 1: as it is. SDXL's first tower: ``layer: penultimate, norm: false``. Prompts go through the
    tokenizer of open_clip, whose vocabulary is the same; the padding here is the end token, as in Stable Diffusion.

    Args:
        arch: ``clip-vit-large-patch14``, ``clip-vit-base-patch32``, or arguments of transformers' ``CLIPTextConfig``.
        weights: A file in the layout of transformers, or of a Stable Diffusion checkpoint around it. None: random
            weights, with a warning.
        layer: ``last``, ``penultimate``, or ``pooled``: no tokens, the vector at the end token alone.
        norm: Whether the tokens go through the final normalisation.
        reads, feeds, drop, null, pooled_feeds, masked, template, trainable, memory, folder: See
            :class:`~vdiff.conditioners.text.TextEmbedder`.

    References:
        Radford et al., arXiv:2103.00020; Rombach et al., arXiv:2112.10752.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "clip-vit-large-patch14",
        weights: Path | None = None,
        reads: str = "caption",
        feeds: str = "cross_attention",
        drop: float = 0.0,
        null: Literal["zero", "empty"] = "empty",
        pooled_feeds: str | None = None,
        layer: Literal["last", "penultimate", "pooled"] = "last",
        norm: bool = True,
        masked: bool = False,
        template: str = "{}",
        trainable: bool = False,
        memory: float = 256,
        folder: Path | None = None,
    ) -> None:
        super().__init__(reads, feeds, drop, null, pooled_feeds, layer, masked, template, trainable, memory, folder)
        transformers = _transformers("CLIPTextEmbedder")
        self.norm, self.end_id, self.pad_id = norm, 49407, 49407
        config = _config(transformers.CLIPTextConfig, arch, CLIP_ARCHS, "CLIPTextEmbedder")
        model = transformers.CLIPTextModel(config)
        self.transformer = getattr(model, "text_model", model)  # versions of transformers differ
        prefixes = {f"{b}text_model.": "" for b in ("", *_BEGINNINGS)} | {"": ""}
        self.load_tower(weights, prefixes, ["*embeddings.position_ids", "*text_projection*"], f"the text tower {arch}")

    @property
    def length(self) -> int:
        return self.transformer.config.max_position_embeddings

    @property
    def tower(self) -> nn.Module:
        return self.transformer

    def identity(self) -> str:
        return f"{super().identity()} norm {self.norm}"

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        return open_clip_tokens(prompts)

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        wants_hidden = self.layer == "penultimate" or not self.norm
        out = self.transformer(ids, output_hidden_states=wants_hidden)
        encoded = {}
        if self.layer != "pooled":
            tokens = out.last_hidden_state
            if wants_hidden:
                tokens = out.hidden_states[-2 if self.layer == "penultimate" else -1]
                tokens = self.transformer.final_layer_norm(tokens) if self.norm else tokens
            encoded["tokens"] = tokens
        if self.layer == "pooled" or self.pooled_feeds is not None:
            encoded["pooled"] = out.last_hidden_state[torch.arange(len(ids), device=ids.device), self._ends(ids)]
        return encoded

    def _ends(self, ids: Tensor) -> Tensor:
        return (ids == self.end_id).int().argmax(1)


class T5TextEmbedder(TextEmbedder, name="t5_text"):
    """Text through the encoder of a T5.

    Without a tokenizer's folder it reads token ids, ``(B, n)``, n up to ``length``, each row ended by token 1; zeros
    pad. CogVideoX: ``arch: t5-v1_1-xxl``, length 226, a zero null where the original trained it, the empty prompt in
    diffusers.

    Args:
        arch: ``t5-v1_1-small``, ``-base``, ``-large``, ``-xl``, ``-xxl``, or arguments of transformers' ``T5Config``.
        weights: A file in the layout of transformers, or an index of its shards. None: random, with a warning.
        length: Tokens of a prompt, with its padding.
        tokenizer: A folder with the tokenizer's files, as transformers saves it.
        masked: Whether padding is left out, by the tower's own attention and the network's. CogVideoX does not.
        reads, feeds, drop, null, template, trainable, memory, folder: See
            :class:`~vdiff.conditioners.text.TextEmbedder`.

    References:
        Raffel et al., arXiv:1910.10683; Yang et al., arXiv:2408.06072.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "t5-v1_1-xxl",
        weights: Path | None = None,
        reads: str = "caption",
        feeds: str = "cross_attention",
        drop: float = 0.0,
        null: Literal["zero", "empty"] = "empty",
        length: int = 226,
        tokenizer: Path | None = None,
        masked: bool = False,
        template: str = "{}",
        trainable: bool = False,
        memory: float = 256,
        folder: Path | None = None,
    ) -> None:
        super().__init__(reads, feeds, drop, null, None, "last", masked, template, trainable, memory, folder)
        transformers = _transformers("T5TextEmbedder")
        self.max_length, self.tokenizer, self.end_id, self.pad_id = length, tokenizer, 1, 0
        config = _config(transformers.T5Config, arch, T5_ARCHS, "T5TextEmbedder")
        config.use_cache = False
        self.transformer = transformers.T5EncoderModel(config)
        prefixes = {"": "", **dict.fromkeys(_BEGINNINGS, "")}
        self.load_tower(
            weights, prefixes, ["encoder.embed_tokens.weight", "decoder.*", "lm_head.*"], f"the tower {arch}"
        )

    @property
    def length(self) -> int:
        return self.max_length

    @property
    def tower(self) -> nn.Module:
        return self.transformer

    def identity(self) -> str:
        return f"{super().identity()} masked {self.masked}"

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        if not any(prompts):  # no tokenizer is needed to say nothing
            return [[self.end_id] for _ in prompts]
        if self.tokenizer is None:
            raise ValueError(
                "T5TextEmbedder: no tokenizer is at hand, so prompts must come as token ids (B, n) that end in 1. Or "
                "give tokenizer: FOLDER, with the tokenizer's files of that T5."
            )
        return _tokenizer(self.tokenizer)(list(prompts), verbose=False)["input_ids"]  # whole, and without its warning

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        # Without a mask the original attends to the padding as well; transformers would do the same.
        mask = self.counts(ids).long() if self.masked else None
        return {"tokens": self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state}


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    transformers = _transformers("T5TextEmbedder")
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _config(kind: Any, arch: str | dict[str, Any], known: dict[str, dict[str, Any]], who: str) -> Any:
    """The config, of a class of transformers, of an architecture by name or in numbers."""
    if isinstance(arch, str):
        name = arch.rpartition("/")[2]
        if name not in known:
            named = ", ".join(known)
            raise ValueError(f"{who}: no architecture is called {arch!r}. Known: {named}; or give its numbers.")
        return kind(**known[name])
    # Any other name it would keep without a word, and never read.
    general = _transformers(who).PretrainedConfig().to_dict()
    own = [*(name for name in kind().to_dict() if name not in general), *kind.attribute_map]
    check_names({name: value for name, value in arch.items() if name not in general}, own, who)
    return kind(**arch)


def _transformers(who: str) -> Any:
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"{who} needs transformers ({error}): pip install transformers") from error
    return transformers
