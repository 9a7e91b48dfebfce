"""The laws that rival Weibull's, and measures of the tails that assume no law.

All of them are sums over the bins of a `MagnitudeHistogram`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy
from torch import Tensor

from weightdyn.core.checks import check_choice, check_numbers
from weightdyn.weibull.fit import as_histogram, find_root, fit_likelihood, ks_distance
from weightdyn.weibull.magnitudes import MagnitudeHistogram

# Rival laws.


class _Law(NamedTuple):
    """A law fitted to magnitudes of rms 1, and its log-likelihood per magnitude."""

    shape: float
    scale: float
    log_likelihood: float


_CDF: dict[str, Callable[[Any, float], Any]] = {
    "weibull": lambda x, k: -np.expm1(-(x**k)),
    "half-normal": lambda x, _: scipy.special.erf(x / math.sqrt(2)),
    "log-normal": lambda x, s: scipy.special.ndtr(np.log(x) / s),
    "gamma": lambda x, a: scipy.special.gammainc(a, x),
    "exponential": lambda x, _: -np.expm1(-x),
    "generalised normal": lambda x, beta: scipy.special.gammainc(1 / beta, x**beta),
}
"""Distribution function of each law with scale 1, of magnitudes above zero and the shape."""


def law_cdf(law: str, shape: float, scale: float, x: Any) -> Any:
    """P(|w| ≤ x) under one of the laws that `rank_laws` fits, from its row there.

    Args:
        law: name of the law, as in the index of `rank_laws`.
        shape, scale: its parameters, as in the columns of that name; the shape of a law without one is ignored.
        x: magnitudes, a number or an array; all that is not positive has 0.

    Raises:
        ValueError: there is no such law.

    >>> law_cdf("exponential", math.nan, 2.0, np.array([-1.0, 2.0])).round(4).tolist()
    [0.0, 0.6321]
    """
    check_choice("law", law, _CDF)
    for argument, value in (("shape", shape), ("scale", scale), ("x", x)):
        check_numbers(argument, value)
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.asarray(x, dtype=np.float64) / scale
        return _CDF[law](np.maximum(scaled, np.finfo(np.float64).tiny), shape)


TIE = 6.0
"""AIC by which a law with more parameters must lead to be ranked before one with fewer.

