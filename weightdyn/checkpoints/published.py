"""Readers of the public data behind arXiv 2606.19367 and 2605.18898, as this library's own tables.

The data is the repository tiexinding/NPM-Weibull-public (by Tiexin Ding, CC BY 4.0); nothing of it is shipped
here, the readers take paths into a copy of your own. Its force logs sum over the transmission tensors of six
blocks (attention output and the MLP's matrices, of a Pythia-70M and of a LLaMA shape; one file has queries and
keys beside) and hold 2η⟨w',u⟩ with the weights *after* the step, from which an alignment comes out too large by
twice the injection. The closed form of `forces.before_step` repairs that without the weights. No fresh gradient
was logged, so what alignment is made of can only be inferred: memory as white noise has it, drift as the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_choice, check_number, check_path, check_whole
from weightdyn.core.forces import At, before_step, forces_from_products, memory_null
from weightdyn.core.tables import FORCE_TABLE, WHITE_NOISE
from weightdyn.files.weightfiles import read_text

NUMEL = 14_155_776
"""Weights in the published force logs of the Pythia-70M shape: 6 blocks of 512·512 + 2·(512·2048)."""

NUMEL_LLAMA = 14_254_080
"""Weights in those of the LLaMA shape: 6 blocks of 512·512 + 3·(512·1376)."""

NUMEL_SELECTION = 3_145_728
"""Weights of the queries and keys of either: 6 blocks of 2·(512·512)."""

_WARMUP = 200  # updates; a straight line from 0, as the two logs of every 50th update show

_UPDATES = 1_000_000  # more than any published run has, and few enough for one number each

_TINY = np.finfo(float).tiny


class _Group(NamedTuple):
    """Tensors that a log sums over: what it calls their numbers, and how many weights they may be."""

    role: str
    alignment: str
    injection: str
    decay: str
    rms: str
    numel: tuple[int, ...]

    def ranges(self) -> dict[str, tuple[float, ...]]:
        return {self.alignment: (), self.injection: (0,), self.decay: (0,), self.rms: (_TINY,)}


_TRANSMISSION = _Group("transmission", "true_align_full", "inj_full", "dec_full", "rms", (NUMEL, NUMEL_LLAMA))
_SELECTION = _Group("selection", "sel_align", "sel_inj", "sel_dec", "sel_rms", (NUMEL_SELECTION,))


def read_published_forces(
    path: str | PathLike[str], *, weight_decay: float = 0.01, beta1: float = 0.9, at: At = "before"
) -> pd.DataFrame:
    """Read a published force log (`baseline_force.jsonl`, `v1b_spline_true.jsonl`) as a force table.

    A line holds, after update `step`, `eta` = η, `true_align_full` = 2η⟨w',u⟩, `inj_full` = η²‖u‖²,
    `dec_full` = 2ηλ‖w'‖² and `rms` = ‖w'‖/√n. The products come back as ⟨w',u⟩ = true_align_full/2η,
    ‖u‖² = inj_full/η² and ‖w'‖² = n·rms². The same of the queries and keys, where a log has it, is `sel_align`,
    `sel_inj`, `sel_dec` and `sel_rms`.

    The logs lack the fresh gradient. Their drift is therefore an inference and no measurement: it is what is left
    of alignment if momentum remembers noise as it does white noise,

        memory = memory_null = injection·`forces.memory_null`        drift = alignment − memory

    with η on straight lines between the logged updates, and before them as the published runs warm up, from 0 over
    200 updates. A log of pure white noise has a drift of 0 then; so has one whose drift and whose deviation from
    white noise cancel.

    Args:
        path: the JSON-lines file.
        weight_decay: λ of the run; must agree with the file's `dec_full`.
        beta1: β₁ of the run's first moment.
        at: "before" evaluates the forces before the step, where they sum to the change of ‖w‖²; "after" takes
            the products as they were logged, for the paper's own numbers, and infers no drift: its columns are
            NaN. `norm_sq` is before the step either way.

    Returns:
        A force table of one row per logged update (`span` 1; every 250th or 50th update in the public files) and
        group of tensors, "transmission" and, where it was logged, "selection". Behind its columns stands
        `split`, which says that white noise is assumed. `signal` is NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not such a record, two records of one step, or a `weight_decay`, `beta1` or
            `at` that cannot be.

    Source: arXiv 2606.19367, the force budget of its self-trained runs.
    """
    check_choice("at", at, ("before", "after"))
    weight_decay = check_number("weight_decay", weight_decay, 0)
    beta1 = check_number("beta1", beta1, 0, 1, open_high=True)
    log = _read_lines(check_path("path", path))
    null = memory_null(_rates(log), beta1, weight_decay)[log["step"] - 1]
    groups = [group for group in (_TRANSMISSION, _SELECTION) if group.alignment in log]
    tables = [_forces(log, group, null, path, weight_decay, at) for group in groups]
    table = pd.concat(tables).sort_values("step", kind="stable", ignore_index=True)
    table["layer"] = pd.array([pd.NA] * len(table), dtype="Int64")
    return table.reindex(columns=[*FORCE_TABLE, "split"]).astype(
        dict.fromkeys(("tensor", "stack", "component", "role", "split"), "category")
    )


def _rates(log: pd.DataFrame) -> np.ndarray:
    """η of every update from the first to the last logged one."""
    steps, lr = log["step"].to_numpy(), log["eta"].to_numpy()
    if steps[0] > _WARMUP:
        steps, lr = np.append(_WARMUP, steps), np.append(lr[0], lr)
    return np.interp(np.arange(1, steps[-1] + 1), np.append(0, steps), np.append(0.0, lr))


def _forces(
    log: pd.DataFrame,
    group: _Group,
    null: np.ndarray,
    path: str | PathLike[str],
    weight_decay: float,
    at: At,
) -> pd.DataFrame:
    """Rows of one group of tensors; null is memory over injection under white noise."""
    lr = log["eta"]
    decays = {n: log[group.decay] / (2 * lr * n * log[group.rms] ** 2) for n in group.numel}
    numel = next((n for n, each in decays.items() if np.allclose(each, weight_decay, rtol=1e-6)), None)
    if numel is None:
        found = " or ".join(f"λ = {each.median():.6g} there with {n:,} weights" for n, each in decays.items())
        raise ValueError(
            f"weight_decay={weight_decay} does not agree with {path}: {group.decay} = 2·η·λ·‖w‖² gives {found}"
        )
    w_sq_after = numel * log[group.rms] ** 2
    dot_wu_after, u_sq = log[group.alignment] / (2 * lr), log[group.injection] / lr**2
    before = before_step(dot_wu_after, u_sq, w_sq_after, lr, weight_decay)
    dot_wu, w_sq = (before.dot_wu, before.w_sq) if at == "before" else (dot_wu_after, w_sq_after)
    forces = forces_from_products(dot_wu, u_sq, w_sq, lr, weight_decay)
    memory = null * forces.injection if at == "before" else np.nan
    return pd.DataFrame(
        {
            "step": log["step"],
            "span": 1,
            "tensor": group.role,
            "stack": "",
            "component": "other",
            "role": group.role,
            "numel": numel,
            "lr": lr,
            "weight_decay": weight_decay,
            "norm_sq": before.w_sq,
            "norm_sq_after": w_sq_after,
            **forces._asdict(),
            "drift": forces.alignment - memory,
            "memory": memory,
            "memory_null": memory,
            "split": WHITE_NOISE if at == "before" else None,
        }
    )


def read_published_trajectory(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a published Weibull trajectory (`lambda_trajectory_*.json`, `per_layer_lambda_*.json`).

    Returns:
        One row per step (and layer), ascending: `step`, `layer` (in a file by layer only), `lam` (the
        Weibull scale λ), `k` and `sigma` (rms of the weights).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a list, or a number in it cannot be.
    """
    accepted = 'trajectory, a list of {"step", "k", "lambda", "sigma"} or {"step", "layers"}'
    rows = []
    for record in _read_list(path, accepted):
        with _named(f"{path} is not a published {accepted}"):
            step = check_whole("step", record["step"])
            for layer, fit in record["layers"].items() if "layers" in record else [(None, record)]:
                layer = None if layer is None else check_whole("layer", int(layer))
                rows.append(
                    (step, layer, *(check_number(name, fit[name], 0) for name in ("lambda", "k", "sigma")))
                )
    table = pd.DataFrame(rows, columns=["step", "layer", "lam", "k", "sigma"])
    table["layer"] = pd.to_numeric(table["layer"]).astype("Int64")
    table = table.sort_values(["step", "layer"], ignore_index=True)
    return table.drop(columns="layer") if table["layer"].isna().all() else table


