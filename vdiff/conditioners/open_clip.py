"""CLIP towers of open_clip: its own model and tokenizer, with weights from a file.

The towers keep open_clip's names of weights (``model.transformer.resblocks.0 ...``, ``model.visual ...``), so
that published files fit as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vdiff.conditioners.text import TextEmbedder
from vdiff.registry import did_you_mean

# How names begin in files of open_clip, sgm and latent diffusion; the longest that fits is taken off.
PREFIXES = {prefix: "" for prefix in ("model.", "cond_stage_model.model.", "module.")} | {
    f"conditioner.embedders.{i}.model.": "" for i in range(8)
}
# An image tower of next to nothing: open_clip builds none without.
NO_IMAGES = {"image_size": 2, "patch_size": 2, "width": 2, "head_width": 2, "layers": 0}


class OpenCLIPTextEmbedder(TextEmbedder, name="open_clip_text"):
    """Text through a CLIP text tower of open_clip.

    Stable Diffusion 2: ``arch: ViT-H-14, layer: penultimate``. SDXL's second tower: ``arch: ViT-bigG-14,
    layer: penultimate, norm: false, pooled_feeds: vector``.

    Args:
        arch: A name that open_clip knows, or a text tower of one's own: ``embed_dim`` and what open_clip calls
            ``text_cfg``, such as ``{embed_dim: 64, width: 64, heads: 4, layers: 2, context_length: 16}``.
        weights: A file in open_clip's layout, ``.safetensors`` or one that torch reads without running code; the
            image tower in it is left out. None: random weights, with a warning.
        layer: ``last``, ``penultimate`` (the output of the last block but one), or ``pooled``: no tokens, the
            pooled vector alone.
        norm: Whether the tokens go through the last layer's normalisation.
        reads, feeds, drop, null, pooled_feeds, masked, template, trainable, memory, folder: See
            :class:`~vdiff.conditioners.text.TextEmbedder`. The pooled vector is what open_clip's ``encode_text``
            gives, not scaled to unit length.

    References:
        Cherti et al., arXiv:2212.07143; the penultimate layer, Saharia et al., arXiv:2205.11487, and Stable
        Diffusion 2; two towers, Podell et al., arXiv:2307.01952.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "ViT-H-14",
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
        config = architecture(arch, "OpenCLIPTextEmbedder", "text_cfg")
        text = config["text_cfg"]
        if "hf_model_name" in text or "hf_tokenizer_name" in text or text.get("embed_cls"):
            raise ValueError(
                f"OpenCLIPTextEmbedder: the text tower of {arch} is not open_clip's own plain one. "
                "Towers from transformers: clip_text and t5_text."
            )
        if layer == "penultimate" and text.get("layers", 12) < 2:
            raise ValueError("OpenCLIPTextEmbedder: layer 'penultimate' needs a tower of two layers or more.")
        self.arch, self.norm, self.end_id, self.pad_id = arch, norm, 49407, 0
        self.model = _clip(config, NO_IMAGES)
        self.model.logit_scale.requires_grad_(False)  # nothing here depends on it
        del self.model.visual
        self.load_tower(weights, PREFIXES, ["visual.*", "attn_mask"], f"the text tower {_spell(arch)}")

    @property
    def length(self) -> int:
        return self.model.context_length

    @property
    def tower(self) -> nn.Module:
        return self.model

    def identity(self) -> str:
        return f"{super().identity()} norm {self.norm}"

    def idle_weights(self) -> list[str]:
        """Globs over weights that nothing reads."""
        idle = ["model.logit_scale"]
        if self.layer != "pooled" and self.pooled_feeds is None:
            idle += ["model.text_projection"]
            idle += [] if self.norm else ["model.ln_final.*"]
            last = len(self.model.transformer.resblocks) - 1
            idle += [f"model.transformer.resblocks.{last}.*"] if self.layer == "penultimate" else []
        return idle

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        return open_clip_tokens(prompts)

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        model, blocks = self.model, self.model.transformer.resblocks
        x = model.token_embedding(ids).to(model.transformer.get_cast_dtype())
        x = x + model.positional_embedding.to(x.dtype)
        *first, last = blocks
        for block in first:
            x = block(x, attn_mask=model.attn_mask)
        before, wants_pooled = x, self.layer == "pooled" or self.pooled_feeds is not None
        if self.layer != "penultimate" or wants_pooled:
            x = last(x, attn_mask=model.attn_mask)
        encoded = {}
        if self.layer != "pooled":
            tokens = before if self.layer == "penultimate" else x
            encoded["tokens"] = model.ln_final(tokens) if self.norm else tokens
        if wants_pooled:
            known = ids.masked_fill(
                ids > self.end_id, 0
            )  # the end is found as the largest; words learned later are larger
            encoded["pooled"] = self._pool(model.ln_final(x), known)
        return encoded

    def _pool(self, x: Tensor, ids: Tensor) -> Tensor:
        from open_clip.transformer import text_global_pool

        x = text_global_pool(x, ids, self.model.text_pool_type, eos_token_id=self.model.text_eos_id)
        projection = self.model.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def open_clip_tokens(prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt by open_clip's tokenizer: start, text, end."""
    tokens = _tokenizer()
    return [[tokens.sot_token_id, *tokens.encode(prompt), tokens.eot_token_id] for prompt in prompts]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return _open_clip("open_clip_text").tokenizer.SimpleTokenizer()


def architecture(arch: str | Mapping[str, Any], who: str, part: Literal["text_cfg", "vision_cfg"]) -> dict[str, Any]:
    """open_clip's config of a model by name; of a mapping, the config with that tower as its ``part``."""
    open_clip = _open_clip(who)
    if isinstance(arch, str):
        known = open_clip.list_models()
        if arch not in known:
            hint = did_you_mean(arch, known) or f" It knows: {', '.join(known[:8])}, ..."
            raise ValueError(f"{who}: open_clip knows no architecture {arch!r}.{hint}")
        return open_clip.get_model_config(arch)
    if "embed_dim" not in arch:
        raise ValueError(f"{who}: an architecture of one's own needs 'embed_dim', got {', '.join(arch)}.")
    towers = {"text_cfg": open_clip.CLIPTextCfg, "vision_cfg": open_clip.CLIPVisionCfg}
    whole = ("embed_dim", "quick_gelu")
    check_names(arch, [*whole, *(field.name for field in fields(towers[part]))], who)
    rest = {name: value for name, value in arch.items() if name not in whole}
    return {"embed_dim": arch["embed_dim"], "quick_gelu": arch.get("quick_gelu", False), part: rest}


def check_names(arch: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    """That an architecture in numbers has no name that its tower would not read.

    Raises:
        ValueError: it has; the known names are listed.
    """
    if unknown := [name for name in arch if name not in known]:
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise ValueError(f"{who}: arch takes no {', '.join(map(repr, unknown))}.{hints} It takes: {', '.join(known)}.")


def _clip(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    from open_clip.model import CLIP

    model: Any = CLIP
    try:
        return model(config["embed_dim"], dict(vision), dict(config["text_cfg"]), config.get("quick_gelu", False))
    except TypeError as error:
        raise ValueError(f"open_clip builds no text tower from {dict(config['text_cfg'])}: {error}") from error


def _open_clip(who: str) -> Any:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch is a RuntimeError
        raise ImportError(
            f"{who}: open_clip cannot be imported ({error}): pip install open_clip_torch, and a torchvision that "
            "belongs to the torch that is installed."
        ) from error
    return open_clip


def _spell(arch: str | Mapping[str, Any]) -> str:
    return arch if isinstance(arch, str) else f"of width {arch.get('width', 512)}, {arch.get('layers', 12)} layers"
