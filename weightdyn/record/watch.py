"""Watch: what one optimizer does to its tensors in an update, measured from its own state.

Before the step it notes what only is known there; after it, it measures the products of the forces and leaves them
in the update's `Record`. Which updates are measured, and what becomes of them, is the logger's.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightdyn.core.forces import NoiseMemory, Remembered
from weightdyn.core.naming import TensorName
from weightdyn.record.book import (
    LearningRate,
    Measured,
    Moved,
    NormAfter,
    NormBefore,
    Products,
    ProductsAfter,
    Record,
    Remembers,
    on_one_device,
)
from weightdyn.record.decay import Decay, Given
from weightdyn.record.moments import PRODUCTS, Fresh, Plan
from weightdyn.record.optimizers import (
    COUNT_STOPS,
    Acting,
    AdamState,
    adam_constants,
    adam_state,
    coupled_decay,
    decoupled_decay,
    grad_factor,
    is_normalised,
    is_remote,
    is_running,
    law_of,
    lr_of,
    moments_of,
    momentum_age,
    momentum_of,
    signature,
    skipped,
    step_frame,
    update_counts,
    why_no_drift,
    with_gradient,
)
from weightdyn.record.shards import Held, is_dtensor, local_of, same_placement

Drift = Literal[True, False, "before"]

_SHRINK = 0.5  # at a smaller |1−ηλ| what is before the step is measured there: w' tells too little of w


@dataclass(frozen=True)
class Tracked:
    """One tensor of the optimizer, and its rows in the log.

    Attributes:
        parameter: the tensor.
        group: index of its group.
        name: what it is called.
        rows: numbers of its rows.
        label: that of the first of them.
        held: which part of it this process has.
        foreign: whether another rank's optimizer makes its updates.
    """

    parameter: Tensor
    group: int
    name: TensorName
    rows: range
    label: str
    held: Held
    foreign: bool = False

    @property
    def shared(self) -> bool:
        """Whether other ranks hold parts of it."""
        return bool(self.held.copies)

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many weights of each row this process has."""
        return self.held.counts(self.name.views)


class _Reading(NamedTuple):
    """Tensors that are read together."""

    chosen: list[int]  # the tensors
    pieces: list[int]  # the tensor of each piece: a part of one that this process holds
    rows: list[int]  # of the log, in the plan's order
    shared: Tensor | None  # those on the device, of tensors of which other ranks hold the rest
    plan: Plan


@dataclass
class _Clock:
    """The momentum of tensors that have had the same updates, followed from one to the next."""

    group: int
    members: list[int]  # the tensors
    memory: NoiseMemory
    step: Any  # updates that it has had: a number, or on a device
    remembered: Remembered = field(default_factory=lambda: Remembered(np.nan, np.nan, np.nan))


@dataclass
class _Before:
    """What is kept of the state before a logged update."""

    step: int  # the update's number
    counts: list[float | Tensor]  # updates that each tensor has had
    audit: bool  # whether ‖w‖² before it is measured
    gradients: dict[int, tuple[Tensor, Any]] = field(
        default_factory=dict
    )  # and how often they were written to
    copies: dict[int, Tensor] = field(default_factory=dict)  # weights, where the method needs them
    ahead: list[int] = field(default_factory=list)  # tensors measured before the update
    waiting: list[Measured] = field(default_factory=list)


