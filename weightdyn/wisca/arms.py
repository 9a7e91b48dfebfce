"""The arms of a comparison: what each does to a model, its optimizer and its gradients, from its words.

An arm is a string, so that it can name a folder, a legend and a row. `compare` says what the words mean.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.record.logger import ForceLogger
from weightdyn.wisca.apply import apply_
from weightdyn.wisca.pairs import unwrap
from weightdyn.wisca.plan import check_choices, own_pairs, plan_rescale, scale_factors
from weightdyn.wisca.schedule import RescaleSchedule

ARMS = ("none", "init", "every=250", "random", "lr_equivalent")
"""Arms of `compare` if none are named."""

_KINDS = ("none", "init", "random", "lr_equivalent")
_CHOICES = ("moments", "norm", "granularity")  # those of an arm's own
_WORDS = "none, init, random, lr_equivalent, every=N, moments=…, norm=…, granularity=…, power_of_two, clip=rescaled"


class Arm(NamedTuple):
    """An arm's words, read.

    Attributes:
        name: the words, with one space between them.
        kind: "none", "init", "random", "lr_equivalent", or "every": no rescaling before the first update.
        every: rescale after every so many updates; None for never.
        rescaled_clip: clip by the norm of the gradients as `init` has them.
        options: of `rescale_`.
    """

    name: str
    kind: str
    every: int | None
    rescaled_clip: bool
    options: dict[str, Any]


def parse_arm(arm: str, common: Mapping[str, Any]) -> Arm:
    """Read the words of an arm.

    Args:
        arm: as `compare` takes it.
        common: options of `rescale_` for all arms, which the arm's own words override.

    Raises:
        TypeError, ValueError: it is no arm; the message names the word.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"arms: {arm!r} {why}; an arm is made of the words {_WORDS}")

    if not isinstance(arm, str):
        raise TypeError(f"arms must be strings such as 'every=250 moments=reset', got {arm!r}")
    options, kinds, every, rescaled_clip = dict(common), [], None, False
    words = arm.split()
    for word in words:
        name, _, value = word.partition("=")
        if word in _KINDS:
            kinds.append(word)
        elif name == "every" and re.fullmatch("0*[1-9][0-9]{0,9}", value):
            every = int(value)
        elif name in _CHOICES:
            try:
                check_choices(**{name: value})
            except ValueError as error:
                raise wrong(f"is none: {error}") from None
            options[name] = value
        elif word == "power_of_two":
            options[word] = True
        elif word == "clip=rescaled":
            rescaled_clip = True
        else:
            raise wrong(f"has the word {word!r}")
    if not words or len(kinds) > 1:
        raise wrong("has no word" if not words else f"is {' and '.join(kinds)} at once")
    kind = kinds[0] if kinds else "init" if every is None else "every"
    if every is not None and kind not in ("init", "every"):
        raise wrong(f"cannot be {kind} and rescale on the way")
    if kind == "none" and len(words) > 1:
        raise wrong("rescales nothing, and has options of a rescaling")
    if rescaled_clip and kind != "lr_equivalent":
        raise wrong("clips by its own gradients; clip=rescaled is for lr_equivalent")
    return Arm(" ".join(words), kind, every, rescaled_clip, options)


