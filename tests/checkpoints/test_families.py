"""Published checkpoints: told by their names, read one tensor at a time, and written in other layouts or not at all."""

import json

import pytest
import torch
from memory import Live
from published import FAMILY, LAYOUTS, MODELS, MODELS_OF_LAYOUT, same, weights

from vdiff.checkpoints import (
    KeyMapError,
    MismatchError,
    UnknownFamilyError,
    UnsafeFileError,
    WeightFileError,
    architecture,
    convert_checkpoint,
    is_in_folders,
    open_weights,
    read_weights,
    recognise,
    save_weights,
    write,
)
from vdiff.checkpoints.architecture import Told, UntoldError, diffusers_stages, holds_sincos, patch_frames, stages
from vdiff.checkpoints.changes import Made
from vdiff.checkpoints.maps import cogvideox
from vdiff.checkpoints.maps.cogvideox import sat_transformer, sincos_table
from vdiff.networks import CogVideoX, UNet

LDM = "model.diffusion_model."
STAGE = "first_stage_model."


def convert(source, out, to, **options):
    return convert_checkpoint(open_weights(source), out, to, **options)


def meta(tensors):
    return {name: value.to("meta") for name, value in tensors.items()}


# --- told by names and shapes --------------------------------------------------------------------


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_every_family_is_recognised_in_every_layout(name, layout):
    family = FAMILY[name]
    tensors = meta(weights(name, layout))
    for prefix in (family.prefix(layout), ""):
        found = recognise({prefix + n: v for n, v in tensors.items()})
        (part,) = found.parts
        assert (part.family, part.prefix, len(part.names), found.unknown) == (family, prefix, len(tensors), ())
        if prefix:  # where others write it alike, the rest of a checkpoint tells
            assert layout in [seat.layout for seat in part.seats]


def test_what_wrappers_put_around_names_is_looked_through():
    inner = meta(weights("unet"))
    for before in ("module.", "_forward_module.", "module._forward_module."):
        for compiled in ("", "_orig_mod."):
            found = recognise({f"{before}{LDM}{compiled}{n}": v for n, v in inner.items()})
            assert found.family.name == "unet" and found.parts[0].prefix == LDM
            assert found.parts[0].names["out.2.bias"] == f"{before}{LDM}{compiled}out.2.bias"


def test_a_whole_checkpoint_has_parts_and_things_beside_them():
    whole = weights("lvdm_unet", "lvdm", LDM) | weights("autoencoder_kl", "sgm", STAGE)
    extra = {
        "betas": 1, "alphas_cumprod_prev": 1, "sqrt_one_minus_alphas_cumprod": 1, "scale_arr": 1, "logvar": 1,
        f"{STAGE}loss.discriminator.main.0.weight": 1, "ref_model.diffusion_model.out.2.bias": 1,
        "model_ema.decay": 1, "model_ema.num_updates": 1,
        "cond_stage_model.model.ln_final.weight": 0, "image_proj_model.latents": 0,
        "embedder.model.visual.proj": 0, "something.else": 0,
    }  # fmt: skip
    found = recognise(meta(whole | {name: torch.zeros(1) for name in extra}))
    assert [part.family.name for part in found.parts] == ["lvdm_unet", "autoencoder_kl"] and found.layout == "lvdm"
    assert set(found.unknown) == {name for name, beside in extra.items() if not beside}
    assert {name for names in found.beside.values() for name in names} == {n for n, beside in extra.items() if beside}


def test_names_of_no_family_are_listed():
    with pytest.raises(UnknownFamilyError, match=r"of no family that is known .*begin: encoder.layers.0, .*, head"):
        recognise(meta({f"encoder.layers.{i}": torch.zeros(1) for i in (0, 1)} | {"head": torch.zeros(1)}))


