import itertools
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

from weightdyn import plot
from weightdyn.checkpoints.published import NUMEL, read_published_forces, read_published_recovery
from weightdyn.checkpoints.recipe import Recipe, all_decay
from weightdyn.checkpoints.recovery import (
    METHODS,
    NOISE_ALONG,
    RHO_SPREAD,
    Course,
    Method,
    balance_forces,
    compare_recovery,
    decay_doubt,
    injection_scale,
    interval_means,
    noise_walk,
    norm_between,
    recover_forces,
    spline_forces,
    two_point_forces,
)
from weightdyn.core.forces import noise_rho
from weightdyn.core.tables import FORCE_TABLE, FORCES, budget
from weightdyn.explain.trajectory import closure

LR, DECAY, BETAS = 2e-3, 0.1, (0.9, 0.95)


def measured(weights, steps, tensor="w", **columns):
    """The table of a measured series, from the weights at every step of a training."""
    stack = weights[steps]
    rows = []
    for i, step in enumerate(steps):
        rows.append(
            {
                "step": step,
                "tensor": tensor,
                "layer": 0,
                "component": "up",
                "role": "transmission",
                "numel": stack.shape[1],
                "norm_sq": stack[i] @ stack[i],
                "rounding": 0.0,
                "dot_steps": np.array(steps[: i + 1]),
                "dots": np.array([stack[i] @ stack[j] for j in range(i + 1)]),
                **columns,
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def adam():
    """A noisy regression under AdamW, as a plain float64 loop: all weights, and the exact forces."""
    rng = np.random.default_rng(0)
    n, updates = 3000, 400
    w, m, v = rng.normal(0, 0.1, n), np.zeros(n), np.zeros(n)
    goal, weights, rows = rng.normal(0, 1, n), [], []
    weights.append(w)
    for t in range(1, updates + 1):
        lr = LR * min(1, t / 40) * (1 + np.cos(np.pi * t / 500)) / 2
        g = 0.3 * (w - goal) + rng.normal(0, 1, n)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        u = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + 1e-8)
        new = (1 - lr * DECAY) * w - lr * u
        rows.append(
            {
                "step": t,
                "span": 1,
                "tensor": "w",
                "lr": lr,
                "norm_sq": w @ w,
                "alignment": -2 * lr * (1 - lr * DECAY) * (w @ u),
                "injection": lr**2 * (u @ u),
                "decay": ((1 - lr * DECAY) ** 2 - 1) * (w @ w),
            }
        )
        w = new
        weights.append(w)
    truth = pd.DataFrame(rows)
    return np.array(weights), truth, Recipe(lr=truth["lr"].to_numpy(), weight_decay=DECAY, betas=BETAS)


def means(truth, steps):
    return np.array([truth[list(FORCES)].iloc[a:b].mean() for a, b in itertools.pairwise(steps)])


@pytest.mark.parametrize("dots", [True, False])
@pytest.mark.parametrize("steps", [list(range(0, 401, 50)), [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 400]])
def test_balance_finds_the_forces_of_a_training_that_it_did_not_see(adam, steps, dots):
    weights, truth, recipe = adam
    series = measured(weights, steps)
    table = recover_forces(series if dots else series.drop(columns="dots"), recipe)
    assert list(table)[: len(FORCE_TABLE)] == list(FORCE_TABLE)
    assert table["step"].tolist() == steps[1:]
    assert table["span"].tolist() == np.diff(steps).tolist()
    true = means(truth, steps)
    size = np.abs(true).sum(axis=1)
    late = table["step"] > 16
    error = np.abs(table[list(FORCES)].to_numpy() - true) / size[:, None]
    assert (
        error[late].max() < 0.07
    )  # of the whole budget, in the first gap, where injection is a seventh of it
    assert np.median(error[late], axis=0).max() < 0.01
    assert error[late, 2].max() < 0.003
    inside = (table["alignment_low"] <= true[:, 0]) & (true[:, 0] <= table["alignment_high"])
    assert inside[late].mean() >= 0.8


@pytest.mark.parametrize("method", METHODS)
def test_between_neighbouring_checkpoints_every_method_is_exact(adam, method):
    weights, truth, recipe = adam
    steps = [100, 101, 102, 103]
    table = recover_forces(measured(weights, steps), recipe, method)
    true = truth.iloc[100:103]
    if method == "two_point":  # û is (W_a − W_b)/η − λW_a, which is u
        assert np.allclose(table[list(FORCES)], true[list(FORCES)], rtol=1e-9)
    else:
        assert np.allclose(table[list(FORCES)], true[list(FORCES)], rtol=1e-7)


@pytest.mark.parametrize("method", ["balance", "spline"])
def test_recovered_forces_add_up_to_the_measured_change(adam, method):
    weights, _, recipe = adam
    steps = [0, 3, 10, 50, 51, 200, 400]
    table = recover_forces(measured(weights, steps), recipe, method)
    net = table["span"] * table[list(FORCES)].sum(axis=1)
    assert np.allclose(net, table["norm_sq_after"] - table["norm_sq"], rtol=1e-9)
    assert closure(table)["closure"].item() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_forces_of_all_updates_average_to_those_of_the_gaps(adam, method):
    weights, _, recipe = adam
    steps = [0, 16, 100, 250, 400]
    series = measured(weights, steps)
    gaps, updates = recover_forces(series, recipe, method), recover_forces(series, recipe, method, every=1)
    assert updates["step"].tolist() == list(range(1, 401))
    assert (updates["span"] == 1).all()
    columns = [*FORCES, "lr", "alignment_low", "alignment_high"]
    for row, a, b in zip(gaps[columns].to_numpy(), steps[:-1], steps[1:], strict=True):
        assert np.allclose(updates[columns].iloc[a:b].mean(), row, rtol=1e-9)
    assert np.flatnonzero(updates["norm_sq_after"].notna()).tolist() == [s - 1 for s in steps[1:]]
    some = recover_forces(series, recipe, method, every=40)
    assert some["step"].tolist() == list(range(40, 401, 40))
    pd.testing.assert_frame_equal(some, updates.iloc[39::40].reset_index(drop=True))


def element_wise(weights, steps, lr, decay):
    """The published way: a spline of every weight, evaluated at every update."""
    spline = CubicSpline(steps, weights[steps], axis=0)
    rows = []
    for t, eta in enumerate(lr, start=steps[0] + 1):
        before, after = spline(t - 1), spline(t)
        u = -(after - before) / eta - decay * before
        rows.append((-2 * eta * (1 - eta * decay) * (before @ u), eta**2 * (u @ u), before @ before))
    return np.array(rows)


@pytest.mark.parametrize("steps", [[0, 100], [0, 30, 100], [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 400]])
def test_spline_from_the_gram_matrix_is_the_spline_of_the_weights(adam, steps):
    weights, truth, _ = adam
    steps = np.array(steps)
    lr = truth["lr"].to_numpy()[: steps[-1]]
    gram = weights[steps] @ weights[steps].T
    course = spline_forces(gram, steps, lr, DECAY)
    alignment, injection, norm_sq = element_wise(weights, steps, lr, DECAY).T
    assert np.allclose(course.alignment, alignment, rtol=1e-10, atol=1e-10 * np.abs(alignment).max())
    assert np.allclose(course.injection, injection, rtol=1e-10, atol=1e-10 * injection.max())
    assert np.allclose(course.norm_sq, norm_sq, rtol=1e-10)


def test_spline_from_the_gram_matrix_takes_a_hundredth_of_the_memory():
    steps, lr = np.arange(0, 61), np.full(60, 1e-3)
    n = 20_000

    def checkpoint(step):
        return np.sin(np.arange(n) + 0.01 * step) + 1e-3 * np.random.default_rng(step).normal(size=n)

    def peak(work):
        tracemalloc.start()
        result = work()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, size

    def from_gram():
        gram = np.empty((len(steps), len(steps)))
        for i in steps:
            one = checkpoint(i)
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = one @ checkpoint(j)
        return spline_forces(gram, steps, lr, 0.0).alignment

    def from_weights():
        weights = np.array([checkpoint(step) for step in steps])
        return element_wise(weights, steps, lr, 0.0)[:, 0]

    (ours, small), (theirs, large) = peak(from_gram), peak(from_weights)
    assert np.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
    assert small <= large / 100 + 4 * 8 * n  # the two checkpoints themselves, and what makes them


def test_two_points_are_the_mean_displacement_at_the_start_of_the_gap(adam):
    weights, truth, recipe = adam
    table = recover_forces(measured(weights, [100, 160]), recipe, "two_point")
    lr = truth["lr"].to_numpy()[100:160]
    u = -(weights[160] - weights[100]) / lr.sum() - DECAY * weights[100]
    assert table["alignment"].item() == pytest.approx(
        np.mean(-2 * lr * (1 - lr * DECAY)) * (weights[100] @ u), rel=1e-12
    )
    assert table["injection"].item() == pytest.approx(np.mean(lr**2) * (u @ u), rel=1e-9)


@given(st.integers(1, 60), st.floats(0.0, 0.97))
def test_rho_of_noise_is_the_sum_of_squares_of_the_weights_of_a_bias_corrected_mean(t, beta1):
    weights = (1 - beta1) * beta1 ** np.arange(t) / (1 - beta1**t)
    assert noise_rho(t, beta1) == pytest.approx((weights**2).sum(), rel=1e-6)


def covariance(updates, beta1):
    """Of u_s and u_t, bias-corrected means of independent gradients of mean square 1: the sum over gradients."""
    gradients = np.arange(1, updates[-1] + 1)
    ages = updates[:, None] - gradients
    weights = np.where(ages >= 0, (1 - beta1) * beta1 ** np.maximum(ages, 0.0), 0.0)
    weights = weights / (1 - beta1 ** updates[:, None])
    return weights @ weights.T


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("steps", [[0, 1, 2, 4, 60], [3, 10, 11], [200, 240, 400]])
def test_the_walk_of_noise_is_the_sum_over_its_covariances_with_what_decay_leaves(steps, beta1):
    steps, decay = np.array(steps), 5.0
    lr = 1e-2 * np.random.default_rng(0).uniform(0.5, 1.5, steps[-1] - steps[0])
    walk = noise_walk(lr, steps, (beta1, 0.95), decay)
    for i, (a, b) in enumerate(itertools.pairwise(steps)):
        own = lr[a - steps[0] : b - steps[0]]
        rate = np.array([eta * np.prod(1 - own[j + 1 :] * decay) for j, eta in enumerate(own)])
        found = covariance(np.arange(a + 1, b + 1), beta1)
        assert walk.noise[i] == pytest.approx(rate @ found @ rate, rel=1e-9)
        assert walk.lr_sum[i] == pytest.approx(rate.sum(), rel=1e-12)
        assert walk.lr_sq_sum[i] == pytest.approx((rate**2).sum(), rel=1e-12)
        assert walk.rho[i] == pytest.approx((rate**2 * found.diagonal()).sum() / (rate**2).sum(), rel=1e-9)
        assert walk.stale[i] == pytest.approx(20 / (20 + (a + b) / 2))


def walk_of(first, count, lr=1e-3, betas=BETAS):
    return noise_walk(np.full(count, lr), np.array([first, first + count]), betas, 0.0)


@pytest.mark.parametrize("first", [0, 1, 500])
@pytest.mark.parametrize("rho", [0.01, 0.3, 1.0])
def test_over_one_update_the_displacement_is_rho_itself(first, rho):
    walk, numel = walk_of(first, 1), 1000
    for norm_sq in (1e-6, 1e6):  # whether the weights have moved or not
        factor = injection_scale(numel * 1e-6 * rho, norm_sq, numel, walk, BETAS[0])
        assert factor * walk.rho == pytest.approx(rho, rel=1e-9 if first or rho == 1 else 1)


@pytest.mark.parametrize(("first", "count"), [(2, 2), (8, 8), (0, 5)])
def test_a_gradient_that_lasts_is_told_from_its_noise_while_the_weights_have_hardly_moved(first, count):
    # u = √s·(what lasts) + √(1−s)·(noise): both parts of ‖u‖² and of ‖Σu‖² add.
    walk, numel, share = walk_of(first, count), 1000, 0.2
    moved_sq = numel * (share * (count * 1e-3) ** 2 + (1 - share) * walk.noise)
    factor = injection_scale(moved_sq, 1e9, numel, walk, BETAS[0])
    assert factor * walk.rho == pytest.approx(share + (1 - share) * walk.rho, rel=1e-9)


@pytest.mark.parametrize("first", [0, 30, 3000])
def test_the_displacement_of_noise_after_a_long_way_speaks_for_no_factor_but_what_cancels(first):
    for count in (1, 2, 7, 50, 900):
        walk = walk_of(first, count)
        factor = injection_scale(1000 * walk.noise, 1e-9, 1000, walk, BETAS[0])
        stale = 20 / (20 + first + count / 2)
        cancelled = 0.24 * (count - 1) / (count + 9) / np.sqrt(1 + (count - 1) / (660 * stale))
        assert np.log(factor) == pytest.approx(cancelled, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("norm_sq", [1e-9, 1e9])
def test_the_more_updates_a_gap_has_the_less_its_displacement_says(norm_sq):
    told = []
    for count in (2, 10, 100, 1000):
        walk = walk_of(2000, count)
        low, high = (injection_scale(1000 * c * walk.noise, norm_sq, 1000, walk, 0.9) for c in (0.5, 0.25))
        told.append((np.log(low / high) / np.log(2)).item())
    assert told == sorted(told, reverse=True)
    assert told[0] > 0.85
    assert told[-1] < 0.15


def test_a_displacement_that_says_nothing_leaves_rho_alone():
    walk = noise_walk(np.full(30, 1e-3), np.array([0, 10, 20, 30]), BETAS, 0.0)
    assert injection_scale(np.array([0.0, -1.0, np.nan]), 1.0, 10, walk, 0.9).tolist() == [1, 1, 1]
    still = noise_walk(np.zeros(5), np.array([10, 15]), BETAS, 0.1)
    assert injection_scale(1.0, 1.0, 10, still, 0.9).tolist() == [1]


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ends", [[0, 3, 100, 101, 500], [50, 80, 400]])
def test_a_pull_that_goes_with_the_root_of_the_rate_is_followed_exactly_through_any_gap(ends, constant):
    # The loop itself: steady pull, decay of many τ.
    updates = np.arange(1, 501)
    lr = np.full(500, 2e-3) if constant else 4e-3 * np.cos(np.pi * updates / 1100)
    path = [30.0]
    for eta in lr:
        path.append((1 - eta * 5.0) ** 2 * path[-1] + 800.0 * eta**1.5)
    path, steps = np.array(path), np.array(ends)
    found, bend = norm_between(path[steps], steps, lr[steps[0] : steps[-1]], 5.0)
    expected = path[steps[0] : steps[-1] + 1]
    assert (found[steps - steps[0]] == path[steps]).all()
    first = (
        steps[1] - steps[0] if steps[0] == 0 else 0
    )  # at the start of a training the pull is taken to grow
    np.testing.assert_allclose(found[first:], expected[first:], rtol=1e-9)
    np.testing.assert_allclose((found - bend), expected, rtol=1e-9)


def test_between_checkpoints_a_pull_that_falls_is_followed_better_than_its_mean():
    pull, lr = 800.0 * np.linspace(1.5, 0.5, 900), np.full(900, 2e-3)
    path = [30.0]
    for eta, one in zip(lr, pull, strict=True):
        path.append((1 - eta * 0.5) ** 2 * path[-1] + one * eta**1.5)
    path, steps = np.array(path)[100:], np.array([100, 300, 500, 700, 900])
    found, bend = norm_between(path[steps - 100], steps, lr[100:], 0.5)
    off, flat = np.abs(found - path)[200:600], np.abs(found - bend - path)[200:600]
    assert off.mean() < 0.1 * flat.mean()


def test_at_the_start_of_a_training_the_pull_grows_and_later_a_single_gap_has_one_pull():
    lr = np.full(100, 1e-3)
    first, later = (
        np.diff(norm_between(np.array([1.0, 2.0]), np.array([s, s + 100]), lr, 0.0)[0]) for s in (0, 7)
    )
    np.testing.assert_allclose(later, 0.01, rtol=1e-9)
    # From half of the mean to all of it at the middle, level from there, and moved up by an eighth to the mean.
    np.testing.assert_allclose(first[[0, -1]], [0.01 * (0.5 + 1 / 8), 0.01 * (1 + 1 / 8)], rtol=0.02)
    assert (np.diff(first) >= -1e-12).all()


def test_a_gap_of_a_thousand_timescales_has_a_finite_course():
    course, _ = norm_between(np.array([4.0, 1.0, 1.0]), np.array([9, 5009, 6000]), np.full(5991, 0.4), 0.5)
    assert np.isfinite(course).all()
    np.testing.assert_allclose(course[200:5000], 1.0, rtol=1e-9)


def test_the_doubt_of_decay_is_that_of_the_mean_of_a_noisy_walk_between_known_ends():
    # ‖w‖² as a walk of known steps: its mean over a gap, less that of the straight line between its ends.
    rng, span, eta, decay, norm_sq = np.random.default_rng(1), 100, 1e-3, 0.01, 50.0
    step = NOISE_ALONG * 2 * eta * np.sqrt(norm_sq)
    walks = np.cumsum(rng.normal(0, step, (2000, span)), axis=1)
    bridge = walks - walks[:, -1:] * np.arange(1, span + 1) / span
    expected = 2 * 2 * eta * decay * bridge.mean(axis=1).std()
    steps = np.array([1000, 1000 + span])
    found = decay_doubt(np.full(2, norm_sq), steps, np.full(span, eta), decay)
    assert found == pytest.approx(expected, rel=0.06)
    assert decay_doubt(np.array([50.0, 60.0]), steps, np.full(span, eta), 0.0) == 0
    assert decay_doubt(np.array([50.0, 60.0]), np.array([7, 8]), np.array([eta]), decay) == 0


def test_a_sparse_tensor_injects_less_and_its_displacement_tells(adam):
    # Half of the weights get no gradient and stay where they are, as rows of rare tokens do: the same injection.
    weights, _, recipe = adam
    recipe = Recipe(lr=recipe.lr, betas=BETAS)
    sparse = np.concatenate([weights, np.repeat(weights[:1], len(weights), axis=0)], axis=1)
    whole, half = measured(weights, [100, 120, 140]), measured(sparse, [100, 120, 140])
    seen, seen_half = (recover_forces(each, recipe)["injection"] for each in (whole, half))
    blind, blind_half = (
        recover_forces(each.drop(columns="dots"), recipe)["injection"] for each in (whole, half)
    )
    assert np.allclose(blind_half / blind, 2)
    assert (seen_half / seen).between(1.0, 1.2).all()


def test_a_part_of_the_measured_rows_is_a_series_of_its_own(adam):
    weights, _, recipe = adam
    part = [0, 100, 300]
    every = measured(weights, list(range(0, 401, 50)))
    for method in METHODS:
        pd.testing.assert_frame_equal(
            recover_forces(every[every["step"].isin(part)], recipe, method),
            recover_forces(measured(weights, part), recipe, method),
        )


def test_tensors_decay_as_the_recipe_says():
    rows = [
        {"step": s, "tensor": t, "component": c, "numel": 4, "norm_sq": 4.0 - s / 100}
        for s in (0, 10)
        for t, c in (("a.weight[q]", "q"), ("ln.weight", "norm"))
    ]
    series = pd.DataFrame(rows)
    table = recover_forces(series, Recipe(lr=1e-2, weight_decay=0.1)).set_index("tensor")
    assert table.loc["a.weight[q]", "decay"] == pytest.approx(-2e-3 * 3.95, rel=1e-2)
    assert table.loc["ln.weight", "decay"] == 0
    assert table.loc["ln.weight", "weight_decay"] == 0
    assert recover_forces(series, Recipe(lr=1e-2, weight_decay=0.1, decays=all_decay))["decay"].lt(0).all()
    named = Recipe(lr=1e-2, weight_decay=0.1, decays=lambda component, name: name == "a.weight")
    assert recover_forces(series, named)["weight_decay"].tolist() == [0.1, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_moves_while_the_learning_rate_is_zero(adam, method):
    # GPT-NeoX runs its first update with η = 0.
    weights, truth, _ = adam
    lr = truth["lr"].to_numpy().copy()
    shifted = np.concatenate([weights[:1], weights[:100]])
    recipe = Recipe(lr=np.append(0.0, lr[:99]), weight_decay=DECAY, betas=BETAS)
    table = recover_forces(measured(shifted, [0, 1, 50, 100]), recipe, method)
    assert (table[list(FORCES)].iloc[0] == 0).all()
    assert np.isfinite(table[[*FORCES, "alignment_low", "alignment_high"]].to_numpy()).all()
    still = recover_forces(measured(shifted, [0, 1]), recipe, method)
    assert (still[list(FORCES)] == 0).all(axis=None)


def test_rounding_widens_the_interval_and_flags_what_it_hides(adam):
    weights, _, recipe = adam
    series = measured(weights, [0, 100, 101, 400])
    plain = recover_forces(series, recipe)
    assert (plain["flag"] == "").all()
    rounded = weights[[0, 100, 101, 400]].astype(np.float16).astype(float)
    error = np.sum((rounded - weights[[0, 100, 101, 400]]) ** 2, axis=1)
    coarse = measured(rounded, [0, 1, 2, 3]).assign(step=[0, 100, 101, 400], rounding=error * 1e4)
    flagged = recover_forces(coarse, recipe)
    assert flagged["flag"].tolist() == ["", "rounding", ""]
    wider = flagged["alignment_high"] - flagged["alignment_low"]
    assert (wider > plain["alignment_high"] - plain["alignment_low"]).all()
    half = recover_forces(coarse.assign(rounding=error), recipe)
    assert np.allclose(half["alignment"], plain["alignment"], rtol=0.02, atol=1e-3)


def test_the_interval_of_rounding_is_two_standard_deviations():
    rng = np.random.default_rng(2)
    steps, recipe = np.array([0, 10]), Recipe(lr=1e-3, betas=BETAS)
    found, width = [], []
    for _ in range(60):
        w = rng.normal(size=4000)
        norms, rounding = [], []
        for each in (w, 1.01 * w):
            ulp = np.spacing(each.astype(np.float16)).astype(float)
            stored = each + np.abs(ulp) * rng.uniform(-0.5, 0.5, len(w))
            norms.append(stored @ stored)
            rounding.append((ulp**2).sum() / 12)
        series = pd.DataFrame(
            {"step": steps, "tensor": "w", "numel": 4000, "norm_sq": norms, "rounding": rounding}
        )
        row = recover_forces(series, recipe).iloc[0]
        exact = recover_forces(series.assign(norm_sq=[w @ w, 1.0201 * (w @ w)], rounding=0.0), recipe).iloc[0]
        found.append(row["alignment"] - exact["alignment"])
        width.append(
            (row["alignment_high"] - row["alignment_low"] - exact["alignment_high"] + exact["alignment_low"])
            / 2
        )
    assert np.mean(width) == pytest.approx(2 * np.std(found), rel=0.35)


def test_identical_checkpoints_under_two_steps_are_flagged(adam):
    weights, _, recipe = adam
    series = measured(weights[[0, 100, 100, 300]], [0, 1, 2, 3]).assign(step=[0, 100, 200, 300])
    series["hash"] = ["a", "b", "b", "c"]
    with pytest.warns(UserWarning, match="steps 100, 200 hold the same weights"):
        table = recover_forces(series, recipe)
    assert table["flag"].tolist() == ["", "identical", ""]


def test_comparing_counts_the_error_of_interval_means(adam):
    weights, truth, recipe = adam
    steps = [0, 100, 200, 300, 400]
    table = recover_forces(measured(weights, steps), recipe)
    found = compare_recovery(
        truth, {"balance": table, "half": table.assign(alignment=table["alignment"] / 2)}
    )
    assert found["method"].tolist() == ["balance", "balance", "half", "half"]
    assert found["pooling"].tolist() == ["tensor", "model"] * 2
    error = np.abs(1 - table["alignment"].to_numpy() / means(truth, steps)[:, 0])
    assert found["median"].iloc[0] == pytest.approx(np.median(error))
    assert found["p90"].iloc[0] == pytest.approx(np.quantile(error, 0.9))
    assert found["median"].iloc[2] == pytest.approx(0.5, abs=0.01)
    assert found["intervals"].tolist() == [4] * 4


def test_comparing_pools_the_sums_of_the_tensors_and_skips_what_was_not_logged():
    rows = [(10, "a", 1.0), (10, "b", 3.0), (20, "a", 2.0), (20, "b", 2.0), (30, "a", 9.0), (10, "c", 5.0)]
    truth = pd.DataFrame(rows[:4], columns=["step", "tensor", "alignment"]).assign(
        span=10, norm_sq=1.0, injection=0.0, decay=0.0
    )
    table = pd.DataFrame(rows, columns=["step", "tensor", "alignment"]).assign(
        span=10, norm_sq=1.0, injection=0.0, decay=0.0, alignment_low=0.0, alignment_high=2.5
    )
    table.loc[1, "alignment"] = 7.0
    tensor, model = compare_recovery(truth, table).to_dict("records")
    assert tensor["intervals"] == 4
    assert model["intervals"] == 2
    assert model["median"] == pytest.approx(0.5)  # (1 + 7)/(1 + 3) and 1
    assert tensor["inside"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="truth has no update of the tensors"):
        compare_recovery(truth.assign(tensor=truth["tensor"] + "x"), table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "cubic"}, r"method must be 'balance', .*, got 'cubic'"),
        ({"every": 0}, r"every must be .* None .* got 0"),
        ({"every": 1.5}, r"every must be .* None .* got 1.5"),
        ({"views": "head"}, "views: the table has its rows"),
    ],
)
def test_arguments_are_checked_at_the_door(adam, change, message):
    weights, _, recipe = adam
    with pytest.raises(ValueError, match=message):
        recover_forces(measured(weights, [0, 100]), recipe, **change)


