import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from weightdyn.weibull import fit as weibull
from weightdyn.weibull.diagnosis import classify
from weightdyn.weibull.fit import K0, LAM0, fit_weibull
from weightdyn.weibull.laws import TIE, law_cdf, rank_laws, tails
from weightdyn.weibull.magnitudes import MagnitudeHistogram, count_magnitudes


def protocol(x, trim=(0.1, 0.9)):
    """The published protocol, by sorting, in float64: k, λ and R²."""
    a = np.sort(np.abs(np.asarray(x, dtype=np.float64).ravel()))
    a = a[(a > 0) & np.isfinite(a)]
    rank = (np.arange(1, len(a) + 1) - 0.5) / len(a)
    kept = (rank >= trim[0]) & (rank <= trim[1])
    line = stats.linregress(np.log(a[kept]), np.log(-np.log1p(-rank[kept])))
    return line.slope, math.exp(-line.intercept / line.slope), line.rvalue**2


def distance(x, k, lam):
    """Kolmogorov-Smirnov distance of a Weibull law, by scipy."""
    return stats.kstest(np.asarray(x, dtype=np.float64), stats.weibull_min(k, scale=lam).cdf).statistic


def weights(n, law="normal", scale=0.02, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if law == "normal":
        x = torch.randn(n, generator=generator, dtype=torch.float64)
    elif law == "uniform":
        x = torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1
    else:
        x = (-torch.log1p(-torch.rand(n, generator=generator, dtype=torch.float64))) ** (1 / float(law))
    return (x * scale).to(dtype)


# The published protocol.


@pytest.mark.parametrize("law", ["normal", "uniform", "0.5", "1.2"])
@pytest.mark.parametrize("scale", [1e-12, 3e-4, 0.02, 1.0, 1e6])
def test_counted_float32_weights_give_the_sorted_fit(law, scale):
    x = weights(1 << 20, law, scale)
    fit = fit_weibull(x)
    k, lam, r_squared = protocol(x)
    assert abs(fit.k - k) <= 1e-5
    assert abs(fit.lam / lam - 1) <= 1e-5
    assert abs(fit.r_squared - r_squared) <= 1e-5
    assert fit.n == x.numel()


def test_samples_just_too_large_to_be_sorted_are_counted_to_the_same_fit():
    for law in ("normal", "uniform", "0.5"):
        for seed in range(4):
            x = weights(weibull.SORTED + 1, law, seed=seed)
            k, lam, _ = protocol(x)
            fit = fit_weibull(x)
            assert abs(fit.k - k) <= 1e-5
            assert abs(fit.lam / lam - 1) <= 1e-5


def test_float64_weights_are_counted_alike():
    x = weights(600_000, dtype=torch.float64, scale=1e-150)
    k, lam, _ = protocol(x)
    assert abs(fit_weibull(x).k - k) <= 1e-5
    assert abs(fit_weibull(x).lam / lam - 1) <= 1e-5


def quantised(levels, dtype=torch.float32):
    """Normal weights rounded to a grid on which their standard deviation has so many steps."""
    return ((weights(1 << 22, scale=1.0, dtype=torch.float64) * levels).round() * (0.02 / levels)).to(dtype)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: quantised(42), id="int8 by the largest"),
        pytest.param(lambda: quantised(42, torch.float64), id="int8 in float64"),
        pytest.param(lambda: quantised(300), id="a grid of 1,300"),
        pytest.param(lambda: quantised(1e4), id="int16"),
        pytest.param(lambda: weights(1 << 22, dtype=torch.bfloat16).float(), id="bfloat16 in float32"),
        pytest.param(lambda: weights(1 << 22, dtype=torch.float16).float(), id="float16 in float32"),
        pytest.param(lambda: weights(1 << 22, dtype=torch.float16).float().numpy(), id="float16 in an array"),
        pytest.param(lambda: weights(1 << 22, scale=1e-38), id="half of them subnormal"),
        pytest.param(lambda: weights(1 << 22, scale=1e-40), id="subnormal"),
        pytest.param(lambda: weights(1 << 22, scale=1e-310, dtype=torch.float64), id="subnormal in float64"),
        pytest.param(
            lambda: torch.cat([weights(4_000_000), torch.full((200_000,), 0.02)]),
            id="one weight in 21 is equal",
        ),
        pytest.param(
            lambda: torch.cat([quantised(42), torch.zeros(1 << 24)]).reshape(-1, 4096).t(), id="pruned"
        ),
    ],
)
def test_weights_on_a_grid_and_subnormal_ones_give_the_sorted_fit(make):
    x = make()
    fit = fit_weibull(x)
    k, lam, r_squared = protocol(x)
    assert abs(fit.k - k) <= 1e-5
    assert abs(fit.lam / lam - 1) <= 1e-5
    assert abs(fit.r_squared - r_squared) <= 1e-5
    assert "coarse" not in fit.note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormals_of_short_types_are_exact(dtype):
    x = weights(1 << 20, scale=torch.finfo(dtype).smallest_normal / 8, dtype=dtype)
    k, lam, _ = protocol(x.double())
    assert abs(fit_weibull(x).k - k) <= 1e-9
    assert abs(fit_weibull(x).lam / lam - 1) <= 1e-9


