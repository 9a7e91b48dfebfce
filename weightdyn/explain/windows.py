"""Means over windows of a run, with standard errors: what a single update says of the drift is mostly noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_whole
from weightdyn.core.tables import (
    FORCES,
    PARTS,
    SMOOTH_TABLE,
    By,
    aggregate,
    check_columns,
    check_force_table,
    diffusion,
    group_columns,
    group_numbers,
    in_order,
    kappa,
)

if TYPE_CHECKING:
    from weightdyn.record.runlog import RunLog


def smooth(
    table: pd.DataFrame | RunLog,
    by: By | Sequence[str] | None = None,
    *,
    windows: int = 10,
    updates: int | None = None,
) -> pd.DataFrame:
    """Average the forces over windows of updates, with standard errors of drift, memory and κ.

    The mean of a window is weighted by the rows' spans. Drift's noise is that of the fresh gradient, new in every
    update, so its standard error is that of independent values about a straight line in the step. Memory's noise
    goes up and down with the last 1/(1−β₁) updates and cancels over more of them; its standard error takes the
    autocovariances of up to √rows lags with Bartlett's weights (Newey and West 1987), which errs to the large
    side.

    Args:
        table: a force table or a `RunLog`.
        by: sum it over the tensors of each "layer", "component", "role", over the "model", or over a list of such
            columns first (`aggregate`); None takes each tensor by itself.
        windows: so many windows of equally many updates, from the table's first to its last.
        updates: updates of a window instead; the windows end at their multiples.

    Returns:
        A force table with a row for each window and tensor (or group), with the columns of `SMOOTH_TABLE`: forces
        are means per update, `norm_sq` is that before the window's first row and `norm_sq_after` that after its
        last, and `span` reaches from one to the other. `lr` and `weight_decay` are means. A standard error of fewer
        than eight rows is NaN, and so is κ where white noise makes no memory (β₁ = 0).

    Raises:
        TypeError, ValueError: not a force table; two rows of one tensor at one update; an unknown `by`.

    >>> t = pd.DataFrame({"step": [1, 2, 3, 4], "span": 1, "norm_sq": [4.0, 5.0, 6.0, 8.0],
    ...                   "alignment": [1.0, 1, 2, 2], "injection": 0.5, "decay": -0.5,
    ...                   "drift": [0.25, 0.75, 1.0, 2.0], "memory": [0.75, 0.25, 1, 0]})
    >>> smooth(t, windows=2)[["step", "span", "norm_sq", "alignment", "drift", "memory"]].to_numpy().tolist()
    [[2.0, 2.0, 4.0, 1.0, 0.5, 0.5], [4.0, 2.0, 6.0, 2.0, 1.5, 0.5]]
    """
    check_whole("windows", windows, 1, 2**20)
    check_whole("updates", updates, 1, 2**53, none="as many as windows= gives")
    rows = check_force_table(table, unique=True) if by is None else aggregate(table, by)
    check_columns(
        rows, [name for name in ("lr", "weight_decay", "norm_sq_after") if name in rows], "force table"
    )
    if rows.empty:
        return rows.reindex(columns=[name for name in SMOOTH_TABLE if name in rows or name not in PARTS])
    keys = group_columns(rows, None)
    rows = rows.sort_values("step", kind="stable", ignore_index=True)
    step, span = rows["step"].to_numpy(np.int64), rows["span"].to_numpy(np.int64)
    if updates is None:
        first = step.min() - 1
        window = (step - 1 - first) * windows // (step.max() - first)
    else:
        window = (step - 1) // updates
    group = group_numbers(rows, keys)
    order = np.lexsort((step, window, group))
    starts = np.flatnonzero(np.append(True, (np.diff(group[order]) != 0) | (np.diff(window[order]) != 0)))
    ends = np.append(starts[1:], len(order)) - 1
    rows, weight = rows.iloc[order].reset_index(drop=True), span[order].astype(float)
    head, tail = rows.iloc[starts].reset_index(drop=True), rows.iloc[ends].reset_index(drop=True)
    total = np.add.reduceat(weight, starts)
    means = {
        name: np.add.reduceat(weight * rows[name].to_numpy(float), starts) / total
        for name in ("lr", "weight_decay", *FORCES, *PARTS)
        if name in rows
    }
    if "signal" in rows:  # which a first update never has
        signal = rows["signal"].to_numpy(float)
        known = ~np.isnan(signal)
        counted = np.add.reduceat(weight * known, starts)
        sums = np.add.reduceat(np.where(known, weight * signal, 0.0), starts)
        means["signal"] = np.where(counted > 0, sums / np.where(counted > 0, counted, 1.0), np.nan)
    out = head.assign(
        step=tail["step"],
        span=tail["step"] - head["step"] + head["span"],
        rows=ends - starts + 1,
        **means,
    )
    if "norm_sq_after" in rows:
        out["norm_sq_after"] = tail["norm_sq_after"]
    if "drift" in rows and "memory" in rows:
        out["diffusion"] = diffusion(out)
        parts = [slice(start, end + 1) for start, end in zip(starts, ends, strict=True)]
        at = rows["step"].to_numpy(float)
        for name, lags in (("drift", False), ("memory", True)):
            values = rows[name].to_numpy(float)
            out[f"{name}_se"] = [_standard_error(at[part], values[part], lags) for part in parts]
    if "memory_null" in out and "memory_se" in out:
        out["kappa"], out["kappa_se"] = kappa(out), kappa(out.assign(memory=out["memory_se"])).abs()
    out = out.assign(window=window[order][starts]).sort_values(
        ["window", "step"], kind="stable", ignore_index=True
    )
    return in_order(out, SMOOTH_TABLE)


_FEWEST = 8
"""Rows of which a standard error can be told."""


def _standard_error(at: np.ndarray, values: np.ndarray, lags: bool) -> float:
    """Of the mean of values about a straight line; with their autocovariances of up to √n lags."""
    n = len(values)
    if n < _FEWEST or not np.isfinite(values).all():
        return float("nan")
    at = at - at.mean()
    rest = values - values.mean() - at * (at @ values) / (at @ at)
    variance = rest @ rest
    if lags:
        most = int(np.sqrt(n))
        variance += 2 * sum((1 - lag / (most + 1)) * (rest[lag:] @ rest[:-lag]) for lag in range(1, most + 1))
    return float(np.sqrt(max(variance, 0.0) / (n - 2) / n))
