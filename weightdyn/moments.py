"""One pass over the weights and moments of many tensors: the inner products that the forces are made of.

u = m̂/(√v̂+ε) is formed in pieces that stay in cache, used and dropped. Large tensors are read in place; small
ones are packed, so that hundreds of norms and biases cost a handful of calls. Short blocks are reduced in the
weights' own precision and the blocks are summed in float64: float32 weights give 1e-8, temporary memory is a
constant. Nothing here copies to the host or waits for the device: results stay where the weights are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weightdyn.naming import View

PRODUCTS = ("dot_wu", "u_sq", "w_sq", "m_rms", "v_mean", "u_max")
"""Columns of a measurement: ⟨w,u⟩, ‖u‖², ‖w‖², rms of m̂, mean of v̂, max|u|."""

_BLOCK = 128  # so many products at most are summed in the weights' own precision
_CHUNK = {"cpu": 1 << 18}  # weights in a piece: the caches of a CPU, ...
_DEVICE_CHUNK = 1 << 21  # ... or enough to be worth a kernel's launch; both bound the temporary memory
_SMALL = 1 << 16  # tensors up to this size are packed ...
_TINY = (
    1 << 12
)  # ... and up to this size, or with odd shapes, read in float64: they have few blocks to average


class Adam(NamedTuple):
    """What turns the moments of one tensor into u: β₁, β₂, ε, and the count t of this update (1-based)."""

    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    step: float | Tensor


@dataclass(frozen=True)
class _Tensor:
    """How one tensor falls into rows of the result: run i of `unit` weights belongs to rows[i % len(rows)]."""

    numel: int
    unit: int
    rows: tuple[int, ...]
    block: int  # weights that can be summed together wherever the tensor is cut; divides unit

    @classmethod
    def of(cls, shape: Sequence[int], views: Sequence[View], first_row: int) -> _Tensor:
        numel = math.prod(shape)
        if not views:
            return cls(numel, numel, (first_row,), math.gcd(numel, _BLOCK))
        axis = views[0].axis
        step = math.gcd(shape[axis], *(edge for view in views for bounds in view.ranges for edge in bounds))
        rows = [first_row] * (shape[axis] // step)
        for i, view in enumerate(views):
            for start, stop in view.ranges:
                rows[start // step : stop // step] = [first_row + i] * ((stop - start) // step)
        inner = math.prod(shape[axis + 1 :])
        # Along the last axis the runs are `step` long; before it, whole lines of `inner` weights stay together.
        return cls(numel, inner * step, tuple(rows), _largest_divisor(inner if inner > 1 else step))


class _Piece(NamedTuple):
    """Weights to be read at once: part of one large tensor, or several small ones laid end to end."""

    flats: tuple[Tensor, ...]  # (blocks, block size), one for each input of the tensors
    owner: int | Tensor  # index of the tensor: of all, or of each block (blocks,)
    row: int | Tensor  # row of the result: of all, or of each block (blocks,)

    def pick(self, column: Tensor) -> Tensor:
        """The tensors' own values of a column, to combine with the flats."""
        values = column[self.owner].to(self.flats[0].dtype)
        return values.unsqueeze(-1) if values.ndim else values


