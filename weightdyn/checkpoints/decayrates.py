"""What the decay clock says of a recipe's decay and schedule: that they fit, or what would make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from weightdyn.checkpoints.distances import Size, log_kept
from weightdyn.checkpoints.findings import AGREES, CONTRADICTS, Finding, number, untold
from weightdyn.checkpoints.recipe import Recipe

_SPREAD = 5.0  # standard errors of the clock that are allowed for: there are many gaps
_TOLERANCE = 2e-3  # relative, of ηλ: how trainers round their schedules


class Told(NamedTuple):
    """−Σ ln(1−ηλ) of gaps, as rows without gradient tell it."""

    tensor: str
    decay: float  # the recipe's λ
    start: np.ndarray
    step: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray

    @property
    def span(self) -> np.ndarray:
        """Updates of each gap."""
        return self.step - self.start

    def fits(self, expected: np.ndarray) -> bool:
        """Whether what is expected lies within the ends in every gap."""
        slack = _TOLERANCE * np.abs(expected)
        return bool(np.all((self.low <= expected + slack) & (expected - slack <= self.high)))

    def ratios(self, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measured over expected, and its ends; of the gaps in which something is expected."""
        some = expected > 0
        return tuple(each[some] / expected[some] for each in (self.low, self.middle, self.high))  # type: ignore[return-value]

    def factor(self, expected: np.ndarray) -> tuple[float, float] | None:
        """The range of one factor on all that is expected, or None if no one factor fits."""
        if np.any(self.low[expected <= 0] > 0) or not np.any(expected > 0):
            return None
        ratios, _, high = self.ratios(expected)
        low, high = float(ratios.max()) * (1 - _TOLERANCE), float(high.min()) * (1 + _TOLERANCE)
        return (low, high) if low <= high else None

    def part(self, where: np.ndarray | slice) -> Told:
        """Some of the gaps."""
        return self._replace(
            **{name: getattr(self, name)[where] for name in ("start", "step", "low", "middle", "high")}
        )


def decayed_tensors(clock: pd.DataFrame, recipe: Recipe) -> tuple[list[Finding], Told | None]:
    """Which tensors decay; and of one that does, with the most rows that tell, what they tell."""
    check = "decayed"
    findings: list[Finding] = []
    best, most = None, 0
    for name, own in clock.groupby("tensor", sort=False, observed=True):
        told = own[np.isfinite(own["lr_decay"])]
        if told.empty:
            continue
        component = str(own["component"].iloc[0])
        expected = recipe.decay_of(component, str(name))
        low, high = told["lr_decay_low"].max(), told["lr_decay_high"].max()
        decays = bool((told["lr_decay"] != 0).any() and low > 0)
        rows, of = int(told["rows"].iloc[0]), int(told["of"].iloc[0])
        lr = float(recipe.lr_at(np.arange(int(told["step"].min()), int(told["step"].max()) + 1)).max())
        good = decays == (expected > 0) or lr == 0
        is_growing = bool((told["lr_decay_high"] < 0).all())
        if is_growing:
            continue  # the order says it
        one = number(
            AGREES if good else CONTRADICTS, int(told["step"].max()),
            int(told["step"].max() - (told["step"] - told["span"]).min()), str(name),
            measured=float(told["lr_decay"].median()), low=float(low), high=float(high), expected=lr * expected,
        )  # fmt: skip
        which = f"the {rows} of {of} rows of {name} that get no gradient"
        does = "shrink, so it decays" if decays else "stay as they are to the last bit, so it is not decayed"
        says = f"the recipe's λ of it is {expected:g}"
        sentence = f"{which} {does}, and {says}" if good else f"{which} {does}; {says}"
        findings.append(Finding(check, sentence, [one]))
        if decays and rows > most:
            best, most = (told, str(name), expected or recipe.weight_decay), rows
    if not findings:
        notes = [note for note in dict.fromkeys(clock["note"]) if note]
        findings.append(
            untold(check, f"no row without gradient tells which tensors decay ({'; '.join(notes[:2])})")
        )
    if best is None:
        return findings, None
    told, name, decay = best
    told = told.sort_values("step")
    span = told["span"].to_numpy(float)
    low, middle, high = (
        -span * np.log1p(-told[each].to_numpy()) for each in ("lr_decay_low", "lr_decay", "lr_decay_high")
    )
    rounding = span * 2.0**-25  # which the ends of ηλ have once, whatever the spread
    step = told["step"].to_numpy(np.int64)
    wider = _SPREAD / 2
    low = middle - wider * np.maximum(middle - low - rounding, 0) - rounding
    high = middle + wider * np.maximum(high - middle - rounding, 0) + rounding
    return findings, Told(name, decay, step - told["span"].to_numpy(np.int64), step, low, middle, high)


