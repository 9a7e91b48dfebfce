"""One run of a comparison: a pure function of its seed and arm, stored as a run directory of its own."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.files.durable import write_file
from weightdyn.record.logger import ForceLogger
from weightdyn.record.runlog import RunLog, RunWriter
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


# --- one run ------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """All that runs share."""

    make_model: MakeModel
    make_optimizer: MakeOptimizer
    batches: Batches
    loss: Loss
    schedule: Callable[[int], float] | None
    evaluate: Callable[[nn.Module], float] | None
    settings: dict[str, Any]
    save_every: int


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    inputs = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    return model(**inputs).loss


def train_run(task: Task, arm: Arm, seed: int, place: Path | None) -> Run:
    """Train one model; continue what stands in `place`."""
    steps = task.settings["steps"]
    if place is not None and is_done(place, steps):
        return read_run(place)
    saved = None if place is None else place / _STATE
    state = torch.load(saved, map_location="cpu", weights_only=True) if saved and saved.exists() else None
    done = 0 if state is None else int(state["step"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.make_model(seed).train()
        device = next(model.parameters()).device
        optimizer = task.make_optimizer(model)
        start = _digest(model, optimizer, task.batches(seed, 1))
        rescales, factors = begin_arm(model, optimizer, arm, seed, apply=done == 0)
        base = [group["lr"] for group in optimizer.param_groups]
        torch.manual_seed(seed)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            _set_rng(state["rng"], device)
            rescales = pd.read_parquet(Path(str(place)) / _RESCALES)
            rescales = rescales[rescales["step"] <= done]
        if place is not None:
            info = {"wisca": {"arm": arm.name, "seed": seed, "start": start}}
            with contextlib.closing(RunWriter(place, done, info)) as writer:
                if done == 0:  # what an attempt left that died before its first save is done again
                    writer.restart(0)
                    writer.append("metrics", {"step": 0})
        logger = ForceLogger(
            optimizer,
            model,
            every=task.settings["log_every"],
            weibull_every=task.settings["weibull_every"],
            out=place,
            start_step=done,
        )
        with logger, scheduled(model, optimizer, arm, logger, done) as schedule:
            if done == 0:
                if len(rescales) and arm.kind != "lr_equivalent":
                    logger.record(0, event=EVENT)
                if task.evaluate is not None:
                    logger.record(0, eval_loss=_evaluated(task, model))
            for update in range(done + 1, steps + 1):
                scale = 1.0 if task.schedule is None else task.schedule(update)
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * scale
                loss = task.loss(model, _on(device, task.batches(seed, update)))
                loss.backward()
                metrics: dict[str, Any] = {"loss": loss.detach()}
                if task.settings["clip"] is not None:
                    clip_factors = factors if arm.rescaled_clip else {}
                    metrics["grad_norm"] = clip_gradients(model, task.settings["clip"], clip_factors)
                optimizer.step()
                optimizer.zero_grad()
                if task.evaluate is not None and (
                    update % task.settings["eval_every"] == 0 or update == steps
                ):
                    metrics["eval_loss"] = _evaluated(task, model)
                logger.record(update, **metrics)
                if place is not None and (update % task.save_every == 0 or update == steps):
                    logger.flush()
                    _save(place, update, model, optimizer, joined_events(rescales, schedule))
        rescales = joined_events(rescales, schedule)
        if place is None:
            return Run(logger.run, rescales, start)
        (place / _STATE).unlink()
        return read_run(place)


@torch.no_grad()
def _evaluated(task: Task, model: nn.Module) -> float:
    model.eval()
    value = float(task.evaluate(model)) if task.evaluate is not None else math.nan
    model.train()
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


def is_done(place: Path, steps: int) -> bool:
    """Of a flush the metrics come last, so a run whose last loss is there is there as a whole."""
    if not (place / "run.json").exists() or not (place / _RESCALES).exists() or (place / _STATE).exists():
        return False
    metrics = RunLog(place).metrics()
    return "loss" in metrics and len(metrics) > 0 and int(metrics["step"].iloc[-1]) == steps


def read_run(place: Path) -> Run:
    log = RunLog(place)
    return Run(log, pd.read_parquet(place / _RESCALES), log.info["wisca"]["start"])


def _save(
    place: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rescales: pd.DataFrame
) -> None:
    """What a run continues from. A kill in between leaves the state of before, which is behind the rest."""
    write_file(place / _RESCALES, rescales.to_parquet)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _rng(next(model.parameters()).device),
    }
    write_file(place / _STATE, lambda path: torch.save(state, path))


def _rng(device: torch.device) -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_rng(rng: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)
