"""Drift and memory of recovered tables: on pure noise, by algebra, and against a log."""

import itertools

import numpy as np
import pandas as pd
import pytest

from weightdyn import plot
from weightdyn.checkpoints import recovery
from weightdyn.checkpoints.recipe import Recipe
from weightdyn.checkpoints.recovery import (
    DIFFUSION_SPREAD,
    METHODS,
    NOISE_ALONG,
    compare_recovery,
    decay_doubt,
    drift_noise,
    interval_means,
    recover_forces,
)
from weightdyn.core.forces import memory_null
from weightdyn.core.tables import ACCURACY_TABLE, FORCE_TABLE, FORCES, RECOVERY_TABLE, aggregate, budget

BETA1, BETA2, DECAY, UPDATES, N = 0.9, 0.999, 0.1, 600, 20_000
STEPS = (0, 1, 2, 4, 8, 16, 32, 64, *range(100, UPDATES + 1, 50))


def simulate(pull=0.0, beta1=BETA1, period=800.0):
    """AdamW in float64 whose gradient is noise, and a pull towards 0: checkpoints, the log, the recipe."""
    rng = np.random.default_rng(0)
    w, m, v = rng.normal(0, 0.02, N), np.zeros(N), np.zeros(N)
    checkpoints, rows = {0: w}, []
    for t in range(1, UPDATES + 1):
        lr = 1e-3 * min(1, t / 50) * (1 + np.cos(np.pi * t / period)) / 2
        g = pull * w + rng.normal(size=N)
        m, v = beta1 * m + (1 - beta1) * g, BETA2 * v + (1 - BETA2) * g * g
        root = np.sqrt(v / (1 - BETA2**t)) + 1e-8
        u, shrink = m / (1 - beta1**t) / root, 1 - lr * DECAY
        forces = {
            "alignment": -2 * lr * shrink * (w @ u),
            "injection": lr**2 * (u @ u),
            "decay": (shrink**2 - 1) * (w @ w),
            "drift": -2 * lr * shrink * (w @ (g / root)),
        }
        rows.append({"step": t, "span": 1, "tensor": "w", "lr": lr, "norm_sq": w @ w, **forces})
        w = shrink * w - lr * u
        if t in STEPS:
            checkpoints[t] = w
    log = pd.DataFrame(rows)
    log["memory"] = log["alignment"] - log["drift"]
    steps = np.array(STEPS)
    stack = np.array([checkpoints[step] for step in STEPS])
    gram = stack @ stack.T
    series = pd.DataFrame(
        {
            "step": steps,
            "tensor": "w",
            "component": "up",
            "role": "transmission",
            "numel": N,
            "norm_sq": gram.diagonal(),
            "dot_steps": [steps[: i + 1] for i in range(len(steps))],
            "dots": [gram[i, : i + 1] for i in range(len(steps))],
        }
    )
    return series, log, Recipe(log["lr"].to_numpy(), DECAY, (beta1, BETA2))


@pytest.fixture(scope="module")
def noise():
    return simulate()


@pytest.fixture(scope="module")
def pulled():
    return simulate(pull=0.6)


def logged(log, name):
    return np.array([log[name].iloc[a:b].mean() for a, b in itertools.pairwise(STEPS)])


@pytest.mark.parametrize("beta1", [0.0, 0.8, 0.9, 0.95])
def test_the_diffusion_of_pure_noise_is_its_own_to_a_few_percent(beta1):
    series, log, recipe = simulate(beta1=beta1, period=np.inf)
    table = recover_forces(series.drop(columns="dots"), recipe)
    late = table["step"] > 100
    found = (table["injection"] + table["memory"])[late]
    expected = logged(log["lr"].pow(2).to_frame("lr"), "lr")[late] * N  # η²n, whatever β₁ is
    np.testing.assert_allclose(found, expected, rtol=0.02)
    whole = np.average(found, weights=table["span"][late])
    true = logged(log, "injection") + logged(log, "memory")
    assert whole == pytest.approx(np.average(true[late], weights=table["span"][late]), rel=0.03)


