"""CogVideoX: its five published sizes, its peer's numbers, its two other layouts, conditions, mixins and errors."""

import hashlib

import pytest
import torch
from peers import peer
from torch import nn
from torch._dynamo.testing import CompileCounter

from vdiff.checkpoints.changes import Made
from vdiff.checkpoints.keymap import KeyMapError
from vdiff.checkpoints.maps.cogvideox import diffusers_transformer, sat_transformer, sincos_table
from vdiff.hooks import routed
from vdiff.mixins import JointAttention, LoRA
from vdiff.networks import CogVideoX, ExpertBlock, sinusoidal
from vdiff.networks.positions import coordinates, fitted, rotations, sincos
from vdiff.process import Conditioning
from vdiff.registry import build

FIVE_B = dict(width=3072, depth=42, num_heads=48, positions="rotary")
PUBLISHED = {
    "2b": dict(spacing=1.875),
    "5b": FIVE_B | dict(trained_size=(60, 90)),
    "5b_i2v": FIVE_B | dict(in_channels=32, trained_size=(60, 90), learned_size=(13, 60, 90)),
    "1.5_5b": FIVE_B | dict(patch_size=(2, 2, 2)),
    "1.5_5b_i2v": FIVE_B | dict(in_channels=32, patch_size=(2, 2, 2), offset_dim=512),
}
SMALL = dict(in_channels=4, out_channels=4, width=32, depth=2, num_heads=2, text_dim=12, emb_dim=8, text_length=6)
ROTARY = SMALL | dict(positions="rotary")
TINY = {  # the five at a size for a test
    "2b": SMALL | dict(spacing=1.875),
    "5b": ROTARY | dict(trained_size=(8, 12)),
    "5b_i2v": ROTARY | dict(in_channels=8, trained_size=(8, 12), learned_size=(4, 8, 12)),
    "1.5_5b": ROTARY | dict(patch_size=(2, 2, 2)),
    "1.5_5b_i2v": ROTARY | dict(in_channels=8, patch_size=(2, 2, 2), offset_dim=8),
}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(net, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def tiny(name):
    return randomised(CogVideoX(**TINY[name]))


def inputs(net, size=(4, 8, 12), rows=2, dtype=torch.float32):
    """x, c_noise and every condition that the network takes."""
    tensors = {"cross_attention": draw(rows, 6, 12, seed=2, dtype=dtype)}
    if net.in_channels > 4:
        tensors["concat"] = draw(rows, 4, *size, seed=3, dtype=dtype)
    if net.offset_embed is not None:
        tensors["ofs"] = torch.full((rows,), 2.0, dtype=dtype)
    return draw(rows, 4, *size, dtype=dtype), torch.tensor([3.0, 41.0], dtype=dtype)[:rows], Conditioning(tensors)


# --- the published networks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("2b", 1_693_783_872, 736),
        ("5b", 5_570_283_072, 1024),
        ("5b_i2v", 5_570_479_680 + 54_607_872, 1025),  # the second is the table of positions, a buffer in diffusers
        ("1.5_5b", 5_570_676_352, 1024),
        ("1.5_5b_i2v", 5_571_594_880, 1028),
    ],
)
def test_as_many_parameters_and_tensors_as_published(name, parameters, tensors):
    with torch.device("meta"):
        net = CogVideoX(**PUBLISHED[name])
    assert sum(p.numel() for p in net.parameters()) == parameters
    theirs = diffusers_transformer(net.patch)(net.state_dict())
    assert len(theirs) == tensors and sum(v.numel() for v in theirs.values()) == parameters


