"""The figure of the decay clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from weightdyn.checkpoints.recipe import Recipe
from weightdyn.core.checks import check_instance
from weightdyn.core.tables import check_columns
from weightdyn.plot.style import (
    DARK,
    DASHES,
    FORCE_COLORS,
    NAMED_LINES,
    label_axes,
    legend_above,
    make_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("step", "span", "tensor", "component", "lr_decay", "lr_decay_low", "lr_decay_high")
_POINTS = 2000  # of the recipe's line


def decay_clock(table: pd.DataFrame, recipe: Recipe | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw ηλ as the weights tell it, gap by gap, and the recipe's over it.

    Args:
        table: of `decay_clock`; gaps without a value are left out. To draw some of the tensors, filter the table.
        recipe: how the training is said to have gone: its ηλ at every update is a line, for each λ that it gives to
            the tensors drawn. None for the weights alone.
        ax: Axes to draw on; None makes a figure.

    A gap is a bar as long as its updates, with the band of lr_decay_low to lr_decay_high; where that is narrower
    than the bar, it is not to be seen.

    Returns:
        The Axes.

    Raises:
        TypeError, ValueError: it is no such table, or has no value; more tensors than a legend names.
    """
    check_instance("table", table, pd.DataFrame, "a table of decay_clock (a pandas.DataFrame)")
    check_columns(table, [name for name in _COLUMNS if name not in ("tensor", "component")], "decay clock")
    check_columns(table, ("tensor", "component"), "decay clock")
    if recipe is not None:
        check_instance("recipe", recipe, Recipe, "a Recipe, or None")
    table = table[np.isfinite(table["lr_decay"])]
    if table.empty:
        raise ValueError("table has no gap with a value of lr_decay; its column note says why")
    names = list(dict.fromkeys(table["tensor"]))
    if len(names) > NAMED_LINES:
        raise ValueError(
            f"table has values of {len(names)} tensors, and a figure names {NAMED_LINES}: filter it, "
            'table[table["tensor"] == …]'
        )
    (ax,) = make_axes(ax, 1)
    color = FORCE_COLORS["decay"]
    for i, name in enumerate(names):
        rows = table[table["tensor"] == name].sort_values("step")
        # Each gap's ends, and a break between the gaps.
        step = np.stack([rows["step"] - rows["span"], rows["step"], rows["step"]], axis=1).ravel()
        value, low, high = (
            np.stack([rows[each], rows[each], np.full(len(rows), np.nan)], axis=1).ravel()
            for each in ("lr_decay", "lr_decay_low", "lr_decay_high")
        )
        ax.fill_between(step, low, high, color=color, alpha=0.2, linewidth=0)
        label = "the weights" if len(names) == 1 else name
        style = {"linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8, "solid_capstyle": "butt"}
        ax.plot(step, value, color=color, label=label, **style)
    if recipe is not None:
        first, last = int((table["step"] - table["span"]).min()) + 1, int(table["step"].max())
        updates = np.unique(np.linspace(first, last, min(_POINTS, last - first + 1)).astype(np.int64))
        tensors = table.drop_duplicates("tensor")
        decays = {
            recipe.decay_of(*each) for each in zip(tensors["component"], tensors["tensor"], strict=True)
        }
        for i, decay in enumerate(sorted(decays, reverse=True)):
            label = "the recipe" if len(decays) == 1 else f"the recipe, λ = {decay:g}"
            style = {"color": DARK, "linewidth": 0.9, "linestyle": DASHES[i % len(DASHES)]}
            ax.plot(updates, recipe.lr_at(updates) * decay, label=label, zorder=3, **style)
    if table["lr_decay_low"].min() >= 0:
        ax.set_ylim(bottom=0)
    _scale(ax)
    legend_above(ax)
    return ax


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _scale(ax: Axes) -> None:
    """Ticks in a power of ten that the label names: ηλ is 1e-3 to 1e-7."""
    top = max(abs(end) for end in ax.get_ylim())
    power = math.floor(math.log10(top)) if top > 0 else 0
    unit = f"10{str(power).translate(_SUPERSCRIPT)}" if power else ""
    label_axes([ax], [f"ηλ ({unit} per update)" if unit else "ηλ (per update)"])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value / 10**power:g}".replace("-", "−"))
