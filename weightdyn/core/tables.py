"""Every table's columns, and what can be done with a table whoever made it: group, sum, share, check.

Everything that yields forces yields the same tidy force table, and everything behind it takes that table, or the
`RunLog` that has one. Grouping is `by=` everywhere, and its columns are found here alone (`group_columns`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_choice
from weightdyn.core.forces import (
    At,
    Order,
    Products,
    after_step,
    angle,
    drift_from_products,
    forces_from_products,
    relative_update,
    signal_energy,
)

Kind = Literal["forces", "drift"]
"""The two budgets: alignment, injection and decay; or drift, diffusion and decay."""

By = Literal["layer", "component", "role", "model"]
"""Groups of tensors; a list of columns names finer ones, None leaves one row per tensor."""

FORCES = ("alignment", "injection", "decay")
"""The three forces, in the order in which every table, legend and sum has them."""

NAMES = {
    "tensor": "name of the parameter, with [view] behind it for a part of a fused tensor",
    "stack": "which stack of blocks: encoder, decoder, a stage; empty outside the blocks",
    "layer": "block index in its stack; missing outside the blocks",
    "component": "q k v qkv o gate up down embed unembed norm bias other",
    "role": "selection (q, k), transmission (o, gate, up, down), value (v), other",
    "numel": "number of weights",
}
"""Columns that say what a row is."""

IDENTITY = ("tensor", "stack", "layer", "component", "role")
"""Those that tell rows of one step apart."""

FORCE_TABLE = {
    "step": "number t of the update, 1-based: it takes w(t-1) to w(t)",
    "span": "updates that the row covers, ending at `step`",
    **NAMES,
    "lr": "learning rate η at this update",
    "weight_decay": "decoupled weight decay λ at this update",
    "norm_sq": "‖w‖² before the update (before the span)",
    "norm_sq_after": "‖w‖² after it; NaN where it was not measured",
    "alignment": "−2η(1−ηλ)⟨w,u⟩, change of ‖w‖² per update (mean over the span)",
    "injection": "η²‖u‖², change of ‖w‖² per update (mean over the span)",
    "decay": "−(2ηλ−η²λ²)‖w‖², change of ‖w‖² per update (mean over the span)",
    "drift": "−2η(1−ηλ)⟨w,g̃⟩, the part of alignment that the mean gradient pulls; NaN where not measured",
    "memory": "alignment − drift: the noise that u shares with the updates that made w",
    "memory_null": "memory that white gradient noise alone gives; κ is memory over it",
    "signal": "η²⟨m̃,g̃⟩, the part of injection that the mean gradient makes; negative where gradients swing back",
}
"""Columns of a force table and their meaning. Tables may carry more columns behind these, and lack the last four.
"""

PARTS = ("drift", "memory", "memory_null", "signal")
"""What alignment and injection are made of, where it was measured."""

DRIFT_FORCES = ("drift", "diffusion", "decay")
"""The three forces of the other budget: diffusion = injection + memory, the random walk of gradient noise."""

LOG_TABLE = {
    "u_sq": "‖u‖², u = m̂/(√v̂+ε) of the update",
    "dot_wu": "⟨w,u⟩ with w before the update",
    "u_rms": "root mean square of u",
    "relative_update": "η‖u‖/‖w‖",
    "angle": "radians that the update turned the tensor",
    "m_rms": "root mean square of m̂, in units of the gradient",
    "v_mean": "mean of v̂, in squared units of the gradient",
    "u_max": "max |u|",
    "dot_wg": "⟨w,g̃⟩ with w before the update and its gradient in units of u, g̃ = g/(√v̂+ε)",
    "dot_ug": "⟨u,g̃⟩",
    "g_sq": "‖g̃‖²",
    "fresh": "share of g̃ in u: (1−β₁)/(1−β₁ᵗ) for Adam",
    "lr_memory": "Σ β₁ˢη of the updates before, as white noise is remembered: 2η(1−ηλ)‖u‖² of it are memory_null",
    "residual": "(‖w'‖² − ‖w‖² measured) − (alignment + injection + decay); NaN where not audited",
}
"""Columns that a logged force table has behind those of `FORCE_TABLE`, and their meaning."""

STATE_TABLE = {
    "updates": "updates t that the moments of the tensor have had, as the bias corrections take it",
    "lr_from": "what says η of the update: file, schedule, log, group (not checked), given; empty if nothing does",
    "note": "why forces are missing, or what makes them less than exact; empty if nothing",
}
"""Columns that the forces of a checkpoint's optimizer state have behind those of `FORCE_TABLE` and `LOG_TABLE`."""

