"""How a model was trained, as far as the forces need to know: learning rate of every update, decay, betas, eps.

A checkpoint says where the weights were; turning the course of ‖w‖² into forces takes η and λ at every update in
between. A `Recipe` holds them. Published models have theirs here under their names, taken from the configuration
files and the code that they were trained with and not from the papers, which differ from these in places.

The schedules stand in `schedules` and are names of this module too: `wd.recipe.cosine(…)`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from weightdyn.checkpoints.schedules import MAX_UPDATES as MAX_UPDATES
from weightdyn.checkpoints.schedules import LearningRate as LearningRate
from weightdyn.checkpoints.schedules import constant as constant
from weightdyn.checkpoints.schedules import cosine as cosine
from weightdyn.checkpoints.schedules import from_a_tenth as from_a_tenth
from weightdyn.checkpoints.schedules import inverse_sqrt as inverse_sqrt
from weightdyn.checkpoints.schedules import linear as linear
from weightdyn.checkpoints.schedules import neox_cosine as neox_cosine
from weightdyn.checkpoints.schedules import pieces as pieces
from weightdyn.checkpoints.schedules import warmup_stable_decay as warmup_stable_decay
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


@dataclass(frozen=True, repr=False)
class Recipe:
    """The hyperparameters that turn a course of ‖w‖² into forces.

    Args:
        lr: learning rate η: a number, an array (entry i is that of update i + 1), or a function of an integer
            array of 1-based update numbers, such as `constant`, `linear`, `cosine`, `inverse_sqrt`,
            `warmup_stable_decay` and `neox_cosine` make, and `pieces` of several.
        weight_decay: decoupled decay λ of the tensors that decay; 0 for none.
        betas: (β₁, β₂) of Adam's moments.
        eps: Adam's ε.
        decays: function (component, name) -> bool that says which tensors decay, the component as in
            `naming.COMPONENTS`. `matrices_decay` (all but norms and biases), `all_decay`,
            `hidden_matrices_decay`, `all_but_embeddings_decay`, or your own.
        steps: updates of the whole training, where it is known.
        batch_tokens: tokens of an update, where it is known: steps × batch_tokens are those of the training.
        clip: largest norm of the gradient, to which a larger one is scaled down; None where it is not clipped or
            not known. It describes the training: Adam divides a factor that all gradients share out again.
        z_loss: coefficient of the loss on the logits' normalizer, (log Z)²; None where there is none or it is not
            known. It describes the training too: its gradient is part of `alignment`.
        update_scale: factor s on Adam's update u, for optimizers that take larger or smaller ones:
            w' = (1−ηλ)w − η·s·u, so injection is s²η²‖u‖² and decay stays. A counter of bias corrections that
            stays at 1 makes s = √(1−β₂)/(1−β₁), 2.24 for betas (0.9, 0.95).

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
    batch_tokens: float | None = None
    clip: float | None = None
    z_loss: float | None = None
    update_scale: float = 1.0

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
        for name, none in [("batch_tokens", "not known"), ("clip", "none"), ("z_loss", "none")]:
            value = check_number(name, getattr(self, name), 0, open_low=True, none=none)
            object.__setattr__(self, name, value)
        object.__setattr__(
            self, "update_scale", check_number("update_scale", self.update_scale, 0, open_low=True)
        )

    def __repr__(self) -> str:
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                words.append(f"{field.name}={shown(value)}")
            elif value != field.default:
                words.append(f"{field.name}={getattr(value, '__name__', repr(value))}")
        return f"Recipe({', '.join(words)})"

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
                "EleutherAI/pythia-1.4b-deduped", "allenai/OLMo-2-1124-7B"; so are those of the repositories that
                hold the same model's checkpoints, which end in "-hf", "-checkpoints" or
                "-intermediate-checkpoints".
            changes: fields to replace. weight_decay=0.01 is what the Pythia paper's table says.

        Raises:
            ValueError: there is no preset of that name; the message lists those there are.

        Source: data/presets.md has the file that says so for each number.

        >>> recipe = Recipe.preset("pythia-70m")
        >>> recipe.weight_decay, round(recipe.tau), Recipe.preset("pythia-70m", weight_decay=0.01).weight_decay
        (0.1, 10000, 0.01)
        """
        given = check_text("name", name, "the name of a preset").rpartition("/")[2].lower()
        key = re.sub(r"(-hf|(-intermediate)?-checkpoints)$", "", given)
        if key not in PRESETS:
            near = difflib.get_close_matches(key, PRESETS, n=1)
            told = ", ".join(name for name in PRESETS if "-seed" not in name)
            raise ValueError(
                f"name must be one of {told} (of pythia-14m to pythia-410m with -seed1 to -seed9 too); got {name!r}"
                + (f"; the nearest is {near[0]!r}" if near else "")
            )
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

_TOKENS = 2_097_152
"""1024 sequences of 2048, the batch of Pythia and of others."""

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


def _pythia(peak: float) -> Recipe:
    lr = neox_cosine(peak, steps=143_000, warmup=1430, floor=0.1)
    return Recipe(lr, 0.1, (0.9, 0.95), 1e-8, matrices_decay, 143_000, _TOKENS, clip=1.0)


def _olmo(lr: LearningRate, steps: int, decays: Callable[[str, str], bool], sequences: int = 1024) -> Recipe:
    """OLMo-1: ε is 1e-5, and there are no gains or biases of norms."""
    return Recipe(lr, 0.1, (0.9, 0.95), 1e-5, decays, steps, sequences * 4096, clip=1.0)


def _olmo_7b_1_7(until: int, left: float, steps: int) -> Recipe:
    """OLMo-1.7-7B: 3e12 tokens of cosine, left at an update for a line to zero over 50e9 tokens."""
    lr = from_a_tenth(cosine(3e-4, 715_256, 2500, 0.1))
    return _olmo(pieces([(until, lr), (None, linear(left, 11_921))]), steps, all_decay)


def _olmo2(peak: float, schedule: int, warmup: int, steps: int, sequences: int) -> Recipe:
    """OLMo-2's first stage, or its second where there is no warm-up."""
    lr = cosine(peak, schedule, warmup, 0.1) if warmup else linear(peak, schedule)
    return Recipe(
        lr, 0.1, (0.9, 0.95), 1e-8, all_but_embeddings_decay, steps, sequences * 4096, clip=1.0, z_loss=1e-5
    )


