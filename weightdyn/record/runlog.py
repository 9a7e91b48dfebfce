"""A run directory: written while a model trains, read at any time, resumed after any death.

Rows are appended in memory and stored by `flush` as small Parquet files, *parts*: written to a temporary
name, synced, renamed. So a file is there whole or not at all, a reader needs no lock, and a killed process
loses at most the rows that were not flushed. Nothing that was stored is ever changed, or deleted without being told
to (`overwrite`).

Training goes back when it resumes from a checkpoint. Every such start opens a new *session*, which supersedes
what earlier sessions recorded behind the update it starts from, from the moment its first part is stored.

    run.json                              format, versions, optimizer, tensor table, sessions
    forces/part-<session>-<seq>.parquet   and the same in weibull/ and metrics/

What is stored of the forces are the three inner products after the step. The forces are computed from them
when they are read (`force_table`), so their formula stands in one place, `weightdyn.core.forces`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import math
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from weightdyn.core.checks import check_flag, check_path, check_whole, shown
from weightdyn.core.forces import At, Order
from weightdyn.core.tables import (
    FORCE_TABLE,
    WEIBULL_TABLE,
    By,
    aggregate,
    force_table,
    in_model_order,
    named_columns,
)
from weightdyn.files.durable import lock_folder, sync_folder, write_file
from weightdyn.files.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import filelock


KINDS = ("forces", "weibull", "metrics")
"""What a run holds, each in a folder of its own."""

FORMAT = 1
"""Version of the layout of a run directory; a reader refuses a newer one."""

_TENSOR = pa.dictionary(pa.int32(), pa.string())


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


_SCHEMAS = {
    "forces": pa.schema(
        [
            _field("step", pa.int64(), FORCE_TABLE["step"]),
            _field("span", pa.int32(), FORCE_TABLE["span"]),
            _field("tensor", _TENSOR, FORCE_TABLE["tensor"]),
            _field("lr", pa.float64(), FORCE_TABLE["lr"]),
            _field("weight_decay", pa.float64(), FORCE_TABLE["weight_decay"]),
            _field("dot_wu", pa.float64(), "⟨w,u⟩ with w before the update and u = m̂/(√v̂+ε) of it"),
            _field("u_sq", pa.float64(), "‖u‖²"),
            _field("norm_sq", pa.float64(), FORCE_TABLE["norm_sq"]),
            _field("norm_sq_after", pa.float64(), "‖w'‖², after the update"),
            _field("norm_sq_audit", pa.float64(), "‖w‖² measured before the update; NaN unless audited"),
            _field("m_rms", pa.float32(), "root mean square of m̂, in units of the gradient"),
            _field("v_mean", pa.float32(), "mean of v̂, in squared units of the gradient"),
            _field("u_max", pa.float32(), "max |u|"),
            _field("dot_wg", pa.float64(), "⟨w,g̃⟩ with w before the update and its gradient in units of u"),
            _field("dot_ug", pa.float64(), "⟨u,g̃⟩"),
            _field("g_sq", pa.float64(), "‖g̃‖²"),
            _field("lr_memory", pa.float64(), "Σ β₁ˢη over the updates before, as white noise is remembered"),
            _field("fresh", pa.float64(), "share of the fresh gradient in u"),
        ]
    ),
    "weibull": pa.schema(
        [
            _field("step", pa.int64(), WEIBULL_TABLE["step"]),
            _field("tensor", _TENSOR, FORCE_TABLE["tensor"]),
            *(_field(name, pa.float64(), WEIBULL_TABLE[name]) for name in ("lam", "k", "r_squared", "ks")),
            _field("n", pa.int64(), WEIBULL_TABLE["n"]),
        ]
    ),
}

_METRICS = pa.schema([_SCHEMAS["forces"].field("step")])  # and whatever was recorded, of these types:

_METRIC_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
"""Types of a metric, each wide enough for those before it."""

STORED = {kind: tuple(schema.names) for kind, schema in _SCHEMAS.items()}
"""Names of the stored columns of each kind with a fixed schema."""

_DRIFT = ("dot_wg", "dot_ug", "g_sq", "lr_memory", "fresh")

_DEFAULTS = {"span": 1, **dict.fromkeys(("norm_sq_audit", "m_rms", "v_mean", "u_max", *_DRIFT), math.nan)}
"""Columns that a writer may leave out."""


_INFO_BYTES = 1 << 28
"""A run.json is smaller than this."""

_OWN_SECTIONS = ("checksum", "format", "weightdyn", "created", "versions", "sessions")


class RunLogError(ValueError):
    """A run directory that cannot be read or written as it is; the message names the file and the remedy."""


# ----------------------------------------------------------------------------------------------------------
# Where a run lives: a folder, or memory. Both store whole parts, by session, number and kind, and run.json.


class _Part(NamedTuple):
    session: int
    seq: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.kind}/part-{self.session:04d}-{self.seq:06d}.parquet"


class _Memory:
    """The parts of a run that has no directory."""

    path = None

    def __init__(self) -> None:
        self._info = ""
        self._parts: dict[_Part, pa.Table] = {}

    def info(self) -> dict[str, Any]:
        return json.loads(self._info)

    def has_info(self) -> bool:
        return bool(self._info)

    def write_info(self, info: dict[str, Any]) -> None:
        self._info = json.dumps(info)

    def parts(self, kind: str) -> list[_Part]:
        return sorted(part for part in self._parts if part.kind == kind)

    def name(self, part: _Part) -> str:
        return part.name

    def read(self, part: _Part, columns: Sequence[str] | None = None) -> pa.Table:
        table = self._parts[part]
        return table if columns is None else table.select(columns)

    def write(self, part: _Part, table: pa.Table) -> None:
        self._parts[part] = table


class _Folder:
    """The parts of a run in a directory."""

    _PART = re.compile(r"part-([0-9]{4,5})-([0-9]{6,9})\.parquet")
    _TEMPORARY = re.compile(r"\.(run\.json|part-[0-9]{4,5}-[0-9]{6,9}\.parquet)\.tmp")
    _SNAPSHOT = re.compile(r"(step-[0-9]{6,}|part-[0-9]{6,}-[0-9]{5,})\.safetensors")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info_path = path / "run.json"

    def info(self) -> dict[str, Any]:
        if not self.has_info():
            raise FileNotFoundError(_no_run(self.path))
        try:
            if not self.info_path.is_file():
                raise ValueError("it is not a regular file")
            if self.info_path.stat().st_size > _INFO_BYTES:
                raise ValueError(f"it is larger than {_INFO_BYTES:,} bytes")
            info = json.loads(self.info_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(_no_run(self.path)) from None
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        if not isinstance(info, dict) or "weightdyn" not in info or type(info.get("format")) is not int:
            raise RunLogError(
                f"{self.info_path} was not written by weightdyn (it lacks 'format' and 'weightdyn'): "
                "give the directory of a run, or record into another one"
            )
        if info["format"] > FORMAT:
            raise RunLogError(
                f"{self.info_path} has format {info['format']}, written by weightdyn {info['weightdyn']}; this is "
                f"weightdyn {_version('weightdyn')}, which knows formats up to {FORMAT}: "
                "pip install --upgrade weightdyn"
            )
        try:
            _check_info(info)
            checksum = info.pop("checksum", None)
            changed = checksum is not None and checksum != _checksum(info)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from None
        if changed:
            raise RunLogError(
                f"{self.info_path} was changed after it was written (its checksum does not fit): copy it again "
                "from where the run was written. If you changed it yourself, delete its line 'checksum'"
            )
        return info

    def _damaged(self, error: Exception) -> RunLogError:
        return RunLogError(
            f"{self.info_path} is cut short or damaged ({error}): copy it again from where the run was "
            "written, or from a backup. The parts beside it are files of their own and not affected; "
            "pandas.read_parquet reads each"
        )

    def has_info(self) -> bool:
        return os.path.lexists(self.info_path)

    def write_info(self, info: dict[str, Any]) -> None:
        text = json.dumps({**info, "checksum": _checksum(info)}, indent=1) + "\n"
        write_file(self.info_path, lambda path: path.write_text(text, encoding="utf-8"))

    def parts(self, kind: str) -> list[_Part]:
        try:
            names = os.listdir(self.path / kind)
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise RunLogError(
                f"{self.path / kind} is a file, where a run has a folder: move it out of the directory"
            ) from None
        matches = filter(None, map(self._PART.fullmatch, names))
        return sorted(_Part(int(match[1]), int(match[2]), kind) for match in matches)

    def name(self, part: _Part) -> str:
        return str(self.path / part.name)

    def read(self, part: _Part, columns: Sequence[str] | None = None) -> pa.Table:
        path = self.path / part.name
        schema = _SCHEMAS.get(part.kind, _METRICS)
        names = [] if part.kind == "metrics" else schema.names
        try:
            wanted = columns or names
            table = read_parquet(path, wanted or None, schema=schema, optional=_DEFAULTS)
            if "step" not in table.column_names:
                raise ValueError(f"{path} lacks the column 'step'")
            if part.kind == "metrics":
                for field in table.schema:
                    if field.type not in _METRIC_TYPES.values():
                        raise ValueError(f"{path} has {field.type} in the column {field.name!r}")
            for name in (
                wanted if part.kind == "forces" else ()
            ):  # what was not recorded yet when it was written
                if name not in table.column_names:
                    default = pa.scalar(_DEFAULTS[name], schema.field(name).type)
                    table = table.append_column(schema.field(name), pa.repeat(default, len(table)))
        except FileNotFoundError:
            raise RunLogError(f"{path} was removed while the run was read: read it again") from None
        except ValueError as error:
            raise RunLogError(
                f"{error}: copy it again from where the run was written, or move it out of the directory to read "
                "the run without its rows"
            ) from None
        return table

    def write(self, part: _Part, table: pa.Table) -> None:
        path = self.path / part.name
        if not path.parent.is_dir():
            path.parent.mkdir()
            sync_folder(self.path)
        write_parquet(path, table)

    def remove_leftovers(self) -> None:
        """Delete the temporary files of writers that were killed; only the holder of the lock may."""
        for folder in (self.path, *(self.path / kind for kind in KINDS)):
            names = os.listdir(folder) if folder.is_dir() else []
            for name in filter(self._TEMPORARY.fullmatch, names):
                (folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the run, but no file of anybody else; only the holder of the lock may.

        run.json goes first: what is left of a run whose removal was interrupted is no run, and not one with holes.
        """
        self.info_path.unlink(missing_ok=True)
        sync_folder(self.path)
        snapshots = self.path / "snapshots"
        names = os.listdir(snapshots) if snapshots.is_dir() else []
        files = [self.path / part.name for part in _all_parts(self)]
        files += [snapshots / name for name in names if self._SNAPSHOT.fullmatch(name)]
        for file in files:
            file.unlink(missing_ok=True)
        for folder in {file.parent for file in files}:
            sync_folder(folder)


