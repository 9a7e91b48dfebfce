"""What a rescaling does to the forces of the updates behind it, and to the Weibull law of the weights.

The network computes what it computed, so the gradient of a weight that became f times as large is 1/f of what it
was. How the forces shift follows from that, and from what became of the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

    With w → f·w and g → g/f (f is α on one side of a pair, 1/α on the other), in the limit ε ≪ √v̂ and j updates
    after the rescaling:

    transport   m/f and v/f² are the moments of the new gradients, so u = m̂/√v̂ and g̃ = g/√v̂ are what they were:

                drift × f,   injection × 1,   signal × 1,   decay × f²

                Memory is −2η⟨w,u⟩ of the noise that u shares with the updates that made w. Those before the
                rescaling were multiplied by f with w, those since were not, and u forgets:

                memory × 1 + (f−1)·F,      F = Σ_{s≥j} ρₛ / Σ_{s≥1} ρₛ → β₁ʲ⁻¹,      ρₛ of `memory_null`

                Exact for the next update, where F = 1 and alignment × f. Behind momentum's window only drift stays
                shifted, mostly the smaller part of alignment.

    keep        u stays at first, since m/√v does; then the old moments fade. After j updates the mean of v is
                Vⱼ = β₂ʲ + (1−β₂ʲ)/f² of what it was, m's steady part Mⱼ = β₁ʲ + (1−β₁ʲ)/f, and the variance of
                its noise Nⱼ = β₁²ʲ + (1−β₁²ʲ)/f²:

                drift × 1/√Vⱼ,   ‖u‖²/n → (μ²Mⱼ² + (1−μ²)·ρ·Nⱼ)/Vⱼ,   signal × Mⱼ₋₁/(f·Vⱼ),   decay × f²

                memory → (memory·X + drift·(f−1)·β₁ʲ)/√Vⱼ,   X = f·β₁ʲ⁻¹ + (1−β₁)·Σ_{0<s<j} β₁ˢ⁻¹·Nⱼ₋ₛ/√Vⱼ₋ₛ

                X is of the noise; the second term is of the old m, whose mean gradients are f times those of now.

    reset       m = v = 0, and updates are counted anew. After bias correction the steady part is there at once,
                the noise is averaged over few gradients, and momentum remembers no update from before:

                drift × f,   ‖u‖²/n → μ² + (1−μ²)·ρⱼ,   ρⱼ = ρ·(1+β₁ʲ)/(1−β₁ʲ),   decay × f²

                memory × (Rⱼ/R)·ρⱼ/ρ,   R: memory over injection of white noise, after j updates from the start Rⱼ

                signal × 1; at j = 1 it is NaN, as one gradient does not tell it. Of the first few updates all but
                decay and injection is rough: v̂ holds little but the fresh gradient, which makes drift up to a fifth
                smaller. (A log counts updates on over a reset: there its memory_null and signal are as if momentum
                were old.)

    Everywhere alignment = drift + memory. memory_null goes as injection (with `reset` times Rⱼ/R), so κ under
    `transport` starts at f times what it was and is back within some 1/(1−β₁) updates. Where the drift was not
    measured, memory is taken to be that of white noise.

    Here ρ = (1−β₁)/(1+β₁) is ‖u‖²/n of pure noise, and μ², the part of the squared gradient that is steady, follows
    from before: injection/(η²n) = μ² + (1−μ²)·ρ. Where that ratio is below ρ it takes ρ's place (in `reset` as the
    memory of v fills, by β₂ʲ⁻¹). At j = 1 `reset` has ‖u‖² = n, u being the sign of the gradient. But for the next
    update under `transport` these are means at a steady η, good for sums over tensors and updates; all become
    `transport` as j grows. At the start of a training (`at` = 0) there are no moments, and it is `transport`.

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
        betas: AdamW's.

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
    later = np.maximum(j, 1)
    if moments == "transport" or at == 0:
        shift = _transported(f, later, at, betas[0])
    else:
        missing = [name for name in ("lr", "numel") if name not in old]
        if missing:
            raise ValueError(f"before lacks the columns {missing}, which {moments!r} needs")
        u_sq = (old["injection"] / (old["lr"] ** 2 * old["numel"])).to_numpy(float)
        shift = (_kept if moments == "keep" else _reset)(f, later, at, u_sq, *betas)
    untouched = (f == 1) | (j < 1)
    shift = _Shift(*(np.where(untouched, same, each) for same, each in zip(_SAME, shift, strict=True)))
    return _shifted(old, f, shift, at + later, betas[0])


class _Shift(NamedTuple):
    """What the columns of before are multiplied by; memory gets a part of the drift besides."""

    drift: Any
    memory: Any
    drift_to_memory: Any
    injection: Any
    signal: Any
    memory_null: Any


_SAME = _Shift(1.0, 1.0, 0.0, 1.0, 1.0, 1.0)


def _shifted(old: pd.DataFrame, f: np.ndarray, shift: _Shift, step: np.ndarray, beta1: float) -> pd.DataFrame:
    white = 2 * noise_memory(step, beta1) * old["injection"]
    memory_was = old["memory"].fillna(white) if "memory" in old else white
    drift_was = old["alignment"] - memory_was
    memory = memory_was * shift.memory + drift_was * shift.drift_to_memory
    drift = drift_was * shift.drift
    out = old[[name for name in FORCE_TABLE if name in old]].assign(
        norm_sq=old["norm_sq"] * f**2,
        alignment=old["alignment"] + (drift - drift_was) + (memory - memory_was),
        injection=old["injection"] * shift.injection,
        decay=old["decay"] * f**2,
    )
    for name, values in (("drift", drift), ("memory", memory)):
        if name in old:
            out[name] = values.where(old[name].notna())
    for name, factor in (("signal", shift.signal), ("memory_null", shift.memory_null)):
        if name in old:
            out[name] = old[name] * factor
    if "norm_sq_after" in old:
        after_sq = out["norm_sq"] + out["span"] * out[list(FORCES)].sum(axis=1, skipna=False)
        out["norm_sq_after"] = after_sq.where(old["norm_sq_after"].notna())
    return out.assign(factor=f)


def noise_memory(step: np.ndarray, beta1: float, since: np.ndarray | float = 1) -> np.ndarray:
    """Σ ρₛ for s from `since` to step − 1: half of `memory_null` of a steady η, in closed form."""
    b, left = beta1 / (1 - beta1), beta1**step
    early = b * (beta1 ** (since - 1.0) - beta1 ** (step - 1)) + (step - since) * left
    return early / (1 + left)


def _transported(f: np.ndarray, j: np.ndarray, at: int, beta1: float) -> _Shift:
    everything = noise_memory(at + j, beta1)
    before = np.divide(
        noise_memory(at + j, beta1, since=j), everything, out=np.zeros_like(j), where=everything > 0
    )
    return _Shift(f, 1 + (f - 1) * before, 0.0, 1.0, 1.0, 1.0)


def _kept(f: np.ndarray, j: np.ndarray, at: int, u_sq: np.ndarray, beta1: float, beta2: float) -> _Shift:
    def old_v(j: np.ndarray) -> np.ndarray:
        return beta2**j + (1 - beta2**j) / f**2

    def old_m(j: np.ndarray, power: int = 1) -> np.ndarray:
        return beta1 ** (power * j) + (1 - beta1 ** (power * j)) / f**power

    v, (steady, noise) = old_v(j), _parts(u_sq, beta1)
    echo = f * beta1 ** (j - 1)
    s, weight = 1, 1 - beta1
    while weight > _FAINT and s < j.max(initial=0):
        ago = np.maximum(j - s, 1)
        echo = echo + np.where(s < j, weight * old_m(ago, 2) / np.sqrt(old_v(ago)), 0.0)
        s, weight = s + 1, weight * beta1
    after = (steady * old_m(j) ** 2 + (1 - steady) * noise * old_m(j, 2)) / v
    injection = _ratio(after, u_sq)
    signal = old_m(j - 1) / (f * v)
    root = np.sqrt(v)
    return _Shift(1 / root, echo / root, (f - 1) * beta1**j / root, injection, signal, injection)


def _reset(f: np.ndarray, j: np.ndarray, at: int, u_sq: np.ndarray, beta1: float, beta2: float) -> _Shift:
    rho, (steady, noise) = noise_rho(np.inf, beta1), _parts(u_sq, beta1)
    now = (noise + (rho - noise) * beta2 ** (j - 1)) * noise_rho(j, beta1) / rho
    memory = _ratio(noise_memory(j, beta1), noise_memory(at + j, beta1))
    injection = _ratio(steady + (1 - steady) * now, u_sq)
    signal = np.where(j > 1, 1.0, np.nan)  # of one gradient it cannot be told
    return _Shift(f, memory * _ratio(now, noise), 0.0, injection, signal, memory * injection)


def _parts(u_sq: np.ndarray, beta1: float) -> tuple[np.ndarray, np.ndarray]:
    """The steady part μ² of the squared gradient, and ‖u‖²/n of its noise."""
    rho = noise_rho(np.inf, beta1)
    return np.clip((u_sq - rho) / (1 - rho), 0, 1), np.minimum(rho, u_sq)


def _ratio(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.divide(after, before, out=np.ones_like(after), where=before > 0)


_FAINT = 1e-9
"""Weight of an update that momentum has forgotten."""


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
