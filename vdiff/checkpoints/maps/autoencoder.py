"""The autoencoders of latent diffusion and Stable Video Diffusion: their names, which are ours, and diffusers'."""

from __future__ import annotations

from vdiff.checkpoints.changes import DropOnes
from vdiff.checkpoints.keymap import KeyMap

RES = KeyMap([("nin_shortcut.*", "conv_shortcut.*"), ("{layer}.{leaf}", "{layer}.{leaf}")])
# 1 x 1 convolutions there, matrices here.
ATTENTION = KeyMap(
    [
        ("norm.*", "group_norm.*"),
        ("proj_out.*", "to_out.0.*", DropOnes()),
        *((f"{letter}.*", f"to_{letter}.*", DropOnes()) for letter in "qkv"),
    ]
)
VIDEO_RES = KeyMap(
    [
        ("mix_factor", "time_mixer.mix_factor"),
        ("time_stack.in_layers.0.*", "temporal_res_block.norm1.*"),
        ("time_stack.in_layers.2.*", "temporal_res_block.conv1.*"),
        ("time_stack.out_layers.0.*", "temporal_res_block.norm2.*"),
        ("time_stack.out_layers.3.*", "temporal_res_block.conv2.*"),
    ]
) + RES.under("", "spatial_res_block")
QUANT = KeyMap((f"{name}.*", f"{name}.*") for name in ("quant_conv", "post_quant_conv"))


def half(way: str, num_levels: int, res: KeyMap = RES) -> KeyMap:
    """The encoder (``down``) or the decoder (``up``)."""
    table = KeyMap(
        [("conv_in.*", "conv_in.*"), ("conv_out.{leaf}", "conv_out.{leaf}"), ("norm_out.*", "conv_norm_out.*")]
    )
    for n in (0, 1):
        table += res.under(f"mid.block_{n + 1}", f"mid_block.resnets.{n}")
    table += ATTENTION.under("mid.attn_1", "mid_block.attentions.0")
    for level in range(num_levels):
        # Our up.0 is the last to run, theirs the first.
        there = f"{way}_blocks.{level if way == 'down' else num_levels - 1 - level}"
        table += res.under(f"{way}.{level}.block.{{j}}", f"{there}.resnets.{{j}}")
        table += ATTENTION.under(f"{way}.{level}.attn.{{j}}", f"{there}.attentions.{{j}}")
        table += KeyMap([(f"{way}.{level}.{way}sample.*", f"{there}.{way}samplers.0.*")])
    return table


def autoencoder_kl(num_levels: int = 4) -> KeyMap:
    """Names of :class:`vdiff.first_stages.AutoencoderKL` to diffusers'."""
    encoder, decoder = half("down", num_levels), half("up", num_levels)
    return encoder.under("encoder", "encoder") + decoder.under("decoder", "decoder") + QUANT


def vq(num_levels: int = 3) -> KeyMap:
    """Names of :class:`vdiff.first_stages.VQAutoencoder` to those of diffusers' ``VQModel``."""
    return autoencoder_kl(num_levels) + KeyMap([("quantize.embedding.weight", "quantize.embedding.weight")])


def temporal_decoder(num_levels: int = 4) -> KeyMap:
    """Names of :class:`vdiff.first_stages.TemporalDecoderAutoencoder` to diffusers'.

    diffusers' has a ``quant_conv``; so has ours where it is built with one.
    """
    decoder = KeyMap([("conv_out.time_mix_conv.*", "time_conv_out.*")]) + half("up", num_levels, VIDEO_RES)
    return half("down", num_levels).under("encoder", "encoder") + decoder.under("decoder", "decoder") + QUANT
