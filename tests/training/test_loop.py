import math

import pytest
import torch
from torch import nn

from vdiff.checkpoints import find_checkpoint, save_weights, steps, write
from vdiff.data import Loader
from vdiff.losses import LossValues
from vdiff.process import forked
from vdiff.training import (
    SGD,
    AdamW,
    Checkpointing,
    InitEntry,
    Logging,
    NonFiniteError,
    RunLockedError,
    TrainGroup,
    Validation,
    read_log,
)
from vdiff.training.guard import BadStep, FiniteGuard
from vdiff.training.loop import locked


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def plain(toy, **options):
    """Without what makes steps depend on how rows are grouped."""
    return toy.trainer(**({"ema": None, "clip": None, "lr_schedule": None, "optimizer": SGD(lr=0.1)} | options))


def test_a_step_is_the_textbook_step(toy, tmp_path):
    """Against torch written out: one batch, one gradient, one update."""
    engine, by_hand = toy.engine(), toy.engine()
    plain(toy, num_steps=3).fit(engine, toy.Points(), tmp_path)
    loader = Loader(toy.Points(), 8, seed=0)
    by_hand.train()
    for step in range(3):
        with forked(0, "step", step, 0):
            by_hand(loader.batch(step)).per_row.mean().backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(engine.state_dict()[name], value, atol=1e-7, rtol=1e-6)


