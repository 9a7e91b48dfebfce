"""Which rows of a table of shifts are drawn, against filters written by hand."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from weightdyn import plot
from weightdyn.plot.shifts import shift_groups

mpl.use("Agg")

PLACES = [
    ("encoder", 0, "q"),
    ("encoder", 1, "q"),
    ("decoder", 0, "q"),
    ("decoder", 0, "up"),
    ("", pd.NA, "embed"),
]


def shift_table(*keys, stacks=2):
    """A shift of its own for every group; losses have no group."""
    rows, seen = [], set()
    for stack, layer, component in PLACES:
        place = {"stack": stack if stacks == 2 else "gpt", "layer": layer, "component": component}
        place = {key: place[key] for key in keys}
        if str(place) in seen:
            continue
        seen.add(str(place))
        for step in (1, 2):
            for quantity in ("alignment_share", "injection_share", "decay_share", "lam", "k"):
                rows.append(
                    {"step": step, **place, "quantity": quantity, "difference": len(seen) + 0.1 * step}
                )
    missing = dict.fromkeys(keys, pd.NA)
    rows += [{"step": step, **missing, "quantity": "loss", "difference": -1.0} for step in (1, 2)]
    table = pd.DataFrame(rows).assign(low=np.nan, high=np.nan)
    return table.astype({key: "Int64" if key == "layer" else object for key in keys})


@pytest.mark.parametrize(
    ("keys", "stacks", "groups"),
    [
        ((), 2, [None]),
        (("component",), 2, ["q", "up", "embed"]),
        (("stack", "layer"), 1, [0, 1]),
        (("stack", "layer"), 2, [("encoder", 0), ("encoder", 1), ("decoder", 0)]),
        (("stack", "layer", "component"), 1, [(0, "q"), (1, "q"), (0, "up")]),
    ],
)
def test_each_group_that_there_is_can_be_drawn_and_stack_and_layer_are_one(keys, stacks, groups):
    table = shift_table(*keys, stacks=stacks)
    assert shift_groups(table) == groups
    for group in groups:
        panels = plot.wisca_shift(table, group=group)
        own = table[table["quantity"] == "lam"]
        named = [key for key in keys if key != "stack" or stacks == 2]
        for key, value in zip(named, group if isinstance(group, tuple) else (group,), strict=False):
            own = own[own[key].eq(value).fillna(False)]
        np.testing.assert_allclose(panels[1].lines[-1].get_ydata(), own["difference"])
        np.testing.assert_allclose(panels[3].lines[-1].get_ydata(), [-1, -1])


def test_a_group_that_is_not_there_is_refused_with_those_that_are():
    table = shift_table("stack", "layer")
    with pytest.raises(ValueError, match=r"group must be one of \[\('encoder', 0\), .* got 0"):
        plot.wisca_shift(table, group=0)
    with pytest.raises(ValueError, match="whole model only"):
        plot.wisca_shift(shift_table(), group="q")


def test_drift_draws_the_shares_of_drift_and_diffusion_alone():
    table = shift_table()
    with pytest.raises(ValueError, match=r"shift has no drift: .*kind='forces' draws the rest"):
        plot.wisca_shift(table, kind="drift")
    drift = table[table["quantity"] == "alignment_share"].assign(quantity="drift_share", difference=-0.25)
    top = plot.wisca_shift(pd.concat([table, drift]), kind="drift")[0]
    (line,) = [one for one in top.lines if one.get_label() == "drift"]
    np.testing.assert_allclose(line.get_ydata(), -25.0)
    assert top.get_legend_handles_labels()[1] == ["drift", "diffusion"]
    with pytest.raises(ValueError, match="kind must be 'forces' or 'drift', got 'shares'"):
        plot.wisca_shift(table, kind="shares")
