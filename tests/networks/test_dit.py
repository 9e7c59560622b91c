"""The DiT: patches and positions against their formulas, the same numbers as peers, its options and its errors."""

import math

import pytest
import torch
from peers import peer
from torch import nn
from torch._dynamo.testing import CompileCounter

from vdiff.hooks import routed
from vdiff.mixins import JointAttention, LoRA
from vdiff.networks import DiT, ModulatedBlock, patchify, unpatchify
from vdiff.networks.positions import coordinates, rotate, rotations, shares, sincos
from vdiff.process import Conditioning
from vdiff.registry import ConfigError, build

SMALL = dict(in_channels=3, out_channels=3, width=32, depth=2, num_heads=2)
TEXT = SMALL | dict(context_dim=12)
JOINED = TEXT | dict(context_by="concatenation")
VIDEO = SMALL | dict(patch_size=(1, 2, 2))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=1):
    """Every weight drawn: what begins at zero would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net.eval()


def inputs(net, size=None, rows=2):
    """x, c_noise and every condition that the network takes, but ``concat``."""
    size = size or ((8, 8) if net.num_axes == 2 else (4, 8, 8))
    given = {
        "cross_attention": lambda: draw(rows, 7, net.context_dim, seed=2),
        "vector": lambda: draw(rows, net.vector_dim, seed=3),
        "label": lambda: torch.arange(rows),
        "concat": None,
    }
    cond = Conditioning({name: given[name]() for name in net.accepts if given[name]})
    return draw(rows, net.in_channels, *size), torch.tensor([3.0, 741.0])[:rows], cond


# --- patches and positions -----------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3), (4, 1, 6)])
def test_patches_are_a_permutation_and_come_back(patch):
    x = torch.arange(2 * 3 * 4 * 6 * 12.0).reshape(2, 3, 4, 6, 12)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 4 * 6 * 12 // math.prod(patch), 3 * math.prod(patch))
    assert torch.equal(unpatchify(tokens, patch, tuple(n // p for n, p in zip((4, 6, 12), patch, strict=True))), x)
    f, h, w = patch
    assert torch.equal(tokens[1, 0], x[1, :, :f, :h, :w].flatten())
    assert torch.equal(tokens[1, 12 // w], x[1, :, :f, h : 2 * h, :w].flatten())  # the next row follows the last column


def test_a_linear_layer_on_patches_is_a_convolution_with_their_stride():
    net = randomised(DiT(**SMALL))
    x = draw(2, 3, 8, 12)
    conv = nn.functional.conv2d(x, net.patch_embed.weight.view(32, 3, 2, 2), net.patch_embed.bias, stride=2)
    tokens = net.patch_embed(patchify(x[:, :, None], net.patch))
    assert (tokens - conv.flatten(2).transpose(1, 2)).abs().max() < 1e-5


def test_sines_and_cosines_are_those_of_the_papers():
    def table(positions, dim):
        rates = [10000 ** (-2 * i / dim) for i in range(dim // 2)]
        return torch.tensor([[f(p * rate) for f in (math.sin, math.cos) for rate in rates] for p in positions])

    image = sincos(coordinates((3, 40)), 16)
    rows, columns = [r for r in range(3) for _ in range(40)], list(range(40)) * 3
    # float32 angles up to 40: rounding of 40 * 2 ** -24
    assert (image - torch.cat([table(columns, 8), table(rows, 8)], 1)).abs().max() < 5e-6
    video = sincos(coordinates((2, 3, 4)), 32)
    frames, rows, columns = zip(*[(t, r, c) for t in range(2) for r in range(3) for c in range(4)], strict=True)
    expected = torch.cat([table(frames, 8), table(columns, 12), table(rows, 12)], 1)
    assert (video - expected).abs().max() < 1e-6


def test_the_same_image_positions_as_diffusers():
    embeddings = peer("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(32, (5, 7), base_size=5, output_type="pt")  # stretched, as PixArt
    assert (sincos(coordinates((5, 7), trained_sizes=(5, 5)), 32) - theirs).abs().max() < 1e-5


def test_the_same_video_positions_as_diffusers():
    embeddings = peer("diffusers.models.embeddings")
    where, q = coordinates((3, 4, 5)), draw(2, 60, 3, 32)
    theirs = embeddings.get_3d_sincos_pos_embed(32, (5, 4), 3, output_type="pt").flatten(0, 1)
    assert (sincos(where, 32) - theirs).abs().max() < 1e-5
    angles = embeddings.get_3d_rotary_pos_embed(32, ((0, 0), (4, 5)), (4, 5), 3)
    expected = embeddings.apply_rotary_emb(q.transpose(1, 2), angles).transpose(1, 2)
    assert (rotate(q, rotations(where, 32)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("axes", [2, 3])
def test_rotated_products_depend_on_the_difference_of_positions(axes):
    q, k = draw(1, 1, 1, 32), draw(1, 1, 1, 32, seed=1)

    def product(p, r):
        p, r = (torch.tensor([x], dtype=torch.float32) for x in (p, r))
        return (rotate(q, rotations(p, 32)) * rotate(k, rotations(r, 32))).sum()

    here, there, shift = [4.0, 9.0, 2.0][:axes], [1.0, 3.0, 7.0][:axes], [11.0, 5.0, 8.0][:axes]
    moved = [[a + s for a, s in zip(place, shift, strict=True)] for place in (here, there)]
    assert (product(here, there) - product(*moved)).abs() < 1e-4
    assert (product(here, there) - product(there, here)).abs() > 1e-2
    assert torch.equal(rotate(q, rotations(torch.zeros(1, axes), 32)), q)
    assert (rotate(q, rotations(torch.tensor([here]), 32)).norm() - q.norm()).abs() < 1e-5


def test_a_stretched_grid_covers_what_was_trained():
    small, large = coordinates((4, 4)), coordinates((8, 16), trained_sizes=(4, 4))
    assert torch.equal(large.view(8, 16, 2)[::2, ::4].flatten(0, 1), small)
    assert large.max() < 4 and coordinates((8, 16)).max() == 15


def test_shares_are_even_and_use_every_channel():
    assert shares(64, 2) == (32, 32) and shares(64, 3) == (16, 24, 24) and shares(16, 3) == (4, 6, 6)


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, depth, heads, published, millions",
    [
        (384, 12, 6, 32_963_360, 33),
        (768, 12, 12, 130_512_416, 130),
        (1024, 24, 16, 458_102_816, 458),
        (1152, 28, 16, 675_129_632, 675),
    ],
)
def test_as_many_parameters_as_published(width, depth, heads, published, millions):
    """Table 1 of arXiv:2212.09748; theirs count the position table of 256 tokens, 4 channels in and 8 out."""
    with torch.device("meta"):
        net = DiT(4, 8, width, depth, heads, num_classes=1001)
    counted = sum(p.numel() for p in net.parameters()) + 256 * width
    assert counted == published and abs(counted / 1e6 - millions) < 0.6  # they round up and down
    block = 18 * width**2 + 15 * width  # attention 4, feed-forward 8 and modulation 6 squares
    assert sum(p.numel() for p in net.blocks[0].parameters()) == block


# --- parity with peers ---------------------------------------------------------------------------

BLOCK = {
    "modulation": "norm1.linear", "attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0",
    "ff.up": "ff.net.0.proj", "ff.down": "ff.net.2",
}  # fmt: skip


def block_to_diffusers(state):
    out = {}
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        out[f"{BLOCK.get(module, module)}.{leaf}"] = value
    return out


def to_diffusers(net):
    """Our state dict in their names; they keep an embedding of noise and label per block."""
    ours, out = net.state_dict(), {}
    h, w = net.patch[1:]
    out["pos_embed.proj.weight"] = ours["patch_embed.weight"].unflatten(1, (-1, h, w))
    out["pos_embed.proj.bias"] = ours["patch_embed.bias"]
    for leaf in ("weight", "bias"):
        out[f"proj_out_1.{leaf}"] = ours[f"out.modulation.{leaf}"]
        proj = ours[f"out.proj.{leaf}"]  # ours by channel, row, column; theirs by row, column, channel
        out[f"proj_out_2.{leaf}"] = proj.unflatten(0, (-1, h, w)).movedim(0, 2).flatten(0, 2)
    for i, block in enumerate(net.blocks):
        prefix = f"transformer_blocks.{i}"
        out |= {f"{prefix}.{name}": value for name, value in block_to_diffusers(block.state_dict()).items()}
        for leaf in ("weight", "bias"):
            for ours_layer, theirs in ((0, 1), (2, 2)):
                key = f"{prefix}.norm1.emb.timestep_embedder.linear_{theirs}.{leaf}"
                out[key] = ours[f"noise_embed.{ours_layer}.{leaf}"]
        out[f"{prefix}.norm1.emb.class_embedder.embedding_table.weight"] = ours["label_embed.weight"]
    return out


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_same_numbers_as_the_dit_of_diffusers(patch):
    diffusers = peer("diffusers")
    net = randomised(DiT(3, 6, 32, 3, 4, patch, num_classes=11))
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=3, sample_size=8,
        patch_size=patch, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    missing = theirs.load_state_dict(to_diffusers(net), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"pos_embed.pos_embed"}
    for block in theirs.transformer_blocks:  # the paper's frequencies; diffusers' are off by one step
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, c_noise, label = draw(2, 3, 8, 8), torch.tensor([3.0, 741.0]), torch.tensor([4, 10])
    with torch.no_grad():
        ours = net(x, c_noise, Conditioning({"label": label}))
        expected = theirs(x, c_noise, label).sample
    assert expected.std() > 0.1
    assert (difference := (ours - expected).abs().max()) < 1e-5 * expected.abs().max(), difference


@pytest.mark.parametrize("context_dim", [None, 12])
def test_same_numbers_as_a_block_of_diffusers(context_dim):
    attention = peer("diffusers.models.attention")
    block = randomised(ModulatedBlock(32, 4, 128, context_dim))
    if block.norm2 is not None:  # theirs have weights in all normalisations or in none
        nn.init.ones_(block.norm2.weight)
        nn.init.zeros_(block.norm2.bias)
    theirs = attention.BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=context_dim, norm_type="ada_norm_zero", num_embeds_ada_norm=1,
        norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    theirs.norm1.norm = nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)
    state = {k: v for k, v in block_to_diffusers(block.state_dict()).items() if not k.startswith("norm2.")}
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(key.startswith("norm1.emb.") for key in missing.missing_keys)
    x, context = draw(2, 6, 32), None if context_dim is None else draw(2, 5, context_dim, seed=2)
    mask = None if context is None else torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        emb = theirs.norm1.emb(torch.tensor([3.0, 741.0]), torch.tensor([0, 0]))
        ours = block(x, nn.functional.silu(emb)[:, None], context, mask)
        expected = theirs(
            x, encoder_hidden_states=context, encoder_attention_mask=None if mask is None else mask[:, None],
            timestep=torch.tensor([3.0, 741.0]), class_labels=torch.tensor([0, 0]),
        )  # fmt: skip
    assert (difference := (ours - expected).abs().max()) < 1e-5, difference


# --- what a transformer of patches cannot tell apart ------------------------------------------------


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("options", [{}, {"context_dim": 12}, {"context_dim": 12, "context_by": "concatenation"}])
def test_an_image_is_a_video_of_one_frame(options, positions):
    net = randomised(DiT(**VIDEO | options, positions=positions))
    x, c_noise, cond = inputs(net, (8, 12))
    with torch.no_grad():
        assert torch.equal(net(x, c_noise, cond), net(x[:, :, None], c_noise, cond)[:, :, 0])


@pytest.mark.parametrize("config", [VIDEO, VIDEO | dict(patch_size=(2, 2, 2)), VIDEO | dict(positions="rotary")])
@pytest.mark.parametrize("options", [{}, {"context_dim": 12, "context_by": "concatenation", "vector_dim": 5}])
def test_frames_that_share_a_level_are_a_row_of_that_level(config, options):
    net = randomised(DiT(**config | options))
    x, c_noise, cond = inputs(net)
    with torch.no_grad():
        same = net(x, c_noise[:, None].expand(2, 4), cond)
        assert (same - net(x, c_noise, cond)).abs().max() < 1e-5


def test_a_level_of_one_frame_is_told_to_that_frame():
    """Without attention a token knows its own frame's level and no other."""
    net = randomised(DiT(**VIDEO))
    for block in net.blocks:
        nn.init.zeros_(block.attn1.to_out.weight)
    x, levels = draw(2, 3, 4, 8, 8), torch.arange(8.0).reshape(2, 4) * 50
    other = levels.clone()
    other[1, 2] += 300
    with torch.no_grad():
        change = (net(x, levels) - net(x, other)).abs().amax((1, 3, 4))
    assert change[1, 2] > 1e-2
    change[1, 2] = 0
    assert change.max() == 0