def begin_arm(
    model: nn.Module, optimizer: torch.optim.Optimizer, arm: Arm, seed: int, *, apply: bool
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Do what an arm does before the first update.

    Args:
        model, optimizer: with the seed's initial weights.
        arm: the arm.
        seed: decides which way `random` turns each α.
        apply: False leaves the weights, which a resumed run has from its state; what an arm changes in the
            optimizer's groups it changes either way.

    Returns:
        The table of the rescaling, with step 0; for `lr_equivalent` beside it the factor of each tensor.
    """
    none = pd.DataFrame({"step": pd.Series(dtype="int64")})
    if arm.kind in ("none", "every"):
        return none, {}
    options = {name: value for name, value in arm.options.items() if name != "moments"}
    own = own_pairs(options.get("pairs", ()))
    table = plan_rescale(model, progress=False, **options)
    factors: dict[str, float] = {}
    if arm.kind == "random":
        table = _turned(table, seed)
    if arm.kind == "lr_equivalent":
        factors = _one_factor(unwrap(model), scale_factors(model, table, pairs=own))
        _regroup(model, optimizer, factors)
    elif apply:
        moments = arm.options.get("moments", "transport")
        table = apply_(model, table, optimizer, pairs=own, moments=moments, progress=False)
    table.insert(0, "step", 0)
    return table, factors


def _turned(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Each α or its inverse, as a coin falls."""
    heads = np.random.default_rng((seed, len(table))).random(len(table)) < 0.5
    alpha = table["alpha"].where(heads, 1 / table["alpha"])
    return table.assign(
        alpha=alpha, norm_a_after=table["norm_a"] * alpha, norm_b_after=table["norm_b"] / alpha
    )


def _one_factor(model: nn.Module, factors: Mapping[str, Mapping[int, Tensor]]) -> dict[str, float]:
    found = {}
    for name, axes in factors.items():
        if any((factor != factor[0]).any() for factor in axes.values()):
            raise ValueError(
                f"lr_equivalent: {name} {tuple(model.get_parameter(name).shape)} has more than one α, and an "
                'optimizer has one learning rate for it; use granularity="tensor", and a model that keeps q, k '
                "and v apart"
            )
        found[name] = math.prod(float(factor[0]) for factor in axes.values())
    return found


def _regroup(model: nn.Module, optimizer: torch.optim.Optimizer, factors: Mapping[str, float]) -> None:
    """Give each tensor with a factor f a group of its own: lr η/f, decay λ·f, ε·f."""
    decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if not isinstance(optimizer, torch.optim.AdamW) and (
        not isinstance(optimizer, torch.optim.Adam) or decays
    ):
        raise TypeError(
            f"make_optimizer: lr_equivalent holds for AdamW, or Adam without decay, got {type(optimizer).__name__}"
        )
    named = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        factor_of = [factors.get(named.get(id(parameter), ""), 1.0) for parameter in group["params"]]
        for f in dict.fromkeys(factor_of):
            part = {
                **group,
                "lr": group["lr"] / f,
                "weight_decay": group["weight_decay"] * f,
                "eps": group["eps"] * f,
            }
            for key in ("params", "param_names"):
                if key in group:
                    part[key] = [each for each, own in zip(group[key], factor_of, strict=True) if own == f]
            groups.append(part)
    optimizer.param_groups = groups


@contextlib.contextmanager
def scheduled(
    model: nn.Module, optimizer: torch.optim.Optimizer, arm: Arm, logger: ForceLogger, done: int
) -> Iterator[RescaleSchedule | None]:
    """The arm's rescalings on the way, from update `done` on; None of an arm without."""
    if arm.every is None:
        yield None
        return
    with RescaleSchedule(
        model, optimizer, every=arm.every, logger=logger, start_step=done, progress=False, **arm.options
    ) as schedule:
        yield schedule


def joined_events(rescales: pd.DataFrame, schedule: RescaleSchedule | None) -> pd.DataFrame:
    """What was done before the first update, and on the way."""
    tables = [rescales] + ([] if schedule is None else [schedule.events])
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else rescales


def clip_gradients(model: nn.Module, largest: float, factors: Mapping[str, float]) -> Tensor:
    """Clip the gradients by their norm, those of tensors with a factor f as g/f; return the norm."""
    scaled = [
        (each.grad, factors[name]) for name, each in unwrap(model).named_parameters() if name in factors
    ]
    for gradient, f in scaled:
        if gradient is not None:
            gradient.div_(f)
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    for gradient, f in scaled:
        if gradient is not None:
            gradient.mul_(f)
    return norm