def test_published_sizes_tell_what_a_table_wants_to_know(tmp_path):
    """On the meta device: SD 1.5 and SDXL's levels, the table of 2b, the two frames of a patch of 1.5."""
    with torch.device("meta"):
        sdxl = UNet(
            4, 4, 320, (1, 2, 4), attention_factors=(2, 4), head_dim=64, transformer_depth=(1, 2, 10),
            context_dim=2048, num_classes="sequential", vector_dim=2816,
        ).state_dict()  # fmt: skip
        two, five = CogVideoX(depth=1, spacing=1.875), CogVideoX(
            width=3072, num_heads=48, depth=1, patch_size=(2, 2, 2), positions="rotary"
        )  # fmt: skip
    levels = stages(Told(sdxl))
    assert (levels.num_res_blocks, levels.attends) == ((2, 2, 2), (False, True, True))
    there = FAMILY["unet"].layout("diffusers").table(Told(sdxl))(sdxl)
    assert diffusers_stages(Told(there)) == levels
    sat = sat_transformer(positions=Made(sincos_table))(two.state_dict())
    assert holds_sincos(Told(sat)) and holds_sincos(Told(two.state_dict()))
    assert not holds_sincos(Told(sat_transformer()(five.state_dict())))
    assert [patch_frames(Told(net.state_dict())) for net in (two, five)] == [1, 2]


def test_what_nothing_tells_is_asked_for(tmp_path):
    plain = UNet(4, 4, 8, (1, 2), 1, (2,), head_dim=8, norm_groups=4)
    save_weights(tmp_path / "a.safetensors", plain.state_dict())
    with pytest.raises(UntoldError, match="--given head_dim=NUMBER"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", given={"head_dim": 8})
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "vdiff", given={"head_dim": 8})
    assert same(read_weights(tmp_path / "c.safetensors"), plain.state_dict())


# --- converted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS if layout == "diffusers"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_weights_go_through_all_layouts_and_come_back_bit_for_bit(name, is_bare, tmp_path):
    original = FAMILY[name].layouts[1].name
    prefix = "" if is_bare else FAMILY[name].prefix(original)
    tensors, given = weights(name, original, prefix), MODELS[name][1]
    save_weights(tmp_path / "0.safetensors", tensors)
    at = tmp_path / "0.safetensors"
    # What is bare has our names and sgm's alike, and is taken for ours.
    for number, to in enumerate(("vdiff", "diffusers", "vdiff", original), 1):
        out = tmp_path / (f"{number}" if to == "diffusers" and not is_bare else f"{number}.safetensors")
        convert(at, out, to, given=given)
        at = out
        if to == "diffusers":
            theirs = {p.name: p for p in out.iterdir()} if out.is_dir() else {}
            assert is_bare or list(theirs) == [FAMILY[name].prefix("diffusers")[:-1]]
    assert same(read_weights(at), tensors)


@pytest.mark.parametrize(
    "name, layout", [("lvdm_unet", "dynamicrafter"), ("lvdm_unet", "dynamicrafter_256"), ("sv4d_unet", "sgm")]
)
def test_the_other_layouts_of_originals_lead_back_as_well(name, layout, tmp_path):
    save_weights(tmp_path / "a.safetensors", weights(name, layout, LDM))
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "vdiff")
    (part,) = recognise(open_weights(tmp_path / "b.safetensors").header).parts
    ours = MODELS_OF_LAYOUT.get((name, layout), MODELS[name][0])().state_dict()
    assert (part.family.name, part.layout) == (name, "vdiff") and part.names.keys() == ours.keys()
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", layout)
    assert same(read_weights(tmp_path / "c.safetensors"), weights(name, layout, LDM))


