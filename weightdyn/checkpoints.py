"""A series of checkpoints, measured once: what recovery needs to know of the weights of every step.

Published models come as folders or branches of checkpoints, each of which may take longer to fetch than to read.
So a series is read a tensor at a time, every step is measured on its own and stored as soon as it is done, and
what was stored is not read again: a killed measurement goes on where it stopped, and a longer series costs only
its new steps. From the hub a checkpoint is downloaded, checked against its digest, measured and deleted.

A row of the measurement is one part of one tensor at one step: its squared norm to float64, what the rounding of
the stored copy adds to it, its Weibull fit, and on request its inner products with the other steps.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from joblib import Parallel, delayed
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from weightdyn.forces import FORCE_TABLE
from weightdyn.magnitudes import PIECE, MagnitudeHistogram
from weightdyn.naming import View, describe
from weightdyn.runlog import RunLog
from weightdyn.weibull import SORTED, fit_weibull

Gram = Literal["none", "band", "full"]
Errors = Literal["raise", "skip"]

CHECKPOINT_TABLE = {
    "step": "updates done when the checkpoint was written; 0 is the initialization",
    **{name: FORCE_TABLE[name] for name in ("tensor", "layer", "component", "role", "numel")},
    "dtype": "float type that the tensor is stored in",
    "precision": "float type that its values fit into: float16 for a float32 copy of float16",
    "norm_sq": "‖W‖², accumulated in float64",
    "rounding": "expected ‖W − stored W‖² if the weights were rounded to `precision`: Σ ulp(w)²/12",
    "hash": "of the bytes of the whole stored tensor: equal for equal content",
    "k": "shape k of the Weibull law of |w|; NaN if it was not fitted",
    "lam": "scale λ of the Weibull law of |w|, in units of the weights",
    "r_squared": "R² of the straight line in the probability plot",
    "ks": "Kolmogorov-Smirnov distance between the law and the weights",
    "n": "number of magnitudes behind the fit",
    "dots": "⟨W_i, W_j⟩ with each step j of the series up to this one, i; NaN where it was not asked for",
}
"""Columns of a measured series and their meaning."""

CHUNK = 1 << 24
"""Weights of one tensor that are read at a time; a larger tensor falls into several pieces of work."""

_BUNDLE = 1 << 20  # weights of small tensors that make up one piece of work
_BATCH = 1 << 28  # bytes of whole checkpoints that are handed to the workers at a time
_GRAM = 1 << 22  # float64 numbers of all steps that inner products hold at a time, and once more in a copy

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|running_mean|running_var)$")
_STEP = re.compile(
    r"(?:^|[._-])(?:global[._-]?)?(?:step|checkpoint|ckpt|iter|update)[._-]?(\d+)(?=$|[._-])", re.IGNORECASE
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = re.compile(r"optim|scheduler|scaler|rng_state|training_args|random_states", re.IGNORECASE)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to its series; the message names the file."""


