"""Readers of the public data behind arXiv 2606.19367 and 2605.18898, as this library's own tables.

The data is the repository tiexinding/NPM-Weibull-public (by Tiexin Ding, CC BY 4.0); nothing of it is shipped
here, the readers take paths into a copy of your own. Its force logs sum over the transmission tensors of a
Pythia-70M shape (attention output and both MLP matrices of six blocks) and hold 2η⟨w',u⟩ with the weights
*after* the step, from which an alignment comes out too large by twice the injection. The closed form of
`forces.before_step` repairs that without the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from weightdyn.core.forces import At, before_step, forces_from_products
from weightdyn.core.tables import FORCE_TABLE

NUMEL = 14_155_776
"""Weights in the published force logs: 6 blocks of 512·512 + 2·(512·2048)."""

_LOGGED = ("step", "eta", "true_align_full", "inj_full", "dec_full", "rms")


def read_published_forces(path: str | Path, *, weight_decay: float = 0.01, at: At = "before") -> pd.DataFrame:
    """Read a published force log (`baseline_force.jsonl`, `v1b_spline_true.jsonl`) as a force table.

    A line holds, after update `step`, `eta` = η, `true_align_full` = 2η⟨w',u⟩, `inj_full` = η²‖u‖²,
    `dec_full` = 2ηλ‖w'‖² and `rms` = ‖w'‖/√n. The products come back as ⟨w',u⟩ = true_align_full/2η,
    ‖u‖² = inj_full/η² and ‖w'‖² = n·rms².

    Args:
        path: the JSON-lines file.
        weight_decay: λ of the run; must agree with the file's `dec_full`.
        at: "before" evaluates the forces before the step, where they sum to the change of ‖w‖²; "after" takes
            the products as they were logged, for the paper's own numbers. `norm_sq` is before the step either
            way.

    Returns:
        A force table of one row per logged update (`span` 1; every 250th or 50th update in the public files),
        its tensor called "transmission".

    Raises:
        ValueError: a line that is not such a record, or a `weight_decay` or `at` that cannot be.

    Source: arXiv 2606.19367, the force budget of its self-trained runs.
    """
    if at not in ("before", "after"):
        raise ValueError(f"at must be 'before' or 'after', got {at!r}")
    log = _read_lines(Path(path))
    lr, w_sq_after = log["eta"], NUMEL * log["rms"] ** 2
    logged_decay = log["dec_full"] / (2 * lr * w_sq_after)
    if not np.allclose(logged_decay, weight_decay, rtol=1e-6):
        raise ValueError(
            f"weight_decay={weight_decay} does not agree with {path}: dec_full = 2·η·λ·‖w‖² with {NUMEL:,} "
            f"weights gives λ = {logged_decay.median():.6g} there"
        )
    dot_wu_after, u_sq = log["true_align_full"] / (2 * lr), log["inj_full"] / lr**2
    before = before_step(dot_wu_after, u_sq, w_sq_after, lr, weight_decay)
    dot_wu, w_sq = (before.dot_wu, before.w_sq) if at == "before" else (dot_wu_after, w_sq_after)
    forces = forces_from_products(dot_wu, u_sq, w_sq, lr, weight_decay)
    table = pd.DataFrame(
        {
            "step": log["step"].astype("int64"),
            "span": 1,
            "tensor": "transmission",
            "stack": "",
            "layer": pd.array([pd.NA] * len(log), dtype="Int64"),
            "component": "other",
            "role": "transmission",
            "numel": NUMEL,
            "lr": lr,
            "weight_decay": weight_decay,
            "norm_sq": before.w_sq,
            "norm_sq_after": w_sq_after,
            **forces._asdict(),
        }
    )
    return table[list(FORCE_TABLE)].astype(
        dict.fromkeys(("tensor", "stack", "component", "role"), "category")
    )


def read_published_trajectory(path: str | Path) -> pd.DataFrame:
    """Read a published Weibull trajectory (`lambda_trajectory_*.json`, `per_layer_lambda_*.json`).

    Returns:
        One row per step (and layer), ascending: `step`, `layer` (in a file by layer only), `lam` (the
        Weibull scale λ), `k` and `sigma` (rms of the weights).

    Raises:
        ValueError: the file is not such a list.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            (record["step"], layer, fit["lambda"], fit["k"], fit["sigma"])
            for record in records
            for layer, fit in (record["layers"].items() if "layers" in record else [(None, record)])
        ]
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a published trajectory, a list of "
            f'{{"step", "k", "lambda", "sigma"}} or {{"step", "layers"}}: {error!r}'
        ) from error
    table = pd.DataFrame(rows, columns=["step", "layer", "lam", "k", "sigma"])
    table["layer"] = pd.to_numeric(table["layer"]).astype("Int64")
    table = table.sort_values(["step", "layer"], ignore_index=True)
    return table.drop(columns="layer") if table["layer"].isna().all() else table


def read_published_recovery(path: str | Path) -> pd.DataFrame:
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
        ValueError: the file is not such a list.

    Source: arXiv 2606.19367, spline displacement.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            (int(each["step"]), int(each["local_gap"]), -float(each["true"]), -float(each["spline"]))
            for each in records
        ]
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f'{path} is not a published recovery, a list of {{"step", "true", "spline", "local_gap"}}: {error!r}'
        ) from error
    table = pd.DataFrame(rows, columns=["step", "gap", "true", "spline"])
    return table.assign(ratio=table["spline"] / table["true"]).sort_values("step", ignore_index=True)


def _read_lines(path: Path) -> pd.DataFrame:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({name: float(record[name]) for name in _LOGGED})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a record of a published force log "
                f"with {list(_LOGGED)}: {error!r}"
            ) from error
    if not records:
        raise ValueError(f"{path} has no records")
    return pd.DataFrame(records).sort_values("step", ignore_index=True)