WHITE_NOISE = "white noise"
"""What `split` says of a table whose memory is that of white noise, and its drift inferred from it."""

RECOVERY_TABLE = {
    "alignment_low": "lower end of where the budget puts the true alignment",
    "alignment_high": "upper end of it",
    "drift_low": "lower end of where the budget puts the true drift",
    "drift_high": "upper end of it",
    "split": f'"{WHITE_NOISE}": drift is inferred, what is left of alignment if memory is that of white noise',
    "flag": '"rounding": within what rounding of the stored weights leaves open; "identical": nothing moved; or ""',
}
"""Columns that a recovered force table has behind those of `FORCE_TABLE`, and their meaning."""

_LAW = {
    "lam": "scale λ of the Weibull law of |w|, in units of the weights; NaN without a fit",
    "k": "shape k of the Weibull law of |w|; NaN without a fit",
    "r_squared": "R² of the straight line in the trimmed probability plot",
    "ks": "Kolmogorov-Smirnov distance between the law and the whole sample",
    "n": "number of non-zero finite magnitudes, those that were fitted",
}

WEIBULL_TABLE = {
    "step": "updates done when the weights were fitted; 0 is the initialization",
    **NAMES,
    **_LAW,
}
"""Columns of a table of Weibull fits over a run, and their meaning."""

FIT_TABLE = {
    **NAMES,
    **_LAW,
    "rms": "root mean square of the weights, zeros included",
    "lam_over_rms": "λ/rms: 1/√Γ(1+2/k) for a Weibull law, 0.88749 for a normal initialisation",
    "q90_q10": "ratio of the 90 % and the 10 % quantile of |w|",
    "q99_q50": "ratio of the 99 % quantile and the median",
    "q999_q50": "ratio of the 99.9 % quantile and the median",
    "gini": "Gini coefficient of |w|",
    "kurtosis": "mean w⁴ over squared mean w²; 3 for a normal law",
    "top_share": "share of ‖w‖² in the largest 0.01 % of the weights",
    "second_share": "share of the weights in a second population; 0 if there is none",
    "note": "what makes the fit doubtful or impossible, ‖W‖² that is not finite or absurd; empty if nothing",
}
"""Columns of a table of the fits of one model, and their meaning."""

CHECKPOINT_TABLE = {
    "step": "updates done when the checkpoint was written; 0 is the initialization",
    **NAMES,
    "dtype": "float type that the tensor is stored in",
    "precision": "float type that its values fit into: float16 for a float32 copy of float16",
    "norm_sq": "‖W‖², accumulated in float64",
    "rounding": "expected ‖W − stored W‖² if the weights were rounded to `precision`: Σ ulp(w)²/12",
    "hash": "of the bytes of the whole stored tensor: equal for equal content",
    **_LAW,
    "note": "what makes the content doubtful, ‖W‖² that is not finite or absurd; empty if nothing",
    "dot_steps": "steps j ≤ i, the row's own, that `dots` is of, ascending; missing where none was measured",
    "dots": "⟨W_i, W_j⟩ with each of the steps j in `dot_steps`",
}
"""Columns of a measured series and their meaning."""

CLOCK_TABLE = {
    "step": "the later checkpoint's",
    "span": "updates between the two checkpoints",
    **NAMES,
    "rows": "rows that decay alone moves, all through the series; 0 where none could be told",
    "of": "all rows of the tensor",
    "factor": "mean of ‖w_b‖/‖w_a‖ over these rows: Π (1−ηλ) over the span; NaN where nothing can be said",
    "factor_low": "factor − 2 standard errors: spread over the rows, or what rounding makes, whichever is larger",
    "factor_high": "factor + 2 standard errors",
    "lr_decay": "ηλ per update, 1 − factor^(1/span); NaN where nothing can be said",
    "lr_decay_low": "lower end: that of the factor's, less 2^-25, what rounding 1 − ηλ to float32 may take",
    "lr_decay_high": "upper end of it",
    "precision": "float type that the values of the rows fit into, the coarser of both checkpoints'",
    "note": "why there is no value, or what it does not say; empty if nothing",
}
"""Columns of the table of a decay clock, and their meaning."""

