"""A denoiser that depends on its conditions, and walks under guiders."""

import torch
from oracles import noise

from vdiff.denoisers import Denoiser
from vdiff.process import Conditioning, EDMSchedule, Prediction, parameterization
from vdiff.samplers import DDIMSampler

ROWS, SHAPE = 4, (2, 3, 2, 2)  # b, then c f h w


class Told(Denoiser, name="told_for_tests"):
    """A Gaussian around what it is told, bent a little; says so in any language, and counts its calls."""

    def __init__(self, language="x0", std=0.7):
        super().__init__()
        self.language, self.std = parameterization(language), std
        self.calls, self.rows = 0, 0

    def forward(self, x_t, level, cond=None):
        self.calls += 1
        self.rows += len(x_t)
        mean = sum(value.to(x_t.dtype) for value in cond.tensors.values())
        mean = mean.reshape(len(x_t), *[1] * (x_t.ndim - 1))
        spread = level.like(x_t)
        gain = spread.alpha * self.std**2 / (spread.alpha**2 * self.std**2 + spread.sigma**2)
        x0 = mean + gain * (x_t - spread.alpha * mean) + 0.1 * torch.tanh(3 * x_t * mean)
        noise = (x_t - spread.alpha * x0) / spread.sigma
        noise = torch.where(spread.sigma > 0, noise, 0.0)  # frames that are data already have none
        return Prediction(self.language, self.language.value(x0, noise, level), x_t, level)


def conditions(rows=ROWS):
    means = torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None] + 0.05
    null = Conditioning({"vector": torch.zeros_like(means), "image": means.flip(0) * 0})
    return Conditioning({"vector": means, "image": means.flip(0) / 3}, null=null)


def start(rows=ROWS, dtype=torch.float64):
    return noise(rows, 24).reshape(rows, *SHAPE).to(dtype)


def walk(guider, denoiser=None, sampler=None, schedule=None, cond=None, x=None, **options):
    return (sampler or DDIMSampler(5))(
        Told() if denoiser is None else denoiser,
        schedule or EDMSchedule(),
        start() if x is None else x,
        conditions() if cond is None else cond,
        guider=guider,
        **options,
    )


def said(guider, ratio=2.0, denoiser=None, x=None):
    """What the guided denoiser says at one level, with the plain and the null prediction."""
    denoiser = Told() if denoiser is None else denoiser
    x = start() if x is None else x
    level = EDMSchedule().at_ratio(torch.full((len(x),), ratio, dtype=torch.float64))
    cond = conditions(len(x))
    plain, null = denoiser(x, level, cond), denoiser(x, level, cond.null)
    return guided(guider, [ratio], denoiser, x)(x, 0), plain, null


def guided(guider, ratios, denoiser=None, x=None, schedule=None):
    """A guided denoiser over these levels."""
    from vdiff.samplers import Guided, Node

    x = start() if x is None else x
    nodes = Node.of((schedule or EDMSchedule()).at_ratio(torch.tensor(ratios, dtype=torch.float64)))
    return Guided(Told() if denoiser is None else denoiser, guider, nodes, conditions(len(x)), x)