def test_accumulation_equals_one_batch(toy, tmp_path):
    ends = []
    for accumulate in (1, 2, 4):
        engine = toy.engine(dropout=0.0, norm=False)  # both see the micro-batch they are in
        plain(toy, num_steps=10, accumulate=accumulate).fit(engine, toy.Points(), tmp_path / str(accumulate))
        ends.append(torch.cat([p.detach().flatten() for p in engine.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6 and (ends[0] - ends[2]).abs().max() < 1e-6


def test_the_gradient_is_clipped_to_its_norm(toy, tmp_path):
    engine = toy.engine()
    before = torch.cat([p.detach().flatten() for p in engine.parameters()])
    plain(toy, num_steps=1, optimizer=SGD(lr=1.0), clip=0.01).fit(engine, toy.Points(), tmp_path)
    moved = torch.cat([p.detach().flatten() for p in engine.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_what_is_frozen_does_not_move_statistics_included(toy, tmp_path):
    engine = toy.engine()
    before = weights(engine)
    toy.trainer(4, train=[TrainGroup("head")]).fit(engine, toy.Points(), tmp_path)
    after = engine.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items() if n.startswith("body"))
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_figures_are_means_over_steps_and_rows_that_count(toy, tmp_path):
    seen = []

    class Watched(toy.ToyEngine):
        def forward(self, batch):
            values = super().forward(batch)
            seen.append((values.per_row.detach(), values.metrics["first"]))
            return values

    with forked(0):
        engine = Watched()
    result = plain(toy, num_steps=4, logging=Logging(every=4, loggers=[])).fit(engine, toy.Points(), tmp_path)
    per_row, first = (torch.cat(values) for values in zip(*seen, strict=True))
    assert result.figures["train/loss"] == pytest.approx(per_row.mean().item())
    assert result.figures["train/first"] == pytest.approx(first.nanmean().item())
    assert result.figures["train/lr"] == 0.1 and result.figures["train/epoch"] == 0.8


def test_a_bad_example_stops_the_run_before_the_weights_take_it_in(toy, tmp_path):
    engine, last = toy.engine(), {}

    class Remembering(SGD, abstract=True):
        def __call__(self, groups):
            optimizer = super().__call__(groups)
            optimizer.register_step_post_hook(lambda *_: last.update(weights(engine)))
            return optimizer

    # 40 examples in batches of 8: example 11 comes once within the first five steps.
    with pytest.raises(NonFiniteError) as error:
        plain(toy, optimizer=Remembering(lr=0.1)).fit(engine, toy.Points(bad=[11]), tmp_path)
    text = str(error.value)
    bad_step = int(text.split("in step ")[1].split()[0])
    assert "the loss is not finite" in text and bad_step < 5
    # Batch statistics spread one bad row over its batch, so all rows of it are named.
    assert "11" in text.split("examples ")[1].split(" of the")[0].replace(",", "").split()
    assert f"The last checkpoint is step {bad_step}." in text if bad_step else "no checkpoint" in text
    for name, p in engine.named_parameters():
        assert torch.isfinite(p).all() and (not last or torch.equal(p, last[name]))


def test_only_the_bad_rows_are_named_where_rows_are_apart(toy, tmp_path):
    with pytest.raises(NonFiniteError, match=r"the loss is not finite in step \d .*, examples 11 of the training set"):
        plain(toy).fit(toy.engine(norm=False), toy.Points(bad=[11]), tmp_path)


class BadGradient(nn.Module):
    """A finite loss with an infinite slope."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return LossValues(self.w.sqrt() + batch["x"].sum(1), {})


def test_a_bad_gradient_stops_the_run_too(toy, tmp_path):
    engine = BadGradient()
    with pytest.raises(NonFiniteError, match="the gradient is not finite in step 0"):
        plain(toy, train=None).fit(engine, toy.Points(), tmp_path)
    assert engine.w.item() == 0 and not steps(tmp_path / "checkpoints")


def test_the_delayed_guard_skips_on_the_device_and_names_the_first_bad_step():
    """What runs on CUDA: no look in between, and fused kernels that a flag holds back."""
    p = nn.Parameter(torch.ones(3))
    optimizer, guard = AdamW(lr=0.1)([{"params": [p]}]), FiniteGuard(is_immediate=False)
    history = []
    for step, value in enumerate([1.0, math.nan, 1.0, math.inf]):
        p.grad = torch.full((3,), value)
        flag = guard.check(step, torch.tensor([1.0, value]), p.grad.norm())
        optimizer.grad_scale, optimizer.found_inf = None, flag
        optimizer.step()
        history.append(p.detach().clone())
    assert torch.equal(history[0], history[1]) and torch.equal(history[2], history[3])
    assert not torch.equal(history[1], history[2]) and torch.isfinite(history[3]).all()
    with pytest.raises(BadStep) as bad:
        guard.look()
    assert (bad.value.step, bad.value.rows) == (1, [1])


def test_weights_to_start_from_are_not_a_resume(toy, tmp_path):
    source = toy.engine(5)
    write(tmp_path / "source", {"model": source.state_dict()}, {})
    trainer = toy.trainer(1, init=[InitEntry(tmp_path / "source", weights="raw")], optimizer=SGD(lr=0.0))
    engine = toy.engine()
    trainer.fit(engine, toy.Points(), tmp_path / "run")
    assert torch.equal(engine.head.weight, source.head.weight)
    assert torch.equal(trainer.ema.state_dict()["head.weight"], source.head.weight)
    assert "Initialised: source: init:" in (tmp_path / "run" / "report.txt").read_text()
    for options, message in (
        ({"into": "heda"}, "no module 'heda'. Did you mean 'head'"),
        ({"only_adapter": "lora"}, "no mixin is called 'lora'"),
        ({"into": "head"}, "missing in the file"),
    ):
        with pytest.raises(ValueError, match=message):
            file = tmp_path / "source" / "model.safetensors"
            toy.trainer(1, init=[InitEntry(file, **options)]).fit(toy.engine(), toy.Points(), tmp_path / "other")


def test_a_word_of_train_that_means_nothing_is_found_before_weights_are_read(toy, tmp_path):
    trainer = toy.trainer(1, init=[InitEntry(tmp_path / "large.ckpt")], train=[TrainGroup("heda")])
    with pytest.raises(ValueError, match="'heda' matches no parameter. Did you mean 'head'"):
        trainer.fit(toy.engine(), toy.Points(), tmp_path / "run")


def test_weights_go_into_one_module_with_a_prefix(toy, tmp_path):
    source, engine = toy.engine(5), toy.engine()
    save_weights(tmp_path / "w.safetensors", {f"net.{n}": v for n, v in source.head.state_dict().items()})
    InitEntry(tmp_path / "w.safetensors", into="head", prefix={"net.": ""}).load(engine)
    assert torch.equal(engine.head.weight, source.head.weight)


def test_one_trainer_per_folder(toy, tmp_path):
    with locked(tmp_path), pytest.raises(RunLockedError, match="another process trains here .process"):
        toy.trainer().fit(toy.engine(), toy.Points(), tmp_path)
    toy.trainer(1).fit(toy.engine(), toy.Points(), tmp_path)


def test_validation_sees_the_same_each_time_and_leaves_no_trace(toy, tmp_path):
    ends = []
    for every in (3, 1000):
        engine = toy.engine()
        trainer = toy.trainer(9, validation=Validation(every=every))
        trainer.fit(engine, {"train": toy.Points(), "validation": toy.Points(20)}, tmp_path / str(every))
        ends.append(toy.fingerprint(engine, trainer))
    assert ends[0] == ends[1]
    frozen = toy.trainer(9, optimizer=SGD(lr=0.0), validation=Validation(every=3))
    engine = toy.engine(norm=False)
    frozen.fit(engine, {"train": toy.Points(), "validation": toy.Points(20)}, tmp_path / "frozen")
    losses = [e["validation/loss"] for e in read_log(tmp_path / "frozen" / "log.jsonl") if "validation/loss" in e]
    averaged = [e["validation/ema/loss"] for e in read_log(tmp_path / "frozen" / "log.jsonl") if "validation/loss" in e]
    assert len(losses) == 3 and len(set(losses + averaged)) == 1


def test_the_best_is_saved_when_met_and_kept(toy, tmp_path):
    trainer = toy.trainer(
        20,
        optimizer=SGD(lr=0.1),
        checkpoint=Checkpointing(every=7, keep=1, best="validation/loss"),
        validation=Validation(every=2),
    )
    trainer.fit(toy.engine(), {"train": toy.Points(), "validation": toy.Points(20)}, tmp_path)
    losses = {e["step"]: e["validation/loss"] for e in read_log(tmp_path / "log.jsonl") if "validation/loss" in e}
    best = min(losses, key=losses.get)
    assert set(steps(tmp_path / "checkpoints")) == {best, 20}
    assert find_checkpoint(tmp_path, "best").name == f"step-{best:08d}"
    with pytest.raises(ValueError, match="no metric is called 'loss'. There are: validation/loss"):
        toy.trainer(1, checkpoint=Checkpointing(best="loss")).fit(
            toy.engine(), {"train": toy.Points(), "validation": toy.Points(20)}, tmp_path / "b"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda_a_bad_step_is_skipped_and_named_and_a_good_run_resumes_exactly(toy, tmp_path, precision):
    options = {"device": "cuda", "precision": precision}
    ends = []
    for name, parts in (("whole", [8]), ("halves", [4, 8])):
        for num_steps in parts:
            engine, trainer = toy.engine(), toy.trainer(num_steps, lr_schedule=None, **options)
            trainer.fit(engine, toy.Points(), tmp_path / name)
        ends.append(toy.fingerprint(engine, trainer))
    assert ends[0] == ends[1]
    engine = toy.engine(norm=False)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite in step \d .*, examples 11 of"):
        quiet = {"checkpoint": Checkpointing(every=100), "logging": Logging(every=20, loggers=[])}
        toy.trainer(20, **quiet, **options).fit(engine, toy.Points(bad=[11]), tmp_path / "bad")
    assert all(torch.isfinite(p).all() for p in engine.parameters())
