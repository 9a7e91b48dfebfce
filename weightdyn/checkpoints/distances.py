"""How far weights came between checkpoints, against what a recipe's updates can make of them, and what noise makes.

Adam divides by the gradient's own size, so an update is η times much the same number in any model: ±1 at first,
never more than `largest_update`; and many add up as white noise does, within a factor that logged trainings tell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.checkpoints.findings import AGREES, CONTRADICTS, UNKNOWN, Finding, number, untold
from weightdyn.checkpoints.recipe import Recipe
from weightdyn.core.naming import split_label

STEADY = (0.33, 1.4)
"""Where ‖W_b − ΠW_a‖² lies as a multiple of what white gradient noise makes: the median over gaps of that over the
blocks' matrices. In twelve trainings it lay from 0.37 to 1.02 at gaps of 25 to 200 updates (data/audit.md), in the
smaller ones that the tests make up to 1.24; here is an eighth more on either side. Twice the η is a factor of 4."""

FIRST = (0.9, 1.02)
"""The same of the first update alone, where u is ±1 but for Adam's ε: logged, 0.998 to 1.000."""

EARLY = 0.6
"""And at least in gaps that end by update 8, where gradients agree more than noise does: logged, 1.2 to 3.6."""

BLOCK = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
_SETTLED = 50  # updates after which the moments, and the first agreement of gradients, are over
_GAP = (10.0, 500.0)  # updates of equal η between checkpoints for which STEADY was measured
_FEW = 3  # gaps that a median needs
_PERSISTS = 1.4  # way² over two gaps against one, per update: logged 0.8 to 1.3, 2 where gradients persist
_EPS = 1e-7  # Adam's ε beyond which it may make updates smaller

Far = Callable[[int, int], float]
"""(a, b) -> way² over that of noise, of any two checkpoints."""

Acting = Callable[[float, int, int], float]
"""(λ of the recipe, a, b) -> λ that acted between two checkpoints."""


# How large updates are, in numbers.


def largest_update(betas: tuple[float, float]) -> float:
    """The largest |u| that any gradients give an entry of Adam's update.

        |m̂|/√v̂ ≤ (1−β₁)/√((1−β₂)(1−β₁²/β₂))       1 at the first update; inf for β₁² ≥ β₂

    >>> round(largest_update((0.9, 0.95)), 3), round(largest_update((0.9, 0.999)), 2)
    (1.165, 7.27)
    """
    beta1, beta2 = betas
    if beta1 == 0:
        return 1.0 if beta2 == 0 else 1 / math.sqrt(1 - beta2)
    if beta1**2 >= beta2:
        return math.inf
    return max(1.0, (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)))


def log_kept(lr: np.ndarray, weight_decay: float) -> np.ndarray:
    """ln(1−ηλ) of each update, ηλ up to 1."""
    return np.log1p(-np.minimum(lr * weight_decay, 1 - 1e-9))


def noise_displacement(lr: np.ndarray, beta1: float, weight_decay: float = 0.0, start: int = 0) -> float:
    """Mean square per weight of W_b − Π(1−ηλ)W_a where gradients are white noise of a steady size.

        W_b − ΠW_a = Σₛ hₛ·g̃ₛ,    hₛ = Σₜ ηₜ·Π_{t<r≤b}(1−ηᵣλ)·(1−β₁)β₁^{t−s}/(1−β₁ᵗ)

    over the gradients s of the gap, and of those before it that momentum still carries into it.

    Args:
        lr: η of the updates a+1 … b.
        beta1: β₁ of the first moment.
        weight_decay: decoupled decay λ.
        start: a, updates before the gap.

    >>> round(noise_displacement(np.array([0.1]), beta1=0.9), 9)  # the first update is η
    0.01
    >>> round(noise_displacement(np.full(1000, 0.1), beta1=0.9, start=10**6), 2)  # far on, η² for each
    9.91
    """
    from scipy.signal import lfilter  # here: it takes a while to import

    updates = np.arange(start + 1, start + len(lr) + 1, dtype=float)
    kept = log_kept(lr, weight_decay)
    later = np.exp(np.cumsum(kept[::-1])[::-1] - kept)
    fresh = lr * later * (1 - beta1) / (1 - beta1**updates)
    carried = np.asarray(lfilter([1.0], [1.0, -beta1], fresh[::-1]))[::-1]
    before = beta1**2 * (1 - beta1 ** (2 * start)) / (1 - beta1**2) * carried[0] ** 2
    return float(carried @ carried + before)


