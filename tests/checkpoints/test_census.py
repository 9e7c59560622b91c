"""Every key of every published file has a place in its engine, counted on the meta device.

A file's names and shapes are the engine's own through the tables, which other tests hold against the lists of the
originals and against diffusers; here they are counted, and led back.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from vdiff.checkpoints import MismatchError, WeightSource, check_published, recognise
from vdiff.checkpoints.translation import Translation
from vdiff.registry import build, load_config

ROOT = Path(__file__).parents[2] / "configs" / "families"

# Parameters of the network; its tensors, the first stage's, and those of each part of the conditioner as the original
# writes them, with the positions 0, 1, 2, ... of CLIP's text tower by OpenAI. Whole files as known: 1131 of Stable
# Diffusion 1 and 1228 of 2, 2515 of SDXL, 2026 of VideoCrafter 2, all without the tables of their schedules. SAT has
# one projection where diffusers has three and one modulation for two, and the table of sines that 2b adds.
CENSUS = {
    "sd15": ("ldm", 859_520_964, (686, 248, 197)),
    "sd15_inpainting": ("ldm", 859_535_364, (686, 248, 197)),
    "sd21_base": ("ldm", 865_910_724, (686, 248, 294)),
    "sd21": ("ldm", 865_910_724, (686, 248, 294)),
    "sdxl_base": ("sgm", 2_567_463_684, (1680, 248, 197, 390)),
    "sdxl_refiner": ("sgm", 2_259_526_660, (1220, 248, 390)),
    "svd": ("sgm", 1_524_623_082, (1428, 372, 392, 248)),
    "svd_xt": ("sgm", 1_524_623_082, (1428, 372, 392, 248)),
    "videocrafter1_t2v_512": ("lvdm", 1_144_485_956, (1196, 248, 294)),
    "videocrafter1_t2v_1024": ("lvdm", 1_146_536_516, (1200, 248, 294)),
    "videocrafter1_i2v_512": ("lvdm", 1_438_843_460, (1516, 248, 294, 392, 51)),
    "videocrafter2": ("lvdm", 1_413_284_420, (1484, 248, 294)),
    "dynamicrafter_1024": ("dynamicrafter", 1_438_854_980, (1516, 248, 294, 392, 51)),
    "cogvideox_2b": ("sat", 1_693_783_872, (736 - 30 * 6 + 1, 436, 220)),
    "cogvideox_5b": ("sat", 5_570_283_072, (1024 - 42 * 6, 436, 220)),
    "cogvideox_5b_i2v": ("sat", 5_570_479_680 + 54_607_872, (1025 - 42 * 6, 436, 220)),  # and the table of positions
    "cogvideox_1_5_5b": ("sat", 5_570_676_352, (1024 - 42 * 6, 436, 220)),
    "cogvideox_1_5_5b_i2v": ("sat", 5_571_594_880, (1028 - 42 * 6, 436, 220)),
}
# Tensors of the network in diffusers' layout.
IN_DIFFUSERS = {
    "sd15": 686, "sdxl_base": 1680, "sdxl_refiner": 1220, "svd": 1428, "cogvideox_2b": 736, "cogvideox_5b": 1024,
    "cogvideox_5b_i2v": 1025, "cogvideox_1_5_5b": 1024, "cogvideox_1_5_5b_i2v": 1028,
}  # fmt: skip
BETAS = "betas", "alphas_cumprod", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "posterior_variance", \
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_alphas_cumprod", \
    "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"  # fmt: skip


@pytest.fixture(scope="module")
def engines():
    made = {}

    def get(name):
        if name not in made:
            with torch.device("meta"):
                made[name] = build(load_config(ROOT / f"{name}.yaml")["engine"], "engine")
        return made[name]

    return get


def file_of(engine, layout, wants=lambda part: True):
    """The parts of an engine as a file in a layout: what it begins with there, and its tensors."""
    own = engine.state_dict()
    source, met, out = WeightSource(Path("engine"), {}, own), Counter(), {}
    for part in recognise(own).parts:
        if wants(part):
            prefix = part.family.prefix(layout, part.slot, part.number, met[part.slot])
            out[prefix] = {prefix + n: v for n, v in Translation(source, part, layout).described.items()}
            met[part.slot] += 1
    return out


def checked(engine, parts, **options):
    header = {name: value for part in parts for name, value in part.items()}
    return check_published(engine, WeightSource(Path("file"), {}, header), **options)


@pytest.mark.parametrize("name", CENSUS)
def test_every_key_of_the_original_has_a_place(name, engines):
    layout, parameters, counts = CENSUS[name]
    engine = engines(name)
    assert sum(p.numel() for p in engine.denoiser.network.parameters()) == parameters
    parts = file_of(engine, layout)
    assert tuple(map(len, parts.values())) == counts
    report = checked(engine, parts.values())
    assert len(report.loaded) == len(engine.state_dict()) and not report.idle and not report.outside
    assert {part.layout for part in report.parts} == {layout}


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_every_key_of_diffusers_has_a_place(name, engines):
    engine = engines(name)
    parts = file_of(engine, "diffusers", lambda part: part.slot != "condition_stage")
    assert len(next(iter(parts.values()))) == IN_DIFFUSERS[name]
    if name == "svd":  # whose autoencoder brings the last convolution of the condition's
        parts["vae/"] |= {f"vae/quant_conv.{leaf}": torch.empty(s, device="meta") for leaf, s in
                          (("weight", (8, 8, 1, 1)), ("bias", (8,)))}  # fmt: skip
    report = checked(engine, parts.values())
    assert set(report.loaded) | set(report.idle) == set(engine.state_dict())
    idle = {".".join(n.split(".")[:5]) for n in report.idle}
    begins = "conditioner.embedders.3.first_stage."
    assert idle == ({f"{begins}decoder", f"{begins}post_quant_conv"} if name == "svd" else set())


@pytest.mark.parametrize("family, known", [("sd21", 1240), ("videocrafter2", 2039)])
def test_whole_files_are_counted_as_users_did(family, known, engines):
    """With the twelve tables of a schedule and, in VideoCrafter 2, the scale of x0; 3523 with a reference network."""
    engine, tables = engines(family), BETAS if family == "sd21" else (*BETAS, "scale_arr")
    parts = file_of(engine, CENSUS[family][0])
    beside = {name: torch.empty(1000, device="meta") for name in tables}
    assert sum(map(len, parts.values())) + len(beside) == known
    report = checked(engine, [*parts.values(), beside])
    assert set(report.beside["tables of a schedule"]) == set(tables)
    if family == "videocrafter2":
        network = parts["model.diffusion_model."]
        reference = {f"ref_{name}": value for name, value in network.items()}
        assert known + len(reference) == 3523
        report = checked(engine, [*parts.values(), beside, reference])
        assert len(report.beside["a copied reference"]) == 1484


def test_diffusers_stable_diffusion_2_has_one_layer_less_and_that_is_enough(engines):
    """Its text tower ends where the tokens are taken, and has no projection: what is missing nothing reads."""
    engine = engines("sd21")
    parts = file_of(engine, "diffusers")
    text = parts["text_encoder/"]
    left = {n for n in text if "layers.23." in n or n.split("/")[1] in ("text_projection.weight", "logit_scale")}
    parts["text_encoder/"] = {n: v for n, v in text.items() if n not in left}
    report = checked(engine, parts.values())
    assert len(left) == 16 + 2 and len(report.idle) == 12 + 2
    assert all("resblocks.23." in n or n.endswith(("text_projection", "logit_scale")) for n in report.idle)


def test_sv3ds_file_decodes_alone_and_says_so(engines):
    """Its first stage is never given pictures to encode; what encodes them here stays as it is if that is asked for."""
    engine = engines("sv3d_u")
    parts = file_of(engine, "sgm")
    stage = "first_stage_model."
    parts[stage] = {n: v for n, v in parts[stage].items() if n.startswith(f"{stage}decoder.")}
    assert tuple(map(len, parts.values())) == (1428, 138, 392, 248)
    with pytest.raises(MismatchError, match=r"106 missing in the file: first_stage\.encoder"):
        checked(engine, parts.values())
    report = checked(engine, parts.values(), ignore=["first_stage.encoder.*"])
    assert len(report.ignored) == 106 and set(report.loaded) | set(report.ignored) == set(engine.state_dict())


@pytest.mark.parametrize("name, known", [("videocrafter1_i2v_512", 48_541_696), ("dynamicrafter_1024", 48_787_456)])
def test_the_resampler_is_of_the_published_size(name, known, engines):
    assert sum(p.numel() for p in engines(name).conditioner.embedders[1].resampler.parameters()) == known