@pytest.mark.parametrize("shape", [3, 5, 20, 1000])
def test_weights_in_a_narrow_range_give_the_sorted_fit(shape):
    x = weights(1 << 22, str(shape), scale=1.0)
    k, lam, _ = protocol(x)
    assert abs(fit_weibull(x).k / k - 1) <= 1e-5
    assert abs(fit_weibull(x).lam / lam - 1) <= 1e-5


def test_a_histogram_that_blurs_its_sample_says_so():
    for x in (quantised(42), weights(1 << 20, "20"), weights(1 << 20, scale=1e-40)):
        assert "bins of 0.4 % are too coarse" in fit_weibull(MagnitudeHistogram.from_tensor(x)).note
    for law in ("normal", "0.5", "1.2", "3"):
        for trim in ((0.1, 0.9), (0, 1)):
            for n in (3000, 1 << 18, 1 << 22):
                assert fit_weibull(MagnitudeHistogram.from_tensor(weights(n, law)), trim=trim).note == ""


def test_only_what_bins_would_blur_is_sorted(monkeypatch):
    sorts = []
    unique = np.unique
    monkeypatch.setattr(np, "unique", lambda x, **options: sorts.append(len(x)) or unique(x, **options))
    for law in ("normal", "uniform", "0.5", "1.2", "3"):
        fit_weibull(weights(1 << 22, law))
    assert max(sorts) <= 1 << 14
    fit_weibull(quantised(42))
    assert max(sorts) == 1 << 22


@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.bfloat16, [1e-12, 0.02, 1e6]), (torch.float16, [0.02, 1.0, 1e3])]
)
@pytest.mark.parametrize("law", ["normal", "0.8"])
def test_bfloat16_and_float16_are_exact(dtype, scales, law):
    for scale in scales:
        x = weights(600_000, law, scale, dtype)
        fit = fit_weibull(x)
        k, lam, r_squared = protocol(x.double())
        assert abs(fit.k - k) <= 1e-9
        assert abs(fit.lam / lam - 1) <= 1e-9
        assert abs(fit.r_squared - r_squared) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [50, 4095, 4097, 30_000])
def test_small_samples_are_exact_in_every_number(dtype, n):
    x = weights(n, dtype=dtype)
    x = x[x != 0]
    fit = fit_weibull(x)
    np.testing.assert_allclose([fit.k, fit.lam, fit.r_squared], protocol(x.double()), rtol=1e-10)
    assert fit.ks == pytest.approx(distance(x.double().abs(), fit.k, fit.lam), rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 200), min_size=4, max_size=120),
    st.sampled_from([(0.1, 0.9), (0.0, 1.0), (0.25, 0.5), (0.05, 0.95)]),
)
def test_ties_and_every_trim_are_exact(levels, trim):
    x = np.array(levels) / 64
    fit = fit_weibull(x, trim=trim)
    rank = (np.arange(1, len(x) + 1) - 0.5) / len(x)
    kept = np.sort(x)[(rank >= trim[0]) & (rank <= trim[1])]
    if len(np.unique(kept)) < 2:
        assert math.isnan(fit.k)
        assert "distinct" in fit.note or "equal" in fit.note
    else:
        np.testing.assert_allclose([fit.k, fit.lam, fit.r_squared], protocol(x, trim), rtol=1e-9)


