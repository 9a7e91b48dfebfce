import hashlib
import math
import os
import time
import tracemalloc
import zipfile

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
        np.testing.assert_allclose(a.sums[:2], b.sums[:2], rtol=1e-12)
        # Logarithms have both signs: their sum may be small, and is rounded as its terms are.
        terms = a.counts * (1 + np.abs(np.log(a.edges[0])))
        np.testing.assert_allclose(a.sums.logs, b.sums.logs, rtol=0, atol=1e-14 * terms.sum())


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
    elements=st.floats(width=32, allow_nan=True)
    | st.sampled_from([float(np.float32(value)) for value in (0, 1, 1.001, 1e-45, math.inf, 1e-40)]),
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


def test_merging_keeps_the_sum_of_logarithms_that_cancel():
    parts = [torch.full((n,), value) for n, value in ((55, 7.446648e21), (39, 1.428654e-31), (45, 1.0))]
    whole = MagnitudeHistogram.from_tensor(torch.cat(parts))
    same(sum(MagnitudeHistogram.from_tensor(part) for part in parts), whole)


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


def stored(path, remove=(), compression=zipfile.ZIP_DEFLATED, **changes):
    """A file as `save` writes it, of 1,000 weights, with some of its arrays changed."""
    histogram = MagnitudeHistogram.from_tensor(sample(torch.float32, 1000))
    arrays = {
        "dtype": np.array("float32"),
        "keys": histogram.keys,
        "counts": histogram.counts,
        "apart": np.array([histogram.n_zero, histogram.n_nonfinite, 0]),
        "sums": np.array(histogram.sums),
    }
    sound = hashlib.sha256()  # as the docstring of the digest has it: name, size and bytes of each
    for name, array in arrays.items():
        content = b"float32" if name == "dtype" else array.tobytes()
        sound.update(f"{name} {array.size} ".encode() + content)
    arrays["digest"] = np.array(sound.hexdigest()[:32])
    arrays = {name: array for name, array in {**arrays, **changes}.items() if name not in remove}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asanyarray(array), (1, 0))
    return histogram


def test_what_the_mutations_below_start_from_is_a_histogram(tmp_path):
    same(stored(tmp_path / "h.npz"), MagnitudeHistogram.load(tmp_path / "h.npz"))


def test_a_number_that_was_changed_is_refused_though_the_archive_is_sound(tmp_path):
    histogram = MagnitudeHistogram.from_tensor(sample(torch.float32, 1000))
    counts = histogram.counts.copy()
    counts[0] += 1
    stored(tmp_path / "changed.npz", counts=counts)
    with pytest.raises(ValueError, match=r"changed\.npz .*do not have the digest"):
        MagnitudeHistogram.load(tmp_path / "changed.npz")