def test_series_that_do_not_do_are_named(adam):
    weights, _, recipe = adam
    series = measured(weights, [0, 100, 200])
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        recover_forces(series, "pythia-70m")
    with pytest.raises(ValueError, match=r"lacks the columns \['numel'\]"):
        recover_forces(series.drop(columns="numel"), recipe)
    with pytest.raises(ValueError, match=r"at least two checkpoints, got the steps \[0\]"):
        recover_forces(series.iloc[:1], recipe)
    with pytest.raises(ValueError, match="two rows for w at one step, 100"):
        recover_forces(series.assign(step=[0, 100, 100]), recipe)
    with pytest.raises(ValueError, match="of w at step 100 is nan"):
        recover_forces(series.assign(norm_sq=[1.0, np.nan, 1.0]), recipe)
    with pytest.raises(ValueError, match=r"needs the inner products of checkpoints: .*'full'"):
        recover_forces(series.drop(columns="dots"), recipe, "spline")
    band = series.assign(**{name: [each[-2:] for each in series[name]] for name in ("dots", "dot_steps")})
    assert len(recover_forces(band, recipe, "two_point")) == 2
    with pytest.raises(ValueError, match=r"needs the inner products of checkpoints: .*'full'"):
        recover_forces(band, recipe, "spline")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "step",
            [0, 1.5, 200],
            "step must be a whole number from 0 to 100,000,000; that of w at step 1.5 is 1.5",
        ),
        ("step", [-1, 100, 200], "step must be a whole number"),
        ("step", [0, 100, 10**18], "step must be a whole number"),
        ("step", [0, np.nan, 200], "step must be a whole number"),
        ("step", ["0", "100", "200"], r"the columns \['step'\] .* must hold numbers"),
        (
            "norm_sq",
            [1.0, -1.0, 1.0],
            "norm_sq must be a finite .* that of w at step 100 is -1.0; leave that",
        ),
        ("norm_sq", [1.0, np.inf, 1.0], "norm_sq must be a finite"),
        ("numel", [3000, 0, 3000], "numel must be a whole number >= 1; that of w at step 100 is 0"),
        ("numel", [-3, -3, -3], "numel must be"),
        ("numel", [0.5, 0.5, 0.5], "numel must be"),
        ("rounding", [0.0, -1.0, 0.0], "rounding must be a finite number >= 0, or missing"),
        ("tensor", ["w", None, "w"], "a row of the column tensor is missing"),
    ],
)
def test_a_measured_table_with_what_cannot_be_is_refused(adam, column, values, message):
    weights, _, recipe = adam
    with pytest.raises(ValueError, match=f"source: {message}"):
        recover_forces(measured(weights, [0, 100, 200]).assign(**{column: values}), recipe)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [np.nan, np.inf, -1e-3])
