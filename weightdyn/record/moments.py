"""One pass over the weights and moments of many tensors: the inner products that the forces are made of.

u = m̂/(√v̂+ε) is formed in pieces that stay in cache, used and dropped. Large tensors are read in place; small
ones are packed, so that hundreds of norms and biases cost a handful of calls. Short blocks are reduced in the
weights' own precision and the blocks are summed in float64: float32 weights give 1e-8, and temporary memory is a
constant. Nothing here copies to the host or waits for the device: results stay where the weights are.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightdyn.core.naming import View

PRODUCTS = ("dot_wu", "u_sq", "w_sq", "m_sq", "v_sum", "u_max", "dot_wg", "dot_ug", "g_sq")
"""Columns of a measurement: ⟨w,u⟩, ‖u‖², ‖w‖², ‖m̂‖², Σv̂, max|u|, and ⟨w,g̃⟩, ⟨u,g̃⟩, ‖g̃‖² with the fresh gradient
in units of u, g̃ = g/(√v̂+ε). All but the largest are sums over weights, so that parts of a tensor add."""

_BLOCK = 256  # so many products at most are summed in the weights' own precision
_CHUNK = {"cpu": 1 << 18}  # weights in a piece: the caches of a CPU, ...
_DEVICE_CHUNK = 1 << 21  # ... or enough to be worth a kernel's launch; both bound the temporary memory
_KEPT = 1 << 16  # blocks whose sums may wait to be added up together
_SMALL = 1 << 16  # tensors up to this size are packed
_TINY = 1 << 12  # ... and those up to this size, with too few blocks for errors to average, in float64, ...
_SHORT = 32  # ... as are those whose blocks are shorter than this


class Adam(NamedTuple):
    """What turns the moments of one tensor into u: β₁, β₂, ε, and the count t of this update (1-based)."""

    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    step: float | Tensor


class Fresh(NamedTuple):
    """The gradients of the update: that of a tensor acts as factor·grad + coupled_decay·w, w before the update.

    Attributes:
        grads: as they stand in the parameters.
        factors: what each is multiplied by: −1 to maximize, 1/scale under a GradScaler.
        coupled_decays: λ of a decay that is added to the gradient, not decoupled.
    """

    grads: Sequence[Tensor]
    factors: Sequence[float | Tensor]
    coupled_decays: Sequence[float]


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
    row: Tensor  # row of the result of each block (blocks,)
    alone: bool  # whether that is one row for all

    def pick(self, column: Any) -> Any:
        """The tensors' own values of a column, or the one value of all, to combine with the flats."""
        if isinstance(column, float):
            return column
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
        short = [i for i in small if self._tensors[i].numel <= _TINY or self._tensors[i].block < _SHORT]
        self._packs = [
            (pack, dtype, *self._pack_index(pack))
            for dtype, group in ((torch.float32, sorted({*small} - {*short})), (torch.float64, short))
            for pack in self._pack(group)
        ]
        self._patterns = {i: torch.tensor(self._tensors[i].rows, device=device) for i in self._large}

    def moments(
        self,
        weights: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        adams: Sequence[Adam],
        *,
        fresh: Fresh | None = None,
        lr: Sequence[float | Tensor] | None = None,
        ahead: bool = False,
        rounded: bool = False,
        max_exp_avg_sqs: Sequence[Tensor] | None = None,
        drift: bool = True,
    ) -> Tensor:
        """⟨w,u⟩, ‖u‖², ‖w‖², the moments' summaries, and the products with the fresh gradient, for AdamW's u.

        u = m̂/(√v̂ + ε),  m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)   (Kingma and Ba 2015; Loshchilov and Hutter 2019)

        g̃ is divided by the same √v̂ + ε as m̂, that of the update, which holds (1−β₂)g²: of noise that is as
        likely as its opposite the mean of ⟨w,g̃⟩ is 0 all the same, and no element of g̃ is larger than
        √((1−β₂ᵗ)/(1−β₂)), however rare its gradients are. Of what u holds of a mean gradient it lacks some 1.5 % at
        β₁ = 0.9, β₂ = 0.95, nothing to speak of at β₂ = 0.999. By the v̂ before the update it would be 3 % too
        large, and have no bound.

        Args:
            weights: the tensors; the products are those of these weights, before or after the update.
            exp_avgs: m of each.
            exp_avg_sqs: v of each; with amsgrad the maximum that the update divides by.
            adams: the update's constants, one for each tensor. Tensors among them are used where they are.
            fresh: the gradients of the update; without them the products of g̃ are NaN.
            lr: η of each tensor, if the weights are those after the update: a coupled decay needs those before.
            ahead: whether m and v are those before the update, and the gradients are what moves them.
            rounded: whether the update then rounds them to their type (one for all tensors) before it uses them,
                as torch's do that are not fused.
            max_exp_avg_sqs: with `ahead` and amsgrad, the running maximum before the update.
            drift: whether the products with g̃ are wanted, where `fresh` is given.

        Returns:
            float64 tensor (R, 9), columns PRODUCTS. Types below 32 bits are raised to float32 first.
        """
        beta1, beta2, epsilon, step = self._columns(adams)
        correction1 = 1 - beta1**step
        root2 = (1 - beta2**step) ** 0.5
        # u = (m/c₁)/(√v/r₂ + ε) = (r₂/c₁)·m/(√v + ε·r₂): a factor behind the sums instead of two passes.
        eps = epsilon * root2
        factor, coupled = self._acting(fresh)
        # Of a plain gradient the factor may wait until the sums are made.
        plain = not ahead and fresh is not None and not any(fresh.coupled_decays)
        back = 0.0 if lr is None else self._columns([(each,) for each in lr])[0] * (root2 / correction1)

        drift = drift and fresh is not None
        inputs = [weights, exp_avgs, exp_avg_sqs]
        inputs += [] if fresh is None else [fresh.grads]
        inputs += [] if max_exp_avg_sqs is None else [max_exp_avg_sqs]
        sums = _Sums(8 if drift else 5, self)
        for piece in self._pieces(inputs):
            w, m, v, *more = piece.flats
            grad = more[0] if more else w
            if ahead:
                kind = exp_avgs[0].dtype if rounded else m.dtype
                grad = _rounded(_acting(grad, w, piece.pick(factor), piece.pick(coupled)), kind)
                m = _rounded(torch.lerp(grad, m, piece.pick(beta1), out=_like("m", m)), kind)
                v = _rounded(torch.mul(v, piece.pick(beta2), out=_like("v", v)), kind)
                square = torch.mul(grad, grad, out=_like("product", v)).mul_(1 - piece.pick(beta2))
                v = _rounded(v.add_(square), kind)
                v = torch.maximum(v, more[1], out=v) if len(more) > 1 else v
            root = torch.sqrt(v, out=_like("u", v))
            root.add_(piece.pick(eps))
            if drift and not ahead and not plain:
                before = torch.div(m, root, out=_like("w", w)).mul_(piece.pick(back)).add_(w)
                grad = _acting(grad, before, piece.pick(factor), piece.pick(coupled))
            # The dots of a piece that is one row leave the memory for products free.
            room = _like("product" if piece.alone else "g", v)
            g = torch.div(grad, root, out=room) if drift else None
            u = torch.div(m, root, out=root)
            fresh_norms, fresh_dots = ([], []) if g is None else ([g], [(w, g), (u, g)])
            sums.add(piece, norms=[u, w, m, *fresh_norms], dots=[(w, u), *fresh_dots], sums=[v], peak=u)
        scale, root2 = self._by_row(root2 / correction1), self._by_row(root2)
        if drift:
            dot_wu, dot_wg, dot_ug, u_sq, w_sq, m_sq, g_sq, v_sum, u_max = sums.totals()
            unit = root2 * self._by_row(factor) if plain else root2
            of_fresh = (dot_wg * unit, dot_ug * scale * unit, g_sq * unit**2)
        else:
            dot_wu, u_sq, w_sq, m_sq, v_sum, u_max = sums.totals()
            of_fresh = (torch.full_like(u_sq, math.nan),) * 3
        m_sq, v_sum = m_sq / self._by_row(correction1) ** 2, v_sum / root2**2
        columns = (dot_wu * scale, u_sq * scale**2, w_sq, m_sq, v_sum, u_max * scale, *of_fresh)
        return torch.stack(columns, dim=1)

    def displacement(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        lr: Sequence[float | Tensor],
        weight_decay: Sequence[float | Tensor],
        *,
        fresh: Fresh | None = None,
        exp_avg_sqs: Sequence[Tensor] | None = None,
        adams: Sequence[Adam] | None = None,
    ) -> Tensor:
        """The same products from two copies of the weights, for any optimizer with decoupled decay.

        u = ((1−ηλ)w − w')/η, in float64; u = 0 where η = 0, for then nothing moves.

        Args:
            before: w of each tensor.
            after: w' of each tensor.
            lr: η, one for each tensor.
            weight_decay: decoupled λ, one for each tensor (0 for an optimizer that puts it into the gradient).
            fresh: the gradients of the update; without them the products of g̃ are NaN.
            exp_avg_sqs, adams: v of each and the update's constants, of an optimizer that divides by √v̂ + ε;
                without them g̃ is the gradient.

        Returns:
            float64 tensor (R, 9), columns PRODUCTS with NaN for `m_sq` and `v_sum`; the products are those of
            the weights before the update.
        """
        eta, decay = self._columns(list(zip(lr, weight_decay, strict=True)))
        shrink = 1 - eta * decay
        still = eta == 0
        inverse = (1.0 - still * 1.0) / (eta + still)  # 0 where η = 0
        factor, coupled = self._acting(fresh)
        inputs = [before, after]
        inputs += [] if fresh is None else [fresh.grads]
        inputs += [] if exp_avg_sqs is None else [exp_avg_sqs]
        _, beta2, epsilon, step = self._columns([Adam(0.0, 0.0, 0.0, 1.0)] if adams is None else adams)
        root2 = (1 - beta2**step) ** 0.5
        sums = _Sums(3 if fresh is None else 6, self)
        for piece in self._pieces(inputs):
            piece = piece._replace(flats=_widened(piece.flats, torch.float64))
            w, moved, *more = piece.flats
            u = torch.mul(w, piece.pick(shrink), out=_like("u", w)).sub_(moved).mul_(piece.pick(inverse))
            if fresh is None:
                sums.add(piece, norms=[u, w], dots=[(w, u)], peak=u)
                continue
            g = _acting(more[0], w, piece.pick(factor), piece.pick(coupled))
            if adams is not None:
                root = torch.sqrt(more[1], out=_like("v", w)).div_(piece.pick(root2))
                g.div_(root.add_(piece.pick(epsilon)))
            sums.add(piece, norms=[u, w, g], dots=[(w, u), (w, g), (u, g)], peak=u)
        if fresh is None:
            dot_wu, u_sq, w_sq, u_max = sums.totals()
            g_sq = dot_wg = dot_ug = torch.full_like(u_sq, math.nan)
        else:
            dot_wu, dot_wg, dot_ug, u_sq, w_sq, g_sq, u_max = sums.totals()
        missing = torch.full_like(u_sq, math.nan)
        return torch.stack((dot_wu, u_sq, w_sq, missing, missing, u_max, dot_wg, dot_ug, g_sq), dim=1)

    def norms(self, weights: Sequence[Tensor]) -> Tensor:
        """‖w‖² of every row: float64 (R,)."""
        sums = _Sums(1, self)
        for piece in self._pieces([weights]):
            sums.add(piece, norms=piece.flats)
        return sums.totals()[0]

    def _columns(self, values: Sequence[tuple[float | Tensor, ...]]) -> Any:
        """Columns of the tensors' values: a float where all tensors share it, else float64 (tensors,).

        Values from the host travel without waiting for the device.
        """
        wide = {"dtype": torch.float64, "device": self.device}
        if not any(isinstance(value, Tensor) for each in values for value in each):
            if len(set(values)) == 1:
                return [float(value) for value in values[0]]
            return torch.tensor(list(zip(*values, strict=True)), dtype=torch.float64).to(
                **wide, non_blocking=True
            )
        cells = [
            value.reshape(()).to(**wide, non_blocking=True)
            if isinstance(value, Tensor)
            else torch.full((), value, **wide)
            for column in zip(*values, strict=True)
            for value in column
        ]
        return torch.stack(cells).view(-1, len(values))

    def _acting(self, fresh: Fresh | None) -> Any:
        """What the gradients are multiplied by, and their coupled decays."""
        if fresh is None:
            return 1.0, 0.0
        return self._columns(list(zip(fresh.factors, fresh.coupled_decays, strict=True)))

    def _by_row(self, column: Any) -> Any:
        """Values of the tensors as values of their rows."""
        return column if isinstance(column, float) else column[self.owner]

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
                block = math.gcd(offset, length, each.block)
                pattern = self._patterns[i]
                if len(pattern) == 1:
                    row = pattern.expand(length // block)
                else:
                    start = torch.arange(offset, offset + length, block, device=self.device)
                    row = pattern[start.div_(each.unit, rounding_mode="floor").remainder_(len(pattern))]
                yield _Piece(_blocks(flats, block), i, row, len(pattern) == 1)
        for pack, dtype, block, owner, row in self._packs:
            flats = [_end_to_end([column[i] for i in pack], name) for name, column in enumerate(inputs)]
            yield _Piece(_blocks(flats, block, dtype), owner, row, False)


class _Sums:
    """Sums over weights, and the largest magnitude, for each row of a plan, in float64."""

    def __init__(self, columns: int, plan: Plan):
        rows = plan.numel.numel()
        self._totals = torch.zeros(columns + 1, rows, dtype=torch.float64, device=plan.device)
        # By their columns in the totals: rows and values of what is not yet in them.
        self._kept: dict[range, list[tuple[Tensor, list[Tensor]]]] = {}
        self._blocks = 0

    def add(
        self,
        piece: _Piece,
        dots: Sequence[tuple[Tensor, Tensor]] = (),
        norms: Sequence[Tensor] = (),
        sums: Sequence[Tensor] = (),
        peak: Tensor | None = None,
    ) -> None:
        """Take in Σab of each of `dots`, then √Σa² of `norms`, Σa of `sums`, and max|peak|."""
        self._squares = range(len(dots), len(dots) + len(norms))
        if piece.alone:  # no product needs to be stored
            products = [torch.dot(a.view(-1), b.view(-1)).view(1) for a, b in dots]
        else:
            products = [torch.mul(a, b, out=_like("product", a)).sum(-1) for a, b in dots]
        columns = [torch.linalg.vector_norm(a, dim=-1) for a in norms]
        columns += [a.sum(-1) for a in sums]
        columns += [] if peak is None else [torch.abs(peak, out=_like("product", peak)).amax(-1)]
        first, end = len(dots), len(dots) + len(columns)
        if dots:
            self._kept.setdefault(range(first), []).append((piece.row[: len(products[0])], products))
        self._kept.setdefault(range(first, end), []).append((piece.row, columns))
        self._blocks += len(piece.row)
        if self._blocks > _KEPT:
            self._settle()

    def totals(self) -> Tensor:
        """The dots, Σa² of each norm, the sums, and the peak: float64 (columns + 1, R)."""
        self._settle()
        return self._totals

    def _settle(self) -> None:
        for columns, kept in self._kept.items():
            row = torch.cat([row for row, _ in kept])
            for i, parts in zip(columns, zip(*(parts for _, parts in kept), strict=True), strict=True):
                values = torch.cat(parts).double()
                if i == len(self._totals) - 1:
                    self._totals[i].scatter_reduce_(0, row, values, "amax")
                else:
                    self._totals[i].index_add_(0, row, values.square_() if i in self._squares else values)
        self._kept, self._blocks = {}, 0


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


def _end_to_end(tensors: Sequence[Tensor], name: object) -> Tensor:
    """Tensors of one type in one dimension, in memory that the next of this name will take."""
    size = sum(each.numel() for each in tensors)
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in tensors))
    out = _scratch(name, size, dtype, tensors[0].device)
    return torch.cat([each.reshape(-1) for each in tensors], out=out)


