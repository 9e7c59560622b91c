import pytest
import torch

from vdiff.process import Conditioning


def make(rows=2, value=1.0, **more):
    return Conditioning({"vector": torch.full((rows, 3), value), "label": torch.arange(rows)}, **more)


def test_a_conditioning_is_read_by_name():
    cond = make()
    assert "vector" in cond and "concat" not in cond and cond.get("concat") is None
    assert torch.equal(cond["label"], torch.arange(2)) and cond.num_rows == 2
    with pytest.raises(KeyError):
        cond["concat"]


def test_rows_are_counted_by_whatever_there_is():
    assert Conditioning().num_rows is None and Conditioning().device is None
    assert Conditioning(gates={"lora": torch.ones(3)}).num_rows == 3
    assert Conditioning(partners=torch.tensor([1, 0])).num_rows == 2


# Gates ---------------------------------------------------------------------------------------------


def test_gating_is_a_copy_and_gates_the_null_alike():
    cond = make(null=make(value=0.0))
    gated = cond.gated(pag=0, lora=torch.tensor([0.5, 1.0]))
    assert gated.gates["pag"].tolist() == gated.null.gates["pag"].tolist() == [0, 0]
    assert gated.gates["lora"].tolist() == gated.null.gates["lora"].tolist() == [0.5, 1.0]
    assert cond.gates == {} and cond.null.gates == {} and gated["vector"] is cond["vector"]
    again = gated.gated(pag=1)
    assert again.gates["pag"].tolist() == [1, 1] and again.gates["lora"].tolist() == [0.5, 1.0]


def test_gating_nothing_needs_a_number_of_rows():
    with pytest.raises(ValueError, match=r"gated\(rows=4"):
        Conditioning().gated(pag=0)
    assert Conditioning().gated(rows=3, pag=0).gates["pag"].tolist() == [0, 0, 0]
    assert Conditioning(null=Conditioning()).gated(rows=3, pag=0).null.gates["pag"].shape == (3,)


def test_a_null_has_as_many_rows():
    cond = make(2)
    assert cond.with_null(make(2, 0.0)).null["vector"].sum() == 0 and cond.null is None
    assert cond.with_null(Conditioning()).null.num_rows is None
    with pytest.raises(ValueError, match="2 rows against a null of 3"):
        cond.with_null(make(3))


# Moving --------------------------------------------------------------------------------------------


def test_a_dtype_applies_to_floating_tensors_alone():
    cond = make(
        masks={"vector": torch.ones(2, 3, dtype=torch.bool)},
        gates={"lora": torch.ones(2)},
        partners=torch.tensor([1, 0]),
        null=make(value=0.0),
    ).to(torch.bfloat16)
    assert cond["vector"].dtype == cond.null["vector"].dtype == torch.bfloat16
    assert cond["label"].dtype == torch.int64 and cond.masks["vector"].dtype == torch.bool
    assert cond.gates["lora"].dtype == torch.float32 and cond.partners.dtype == torch.int64


def test_everything_moves_to_another_device():
    cond = make(
        masks={"vector": torch.ones(2, 3)}, gates={"lora": torch.ones(2)}, partners=torch.tensor([1, 0]), null=make()
    )
    moved = cond.to("meta", torch.float16)
    tensors = [*moved.tensors.values(), *moved.masks.values(), *moved.gates.values(), *moved.null.tensors.values()]
    assert {t.device.type for t in (*tensors, moved.partners)} == {"meta"} and moved["vector"].dtype == torch.float16
    assert moved.device.type == "meta" and cond.device.type == "cpu"


# Branches ------------------------------------------------------------------------------------------


def test_branches_become_one_batch():
    both = Conditioning.cat([make(2, 1.0, null=make()), make(2, 0.0)], rows=2)
    assert both["vector"][:, 0].tolist() == [1, 1, 0, 0] and both["label"].tolist() == [0, 1, 0, 1]
    assert both.null is None and both.num_rows == 4 and both.gates == {} and both.partners is None


def test_partners_stay_within_their_branch():
    pair, alone = torch.tensor([1, 0, -1]), None
    both = Conditioning.cat([make(3, partners=p) for p in (pair, alone, pair)], rows=3)
    assert both.partners.tolist() == [1, 0, -1, -1, -1, -1, 7, 6, -1]


def test_a_branch_without_a_gate_has_it_open():
    both = Conditioning.cat([make().gated(pag=0), make().gated(lora=0.5), make()], rows=2)
    assert both.gates["pag"].tolist() == [0, 0, 1, 1, 1, 1]
    assert both.gates["lora"].tolist() == [1, 1, 0.5, 0.5, 1, 1]


def test_masks_are_joined():
    mask = torch.tensor([[True, False, True]] * 2)
    both = Conditioning.cat([make(masks={"vector": mask}), make(masks={"vector": ~mask})], rows=2)
    assert torch.equal(both.masks["vector"], torch.cat([mask, ~mask]))


def test_branches_must_say_the_same_things():
    with pytest.raises(
        ValueError, match=r"one branch has \['label', 'vector'\], another \['label'\]; a null needs every"
    ):
        Conditioning.cat([make(), Conditioning({"label": torch.arange(2)})], rows=2)
    with pytest.raises(ValueError, match=r"one branch has masks for \['vector'\], another \[\]"):
        Conditioning.cat([make(masks={"vector": torch.ones(2, 3)}), make()], rows=2)
    with pytest.raises(ValueError, match=r"branches differ in shape: .*'vector': \[\(2, 3\), \(2, 4\)\]"):
        Conditioning.cat([make(), Conditioning({"vector": torch.ones(2, 4), "label": torch.arange(2)})], rows=2)


def test_a_conditioning_is_frozen():
    with pytest.raises(AttributeError):
        make().null = make()


def test_a_number_per_row_is_not_rounded_to_half_precision():
    cond = Conditioning({"fps": torch.tensor([23.976]), "vector": torch.ones(1, 2)}).to(torch.bfloat16)
    assert cond["fps"].dtype == torch.float32 and cond["vector"].dtype == torch.bfloat16