def test_the_originals_list_of_names_and_shapes():
    """Of CogVideoX-2b with two layers; the digest is of the sorted lines "name shape"."""
    with torch.device("meta"):
        net = CogVideoX(depth=2, spacing=1.875)
    theirs = sat_transformer(positions=Made(sincos_table))(net.state_dict())
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in theirs.items())
    assert len(lines) == 53 and "mixins.pos_embed.pos_embedding (1, 17776, 1920)" in lines
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "e455a69efa0228e3e801d47667c2c8ba58fd0917ca132908447bf31f17d2839d"


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_weights_go_from_layout_to_layout_and_back_bit_for_bit(name, convolution):
    net = tiny(name)
    table = Made(lambda: sincos_table(32, (4, 4, 6), 6)) if name == "2b" else None
    convolution = convolution and net.patch[0] == 1
    sat, diffusers = sat_transformer(convolution, table), diffusers_transformer(net.patch)
    original = sat(net.state_dict())
    unread = {} if name == "2b" else {"transformer.position_embeddings.weight": draw(64, 32)}
    ours = sat.inverse(original | unread)
    again = diffusers.inverse(diffusers(ours))
    back = sat(again)
    assert sorted(ours) == sorted(again) == sorted(net.state_dict()) and sorted(back) == sorted(original)
    assert all(torch.equal(ours[n], v) and torch.equal(again[n], v) for n, v in net.state_dict().items())
    assert all(torch.equal(back[n], v) for n, v in original.items())
    assert original["mixins.patch_embed.proj.weight"].ndim == (4 if convolution else 2)


def test_fused_projections_and_modulations_are_cut_where_the_original_cuts_them():
    net = tiny("2b")
    sat, diffusers = sat_transformer()(net.state_dict()), diffusers_transformer()(net.state_dict())
    fused = sat["transformer.layers.1.attention.query_key_value.weight"]
    assert torch.equal(fused[32:64], net.blocks[1].attn1.to_k.weight)
    chunks = sat["mixins.adaln_layer.adaLN_modulations.1.1.weight"].chunk(12)
    for sublayer, order in (("norm1", (0, 1, 2, 6, 7, 8)), ("norm2", (3, 4, 5, 9, 10, 11))):
        linear = diffusers[f"transformer_blocks.1.{sublayer}.linear.weight"]
        assert torch.equal(linear, torch.cat([chunks[i] for i in order]))


def test_a_file_with_half_a_projection_or_a_strange_name_is_refused():
    weights = diffusers_transformer()(tiny("2b").state_dict())
    with pytest.raises(KeyMapError, match="norm1.linear.weight, which is not there"):
        diffusers_transformer().inverse(
            {n: v for n, v in weights.items() if n != "transformer_blocks.0.norm1.linear.weight"}
        )
    with pytest.raises(KeyMapError, match="transformer_blocks.0.norm3.weight"):
        diffusers_transformer().inverse(weights | {"transformer_blocks.0.norm3.weight": draw(32)})


def test_the_table_in_files_of_2b_is_what_the_network_computes():
    table = sincos_table(32, (3, 4, 6), 5)[0]
    assert (table[:5] == 0).all()
    # float32 angles against float64 ones rounded
    assert (table[5:] - sincos(coordinates((3, 4, 6), (3, 4 / 1.875, 6 / 1.875)), 32)).abs().max() < 1e-6
    theirs = peer("diffusers.models.embeddings").get_3d_sincos_pos_embed(32, (6, 4), 3, 1.875, output_type="pt")
    assert torch.equal(table[5:], theirs.flatten(0, 1).float())


# --- the peer's numbers --------------------------------------------------------------------------


class Sinusoidal(nn.Module):
    """Ours in diffusers' place, where its float32 angles are too coarse."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, values):
        return sinusoidal(values, self.dim)


def twin(name, dtype):
    """diffusers' network with the same weights."""
    options = TINY[name]
    frames, *_ = options.get("patch_size", (1, 2, 2))
    other = peer("diffusers").CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=options["in_channels"], out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_height=8, sample_width=12, sample_frames=13,
        patch_size=2, patch_size_t=None if frames == 1 else frames, max_text_seq_length=6,
        use_rotary_positional_embeddings=name != "2b", use_learned_positional_embeddings="learned_size" in options,
        ofs_embed_dim=options.get("offset_dim"),
    )  # fmt: skip
    net = tiny(name).to(dtype)
    other.load_state_dict(diffusers_transformer(net.patch)(net.state_dict()))
    other = other.to(dtype).eval()
    other.norm_out.norm.eps = 1e-6  # the original's; diffusers has 1e-5
    return net, other


