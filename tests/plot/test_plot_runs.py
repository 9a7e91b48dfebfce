import subprocess
import sys
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from weightdyn import ForceLogger, RunLog, plot
from weightdyn.core.tables import DRIFT_FORCES, FORCES
from weightdyn.plot.recovered import METHOD_COLORS
from weightdyn.plot.style import DARK, FORCE_COLORS, ROLE_COLORS
from weightdyn.plot.weights import LAW_COLORS, WEIGHT_COLORS

mpl.use("Agg")

import matplotlib.pyplot as plt

COMPONENTS = {"q": "selection", "v": "value", "up": "transmission", "down": "transmission"}


@pytest.fixture(autouse=True)
def no_figures():
    assert not plt.get_fignums()
    yield
    plt.close("all")


def grouped(rows):
    layer = pd.array([None if layer is None else layer for layer in rows["layer"]], dtype="Int64")
    return rows.assign(layer=layer).astype(dict.fromkeys(("tensor", "component", "role"), "category"))


def names(layers):
    for layer in range(layers):
        for component, role in COMPONENTS.items():
            yield {
                "tensor": f"layers.{layer}.{component}",
                "layer": layer,
                "component": component,
                "role": role,
            }
    yield {"tensor": "embed", "layer": None, "component": "embed", "role": "other"}