@pytest.mark.parametrize("trim", [(0, 1), (0.001, 0.999), (0.3, 0.35)])
def test_large_samples_take_any_trim(trim):
    x = weights(600_000, "1.2", dtype=torch.bfloat16)
    fit = fit_weibull(x, trim=trim)
    np.testing.assert_allclose([fit.k, fit.lam, fit.r_squared], protocol(x.double(), trim), rtol=1e-9)


def test_an_exact_law_is_found_again():
    for k in (0.5, 1.2, 4.0):
        x = stats.weibull_min(k, scale=3.0).ppf((np.arange(10_000) + 0.5) / 10_000)
        for method in ("plot", "mle", "moments"):
            fit = fit_weibull(x, method)
            assert fit.k == pytest.approx(k, rel=0.01)
            assert fit.lam == pytest.approx(3.0, rel=0.01)
        assert fit_weibull(x).k == pytest.approx(k, rel=1e-9)


def test_a_histogram_of_counts_from_training_gives_the_same_fit():
    x = weights(1 << 20)
    later = MagnitudeHistogram.from_counts(count_magnitudes(x), x.dtype)
    assert fit_weibull(later) == fit_weibull(x)
    small = x[:50_000]
    binned, exact = fit_weibull(MagnitudeHistogram.from_tensor(small)), fit_weibull(small)
    assert binned.k == pytest.approx(exact.k, abs=1e-4)
    assert binned.ks == pytest.approx(exact.ks, abs=1e-3)


def test_shape_strides_and_gradient_do_not_matter():
    x = weights(6000).reshape(60, 100)
    fit = fit_weibull(x)
    assert fit_weibull(torch.nn.Parameter(x).t()) == fit
    assert fit_weibull(x.numpy()[::-1, ::-1]) == fit
    assert fit_weibull(-x) == fit


def test_zeros_are_left_out():
    x = weights(20_000)
    padded = torch.cat([x, torch.zeros(30_000)])
    assert fit_weibull(padded) == fit_weibull(x)


# The anchors of a normal initialisation.


def test_the_anchors_have_their_published_digits():
    assert round(K0, 5) == 1.20543
    assert round(LAM0, 5) == 0.88749


def test_the_anchors_are_the_integrals_that_scipy_finds():
    def mean(function):
        value = integrate.quad(lambda f: function(stats.halfnorm.ppf(f), f), 0.1, 0.9, epsabs=1e-13)[0]
        return value / 0.8

    x = mean(lambda q, f: math.log(q))
    y = mean(lambda q, f: math.log(-math.log1p(-f)))
    xx = mean(lambda q, f: math.log(q) ** 2)
    xy = mean(lambda q, f: math.log(q) * math.log(-math.log1p(-f)))
    k = (xy - x * y) / (xx - x * x)
    assert pytest.approx(k, rel=1e-10) == K0
    assert pytest.approx(math.exp(x - y / k), rel=1e-10) == LAM0


def test_ten_million_normal_weights_lie_within_three_standard_errors_of_the_anchors():
    fits = [fit_weibull(weights(500_000, scale=1.0, seed=seed, dtype=torch.bfloat16)) for seed in range(4)]
    fits += [fit_weibull(torch.randn(1 << 20, generator=torch.Generator().manual_seed(s))) for s in range(8)]
    assert sum(fit.n for fit in fits) > 1e7
    for name, anchor in (("k", K0), ("lam", LAM0)):
        found = np.array([getattr(fit, name) for fit in fits])
        mean = np.average(found, weights=[fit.n for fit in fits])
        assert abs(mean - anchor) <= 3 * found.std(ddof=1) / math.sqrt(len(fits))
        assert found.std() < 0.003


# Maximum likelihood and moments.


