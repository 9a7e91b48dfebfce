"""ForceCallback for Lightning's Trainer, of `lightning` and of `pytorch_lightning`.

    from weightdyn.integrations.lightning import ForceCallback

    trainer = Trainer(..., callbacks=[ForceCallback(every=10, out="runs/mine")])
    trainer.fit(module, data)

The numbers of `ForceLogger.scalars` go out through `LightningModule.log_dict`, at the trainer's own logging steps,
to whatever loggers it has; other callbacks find them in `trainer.callback_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from weightdyn.core.checks import check_path
from weightdyn.core.tables import By
from weightdyn.integrations.recording import Recording, Rescaling, is_logged_here
from weightdyn.record.logger import ForceLogger
from weightdyn.wisca.schedule import RescaleSchedule

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        import lightning.pytorch as pl
    except ImportError:
        try:
            import pytorch_lightning as pl
        except ImportError as error:
            raise ImportError(
                f"weightdyn.integrations.lightning needs lightning or pytorch_lightning ({error}): "
                "pip install lightning"
            ) from error


class ForceCallback(pl.Callback):
    """Log the forces of the optimizers of a LightningModule, and report them to the trainer's loggers.

        trainer = Trainer(..., callbacks=[ForceCallback(every=10)])

    With automatic and manual optimization. At each of the trainer's logging steps (`log_every_n_steps`) behind a
    newly logged update, the scalars of that update go out (`ForceLogger.scalars` says what they are). What the
    module logs is recorded in the run at the same steps, and at the end of a validation: `RunLog.metrics()`.

    Args:
        out: run directory. Default: `weightdyn` in the trainer's `default_root_dir`.
        by: groups of the reported scalars: "role", "component", "layer", "model", a list of such, None for tensors.
        options: of `ForceLogger`: every, tensors, views, weibull_every, drift, … `config` is by default that of
            the one model inside the module that has one.

    Raises:
        TypeError, ValueError: an option is none of `ForceLogger`'s, or `by` none of those; and when the training
            begins, what `ForceLogger` raises.

    A training that resumes (`ckpt_path`) goes on in the same run: at the update that the optimizers' states count,
    or where they do not count at the one that this callback's state in the checkpoint says.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        by: By | Sequence[str] | None = "role",
        **options: Any,
    ):
        self._out = (
            None
            if out is None
            else check_path("out", out, "a directory's path, or None for default_root_dir")
        )
        self._recording = Recording(by, options)
        self._step = 0
        self._of_training: set[str] = set()  # names of metrics

    @property
    def logger(self) -> ForceLogger | None:
        """The logger of the present training or of the last one; `logger.run` reads what it holds.

        None before the training, and in other processes than the first where these make the same updates.
        """
        return self._recording.logger

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the logger; resumed optimizers have their states by now."""
        if is_logged_here(trainer.is_global_zero, trainer.optimizers):
            out = self._out or Path(trainer.default_root_dir) / "weightdyn"
            config = getattr(_inner(pl_module), "config", None)
            self._recording.begin(trainer.optimizers, pl_module, out, self._step, config)
        self._step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the forces where the trainer is about to report its metrics."""
        connector = trainer._logger_connector
        if connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            metrics = connector.metrics["callback"]
            self._of_training |= {*metrics}
            self._recording.record(metrics)
            pl_module.log_dict(self._recording.news(), on_step=True, on_epoch=False, rank_zero_only=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record what the validation logged; of the training's metrics the values there may be old."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._recording.record({name: each for name, each in metrics if name not in self._of_training})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the log."""
        self._recording.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the log with what it has."""
        self._recording.end(exception)

    def state_dict(self) -> dict[str, Any]:
        """Store the log, and return the update at which it is: {"step": updates}."""
        self._recording.flush()
        return {} if self.logger is None else {"step": self.logger.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where to go on, if the optimizers do not count."""
        self._step = state_dict.get("step", 0)


class RescaleCallback(pl.Callback):
    """Call `weightdyn.wisca.rescale_` while a LightningModule trains: a `RescaleSchedule` on its optimizer.

        forces = ForceCallback(every=10)
        trainer = Trainer(..., callbacks=[forces, RescaleCallback(every=250, forces=forces)])

    Args:
        at: updates after which to rescale; 0 is before the first.
        every: rescale after every n-th update as well (WISCA: 250).
        forces: write each rescaling into the log of this callback, which must stand before this one.
        options: of `rescale_`: pairs, norm, granularity, moments, …

    Raises:
        ValueError, TypeError: when the training begins, what `RescaleSchedule` raises; the module has several
            optimizers (call `rescale_` in `training_step` then).

    Every process rescales its own copy of the weights, all by the same factors.
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the schedule at the update where the training is."""
        forces = None if self._forces is None else self._forces._recording
        self._rescaling.begin(
            trainer.optimizers, _inner(pl_module), forces, trainer.global_step, trainer.is_global_zero
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the schedule off the optimizer."""
        self._rescaling.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the schedule off the optimizer."""
        self._rescaling.end()


def _inner(module: nn.Module) -> nn.Module:
    """The one model inside a module that has a configuration, or the module."""
    found = _configured(module)
    return found[0] if len(found) == 1 else module


def _configured(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with a configuration."""
    if getattr(module, "config", None) is not None:
        return [module]
    return [each for child in module.children() for each in _configured(child)]
