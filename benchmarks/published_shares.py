"""Alignment's share in the published force logs, by tenth of the run, beside what white noise and momentum make.

    python benchmarks/published_shares.py --reference reference

takes a copy of the public data of arXiv 2606.19367 (tiexinding/NPM-Weibull-public) and prints the table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd

from weightdyn.checkpoints.published import read_published_forces

RUNS = {
    "GPT-NeoX, η 1e-3": "self_train/baseline_force.jsonl",
    "GPT-NeoX, η 3e-4": "revision/eta_3e4/v1b_spline_true.jsonl",
    "LLaMA, η 1e-3": "self_train/v1b_spline_true_llama.jsonl",
    "LLaMA, η 1e-3, another": "revision/bsel/v1b_spline_true.jsonl",
}
"""The public runs that have a force log; the last one logged queries and keys, too."""

BETA1 = 0.9


def published_shares(folder: str | os.PathLike[str], tenths: int = 10) -> pd.DataFrame:
    """What share of alignment and injection alignment is, before the step, beside that of white noise.

    Args:
        folder: the copy of the public data, which holds `Weibull_WeightScale_dynamics/derived_data`.
        tenths: parts that a run is cut into.

    Returns:
        One row per run, role and tenth: sums over its logged updates of

        share         alignment/(alignment + injection)
        white_noise   the same of memory_null: Σmemory_null/Σ(memory_null + injection), with the real schedule
        steady        2b/(2b+1), with a steady η: 18/19 at β₁ = 0.9
        kappa         alignment/memory_null: 1 if alignment is the memory of white noise and there is no drift
        of_2b         alignment/(2b·injection)
        low, high     least and largest share of a single logged update
    """
    steady = 2 * BETA1 / (1 - BETA1)
    found = []
    for name, file in RUNS.items():
        path = Path(folder) / "Weibull_WeightScale_dynamics" / "derived_data" / file
        table = read_published_forces(path, beta1=BETA1)
        last = table["step"].max()
        table["tenth"] = (table["step"] - 1) * tenths // last + 1
        table["each"] = table["alignment"] / (table["alignment"] + table["injection"])
        groups = table.groupby(["role", "tenth"], observed=True, sort=False)
        sums = groups[["alignment", "injection", "memory_null"]].sum()
        part = pd.DataFrame(
            {
                "lr": groups["lr"].mean(),
                "share": sums["alignment"] / (sums["alignment"] + sums["injection"]),
                "white_noise": sums["memory_null"] / (sums["memory_null"] + sums["injection"]),
                "steady": steady / (steady + 1),
                "kappa": sums["alignment"] / sums["memory_null"],
                "of_2b": sums["alignment"] / (steady * sums["injection"]),
                "low": groups["each"].min(),
                "high": groups["each"].max(),
            }
        )
        found.append(part.reset_index().assign(run=name))
    table = pd.concat(found, ignore_index=True)
    front = ["run", "role", "tenth"]
    return table[front + [name for name in table if name not in front]].sort_values(
        front, key=lambda column: column.map(list(RUNS).index) if column.name == "run" else column,
        ignore_index=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, default=os.environ.get("WEIGHTDYN_REFERENCE"),
                        help="copy of the public data of arXiv 2606.19367")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.reference is None:
        parser.error("--reference is needed, a copy of the public data")
    print(published_shares(arguments.reference).to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