def test_a_learning_rate_that_cannot_be_is_named_with_its_update(adam, method, rate):
    table = measured(adam[0], [0, 100, 200])
    recipe = Recipe(lambda t: np.where(t == 150, rate, 1e-3), 0.1)
    with pytest.raises(ValueError, match="learning rate of update 150 must be a finite number >= 0, got"):
        recover_forces(table, recipe, method)


def test_a_method_is_one_entry(adam, monkeypatch):
    weights, truth, recipe = adam
    known = {}

    def still(it):
        known["it"] = it
        zero = np.zeros(len(it.lr))
        return Course(zero, zero, zero, zero)

    monkeypatch.setitem(METHODS, "still", Method(still, gram="full"))
    table = recover_forces(measured(weights, [0, 100, 300]), recipe, "still")
    assert (table["alignment"] == 0).all()
    it = known["it"]
    np.testing.assert_allclose(it.gram, weights[[0, 100, 300]] @ weights[[0, 100, 300]].T)
    np.testing.assert_allclose(it.lr, truth["lr"].iloc[:300])
    assert (it.numel, it.weight_decay, len(it.rho)) == (weights.shape[1], DECAY, 300)
    with pytest.raises(ValueError, match=r"method must be .*'still', got 'moving'"):
        recover_forces(measured(weights, [0, 100, 300]), recipe, "moving")
    with pytest.raises(ValueError, match=r"method='still' needs the inner products .*gram='full'"):
        recover_forces(measured(weights, [0, 100, 300]).drop(columns="dots"), recipe, "still")


