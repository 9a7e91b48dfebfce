"""Weight magnitudes as a histogram over the bits of floats.

The bits of a positive float, read as an integer, are monotone in its value. A count over the leading bits of
|x| is therefore the sorted sample, at a resolution that is the same everywhere on the logarithmic axis: every
distinct magnitude of bfloat16 and float16, and 256 bins to the octave for float32 and float64. It costs one
pass instead of a sort, takes the same little memory whatever the tensor, does not care about scale, and adds,
so shards merge and layers pool. Everything in `weibull` is computed from it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightdyn.core.checks import check_instance, check_number, check_numbers, check_path, refuse, shown
from weightdyn.files.durable import write_file
from weightdyn.files.pickles import open_zip
from weightdyn.files.weightfiles import open_regular

PIECE = 1 << 16
"""Elements that are counted at a time on the CPU: what is made of them stays in the cache."""

DEVICE_PIECE = 1 << 20
"""The same on other devices, where a launch costs more than memory traffic."""


class _Format(NamedTuple):
    """How a float type splits: exponent bits, mantissa bits, and how many of the latter a binned key keeps."""

    exponent: int
    mantissa: int
    kept: int
    bits: torch.dtype

    @property
    def shift(self) -> int:
        return self.mantissa - self.kept

    @property
    def keys(self) -> int:
        return 1 << (self.exponent + self.kept)


_FORMATS = {
    "bfloat16": _Format(8, 7, 7, torch.int16),
    "float16": _Format(5, 10, 10, torch.int16),
    "float32": _Format(8, 23, 8, torch.int32),
    "float64": _Format(11, 52, 8, torch.int64),
}


class Sums(NamedTuple):
    """Sums over the non-zero finite magnitudes, in float64: ‖x‖², Σ|x| and Σ ln|x|."""

    squares: float
    magnitudes: float
    logs: float


def _format(dtype: Any, argument: str = "x") -> tuple[str, _Format]:
    name = str(dtype).removeprefix("torch.")
    if name not in _FORMATS:
        raise TypeError(
            f"{argument} must be of a float type, one of {', '.join(_FORMATS)}; got {name}. "
            "Convert it first (x.float(); an array by x.astype('float32'))."
        )
    return name, _FORMATS[name]


def _dense(x: Tensor) -> Tensor:
    """The tensor as plain memory that can be read as bits."""
    if x.layout != torch.strided or x.is_meta:
        what = (
            "a meta tensor, which has no data" if x.is_meta else f"one of layout {x.layout}; x.to_dense() is"
        )
        raise TypeError(f"x must be a dense tensor with data, got {what}")
    return x.detach().resolve_conj().resolve_neg()


def _pieces(x: Any, size: int) -> Iterator[Any]:
    """Flat pieces of a tensor or array of any strides, at most `size` long; the order is the memory's."""
    if isinstance(x, Tensor):
        x = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
        contiguous = x.is_contiguous()
    else:
        x = x.transpose(sorted(range(x.ndim), key=lambda axis: abs(x.strides[axis]), reverse=True))
        contiguous = x.flags.c_contiguous
    total = int(np.prod(x.shape))
    if total <= size:
        if total:
            yield x.reshape(-1)
    elif contiguous:
        flat = x.reshape(-1)
        for start in range(0, total, size):
            yield flat[start : start + size]
    else:
        rows = max(1, size * x.shape[0] // total)
        for start in range(0, x.shape[0], rows):
            yield from _pieces(x[start] if rows == 1 else x[start : start + rows], size)


def _bits(x: Tensor | np.ndarray) -> np.ndarray:
    """The bits of a CPU tensor or array as signed integers, without a copy."""
    if isinstance(x, Tensor):
        return x.view(_FORMATS[str(x.dtype).removeprefix("torch.")].bits).numpy()
    return x.view(f"i{x.dtype.itemsize}")


def _count_on_cpu(x: Tensor | np.ndarray, form: _Format, sums: bool) -> tuple[np.ndarray, Sums | None]:
    signed = np.zeros(2 * form.keys, dtype=np.int64)  # the sign is the key's first bit
    counts = signed.reshape(2, -1)
    subnormal = 0
    total = np.zeros(3)
    bits = _bits(x)
    unsigned = np.dtype(f"u{bits.itemsize}")
    drop_sign = unsigned.type(np.iinfo(bits.dtype).max)
    for piece in _pieces(bits, PIECE):
        piece = piece.view(unsigned)
        before = counts[0, 0] + counts[1, 0]
        keys = piece >> form.shift if form.shift else piece
        # add.at runs on one thread at the speed of the cache. torch.bincount is faster on idle cores,
        # and a hundred times slower where its threads have to wait for each other.
        np.add.at(signed, keys.astype(np.intp), 1)
        if form.shift and counts[0, 0] + counts[1, 0] > before:
            # Key 0 also caught the magnitudes that are too small for key 1. They are subnormal, but no zeros.
            magnitude = piece & drop_sign
            subnormal += np.count_nonzero(magnitude) - np.count_nonzero(magnitude >> form.shift)
        if sums:
            total += _sums_of_array((piece & drop_sign).view(f"f{piece.itemsize}"))
    unsigned_counts = counts.sum(0)
    unsigned_counts[:2] += (-subnormal, subnormal)
    return unsigned_counts, Sums(*total.tolist()) if sums else None


def _sums_of_array(magnitude: np.ndarray) -> tuple[float, float, float]:
    a = magnitude.astype(np.float64, copy=False)
    # The squares of float64 can leave its range.
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        magnitudes = float(a.sum())
        if not math.isfinite(magnitudes):
            a = a[np.isfinite(a)]
            magnitudes = float(a.sum())
        logs = float(np.log(a).sum())
        if logs == -math.inf:
            logs = float(np.log(a[a > 0]).sum())
        return float((a * a).sum()), magnitudes, logs


def _count_on_device(x: Tensor, form: _Format) -> Tensor:
    counts = torch.zeros(form.keys, dtype=torch.int64, device=x.device)
    one = torch.ones(1, dtype=torch.int64, device=x.device)
    for piece in _pieces(x, DEVICE_PIECE):
        magnitude = piece.view(form.bits) & torch.iinfo(form.bits).max
        keys = magnitude >> form.shift
        if form.shift:
            keys = torch.maximum(keys, magnitude.clamp(max=1))  # a magnitude too small for key 1 is no zero
        counts.scatter_add_(0, keys.long(), one.expand(keys.shape))  # torch.bincount would synchronise
    return counts


def count_magnitudes(x: Tensor) -> Tensor:
    """Count the bit patterns of |x| where x lies; nothing synchronises on a GPU.

    Args:
        x: a tensor of bfloat16, float16, float32 or float64, of any shape, strides and device.

    Returns:
        int64 counts on the same device, one per key: 2**15 keys (every magnitude) for bfloat16 and float16,
        2**16 for float32, 2**19 for float64 (the exponent and eight bits of the mantissa). Key 0 holds the
        zeros, the keys from the one of infinity on hold infinities and NaNs. `MagnitudeHistogram.from_counts`
        reads them, then or later.

    Raises:
        TypeError: x is not a tensor of one of these types.

    >>> count_magnitudes(torch.tensor([0.0, 1.0, -1.0])).sum()
    tensor(3)
    """
    _, form = _format(check_instance("x", x, Tensor, "a torch.Tensor").dtype)
    x = _dense(x)
    if x.device.type == "cpu":
        return torch.from_numpy(_count_on_cpu(x, form, sums=False)[0])
    return _count_on_device(x, form)


def sum_magnitudes(x: Tensor) -> Tensor:
    """‖x‖², Σ|x| and Σ ln|x| over the non-zero finite elements, as three float64 on the device of x.

    Nothing synchronises on a GPU, and temporary memory is bounded.

    >>> sum_magnitudes(torch.tensor([1.0, -2.0, 0.0]))[:2]
    tensor([5., 3.], dtype=torch.float64)
    """
    _format(check_instance("x", x, Tensor, "a torch.Tensor").dtype)
    total = torch.zeros(3, dtype=torch.float64, device=x.device)
    for piece in _pieces(_dense(x), DEVICE_PIECE):
        a = piece.double().abs()
        a = torch.where(a.isfinite(), a, 0)
        total += torch.stack([(a * a).sum(), a.sum(), torch.where(a > 0, a, 1).log().sum()])
    return total


def _checked_sums(sums: Any) -> Sums:
    """The three sums beside a count, as numbers."""
    dense = isinstance(sums, Tensor) and sums.layout == torch.strided and not sums.is_meta
    values = sums.tolist() if dense or isinstance(sums, np.ndarray) else sums
    if isinstance(values, list | tuple) and len(values) == len(Sums._fields):
        return Sums(*(check_number("sums", value) for value in values))
    raise refuse("sums", "three numbers, as sum_magnitudes returns them, or None", sums)


@dataclass(frozen=True, eq=False)
class MagnitudeHistogram:
    """Counts of |x| over the leading bits of a float type, populated bins only.

    Make one with `from_tensor` (tensors and arrays) or `from_counts`, merge with `+` (or `sum`).

    Attributes:
        dtype: the float type: "bfloat16", "float16", "float32" or "float64".
        keys: the populated bins, ascending: the leading bits of |x| as int64. Zeros, infinities and NaNs stand
            apart.
        counts: how many magnitudes each bin holds, int64.
        n_zero: number of zeros.
        n_nonfinite: number of infinities and NaNs.
        accumulated: the sums that were taken beside the counts, if any; `sums` is what to read.
        exact: whether each bin holds a single magnitude, as for bfloat16 and float16 it always does.

    >>> h = MagnitudeHistogram.from_tensor(torch.tensor([0.5, -0.5, 2.0, 0.0]))
    >>> h.n, h.n_zero, h.sums.squares
    (3, 1, 4.5)
    """

    dtype: str
    keys: np.ndarray
    counts: np.ndarray
    n_zero: int = 0
    n_nonfinite: int = 0
    accumulated: Sums | None = None
    exact: bool = False

    @classmethod
    def from_tensor(
        cls, x: Tensor | np.ndarray, *, sums: bool = True, exact: bool = False
    ) -> MagnitudeHistogram:
        """Count a tensor (where it lies) or an array, in pieces of bounded size.

        Args:
            x: floats of any shape, strides and device; a memory-mapped array is read once.
            sums: accumulate ‖x‖², Σ|x| and Σ ln|x| in float64 in the same pass. It about triples the time for
                float32 and float64, and costs nothing for bfloat16 and float16.
            exact: keep every distinct magnitude of float32 and float64 apart. This sorts the sample and takes
                memory of its size.

        Raises:
            TypeError: x is no tensor or array, or not of a float type.
        """
        if isinstance(x, Tensor):
            name, form = _format(x.dtype)
            x = _dense(x)
            if x.device.type != "cpu" and not exact and x.device.type != "mps":  # which has no float64
                measured = Sums(*sum_magnitudes(x).tolist()) if sums and form.shift else None
                return cls.from_counts(_count_on_device(x, form), name, measured)
            x = x.cpu()
        elif isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
            native = x.dtype.newbyteorder("=")
            name, form = _format(native)
            x = x.astype(native, copy=False)
        else:
            raise TypeError(f"x must be a torch.Tensor or a numpy.ndarray, got {type(x).__name__}")
        if exact and form.shift:
            magnitude = _bits(x).ravel()
            keys, counts = np.unique(magnitude & np.iinfo(magnitude.dtype).max, return_counts=True)
            return cls._apart(name, keys.astype(np.int64), counts, None, exact=True)
        counts, measured = _count_on_cpu(x, form, sums=sums and form.shift > 0)
        return cls.from_counts(counts, name, measured)

    @classmethod
    def from_counts(
        cls, counts: Tensor | np.ndarray, dtype: Any, sums: Iterable[float] | None = None
    ) -> MagnitudeHistogram:
        """The histogram of what `count_magnitudes` counted.

        Args:
            counts: one count per key, on any device.
            dtype: the float type that was counted (a torch or numpy dtype, or its name).
            sums: what `sum_magnitudes` returned for the same values, or nothing.

        Raises:
            ValueError: `counts` is not of the length that belongs to dtype.
        """
        name, form = _format(dtype, "dtype")
        counts = check_numbers("counts", counts)
        counts = counts.cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
        if counts.shape != (form.keys,):
            raise ValueError(
                f"counts must have the shape ({form.keys},) for {name}, as count_magnitudes returns it; "
                f"got {counts.shape}"
            )
        if counts.dtype.kind not in "iu" or counts.min() < 0:
            raise ValueError(f"counts must be whole numbers >= 0, got {shown(counts)} from {counts.min()} on")
        keys = np.flatnonzero(counts)
        measured = None if sums is None else _checked_sums(sums)
        return cls._apart(name, keys, counts[keys], measured, exact=form.shift == 0)

    @classmethod
    def _apart(
        cls, name: str, keys: np.ndarray, counts: np.ndarray, sums: Sums | None, *, exact: bool
    ) -> MagnitudeHistogram:
        """Take zeros, infinities and NaNs out of the bins."""
        form = _FORMATS[name]
        infinity = ((1 << form.exponent) - 1) << (form.mantissa if exact else form.kept)
        zero, finite = np.searchsorted(keys, [1, infinity])
        return cls(
            dtype=name,
            keys=keys[zero:finite],
            counts=counts[zero:finite].astype(np.int64),
            n_zero=int(counts[:zero].sum()),
            n_nonfinite=int(counts[finite:].sum()),
            accumulated=sums,
            exact=exact,
        )

    @cached_property
    def n(self) -> int:
        """Number of non-zero finite magnitudes: those that all statistics are about."""
        return int(self.counts.sum())

    @cached_property
    def ends(self) -> np.ndarray:
        """How many magnitudes lie in each populated bin and those below it, int64."""
        return np.cumsum(self.counts)

    @cached_property
    def sums(self) -> Sums | None:
        """‖x‖², Σ|x|, Σ ln|x|: as accumulated, or from the counts where these are exact; else None."""
        if not self.exact:
            return self.accumulated
        value = self.edges[0]
        with np.errstate(over="ignore", under="ignore"):
            terms = (self.counts * value**2, self.counts * value, self.counts * np.log(value))
        return Sums(*(float(term.sum()) for term in terms))

    @property
    def n_subnormal(self) -> int:
        """How many of them are subnormal."""
        form = _FORMATS[self.dtype]
        return int(self.counts[self.keys < 1 << (form.mantissa if self.exact else form.kept)].sum())

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper edge of each populated bin, float64; one and the same array if it is exact."""
        if self.exact:
            value = _value(self.keys, self.dtype)
            return value, value
        shift = _FORMATS[self.dtype].shift
        low, high = (_value(keys << shift, self.dtype) for keys in (self.keys, self.keys + 1))
        if len(self.keys) and self.keys[0] == 1:
            low[0] = _value(np.array([1]), self.dtype)[0]  # all that is too small for a key of its own
        return low, np.minimum(high, torch.finfo(getattr(torch, self.dtype)).max)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Magnitudes and weights that stand for the sample in sums of smooth functions.

        The magnitudes themselves where the histogram is exact; else the two Gauss points of each bin, with
        half of its count each.
        """
        low, high = self.edges
        if self.exact:
            return low, self.counts.astype(np.float64)
        middle, reach = low / 2 + high / 2, (high / 2 - low / 2) / np.sqrt(3)
        return np.concatenate([middle - reach, middle + reach]), np.tile(self.counts / 2, 2)

    def __add__(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """The histogram of both samples together.

        Raises:
            ValueError: their bins differ, since one is of another float type, or exact.
        """
        if not isinstance(other, MagnitudeHistogram):
            return NotImplemented
        if (other.dtype, other.exact) != (self.dtype, self.exact):
            mine, theirs = (f"{h.dtype}{', exact' * h.exact}" for h in (self, other))
            raise ValueError(
                f"histograms of different bins cannot be merged: one has {mine}, the other {theirs}. "
                "Convert the values to one type before counting."
            )
        keys, where = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        sums = None
        if self.accumulated is not None and other.accumulated is not None:
            sums = Sums(*(a + b for a, b in zip(self.accumulated, other.accumulated, strict=True)))
        zero, nonfinite = self.n_zero + other.n_zero, self.n_nonfinite + other.n_nonfinite
        return MagnitudeHistogram(self.dtype, keys, counts, zero, nonfinite, sums, self.exact)

    def __radd__(self, other: Any) -> MagnitudeHistogram:
        """Let `sum(histograms)` start from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def widened(self, dtype: str, *, exact: bool) -> MagnitudeHistogram:
        """The same sample in the bins of `dtype`, which can be merged with others that have them.

        Args:
            dtype: float32 or float64, if that holds every magnitude of this one's type; or this one itself.
            exact: keep the magnitudes apart.

        Raises:
            ValueError: it is in bins, and not in these.
        """
        if (dtype, exact) == (self.dtype, self.exact):
            return self
        if not self.exact:
            raise ValueError(f"bins of {self.dtype} can neither be parted nor put into those of {dtype}")
        bits = _bits(self.edges[0].astype(dtype))
        shift = 0 if exact else _FORMATS[dtype].shift
        # As when they are counted: a magnitude too small for key 1 is no zero.
        keys, where = np.unique(np.maximum(bits >> shift, 1).astype(np.int64), return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, where, self.counts)
        return replace(self, dtype=dtype, keys=keys, counts=counts, exact=exact)

    def quantile(self, q: Any) -> Any:
        """Magnitude below which the fraction q of the sample lies; linear inside a bin.

        Args:
            q: a number or an array in [0, 1].

        Returns:
            A float, or an array of the shape of q; NaN for an empty histogram.

        >>> h = MagnitudeHistogram.from_tensor(torch.arange(1, 101).bfloat16())
        >>> h.quantile(0.5)
        50.0
        """
        q = np.asarray(q, dtype=np.float64)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"q must lie in [0, 1], got {q}")
        if self.n == 0:
            out = np.full(q.shape, np.nan)
        else:
            rank = q * self.n
            where = np.minimum(np.searchsorted(self.ends, rank), len(self.ends) - 1)
            low, high = self.edges
            inside = (rank - self.ends[where]) / self.counts[where] + 1
            out = low[where] + (high[where] - low[where]) * inside
        return float(out) if out.ndim == 0 else out

    def cdf(self, x: Any) -> Any:
        """Fraction of the sample that is at most x; linear inside a bin.

        >>> MagnitudeHistogram.from_tensor(torch.arange(1, 101).bfloat16()).cdf(25.0)
        0.25
        """
        x = np.asarray(x, dtype=np.float64)
        if self.n == 0:
            out = np.full(x.shape, np.nan)
        else:
            low, high = self.edges
            begun = np.searchsorted(low, x, side="right")
            last = np.maximum(begun - 1, 0)
            width = 1.0 if self.exact else high[last] - low[last]
            inside = 1.0 if self.exact else np.clip((x - low[last]) / width, 0, 1)
            below = self.ends[last] - self.counts[last] * (1 - inside)
            out = np.asarray(np.where(begun > 0, below / self.n, 0.0))
        return float(out) if out.ndim == 0 else out

    def save(self, path: str | PathLike[str]) -> None:
        """Write to an .npz file, compressed, whole or not at all: some tens of kilobytes for bins."""
        write_file(check_path("path", path), self._write)

    def _write(self, path: Path) -> None:
        stored = {
            "dtype": np.array(self.dtype),
            "keys": self.keys,
            "counts": self.counts,
            "apart": np.array([self.n_zero, self.n_nonfinite, self.exact]),
            "sums": np.array([] if self.accumulated is None else self.accumulated, dtype=np.float64),
        }
        with open(path, "wb") as file:
            np.savez_compressed(file, **stored, digest=np.array(_digest(stored)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> MagnitudeHistogram:
        """Read what `save` wrote; nothing in the file is taken on trust.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else, damaged, or its numbers are no histogram's.
        """
        path = check_path("path", path)
        try:
            file = io.BufferedReader(open_regular(path))  # type: ignore[arg-type]
            with file, open_zip(file, _DIRECTORY) as archive:
                return cls(**_stored(archive, os.fstat(file.fileno()).st_size))
        except FileNotFoundError:
            raise
        except Exception as error:  # a foreign archive makes its readers raise whatever there is
            reason = f"{error}"[:300] or type(error).__name__
            raise ValueError(
                f"{path} is no histogram that MagnitudeHistogram.save wrote, or it is damaged: {reason}. "
                "Copy it again, or count the weights anew"
            ) from error

    def __repr__(self) -> str:
        return (
            f"MagnitudeHistogram({self.dtype}, n={self.n}, bins={len(self.keys)}, "
            f"n_zero={self.n_zero}, n_nonfinite={self.n_nonfinite})"
        )


_DIRECTORY = 4096  # bytes that a histogram's directory may have; its five arrays take 270

_KEYS_PER_BYTE = 16 / 8
"""Keys that a byte of a compressed file can hold at most: ascending numbers compress by 4 to 8, a bomb by 1,000."""


def _digest(stored: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, size and bytes of each array: a zip's checksums miss a number that was changed."""
    digest = hashlib.sha256()
    for name in ("dtype", "keys", "counts", "apart", "sums"):
        digest.update(f"{name} {stored[name].size} ".encode())
        digest.update(str(stored[name]).encode() if name == "dtype" else stored[name].tobytes())
    return digest.hexdigest()[:32]


def _stored(archive: zipfile.ZipFile, size: int) -> dict[str, Any]:
    """The fields of a histogram in a file of `size` bytes, checked; ValueError for what cannot be."""

    def read(name: str, dtype: str, length: int | None = None, most: float = 3) -> np.ndarray:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that save does not use")
        with archive.open(entry) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{name} is of another version of the format")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            count = math.prod(shape)
            # Nothing but these types is unpacked, so no pickle is ever opened, and never more than can be true.
            if found != np.dtype(dtype) and not (
                dtype == "U" and found.kind == "U" and found.itemsize <= 4 * 32
            ):
                raise ValueError(f"{name} is of type {found}")
            if len(shape) > 1 or (count > most if length is None else count != length):
                raise ValueError(f"{name} has the shape {shape}")
            data = file.read(count * found.itemsize + 1)  # to the end, where the checksum is compared
        if len(data) != count * found.itemsize:
            raise ValueError(f"{name} is not as long as it says")
        return np.frombuffer(data, found).reshape(shape)

    name = str(read("dtype", "U", 1).item())
    if name not in _FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(_FORMATS)}, got {name[:40]!r}")
    form = _FORMATS[name]
    zero, nonfinite, exact = read("apart", "<i8", 3).tolist()
    if zero < 0 or nonfinite < 0 or exact not in ((0, 1) if form.shift else (1,)):
        raise ValueError(
            f"apart must be two counts >= 0 and whether bins are exact, got {[zero, nonfinite, exact]}"
        )
    packed = min(archive.getinfo("keys.npy").compress_size, size)
    most = _KEYS_PER_BYTE * packed + 64 if exact and form.shift else form.keys
    keys = read("keys", "<i8", most=most)
    infinity = ((1 << form.exponent) - 1) << (form.mantissa if exact else form.kept)
    if len(keys) and not (keys[0] >= 1 and keys[-1] < infinity and (np.diff(keys) > 0).all()):
        raise ValueError(f"keys must ascend within [1, {infinity - 1}]")
    counts = read("counts", "<i8", len(keys))
    if (counts < 1).any() or counts.sum(dtype=np.float64) + zero + nonfinite >= 2.0**62:
        raise ValueError("counts must be >= 1, and their sum a number that there can be of weights")
    sums = read("sums", "<f8").tolist()
    # Only the squares of float64 can leave its range.
    good = [
        math.isfinite(value) or (value == math.inf and name == "float64" and not i)
        for i, value in enumerate(sums)
    ]
    if len(sums) not in (0, 3) or not all(good) or min(sums[:2], default=0) < 0:
        raise ValueError(f"sums must be none, or a finite ‖x‖², Σ|x| and Σ ln|x|, got {sums}")
    apart = np.array([zero, nonfinite, exact])
    own = {"dtype": np.array(name), "keys": keys, "counts": counts, "apart": apart, "sums": np.array(sums)}
    if str(read("digest", "U", 1).item()) != _digest(own):
        raise ValueError("its numbers do not have the digest that was stored with them")
    return {
        "dtype": name, "keys": keys, "counts": counts, "n_zero": zero, "n_nonfinite": nonfinite,
        "accumulated": Sums(*sums) if sums else None, "exact": bool(exact),
    }  # fmt: skip


def _value(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The magnitudes with these bits, as float64."""
    if dtype == "bfloat16":
        bits, dtype = bits << 16, "float32"
    kind = np.dtype(dtype)
    return bits.astype(f"i{kind.itemsize}").view(kind).astype(np.float64)
