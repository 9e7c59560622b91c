"""A published checkpoint into a whole engine by one call: every key used, the original's numbers, nothing by halves."""

from pathlib import Path

import pytest
import torch
from memory import Live
from peers import peer
from published import T5, same, weights

from vdiff.checkpoints import (
    MismatchError,
    WeightSource,
    convert_checkpoint,
    load_published,
    open_weights,
    recognise,
    save_weights,
)
from vdiff.checkpoints.maps import autoencoder, towers, unet
from vdiff.conditioners import T5TextEmbedder
from vdiff.registry import build, load_config

ROOT = Path(__file__).parents[2] / "configs" / "families"
pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

# Stable Diffusion in small. OpenAI's towers are told by their width.
SMALL = [
    "sample_shape=[3, 16, 16]",
    "first_stage.channels=32", "first_stage.channel_mult=[1, 2]", "first_stage.num_res_blocks=1",
    "denoiser.network.channels=32", "denoiser.network.channel_mult=[1, 2]", "denoiser.network.attention_factors=[1]",
    "denoiser.network.num_res_blocks=1", "denoiser.network.context_dim=512", "denoiser.network.num_heads=4",
    "conditioner.embedders.0.arch={hidden_size: 512, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 8, max_position_embeddings: 8, vocab_size: 100}",
    "sampler.num_steps=4",
]  # fmt: skip
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
IDS = torch.tensor([[98, 5, 7, 9, 99, 99, 99, 99], [98, 3, 99, 99, 99, 99, 99, 99]])
NOTHING = torch.tensor([[98, 99, 99, 99, 99, 99, 99, 99]])


def engine(family, lines, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        made = build(load_config(ROOT / f"{family}.yaml", overrides=[f"engine.{x}" for x in lines])["engine"], "engine")
    return made.eval()


def small():
    made = engine("sd15", SMALL)
    text = made.conditioner.embedders[0]
    text.empty_ids = lambda: NOTHING  # the vocabulary has a hundred words
    return made


@pytest.fixture(scope="module")
def pipeline():
    """UNet, autoencoder and text tower of diffusers' Stable Diffusion, random."""
    diffusers, transformers = peer("diffusers"), peer("transformers")
    torch.manual_seed(1)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=512, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    blocks = {f"{w}_block_types": (f"{kind}Block2D",) * 2 for w, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, **blocks)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
            max_position_embeddings=8, vocab_size=100, eos_token_id=99,
        )
    )  # fmt: skip
    return [module.eval() for module in (network, vae, text)]


