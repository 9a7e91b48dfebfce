"""The summary of a run against loops over its rows."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from weightdyn.core.tables import FORCES, SUMMARY_TABLE
from weightdyn.explain.summary import summarize
from weightdyn.explain.trajectory import closure

GROUPS = [("a", "encoder", 0, "q", "selection"), ("b", "encoder", 0, "up", "transmission"),
          ("c", "decoder", 0, "up", "transmission")]  # fmt: skip
PLACE = ("tensor", "stack", "layer", "component", "role")
STEPS, TOP = 200, 80


def run(spans=(1,)):
    """λ rises to update 80 and falls; forces are noise; rows have these spans in turn."""
    rng = np.random.default_rng(0)
    forces, weibull = [], []
    for group in GROUPS:
        place, step, i = dict(zip(PLACE, group, strict=True)), 0, 0
        while step < STEPS:
            span = spans[i % len(spans)]
            step, i = step + span, i + 1
            values = dict(zip(FORCES, rng.normal(size=3), strict=True))
            row = {
                "step": step,
                "span": span,
                **place,
                "numel": 10,
                "norm_sq": 100.0,
                "norm_sq_after": np.nan,
            }
            forces.append({**row, **values})
        for step in range(0, STEPS + 1, 10):
            lam = 1 + min(step, TOP) / TOP - 0.5 * max(step - TOP, 0) / STEPS
            weibull.append({"step": step, **place, "numel": 10, "lam": lam, "k": 1.2, "n": 10})
    return SimpleNamespace(forces=lambda: pd.DataFrame(forces), weibull=lambda: pd.DataFrame(weibull))


def share(rows):
    totals = {force: abs(sum(row[force] * row["span"] for row in rows)) for force in FORCES}
    return totals["alignment"] / sum(totals.values())


@pytest.mark.parametrize("spans", [(1,), (1, 3, 4)])
@pytest.mark.parametrize("by", ["role", "layer", "component", "model", None, ["stack", "role"]], ids=str)
def test_shares_are_those_of_the_forces_summed_over_group_and_updates(by, spans):
    log = run(spans)
    table = summarize(log, by) if by != "role" else summarize(log)
    rows = log.forces().to_dict("records")
    worst = closure(log.forces())
    keys = [key for key in PLACE if key in table]
    assert len(table) == len({tuple(row[key] for key in keys) for row in rows})
    for found in table.to_dict("records"):
        own = [row for row in rows if all(row[key] == found[key] for key in keys)]
        assert found["half_step"] == 40
        assert found["peak_step"] == TOP
        assert found["overshoot"]
        assert found["rise_share"] == pytest.approx(share([row for row in own if row["step"] <= 40]))
        assert found["end_share"] == pytest.approx(share([row for row in own if row["step"] >= 0.9 * STEPS]))
        tensors = {row["tensor"] for row in own}
        assert found["closure"] == worst[worst["tensor"].isin(tensors)]["closure"].max()


def test_its_columns_are_the_documented_ones_in_their_order():
    for by in ("role", "layer", None):
        table = summarize(run(), by)
        assert list(table) == [name for name in SUMMARY_TABLE if name in table]
        assert {name for name in SUMMARY_TABLE if name not in table} <= set(PLACE)


def test_roles_stand_in_their_order_and_a_table_is_no_run():
    assert summarize(run())["role"].tolist() == ["selection", "transmission"]
    with pytest.raises(TypeError, match=r"run must be a force table .* or a RunLog, got str"):
        summarize("runs/mine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="by='depth': cannot group"):
        summarize(run(), "depth")  # pyright: ignore[reportArgumentType]


def test_updates_that_were_not_logged_count_as_those_around_them():
    every, sparse = run(), run()
    for log, kept in ((every, range(1, STEPS + 1)), (sparse, [*range(1, 20), *range(20, STEPS + 1, 5)])):
        forces, t = log.forces(), log.forces()["step"]
        forces = forces.assign(drift=t < 20, memory=t / 100, injection=0.1, decay=-0.5)
        forces["alignment"] = forces["drift"] + forces["memory"]
        kept_rows = forces[t.isin(kept)].astype({"drift": float})
        log.forces = lambda rows=kept_rows: rows
    columns = ["rise_share", "end_share", "rise_drift", "rise_diffusion", "end_drift", "end_diffusion"]
    got, want = summarize(sparse)[columns], summarize(every)[columns]
    np.testing.assert_allclose(got, want, atol=0.02)