@pytest.mark.parametrize("config", [TEXT, JOINED, VIDEO | dict(vector_dim=5)])
def test_rows_do_not_know_of_each_other(config):
    net = randomised(DiT(**config))
    x, c_noise, cond = inputs(net)
    turned = Conditioning({name: value.flip(0) for name, value in cond.tensors.items()})
    with torch.no_grad():
        assert (net(x.flip(0), c_noise.flip(0), turned).flip(0) - net(x, c_noise, cond)).abs().max() < 1e-5


def test_without_positions_the_order_of_patches_would_not_matter():
    """Exchanging two patches exchanges their answers only where positions are told."""
    x = draw(1, 3, 4, 4)
    halves = x.roll(2, dims=3)
    for positions in ("sincos", "rotary"):
        net = randomised(DiT(**SMALL, positions=positions))
        with torch.no_grad():
            assert (net(halves, torch.ones(1)) - net(x, torch.ones(1)).roll(2, dims=3)).abs().max() > 1e-2
            net.trained_grid = [0, 0]  # every position is the origin
            assert (net(halves, torch.ones(1)) - net(x, torch.ones(1)).roll(2, dims=3)).abs().max() < 1e-5


def test_the_trained_size_is_unchanged_and_others_are_stretched_to_it():
    free, bound = (randomised(DiT(**SMALL, trained_size=size)) for size in (None, (8, 8)))
    x, wide = draw(2, 3, 8, 8), draw(2, 3, 8, 20)
    with torch.no_grad():
        assert torch.equal(free(x, torch.ones(2)), bound(x, torch.ones(2)))
        assert bound(wide, torch.ones(2)).shape == wide.shape
        assert (free(wide, torch.ones(2)) - bound(wide, torch.ones(2))).abs().max() > 1e-3


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | dict(patch_size=1, mlp_ratio=2.0),
        SMALL | dict(patch_size=(2, 4), positions="rotary", trained_size=(8, 8)),
        SMALL | dict(num_classes=10, vector_dim=5, qk_norm=True),
        TEXT,
        TEXT | dict(qk_norm=True, checkpointing=True, attention_backend="math"),
        JOINED | dict(positions="rotary"),
        VIDEO,
        VIDEO | dict(patch_size=(2, 2, 2), positions="rotary", trained_size=(4, 8, 8)),
        VIDEO | dict(context_dim=12, num_classes=3, checkpointing=True),
    ],
)
def test_every_option_builds_from_a_config_and_uses_all_its_weights(config):
    net = randomised(build({"type": "dit", **config}, kind="network")).train()
    x, c_noise, cond = inputs(net)
    out = net(x, c_noise, cond)
    assert out.shape == x.shape
    out.square().mean().backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert unused == []


