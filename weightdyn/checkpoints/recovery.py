"""Forces of models that nobody logged, from their checkpoints and the recipe that trained them.

A checkpoint holds w and neither m nor v, so ⟨w,u⟩ is out of reach; but the forces add up to the change of ‖w‖²:

    alignment = change of ‖w‖² − injection − decay            method "balance"

‖w‖² is known at every checkpoint, η and λ from the recipe give decay, and injection is η²·ρ·n: Adam divides by
the gradient's own size, so ρ = ‖u‖²/n is near (1−β₁)/(1+β₁) whatever the model and the data. How far the weights
moved from one checkpoint to the next says more of it (`injection_scale`).

What momentum remembers of noise follows from injection, β₁ and the schedule as for white noise, so that alignment
splits further, by inference and not by measurement:

    diffusion = injection·(1 + `memory_null`)        drift = change of ‖w‖² − decay − diffusion

The other two methods are the published ones, which take a path through the checkpoints for the path of the
weights: straight ("two_point") or a cubic spline ("spline"). Both are linear in the checkpoints, so each inner
product is a quadratic form in their Gram matrix ⟨W_i,W_j⟩: exact over all weights, and no path is ever built.

Here are functions of numbers for one tensor, and `recover_forces`, which applies them to a measured series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.checkpoints.audit import warn_of_contradictions
from weightdyn.checkpoints.recipe import MAX_UPDATES, Recipe
from weightdyn.core.checks import check_choice, check_whole, shown
from weightdyn.core.forces import forces_from_products, memory_null, noise_rho
from weightdyn.core.naming import Views, split_label
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import (
    ACCURACY_TABLE,
    FORCE_TABLE,
    FORCES,
    IDENTITY,
    RECOVERY_TABLE,
    WHITE_NOISE,
    check_columns,
    check_force_table,
    diffusion,
)

if TYPE_CHECKING:
    from weightdyn.checkpoints.series import Checkpoints
    from weightdyn.record.runlog import RunLog


RHO_SPREAD = {"displacement": 0.95, "noise": 1.65}
"""How far ln ρ lies from the estimate that knows the displacements and from the one that does not, at most, for
95 % of the gaps of the weight matrices of eight logged runs: times φ^⅓ (`Walk.stale`; where √v̂ is up to date all
updates are of a size), and the first times m of `injection_scale` too (over one update it is exact)."""

DIFFUSION_SPREAD = {"displacement": 0.75, "noise": 1.1}
"""The same of ln diffusion, for 90 to 95 % of the gaps, times φ^⅙: beside ρ it holds how far noise is from white,
and where updates are larger than noise makes them they share less of it."""

_CANCEL, _FADE, _TURN = 0.24, 660.0, 0.28  # of `injection_scale`

_FLOAT32 = 2.0**-24
"""Of ‖w‖², how far the decay of an update may be off: optimizers multiply by 1−ηλ, and that is a float32."""

_KURTOSIS = 3.0
"""Of the weights: a float's rounding error grows with the weight, so large weights carry more of it."""


class Course(NamedTuple):
    """Forces of consecutive updates of one tensor, and ‖w‖² before each: float64 arrays of one length."""

    norm_sq: np.ndarray
    alignment: np.ndarray
    injection: np.ndarray
    decay: np.ndarray


# --- how large an update is --------------------------------------------------------------------------------


class Walk(NamedTuple):
    """What the updates of each gap come to, with what decay leaves of each until the gap ends: η̃ = η·Π(1−ηλ).

    Attributes:
        lr_sum, lr_sq_sum: Ση̃ and Ση̃².
        rho: mean ρ of noise (`noise_rho`), weighted by η̃².
        noise: E‖d‖²/n of the displacement d = −Ση̃u that noise alone makes.
        stale: φ = V/(V+t), V = 1/(1−β₂), t the middle of the gap: how old the gradients are that √v̂ remembers,
            beside the age of the training.
    """

    lr_sum: Any
    lr_sq_sum: Any
    rho: Any
    noise: Any
    stale: Any


def noise_walk(lr: np.ndarray, steps: np.ndarray, betas: tuple[float, float], weight_decay: float) -> Walk:
    """The walk that white gradient noise makes of Adam's updates, gap by gap.

        E‖d‖²/n = Σ_t η̃_t²·ρ_t + 2·Σ_{s<t} η̃_s·η̃_t·C_st,      C_st = ρ·β₁^{t−s}·(1+β₁ˢ)/(1−β₁ᵗ)
        ρ = (1−β₁)/(1+β₁)

    Args:
        lr: η of the updates steps[0]+1 … steps[-1].
        steps: steps of K checkpoints, ascending; the gaps lie between them.
        betas: (β₁, β₂).
        weight_decay: decoupled decay λ.

    Returns:
        A `Walk` of float64 arrays (K−1,).

    Source: the covariance of bias-corrected exponential means of white noise.

    >>> walk = noise_walk(np.full(3, 0.1), np.array([0, 1, 3]), (0.9, 0.95), 0.0)
    >>> walk.noise.round(6).tolist(), walk.rho.round(4).tolist()  # the first update is ±η
    ([0.01, 0.014699], [1.0, 0.4186])
    """
    beta1, beta2 = betas
    starts, gap = steps[:-1] - steps[0], np.repeat(np.arange(len(steps) - 1), np.diff(steps))
    updates = np.arange(steps[0] + 1, steps[-1] + 1)
    kept = np.cumsum(np.log1p(-np.minimum(lr * weight_decay, 0.999)))  # 1 would erase the weights
    rate = lr * np.exp(kept[steps[1:] - steps[0] - 1][gap] - kept)
    rho, left = noise_rho(updates, beta1), beta1 ** updates.astype(float)
    first = np.isin(np.arange(len(lr)), starts)
    # Σ_{s≤t} of what an update leaves to those behind it; to itself it is ρ_t.
    past = _carried(np.where(first, 0.0, beta1), rate * (1 + left)) - rate * (1 + left)
    common = rate * (1 - beta1) / (1 + beta1) / (1 - left) * past
    lr_sum, lr_sq_sum, own, shared = (
        np.add.reduceat(each, starts) for each in (rate, rate**2, rate**2 * rho, common)
    )
    memory, middle = 1 / (1 - beta2), (steps[1:] + steps[:-1]) / 2
    mean = np.divide(own, lr_sq_sum, out=np.ones_like(own), where=lr_sq_sum > 0)
    return Walk(lr_sum, lr_sq_sum, mean, own + 2 * shared, memory / (memory + middle))


