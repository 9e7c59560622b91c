r"""IP-Adapter: pictures as prompts, by attention of their own beside the attention to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vdiff.attention import attend
from vdiff.checkpoints import WeightFileError, read_weights, save_weights
from vdiff.hooks import On, Part, role_sites
from vdiff.mixins.base import Mixin
from vdiff.mixins.conditioned import ConditionedPart
from vdiff.networks import Resampler
from vdiff.networks.transformer import repeated
from vdiff.process import Conditioning

OWN = ("image_proj.", "ip_adapter.")
HEAD_DIM = 64  # in every published resampler
RESAMPLER = ("dim", "depth", "num_heads", "head_dim", "mult")  # arguments of a resampler that are one's own to choose


class IPAdapter(Mixin, name="ip_adapter"):
    r"""Decoupled cross-attention: :math:`W_o(\mathrm{attn}(q, k, v) + s\,\mathrm{attn}(q, k_{ip}, v_{ip})) + b`.

    Queries and :math:`W_o` are the host's; keys and values of the picture's tokens have projections of their own. In a
    network of videos it goes beside attention over pixels, not over time: every frame looks at the one picture.

    Args:
        reads: The condition that holds the picture: its embedding ``(B, embed_dim)``, with a resampler what a tower's
            last but one block says of it, ``(B, n, embed_dim)``, or tokens ``(B, n, context_dim)`` where ``embed_dim``
            is None; by default the mixin's name. Without a picture: zeros; with a resampler what the tower says of
            one of CLIP's mean colour.
        embed_dim: Length of a picture's embedding, 1024 for CLIP's ViT-H, or of its tower's tokens, 1280 there; None:
            the condition is tokens already.
        num_tokens: Tokens made of them: 4, and 16 with a resampler.
        resampler: What makes IP-Adapter Plus: arguments of a :class:`vdiff.networks.Resampler`, ``dim`` (by default
            ``context_dim``), ``depth``, ``num_heads``, ``head_dim`` and ``mult``. That for Stable Diffusion 1 is
            ``{}``, for SDXL ``{dim: 1280, num_heads: 20}``. None: an embedding, and a linear projection.
        init: ``copy`` begins with the host's projections for text, as published, and so changes the output at once;
            ``zero`` begins with values of zero, which changes nothing.
        on: Networks with cross-attention inside.
        name, scale: See :class:`Mixin`.

    References:
        Ye et al., arXiv:2308.06721, eq. 5.
    """

    def __init__(
        self,
        reads: str | None = None,
        embed_dim: int | None = 1024,
        num_tokens: int = 4,
        resampler: dict[str, int] | None = None,
        init: Literal["copy", "zero"] = "copy",
        on: On = "type:Network",
        name: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(on, name, scale)
        if num_tokens < 1 or init not in ("copy", "zero"):
            raise ValueError(f"IPAdapter: num_tokens is positive, init copy or zero; got {num_tokens} and {init!r}.")
        if resampler is not None and (embed_dim is None or set(resampler) - set(RESAMPLER)):
            raise ValueError(
                f"IPAdapter: a resampler takes {', '.join(RESAMPLER)}, and embed_dim says the length of what it reads; "
                f"got {', '.join(resampler) or 'none'} and embed_dim={embed_dim}."
            )
        self.reads, self.embed_dim, self.num_tokens, self.init = reads, embed_dim, num_tokens, init
        self.resampler = resampler

    def part(self, module: nn.Module, site: str) -> IPAdapterPart:
        return IPAdapterPart(module, self.reads, self.embed_dim, self.num_tokens, self.resampler, self.init)

    def read(self, file: str | Path) -> None:
        """Weights in the published layout: ``image_proj.*`` and ``ip_adapter.{1,3,...}.to_k_ip.weight``, flat or in two
        groups (.bin). Where the condition is tokens already, what makes them (``image_proj``) is left out.

        Raises:
            WeightFileError: none of them are in the file, or tokens are made otherwise there.
            ValueError: they do not fit the host.
        """
        own = OWN if self.embed_dim is not None else OWN[1:]
        weights = {name: value for name, value in _flat(file).items() if name.startswith(own)}
        if not weights:
            raise WeightFileError(f"{file}: holds no IP-Adapter; looked for image_proj.* and ip_adapter.*.")
        if self.embed_dim is not None:
            is_plus, builds = _built_by(weights, str(file))
            if is_plus != (self.resampler is not None):
                raise WeightFileError(f"{file}: this is an {builds}, and {self.name!r} makes its tokens otherwise.")
        self.load_state_dict(weights)

    def write(self, file: str | Path) -> None:
        """Its weights in the published layout, flat."""
        save_weights(file, self.state_dict())


class IPAdapterPart(ConditionedPart):
    """At a network: the projection of the picture, and keys and values for every cross-attention.

    Numbered as published, by attentions, two for each block: down, then up, and the middle last.
    """

    def __init__(
        self,
        host: nn.Module,
        reads: str | None,
        embed_dim: int | None,
        num_tokens: int,
        resampler: Mapping[str, int] | None,
        init: str,
    ) -> None:
        super().__init__(reads)
        self.places = _cross_attentions(host)
        if not self.places:
            raise ValueError(f"IPAdapter: a {type(host).__name__} without cross-attention has nothing to go beside.")
        layers = {place: host.get_submodule(place) for place in self.places}
        widths = {int(layer.to_k.in_features) for layer in layers.values()}  # type: ignore[union-attr, arg-type]
        if len(widths) > 1:
            raise ValueError(
                f"IPAdapter: cross-attention to contexts of several widths, {sorted(widths)}. Narrow `on`."
            )
        self.context_dim, self.embed_dim = widths.pop(), embed_dim
        self.image_proj: nn.Module | None = None
        if embed_dim is not None and resampler is not None:
            sizes: dict[str, Any] = {"dim": self.context_dim, **resampler}
            self.image_proj = Resampler(embed_dim, self.context_dim, num_tokens, **sizes)
        elif embed_dim is not None:
            self.image_proj = ImageProjection(embed_dim, self.context_dim, num_tokens)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): KeysAndValues(layer, init) for i, layer in enumerate(layers.values())}
        )

    def hands_at(self, module: nn.Module) -> dict[str, Part]:
        return {
            place: AttendsToPicture(Weights(layer))
            for place, layer in zip(self.places, self.ip_adapter.values(), strict=True)
        }

    def said(self, value: Tensor, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Sequence[Tensor]:
        is_embedding = isinstance(self.image_proj, ImageProjection)
        length = self.context_dim if self.embed_dim is None else self.embed_dim
        shape = (length,) if is_embedding else ("n", length)
        if value.ndim != 1 + len(shape) or value.shape[-1] != shape[-1]:
            raise ValueError(
                f"IPAdapter {self.mixin_name!r}: a picture is (B, {', '.join(map(str, shape))}), "
                f"got {tuple(value.shape)}."
            )
        if self.image_proj is None:
            return [value]
        return [self.image_proj(value.to(next(self.image_proj.parameters()).dtype))]


class ImageProjection(nn.Module):
    """An embedding as a few tokens; names of weights are the authors'."""

    def __init__(self, embed_dim: int, context_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_dim, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(1, (-1, self.norm.normalized_shape[0])))


