"""Where a rank's part lies in a tensor, and the reduction that makes sums over parts whole.

All that the log takes of a tensor are sums over its weights, so the parts that several processes hold of it add.
A part is a few *boxes* of the whole tensor, however it was cut: a DTensor's from its mesh and placements, a range
of a flattened tensor from where it begins and ends. Each rank measures its own boxes; q, k, v and heads are clipped
to them and keep their rows. Then two asynchronous reductions for each logged update, a sum and a maximum of a few
numbers for each row, go over the dimensions of the mesh that shard, never over those that replicate. Nothing waits
for them, and nothing else is sent: what a lost rank leaves unfinished is left out of the log, and hangs nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightdyn.core.checks import shown
from weightdyn.core.naming import View
from weightdyn.record.sigterm import is_late

Range = tuple[int, int]
Copies = tuple[frozenset[int], ...]

_POLL = 0.001  # seconds between two looks at a reduction that is waited for

PATIENCE = 30.0
"""Seconds that the other ranks have, at the first update, to attach their logger."""

# --- where a part lies ---------------------------------------------------------------------------------------


class Box(NamedTuple):
    """The part of a tensor that begins at `offset` and has the shape `shape`.

    Attributes:
        offset: of its first weight, one index for each dimension of the whole tensor.
        shape: its size in each dimension.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def clip(self, views: Sequence[View]) -> tuple[View, ...]:
        """The views as parts of this box; one that has no weights here keeps its place, with no ranges.

        >>> q, k = View("q", "q", 0, ((0, 4),)), View("k", "k", 0, ((4, 8),))
        >>> [view.ranges for view in Box((3, 0), (2, 8)).clip([q, k])]
        [((0, 1),), ((1, 2),)]
        """
        return tuple(replace(view, ranges=tuple(self._clipped(view))) for view in views)

    def _clipped(self, view: View) -> Iterable[Range]:
        first, size = self.offset[view.axis], self.shape[view.axis]
        for start, stop in view.ranges:
            start, stop = max(start - first, 0), min(stop - first, size)
            if start < stop:
                yield start, stop


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The range [start, stop) of a flattened tensor as boxes, one behind the other.

    The end of a line that begins before the range, the whole lines in it, the beginning of a line that ends
    behind it: at most one box less than twice the dimensions.

    >>> flat_boxes((3, 4), 2, 9)
    [Box(offset=(0, 2), shape=(1, 2)), Box(offset=(1, 0), shape=(1, 4)), Box(offset=(2, 0), shape=(1, 1))]
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the whole lines
    if first > last:
        return _in_line(shape, last, start, stop)
    boxes = _in_line(shape, first - 1, start, first * inner)
    if first < last:
        boxes.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _in_line(shape, last, last * inner, stop)


def _in_line(shape: Sequence[int], line: int, start: int, stop: int) -> list[Box]:
    begin = line * math.prod(shape[1:])
    inside = flat_boxes(shape[1:], start - begin, stop - begin)
    return [Box((line, *box.offset), (1, *box.shape)) for box in inside]