class Stored(NamedTuple):
    """Where a tensor of one checkpoint lies, and its form."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


# One checkpoint: its files, and the tensors in them.


def _choose(names: Iterable[str], where: str, read: Callable[[str], str]) -> list[str]:
    """The files with the weights among the files of one checkpoint; `read` returns the text of an index."""
    names = set(names)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if index in names:
            return _shards(read(index), index, where, names)
        if whole in names:
            return [whole]
    for ending in _WEIGHTS:
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
        f"nor any other file ending in {', '.join(_WEIGHTS)}"
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


def _contents(files: Sequence[Path]) -> dict[str, Stored]:
    """The float tensors of one checkpoint, of tied ones the first.

    They come in the order of their names, which is the same whatever the format: files have orders of their own.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, shape, dtype in _listed(file):
            if name in found:
                raise CheckpointError(f"{file} holds {name} a second time, after {found[name].file}")
            if dtype in _MANTISSA and shape and math.prod(shape) and not _BUFFER.search(name):
                found[name] = Stored(shape, dtype, file)
    if not found:
        raise CheckpointError(f"{files[0]} holds no tensor of a float type")
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[int | str]:
    """A key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _listed(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if file.suffix == ".safetensors":
        with _refused(file), safe_open(file, framework="pt") as opened:
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


class _refused:
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
    with _refused(file):
        stat = file.stat()
        with _lock:
            return _unpickled(str(file), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _unpickled(file: str, changed: int, size: int) -> Mapping[str, Any]:
    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for key in ("model", "state_dict", "module"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping):
        raise TypeError(f"it holds a {type(stored).__name__}, not a state dict")
    return stored


def _rows(file: Path, name: str) -> Callable[[int, int], Tensor]:
    """A reader of rows [start, stop) of a stored tensor."""
    if file.suffix != ".safetensors":
        tensor = _state_dict(file)[name]
        return lambda start, stop: tensor[start:stop]
    opened = safe_open(file, framework="pt")
    rows = opened.get_slice(name)  # keeps the file mapped
    return lambda start, stop: rows[start:stop]


# What is computed of them.


class _Part(NamedTuple):
    """A row of the table: a tensor, or a view of it."""

    label: str
    view: View | None
    layer: int | None
    component: str
    role: str
    numel: int


class _Sums(NamedTuple):
    """What adds up over the pieces of a part."""

    squares: float = 0.0
    spacing: float = 0.0  # Σ 4^e, with 2^e the power of two below |w|
    half_spacing: float = 0.0  # the same, e not below float16's normal range
    low: int = 0  # which of the 16 lowest bits of float32 are set anywhere
    odd: int = 0  # weights that are no power of two, counted as long as they look like float16 or bfloat16
    histogram: MagnitudeHistogram | None = None

    def __add__(self, other: Any) -> _Sums:
        mine, theirs = self.histogram, other.histogram
        return _Sums(
            self.squares + other.squares,
            self.spacing + other.spacing,
            self.half_spacing + other.half_spacing,
            self.low | other.low,
            self.odd + other.odd,
            mine + theirs if mine and theirs else mine or theirs,
        )


class _Task(NamedTuple):
    """Rows of one tensor of one checkpoint, to be measured."""

    file: Path
    name: str
    rows: tuple[int, int]
    parts: tuple[_Part, ...]


def _cut(rows: Tensor, view: View | None, start: int) -> Tensor | None:
    """The part of a view in rows of a tensor that begin at `start`, flat; None if there is none."""
    if view is None:
        return rows.reshape(-1)
    if view.axis:
        return view.of(rows).reshape(-1)
    stop = start + rows.shape[0]
    inside = [(max(low, start) - start, min(high, stop) - start) for low, high in view.ranges]
    cuts = [rows[low:high].reshape(-1) for low, high in inside if low < high]
    if len(cuts) < 2:
        return cuts[0] if cuts else None
    joined = np.concatenate(
        [cut.view(torch.uint8).numpy() for cut in cuts]
    )  # torch.cat would wake its threads
    return torch.from_numpy(joined).view(rows.dtype)


def _run(tasks: Sequence[_Task], weibull: bool) -> list[tuple[list[_Sums], bytes]] | CheckpointError:
    """Measure tasks one after another: for each the sums of its parts, and the digest of its bytes."""
    done = []
    for task in tasks:
        try:
            with _refused(task.file):
                rows = _rows(task.file, task.name)(*task.rows).contiguous()
                sums = []
                for part in task.parts:
                    cut = _cut(rows, part.view, task.rows[0])
                    sums.append(_Sums() if cut is None else _sums(cut, weibull, part.numel <= SORTED))
                data = rows.reshape(-1).view(torch.uint8).numpy().data
                done.append((sums, hashlib.sha256(data).digest()))
        except CheckpointError as error:
            return error
    return done


def _sums(flat: Tensor, weibull: bool, exact: bool) -> _Sums:
    total = _Sums()
    with np.errstate(all="ignore"):  # weights may be infinite
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE]
            if piece.dtype == torch.float64:
                total += _sums_of_double(piece.numpy())
            else:
                total += _sums_of_single(_single(piece), halves=not total.low & 0x1FFF)
    if weibull:
        histogram = MagnitudeHistogram.from_tensor(flat, sums=False, exact=exact)
        total = total._replace(histogram=histogram)
    return total


def _single(piece: Tensor) -> np.ndarray:
    """The weights as float32 without torch's threads, which would wait for each other."""
    if piece.dtype == torch.bfloat16:
        return (piece.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    return piece.numpy().astype(np.float32, copy=False)


def _sums_of_single(x: np.ndarray, halves: bool) -> _Sums:
    wide = x.astype(np.float64)
    bits = x.view(np.int32)
    power = (bits & 0x7F800000).view(np.float32)
    sums = _Sums(_squares(wide), _squares(power))
    if not halves:
        return sums._replace(low=0x1FFF)
    return sums._replace(
        half_spacing=_squares(np.maximum(power, np.float32(2.0**-14))),
        low=int(np.bitwise_or.reduce(bits) & 0xFFFF),
        odd=int(np.count_nonzero(bits & 0x7FFFFF)),
    )


def _sums_of_double(x: np.ndarray) -> _Sums:
    power = (x.view(np.int64) & 0x7FF0000000000000).view(np.float64)
    return _Sums(_squares(x), _squares(power), low=0x1FFF)


def _squares(x: np.ndarray) -> float:
    return float(np.einsum("i,i->", x, x))  # not @: BLAS would wake its threads


_SURE = 64
"""Weights with a mantissa whose low bits must all be zero before float32 counts as a copy of something coarser."""


def _row(part: _Part, sums: _Sums, dtype: str, digest: str) -> dict[str, Any]:
    precision = dtype
    if dtype == "float32" and sums.odd >= _SURE and not sums.low & 0x1FFF:
        precision = "float16" if sums.low else "bfloat16"
    spacing = sums.half_spacing if precision == "float16" else sums.spacing
    fit = fit_weibull(sums.histogram) if sums.histogram is not None else None
    return {
        "tensor": part.label,
        "layer": part.layer,
        "component": part.component,
        "role": part.role,
        "numel": part.numel,
        "dtype": dtype,
        "precision": precision,
        "norm_sq": sums.squares,
        "rounding": spacing * 4.0 ** -_MANTISSA[precision] / 12,
        "hash": digest,
        **{name: getattr(fit, name) if fit else math.nan for name in ("k", "lam", "r_squared", "ks")},
        "n": fit.n if fit else math.nan,
    }


def _inner(
    files: Sequence[Path],
    name: str,
    rows: tuple[int, int],
    parts: Sequence[_Part],
    pairs: np.ndarray | None,
    new: np.ndarray | None,
) -> np.ndarray | CheckpointError:
    """Inner products of rows of one tensor at several steps: of the pairs, or of `new` (None: all) with all.

    Returns:
        float64 of shape (parts, pairs) or (parts, new, files).
    """
    count = len(files)
    size = (len(pairs),) if pairs is not None else (count if new is None else len(new), count)
    total = np.zeros((len(parts), *size))
    try:
        readers = []
        for file in files:
            with _refused(file):
                readers.append(_rows(file, name))
        first = readers[0](rows[0], rows[0] + 1)
        height = max(1, _GRAM // count // max(1, first.numel()))
        for start in range(*rows, height):
            stop = min(start + height, rows[1])
            read = [reader(start, stop) for reader in readers]
            for i, part in enumerate(parts):
                cuts = [cut for tensor in read if (cut := _cut(tensor, part.view, start)) is not None]
                if not cuts:
                    continue
                x = np.empty((count, len(cuts[0])))
                for row, cut in zip(x, cuts, strict=True):
                    row[:] = cut.numpy() if cut.dtype == torch.float64 else _single(cut)
                if pairs is not None:
                    total[i] += np.einsum("ij,ij->i", x[pairs[:, 0]], x[pairs[:, 1]])
                elif new is None:
                    total[i] += _outer(x, x.copy(), lower=True)  # of one array with itself, BLAS has threads
                else:
                    total[i] += _outer(x[new], x)
    except CheckpointError as error:
        return error
    return total


def _outer(x: np.ndarray, y: np.ndarray, lower: bool = False) -> np.ndarray:
    """x @ y.T, or its lower triangle, in products so small that BLAS takes each on the thread that asks.

    Its own threads would multiply with those of the workers, and on a busy machine they wait for each other.
    """
    out = np.zeros((len(x), len(y)))
    for i in range(0, len(x), _TILE):
        for j in range(0, min(len(y), i + _TILE) if lower else len(y), _TILE):
            a, b = x[i : i + _TILE], y[j : j + _TILE]
            length = max(1, min(_PRODUCT // (len(a) * len(b)), x.shape[1]))
            whole = x.shape[1] // length * length
            left = a[:, :whole].reshape(len(a), -1, length).transpose(1, 0, 2)
            right = b[:, :whole].reshape(len(b), -1, length).transpose(1, 2, 0)
            out[i : i + _TILE, j : j + _TILE] = (left @ right).sum(0) + a[:, whole:] @ b[:, whole:].T
    return out


_TILE = 32  # steps whose inner products are taken in one product ...
_PRODUCT = 1 << 18  # ... of so many multiplications


# Where checkpoints are.


class _Folder:
    """Checkpoints on a disk."""

    local = keep = True
    progress = True
    hold: frozenset[int] | set[int] = frozenset()

    def __init__(self, places: dict[int, Path], name: str, cache: Path | None, config: Any) -> None:
        self.places, self.name, self.cache, self._config = places, name, cache, config

    def where(self, step: int) -> str:
        return str(self.places[step])

    def config(self) -> Any:
        """What the run says, or the config.json in or beside a checkpoint."""
        if self._config is not None:
            return self._config
        for place in self.places.values():
            for folder in (place, place.parent):
                if (folder / "config.json").is_file():
                    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return None

    def files(self, step: int) -> dict[str, int]:
        """The checkpoint's weight files by name, with their sizes in bytes."""
        return {str(path): path.stat().st_size for path in self.fetch(step)}

    def fetch(self, step: int) -> list[Path]:
        place = self.places[step]
        if place.is_file():
            return [place]
        if not place.is_dir():
            raise FileNotFoundError(f"step {step}: there is no file or folder {place}")
        names = [path.name for path in place.iterdir() if path.is_file()]
        read = lambda name: (place / name).read_text(encoding="utf-8")  # noqa: E731
        return [place / name for name in _choose(names, str(place), read)]

    def fingerprint(self, step: int) -> str:
        """Names, sizes and times of change: what a measurement that was stored is checked against."""
        stats = [(path.name, path.stat()) for path in self.fetch(step)]
        return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def release(self, steps: Collection[int] = ()) -> None:
        """Nothing: the files are the user's."""


class _Hub:
    """Checkpoints in the branches and tags of a repository on the hub, fetched one at a time."""

    local = False

    def __init__(self, repo: str, keep: bool, endpoint: str | None) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.utils
        except ImportError as error:
            raise ImportError('hf:// needs huggingface_hub: pip install "weightdyn[hf]"') from error
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._hub: Any = huggingface_hub
        self._endpoint, self.repo, self.keep = endpoint, repo, keep
        self.name = f"hf://{repo}"
        self.cache = _user_cache() / repo.replace("/", "--")
        self.folder = self.cache / "download"
        self.places: dict[int, _Revision] = {}
        self.twice: list[tuple[int, str, str]] = []
        self.hold: set[int] = set()
        self.progress = True
        self._listed: dict[int, dict[str, _Remote]] = {}
        self._chosen: dict[int, dict[str, int]] = {}
        self._here: dict[int, list[Path]] = {}
        self._lock: filelock.BaseFileLock | None = None
        refs = self._again(lambda: self._api.list_repo_refs(repo), f"the branches of {self.name}")
        for ref in (*refs.branches, *refs.tags):
            match = _REVISION.fullmatch(ref.name)
            if match is None:
                continue
            step = int(match[1])
            if step in self.places:
                self.twice.append((step, self.places[step].name, ref.name))
            else:
                self.places[step] = _Revision(ref.name, ref.target_commit)
        if not self.places:
            names = ", ".join(ref.name for ref in refs.branches[:5])
            raise FileNotFoundError(
                f"source: {self.name} has no branch named like a checkpoint (step1000, stage1-step1000-tokens5B); "
                f"it has {names}"
            )

    def where(self, step: int) -> str:
        return f"{self.name}@{self.places[step].name}"

    def config(self) -> Any:
        """The config.json of the first checkpoint."""
        if not hasattr(self, "_config"):
            step = min(self.places)
            self._config = None
            if "config.json" in self._tree(step):
                self._config = json.loads(self._read(step, "config.json"))
        return self._config

    def _tree(self, step: int) -> dict[str, _Remote]:
        if step not in self._listed:
            commit = self.places[step].commit
            listed = self._again(
                lambda: list(self._api.list_repo_tree(self.repo, revision=commit)),
                f"the files of {self.where(step)}",
            )
            self._listed[step] = {
                entry.path: _Remote(entry.size, entry.lfs.sha256 if entry.lfs else None)
                for entry in listed
                if getattr(entry, "size", None) is not None  # a file, no folder
            }
        return self._listed[step]

    def _read(self, step: int, name: str) -> str:
        return self._download(step, name, self.folder / "small").read_text(encoding="utf-8")

    def files(self, step: int) -> dict[str, int]:
        """The checkpoint's weight files by name, with their sizes in bytes."""
        if step not in self._chosen:
            tree = self._tree(step)
            names = _choose(tree, self.where(step), lambda name: self._read(step, name))
            self._chosen[step] = {name: tree[name].size for name in names}
        return self._chosen[step]

    def fetch(self, step: int) -> list[Path]:
        """The checkpoint's files on the disk; all others that were fetched are deleted, but those on `hold`."""
        if step not in self._here:
            self.release(self.hold)
            self._acquire()
            target = None if self.keep else self.folder / f"step-{step}"
            self._here[step] = [self._download(step, name, target) for name in self.files(step)]
        return self._here[step]

    def fingerprint(self, step: int) -> str:
        return self.places[step].commit

    def release(self, steps: Collection[int] = ()) -> None:
        """Delete what was fetched, but the given steps, and what a killed process left."""
        kept = set(self._here) if self.keep else set(steps)
        self._here = {step: paths for step, paths in self._here.items() if step in kept}
        _unpickled.cache_clear()
        if self.folder.is_dir():
            self._acquire()
            for path in self.folder.iterdir():
                if path.is_dir() and path.name not in {f"step-{step}" for step in self._here}:
                    shutil.rmtree(path, ignore_errors=True)
        if not steps and self._lock is not None:
            self._lock.release()
            self._lock = None

    def _acquire(self) -> None:
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise FileExistsError(
                    f"another process is downloading to {self.folder}: wait for it, or give another cache"
                ) from None
            self._lock = lock

    def _download(self, step: int, name: str, folder: Path | None) -> Path:
        """Download a file, whole and sound; a file that is neither is fetched again, a few times."""
        remote = self._tree(step)[name]
        place = {"local_dir": folder} if folder else {}
        fresh = False

        def attempt() -> Path:
            nonlocal fresh
            commit = self.places[step].commit
            with self._bars():
                path = Path(
                    self._hub.hf_hub_download(
                        self.repo,
                        name,
                        revision=commit,
                        endpoint=self._endpoint,
                        force_download=fresh,
                        **place,
                    )
                )
            fresh = True
            if path.stat().st_size != remote.size:
                raise OSError(f"it has {path.stat().st_size} bytes of {remote.size}")
            if remote.sha256 is not None and _sha256(path) != remote.sha256:
                path.unlink()
                raise OSError("its content does not have the digest that the hub says it has")
            return path

        return self._again(attempt, f"{self.where(step)}/{name}")

    @contextlib.contextmanager
    def _bars(self) -> Iterator[None]:
        """Without the client's bars where no progress is wanted."""
        utils = self._hub.utils
        silent = not self.progress and not utils.are_progress_bars_disabled()
        if silent:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if silent:
                utils.enable_progress_bars()

    def _again(self, call: Callable[[], Any], what: str) -> Any:
        """Call, a bounded number of times, until no passing fault of the network comes."""
        attempt = 1
        while True:
            try:
                return call()
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if isinstance(error, self._hub.utils.RepositoryNotFoundError):
                    raise FileNotFoundError(
                        f"source: there is no repository {self.name}, or it is private (hf auth login): {error}"
                    ) from error
                final = status is not None and 400 <= status < 500 and status not in (408, 429)
                if final or isinstance(error, ValueError) or getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                if attempt == ATTEMPTS:
                    raise CheckpointError(
                        f"{what} could not be fetched in {ATTEMPTS} attempts ({type(error).__name__}: {error}); "
                        "what was measured before is stored, and a later call goes on from there"
                    ) from error
            time.sleep(_WAIT * 2 ** (attempt - 1))
            attempt += 1


ATTEMPTS = 5
"""How often a request to the hub is made before it counts as failed."""

_WAIT = 1.0  # seconds before the second attempt; doubled each time
_REVISION = re.compile(r"(?:stage1-)?(?:global_?)?(?:step|checkpoint)[-_]?(\d+)(?:-tokens\d+[MB])?")


class _Revision(NamedTuple):
    name: str
    commit: str


class _Remote(NamedTuple):
    size: int
    sha256: str | None


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "weightdyn"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _step_of(name: str) -> int | None:
    found = _STEP.findall(name)
    return int(found[-1]) if found else None


def _scan(folder: Path) -> list[tuple[int, Path]]:
    """Steps and places of the checkpoints in a folder, by step and name."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith(".") or not (path.is_dir() or path.suffix in _WEIGHTS):
            continue
        step = _step_of(path.stem if path.is_file() else path.name)
        if step is not None:
            found.append((step, path))
    return sorted(found)


# The series.


class Checkpoints:
    """The checkpoints of one training, ordered by step, read a tensor at a time.

    Args:
        source: a run directory or `RunLog`; a folder with files or folders named step1000, step-001000,
            checkpoint-500, global_step1000, …; {step: file or folder}; or hf://owner/name, a repository on the
            hub with branches step1000, … (of OLMo's stages the first). A checkpoint is a safetensors file,
            shards with their index, pytorch_model.bin or its shards, or what torch.save wrote. Pickles are opened
            with weights_only=True alone.
        steps: the steps to take; None for all.
        config: the model's config (of transformers, or a dict), which says how fused matrices are split; None
            looks for it beside the checkpoints.
        rules: {regular expression: component} for names that are not known, as in `naming.describe`.
        errors: what to do with a checkpoint that is damaged, of other names or shapes than the first, or there
            twice: "raise" a CheckpointError that names its file, or "skip" it with a warning.
        keep: leave what is downloaded in the hub's own cache. False: at most one checkpoint is on the disk at a
            time (two for gram="band"), and none afterwards.
        endpoint: address of the hub; None for HF_ENDPOINT or the public one.

    Attributes:
        steps: the steps, ascending; those that were found to be damaged under errors="skip" drop out.
        skipped: {step: what is wrong with it}.

    Raises:
        FileNotFoundError: there is no such source, or nothing in it is a checkpoint.
        CheckpointError: two checkpoints of one step.

    >>> from safetensors.torch import save_file
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step in (0, 100):
    ...     save_file({"mlp.up_proj.weight": torch.full((8, 8), 1.0 + step)}, folder / f"step{step}.safetensors")
    >>> series = Checkpoints(folder)
    >>> series.steps, series.tensors
    ([0, 100], {'mlp.up_proj.weight': ((8, 8), 'float32')})
    >>> series.measure(weibull=False, cache=False, progress=False)["norm_sq"].tolist()
    [64.0, 652864.0]
    """

    def __init__(
        self,
        source: RunLog | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
        steps: Iterable[int] | None = None,
        *,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
        errors: Errors = "raise",
        keep: bool = False,
        endpoint: str | None = None,
    ) -> None:
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
        self.errors = errors
        self.rules = rules
        self.skipped: dict[int, str] = {}
        self._given_config = config
        self._store: _Folder | _Hub = self._open(source, keep, endpoint)
        self.steps: list[int] = sorted(self._store.places)
        if steps is not None:
            wanted = sorted({int(step) for step in steps})
            if missing := [step for step in wanted if step not in self._store.places]:
                near = min(self.steps, key=lambda step: abs(step - missing[0]))
                raise ValueError(
                    f"steps: {self._store.name} has no checkpoint of {missing[:5]}; the nearest to {missing[0]} "
                    f"is {near} ({len(self.steps)} steps from {self.steps[0]} to {self.steps[-1]})"
                )
            self.steps = wanted

    def _open(self, source: Any, keep: bool, endpoint: str | None) -> _Folder | _Hub:
        if isinstance(source, str) and source.startswith("hf://"):
            repo = source.removeprefix("hf://").strip("/")
            if repo.count("/") != 1:
                raise ValueError(f"source must be hf://owner/name, got {source!r}")
            hub = _Hub(repo, keep, endpoint)
            for step, one, other in hub.twice:
                self._fail(
                    step, CheckpointError(f"step {step} is there twice, as {one} and {other}"), gone=False
                )
            return hub
        if isinstance(source, Mapping):
            places = {int(step): Path(path) for step, path in source.items()}
            if not places:
                raise ValueError("source: the mapping {step: path} is empty")
            return _Folder(places, "the mapping given as source", None, None)
        if isinstance(source, RunLog):
            if source.path is None:
                raise ValueError("source: a run in memory has no checkpoints; give a run directory")
            source = source.path
        folder, config, run = Path(source), None, False
        if (folder / "run.json").is_file():
            run = True
            config = RunLog(folder).info.get("train", {}).get("architecture")
            folder = folder / "checkpoints"
        if not folder.is_dir():
            what = "has no folder of checkpoints" if run else "is no folder"
            raise FileNotFoundError(
                f"source: {folder} {what}; accepted are a run directory, a folder of checkpoints, {{step: path}}, "
                "and hf://owner/name"
            )
        places: dict[int, Path] = {}
        for step, path in _scan(folder):
            if step not in places:
                places[step] = path
            else:
                self._fail(
                    step,
                    CheckpointError(f"step {step} is there twice, as {places[step]} and {path}"),
                    gone=False,
                )
        if not places:
            raise FileNotFoundError(
                f"source: nothing in {folder} is named like a checkpoint (step1000, step-001000.safetensors, "
                "checkpoint-500, global_step1000, …); give {step: path} for other names"
            )
        return _Folder(places, str(folder), (folder.parent if run else folder) / "measured", config)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        span = f", {self.steps[0]}–{self.steps[-1]}" if self.steps else ""
        return f"Checkpoints({self._store.name}: {len(self.steps)} steps{span})"

    def _fail(self, step: int, error: Exception, *, gone: bool = True) -> None:
        """Raise, or note that a step is not usable."""
        if self.errors == "raise":
            raise error
        warnings.warn(f"left out: {error}", stacklevel=3)
        self.skipped[step] = str(error)
        if gone:
            self.steps = [other for other in self.steps if other != step]

    @property
    def config(self) -> Any:
        """The model's config: the one given, or the one found beside the checkpoints, or None."""
        return self._given_config if self._given_config is not None else self._store.config()

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of the first checkpoint's float tensors, by name; buffers are left out."""
        while self.steps:
            step = self.steps[0]
            try:
                found = _contents(self._store.fetch(step))
                return {name: (stored.shape, stored.dtype) for name, stored in found.items()}
            except (CheckpointError, FileNotFoundError) as error:
                self._fail(step, error)
        raise CheckpointError(f"{self._store.name} holds no checkpoint that can be read")

    def load(self, step: int, name: str) -> Tensor:
        """One tensor of one checkpoint, as it is stored.

        Raises:
            KeyError: there is no such step or tensor.
            CheckpointError: the checkpoint is damaged.
        """
        if step not in self.steps:
            raise KeyError(f"step {step} is not in the series; it has {self.steps[:5]} … {self.steps[-1:]}")
        found = _contents(self._store.fetch(step))
        if name not in found:
            raise KeyError(f"step {step} has no tensor {name!r}; it has {list(found)[:5]} …")
        with _refused(found[name].file):
            return _rows(found[name].file, name)(0, found[name].shape[0])

    # Measuring.

    def measure(
        self,
        gram: Gram = "none",
        weibull: bool = True,
        per_head: bool = False,
        *,
        n_jobs: int = -1,
        cache: str | os.PathLike[str] | bool = True,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Measure every tensor of every checkpoint, each checkpoint once.

        Steps are stored as they are done, so that a measurement that was cut short goes on where it stopped, and
        only steps that are new or whose files have changed are read.

        Args:
            gram: inner products ⟨W_i, W_j⟩ between steps i ≥ j: "none"; "band", those of neighbours and of each
                step with itself; "full", all. They take a second pass over the files, which holds 64 MB.
            weibull: fit a Weibull law to the magnitudes.
            per_head: a row for each head of q, k and v.
            n_jobs: pieces of work at a time, by threads; -1 for as many as there are cores. Under
                `joblib.parallel_config` another backend takes over: processes, or a cluster.
            cache: where measurements are stored: a folder of your own, True for `measured` in the run directory
                or in the folder of checkpoints, False for nowhere.
            progress: show a bar.

        Returns:
            The columns of `CHECKPOINT_TABLE`: one row per step and tensor, or per part of a fused tensor, sorted by
            step and then by name. `dots` holds None for gram="none"; else an array with an
            entry for each step of the series up to the row's own.

        Raises:
            CheckpointError: a checkpoint is damaged or does not belong to the series (unless errors="skip").
            OSError: the cache cannot be written.
        """
        if gram not in ("none", "band", "full"):
            raise ValueError(f"gram must be 'none', 'band' or 'full', got {gram!r}")
        if gram == "full" and not self._store.keep:
            raise ValueError(
                "gram='full' needs all checkpoints on the disk at once: give Checkpoints(…, keep=True)"
            )
        self._store.progress = progress
        folder = self._cache_folder(cache, per_head)
        parts = {step: part for step in self.steps if (part := self._stored(folder, step, weibull))}
        todo = [step for step in self.steps if step not in parts]
        sizes = self._sizes(todo)
        bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not progress, desc="measure")
        try:
            with bar, Parallel(n_jobs=n_jobs, prefer="threads") as work:
                for batch in self._batches(todo, sizes):
                    if gram == "band":
                        self._store.hold = set([step for step in self.steps if step < batch[0]][-1:])
                    for step, part in self._measured(work, batch, parts, weibull, per_head):
                        parts[step] = part
                        part.write(folder)
                    if gram == "band" and not self._store.keep:
                        self._add_dots(work, parts, gram, per_head, folder, batch, progress=False)
                    bar.update(sum(sizes[step] for step in batch))
                if gram != "none":
                    for steps in [self.steps] if self._store.keep else [[step] for step in self.steps]:
                        self._add_dots(work, parts, gram, per_head, folder, steps, progress)
        finally:
            self._store.hold = set()
            self._store.release()
        table = _table([parts[step] for step in self.steps], gram, weibull)
        if same := identical_steps(table):
            listed = ", ".join(" = ".join(map(str, steps)) for steps in same[:5])
            warnings.warn(f"{self._store.name}: some steps hold identical weights: {listed}", stacklevel=2)
        return table

    def plan(
        self,
        weibull: bool = True,
        per_head: bool = False,
        *,
        cache: str | os.PathLike[str] | bool = True,
        progress: bool = True,
    ) -> pd.DataFrame:
        """What `measure` with these arguments would read, or download, before it does.

        Returns:
            One row per step: `step`, `place` (path or revision), `files` (number of weight files), `bytes`, and
            `measured`: whether it is stored already, so that nothing of it would be read. A checkpoint without
            weights has no files.
        """
        folder = self._cache_folder(cache, per_head)
        rows = []
        for step in tqdm(self.steps, unit="checkpoint", disable=not progress, desc="plan"):
            try:
                files = self._store.files(step)
            except (CheckpointError, FileNotFoundError):
                files = {}
            measured = self._stored(folder, step, weibull) is not None
            rows.append((step, self._store.where(step), len(files), sum(files.values()), measured))
        return pd.DataFrame(rows, columns=["step", "place", "files", "bytes", "measured"])

    def _cache_folder(self, cache: str | os.PathLike[str] | bool, per_head: bool) -> Path | None:
        """Where the measurements of these views lie; None for nowhere."""
        folder = self._store.cache if cache is True else None if cache is False else Path(cache)
        if folder is not None and isinstance(self._store, _Hub):
            self._store.folder = folder / "download"
        if folder is None:
            return None
        config = self.config
        config = config.to_dict() if hasattr(config, "to_dict") else config
        views = json.dumps([per_head, self.rules, config], sort_keys=True, default=str)
        return folder / hashlib.sha256(views.encode()).hexdigest()[:12]

    def _stored(self, folder: Path | None, step: int, weibull: bool) -> _Measured | None:
        """The measurement of a step that was stored, if it still holds and has what is asked for."""
        if folder is None:
            return None
        part = _Measured.read(folder, step)
        if part is None or (weibull and not part.weibull):
            return None
        try:
            return part if part.fingerprint == self._store.fingerprint(step) else None
        except (CheckpointError, FileNotFoundError):
            return None  # measuring it will say what is wrong

    def _sizes(self, steps: Sequence[int]) -> dict[int, int]:
        """Bytes of each step; from the hub, to save requests, the first step's for all."""
        if not self._store.local and steps:
            return dict.fromkeys(steps, self._size(steps[0]))
        return {step: self._size(step) for step in steps}

    def _size(self, step: int) -> int:
        try:
            return sum(self._store.files(step).values())
        except (CheckpointError, FileNotFoundError):
            return 0

    def _batches(self, steps: Sequence[int], sizes: Mapping[int, int]) -> Iterator[list[int]]:
        """Steps that are measured at a time: one from the hub, as many as fill the workers from a disk."""
        batch: list[int] = []
        for step in steps:
            batch.append(step)
            if not self._store.local or sum(sizes[other] for other in batch) >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _parts(self, layout: Mapping[str, Sequence[int]], per_head: bool) -> dict[str, tuple[_Part, ...]]:
        """The rows that each tensor has."""
        config, found = self.config, {}
        for name, shape in layout.items():
            known = describe(name, shape, config, per_head=per_head, rules=self.rules)
            found[name] = tuple(
                _Part(f"{name}[{view.name}]", view, known.layer, view.component, view.role, view.numel(shape))
                for view in known.views
            ) or (_Part(name, None, known.layer, known.component, known.role, math.prod(shape)),)
        return found

    def _measured(
        self,
        work: Parallel,
        batch: Sequence[int],
        parts: Mapping[int, _Measured],
        weibull: bool,
        per_head: bool,
    ) -> Iterator[tuple[int, _Measured]]:
        """Measure the steps of a batch; yields each that is sound."""
        found: dict[int, dict[str, Stored]] = {}
        for step in batch:
            try:
                found[step] = _contents(self._store.fetch(step))
                first = min([*parts, *found])
                layout = parts[first].layout if first in parts else _layout(found[first])
                _check_same(step, found[step], first, layout)
            except (CheckpointError, FileNotFoundError) as error:
                found.pop(step, None)
                self._fail(step, error)
        bundles: list[tuple[int, list[_Task]]] = []
        for step, contents in found.items():
            rows = self._parts(_layout(contents), per_head)
            size = _BUNDLE
            for name, stored in contents.items():
                for start, stop in _pieces(stored.shape):
                    if size >= _BUNDLE:
                        bundles.append((step, []))
                        size = 0
                    bundles[-1][1].append(_Task(stored.file, name, (start, stop), rows[name]))
                    size += math.prod(stored.shape) * (stop - start) // stored.shape[0]
        results = work(delayed(_run)(tasks, weibull) for _, tasks in bundles)
        for step, contents in found.items():
            tensors: dict[str, tuple[list[_Sums], list[bytes]]] = {}
            broken = None
            for (owner, tasks), result in zip(bundles, results, strict=True):
                if owner != step:
                    continue
                if isinstance(result, CheckpointError):
                    broken = result
                    break
                for task, (sums, digest) in zip(tasks, result, strict=True):
                    if task.name in tensors:
                        known, digests = tensors[task.name]
                        tensors[task.name] = (
                            [a + b for a, b in zip(known, sums, strict=True)],
                            [*digests, digest],
                        )
                    else:
                        tensors[task.name] = sums, [digest]
            if broken is not None:
                self._fail(step, broken)
                continue
            layout = _layout(contents)
            rows = [
                _row(part, sums, contents[name].dtype, _joined(tensors[name][1]))
                for name, parts_ in self._parts(layout, per_head).items()
                for part, sums in zip(parts_, tensors[name][0], strict=True)
            ]
            yield (
                step,
                _Measured(step, self._store.fingerprint(step), weibull, layout, pd.DataFrame(rows), {}),
            )

    def _add_dots(
        self,
        work: Parallel,
        parts: dict[int, _Measured],
        gram: Gram,
        per_head: bool,
        folder: Path | None,
        asked: Sequence[int],
        progress: bool,
    ) -> None:
        """Measure the inner products of the steps asked for that are wanted and not stored yet."""
        steps = self.steps
        wanted = {
            step: steps[max(0, i - 1) : i] if gram == "band" else steps[:i] for i, step in enumerate(steps)
        }
        missing = {
            step: [other for other in others if not parts[step].knows(parts[other])]
            for step, others in wanted.items()
            if step in asked and step in parts
        }
        new = [step for step in steps if missing.get(step)]
        if not new:
            return
        needed = sorted({*new, *(other for others in missing.values() for other in others)})
        place = {step: i for i, step in enumerate(needed)}
        self._store.hold = set(needed)
        found = {step: _contents(self._store.fetch(step)) for step in needed}
        layout = _layout(found[needed[0]])
        rows = self._parts(layout, per_head)
        pairs = None
        if gram == "band":
            pairs = np.array([(place[step], place[missing[step][0]]) for step in new])
        against = (
            None if len(new) == len(needed) or pairs is not None else np.array([place[step] for step in new])
        )
        jobs = [(name, piece) for name, shape in layout.items() for piece in _pieces(shape)]
        bar = tqdm(jobs, unit="tensor", disable=not progress, desc="inner products")
        results = work(
            delayed(_inner)(
                [found[step][name].file for step in needed], name, piece, rows[name], pairs, against
            )
            for name, piece in bar
        )
        totals: dict[str, np.ndarray] = {}
        for (name, _), result in zip(jobs, results, strict=True):
            if isinstance(result, CheckpointError):
                raise result
            totals[name] = totals[name] + result if name in totals else result
        total = np.concatenate([totals[name] for name in layout])
        for i, step in enumerate(new):
            for other in missing[step]:
                dots = (
                    total[:, i]
                    if pairs is not None
                    else total[:, place[step] if against is None else i, place[other]]
                )
                parts[step].dots[other] = (parts[other].fingerprint, dots)
            parts[step].write(folder)


def _layout(contents: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in contents.items()}


def _pieces(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor, each of at most `CHUNK` weights."""
    height = max(1, CHUNK * shape[0] // math.prod(shape))
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


def _joined(digests: Sequence[bytes]) -> str:
    """Hash of a tensor: of its bytes, or of the hashes of its pieces."""
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
    return whole.hex()[:32]


def _check_same(
    step: int, contents: Mapping[str, Stored], first: int, layout: Mapping[str, Sequence[int]]
) -> None:
    """Raise if a checkpoint does not have the names and shapes of the first."""
    file = next(iter(contents.values())).file
    missing, strange = [n for n in layout if n not in contents], [n for n in contents if n not in layout]
    if missing or strange:
        raise CheckpointError(
            f"{file} (step {step}) has other tensors than step {first}: it lacks {missing[:3]} ({len(missing)}) "
            f"and has {strange[:3]} ({len(strange)}) besides; is it of another model?"
        )
    for name, stored in contents.items():
        if tuple(stored.shape) != tuple(layout[name]):
            raise CheckpointError(
                f"{stored.file} (step {step}): {name} has the shape {tuple(stored.shape)}, and in step {first} "
                f"{tuple(layout[name])}; is it of another model?"
            )


class _Measured:
    """The measurement of one step, in memory and as a Parquet file."""

    def __init__(
        self,
        step: int,
        fingerprint: str,
        weibull: bool,
        layout: Mapping[str, Sequence[int]],
        rows: pd.DataFrame,
        dots: dict[int, tuple[str, np.ndarray]],
    ) -> None:
        self.step, self.fingerprint, self.weibull, self.layout = step, fingerprint, weibull, layout
        self.rows = rows  # the columns from tensor to n
        self.dots = dots  # step j -> its fingerprint, and ⟨W_i, W_j⟩ of each row

    def knows(self, other: _Measured) -> bool:
        """Whether the inner products with another step are there, and of its present content."""
        return other.step in self.dots and self.dots[other.step][0] == other.fingerprint

    @staticmethod
    def path(folder: Path, step: int) -> Path:
        return folder / f"step-{step:06d}.parquet"

    def write(self, folder: Path | None) -> None:
        """Put the measurement under its name whole or not at all."""
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "weibull": self.weibull,
            "layout": self.layout,
            "partners": [[step, fingerprint] for step, (fingerprint, _) in self.dots.items()],
        }
        dots = (
            np.array([values for _, values in self.dots.values()]).reshape(len(self.dots), len(self.rows)).T
        )
        arrays = [pa.array([self.step] * len(self.rows), pa.int64())]
        fields = [pa.field("step", pa.int64(), metadata={"meaning": CHECKPOINT_TABLE["step"]})]
        for name in [name for name in CHECKPOINT_TABLE if name not in ("step", "dots")]:
            array = pa.array(self.rows[name], _TYPES.get(name, pa.float64()), from_pandas=True)
            arrays.append(array)
            fields.append(pa.field(name, array.type, metadata={"meaning": CHECKPOINT_TABLE[name]}))
        arrays.append(pa.array(list(dots), pa.list_(pa.float64())))
        fields.append(
            pa.field("dots", arrays[-1].type, metadata={"meaning": "⟨W_i, W_j⟩ with each partner j"})
        )
        schema = pa.schema(fields, metadata={"weightdyn": json.dumps(about)})
        path = self.path(folder, self.step)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, step: int) -> _Measured | None:
        """What was stored of a step; None if nothing was, or nothing that can be read."""
        try:
            table = pq.read_table(cls.path(folder, step))
            about = json.loads(table.schema.metadata[b"weightdyn"])
            if about["format"] != FORMAT:
                return None
            dots = np.array(table["dots"].to_pylist(), dtype=np.float64).reshape(table.num_rows, -1)
            partners = {
                int(other): (fingerprint, dots[:, i])
                for i, (other, fingerprint) in enumerate(about["partners"])
            }
            rows = table.drop_columns(["step", "dots"]).to_pandas()
            return cls(step, about["fingerprint"], about["weibull"], about["layout"], rows, partners)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
            return None


FORMAT = 1
"""Version of the stored measurements; others are measured again."""

_TYPES = {
    **dict.fromkeys(("tensor", "component", "role", "dtype", "precision", "hash"), pa.string()),
    "layer": pa.int64(),
    "numel": pa.int64(),
}


def _table(parts: Sequence[_Measured], gram: Gram, weibull: bool) -> pd.DataFrame:
    """The table of all steps."""
    frames = []
    for i, part in enumerate(parts):
        rows = part.rows.copy()
        rows.insert(0, "step", part.step)
        dots: list[Any] = [None] * len(rows)
        if gram != "none":
            values = np.full((len(rows), i + 1), np.nan)
            values[:, i] = rows["norm_sq"]
            for j in range(max(0, i - 1) if gram == "band" else 0, i):
                values[:, j] = part.dots[parts[j].step][1]
            dots = list(values)
        column = pd.Series([None] * len(rows), dtype=object)
        column[:] = dots
        frames.append(rows.assign(dots=column))
    table = pd.concat(frames, ignore_index=True)[list(CHECKPOINT_TABLE)]
    table = table.astype({"layer": "Int64", "n": "float64"})
    for name in ("tensor", "component", "role"):
        table[name] = pd.Categorical(table[name], categories=list(dict.fromkeys(table[name])))
    if not weibull:
        table[["k", "lam", "r_squared", "ks", "n"]] = np.nan
    return table


def identical_steps(table: pd.DataFrame) -> list[list[int]]:
    """Groups of steps whose checkpoints hold the same weights, tensor by tensor.

    Steps 0 and 1 are such where the first update is taken at a learning rate of zero; otherwise one of them is a
    copy under a wrong name, as some published branches are.

    Args:
        table: as `Checkpoints.measure` returns it.

    >>> pd.DataFrame({"step": [0, 1, 2], "tensor": "w", "hash": ["a", "a", "b"]}).pipe(identical_steps)
    [[0, 1]]
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for step, rows in table.groupby("step", sort=True):
        groups.setdefault(tuple(rows["hash"]), []).append(int(step))  # type: ignore[arg-type]  # a group's key
    return [steps for steps in groups.values() if len(steps) > 1]