@pytest.mark.parametrize("k", [0.7, 1.2, 3.0])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 50.0])
def test_the_likelihood_fit_is_at_least_as_likely_as_scipys(k, scale):
    x = weights(20_000, str(k), scale, torch.float64).numpy()
    fit = fit_weibull(x, "mle")
    shape, _, lam = stats.weibull_min.fit(x, floc=0)
    assert fit.k == pytest.approx(shape, abs=1e-4)
    assert fit.lam == pytest.approx(lam, rel=1e-3)
    theirs = stats.weibull_min.logpdf(x, shape, scale=lam).sum()
    ours = stats.weibull_min.logpdf(x, fit.k, scale=fit.lam).sum()
    assert ours >= theirs - 1e-9 * abs(theirs)
    assert fit.log_likelihood(x) == pytest.approx(ours, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_the_likelihood_fit_and_its_standard_errors_are_those_of_lifelines():
    lifelines = pytest.importorskip("lifelines")
    for k in (0.7, 1.2, 2.0):
        x = weights(20_000, str(k), 1.5, torch.float64).numpy()
        fit, theirs = fit_weibull(x, "mle"), lifelines.WeibullFitter().fit(x)
        assert fit.k == pytest.approx(theirs.rho_, abs=1e-4)
        assert fit.lam == pytest.approx(theirs.lambda_, rel=1e-4)
        assert fit.log_likelihood(x) >= theirs.log_likelihood_ - 1e-6
        errors = theirs.summary["se(coef)"]
        assert fit.k_se == pytest.approx(errors["rho_"], rel=1e-3)
        assert fit.lam_se == pytest.approx(errors["lambda_"], rel=1e-3)


def test_binned_weights_give_the_likelihood_fit_of_the_sorted_ones():
    x = weights(1 << 20, "1.2")
    binned = fit_weibull(x, "mle")
    exact = fit_weibull(MagnitudeHistogram.from_tensor(x, exact=True), "mle")
    assert abs(binned.k - exact.k) <= 1e-5
    assert abs(binned.lam / exact.lam - 1) <= 1e-5
    assert exact.log_likelihood(x) == pytest.approx(binned.log_likelihood(x), rel=1e-7)


def test_standard_errors_are_the_spread_of_repeated_fits():
    fits = [fit_weibull(weights(1000, "1.2", seed=seed), "mle") for seed in range(300)]
    for name, error in (("k", "k_se"), ("lam", "lam_se")):
        spread = np.std([getattr(fit, name) for fit in fits])
        assert np.mean([getattr(fit, error) for fit in fits]) == pytest.approx(spread, rel=0.15)


def test_the_moment_fit_has_the_mean_and_the_mean_square_of_the_sample():
    for law in ("normal", "0.6", "uniform"):
        x = weights(20_000, law, dtype=torch.float64)
        fit = fit_weibull(x, "moments")
        assert fit.mean == pytest.approx(float(x.abs().mean()), rel=1e-9)
        assert fit.rms == pytest.approx(float((x**2).mean().sqrt()), rel=1e-9)
    large = weights(1 << 20)
    binned = fit_weibull(MagnitudeHistogram.from_tensor(large, sums=False), "moments")
    assert binned.k == pytest.approx(fit_weibull(large.double(), "moments").k, rel=1e-5)
    assert binned.rms == pytest.approx(float((large.double() ** 2).mean().sqrt()), rel=1e-5)


def test_closed_forms_are_scipys():
    fit = fit_weibull(weights(1000, "0.9"))
    law = stats.weibull_min(fit.k, scale=fit.lam)
    assert fit.mean == pytest.approx(law.mean())
    assert fit.std == pytest.approx(law.std())
    assert fit.rms == pytest.approx(math.sqrt(law.moment(2)))
    q = np.linspace(0, 1, 11)
    np.testing.assert_allclose(fit.quantile(q), law.ppf(q))
    x = np.array([-1.0, 0.0, 0.01, 0.1, 1e3])
    np.testing.assert_allclose(fit.cdf(x), law.cdf(x))
    assert float(fit.cdf(fit.quantile(0.25))) == pytest.approx(0.25)


# Degenerate samples and wrong arguments.


@pytest.mark.parametrize("method", ["plot", "mle", "moments"])
@pytest.mark.parametrize(
    ("x", "n", "note"),
    [
        (torch.zeros(100), 0, "no non-zero finite magnitudes"),
        (torch.empty(0), 0, "no non-zero finite magnitudes"),
        (torch.full((7,), math.nan), 0, "no non-zero finite magnitudes; 7 NaN or infinite values left out"),
        (torch.full((100,), -0.5), 100, "all magnitudes are equal"),
        (torch.full((600_000,), 0.3), 600_000, "all magnitudes are equal"),
        (
            MagnitudeHistogram.from_tensor(torch.full((600_000,), 0.3)),
            600_000,
            "all magnitudes are equal to within 0.4 %",
        ),
        (torch.full((600_000,), 0.3).bfloat16(), 600_000, "all magnitudes are equal"),
    ],
)
def test_what_cannot_be_fitted_says_so(x, n, note, method):
    fit = fit_weibull(x, method)
    assert math.isnan(fit.k)
    assert math.isnan(fit.lam)
    assert math.isnan(fit.ks)
    assert (fit.n, fit.note) == (n, note)


def test_a_sample_that_is_constant_in_the_trim_has_no_plot_but_a_likelihood():
    x = np.concatenate([np.full(98, 0.5), [0.1, 3.0]])
    assert fit_weibull(x).note == "fewer than two distinct magnitudes in the trimmed range"
    assert math.isnan(fit_weibull(x).k)
    assert fit_weibull(x, "mle").k > 0


@pytest.mark.parametrize(
    "x",
    [
        np.array([1e-30, 1.0]),
        np.array([5e-324, 1e308]),
        1 + 1e-6 * np.random.default_rng(0).standard_normal(1000),
        10 ** np.random.default_rng(0).uniform(-300, 300, 1000),
        10 ** np.random.default_rng(0).uniform(-38, 38, 1000).astype(np.float32),
        np.concatenate([np.ones(10_000), [1e20]]),
        1e-310 * np.random.default_rng(0).uniform(size=1000),
        np.random.default_rng(0).uniform(size=1000),
    ],
)
def test_the_wildest_samples_raise_nothing(x):
    for method in ("plot", "mle", "moments"):
        fit = fit_weibull(x, method)
        assert not math.isinf(fit.k)
        if not math.isnan(fit.k):
            assert min(fit.mean, fit.rms, fit.std, fit.quantile(0.5)) >= 0
            fit.log_likelihood(x)
    assert len(rank_laws(x)) == 6
    assert tails(x).gini >= 0


def test_few_distinct_magnitudes_are_fitted_and_noted():
    fit = fit_weibull(torch.arange(-8, 8).repeat(100).float())
    assert fit.note == "only 8 distinct magnitudes"
    assert fit.k > 0
    assert fit_weibull(weights(50)).note == ""


def test_non_finite_values_are_left_out_and_counted():
    x = weights(1000)
    spoilt = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])])
    fit = fit_weibull(spoilt)
    assert fit.note == "3 NaN or infinite values left out"
    assert (fit.k, fit.lam, fit.n) == (fit_weibull(x).k, fit_weibull(x).lam, 1000)


