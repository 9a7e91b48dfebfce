"""What all figures share: sizes, fonts, colours, legends, panels.

Figures are made for one column of a paper (3.4 inches wide) in fonts of 7 points or more; on Axes of your own,
sizes and fonts are yours. Colours stay apart in every kind of colour blindness and mean the same in every figure:
each force keeps its own, roles have others, layers run along a sequential map.

Forces of single updates are noisy. A line of more than 200 rows is drawn twice, as it is in a light tint and as a
running mean, centred, over 2 % of its rows (`SMOOTHING`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from weightdyn.core.naming import COMPONENTS, role_of
from weightdyn.core.tables import By

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FORCE_COLORS = {"alignment": "#0072B2", "injection": "#E69F00", "decay": "#A50F15", "net": "#000000"}
"""Colour of each force, and of their sum, in every figure."""

ROLE_COLORS = {"selection": "#AA4499", "transmission": "#56B4E9", "value": "#117733", "other": "#999999"}
"""Colour of each role in every figure."""

SMOOTHING = 0.02
"""Width of the running mean, as a fraction of a line's rows."""

MANY = 200
WIDTH = 3.4
GREY = "#808080"
DARK = "#404040"
PALEST = 0.9  # the end of viridis is too pale for lines on white
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
LAYERS_IN_LEGEND = 8
SYMBOLS = {"lam": "Weibull scale λ", "k": "Weibull shape k"}


def table_of(run_or_table: Any, kind: str) -> pd.DataFrame:
    if isinstance(run_or_table, pd.DataFrame):
        table = run_or_table
    elif callable(getattr(run_or_table, kind, None)):
        table = getattr(run_or_table, kind)()
    else:
        raise TypeError(
            f"run_or_table must be a RunLog or the table that its {kind}() returns, "
            f"got {type(run_or_table).__name__}; open a run directory with RunLog(path)"
        )
    if table.empty:
        raise ValueError(f"run_or_table has no rows of {kind}")
    return table


def check_panels(table: pd.DataFrame, by: By) -> By:
    allowed = ["model", *(name for name in ("layer", "component", "role") if name in table)]
    if by not in allowed:
        raise ValueError(f"by must be one of {allowed} for this table, got {by!r}")
    return by


def make_axes(ax: Any, n: int, height: float | None = None) -> list[Axes]:
    """The Axes to draw on: those given, or a new figure's, one above the other."""
    if ax is None:
        import matplotlib.pyplot as plt

        height = height or (2.1 if n == 1 else 0.35 + 1.35 * n)
        figure, grid = plt.subplots(
            n, 1, figsize=(WIDTH, height), sharex=True, squeeze=False, layout="constrained", dpi=200
        )
        figure.align_ylabels()
        for panel in grid[:, 0]:
            panel.tick_params(labelsize=7, width=0.6, length=2.5)
            panel.xaxis.label.set_size(8)
            panel.yaxis.label.set_size(8)
            panel.locator_params(axis="x", nbins=6)
            panel.margins(x=0.02)
            panel.spines[["top", "right"]].set_visible(False)
            panel.spines[["left", "bottom"]].set_linewidth(0.6)
        return list(grid[:, 0])
    given = list(np.asarray(ax, dtype=object).ravel())
    if len(given) != n or not all(hasattr(one, "plot") for one in given):
        raise ValueError(f"ax must be {'Axes' if n == 1 else f'a sequence of {n} Axes'} or None, got {ax!r}")
    return given


def draw_line(
    ax: Axes, step: pd.Series, values: pd.Series, *, color: str, label: str, dots: bool = False
) -> None:
    if len(values) <= MANY:
        ax.plot(step, values, color=color, linewidth=1.1, label=label, marker="o" if dots else None, ms=2.5)
        return
    ax.plot(step, values, color=color, linewidth=0.4, alpha=0.25, zorder=1, rasterized=True)
    window = 2 * round(SMOOTHING * len(values) / 2) + 1
    smooth = values.rolling(window, center=True, min_periods=1).mean()
    ax.plot(step, smooth, color=color, linewidth=1.2, label=label)


def split_groups(table: pd.DataFrame, by: By) -> list[tuple[Any, pd.DataFrame]]:
    """The groups of a summed table, in the order in which figures have them."""
    if by == "model":
        return [("model", table)]
    names = list(table[by].unique())
    known = {"role": list(ROLE_COLORS), "component": list(COMPONENTS)}.get(by, [])
    places = {name: i for i, name in enumerate(known)}
    if by == "layer":
        places = {name: name for name in names if not pd.isna(name)}
    names.sort(key=lambda name: (pd.isna(name), 0 if pd.isna(name) else places.get(name, len(places))))
    column = table[by]
    return [
        (name, table[column.isna() if pd.isna(name) else column.eq(name).fillna(False)]) for name in names
    ]