def test_the_table_of_2b_is_made_in_the_type_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "WIDTH_OF_2B", 32)
    monkeypatch.setattr(cogvideox, "sincos_table", lambda: sincos_table(32, (4, 4, 6), 6))
    net = CogVideoX(4, 4, 32, 1, 2, text_dim=12, emb_dim=8, text_length=6)
    ours = {f"denoiser.network.{name}": value.half() for name, value in net.state_dict().items()}
    save_weights(tmp_path / "a.safetensors", ours)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "sat")
    table = read_weights(tmp_path / "b.safetensors")[f"{LDM}mixins.pos_embed.pos_embedding"]
    assert torch.equal(table, sincos_table(32, (4, 4, 6), 6).half())
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "vdiff")
    assert same(read_weights(tmp_path / "c.safetensors"), ours)


def test_vdiffs_names_are_those_of_an_engine(tmp_path):
    whole = weights("unet", "sgm", LDM) | weights("autoencoder_kl", "sgm", STAGE)
    save_weights(tmp_path / "a.safetensors", whole)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "vdiff")
    wanted = weights("unet", prefix="denoiser.network.") | weights("autoencoder_kl", prefix="first_stage.")
    assert same(read_weights(tmp_path / "b.safetensors"), wanted)


def test_the_average_is_taken_and_raw_weights_on_demand(tmp_path):
    raw = weights("unet", "sgm", LDM)
    ema = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v + 1 for n, v in raw.items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    save_weights(tmp_path / "a.safetensors", raw | ema | counters)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "sgm")
    assert same(read_weights(tmp_path / "b.safetensors"), {n: v + 1 for n, v in raw.items()}) and done.parts[0][-1]
    convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "sgm", weights="raw")
    assert same(read_weights(tmp_path / "c.safetensors"), raw)


@pytest.mark.parametrize("envelope", ["state_dict", "module"])
def test_torch_files_and_deepspeeds_are_read(envelope, tmp_path):
    file = tmp_path / "mp_rank_00_model_states.pt"
    tensors = weights("cogvideox", "sat", f"module.{LDM}")
    torch.save({envelope: tensors, "global_step": 3, "lr_scheduler": None}, file)
    convert(file, tmp_path / "b.safetensors", "vdiff")
    assert same(read_weights(tmp_path / "b.safetensors"), weights("cogvideox", prefix="denoiser.network."))


def test_a_pipelines_folders_may_hold_torch_files_and_halves(tmp_path):
    for folder, name in (("unet", "unet"), ("vae", "autoencoder_kl")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        torch.save(weights(name, "diffusers"), tmp_path / "in" / folder / "diffusion_pytorch_model.bin")
    (tmp_path / "in" / "text_encoder").mkdir()
    torch.save(weights("clip_text", "diffusers"), tmp_path / "in" / "text_encoder" / "pytorch_model.bin")
    half = {n: v.half() for n, v in weights("open_clip_text", "diffusers").items()}
    save_weights(tmp_path / "in" / "text_encoder_2" / "model.fp16.safetensors", half)
    convert(tmp_path / "in", tmp_path / "b.safetensors", "sgm")
    whole = weights("unet", "sgm", LDM) | weights("autoencoder_kl", "sgm", STAGE)
    whole |= weights("clip_text", "sgm", "conditioner.embedders.0.")
    whole |= {n: v.half() for n, v in weights("open_clip_text", "sgm", "conditioner.embedders.1.").items()}
    assert same(read_weights(tmp_path / "b.safetensors"), whole)


@pytest.mark.parametrize("name, family", [("unet", "unet"), ("vae", "autoencoder_kl"), ("controlnet", "controlnet")])
def test_a_folder_of_one_part_is_read_like_its_file(name, family, tmp_path):
    """As autoencoders and ControlNets are published alone."""
    tensors = weights(family, "diffusers")
    save_weights(tmp_path / name / "diffusion_pytorch_model.safetensors", tensors)
    (tmp_path / name / "config.json").write_text("{}")
    assert is_in_folders(tmp_path / name)
    (part,) = recognise(open_weights(tmp_path / name).header).parts
    assert (part.family.name, part.layout, part.prefix) == (family, "diffusers", "")
    convert(tmp_path / name, tmp_path / "b.safetensors", "vdiff")
    assert same(read_weights(tmp_path / "b.safetensors"), weights(family))


@pytest.mark.parametrize(
    "index, shard",
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-{}.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-{}.safetensors"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "diffusion_pytorch_model-{}.fp16.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-{}.bin"),
        ("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-{}.bin"),
        (None, "diffusion_pytorch_model.fp16{}.bin"),
        (None, "diffusion_pytorch_model.bf16{}.safetensors"),
    ],
)
@pytest.mark.parametrize("folder", ["unet", "."])
def test_files_of_a_part_have_the_names_that_diffusers_gives(folder, index, shard, tmp_path):
    tensors = weights("unet", "diffusers")
    names = sorted(tensors)
    pieces = [names[::2], names[1::2]] if index else [names]
    places = {}
    for n, piece in enumerate(pieces):
        file = tmp_path / folder / shard.format(f"0000{n + 1}-of-00002" if index else "")
        held = {name: tensors[name] for name in piece}
        if file.suffix == ".bin":
            file.parent.mkdir(exist_ok=True)
            torch.save(held, file)
        else:
            save_weights(file, held)
        places |= dict.fromkeys(piece, file.name)
    if index:
        (tmp_path / folder / index).write_text(json.dumps({"weight_map": places}))
        assert same(read_weights(tmp_path / folder / index), tensors)
    source = open_weights(tmp_path)
    begin = "" if folder == "." else "unet/"
    assert same({name.removeprefix(begin): source[name] for name in source.header}, tensors)