AUDIT_TABLE = {
    "check": "what was checked: order, bound, first update, update size, decayed, decay rate",
    "step": "the later checkpoint's; missing where the finding is of the whole series",
    "span": "updates between the two checkpoints",
    "tensor": "name of the tensor; empty where the number is of many",
    "measured": "what the weights say: rms per weight (bound, first update), multiple of noise's (update size), "
    "ηλ per update (decayed, decay rate)",
    "low": "lower end of it; of update size, of what logged trainings have",
    "high": "upper end of it; of bound, the bound",
    "expected": "what the recipe says, in the same units",
    "verdict": "of this number: agrees, contradicts, unknown",
    "sentence": "the finding that the number is part of",
}
"""Columns of the table of an audit, and their meaning."""

_IDENTITY = {name: NAMES[name] for name in IDENTITY}

BUDGET_TABLE = {
    **FORCE_TABLE,
    "alignment_share": "|alignment|/Σ|F|, a fraction; NaN where all three forces are zero",
    "injection_share": "|injection|/Σ|F|",
    "diffusion": 'injection + memory (kind="drift")',
    "drift_share": '|drift|/(|drift| + |diffusion| + |decay|) (kind="drift")',
    "diffusion_share": '|diffusion|/(|drift| + |diffusion| + |decay|) (kind="drift")',
    "decay_share": "|decay|/Σ|F|, of the three forces of the kind",
    "net": "sum of the three forces: the change of ‖w‖² per update",
}
"""Columns of a force table with shares, and their meaning; those that a kind does not have are not there."""

SMOOTH_TABLE = {
    **FORCE_TABLE,
    "rows": "number of rows in the window",
    "diffusion": "injection + memory",
    "kappa": "κ = memory/memory_null: 1 where gradient noise is white, or where memory was inferred from that",
    "drift_se": "standard error of drift in the window's mean: its noise is new in every update",
    "memory_se": "standard error of memory, from its autocovariances (Newey and West 1987)",
    "kappa_se": "memory_se/memory_null",
    "split": RECOVERY_TABLE["split"],
}
"""Columns of a force table that was averaged over windows, and their meaning."""

INTEGRAL_TABLE = {
    "step": FORCE_TABLE["step"],
    **NAMES,
    "norm_sq_after": "‖w‖² measured after the update; NaN where neither this row nor the next has it",
    "norm_sq_predicted": "‖w‖² that the forces add up to from the first row on",
    **{name: f"what {name} has added to ‖w‖² since the first row" for name in FORCES},
    **{name: f"what {name} has added, NaN where it was not measured" for name in ("drift", "memory")},
    "gap": "whether the forces of a stretch right before this row are unknown",
}
"""Columns of an integrated force table, and their meaning."""

CLOSURE_TABLE = {
    **_IDENTITY,
    "updates": "updates that the terms cover",
    "gaps": "stretches left out, since their forces are unknown",
    "residual": "Σ|measured change of ‖w‖² less the forces|",
    "change": "Σ|measured change of ‖w‖²|",
    "closure": "residual/change; NaN where nothing is covered",
    "kappa": "κ = Σ memory/Σ memory_null: 1 where noise is white, or memory inferred from that; NaN where unknown",
    "kappa_se": "standard error of κ, as `smooth` has it",
}
"""Columns of a table of closures, and their meaning."""

PHASE_TABLE = {
    **_IDENTITY,
    "start_step": "the first row's step",
    "start": "the value there",
    "half_step": "first step at which the value is at least half-way up from start to peak",
    "peak_step": "step of the peak of the running median",
    "peak": "the running median there",
    "end_step": "the last row's step",
    "end": "the value there",
    "rise": "(peak − start)/start",
    "relaxation": "(peak − end)/peak",
    "overshoot": "whether start and end both lie clearly below the peak",
    "driven_by": "drift, diffusion or decay: which adds most to ‖w‖² up to the peak; missing if not measured",
}
"""Columns of a table of phases, and their meaning."""

SUMMARY_TABLE = {
    **PHASE_TABLE,
    "rise_share": "alignment's share |ΣA|/(|ΣA| + |ΣI| + |ΣD|) over the updates up to half_step",
    "end_share": "the same over the last tenth of the run",
    "rise_drift": "drift/(|drift| + |diffusion| + |decay|), signed, over the updates up to half_step",
    "rise_diffusion": "diffusion over the same sum",
    "end_drift": "drift's over the last tenth of the run",
    "end_diffusion": "diffusion's",
    "kappa": "κ = Σ memory/Σ memory_null over the run",
    "kappa_se": "standard error of κ",
    "closure": "the worst closure of the group's tensors",
}
"""Columns of a summary of a run, and their meaning; the phases are λ's."""

