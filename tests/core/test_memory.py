"""Drift, memory and what white noise makes of them, against plain loops and closed forms."""

import numpy as np
import pytest

from weightdyn.core.forces import (
    Momentum,
    NoiseMemory,
    before_step,
    drift_from_products,
    forces_from_products,
    fresh_before_step,
    memory_null,
    signal_energy,
)

RNG = np.random.default_rng(0)


def kernels(momenta):
    """Row t: the weights of the gradients 1 … T in update t, written out."""
    steps = len(momenta)
    m = np.zeros(steps)
    rows = []
    for t, (beta, taken, of_m, of_g) in enumerate(momenta):
        fresh = np.eye(steps)[t]
        m = beta * m + taken * fresh
        rows.append(of_m * m + of_g * fresh)
    return np.array(rows)


def remembered(momenta, lr, decay, start=0, clock=None):
    clock = clock or NoiseMemory()
    return [clock.update(*each) for each in list(zip(momenta, lr, decay, strict=True))[start:]]


def by_hand(momenta, lr, decay):
    """Σ_j η_j·Π(1−ηλ)·⟨k_j,k_t⟩/‖k_t‖² over all pairs of updates, the fresh share and the gain."""
    k = kernels(momenta)
    shrink = 1 - np.asarray(lr) * decay
    out = []
    for t in range(len(k)):
        past = sum(lr[j] * np.prod(shrink[j + 1 : t]) * (k[j] @ k[t]) for j in range(t))
        out.append((past / (k[t] @ k[t]), k[t, t] / k[t].sum(), k[t].sum()))
    return np.array(out)


STEPS = 40
KINDS = {
    "adam": [Momentum.adam(0.9, t) for t in range(1, STEPS + 1)],
    "adam, cycled": [Momentum.adam(0.95 - 0.1 * np.sin(t / 9), t) for t in range(1, STEPS + 1)],
    "no momentum": [Momentum.adam(0.0, t) for t in range(1, STEPS + 1)],
    "sgd": [Momentum(0.8, 1.0, 1.0, 0.0)] * STEPS,
    "dampened": [Momentum(0.8, 1.0 if t == 0 else 0.4, 1.0, 0.0) for t in range(STEPS)],
    "nesterov": [Momentum(0.8, 1.0, 0.8, 1.0)] * STEPS,
    "nadam": [
        Momentum(0.9, 0.1, 0.9 / (1 - 0.8 ** (t + 2)), 0.1 / (1 - 0.8 ** (t + 1))) for t in range(STEPS)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_momentum_remembers_of_white_noise_is_the_sum_over_all_pairs_of_updates(kind):
    momenta, lr, decay = KINDS[kind], RNG.random(STEPS), 0.5 * RNG.random(STEPS)
    got = np.array(remembered(momenta, lr, decay))
    np.testing.assert_allclose(got, by_hand(momenta, lr, decay), rtol=1e-12, atol=1e-15)


def test_nothing_is_said_of_learning_rates_that_were_not_seen_until_they_are_forgotten():
    lr, decay, steps = RNG.random(100) + 0.5, np.full(100, 0.1), 100
    momenta = [Momentum.adam(0.9, t) for t in range(1, steps + 1)]
    want = by_hand(momenta, lr, decay)
    got = np.array(remembered(momenta, lr, decay, start=20, clock=NoiseMemory(20)))
    assert np.isnan(got[:43, 0]).all()  # 0.9⁴³ > 1 % > 0.9⁴⁴
    np.testing.assert_allclose(got[43:, 0], want[63:, 0], rtol=0.01)
    np.testing.assert_allclose(got[:, 1:], want[20:, 1:], rtol=1e-12)  # these do not depend on η


@pytest.mark.parametrize("kind", ["adam", "sgd", "nesterov"])
def test_a_log_tells_where_to_go_on(kind):
    momenta, lr, decay = KINDS[kind], RNG.random(STEPS), np.full(STEPS, 0.3)
    want = np.array(remembered(momenta, lr, decay))
    clock = NoiseMemory(15)
    clock.resume(momenta[14], lr[14], decay[14], want[14, 0])
    np.testing.assert_allclose(remembered(momenta, lr, decay, 15, clock), want[15:], rtol=1e-12)


def test_an_update_that_was_skipped_leaves_no_trace():
    lr, momentum = RNG.random(10), Momentum(0.8, 1.0, 1.0, 0.0)
    clock, other = NoiseMemory(), NoiseMemory()
    for t, eta in enumerate(lr):
        clock.update(momentum, 99.0, 0.5, made=np.float64(0))
        assert clock.update(momentum, eta, 0.1, made=np.float64(1)) == other.update(momentum, eta, 0.1), t


@pytest.mark.parametrize("made", [0, 7, np.inf])
def test_a_momentum_that_forgets_nothing_is_followed(made):
    clock, lr = NoiseMemory(made), RNG.random(20)
    got = [clock.update(Momentum(1.0, 1.0, 1.0, 0.0), eta, 0.0) for eta in lr.tolist()]
    if made == 0:  # u_t is the sum of all gradients: ρ of u_j and u_t is j/t
        sums = [sum((j + 1) * lr[j] for j in range(t)) / (t + 1) for t in range(20)]
        np.testing.assert_allclose([each.lr_memory for each in got], sums, rtol=1e-12)
    else:
        assert np.isnan([each.lr_memory for each in got]).all()


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_the_memory_of_a_steady_learning_rate_is_twice_b(beta1):
    null = memory_null(np.full(3000, 1e-3), beta1)
    assert null[-1] == pytest.approx(2 * beta1 / (1 - beta1), rel=1e-9)
    assert null[0] == 0
    t = 5
    finite = 2 * sum(beta1**s * (1 + beta1 ** (t - s)) / (1 + beta1**t) for s in range(1, t))
    assert null[t - 1] == pytest.approx(finite, rel=1e-12)


def test_the_memory_of_a_schedule_looks_back():
    warm, beta1 = np.arange(1.0, 2001.0), 0.9
    # Σβˢ(t−s)/t = b·(1 − (1/(1−β))/t)
    assert memory_null(warm, beta1)[-1] == pytest.approx(18 * (1 - 10 / 2000), rel=1e-9)
    ends = memory_null([1.0, 1.0, 0.0, 0.0, 1.0], beta1)
    assert np.isinf(ends[2:4]).all()
    assert ends[4] > 0
    assert memory_null([0.0, 0.0], beta1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1e-3, "beta1": 0.9}, "lr must be a sequence of learning rates, one for each update"),
        ({"lr": [1e-3], "beta1": 1.0}, "beta1 must be"),
        ({"lr": [1e-3], "beta1": 0.9, "weight_decay": -1}, "weight_decay must be"),
        ({"lr": ["a"], "beta1": 0.9}, "lr must be"),
    ],
)
def test_what_is_no_schedule_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        memory_null(**arguments)