def test_a_fit_prints_its_numbers_in_one_line():
    x = weights(1000)
    fit = fit_weibull(x)
    expected = (
        f"WeibullFit(lam={fit.lam:.6g}, k={fit.k:.6g}, r_squared={fit.r_squared:.5f}, ks={fit.ks:.4f}, "
    )
    assert repr(fit) == expected + "n=1000, method='plot')"
    assert f"k_se={fit_weibull(x, 'mle').k_se:.2g}" in repr(fit_weibull(x, "mle"))
    assert "note='all magnitudes are equal'" in repr(fit_weibull(torch.ones(3)))


def test_errors_name_what_was_given():
    x = weights(100)
    with pytest.raises(ValueError, match=r"method must be 'plot', 'mle' or 'moments', got 'ols'"):
        fit_weibull(x, "ols")
    for trim in [(0.9, 0.1), (-0.1, 0.5), (0.5,), None, (0.1, math.nan)]:
        with pytest.raises(ValueError, match="trim must be a pair"):
            fit_weibull(x, trim=trim)
    with pytest.raises(TypeError, match=r"got list; .*torch.tensor\(x\)"):
        fit_weibull([1.0, 2.0])
    with pytest.raises(TypeError, match=r"got Linear; fit_weights takes whole models"):
        fit_weibull(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"law must be .*'gamma'.*got 'cauchy'"):
        law_cdf("cauchy", 1.0, 1.0, 1.0)
    with pytest.raises(TypeError, match="got int64"):
        fit_weibull(torch.arange(5))
    with pytest.raises(ValueError, match="at least two distinct"):
        rank_laws(torch.ones(10))


# Rival laws.


def draws(law, n, rng):
    if law == "weibull":
        return rng.weibull(1.2, n)
    if law == "half-normal":
        return rng.standard_normal(n)
    if law == "log-normal":
        return rng.lognormal(-3.0, 0.8, n)
    if law == "gamma":
        return rng.standard_gamma(1.5, n)
    if law == "exponential":
        return rng.standard_exponential(n)
    return rng.standard_gamma(1 / 1.5, n) ** (1 / 1.5)  # generalised normal with β = 1.5