def test_truth_that_counts_updates_twice_or_has_no_tensors_is_refused(adam):
    weights, truth, recipe = adam
    table = recover_forces(measured(weights, [0, 100, 300]), recipe)
    with pytest.raises(ValueError, match="truth has two rows of w at step 1"):
        compare_recovery(pd.concat([truth, truth]), table)
    with pytest.raises(
        ValueError, match=r"truth is no force table of tensors: it lacks the columns \['tensor'\]"
    ):
        interval_means(truth.drop(columns="tensor"), table)
    with pytest.raises(TypeError, match=r"recovered \(mine\) must be a force table"):
        compare_recovery(truth, {"mine": 3})
    with pytest.raises(ValueError, match="recovered is no recovered force table: it lacks"):
        compare_recovery(truth, truth)


def test_no_bar_is_drawn_where_nobody_watches(adam, capsys):
    weights, _, recipe = adam
    series = pd.concat([measured(weights, [0, 100], tensor=str(i)) for i in range(3)])
    recover_forces(series, recipe)
    assert capsys.readouterr().err == ""


# A run of the reference trainer, with its log


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("transformers")
    from weightdyn.train.trainer import TrainConfig, train

    config = TrainConfig(
        steps=120,
        batch_size=2,
        seq_len=32,
        warmup=10,
        save_every=20,
        weibull_every=120,
        eval_every=120,
        device="cpu",
    )
    return train(config, tmp_path_factory.mktemp("run"), progress=False)


