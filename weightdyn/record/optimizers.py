"""What an optimizer is: its decay, its state, the updates it has made, its names, what wraps it.

All that the package knows of optimizers stands here, so that nobody else asks for their keys. To add one, add it to
`KNOWN`; of one that is not there `decay` finds out what decays, and its state is its own.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from weightdyn.core.forces import Momentum
from weightdyn.record.moments import Adam
from weightdyn.record.shards import local_of


class Acting(NamedTuple):
    """What acted on one tensor in an update, w ← (1 − ηλ)w − ηu.

    Attributes:
        lr: η; a tensor where it lives on a device, NaN where the optimizer names none.
        weight_decay: λ; NaN where it cannot be told, 0 where it is known to be a part of u.
    """

    lr: float | Tensor
    weight_decay: float


Law = Callable[[torch.optim.Optimizer, Mapping[str, Any], Tensor, Mapping[str, Any]], Acting | str]
"""What acted on a tensor, or why that cannot be told; from the optimizer after the step, the tensor's group, the
tensor, and what was noted of its state before the step."""


@dataclass(frozen=True)
class Known:
    """What is known of the optimizers of one class, and of those that are made from it.

    Attributes:
        decoupled: True if the decay shrinks the weights, w ← (1 − ηλ)w; False if it is added to the gradient, where
            it becomes part of u. An option `decoupled_weight_decay` of the parameters' group goes before.
        adam: whether it keeps Adam's moments and steps by u = m̂/(√v̂ + ε).
        momentum: how u is made of the gradients, from a group, the number of its update and the state of one of its
            parameters after it; None where u is not linear in them, so that they cannot be told from one another.
        normalised: whether u is divided by √v̂ + ε, v̂ from `exp_avg_sq` and β₂.
        law: η and λ of an update; None where they are simply the group's.
        noted: keys of the state before the update that the law needs.
        told: whether the law holds for this optimizer, where that depends on its version or settings.
    """

    decoupled: bool = True
    adam: bool = False
    momentum: Callable[[Mapping[str, Any], float, Mapping[str, Any]], Momentum] | None = None
    normalised: bool = False
    law: Law | None = None
    noted: tuple[str, ...] = ()
    told: Callable[[torch.optim.Optimizer], bool] = lambda optimizer: True


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


def _asgd(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]
) -> Acting:
    """w ← (1 − lambd·η)w − ηg with an η of its own, set at the end of the update before."""
    lr = lr_of(group)
    eta = float(before.get("eta", group["lr"]))
    return Acting(lr, float(group["lambd"]) * eta / float(lr) if lr else 0.0)


def _schedule_free(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]
) -> Acting | str:
    """Weights are y = βx + (1 − β)z, of which λ acts on z at the scheduled rate and through z on the mean x."""
    lr, decay = lr_of(group), float(group["weight_decay"])
    if decay and group.get("decay_at_z"):
        return "with decay_at_z it decays z, which is not w"
    if not decay or not float(lr):
        return Acting(lr, 0.0)
    beta = float(group["betas"][0] if "betas" in group else group["momentum"])
    total = float(group["weight_sum"])
    weight = float(group["k"]) ** float(group["r"]) * float(group["lr_max"]) ** float(
        group["weight_lr_power"]
    )
    newest = weight / total if total else 0.0  # the part of x that is the new z
    rate = float(group["scheduled_lr"]) / float(lr)
    return Acting(lr, decay * rate * (1 - beta * (1 - newest)))


def _schedule_free_closure(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]
) -> Acting | str:
    if group["weight_decay"]:
        return "its weights are x, and it decays y"
    return Acting(lr_of(group), 0.0)


def _lion(
    optimizer: Any, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]
) -> Acting | str:
    decay = float(group["weight_decay"])
    if decay and group.get("cautious_wd"):
        return "with cautious_wd it decays some of the weights"
    return Acting(lr_of(group), decay / float(optimizer._init_lr) if optimizer.decoupled_wd else decay)


def _adafactor(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]
) -> Acting | str:
    """λη·scale, with the rms of the weights before the update; η is the group's or the relative step."""
    state = optimizer.state.get(parameter) or {}
    lr = lr_of(group)
    if group["relative_step"]:
        step = max(state.get("step", 1), 1)
        lr = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
    rms = state.get("RMS", math.nan)
    if hasattr(rms, "to_local"):
        return "its rms of the weights is spread over processes"
    scale = max(group["eps"][1], float(rms)) if group["scale_parameter"] else 1.0
    return Acting(lr, float(group["weight_decay"]) * scale)


