"""What was measured of the updates, on its way from the devices into the log.

Nothing waits for a device inside a step: an update leaves a `Record` of measurements there, and they come over
together when the log is flushed. Nor is another rank waited for, where several hold parts of the tensors: an update
comes into the log when the sums over the ranks are there, and the updates behind it wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightdyn.core.forces import Remembered, before_step, fresh_before_step
from weightdyn.record.moments import PRODUCTS
from weightdyn.record.shards import Ranks, Share

_LOST = 0.01  # at a smaller |1−ηλ| w' tells nothing of w

_U_MAX = PRODUCTS.index("u_max")
_NORM_AFTER, _NORM_BEFORE = len(PRODUCTS), len(PRODUCTS) + 1  # columns of what ranks add up, behind PRODUCTS
_HOST = _NORM_BEFORE + 1  # ... and from here on what each knows of the tensors that it has moved


class _Columns:
    """What is known of some logged updates: arrays (updates, rows), filled in from the records."""

    def __init__(self, records: Sequence[Record]):
        shape = (len(records), len(records[0].moved))
        self.lr = np.stack([record.lr for record in records])
        self.weight_decay = np.stack([record.weight_decay for record in records])
        self.moved = np.stack([record.moved for record in records])
        self.remembered = np.stack([record.remembered for record in records])  # fields of Remembered
        self.products = np.full((*shape, len(PRODUCTS)), np.nan)
        self.after = np.zeros(shape, dtype=bool)  # where the products are those of the weights after the step
        self.norm_sq_after = np.full(shape, np.nan)
        self.norm_sq_audit = np.full(shape, np.nan)


@dataclass
class Measured:
    """Something measured for some rows, still on its device; its kind says what becomes of it.

    Of tensors that several ranks hold (`Shared`) it is what this rank's part adds, and a row may be there often.
    """

    rows: list[int]
    values: Tensor
    shared: Tensor | None = None  # the rows on the device, where they are such tensors'

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put the values, come over from the device, where they belong for update i."""
        raise NotImplementedError

    def give(self, share: Share) -> None:
        """Add what is measured of shared tensors to what this rank gives to the others."""
        raise NotImplementedError


class Products(Measured):
    """PRODUCTS with the weights before the step."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put them there."""
        columns.products[i, self.rows] = values.reshape(-1, len(PRODUCTS))

    def give(self, share: Share) -> None:
        """Give the sums, and the largest u."""
        share.add(0, cast(Tensor, self.shared), self.values)
        share.peak(cast(Tensor, self.shared), self.values[:, _U_MAX])


class ProductsAfter(Products):
    """PRODUCTS with the weights after the step, to be carried back over it."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put them there, and note whose they are."""
        super().enter(columns, i, values)
        columns.after[i, self.rows] = True


class Moved(Measured):
    """Above 0 where the step moved the tensor."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Leave those out that did not move."""
        columns.moved[i, self.rows] &= values > 0


class LearningRate(Measured):
    """η, where it is a tensor on the device."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put it there."""
        columns.lr[i, self.rows] = values


class Remembers(Measured):
    """What momentum remembers, where a device knows its numbers: the fields of `Remembered`."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put them there."""
        columns.remembered[i][:, self.rows] = values.reshape(-1, len(Remembered._fields)).T


class NormAfter(Measured):
    """‖w‖² after the step."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put it there."""
        columns.norm_sq_after[i, self.rows] = values

    def give(self, share: Share) -> None:
        """Give them."""
        share.add(_NORM_AFTER, cast(Tensor, self.shared), self.values)


class NormBefore(Measured):
    """‖w‖² before the step, of an audit."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put it there."""
        columns.norm_sq_audit[i, self.rows] = values

    def give(self, share: Share) -> None:
        """Give them."""
        share.add(_NORM_BEFORE, cast(Tensor, self.shared), self.values)


