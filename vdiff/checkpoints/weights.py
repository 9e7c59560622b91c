"""Weight files: safetensors written, safetensors and foreign torch files read, and nothing executed.

A weight file is data from a stranger. Sizes are checked before memory is given, names are never
used as paths, and a ``.ckpt`` goes through ``torch.load(weights_only=True)`` or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_HEADER = 16 * 2**20  # bytes; a real header has about 100 per tensor
MAX_TENSORS = 100_000  # a million empty ones take half a minute to read

# Where published files keep their weights, most telling first.
ENVELOPES = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "weights")
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SHARDS = (".safetensors", ".bin")  # that an index may name

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightFileError(ValueError):
    """A weight file that cannot be read, or must not be."""


class UnsafeFileError(WeightFileError):
    """A file that would run code, leave its folder or fill the memory when read."""


def read_weights(file: str | Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file, by name, on the host.

    Args:
        file: ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth``, ``.bin``, or an index of shards
            (``.safetensors.index.json``, ``.bin.index.json``).
        inside: For torch files, the key under which the weights lie (``"model_ema"``), dots for
            levels. Default: the file itself if it maps names to tensors, else the first of
            ``state_dict``, ``model``, ``module``, ... that does.

    Raises:
        WeightFileError: not there, not such a file, or damaged.
        UnsafeFileError: it would run code, expand when read, or point outside its folder.
    """
    file = Path(file)
    if file.is_dir():
        raise WeightFileError(f"{file}: a folder. open_weights(...) and load_published(...) read one of diffusers'.")
    if not file.is_file():
        near = (
            ", ".join(sorted(f.name for f in file.parent.glob("*"))[:8]) if file.parent.is_dir() else "no such folder"
        )
        raise WeightFileError(f"{file}: no such weight file. In {file.parent}: {near or 'nothing'}.")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix == ".json":
        return _read_shards(file)
    if file.suffix in TORCH_SUFFIXES:
        return read_torch_weights(file, inside)
    known = ", ".join((".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES))
    raise WeightFileError(f"{file}: weights are read from {known}; this is a {file.suffix or 'nameless'} file.")


def read_header(file: str | Path) -> dict[str, dict[str, Any]]:
    """Dtype and shape of every tensor of a safetensors file, checked and without reading the data."""
    return {name: entry for name, entry in _header(Path(file)).items() if name != "__metadata__"}


def read_metadata(file: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return _header(Path(file)).get("__metadata__", {})


def save_weights(file: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all: to a temporary file, fsync, rename.

    The same tensors and metadata give the same bytes. Tied tensors are written once per name.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        write_safetensors(temporary, tensors, metadata)
        os.replace(temporary, file)
        sync_folder(file.parent)
    except OSError as error:
        raise OSError(error.errno, f"{file}: weights were not written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Write and fsync one file; returns its sha256 and size, taken from what was meant to be written.

    Not safetensors' own writer: that one puts the metadata in random order, and cannot hash on the way.
    """
    text, offsets = safetensors_header(file, tensors, metadata)
    digest, size = hashlib.sha256(), 0
    with open(file, "wb") as out:
        digest.update(text)
        size += out.write(text)
        for name in offsets:
            piece = tensor_bytes(tensors[name])
            digest.update(piece)
            size += len(piece)
            out.write(piece)
        sync(out)
    return digest.hexdigest(), size


def safetensors_header(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file begins, its length included, and where behind that each tensor does, in their order."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, end = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is {tensor.dtype}, which safetensors cannot hold.")
        offsets[name], end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[name], end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def sync(out: BinaryIO) -> None:
    """Until the bytes are on the disk."""
    out.flush()
    os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """Until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a safetensors file holds of a tensor, not copied where it lies so already."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _header(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightFileError(f"{file}: damaged safetensors file: {error}.") from error


def _header(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER:
                raise UnsafeFileError(f"{file}: a header of {length:,} bytes; at most {MAX_HEADER:,} are read.")
            if length + 8 > os.fstat(stream.fileno()).st_size:
                raise WeightFileError(f"{file}: not a safetensors file, or cut short within its header.")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise WeightFileError(f"{file}: cannot be read: {error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightFileError(f"{file}: not a safetensors file: {error}.") from error
    except _Twice as error:
        raise UnsafeFileError(f"{file}: {error.args[0]!r} is given twice, so the file says two things.") from error
    if not isinstance(header, dict):
        raise WeightFileError(f"{file}: not a safetensors file: its header is no mapping.")
    if len(header) > MAX_TENSORS:
        raise UnsafeFileError(f"{file}: {len(header):,} tensors; at most {MAX_TENSORS:,} are read.")
    return header


class _Twice(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return out


def read_shard_index(index: str | Path) -> dict[str, Path]:
    """Names to the files they are in, which are beside the index and are there.

    Raises:
        WeightFileError: no such index, or a shard is missing.
        UnsafeFileError: it says two things, or points elsewhere.
    """
    index = Path(index)
    try:
        if index.stat().st_size > MAX_HEADER:
            raise UnsafeFileError(f"{index}: an index of more than {MAX_HEADER:,} bytes is not read.")
        places = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        places = {str(name): str(shard) for name, shard in places.items()}
    except _Twice as error:
        raise UnsafeFileError(f"{index}: {error.args[0]!r} is given twice.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightFileError):
            raise
        raise WeightFileError(f"{index}: not an index of shards ('weight_map'): {error!r}.") from error
    for shard in sorted(set(places.values())):
        if "\0" in shard or "\\" in shard or PurePosixPath(shard).name != shard or not shard.endswith(SHARDS):
            raise UnsafeFileError(
                f"{index}: shard {shard!r}; a shard is a {' or '.join(SHARDS)} file beside its index."
            )
        if not (index.parent / shard).is_file():
            raise WeightFileError(f"{index}: shard {shard!r} is missing; download it into {index.parent}.")
    return {name: index.parent / shard for name, shard in places.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_shard_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        wanted = {name for name, place in places.items() if place == file}
        found = read_weights(file)
        if wanted != set(found):
            odd = sorted(wanted ^ set(found))
            raise WeightFileError(f"{file}: index and shard disagree on {len(odd)} tensors: {', '.join(odd[:4])}.")
        tensors |= found
    return tensors


def read_torch_weights(file: str | Path, inside: str | None = None, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a torch file, see :func:`read_weights`; memory-mapped if wished."""
    file = Path(file)
    return _state_dict(_read_torch(file, mmap), inside, file)


def _read_torch(file: Path, mmap: bool = False) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
            sum(m.file_size for m in members) > file.stat().st_size
        ):
            raise UnsafeFileError(
                f"{file}: its entries are compressed, and torch never writes them so: it could expand without end. "
                "Save it again with torch.save, or as safetensors."
            )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        names = [line for line in str(error).split("\n") if "GLOBAL" in line or "global" in line]
        what = names[-1].strip() if names else reason
        raise UnsafeFileError(
            f"{file}: holds more than tensors, and reading it would run its code. {what} "
            "Where you trust the file, load it there and save its tensors with vdiff.checkpoints.save_weights."
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise WeightFileError(f"{file}: damaged, or not a torch file: {str(error).splitlines()[0][:200]}") from error


def _state_dict(tree: Any, inside: str | None, file: Path) -> dict[str, Tensor]:
    if inside is not None:
        for key in inside.split("."):
            if not isinstance(tree, Mapping) or key not in tree:
                raise WeightFileError(f"{file}: nothing under {inside!r}. It holds: {_keys(tree)}.")
            tree = tree[key]
        found = tree if _is_state_dict(tree) else None
    else:
        found = _open_envelope(tree, ENVELOPES)
    if found is None:
        raise WeightFileError(f"{file}: no names with tensors in it. It holds: {_keys(tree)}. Say where: inside='...'.")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _open_envelope(tree: Any, keys: Sequence[str], depth: int = 3) -> Mapping[str, Any] | None:
    if _is_state_dict(tree):
        return tree
    if not isinstance(tree, Mapping) or depth == 0:
        return None
    return next((found for key in keys if key in tree and (found := _open_envelope(tree[key], keys, depth - 1))), None)


def _is_state_dict(tree: Any) -> bool:
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        return False
    # A training envelope may hold a tensor or two (a loss, a random state) beside its mappings.
    return any(isinstance(v, Tensor) for v in tree.values()) and not any(isinstance(v, Mapping) for v in tree.values())


def _keys(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return f"a {type(tree).__name__}"
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in list(tree.items())[:12]) or "nothing"
