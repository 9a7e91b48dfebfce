"""A run in a few rows: how λ rose, overshot and relaxed, and which force was at work when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from weightdyn.core.naming import ROLES
from weightdyn.core.tables import (
    DRIFT_FORCES,
    FORCES,
    SUMMARY_TABLE,
    By,
    check_force_table,
    check_weibull_table,
    group_columns,
    in_order,
    pool_weibull,
)
from weightdyn.explain.trajectory import added_by, closure, phases, rows_at

if TYPE_CHECKING:
    from weightdyn.record.runlog import RunLog


def summarize(run: RunLog, by: By | Sequence[str] | None = "role") -> pd.DataFrame:
    """The phases of λ, what drove them, κ and the worst closure, group by group.

    Shares are of the forces summed over the group's tensors and over the updates of the rise (up to `half_step` of
    `phases`; NaN if λ never rose), or over the last tenth of the run: alignment's |ΣA|/(|ΣA| + |ΣI| + |ΣD|), and,
    with their signs, drift's and diffusion's among drift, diffusion and decay.

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
    table = phases(pool_weibull(check_weibull_table(run, argument="run", empty=False), by), forces=forces)
    keys = group_columns(forces, by)
    if keys == ["role"]:
        table = (
            table.set_index("role")
            .reindex([role for role in ROLES if role in set(table["role"])])
            .reset_index()
        )
    worst = closure(forces)
    kappa = closure(forces, by)
    last = forces["step"].max()
    found = []
    for _, row in table.iterrows():
        own = rows_at(forces, row[keys])
        rise = _shares(own[own["step"] <= row["half_step"]])
        end = _shares(own[own["step"] >= 0.9 * last])
        found.append(
            {
                "rise_share": abs(rise["alignment"]),
                "end_share": abs(end["alignment"]),
                "rise_drift": rise["drift"],
                "rise_diffusion": rise["diffusion"],
                "end_drift": end["drift"],
                "end_diffusion": end["diffusion"],
                **{
                    name: rows_at(kappa, row[keys]).get(name, pd.Series(dtype=float)).max()
                    for name in ("kappa", "kappa_se")
                },
                "closure": rows_at(worst, row[keys])["closure"].max(),
            }
        )
    return in_order(pd.concat([table, pd.DataFrame(found, index=table.index)], axis=1), SUMMARY_TABLE)


def _shares(rows: pd.DataFrame) -> dict[str, float]:
    """Signed shares of sums over rows: of alignment among its forces, of drift and diffusion among theirs."""
    added, shares = added_by(rows), {}
    for names in (FORCES, DRIFT_FORCES):
        totals = added[list(names)]
        shares |= (totals / totals.abs().sum(skipna=False)).to_dict()
    return shares
