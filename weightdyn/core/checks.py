"""Arguments checked at the door: each error names the argument, what it got and what is accepted.

One function a kind of argument. Each returns the value, so that a check can stand where the value is first used.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def shown(value: Any) -> str:
    """A value for an error: short, and never the content of a table or a tensor.

    >>> shown(np.zeros((3, 4))), shown("x" * 200)[-5:], shown(2.5)
    ('a float64 array of shape (3, 4)', 'xxx …', '2.5')
    """
    shape, kind = getattr(value, "shape", None), type(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if kind.__name__ in ("DataFrame", "Series", "Index"):
        return f"a {kind.__name__} of shape {shape}"
    if isinstance(shape, tuple) and not isinstance(value, np.generic):
        what = (
            "array"
            if isinstance(value, np.ndarray)
            else "tensor"
            if kind.__module__.startswith("torch")
            else kind.__name__
        )
        return f"a {str(getattr(value, 'dtype', '')).removeprefix('torch.')} {what} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:78]} …"


def refuse(argument: str, accepted: str, value: Any) -> ValueError | TypeError:
    """The error of an argument that is not accepted: a ValueError of a wrong value, a TypeError of a wrong kind."""
    plain = value is not None and isinstance(value, int | float | str | np.generic)
    return (ValueError if plain else TypeError)(f"{argument} must be {accepted}, got {shown(value)}")


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return `value` if it is one of the choices.

    >>> check_choice("order", "first", ("exact", "leading"))
    Traceback (most recent call last):
    ValueError: order must be 'exact' or 'leading', got 'first'
    """
    choices = tuple(choices)
    if isinstance(value, str | int | float | None) and any(
        value == each and type(value) is type(each) for each in choices
    ):
        return value
    *most, last = (repr(each) for each in choices)
    raise refuse(argument, f"{', '.join(most)} or {last}" if most else last, value)


def check_flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise refuse(argument, "True or False", value)


def check_whole(
    argument: str, value: Any, low: int | None = 0, high: int | None = None, *, none: str | None = None
) -> Any:
    """Return `value` as an int if it is a whole number in [low, high].

    Args:
        argument: its name.
        value: what was given.
        low, high: the ends of what is accepted; None for no end.
        none: what None stands for, where it is accepted.

    >>> check_whole("every", 0, 1)
    Traceback (most recent call last):
    ValueError: every must be a whole number >= 1, got 0
    """
    if value is None and none is not None:
        return None
    accepted = f"a whole number{_range(low, high)}" + (f", or None ({none})" if none is not None else "")
    try:
        number = None if value is None or isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise refuse(argument, accepted, value)
    return number


def check_number(
    argument: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False,
    open_high: bool = False, none: str | None = None,
) -> Any:  # fmt: skip
    """Return `value` as a float if it is one finite number in [low, high], without the ends that are open.

    >>> check_number("lr", float("nan"), 0)
    Traceback (most recent call last):
    ValueError: lr must be a number >= 0, got nan
    """
    if value is None and none is not None:
        return None
    number = _as_float(value)
    accepted = f"a number{_range(low, high, open_low, open_high)}" + (
        f", or None ({none})" if none is not None else ""
    )
    inside = number is not None and math.isfinite(number) and low <= number <= high
    if not inside or (open_low and number == low) or (open_high and number == high):
        raise refuse(argument, accepted, value)
    return number


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool | np.bool_ | str | bytes) or value is None:
        return None
    if isinstance(value, int | float | np.number):
        try:
            return float(value)
        except (TypeError, OverflowError):  # complex; beyond float64
            return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array or tensor of one number
        try:
            return _as_float(value.item())
        except (RuntimeError, NotImplementedError):  # on the meta device
            return None
    return None


def _range(low: float | None, high: float | None, open_low: bool = False, open_high: bool = False) -> str:
    low = None if low is None or low == -math.inf else low
    high = None if high is None or high == math.inf else high
    if low is not None and high is not None:
        return f" in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if low is not None:
        return f" {'>' if open_low else '>='} {low}"
    return "" if high is None else f" {'<' if open_high else '<='} {high}"


def check_numbers(argument: str, value: Any) -> Any:
    """Return `value` as it is if it is a real number or an array, Series or tensor of real numbers.

    >>> check_numbers("lr", "fast")
    Traceback (most recent call last):
    ValueError: lr must be a number or an array of numbers, got 'fast'
    """
    if isinstance(value, int) and abs(value) >= 1 << 63:  # NumPy would make an object of it
        raise refuse(argument, "a number of at most 64 bits", value)
    if isinstance(value, int | float | np.integer | np.floating):
        return value
    kind = getattr(value, "dtype", None)
    if isinstance(value, np.ndarray) or type(value).__name__ in ("Series", "Index"):
        good = getattr(kind, "kind", "") in "biuf"
    elif type(value).__module__.startswith("torch") and hasattr(value, "is_complex"):
        good = not value.is_complex() and not value.is_sparse and not value.is_meta
    else:
        good = False
    if not good:
        raise refuse(argument, "a number or an array of numbers", value)
    return value


def check_text(argument: str, value: Any, what: str = "a string") -> str:
    """Return `value` if it is a string that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise refuse(argument, what, value)


def check_path(argument: str, value: Any, what: str = "a path") -> Path:
    """Return `value` as a Path if it is a string or a path, and not empty."""
    if (
        isinstance(value, str | os.PathLike)
        and os.fspath(value) != ""
        and not isinstance(os.fspath(value), bytes)
    ):
        if "\0" in os.fspath(value):
            raise refuse(argument, f"{what} without a NUL character", value)
        return Path(value)
    raise refuse(argument, f"{what} (a string or a pathlib.Path)", value)


def check_pattern(argument: str, value: Any) -> re.Pattern[str]:
    """Return the regular expression `value`, compiled."""
    try:
        return re.compile(check_text(argument, value, "a regular expression"))
    except re.error as error:
        raise ValueError(f"{argument} must be a regular expression, got {value!r}: {error}") from None


def check_instance(argument: str, value: Any, kinds: type | tuple[type, ...], what: str) -> Any:
    """Return `value` if it is of one of these types; `what` says in words what is accepted."""
    if isinstance(value, kinds):
        return value
    raise TypeError(f"{argument} must be {what}, got {shown(value)}")


def check_betas(argument: str, value: Any) -> tuple[float, float]:
    """Return `value` as a pair of numbers in [0, 1): β₁ and β₂ of Adam."""
    accepted = "two numbers in [0, 1)"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise refuse(argument, accepted, value)
    try:
        first, second = (check_number(argument, beta, 0, 1, open_high=True) for beta in value)
    except (TypeError, ValueError):
        raise ValueError(f"{argument} must be {accepted}, got {shown(value)}") from None
    return first, second


def check_jobs(argument: str, value: Any, *, none: str | None = None) -> Any:
    """Return `value` if it is a number of jobs as joblib counts: 1 or more, −1 for as many as there are cores."""
    accepted = "a whole number >= 1, or -1 (as many as there are cores)"
    number = check_whole(argument, value, -(1 << 16), 1 << 16, none=none)
    if number == 0:
        raise refuse(argument, accepted, value)
    return number


def check_mapping(argument: str, value: Any, what: str) -> Any:
    """Return `value` if it is a mapping, or None; `what` says in words what is accepted."""
    if value is None or isinstance(value, Mapping):
        return value
    raise refuse(argument, f"{what}, or None", value)
