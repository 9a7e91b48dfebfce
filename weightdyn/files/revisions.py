"""What the names of checkpoints say: how many updates were made, and of several series which.

A name is a word and a number, step1000 or checkpoint-500, and around them what tells one series from another: its
stage, as in stage2-ingredient1-step1000-tokens5B. Counts of tokens, epochs and metrics are no stage. A repository
may hold several stages, and only its publisher knows whether the steps of one go on from those of another or begin
anew. So one is taken, the rest is said to be there, and several are joined where the user asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar

from weightdyn.core.checks import refuse

Place = TypeVar("Place")

_NAME = re.compile(
    r"(?P<before>(?:.*[._/-])?(?:global)?)(?P<word>step|checkpoint|ckpt|iter|iteration|update)"
    r"(?P<mark>[._=-]?)(?P<step>[0-9]+)(?P<after>(?:(?:[_-]|\.(?![0-9])).*)?)",
    re.IGNORECASE,
)
_GLOBAL = re.compile(r"(?:^|(?<=[._/-]))global[._-]?$", re.IGNORECASE)
_PLAIN = re.compile("[0-9]+")
_TOKENS = re.compile(r"[._-](?:tokens?[-_]?)?[0-9]+(?:\.[0-9]+)?[KMBT]T?(?=$|[._-])", re.IGNORECASE)
_DETAIL = re.compile(
    r"(?:^|[._-])(?:epoch[=_-]?[0-9]+|[a-z][\w/]*=[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", re.IGNORECASE
)
_NUMBERED = re.compile(r"(?:stage|phase)[._-]?([0-9]+)", re.IGNORECASE)
_ALIKE = re.compile(r"(?:step|checkpoint|ckpt|iter|update|epoch|stage|phase)[^a-z]*[0-9]", re.IGNORECASE)
_LONGEST = 255  # letters of a name
_SHOWN = 5  # names or stages that an error lists


class Named(NamedTuple):
    """What the name of a checkpoint says."""

    step: int
    stage: str
    """What is left of the name without step, tokens, epochs and metrics; "" if nothing is."""
    counted: bool
    """Whether the number may be that of the checkpoint: ckpt_012, checkpoint_3, 12."""


def read_name(name: str) -> Named | None:
    """What the name of a checkpoint says; None if it is none.

    >>> [read_name(name)[:2] for name in ("step1000", "stage2-ingredient1-step1000-tokens5B", "step-001000-2BT")]
    [(1000, ''), (1000, 'stage2-ingredient1'), (1000, '')]
    """
    match = _NAME.fullmatch(name) if len(name) <= _LONGEST else None
    if match is None:
        return Named(_whole(name), "", True) if _PLAIN.fullmatch(name) else None
    before, after = _GLOBAL.sub("", match["before"]), match["after"]
    # What stands before the word may count tokens too, as a length of context: lc-4k-to-32k-step-4000.
    sides = (_DETAIL.sub("", side).strip("._/-") for side in (before, _TOKENS.sub("", after)))
    counted = match["word"].lower() in ("checkpoint", "ckpt") and match["mark"] in ("_", "")
    return Named(_whole(match["step"]), "-".join(filter(None, sides)), counted)


def _whole(digits: str) -> int:
    return int(digits) if len(digits) < 99 else 1 << 63  # beyond what Python reads, and what tables hold


class Series(NamedTuple, Generic[Place]):
    """The checkpoints that were chosen among many names."""

    places: list[tuple[int, Place]]  # by step, in the order given where it is the same
    remarks: list[str]  # what a user should know of those that were not, in words
    counted: bool  # their numbers count checkpoints, as it seems, not updates


def choose_series(
    names: Iterable[tuple[str, Place]], where: str, stage: str | Sequence[str] | None = None
) -> Series[Place]:
    """The checkpoints of one series among names.

    Args:
        names: each name, and what it stands for.
        where: what to call the source in an error.
        stage: the stage or, in their order, the stages to take. None takes those without a stage, else the
            lowest of stage1, stage2, …, else the only one.

    Returns:
        The checkpoints; none where no name is that of one.

    Raises:
        ValueError: there is no such stage, or there are several and none is the first, or the steps of one do
            not go on from those of the one before.
    """
    read = [(read_name(name), name, place) for name, place in names]
    if any(said is not None and not _PLAIN.fullmatch(name) for said, name, _ in read):
        # Beside step1000 a bare 2 is a version.
        read = [(None if _PLAIN.fullmatch(name) else said, name, place) for said, name, place in read]
    stages: dict[str, list[tuple[Named, Place]]] = {}
    for said, _, place in read:
        if said is not None:
            stages.setdefault(said.stage, []).append((said, place))
    if not stages:
        return Series([], [], False)
    spans = {
        name: (min(said.step for said, _ in found), max(said.step for said, _ in found), len(found))
        for name, found in sorted(stages.items(), key=lambda item: min(said.step for said, _ in item[1]))
    }
    taken = [_first(spans, where)] if stage is None else _asked(stage, spans, where)
    found = sorted((pair for name in taken for pair in stages[name]), key=lambda pair: pair[0].step)
    remarks = []
    if stage is None and len(spans) > 1:
        others = {name: span for name, span in spans.items() if name not in taken}
        going_on = [*taken]
        for name, (low, _, _) in others.items():
            if low > spans[going_on[-1]][1]:
                going_on.append(name)
        joined = f", and stage={going_on} those whose steps go on" if len(going_on) > 1 else ""
        remarks.append(
            f"taken is {_described(taken[0], spans[taken[0]])}; left out: "
            + shorten([_described(name, span) for name, span in others.items()])
            + f". stage= takes another{joined}"
        )
    if strange := [name for said, name, _ in read if said is None and _ALIKE.search(name[:_LONGEST])]:
        remarks.append(f"left out, since they name no step: {shorten(strange)}")
    steps = [said.step for said, _ in found]
    gaps = [after - before for before, after in pairwise(steps)]
    counted = bool(gaps) and median(gaps) == 1 and all(said.counted for said, _ in found)
    if counted:
        remarks.append(
            f"the checkpoints are numbered {steps[0]}, {steps[1]}, …: a count of checkpoints, it seems, and not of "
            "updates. As steps such numbers are good for comparing weights, not for forces or schedules: those "
            "need {update: place} as source"
        )
    return Series([(said.step, place) for said, place in found], remarks, counted)


def _first(spans: Mapping[str, tuple[int, int, int]], where: str) -> str:
    if len(spans) == 1 or "" in spans:
        return "" if "" in spans else next(iter(spans))
    numbers = {name: int(match[1]) for name in spans if (match := _NUMBERED.search(name))}
    first = [name for name, number in numbers.items() if number == min(numbers.values())]
    if len(first) == 1:
        return first[0]
    listed = shorten([_described(name, span) for name, span in spans.items()])
    raise ValueError(
        f"stage: {where} holds several series, and which is meant is unknown; give one of {listed}"
    )


def _asked(stage: str | Sequence[str], spans: Mapping[str, tuple[int, int, int]], where: str) -> list[str]:
    asked: list[Any] = [stage] if isinstance(stage, str) else [*stage] if isinstance(stage, Sequence) else []
    if not asked or not all(isinstance(name, str) for name in asked):
        raise refuse("stage", "the name of a stage, a list of such names, or None", stage)
    if missing := [name for name in asked if name not in spans]:
        listed = shorten([_described(name, span) for name, span in spans.items()])
        raise ValueError(f"stage: {where} has no {missing[0]!r}; it has {listed}")
    for before, after in pairwise(asked):
        if spans[before][1] >= spans[after][0]:
            raise ValueError(
                f"stage: the steps of {_described(after, spans[after])} do not go on from those of "
                f"{_described(before, spans[before])}; take one of them, or give {{update: place}} as source with "
                "the updates since the beginning"
            )
    return asked


def _described(name: str, span: tuple[int, int, int]) -> str:
    low, high, count = span
    return f"{name!r} ({count} checkpoint{'s' if count > 1 else ''}, {low} to {high})"


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are.

    >>> shorten([f"v{i}" for i in range(9)])
    'v0, v1, v2, v3, v4 … (9 in all)'
    """
    more = f" … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) < 100 else name[:98] + " …" for name in names[:_SHOWN]) + more