def decay_rate(told: Told | None, recipe: Recipe, size: Size) -> Finding:
    """Whether ηλ is the recipe's, or what is known of how it differs; `size` may tell η from λ."""
    check = "decay rate"
    if told is None:
        return untold(check, "no row without gradient that decays, so ηλ is unknown")
    if told.decay == 0:
        peak = float((told.middle / told.span).max())
        return Finding(
            check, f"ηλ is up to {peak:.3g} per update, and the recipe has no decay",
            [number(CONTRADICTS, tensor=told.tensor, measured=peak, expected=0.0)],
        )  # fmt: skip
    lr = recipe.lr_at(np.arange(1, int(told.step.max()) + 1))
    expected = _totals(told, lr, told.decay)
    slack = _TOLERANCE * np.abs(expected)
    fit = (told.low <= expected + slack) & (expected - slack <= told.high)
    rates = {
        name: -np.expm1(-each / told.span)
        for name, each in (
            ("measured", told.middle),
            ("low", told.low),
            ("high", told.high),
            ("expected", expected),
        )
    }
    rows = [
        number(
            AGREES if fit[i] else CONTRADICTS, int(told.step[i]), int(told.span[i]), told.tensor,
            **{name: float(each[i]) for name, each in rates.items()},
        )
        for i in range(len(fit))
    ]  # fmt: skip
    count = f"{len(fit)} gaps" if len(fit) > 1 else "the one gap"
    if fit.all():
        shifted = [k for k in (-1, 1) if not told.fits(_totals(told, _shifted(recipe, lr, k), told.decay))]
        _, ratio, _ = told.ratios(expected)
        between = f"measured over expected {ratio.min():.4f} to {ratio.max():.4f}" if len(ratio) else "0"
        shows = "would show" if len(shifted) == 2 else "would not show"
        sentence = f"ηλ is the recipe's in {count} ({between}); a schedule shifted by one update {shows}"
        return Finding(check, sentence, rows)
    said = "; or ".join(_fitting(told, recipe, lr, expected, size)) or _course(told, lr, expected)
    return Finding(check, f"{said}; {_reading(told)}", rows)


def _totals(told: Told, lr: np.ndarray, decay: float) -> np.ndarray:
    """−Σ ln(1−ηλ) over each gap; `lr` is of the updates 1, 2, …"""
    total = np.append(0.0, np.cumsum(-log_kept(lr, decay)))
    return total[told.step] - total[told.start]


def _shifted(recipe: Recipe, lr: np.ndarray, by: int) -> np.ndarray:
    """The learning rates where update t takes that of update t + by, the ends continued as straight lines."""
    if by > 0:
        try:
            after = recipe.lr_at(np.arange(len(lr) + 1, len(lr) + by + 1))
        except ValueError:  # an array ends there
            after = np.repeat(lr[-1], by)
        return np.append(lr, after)[by:]
    slope = lr[1] - lr[0] if len(lr) > 1 else 0.0
    before = lr[0] + slope * np.arange(by, 0)
    return np.append(np.maximum(before, 0.0), lr)[: len(lr)]


def _fitting(told: Told, recipe: Recipe, lr: np.ndarray, expected: np.ndarray, size: Size) -> Iterator[str]:
    """What one change to the recipe would make it fit: a factor, a shift, an end, a factor from a step on."""
    count = f"{len(told.step)} gaps" if len(told.step) > 1 else "the one gap"
    _, ratio, _ = told.ratios(expected)
    about = float(np.median(ratio)) if len(ratio) else 0.0
    found = shifted = None
    if 0 < about * told.decay * lr.max() < 1:
        scaled = _totals(told, lr, about * told.decay)  # ln(1 − ηλ) is not quite in proportion
        if found := told.factor(scaled):
            yield _factor_sentence(told, scaled, about, found, size, count)
    for by in (-1, 1, -2, 2):
        if told.fits(_totals(told, _shifted(recipe, lr, by), told.decay)):
            shifted, way, n = True, ("later" if by < 0 else "earlier"), abs(by)
            yield (
                f"the schedule lies {n} update{'s' * (n > 1)} {way} than the recipe's: ηλ fits in {count} if "
                f"update t takes the learning rate of update t {'−' if by < 0 else '+'} {n}"
            )
            break
    top = int(np.argmax(lr))
    if len(told.step) > 2 and (end := _other_end(told, lr, top)) is not None:
        ends, own = end * 1.0, lr[-1] / lr[top]
        yield (
            f"ηλ falls to {ends:.3g} of its peak by step {told.step[-1]}, where the recipe has {own:.3g}: with "
            f"another end, and the recipe's peak, warm-up and shape, it fits in {count}"
        )
    if not found and not shifted and (change := _change(told, expected)):
        yield change


