"""What an optimizer is: its decay, its state, the updates it has made, its names, what wraps it.

All that the package knows of optimizers stands here, so that nobody else asks for their keys. To add one, add it to
`KNOWN`; one that is not there is taken for an optimizer with decoupled decay and a state of its own.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightdyn.core.forces import Momentum
from weightdyn.record.moments import Adam
from weightdyn.record.shards import local_of


@dataclass(frozen=True)
class Known:
    """What is known of the optimizers of one class, and of those that are made from it.

    Attributes:
        package: where the class lives; one of the same name elsewhere is another one.
        decoupled: True if the decay shrinks the weights, w ← (1 − ηλ)w; False if it is added to the gradient, where
            it becomes part of u. An option `decoupled_weight_decay` of the parameters' group goes before.
        adam: whether it keeps Adam's moments and steps by u = m̂/(√v̂ + ε).
        momentum: how u is made of the gradients, from a group, the number of its update and the state of one of its
            parameters after it; None where u is not linear in them, so that they cannot be told from one another.
        normalised: whether u is divided by √v̂ + ε, v̂ from `exp_avg_sq` and β₂.
    """

    package: str = ""
    decoupled: bool = True
    adam: bool = False
    momentum: Callable[[Mapping[str, Any], float, Mapping[str, Any]], Momentum] | None = None
    normalised: bool = False


def _adam(group: Mapping[str, Any], step: float, state: Mapping[str, Any]) -> Momentum:
    return Momentum.adam(float(group["betas"][0]), step)


def _nadam(group: Mapping[str, Any], step: float, state: Mapping[str, Any]) -> Momentum:
    beta1, decay, product = float(group["betas"][0]), group["momentum_decay"], state["mu_product"]
    product = product if is_remote(product) else float(product)
    now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    return Momentum(beta1, 1 - beta1, then / (1 - product * then), (1 - now) / (1 - product))


def _sgd(group: Mapping[str, Any], step: float, state: Mapping[str, Any]) -> Momentum:
    beta = float(group["momentum"])
    taken = 1 - float(group["dampening"]) if beta and step > 1 else 1.0
    return Momentum(beta, taken, beta, 1.0) if group["nesterov"] else Momentum(beta, taken, 1.0, 0.0)


KNOWN = {
    "AdamW": Known("torch", adam=True, momentum=_adam, normalised=True),
    "Adam": Known("torch", decoupled=False, adam=True, momentum=_adam, normalised=True),
    "NAdam": Known("torch", decoupled=False, momentum=_nadam, normalised=True),
    "SGD": Known("torch", decoupled=False, momentum=_sgd),
    **dict.fromkeys(
        ("Adamax", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
        Known("torch", decoupled=False),
    ),
}
"""Optimizers by the name of their class."""

STATE_POWERS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "square_avg": 2,
    "sum": 2,
    "master_param": -1,
    "master_weights": -1,
    "master_weight": -1,
    "compensation": -1,
    "kahan_comp": -1,
}
"""What optimizers keep of a tensor, by the power of the gradient's scale that it has; weights have −1."""

MASTERS = ("main_param", "master_param")
"""Attributes by which a parameter knows its fp32 copy."""

COUNT_STOPS = 1 << 24
"""Updates at which a count in float32, as torch keeps it, no longer grows: 2²⁴ + 1 is rounded back to 2²⁴."""


def known(optimizer: torch.optim.Optimizer) -> Known:
    """The entry of the class, or of the nearest one that it is made from."""
    for kind in type(optimizer).mro():
        entry = KNOWN.get(kind.__name__)
        if entry is not None and _within(kind.__module__, entry.package):
            return entry
    return Known()


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


# --- what is asked of one ------------------------------------------------------------------------------------


def check_optimizer(optimizer: Any, accepted: str = "a torch.optim.Optimizer") -> torch.optim.Optimizer:
    """Return an optimizer that makes its steps itself.

    Raises:
        TypeError: it is none, or a wrapper whose steps an inner one makes.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be {accepted}, got {type(optimizer).__name__}")
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} around a {type(inner).__name__}: pass the inner one, "
            "optimizer.optimizer, whose steps it makes"
        )
    return optimizer


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise a TypeError if the forces of this optimizer cannot be read from its state."""
    entry = known(optimizer)
    if not entry.adam or own_step(optimizer):
        what = "has a step() of its own" if entry.adam else "does not keep Adam's moments"
        raise TypeError(
            f"optimizer must be torch.optim.AdamW or torch.optim.Adam, got {type(optimizer).__name__}, which "
            f'{what}; source="displacement" logs any optimizer from a copy of the weights'
        )


def own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class has a step() of its own, which may do other things than that of the one it is made from."""
    entry = known(optimizer)
    return not _within(inspect.unwrap(type(optimizer).step).__module__, entry.package)


def momentum_of(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], step: float, state: Mapping[str, Any]
) -> Momentum | None:
    """How update `step` of a group was made of its gradients; `state` is that of one of its parameters, after it.

    None where that cannot be told without waiting for a device. Only for optimizers that `why_no_drift` lets pass.
    """
    momentum = known(optimizer).momentum
    if momentum is None or any(map(is_remote, group.get("betas", ()))):
        return None
    return momentum(group, step, state)


def momentum_age(optimizer: torch.optim.Optimizer, parameter: Tensor, uncounted: float) -> float:
    """Updates that a parameter's momentum has had; `uncounted` where there were some and the state counts none."""
    state = optimizer.state.get(parameter)
    return float(state.get("step", uncounted)) if state else 0.0


