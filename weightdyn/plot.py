"""Every figure: functions that take a run or a table, draw on Axes and return them.

Figures are made for one column of a paper (3.4 inches wide) in fonts of 7 points or more; on Axes of your own,
sizes and fonts are yours. Colours stay apart in every kind of colour blindness and mean the same in every figure:
each force keeps its own, roles have others, layers run along a sequential map.

Forces of single updates are noisy. A line of more than 200 rows is drawn twice, as it is in a light tint and as a
running mean, centred, over 2 % of its rows (`SMOOTHING`).

pyplot is imported when a figure is drawn: a program that only logs never pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pandas as pd

from weightdyn.forces import FORCES, By, aggregate, budget, check_force_table
from weightdyn.naming import COMPONENTS, role_of
from weightdyn.trajectory import phases, pool_weibull
from weightdyn.weibull import K0, Method, as_histogram, fit_weibull, law_cdf, rank_laws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from weightdyn.magnitudes import MagnitudeHistogram
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


def overview(run: RunLog, *, role: str = "transmission", ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the Weibull scale of one role above the forces that move it: rise, overshoot and relaxation.

    λ is pooled over the role's tensors inside the blocks; the forces are summed over all of its tensors. Where
    λ overshoots, a line through both panels marks its peak: before it the net force is positive, behind it decay
    outweighs alignment.

    Args:
        run: a `RunLog` with forces and Weibull fits (`weibull_every=…`).
        role: "selection", "transmission", "value" or "other".
        ax: two Axes to draw on; None makes a figure.

    Returns:
        An array of two Axes, λ's and the forces'.

    Raises:
        TypeError, ValueError: not a run; nothing of this role in it.
    """
    weibull, forces = _table(run, "weibull"), _table(run, "forces")
    for table in (weibull, forces):
        if role not in set(table["role"]):
            raise ValueError(f"role must be one that the run has, {sorted(set(table['role']))}, got {role!r}")
    weibull, forces = weibull[weibull["role"] == role], forces[forces["role"] == role]
    inside = weibull["layer"].notna()
    axes = _axes(ax, 2)
    weibull_trajectory(weibull[inside] if inside.any() else weibull, value="lam", by="role", ax=axes[0])
    force_budget(forces, ax=axes[1])
    peak = phases(pool_weibull(weibull[inside] if inside.any() else weibull, "role")).iloc[0]
    if peak["overshoot"]:
        _mark_phases(axes[1], peak["peak_step"], peak["peak_step"], named=False)
    if (legend := axes[0].get_legend()) is not None:  # it would name the role, which the strip does
        legend.remove()
    axes[0].set_xlabel("")
    _strip(axes[0], role)
    return np.array(axes)


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


def _axes(ax: Any, n: int, height: float | None = None) -> list[Axes]:
    """The Axes to draw on: those given, or a new figure's, one above the other."""
    if ax is None:
        import matplotlib.pyplot as plt

        height = height or (2.1 if n == 1 else 0.35 + 1.35 * n)
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


# Fits of one checkpoint.

LAW_COLORS = {
    "weibull": "#D55E00",
    "half-normal": "#332288",
    "log-normal": "#44AA99",
    "gamma": "#882255",
    "exponential": "#999933",
    "generalised normal": "#6699CC",
}
"""Colour of each law in a probability plot."""

_LOWEST = 1e-3  # of F: below it the logarithm spreads the few weights next to zero over most of the figure
_TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999)