@pytest.fixture(scope="module")
def original(pipeline):
    """The same in one file of latent diffusion, with its schedule and its exponential average of other weights."""
    network, vae, text = (module.state_dict() for module in pipeline)
    text = {f"transformer.text_model.{n.removeprefix('text_model.')}": v for n, v in text.items()}
    tensors = {UNET + n: v for n, v in unet.unet(1, (True, False)).inverse(network).items()}
    tensors |= {VAE + n: v for n, v in autoencoder.autoencoder_kl(2).inverse(vae).items()}
    tensors |= {TEXT + n: v for n, v in text.items()}
    tensors[f"{TEXT}transformer.text_model.{towers.COUNTED}"] = towers.counted(8)
    return tensors | {name: torch.rand(1000) for name in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod")}


@torch.no_grad()
def drawn_by_hand(pipeline, noise, scale=7.5, num_steps=4):
    """Classifier-free guidance and DDIM on rows 1, 251, 501 and 751, as latent diffusion counts them."""
    network, vae, text = pipeline
    alphas = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = alphas.cumprod(0)
    context = text(torch.cat([IDS, NOTHING, NOTHING])).last_hidden_state
    rows = [1 + 1000 // num_steps * i for i in reversed(range(num_steps))]
    x = noise
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        said, silent = network(torch.cat([x, x]), row, context).sample.chunk(2)
        epsilon = silent + scale * (said - silent)
        a, b = float(alphas[row]), 1.0 if after is None else float(alphas[after])
        x0 = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
        x = b**0.5 * x0 + (1 - b) ** 0.5 * epsilon
    return vae.decode(x / 0.18215).sample


def test_an_original_file_draws_the_pictures_of_diffusers_pipeline(pipeline, original, tmp_path):
    """The purpose of it all: a file of latent diffusion, one call, and the same pictures."""
    torch.save({"state_dict": original, "global_step": 3}, tmp_path / "v1.ckpt")
    made = small()
    report = load_published(made, tmp_path / "v1.ckpt")
    assert sorted(report.loaded) == sorted(made.state_dict()) and not report.idle
    used = sum(len(recognise(original).parts[i].names) for i in range(3))
    assert used + 3 == len(original) and len(report.beside["tables of a schedule"]) == 3
    noise = made.noise((4, 8, 8), [0, 1])
    pictures = made.sample({"caption": IDS}, seeds=0)
    torch.testing.assert_close(pictures, drawn_by_hand(pipeline, noise), rtol=0, atol=1e-4)
    assert torch.equal(pictures, made.sample({"caption": IDS}, seeds=0))


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_folder_of_diffusers_fills_the_same_engine(pipeline, original, tmp_path):
    for folder, module in zip(("unet", "vae", "text_encoder"), pipeline, strict=True):
        module.save_pretrained(tmp_path / folder)
    theirs, ours = small(), small()
    report = load_published(theirs, tmp_path)
    assert {part.layout for part in report.parts} == {"diffusers"}
    save_weights(tmp_path / "v1.safetensors", original)
    load_published(ours, tmp_path / "v1.safetensors")
    assert same(theirs.state_dict(), ours.state_dict())


def test_the_average_is_taken_and_what_wrappers_put_around_names_looked_through(original, tmp_path):
    ema = {n: v + 1 for n, v in original.items() if n.startswith(UNET)}
    averaged = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v for n, v in ema.items()}
    averaged["model_ema.decay"] = torch.tensor(0.999)
    torch.save({"module": {f"_forward_module.{n}": v for n, v in (original | averaged).items()}}, tmp_path / "a.pt")
    plain, made = small(), small()
    report = load_published(made, tmp_path / "a.pt")
    assert [part.is_averaged for part in report.parts] == [True, False, False]
    load_published(plain, tmp_path / "a.pt", weights="raw")
    for name, value in plain.denoiser.network.state_dict().items():
        assert torch.equal(made.denoiser.network.state_dict()[name], value + 1)
    assert same(plain.first_stage.state_dict(), made.first_stage.state_dict())


def test_the_report_says_what_went_where(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original | {"ref_model.diffusion_model.out.2.bias": torch.zeros(4)})
    lines = str(load_published(small().bfloat16(), tmp_path / "a.safetensors")).splitlines()
    assert lines[0].endswith("a.safetensors")
    assert lines[1].startswith("  model.diffusion_model.* -> denoiser.network: unet (ldm), ")
    assert lines[3].startswith("  cond_stage_model.* -> conditioner.embedders.0: clip_text (ldm), 20 tensors, ")
    assert lines[3].endswith("; 20 converted to the module's type")
    assert lines[4:] == [
        "  3 tensors left out, tables of a schedule (alphas_cumprod, betas, sqrt_recipm1_alphas_cumprod)",
        "  1 tensors left out, a copied reference (ref_model.diffusion_model.out.2.bias)",
        "  1 tensors left out, which its layout alone has "
        "(cond_stage_model.transformer.text_model.embeddings.position_ids)",
    ]


def test_a_part_is_filled_alone(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)
    made, whole = small(), small()
    load_published(whole, tmp_path / "a.safetensors")
    before = copied(made)
    report = load_published(made, tmp_path / "a.safetensors", "first_stage")
    assert {part.into for part in report.parts} == {"first_stage"}
    assert len(report.outside) == sum(not n.startswith(VAE) for n in original) - 3  # and tables of a schedule
    assert same(made.first_stage.state_dict(), whole.first_stage.state_dict())
    assert same(made.denoiser.state_dict(), {n[9:]: v for n, v in before.items() if n.startswith("denoiser.")})
    for part in ("denoiser.network", "conditioner.embedders.0"):  # and a module by itself
        load_published(made.get_submodule(part), tmp_path / "a.safetensors")
    assert unchanged(whole, made.state_dict())


def test_a_text_tower_forgets_what_it_remembers_when_weights_come(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)
    made = small()
    text = made.conditioner.embedders[0]
    with pytest.warns(UserWarning, match="random weights"):
        before = text(IDS)["cross_attention"].tensor
    load_published(made, tmp_path / "a.safetensors")
    assert not text.is_random and not torch.equal(text(IDS)["cross_attention"].tensor, before)


def test_a_target_without_memory_takes_the_tensors(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)
    made, empty = small(), engine("sd15", SMALL, "meta")
    load_published(made, tmp_path / "a.safetensors")
    load_published(empty, tmp_path / "a.safetensors")
    assert same(empty.state_dict(), made.state_dict())
    flags = {name: p.requires_grad for name, p in made.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in empty.named_parameters()}


@pytest.mark.parametrize("out", ["a.safetensors", "folder"])
def test_loading_holds_the_model_and_little_more(out, original, tmp_path):
    """1.1 times the largest tensor beside the engine."""
    save_weights(tmp_path / "a.safetensors", original)
    if out == "folder":
        convert_checkpoint(open_weights(tmp_path / "a.safetensors"), tmp_path / out, "diffusers")
    made, source = small(), open_weights(tmp_path / out)
    largest = max(value.nbytes for value in original.values())
    own = {value.untyped_storage()._cdata: value.nbytes for value in made.state_dict().values()}
    with Live() as live:
        load_published(made, source)
    assert sum(own.values()) <= live.peak <= sum(own.values()) + 1.1 * largest


# --- Stable Video Diffusion, whose condition has a first stage of its own ------------------------

SVD = [
    "first_stage.channels=8", "first_stage.norm_groups=8", "first_stage.num_res_blocks=1",
    "first_stage.channel_mult=[1, 2]",
    "conditioner.embedders.3.first_stage={type: autoencoder_kl, channels: 8, norm_groups: 8, num_res_blocks: 1, "
    "channel_mult: [1, 2]}",
    "conditioner.embedders.0.arch={embed_dim: 16, width: 32, head_width: 16, layers: 1, patch_size: 8, image_size: 16}",
    "denoiser.network.channels=16", "denoiser.network.context_dim=16", "denoiser.network.norm_groups=8",
    "denoiser.network.channel_mult=[1, 2]", "denoiser.network.attention_factors=[1]", "denoiser.network.head_dim=8",
    "denoiser.network.num_res_blocks=1",
]  # fmt: skip


def test_diffusers_one_autoencoder_fills_both_of_stable_video_diffusion(tmp_path):
    made, filled = engine("svd", SVD), engine("svd", SVD)
    with torch.no_grad():
        for param in filled.parameters():
            param.normal_()
    stage = filled.conditioner.embedders[3].first_stage
    stage.encoder.load_state_dict(filled.first_stage.encoder.state_dict())  # as published
    save_weights(tmp_path / "ours.safetensors", filled.state_dict())
    convert_checkpoint(open_weights(tmp_path / "ours.safetensors"), tmp_path / "svd", "diffusers")
    report = load_published(made, tmp_path / "svd")
    begin = "conditioner.embedders.3.first_stage."
    idle = {n for n in made.state_dict() if n.startswith((f"{begin}decoder.", f"{begin}post_quant_conv."))}
    assert set(report.idle) == idle
    lost = made.state_dict().keys() - report.loaded
    assert lost == idle and all(
        torch.equal(v, filled.state_dict()[n]) for n, v in made.state_dict().items() if n not in lost
    )
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(made.conditioner.embedders[3].encode(pixels), stage.encode(pixels))
    convert_checkpoint(open_weights(tmp_path / "ours.safetensors"), tmp_path / "svd.safetensors", "sgm")
    load_published(made, tmp_path / "svd.safetensors")
    assert unchanged(made, filled.state_dict())


# --- refused, and nothing changed ----------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{UNET}out.2.bias"), r"1 missing in the file: denoiser\.network\.out\.2\.bias"),
        (lambda t: t.update({f"{UNET}strange": torch.ones(1)}), r"1 in the file and without a place: .*strange"),
        (lambda t: t.update({"safety.x": torch.ones(1)}), r"1 in the file and without a place: safety\.x"),
        (lambda t: t.update({f"{UNET}out.2.bias": torch.ones(7)}), r"out.2.weight \(4, 32, 3, 3\) and its bias \(7,\)"),
        (lambda t: t.update({f"{TEXT}transformer.text_model.final_layer_norm.bias": torch.full((512,), torch.nan)}),
         r"final_layer_norm\.bias is not finite"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(VAE)], r"missing in the file: first_stage\.encoder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_changed(change, message, original, tmp_path):
    tensors = dict(original)
    change(tensors)
    save_weights(tmp_path / "a.safetensors", tensors)
    made = small()
    before = copied(made)
    with pytest.raises(ValueError, match=message):
        load_published(made, tmp_path / "a.safetensors")
    assert unchanged(made, before)


def test_other_widths_and_other_families_are_refused(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)
    wide = engine("sd15", [*SMALL, "denoiser.network.channels=64"])
    with pytest.raises(MismatchError, match=r"input_blocks.0.0.weight: \(32, 4, 3, 3\) float32 in the file, \(64, 4"):
        load_published(wide, tmp_path / "a.safetensors")
    with pytest.raises(
        MismatchError, match=r"model\.diffusion_model\.\* is unet \(sgm\), and denoiser.network is video_unet"
    ):
        load_published(engine("svd", SVD), tmp_path / "a.safetensors", leave_out=[TEXT])


def test_what_may_differ_is_said(original, tmp_path):
    """A file with more, and a network with one layer of its own."""
    save_weights(tmp_path / "a.safetensors", original | {"safety.weight": torch.ones(1)})
    made = engine("sd15", [*SMALL, "denoiser.network.in_channels=9"])
    before = copied(made)
    name = "denoiser.network.input_blocks.0.0.weight"
    report = load_published(
        made, tmp_path / "a.safetensors", ignore=["*.input_blocks.0.0.weight"], leave_out=["safety."]
    )
    assert report.ignored == (name,) and report.outside == ("safety.weight",)
    assert torch.equal(made.state_dict()[name], before[name]) and len(report.loaded) == len(before) - 1


def test_a_tied_table_without_memory_stays_tied_and_of_the_modules_type(tmp_path):
    """T5's, which stands under two names."""
    made = T5TextEmbedder(T5, length=6)
    save_weights(tmp_path / "t5.safetensors", {n: v.clone() for n, v in weights("t5_text", "diffusers").items()})
    load_published(made, tmp_path / "t5.safetensors")
    with torch.device("meta"):
        empty = T5TextEmbedder(T5, length=6).bfloat16()

    def tables(module):
        return [p for name, p in module.named_parameters(remove_duplicate=False) if p.shape == (32, 12)]

    assert len(tables(made)) == 2 and tables(made)[0] is tables(made)[1]
    report = load_published(empty, tmp_path / "t5.safetensors")
    assert tables(empty)[0] is tables(empty)[1] and report.parts[0].cast == len(report.loaded)
    for name, value in made.bfloat16().state_dict().items():
        assert torch.equal(empty.state_dict()[name], value)


def test_where_it_goes_is_a_part_and_what_is_asked_for_is_there(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)
    made = small()
    before = copied(made)
    for into, options, message in (
        ("denoiser.netwrok", {}, r"no 'denoiser\.netwrok'\. Did you mean 'denoiser\.network'"),
        ("denoiser.network.input_blocks", {}, r"below a part.* There are: denoiser\.network, first_stage, "),
        ("", {"weights": "eam"}, "'ema' or 'raw', got 'eam'"),
        ("first_stage", {"ignore": ["first_stage.*"]}, r"ignore 'first_stage\.\*' meets no name"),
        ("", {"leave_out": ["safety."]}, r"leave_out 'safety\.' meets no name"),
        ("", {"given": {"heads": 8}}, "given heads, which nothing here asks for"),
    ):
        with pytest.raises(ValueError, match=message):
            load_published(made, tmp_path / "a.safetensors", into, **options)
    assert unchanged(made, before)


def test_reading_that_fails_while_filling_says_that_the_module_is_half_filled(original, tmp_path):
    save_weights(tmp_path / "a.safetensors", original)

    class Failing(WeightSource):
        """The second time around, at the autoencoder."""

        reads = 0

        def __getitem__(self, name):
            self.reads += name == f"{VAE}encoder.conv_in.weight"
            if self.reads == 2:
                raise OSError("gone")
            return super().__getitem__(name)

    plain = open_weights(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="half filled; build it anew. gone"):
        load_published(small(), Failing(plain.path, plain._places, plain.header))
