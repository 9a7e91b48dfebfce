"""ForceLogger: a hook on an optimizer that logs the three forces of every tensor while a model trains.

AdamW's moments stand in its state after a step, so three inner products measured then give the forces of that
step in closed form: no copy of the weights, no second pass over the gradients, and a training loop that does
not change. The hook is a thin shell: `moments` does the arithmetic, `runlog` keeps the rows.
"""

from __future__ import annotations

import atexit
import functools
import json
import operator
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weightdyn.core.checks import check_choice, check_flag, check_path, check_pattern, check_whole
from weightdyn.core.forces import NoiseMemory, Remembered, before_step, fresh_before_step
from weightdyn.core.naming import TensorName, Views, check_config, check_views, describe
from weightdyn.core.tables import By, force_table
from weightdyn.files.durable import write_file
from weightdyn.record.moments import PRODUCTS, Fresh, Plan
from weightdyn.record.optimizers import (
    COUNT_STOPS,
    adam_constants,
    adam_state,
    check_moments,
    check_optimizer,
    count_stopped,
    coupled_decay,
    decoupled_decay,
    grad_factor,
    is_normalised,
    is_remote,
    moments_of,
    momentum_age,
    momentum_of,
    optimizer_info,
    own_names,
    signature,
    update_counts,
    updates_made,
    warn_of_coupled_decay,
    why_no_drift,
    with_gradient,
)
from weightdyn.record.runlog import STORED, RunLog, RunWriter
from weightdyn.record.scalars import flat_scalars
from weightdyn.record.sigterm import uninterrupted, unwatch, watch
from weightdyn.weibull.fit import fit_weibull

Every = int | Callable[[int], bool]
Params = nn.Module | Iterable[tuple[str, Tensor]]
Tensors = str | Callable[[str, Tensor], bool]

_FLUSH_ROWS = 50_000
_FLUSH_SECONDS = 60.0
_SHRINK = 0.5  # at a smaller |1−ηλ| what is before the step is measured there: w' tells too little of w
_LOST = 0.01  # ... and at a smaller one w' tells nothing of it


@dataclass(frozen=True)
class _Tracked:
    """One tensor of the optimizer, and its rows in the log."""

    parameter: Tensor
    group: int
    name: TensorName
    rows: range


class _Columns:
    """What is known of some logged updates: arrays (updates, rows), filled in from the records."""

    def __init__(self, records: Sequence[_Record]):
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
class _Measured:
    """Something measured for some rows, still on its device; its kind says what becomes of it."""

    rows: list[int]
    values: Tensor

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        """Put the values, come over from the device, where they belong for update i."""
        raise NotImplementedError


class _Products(_Measured):
    """PRODUCTS with the weights before the step."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.products[i, self.rows] = values.reshape(-1, len(PRODUCTS))


class _ProductsAfter(_Products):
    """PRODUCTS with the weights after the step, to be carried back over it."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        super().enter(columns, i, values)
        columns.after[i, self.rows] = True


class _Moved(_Measured):
    """Above 0 where the step moved the tensor."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.moved[i, self.rows] &= values > 0


class _LearningRate(_Measured):
    """η, where it is a tensor on the device."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.lr[i, self.rows] = values


class _Remembers(_Measured):
    """What momentum remembers, where a device knows its numbers: the fields of `Remembered`."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.remembered[i][:, self.rows] = values.reshape(-1, len(Remembered._fields)).T


class _NormAfter(_Measured):
    """‖w‖² after the step."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.norm_sq_after[i, self.rows] = values


class _NormBefore(_Measured):
    """‖w‖² before the step, of an audit."""

    def enter(self, columns: _Columns, i: int, values: np.ndarray) -> None:
        columns.norm_sq_audit[i, self.rows] = values


@dataclass
class _Record:
    """One logged update: what is still on the devices, and what the host knows."""

    step: int
    lr: np.ndarray  # (rows,), NaN where it is a tensor on a device
    weight_decay: np.ndarray
    moved: np.ndarray  # (rows,), false for a tensor that this update left alone
    remembered: np.ndarray  # (fields of Remembered, rows), NaN where unknown or on a device
    waiting: list[_Measured] = field(default_factory=list)
    skipped: Tensor | None = None  # updates that a GradScaler skipped up to here, on the device


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

    counts: list[float | Tensor]  # updates that each tensor has had
    gradients: dict[int, tuple[Tensor, int]] = field(
        default_factory=dict
    )  # and how often they were written to
    copies: dict[int, Tensor] = field(default_factory=dict)  # weights, where the method needs them
    ahead: list[int] = field(default_factory=list)  # tensors measured before the update
    waiting: list[_Measured] = field(default_factory=list)