def test_a_runs_forces_are_recovered_from_its_checkpoints_alone(run):
    from weightdyn.checkpoints.series import Checkpoints

    recipe = Recipe.from_run(run)
    series = Checkpoints(run.path).measure(gram="full", weibull=False, progress=False)
    series = series[(series["step"] % 20 == 0) & ~series["component"].isin(["norm", "bias"])]
    truth = run.forces()
    found = compare_recovery(truth, {name: recover_forces(series, recipe, name) for name in METHODS})
    error = found.set_index(["method", "pooling"])["median"]
    assert error["balance", "model"] < 0.01
    assert error["balance", "tensor"] < 0.03
    assert error["balance", "tensor"] < error["spline", "tensor"] < error["two_point", "tensor"]
    assert found["inside"].iloc[0] > 0.8
    drift = found.set_index(["method", "pooling"])
    assert drift.loc[("balance", "model"), "drift_median"] < 0.15
    assert drift.loc[("balance", "tensor"), "drift_median"] < 0.25
    assert drift.loc[("balance", "tensor"), "drift_inside"] > 0.8


def test_fused_tensors_have_forces_of_their_parts_and_heads(run):
    recipe = Recipe.from_run(run)
    table = recover_forces(run, recipe, "two_point")
    heads = recover_forces(run, recipe, "two_point", views="head")
    assert np.isfinite(heads[["drift", "memory", "drift_low", "drift_high"]].to_numpy()).all()
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    last = table["step"].max()
    parts = table[(table["step"] == last) & table["component"].isin(["q", "k", "v"]) & (table["layer"] == 1)]
    assert parts["tensor"].tolist() == [f"{name}[{part}]" for part in "qkv"]
    for part in "qkv":
        rows = heads[(heads["step"] == last) & heads["tensor"].str.startswith(f"{name}[{part}.")]
        whole = parts[parts["tensor"] == f"{name}[{part}]"]
        assert len(rows) == 4
        for force in FORCES:
            assert rows[force].sum() == pytest.approx(whole[force].item(), rel=1e-9)


