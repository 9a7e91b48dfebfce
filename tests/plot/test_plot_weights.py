"""Figures of the fits of one checkpoint: what they draw, against sorted weights and pivots made by hand."""

import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from scipy import stats

from weightdyn import plot
from weightdyn.plot.style import FORCE_COLORS, ROLE_COLORS
from weightdyn.plot.weights import LAW_COLORS
from weightdyn.weibull.fit import K0, fit_weibull
from weightdyn.weibull.laws import rank_laws
from weightdyn.weibull.magnitudes import MagnitudeHistogram

mpl.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures():
    assert not plt.get_fignums()
    yield
    plt.close("all")


def weights(n=20_000, seed=0):
    return 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def lines(ax):
    return {one.get_label(): one for one in ax.get_lines()}


def fraction(height):
    """The ordinate of Weibull paper, inverted."""
    return 1 - np.exp(-np.exp(height))


def fit_table(layers=3, components=("q", "k", "v", "o", "up", "down")):
    rows = [
        {"layer": layer, "component": name, "k": 1.2 - 0.01 * layer - 0.1 * i, "lam": 0.02 + layer + i}
        for layer in range(layers)
        for i, name in enumerate(components)
    ]
    rows.append({"layer": None, "component": "embed", "k": 0.3, "lam": 9.0})
    table = pd.DataFrame(rows).assign(numel=100)
    return table.astype({"layer": "Int64", "component": "category"})


def two_stacks():
    """An encoder of three layers and a decoder of two, whose λ and k differ, as fit_weights has them."""
    table = fit_table()
    inside = table[table["layer"].notna()]
    decoder = inside[inside["layer"] < 2].assign(
        stack="model.decoder", k=inside["k"] + 0.05, lam=inside["lam"] + 50
    )
    outside = table[table["layer"].isna()].assign(stack="")
    return pd.concat([outside, inside.assign(stack="model.encoder"), decoder], ignore_index=True)


def cells(ax):
    """What a map shows: values by row and column, with the names of the rows."""
    (mesh,) = ax.collections
    values = mesh.get_array()
    return np.ma.filled(values, np.nan), [text.get_text() for text in ax.get_yticklabels()]


# The probability plot


@pytest.mark.parametrize("n", [40, 20_000])
def test_every_dot_is_a_sorted_weight_at_its_rank(n):
    x = weights(n)
    ax = plot.weibull(x)
    ordered = np.sort(np.abs(x.double().numpy()))
    dots = [lines(ax)["weights"], lines(ax)["outside the trim"]]
    value, height = (np.concatenate([one.get_data()[i] for one in dots]) for i in (0, 1))
    rank = fraction(height) * n + 0.5
    np.testing.assert_allclose(rank, np.round(rank), atol=1e-6)
    np.testing.assert_allclose(value, ordered[np.round(rank).astype(int) - 1], rtol=1e-12)
    assert ordered[-1] in value


def test_what_the_trim_leaves_out_is_grey():
    ax = plot.weibull(weights(), trim=(0.2, 0.7))
    kept = fraction(lines(ax)["weights"].get_ydata())
    left_out = fraction(lines(ax)["outside the trim"].get_ydata())
    assert kept.min() >= 0.2
    assert kept.max() <= 0.7
    assert left_out[(left_out > 0.2) & (left_out < 0.7)].size == 0
    assert mpl.colors.to_rgb(lines(ax)["outside the trim"].get_color()) > (0.7, 0.7, 0.7)


def test_the_line_is_the_fit_solid_inside_the_trim_and_dashed_outside():
    x = weights()
    ax = plot.weibull(x)
    fit = fit_weibull(x)
    solid, *dashed = [one for one in ax.get_lines() if one.get_color() == LAW_COLORS["weibull"]][::-1]
    for line in (solid, *dashed):
        np.testing.assert_allclose(fit.cdf(line.get_xdata()), fraction(line.get_ydata()), rtol=1e-9)
        (x0, x1), (y0, y1) = np.log(line.get_xdata()), line.get_ydata()
        assert (y1 - y0) / (x1 - x0) == pytest.approx(fit.k, rel=1e-9)
    np.testing.assert_allclose(fraction(solid.get_ydata()), (0.1, 0.9), rtol=1e-9)
    assert solid.get_linestyle() == "-"
    assert [line.is_dashed() for line in dashed] == [True]
    assert f"λ = {fit.lam:.3g},  k = {fit.k:.4g}" in ax.get_title(loc="left")


