"""The figure of the decay clock: what is drawn, and that it is finished."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from weightdyn import Recipe, plot
from weightdyn.checkpoints.recipe import all_but_embeddings_decay, cosine
from weightdyn.plot.style import FORCE_COLORS

mpl.use("Agg")

import matplotlib.pyplot as plt

RECIPE = Recipe(cosine(1e-3, 1000, 100, 0.1), 0.1)


def clock_table(*tensors, gaps=10, span=100, off=0.02):
    """What a clock would say of RECIPE, with intervals of `off`."""
    rows = []
    for name in tensors or ("embed_in.weight",):
        for step in range(span, gaps * span + 1, span):
            value = RECIPE.lr_at(np.arange(step - span + 1, step + 1)).mean() * 0.1
            rows.append(
                {"step": step, "span": span, "tensor": name, "component": "embed", "lr_decay": value,
                 "lr_decay_low": value * (1 - off), "lr_decay_high": value * (1 + off)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def line(ax, label):
    (found,) = [one for one in ax.get_lines() if one.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def test_each_gap_is_a_bar_over_its_updates_and_the_recipe_a_line_through_them():
    table = clock_table()
    table.loc[3, "lr_decay"] = np.nan
    ax = plot.decay_clock(table, RECIPE)
    x, y = (np.reshape(each, (-1, 3)) for each in line(ax, "the weights"))
    told = table.drop(3)
    np.testing.assert_array_equal(x[:, :2], np.stack([told["step"] - told["span"], told["step"]], 1))
    np.testing.assert_array_equal(y[:, :2], np.stack([told["lr_decay"]] * 2, 1))
    assert np.isnan(y[:, 2]).all(), "no line from gap to gap"
    x, y = line(ax, "the recipe")
    np.testing.assert_array_equal(x, np.arange(1, 1001))
    np.testing.assert_allclose(y, RECIPE.lr_at(x) * 0.1)
    (band,) = ax.collections
    ends = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
    assert set(told["lr_decay_high"]) | set(told["lr_decay_low"]) == set(ends)
    assert to_hex(ax.get_lines()[0].get_color()) == FORCE_COLORS["decay"].lower()


def test_the_recipe_gives_each_tensor_its_own_decay():
    table = clock_table("wte", "experts.0.up").assign(component=["embed"] * 10 + ["up"] * 10)
    ax = plot.decay_clock(table, Recipe(1e-3, 0.1, decays=all_but_embeddings_decay))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == ["experts.0.up", "the recipe, λ = 0", "the recipe, λ = 0.1", "wte"]
    assert (line(ax, "the recipe, λ = 0")[1] == 0).all()


def test_the_label_names_the_power_of_ten_of_its_ticks():
    ax = plot.decay_clock(clock_table())
    assert ax.get_ylabel() == "ηλ (10⁻⁴ per update)"
    ax.figure.canvas.draw()
    texts = [text.get_text() for text in ax.yaxis.get_ticklabels()]
    assert texts == [f"{tick / 1e-4:g}" for tick in ax.get_yticks()]
    still = clock_table().assign(lr_decay=0.0, lr_decay_low=0.0, lr_decay_high=2.0**-24)
    assert plot.decay_clock(still).get_ylabel() == "ηλ (10⁻⁸ per update)"


@pytest.mark.parametrize(
    ("table", "recipe", "message"),
    [
        (clock_table().assign(lr_decay=np.nan), None, "no gap with a value"),
        (clock_table().drop(columns="lr_decay"), None, r"lacks the columns \['lr_decay'\]"),
        (clock_table(*[f"experts.{i}" for i in range(17)]), None, "values of 17 tensors"),
        (clock_table(), 0.1, "recipe must be a Recipe"),
        ("runs/mine", None, "table must be a table of decay_clock"),
    ],
)
def test_what_cannot_be_drawn_is_refused(table, recipe, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plot.decay_clock(table, recipe)
    assert not plt.get_fignums()


def test_the_figure_is_finished_and_its_legend_covers_no_data():
    for ax in (
        plot.decay_clock(clock_table(), RECIPE),
        plot.decay_clock(clock_table(off=0.3)),
        plot.decay_clock(clock_table("transformer.wte.weight", "transformer.wpe.weight"), RECIPE),
    ):
        figure = ax.figure
        assert figure.get_figwidth() == 3.4
        figure.canvas.draw()
        assert all(t.get_fontsize() >= 7 for t in figure.findobj(Text) if t.get_text() and t.get_visible())
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1
        around, page = ax.get_tightbbox(), figure.bbox
        assert around.x0 >= page.x0 - 1
        assert around.x1 <= page.x1 + 1
        assert ax.get_xlabel() == "update"
    _, own = plt.subplots()
    assert plot.decay_clock(clock_table(), ax=own) is own
