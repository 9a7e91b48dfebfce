"""What the weights of a series say against what a recipe says.

A published recipe is prose, and some of it is wrong; a wrong η or λ makes recovered forces wrong without a word.
But the weights have felt the true ones:

- Rows that get no gradient shrink by Π(1−ηλ) (`clock`): the product ηλ, gap by gap, and which tensors decay.
- Adam's first update is ±η in nearly every weight, so that of step 1 tells η₁.
- Later updates are as large as gradient noise makes them, within a factor that logged trainings tell. The
  displacement between neighbours tells η times the update's scale, roughly, and so η apart from λ.
- No gradients whatever make Adam's update larger than a bound, so the weights cannot have come farther.
- Checkpoints that are copies, or stand in each other's place, or belong elsewhere, have other distances.

Each finding is a sentence with its numbers, and nothing is claimed that these do not carry: what was not checked,
and why, is a sentence too.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.checkpoints.clock import decay_clock
from weightdyn.checkpoints.measure import identical_steps, pieces_of
from weightdyn.checkpoints.recipe import Recipe
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.core.checks import check_instance
from weightdyn.core.naming import split_label
from weightdyn.core.progress import Progress
from weightdyn.core.tables import AUDIT_TABLE, check_columns
from weightdyn.record.runlog import RunLog

STEADY = (0.3, 1.5)
"""Where ‖W_b − ΠW_a‖² lies as a multiple of what white gradient noise makes: the median over gaps of that over the
blocks' matrices. In eight logged trainings it lay from 0.36 to 1.25, whether gaps were 25 or 400 updates long
(data/audit.md); here is a fifth more on either side. Twice the η is a factor of 4."""

FIRST = (0.9, 1.02)
"""The same of the first update alone, where u is ±1 but for Adam's ε: logged, 0.998 to 1.000."""

EARLY = 0.6
"""And at least in gaps that end by update 8, where gradients agree more than noise does: logged, 1.2 to 3.6."""

_BLOCK = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
_SETTLED = 50  # updates after which the moments, and the first agreement of gradients, are over
_GAP = (10.0, 500.0)  # updates of equal η between checkpoints for which STEADY was measured
_FEW = 3  # gaps that a median needs
_PERSISTS = (
    1.4  # way² over two gaps against one, for the updates: logged 0.8 to 1.3, 2 where gradients persist
)
_EPS = 1e-7  # Adam's ε beyond which it may make updates smaller
_SPREAD = 5.0  # standard errors of the clock that are allowed for: there are many gaps
_TOLERANCE = 2e-3  # relative, of ηλ: how trainers round their schedules
_PICKED = 16  # matrices that are compared to tell which of two checkpoints is nearer
_AS_FAR = 1.4  # times as far as its neighbours: worth a look
_ASTRAY = 4.0  # times as far², on both sides, as both neighbours are from each other

UNKNOWN, AGREES, CONTRADICTS = "unknown", "agrees", "contradicts"

_Far = Callable[[int, int], float]


@dataclass(frozen=True)
class Audit:
    """What `audit_recipe` found; it prints as sentences.

    Attributes:
        source: what was audited, in a few words.
        table: the columns of `AUDIT_TABLE`, one row for each number that was held against the recipe.
        clock: the table of `decay_clock`, for `plot.decay_clock(audit.clock, recipe)`; None where it was not read.
    """

    source: str
    table: pd.DataFrame
    clock: pd.DataFrame | None = None

    @property
    def findings(self) -> pd.DataFrame:
        """One row for each finding: `check`, `verdict`, `sentence`; contradictions first."""
        order = (CONTRADICTS, AGREES, UNKNOWN)
        found = self.table.assign(verdict=pd.Categorical(self.table["verdict"], order, ordered=True))
        found = found.groupby(["check", "sentence"], sort=False)["verdict"].min().reset_index()
        found = found.sort_values("verdict", kind="stable", ignore_index=True).astype({"verdict": str})
        return found[["check", "verdict", "sentence"]]

    @property
    def verdict(self) -> str:
        """Of all: "contradicts" if a finding does, "agrees" if ηλ or the size of updates does, else "unknown"."""
        found = self.findings
        if (found["verdict"] == CONTRADICTS).any():
            return CONTRADICTS
        told = found["check"].isin(("decay rate", "update size", "first update"))
        return AGREES if (told & (found["verdict"] == AGREES)).any() else UNKNOWN

    @property
    def contradictions(self) -> list[str]:
        """The sentences of the findings that contradict the recipe."""
        found = self.findings
        return found.loc[found["verdict"] == CONTRADICTS, "sentence"].tolist()

    def __str__(self) -> str:
        found = self.findings
        count = len(self.contradictions)
        head = {
            CONTRADICTS: f"weights and recipe contradict each other in {count} finding{'s' * (count != 1)}",
            AGREES: "nothing contradicts the recipe",
            UNKNOWN: "the weights tell neither for the recipe nor against it",
        }[self.verdict]
        lines = [f"{self.source}: {head}.", ""]
        lines += [f"{row.verdict:<12}{row.check}: {row.sentence}" for row in found.itertuples()]
        return "\n".join(lines)