def weibull(
    x: Tensor | np.ndarray | MagnitudeHistogram,
    *,
    method: Method = "plot",
    trim: tuple[float, float] = (0.1, 0.9),
    rivals: bool | Sequence[str] = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the probability plot of weight magnitudes, where a Weibull law is a straight line, and the fit.

    The ordinate is the fraction F of the magnitudes up to |w|, spaced as ln(−ln(1−F)); |w| is logarithmic, so the
    line has the slope k and passes F = 63.2 % at λ. It begins at F = 0.1 %.

    Args:
        x: weights, or the histogram of their magnitudes; zeros are left out.
        method, trim: as in `fit_weibull`. With "plot", the weights outside the trim are greyed, and the fit is
            dashed where it extrapolates.
        rivals: draw other laws, fitted by maximum likelihood: True for all that `rank_laws` has, or some of their
            names; the legend has the likeliest first.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The Axes.

    Raises:
        TypeError, ValueError: as in `fit_weibull`; x holds no magnitude to draw; no such law.
    """
    sample = as_histogram(x)
    fit = fit_weibull(sample, method, trim)
    if sample.n == 0:
        raise ValueError("x must hold non-zero finite weights to draw, got none")
    laws = [name for name in LAW_COLORS if name != "weibull"]
    chosen = laws if rivals is True else list(rivals or ())
    if unknown := [name for name in chosen if name not in laws]:
        raise ValueError(f"rivals must be True or some of {laws}, got {unknown[0]!r}")
    (panel,) = _axes(ax, 1, height=2.9)

    ends = _spaced(np.array([max(_LOWEST, 0.5 / sample.n), 1 - 0.5 / sample.n]))
    grid = np.linspace(ends[0], ends[1], 300)
    rank = np.unique(np.round(sample.n * _fraction(grid) + 0.5).clip(1, sample.n))
    fraction = (rank - 0.5) / sample.n
    value, height = sample.quantile(fraction), _spaced(fraction)
    kept = (fraction >= fit.trim[0]) & (fraction <= fit.trim[1]) if method == "plot" else fraction > 0
    dots = {"marker": "o", "linestyle": "", "markersize": 2.2, "markeredgewidth": 0}
    panel.plot(value[kept], height[kept], color=_DARK, label="weights", zorder=2, **dots)
    if not kept.all():
        panel.plot(value[~kept], height[~kept], color="#BDBDBD", label="outside the trim", zorder=1, **dots)

    title = f"no fit: {fit.note}"
    if not math.isnan(fit.k):
        title = f"k = {fit.k:.4g},  λ = {fit.lam:.3g},  R² = {fit.r_squared:.4f}"
        fitted = _spaced(np.array(fit.trim)).clip(*ends) if method == "plot" else ends
        for reach, dashes, label in ((ends, (0, (2, 2)), None), (fitted, "-", "Weibull")):
            line = {"color": LAW_COLORS["weibull"], "linestyle": dashes, "linewidth": 1.1, "label": label}
            panel.plot(fit.quantile(_fraction(reach)), reach, zorder=3, **line)
    panel.set_title(title, loc="left", fontsize=_small(panel), pad=3)
    if chosen:
        grid = np.geomspace(value[0], value[-1], 300)
        for law, row in rank_laws(sample).iterrows():
            if law in chosen:
                color, dashes = LAW_COLORS[str(law)], _DASHES[laws.index(str(law)) % len(_DASHES)]
                cdf = law_cdf(str(law), row["shape"], row["scale"], grid)
                inside = (cdf > 0) & (cdf < 1)
                style = {"color": color, "linestyle": dashes, "linewidth": 0.9, "label": law}
                panel.plot(grid[inside], _spaced(cdf[inside]), zorder=2.5, **style)

    panel.set_xscale("log")
    margin = 0.04 * (ends[1] - ends[0])
    panel.set_ylim(ends[0] - margin, ends[1] + margin)
    panel.set_xlim(*np.exp(_widened(np.log([value[0], value[-1]]))))
    panel.tick_params(
        axis="x", which="minor", labelsize=_small(panel)
    )  # named where |w| spans under a decade
    ticks = [tick for tick in _TICKS if ends[0] - 0.01 <= _spaced(tick) <= ends[1]]
    panel.set_yticks(_spaced(np.array(ticks)), [f"{100 * tick:.8g}" for tick in ticks])
    panel.set_ylabel("weights up to |w| (%)")
    panel.set_xlabel("|w|")
    # The plot rises from corner to corner and leaves the other two free.
    panel.legend(loc="best", fontsize=_small(panel), frameon=False, handlelength=1.6, labelspacing=0.3)
    return panel


def _spaced(fraction: Any) -> Any:
    """Where a fraction lies on Weibull paper."""
    return np.log(-np.log1p(-fraction))


def _fraction(spaced: Any) -> Any:
    return -np.expm1(-np.exp(spaced))


def _widened(ends: np.ndarray) -> np.ndarray:
    reach = 0.03 * (ends[1] - ends[0]) or 0.7
    return np.array([ends[0] - reach, ends[1] + reach])


@overload
def weights_map(
    run_or_table: RunLog | pd.DataFrame, *, value: Literal["lam", "k"], ax: Axes | None = None
) -> Axes: ...
@overload
def weights_map(
    run_or_table: RunLog | pd.DataFrame, *, value: None = None, ax: Sequence[Axes] | None = None
) -> np.ndarray: ...
def weights_map(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: Literal["lam", "k"] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw maps of the Weibull shape k and scale λ over the layers and components of a model.

    White is k₀, the shape of a normal initialisation: orange lies below it (heavier tails), purple above. A cell
    that no matrix fills, or none that could be fitted, is grey. Several matrices of one cell, such as heads or
    experts, are pooled as in `pool_weibull`. Matrices outside the layers, such as embeddings, are left out.

    Args:
        run_or_table: what `fit_weights` returned; or a `RunLog` or its Weibull table, drawn at their last step.
        value: "k" or "lam" draws that one; None draws k above λ.
        ax: Axes to draw on: one, or two where `value` is None; None makes a figure.

    Returns:
        The Axes; where `value` is None an array of two, k's and λ's.

    Raises:
        TypeError, ValueError: an argument that is not one of the above.
    """
    import matplotlib as mpl
    from matplotlib.colors import CenteredNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    if value not in ("lam", "k", None):
        raise ValueError(f"value must be 'lam', 'k' or None for both, got {value!r}")
    if not isinstance(run_or_table, pd.DataFrame) and not hasattr(run_or_table, "weibull"):
        raise TypeError(
            "run_or_table must be a table of fits or a RunLog, "
            f"got {type(run_or_table).__name__}; fit_weights(model) makes a table of a model"
        )
    table = _table(run_or_table, "weibull")
    missing = [name for name in ("layer", "component", "k", "lam") if name not in table]
    if missing:
        raise ValueError(f"run_or_table lacks the columns {missing}; fit_weights(model) has them all")
    table = table[table["layer"].notna()]
    if table.empty:
        raise ValueError("run_or_table has no matrix inside a layer, and there is nothing to map")
    table = table[table["step"] == table["step"].max()] if "step" in table else table.assign(step=0)
    layers = np.arange(table["layer"].min(), table["layer"].max() + 1)
    names = [name for name in COMPONENTS if name in set(table["component"])]
    pooled = pool_weibull(table, ["layer", "component"])

    values = ("k", "lam") if value is None else (value,)
    axes = _axes(ax, len(values))
    for panel, column in zip(axes, values, strict=True):
        cells = pooled.pivot_table(column, "component", "layer", observed=True)
        cells = np.ma.masked_invalid(cells.reindex(index=names, columns=layers).to_numpy(dtype=float))
        norm = CenteredNorm(K0) if column == "k" else Normalize()
        colors = mpl.colormaps["PuOr" if column == "k" else "cividis"]
        image = panel.pcolormesh(
            np.append(layers, layers[-1] + 1) - 0.5,
            np.arange(len(names) + 1) - 0.5,
            cells,
            cmap=colors,
            norm=norm,
        )
        panel.set_facecolor("#D9D9D9")
        panel.set_yticks(np.arange(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        panel.tick_params(length=0)
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        bar = panel.figure.colorbar(image, ax=panel, aspect=12, pad=0.02)
        bar.outline.set_visible(False)
        if column == "k":  # the scale is symmetric, the matrices are not
            bar.ax.set_ylim(min(cells.min(), K0), max(cells.max(), K0))
        bar.ax.tick_params(labelsize=_small(panel), width=0.6, length=2.5)
        bar.set_label(_SYMBOLS[column], size=_small(panel) + 1)
    axes[-1].set_xlabel("layer")
    return axes[0] if value is not None else np.array(axes)


# Recovery from checkpoints.

METHOD_COLORS = {"balance": FORCE_COLORS["alignment"], "spline": "#CC79A7", "two_point": "#B8860B"}
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
    from weightdyn.recovery import interval_means

    tables = recovered if isinstance(recovered, Mapping) else {"recovered": recovered}
    top, bottom = _axes(ax, 2)
    spread = 0.0
    for i, (name, table) in enumerate(tables.items()):
        both = table.assign(true=interval_means(truth, table))
        both = both[both["true"].notna()]
        if both.empty:
            raise ValueError(f"truth has no update of the tensors and spans of recovered ({name})")
        columns = ["alignment", "true", "alignment_low", "alignment_high"]
        rows = both.groupby(["step", "span"])[columns].sum().reset_index()
        middle = rows["step"] - (rows["span"] - 1) / 2
        ratio = rows["alignment"] / rows["true"]
        style = {
            "color": METHOD_COLORS.get(name, FORCE_COLORS["alignment"]),
            "linestyle": _DASHES[i % len(_DASHES)],
            "linewidth": 1.1,
            "marker": "o",
            "ms": 2,
            "zorder": 3 - 0.1 * i,
        }
        if i == 0:
            shade = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
            top.plot(middle, rows["true"], color=_DARK, linewidth=2.2, alpha=0.5, label="logged")
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
    bottom.axhline(1, color=_GREY, linewidth=0.6, zorder=0)
    top.axhline(0, color=_GREY, linewidth=0.6, zorder=0)
    _label([top, bottom], ["alignment\n(Δ‖w‖² per update)", "ratio to\nthe logged"])
    _legend_above(top)
    return np.array([top, bottom])


# Shifts between paired runs.


def wisca_shift(shift: pd.DataFrame, *, group: Any = None, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw what a rescaling shifts, arm minus control over the updates: force shares, λ, k and loss.

    Bands are the confidence intervals over seeds that the table has; of one seed there are none.

    Args:
        shift: what `Comparison.shift` returned; `window=` there makes calmer lines.
        group: which component, role or layer to draw, of a table that has several ("q" of by="component"). The
            loss is the model's.
        ax: four Axes to draw on; None makes a figure.

    Returns:
        An array of four Axes: shares in percentage points, λ, k and losses.

    Raises:
        TypeError, ValueError: not such a table; it has no such group, or several and none is named.

    >>> row = {"step": [5, 10], "value": 1.0, "control": 1.0, "low": -0.1, "high": 0.1, "seeds": 3}
    >>> quantities = [*(f"{force}_share" for force in FORCES), "lam", "k", "loss"]
    >>> table = pd.concat([pd.DataFrame({"quantity": name, "difference": 0.0, **row}) for name in quantities])
    >>> [panel.get_ylabel() for panel in wisca_shift(table)]
    ['Δ share (points)', 'Δλ', 'Δk', 'Δ loss']
    """
    table = _one_group(shift, group)
    axes = _axes(ax, 4)
    shares = [(f"{force}_share", FORCE_COLORS[force], force) for force in FORCES]
    names = sorted(
        {name for name in table["quantity"] if "loss" in str(name)}, key=lambda name: (len(name), name)
    )
    losses = [
        (name, (_DARK, *ROLE_COLORS.values())[i], name.replace("_", " ")) for i, name in enumerate(names)
    ]
    for panel, lines in zip(axes, (shares, [("lam", _DARK, "λ")], [("k", _DARK, "k")], losses), strict=True):
        panel.axhline(0, color=_GREY, linewidth=0.6, zorder=0)
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
    _label(axes, ["Δ share (points)", "Δλ", "Δk", "Δ loss"])
    _legend_above(axes[0])
    if len(losses) > 1:
        axes[3].legend(
            loc="best", fontsize=_small(axes[3]), frameon=False, handlelength=1.6, labelspacing=0.3
        )
    return np.array(axes)


def _one_group(shift: Any, group: Any) -> pd.DataFrame:
    """The rows of one group of a table of shifts, and those of the losses."""
    if not isinstance(shift, pd.DataFrame):
        raise TypeError(
            f"shift must be the table that Comparison.shift() returns, got {type(shift).__name__}"
        )
    own = ("step", "quantity", "value", "control", "difference", "low", "high", "seeds")
    if missing := [name for name in ("step", "quantity", "difference", "low", "high") if name not in shift]:
        raise ValueError(f"shift lacks the columns {missing}; Comparison.shift() returns them")
    keys = [name for name in shift if name not in own]
    if len(keys) > 1:
        raise ValueError(
            f"shift has the groups {keys}; one of them can be drawn: Comparison.shift(…, by={keys[0]!r})"
        )
    loss_rows = shift["quantity"].astype(str).str.contains("loss")
    if not keys:
        if group is not None:
            raise ValueError(f"group: the table has one for the whole model only, got {group!r}")
        return shift
    column = shift[keys[0]]
    names = list(column[~loss_rows].dropna().unique())
    if group is None and len(names) == 1:
        group = names[0]
    if group not in names:
        raise ValueError(f"group must be one of {names}, got {group!r}")
    return shift[loss_rows | column.eq(group).fillna(False).astype(bool)]
