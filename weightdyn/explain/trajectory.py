"""What the forces add up to over a run: integration, closure, equilibrium, and the phases of a trajectory.

One formula carries this module. Row j of a tensor covers `span` updates at its own mean force F_j = alignment
+ injection + decay; the h updates between it and the row i before it were not logged, and their force is
interpolated linearly in the step between the centres of the two spans. So ‖w‖² changes from row i to row j by

    span_j·F_j + h·( F_i + (F_j − F_i)·(span_i + h) / (span_i + span_j + 2h) )

which is the forces themselves, and exact, where every update has a row (h = 0). `integrate` sums it up from
the first row; `closure` holds each term against the measured change.

Nothing is interpolated across a gap. A gap is a stretch without rows of this tensor where other tensors of
the table do have rows (it had no gradient there, or was not selected), or one that is longer than the logging
intervals on both sides of it (rows lost with a killed run), or one across which `numel` of a sum of tensors
changes (the sums are not over the same tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_text
from weightdyn.core.tables import (
    CLOSURE_TABLE,
    DRIFT_FORCES,
    FORCE_TABLE,
    FORCES,
    IDENTITY,
    INTEGRAL_TABLE,
    PARTS,
    PHASE_TABLE,
    By,
    aggregate,
    check_columns,
    check_force_table,
    diffusion,
    group_columns,
    group_numbers,
    in_order,
    table_of,
)
from weightdyn.explain.windows import smooth

if TYPE_CHECKING:
    from weightdyn.record.runlog import RunLog


def integrate(table: pd.DataFrame | RunLog) -> pd.DataFrame:
    """Predict ‖w‖² by summing the forces from the first row on, beside the measured ‖w‖².

        predicted(t_0) = norm_sq_0 + span_0·F_0
        predicted(t_j) = predicted(t_i) + change from row i to row j, as this module's opening has it

    Across a gap the measured change stands in for the forces that are not known: the error made before the gap is
    kept, and none is made up. What each force has added is summed up in the same way, without what a gap hides.

    Args:
        table: a force table or a `RunLog`; each tensor (or group, if it was summed) is integrated on its own.

    Returns:
        One row per row of the table, tensor by tensor in ascending steps, with the columns of `INTEGRAL_TABLE`
        (of those that name the tensor, those that the table has).

    Raises:
        TypeError, ValueError: not a force table; two rows of one tensor that cover the same update.

    >>> t = pd.DataFrame({"step": [1, 3], "span": 1, "norm_sq": [8.0, 10.5], "norm_sq_after": [9.0, 12.5],
    ...                   "alignment": [2.0, 3.0], "injection": 0.5, "decay": -1.5})
    >>> integrate(t)[["step", "norm_sq_after", "norm_sq_predicted"]].to_numpy().tolist()
    [[1.0, 9.0, 9.0], [3.0, 12.5, 12.5]]
    """
    forces = check_force_table(table, empty=False)
    path = _path(forces)
    change = np.where(path.gap, path.bridged, path.change)
    change[path.first] += forces["norm_sq"].to_numpy(float)[path.order][path.first]
    starts = np.flatnonzero(path.first)
    sums = [np.cumsum(part) for part in np.split(change, starts[1:])]
    rows = forces.iloc[path.order].reset_index(drop=True)
    predicted = np.concatenate(sums)
    rows = rows.assign(norm_sq_after=path.after, norm_sq_predicted=predicted, gap=path.gap)
    for name in (*FORCES, *PARTS):
        if name in INTEGRAL_TABLE and name in rows:
            values = rows[name].to_numpy(float)
            added = np.where(path.gap, path.span * values, path.added(values))
            rows[name] = np.concatenate([np.cumsum(part) for part in np.split(added, starts[1:])])
    return in_order(rows, INTEGRAL_TABLE)


def closure(table: pd.DataFrame | RunLog, by: By | Sequence[str] | None = None) -> pd.DataFrame:
    """How well the forces account for the measured change of ‖w‖²: Σ|residual| / Σ|Δ‖w‖²|.

    A term is the way from one row's ‖w'‖² to the next row's, and its residual is the measured change less the
    one that this module's formula gives. With a row for every update that is a check of each update against
    the measurement of the one before it: rounding, 1e-7 to 1e-4 in float32. With rows further apart it also
    holds what interpolation misses. A row that was audited (`residual` is there and not NaN) is held against
    its own update alone instead, so `closure(table[table["residual"].notna()])` is free of interpolation.

    Args:
        table: a force table, of tensors or of sums, or a `RunLog`.
        by: add up the terms of "layer", "component", "role", "model" (everything) or a list of columns;
            None keeps a row for each tensor (or group, if the table was summed).

    Returns:
        One row per tensor or group, in the table's order, with the columns of `CLOSURE_TABLE`; what a gap is
        says this module's opening. The worst tensors are `closure(run).nlargest(3, "closure")`, the pooled figure
        is `closure(run, by="model")["closure"].item()`.

    Raises:
        TypeError, ValueError: not a force table; two rows that cover the same update; an unknown `by`.

    >>> t = pd.DataFrame({"step": [1, 2, 3], "span": 1, "norm_sq": [8.0, 9.0, 10.0],
    ...                   "norm_sq_after": [9.0, 10.0, 12.0], "alignment": [1.0, 1.0, 1.5],
    ...                   "injection": 0.5, "decay": -0.5})
    >>> closure(t)[["updates", "residual", "change", "closure"]].to_numpy().tolist()
    [[2.0, 0.5, 3.0, 0.16666666666666666]]
    """
    forces = check_force_table(table, empty=False)
    keys = group_columns(forces, by)
    path = _path(forces)
    rows = forces.iloc[path.order].reset_index(drop=True)
    before = np.where(path.first, np.nan, _shift(path.after))
    measured = np.where(path.gap, np.nan, path.after - before)
    residual = measured - path.change
    updates = path.updates
    if "residual" in rows:
        audited = rows["residual"].to_numpy(float)
        known = ~np.isnan(audited)
        own = path.span * path.net
        residual = np.where(known, audited, residual)
        measured = np.where(known, audited + own, measured)
        updates = np.where(known, path.span, updates)

    counted = np.isfinite(residual)
    terms = pd.DataFrame(
        {
            "updates": np.where(counted, updates, 0),
            "gaps": path.gap.astype(int),
            "residual": np.where(counted, np.abs(residual), 0.0),
            "change": np.where(counted, np.abs(measured), 0.0),
        }
    )
    groups = group_numbers(rows, keys)
    sums = terms.groupby(groups).sum()
    identity = rows[keys].iloc[np.unique(groups, return_index=True)[1]].reset_index(drop=True)
    out = pd.concat([identity, sums.reset_index(drop=True)], axis=1)
    if "memory" in rows and "memory_null" in rows:
        known = rows[rows["memory"].notna() & rows["memory_null"].notna()]
        kappa = smooth(known, by, windows=1).reindex(columns=[*keys, "kappa", "kappa_se"])
        out = out.merge(kappa, on=keys, how="left") if keys else pd.concat([out, kappa], axis=1)
    return in_order(out.assign(closure=out["residual"] / out["change"]), CLOSURE_TABLE)


def equilibrium(table: pd.DataFrame | RunLog, by: By | Sequence[str] | None = None) -> pd.DataFrame:
    """Norm at which the forces would cancel: ‖w‖²_eq = ‖w‖²·(alignment + injection)/|decay|.

    Decay is the force that is proportional to ‖w‖²; with the other two as they stand at this update, the norm
    rises below ‖w‖²_eq and falls above it. It moves as they move, and is negative where a negative alignment
    outweighs injection: nothing holds the norm up then.

    Args:
        table: a force table or a `RunLog`. Forces of single updates are noisy: average the result over many rows.
        by: sum it over the tensors of each group first, as `aggregate` does; None takes the rows as they are.

    Returns:
        The table with the column `equilibrium` (NaN or infinite where there is no decay).

    >>> t = pd.DataFrame({"step": [1], "span": [1], "norm_sq": [4.0],
    ...                   "alignment": [0.75], "injection": [0.25], "decay": [-0.5]})
    >>> equilibrium(t)["equilibrium"].item()
    8.0
    """
    forces = check_force_table(table) if by is None else aggregate(table, by)
    growth = forces["alignment"] + forces["injection"]
    return forces.assign(equilibrium=-forces["norm_sq"] * growth / forces["decay"])


def phases(
    table: pd.DataFrame | RunLog, value: str = "lam", *, forces: pd.DataFrame | RunLog | None = None
) -> pd.DataFrame:
    """Rise, peak and relaxation of a trajectory, group by group.

    The peak is that of a running median over 2·⌊rows/50⌋+1 rows (at least 3; shorter, and centred, towards
    the ends), so one stray value is none. It is an overshoot where the start and the end both lie below it by
    more than 4 standard deviations of the values about that median, the end by more than 1 % of the rise too.

    Args:
        table: a trajectory with `step`, `value` and whichever of `tensor`, `layer`, `component`, `role` tell
            its groups apart: `RunLog.weibull()`, `pool_weibull(…)`, a published trajectory, a force table; or a
            `RunLog`, whose Weibull table is taken, and its force table where that has `value`.
        value: the column to follow: "lam", "k", "sigma", "norm_sq", …
        forces: a force table or a `RunLog` that says what drives the rise, of the same tensors or of finer ones,
            which are summed. Default: the table itself where it is one or a `RunLog` has one.

    Returns:
        One row per group, in the table's order, with the columns of `PHASE_TABLE`. Growth is at its strongest up
        to `half_step`; shares of the forces "in the rise" are meant up to there. Rows where `value` is NaN do not
        count; a group without any other row is left out.

    Raises:
        TypeError, ValueError: not a table; a column is missing; two rows of one group at the same step.

    >>> t = pd.DataFrame({"step": range(1, 9), "lam": [1.0, 2.0, 3.0, 3.5, 3.6, 3.5, 3.2, 3.0]})
    >>> phases(t)[["half_step", "peak_step", "peak", "end_step", "end", "overshoot"]].to_dict("records")
    [{'half_step': 3, 'peak_step': 5, 'peak': 3.5, 'end_step': 8, 'end': 3.0, 'overshoot': True}]
    """
    check_text("value", value, "the name of a column")
    kind = "forces" if value in FORCE_TABLE else "weibull"
    rows = check_columns(table_of(table, kind), ("step",), "trajectory")
    if value not in rows:
        raise ValueError(f"value must be one of the table's columns {list(rows.columns)}, got {value!r}")
    check_columns(rows, (value,), "trajectory")
    keys = group_columns(rows, None)
    rows = rows[rows[value].notna()].sort_values("step", kind="stable")
    groups = group_numbers(rows, keys)
    steps, values = rows["step"].to_numpy(), rows[value].to_numpy(float)
    found: list[dict[str, object]] = []
    firsts: list[int] = []
    for own in _rows_of(groups):
        step, x = steps[own], values[own]
        if (np.diff(step) == 0).any():
            at = step[:-1][np.diff(step) == 0][0]
            raise ValueError(
                f"table has two rows at step {at} for one group of {keys or 'the whole table'}; "
                f"pool it first (pool_weibull, aggregate) or keep the columns that tell them apart"
            )
        firsts.append(own[0])
        found.append(_phases_of(step, x))
    identity = rows[keys].iloc[firsts].reset_index(drop=True)
    columns = [name for name in PHASE_TABLE if name not in (*IDENTITY, "driven_by")]
    out = pd.concat([identity, pd.DataFrame(found, columns=columns)], axis=1)
    own = set(FORCES) <= set(rows) if isinstance(table, pd.DataFrame) else hasattr(table, "forces")
    source = table if forces is None and own else forces
    return out.assign(driven_by=pd.Series(_driven_by(source, out, keys), index=out.index, dtype="object"))


def _driven_by(
    source: pd.DataFrame | RunLog | None, found: pd.DataFrame, keys: list[str]
) -> list[str | None]:
    """Of each group's forces, the one that adds most to ‖w‖² up to the peak."""
    nothing: list[str | None] = [None] * len(found)
    if source is None:
        return nothing
    forces = check_force_table(source, argument="forces", unique=True)
    if "drift" not in forces or "memory" not in forces:
        return nothing
    if missing := [key for key in keys if key not in forces]:
        raise ValueError(f"forces lacks the columns {missing}, which tell the table's groups apart")
    drivers: list[str | None] = []
    for _, row in found.iterrows():
        own = rows_at(forces, row[keys])
        added = added_by(own[own["step"] <= row["peak_step"]])[list(DRIFT_FORCES)]
        rose = row["peak"] > row["start"] and added.notna().all()
        drivers.append(str(added.idxmax()) if rose else None)
    return drivers