def tensor_gaps(measured: pd.DataFrame, recipe: Recipe, acting: Acting | None = None) -> pd.DataFrame:
    """One row for each tensor and gap: how far it came, and what the recipe makes of that.

    Args:
        measured: the table of `Checkpoints.measure`.
        recipe: η of every update, and λ.
        acting: the λ that acted, where it is known better.
    """
    last = int(measured["step"].max())
    first = int(measured["step"].min())
    lr = recipe.lr_at(np.arange(first + 1, last + 1)) * 1.0
    most = largest_update(recipe.betas) * recipe.update_scale
    known: dict[tuple[float, int, int], dict[str, float]] = {}

    def of_recipe(decay: float, a: int, b: int) -> dict[str, float]:
        if (decay, a, b) not in known:
            rates = lr[a - first : b - first]
            kept = log_kept(rates, decay)
            squares = float(rates @ rates)
            known[decay, a, b] = {
                "keep": math.exp(kept.sum()),
                "total": float(rates.sum()),
                "equal": float(rates.sum()) ** 2 / squares if squares else 0.0,
                "noise": recipe.update_scale**2 * noise_displacement(rates, recipe.betas[0], decay, a),
                "most": float(np.exp(np.cumsum(kept[::-1])[::-1] - kept) @ rates)
                * (most if squares else 0.0),
            }
        return known[decay, a, b]

    rows: list[dict[str, Any]] = []
    for label, own in measured.groupby("tensor", sort=False, observed=True):
        own = own.sort_values("step")
        steps = own["step"].to_numpy(np.int64).tolist()
        head = own.iloc[0]
        component = str(head["component"]) if "component" in own else "other"
        decay = recipe.decay_of(component, split_label(str(label))[0])
        norms = own["norm_sq"].to_numpy(float)
        rounding = own["rounding"].fillna(0.0).to_numpy(float) if "rounding" in own else np.zeros(len(own))
        dots = _neighbour_dots(own)
        for i, (a, b) in enumerate(itertools.pairwise(steps)):
            of = of_recipe(decay if acting is None else acting(decay, a, b), a, b)
            way_sq = norms[i + 1] + of["keep"] ** 2 * norms[i] - 2 * of["keep"] * dots[i]
            rows.append(
                {
                    "tensor": str(label), "component": component, "start": a, "step": b, "decay": decay,
                    "numel": int(head["numel"]), "way_sq": max(way_sq, 0.0) if way_sq == way_sq else way_sq,
                    "before": norms[i], "after": norms[i + 1], "rounding": rounding[i] + rounding[i + 1], **of,
                }
            )  # fmt: skip
    if not rows:
        raise ValueError("source must have two checkpoints or more of a tensor")
    return pd.DataFrame(rows)


def _neighbour_dots(rows: pd.DataFrame) -> list[float]:
    """⟨W, W⟩ of each row but the first with the row before it; NaN where it was not measured."""
    if "dots" not in rows or "dot_steps" not in rows:
        return [math.nan] * (len(rows) - 1)
    found = []
    partners, dots, steps = (rows[name].tolist() for name in ("dot_steps", "dots", "step"))
    for step, others, values in zip(steps, partners[1:], dots[1:], strict=False):
        at = np.flatnonzero(np.asarray(others) == step) if np.ndim(values) else []
        found.append(float(values[at[0]]) if len(at) else math.nan)
    return found


# What they say of a recipe.


class Size(NamedTuple):
    """How large updates are, as multiples of the recipe's η·s."""

    finding: Finding
    verdict: str
    low: float = 0.0
    high: float = math.inf

    @property
    def told(self) -> bool:
        """Whether it is known."""
        return self.verdict != UNKNOWN

    def holds(self, factor: float) -> bool:
        """Whether a factor on the recipe's η·s lies in it."""
        return self.low <= factor <= self.high


def gap_ratios(gaps: pd.DataFrame) -> pd.DataFrame:
    """For each gap the median over the blocks' matrices of way² over that of noise, where rounding leaves it."""
    rows = gaps[gaps["component"].isin(BLOCK) & (gaps["noise"] > 0) & (gaps["way_sq"] > 2 * gaps["rounding"])]
    ratio = (rows["way_sq"] - rows["rounding"]) / (rows["numel"] * rows["noise"])
    rows = rows.assign(ratio=ratio, blur=rows["rounding"] / rows["way_sq"])
    keys = ["start", "step"]
    return rows.groupby(keys)[["ratio", "equal", "total", "blur"]].median().dropna().reset_index()


