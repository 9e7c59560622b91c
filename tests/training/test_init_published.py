"""``training.init`` from a published file: one line, and every part of the engine begins from it."""

import copy
from pathlib import Path

import pytest
import torch
from published import weights
from torch import nn

from vdiff.checkpoints import convert_checkpoint, open_weights, save_weights
from vdiff.losses import LatentDiffusionLoss
from vdiff.process import ScaledLinearSchedule
from vdiff.registry import build, load_config
from vdiff.training.init import InitEntry, initialize

CONFIG = Path(__file__).parents[2] / "configs" / "families" / "sd21_base.yaml"
TEXT = "{embed_dim: 24, width: 16, heads: 2, layers: 2, context_length: 16, vocab_size: 100}"
NUMBERS = ["channels=8", "channel_mult=[1, 2]", "num_res_blocks=1", "norm_groups=4"]
LINES = [
    *(f"{slot}.{line}" for slot in ("first_stage", "denoiser.network") for line in NUMBERS),
    "denoiser.network.context_dim=12", "denoiser.network.attention_factors=[2]", "denoiser.network.head_dim=8",
    "denoiser.network.linear_projection=false", "denoiser.network.num_classes=sequential",
    "denoiser.network.vector_dim=6", f"conditioner.embedders.0.arch={TEXT}",
]  # fmt: skip
PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "autoencoder_kl",
    "cond_stage_model.": "open_clip_text",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture
def engine():
    return build(load_config(CONFIG, overrides=[f"engine.{line}" for line in LINES])["engine"], "engine")


@pytest.fixture
def file(tmp_path):
    tensors = {n: v for at, name in PARTS.items() for n, v in weights(name, "ldm", at).items()}
    torch.save({"state_dict": tensors | {"betas": torch.zeros(1000)}}, tmp_path / "sd.ckpt")
    return tmp_path / "sd.ckpt"


def filled(engine):
    own = engine.state_dict()
    for prefix, name in zip(
        ("denoiser.network.", "first_stage.", "conditioner.embedders.0."), PARTS.values(), strict=True
    ):
        assert all(torch.equal(own[prefix + n], v) for n, v in weights(name).items())


def test_one_line_fills_the_engine_and_the_report_says_with_what(engine, file):
    done = initialize(engine, [InitEntry(file)])
    filled(engine)
    assert done.new == () and "cond_stage_model.* -> conditioner.embedders.0: open_clip_text" in done.lines[0]
    assert "1 tensors left out, tables of a schedule (betas)" in done.lines[0]


def test_a_folder_of_diffusers_does_as_well(engine, file, tmp_path):
    convert_checkpoint(open_weights(file), tmp_path / "sd", "diffusers")
    initialize(engine, [InitEntry(tmp_path / "sd")])
    filled(engine)


def test_a_folder_of_one_part_fills_that_part(engine, file, tmp_path):
    save_weights(tmp_path / "vae/diffusion_pytorch_model.safetensors", weights("autoencoder_kl", "diffusers"))
    initialize(engine, [InitEntry(file, ignore=["first_stage.*"]), InitEntry(tmp_path / "vae", "first_stage")])
    filled(engine)


def test_files_of_parts_are_put_where_they_belong(engine, file, tmp_path):
    """As CogVideoX is published: one file each, here with a loss beside the autoencoder."""
    save_weights(tmp_path / "vae.safetensors", weights("autoencoder_kl") | {"loss.logvar": torch.zeros(1)})
    save_weights(tmp_path / "text.safetensors", weights("open_clip_text", "diffusers"))
    sources = [
        InitEntry(file, "denoiser.network"),
        InitEntry(tmp_path / "vae.safetensors", "first_stage"),
        InitEntry(tmp_path / "text.safetensors", "conditioner.embedders.0"),
    ]
    done = initialize(engine, sources)
    filled(engine)
    assert done.new == () and "the file -> first_stage: autoencoder_kl" in done.lines[1]


def test_what_a_file_does_not_fill_is_new(engine, file):
    done = initialize(engine, [InitEntry(file, ignore=["denoiser.network.out.2.*"])])
    assert set(done.new) == {"denoiser.network.out.2.weight", "denoiser.network.out.2.bias"}
    with pytest.raises(ValueError, match="missing in the file: first_stage"):
        initialize(engine, [InitEntry(file, leave_out=["first_stage_model."])])


def test_an_engines_own_file_fills_all_of_it(engine, file, tmp_path):
    """Also a loss that learns, whose name is that of what a published file has beside, and an embedder of no family."""

    def more(engine):
        engine.loss = LatentDiffusionLoss(ScaledLinearSchedule(), learn_log_variance=True)
        engine.conditioner.embedders.append(nn.Embedding(3, 4))
        return engine

    made, again = more(copy.deepcopy(engine)), more(engine)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_()
    save_weights(tmp_path / "own.safetensors", made.state_dict())
    assert "loss.log_variance" in made.state_dict()
    done = initialize(again, [InitEntry(tmp_path / "own.safetensors")])
    assert done.new == () and all(torch.equal(v, again.state_dict()[n]) for n, v in made.state_dict().items())
    with pytest.raises(ValueError, match=r"missing in the file: .*loss\.log_variance"):
        initialize(again, [InitEntry(file)])
    done = initialize(again, [InitEntry(file, ignore=["loss.*", "conditioner.embedders.1.*"])])
    assert set(done.new) == {"loss.log_variance", "conditioner.embedders.1.weight"}


def test_ignored_names_are_below_into_in_a_file_of_either_kind(engine, file, tmp_path):
    save_weights(tmp_path / "own.safetensors", weights("unet"))
    for source in (file, tmp_path / "own.safetensors"):
        done = initialize(engine, [InitEntry(source, "denoiser.network", ignore=["out.2.*"])])
        assert {n for n in done.new if n.startswith("denoiser.")} == {
            "denoiser.network.out.2.weight",
            "denoiser.network.out.2.bias",
        }
        with pytest.raises(ValueError, match=r"ignore 'denoiser\.network\.out\.2\.\*' meets no name"):
            initialize(engine, [InitEntry(source, "denoiser.network", ignore=["denoiser.network.out.2.*"])])
        with pytest.raises(ValueError, match=r"leave_out.?'safety\.' meets no name"):
            initialize(engine, [InitEntry(source, "denoiser.network", leave_out=["safety."])])
        with pytest.raises(ValueError, match="given"):
            initialize(engine, [InitEntry(source, "denoiser.network", given={"head_dim": 8})])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"leave_out": ["a."], "prefix": {"a.": ""}}, "leave_out beside prefix"),
        ({"leave_out": ["a."], "inside": "model"}, "leave_out beside inside"),
        ({"given": {"head_dim": 8}, "strict": False}, "given beside strict: false"),
        ({"leave_out": ["a."], "inflate": True}, "leave_out beside inflate"),
        ({"leave_out": ["a."], "only_adapter": "lora"}, "leave_out beside only_adapter"),
    ],
)
def test_what_is_not_read_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InitEntry("a.ckpt", **options)


def test_a_published_file_is_not_loaded_by_halves(engine, file):
    with pytest.raises(ValueError, match="strict: false is for files that are"):
        initialize(engine, [InitEntry(file, strict=False)])
    with pytest.raises(ValueError, match=r"no 'denoiser\.netwrok'\. Did you mean 'denoiser\.network'"):
        initialize(engine, [InitEntry(file, "denoiser.netwrok")])