@dataclass
class Round:
    """One update of the run: a step of its optimizer, or of several that make it together.

    Attributes:
        step: its number, if none was skipped that is not known of yet.
        skips: updates before it that a GradScaler skipped, as a device knows, and that its number counts still.
        certain: whether one of its optimizers has made its step for certain.
        found: of the others, 1 where a GradScaler skipped, on their devices.
    """

    step: int
    skips: Tensor | None = None
    certain: bool = False
    found: list[Tensor] = field(default_factory=list)

    def join(self, found_inf: Tensor | None) -> None:
        """One more optimizer has stepped; `found_inf` is given where a device knows whether it did."""
        if found_inf is None:
            self.certain = True
        else:
            self.found.append(found_inf)

    def skipped(self) -> Tensor | None:
        """Updates up to this one that were skipped, by all their optimizers; on the device."""
        if self.certain or not self.found:
            return self.skips
        device = self.found[0].device
        itself = torch.stack([each.to(device, torch.float64).reshape(()) for each in self.found]).amin()
        return itself if self.skips is None else itself + self.skips

    def was_skipped(self) -> bool:
        """Whether all of its optimizers skipped it; waits for the device."""
        return bool(self.found) and not self.certain and all(bool(each.item()) for each in self.found)

    def settle(self, open_: bool) -> None:
        """Take its true number, now that the device is waited for; it stays the round of what was recorded in it.

        Args:
            open_: whether optimizers may still join it.
        """
        self.step, self.skips, self.certain, self.found = self.settled(), None, open_, []

    def settled(self) -> int:
        """Its true number, or that of the one before it, if it was skipped itself; waits for the device."""
        skipped = self.skipped()
        return self.step - (0 if skipped is None else int(skipped.item()))


@dataclass
class Record:
    """One logged update: what is still on the devices, and what the host knows; arrays (rows,)."""

    round: Round
    lr: np.ndarray  # NaN where it is a tensor on a device
    weight_decay: np.ndarray
    moved: np.ndarray  # false for a tensor that this update left alone
    remembered: np.ndarray  # (fields of Remembered, rows), NaN where unknown or on a device
    here: np.ndarray  # of shared tensors that moved: weights that this rank has measured
    after: np.ndarray  # of shared tensors: whether they are measured with the weights after the step
    audited: bool = False
    waiting: list[Measured] = field(default_factory=list)
    share: Share | None = None  # once it is sent

    @classmethod
    def of(cls, update: Round, rows: int) -> Record:
        """An empty one."""
        numbers = np.full((2 + len(Remembered._fields), rows), np.nan)
        still = np.zeros(rows, dtype=bool)
        return cls(update, numbers[0], numbers[1], still, numbers[2:], np.zeros(rows), still.copy())

    def _known(self) -> list[np.ndarray]:
        """What a rank that has nothing of a tensor is told by the others."""
        return [self.after, self.lr, self.weight_decay, *self.remembered]

    def send(self, ranks: Ranks) -> None:
        """Begin to add up what the ranks have measured; all of them come here once for each logged update."""
        known = self._known()
        self.share = Share(ranks, len(self.moved), _HOST + len(known), self.round.step)
        self.share.count(self.here)
        for column, values in enumerate(known, _HOST):  # times weights, they are sums over weights as well
            self.share.put(column, np.where(self.here > 0, self.here * values, 0.0))
        for measured in self.waiting:
            if measured.shared is not None:
                measured.give(self.share)
        self.waiting = [measured for measured in self.waiting if measured.shared is None]
        self.share.send()