def test_the_bias_of_keys_is_the_only_weight_that_changes_nothing():
    net = randomised(DiT(**SMALL))
    x, c_noise, _ = inputs(net)
    with torch.no_grad():
        before = net(x, c_noise)
        net.blocks[0].attn1.to_k.bias.add_(1.0)
        assert (net(x, c_noise) - before).abs().max() < 1e-5


def test_a_new_network_says_zero_and_its_blocks_change_nothing():
    net = DiT(**VIDEO | dict(context_dim=12))
    assert (net(*inputs(net)) == 0).all()
    tokens = draw(2, 6, 32)
    assert torch.equal(net.blocks[0](tokens, draw(2, 1, 32), draw(2, 7, 12)), tokens)


@pytest.mark.parametrize("context_by", ["cross_attention", "concatenation"])
def test_every_condition_changes_the_output_of_its_own_row_only(context_by):
    net = randomised(DiT(**TEXT | dict(context_by=context_by, num_classes=4, vector_dim=5, in_channels=5)))
    tensors = {
        "cross_attention": draw(2, 7, 12, seed=2), "vector": draw(2, 5, seed=3), "concat": draw(2, 2, 8, 8, seed=4),
        "label": torch.tensor([1, 2]),
    }  # fmt: skip
    x, c_noise = draw(2, 3, 8, 8), torch.tensor([3.0, 741.0])
    with torch.no_grad():
        before = net(x, c_noise, Conditioning(tensors))
        for name, value in tensors.items():
            changed = torch.stack([value[0], value[1] + 1])
            after = net(x, c_noise, Conditioning(tensors | {name: changed}))
            assert (after[0] - before[0]).abs().max() < 1e-6 < 1e-3 < (after[1] - before[1]).abs().max()


