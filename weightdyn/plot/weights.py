"""Figures of the weights of one checkpoint: probability plots, maps of λ and k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_choice, refuse
from weightdyn.core.naming import COMPONENTS
from weightdyn.core.tables import check_columns, check_weibull_table, pool_weibull, table_of
from weightdyn.plot.style import DASHES, SYMBOLS, make_axes, small_size, stack_names
from weightdyn.weibull.fit import K0, Method, as_histogram, cloglog, fit_weibull
from weightdyn.weibull.laws import law_cdf, rank_laws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from weightdyn.record.runlog import RunLog
    from weightdyn.weibull.magnitudes import MagnitudeHistogram


LAW_COLORS = {
    "weibull": "#B54406",
    "half-normal": "#5315DA",
    "log-normal": "#149BFF",
    "gamma": "#7D037F",
    "exponential": "#EAB70F",
    "generalised normal": "#827468",
}
"""Colour of each law in a probability plot."""

WEIGHT_COLORS = {"weights": "#202020", "outside the trim": "#D9D9D9"}
"""Colour of the weights themselves there."""

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
    if not isinstance(rivals, bool | Sequence) or isinstance(rivals, str | bytes):
        raise refuse("rivals", f"True, False or some of {laws}", rivals)
    chosen = laws if rivals is True else list(rivals or ())
    if unknown := [name for name in chosen if name not in laws]:
        raise ValueError(f"rivals must be True or some of {laws}, got {unknown[0]!r}")
    (panel,) = make_axes(ax, 1, height=2.9)

    ends = cloglog(np.array([max(_LOWEST, 0.5 / sample.n), 1 - 0.5 / sample.n]))
    grid = np.linspace(ends[0], ends[1], 300)
    rank = np.unique(np.round(sample.n * _fraction(grid) + 0.5).clip(1, sample.n))
    fraction = (rank - 0.5) / sample.n
    value, height = sample.quantile(fraction), cloglog(fraction)
    kept = (fraction >= fit.trim[0]) & (fraction <= fit.trim[1]) if method == "plot" else fraction > 0
    dots = {"marker": "o", "linestyle": "", "markersize": 2.2, "markeredgewidth": 0}
    panel.plot(value[kept], height[kept], color=WEIGHT_COLORS["weights"], label="weights", zorder=2, **dots)
    if not kept.all():
        color = WEIGHT_COLORS["outside the trim"]
        panel.plot(value[~kept], height[~kept], color=color, label="outside the trim", zorder=1, **dots)

    title = f"no fit: {fit.note}"
    if not math.isnan(fit.k):
        title = f"λ = {fit.lam:.3g},  k = {fit.k:.4g},  R² = {fit.r_squared:.4f}"
        fitted = cloglog(np.array(fit.trim)).clip(*ends) if method == "plot" else ends
        for reach, dashes, label in ((ends, (0, (2, 2)), None), (fitted, "-", "Weibull")):
            line = {"color": LAW_COLORS["weibull"], "linestyle": dashes, "linewidth": 1.1, "label": label}
            panel.plot(fit.quantile(_fraction(reach)), reach, zorder=3, **line)
    panel.set_title(title, loc="left", fontsize=small_size(panel), pad=3)
    if chosen:
        grid = np.geomspace(value[0], value[-1], 300)
        for law, row in rank_laws(sample).iterrows():
            if law in chosen:
                color, dashes = LAW_COLORS[str(law)], DASHES[laws.index(str(law)) % len(DASHES)]
                cdf = law_cdf(str(law), row["shape"], row["scale"], grid)
                inside = (cdf > 0) & (cdf < 1)
                style = {"color": color, "linestyle": dashes, "linewidth": 0.9, "label": law}
                panel.plot(grid[inside], cloglog(cdf[inside]), zorder=2.5, **style)

    panel.set_xscale("log")
    margin = 0.04 * (ends[1] - ends[0])
    panel.set_ylim(ends[0] - margin, ends[1] + margin)
    panel.set_xlim(*np.exp(_widened(np.log([value[0], value[-1]]))))
    # Minor ticks are named where |w| spans under a decade.
    panel.tick_params(axis="x", which="minor", labelsize=small_size(panel))
    ticks = [tick for tick in _TICKS if ends[0] - 0.01 <= cloglog(tick) <= ends[1]]
    panel.set_yticks(cloglog(np.array(ticks)), [f"{100 * tick:.8g}" for tick in ticks])
    panel.set_ylabel("weights up to |w| (%)")
    panel.set_xlabel("|w|")
    # The plot rises from corner to corner and leaves the other two free.
    panel.legend(loc="best", fontsize=small_size(panel), frameon=False, handlelength=1.6, labelspacing=0.3)
    return panel


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
    """Draw maps of the Weibull scale λ and shape k over the layers and components of a model.

    White is k₀, the shape of a normal initialisation: orange lies below it (heavier tails), purple above. A cell
    that no matrix fills, or none that could be fitted, is grey. Several matrices of one cell, such as heads or
    experts, are pooled as in `pool_weibull`. Several stacks, such as an encoder and a decoder, stand side by side.
    Matrices outside the layers, such as embeddings, are left out.

    Args:
        run_or_table: what `fit_weights` returned; or a `RunLog` or its Weibull table, drawn at their last step.
        value: "lam" or "k" draws that one; None draws λ above k.
        ax: Axes to draw on: one, or two where `value` is None; None makes a figure.

    Returns:
        The Axes; where `value` is None an array of two, λ's and k's.

    Raises:
        TypeError, ValueError: an argument that is not one of the above.
    """
    import matplotlib as mpl
    from matplotlib.colors import CenteredNorm, Normalize

    check_choice("value", value, ("lam", "k", None))
    if not isinstance(run_or_table, pd.DataFrame) and not hasattr(run_or_table, "weibull"):
        raise TypeError(
            "run_or_table must be a table of fits or a RunLog, "
            f"got {type(run_or_table).__name__}; fit_weights(model) makes a table of a model"
        )
    table = table_of(run_or_table, "weibull", argument="run_or_table")
    check_columns(table, ("layer", "component", "lam", "k"), "table of fits", argument="run_or_table")
    table = table[table["layer"].notna()]
    if table.empty:
        raise ValueError("run_or_table has no matrix inside a layer, and there is nothing to map")
    table = table[table["step"] == table["step"].max()] if "step" in table else table.assign(step=0)
    if "stack" not in table:
        table = table.assign(stack="")
    stacks = [*dict.fromkeys(table["stack"])]
    columns = [
        (stack, layer)
        for stack in stacks
        for own in [table.loc[table["stack"] == stack, "layer"]]
        for layer in range(own.min(), own.max() + 1)
    ]
    names = [name for name in COMPONENTS if name in set(table["component"])]
    pooled = pool_weibull(
        check_weibull_table(table, argument="run_or_table", unique=True), ["layer", "component"]
    ).set_index(["component", "stack", "layer"])

    values = ("lam", "k") if value is None else (value,)
    axes = make_axes(ax, len(values))
    for panel, column in zip(axes, values, strict=True):
        known = pooled[column].to_dict()
        cells = [[known.get((name, *place), math.nan) for place in columns] for name in names]
        cells = np.ma.masked_invalid(np.array(cells, dtype=float))
        norm = CenteredNorm(K0) if column == "k" else Normalize()
        colors = mpl.colormaps["PuOr" if column == "k" else "cividis"]
        edges = np.arange(len(columns) + 1) - 0.5, np.arange(len(names) + 1) - 0.5
        image = panel.pcolormesh(*edges, cells, cmap=colors, norm=norm)
        panel.set_facecolor("#D9D9D9")
        panel.set_yticks(np.arange(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.tick_params(length=0)
        _mark_layers(panel, columns, named=panel is axes[0])
        bar = panel.figure.colorbar(image, ax=panel, aspect=12, pad=0.02)
        bar.outline.set_visible(False)
        if column == "k":  # the scale is symmetric, the matrices are not
            bar.ax.set_ylim(min(cells.min(), K0), max(cells.max(), K0))
        bar.ax.tick_params(labelsize=small_size(panel), width=0.6, length=2.5)
        bar.set_label(SYMBOLS[column], size=small_size(panel) + 1)
    axes[-1].set_xlabel("layer")
    return axes[0] if value is not None else np.array(axes)


def _mark_layers(panel: Axes, columns: Sequence[tuple[str, int]], *, named: bool) -> None:
    """Ticks with the layers' numbers; between stacks a white line, above each its name."""
    from matplotlib.ticker import MaxNLocator

    names = stack_names([{"stack": stack, "layer": layer} for stack, layer in columns])
    ticks = []
    for stack in dict.fromkeys(stack for stack, _ in columns):
        places = [i for i, (own, _) in enumerate(columns) if own == stack]
        first = columns[places[0]][1]
        most = max(1, 10 * len(places) // len(columns))
        wanted = MaxNLocator(most, integer=True).tick_values(first, first + len(places) - 1)
        ticks += [places[int(at) - first] for at in wanted if 0 <= at - first < len(places)]
        if names:
            panel.axvline(places[-1] + 0.5, color="white", linewidth=2)
            if named:
                style = {"ha": "center", "va": "bottom", "fontsize": small_size(panel)}
                panel.annotate(
                    names[stack],
                    ((places[0] + places[-1]) / 2, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 1),
                    textcoords="offset points",
                    **style,
                )
    panel.set_xticks(ticks, [str(columns[i][1]) for i in ticks])
