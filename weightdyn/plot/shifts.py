"""Figures of the shifts between paired runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_choice
from weightdyn.core.tables import FORCES, IDENTITY, Kind, check_columns
from weightdyn.plot.style import (
    DARK,
    FORCE_COLORS,
    GREY,
    ROLE_COLORS,
    label_axes,
    legend_above,
    make_axes,
    small_size,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def wisca_shift(
    shift: pd.DataFrame, *, kind: Kind = "forces", group: Any = None, ax: Sequence[Axes] | None = None
) -> np.ndarray:
    """Draw what a rescaling shifts, arm minus control over the updates: force shares, λ, k and loss.

    Bands are the confidence intervals over seeds that the table has; of one seed there are none.

    Args:
        shift: what `Comparison.shift` returned; `window=` there makes calmer lines.
        kind: "forces" draws the shares of alignment, injection and decay; "drift" those of drift and diffusion
            among drift, diffusion and decay, of runs that know the drift.
        group: which component, role or layer to draw, of a table that has several ("q" of by="component"); of
            several stacks ("encoder", 0), and of a list of columns their values in its order. The loss is the
            model's.
        ax: four Axes to draw on; None makes a figure.

    Returns:
        An array of four Axes: shares in percentage points, λ, k and losses.

    Raises:
        TypeError, ValueError: not such a table; it has no such group, or several and none is named; "drift" of
            runs that do not know it.

    >>> row = {"step": [5, 10], "value": 1.0, "control": 1.0, "low": -0.1, "high": 0.1, "seeds": 3}
    >>> quantities = [*(f"{force}_share" for force in FORCES), "lam", "k", "loss"]
    >>> table = pd.concat([pd.DataFrame({"quantity": name, "difference": 0.0, **row}) for name in quantities])
    >>> [panel.get_ylabel() for panel in wisca_shift(table)]
    ['Δ share (points)', 'Δλ', 'Δk', 'Δ loss']
    """
    drawn = FORCES if check_choice("kind", kind, ("forces", "drift")) == "forces" else ("drift", "diffusion")
    table = _one_group(shift, group)
    if kind == "drift" and not table["quantity"].isin(["drift_share"]).any():
        raise ValueError("shift has no drift: the runs were logged without it; kind='forces' draws the rest")
    axes = make_axes(ax, 4)
    shares = [(f"{force}_share", FORCE_COLORS[force], force) for force in drawn]
    names = sorted(
        {name for name in table["quantity"] if "loss" in str(name)}, key=lambda name: (len(name), name)
    )
    colors = (DARK, *ROLE_COLORS.values())
    losses = [(name, colors[i % len(colors)], name.replace("_", " ")) for i, name in enumerate(names)]
    for panel, lines in zip(axes, (shares, [("lam", DARK, "λ")], [("k", DARK, "k")], losses), strict=True):
        panel.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        scale = 100 if lines is shares else 1
        for name, color, label in lines:
            rows = table[table["quantity"] == name].sort_values("step")
            mark = "o" if len(rows) < 10 else None
            panel.plot(
                rows["step"],
                scale * rows["difference"],
                color=color,
                lw=1.1,
                label=label,
                marker=mark,
                ms=2.5,
            )
            if rows["low"].notna().any():
                low, high = scale * rows["low"], scale * rows["high"]
                panel.fill_between(rows["step"], low, high, color=color, alpha=0.18, linewidth=0, zorder=1)
    label_axes(axes, ["Δ share (points)", "Δλ", "Δk", "Δ loss"])
    legend_above(axes[0])
    if len(losses) > 1:
        axes[3].legend(
            loc="best", fontsize=small_size(axes[3]), frameon=False, handlelength=1.6, labelspacing=0.3
        )
    return np.array(axes)


def shift_groups(shift: pd.DataFrame) -> list[Any]:
    """What `group` of `wisca_shift` can be for a table of shifts; [None] where it has the whole model only."""
    named = _groups(shift)
    return [None] if named is None else list(dict.fromkeys(named.dropna()))


def _groups(shift: Any) -> pd.Series | None:
    """The group of each row, missing of losses and outside the blocks; None of a table for the whole model."""
    if not isinstance(shift, pd.DataFrame):
        raise TypeError(
            f"shift must be the table that Comparison.shift() returns, got {type(shift).__name__}"
        )
    if missing := [name for name in ("step", "quantity", "difference", "low", "high") if name not in shift]:
        raise ValueError(f"shift lacks the columns {missing}; Comparison.shift() returns them")
    check_columns(shift, ("step", "difference", "low", "high"), "table of shifts", argument="shift")
    keys = [name for name in IDENTITY if name in shift]
    if "stack" in keys and shift.loc[shift["layer"].notna(), "stack"].nunique() < 2:
        keys.remove("stack")
    if not keys:
        return None
    places = shift[keys]
    if "layer" in keys:  # beside losses, which have none, layers may have become floats
        places = places.assign(layer=pd.to_numeric(shift["layer"]).astype("Int64"))
    rows = places.astype(object).itertuples(index=False, name=None)
    named = [row[0] if len(keys) == 1 else row for row in rows]
    whole = shift[keys].notna().all(axis=1) & ~_of_loss(shift)
    return pd.Series(named, shift.index, dtype=object).where(whole, None)


def _of_loss(shift: pd.DataFrame) -> pd.Series:
    return shift["quantity"].astype(str).str.contains("loss")


def _one_group(shift: Any, group: Any) -> pd.DataFrame:
    """The rows of one group of a table of shifts, and those of the losses."""
    named = _groups(shift)
    if named is None:
        if group is not None:
            raise ValueError(f"group: the table has one for the whole model only, got {group!r}")
        return shift
    names = shift_groups(shift)
    if group is None and len(names) == 1:
        group = names[0]
    if group not in names:
        raise ValueError(f"group must be one of {names}, got {group!r}")
    return shift[_of_loss(shift) | named.map(lambda name: name == group)]