def test_balance_needs_no_more_than_numbers():
    course = balance_forces(np.array([1.0, 2.0]), np.array([5, 6]), np.array([0.5]), 0.5, 4, 0.25)
    assert [part.tolist() for part in course] == [[1.0], [1.1875], [0.25], [-0.4375]]
    course = two_point_forces(np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([0, 1]), np.array([0.5]), 0.0)
    assert [part.tolist() for part in course] == [[1.0], [-1.0], [1.0], [-0.0]]


# Figures and the command line


def test_forces_of_checkpoints_are_held_against_recovered_single_updates_and_not_against_gaps(adam, run):
    weights, truth, recipe = adam
    steps = [0, 100, 200, 300, 400]
    series = measured(weights, steps)
    sparse = truth[truth["step"].isin(steps)]
    with pytest.raises(ValueError, match=r"one of each span, which is no mean .* every=n"):
        compare_recovery(sparse, recover_forces(series, recipe))
    single = recover_forces(series, recipe, every=50)
    found = compare_recovery(sparse, single).set_index("pooling")
    rows = single.set_index("step")["alignment"] / truth.set_index("step")["alignment"]
    assert found["intervals"].tolist() == [4, 4]
    assert found.loc["tensor", "median"] == pytest.approx((1 - rows[steps[1:]]).abs().median())
    both = truth[truth["step"].isin([*steps, 50])]  # two of the first gap
    assert compare_recovery(both, recover_forces(series, recipe))["intervals"].tolist() == [1, 1]

    from weightdyn.checkpoints.series import Checkpoints
    from weightdyn.checkpoints.states import forces_from_states

    recovered = recover_forces(Checkpoints(run.path), Recipe.from_run(run), every=20, progress=False)
    exact = forces_from_states(run)
    found = compare_recovery(exact, recovered).set_index("pooling")
    assert found["intervals"].tolist() == [len(exact), 1]
    assert found.loc["model", "median"] < 0.2  # a single update
    assert found["drift_median"].isna().all()


