"""Fits of a Weibull law to weight magnitudes: |w| ~ Weibull(k, λ), P(|w| ≤ x) = 1 − exp(−(x/λ)^k).

The published protocol is a least-squares line through the middle 80 % of the probability plot,

    ln(−ln(1 − F)) = k·ln x − k·ln λ,        F = (i − ½)/n for the i-th smallest of n magnitudes

Each bin of a `MagnitudeHistogram` is a run of consecutive ranks, and sums of ln(−ln(1 − F)) over ranks have a
closed form, so the whole regression is a few array operations on the bins that the trim leaves. The fits by
likelihood and by moments, the rival laws and the tail measures are sums over the same bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy  # loads scipy.special when it is first used, which an import of this module does not wait for
from torch import Tensor

from weightdyn.magnitudes import MagnitudeHistogram

Method = Literal["plot", "mle", "moments"]

SORTED = 1 << 18
"""Tensors and arrays up to this size are sorted, which is exact; larger ones are counted in bins."""

FEW = 50
"""Distinct magnitudes below which a fit is marked: a density says little about a handful of values."""


@dataclass(frozen=True)
class WeibullFit:
    """A Weibull law fitted to magnitudes.

    Attributes:
        k: shape; NaN where nothing could be fitted.
        lam: scale λ, in units of the weights; NaN where nothing could be fitted.
        r_squared: squared correlation of ln x and ln(−ln(1−F)) in the trimmed probability plot: how straight
            the plot is, whatever the method.
        ks: Kolmogorov-Smirnov distance between the law and the whole sample, not only the trimmed part.
        n: number of non-zero finite magnitudes in the sample.
        method: how it was fitted.
        trim: the range of F that the probability plot used.
        note: empty, or what makes the fit doubtful or impossible.
        k_se: standard error of k, from the observed information; NaN for other methods than "mle".
        lam_se: that of λ.
    """

    k: float
    lam: float
    r_squared: float
    ks: float
    n: int
    method: Method = "plot"
    trim: tuple[float, float] = (0.1, 0.9)
    note: str = ""
    k_se: float = math.nan
    lam_se: float = math.nan

    def __repr__(self) -> str:
        shown = {"k": f"{self.k:.6g}", "lam": f"{self.lam:.6g}"}
        if self.method == "mle":
            shown |= {"k_se": f"{self.k_se:.2g}", "lam_se": f"{self.lam_se:.2g}"}
        shown |= {"r_squared": f"{self.r_squared:.5f}", "ks": f"{self.ks:.4f}", "n": str(self.n)}
        shown |= {"method": repr(self.method)} | ({"note": repr(self.note)} if self.note else {})
        return f"WeibullFit({', '.join(f'{name}={value}' for name, value in shown.items())})"

    @property
    def mean(self) -> float:
        """Mean of the law, λΓ(1 + 1/k)."""
        return self.lam * _exp(scipy.special.gammaln(1 + 1 / self.k))

    @property
    def rms(self) -> float:
        """Root mean square of the law, λ√Γ(1 + 2/k): the σ of weights that are distributed about zero."""
        return self.lam * _exp(scipy.special.gammaln(1 + 2 / self.k) / 2)

    @property
    def std(self) -> float:
        """Standard deviation of the magnitudes, λ√(Γ(1 + 2/k) − Γ(1 + 1/k)²)."""
        unspread = math.exp(
            min(2 * scipy.special.gammaln(1 + 1 / self.k) - scipy.special.gammaln(1 + 2 / self.k), 0.0)
        )
        return self.rms * math.sqrt(1 - unspread)

    def cdf(self, x: Any) -> Any:
        """P(|w| ≤ x) = 1 − exp(−(x/λ)^k), for numbers and arrays; 0 below zero."""
        with np.errstate(over="ignore", under="ignore"):
            return -np.expm1(-((np.maximum(x, 0.0) / self.lam) ** self.k))

    def quantile(self, q: Any) -> Any:
        """Magnitude with cdf q, λ(−ln(1 − q))^(1/k), for numbers and arrays in [0, 1]."""
        with np.errstate(divide="ignore"):
            return self.lam * (-np.log1p(-np.asarray(q, dtype=np.float64))) ** (1 / self.k)

    def log_likelihood(self, x: Tensor | np.ndarray | MagnitudeHistogram) -> float:
        """Log-likelihood of a sample, n ln(k/λ) + (k − 1)Σ ln(x/λ) − Σ (x/λ)^k, zeros left out."""
        value, weight = as_histogram(x).points()
        log = np.log(value) - math.log(self.lam)
        with np.errstate(over="ignore", under="ignore"):
            terms = weight * (math.log(self.k / self.lam) + (self.k - 1) * log - np.exp(self.k * log))
        return float(terms.sum())


def fit_weibull(
    x: Tensor | np.ndarray | MagnitudeHistogram,
    method: Method = "plot",
    trim: tuple[float, float] = (0.1, 0.9),
) -> WeibullFit:
    """Fit a Weibull law to the magnitudes of a tensor, array or histogram.

    Args:
        x: weights of any shape and device, or the histogram of their magnitudes. Zeros and non-finite values
            are left out. Up to 262,144 weights are sorted; more of them in float32 or float64, like a
            histogram, are taken in bins 0.4 % wide, which moves k by less than 1e-5 at that size.
        method: how k and λ are found.
            "plot", the published protocol: ordinary least squares of ln(−ln(1−F)) on ln x over the sorted
            magnitudes with F = (i−½)/n in `trim`.
            "mle": maximum likelihood over the whole sample. λ^k = Σx^k/n leaves one concave function of k,
            n ln k − n ln Σx^k + (k−1)Σ ln x, and Newton's method finds its top.
            "moments": the law whose mean and mean square are the sample's.
        trim: the range of F that the probability plot uses, both ends included.

    Returns:
        A `WeibullFit`. A sample without two distinct magnitudes (for "plot", in the trim) gives NaN for k and
        λ, and a note; one with fewer than 50 distinct magnitudes is fitted and noted.

    Raises:
        TypeError: x is no tensor, array or histogram, or not of a float type.
        ValueError: unknown method, or a trim that is no range within [0, 1].

    Source: arXiv 2606.19367 and 2605.18898, the probability-plot protocol on the middle 80 %.

    >>> import torch
    >>> x = 0.02 * (-torch.log1p(-(torch.arange(1000) + 0.5) / 1000)) ** (1 / 1.2)
    >>> fit = fit_weibull(x)
    >>> round(fit.k, 5), round(fit.lam, 6)
    (1.2, 0.02)
    """
    if method not in ("plot", "mle", "moments"):
        raise ValueError(f"method must be 'plot', 'mle' or 'moments', got {method!r}")
    low, high = _check_trim(trim)
    sample = as_histogram(x)
    line = _fit_plot(sample, (low, high))
    if method == "plot":
        found = _Found(line.k, line.lam)
    else:
        found = _fit_likelihood(sample) if method == "mle" else _fit_moments(sample)
    fit = WeibullFit(
        k=found.k,
        lam=found.lam,
        r_squared=line.r_squared,
        ks=math.nan,
        n=sample.n,
        method=method,
        trim=(low, high),
        note=_note(sample, found.k),
        k_se=found.k_se,
        lam_se=found.lam_se,
    )
    return fit if math.isnan(fit.k) else replace(fit, ks=_ks(sample, fit.cdf))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


class _Found(NamedTuple):
    k: float = math.nan
    lam: float = math.nan
    k_se: float = math.nan
    lam_se: float = math.nan


class _Line(NamedTuple):
    k: float = math.nan
    lam: float = math.nan
    r_squared: float = math.nan


def _check_trim(trim: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in trim)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise ValueError(f"trim must be a pair (low, high) with 0 <= low < high <= 1, got {trim!r}")
    return low, high


def as_histogram(x: Tensor | np.ndarray | MagnitudeHistogram) -> MagnitudeHistogram:
    """The histogram that fits take of x: exact up to `SORTED` weights, itself where it is one already."""
    if isinstance(x, MagnitudeHistogram):
        return x
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(
            f"x must be a tensor, an array or a MagnitudeHistogram, got {type(x).__name__}; "
            "fit_weights takes whole models, torch.tensor(x) makes a tensor of a list"
        )
    size = x.numel() if isinstance(x, Tensor) else x.size
    return MagnitudeHistogram.from_tensor(x, sums=False, exact=size <= SORTED)


def _note(sample: MagnitudeHistogram, k: float) -> str:
    notes = []
    distinct = len(sample.keys)
    if distinct == 0:
        notes.append("no non-zero finite magnitudes")
    elif distinct == 1:
        notes.append("all magnitudes are equal" + ("" if sample.exact else " to within 0.4 %"))
    elif math.isnan(k):
        notes.append("fewer than two distinct magnitudes in the trimmed range")
    elif distinct < FEW:
        notes.append(f"only {distinct} distinct magnitudes")
    if sample.n_nonfinite:
        notes.append(f"{sample.n_nonfinite} NaN or infinite values left out")
    return "; ".join(notes)


def _ks(sample: MagnitudeHistogram, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """sup |F_n − F| over the edges of the bins, both sides of each step."""
    low, high = sample.edges
    ends = sample.ends / sample.n
    starts = np.concatenate([[0.0], ends[:-1]])
    gap = 0.0
    for first in range(0, len(low), _BLOCK):
        block = slice(first, first + _BLOCK)
        below = cdf(low[block])
        above = below if sample.exact else cdf(high[block])
        gap = max(gap, np.abs(ends[block] - above).max(), np.abs(starts[block] - below).max())
    return float(gap)


_BLOCK = 1 << 14
"""Bins taken at a time where many arrays are made of them, which then stay in the cache."""


# The probability plot.


def _plotted(rank: Any, n: int) -> Any:
    """y = ln(−ln(1−F)) at F = rank/n; the i-th smallest magnitude has the rank i − ½."""
    return np.log(-np.log1p(-rank / n))


_ALL_SUMMED = 4096
_ENDS = 64


def _sums_of_y(ranks: np.ndarray, n: int) -> np.ndarray:
    """Σ y over the magnitudes up to each of `ranks` (integers, ascending), up to one constant.

    With t = −ln(1−F),  ∫ ln(−ln(1−F)) dF = −e^{−t} ln t − E₁(t),  and the midpoint rule's next term makes up
    for sums not being integrals: Σ y = n∫y dF − [y']/(24n). Neither holds at the ends, F → 0 and 1, where y
    has poles; there, and where n is small or most of the ranks are asked for, the sum is taken as it stands.
    """
    if n <= max(_ALL_SUMMED, 4 * len(ranks)):
        return (_all_sums_of_y if n <= SORTED else _all_sums_of_y.__wrapped__)(n)[ranks]
    inner = np.clip(ranks, _ENDS, n - _ENDS)
    t = -np.log1p(-inner / n)
    survival = 1 - inner / n
    sums = n * (-survival * np.log(t) - scipy.special.exp1(t)) - 1 / (24 * n * t * survival)
    if ranks[0] < _ENDS:
        head = np.concatenate([[0.0], np.cumsum(_plotted(np.arange(_ENDS) + 0.5, n))])
        sums += head[np.minimum(ranks, _ENDS)] - head[-1]
    if ranks[-1] > n - _ENDS:
        tail = np.concatenate([[0.0], np.cumsum(_plotted(n - _ENDS + np.arange(_ENDS) + 0.5, n))])
        sums += tail[np.maximum(ranks - (n - _ENDS), 0)]
    return sums


@lru_cache(maxsize=4)  # models have many matrices of a size
def _all_sums_of_y(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(_plotted(np.arange(n) + 0.5, n))])


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(64)


@lru_cache(maxsize=256)
def _sum_of_squared_y(first: int, last: int, n: int) -> float:
    """Σ y² over the magnitudes with ranks in (first, last]."""
    if n <= _ALL_SUMMED:
        return float(np.sum(_plotted(np.arange(first, last) + 0.5, n) ** 2))
    a, b = np.clip([first, last], _ENDS, n - _ENDS)
    ends = np.concatenate([np.arange(first, max(first, a)), np.arange(min(last, b), last)])
    total = float(np.sum(_plotted(ends + 0.5, n) ** 2))
    # dF = e^{y − e^y} dy makes the integrand smooth over the whole range.
    low, high = _plotted(a, n), _plotted(b, n)
    node, weight = _gauss_legendre()
    y = (low + high) / 2 + (high - low) / 2 * node
    total += n * (high - low) / 2 * float(np.sum(weight * y**2 * np.exp(y - np.exp(y))))
    slope = [2 * _plotted(i, n) / (-np.log1p(-i / n) * (1 - i / n)) for i in (a, b)]
    return total - (slope[1] - slope[0]) / (24 * n)


def _kept(n: int, trim: tuple[float, float]) -> tuple[int, int]:
    """How many magnitudes lie below the trim, and how many up to its upper end."""
    first, last = math.ceil(trim[0] * n - 0.5), math.floor(trim[1] * n + 0.5)
    # The products round; the protocol compares (i − ½)/n with the ends.
    first += -1 if (first - 0.5) / n >= trim[0] else 1 if (first + 0.5) / n < trim[0] else 0
    last += 1 if (last + 0.5) / n <= trim[1] else -1 if (last - 0.5) / n > trim[1] else 0
    return max(first, 0), min(last, n)


def _fit_plot(sample: MagnitudeHistogram, trim: tuple[float, float]) -> _Line:
    n = sample.n
    if n == 0:
        return _Line()
    first, last = _kept(n, trim)
    inside = slice(np.searchsorted(sample.ends, first, side="right"), np.searchsorted(sample.ends, last) + 1)
    ends, counts = sample.ends[inside], sample.counts[inside]
    if last <= first or len(counts) < 2:
        return _Line()
    ranks = np.concatenate([[first], np.minimum(ends, last)])
    m = np.diff(ranks)
    y = np.diff(_sums_of_y(ranks, n)) / m

    # Within a bin the plot is taken as straight: x follows from where y lies between the bin's edges.
    # A bin that the trim cuts keeps its slope.
    low, high = (edge[inside] for edge in sample.edges)
    x, size = np.log(low), last - first
    slope = slope_spread = 0.0
    if not sample.exact:
        edge = _plotted(np.clip([ends - counts, ends], 0.5, n - 0.5), n)
        slope = (np.log(high) - x) / np.maximum(edge[1] - edge[0], np.finfo(float).tiny)
        x += slope * (y - edge[0])
        slope_spread = slope * np.diff(_plotted(np.clip(ranks, 0.5, n - 0.5), n)) ** 2 / 12
    x_mean, y_mean = np.sum(m * x) / size, np.sum(m * y) / size  # no @: BLAS would wake its threads
    x -= x_mean
    y -= y_mean
    weighted = m * x
    xx, xy = np.einsum("i,i", weighted, x), np.einsum("i,i", weighted, y)
    if not sample.exact:
        xx += np.sum(m * slope * slope_spread)
        xy += np.sum((m - 1) * slope_spread)
    yy = _sum_of_squared_y(first, last, n) - size * y_mean**2
    k = float(xy / xx)
    return _Line(k, _exp(x_mean - y_mean / k), min(float(xy**2 / (xx * yy)), 1.0))


def _half_normal() -> _Line:
    """The line through the probability plot of a half-normal with σ = 1 (see `K0`)."""
    node, weight = _gauss_legendre()
    f = 0.5 + 0.4 * node  # [0.1, 0.9]
    x = np.log([NormalDist().inv_cdf((1 + each) / 2) for each in f])  # √2 erf⁻¹(F)
    y = np.log(-np.log1p(-f))
    x_mean, y_mean, xx, xy, yy = (np.sum(weight * v) / 2 for v in (x, y, x * x, x * y, y * y))
    xx, xy, yy = xx - x_mean**2, xy - x_mean * y_mean, yy - y_mean**2
    k = float(xy / xx)
    return _Line(k, math.exp(x_mean - y_mean / k), float(xy**2 / (xx * yy)))


K0 = _half_normal().k
"""k₀ = 1.20543: the k that the protocol gives to weights drawn from a normal law, as most are initialised.

In a large sample the regression's sums become averages over F, uniform in [0.1, 0.9]. A half-normal with σ = 1
has F(x) = erf(x/√2), so its plot is the curve x(F) = ln(√2 erf⁻¹(F)), y(F) = ln(−ln(1−F)), and

    k₀ = (⟨xy⟩ − ⟨x⟩⟨y⟩)/(⟨x²⟩ − ⟨x⟩²)        λ₀/σ = exp(⟨x⟩ − ⟨y⟩/k₀)

with ⟨·⟩ = ∫ · dF/0.8: integrals of analytic functions, which 64 Gauss-Legendre nodes give to rounding.
"""

LAM0 = _half_normal().lam
"""λ₀ = 0.88749: the same for λ in units of σ."""


# Likelihood and moments.


def _fit_likelihood(sample: MagnitudeHistogram) -> _Found:
    value, weight = sample.points()
    if len(sample.keys) < 2:
        return _Found()
    n = sample.n
    z = np.log(value)
    centre = np.sum(weight * z) / n
    z = z - centre
    k = math.pi / math.sqrt(6 * np.sum(weight * z**2) / n)  # the spread of ln x is π/(k√6)
    for _ in range(100):
        _, mean, variance = _under_power(k, z, weight)
        step = (1 / k - mean) / (1 / k**2 + variance)
        k += min(max(step, -k / 2), k)
        if abs(step) <= 1e-12 * k:
            break
    log_sum, mean, variance = _under_power(k, z, weight)
    log_lam = (log_sum - math.log(n)) / k
    lam = math.exp(centre + log_lam)
    # The information of (k, ln λ) is n·[[1/k² + c, −kb], [−kb, k²]] with b and c the first two moments of
    # ln(x/λ) under the weights x^k; its determinant is n²k²·curvature.
    curvature = 1 / k**2 + variance
    second = variance + (mean - log_lam) ** 2
    return _Found(
        k=k,
        lam=lam,
        k_se=1 / math.sqrt(n * curvature),
        lam_se=lam * math.sqrt((1 / k**2 + second) / (n * k**2 * curvature)),
    )


def _under_power(k: float, z: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
    """ln Σx^k, and mean and variance of z = ln x under weights proportional to x^k."""
    power = k * z
    top = power.max()
    with np.errstate(under="ignore"):
        share = weight * np.exp(power - top)
    total = np.sum(share)
    mean = np.sum(share * z) / total
    return float(top + math.log(total)), float(mean), float(np.sum(share * (z - mean) ** 2) / total)


def _fit_moments(sample: MagnitudeHistogram) -> _Found:
    if len(sample.keys) < 2:
        return _Found()
    value, weight = sample.points()
    top = value[-1]
    mean = np.sum(weight * (value / top)) / sample.n
    square = np.sum(weight * (value / top) ** 2) / sample.n
    # Γ(1 + 2u)/Γ(1 + u)² grows with u = 1/k from 1 on.
    target = math.log(square / mean**2)
    u = _root(
        lambda u: scipy.special.gammaln(1 + 2 * u) - 2 * scipy.special.gammaln(1 + u) - target, 1e-6, 1e3
    )
    return _Found(k=1 / u, lam=float(top * mean / math.exp(scipy.special.gammaln(1 + u))))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotone function crosses zero; the nearer end where it does not."""
    from scipy.optimize import brentq  # here, since it takes as long to import as the rest of scipy

    ends = function(low), function(high)
    if ends[0] * ends[1] > 0:
        return low if abs(ends[0]) < abs(ends[1]) else high
    return float(brentq(function, low, high, xtol=1e-300, rtol=1e-13))


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
    if law not in _CDF:
        raise ValueError(f"law must be one of {tuple(_CDF)}, got {law!r}")
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
    found = _fit_likelihood(sample)
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
                "ks": _ks(sample, lambda edge, on=(name, law.shape, law.scale): law_cdf(*on, edge / rms)),
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
    a = math.exp(_root(lambda t: gap - (t - scipy.special.digamma(math.exp(t))), -10.0, 15.0))
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
        root = math.exp(_root(score, math.log(low), math.log(high)))
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
