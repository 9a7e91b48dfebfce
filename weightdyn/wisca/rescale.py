"""Rescale pairs in place, undo it, and prove that nothing changed.

A rescaling is planned first and applied then. The plan is a table, one row for each α: it can be read, stored,
changed and applied to another copy of the model, and it is all that undoing takes. Nothing is touched before
everything was found possible.

If w becomes f·w and the output stays, gradients become g/f. So with the moments transported, m/f and v/f², the
update u = m̂/(√v̂+ε) is that of before, of weights that are f times as large.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from weightdyn.wisca.pairs import KINDS, Part, ScalingPair, find_pairs, is_plain, shared_parameters, unwrap

Norm = Literal["l1", "l2", "rms"]
Granularity = Literal["tensor", "head", "channel"]
Moments = Literal["transport", "keep", "reset"]
Errors = Literal["raise", "skip"]
Pairs = Sequence[str] | Sequence[ScalingPair]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]

RESCALE_TABLE = {
    "pair": "kind of the pair",
    "module": "where it lives; pair and module tell it from all others",
    "layer": "block index; missing outside the blocks",
    "head": "head or key-value group; missing where all heads share one α",
    "channel": "channel of the pair; missing where all channels of the head share one α",
    "a": "what is multiplied by α: q, o, up, gain, A",
    "b": "what is divided by α: k, v, down, linears, B",
    "norm_a": "norm of the entries of a before",
    "norm_b": "norm of the entries of b before",
    "alpha": "α; 1 where the pair was skipped",
    "norm_a_after": "α·norm_a",
    "norm_b_after": "norm_b/α",
    "moments": "what became of the optimizer's moments; missing without an optimizer",
    "skipped": "why nothing was done; missing where something was",
}
"""Columns of the table of a rescaling, and their meaning."""

# What optimizers keep of a tensor, by the power of the gradient's scale that it has; weights have −1.
_STATE_POWERS = {
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
_MASTERS = ("main_param", "master_param")  # attributes by which a parameter knows its fp32 copy


def plan_rescale(
    model: nn.Module,
    *,
    pairs: Pairs = ("qk", "vo"),
    norm: Norm = "l1",
    granularity: Granularity = "tensor",
    power_of_two: bool = False,
    max_alpha: float | None = None,
    errors: Errors = "raise",
) -> pd.DataFrame:
    """Find the α of every pair and change nothing: the table that `rescale_` applies.

        α = √(‖b‖/‖a‖),   so that ‖α·a‖ = ‖b/α‖

    The arguments and the table are those of `rescale_`.
    """
    model = unwrap(model)
    check_choices(norm=norm, granularity=granularity, errors=errors)
    if max_alpha is not None and not max_alpha >= 1:
        raise ValueError(
            f"max_alpha must be a number ≥ 1 (α stays in [1/max_alpha, max_alpha]), got {max_alpha!r}"
        )
    chosen = _chosen(model, pairs)
    shared = shared_parameters(model)
    planned: dict[
        str, list[tuple[int, Tensor]]
    ] = {}  # factors of pairs before, which a later pair's norms see
    tables, problems = [], []
    for pair in tqdm(chosen, desc="norms", unit="pair", delay=3):
        reason = pair.refused or _unfit(model, pair, shared)
        unit = _units(pair, granularity) if reason is None else torch.zeros(1, dtype=torch.long)
        a, b = (np.full(int(unit.max()) + 1, np.nan) for _ in range(2))
        if reason is None:
            a, b = (_norms(model, side, unit, norm, planned) for side in (pair.a, pair.b))
        known = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
        alpha = _alpha(np.divide(b, a, out=np.ones_like(a), where=known), power_of_two, max_alpha)
        table = _rows(pair, unit, granularity, a, b, alpha, reason, known)
        problems += [f"{pair}: {why}" for why in table["skipped"].dropna().unique()]
        if reason is None:
            for name, axis, factor in _pair_factors(pair, torch.from_numpy(alpha)[unit]):
                planned.setdefault(name, []).append((axis, factor))
        tables.append(table)
    if problems and errors == "raise":
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{problems[0]}{more}. Nothing was changed; errors='skip' leaves such pairs as they are, "
            f"pairs= leaves them out"
        )
    return pd.concat(tables, ignore_index=True)


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
    )
    return apply_(model, table, optimizer, pairs=_own_pairs(pairs), moments=moments)


@torch.no_grad()
def apply_(
    model: nn.Module,
    table: pd.DataFrame,
    optimizer: Optimizers | None = None,
    *,
    pairs: Sequence[ScalingPair] | None = None,
    moments: Moments = "transport",
) -> pd.DataFrame:
    """Scale a model by the α of a table, whatever they are: a stored plan, one of another model, one made up.

    Args:
        model: the model; its pairs must be those of the table.
        table: of `plan_rescale` or `rescale_`; `pair`, `module`, `head`, `channel` and `alpha` > 0 are read.
        optimizer: as in `rescale_`.
        pairs: your own pairs, if the table was made with such.
        moments: as in `rescale_`.

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
    for name, each in tqdm(factors.items(), desc="rescaling", unit="tensor", delay=3):
        parameter = model.get_parameter(name)
        _scale(parameter, each, 1)
        if parameter.grad is not None:
            _scale(parameter.grad, each, -1)
    for tensor, each, power in states:
        if power is None:
            tensor.zero_()
        else:
            _scale(tensor, each, -power)
    for state in counters:
        state["step"] = 0
    return table.assign(moments=None if optimizer is None else moments)