@pytest.mark.parametrize("dots", [True, False])
def test_the_drift_of_pure_noise_may_be_zero(noise, dots):
    series, log, recipe = noise
    table = recover_forces(series if dots else series.drop(columns="dots"), recipe)
    assert ((table["drift_low"] <= 0) & (table["drift_high"] >= 0)).all()
    true = logged(log, "drift")
    assert ((table["drift_low"] <= true) & (true <= table["drift_high"])).all()


def test_a_pull_towards_zero_is_found_as_a_negative_drift(pulled):
    series, log, recipe = pulled
    table = recover_forces(series.drop(columns="dots"), recipe)
    late = table["step"] > 100
    assert (table["alignment"][late].head(5) > 0).all()  # memory hides it
    assert (table["drift"][late] < 0).all()
    accuracy = compare_recovery(log, table[late].reset_index(drop=True)).iloc[0]
    assert accuracy["drift_median"] < 0.03
    assert accuracy["drift_sign"] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [None, 1])
def test_alignment_is_drift_and_memory_and_diffusion_is_that_of_the_budget(noise, method, every):
    series, _, recipe = noise
    table, balance = (recover_forces(series, recipe, name, every) for name in (method, "balance"))
    np.testing.assert_allclose(table["drift"] + table["memory"], table["alignment"], rtol=1e-9, atol=1e-15)
    diffusion = balance["injection"] + balance["memory"]
    np.testing.assert_allclose(table["injection"] + table["memory"], diffusion, rtol=1e-9)
    np.testing.assert_allclose(balance["memory"], balance["memory_null"], rtol=1e-9, atol=1e-15)
    gained = balance[["alignment", "injection"]].sum(axis=1)
    np.testing.assert_allclose(balance["drift"], gained - diffusion, rtol=1e-9, atol=1e-15)
    assert table["signal"].isna().all()
    for end in ("drift_low", "drift_high"):
        pd.testing.assert_series_equal(table[end], balance[end])


def test_memory_is_injection_times_that_of_white_noise_with_the_real_schedule(noise):
    series, log, recipe = noise
    table = recover_forces(series, recipe, every=1)
    lr = log["lr"].to_numpy()
    for t in (1, 2, 30, 60, 400):  # the sum itself, over all updates before
        s = np.arange(1, t)
        rho = BETA1**s * (1 + BETA1 ** (t - s)) / (1 + BETA1**t)
        kept = np.array([np.prod(1 - lr[t - k : t - 1] * DECAY) for k in s])
        null = 2 * (1 - lr[t - 1] * DECAY) * (rho * kept * lr[t - 1 - s]).sum() / lr[t - 1]
        row = table.iloc[t - 1]
        assert row["memory_null"] == pytest.approx(null * row["injection"], rel=1e-9)


@pytest.mark.parametrize("dots", [True, False])
@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_the_interval_is_diffusion_at_the_ends_of_its_range_and_chance_as_independent_errors(
    noise, every, dots, rounding
):
    series, _, recipe = noise
    series = series.iloc[-4:].assign(rounding=rounding)
    table = recover_forces(series if dots else series.drop(columns="dots"), recipe, every=every)
    gap = np.arange(3).repeat(50 if every else 1)
    w_sq, steps = series["norm_sq"].to_numpy(), series["step"].to_numpy()
    lr = np.array([recipe.lr_at(np.arange(a + 1, b + 1)).mean() for a, b in itertools.pairwise(steps)])
    chance = 2 * drift_noise(w_sq[:-1], lr, 50, BETA1)
    blur = 2 * np.sqrt(4 * 3 * (w_sq[1:] + w_sq[:-1]) * rounding / N) / 50  # a kurtosis of 3
    rates = recipe.lr_at(np.arange(steps[0] + 1, steps[-1] + 1))
    doubt = decay_doubt(w_sq, steps, rates, DECAY) + 2.0**-24 * w_sq[:-1]
    chance = np.sqrt(chance**2 + blur**2 + doubt**2)[gap]
    window = 1 / (1 - BETA2)
    spread = DIFFUSION_SPREAD["displacement" if dots else "noise"]
    high = np.exp(spread * (window / (window + (steps[1:] + steps[:-1]) / 2)) ** (1 / 6))[gap]
    low = 1 / high
    diffusion = table["injection"] + table["memory"]
    below = np.sqrt(((high - 1) * diffusion) ** 2 + chance**2)
    above = np.sqrt(((1 - low) * diffusion) ** 2 + chance**2)
    np.testing.assert_allclose(table["drift"] - table["drift_low"], below, rtol=1e-9)
    np.testing.assert_allclose(table["drift_high"] - table["drift"], above, rtol=1e-9)


