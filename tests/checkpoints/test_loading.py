import pytest
import torch
from torch import nn

from vdiff.checkpoints import MismatchError, load_into
from vdiff.hooks import PORT


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def copy(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_same_names_are_loaded_bit_for_bit():
    source, target = net(), net()
    report = load_into(target, source.state_dict())
    assert unchanged(target, source.state_dict()) and len(report.loaded) == len(source.state_dict())


def test_a_prefix_is_replaced_and_the_rest_is_counted():
    source, target = net(), net()
    file = {f"model.net.{name}": value for name, value in source.state_dict().items()} | {"vae.x": torch.ones(1)}
    report = load_into(target, file, prefix={"model.net.": ""})
    assert unchanged(target, source.state_dict())
    assert report.outside == ("vae.x",) and "1 in the file outside the given prefixes (vae.x)" in str(report)
    with pytest.raises(MismatchError, match=r"8 names|9 names"):
        load_into(target, {f"p.{name}": value for name, value in source.state_dict().items()})
    with pytest.raises(MismatchError, match=r"begins with 'x\.'. They begin: model\.net"):
        load_into(target, file, prefix={"x.": ""})
    with pytest.raises(MismatchError, match="two tensors the name 'w'"):
        load_into(target, {"a.w": torch.ones(1), "b.w": torch.ones(1)}, prefix={"a.": "", "b.": ""})


def test_a_difference_is_readable_and_nothing_is_changed():
    target = net()
    before = copy(target)
    file = {name: value + 1 for name, value in net().state_dict().items()}
    del file["0.bias"]
    file |= {f"extra.block.{i}.weight": torch.ones(1) for i in range(30)}
    file["2.weight"] = torch.ones(7, 7)
    file["2.bias"] = torch.tensor([float("nan")])
    file["1.num_batches_tracked"] = torch.tensor(1.0)
    with pytest.raises(MismatchError) as error:
        load_into(target, file, where="net")
    text = str(error.value)
    assert text.startswith("net: the weights do not fit; nothing was changed.")
    assert "1 missing in the file: 0.bias" in text
    assert "30 unexpected in the file: extra.block.* (30)" in text
    assert "2.weight: (7, 7) float32 in the file, (1, 3) float32 in the module" in text
    assert "1.num_batches_tracked: () float32 in the file, () int64 in the module" in text
    assert "1 not finite: 2.bias" in text
    assert len(text.splitlines()) == 6
    assert unchanged(target, before)


def test_ignored_names_are_left_alone_and_the_rest_is_still_strict():
    source, target = net(), net()
    before = copy(target)
    file = copy(source)
    file["2.weight"] = torch.ones(9)
    del file["2.bias"]
    report = load_into(target, file, ignore=["2.*"])
    assert torch.equal(target[2].weight, before["2.weight"]) and torch.equal(target[0].weight, source[0].weight)
    assert set(report.ignored) == {"2.weight", "2.bias"}
    with pytest.raises(MismatchError, match="1 missing in the file: 0.weight"):
        load_into(target, {name: value for name, value in file.items() if name != "0.weight"}, ignore=["2.*"])


def test_not_strict_loads_what_is_on_both_sides_but_no_wrong_shape():
    source, target = net(), net()
    file = copy(source)
    del file["0.bias"]
    report = load_into(target, file | {"more": torch.ones(1)}, strict=False)
    assert report.missing == ("0.bias",) and report.unexpected == ("more",)
    assert torch.equal(target[0].weight, source[0].weight)
    with pytest.raises(MismatchError, match="of another shape"):
        load_into(target, file | {"0.weight": torch.ones(1)}, strict=False)


def test_a_plain_file_fits_a_host_with_attachments():
    source, target = net(), net()
    port = nn.Module()
    port.down = nn.Parameter(torch.ones(2))
    target[0].add_module(PORT, nn.ModuleDict({"lora": port}))
    report = load_into(target, source.state_dict())
    assert report.attachments == (f"0.{PORT}.lora.down",) and "attached mixins" in str(report)
    assert torch.equal(target[0].weight, source[0].weight) and torch.equal(port.down, torch.ones(2))


def test_weights_are_converted_to_the_modules_type_and_counted():
    target = net().bfloat16()
    report = load_into(target, net().state_dict())
    assert report.cast == 8 and target[0].weight.dtype == torch.bfloat16


def test_a_module_on_the_meta_device_takes_the_tensors():
    source = net()
    with torch.device("meta"):
        target = net()
    load_into(target, source.state_dict())
    assert unchanged(target, source.state_dict())


def test_on_the_meta_device_ties_and_types_stay_and_what_no_file_has_is_named():
    def tied():
        module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        module[1].weight = module[0].weight
        module.register_buffer("grid", torch.ones(2), persistent=False)
        return module

    with torch.device("meta"):
        target = tied().bfloat16()
    file = copy(tied())
    report = load_into(target, file)
    assert target[0].weight is target[1].weight and target[0].weight.dtype == torch.bfloat16
    assert torch.equal(target[0].weight, file["0.weight"].bfloat16())
    assert report.cast == 2 and report.empty == ("grid",)
    assert "1 still on the meta device, without values (grid)" in str(report)
    assert load_into(tied(), file).empty == ()
