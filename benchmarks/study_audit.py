"""Which wrong recipes and misplaced checkpoints the audit finds, and whether it leaves right ones alone.

The trainings are those of study_recovery.py. Where the size of updates lies was measured on the tuning runs, and is
held against the reporting runs here, with other seeds, batches, decays and schedules: each with its right recipe,
with recipes that have one fault, and with checkpoints that were copied, swapped or taken from another training.
Writes data/audit.md.

    OMP_NUM_THREADS=1 python benchmarks/study_audit.py --runs runs/recovery

A quarter of an hour beside the trainings, which study_recovery.py makes where they are not there yet.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from study_recovery import DATA, REPORTING, TUNING, steps_of

from weightdyn import Checkpoints, Recipe, RunLog, audit_recipe
from weightdyn.checkpoints.distances import STEADY
from weightdyn.checkpoints.recipe import all_but_embeddings_decay
from weightdyn.train.trainer import TrainConfig, train

GAPS = ("25", "100", "log")
HALF = (*GAPS, "50", "200")


def faults(config: TrainConfig) -> dict[str, tuple[Recipe, str, str]]:
    """Name -> a recipe with one fault, the check that must contradict it, and words that name the fault."""
    right = config.recipe
    lr = right.lr_at(np.arange(1, config.steps + 1))
    floor = replace(config, floor=0.3).recipe.lr
    decay = config.weight_decay
    found = {
        "decay ×10": (replace(right, weight_decay=10 * decay), "decay rate", "λ was"),
        "decay ×0.1": (replace(right, weight_decay=decay / 10), "decay rate", "λ was"),
        "η ×2, λ ×½": (
            replace(right, lr=2 * lr, weight_decay=decay / 2),
            "update size",
            "ηλ is the recipe's",
        ),
        "η ×½, λ ×2": (
            replace(right, lr=lr / 2, weight_decay=2 * decay),
            "update size",
            "ηλ is the recipe's",
        ),
        "update scale 2.24": (replace(right, update_scale=2.24), "update size", "squared displacements"),
        "one update early": (replace(right, lr=np.append(lr[1:], lr[-1])), "decay rate", "1 update later"),
        "one update late": (replace(right, lr=np.append(0.0, lr[:-1])), "decay rate", "1 update earlier"),
        "embeddings not decayed": (replace(right, decays=all_but_embeddings_decay), "decayed", "shrink"),
    }
    if config.schedule == "cosine":
        found["floor 0.3 for 0.1"] = replace(right, lr=floor), "decay rate", "of its peak by step"
    return found


def places(run: RunLog, gap: str, last: int) -> dict[int, Path]:
    folder = run.path / "checkpoints"
    return {step: folder / f"step-{step:06d}.safetensors" for step in steps_of(gap, last)}


def misplaced(found: dict[int, Path], other: dict[int, Path]) -> dict[str, dict[int, Path]]:
    """Name -> the series with a fault in its middle."""
    steps = sorted(found)
    a, b = steps[len(steps) // 2 : len(steps) // 2 + 2]
    return {
        "a copy": found | {b: found[a]},
        "two swapped": found | {a: found[b], b: found[a]},
        "one of another training": found | {a: other[a]},
    }


def halves(found: dict[int, Path], folder: Path) -> dict[int, Path]:
    for step, path in found.items():
        half = {name: w.to(torch.float16) for name, w in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(half, folder / f"step-{step:06d}.safetensors")
    return {step: folder / f"step-{step:06d}.safetensors" for step in found}


def audits(
    name: str, run: RunLog, config: TrainConfig, other: RunLog, scratch: Path
) -> Iterator[dict[str, object]]:
    """One row for each audit of a run."""
    architecture = run.info["train"]["architecture"]
    last = config.steps

    def row(
        kind: str,
        gap: str,
        files: dict[int, Path],
        recipe: Recipe,
        check: str = "",
        words: str = "",
        dtype="float32",
    ):
        series = Checkpoints(files, config=architecture)
        found = audit_recipe(series, recipe, cache=scratch / f"{name}-{dtype}", progress=False)
        said = found.findings[found.findings["verdict"] == "contradicts"]
        sizes = found.table[found.table["check"] == "update size"]["measured"]
        own = said[said["check"] == check]["sentence"]
        return {
            "run": name, "kind": kind, "gap": gap, "dtype": dtype, "contradictions": len(said),
            "found": len(own) > 0,
            "named": own.str.contains(words, regex=False).any(), "size": sizes.median(), "verdict": found.verdict,
            "said": " | ".join(said["sentence"]),
        }  # fmt: skip

    for gap in HALF:
        files = places(run, gap, last)
        yield row("right", gap, files, config.recipe)
        with tempfile.TemporaryDirectory() as folder:
            yield row("right", gap, halves(files, Path(folder)), config.recipe, dtype="float16")
    for gap in GAPS if name in REPORTING else ():
        files = places(run, gap, last)
        for kind, (recipe, check, words) in faults(config).items():
            yield row(kind, gap, files, recipe, check, words)
        for kind, wrong in misplaced(files, places(other, gap, last)).items():
            yield row(kind, gap, wrong, config.recipe, "order", ORDER[kind])


ORDER = {
    "a copy": "hold the same weights",
    "two swapped": "stand in each other's place",
    "one of another training": "does not lie between",
}


def share(values: pd.Series) -> str:
    return f"{int(values.sum())} of {len(values)}"


def report(rows: pd.DataFrame) -> str:
    right = rows[rows["kind"] == "right"]
    lines = [
        "# What the audit finds",
        "Written by `benchmarks/study_audit.py`, on the trainings of `study_recovery.py`.",
        '## Right recipes\n\nSeries in which something contradicts, and those whose verdict is "agrees".\n\n'
        "| runs | type | contradicted | agrees |\n|---|---|---|---|",
    ]
    for (kind, dtype), own in right.groupby([right["run"].isin(list(REPORTING)), "dtype"]):
        lines[-1] += (
            f"\n| {'reporting' if kind else 'tuning'} | {dtype} | {share(own['contradictions'] > 0)} "
            f"| {share(own['verdict'] == 'agrees')} |"
        )
    wrong = right[right["contradictions"] > 0]
    lines.append(
        "\n".join(f"- {row.run}, {row.gap}, {row.dtype}: {row.said}" for row in wrong.itertuples())
        or "Nothing contradicts any of them."
    )
    sizes = right[(right["dtype"] == "float32") & (right["gap"] != "log")]
    lines.append(
        "## The size of updates\n\n‖W_b − ΠW_a‖² over that of white noise, the median over the gaps of a "
        "series, from the least to the largest over the runs, right recipes, float32. "
        f"Accepted are {STEADY[0]} to {STEADY[1]}.\n\n"
        "| gap | tuning | reporting |\n|---|---|---|"
    )
    for gap in sorted(set(sizes["gap"]), key=int):
        own = sizes[sizes["gap"] == gap]
        ends = [own[own["run"].isin(list(group))]["size"].dropna() for group in (TUNING, REPORTING)]
        lines[-1] += (
            f"\n| {gap} | " + " | ".join(f"{each.min():.2f} to {each.max():.2f}" for each in ends) + " |"
        )
    rest = rows[rows["kind"] != "right"]
    lines.append(
        "## Faults\n\nReporting runs, float32, by gap: series in which the check that must contradicts, and in "
        "which its sentence names the fault.\n\n| fault | "
        + " | ".join(GAPS)
        + " | named |\n|---|"
        + "---|" * (len(GAPS) + 1)
    )
    for kind, own in rest.groupby("kind", sort=False):
        by_gap = [share(own[own["gap"] == gap]["found"]) for gap in GAPS]
        lines[-1] += f"\n| {kind} | " + " | ".join(by_gap) + f" | {share(own['named'])} |"
    missed = rest[~rest["found"].astype(bool)]
    listed = [
        f"- {row.kind}: {row.run}, gap {row.gap}; said: {row.said or 'nothing'}"
        for row in missed.itertuples()
    ]
    lines.append("Not found:" + ("\n\n" + "\n".join(listed) if listed else " none."))
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/recovery"), help="where the trainings are kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = {**TUNING, **REPORTING}
    runs = {name: train(each, arguments.runs / name) for name, each in configs.items()}
    strangers = {
        model: [name for name in configs if configs[name].model == model] for model in ("tiny", "tiny-llama")
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs.items():
            others = [
                other
                for other in strangers[config.model]
                if other != name and configs[other].steps >= config.steps
            ]
            others = others or [other for other in strangers[config.model] if other != name]
            rows += audits(name, runs[name], config, runs[others[0]], Path(scratch))
            print(name, flush=True)
    text = report(pd.DataFrame(rows))
    (DATA / "audit.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
