"""The algebra of one AdamW update.

AdamW takes w to w' = (1 − ηλ)w − ηu with u = m̂/(√v̂ + ε), so the change of ‖w‖² splits exactly:

    ‖w'‖² − ‖w‖²  =  −2η(1 − ηλ)⟨w,u⟩  +  η²‖u‖²  −  (2ηλ − η²λ²)‖w‖²
                        alignment        injection         decay

Three inner products say it all, ⟨w,u⟩, ‖u‖² and ‖w‖²; those of the state after the step give those before it
in closed form. Here are functions of numbers and arrays (floats, NumPy, pandas, broadcast as usual): no tables,
no torch, no files.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from weightdyn.core.checks import check_choice, check_number, check_numbers

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
