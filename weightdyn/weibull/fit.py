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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy
import torch
from torch import Tensor

from weightdyn.core.checks import check_choice
from weightdyn.weibull.magnitudes import MagnitudeHistogram

Method = Literal["plot", "mle", "moments"]

SORTED = 1 << 18
"""Tensors and arrays up to this size are sorted, which is exact; larger ones are counted in bins where these do."""

FINE = 256
"""Bins that the trimmed range must span for their 0.4 % not to matter: as many as a law with k = 4.5 spans."""

FEW = 50
"""Distinct magnitudes below which a fit is marked: a density says little about a handful of values."""


@dataclass(frozen=True)
class WeibullFit:
    """A Weibull law fitted to magnitudes.

    Attributes:
        lam: scale λ, in units of the weights; NaN where nothing could be fitted.
        k: shape; NaN where nothing could be fitted.
        r_squared: squared correlation of ln x and ln(−ln(1−F)) in the trimmed probability plot: how straight
            the plot is, whatever the method.
        ks: Kolmogorov-Smirnov distance between the law and the whole sample, not only the trimmed part.
        n: number of non-zero finite magnitudes in the sample.
        method: how it was fitted.
        trim: the range of F that the probability plot used.
        note: empty, or what makes the fit doubtful or impossible.
        lam_se: standard error of λ, from the observed information; NaN for other methods than "mle".
        k_se: that of k.
    """

    lam: float
    k: float
    r_squared: float
    ks: float
    n: int
    method: Method = "plot"
    trim: tuple[float, float] = (0.1, 0.9)
    note: str = ""
    lam_se: float = math.nan
    k_se: float = math.nan

    def __repr__(self) -> str:
        shown = {"lam": f"{self.lam:.6g}", "k": f"{self.k:.6g}"}
        if self.method == "mle":
            shown |= {"lam_se": f"{self.lam_se:.2g}", "k_se": f"{self.k_se:.2g}"}
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
            are left out. Up to 262,144 weights are sorted. More of them in float32 or float64 are counted in
            bins 0.4 % wide, which moves λ by less than 1e-5 of itself and k by less than 1e-5; but those that
            bins would blur are sorted too: values that repeat, as on the grid of a quantised tensor, that lie
            close together (k above 4.5), or among the subnormals. Of a histogram that is too coarse for its
            sample a note tells.
        method: how λ and k are found.
            "plot", the published protocol: ordinary least squares of ln(−ln(1−F)) on ln x over the sorted
            magnitudes with F = (i−½)/n in `trim`.
            "mle": maximum likelihood over the whole sample. λ^k = Σx^k/n leaves one concave function of k,
            n ln k − n ln Σx^k + (k−1)Σ ln x, and Newton's method finds its top.
            "moments": the law whose mean and mean square are the sample's.
        trim: the range of F that the probability plot uses, both ends included.

    Returns:
        A `WeibullFit`. A sample without two distinct magnitudes (for "plot", in the trim) gives NaN for λ and
        k, and a note; one with fewer than 50 distinct magnitudes is fitted and noted.

    Raises:
        TypeError: x is no tensor, array or histogram, or not of a float type.
        ValueError: unknown method, or a trim that is no range within [0, 1].

    Source: arXiv 2606.19367 and 2605.18898, the probability-plot protocol on the middle 80 %.

    >>> import torch
    >>> x = 0.02 * (-torch.log1p(-(torch.arange(1000) + 0.5) / 1000)) ** (1 / 1.2)
    >>> fit = fit_weibull(x)
    >>> round(fit.lam, 6), round(fit.k, 5)
    (0.02, 1.2)
    """
    check_choice("method", method, get_args(Method))
    low, high = _check_trim(trim)
    sample = as_histogram(x, (low, high))
    line = _fit_plot(sample, (low, high))
    if method == "plot":
        found = Found(line.lam, line.k)
    else:
        found = fit_likelihood(sample) if method == "mle" else _fit_moments(sample)
    fit = WeibullFit(
        lam=found.lam,
        k=found.k,
        r_squared=line.r_squared,
        ks=math.nan,
        n=sample.n,
        method=method,
        trim=(low, high),
        note=_note(sample, found.k, (low, high)),
        lam_se=found.lam_se,
        k_se=found.k_se,
    )
    return fit if math.isnan(fit.k) else replace(fit, ks=ks_distance(sample, fit.cdf))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


class Found(NamedTuple):
    """Parameters of a law, and their standard errors where these are known."""

    lam: float = math.nan
    k: float = math.nan
    lam_se: float = math.nan
    k_se: float = math.nan


class _Line(NamedTuple):
    lam: float = math.nan
    k: float = math.nan
    r_squared: float = math.nan


def _check_trim(trim: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in trim)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise ValueError(f"trim must be a pair (low, high) with 0 <= low < high <= 1, got {trim!r}")
    return low, high


def as_histogram(
    x: Tensor | np.ndarray | MagnitudeHistogram, trim: tuple[float, float] = (0.1, 0.9), *, sums: bool = False
) -> MagnitudeHistogram:
    """The histogram that fits take of x: in bins, or exact where bins would blur it.

    Args:
        x: weights, or a histogram, which is returned as it is.
        trim: the range of F for which the bins have to do.
        sums: as in `MagnitudeHistogram.from_tensor`.

    Returns:
        An exact histogram of up to `SORTED` weights, and of more whose values repeat, or lie so close together
        that fewer than `FINE` bins span the trim. In bins otherwise.

    Raises:
        TypeError: x is no tensor, array or histogram, or not of a float type.
    """
    if isinstance(x, MagnitudeHistogram):
        return x
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(
            f"x must be a tensor, an array or a MagnitudeHistogram, got {type(x).__name__}; "
            "fit_weights takes whole models, torch.tensor(x) makes a tensor of a list"
        )
    size = x.numel() if isinstance(x, Tensor) else x.size
    if size > SORTED:
        if not _repeats(x):
            counted = MagnitudeHistogram.from_tensor(x, sums=sums)
            if counted.exact or not is_coarse(counted, trim):
                return counted
        elif isinstance(x, Tensor):
            short = (x.to(dtype) for dtype in (torch.bfloat16, torch.float16))  # exact without being sorted
            x = next((each for each in short if torch.equal(each.to(x.dtype), x)), x)
    return MagnitudeHistogram.from_tensor(x, sums=sums, exact=True)


def _repeats(x: Tensor | np.ndarray) -> bool:
    """Whether more than 0.5 % of a few thousand magnitudes, zeros left out, have an equal among them.

    Of float32 weights off a grid about 0.03 % have. On a grid so fine that fewer than these repeat, and with
    fewer than these on one value, bins do no harm.
    """
    if isinstance(x, Tensor):
        counted = x.layout == torch.strided and not x.is_meta and x.is_floating_point() and x.itemsize > 2
    else:
        counted = x.dtype.kind == "f" and x.dtype.itemsize > 2
    if not counted:
        return False  # the histogram refuses it, or is exact anyway
    some = np.linspace(0, math.prod(x.shape) - 1, _LOOKED_AT).astype(np.int64)
    where = np.unravel_index(some, x.shape)
    if isinstance(x, Tensor):
        value = x.detach()[tuple(torch.from_numpy(each).to(x.device) for each in where)].cpu().numpy()
    else:
        value = x[where]
    value = np.abs(value[np.isfinite(value) & (value != 0)])
    return len(value) - len(np.unique(value)) > 0.005 * len(value)


_LOOKED_AT = 1 << 14


def is_coarse(sample: MagnitudeHistogram, trim: tuple[float, float] = (0.1, 0.9)) -> bool:
    """Whether the bins of a histogram are too wide for the sample in them, or it lies on a grid in them."""
    if sample.exact or sample.n == 0:
        return False

    def reach(trim: tuple[float, float]) -> tuple[int, int]:
        """How many bins hold weights in the trim, and how many lie there."""
        ends = np.asarray(_kept(sample.n, trim)).clip(0, sample.n - 1)
        first, last = np.searchsorted(sample.ends, ends, "right")
        return int(last - first) + 1, int(sample.keys[last] - sample.keys[first]) + 1

    held, spanned = reach((0.1, 0.9))
    # Where each bin has tens of weights by right, an empty one tells that they lie on a grid.
    return reach(trim)[1] < FINE or (held < 0.99 * spanned and sample.n > 25 * spanned)


def _note(sample: MagnitudeHistogram, k: float, trim: tuple[float, float]) -> str:
    notes = []
    distinct = len(sample.keys)
    if distinct == 0:
        notes.append("no non-zero finite magnitudes")
    elif distinct == 1:
        notes.append("all magnitudes are equal" + ("" if sample.exact else " to within 0.4 %"))
    elif math.isnan(k):
        notes.append("fewer than two distinct magnitudes in the trimmed range")
    elif is_coarse(sample, trim):
        notes.append("bins of 0.4 % are too coarse for these magnitudes")
    elif distinct < FEW:
        notes.append(f"only {distinct} distinct magnitudes")
    if sample.n_nonfinite:
        notes.append(f"{sample.n_nonfinite} NaN or infinite values left out")
    return "; ".join(notes)


def ks_distance(sample: MagnitudeHistogram, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
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


def cloglog(fraction: Any) -> Any:
    """ln(−ln(1−F)), the ordinate of Weibull paper: there the law is the line k·ln x − k·ln λ.

    Args:
        fraction: F in (0, 1), a number or an array; (i − ½)/n for the i-th smallest of n magnitudes.

    >>> cloglog(np.array([0.1, 0.5, 0.9])).round(4).tolist()
    [-2.2504, -0.3665, 0.834]
    """
    return np.log(-np.log1p(-fraction))


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
        head = np.concatenate([[0.0], np.cumsum(cloglog((np.arange(_ENDS) + 0.5) / n))])
        sums += head[np.minimum(ranks, _ENDS)] - head[-1]
    if ranks[-1] > n - _ENDS:
        tail = np.concatenate([[0.0], np.cumsum(cloglog((n - _ENDS + np.arange(_ENDS) + 0.5) / n))])
        sums += tail[np.maximum(ranks - (n - _ENDS), 0)]
    return sums


@lru_cache(maxsize=4)  # models have many matrices of a size
def _all_sums_of_y(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(cloglog((np.arange(n) + 0.5) / n))])


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(64)


@lru_cache(maxsize=256)
def _sum_of_squared_y(first: int, last: int, n: int) -> float:
    """Σ y² over the magnitudes with ranks in (first, last]."""
    if n <= _ALL_SUMMED:
        return float(np.sum(cloglog((np.arange(first, last) + 0.5) / n) ** 2))
    a, b = np.clip([first, last], _ENDS, n - _ENDS)
    ends = np.concatenate([np.arange(first, max(first, a)), np.arange(min(last, b), last)])
    total = float(np.sum(cloglog((ends + 0.5) / n) ** 2))
    # dF = e^{y − e^y} dy makes the integrand smooth over the whole range.
    low, high = cloglog(a / n), cloglog(b / n)
    node, weight = _gauss_legendre()
    y = (low + high) / 2 + (high - low) / 2 * node
    total += n * (high - low) / 2 * float(np.sum(weight * y**2 * np.exp(y - np.exp(y))))
    slope = [2 * cloglog(i / n) / (-np.log1p(-i / n) * (1 - i / n)) for i in (a, b)]
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
        edge = cloglog(np.clip([ends - counts, ends], 0.5, n - 0.5) / n)
        slope = (np.log(high) - x) / np.maximum(edge[1] - edge[0], np.finfo(float).tiny)
        x += slope * (y - edge[0])
        slope_spread = slope * np.diff(cloglog(np.clip(ranks, 0.5, n - 0.5) / n)) ** 2 / 12
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
    return _Line(_exp(x_mean - y_mean / k), k, min(float(xy**2 / (xx * yy)), 1.0))


def _half_normal() -> _Line:
    """The line through the probability plot of a half-normal with σ = 1 (see `K0`)."""
    node, weight = _gauss_legendre()
    f = 0.5 + 0.4 * node  # [0.1, 0.9]
    x = np.log([NormalDist().inv_cdf((1 + each) / 2) for each in f])  # √2 erf⁻¹(F)
    y = cloglog(f)
    x_mean, y_mean, xx, xy, yy = (np.sum(weight * v) / 2 for v in (x, y, x * x, x * y, y * y))
    xx, xy, yy = xx - x_mean**2, xy - x_mean * y_mean, yy - y_mean**2
    k = float(xy / xx)
    return _Line(math.exp(x_mean - y_mean / k), k, float(xy**2 / (xx * yy)))


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


def fit_likelihood(sample: MagnitudeHistogram) -> Found:
    """λ and k of the greatest likelihood, and their standard errors; NaN for fewer than two magnitudes."""
    value, weight = sample.points()
    if len(sample.keys) < 2:
        return Found()
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
    return Found(
        lam=lam,
        k=k,
        lam_se=lam * math.sqrt((1 / k**2 + second) / (n * k**2 * curvature)),
        k_se=1 / math.sqrt(n * curvature),
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


def _fit_moments(sample: MagnitudeHistogram) -> Found:
    if len(sample.keys) < 2:
        return Found()
    value, weight = sample.points()
    top = value[-1]
    mean = np.sum(weight * (value / top)) / sample.n
    square = np.sum(weight * (value / top) ** 2) / sample.n
    # Γ(1 + 2u)/Γ(1 + u)² grows with u = 1/k from 1 on.
    target = math.log(square / mean**2)
    u = find_root(
        lambda u: scipy.special.gammaln(1 + 2 * u) - 2 * scipy.special.gammaln(1 + u) - target, 1e-6, 1e3
    )
    return Found(lam=float(top * mean / math.exp(scipy.special.gammaln(1 + u))), k=1 / u)


def find_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotone function crosses zero; the nearer end where it does not."""
    from scipy.optimize import brentq  # here, since it takes as long to import as the rest of scipy

    ends = function(low), function(high)
    if ends[0] * ends[1] > 0:
        return low if abs(ends[0]) < abs(ends[1]) else high
    return float(brentq(function, low, high, xtol=1e-300, rtol=1e-13))