def their_rotations(name, size):
    """As their pipelines prepare them."""
    frames, height, width = (n // p for n, p in zip(size, TINY[name].get("patch_size", (1, 2, 2)), strict=True))
    embeddings = peer("diffusers.models.embeddings")
    if "trained_size" in TINY[name]:
        pipeline = peer("diffusers.pipelines.cogvideo.pipeline_cogvideox")
        region = pipeline.get_resize_crop_region_for_grid((height, width), 6, 4)
        return embeddings.get_3d_rotary_pos_embed(16, region, (height, width), frames)
    return embeddings.get_3d_rotary_pos_embed(16, None, (height, width), frames, grid_type="slice", max_size=(30, 30))


def their_answer(net, other, name, size, dtype):
    x, c_noise, cond = inputs(net, size, dtype=dtype)
    concat = [cond.get("concat")] if cond.get("concat") is not None else []
    video = torch.cat([x, *concat], 1).transpose(1, 2)
    turns = None if name == "2b" else their_rotations(name, size)
    if turns is not None and dtype is torch.float64:
        grid = [n // p for n, p in zip(size, net.patch, strict=True)]
        turns = [
            part.repeat_interleave(2, dim=-1).double() for part in rotations(net._where(grid, None), 16).unbind(-1)
        ]
    ofs = {"ofs": cond.get("ofs")[:1]} if net.offset_embed is not None else {}
    out = other(video, cond.get("cross_attention"), c_noise, image_rotary_emb=turns, return_dict=False, **ofs)[0]
    return net(x, c_noise, cond), out.transpose(1, 2)


@pytest.mark.parametrize("name", TINY)
def test_it_says_what_diffusers_says(name):
    net, other = twin(name, torch.float32)
    # Another size as well: only where positions are learned there is no other, and theirs forgets them.
    for size in ((4, 8, 12),) if "learned_size" in TINY[name] else ((4, 8, 12), (4, 12, 8), (6, 4, 16)):
        with torch.no_grad():
            ours, theirs = their_answer(net, other, name, size, torch.float32)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_in_float64_it_says_exactly_what_diffusers_says(name, monkeypatch):
    """Once their float32 tables of numbers and positions, each compared elsewhere, are ours."""
    net, other = twin(name, torch.float64)
    other.time_proj = Sinusoidal(32)
    if net.offset_dim is not None:
        other.ofs_proj = Sinusoidal(net.offset_dim)
    if name == "2b":
        table = sincos(coordinates((4, 4, 6), (4, 4 / 1.875, 6 / 1.875)), 32).double()
        other.patch_embed.pos_embedding = torch.cat([table.new_zeros(6, 32), table])[None]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # they rotate in float32
    with torch.no_grad():
        ours, theirs = their_answer(net, other, name, (4, 8, 12), torch.float64)
    assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("sides", [(4, 6), (8, 12), (6, 4), (3, 12), (5, 5), (1, 1)])
def test_pictures_of_other_sizes_are_fitted_as_diffusers_fits_them(sides):
    """Theirs turn the corner tokens by the same angles; and the trained size is unchanged."""
    region = peer("diffusers.pipelines.cogvideo.pipeline_cogvideox").get_resize_crop_region_for_grid(sides, 6, 4)
    where = fitted((3, *sides), (4, 6)).view(3, *sides, 3)
    for axis in (0, 1):
        (start, stop), n = [edge[axis] for edge in region], sides[axis]
        line = where[2].select(1 - axis, 0)[:, 1 + axis]
        assert torch.equal(line, torch.linspace(start, stop * (n - 1) / n, n)) and (where[2, ..., 0] == 2).all()
    assert torch.equal(fitted((3, 4, 6), (4, 6)), coordinates((3, 4, 6)))


# --- text and video ------------------------------------------------------------------------------


def test_text_and_video_have_modulations_of_their_own():
    """What is told to one half moves that half alone, where attention does not carry it over."""
    block = randomised(ExpertBlock(32, 2, 64, emb_dim=8))
    nn.init.zeros_(block.attn1.to_out.weight)
    x, emb = draw(1, 10, 32), draw(1, 1, 8, seed=1)
    before = block(x, emb, 4)
    with torch.no_grad():
        block.modulation.bias[-6 * 32 :] += 1  # the text's
        moved = (block(x, emb, 4) - before).abs().amax((0, 2))
    assert (moved[:4] > 1e-2).all() and (moved[4:] == 0).all()


def test_text_stands_nowhere():
    """Its tokens may come in any order."""
    for name in ("2b", "5b"):
        net = tiny(name)
        x, c_noise, cond = inputs(net)
        text = cond.get("cross_attention")
        with torch.no_grad():
            swapped = net(x, c_noise, Conditioning({"cross_attention": text.flip(1)}))
            assert (swapped - net(x, c_noise, cond)).abs().max() < 1e-5
            moved = net(x.flip(2), c_noise, cond).flip(2)
        assert (moved - swapped).abs().max() > 1e-3  # the video's may not


def test_masked_text_does_not_count():
    net = tiny("5b")
    x, c_noise, cond = inputs(net)
    text, mask = cond.get("cross_attention"), torch.arange(6).expand(2, 6) < 4
    other = torch.where(mask[..., None], text, 9.0)
    with torch.no_grad():
        masked = [
            net(x, c_noise, Conditioning({"cross_attention": t}, {"cross_attention": mask})) for t in (text, other)
        ]
        assert torch.equal(*masked)
        short = net(x, c_noise, Conditioning({"cross_attention": text[:, :4]}))
    assert (masked[0] - short).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["2b", "1.5_5b_i2v"])
def test_frames_that_share_a_level_are_a_row_of_that_level(name):
    net = tiny(name)
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        same = net(x, c_noise[:, None].expand(2, 4), cond)
        assert (same - net(x, c_noise, cond)).abs().max() < 1e-5
        levels = c_noise[:, None] + torch.tensor([0.0, 0.0, 0.0, 300.0])
        change = (net(x, levels, cond) - same).abs().amax((1, 3, 4))
    assert (change[:, -1] > 2 * change[:, 0]).all()  # what the others hear of it comes by attention


def test_an_offset_is_two_unless_said():
    net = tiny("1.5_5b_i2v")
    x, c_noise, cond = inputs(net)
    rest = {name: value for name, value in cond.tensors.items() if name != "ofs"}
    with torch.no_grad():
        answer = net(x, c_noise, cond)
        assert torch.equal(net(x, c_noise, Conditioning(rest)), answer)
        assert (net(x, c_noise, Conditioning(rest | {"ofs": torch.tensor([2.0, 9.0])})) - answer)[1].abs().max() > 1e-3


def test_learned_positions_serve_fewer_frames_and_no_other_size():
    net = tiny("5b_i2v")
    x, c_noise, cond = inputs(net, (2, 8, 12))
    assert net(x, c_noise, cond).shape == x.shape
    for size in ((5, 8, 12), (4, 12, 8)):
        with pytest.raises(ValueError, match="learned for up to 4 frames of 8 x 12 latents and 6 tokens"):
            net(*inputs(net, size))


def test_a_new_network_says_zero_and_its_blocks_change_nothing():
    net = CogVideoX(**TINY["5b"])
    x, c_noise, cond = inputs(net)
    assert (net(x, c_noise, cond) == 0).all()
    tokens = draw(2, 10, 32)
    assert torch.equal(net.blocks[0](tokens, draw(2, 1, 8), 4), tokens)


# --- backends, compilation, precision, mixins ----------------------------------------------------


@pytest.mark.slow  # of each network one is traced in test_every_network.py, with its backward pass
@pytest.mark.parametrize("name", TINY)
def test_one_graph_under_compile(name):
    net, counter = tiny(name), CompileCounter()
    x, c_noise, cond = inputs(net)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x, c_noise, cond), net(x, c_noise, cond))
    compiled(x + 1, c_noise + 1, cond)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mixin", [LoRA, JointAttention])