def audit_recipe(
    source: Checkpoints | RunLog | pd.DataFrame | str | os.PathLike[str],
    recipe: Recipe,
    *,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = None,
) -> Audit:
    """Hold a recipe against the weights of the training that it is said to be of.

    What is checked, and against what:

        decay rate     Π(1−ηλ) of rows without gradient (`decay_clock`), gap by gap: a factor on ηλ, a schedule that
                       is shifted by up to two updates, another end, a change in mid-run, another warm-up or shape
        decayed        whether the tensors that have such rows shrink, against `recipe.decays`
        first update   ‖W₁ − (1−η₁λ)W₀‖² = n·(η₁s)² where steps 0 and 1 are there, s = recipe.update_scale
        update size    ‖W_b − ΠW_a‖² against what white noise makes of η·s (`noise_displacement`), within `STEADY`
        bound          ‖W_b − ΠW_a‖ ≤ √n·c·s·Ση (`largest_update`); of norms alone | ‖W_b‖ − Π‖W_a‖ | likewise
        order          steps that hold the same weights, that stand in each other's place, or that belong elsewhere

    Args:
        source: the checkpoints: a `Checkpoints`, or what it opens (a folder, a run directory or `RunLog`,
            "hf://owner/name"). From the hub each is downloaded twice, to be measured and for the clock, unless it
            was measured before or is kept (`Checkpoints(…, keep=True)`). Or the table of `Checkpoints.measure`,
            best with gram="band": then the clock is not read.
        recipe: what is said of the training: η of every update, λ and what decays, betas, ε, update_scale.
        cache: as in `Checkpoints.measure`.
        progress: show bars; None: where someone watches.

    Returns:
        An `Audit`. Its verdict is "agrees" if nothing contradicts and ηλ or the size of updates was told.

    The ranges of sizes are of trainings with a million weights, from their 50th update on, warm-up left out. They
    find η that is twice or half the recipe's, not a third more. The bound and the clock hold for any training.

    Raises:
        TypeError, ValueError: an argument is none of these; fewer than two checkpoints.
        CheckpointError: a checkpoint is damaged (unless the series has errors="skip").

    Source: the first update and the bound, Kingma and Ba, arXiv 1412.6980, section 2.1 (the bound there is of
    sparse and steady gradients; that for any is Cauchy and Schwarz's).

    >>> from weightdyn.checkpoints.recipe import Recipe
    >>> measured = pd.DataFrame({"step": [0, 10], "tensor": "w", "component": "up", "numel": 100,
    ...                          "norm_sq": [4.0, 9.0]})
    >>> audit = audit_recipe(measured, Recipe(lr=1e-3))
    >>> audit.verdict, audit.contradictions[0][:64]
    ('contradicts', 'in 1 of 1 gaps weights came farther than any gradients take them')
    """
    check_instance("recipe", recipe, Recipe, "a Recipe, such as Recipe.preset('pythia-70m')")
    if isinstance(source, pd.DataFrame):
        measured = _checked_table(source)
        return _audit("the measured table", measured, recipe, None, None)
    series = _opened(source)
    if len(series) < 2:
        raise ValueError(f"source must have two checkpoints or more, got {len(series)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*identical weights", category=UserWarning)
        measured = series.measure("band", weibull=False, cache=cache, progress=progress)
    clock = _clock(series, progress)
    return _audit(repr(series), measured, recipe, clock, series)


def warn_of_contradictions(source: Any, measured: pd.DataFrame, recipe: Recipe) -> None:
    """Warn, once, of what a measured series says against a recipe, as far as that is cheap to know.

    Args:
        source: what was measured; if it lies on a disk, its clock is read too.
        measured: the table of `Checkpoints.measure`; what it lacks is not checked.
        recipe: the recipe that forces are recovered with.
    """
    series = None
    if not isinstance(source, pd.DataFrame) and not str(source).startswith("hf://"):
        series = _opened(source)
    if series is not None and not series.local:
        series = None
    clock = None if series is None else _clock(series, False)
    if not isinstance(source, pd.DataFrame):
        measured = measured.drop(columns="hash")  # `measure` has warned of them
    if said := _audit("", measured, recipe, clock, series).contradictions:
        first = " ".join(f"({i}) {each.split('; ')[0]}." for i, each in enumerate(said, 1))
        warnings.warn(
            f"the weights contradict the recipe, and forces recovered with it may be wrong: {first} "
            "audit_recipe(source, recipe) says more",
            stacklevel=3,
        )


