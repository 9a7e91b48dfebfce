"""The algebra against plain float64 loops."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weightdyn.core import forces, tables

vectors = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-10, 10), min_size=n, max_size=n)] * 2)
)
rates = st.floats(1e-6, 1e-1)
decays = st.floats(0, 1)


def loop(w, u, lr, weight_decay):
    """w', and the inner products of both states with u, one weight at a time."""
    after = [(1 - lr * weight_decay) * a - lr * b for a, b in zip(w, u, strict=True)]
    dot = math.fsum(a * b for a, b in zip(w, u, strict=True))
    dot_after = math.fsum(a * b for a, b in zip(after, u, strict=True))
    square = [math.fsum(a * a for a in x) for x in (w, u, after)]
    return dot, dot_after, *square


@given(vectors, rates, decays)
def test_exact_forces_sum_to_the_change_of_the_squared_norm(pair, lr, weight_decay):
    dot, _, w_sq, u_sq, after_sq = loop(*pair, lr, weight_decay)
    split = forces.forces_from_products(dot, u_sq, w_sq, lr, weight_decay)
    assert sum(split) == pytest.approx(after_sq - w_sq, abs=1e-12 * (1 + w_sq + after_sq))


@given(vectors, rates, decays)
def test_products_after_the_step_give_those_before_it(pair, lr, weight_decay):
    dot, dot_after, w_sq, u_sq, after_sq = loop(*pair, lr, weight_decay)
    before = forces.before_step(dot_after, u_sq, after_sq, lr, weight_decay)
    scale = 1e-11 * (1 + w_sq + u_sq)
    assert before.dot_wu == pytest.approx(dot, abs=scale)
    assert before.w_sq == pytest.approx(w_sq, abs=scale)
    assert before.u_sq == u_sq
    forth = forces.after_step(*before, lr, weight_decay)
    assert forth.dot_wu == pytest.approx(dot_after, abs=scale)
    assert forth.w_sq == pytest.approx(after_sq, abs=scale)


@given(vectors, rates, decays)
def test_leading_order_misses_the_change_by_the_terms_that_it_drops(pair, lr, weight_decay):
    dot, _, w_sq, u_sq, after_sq = loop(*pair, lr, weight_decay)
    split = forces.forces_from_products(dot, u_sq, w_sq, lr, weight_decay, order="leading")
    dropped = 2 * lr**2 * weight_decay * dot + (lr * weight_decay) ** 2 * w_sq
    assert sum(split) + dropped == pytest.approx(after_sq - w_sq, abs=1e-12 * (1 + w_sq + after_sq))


def exact_angle(w, u, lr, weight_decay):
    """The angle between w and w', atan2(‖w' across w‖, w' along w): nothing is rounded before the roots."""
    w, u = [*map(Fraction, w)], [*map(Fraction, u)]
    lr, weight_decay = Fraction(lr), Fraction(weight_decay)
    after = [(1 - lr * weight_decay) * a - lr * b for a, b in zip(w, u, strict=True)]
    w_sq = sum(a * a for a in w)
    along = sum(a * b for a, b in zip(w, after, strict=True)) / w_sq
    across_sq = sum((b - along * a) ** 2 for a, b in zip(w, after, strict=True))
    return math.atan2(math.sqrt(across_sq), float(along) * math.sqrt(w_sq))


@given(vectors, st.floats(1e-15, 1e-1), decays)
def test_angle_is_that_between_the_weights_before_and_after(pair, lr, weight_decay):
    w, u = (np.array(x) for x in pair)
    after = (1 - lr * weight_decay) * w - lr * u
    assume(np.linalg.norm(w) > 1e-3 and np.linalg.norm(after) > 0.1 * np.linalg.norm(w))
    got = forces.angle(w @ u, u @ u, w @ w, lr, weight_decay)
    # u along w leaves nothing across it but the rounding of two products, √ε of ‖u‖.
    across = lr * np.linalg.norm(u) / np.linalg.norm(after)
    assert got == pytest.approx(exact_angle(*pair, lr, weight_decay), rel=1e-11, abs=1e-7 * across)


@given(vectors, st.floats(-15, -1), decays)
def test_small_angles_are_as_precise_as_large_ones(pair, exponent, weight_decay):
    w, u = (np.array(x) for x in pair)
    lr = 10**exponent
    size = np.linalg.norm(w) * np.linalg.norm(u)
    assume(np.linalg.norm(w) > 1e-3 and np.linalg.norm(u) > 1e-3 and abs(w @ u) < 0.99 * size)
    assume(np.linalg.norm((1 - lr * weight_decay) * w - lr * u) > 0.1 * np.linalg.norm(w))
    got = forces.angle(w @ u, u @ u, w @ w, lr, weight_decay)
    assert got == pytest.approx(exact_angle(w, u, lr, weight_decay), rel=1e-11)


def test_the_arccos_of_the_cosine_would_not_do_for_small_angles():
    w, u, lr = np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1e-9
    after = w - lr * u
    cosine = w @ after / np.linalg.norm(w) / np.linalg.norm(after)
    assert math.acos(min(cosine, 1.0)) == 0.0
    assert forces.angle(w @ u, u @ u, w @ w, lr, 0.0) == pytest.approx(1e-9, rel=1e-15)


