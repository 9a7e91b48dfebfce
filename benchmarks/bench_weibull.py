"""What a Weibull fit costs: ours against sorting, scipy, lifelines and npm-weibull-py, on the same weights.

All sides take turns in one process, round after round. Printed are the fastest turn of each and the median, the
ratio of the fastest to ours, and the error in k; the floor is one read of the weights. Sides of the published
protocol are compared with the protocol itself, in float64 and by sorting; those of maximum likelihood with the
root of its equation, found to the last digit. The last part fits whole checkpoints from their files.

What sorting costs depends on NumPy and on the processor: with AVX-512, NumPy sorts several times faster than
without, and several times faster than torch. So the protocol stands here in all the ways that people write it.

    python benchmarks/bench_weibull.py [--weights 4000000] [--rounds 7]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import optimize, stats

import weightdyn as wd
from weightdyn.weibull.weights import fit_weights

FEW = 100_000
"""Weights that the general optimisers get: on all of them they take minutes."""


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# The published protocol, in five ways to write it.


def line_through(a: np.ndarray, least_squares: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """k of the line through the middle 80 % of sorted magnitudes."""
    rank = (np.arange(1, len(a) + 1) - 0.5) / len(a)
    kept = (rank >= 0.1) & (rank <= 0.9)
    return least_squares(np.log(a[kept].astype(np.float64)), np.log(-np.log1p(-rank[kept])))


def by_sums(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(np.sum(x * y) / np.sum(x * x))


def linregress(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.linregress(x, y).slope)


def polyfit(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


def numpy_sort(
    w: torch.Tensor,
    least_squares: Callable[[np.ndarray, np.ndarray], float],
    dtype: torch.dtype = torch.float32,
) -> float:
    return line_through(np.sort(np.abs(w.to(dtype).numpy().ravel())), least_squares)


def numpy_partition(w: torch.Tensor) -> float:
    """Only the middle 80 % is sorted."""
    a = np.abs(w.float().numpy().ravel())
    low, high = int(0.1 * len(a)), int(0.9 * len(a))
    a = np.partition(a, (low, high))
    a[low:high].sort()
    return line_through(a, by_sums)


def torch_sort(w: torch.Tensor) -> float:
    return line_through(w.float().abs().flatten().sort().values.numpy(), by_sums)


def npm_weibull(w: torch.Tensor) -> float:
    from npm_weibull import extract_to_histogram, weibull_fit

    return weibull_fit(extract_to_histogram(w))["k"]


# Maximum likelihood.


def likelihood_root(w: torch.Tensor) -> float:
    a = np.abs(w.double().numpy().ravel())
    log = np.log(a[a > 0])
    log -= log.mean()

    def score(k: float) -> float:
        power = np.exp(k * log)
        return 1 / k - np.sum(power * log) / np.sum(power)

    return float(optimize.brentq(score, 0.05, 50, xtol=1e-12))


def scipy_fit(w: torch.Tensor) -> float:
    return float(stats.weibull_min.fit(np.abs(w.double().numpy().ravel()), floc=0)[0])


def lifelines_fit(w: torch.Tensor) -> float:
    from lifelines import WeibullFitter

    return float(WeibullFitter().fit(np.abs(w.double().numpy().ravel())).rho_)


def measure(
    title: str,
    sides: dict[str, Callable[[], float]],
    k: float,
    floor: Callable[[], object],
    rounds: int,
    n: int,
) -> None:
    """Print time, time over the floor, time over ours (the first side) and error in k of each side."""
    times: dict[str, list[float]] = {name: [] for name in (*sides, "one read of the weights")}
    found = {name: side() for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in (*sides.items(), ("one read of the weights", floor)):
            times[name].append(seconds(side))
    best = {name: min(each) for name, each in times.items()}
    ours = best[next(iter(sides))]
    print(f"\n{title}, {n:,} weights\n{'':34}      time   median   / ours  ns/weight   |Δk|")
    for name, time_ in best.items():
        error = f"{abs(found[name] - k):8.1e}" if name in found else ""
        middle = statistics.median(times[name])
        row = f"{time_ * 1e3:7.2f} ms {middle * 1e3:7.2f} {time_ / ours:7.2f}x {time_ / n * 1e9:9.2f}"
        print(f"{name:34} {row} {error}")


def one_tensor(dtype: torch.dtype, n: int, rounds: int) -> None:
    w = (0.02 * torch.randn(n, generator=torch.Generator().manual_seed(0))).to(dtype)
    reference = line_through(np.sort(np.abs(w.double().numpy())), by_sums)
    sides = {
        "weightdyn": lambda: wd.fit_weibull(w).k,
        "numpy sort, sums": lambda: numpy_sort(w, by_sums),
        "numpy sort, scipy linregress": lambda: numpy_sort(w, linregress),
        "numpy sort, numpy polyfit": lambda: numpy_sort(w, polyfit),
        "numpy float64 sort, linregress": lambda: numpy_sort(w, linregress, torch.float64),
        "numpy partition, sums": lambda: numpy_partition(w),
        "torch sort, sums": lambda: torch_sort(w),
    }
    if importlib.util.find_spec("npm_weibull"):
        sides["npm-weibull-py"] = lambda: npm_weibull(w)
    else:
        print("npm-weibull-py is not installed: pip install --no-deps npm-weibull-py")
    name = str(dtype).removeprefix("torch.")
    measure(f"Probability plot, {name}", sides, reference, lambda: w.sum(), rounds, n)

    few = w[:FEW][w[:FEW] != 0]
    all_of_them = likelihood_root(w)
    everything = {"weightdyn, mle": lambda: wd.fit_weibull(w, "mle").k}
    measure(f"Maximum likelihood, {name}", everything, all_of_them, lambda: w.sum(), rounds, n)
    sides = {"weightdyn, mle": lambda: wd.fit_weibull(few, "mle").k, "scipy, floc=0": lambda: scipy_fit(few)}
    if importlib.util.find_spec("lifelines"):
        sides["lifelines"] = lambda: lifelines_fit(few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(
            f"Maximum likelihood, {name}",
            sides,
            likelihood_root(few),
            lambda: few.sum(),
            min(rounds, 3),
            len(few),
        )


def whole_model(hidden: int, layers: int, dtype: torch.dtype, rounds: int) -> None:
    """Every matrix of a Llama-shaped checkpoint, from a cached file, against reading and summing it."""
    inner = 11 * hidden // 4
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layers.{layer}.{name}.weight": (0.02 * torch.randn(shape, generator=generator)).to(dtype)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    weights = sum(w.numel() for w in state.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(state, path)
        del state

        def read() -> None:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no iterator)
                    file.get_tensor(key).sum()

        def fit() -> None:
            fit_weights(path, progress=False)

        times = [(seconds(fit), seconds(read)) for _ in range(rounds)]
        ours, floor = (min(each) for each in zip(*times, strict=True))
        size = path.stat().st_size
    print(
        f"hidden size {hidden}, {layers} layers, {str(dtype).removeprefix('torch.')}: "
        f"{weights / 1e6:.0f}M weights in {ours:.2f} s = {ours / weights * 1e9:.1f} ns/weight, "
        f"{size / ours / 1e9:.1f} GB/s (from the cache, reading and summing does {size / floor / 1e9:.1f} GB/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, numpy {np.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        one_tensor(dtype, arguments.weights, arguments.rounds)
    print("\nEvery matrix of a model, with fit, Kolmogorov-Smirnov distance and tails")
    for dtype in (torch.float32, torch.bfloat16):
        for hidden, layers in ((512, 4), (1024, 6)):
            whole_model(hidden, layers, dtype, min(arguments.rounds, 3))


if __name__ == "__main__":
    main()
