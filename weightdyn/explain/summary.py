"""A run in a few rows: how λ rose, overshot and relaxed, and which force was at work when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from weightdyn.core.naming import ROLES
from weightdyn.core.tables import (
    FORCES,
    SUMMARY_TABLE,
    By,
    aggregate,
    check_force_table,
    check_weibull_table,
    group_columns,
    in_order,
)
from weightdyn.explain.trajectory import closure, phases, pool_weibull

if TYPE_CHECKING:
    from weightdyn.record.runlog import RunLog


def summarize(run: RunLog, by: By | Sequence[str] | None = "role") -> pd.DataFrame:
    """The phases of λ, alignment's share in the rise and at the end, and the worst closure, group by group.

    The share is |ΣA|/(|ΣA| + |ΣI| + |ΣD|) of the forces summed over the group's tensors and over the updates of the
    rise (up to `half_step` of `phases`; NaN if λ never rose), or over the last tenth of the run.

    Args:
        run: a `RunLog` with forces and Weibull fits (`weibull_every=…`).
        by: a row for each "layer", "component", "role", for the whole "model", for a list of such columns, or,
            with None, for each tensor.

    Returns:
        One row per group that has fits, with the columns of `SUMMARY_TABLE`.

    Raises:
        TypeError, ValueError: not such a run; an unknown `by`.
    """
    forces = check_force_table(run, argument="run", empty=False)
    table = phases(pool_weibull(check_weibull_table(run, argument="run", empty=False), by))
    keys = group_columns(forces, by)
    if keys == ["role"]:
        table = (
            table.set_index("role")
            .reindex([role for role in ROLES if role in set(table["role"])])
            .reset_index()
        )
    worst = closure(forces)
    sums = aggregate(forces, by)
    last = sums["step"].max()
    rise, end, closures = [], [], []
    for _, row in table.iterrows():
        own = _rows_of(sums, row[keys])
        rise.append(_alignment_share(own[own["step"] <= row["half_step"]]))
        end.append(_alignment_share(own[own["step"] >= 0.9 * last]))
        closures.append(_rows_of(worst, row[keys])["closure"].max())
    return in_order(table.assign(rise_share=rise, end_share=end, closure=closures), SUMMARY_TABLE)


def _rows_of(table: pd.DataFrame, place: pd.Series) -> pd.DataFrame:
    for key, value in place.items():
        column = table[key]
        table = table[column.isna() if pd.isna(value) else column.eq(value).fillna(False).astype(bool)]
    return table


def _alignment_share(rows: pd.DataFrame) -> float:
    totals = rows[list(FORCES)].mul(rows["span"], axis=0).sum().abs()
    return float(totals["alignment"] / totals.sum()) if len(rows) else float("nan")