def read_published_recovery(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a published recovery of the alignment from checkpoints (`spline_from_ckpt_pythia2.json`).

    It holds the spline's 2η⟨w,û⟩ against the logged 2η⟨w',u⟩, w' after the step, over 200,000 of the weights.

    Returns:
        One row per step, ascending: `step`, `gap` (updates between the checkpoints around it), `true` and
        `spline` (change of ‖w‖² per update; a positive one grows the norm, the file has the opposite sign) and
        their `ratio`.

    The ratio is not the spline's accuracy. With A and I the alignment before the step and the injection, the log
    has A + 2I, while a smooth path through the checkpoints has no injection of its own and therefore recovers
    A + I: by itself that makes (A + I)/(A + 2I), 0.954 in the median of this run, of the published 0.935.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a list, or a number in it cannot be.

    Source: arXiv 2606.19367, spline displacement.
    """
    accepted = 'recovery, a list of {"step", "true", "spline", "local_gap"}'
    rows = []
    for record in _read_list(path, accepted):
        with _named(f"{path} is not a published {accepted}"):
            step, gap = check_whole("step", record["step"]), check_whole("local_gap", record["local_gap"], 1)
            rows.append((step, gap, *(-check_number(name, record[name]) for name in ("true", "spline"))))
    table = pd.DataFrame(rows, columns=["step", "gap", "true", "spline"])
    return table.assign(ratio=table["spline"] / table["true"]).sort_values("step", ignore_index=True)


def _read_list(path: str | PathLike[str], accepted: str) -> list[Any]:
    path = check_path("path", path)
    text = read_text(path)
    with _named(f"{path} is not a published {accepted}"):
        found = json.loads(text)
        if not isinstance(found, list):
            raise TypeError(f"it holds a {type(found).__name__}")
    return found


@contextmanager
def _named(wrong: str) -> Iterator[None]:
    """Name the file in whatever the content of a foreign one raises."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{wrong}: {error!r}; download it again, or give another file") from error


def _read_lines(path: Path) -> pd.DataFrame:
    records: list[dict[str, Any]] = []
    ranges = {"eta": (_TINY,), **_TRANSMISSION.ranges()}  # η and the norm are divided by
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        with _named(
            f"{path}, line {number}, is not a record of a published force log with {['step', *ranges]}"
        ):
            record = json.loads(line)
            if not records and _SELECTION.alignment in record:
                ranges |= _SELECTION.ranges()
            step = check_whole("step", record["step"], 1, _UPDATES)
            numbers = {name: check_number(name, record[name], *range_) for name, range_ in ranges.items()}
            records.append({"step": step, **numbers})
    if not records:
        raise ValueError(f"{path} has no records: download it again, or give another file")
    table = pd.DataFrame(records).sort_values("step", ignore_index=True)
    if (again := table["step"].duplicated()).any():
        raise ValueError(
            f"{path} has two records of step {table.loc[again, 'step'].iloc[0]}: keep one of them"
        )
    return table
