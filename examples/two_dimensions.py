"""A diffusion model in the plane, where the right answers are known.

Data are a ring of eight Gaussians. For a mixture the ideal denoiser has a closed form, and with it the flow from noise
to data; so everything learned here can be held against the truth: the denoiser against the ideal one, point by point,
and the samples against where the ideal flow takes the same noise. Then a mixin of ten lines is put on the network,
trained to turn the ring, and taken off again.

    python examples/two_dimensions.py [--steps 2000] [--out ring.png]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

from vdiff.data import Dataset, Loader
from vdiff.denoisers import EDMDenoiser, GaussianMixtureDenoiser
from vdiff.engine import DiffusionEngine
from vdiff.hooks import Part
from vdiff.losses import MSELoss
from vdiff.mixins import Mixin
from vdiff.networks import Network
from vdiff.process import EDMSchedule, LogNormalSigmaSampler
from vdiff.samplers import HeunSampler

ANGLES = torch.arange(8) * math.pi / 4
IDEAL = GaussianMixtureDenoiser(torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.full((8, 2), 0.08))


class Ring(Dataset):
    """Points of the mixture, turned about the origin; registered as dataset/ring by being defined."""

    ranges = {"point": (-2.0, 2.0)}

    def __init__(self, num: int = 20_000, turn: float = 0.0):
        turned = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        self.points = (IDEAL.draw(num).float() @ turned).clamp(-2, 2)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return {"point": self.points[index]}


class Plane(Network):
    """``(B, 2)`` to ``(B, 2)``."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.frequencies = nn.Buffer(torch.linspace(0.5, 6, 12))
        self.layers = nn.Sequential(
            nn.Linear(2 + 3 * 24, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, c_noise, cond=None):
        self.accepted(cond)
        waves = (torch.cat([x, c_noise[:, None]], 1)[..., None] * self.frequencies).flatten(1)
        return self.layers(torch.cat([x, waves.cos(), waves.sin()], 1))


class Turn(Mixin):
    """Turns the points that a network is shown back, and what it says of them forth, by a learned angle."""

    def __init__(self, on: str = "type:Plane", name: str | None = None, scale: float = 1.0):
        super().__init__(on, name, scale)

    def part(self, module, site):
        return TurnPart()


class TurnPart(Part):
    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.zeros(()))

    def turned(self, x, sign):
        angle = sign * self.scale * self.angle
        return torch.stack(
            [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos()], 1
        )

    def before(self, module, args, kwargs):
        return (self.turned(args[0], -1), *args[1:]), kwargs

    def after(self, module, args, kwargs, output):
        return self.turned(output, 1)


def train(engine, dataset, num_steps, lr=2e-3):
    loader = Loader(dataset, batch_size=256, seed=0)
    optimizer = torch.optim.Adam([p for p in engine.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    engine.train()
    for step in range(num_steps):
        loss = engine.training_step(loader.batch(step)).per_row.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    engine.eval()


@torch.no_grad()
def off_the_ideal(engine, sigma):
    """Root mean square distance between the learned denoiser and the ideal one, of points noised to ``sigma``."""
    level = engine.schedule.at_ratio(torch.full((4000,), sigma))
    x_t = level.mix(IDEAL.draw(4000, seed=1).float(), torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)))
    return (engine.denoiser(x_t, level).x0 - IDEAL(x_t, level).x0).square().sum(1).mean().sqrt().item()


def main(num_steps=2000, out=None):
    torch.manual_seed(0)
    engine = DiffusionEngine(
        "point", EDMDenoiser(Plane(), sigma_data=0.71), EDMSchedule(), LogNormalSigmaSampler(-1.2, 1.2), MSELoss(),
        HeunSampler(24), sample_shape=(2,),
    )  # fmt: skip
    before = off_the_ideal(engine, 0.3)
    train(engine, Ring(), num_steps)
    after = off_the_ideal(engine, 0.3)
    print(f"off the ideal denoiser at sigma 0.3: {before:.3f} untrained, {after:.3f} trained")

    plain = engine.sample(num=2000, seeds=0)
    near = (plain[:, None] - IDEAL.means.float()).norm(dim=-1).min(1).values
    print(f"samples within three standard deviations of a Gaussian: {(near < 0.24).float().mean():.1%}")

    engine.requires_grad_(False)
    turn = Turn().attach(engine)
    train(engine, Ring(turn=math.pi / 12), 150, lr=2e-2)
    angle = next(turn.parameters()).item()
    print(f"a ring turned by {math.pi / 12:.3f}: the mixin's one parameter learned {angle:.3f}")
    turned = engine.sample(num=2000, seeds=0)
    turn.detach()
    assert torch.equal(engine.sample(num=2000, seeds=0), plain), "off again, bit for bit"
    if out:
        draw(out, plain, turned)
    return before, after, near, angle


def draw(out, plain, turned):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    for axis, (title, points) in zip(
        axes, {"data": Ring(2000).points, "samples": plain, "turned": turned}.items(), strict=True
    ):
        axis.scatter(*points.T, s=1)
        axis.set(title=title, aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[])
    figure.savefig(out, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out")
    options = parser.parse_args()
    main(options.steps, options.out)
