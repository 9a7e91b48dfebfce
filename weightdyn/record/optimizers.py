"""What an optimizer is: its names, its decay, the updates it has made, what wraps it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# These of torch's optimizers add the decay to the gradient (unless told otherwise), where it becomes part of u.
_COUPLED = ("SGD", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD")


# ---------------------------------------------------------------------------------------------------------------
# What is asked of an optimizer


def check_optimizer(optimizer: Any, source: str) -> None:
    if source not in ("moments", "displacement"):
        raise ValueError(f"source must be 'moments' or 'displacement', got {source!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} around a {type(inner).__name__}: pass the inner one, "
            "optimizer.optimizer, whose steps it makes"
        )
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    own_step = not inspect.unwrap(type(optimizer).step).__module__.startswith("torch.")
    if source == "moments" and (not adam or own_step):
        what = "has a step() of its own" if adam else "does not keep Adam's moments"
        raise TypeError(
            f"optimizer must be torch.optim.AdamW or torch.optim.Adam, got {type(optimizer).__name__}, which "
            f'{what}; source="displacement" logs any optimizer from a copy of the weights'
        )
    coupled = [
        g for g in optimizer.param_groups if g.get("weight_decay", 0) and not is_decoupled(optimizer, g)
    ]
    if coupled:
        warnings.warn(
            f"{type(optimizer).__name__} adds weight_decay={coupled[0]['weight_decay']} to the gradient: it is "
            "part of u, shows as alignment and injection, and the decay column is 0",
            UserWarning,
            stacklevel=4,
        )


def is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    if isinstance(optimizer, torch.optim.AdamW):
        return True
    coupled = any(
        kind.__name__ in _COUPLED and kind.__module__.startswith("torch.") for kind in type(optimizer).mro()
    )
    return bool(group.get("decoupled_weight_decay", not coupled))


def decoupled_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    return float(group.get("weight_decay", 0.0)) if is_decoupled(optimizer, group) else 0.0


def own_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The names that an optimizer keeps if it was made with named parameters."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]


def signature(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def with_gradient(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}


def is_remote(number: float | Tensor) -> bool:
    """Whether a number is on a device that would have to be waited for."""
    return isinstance(number, Tensor) and number.device.type != "cpu"


def updates_made(optimizer: torch.optim.Optimizer, default: int = 0) -> int:
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=default)


def fresh_state(parameter: Tensor) -> dict[str, Any]:
    """Adam's state before a parameter's first update, taking no memory."""
    zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros}


def optimizer_info(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, (tuple, list)):
            return [plain(each) for each in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)

    groups = [
        {name: plain(value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": groups}
