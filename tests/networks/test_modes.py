"""Modes of modules."""

from torch import nn

from vdiff.networks import in_eval


def test_modes_are_back_afterwards_module_by_module():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    with in_eval(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