def added_by(rows: pd.DataFrame) -> pd.Series:
    """What each force, and diffusion, added to ‖w‖² over the rows of some tensors; NaN where it is not known."""
    names = list(dict.fromkeys((*FORCES, *DRIFT_FORCES)))
    if rows.empty:
        return pd.Series(np.nan, index=names)
    sums = integrate(rows)
    last = sums.groupby(group_numbers(sums, group_columns(sums, None))).tail(1)
    added = last.reindex(columns=["memory", *names]).astype(float).sum(skipna=False)
    added["diffusion"] = diffusion(added)
    return added[names]


def rows_at(table: pd.DataFrame, place: pd.Series) -> pd.DataFrame:
    """The rows of a table that lie in one group: whose columns have the values of `place`."""
    for key, value in place.items():
        column = table[key]
        table = table[column.isna() if pd.isna(value) else column.eq(value).fillna(False).astype(bool)]
    return table


def _phases_of(step: np.ndarray, x: np.ndarray) -> dict[str, object]:
    smooth = _running_median(x, half=max(1, len(x) // 50))
    tops = np.flatnonzero(smooth == smooth.max())
    top = int(tops[x[tops].argmax()])  # a running median is flat at a peak: the raw values say which row
    peak, start, end = float(smooth[top]), float(x[0]), float(x[-1])
    clear = 4 * float(np.std(x - smooth))
    half = int(np.argmax(smooth >= (start + peak) / 2))
    return {
        "start_step": int(step[0]),
        "start": start,
        "half_step": int(step[half]),
        "peak_step": int(step[top]),
        "peak": peak,
        "end_step": int(step[-1]),
        "end": end,
        "rise": (peak - start) / start if start else np.nan,
        "relaxation": (peak - end) / peak if peak else np.nan,
        "overshoot": peak - start > clear and peak - end > max(0.01 * (peak - start), clear),
    }


def _running_median(x: np.ndarray, half: int) -> np.ndarray:
    """Centred running median over 2·half+1 values; the window shrinks to 1 at the ends to stay centred."""
    out = x.astype(float)
    n = len(x)
    for width in range(1, min(half, (n - 1) // 2) + 1):
        if width < half:
            for i in (width, n - 1 - width):
                out[i] = np.median(x[i - width : i + width + 1])
        else:
            windows = np.lib.stride_tricks.sliding_window_view(x, 2 * width + 1)
            out[width : n - width] = np.median(windows, axis=1)
    return out


class _Path(NamedTuple):
    """A force table's rows in order of tensor and step, as arrays of that order."""

    order: np.ndarray  # positions in the table
    first: np.ndarray  # bool: a tensor's first row
    span: np.ndarray
    updates: np.ndarray  # since the row before; `span` for a first row
    net: np.ndarray  # sum of the forces, per update
    after: np.ndarray  # ‖w‖² after the row's last update, NaN where unknown
    gap: np.ndarray  # bool: the forces of the stretch before the row are unknown
    change: np.ndarray  # of ‖w‖² since the row before by the forces; over its own span for a first row
    bridged: np.ndarray  # the same with the measured change in place of what was not logged

    def added(self, force: np.ndarray) -> np.ndarray:
        """What a force, one value for each row, has added to ‖w‖² since the row before."""
        return _added(force, self.span, self.updates - self.span)


def _added(force: np.ndarray, span: np.ndarray, unlogged: np.ndarray) -> np.ndarray:
    """The formula of this module's opening, rows in order of tensor and step; `unlogged` is h, 0 for a first."""
    force_i, span_i = _shift(force), _shift(span)
    between = force_i + (force - force_i) * (span_i + unlogged) / (span_i + span + 2 * unlogged)
    return span * force + np.where(unlogged > 0, unlogged * between, 0.0)


def _path(table: pd.DataFrame) -> _Path:
    keys = group_columns(table, None)
    group = group_numbers(table, keys)
    step = table["step"].to_numpy(np.int64)
    order = np.lexsort((step, group))
    rows = table.iloc[order]
    group, step = group[order], step[order]
    span = rows["span"].to_numpy(np.int64)
    net = rows[list(FORCES)].to_numpy(float).sum(axis=1)
    norm_sq = rows["norm_sq"].to_numpy(float)

    first = np.append(True, group[1:] != group[:-1])[: len(rows)]
    updates = np.where(first, span, step - _shift(step))
    unlogged = updates - span
    if (unlogged < 0).any():
        at = int(np.flatnonzero(unlogged < 0)[0])
        who = rows[keys].iloc[at].to_dict() if keys else "one tensor"
        raise ValueError(
            f"table has two rows that both cover update {step[at] - span[at] + 1} of {who}: "
            f"rows must not overlap; do not join tables of different runs, or of views and their whole"
        )

    own = span * net
    change = _added(net, span, unlogged)

    after = rows["norm_sq_after"].to_numpy(float) if "norm_sq_after" in rows else np.full(len(rows), np.nan)
    meets_next = np.append(~first[1:] & (unlogged[1:] == 0), False)[: len(rows)]
    after = np.where(np.isnan(after) & meets_next, np.roll(norm_sq, -1), after)

    gap = ~first & (unlogged > 0) & _skips(step)
    if "numel" in rows:
        numel = rows["numel"].to_numpy(float)
        gap |= ~first & (numel != _shift(numel))
    known = np.where(np.isnan(after), norm_sq + own, after)
    bridged = norm_sq - _shift(known) + own
    return _Path(order, first, span, updates, net, after, gap, change, bridged)


def _skips(step: np.ndarray) -> np.ndarray:
    """Whether the way from the row before leaves out steps that the table has, or is too long for its log.

    Too long: longer than the logging intervals on both sides of it. The last one has only one side, and
    schedules that double their interval end like that, so it may be twice as long.
    """
    grid, place = np.unique(step, return_inverse=True)
    width = np.diff(grid).astype(float)
    before = np.append(np.nan, width)[: len(width)]
    after = np.append(width[1:], 2 * before[-1:])[: len(width)]
    too_long = np.append(False, width > np.fmax(before, after))
    return (place - _shift(place) != 1) | too_long[place]


def _shift(x: np.ndarray) -> np.ndarray:
    """The value of the row before; the first row keeps its own."""
    return np.concatenate([x[:1], x[:-1]])


def _rows_of(groups: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(groups) else []
