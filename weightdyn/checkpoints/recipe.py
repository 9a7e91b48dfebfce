"""How a model was trained, as far as the forces need to know: learning rate of every update, decay, betas, eps.

A checkpoint says where the weights were; turning the course of ‖w‖² into forces takes η and λ at every update in
between. A `Recipe` holds them. Published models have theirs here under their names, taken from the configuration
files that they were trained with and not from the papers, which differ from these in places.

Every schedule counts updates from 1: checkpoint t holds the weights after update t. Trainers differ in what they
read from their schedule at the first update, its value at 1 or at 0; `first` says which.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from weightdyn.core.checks import (
    check_betas,
    check_choice,
    check_flag,
    check_number,
    check_path,
    check_text,
    check_whole,
    refuse,
    shown,
)
from weightdyn.core.forces import timescale
from weightdyn.files.weightfiles import parse_json, read_text
from weightdyn.record.runlog import RunLog

LearningRate = Callable[[np.ndarray], np.ndarray]
"""η of each update, as a function of their 1-based numbers."""

MAX_UPDATES = 100_000_000
"""Updates that a training can have here: far more than any had, and few enough for one number each."""


# Schedules.


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
    return partial(_scheduled, _flat, shape, check_whole("first", first, 0, 1))


def linear(peak: float, steps: int, warmup: int = 0, floor: float = 0.0, *, first: int = 1) -> LearningRate:
    """Linear warm-up, then a straight line down to `floor·peak` at n = steps, where it stays.

        η(n) = peak · (floor + (1 − floor) · (steps − n)/(steps − warmup))

    Args:
        peak: the largest learning rate.
        steps: updates of the whole schedule, warm-up included.
        warmup: length of the warm-up, in updates.
        floor: the end, as a fraction of `peak`.
        first: as in `constant`.

    >>> linear(1.0, steps=10, floor=0.5)(np.array([5, 10, 11])).tolist()
    [0.75, 0.5, 0.5]
    """
    return partial(_scheduled, _line, _shape(peak, steps, warmup, floor), check_whole("first", first, 0, 1))


def cosine(peak: float, steps: int, warmup: int = 0, floor: float = 0.0, *, first: int = 1) -> LearningRate:
    """Linear warm-up, then half a cosine down to `floor·peak` at n = steps, where it stays.

        η(n) = peak · (floor + (1 − floor) · ½(1 + cos(π (n − warmup)/(steps − warmup))))

    Arguments as in `linear`.

    >>> cosine(1.0, steps=100, warmup=10, floor=0.2)(np.array([1, 10, 55, 100])).round(3).tolist()
    [0.1, 1.0, 0.6, 0.2]
    """
    return partial(
        _scheduled, _half_cosine, _shape(peak, steps, warmup, floor), check_whole("first", first, 0, 1)
    )


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
    return partial(_scheduled, _stable, replace(shape, cooldown=cooldown), check_whole("first", first, 0, 1))


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
    return partial(_scheduled, _neox, _shape(peak, steps, warmup, floor), 0)


@dataclass(frozen=True)
class _Shape:
    peak: float
    steps: int = 0
    warmup: int = 0
    floor: float = 0.0
    cooldown: int = 0
    start: float = 0.0  # of the warm-up, as a fraction of peak


def _shape(peak: float, steps: int, warmup: int, floor: float) -> _Shape:
    peak, steps = check_number("peak", peak, 0), check_whole("steps", steps, 1, MAX_UPDATES)
    if check_whole("warmup", warmup) >= steps:
        raise ValueError(f"warmup must be from 0 to steps - 1 = {steps - 1}, got {warmup!r}")
    return _Shape(peak, steps, warmup, check_number("floor", floor, 0, 1))


def _scheduled(
    after: Callable[[np.ndarray, _Shape], np.ndarray], shape: _Shape, first: int, updates: np.ndarray
) -> np.ndarray:
    """η at the updates: the warm-up, and what comes `after` it, in units of the peak."""
    n = np.asarray(updates, dtype=np.float64) - 1 + first
    rising = shape.start + (1 - shape.start) * n / max(shape.warmup, 1)
    return shape.peak * np.where(n < shape.warmup, rising, after(np.maximum(n, shape.warmup), shape))


def _flat(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return np.ones_like(n)


def _turn(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return np.minimum((n - shape.warmup) / (shape.steps - shape.warmup), 1)


def _line(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return shape.floor + (1 - shape.floor) * (1 - _turn(n, shape))


def _half_cosine(n: np.ndarray, shape: _Shape) -> np.ndarray:
    return shape.floor + (1 - shape.floor) * (1 + np.cos(np.pi * _turn(n, shape))) / 2


def _stable(n: np.ndarray, shape: _Shape) -> np.ndarray:
    left = np.clip((shape.steps - n) / shape.cooldown, 0, 1)
    return shape.floor + (1 - shape.floor) * left


def _neox(n: np.ndarray, shape: _Shape) -> np.ndarray:
    turn = (np.minimum(n, shape.steps - shape.warmup) - shape.warmup) / shape.steps
    return np.maximum(shape.floor, (1 + np.cos(np.pi * turn)) / 2)


# Which tensors decay.


def matrices_decay(component: str, name: str) -> bool:
    """Everything but norms and biases: what GPT-NeoX, transformers and most trainers decay."""
    return component not in ("norm", "bias")


def all_decay(component: str, name: str) -> bool:
    """Every tensor."""
    return True


def hidden_matrices_decay(component: str, name: str) -> bool:
    """Everything but norms, biases and the embedding of tokens."""
    return component not in ("norm", "bias", "embed")


def all_but_embeddings_decay(component: str, name: str) -> bool:
    """Everything but the embedding of tokens."""
    return component != "embed"


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters that turn a course of ‖w‖² into forces.

    Args:
        lr: learning rate η: a number, an array (entry i is that of update i + 1), or a function of an integer
            array of 1-based update numbers, such as `constant`, `linear`, `cosine`, `warmup_stable_decay` and
            `neox_cosine` make.
        weight_decay: decoupled decay λ of the tensors that decay; 0 for none.
        betas: (β₁, β₂) of Adam's moments.
        eps: Adam's ε.
        decays: function (component, name) -> bool that says which tensors decay, the component as in
            `naming.COMPONENTS`. `matrices_decay` (all but norms and biases), `all_decay`,
            `hidden_matrices_decay`, `all_but_embeddings_decay`, or your own.
        steps: updates of the whole training, where it is known.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.

    >>> recipe = Recipe(lr=cosine(1e-3, steps=1000, warmup=100), weight_decay=0.1)
    >>> recipe.lr_at([1, 100]).tolist(), recipe.decay_of("norm", "ln_f.weight")
    ([1e-05, 0.001], 0.0)
    """

    lr: float | np.ndarray | LearningRate
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decays: Callable[[str, str], bool] = matrices_decay
    steps: int | None = None

    def __post_init__(self):
        if not callable(self.lr):
            try:
                lr = np.asarray(self.lr, dtype=np.float64)
            except (TypeError, ValueError):
                lr = np.array(math.nan)
            if lr.ndim > 1 or not lr.size or not np.all(np.isfinite(lr) & (lr >= 0)):
                raise ValueError(
                    "lr must be a number >= 0, a 1-D array with one for each update, or a function of update "
                    f"numbers; got {shown(self.lr)}"
                )
            object.__setattr__(self, "lr", lr if lr.ndim else float(lr))
        object.__setattr__(self, "weight_decay", check_number("weight_decay", self.weight_decay, 0))
        object.__setattr__(self, "betas", check_betas("betas", self.betas))
        object.__setattr__(self, "eps", check_number("eps", self.eps, 0))
        if not callable(self.decays):
            raise TypeError(
                "decays must be a function (component, name) -> bool, such as recipe.matrices_decay or "
                f"recipe.all_decay; got {shown(self.decays)}"
            )
        check_whole("steps", self.steps, 1, MAX_UPDATES, none="not known")

    def lr_at(self, updates: Any) -> np.ndarray:
        """Learning rate η of updates.

        Args:
            updates: update numbers, 1-based: a number or an array of any shape.

        Returns:
            float64 of the same shape.

        Raises:
            ValueError: an update that is no whole number from 1 on, or behind the end of an array of learning
                rates; a function that does not give each update a finite learning rate >= 0.
        """
        given = updates
        try:
            updates = np.asarray(updates)
        except (TypeError, ValueError, RuntimeError):  # ragged; a tensor that is not on the CPU
            raise refuse("updates", "whole numbers", given) from None
        if updates.dtype.kind not in "iu":
            whole = updates.dtype.kind == "f" and np.isfinite(updates).all() and np.all(updates % 1 == 0)
            if updates.size and not whole:
                raise ValueError(f"updates must be whole numbers, got {shown(given)}")
            updates = updates.astype(np.int64)
        if updates.size and updates.min() < 1:
            raise ValueError(f"updates are counted from 1, got {updates.min()}")
        if callable(self.lr):
            return self._called(updates)
        if isinstance(self.lr, np.ndarray):
            if updates.size and updates.max() > len(self.lr):
                raise ValueError(
                    f"update {updates.max()} lies behind lr, which has {len(self.lr)} entries, one for each update"
                )
            return self.lr[updates.astype(np.int64) - 1]
        return np.full(updates.shape, self.lr)

    def _called(self, updates: np.ndarray) -> np.ndarray:
        """What the function `lr` gives for each update, checked."""
        found = self.lr(updates)  # type: ignore[operator]
        try:
            lr = np.broadcast_to(np.asarray(found, dtype=np.float64), updates.shape)
        except (TypeError, ValueError):
            raise ValueError(
                f"lr: the function must return one learning rate for each of {updates.size} updates, "
                f"got {shown(found)}"
            ) from None
        wrong = ~(np.isfinite(lr) & (lr >= 0))
        if wrong.any():
            raise ValueError(
                f"lr: the learning rate of update {updates[wrong].flat[0]} must be a finite number >= 0, "
                f"got {lr[wrong].flat[0]}"
            )
        return lr

    def decay_of(self, component: str, name: str) -> float:
        """Decay λ of a tensor: `weight_decay` if it decays, else 0."""
        return float(self.weight_decay) if self.decays(component, name) else 0.0

    @property
    def tau(self) -> float:
        """Relaxation time τ = 1/(ηλ) at the peak of the learning rate, in updates."""
        if callable(self.lr) and self.steps is None:
            raise ValueError("tau needs the peak of the learning rate, so a recipe with steps")
        if self.steps is None:
            return timescale(float(np.max(np.asarray(self.lr))), self.weight_decay)
        starts = range(1, self.steps + 1, _AT_A_TIME)
        peaks = [self.lr_at(np.arange(a, min(a + _AT_A_TIME, self.steps + 1))).max() for a in starts]
        return timescale(float(max(peaks)), self.weight_decay)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """The recipe of a published model.

        Args:
            name: a name of `PRESETS`, in any case, with or without its organisation: "pythia-70m",
                "EleutherAI/pythia-1.4b-deduped", "allenai/OLMo-2-1124-7B".
            changes: fields to replace. weight_decay=0.01 is what the Pythia paper's table says.

        Raises:
            ValueError: there is no preset of that name; the message lists those there are.

        >>> recipe = Recipe.preset("pythia-70m")
        >>> recipe.weight_decay, round(recipe.tau), Recipe.preset("pythia-70m", weight_decay=0.01).weight_decay
        (0.1, 10000, 0.01)
        """
        key = check_text("name", name, "the name of a preset").rpartition("/")[2].lower()
        if key not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}; got {name!r}")
        return replace(PRESETS[key], **changes)

    @classmethod
    def from_settings(
        cls,
        *,
        lr: float,
        steps: int,
        schedule: str = "cosine",
        warmup: int = 0,
        floor: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decayed: str = "matrices",
    ) -> Recipe:
        """The recipe of a training in the reference trainer's words.

        Args:
            lr: peak learning rate.
            steps: updates of the whole training.
            schedule: "cosine" down to `floor·lr` at the last update, or "constant".
            warmup: updates of linear warm-up, from lr/warmup to lr.
            floor: the cosine's end as a fraction of `lr`.
            weight_decay, betas, eps: as in `Recipe`.
            decayed: "matrices" (not norms and biases) or "all".

        Raises:
            ValueError: `schedule` or `decayed` is none of these.

        >>> Recipe.from_settings(lr=1.0, steps=100, warmup=10, floor=0.2).lr_at([1, 10, 55, 100]).round(3).tolist()
        [0.1, 1.0, 0.6, 0.2]
        """
        check_choice("schedule", schedule, ("cosine", "constant"))
        check_choice("decayed", decayed, ("matrices", "all"))
        check_whole("steps", steps, 1, MAX_UPDATES)
        check_number("lr", lr, 0)
        turns = schedule == "cosine" and check_whole("warmup", warmup) < steps
        rates = cosine(lr, steps, warmup, floor) if turns else constant(lr, warmup)
        return cls(rates, weight_decay, betas, eps, all_decay if decayed == "all" else matrices_decay, steps)

    @classmethod
    def from_run(cls, run: RunLog | str | PathLike[str]) -> Recipe:
        """The recipe of a run of the reference trainer: exact, with its learning rate at every update.

        Args:
            run: the run, or its directory.

        Raises:
            ValueError: the run does not say how it was trained.
        """
        log = run if isinstance(run, RunLog) else RunLog(check_path("run", run))
        names = list(inspect.signature(cls.from_settings).parameters)
        train = log.info.get("train")
        if not isinstance(train, dict) or not {"lr", "steps"} <= set(train):
            raise ValueError(
                f"run: {log.path or 'the run in memory'} does not say how it was trained (run.json has no section "
                "'train' with lr and steps); give the recipe yourself, Recipe(lr=…, weight_decay=…)"
            )
        try:
            return cls.from_settings(**{name: train[name] for name in names if name in train})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"run: {log.path or 'the run in memory'}: the section 'train' of run.json cannot be used "
                f"({error}); mend it, or give the recipe yourself, Recipe(lr=…, weight_decay=…)"
            ) from error

    @classmethod
    def from_trainer_state(
        cls, state: str | PathLike[str] | Mapping[str, Any], *, ahead: bool = False, **fields: Any
    ) -> Recipe:
        """A recipe with the learning rates that transformers' Trainer logged.

        Args:
            state: a `trainer_state.json`, the folder that has it (`checkpoint-500`), or its content. Between the
                updates that were logged η is interpolated linearly.
            ahead: the file was written by transformers before 4.51, whose entry at global step s has the learning
                rate of update s + 1; later ones have that of update s.
            fields: weight_decay, betas, eps, decays: the file does not have them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no regular file or no JSON; nothing in it has a learning rate; a step or a learning
                rate that cannot be.

        Source: github.com/huggingface/transformers, pull request 36973.
        """
        check_flag("ahead", ahead)
        remedy = "copy it again, or give the schedule instead, Recipe(lr=linear(…))"
        if isinstance(state, Mapping):
            where, content = "state", state
        else:
            path = check_path("state", state)
            path = path / "trainer_state.json" if path.is_dir() else path
            where, content = str(path), parse_json(read_text(path), path, remedy)
        history = content.get("log_history", [])
        if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
            raise ValueError(f"{where}: log_history must be a list of records {{…}}; {remedy}")
        logged = [entry for entry in history if "learning_rate" in entry]
        if not logged:
            raise ValueError(
                f"{where}: log_history has no entry with a learning_rate; give the schedule instead, "
                "Recipe(lr=linear(…))"
            )
        try:
            known = {
                check_whole("step", entry.get("step"), 0, MAX_UPDATES - 1) + bool(ahead): check_number(
                    "learning_rate", entry["learning_rate"], 0
                )
                for entry in logged
            }
            steps = check_whole("max_steps", content.get("max_steps") or 0, -1, MAX_UPDATES)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}; {remedy}") from None
        updates = np.array(sorted(known))
        steps = max(steps, int(updates[-1]), 1)
        rates = np.array([known[update] for update in updates.tolist()])
        return cls(lr=partial(_between, updates, rates, steps), steps=steps, **fields)


