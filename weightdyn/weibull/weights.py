"""Weibull fits of whole models: one row per matrix, or per group of matrices pooled.

A model, a state dict or a checkpoint file is read once, one matrix at a time: names say what each is
(`core/naming`), fused matrices fall into their parts, and every part is fitted and measured. Trajectories of
such fits say how far k drifted, and whether λ or k made the weights grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

from weightdyn.core.checks import check_choice, check_jobs, check_pattern
from weightdyn.core.naming import TensorRow, Views, describe
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import FIT_TABLE, IDENTITY, By, check_weibull_table, group_columns, group_numbers
from weightdyn.files.weightfiles import Matrix, doubt, read_matrices
from weightdyn.weibull.fit import SORTED, Method, as_histogram, fit_weibull
from weightdyn.weibull.laws import Tails, tails
from weightdyn.weibull.magnitudes import MagnitudeHistogram

Weights = torch.nn.Module | Mapping[str, Tensor] | str | PathLike[str]


class _Common(NamedTuple):
    """What histograms need to share to be pooled."""

    dtype: torch.dtype
    exact: bool


def fit_weights(
    source: Weights,
    *,
    config: Any = None,
    rules: Mapping[str, str] | None = None,
    views: Views = True,
    tensors: str | None = None,
    by: By | Sequence[str] | None = None,
    method: Method = "plot",
    trim: tuple[float, float] = (0.1, 0.9),
    n_jobs: int = -1,
    progress: Progress = None,
) -> pd.DataFrame:
    """Fit a Weibull law to every weight matrix of a model.

    Args:
        source: a model, a state dict, a checkpoint file (safetensors, or what torch.save wrote), a folder with
            one checkpoint, sharded or not, or a run directory, of which the last checkpoint is taken. Norms,
            biases and everything that is not float are left out. No code of a file ever runs, and the checksums of
            what torch.save wrote are verified; safetensors and the format of torch before 1.6 have none, so a
            changed bit among their weights shows at best in the column `note`.
        config: the model's config (of transformers, or a dict), which says how fused matrices are split. None:
            that of the model, the config.json beside the checkpoint, or the record of the run it belongs to.
        rules: {regular expression: component} for names that are not known, as in `naming.describe`.
        views: True splits fused matrices, "head" makes one row for each head of q, k and v, False fits all whole.
        tensors: a regular expression; only the matrices in whose name it is found. None: all.
        by: fit the weights of each "layer", "component", "role", of the whole "model", or of a list of such
            columns, as one sample; None fits each tensor by itself.
        method: "plot", "mle" or "moments", as in `fit_weibull`.
        trim: as in `fit_weibull`.
        n_jobs: matrices that are fitted at a time, by threads; -1 for as many as there are cores. Each holds
            one matrix. Under `joblib.parallel_config` another backend takes over.
        progress: show a bar; None: where someone watches.

    Returns:
        The columns of `FIT_TABLE`, one row per matrix or part of one, in the model's order (of a safetensors
        file: by name). With `by`: one row per group, with the group's columns and `tensors`, the number of rows in
        it, for those of `IDENTITY`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: source is none of these, or holds no float matrix.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    >>> fit_weights(model)["numel"].tolist()
    [4096, 2048]
    """
    check_jobs("n_jobs", n_jobs)
    check_choice("method", method, get_args(Method))
    matrices, config = read_matrices(source, config)
    if tensors is not None:
        listed, pattern = [m.name for m in matrices], check_pattern("tensors", tensors)
        matrices = [m for m in matrices if pattern.search(m.name)]
        if not matrices:
            raise ValueError(
                f"tensors={tensors!r} is found in none of {listed[:5]} … ({len(listed)} matrices)"
            )
    names = [describe(m.name, m.shape, config, views=views, rules=rules) for m in matrices]
    total = sum(_numel(m.shape) for m in matrices)
    keys = group_columns(pd.DataFrame(columns=list(IDENTITY)), by)
    common = None
    if by is not None:
        common = _Common(reduce(torch.promote_types, {m.dtype for m in matrices}), total <= SORTED)
    from joblib import Parallel, delayed  # where it is used: it is slow to load

    work = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")(
        delayed(_measure)(m, name.rows(m.shape), method, trim, common)
        for m, name in zip(matrices, names, strict=True)
    )
    rows: list[dict[str, Any]] = []
    with progress_bar(progress=progress, total=total, unit="w", unit_scale=True, desc="fit") as bar:
        for matrix, name, measured in zip(matrices, names, work, strict=True):
            for row, found in zip(name.rows(matrix.shape), measured, strict=True):
                rows.append({**row.identity(), **found})
            bar.update(_numel(matrix.shape))
    if by is not None:
        return _pooled(pd.DataFrame(rows), keys, method, trim)
    return _typed(pd.DataFrame(rows, columns=list(FIT_TABLE)))


def _numel(shape: Iterable[int]) -> int:
    return int(np.prod(list(shape)))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    kinds = {"layer": "Int64", **dict.fromkeys(("tensor", "stack", "component", "role"), "category")}
    return table.astype({name: kind for name, kind in kinds.items() if name in table})


def _measure(
    matrix: Matrix,
    rows: tuple[TensorRow, ...],
    method: Method,
    trim: tuple[float, float],
    common: _Common | None,
) -> list[dict[str, Any]]:
    """The fit of each row of a matrix; its histogram instead where all are to be pooled."""
    tensor = matrix.load().detach()
    parts = (row.of(tensor) for row in rows)
    if common is not None:
        return [
            {"histogram": MagnitudeHistogram.from_tensor(part.to(common.dtype), exact=common.exact)}
            for part in parts
        ]
    return [_summary(as_histogram(part, trim, sums=True), method, trim, matrix.file) for part in parts]


def _summary(
    histogram: MagnitudeHistogram, method: Method, trim: tuple[float, float], file: Path | None = None
) -> dict[str, Any]:
    """The columns of `FIT_TABLE` from `numel` on."""
    fit = fit_weibull(histogram, method, trim)
    finite = histogram.n + histogram.n_zero
    squares = histogram.sums.squares if histogram.sums else np.nan
    rms = float(np.sqrt(squares / finite)) if finite else np.nan
    measures = tails(histogram)
    numel = finite + histogram.n_nonfinite
    # The sums leave out what is not finite.
    notes = fit.note, doubt(math.nan if histogram.n_nonfinite else squares, numel, file) if numel else ""
    return {
        "numel": numel,
        **{name: getattr(fit, name) for name in ("lam", "k", "r_squared", "ks", "n")},
        "rms": rms,
        "lam_over_rms": fit.lam / rms if rms else np.nan,
        **{name: getattr(measures, name) for name in Tails._fields},
        "note": "; ".join(filter(None, notes)),
    }


def _pooled(
    rows: pd.DataFrame, keys: Sequence[str], method: Method, trim: tuple[float, float]
) -> pd.DataFrame:
    """One fit for each group of rows, of their histograms together."""
    found = []
    for _, group in rows.groupby(group_numbers(rows, keys), sort=True):
        histogram = reduce(lambda a, b: a + b, group["histogram"])
        own = {name: group[name].iloc[0] for name in keys}
        found.append({**own, "tensors": len(group), **_summary(histogram, method, trim)})
    return _typed(pd.DataFrame(found))


# Trajectories.

INVARIANT, STRONG = 0.01, 0.30
"""|Δk|/k under which a shape counts as invariant, and above which its drift counts as strong."""


def shape_drift(table: Any) -> pd.DataFrame:
    """How far k drifted from the first to the last step, and which of λ and k made σ grow.

    A Weibull law has σ = rms = λ√Γ(1 + 2/k), so the growth splits exactly:

        ln σ₁/σ₀  =  ln λ₁/λ₀  +  ½ ln Γ(1 + 2/k₁)/Γ(1 + 2/k₀)
        sigma_growth  lam_growth     k_growth

    Args:
        table: a `RunLog`, or a trajectory of fits with `step`, `lam`, `k`, and whichever of `tensor`, `stack`,
            `layer`, `component`, `role` tell its groups apart, such as `RunLog.weibull()`.

    Returns:
        One row per group, in the table's order: the group's columns, `start_step`, `k_start`, `end_step`, `k_end`,
        `k_drift` (relative), `severity` ("invariant" under 1 %, "mild" up to 30 %, "strong"), the three growths,
        and `explained_by`: "lam" or "k" where that one makes up nine tenths of |lam_growth| + |k_growth|, else
        "both" ("neither" where nothing changed). Rows without a fit are left out.

    Raises:
        TypeError, ValueError: no Weibull table; two rows of one group at one step.

    Source: arXiv 2605.18898 for the limits; the split is Γ's.

    >>> t = pd.DataFrame({"step": [0, 9], "lam": [0.01, 0.02], "k": [1.2, 1.2]})
    >>> shape_drift(t)[["severity", "explained_by"]].to_numpy().tolist()
    [['invariant', 'lam']]
    """
    table = check_weibull_table(table)
    keys = group_columns(table, None)
    if (again := table.duplicated(["step", *keys])).any():
        row = table[again].iloc[0]
        whose = next((f"{name} {row[name]}" for name in keys), "one group")
        raise ValueError(
            f"table has two rows of {whose} at step {row['step']}; do not join tables of different runs"
        )
    fitted = table[table["k"].notna() & table["lam"].notna()]
    fitted = fitted.sort_values("step", kind="stable", ignore_index=True)
    group = (
        fitted.groupby(keys, dropna=False, observed=True, sort=False).ngroup() if keys else fitted["k"] * 0
    )
    first, last = (fitted[~group.duplicated(keep=end)] for end in ("first", "last"))
    last = last.iloc[np.argsort(group[last.index], kind="stable")]
    k, k_end, lam, lam_end = (f[name].to_numpy(float) for name in ("k", "lam") for f in (first, last))
    change = k_end / k - 1
    lam_growth = np.log(lam_end / lam)
    k_growth = (scipy.special.gammaln(1 + 2 / k_end) - scipy.special.gammaln(1 + 2 / k)) / 2
    total = np.abs(lam_growth) + np.abs(k_growth)
    columns = {
        "start_step": first["step"].to_numpy(),
        "k_start": k,
        "end_step": last["step"].to_numpy(),
        "k_end": k_end,
        "k_drift": change,
        "severity": np.select(
            [np.abs(change) < INVARIANT, np.abs(change) <= STRONG], ["invariant", "mild"], "strong"
        ),
        "sigma_growth": lam_growth + k_growth,
        "lam_growth": lam_growth,
        "k_growth": k_growth,
        "explained_by": np.select(
            [total == 0, np.abs(lam_growth) >= 0.9 * total, np.abs(k_growth) >= 0.9 * total],
            ["neither", "lam", "k"],
            "both",
        ),
    }
    return first[keys].reset_index(drop=True).assign(**columns)
