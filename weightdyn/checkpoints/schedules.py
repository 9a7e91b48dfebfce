"""Learning rates of a training: η of each update, as a function of the updates' numbers.

Every schedule counts updates from 1: checkpoint t holds the weights after update t. Trainers differ in what they
read from their schedule at the first update, its value at 1 or at 0; `first` says which. `pieces` puts several
after each other, for stages, restarts and a schedule that was changed in mid-run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightdyn.core.checks import check_number, check_whole, refuse, shown

LearningRate = Callable[[np.ndarray], np.ndarray]
"""η of each update, as a function of their 1-based numbers."""

MAX_UPDATES = 100_000_000
"""Updates that a training can have here: far more than any had, and few enough for one number each."""


def constant(peak: float, warmup: int = 0, *, first: int = 1) -> LearningRate:
    """Linear warm-up over `warmup` updates, then `peak` for ever.

        η(n) = peak · min(n/warmup, 1)        n = update − 1 + first

    Args:
        peak: the largest learning rate.
        warmup: length of the warm-up, in updates; 0 for none.
        first: what the schedule's counter n shows at update 1: 1, as in `weightdyn train`, or 0 in trainers that
            take their first update before the schedule's first step, as transformers' and GPT-NeoX do.

    Returns:
        A function of update numbers (an integer array), for `Recipe(lr=…)`; so do all schedules here.

    >>> constant(1.0, warmup=4)(np.array([1, 4, 100])).tolist()
    [0.25, 1.0, 1.0]
    """
    shape = _Shape(check_number("peak", peak, 0), warmup=check_whole("warmup", warmup, 0))
    return _Schedule("constant", _flat, shape, check_whole("first", first, 0, 1))


def linear(peak: float, steps: int, warmup: int = 0, floor: float = 0.0, *, first: int = 1) -> LearningRate:
    """Linear warm-up, then a straight line down to `floor·peak` at n = steps, where it stays.

        η(n) = peak · (floor + (1 − floor) · (steps − n)/(steps − warmup))

    Args:
        peak: the largest learning rate.
        steps: updates of the whole schedule, warm-up included.
        warmup: length of the warm-up, in updates.
        floor: the end, as a fraction of `peak`; 0 is a decay to zero.
        first: as in `constant`.

    >>> linear(1.0, steps=10, floor=0.5)(np.array([5, 10, 11])).tolist()
    [0.75, 0.5, 0.5]
    """
    shape = _shape(peak, steps, warmup, floor)
    return _Schedule("linear", _line, shape, check_whole("first", first, 0, 1))


def cosine(peak: float, steps: int, warmup: int = 0, floor: float = 0.0, *, first: int = 1) -> LearningRate:
    """Linear warm-up, then half a cosine down to `floor·peak` at n = steps, where it stays.

        η(n) = peak · (floor + (1 − floor) · ½(1 + cos(π (n − warmup)/(steps − warmup))))

    Arguments as in `linear`.

    >>> cosine(1.0, steps=100, warmup=10, floor=0.2)(np.array([1, 10, 55, 100])).round(3).tolist()
    [0.1, 1.0, 0.6, 0.2]
    """
    shape = _shape(peak, steps, warmup, floor)
    return _Schedule("cosine", _half_cosine, shape, check_whole("first", first, 0, 1))


def inverse_sqrt(peak: float, warmup: int, *, first: int = 1) -> LearningRate:
    """Linear warm-up, then a fall with the root of the updates, without an end.

        η(n) = peak · √(warmup/n)        for n ≥ warmup

    Args:
        peak: the largest learning rate, at n = warmup.
        warmup: length of the warm-up, in updates, 1 or more: it is the fall's unit too.
        first: as in `constant`.

    Source: arXiv 1706.03762, equation 3; transformers' `get_inverse_sqrt_schedule` with first=0.

    >>> inverse_sqrt(1.0, warmup=4)(np.array([1, 4, 16, 400])).tolist()
    [0.25, 1.0, 0.5, 0.1]
    """
    shape = _Shape(check_number("peak", peak, 0), warmup=check_whole("warmup", warmup, 1, MAX_UPDATES))
    return _Schedule("inverse_sqrt", _root, shape, check_whole("first", first, 0, 1))


def warmup_stable_decay(
    peak: float, steps: int, warmup: int, cooldown: int, floor: float = 0.0, *, first: int = 1
) -> LearningRate:
    """Linear warm-up, then `peak`, then over the last `cooldown` updates a straight line to `floor·peak`.

    Args:
        peak: the largest learning rate.
        steps: updates of the whole schedule.
        warmup: length of the warm-up, in updates.
        cooldown: length of the final decay, in updates; warmup + cooldown <= steps.
        floor: the end, as a fraction of `peak`.
        first: as in `constant`.

    Source: arXiv 2405.18392 and 2404.06395 (there "WSD").

    >>> warmup_stable_decay(1.0, steps=100, warmup=10, cooldown=20)(np.array([5, 50, 90, 100])).tolist()
    [0.5, 1.0, 0.5, 0.0]
    """
    shape = _shape(peak, steps, warmup, floor)
    if not 0 < check_whole("cooldown", cooldown) <= steps - warmup:
        raise ValueError(
            f"cooldown must be from 1 to steps - warmup = {steps - warmup}, got {cooldown!r}; "
            "constant() is the schedule without one"
        )
    shape = replace(shape, cooldown=cooldown)
    return _Schedule("warmup_stable_decay", _stable, shape, check_whole("first", first, 0, 1))


def neox_cosine(peak: float, steps: int, warmup: int, floor: float) -> LearningRate:
    """The cosine that GPT-NeoX ran until 2023, and that Pythia was trained with.

        n ≤ warmup:  η(n) = peak · n/warmup
        then:        η(n) = max(floor·peak, peak/2 · (1 + cos(π (min(n, steps − warmup) − warmup)/steps)))

    and update k takes η(k − 1), so the first update moves nothing and step1 equals step0. Its period is `steps`
    and not steps − warmup, and the floor is a maximum and not the cosine's end: with a floor of a tenth, η is
    flat over the last fifth of the training.

    Args:
        peak: the largest learning rate ("lr" in the configuration).
        steps: "lr-decay-iters", or "train-iters".
        warmup: updates of the warm-up: "warmup" times steps.
        floor: "min_lr" as a fraction of peak.

    Source: GPT-NeoX, megatron/learning_rates.py; changed by its pull requests 1008 (the floor) and 1379 (the
    first update).

    >>> lr = neox_cosine(1e-3, steps=143_000, warmup=1430, floor=0.1)
    >>> lr(np.array([1, 1431, 143_000])).tolist()
    [0.0, 0.001, 0.0001]
    """
    return _Schedule("neox_cosine", _neox, _shape(peak, steps, warmup, floor), 0)


def pieces(parts: Iterable[tuple[int | None, LearningRate]]) -> LearningRate:
    """Schedules after each other: stages, a restart, a decay that was added, a change of plan in mid-run.

        η(update) = schedule_j(update − until_{j−1})        for until_{j−1} < update ≤ until_j,  until_0 = 0

    Each schedule counts from the beginning of its own piece, so a warm-up in a later one is a restart, and one
    that goes on from where the other was is a line or a curve from that value.

    Args:
        parts: pairs (until, schedule): the last update of the piece, and a function of update numbers such as
            those here. The last piece has no end: its `until` is None.

    Raises:
        TypeError, ValueError: no pair, `until` does not rise, or the last one is not None.

    >>> lr = pieces([(100, cosine(1.0, steps=100, floor=0.5)), (None, linear(0.5, steps=50))])
    >>> lr(np.array([100, 101, 125, 150, 200])).tolist()
    [0.5, 0.49, 0.25, 0.0, 0.0]
    """
    accepted = "pairs (until, schedule), until the last update of a piece and None in the last pair"
    try:
        given = [(until, schedule) for until, schedule in parts]
    except (TypeError, ValueError, RuntimeError):  # a sparse tensor cannot be gone through
        raise refuse("parts", accepted, parts) from None
    if not given or given[-1][0] is not None:
        raise ValueError(
            f"parts must be {accepted}, got {shown(parts)}; the training's end is Recipe(steps=…)"
        )
    ends: list[int] = []
    for until, _ in given[:-1]:
        ends.append(check_whole("parts: until", until, ends[-1] + 1 if ends else 1, MAX_UPDATES))
    for _, schedule in given:
        if not callable(schedule):
            raise TypeError(
                "parts: a schedule must be a function of update numbers, such as cosine(…); constant(…) is the one "
                f"of a number; got {shown(schedule)}"
            )
    return _Pieces(tuple(ends), tuple(schedule for _, schedule in given))


@dataclass(frozen=True)
class _Shape:
    peak: float
    steps: int = 0
    warmup: int = 0
    cooldown: int = 0
    floor: float = 0.0
    start: float = 0.0  # of the warm-up, as a fraction of peak


def _shape(peak: float, steps: int, warmup: int, floor: float) -> _Shape:
    peak, steps = check_number("peak", peak, 0), check_whole("steps", steps, 1, MAX_UPDATES)
    if check_whole("warmup", warmup) >= steps:
        raise ValueError(f"warmup must be from 0 to steps - 1 = {steps - 1}, got {warmup!r}")
    return _Shape(peak, steps, warmup, floor=check_number("floor", floor, 0, 1))


@dataclass(frozen=True, repr=False)
class _Schedule:
    """A warm-up and what comes `after` it, in units of the peak. A class, for it must print and pickle."""

    name: str
    after: Callable[[np.ndarray, _Shape], np.ndarray]
    shape: _Shape
    first: int

    def __call__(self, updates: Any) -> np.ndarray:
        shape = self.shape
        n = np.asarray(updates, dtype=np.float64) - 1 + self.first
        rising = shape.start + (1 - shape.start) * n / max(shape.warmup, 1)
        return shape.peak * np.where(n < shape.warmup, rising, self.after(np.maximum(n, shape.warmup), shape))

    def __repr__(self) -> str:
        told = {name: value for name, value in vars(self.shape).items() if value or name == "peak"}
        if self.first == 0 and self.name != "neox_cosine":
            told["first"] = 0
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in told.items())})"


@dataclass(frozen=True, repr=False)
class _Pieces:
    ends: tuple[int, ...]
    schedules: tuple[LearningRate, ...]

    def __call__(self, updates: Any) -> np.ndarray:
        updates = np.asarray(updates)
        of = np.searchsorted(self.ends, updates)
        rates = np.empty(updates.shape)
        for piece, (begin, schedule) in enumerate(zip((0, *self.ends), self.schedules, strict=True)):
            here = of == piece
            rates[here] = schedule(updates[here] - begin)
        return rates

    def __repr__(self) -> str:
        told = zip((*self.ends, None), self.schedules, strict=True)
        return f"pieces([{', '.join(f'({until}, {schedule!r})' for until, schedule in told)}])"


def from_a_tenth(schedule: LearningRate) -> LearningRate:
    """A schedule of this module whose warm-up starts at a tenth of the peak instead of 0, as OLMo's does.

        η(n) = peak · (0.1 + 0.9 · n/warmup)        for n < warmup

    Args:
        schedule: what one of the functions above made, with a warm-up.

    Source: github.com/allenai/OLMo, olmo/optim.py, `_linear_warmup` without `warmup_min_lr`.

    >>> from_a_tenth(constant(1.0, warmup=10))(np.array([5, 10])).tolist()
    [0.55, 1.0]
    """
    if not isinstance(schedule, _Schedule):
        raise refuse("schedule", "one of this module's schedules with a warm-up, such as cosine(…)", schedule)
    return replace(schedule, shape=replace(schedule.shape, start=0.1))


def _flat(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return np.ones_like(n)


def _turn(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return np.minimum((n - shape.warmup) / (shape.steps - shape.warmup), 1)


def _line(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return shape.floor + (1 - shape.floor) * (1 - _turn(n, shape))


def _half_cosine(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return shape.floor + (1 - shape.floor) * (1 + np.cos(np.pi * _turn(n, shape))) / 2


def _root(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return np.sqrt(shape.warmup / n)


def _stable(n: np.ndarray, shape: _Shape) -> np.ndarray:
    left = np.clip((shape.steps - n) / shape.cooldown, 0, 1)
    return shape.floor + (1 - shape.floor) * left


def _neox(n: np.ndarray, shape: _Shape) -> np.ndarray:
    turn = (np.minimum(n, shape.steps - shape.warmup) - shape.warmup) / shape.steps
    return np.maximum(shape.floor, (1 + np.cos(np.pi * turn)) / 2)
