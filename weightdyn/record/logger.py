"""ForceLogger: a hook on an optimizer that logs the three forces of every tensor while a model trains.

AdamW's moments stand in its state after a step, so three inner products measured then give the forces of that
step in closed form: no copy of the weights, no second pass over the gradients, and a training loop that does
not change. The hook is a thin shell: `moments` does the arithmetic, `runlog` keeps the rows.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import operator
import os
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weightdyn.core.checks import check_choice, check_flag, check_path, check_pattern, check_whole
from weightdyn.core.naming import Views, bare_names, check_config, check_views, describe
from weightdyn.core.tables import By, force_table
from weightdyn.files.durable import write_file
from weightdyn.record.book import Book, Round
from weightdyn.record.decay import Given
from weightdyn.record.fits import Fits
from weightdyn.record.optimizers import (
    COUNT_STOPS,
    check_moments,
    count_stopped,
    moments_of,
    optimizer_info,
    own_names,
    source_of,
    unwrap,
    updates_made,
    warn_of_coupled_decay,
)
from weightdyn.record.runlog import STORED, RunLog, RunWriter
from weightdyn.record.scalars import flat_scalars
from weightdyn.record.shards import (
    PATIENCE,
    Announcement,
    Held,
    Ranks,
    held_of,
    involved,
    local_of,
    named_parameters,
    owned,
    partitioned,
    rank_here,
    ranks_of,
    refuse_fsdp1,
)
from weightdyn.record.sigterm import uninterrupted, unwatch, watch
from weightdyn.record.watch import Drift, Tracked, Watch

Every = int | Callable[[int], bool]
Params = nn.Module | Iterable[tuple[str, Tensor]]
Tensors = str | Callable[[str, Tensor], bool]
Source = Literal["auto", "moments", "displacement"]

_FLUSH_ROWS = 50_000
_FLUSH_SECONDS = 60.0
_LAST_SECONDS = 1.0  # in which other ranks may still answer when the process ends or has failed
_ASKED = 64  # updates of which ranks that share tensors tell one another whether a function would log them


def _alone(method: Callable[..., Any]) -> Any:
    """One thread at a time, and none of a forked process, which leaves the log to its parent."""

    @functools.wraps(method)
    def alone(self: ForceLogger, *args: Any, **kwargs: Any) -> Any:
        if self._process != os.getpid():
            return None
        with self._lock:
            return method(self, *args, **kwargs)

    return alone


class ForceLogger:
    """Log the forces of an optimizer's tensors, from its own state, while it trains.

    Attach it and leave the loop alone; it is a context manager, and a plain object with `close()`:

        with wd.ForceLogger(optimizer, model, every=10, out="runs/mine"):
            train(...)

    For each selected tensor and logged update t it records ⟨w,u⟩, ‖u‖² and ‖w‖² with u = m̂/(√v̂+ε), from which
    `RunLog.forces()` computes alignment, injection and decay (see `forces_from_products`). The products are
    measured after the step and carried back over it in closed form (`before_step`); where the weights or
    their moments are below 32 bits, and rounding may swallow a step, they are measured before it from the gradient.

    Args:
        optimizer: any torch optimizer, or a list of those that train the model together (Muon and AdamW; one for
            each parameter, stepped in the backward pass): one table, one step count. An update of the run is a step
            of each of them; it ends when one is asked for its next, or one that comes earlier in their order is
            asked with new gradients there (the others were skipped). Wrappers of optimizers are unwrapped.
        params: a model, or (name, parameter) pairs; they give the tensors their names. By default the names
            that the optimizer was made with, else names made from group, position and shape.
        every: log every n-th update, or those for which `every(t)` is true, on every rank alike. Default: all.
        out: run directory, made if it does not exist. None keeps the log in memory.
        tensors: which to log: a regular expression searched in the name, or a function of name and parameter.
            Default: all.
        views: True logs q, k and v of a fused tensor apart, "head" each head of q, k and v, False leaves
            tensors whole.
        source: "moments" reads the state of torch's AdamW and Adam (single-tensor, foreach, fused or capturable;
            amsgrad, maximize). "displacement" copies the selected weights before a logged step and takes
            u = ((1−ηλ)w − w')/η, of any optimizer (SGD, Lion, Muon). "auto" takes the moments where the optimizer
            has Adam's and the displacement elsewhere; the run's `info["source"]` says which.
        weibull_every: fit a Weibull law to the magnitudes every n-th update (or by function), and at the start.
        snapshot_every: store w, m and v of the selected tensors every n-th update as
            `snapshots/step-….safetensors`. Needs `out`. Of tensors that ranks share each rank writes its part
            beside it (`part-….safetensors`), and weightdyn reads them as one.
        audit_every: log every n-th update with ‖w‖² measured before the step as well; the table's `residual`
            is the change of ‖w‖² that the forces do not explain: rounding.
        drift: measure what alignment is made of, from the gradients as well: the columns `drift`, `memory` and
            `signal`. True reads the gradients after the step; what of them is not there any more, or was written to
            inside the step, is NaN, and a warning says so. "before" reads them before the step, where an optimizer
            or a hook changes or frees them in it (slower; `source="displacement"` copies them). False leaves it.
            Of optimizers whose u is not a linear function of their gradients (Lion, Muon) and of those that
            weightdyn does not know they are NaN; the run's `info["no_drift"]` says why.
        weight_decay: λ that acts, w ← (1 − ηλ)w − ηu, where you know better than the logger: a number, or a
            function of the parameters' group and the update's number. By default it is known for the optimizers of
            torch, transformers, schedulefree, lion-pytorch, bitsandbytes and torchao, and found out for others by
            steps of twins; the run's `info["decay"]` says how. Where it cannot be told, it is NaN, and so are the
            forces; `info["no_decay"]` says why.
        start_step: updates made before this logger. Default: what the optimizer's state says, kept up to date
            when a state dict is loaded.
        overwrite: where `out` holds a run already, remove it and begin anew at the first update, for the notebook
            cell that is run again. A training that resumes (from an update above 0) goes on in it all the same, and
            what else is in the directory stays.
        config: configuration of the model (transformers', or a dict), for the heads of fused tensors. Default:
            the model's own.
        rules: {regular expression: component} for names that weightdyn does not know, tried first.

    Raises:
        TypeError: the optimizer is not Adam-like (and the source is "moments"), or a parameter is sparse, complex,
            a partial sum, or of FSDP1.
        ValueError: an argument is not one of those accepted, or nothing is selected.
        RuntimeError: at the first update, other ranks lack a logger, or have another.
        FileExistsError: at the first update from 0 on, `out` holds updates of another training.

    Of sharded tensors (`fully_shard`, with and without tensor parallelism, replicas, CPU offload; any DTensors;
    ZeroRedundancyOptimizer) every rank measures its part, and two asynchronous reductions for each logged update
    make the sums whole. So attach it on all ranks, with the same arguments: the lowest writes, and the table
    is that of one process. Where one has none, or another, the first update ends in an error. Under plain data
    parallelism the ranks make the same updates: attach it on all ranks or on rank 0 alone, which writes. FSDP1 is
    refused; what Megatron and DeepSpeed cut is handed over to `ShardLogger`. A rank that is lost holds up the
    others for as long as their process group waits, and for a second where they fail or end; what has not come by
    then is left out. Weibull fits of shared views with more than 262,144 weights are of counts in bins, and left
    out where bins blur them.

    A hook of your own that changes gradients before the step must be registered before the logger, for it may read
    them then; what is changed later is NaN, and the log says so.

    On a GPU nothing waits for the device inside a step: results stay there and come over when the log is
    flushed, every 60 s or 50,000 rows, and after each Weibull fit. One thing is waited for: where ranks share
    tensors, whether a fused step under a GradScaler was made. A NaN or inf is recorded as it is and warned
    of once. A full disk is warned of, and the rows kept, until they can be written.

    The log is flushed as well when `optimizer.state_dict()` is taken, for that is what a checkpoint does: so no
    checkpoint knows of an update that the log does not. Save `state_dict()` of the logger with a checkpoint that
    leaves the optimizer out. SIGTERM flushes, and then does what it did before.

    Source: arXiv 2606.19367 for the forces; the closed form is `before_step`'s.
    """

    _sees_start = True
    """Whether the weights are at hand before the first update."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        params: Params | None = None,
        *,
        every: Every = 1,
        out: str | Path | None = None,
        tensors: Tensors | None = None,
        views: Views = True,
        source: Source = "auto",
        weibull_every: Every | None = None,
        snapshot_every: Every | None = None,
        audit_every: Every | None = None,
        drift: Drift = True,
        weight_decay: Given | None = None,
        start_step: int | None = None,
        overwrite: bool = False,
        config: Any = None,
        rules: Mapping[str, str] | None = None,
    ):
        self._optimizers = unwrap(optimizer)
        self._wholes = partitioned(optimizer)
        check_choice("source", source, ("auto", "moments", "displacement"))
        for each in self._optimizers:
            if source == "moments":
                check_moments(each)
            warn_of_coupled_decay(each)
        if out is not None:
            check_path("out", out, "a directory's path, or None to keep the log in memory")
        check_flag("overwrite", overwrite)
        if snapshot_every is not None and out is None:
            raise ValueError("snapshot_every writes files: give it a run directory with out=")
        start_step = check_whole("start_step", start_step, none="what the optimizer's state says")
        check_choice("drift", drift, (True, False, "before"))
        self._every = _schedule("every", every, none=False)
        self._weibull_every = _schedule("weibull_every", weibull_every)
        self._snapshot_every = _schedule("snapshot_every", snapshot_every)
        self._audit_every = _schedule("audit_every", audit_every)
        self._given = _names(_given_pairs(self._parameters(), params))
        self._model = params if isinstance(params, nn.Module) else None
        self._wanted, self._select = tensors, _selector(tensors)
        self._views: Views = check_views(views)
        self._config = check_config(config) if config is not None else _config(params)
        self._rules = rules
        self._watches = [
            Watch(
                each,
                source_of(each) if source == "auto" else source,
                drift,
                weight_decay,
                self._recall,
                self._warn_once,
            )
            for each in self._optimizers
        ]
        self._book = Book(self._warn_once)
        self._fitting: list[Fits] = []  # that wait for other ranks
        self._notes: list[tuple[str, dict[str, Any], Round]] = []  # metrics whose step the device knows
        self._last = pd.DataFrame(columns=[*STORED["forces"]])
        self._fits = pd.DataFrame(columns=[*STORED["weibull"]])  # the latest
        self._flushed_at = time.monotonic()
        self._warned: set[str] = set()
        self._unknown_decays: list[str] = []  # why
        self._begun = False
        self._made, self._called = 0, False  # updates of this logger; whether the optimizer was asked for any
        made = _updates_made(self._optimizers, 0) if start_step is None else start_step
        self._start(made)
        if start_step is None and any(map(count_stopped, self._optimizers)):
            self._warn_of_stopped_count()
        self._out = None if out is None else Path(out).absolute()
        self._involved = self._all_ranks()
        self._keeps = out is None or self._involved[0] == rank_here()
        self._writer = RunWriter(
            out if self._keeps else None, made, _info(self._watches), overwrite=overwrite
        )
        try:
            self._track()
            self._announced = self._announce(source, drift)
        except BaseException:
            self._writer.close()
            raise
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.RLock()  # who reads the run in another thread must not take half an update
        self._handles = [
            handle
            for index in range(len(self._watches))
            for handle in self._attach(index, self._watches[index])
        ]
        self._handles += [
            zero.register_load_state_dict_post_hook(self._on_load) for zero in self._wholes.values()
        ]
        # A script that ends without close(), by an error for one, still keeps its rows.
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        watch(id(self), functools.partial(_store, weakref.ref(self)))

    def _attach(self, index: int, watched: Watch) -> list[Any]:
        def hook(function: Callable[..., Any]) -> Any:  # also inside a step() that was compiled
            return torch.compiler.disable(functools.partial(function, index))

        optimizer = watched.optimizer
        handles: list[Any] = [
            optimizer.register_step_pre_hook(hook(self._on_step_begin)),
            optimizer.register_step_post_hook(hook(self._on_step_end)),
            optimizer.register_load_state_dict_post_hook(self._on_load),
            optimizer.register_state_dict_pre_hook(self._on_save),
        ]
        # Weights, state and η as the step left them: older hooks may change them.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(handles[1].id, last=False)
        return handles

    # ------------------------------------------------------------------ what users call

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._round.step

    @property
    def run(self) -> RunLog:
        """The log up to now. To ask it for a table flushes what that table would lack.

        Of a run that another rank writes, it is what that one has written by now.
        """
        if not self._keeps:
            return RunLog(cast(Path, self._out))
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
        if step is None and self._round.skipped() is not None:
            self._notes.append(("metrics", values, self._round))
        else:
            self._append("metrics", {"step": self._round.step if step is None else step, **values})

    @uninterrupted
    def latest(self) -> pd.DataFrame:
        """Force table of the last logged update (empty before the first). Waits for a GPU, and for other ranks."""
        self._bring_over(_patience())
        return force_table(self._last, self._book.labels)

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
        return flat_scalars(self.latest(), self._fits, self._book.labels, by)

    @_alone
    @uninterrupted
    def flush(self) -> None:
        """Bring the results over from the devices and the other ranks, and write what is not yet written."""
        self._bring_over(_patience())
        self._flushed_at = time.monotonic()
        self._writer.flush()

    def state_dict(self) -> dict[str, int]:
        """Flush, and return what a checkpoint needs to know of the log: {"step": updates made so far}.

        Raises:
            OSError: the log could not be written, so that a checkpoint made now would know of more than it holds.
        """
        self.flush()
        return {"step": self._round.step}

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
        if not self._closed and self._process == os.getpid():
            self._close(_patience())
            self._warn_of_no_update()

    @_alone
    @uninterrupted
    def _close(self, patience: float = _LAST_SECONDS) -> None:
        for handle in self._handles:
            handle.remove()
        atexit.unregister(self._at_exit)
        if self._book.ranks is None or patience == math.inf:  # others may never come to the end of the update
            self._finish()
            for each in self._announced:
                each.withdraw()
        self._bring_over(patience)
        self._book.give_up()
        for fits in self._fitting:
            fits.give_up()
        self._fitting = []
        self._writer.flush()
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
        kinds, tensors = _kinds(self._optimizers), len(self._everything())
        where = self._writer.path or "memory"
        return f"ForceLogger({kinds}, {tensors} tensors, at update {self._round.step}, into {where})"

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            _close(lambda: self)

    # ------------------------------------------------------------------ the hooks

    @_alone
    @uninterrupted
    @torch.no_grad()
    def _on_step_begin(self, index: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> Any:
        if _fills_state(optimizer):
            return None
        self._called = True
        if not self._begun:
            self._begin()
        watched = self._watches[index]
        if watched.is_inside():  # a step() that calls that of its class is one
            return None
        self._ask(index)
        watched.begin()
        if watched.is_changed():
            self._book.send()  # what the other optimizers have made of this update, in the rows that it has
            self._bring_over(math.inf)
            self._track()
        t = self._round.step + (not self._open)
        audit = _due(self._audit_every, t)
        if not audit and not _due(self._every, t):
            return None
        return watched.prepare(t - 1, audit, args, kwargs)

    @_alone
    @uninterrupted
    @torch.no_grad()
    def _on_step_end(self, index: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        watched = self._watches[index]
        if not watched.stepping or watched.is_inside():
            return
        watched.end()
        skipped = watched.was_skipped()
        if isinstance(skipped, Tensor) and self._book.ranks is not None:
            skipped = bool(skipped.item())  # for the ranks log the same updates, by the same numbers
        if skipped is not True and watched.has_moved():
            if not self._open:
                self._round = Round(self._round.step + 1, self._round.skipped())
                self._made += 1
                self._open = self._unfinished = True
            self._round.join(skipped if isinstance(skipped, Tensor) else None)
            watched.tick(self._round.step, skipped)
            watched.measure(lambda: self._book.record(self._round), skipped)
            self._tell_of_decay(watched)
        if len(self._asked) == len(self._watches):
            self._finish()
        overdue = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        if overdue or self._book.rows > _FLUSH_ROWS:
            self._bring_over()
        if overdue or self._writer.buffered > _FLUSH_ROWS:
            self._store()

    def _ask(self, index: int) -> None:
        """An optimizer is asked for a step: does it belong to the update that others have begun?"""
        backward = torch._C._current_graph_task_id()  # -1 outside of a backward pass
        again = index in self._asked
        if self._asked and not again:  # of those before it, some may have been left out
            last = self._asked[-1]
            early = self._order.setdefault(index, len(self._order)) < self._order[last]
            moved_on = backward != self._backward or (
                backward < 0 and self._watches[last].has_new_gradients()
            )
            again = early and moved_on
        if again:
            self._finish()
            self._asked, self._open = [], False
        self._order.setdefault(index, len(self._order))
        self._asked.append(index)
        self._backward = backward

    def _tell_of_decay(self, watched: Watch) -> None:
        reason = watched.decay.reason
        if reason is not None and reason not in self._unknown_decays:
            self._unknown_decays.append(reason)
            self._describe(no_decay="; ".join(self._unknown_decays))
            self._warn_once("decay", f"λ is not known, and the forces are NaN where it is not. {reason}")

    def _finish(self) -> None:
        """All optimizers that make it have made the update: what is due once in it."""
        if not self._unfinished:
            return
        self._unfinished = False
        self._book.send()
        if _due(self._snapshot_every, self._round.step):
            self._snapshot()
        if _due(self._weibull_every, self._round.step):
            self._fit()

    @uninterrupted
    def _on_save(self, optimizer: torch.optim.Optimizer) -> None:
        """Whoever takes the optimizer's state makes a checkpoint, which must not know of more than the log."""
        if self._process == os.getpid():
            # Where an optimizer rests the update is not known to be over; others may not come here to send it.
            sent = self._book.send()
            self._store_all(min(_patience(), PATIENCE) if sent else _patience())

    @uninterrupted
    def _on_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizers to the update at which loaded state dicts stand."""
        self._bring_over()  # which may correct the number of the update
        made = _updates_made(self._optimizers, self._round.step)
        if count_stopped(optimizer):
            self._warn_of_stopped_count()
        if made != self._round.step:
            self._go_to(made)
        self._set_clocks()

    def _go_to(self, step: int) -> None:
        self._book.send()
        self._bring_over(_patience())
        self._store()
        self._start(step)
        self._writer.restart(step)

    def _start(self, step: int) -> None:
        self._round = Round(step)  # the last update that was made
        self._asked: list[int] = []  # optimizers that were asked for a step since an update began
        self._order: dict[int, int] = {}  # in which they are asked
        self._backward = -1  # the backward pass that the last one was asked in
        self._open = False  # whether that update is this round, or still to be made
        self._unfinished = False  # whether what is due at the end of the update is still to be done

    def _set_clocks(self) -> None:
        for watched in self._watches:
            watched.set_clocks(self._round.step)

    def _recall(self, step: int) -> pd.DataFrame:
        try:
            rows = (self._writer.run() if self._keeps else self.run).forces()
        except FileNotFoundError:  # the rank that writes has not begun
            rows = self._writer.run().forces()
        return rows[rows["step"] == step].set_index("tensor")

    def _warn_of_stopped_count(self) -> None:
        self._warn_once(
            "count",
            f"the optimizer counts its updates in float32, which ends at {COUNT_STOPS:,}: say by start_step= or by "
            "the logger's own state_dict() and load_state_dict(), at which update it is",
        )

    def _warn_of_no_update(self) -> None:
        if self._made or (self._called and not self._begun):  # refused at the first one, which was told
            return
        if self._called:
            why = (
                "its parameters had no gradient at any step(): are they another model's (fully_shard makes "
                "new ones: it comes before the optimizer), or were the gradients cleared before?"
            )
        else:
            why = (
                "its step() was never called: does another optimizer make the updates (one that was made later, or "
                "the one inside a wrapper), or was the logger closed before the training?"
            )
        self._warn_once("nothing", f"there was no update of this {_kinds(self._optimizers)} to log; {why}")

    def _begin(self) -> None:
        """Before the first update: refuse a directory that is in use, fit the weights as they are."""
        self._meet()
        self._writer.begin()
        self._begun = True
        if self._weibull_every is not None and self._round.step == 0 and self._sees_start:
            self._fit()

    # ------------------------------------------------------------------ other ranks

    def _all_ranks(self) -> tuple[int, ...]:
        """Those that train the tensors, ascending: the first of them writes."""
        return involved(self._parameters(), self._wholes.values())

    def _sharing(self, shared: Sequence[Tracked]) -> Ranks | None:
        """Those that add up what each has of some tensors, if there are any."""
        pairs = [(each.parameter, each.held) for each in shared]
        return ranks_of(pairs, self._wholes.values(), self._book.ranks)

    def _announce(self, source: Source, drift: Drift) -> list[Announcement]:
        """Let the other ranks know of this logger: it waits for none of them."""
        ranks = self._book.ranks
        if len(self._involved) < 2 or (ranks is None and self._out is None):
            return []
        named = ("every", "weibull_every", "snapshot_every", "audit_every")
        schedules = {name: getattr(self, f"_{name}") for name in named}
        facts = {
            **{name: _told(value, self._round.step) for name, value in schedules.items()},
            "out": str(self._out),
            "views": self._views,
            "source": source,
            "drift": drift,
            "step": self._round.step,
            "tensors": {label: entry["shape"] for label, entry in self._book.labels.items()},
        }
        announced = [Announcement(facts, self._involved)]
        return (
            announced
            if ranks is None
            else [*announced, Announcement({"ranks": ranks.members}, ranks.members)]
        )

    def _meet(self) -> None:
        """Before the first update, up to which all ranks have come: have those that must a logger alike?"""
        writer = self._involved[0]
        remedy = (
            f"attach it on all ranks with the same arguments, before the first update; rank {writer} writes"
        )
        if self._book.ranks is None:  # they all make the same updates
            if self._keeps:
                return
            remedy += ". It may be attached on that rank alone"
        for each in self._announced:
            each.check(remedy)

    # ------------------------------------------------------------------ which tensors

    def _everything(self) -> list[tuple[Watch, Tracked]]:
        return [(watched, each) for watched in self._watches for each in watched.tracked]

    def _track(self) -> None:
        """List the selected tensors and number their rows."""
        if self._model is not None:  # which may have other parameters by now: fully_shard makes new ones
            kept = {parameter for each in self._optimizers for _, (_, parameter) in self._places(each)}
            kept = {parameter: name for parameter, name in self._given.items() if parameter in kept}
            self._given = {**kept, **_names(named_parameters(self._model))}
        self._names = {
            **_names([pair for each in self._optimizers for pair in own_names(each)]),
            **self._given,
        }
        self._book.labels = {}
        owners: dict[Tensor, int] = {}
        missed = []
        for index, watched in enumerate(self._watches):
            tracked = []
            for place, (group, parameter) in self._places(watched.optimizer):
                if owners.setdefault(parameter, index) != index:
                    raise ValueError(
                        f"optimizer: {self._names.get(parameter, place)} is in two of the optimizers; a tensor's "
                        "updates must be made by one"
                    )
                own = f"optimizer{index}.{place}" if len(self._watches) > 1 else place
                name = self._names.get(parameter, own)
                if math.prod(self._shape(name, parameter)) and self._select(name, parameter):
                    _check_parameter(name, parameter)
                    tracked.append(self._add(index, group, name, parameter))
                else:
                    missed.append(self._names.get(parameter, "one without a name"))
            followed = watched.track(tracked)
            watched.set_clocks(self._round.step, followed)
        everything = [each for _, each in self._everything()]
        if self._given and (unnamed := [each for each in everything if each.parameter not in self._names]):
            self._warn_once(
                "names",
                f"{len(unnamed)} of the optimizer's parameters are not in params and are named by their place, "
                f"{unnamed[0].name.name} for one: pass (name, parameter) pairs of all, of fp32 masters too",
            )
        whole = [
            each.name.name for each in everything if each.name.component == "qkv" and not each.name.views
        ]
        if whole and self._views and self._config is None:
            self._warn_once(
                "config", f"q, k and v of {whole[0]} stay together: pass config= to tell its heads"
            )
        if not everything:
            raise ValueError(
                f"tensors={self._wanted!r} selects none of the optimizer's {len(missed)} parameters: "
                f"{', '.join(missed[:3])} …"
            )
        self._describe(tensors=self._book.labels)
        shared = [each for each in everything if each.shared]
        self._book.copies = np.zeros(len(self._book.labels))
        self._book.ranks = self._sharing(shared)
        for each in shared:
            self._book.copies[each.rows] = cast(Ranks, self._book.ranks).copies_in(each.held.copies)

    def _places(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, tuple[int, Tensor]]]:
        """Those of an optimizer, and of those of other ranks with which it makes an update."""
        return _places(self._wholes.get(id(optimizer), optimizer))

    def _parameters(self) -> Iterator[Tensor]:
        return (p for each in self._optimizers for _, (_, p) in self._places(each))

    def _add(self, index: int, group: int, name: str, parameter: Tensor) -> Tracked:
        labels, shape = self._book.labels, self._shape(name, parameter)
        label = describe(name, shape, self._config, views=self._views, rules=self._rules)
        first, rows = len(labels), label.rows(shape)
        for row in rows:
            if row.label in labels:
                raise ValueError(f"params: two parameters are named {name!r}; names must differ")
            labels[row.label] = {**row.identity(), "shape": list(shape), "parameter": name}
        held, foreign = self._held(index, name, parameter)
        return Tracked(parameter, group, label, range(first, len(labels)), rows[0].label, held, foreign)

    def _shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(parameter.shape)

    def _held(self, index: int, name: str, parameter: Tensor) -> tuple[Held, bool]:
        """What this process has of a parameter, and whether another rank's optimizer makes its updates."""
        zero = self._wholes.get(id(self._optimizers[index]))
        if zero is None:
            return held_of(name, parameter), False
        held = owned(parameter, zero)
        return held, not held.boxes

    # ------------------------------------------------------------------ from the devices into the log

    def _append(self, kind: str, rows: Mapping[str, Any]) -> None:
        if self._keeps:
            self._writer.append(kind, rows)

    @_alone
    def _bring_over(self, patience: float = 0.0) -> None:
        """Turn what was measured since the last time into rows: one copy from each device.

        Args:
            patience: seconds in which what other ranks add may come; what has not stays for the next time.
        """
        until = time.monotonic() + patience
        self._book.await_ranks(until)
        rows = self._book.take()
        if rows is not None and len(rows):
            self._last = rows[rows["step"] == rows["step"].iloc[-1]]
            self._append("forces", rows)
            self._flag_non_finite(rows)
        while self._fitting and self._fitting[0].pending.wait(until):
            columns = self._fitting.pop(0).columns()
            if columns is not None:
                self._fits = pd.DataFrame(columns)
                self._append("weibull", columns)
        notes, self._notes = self._notes, []
        for kind, columns, update in notes:
            self._append(kind, {**columns, "step": update.settled()})
        self._open &= not self._round.was_skipped()
        self._round.settle(self._open)

    @uninterrupted
    def _store_all(self, patience: float = _LAST_SECONDS) -> None:
        self._bring_over(patience)
        self._store()

    @_alone
    def _store(self) -> None:
        """Write in mid-training: a full disk must not end it, and the rows are kept for the next time."""
        self._flushed_at = time.monotonic()
        try:
            self._writer.flush()
        except OSError as error:
            self._warn_once("disk", f"the log could not be written and is kept in memory for now: {error}")

    def _flag_non_finite(self, rows: pd.DataFrame) -> None:
        known = rows[rows["weight_decay"].notna()]
        bad = known[~np.isfinite(known[["u_sq", "norm_sq_after"]]).all(axis=1)]
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
        fits, labels = Fits(self._round.step, self._book.ranks, self._warn_once), list(self._book.labels)
        for _, each in self._everything():
            if len(each.held.shape) > 1:
                fits.add([labels[row] for row in each.rows], each.name.views, each.parameter, each.held)
        fits.send()
        self._fitting.append(fits)
        self._bring_over()

    def _snapshot(self) -> None:
        """Full w, m and v of the selected tensors, beside the log; of shared ones each rank writes its part."""
        self._bring_over()  # which may correct the number of the update
        step, here, writer = self._round.step, rank_here(), self._involved[0]
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        boxes: dict[str, Any] = {}
        everything = self._everything()
        others = sorted({rank for _, each in everything for rank in each.held.kept_by} - {writer})
        names = {rank: f"part-{step:06d}-{rank:05d}.safetensors" for rank in others}
        names[writer] = f"step-{step:06d}.safetensors"
        if here not in names:  # another has the same
            return
        for watched, each in everything:
            if not each.shared and here != writer:
                continue
            optimizer, name, parameter = watched.optimizer, each.name.name, each.parameter
            group, (lr, decay) = optimizer.param_groups[each.group], watched.acted(each, step)
            facts[name] = {
                "step": float(optimizer.state.get(parameter, {}).get("step", step)),
                "lr": _fact(lr),
                "weight_decay": _fact(decay),
                "betas": _fact(group.get("betas", ())),
                "eps": _fact(group.get("eps", 0.0)),
            }
            moments = moments_of(optimizer, parameter).items()
            for kept, tensor in ((name, parameter), *((f"{name}.{key}", value) for key, value in moments)):
                for i, piece in enumerate(each.held.pieces(local_of(tensor))):
                    place = f"{kept}@{i}" if each.shared else kept
                    tensors[place] = piece.contiguous()
                    if each.shared:
                        boxes[place] = kept, each.held.shape, each.held.boxes[i].offset
        metadata = {"step": str(step), "tensors": json.dumps(facts)}
        if self._book.ranks is not None:
            metadata |= {"boxes": json.dumps(boxes), "beside": json.dumps([names[rank] for rank in others])}
        folder = cast(Path, self._out) / "snapshots"
        try:
            folder.mkdir(exist_ok=True)
            write_file(folder / names[here], lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as error:
            self._warn_once("snapshot", f"the snapshot of update {step} could not be written: {error}")


def _fact(value: Any) -> Any:
    """A number, or several, as JSON has them: None for one that is not known."""
    if isinstance(value, tuple | list):
        return [_fact(each) for each in value]
    return None if value is None or math.isnan(value) else float(value)


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "mps":
        raise TypeError(
            f"parameter {name} is on MPS, which has no float64 to sum in; log on a CPU or CUDA device"
        )
    refuse_fsdp1(name, parameter)
    if parameter.layout != torch.strided or not parameter.is_floating_point():
        raise TypeError(
            f"parameter {name} is {parameter.layout} of {parameter.dtype}; dense, real tensors can be logged. "
            "Leave it out with tensors="
        )


def _given_pairs(stepped: Iterable[Tensor], params: Params | None) -> list[tuple[str, Tensor]]:
    if params is None:
        return []
    pairs: Any = named_parameters(params) if isinstance(params, nn.Module) else params
    pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise TypeError(
            "params must be a model or (name, parameter) pairs, such as model.named_parameters(); of several "
            "models chain theirs"
        )
    given = {parameter for _, parameter in pairs}
    if not any(parameter in given for parameter in stepped):
        raise ValueError(
            "params has none of the optimizer's parameters: is it another model's, or a copy? Of an optimizer that "
            "steps copies (fp32 masters of bf16 weights) pass (name, copy) pairs"
        )
    return pairs


def _names(pairs: Sequence[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Parameters with their names, less what wrappers (torch.compile, DDP) put into them."""
    names = bare_names([name for name, _ in pairs])
    return {parameter: name for name, (_, parameter) in zip(names, pairs, strict=True)}


def _places(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    """What a parameter without a name is called, its group, and the parameter."""
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            shape = "x".join(map(str, parameter.shape))
            yield f"group{index}.{position}({shape})", (index, parameter)


def _kinds(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """The names of their classes, and how many there are of each."""
    counts = Counter(type(each).__name__ for each in optimizers)
    return " + ".join(kind if count == 1 else f"{kind} ×{count}" for kind, count in counts.items())


def _info(watches: Sequence[Watch]) -> dict[str, Any]:
    """The sections of run.json that say what makes the updates, and how they are measured."""
    optimizers = [optimizer_info(watched.optimizer) for watched in watches]
    groups = [{"optimizer": each["name"], **group} for each in optimizers for group in each["groups"]]
    reasons = dict.fromkeys(watched.why_no_drift for watched in watches if watched.why_no_drift)
    info = {
        "optimizer": optimizers[0]
        if len(optimizers) == 1
        else {"name": _kinds(watched.optimizer for watched in watches), "groups": groups},
        "source": _by_kind(watches, lambda watched: watched.source),
        "decay": _by_kind(watches, lambda watched: watched.decay.told),
    }
    return {**info, "no_drift": "; ".join(reasons)} if reasons else info


def _by_kind(watches: Iterable[Watch], what: Callable[[Watch], str]) -> str:
    """What is said of the optimizers; where it differs, of which."""
    said: dict[str, list[torch.optim.Optimizer]] = {}
    for watched in watches:
        said.setdefault(what(watched), []).append(watched.optimizer)
    return ", ".join(text if len(said) == 1 else f"{text} ({_kinds(those)})" for text, those in said.items())


def _updates_made(optimizers: Iterable[torch.optim.Optimizer], default: int) -> int:
    """Updates that the optimizers have made, by the state of those that count; else `default`."""
    made = max(updates_made(each, default=-1) for each in optimizers)
    return max(made, default) if made < 0 or any(map(count_stopped, optimizers)) else made


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


def _told(every: Every | None, made: int) -> Any:
    """What another rank must have alike; of a function, what it says of the updates that come first."""
    return [t for t in range(made + 1, made + 1 + _ASKED) if every(t)] if callable(every) else every


def _fills_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch.distributed.checkpoint makes this step, which moves nothing, to have a state to load into."""
    frame = None if optimizer.state else sys._getframe(1)
    for _ in range(30):
        if frame is None or frame.f_code.co_name == "_init_optim_state":
            break
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_init_optim_state"


def _patience() -> float:
    """Seconds that other ranks are waited for; as long as their group waits, unless something has failed here."""
    return math.inf if sys.exc_info()[0] is None else _LAST_SECONDS


def _close(reference: Callable[[], ForceLogger | None]) -> None:
    logger = reference()
    if logger is not None and logger._process == os.getpid():  # a forked child leaves the log to its parent
        logger._close()


def _store(reference: Callable[[], ForceLogger | None]) -> None:
    logger = reference()
    if logger is not None and logger._process == os.getpid():
        logger._store_all()
