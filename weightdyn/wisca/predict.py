"""What a rescaling does to the forces of the updates behind it, and to the Weibull law of the weights.

The network computes what it computed, so the gradient of a weight that became f times as large is 1/f of what it
was. How the forces shift follows from that, and from what became of the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weightdyn.core.checks import check_betas, check_whole
from weightdyn.core.forces import noise_rho
from weightdyn.core.naming import describe, split_label
from weightdyn.core.tables import FORCE_TABLE, FORCES, check_force_table, check_weibull_table
from weightdyn.record.runlog import RunLog
from weightdyn.wisca.pairs import ScalingPair, unwrap
from weightdyn.wisca.plan import Moments, check_choices, check_rescale_table, scale_factors


def predict_shift(
    before: pd.DataFrame | RunLog,
    table: pd.DataFrame,
    model: nn.Module,
    *,
    pairs: Sequence[ScalingPair] | None = None,
    moments: Moments | None = None,
    at: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> pd.DataFrame:
    """Predict the forces of a model that was rescaled from those of the same model that was not.

    With w → f·w and g → g/f (f is α on one side of a pair, 1/α on the other), in the limit ε ≪ √v̂:

    transport   m/f and v/f² are the moments of the new gradients, so u = m̂/√v̂ is what it was. Exact, next update:

                alignment × f,   injection × 1,   decay × f²

    keep        u stays at first, since m/√v does; then the old moments fade. After j updates the mean of v is
                V = β₂ʲ + (1−β₂ʲ)/f² of what it was, m's steady part M = β₁ʲ + (1−β₁ʲ)/f, and the variance of
                its noise N = β₁²ʲ + (1−β₁²ʲ)/f²:

                alignment × f·M/√V,   ‖u‖²/n → (μ²M² + (1−μ²)·ρ·N)/V,   decay × f²

    reset       m = v = 0, and updates are counted anew. After bias correction the steady part is there at once,
                and the noise is averaged over few gradients:

                alignment × f,   ‖u‖²/n → μ² + (1−μ²)·ρ·(1+β₁ʲ)/(1−β₁ʲ),   decay × f²

    Here ρ = (1−β₁)/(1+β₁) is ‖u‖²/n of pure noise, and μ², the part of the squared gradient that is steady, follows
    from before: injection/(η²n) = μ² + (1−μ²)·ρ. Where that ratio is below ρ it takes ρ's place (in `reset` as the
    memory of v fills, by β₂ʲ⁻¹). At j = 1 `reset` has ‖u‖² = n, u being the sign of the gradient. These are means,
    good for sums over tensors and updates; the alignment of few updates after a reset is mostly noise. Both become
    `transport` as j grows. At the start of a training (`at` = 0) there are no moments, and `transport` is exact.

    λ of the Weibull law becomes f·λ and k stays: a factor changes no shape. Where a tensor got more than one α (by
    head or channel, or as the bias of a fused matrix) what is not known is NaN; of tables by head
    (`ForceLogger(views="head")`) the rows of q, k and v are known.

    Args:
        before: a force table or a Weibull table of the model that was not rescaled, or its `RunLog`, of which the
            force table is taken.
        table: of `rescale_` or `plan_rescale`.
        model: the model, for names and shapes.
        pairs: your own pairs, if the table was made with such.
        moments: "transport", "keep" or "reset". Default: what the table says, else "transport".
        at: updates made before the rescaling, so that j = step − at; rows up to there stay as they are. Default:
            the first row is the next update (of a Weibull table, the rescaled weights).
        betas: AdamW's, for "keep" and "reset".

    Returns:
        The table as it should be with the rescaling: a force table with those columns of `FORCE_TABLE` that
        `before` has, or the Weibull table; behind them `factor`, the f of each row (NaN if it has several).

    Raises:
        TypeError, ValueError: the tables do not fit the model, or an argument is none of those accepted.

    Source: the algebra of `forces_from_products`; ρ is the variance of an exponential mean of white noise.
    """
    check_rescale_table(table)
    if moments is None:
        moments = next(iter(table["moments"].dropna() if "moments" in table else ()), "transport")
    check_choices(moments=moments)
    betas = check_betas("betas", betas)
    check_whole("at", at, 0, (1 << 63) - 1, none="just before the first row")
    is_weibull = {"step", "tensor", "k", "lam"} <= set(getattr(before, "columns", ()))
    check = check_weibull_table if is_weibull else check_force_table
    old = check(before, argument="before", unique=True)
    if "tensor" not in old:
        raise ValueError("before has no column 'tensor': give the table of the tensors, not of their sums")
    first = int(old["step"].min()) - (0 if is_weibull else 1) if len(old) else 0
    at = first if at is None else at
    j = old["step"].to_numpy(float) - at
    factors = _row_factors(model, scale_factors(model, table, pairs=pairs), old["tensor"])
    if is_weibull:
        f = np.where(j >= 0, factors, 1.0)
        return old.assign(lam=old["lam"] * f, k=old["k"] * (f / f), factor=f)
    f = np.where(j >= 1, factors, 1.0)
    if moments == "transport" or at == 0:
        alignment, injection = f, np.ones_like(f)
    else:
        missing = [name for name in ("lr", "numel") if name not in old]
        if missing:
            raise ValueError(f"before lacks the columns {missing}, which {moments!r} needs")
        u_sq = (old["injection"] / (old["lr"] ** 2 * old["numel"])).to_numpy(float)
        alignment, after = _faded(f, np.maximum(j, 1), u_sq, moments, *betas)
        injection = np.divide(after, u_sq, out=np.ones_like(f), where=u_sq > 0)
        touched = ~(f == 1) & (j >= 1)
        alignment, injection = (np.where(touched, each, 1.0) for each in (alignment, injection))
    shifted = old[[name for name in FORCE_TABLE if name in old]].assign(
        norm_sq=old["norm_sq"] * f**2,
        alignment=old["alignment"] * alignment,
        injection=old["injection"] * injection,
        decay=old["decay"] * f**2,
    )
    if "norm_sq_after" in old:
        after_sq = shifted["norm_sq"] + shifted["span"] * shifted[list(FORCES)].sum(axis=1, skipna=False)
        shifted["norm_sq_after"] = after_sq.where(old["norm_sq_after"].notna())
    return shifted.assign(factor=f)


def _faded(
    f: np.ndarray, j: np.ndarray, u_sq: np.ndarray, moments: str, beta1: float, beta2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Factor of the alignment, and ‖u‖²/n, j updates after the moments were kept or reset."""
    rho = noise_rho(np.inf, beta1)
    steady = np.clip((u_sq - rho) / (1 - rho), 0, 1)
    noise = np.minimum(rho, u_sq)
    if moments == "reset":
        noise = noise + (rho - noise) * beta2 ** (j - 1)
        return f, steady + (1 - steady) * noise * noise_rho(j, beta1) / rho
    v = beta2**j + (1 - beta2**j) / f**2
    mean = beta1**j + (1 - beta1**j) / f
    spread = beta1 ** (2 * j) + (1 - beta1 ** (2 * j)) / f**2
    return f * mean / np.sqrt(v), (steady * mean**2 + (1 - steady) * noise * spread) / v


