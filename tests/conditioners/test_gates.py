"""A field of the batch says in which rows a mixin acts."""

import pytest
import torch

from vdiff.conditioners import ClassLabelEmbedder, EmbedderConditioner
from vdiff.registry import build


def test_gates_are_open_where_the_field_holds_the_value():
    gates = {"y": {"stream": 1}, "later": {"stream": [1, 2]}, "ink": {"style": "ink"}}
    batch = {"stream": torch.tensor([0, 1, 2]), "style": ["ink", "oil", "ink"], "partner": torch.tensor([1, 2, 0])}
    told = EmbedderConditioner(gates=gates)(batch)
    assert {name: gate.tolist() for name, gate in told.gates.items()} == {
        "y": [0.0, 1.0, 0.0],
        "later": [0.0, 1.0, 1.0],
        "ink": [1.0, 0.0, 1.0],
    }
    assert told.partners is batch["partner"] and told.num_rows == 3


def test_rows_that_do_not_say_their_stream_are_of_the_first():
    conditioner = EmbedderConditioner([ClassLabelEmbedder(3, 4)], gates={"y": {"stream": 1}, "x": {"stream": 0}})
    told = conditioner({"label": torch.tensor([0, 2])})
    assert told.gates["y"].tolist() == [0.0, 0.0] and told.gates["x"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="gate of 'y' reads 'stream', and this batch has neither"):
        EmbedderConditioner(gates={"y": {"stream": 1}})({})


def test_they_may_be_set_anew():
    conditioner = EmbedderConditioner(gates={"y": {"stream": 1}})
    conditioner.gates = conditioner.gates | {"x": {"stream": 0}}
    assert conditioner.gates == {"y": {"stream": [1]}, "x": {"stream": [0]}}
    assert conditioner({"stream": torch.tensor([1, 0])}).gates["x"].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="'y' needs one field and its value"):
        conditioner.gates = {"y": {}}


def test_they_are_written_in_a_config():
    made = build({"type": "embedders", "gates": {"y": {"stream": 1}}}, "conditioner")
    assert made({"stream": torch.tensor([1, 0])}).gates["y"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="'y' needs one field and its value"):
        EmbedderConditioner(gates={"y": {"stream": 1, "label": 2}})
