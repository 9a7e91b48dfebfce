"""Every table's columns, and what can be done with a table whoever made it: group, sum, share, check.

Everything that yields forces yields the same tidy force table, and everything behind it takes that table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from weightdyn.core.forces import (
    At,
    Order,
    Products,
    after_step,
    angle,
    forces_from_products,
    relative_update,
)

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


def force_table(
    products: pd.DataFrame,
    tensors: Mapping[str, Mapping[str, Any]],
    *,
    order: Order = "exact",
    at: At = "before",
) -> pd.DataFrame:
    """Force table of stored inner products, row by row.

    Args:
        products: step, span, tensor, lr, weight_decay, dot_wu ⟨w,u⟩, u_sq ‖u‖², norm_sq ‖w‖², norm_sq_after ‖w'‖²,
            norm_sq_audit (‖w‖² measured before the step, or NaN), m_rms, v_mean, u_max.
        tensors: label -> {"layer", "component", "role", "numel"}, as in run.json. A label that is missing
            there gets no layer, and the component and role "other".
        order: "exact", or "leading" without the O(η²λ) terms; see `weightdyn.forces_from_products`.
        at: "before" evaluates the forces with the weights before the step, so that they sum to the change of
            ‖w‖²; "after" with those after it, as the script of arXiv 2606.19367 does, which makes the
            alignment too large by 2·injection. `norm_sq` is ‖w‖² before the update either way.

    Returns:
        The columns of `weightdyn.FORCE_TABLE`, then

        u_sq, dot_wu       ‖u‖² and ⟨w,u⟩ before the update
        u_rms              root mean square of u
        relative_update    η‖u‖/‖w‖
        angle              radians that the update turned the tensor
        m_rms, v_mean      root mean square of m̂; mean of v̂
        u_max              max |u|
        residual           (‖w'‖² − ‖w‖² measured) − (alignment + injection + decay); NaN where not audited

    >>> products = pd.DataFrame({"step": [1], "span": [1], "tensor": ["w"], "lr": [0.5], "weight_decay": [0.0],
    ...     "dot_wu": [-1.0], "u_sq": [4.0], "norm_sq": [7.0], "norm_sq_after": [9.0], "norm_sq_audit": [7.0],
    ...     "m_rms": [1.0], "v_mean": [1.0], "u_max": [1.0]})
    >>> force_table(products, {})[["norm_sq", "alignment", "injection", "residual"]]
       norm_sq  alignment  injection  residual
    0      7.0        1.0        1.0       0.0
    """
    if at not in ("before", "after"):
        raise ValueError(f"at must be 'before' or 'after', got {at!r}")
    tensor = pd.Categorical(products["tensor"])
    tensor = tensor.set_categories(in_model_order(tensor.categories, tensors))
    lr, weight_decay, dot_wu, u_sq, w_sq, after, audit = (
        products[name].to_numpy(dtype=float)
        for name in ("lr", "weight_decay", "dot_wu", "u_sq", "norm_sq", "norm_sq_after", "norm_sq_audit")
    )
    names = named_columns(tensor, tensors)
    numel = names["numel"].to_numpy(dtype=float, na_value=math.nan)
    # A diverged run has inf and NaN, a tensor of zeros no direction: they pass through without a warning.
    with np.errstate(all="ignore"):
        products_at = Products(dot_wu, u_sq, w_sq)
        if at == "after":
            products_at = after_step(*products_at, lr, weight_decay)
        forces = forces_from_products(*products_at, lr, weight_decay, order=order)
        columns = {
            "step": products["step"].to_numpy(dtype=np.int64),
            "span": products["span"].to_numpy(dtype=np.int64),
            "tensor": tensor,
            **names,
            "lr": lr,
            "weight_decay": weight_decay,
            "norm_sq": w_sq,
            "norm_sq_after": after,
            **forces._asdict(),
            "u_sq": u_sq,
            "dot_wu": dot_wu,
            "u_rms": np.sqrt(u_sq / numel),
            "relative_update": relative_update(u_sq, w_sq, lr),
            "angle": angle(dot_wu, u_sq, w_sq, lr, weight_decay),
            **{name: products[name].to_numpy(dtype=float) for name in ("m_rms", "v_mean", "u_max")},
            "residual": (after - audit) - sum(forces),
        }
    return pd.DataFrame(columns, copy=False)


def in_model_order(labels: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """Labels as run.json's tensor table has them; those it lacks behind, by name."""
    position = {label: i for i, label in enumerate(tensors)}
    return sorted(labels, key=lambda label: (position.get(label, len(position)), label))


def named_columns(tensor: pd.Categorical, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Columns layer, component, role and numel of a column of labels, from run.json's tensor table."""
    entries = [table.get(label, {}) for label in tensor.categories]
    layers = pd.array([entry.get("layer") for entry in entries], dtype="Int64")
    columns: dict[str, Any] = {"layer": layers.take(tensor.codes)}
    for name in ("component", "role"):
        values = np.array([entry.get(name, "other") for entry in entries], dtype=object)
        codes, categories = pd.factorize(values)
        columns[name] = pd.Categorical.from_codes(codes[tensor.codes], categories=categories)
    numel = pd.array([entry.get("numel") for entry in entries], dtype="Int64").take(tensor.codes)
    columns["numel"] = pd.Series(numel if numel.isna().any() else numel.astype(np.int64))
    return columns


FIT_TABLE = {
    "tensor": "name of the parameter, with [view] behind it for a part of a fused tensor",
    "layer": "block index; missing outside the blocks",
    "component": "q k v qkv o gate up down embed unembed norm bias other",
    "role": "selection (q, k), transmission (o, gate, up, down), value (v), other",
    "numel": "number of weights",
    "k": "shape of the Weibull law",
    "lam": "scale λ of the Weibull law, in units of the weights",
    "r_squared": "R² of the trimmed probability plot",
    "ks": "Kolmogorov-Smirnov distance between the law and the whole sample",
    "n": "number of non-zero finite magnitudes, those that were fitted",
    "rms": "root mean square of the weights, zeros included",
    "lam_over_rms": "λ/rms: 1/√Γ(1+2/k) for a Weibull law, 0.88749 for a normal initialisation",
    "q90_q10": "ratio of the 90 % and the 10 % quantile of |w|",
    "q99_q50": "ratio of the 99 % quantile and the median",
    "q999_q50": "ratio of the 99.9 % quantile and the median",
    "gini": "Gini coefficient of |w|",
    "kurtosis": "mean w⁴ over squared mean w²; 3 for a normal law",
    "top_share": "share of ‖w‖² in the largest 0.01 % of the weights",
    "second_share": "share of the weights in a second population; 0 if there is none",
    "note": "what makes the fit doubtful or impossible; empty if nothing",
}
"""Columns of a table of fits and their meaning."""

CHECKPOINT_TABLE = {
    "step": "updates done when the checkpoint was written; 0 is the initialization",
    **{name: FORCE_TABLE[name] for name in ("tensor", "layer", "component", "role", "numel")},
    "dtype": "float type that the tensor is stored in",
    "precision": "float type that its values fit into: float16 for a float32 copy of float16",
    "norm_sq": "‖W‖², accumulated in float64",
    "rounding": "expected ‖W − stored W‖² if the weights were rounded to `precision`: Σ ulp(w)²/12",
    "hash": "of the bytes of the whole stored tensor: equal for equal content",
    "k": "shape k of the Weibull law of |w|; NaN if it was not fitted",
    "lam": "scale λ of the Weibull law of |w|, in units of the weights",
    "r_squared": "R² of the straight line in the probability plot",
    "ks": "Kolmogorov-Smirnov distance between the law and the weights",
    "n": "number of magnitudes behind the fit",
    "dots": "⟨W_i, W_j⟩ with each step j of the series up to this one, i; NaN where it was not asked for",
}
"""Columns of a measured series and their meaning."""

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