@pytest.mark.parametrize("config", [TEXT, JOINED, JOINED | dict(positions="rotary")])
def test_masked_tokens_do_not_count(config):
    net = randomised(DiT(**config))
    x, c_noise, cond = inputs(net)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    other = cond["cross_attention"].masked_fill(~mask[..., None], 100.0)
    with torch.no_grad():
        masked = net(x, c_noise, cond.with_(masks={"cross_attention": mask}))
        elsewhere = net(x, c_noise, Conditioning({"cross_attention": other}, {"cross_attention": mask}))
        short = net(x[1:], c_noise[1:], Conditioning({"cross_attention": cond["cross_attention"][1:, :4]}))
    assert torch.equal(masked, elsewhere)
    assert (masked[1:] - short).abs().max() < 1e-5


@pytest.mark.parametrize("config", [SMALL | dict(num_classes=5), TEXT | dict(positions="rotary"), VIDEO])
def test_checkpointing_changes_no_gradient(config):
    plain, lean = (randomised(DiT(**config, checkpointing=flag)) for flag in (False, True))
    kept = []
    for net in (plain, lean):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = net(*inputs(net)).square().mean()
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), lean.parameters(), strict=True))


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("config", [VIDEO | dict(context_dim=12, context_by="concatenation", positions="rotary")])
def test_one_graph_under_compile(config, per_frame):
    net, counter = randomised(DiT(**config)), CompileCounter()
    x, c_noise, cond = inputs(net)
    c_noise = c_noise[:, None].expand(2, 4) + torch.arange(4) if per_frame else c_noise
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x, c_noise, cond), net(x, c_noise, cond))
    compiled(x + 1, c_noise + 1, cond)
    assert counter.frame_count == 1