def test_a_likelihood_fit_trims_nothing():
    x = weights()
    ax = plot.weibull(x, method="mle")
    assert "outside the trim" not in lines(ax)
    assert f"k = {fit_weibull(x, 'mle').k:.4g}" in ax.get_title(loc="left")


def test_rivals_are_the_fitted_laws_the_likeliest_first():
    x = weights()
    ax = plot.weibull(x, rivals=True)
    table = rank_laws(x)
    drawn = [name for name in lines(ax) if name in LAW_COLORS]
    assert drawn == [name for name in table.index if name != "weibull"]
    scales = table["scale"]
    laws = {
        "half-normal": stats.halfnorm(scale=scales["half-normal"]),
        "gamma": stats.gamma(table.loc["gamma", "shape"], scale=scales["gamma"]),
        "log-normal": stats.lognorm(table.loc["log-normal", "shape"], scale=scales["log-normal"]),
        "exponential": stats.expon(scale=scales["exponential"]),
        "generalised normal": stats.halfgennorm(
            table.loc["generalised normal", "shape"], scale=scales["generalised normal"]
        ),
    }
    for name, law in laws.items():
        value, height = lines(ax)[name].get_data()
        np.testing.assert_allclose(fraction(height), law.cdf(value), rtol=1e-6, atol=1e-12)
    assert [name for name in lines(plot.weibull(x, rivals=["gamma"])) if name in LAW_COLORS] == ["gamma"]


def test_a_histogram_is_drawn_like_its_weights():
    x = weights(600_000)
    from_x, from_histogram = plot.weibull(x), plot.weibull(MagnitudeHistogram.from_tensor(x))
    for one, other in zip(from_x.get_lines(), from_histogram.get_lines(), strict=True):
        np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


def test_what_cannot_be_fitted_is_drawn_and_says_so():
    ax = plot.weibull(torch.ones(500))
    assert ax.get_title(loc="left") == "no fit: all magnitudes are equal"
    assert set(lines(ax)) == {"weights", "outside the trim"}
    assert math.isclose(lines(ax)["weights"].get_xdata()[0], 1)


# The maps


def test_a_map_has_a_cell_for_each_component_and_layer():
    table = fit_table()
    lam, k = plot.weights_map(table)
    inside = table[table["layer"].notna()]
    for ax, column in ((k, "k"), (lam, "lam")):
        values, rows = cells(ax)
        assert rows == ["q", "k", "v", "o", "up", "down"]
        for row in inside.itertuples():
            assert values[rows.index(row.component), row.layer] == pytest.approx(getattr(row, column))
        assert values.shape == (6, 3)
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # q on top
    assert k.get_xlabel() == "layer"
    assert [text.get_text() for text in k.get_xticklabels()] == ["0", "1", "2"]


def test_stacks_stand_side_by_side_under_their_names():
    table = two_stacks()
    lam, k = plot.weights_map(table)
    assert [text.get_text() for text in lam.texts] == ["encoder", "decoder"]
    assert [text.get_text() for text in k.get_xticklabels()] == ["0", "1", "2", "0", "1"]
    places = [
        ("model.encoder", 0),
        ("model.encoder", 1),
        ("model.encoder", 2),
        ("model.decoder", 0),
        ("model.decoder", 1),
    ]
    for ax, column in ((k, "k"), (lam, "lam")):
        values, rows = cells(ax)
        assert values.shape == (6, 5)
        for row in table[table["layer"].notna()].itertuples():
            place = places.index((row.stack, row.layer))
            assert values[rows.index(row.component), place] == pytest.approx(getattr(row, column))


def test_layers_keep_their_numbers_where_the_first_is_not_0():
    table = fit_table(layers=5)
    table = table[table["layer"].isna() | (table["layer"] > 1).fillna(False)]
    ax = plot.weights_map(table, value="k")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "3", "4"]


def test_white_is_the_shape_of_a_normal_initialisation():
    (mesh,) = plot.weights_map(fit_table(), value="k").collections
    assert to_hex(mesh.to_rgba(K0)) == to_hex(mpl.colormaps["PuOr"](0.5))
    low, high = mesh.to_rgba(K0 - 0.1), mesh.to_rgba(K0 + 0.1)
    assert low[0] > low[2]  # orange
    assert high[2] > high[0]  # purple


def test_the_color_bar_ends_where_the_values_do():
    figure = plot.weights_map(fit_table(), value="k").figure
    low, high = figure.axes[1].get_ylim()
    assert (low, high) == pytest.approx((1.2 - 0.02 - 0.5, K0))


