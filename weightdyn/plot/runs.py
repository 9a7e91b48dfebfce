"""Figures of a run: its forces, its Weibull trajectories, its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_choice, check_text
from weightdyn.core.tables import (
    DRIFT_FORCES,
    FORCES,
    By,
    aggregate,
    budget,
    check_columns,
    check_drift,
    check_force_table,
    check_weibull_table,
    pool_weibull,
    table_of,
)
from weightdyn.explain.trajectory import phases
from weightdyn.plot.style import (
    DARK,
    FORCE_COLORS,
    GREY,
    LAYERS_IN_LEGEND,
    LONG_NAME,
    NAMED_LINES,
    NOISY,
    PANELS,
    ROLE_COLORS,
    SYMBOLS,
    Group,
    check_number,
    draw_line,
    draw_mean,
    label_axes,
    layer_bar,
    legend_above,
    line_styles,
    make_axes,
    mark_phases,
    name_panel,
    noisy_mean,
    split_groups,
    stack_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from weightdyn.record.runlog import RunLog


Kind = Literal["forces", "shares", "drift", "drift_shares"]

_OVERVIEW = ("transmission", "selection", "value", "other")  # the first that a run has is looked at


@overload
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = ...,
    by: Literal["model"] = ...,
    ax: Axes | None = None,
) -> Axes: ...
@overload
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = ...,
    by: Literal["layer", "component", "role"] | Sequence[str] | None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray: ...
def force_budget(
    run_or_table: RunLog | pd.DataFrame,
    *,
    kind: Kind = "forces",
    by: By | Sequence[str] | None = "model",
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw what moves ‖w‖² over a run: alignment, injection and decay, or drift, diffusion and decay.

    Args:
        run_or_table: a `RunLog` or a force table; its tensors are summed.
        kind: "forces" draws the signed contributions of alignment, injection and decay to ‖w‖² per update and
            their net; "shares" draws |F| / (|alignment| + |injection| + |decay|) in percent. "drift" draws drift
            (the pull of the mean gradient), diffusion = injection + memory (the random walk of its noise), decay
            and their net; "drift_shares" F / (|drift| + |diffusion| + |decay|) in percent, with their signs, since
            drift may have either. These two need a table that knows the drift.
        by: "layer", "component", "role" or a list of such columns draws one panel for each; "model" sums all in one
            panel; None draws one for each tensor.
        ax: Axes to draw on, as many as there are panels; None makes a figure.

    Lines of more than 200 rows are the running mean over 2 % of the rows, with the rows themselves in a light tint
    behind; shares are averaged as shares. The drift of single updates is mostly noise, new in each of them: with
    "drift" lines of more than 50 of them are the mean over 6 % of the rows, 13 at least, alone, drift's with a band
    of ± one standard error, and "drift_shares" are the shares of these means.

    Returns:
        The Axes; where there is a panel for each group an array of them, in the order of the panels.

    Raises:
        TypeError, ValueError: an argument that is not one of the above; more panels than a figure holds; "drift" of
            a table that knows no drift.
    """
    check_choice("kind", kind, ("forces", "shares", "drift", "drift_shares"))
    table = check_force_table(run_or_table, argument="run_or_table", empty=False, unique=True)
    drift = kind in ("drift", "drift_shares")
    if drift:
        check_drift(table, run_or_table, argument="run_or_table")
    table = budget(aggregate(table, by), kind="drift" if drift else "forces")
    panels = split_groups(table, by)
    check_number(panels, by, PANELS, "panels")
    axes = make_axes(ax, len(panels))
    several = len(panels) > 1 or bool(panels[0].place)
    names = DRIFT_FORCES if drift else FORCES
    shares = kind in ("shares", "drift_shares")
    for panel, (name, _, rows) in zip(axes, panels, strict=True):
        panel.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        noisy = drift and len(rows) > NOISY and (rows["span"] == 1).all()
        means = rows[list(names)].apply(noisy_mean) if noisy else rows[list(names)]
        for force in names if shares else (*names, "net"):
            color = FORCE_COLORS[force]
            if drift and shares:
                share = 100 * means[force] / means.abs().sum(axis=1, skipna=False)
                panel.plot(rows["step"], share, linewidth=1.2, color=color, label=force)
            elif noisy:
                band = force == "drift"
                draw_mean(panel, rows["step"], rows[force], color=color, label=force, band=band)
            else:
                values = 100 * rows[f"{force}_share"] if shares else rows[force]
                draw_line(panel, rows["step"], values, color=color, label=force)
        if shares:
            panel.set_ylim(-100 if drift else 0, 100)
        if several:
            name_panel(panel, name)
    label_axes(axes, ["budget share (%)" if shares else "Δ‖w‖² per update"] * len(axes))
    legend_above(axes[0], raised=len(panels[0].name) > LONG_NAME)
    return np.array(axes) if several else axes[0]


