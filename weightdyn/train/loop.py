"""The one training loop, and the state that a run continues from.

The reference trainer and WISCA's paired runs are this loop with different arguments: what the learning rates are,
how a loss is made, whether and how gradients are clipped. What happens behind an update (a save, a bar) is the body
of the caller's `for`, and what else acts on an update hangs on the optimizer, as `ForceLogger` does.

A saved state is a file of `torch.save`, read without running what it may contain, and checked against the model
before anything of it is used.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightdyn.files.durable import write_file
from weightdyn.record.logger import ForceLogger
from weightdyn.record.optimizers import rng_state, set_rng_state
from weightdyn.record.runlog import RunLogError

_STATE = {"step": int, "model": Mapping, "optimizer": Mapping, "rng": Mapping}


def make_updates(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    logger: ForceLogger,
    updates: range,
    *,
    rates: Callable[[int], Sequence[float]],
    loss: Callable[[int], Tensor],
    clip: Callable[[], Tensor] | None = None,
    evaluate: Callable[[], float] | None = None,
    eval_every: int = 1,
    extra: Callable[[int], Mapping[str, Any]] | None = None,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Train: yield each update's number and what was recorded of it, once it is made and recorded.

    Args:
        model: what is trained; `evaluate` sees it in evaluation mode.
        optimizer: its optimizer, with the logger's hooks on it.
        logger: where `loss`, `grad_norm` (before clipping), `eval_loss` and `extra` are recorded.
        updates: the numbers of the updates, 1-based, with a step of 1.
        rates: the learning rate of each of the optimizer's groups at an update.
        loss: the loss of an update's batch, with its graph.
        clip: clip the gradients that are there, and return their norm before. Default: no clipping.
        evaluate: the held-out loss; called behind every `eval_every`-th update and the last.
        eval_every: see `evaluate`.
        extra: more to record of an update.
    """
    for update in updates:
        for group, lr in zip(optimizer.param_groups, rates(update), strict=True):
            group["lr"] = lr
        value = loss(update)
        value.backward()
        metrics: dict[str, Any] = {"loss": value.detach(), **(extra(update) if extra else {})}
        if clip is not None:
            metrics["grad_norm"] = clip()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate is not None and (update % eval_every == 0 or update == updates[-1]):
            metrics["eval_loss"] = evaluated(model, evaluate)
        logger.record(update, **metrics)
        yield update, metrics


@torch.no_grad()
def evaluated(model: nn.Module, evaluate: Callable[[], float]) -> float:
    """What `evaluate` gives with the model in evaluation mode and without gradients."""
    model.eval()
    value = float(evaluate())
    model.train()
    return value


# --- what a run continues from ------------------------------------------------------------------------------


def save_state(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Store what a run continues from behind update `step`: weights, optimizer, random numbers."""
    device = next(model.parameters()).device
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(device),
    }
    write_file(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path, steps: int) -> dict[str, Any] | None:
    """Read what `save_state` wrote, on the CPU; None if there is no such file.

    Args:
        path: the file.
        steps: updates of the whole run.

    Raises:
        RunLogError: the file is damaged, or no such state.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise _damaged(path, "it is no regular file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise _damaged(path, f"it is cut short, or holds more than tensors and numbers: {reason}") from None
    except Exception as error:  # torch raises errors of many kinds on damaged files
        reason = f"{type(error).__name__}: {error}".partition(". ")[0]
        raise _damaged(path, f"it is cut short or damaged: {reason}") from None
    wrong = [
        name
        for name, kind in _STATE.items()
        if not isinstance(state, dict) or not isinstance(state.get(name), kind)
    ]
    if wrong:
        raise _damaged(path, f"it lacks {', '.join(wrong)}")
    if isinstance(state["step"], bool) or not 0 <= state["step"] <= steps:
        raise _damaged(path, f"it is of update {state['step']}, and the run has {steps}")
    return state


def restore_state(
    path: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Bring model, optimizer and random numbers to what `load_state` read from `path`.

    Raises:
        RunLogError: the state is of another model or optimizer.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]  # it checks that itself
        for parameter, moments in optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"its {name} has the shape {tuple(value.shape)}, and the parameter {tuple(parameter.shape)}"
                    )
        set_rng_state(state["rng"], next(model.parameters()).device)
    except Exception as error:  # as above: torch checks some of it, each in its own way
        reason = " ".join(str(error).split())
        raise _damaged(
            path, f"it is of another model or optimizer ({type(error).__name__}: {reason})"
        ) from error


def _damaged(path: Path, reason: str) -> RunLogError:
    return RunLogError(
        f"{path} cannot be continued from: {reason}. Copy it again from where the run was written, or from a "
        f"backup; or delete it, and the run in {path.parent} begins again"
    )
