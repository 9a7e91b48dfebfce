"""The learning rate of the update that made a checkpoint.

A checkpoint has the rate of the *next* update as a rule: trainers step the scheduler behind the optimizer, and save
then. So a rate is looked for where it can be checked: the scheduler's law, made anew from what it kept of itself,
must give at its present count the rate that it says it has set; then it gives the one before. Whether it was
stepped since the update is told by counts: of the updates that the moments have had, and of the scheduler's steps.
What cannot be told so is NaN, with the reason, and the user can say it.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import numpy as np
import torch
from torch.optim import lr_scheduler

from weightdyn.checkpoints.recipe import LearningRate, Recipe
from weightdyn.core.checks import check_number, refuse
from weightdyn.files.statefiles import SavedState

LEARNED_FROM = {
    "file": "the file says at which rate the update was made",
    "schedule": "the scheduler's law, which gives the rate that stands in the file for the next update as well",
    "log": "the trainer's log of this update",
    "group": "the optimizer's group, which no scheduler changes: not checked",
    "given": "the argument lr",
    "": "not known",
}
"""What `lr_from` says of a rate, and what it means."""

Given = float | LearningRate | Recipe
"""A rate that the user knows: a number, a function of update numbers, or a recipe."""


class Rate(NamedTuple):
    """η of one group in the update that made a checkpoint.

    Attributes:
        lr: NaN where it is not known.
        source: one of `LEARNED_FROM`.
        why: why it is not known, or not checked; empty otherwise.
        betas: those of the update, where a scheduler moves them too; None for the group's.
    """

    lr: float
    source: str
    why: str = ""
    betas: tuple[float, float] | None = None


def find_rates(
    state: SavedState, made: int, step: int, given: Given | Sequence[Given] | None = None
) -> list[Rate]:
    """η of each group in the update that made a checkpoint.

    Args:
        state: the checkpoint.
        made: updates that the optimizer's moments have had.
        step: the update's number, which functions of it are called with.
        given: what the user knows, for all groups or for each; checked against what the file says.

    Raises:
        ValueError: `given` contradicts the file, or is one for groups that differ.
    """
    told = _told(state, made)
    if given is None:
        return told
    each = _for_each(given, state)
    return [_checked(state, index, told[index], one, step) for index, one in enumerate(each)]


def _unknown(state: SavedState, why: str) -> list[Rate]:
    return [Rate(math.nan, "", why)] * len(state.groups)


def _told(state: SavedState, made: int) -> list[Rate]:
    """What the file says."""
    if state.rates is not None:
        why = "the file does not know the learning rate of its update"
        return [Rate(math.nan, "", why) if lr is None else Rate(float(lr), "file") for lr in state.rates]
    if state.schedule is None:
        return [_of_group(group) for group in state.groups]
    last, following = state.schedule.get("last_epoch"), _following(state.schedule)
    if not _is_count(last) or len(following) != len(state.groups):
        return _unknown(
            state,
            "its scheduler's state does not say how often it was stepped, or what it has set (lr= tells the rate)",
        )
    last = int(last)
    if any(
        not _same(group.get("lr"), lr, following) for group, lr in zip(state.groups, following, strict=True)
    ):
        return _unknown(state, "its scheduler says other rates than stand in the optimizer's groups")
    laws = _laws(state, last)
    turns = _turns(state, made, last)
    if laws is None:
        return _logged(state, following) or _unknown(
            state,
            "its scheduler is of a kind that keeps its law to itself, or is not known (lr= tells the rate)",
        )
    values = [laws(turn) for turn in turns if turn >= 0]
    if not values or any(not _alike(values[0], each, following) for each in values):
        return _logged(state, following) or _unknown(
            state,
            f"its scheduler was stepped {last} times and the optimizer {made}, so that it is not certain whether "
            "it was stepped since the last update (lr= tells the rate)",
        )
    return [Rate(lr, "schedule", "", betas) for lr, betas in values[0]]


def _of_group(group: Mapping[str, Any]) -> Rate:
    """Of an optimizer without a scheduler's state."""
    lr = group.get("lr")
    if "initial_lr" in group:
        return Rate(
            math.nan,
            "",
            "a scheduler was attached, and the checkpoint has nothing of it (lr= tells the rate)",
        )
    if not _is_number(lr):
        return Rate(math.nan, "", "its group names no learning rate")
    return Rate(
        float(lr),
        "group",
        "no scheduler was attached; a loop that sets the next rate before it saves would make this one wrong",
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    )


