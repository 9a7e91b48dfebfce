"""The one reader of weight files: which files make up a checkpoint, what tensors they hold, and rows of them.

Whatever the format, a tensor of a file is a place: a type, a shape, strides, and the byte where it begins. So a
file is opened once to list it, its header checked against its size, and then rows are read from where they lie:
nothing is mapped into memory, no handle stays open, and a worker of another process reads as the first does.

Files come from strangers. No code of a file ever runs: of a pickle nothing is called (`files.pickles`). An index
names files of its own folder alone. What a header claims must lie within its file, so no file makes more memory
than it is long. The checksums of a zip (`torch.save`) are verified when it is listed; safetensors has none, so a
wrong bit in its payload cannot be seen. Every fault is a `CheckpointError`.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightdyn.core.checks import check_path
from weightdyn.files.pickles import Object, Saved, read_saved

MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
"""The float types that weights are measured in, and the bits of their mantissas."""

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""How the names of weight files end."""

_WHOLE = ("model.safetensors", "pytorch_model.bin")  # or their shards, with an index
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|running_mean|running_var)$")
_NOT_WEIGHTS = re.compile(r"optim|scheduler|scaler|rng_state|training_args|random_states", re.IGNORECASE)
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "U64": "uint64", "C64": "complex64", "I32": "int32", "U32": "uint32",
    "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
HEADER = 1 << 24
"""Bytes of a header, an index or a config beyond which it is refused: of 20,000 tensors it has 3 MB."""