def _bits(optimizer: Any, group: Mapping[str, Any], parameter: Tensor, before: Mapping[str, Any]) -> Acting:
    """What its manager says of the parameter goes before the group."""
    own = dict(group)
    if optimizer.mng.pid2config or optimizer.mng.index2config:
        places = (
            (i, j)
            for i, each in enumerate(optimizer.param_groups)
            for j, other in enumerate(each["params"])
            if other is parameter
        )
        own = optimizer.get_config(*next(places), group)
    return Acting(lr_of(own), decoupled_decay(optimizer, own))


def _bits_told(optimizer: Any) -> bool:
    name = optimizer.optimizer_name
    if optimizer.args.skip_zeros:
        return False  # weights without a gradient are not decayed
    if (
        name == "lion"
    ):  # with a state of 32 bits its CUDA kernel adds the decay to the gradient, the others do not
        return all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])
    return name in ("adam", "lamb", "ademamix", "momentum", "lars", "rmsprop", "adagrad")


KNOWN = {
    "torch.AdamW": Known(adam=True, momentum=_adam, normalised=True),
    "torch.Adam": Known(decoupled=False, adam=True, momentum=_adam, normalised=True),
    "torch.NAdam": Known(decoupled=False, momentum=_nadam, normalised=True),
    "torch.SGD": Known(decoupled=False, momentum=_sgd),
    "torch.ASGD": Known(decoupled=False, law=_asgd, noted=("eta",)),
    **dict.fromkeys(
        (f"torch.{name}" for name in ("Adamax", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta")),
        Known(decoupled=False),
    ),
    **dict.fromkeys(("torch.Muon", "torch.Adafactor"), Known()),
    **dict.fromkeys(
        (
            f"schedulefree.{kind}ScheduleFree{variant}"
            for kind in ("AdamW", "RAdam", "SGD")
            for variant in ("", "Paper", "Reference")
        ),
        Known(law=_schedule_free, told=lambda optimizer: "scheduled_lr" in optimizer.defaults),
    ),
    **dict.fromkeys(
        (f"schedulefree.{kind}ScheduleFreeClosure" for kind in ("AdamW", "RAdam", "SGD")),
        Known(law=_schedule_free_closure),
    ),
    "lion_pytorch.Lion": Known(law=_lion),
    "transformers.Adafactor": Known(law=_adafactor),
    # bitsandbytes' Adam decays as its AdamW does.
    "bitsandbytes.Optimizer2State": Known(law=_bits, told=_bits_told),
    "bitsandbytes.Optimizer1State": Known(decoupled=False, law=_bits, told=_bits_told),
    **dict.fromkeys(
        (f"bitsandbytes.{paged}Lion{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")),
        Known(law=_bits, told=_bits_told),
    ),
    "bitsandbytes.PytorchLARS": Known(decoupled=False),
    **dict.fromkeys(
        (f"torchao.{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW")), Known()
    ),
    **dict.fromkeys(
        (f"torchao.{name}" for name in ("Adam8bit", "Adam4bit", "AdamFp8")), Known(decoupled=False)
    ),
}
"""Optimizers by their package and the name of their class; one of the same name elsewhere is another one."""

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


def _entry(optimizer: torch.optim.Optimizer) -> tuple[str, Known]:
    """The package and the entry of the class, or of the nearest one that it is made from."""
    for kind in type(optimizer).mro():
        package = _package(kind.__module__)
        if f"{package}.{kind.__name__}" in KNOWN:
            return package, KNOWN[f"{package}.{kind.__name__}"]
    return "", Known()


def known(optimizer: torch.optim.Optimizer) -> Known:
    """The entry of the class, or of the nearest one that it is made from."""
    return _entry(optimizer)[1]


def _package(module: str) -> str:
    return module.partition(".")[0]


# --- what is asked of one ------------------------------------------------------------------------------------


def check_optimizer(optimizer: Any, accepted: str = "a torch.optim.Optimizer") -> torch.optim.Optimizer:
    """Return an optimizer that makes its steps itself.

    Raises:
        TypeError: it is none, or a wrapper whose steps an inner one makes.
    """
    _refuse_wrapper(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        inside = _inside(optimizer)
        if inside is None:
            return optimizer
        name, inner = inside
        kind = " and ".join(sorted({type(each).__name__ for each in _flat(inner)}))
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} around a {kind}: pass the inner one, "
            f"optimizer.{name}, whose steps it makes"
        )
    raise TypeError(f"optimizer must be {accepted}, got {type(optimizer).__name__}{_hint(optimizer)}")