def test_a_displacement_below_its_rounding_tells_nothing_and_the_interval_is_that_of_theory(noise):
    series, _, recipe = noise
    series = series.iloc[-2:].assign(rounding=1.0)
    blind = recover_forces(series.drop(columns="dots"), recipe)
    pd.testing.assert_frame_equal(recover_forces(series, recipe), blind)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("span", [1, 3, 40])
def test_what_a_log_holds_by_chance_is_the_variance_of_late_noise(beta1, span):
    # Σ(u_t − g_t) over the span, as a sum over gradients; those before it matter for 400 updates.
    before = 400
    t, s = np.arange(before, before + span)[:, None], np.arange(before + span)
    coefficients = np.where(s <= t, (1 - beta1) * beta1 ** np.maximum(t - s, 0.0), 0.0) - (s == t)
    expected = 2 * 0.1 * 3.0 * np.sqrt((coefficients.sum(axis=0) ** 2).sum()) / span
    assert drift_noise(9.0, 0.1, span, beta1) == pytest.approx(NOISE_ALONG * expected, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [None, 1])
def test_a_learning_rate_of_zero_has_neither_drift_nor_memory(noise, method, every):
    series, _, _ = noise
    steps = [0, 3, 40, 70]
    still = series.iloc[[0, 0, 6, 7]].assign(step=steps, dot_steps=[steps[: i + 1] for i in range(4)])
    gram = still["norm_sq"].iloc[0] * 0.99
    dots = [still["norm_sq"].iloc[: i + 1].to_numpy() * 0 + gram for i in range(4)]
    for i, row in enumerate(dots):
        row[-1] = still["norm_sq"].iloc[i]
    dots[1][0] = dots[1][1]
    updates = np.arange(1, 71)
    rates = np.where((updates <= 3) | (updates == 50), 0.0, 1e-3)  # the second time with a memory
    table = recover_forces(still.assign(dots=dots), Recipe(rates, DECAY, (BETA1, BETA2)), method, every)
    parts = table[["drift", "memory", "memory_null", "drift_low", "drift_high"]]
    assert np.isfinite(parts.to_numpy()).all()
    assert (parts[table["step"] <= 3] == 0).all(axis=None)
    if every:
        assert (table.loc[table["step"] == 50, ["memory_null", "injection"]] == 0).all(axis=None)


def test_a_series_that_starts_late_has_the_memory_of_the_updates_before_it(noise):
    series, _, recipe = noise
    whole = recover_forces(series, recipe).tail(2).reset_index(drop=True)
    part = recover_forces(series.tail(3), recipe)
    columns = ["memory", "drift", "drift_low", "drift_high"]
    np.testing.assert_allclose(part[columns], whole[columns], rtol=1e-3)  # ‖w‖² is interpolated otherwise
    np.testing.assert_allclose(
        part["memory_null"] / part["injection"], whole["memory_null"] / whole["injection"]
    )


