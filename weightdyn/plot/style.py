"""What all figures share: groups, sizes, fonts, colours, legends, panels.

`by=` says what a figure has a panel or a line for, as in every table: "layer" (with its stack), "component",
"role", "model" (everything in one), a list of such columns, or None for each tensor by itself. More than a figure
can hold are refused.

Figures are made for one column of a paper (3.4 inches wide) in fonts of 7 points or more; on Axes of your own,
sizes and fonts are yours. Colours stay apart in every kind of colour blindness and mean the same in every figure:
each force keeps its own, roles have others, layers run along a sequential map.

Forces of single updates are noisy. A line of more than 200 rows is drawn twice, as it is in a light tint and as a
running mean, centred, over 2 % of its rows (`SMOOTHING`). Drift of single updates is mostly noise, new in every
update: beside it lines of more than 50 such rows are the running mean over 6 % (`DRIFT_SMOOTHING`), 13 at least,
alone, and drift's has a band of ± one standard error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.core.checks import shown
from weightdyn.core.naming import COMPONENTS, ROLES, role_of
from weightdyn.core.tables import By, group_columns, group_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas.api.typing import Rolling


FORCE_COLORS = {
    "alignment": "#0072B2",
    "injection": "#E69F00",
    "drift": "#6600CC",
    "diffusion": "#9CC078",
    "decay": "#A50F15",
    "net": "#000000",
}
"""Colour of each force, and of their sum, in every figure."""

ROLE_COLORS = {"selection": "#AA4499", "transmission": "#56B4E9", "value": "#117733", "other": "#999999"}
"""Colour of each role in every figure."""

SMOOTHING = 0.02
"""Width of the running mean, as a fraction of a line's rows."""

DRIFT_SMOOTHING = 0.06
"""The same in figures of drift and diffusion."""

PANELS = 64
"""The most panels that a figure has."""

NAMED_LINES = 16
"""The most lines that a legend names; layers have a colour bar, whatever their number."""

MANY = 200
NOISY = 50  # rows of single updates, with drift
LEAST = 13  # rows of a running mean with drift
WIDTH = 3.4
GREY = "#808080"
DARK = "#404040"
PALEST = 0.9  # the end of viridis is too pale for lines on white
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
LAYERS_IN_LEGEND = 8
LONG_NAME = 24  # letters that fit beside a panel
SYMBOLS = {"lam": "Weibull scale λ", "k": "Weibull shape k"}


class Group(NamedTuple):
    """What a figure has a panel or a line for.

    Attributes:
        name: as the figure writes it: "layer 3", "encoder 3" where there are several stacks, "q", "layer 3 q".
        place: the columns of `by` and their values.
        rows: its rows of the table.
    """

    name: str
    place: dict[str, Any]
    rows: pd.DataFrame

    @property
    def outside(self) -> bool:
        """Whether it is what lies outside the blocks."""
        return "layer" in self.place and pd.isna(self.place["layer"])


def split_groups(table: pd.DataFrame, by: By | Sequence[str] | None) -> list[Group]:
    """The groups of a table that `aggregate` or `pool_weibull` made with this `by`, in the order of figures."""
    keys = group_columns(table, by)
    if not keys:
        return [Group("model", {}, table)]
    numbers = group_numbers(table, keys)
    firsts = table[keys].iloc[np.unique(numbers, return_index=True)[1]]
    places = [dict(zip(keys, row, strict=True)) for row in firsts.itertuples(index=False)]
    order = {key: list(dict.fromkeys(place[key] for place in places)) for key in keys}
    order |= {
        "component": [*COMPONENTS, *order.get("component", ())],
        "role": [*ROLES, *order.get("role", ())],
    }

    def position(group: Group) -> list[Any]:
        ranks = {
            key: (0 if pd.isna(value) else value) if key == "layer" else order[key].index(value)
            for key, value in group.place.items()
        }
        if "tensor" in ranks:  # a model is gone through block by block
            ranks["tensor"] = ranks.pop("tensor")
        return [group.outside, *ranks.values()]

    names = _names(places)
    groups = [
        Group(name, place, table[numbers == i])
        for i, (name, place) in enumerate(zip(names, places, strict=True))
    ]
    return sorted(groups, key=position)


def check_number(groups: Sequence[Group], by: Any, most: int, what: str) -> None:
    """Refuse more groups than a figure holds, with a ValueError."""
    if len(groups) > most:
        raise ValueError(
            f"by={by!r} makes {len(groups)} {what}, and a figure holds {most}: draw some of the tensors, or group "
            "them, by='layer', 'component', 'role' or 'model'"
        )


