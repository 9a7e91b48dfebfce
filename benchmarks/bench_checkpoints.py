"""What measuring a series costs, against a plain loop that reads the same files and sums their squares.

Both sides run in turn in one process, round after round, on files that the system has in its cache, so that the
disk favours neither; the medians are printed. Peak memory is taken in processes of their own. The table at the end
is what a decay of 0.01, as one paper says, does to the relaxation time of Pythia instead of the true 0.1.

    python benchmarks/bench_checkpoints.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from weightdyn.checkpoints.recipe import PRESETS, Recipe
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.files.weightfiles import Stored


def make(folder: Path, steps: int, width: int, layers: int = 6) -> int:
    """A series of checkpoints with Pythia's shapes; the bytes of one."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    state = {"embed_in.weight": torch.randn(50304, width, generator=generator) * 0.02}
    for i in range(layers):
        for name, rows, columns in [
            ("attention.query_key_value", 3 * width, width), ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width), ("mlp.dense_4h_to_h", width, 4 * width),
        ]:  # fmt: skip
            weight = torch.randn(rows, columns, generator=generator) * 0.02
            state[f"layers.{i}.{name}.weight"] = weight
            state[f"layers.{i}.{name}.bias"] = torch.zeros(rows)
    for step in range(steps):
        for tensor in state.values():
            tensor.mul_(1.0001)
        save_file(state, folder / f"step{step}.safetensors")
    return (folder / "step0.safetensors").stat().st_size


def plain(folder: Path, dtype: torch.dtype = torch.float64) -> float:
    """Read every tensor and sum its squares."""
    total = 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                total += float(file.get_tensor(name).to(dtype).square().sum())
    return total


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(folder: Path, gram: str = "none", **options: object) -> None:
    Checkpoints(folder).measure(gram, progress=False, **{"cache": False, **options})  # type: ignore[arg-type]


def against_reading(folder: Path, rounds: int, size: int, steps: int) -> None:
    sides: dict[str, Callable[[], object]] = {
        "plain loop, float64": lambda: plain(folder),
        "plain loop, float32 (inexact)": lambda: plain(folder, torch.float32),
        "measure(weibull=False)": lambda: measure(folder, weibull=False),
        "measure()": lambda: measure(folder),
        "measure(), one thread": lambda: measure(folder, n_jobs=1),
    }
    plain(folder)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(seconds(side))
    reference = statistics.median(times["plain loop, float64"])
    for name, found in times.items():
        median = statistics.median(found)
        print(
            f"{name:>30}: {median:6.2f} s = {steps * size / median / 1e9:5.2f} GB/s, "
            f"{reference / median:.2f}x the speed of the first (budget 0.5x)"
        )


def growth(folder: Path) -> None:
    print("\ngrowth, seconds (bytes to read): with the number of checkpoints, then with their size")
    for steps, width in [(4, 128), (8, 128), (16, 128), (32, 128), (8, 64), (8, 256), (8, 512)]:
        path = folder / f"{steps}-{width}"
        size = make(path, steps, width)
        none, full = (seconds(partial(measure, path, gram)) for gram in ("none", "full"))
        print(f"{steps:>4} x {size / 1e6:6.1f} MB: {none:6.2f}, with all inner products {full:6.2f}")


def resuming(folder: Path) -> None:
    read: list[int] = []
    rows = Stored.read

    def counted(stored: Stored, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = rows(stored, start, stop)
        read.append(tensor.numel() * tensor.element_size())
        return tensor

    Stored.read = counted  # type: ignore[method-assign]
    size = make(folder, 16, 128)
    shown = []
    for what in ("first time", "again", "one more step"):
        if what == "one more step":
            source = folder / "step0.safetensors"
            with safe_open(source, framework="pt") as file:
                save_file({n: file.get_tensor(n) * 2 for n in file.keys()}, folder / "step16.safetensors")  # noqa: SIM118
        read.clear()
        took = seconds(lambda: measure(folder, cache=True))
        shown.append(f"{what}: {sum(read) / size:.2f} checkpoints read in {took:.2f} s")
    Stored.read = rows  # type: ignore[method-assign]
    print("\nresuming a series of 16:", "; ".join(shown))


def peak() -> float:
    """Largest resident memory of this process so far, MB; getrusage would count its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024


def peak_memory(folder: Path, gram: str) -> None:
    """Growth of the process' peak memory over a measurement."""
    warm = folder.parent / "warm"
    make(warm, 2, 64, 1)
    measure(warm, gram)
    before = peak()
    measure(folder, gram, n_jobs=1)
    extra = peak() - before
    size = (folder / "step0.safetensors").stat().st_size / 2**20
    count = len(list(folder.glob("*.safetensors")))
    print(f"peak extra memory, gram={gram!r}: {extra:.0f} MB of {count} x {size:.0f} MB")


def decay_table() -> None:
    print("\nPythia: relaxation time with the decay of its configuration and with that of its paper's table")
    print(
        f"{'':>12} {'peak lr':>8} {'τ at 0.1':>10} {'T/τ':>6} {'τ at 0.01':>10} {'T/τ':>6} {'Σηλ':>6} {'Σηλ':>6}"
    )
    for name in [name for name in PRESETS if name.startswith("pythia") and name.count("-") == 1]:
        true, paper = Recipe.preset(name), Recipe.preset(name, weight_decay=0.01)
        lr = true.lr_at(np.arange(1, 143_001))
        total = [float(lr.sum()) * recipe.weight_decay for recipe in (true, paper)]
        print(
            f"{name:>12} {lr.max():8.1e} {true.tau:10,.0f} {143_000 / true.tau:6.2f} {paper.tau:10,.0f} "
            f"{143_000 / paper.tau:6.2f} {total[0]:6.2f} {total[1]:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        peak_memory(Path(arguments.memory[0]), arguments.memory[1])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 4
        size = make(folder / "series", steps, 512)
        print(f"{steps} checkpoints of {size / 1e6:.0f} MB, float32; {torch.get_num_threads()} threads")
        against_reading(folder / "series", arguments.rounds, size, steps)
        for gram in ("none", "full"):
            command = [sys.executable, __file__, "--memory", str(folder / "series"), gram]
            subprocess.run(command, check=True)
        growth(folder / "growth")
        resuming(folder / "resume")
    decay_table()


if __name__ == "__main__":
    main()