SHAPE_TABLE = {
    **_IDENTITY,
    "start_step": "first step with a fit",
    "k_start": "k there",
    "end_step": "last step with a fit",
    "k_end": "k there",
    "k_drift": "k_end/k_start − 1",
    "severity": "invariant (under 1 %), mild (up to 30 %), strong",
    "sigma_growth": "ln σ₁/σ₀ = lam_growth + k_growth",
    "lam_growth": "ln λ₁/λ₀",
    "k_growth": "½ ln Γ(1+2/k₁)/Γ(1+2/k₀)",
    "explained_by": "lam or k, whichever makes up nine tenths of the growths; both; or neither",
}
"""Columns of a table of shape drifts, and their meaning."""

ACCURACY_TABLE = {
    "method": "name of the recovered table",
    "pooling": "tensor: each tensor by itself; model: the sum of all",
    "intervals": "number of ratios of recovered to logged alignment",
    "median": "median of |1 − ratio|",
    "p90": "its 90 % quantile",
    "median_ratio": "median ratio",
    "inside": "fraction of logged values between alignment_low and alignment_high; NaN of pooled rows",
    "drift_median": "median of |recovered − logged drift|/(|drift| + |diffusion| + |decay|), all three logged",
    "drift_p90": "its 90 % quantile",
    "drift_sign": "fraction of drifts with the sign of the logged one",
    "drift_inside": "fraction of logged drifts between drift_low and drift_high; NaN of pooled rows",
    "diffusion_median": "median of |recovered − logged diffusion| over the same sum",
    "diffusion_p90": "its 90 % quantile",
}
"""Columns of a table that holds recovered forces against logged ones, and their meaning."""

RESCALE_TABLE = {
    "pair": "kind of the pair",
    "module": "where it lives; pair and module tell it from all others",
    "stack": NAMES["stack"],
    "layer": NAMES["layer"],
    "head": "head or key-value group; missing where all heads share one α",
    "channel": "channel of the pair; missing where all channels of the head share one α",
    "a": "what is multiplied by α: q, o, up, gain, A",
    "b": "what is divided by α: k, v, down, linears, B",
    "norm_a": "norm of the entries of a before",
    "norm_b": "norm of the entries of b before",
    "alpha": "α; 1 where the pair was skipped",
    "norm_a_after": "α·norm_a",
    "norm_b_after": "norm_b/α",
    "moments": "what became of the optimizer's moments; missing without an optimizer",
    "skipped": "why nothing was done; missing where something was",
}
"""Columns of the table of a rescaling, and their meaning."""

SHIFT_TABLE = {
    "step": "last update of the window; 0 is before the first",
    **{name: NAMES[name] for name in IDENTITY},
    "quantity": "what is compared: a share or a force, norm_sq, lam, k, or a loss",
    "value": "mean over the seeds of the arm",
    "control": "mean over the seeds of what it is held against",
    "difference": "mean of the paired differences, arm less control",
    "low": "lower end of the difference's interval; NaN of one seed",
    "high": "upper end of it",
    "seeds": "number of seeds that both have",
}
"""Columns of a table of shifts between paired runs, and their meaning. Of those that say what a row is it has the
ones that it is grouped by; in the rows of losses they are missing."""

# --- checks -------------------------------------------------------------------------------------------------


