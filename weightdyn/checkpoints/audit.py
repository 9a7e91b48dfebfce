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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from weightdyn.checkpoints.clock import ASTRAY, decay_clock
from weightdyn.checkpoints.decayrates import acting_decay, decay_rate, decayed_tensors
from weightdyn.checkpoints.distances import (
    BLOCK,
    Acting,
    Far,
    bound,
    first_update,
    gap_ratios,
    log_kept,
    noise_displacement,
    tensor_gaps,
    update_size,
)
from weightdyn.checkpoints.findings import AGREES, CONTRADICTS, UNKNOWN, Finding, number, untold
from weightdyn.checkpoints.measure import identical_steps, pieces_of
from weightdyn.checkpoints.recipe import MAX_UPDATES, Recipe
from weightdyn.checkpoints.series import Checkpoints, check_updates
from weightdyn.core.checks import check_instance
from weightdyn.core.naming import split_label
from weightdyn.core.progress import Progress
from weightdyn.core.tables import AUDIT_TABLE, check_columns
from weightdyn.record.runlog import RunLog

_PICKED = 16  # matrices that are compared to tell which of two checkpoints is nearer
_AS_FAR = 1.4  # times as far as its neighbours: worth a look
_ASTRAY = 4.0  # times as far², on both sides, as both neighbours are from each other


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
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
        TypeError, ValueError: an argument is none of these; fewer than two checkpoints; steps that seem to count
            checkpoints, not updates.
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
    check_updates(series)
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
    for name, accepted, good in (
        ("step", "a whole number >= 0", lambda x: (x >= 0) & (x <= MAX_UPDATES) & (x == np.floor(x))),
        ("numel", "a whole number >= 1", lambda x: (x >= 1) & (x == np.floor(x))),
        ("norm_sq", "a finite ‖W‖² >= 0", lambda x: (x >= 0) & np.isfinite(x)),
    ):
        if len(bad := source[~good(source[name].to_numpy(float, na_value=np.nan))]):
            one = bad.iloc[0]
            raise ValueError(
                f"source: {name} must be {accepted}; that of {one['tensor']} at step {one['step']} is {one[name]}; "
                "leave that checkpoint out"
            )
    if source["tensor"].isna().any():
        raise ValueError(
            "source: a row of the column tensor is missing; give each row the name of its tensor"
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


def _audit(
    name: str, measured: pd.DataFrame, recipe: Recipe, clock: pd.DataFrame | None, series: Checkpoints | None
) -> Audit:
    gaps = tensor_gaps(measured, recipe)
    far = None if series is None else _distances(series, _picked(gaps), recipe)
    order, suspects = _order(measured, gaps, recipe, clock, far)
    findings = [*order, bound(_without(gaps, suspects), recipe)]
    decayed, told = [], None
    if clock is not None:
        clock = clock[~clock["step"].isin(suspects) & ~(clock["step"] - clock["span"]).isin(suspects)]
        decayed, told = decayed_tensors(clock, recipe)
    if told is not None:  # a wrong λ is not to be taken for a wrong η
        acting = acting_decay(told, recipe)
        gaps = tensor_gaps(measured, recipe, acting)
        far = None if series is None else _distances(series, _picked(gaps), recipe, acting)
    sound = _without(gaps, suspects)
    first = first_update(sound, recipe)
    scale = update_size(sound, recipe, first, far)
    rate = decay_rate(told, recipe, first if first.told else scale)
    if rate.rows[0]["verdict"] == AGREES and scale.verdict == CONTRADICTS:
        scale = scale._replace(finding=_beside_rate(scale.finding))
    if told is None and scale.verdict == CONTRADICTS:
        bare = _without(tensor_gaps(measured, recipe, lambda *_: 0.0), suspects)
        if update_size(bare, recipe, first, None).verdict == AGREES:
            scale = scale._replace(finding=_or_decay(scale.finding))
    findings += [first.finding, scale.finding, *decayed]
    if clock is None:
        why = "the clock was not read: only the table is known" if series is None else "no tensor has rows"
        rate = untold("decay rate", f"{why}, so ηλ is unknown")
    findings.append(rate)
    rows = [{"check": each.check, **row, "sentence": each.sentence} for each in findings for row in each.rows]
    table = pd.DataFrame(rows, columns=list(AUDIT_TABLE)).astype({"step": "Int64", "span": "Int64"})
    return Audit(name, table, clock)


def _without(gaps: pd.DataFrame, suspects: set[int]) -> pd.DataFrame:
    return gaps[~gaps["start"].isin(suspects) & ~gaps["step"].isin(suspects)]


def _beside_rate(finding: Finding) -> Finding:
    """The finding on the size of updates, where ηλ is the recipe's."""
    also = "; ηλ is the recipe's, so λ is off the other way, or something else scales the updates"
    return finding._replace(sentence=finding.sentence + also)


def _or_decay(finding: Finding) -> Finding:
    """The finding on the size of updates, where it hangs on the recipe's λ."""
    also = ", or λ is smaller than the recipe's, without whose decay they are as logged trainings have them"
    return finding._replace(sentence=finding.sentence + also)


# The order of the checkpoints.


def _order(
    measured: pd.DataFrame, gaps: pd.DataFrame, recipe: Recipe, clock: pd.DataFrame | None, far: Far | None
) -> tuple[list[Finding], set[int]]:
    """Copies, swapped and strange checkpoints; and the steps that are not what they say."""
    check = "order"
    findings: list[Finding] = []
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
            Finding(check, sentence, [number(verdict, same[-1], same[-1] - same[0], expected=total)])
        )
    found = gap_ratios(gaps).set_index(["start", "step"])["ratio"]
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
                f"step {here} does not lie between {steps[i - 1]} and {steps[i + 1]}: it is at least {times:.2g} "
                "times as far from both as they are from each other, for the updates between, so its weights are "
                "another training's or another step's"
            )
            row = number(CONTRADICTS, here, here - steps[i - 1], measured=min(around), expected=across)
            findings.append(Finding(check, sentence, [row]))
    strange = [] if clock is None else sorted(set(clock.loc[clock["note"] == ASTRAY, "step"].astype(int)))
    for here in strange:
        if here not in suspects:
            suspects.add(here)
            sentence = (
                f"at step {here} no row without gradient has the direction that it has before and after, so its "
                "weights are another training's"
            )
            findings.append(Finding(check, sentence, [number(CONTRADICTS, here)]))
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
        findings.append(Finding(check, sentence, [number(CONTRADICTS, b, b - a, measured=float(ratio[i]))]))
    if not findings:
        lacks = [
            word for word, there in (("hashes", hashed), ("inner products of neighbours", told)) if not there
        ]
        if lacks:
            return [
                untold(check, f"copies or swapped checkpoints would not show: no {' and no '.join(lacks)}")
            ], suspects
        sentence = (
            f"no two of {len(steps)} checkpoints hold the same weights, and none is nearer to others than its "
            "neighbours are"
        )
        findings.append(Finding(check, sentence, [number(AGREES)]))
    return findings, suspects


def _growing(clock: pd.DataFrame | None) -> dict[int, float]:
    """Step -> factor by which rows without gradient grew before it."""
    if clock is None:
        return {}
    up = clock[clock["lr_decay_high"] < 0]
    return dict(zip(up["step"].astype(int), up["factor"], strict=True))


def _picked(gaps: pd.DataFrame) -> dict[str, float]:
    """Some of the blocks' matrices, whole: name -> λ."""
    rows = gaps[gaps["component"].isin(BLOCK)].drop_duplicates("tensor")
    whole = {split_label(str(row.tensor))[0]: float(row.decay) for row in rows.itertuples()}
    names = list(whole)[:: max(1, len(whole) // _PICKED)][:_PICKED]
    return {name: whole[name] for name in names}


def _distances(
    series: Checkpoints, names: Mapping[str, float], recipe: Recipe, acting: Acting | None = None
) -> Far:
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
                    for name, own in names.items():
                        decay = own if acting is None else acting(own, a, b)
                        way = _way_sq(before[name], after[name], math.exp(log_kept(lr, decay).sum()))
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


def _nearer(far: Far, steps: Sequence[int], i: int) -> str:
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
