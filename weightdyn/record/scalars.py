"""The last logged update as a flat dict of floats, for whatever draws numbers while a model trains.

A dashboard wants a few names that always mean the same: forces/<group>/<quantity> and weibull/<group>/<quantity>. A
group is a role, or whatever `by` says. Its tensors count as one vector, their weights side by side: squared norms
and forces add, and so do the products behind the angle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from weightdyn.core.forces import angle, relative_update
from weightdyn.core.naming import split_label
from weightdyn.core.tables import (
    FORCES,
    By,
    budget,
    group_columns,
    group_numbers,
    named_columns,
    pool_weibull,
)

SCALARS = {
    **{f"forces/<group>/{name}_share": f"|{name}|/Σ|F| over the three forces" for name in FORCES},
    "forces/<group>/drift_signed_share": "drift/Σ|F| over the three forces, with its sign",
    "forces/<group>/memory_signed_share": "memory/Σ|F| over the three forces, with its sign",
    "forces/<group>/relative_update": "η‖u‖/‖w‖",
    "forces/<group>/angle": "radians that the update turned the group's weights",
    "forces/<group>/norm": "‖w‖ before the update",
    "weibull/<group>/lam": "scale λ of the Weibull law of |w|, pooled as `pool_weibull` does",
    "weibull/<group>/k": "shape k of it, pooled likewise",
}
"""Names of the scalars of an update, and their meaning."""


def flat_scalars(
    forces: pd.DataFrame,
    fits: pd.DataFrame,
    tensors: Mapping[str, Mapping[str, Any]],
    by: By | Sequence[str] | None,
) -> dict[str, float]:
    """The scalars of one update, by the names of `SCALARS`.

    Args:
        forces: force table of one update, with the columns of `LOG_TABLE`; may have no rows.
        fits: step, tensor, lam, k and n of the latest Weibull fits; may have no rows.
        tensors: label -> {"stack", "layer", "component", "role", "numel"}, for the fits.
        by: "layer", "component", "role", "model", a list of such columns, or None for each tensor by itself.

    Returns:
        Floats in the order of the groups' first rows. The signed shares of a group are left out where the drift of
        one of its tensors was not measured; any other number that is not known is NaN.

    Raises:
        ValueError: an unknown `by`.
    """
    keys = group_columns(forces, by)
    found: dict[str, float] = {}
    if forces.empty:
        return found
    numbers = group_numbers(forces, keys)
    quantities = _quantities(forces, numbers)
    first = forces.iloc[np.unique(numbers, return_index=True)[1]]
    for i, label in enumerate(_labels(first, keys)):
        values = {name: float(column[i]) for name, column in quantities.items()}
        unmeasured = np.isnan(values["drift_signed_share"])
        found |= {
            f"forces/{label}/{name}": value
            for name, value in values.items()
            if not (unmeasured and name.endswith("signed_share"))
        }
    if len(fits):
        tensor = pd.Categorical(fits["tensor"])
        pooled = pool_weibull(fits.assign(tensor=tensor, **named_columns(tensor, tensors)), by)
        for label, lam, k in zip(_labels(pooled, keys), pooled["lam"], pooled["k"], strict=True):
            found |= {f"weibull/{label}/lam": float(lam), f"weibull/{label}/k": float(k)}
    return found


def _quantities(table: pd.DataFrame, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """One value for each group."""

    def total(values: pd.Series) -> np.ndarray:
        return np.bincount(numbers, values)  # of a missing value: NaN

    lr, decay = table["lr"], table["weight_decay"]
    names = ("norm_sq", *FORCES, "drift", "memory")
    sums = pd.DataFrame({name: total(table[name]) for name in names}).assign(step=0, span=1)
    shares = budget(sums)
    # Δ = w' − w of all tensors, each with the η and λ of its own.
    along = total(-lr * decay * table["norm_sq"] - lr * table["dot_wu"])  # ⟨w,Δ⟩
    moved = total(lr**2 * (table["u_sq"] + 2 * decay * table["dot_wu"] + decay**2 * table["norm_sq"]))  # ‖Δ‖²
    norm_sq = sums["norm_sq"].to_numpy()
    with np.errstate(all="ignore"):  # a diverged run has inf and NaN, a tensor of zeros no direction
        budget_sum = sums[[*FORCES]].abs().sum(axis=1, skipna=False).replace(0, np.nan)
        columns = {
            **{f"{name}_share": shares[f"{name}_share"] for name in FORCES},
            **{f"{name}_signed_share": sums[name] / budget_sum for name in ("drift", "memory")},
            "relative_update": relative_update(sums["injection"].to_numpy(), norm_sq, 1.0),
            "angle": angle(-along, moved, norm_sq, 1.0, 0.0),
            "norm": np.sqrt(norm_sq),
        }
    return {name: np.asarray(values, dtype=float) for name, values in columns.items()}


def _labels(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """What each row's group is called: its columns' values with / between.

    >>> _labels(pd.DataFrame({"stack": ["model", ""], "layer": [3, pd.NA]}), ["stack", "layer"])
    ['model/3', 'outside']
    >>> _labels(pd.DataFrame({"tensor": ["qkv.weight[q]"], "role": ["selection"]}), ["tensor", "role"])
    ['qkv.weight/q']
    """
    if not keys:
        return ["model"] * len(table)
    if "tensor" in keys:  # whose name says the rest
        return ["/".join(filter(None, split_label(label))) for label in table["tensor"]]
    rows = table[[*keys]].astype(object).itertuples(index=False)
    words = (["outside" if pd.isna(value) else str(value) for value in row] for row in rows)
    return ["/".join(filter(None, row)) for row in words]
