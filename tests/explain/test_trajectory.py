import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightdyn.core.forces import forces_from_products
from weightdyn.core.tables import FORCES, aggregate, pool_weibull
from weightdyn.explain.trajectory import closure, equilibrium, integrate, phases


def adamw_run(updates=60, seed=0, tensors=("a", "b"), lr=0.05, weight_decay=0.3, size=20, resting=()):
    """A force table of an AdamW-like run in plain float64 loops; `resting` = (tensor, step) without a gradient."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=size * (i + 1)) for i, name in enumerate(tensors)}
    rows = []
    for step in range(1, updates + 1):
        for i, name in enumerate(tensors):
            if (name, step) in resting:
                continue
            w = weights[name]
            u = rng.normal(size=w.size) - 0.5 * w
            new = (1 - lr * weight_decay) * w - lr * u
            dot, u_sq = sum(a * b for a, b in zip(w, u, strict=True)), sum(a * a for a in u)
            w_sq, after = sum(a * a for a in w), sum(a * a for a in new)
            forces = forces_from_products(dot, u_sq, w_sq, lr, weight_decay)
            rows.append(
                {
                    "step": step,
                    "span": 1,
                    "tensor": name,
                    "layer": i,
                    "component": "up",
                    "role": "transmission",
                }
                | {"numel": w.size, "lr": lr, "weight_decay": weight_decay}
                | {"norm_sq": w_sq, "norm_sq_after": after}
                | forces._asdict()
            )
            weights[name] = new
    categories = {"tensor": "category", "component": "category", "role": "category", "layer": "Int64"}
    return pd.DataFrame(rows).astype(categories)


def one(table, name="a"):
    return table[table["tensor"] == name].reset_index(drop=True)


def bare(step, net, span=1, norm_sq=100.0, after=math.nan):
    """A force table whose forces are `net`, all of it alignment."""
    zero = np.zeros(len(step))
    return pd.DataFrame(
        {"step": step, "span": span, "norm_sq": norm_sq, "norm_sq_after": after}
        | {"alignment": net, "injection": zero, "decay": zero}
    )


# integrate


def test_the_forces_of_every_update_integrate_to_the_measured_norm():
    out = integrate(adamw_run())
    assert np.allclose(out["norm_sq_predicted"], out["norm_sq_after"], rtol=1e-12)
    assert not out["gap"].any()


def test_integration_gives_one_row_per_row_tensor_by_tensor_whatever_the_order():
    table = adamw_run()
    out = integrate(table)
    assert list(out["tensor"]) == ["a"] * 60 + ["b"] * 60
    assert list(out["step"]) == [*range(1, 61)] * 2
    shuffled = table.sample(frac=1, random_state=1)
    for name in ("a", "b"):
        again = integrate(shuffled)
        pd.testing.assert_frame_equal(one(out, name), one(again, name), check_categorical=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.data())
def test_between_rows_the_forces_are_interpolated_linearly_in_the_step(widths, data):
    # Against a loop over single updates with numpy's own interpolation between the centres of the spans. Widths
    # in ascending order have no gap.
    step = np.cumsum(sorted(widths))
    span = [data.draw(st.integers(1, int(width))) for width in np.diff(step, prepend=0)]
    net = data.draw(st.lists(st.floats(-9, 9), min_size=len(step), max_size=len(step)))
    centre = step - (np.array(span) - 1) / 2
    expected, total = [], 100.0
    for j in range(len(step)):
        first = step[j - 1] + 1 if j else step[0] - span[0] + 1
        for update in range(first, step[j] + 1):
            inside = update > step[j] - span[j]
            total += net[j] if inside else np.interp(update, centre, net)
        expected.append(total)
    last = np.diff(step)[-1] if len(step) > 1 else 0
    before = np.diff(step)[-2] if len(step) > 2 else last
    out = integrate(bare(step, net, span))["norm_sq_predicted"]
    checked = len(step) if last <= 2 * before else len(step) - 1  # a wider last one counts as a gap
    assert np.allclose(out[:checked], expected[:checked], atol=1e-9)


def test_forces_that_are_linear_in_the_step_integrate_exactly_however_sparse_the_log():
    step = np.array([1, 2, 4, 8, 16, 32, 64, 128])
    every = np.arange(1, 129)
    out = integrate(bare(step, 3.0 - 0.1 * step))["norm_sq_predicted"]
    assert np.allclose(out, 100 + np.cumsum(3.0 - 0.1 * every)[step - 1])


def test_a_wrong_force_shows_as_a_drift_of_the_integral():
    table = one(adamw_run())
    out = integrate(table.assign(alignment=table["alignment"] + 0.25))
    assert np.allclose(out["norm_sq_predicted"] - out["norm_sq_after"], 0.25 * out["step"])


def test_a_norm_that_was_not_measured_after_the_update_is_taken_from_the_next_row():
    table = one(adamw_run(updates=5))
    out = integrate(table.assign(norm_sq_after=np.nan))
    assert np.allclose(out["norm_sq_after"][:4], table["norm_sq_after"][:4])
    assert np.isnan(out["norm_sq_after"][4])
    assert np.allclose(out["norm_sq_predicted"], table["norm_sq_after"])
    assert "norm_sq_after" in integrate(table.drop(columns="norm_sq_after"))


# gaps


def test_a_tensor_without_a_gradient_in_some_steps_is_not_moved_there():
    resting = {("a", step) for step in (*range(10, 15), 30)}
    out = one(integrate(adamw_run(resting=resting)))
    assert np.allclose(out["norm_sq_predicted"], out["norm_sq_after"], rtol=1e-12)
    assert list(out.loc[out["gap"], "step"]) == [15, 31]


def test_lost_rows_are_a_gap_and_not_interpolated():
    table = one(adamw_run(updates=200))
    logged = table[(table["step"] % 10 == 0) & ~table["step"].between(60, 140)]
    out = integrate(logged)
    assert list(out.loc[out["gap"], "step"]) == [150]
    # The error of interpolation before the gap is kept and nothing is added to it over the gap.
    error = (out["norm_sq_predicted"] - out["norm_sq_after"]).to_numpy()
    place = int(np.flatnonzero(out["gap"])[0])
    assert error[place] == pytest.approx(error[place - 1])
    assert not np.allclose(error, 0)
    assert closure(logged)["gaps"].tolist() == [1]
    assert closure(logged)["updates"].tolist() == [200 - 10 - 100]


@pytest.mark.parametrize(
    "steps",
    [
        [*range(1, 40)],
        [1, *range(250, 20_001, 250)],
        [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 5001, 1000)],
        [*range(1, 11), *range(20, 101, 10)],
        [*range(100, 1001, 100), *range(1001, 1011)],
        [7, 5000],
        [7],
    ],
)
def test_a_schedule_of_logging_is_no_gap(steps):
    assert not integrate(bare(np.array(steps), np.ones(len(steps))))["gap"].any()


def test_spans_that_meet_leave_no_gap_however_long():
    step = np.array([10, 20, 3000, 3010])
    out = integrate(bare(step, np.ones(4), span=[10, 10, 2980, 10]))
    assert not out["gap"].any()
    assert out["norm_sq_predicted"].iloc[-1] == pytest.approx(100 + 3010)


def test_sums_over_different_tensors_are_a_gap():
    table = adamw_run(resting={("b", 20)})
    out = integrate(aggregate(table, "model"))
    assert list(out.loc[out["gap"], "step"]) == [20, 21]
    # Measured is the sum over "a" alone at update 20, over both elsewhere; what is predicted follows.
    assert np.allclose(out["norm_sq_predicted"], out["norm_sq_after"], rtol=1e-12)
    assert closure(aggregate(table, "model"))["closure"].item() < 1e-12


# closure


def test_closure_is_the_sum_of_residuals_over_the_sum_of_changes():
    table = adamw_run()
    wrong = table.assign(injection=table["injection"] * 1.01)
    out = closure(wrong)
    for name in ("a", "b"):
        rows = one(table, name)
        residual = sum(abs(-0.01 * f) for f in rows["injection"][1:])
        change = sum(
            abs(b - a) for a, b in zip(rows["norm_sq_after"], rows["norm_sq_after"][1:], strict=False)
        )
        row = one(out, name).iloc[0]
        assert row["residual"] == pytest.approx(residual)
        assert row["change"] == pytest.approx(change)
        assert row["closure"] == pytest.approx(residual / change)
        assert row["updates"] == 59
        assert row["gaps"] == 0


def test_closure_of_right_forces_is_rounding():
    assert (closure(adamw_run())["closure"] < 1e-12).all()


def test_closure_pools_by_summing_the_terms_of_the_tensors():
    table = adamw_run(tensors=("a", "b", "c"))
    wrong = table.assign(injection=table["injection"] * 1.01)
    each, pooled = closure(wrong), closure(wrong, by="model")
    assert len(pooled) == 1
    assert pooled["closure"].item() == pytest.approx(each["residual"].sum() / each["change"].sum())
    assert pooled["updates"].item() == 3 * 59
    assert closure(wrong, by="layer")["layer"].tolist() == [0, 1, 2]
    assert closure(wrong, by="role")["closure"].item() == pytest.approx(pooled["closure"].item())


def test_closure_of_sparse_rows_is_the_error_of_integration():
    table = one(adamw_run(updates=101))
    logged = table[table["step"] % 10 == 1]
    out, path = closure(logged), integrate(logged)
    error = np.diff(path["norm_sq_after"] - path["norm_sq_predicted"])
    assert out["residual"].item() == pytest.approx(np.abs(error).sum())
    assert out["updates"].item() == 100


def test_audited_rows_are_held_against_their_own_update():
    table = one(adamw_run())
    audited = table["step"] % 10 == 0
    table["residual"] = np.where(audited, 0.003, np.nan)
    out = closure(table[audited])
    assert out["updates"].item() == 6
    assert out["residual"].item() == pytest.approx(6 * 0.003)
    own = table.loc[audited, list(FORCES)].sum(axis=1) + 0.003
    assert out["change"].item() == pytest.approx(own.abs().sum())
    # Beside rows that were not audited, each audited one replaces the term that ends at it.
    assert closure(table)["residual"].item() == pytest.approx(6 * 0.003)
    assert closure(table)["updates"].item() == 59


def test_a_run_is_asked_for_its_forces():
    table = adamw_run(updates=5)
    run = SimpleNamespace(forces=lambda: table)
    pd.testing.assert_frame_equal(closure(run), closure(table))
    pd.testing.assert_frame_equal(integrate(run), integrate(table))


def test_a_tensor_that_is_logged_once_has_no_closure():
    out = closure(one(adamw_run(updates=1)))
    assert out["updates"].item() == 0
    assert np.isnan(out["closure"].item())


def test_a_force_that_is_not_a_number_is_not_counted():
    table = one(adamw_run(updates=9))
    table.loc[4, "alignment"] = np.nan
    assert closure(table)["updates"].item() == 7
    assert integrate(table)["norm_sq_predicted"].isna().tolist() == [False] * 4 + [True] * 5


def test_rows_that_cover_one_update_twice_are_refused():
    table = one(adamw_run(updates=4))
    with pytest.raises(ValueError, match=r"both cover update 3 of .*'tensor': 'a'"):
        integrate(pd.concat([table, table.iloc[[2]]]))
    with pytest.raises(ValueError, match="both cover update 2 of one tensor"):
        closure(bare(np.array([2, 4]), np.ones(2), span=[2, 3]))


def test_what_is_no_force_table_is_refused():
    with pytest.raises(TypeError, match=r"table must be a force table.*got list"):
        closure([1, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lacks the columns"):
        integrate(pd.DataFrame({"step": [1]}))
    with pytest.raises(ValueError, match="no rows"):
        integrate(adamw_run(updates=1).iloc[:0])
    with pytest.raises(ValueError, match=r"by='depth'.*use 'model', None, or any of"):
        closure(adamw_run(updates=2), by="depth")  # pyright: ignore[reportArgumentType]


# equilibrium


def test_the_norm_settles_where_the_forces_cancel():
    # With a constant alignment + injection of 0.7 per update, ‖w‖² goes to that over its decay rate.
    lr, weight_decay, norm_sq = 0.1, 0.2, 1.0
    rate = 2 * lr * weight_decay - (lr * weight_decay) ** 2
    table = pd.DataFrame(
        {"step": [1], "span": [1], "norm_sq": [norm_sq]}
        | {"alignment": [0.5], "injection": [0.2], "decay": [-rate * norm_sq]}
    )
    for _ in range(2000):
        norm_sq += 0.7 - rate * norm_sq
    assert equilibrium(table)["equilibrium"].item() == pytest.approx(norm_sq)


# Weibull trajectories


def test_pooling_keeps_the_mean_square_of_weights_of_one_shape():
    k, lam, n = 1.2, np.array([0.02, 0.05, 0.03]), np.array([100, 300, 50])
    table = pd.DataFrame({"step": 7, "layer": [0, 0, 1], "role": "value", "k": k, "lam": lam, "n": n})
    mean_square = lam**2 * math.gamma(1 + 2 / k)
    pooled = pool_weibull(table, "model")
    expected = (n * mean_square).sum() / n.sum()
    assert pooled["lam"].item() ** 2 * math.gamma(1 + 2 / pooled["k"].item()) == pytest.approx(expected)
    assert pooled["n"].item() == 450
    assert pool_weibull(table, "layer")["lam"].iloc[1] == pytest.approx(0.03)
    assert list(pool_weibull(table, ["layer", "role"])) == ["step", "layer", "role", "lam", "k", "n"]


def test_pooling_leaves_out_tensors_without_a_fit_and_keeps_those_outside_the_blocks():
    layer = pd.array([0, 0, None], dtype="Int64")
    table = pd.DataFrame(
        {"step": 1, "layer": layer, "k": [1.1, np.nan, 1.3], "lam": [1.0, np.nan, 3.0], "numel": 5}
    )
    pooled = pool_weibull(table, "layer")
    assert pooled["lam"].tolist() == [1.0, 3.0]
    assert pooled["layer"].isna().tolist() == [False, True]
    with pytest.raises(ValueError, match="by='tensor'"):
        pool_weibull(table, "tensor")  # pyright: ignore[reportArgumentType]


def curve(shape, n=200, noise=0.0, seed=0, **columns):
    t = np.arange(1, n + 1)
    values = shape(t / n) + noise * np.random.default_rng(seed).normal(size=n)
    return pd.DataFrame({"step": 10 * t, "lam": values, **columns})


def overshooting(t):
    return 1 + 8 * t * np.exp(-t / 0.3)  # its maximum is at t = 0.3


def saturating(t):
    return 1 + 2 * (1 - np.exp(-6 * t))


def test_the_peak_of_an_overshoot_is_found_where_it_is():
    row = phases(curve(overshooting)).iloc[0]
    top = overshooting(0.3)
    assert row["overshoot"]
    assert abs(row["peak_step"] - 0.3 * 2000) <= 10
    assert row["peak"] == pytest.approx(top, rel=1e-3)
    assert row["start"] == overshooting(1 / 200)
    assert row["start_step"] == 10
    assert (row["end_step"], row["end"]) == (2000, overshooting(1.0))
    assert row["rise"] == pytest.approx(top / row["start"] - 1, rel=1e-3)
    assert row["relaxation"] == pytest.approx(1 - row["end"] / top, rel=1e-3)
    half = (row["start"] + row["peak"]) / 2
    assert overshooting(row["half_step"] / 2000) >= half > overshooting((row["half_step"] - 10) / 2000)


def test_noise_neither_hides_an_overshoot_nor_makes_one():
    noisy = [phases(curve(overshooting, noise=0.03, seed=seed)).iloc[0] for seed in range(40)]
    assert all(row["overshoot"] for row in noisy)
    assert np.median([row["peak_step"] for row in noisy]) == pytest.approx(600, abs=60)
    for shape in (saturating, lambda t: 1 + t, lambda t: 2 - t, lambda t: 1 + 0 * t):
        found = [phases(curve(shape, noise=0.03, seed=seed))["overshoot"].item() for seed in range(40)]
        assert sum(found) <= 2


def test_one_stray_value_is_no_peak():
    table = curve(saturating)
    table.loc[50, "lam"] = 9.0
    row = phases(table).iloc[0]
    assert not row["overshoot"]
    assert row["peak_step"] >= 1900


def test_a_trajectory_that_only_rises_or_only_falls_has_no_overshoot():
    rising, falling = phases(curve(saturating)).iloc[0], phases(curve(lambda t: 2 - t)).iloc[0]
    assert not rising["overshoot"]
    assert rising["peak_step"] == rising["end_step"]
    assert not falling["overshoot"]
    assert falling["peak_step"] == falling["start_step"]
    assert falling["rise"] == 0


def test_each_group_has_its_own_phases_in_the_order_of_the_table():
    layers = pd.array([1, 0, None], dtype="Int64")
    shapes = (saturating, overshooting, overshooting)
    table = pd.concat([curve(shape, layer=layer) for shape, layer in zip(shapes, layers, strict=True)])
    table["layer"] = table["layer"].astype("Int64")
    out = phases(table)
    assert out["layer"].isna().tolist() == [False, False, True]
    assert out["layer"].iloc[:2].tolist() == [1, 0]
    assert out["overshoot"].tolist() == [False, True, True]


def test_any_column_can_be_followed_and_missing_values_do_not_count():
    table = curve(overshooting).rename(columns={"lam": "norm_sq"})
    table.loc[[0, 199], "norm_sq"] = np.nan
    row = phases(table, "norm_sq").iloc[0]
    assert (row["start_step"], row["end_step"]) == (20, 1990)
    assert phases(table.assign(norm_sq=np.nan), "norm_sq").empty
    assert not phases(table.iloc[[5]], "norm_sq")["overshoot"].item()


def test_what_is_no_trajectory_is_refused():
    with pytest.raises(ValueError, match=r"value must be one of the table's columns .*'sigma'"):
        phases(curve(saturating), "sigma")
    with pytest.raises(TypeError, match="got dict"):
        phases({"step": [1]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="two rows at step 10"):
        phases(pd.concat([curve(saturating), curve(saturating)]))
