"""Rescale while a model trains: at the start, after given updates, or every n-th, whatever the loop.

It hangs on the optimizer as a `ForceLogger` does, and always acts behind it: the forces of an update are measured
before the weights are rescaled, so a rescaling is an event in the log and not a force.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import nn

from weightdyn.core.checks import check_instance, check_whole, refuse
from weightdyn.record.logger import ForceLogger
from weightdyn.record.optimizers import check_optimizer, updates_made
from weightdyn.wisca.apply import rescale_
from weightdyn.wisca.plan import CHOICES, check_choices

EVENT = "wisca rescale"
"""What a rescaling is called in the column `event` of a run's metrics."""


class RescaleSchedule:
    """Call `rescale_` after chosen updates of an optimizer.

    Attach it and leave the loop alone; it is a context manager, and a plain object with `close()`:

        with wd.ForceLogger(optimizer, model) as logger:
            with wisca.RescaleSchedule(model, optimizer, every=250, logger=logger):
                train(...)

    Args:
        model: the model.
        optimizer: its optimizer. (With several, call `rescale_` in the loop.)
        at: updates after which to rescale; 0 is now, before the first.
        every: rescale after every n-th update as well (WISCA: 250).
        logger: write each rescaling into its log: a row of the metrics with `event` = "wisca rescale".
        start_step: updates made before. Default: what the optimizer's state says.
        options: of `rescale_`: pairs, norm, granularity, moments, power_of_two, max_alpha, errors, progress.

    Attributes:
        step: updates made so far, counted by calls of `optimizer.step()`.

    Raises:
        ValueError, TypeError: an argument is none of those accepted; and what `rescale_` raises, when it is due.

    The forces of the next update are those of the rescaled weights. The jump of ‖w‖² between two updates is in no
    row, so `closure` shows it as a residual; rows that were audited (`ForceLogger(audit_every=…)`) are held
    against their own update alone, and close.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        at: Iterable[int] = (),
        every: int | None = None,
        logger: ForceLogger | None = None,
        start_step: int | None = None,
        **options: Any,
    ):
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        check_optimizer(optimizer)
        check_whole("every", every, 1, none="only the updates in at")
        check_whole("start_step", start_step, 0, none="what the optimizer's state says")
        kinds = (ForceLogger, type(None))
        check_instance("logger", logger, kinds, "a ForceLogger, or None")
        if isinstance(at, str) or not isinstance(at, Iterable):
            raise refuse("at", "numbers of updates, such as (0, 100)", at)
        self._at = frozenset(check_whole("at", step) for step in at)
        if not self._at and every is None:
            raise ValueError("at or every must be given; at=(0,) rescales once, before the first update")
        inspect.signature(rescale_).bind(model, optimizer, **options)
        check_choices(**{name: options[name] for name in CHOICES if name in options})
        self._model, self._optimizer, self._every = model, optimizer, every
        self._logger, self._options = logger, options
        self.step = updates_made(optimizer) if start_step is None else start_step
        self._tables: list[pd.DataFrame] = []
        if self.step == 0 and 0 in self._at:
            self._rescale()
        self._before = optimizer.register_step_pre_hook(self._move_to_end)
        self._after = optimizer.register_step_post_hook(self._on_step_end)

    @property
    def events(self) -> pd.DataFrame:
        """What was done: the tables of `rescale_`, with the updates made before each as `step`."""
        return pd.concat(self._tables, ignore_index=True) if self._tables else pd.DataFrame(columns=["step"])

    def close(self) -> None:
        """Take the hooks off the optimizer. Closing twice does no harm."""
        self._before.remove()
        self._after.remove()

    def __enter__(self) -> RescaleSchedule:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _move_to_end(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Act behind every other hook, whenever those were attached."""
        self._after.remove()
        self._after = optimizer.register_step_post_hook(self._on_step_end)

    def _on_step_end(self, *_: object) -> None:
        self.step += 1
        if self.step in self._at or (self._every is not None and self.step % self._every == 0):
            self._rescale()

    def _rescale(self) -> None:
        table = rescale_(self._model, self._optimizer, **self._options)
        table.insert(0, "step", self.step)
        self._tables.append(table)
        if self._logger is not None:
            self._logger.record(event=EVENT)