@pytest.mark.parametrize(
    "law", ["weibull", "half-normal", "log-normal", "gamma", "exponential", "generalised normal"]
)
def test_each_law_is_ranked_first_for_its_own_draws(law):
    rng = np.random.default_rng(1)
    first = 0
    for _ in range(100):
        x = (0.02 * draws(law, 100_000, rng)).astype(np.float32)
        first += rank_laws(MagnitudeHistogram.from_tensor(x, sums=False)).index[0] == law
    assert first >= 95


def test_rivals_have_the_likelihood_and_the_distance_that_scipy_computes():
    x = np.abs(0.02 * draws("gamma", 5000, np.random.default_rng(0)))
    table = rank_laws(x)
    frozen = {
        "weibull": lambda shape, scale: stats.weibull_min(shape, scale=scale),
        "half-normal": lambda shape, scale: stats.halfnorm(scale=scale),
        "log-normal": lambda shape, scale: stats.lognorm(shape, scale=scale),
        "gamma": lambda shape, scale: stats.gamma(shape, scale=scale),
        "exponential": lambda shape, scale: stats.expon(scale=scale),
        "generalised normal": lambda shape, scale: stats.halfgennorm(shape, scale=scale),
    }
    assert set(table.index) == set(frozen)
    fitters = {
        "weibull": stats.weibull_min,
        "half-normal": stats.halfnorm,
        "log-normal": stats.lognorm,
        "gamma": stats.gamma,
        "exponential": stats.expon,
    }
    for name, row in table.iterrows():
        law = frozen[name](row["shape"], row["scale"])
        assert row["log_likelihood"] == pytest.approx(law.logpdf(x).sum(), rel=1e-9)
        assert row["ks"] == pytest.approx(stats.kstest(x, law.cdf).statistic, rel=1e-6)
        assert row["aic"] == pytest.approx(2 * row["parameters"] - 2 * row["log_likelihood"])
        if name in fitters:
            best = fitters[name].logpdf(x, *fitters[name].fit(x, floc=0)).sum()
            assert row["log_likelihood"] >= best - 1e-6 * abs(best)
    beta = table.loc["generalised normal", "shape"]
    for other in (0.99 * beta, 1.01 * beta):
        scale = (other * np.mean(x**other)) ** (1 / other)
        assert (
            stats.halfgennorm(other, scale=scale).logpdf(x).sum()
            < table.loc["generalised normal", "log_likelihood"]
        )


def test_a_bounded_sample_is_the_steepest_generalised_normal():
    table = rank_laws(weights(50_000, "uniform"))
    assert table.index[0] == "generalised normal"
    assert table["shape"].iloc[0] == pytest.approx(50)  # the end of the search; a uniform law has ∞


def test_a_row_of_the_ranking_gives_the_distribution_function():
    x = np.sort(np.abs(weights(5000).double().numpy()))
    for law, row in rank_laws(x).iterrows():
        cdf = law_cdf(law, row["shape"], row["scale"], x)
        steps = np.arange(len(x) + 1) / len(x)
        distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
        assert distance == pytest.approx(row["ks"], rel=1e-9)
        assert law_cdf(law, row["shape"], row["scale"], -1.0) < 1e-12


def test_only_a_clear_lead_puts_a_law_with_more_parameters_first():
    x = draws("exponential", 20_000, np.random.default_rng(3))
    table = rank_laws(x)
    assert table.index[0] == "exponential"
    assert table.loc["exponential", "delta_aic"] <= TIE
    assert (table["delta_aic"] >= 0).all()
    rest = table.iloc[1:]["delta_aic"]
    assert rest.is_monotonic_increasing
    assert rest.index[-1] == "log-normal"


# Tails.


def test_tails_are_those_of_a_half_normal():
    measures = tails(weights(4_000_000))
    assert measures.q90_q10 == pytest.approx(stats.halfnorm.ppf(0.9) / stats.halfnorm.ppf(0.1), rel=0.01)
    assert measures.q99_q50 == pytest.approx(stats.halfnorm.ppf(0.99) / stats.halfnorm.ppf(0.5), rel=0.01)
    assert measures.q999_q50 == pytest.approx(stats.halfnorm.ppf(0.999) / stats.halfnorm.ppf(0.5), rel=0.01)
    assert measures.gini == pytest.approx(math.sqrt(2) - 1, rel=0.002)
    assert measures.kurtosis == pytest.approx(3, rel=0.01)
    edge = stats.norm.isf(0.5e-4)
    share = 2 * (edge * stats.norm.pdf(edge) + stats.norm.sf(edge))
    assert measures.top_share == pytest.approx(share, rel=0.05)
    assert measures.second_share == 0