def _blocks(flats: Sequence[Tensor], block: int, least: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Shape to (blocks, block size); raise narrower types to `least`."""
    dtype = functools.reduce(torch.promote_types, (flat.dtype for flat in flats), least)
    return tuple(flat.view(-1, block) for flat in _widened(flats, dtype))


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[object, torch.dtype, torch.device], Tensor] = {}


_BUFFERS = _Buffers()


def _scratch(name: object, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `size` numbers: a fresh megabyte costs more than what is done in it, and leaves holes behind."""
    buffers = _BUFFERS.held
    key = name, dtype, device
    if key not in buffers or buffers[key].numel() < size:
        buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key][:size]


def _like(name: object, piece: Tensor) -> Tensor:
    return _scratch(name, piece.numel(), piece.dtype, piece.device).view(piece.shape)


def _as(name: object, piece: Tensor, dtype: torch.dtype) -> Tensor:
    if piece.dtype == dtype:
        return piece
    return _scratch(name, piece.numel(), dtype, piece.device).view(piece.shape).copy_(piece)


def _widened(flats: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in a wider type."""
    return tuple(_as(("wide", i), flat, dtype) for i, flat in enumerate(flats))


def _acting(grad: Tensor, weights: Tensor, factor: Any, coupled: Any) -> Tensor:
    """factor·grad + coupled·w, in memory of its own."""
    out = torch.mul(grad, factor, out=_like("grad", weights))
    return (
        out
        if isinstance(coupled, float) and coupled == 0
        else out.add_(torch.mul(weights, coupled, out=_like("product", weights)))
    )


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values made what storage in `dtype` leaves of them."""
    return values if values.dtype == dtype else values.copy_(_as("narrow", values, dtype))


def _largest_divisor(number: int) -> int:
    return next(i for i in range(min(number, _BLOCK), 0, -1) if number % i == 0)