class Plan:
    """How a set of tensors on one device is read, and which row of the result each of their parts has.

    Args:
        shapes: shape of each tensor.
        views: for each tensor its views, in the order of the rows, or () for a tensor that is one thing.
        device: where the tensors live.

    Attributes:
        numel: float64 (R,), the number of weights of each row. Rows follow the order of the tensors and, in
            each, of the views.
        owner: int64 (R,), index of the tensor that each row belongs to.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], views: Sequence[Sequence[View]], device: torch.device
    ):
        self.device = device
        self._chunk = _CHUNK.get(device.type, _DEVICE_CHUNK)
        self._tensors: list[_Tensor] = []
        numel: list[int] = []
        owner: list[int] = []
        for i, (shape, parts) in enumerate(zip(shapes, views, strict=True)):
            self._tensors.append(_Tensor.of(shape, parts, len(numel)))
            numel += [part.numel(shape) for part in parts] or [math.prod(shape)]
            owner += [i] * (len(numel) - len(owner))
        self.numel = torch.tensor(numel, dtype=torch.float64, device=device)
        self.owner = torch.tensor(owner, device=device)
        self._large = [i for i, each in enumerate(self._tensors) if each.numel > _SMALL]
        small = [i for i, each in enumerate(self._tensors) if each.numel <= _SMALL]
        tiny = [i for i in small if self._tensors[i].numel <= _TINY or self._tensors[i].block % 32]
        self._packs = [
            (pack, dtype, *self._pack_index(pack))
            for dtype, group in ((torch.float32, sorted({*small} - {*tiny})), (torch.float64, tiny))
            for pack in self._pack(group)
        ]
        self._patterns = {
            i: torch.tensor(self._tensors[i].rows, device=device)
            for i in self._large
            if len(self._tensors[i].rows) > 1
        }

    def moments(
        self,
        weights: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        adams: Sequence[Adam],
        grads: Sequence[Tensor] | None = None,
        grad_factors: Sequence[float | Tensor] | None = None,
        max_exp_avg_sqs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """⟨w,u⟩, ‖u‖², ‖w‖² and the moments' summaries, for AdamW's u.

        u = m̂/(√v̂ + ε),  m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)   (Kingma and Ba 2015; Loshchilov and Hutter 2019)

        Args:
            weights: the tensors; the products are those of these weights, before or after the update.
            exp_avgs: m of each.
            exp_avg_sqs: v of each; with amsgrad the maximum that the update divides by.
            adams: the update's constants, one for each tensor. Tensors among them are used where they are.
            grads: if given, m and v are those before the update, and the gradients are what moves them; the
                result is rounded to the moments' type (one for all tensors), as the update will be.
            grad_factors: with `grads`, what each is multiplied by (−1 to maximize, 1/scale under a GradScaler).
            max_exp_avg_sqs: with `grads` and amsgrad, the running maximum before the update.

        Returns:
            float64 tensor (R, 6), columns PRODUCTS. Types below 32 bits are raised to float32 first.
        """
        beta1, beta2, epsilon, step = self._columns(adams)
        correction1 = 1 - beta1**step
        root2 = (1 - beta2**step).sqrt()
        # u = (m/c₁)/(√v/r₂ + ε) = (r₂/c₁)·m/(√v + ε·r₂): a factor behind the sums instead of two passes.
        eps = epsilon * root2
        scale = (root2 / correction1)[self.owner]

        inputs = [weights, exp_avgs, exp_avg_sqs]
        inputs += [] if grads is None else [grads]
        factor = None if grad_factors is None else self._columns([(each,) for each in grad_factors])[0]
        inputs += [] if max_exp_avg_sqs is None else [max_exp_avg_sqs]
        kind = exp_avgs[0].dtype
        sums = _Sums(5, self)
        for piece in self._pieces(inputs):
            w, m, v, *more = piece.flats
            if more:
                grad, *top = more
                grad = grad if factor is None else grad * piece.pick(factor)
                m = _rounded(torch.lerp(grad, m, piece.pick(beta1)), kind)
                v = _rounded(v * piece.pick(beta2), kind)
                v = _rounded(v.addcmul(grad * grad, 1 - piece.pick(beta2)), kind)
                v = torch.maximum(v, top[0]) if top else v
            u = v.sqrt()
            u.add_(piece.pick(eps))
            torch.div(m, u, out=u)
            sums.add(piece, dots=[(w, u)], squares=[u, w, m], sums=[v], peak=u)
        dot_wu, u_sq, w_sq, m_sq, v_sum, u_max = sums.totals()
        m_rms = (m_sq / self.numel).sqrt() / correction1[self.owner]
        v_mean = v_sum / self.numel / root2[self.owner] ** 2
        columns = (dot_wu * scale, u_sq * scale**2, w_sq, m_rms, v_mean, u_max * scale)
        return torch.stack(columns, dim=1)

    def displacement(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        lr: Sequence[float | Tensor],
        weight_decay: Sequence[float | Tensor],
    ) -> Tensor:
        """The same products from two copies of the weights, for any optimizer with decoupled decay.

        u = ((1−ηλ)w − w')/η, in float64; u = 0 where η = 0, for then nothing moves.

        Args:
            before: w of each tensor.
            after: w' of each tensor.
            lr: η, one for each tensor.
            weight_decay: decoupled λ, one for each tensor (0 for an optimizer that puts it into the gradient).

        Returns:
            float64 tensor (R, 6), columns PRODUCTS with NaN for `m_rms` and `v_mean`; ⟨w,u⟩ and ‖w‖² are those
            before the update.
        """
        eta, decay = self._columns(list(zip(lr, weight_decay, strict=True)))
        shrink = 1 - eta * decay
        inverse = torch.where(eta == 0, 0.0, 1 / eta)
        sums = _Sums(3, self)
        for piece in self._pieces([before, after]):
            piece = piece._replace(flats=tuple(flat.double() for flat in piece.flats))
            w, moved = piece.flats
            u = (w * piece.pick(shrink) - moved) * piece.pick(inverse)
            sums.add(piece, dots=[(w, u)], squares=[u, w], peak=u)
        dot_wu, u_sq, w_sq, u_max = sums.totals()
        missing = torch.full_like(u_sq, math.nan)
        return torch.stack((dot_wu, u_sq, w_sq, missing, missing, u_max), dim=1)

    def norms(self, weights: Sequence[Tensor]) -> Tensor:
        """‖w‖² of every row: float64 (R,)."""
        sums = _Sums(1, self)
        for piece in self._pieces([weights]):
            sums.add(piece, squares=piece.flats)
        return sums.totals()[0]

    def _columns(self, values: Sequence[tuple[float | Tensor, ...]]) -> Tensor:
        """Float64 (columns, tensors) on the device. Values from the host travel without waiting for it."""
        if not any(isinstance(value, Tensor) for each in values for value in each):
            return torch.tensor(values, dtype=torch.float64).T.to(self.device, non_blocking=True)
        wide = {"dtype": torch.float64, "device": self.device}
        cells = [
            value.reshape(()).to(**wide, non_blocking=True)
            if isinstance(value, Tensor)
            else torch.full((), value, **wide)
            for each in values
            for value in each
        ]
        return torch.stack(cells).view(len(values), -1).T

    def _pack(self, small: Sequence[int]) -> Iterator[list[int]]:
        """Small tensors in groups of at most a chunk."""
        pack: list[int] = []
        room = self._chunk
        for i in small:
            if self._tensors[i].numel > room:
                yield pack
                pack, room = [], self._chunk
            pack.append(i)
            room -= self._tensors[i].numel
        if pack:
            yield pack

    def _pack_index(self, pack: list[int]) -> tuple[int, Tensor, Tensor]:
        """Block size of a pack, and the tensor and the row of each block."""
        block = math.gcd(*(self._tensors[i].block for i in pack))
        owner, row = [], []
        for i in pack:
            each = self._tensors[i]
            run = torch.arange(0, each.numel, block) // each.unit % len(each.rows)
            row.append(torch.tensor(each.rows)[run])
            owner.append(torch.full_like(run, i))
        return block, torch.cat(owner).to(self.device), torch.cat(row).to(self.device)

    def _pieces(self, inputs: Sequence[Sequence[Tensor]]) -> Iterator[_Piece]:
        """Read the tensors: `inputs` holds one sequence of tensors for each quantity (w, m, v, …)."""
        for i in self._large:
            each = self._tensors[i]
            for offset, flats in _chunks(tuple(column[i] for column in inputs), self._chunk, each.block):
                length = flats[0].numel()
                if i not in self._patterns:
                    yield _Piece(_blocks(flats, math.gcd(length, _BLOCK)), i, each.rows[0])
                    continue
                block = math.gcd(offset, length, each.block)
                start = torch.arange(offset, offset + length, block, device=self.device)
                run = start.div_(each.unit, rounding_mode="floor").remainder_(len(each.rows))
                yield _Piece(_blocks(flats, block), i, self._patterns[i][run])
        for pack, dtype, block, owner, row in self._packs:
            flats = tuple(torch.cat([column[i].reshape(-1) for i in pack]) for column in inputs)
            yield _Piece(_blocks(flats, block, dtype), owner, row)


class _Sums:
    """Sums over weights, and the largest magnitude, for each row of a plan, in float64."""

    def __init__(self, columns: int, plan: Plan):
        rows = plan.numel.numel()
        self._sums = torch.zeros(columns, rows, dtype=torch.float64, device=plan.device)
        self._peak = torch.zeros(rows, dtype=torch.float64, device=plan.device)
        self._rows: list[int] = []
        self._scalars: list[Tensor] = []
        self._peaks: list[Tensor] = []

    def add(
        self,
        piece: _Piece,
        dots: Sequence[tuple[Tensor, Tensor]] = (),
        squares: Sequence[Tensor] = (),
        sums: Sequence[Tensor] = (),
        peak: Tensor | None = None,
    ) -> None:
        """Add Σab for each of `dots`, then Σa² and Σa for the others, and take in max|peak|."""
        columns = [torch.linalg.vecdot(a, b).double() for a, b in dots]
        columns += [torch.linalg.vector_norm(a, dim=-1).double().square() for a in squares]
        columns += [a.sum(-1).double() for a in sums]
        if isinstance(piece.row, int):
            self._rows.append(piece.row)
            self._scalars += [column.sum() for column in columns]
            self._peaks += [] if peak is None else torch.aminmax(peak)
            return
        for total, column in zip(self._sums, columns, strict=True):
            total.index_add_(0, piece.row, column)
        if peak is not None:
            self._peak.scatter_reduce_(0, piece.row, peak.abs().amax(-1).double(), "amax")

    def totals(self) -> list[Tensor]:
        """Sum of each column, then the peak: float64 (R,) each."""
        if self._rows:
            row = torch.tensor(self._rows).to(self._sums.device, non_blocking=True)
            scalars = torch.stack(self._scalars).view(len(row), -1).T
            for total, column in zip(self._sums, scalars, strict=True):
                total.index_add_(0, row, column)
            if self._peaks:
                peaks = torch.stack(self._peaks).view(-1, 2).abs().amax(-1)
                self._peak.scatter_reduce_(0, row, peaks.double(), "amax")
        return [*self._sums, self._peak]


def _chunks(tensors: tuple[Tensor, ...], size: int, block: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Cut equally shaped tensors into 1-D pieces of about `size`, in logical order, copying as little as can be.

    Yields the offset of a piece with the pieces. Contiguous tensors are cut in place, at multiples of `block`.
    """
    if all(each.is_contiguous() for each in tensors):
        tensors = tuple(each.view(-1) for each in tensors)
    first = tensors[0]
    width = first[0].numel()
    if width > size:
        for i in range(first.shape[0]):
            for offset, flats in _chunks(tuple(each[i] for each in tensors), size, block):
                yield i * width + offset, flats
        return
    lines = max(1, size // width)
    if width == 1 and lines > block:
        lines -= lines % block
    for start in range(0, first.shape[0], lines):
        yield start * width, tuple(each[start : start + lines].reshape(-1) for each in tensors)


def _blocks(flats: Sequence[Tensor], block: int, least: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Shape to (blocks, block size); raise narrower types to `least`."""
    dtype = functools.reduce(torch.promote_types, (flat.dtype for flat in flats), least)
    return tuple(flat.to(dtype).view(-1, block) for flat in flats)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as they come back from storage in `dtype`."""
    return values.to(dtype).to(values.dtype)


def _largest_divisor(number: int) -> int:
    return next(i for i in range(min(number, _BLOCK), 0, -1) if number % i == 0)