@given(st.floats(0.0, 0.99))
def test_the_size_of_a_noisy_update_settles_at_the_sum_of_squared_weights_of_its_mean(beta1):
    weights = (1 - beta1) * beta1 ** np.arange(5000)  # of the gradients in m, the newest first
    assert forces.noise_rho(np.inf, beta1) == pytest.approx((weights**2).sum(), rel=1e-12)


def test_alignment_with_the_weights_after_the_step_is_too_large_by_two_injections():
    rng = np.random.default_rng(0)
    w, u, lr = rng.normal(size=1000), rng.normal(size=1000), 0.01
    before = forces.forces_from_products(w @ u, u @ u, w @ w, lr, 0.0)
    after = w - lr * u
    wrong = forces.forces_from_products(after @ u, u @ u, after @ after, lr, 0.0)
    assert wrong.alignment - before.alignment == pytest.approx(2 * before.injection)


def test_formulas_broadcast_over_arrays_and_columns():
    table = pd.DataFrame({"dot": [1.0, 2.0], "u": [3.0, 4.0], "w": [5.0, 6.0], "lr": [0.1, 0.2]})
    split = forces.forces_from_products(table["dot"], table["u"], table["w"], table["lr"], 0.1)
    for i in range(2):
        one = forces.forces_from_products(*table.loc[i, ["dot", "u", "w", "lr"]], 0.1)
        assert [column[i] for column in split] == pytest.approx(list(one))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (forces.forces_from_products, "dot_wu u_sq w_sq lr weight_decay"),
        (forces.before_step, "dot_wu_after u_sq w_sq_after lr weight_decay"),
        (forces.after_step, "dot_wu u_sq w_sq lr weight_decay"),
        (forces.relative_update, "u_sq w_sq lr"),
        (forces.angle, "dot_wu u_sq w_sq lr weight_decay"),
        (forces.timescale, "lr weight_decay"),
        (forces.noise_rho, "updates beta1"),
    ],
)
@pytest.mark.parametrize("wrong", [None, "fast", 1j, {}])
def test_what_is_no_number_is_named(function, names, wrong):
    for name in names.split():
        arguments = {**dict.fromkeys(names.split(), 0.5), name: wrong}
        with pytest.raises((TypeError, ValueError), match=f"{name} must be a number"):
            function(**arguments)


def test_timescale_counts_updates_and_is_infinite_without_decay():
    assert forces.timescale(1e-3, 0.1) == pytest.approx(10_000)
    assert forces.timescale(1e-3, 0.0) == math.inf
    np.testing.assert_allclose(forces.timescale(np.array([1e-3, 1e-4]), 0.1), [1e4, 1e5])


def table(**changes):
    columns = {
        "step": [1, 1, 2, 2],
        "span": 1,
        "tensor": ["a", "b"] * 2,
        "layer": pd.array([0, None] * 2, dtype="Int64"),
        "role": pd.Categorical(["value", "other"] * 2),
        "numel": [2, 3] * 2,
        "lr": [0.1, 0.1, 0.2, 0.2],
        "weight_decay": [0.0, 0.1, 0.0, 0.1],
        "norm_sq": [1.0, 2.0, 3.0, 4.0],
        "norm_sq_after": [3.0, 4.0, 5.0, np.nan],
        "alignment": [1.0, 2.0, 3.0, -4.0],
        "injection": [0.5, 0.5, 0.5, 0.5],
        "decay": [0.0, -1.0, 0.0, -1.0],
    }
    return pd.DataFrame({**columns, **changes})


def test_shares_are_of_the_absolute_forces():
    shares = tables.budget(table())
    np.testing.assert_allclose(shares["alignment_share"], [1 / 1.5, 2 / 3.5, 3 / 3.5, 4 / 5.5])
    total = shares[["alignment_share", "injection_share", "decay_share"]].sum(axis=1)
    np.testing.assert_allclose(total, 1)
    np.testing.assert_allclose(shares["net"], [1.5, 1.5, 3.5, -4.5])


def test_a_tensor_without_forces_has_no_shares():
    still = table(alignment=0.0, injection=0.0, decay=0.0)
    assert tables.budget(still)["alignment_share"].isna().all()


def test_aggregating_sums_squares_and_forces_and_keeps_shared_rates():
    model = tables.aggregate(table(), "model")
    assert model["step"].tolist() == [1, 2]
    assert model["numel"].tolist() == [5, 5]
    np.testing.assert_allclose(model["alignment"], [3, -1])
    np.testing.assert_allclose(model["norm_sq_after"], [7, np.nan])  # a sum with a gap is a gap
    np.testing.assert_allclose(model["lr"], [0.1, 0.2])
    assert model["weight_decay"].isna().all()  # the tensors differ
    layers = tables.aggregate(table(), "layer")
    assert len(layers) == 4  # tensors outside the blocks form a group of their own
    assert layers["layer"].isna().sum() == 2
    assert list(tables.aggregate(table(), ["role", "layer"]).columns[:4]) == ["step", "span", "layer", "role"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tables.budget([1, 2]), TypeError, "force table.*got list"),
        (lambda: tables.budget(table().drop(columns="decay")), ValueError, r"lacks the columns \['decay'\]"),
        (lambda: tables.aggregate(table(), "head"), ValueError, "by='head'.*'model', None, or any of"),
        (
            lambda: forces.forces_from_products(1, 1, 1, 1, 1, order="first"),
            ValueError,
            "order must be 'exact'",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