def _opened(source: Any) -> Checkpoints:
    return source if isinstance(source, Checkpoints) else Checkpoints(source)


def _checked_table(source: pd.DataFrame) -> pd.DataFrame:
    check_columns(
        source, ("step", "tensor", "numel", "norm_sq"), "table of Checkpoints.measure", argument="source"
    )
    norms = source["norm_sq"].to_numpy(float, na_value=np.nan)
    if len(bad := source[~(np.isfinite(norms) & (norms >= 0))]):
        one = bad.iloc[0]
        raise ValueError(
            f"source: norm_sq must be a finite ‖W‖² >= 0; that of {one['tensor']} at step {one['step']} is "
            f"{one['norm_sq']}; leave that checkpoint out"
        )
    if source["step"].nunique() < 2:
        raise ValueError(
            f"source must have two checkpoints or more, got the steps {sorted(set(source['step']))}"
        )
    if source.duplicated(["tensor", "step"]).any():
        raise ValueError("source has two rows for one tensor at one step; keep one of them")
    return source


def _clock(series: Checkpoints, progress: Progress) -> pd.DataFrame | None:
    """The decay clock; None where no tensor has rows that could tell. What it warns of is a sentence here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no row of", category=UserWarning)
        try:
            return decay_clock(series, progress=progress)
        except ValueError:  # no matrix with rows
            return None


# How large updates are, in numbers.


def largest_update(betas: tuple[float, float]) -> float:
    """The largest |u| that any gradients give an entry of Adam's update.

        |m̂|/√v̂ ≤ (1−β₁)/√((1−β₂)(1−β₁²/β₂))       1 at the first update; inf for β₁² ≥ β₂

    >>> round(largest_update((0.9, 0.95)), 3), round(largest_update((0.9, 0.999)), 2)
    (1.164, 7.27)
    """
    beta1, beta2 = betas
    if beta1 == 0:
        return 1.0 if beta2 == 0 else 1 / math.sqrt(1 - beta2)
    if beta1**2 >= beta2:
        return math.inf
    return max(1.0, (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)))


def noise_displacement(lr: np.ndarray, beta1: float, weight_decay: float = 0.0, start: int = 0) -> float:
    """Mean square per weight of W_b − Π(1−ηλ)W_a where gradients are white noise of a steady size.

        W_b − ΠW_a = Σₛ hₛ·g̃ₛ,    hₛ = Σₜ ηₜ·Π_{t<r≤b}(1−ηᵣλ)·(1−β₁)β₁^{t−s}/(1−β₁ᵗ)

    over the gradients s of the gap, and of those before it that momentum still carries into it.

    Args:
        lr: η of the updates a+1 … b.
        beta1: β₁ of the first moment.
        weight_decay: decoupled decay λ.
        start: a, updates before the gap.

    >>> noise_displacement(np.array([0.1]), beta1=0.9)  # the first update is η
    0.01
    >>> round(noise_displacement(np.full(1000, 0.1), beta1=0.9, start=10**6), 2)  # far on, η² for each
    9.91
    """
    from scipy.signal import lfilter  # here: it takes a while to import

    updates = np.arange(start + 1, start + len(lr) + 1, dtype=float)
    kept = np.log1p(-lr * weight_decay)
    later = np.exp(np.cumsum(kept[::-1])[::-1] - kept)
    fresh = lr * later * (1 - beta1) / (1 - beta1**updates)
    carried = np.asarray(lfilter([1.0], [1.0, -beta1], fresh[::-1]))[::-1]
    before = beta1**2 * (1 - beta1 ** (2 * start)) / (1 - beta1**2) * carried[0] ** 2
    return float(carried @ carried + before)


# What is found.


class _Finding(NamedTuple):
    """A sentence, and the numbers that it is of."""

    check: str
    sentence: str
    rows: list[dict[str, Any]]


def _number(
    verdict: str, step: Any = pd.NA, span: Any = pd.NA, tensor: str = "", *, measured: float = math.nan,
    low: float = math.nan, high: float = math.nan, expected: float = math.nan,
) -> dict[str, Any]:  # fmt: skip
    return {"step": step, "span": span, "tensor": tensor, "measured": measured, "low": low, "high": high,
            "expected": expected, "verdict": verdict}  # fmt: skip


def _untold(check: str, reason: str) -> _Finding:
    return _Finding(check, reason, [_number(UNKNOWN)])


def _audit(
    name: str, measured: pd.DataFrame, recipe: Recipe, clock: pd.DataFrame | None, series: Checkpoints | None
) -> Audit:
    gaps = _gaps(measured, recipe)
    far = None if series is None else _distances(series, _picked(gaps), recipe)
    order, suspects = _order(measured, gaps, recipe, clock, far)
    sound = gaps[~gaps["start"].isin(suspects) & ~gaps["step"].isin(suspects)]
    findings = [*order, _bound(sound, recipe)]
    decayed, told = [], None
    if clock is not None:
        clock = clock[~clock["step"].isin(suspects) & ~(clock["step"] - clock["span"]).isin(suspects)]
        decayed, told = _decayed(clock, recipe)
    first = _first_update(sound, recipe)
    scale = _update_size(sound, recipe, first, far)
    rate = _decay_rate(told, recipe, first if first.told else scale)
    if rate.rows[0]["verdict"] == AGREES and scale.verdict == CONTRADICTS:
        scale = scale._replace(finding=_beside_rate(scale.finding))
    findings += [first.finding, scale.finding, *decayed]
    if clock is None:
        why = "the clock was not read: only the table is known" if series is None else "no tensor has rows"
        rate = _untold("decay rate", f"{why}, so ηλ is unknown")
    findings.append(rate)
    rows = [{"check": each.check, **row, "sentence": each.sentence} for each in findings for row in each.rows]
    table = pd.DataFrame(rows, columns=list(AUDIT_TABLE)).astype({"step": "Int64", "span": "Int64"})
    return Audit(name, table, clock)


def _beside_rate(finding: _Finding) -> _Finding:
    """The finding on the size of updates, where ηλ is the recipe's."""
    also = "; ηλ is the recipe's, so λ is off the other way, or something else scales the updates"
    return finding._replace(sentence=finding.sentence + also)