def why_no_drift(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the drift of this optimizer cannot be told, or None if it can."""
    kind = type(optimizer).__name__
    if known(optimizer).momentum is None:
        return (
            f"{kind} is not known to make u a linear function of its gradients, so that there is no fresh one to "
            "tell from the memory of others"
        )
    return f"{kind} has a step() of its own" if own_step(optimizer) else None


def is_normalised(optimizer: torch.optim.Optimizer) -> bool:
    """Whether u is divided by √v̂ + ε, with v in `exp_avg_sq`."""
    return known(optimizer).normalised


def grad_factor(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], after: bool) -> float | Tensor:
    """What a gradient acts by: −1 to maximize, and 1/scale where a fused step unscales.

    After the step the gradient may have been unscaled in its place; whether this optimizer does that is found out
    by a step of its twin, once for each device and class.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return sign
    if after:
        # Those whose drift is told have the step() of torch's class, and maybe an __init__ of their own.
        kind = next(kind for kind in type(optimizer).mro() if _within(kind.__module__, "torch"))
        scale = scale ** _left_scaled(kind, scale.device)
    return sign / scale


@functools.lru_cache
def _left_scaled(kind: type[torch.optim.Optimizer], device: torch.device) -> Tensor:
    """1 if a fused step leaves the gradient scaled, 0 if it unscales it in its place; on the device."""
    parameter = torch.zeros(1, device=device, requires_grad=True)
    parameter.grad = torch.full_like(parameter, 4.0)
    twin: Any = kind([parameter], fused=True)  # type: ignore[call-arg]
    twin.grad_scale, twin.found_inf = (torch.full((), value, device=device) for value in (4.0, 0.0))
    with torch.enable_grad():
        twin.step()
    return (parameter.grad > 2).double().squeeze()


# --- decay ---------------------------------------------------------------------------------------------------


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", known(optimizer).decoupled))


def decoupled_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """λ of the group where it shrinks the weights, else 0."""
    return float(group.get("weight_decay", 0.0)) if _is_decoupled(optimizer, group) else 0.0


def coupled_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """λ of the group where λw is added to the gradient, else 0."""
    return 0.0 if _is_decoupled(optimizer, group) else float(group.get("weight_decay", 0.0))


def warn_of_coupled_decay(optimizer: torch.optim.Optimizer) -> None:
    """Say that a decay which is added to the gradient shows in no column of its own."""
    decay = max((coupled_decay(optimizer, group) for group in optimizer.param_groups), default=0.0)
    if decay:
        warnings.warn(
            f"{type(optimizer).__name__} adds weight_decay={decay} to the gradient: it is "
            "part of u, shows as alignment and injection, and the decay column is 0",
            UserWarning,
            stacklevel=3,
        )


# --- state ---------------------------------------------------------------------------------------------------


class AdamState(NamedTuple):
    """Adam's moments of one tensor: m, v, and with amsgrad the maximum of v that the update divides by."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


def adam_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> AdamState:
    """The moments of a parameter; zeros that take no memory before its first update."""
    state = optimizer.state.get(parameter) or {}
    local = local_of(parameter)
    zeros = torch.zeros((), dtype=local.dtype, device=local.device).expand(local.shape)
    first, second = (state.get(key, zeros) for key in ("exp_avg", "exp_avg_sq"))
    return AdamState(first, second, state.get("max_exp_avg_sq", zeros) if group.get("amsgrad") else None)


def adam_constants(group: Mapping[str, Any], count: float | Tensor) -> Adam:
    """β₁, β₂, ε of a group, and the count t of the update."""
    return Adam(group["betas"][0], group["betas"][1], group["eps"], count)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of Adam's moments of a parameter, by their keys."""
    state = optimizer.state.get(parameter, {})
    return {key: state[key] for key in AdamState._fields if key in state}


# --- updates made --------------------------------------------------------------------------------------------


def is_remote(number: float | Tensor) -> bool:
    """Whether a number is on a device that would have to be waited for."""
    return isinstance(number, Tensor) and number.device.type != "cpu"


def updates_made(optimizer: torch.optim.Optimizer, default: int = 0) -> int:
    """Updates that the optimizer has made, by its state; `default` where that does not tell.

    A count that has stopped (`COUNT_STOPS`) tells only that there were as many at least.
    """
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    made = max(counts, default=default)
    return max(made, default) if count_stopped(optimizer) else made


def count_stopped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the state counts in float32 and has come to where that ends."""
    counts = (state.get("step") for state in optimizer.state.values())
    return any(
        isinstance(count, Tensor) and count.dtype == torch.float32 and float(count) >= COUNT_STOPS
        for count in counts
    )


def update_counts(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> list[float | Tensor]:
    """Updates that each parameter has had: a number, or a copy of the counter where it lives on a device."""
    steps = [optimizer.state.get(parameter, {}).get("step", 0.0) for parameter in parameters]
    if all(isinstance(step, Tensor) and not is_remote(step) for step in steps):
        return torch.stack(steps).tolist()
    return [step.clone() if is_remote(step) else float(step) for step in steps]


# --- names, gradients, description ---------------------------------------------------------------------------


def own_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The names that an optimizer keeps if it was made with named parameters."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]


def signature(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Which parameters are in which group: two that are equal are of the same groups."""
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def with_gradient(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """The parameters that have a gradient now."""
    return {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}


def optimizer_info(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Name and settings of an optimizer in what JSON can hold, for run.json."""

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


# --- random state --------------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random numbers on the CPU and, where it is another one, on `device`: a checkpoint's part."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers of `rng_state`; a GPU that they do not know keeps its own."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
