"""Recovered forces against the exact ones of the same checkpoints, where those hold the optimizer's state.

Four small trainings, every update logged, with a checkpoint of weights and optimizer every 50 updates. The exact
forces of the checkpoints (`forces_from_states`) are held against the log of the same updates; forces recovered from
the weights alone against them, as one would where nobody logged; and both against the log's means over the gaps, to
see what single updates can tell of a recovery. Writes data/states.md.

    OMP_NUM_THREADS=1 python benchmarks/study_states.py        # some ten minutes on one core
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cross_entropy

import weightdyn as wd
from weightdyn.core.progress import progress_bar
from weightdyn.train.corpus import Corpus
from weightdyn.train.models import make_model

OUT = Path(__file__).resolve().parent.parent / "data" / "states.md"
STEPS, EVERY = 600, 50
RUNS = {
    "A": ("tiny", wd.Recipe(wd.recipe.cosine(2e-3, STEPS, 50, 0.1), 0.1, (0.9, 0.95), steps=STEPS)),
    "B": ("tiny", wd.Recipe(wd.recipe.constant(1e-3, 50), 0.1, (0.9, 0.999), steps=STEPS)),
    "C": ("tiny-llama", wd.Recipe(wd.recipe.cosine(2e-3, STEPS, 50, 0.1), 0.5, (0.9, 0.95), steps=STEPS)),
    "D": ("tiny-llama", wd.Recipe(wd.recipe.constant(1e-3, 50), 0.01, (0.9, 0.999), steps=STEPS)),
}
FORCES = ("alignment", "injection", "decay")


def trained(name: str, recipe: wd.Recipe, folder: Path, seed: int) -> wd.RunLog:
    """Train, with a checkpoint of model and optimizer every 50 updates; the log."""
    model, corpus = make_model(name, seed), Corpus.read()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=recipe.betas, eps=recipe.eps)
    model.config.save_pretrained(folder)
    with wd.ForceLogger(optimizer, model) as logger:
        for step in progress_bar(range(STEPS + 1), progress=None, unit="update", desc=name):
            if step % EVERY == 0:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(saved, folder / f"step{step}.pt")
            if step == STEPS:
                break
            for group in optimizer.param_groups:
                group["lr"] = float(recipe.lr_at(step + 1))
            batch = corpus.batch(seed, step + 1, 8, 64)
            loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return logger.run


def matrices(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["component"].isin(["norm", "bias"])]


def markdown(table: pd.DataFrame) -> str:
    lines = [[*map(str, table.columns)], ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    exactness, accuracy = [], []
    for seed, (key, (name, recipe)) in enumerate(RUNS.items()):
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is known: where η stands, that step 0 has no update
            log = trained(name, recipe, Path(place), seed).forces()
            exact = wd.forces_from_states(place, lr=recipe, progress=False)
            measured = wd.Checkpoints(place).measure("full", weibull=False, cache=False, progress=False)
            both = exact.merge(log, on=["step", "tensor"], suffixes=("", "_log"))
            size = sum(both[f"{force}_log"].abs() for force in FORCES)
            error = pd.concat([(both[f] - both[f"{f}_log"]).abs() / size for f in FORCES], axis=1).max(axis=1)
            exactness.append({"run": key, "rows": len(both), "largest error": f"{error.max():.1e}"})
            for what, every, truth in (
                ("the checkpoints' own updates", EVERY, exact),
                ("the same updates of the log", EVERY, log),
                ("the log's means over the gaps", None, log),
            ):
                tables = {
                    method: matrices(wd.recover_forces(measured, recipe, method, every, progress=False))
                    for method in ("balance", "spline", "two_point")
                }
                found = wd.compare_recovery(matrices(truth), tables)
                accuracy += [{"run": key, "against": what, **row} for row in found.to_dict("records")]
    return exactness, accuracy


def main() -> None:
    exactness, accuracy = study()
    table = pd.DataFrame(accuracy)
    summary = table.groupby(["against", "pooling", "method"], sort=False)[
        ["median", "p90", "median_ratio"]
    ].median()
    percent = summary[["median", "p90"]].map("{:.1%}".format).assign(ratio=summary["median_ratio"].round(3))
    runs = table.pivot_table(
        index=["run", "against", "pooling"], columns="method", values="median", sort=False
    )
    text = f"""# Recovered forces against the exact ones of checkpoints

Written by `benchmarks/study_states.py`. Four trainings of 0.9 million weights on Python's source text, {STEPS}
updates, checkpoints of weights and optimizer every {EVERY}: A and B GPT-NeoX, C and D LLaMA; A and C cosine,
β₂ = 0.95, λ = 0.1 and 0.5; B and D constant, β₂ = 0.999, λ = 0.1 and 0.01. Nothing was fitted to them.

## The exact forces are the log's

Largest |difference| of a force over |alignment| + |injection| + |decay|, over all rows that both have:

{markdown(pd.DataFrame(exactness))}

## What they say of a recovery

|1 − ratio| of the recovered alignment of weight matrices, medians over the runs. Against single updates the error
has the scatter of a single update about its mean in it, which no method can know: a few percent of the sum over the
model, large for one tensor. The log of the same updates gives the same numbers, so it is that and not the reading
of states: the exact forces of checkpoints tell methods apart by the sum over the model, and by medians over many.

{markdown(percent.reset_index())}

Run by run, median:

{markdown(runs.map("{:.1%}".format).reset_index())}
"""
    OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
