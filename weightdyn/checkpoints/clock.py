"""The decay clock: what the weights of a series of checkpoints say themselves of ηλ.

A row of the embedding whose token never occurs gets no gradient. Adam's update is 0 there, and decay alone moves
it, w' = (1−ηλ)w: it keeps its direction, and its length falls by Π(1−ηλ). So do rows of positions beyond the
longest sequence, and those of experts that get no token. They are found by what they do:

- A row counts if at every checkpoint of the series it is a multiple of what it was at the one before, but for the
  rounding of the stored copies and of the training's own arithmetic. A token that occurs once moves its row in one
  gap, and its row counts in none.
- That says something only where a single gradient could be seen. What moved rows moved tells how far one gradient
  would have moved a row; where that is less than what rounding hides, there is no value.
- All rows of a tensor that count share one factor, and do not share one direction, or it was not decay alone.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.checkpoints.measure import precision_of
from weightdyn.checkpoints.series import Checkpoints, open_series
from weightdyn.core.naming import TensorRow, describe
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import CLOCK_TABLE
from weightdyn.files.weightfiles import MANTISSA, Stored
from weightdyn.record.runlog import RunLog

COLUMNS = 16
"""Entries that a row needs for its direction to say anything."""

SURE = 6.0
"""Standard deviations of rounding within which a row keeps its direction, and agrees with the others."""

ASTRAY = "no row keeps its direction here, and they are back later: the weights of another training?"
"""What `note` says of a checkpoint that is none of the series'."""

_PIECE = 1 << 20  # weights that are compared at a time, in float64
_WITNESSES = 64  # rows of a tensor that moved, and are looked at to know how far rows move
_FEW = 3  # of them, below which other tensors tell
_OTHERS = 8  # tensors without a row that counts in which such rows are looked at
_ASTRAY = 3  # checkpoints in a row that may be none of this training
_DISAGREE = 0.1  # share of rows that may shrink differently, and are left out
_ALIKE = 0.2  # mean cosine between rows from which on they are not rows of an initialization
_ONE_GRADIENT = 5.8  # Σ of Adam's updates after one gradient among none, in η: Σ 0.1·0.9ᵏ/√(0.05·0.95ᵏ)
_SOME = 3  # events that may be there where none was seen
_HALF_STEP = 2.0**-25  # largest rounding of 1 − ηλ to float32
_HIDDEN = (
    "too coarse for the gap: what one gradient moves would not be seen, so rows of rare tokens may be there"
)
_SMALLEST = {
    "float16": -14,
    "bfloat16": -126,
    "float32": -126,
    "float64": -1022,
}  # exponents of normal numbers


def decay_clock(
    series: Checkpoints | RunLog | str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
    *,
    progress: Progress = None,
) -> pd.DataFrame:
    """Read ηλ off the rows that decay alone moves: tokens, positions and experts that never occur.

        w' = (1−ηλ)w  where the gradient is 0       ‖w_b‖/‖w_a‖ = Π (1−ηλ)  over the updates a+1 … b

    Args:
        series: the checkpoints, at least two: a `Checkpoints`, or what it opens (a folder, a run directory or
            `RunLog`, {step: path}, "hf://owner/name"). From the hub two checkpoints at a time are on the disk.
        progress: show a bar; None: where someone watches.

    Returns:
        The columns of `CLOCK_TABLE`, one row per gap between neighbouring checkpoints and tensor that has such
        rows, sorted by step and name; embeddings have theirs in any case, and if no tensor has such rows, all have
        theirs. A row of the table without a value says why in `note`, and if none has a value, so does a warning.

        The rows of a tensor that count are the same in all gaps: rows of matrices (of stacked experts, rows of
        their matrices) with `COLUMNS` entries or more that are not zero. Tied embeddings have none, every row
        gets a gradient from the softmax. Where they are bitwise equal in float32 while others move, the tensor is
        not decayed: lr_decay is 0. In bfloat16 and float16 that may also be a decay that rounds away at each
        update, so lr_decay is NaN, and its ends are what it can be.

        Single gradients are seen where the type is fine enough, and `note` says where it is not. In bfloat16 a
        token that occurs first in the last few updates of the series may count: its row has moved by less than
        rounding hides, and shifts the factor by less than its interval.

        To hold a recipe against it, compare −ln(factor) with Σ −ln(1−ηₜλ): lr_decay is the constant ηλ that makes
        the same factor, above the mean by half the variance of ηλ in the gap. It is of what acted. A trainer that
        multiplies by 1 − ηλ in float32 rounds it, by 2^-25 at most, 3 % of an ηλ of 1e-6; `lr_decay_low` and
        `lr_decay_high` have room for that, `factor_low` and `factor_high` not.

    Raises:
        ValueError: there are fewer than two checkpoints, or no matrix with rows of so many entries.
        CheckpointError: a checkpoint is damaged (unless the series has errors="skip").

    Source: the rows get Adam's update of a gradient of zero, Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> folder, generator = Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0)
    >>> weight = torch.randn(40, 64, generator=generator)
    >>> for step in (0, 100, 200):
    ...     save_file({"embed_in.weight": weight.clone()}, folder / f"step{step}.safetensors")
    ...     weight *= (1 - 1e-3 * 0.1) ** 100
    ...     weight[:30] += 0.1 * torch.randn(30, 64, generator=generator)  # 30 tokens occur, 10 do not
    >>> table = decay_clock(folder)
    >>> table[["step", "rows", "of"]].values.tolist(), table["lr_decay"].round(7).tolist()
    ([[100, 10, 40], [200, 10, 40]], [0.0001, 0.0001])
    """
    series = open_series(series)
    if len(series) < 2:
        raise ValueError(
            f"series must have two checkpoints or more, got {len(series)}: the clock reads what lies between"
        )
    try:
        tensors, gaps = _follow(series, progress)
    finally:
        series.release()
    if not gaps:
        raise ValueError(f"series has fewer than two checkpoints that are sound: {series.skipped}")
    return _table(series, tensors, gaps)