class ForceLogger:
    """Log the forces of an optimizer's tensors, from its own state, while it trains.

    Attach it and leave the loop alone; it is a context manager, and a plain object with `close()`:

        with wd.ForceLogger(optimizer, model, every=10, out="runs/mine"):
            train(...)

    For each selected tensor and logged update t it records ⟨w,u⟩, ‖u‖² and ‖w‖² with u = m̂/(√v̂+ε), from which
    `RunLog.forces()` computes alignment, injection and decay (see `forces_from_products`). The products are
    measured after the step and carried back over it in closed form (`before_step`); parameters below 32 bits,
    whose steps rounding may swallow, are measured before the step from the gradient instead.

    Args:
        optimizer: `torch.optim.AdamW` or `Adam` (single-tensor, foreach, fused or capturable; amsgrad,
            maximize); with `source="displacement"` any optimizer.
        params: a model, or (name, parameter) pairs; they give the tensors their names. By default the names
            that the optimizer was made with, else names made from group, position and shape.
        every: log every n-th update, or those for which `every(t)` is true. Default: all.
        out: run directory, made if it does not exist. None keeps the log in memory.
        tensors: which to log: a regular expression searched in the name, or a function of name and parameter.
            Default: all.
        views: True logs q, k and v of a fused tensor apart, "head" each head of q, k and v, False leaves
            tensors whole.
        source: "moments" reads Adam's state. "displacement" copies the selected weights before a logged step
            and takes u = ((1−ηλ)w − w')/η, for any optimizer with decoupled decay (SGD, Lion, Muon).
        weibull_every: fit a Weibull law to the magnitudes every n-th update (or by function), and at the start.
        snapshot_every: store w, m and v of the selected tensors every n-th update as
            `snapshots/step-….safetensors`. Needs `out`.
        audit_every: log every n-th update with ‖w‖² measured before the step as well; the table's `residual`
            is the change of ‖w‖² that the forces do not explain: rounding.
        drift: measure what alignment is made of, from the gradients as well: the columns `drift`, `memory` and
            `signal`. True reads the gradients after the step; what of them is not there any more, or was written to
            inside the step, is NaN, and a warning says so. "before" reads them before the step, where an optimizer
            or a hook changes or frees them in it (slower; `source="displacement"` copies them). False leaves it.
            Of optimizers whose u is not a linear function of their gradients (Lion, Muon) and of those that
            weightdyn does not know they are NaN; the run's `info["no_drift"]` says why.
        start_step: updates made before this logger. Default: what the optimizer's state says, kept up to date
            when a state dict is loaded.
        overwrite: where `out` holds a run already, remove it and begin anew at the first update, for the notebook
            cell that is run again. A training that resumes (from an update above 0) goes on in it all the same, and
            what else is in the directory stays.
        config: configuration of the model (transformers', or a dict), for the heads of fused tensors. Default:
            the model's own.
        rules: {regular expression: component} for names that weightdyn does not know, tried first.

    Raises:
        TypeError: the optimizer is not Adam-like (and the source is "moments"), or a parameter is sharded,
            sparse or complex.
        ValueError: an argument is not one of those accepted, or nothing is selected.
        FileExistsError: at the first update from 0 on, `out` holds updates of another training.

    Under data parallelism attach it on rank 0 only: the ranks make the same updates. A hook of your own that
    changes gradients before the step must be registered before the logger, for it reads them then where parameters
    are below 32 bits or drift="before"; elsewhere what such a hook changes is NaN, and the log says so.

    On a GPU nothing waits for the device inside a step: results stay there and come over when the log is
    flushed, every 60 s or 50,000 rows, and after each Weibull fit. A NaN or inf is recorded as it is and warned
    of once. A full disk is warned of, and the rows kept, until they can be written.

    The log is flushed as well when `optimizer.state_dict()` is taken, for that is what a checkpoint does: so no
    checkpoint knows of an update that the log does not. Save `state_dict()` of the logger with a checkpoint that
    leaves the optimizer out. SIGTERM flushes, and then does what it did before.

    Source: arXiv 2606.19367 for the forces; the closed form is `before_step`'s.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Params | None = None,
        *,
        every: Every = 1,
        out: str | Path | None = None,
        tensors: Tensors | None = None,
        views: Views = True,
        source: Literal["moments", "displacement"] = "moments",
        weibull_every: Every | None = None,
        snapshot_every: Every | None = None,
        audit_every: Every | None = None,
        drift: Literal[True, False, "before"] = True,
        start_step: int | None = None,
        overwrite: bool = False,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
    ):
        check_optimizer(optimizer)
        if check_choice("source", source, ("moments", "displacement")) == "moments":
            check_moments(optimizer)
        warn_of_coupled_decay(optimizer)
        if out is not None:
            check_path("out", out, "a directory's path, or None to keep the log in memory")
        check_flag("overwrite", overwrite)
        if snapshot_every is not None and out is None:
            raise ValueError("snapshot_every writes files: give it a run directory with out=")
        start_step = check_whole("start_step", start_step, none="what the optimizer's state says")
        self._every = _schedule("every", every, none=False)
        self._weibull_every = _schedule("weibull_every", weibull_every)
        self._snapshot_every = _schedule("snapshot_every", snapshot_every)
        self._audit_every = _schedule("audit_every", audit_every)
        self._source = source
        self._drift = check_choice("drift", drift, (True, False, "before"))
        self._optimizer = optimizer
        self._given = _names(_given_pairs(optimizer, params))
        self._wanted, self._select = tensors, _selector(tensors)
        self._views: Views = check_views(views)
        self._config = check_config(config) if config is not None else _config(params)
        self._rules = rules
        self._plans: dict[tuple[torch.device | int, ...], Plan] = {}
        self._pending: list[_Record] = []
        self._notes: list[tuple[str, dict[str, Any], Tensor]] = []  # metrics whose step the device knows
        self._skipped: Tensor | None = None
        self._last = pd.DataFrame(columns=[*STORED["forces"]])
        self._fits = pd.DataFrame(columns=[*STORED["weibull"]])  # the latest
        self._flushed_at = time.monotonic()
        self._warned: set[str] = set()
        self._stepping = False
        self._before: _Before | None = None
        self._had_gradient: set[Tensor] = set()
        self._begun = False
        self._tracked: list[_Tracked] = []
        self._clocks: list[_Clock] = []
        self._made, self._called = 0, False  # updates of this logger; whether the optimizer was asked for any
        self._step = updates_made(optimizer) if start_step is None else start_step
        if start_step is None and count_stopped(optimizer):
            self._warn_of_stopped_count()
        info: dict[str, Any] = {"optimizer": optimizer_info(optimizer), "source": source}
        why = why_no_drift(optimizer) if drift else "ForceLogger(drift=False)"
        if why is not None:
            info["no_drift"], self._drift = why, False
        self._writer = RunWriter(out, self._step, info, overwrite=overwrite)
        try:
            self._track()
        except BaseException:
            self._writer.close()
            raise
        self._closed = False
        self._process = os.getpid()
        as_it_is: Any = torch.compiler.disable  # also inside a step() that was compiled
        self._handles = [
            optimizer.register_step_pre_hook(as_it_is(self._on_step_begin)),
            optimizer.register_step_post_hook(as_it_is(self._on_step_end)),
            optimizer.register_load_state_dict_post_hook(self._on_load),
            optimizer.register_state_dict_pre_hook(self._on_save),
        ]
        # A script that ends without close(), by an error for one, still keeps its rows.
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        watch(id(self), functools.partial(_store, weakref.ref(self)))

    # ------------------------------------------------------------------ what users call

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._step

    @property
    def run(self) -> RunLog:
        """The log up to now. To ask it for a table flushes what that table would lack."""
        reference = weakref.ref(self)

        def refresh() -> None:
            logger = reference()
            if logger is not None and not logger._closed:
                logger.flush()

        return self._writer.run(refresh)

    @uninterrupted
    def record(self, step: int | None = None, **metrics: Any) -> None:
        """Keep numbers beside the forces (loss=…, grad_norm=…), by default at the present update.

        Tensors of one element are read with `.item()`, which waits for a GPU.
        """
        step = check_whole("step", step, none="the present update")
        values = {name: _number(name, value) for name, value in metrics.items()}
        if step is None and self._skipped is not None:
            self._notes.append(("metrics", {"step": self._step, **values}, self._skipped))
        else:
            self._writer.append("metrics", {"step": self._step if step is None else step, **values})

    @uninterrupted
    def latest(self) -> pd.DataFrame:
        """Force table of the last logged update (empty before the first). Waits for a GPU."""
        self._bring_over()
        return force_table(self._last, self._labels)

    @uninterrupted
    def scalars(self, by: By | Sequence[str] | None = "role") -> dict[str, float]:
        """The last logged update as plain floats, such as a reporter takes: `wandb.log(log.scalars())`.

            forces/<group>/alignment_share, injection_share, decay_share   |F|/Σ|F|
            forces/<group>/relative_update, angle, norm                    η‖u‖/‖w‖, radians, ‖w‖ before the update
            forces/<group>/drift_signed_share, memory_signed_share         drift/Σ|F|, memory/Σ|F|
            weibull/<group>/lam, k                                         of the latest fit (`weibull_every`)

        The two signed shares are there where the drift was measured. They are noisy in a single update, and keep
        their sign so that a dashboard's smoothing averages the noise out; `smooth` does it with errors. λ and k are
        pooled over the group as `pool_weibull` does, and stay until the next fit.

        Args:
            by: groups of tensors: "layer", "component", "role" (selection, transmission, value, other), "model", a
                list of such columns, or None for each tensor. Those that the update left alone do not count.

        Returns:
            {name: float}, empty before the first logged update. Waits for a GPU.

        Raises:
            ValueError: an unknown `by`.
        """
        return flat_scalars(self.latest(), self._fits, self._labels, by)

    @uninterrupted
    def flush(self) -> None:
        """Bring the results over from the devices and write what is not yet written."""
        self._bring_over()
        self._flushed_at = time.monotonic()
        self._writer.flush()

    def state_dict(self) -> dict[str, int]:
        """Flush, and return what a checkpoint needs to know of the log: {"step": updates made so far}.

        Raises:
            OSError: the log could not be written, so that a checkpoint made now would know of more than it holds.
        """
        self.flush()
        return {"step": self._step}

    @uninterrupted
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from the update of a `state_dict`; what was recorded behind it is superseded.

        Call it after the optimizer's `load_state_dict`, if that is called as well.
        """
        if not isinstance(state, Mapping) or "step" not in state:
            raise ValueError(f"state must be what ForceLogger.state_dict() returned, got {state!r}")
        self._go_to(check_whole("state['step']", state["step"]))
        self._set_clocks()

    def close(self) -> None:
        """Take the hooks off the optimizer and write what is left. Closing twice does no harm.

        Warns if there was no update to log.
        """
        if not self._closed:
            self._close()
            self._warn_of_no_update()

    @uninterrupted
    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        atexit.unregister(self._at_exit)
        self.flush()
        self._writer.close()
        self._closed = True
        unwatch(id(self))

    def __enter__(self) -> ForceLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            if not self._closed:
                self._close()  # what is missing after an error needs no second word
        except OSError as error:
            message = f"ForceLogger: the last rows could not be written: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def __repr__(self) -> str:
        where = self._writer.path or "memory"
        kind = type(self._optimizer).__name__
        return f"ForceLogger({kind}, {len(self._tracked)} tensors, at update {self._step}, into {where})"

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            _close(lambda: self)

    # ------------------------------------------------------------------ the hooks

    @uninterrupted
    @torch.no_grad()
    def _on_step_begin(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> Any:
        self._called = self._stepping = True
        if not self._begun:
            self._begin()
        self._before = None
        self._had_gradient = with_gradient(optimizer)  # before and after: another hook may clear them
        if self._signature != signature(optimizer):
            self._bring_over()
            self._track()
        t = self._step + 1
        audit = _due(self._audit_every, t)
        if not audit and not _due(self._every, t):
            return None
        everything = range(len(self._tracked))
        before = _Before(update_counts(optimizer, [each.parameter for each in self._tracked]))
        if self._out_of_step(before.counts):
            self._set_clocks()
        if audit:
            before.waiting += self._measure_norms(_NormBefore, everything)
        wanted = everything if self._source == "displacement" else self._shrunk()
        before.copies = {i: self._tracked[i].parameter.detach().clone() for i in wanted}
        self._before = before
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._read_gradients(before)
            return None

        def read() -> Any:
            loss = closure()  # makes the gradients
            self._read_gradients(before)
            return loss

        return ((args[0], read, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": read})

    @uninterrupted
    @torch.no_grad()
    def _read_gradients(self, before: _Before) -> None:
        """Note the gradients that the step is given, and measure what is measured from them before it."""
        gradients = {
            i: grad for i, each in enumerate(self._tracked) if (grad := each.parameter.grad) is not None
        }
        if self._source == "moments":
            before.ahead = [
                i
                for i in gradients
                if self._drift == "before" or self._tracked[i].parameter.dtype.itemsize < 4
            ]
            before.waiting += self._measure_moments(_Products, before.ahead, before.counts, ahead=True)
            before.copies = {i: kept for i, kept in before.copies.items() if i not in before.ahead}
        if self._drift == "before" and self._source == "displacement":
            before.gradients = {i: (grad.clone(), -1) for i, grad in gradients.items()}
        elif self._drift:
            before.gradients = {i: (grad, grad._version) for i, grad in gradients.items()}

    def _shrunk(self) -> list[int]:
        """Tensors of which this step's decay leaves so little that w cannot be told from w'."""
        groups = [
            index
            for index, group in enumerate(self._optimizer.param_groups)
            if not is_remote(group["lr"])
            and abs(1 - float(group["lr"]) * decoupled_decay(self._optimizer, group)) < _SHRINK
        ]
        return [i for i, each in enumerate(self._tracked) if each.group in groups]

    @uninterrupted
    @torch.no_grad()
    def _on_step_end(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._stepping:  # a step() that calls that of its class has called this already
            return
        self._stepping = False
        before, self._before = self._before, None
        found_inf = getattr(optimizer, "found_inf", None)  # a fused step under a GradScaler may move nothing
        if isinstance(found_inf, Tensor):
            if is_remote(found_inf):
                self._skipped = found_inf.double() + (0 if self._skipped is None else self._skipped)
            elif found_inf.item():
                return
        self._had_gradient |= with_gradient(optimizer)
        if not self._had_gradient:
            return
        self._step += 1
        self._made += 1
        self._tick(found_inf)
        if before is not None:
            self._log(before, found_inf)
        if _due(self._snapshot_every, self._step):
            self._snapshot()
        fit = _due(self._weibull_every, self._step)
        if fit:
            self._fit()
        overdue = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        if fit or overdue or len(self._pending) * len(self._labels) > _FLUSH_ROWS:
            self._bring_over()
        if overdue or self._writer.buffered > _FLUSH_ROWS:
            self._store()

    @uninterrupted
    def _on_save(self, optimizer: torch.optim.Optimizer) -> None:
        """Whoever takes the optimizer's state makes a checkpoint, which must not know of more than the log."""
        if self._process == os.getpid():
            self._store_all()

    @uninterrupted
    def _on_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizer to the update at which a loaded state dict stands."""
        self._bring_over()  # which may correct the number of the update
        made = updates_made(optimizer, default=self._step)
        if count_stopped(optimizer):
            self._warn_of_stopped_count()
        if made != self._step:
            self._go_to(made)
        self._set_clocks()

    def _go_to(self, step: int) -> None:
        self._bring_over()
        self._store()
        self._step = step
        self._writer.restart(step)

    def _warn_of_stopped_count(self) -> None:
        self._warn_once(
            "count",
            f"the optimizer counts its updates in float32, which ends at {COUNT_STOPS:,}: say by start_step= or by "
            "the logger's own state_dict() and load_state_dict(), at which update it is",
        )

    def _warn_of_no_update(self) -> None:
        kind = type(self._optimizer).__name__
        if self._made or (self._called and not self._begun):  # refused at the first one, which was told
            return
        if self._called:
            why = (
                "its parameters had no gradient at any step(): are they another model's, or were the gradients "
                "cleared before?"
            )
        else:
            why = (
                "its step() was never called: does another optimizer make the updates (one that was made later, or "
                "the one inside a wrapper), or was the logger closed before the training?"
            )
        self._warn_once("nothing", f"there was no update of this {kind} to log; {why}")

    def _begin(self) -> None:
        """Before the first update: refuse a directory that is in use, fit the weights as they are."""
        self._writer.begin()
        self._begun = True
        if self._weibull_every is not None and self._step == 0:
            self._fit()

    # ------------------------------------------------------------------ measuring

    def _track(self) -> None:
        """List the selected tensors and number their rows."""
        self._signature = signature(self._optimizer)
        before, self._tracked = self._tracked, []
        self._labels: dict[str, dict[str, Any]] = {}
        self._plans.clear()
        followed = {before[i].parameter: clock for clock in self._clocks for i in clock.members}
        self._names = {**_names(own_names(self._optimizer)), **self._given}
        groups = self._optimizer.param_groups
        for index, group in enumerate(groups):
            for position, parameter in enumerate(group["params"]):
                shape = "x".join(map(str, parameter.shape))
                name = self._names.get(parameter, f"group{index}.{position}({shape})")
                if parameter.numel() and self._select(name, parameter):
                    _check_parameter(name, parameter)
                    self._add(index, name, parameter)
        whole = [
            each.name.name for each in self._tracked if each.name.component == "qkv" and not each.name.views
        ]
        if whole and self._views and self._config is None:
            self._warn_once(
                "config", f"q, k and v of {whole[0]} stay together: pass config= to tell its heads"
            )
        if not self._tracked:
            names = [self._names.get(p, "one without a name") for group in groups for p in group["params"]]
            raise ValueError(
                f"tensors={self._wanted!r} selects none of the optimizer's {len(names)} parameters: "
                f"{', '.join(names[:3])} …"
            )
        sizes = [len(each.rows) for each in self._tracked]
        self._row_group = np.repeat([each.group for each in self._tracked], sizes)
        self._describe(tensors=self._labels)
        self._set_clocks(followed)

    def _add(self, group: int, name: str, parameter: Tensor) -> None:
        shape = tuple(parameter.shape)
        label = describe(name, shape, self._config, views=self._views, rules=self._rules)
        first = len(self._labels)
        for row in label.rows(shape):
            if row.label in self._labels:
                raise ValueError(f"params: two parameters are named {name!r}; names must differ")
            self._labels[row.label] = {**row.identity(), "shape": list(shape), "parameter": name}
        self._tracked.append(_Tracked(parameter, group, label, range(first, len(self._labels))))

    def _log(self, before: _Before, found_inf: Tensor | None) -> None:
        """Measure the update that was just made; what is on a device stays there."""
        optimizer = self._optimizer
        waiting = list(before.waiting)
        moved = np.zeros(len(self._labels), dtype=bool)
        active = []
        counts = update_counts(optimizer, [each.parameter for each in self._tracked])
        for i, (each, count, earlier) in enumerate(zip(self._tracked, counts, before.counts, strict=True)):
            had_gradient = each.parameter in self._had_gradient
            if self._source == "displacement":
                if not had_gradient:
                    continue
            elif isinstance(count, Tensor):  # known on the device only: decided when the rows come over
                rows = list(each.rows)
                grown = (count - earlier).double()
                if had_gradient:
                    grown = grown + (count >= COUNT_STOPS)
                waiting.append(_Moved(rows, grown.expand(len(rows))))
            elif count <= cast(float, earlier) and not (had_gradient and count >= COUNT_STOPS):
                continue
            moved[each.rows] = True
            active.append(i)
        if found_inf is not None and is_remote(found_inf):
            rows = list(range(len(moved)))
            waiting.append(_Moved(rows, (1 - found_inf.double()).expand(len(rows))))

        remembered = np.full((len(Remembered._fields), len(moved)), np.nan)
        for clock in self._clocks:
            rows = [row for i in clock.members for row in self._tracked[i].rows]
            if any(isinstance(value, Tensor) for value in clock.remembered):
                values = _on_one_device(clock.remembered)
                waiting.append(_Remembers(rows, values.expand(len(rows), -1)))
            else:
                remembered[:, rows] = np.array(clock.remembered, dtype=float)[:, None]

        lrs, decays = [], []
        for index, group in enumerate(optimizer.param_groups):
            lr = group["lr"]
            if is_remote(lr):
                rows = np.flatnonzero(self._row_group == index).tolist()
                waiting.append(_LearningRate(rows, lr.double().reshape(()).clone().expand(len(rows))))
                lr = np.nan
            lrs.append(float(lr))
            decays.append(decoupled_decay(optimizer, group))

        measured = {*before.copies, *before.ahead}  # with the weights before the step
        copied = [i for i in active if i in before.copies]
        inverted = [i for i in active if i not in measured]
        fresh = self._fresh(before, active)
        if self._source == "displacement":
            waiting += self._measure_displacement(copied, counts, before.copies, fresh)
        else:
            waiting += self._measure_moments(_ProductsAfter, inverted, counts, fresh)
            waiting += self._measure_moments(_Products, copied, counts, fresh, copies=before.copies)
        waiting += self._measure_norms(_NormAfter, [i for i in active if i in measured])

        lr, decay = np.array(lrs)[self._row_group], np.array(decays)[self._row_group]
        self._pending.append(_Record(self._step, lr, decay, moved, remembered, waiting, self._skipped))

    def _measure_norms(self, what: type[_Measured], indices: Iterable[int]) -> list[_Measured]:
        return [
            what(rows, plan.norms([self._tracked[i].parameter.detach() for i in chosen]))
            for chosen, rows, plan in self._by_device(indices)
        ]

    def _fresh(self, before: _Before, active: Sequence[int]) -> dict[int, Tensor]:
        """The gradients that acted in the step, of those tensors where they are still known."""
        if not self._drift:
            return {}
        found: dict[int, Tensor] = {}
        gone = None
        for i in active:
            grad = self._tracked[i].parameter.grad
            kept, version = before.gradients.get(i, (None, None))
            if kept is not None and (version == -1 or (grad is kept and kept._version == version)):
                found[i] = kept if kept.layout == torch.strided else kept.to_dense()
            elif i not in before.ahead and self._tracked[i].parameter in self._had_gradient:
                gone = self._tracked[i].name.name if gone is None else gone
        if gone is not None:
            self._warn_once(
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
        fresh: Mapping[int, Tensor],
    ) -> list[_Measured]:
        waiting: list[_Measured] = []
        for chosen, rows, plan in self._by_device(*_split(indices, fresh)):
            groups = [self._optimizer.param_groups[self._tracked[i].group] for i in chosen]
            more: dict[str, Any] = {}
            if chosen[0] in fresh:
                # What was copied before the step is as it was then: still scaled.
                after = self._drift != "before"
                more["fresh"] = self._acting([fresh[i] for i in chosen], groups, after)
                if is_normalised(self._optimizer):
                    more["adams"] = [
                        adam_constants(group, counts[i]) for i, group in zip(chosen, groups, strict=True)
                    ]
                    more["exp_avg_sqs"] = [self._second_moment(i) for i in chosen]
            products = plan.displacement(
                [copies[i] for i in chosen],
                [self._tracked[i].parameter.detach() for i in chosen],
                [group["lr"] for group in groups],
                [decoupled_decay(self._optimizer, group) for group in groups],
                **more,
            )
            waiting.append(_Products(rows, products))
        return waiting

    def _second_moment(self, i: int) -> Tensor:
        """What the update divided by."""
        state = adam_state(
            self._optimizer,
            self._optimizer.param_groups[self._tracked[i].group],
            self._tracked[i].parameter,
        )
        return state.exp_avg_sq if state.max_exp_avg_sq is None else state.max_exp_avg_sq

    def _acting(self, grads: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], after: bool) -> Fresh:
        optimizer = self._optimizer
        acting = {
            id(group): (grad_factor(optimizer, group, after), coupled_decay(optimizer, group))
            for group in optimizer.param_groups
        }
        factors, decays = zip(*(acting[id(group)] for group in groups), strict=True)
        return Fresh(grads, factors, decays)

    def _measure_moments(
        self,
        what: type[_Products],
        indices: Iterable[int],
        counts: Sequence[float | Tensor],
        fresh: Mapping[int, Tensor] | None = None,
        copies: Mapping[int, Tensor] | None = None,
        ahead: bool = False,
    ) -> list[_Measured]:
        """Products from Adam's state as it is after the step or, from the gradient, `ahead` of it."""
        optimizer = self._optimizer
        waiting: list[_Measured] = []
        for chosen, rows, plan in self._by_device(*_split(indices, fresh or {})):
            parameters = [self._tracked[i].parameter for i in chosen]
            groups = [optimizer.param_groups[self._tracked[i].group] for i in chosen]
            states = [adam_state(optimizer, *each) for each in zip(groups, parameters, strict=True)]
            second = [state.exp_avg_sq for state in states]
            tops = [state.max_exp_avg_sq for state in states]
            more: dict[str, Any] = {}
            if ahead:
                grads = [cast(Tensor, parameter.grad).detach() for parameter in parameters]
                more["fresh"] = self._acting(grads, groups, after=False)
                more["ahead"], more["drift"] = True, bool(self._drift)
                if any(top is not None for top in tops):
                    more["max_exp_avg_sqs"] = _first_given(
                        tops, [p.new_zeros(()).expand(p.shape) for p in parameters]
                    )
            else:
                second = _first_given(tops, second)
                if fresh and chosen[0] in fresh:
                    more["fresh"] = self._acting([fresh[i] for i in chosen], groups, after=True)
                    more["lr"] = None if copies is not None else [group["lr"] for group in groups]
            adams = [
                adam_constants(group, counts[i] + ahead) for i, group in zip(chosen, groups, strict=True)
            ]
            weights = [
                p.detach() if copies is None else copies[i] for i, p in zip(chosen, parameters, strict=True)
            ]
            first = [state.exp_avg for state in states]
            waiting.append(what(rows, plan.moments(weights, first, second, adams, **more)))
        return waiting

    # ------------------------------------------------------------------ what momentum remembers

    def _set_clocks(self, followed: Mapping[Tensor, _Clock] | None = None) -> None:
        """Follow the momentum of each tensor from here on: as before, from what the log says of it, or anew."""
        if not self._drift:
            return
        optimizer, followed = self._optimizer, followed or {}
        alike: dict[tuple[int, int | None, float], list[int]] = {}
        for i, each in enumerate(self._tracked):
            clock = followed.get(each.parameter)
            age = 0.0 if clock is not None else momentum_age(optimizer, each.parameter, self._step or np.inf)
            alike.setdefault((each.group, clock and id(clock), age), []).append(i)
        self._clocks = []
        anew = []
        for (group, _, age), members in alike.items():
            known = followed.get(self._tracked[members[0]].parameter)
            if known is not None:
                clock = replace(known, group=group, members=members, memory=copy(known.memory))
            else:
                clock = _Clock(group, members, NoiseMemory(age), age)
                anew += [clock] if 0 < age < np.inf else []
            self._clocks.append(clock)
        if self._step and anew:
            self._recall(anew)

    def _out_of_step(self, counts: Sequence[float | Tensor]) -> bool:
        """Whether somebody else has changed the state: a moment that was reset is young again."""
        return is_normalised(self._optimizer) and any(  # all of those count
            counts[i] != clock.step and counts[i] < COUNT_STOPS
            for clock in self._clocks
            for i in clock.members
            if not isinstance(counts[i], Tensor) and not isinstance(clock.step, Tensor)
        )

    def _recall(self, clocks: Iterable[_Clock]) -> None:
        """Go on from the last update, if the log has it."""
        rows = self._writer.run().forces()
        rows = rows[(rows["step"] == self._step) & rows["lr_memory"].notna()].set_index("tensor")
        labels = list(self._labels)
        for clock in clocks:
            found = [i for i in clock.members if labels[self._tracked[i].rows[0]] in rows.index]
            if not found:
                continue
            each = self._tracked[found[0]]
            lr, decay, lr_memory = rows.loc[
                labels[each.rows[0]], ["lr", "weight_decay", "lr_memory"]
            ].tolist()
            group, state = self._optimizer.param_groups[clock.group], self._optimizer.state[each.parameter]
            momentum = momentum_of(self._optimizer, group, clock.step, state)
            if momentum is not None:
                clock.memory.resume(momentum, lr, decay, lr_memory)

    def _tick(self, found_inf: Tensor | None) -> None:
        """An update was made, of the tensors that had gradients, or skipped, as only the device knows."""
        made = 1 - found_inf.double() if found_inf is not None and is_remote(found_inf) else 1
        for clock in [*self._clocks]:
            moved = [i for i in clock.members if self._tracked[i].parameter in self._had_gradient]
            if not moved:
                continue
            if len(moved) < len(clock.members):  # from here on they differ
                rest = sorted({*clock.members} - {*moved})
                self._clocks.append(replace(clock, members=rest, memory=copy(clock.memory)))
                clock.members = moved
            group = self._optimizer.param_groups[clock.group]
            state = self._optimizer.state.get(self._tracked[moved[0]].parameter, {})
            momentum = momentum_of(self._optimizer, group, clock.step + 1, state)
            clock.step = clock.step + made
            if momentum is None:
                continue
            lr = group["lr"] if is_remote(group["lr"]) else float(group["lr"])
            clock.remembered = clock.memory.update(
                momentum, lr, decoupled_decay(self._optimizer, group), made
            )

    def _by_device(self, *parts: Iterable[int]) -> list[tuple[list[int], list[int], Plan]]:
        """The tensors of each part, device and type, their rows, and the plan that reads them."""
        groups: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
        for part, indices in enumerate(parts):
            for i in indices:
                parameter = self._tracked[i].parameter
                groups.setdefault((part, parameter.device, parameter.dtype), []).append(i)
        found = []
        for (_, device, _), chosen in groups.items():
            key = (device, *chosen)
            if key not in self._plans:
                if len(self._plans) >= 16:  # which tensors move may change from step to step
                    self._plans.clear()
                tracked = [self._tracked[i] for i in chosen]
                shapes = [tuple(each.parameter.shape) for each in tracked]
                self._plans[key] = Plan(shapes, [each.name.views for each in tracked], device)
            found.append((chosen, [row for i in chosen for row in self._tracked[i].rows], self._plans[key]))
        return found

    # ------------------------------------------------------------------ from the devices into the log

    def _bring_over(self) -> None:
        """Turn what was measured since the last time into rows: one copy from each device."""
        if self._pending:
            pending, self._pending = self._pending, []
            rows = self._rows(pending)
            if len(rows):
                self._last = rows[rows["step"] == rows["step"].iloc[-1]]
                self._writer.append("forces", rows)
                self._flag_non_finite(rows)
        notes, self._notes = self._notes, []
        for kind, columns, skipped in notes:
            self._writer.append(kind, {**columns, "step": columns["step"] - int(skipped.item())})
        if self._skipped is not None:
            self._step -= int(self._skipped.item())
            self._skipped = None

    @uninterrupted
    def _store_all(self) -> None:
        self._bring_over()
        self._store()

    def _store(self) -> None:
        """Write in mid-training: a full disk must not end it, and the rows are kept for the next time."""
        self._flushed_at = time.monotonic()
        try:
            self._writer.flush()
        except OSError as error:
            self._warn_once("disk", f"the log could not be written and is kept in memory for now: {error}")

    def _rows(self, records: Sequence[_Record]) -> pd.DataFrame:
        """The stored columns of logged updates, as `RunLog` reads them."""
        fetched = _to_host([measured.values for record in records for measured in record.waiting])
        found = _Columns(records)
        steps = np.array([record.step for record in records])
        for i, record in enumerate(records):
            for measured in record.waiting:
                measured.enter(found, i, next(fetched))
            if record.skipped is not None:
                steps[i] -= int(record.skipped.item())
        products = dict(zip(PRODUCTS, np.moveaxis(found.products, -1, 0), strict=True))
        dot_wu, u_sq, w_sq = (products.pop(name) for name in ("dot_wu", "u_sq", "w_sq"))
        remembered = Remembered(*np.moveaxis(found.remembered, 1, 0))
        with np.errstate(all="ignore"):  # what is not finite is recorded as it is
            # In units of u: as if all of it were made of this gradient.
            dot_wg, dot_ug = (products.pop(name) * remembered.gain for name in ("dot_wg", "dot_ug"))
            g_sq = products.pop("g_sq") * remembered.gain**2
            undone = before_step(dot_wu, u_sq, w_sq, found.lr, found.weight_decay)
            dot_wg_undone = fresh_before_step(dot_wg, dot_ug, found.lr, found.weight_decay)
            lost = found.after & (np.abs(1 - found.lr * found.weight_decay) < _LOST)
        if (lost & found.moved).any():
            self._warn_once(
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
                "tensor": pd.Categorical.from_codes(np.tile(np.arange(rows), len(steps)), list(self._labels)),
                **{name: values.ravel() for name, values in columns.items()},
            }
        )
        return table[found.moved.ravel()]

    def _flag_non_finite(self, rows: pd.DataFrame) -> None:
        bad = rows[~np.isfinite(rows[["u_sq", "norm_sq_after"]]).all(axis=1)]
        if len(bad) and "finite" not in self._warned:
            first = {"step": int(bad["step"].iloc[0]), "tensor": str(bad["tensor"].iloc[0])}
            self._describe(flags={"first_non_finite": first})
            self._warn_once(
                "finite", f"{first['tensor']} has NaN or inf at update {first['step']}; recorded as it is"
            )

    def _describe(self, **sections: Any) -> None:
        try:
            self._writer.describe(**sections)
        except OSError as error:  # the next flush tries again
            self._warn_once("disk", f"the log could not be written and is kept in memory for now: {error}")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"ForceLogger: {message}", RuntimeWarning, stacklevel=3)

    def _fit(self) -> None:
        """Weibull fits of the matrices as they are now."""
        self._bring_over()  # which may correct the number of the update
        fits = []
        for each in self._tracked:
            weights = each.parameter.detach()
            if weights.ndim < 2:
                continue
            for row, part in zip(each.rows, each.name.views or (None,), strict=True):
                fit = fit_weibull(weights if part is None else part.of(weights))
                fits.append((list(self._labels)[row], fit.lam, fit.k, fit.r_squared, fit.ks, fit.n))
        if fits:
            columns = zip(
                ("tensor", "lam", "k", "r_squared", "ks", "n"), zip(*fits, strict=True), strict=True
            )
            self._fits = pd.DataFrame({"step": self._step, **{name: list(each) for name, each in columns}})
            self._writer.append("weibull", self._fits)

    def _snapshot(self) -> None:
        """Full w, m and v of the selected tensors, beside the log."""
        self._bring_over()  # which may correct the number of the update
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for each in self._tracked:
            group = self._optimizer.param_groups[each.group]
            name, parameter = each.name.name, each.parameter
            tensors[name] = parameter.detach().contiguous()
            for key, moment in moments_of(self._optimizer, parameter).items():
                tensors[f"{name}.{key}"] = moment.contiguous()
            facts[name] = {
                "step": float(self._optimizer.state.get(parameter, {}).get("step", self._step)),
                "lr": float(group["lr"]),
                "weight_decay": decoupled_decay(self._optimizer, group),
                "betas": [float(beta) for beta in group.get("betas", ())],
                "eps": float(group.get("eps", 0.0)),
            }
        folder = cast(Path, self._writer.path) / "snapshots"
        path = folder / f"step-{self._step:06d}.safetensors"
        metadata = {"step": str(self._step), "tensors": json.dumps(facts)}
        try:
            folder.mkdir(exist_ok=True)
            write_file(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as error:
            self._warn_once("snapshot", f"the snapshot of update {self._step} could not be written: {error}")


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "mps":
        raise TypeError(
            f"parameter {name} is on MPS, which has no float64 to sum in; log on a CPU or CUDA device"
        )
    sharded = type(parameter.data).__name__ == "DTensor"
    if sharded or parameter.layout != torch.strided or not parameter.is_floating_point():
        kind = "a DTensor (sharded)" if sharded else f"{parameter.layout} of {parameter.dtype}"
        raise TypeError(
            f"parameter {name} is {kind}; whole, dense, real tensors can be logged. Leave it out with tensors="
        )


def _given_pairs(optimizer: torch.optim.Optimizer, params: Params | None) -> list[tuple[str, Tensor]]:
    if params is None:
        return []
    pairs: Any = params.named_parameters() if isinstance(params, nn.Module) else params
    pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise TypeError("params must be a model or (name, parameter) pairs, such as model.named_parameters()")
    given = {parameter for _, parameter in pairs}
    if not any(parameter in given for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("params has none of the optimizer's parameters: is it another model's, or a copy?")
    return pairs


def _names(pairs: Sequence[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Parameters with their names, less what a wrapper (DDP, torch.compile) puts before every one of them."""
    names = [name for name, _ in pairs]
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(wrapper) for name in names):
            names = [name.removeprefix(wrapper) for name in names]
    return {parameter: name for name, (_, parameter) in zip(names, pairs, strict=True)}


def _config(model: Any) -> Any:
    """The configuration of a model, also of one that a wrapper holds."""
    while model is not None and getattr(model, "config", None) is None:
        model = getattr(model, "module", None)
    return getattr(model, "config", None)


def _selector(tensors: Tensors | None) -> Callable[[str, Tensor], bool]:
    if tensors is None:
        return lambda name, parameter: True
    if isinstance(tensors, str):
        pattern = check_pattern("tensors", tensors)
        return lambda name, parameter: pattern.search(name) is not None
    if callable(tensors):
        return tensors
    raise TypeError(f"tensors must be a regular expression or a function, got {type(tensors).__name__}")


def _schedule(argument: str, every: Any, none: bool = True) -> Every | None:
    if callable(every) or (every is None and none):
        return cast("Every | None", every)
    try:
        number = 0 if isinstance(every, bool) else operator.index(cast(Any, every))
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"{argument} must be a positive int or a function of the update's number"
            f"{', or None (never)' if none else ''}, got {every!r}"
        )
    return number


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"metric {name!r} must be one number, got a tensor of shape {tuple(value.shape)}"
            )
        return value.item()
    return value


def _due(every: Every | None, step: int) -> bool:
    if every is None:
        return False
    return bool(every(step)) if callable(every) else step % every == 0


def _first_given(values: Sequence[Tensor | None], otherwise: Sequence[Tensor]) -> list[Tensor]:
    return [other if value is None else value for value, other in zip(values, otherwise, strict=True)]


def _split(indices: Iterable[int], fresh: Mapping[int, Tensor]) -> list[list[int]]:
    """Those with gradients of one type, and those without."""
    parts: dict[torch.dtype | None, list[int]] = {}
    for i in indices:
        parts.setdefault(fresh[i].dtype if i in fresh else None, []).append(i)
    return list(parts.values())


def _on_one_device(values: Iterable[Any]) -> Tensor:
    """Numbers, some of them on a device, as one tensor there."""
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


def _close(reference: Callable[[], ForceLogger | None]) -> None:
    logger = reference()
    if logger is not None and logger._process == os.getpid():  # a forked child leaves the log to its parent
        logger._close()


def _store(reference: Callable[[], ForceLogger | None]) -> None:
    logger = reference()
    if logger is not None and logger._process == os.getpid():
        logger._store_all()
