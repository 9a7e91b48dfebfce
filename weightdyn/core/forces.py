"""The algebra of one AdamW update.

AdamW takes w to w' = (1 − ηλ)w − ηu with u = m̂/(√v̂ + ε), so the change of ‖w‖² splits exactly:

    ‖w'‖² − ‖w‖²  =  −2η(1 − ηλ)⟨w,u⟩  +  η²‖u‖²  −  (2ηλ − η²λ²)‖w‖²
                        alignment        injection         decay

Three inner products say it all, ⟨w,u⟩, ‖u‖² and ‖w‖²; those of the state after the step give those before it
in closed form. One more, ⟨w,g̃⟩ with the fresh gradient in units of u, tells what alignment is made of:

    alignment  =  drift  +  memory,      drift = −2η(1 − ηλ)⟨w,g̃⟩,      g̃ = g/(√v̂ + ε)

The noise of the fresh gradient knows nothing of w, so drift is, in the mean, the pull of the mean gradient. Memory
is what is left: u still carries the noise of the gradients that made w. Memory and injection together are
diffusion, the random walk that gradient noise makes of the weights.

Here are functions of numbers and arrays (floats, NumPy, pandas, broadcast as usual): no tables, no torch, no files.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from weightdyn.core.checks import check_choice, check_number, check_numbers, refuse

Order = Literal["exact", "leading"]
At = Literal["before", "after"]


class Forces(NamedTuple):
    """Signed contributions to ‖w‖² of one update; a positive force grows the norm."""

    alignment: Any
    injection: Any
    decay: Any


class Products(NamedTuple):
    """The three inner products of one tensor at one update: ⟨w,u⟩, ‖u‖², ‖w‖²."""

    dot_wu: Any
    u_sq: Any
    w_sq: Any


def forces_from_products(
    dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any, *, order: Order = "exact"
) -> Forces:
    """Split the change of ‖w‖² in one AdamW update into its three forces.

    exact:    alignment = −2η(1−ηλ)⟨w,u⟩,  injection = η²‖u‖²,  decay = −(2ηλ−η²λ²)‖w‖²
    leading:  alignment = −2η⟨w,u⟩,        injection = η²‖u‖²,  decay = −2ηλ‖w‖²

    Args:
        dot_wu: ⟨w,u⟩ with w before the step and u = m̂/(√v̂+ε) of the step.
        u_sq: ‖u‖².
        w_sq: ‖w‖² before the step.
        lr: learning rate η of the step.
        weight_decay: decoupled weight decay λ (0 for none).
        order: "exact" sums to ‖w'‖² − ‖w‖²; "leading" drops the O(η²λ) terms, as arXiv 2606.19367 does.

    All arguments are numbers or arrays that broadcast against each other.

    Source: arXiv 2606.19367 for the leading order; the exact form is ‖(1−ηλ)w − ηu‖² − ‖w‖² multiplied out.

    >>> forces_from_products(dot_wu=-2.0, u_sq=8.0, w_sq=64.0, lr=0.25, weight_decay=0.5)
    Forces(alignment=0.875, injection=0.5, decay=-15.0)
    """
    _check(dot_wu=dot_wu, u_sq=u_sq, w_sq=w_sq, lr=lr, weight_decay=weight_decay)
    if check_choice("order", order, ("exact", "leading")) == "exact":
        shrink = 1 - lr * weight_decay
        loss = (2 - lr * weight_decay) * lr * weight_decay
    else:
        shrink = 1
        loss = 2 * lr * weight_decay
    return Forces(-2 * lr * shrink * dot_wu, lr**2 * u_sq, -loss * w_sq)


def before_step(dot_wu_after: Any, u_sq: Any, w_sq_after: Any, lr: Any, weight_decay: Any) -> Products:
    """Products of the state before an AdamW step from those after it, in closed form.

    w = (w' + ηu)/(1−ηλ), hence

        ⟨w,u⟩ = (⟨w',u⟩ + η‖u‖²)/(1−ηλ)
        ‖w‖²  = (‖w'‖² + 2η⟨w',u⟩ + η²‖u‖²)/(1−ηλ)²

    so a measurement after the step needs no copy of the weights from before it.

    Args:
        dot_wu_after: ⟨w',u⟩ with w' after the step.
        u_sq: ‖u‖².
        w_sq_after: ‖w'‖².
        lr: learning rate η of the step.
        weight_decay: decoupled weight decay λ; ηλ = 1 erases w and has no inverse (gives inf or NaN).

    >>> before_step(dot_wu_after=-1.1, u_sq=1.0, w_sq_after=1.21, lr=0.1, weight_decay=0.0)
    Products(dot_wu=-1.0, u_sq=1.0, w_sq=1.0)
    """
    _check(dot_wu_after=dot_wu_after, u_sq=u_sq, w_sq_after=w_sq_after, lr=lr, weight_decay=weight_decay)
    shrink = 1 - lr * weight_decay
    dot_wu = (dot_wu_after + lr * u_sq) / shrink
    w_sq = (w_sq_after + 2 * lr * dot_wu_after + lr**2 * u_sq) / shrink**2
    return Products(dot_wu, u_sq, w_sq)


def after_step(dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any) -> Products:
    """Products of the state after an AdamW step from those before it: the inverse of `before_step`.

        ⟨w',u⟩ = (1−ηλ)⟨w,u⟩ − η‖u‖²
        ‖w'‖²  = (1−ηλ)²‖w‖² − 2η(1−ηλ)⟨w,u⟩ + η²‖u‖²

    >>> after_step(dot_wu=-1.0, u_sq=1.0, w_sq=1.0, lr=0.5, weight_decay=0.0)
    Products(dot_wu=-1.5, u_sq=1.0, w_sq=2.25)
    """
    _check(dot_wu=dot_wu, u_sq=u_sq, w_sq=w_sq, lr=lr, weight_decay=weight_decay)
    shrink = 1 - lr * weight_decay
    dot_wu_after = shrink * dot_wu - lr * u_sq
    w_sq_after = shrink**2 * w_sq - 2 * lr * shrink * dot_wu + lr**2 * u_sq
    return Products(dot_wu_after, u_sq, w_sq_after)


def drift_from_products(dot_wg: Any, lr: Any, weight_decay: Any, *, order: Order = "exact") -> Any:
    """The pull of the mean gradient on ‖w‖², measured by the fresh gradient: drift = −2η(1−ηλ)⟨w,g̃⟩.

    Args:
        dot_wg: ⟨w,g̃⟩ with w before the step and g̃ the fresh gradient in units of u, as if all of u were made of
            it: g/(√v̂+ε) for Adam. Its noise is independent of w, so the mean over updates is that of the mean
            gradient; a single update's is noisy.
        lr: learning rate η of the step.
        weight_decay: decoupled weight decay λ.
        order: as in `forces_from_products`.

    All arguments are numbers or arrays that broadcast against each other. alignment less drift is memory.

    Source: E⟨w,u⟩ split by E[g] and g − E[g]; the total update contribution of Kosson et al. (arXiv 2305.17212)
    has the same two parts.

    >>> drift_from_products(dot_wg=-2.0, lr=0.25, weight_decay=0.0)
    1.0
    """
    _check(dot_wg=dot_wg, lr=lr, weight_decay=weight_decay)
    exact = check_choice("order", order, ("exact", "leading")) == "exact"
    return -2 * lr * ((1 - lr * weight_decay) if exact else 1) * dot_wg


def fresh_before_step(dot_wg_after: Any, dot_ug: Any, lr: Any, weight_decay: Any) -> Any:
    """⟨w,g̃⟩ of the weights before a step from ⟨w',g̃⟩ after it: (⟨w',g̃⟩ + η⟨u,g̃⟩)/(1−ηλ).

    >>> fresh_before_step(dot_wg_after=-1.5, dot_ug=1.0, lr=0.5, weight_decay=0.0)
    -1.0
    """
    _check(dot_wg_after=dot_wg_after, dot_ug=dot_ug, lr=lr, weight_decay=weight_decay)
    return (dot_wg_after + lr * dot_ug) / (1 - lr * weight_decay)


def signal_energy(dot_ug: Any, g_sq: Any, fresh: Any) -> Any:
    """‖ḡ̃‖², the part of ‖u‖² that the mean gradient makes, from two gradients with independent noise.

        u = f·g̃ + (1−f)·m̃,     ‖ḡ̃‖² = E⟨m̃,g̃⟩ = (⟨u,g̃⟩ − f‖g̃‖²)/(1−f)

    m̃ is the mean of the gradients before this one, as momentum weighs them. Noisy in a single update, and below 0
    in the mean where curvature makes gradients answer to the noise of those before; NaN without momentum (f = 1).

    Args:
        dot_ug: ⟨u,g̃⟩.
        g_sq: ‖g̃‖².
        fresh: f, the share of the fresh gradient in u: (1−β₁)/(1−β₁ᵗ) for Adam.

    >>> float(signal_energy(dot_ug=1.0, g_sq=3.0, fresh=0.25))  # u = 0.25·g̃ + 0.75·m̃
    0.3333333333333333
    """
    _check(dot_ug=dot_ug, g_sq=g_sq, fresh=fresh)
    rest = np.asarray(1.0 - fresh, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (dot_ug - fresh * g_sq) / np.where(rest == 0, np.nan, rest)


class Momentum(NamedTuple):
    """How an update is made of its momentum: m_t = β·m_{t−1} + taken·g_t, u_t = of_m·m_t + of_g·g_t.

    Adam at its update t has (β₁, 1−β₁, 1/(1−β₁ᵗ), 0), with gradients in units of u; SGD (μ, 1, 1, 0), with
    Nesterov (μ, 1, μ, 1).
    """

    beta: Any
    taken: Any
    of_m: Any
    of_g: Any

    @classmethod
    def adam(cls, beta1: Any, step: Any) -> Momentum:
        """Adam's at its update `step`, 1-based."""
        return cls(beta1, 1 - beta1, 1 / (1 - beta1**step), 0.0)


class Remembered(NamedTuple):
    """What an update's momentum remembers.

    Attributes:
        lr_memory: Σ_{s≥1} ρₛ·η_{t−s}, ρₛ the correlation of u_t with u_{t−s} under white noise, β₁ˢ for Adam once
            t is a few times 1/(1−β₁); NaN until the learning rates before the first one seen weigh less than 1 %.
            White noise makes memory = 2η(1−ηλ)·lr_memory·‖u‖².
        fresh: f, the share of the fresh gradient in E[u]; NaN as long if the updates before were not counted.
        gain: E[u]/E[g], likewise: 1 for Adam with gradients in units of u, (1−μᵗ)/(1−μ) for SGD.
    """

    lr_memory: Any
    fresh: Any
    gain: Any


class NoiseMemory:
    """Follows an optimizer update by update, and tells what its momentum would remember of white noise.

        E⟨w_{t−1},u_t⟩ = −Σ_{j<t} η_j·Π_{j<k<t}(1−η_kλ)·E⟨u_j,u_t⟩
        E⟨u_j,u_t⟩ / E‖u_t‖² = of_m_t·Π_{j<k≤t}β_k·(of_m_j·V_j + of_g_j·taken_j) / S_t
        S_t = of_m_t²·V_t + 2·of_m_t·of_g_t·taken_t + of_g_t²

    V_t = E[m_t²] for gradients that are independent of one another and have mean square 1. All sums are
    recursions.

    Args:
        made: updates made before the first one that is told; inf if they are many and not counted.

    Source: the covariance of an exponential mean of white noise, with learning rates and corrections as they are.
    """

    def __init__(self, made: float = 0):
        self._made = made
        # V, E[m]/E[g], and Σ_j η_j·Π(1−ηλ)·Πβ·cov(m_j,u_j) over the updates before
        self._state: tuple[Any, Any, Any] | None = None
        # The weight of the learning rates before the first one seen
        self._unseen: Any = 0.0 if made == 0 else 1.0

    def resume(self, momentum: Momentum, lr: Any, weight_decay: Any, lr_memory: Any) -> None:
        """Go on behind the last of the updates made, from what it remembered."""
        _, taken, of_m, of_g = momentum
        variance, mean = self._settled(momentum)
        past = lr_memory * (of_m**2 * variance + 2 * of_m * of_g * taken + of_g**2) / of_m
        past = (1 - lr * weight_decay) * past + lr * (of_m * variance + of_g * taken)
        self._state, self._unseen = (variance, mean, past), 0.0

    def _settled(self, momentum: Momentum) -> tuple[Any, Any]:
        """V and E[m]/E[g] after the updates made, had they all had these constants."""
        beta, taken = momentum.beta, momentum.taken
        if self._made == 0 or beta == 1:
            return self._made * taken**2, self._made * taken
        left = beta**self._made if self._made < np.inf else 0.0
        return taken**2 * (1 - left**2) / (1 - beta**2), taken * (1 - left) / (1 - beta)

    def update(self, momentum: Momentum, lr: Any, weight_decay: Any, made: Any = 1) -> Remembered:
        """Take in an update, in order; `made` is 0 for one that was skipped.

        Numbers may be 0-dim torch tensors, and then the result's are.
        """
        beta, taken, of_m, of_g = momentum
        if self._state is None:
            past = 0.0
            if self._made and beta != 1:
                # As if η had been what it is: what that gets wrong is unknown until it is forgotten.
                past = lr * (of_m * taken**2 / (1 - beta**2) + of_g * taken) / (1 - beta)
            self._state = *self._settled(momentum), past
        variance, mean, past = self._state
        variance, mean, past = beta**2 * variance + taken**2, beta * mean + taken, beta * past
        square = of_m**2 * variance + 2 * of_m * of_g * taken + of_g**2
        gain = of_m * mean + of_g
        lr_memory = of_m * past / square
        past = (1 - lr * weight_decay) * past + lr * (of_m * variance + of_g * taken)
        new = variance, mean, past
        if not isinstance(made, int):
            new = tuple(old + made * (value - old) for value, old in zip(new, self._state, strict=True))
        self._state, self._unseen = new, beta * self._unseen
        fresh = (of_m * taken + of_g) / gain
        if self._unseen > _FORGOTTEN:
            lr_memory = lr_memory * np.nan
            if self._made == np.inf:  # not counted: nor is known what momentum there was
                fresh, gain = fresh * np.nan, gain * np.nan
        return Remembered(lr_memory, fresh, gain)


_FORGOTTEN = 0.01  # what weighs less needs not be known


def memory_null(lr: Any, beta1: Any, weight_decay: Any = 0.0) -> np.ndarray:
    """Memory over injection that white gradient noise alone gives Adam, update by update from the first on.

        memory/injection = (2/η_t)(1−η_tλ)·Σ_{s≥1} ρₛ·η_{t−s},      ρₛ = β₁ˢ·(1+β₁^{t−s})/(1+β₁ᵗ)·Π(1−ηλ) → β₁ˢ

    For a steady η that is 2b, b = β₁/(1−β₁): 18 at β₁ = 0.9. The measured memory over it is κ: 1 where noise is
    white, whatever the norm, the loss and the decay. With injection it is the diffusion, η²n(1+2b)ρ = η²n per
    update.

    Args:
        lr: learning rates η of the updates 1, 2, …: an array of T.
        beta1: β₁ of the first moment, in [0, 1).
        weight_decay: decoupled weight decay λ.

    Returns:
        float64 (T,); inf where η is 0 after updates in which it was not, 0 where all were.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: the covariance of exponential means of white noise; see `NoiseMemory`.

    >>> memory_null(np.full(500, 1e-3), beta1=0.9)[[0, 1, -1]].round(3).tolist()
    [0.0, 1.89, 18.0]
    """
    rates = np.asarray(
        check_numbers("lr", np.asarray(lr) if isinstance(lr, list | tuple) else lr), dtype=float
    )
    if rates.ndim != 1:
        raise refuse("lr", "a sequence of learning rates, one for each update", lr)
    beta1 = check_number("beta1", beta1, 0, 1, open_high=True)
    decay = check_number("weight_decay", weight_decay, 0)
    clock = NoiseMemory()
    sums = [
        clock.update(Momentum.adam(beta1, t), eta, decay).lr_memory
        for t, eta in enumerate(rates.tolist(), start=1)
    ]
    past = 2 * (1 - rates * decay) * np.array(sums, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(past == 0, 0.0, past / rates)


def relative_update(u_sq: Any, w_sq: Any, lr: Any) -> Any:
    """Relative update η‖u‖/‖w‖ (dimensionless), decay left out.

    >>> float(relative_update(u_sq=4.0, w_sq=100.0, lr=0.1))
    0.02
    """
    _check(u_sq=u_sq, w_sq=w_sq, lr=lr)
    return lr * np.sqrt(u_sq) / np.sqrt(w_sq)


def angle(dot_wu: Any, u_sq: Any, w_sq: Any, lr: Any, weight_decay: Any) -> Any:
    """Angle between w and w' in radians: how far one update turns the tensor.

    With a = ⟨w,u⟩/‖w‖² the update has the part ηa along w and the rest across it, so

        angle = atan2( η√(‖u‖²/‖w‖² − a²),  1 − ηλ − ηa )

    Products are those before the step. Unlike the arccos of a cosine it is precise for angles near zero, as long as
    u lies across w: of a u along w rounding leaves √ε·η‖u‖/‖w‖.
    """
    _check(dot_wu=dot_wu, u_sq=u_sq, w_sq=w_sq, lr=lr, weight_decay=weight_decay)
    along = dot_wu / w_sq
    across = np.sqrt(np.maximum(u_sq / w_sq - along**2, 0))
    return np.arctan2(lr * across, 1 - lr * weight_decay - lr * along)


def timescale(lr: Any, weight_decay: Any) -> Any:
    """Relaxation time τ = 1/(ηλ), in updates; inf without decay.

    ‖w‖² forgets its past over τ/2 updates; a run of T updates has T/τ of them.

    >>> timescale(lr=1e-3, weight_decay=0.1)
    10000.0
    """
    _check(lr=lr, weight_decay=weight_decay)
    rate = np.asarray(lr * weight_decay, dtype=float)
    out = np.divide(1.0, rate, out=np.full(rate.shape, np.inf), where=rate != 0)
    return float(out) if out.ndim == 0 else out


def noise_rho(updates: Any, beta1: float) -> Any:
    """Mean square ρ = ‖u‖²/n of Adam's update where gradients are noise of a steady size.

        ρ_t = ρ·(1+β₁ᵗ)/(1−β₁ᵗ),      ρ = (1−β₁)/(1+β₁) for t → ∞

    m̂ is then a weighted mean of t independent gradients and √v̂ their size. ρ₁ = 1 (the first update is the
    gradient's sign), and after a few 1/(1−β₁) updates ρ is 0.0526 for β₁ = 0.9.

    Args:
        updates: update numbers t, 1-based; inf for the value that they settle at.
        beta1: β₁ of the first moment, in [0, 1).

    Source: the variance of an exponential mean of white noise, (1−β₁)²·Σβ₁²ˢ over (1−β₁ᵗ)².

    >>> noise_rho([1, 2, 1000, np.inf], beta1=0.9).round(4).tolist()
    [1.0, 0.5014, 0.0526, 0.0526]
    """
    updates = check_numbers("updates", np.asarray(updates))
    left = check_number("beta1", beta1, 0, 1, open_high=True) ** updates.astype(float)
    return (1 - beta1) / (1 + beta1) * (1 + left) / (1 - left)


def _check(**arguments: Any) -> None:
    for name, value in arguments.items():
        check_numbers(name, value)
