"""Weight files opened without being read: names and shapes at once, each tensor when it is asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vdiff.checkpoints.store import MANIFEST
from vdiff.checkpoints.weights import (
    DTYPES,
    TORCH_SUFFIXES,
    WeightFileError,
    read_header,
    read_shard_index,
    read_torch_weights,
    read_weights,
)

FROM_CODE = {code: dtype for dtype, code in DTYPES.items()}
# Of a pipeline in diffusers' layout, and what the weights in one are called.
FOLDERS = ("unet", "transformer", "vae", "vqvae", "controlnet", "text_encoder", "text_encoder_2", "image_encoder")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")  # the most exact first
FILES = tuple(
    stem + end
    for variant in VARIANTS
    for stem in STEMS
    for kind in (".safetensors", ".bin")
    for end in (
        f"{variant}{kind}",
        f"{kind}.index{variant}.json",
        *([f"{kind}{variant}.index.json"] if variant else []),  # as diffusers once wrote it
    )
)


class WeightSource:
    """Tensors of one or more files by name.

    Safetensors are memory-mapped, and so are torch files in today's format: a tensor takes memory while it is held.

    Attributes:
        path: As opened.
        header: Every tensor on the meta device, for its shape and type.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[Path, str]], header: Mapping[str, Tensor]) -> None:
        self.path = path
        self.header = MappingProxyType(dict(header))
        self._places = dict(places)
        self._handles: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file, inside = self._places[name]
        if file.suffix in TORCH_SUFFIXES:
            if file not in self._handles:
                self._handles[file] = _mapped(file)
            return self._handles[file][inside]
        return self._handle(file).get_tensor(inside)

    def check(self) -> None:
        """That every file is whole: as long as its header says.

        Raises:
            WeightFileError: one is not.
        """
        for file in {file for file, _ in self._places.values()}:
            if file.suffix not in TORCH_SUFFIXES:
                self._handle(file)

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise WeightFileError(f"{file}: damaged safetensors file, perhaps cut short: {error}.") from error
        return self._handles[file]


def open_weights(path: str | Path) -> WeightSource:
    """A weight file, an index of shards, or a folder in diffusers' layout: of a pipeline, or of one part of it.

    In a pipeline a name begins with its folder and a slash: ``unet/conv_in.weight``. Of several files of a part the
    most exact is taken, one of no variant before fp16 and bf16, and of these safetensors before torch's.

    Raises:
        WeightFileError: not there, not such a file, or damaged.
        UnsafeFileError: reading it would run code.
    """
    path = Path(path)
    if path.is_dir():
        if not (found := _parts_in(path)):
            near = [file for depth in ("*", "*/*") for file in path.glob(depth) if file.is_file()]
            below = sorted(str(file.relative_to(path)) for file in near)
            there = f"{', '.join(below[:8])}{', ...' if len(below) > 8 else ''}" or "nothing"
            raise WeightFileError(
                f"{path}: no weights as diffusers names them ({', '.join(FILES[:3])}, ...), neither here nor in "
                f"{', '.join(FOLDERS)} below. There is: {there}. A file by another name is opened by that name."
            )
        parts = {prefix: open_weights(file) for prefix, file in found.items()}
        places = {p + name: place for p, part in parts.items() for name, place in part._places.items()}
        header = {p + name: value for p, part in parts.items() for name, value in part.header.items()}
        return WeightSource(path, places, header)
    if path.suffix == ".json" and path.is_file():
        shards: dict[Path, set[str]] = {}
        for name, file in read_shard_index(path).items():
            shards.setdefault(file, set()).add(name)
        return _of_files(path, shards)
    if path.suffix in (".safetensors", *TORCH_SUFFIXES) and path.is_file():
        return _of_files(path, {path: None})
    return WeightSource(path, {}, read_weights(path))  # which says what is wrong


def is_in_folders(path: str | Path) -> bool:
    """Whether a folder holds weights in diffusers' layout, of a pipeline or of one part of it."""
    return bool(_parts_in(Path(path)))


def _parts_in(path: Path) -> dict[str, Path]:
    """The file of every part of a folder, by what its names begin with."""
    found = {f"{folder}/": file for folder in FOLDERS if (file := _weights_in(path / folder))}
    if not found and (alone := _weights_in(path)):
        return {"": alone}
    return found


def _weights_in(folder: Path) -> Path | None:
    """None in a checkpoint of our own as well, which is read by its manifest."""
    if (folder / MANIFEST).is_file():
        return None
    return next((folder / file for file in FILES if (folder / file).is_file()), None)


def _mapped(file: Path) -> dict[str, Tensor]:
    return read_torch_weights(file, mmap=zipfile.is_zipfile(file))


def _of_files(path: Path, shards: Mapping[Path, set[str] | None]) -> WeightSource:
    places: dict[str, tuple[Path, str]] = {}
    header: dict[str, Tensor] = {}
    for file, wanted in sorted(shards.items()):
        found = _header_of(file)
        if wanted is not None and wanted != set(found):
            odd = sorted(wanted ^ set(found))
            raise WeightFileError(f"{file}: index and shard disagree on {len(odd)} tensors: {', '.join(odd[:4])}.")
        header |= found
        places |= {name: (file, name) for name in found}
    source = WeightSource(path, places, header)
    source.check()
    return source


def _header_of(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file on the meta device."""
    if file.suffix in TORCH_SUFFIXES:
        return {name: value.to("meta") for name, value in _mapped(file).items()}
    return {name: _described(file, name, entry) for name, entry in read_header(file).items()}


def _described(file: Path, name: str, entry: Any) -> Tensor:
    try:
        return torch.empty([int(n) for n in entry["shape"]], dtype=FROM_CODE[entry["dtype"]], device="meta")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightFileError(f"{file}: {name} has no shape and type that can be read: {entry!r:.80}.") from error
