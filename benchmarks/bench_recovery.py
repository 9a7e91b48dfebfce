"""Recovery from Gram matrices and from the budget against the published way: a spline of every weight.

The published script stacks the checkpoints of 200,000 sampled weights, runs scipy's CubicSpline through each, and
evaluates it at every update that it looks at. Here it runs over the same subsample and over all weights, beside
`recover_forces` on what `Checkpoints.measure` read. The weights are those of a noisy training, simulated so that
the truth is known at every update. Time counts reading; memory is the growth of the peak of a fresh process.

    python benchmarks/bench_recovery.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline

from weightdyn.checkpoints.recipe import Recipe
from weightdyn.checkpoints.recovery import METHODS, recover_forces
from weightdyn.checkpoints.series import Checkpoints

NAME = "model.layers.0.mlp.up_proj.weight"
LR, DECAY, BETAS, GAP = 1e-3, 0.1, (0.9, 0.95), 50
SAMPLE = 200_000


def simulate(folder: Path, checkpoints: int, numel: int) -> None:
    """AdamW on noisy gradients with a pull; a checkpoint every GAP updates, and the true alignment of each gap."""
    torch.manual_seed(0)
    w, m, v = 0.02 * torch.randn(numel), torch.zeros(numel), torch.zeros(numel)
    goal = w + 0.05 * torch.randn(numel)
    alignment = []
    for t in range((checkpoints - 1) * GAP + 1):
        if t:
            g = torch.randn(numel).add_(w - goal, alpha=5.0)
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            u = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
            alignment.append(-2 * LR * (1 - LR * DECAY) * float(w.double() @ u.double()))
            w = (1 - LR * DECAY) * w - LR * u
        if t % GAP == 0:
            save_file({NAME: w.view(-1, 1000)}, folder / f"step-{t:06d}.safetensors")
    truth = np.array(alignment).reshape(-1, GAP).mean(axis=1)
    (folder / "truth.json").write_text(json.dumps(truth.tolist()))


def published(folder: Path, sample: int | None) -> np.ndarray:
    """Mean alignment of each gap by a spline of every weight (of the sample), scaled to all weights."""
    files = sorted(folder.glob("step-*.safetensors"))
    rows, numel = [], 0
    for file in files:
        w = load_file(file)[NAME].flatten()
        numel = len(w)
        if sample and sample < numel:
            w = w[torch.from_numpy(np.random.default_rng(0).choice(numel, sample, replace=False))]
        rows.append(w.double().numpy())
    steps = np.arange(len(files)) * GAP
    spline = CubicSpline(steps, np.array(rows), axis=0)
    found = np.empty(steps[-1])
    before = spline(0)
    for t in range(steps[-1]):
        after = spline(t + 1)
        u = -(after - before) / LR - DECAY * before
        found[t] = -2 * LR * (1 - LR * DECAY) * (before @ u)
        before = after
    return found.reshape(-1, GAP).mean(axis=1) * numel / len(before)


def ours(folder: Path, method: str) -> np.ndarray:
    series = Checkpoints(folder)
    gram = METHODS[method].gram
    table = series.measure(gram=gram, weibull=False, cache=False, progress=False)
    recipe = Recipe(lr=LR, weight_decay=DECAY, betas=BETAS)
    return recover_forces(table, recipe, method)["alignment"].to_numpy()  # type: ignore[arg-type]


def one(folder: Path, way: str) -> None:
    """One way in a process of its own: prints seconds, megabytes, median error."""
    torch.set_num_threads(1)
    truth = np.array(json.loads((folder / "truth.json").read_text()))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = ours(folder, way) if way in METHODS else published(folder, SAMPLE if "sample" in way else None)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(json.dumps([seconds, max(peak, 1.0), float(np.median(np.abs(1 - found / truth)))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), arguments.one[1])
        return
    rows = []
    for checkpoints, numel in (
        (10, 1_000_000),
        (20, 1_000_000),
        (40, 1_000_000),
        (20, 250_000),
        (20, 4_000_000),
    ):
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), checkpoints, numel)
            for way in ("published, sample", "published, all", *METHODS):
                command = [sys.executable, __file__, "--one", folder, way]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append((f"{checkpoints} x {numel / 1e6:g}M", way, *json.loads(output)))
                print(".", end="", flush=True)
    table = pd.DataFrame(rows, columns=["checkpoints x weights", "way", "seconds", "MB", "median error"])
    base = table[table["way"] == "published, all"].set_index("checkpoints x weights")
    table["times faster"] = (
        base["seconds"].reindex(table["checkpoints x weights"]).to_numpy() / table["seconds"]
    )
    table["times smaller"] = base["MB"].reindex(table["checkpoints x weights"]).to_numpy() / table["MB"]
    shown = {
        "seconds": "{:.2f}".format, "MB": "{:.0f}".format, "median error": "{:.2%}".format,
        "times faster": "{:.1f}".format, "times smaller": "{:.1f}".format,
    }  # fmt: skip
    print("\nagainst a spline of every weight, over all weights:")
    print(table.to_string(index=False, formatters=shown))


if __name__ == "__main__":
    main()