class Watch:
    """One optimizer of a run.

    Args:
        optimizer: the one that makes the steps.
        source: "moments" or "displacement", as `ForceLogger`'s.
        drift: as `ForceLogger`'s; False where this optimizer's cannot be told (`why_no_drift`).
        weight_decay: as `ForceLogger`'s.
        recall: the log's rows of an update by its number, indexed by label, to follow momentum on from.
        warn: says something once: a key and the message.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        source: Literal["moments", "displacement"],
        drift: Drift,
        weight_decay: Given | None,
        recall: Callable[[int], pd.DataFrame],
        warn: Callable[[str, str], None],
    ):
        self.optimizer = optimizer
        self.source = source
        self.why_no_drift = why_no_drift(optimizer) if drift else "ForceLogger(drift=False)"
        self.stepping = False
        """Whether a step has begun and not ended."""
        self._frame: FrameType | None = None
        self.tracked: list[Tracked] = []
        self._drift: Drift = drift if self.why_no_drift is None else False
        self.decay = Decay(optimizer, weight_decay)
        self._recalled, self._warn = recall, warn
        self._signature: Any = None
        self._readings: dict[tuple[torch.device | int, ...], _Reading] = {}
        self._before: _Before | None = None
        self._had_gradient: set[Tensor] = set()
        self._mark: tuple[Tensor, Any, Any] | None = None  # a gradient of the last step
        self._acted: tuple[int, dict[Tensor, Acting]] = 0, {}  # the last logged update, and η and λ in it
        self._clocks: list[_Clock] = []

    def track(self, tracked: Sequence[Tracked]) -> dict[Tensor, _Clock]:
        """Measure these tensors from here on. Returns the clocks that they had, for `set_clocks`."""
        followed = {self.tracked[i].parameter: clock for clock in self._clocks for i in clock.members}
        self._signature = signature(self.optimizer)
        self.tracked = list(tracked)
        self._readings.clear()
        self._clocks = []
        self._before = None
        return followed

    def is_changed(self) -> bool:
        """Whether the optimizer has other parameters than when its tensors were listed."""
        return self._signature != signature(self.optimizer)

    # ------------------------------------------------------------------ around a step

    def is_inside(self) -> bool:
        """Whether a hook is called by a step() that the one which has begun calls, such as that of its class."""
        return self.stepping and is_running(self._frame) and step_frame() is not self._frame

    def end(self) -> None:
        """The step that has begun ends."""
        self.stepping, self._frame = False, None

    def begin(self) -> None:
        """A step begins."""
        self.stepping, self._before, self._frame = True, None, step_frame()
        self._had_gradient = self._with_gradient()  # before and after: another hook may clear them
        # A step that is not torch's own may do nothing, which its counts tell.
        self._counts = self._counted() if law_of(self.optimizer) is None else None

    def prepare(self, made: int, audit: bool, args: tuple, kwargs: dict) -> Any:
        """Note what the record of the step that begins will need; returns its new arguments, or None.

        Args:
            made: updates of the run before it.
            audit: whether ‖w‖² before the step is measured.
            args, kwargs: what step() was called with.
        """
        before = _Before(made + 1, self._counted(), audit)
        changed = self._out_of_step(before.counts)
        if changed:
            followed = {
                self.tracked[i].parameter: clock
                for clock in self._clocks
                for i in clock.members
                if i not in changed
            }
            self.set_clocks(made, followed)
        everything = range(len(self.tracked))
        if audit:
            before.waiting += self._measure_norms(NormBefore, everything)
        wanted = everything if self.source == "displacement" else self._shrunk()
        before.copies = {i: local_of(self.tracked[i].parameter).clone() for i in wanted}
        self._before = before
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._read_gradients(before)
            return None
        self.decay.note([each.parameter for each in self.tracked])

        def read() -> Any:
            loss = closure()  # makes the gradients
            self._read_gradients(before)
            return loss

        return ((args[0], read, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": read})

    def _with_gradient(self) -> set[Tensor]:
        foreign = (each.parameter for each in self.tracked if each.foreign)
        return with_gradient(self.optimizer) | {each for each in foreign if each.grad is not None}

    def _counted(self) -> list[float | Tensor]:
        return update_counts(self.optimizer, [each.parameter for each in self.tracked])

    def was_skipped(self) -> bool | Tensor:
        """Whether the step that has ended made no update; where a device alone knows, 1 or 0 there.

        A fused step under a GradScaler may move nothing, and so may one that skips of its own accord.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            return found_inf if is_remote(found_inf) else bool(found_inf.item())
        if self._counts is None:
            return False
        return skipped(self.optimizer, [each.parameter for each in self.tracked], self._counts)

    def has_moved(self) -> bool:
        """Whether the step that has ended had a gradient to go by."""
        self._had_gradient |= self._with_gradient()
        smallest = min(self._had_gradient, key=Tensor.numel, default=None)
        self._mark = None
        if smallest is not None and smallest.grad is not None:
            self._mark = smallest, weakref.ref(smallest.grad), _version(smallest.grad)
        return bool(self._had_gradient)

    def has_new_gradients(self) -> bool:
        """Whether the gradients of the last step are gone, or others are in their place."""
        if self._mark is None:
            return True
        parameter, grad, version = self._mark
        return parameter.grad is None or parameter.grad is not grad() or _version(parameter.grad) != version

    @torch.no_grad()
    def _read_gradients(self, before: _Before) -> None:
        """Note the gradients that the step is given, and measure what is measured from them before it."""
        gradients = {
            i: grad
            for i, each in enumerate(self.tracked)
            if (grad := each.parameter.grad) is not None and self._lies_as_its_tensor(each, grad)
        }
        self.decay.ask([self.tracked[i].parameter for i in gradients], before.step)
        if self.source == "moments":
            before.ahead = [i for i in gradients if self._drift == "before" or self._is_rounded(i)]
            before.waiting += self._measure_moments(Products, before.ahead, before.counts, ahead=True)
            before.copies = {i: kept for i, kept in before.copies.items() if i not in before.ahead}
        if self._drift == "before" and self.source == "displacement":
            before.gradients = {i: (grad.clone(), None) for i, grad in gradients.items()}
        elif self._drift or before.ahead:
            before.gradients = {i: (grad, _version(grad)) for i, grad in gradients.items()}

    def _lies_as_its_tensor(self, each: Tracked, grad: Tensor) -> bool:
        alike = same_placement(each.parameter, grad)
        if not alike:
            self._warn(
                "placed",
                f"the gradient of {each.name.name} is not cut as the tensor is: its drift and memory are NaN",
            )
        return alike

    def _is_rounded(self, i: int) -> bool:
        """Whether what stands in the tensor or its moments after a step is less than what acted in it."""
        parameter = self.tracked[i].parameter
        kept = [parameter, *moments_of(self.optimizer, parameter).values()]
        return any(each.dtype.itemsize < 4 for each in kept)

    def _shrunk(self) -> list[int]:
        """Tensors of which this step's decay leaves so little that w cannot be told from w'."""
        groups = [
            index
            for index, group in enumerate(self.optimizer.param_groups)
            if not is_remote(lr := lr_of(group))
            and abs(1 - float(lr) * decoupled_decay(self.optimizer, group)) < _SHRINK
        ]
        return [i for i, each in enumerate(self.tracked) if each.group in groups]

    def measure(self, open_record: Callable[[], Record], skipped: bool | Tensor) -> None:
        """Measure the update that was just made, if it was prepared; what is on a device stays there.

        Args:
            open_record: gives the update's record.
            skipped: what `was_skipped` said.
        """
        before, self._before = self._before, None
        if before is None:
            return
        record, waiting = open_record(), [*before.waiting]
        active = []
        counts = self._counted()
        for i, (each, count, earlier) in enumerate(zip(self.tracked, counts, before.counts, strict=True)):
            had_gradient = each.parameter in self._had_gradient
            if each.foreign:  # its owner says
                continue
            if self.source == "displacement":
                if not had_gradient:
                    continue
            elif isinstance(count, Tensor):  # known on the device only: decided when the rows come over
                rows = list(each.rows)
                grown = (count - earlier).double()
                if had_gradient:
                    grown = grown + (count >= COUNT_STOPS)
                waiting.append(Moved(rows, grown.expand(len(rows))))
            elif count <= cast(float, earlier) and not (had_gradient and count >= COUNT_STOPS):
                continue
            record.moved[each.rows] = True
            if each.shared:
                record.here[each.rows] = each.counts
            active.append(i)
        if isinstance(skipped, Tensor):
            rows = self._rows(range(len(self.tracked)))
            waiting.append(Moved(rows, (1 - skipped.double()).expand(len(rows))))

        for clock in self._clocks:
            rows = self._rows(clock.members)
            if any(isinstance(value, Tensor) for value in clock.remembered):
                values = on_one_device(clock.remembered)
                waiting.append(Remembers(rows, values.expand(len(rows), -1)))
            else:
                record.remembered[:, rows] = np.array(clock.remembered, dtype=float)[:, None]

        parameters = [self.tracked[i].parameter for i in active]
        acting = dict(zip(active, self.decay.acted(parameters, before.step), strict=True))
        self._acted = before.step, {self.tracked[i].parameter: each for i, each in acting.items()}
        rates: dict[int, tuple[Tensor, list[int]]] = {}  # η that are on a device, and their rows
        for i, (lr, decay) in acting.items():
            rows = self.tracked[i].rows
            record.weight_decay[rows] = decay
            if isinstance(lr, Tensor):
                rates.setdefault(id(lr), (lr, []))[1].extend(rows)
            else:
                record.lr[rows] = lr
        for lr, rows in rates.values():
            waiting.append(LearningRate(rows, lr.double().reshape(()).clone().expand(len(rows))))

        measured = {*before.copies, *before.ahead}  # with the weights before the step
        copied = [i for i in active if i in before.copies]
        inverted = [i for i in active if i not in measured]
        record.audited |= before.audit
        record.after[self._rows(i for i in inverted if self.tracked[i].shared)] = True
        fresh = self._fresh(before, active)
        if self.source == "displacement":
            waiting += self._measure_displacement(copied, counts, before.copies, acting, fresh)
        else:
            waiting += self._measure_moments(ProductsAfter, inverted, counts, fresh)
            waiting += self._measure_moments(Products, copied, counts, fresh, copies=before.copies)
        waiting += self._measure_norms(NormAfter, [i for i in active if i in measured])
        record.waiting += [*waiting, *self._overtaken(before)]

    def acted(self, tracked: Tracked, step: int) -> Acting:
        """η and λ of a tensor in the update just made; NaN for what no group tells, if it is not logged."""
        logged, acting = self._acted
        if logged == step and tracked.parameter in acting:
            return acting[tracked.parameter]
        group = self.optimizer.param_groups[tracked.group]
        return Acting(lr_of(group), self.decay.of_group(group, step) if self.decay.is_by_group else np.nan)

    # ------------------------------------------------------------------ measuring

    def _rows(self, indices: Iterable[int]) -> list[int]:
        return [row for i in indices for row in self.tracked[i].rows]

    def _measure_norms(self, what: type[Measured], indices: Iterable[int]) -> list[Measured]:
        return [
            what(each.rows, each.plan.norms(self._pieces(each, self._weights(each))), each.shared)
            for each in self._by_device(indices)
        ]

    def _weights(self, reading: _Reading) -> dict[int, Tensor]:
        return {i: self.tracked[i].parameter.detach() for i in reading.chosen}

    def _group(self, i: int) -> dict[str, Any]:
        return self.optimizer.param_groups[self.tracked[i].group]

    def _pieces(self, reading: _Reading, tensors: Mapping[int, Tensor]) -> list[Tensor]:
        """What the plan reads of a quantity of each tensor."""
        return [piece for i in reading.chosen for piece in self.tracked[i].held.pieces(local_of(tensors[i]))]

    def _overtaken(self, before: _Before) -> list[Measured]:
        """NaN for what was measured from a gradient that a later hook changed before the step."""
        changed = [i for i in before.ahead if _version(before.gradients[i][0]) != before.gradients[i][1]]
        if not changed:
            return []
        self._warn(
            "overtaken",
            f"the gradient of {self.tracked[changed[0]].name.name} was written to after it had been read: its "
            "forces are NaN. Register the hook that does it before the logger",
        )
        unknown = []
        for each in self._by_device(changed):
            shape, device = (len(each.rows), len(PRODUCTS)), each.plan.device
            values = torch.full(shape, np.nan, dtype=torch.float64, device=device)
            unknown.append(Products(each.rows, values, each.shared))
        return unknown

    def _fresh(self, before: _Before, active: Sequence[int]) -> dict[int, Tensor]:
        """The gradients that acted in the step, of those tensors where they are still known."""
        if not self._drift:
            return {}
        found: dict[int, Tensor] = {}
        gone = None
        for i in active:
            grad = self.tracked[i].parameter.grad
            kept, version = before.gradients.get(i, (None, None))
            unread = grad is not None and not same_placement(
                self.tracked[i].parameter, grad
            )  # which was told
            if kept is not None and (version is None or (grad is kept and _version(kept) == version)):
                found[i] = kept if kept.layout == torch.strided else kept.to_dense()
            elif i not in before.ahead and self.tracked[i].parameter in self._had_gradient and not unread:
                gone = self.tracked[i].name.name if gone is None else gone
        if gone is not None:
            self._warn(
                "gone",
                f"the gradient of {gone} was freed or written to inside the step (by the optimizer, or by a hook): "
                'its drift and memory are NaN. ForceLogger(drift="before") reads gradients before the step',
            )
        return found

    def _measure_displacement(
        self,
        indices: Iterable[int],
        counts: Sequence[float | Tensor],
        copies: Mapping[int, Tensor],
        acting: Mapping[int, Acting],
        fresh: Mapping[int, Tensor],
    ) -> list[Measured]:
        waiting: list[Measured] = []
        for each in self._by_device(*_split(indices, fresh)):
            groups = [self._group(i) for i in each.pieces]
            more: dict[str, Any] = {}
            if each.chosen[0] in fresh:
                # What was copied before the step is as it was then: still scaled.
                after = self._drift != "before"
                more["fresh"] = self._acting(self._pieces(each, fresh), groups, after)
                if is_normalised(self.optimizer):
                    more["adams"] = [adam_constants(self._group(i), counts[i]) for i in each.pieces]
                    states = {i: self._adam_state(i) for i in each.chosen}
                    more["exp_avg_sqs"] = self._pieces(each, {i: _divisor(states[i]) for i in states})
            products = each.plan.displacement(
                self._pieces(each, copies),
                self._pieces(each, self._weights(each)),
                [acting[i].lr for i in each.pieces],
                [acting[i].weight_decay for i in each.pieces],
                **more,
            )
            waiting.append(Products(each.rows, products, each.shared))
        return waiting

    def _adam_state(self, i: int) -> AdamState:
        return adam_state(self.optimizer, self._group(i), self.tracked[i].parameter)

    def _acting(self, grads: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], after: bool) -> Fresh:
        optimizer = self.optimizer
        acting = {
            id(group): (grad_factor(optimizer, group, after), coupled_decay(optimizer, group))
            for group in optimizer.param_groups
        }
        factors, decays = zip(*(acting[id(group)] for group in groups), strict=True)
        return Fresh(grads, factors, decays)

    def _measure_moments(
        self,
        what: type[Products],
        indices: Iterable[int],
        counts: Sequence[float | Tensor],
        fresh: Mapping[int, Tensor] | None = None,
        copies: Mapping[int, Tensor] | None = None,
        ahead: bool = False,
    ) -> list[Measured]:
        """Products from Adam's state as it is after the step or, from the gradient, `ahead` of it."""
        waiting: list[Measured] = []
        for each in self._by_device(*_split(indices, fresh or {})):
            groups = [self._group(i) for i in each.pieces]
            states = {i: self._adam_state(i) for i in each.chosen}
            more: dict[str, Any] = {}
            if ahead:
                grads = self._pieces(
                    each, {i: cast(Tensor, self.tracked[i].parameter.grad) for i in each.chosen}
                )
                more["fresh"] = self._acting(grads, groups, after=False)
                more["ahead"], more["drift"] = True, bool(self._drift)
                more["rounded"] = not groups[0].get("fused")
                if any(state.max_exp_avg_sq is not None for state in states.values()):
                    more["max_exp_avg_sqs"] = self._pieces(each, {i: _top(states[i]) for i in states})
                second = self._pieces(each, {i: states[i].exp_avg_sq for i in states})
            else:
                second = self._pieces(each, {i: _divisor(states[i]) for i in states})
                if fresh and each.chosen[0] in fresh:
                    grads = self._pieces(each, fresh)
                    more["fresh"] = self._acting(grads, groups, after=True)
                    more["lr"] = None if copies is not None else [group["lr"] for group in groups]
            adams = [adam_constants(self._group(i), counts[i] + ahead) for i in each.pieces]
            weights = self._pieces(each, self._weights(each) if copies is None else copies)
            first = self._pieces(each, {i: states[i].exp_avg for i in states})
            products = each.plan.moments(weights, first, second, adams, **more)
            waiting.append(what(each.rows, products, each.shared))
        return waiting

    # ------------------------------------------------------------------ what momentum remembers

    def set_clocks(self, made: int, followed: Mapping[Tensor, _Clock] | None = None) -> None:
        """Follow the momentum of each tensor from here on: as before, from what the log says of it, or anew.

        Args:
            made: updates of the run so far.
            followed: the clocks of those that are followed already.
        """
        if not self._drift:
            return
        followed = followed or {}
        alike: dict[tuple[int, int | None, float], list[int]] = {}
        for i, each in enumerate(self.tracked):
            if each.foreign:  # its owner follows it
                continue
            clock = followed.get(each.parameter)
            age = 0.0 if clock is not None else momentum_age(self.optimizer, each.parameter, made or np.inf)
            alike.setdefault((each.group, clock and id(clock), age), []).append(i)
        self._clocks = []
        anew = []
        for (group, _, age), members in alike.items():
            known = followed.get(self.tracked[members[0]].parameter)
            if known is not None:
                clock = replace(known, group=group, members=members, memory=copy(known.memory))
            else:
                clock = _Clock(group, members, NoiseMemory(age), age)
                anew += [clock] if 0 < age < np.inf else []
            self._clocks.append(clock)
        if made and anew:
            self._recall(made, anew)

    def _out_of_step(self, counts: Sequence[float | Tensor]) -> set[int]:
        """Tensors whose state somebody else has changed: a moment that was reset is young again."""
        if not is_normalised(self.optimizer):  # all of those count
            return set()
        return {
            i
            for clock in self._clocks
            for i in clock.members
            if not isinstance(counts[i], Tensor)
            and not isinstance(clock.step, Tensor)
            and counts[i] != clock.step
            and counts[i] < COUNT_STOPS
        }

    def _recall(self, made: int, clocks: Iterable[_Clock]) -> None:
        """Go on from the last update, if the log has it."""
        rows = self._recalled(made)
        rows = rows[rows["lr_memory"].notna()]
        for clock in clocks:
            found = [each for i in clock.members if (each := self.tracked[i]).label in rows.index]
            if not found:
                continue
            lr, decay, lr_memory = rows.loc[found[0].label, ["lr", "weight_decay", "lr_memory"]].tolist()
            group, state = self.optimizer.param_groups[clock.group], self.optimizer.state[found[0].parameter]
            momentum = momentum_of(self.optimizer, group, clock.step, state)
            if momentum is not None:
                clock.memory.resume(momentum, lr, decay, lr_memory)

    def tick(self, step: int, skipped: bool | Tensor) -> None:
        """Update `step` was made, of the tensors that had gradients, or skipped, as only the device knows."""
        made = 1 - skipped.double() if isinstance(skipped, Tensor) else 1
        for clock in [*self._clocks]:
            moved = [i for i in clock.members if self.tracked[i].parameter in self._had_gradient]
            if not moved:
                continue
            if len(moved) < len(clock.members):  # from here on they differ
                rest = sorted({*clock.members} - {*moved})
                self._clocks.append(replace(clock, members=rest, memory=copy(clock.memory)))
                clock.members = moved
            group = self.optimizer.param_groups[clock.group]
            state = self.optimizer.state.get(self.tracked[moved[0]].parameter, {})
            momentum = momentum_of(self.optimizer, group, clock.step + 1, state)
            clock.step = clock.step + made
            if momentum is None:
                continue
            decay = self.decay.of_group(group, step)
            clock.remembered = clock.memory.update(momentum, lr_of(group), decay, made)

    def _by_device(self, *parts: Iterable[int]) -> list[_Reading]:
        """The tensors of each part, device and type, and how they are read; without those that are elsewhere."""
        groups: dict[tuple[int, torch.device, torch.dtype, bool], list[int]] = {}
        for part, indices in enumerate(parts):
            for i in indices:
                each = self.tracked[i]
                if each.held.boxes:
                    kind = part, each.parameter.device, each.parameter.dtype, each.shared
                    groups.setdefault(kind, []).append(i)
        found = []
        for (_, device, _, shared), chosen in groups.items():
            key = (device, *chosen)
            if key not in self._readings:
                if len(self._readings) >= 16:  # which tensors move may change from step to step
                    self._readings.clear()
                self._readings[key] = self._reading(chosen, device, shared)
            found.append(self._readings[key])
        return found

    def _reading(self, chosen: list[int], device: torch.device, shared: bool) -> _Reading:
        pieces = [(i, box) for i in chosen for box in self.tracked[i].held.boxes]
        rows = [row for i, _ in pieces for row in self.tracked[i].rows]
        views = [box.clip(self.tracked[i].name.views) for i, box in pieces]
        index = torch.tensor(rows).to(device, non_blocking=True) if shared else None
        plan = Plan([box.shape for _, box in pieces], views, device)
        return _Reading(chosen, [i for i, _ in pieces], rows, index, plan)


def _version(tensor: Tensor) -> tuple[int, int]:
    """How often a tensor was written to, also where it is the shell of a local one."""
    return tensor._version, local_of(tensor)._version if is_dtensor(tensor) else 0


def _divisor(state: AdamState) -> Tensor:
    """What the update divided by the root of."""
    return state.exp_avg_sq if state.max_exp_avg_sq is None else state.max_exp_avg_sq


def _top(state: AdamState) -> Tensor:
    """The running maximum of v; nothing where there is none."""
    top = state.max_exp_avg_sq
    return state.exp_avg_sq.new_zeros(()).expand(state.exp_avg_sq.shape) if top is None else top


def _split(indices: Iterable[int], fresh: Mapping[int, Tensor]) -> list[list[int]]:
    """Those with gradients of one type, and those without."""
    parts: dict[torch.dtype | None, list[int]] = {}
    for i in indices:
        parts.setdefault(fresh[i].dtype if i in fresh else None, []).append(i)
    return list(parts.values())