def table_of(source: Any, kind: str, *, argument: str = "table") -> pd.DataFrame:
    """The table of a run, or the table itself.

    Args:
        source: a `RunLog` (anything with a method of that name), or a DataFrame.
        kind: "forces", "weibull" or "metrics": the method of `RunLog` that gives the table.
        argument: what to call `source` in an error.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(source, pd.DataFrame):
        return source
    method = getattr(source, kind, None)
    if callable(method) and not isinstance(source, type):
        table = method()
        if isinstance(table, pd.DataFrame):
            return table
    word = {"forces": "force table", "weibull": "Weibull table"}.get(kind, f"table of {kind}")
    raise TypeError(
        f"{argument} must be a {word} (a pandas.DataFrame, as RunLog.{kind}() returns) or a RunLog, "
        f"got {type(source).__name__}; RunLog(path) opens a run directory"
    )


def check_columns(
    table: pd.DataFrame, names: Sequence[str], what: str, *, argument: str = "table"
) -> pd.DataFrame:
    """Return the table if it has these columns, with numbers in those of them that count something.

    Raises:
        ValueError: a column is missing, or there twice, or holds no numbers.
    """
    if missing := [name for name in names if name not in table]:
        raise ValueError(
            f"{argument} is no {what}: it lacks the columns {missing}; it has {list(table.columns)}"
        )
    if twice := [name for name in names if isinstance(table[name], pd.DataFrame)]:
        raise ValueError(f"{argument} has the columns {twice} more than once")
    wordy = [
        name for name in names if name not in IDENTITY and not pd.api.types.is_numeric_dtype(table[name])
    ]
    if wordy and len(table):
        raise ValueError(
            f"{argument}: the columns {wordy} of a {what} must hold numbers, got "
            f"{[str(table[name].dtype) for name in wordy]}"
        )
    return table


def check_force_table(
    source: Any, *, argument: str = "table", empty: bool = True, unique: bool = False
) -> pd.DataFrame:
    """The force table of a table or a `RunLog`, checked.

    Args:
        source: a force table, or a `RunLog`.
        argument: what to call it in an error.
        empty: whether a table without rows will do.
        unique: whether two rows of one tensor at one update are refused.

    Raises:
        TypeError, ValueError: it is none, and the message says what is missing.
    """
    table = table_of(source, "forces", argument=argument)
    parts = (name for name in PARTS if name in table)
    check_columns(table, ("step", "span", "norm_sq", *FORCES, *parts), "force table", argument=argument)
    if table.empty and not empty:
        raise ValueError(f"{argument} has no rows: no update was logged")
    return _check_unique(table, argument) if unique else table


def check_weibull_table(
    source: Any, *, argument: str = "table", empty: bool = True, unique: bool = False
) -> pd.DataFrame:
    """The Weibull table of a table or a `RunLog`, checked; arguments as in `check_force_table`."""
    table = table_of(source, "weibull", argument=argument)
    check_columns(table, ("step", "lam", "k"), "Weibull table", argument=argument)
    if table.empty and not empty:
        raise ValueError(f"{argument} has no Weibull fits; log some (weibull_every=…)")
    return _check_unique(table, argument) if unique else table


def _check_unique(table: pd.DataFrame, argument: str) -> pd.DataFrame:
    """Refuse two rows of one tensor at one step; of tables that do not name their tensors nothing can be said."""
    if "tensor" in table:
        keys = ["step", *(name for name in IDENTITY if name in table)]
        again = table.duplicated(keys)
        if again.any():
            row = table.loc[again.to_numpy()].iloc[0]
            raise ValueError(
                f"{argument} has two rows of {row['tensor']} at step {row['step']}: their sum would count it "
                "twice; do not join tables of different runs"
            )
    return table


# --- groups -------------------------------------------------------------------------------------------------


def group_columns(table: pd.DataFrame, by: By | Sequence[str] | None) -> list[str]:
    """The columns of a table that `by` groups by.

    Args:
        table: any table with some of the columns `IDENTITY`.
        by: "layer" (its stack and its number), "component", "role", "model" (everything: no column), a list of
            such columns, or None for each tensor by itself.

    Raises:
        ValueError: the table has no such column.
    """
    allowed = [name for name in IDENTITY if name in table]
    if by is None:
        return allowed
    asked = [by] if isinstance(by, str) else list(by) if isinstance(by, Sequence) else [by]
    unknown = [key for key in asked if not isinstance(key, str) or (key != "model" and key not in allowed)]
    if unknown:
        raise ValueError(
            f"by={by!r}: cannot group by {unknown}; use 'model', None, or any of {allowed}, one or a list of them"
        )
    keys = list(dict.fromkeys(key for key in asked if key != "model"))
    if "layer" in keys and "stack" in allowed and "stack" not in keys:
        keys.insert(keys.index("layer"), "stack")
    return keys


def group_numbers(table: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Number of each row's group, counted in order of appearance."""
    if not keys:
        return np.zeros(len(table), dtype=int)
    return table.groupby(list(keys), dropna=False, observed=True, sort=False).ngroup().to_numpy()