class Book:
    """The logged updates that are not in the log yet.

    Args:
        warn: says something once: a key and the message.
    """

    def __init__(self, warn: Callable[[str, str], None]):
        self._warn = warn
        self.labels: dict[str, dict[str, Any]] = {}
        """The rows of every update, by their labels: what run.json says of each."""
        self.pending: list[Record] = []
        self.ranks: Ranks | None = None
        """Those that share tensors, if there are any."""
        self.copies = np.zeros(0)
        """How often the tensor of each row is there among the ranks that add up; 0 where this one has all of it."""

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return len(self.pending) * len(self.labels)

    def record(self, update: Round) -> Record:
        """The record of an update, opened by the first optimizer that asks for it; another once that is sent."""
        last = self.pending[-1] if self.pending else None
        if last is None or last.round is not update or last.share is not None:
            self.pending.append(Record.of(update, len(self.labels)))
        return self.pending[-1]

    def send(self) -> bool:
        """Let the ranks add up what was made of the last update, if it is logged. Returns whether anything was."""
        ranks = self.ranks
        unsent = [record for record in self.pending if record.share is None] if ranks is not None else []
        for record in unsent:
            record.send(cast(Ranks, ranks))
        return bool(unsent)

    def await_ranks(self, until: float) -> None:
        """Wait until the sums over the ranks are there, or cannot come, or it is `until` by `time.monotonic`."""
        for record in self.pending:
            if record.share is not None:
                record.share.pending.wait(until)

    def give_up(self) -> None:
        """Leave out what has not come from the other ranks."""
        done = self._done()
        if late := [record for record in self.pending[done:] if record.share is not None]:
            first = late[0].round.step
            self._warn(
                "late", f"the sums over the ranks of update {first} and later ones did not come: left out"
            )
            cast(Share, late[0].share).pending.abandon()
        del self.pending[done:]

    def _done(self) -> int:
        """How many of the waiting updates, from the first on, wait for no other rank."""
        if self.ranks is None:
            return len(self.pending)
        waits = (record.share is None or not record.share.pending.done() for record in self.pending)
        return next((i for i, each in enumerate(waits) if each), len(self.pending))

    def take(self) -> pd.DataFrame | None:
        """The stored columns of what waits, as `RunLog` reads them, if any: one copy from each device.

        Of tensors that ranks share only the updates that have been added up, in their order; none is waited for.
        """
        done = self._done()
        records, self.pending = self.pending[:done], self.pending[done:]
        kept = []
        for record in records:
            lost = record.share and record.share.pending.lost
            if lost:
                self._warn("ranks", f"the sums over the ranks of update {record.round.step} are lost: {lost}")
            else:
                kept.append(record)
        return self._rows_of(kept) if kept else None

    def _rows_of(self, records: Sequence[Record]) -> pd.DataFrame:
        found = _Columns(records)
        numel = np.array([entry["numel"] for entry in self.labels.values()], dtype=float)
        for i, record in enumerate(records):
            if record.share is not None:
                self._enter_shared(record, record.share, numel, found, i)
        fetched = _to_host([measured.values for record in records for measured in record.waiting])
        for i, record in enumerate(records):
            for measured in record.waiting:
                measured.enter(found, i, next(fetched))
        steps = np.array([record.round.settled() for record in records])
        products = dict(zip(PRODUCTS, np.moveaxis(found.products, -1, 0), strict=True))
        dot_wu, u_sq, w_sq, m_sq, v_sum = (
            products.pop(name) for name in ("dot_wu", "u_sq", "w_sq", "m_sq", "v_sum")
        )
        remembered = Remembered(*np.moveaxis(found.remembered, 1, 0))
        with np.errstate(all="ignore"):  # what is not finite is recorded as it is
            # In units of u: as if all of it were made of this gradient.
            dot_wg, dot_ug = (products.pop(name) * remembered.gain for name in ("dot_wg", "dot_ug"))
            g_sq = products.pop("g_sq") * remembered.gain**2
            undone = before_step(dot_wu, u_sq, w_sq, found.lr, found.weight_decay)
            dot_wg_undone = fresh_before_step(dot_wg, dot_ug, found.lr, found.weight_decay)
            lost = found.after & (np.abs(1 - found.lr * found.weight_decay) < _LOST)
            m_rms, v_mean = np.sqrt(m_sq / numel), v_sum / numel
        if (lost & found.moved).any():
            self._warn(
                "lost",
                "at ηλ = 1 the decay erases the weights, and those before the step are not known where η is a "
                "tensor on a device or changes during the step: recorded as NaN",
            )
        columns = {
            "lr": found.lr,
            "weight_decay": found.weight_decay,
            "norm_sq_after": np.where(found.after, w_sq, found.norm_sq_after),
            "norm_sq_audit": found.norm_sq_audit,
            "dot_wu": np.where(lost, np.nan, np.where(found.after, undone.dot_wu, dot_wu)),
            # Rounding can take it below 0.
            "norm_sq": np.where(lost, np.nan, np.where(found.after, np.maximum(undone.w_sq, 0), w_sq)),
            "u_sq": u_sq,
            "m_rms": m_rms,
            "v_mean": v_mean,
            "dot_wg": np.where(lost, np.nan, np.where(found.after, dot_wg_undone, dot_wg)),
            "dot_ug": dot_ug,
            "g_sq": g_sq,
            "lr_memory": remembered.lr_memory,
            "fresh": remembered.fresh,
            **products,
        }
        rows = found.moved.shape[1]
        table = pd.DataFrame(
            {
                "step": np.repeat(steps, rows),
                "span": 1,
                "tensor": pd.Categorical.from_codes(np.tile(np.arange(rows), len(steps)), list(self.labels)),
                **{name: values.ravel() for name, values in columns.items()},
            }
        )
        return table[found.moved.ravel()]

    def _enter_shared(
        self, record: Record, share: Share, numel: np.ndarray, columns: _Columns, i: int
    ) -> None:
        """Put the sums over the ranks where they belong for update i."""
        shared = self.copies > 0
        total = share.total(numel, self.copies)
        wrong = np.flatnonzero(shared & ~total.right & (total.counted > 0))
        if len(wrong):
            label, count, whole = list(self.labels)[wrong[0]], total.counted[wrong[0]], numel[wrong[0]]
            why = f"{count:,.0f} of the {whole:,.0f} weights of {label} were counted"
            why = why if total.agreed else "the ranks were not at the same update"
            self._warn(
                "shares", f"at update {record.round.step} {why}: what they added up is recorded as NaN"
            )
        columns.moved[i, shared] = (total.counted > 0)[shared]
        with np.errstate(invalid="ignore"):  # an empty view has no weights
            after, lr, weight_decay, *remembered = (total.sums[:, _HOST:] / numel[:, None]).T
        columns.after[i, shared] = after[shared] > 0.5
        told = (columns.lr[i], lr), (columns.weight_decay[i], weight_decay)
        for here, there in (*told, *zip(columns.remembered[i], remembered, strict=True)):
            unknown = shared & np.isnan(here)
            here[unknown] = there[unknown]
        products = total.sums[:, : len(PRODUCTS)]
        products[:, _U_MAX] = np.where(np.isnan(products[:, PRODUCTS.index("u_sq")]), np.nan, total.peaks)
        columns.products[i, shared] = products[shared]
        measured_after = np.where(columns.after[i], np.nan, total.sums[:, _NORM_AFTER])
        columns.norm_sq_after[i, shared] = measured_after[shared]
        if record.audited:
            columns.norm_sq_audit[i, shared] = total.sums[shared, _NORM_BEFORE]


def on_one_device(values: Iterable[Any]) -> Tensor:
    """Numbers, some of them on a device, as one float64 tensor there."""
    values = list(values)
    device = next(value.device for value in values if isinstance(value, Tensor))
    return torch.stack(
        [torch.as_tensor(value, dtype=torch.float64).to(device).reshape(()) for value in values]
    )


def _to_host(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """The values of float64 tensors, flat, in their order, with one copy from each device."""
    devices = {tensor.device for tensor in tensors}
    flat = {d: torch.cat([t.reshape(-1) for t in tensors if t.device == d]).cpu().numpy() for d in devices}
    taken = dict.fromkeys(devices, 0)
    for tensor in tensors:
        start = taken[tensor.device]
        taken[tensor.device] = start + tensor.numel()
        yield flat[tensor.device][start : start + tensor.numel()]