# --- mixins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixin", [LoRA, JointAttention])
def test_mixins_attach_where_positions_turn_change_and_come_off_bit_for_bit(mixin):
    net = randomised(DiT(**TEXT, positions="rotary"))
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


def test_rows_that_are_equal_tell_each_other_what_they_tell_themselves():
    """A partner with the same tokens at the same places is oneself: the projection doubles the attention."""
    net = randomised(DiT(**SMALL | dict(depth=1), positions="rotary"))
    x, c_noise = draw(1, 3, 8, 8).expand(2, -1, -1, -1), torch.full((2,), 3.0)
    joint = JointAttention().attach(net)
    attention = net.blocks[0].attn1
    for weight in joint.parameters():
        nn.init.eye_(weight)
    with torch.no_grad():
        with routed(net, Conditioning(partners=torch.tensor([1, 0]))):
            joined = net(x, c_noise)
        joint.detach()
        for parameter in attention.to_out.parameters():
            parameter.mul_(2)
        assert (net(x, c_noise) - joined).abs().max() < 1e-5


def test_attention_is_found_by_role():
    def roles(net):
        return {n: m.role for n, m in net.blocks[1].named_modules() if hasattr(m, "role")}

    plain = {"": "transformer_block", "attn1": "self_attention", "ff": "feed_forward"}
    assert roles(DiT(**SMALL)) == roles(DiT(**JOINED)) == plain
    assert roles(DiT(**TEXT)) == plain | {"attn2": "cross_attention"}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "num_heads=3 does not divide the width 32"),
        (dict(patch_size=(1, 2, 2, 2)), r"\(frames, height, width\), got \(1, 2, 2, 2\)"),
        (dict(patch_size=0), r"got \(0, 0\)"),
        (dict(width=34), "sincos positions along 2 axes .* multiple of 4; got 34. That is width; change it"),
        (dict(width=36, num_heads=6, positions="rotary"), "rotary .* multiple of 4; got 6. That is width / num_heads"),
        (dict(width=40, patch_size=(1, 2, 2)), "along 3 axes .* multiple of 16; got 40"),
        (dict(trained_size=(8, 7)), r"multiple of the patch \(2, 2\) along each axis, got \(8, 7\)"),
        (dict(trained_size=(4, 8, 8)), r"got \(4, 8, 8\)"),
    ],
)
def test_what_cannot_be_built_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | change)