_MARKS = (
    1_000_000  # marks of JSON beyond which it is refused, each of which may make 80 bytes; a tensor has 12
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to its series; the message names the file."""


class Stored(NamedTuple):
    """A tensor of a weight file: its form, and where it lies."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    file: Path
    begin: int  # the byte of the file where its first weight lies
    parts: tuple[Part, ...] = ()  # where it lies in several pieces

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the tensor; all where nothing is said.

        Raises:
            CheckpointError: the file is gone, or shorter than it was.
        """
        dtype = getattr(torch, self.dtype)
        shape = ((self.shape[0] if stop is None else stop) - start, *self.shape[1:])
        if self.parts:
            whole = torch.empty(shape, dtype=dtype)
            for part in self.parts:
                part.copy_into(whole, start)
            return whole
        span = _span(shape, self.strides)
        data = torch.empty(span * dtype.itemsize, dtype=torch.uint8)
        with refused(self.file), open_regular(self.file) as opened:
            opened.seek(self.begin + start * self.strides[0] * dtype.itemsize)
            if span and opened.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
                raise EOFError(f"it ends within {self.name}")
        return data.view(dtype).as_strided(shape, self.strides)


class Part(NamedTuple):
    """A piece of a tensor that several processes held: the box that begins at `offset`."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    stored: Stored

    def copy_into(self, rows: Tensor, start: int) -> None:
        """Put what is here into rows of the whole tensor, of which `start` is the first."""
        (first, *others), (size, *sizes) = self.offset, self.stored.shape
        low, high = max(first, start), min(first + size, start + len(rows))
        if low < high:
            inside = (slice(a, a + b) for a, b in zip(others, sizes, strict=True))
            rows[(slice(low - start, high - start), *inside)] = self.stored.read(low - first, high - first)


class _Contents(NamedTuple):
    """The float tensors of one file."""

    whole: tuple[Stored, ...]
    parts: tuple[Part, ...] = ()
    beside: tuple[str, ...] = ()  # files of its folder that have other parts


class Matrix(NamedTuple):
    """A weight matrix of a model, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file: Path | None = None


ABSURD = 1e4
"""Root mean square of a tensor's weights from which on they are taken for damaged: a bit of an exponent that flips
makes a weight 2^16 to 2^128 times as large."""


def doubt(norm_sq: float, numel: int, file: Path | None = None) -> str:
    """What makes the content of a tensor doubtful; empty if nothing does.

    Args:
        norm_sq: ‖W‖² of all its weights; NaN or infinite if one is.
        numel: how many they are.
        file: where they were read.
    """
    where = f" in {file.name}" if file else ""
    if not math.isfinite(norm_sq):
        return f"‖W‖² is {norm_sq}{where}: the training diverged, or the weights are damaged"
    if norm_sq > ABSURD**2 * numel:
        return f"the weights' rms is {math.sqrt(norm_sq / numel):.1e}{where}: are they damaged?"
    return ""


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor."""
    if not math.prod(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


# --- files ------------------------------------------------------------------------------------------------


class refused:
    """Turn whatever the reading of a damaged file raises into a CheckpointError that names it."""

    def __init__(self, file: str | PathLike[str]) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, FileNotFoundError | CheckpointError) or not isinstance(error, Exception):
            return
        if isinstance(error, PermissionError):
            raise CheckpointError(f"{self.file} may not be read ({error.strerror}): allow it") from error
        # What follows torch's first sentence is its advice to trust the file.
        reason = str(error).split(". ")[0].split("\n")[0][:300] or type(error).__name__
        raise CheckpointError(
            f"{self.file} cannot be read; it is cut short, damaged, or no checkpoint (a whole safetensors file, or "
            f"a state dict of tensors that torch.save wrote): {reason}. Fetch or copy it again"
        ) from error


def open_regular(file: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; what is no regular file is refused, and nothing is waited for."""
    # A named pipe would block until someone writes to it, were it not for O_NONBLOCK.
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.EACCES) and not file.is_file():
            raise CheckpointError(f"{file} is no regular file ({error.strerror}): remove it") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise CheckpointError(f"{file} is {kind}, where a regular file was expected: remove it")
    return open(descriptor, "rb", buffering=0)


def read_text(file: Path) -> str:
    """The text of a small file.

    Raises:
        CheckpointError: it is no regular file, too large, or no UTF-8.
    """
    with open_regular(file) as opened:
        if (size := os.fstat(opened.fileno()).st_size) > HEADER:
            raise CheckpointError(
                f"{file} has {size:,} bytes, which no index or config has; up to {HEADER:,} are read: "
                "fetch it again"
            )
        try:
            return opened.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is no text ({error}): fetch or copy it again") from None


def parse_json(
    text: str, file: str | PathLike[str], remedy: str = "fetch or copy it again"
) -> dict[str, Any]:
    """The object that a JSON text holds.

    Args:
        text: the text.
        file: what to call it in an error.
        remedy: what the user can do about it.

    Raises:
        CheckpointError: it is no JSON, nested too deeply, or something else than an object.
    """
    try:
        found = _loaded(text)
    except (ValueError, RecursionError) as error:
        what = (
            "a web page, such as a login puts in a file's place," if text.lstrip()[:1] == "<" else str(error)
        )
        raise CheckpointError(f"{file} is no JSON ({what}): {remedy}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, where {{…}} was expected: {remedy}")
    return found


def _loaded(text: str, **options: Any) -> Any:
    """What a JSON text holds, unless it could take much more memory than text: each mark may make an object."""
    if (marks := sum(text.count(mark) for mark in "[{:,")) > _MARKS:
        raise ValueError(f"it holds some {marks:,} values, and up to {_MARKS:,} are read")
    return json.loads(text, **options)


def choose_files(names: Iterable[str], where: str, read: Callable[[str], str]) -> list[str]:
    """The files with the weights among the files of one checkpoint.

    model.safetensors or its shards come before pytorch_model.bin or its shards, and both before any other file
    that is the only one with its ending.

    Args:
        names: of the files in the checkpoint's folder.
        where: the folder, for errors.
        read: returns the text of an index.

    Raises:
        CheckpointError: there are no weights, or several files and no index, or the index is none or leads out of
            the folder.
    """
    names = set(names)
    for whole in _WHOLE:
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
                "make up the checkpoint is unknown. Keep one, or name the file"
            )
    raise CheckpointError(
        f"{where} holds no weights: neither model.safetensors nor pytorch_model.bin, their shards with an index, "
        f"nor any other file ending in {', '.join(ENDINGS)}"
    )


def _shards(text: str, index: str, where: str, names: set[str]) -> list[str]:
    found = parse_json(text, f"{where}/{index}").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{where}/{index} is no index of shards, it has no weight_map: fetch it again")
    if wrong := [shard for shard in found.values() if not isinstance(shard, str)]:
        raise CheckpointError(f"{where}/{index} is no index of shards, it names {wrong[0]!r}: fetch it again")
    shards = sorted(set(found.values()))
    for shard in shards:
        if not _is_beside(shard):
            raise CheckpointError(
                f"{where}/{index} points outside its folder, to {shard!r}: it is not followed"
            )
    if missing := [shard for shard in shards if shard not in names]:
        raise CheckpointError(
            f"{where} lacks the shards {missing[:5]} ({len(missing)}) that {index} names: fetch them again"
        )
    return shards


def checkpoint_files(place: Path) -> list[Path]:
    """The weight files of the one checkpoint at a path: the file itself, or those that its folder holds.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it is neither file nor folder, or a folder that is no checkpoint.
    """
    if place.is_dir():
        with refused(place):
            names = [path.name for path in place.iterdir() if not path.is_dir()]
        return [
            place / name for name in choose_files(names, str(place), lambda name: read_text(place / name))
        ]
    if not place.exists():
        raise FileNotFoundError(f"source: there is no file or folder {place}")
    return [place]


def newest_checkpoint(path: str | PathLike[str]) -> Path:
    """The checkpoint with the highest step in a run directory; any other path as it is.

    Raises:
        FileNotFoundError: the run holds no checkpoints.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        return path
    saved = sorted((path / "checkpoints").glob("step-*.safetensors"), key=lambda file: _natural(file.name))
    if not saved:
        raise FileNotFoundError(
            f"source: the run {path} holds no checkpoints/step-*.safetensors to fit; give the model, or a file "
            "with its weights. The fits that were logged are RunLog(path).weibull()"
        )
    return saved[-1]


def config_beside(place: Path) -> Any:
    """The model's config for the checkpoint at a path; None if there is none.

    It is the config.json in its folder (or beside the folder, if the checkpoint is one), or what the run.json of
    the run that it belongs to has of the architecture.

    Raises:
        CheckpointError: a file of that name is there and cannot be used.
    """
    folder = place if place.is_dir() else place.parent
    files = [folder / "config.json", folder / "run.json", folder.parent / "run.json"]
    if place.is_dir():
        files.insert(2, folder.parent / "config.json")
    for file in files:
        if not file.exists():
            continue
        with refused(file):
            found = parse_json(read_text(file), file, "mend it, or pass config=")
        if file.name == "config.json":
            return found
        train = found.get("train")
        return train.get("architecture") if isinstance(train, dict) else None
    return None


# --- tensors ----------------------------------------------------------------------------------------------


def list_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """The float tensors of one checkpoint, of tied ones the first.

    They come in the order of their names, which is the same whatever the format: files have orders of their own.

    Raises:
        FileNotFoundError: a file is gone.
        CheckpointError: a file is damaged, two hold the same tensor, or there is none of a float type.
    """
    found = {stored.name: stored for stored in _weights_of(files)}
    return {name: found[name] for name in sorted(found, key=_natural)}


def _weights_of(files: Sequence[Path]) -> list[Stored]:
    """The same in the files' order."""
    found: dict[str, Stored] = {}
    pieces: dict[str, list[Part]] = {}
    waiting = [*files]
    for file in waiting:
        with refused(file), open_regular(file) as opened:
            state = os.fstat(opened.fileno())
        contents = _contents(file, state.st_mtime_ns, state.st_size, state.st_ino)
        for stored in contents.whole:
            if stored.name in found:
                raise CheckpointError(
                    f"{file} holds {stored.name} a second time, after {found[stored.name].file}"
                )
            found[stored.name] = stored
        for part in contents.parts:
            pieces.setdefault(part.tensor, []).append(part)
        for name in contents.beside if file in files else ():
            if not (file.parent / name).exists():
                raise CheckpointError(
                    f"{file.parent} lacks {name}, which has parts of the tensors of {file.name}: copy it there. If "
                    "the training ended while it wrote them, this snapshot is not whole"
                )
            waiting.append(file.parent / name)
    for name, parts in pieces.items():
        if name in found:
            raise CheckpointError(f"{files[0]} holds {name} whole and in parts")
        with refused(files[0]):
            found[name] = _joined(name, parts)
    if not found:
        raise CheckpointError(f"{files[0]} holds no tensor of a float type")
    return list(found.values())


def _joined(name: str, parts: Sequence[Part]) -> Stored:
    """A tensor of its parts, each weight of which must be there once."""
    boxes = {(part.offset, part.stored.shape): part for part in parts}  # copies of a part are equal
    first = parts[0]
    kinds = {(part.shape, part.stored.dtype) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"the parts of {name} are of tensors of different shapes or types")
    edges = [
        sorted({0, size, *(end for o, n in boxes for end in (o[axis], o[axis] + n[axis]))})
        for axis, size in enumerate(first.shape)
    ]
    if math.prod(len(each) - 1 for each in edges) > 64 * len(boxes) + 4096:
        raise ValueError(f"{name} is cut into too many pieces")
    covered = np.zeros([len(each) - 1 for each in edges], dtype=np.int64)
    cell = [{edge: i for i, edge in enumerate(each)} for each in edges]
    for offset, shape in boxes:
        ends = zip(cell, offset, shape, strict=True)
        covered[tuple(slice(each[o], each[o + n]) for each, o, n in ends)] += 1
    if (covered != 1).any():
        raise ValueError(f"its parts of {name} do not hold each of the weights once")
    return Stored(name, first.shape, first.stored.dtype, (), first.stored.file, 0, tuple(boxes.values()))


def _natural(name: str) -> list[Any]:
    """A key by which layer 2 comes before layer 10; digits count as a number by their length, then themselves."""
    parts: list[Any] = re.split(r"([0-9]+)", name)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = len(digits), digits
    return parts


@functools.lru_cache(maxsize=8)
def _contents(file: Path, changed: int, size: int, inode: int) -> _Contents:
    """The float tensors of one file, once for each of its versions."""
    metadata: dict[str, Any] = {}
    with refused(file), open_regular(file) as opened:
        first = opened.read(16)
        opened.seek(0)
        if first[:1] == b"<" or first.lstrip()[:1] == b"<":
            raise ValueError("it is a web page, such as a login puts in a file's place")
        if first.startswith(b"version https://"):
            raise ValueError("it is a pointer of git-lfs (git lfs pull fetches the file)")
        if file.suffix == ".safetensors" or (first[8:9] == b"{" and not first.startswith(b"PK")):
            listed = _of_safetensors(file, opened, size, metadata)
        else:
            listed = _of_saved(file, opened, size)
        found = {stored.name: stored for stored in listed if _counts(stored)}
        if "boxes" not in metadata:
            return _Contents(tuple(found.values()))
        parts = tuple(_parts(found, _loaded(metadata["boxes"])))
        beside = _loaded(metadata.get("beside", "[]"))
        if not isinstance(beside, list) or not all(map(_is_beside, beside)):
            raise ValueError("what it names beside itself are no files of its folder")
        return _Contents(tuple(found.values()), parts, tuple(beside))


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and not re.search(r"[\\/:\0]", name) and name not in ("", ".", "..")


def _parts(found: dict[str, Stored], boxes: Any) -> Iterator[Part]:
    """Take those out of the tensors of a file that are parts of others."""
    for key, (tensor, shape, offset) in boxes.items():
        stored = found.pop(key)
        numbers = (*shape, *offset)
        inside = len(shape) == len(offset) == len(stored.shape) and all(
            type(number) is int and 0 <= number < 1 << 40 for number in numbers
        )
        ends = zip(offset, stored.shape, shape, strict=False)
        if not inside or not isinstance(tensor, str) or any(o + n > size for o, n, size in ends):
            raise ValueError(f"{key} is no part of the tensor that it names")
        yield Part(tensor, tuple(shape), tuple(offset), stored)


def _counts(stored: Stored) -> bool:
    """Whether a tensor holds weights: of a float type, not empty, no buffer."""
    stored.name.encode("utf-8")  # JSON can name what no other file could: half a character
    whole = len(stored.shape) > 0 and math.prod(stored.shape) > 0
    return whole and stored.dtype in MANTISSA and not _BUFFER.search(stored.name)


def _of_safetensors(file: Path, opened: BinaryIO, size: int, metadata: dict[str, Any]) -> Iterator[Stored]:
    """Its header is 8 bytes of length and JSON; the tensors follow without a gap. Fills in its metadata."""
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header of {length:,} bytes does not fit into its {size:,}")
    if length > HEADER:
        raise ValueError(f"its header has {length:,} bytes, and up to {HEADER:,} are read")
    header = _loaded(opened.read(length).decode("utf-8"), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise TypeError(f"its header is a {type(header).__name__}")
    metadata.update(header.pop("__metadata__", None) or {})
    places = []
    for name, entry in header.items():
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has the shape {shape} and lies at {begin} to {end}")
        dtype = _SAFETENSORS.get(kind, "other")
        if dtype != "other" and end - begin != math.prod(shape) * getattr(torch, dtype).itemsize:
            raise ValueError(f"{name} is {kind} of the shape {shape} and has {end - begin:,} bytes")
        places.append((begin, end, name))
        strides = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            strides[axis - 1] = strides[axis] * max(shape[axis], 1)
        yield Stored(name, tuple(shape), dtype, tuple(strides), file, 8 + length + begin)
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached or end < begin:
            raise ValueError(
                f"{name} lies at {begin:,} to {end:,}, and what is before it ends at {reached:,}"
            )
        reached = end
    if 8 + length + reached != size:
        raise ValueError(f"it has {size:,} bytes, and its header tells of {8 + length + reached:,}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _of_saved(file: Path, opened: BinaryIO, size: int) -> Iterator[Stored]:
    """The tensors of a state dict that torch.save wrote, or of the one inside what a trainer saved."""
    state = read_saved(opened, size)
    for key in ("model", "state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise TypeError(f"it holds a {type(state).__name__}, not a state dict")
    tensors = {name: value for name, value in state.items() if isinstance(name, str)}
    for name, value in tensors.items():
        if isinstance(value, Object):
            raise TypeError(f"{name} is a {value.kind}, which is not read; save tensors alone")
    yield from stored_tensors(file, ((name, v) for name, v in tensors.items() if isinstance(v, Saved)), size)


def stored_tensors(file: Path, tensors: Iterable[tuple[str, Saved]], size: int) -> Iterator[Stored]:
    """Tensors of a file of torch.save, each place once, under their names; empty ones are left out.

    Raises:
        ValueError: one reaches beyond its storage or repeats it, or all are longer than twice the file.
    """
    seen = set()
    total = 0
    for name, (dtype, shape, strides, offset, storage) in tensors:
        count, itemsize = math.prod(shape), getattr(torch, dtype).itemsize
        if not count:
            continue
        if storage.begin is None:
            raise ValueError(f"{name} has no data in it")
        if (offset + _span(shape, strides)) * itemsize > storage.length:
            raise ValueError(f"{name} reaches beyond its storage of {storage.length:,} bytes")
        if count * itemsize > storage.length:
            raise ValueError(
                f"{name} repeats {storage.length:,} bytes over the shape {shape}: it is no tensor of weights"
            )
        view = (storage.key, offset, shape, strides)
        if view in seen:
            continue
        seen.add(view)
        total += count * itemsize
        if total > 2 * size:
            raise ValueError(
                "its tensors lie in each other: together they are more than twice as long as the file"
            )
        yield Stored(name, shape, dtype, strides, file, storage.begin + offset * itemsize)


# --- what can be fitted -----------------------------------------------------------------------------------


def read_matrices(source: Any, config: Any = None) -> tuple[list[Matrix], Any]:
    """List the float matrices of a model, state dict, checkpoint file or folder, each with a way to load it.

    Args:
        source: a torch.nn.Module; a state dict; or the path of a checkpoint file, of a folder with one checkpoint,
            or of a run directory, of which the last checkpoint is taken.
        config: the model's config; None looks for it at the source.

    Returns:
        The matrices (two or more dimensions; tied ones once), and the config or None. They come in the order of
        the source; of safetensors, which has none, by name.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: source is none of these, or holds no float matrix.
        CheckpointError: a file is damaged.
    """
    if isinstance(source, torch.nn.Module):
        config = getattr(source, "config", None) if config is None else config
        found = _of_mapping(dict(source.named_parameters()))
    elif isinstance(source, Mapping):
        found = _of_mapping(source)
    elif isinstance(source, str | PathLike):
        check_path("source", source)
        path = newest_checkpoint(source)
        files = checkpoint_files(path)
        config = config_beside(path) if config is None else config
        listed = _weights_of(files)
        if files[0].suffix == ".safetensors":  # which sorts its tensors by their names' letters
            listed.sort(key=lambda stored: _natural(stored.name))
        found = [
            Matrix(stored.name, stored.shape, getattr(torch, stored.dtype), stored.read, stored.file)
            for stored in listed
            if len(stored.shape) > 1
        ]
    else:
        raise TypeError(
            "source must be a torch.nn.Module, a state dict, or the path of a checkpoint file or folder; "
            f"got {type(source).__name__}"
        )
    if not found:
        what = str(source) if isinstance(source, str | PathLike) else type(source).__name__
        raise ValueError(f"source holds no matrix of a float type that can be counted: {what}")
    return found, config


def _of_mapping(tensors: Mapping[str, Any]) -> list[Matrix]:
    found: list[Matrix] = []
    seen = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim < 2:
            continue
        if str(tensor.dtype).removeprefix("torch.") not in MANTISSA:
            continue
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "on the device meta and has no data" if tensor.is_meta else f"of layout {tensor.layout}"
            raise TypeError(f"source: {name} is {what}; a dense tensor is needed (load it, or .to_dense())")
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if storage in seen and tensor.data_ptr():
            continue
        seen.add(storage)
        found.append(Matrix(name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor)))
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor
