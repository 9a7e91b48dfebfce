"""Every figure: functions that take a run or a table, draw on Axes and return them.

Figures are made for one column of a paper (3.4 inches wide) in fonts of 7 points or more; on Axes of your own,
sizes and fonts are yours. Colours stay apart in every kind of colour blindness and mean the same in every figure:
each force keeps its own, roles have others, layers run along a sequential map.

Forces of single updates are noisy. A line of more than 200 rows is drawn twice, as it is in a light tint and as a
running mean, centred, over 2 % of its rows (`SMOOTHING`).

pyplot is imported when a figure is drawn: a program that only logs never pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pandas as pd

from weightdyn.forces import FORCES, By, aggregate, budget, check_force_table
from weightdyn.naming import COMPONENTS, role_of
from weightdyn.trajectory import phases, pool_weibull

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from weightdyn.runlog import RunLog

FORCE_COLORS = {"alignment": "#0072B2", "injection": "#E69F00", "decay": "#A50F15", "net": "#000000"}
"""Colour of each force, and of their sum, in every figure."""

ROLE_COLORS = {"selection": "#AA4499", "transmission": "#56B4E9", "value": "#117733", "other": "#999999"}
"""Colour of each role in every figure."""

SMOOTHING = 0.02
"""Width of the running mean, as a fraction of a line's rows."""

_MANY = 200
_WIDTH = 3.4
_GREY = "#808080"
_DARK = "#404040"
_PALEST = 0.9  # the end of viridis is too pale for lines on white
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_LAYERS_IN_LEGEND = 8
_SYMBOLS = {"lam": "Weibull scale λ", "k": "Weibull shape k"}

Kind = Literal["forces", "shares"]


@overload
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = ...,
    by: Literal["model"] | None = None,
    ax: Axes | None = None,
) -> Axes: ...
@overload
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = ...,
    by: Literal["layer", "component", "role"],
    ax: Sequence[Axes] | None = None,
) -> np.ndarray: ...
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = "forces",
    by: By | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw what alignment, injection and decay do to ‖w‖² over a run.

    Args:
        run_or_table: a `RunLog` or a force table; its tensors are summed.
        kind: "forces" draws the signed contributions to ‖w‖² per update and their net; "shares" draws
            |F| / (|alignment| + |injection| + |decay|) in percent.
        by: "layer", "component" or "role" draws one panel for each; None (or "model") sums all in one panel.
        ax: Axes to draw on, as many as there are panels; None makes a figure.

    Lines of more than 200 rows are the running mean over 2 % of the rows, with the rows themselves in a light
    tint behind; shares are averaged as shares.

    Returns:
        The Axes; where there is a panel for each group an array of them, in the order of the panels.

    Raises:
        TypeError, ValueError: an argument that is not one of the above.
    """
    if kind not in ("forces", "shares"):
        raise ValueError(f"kind must be 'forces' or 'shares', got {kind!r}")
    table = check_force_table(_table(run_or_table, "forces"), argument="run_or_table")
    by = _check_by(table, by or "model")
    table = budget(aggregate(table, by))
    panels = _split(table, by)
    axes = _axes(ax, len(panels))
    for panel, (name, rows) in zip(axes, panels, strict=True):
        panel.axhline(0, color=_GREY, linewidth=0.6, zorder=0)
        for force in (*FORCES, "net") if kind == "forces" else FORCES:
            values = rows[force] if kind == "forces" else 100 * rows[f"{force}_share"]
            _line(panel, rows["step"], values, color=FORCE_COLORS[force], label=force)
        if kind == "shares":
            panel.set_ylim(0, 100)
        if by != "model":
            _strip(panel, _name(by, name))
    _label(axes, ["Δ‖w‖² per update" if kind == "forces" else "budget share (%)"] * len(axes))
    _legend_above(axes[0])
    return axes[0] if by == "model" else np.array(axes)


@overload
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: Literal["lam", "k"],
    by: By | None = None,
    ax: Axes | None = None,
) -> Axes: ...
@overload
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: None = None,
    by: By | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray: ...
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: Literal["lam", "k"] | None = None,
    by: By | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw the Weibull scale λ and shape k of the weights over a run, with the phases of λ marked.

    Args:
        run_or_table: a `RunLog` or a Weibull table: `step`, `k`, `lam`; `layer`, `role`, `numel`, … if any.
        value: "lam" or "k" draws that one; None draws λ above k.
        by: a line for each "layer", "component", "role", or one for the whole "model"; tensors are pooled as in
            `pool_weibull`. None: by layer where the table has layers, else the model.
        ax: Axes to draw on: one, or two where `value` is None; None makes a figure.

    A dot marks the peak of each λ that overshoots (`phases`). A band through the panels reaches from the first of
    these peaks to the last: before it λ rises, behind it λ relaxes.

    Returns:
        The Axes; where `value` is None an array of two, λ's and k's.

    Raises:
        TypeError, ValueError: an argument that is not one of the above.
    """
    if value not in ("lam", "k", None):
        raise ValueError(f"value must be 'lam', 'k' or None for both, got {value!r}")
    table = _table(run_or_table, "weibull")
    if by is None:
        by = "layer" if "layer" in table and table["layer"].notna().any() else "model"
    pooled = pool_weibull(table, _check_by(table, by))
    if pooled.empty:
        raise ValueError("run_or_table holds no Weibull fits; log some (weibull_every=…)")
    values = ("lam", "k") if value is None else (value,)
    axes = _axes(ax, len(values))

    lines = _split(pooled, by)
    styles = _styles(by, [name for name, _ in lines])
    found = [phases(rows).iloc[0] for _, rows in lines]
    peaks = [one["peak_step"] for one in found if one["overshoot"]]
    few = len(lines) <= _LAYERS_IN_LEGEND
    bar = by == "layer" and not few
    for panel, column in zip(axes, values, strict=True):
        for (name, rows), style, phase in zip(lines, styles, found, strict=True):
            label = None if bar and not pd.isna(name) else _name(by, name).removeprefix("layer ")
            panel.plot(rows["step"], rows[column], linewidth=1.1, label=label, **style)
            if column == "lam" and phase["overshoot"]:
                color, edge = style["color"], "white" if few else style["color"]
                size = 4 if few else 2
                panel.plot(phase["peak_step"], phase["peak"], "o", color=color, mec=edge, mew=0.5, ms=size)
        if peaks:
            _mark_phases(panel, min(peaks), max(peaks), named=panel is axes[0])
    _label(axes, [_SYMBOLS[column] for column in values])
    if bar:
        _layer_bar(axes, [name for name, _ in lines if not pd.isna(name)])
    if by != "model":
        _legend_above(axes[0], raised=bool(peaks), title="layer" if by == "layer" and not bar else None)
    return axes[0] if value is not None else np.array(axes)


def loss(run_or_table: RunLog | pd.DataFrame, *, unit: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the recorded losses: every column of the metrics with "loss" in its name.

    Args:
        run_or_table: a `RunLog`, or a table with `step` and columns such as `loss` and `eval_loss`.
        unit: unit of the loss for the axis, such as "nats per byte".
        ax: Axes to draw on; None makes a figure.

    Lines of more than 200 rows are the running mean over 2 % of the rows, with the rows themselves in a light
    tint behind. A loss that was recorded at fewer than half of the steps has a dot for each record.

    Returns:
        The Axes.

    Raises:
        TypeError, ValueError: not a run or a table; nothing in it is called a loss.
    """
    table = _table(run_or_table, "metrics")
    names = [name for name in table if "loss" in str(name).lower() and table[name].notna().any()]
    if "step" not in table or not names:
        raise ValueError(f"run_or_table holds no losses by step: its columns are {list(table.columns)}")
    axes = _axes(ax, 1)
    colors = (_DARK, *ROLE_COLORS.values())
    for i, name in enumerate(names):
        rows = table[["step", name]].dropna()
        sparse = 2 * len(rows) < len(table)
        label = str(name).replace("_", " ")
        _line(axes[0], rows["step"], rows[name], color=colors[i % len(colors)], label=label, dots=sparse)
    _label(axes, [f"loss ({unit})" if unit else "loss"])
    if len(names) > 1:
        _legend_above(axes[0])
    return axes[0]


def _table(run_or_table: Any, kind: str) -> pd.DataFrame:
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


def _check_by(table: pd.DataFrame, by: By) -> By:
    allowed = ["model", *(name for name in ("layer", "component", "role") if name in table)]
    if by not in allowed:
        raise ValueError(f"by must be one of {allowed} for this table, got {by!r}")
    return by


def _axes(ax: Any, n: int) -> list[Axes]:
    """The Axes to draw on: those given, or a new figure's, one above the other."""
    if ax is None:
        import matplotlib.pyplot as plt

        height = 2.1 if n == 1 else 0.35 + 1.35 * n
        figure, grid = plt.subplots(
            n, 1, figsize=(_WIDTH, height), sharex=True, squeeze=False, layout="constrained", dpi=200
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


def _line(
    ax: Axes, step: pd.Series, values: pd.Series, *, color: str, label: str, dots: bool = False
) -> None:
    if len(values) <= _MANY:
        ax.plot(step, values, color=color, linewidth=1.1, label=label, marker="o" if dots else None, ms=2.5)
        return
    ax.plot(step, values, color=color, linewidth=0.4, alpha=0.25, zorder=1, rasterized=True)
    window = 2 * round(SMOOTHING * len(values) / 2) + 1
    smooth = values.rolling(window, center=True, min_periods=1).mean()
    ax.plot(step, smooth, color=color, linewidth=1.2, label=label)


def _split(table: pd.DataFrame, by: By) -> list[tuple[Any, pd.DataFrame]]:
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


def _name(by: By, name: Any) -> str:
    if by == "layer":
        return "outside the blocks" if pd.isna(name) else f"layer {name}"
    return str(name)


def _styles(by: By, names: Sequence[Any]) -> list[dict[str, Any]]:
    """Colour and dashes of each group's line."""
    import matplotlib as mpl

    if by == "role":
        return [{"color": ROLE_COLORS[name]} for name in names]
    if by == "component":
        roles = [role_of(name) for name in names]
        nth = [roles[:i].count(role) for i, role in enumerate(roles)]
        return [
            {"color": ROLE_COLORS[role], "linestyle": _DASHES[i % len(_DASHES)]}
            for role, i in zip(roles, nth, strict=True)
        ]
    if by == "layer":
        inside = sum(not pd.isna(name) for name in names)
        colors = iter(mpl.colormaps["viridis"](np.linspace(0, _PALEST, inside)))
        return [
            {"color": _GREY, "linestyle": "--"} if pd.isna(name) else {"color": next(colors)}
            for name in names
        ]
    return [{"color": _DARK}]


def _mark_phases(ax: Axes, first: float, last: float, *, named: bool) -> None:
    ax.axvspan(first, last, facecolor="#F4F4F4", linewidth=0, zorder=0)
    for step in {first, last}:
        ax.axvline(step, color=_GREY, linewidth=0.6, linestyle=":", zorder=0)
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
            fontsize=_small(ax),
            color=_GREY,
        )


def _label(axes: Sequence[Axes], quantities: Sequence[str]) -> None:
    for ax, quantity in zip(axes, quantities, strict=True):
        ax.set_ylabel(quantity)
        ax.ticklabel_format(
            axis="y", style="plain", useOffset=False
        )  # a power of ten would lie in the legend
    axes[-1].set_xlabel("update")


def _strip(ax: Axes, text: str) -> None:
    """Name a panel on its right side, where neither data nor the legend are."""
    ax.annotate(
        text, (1.01, 0.5), xycoords="axes fraction", rotation=270, va="center", ha="left", fontsize=_small(ax)
    )


def _legend_above(ax: Axes, *, raised: bool = False, title: str | None = None) -> None:
    """A legend over the Axes, where it covers no data, in as many rows as their width asks for."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    handles, labels = ax.get_legend_handles_labels()
    if title is not None:
        handles, labels = [Line2D([], [], linestyle=""), *handles], [title, *labels]
    size = _small(ax)
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


def _layer_bar(axes: Sequence[Axes], layers: Sequence[int]) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, _PALEST, len(layers))))
    scale = ScalarMappable(Normalize(min(layers), max(layers)), colors)
    bar = axes[0].figure.colorbar(scale, ax=list(axes), aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=_small(axes[0]), width=0.6, length=2.5)
    bar.set_label("layer", size=_small(axes[0]) + 1)


def _small(ax: Axes) -> float:
    """Size of the text beside the axis labels: one point less, so 7 in a figure of ours."""
    return float(ax.yaxis.label.get_fontsize()) - 1