def first_update(gaps: pd.DataFrame, recipe: Recipe) -> Size:
    """Whether the first update is ±η₁; `gaps` as `tensor_gaps` makes them."""
    check = "first update"
    rows = gaps[(gaps["start"] == 0) & (gaps["step"] == 1)]
    if rows.empty:
        return Size(
            untold(check, "steps 0 and 1 are not both there, so η of the first update is unknown"), UNKNOWN
        )
    if rows["way_sq"].isna().any():
        reason = (
            "there are no inner products of steps 0 and 1 (gram='band'), so η of the first update is unknown"
        )
        return Size(untold(check, reason), UNKNOWN)
    expected = float(rows["total"].iloc[0])
    blocks = rows[rows["component"].isin(BLOCK)]
    told = blocks[blocks["way_sq"] > 100 * blocks["rounding"]]
    still = bool((rows["way_sq"] <= 1e-14 * rows["before"]).all())
    if not still and len(told) < max(1, len(blocks) / 2):
        reason = "rounding of the stored weights hides the first update, or no matrix of a block is known"
        return Size(untold(check, reason), UNKNOWN)
    rms = 0.0 if still else math.sqrt(float((told["way_sq"] / told["numel"]).median()))
    # A scale that comes of bias corrections is not there yet at the first update.
    scales = {1.0, recipe.update_scale}
    low, high = (math.sqrt(each) for each in FIRST)
    low = low if recipe.eps <= _EPS else 0.0
    good = [s for s in scales if low * expected * s <= rms <= high * expected * s]
    ends: dict[str, Any] = {"low": rms / high, "high": rms / low if low else math.inf, "expected": expected}
    row = number(AGREES if good else CONTRADICTS, 1, 1, measured=rms, **ends)
    if good:
        sentence = f"the first update moved weights by {rms:.4g} (rms), and the recipe's η₁ is {expected:.4g}"
    elif still:
        sentence = f"steps 0 and 1 hold the same weights: η₁ was 0, and the recipe's is {expected:.4g}"
    else:
        sentence = (
            f"the first update moved weights by {rms:.4g} (rms), which is η₁ where Adam's u is ±1, and the recipe "
            f"has {expected:.4g}{_of_times(rms, expected)}"
        )
    if not good:
        later = recipe.lr_at(np.arange(2, 7))
        near = np.flatnonzero((later > 0) & (np.abs(rms - later) <= 0.02 * later))
        if len(near) and not math.isclose(later[near[0]], expected, rel_tol=1e-3):
            sentence += f"; the recipe has that at update {near[0] + 2}"
    verdict = row["verdict"]
    if still or not expected:
        return Size(Finding(check, sentence, [row]), UNKNOWN)
    return Size(Finding(check, sentence, [row]), verdict, rms / high / expected, ends["high"] / expected)


def _of_times(measured: float, expected: float) -> str:
    return f", {measured / expected:.3g} of it" if expected > 0 else ""


def update_size(gaps: pd.DataFrame, recipe: Recipe, first: Size, far: Far | None) -> Size:
    """Whether later updates are as large as noise makes them, the `first` as told; `far` None: not to be had."""
    check = "update size"
    found = gap_ratios(gaps)
    if found.empty:
        known = gaps.loc[gaps["component"].isin(BLOCK), "way_sq"].notna().any()
        reason = "rounding hides it" if known else "there are no inner products of neighbours (gram='band')"
        return Size(untold(check, f"the size of updates is unknown: {reason}"), UNKNOWN)
    settled = max(_SETTLED, _warmed_up(recipe, int(gaps["step"].max())))
    steady = found[(found["start"] >= settled) & found["equal"].between(*_GAP)]
    early = found[(found["start"] >= 1) & (found["step"] <= 8)]
    if len(steady) < _FEW:
        spans = (found["step"] - found["start"]).astype(int)
        reason = (
            f"{len(steady)} gaps from update {settled} on have 10 to 500 updates (those of the series: "
            f"{spans.min()} to {spans.max()}), too few to tell the size of updates"
        )
        if len(early) < 2 or recipe.eps > _EPS or early["ratio"].median() >= EARLY:
            return Size(untold(check, reason), UNKNOWN)
        steady, (low, high) = early, (EARLY, math.inf)
    else:
        low, high = STEADY
    middle = float(steady["ratio"].median())
    low = low if recipe.eps <= _EPS else 0.0
    if middle > high and (reason := _persistent(steady, far)):
        return Size(
            untold(check, f"squared displacements are {middle:.3g} of white noise's, {reason}"),
            UNKNOWN,
        )
    verdict = AGREES if low <= middle <= high else CONTRADICTS
    rows = [
        number(
            verdict,
            int(row.step),
            int(row.step - row.start),
            measured=row.ratio,
            low=low,
            high=high,
            expected=1.0,
        )
        for row in steady.itertuples()
    ]
    of = f"the median of {len(steady)} gaps of {_range(steady['step'] - steady['start'])} updates"
    usual = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
    ends = math.sqrt(middle / high), math.sqrt(middle / low) if low else math.inf
    if verdict == AGREES:
        return Size(
            Finding(
                check,
                f"squared displacements are {middle:.2f} of what white noise makes at the recipe's η ({of}); "
                f"logged trainings have {usual}",
                rows,
            ),
            verdict, *ends,
        )  # fmt: skip
    about = (
        f"{ends[0]:.2g} to {ends[1]:.2g} times"
        if math.isfinite(ends[1]) and ends[0]
        else f"under {ends[1]:.2g} of"
    )
    sentence = (
        f"squared displacements are {middle:.3g} of what white noise makes at the recipe's η ({of}), where "
        f"logged trainings have {usual}: η times the update's scale is {about} the recipe's"
    )
    frozen = math.sqrt(1 - recipe.betas[1]) / (1 - recipe.betas[0])
    if first.verdict == AGREES and ends[0] <= frozen <= ends[1] and recipe.update_scale == 1:
        sentence += (
            f"; the first update is the recipe's, so the factor came later, as bias corrections do that stay those "
            f"of the first update: √(1−β₂)/(1−β₁) = {frozen:.2f} (update_scale)"
        )
    return Size(Finding(check, sentence, rows), verdict, *ends)