@pytest.fixture
def figures():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.mark.usefixtures("figures")
def test_a_figure_holds_recovered_against_logged_with_its_band_and_the_ratio_below(adam):
    weights, truth, recipe = adam
    steps = [0, 100, 200, 300, 400]
    tables = {name: recover_forces(measured(weights, steps), recipe, name) for name in METHODS}
    top, bottom = plot.recovery(truth, tables)
    lines = {line.get_label(): line for line in top.get_lines()}
    assert np.allclose(lines["logged"].get_ydata(), means(truth, steps)[:, 0])
    assert lines["logged"].get_xdata().tolist() == [50.5, 150.5, 250.5, 350.5]
    for name, table in tables.items():
        assert np.allclose(lines[name.replace("_", " ")].get_ydata(), table["alignment"])
    assert lines["balance"].get_color() == plot.FORCE_COLORS["alignment"]
    ratio = bottom.get_lines()[0].get_ydata()
    assert np.allclose(ratio, tables["balance"]["alignment"] / means(truth, steps)[:, 0])
    assert len(top.collections) == len(bottom.collections) == 1
    low, high = bottom.get_ylim()
    assert 0 <= low < 1 < high <= 2
    assert "Δ‖w‖² per update" in top.get_ylabel()
    assert len(plot.recovery(truth, tables["balance"], ax=[top, bottom])) == 2
    with pytest.raises(ValueError, match="truth has no update of the tensors"):
        plot.recovery(truth.assign(tensor="x"), tables)


@pytest.mark.usefixtures("figures")
def test_a_recovered_table_has_a_force_budget_like_any_other(adam):
    weights, _, recipe = adam
    table = recover_forces(measured(weights, [0, 100, 200, 300, 400]), recipe)
    assert np.allclose(budget(table).filter(like="_share").sum(axis=1), 1)
    assert len(plot.force_budget(table).get_lines()) >= 4
    assert len(plot.force_budget(table, kind="shares", by="role")) == 1