def test_a_missing_matrix_is_grey_and_a_missing_layer_too():
    table = fit_table(layers=5)
    table = table[~((table["layer"] == 1) & (table["component"] == "v")) & (table["layer"] != 3)]
    table.loc[(table["layer"] == 2) & (table["component"] == "q"), "k"] = np.nan
    values, rows = cells(plot.weights_map(table, value="k"))
    assert np.isnan(values[rows.index("v"), 1])
    assert np.isnan(values[rows.index("q"), 2])
    assert np.isnan(values[:, 3]).all()
    assert np.isnan(values).sum() == 2 + len(rows)


def test_heads_are_pooled_and_a_trajectory_is_drawn_at_its_end():
    table = fit_table(layers=1, components=("q",)).iloc[[0, 0, 0]]
    table = table.assign(step=[1, 2, 2], k=[0.5, 1.0, 1.3], lam=[9.0, 1.0, 7.0], numel=[1, 1, 2])
    lam, k = plot.weights_map(table.reset_index(drop=True))
    assert cells(k)[0] == pytest.approx(np.array([[1.2]]))
    assert cells(lam)[0] == pytest.approx(np.array([[math.sqrt((1 + 2 * 49) / 3)]]))


# What holds for both


def test_given_axes_are_used_and_no_figure_is_made():
    figure, axes = plt.subplots(3)
    assert plot.weibull(weights(), ax=axes[0]) is axes[0]
    drawn = plot.weights_map(fit_table(), ax=axes[1:])
    assert drawn[0] is axes[1]
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("error", "message", "draw"),
    [
        (TypeError, "got list", lambda: plot.weibull([1.0])),
        (ValueError, "method must be 'plot'", lambda: plot.weibull(weights(), method="guess")),
        (ValueError, "trim must be a pair", lambda: plot.weibull(weights(), trim=(0.9, 0.1))),
        (
            ValueError,
            "rivals must be True or some of .*'cauchy'",
            lambda: plot.weibull(weights(), rivals=["cauchy"]),
        ),
        (ValueError, "non-zero finite weights to draw", lambda: plot.weibull(torch.zeros(5))),
        (ValueError, "ax must be Axes", lambda: plot.weibull(weights(), ax=3)),
        (TypeError, r"got Linear; fit_weights\(model\)", lambda: plot.weights_map(torch.nn.Linear(2, 2))),
        (
            ValueError,
            "value must be 'lam', 'k' or None",
            lambda: plot.weights_map(fit_table(), value="sigma"),
        ),
        (ValueError, r"lacks the columns \['k'\]", lambda: plot.weights_map(fit_table().drop(columns="k"))),
        (ValueError, "no matrix inside a layer", lambda: plot.weights_map(fit_table(layers=0))),
        (ValueError, "sequence of 2 Axes", lambda: plot.weights_map(fit_table(), ax=plt.figure().gca())),
    ],
)
def test_a_wrong_argument_is_named(error, message, draw):
    with pytest.raises(error, match=message):
        draw()


def test_figures_are_finished_for_a_column_of_a_paper():
    narrow = torch.from_numpy(
        0.02 + 0.001 * weights(1000).numpy()
    )  # |w| within a decade: minor ticks are named
    figures = [
        plot.weibull(weights(), rivals=True).figure,
        plot.weibull(narrow).figure,
        plot.weights_map(fit_table(layers=48))[0].figure,
        plot.weights_map(two_stacks())[0].figure,
    ]
    for figure in figures:
        assert figure.get_size_inches()[0] == pytest.approx(3.4)
        figure.canvas.draw()
        shown = [one for one in figure.findobj(Text) if one.get_text().strip() and one.get_visible()]
        assert min(one.get_fontsize() for one in shown) >= 7
        whole = figure.bbox
        for axis in (a for ax in figure.axes for a in (ax.xaxis, ax.yaxis)):
            box = axis.get_tightbbox(figure.canvas.get_renderer())
            assert box is None or (box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1)


@pytest.mark.parametrize(
    "x", [weights(), torch.cat([weights(), 1e-3 * weights(2000, 1)])], ids=["one", "two"]
)
def test_the_legend_covers_no_weights(x):
    ax = plot.weibull(x, rivals=True)
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    for line in ax.get_lines():
        assert not any(box.contains(*point) for point in ax.transData.transform(line.get_xydata()))


def test_laws_share_no_color_with_forces_and_roles():
    assert not set(LAW_COLORS.values()) & {*FORCE_COLORS.values(), *ROLE_COLORS.values()}