def _persistent(steady: pd.DataFrame, far: Far | None) -> str:
    """Why a way that is too far may be that of gradients that agree for long; empty if they do not."""
    if far is None:
        return "and only checkpoints that are no neighbours would tell whether gradients agree for so long"
    starts = {int(row.start): int(row.step) for row in steady.itertuples()}
    pairs = [(a, b, starts[b]) for a, b in starts.items() if b in starts]
    picked = pairs[:: max(1, len(pairs) // _FEW)][:_FEW]
    over = [2 * far(a, c) / (far(a, b) + far(b, c)) for a, b, c in picked]
    if not over or not np.median(over) <= _PERSISTS:
        times = f" ({np.median(over):.2g} times over two gaps)" if over else ""
        return f"for gradients agree from one gap to the next{times}, so the size of updates is unknown"
    return ""


def _warmed_up(recipe: Recipe, last: int) -> int:
    """The update before the learning rate is first at its largest, of those up to the last."""
    lr = recipe.lr_at(np.arange(1, last + 1))
    return int(np.argmax(lr >= 0.999 * lr.max()))


def _range(values: Iterable[Any]) -> str:
    values = sorted({int(each) for each in values})
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def bound(gaps: pd.DataFrame, recipe: Recipe) -> Finding:
    """Whether any tensor came farther than gradients can take it."""
    check = "bound"
    if gaps.empty:
        return untold(check, "no two neighbouring checkpoints are sound")
    if math.isinf(largest_update(recipe.betas)):
        return untold(check, f"betas {recipe.betas}: with β₁² ≥ β₂ there is no largest update")
    norms = np.sqrt(gaps["before"]), np.sqrt(gaps["after"])
    apart = (norms[1] - gaps["keep"] * norms[0]).abs()
    way = np.sqrt(gaps["way_sq"]).fillna(apart)
    # Weights are rounded where they are stored, and at every update: to float32, or to what they are stored in.
    span = gaps["step"] - gaps["start"]
    slack = (2 + span) * np.sqrt(gaps["rounding"]) + (2e-7 + span * 2.0**-24) * np.maximum(*norms)
    bound = np.sqrt(gaps["numel"]) * gaps["most"]
    rows = gaps.assign(way=way / np.sqrt(gaps["numel"]), over=way > 1.001 * bound + slack, share=way / bound)
    worst = rows.sort_values("share").groupby(["start", "step"], as_index=False).last()
    worst = worst.assign(over=rows.groupby(["start", "step"])["over"].any().to_numpy())
    numbers = [
        number(
            CONTRADICTS if row.over else AGREES, int(row.step), int(row.step - row.start), row.tensor,
            measured=row.way, high=row.most, expected=row.most,
        )
        for row in worst.itertuples()
    ]  # fmt: skip
    over = rows[rows["over"]]
    count = len(worst)
    if over.empty:
        top = worst.loc[worst["share"].fillna(0).idxmax()]
        most = f"{top['share']:.2f} of that at most"
        sentence = f"in {count} gaps no tensor came farther than gradients can take it ({most})"
        return Finding(check, sentence, numbers)
    one = over.sort_values("share").iloc[-1]
    far = f"{one['share']:.3g} times the bound" if one["most"] else "where the recipe's learning rate is 0"
    times = over.groupby(["start", "step"]).ngroups
    sentence = (
        f"in {times} of {count} gaps weights came farther than any gradients take them at the recipe's η: "
        f"{one['tensor']} by {one['way']:.3g} (rms) from step {one['start']} to {one['step']}, {far}"
    )
    return Finding(check, sentence, numbers)