def test_what_is_most_exact_is_taken(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin")
    save_weights(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"a": torch.ones(1).half()})
    assert open_weights(tmp_path)["a"].dtype == torch.float32


def test_a_checkpoint_of_our_own_is_no_folder_of_diffusers(tmp_path):
    """Though its weights are called as those of a text tower there."""
    folder = write(tmp_path / "step-00000001", {"model": {"a": torch.ones(1)}}, {})
    assert (folder / "model.safetensors").is_file() and not is_in_folders(folder)


def test_a_folder_without_weights_says_what_is_in_it(tmp_path):
    save_weights(tmp_path / "unet" / "weights.safetensors", {"a": torch.ones(1)})
    with pytest.raises(WeightFileError, match=r"nor in unet, .*There is: unet/weights\.safetensors\. A file"):
        open_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightFileError, match="There is: nothing"):
        open_weights(tmp_path / "empty")


def test_shards_are_written_and_read(tmp_path):
    tensors = weights("unet")
    save_weights(tmp_path / "a.safetensors", tensors)
    total = sum(v.nbytes for v in tensors.values())
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", shard_size=total // 4)
    index = json.loads((tmp_path / "b.safetensors.index.json").read_text())
    assert len(done.files) > 4 and set(index["weight_map"].values()) == {f.name for f in done.files[:-1]}
    assert index["metadata"]["total_size"] == total and not list(tmp_path.glob(".*"))
    convert(tmp_path / "b.safetensors.index.json", tmp_path / "c.safetensors", "vdiff")
    assert same(read_weights(tmp_path / "c.safetensors"), tensors)


@pytest.mark.parametrize("name, to", [("unet", "diffusers"), ("cogvideox", "sat"), ("cogvideox", "diffusers")])
def test_converting_holds_less_than_the_largest_shard(name, to, tmp_path):
    """1.1 times; here six shards, and the largest tensor is less than half of one."""
    tensors, given = weights(name), MODELS[name][1]
    save_weights(tmp_path / "a.safetensors", tensors)
    size = sum(v.nbytes for v in tensors.values()) // 6
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "vdiff", given=given, shard_size=size)
    largest = max(file.stat().st_size for file in done.files)
    source = open_weights(tmp_path / "b.safetensors.index.json")
    with Live() as live:
        convert_checkpoint(source, tmp_path / "c.safetensors", to, given=given, shard_size=size)
    assert 0 < live.peak <= 1.1 * largest


