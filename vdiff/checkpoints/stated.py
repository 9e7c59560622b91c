"""What a folder of diffusers' says of itself beside its weights, held against the module that they fill.

Names and shapes do not tell how many heads an attention has, which language a network speaks, at which noise levels, or
what brings latents to their spread. The folder's JSON files do: ``config.json`` beside the weights of a part, and
``scheduler/scheduler_config.json``. What such a file leaves out is as its class in diffusers has it. A file that is not
there says nothing, nor does a class or a value that is not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.checkpoints.weights import MAX_HEADER, WeightFileError

SCHEDULER = "scheduler/scheduler_config.json"

# What classes of diffusers take for what a config leaves out. `attention_head_dim` is a number of heads in these, by a
# name that they kept, and how long a head is in the next.
HEADS: dict[str, Mapping[str, Any]] = {
    "UNet2DConditionModel": {"attention_head_dim": 8},
    "ControlNetModel": {"attention_head_dim": 8},
    "UNetSpatioTemporalConditionModel": {"num_attention_heads": (5, 10, 20, 20)},
    "CogVideoXTransformer3DModel": {"num_attention_heads": 30},
}
HEAD_LENGTHS: dict[str, Mapping[str, Any]] = {
    "UNet2DModel": {"attention_head_dim": 8},
    "UNet3DConditionModel": {"attention_head_dim": 64},
}
# The published VQModels leave out a factor that is not their class's: nothing is known of it.
SCALES: dict[str, Mapping[str, Any]] = {
    "AutoencoderKL": {"scaling_factor": 0.18215},
    "AutoencoderKLTemporalDecoder": {"scaling_factor": 0.18215},
    "AutoencoderKLCogVideoX": {"scaling_factor": 1.15258426},
    "VQModel": {},
}
_DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_DDPM |= {"prediction_type": "epsilon"}
_HEUN = _DDPM | {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = _HEUN | {"beta_schedule": "scaled_linear"}
_ZERO = {"rescale_betas_zero_snr": False}  # where a class takes it; others keep the key of a config and ignore it
_ZEROS = "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DPMSolverMultistep EulerAncestralDiscrete EulerDiscrete "
_ZEROS += "UniPCMultistep"
_DDPMS = "DEISMultistep DPMSolverMultistepInverse DPMSolverSinglestep LMSDiscrete PNDM SASolver"
SCHEDULERS: dict[str, Mapping[str, Any]] = {
    **{f"{name}Scheduler": _DDPM | _ZERO for name in _ZEROS.split()},
    **{f"{name}Scheduler": _DDPM for name in _DDPMS.split()},
    **{f"{name}Scheduler": _HEUN for name in "DPMSolverSDE HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete".split()},
    **{f"{name}Scheduler": _LCM | _ZERO for name in ("LCM", "TCD")},
    **{f"CogVideoX{name}Scheduler": _LCM | _ZERO | {"snr_shift_scale": 3.0} for name in ("DDIM", "DPM")},
}
LANGUAGES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}
# Of alpha and sigma. Diffusers makes its tables in float32, where a thousand products lose 1e-5; another third figure
# of a beta shifts levels by 2e-3.
SAME_LEVEL = 1e-4


@dataclass(frozen=True)
class Config:
    """A config of diffusers'.

    Attributes:
        file: Where it lies in its folder.
        kind: The class that it is of.
    """

    file: str
    kind: str
    values: Mapping[str, Any]

    def over(self, defaults: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """What it says and, where it does not, its class; None if that is none of these."""
        return {**defaults[self.kind], **self.values} if self.kind in defaults else None


def read_config(folder: Path, file: str) -> Config | None:
    """A config in a folder, None if there is none.

    Raises:
        WeightFileError: it cannot be read.
    """
    path = folder / file
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"a config of more than {MAX_HEADER:,} bytes is not read")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a config is names and values, and this is a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightFileError(
            f"{path}: what stands beside weights of diffusers' is JSON, and this cannot be read: {error}. "
            "Get it again, or take it away: without it nothing is compared."
        ) from error
    return Config(file, str(values.get("_class_name")), values)


def other_heads(
    config: Config, module: nn.Module, origin: Mapping[str, Sequence[str]], begin: str, filled: Collection[str]
) -> dict[str, list[str]]:
    """Attentions that a config gives another number of heads, by which and how many they have.

    Args:
        module: The part that is filled.
        origin: Names of its weights, and diffusers' of what each is made of.
        begin: Before names in messages.
        filled: Names of its weights that are.
    """
    found: dict[str, list[str]] = {}
    for name, attention in module.named_modules():
        here = getattr(attention, "num_heads", None)
        for end, fused in (("to_q.weight", 1), ("qkv.weight", 3)):
            weight = f"{name}.{end}"
            if not isinstance(here, int) or weight not in filled:
                continue
            inner = attention.get_parameter(end).shape[0] // fused
            said = _heads(config, origin[weight][0], inner)
            if said not in (None, here):
                found.setdefault(f"with {here} heads, and {said} by {config.file}", []).append(begin + name)
    return found


def _heads(config: Config, name: str, inner: int) -> int | None:
    """Of the attention with a weight of this name, which is ``inner`` wide; None: it is not said."""
    if (values := config.over(HEADS)) and "transformer_blocks." in name:
        return _at(values.get("num_attention_heads") or values.get("attention_head_dim"), name)
    if values := config.over(HEAD_LENGTHS):
        length = _at(values.get("attention_head_dim"), name)
        return inner // length if length else None
    return None


def _at(value: Any, name: str) -> int | None:
    """A number for all, or that of the level at which a block of a UNet is; the middle is at the last."""
    if isinstance(value, list | tuple):
        match = re.match(r"(down|up)_blocks\.(\d+)\.|mid_block\.", name)
        if match is None or int(match[2] or 0) >= len(value):
            return None
        value = value[int(match[2])] if match[1] == "down" else value[-1 - int(match[2] or 0)]
    return value if type(value) is int and value > 0 else None


def other_scale(config: Config, stage: Any, name: str) -> Iterator[str]:
    """How a first stage's map from codes to latents differs: ``(z - shift) * scale`` here and in diffusers.

    What ``invert_scale_latents`` says is of pictures as conditions, and of no first stage.
    """
    values = config.over(SCALES) or {}
    for key, attribute, given in (
        ("scaling_factor", "scale", values.get("scaling_factor")),
        ("shift_factor", "shift", values.get("shift_factor") or 0.0),
    ):
        said, here = _number(given), _number(getattr(stage, attribute, None))
        if values and said is not None and here is not None and not math.isclose(said, here, rel_tol=1e-4):
            yield f"{config.file}: {key} is {said:g}, and the {attribute} of {name} is {here:g}"
    if values.get("latents_mean") or values.get("latents_std"):
        yield f"{config.file}: latents_mean and latents_std are of each channel, and {name} has one scale and shift"


def other_noise(config: Config, engine: Any) -> Iterator[str]:
    """How the language of an engine's denoiser and its noise levels differ from those of a scheduler.

    Levels are compared where both are tables.
    """
    language, ours = _language(config), getattr(getattr(engine, "denoiser", None), "language", None)
    spoken = getattr(ours, "name", None)
    if language is not None and spoken in {*LANGUAGES.values(), "edm"} and spoken != language:
        said = config.values.get("prediction_type", f"that of {config.kind}")
        yield f"{config.file}: prediction_type is {said}, and the denoiser speaks {spoken}; that is type: {language}"
    schedule = getattr(engine, "schedule", None)
    table = getattr(schedule, "alphas_cumprod", None)
    values = config.over(SCHEDULERS)
    if values is None or not isinstance(table, Tensor) or not _is_of_betas(values):
        return
    rows, what = values["num_train_timesteps"], f"the schedule, {type(schedule).__name__}"
    if type(rows) is int and rows != len(table):
        yield f"{config.file}: its noise levels are {rows}, and those of {what}, are {len(table)}"
    elif type(rows) is int and (theirs := _alphas_cumprod(values)) is not None:
        here = table.cpu().double()
        apart = torch.maximum((theirs.sqrt() - here.sqrt()).abs(), ((1 - theirs).sqrt() - (1 - here).sqrt()).abs())
        if apart.max() > SAME_LEVEL:
            row = int(apart.argmax())
            ratios = [float(((1 - one[row]) / one[row]).sqrt()) for one in (theirs, here)]
            keys = ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "snr_shift_scale")
            told = ", ".join(f"{key} {values[key]}" for key in keys if key in SCHEDULERS[config.kind])
            yield (
                f"{config.file}: its noise levels are not those of {what}: at row {row} sigma / alpha is "
                f"{ratios[0]:.4g} there and {ratios[1]:.4g} here. It says "
                f"{'trained_betas' if values.get('trained_betas') else told}"
            )


def _language(config: Config) -> str | None:
    """As it is called here, None if that is not known."""
    if config.kind.startswith("FlowMatch"):
        return "velocity"
    if config.kind in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        # What they call epsilon is EDM's target; their v is its negative, of unit data that of the circle.
        return "edm" if config.values.get("prediction_type", "epsilon") == "epsilon" else None
    values = config.over(SCHEDULERS) or {}
    return LANGUAGES.get(str(values.get("prediction_type")))


def _is_of_betas(values: Mapping[str, Any]) -> bool:
    """Whether a scheduler's levels are a table; Stable Video Diffusion's go from ``sigma_min`` to ``sigma_max``."""
    return values.get("timestep_type") != "continuous" and not values.get("use_flow_sigmas")


def _alphas_cumprod(values: Mapping[str, Any]) -> Tensor | None:
    """The table that a scheduler makes, None if how is not known. Without its guards against zeros in the last row."""
    start, end, rows = _number(values["beta_start"]), _number(values["beta_end"]), values["num_train_timesteps"]
    given, way = values.get("trained_betas"), values["beta_schedule"]
    options: dict[str, Any] = {"dtype": torch.float64}
    if isinstance(given, list):
        numbers = [_number(beta) for beta in given]
        betas = torch.tensor([math.nan if beta is None else beta for beta in numbers], **options)
    elif way == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(rows + 1, **options) / rows + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    elif start is None or end is None or min(start, end) < 0 or way not in ("linear", "scaled_linear"):
        return None
    elif way == "linear":
        betas = torch.linspace(start, end, rows, **options)
    else:
        betas = torch.linspace(start**0.5, end**0.5, rows, **options) ** 2
    table = torch.cumprod(1 - betas, 0)
    takes = SCHEDULERS[values["_class_name"]]
    if "snr_shift_scale" in takes:
        shift = _number(values["snr_shift_scale"])
        table = table / (shift + (1 - shift) * table) if shift else table * math.nan
    if "rescale_betas_zero_snr" in takes and values["rescale_betas_zero_snr"]:
        root = table.sqrt()
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return table if len(table) == rows and bool(((table >= 0) & (table <= 1)).all()) else None


def _number(value: Any) -> float | None:
    """None if it is none that may be reckoned with."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e9 else None
