"""Groups, sums, shares and checks of tables, against plain loops."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from weightdyn.core.tables import (
    ACCURACY_TABLE,
    BUDGET_TABLE,
    CLOSURE_TABLE,
    FORCE_TABLE,
    FORCES,
    INTEGRAL_TABLE,
    PARTS,
    PHASE_TABLE,
    SHAPE_TABLE,
    SMOOTH_TABLE,
    WEIBULL_TABLE,
    aggregate,
    budget,
    check_columns,
    check_force_table,
    check_weibull_table,
    group_columns,
    group_numbers,
    pool_weibull,
    table_of,
)
from weightdyn.explain.trajectory import closure, equilibrium, integrate, phases
from weightdyn.explain.windows import smooth

TENSORS = [
    ("encoder.0.q", "encoder", 0, "q", "selection", 10, 0.1),
    ("encoder.0.up", "encoder", 0, "up", "transmission", 20, 0.1),
    ("encoder.1.q", "encoder", 1, "q", "selection", 10, 0.1),
    ("decoder.0.q", "decoder", 0, "q", "selection", 10, 0.1),
    ("decoder.0.norm", "decoder", 0, "norm", "other", 4, 0.0),
    ("embed", "", None, "embed", "other", 40, 0.1),
]
BY = ["layer", "component", "role", "model", None, ["layer", "role"], ["stack"], ["component", "role"]]
PLACE = ("tensor", "stack", "layer", "component", "role")
KEYS = {
    "layer": ("stack", "layer"),
    "model": (),
    None: PLACE,
}


def force_table(steps=3, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "step": step,
            "span": 1,
            **dict(zip((*PLACE, "numel", "weight_decay"), tensor, strict=True)),
            "lr": 0.01,
        }
        | {"norm_sq": rng.random(), "norm_sq_after": rng.random()}
        | {force: rng.normal() for force in (*FORCES, *PARTS)}
        for step in range(1, steps + 1)
        for tensor in TENSORS
    ]
    kinds = {"layer": "Int64", **dict.fromkeys(("tensor", "stack", "component", "role"), "category")}
    return pd.DataFrame(rows).astype(kinds)[list(FORCE_TABLE)]


def weibull_table(seed=0):
    table = force_table(seed=seed)[["step", *PLACE, "numel"]]
    rng = np.random.default_rng(seed)
    lam, k = rng.random(len(table)), 1 + rng.random(len(table))
    return table.assign(lam=lam, k=k, r_squared=1.0, ks=0.0, n=table["numel"])


def keys_of(by):
    if by in (None, "layer", "model"):
        return KEYS[by]
    keys = []
    for key in [by] if isinstance(by, str) else by:
        keys += KEYS.get(key, (key,))
    return tuple(keys)


def plain(value):
    return None if value is None or pd.isna(value) else value


def grouped(table, by):
    """{(step, group): rows} by a loop over the rows, each a dict."""
    found = defaultdict(list)
    for row in table.to_dict("records"):
        found[(row["step"], *(plain(row[key]) for key in keys_of(by)))].append(row)
    return found


@pytest.mark.parametrize("by", BY, ids=str)
def test_groups_are_those_of_a_loop_and_a_layer_has_its_stack(by):
    table = force_table()
    keys = group_columns(table, by)
    assert tuple(keys) == keys_of(by)
    numbers = group_numbers(table, keys)
    seen = {}
    for number, row in zip(numbers, table.to_dict("records"), strict=True):
        place = tuple(plain(row[key]) for key in keys)
        assert seen.setdefault(place, number) == number
    assert sorted(seen.values()) == list(range(len(seen)))
    assert list(seen.values()) == sorted(seen.values())  # in order of appearance


@pytest.mark.parametrize("by", BY, ids=str)
def test_aggregate_sums_what_a_loop_sums(by):
    table = force_table()
    expected = grouped(table, by)
    summed = aggregate(table, by)
    assert len(summed) == len(expected)
    assert list(summed) == [name for name in FORCE_TABLE if name in summed]
    for row in summed.to_dict("records"):
        rows = expected[(row["step"], *(plain(row[key]) for key in keys_of(by)))]
        for name in ("numel", "norm_sq", "norm_sq_after", *FORCES):
            assert row[name] == pytest.approx(sum(one[name] for one in rows))
        decays = {one["weight_decay"] for one in rows}
        assert row["lr"] == 0.01
        assert (
            row["weight_decay"] == pytest.approx(*decays)
            if len(decays) == 1
            else math.isnan(row["weight_decay"])
        )


def test_a_sum_over_a_missing_value_is_missing():
    table = force_table(steps=1)
    table.loc[0, ["norm_sq_after", "alignment"]] = np.nan
    summed = aggregate(table, "role").set_index("role")
    assert summed.loc["selection", ["norm_sq_after", "alignment"]].isna().all()
    assert summed.loc["transmission", ["norm_sq_after", "alignment"]].notna().all()
    assert summed["injection"].notna().all()


@pytest.mark.parametrize("by", BY, ids=str)
def test_shares_are_those_of_the_sums(by):
    table = force_table()
    expected = grouped(table, by)
    for row in budget(table, by).to_dict("records"):
        rows = expected[(row["step"], *(plain(row[key]) for key in keys_of(by)))]
        sums = {force: sum(one[force] for one in rows) for force in FORCES}
        total = sum(abs(value) for value in sums.values())
        for force in FORCES:
            assert row[f"{force}_share"] == pytest.approx(abs(sums[force]) / total)
        assert row["net"] == pytest.approx(sum(sums.values()))


def test_the_budget_of_nothing_has_no_shares():
    table = force_table(steps=1).assign(alignment=0.0, injection=0.0, decay=0.0)
    shares = budget(table, "model")
    assert shares[[f"{force}_share" for force in FORCES]].isna().all(axis=None)
    assert shares["net"].item() == 0


@pytest.mark.parametrize(
    ("use", "make"),
    [
        (lambda source: aggregate(source, "role"), force_table),
        (lambda source: budget(source, by="role"), force_table),
        (budget, force_table),
        (lambda source: closure(source, "role"), force_table),
        (lambda source: equilibrium(source, "role"), force_table),
        (integrate, force_table),
        (lambda source: phases(source).drop(columns="driven_by"), weibull_table),
        (lambda source: phases(source, "norm_sq"), force_table),
        (lambda source: pool_weibull(source, "role"), weibull_table),
    ],
)
def test_a_run_is_taken_in_the_place_of_its_table(use, make):
    run = SimpleNamespace(forces=force_table, weibull=weibull_table)
    pd.testing.assert_frame_equal(use(run), use(make()))


@pytest.mark.parametrize(
    "use",
    [
        lambda table: aggregate(table, "model"),
        lambda table: aggregate(table, None),
        lambda table: budget(table, "layer"),
        lambda table: equilibrium(table, "layer"),
        lambda table: pool_weibull(table.assign(lam=1.0, k=1.0), "model"),
        lambda table: pool_weibull(table.assign(lam=1.0, k=1.0), None),
    ],
)
def test_two_rows_of_one_tensor_at_one_step_are_refused(use):
    table = force_table()
    use(table)
    with pytest.raises(ValueError, match=r"table has two rows of decoder\.0\.q at step 2: their sum"):
        use(pd.concat([table, table.iloc[[9]]]))


def test_integration_and_closure_refuse_an_update_that_two_rows_cover():
    table = force_table()
    for use in (integrate, closure):
        with pytest.raises(ValueError, match="both cover update 2"):
            use(pd.concat([table, table.iloc[[9]]]))


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (
            "depth",
            r"by='depth': cannot group by \['depth'\]; use 'model', None, or any of \['tensor', 'stack'",
        ),
        (["layer", "colour"], r"cannot group by \['colour'\]"),
        (3, r"by=3: cannot group by \[3\]"),
    ],
)
def test_an_unknown_group_is_refused_with_those_that_there_are(by, says):
    for use in (aggregate, budget, closure, equilibrium):
        with pytest.raises(ValueError, match=says):
            use(force_table(), by)
    with pytest.raises(ValueError, match=says):
        pool_weibull(weibull_table(), by)


def test_a_table_is_taken_as_it_is_and_a_run_is_asked():
    table = force_table()
    assert table_of(table, "forces") is table
    assert table_of(SimpleNamespace(forces=lambda: table), "forces") is table
    for wrong in (
        None,
        "runs/mine",
        3,
        SimpleNamespace(forces=table),
        type("Run", (), {"forces": lambda _: table}),
    ):
        with pytest.raises(
            TypeError, match=r"truth must be a force table .* or a RunLog, got .*; RunLog\(path\)"
        ):
            table_of(wrong, "forces", argument="truth")


def test_what_is_no_table_of_the_kind_is_named():
    table = force_table()
    assert check_force_table(table) is table
    with pytest.raises(
        ValueError, match=r"truth is no force table: it lacks the columns \['decay'\]; it has"
    ):
        check_force_table(table.drop(columns="decay"), argument="truth")
    with pytest.raises(
        ValueError, match=r"\['decay'\] of a force table must hold numbers, got \['object'\]|'str'"
    ):
        check_force_table(table.assign(decay="much"))
    with pytest.raises(ValueError, match=r"the columns \['decay'\] more than once"):
        check_force_table(pd.concat([table, table[["decay"]]], axis=1))
    with pytest.raises(ValueError, match="table has no rows: no update was logged"):
        check_force_table(table.iloc[:0], empty=False)
    assert check_force_table(table.iloc[:0]).empty
    with pytest.raises(ValueError, match=r"is no Weibull table: it lacks the columns \['lam', 'k'\]"):
        check_weibull_table(table)
    with pytest.raises(ValueError, match=r"has no Weibull fits; log some \(weibull_every=…\)"):
        check_weibull_table(weibull_table().iloc[:0], empty=False)
    assert check_columns(table, ("tensor", "step"), "table") is table


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        (budget(force_table()), BUDGET_TABLE),
        (budget(force_table(), "layer"), BUDGET_TABLE),
        (budget(force_table(), kind="drift"), BUDGET_TABLE),
        (smooth(force_table()), SMOOTH_TABLE),
        (smooth(force_table(), "layer", updates=2), SMOOTH_TABLE),
        (integrate(force_table()), INTEGRAL_TABLE),
        (closure(force_table()), CLOSURE_TABLE),
        (closure(force_table(), "layer"), CLOSURE_TABLE),
        (phases(weibull_table()), PHASE_TABLE),
        (pool_weibull(weibull_table(), "layer"), WEIBULL_TABLE),
    ],
)
def test_results_have_the_documented_columns_in_their_order(table, columns):
    assert list(table) == [name for name in columns if name in table]
    of_a_kind = {f"{name}_share" for name in ("alignment", "injection", "drift", "diffusion")} | {
        "diffusion",
        "split",
    }
    assert set(columns) - set(table) <= {*PLACE, "numel", "r_squared", "ks", *of_a_kind}


def test_shape_drift_and_the_accuracy_of_recovery_have_the_documented_columns():
    from weightdyn.checkpoints.recovery import compare_recovery
    from weightdyn.weibull.weights import shape_drift

    drift = shape_drift(weibull_table())
    assert set(drift) == set(SHAPE_TABLE)
    assert [name for name in drift if name not in PLACE] == [
        name for name in SHAPE_TABLE if name not in PLACE
    ]
    table = force_table()
    recovered = table.assign(alignment_low=-9.0, alignment_high=9.0)
    assert list(compare_recovery(table, recovered)) == list(ACCURACY_TABLE)