KEYS = np.arange(30_000, 30_010)
WRONG = {
    "keys that descend": ({"keys": KEYS[::-1], "counts": np.ones(10, int)}, "keys must ascend"),
    "a key twice": ({"keys": np.array([5, 5]), "counts": np.ones(2, int)}, "keys must ascend"),
    "a key of zeros": ({"keys": np.array([0, 5]), "counts": np.ones(2, int)}, "keys must ascend"),
    "a negative key": ({"keys": np.array([-1, 5]), "counts": np.ones(2, int)}, "keys must ascend"),
    "the key of infinity": ({"keys": np.array([65_280]), "counts": np.ones(1, int)}, r"within \[1, 65279\]"),
    "a key behind the type": ({"keys": np.array([1 << 40]), "counts": np.ones(1, int)}, "keys must ascend"),
    "a count of none": ({"keys": KEYS, "counts": np.zeros(10, int)}, "counts must be >= 1"),
    "a negative count": ({"keys": KEYS, "counts": np.full(10, -3)}, "counts must be >= 1"),
    "counts that overflow": ({"keys": KEYS, "counts": np.full(10, 1 << 62)}, "a number that there can be"),
    "counts of another length": ({"keys": KEYS, "counts": np.ones(9, int)}, "counts has the shape"),
    "counts that are no whole numbers": ({"keys": KEYS, "counts": np.ones(10)}, "counts is of type float64"),
    "keys in two dimensions": (
        {"keys": KEYS.reshape(2, 5), "counts": np.ones(10, int)},
        "keys has the shape",
    ),
    "an unknown type": ({"dtype": np.array("int8")}, "dtype must be one of bfloat16.*'int8'"),
    "a type that is no name": ({"dtype": np.array(3)}, "dtype is of type int64"),
    "a long name": ({"dtype": np.array("x" * 1000)}, "dtype is of type <U1000"),
    "a negative number of zeros": ({"apart": np.array([-1, 0, 0])}, "apart must be"),
    "an unknown flag": ({"apart": np.array([0, 0, 2])}, "apart must be"),
    "bfloat16 in bins": ({"dtype": np.array("bfloat16"), "apart": np.array([0, 0, 0])}, "apart must be"),
    "too few apart": ({"apart": np.array([0, 0])}, "apart has the shape"),
    "sums that are no numbers": ({"sums": np.array([math.nan, 1.0, 1.0])}, "sums must be none, or a finite"),
    "sums without end": ({"sums": np.array([math.inf, 1.0, 1.0])}, "sums must be none, or a finite"),
    "a negative square": ({"sums": np.array([-1.0, 1.0, 1.0])}, "sums must be none"),
    "two sums": ({"sums": np.array([1.0, 1.0])}, "sums must be none"),
    "objects": ({"keys": np.array([print, 1], dtype=object)}, "keys is of type object"),
    "no keys": ({"remove": ("keys",)}, "no item named 'keys.npy'"),
    "another packing": ({"compression": zipfile.ZIP_LZMA}, "compressed in a way"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_with_numbers_that_cannot_be_is_refused_by_name(tmp_path, case):
    changes, message = WRONG[case]
    stored(tmp_path / "odd.npz", **changes)
    with pytest.raises(ValueError, match=rf"odd\.npz is no histogram.*{message}.*Copy it again"):
        MagnitudeHistogram.load(tmp_path / "odd.npz")


def test_no_code_of_a_file_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for name in ("dtype", "keys", "counts", "apart", "sums"):
        stored(tmp_path / "evil.npz", **{name: np.array([Evil(), 1], dtype=object)})
        with pytest.raises(ValueError, match=r"evil\.npz is no histogram"):
            MagnitudeHistogram.load(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


def bomb(path, dtype="float32", name="keys", claimed=None, exact=0):
    """A file of a quarter of a megabyte with a quarter of a gigabyte, or what it claims, in one of its arrays."""
    stored(path, remove=(name,), dtype=np.array(dtype), apart=np.array([0, 0, exact]))
    count = claimed or 1 << 25
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as file,
    ):
        header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(1 << 4 if claimed is None else 1):
            file.write(bytes(1 << 24))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": 1},
        {"dtype": "float64", "exact": 1},
        {"name": "counts"},
        {"name": "sums"},
        {"claimed": 1 << 60},
        {"claimed": 1 << 60, "exact": 1},
        {"claimed": 10},
    ],
)
def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused_at_once(tmp_path, options):
    bomb(tmp_path / "bomb.npz", **options)
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 19
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"bomb\.npz is no histogram"):
            MagnitudeHistogram.load(tmp_path / "bomb.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.monotonic() - start < 5


def test_damaged_files_never_pass_for_histograms(tmp_path):
    expected = stored(tmp_path / "h.npz")
    whole = (tmp_path / "h.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(300):
        data = bytearray(whole)
        if i % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        else:
            for at in rng.integers(len(data), size=i % 3):
                data[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "h.npz").write_bytes(data)
        try:
            found = MagnitudeHistogram.load(tmp_path / "h.npz")
        except ValueError as error:
            assert "h.npz is no histogram" in str(error)  # noqa: PT017
            refused += 1
        else:
            same(found, expected)  # a date or a flag of the archive, which says nothing
    assert refused > 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    for name, what in (("pipe.npz", "a pipe"), ("folder.npz", "a folder")):
        with pytest.raises(ValueError, match=rf"{name} is no histogram.*is {what}"):
            MagnitudeHistogram.load(tmp_path / name)


def test_saving_leaves_the_file_of_before_or_the_whole_new_one(tmp_path, monkeypatch):
    old, new = (MagnitudeHistogram.from_tensor(torch.randn(n)) for n in (100, 200))
    old.save(tmp_path / "h.npz")

    def stop(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", stop)
        with pytest.raises(OSError, match="no space left"):
            new.save(tmp_path / "h.npz")
    same(MagnitudeHistogram.load(tmp_path / "h.npz"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["h.npz"]


def test_an_exact_histogram_of_many_values_is_no_bomb(tmp_path):
    for keys in (np.arange(1, 200_000), np.arange(1, 200_000) << 8, (np.arange(1, 200_000) << 40) + 1):
        dtype = "float64" if keys[-1] >> 31 else "float32"
        many = MagnitudeHistogram(dtype, keys, np.ones(len(keys), np.int64), exact=True)
        many.save(tmp_path / "many.npz")
        np.testing.assert_array_equal(MagnitudeHistogram.load(tmp_path / "many.npz").keys, keys)


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
    for function in (count_magnitudes, sum_magnitudes):
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got a float64 array of shape \(3,\)"):
            function(np.ones(3))
    for counts in (np.full(1 << 16, -1), np.full(1 << 16, 0.5)):
        with pytest.raises(ValueError, match=r"counts must be whole numbers >= 0"):
            MagnitudeHistogram.from_counts(counts, torch.float32)
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


def test_a_histogram_with_a_large_directory_is_refused_before_it_is_listed(tmp_path):
    path = tmp_path / "h.npz"
    MagnitudeHistogram.from_tensor(torch.randn(100)).save(path)
    with zipfile.ZipFile(path, "a") as file:
        for i in range(1000):
            file.writestr(f"{i}", b"")
    with pytest.raises(ValueError, match=r"h\.npz .*directory has [\d,]+ bytes"):
        MagnitudeHistogram.load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_histograms_widen_to_what_float32_is_counted_in(dtype):
    x = (torch.randn(5000) * 10.0 ** torch.randint(-7, 3, (5000,))).to(dtype)
    narrow, wide = MagnitudeHistogram.from_tensor(x), x.float()
    for exact in (True, False):
        truth = MagnitudeHistogram.from_tensor(wide, exact=exact)
        found = narrow.widened("float32", exact=exact)
        np.testing.assert_array_equal(found.keys, truth.keys)
        np.testing.assert_array_equal(found.counts, truth.counts)
        assert (found.n_zero, found.exact) == (truth.n_zero, exact)
    with pytest.raises(ValueError, match="neither be parted"):
        MagnitudeHistogram.from_tensor(wide).widened("float32", exact=True)