def _hint(wrong: Any) -> str:
    """What to do with something else that trains."""
    if wrong is None:
        return ": attach behind the line that makes it (a Trainer makes its own: use its ForceCallback)"
    package = type(wrong).__module__.partition(".")[0]
    if hasattr(wrong, "prepare_model") and package == "accelerate":
        return ": pass the optimizer that its prepare() returned"
    if hasattr(wrong, "callbacks") or hasattr(wrong, "callback_handler"):
        return (
            ": give it callbacks=[ForceCallback(…)], from weightdyn.integrations.transformers or .lightning"
        )
    if isinstance(wrong, torch.nn.Module):
        return ": the optimizer comes first, then the model"
    if isinstance(getattr(wrong, "optimizer", None), torch.optim.Optimizer):
        return ": pass its .optimizer"
    if isinstance(wrong, Mapping):
        return ": pass its values()"
    return ""


_INSIDE = ("optimizers", "optimizer", "optim")
"""Attributes by which a wrapper knows the optimizers that make its steps: torchtitan's container; Accelerate's,
Lightning's and others' wrappers; torch's ZeroRedundancyOptimizer and fairscale's OSS."""

_STEPS_Z = "its inner one steps z and not the weights; schedulefree's AdamW, RAdam and SGD can be logged"
_NO_INSIDE = {
    "schedulefree.ScheduleFreeWrapper": _STEPS_Z,
    "schedulefree.ScheduleFreeWrapperReference": _STEPS_Z,
    "torchao.CPUOffloadOptimizer": "its inner ones step copies of the weights on the host; pass those, "
    "[*optimizer.optim_dict.values(), optimizer.d_opt] (d_opt may be None), and the names of the copies by "
    "params=[(name, optimizer.param_d2h_map.get(p, p)) for name, p in model.named_parameters()]",
}
"""Wrappers whose inner optimizers do not step the weights of the model, and what can be done."""


