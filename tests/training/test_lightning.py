"""Under Lightning an engine trains as it does in vdiff's own loop."""

import socket
import warnings
from pathlib import Path

import children
import lightning
import pytest
import torch

from vdiff.data import Digits
from vdiff.engine import DiffusionEngine
from vdiff.hooks import attached
from vdiff.process import forked
from vdiff.registry import load_config
from vdiff.training import EMA, SGD, AdamW, CosineLRSchedule, Logging, Trainer
from vdiff.training.lightning import DataModule, EngineModule, from_run_file

STEPS, SIZE = 6, 16
CONFIG = Path(__file__).parents[2] / "configs" / "digits_edm.yaml"
SMALL = ["engine.denoiser.network.channels=16", f"training.num_steps={STEPS}", f"training.batch_size={SIZE}"]


class Losses(lightning.Callback):
    """Loss after each step, from the module's log."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def engine():
    with forked(0, "init"):
        return DiffusionEngine.from_config(load_config(CONFIG, overrides=SMALL[:1]))


def recipe():
    return {"optimizer": AdamW(2e-3), "lr_schedule": CosineLRSchedule(warmup=2)}


def fit(module, data, folder, steps=STEPS, ckpt_path=None, callbacks=(), **options):
    defaults = {"max_steps": steps, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(**defaults | quiet | options, default_root_dir=folder, callbacks=list(callbacks))
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def natively(folder, **options):
    """The same steps in vdiff's own loop: the engine and its losses."""
    one = engine()
    Trainer(STEPS, SIZE, **recipe(), device="cpu", logging=Logging(1, []), **options).fit(one, Digits("train"), folder)
    return one


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return natively(tmp_path_factory.mktemp("native"), ema=EMA(0.9)).state_dict()


def test_the_weights_are_those_of_the_native_loop_bit_for_bit(native, tmp_path):
    module = EngineModule(engine(), **recipe())
    fit(module, DataModule(Digits("train"), SIZE), tmp_path)
    for name, value in module.engine.state_dict().items():
        assert torch.equal(value, native[name]), name


def test_so_they_are_with_accumulation(tmp_path):
    module = EngineModule(engine(), **recipe())
    fit(module, DataModule(Digits("train"), SIZE), tmp_path / "a", accumulate_grad_batches=2)
    same = natively(tmp_path / "b", accumulate=2)
    for (name, value), other in zip(module.engine.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_two_processes_give_the_losses_and_weights_of_one(tmp_path):
    # Under SGD: Adam would blow a gradient that is rounding alone up to a whole step.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = tmp_path / "one.pt"
    torch.save(engine().state_dict(), one)
    ranks = [children.start(children.train_under_lightning, rank, port, one, tmp_path, SMALL) for rank in range(2)]
    for rank in ranks:
        rank.join(240)
        rank.kill()
    losses = [torch.load(tmp_path / f"losses{rank}.pt") for rank in range(2)]
    module, seen = EngineModule(engine(), SGD(0.1)), Losses()
    fit(module, DataModule(Digits("train"), SIZE), tmp_path, callbacks=[seen])
    assert torch.stack(losses).mean(0).tolist() == pytest.approx(seen.values, rel=1e-5)
    for name, value in torch.load(tmp_path / "both.pt").items():  # sums of gradients in another order
        assert torch.allclose(value, module.engine.state_dict()[name], atol=1e-6), name


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not(native, tmp_path):
    data = DataModule(Digits("train"), SIZE)  # an epoch has 89 steps
    first = fit(EngineModule(engine(), **recipe(), ema=EMA(0.9)), data, tmp_path, max_steps=STEPS)
    whole = first.lightning_module
    interrupted = EngineModule(engine(), **recipe(), ema=EMA(0.9))
    stop = fit(interrupted, DataModule(Digits("train"), SIZE), tmp_path / "x", callbacks=[StopAfter(3)])
    stop.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed = EngineModule(engine(), **recipe(), ema=EMA(0.9))
    fit(resumed, DataModule(Digits("train"), SIZE), tmp_path / "y", ckpt_path=tmp_path / "half.ckpt")
    for name, value in resumed.engine.state_dict().items():
        assert torch.equal(value, native[name]), name
    for name, value in resumed.ema.state_dict().items():
        assert torch.equal(value, whole.ema.state_dict()[name]), name


def student():
    from vdiff.losses import ConsistencyLoss
    from vdiff.mixins import Consistency, Teacher
    from vdiff.process import GridSigmaSampler

    one = engine()
    one.sigma_sampler, one.loss = GridSigmaSampler(8), ConsistencyLoss()
    one.conditioner.requires_grad_(False)  # the conditions are the teacher's as well
    Consistency().attach(one)
    Teacher(source="copy", target="ema").attach(one)
    return one


def test_a_resumed_run_has_the_teacher_that_it_began_with_and_lends_its_average_no_longer_than_it_lasts(tmp_path):
    def module():
        return EngineModule(student(), **recipe(), ema=EMA(0.9))

    whole, stopped, resumed = module(), module(), module()
    fit(whole, DataModule(Digits("train"), SIZE), tmp_path)
    stop = fit(stopped, DataModule(Digits("train"), SIZE), tmp_path / "x", callbacks=[StopAfter(3)])
    stop.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    fit(resumed, DataModule(Digits("train"), SIZE), tmp_path / "y", ckpt_path=tmp_path / "half.ckpt")
    native = student()
    loop = Trainer(STEPS, SIZE, **recipe(), ema=EMA(0.9), device="cpu", logging=Logging(1, []))
    loop.fit(native, Digits("train"), tmp_path / "native")
    for name, value in native.state_dict().items():
        assert torch.equal(whole.engine.state_dict()[name], value), name
        assert torch.equal(resumed.engine.state_dict()[name], value), name
    assert attached(resumed.engine)["teacher"].average is None


class StopAfter(lightning.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


def test_validation_is_the_same_twice_and_reports_the_average_too(tmp_path):
    module = EngineModule(engine(), **recipe(), ema=EMA(0.9))
    data = DataModule(Digits("train"), SIZE, Digits("test"))
    trainer = fit(module, data, tmp_path, val_check_interval=3)
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert seen["validation/loss"] != seen["validation/ema/loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = trainer.validate(module, data, verbose=False)[0]
    assert again["validation/loss"] == seen["validation/loss"]


def test_a_run_file_trains(native, tmp_path):
    overrides = [*SMALL, "training.optimizer={type: adamw, lr: 2e-3}", "training.lr_schedule={type: cosine, warmup: 2}"]
    module, data, options = from_run_file(CONFIG, overrides)
    assert options == {
        "max_steps": STEPS, "accumulate_grad_batches": 1, "precision": "32-true", "gradient_clip_val": 1.0
    }  # fmt: skip
    losses = Losses()
    fit(module, data, tmp_path, **{**options, "gradient_clip_val": None}, limit_val_batches=0, callbacks=[losses])
    assert len(losses.values) == STEPS
    for name, value in module.engine.state_dict().items():
        assert torch.equal(value, native[name]), name


def test_what_is_frozen_stays(tmp_path):
    from vdiff.mixins import LoRA
    from vdiff.training import TrainGroup

    one = engine()
    LoRA(on="*.qkv", rank=2).attach(one)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    module = EngineModule(one, **recipe(), train=[TrainGroup("mixins.lora")])
    fit(module, DataModule(Digits("train"), SIZE), tmp_path)
    changed = {name for name, value in one.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("_port.lora" in name for name in changed)
