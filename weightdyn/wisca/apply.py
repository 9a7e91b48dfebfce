"""Rescale pairs in place, with the optimizer's moments, and undo it.

If w becomes f·w and the output stays, gradients become g/f. So with the moments transported, m/f and v/f², the
update u = m̂/(√v̂+ε) is that of before, of weights that are f times as large. Nothing is touched before everything
was found possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.core.progress import Progress, progress_bar
from weightdyn.record.optimizers import MASTERS, STATE_POWERS, check_optimizer
from weightdyn.wisca.pairs import ScalingPair, is_plain, shared_parameters, unwrap
from weightdyn.wisca.plan import (
    Errors,
    Granularity,
    Moments,
    Norm,
    Pairs,
    along,
    check_choices,
    check_rescale_table,
    own_pairs,
    plan_rescale,
    scale_factors,
)

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def rescale_(
    model: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    pairs: Pairs = ("qk", "vo"),
    norm: Norm = "l1",
    granularity: Granularity = "tensor",
    moments: Moments = "transport",
    power_of_two: bool = False,
    max_alpha: float | None = None,
    errors: Errors = "raise",
    progress: Progress = None,
) -> pd.DataFrame:
    """Balance the norms of a model's pairs, in place; its outputs stay what they are.

        a ← α·a,   b ← b/α,   α = √(‖b‖/‖a‖),   so that both sides have the norm √(‖a‖·‖b‖)

    Under grouped-query attention q has g times the entries of k, and weights of equal variance get α = 1/√g by
    norm="l1", α = g^(−1/4) by "l2" and α = 1 by "rms". Biases are scaled with their rows and do not count.

    Args:
        model: a model whose pairs `find_pairs` knows.
        optimizer: its optimizer, or optimizers; their moments, and fp32 master weights that they keep, follow.
        pairs: kinds of pairs (see `KINDS`), or pairs of your own.
        norm: "l1" Σ|w|, "l2" √Σw², "rms" √(mean w²).
        granularity: one α for a whole pair ("tensor"), for each head or key-value group ("head"), or for each
            channel. Pairs without heads take "head" as "tensor".
        moments: "transport" divides m by the factor of its weight and v by its square, as the gradient's change
            asks: u stays. "keep" leaves them. "reset" starts the state of every tensor that has a part in a pair
            anew, with its count of updates.
        power_of_two: round α to a power of two; outputs, and `undo_`, are then exact to the last bit.
        max_alpha: keep α in [1/max_alpha, max_alpha]; of powers of two, the last one inside.
        errors: what to do about a pair that cannot be rescaled (refused, tied tensors, a norm that is zero or
            not finite): "raise", or "skip" it and say so in the table.
        progress: show a bar where it takes seconds. None: where someone watches.

    Returns:
        One row for each α, with the columns of `RESCALE_TABLE`. It is what `undo_` and `predict_shift` take.

    Raises:
        ValueError, TypeError: an argument is none of those accepted, or something cannot be done. The model and
            the optimizer are as they were.

    Gradients that are there (`.grad`) are divided by the factor of their weight, so that it does not matter
    whether this comes before or after a backward pass. Do not call it between a `ForceLogger`'s two hooks, that is
    inside `optimizer.step()`.

    Source: WISCA's balanced weights, arXiv 2508.16676; transport, channels and powers of two are ours.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=4, num_key_value_heads=1)
    >>> model = LlamaForCausalLM(config)
    >>> table = rescale_(model, power_of_two=True)
    >>> table[["pair", "a", "b", "alpha"]].to_dict("records")
    [{'pair': 'qk', 'a': 'q', 'b': 'k', 'alpha': 0.5}, {'pair': 'vo', 'a': 'o', 'b': 'v', 'alpha': 0.5}]
    """
    check_choices(moments=moments)
    table = plan_rescale(
        model,
        pairs=pairs,
        norm=norm,
        granularity=granularity,
        power_of_two=power_of_two,
        max_alpha=max_alpha,
        errors=errors,
        progress=progress,
    )
    return apply_(model, table, optimizer, pairs=own_pairs(pairs), moments=moments, progress=progress)


@torch.no_grad()
def apply_(
    model: nn.Module,
    table: pd.DataFrame,
    optimizer: Optimizers | None = None,
    *,
    pairs: Sequence[ScalingPair] | None = None,
    moments: Moments = "transport",
    progress: Progress = None,
) -> pd.DataFrame:
    """Scale a model by the α of a table, whatever they are: a stored plan, one of another model, one made up.

    Args:
        model: the model; its pairs must be those of the table.
        table: of `plan_rescale` or `rescale_`; `pair`, `module`, `head`, `channel` and `alpha` > 0 are read.
        optimizer: as in `rescale_`.
        pairs: your own pairs, if the table was made with such.
        moments, progress: as in `rescale_`.

    Returns:
        The table with `moments` as they were treated.

    Raises:
        ValueError, TypeError: the table is not of this model, or something cannot be scaled; nothing is changed.
    """
    check_choices(moments=moments)
    model = unwrap(model)
    factors = scale_factors(model, table, pairs=pairs)
    _check_fits(model, factors)
    states, counters = _states(model, factors, optimizer, moments)
    for name, each in progress_bar(
        factors.items(), progress=progress, desc="rescaling", unit="tensor", delay=3
    ):
        parameter = model.get_parameter(name)
        scale_by(parameter, each, 1)
        if parameter.grad is not None:
            scale_by(parameter.grad, each, -1)
    for tensor, each, power in states:
        if power is None:
            tensor.zero_()
        else:
            scale_by(tensor, each, -power)
    for state in counters:
        state["step"] = 0
    return table.assign(moments=None if optimizer is None else moments)


def undo_(
    model: nn.Module,
    table: pd.DataFrame,
    optimizer: Optimizers | None = None,
    *,
    pairs: Sequence[ScalingPair] | None = None,
    progress: Progress = None,
) -> None:
    """Take a rescaling back: scale by 1/α. Exact to the last bit where every α is a power of two.

    Transported moments are transported back (to the last bit too, but for those below their type's normal range),
    kept ones stay, and what was reset is not brought back.

    Args:
        model: the model that was rescaled; training on in between does no harm.
        table: what `rescale_` returned.
        optimizer: the optimizer that `rescale_` was given, if it was.
        pairs: your own pairs, if it was given such.
        progress: as in `rescale_`.

    Raises:
        TypeError, ValueError: the table is none, or not of this model, or it was made with an optimizer and there
            is none now.
    """
    check_rescale_table(table)
    treated = list(table["moments"].dropna().unique()) if "moments" in table else []
    if (len(treated) > 0) != (optimizer is not None):
        made = f"an optimizer (moments={treated[0]!r})" if len(treated) else "no optimizer"
        raise ValueError(
            f"optimizer: the table's rescaling was made with {made}; give undo_ the same, so that both fit again"
        )
    back: Moments = "transport" if "transport" in treated else "keep"
    inverse = table.assign(alpha=1 / table["alpha"])
    apply_(model, inverse, optimizer, pairs=pairs, moments=back, progress=progress)


def scale_by(tensor: Tensor, axes: Mapping[int, Tensor], power: int) -> None:
    """Multiply in place by the factors to a power; each entry is rounded once for each axis."""
    for axis, factor in axes.items():
        tensor.mul_(along(factor**power, axis, tensor))


def _check_fits(model: nn.Module, factors: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Raise if a factor takes an entry out of its type's range, or a power of two costs it a bit."""
    shared = shared_parameters(model)
    exact = all(
        bool((torch.frexp(each)[0] == 0.5).all()) for axes in factors.values() for each in axes.values()
    )
    for name, axes in factors.items():
        if name in shared:
            raise ValueError(
                f"{name} is tied to {shared[name]}, which would be scaled with it; nothing was changed"
            )
        weight = model.get_parameter(name).detach()
        if not is_plain(weight) or weight.is_meta:
            raise ValueError(
                f"model: {name} is no whole, dense tensor with values ({weight.layout}, {weight.device}), and "
                "cannot be scaled; nothing was changed"
            )
        scaled = weight.clone()
        scale_by(scaled, axes, 1)
        if not torch.isfinite(scaled).all():
            raise ValueError(f"{name} would overflow {weight.dtype}; give a max_alpha. Nothing was changed")
        if exact:
            scale_by(scaled, axes, -1)
            if not torch.equal(scaled, weight):
                raise ValueError(
                    f"{name} has entries so small in {weight.dtype} that a power of two costs them bits; give a "
                    "max_alpha, or power_of_two=False. Nothing was changed"
                )


def _states(
    model: nn.Module,
    factors: Mapping[str, Mapping[int, Tensor]],
    optimizer: Optimizers | None,
    moments: Moments,
) -> tuple[list[tuple[Tensor, Mapping[int, Tensor], int | None]], list[dict[str, Any]]]:
    """What of the optimizer is scaled: tensor, factors, power of 1/factor; a power of None is set to zero.

    Beside it the states whose count of updates is a plain number and starts anew.
    """
    if optimizer is None:
        return [], []
    counters: list[dict[str, Any]] = []
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for each in optimizers:
        check_optimizer(each, "a torch.optim.Optimizer or several")
    held = [tensor for each in optimizers for group in each.param_groups for tensor in group["params"]]
    states = {tensor: each.state[tensor] for each in optimizers for tensor in each.state}
    masters = _masters(model, held)
    found: list[tuple[Tensor, Mapping[int, Tensor], int | None]] = []
    for name, axes in factors.items():
        parameter = model.get_parameter(name)
        own = parameter if any(parameter is each for each in held) else masters.get(name)
        if own is None:
            if parameter.requires_grad:
                raise ValueError(
                    f"optimizer has neither {name} nor a copy of it: give all optimizers of the model, as a list. "
                    "Nothing was changed"
                )
            continue
        if own is not parameter:
            found.append((own, axes, -1))
            if own.grad is not None:
                found.append((own.grad, axes, 1))
        state = states.get(own, {})
        if moments == "reset" and isinstance(state.get("step"), (int, float)):
            counters.append(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            power = STATE_POWERS.get(key) if value.shape == own.shape else None
            if power == -1:
                found.append((value, axes, -1))
            elif moments == "reset":
                found.append((value, axes, None))
            elif moments == "transport" and value.ndim > 0:
                if power is None:
                    raise TypeError(
                        f"optimizer keeps {key!r} of {name}, and how that scales with the gradient is unknown; "
                        "moments='keep' or 'reset' can be done. Nothing was changed"
                    )
                found.append((value, axes, power))
    return found, counters


def _masters(model: nn.Module, held: Sequence[Tensor]) -> dict[str, Tensor]:
    """fp32 copies that stand in the optimizer in place of the model's parameters.

    A parameter may know its copy by an attribute (Megatron's `main_param`). Else a copy is known by its shape and
    by its values, rounded to the parameter's type; among equals, the order is the model's.
    """
    parameters = dict(model.named_parameters())
    mine = {id(each) for each in parameters.values()}
    waiting = [each for each in held if id(each) not in mine]
    found: dict[str, Tensor] = {}
    if not waiting:
        return found
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        known = next((getattr(parameter, key) for key in MASTERS if hasattr(parameter, key)), None)
        alike = (
            each
            for each in waiting
            if each is known
            or (
                known is None
                and each.shape == parameter.shape
                and torch.equal(each.to(parameter.dtype), parameter)
            )
        )
        copy_of = next(alike, None)
        if copy_of is not None:
            found[name] = copy_of
            waiting = [each for each in waiting if each is not copy_of]
    return found
