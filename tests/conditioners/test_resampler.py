"""Pictures as a few tokens: VideoCrafter's and DynamiCrafter's image_proj_model."""

import pytest
import torch
from peers import peer
from torch import nn

from vdiff.checkpoints import save_weights
from vdiff.conditioners import Embedder, EmbedderConditioner, ImageTokensEmbedder
from vdiff.networks import Resampler
from vdiff.registry import build

SMALL = dict(in_dim=6, out_dim=5, num_queries=4, dim=8, depth=2, num_heads=2, head_dim=4, mult=2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class PatchEmbedder(Embedder, abstract=True):
    """A tower of one layer, in place of CLIP's."""

    def __init__(self):
        super().__init__("image", "anything", drop=0.9)
        self.project = nn.Linear(4, 6)

    def forward(self, value):
        return self.project(nn.functional.unfold(value, 2, stride=2).transpose(1, 2))


@pytest.mark.parametrize("num_queries, parameters", [(16, 48_541_696), (256, 48_787_456)])
def test_it_has_the_parameters_of_the_published_ones(num_queries, parameters):
    """VideoCrafter 1's, and DynamiCrafter's for 16 frames."""
    with torch.device("meta"):
        net = Resampler(num_queries=num_queries)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert {
        "latents": (1, num_queries, 1024),
        "layers.3.0.to_kv.weight": (1536, 1024),
        "layers.0.1.3.weight": (1024, 4096),
        "norm_out.bias": (1024,),
    }.items() <= shapes.items()


def test_latents_attend_to_the_picture_and_to_themselves_as_plain_loops_do():
    torch.manual_seed(0)
    net = Resampler(**SMALL).double().eval()
    x = draw(2, 7, 6)
    with torch.no_grad():
        out = []
        for row in net.proj_in(x):
            latents = net.latents[0]
            for attention, feed_forward in net.layers:
                seen, own = attention.norm1(row), attention.norm2(latents)
                q = attention.to_q(own)
                k, v = attention.to_kv(torch.cat([seen, own])).chunk(2, -1)
                heads = []
                for head in range(2):
                    part = slice(4 * head, 4 * head + 4)
                    heads.append(torch.softmax(q[:, part] @ k[:, part].T / 2, -1) @ v[:, part])
                latents = latents + attention.to_out(torch.cat(heads, -1))
                latents = latents + feed_forward(latents)
            out.append(net.norm_out(net.proj_out(latents)))
        assert (net(x) - torch.stack(out)).abs().max() < 1e-10


@pytest.mark.parametrize("frames, shape", [(None, (3, 4, 5)), (2, (3, 2, 2, 5))])
def test_pictures_become_tokens_and_the_null_is_those_of_an_empty_picture(frames, shape):
    made = ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), frames=frames)
    image = draw(3, 1, 4, 4).float()
    cond = EmbedderConditioner([made]).eval()({"image": image})
    assert cond["image_tokens"].shape == shape
    assert torch.allclose(cond.null["image_tokens"], made(torch.zeros_like(image)))
    zero = ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), null="zero", frames=frames)
    assert (EmbedderConditioner([zero]).eval()({"image": image}).null["image_tokens"] == 0).all()
    whole = ImageTokensEmbedder(made.tower, made.resampler)
    assert torch.equal(cond["image_tokens"].reshape(3, 4, 5), whole(image))  # frame after frame


def test_training_drops_pictures_by_its_own_share_and_not_the_towers():
    made = ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), drop=0.5)
    image = draw(1, 1, 4, 4).float().expand(200, -1, -1, -1)
    cond = EmbedderConditioner([made]).train()({"image": image, "noise_key": torch.arange(200), "step": 0})
    dropped = (cond["image_tokens"] - cond.null["image_tokens"]).abs().amax((1, 2)) < 1e-6
    assert 0.35 < dropped.float().mean() < 0.65  # 4 standard deviations


def test_weights_come_from_a_published_layout(tmp_path):
    given = Resampler(**SMALL)
    file = tmp_path / "model.safetensors"
    save_weights(file, {f"image_proj_model.{n}": v for n, v in given.state_dict().items()} | {"other": torch.ones(1)})
    made = ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), weights=file, trainable=False)
    assert all(torch.equal(v, made.resampler.state_dict()[n]) for n, v in given.state_dict().items())
    assert not any(p.requires_grad for p in made.resampler.parameters())


def test_it_stands_behind_open_clips_image_tower():
    peer("open_clip")
    arch = {"embed_dim": 6, "width": 6, "head_width": 3, "layers": 1, "patch_size": 4, "image_size": 8}
    config = {
        "type": "image_tokens", "frames": 2,
        "tower": {"type": "open_clip_image", "output": "hidden", "arch": arch},
        "resampler": {k: v for k, v in SMALL.items() if k != "in_dim"} | {"in_dim": 6},
    }  # fmt: skip
    made = build(config, kind="embedder")
    with pytest.warns(UserWarning, match="random weights"):
        assert made(torch.zeros(2, 3, 16, 16)).shape == (2, 2, 2, 5)
    assert "resampler.layers.1.0.to_kv.weight" in made.state_dict()


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="4 queries do not divide among 3 frames"):
        ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), frames=3)
    with pytest.warns(UserWarning, match="random weights and is frozen"):
        made = ImageTokensEmbedder(PatchEmbedder(), Resampler(**SMALL), trainable=False)
    made.tower.forward = lambda value: value.flatten(1)
    with pytest.raises(ValueError, match=r"PatchEmbedder gives \(1, 16\), and tokens"):
        made(draw(1, 1, 4, 4).float())