def _row_factors(model: nn.Module, factors: dict[str, dict[int, Tensor]], labels: pd.Series) -> np.ndarray:
    """What each row's tensor, or view of a tensor, is multiplied by; NaN if not all of it by the same."""
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    names = {name for name, _ in model.named_parameters()}
    wanted = labels.astype(str)
    unknown = wanted[[split_label(label)[0] not in names for label in wanted]]
    if len(unknown):
        raise ValueError(f"before has {unknown.iloc[0]!r}, which is none of the model's tensors")
    known: dict[str, float] = {}
    for name, axes in factors.items():
        shape = tuple(model.get_parameter(name).shape)
        for views in (False, True, "head"):
            for row in describe(name, shape, config, views=views).rows(shape):
                view = row.view
                inside = [
                    torch.cat([factor[start:stop] for start, stop in view.ranges])
                    if view is not None and axis == view.axis
                    else factor
                    for axis, factor in axes.items()
                ]
                known[row.label] = _common(inside)
    return wanted.map(known).where(wanted.isin(list(known)), 1.0).to_numpy(float)


def _common(factors: Sequence[Tensor]) -> float:
    """The one product of all factors, or NaN."""
    if any((factor != factor[0]).any() for factor in factors):
        return float("nan")
    return float(np.prod([float(factor[0]) for factor in factors]))