def _carried(keep: np.ndarray, added: np.ndarray) -> np.ndarray:
    """x_t = keep_t·x_{t−1} + added_t from x = 0 on: (T,) or (T, m)."""
    from scipy.linalg import solve_banded  # here: it takes a tenth of a second to import

    bands = np.ones((2, len(keep)))
    bands[1, :-1] = -keep[1:]
    return solve_banded((1, 0), bands, added)


def _beyond(walk: Walk, beta1: float) -> tuple[np.ndarray, np.ndarray]:
    """N, and how far a gap of N updates reaches beyond the memory of momentum: 0 for one update, to 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        count = np.fmax(np.asarray(walk.lr_sum) ** 2 / walk.lr_sq_sum, 1.0)
    return count, (count - 1) / (count - 1 + 1 / (1 - beta1))


def injection_scale(displacement_sq: Any, norm_sq: Any, numel: Any, walk: Walk, beta1: float) -> np.ndarray:
    """Factor on ρ that the displacement between two checkpoints speaks for.

        q = ‖W_b − Π(1−ηλ)·W_a‖²/n,      q₀ = `Walk.noise`,      N = (Ση̃)²/Ση̃²,      m = (N−1)/(N−1+1/(1−β₁))

        lasting:  f₁ = 1 + s·(1/ρ−1),  s = (q−q₀)/((Ση̃)²−q₀)  where q ≥ q₀,    (q/q₀)^(1−m)  where it is not
        passing:  f₂ = (q/q₀·e^(0.24·m))^γ,      γ = 1/√(1+(N−1)/(660·φ)),  φ = `Walk.stale`
        factor = f₁ᵃ·f₂¹⁻ᵃ,      a = 1/(1+(θ/0.28)²),      θ = ‖W_b − Π(1−ηλ)·W_a‖/‖W_a‖

    While the weights have hardly moved (θ small: the first updates of a training, above all) a gradient lasts, and
    the part s of an update that all of the gap have in common tells how large they are. Later gradients answer to
    what the weights did: those that pull back and forth cancel, persistent ones add up, so that the displacement
    says less and less, and theory the rest. It also has less to tell where √v̂ is up to date, for that makes all
    updates of a size (φ small). Over one update q is ρ itself, and the factor puts it there. The three constants
    were fitted to eight logged runs, and measured on others (benchmarks/study_recovery.py --fit).

    Args:
        displacement_sq: ‖W_b − Π(1−ηλ)·W_a‖², what is left of the way when decay is taken out; ≤ 0 gives 1.
        norm_sq: ‖W_a‖².
        numel: weights n.
        walk: `noise_walk` of the gap.
        beta1: β₁ of the first moment.

    >>> walk = noise_walk(np.array([1e-3]), np.array([500, 501]), (0.9, 0.95), 0.0)
    >>> factor = injection_scale(1e-4, norm_sq=0.4, numel=1000, walk=walk, beta1=0.9)
    >>> (factor * walk.rho).round(9).tolist()  # one update, ρ = 0.1
    [0.1]
    """
    count, beyond = _beyond(walk, beta1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.asarray(displacement_sq) / numel
        said = np.log(q / walk.noise)
        common = np.clip((q - walk.noise) / (walk.lr_sum**2 - walk.noise), 0.0, 1.0)
        lasting = np.where(said > 0, np.log1p(common * (1 / walk.rho - 1)), said * (1 - beyond))
        passing = (said + _CANCEL * beyond) / np.sqrt(1 + (count - 1) / (_FADE * walk.stale))
        moved = np.asarray(displacement_sq) / (norm_sq * _TURN**2)
        factor = np.exp(passing + (lasting - passing) / (1 + moved))
    return np.where(np.isfinite(factor) & (q > 0), factor, 1.0)


NOISE_ALONG = 5.9
"""Gradient noise along w, in units of what noise alike in all directions has there: the median over the weight
matrices of eight runs, from 0.2 (an embedding) to 38 (an unembedding)."""


def drift_noise(norm_sq: Any, lr: Any, span: Any, beta1: float) -> Any:
    """Standard deviation of a logged mean drift about the recovered one that no knowledge of diffusion removes.

        c·2η‖w‖·√(2β₁²(1−β₁ᴺ)/(1−β₁²))/N,      c = `NOISE_ALONG`

    A log takes the gradients of its updates; the weights move by them later, as momentum lets them. So the noise of
    the last 1/(1−β₁) gradients of a gap is in its log and not yet in ‖w‖², and that of those before it the other
    way round.

    Args:
        norm_sq: ‖w‖².
        lr: mean η over the updates.
        span: number N of updates.
        beta1: β₁ of the first moment.

    Source: variance of ⟨w, Σ(u_t − g̃_t)⟩ over N updates, u the exponential mean of white noise g̃ that has the
    variance c² along w.

    >>> float(drift_noise(norm_sq=4.0, lr=0.5, span=1, beta1=0.0))
    0.0
    """
    kept = 2 * beta1**2 * (1 - beta1 ** np.asarray(span, float)) / (1 - beta1**2)
    return NOISE_ALONG * 2 * lr * np.sqrt(norm_sq * kept) / span


# --- one tensor --------------------------------------------------------------------------------------------


def balance_forces(
    norm_sq: np.ndarray, steps: np.ndarray, lr: np.ndarray, weight_decay: float, numel: int, rho: Any
) -> Course:
    """Forces of every update between checkpoints from ‖W‖² alone: the balance of the budget.

        injection_t = η²·ρ_t·n       decay_t = −(2ηλ−η²λ²)·‖w_{t−1}‖²       alignment_t = the rest of the change

    ‖w‖² between checkpoints follows from what drives it: decay, which is known, and the pull of alignment and
    injection, of which each gap tells one mean,

        ‖w_t‖² = (1−ηλ)²·‖w_{t−1}‖² + η^{3/2}·P_t,      P_t = P(Ση) + δ

    P(Ση) runs straight from the mean of one gap to that of the next, each where its weight lies in Ση (as late as
    decay makes it), level before the first and behind the last; in a training's first updates it grows, to that of
    the first gap from half of it. δ is a constant of each gap that takes the curve through the checkpoints, hence
    each gap's forces add up to its measured change whatever the curve does between. With η constant P_t is the
    change that ‖w‖² would have without decay; η^½ lies between what diffusion and what drift goes with, and served
    best on the tuning runs. Over gaps short against 1/(ηλ) all that is a smooth curve through the checkpoints.

    Args:
        norm_sq: ‖W‖² at K checkpoints.
        steps: their steps, ascending.
        lr: η of the updates steps[0]+1 … steps[-1].
        weight_decay: decoupled decay λ.
        numel: weights n.
        rho: ρ = ‖u‖²/n, a number or one for each update.

    >>> course = balance_forces(np.array([4.0, 4.2]), np.array([8, 10]), np.array([0.1, 0.1]), 0.0, 10, 0.5)
    >>> course.alignment.round(6).tolist(), course.injection.round(6).tolist()
    ([0.05, 0.05], [0.05, 0.05])
    """
    course, _ = norm_between(norm_sq, steps, lr, weight_decay)
    known = forces_from_products(0.0, np.broadcast_to(rho, lr.shape) * numel, course[:-1], lr, weight_decay)
    return Course(course[:-1], np.diff(course) - known.injection - known.decay, known.injection, known.decay)


def norm_between(
    norm_sq: np.ndarray, steps: np.ndarray, lr: np.ndarray, weight_decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """‖w‖² after 0, 1, 2, … updates from the first checkpoint on, as `balance_forces` has it, and its bend.

    Returns:
        The curve (T+1,) for T updates, and how far it lies above the one whose pull keeps to the mean of its gap.

    >>> path, _ = norm_between(np.array([4.0, 1.0]), np.array([9, 13]), np.full(4, 0.5), 0.25)
    >>> path.round(3).tolist()
    [4.0, 2.929, 2.109, 1.481, 1.0]
    """
    starts, ends = steps[:-1] - steps[0], steps[1:] - steps[0] - 1
    gap = np.repeat(np.arange(len(starts)), np.diff(steps))
    keep, clock, rate = (1 - lr * weight_decay) ** 2, np.cumsum(lr) - lr / 2, lr**1.5
    first = np.isin(np.arange(len(lr)), starts)
    start = np.where(first, keep * norm_sq[gap], 0.0)
    keep = np.where(first, 0.0, keep)  # each gap starts from its own checkpoint
    decayed, unit, late = _carried(keep, np.stack([start, rate, rate * clock], axis=1)).T
    moves = unit[ends] > 0  # nothing does while η is 0
    weight = np.where(moves, unit[ends], 1.0)
    pull, centre = (norm_sq[1:] - decayed[ends]) / weight, late[ends] / weight
    knots, values = centre[moves], pull[moves]
    if steps[0] == 0 and moves.any():
        knots, values = np.append(0.0, knots), np.append(values[0] / 2, values)
    bend = np.zeros(len(lr))
    if moves.any():
        pulled = _carried(keep, rate * np.interp(clock, knots, values))
        bend = np.where(moves[gap], pulled - (pulled[ends] / weight)[gap] * unit, 0.0)
        bend[ends] = 0.0
    course = decayed + pull[gap] * unit + bend
    course[ends] = norm_sq[1:]
    return np.append(norm_sq[0], course), np.append(0.0, bend)


def decay_doubt(norm_sq: np.ndarray, steps: np.ndarray, lr: np.ndarray, weight_decay: float) -> np.ndarray:
    """How far the mean decay of a gap may be off, for ‖w‖² is known at its ends alone: two standard deviations.

        1.5·2λ·|Σ(η·bend)|/N + 2·(2λη)·(c·2η‖w‖)·√(M/12),      c = `NOISE_ALONG`,   M = min(N, 1/(ηλ))

    The first term is one and a half times what the change of the pull makes of the curve (`norm_between`); the
    second is what noise makes of the mean of a walk between two known ends, over no more updates than decay lets
    it remember.

    Args:
        norm_sq, steps, lr, weight_decay: as in `balance_forces`.

    Returns:
        float64, one for each gap; 0 without decay.
    """
    starts, span = steps[:-1] - steps[0], np.diff(steps)
    _, bend = norm_between(norm_sq, steps, lr, weight_decay)
    bent = 3 * weight_decay * np.abs(np.add.reduceat(lr * bend[:-1], starts)) / span
    mean = np.add.reduceat(lr, starts) / span
    count = np.minimum(span, 1 / np.maximum(mean * weight_decay, 1e-300))
    walked = NOISE_ALONG * 2 * mean * np.sqrt(norm_sq[:-1] * count / 12)
    return bent + 2 * (2 * mean * weight_decay) * np.where(span > 1, walked, 0.0)


def spline_forces(gram: np.ndarray, steps: np.ndarray, lr: np.ndarray, weight_decay: float) -> Course:
    """Forces of every update along a cubic spline c(t) through the checkpoints, from their Gram matrix.

        ηû_t = (1−ηλ)·c(t−1) − c(t),    alignment = −2(1−ηλ)⟨c(t−1), ηû⟩,    injection = ‖ηû‖²

    Between two checkpoints c is a cubic whose four coefficients are combinations of all checkpoints, so a 4×4
    matrix of their inner products gives every update there. The spline is scipy's `CubicSpline` (not-a-knot),
    as published. It has no noise in it: its injection is far too small, and its alignment is too large by what
    is missing there.

    Args:
        gram: ⟨W_i,W_j⟩ of K checkpoints (K, K).
        steps: their steps, ascending.
        lr: η of the updates steps[0]+1 … steps[-1].
        weight_decay: decoupled decay λ.

    Source: arXiv 2606.19367, spline displacement.

    >>> line = np.array([1.0, 3.0])                       # one weight that goes from 1 to 3 in two updates
    >>> course = spline_forces(np.outer(line, line), np.array([0, 2]), np.array([0.1, 0.1]), 0.0)
    >>> course.alignment.round(9).tolist(), course.injection.round(9).tolist()
    ([2.0, 4.0], [1.0, 1.0])
    """
    from scipy.interpolate import CubicSpline

    basis = CubicSpline(steps, np.eye(len(steps))).c[::-1]  # (4, gaps, K), ascending powers
    width = np.diff(steps).astype(float)
    basis = basis * width[:, None] ** np.arange(4)[:, None, None]  # of the fraction of the gap: no overflow
    q = np.einsum("agk,kl,bgl->gab", basis, gram, basis, optimize=True)
    gap = np.repeat(np.arange(len(width)), np.diff(steps))
    step = 1 / width[gap]
    start = (np.arange(len(lr)) - (steps[gap] - steps[0])) * step
    stop = start + step
    here = np.stack([np.ones_like(start), start, start**2, start**3])
    # The difference of the powers, factored: subtracting them would lose what is small against the weights.
    on = step * np.stack([np.zeros_like(start), np.ones_like(start), start + stop,
                          start**2 + start * stop + stop**2])  # fmt: skip
    moved = -on - lr * weight_decay * here
    q = q[gap]
    return _course(
        np.einsum("at,tab,bt->t", here, q, moved, optimize=True),
        np.einsum("at,tab,bt->t", moved, q, moved, optimize=True),
        np.einsum("at,tab,bt->t", here, q, here, optimize=True),
        lr,
        weight_decay,
    )


def two_point_forces(gram: np.ndarray, steps: np.ndarray, lr: np.ndarray, weight_decay: float) -> Course:
    """Forces of every update from the mean displacement of its gap, at the weights that the gap starts from.

        û = −(W_b − W_a)/Ση − λ·W_a,    alignment = −2η(1−ηλ)⟨W_a,û⟩,    injection = η²‖û‖²

    Args:
        gram: ⟨W_i,W_j⟩ of K checkpoints (K, K); only neighbours are used.
        steps: their steps, ascending.
        lr: η of the updates steps[0]+1 … steps[-1].
        weight_decay: decoupled decay λ.

    Source: arXiv 2606.19367, its baseline, which takes N·(η_a+η_b)/2 for the sum of η.

    >>> line = np.array([1.0, 3.0])
    >>> two_point_forces(np.outer(line, line), np.array([0, 2]), np.array([0.1, 0.1]), 0.0).alignment.tolist()
    [2.0, 2.0]
    """
    w_sq, next_sq, dot = gram.diagonal()[:-1], gram.diagonal()[1:], gram.diagonal(1)
    total = np.add.reduceat(lr, steps[:-1] - steps[0])
    rate = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    moved_dot, moved_sq = dot - w_sq, next_sq - 2 * dot + w_sq
    dot_wu = -rate * moved_dot - weight_decay * w_sq
    u_sq = rate**2 * moved_sq + 2 * rate * weight_decay * moved_dot + weight_decay**2 * w_sq
    gap = np.repeat(np.arange(len(total)), np.diff(steps))
    return _course(lr * dot_wu[gap], lr**2 * u_sq[gap], w_sq[gap], lr, weight_decay)


def _course(dot: np.ndarray, moved_sq: np.ndarray, w_sq: np.ndarray, lr: np.ndarray, decay: float) -> Course:
    """The course of ⟨w,ηu⟩, ‖ηu‖² and ‖w‖²; where η is 0 nothing moves."""
    rate = np.divide(1.0, lr, out=np.zeros_like(lr), where=lr > 0)
    return Course(w_sq, *forces_from_products(rate * dot, rate**2 * moved_sq, w_sq, lr, decay))


class Known(NamedTuple):
    """What is known of one tensor, of which each method takes what it needs.

    Attributes:
        norm_sq: ‖W‖² at K checkpoints.
        gram: ⟨W_i,W_j⟩ of them (K, K), of neighbours alone or of all; None where it was not measured.
        steps: their steps, ascending.
        lr: η of the updates steps[0]+1 … steps[-1].
        weight_decay: decoupled decay λ.
        numel: weights n.
        rho: ρ = ‖u‖²/n of those updates.
    """

    norm_sq: np.ndarray
    gram: Any
    steps: np.ndarray
    lr: np.ndarray
    weight_decay: float
    numel: int
    rho: np.ndarray


class Method(NamedTuple):
    """One way to recover forces.

    Attributes:
        forces: the forces of every update, from what is known of a tensor.
        gram: the inner products of checkpoints that it takes, as `Checkpoints.measure` calls them.
        without: whether it does without them, if less well.
    """

    forces: Callable[[Known], Course]
    gram: Literal["band", "full"]
    without: bool = False


METHODS: dict[str, Method] = {
    "balance": Method(
        lambda it: balance_forces(it.norm_sq, it.steps, it.lr, it.weight_decay, it.numel, it.rho),
        gram="band",
        without=True,
    ),
    "spline": Method(lambda it: spline_forces(it.gram, it.steps, it.lr, it.weight_decay), gram="full"),
    "two_point": Method(lambda it: two_point_forces(it.gram, it.steps, it.lr, it.weight_decay), gram="band"),
}
"""Ways to recover forces, the best first. A new one is a new entry here."""


# --- a series ----------------------------------------------------------------------------------------------


def recover_forces(
    source: Checkpoints | RunLog | pd.DataFrame | str | PathLike[str],
    recipe: Recipe,
    method: str = "balance",
    every: int | None = None,
    *,
    views: Views = True,
    cache: str | PathLike[str] | bool = True,
    progress: Progress = None,
) -> pd.DataFrame:
    """Recover the force table of a training from its checkpoints.

    Args:
        source: a `Checkpoints`, what it opens (a folder, a run directory, "hf://…"), a `RunLog`, or the table
            of `Checkpoints.measure`, whose rows may be filtered to fewer steps or tensors.
        recipe: η of every update, λ, β₁, and which tensors decay.
        method: a name of `METHODS`: "balance", the most accurate; "spline" and "two_point" as published, for
            comparison. What they need to be measured: gram="band" ("none" will do, with a rougher ρ), "full",
            "band".
        every: None gives one row for each gap between checkpoints, its forces the mean over the gap. A number
            gives rows of span 1 for the updates that are multiples of it, as a log with that interval has.
        views: True splits fused tensors, "head" makes rows for each head of q, k and v, False leaves all whole.
        cache: as in `Checkpoints.measure`.
        progress: show bars while checkpoints are measured, and for what takes longer than two seconds; None:
            where someone watches.

    The inferred drift is far less certain than alignment: a wrong ρ goes into it 1 + 2b times. On logged runs that
    of a matrix was off by a tenth of the budget (median), and that of embeddings, many of whose rows get no
    gradient, had the wrong sign more often than not (data/recovery.md).

    Where the weights contradict the recipe, a UserWarning says what does, by that part of `audit_recipe` that is
    cheap: distances, norms and equal hashes of what was measured, and of checkpoints on a disk the decay clock. A
    decay that is a fifth of the true one, or twice the η, make a third or more of alignment wrong.

    Returns:
        A force table, sorted by step, then in the order of the tensors. `lr` is the mean over the span,
        `norm_sq` and `norm_sq_after` are measured (with `every`: interpolated, and only known at a checkpoint).
        `drift` and `memory` are inferred: `memory_null` is the budget's injection times `forces.memory_null`,
        the two are the diffusion, and `memory` is the diffusion less the method's own injection (for "balance"
        that is `memory_null`). `signal` is NaN. Behind its columns stand

        alignment_low, alignment_high   where the budget puts the true alignment, whatever the method: with ρ
                      at both ends of its spread (`RHO_SPREAD`), decay off by `decay_doubt` and by a float32's
                      rounding of 1−ηλ, and ‖W‖² by two standard deviations of its rounding
        drift_low, drift_high   where it puts the drift that a log would show, whatever the method: the root of
                      the sum of the squares of how far diffusion is from both ends of its spread
                      (`DIFFUSION_SPREAD`), of the same doubts of decay and of ‖W‖², and of two standard deviations
                      of `drift_noise` (all of the mean over the gap)
        split         "white noise", for that is what memory is assumed to be of
        flag          "rounding": this alignment is smaller than what rounding of the stored weights leaves
                      open; "identical": both checkpoints hold the same weights though η was not 0; else ""

    Raises:
        TypeError, ValueError: an argument is none of these; fewer than two checkpoints; a table without what
            the method needs, with two rows of one tensor at one step, or with a step, ‖W‖² or number of weights
            that cannot be.

    Source: displacement and spline, arXiv 2606.19367.

    >>> from weightdyn.checkpoints.recipe import Recipe
    >>> measured = pd.DataFrame({"step": [0, 10], "tensor": "w", "component": "up", "role": "transmission",
    ...                          "numel": 100, "norm_sq": [4.0, 4.1]})
    >>> table = recover_forces(measured, Recipe(lr=1e-2, weight_decay=0.1))
    >>> table[["step", "span", "alignment", "drift"]].round(4)
       step  span  alignment   drift
    0    10    10     0.0151  0.0031
    """
    check_choice("method", method, METHODS)
    check_whole("every", every, 1, MAX_UPDATES, none="one row for each gap")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as Recipe.preset('pythia-70m'), got {shown(recipe)}")
    measured = _measured(source, method, views, cache, progress)
    null = _nulls(recipe, measured["step"])
    parts = list(measured.groupby("tensor", sort=False, observed=True))
    bar = progress_bar(parts, progress=progress, unit="tensor", desc="recover", delay=2)
    tables = [
        _recover(rows, place, recipe, method, every, null)
        for place, (_, rows) in enumerate(bar)
        if len(rows) > 1
    ]
    if not tables:
        steps = sorted(measured["step"].unique().tolist())
        raise ValueError(f"source must have at least two checkpoints, got the steps {steps}")
    warn_of_contradictions(source, measured, recipe)
    table = pd.concat(tables, ignore_index=True).sort_values(["step", "place"], ignore_index=True)
    table["layer"] = table["layer"].astype("Int64")
    kinds = dict.fromkeys(("tensor", "stack", "component", "role", "split", "flag"), "category")
    return table.reindex(columns=[*FORCE_TABLE, *RECOVERY_TABLE]).astype(kinds)


def _measured(
    source: Any, method: str, views: Views, cache: str | PathLike[str] | bool, progress: Progress
) -> pd.DataFrame:
    if not isinstance(source, pd.DataFrame):
        from weightdyn.checkpoints.series import Checkpoints, check_updates
        from weightdyn.record.runlog import RunLog

        if isinstance(source, RunLog):
            if source.path is None:
                raise ValueError("source is a RunLog in memory, which has no checkpoints: give their folder")
            source = source.path
        series = source if isinstance(source, Checkpoints) else Checkpoints(source)
        check_updates(series)
        return series.measure(METHODS[method].gram, False, views, cache=cache, progress=progress)
    if views is not True:
        raise ValueError(
            f"views: the table has its rows; measure it with views={views!r}, got {views!r} here"
        )
    check_columns(source, ("step", "tensor", "numel", "norm_sq"), _TABLE, argument="source")
    if "rounding" in source:
        check_columns(source, ("rounding",), _TABLE, argument="source")
    for name, accepted, good, remedy in _ACCEPTED:
        if name in source:
            values = source[name].to_numpy(float, na_value=np.nan)
            if len(bad := source[~good(values)]):
                one = bad.iloc[0]
                raise ValueError(
                    f"source: {name} must be {accepted}; that of {one['tensor']} at step {one['step']} is "
                    f"{one[name]}{remedy}"
                )
    if source["tensor"].isna().any():
        raise ValueError(
            "source: a row of the column tensor is missing; give each row the name of its tensor"
        )
    if len(again := source[source.duplicated(["tensor", "step"])]):
        one = again.iloc[0]
        raise ValueError(
            f"source has two rows for {one['tensor']} at one step, {one['step']}; keep one of them"
        )
    defaults = {"stack": "", "layer": pd.NA, "component": "other", "role": "other"}
    return source.assign(**{name: value for name, value in defaults.items() if name not in source})


_TABLE = "table of Checkpoints.measure"

_ACCEPTED: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray], str], ...] = (
    (
        "step",
        f"a whole number from 0 to {MAX_UPDATES:,}",
        lambda x: (x >= 0) & (x <= MAX_UPDATES) & (x == np.floor(x)),
        "",
    ),
    ("numel", "a whole number >= 1", lambda x: (x >= 1) & (x < 2**53) & (x == np.floor(x)), ""),
    ("norm_sq", "a finite ‖W‖² >= 0", lambda x: (x >= 0) & np.isfinite(x), "; leave that checkpoint out"),
    ("rounding", "a finite number >= 0, or missing", lambda x: np.isnan(x) | ((x >= 0) & np.isfinite(x)), ""),
)
"""Columns of a measured table, what they must hold, a check of that, and what to do otherwise."""


def _nulls(recipe: Recipe, steps: pd.Series) -> Callable[[float, np.ndarray], np.ndarray]:
    """(λ, updates) -> memory over injection under white noise, of updates between the steps; 0 where η is 0."""
    beta1 = recipe.betas[0]

    @cache
    def all_of(weight_decay: float) -> tuple[np.ndarray, int]:
        # What lies further back is forgotten; and where nothing does, the schedule starts with its first update.
        lead = math.ceil(math.log(_FORGOTTEN) / math.log(beta1)) if beta1 > 0 else 0
        start = max(0, int(steps.min()) - lead)
        lr = recipe.lr_at(np.arange(start + 1, int(steps.max()) + 1))
        return np.where(lr > 0, memory_null(lr, beta1, weight_decay), 0.0), start

    def null(weight_decay: float, updates: np.ndarray) -> np.ndarray:
        values, start = all_of(weight_decay)
        return values[updates - start - 1]

    return null


_FORGOTTEN = 1e-12


def _recover(
    rows: pd.DataFrame,
    place: int,
    recipe: Recipe,
    method: str,
    every: int | None,
    null: Callable[[float, np.ndarray], np.ndarray],
) -> pd.DataFrame:
    """Rows of one tensor."""
    rows = rows.sort_values("step")
    first = rows.iloc[0]
    steps = rows["step"].to_numpy(np.int64)
    norm_sq, numel = rows["norm_sq"].to_numpy(float), int(first["numel"])
    updates = np.arange(steps[0] + 1, steps[-1] + 1)
    lr = recipe.lr_at(updates)
    weight_decay = recipe.decay_of(str(first["component"]), split_label(str(first["tensor"]))[0])
    rounding = rows["rounding"].fillna(0.0).to_numpy(float) if "rounding" in rows else np.zeros(len(rows))
    starts, span = steps[:-1] - steps[0], np.diff(steps)
    gap = np.repeat(np.arange(len(span)), span)

    wanted = METHODS[method]
    gram = _gram(rows, full=wanted.gram == "full")
    if gram is None and not wanted.without:
        raise ValueError(
            f"method={method!r} needs the inner products of checkpoints: measure(gram={wanted.gram!r})"
        )
    scale_sq = recipe.update_scale**2
    rho = scale_sq * noise_rho(updates, recipe.betas[0])
    lr_sum = np.add.reduceat(lr, starts)
    walk = noise_walk(lr, steps, recipe.betas, weight_decay)
    told = np.zeros(len(span), bool)
    if gram is not None:
        shrink = np.exp(np.add.reduceat(np.log1p(-lr * weight_decay), starts))
        moved_sq = norm_sq[1:] - 2 * shrink * gram.diagonal(1) + shrink**2 * norm_sq[:-1]
        noise = rounding[1:] + rounding[:-1]
        # Below twice its rounding a displacement tells nothing of the updates.
        told = moved_sq > 2 * noise
        moved_sq = np.where(told, moved_sq - noise, 0.0)
        # In units of the scale of u, updates are as those of any Adam.
        scaled = moved_sq / scale_sq, norm_sq[:-1] / scale_sq
        rho = rho * injection_scale(*scaled, numel, walk, recipe.betas[0])[gap]
    known = Known(norm_sq, gram, steps, lr, weight_decay, numel, rho)
    balance = METHODS["balance"].forces(known)
    course = balance if method == "balance" else wanted.forces(known)
    budget = {name: getattr(balance, name) for name in FORCES}
    budget["memory"] = balance.injection * null(weight_decay, updates)

    # Stored weights are w + e: ‖W‖² is off by 2⟨w,e⟩, of variance 4·Σw²e² = 4·kurtosis·‖w‖²·‖e‖²/n.
    variance = 4 * _KURTOSIS * norm_sq * rounding / numel
    blur = 2 * np.sqrt(variance[1:] + variance[:-1]) / span
    late = 2 * drift_noise(norm_sq[:-1], recipe.update_scale * lr_sum / span, span, recipe.betas[0])
    if every is None:
        of = np.arange(len(span))
        columns, budget = (
            {name: np.add.reduceat(values, starts) / span for name, values in each.items()}
            for each in (course._asdict(), budget)
        )
        columns |= {"norm_sq": norm_sq[:-1], "norm_sq_after": norm_sq[1:], "step": steps[1:], "span": span}
        columns["lr"] = lr_sum / span
    else:
        pick = np.flatnonzero(updates % every == 0)
        of = gap[pick]
        columns, budget = (
            {name: values[pick] for name, values in each.items()} for each in (course._asdict(), budget)
        )
        after = pd.Series(norm_sq, index=steps).reindex(updates[pick]).to_numpy()
        columns |= {"norm_sq_after": after, "step": updates[pick], "span": 1, "lr": lr[pick]}
    doubt = decay_doubt(norm_sq, steps, lr, weight_decay)
    doubt = doubt + np.where(lr_sum * weight_decay > 0, _FLOAT32, 0.0) * norm_sq[:-1]
    open_, chance = (blur + doubt)[of], np.sqrt(blur**2 + late**2 + doubt**2)[of]
    blur = blur[of]
    flag = np.where(np.abs(columns["alignment"]) < blur, "rounding", "")
    if "hash" in rows:
        hashes = rows["hash"].to_numpy()
        same = (hashes[1:] == hashes[:-1]) & pd.notna(hashes[1:]) & (lr_sum > 0)
        flag = np.where(same[of], "identical", flag)
    spread = diffusion(budget)
    gained = budget["alignment"] + budget["injection"]  # what decay leaves of the change
    memory = spread - columns["injection"]
    _, beyond = _beyond(walk, recipe.betas[0])
    rho_spread = np.where(told, RHO_SPREAD["displacement"] * beyond, RHO_SPREAD["noise"]) * np.cbrt(
        walk.stale
    )
    spread_of = np.where(told, *DIFFUSION_SPREAD.values()) * walk.stale ** (1 / 6)
    rho_low, rho_high, low, high = np.exp([-rho_spread, rho_spread, -spread_of, spread_of])[:, of]
    return pd.DataFrame(
        {
            **columns,
            "drift": columns["alignment"] - memory,
            "memory": memory,
            "memory_null": budget["memory"],
            **{name: first[name] for name in IDENTITY},
            "numel": numel,
            "weight_decay": weight_decay,
            "alignment_low": gained - rho_high * budget["injection"] - open_,
            "alignment_high": gained - rho_low * budget["injection"] + open_,
            "drift_low": gained - spread - np.hypot((high - 1) * spread, chance),
            "drift_high": gained - spread + np.hypot((1 - low) * spread, chance),
            "split": WHITE_NOISE,
            "flag": flag,
            "place": place,
        }
    )


def _gram(rows: pd.DataFrame, full: bool) -> np.ndarray | None:
    """⟨W_i,W_j⟩ of the rows' checkpoints, of neighbours alone or of all; None where one was not measured."""
    if "dots" not in rows or "dot_steps" not in rows or any(np.ndim(dots) == 0 for dots in rows["dots"]):
        return None
    steps = rows["step"].tolist()
    gram = np.zeros((len(steps), len(steps)))
    for i, (partners, dots) in enumerate(zip(rows["dot_steps"], rows["dots"], strict=True)):
        known = dict(zip(map(int, partners), map(float, dots), strict=True))
        for j in range(0 if full else max(0, i - 1), i + 1):
            gram[i, j] = gram[j, i] = known.get(steps[j], np.nan)
    return None if np.isnan(gram).any() else gram