class KeysAndValues(nn.Module):
    def __init__(self, layer: Any, init: str) -> None:  # noqa: ANN401  # whatever attends
        super().__init__()
        self.to_k_ip = nn.Linear(layer.to_k.in_features, layer.to_k.out_features, bias=False)
        self.to_v_ip = nn.Linear(layer.to_v.in_features, layer.to_v.out_features, bias=False)
        self.to_k_ip.weight.data.copy_(layer.to_k.weight.data)
        self.to_v_ip.weight.data.copy_(layer.to_v.weight.data) if init == "copy" else nn.init.zeros_(
            self.to_v_ip.weight
        )


class Weights:
    """Held by a part that uses them and does not own them."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class AttendsToPicture(Part):
    """At a cross-attention. Its output projection is linear, so that what goes through it may be added behind it."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def after(self, module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:  # noqa: ANN401
        if self.given is None:
            return output
        x = args[0] if args else kwargs["x"]
        layer = self.weights.layer
        tokens = self.given.to(layer.to_k_ip.weight.dtype)  # type: ignore[union-attr]
        heads = (module.num_heads, -1)
        q, k, v = module.to_q(x), layer.to_k_ip(tokens), layer.to_v_ip(tokens)  # type: ignore[operator]
        q, k, v = (repeated(one.to(q.dtype), len(q)).unflatten(-1, heads) for one in (q, k, v))
        if hasattr(module, "norm_q"):
            q, k = module.norm_q(q), module.norm_k(k)
        picture = attend(q, k, v, backend=module.backend).flatten(2)
        out = module.to_out[0] if isinstance(module.to_out, nn.Sequential) else module.to_out
        picture = out(picture * self.amount(picture))
        return output + (picture if out.bias is None else picture - out.bias)


def _flat(file: str | Path) -> dict[str, Tensor]:
    if Path(file).suffix == ".safetensors":
        return read_weights(file)
    try:
        return {group + name: value for group in OWN for name, value in read_weights(file, group[:-1]).items()}
    except WeightFileError:  # no groups: names are written out
        return read_weights(file)


def _built_by(weights: Mapping[str, Tensor], file: str) -> tuple[bool, str]:
    """Whether a file is of IP-Adapter Plus, and how one such as its own is built."""
    tensors = {name.removeprefix(OWN[0]): value for name, value in weights.items() if name.startswith(OWN[0])}
    if {"latents", "proj_in.weight", "layers.0.0.to_q.weight"} <= tensors.keys():
        _, num_tokens, dim = tensors["latents"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        sizes = {"dim": dim, "depth": depth, "num_heads": len(tensors["layers.0.0.to_q.weight"]) // HEAD_DIM}
        embed_dim = tensors["proj_in.weight"].shape[1]
        return True, f"IPAdapter(embed_dim={embed_dim}, num_tokens={num_tokens}, resampler={sizes})"
    if {"proj.weight", "norm.weight"} <= tensors.keys():
        num_tokens, embed_dim = (
            len(tensors["proj.weight"]) // len(tensors["norm.weight"]),
            tensors["proj.weight"].shape[1],
        )
        return False, f"IPAdapter(embed_dim={embed_dim}, num_tokens={num_tokens})"
    raise WeightFileError(
        f"{file}: an IP-Adapter whose image_proj is neither a linear projection nor a resampler "
        f"({', '.join(list(tensors)[:3]) or 'there is none'}). With embed_dim=None an embedder makes the tokens."
    )


def _cross_attentions(host: nn.Module) -> list[str]:
    """Their names, in the order in which published files count."""
    order = {"input_blocks": 0, "output_blocks": 1, "middle_block": 2}
    places = role_sites(host, "cross_attention")
    # A first attention that attends to the context as well belongs to its block's other number.
    return sorted((p for p in places if not p.endswith("attn1")), key=lambda p: order.get(p.split(".")[0], 0))