def group_name(by: By, name: Any) -> str:
    if by == "layer":
        return "outside the blocks" if pd.isna(name) else f"layer {name}"
    return str(name)


def line_styles(by: By, names: Sequence[Any]) -> list[dict[str, Any]]:
    """Colour and dashes of each group's line."""
    import matplotlib as mpl

    if by == "role":
        return [{"color": ROLE_COLORS[name]} for name in names]
    if by == "component":
        roles = [role_of(name) for name in names]
        nth = [roles[:i].count(role) for i, role in enumerate(roles)]
        return [
            {"color": ROLE_COLORS[role], "linestyle": DASHES[i % len(DASHES)]}
            for role, i in zip(roles, nth, strict=True)
        ]
    if by == "layer":
        inside = sum(not pd.isna(name) for name in names)
        colors = iter(mpl.colormaps["viridis"](np.linspace(0, PALEST, inside)))
        return [
            {"color": GREY, "linestyle": "--"} if pd.isna(name) else {"color": next(colors)} for name in names
        ]
    return [{"color": DARK}]


def mark_phases(ax: Axes, first: float, last: float, *, named: bool) -> None:
    ax.axvspan(first, last, facecolor="#F4F4F4", linewidth=0, zorder=0)
    for step in {first, last}:
        ax.axvline(step, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
    if not named:
        return
    # Over the Axes, where there is no data; only where the peaks leave room for the word beside them.
    low, high = ax.get_xlim()
    words = []
    if first - low > 0.15 * (high - low):
        words.append(("← rise", first, "right", -2))
    if high - last > 0.28 * (high - low):
        words.append(("relaxation →", last, "left", 2))
    for word, step, side, shift in words:
        ax.annotate(
            word,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(shift, 1),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=small_size(ax),
            color=GREY,
        )


def label_axes(axes: Sequence[Axes], quantities: Sequence[str]) -> None:
    for ax, quantity in zip(axes, quantities, strict=True):
        ax.set_ylabel(quantity)
        ax.ticklabel_format(
            axis="y", style="plain", useOffset=False
        )  # a power of ten would lie in the legend
    axes[-1].set_xlabel("update")


def name_panel(ax: Axes, text: str) -> None:
    """Name a panel on its right side, where neither data nor the legend are."""
    ax.annotate(
        text,
        (1.01, 0.5),
        xycoords="axes fraction",
        rotation=270,
        va="center",
        ha="left",
        fontsize=small_size(ax),
    )


def legend_above(ax: Axes, *, raised: bool = False, title: str | None = None) -> None:
    """A legend over the Axes, where it covers no data, in as many rows as their width asks for."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    handles, labels = ax.get_legend_handles_labels()
    if title is not None:
        handles, labels = [Line2D([], [], linestyle=""), *handles], [title, *labels]
    size = small_size(ax)
    above = ScaledTranslation(0, (1.5 if raised else 0.2) * size / 72, ax.figure.dpi_scale_trans)
    for columns in range(len(labels), 0, -1):
        # A legend fills column by column; readers go row by row.
        order = [i for column in range(columns) for i in range(column, len(labels), columns)]
        legend = ax.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            bbox_transform=ax.transAxes + above,
            ncols=columns,
            fontsize=size,
            frameon=False,
            borderaxespad=0.0,
            borderpad=0.1,
            handlelength=1.3,
            handletextpad=0.4,
            columnspacing=0.9,
        )
        # A layout yet to come gives the Axes about a tenth more.
        if legend.get_window_extent().width <= 1.1 * ax.get_window_extent().width:
            return


def layer_bar(axes: Sequence[Axes], layers: Sequence[int]) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, PALEST, len(layers))))
    scale = ScalarMappable(Normalize(min(layers), max(layers)), colors)
    bar = axes[0].figure.colorbar(scale, ax=list(axes), aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=small_size(axes[0]), width=0.6, length=2.5)
    bar.set_label("layer", size=small_size(axes[0]) + 1)


def small_size(ax: Axes) -> float:
    """Size of the text beside the axis labels: one point less, so 7 in a figure of ours."""
    return float(ax.yaxis.label.get_fontsize()) - 1
