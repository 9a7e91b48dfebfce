import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from weightdyn.weibull import magnitudes
from weightdyn.weibull.magnitudes import MagnitudeHistogram, Sums, count_magnitudes, sum_magnitudes

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def sample(dtype: torch.dtype, n: int = 200_000, seed: int = 0) -> torch.Tensor:
    """Weights over many octaves, with zeros of both signs, subnormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x[: n // 2] *= torch.exp(torch.randn(n // 2, generator=generator, dtype=torch.float64))
    x = x.to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, tiny, -tiny / 2, tiny / 4]
    x[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x.view(bits)[20] = 1  # the smallest subnormal
    x.view(bits)[21] = torch.iinfo(bits).min + 3  # one of the smallest, negative
    return x


def magnitudes_of(x: torch.Tensor) -> np.ndarray:
    a = x.double().abs().reshape(-1).numpy()
    return np.sort(a[np.isfinite(a) & (a > 0)])


def same(a: MagnitudeHistogram, b: MagnitudeHistogram) -> None:
    assert (a.dtype, a.exact, a.n_zero, a.n_nonfinite) == (b.dtype, b.exact, b.n_zero, b.n_nonfinite)
    np.testing.assert_array_equal(a.keys, b.keys)
    np.testing.assert_array_equal(a.counts, b.counts)
    if a.sums is None or b.sums is None:
        assert a.sums is b.sums
    else:
        np.testing.assert_allclose(a.sums, b.sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_every_magnitude_lies_in_its_bin(dtype, exact):
    x = sample(dtype)
    histogram = MagnitudeHistogram.from_tensor(x, exact=exact)
    value = magnitudes_of(x)
    low, high = histogram.edges
    assert histogram.n == len(value)
    owner = np.repeat(np.arange(len(low)), histogram.counts)
    assert (low[owner] <= value).all()
    assert (value <= high[owner]).all()
    assert (low[1:] >= high[:-1]).all()
    normal = low >= torch.finfo(dtype).smallest_normal
    assert (high[normal] / low[normal] <= 1 + 2**-8).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_an_exact_histogram_is_the_list_of_distinct_magnitudes(dtype):
    x = sample(dtype)
    histogram = MagnitudeHistogram.from_tensor(x, exact=True)
    value, counts = np.unique(magnitudes_of(x), return_counts=True)
    np.testing.assert_array_equal(histogram.edges[0], value)
    np.testing.assert_array_equal(histogram.counts, counts)
    assert histogram.exact


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_zeros_subnormals_and_non_finite_values_stand_apart(dtype, exact):
    x = sample(dtype)
    histogram = MagnitudeHistogram.from_tensor(x, exact=exact)
    a = x.double().abs()
    assert histogram.n_zero == int((a == 0).sum()) >= 2
    assert histogram.n_nonfinite == int((~a.isfinite()).sum()) >= 4
    assert histogram.n_subnormal == int(((a > 0) & (a < torch.finfo(dtype).smallest_normal)).sum()) >= 4
    assert histogram.n + histogram.n_zero + histogram.n_nonfinite == x.numel()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_counting_on_a_device_gives_the_same(dtype, device, monkeypatch):
    monkeypatch.setattr(magnitudes, "DEVICE_PIECE", 1000)
    x = sample(dtype, 20_000)
    form = magnitudes._FORMATS[str(dtype).removeprefix("torch.")]
    counts = magnitudes._count_on_device(x.to(device), form)
    assert counts.dtype == torch.int64
    assert counts.device.type == device
    assert torch.equal(counts.cpu(), count_magnitudes(x))
    on_device, here = MagnitudeHistogram.from_tensor(x.to(device)), MagnitudeHistogram.from_tensor(x)
    same(on_device, here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_counting_and_summing_do_not_synchronise():
    x = torch.randn(3_000_000, device="cuda")[::2]
    count_magnitudes(x), sum_magnitudes(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        count_magnitudes(x), sum_magnitudes(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Dispatched(TorchDispatchMode):
    """Names of all operations that torch runs inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), func.overloadpacket.__name__}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", TYPES)
def test_on_a_device_only_operations_run_that_need_no_answer(dtype, monkeypatch):
    # What makes the host wait, on any device: sizes that depend on values, and values that come to the host.
    monkeypatch.setattr(magnitudes, "DEVICE_PIECE", 1000)
    form = magnitudes._FORMATS[str(dtype).removeprefix("torch.")]
    with Dispatched() as dispatched:
        magnitudes._count_on_device(sample(dtype), form)
        sum_magnitudes(sample(dtype))
    assert "scatter_add_" in dispatched.names
    waits = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "equal"}
    assert not waits & dispatched.names
    assert "index" not in dispatched.names  # by a mask it is masked_select