def _cut(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """Elements [start, stop) of those that some ranges hold, one range behind the other."""
    found = []
    for first, end in ranges:
        low, high = max(first + start, first), min(first + stop, end)
        if low < high:
            found.append((low, high))
        start, stop = start - (end - first), stop - (end - first)
    return found


def _chunk(ranges: Sequence[Range], chunks: int, i: int) -> list[Range]:
    """Chunk i of them, as `torch.chunk` cuts; the last ones may be empty."""
    size = -(-sum(stop - start for start, stop in ranges) // chunks)
    return _cut(ranges, i * size, (i + 1) * size)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def grid_ranges(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> list[list[Range]]:
    """The indices that one process of a mesh holds in each dimension of a DTensor, as ranges.

    `Shard` cuts what the dimensions of the mesh before it left. `_StridedShard`, of FSDP2 over tensor
    parallelism, cuts each of the `split_factor` chunks that a later dimension will tell apart.

    Args:
        shape: of the whole tensor.
        mesh_shape: of the mesh.
        coordinate: of the process in it.
        placements: one for each dimension of the mesh.

    Raises:
        TypeError: a placement is neither `Shard`, `_StridedShard` nor `Replicate`.
    """
    held: list[list[Range]] = [[(0, size)] if size else [] for size in shape]
    for chunks, i, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        if placement.is_partial() or not isinstance(getattr(placement, "dim", None), int):
            raise TypeError(f"{placement} is no part of a tensor")
        dim = placement.dim % len(shape)
        virtual = int(getattr(placement, "split_factor", 1))
        parts = (_chunk(_chunk(held[dim], virtual, j), chunks, i) for j in range(virtual))
        held[dim] = _joined(itertools.chain.from_iterable(parts))
    return held


@dataclass(frozen=True)
class Held:
    """What this process holds of one tensor.

    Attributes:
        shape: of the whole tensor.
        boxes: the parts of it that are here; none where nothing is.
        places: where each of them stands in the tensor that the process has, as an index of it.
        copies: the sets of global ranks that each hold the whole tensor once, that of this process first; () where
            this one has all of it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    places: tuple[tuple[slice, ...], ...]
    copies: Copies = ()

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Held:
        """All of a tensor."""
        return cls(tuple(shape), (Box((0,) * len(shape), tuple(shape)),), ((),))

    @classmethod
    def given(cls, shape: Sequence[int], here: bool, copies: Copies) -> Held:
        """All of a tensor on one of several ranks, nothing of it on the others."""
        return replace(cls.whole(shape), copies=copies) if here else cls(tuple(shape), (), (), copies)

    @classmethod
    def flat(cls, shape: Sequence[int], start: int, stop: int, copies: Copies) -> Held:
        """The range [start, stop) of the flattened tensor, held as a tensor of one dimension."""
        boxes = flat_boxes(shape, start, stop)
        ends = itertools.accumulate((math.prod(box.shape) for box in boxes), initial=0)
        places = tuple((slice(*pair),) for pair in itertools.pairwise(ends))
        return cls(tuple(shape), tuple(boxes), places, copies)

    @classmethod
    def grid(cls, shape: Sequence[int], ranges: Sequence[Sequence[Range]], copies: Copies) -> Held:
        """Some ranges of indices in each dimension, one behind the other."""
        boxes, places = [], []
        for chosen in itertools.product(*map(_placed, ranges)):
            boxes.append(Box(tuple(a for (a, _), _ in chosen), tuple(b - a for (a, b), _ in chosen)))
            places.append(tuple(place for _, place in chosen))
        return cls(tuple(shape), tuple(boxes), tuple(places), copies)

    @property
    def kept_by(self) -> frozenset[int]:
        """The ranks that write their parts, one copy of all: that of the lowest rank; none of a whole tensor."""
        return min(self.copies, key=min, default=frozenset())

    def counts(self, views: Sequence[View]) -> list[int]:
        """How many weights of each view are here; of all of it where there are none."""
        if not views:
            return [sum(math.prod(box.shape) for box in self.boxes)]
        clipped = [[view.numel(box.shape) for view in box.clip(views)] for box in self.boxes]
        return [sum(each) for each in zip(*clipped, strict=True)] or [0] * len(views)

    def pieces(self, local: Tensor) -> list[Tensor]:
        """The boxes of a tensor that lies as this one does: the parameter, its gradient, a moment. No copy."""
        return [
            local[place].view(box.shape) if place else local
            for box, place in zip(self.boxes, self.places, strict=True)
        ]


def _placed(ranges: Sequence[Range]) -> list[tuple[Range, slice]]:
    """Each range, and where it stands in a tensor that holds them one behind the other."""
    ends = itertools.accumulate((stop - start for start, stop in ranges), initial=0)
    return [(each, slice(*pair)) for each, pair in zip(ranges, itertools.pairwise(ends), strict=True)]


# --- DTensors ------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without a copy and outside of autograd."""
    if not is_dtensor(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    with torch.no_grad():
        local = tensor.to_local()  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local


def held_of(name: str, tensor: Tensor) -> Held:
    """Which part of a parameter this process holds.

    Raises:
        TypeError: sums of it over the processes are not of one tensor: it is a partial sum itself.
    """
    if not is_dtensor(tensor):
        return Held.whole(tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    try:
        ranges = grid_ranges(tensor.shape, mesh.shape, mesh.get_coordinate(), placements)
    except TypeError:
        raise TypeError(
            f"parameter {name} is placed as {placements}: a tensor that is a partial sum on each rank has no norm "
            "of its own. Redistribute it to Shard or Replicate, or leave it out with tensors="
        ) from None
    if all(placement.is_replicate() for placement in placements):
        return Held.whole(tensor.shape)
    return Held.grid(tensor.shape, ranges, _copies(mesh, tuple(placements)))


@functools.lru_cache(maxsize=64)
def _copies(mesh: Any, placements: tuple[Any, ...]) -> Copies:
    """The sets of ranks that each hold a DTensor once, that of this process first."""
    own = tuple(mesh.get_coordinate())
    still = [
        range(size) if placement.is_replicate() else (None,)
        for size, placement in zip(mesh.shape, placements, strict=True)
    ]
    found = {}
    for chosen in itertools.product(*still):
        index = tuple(slice(None) if i is None else i for i in chosen)
        mine = all(i is None or i == j for i, j in zip(chosen, own, strict=True))
        found[frozenset(mesh.mesh[index].flatten().tolist())] = mine
    return tuple(sorted(found, key=lambda ranks: (not found[ranks], min(ranks))))


def same_placement(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are cut alike, so that their parts here are of the same weights."""
    if is_dtensor(a) != is_dtensor(b):
        return False
    if not is_dtensor(a):
        return a.shape == b.shape
    return a.placements == b.placements and a.device_mesh == b.device_mesh  # type: ignore[attr-defined]


def refuse_fsdp1(name: str, tensor: Tensor) -> None:
    """Raise a TypeError for a parameter of FSDP1, which is one rank's piece of a flattened row of parameters."""
    if getattr(tensor, "_fsdp_flattened", False) or type(tensor).__name__ == "FlatParameter":
        raise TypeError(
            f"parameter {name} belongs to FullyShardedDataParallel (FSDP1), which does not say where it lies in "
            "its tensor: use torch.distributed.fsdp.fully_shard (FSDP2), whose parameters are logged as they are"
        )


def named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's parameters as an optimizer has them.

    After a forward pass modules of `fully_shard` have whole ones in their place: the outermost until the next
    backward pass, so for long behind an evaluation.
    """
    shards: dict[Tensor, Tensor] = {}
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for each in itertools.chain.from_iterable(getattr(group, "fsdp_params", ()) for group in groups):
            if hasattr(each, "_unsharded_param"):
                shards[each._unsharded_param] = each.sharded_param
    return [(name, shards.get(parameter, parameter)) for name, parameter in model.named_parameters()]


# --- who adds up ---------------------------------------------------------------------------------------------


def closure(rank: int, held: Iterable[Copies]) -> tuple[int, ...]:
    """The ranks that add up together, ascending: those that share a tensor, and those that share with them.

    All of them find the same.

    >>> closure(0, [(frozenset({0, 2}), frozenset({1, 3})), (frozenset({0, 1, 2, 3}),)])
    (0, 1, 2, 3)
    """
    sets = {ranks for copies in held for ranks in copies}
    found, new = {rank}, {rank}
    while new:
        new = {other for ranks in sets if ranks & new for other in ranks} - found
        found |= new
    return tuple(sorted(found))


class Ranks:
    """The processes that add up together, and the one of all of them that writes.

    Args:
        copies: of each shared tensor, the sets of ranks that hold it once.
        groups: process groups that there are already, to be used where they fit.
        device: on which the ranks communicate.

    Attributes:
        members: the ranks that add up, ascending, this one among them.
    """

    def __init__(self, copies: Iterable[Copies], groups: Iterable[Any], device: torch.device) -> None:
        self.members = closure(rank_here(), copies)
        self.device = device
        self._groups = [*groups]
        self._group: Any = None

    def copies_in(self, copies: Copies) -> float:
        """How often a tensor is there among the members."""
        return len(self.members) / len(copies[0])

    def group(self) -> Any:
        """The process group of the members; where it has to be made, all of them must come here."""
        if self._group is None:
            for group in (*self._groups, dist.group.WORLD):
                if sorted(dist.get_process_group_ranks(group)) == [*self.members]:
                    self._group = group
                    break
            else:
                self._group = dist.new_group([*self.members], use_local_synchronization=True)
        return self._group


def rank_here() -> int:
    """The rank of this process; 0 where there are no others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def involved(parameters: Iterable[Tensor], zeros: Iterable[Any]) -> tuple[int, ...]:
    """The ranks that train these parameters together, ascending: the lowest of them writes the log.

    Those of their meshes and of ZeroRedundancyOptimizer's group; all ranks where no parameter tells.
    """
    found = {rank for zero in zeros for rank in dist.get_process_group_ranks(zero.process_group)}
    for mesh in {parameter.device_mesh for parameter in parameters if is_dtensor(parameter)}:  # type: ignore[attr-defined]
        found.update(mesh.mesh.flatten().tolist())
    if not found and dist.is_available() and dist.is_initialized():
        found.update(range(dist.get_world_size()))
    return tuple(sorted(found)) or (0,)


def ranks_of(
    shared: Sequence[tuple[Tensor, Held]], zeros: Iterable[Any], before: Ranks | None
) -> Ranks | None:
    """The ranks that add up what they hold of some tensors; None where there are none.

    Args:
        shared: the tensors, and what this process holds of them.
        zeros: the ZeroRedundancyOptimizers among whose ranks some are.
        before: those that did so until now, to go on with their group.
    """
    if not shared:
        return None
    groups = [zero.process_group for zero in zeros]
    kind = shared[0][0].device.type
    for mesh, placements in {(p.device_mesh, p.placements) for p, _ in shared if is_dtensor(p)}:  # type: ignore[attr-defined]
        kind = mesh.device_type
        groups += [mesh.get_group(i) for i, each in enumerate(placements) if not each.is_replicate()]
    device = (
        torch.device(kind)
        if kind == "cpu"
        else torch.device(kind, torch.get_device_module(kind).current_device())
    )
    ranks = Ranks({held.copies for _, held in shared}, groups, device)
    same = before is not None and (before.members, before.device) == (ranks.members, ranks.device)
    return before if same else ranks


# --- ZeroRedundancyOptimizer ---------------------------------------------------------------------------------


def partitioned(optimizer: Any) -> dict[int, Any]:
    """The ZeroRedundancyOptimizers among optimizers and in wrappers of them, by the id of the optimizer inside.

    Its `optim` steps some of the tensors on each rank, and is what the logger listens to.
    """
    waiting, seen, found = [optimizer], set(), {}
    while waiting:
        each = waiting.pop()
        if isinstance(each, list | tuple | ValuesView):
            waiting += each
        elif any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(each).mro()):
            found[id(each.optim)] = each
        elif each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [getattr(each, name, None) for name in ("optimizers", "optimizer")]
    return found


def owned(parameter: Tensor, zero: Any) -> Held:
    """All of a tensor on the rank that makes its updates, nothing of it on the others."""
    together = (frozenset(dist.get_process_group_ranks(zero.process_group)),)
    return Held.given(parameter.shape, zero._param_to_rank[parameter] == zero.rank, together)


# --- reductions ----------------------------------------------------------------------------------------------


class Pending:
    """Reductions that were begun and are not waited for.

    Attributes:
        lost: why they will never be done, if they will not.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._works: list[Any] = []
        self.lost: str | None = None

    def reduce(self, ranks: Ranks, buffer: Tensor, op: Any) -> None:
        """Begin to reduce a buffer in its place; a group that is broken is noted, and training goes on."""
        if self.lost is None:
            try:
                self._group = ranks.group()
                self._works.append(dist.all_reduce(buffer, op, group=self._group, async_op=True))
            except (RuntimeError, ValueError) as error:  # broken, or taken down
                self.lost = _first_line(error)

    def done(self) -> bool:
        """Whether all is over, well or not; waits for nothing."""
        while self._works and self.lost is None:
            if not self._works[0].is_completed():
                return False
            try:
                self._works.pop(0).wait()  # raises what went wrong
            except RuntimeError as error:
                self.lost = _first_line(error)
        return True

    def wait(self, until: float) -> bool:
        """Whether all is over at a time of `time.monotonic` at the latest.

        The group's own timeout ends it too, and so does a SIGTERM, after which there is not much time.
        """
        while not self.done():
            if time.monotonic() >= until or is_late():
                return False
            time.sleep(_POLL)
        return True

    def abandon(self) -> None:
        """Let the process end without what has not come.

        A process group waits for what is unfinished when it is taken down, so this one stays up to the end.
        """
        if self._works:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__


class Total(NamedTuple):
    """What the ranks have added up, for each row.

    Attributes:
        sums: over the whole tensor, float64 (rows, columns); NaN where they are not right.
        peaks: the largest value.
        counted: how many weights the sums are made of, by copies of the tensor.
        right: whether that is each of its weights once.
        agreed: whether all ranks were at the same update.
    """

    sums: np.ndarray
    peaks: np.ndarray
    counted: np.ndarray
    right: np.ndarray
    agreed: bool


class Share:
    """What this process adds to the numbers of one update, for every row of the log.

    Args:
        ranks: who adds up.
        rows: of the log.
        columns: sums of each row.
        step: the update, on which all ranks must agree.

    Attributes:
        pending: the reductions, once they are sent.

    A last column counts the weights that the sums are made of: so a part that is missing, or there twice, is seen.
    """

    def __init__(self, ranks: Ranks, rows: int, columns: int, step: int) -> None:
        self._ranks, self._step = ranks, step
        self._sums = torch.zeros(rows, columns + 1, dtype=torch.float64, device=ranks.device)
        self._peaks = torch.full((rows + 2,), -math.inf, dtype=torch.float64, device=ranks.device)
        self._peaks[rows] = step
        self._peaks[rows + 1] = -step
        self.pending = Pending()

    def count(self, here: np.ndarray) -> None:
        """The weights of each row that are here: (rows,)."""
        self.put(-1, here)

    def put(self, column: int, values: np.ndarray) -> None:
        """A column that the host knows: (rows,)."""
        self._sums[:, column] = torch.from_numpy(values).to(self._sums.device, non_blocking=True)

    def add(self, column: int, rows: Tensor, values: Tensor) -> None:
        """Sums of some rows, from a column on: (n,) or (n, columns). A row may be there several times."""
        device = self._sums.device
        values = values.to(device, non_blocking=True).reshape(len(rows), -1)
        rows = rows.to(device, non_blocking=True)
        self._sums[:, column : column + values.shape[1]].index_add_(0, rows, values)

    def peak(self, rows: Tensor, values: Tensor) -> None:
        """The largest value of some rows: (n,)."""
        rows, values = (each.to(self._peaks.device, non_blocking=True) for each in (rows, values))
        self._peaks.scatter_reduce_(0, rows, values, "amax")

    def send(self) -> None:
        """Begin to make them whole; all members must do it, in the same order."""
        self.pending.reduce(self._ranks, self._sums, dist.ReduceOp.SUM)
        self.pending.reduce(self._ranks, self._peaks, dist.ReduceOp.MAX)

    def total(self, numel: np.ndarray, copies: np.ndarray) -> Total:
        """The sums over the whole tensors, once they are there.

        Args:
            numel: weights of each row's whole tensor or view, float64 (rows,).
            copies: how often it is there among the members, float64 (rows,); 0 of one that is not shared.
        """
        sums, peaks = self._sums.cpu().numpy(), self._peaks.cpu().numpy()
        agreed = bool(peaks[-2] == self._step and peaks[-1] == -self._step)
        times = np.maximum(copies, 1)
        counted = sums[:, -1] / times
        right = (counted == numel) & agreed
        return Total(
            np.where(right[:, None], sums[:, :-1] / times[:, None], np.nan),
            np.where(right, peaks[:-2], np.nan),
            counted,
            right,
            agreed,
        )


# --- that all ranks have a logger ----------------------------------------------------------------------------


class Announcement:
    """What a logger lets the other ranks know of itself, by the store through which they found each other.

    To tell takes no other rank, and so does not wait for any; `check` looks at what the others told.

    Args:
        facts: what must be the same on all ranks, in what JSON can hold.
        ranks: these, ascending.
    """

    def __init__(self, facts: Mapping[str, Any], ranks: Sequence[int]) -> None:
        self._rank, self._ranks = rank_here(), ranks
        self._facts = json.loads(json.dumps(facts, default=str))
        text = json.dumps(self._facts, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        # Of loggers alike, as a notebook's cell makes them again and again, the n-th belong together.
        number = _announced[digest] = _announced.get(digest, 0) + 1
        self._told = f"weightdyn/{'-'.join(self._facts)}"
        self._name = f"weightdyn/{digest}/{number}"
        store = _store()
        store.set(f"{self._told}/{self._rank}", text)
        store.set(f"{self._name}/{self._rank}", "")

    def check(self, remedy: str) -> None:
        """Return when the others have told the same: the lowest rank asks for all, the others ask for the lowest.

        Args:
            remedy: the end of the error's sentence.

        Raises:
            RuntimeError: some have told nothing by then, or something else.
        """
        store, until = _store(), time.monotonic() + PATIENCE
        missing = [*self._ranks[1:]] if self._rank == self._ranks[0] else [self._ranks[0]]
        while missing := [rank for rank in missing if not store.check([f"{self._name}/{rank}"])]:
            if time.monotonic() > until:
                break
            time.sleep(20 * _POLL)
        if not missing:
            return
        told = {rank: f"{self._told}/{rank}" for rank in missing}
        texts = {rank: store.get(key) if store.check([key]) else b"" for rank, key in told.items()}
        silent = [rank for rank, text in texts.items() if not text]
        found = [f"there is none on the ranks {silent}"] if silent else []
        found += [f"rank {rank} {self._difference(json.loads(text))}" for rank, text in texts.items() if text]
        raise RuntimeError(
            f"the ForceLogger of rank {self._rank} is not there, and the same, on all ranks: {'; '.join(found)}. "
            f"Remedy: {remedy}"
        )

    def withdraw(self) -> None:
        """The logger is closed: what it told is no other's."""
        with contextlib.suppress(RuntimeError, ValueError):  # the store or the group may be gone by then
            _store().set(f"{self._told}/{self._rank}", "")

    def _difference(self, theirs: Mapping[str, Any]) -> str:
        """The first thing in which another rank's logger differs."""
        for name, mine in self._facts.items():
            if theirs.get(name) != mine:
                return f"has {name}={shown(theirs.get(name))} where this one has {shown(mine)}"
        return "attached one more or less of them"


_announced: dict[str, int] = {}


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