def stack_names(places: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What figures call each stack that has layers: its name behind what all share; {} if there is only one."""
    stacks = dict.fromkeys(
        place["stack"] for place in places if "stack" in place and not pd.isna(place.get("layer", 0))
    )
    if len(stacks) < 2:
        return {}
    parts = [stack.split(".") for stack in stacks]
    shared = next(
        (i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1),
        min(map(len, parts)),
    )
    return {stack: ".".join(each[shared:]) or stack for stack, each in zip(stacks, parts, strict=True)}


def _names(places: Sequence[Mapping[str, Any]]) -> list[str]:
    stacks = stack_names(places)
    names = []
    for place in places:
        words = []
        if not pd.isna(place.get("layer")):
            words.append(f"{stacks.get(place.get('stack', ''), 'layer')} {place['layer']}")
        elif "layer" not in place and place.get("stack"):
            words.append(str(place["stack"]))
        words += [str(place[key]) for key in ("component", "role") if key in place][:1]
        names.append(" ".join(words) or "outside the blocks")
    again = Counter(names)
    return [
        str(place["tensor"]) if "tensor" in place and again[name] > 1 else name
        for name, place in zip(names, places, strict=True)
    ]


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
    given = (
        list(ax.ravel()) if isinstance(ax, np.ndarray) else list(ax) if isinstance(ax, list | tuple) else [ax]
    )
    if len(given) != n or not all(
        callable(getattr(one, "plot", None)) and hasattr(one, "figure") for one in given
    ):
        accepted = "Axes" if n == 1 else f"a sequence of {n} Axes"
        raise ValueError(f"ax must be {accepted} or None, got {shown(ax)}")
    return given


def draw_line(
    ax: Axes, step: pd.Series, values: pd.Series, *, color: str, label: str, dots: bool = False
) -> None:
    """Draw a line; one of more than `MANY` rows as it is in a light tint, and smoothed."""
    if len(values) <= MANY:
        ax.plot(step, values, color=color, linewidth=1.1, label=label, marker="o" if dots else None, ms=2.5)
        return
    ax.plot(step, values, color=color, linewidth=0.4, alpha=0.25, zorder=1, rasterized=True)
    ax.plot(step, running_mean(values, SMOOTHING), color=color, linewidth=1.2, label=label)


def draw_mean(ax: Axes, step: pd.Series, values: pd.Series, *, color: str, label: str, band: bool) -> None:
    """Draw the running mean of noisy values alone, with a band of ± one standard error if asked for."""
    mean = noisy_mean(values)
    ax.plot(step, mean, color=color, linewidth=1.2, label=label)
    if band:
        error = np.sqrt(noisy_mean((values - mean) ** 2) / noisy_mean(values, "count"))
        ax.fill_between(step, mean - error, mean + error, color=color, alpha=0.25, linewidth=0, zorder=1)


def running_mean(values: pd.Series, width: float) -> pd.Series:
    """Centred running mean over a fraction of a line's rows; of up to `MANY` the line as it is."""
    if len(values) <= MANY:
        return values
    return _rolling(values, width, 1).mean()


def noisy_mean(values: pd.Series, of: str = "mean") -> pd.Series:
    """Centred running mean (or count) of what is mostly noise in single updates."""
    return _rolling(values, DRIFT_SMOOTHING, LEAST).agg(of)


def _rolling(values: pd.Series, width: float, least: int) -> Rolling:
    window = max(2 * round(width * len(values) / 2) + 1, least)
    return values.rolling(window, center=True, min_periods=1)


def line_styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colour and dashes of each group's line: those of its role, of its layer and stack, or one after the other."""
    import matplotlib as mpl

    viridis = mpl.colormaps["viridis"]
    places = [group.place for group in groups]
    keys = set(places[0])
    if not keys:
        return [{"color": DARK}]
    if keys in ({"role"}, {"component"}):
        roles = [place.get("role") or _role(place["component"]) for place in places]
        nth = [roles[:i].count(role) for i, role in enumerate(roles)]
        return [
            {"color": ROLE_COLORS.get(role, ROLE_COLORS["other"]), "linestyle": DASHES[i % len(DASHES)]}
            for role, i in zip(roles, nth, strict=True)
        ]
    if keys <= {"stack", "layer"} and "layer" in keys:
        layers = sorted({group.place["layer"] for group in groups if not group.outside})
        colors = dict(zip(layers, viridis(np.linspace(0, PALEST, len(layers))), strict=True))
        stacks = list(stack_names(places))
        free = [dashes for dashes in DASHES if dashes != "--"]  # those are of what lies outside
        return [
            {"color": GREY, "linestyle": "--"}
            if group.outside
            else {
                "color": colors[group.place["layer"]],
                "linestyle": free[stacks.index(group.place["stack"]) % len(free)] if stacks else "-",
            }
            for group in groups
        ]
    colors = viridis(np.linspace(0, PALEST, len(groups)))
    return [{"color": color, "linestyle": DASHES[i % len(DASHES)]} for i, color in enumerate(colors)]


def _role(component: str) -> str:
    return role_of(component) if component in COMPONENTS else "other"


def mark_phases(ax: Axes, first: float, last: float, *, named: bool) -> None:
    """Shade the updates from the first peak to the last, and name what lies before and behind them."""
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
    """Name the quantity of each panel, and the updates below the last one."""
    for ax, quantity in zip(axes, quantities, strict=True):
        ax.set_ylabel(quantity)
        # A power of ten would lie in the legend.
        ax.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes[-1].set_xlabel("update")


def name_panel(ax: Axes, text: str) -> None:
    """Name a panel where neither data nor the legend are: on its right side, a long name above its left corner."""
    size = small_size(ax)
    if len(text) > LONG_NAME:
        above = {"xytext": (0, 1), "textcoords": "offset points"}
        ax.annotate(text, (0, 1), xycoords="axes fraction", fontsize=size, **above)
    else:
        across = {"rotation": 270, "va": "center", "ha": "left"}
        ax.annotate(text, (1.01, 0.5), xycoords="axes fraction", fontsize=size, **across)


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
    """A bar of the layers' colours beside the panels."""
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