def undo_(
    model: nn.Module,
    table: pd.DataFrame,
    optimizer: Optimizers | None = None,
    *,
    pairs: Sequence[ScalingPair] | None = None,
) -> None:
    """Take a rescaling back: scale by 1/α. Exact to the last bit where every α is a power of two.

    Transported moments are transported back (to the last bit too, but for those below their type's normal range),
    kept ones stay, and what was reset is not brought back.

    Args:
        model: the model that was rescaled; training on in between does no harm.
        table: what `rescale_` returned.
        optimizer: the optimizer that `rescale_` was given, if it was.
        pairs: your own pairs, if it was given such.

    Raises:
        ValueError: the table is not of this model, or it was made with an optimizer and there is none now.
    """
    treated = list(table["moments"].dropna().unique()) if "moments" in table else []
    if (len(treated) > 0) != (optimizer is not None):
        made = f"an optimizer (moments={treated[0]!r})" if len(treated) else "no optimizer"
        raise ValueError(
            f"optimizer: the table's rescaling was made with {made}; give undo_ the same, so that both fit again"
        )
    back: Moments = "transport" if "transport" in treated else "keep"
    apply_(model, table.assign(alpha=1 / table["alpha"]), optimizer, pairs=pairs, moments=back)


def scale_factors(
    model: nn.Module, table: pd.DataFrame, *, pairs: Sequence[ScalingPair] | None = None
) -> dict[str, dict[int, Tensor]]:
    """What a rescaling multiplies each parameter by: {name: {axis: float64 factors along that axis}}.

    Parameters (and axes) that stay as they are have no entry. A parameter with more than one axis is multiplied
    along each.

    Args:
        model: the model; its pairs must be those of the table.
        table: of `plan_rescale` or `rescale_`.
        pairs: your own pairs, if the table was made with such.

    Raises:
        ValueError: the table names a pair that the model has not, or an α that is not a positive number.
    """
    model = unwrap(model)
    if not isinstance(table, pd.DataFrame) or not {"pair", "module", "head", "channel", "alpha"} <= set(
        table
    ):
        raise TypeError("table must be what rescale_ or plan_rescale returns")
    known = {(pair.kind, pair.module): pair for pair in (find_pairs(model) if pairs is None else pairs)}
    found: dict[str, dict[int, Tensor]] = {}
    for key, rows in table.sort_values(["head", "channel"]).groupby(["pair", "module"], sort=False):
        alpha = rows["alpha"].to_numpy(float)
        if not (np.isfinite(alpha) & (alpha > 0)).all():
            raise ValueError(f"table: every alpha must be a number > 0, got {alpha.tolist()} for {key}")
        if (alpha == 1).all():
            continue
        pair = known.get((str(key[0]), str(key[1])))
        if pair is None or pair.refused is not None:
            raise ValueError(
                f"table has {key[0]} of {key[1]}, which the model has not (or refuses); "
                "pairs of your own must be given again with pairs="
            )
        granularity = "channel" if rows["channel"].notna().all() else "head"
        granularity = granularity if rows["head"].notna().all() else "tensor"
        unit = _units(pair, granularity)
        if len(alpha) != int(unit.max()) + 1:
            raise ValueError(
                f"table has {len(alpha)} rows for {pair}, by {granularity} it has {int(unit.max()) + 1}"
            )
        for name, axis, factor in _pair_factors(pair, torch.tensor(alpha)[unit]):
            axes = found.setdefault(name, {})
            axes[axis] = axes[axis] * factor if axis in axes else factor
    return found


Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor | None]]