def test_tails_are_exact_on_a_small_sample():
    x = weights(5000, "0.7", dtype=torch.bfloat16)
    a = np.sort(x.double().numpy())
    n = len(a)
    measures = tails(x)
    assert measures.gini == pytest.approx(np.abs(a[:, None] - a).sum() / (2 * n**2 * a.mean()), rel=1e-12)
    assert measures.kurtosis == pytest.approx((a**4).mean() / (a**2).mean() ** 2, rel=1e-12)
    assert measures.top_share == pytest.approx(a[-1] ** 2 / (a**2).sum(), rel=1e-12)
    q = np.quantile(a, [0.1, 0.5, 0.9, 0.99, 0.999], method="inverted_cdf")
    assert measures[:3] == pytest.approx((q[2] / q[0], q[3] / q[1], q[4] / q[1]))


def test_the_top_share_takes_a_part_of_the_bin_it_ends_in():
    x = np.concatenate([np.full(2, 3.0), np.full(5, 2.0), np.full(39_993, 1.0)])
    assert tails(x).top_share == pytest.approx((2 * 9 + 2 * 4) / (2 * 9 + 5 * 4 + 39_993))
    assert tails(np.ones(10)).top_share == pytest.approx(0.1)


def test_an_empty_sample_has_no_tails():
    assert all(math.isnan(measure) for measure in tails(torch.zeros(3)))


@pytest.mark.parametrize(("ratio", "share"), [(1e-4, 0.3), (0.05, 0.5), (1e-3, 0.05), (30.0, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_population_is_seen(ratio, share, dtype):
    x = weights(200_000, scale=1.0, dtype=torch.float64)
    x[: int(share * len(x))] *= ratio
    assert tails(x.to(dtype)).second_share == pytest.approx(share, rel=0.25)


def test_one_population_is_not_taken_for_two():
    rng = np.random.default_rng(0)
    for n in (300, 5000, 100_000):
        for x in (
            rng.standard_normal(n),
            rng.standard_t(3, n),
            rng.uniform(-1, 1, n),
            rng.weibull(0.5, n),
            rng.lognormal(0, 2, n),
        ):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert tails(torch.from_numpy(0.02 * x).to(dtype)).second_share == 0
    levels = torch.from_numpy(rng.standard_normal(100_000) * 3).round() / 8  # quantised
    assert tails(levels).second_share == 0


# Regimes.


@pytest.mark.parametrize(
    ("k", "r_squared", "regime"),
    [
        (1.186, None, "transmission"),
        (1.204, 0.99, "transmission"),
        (1.19, 0.94, "mild selection"),
        (1.1859, 0.99, "mild selection"),
        (0.95, None, "mild selection"),
        (0.9499, None, "strong selection"),
        (0.3, 0.5, "strong selection"),
        (K0, 0.998, "init baseline"),
        (1.21, None, "init baseline"),
        (1.7, None, "light-tailed"),
        (math.nan, math.nan, "unknown"),
    ],
)
def test_regimes_have_their_published_limits(k, r_squared, regime):
    assert classify(k, r_squared) == regime


def test_a_regime_needs_a_number():
    for k in (None, "1.2", np.ones(2)):
        with pytest.raises(TypeError, match="k must be a number, got"):
            classify(k)
    with pytest.raises(TypeError, match="r_squared must be a number, or None"):
        classify(1.2, "good")


def test_sums_of_ranks_are_those_of_a_loop():
    n = 5000
    y = np.log(-np.log1p(-(np.arange(n) + 0.5) / n))
    ranks = np.array([0, 1, 40, 64, 65, 500, 4000, n - 64, n - 3, n])
    found = np.diff(weibull._sums_of_y(ranks, n))
    expected = [y[a:b].sum() for a, b in itertools.pairwise(ranks)]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    for first, last in ((0, n), (500, 4500), (10, 4990)):
        assert weibull._sum_of_squared_y(first, last, n) == pytest.approx(
            (y[first:last] ** 2).sum(), rel=1e-9
        )