def test_products_with_the_fresh_gradient_before_a_step_from_those_after_it():
    w, u, g = RNG.normal(size=(3, 50))
    lr, decay = 0.1, 0.3
    after = (1 - lr * decay) * w - lr * u
    assert fresh_before_step(after @ g, u @ g, lr, decay) == pytest.approx(w @ g, rel=1e-12)
    # An update that is the fresh gradient alone has a drift that is its alignment.
    before = before_step(*(((1 - lr * decay) * w - lr * g) @ x for x in (g,)), g @ g, 1.0, lr, decay)
    assert drift_from_products(w @ g, lr, decay) == pytest.approx(
        forces_from_products(before.dot_wu, g @ g, w @ w, lr, decay).alignment
    )
    assert drift_from_products(2.0, lr, decay, order="leading") == pytest.approx(-2 * lr * 2.0)


def test_the_signal_is_the_energy_of_the_mean_gradient():
    n, beta1, steps = 400, 0.9, 3000
    mean = RNG.normal(size=n) * 0.2
    m = np.zeros(n)
    found = []
    for t in range(1, steps + 1):
        g = mean + RNG.normal(size=n)
        m = beta1 * m + (1 - beta1) * g
        u = m / (1 - beta1**t)
        found.append(signal_energy(u @ g, g @ g, (1 - beta1) / (1 - beta1**t)))
    assert np.isnan(found[0])  # the first update has no gradient before it
    error = np.std(found[1:]) / np.sqrt(steps)
    assert abs(np.mean(found[1:]) - mean @ mean) < 4 * error
    assert error < 0.05 * (mean @ mean)
