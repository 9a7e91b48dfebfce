"""Fits of a Weibull law to weight magnitudes: |w| ~ Weibull(k, λ), P(|w| ≤ x) = 1 − exp(−(x/λ)^k).

The published protocol is a least-squares line through the middle 80 % of the probability plot,

    ln(−ln(1 − F)) = k·ln x − k·ln λ,        F = (i − ½)/n for the i-th smallest of n magnitudes

Each bin of a `MagnitudeHistogram` is a run of consecutive ranks, and sums of ln(−ln(1 − F)) over ranks have a
closed form, so the whole regression is a few array operations on the bins that the trim leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import exp1
from torch import Tensor

from weightdyn.magnitudes import MagnitudeHistogram

Method = Literal["plot"]

SORTED = 1 << 19
"""Tensors and arrays up to this size are sorted, which is exact; larger ones are counted in bins."""

FEW = 50
"""Distinct magnitudes below which a fit is marked: a density says little about a handful of values."""


@dataclass(frozen=True)
class WeibullFit:
    """A Weibull law fitted to magnitudes.

    Attributes:
        k: shape; NaN where nothing could be fitted.
        lam: scale λ, in units of the weights; NaN where nothing could be fitted.
        r_squared: squared correlation of ln x and ln(−ln(1−F)) in the trimmed probability plot.
        ks: Kolmogorov-Smirnov distance between the law and the whole sample, not only the trimmed part.
        n: number of non-zero finite magnitudes in the sample.
        method: how it was fitted.
        trim: the range of F that the probability plot used.
        note: empty, or what makes the fit doubtful or impossible.
    """

    k: float
    lam: float
    r_squared: float
    ks: float
    n: int
    method: Method = "plot"
    trim: tuple[float, float] = (0.1, 0.9)
    note: str = ""


class _Bins(NamedTuple):
    """A sorted sample in runs: edges of each bin (equal where it is one magnitude) and its count."""

    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    n_nonfinite: int

    @property
    def n(self) -> int:
        return int(self.counts.sum())


def fit_weibull(
    x: Tensor | np.ndarray | MagnitudeHistogram,
    method: Method = "plot",
    trim: tuple[float, float] = (0.1, 0.9),
) -> WeibullFit:
    """Fit a Weibull law to the magnitudes of a tensor, array or histogram.

    Args:
        x: weights of any shape and device, or the histogram of their magnitudes. Zeros and non-finite values
            are left out. Up to 524,288 weights are sorted; more of them in float32 or float64, like a
            histogram, are taken in bins 0.4 % wide, which moves k by less than 1e-5 at that size.
        method: "plot", the published protocol: ordinary least squares of ln(−ln(1−F)) on ln x over the sorted
            magnitudes with F = (i−½)/n in `trim`.
        trim: the range of F that is used, both ends included.

    Returns:
        A `WeibullFit`. A sample without two distinct magnitudes in the trim gives NaN for k and λ, and a
        note; one with fewer than 50 distinct magnitudes is fitted and noted.

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
    if method != "plot":
        raise ValueError(f"method must be 'plot', got {method!r}")
    low, high = _check_trim(trim)
    bins = _bins_of(x)
    fit = _fit_plot(bins, (low, high))
    return replace(fit, ks=_ks(bins, fit.k, fit.lam), note=_note(bins, fit))


def _check_trim(trim: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in trim)
    except (TypeError, ValueError):
        low = high = np.nan
    if not 0 <= low < high <= 1:
        raise ValueError(f"trim must be a pair (low, high) with 0 <= low < high <= 1, got {trim!r}")
    return low, high


def _bins_of(x: Tensor | np.ndarray | MagnitudeHistogram) -> _Bins:
    if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() > 2 and x.numel() <= SORTED:
        x = x.detach().cpu().numpy()
    if isinstance(x, np.ndarray) and x.dtype.kind == "f" and 2 < x.itemsize <= 8 and x.size <= SORTED:
        magnitude = np.abs(x.ravel())
        finite = magnitude[np.isfinite(magnitude)]
        value, counts = np.unique(finite[finite > 0], return_counts=True)
        value = value.astype(np.float64)
        return _Bins(value, value, counts, magnitude.size - finite.size)
    histogram = x if isinstance(x, MagnitudeHistogram) else MagnitudeHistogram.from_tensor(x, sums=False)
    return _Bins(*histogram.edges, histogram.counts, histogram.n_nonfinite)


