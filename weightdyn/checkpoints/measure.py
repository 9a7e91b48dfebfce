"""What is computed of the tensors of a checkpoint, and the store of what was measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from weightdyn.core.naming import TensorRow, View
from weightdyn.core.tables import CHECKPOINT_TABLE
from weightdyn.files.parquet import read_parquet, write_parquet
from weightdyn.files.weightfiles import MANTISSA, CheckpointError, Stored, doubt, refused
from weightdyn.weibull.fit import as_histogram, fit_weibull
from weightdyn.weibull.magnitudes import PIECE, MagnitudeHistogram

Gram = Literal["none", "band", "full"]

CHUNK = 1 << 24
"""Weights of one tensor that are read at a time; a larger tensor falls into several pieces of work."""
_GRAM = 1 << 22  # float64 numbers of all steps that inner products hold at a time, and once more in a copy
_TILE = 32  # steps whose inner products are taken in one product ...
_PRODUCT = 1 << 18  # ... of so many multiplications

FORMAT = 4
"""Version of the stored measurements; others are measured again."""

_TYPES = {
    **dict.fromkeys(
        ("tensor", "stack", "component", "role", "dtype", "precision", "hash", "note"), pa.string()
    ),
    "layer": pa.int64(),
    "numel": pa.int64(),
}


# What is computed of them.


class Sums(NamedTuple):
    """What adds up over the pieces of a part."""

    squares: float = 0.0
    spacing: float = 0.0  # Σ 4^e, with 2^e the power of two below |w|
    half_spacing: float = 0.0  # the same, e not below float16's normal range
    low: int = 0  # which of the 16 lowest bits of float32 are set anywhere
    odd: int = 0  # weights that are no power of two, counted as long as they look like float16 or bfloat16
    histogram: MagnitudeHistogram | None = None

    def __add__(self, other: Any) -> Sums:
        mine, theirs = self.histogram, other.histogram
        return Sums(
            self.squares + other.squares,
            self.spacing + other.spacing,
            self.half_spacing + other.half_spacing,
            self.low | other.low,
            self.odd + other.odd,
            _merged(mine, theirs) if mine and theirs else mine or theirs,
        )


def _merged(mine: MagnitudeHistogram, theirs: MagnitudeHistogram) -> MagnitudeHistogram:
    """Both together: exact if both are, else in bins, of the type that holds the values of both."""
    exact = mine.exact and theirs.exact
    types = {getattr(torch, each.dtype) for each in (mine, theirs)}
    dtype = str(reduce(torch.promote_types, types)).removeprefix("torch.")
    return mine.widened(dtype, exact=exact) + theirs.widened(dtype, exact=exact)


class Task(NamedTuple):
    """Rows of one tensor of one checkpoint, to be measured."""

    stored: Stored
    rows: tuple[int, int]
    parts: tuple[TensorRow, ...]


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
    # torch.cat would wake its threads.
    joined = np.concatenate([cut.view(torch.uint8).numpy() for cut in cuts])
    return torch.from_numpy(joined).view(rows.dtype)


def run_tasks(tasks: Sequence[Task], weibull: bool) -> list[tuple[list[Sums], bytes]] | CheckpointError:
    """Measure tasks one after another: for each the sums of its parts, and the digest of its bytes."""
    done = []
    for task in tasks:
        try:
            with refused(task.stored.file):
                rows = task.stored.read(*task.rows).contiguous()
                sums = []
                for part in task.parts:
                    cut = _cut(rows, part.view, task.rows[0])
                    sums.append(Sums() if cut is None else _sums(cut, weibull))
                data = rows.reshape(-1).view(torch.uint8).numpy().data
                done.append((sums, hashlib.sha256(data).digest()))
        except CheckpointError as error:
            return error
    return done


def _sums(flat: Tensor, weibull: bool) -> Sums:
    total = Sums()
    with np.errstate(all="ignore"):  # weights may be infinite
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE]
            if piece.dtype == torch.float64:
                total += _sums_of_double(piece.numpy())
            else:
                total += _sums_of_single(_single(piece), halves=not total.low & 0x1FFF)
    if weibull:
        total = total._replace(histogram=as_histogram(flat))
    return total


def _single(piece: Tensor) -> np.ndarray:
    """The weights as float32 without torch's threads, which would wait for each other."""
    if piece.dtype == torch.bfloat16:
        return (piece.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    return piece.numpy().astype(np.float32, copy=False)


def _sums_of_single(x: np.ndarray, halves: bool) -> Sums:
    wide = x.astype(np.float64)
    bits = x.view(np.int32)
    power = (bits & 0x7F800000).view(np.float32)
    sums = Sums(_squares(wide), _squares(power))
    if not halves:
        return sums._replace(low=0x1FFF)
    return sums._replace(
        half_spacing=_squares(np.maximum(power, np.float32(2.0**-14))),
        low=int(np.bitwise_or.reduce(bits) & 0xFFFF),
        odd=int(np.count_nonzero(bits & 0x7FFFFF)),
    )


def _sums_of_double(x: np.ndarray) -> Sums:
    power = (x.view(np.int64) & 0x7FF0000000000000).view(np.float64)
    return Sums(_squares(x), _squares(power), low=0x1FFF)


def _squares(x: np.ndarray) -> float:
    return float(np.einsum("i,i->", x, x))  # not @: BLAS would wake its threads


_SURE = 64
"""Weights with a mantissa whose low bits must all be zero before float32 counts as a copy of something coarser."""


def precision_of(dtype: str, low: int, odd: int) -> str:
    """Float type that the values of a tensor fit into: that of its storage, or what float32 is a copy of.

    Args:
        dtype: its storage's.
        low: which of the 16 lowest bits of float32 are set in any weight.
        odd: weights that are no power of two.
    """
    if dtype == "float32" and odd >= _SURE and not low & 0x1FFF:
        return "float16" if low else "bfloat16"
    return dtype


def table_row(part: TensorRow, sums: Sums, stored: Stored, digest: str) -> dict[str, Any]:
    """The columns of `CHECKPOINT_TABLE` from `tensor` on, without the inner products."""
    dtype, precision = stored.dtype, precision_of(stored.dtype, sums.low, sums.odd)
    spacing = sums.half_spacing if precision == "float16" else sums.spacing
    fit = fit_weibull(sums.histogram) if sums.histogram is not None else None
    return {
        **part.identity(),
        "dtype": dtype,
        "precision": precision,
        "norm_sq": sums.squares,
        "rounding": spacing * 4.0 ** -MANTISSA[precision] / 12,
        "hash": digest,
        **{name: getattr(fit, name) if fit else math.nan for name in ("lam", "k", "r_squared", "ks")},
        "n": fit.n if fit else math.nan,
        "note": doubt(sums.squares, part.numel, stored.file),
    }


def inner_products(
    copies: Sequence[Stored],
    rows: tuple[int, int],
    parts: Sequence[TensorRow],
    pairs: np.ndarray | None,
    new: np.ndarray | None,
) -> np.ndarray | CheckpointError:
    """Inner products of rows of one tensor at several steps: of the pairs, or of `new` (None: all) with all.

    Returns:
        float64 of shape (parts, pairs) or (parts, new, copies).
    """
    count = len(copies)
    size = (len(pairs),) if pairs is not None else (count if new is None else len(new), count)
    total = np.zeros((len(parts), *size))
    try:
        height = max(1, _GRAM // count // max(1, math.prod(copies[0].shape[1:])))
        for start in range(*rows, height):
            stop = min(start + height, rows[1])
            read = [stored.read(start, stop) for stored in copies]
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


def layout_of(contents: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: stored.shape for name, stored in contents.items()}


def pieces_of(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor, each of at most `CHUNK` weights."""
    height = max(1, CHUNK * shape[0] // math.prod(shape))
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


def joined_digest(digests: Sequence[bytes]) -> str:
    """Hash of a tensor: of its bytes, or of the hashes of its pieces."""
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
    return whole.hex()[:32]


def check_same(
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


class Measured:
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

    def knows(self, step: int, fingerprint: str | None) -> bool:
        """Whether the inner products with another step are there, and of that content."""
        return step in self.dots and self.dots[step][0] == fingerprint

    @staticmethod
    def path(folder: Path, step: int) -> Path:
        """The file of a step."""
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
        for name in [name for name in CHECKPOINT_TABLE if name not in ("step", "dot_steps", "dots")]:
            array = pa.array(self.rows[name], _TYPES.get(name, pa.float64()), from_pandas=True)
            arrays.append(array)
            fields.append(pa.field(name, array.type, metadata={"meaning": CHECKPOINT_TABLE[name]}))
        arrays.append(pa.array(list(dots), pa.list_(pa.float64())))
        fields.append(
            pa.field("dots", arrays[-1].type, metadata={"meaning": "⟨W_i, W_j⟩ with each partner j"})
        )
        schema = pa.schema(fields, metadata={"weightdyn": json.dumps(about)})
        write_parquet(self.path(folder, self.step), pa.Table.from_arrays(arrays, schema=schema))

    @classmethod
    def read(cls, folder: Path, step: int) -> Measured | None:
        """What was stored of a step; None if nothing was, or nothing that can be read."""
        path = cls.path(folder, step)
        try:
            table = read_parquet(path)
            about = json.loads(table.schema.metadata[b"weightdyn"])
            if about["format"] != FORMAT:
                return None
            layout = {name: tuple(shape) for name, shape in about["layout"].items()}
            dots = np.array(table["dots"].to_pylist(), dtype=np.float64).reshape(table.num_rows, -1)
            partners = {
                int(other): (fingerprint, dots[:, i])
                for i, (other, fingerprint) in enumerate(about["partners"])
            }
            rows = table.drop_columns(["step", "dots"]).to_pandas()
            return cls(step, about["fingerprint"], about["weibull"], layout, rows, partners)
        except Exception:  # whatever is wrong with it, the checkpoint can be measured again
            return None


def wanted_dots(steps: Sequence[int], gram: Gram) -> dict[int, list[int]]:
    """Step -> the earlier steps with which its inner products are asked for."""
    if gram == "none":
        return {}
    return {step: list(steps[max(0, i - 1) if gram == "band" else 0 : i]) for i, step in enumerate(steps)}


def series_table(parts: Sequence[Measured], gram: Gram, weibull: bool) -> pd.DataFrame:
    """The table of all steps."""
    frames = []
    wanted = wanted_dots([part.step for part in parts], gram)
    for part in parts:
        rows = part.rows.copy()
        rows.insert(0, "step", part.step)
        for name in ("dot_steps", "dots"):
            rows[name] = pd.Series([None] * len(rows), dtype=object)
        if gram != "none":
            others = wanted[part.step]
            columns = [*(part.dots[other][1] for other in others), rows["norm_sq"].to_numpy()]
            rows["dots"] = pd.Series(list(np.stack(columns, axis=1)), dtype=object)
            at = np.array([*others, part.step], dtype=np.int64)
            rows["dot_steps"] = pd.Series([at] * len(rows), dtype=object)
        frames.append(rows)
    table = pd.concat(frames, ignore_index=True)[list(CHECKPOINT_TABLE)]
    table = table.astype({"layer": "Int64", "n": "float64"})
    for name in ("tensor", "stack", "component", "role"):
        table[name] = pd.Categorical(table[name], categories=list(dict.fromkeys(table[name])))
    if not weibull:
        table[["lam", "k", "r_squared", "ks", "n"]] = np.nan
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
