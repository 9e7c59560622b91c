"""A small engine with everything that makes resuming hard: noise, dropout, batch statistics, an average.

Also a program: ``python toy.py FOLDER NUM_STEPS EVERY [NUM_WORKERS]`` trains it and prints a hash of its weights.
"""

import hashlib
import sys

import torch
from torch import nn

from vdiff.data import Dataset
from vdiff.losses import LossValues
from vdiff.process import RowKeys, forked
from vdiff.training import EMA, AdamW, Checkpointing, CosineLRSchedule, Logging, Trainer


class Points(Dataset, abstract=True):
    """Points in a square; ``bad`` ones are not a number."""

    def __init__(self, size=40, bad=()):
        self.x = torch.rand(size, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
        self.x[list(bad)] = float("nan")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": index % 3}


class ToyEngine(nn.Module):
    """Removes noise from points."""

    def __init__(self, dropout=0.1, norm=True, size=1.0):
        super().__init__()
        self.size = size  # of the loss
        self.body = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.SiLU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, batch):
        x, keys = batch["x"], RowKeys.of(batch)
        noise = keys.normal("noise", x.shape[1:]).to(x.device)
        error = self.head(self.body(x + noise)) - x
        per_row = self.size * error.float().square().mean(1)
        return LossValues(per_row, {"first": torch.where(batch["label"] == 0, per_row, torch.nan).detach()})


def engine(seed=0, **options):
    with forked(seed, "init"):
        return ToyEngine(**options)


def trainer(num_steps=12, **options):
    defaults = dict(
        batch_size=8,
        optimizer=AdamW(lr=1e-2),
        lr_schedule=CosineLRSchedule(warmup=3),
        ema=EMA(decay=0.9),
        clip=1.0,
        checkpoint=Checkpointing(every=1, keep=None),
        logging=Logging(every=2, loggers=[]),
        device="cpu",
    )
    return Trainer(num_steps, **(defaults | options))


def fingerprint(module, trainer):
    tensors = [*module.state_dict().values(), *trainer.ema.state_dict().values()]
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, num_steps, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    workers = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    module = engine()
    loop = trainer(num_steps, checkpoint=Checkpointing(every=every, keep=3), num_workers=workers)
    print("READY", flush=True)
    loop.fit(module, Points(), folder)
    print(fingerprint(module, loop), flush=True)
