"""ForceCallback for transformers' Trainer, and for what is made from it, TRL's trainers among them.

    from weightdyn.integrations.transformers import ForceCallback

    trainer = Trainer(..., callbacks=[ForceCallback(every=10, out="runs/mine")])
    trainer.train()

The numbers of `ForceLogger.scalars` go out with the trainer's own: into `trainer.state.log_history`, and to
TensorBoard, W&B, MLflow, or whatever `report_to` names.

A trainer calls its reporters before the callbacks that a user gives, and tells no callback of an error. So this
module wraps `Trainer.train`: it puts a ForceCallback in front of the reporters, and closes its log when the
training ends with an exception. Trainers without these callbacks are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightdyn.core.checks import check_path
from weightdyn.core.tables import By
from weightdyn.integrations.recording import Recording, Rescaling, is_logged_here
from weightdyn.record.logger import ForceLogger
from weightdyn.wisca.schedule import RescaleSchedule

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback
except ImportError as error:
    raise ImportError(
        f"weightdyn.integrations.transformers needs transformers and accelerate ({error}): "
        'pip install "transformers[torch]"'
    ) from error


class ForceCallback(TrainerCallback):
    """Log the forces of a Trainer's optimizer, and report them where the trainer reports its loss.

        trainer = Trainer(..., callbacks=[ForceCallback(every=10)])

    At each of the trainer's logging steps behind a newly logged update, the scalars of that update are added to the
    trainer's own logs (`ForceLogger.scalars` says what they are). What the trainer logs, loss, grad_norm and
    learning_rate, the evaluations, is recorded in the run: `RunLog.metrics()`.

    Args:
        out: run directory. Default: `weightdyn` in the trainer's `output_dir`.
        by: groups of the reported scalars: "role", "component", "layer", "model", a list of such, None for tensors.
        options: of `ForceLogger`: every, tensors, views, weibull_every, drift, …

    Raises:
        TypeError, ValueError: an option is none of `ForceLogger`'s, or `by` none of those; and when the training
            begins, what `ForceLogger` raises.

    A training that resumes goes on in the same run: at the update that the optimizer's state counts, or at the
    trainer's `global_step` where the checkpoint was saved without it (`save_only_model`).
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        by: By | Sequence[str] | None = "role",
        **options: Any,
    ):
        self._out = (
            None if out is None else check_path("out", out, "a directory's path, or None for output_dir")
        )
        self._recording = Recording(by, options)

    @property
    def logger(self) -> ForceLogger | None:
        """The logger of the present training or of the last one; `logger.run` reads what it holds.

        None before the training, and in other processes than the first where these make the same updates.
        """
        return self._recording.logger

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Attach the logger; a resumed optimizer has its state by now."""
        if is_logged_here(state.is_world_process_zero, [optimizer]):
            out = self._out or Path(args.output_dir or ".") / "weightdyn"
            self._recording.begin([optimizer], model, out, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Record the trainer's numbers, and add those of the forces to them."""
        self._recording.record(logs)
        if "loss" in logs:  # of the training: not an evaluation, nor the summary at the end
            scalars = self._recording.news()
            logs.update(scalars)
            if state.log_history:
                state.log_history[-1].update(scalars)  # where the trainer has put a copy of them

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the log before a checkpoint is written."""
        if control.should_save:
            self._recording.flush()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the log beside a checkpoint that was asked for in another way."""
        self._recording.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the log."""
        self._recording.end()


class RescaleCallback(TrainerCallback):
    """Call `weightdyn.wisca.rescale_` while a Trainer trains: a `RescaleSchedule` on its optimizer.

        forces = ForceCallback(every=10)
        trainer = Trainer(..., callbacks=[forces, RescaleCallback(every=250, forces=forces)])

    Args:
        at: updates after which to rescale; 0 is before the first.
        every: rescale after every n-th update as well (WISCA: 250).
        forces: write each rescaling into the log of this callback, which must stand before this one.
        options: of `rescale_`: pairs, norm, granularity, moments, …

    Raises:
        ValueError, TypeError: when the training begins, what `RescaleSchedule` raises.

    Every process rescales its own copy of the weights, all by the same factors. A training that resumes goes on in
    the schedule where it was.
    """

    def __init__(
        self,
        *,
        at: Iterable[int] = (),
        every: int | None = None,
        forces: ForceCallback | None = None,
        **options: Any,
    ):
        self._forces = forces
        self._rescaling = Rescaling({"at": at, "every": every, **options})

    @property
    def schedule(self) -> RescaleSchedule | None:
        """The schedule of the present training or of the last one; `schedule.events` is what was done."""
        return self._rescaling.schedule

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Attach the schedule at the update where the training is."""
        forces = None if self._forces is None else self._forces._recording
        self._rescaling.begin([optimizer], model, forces, state.global_step, state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the schedule off the optimizer."""
        self._rescaling.end()


def _turn(callback: TrainerCallback) -> int:
    """First what tells when a checkpoint is due, and what is short, for eyes; then the forces, then reporters."""
    if isinstance(callback, (DefaultFlowCallback, ProgressCallback, PrinterCallback)):
        return 0
    return 1 if isinstance(callback, ForceCallback) else 2


def _wrapped(train: Any) -> Any:
    @functools.wraps(train)
    def train_with_forces(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        if any(isinstance(callback, ForceCallback) for callback in callbacks):
            callbacks.sort(key=_turn)
        try:
            return train(self, *args, **kwargs)
        except BaseException as error:
            for callback in callbacks:
                if isinstance(callback, ForceCallback):
                    callback._recording.end(error)
                elif isinstance(callback, RescaleCallback):
                    callback._rescaling.end()
            raise

    return train_with_forces


Trainer.train = _wrapped(Trainer.train)