# How a row moves.


class Motion(NamedTuple):
    """How rows move from one checkpoint to the next; arrays with an entry for each row.

    Attributes:
        size: rms of the entries of w_a.
        ratio: ‖w_b‖/‖w_a‖.
        variance: of it, by rounding alone.
        grain: mean square of what one entry of a coarse type makes of it when it passes to the next value.
        turned: rms per entry of what is left beside a multiple of w_a, less what rounding explains.
        least: rms per entry that would have been seen.
        keeps: whether what is left is within rounding: the row keeps its direction.
        equal: whether nothing changed, bit by bit.
    """

    size: np.ndarray
    ratio: np.ndarray
    variance: np.ndarray
    grain: np.ndarray
    turned: np.ndarray
    least: np.ndarray
    keeps: np.ndarray
    equal: np.ndarray


def row_motion(
    before: np.ndarray, after: np.ndarray, span: int, precision: tuple[str, str] = ("float32", "float32")
) -> Motion:
    """How each row moves, held against what rounding alone would do.

    With p = ⟨w_a,w_b⟩/‖w_a‖², what is left is r = w_b − p·w_a. Rounding of stored copies to steps of u makes each
    of its entries ψ(1−ψ)u² in the mean square, ψ the place of p·w_a between two values that the type has. The
    training's own float32 weights were rounded once per update, by u/√12 each time: after N updates by N·u/√12 at
    most, since what is lost of a small ηλ is nearly the same at every update.

    Args:
        before: float64 of shape (rows, columns), w_a.
        after: w_b, of the same shape.
        span: updates between them.
        precision: float types that the values of both fit into.

    >>> w = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32).astype(np.float64)
    >>> turned = w * 0.9 + [[0.0], [1e-4]] * w[::-1]
    >>> row_motion(w, turned.astype(np.float32).astype(np.float64), 10).keeps.tolist()
    [True, False]
    """
    columns = before.shape[1]
    with np.errstate(all="ignore"):  # weights may be zero or infinite
        squares, squares_after = (np.einsum("ij,ij->i", x, x) for x in (before, after))
        p = np.einsum("ij,ij->i", before, after) / squares
        left = after - p[:, None] * before
        error = np.einsum("ij,ij->i", left, left)
        walk = span**2 / 12
        # More than rounding can make of any row: those beyond need no closer look.
        coarse = max(4.0 ** -MANTISSA[name] for name in precision)
        bound = (squares + squares_after) * (coarse + walk * 4.0**-23) + columns * _tiny(precision)
        near = np.flatnonzero(error <= 2 * SURE * bound)
        variance, grain, least = (np.full(len(p), np.nan) for _ in range(3))
        keeps, turned = np.zeros(len(p), bool), np.sqrt(error / columns)
        if len(near):
            x, y = before[near], after[near]
            expected, spread, usual = _rounding(x, y, p[near, None], precision, walk)
            allowed = SURE * np.sqrt(spread.sum(1))
            mean = expected.sum(1)
            keeps[near] = (error[near] <= mean + allowed) & (p[near] > 0)
            turned[near] = np.sqrt(np.clip(error[near] - mean, 0, None) / columns)
            # Where nothing passes a step, rounding hides what does not either.
            least[near] = np.sqrt(np.maximum(allowed, usual.sum(1)) / columns)
            variance[near] = np.einsum("ij,ij->i", x * x, expected) / squares[near] ** 2
            if min(MANTISSA[name] for name in precision) < MANTISSA["float32"]:
                step, x = _steps(y, min(precision, key=MANTISSA.__getitem__)), np.abs(x)
                # What decays by a part of a step passes one as often as that part is large.
                grain[near] = (x**3 * step).sum(1) / (x / step).sum(1) / squares[near] ** 2
            else:
                grain[near] = 0.0
        return Motion(
            np.sqrt(squares / columns),
            np.sqrt(squares_after / squares),
            variance,
            grain,
            turned,
            least,
            keeps,
            (before == after).all(1),
        )