def test_mixins_attach_where_positions_turn_change_and_come_off_bit_for_bit(mixin):
    net = tiny("5b")
    x, c_noise, cond = inputs(net)
    cond = cond.with_(partners=torch.tensor([1, 0]))
    keys = list(net.state_dict())

    def answer():
        with torch.no_grad(), routed(net, cond):
            return net(x, c_noise, cond)

    before = answer()
    attached = mixin().attach(net)
    assert torch.equal(answer(), before)  # what is new begins at zero
    for parameter in attached.parameters():
        nn.init.normal_(parameter)
    assert (answer() - before).abs().max() > 1e-2
    attached.detach()
    assert torch.equal(answer(), before) and list(net.state_dict()) == keys


def test_a_lora_of_the_original_has_as_many_tensors():
    """Two for each of q, k and v: 30 layers, 180; with the output projection 240, as its exporter expects of 2b."""
    with torch.device("meta"):
        net = CogVideoX(**PUBLISHED["2b"])
    assert len(list(LoRA(rank=4).attach(net).parameters())) == 180
    net = CogVideoX(**SMALL | dict(depth=3))
    assert len(list(LoRA(on=["*.to_[qkv]", "*.to_out"]).attach(net).parameters())) == 3 * 8


def test_parts_are_found_by_role():
    roles = {n: m.role for n, m in tiny("5b").blocks[1].named_modules() if hasattr(m, "role")}
    assert roles == {"": "transformer_block", "attn1": "self_attention", "ff": "feed_forward"}