_AT_A_TIME = 1 << 20


def _between(known: np.ndarray, rates: np.ndarray, steps: int, updates: np.ndarray) -> np.ndarray:
    """η between the updates at which it was logged."""
    if updates.size and updates.max() > steps:
        raise ValueError(f"update {updates.max()} lies behind the training, which has {steps} updates")
    return np.interp(updates, known, rates)


# Published models.


def _pythia(peak: float) -> Recipe:
    lr = neox_cosine(peak, steps=143_000, warmup=1430, floor=0.1)
    return Recipe(lr, 0.1, (0.9, 0.95), 1e-8, matrices_decay, 143_000)


_PYTHIA = {
    "14m": 1e-3,
    "31m": 1e-3,
    "70m": 1e-3,
    "160m": 6e-4,
    "410m": 3e-4,
    "1b": 2.5e-4,
    "1.4b": 2e-4,
    "2.8b": 1.6e-4,
    "6.9b": 1.2e-4,
    "12b": 1.2e-4,
}


def _olmo(lr: LearningRate, steps: int, eps: float, decays: Callable[[str, str], bool]) -> Recipe:
    return Recipe(lr, 0.1, (0.9, 0.95), eps, decays, steps)


def _from_a_tenth(lr: Any) -> LearningRate:
    """The schedule with a warm-up that starts at a tenth of the peak, as OLMo-1's does."""
    after, shape, first = lr.args
    return partial(_scheduled, after, replace(shape, start=0.1), first)


