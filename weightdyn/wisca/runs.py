"""One run of a comparison: a pure function of its seed and arm, stored as a run directory of its own.

Whoever has the seed can make the run again, so what a killed run left is either continued from its last save or
made anew, and a run at its end is only read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor, nn

from weightdyn.files.parquet import read_parquet, write_parquet
from weightdyn.record.logger import ForceLogger
from weightdyn.record.runlog import RunLog, RunLogError, RunWriter
from weightdyn.train.loop import evaluated, load_state, make_updates, restore_state, save_state
from weightdyn.wisca.arms import Arm, begin_arm, clip_gradients, joined_events, scheduled
from weightdyn.wisca.schedule import EVENT

_STATE, _RESCALES = "state.pt", "rescales.parquet"

MakeModel = Callable[[int], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Batches = Callable[[int, int], Any]
Loss = Callable[[nn.Module, Any], Tensor]


class Run(NamedTuple):
    """One run of a comparison.

    Attributes:
        log: its forces, Weibull fits and metrics.
        rescales: the tables of `rescale_`, with `step`, the updates made before each; of `lr_equivalent` the
            rescaling that it stands for.
        start: digest of its initial weights, its first batch and its optimizer's settings.
    """

    log: RunLog
    rescales: pd.DataFrame
    start: str


class Task(NamedTuple):
    """All that the runs of a comparison share: the arguments of `compare`, checked."""

    make_model: MakeModel
    make_optimizer: MakeOptimizer
    batches: Batches
    loss: Loss
    schedule: Callable[[int], float] | None
    evaluate: Callable[[nn.Module], float] | None
    settings: dict[str, Any]
    save_every: int


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a transformers model, of its arguments or of token ids, which are labels at once."""
    inputs = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    return model(**inputs).loss


def train_run(task: Task, arm: Arm, seed: int, place: Path | None) -> Run:
    """Train one model; continue what stands in `place`."""
    settings = task.settings
    steps = settings["steps"]
    if place is not None and is_done(place, steps):
        return read_run(place)
    saved = None if place is None else place / _STATE
    state = None if saved is None else load_state(saved, steps)
    done = 0 if state is None else int(state["step"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made("make_model", task.make_model(seed), nn.Module).train()
        optimizer = _made("make_optimizer", task.make_optimizer(model), torch.optim.Optimizer)
        device = next(model.parameters()).device
        start = _digest(model, optimizer, task.batches(seed, 1))
        rescales, factors = begin_arm(model, optimizer, arm, seed, apply=done == 0)
        base = [group["lr"] for group in optimizer.param_groups]
        torch.manual_seed(seed)
        if state is not None and saved is not None:
            restore_state(saved, state, model, optimizer)
            rescales = _read_rescales(saved.with_name(_RESCALES))
            rescales = rescales[rescales["step"] <= done]
        if place is not None:
            info = {"wisca": {"arm": arm.name, "seed": seed, "start": start}}
            with contextlib.closing(RunWriter(place, done, info)) as writer:
                if done == 0:  # what an attempt left that died before its first save is done again
                    writer.restart(0)
                    writer.append("metrics", {"step": 0})

        def loss(update: int) -> Tensor:
            return task.loss(model, _on(device, task.batches(seed, update)))

        def rates(update: int) -> list[float]:
            scale = 1.0 if task.schedule is None else task.schedule(update)
            return [lr * scale for lr in base]

        evaluate = None if task.evaluate is None else partial(task.evaluate, model)
        clip = None
        if settings["clip"] is not None:
            clip = partial(clip_gradients, model, settings["clip"], factors if arm.rescaled_clip else {})
        logger = ForceLogger(
            optimizer,
            model,
            every=settings["log_every"],
            weibull_every=settings["weibull_every"],
            out=place,
            start_step=done,
        )
        with logger, scheduled(model, optimizer, arm, logger, done) as schedule:
            if done == 0:
                if len(rescales) and arm.kind != "lr_equivalent":
                    logger.record(0, event=EVENT)
                if evaluate is not None:
                    logger.record(0, eval_loss=evaluated(model, evaluate))
            for update, _ in make_updates(
                model,
                optimizer,
                logger,
                range(done + 1, steps + 1),
                rates=rates,
                loss=loss,
                clip=clip,
                evaluate=evaluate,
                eval_every=settings["eval_every"] or steps,
            ):
                if saved is not None and (update % task.save_every == 0 or update == steps):
                    # A kill in between leaves the state of before, which is behind the rest.
                    logger.flush()
                    _write_rescales(saved.with_name(_RESCALES), joined_events(rescales, schedule))
                    save_state(saved, update, model, optimizer)
        if place is None or saved is None:
            return Run(logger.run, joined_events(rescales, schedule), start)
        saved.unlink()
        return read_run(place)


def _made(argument: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must return a {kind.__name__}, got {type(value).__name__}")
    return value


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(device, value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_on(device, value) for value in batch]
    return batch


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        return [("", batch)]
    items = (
        batch.items()
        if isinstance(batch, Mapping)
        else enumerate(batch)
        if isinstance(batch, list | tuple)
        else ()
    )
    return [(f"{name}.{rest}", tensor) for name, value in items for rest, tensor in _tensors(value)]


def _digest(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *_tensors(batch)]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for group in optimizer.param_groups:
        digest.update(repr([(name, value) for name, value in group.items() if name != "params"]).encode())
    return digest.hexdigest()


# --- what a run keeps beside its log ------------------------------------------------------------------------


def is_done(place: Path, steps: int) -> bool:
    """Of a flush the metrics come last, so a run whose last loss is there is there as a whole."""
    if not (place / "run.json").exists() or not (place / _RESCALES).exists() or (place / _STATE).exists():
        return False
    metrics = RunLog(place).metrics()
    return "loss" in metrics and len(metrics) > 0 and int(metrics["step"].iloc[-1]) == steps


def read_run(place: Path) -> Run:
    """Read a run at its end.

    Raises:
        RunLogError: a file of it is damaged, or no part of such a run.
    """
    log = RunLog(place)
    section = log.info.get("wisca")
    start = section.get("start") if isinstance(section, dict) else None
    if not isinstance(start, str):
        raise RunLogError(
            f"{place / 'run.json'} is of no run of a comparison (it lacks the section 'wisca' with a start): "
            f"{_remedy(place)}"
        )
    return Run(log, _read_rescales(place / _RESCALES), start)


def _write_rescales(path: Path, rescales: pd.DataFrame) -> None:
    write_parquet(path, pa.Table.from_pandas(rescales, preserve_index=False))


def _read_rescales(path: Path) -> pd.DataFrame:
    try:
        table = read_parquet(path).to_pandas()
    except (ValueError, FileNotFoundError) as error:
        raise RunLogError(f"{error}. {_remedy(path.parent)}") from None
    whole = "step" in table and pd.api.types.is_integer_dtype(table["step"])
    if not whole or not (table.empty or {"pair", "module", "alpha"} <= set(table)):
        columns = dict(table.dtypes.astype(str))
        raise RunLogError(
            f"{path} is no table of rescalings, by its columns {columns}. {_remedy(path.parent)}"
        )
    return table


def _remedy(place: Path) -> str:
    return f"Copy it from a backup; or delete {place}, and compare makes the run again"
