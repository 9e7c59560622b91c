import pytest
import torch
from torch import nn

from vdiff.conditioners import ClassLabelEmbedder, EmbedderConditioner
from vdiff.mixins import LoRA
from vdiff.training import AdamW, TrainGroup, select


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.attn.role = "self_attention"
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.norm(self.attn(x)))


class Engine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conditioner = nn.Embedding(3, 4)
        self.denoiser = nn.ModuleDict({"first": Block(), "second": Block()})
        self.first_stage = nn.Linear(2, 2).requires_grad_(False)
        self.mixins = {}


def chosen(selection):
    return [{n for n, p in selection.trained.items() if any(p is q for q in g["params"])} for g in selection.groups]


def test_by_default_everything_trains_that_is_not_frozen_by_its_own_module():
    engine = Engine()
    selection = select(engine, None, AdamW())
    assert set(selection.trained) == {n for n, _ in engine.named_parameters() if not n.startswith("first_stage")}


def test_vectors_are_not_decayed_unless_asked():
    groups = select(Engine(), [TrainGroup("denoiser.first")], AdamW(weight_decay=0.3)).groups
    assert [("weight_decay" in g, len(g["params"])) for g in groups] == [(False, 1), (True, 3)]
    assert groups[1]["weight_decay"] == 0.0
    assert len(select(Engine(), [TrainGroup("denoiser", decay_vectors=True)], AdamW()).groups) == 1
    assert len(select(Engine(), [TrainGroup("denoiser", weight_decay=0.0)], AdamW()).groups) == 1


def test_the_first_match_wins_and_the_rest_is_frozen_and_in_eval():
    engine = Engine()
    entries = [
        TrainGroup("*.first.attn", lr=1e-5),
        TrainGroup(["denoiser.first", "role:self_attention"], weight_decay=0.2),
    ]
    selection = select(engine, entries, AdamW(lr=1e-3, weight_decay=0.0))
    optimizer = AdamW(lr=1e-3, weight_decay=0.0)(selection.groups)
    assert chosen(selection)[0] == {"denoiser.first.attn.weight", "denoiser.first.attn.bias"}
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-5, 0.0), (1e-3, 0.2), (1e-3, 0.0)]
    assert chosen(selection)[1] == {"denoiser.second.attn.weight"}
    assert chosen(selection)[2] == {
        "denoiser.first.norm.weight",
        "denoiser.first.norm.bias",
        "denoiser.second.attn.bias",
    }
    assert not engine.conditioner.weight.requires_grad and not engine.denoiser["second"].norm.weight.requires_grad
    engine.train()
    selection.set_modes()
    second = engine.denoiser["second"]
    modes = (engine.training, engine.conditioner.training, engine.first_stage.training, second.norm.training)
    assert modes == (True, False, False, False)
    assert second.training and second.drop.training and engine.denoiser["first"].norm.training
    engine.eval()
    selection.set_modes()
    assert second.drop.training and not second.norm.training
    assert [(r.name, r.num_tensors) for r in selection.rows] == [
        ("*.first.attn", 2),
        ("denoiser.first, role:self_attention", 4),
    ]


def test_dropout_in_a_frozen_part_is_off():
    engine = Engine()
    selection = select(engine, [TrainGroup("denoiser.first")], AdamW())
    selection.set_modes()
    assert not engine.denoiser["second"].drop.training


def test_a_frozen_part_can_be_chosen():
    engine = Engine()
    select(engine, [TrainGroup("first_stage")], AdamW())
    assert engine.first_stage.weight.requires_grad and not engine.conditioner.weight.requires_grad


def test_a_mixin_is_chosen_by_its_name():
    engine = Engine()
    engine.mixins["small"] = LoRA(on="*.attn", rank=2).attach(engine, name="small")
    selection = select(engine, [TrainGroup("mixins.small")], AdamW())
    assert {id(p) for p in selection.trained.values()} == {id(p) for p in engine.mixins["small"].parameters()}
    assert not engine.denoiser["first"].attn.weight.requires_grad
    assert set(select(engine, [TrainGroup("mixins")], AdamW()).trained) == set(selection.trained)


def test_what_matches_nothing_is_an_error_with_the_nearest_name():
    engine = Engine()
    for on, message in {
        "denoiser.frist": r"'denoiser.frist' matches no parameter. Did you mean 'denoiser.first'\?",
        "mixins.lora": "'mixins.lora' matches no parameter",
        "role:self_atention": r"Did you mean 'self_attention'\?",
    }.items():
        with pytest.raises(ValueError, match=message):
            select(engine, [TrainGroup("*"), TrainGroup(on)], AdamW())
    with pytest.raises(ValueError, match="no parameter is trained"):
        select(engine.requires_grad_(False), None, AdamW())
    with pytest.raises(ValueError, match="empty list"):
        TrainGroup([])


def test_a_frozen_conditioner_still_drops_conditions_and_what_it_holds_is_in_eval():
    """Guidance needs the drops whatever is trained: with LoRA alone, too."""
    engine = Engine()
    engine.conditioner = EmbedderConditioner([ClassLabelEmbedder(3, 4, drop=0.5)])
    LoRA(rank=2, on="*.attn").attach(engine)
    selection = select(engine, [TrainGroup("mixins")], AdamW())
    engine.eval()
    selection.set_modes()
    assert engine.conditioner.training and not any(m.training for m in engine.conditioner.embedders.modules())
    cond = engine.conditioner({"label": torch.zeros(100, dtype=torch.long), "noise_key": torch.arange(100), "step": 0})
    dropped = (cond["vector"] == cond.null["vector"]).all(1)
    assert 20 < dropped.sum() < 80
