import json
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from vdiff.checkpoints import (
    UnsafeFileError,
    WeightFileError,
    read_header,
    read_metadata,
    read_weights,
    save_weights,
)
from vdiff.checkpoints.weights import DTYPES


def some_tensors():
    tied = torch.randn(3, 4)
    return {
        "a.weight": tied,
        "b.weight": tied,
        "c": torch.randn(5, 6).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "half": torch.randn(7).half(),
        "flag": torch.tensor([True, False, True]),
    }


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    tensors = some_tensors()
    save_weights(tmp_path / "w.safetensors", tensors, {"b": "2", "a": "1"})
    theirs = safetensors.torch.load_file(tmp_path / "w.safetensors")
    ours = read_weights(tmp_path / "w.safetensors")
    assert set(theirs) == set(ours) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype
        assert torch.equal(ours[name], value)
    assert read_metadata(tmp_path / "w.safetensors") == {"a": "1", "b": "2"}
    assert read_header(tmp_path / "w.safetensors")["c"]["shape"] == [6, 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_survives(tmp_path, dtype):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    save_weights(tmp_path / "w.safetensors", {"x": value})
    back = read_weights(tmp_path / "w.safetensors")["x"]
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), value.view(torch.uint8))


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """safetensors' own writer puts the metadata in another order every time."""
    tensors, words = some_tensors(), {c: c for c in "qwertyuiop"}
    save_weights(tmp_path / "1.safetensors", tensors, words)
    save_weights(tmp_path / "2.safetensors", dict(reversed(tensors.items())), dict(reversed(words.items())))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    save_weights(file, {"x": torch.ones(2)})
    before = file.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"w\.safetensors: weights were not written: No space left"):
        save_weights(file, {"x": torch.zeros(2)})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_tensors_are_found_in_their_envelope(tmp_path):
    weights = {"a.weight": torch.ones(2), "a.steps": torch.tensor(3)}
    for name, tree in {
        "plain": weights,
        "lightning": {"epoch": 3, "loss": torch.tensor(1.0), "state_dict": weights},
        "sat": {"module": weights, "iteration": 5},
        "nested": {"model": {"module": weights}},
    }.items():
        torch.save(tree, tmp_path / f"{name}.ckpt")
        assert set(read_weights(tmp_path / f"{name}.ckpt")) == set(weights), name
    torch.save({"model": weights, "averaged": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
    assert set(read_weights(tmp_path / "two.pt", inside="averaged")) == {"a"}
    with pytest.raises(WeightFileError, match=r"nothing under 'emma'. It holds: model \(dict\), averaged"):
        read_weights(tmp_path / "two.pt", inside="emma")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(WeightFileError, match="no names with tensors"):
        read_weights(tmp_path / "none.pt")


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['VDIFF_TEST_MARKER']}",))


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_code_is_refused_and_not_run(tmp_path, monkeypatch, suffix, is_zip):
    marker = tmp_path / "marker"
    monkeypatch.setenv("VDIFF_TEST_MARKER", str(marker))
    file = tmp_path / f"evil{suffix}"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Evil()}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafeFileError, match="would run its code"):
        read_weights(file)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightFileError):
        read_weights(file)
    assert not marker.exists()


def test_a_compressed_torch_file_is_refused_before_it_expands(tmp_path):
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(UnsafeFileError, match="compressed"):
        read_weights(tmp_path / "b.pt")


def header_file(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def test_malformed_safetensors_are_refused_with_a_typed_error(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    word = json.dumps(entry).encode()
    cases = {
        "huge header": (b"{}", b"", 2**62),
        "cut header": (b"{}", b"", 2000),
        "not json": (b"{nonsense", b"", None),
        "a list": ([1], b"", None),
        "deep": (b"[" * 100_000, b"", None),
        "twice": (b'{"a":' + word + b',"a":' + word + b"}", b"\0" * 4, None),
        "many": ({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}, b"", None),
        "huge shape": ({"a": entry | {"shape": [2**40]}}, b"\0" * 4, None),
        "hole": ({"a": entry | {"data_offsets": [4, 8]}}, b"\0" * 8, None),
        "cut data": ({"a": entry}, b"\0" * 2, None),
    }
    for name, (header, data, length) in cases.items():
        file = header_file(tmp_path / f"{name.replace(' ', '_')}.safetensors", header, data, length)
        with pytest.raises(WeightFileError):
            read_weights(file)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(WeightFileError):
        read_weights(tmp_path / "empty.safetensors")


def test_shards_are_joined_and_never_leave_their_folder(tmp_path):
    folder = tmp_path / "model"
    save_weights(folder / "one.safetensors", {"a": torch.ones(1)})
    save_weights(folder / "two.safetensors", {"b": torch.zeros(1)})
    save_weights(tmp_path / "outside.safetensors", {"b": torch.zeros(1)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert set(read_weights(index)) == {"a", "b"}
    absolute = str(tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", absolute, "x/../two.safetensors", "two.safetensors\0", "..", "two.pt"):
        index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": shard}}))
        with pytest.raises(UnsafeFileError, match="beside its index"):
            read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    with pytest.raises(WeightFileError, match="disagree on 2 tensors: b, c"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "three.safetensors"}}))
    with pytest.raises(WeightFileError, match="missing"):
        read_weights(index)
    index.write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(UnsafeFileError, match="twice"):
        read_weights(index)
    index.write_text("[]")
    with pytest.raises(WeightFileError):
        read_weights(index)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    with pytest.raises(WeightFileError, match=r"a folder. open_weights\(...\) and load_published"):
        read_weights(tmp_path)
    with pytest.raises(WeightFileError, match=r"x\.pt: no such weight file. In .*: w\.safetensors"):
        read_weights(tmp_path / "x.pt")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(WeightFileError, match=r"this is a \.h5 file"):
        read_weights(tmp_path / "w.h5")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(WeightFileError):
        read_weights(tmp_path / "cut.pt")