# --- building and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_it_is_built_from_a_config_and_uses_all_its_weights(name):
    net = randomised(build({"type": "cogvideox"} | TINY[name], "network"))
    assert isinstance(net, CogVideoX)
    net(*inputs(net)).square().mean().backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "num_heads=3 does not divide the width 32"),
        (dict(patch_size=(2, 2)), r"patch_size is \(frames, height, width\)"),
        (dict(width=40), "multiple of 16; got 40"),
        (dict(num_heads=4, positions="rotary"), "multiple of 16; got 8. That is width / num_heads"),
        (dict(trained_size=(8, 9)), "trained_size must be multiples of the patch"),
        (dict(learned_size=(8, 8)), "learned_size must be multiples of the patch"),
        (dict(trained_size=(8, 8), spacing=2.0), "leave out spacing"),
    ],
)
def test_what_cannot_be_built_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        CogVideoX(**SMALL | change)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(cond=None), "'cross_attention' is missing, and this network was built with text_dim"),
        (dict(cond=Conditioning({"cross_attention": draw(2, 6, 9)})), r"'cross_attention' is \(B, n, 12\)"),
        (dict(cond=Conditioning({"ofs": draw(2)})), "for which it must be built with offset_dim"),
        (dict(cond=Conditioning({"concat": draw(2, 4, 8, 12)})), r"'concat' is \(2, 4, 8, 12\) and lies behind x"),
        (dict(x=draw(2, 3, 4, 8, 12)), r"expected x to be \(B, 4, F, H, W\), got \(2, 3, 4, 8, 12\)"),
        (dict(x=draw(2, 4, 4, 7, 12)), r"multiples of the patch \(1, 2, 2\).* the nearest is \(4, 8, 12\)"),
        (dict(c_noise=draw(2, 3)), r"\(2,\), or per frame \(2, 4\); got the shape \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    net = tiny("2b")
    x, c_noise, cond = inputs(net)
    with pytest.raises(ValueError, match=message):
        net(**dict(x=x, c_noise=c_noise, cond=cond) | given)
