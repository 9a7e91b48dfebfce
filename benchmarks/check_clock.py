"""What the decay clock says of trainings whose schedule and tokens are known, in every float type.

    OMP_NUM_THREADS=1 python benchmarks/check_clock.py [--runs runs/clock] > data/clock.md

Trains GPT-NeoX and LLaMA shapes of 0.9 million weights on Python's source text: two schedules, learning rates over
two orders of magnitude, decays 0.1 and 0.5, other seeds. Checkpoints every 10 updates are copied to float16 and
bfloat16 and read at gaps of 10, 50 and 200 updates. λ is what −ln(factor) and the recipe's η give; its error, and
the standard error that the clock gives itself, are relative. *leaked* counts rows of bytes that occur and that the
clock counted: it is given series in which all other rows are gone. Takes ten minutes on one core; runs that are
there already are used as they are.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import brentq
from tqdm import tqdm

import weightdyn as wd
from weightdyn.train.corpus import Corpus
from weightdyn.train.trainer import TrainConfig, train

STEPS, BATCH, LENGTH, SAVED = 200, 2, 64, 10
RUNS = {
    f"{model}, {schedule}, η {lr:g}, λ {decay:g}, seed {seed}": TrainConfig(
        model=model, schedule=schedule, lr=lr, weight_decay=decay, seed=seed, steps=STEPS, batch_size=BATCH,
        seq_len=LENGTH, warmup=20, save_every=SAVED, log_every=STEPS, weibull_every=STEPS, eval_every=STEPS,
        device="cpu",
    )
    for model, schedule, lr, decay, seed in [
        ("tiny", "cosine", 8e-3, 0.5, 0), ("tiny", "constant", 8e-3, 0.5, 1), ("tiny", "cosine", 1e-3, 0.1, 2),
        ("tiny", "constant", 1e-3, 0.1, 3), ("tiny", "cosine", 1e-4, 0.1, 4), ("tiny", "constant", 1e-4, 0.5, 5),
        ("tiny-llama", "cosine", 3e-3, 0.1, 6), ("tiny-llama", "constant", 3e-3, 0.5, 7),
    ]
}  # fmt: skip
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def occurring(config: TrainConfig) -> np.ndarray:
    """How often each byte was an input of the training."""
    corpus = Corpus.read()
    seen = [corpus.batch(config.seed, t, BATCH, LENGTH)[:, :-1].numpy().ravel() for t in range(1, STEPS + 1)]
    return np.bincount(np.concatenate(seen), minlength=256)


def decay_from(factor: float, lr: np.ndarray) -> float:
    """λ with Π (1−ηλ) = factor."""
    return brentq(lambda lam: np.log1p(-lr * lam).sum() - np.log(factor), -1, 10, xtol=1e-14)


def copied(run: Path, folder: Path, gap: int, dtype: str, rows: np.ndarray) -> Path:
    """The checkpoints at these gaps in this type, with some rows of the embedding of tokens."""
    folder.mkdir()
    for step in range(0, STEPS + 1, gap):
        content = load_file(run / "checkpoints" / f"step-{step:06d}.safetensors")
        (name,) = [name for name in content if "embed_in" in name or "embed_tokens" in name]
        content[name] = content[name][rows].contiguous()
        save_file(
            {name: each.to(TYPES[dtype]) for name, each in content.items()},
            folder / f"step{step}.safetensors",
        )
    return folder


def checked(name: str, run: Path, scratch: Path) -> list[dict]:
    """The rows of the report of one run."""
    config = RUNS[name]
    counts = occurring(config)
    found = []
    for dtype in TYPES:
        for gap in (10, 50, 200):
            place = scratch / f"{run.name}-{dtype}-{gap}"
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # of series without a value, which are the report's
                table = wd.decay_clock(copied(run, place, gap, dtype, counts >= 0), progress=False)
                used = wd.decay_clock(
                    copied(run, place.with_suffix(".used"), gap, dtype, counts > 0), progress=False
                )
            told = table[table["lr_decay"].notna()]
            lr = [
                config.recipe.lr_at(np.arange(row.step - row.span + 1, row.step + 1))
                for row in told.itertuples()
            ]
            ends = told[["factor", "factor_high", "factor_low"]].to_numpy()
            lam = np.array(
                [[decay_from(each, eta) for each in row] for row, eta in zip(ends, lr, strict=True)]
            )
            lam = lam.reshape(-1, 3)
            true = [float(np.log1p(-eta * config.weight_decay).sum()) for eta in lr]
            room = told["span"].to_numpy() * 2.0**-25  # what rounding 1 − ηλ to float32 may take
            inside = (np.log(ends[:, 2]) - room <= true) & (true <= np.log(ends[:, 1]) + room)
            found.append(
                {
                    "run": name, "type": dtype, "gap": gap, "never": int((counts == 0).sum()),
                    "once or twice": int(((counts > 0) & (counts < 3)).sum()), "rows": int(table["rows"].max()),
                    "leaked": int(used["rows"].max()), "gaps": len(table), "told": len(told),
                    "error": np.median(np.abs(lam[:, 0] / config.weight_decay - 1)) if len(told) else np.nan,
                    "largest": np.abs(lam[:, 0] / config.weight_decay - 1).max() if len(told) else np.nan,
                    "own": np.median((lam[:, 2] - lam[:, 1]) / 4 / config.weight_decay) if len(told) else np.nan,
                    "inside": inside.mean() if len(told) else np.nan,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: one that is deleted")
    with tempfile.TemporaryDirectory() as scratch:
        runs = parser.parse_args().runs or Path(scratch) / "runs"
        rows = []
        for i, (name, config) in enumerate(tqdm(RUNS.items(), unit="run")):
            train(config, runs / f"run{i}", progress=False)
            rows += checked(name, runs / f"run{i}", Path(scratch))
    table = pd.DataFrame(rows)
    print("# The decay clock against known schedules\n\nWritten by `benchmarks/check_clock.py`.\n")
    print((__doc__ or "").partition("> data/clock.md\n\n")[2].partition("Takes ten")[0].strip() + "\n")
    percent = ("error", "largest", "own")
    shown = table.assign(**{each: [f"{100 * value:.2g} %" for value in table[each]] for each in percent})
    shown["inside"] = [f"{100 * value:.0f} %" for value in table["inside"]]
    heads = {"error": "error of λ, median", "own": "its own standard error", "inside": "inside ±2"}
    heads |= {
        "never": "bytes that never occur",
        "once or twice": "that do once or twice",
        "rows": "rows counted",
    }
    print("| " + " | ".join(heads.get(each, each) for each in shown) + " |\n|" + "---|" * shown.shape[1])
    for row in shown.itertuples(index=False):
        print("| " + " | ".join(str(each) for each in row).replace("nan %", "–") + " |")


if __name__ == "__main__":
    main()
