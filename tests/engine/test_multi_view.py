"""SV3D and SV4D in small, out of their own configs: a step, a sample, and what guidance leaves alone."""

from pathlib import Path

import pytest
import torch

from vdiff.registry import build, load_config

FAMILIES = Path(__file__).parents[2] / "configs" / "families"
STAGE = "{type: autoencoder_kl, channels: 8, norm_groups: 8, num_res_blocks: 1}"
SMALL = [
    "first_stage.channels=8", "first_stage.norm_groups=8", "first_stage.num_res_blocks=1", "first_stage.max_rows=4",
    "conditioner.embedders.0.arch={embed_dim: 16, width: 32, head_width: 16, layers: 1, patch_size: 8, image_size: 16}",
    f"conditioner.embedders.1.first_stage={STAGE}", "denoiser.network.channels=16", "denoiser.network.context_dim=16",
    "denoiser.network.norm_groups=8", "denoiser.network.channel_mult=[1, 2]", "denoiser.network.head_dim=8",
    "denoiser.network.attention_factors=[1]", "denoiser.network.num_res_blocks=1", "sampler.num_steps=2",
]  # fmt: skip
MOMENTS, VIEWS = 3, 2
NAMES = ["sv3d_u", "sv3d_p", "sv4d", "sv4d2", "sv4d2_8views"]
pytestmark = pytest.mark.filterwarnings("ignore:OpenCLIPImageEmbedder")


def draw(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small(name):
    lines = [*SMALL, f"sample_shape=[3, {MOMENTS * VIEWS}, 16, 16]"]
    lines += [f"conditioner.embedders.4.first_stage={STAGE}"] * name.startswith("sv4d")
    lines += [f"guider.num_views={VIEWS}"] * name.startswith("sv4d2")
    config = load_config(FAMILIES / f"{name}.yaml", overrides=[f"engine.{line}" for line in lines])
    engine = build(config["engine"], "engine")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in engine.denoiser.network.parameters():  # a new network says zero
            std = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return engine


def fields(name, rows=2):
    if name.startswith("sv3d"):
        angles = {"polars_rad": draw(rows, 6, seed=1) + 1.5, "azimuths_rad": draw(rows, 6, seed=2) + 3}
        return {"image": draw(rows, 3, 16, 16, seed=0)} | (angles if name == "sv3d_p" else {})
    return {
        "cond_motion": draw(rows, 3, MOMENTS, 16, 16, seed=0), "cond_view": draw(rows, 3, VIEWS, 16, 16, seed=3),
        "polar_rad": draw(rows, VIEWS, seed=1) + 1.5, "azimuth_rad": draw(rows, VIEWS, seed=2) + 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_step(name):
    engine = small(name).train()
    video = draw(2, 3, MOMENTS * VIEWS, 16, 16, seed=4)
    values = engine(fields(name) | {"video": video, "noise_key": torch.arange(2), "step": 0}).per_row
    values.mean().backward()
    network = engine.denoiser.network
    assert values.shape == (2,) and torch.isfinite(values).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    # Pictures that are told, and cameras, reach the weights that read them.
    readers = ["label_emb.0.0", "input_blocks.0.0"] + ["middle_block.1.motion_stack.0.attn2.to_v"] * (name[2] == "4")
    assert all(network.get_submodule(reader).weight.grad.abs().max() > 0 for reader in readers)
    assert all(p.grad is None for p in engine.conditioner.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_condition_changes_what_is_sampled(name):
    engine, told = small(name).eval(), fields(name, rows=1)
    usual = engine.sample(told)
    assert usual.shape == (1, 3, MOMENTS * VIEWS, 16, 16) and torch.isfinite(usual).all()
    assert torch.equal(engine.sample(told), usual)
    for field in told:
        other = engine.sample(told | {field: told[field].flip(-1)})
        assert (other - usual).abs().max() > 1e-4, field


@pytest.mark.parametrize("name", NAMES)
def test_guidance_moves_away_from_pictures_and_leaves_cameras_alone(name):
    """What the published scripts force to zero in the unconditional branch: of SV4D cond_frames with their level,
    cond_frames_without_noise and cond_view, of SV3D the pictures without their level; never angles."""
    engine, seen = small(name).eval(), []
    engine.denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    engine.sample(fields(name))
    cond = engine.conditioner(fields(name))
    assert len(seen) == 2  # both branches in one call
    for asked in seen:
        for what, both in asked.tensors.items():
            assert torch.equal(both, torch.cat([cond[what], cond.null[what]]))
    pictures = {"cross_attention", "concat"} | ({"views"} if name[2] == "4" else set())
    assert set(cond.tensors) == pictures | {"vector"}
    assert all((cond.null[n] == 0).all() and cond[n].abs().max() > 0 for n in pictures)
    level = slice(0, 256) if name[2] == "4" else slice(0, 0)
    assert (cond.null["vector"][..., level] == 0).all()
    rest = slice(level.stop, None)
    assert torch.equal(cond.null["vector"][..., rest], cond["vector"][..., rest])


def test_sv4d_2_begins_without_views():
    engine, told = small("sv4d2").eval(), fields("sv4d2")
    cond = engine.conditioner(told | {"has_cond_view": [0, 1]})
    assert (cond["views"][0] == 0).all() and torch.equal(cond["views"][1], engine.conditioner(told)["views"][1])
    first = engine.sample(told | {"has_cond_view": [0, 1]})
    other = engine.sample(told | {"has_cond_view": [0, 1], "cond_view": -told["cond_view"]})
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
