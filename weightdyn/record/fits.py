"""The Weibull fits of one update: of tensors that are here at once, of those that ranks share when they are whole.

Histograms of magnitudes add, so the ranks add up what each counts of its part. Tensors that are small enough to be
sorted are put together instead, every rank's part at its place among zeros: the fit is that of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weightdyn.core.naming import View
from weightdyn.record.shards import Box, Held, Pending, Ranks, local_of
from weightdyn.weibull.fit import SORTED, WeibullFit, fit_weibull, is_coarse
from weightdyn.weibull.magnitudes import MagnitudeHistogram, count_magnitudes


@dataclass(frozen=True)
class _Together:
    """A shared tensor some of whose rows are small: a place in the buffer of its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    copies: float
    start: int
    rows: list[tuple[str, View | None]]


@dataclass(frozen=True)
class _Counted:
    """A large row of a shared tensor: a place in the buffer of counts."""

    label: str
    numel: int
    dtype: torch.dtype
    copies: float
    start: int
    stop: int


class Fits:
    """The fits of one update.

    Args:
        step: its number.
        ranks: those that share tensors, if there are any.
        warn: says something once: a key and the message.
    """

    def __init__(self, step: int, ranks: Ranks | None, warn: Callable[[str, str], None]) -> None:
        self.step = step
        self._ranks, self._warn = ranks, warn
        self._found: list[tuple[str, WeibullFit | None]] = []
        self._together: list[_Together] = []
        self._counted: list[_Counted] = []
        self._pieces: dict[torch.dtype, list[Tensor]] = {}
        self._counts: list[Tensor] = []
        self._buffers: dict[torch.dtype, Tensor] = {}
        self.pending = Pending()

    def add(self, labels: list[str], views: tuple[View, ...], parameter: Tensor, held: Held) -> None:
        """Fit each row of a tensor, or take in what this rank has of it."""
        rows = list(zip(labels, views or (None,), strict=True))
        local = local_of(parameter)
        if self._ranks is None or not held.copies:
            self._found += [
                (label, fit_weibull(local if view is None else view.of(local))) for label, view in rows
            ]
            return
        pieces = list(zip(held.boxes, held.pieces(local), strict=True))
        times = self._ranks.copies_in(held.copies)
        small = [row for row in rows if _numel(row[1], held.shape) <= SORTED]
        if small:
            # The last number counts the weights that came together.
            whole = torch.zeros(
                math.prod(held.shape) + 1, dtype=_wide(parameter.dtype), device=self._ranks.device
            )
            for box, piece in pieces:
                whole[:-1].view(held.shape)[_inside(box)] = piece.to(whole)
                whole[-1] += piece.numel()
            known = self._pieces.setdefault(whole.dtype, [])
            start = sum(map(len, known))
            known.append(whole)
            self._together.append(_Together(held.shape, parameter.dtype, times, start, small))
        for label, view in rows:
            if (label, view) in small:
                continue
            counts = count_magnitudes(local.new_zeros(0)).int()
            for box, piece in pieces:
                for part in [piece] if view is None else _parts(box, view, piece):
                    counts += count_magnitudes(part).int()
            start = sum(map(len, self._counts))
            self._counts.append(counts.to(self._ranks.device))
            numel = _numel(view, held.shape)
            self._counted.append(_Counted(label, numel, parameter.dtype, times, start, start + len(counts)))

    def send(self) -> None:
        """Begin to add up what the ranks have; all of them come here, once for each update that is fitted."""
        if self._ranks is None:
            return
        self._buffers = {dtype: torch.cat(pieces) for dtype, pieces in self._pieces.items()}
        if self._counts:
            self._buffers[torch.int32] = torch.cat(self._counts)
        self._pieces, self._counts = {}, []
        for buffer in self._buffers.values():
            self.pending.reduce(self._ranks, buffer, dist.ReduceOp.SUM)

    def columns(self) -> Mapping[str, Any] | None:
        """The rows of the table, once nothing is pending; None if there are none."""
        if self.pending.lost is not None:
            self._warn(
                "ranks", f"the fits over the ranks of update {self.step} are lost: {self.pending.lost}"
            )
            return None
        found = [(label, fit) for label, fit in [*self._found, *self._shared()] if fit is not None]
        if not found:
            return None
        names = ("lam", "k", "r_squared", "ks", "n")
        values = {name: [getattr(fit, name) for _, fit in found] for name in names}
        return {"step": self.step, "tensor": [label for label, _ in found], **values}

    def give_up(self) -> None:
        """Leave them out."""
        self._warn("late", f"the fits over the ranks of update {self.step} did not come: left out")
        self.pending.abandon()

    def _shared(self) -> Iterator[tuple[str, WeibullFit | None]]:
        for each in self._together:
            stop = each.start + math.prod(each.shape)
            buffer = self._buffers[_wide(each.dtype)]
            right = float(buffer[stop]) == math.prod(each.shape) * each.copies
            whole = (buffer[each.start : stop] / each.copies).to(each.dtype).view(each.shape)
            for label, view in each.rows:
                yield (
                    label,
                    fit_weibull(whole if view is None else view.of(whole)) if right else self._no(label),
                )
        for row in self._counted:
            counts = self._buffers[torch.int32][row.start : row.stop].long() // int(row.copies)
            sample = MagnitudeHistogram.from_counts(counts, row.dtype)
            right = sample.n + sample.n_zero + sample.n_nonfinite == row.numel
            if right and is_coarse(sample):
                self._warn(
                    "coarse",
                    f"the weights of {row.label} lie on a grid or close together, where the histograms that "
                    "ranks add up blur them: no Weibull law is fitted",
                )
                continue
            yield row.label, fit_weibull(sample) if right else self._no(row.label)

    def _no(self, label: str) -> None:
        self._warn("fits", f"the ranks do not hold each weight of {label} once: no Weibull law is fitted")


def _numel(view: View | None, shape: tuple[int, ...]) -> int:
    return math.prod(shape) if view is None else view.numel(shape)


def _inside(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(box.offset, box.shape, strict=True))


def _parts(box: Box, view: View, piece: Tensor) -> Iterator[Tensor]:
    (clipped,) = box.clip([view])
    for start, stop in clipped.ranges:
        yield piece.narrow(view.axis, start, stop - start)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What can be added up of a type without rounding: the others add zeros."""
    return dtype if dtype.itemsize >= 4 else torch.float32
