"""CogVideoX: our names to those of SwissArmyTransformer (SAT), the original's, and to diffusers'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.checkpoints.changes import InTurn, Join, Made, Reorder, Split, Unfold
from vdiff.checkpoints.keymap import KeyMap, Rule

QKV = ("to_q", "to_k", "to_v")
# Ours: shift, scale and gate of attention, then of feed-forward, for video; the same for text. diffusers has one layer
# for attention and one for feed-forward, each for video, then for text.
BY_SUBLAYER = (0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11)


def sat_transformer(convolution: bool = False, positions: Made | None = None) -> KeyMap:
    """Names of :class:`vdiff.networks.CogVideoX` to the original's, after ``model.diffusion_model.``

    Args:
        convolution: Whether the patch embedding is written as a convolution, as in the first release, or as a matrix,
            as later. Both are read.
        positions: Makes the table of sines and cosines that files of 2b have, ``Made(sincos_table)``; ours have none.
    """
    table = "mixins.pos_embed.pos_embedding"
    block = KeyMap(
        [
            ("norm1.*", "input_layernorm.*"),
            *(
                (tuple(f"attn1.{q}.{leaf}" for q in QKV), f"attention.query_key_value.{leaf}", Join(3))
                for leaf in ("weight", "bias")
            ),
            ("attn1.to_out.*", "attention.dense.*"),
            ("norm2.*", "post_attention_layernorm.*"),
            ("ff.up.*", "mlp.dense_h_to_4h.*"),
            ("ff.down.*", "mlp.dense_4h_to_h.*"),
        ]
    )
    return KeyMap(
        [
            Rule((), (table,), positions) if positions else ("positions", table),
            ("patch_embed.*", "mixins.patch_embed.proj.*", Unfold((2, 2) if convolution else ())),
            ("text_embed.*", "mixins.patch_embed.text_proj.*"),
            ("blocks.{i}.modulation.*", "mixins.adaln_layer.adaLN_modulations.{i}.1.*"),
            ("blocks.{i}.attn1.norm_q.*", "mixins.adaln_layer.query_layernorm_list.{i}.*"),
            ("blocks.{i}.attn1.norm_k.*", "mixins.adaln_layer.key_layernorm_list.{i}.*"),
            ("out.norm.*", "mixins.final_layer.norm_final.*"),
            ("out.proj.*", "mixins.final_layer.linear.*"),
            ("out.modulation.*", "mixins.final_layer.adaLN_modulation.1.*"),
            ("norm.*", "transformer.final_layernorm.*"),
            ("noise_embed.*", "time_embed.*"),
            ("offset_embed.*", "ofs_embed.*"),
            # Tables of rotations, and one of positions that nothing reads.
            *(((), f"mixins.pos_embed.freqs_{wave}") for wave in ("sin", "cos")),
            ((), "transformer.position_embeddings.weight"),
        ]
    ) + block.under("blocks.{i}", "transformer.layers.{i}")


def diffusers_transformer(patch_size: Sequence[int] = (1, 2, 2)) -> KeyMap:
    """Names of :class:`vdiff.networks.CogVideoX` to those of diffusers' ``CogVideoXTransformer3DModel``.

    Args:
        patch_size: Of the network. With one frame to a patch diffusers has a convolution.
    """
    frames, *sides = patch_size
    block = KeyMap(
        [
            *(
                (
                    f"modulation.{leaf}",
                    tuple(f"norm{n}.linear.{leaf}" for n in (1, 2)),
                    InTurn((Reorder(BY_SUBLAYER), Split(2))),
                )
                for leaf in ("weight", "bias")
            ),
            ("norm1.*", "norm1.norm.*"),
            ("norm2.*", "norm2.norm.*"),
            ("attn1.to_out.*", "attn1.to_out.0.*"),
            ("attn1.*", "attn1.*"),
            ("ff.up.*", "ff.net.0.proj.*"),
            ("ff.down.*", "ff.net.2.*"),
        ]
    )
    return KeyMap(
        [
            ("positions", "patch_embed.pos_embedding"),
            ("patch_embed.*", "patch_embed.proj.*", Unfold(tuple(sides) if frames == 1 else ())),
            ("text_embed.*", "patch_embed.text_proj.*"),
            ("noise_embed.0.*", "time_embedding.linear_1.*"),
            ("noise_embed.2.*", "time_embedding.linear_2.*"),
            ("offset_embed.0.*", "ofs_embedding.linear_1.*"),
            ("offset_embed.2.*", "ofs_embedding.linear_2.*"),
            ("norm.*", "norm_final.*"),
            ("out.norm.*", "norm_out.norm.*"),
            ("out.modulation.*", "norm_out.linear.*"),
            ("out.proj.*", "proj_out.*"),
        ]
    ) + block.under("blocks.{i}", "transformer_blocks.{i}")


def sat_autoencoder() -> KeyMap:
    """Names of :class:`vdiff.first_stages.AutoencoderKLCogVideoX` to the original's: the same, besides its loss."""
    return KeyMap([("encoder.*", "encoder.*"), ("decoder.*", "decoder.*"), ((), "loss.*")])


def diffusers_autoencoder(num_levels: int = 4) -> KeyMap:
    """Names of :class:`vdiff.first_stages.AutoencoderKLCogVideoX` to those of diffusers' class of that name."""
    block = KeyMap([("nin_shortcut.*", "conv_shortcut.*"), ("*", "*")])
    table = KeyMap()
    for half, way in (("encoder", "down"), ("decoder", "up")):
        part = KeyMap((f"{name}.*", f"{name}.*") for name in ("conv_in", "conv_out", "norm_out"))
        for n in (0, 1):
            part += block.under(f"mid.block_{n + 1}", f"mid_block.resnets.{n}")
        for level in range(num_levels):
            # Our up.0 is the last to run, theirs the first.
            there = f"{way}_blocks.{level if way == 'down' else num_levels - 1 - level}"
            part += block.under(f"{way}.{level}.block.{{j}}", f"{there}.resnets.{{j}}")
            part += KeyMap([(f"{way}.{level}.{way}sample.*", f"{there}.{way}samplers.0.*")])
        table += part.under(half, half)
    return table


def sincos_table(
    width: int = 1920, grid: Sequence[int] = (13, 30, 45), text_length: int = 226, spacing: float = 1.875
) -> Tensor:
    """The table that files of 2b have, zeros for text and then sines and cosines, ``(1, text_length + N, width)``.

    Made in float64 and rounded to float32, as the original does. A network computes it for any size and does without.

    Args:
        grid: Tokens along frames, height and width.
        spacing: Tokens per unit of position along height and width.
    """
    frames, rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32, device="cpu") for n in grid), indexing="ij"
    )
    waves = []
    for where, dim in ((frames, width // 4), (columns / spacing, 3 * width // 8), (rows / spacing, 3 * width // 8)):
        rates = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
        angles = where.double().flatten()[:, None] * rates
        waves += [angles.sin(), angles.cos()]
    video = torch.cat(waves, dim=1)
    return torch.cat([video.new_zeros(text_length, width), video])[None].float()
