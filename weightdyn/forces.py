"""The algebra of one AdamW update, and the table that everything speaks.

AdamW takes w to w' = (1 − ηλ)w − ηu with u = m̂/(√v̂ + ε), so the change of ‖w‖² splits exactly:

    ‖w'‖² − ‖w‖²  =  −2η(1 − ηλ)⟨w,u⟩  +  η²‖u‖²  −  (2ηλ − η²λ²)‖w‖²
                        alignment        injection         decay

Three inner products say it all, ⟨w,u⟩, ‖u‖² and ‖w‖²; those of the state after the step give those before it
in closed form. Here are functions of numbers and arrays (floats, NumPy, pandas, broadcast as usual) and of
force tables: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

Order = Literal["exact", "leading"]
At = Literal["before", "after"]
By = Literal["layer", "component", "role", "model"]

FORCES = ("alignment", "injection", "decay")
"""The three forces, in the order in which every table, legend and sum has them."""

FORCE_TABLE = {
    "step": "number t of the update, 1-based: it takes w(t-1) to w(t)",
    "span": "updates that the row covers, ending at `step`",
    "tensor": "name of the parameter, with [view] behind it for a part of a fused tensor",
    "layer": "block index; missing outside the blocks",
    "component": "q k v qkv o gate up down embed unembed norm bias other",
    "role": "selection (q, k), transmission (o, gate, up, down), value (v), other",
    "numel": "number of weights",
    "lr": "learning rate η at this update",
    "weight_decay": "decoupled weight decay λ at this update",
    "norm_sq": "‖w‖² before the update (before the span)",
    "norm_sq_after": "‖w‖² after it; NaN where it was not measured",
    "alignment": "−2η(1−ηλ)⟨w,u⟩, change of ‖w‖² per update (mean over the span)",
    "injection": "η²‖u‖², change of ‖w‖² per update (mean over the span)",
    "decay": "−(2ηλ−η²λ²)‖w‖², change of ‖w‖² per update (mean over the span)",
}
"""Columns of a force table and their meaning. Tables may carry more columns behind these."""


class Forces(NamedTuple):
    """Signed contributions to ‖w‖² of one update; a positive force grows the norm."""

    alignment: Any
    injection: Any
    decay: Any


class Products(NamedTuple):
    """The three inner products of one tensor at one update: ⟨w,u⟩, ‖u‖², ‖w‖²."""

    dot_wu: Any
    u_sq: Any
    w_sq: Any


def forces_from_products(
    dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any, *, order: Order = "exact"
) -> Forces:
    """Split the change of ‖w‖² in one AdamW update into its three forces.

    exact:    alignment = −2η(1−ηλ)⟨w,u⟩,  injection = η²‖u‖²,  decay = −(2ηλ−η²λ²)‖w‖²
    leading:  alignment = −2η⟨w,u⟩,        injection = η²‖u‖²,  decay = −2ηλ‖w‖²

    Args:
        dot_wu: ⟨w,u⟩ with w before the step and u = m̂/(√v̂+ε) of the step.
        u_sq: ‖u‖².
        w_sq: ‖w‖² before the step.
        lr: learning rate η of the step.
        weight_decay: decoupled weight decay λ (0 for none).
        order: "exact" sums to ‖w'‖² − ‖w‖²; "leading" drops the O(η²λ) terms, as arXiv 2606.19367 does.

    All arguments are numbers or arrays that broadcast against each other.

    Source: arXiv 2606.19367 for the leading order; the exact form is ‖(1−ηλ)w − ηu‖² − ‖w‖² multiplied out.

    >>> forces_from_products(dot_wu=-2.0, u_sq=8.0, w_sq=64.0, lr=0.25, weight_decay=0.5)
    Forces(alignment=0.875, injection=0.5, decay=-15.0)
    """
    if order == "exact":
        shrink = 1 - lr * weight_decay
        loss = (2 - lr * weight_decay) * lr * weight_decay
    elif order == "leading":
        shrink = 1
        loss = 2 * lr * weight_decay
    else:
        raise ValueError(f"order must be 'exact' or 'leading', got {order!r}")
    return Forces(-2 * lr * shrink * dot_wu, lr**2 * u_sq, -loss * w_sq)


def before_step(dot_wu_after: Any, u_sq: Any, w_sq_after: Any, lr: Any, weight_decay: Any) -> Products:
    """Products of the state before an AdamW step from those after it, in closed form.

    w = (w' + ηu)/(1−ηλ), hence

        ⟨w,u⟩ = (⟨w',u⟩ + η‖u‖²)/(1−ηλ)
        ‖w‖²  = (‖w'‖² + 2η⟨w',u⟩ + η²‖u‖²)/(1−ηλ)²

    so a measurement after the step needs no copy of the weights from before it.

    Args:
        dot_wu_after: ⟨w',u⟩ with w' after the step.
        u_sq: ‖u‖².
        w_sq_after: ‖w'‖².
        lr: learning rate η of the step.
        weight_decay: decoupled weight decay λ; ηλ = 1 erases w and has no inverse (gives inf or NaN).

    >>> before_step(dot_wu_after=-1.1, u_sq=1.0, w_sq_after=1.21, lr=0.1, weight_decay=0.0)
    Products(dot_wu=-1.0, u_sq=1.0, w_sq=1.0)
    """
    shrink = 1 - lr * weight_decay
    dot_wu = (dot_wu_after + lr * u_sq) / shrink
    w_sq = (w_sq_after + 2 * lr * dot_wu_after + lr**2 * u_sq) / shrink**2
    return Products(dot_wu, u_sq, w_sq)


def after_step(dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any) -> Products:
    """Products of the state after an AdamW step from those before it: the inverse of `before_step`.

        ⟨w',u⟩ = (1−ηλ)⟨w,u⟩ − η‖u‖²
        ‖w'‖²  = (1−ηλ)²‖w‖² − 2η(1−ηλ)⟨w,u⟩ + η²‖u‖²

    >>> after_step(dot_wu=-1.0, u_sq=1.0, w_sq=1.0, lr=0.5, weight_decay=0.0)
    Products(dot_wu=-1.5, u_sq=1.0, w_sq=2.25)
    """
    shrink = 1 - lr * weight_decay
    dot_wu_after = shrink * dot_wu - lr * u_sq
    w_sq_after = shrink**2 * w_sq - 2 * lr * shrink * dot_wu + lr**2 * u_sq
    return Products(dot_wu_after, u_sq, w_sq_after)


def relative_update(u_sq: Any, w_sq: Any, lr: Any) -> Any:
    """Relative update η‖u‖/‖w‖ (dimensionless), decay left out.

    >>> float(relative_update(u_sq=4.0, w_sq=100.0, lr=0.1))
    0.02
    """
    return lr * np.sqrt(u_sq) / np.sqrt(w_sq)


def angle(dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any) -> Any:
    """Angle between w and w' in radians: how far one update turns the tensor.

    With a = ⟨w,u⟩/‖w‖² the update has the part ηa along w and the rest across it, so

        angle = atan2( η√(‖u‖²/‖w‖² − a²),  1 − ηλ − ηa )

    Products are those before the step. Unlike the arccos of a cosine it is precise for angles near zero.
    """
    along = dot_wu / w_sq
    across = np.sqrt(np.maximum(u_sq / w_sq - along**2, 0))
    return np.arctan2(lr * across, 1 - lr * weight_decay - lr * along)


def timescale(lr: Any, weight_decay: Any) -> Any:
    """Relaxation time τ = 1/(ηλ), in updates; inf without decay.

    ‖w‖² forgets its past over τ/2 updates; a run of T updates has T/τ of them.

    >>> timescale(lr=1e-3, weight_decay=0.1)
    10000.0
    """
    rate = np.asarray(lr * weight_decay, dtype=float)
    out = np.divide(1.0, rate, out=np.full(rate.shape, np.inf), where=rate != 0)
    return float(out) if out.ndim == 0 else out


def check_force_table(table: Any, *, argument: str = "table") -> pd.DataFrame:
    """Return `table` if it is a force table, or raise a TypeError or ValueError that says what is missing."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"{argument} must be a force table (a pandas.DataFrame, as RunLog.forces() returns), "
            f"got {type(table).__name__}"
        )
    missing = [name for name in ("step", "span", "norm_sq", *FORCES) if name not in table]
    if missing:
        raise ValueError(
            f"{argument} is not a force table: it lacks the columns {missing}; it has {list(table.columns)}"
        )
    return table


def budget(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each force in the budget: |F| / (|alignment| + |injection| + |decay|), row by row.

    Args:
        table: a force table; sum it first (`RunLog.forces(by="role")`, `aggregate`) for shares of a group.

    Returns:
        The table with the columns `alignment_share`, `injection_share`, `decay_share` (fractions that sum to
        1; NaN where all three forces are zero), `net` (their signed sum, the change of ‖w‖² per update).

    Source: arXiv 2606.19367, the force budget.

    >>> t = pd.DataFrame({"step": [1], "span": [1], "norm_sq": [4.0],
    ...                   "alignment": [0.5], "injection": [0.1], "decay": [-0.4]})
    >>> budget(t)[["alignment_share", "injection_share", "decay_share"]].to_numpy().tolist()
    [[0.5, 0.1, 0.4]]
    """
    check_force_table(table)
    total = table[list(FORCES)].abs().sum(axis=1, skipna=False)
    total = total.where(total != 0)
    shares = {f"{name}_share": table[name].abs() / total for name in FORCES}
    return table.assign(**shares, net=table[list(FORCES)].sum(axis=1, skipna=False))


_SUMMED = ("numel", "norm_sq", "norm_sq_after", *FORCES)


def aggregate(table: pd.DataFrame, by: By | Sequence[str]) -> pd.DataFrame:
    """Sum a force table over the tensors of each group: squared norms and forces add.

    Args:
        table: a force table.
        by: "layer", "component", "role", "model" (everything), or a list of such columns.

    Returns:
        A force table with one row per step, span and group. `lr` and `weight_decay` stay where the whole
        group shares one value and are NaN where it does not; a sum over a missing value is missing.
    """
    check_force_table(table)
    keys = [by] if isinstance(by, str) else list(by)
    keys = [key for key in keys if key != "model"]
    allowed = [name for name in ("layer", "component", "role", "tensor") if name in table]
    unknown = [key for key in keys if key not in allowed]
    if unknown:
        raise ValueError(f"by={by!r}: cannot group by {unknown}; use 'model' or any of {allowed}")
    groups = table.groupby(["step", "span", *keys], dropna=False, observed=True, sort=True)
    values = groups[[name for name in _SUMMED if name in table]]
    summed = values.sum().where(values.count().eq(groups.size(), axis=0))
    for name in ("lr", "weight_decay"):
        if name in table:
            low, high = groups[name].min(), groups[name].max()
            summed[name] = low.where(low == high)
    summed = summed.reset_index()
    return summed[[name for name in FORCE_TABLE if name in summed]]