@pytest.mark.filterwarnings("default")
def test_the_command_recovers_prints_draws_and_stores(run, tmp_path):
    from typer.testing import CliRunner

    from weightdyn.cli import app

    def call(*arguments):
        return CliRunner().invoke(app, ["recover", *map(str, arguments)])

    out, figure = tmp_path / "forces.parquet", tmp_path / "forces.png"
    done = call(run.path, "--steps", "0,40,80,120", "--out", out, "--figure", figure)
    assert done.exit_code == 0, done.output
    assert "alignment_share" in done.output
    assert "diffusion" in done.output
    stored = pd.read_parquet(out)
    assert sorted(stored["step"].unique()) == [40, 80, 120]
    assert figure.stat().st_size > 1000
    folder = run.path / "checkpoints"
    arguments = (folder, "--recipe", "pythia-70m", "--weight-decay", 0.01, "--method", "spline", "--out", out)
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert "Warning: the weights contradict the recipe" in " ".join(done.output.split())
    assert "τ = 1/(ηλ) = 100,000 updates" in done.output
    assert pd.read_parquet(out)["weight_decay"].max() == 0.01
    plan = call(run.path, "--dry-run")
    assert plan.exit_code == 0
    assert "of 14 checkpoints" in plan.output
    for arguments, message in (
        ((folder,), "--recipe is needed, such as pythia-70m"),
        ((run.path, "--method", "cubic"), "--method must be one of balance, spline, two_point"),
        ((run.path, "--recipe", "pythia-71m"), "name must be one of pythia-14m"),
    ):
        wrong = call(*arguments)
        assert wrong.exit_code == 2
        assert message in wrong.output


# The paper's own recovery


def test_a_published_recovery_is_read_with_the_sign_of_growth(tmp_path):
    records = [
        {"step": 100, "true": -2.0, "spline": -1.5, "ratio": 0.75, "local_gap": 64},
        {"step": 50, "true": -1.0, "spline": -1.25, "ratio": 1.25, "local_gap": 32},
    ]
    (tmp_path / "spline.json").write_text(json.dumps(records))
    table = read_published_recovery(tmp_path / "spline.json")
    assert table.to_dict("list") == {
        "step": [50, 100], "gap": [32, 64], "true": [1.0, 2.0], "spline": [1.25, 1.5], "ratio": [1.25, 0.75],
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[1]", '[{"step": 1}]', "3"])
def test_a_foreign_recovery_is_named(tmp_path, text):
    (tmp_path / "foreign.json").write_text(text)
    with pytest.raises(ValueError, match=r"foreign\.json is not a published recovery"):
        read_published_recovery(tmp_path / "foreign.json")


@pytest.mark.skipif(
    "WEIGHTDYN_REFERENCE" not in os.environ,
    reason="WEIGHTDYN_REFERENCE is not set to a folder with the public data",
)
def test_the_published_ratio_is_below_one_for_the_alignment_after_the_step_and_the_missing_injection():
    folder = Path(os.environ["WEIGHTDYN_REFERENCE"]) / "Weibull_WeightScale_dynamics" / "derived_data"
    table = read_published_recovery(folder / "spline_from_ckpt_pythia2.json")
    assert len(table) == 399
    assert table["ratio"].median() == pytest.approx(0.935, abs=0.001)
    # Injection from the force log of the same configuration, over all weights; the recovery took 200,000 of them.
    log = read_published_forces(folder / "self_train" / "baseline_force.jsonl")
    injection = np.interp(table["step"], log["step"], log["injection"]) * 200_000 / NUMEL
    after = table["true"]  # A + 2I, as it was logged
    smooth = after - injection  # A + I, what a path without noise can find
    assert (smooth / after).median() == pytest.approx(0.954, abs=0.001)
    assert (table["spline"] / smooth).median() == pytest.approx(0.980, abs=0.001)
    assert (
        table["spline"] / (after - 2 * injection)
    ).median() > 1.02  # of the alignment before the step: too much


@pytest.mark.skipif(not os.environ.get("WEIGHTDYN_REFERENCE"), reason="WEIGHTDYN_REFERENCE is not set")
@pytest.mark.parametrize(("decay", "signs"), [(0.1, {1.0}), (0.01, {-1.0})])
def test_alignment_of_pythia_stays_positive_only_with_the_decay_of_its_configuration(decay, signs):
    folder = Path(os.environ["WEIGHTDYN_REFERENCE"]) / "Weibull_WeightScale_dynamics/derived_data/real_pythia"
    log = pd.DataFrame(json.loads((folder / "realpythia_closure.json").read_text()))
    numel = 14_155_776
    measured = pd.DataFrame({"step": log["step"], "tensor": "w", "component": "up", "role": "transmission"})
    measured = measured.assign(numel=numel, norm_sq=numel * log["sigma_obs"] ** 2)
    recipe = Recipe.preset("pythia-70m", weight_decay=decay)
    late = recover_forces(measured, recipe, progress=False).query("step > 20000")
    assert set(np.sign(late["alignment"])) == signs


@pytest.mark.parametrize("every", [None, 1])
def test_the_interval_is_the_budget_with_the_injection_at_both_ends_of_its_spread(every):
    norm_sq, steps, lr = np.array([4.0, 4.1]), np.array([90, 100]), np.full(10, 1e-2)
    measured = pd.DataFrame({"step": steps, "tensor": "w", "numel": 100, "norm_sq": norm_sq})
    table = recover_forces(measured, Recipe(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)), every=every)
    spread = np.exp(RHO_SPREAD["noise"] * (20 / (20 + 95)) ** (1 / 3))
    change = table["alignment"] + table["injection"] + table["decay"]
    doubt = decay_doubt(norm_sq, steps, lr, 0.1).item() + 2.0**-24 * 4.0
    for end, rho, sign in (("alignment_low", spread, -1), ("alignment_high", 1 / spread, 1)):
        expected = change - rho * table["injection"] - table["decay"] + sign * doubt
        np.testing.assert_allclose(table[end], expected, rtol=1e-12)