def unwrap(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that make the steps: of an optimizer, of a wrapper of some, or of a list of these.

    A wrapper is known by its attribute `optimizer`, `optimizers` or `optim` (`_INSIDE`).

    Raises:
        TypeError: something is none of these, or wraps optimizers that do not step the weights.
        ValueError: there is none, or one twice.

    >>> model = torch.nn.Linear(2, 2)
    >>> both = [torch.optim.SGD([model.weight]), (torch.optim.Adam([model.bias]),)]
    >>> [type(each).__name__ for each in unwrap(both)]
    ['SGD', 'Adam']
    """
    found = [_innermost(each) for each in _flat(optimizer)]
    optimizers = [each for inner in found for each in inner]
    if not optimizers:
        raise ValueError("optimizer must be a torch.optim.Optimizer or several, got none")
    twice = {
        type(each).__name__ for i, each in enumerate(optimizers) if any(each is o for o in optimizers[:i])
    }
    if twice:
        raise ValueError(f"optimizer: a {', '.join(sorted(twice))} is there twice")
    return optimizers


def _flat(optimizers: Any) -> Iterator[Any]:
    if isinstance(optimizers, list | tuple | ValuesView):
        for each in optimizers:
            yield from _flat(each)
    else:
        yield optimizers


def _innermost(optimizer: Any) -> list[torch.optim.Optimizer]:
    seen: list[Any] = []
    waiting, found = [optimizer], []
    while waiting:
        each = waiting.pop(0)
        if any(each is other for other in seen):
            continue
        seen.append(each)
        inside = _inside(each)
        if inside is not None:
            waiting = [*_flat(inside[1]), *waiting]
        else:
            found.append(check_optimizer(each, "a torch.optim.Optimizer, a wrapper of one, or several"))
    return found


def _inside(optimizer: Any) -> tuple[str, Any] | None:
    """The attribute that holds the optimizers that make the steps of a wrapper, and what it holds."""
    if all(callable(getattr(optimizer, name, None)) for name in ("step", "zero_grad")):
        for name in _INSIDE:
            inner = getattr(optimizer, name, None)
            each = [*_flat(inner)]
            if each and all(isinstance(one, torch.optim.Optimizer) or _inside(one) for one in each):
                return name, inner
    return None


def _refuse_wrapper(optimizer: Any) -> None:
    kind = type(optimizer)
    why = _NO_INSIDE.get(f"{_package(kind.__module__)}.{kind.__name__}")
    if why is not None:
        raise TypeError(f"optimizer is a {kind.__name__}, which cannot be logged: {why}")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise a TypeError if the forces of this optimizer cannot be read from its state."""
    if source_of(optimizer) != "moments":
        adam = known(optimizer).adam
        what = "has a step() of its own" if adam else "does not keep Adam's moments"
        raise TypeError(
            f"optimizer must be torch.optim.AdamW or torch.optim.Adam, got {type(optimizer).__name__}, which "
            f'{what}; source="displacement" logs any optimizer from a copy of the weights'
        )


def source_of(optimizer: torch.optim.Optimizer) -> Literal["moments", "displacement"]:
    """Where the forces of an optimizer are read: in Adam's moments where it keeps them and steps by them alone."""
    return "moments" if known(optimizer).adam and not own_step(optimizer) else "displacement"


def own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class has a step() of its own, which may do other things than that of the one it is made from."""
    return _package(inspect.unwrap(type(optimizer).step).__module__) != _entry(optimizer)[0]


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
        kind = next(kind for kind in type(optimizer).mro() if _package(kind.__module__) == "torch")
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


def lr_of(group: Mapping[str, Any]) -> float | Tensor:
    """η as a group names it: a tensor where it lives on a device, NaN where it names none."""
    lr = group.get("lr")
    return math.nan if lr is None else lr if is_remote(lr) else float(lr)


def law_of(optimizer: torch.optim.Optimizer) -> Known | None:
    """The entry whose decay law holds for an optimizer; None where it has to be asked."""
    entry = known(optimizer)
    return None if own_step(optimizer) or not entry.told(optimizer) else entry


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the group's λ shrinks the weights; of a step that is not known it is not said that it does not."""
    return own_step(optimizer) or bool(group.get("decoupled_weight_decay", known(optimizer).decoupled))


def decoupled_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """λ that the group names, where it shrinks the weights, else 0. What acts of it, `Decay` tells."""
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
    names = AdamState._fields if group.get("amsgrad") else AdamState._fields[:2]
    if any(name not in state for name in names):
        local = local_of(parameter)
        zeros = torch.zeros((), dtype=local.dtype, device=local.device).expand(local.shape)
        state = {**dict.fromkeys(names, zeros), **state}
    return AdamState(
        state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if len(names) > 2 else None
    )


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


def step_frame() -> FrameType | None:
    """The innermost call of torch's wrapper around a step() on this thread: in a hook of a step, that step's.

    A step() that calls that of its class is two such calls, one in the other; a step that raised has left its own.
    None where there is none, as in a step that was compiled.
    """
    file = torch.optim.Optimizer.profile_hook_step.__code__.co_filename
    return next((frame for frame in _frames() if frame.f_code.co_filename == file), None)


def is_running(frame: FrameType | None) -> bool:
    """Whether a call is still being made on this thread."""
    return frame is not None and any(each is frame for each in _frames())


def _frames() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def skipped(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], before: Sequence[float | Tensor]
) -> bool | Tensor:
    """Whether a step made no update, as its state tells: it counts the updates of these, and no count has grown.

    Args:
        optimizer: after the step.
        parameters: those that had a gradient in it.
        before: their `update_counts` before it.

    Returns:
        False where the state keeps no count `step`; a tensor where the counts live on a device.
    """
    counted = [i for i, p in enumerate(parameters) if "step" in optimizer.state.get(p, ())]
    if not counted:
        return False
    after = update_counts(optimizer, [parameters[i] for i in counted])
    grown = [
        (now > before[i]) | (now >= COUNT_STOPS)  # a tensor where one of them is
        for i, now in zip(counted, after, strict=True)
    ]
    if any(each is True for each in grown):
        return False
    remote = [each.reshape(()) for each in grown if isinstance(each, Tensor)]
    return ~torch.stack(remote).any() if remote else True


# --- names, gradients, description ---------------------------------------------------------------------------


def own_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The names that an optimizer keeps if it was made with named parameters."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]


def signature(optimizer: torch.optim.Optimizer) -> list[list[tuple[int, ...]]]:
    """Which parameters are in which group, and their shapes: two that are equal are of the same groups."""
    return [[(id(p), *p.shape) for p in group["params"]] for group in optimizer.param_groups]


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