def _is_count(value: Any) -> TypeGuard[float]:
    return _is_number(value) and value == int(value) and value < 1 << 53


def _same(one: Any, other: Any, scale: Sequence[float]) -> bool:
    """Whether two rates are one, to what is left of them behind steps of a recursion."""
    if not _is_number(one) or not _is_number(other):
        return False
    return abs(one - other) <= 1e-6 * max(one, other) + 1e-9 * max(scale)


def _following(schedule: Mapping[str, Any]) -> list[float]:
    """The rates that a scheduler has set; none where it does not say so."""
    found = schedule.get("_last_lr")
    return found if isinstance(found, list) and found and all(map(_is_number, found)) else []


# --- when -------------------------------------------------------------------------------------------------


def _turns(state: SavedState, made: int, last: int) -> list[int]:
    """The scheduler's counts at which the last update may have been made: one where that is certain."""
    # One that is stepped more often than the optimizer may have been so since, at every batch that accumulates.
    more = -(-last // made) if last > made else 1
    either = [*range(last - more, last + 1)]
    if state.format == "transformers":  # which steps it behind every update that is made, and saves then
        return [last - 1]
    if state.format == "lightning":
        return _turns_of_lightning(state, made, last) or either
    if state.format == "accelerate" and last > made and last % made == 0:  # of several processes
        return [last - more] if state.facts.get("processes") in (0, more) else either
    if state.format != "accelerate" and _scales(state):  # updates that were skipped may have stepped it
        return either
    if last == made:
        return [last - 1]
    # Behind two updates it may be one that is stepped with every second of them.
    return [last] if last == made - 1 != 1 else either


def _scales(state: SavedState) -> bool:
    """Whether a GradScaler may have skipped updates."""
    return bool(state.facts.get("scaler"))


def _turns_of_lightning(state: SavedState, made: int, last: int) -> list[int]:
    """Lightning steps a scheduler behind each update or each epoch's last batch; its loops tell which."""
    scaler = state.facts.get("scaler") or {}
    if last == made and not scaler:
        return [last - 1]
    if last == state.step and scaler.get("_growth_tracker", 0) > 0:  # the last update was not skipped
        return [last - 1]
    progress = state.facts.get("progress") or {}
    stepped = _count_in(progress, "epoch_loop.scheduler_progress", "current", "completed")
    epochs = _count_in(progress, "epoch_progress", "total", "ready")
    batches = progress.get("epoch_loop.batch_progress")
    at_end = isinstance(batches, Mapping) and batches.get("is_last_batch")
    begun = _count_in(progress, "epoch_loop.batch_progress", "current", "processed")
    if at_end is False and stepped == 0 and (begun or 0) > 0:
        return [last]
    if at_end is True and stepped == 1 and last == epochs:
        return [last - 1]
    return []


def _count_in(tree: Any, *keys: str) -> int | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return int(tree) if _is_count(tree) else None


# --- laws -------------------------------------------------------------------------------------------------

_Rates = list[tuple[float, tuple[float, float] | None]]
_Law = Callable[[int], _Rates]

_BASE = {
    "base_lrs", "last_epoch", "verbose", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr",
}  # fmt: skip
_ONE_CYCLE = {"total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum", "use_beta1"}
_KINDS: dict[frozenset[str], Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    frozenset({"step_size", "gamma"}): lambda o: lr_scheduler.StepLR(o, 1),
    frozenset({"milestones", "gamma"}): lambda o: lr_scheduler.MultiStepLR(o, [1]),
    frozenset({"gamma"}): lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    frozenset({"factor", "total_iters"}): lambda o: lr_scheduler.ConstantLR(o),
    frozenset({"start_factor", "end_factor", "total_iters"}): lambda o: lr_scheduler.LinearLR(o),
    frozenset({"total_iters", "power"}): lambda o: lr_scheduler.PolynomialLR(o),
    frozenset({"T_max", "eta_min"}): lambda o: lr_scheduler.CosineAnnealingLR(o, 1),
    frozenset({"T_0", "T_i", "T_mult", "eta_min", "T_cur"}): lambda o: (
        lr_scheduler.CosineAnnealingWarmRestarts(o, 1)
    ),
    frozenset(_ONE_CYCLE): lambda o: lr_scheduler.OneCycleLR(o, 1.0, 2),
}
"""torch's schedulers by what they keep of themselves, and how to make one that can take it over."""

_MOVED = (
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "betas",
)  # a group's, by a scheduler
_MILESTONES = 10_000


def _laws(state: SavedState, last: int) -> _Law | None:
    """The rates that the scheduler sets at a count; None if that is not known, or not what it has set at `last`."""
    schedule = cast(Mapping[str, Any], state.schedule)
    for law in (_law_of_torch(schedule, state.groups), _law_of_transformers(schedule, state)):
        if law is not None and (now := law(last)) and _is_now(now, state):
            return law
    return None


def _is_now(now: _Rates, state: SavedState) -> bool:
    """Whether rates (and betas, where they move) are those of the optimizer's groups."""
    following = _following(cast(Mapping[str, Any], state.schedule))
    if not _alike(now, [(lr, None) for lr in following], following):
        return False
    moved = [
        (betas, group.get("betas")) for (_, betas), group in zip(now, state.groups, strict=True) if betas
    ]
    return all(np.allclose(mine, cast(Any, theirs), rtol=1e-6, atol=0) for mine, theirs in moved)


def _alike(one: _Rates, other: _Rates, scale: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        _same(a, b, scale) for (a, _), (b, _) in zip(one, other, strict=True)
    )


def _law_of_torch(schedule: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> _Law | None:
    """That of one of torch's schedulers, made anew and put to a count."""
    own = frozenset(schedule) - _BASE
    if own == {"_milestones", "_schedulers"}:
        return _law_of_sequence(schedule, groups)
    make = _KINDS.get(own)
    base = schedule.get("base_lrs")
    if (
        make is None
        or not isinstance(base, list)
        or len(base) != len(groups)
        or not all(map(_is_number, base))
    ):
        return None
    kept = _safe({name: schedule[name] for name in own})
    moves = own == _ONE_CYCLE and bool(schedule.get("cycle_momentum"))

    def law(count: int) -> _Rates:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a count is given to step() here, which is out of fashion
                moved = [{name: group[name] for name in _MOVED if name in group} for group in groups]
                optimizer = torch.optim.Adam(
                    [{"params": [torch.zeros(1)], "lr": lr, "initial_lr": lr} for lr in base]
                )
                scheduler = make(optimizer)
                for group, own_options in zip(optimizer.param_groups, moved, strict=True):
                    group.update(own_options)
                scheduler.load_state_dict({**kept, "base_lrs": [float(lr) for lr in base]})
                scheduler.step(count)
            return [
                (float(group["lr"]), tuple(group["betas"]) if moves else None)
                for group in optimizer.param_groups
            ]
        except Exception:  # numbers that make no schedule
            return []

    return law


def _safe(kept: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler keeps, as numbers whose powers and sums cannot take for ever."""
    found: dict[str, Any] = {}
    for name, value in kept.items():
        if name == "milestones":
            times = {float(k): v for k, v in value.items()} if isinstance(value, dict) else {}
            if not all(map(_is_count, times.values())) or sum(times.values()) > _MILESTONES:
                return {}
            found[name] = Counter(times)
        elif isinstance(value, bool | str | list):
            found[name] = value
        elif _is_count(value) and name != "gamma":
            found[name] = int(value)
        else:
            found[name] = float(value) if isinstance(value, int | float) else value
    return found


def _law_of_sequence(schedule: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> _Law | None:
    """SequentialLR's: each of its schedulers from its milestone on, counted anew."""
    milestones, inner = schedule["_milestones"], schedule["_schedulers"]
    if not isinstance(milestones, list) or not isinstance(inner, list) or not all(map(_is_count, milestones)):
        return None
    if (
        len(inner) != len(milestones) + 1
        or len(inner) > _MILESTONES
        or not all(isinstance(s, Mapping) for s in inner)
    ):
        return None
    laws = [_law_of_torch(each, groups) for each in inner]

    def law(count: int) -> _Rates:
        place = bisect_right(milestones, count)
        own = laws[place]
        return [] if own is None else own(count - (milestones[place - 1] if place else 0))

    return law


def _law_of_transformers(schedule: Mapping[str, Any], state: SavedState) -> _Law | None:
    """That of transformers' Trainer, by the arguments that it saved."""
    arguments, history = state.facts.get("arguments"), state.facts.get("history") or {}
    if not isinstance(arguments, Mapping) or frozenset(schedule) - _BASE != {"lr_lambdas"}:
        return None
    steps, warmup = history.get("max_steps"), arguments.get("warmup_steps") or 0
    kind, base = arguments.get("lr_scheduler_type"), schedule.get("base_lrs")
    if (
        not _is_count(steps)
        or not _is_number(warmup)
        or not isinstance(kind, str)
        or not isinstance(base, list)
    ):
        return None
    if not warmup and _is_number(ratio := arguments.get("warmup_ratio")):
        warmup = ratio
    warmup = int(warmup) if warmup >= 1 or not warmup else math.ceil(steps * warmup)
    try:
        from transformers import get_scheduler

        optimizer = torch.optim.Adam([{"params": [torch.zeros(1)], "lr": float(lr)} for lr in base])
        options = arguments.get("lr_scheduler_kwargs") or {}
        made: Any = get_scheduler(
            kind, optimizer, warmup, int(steps), scheduler_specific_kwargs=dict(options)
        )
        factors = made.lr_lambdas
    except Exception:  # transformers is not installed, or does not know such a schedule
        return None

    def law(count: int) -> _Rates:
        try:
            return [(float(lr * factor(count)), None) for lr, factor in zip(base, factors, strict=True)]
        except Exception:  # numbers that make no schedule
            return []

    return law


def _logged(state: SavedState, following: Sequence[float]) -> list[Rate] | None:
    """What transformers' Trainer logged at this very update; None if it did not, or it could be the next one's.

    Since transformers 4.51 it logs the update's own rate, before that the next one's, which stands in the file too.
    """
    history = state.facts.get("history") or {}
    entries = history.get("log_history")
    entries = entries if isinstance(entries, list) else []
    found = [
        each["learning_rate"]
        for each in entries
        if isinstance(each, Mapping) and "learning_rate" in each and each.get("step") == state.step
    ]
    base = cast(Mapping[str, Any], state.schedule).get("base_lrs")
    if (
        len(found) != 1
        or not _is_number(found[0])
        or not isinstance(base, list)
        or len(base) != len(following)
    ):
        return None
    if _same(found[0], following[0], following) or not all(_is_number(lr) and lr > 0 for lr in base):
        return None
    shares = [lr / base[0] for lr in base]
    if any(
        not _same(lr, following[0] * share, following) for lr, share in zip(following, shares, strict=True)
    ):
        return None  # the groups have laws of their own, and the first one's is logged
    return [Rate(found[0] * share, "log") for share in shares]


# --- what the user knows ----------------------------------------------------------------------------------


def _for_each(given: Any, state: SavedState) -> list[Given]:
    """What was given, for each group."""
    if isinstance(given, list | tuple):
        if len(given) != len(state.groups):
            raise ValueError(f"lr has {len(given)} rates, and {state.place} {len(state.groups)} groups")
        return list(given)
    base = {group.get("initial_lr", group.get("lr")) for group in state.groups}
    if len(base) > 1 and state.format != "snapshot":
        raise ValueError(
            f"lr: the groups of {state.place} have different learning rates ({sorted(map(str, base))}): give a "
            "list with one for each"
        )
    return [given] * len(state.groups)


def rate_given(given: Any, step: int) -> float:
    """η of an update as the user gave it.

    Raises:
        TypeError, ValueError: it is no rate, function of update numbers, or recipe.
    """
    if callable(given) and not isinstance(given, Recipe):
        given = Recipe(cast(LearningRate, given))
    if isinstance(given, Recipe):
        return float(given.lr_at(np.array([step]))[0])
    if isinstance(given, bool) or not isinstance(given, int | float | np.number):
        raise refuse(
            "lr", "a learning rate, a function of update numbers, a Recipe, a list of these, or None", given
        )
    return check_number("lr", given, 0)


def _checked(state: SavedState, index: int, told: Rate, given: Given, step: int) -> Rate:
    """What was given for a group, if the file does not contradict it."""
    lr = rate_given(given, step)
    scale = [lr]
    contradiction = f"lr: it has {lr:.6g} for update {step}, and {state.place}"
    if told.source not in ("", "group"):
        if not _same(lr, told.lr, scale):
            raise ValueError(f"{contradiction} was made at {told.lr:.6g} ({LEARNED_FROM[told.source]})")
        return told
    stands = state.groups[index].get("lr")
    if callable(given) or isinstance(given, Recipe):
        following = _or_none(given, step + 1)
        fits = _same(lr, stands, scale) or (following is not None and _same(following, stands, scale))
        if _is_number(stands) and not fits:
            raise ValueError(
                f"{contradiction} has {stands:.6g} in its group, that of neither this update nor the next; is its "
                "number another?"
            )
    return Rate(lr, "given", "", told.betas)


def _or_none(given: Given, step: int) -> float | None:
    """The same, or None of an update behind the end of a schedule."""
    try:
        return rate_given(given, step)
    except ValueError:
        return None