def _smollm2(peak: float, steps: int, cooldown: int, tokens: int) -> Recipe:
    lr = warmup_stable_decay(peak, steps, 2000, cooldown, first=0)
    return Recipe(lr, 0.01, (0.9, 0.95), 1e-8, all_decay, steps, tokens, clip=1.0)


PRESETS: dict[str, Recipe] = {
    **{f"pythia-{size}{twin}": _pythia(peak) for size, peak in _PYTHIA.items() for twin in ("", "-deduped")},
    **{
        f"pythia-{size}-seed{seed}": _pythia(_PYTHIA[size])
        for size in ("14m", "31m", "70m", "160m", "410m")
        for seed in range(1, 10)
    },
    "amber": Recipe(
        cosine(3e-4, 274_320, 2000, 0.1, first=0),
        0.1,
        (0.9, 0.95),
        1e-8,
        all_decay,
        274_320,
        2240 * 2048,
        clip=1.0,
    ),
    "olmo-1b": _olmo(from_a_tenth(cosine(4e-4, 739_328, 2000, 0.1)), 739_328, hidden_matrices_decay),
    "olmo-7b": _olmo(
        pieces(
            [
                (501_000, from_a_tenth(linear(3e-4, 476_837, 5000, 0.1))),
                (556_000, linear(3e-5, 199_000, floor=0.1)),
                (None, linear(2.3e-5, 1000, floor=0.001)),
            ]
        ),
        557_000,
        hidden_matrices_decay,
        sequences=1080,
    ),
    "olmo-7b-0424": _olmo_7b_1_7(477_000, 9.785e-5, 489_000),
    "olmo-7b-0724": _olmo_7b_1_7(639_650, 3.743e-5, 651_581),
    "olmoe-1b-7b-0924": Recipe(
        from_a_tenth(cosine(4e-4, 1_192_093, 2500, 0.1)),
        0.1,
        (0.9, 0.95),
        1e-8,
        all_decay,
        1_220_000,
        1024 * 4096,
        clip=1.0,
    ),
    "olmo-2-0425-1b": _olmo2(4e-4, 2_384_186, 4000, 1_907_359, 512),
    "olmo-2-0425-1b-stage2": _olmo2(7.4487e-5, 23_842, 0, 23_852, 512),
    "olmo-2-1124-7b": _olmo2(3e-4, 1_192_093, 2000, 928_646, 1024),
    "olmo-2-1124-7b-stage2": _olmo2(6.1499e-5, 11_921, 0, 11_931, 1024),
    "olmo-2-1124-13b": _olmo2(9e-4, 596_046, 1000, 596_057, 2048),
    "olmo-2-1124-13b-stage2": _olmo2(9e-5, 11_921, 0, 11_931, 2048),
    "olmo-2-1124-13b-stage2-300b": _olmo2(9e-5, 35_763, 0, 35_773, 2048),
    "olmo-2-0325-32b": _olmo2(6e-4, 774_861, 2000, 721_901, 2048),
    "olmo-2-0325-32b-stage2": _olmo2(6.62323e-5, 11_921, 0, 11_921, 2048),
    "olmo-2-0325-32b-stage2-300b": _olmo2(6.62323e-5, 35_763, 0, 35_763, 2048),
    "smollm2-135m": _smollm2(3e-3, 2_000_000, 400_000, 64 * 8 * 2048),
    "smollm2-360m": _smollm2(3e-3, 2_600_000, 520_000, 128 * 6 * 2048),
    "smollm2-1.7b": _smollm2(5e-4, 5_240_000, 524_000, 256 * 4 * 2048),
    "smollm3-3b": Recipe(
        warmup_stable_decay(2e-4, 4_720_001, 2000, 522_000, first=0),
        0.1,
        (0.9, 0.95),
        1e-8,
        all_but_embeddings_decay,
        4_720_000,
        192 * 3 * 4096,
        clip=1.0,
    ),
}
"""Recipes of published models, by name; `data/presets.md` has the public file behind each number.

Updates are those of the names of the published checkpoints, so a stage whose checkpoints count from 1 again (the
second of OLMo-2) is a preset of its own, and one that goes on (SmolLM3's three, OLMo-1.7's line to zero) is not.
Pythia's seeds have the recipe of their size. Amber's checkpoint `ckpt_j` is that of update 762·(j+1).

What to know of them: Pythia's decay is 0.1 in its files and 0.01 in its paper, an error by its maintainers' own
word. OLMo-2-13B's file says a peak of 3e-4, its launch script 9e-4, a tenth of which its second stage starts from.
The optimizer of OLMo-2-32B did not count its updates, which would make `update_scale` 2.24 if it had made the first
ones; it took over before update 80,788 (the first that it left out, of 156 or more) from one that did count, so
the factor is 1 here. That is inferred: hold it against the weights, or give update_scale=5**0.5.
"""