def _course(told: Told, lr: np.ndarray, expected: np.ndarray) -> str:
    """Where it does not fit: at one step, in the warm-up, or all along."""
    if place := _misplaced(told, lr, expected):
        return place
    top = int(np.argmax(lr))
    late = told.start >= top
    _, ratio, _ = told.ratios(expected)
    if late.any() and not late.all() and told.part(late).fits(expected[late]):
        _, ratio, _ = told.part(~late).ratios(expected[~late])
        return (
            f"ηλ is the recipe's from step {told.start[late].min()} on and {_few(ratio)} of it in the "
            f"{(~late).sum()} gaps before: another warm-up"
        )
    return (
        f"no factor, shift or end makes ηλ the recipe's: measured over expected is {_few(ratio)} in the course of "
        f"{len(told.step)} gaps"
    )


def _few(ratio: np.ndarray) -> str:
    picked = dict.fromkeys(f"{ratio[i]:.3g}" for i in (0, len(ratio) // 2, -1)) if len(ratio) else {"–": None}
    return ", ".join(picked)


def _factor_sentence(
    told: Told, scaled: np.ndarray, about: float, found: tuple[float, float], size: Size, count: str
) -> str:
    ratio = about * told.ratios(scaled)[1]
    factor = float(np.clip(np.median(ratio), about * found[0], about * found[1]))
    between = f" ({ratio.min():.4g} to {ratio.max():.4g})" if len(ratio) > 1 else ""
    decay = f"λ was {told.decay * factor:.3g} where the recipe has {told.decay:.3g}"
    peak = f"η was {factor:.3g} times the recipe's"
    said = f"ηλ is {factor:.3g} times the recipe's in {'all ' * (len(ratio) > 1)}{count}{between}"
    alone, together = size.told and size.holds(1.0), size.told and size.holds(factor)
    if alone and not together:
        return f"{said}: {decay}, for updates are as large as its η makes them"
    if together and not alone:
        return f"{said}: {peak}, for updates are larger or smaller as well"
    return f"{said}: {decay}, or {peak}"


def _other_end(told: Told, lr: np.ndarray, top: int) -> float | None:
    """η at the last step over the peak, if η′ = η + κ(peak − η) behind the peak fits; None if no κ does."""
    below = np.where(np.arange(len(lr)) > top, lr[top] - lr, 0.0)
    at_0, at_1 = (_totals(told, lr + kappa * below, told.decay) for kappa in (0.0, 1.0))
    moved = at_1 - at_0
    if not moved[-1] > 0:
        return None
    kappa = float(np.sum((told.middle - at_0) * moved) / np.sum(moved**2))
    if not np.all(lr + kappa * below >= 0) or not told.fits(_totals(told, lr + kappa * below, told.decay)):
        return None
    return float((lr[-1] + kappa * below[-1]) / lr[top])


def _misplaced(told: Told, lr: np.ndarray, expected: np.ndarray) -> str | None:
    """A step whose both gaps do not fit while they do together, and all others do."""
    for i in range(len(expected) - 1):
        around = np.isin(np.arange(len(expected)), (i, i + 1))
        if (
            len(expected) < 4
            or told.step[i] != told.start[i + 1]
            or not told.part(~around).fits(expected[~around])
        ):
            continue
        both = told._replace(
            **{name: np.array([getattr(told, name)[around].sum()]) for name in ("low", "middle", "high")}
        )
        if both.fits(np.array([expected[around].sum()])):
            passed = np.cumsum(-log_kept(lr[told.start[i] :], told.decay))
            place = told.start[i] + int(np.argmin(np.abs(passed - told.middle[i]))) + 1
            return (
                f"ηλ is the recipe's but in the gaps before and after step {told.step[i]}, and over both together: "
                f"that checkpoint's weights are of about step {place}"
            )
    return None


def _change(told: Told, expected: np.ndarray) -> str | None:
    """A factor up to a step and another from there on; the step that leaves the least apart."""
    for k in range(1, len(told.step)):
        before, after = (told.part(part).factor(expected[part]) for part in (slice(None, k), slice(k, None)))
        if before is None or after is None or (len(told.step) - k < 2 and k < 2):
            continue
        words = [
            "the recipe's" if low <= 1 <= high else f"{(low + high) / 2:.3g} times the recipe's"
            for low, high in (before, after)
        ]
        return f"ηλ is {words[0]} up to step {told.step[k - 1]} and {words[1]} from there on"
    return None


def _reading(told: Told) -> str:
    """Peak and end of ηλ by the clock alone."""
    rate = -np.expm1(-told.middle / told.span)
    top = int(np.argmax(rate))
    return (
        f"the clock reads up to {rate[top]:.3g} (steps {told.start[top]} to {told.step[top]}), and "
        f"{rate[-1]:.3g} in the last gap, {rate[-1] / rate[top]:.3g} of it"
    )