def test_unknown_keywords_are_errors():
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        build({"type": "dit", **SMALL, "widht": 32}, kind="network")


@pytest.mark.parametrize(
    "config, cond, message",
    [
        (SMALL, {"vector": draw(2, 5)}, "'vector', for which it must be built with vector_dim"),
        (SMALL, {"fps": draw(2)}, "takes no condition 'fps'. This one takes: concat"),
        (SMALL, {"concat": draw(2, 1, 8, 8)}, r"'concat' \(1 channels\) to be \(B, 3, H, W\), got \(2, 4, 8, 8\)"),
        (SMALL, {"concat": draw(2, 1, 8, 6)}, r"'concat' is \(2, 1, 8, 6\) and lies behind x, \(2, 3, 8, 8\)"),
        (SMALL, {"concat": draw(2, 1, 1, 8, 8)}, r"'concat' is \(2, 1, 1, 8, 8\) and lies behind x"),
        (SMALL, {"concat": draw(1, 1, 8, 8)}, r"'concat' is \(1, 1, 8, 8\) and lies behind x"),
        (TEXT, {}, "'cross_attention' is missing, .* built with context_dim. It got: none"),
        (SMALL | dict(num_classes=3), None, "'label' is missing"),
        (SMALL | dict(vector_dim=5), {"vector": draw(2, 6)}, r"vector_dim is 5, .* are \(6,\) wide"),
    ],
)
def test_conditions_that_do_not_fit_are_errors(config, cond, message):
    net = DiT(**config)
    with pytest.raises(ValueError, match=message):
        net(draw(2, 3, 8, 8), torch.zeros(2), None if cond is None else Conditioning(cond))


def test_sizes_that_do_not_fit_are_errors():
    image, video = DiT(**SMALL), DiT(**VIDEO | dict(patch_size=(2, 2, 2)))
    with pytest.raises(ValueError, match=r"multiples of the patch \(1, 2, 2\), got \(1, 8, 7\); .* \(1, 8, 8\)"):
        image(draw(2, 3, 8, 7), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got \(5, 8, 8\); the nearest is \(4, 8, 8\)"):
        video(draw(2, 3, 5, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(2, 4, 8, 8\)"):
        image(draw(2, 4, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="For videos give patch_size three numbers"):
        image(draw(2, 3, 4, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match=r"one number per row, \(2,\); got the shape \(\)"):
        image(draw(2, 3, 8, 8), torch.zeros(()))
    with pytest.raises(ValueError, match=r"or per frame \(2, 4\); got the shape \(2, 3\)"):
        video(draw(2, 3, 4, 8, 8), torch.zeros(2, 3))