@overload
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: Literal["lam", "k"],
    by: By | Sequence[str] | None = ...,
    ax: Axes | None = None,
) -> Axes: ...
@overload
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: None = None,
    by: By | Sequence[str] | None = ...,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray: ...
def weibull_trajectory(
    run_or_table: RunLog | pd.DataFrame,
    *,
    value: Literal["lam", "k"] | None = None,
    by: By | Sequence[str] | None = "layer",
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw the Weibull scale λ and shape k of the weights over a run, with the phases of λ marked.

    Args:
        run_or_table: a `RunLog` or a Weibull table: `step`, `k`, `lam`; `layer`, `role`, `numel`, … if any.
        value: "lam" or "k" draws that one; None draws λ above k.
        by: a line for each "layer", "component", "role" or list of such columns, or one for the whole "model";
            tensors are pooled as in `pool_weibull`. None draws one for each tensor.
        ax: Axes to draw on: one, or two where `value` is None; None makes a figure.

    A dot marks the peak of each λ that overshoots (`phases`). A band through the panels reaches from the first of
    these peaks to the last: before it λ rises, behind it λ relaxes.

    Returns:
        The Axes; where `value` is None an array of two, λ's and k's.

    Raises:
        TypeError, ValueError: an argument that is not one of the above.
    """
    check_choice("value", value, ("lam", "k", None))
    table = check_weibull_table(run_or_table, argument="run_or_table", empty=False, unique=True)
    pooled = pool_weibull(table, by)
    if pooled.empty:
        raise ValueError("run_or_table has no Weibull fits: λ or k is missing in every row")
    lines = split_groups(pooled, by)
    layers = set(lines[0].place) in ({"layer"}, {"stack", "layer"})
    bar = layers and sum(not line.outside for line in lines) > LAYERS_IN_LEGEND
    if not layers:
        check_number(lines, by, NAMED_LINES, "lines")
    values = ("lam", "k") if value is None else (value,)
    axes = make_axes(ax, len(values))

    styles, stacks = line_styles(lines), stack_names([line.place for line in lines])
    labels = [_label(line, layers, bar, stacks) for line in lines]
    found = [phases(line.rows).iloc[0] for line in lines]
    peaks = [one["peak_step"] for one in found if one["overshoot"]]
    for panel, column in zip(axes, values, strict=True):
        for line, style, label, phase in zip(lines, styles, labels, found, strict=True):
            new = label not in panel.get_legend_handles_labels()[1]
            panel.plot(
                line.rows["step"], line.rows[column], linewidth=1.1, label=label if new else None, **style
            )
            if column == "lam" and phase["overshoot"]:
                color, edge = style["color"], style["color"] if bar else "white"
                size = 2 if bar else 4
                panel.plot(phase["peak_step"], phase["peak"], "o", color=color, mec=edge, mew=0.5, ms=size)
        if peaks:
            mark_phases(panel, min(peaks), max(peaks), named=panel is axes[0])
    label_axes(axes, [SYMBOLS[column] for column in values])
    if bar:
        layer_bar(axes, sorted({line.place["layer"] for line in lines if not line.outside}))
    if lines[0].place:
        title = "layer" if layers and not bar and not stacks else None
        legend_above(axes[0], raised=bool(peaks), title=title)
    return axes[0] if value is not None else np.array(axes)


def _label(line: Group, layers: bool, bar: bool, stacks: Mapping[str, str]) -> str | None:
    """What the legend says of a line; beside a bar of layers, only in which stack they are."""
    if not layers or line.outside:
        return line.name
    if bar:
        return stacks.get(line.place.get("stack", ""))
    return line.name if stacks else line.name.removeprefix("layer ")


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
    if unit is not None:
        check_text("unit", unit, "a string, such as 'nats per byte', or None")
    table = table_of(run_or_table, "metrics", argument="run_or_table")
    names = [name for name in table if "loss" in str(name).lower() and table[name].notna().any()]
    if "step" not in table or not names:
        raise ValueError(f"run_or_table holds no losses by step: its columns are {list(table.columns)}")
    check_columns(table, ("step", *names), "table of losses", argument="run_or_table")
    axes = make_axes(ax, 1)
    colors = (DARK, *ROLE_COLORS.values())
    for i, name in enumerate(names):
        rows = table[["step", name]].dropna()
        sparse = 2 * len(rows) < len(table)
        label = str(name).replace("_", " ")
        draw_line(axes[0], rows["step"], rows[name], color=colors[i % len(colors)], label=label, dots=sparse)
    label_axes(axes, ["loss" if unit is None else f"loss ({unit})"])
    if len(names) > 1:
        legend_above(axes[0])
    return axes[0]


def overview(run: RunLog, *, role: str | None = None, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the Weibull scale of one role above what moves it: rise, overshoot and relaxation.

    λ is pooled over the role's tensors inside the blocks; the forces are summed over all of its tensors: drift,
    diffusion and decay where the run knows the drift, else alignment, injection and decay. Where λ overshoots, a
    line through both panels marks its peak: before it drift and diffusion outweigh decay, behind it decay outweighs
    them. Of a run without fits the upper panel has the norm ‖w‖ before each update.

    Args:
        run: a `RunLog` with forces and, better, Weibull fits (`weibull_every=…`).
        role: "selection", "transmission", "value" or "other"; None takes transmission or, where the run has none
            (or fits, but none of it), the next in the order selection, value, other.
        ax: two Axes to draw on; None makes a figure.

    Returns:
        An array of two Axes, λ's or the norm's, and the forces'.

    Raises:
        TypeError, ValueError: not a run; nothing of this role in it.
    """
    weibull = check_weibull_table(run, argument="run")
    forces = check_force_table(run, argument="run", empty=False)
    weibull = weibull[weibull["lam"].notna() & weibull["k"].notna()]
    there = set(forces["role"])
    roles = [name for name in _OVERVIEW if name in there and (weibull.empty or name in set(weibull["role"]))]
    if not roles:
        raise ValueError("run: no role has both forces and Weibull fits (weibull_every=…)")
    role = check_choice("role", roles[0] if role is None else role, roles)
    weibull, forces = weibull[weibull["role"] == role], forces[forces["role"] == role]
    axes = make_axes(ax, 2)
    known = "drift" in forces and aggregate(forces, "model")["drift"].notna().any()
    if weibull.empty:
        norms = aggregate(forces, "model")
        draw_line(axes[0], norms["step"], np.sqrt(norms["norm_sq"]), color=DARK, label="‖w‖")
        label_axes(axes[:1], ["norm ‖w‖"])
        force_budget(forces, kind="drift" if known else "forces", ax=axes[1])
    else:
        inside = weibull["layer"].notna()
        weibull = weibull[inside] if inside.any() else weibull
        weibull_trajectory(weibull, value="lam", by="role", ax=axes[0])
        force_budget(forces, kind="drift" if known else "forces", ax=axes[1])
        peak = phases(pool_weibull(weibull, "role")).iloc[0]
        if peak["overshoot"]:
            mark_phases(axes[1], peak["peak_step"], peak["peak_step"], named=False)
    if (legend := axes[0].get_legend()) is not None:  # it would name the role, which the strip does
        legend.remove()
    axes[0].set_xlabel("")
    name_panel(axes[0], str(role))
    return np.array(axes)