def test_views_of_complex_numbers_are_read_as_what_they_show():
    x = torch.randn(300, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)).conj().imag
    assert x.is_neg()
    same(MagnitudeHistogram.from_tensor(x), MagnitudeHistogram.from_tensor(x.clone().contiguous()))


@pytest.mark.parametrize("dtype", TYPES)
def test_counts_taken_now_are_a_histogram_later(dtype):
    x = sample(dtype)
    later = MagnitudeHistogram.from_counts(count_magnitudes(x), dtype, sum_magnitudes(x))
    same(later, MagnitudeHistogram.from_tensor(x))
    assert MagnitudeHistogram.from_counts(count_magnitudes(x), dtype).sums == (
        later.sums if later.exact else None
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_those_of_the_finite_non_zero_values(dtype):
    x = sample(dtype)
    a = magnitudes_of(x)
    expected = [math.fsum(a * a), math.fsum(a), math.fsum(np.log(a))]
    sums = MagnitudeHistogram.from_tensor(x).sums
    assert isinstance(sums, Sums)
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    np.testing.assert_allclose(sum_magnitudes(x).tolist(), expected, rtol=1e-12)
    assert (MagnitudeHistogram.from_tensor(x, sums=False).sums is None) == (x.element_size() > 2)


def test_any_strides_count_alike(monkeypatch):
    monkeypatch.setattr(magnitudes, "PIECE", 1000)
    whole = torch.randn(60, 50, 40)
    views = {
        "transposed": whole.transpose(0, 2),
        "strided": whole[::3, :, 1::2],
        "rows": whole[10:20],
        "columns": whole[:, :, :7],
        "column": whole[:, 3, 4],
        "expanded": whole[:1].expand(30, 50, 40),
        "scalar": whole[0, 0, 0],
        "empty": whole[:0],
    }
    for view in views.values():
        expected = MagnitudeHistogram.from_tensor(view.clone(memory_format=torch.contiguous_format))
        same(MagnitudeHistogram.from_tensor(view), expected)
        same(MagnitudeHistogram.from_tensor(view.numpy()), expected)
    flipped = whole.numpy()[::-1, :, ::-2]
    same(MagnitudeHistogram.from_tensor(flipped), MagnitudeHistogram.from_tensor(flipped.copy()))
    swapped = flipped.astype(">f4")
    same(MagnitudeHistogram.from_tensor(swapped), MagnitudeHistogram.from_tensor(flipped))


def test_gradients_and_read_only_files_are_no_hindrance(tmp_path):
    x = torch.randn(1000, requires_grad=True)
    np.save(tmp_path / "x.npy", x.detach().numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    same(MagnitudeHistogram.from_tensor(x), MagnitudeHistogram.from_tensor(mapped))


@pytest.mark.parametrize("contiguous", [True, False])
def test_memory_is_bounded_whatever_the_size(contiguous):
    x = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    x = x if contiguous else x[:, ::2]
    MagnitudeHistogram.from_tensor(x[:10])
    tracemalloc.start()
    try:
        MagnitudeHistogram.from_tensor(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


values = hnp.arrays(
    np.float32,
    st.integers(0, 60),
    elements=st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, 1.0, 1.001, 1e-45, math.inf, 1e-40]),
)


@settings(deadline=None, max_examples=150)
@given(values, values, values, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans())
def test_merging_is_associative_and_equals_the_histogram_of_the_whole(a, b, c, dtype, exact):
    def of(*parts):
        x = torch.from_numpy(np.concatenate(parts)).to(dtype)
        return MagnitudeHistogram.from_tensor(x, exact=exact)

    left, right = (of(a) + of(b)) + of(c), of(a) + (of(b) + of(c))
    same(left, right)
    same(left, of(a, b, c))
    same(left, of(c) + of(a) + of(b))
    same(left, sum([of(a), of(b), of(c)]))


def test_sums_merge_only_where_both_have_them():
    x = torch.randn(100)
    with_sums, without = (MagnitudeHistogram.from_tensor(x, sums=sums) for sums in (True, False))
    assert (with_sums + without).sums is None
    assert (with_sums + with_sums).sums.squares == pytest.approx(2 * float((x.double() ** 2).sum()))


@pytest.mark.parametrize("dtype", TYPES)
def test_quantiles_and_the_distribution_function_are_those_of_the_sample(dtype):
    histogram = MagnitudeHistogram.from_tensor(sample(dtype))
    value = magnitudes_of(sample(dtype))
    q = np.linspace(0.001, 1, 800)
    expected = np.quantile(value, q, method="inverted_cdf")
    np.testing.assert_allclose(histogram.quantile(q), expected, rtol=0 if histogram.exact else 1.01 * 2**-8)
    at = np.concatenate([[0.0, value[-1] * 2], np.geomspace(1e-3, value[-1], 300)])
    expected = np.searchsorted(value, at, side="right") / len(value)
    np.testing.assert_allclose(histogram.cdf(at), expected, atol=0 if histogram.exact else 5e-3)
    if not histogram.exact:
        np.testing.assert_allclose(histogram.cdf(histogram.quantile(q)), q, rtol=1e-9)
    assert isinstance(histogram.quantile(0.5), float)
    assert isinstance(histogram.cdf(0.5), float)


def test_an_empty_histogram_has_no_quantiles():
    empty = MagnitudeHistogram.from_tensor(torch.zeros(5))
    assert empty.n == 0
    assert math.isnan(empty.quantile(0.5))
    assert math.isnan(empty.cdf(1.0))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_points_integrate_smooth_functions(dtype, exact):
    x = sample(dtype)[100:]  # without the subnormals, whose bins are wide
    value, weight = MagnitudeHistogram.from_tensor(x, exact=exact).points()
    a = magnitudes_of(x)
    for function in (np.ones_like, np.log, np.sqrt):
        assert np.sum(weight * function(value)) == pytest.approx(
            np.sum(function(a)), rel=1e-5, abs=1e-5 * len(a)
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_saved_histogram_comes_back(tmp_path, dtype, exact):
    histogram = MagnitudeHistogram.from_tensor(sample(dtype, 5000), exact=exact)
    histogram.save(tmp_path / "h.npz")
    same(MagnitudeHistogram.load(tmp_path / "h.npz"), histogram)
    without = MagnitudeHistogram.from_tensor(sample(dtype, 5000), sums=False)
    without.save(str(tmp_path / "bare"))
    same(MagnitudeHistogram.load(str(tmp_path / "bare")), without)


def test_a_foreign_file_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "array.npy", "text.npz", "empty.npz"):
        with pytest.raises(ValueError, match=f"{name} is no histogram"):
            MagnitudeHistogram.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        MagnitudeHistogram.load(tmp_path / "none.npz")


def test_errors_name_what_was_given():
    with pytest.raises(TypeError, match=r"x must be of a float type.*got int64"):
        MagnitudeHistogram.from_tensor(torch.arange(3))
    with pytest.raises(TypeError, match="got int64"):
        MagnitudeHistogram.from_tensor(np.arange(3))
    with pytest.raises(TypeError, match=r"a torch.Tensor or a numpy.ndarray, got list"):
        MagnitudeHistogram.from_tensor([1.0])
    with pytest.raises(TypeError, match=r"got MaskedArray"):
        MagnitudeHistogram.from_tensor(np.ma.masked_array([1.0, 2.0], [0, 1]))
    with pytest.raises(TypeError, match=r"dense tensor with data.*sparse_coo; x.to_dense\(\)"):
        MagnitudeHistogram.from_tensor(torch.eye(3).to_sparse())
    for function in (MagnitudeHistogram.from_tensor, count_magnitudes, sum_magnitudes):
        with pytest.raises(TypeError, match=r"dense tensor with data, got a meta tensor"):
            function(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got ndarray"):
        count_magnitudes(np.ones(3))
    with pytest.raises(ValueError, match=r"shape \(65536,\) for float32.*got \(3,\)"):
        MagnitudeHistogram.from_counts(np.ones(3), torch.float32)
    with pytest.raises(ValueError, match=r"one has float32, the other bfloat16"):
        MagnitudeHistogram.from_tensor(torch.ones(2)) + MagnitudeHistogram.from_tensor(
            torch.ones(2).bfloat16()
        )
    with pytest.raises(ValueError, match="float32, exact"):
        MagnitudeHistogram.from_tensor(torch.ones(2), exact=True) + MagnitudeHistogram.from_tensor(
            torch.ones(2)
        )
    with pytest.raises(TypeError):
        MagnitudeHistogram.from_tensor(torch.ones(2)) + 1
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]"):
        MagnitudeHistogram.from_tensor(torch.ones(2)).quantile(1.5)


def test_it_says_what_it_holds():
    assert repr(MagnitudeHistogram.from_tensor(torch.tensor([0.0, 1.0, 1.0]))) == (
        "MagnitudeHistogram(float32, n=2, bins=1, n_zero=1, n_nonfinite=0)"
    )