def _checksum(info: Mapping[str, Any]) -> str:
    """CRC-32 of the content, however it is laid out."""
    return f"{zlib.crc32(json.dumps(info, sort_keys=True).encode()):08x}"


def _check_info(info: Mapping[str, Any]) -> None:
    """Raise a ValueError if a section of run.json that is read here is not of the form that is written."""

    def require(good: bool, what: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{what}, got {shown(value)}")

    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    sessions = info.get("sessions", [])
    require(isinstance(sessions, list), "'sessions' must be a list", sessions)
    for session in sessions:
        good = isinstance(session, dict) and whole(session.get("start_step"))
        require(good, "each of 'sessions' must have a 'start_step', a whole number", session)
    tensors = info.get("tensors", {})
    require(isinstance(tensors, dict), "'tensors' must name them", tensors)
    for label, entry in tensors.items():
        require(isinstance(entry, dict), f"the entry of {label} must have sections", entry)
        for name in ("layer", "numel"):
            value = entry.get(name)
            require(value is None or whole(value), f"{name} of {label} must be a whole number or null", value)
        for name in ("stack", "component", "role"):
            value = entry.get(name, "")
            require(isinstance(value, str), f"{name} of {label} must be a string", value)


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist: give the directory that a run was recorded into"
    return f"{path / 'run.json'} does not exist, so {path} is no run: give the directory passed as `out`"


def _lock(folder: Path) -> filelock.BaseFileLock | None:
    """Hold `folder` for one writer; None where the file system knows no locks."""
    try:
        return lock_folder(folder)
    except BlockingIOError:
        raise RunLogError(
            f"{folder} is being written by another logger, which holds {folder / '.lock'}: close that one, or "
            "choose another out (several optimizers: give one logger the list of them; processes that share no "
            "tensor, as stages of a pipeline: an out for each). If nothing writes there (file systems without "
            "locks), delete .lock"
        ) from None


@functools.cache
def _version(name: str) -> str:
    try:
        return _installed(name)
    except PackageNotFoundError:
        return "unknown"


# ----------------------------------------------------------------------------------------------------------
# Rows on their way in: mappings of columns become arrays, arrays become an Arrow table.


def _rows(kind: str, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Check the columns of one `append` and bring them to one length; scalars are repeated."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if kind == "metrics":
        if "step" not in columns:
            raise ValueError(f"metrics need a step, got only {list(columns)}")
        arrays = {_text(name): _metric(name, value) for name, value in columns.items() if name != "step"}
        step = _column(kind, _SCHEMAS["forces"].field("step"), columns["step"])
        lists = [name for name, array in arrays.items() if array.ndim and not step.ndim]
        if lists:
            raise TypeError(
                f"metrics {lists} have several values for the one step {step}: record one number each"
            )
        arrays = {"step": step, **arrays}
    else:
        schema = _SCHEMAS[kind]
        missing = [name for name in schema.names if name not in columns and name not in _DEFAULTS]
        unknown = [name for name in columns if name not in schema.names]
        if missing or unknown:
            raise ValueError(
                f"{kind} rows have the columns {schema.names}; missing {missing}, unknown {unknown}"
            )
        values = {**_DEFAULTS, **columns}
        arrays = {field.name: _column(kind, field, values[field.name]) for field in schema}
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of {kind} must have one length or be scalars, got the lengths {lengths}")
    length = next(iter(lengths.values()), 1)
    return {name: np.broadcast_to(array, (length,)) for name, array in arrays.items()}


def _column(kind: str, field: pa.Field, value: Any) -> np.ndarray:
    """Copy of `value` (the caller may reuse its array) in the type of `field`, 0- or 1-dimensional."""
    if field.type == _TENSOR:
        array = np.array(value, dtype=object)
        if wrong := [name for name in array.flat if not isinstance(name, str)]:
            raise TypeError(f"{kind} column 'tensor' must hold strings, got {wrong[0]!r}")
    else:
        array = np.asarray(value)
        dtype = np.dtype(field.type.to_pandas_dtype())
        if array.size and not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise TypeError(
                f"{kind} column {field.name!r} must hold {field.type}, got {array.dtype}: {value!r}"
            )
        with np.errstate(over="ignore"):  # beyond float32 is inf, which is what was recorded
            array = array.astype(dtype)
    if array.ndim > 1:
        raise ValueError(f"{kind} column {field.name!r} must be a scalar or 1-D, got the shape {array.shape}")
    return array


def _metric(name: str, value: Any) -> np.ndarray:
    """Values of a metric as an object array, 0- or 1-dimensional; None stands for not recorded."""
    if hasattr(value, "tolist"):  # NumPy, pandas, torch
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return np.array(_number_or_text(name, value), dtype=object)
    array = np.empty(len(value), dtype=object)
    array[:] = [_number_or_text(name, item) for item in value]
    return array


def _number_or_text(name: str, value: Any) -> bool | int | float | str | None:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(
                f"metric {name!r} is {value}, which needs more than 64 bits: record it as a string"
            )
        return value
    if isinstance(value, str):
        return _text(value)
    raise TypeError(
        f"metric {name!r} must be a number, a string or None, got {type(value).__name__}: {value!r}"
    )


def _text(value: str) -> str:
    """`value` without what UTF-8 cannot hold, which would make every later flush fail."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _widest(types: Iterable[pa.DataType]) -> pa.DataType:
    return max(types, key=list(_METRIC_TYPES.values()).index)


def _arrow_table(kind: str, chunks: list[dict[str, np.ndarray]]) -> pa.Table:
    """One Arrow table of the rows of all chunks, in order."""
    if kind == "metrics":
        return _metrics_table(chunks)
    arrays = []
    for field in _SCHEMAS[kind]:
        values = np.concatenate([chunk[field.name] for chunk in chunks])
        if field.type == _TENSOR:
            arrays.append(pa.array(values, pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=_SCHEMAS[kind])


def _metrics_table(chunks: list[dict[str, np.ndarray]]) -> pa.Table:
    """The same for metrics: each chunk has its own columns, and each column the widest type of its values."""
    fields = [_SCHEMAS["forces"].field("step")]
    arrays = [pa.array(np.concatenate([chunk["step"] for chunk in chunks]))]
    for name in dict.fromkeys(name for chunk in chunks for name in chunk if name != "step"):
        values = [item for chunk in chunks for item in chunk.get(name, [None] * len(chunk["step"]))]
        python_types = [next(t for t in _METRIC_TYPES if isinstance(v, t)) for v in values if v is not None]
        if not python_types:
            continue
        python_type = max(python_types, key=list(_METRIC_TYPES).index)
        field = _field(name, _METRIC_TYPES[python_type], "as recorded by the training script")
        fields.append(field)
        arrays.append(pa.array([None if v is None else python_type(v) for v in values], field.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


class RunWriter:
    """Records one run: one writer for a directory at a time, any number of readers beside it.

    Args:
        path: the run directory, made if it does not exist; None keeps the run in memory.
        start_step: updates done before this training starts (0: from the beginning). Rows of earlier sessions
            behind it are superseded once the first rows of this session are stored.
        info: first sections for `describe`.
        overwrite: where a training from 0 on meets a run, remove that run when its own first row comes, instead of
            refusing. A session that starts from a later update goes on in it all the same. Other files stay.

    Raises:
        RunLogError: another writer holds the directory, or it is not (readable as) a run's.
        NotADirectoryError: `path` is a file.
        TypeError, ValueError: `path` is empty or none; `start_step` is negative; `overwrite` is no flag.

    >>> writer = RunWriter(None)
    >>> writer.append("metrics", {"step": 1, "loss": 5.5})
    >>> writer.run().metrics()
       step  loss
    0     1   5.5
    """

    def __init__(
        self,
        path: str | Path | None,
        start_step: int = 0,
        info: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self._buffers: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in KINDS}
        self._closed = False
        self._lock: filelock.BaseFileLock | None = None
        self._overwrite = check_flag("overwrite", overwrite)
        self._store: _Memory | _Folder = (
            _Memory()
            if path is None
            else _Folder(check_path("path", path, "a directory's path, or None for memory").absolute())
        )
        self._open_session(start_step)
        self._sections: dict[str, Any] = {}  # described since
        self._unsaved = True
        try:
            self._stored = self._opened()  # what run.json had before
            # A start at 0 may still become a resume (the optimizer's state is often loaded later), so whether
            # it is allowed on top of stored rows is decided when the first row comes.
            used = bool(_all_parts(self._store)) or (self._overwrite and self._store.has_info())
            self._undecided = self._start == 0 and used
            self.describe(**(info or {}))
        except BaseException:
            self._release()
            raise

    def _opened(self) -> dict[str, Any]:
        """Take hold of the store; return the content of its run.json, or of a new one."""
        if isinstance(self._store, _Memory):
            return _new_info()
        folder, info_path = self._store.path, self._store.info_path
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, and a run needs a directory: choose another out")
        if info_path.exists():
            self._store.info()  # a foreign directory stays untouched, without even a lock
        elif (strays := _all_parts(self._store)) and not self._overwrite:
            raise RunLogError(
                f"{info_path} does not exist, but {strays[0].name} does: copy run.json again from where the "
                "run was written, choose another out, or give overwrite=True to remove it"
            )
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self._lock = _lock(folder)
        if self._lock is not None:
            self._store.remove_leftovers()
        return self._store.info() if info_path.exists() else _new_info()

    def _open_session(self, start_step: int) -> None:
        self._start = check_whole("start_step", start_step)  # updates already done
        self._session: int | None = None  # its number, once run.json knows it
        self._next_seq: dict[str, int] = dict.fromkeys(KINDS, 0)

    @property
    def path(self) -> Path | None:
        """The run directory, or None for a run in memory."""
        return self._store.path

    @property
    def buffered(self) -> int:
        """Rows that were appended and not yet flushed."""
        return sum(len(chunk["step"]) for chunks in self._buffers.values() for chunk in chunks)

    def describe(self, **sections: Any) -> None:
        """Merge sections into run.json, durably: `tensors` key by key, every other one as a whole.

        Args:
            sections: whatever JSON can hold; arrays become lists and other objects their `str`. The library
                itself uses `optimizer` (with its "name"), `train`, and `tensors`: for each label the "layer",
                "component", "role", "numel", "shape", "parameter".
        """
        self._check_open()
        if own := [name for name in _OWN_SECTIONS if name in sections]:
            raise ValueError(f"the sections {own} of run.json are the writer's own: choose other names")
        plain = json.loads(json.dumps(sections, default=_plain))
        self._sections = _merged(self._sections, plain)
        self._unsaved = True
        if not self._undecided:
            self._save_info()

    @property
    def _info(self) -> dict[str, Any]:
        """The content of run.json as it should be."""
        return {**_merged(self._stored, self._sections), **_present()}

    def _save_info(self) -> None:
        self._store.write_info(self._info)
        self._unsaved = False

    def begin(self) -> None:
        """Refuse a training from 0 on in a directory that holds updates, or remove them, as `overwrite` says.

        `append` does it at the first row.

        Raises:
            FileExistsError: it holds updates.
        """
        if not self._undecided:
            return
        if self._overwrite and isinstance(self._store, _Folder):
            self._store.clear()
            self._stored = _new_info()
            self._undecided, self._unsaved = False, True
            with contextlib.suppress(OSError):  # the next flush tries again, and tells
                self._save_info()
            return
        steps = RunLog._of(self._store)._steps()
        updates = steps[steps > 0]
        if len(updates):
            raise FileExistsError(
                f"{self.path} already holds updates {updates[0]}–{updates[-1]}: choose another out, give "
                "overwrite=True to begin anew, or resume (load the optimizer's state before the first update, or "
                "pass start_step= the step of the checkpoint that you loaded)"
            )
        self._undecided = False

    def append(self, kind: str, columns: Mapping[str, Any]) -> None:
        """Take rows into the buffer; `flush` stores them.

        Args:
            kind: "forces", "weibull" or "metrics".
            columns: name -> scalar or 1-D array (copied), all of one length; scalars are repeated. `step` is
                always there.
                forces: tensor, lr, weight_decay, dot_wu, u_sq, norm_sq, norm_sq_after, and optionally span (1),
                norm_sq_audit, m_rms, v_mean, u_max, dot_wg, dot_ug, g_sq, lr_memory, fresh (NaN).
                weibull: tensor, k, lam, r_squared, ks, n.
                metrics: anything; numbers, strings, or None for not recorded.

        Raises:
            FileExistsError: the first row of a training from 0 on meets a directory that holds updates.
            TypeError, ValueError: the columns are not those of `kind`.
        """
        self._check_open()
        rows = _rows(kind, columns)
        self.begin()
        if len(rows["step"]):
            self._buffers[kind].append(rows)

    def restart(self, start_step: int) -> None:
        """Training went back to update `start_step`, or on from it: a new session begins.

        What was recorded behind that update is superseded once the new session's first rows are stored; on
        disk it stays. restart(0), said explicitly, begins again in a directory that holds updates.
        """
        self._check_open()
        self._open_session(start_step)
        if self._undecided and isinstance(self._store, _Folder) and not self._store.has_info():
            self._store.clear()  # what an interrupted overwriting left
        self._undecided = False
        for kind, chunks in self._buffers.items():
            kept = (
                {name: array[chunk["step"] <= self._start] for name, array in chunk.items()}
                for chunk in chunks
            )
            self._buffers[kind] = [chunk for chunk in kept if len(chunk["step"])]

    def flush(self) -> None:
        """Store the buffered rows, one part for each kind that has some; from then on they survive any kill.

        Raises:
            OSError: the disk is full, or another failure to write. The rows that could not be stored stay in
                the buffer, and a later flush stores them.
        """
        self._check_open()
        if self._undecided:
            return  # no row was let in yet
        if self._session is None and self.buffered:
            self._session = self._begin_session()
        if self._unsaved or not self._store.has_info():  # also where somebody deleted it
            self._save_info()
        for kind, chunks in self._buffers.items():
            if not chunks or self._session is None:
                continue
            metadata = {
                "format": str(FORMAT),
                "kind": kind,
                "session": str(self._session),
                "start_step": str(self._start),
                "weightdyn": _version("weightdyn"),
            }
            table = _arrow_table(kind, chunks).replace_schema_metadata(metadata)
            self._store.write(_Part(self._session, self._next_seq[kind], kind), table)
            # In this order: an interrupt between the two stores the rows twice, which reading undoes; the
            # other way round the next part would replace this one.
            self._next_seq[kind] += 1
            self._buffers[kind] = []

    def _begin_session(self) -> int:
        """Enter the session into run.json's content; its number is one that no part carries yet."""
        parts = _all_parts(self._store)
        starts = _start_steps(self._store, self._info, parts)
        number = max(starts, default=-1) + 1
        sessions = [*self._stored.get("sessions", [])]
        sessions += [{"start_step": starts.get(i, 0)} for i in range(len(sessions), number)]
        self._stored = {**self._stored, "sessions": [*sessions, {"start_step": self._start}]}
        self._unsaved = True
        return number

    def close(self) -> None:
        """Flush and let the directory go. If the flush fails the writer stays open, with its rows."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the writer of {self.path or 'the run in memory'} is closed: open a new one")

    def run(self, refresh: Callable[[], None] | None = None) -> RunLog:
        """The run so far, buffered rows included: they are flushed first.

        Args:
            refresh: called instead, and each time that a table of the run is asked for.
        """
        if refresh is None and not self._closed:
            self.flush()
        return RunLog._of(self._store, refresh)


def _present() -> dict[str, Any]:
    packages = {name: _version(name) for name in ("torch", "numpy")}
    return {
        "weightdyn": _version("weightdyn"),
        "versions": {**packages, "python": platform.python_version()},
    }


def _new_info() -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"format": FORMAT, **_present(), "created": now, "sessions": []}


def _merged(info: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """run.json with sections added: the tensors one by one, every other one as a whole."""
    merged = {**info, **sections}
    if "tensors" in merged:
        merged["tensors"] = {**info.get("tensors", {}), **sections.get("tensors", {})}
    return merged


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


# ----------------------------------------------------------------------------------------------------------
# Rows on their way out.


def _all_parts(store: _Memory | _Folder) -> list[_Part]:
    return [part for kind in KINDS for part in store.parts(kind)]


def _start_steps(store: _Memory | _Folder, info: Mapping[str, Any], parts: Sequence[_Part]) -> dict[int, int]:
    """Session number -> the update it started from, by run.json.

    A copy made of a run while it was being written can hold parts of a session that its run.json does not know
    yet; such a session's first part says.
    """
    starts = {number: session["start_step"] for number, session in enumerate(info.get("sessions", []))}
    for part in parts:
        if part.session not in starts:
            metadata = store.read(part).schema.metadata or {}
            stated = metadata.get(b"start_step", b"")
            if not re.fullmatch(rb"[0-9]{1,18}", stated):
                raise RunLogError(
                    f"{store.name(part)} does not say in its metadata from which update its session started, and "
                    "run.json does not know that session: move it out of the directory"
                )
            starts[part.session] = int(stated)
    return starts


def _limits(starts: Mapping[int, int]) -> dict[int, float]:
    """Last update that counts of each session: the lowest start of all later ones.

    >>> _limits({0: 0, 1: 200, 2: 100})
    {2: inf, 1: 100, 0: 100}
    """
    limits, limit = {}, math.inf
    for session in sorted(starts, reverse=True):
        limits[session] = limit
        limit = min(limit, starts[session])
    return limits


class RunLog:
    """A recorded run, finished or still being written: every method reads what is stored by then.

    Args:
        path: the run directory.

    Raises:
        FileNotFoundError: there is no run.
        RunLogError: it is damaged, not a run's, or of a newer format; the message names the file and what to
            do. A damaged part is found when its rows are read.
    """

    def __init__(self, path: str | Path) -> None:
        self._store: _Memory | _Folder = _Folder(check_path("path", path, "the directory of a run"))
        self._refresh: Callable[[], None] | None = None
        if self._store.path.is_file():
            raise RunLogError(f"{path} is a file: give the directory that a run was recorded into")
        self._store.info()

    @classmethod
    def _of(cls, store: _Memory | _Folder, refresh: Callable[[], None] | None = None) -> RunLog:
        run = cls.__new__(cls)
        run._store, run._refresh = store, refresh
        return run

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: the rows that are stored by now, without the logger that writes them."""
        self._catch_up()
        return {"_store": self._store, "_refresh": None}

    def _catch_up(self) -> None:
        """Let the logger that writes the run store what it has, where the run is its own."""
        if self._refresh is not None:
            self._refresh()

    @property
    def path(self) -> Path | None:
        """The run directory, or None for a run in memory."""
        return self._store.path

    @property
    def info(self) -> dict[str, Any]:
        """run.json: format, versions, optimizer, tensors, sessions, and what else was described."""
        return self._store.info()

    def forces(
        self, by: By | Sequence[str] | None = None, *, order: Order = "exact", at: At = "before"
    ) -> pd.DataFrame:
        """The force table of the run, sorted by step and in the order of the model's tensors.

        Args:
            by: sum over the tensors of each "layer", "component", "role", over all of the "model", or over a
                list of such columns, as `weightdyn.aggregate` does; None gives one row per update and tensor,
                with all columns of `force_table`.
            order, at: as in `force_table`.
        """
        self._catch_up()
        products, info = self._read("forces", _SCHEMAS["forces"].names)
        table = force_table(products, info.get("tensors", {}), order=order, at=at)
        return table if by is None else aggregate(table, by)

    def weibull(self) -> pd.DataFrame:
        """The Weibull fits: the columns of `WEIBULL_TABLE`."""
        self._catch_up()
        rows, info = self._read("weibull", _SCHEMAS["weibull"].names)
        names = named_columns(rows["tensor"].array, info.get("tensors", {}))
        values = {name: rows[name] for name in ("lam", "k", "r_squared", "ks", "n")}
        return pd.DataFrame({"step": rows["step"], "tensor": rows["tensor"], **names, **values})

    def metrics(self) -> pd.DataFrame:
        """What was recorded beside the forces: a row for each step, a column for each name, oldest first.

        Values recorded for one step at different times stand in one row; a later value of the same name wins.
        What was not recorded is NaN (<NA> among integers and booleans).
        """
        self._catch_up()
        tables, _ = self._tables("metrics")
        names = list(dict.fromkeys(name for table in tables for name in table.column_names if name != "step"))
        every = _concat([table.column("step") for table in tables], pa.int64()).to_numpy()
        columns = {"step": np.unique(every)}
        for name in names:
            having = [table for table in tables if name in table.column_names]
            column_type = _widest(table.schema.field(name).type for table in having)
            steps = _concat([table.column("step") for table in having], pa.int64())
            values = _concat(
                [table.column(name).cast(column_type, safe=False) for table in having], column_type
            )
            recorded = values.is_valid()
            series = values.filter(recorded).to_pandas()
            series.index = steps.filter(recorded).to_numpy()
            series = series[~series.index.duplicated(keep="last")]
            if len(series) < len(columns["step"]) and column_type in (pa.int64(), pa.bool_()):
                series = series.astype("Int64" if column_type == pa.int64() else "boolean")
            columns[name] = series.reindex(columns["step"]).array
        return pd.DataFrame(columns)

    def _tables(
        self, kind: str, columns: Sequence[str] | None = None
    ) -> tuple[list[pa.Table], dict[str, Any]]:
        """Tables of all parts of a kind, oldest first, without what later sessions superseded; and run.json.

        run.json is read behind the list of parts, so it knows each of their sessions and tensors. A session
        counts from its first part on, of whatever kind: one that died before changes nothing.
        """
        everything = _all_parts(self._store)
        info = self.info
        live = {part.session for part in everything}
        starts = _start_steps(self._store, info, everything)
        limits = _limits({session: starts[session] for session in live})
        tables = []
        for part in everything:
            if part.kind == kind:
                table = self._store.read(part, columns)
                if limits[part.session] < math.inf:
                    table = table.filter(pc.less_equal(table.column("step"), limits[part.session]))
                tables.append(table)
        return tables, info

    def _read(self, kind: str, columns: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """One row (the latest) for each step and tensor, sorted by step, then in the model's order; run.json."""
        tables, info = self._tables(kind, columns)
        schema = pa.schema([_SCHEMAS[kind].field(name) for name in columns]).remove_metadata()
        table = pa.concat_tables([schema.empty_table(), *(t.replace_schema_metadata() for t in tables)])
        table = table.unify_dictionaries()
        values = {name: _concat([table.column(name)], schema.field(name).type) for name in columns}
        step = values["step"].to_numpy()
        labels = values["tensor"].dictionary.to_pylist()
        labels_sorted = in_model_order(labels, info.get("tensors", {}))
        code_of = {label: code for code, label in enumerate(labels_sorted)}
        recode = np.array([code_of[label] for label in labels], dtype=np.int64)
        codes = recode[values["tensor"].indices.to_numpy()]
        order = np.lexsort((codes, step))  # stable: of equal keys the latest stays last
        sorted_step, sorted_codes = step[order], codes[order]
        last = np.ones(len(order), dtype=bool)
        last[:-1] = (np.diff(sorted_step) != 0) | (np.diff(sorted_codes) != 0)
        order = order[last]
        frame = {}
        for name in columns:
            if name == "tensor":
                frame[name] = pd.Categorical.from_codes(codes[order], categories=labels_sorted)
            else:
                array = values[name].to_numpy()[order]
                frame[name] = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        return pd.DataFrame(frame, copy=False), info

    def _steps(self) -> np.ndarray:
        """Distinct steps with rows of any kind, ascending."""
        columns = [table.column("step") for kind in KINDS for table in self._tables(kind, ["step"])[0]]
        return np.unique(_concat(columns, pa.int64()).to_numpy())

    def _summary(self) -> dict[str, str]:
        info = self.info
        optimizer = info.get("optimizer") or {}
        summary = {
            "optimizer": str(optimizer.get("name", "")) if isinstance(optimizer, dict) else str(optimizer)
        }
        tensors = info.get("tensors", {})
        weights = sum(entry.get("numel") or 0 for entry in tensors.values())
        known = {"forces by": info.get("source"), "decay by": info.get("decay")}
        summary |= {name: str(value) for name, value in known.items() if value}
        summary["no decay"] = str(info.get("no_decay", ""))
        summary["no drift"] = str(info.get("no_drift", ""))
        summary["tensors"] = f"{len(tensors):,} with {weights:,} weights" if tensors else ""
        for kind in KINDS:
            try:
                summary[kind] = self._count(kind)
            except RunLogError as error:  # to look at a damaged run must not fail
                summary[kind] = str(error)
        if self.path is not None:
            own = {"run.json", *KINDS}
            names = (name for name in sorted(os.listdir(self.path)) if name[0] != "." and name not in own)
            summary["beside them"] = ", ".join(names)
        return {name: text for name, text in summary.items() if text}

    def _count(self, kind: str) -> str:
        if kind == "metrics":
            table = self.metrics()
            text = f": {', '.join(map(str, table.columns[1:]))}"
        else:
            table = self._read(kind, ["step", "tensor"])[0]
            text = ""
        if not len(table):
            return ""
        steps = table["step"]
        covered = f"updates {steps.min():,}–{steps.max():,} ({steps.nunique():,} recorded)"
        return f"{len(table):,} rows, {covered}{text}"

    def __repr__(self) -> str:
        lines = (f"  {name:<12}{text}" for name, text in self._summary().items())
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._summary().items()
        )
        return f"<b>{html.escape(self._title())}</b><table>{''.join(rows)}</table>"

    def _title(self) -> str:
        return "RunLog in memory" if self.path is None else f"RunLog('{self.path}')"


def _concat(columns: Iterable[pa.ChunkedArray], column_type: pa.DataType) -> pa.Array:
    """One contiguous array of all columns, also of none."""
    chunks = [chunk for column in columns for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], column_type)