def force_table(updates=120, layers=2, seed=0):
    """Forces of a run that rises, overshoots and relaxes, with the noise that single updates have."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, updates + 1)
    t = step / updates
    parts = []
    for name in names(layers):
        alignment = np.exp(-4 * t) * (1 + 0.3 * rng.normal(size=updates))
        injection, decay = 0.1 * np.exp(-t), -0.6 * t * np.exp(-2 * t)
        parts.append(
            pd.DataFrame({"step": step, "span": 1, **name, "numel": 100, "lr": 1e-3, "weight_decay": 0.1})
            .assign(norm_sq=np.cumsum(alignment + injection + decay) + 50)
            .assign(norm_sq_after=np.nan, alignment=alignment, injection=injection, decay=decay)
        )
    table = grouped(pd.concat(parts))
    return table.sort_values("step", kind="stable", ignore_index=True)


def drift_table(updates=120, layers=2, seed=0):
    """The same with alignment told apart: a drift below zero whose single updates are noise, and memory."""
    table = force_table(updates, layers, seed)
    noise = np.random.default_rng(seed + 1).normal(size=len(table))
    drift = -0.1 * np.exp(-table["step"] / updates) * (1 + 5 * noise)
    memory = table["alignment"] - drift
    return table.assign(drift=drift, memory=memory, memory_null=memory, signal=0.0)


def weibull_table(layers=2, rows=40, relax=0.5, peak=0.3):
    """λ peaks after the fraction `peak` of the run (deeper layers later), then loses `relax`; k is flat."""
    step = 10 * np.arange(1, rows + 1)
    parts = []
    for name in names(layers):
        top = (peak + 0.02 * (name["layer"] or 0)) * step[-1]
        lam = 0.02 + 0.05 * np.minimum(step / top, 1) - 0.05 * relax * np.clip((step - top) / step[-1], 0, 1)
        parts.append(pd.DataFrame({"step": step, **name, "numel": 100, "k": 1.2, "lam": lam, "n": 100}))
    return grouped(pd.concat(parts))


def two_stacks(table):
    """The blocks of the table as an encoder's, and a decoder's with twice the forces and λ."""
    table = table.reset_index(drop=True)
    inside = table["layer"].notna()
    encoder = table.assign(stack=np.where(inside, "model.encoder", ""))
    encoder["tensor"] = np.where(inside, "model.encoder.", "") + table["tensor"].astype(str)
    decoder = table[inside].assign(
        stack="model.decoder", tensor="model.decoder." + table["tensor"].astype(str)
    )
    for name in {*FORCES, "lam"} & set(table):
        decoder[name] = 2 * decoder[name]
    both = pd.concat([encoder, decoder], ignore_index=True)
    stacks = pd.CategoricalDtype(["", "model.encoder", "model.decoder"])
    return both.astype({"stack": stacks, "tensor": "category", "component": "category", "role": "category"})


def of_one_component(table):
    return table.assign(component="norm")


def metrics_table(updates=400):
    step = np.arange(1, updates + 1)
    loss = 4 * np.exp(-step / 100) + 1 + 0.1 * np.random.default_rng(0).normal(size=updates)
    evaluated = np.where(step % 50 == 0, 4 * np.exp(-step / 100) + 1, np.nan)
    return pd.DataFrame({"step": step, "loss": loss, "eval_loss": evaluated, "lr": 1e-3})


def line(ax, label):
    (found,) = [one for one in ax.get_lines() if one.get_label() == label]
    return found


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def every_figure():
    """Each kind of figure that this module makes itself."""
    forces, weibull = force_table(300), weibull_table()
    yield plot.force_budget(forces).figure
    yield plot.force_budget(forces, kind="shares").figure
    yield plot.force_budget(forces, by="role")[0].figure
    yield plot.force_budget(drift_table(300), kind="drift").figure
    yield plot.force_budget(drift_table(300), kind="drift_shares", by="role")[0].figure
    yield plot.weibull_trajectory(weibull)[0].figure
    yield plot.weibull_trajectory(weibull, by="role")[0].figure
    yield plot.weibull_trajectory(weibull, by="component", value="lam").figure
    yield plot.weibull_trajectory(weibull_table(layers=24))[0].figure
    yield plot.weibull_trajectory(weibull_table(peak=0.85))[0].figure
    yield plot.weibull_trajectory(weibull_table(peak=0.05))[0].figure
    yield plot.weibull_trajectory(weibull_table(layers=1), by=None)[0].figure
    yield plot.weibull_trajectory(two_stacks(weibull_table(layers=2)))[0].figure
    yield plot.weibull_trajectory(two_stacks(weibull_table(layers=12)))[0].figure
    yield plot.force_budget(forces, by=None)[0].figure
    yield plot.force_budget(two_stacks(forces), by="layer")[0].figure
    yield plot.force_budget(of_one_component(forces), by=None)[0].figure
    yield plot.loss(metrics_table(), unit="nats per byte").figure


# What is drawn


def test_the_lines_of_a_force_budget_are_the_sums_of_the_table():
    table = force_table()
    ax = plot.force_budget(table)
    assert isinstance(ax, Axes)
    for force in FORCES:
        drawn = line(ax, force)
        assert np.array_equal(drawn.get_xdata(), np.arange(1, 121))
        expected = [table.loc[table["step"] == step, force].sum() for step in range(1, 121)]
        assert np.allclose(drawn.get_ydata(), expected)
        assert to_hex(drawn.get_color()) == FORCE_COLORS[force].lower()
    net = np.sum([line(ax, force).get_ydata() for force in FORCES], axis=0)
    assert np.allclose(line(ax, "net").get_ydata(), net)
    assert legend_texts(ax) == ["alignment", "injection", "decay", "net"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("update", "Δ‖w‖² per update")


def test_shares_are_percentages_of_the_absolute_forces():
    table = force_table()
    ax = plot.force_budget(table, kind="shares")
    sums = table.groupby("step")[list(FORCES)].sum().abs()
    for force in FORCES:
        assert np.allclose(line(ax, force).get_ydata(), 100 * sums[force] / sums.sum(axis=1))
        assert to_hex(line(ax, force).get_color()) == FORCE_COLORS[force].lower()
    assert legend_texts(ax) == list(FORCES)
    assert ax.get_ylim() == (0, 100)
    assert ax.get_ylabel() == "budget share (%)"


def test_drift_and_diffusion_are_alignment_and_injection_told_apart():
    table = drift_table(updates=40)
    ax = plot.force_budget(table, kind="drift")
    sums = table.groupby("step")[["drift", "memory", *FORCES]].sum()
    drawn = {name: line(ax, name).get_ydata() for name in (*DRIFT_FORCES, "net")}
    np.testing.assert_allclose(drawn["drift"], sums["drift"])
    np.testing.assert_allclose(drawn["diffusion"], sums["injection"] + sums["memory"])
    np.testing.assert_allclose(drawn["net"], sums[list(FORCES)].sum(axis=1))
    assert legend_texts(ax) == [*DRIFT_FORCES, "net"]
    assert {name: to_hex(line(ax, name).get_color()).upper() for name in drawn} == {
        name: FORCE_COLORS[name] for name in drawn
    }
    assert ax.get_ylabel() == "Δ‖w‖² per update"


def test_shares_of_drift_keep_their_signs():
    table = drift_table(updates=40)
    ax = plot.force_budget(table, kind="drift_shares")
    sums = table.groupby("step")[["drift", "memory", "injection", "decay"]].sum()
    sums["diffusion"] = sums.pop("memory") + sums.pop("injection")
    for name in DRIFT_FORCES:
        expected = 100 * sums[name] / sums.abs().sum(axis=1)
        np.testing.assert_allclose(line(ax, name).get_ydata(), expected)
    assert line(ax, "drift").get_ydata().mean() < 0
    assert ax.get_ylim() == (-100, 100)
    assert ax.get_ylabel() == "budget share (%)"


# 6 % of 500 rows is 31 of them; 13 at least.
@pytest.mark.parametrize(("updates", "half"), [(500, 15), (120, 6)])
def test_the_drift_of_many_updates_is_their_mean_with_its_standard_error(updates, half):
    table = drift_table(updates=updates)
    sums = table.groupby("step")[["drift", "memory", "injection", "decay"]].sum()
    ax = plot.force_budget(table, kind="drift")
    means = {}
    for name in ("drift", "decay"):
        values = sums[name].to_numpy()
        means[name] = np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(updates)])
        np.testing.assert_allclose(line(ax, name).get_ydata(), means[name])
    assert len(ax.get_lines()) == 5  # no noise behind the means, but the line of zero
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices
    drift = sums["drift"].to_numpy()
    rest = (drift - means["drift"])[60 - half : 60 + half + 1]
    error = np.sqrt((rest**2).mean() / (2 * half + 1))
    at = sorted(set(edges[edges[:, 0] == 61][:, 1]))
    np.testing.assert_allclose(at, [means["drift"][60] - error, means["drift"][60] + error])

    shares = plot.force_budget(table, kind="drift_shares")
    diffusion = (sums["memory"] + sums["injection"]).to_numpy()
    means["diffusion"] = np.array([diffusion[max(0, i - half) : i + half + 1].mean() for i in range(updates)])
    total = sum(np.abs(each) for each in means.values())
    np.testing.assert_allclose(line(shares, "drift").get_ydata(), 100 * means["drift"] / total)


def test_a_drift_over_many_updates_is_drawn_as_it_is():
    table = drift_table(updates=120)
    table = table.assign(step=10 * table["step"], span=10)
    sums = table.groupby("step")["drift"].sum()
    np.testing.assert_allclose(line(plot.force_budget(table, kind="drift"), "drift").get_ydata(), sums)


@pytest.mark.parametrize(
    ("by", "panels"),
    [
        ("role", ["selection", "transmission", "value", "other"]),
        ("layer", ["layer 0", "layer 1", "outside the blocks"]),
        ("component", ["q", "v", "up", "down", "embed"]),
    ],
)
def test_by_draws_a_panel_for_each_group_in_the_order_of_the_network(by, panels):
    table = force_table()
    axes = plot.force_budget(table, by=by)
    assert [ax.texts[0].get_text() for ax in axes] == panels
    sums = table.groupby(by, dropna=False, observed=True)["alignment"].sum()
    for ax, panel in zip(axes, panels, strict=True):
        name = (
            sums.index.isna() if panel.startswith("outside") else sums.index.astype(str) == panel.split()[-1]
        )
        assert line(ax, "alignment").get_ydata().sum() == pytest.approx(sums[name].item())
    assert [ax.get_legend() is not None for ax in axes] == [True] + [False] * (len(panels) - 1)
    assert axes[-1].get_xlabel() == "update"


def test_none_draws_a_panel_for_each_tensor():
    table = force_table()
    axes = plot.force_budget(table, by=None)
    panels = ["layer 0 q", "layer 0 v", "layer 0 up", "layer 0 down"]
    panels += [name.replace("0", "1") for name in panels] + ["embed"]
    assert [ax.texts[0].get_text() for ax in axes] == panels
    for ax, panel in zip(axes, panels, strict=True):
        name = "embed" if panel == "embed" else "layers.{}.{}".format(*panel.split()[1:])
        rows = table[table["tensor"] == name]
        np.testing.assert_allclose(line(ax, "alignment").get_ydata(), rows["alignment"])


def test_a_list_draws_a_panel_for_each_combination():
    table = force_table()
    axes = plot.force_budget(table, by=["layer", "role"])
    panels = [ax.texts[0].get_text() for ax in axes]
    assert panels[:3] == ["layer 0 selection", "layer 0 transmission", "layer 0 value"]
    assert panels[-1] == "other"
    wanted = table[table["layer"].eq(1).fillna(False) & (table["role"] == "transmission")]
    drawn = line(axes[panels.index("layer 1 transmission")], "alignment").get_ydata()
    np.testing.assert_allclose(drawn, wanted.groupby("step")["alignment"].sum())


def test_tensors_of_one_kind_in_one_layer_have_their_whole_names():
    axes = plot.force_budget(of_one_component(force_table(layers=1)), by=None)
    panels = [ax.texts[0].get_text() for ax in axes]
    assert panels == ["layers.0.q", "layers.0.down", "layers.0.up", "layers.0.v", "norm"]


def test_layers_of_two_stacks_are_two_layers():
    table = two_stacks(force_table())
    axes = plot.force_budget(table, by="layer")
    panels = ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "outside the blocks"]
    assert [ax.texts[0].get_text() for ax in axes] == panels
    for layer in (0, 1):
        encoder, decoder = (line(axes[layer + i], "alignment").get_ydata() for i in (0, 2))
        np.testing.assert_allclose(decoder, 2 * encoder)
        rows = table[table["layer"].eq(layer).fillna(False) & (table["stack"] == "model.encoder")]
        np.testing.assert_allclose(encoder, rows.groupby("step")["alignment"].sum())


def test_trajectories_of_two_stacks_are_told_apart():
    few = plot.weibull_trajectory(two_stacks(weibull_table()), value="lam")
    assert few.get_legend_handles_labels()[1] == [
        "encoder 0",
        "encoder 1",
        "decoder 0",
        "decoder 1",
        "outside the blocks",
    ]
    styles = {
        (to_hex(one.get_color()), one.get_linestyle()) for one in few.get_lines() if len(one.get_xdata()) > 2
    }
    assert len(styles) == 5
    np.testing.assert_allclose(line(few, "decoder 1").get_ydata(), 2 * line(few, "encoder 1").get_ydata())
    many = plot.weibull_trajectory(two_stacks(weibull_table(layers=12)), value="lam")
    assert legend_texts(many) == ["encoder", "decoder", "outside the blocks"]
    (bar,) = [ax for ax in many.figure.axes if ax is not many]
    assert bar.get_ylabel() == "layer"


def test_one_stack_looks_as_a_model_without_stacks():
    table = weibull_table()
    staged = table.assign(stack=np.where(table["layer"].notna(), "gpt_neox", ""))
    with_stack, without = plot.weibull_trajectory(staged), plot.weibull_trajectory(table)
    assert legend_texts(with_stack[0]) == legend_texts(without[0])
    panels = [
        ax.texts[0].get_text() for ax in plot.force_budget(force_table().assign(stack="gpt"), by="layer")
    ]
    assert panels == ["layer 0", "layer 1", "outside the blocks"]


def test_none_draws_a_line_for_each_tensor():
    table = weibull_table(layers=1)
    ax = plot.weibull_trajectory(table, value="k", by=None)
    assert ax.get_legend_handles_labels()[1] == [
        "layer 0 q",
        "layer 0 v",
        "layer 0 up",
        "layer 0 down",
        "embed",
    ]
    styles = {
        (to_hex(one.get_color()), one.get_linestyle()) for one in ax.get_lines() if len(one.get_xdata()) > 2
    }
    assert len(styles) == 5


def test_a_long_noisy_line_is_drawn_raw_and_smoothed():
    table = force_table(updates=500)
    ax = plot.force_budget(table)
    sums = table.groupby("step")["alignment"].sum().to_numpy()
    smooth = line(ax, "alignment")
    (raw,) = [one for one in ax.get_lines() if np.array_equal(one.get_ydata(), sums)]
    assert raw.get_alpha() < 0.5
    assert raw.get_linewidth() < smooth.get_linewidth()
    assert to_hex(raw.get_color()) == to_hex(smooth.get_color())
    # 2 % of 500 rows is 11 of them, centred.
    expected = [sums[max(0, i - 5) : i + 6].mean() for i in range(500)]
    assert np.allclose(smooth.get_ydata(), expected)


def test_weibull_trajectory_draws_lam_over_k_by_layer():
    table = weibull_table()
    top, bottom = plot.weibull_trajectory(table)
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("Weibull scale λ", "Weibull shape k")
    assert legend_texts(top) == ["layer", "0", "1", "outside the blocks"]
    for layer in (0, 1):
        rows = table[table["layer"].eq(layer).fillna(False)]
        mean_square = (rows["lam"] ** 2).groupby(rows["step"]).mean()
        assert np.allclose(line(top, str(layer)).get_ydata(), np.sqrt(mean_square))
        assert np.allclose(line(bottom, str(layer)).get_ydata(), 1.2)
    assert bottom.get_xlabel() == "update"


def test_layers_run_along_a_map_from_dark_to_light():
    ax = plot.weibull_trajectory(weibull_table(layers=6), value="lam")
    lightness = [np.dot(to_rgb(line(ax, str(i)).get_color()), (0.2126, 0.7152, 0.0722)) for i in range(6)]
    assert (np.diff(lightness) > 0).all()


def test_many_layers_get_a_color_bar_and_no_legend_of_their_own():
    table = weibull_table(layers=24)
    axes = plot.weibull_trajectory(table)
    assert legend_texts(axes[0]) == ["outside the blocks"]
    (bar,) = [ax for ax in axes[0].figure.axes if ax not in list(axes)]
    assert bar.get_ylabel() == "layer"
    inside = plot.weibull_trajectory(table[table["layer"].notna()])
    assert inside[0].get_legend() is None


def test_roles_and_components_keep_the_colors_of_their_roles():
    table = weibull_table()
    by_role = plot.weibull_trajectory(table, value="k", by="role")
    assert legend_texts(by_role) == list(ROLE_COLORS)
    for role, color in ROLE_COLORS.items():
        assert to_hex(line(by_role, role).get_color()) == color.lower()
    by_component = plot.weibull_trajectory(table, value="k", by="component")
    up, down = line(by_component, "up"), line(by_component, "down")
    assert up.get_color() == down.get_color() == ROLE_COLORS["transmission"]
    assert up.get_linestyle() != down.get_linestyle()


def test_the_peaks_and_the_phases_between_them_are_marked():
    # 400 updates, fitted every 10: λ peaks at 120 in layer 0 and outside the blocks, at 128 in layer 1.
    top, bottom = plot.weibull_trajectory(weibull_table(), by="layer")
    dots = [(one.get_xdata()[0], one.get_ydata()[0]) for one in top.get_lines() if one.get_marker() == "o"]
    assert [step for step, _ in dots] == [120, 130, 120]
    assert [value for _, value in dots] == pytest.approx([0.07] * 3, rel=0.02)
    assert [text.get_text() for text in top.texts] == ["← rise", "relaxation →"]
    for ax in (top, bottom):
        marks = {one.get_xdata()[0] for one in ax.get_lines() if one.get_linestyle() == ":"}
        assert marks == {120, 130}
    assert not bottom.texts


def test_without_an_overshoot_no_phase_is_marked():
    ax = plot.weibull_trajectory(weibull_table(relax=0.0), value="lam", by="model")
    assert len(ax.get_lines()) == 1
    assert not ax.texts
    assert ax.get_legend() is None


def test_a_trajectory_without_groups_is_one_line():
    table = weibull_table()
    pooled = table[table["tensor"] == "embed"][["step", "k", "lam"]]
    for by in ("model", None):
        ax = plot.weibull_trajectory(pooled, value="lam", by=by)
        assert np.allclose(line(ax, "model").get_ydata(), pooled["lam"])


def test_losses_are_the_columns_that_are_called_so():
    table = metrics_table()
    ax = plot.loss(table, unit="nats per byte")
    assert legend_texts(ax) == ["loss", "eval loss"]
    evaluated = line(ax, "eval loss")
    assert np.allclose(evaluated.get_xdata(), np.arange(50, 401, 50))
    assert np.allclose(evaluated.get_ydata(), table["eval_loss"].dropna())
    assert evaluated.get_marker() == "o"
    assert any(np.array_equal(one.get_ydata(), table["loss"]) for one in ax.get_lines())
    assert ax.get_ylabel() == "loss (nats per byte)"
    alone = plot.loss(table[["step", "loss"]])
    assert alone.get_ylabel() == "loss"
    assert alone.get_legend() is None


def test_a_run_is_asked_for_its_tables():
    run = SimpleNamespace(forces=force_table, weibull=weibull_table, metrics=metrics_table)
    assert len(plot.weights_map(run)) == 2
    assert np.allclose(
        line(plot.force_budget(run), "decay").get_ydata(),
        line(plot.force_budget(force_table()), "decay").get_ydata(),
    )
    assert len(plot.weibull_trajectory(run)) == 2
    assert isinstance(plot.loss(run), Axes)


# Where it is drawn


def test_given_axes_are_used_and_no_figure_is_made():
    figure, grid = plt.subplots(3, 2)
    assert plot.force_budget(force_table(), ax=grid[0, 0]) is grid[0, 0]
    assert plot.loss(metrics_table(), ax=grid[0, 1]) is grid[0, 1]
    assert list(plot.weibull_trajectory(weibull_table(), ax=grid[1])) == list(grid[1])
    assert list(plot.force_budget(force_table(layers=1), by="layer", ax=grid[2])) == list(grid[2])
    assert plt.get_fignums() == [figure.number]


def test_each_call_without_axes_makes_one_figure():
    for count, _ in enumerate(every_figure(), start=1):
        assert len(plt.get_fignums()) == count


@pytest.mark.parametrize(
    ("error", "message", "draw"),
    [
        (
            ValueError,
            "kind must be 'forces', 'shares', 'drift' or 'drift_shares', got 'pie'",
            lambda: plot.force_budget(F, kind="pie"),
        ),
        (ValueError, r"by='depth'.*use 'model', None, or any of", lambda: plot.force_budget(F, by="depth")),
        (
            ValueError,
            "by='role': cannot group by",
            lambda: plot.weibull_trajectory(W[["step", "k", "lam"]], by="role"),
        ),
        (ValueError, "value must be 'lam', 'k' or None", lambda: plot.weibull_trajectory(W, value="sigma")),
        (
            ValueError,
            "by=None makes 68 lines, .* holds 16: draw some",
            lambda: plot.weibull_trajectory(W17, by=None),
        ),
        (ValueError, "by=None makes 69 panels, .* holds 64", lambda: plot.force_budget(F17, by=None)),
        (
            ValueError,
            "run_or_table has two rows of .* at step 1:",
            lambda: plot.force_budget(pd.concat([F, F])),
        ),
        (
            ValueError,
            "run_or_table has two rows of .* at step 10:",
            lambda: plot.weibull_trajectory(pd.concat([W, W])),
        ),
        (
            ValueError,
            r"run_or_table has no drift: it is measured by ForceLogger\(drift=True\)",
            lambda: plot.force_budget(F, kind="drift"),
        ),
        (ValueError, "run_or_table has no drift", lambda: plot.force_budget(F, kind="drift_shares")),
        (ValueError, "ax must be Axes or None", lambda: plot.force_budget(F, ax=3)),
        (ValueError, "ax must be a sequence of 2 Axes", lambda: plot.weibull_trajectory(W, ax=[])),
        (
            TypeError,
            r"run_or_table must be a force table.*got str; RunLog\(path\)",
            lambda: plot.force_budget("runs/mine"),
        ),
        (TypeError, r"as RunLog.metrics\(\) returns.* got list", lambda: plot.loss([1.0])),
        (ValueError, "run_or_table is no force table", lambda: plot.force_budget(M)),
        (ValueError, "lacks the columns", lambda: plot.weibull_trajectory(M)),
        (ValueError, "holds no losses by step", lambda: plot.loss(F)),
        (ValueError, "has no Weibull fits; log some", lambda: plot.weibull_trajectory(W.iloc[:0])),
        (ValueError, "no Weibull fits", lambda: plot.weibull_trajectory(W.assign(lam=np.nan))),
    ],
)
def test_a_wrong_argument_is_named_and_leaves_no_figure(error, message, draw):
    with pytest.raises(error, match=message):
        draw()
    assert not plt.get_fignums()


F, W, M = force_table(3), weibull_table(rows=3), metrics_table(3)
F17, W17 = force_table(3, layers=17), weibull_table(layers=17, rows=3).query("tensor != 'embed'")


# How it looks


def test_figures_are_finished_for_a_column_of_a_paper():
    for figure in every_figure():
        assert figure.get_figwidth() == 3.4
        assert figure.get_layout_engine() is not None
        figure.canvas.draw()
        page = figure.bbox
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 7, text
        for ax in figure.axes:
            assert ax.get_xlabel() or ax.get_ylabel()
            around = ax.get_tightbbox()
            assert around.x0 >= page.x0 - 1
            assert around.x1 <= page.x1 + 1
            assert around.y0 >= page.y0 - 1
            assert around.y1 <= page.y1 + 1


def test_no_legend_covers_data():
    for figure in every_figure():
        figure.canvas.draw()
        for ax in figure.axes:
            if ax.get_legend() is not None:
                assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1


def test_a_legend_breaks_into_rows_that_read_from_left_to_right():
    figure, ax = plt.subplots(figsize=(1.8, 2))
    plot.force_budget(force_table(), ax=ax)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.get_legend().get_texts()]
    reading = sorted(range(len(boxes)), key=lambda i: (-round(boxes[i].y0), boxes[i].x0))
    read = [legend_texts(ax)[i] for i in reading]
    assert read == ["alignment", "injection", "decay", "net"]
    assert len({round(box.y0) for box in boxes}) > 1


# Machado, Oliveira and Fernandes (2009), severity 1.0: linear RGB as the colour-blind see it.
MACHADO = {
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def lab(color, sight):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(sight) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", MACHADO.values(), ids=MACHADO)
@pytest.mark.parametrize(
    ("colors", "apart"),
    [
        ({name: FORCE_COLORS[name] for name in (*FORCES, "net")}, 35),
        ({name: FORCE_COLORS[name] for name in (*DRIFT_FORCES, "net")}, 35),
        (FORCE_COLORS, 30),
        (ROLE_COLORS, 20),
        ({**LAW_COLORS, **WEIGHT_COLORS}, 35),
        ({**METHOD_COLORS, "logged": DARK}, 35),
    ],
    ids=[
        "forces",
        "drift and diffusion",
        "all forces",
        "roles",
        "laws and the weights",
        "methods and the truth",
    ],
)
def test_colors_stay_apart_for_colour_blind_readers(colors, apart, sight):
    # CIE76 distances; 2.3 is just noticeable.
    points = [lab(color, sight) for color in colors.values()]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[i + 1 :]]
    assert min(distances) >= apart


@pytest.mark.parametrize("sight", MACHADO.values(), ids=MACHADO)
def test_forces_and_roles_share_no_color(sight):
    assert not set(FORCE_COLORS.values()) & set(ROLE_COLORS.values())
    for force in ("drift", "diffusion"):
        for role in ROLE_COLORS.values():
            assert np.linalg.norm(lab(FORCE_COLORS[force], sight) - lab(role, sight)) >= 15


def test_importing_the_module_does_not_import_pyplot():
    code = "import sys, weightdyn.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_overview_stands_lambda_over_the_forces_of_its_role():
    run = SimpleNamespace(forces=force_table, weibull=lambda: weibull_table(layers=1))
    lam, forces = plot.overview(run, role="value")
    only = weibull_table(layers=1).query("role == 'value'").set_index("step")["lam"]
    np.testing.assert_allclose(lam.lines[0].get_ydata(), only)
    table = force_table().query("role == 'value'").groupby("step")[list(FORCES)].sum()
    by_label = {line.get_label(): line for line in forces.lines}
    for force in FORCES:
        np.testing.assert_allclose(by_label[force].get_ydata(), table[force])
    peak = only.idxmax()
    assert any(set(line.get_xdata()) == {peak} for line in forces.lines)  # marked in both panels
    with pytest.raises(ValueError, match=r"role must be 'transmission', .*got 'gate'"):
        plot.overview(run, role="gate")


def test_the_overview_draws_drift_and_diffusion_where_the_run_knows_them():
    run = SimpleNamespace(forces=drift_table, weibull=weibull_table)
    labels = plot.overview(run)[1].get_legend_handles_labels()[1]
    assert labels == [*DRIFT_FORCES, "net"]
    unknown = SimpleNamespace(forces=lambda: drift_table().assign(drift=np.nan), weibull=weibull_table)
    assert plot.overview(unknown)[1].get_legend_handles_labels()[1] == [*FORCES, "net"]


def test_the_overview_takes_transmission_or_what_a_run_with_names_of_its_own_has():
    run = SimpleNamespace(forces=force_table, weibull=weibull_table)
    assert "transmission" in {text.get_text() for text in plot.overview(run)[0].texts}
    unnamed = SimpleNamespace(
        forces=lambda: force_table().assign(role="other"),
        weibull=lambda: weibull_table().assign(role="other"),
    )
    assert "other" in {text.get_text() for text in plot.overview(unnamed)[0].texts}


def test_the_overview_passes_over_a_role_that_has_no_fits():
    def small():  # o, gate, up and down too small to fit, or of no spread
        table = weibull_table()
        return table.assign(lam=table["lam"].mask(table["role"] == "transmission"))

    run = SimpleNamespace(forces=force_table, weibull=small)
    roles = [role for role in ("selection", "value", "other") if role in set(force_table()["role"])]
    assert roles[0] in {text.get_text() for text in plot.overview(run)[0].texts}
    with pytest.raises(ValueError, match=rf"role must be '{roles[0]}'.*got 'transmission'"):
        plot.overview(run, role="transmission")
    none = SimpleNamespace(forces=force_table, weibull=lambda: weibull_table().assign(role="other"))
    with pytest.raises(ValueError, match="no role has both forces and Weibull fits"):
        plot.overview(
            SimpleNamespace(**vars(none) | {"forces": lambda: force_table().query("role != 'other'")})
        )


def test_the_overview_of_a_run_without_fits_has_the_norm_above_the_forces():
    run = SimpleNamespace(forces=force_table, weibull=lambda: weibull_table().assign(lam=np.nan))
    norm, _ = plot.overview(run)
    rows = force_table().query("role == 'transmission'").groupby("step")["norm_sq"].sum()
    np.testing.assert_allclose(norm.lines[0].get_ydata(), np.sqrt(rows))
    assert norm.get_ylabel() == "norm ‖w‖"


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "mix"])
def test_the_overview_draws_a_run_without_transmission_tensors(tmp_path, name):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32)})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with ForceLogger(optimizer, model, out=tmp_path / "run", weibull_every=1):
        for _ in range(3):
            model[name](torch.randn(4, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    lam, forces = plot.overview(RunLog(tmp_path / "run"))
    assert list(lam.lines[0].get_xdata()) == [0, 1, 2, 3]
    assert list(forces.lines[-1].get_xdata()) == [1, 2, 3]