def in_order(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Those of the documented columns that the table has, in the order in which they are documented."""
    return table[[name for name in columns if name in table]]


_SUMMED = ("numel", "norm_sq", "norm_sq_after", *FORCES, *PARTS)


def aggregate(table: Any, by: By | Sequence[str] | None) -> pd.DataFrame:
    """Sum a force table over the tensors of each group: squared norms and forces add.

    Args:
        table: a force table or a `RunLog`.
        by: "layer", "component", "role", "model" (everything), a list of such columns, or None, which leaves one
            row per tensor.

    Returns:
        A force table with one row per step, span and group. `lr` and `weight_decay` stay where the whole
        group shares one value and are NaN where it does not; a sum over a missing value is missing. `split` stays
        where the drift of any of them was inferred.

    Raises:
        TypeError, ValueError: not a force table; two rows of one tensor at one update; an unknown `by`.
    """
    table = check_force_table(table, unique=True)
    keys = group_columns(table, by)
    over, how = ["step", "span", *keys], {"dropna": False, "observed": True, "sort": True}
    groups = table.groupby(over, **how)
    values = groups[[name for name in _SUMMED if name in table]]
    summed = values.sum().where(values.count().eq(groups.size(), axis=0))
    for name in ("lr", "weight_decay"):
        if name in table:
            low, high = groups[name].min(), groups[name].max()
            summed[name] = low.where(low == high)
    if "split" in table:  # what is inferred in a part is inferred in the sum
        summed["split"] = table["split"].astype(object).groupby([table[key] for key in over], **how).first()
    return in_order(summed.reset_index(), (*FORCE_TABLE, "split"))


def diffusion(table: Any, before: str = "") -> Any:
    """injection + memory of each row: the random walk that gradient noise makes of the weights.

    Args:
        table: a force table, or anything that holds the two by their names.
        before: what stands before the names.
    """
    return table[f"{before}injection"] + table[f"{before}memory"]


def kappa(table: pd.DataFrame) -> pd.Series:
    """κ = memory/memory_null of each row; NaN where white noise makes no memory (β₁ = 0)."""
    return table["memory"] / table["memory_null"].where(table["memory_null"] != 0)


def check_drift(table: pd.DataFrame, source: Any = None, *, argument: str = "table") -> pd.DataFrame:
    """Return a force table that knows the drift of some row.

    Args:
        table: the force table.
        source: what it came from; a `RunLog` may know why there is none.
        argument: what to call it in an error.

    Raises:
        ValueError: it knows none.
    """
    if "drift" in table and "memory" in table and (table.empty or table["drift"].notna().any()):
        return table
    info = getattr(source, "info", None)
    why = info.get("no_drift") if isinstance(info, Mapping) else None
    reason = (
        "it is measured by ForceLogger(drift=True) while the model trains, from gradients that are there behind "
        'the step, told with at="before", and estimated by recover_forces and read_published_forces; a sum has one '
        "where all of its tensors have"
    )
    if why:
        reason = f"it was not measured: {why}"
    raise ValueError(f"{argument} has no drift: {reason}")


def budget(table: Any, by: By | Sequence[str] | None = None, *, kind: Kind = "forces") -> pd.DataFrame:
    """Share of each force in the budget, row by row: |F| / Σ|F|.

    Args:
        table: a force table or a `RunLog`.
        by: sum it over the tensors of each "layer", "component", "role", over the "model", or over a list of such
            columns first (`aggregate`); None takes the rows as they are.
        kind: "forces" shares among alignment, injection and decay; "drift" among drift, diffusion = injection +
            memory, and decay: what the mean gradient, its noise, and the decay do. Of single updates drift is
            noisy: `smooth` the table first.

    Returns:
        The table with a column `…_share` for each of the three (fractions that sum to 1; NaN where all three are
        zero, or one is not known), `net` (their signed sum, the change of ‖w‖² per update), and `diffusion` with
        kind="drift".

    Raises:
        TypeError, ValueError: not a force table; an unknown `by`; kind="drift" of a table that knows no drift.

    Source: arXiv 2606.19367, the force budget; drift and diffusion as in `drift_from_products`.

    >>> t = pd.DataFrame({"step": [1], "span": [1], "norm_sq": [4.0], "drift": [-0.1], "memory": [0.6],
    ...                   "alignment": [0.5], "injection": [0.1], "decay": [-0.4]})
    >>> budget(t)[["alignment_share", "injection_share", "decay_share"]].to_numpy().tolist()
    [[0.5, 0.1, 0.4]]
    >>> budget(t, kind="drift")[["drift_share", "diffusion_share", "decay_share"]].round(3).to_numpy().tolist()
    [[0.083, 0.583, 0.333]]
    """
    check_choice("kind", kind, ("forces", "drift"))
    source = table
    table = check_force_table(table) if by is None else aggregate(table, by)
    names = FORCES
    if kind == "drift":
        names = DRIFT_FORCES
        table = table.assign(diffusion=diffusion(check_drift(table, source)))
    total = table[list(names)].abs().sum(axis=1, skipna=False)
    total = total.where(total != 0)
    shares = {f"{name}_share": table[name].abs() / total for name in names}
    return table.assign(**shares, net=table[list(names)].sum(axis=1, skipna=False))


def pool_weibull(table: Any, by: By | Sequence[str] | None) -> pd.DataFrame:
    """Weibull trajectories of groups of tensors, from those of the tensors with their n weights each.

        λ = √(Σ n·λ² / Σ n),    k = Σ n·k / Σ n

    Mean squares pool exactly, and a tensor's is λ²·Γ(1+2/k): this λ is that of the pooled weights as far as
    the tensors share one k. For the fit of the pooled weights themselves add their histograms.

    Args:
        table: a Weibull table or a `RunLog`: `step`, `lam`, `k`, and the number of weights `n` or, where
            that is absent, `numel`; absent both, all tensors count alike.
        by: "layer", "component", "role", "model" (everything), a list of such columns, or None, for each tensor by
            itself.

    Returns:
        One row per step and group: `step`, the group's columns, `lam`, `k`, and `n`, the weights (or tensors) in
        it. Tensors without a fit (NaN) are left out.

    Raises:
        TypeError, ValueError: not a Weibull table; two rows of one tensor at one step; an unknown `by`.

    >>> t = pd.DataFrame({"step": 1, "role": "value", "n": [1, 3], "lam": [4.0, 2.0], "k": [1.0, 1.2]})
    >>> pool_weibull(t, by="role")[["lam", "k"]].round(3).to_numpy().tolist()
    [[2.646, 1.15]]
    """
    fits = check_weibull_table(table, unique=True)
    keys = group_columns(fits, by)
    fits = fits[fits["lam"].notna() & fits["k"].notna()]
    count = next((fits[name].astype(float) for name in ("n", "numel") if name in fits), 1.0)
    weighted = fits[["step", *keys]].assign(n=count, lam=count * fits["lam"] ** 2, k=count * fits["k"])
    sums = weighted.groupby(["step", *keys], dropna=False, observed=True, sort=True).sum().reset_index()
    lam, k = np.sqrt(sums["lam"] / sums["n"]), sums["k"] / sums["n"]
    return in_order(sums.assign(lam=lam, k=k, n=sums["n"].astype("int64")), WEIBULL_TABLE)


# --- from products to forces --------------------------------------------------------------------------------


def force_table(
    products: pd.DataFrame,
    tensors: Mapping[str, Mapping[str, Any]],
    *,
    order: Order = "exact",
    at: At = "before",
) -> pd.DataFrame:
    """Force table of stored inner products, row by row.

    Args:
        products: step, span, tensor, lr, weight_decay, dot_wu ⟨w,u⟩, u_sq ‖u‖², norm_sq ‖w‖², norm_sq_after
            ‖w'‖², norm_sq_audit (‖w‖² measured before the step, or NaN), m_rms, v_mean, u_max; and where the
            gradients were measured dot_wg ⟨w,g̃⟩, dot_ug ⟨u,g̃⟩, g_sq ‖g̃‖², lr_memory and fresh (see `Remembered`).
        tensors: label -> {"stack", "layer", "component", "role", "numel"}, as in run.json. A label that is missing
            there gets no layer, and the component and role "other".
        order: "exact", or "leading" without the O(η²λ) terms; see `forces_from_products`.
        at: "before" evaluates the forces with the weights before the step, so that they sum to the change of
            ‖w‖²; "after" with those after it, as the script of arXiv 2606.19367 does, which makes the
            alignment too large by 2·injection. w' holds the noise of the fresh gradient, so with it drift,
            memory and memory_null are NaN. `norm_sq` is ‖w‖² before the update either way.

    Returns:
        The columns of `FORCE_TABLE`, then those of `LOG_TABLE`.

    >>> products = pd.DataFrame({"step": [1], "span": [1], "tensor": ["w"], "lr": [0.5], "weight_decay": [0.0],
    ...     "dot_wu": [-1.0], "u_sq": [4.0], "norm_sq": [7.0], "norm_sq_after": [9.0], "norm_sq_audit": [7.0],
    ...     "m_rms": [1.0], "v_mean": [1.0], "u_max": [1.0]})
    >>> force_table(products, {})[["norm_sq", "alignment", "injection", "residual"]]
       norm_sq  alignment  injection  residual
    0      7.0        1.0        1.0       0.0
    """
    check_choice("at", at, ("before", "after"))
    tensor = pd.Categorical(products["tensor"])
    tensor = tensor.set_categories(in_model_order(tensor.categories, tensors))
    lr, weight_decay, dot_wu, u_sq, w_sq, after, audit = (
        products[name].to_numpy(dtype=float)
        for name in ("lr", "weight_decay", "dot_wu", "u_sq", "norm_sq", "norm_sq_after", "norm_sq_audit")
    )
    nothing = np.full(len(products), np.nan)
    dot_wg, dot_ug, g_sq, lr_memory, fresh = (
        products[name].to_numpy(dtype=float) if name in products else nothing
        for name in ("dot_wg", "dot_ug", "g_sq", "lr_memory", "fresh")
    )
    names = named_columns(tensor, tensors)
    numel = names["numel"].to_numpy(dtype=float, na_value=math.nan)
    # A diverged run has inf and NaN, a tensor of zeros no direction: they pass through without a warning.
    with np.errstate(all="ignore"):
        products_at = Products(dot_wu, u_sq, w_sq)
        dot_wg_at, remembered = dot_wg, -lr_memory * u_sq
        if at == "after":
            products_at = after_step(*products_at, lr, weight_decay)
            dot_wg_at = remembered = nothing
        forces = forces_from_products(*products_at, lr, weight_decay, order=order)
        drift = drift_from_products(dot_wg_at, lr, weight_decay, order=order)
        columns = {
            "step": products["step"].to_numpy(dtype=np.int64),
            "span": products["span"].to_numpy(dtype=np.int64),
            "tensor": tensor,
            **names,
            "lr": lr,
            "weight_decay": weight_decay,
            "norm_sq": w_sq,
            "norm_sq_after": after,
            **forces._asdict(),
            "drift": drift,
            "memory": forces.alignment - drift,
            "memory_null": drift_from_products(remembered, lr, weight_decay, order=order),
            "signal": lr**2 * signal_energy(dot_ug, g_sq, fresh),
            "u_sq": u_sq,
            "dot_wu": dot_wu,
            "u_rms": np.sqrt(u_sq / numel),
            "relative_update": relative_update(u_sq, w_sq, lr),
            "angle": angle(dot_wu, u_sq, w_sq, lr, weight_decay),
            **{name: products[name].to_numpy(dtype=float) for name in ("m_rms", "v_mean", "u_max")},
            "dot_wg": dot_wg,
            "dot_ug": dot_ug,
            "g_sq": g_sq,
            "fresh": fresh,
            "lr_memory": lr_memory,
            "residual": (after - audit) - sum(forces),
        }
    return pd.DataFrame(columns, copy=False)


def in_model_order(labels: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """Labels as run.json's tensor table has them; those it lacks behind, by name."""
    position = {label: i for i, label in enumerate(tensors)}
    return sorted(labels, key=lambda label: (position.get(label, len(position)), label))


def named_columns(tensor: pd.Categorical, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of `NAMES` behind a column of labels, from run.json's tensor table."""
    entries = [table.get(label, {}) for label in tensor.categories]
    layers = pd.array([entry.get("layer") for entry in entries], dtype="Int64")
    columns: dict[str, Any] = {"stack": None, "layer": layers.take(tensor.codes)}
    for name, default in (("stack", ""), ("component", "other"), ("role", "other")):
        values = np.array([entry.get(name, default) for entry in entries], dtype=object)
        codes, categories = pd.factorize(values)
        columns[name] = pd.Categorical.from_codes(codes[tensor.codes], categories=categories)
    numel = pd.array([entry.get("numel") for entry in entries], dtype="Int64").take(tensor.codes)
    columns["numel"] = pd.Series(numel if numel.isna().any() else numel.astype(np.int64))
    return columns
