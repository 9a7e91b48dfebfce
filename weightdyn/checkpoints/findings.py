"""A finding of an audit: a sentence, and the numbers that it is of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pandas as pd

UNKNOWN, AGREES, CONTRADICTS = "unknown", "agrees", "contradicts"


class Finding(NamedTuple):
    """A sentence, and the numbers that it is of."""

    check: str
    sentence: str
    rows: list[dict[str, Any]]


def number(
    verdict: str, step: Any = pd.NA, span: Any = pd.NA, tensor: str = "", *, measured: float = math.nan,
    low: float = math.nan, high: float = math.nan, expected: float = math.nan,
) -> dict[str, Any]:  # fmt: skip
    """A row of `AUDIT_TABLE`, but for its check and sentence."""
    return {"step": step, "span": span, "tensor": tensor, "measured": measured, "low": low, "high": high,
            "expected": expected, "verdict": verdict}  # fmt: skip


def untold(check: str, reason: str) -> Finding:
    """A finding that something is not known, and why."""
    return Finding(check, reason, [number(UNKNOWN)])