# --- refused -------------------------------------------------------------------------------------


def refused(source, tmp_path, error, match, to="diffusers", **options):
    """And nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    for out in ("out.safetensors", "out/folder"):
        if out.endswith("folder") and to != "diffusers":
            continue
        with pytest.raises(error, match=match):
            convert(source, tmp_path / out, to, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_without_a_table_are_an_error_until_ignored(tmp_path):
    file = tmp_path / "a.safetensors"
    save_weights(file, weights("unet", "sgm", LDM) | {"cond_stage_model.x": torch.zeros(1), "odd": torch.zeros(1)})
    message = r"2 tensors have no table: cond_stage_model.\* \(1, text tower\), odd"
    refused(file, tmp_path, KeyMapError, message)
    convert(file, tmp_path / "b", "diffusers", ignore=["cond_stage_model.", "odd"])
    convert(file, tmp_path / "c", "diffusers", parts=["unet"])
    assert same(*(read_weights(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in "bc"))
    refused(file, tmp_path, KeyMapError, "no name begins with 'nothing'", ignore=["nothing"])
    refused(file, tmp_path, ValueError, "no part 'unit'.*Did you mean 'unet'", parts=["unit"])


def test_a_missing_piece_and_a_strange_one_are_named(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = weights("cogvideox")
    save_weights(file, {n: v for n, v in tensors.items() if n != "blocks.1.attn1.to_k.bias"})
    refused(file, tmp_path, KeyMapError, r"come with blocks.1.attn1.to_k.bias", to="sat")
    save_weights(file, tensors | {"blocks.1.strange.weight": torch.zeros(1)})
    refused(file, tmp_path, KeyMapError, r"no blocks.1.strange.weight", to="sat")


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_weights(file, weights("unet"))
    refused(
        file, tmp_path, ValueError, "unet is not written in the layout 'sat'. Known: vdiff, sgm, ldm, diffusers", "sat"
    )
    save_weights(file, {"bert.encoder.weight": torch.zeros(2)})
    refused(file, tmp_path, UnknownFamilyError, "They begin: bert.encoder.weight")


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_weights(file, weights("unet"))
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, tmp_path, WeightFileError, "a.safetensors: damaged safetensors file, perhaps cut short")
    file.write_bytes(file.read_bytes()[:40])
    refused(file, tmp_path, WeightFileError, "cut short within its header")


class Trap:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": weights("unet", "sgm", LDM), "callbacks": Trap(tmp_path / "sprung")}, file)
    refused(file, tmp_path, UnsafeFileError, "reading it would run its code")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"time_embed.0.bias": (3,)}, r"time_embed.0.weight \(32, 8\) and its bias \(3,\)"),
        (
            {"input_blocks.1.0.in_layers.0.weight": (5,), "input_blocks.1.0.in_layers.0.bias": (5,)},
            "in_layers.2.weight",
        ),
    ],
)
def test_wrong_shapes_are_refused(wrong, message, tmp_path):
    file = tmp_path / "a.safetensors"
    save_weights(file, weights("unet") | {name: torch.zeros(shape) for name, shape in wrong.items()})
    refused(file, tmp_path, MismatchError, message)


def test_a_fused_projection_that_cannot_be_cut_is_refused(tmp_path):
    file, name = tmp_path / "a.safetensors", "transformer.layers.0.attention.query_key_value.weight"
    save_weights(file, weights("cogvideox", "sat") | {name: torch.zeros(97, 32)})
    refused(file, tmp_path, MismatchError, rf"{name} \(97, 32\): cannot become blocks.0.attn1.to_q.weight", "vdiff")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = weights("unet")
    tensors["out.2.bias"][1] = bad
    save_weights(file, tensors)
    refused(file, tmp_path, MismatchError, "out.2.bias is not finite", shard_size=3000)