PRESETS: dict[str, Recipe] = {
    **{f"pythia-{size}{twin}": _pythia(peak) for size, peak in _PYTHIA.items() for twin in ("", "-deduped")},
    "olmo-1b": _olmo(_from_a_tenth(cosine(4e-4, 739_328, 2000, 0.1)), 739_328, 1e-5, hidden_matrices_decay),
    "olmo-7b": _olmo(_from_a_tenth(linear(3e-4, 476_837, 5000, 0.1)), 476_837, 1e-5, hidden_matrices_decay),
    "olmo-2-0425-1b": _olmo(cosine(4e-4, 2_384_186, 4000, 0.1), 1_907_349, 1e-8, all_but_embeddings_decay),
    "olmo-2-1124-7b": _olmo(cosine(3e-4, 1_192_093, 2000, 0.1), 928_646, 1e-8, all_but_embeddings_decay),
}
"""Recipes of published models, by name.

Pythia, and its deduplicated twins: `models/<size>/pythia-<size>.yml` in github.com/EleutherAI/pythia. Peak of
14m, 31m and 70m 1e-3, 160m 6e-4, 410m 3e-4, 1b 2.5e-4 (its README says 3e-4), 1.4b 2e-4, 2.8b 1.6e-4, 6.9b
and 12b 1.2e-4; `neox_cosine` over 143,000 updates with 1,430 of warm-up and a floor of a tenth; betas (0.9, 0.95),
eps 1e-8. Decay is 0.1 in the files; the paper's table says 0.01, an error by its maintainers' own word (issue 132
there). Matrices and embeddings decay, norms and biases do not.

OLMo-1: `configs/official/OLMo-1B.yaml` and `OLMo-7B.yaml` in github.com/allenai/OLMo. 1B: peak 4e-4, cosine to a
tenth over 739,328 updates; 7B: peak 3e-4, a line to a tenth over 2e12 tokens in batches of 2048 x 2048 (its
checkpoints go on behind the end of that file's schedule, where this recipe stays at the floor). The warm-up of
2,000 and 5,000 updates starts at a tenth of the peak; betas (0.9, 0.95), eps 1e-5 and decay 0.1 on the matrices of
the blocks (there are no norm gains or biases). OLMo-2, first stage: `configs/official-0425/OLMo2-1B-stage1.yaml`
and `configs/official-1124/OLMo2-7B-stage1.yaml` there. Peaks 4e-4 and 3e-4, cosine to a tenth over 5e12 tokens in
batches of 512 and 1024 x 4096, though both stop before its end (7B at update 928,646, its last checkpoint);
warm-up over 8,388,608,000 tokens; betas (0.9,
0.95), eps 1e-8, decay 0.1 on everything, norms too, but the embedding.
"""