def _gaps(measured: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """One row for each tensor and gap: how far it came, and what the recipe makes of that."""
    last = int(measured["step"].max())
    first = int(measured["step"].min())
    lr = recipe.lr_at(np.arange(first + 1, last + 1)) * 1.0
    most = largest_update(recipe.betas) * recipe.update_scale
    known: dict[tuple[float, int, int], dict[str, float]] = {}

    def of_recipe(decay: float, a: int, b: int) -> dict[str, float]:
        if (decay, a, b) not in known:
            rates = lr[a - first : b - first]
            kept = np.log1p(-rates * decay)
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
        for i, (a, b) in enumerate(itertools.pairwise(steps)):
            of = of_recipe(decay, a, b)
            way_sq = norms[i + 1] + of["keep"] ** 2 * norms[i] - 2 * of["keep"] * _dot(own, i + 1, a)
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


def _dot(rows: pd.DataFrame, i: int, step: int) -> float:
    """⟨W, W⟩ of the i-th row with an earlier step; NaN where it was not measured."""
    if "dots" not in rows or np.ndim(rows["dots"].iloc[i]) == 0:
        return math.nan
    at = np.flatnonzero(np.asarray(rows["dot_steps"].iloc[i]) == step)
    return float(rows["dots"].iloc[i][at[0]]) if len(at) else math.nan


# Distances.


class _Size(NamedTuple):
    """How large updates are, as multiples of the recipe's η·s."""

    finding: _Finding
    verdict: str
    low: float = 0.0
    high: float = math.inf

    @property
    def told(self) -> bool:
        return self.verdict != UNKNOWN

    def holds(self, factor: float) -> bool:
        return self.low <= factor <= self.high


def _ratios(gaps: pd.DataFrame) -> pd.DataFrame:
    """For each gap the median over the blocks' matrices of way² over that of noise, where rounding leaves it."""
    rows = gaps[
        gaps["component"].isin(_BLOCK) & (gaps["noise"] > 0) & (gaps["way_sq"] > 2 * gaps["rounding"])
    ]
    ratio = (rows["way_sq"] - rows["rounding"]) / (rows["numel"] * rows["noise"])
    rows = rows.assign(ratio=ratio, blur=rows["rounding"] / rows["way_sq"])
    keys = ["start", "step"]
    return rows.groupby(keys)[["ratio", "equal", "total", "blur"]].median().dropna().reset_index()


def _first_update(gaps: pd.DataFrame, recipe: Recipe) -> _Size:
    check = "first update"
    rows = gaps[(gaps["start"] == 0) & (gaps["step"] == 1)]
    if rows.empty:
        return _Size(
            _untold(check, "steps 0 and 1 are not both there, so η of the first update is unknown"), UNKNOWN
        )
    if rows["way_sq"].isna().any():
        reason = (
            "there are no inner products of steps 0 and 1 (gram='band'), so η of the first update is unknown"
        )
        return _Size(_untold(check, reason), UNKNOWN)
    expected = float(rows["total"].iloc[0])
    blocks = rows[rows["component"].isin(_BLOCK)]
    told = blocks[blocks["way_sq"] > 100 * blocks["rounding"]]
    still = bool((rows["way_sq"] <= 1e-14 * rows["before"]).all())
    if not still and len(told) < max(1, len(blocks) / 2):
        reason = "rounding of the stored weights hides the first update, or no matrix of a block is known"
        return _Size(_untold(check, reason), UNKNOWN)
    rms = 0.0 if still else math.sqrt(float((told["way_sq"] / told["numel"]).median()))
    # A scale that comes of bias corrections is not there yet at the first update.
    scales = {1.0, recipe.update_scale}
    low, high = (math.sqrt(each) for each in FIRST)
    low = low if recipe.eps <= _EPS else 0.0
    good = [s for s in scales if low * expected * s <= rms <= high * expected * s]
    ends: dict[str, Any] = {"low": rms / high, "high": rms / low if low else math.inf, "expected": expected}
    row = _number(AGREES if good else CONTRADICTS, 1, 1, measured=rms, **ends)
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
        return _Size(_Finding(check, sentence, [row]), UNKNOWN)
    return _Size(_Finding(check, sentence, [row]), verdict, rms / high / expected, ends["high"] / expected)


def _of_times(measured: float, expected: float) -> str:
    return f", {measured / expected:.3g} of it" if expected > 0 else ""


def _update_size(gaps: pd.DataFrame, recipe: Recipe, first: _Size, far: _Far | None) -> _Size:
    check = "update size"
    found = _ratios(gaps)
    if found.empty:
        known = gaps.loc[gaps["component"].isin(_BLOCK), "way_sq"].notna().any()
        reason = "rounding hides it" if known else "there are no inner products of neighbours (gram='band')"
        return _Size(_untold(check, f"the size of updates is unknown: {reason}"), UNKNOWN)
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
            return _Size(_untold(check, reason), UNKNOWN)
        steady, (low, high) = early, (EARLY, math.inf)
    else:
        low, high = STEADY
    middle = float(steady["ratio"].median())
    low = low if recipe.eps <= _EPS else 0.0
    if middle > high and (reason := _persistent(steady, far)):
        return _Size(
            _untold(check, f"updates moved weights {middle:.3g} times as far² as white noise does, {reason}"),
            UNKNOWN,
        )
    verdict = AGREES if low <= middle <= high else CONTRADICTS
    rows = [
        _number(
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
    ends = math.sqrt(middle / high), math.sqrt(middle / low) if low else math.inf
    if verdict == AGREES:
        return _Size(
            _Finding(
                check,
                f"updates moved weights {middle:.2f} times as far² as white noise does at the recipe's η ({of}); "
                f"logged trainings have {low:g} to {high:g}",
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
        f"updates moved weights {middle:.3g} times as far² as white noise does at the recipe's η ({of}), where "
        f"logged trainings have {low:g} to {high:g}: η times the update's scale is {about} the recipe's"
    )
    frozen = math.sqrt(1 - recipe.betas[1]) / (1 - recipe.betas[0])
    if first.verdict == AGREES and ends[0] <= frozen <= ends[1] and recipe.update_scale == 1:
        sentence += (
            f"; the first update is the recipe's, so the factor came later, as bias corrections do that stay those "
            f"of the first update: √(1−β₂)/(1−β₁) = {frozen:.2f} (update_scale)"
        )
    return _Size(_Finding(check, sentence, rows), verdict, *ends)


def _persistent(steady: pd.DataFrame, far: _Far | None) -> str:
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


def _bound(gaps: pd.DataFrame, recipe: Recipe) -> _Finding:
    check = "bound"
    if gaps.empty:
        return _untold(check, "no two neighbouring checkpoints are sound")
    if math.isinf(largest_update(recipe.betas)):
        return _untold(check, f"betas {recipe.betas}: with β₁² ≥ β₂ there is no largest update")
    norms = np.sqrt(gaps["before"]), np.sqrt(gaps["after"])
    apart = (norms[1] - gaps["keep"] * norms[0]).abs()
    way = np.sqrt(gaps["way_sq"]).fillna(apart)
    # The training's own float32 rounds at every update, and inner products at the end.
    slack = 2 * np.sqrt(gaps["rounding"]) + (2e-7 + (gaps["step"] - gaps["start"]) * 2.0**-24) * np.maximum(
        *norms
    )
    bound = np.sqrt(gaps["numel"]) * gaps["most"]
    rows = gaps.assign(way=way / np.sqrt(gaps["numel"]), over=way > 1.001 * bound + slack, share=way / bound)
    worst = rows.sort_values("share").groupby(["start", "step"], as_index=False).last()
    worst = worst.assign(over=rows.groupby(["start", "step"])["over"].any().to_numpy())
    numbers = [
        _number(
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
        return _Finding(check, sentence, numbers)
    one = over.sort_values("share").iloc[-1]
    far = f"{one['share']:.3g} times the bound" if one["most"] else "where the recipe's learning rate is 0"
    times = over.groupby(["start", "step"]).ngroups
    sentence = (
        f"in {times} of {count} gaps weights came farther than any gradients take them at the recipe's η: "
        f"{one['tensor']} by {one['way']:.3g} (rms) from step {one['start']} to {one['step']}, {far}"
    )
    return _Finding(check, sentence, numbers)


# What the clock says.


class _Told(NamedTuple):
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
        return self.step - self.start

    def fits(self, expected: np.ndarray) -> bool:
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

    def part(self, where: np.ndarray | slice) -> _Told:
        return self._replace(
            **{name: getattr(self, name)[where] for name in ("start", "step", "low", "middle", "high")}
        )


def _decayed(clock: pd.DataFrame, recipe: Recipe) -> tuple[list[_Finding], _Told | None]:
    """Which tensors decay; and of one that does, with the most rows that tell, what they tell."""
    check = "decayed"
    findings: list[_Finding] = []
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
        number = _number(
            AGREES if good else CONTRADICTS, int(told["step"].max()),
            int(told["step"].max() - (told["step"] - told["span"]).min()), str(name),
            measured=float(told["lr_decay"].median()), low=float(low), high=float(high), expected=lr * expected,
        )  # fmt: skip
        which = f"the {rows} of {of} rows of {name} that get no gradient"
        does = "shrink, so it decays" if decays else "stay as they are to the last bit, so it is not decayed"
        says = f"the recipe's λ of it is {expected:g}"
        sentence = f"{which} {does}, and {says}" if good else f"{which} {does}; {says}"
        findings.append(_Finding(check, sentence, [number]))
        if decays and rows > most:
            best, most = (told, str(name), expected or recipe.weight_decay), rows
    if not findings:
        notes = [note for note in dict.fromkeys(clock["note"]) if note]
        findings.append(
            _untold(check, f"no row without gradient tells which tensors decay ({'; '.join(notes[:2])})")
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
    return findings, _Told(name, decay, step - told["span"].to_numpy(np.int64), step, low, middle, high)


def _decay_rate(told: _Told | None, recipe: Recipe, size: _Size) -> _Finding:
    check = "decay rate"
    if told is None:
        return _untold(check, "no row without gradient that decays, so ηλ is unknown")
    if told.decay == 0:
        peak = float((told.middle / told.span).max())
        return _Finding(
            check, f"ηλ is up to {peak:.3g} per update, and the recipe has no decay",
            [_number(CONTRADICTS, tensor=told.tensor, measured=peak, expected=0.0)],
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
        _number(
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
        return _Finding(check, sentence, rows)
    said = "; or ".join(_fitting(told, recipe, lr, expected, size)) or _course(told, lr, expected)
    return _Finding(check, f"{said}; {_reading(told)}", rows)


def _totals(told: _Told, lr: np.ndarray, decay: float) -> np.ndarray:
    """−Σ ln(1−ηλ) over each gap; `lr` is of the updates 1, 2, …"""
    total = np.append(0.0, np.cumsum(-np.log1p(-lr * decay)))
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


def _fitting(told: _Told, recipe: Recipe, lr: np.ndarray, expected: np.ndarray, size: _Size) -> Iterator[str]:
    """What one change to the recipe would make it fit: a factor, a shift, another end."""
    count = f"{len(told.step)} gaps" if len(told.step) > 1 else "the one gap"
    if found := told.factor(expected):
        yield _factor_sentence(told, recipe, expected, found, size, count)
    for by in (-1, 1, -2, 2):
        if told.fits(_totals(told, _shifted(recipe, lr, by), told.decay)):
            way, n = ("later" if by < 0 else "earlier"), abs(by)
            yield (
                f"the schedule lies {n} update{'s' * (n > 1)} {way} than the recipe's: ηλ fits in {count} if update "
                f"t takes the learning rate of update t {'−' if by < 0 else '+'} {n}"
            )
            break
    top = int(np.argmax(lr))
    if len(told.step) > 2 and (end := _other_end(told, lr, top)) is not None:
        ends, own = end * 1.0, lr[-1] / lr[top]
        yield (
            f"ηλ falls to {ends:.3g} of its peak by step {told.step[-1]}, where the recipe has {own:.3g}: with "
            f"another end, and the recipe's peak, warm-up and shape, it fits in {count}"
        )


def _course(told: _Told, lr: np.ndarray, expected: np.ndarray) -> str:
    """Where it does not fit: at one step, from a step on, in the warm-up, or all along."""
    if place := _misplaced(told, lr, expected):
        return place
    if change := _change(told, expected):
        return change
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
    told: _Told, recipe: Recipe, expected: np.ndarray, found: tuple[float, float], size: _Size, count: str
) -> str:
    _, ratio, _ = told.ratios(expected)
    factor = float(np.clip(np.median(ratio), *found))
    between = f" ({ratio.min():.4g} to {ratio.max():.4g})" if len(ratio) > 1 else ""
    decay = f"λ was {told.decay * factor:.3g} where the recipe has {told.decay:.3g}"
    peak = f"η was {factor:.3g} times the recipe's"
    said = f"ηλ is {factor:.3g} of the recipe's in {'all ' * (len(ratio) > 1)}{count}{between}"
    alone, together = size.told and size.holds(1.0), size.told and size.holds(factor)
    if alone and not together:
        return f"{said}: {decay}, for updates are as large as its η makes them"
    if together and not alone:
        return f"{said}: {peak}, for updates are larger or smaller as well"
    return f"{said}: {decay}, or {peak}"


def _other_end(told: _Told, lr: np.ndarray, top: int) -> float | None:
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


def _misplaced(told: _Told, lr: np.ndarray, expected: np.ndarray) -> str | None:
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
            passed = np.cumsum(-np.log1p(-lr[told.start[i] :] * told.decay))
            place = told.start[i] + int(np.argmin(np.abs(passed - told.middle[i]))) + 1
            return (
                f"ηλ is the recipe's but in the gaps before and after step {told.step[i]}, and over both together: "
                f"that checkpoint's weights are of about step {place}"
            )
    return None


def _change(told: _Told, expected: np.ndarray) -> str | None:
    """A factor up to a step and another from there on; the step that leaves the least apart."""
    for k in range(1, len(told.step)):
        before, after = (told.part(part).factor(expected[part]) for part in (slice(None, k), slice(k, None)))
        if before is None or after is None or (len(told.step) - k < 2 and k < 2):
            continue
        words = [
            "the recipe's" if low <= 1 <= high else f"{(low + high) / 2:.3g} of the recipe's"
            for low, high in (before, after)
        ]
        return f"ηλ is {words[0]} up to step {told.step[k - 1]} and {words[1]} from there on"
    return None


def _reading(told: _Told) -> str:
    """Peak and end of ηλ by the clock alone."""
    rate = -np.expm1(-told.middle / told.span)
    top = int(np.argmax(rate))
    return (
        f"the clock reads up to {rate[top]:.3g} (steps {told.start[top]} to {told.step[top]}), and {rate[-1]:.3g} in "
        f"the last gap, {rate[-1] / rate[top]:.3g} of it"
    )


# The order of the checkpoints.


def _order(
    measured: pd.DataFrame, gaps: pd.DataFrame, recipe: Recipe, clock: pd.DataFrame | None, far: _Far | None
) -> tuple[list[_Finding], set[int]]:
    """Copies, swapped and strange checkpoints; and the steps that are not what they say."""
    check = "order"
    findings: list[_Finding] = []
    suspects: set[int] = set()
    steps = sorted(set(gaps["start"]) | set(gaps["step"]))
    lr = recipe.lr_at(np.arange(1, steps[-1] + 1))
    hashed = "hash" in measured and bool(measured["hash"].notna().all())
    for same in identical_steps(measured) if hashed else []:
        total = float(lr[same[0] : same[-1]].sum())
        verdict = CONTRADICTS if total > 0 else AGREES
        listed = ", ".join(map(str, same))
        what = f"steps {listed} hold the same weights"
        sentence = f"{what}, and the recipe's η between them is 0"
        if verdict == CONTRADICTS and same != [0, 1]:
            sentence = f"{what}, though Ση between them is {total:.3g}: copies under wrong names"
            suspects.update(same)
        elif verdict == CONTRADICTS:
            continue  # `_first_update` says it
        findings.append(
            _Finding(check, sentence, [_number(verdict, same[-1], same[-1] - same[0], expected=total)])
        )
    found = _ratios(gaps).set_index(["start", "step"])["ratio"]
    ratio = np.array([found.get((a, b), math.nan) for a, b in itertools.pairwise(steps)])
    growing = _growing(clock)
    told = bool(np.isfinite(ratio).any())
    for i in range(1, len(steps) - 1):
        here = steps[i]
        if here in suspects or not told:
            continue
        around = ratio[i - 1], ratio[i]
        others = np.delete(ratio, [i - 1, i])
        usual = np.nanmedian(others) if np.isfinite(others).any() else math.nan
        if far is None or not min(around) > _ASTRAY * usual:
            continue
        across = far(steps[i - 1], steps[i + 1])
        if min(around) > _ASTRAY * across:
            suspects.add(here)
            times = math.sqrt(min(around) / across)
            sentence = (
                f"step {here} does not lie between {steps[i - 1]} and {steps[i + 1]}: it is at least {times:.2g} times "
                "as far from both as they are from each other, for the updates between, so its weights are another "
                "training's or another step's"
            )
            row = _number(CONTRADICTS, here, here - steps[i - 1], measured=min(around), expected=across)
            findings.append(_Finding(check, sentence, [row]))
    for i in range(len(steps) - 1):
        a, b = steps[i], steps[i + 1]
        if a in suspects or b in suspects:
            continue
        sides = [ratio[j] for j in (i - 1, i + 1) if 0 <= j < len(ratio)]
        apart = len(sides) == 2 and min(sides) > _AS_FAR * ratio[i]
        if not apart and b not in growing:
            continue
        grows = (
            f"rows without gradient grow by {growing[b] - 1:.2g} from step {a} to {b}, and "
            if b in growing
            else ""
        )
        nearer = None if far is None else _nearer(far, steps, i)
        if nearer:
            suspects.update((a, b))
            sentence = f"{grows}steps {a} and {b} stand in each other's place: {nearer}"
        elif grows:
            if len(growing) <= len(ratio) / 3:
                suspects.update((a, b))
            sentence = f"{grows}decay does not do that: the steps are swapped, or not of one training"
        else:
            continue
        findings.append(_Finding(check, sentence, [_number(CONTRADICTS, b, b - a, measured=float(ratio[i]))]))
    if not findings:
        lacks = [
            word for word, there in (("hashes", hashed), ("inner products of neighbours", told)) if not there
        ]
        if lacks:
            return [
                _untold(check, f"copies or swapped checkpoints would not show: no {' and no '.join(lacks)}")
            ], suspects
        sentence = (
            f"no two of {len(steps)} checkpoints hold the same weights, and none is nearer to others than its "
            "neighbours are"
        )
        findings.append(_Finding(check, sentence, [_number(AGREES)]))
    return findings, suspects


def _growing(clock: pd.DataFrame | None) -> dict[int, float]:
    """Step -> factor by which rows without gradient grew before it."""
    if clock is None:
        return {}
    up = clock[clock["lr_decay_high"] < 0]
    return dict(zip(up["step"].astype(int), up["factor"], strict=True))


def _picked(gaps: pd.DataFrame) -> dict[str, float]:
    """Some of the blocks' matrices, whole: name -> λ."""
    rows = gaps[gaps["component"].isin(_BLOCK)].drop_duplicates("tensor")
    whole = {split_label(str(row.tensor))[0]: float(row.decay) for row in rows.itertuples()}
    names = list(whole)[:: max(1, len(whole) // _PICKED)][:_PICKED]
    return {name: whole[name] for name in names}


def _distances(series: Checkpoints, names: Mapping[str, float], recipe: Recipe) -> _Far:
    """(a, b) -> way² over that of noise, the median over some matrices, of checkpoints that are no neighbours."""
    known: dict[tuple[int, int], float] = {}

    def distance(a: int, b: int) -> float:
        if (a, b) not in known:
            lr = recipe.lr_at(np.arange(a + 1, b + 1))
            try:
                before, after = series.contents(a), series.contents(b, beside=[a])
                known[a, b] = math.nan
                if before and after:
                    ratios = []
                    for name, decay in names.items():
                        way = _way_sq(before[name], after[name], math.exp(np.log1p(-lr * decay).sum()))
                        noise = recipe.update_scale**2 * noise_displacement(lr, recipe.betas[0], decay, a)
                        ratios.append(way / (math.prod(before[name].shape) * noise))
                    known[a, b] = float(np.median(ratios))
            finally:
                series.release()
        return known[a, b]

    return distance


def _way_sq(before: Any, after: Any, keep: float) -> float:
    total = 0.0
    for low, high in pieces_of(before.shape):
        left = after.read(low, high).double().numpy() - keep * before.read(low, high).double().numpy()
        total += float(np.sum(left * left))
    return total


def _nearer(far: _Far, steps: Sequence[int], i: int) -> str:
    """How the later of two neighbours is nearer to what is before both, and the earlier to what is behind."""
    a, b = steps[i], steps[i + 1]
    said = []
    if i > 0:
        c = steps[i - 1]
        ratio = far(c, b) * (b - c) / (far(c, a) * (a - c))
        if not ratio < 0.9:
            return ""
        said.append(f"{b} is {math.sqrt(ratio):.2f} times as far from {c} as {a} is")
    if i + 2 < len(steps):
        d = steps[i + 2]
        ratio = far(a, d) * (d - a) / (far(b, d) * (d - b))
        if not ratio < 0.9:
            return ""
        said.append(f"{a} is {math.sqrt(ratio):.2f} times as far from {d} as {b} is")
    return ", and ".join(said)