# --- how good it is ----------------------------------------------------------------------------------------


def compare_recovery(
    truth: pd.DataFrame | RunLog, recovered: pd.DataFrame | Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Accuracy of recovered forces against the logged means over the same updates.

    A single update is no mean over the gap before it: of rows of many updates those are left out of which truth
    has one. So hold the forces of checkpoints (`forces_from_states`) against recovered single updates,
    `recover_forces(…, every=n)` with an n that divides the checkpoints' steps: rows of the same update are
    compared. A single update scatters about its mean by itself, small tensors most, so that there the sum over
    the model tells more than each tensor does.

    Of alignment it is |1 − ratio|. Drift goes through zero, where a ratio means nothing; of drift and of diffusion
    it is |recovered − logged| over the whole logged budget, |drift| + |diffusion| + |decay|.

    Args:
        truth: the log of the same training, a `RunLog` or its force table, best of every update; or the exact
            forces of its checkpoints.
        recovered: a recovered table, or {name: table} for several methods.

    Returns:
        One row for each method and pooling ("tensor": each tensor by itself, "model": the sum of all tensors),
        with the columns of `ACCURACY_TABLE`: `intervals`, `median` and `p90` of alignment's error,
        `median_ratio`, and `inside`, the fraction of true values between `alignment_low` and `alignment_high`
        (tensors only); then `drift_median`, `drift_p90`, `drift_sign` (the fraction of drifts with the right
        sign), `drift_inside`, `diffusion_median` and `diffusion_p90`, NaN where truth has no drift.

    Raises:
        TypeError, ValueError: not force tables, or tables of different tensors or updates.
    """
    tables = recovered if isinstance(recovered, Mapping) else {"recovered": recovered}
    log = _log(truth)
    columns = [name for name in _COMPARED if name in log]
    found = []
    for name, table in tables.items():
        table = check_force_table(table, argument=f"recovered ({name})", unique=True)
        check_columns(table, _BOUNDS, "recovered force table", argument="recovered")
        both = pd.concat([table, _interval_means(log, table, columns).add_prefix("true_")], axis=1)
        both = both[both["true_alignment"].notna()]
        if both.empty:
            raise ValueError(
                f"truth has no update of the tensors and spans of recovered ({name}), or one of each span, which "
                "is no mean over it: recover_forces(…, every=n), n a divisor of truth's steps, has single updates"
            )
        summed = [each for each in (*_COMPARED, *(f"true_{each}" for each in columns)) if each in both]
        groups = both.groupby(["step", "span"])
        pooled = groups[summed].sum().where(groups[summed].count().eq(groups.size(), axis=0))
        for pooling, rows in (("tensor", both), ("model", pooled)):
            ratio = (rows["alignment"] / rows["true_alignment"]).to_numpy()
            error = np.abs(1 - ratio)
            one = pooling == "tensor"
            inside = (
                rows["true_alignment"].between(rows[_BOUNDS[0]], rows[_BOUNDS[1]]).mean() if one else np.nan
            )
            found.append(
                {
                    "method": name,
                    "pooling": pooling,
                    "intervals": len(ratio),
                    "median": np.median(error),
                    "p90": np.quantile(error, 0.9),
                    "median_ratio": np.median(ratio),
                    "inside": inside,
                    **_drift_accuracy(rows),
                }
            )
    return pd.DataFrame(found).reindex(columns=list(ACCURACY_TABLE))


_FEWEST = 2  # updates of a span that make a mean over it
_COMPARED = ("alignment", "injection", "decay", "drift", "memory")

_BOUNDS = ("alignment_low", "alignment_high")


def _drift_accuracy(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy of recovered drift and diffusion, of the rows whose drift was logged."""
    if "true_drift" not in rows or "drift" not in rows:
        return {}
    rows = rows[rows["true_drift"].notna() & rows["drift"].notna()]
    if rows.empty:
        return {}
    true_diffusion = diffusion(rows, before="true_")
    size = rows["true_drift"].abs() + true_diffusion.abs() + rows["true_decay"].abs()
    drift = ((rows["drift"] - rows["true_drift"]) / size).abs()
    spread = ((diffusion(rows) - true_diffusion) / size).abs()
    found = {
        "drift_median": drift.median(),
        "drift_p90": drift.quantile(0.9),
        "drift_sign": (np.sign(rows["drift"]) == np.sign(rows["true_drift"])).mean(),
        "diffusion_median": spread.median(),
        "diffusion_p90": spread.quantile(0.9),
    }
    if "drift_low" in rows and "drift_high" in rows:
        found["drift_inside"] = rows["true_drift"].between(rows["drift_low"], rows["drift_high"]).mean()
    return found


def interval_means(truth: pd.DataFrame | RunLog, table: pd.DataFrame, name: str = "alignment") -> pd.Series:
    """Mean of a logged force over the updates of each row of a recovered table.

    Args:
        truth: the log of the same training, a `RunLog` or its force table.
        table: a force table whose rows may span many updates.
        name: a column of numbers that the log has of a force table's: "alignment", "drift", "lr", …

    Returns:
        float64 with the index of `table`; NaN where no update of that tensor was logged, or one of a span of many.
        Of a log with gaps it is the mean over what was logged.
    """
    table = check_force_table(table, argument="table", unique=True)
    check_columns(table, ("tensor",), "force table of tensors", argument="table")
    log = _log(truth)
    check_choice("name", name, [each for each in FORCE_TABLE if each in log.select_dtypes("number")])
    return _interval_means(log, table, [name])[name]


def _log(truth: Any) -> pd.DataFrame:
    log = check_force_table(truth, argument="truth", unique=True)
    return check_columns(log, ("tensor",), "force table of tensors", argument="truth")


def _interval_means(log: pd.DataFrame, table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    out = np.full((len(table), len(columns)), np.nan)
    logged = {name: rows.sort_values("step") for name, rows in log.groupby("tensor", observed=True)}
    end = table["step"].to_numpy()
    start = end - table["span"].to_numpy()
    for name, places in table.groupby("tensor", observed=True).indices.items():
        if name not in logged:
            continue
        own = logged[name]
        for i, column in enumerate(columns):
            values = own[column].to_numpy(float)
            steps, span = (
                own["step"].to_numpy()[~np.isnan(values)],
                own["span"].to_numpy(float)[~np.isnan(values)],
            )
            total = np.append(0.0, np.cumsum(span * values[~np.isnan(values)]))
            count = np.append(0.0, np.cumsum(span))
            last = np.searchsorted(steps, end[places], side="right")
            first = np.searchsorted(steps, start[places], side="right")
            covered = count[last] - count[first]
            enough = covered >= np.minimum(end[places] - start[places], _FEWEST)
            with np.errstate(divide="ignore", invalid="ignore"):
                out[places, i] = np.where(enough, (total[last] - total[first]) / covered, np.nan)
    return pd.DataFrame(out, index=table.index, columns=columns)