def check_equivalence(
    model: nn.Module,
    batch: Any,
    *,
    table: pd.DataFrame | None = None,
    pairs: Pairs = ("qk", "vo"),
    forward: Forward | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Prove on a batch that a rescaling changes nothing: outputs, loss and gradients, on a copy of the model.

    In the model's own type and in float64, with dropout off; what a model computes in float32 of its own accord
    (the loss, in transformers) stays that. The gradient of a weight that was multiplied by f must be g/f; the
    difference is that of f times the new gradient and the old one.

    Args:
        model: the model. It stays as it is, and so does its mode.
        batch: arguments of the model, with labels if there shall be a loss; or token ids, labels at once.
        table: the rescaling to check: of `plan_rescale`, or your own. Default: one is planned.
        pairs: as in `rescale_`; your own pairs, if the table was made with such.
        forward: for models that do not return transformers' outputs: a function of a model and the batch, that
            returns outputs and loss. Without a loss (None) the gradients are those of the outputs' mean square.
        options: of `plan_rescale`: norm, granularity, power_of_two, max_alpha, errors.

    Returns:
        Rows for each `dtype` and `quantity` ("outputs", "loss", "gradients"): `difference` (max|Δ|), `magnitude`
        (the largest before; of gradients that of all tensors), `relative` (their ratio), and `tensor`, the one
        whose gradient differs most.

    Memory: one copy of the model and its gradients, in float64 at last.

    >>> import torch, weightdyn as wd
    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> config = GPTNeoXConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    >>> proof = check_equivalence(GPTNeoXForCausalLM(config), torch.arange(8)[None], power_of_two=True)
    >>> proof["difference"].max().item()
    0.0
    """
    model = unwrap(model)
    if table is None:
        table = plan_rescale(model, pairs=pairs, **options)
    elif options:
        raise ValueError(f"table is given: {sorted(options)} would have no effect")
    own = _own_pairs(pairs)
    factors = scale_factors(model, table, pairs=own)
    rows = []
    for dtype in (None, torch.float64):
        twin = copy.deepcopy(model).eval()
        twin = twin if dtype is None else twin.to(dtype)
        before = _measure(twin, batch, dtype, forward)
        apply_(twin, table, pairs=own)
        after = _measure(twin, batch, dtype, forward)
        gradients = before.pop("gradients"), after.pop("gradients")
        kind = str(before["outputs"].dtype).removeprefix("torch.")
        for quantity, value in before.items():
            rows.append(
                {
                    "dtype": kind,
                    "quantity": quantity,
                    "difference": float((after[quantity].double() - value.double()).abs().max()),
                    "magnitude": float(value.abs().max()),
                    "tensor": None,
                }
            )
        for name, gradient in gradients[1].items():
            _scale(gradient, factors.get(name, {}), 1)
        differences = {
            name: float((gradients[1][name].double() - gradient.double()).abs().max())
            for name, gradient in gradients[0].items()
        }
        worst = max(differences, key=differences.__getitem__)
        rows.append(
            {
                "dtype": kind,
                "quantity": "gradients",
                "difference": differences[worst],
                "magnitude": max(float(gradient.abs().max()) for gradient in gradients[0].values()),
                "tensor": worst,
            }
        )
    found = pd.DataFrame(rows)
    found.insert(4, "relative", found["difference"] / found["magnitude"])
    return found


def _measure(
    model: nn.Module, batch: Any, dtype: torch.dtype | None, forward: Forward | None
) -> dict[str, Any]:
    """Outputs, loss if there is one, and the gradients of all parameters."""
    model.zero_grad()
    with torch.enable_grad():
        if forward is not None:
            outputs, loss = forward(model, _cast(batch, dtype))
        else:
            inputs: dict[str, Any] = (
                {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else dict(batch)
            )
            result = model(**{name: _cast(value, dtype) for name, value in inputs.items()})
            loss = getattr(result, "loss", None)
            outputs = result.logits if hasattr(result, "logits") else result[0]
        torch.as_tensor(outputs.square().mean() if loss is None else loss).backward()
    gradients = {
        name: each.grad.detach().clone() for name, each in model.named_parameters() if each.grad is not None
    }
    model.zero_grad()
    found = {"outputs": outputs.detach(), "gradients": gradients}
    return found if loss is None else {**found, "loss": loss.detach()}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_number and dtype is not None else value


# --- planning -----------------------------------------------------------------------------------------------


def check_choices(**given: object) -> None:
    """Raise a ValueError that names an argument of choices whose value is none of them."""
    accepted = {"norm": Norm, "granularity": Granularity, "moments": Moments, "errors": Errors}
    for name, value in given.items():
        choices = accepted[name].__args__
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _own_pairs(pairs: Pairs) -> Sequence[ScalingPair] | None:
    own = [pair for pair in pairs if isinstance(pair, ScalingPair)]
    return own or None


def _chosen(model: nn.Module, pairs: Pairs) -> list[ScalingPair]:
    """The pairs that the argument names, or is."""
    own = _own_pairs(pairs)
    if own is not None:
        if len(own) < len(pairs):
            raise TypeError("pairs must be kinds of pairs or ScalingPairs, not both")
        if len({(pair.kind, pair.module) for pair in own}) < len(own):
            raise ValueError("pairs: two of them have the same kind and module; these must tell them apart")
        return list(own)
    if isinstance(pairs, str) or not pairs or not set(pairs) <= set(KINDS):
        raise ValueError(
            f"pairs must be some of {tuple(KINDS)} such as ('qk', 'vo'), or ScalingPairs, got {pairs!r}"
        )
    found = find_pairs(model)
    kinds = {pair.kind for pair in found}
    if missing := [kind for kind in pairs if kind not in kinds]:
        raise ValueError(f"pairs: this model has no pair of the kinds {missing}; it has {sorted(kinds)}")
    return [pair for pair in found if pair.kind in pairs]


def _unfit(model: nn.Module, pair: ScalingPair, shared: Mapping[str, str]) -> str | None:
    """Why the tensors of a pair cannot be scaled; None if they can."""
    parts = (*pair.a, *pair.b)
    if not any(part.measured for part in pair.a) or not any(part.measured for part in pair.b):
        return "each side needs a part that is measured"
    if pair.heads is not None and len(pair.heads) != pair.size:
        return f"heads has {len(pair.heads)} entries, and there are {pair.size} channels"
    for part in parts:
        try:
            tensor = model.get_parameter(part.name)
        except AttributeError:
            return f"the model has no parameter {part.name}"
        if not is_plain(tensor) or not tensor.is_floating_point() or tensor.device.type == "meta":
            return f"{part.name} is no whole, dense, real tensor ({tensor.dtype}, {tensor.layout}, {tensor.device})"
        if part.name in shared:
            return f"{part.name} is tied to {shared[part.name]}, which would be scaled with it"
        if not 0 <= part.axis < tensor.ndim or tensor.shape[part.axis] != len(part.channels):
            return (
                f"{part.name} has the shape {tuple(tensor.shape)}, and channels label {len(part.channels)} "
                f"indices of axis {part.axis}"
            )
    return None


def _units(pair: ScalingPair, granularity: str) -> Tensor:
    """Which α each channel has."""
    if granularity == "channel":
        return torch.arange(pair.size)
    if granularity == "head" and pair.heads is not None:
        return pair.heads
    return torch.zeros(pair.size, dtype=torch.long)


def _norms(
    model: nn.Module,
    side: Sequence[Part],
    unit: Tensor,
    norm: Norm,
    planned: Mapping[str, Sequence[tuple[int, Tensor]]],
) -> np.ndarray:
    """Norm of one side's weights, for each α: Σ|w|, √Σw² or √(mean w²), in float64."""
    total = torch.zeros(int(unit.max()) + 1, dtype=torch.float64)
    count = torch.zeros_like(total)
    for part in side:
        if not part.measured:
            continue
        weight = model.get_parameter(part.name).detach()
        for axis, factor in planned.get(part.name, ()):
            weight = weight * _along(factor, axis, weight)
        others = [axis for axis in range(weight.ndim) if axis != part.axis]
        order = 1 if norm == "l1" else 2
        if others:
            sums = torch.linalg.vector_norm(weight, order, others, dtype=torch.float64).cpu()
        else:
            sums = weight.abs().double().cpu()
        sums = sums if norm == "l1" else sums**2
        inside = part.channels >= 0
        where = unit[part.channels[inside]]
        total.index_add_(0, where, sums[inside])
        count.index_add_(0, where, torch.full_like(sums[inside], weight.numel() / len(sums)))
    if norm == "rms":
        total /= count
    return (total if norm == "l1" else total.sqrt()).numpy()


def _alpha(ratio: np.ndarray, power_of_two: bool, max_alpha: float | None) -> np.ndarray:
    exponent = np.log2(ratio) / 2
    limit = math.inf if max_alpha is None else math.log2(max_alpha)
    if power_of_two:
        exponent, limit = np.rint(exponent), math.floor(limit) if math.isfinite(limit) else limit
        return np.exp2(np.clip(exponent, -limit, limit))
    alpha = np.sqrt(ratio)
    return alpha if max_alpha is None else np.clip(alpha, 1 / max_alpha, max_alpha)


def _rows(
    pair: ScalingPair,
    unit: Tensor,
    granularity: Granularity,
    a: np.ndarray,
    b: np.ndarray,
    alpha: np.ndarray,
    reason: str | None,
    known: np.ndarray,
) -> pd.DataFrame:
    count = len(alpha)
    head = channel = None
    if reason is None and granularity != "tensor":
        heads = torch.zeros(pair.size, dtype=torch.long) if pair.heads is None else pair.heads
        head = heads.new_zeros(count).scatter_(0, unit, heads).tolist()
        channel = list(range(count)) if granularity == "channel" else None
        head = head if pair.heads is not None or channel is not None else None
    why = [
        None if good else reason or f"the norm of {side} is {value:g}, which has no finite α"
        for good, (side, value) in zip(known, map(lambda x, y: _worse(pair.sides, x, y), a, b), strict=True)
    ]
    missing = [pd.NA] * count
    return pd.DataFrame(
        {
            "pair": pair.kind,
            "module": pair.module,
            "layer": pd.array([pd.NA if pair.layer is None else pair.layer] * count, dtype="Int64"),
            "head": pd.array(head or missing, dtype="Int64"),
            "channel": pd.array(channel or missing, dtype="Int64"),
            "a": pair.sides[0],
            "b": pair.sides[1],
            "norm_a": a,
            "norm_b": b,
            "alpha": alpha,
            "norm_a_after": a * alpha,
            "norm_b_after": b / alpha,
            "moments": pd.Series([None] * count, dtype=object),
            "skipped": pd.Series(why, dtype=object),
        }
    )


def _worse(sides: tuple[str, str], a: float, b: float) -> tuple[str, float]:
    """The side whose norm is zero or not finite."""
    return (sides[1], b) if np.isfinite(a) and a > 0 else (sides[0], a)


# --- applying -----------------------------------------------------------------------------------------------


def _pair_factors(pair: ScalingPair, alpha: Tensor) -> list[tuple[str, int, Tensor]]:
    """Name, axis and factors of every part, from the α of each channel."""
    found = []
    for side, scale in ((pair.a, alpha), (pair.b, 1 / alpha)):
        for part in side:
            factor = torch.ones(len(part.channels), dtype=torch.float64)
            inside = part.channels >= 0
            factor[inside] = scale[part.channels[inside]]
            found.append((part.name, part.axis, factor))
    return found


def _along(factor: Tensor, axis: int, tensor: Tensor) -> Tensor:
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return factor.to(tensor.device).view(shape)


def _scale(tensor: Tensor, axes: Mapping[int, Tensor], power: int) -> None:
    """Multiply in place by the factors to a power; each entry is rounded once for each axis."""
    for axis, factor in axes.items():
        tensor.mul_(_along(factor**power, axis, tensor))


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
        scaled = weight.clone()
        _scale(scaled, axes, 1)
        if not torch.isfinite(scaled).all():
            raise ValueError(f"{name} would overflow {weight.dtype}; give a max_alpha. Nothing was changed")
        if exact:
            _scale(scaled, axes, -1)
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
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for each in optimizers:
        inner = getattr(each, "optimizer", None)
        if not isinstance(each, torch.optim.Optimizer) or isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer or several, got {type(each).__name__}"
                + ("; pass the inner one, optimizer.optimizer" if inner is not None else "")
            )
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
            power = _STATE_POWERS.get(key) if value.shape == own.shape else None
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
        known = next((getattr(parameter, key) for key in _MASTERS if hasattr(parameter, key)), None)
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