def _note(bins: _Bins, fit: WeibullFit) -> str:
    notes = []
    distinct = len(bins.counts)
    if distinct == 0:
        notes.append("no non-zero finite magnitudes")
    elif distinct == 1:
        notes.append("all magnitudes are equal" + ("" if bins.high is bins.low else " to within 0.4 %"))
    elif np.isnan(fit.k):
        notes.append("fewer than two distinct magnitudes in the trimmed range")
    elif distinct < FEW:
        notes.append(f"only {distinct} distinct magnitudes")
    if bins.n_nonfinite:
        notes.append(f"{bins.n_nonfinite} NaN or infinite values left out")
    return "; ".join(notes)


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
        return np.concatenate([[0.0], np.cumsum(_plotted(np.arange(n) + 0.5, n))])[ranks]
    inner = np.clip(ranks, _ENDS, n - _ENDS)
    t = -np.log1p(-inner / n)
    survival = 1 - inner / n
    sums = n * (-survival * np.log(t) - exp1(t)) - 1 / (24 * n * t * survival)
    if ranks[0] < _ENDS:
        head = np.concatenate([[0.0], np.cumsum(_plotted(np.arange(_ENDS) + 0.5, n))])
        sums += head[np.minimum(ranks, _ENDS)] - head[-1]
    if ranks[-1] > n - _ENDS:
        tail = np.concatenate([[0.0], np.cumsum(_plotted(n - _ENDS + np.arange(_ENDS) + 0.5, n))])
        sums += tail[np.maximum(ranks - (n - _ENDS), 0)]
    return sums


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
    first, last = int(np.ceil(trim[0] * n - 0.5)), int(np.floor(trim[1] * n + 0.5))
    # The products round; the protocol compares (i − ½)/n with the ends.
    first += -1 if (first - 0.5) / n >= trim[0] else 1 if (first + 0.5) / n < trim[0] else 0
    last += 1 if (last + 0.5) / n <= trim[1] else -1 if (last - 0.5) / n > trim[1] else 0
    return max(first, 0), min(last, n)


def _fit_plot(bins: _Bins, trim: tuple[float, float]) -> WeibullFit:
    n = bins.n
    nothing = WeibullFit(np.nan, np.nan, np.nan, np.nan, n, "plot", trim)
    if n == 0:
        return nothing
    first, last = _kept(n, trim)
    ends = np.cumsum(bins.counts)
    inside = slice(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last) + 1)
    low, high, ends, counts = bins.low[inside], bins.high[inside], ends[inside], bins.counts[inside]
    if last <= first or len(counts) < 2:
        return nothing
    ranks = np.concatenate([[first], np.minimum(ends, last)])
    m = np.diff(ranks)
    y = np.diff(_sums_of_y(ranks, n)) / m

    # Within a bin the plot is taken as straight: x follows from where y lies between the bin's edges.
    # A bin that the trim cuts keeps its slope.
    x = np.log(low)
    slope = np.zeros_like(x)
    spread = np.zeros_like(x)
    if high is not low:
        edge = _plotted(np.clip([ends - counts, ends], 0.5, n - 0.5), n)
        slope = (np.log(high) - x) / np.maximum(edge[1] - edge[0], np.finfo(float).tiny)
        x = x + slope * (y - edge[0])
        cut = _plotted(np.clip(ranks, 0.5, n - 0.5), n)
        spread = np.diff(cut) ** 2 / 12

    size = last - first
    x_mean, y_mean = np.sum(m * x) / size, np.sum(m * y) / size  # no @: BLAS would wake its threads
    dx, dy = x - x_mean, y - y_mean
    xx = np.sum(m * (dx**2 + slope**2 * spread))
    xy = np.sum(m * dx * dy + (m - 1) * slope * spread)
    yy = _sum_of_squared_y(first, last, n) - size * y_mean**2
    k = xy / xx
    return replace(
        nothing,
        k=float(k),
        lam=float(np.exp(x_mean - y_mean / k)),
        r_squared=float(min(xy**2 / (xx * yy), 1.0)),
    )


def _ks(bins: _Bins, k: float, lam: float) -> float:
    """sup |F_n − F| over the edges of the bins, both sides of each step."""
    if np.isnan(k):
        return np.nan
    ends = np.cumsum(bins.counts)
    n = ends[-1]
    with np.errstate(over="ignore", under="ignore"):
        below = -np.expm1(-((bins.low / lam) ** k))
        above = below if bins.high is bins.low else -np.expm1(-((bins.high / lam) ** k))
    gap = np.maximum(np.abs(ends / n - above), np.abs((ends - bins.counts) / n - below))
    return float(gap.max())
