"""What the callbacks share: a logger, and a schedule of rescalings, that a framework's events open and close."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.core.tables import IDENTITY, By, group_columns
from weightdyn.record.logger import ForceLogger
from weightdyn.record.optimizers import unwrap, updates_made
from weightdyn.record.shards import is_dtensor, partitioned
from weightdyn.wisca.schedule import RescaleSchedule


def is_logged_here(first: bool, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether a process has a logger: the first, and each of those that share tensors or their states."""
    groups = [group for each in unwrap(optimizers) for group in each.param_groups]
    shared = any(is_dtensor(parameter) for group in groups for parameter in group["params"])
    return first or shared or bool(partitioned(optimizers))


class Recording:
    """A `ForceLogger` for each training in turn.

    Args:
        by: groups of the scalars, as in `ForceLogger.scalars`.
        options: of `ForceLogger`.

    Attributes:
        logger: the logger of the present training, or of the last one; None before, and in a process that has none.
        is_open: whether it logs now.

    Raises:
        TypeError: an option is none of `ForceLogger`'s.
        ValueError: an unknown `by`.
    """

    def __init__(self, by: By | Sequence[str] | None, options: Mapping[str, Any]):
        group_columns(pd.DataFrame(columns=[*IDENTITY]), by)
        inspect.signature(ForceLogger).bind(None, params=None, out=None, start_step=None, **options)
        self.logger: ForceLogger | None = None
        self._by, self._options = by, options
        self.is_open = False
        self._told: dict[str, float] = {}

    def begin(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        out: Path,
        step: int,
        config: Any = None,
    ) -> None:
        """Attach a logger at the update that the optimizers count, or at `step` if they do not count."""
        self.end(RuntimeError("another training began"))  # if the last one never told of its end
        made = max(updates_made(each, default=step) for each in unwrap(optimizers))
        options = {"config": config, **self._options}
        self.logger = ForceLogger(optimizers, model, out=out, start_step=made, **options)
        self.is_open, self._told = True, {}

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Keep a framework's metrics beside the forces, those that are numbers and not the forces' own."""
        if self.is_open and self.logger is not None:
            numbers: dict[str, Any] = {}
            for name, value in metrics.items():
                if isinstance(value, Tensor) and value.numel() == 1:
                    value = value.item()
                own = name == "step" or name.startswith(("forces/", "weibull/"))
                if isinstance(value, (int, float)) and not own:
                    numbers[name] = value
            self.logger.record(**numbers)

    def news(self) -> dict[str, float]:
        """The scalars of the last logged update, once: empty until there is another one."""
        scalars = self.logger.scalars(self._by) if self.is_open and self.logger is not None else {}
        if scalars == self._told:
            return {}
        self._told = scalars
        return scalars

    def flush(self) -> None:
        """Before a checkpoint is written, so that it knows of no update that the log does not."""
        if self.is_open and self.logger is not None:
            with _full_disk_is_told():
                self.logger.flush()

    def end(self, error: BaseException | None = None) -> None:
        """Close the log; after an `error` as a `with` statement does. Ending twice does no harm."""
        if self.is_open and self.logger is not None:
            self.is_open = False
            with _full_disk_is_told():
                self.logger.__exit__(None if error is None else type(error), error, None)


@contextlib.contextmanager
def _full_disk_is_told() -> Iterator[None]:
    """A log that cannot be written must not end the training."""
    try:
        yield
    except OSError as error:
        message = f"ForceCallback: the log could not be written and is kept in memory: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


class Rescaling:
    """A `RescaleSchedule` for each training in turn.

    Args:
        options: of `RescaleSchedule`.

    Attributes:
        schedule: that of the present training, or of the last one; None before.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.schedule: RescaleSchedule | None = None
        self._options = options

    def begin(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        forces: Recording | None,
        step: int,
        first: bool,
    ) -> None:
        """Attach a schedule at the update that the optimizer counts, or at `step` if it does not count.

        It writes into the log of `forces`, which the `first` process has.
        """
        self.end()
        if forces is not None and first and not forces.is_open:
            raise ValueError(
                "forces does not log this training: give the same ForceCallback to the trainer, in front of the "
                "RescaleCallback"
            )
        inner = unwrap(optimizers)
        if len(inner) != 1:
            raise ValueError(
                f"RescaleCallback follows one optimizer, and there are {len(inner)}: call "
                "weightdyn.wisca.rescale_(model, optimizers) in the training step"
            )
        made = updates_made(inner[0], default=step)
        log = None if forces is None else forces.logger
        self.schedule = RescaleSchedule(model, inner[0], logger=log, start_step=made, **self._options)

    def end(self) -> None:
        """Take the schedule off the optimizer. Ending twice does no harm."""
        if self.schedule is not None:
            self.schedule.close()