def _tiny(precision: tuple[str, str]) -> float:
    """Square of the largest step of the subnormal numbers."""
    return max(4.0 ** (_SMALLEST[name] - MANTISSA[name]) for name in precision)


def _steps(x: np.ndarray, precision: str) -> np.ndarray:
    """Distance between neighbouring numbers of a type at x."""
    exponent = np.frexp(x)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, _SMALLEST[precision]) - MANTISSA[precision])


def _rounding(
    x: np.ndarray, y: np.ndarray, p: np.ndarray, precision: tuple[str, str], walk: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and variance of the square that rounding leaves of each entry, and its mean where ψ is anything.

    Weights stored in float32 are taken for those of the training, and so for exact.
    """
    steps = [
        np.zeros_like(w) if MANTISSA[name] >= 23 else _steps(w, name)
        for w, name in zip((x, y), precision, strict=True)
    ]
    mean = usual = ((p * steps[0]) ** 2 + steps[1] ** 2) / 12
    spread = 1.4 * mean**2
    same = (steps[0] == steps[1]) & (steps[1] > 0)
    if same.any():
        psi = np.where(same, p * np.abs(x) / np.where(same, steps[1], 1), 0) % 1
        two = psi * (1 - psi)
        mean = np.where(same, two * steps[1] ** 2, mean)
        spread = np.where(same, two * (psi**3 + (1 - psi) ** 3 - two) * steps[1] ** 4, spread)
    walked = walk * _steps(np.maximum(np.abs(x), np.abs(y)), "float32") ** 2
    return mean + walked, spread + 2 * walked**2 + 4 * mean * walked, usual + walked


# Rows through the series.


class _Followed:
    """A tensor, and its rows that have kept their direction so far."""

    def __init__(self, name: str, row: TensorRow, shape: tuple[int, ...]) -> None:
        self.name, self.row = name, row
        self.of = math.prod(shape[:-1])
        self.columns = shape[-1]
        self.kept = np.ones(self.of, bool)
        self.zero = np.zeros(self.of, bool)
        self.motions: dict[
            int, tuple[np.ndarray, Motion]
        ] = {}  # step -> rows kept until then, and how they move
        self.direction = np.zeros(self.columns)  # sum of their unit vectors

    def looked_at(self) -> np.ndarray:
        """The rows that are kept, and some of those that moved."""
        asked = self.kept.copy()
        if not asked.any():
            asked[:_WITNESSES] = True
            return asked
        moved = np.flatnonzero(~self.kept & ~self.zero)
        asked[moved[:: max(1, len(moved) // _WITNESSES)][:_WITNESSES]] = True
        return asked


class _Gap(NamedTuple):
    """What there is between two checkpoints."""

    start: int
    step: int
    moved: dict[
        str, tuple[float, int]
    ]  # tensor -> rms that its rows which moved did (median), and their number
    same: bool  # whether all rows that were looked at are bitwise equal
    precision: dict[
        str, tuple[str, str]
    ]  # tensor -> float types that the values of both checkpoints fit into
    astray: bool = False  # no row of the later checkpoint is one of the earlier


def _follow(series: Checkpoints, progress: Progress) -> tuple[list[_Followed], list[_Gap]]:
    """Go through the series with the rows that keep their direction."""
    tensors: list[_Followed] = []
    gaps: list[_Gap] = []
    start, before = -1, None
    known: dict[str, str] = {}
    with progress_bar(list(series.steps), progress=progress, unit="checkpoint", desc="clock") as bar:
        for step in bar:
            after = series.contents(step, beside=() if before is None else (start,), progress=False)
            if after is None:
                continue
            if before is None:
                start, before = step, after
                tensors = _matrices(series, after)
                continue
            gap, kept = _between(tensors, (start, step), (before, after), known)
            gaps.append(gap)
            if gap.astray:  # the next one is held against the last that was sound
                if len(_last_astray(gaps)) == _ASTRAY:
                    break
                continue
            for tensor in tensors:
                tensor.kept = kept.get(tensor.name, tensor.kept)
            start, before = step, after
            known = {name: both[1] for name, both in gap.precision.items()}
    if not tensors:
        series.tensors()  # raises what is wrong with all of them
    return tensors, gaps


def _last_astray(gaps: list[_Gap]) -> list[_Gap]:
    """The gaps at the end in which no row kept its direction."""
    return gaps[max((i + 1 for i, gap in enumerate(gaps) if not gap.astray), default=0) :]


def _matrices(series: Checkpoints, contents: Mapping[str, Stored]) -> list[_Followed]:
    config = series.config()
    found = []
    for name, stored in contents.items():
        if len(stored.shape) in (2, 3) and stored.shape[-1] >= COLUMNS:
            (row,) = describe(name, stored.shape, config, views=False, rules=series.rules).rows(stored.shape)
            found.append(_Followed(name, row, stored.shape))
    if not found:
        raise ValueError(
            f"series: no tensor of {series!r} is a matrix with rows of {COLUMNS} entries or more, so there is no "
            f"direction to keep; it has {list(contents)[:5]} …"
        )
    return found


def _between(
    tensors: list[_Followed],
    steps: tuple[int, int],
    contents: tuple[Mapping[str, Stored], Mapping[str, Stored]],
    known: Mapping[str, str],
) -> tuple[_Gap, dict[str, np.ndarray]]:
    """How the rows of one gap move, and which of those kept so far keep their direction here too.

    Args:
        tensors: what is followed; how their rows move is noted there.
        steps, contents: of both checkpoints.
        known: tensor -> float type that the values of the earlier fit into, where it was found before.
    """
    before, after = contents
    start, step = steps
    kept: dict[str, np.ndarray] = {}
    moved: dict[str, tuple[float, int]] = {}
    precision: dict[str, tuple[str, str]] = {}
    same = True
    idle = [tensor for tensor in tensors if not tensor.kept.any()]
    shown = idle[:: max(1, len(idle) // _OTHERS)][:_OTHERS]
    for tensor in tensors:
        if tensor in idle and tensor not in shown:
            continue
        name = tensor.name
        both = known.get(name) or _precision(before[name]), _precision(after[name])
        precision[name] = both
        asked = tensor.looked_at()
        motions, directions = [], np.zeros(tensor.columns)
        for rows, x, y in _rows_of(before[name], after[name], asked):
            motion = row_motion(x, y, step - start, both)
            if not tensor.motions:
                tensor.zero[rows[~x.any(1)]] = True
            good = motion.keeps & tensor.kept[rows]
            directions += (x[good] / np.linalg.norm(x[good], axis=1, keepdims=True)).sum(0)
            motions.append((rows, motion))
        rows = np.concatenate([rows for rows, _ in motions])
        motion = Motion(*(np.concatenate(each) for each in zip(*(m for _, m in motions), strict=True)))
        same &= bool(motion.equal.all())
        others = np.isfinite(motion.turned) & ~(motion.keeps & tensor.kept[rows]) & ~tensor.zero[rows]
        if others.any():
            moved[name] = float(np.median(motion.turned[others])), int(others.sum())
        if tensor in idle:
            continue
        good = motion.keeps & tensor.kept[rows]
        kept[name] = np.zeros_like(tensor.kept)
        kept[name][rows[good]] = True
        if good.any():
            tensor.motions[step] = rows[good], Motion(*(each[good] for each in motion))
            tensor.direction = directions
    astray = not any(rows.any() for rows in kept.values())
    return _Gap(start, step, moved, same, precision, astray), kept


def _rows_of(
    before: Stored, after: Stored, asked: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers and float64 entries of the rows asked for, at both checkpoints, some at a time."""
    columns = before.shape[-1]
    each = math.prod(before.shape[1:-1])  # rows of a slice of the first axis
    height = max(1, _PIECE // (columns * each))
    for low in range(0, before.shape[0], height):
        high = min(low + height, before.shape[0])
        wanted = np.flatnonzero(asked[low * each : high * each])
        if not len(wanted):
            continue
        first, last = int(wanted[0]) // each, int(wanted[-1]) // each + 1
        read = [stored.read(low + first, low + last).reshape(-1, columns) for stored in (before, after)]
        for begin in range(0, len(wanted), max(1, _PIECE // columns)):
            rows = wanted[begin : begin + max(1, _PIECE // columns)]
            x, y = (rows_read[rows - first * each].double().numpy() for rows_read in read)
            yield low * each + rows, x, y


def _precision(stored: Stored) -> str:
    """Float type that the values of a tensor fit into."""
    low = odd = 0
    if stored.dtype in ("float32", "float64"):
        height = max(1, _PIECE * stored.shape[0] // math.prod(stored.shape))
        for start in range(0, stored.shape[0], height):
            values = stored.read(start, min(start + height, stored.shape[0])).contiguous().numpy()
            single = values.astype(np.float32)
            bits = single.view(np.int32)
            low |= int(np.bitwise_or.reduce(bits, axis=None)) & 0xFFFF
            odd += int(np.count_nonzero(bits & 0x7FFFFF))
            if low & 0x1FFF or not np.array_equal(single, values, equal_nan=True):
                return stored.dtype
    return precision_of("float32" if stored.dtype == "float64" else stored.dtype, low, odd)


# What they say.


def _table(series: Checkpoints, tensors: list[_Followed], gaps: list[_Gap]) -> pd.DataFrame:
    rows = []
    lost = next(iter(_last_astray(gaps)), None)  # from here on no row came back
    told = [tensor for tensor in tensors if tensor.kept.any() and lost is None]
    shown = [tensor for tensor in tensors if tensor in told or tensor.row.component == "embed"] or tensors
    for tensor in shown:
        if tensor in told:
            rows += _clock_rows(tensor, gaps)
            continue
        note = _why_none(tensor, lost)
        rows += [_row(tensor, step, step - start, note=note) for start, step in pairwise(series.steps)]
    table = pd.DataFrame(rows, columns=list(CLOCK_TABLE)).sort_values(
        "step", kind="stable", ignore_index=True
    )
    table = table.astype({"layer": "Int64"})
    for name in ("tensor", "stack", "component", "role"):
        table[name] = pd.Categorical(table[name], categories=list(dict.fromkeys(table[name])))
    if table["lr_decay"].isna().all():
        reasons = ", ".join(dict.fromkeys(table["note"]))
        warnings.warn(f"no row of {series!r} tells ηλ: {reasons}", stacklevel=3)
    return table


def _row(tensor: _Followed, step: int, span: int, **values: Any) -> dict[str, Any]:
    numbers = [name for name in CLOCK_TABLE if name.startswith(("factor", "lr_decay"))]
    return {
        "step": step,
        "span": span,
        **tensor.row.identity(),
        "rows": 0,
        "of": tensor.of,
        **dict.fromkeys(numbers, math.nan),
        "precision": "",
        "note": "",
        **values,
    }


def _why_none(tensor: _Followed, lost: _Gap | None) -> str:
    if lost is not None and tensor.kept.any() and tensor.motions:
        count = int(tensor.kept.sum())
        return (
            f"{count} rows keep their direction up to step {lost.start} and lose it at step {lost.step}: they get "
            "gradients, or its weights are another training's (leave it out with Checkpoints(…, steps=))"
        )
    return "no row keeps its direction: all get gradients, as those of tied embeddings do from the softmax"


def _clock_rows(tensor: _Followed, gaps: list[_Gap]) -> Iterator[dict[str, Any]]:
    """The rows of the table of one tensor."""
    final = np.flatnonzero(tensor.kept)
    motions: dict[int, Motion] = {}
    for gap in gaps:
        if not gap.astray:
            rows, motion = tensor.motions[gap.step]
            at = np.searchsorted(rows, final)
            motions[gap.step] = Motion(*(each[at] for each in motion))
    good = np.ones(len(final), bool)
    for motion in motions.values():
        away = np.abs(motion.ratio - np.median(motion.ratio))
        good &= away <= SURE * np.sqrt(np.maximum(motion.variance, motion.variance.mean()))
    sound = [gap for gap in gaps if not gap.astray]
    clear = {gap.step: _is_clear(tensor, gap, motions[gap.step]) for gap in sound}
    spans = {gap.step: gap.step - gap.start for gap in sound}
    share = sum(spans[step] for step in clear if clear[step]) / sum(spans.values())
    count = len(final)
    still = all(motion.equal.all() for motion in motions.values())
    whole = None
    if still and count + tensor.zero.sum() == tensor.of:
        whole = "no row of the tensor moves: it is frozen, or gets no gradient and is not decayed"
    elif not share:
        whole = f"no gap is told from rounding: {_HIDDEN}"
    elif (~good).mean() > _DISAGREE:
        whole = (
            f"{count} rows keep their direction and shrink differently: it is not decay alone that moves them"
        )
    elif _alike(tensor.direction, count):
        whole = (
            f"{count} rows keep one direction that they share: gradients made them, and may still move them"
        )
    for gap in gaps:
        span = gap.step - gap.start
        if gap.astray:
            yield _row(tensor, gap.step, span, note=ASTRAY)
            continue
        precision = min(gap.precision[tensor.name], key=MANTISSA.__getitem__)
        if whole:
            yield _row(tensor, gap.step, span, precision=precision, note=whole)
            continue
        motion = Motion(*(each[good] for each in motions[gap.step]))
        told = {"rows": int(good.sum()), "precision": precision}
        if not clear[gap.step] and share < 0.5:
            yield _row(tensor, gap.step, span, **told, note=_HIDDEN)
            continue
        yield _row(tensor, gap.step, span, **told, **_value(motion, span, precision, gap.same))


def _is_clear(tensor: _Followed, gap: _Gap, motion: Motion) -> bool:
    """Whether one gradient in the gap would have been seen in a row that counts."""
    least = 2 * float(np.median(motion.least))
    moved, count = gap.moved.get(tensor.name, (0.0, 0))
    if count < _FEW:
        # Other tensors tell how far rows move, and may do so at another learning rate. But what gradients move,
        # they move further than decay does.
        moved = float(np.median([rms for rms, _ in gap.moved.values()] or [0.0]))
        if float(np.median((1 - motion.ratio) * motion.size)) < least:
            return False
    return moved * min(1.0, _ONE_GRADIENT / math.sqrt(gap.step - gap.start)) >= max(least, 1e-300)


def _alike(direction: np.ndarray, count: int) -> bool:
    """Whether rows whose unit vectors have this sum point in one direction more than those of noise."""
    if count < 2:
        return False
    pairs = count * (count - 1)
    cosine = (direction @ direction - count) / pairs
    return bool(cosine > max(_ALIKE, SURE * math.sqrt(2 / (pairs * len(direction)))))


def _value(motion: Motion, span: int, precision: str, same: bool) -> dict[str, Any]:
    """Factor and ηλ, their ends, and what they do not say."""
    count = len(motion.ratio)
    # The mean: of coarse types in short gaps most rows are bitwise equal, and with them the median.
    factor = float(motion.ratio.mean())
    spread = float(motion.ratio.std(ddof=1)) if count > 1 else 0.0
    # Of a few entries that passed a step, the number may have been some more.
    rounding = math.sqrt(float(motion.variance.mean() + _SOME * motion.grain.mean() / count))
    half = 2 * max(spread, rounding) / math.sqrt(count)
    ends = {"factor": factor, "factor_low": factor - half, "factor_high": factor + half}
    if same:
        note = "the checkpoints are the same: a copy, or a learning rate of zero"
        return ends | {"note": note}
    if motion.equal.all():
        room = 2.0 ** -(min(MANTISSA[precision], 23) + 1)  # a smaller ηλ rounds away at every update
        if MANTISSA[precision] >= 23:
            note = "not decayed: rows that get no gradient are bitwise equal"
            return ends | {"lr_decay": 0.0, "lr_decay_low": 0.0, "lr_decay_high": room, "note": note}
        note = (
            f"bitwise equal: not decayed, or trained in {precision}, where an ηλ below {room:.0e} rounds away"
        )
        return ends | {"lr_decay_low": 0.0, "lr_decay_high": room, "note": note}
    low, middle, high = (
        -math.expm1(math.log(each) / span) for each in (factor + half, factor, factor - half)
    )
    return ends | {"lr_decay": middle, "lr_decay_low": low - _HALF_STEP, "lr_decay_high": high + _HALF_STEP}