The exponential and the half-normal are special cases of laws with a free shape. These gain χ²₁ in twice the
log-likelihood from noise alone, so a bare AIC, which charges 2, prefers them in one sample of six.
"""


def rank_laws(x: Tensor | np.ndarray | MagnitudeHistogram) -> pd.DataFrame:
    """Fit the Weibull law and its rivals by maximum likelihood, the best first.

    Args:
        x: weights, or the histogram of their magnitudes; zeros and non-finite values are left out.

    Returns:
        One row per law, its name the index:

        weibull               k/λ·(x/λ)^(k−1)·exp(−(x/λ)^k)      shape k, scale λ
        half-normal           √(2/π)/σ·exp(−x²/2σ²)              scale σ
        log-normal            exp(−ln²(x/m)/2s²)/(xs√2π)         shape s, scale m (the median)
        gamma                 x^(a−1)·exp(−x/θ)/(Γ(a)θ^a)        shape a, scale θ
        exponential           exp(−x/θ)/θ                        scale θ
        generalised normal    β/(αΓ(1/β))·exp(−(x/α)^β)          shape β, scale α

        and the columns `shape` (NaN where there is none), `scale`, `parameters`, `log_likelihood`, `aic`,
        `delta_aic` (above the lowest), `ks`. The order is that of the AIC, but of the laws within `TIE` of the
        lowest those with fewer parameters come first.

    Raises:
        ValueError: the sample has fewer than two distinct magnitudes.

    >>> x = np.random.default_rng(0).gamma(2.0, size=20_000)
    >>> rank_laws(x).index[0]
    'gamma'
    """
    sample = as_histogram(x)
    if len(sample.keys) < 2:
        raise ValueError(f"x must have at least two distinct non-zero magnitudes, got {len(sample.keys)}")
    value, weight = sample.points()
    weight = weight / sample.n
    top = float(value[-1])
    rms = top * math.sqrt(np.sum(weight * (value / top) ** 2))

    x = np.maximum(value / rms, np.finfo(np.float64).tiny)
    found = fit_likelihood(sample)
    laws = {
        "weibull": _weibull_law(x, weight, found.k, found.lam / rms),
        **{name: fit(x, weight) for name, fit in _RIVALS.items()},
    }
    rows = []
    for name, law in laws.items():
        parameters = 1 if math.isnan(law.shape) else 2
        log_likelihood = sample.n * (law.log_likelihood - math.log(rms))
        rows.append(
            {
                "law": name,
                "shape": law.shape,
                "scale": law.scale * rms,
                "parameters": parameters,
                "log_likelihood": log_likelihood,
                "aic": 2 * parameters - 2 * log_likelihood,
                "ks": ks_distance(
                    sample, lambda edge, on=(name, law.shape, law.scale): law_cdf(*on, edge / rms)
                ),
            }
        )
    table = pd.DataFrame(rows).set_index("law")
    table.insert(5, "delta_aic", table["aic"] - table["aic"].min())
    tied = table["delta_aic"] <= TIE
    order = np.lexsort([table["aic"], np.where(tied, table["parameters"], 3)])
    return table.iloc[order]


def _weibull_law(x: np.ndarray, weight: np.ndarray, k: float, lam: float) -> _Law:
    log = math.log(k / lam) + (k - 1) * np.sum(weight * np.log(x / lam)) - 1
    return _Law(k, lam, float(log))


def _half_normal_law(x: np.ndarray, weight: np.ndarray) -> _Law:
    sigma = math.sqrt(np.sum(weight * x**2))
    log = math.log(2 / math.pi) / 2 - math.log(sigma) - 0.5
    return _Law(math.nan, sigma, log)


def _log_normal_law(x: np.ndarray, weight: np.ndarray) -> _Law:
    mu = float(np.sum(weight * np.log(x)))
    s = math.sqrt(np.sum(weight * (np.log(x) - mu) ** 2))
    log = -mu - math.log(s) - math.log(2 * math.pi) / 2 - 0.5
    return _Law(s, math.exp(mu), log)


def _gamma_law(x: np.ndarray, weight: np.ndarray) -> _Law:
    mean, log_mean = float(np.sum(weight * x)), float(np.sum(weight * np.log(x)))
    gap = math.log(mean) - log_mean  # ln a − ψ(a), which falls with a
    a = math.exp(find_root(lambda t: gap - (t - scipy.special.digamma(math.exp(t))), -10.0, 15.0))
    theta = mean / a
    log = (a - 1) * log_mean - a - a * math.log(theta) - scipy.special.gammaln(a)
    return _Law(a, theta, float(log))


def _exponential_law(x: np.ndarray, weight: np.ndarray) -> _Law:
    theta = float(np.sum(weight * x))
    return _Law(math.nan, theta, -math.log(theta) - 1)


def _generalised_normal_law(x: np.ndarray, weight: np.ndarray) -> _Law:
    z = np.log(x)

    def score(t: float) -> float:
        beta = math.exp(t)
        power = weight * np.exp(beta * z)
        total = np.sum(power)
        return float(
            beta * (1 - np.sum(power * z) / total) + math.log(beta * total) + scipy.special.digamma(1 / beta)
        )

    def law(beta: float) -> _Law:
        alpha = (beta * np.sum(weight * np.exp(beta * z))) ** (1 / beta)
        log = math.log(beta / alpha) - scipy.special.gammaln(1 / beta) - 1 / beta
        return _Law(beta, float(alpha), float(log))

    low, high = 0.05, 50.0
    with np.errstate(under="ignore"):
        # The score fades towards β = 0, so its nearer end says nothing where it has no root.
        root = math.exp(find_root(score, math.log(low), math.log(high)))
        return max(map(law, (root, low, high)), key=lambda law: law.log_likelihood)


_RIVALS: dict[str, Callable[[np.ndarray, np.ndarray], _Law]] = {
    "half-normal": _half_normal_law,
    "log-normal": _log_normal_law,
    "gamma": _gamma_law,
    "exponential": _exponential_law,
    "generalised normal": _generalised_normal_law,
}


# What assumes no law.

TOP = 1e-4
"""Fraction of the weights that counts as the top of a tensor, where its super-weights are."""


class Tails(NamedTuple):
    """How heavy the tails are, whatever the law; in brackets the value of a half-normal.

    Attributes:
        q90_q10: ratio of the 90 % and the 10 % quantile of |w| (13.1).
        q99_q50: of the 99 % quantile and the median (3.82).
        q999_q50: of the 99.9 % quantile and the median (4.88).
        gini: Gini coefficient of |w|: 0 if all are equal, 1 if one is everything (0.414).
        kurtosis: mean w⁴ over squared mean w² (3).
        top_share: share of ‖w‖² in the largest 0.01 % of the weights, at least one (0.0017).
        second_share: share of the weights in a second population, one that stands apart from the others on
            the logarithmic axis, as dead rows do; 0 if there is none.
    """

    q90_q10: float
    q99_q50: float
    q999_q50: float
    gini: float
    kurtosis: float
    top_share: float
    second_share: float


def tails(x: Tensor | np.ndarray | MagnitudeHistogram) -> Tails:
    """Measure the tails of weight magnitudes without assuming a law; zeros are left out.

    Args:
        x: weights, or the histogram of their magnitudes.

    Returns:
        `Tails`; all NaN for an empty sample.

    >>> tails(np.full(1000, 0.5)).gini
    0.0
    """
    sample = as_histogram(x)
    n = sample.n
    if n == 0:
        return Tails(*[math.nan] * len(Tails._fields))
    q10, q50, q90, q99, q999 = sample.quantile([0.1, 0.5, 0.9, 0.99, 0.999])
    low, high = sample.edges
    counts = sample.counts.astype(np.float64)
    ends = sample.ends.astype(np.float64)
    scaled = (low if sample.exact else low / 2 + high / 2) / high[-1]
    first = np.einsum("i,i", counts, scaled)
    with np.errstate(under="ignore", over="ignore"):
        ratios = [q90 / q10, q99 / q50, q999 / q50]
        squared = scaled**2
        second, fourth = np.einsum("i,i", counts, squared), np.einsum("i,i,i", counts, squared, squared)
    # Σ (2i − n − 1)x_i / nΣx over the ranks i
    scaled *= counts
    gini = (2 * np.einsum("i,i", ends, scaled) - np.einsum("i,i", counts, scaled)) / (n * first) - 1
    # The square that the largest weights hold, a part of the last bin that they reach into.
    left = max(1.0, TOP * n)
    top = slice(np.searchsorted(ends, n - left, side="right"), None)
    taken = np.minimum(left - (n - ends[top]), counts[top])
    return Tails(
        *(float(ratio) for ratio in ratios),
        gini=float(gini),
        kurtosis=float(n * fourth / second**2),
        top_share=float(np.sum(squared[top] * taken) / second),
        second_share=_second_share(sample),
    )


def _second_share(sample: MagnitudeHistogram) -> float:
    """Share of the weights on the far side of the deepest valley in the density of ln |w|.

    Counted in quarters of an octave, where every usual law has one mode. A second mode has to rise half as much
    again above the valley, by five standard deviations, and to hold 1 % of the weights.
    """
    low, high = sample.edges
    if len(low) < 256:  # quantised: gaps between the levels are no valleys
        return 0.0
    middle = low if sample.exact else low / 2 + high / 2
    first, last = (math.floor(4 * math.log2(end)) for end in (middle[0], middle[-1]))
    ends = np.searchsorted(middle, np.exp2(np.arange(first + 1, last + 1) / 4))
    below = np.where(ends > 0, sample.ends[ends - 1], 0)
    counts = np.diff(np.concatenate([[0, 0], below, [sample.n, sample.n]]))
    density = counts[:-2] + counts[1:-1] + counts[2:]  # over three neighbours, against noise
    main = int(np.argmax(density))
    best = 0.0
    for side in (density[main:], density[: main + 1][::-1]):
        lowest = np.minimum.accumulate(side)
        rise = side - np.maximum(1.5 * lowest, lowest + 5 * np.sqrt(side))
        peak = int(np.argmax(rise))
        if rise[peak] > 0:
            valley = int(np.argmin(side[:peak]))
            best = max(best, float(np.sum(side[valley:]) / np.sum(density)))
    return best if best >= 0.01 else 0.0
