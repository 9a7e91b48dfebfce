"""Figures of recovered forces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from weightdyn.core.tables import check_columns, check_force_table
from weightdyn.plot.style import DARK, DASHES, FORCE_COLORS, GREY, label_axes, legend_above, make_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from weightdyn.record.runlog import RunLog


METHOD_COLORS = {"balance": FORCE_COLORS["alignment"], "spline": "#A100FF", "two_point": "#BFB21B"}
"""Colour of each way to recover forces."""


def recovery(
    truth: RunLog | pd.DataFrame,
    recovered: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw recovered alignments against the logged one, and their ratio to it below.

    Args:
        truth: the log of the same training, a `RunLog` or its force table.
        recovered: a table of `recover_forces`, or {method: table}; tensors that were not logged are left out, and
            the others summed. To draw some of them, filter the table.
        ax: two Axes to draw on; None makes a figure.

    The band is the first table's alignment_low to alignment_high, added up over the tensors as if they erred
    together. Values are drawn in the middle of the updates that they span. The axis of the ratio ends at 0 and 2:
    what lies beyond has an arrowhead on the edge.

    Returns:
        An array of the two Axes.

    Raises:
        TypeError, ValueError: not force tables, or nothing in common.
    """
    from weightdyn.checkpoints.recovery import interval_means

    tables = recovered if isinstance(recovered, Mapping) else {"recovered": recovered}
    if not tables:
        raise ValueError("recovered must hold a table of recover_forces, got none")
    tables = {
        name: check_force_table(table, argument=f"recovered ({name})", unique=True)
        for name, table in tables.items()
    }
    means = {name: interval_means(truth, table) for name, table in tables.items()}
    for name, table in tables.items():
        check_columns(table, ("alignment_low", "alignment_high"), "recovered table", argument="recovered")
        if not means[name].notna().any():
            raise ValueError(f"truth has no update of the tensors and spans of recovered ({name})")
    top, bottom = make_axes(ax, 2)
    spread = 0.0
    for i, (name, table) in enumerate(tables.items()):
        both = table.assign(true=means[name])
        both = both[both["true"].notna()]
        columns = ["alignment", "true", "alignment_low", "alignment_high"]
        rows = both.groupby(["step", "span"])[columns].sum().reset_index()
        middle = rows["step"] - (rows["span"] - 1) / 2
        ratio = rows["alignment"] / rows["true"]
        style = {
            "color": METHOD_COLORS.get(name, FORCE_COLORS["alignment"]),
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 1.1,
            "marker": "o",
            "ms": 2,
            "zorder": 3 - 0.1 * i,
        }
        if i == 0:
            shade = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
            top.plot(middle, rows["true"], color=DARK, linewidth=2.2, alpha=0.5, label="logged")
            top.fill_between(middle, rows["alignment_low"], rows["alignment_high"], **shade)
            ends = [rows[f"alignment_{end}"] / rows["true"] for end in ("low", "high")]
            bottom.fill_between(middle, *ends, **shade)
            spread = max(np.abs(end - 1).quantile(0.9) for end in ends)
        top.plot(middle, rows["alignment"], label=name.replace("_", " "), **style)
        bottom.plot(middle, ratio.where(ratio.between(0, 2)), **style)
        for edge, beyond, marker in ((2, ratio > 2, "^"), (0, ratio < 0, "v")):
            arrow = {"linestyle": "", "ms": 3, "clip_on": False, "color": style["color"]}
            bottom.plot(middle[beyond], np.full(beyond.sum(), edge), marker=marker, **arrow)
        spread = max(spread, np.abs(ratio - 1).max())
    spread = min(1.0, 1.1 * spread)
    bottom.set_ylim(1 - spread, 1 + spread)
    bottom.axhline(1, color=GREY, linewidth=0.6, zorder=0)
    top.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    label_axes([top, bottom], ["alignment\n(Δ‖w‖² per update)", "ratio to\nthe logged"])
    legend_above(top)
    return np.array([top, bottom])