def test_memory_is_followed_once_for_each_decay_over_all_of_pythia(monkeypatch):
    seen = []

    def counted(lr, beta1, weight_decay):
        seen.append((len(lr), weight_decay))
        return memory_null(lr, beta1, weight_decay)

    monkeypatch.setattr(recovery, "memory_null", counted)
    steps = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    series = pd.concat(
        pd.DataFrame(
            {"step": steps, "tensor": str(i), "component": component, "numel": 10**6, "norm_sq": 400.0}
        )
        for i, component in enumerate(["up", "norm", "down", "bias"])
    )
    table = recover_forces(series, Recipe.preset("pythia-70m"))
    assert sorted(seen) == [(143_000, 0.0), (143_000, 0.1)]
    assert np.isfinite(table[["drift", "memory", "drift_low", "drift_high"]].to_numpy()).all()
    assert (table.loc[table["step"] == 1, "memory"] == 0).all()  # its first update moves nothing
    seen.clear()
    recover_forces(series[series["step"] > 140_000], Recipe.preset("pythia-70m"))
    assert max(seen)[0] < 4000  # what lies further back is forgotten


def test_recovered_tables_say_what_memory_is_assumed_to_be(noise):
    series, _, recipe = noise
    table = recover_forces(series, recipe)
    assert list(table) == [*FORCE_TABLE, *RECOVERY_TABLE]
    assert table["split"].dtype == "category"
    assert (table["split"] == "white noise").all()
    assert table[["drift", "memory", "memory_null", "drift_low", "drift_high"]].dtypes.eq(float).all()
    shares = budget(table, "model", kind="drift")
    np.testing.assert_allclose(shares["net"], table[list(FORCES)].sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(aggregate(table, "role")["drift"], table["drift"])


def test_accuracy_of_drift_is_over_the_logged_budget(pulled):
    series, log, recipe = pulled
    late = recover_forces(series, recipe).query("step > 100").reset_index(drop=True)
    true = {name: logged(log, name)[-len(late) :] for name in (*FORCES, "drift", "memory")}
    diffusion = true["injection"] + true["memory"]
    size = np.abs(true["drift"]) + np.abs(diffusion) + np.abs(true["decay"])
    found = compare_recovery(log, late).set_index("pooling")
    assert list(found.reset_index()) == sorted(found.reset_index(), key=["pooling", *ACCURACY_TABLE].index)
    error = np.abs(late["drift"] - true["drift"]) / size
    for row in (found.loc["tensor"], found.loc["model"]):  # one tensor
        assert row["drift_median"] == pytest.approx(np.median(error), rel=1e-9)
        assert row["drift_p90"] == pytest.approx(np.quantile(error, 0.9), rel=1e-9)
        other = np.abs(late["injection"] + late["memory"] - diffusion) / size
        assert row["diffusion_median"] == pytest.approx(np.median(other), rel=1e-9)
        assert row["diffusion_p90"] == pytest.approx(np.quantile(other, 0.9), rel=1e-9)
        assert row["drift_sign"] == (np.sign(late["drift"]) == np.sign(true["drift"])).mean()
    inside = (late["drift_low"] <= true["drift"]) & (true["drift"] <= late["drift_high"])
    assert found.loc["tensor", "drift_inside"] == inside.mean()
    assert np.isnan(found.loc["model", "drift_inside"])
    blind = compare_recovery(log.drop(columns=["drift", "memory"]), late)
    assert list(blind) == list(ACCURACY_TABLE)
    assert blind.filter(regex="^d(rift|iffusion)_").isna().all(axis=None)
    assert (blind["median"] == found.reset_index()["median"]).all()


def test_a_drift_that_was_not_always_logged_is_the_mean_of_where_it_was(noise):
    series, log, recipe = noise
    table = recover_forces(series, recipe)
    some = log.assign(drift=log["drift"].where(log["step"] % 2 == 0))
    found = interval_means(some, table, "drift")
    assert np.isnan(found.iloc[0])
    assert found.iloc[-1] == pytest.approx(log["drift"].iloc[551:600:2].mean(), rel=1e-9)
    with pytest.raises(ValueError, match=r"name must be .*'drift'.* got 'shift'"):
        interval_means(log, table, "shift")


@pytest.mark.usefixtures("_no_figures")
def test_a_recovered_table_draws_the_budget_of_drift(noise):
    series, log, recipe = noise
    table = recover_forces(series, recipe)
    assert len(plot.recovery(log, table)) == 2
    assert len(plot.force_budget(table, kind="drift").get_lines()) >= 3


@pytest.fixture
def _no_figures():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    yield
    plt.close("all")
