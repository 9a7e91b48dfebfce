"""The one reader of weight files: what a checkpoint holds, and rows of its tensors."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|running_mean|running_var)$")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = re.compile(r"optim|scheduler|scaler|rng_state|training_args|random_states", re.IGNORECASE)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to its series; the message names the file."""


class Stored(NamedTuple):
    """Where a tensor of one checkpoint lies, and its form."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


# One checkpoint: its files, and the tensors in them.


def choose_files(names: Iterable[str], where: str, read: Callable[[str], str]) -> list[str]:
    """The files with the weights among the files of one checkpoint; `read` returns the text of an index."""
    names = set(names)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if index in names:
            return _shards(read(index), index, where, names)
        if whole in names:
            return [whole]
    for ending in ENDINGS:
        found = sorted(name for name in names if name.endswith(ending) and not _NOT_WEIGHTS.search(name))
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(
                f"{where} holds {len(found)} weight files and no index ({', '.join(found[:3])} …): which of them "
                "make up the checkpoint is unknown. Keep one, or give {step: file} as source"
            )
    raise CheckpointError(
        f"{where} holds no weights: neither model.safetensors nor pytorch_model.bin, their shards with an index, "
        f"nor any other file ending in {', '.join(ENDINGS)}"
    )


def _shards(text: str, index: str, where: str, names: set[str]) -> list[str]:
    try:
        shards = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}/{index} is no index of shards ({error!r}): fetch it again") from None
    for shard in shards:
        if not isinstance(shard, str) or re.search(r"[\\/:]", shard) or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{where}/{index} points outside its folder, to {shard!r}: it is not followed"
            )
    if missing := [shard for shard in shards if shard not in names]:
        raise CheckpointError(f"{where} lacks the shards {missing} that {index} names: fetch them again")
    return shards


def list_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """The float tensors of one checkpoint, of tied ones the first.

    They come in the order of their names, which is the same whatever the format: files have orders of their own.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, shape, dtype in _listed(file):
            if name in found:
                raise CheckpointError(f"{file} holds {name} a second time, after {found[name].file}")
            if dtype in MANTISSA and shape and math.prod(shape) and not _BUFFER.search(name):
                found[name] = Stored(shape, dtype, file)
    if not found:
        raise CheckpointError(f"{files[0]} holds no tensor of a float type")
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[int | str]:
    """A key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _listed(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if file.suffix == ".safetensors":
        with refused(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no iterator)
                header = opened.get_slice(name)
                yield name, tuple(header.get_shape()), _FLOATS.get(str(header.get_dtype()), "other")
        return
    seen = set()
    for name, tensor in _state_dict(file).items():
        if isinstance(tensor, Tensor):
            storage = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if storage not in seen or not tensor.data_ptr():
                yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            seen.add(storage)


class refused:
    """Turn what the readers raise on a damaged file into a CheckpointError that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, FileNotFoundError | CheckpointError) or not isinstance(error, Exception):
            return
        raise CheckpointError(
            f"{self.file} cannot be read; it is cut short, damaged, or no checkpoint ({error}): fetch or copy it "
            "again, or leave its step out (errors='skip')"
        ) from error


_lock = threading.Lock()


def _state_dict(file: Path) -> Mapping[str, Any]:
    """What torch.save wrote, mapped into memory where its format allows; the last file stays open."""
    with refused(file):
        stat = file.stat()
        with _lock:
            return unpickled(str(file), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def unpickled(file: str, changed: int, size: int) -> Mapping[str, Any]:
    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for key in ("model", "state_dict", "module"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping):
        raise TypeError(f"it holds a {type(stored).__name__}, not a state dict")
    return stored


def row_reader(file: Path, name: str) -> Callable[[int, int], Tensor]:
    """A reader of rows [start, stop) of a stored tensor."""
    if file.suffix != ".safetensors":
        tensor = _state_dict(file)[name]
        return lambda start, stop: tensor[start:stop]
    opened = safe_open(file, framework="pt")
    rows = opened.get_slice(name)  # keeps the file mapped
    return lambda start, stop: rows[start:stop]
