"""A diagnosis of one checkpoint: every matrix fitted, what stands out and why, and which published model is near.

For a user with a checkpoint and five minutes. `Diagnosis` prints as text in a terminal and as tables in a
notebook; behind what it prints stands one table of fits.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from weightdyn.core.checks import check_path
from weightdyn.core.naming import COMPONENTS, Views, describe
from weightdyn.files.weightfiles import Matrix, newest_checkpoint, read_matrices, read_text
from weightdyn.weibull.fit import K0
from weightdyn.weibull.weights import Weights, fit_weights

# Regimes of k.

TRANSMISSION = (1.186, 1.204)
"""Range of k in which the published models keep their o, gate, up and down matrices."""

STRONG_SELECTION = 0.95
"""k below which the published selection (of q and k in OLMo) counts as strong."""

GOOD_PLOT = 0.95
"""R² from which on a probability plot counts as straight."""

Regime = Literal[
    "transmission", "mild selection", "strong selection", "init baseline", "light-tailed", "unknown"
]


def classify(k: float, r_squared: float | None = None) -> Regime:
    """The published regime of a shape k.

    transmission        k in [1.186, 1.204], and R² at least 0.95 where it is given
    strong selection    k < 0.95
    mild selection      0.95 ≤ k < 1.186; also the transmission band with a worse R²
    init baseline       above the band, up to k₀ + 0.01: what a normal initialisation has
    light-tailed        above that: tails lighter than a normal law's, as of a uniform initialisation
    unknown             NaN

    The baseline of a fresh normal initialisation, k₀ = 1.2054, lies so near to the band that k alone tells
    the two apart only for matrices of some 10⁶ weights.

    Args:
        k: fitted shape.
        r_squared: that of the fit, or nothing.

    Source: arXiv 2605.18898; the band as measured over its models.

    >>> classify(1.19), classify(0.8), classify(K0)
    ('transmission', 'strong selection', 'init baseline')
    """
    if math.isnan(k):
        return "unknown"
    if k < STRONG_SELECTION:
        return "strong selection"
    if k < TRANSMISSION[0]:
        return "mild selection"
    if k <= TRANSMISSION[1]:
        straight = r_squared is None or r_squared >= GOOD_PLOT
        return "transmission" if straight else "mild selection"
    return "init baseline" if k <= K0 + 0.01 else "light-tailed"


BANDS = {
    "transmission": (TRANSMISSION[0], K0 + 0.01),
    "selection": (0.760, K0 + 0.01),
    "value": (1.040, K0 + 0.01),
}
"""Range of k that is usual for a role: from the published transmission band, or the lowest median among the
published models, up to what a normal initialisation has."""

SUPER_WEIGHTS = 0.02
"""Share of ‖w‖² in the largest 0.01 % of the weights from which they count as super-weights; a half-normal has
0.0017, a Weibull law with k = 1 has 0.005."""

SPREAD = 1.2
"""Standard error of the plot's k, in units of k/√n: 1.0 for Weibull and 1.15 for half-normal samples."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        source: what was diagnosed, in a few words.
        attention: its kind of attention: "MHA", "GQA 4:1", "MQA", with "fused" behind it where q, k and v are
            one matrix; "unknown" where names and config do not tell.
        table: the columns of `FIT_TABLE`, `regime` (`classify`) and `reasons`, why the matrix stands out, empty if
            it does not.
        nearest: published models by distance, the nearest first, or None without a database: `model`, `distance`
            (root mean square difference of the components' median k), `components` compared, `lam_ratio` (median
            ratio of this model's median λ to that one's).
    """

    source: str
    attention: str
    table: pd.DataFrame
    nearest: pd.DataFrame | None = None

    @property
    def components(self) -> pd.DataFrame:
        """Medians and ranges by component, in the order of `COMPONENTS`."""
        groups = self.table.groupby("component", observed=True)
        summary = pd.DataFrame(
            {
                "matrices": groups.size(),
                "λ": groups["lam"].median(),
                "k": groups["k"].median(),
                "k min": groups["k"].min(),
                "k max": groups["k"].max(),
                "R²": groups["r_squared"].median(),
                "flagged": groups["reasons"].agg(lambda reasons: int((reasons != "").sum())),
            }
        )
        summary.insert(
            6, "regime", [classify(k, r) for k, r in zip(summary["k"], summary["R²"], strict=True)]
        )
        return summary.loc[[name for name in COMPONENTS if name in summary.index]]

    @property
    def flagged(self) -> pd.DataFrame:
        """The matrices that stand out: `tensor`, `lam`, `k`, `r_squared`, `reasons`."""
        return self.table.loc[self.table["reasons"] != "", ["tensor", "lam", "k", "r_squared", "reasons"]]

    def _headline(self) -> str:
        matrices = f"{len(self.table)} matri{'x' if len(self.table) == 1 else 'ces'}"
        return f"{self.source}: {matrices}, {self.table['numel'].sum():,} weights, attention {self.attention}"

    def _nearest_line(self) -> str:
        if self.nearest is None:
            return ""
        if self.nearest.empty:
            return "No published model shares two components with this one."
        near = (
            f"{row.model} ({row.distance:.3f} over {row.components} components)"
            for row in self.nearest.head(3).itertuples()
        )
        return f"Nearest published models, by rms difference in k: {', '.join(near)}"

    def __str__(self) -> str:
        lines = [self._headline(), "", _formatted(self.components).to_string(), ""]
        flagged = self.flagged
        lines.append(f"{len(flagged)} flagged" + (":" if len(flagged) else "."))
        lines += [f"  {row.tensor}: {row.reasons}" for row in flagged.head(_LISTED).itertuples()]
        if len(flagged) > _LISTED:
            lines.append(f"  … and {len(flagged) - _LISTED} more, in .flagged")
        return "\n".join([*lines, *filter(None, [self._nearest_line()])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        flagged = self.flagged
        parts = [
            f"<p><b>{html.escape(self._headline())}</b></p>",
            _formatted(self.components).to_html(),
            f"<p>{len(flagged)} flagged</p>",
        ]
        if len(flagged):
            with pd.option_context("display.max_colwidth", None):
                parts.append(flagged.head(_LISTED).to_html(index=False))
        if self.nearest is not None:
            parts.append(f"<p>{html.escape(self._nearest_line())}</p>")
        return "\n".join(parts)


_LISTED = 20


def _formatted(summary: pd.DataFrame) -> pd.DataFrame:
    shown = summary.astype({"matrices": str, "flagged": str})
    for name, form in {"λ": ".3g", "k": ".3f", "k min": ".3f", "k max": ".3f", "R²": ".4f"}.items():
        shown[name] = [format(value, form) for value in summary[name]]
    return shown.rename_axis(None)


def diagnose(
    source: Weights,
    *,
    config: Any = None,
    rules: Mapping[str, str] | None = None,
    views: Views = True,
    database: str | PathLike[str] | pd.DataFrame | None = None,
    n_jobs: int = -1,
    progress: bool | None = None,
) -> Diagnosis:
    """Fit every matrix of a model and say what stands out.

    A matrix is flagged where
    - its k lies out of the band that is usual for its role (`BANDS`), by four standard errors;
    - its probability plot is not straight: R² under 0.95;
    - some of its weights form a second population (`tails`);
    - a few super-weights hold more than 2 % of its ‖w‖²;
    - its fit is doubtful or impossible.

    Args:
        source, config, rules, views, n_jobs, progress: as in `fit_weights`.
        database: a CSV of published fits, or its table, to find the nearest model in: a row per model, its name
            in the first column, medians in `k_median_<component>` and `lambda_median_<component>`.

    Returns:
        A `Diagnosis`; print it.

    Raises:
        FileNotFoundError, TypeError, ValueError: as in `fit_weights`; the database has no such columns.

    Source: arXiv 2605.18898 for the bands, and its public database (DATABASE_v9_1.csv).

    >>> import torch
    >>> model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(256, 256), "up_proj": torch.nn.Linear(256, 256)})
    >>> for matrix in model.values():
    ...     matrix.weight.data.normal_(std=0.02)[:16] *= 1e-4
    >>> print(diagnose(model).table["reasons"][0].split(";")[-1].strip())
    second population: 6 % of the weights
    """
    published = None if database is None else _read_database(database)
    matrices, config = read_matrices(source, config)
    options = {"config": config, "rules": rules, "n_jobs": n_jobs, "progress": progress}
    table = fit_weights(source, views=views, **options)
    table["regime"] = [classify(k, r) for k, r in zip(table["k"], table["r_squared"], strict=True)]
    table["reasons"] = ["; ".join(_reasons(row)) for row in table.to_dict("records")]
    nearest = None
    if published is not None:
        # Published medians are of whole matrices, and of fused ones as they are stored.
        whole = table if views is True else fit_weights(source, **options)
        fused = [m.name for m in matrices if describe(m.name, m.shape, rules=rules).component == "qkv"]
        if fused and "qkv" not in set(whole["component"]):
            pattern = f"^(?:{'|'.join(map(re.escape, fused))})$"
            whole = pd.concat([whole, fit_weights(source, views=False, tensors=pattern, **options)])
        medians = whole.groupby(whole["component"].astype(str))[["lam", "k"]].median()
        nearest = _nearest(medians, published)
    return Diagnosis(_name(source), _attention(matrices, config, rules), table, nearest)


def _reasons(row: Mapping[str, Any]) -> list[str]:
    reasons = []
    k, band = row["k"], BANDS.get(row["role"])
    if band and not math.isnan(k):
        margin = 4 * SPREAD * k / math.sqrt(row["n"])
        if k < band[0] - margin or k > band[1] + margin:
            side = "below" if k < band[0] else "above"
            reasons.append(f"k {k:.3f} {side} the {row['role']} band {band[0]:.3f}–{band[1]:.3f}")
    if row["r_squared"] < GOOD_PLOT:
        reasons.append(f"R² {row['r_squared']:.3f}: the plot is not straight")
    if row["second_share"] > 0:
        reasons.append(f"second population: {100 * row['second_share']:.0f} % of the weights")
    if row["top_share"] > SUPER_WEIGHTS and row["n"] >= 1e4:
        reasons.append(f"super-weights: {100 * row['top_share']:.1f} % of ‖w‖² in 0.01 % of the weights")
    if row["note"]:
        reasons.append(row["note"])
    return reasons


def _name(source: Weights) -> str:
    if isinstance(source, str | PathLike):
        given, file = Path(source), newest_checkpoint(source)
        return given.resolve().name + (f", {file.stem}" if file != given else "")
    return "state dict" if isinstance(source, Mapping) else type(source).__name__


def _attention(matrices: Sequence[Matrix], config: Any, rules: Mapping[str, str] | None) -> str:
    """The kind of attention that most layers have; heads are counted by their views, else weights compared."""
    layers: dict[Any, dict[str, tuple[int, int]]] = {}
    fused = False
    for matrix in matrices:
        name = describe(matrix.name, matrix.shape, config, views="head", rules=rules)
        fused |= name.component == "qkv"
        heads = Counter(view.component for view in name.views)
        for part in ("q", "k"):
            if heads[part] or name.component == part:
                size = math.prod(matrix.shape)
                layers.setdefault(name.layer, {})[part] = (heads[part], size)
    kinds = Counter(_kind(layer["q"], layer["k"]) for layer in layers.values() if len(layer) == 2)
    kind = kinds.most_common(1)[0][0] if kinds else "unknown"
    return f"{kind}, fused" if fused else kind


def _kind(q: tuple[int, int], k: tuple[int, int]) -> str:
    counted = q[0] > 0 and k[0] > 0
    ratio = round(q[0] / k[0] if counted else q[1] / k[1])
    if ratio <= 1:
        return "MHA"
    return "MQA" if counted and k[0] == 1 else f"GQA {ratio}:1"


# The published database.

_MOST_COLUMNS = 4096

_WITHOUT_GATE = {"up": "ffn_in", "down": "ffn_out"}
"""Names under which the published database has the two MLP matrices of models without a gate."""


def _read_database(database: str | PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    table: Any = database
    where = "database" if isinstance(database, pd.DataFrame) else f"database {database}"
    if not isinstance(database, pd.DataFrame):
        file = check_path("database", database, "a pandas.DataFrame or the path of a CSV file")
        try:
            text = read_text(file)
            if (columns := text.partition("\n")[0].count(",")) > _MOST_COLUMNS:
                raise ValueError(f"its first line has {columns:,} columns")
            table = pd.read_csv(io.StringIO(text))
        except FileNotFoundError:
            raise FileNotFoundError(f"database: there is no file {database}") from None
        except (OSError, ValueError) as error:  # a folder, a pipe; what is no text, or no table
            raise ValueError(
                f"database must be a CSV file, and {database} cannot be read as one: {error}"
            ) from error
    medians = [name for name in table if str(name).startswith(("k_median_", "lambda_median_"))]
    if not any(str(name).startswith("k_median_") for name in medians):
        raise ValueError(
            f"{where} must have a row per model, its name in the first column, and columns k_median_<component>; "
            f"got the columns {list(table)[:8]}"
        )
    for name in medians:
        try:
            values = table[name].to_numpy(float, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: the column {name} must hold numbers: {error}") from None
        if values.ndim > 1 or not np.all(np.isnan(values) | ((values > 0) & np.isfinite(values))):
            raise ValueError(f"{where}: the column {name} must hold one finite number > 0 a row, or none")
    return table


def _nearest(medians: pd.DataFrame, database: pd.DataFrame) -> pd.DataFrame:
    names = {str(component): str(component) for component in medians.index}
    if "gate" not in names:
        names |= _WITHOUT_GATE
    rows = []
    for published in database.to_dict("records"):
        k_gaps, lam_ratios = [], []
        for component, mine in medians.iterrows():
            name = names[str(component)]
            k = published.get(f"k_median_{name}", np.nan)
            if not pd.isna(k) and not pd.isna(mine["k"]):
                k_gaps.append(mine["k"] - k)
                lam_ratios.append(mine["lam"] / published.get(f"lambda_median_{name}", np.nan))
        if len(k_gaps) >= 2:
            rows.append(
                {
                    "model": next(iter(published.values())),
                    "distance": float(np.sqrt(np.mean(np.square(k_gaps)))),
                    "components": len(k_gaps),
                    "lam_ratio": float(np.median(lam_ratios)),
                }
            )
    table = pd.DataFrame(rows, columns=["model", "distance", "components", "lam_ratio"])
    return table.sort_values("distance", ignore_index=True)
