"""Plan a rescaling: the α of every pair, as a table, and what each parameter is multiplied by.

A rescaling is planned first and applied then. The plan is a table, one row for each α: it can be read, stored,
changed and applied to another copy of the model, and it is all that undoing takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.core.checks import check_choice, check_flag, check_instance, check_number, refuse
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.wisca.pairs import KINDS, Part, ScalingPair, find_pairs, is_plain, shared_parameters, unwrap

Norm = Literal["l1", "l2", "rms"]
Granularity = Literal["tensor", "head", "channel"]
Moments = Literal["transport", "keep", "reset"]
Errors = Literal["raise", "skip"]
Pairs = Sequence[str] | Sequence[ScalingPair]

CHOICES: dict[str, Any] = {"norm": Norm, "granularity": Granularity, "moments": Moments, "errors": Errors}
"""Arguments of `rescale_` that are one of a few words, and their words."""


def plan_rescale(
    model: nn.Module,
    *,
    pairs: Pairs = ("qk", "vo"),
    norm: Norm = "l1",
    granularity: Granularity = "tensor",
    power_of_two: bool = False,
    max_alpha: float | None = None,
    errors: Errors = "raise",
    progress: Progress = None,
) -> pd.DataFrame:
    """Find the α of every pair and change nothing: the table that `rescale_` applies.

        α = √(‖b‖/‖a‖),   so that ‖α·a‖ = ‖b/α‖

    The arguments and the table are those of `rescale_`.
    """
    model = unwrap(model)
    check_choices(norm=norm, granularity=granularity, errors=errors)
    check_flag("power_of_two", power_of_two)
    max_alpha = check_number("max_alpha", max_alpha, 1, none="no bound")
    chosen = _chosen(model, pairs)
    shared = shared_parameters(model)
    # Factors of the pairs before, which a later pair's norms see.
    planned: dict[str, list[tuple[int, Tensor]]] = {}
    tables, problems = [], []
    for pair in progress_bar(chosen, progress=progress, desc="norms", unit="pair", delay=3):
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
        TypeError: `table` or `pairs` is none.
        ValueError: the table names a pair that the model has not, or an α that is not a positive number.
    """
    model = unwrap(model)
    check_rescale_table(table)
    own = None if pairs is None else own_pairs(pairs)
    if pairs is not None and (own is None or len(own) < len(pairs)):
        raise TypeError(
            f"pairs must be the ScalingPairs that the table was made with, or None, got {pairs!r}"
        )
    known = {(pair.kind, pair.module): pair for pair in (find_pairs(model) if own is None else own)}
    found: dict[str, dict[int, Tensor]] = {}
    for key, rows in table.sort_values(["head", "channel"]).groupby(["pair", "module"], sort=False):
        alpha = rows["alpha"].to_numpy(float, na_value=math.nan)
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


def own_pairs(pairs: Pairs) -> Sequence[ScalingPair] | None:
    """Those of the argument `pairs` that are pairs of the user's own; None if it names kinds."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        return None
    return [pair for pair in pairs if isinstance(pair, ScalingPair)] or None


def check_choices(**given: object) -> None:
    """Raise an error that names an argument of `CHOICES` whose value is none of them."""
    for name, value in given.items():
        check_choice(name, value, CHOICES[name].__args__)


def check_rescale_table(table: Any) -> pd.DataFrame:
    """Return `table` if it is one of `plan_rescale` or `rescale_`, else raise a TypeError."""
    wanted = ("pair", "module", "head", "channel", "alpha")
    made_by = "table must be what rescale_ or plan_rescale returns"
    check_instance("table", table, pd.DataFrame, made_by.removeprefix("table must be "))
    if missing := [name for name in wanted if name not in table]:
        raise TypeError(f"{made_by}: it lacks the columns {missing}")
    if not pd.api.types.is_numeric_dtype(table["alpha"]):
        raise TypeError(f"{made_by}: its alpha must hold numbers, got {table['alpha'].dtype}")
    return table


def along(factor: Tensor, axis: int, tensor: Tensor) -> Tensor:
    """The factors of an axis in the shape in which they multiply `tensor`, on its device."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return factor.to(tensor.device).view(shape)


# --- how a plan is made -------------------------------------------------------------------------------------


def _chosen(model: nn.Module, pairs: Pairs) -> list[ScalingPair]:
    """The pairs that the argument names, or is."""
    own = own_pairs(pairs)
    if own is not None:
        if len(own) < len(pairs):
            raise TypeError("pairs must be kinds of pairs or ScalingPairs, not both")
        if len({(pair.kind, pair.module) for pair in own}) < len(own):
            raise ValueError("pairs: two of them have the same kind and module; these must tell them apart")
        return list(own)
    several = isinstance(pairs, Sequence | Set) and not isinstance(pairs, str)
    if not several or not pairs or not all(isinstance(kind, str) and kind in KINDS for kind in pairs):
        accepted = f"some of {tuple(KINDS)} such as ('qk', 'vo'), or ScalingPairs"
        if several:
            raise ValueError(f"pairs must be {accepted}, got {pairs!r}")
        raise refuse("pairs", accepted, pairs)
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
            weight = weight * along(factor, axis, weight)
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
            "stack": pair.stack,
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
