"""How accurate forces are that were recovered from checkpoints: small trainings with exact logs.

Each run is trained with every update logged and a checkpoint every 25 updates. Its forces are then recovered
from some of the checkpoints (gaps of 25 to 400 updates, or log-spaced), stored in float32 or rounded to float16,
and held against the log. Eight runs were used to fit the constants of `weightdyn.checkpoints.recovery`; twelve
others, and what `weightdyn demo` trains, were used for nothing but the report. Half of the former and a third of
the latter have a short τ = 1/(ηλ), and gaps of half of it, of it and of twice it.
Writes data/recovery_accuracy.csv, data/recovery_accuracy.png,
data/recovery_drift.csv, data/recovery_drift.png, data/recovery.md.

    OMP_NUM_THREADS=1 python benchmarks/study_recovery.py --runs runs/recovery

Training takes half an hour to an hour on one core; runs that are there already are used as they are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize

from weightdyn import plot
from weightdyn.checkpoints.published import NUMEL, read_published_forces, read_published_recovery
from weightdyn.checkpoints.recipe import Recipe
from weightdyn.checkpoints.recovery import (
    compare_recovery,
    injection_scale,
    interval_means,
    noise_walk,
    norm_between,
    recover_forces,
)
from weightdyn.checkpoints.series import Checkpoints
from weightdyn.core.forces import memory_null, noise_rho
from weightdyn.record.runlog import RunLog
from weightdyn.train.trainer import DEMO, TrainConfig, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = Path(__file__).resolve().parent.parent / "data"


def config(model, batch_size, beta2, weight_decay, schedule, steps, seed, lr=1e-3) -> TrainConfig:
    return TrainConfig(
        model=model, batch_size=batch_size, betas=(0.9, beta2), weight_decay=weight_decay, schedule=schedule,
        steps=steps, seed=seed, lr=lr, seq_len=64, warmup=50, device="cpu",
        weibull_every=steps, eval_every=steps, save_every=25,
    )  # fmt: skip


TUNING = {
    "T1": config("tiny", 4, 0.95, 0.1, "cosine", 800, 11),
    "T2": config("tiny-llama", 16, 0.999, 0.01, "constant", 800, 12),
    "T3": config("tiny", 16, 0.999, 0.1, "cosine", 800, 13),
    "T4": config("tiny-llama", 4, 0.95, 0.1, "constant", 800, 14, lr=3e-3),
}
LONG_TUNING = {
    "T5": config("tiny", 8, 0.95, 1.0, "cosine", 1200, 15, lr=5e-3),
    "T6": config("tiny-llama", 8, 0.95, 1.0, "constant", 1200, 16, lr=4e-3),
    "T7": config("tiny", 16, 0.95, 0.5, "cosine", 1500, 17, lr=8e-3),
    "T8": config("tiny-llama", 16, 0.999, 0.5, "cosine", 1200, 18, lr=1e-2),
}
REPORTING = {
    "R1": config("tiny", 2, 0.95, 0.1, "cosine", 1200, 1),
    "R2": config("tiny", 8, 0.999, 0.01, "cosine", 800, 2),
    "R3": config("tiny", 32, 0.95, 0.1, "constant", 800, 3),
    "R4": config("tiny-llama", 2, 0.999, 0.1, "constant", 1200, 4),
    "R5": config("tiny-llama", 8, 0.95, 0.01, "cosine", 800, 5),
    "R6": config("tiny-llama", 32, 0.999, 0.1, "cosine", 800, 6),
    "R7": config("tiny", 8, 0.95, 0.1, "cosine", 800, 7, lr=4e-3),
    "R8": config("tiny-llama", 16, 0.95, 0.01, "constant", 800, 8),
}
LONG = {
    "N1": config("tiny", 4, 0.95, 1.0, "cosine", 1500, 21, lr=4e-3),
    "N2": config("tiny", 16, 0.999, 1.0, "constant", 1200, 22, lr=5e-3),
    "N3": config("tiny-llama", 16, 0.95, 0.5, "cosine", 1500, 23, lr=8e-3),
    "N4": config("tiny-llama", 4, 0.999, 2.0, "constant", 1200, 24, lr=2.5e-3),
}
DEMONSTRATION = {"demo": replace(DEMO, device="cpu")}
TAKEN = """What to take from it:

- Balance is within 0.6 % pooled and 0.7 % per tensor (medians) at every even gap from 25 to 400, and within 0.4 and
  0.5 % with log-spaced checkpoints, whose first gaps the part of a gradient that lasts explains.
- β₂ decides how good it is. With 0.95 the runs lie at 0.06 to 0.34 % pooled and 0.2 to 0.6 % per tensor. With 0.999
  (R2, R4, R6) √v̂ remembers more updates than these trainings have, and pooled errors are 0.5 to 1.1 %: diffusion of
  all matrices comes out a tenth to a fifth too small, and the sum does not average that out. Per tensor the
  displacement beats theory alone in every run; pooled and at gaps of 100 and more, theory alone is as good or
  better, in the median and the 90th percentile.
- Where a gap is long against τ, alignment is known as well as decay is: within 1.5 % per tensor at τ/2, 2.1 % at τ
  and 3.4 % at 2τ (medians; pooled 0.8, 0.9 and 2.4 %), and worst in the first gap, if it holds all of the growth.
- The interval holds the logged alignment in 95 to 99 % of the rows, whatever the gap, and the logged drift in 92 to
  96 %; without displacements in 88 to 95 %.
- The spline's alignment is too large, about by the injection that a smooth path lacks.
- The alignment of these reporting runs was recovered once, with the law as it stands. The forces of R1 to R8 had
  been seen in a report of an earlier one, and the logged ρ of R1 and R5 before that."""
DRIFT_TAKEN = """What to take from it:

- Diffusion is 19 times injection where η is steady, so what a wrong ρ costs alignment once it costs drift 19 times.
  The drift of all matrices together is within 4 to 6 % of the budget (median) at even gaps, that of one matrix
  within 8 to 13 %; the guess of no drift errs by 26 to 31 %. With log-spaced checkpoints it is 7 and 12 %.
- Its sign is right in 83 to 91 % of the even gaps for all matrices together and in 83 to 86 % for one. Where the
  interval leaves zero out (25 to 40 % of the even gaps) the sign is right in 96 to 100 %.
- Embeddings fail: three fifths of their rows, bytes that the text lacks, get no gradient; the displacement makes up
  for a small part of that, diffusion comes out nearly twice too large, and the sign of their drift is wrong more
  often than right, even where it is told. Of the unembedding memory is larger than white noise's (diffusion a third
  too small), so its interval is too narrow; but nearly all of its budget is drift, and its sign is right.
- The spline with the same diffusion gives the same drift, for its forces add up as those of the budget do. Two
  points do not, and their drift is of no use."""
LOGGED = ("injection", "decay", "drift", "memory")
GAPS = ("25", "50", "100", "200", "400", "log")
LONG_GAPS = ("τ/2", "τ", "2τ", "log")
GROUPS = {
    "reporting": (REPORTING, GAPS),
    "tuning": (TUNING, GAPS),
    "long": (LONG, LONG_GAPS),
    "long, tuning": (LONG_TUNING, LONG_GAPS),
    "demo": (DEMONSTRATION, ("own",)),
}
METHODS = {
    "balance": "balance",
    "balance, ‖W‖² alone": "balance",  # constant ρ: no inner products
    "spline": "spline",
    "two_point": "two_point",
}


def steps_of(gap: str, last: int, tau: float = np.nan) -> list[int]:
    """Evenly spaced; or as Pythia's checkpoints, 0, 1, 2, 4 … 512 and then evenly, every 200; or all there are."""
    if gap == "log":
        return [0, *(2**i for i in range(10)), *range(600, last + 1, 200)]
    if gap == "own":
        return list(range(last + 1))
    every = {"τ/2": 0.5, "τ": 1.0, "2τ": 2.0}.get(gap)
    return list(range(0, last + 1, int(gap) if every is None else round(every * tau)))


def measured(run: RunLog, dtype: str) -> pd.DataFrame:
    """The run's checkpoints with all inner products, as they are or rounded to float16."""
    options: dict[str, Any] = {"gram": "full", "weibull": False, "progress": False}
    if dtype == "float32":
        return Checkpoints(run.path).measure(**options)
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((run.path / "checkpoints").glob("step-*.safetensors")):
            half = {name: w.to(torch.float16) for name, w in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(half, Path(folder) / file.name)
        architecture = run.info["train"]["architecture"]
        return Checkpoints(folder, config=architecture).measure(cache=False, **options)


def recovered(series: pd.DataFrame, recipe: Recipe, gap: str, tau: float = np.nan) -> dict[str, pd.DataFrame]:
    series = series[series["step"].isin(steps_of(gap, series["step"].max(), tau))]
    return {
        name: recover_forces(series.drop(columns="dots") if "alone" in name else series, recipe, method)
        for name, method in METHODS.items()
    }


def apart(table: pd.DataFrame, place: int) -> pd.DataFrame:
    """Tables of several runs in one: with steps and tensors of their own, their rows do not mix."""
    return table.assign(step=table["step"] + 10**6 * place, tensor=f"{place} " + table["tensor"].astype(str))


def study(runs: dict[str, RunLog]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of every method, gap and run; and the rows of balance with what was logged beside."""
    found, beside = [], []
    for kind, (names, gaps) in GROUPS.items():
        logs = {name: runs[name].forces() for name in names}
        every_log = pd.concat([apart(logs[name], i) for i, name in enumerate(names)])
        for dtype in ("float32", "float16") if gaps == GAPS else ("float32",):
            tables: dict[tuple[str, str, str], pd.DataFrame] = {}
            for name, one in names.items():
                series = measured(runs[name], dtype)
                recipe = Recipe.from_run(runs[name])
                for gap in gaps:
                    tau = 1 / (one.lr * one.weight_decay)
                    for method, table in recovered(series, recipe, gap, tau).items():
                        tables[name, gap, method] = table
                    if dtype == "float32":
                        own = with_logged(chosen(tables[name, gap, "balance"], "matrices"), logs[name])
                        beside.append(own.assign(kind=kind, run=name, gap=gap))
            for tensors in ("matrices", "all"):
                for gap in gaps:
                    by_run = {
                        name: {method: chosen(tables[name, gap, method], tensors) for method in METHODS}
                        for name in names
                    }
                    joined = {
                        method: pd.concat([apart(by_run[name][method], i) for i, name in enumerate(names)])
                        for method in METHODS
                    }
                    joined = {method: table.reset_index(drop=True) for method, table in joined.items()}
                    parts = {"all": compare_recovery(every_log, joined)}
                    parts |= {name: compare_recovery(logs[name], by_run[name]) for name in names}
                    for name, part in parts.items():
                        part.insert(0, "gap", gap)
                        part.insert(0, "tensors", tensors)
                        part.insert(0, "dtype", dtype)
                        part.insert(0, "run", name)
                        part.insert(0, "kind", kind)
                        part["rounding"] = np.repeat(
                            [
                                flagged(joined[m] if name == "all" else by_run[name][m])
                                for m in part["method"].unique()
                            ],
                            2,
                        )
                        found.append(part)
    return pd.concat(found, ignore_index=True), pd.concat(beside, ignore_index=True)


def with_logged(table: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """A recovered table with the logged drift and diffusion over the same updates, and the size of the budget."""
    logged = {name: interval_means(log, table, name) for name in LOGGED}
    diffusion = logged["injection"] + logged["memory"]
    return table.assign(
        diffusion=table["injection"] + table["memory"],
        logged_alignment=interval_means(log, table),
        logged_drift=logged["drift"],
        logged_diffusion=diffusion,
        size=logged["drift"].abs() + diffusion.abs() + logged["decay"].abs(),
        part=table["role"].astype(str).where(table["role"] != "other", table["component"].astype(str)),
    )


def by_part(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """How good the recovered drift is, by groups of rows."""
    error = ((rows["drift"] - rows["logged_drift"]) / rows["size"]).abs()
    sign = np.sign(rows["logged_drift"])
    told = (rows["drift_low"] > 0) | (rows["drift_high"] < 0)
    right = np.sign(rows["drift"]) == sign
    groups = rows.assign(
        rows=1,
        median=error,
        p90=error,
        diffusion_median=((rows["diffusion"] - rows["logged_diffusion"]) / rows["size"]).abs(),
        diffusion_ratio=rows["diffusion"] / rows["logged_diffusion"],
        zero=rows["logged_drift"].abs() / rows["size"],
        negative=sign < 0,
        sign=right,
        told=told,
        told_right=right.where(told),
        inside=rows["logged_drift"].between(rows["drift_low"], rows["drift_high"]),
    ).groupby(keys, sort=False)
    how = dict.fromkeys(("negative", "sign", "told", "told_right", "inside"), "mean")
    how |= dict.fromkeys(("median", "diffusion_median", "diffusion_ratio", "zero"), "median")
    how |= {"rows": "sum", "p90": lambda column: column.quantile(0.9)}
    order = ["rows", "median", "p90", "zero", "negative", "sign", "told", "told_right", "inside"]
    named = groups.agg({**how, "told_right": lambda column: column.astype(float).mean()})
    return named[[*order, "diffusion_median", "diffusion_ratio"]].reset_index()


def held(rows: pd.DataFrame, keys: list[str], *wanted: str) -> str:
    """How good the recovered alignment is, by groups of rows: a table of the columns wanted."""
    error = (1 - rows["alignment"] / rows["logged_alignment"]).abs()
    whole = rows.groupby([*keys, *{"run", "gap", "step"}.difference(keys)], sort=False)[
        ["alignment", "logged_alignment"]
    ].sum()
    off = (1 - whole["alignment"] / whole["logged_alignment"]).abs().groupby(keys, sort=False)
    each = error.groupby([rows[key] for key in keys], sort=False)
    inside = rows["logged_alignment"].between(rows["alignment_low"], rows["alignment_high"])
    drift = rows["logged_drift"].between(rows["drift_low"], rows["drift_high"])
    columns = {
        "median": each.median(),
        "p90": each.quantile(0.9),
        "pooled": off.median(),
        "pooled_p90": off.quantile(0.9),
        "inside": inside.groupby([rows[key] for key in keys], sort=False).mean(),
        "drift_inside": drift.groupby([rows[key] for key in keys], sort=False).mean(),
    }
    heads = {
        "median": "per tensor",
        "p90": "90th percentile",
        "pooled": "pooled",
        "pooled_p90": "90th percentile, pooled",
        "inside": "alignment inside",
        "drift_inside": "drift inside",
    }
    lines = ["| " + " | ".join([*keys, "rows", *(heads[name] for name in wanted)]) + " |"]
    lines.append("|---" * (len(keys) + 1 + len(wanted)) + "|")
    for key, count in each.size().items():
        names = key if isinstance(key, tuple) else (key,)
        cells = (f"{columns[name].loc[key]:.2%}" for name in wanted)
        lines.append("| " + " | ".join([*map(str, names), f"{count:,}", *cells]) + " |")
    return "\n".join(lines)


def intervals(table: pd.DataFrame) -> str:
    """The fraction of rows inside their interval, for every kind of run and gap, with and without displacements."""
    own = table[
        (table["tensors"] == "matrices") & (table["run"].isin(["all"])) & (table["dtype"] == "float32")
    ]
    own = own[(own["pooling"] == "tensor") & own["method"].str.startswith("balance")]
    wide = own.pivot_table(["inside", "drift_inside"], ["kind", "gap"], "method", sort=False)
    ways = [(what, way) for what in ("inside", "drift_inside") for way in own["method"].unique()]
    heads = [f"{'alignment' if what == 'inside' else 'drift'}, {way}" for what, way in ways]
    lines = ["| runs | gap | " + " | ".join(heads) + " |", "|---" * (2 + len(ways)) + "|"]
    for (kind, gap), row in wide.iterrows():
        lines.append(f"| {kind} | {gap} | " + " | ".join(f"{row[way]:.1%}" for way in ways) + " |")
    return "\n".join(lines)


def drift_table(rows: pd.DataFrame, keys: list[str]) -> str:
    head = [*keys, "intervals", "error", "90th percentile", "error of 0", "negative", "sign right",
            "sign told", "told right", "inside", "diffusion/logged"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in by_part(rows, keys).itertuples():
        names = [str(getattr(row, key)) for key in keys]
        shares = (row.median, row.p90, row.zero, row.negative, row.sign, row.told, row.told_right, row.inside)
        cells = [*names, f"{row.rows:,}", *(f"{share:.0%}" for share in shares), f"{row.diffusion_ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_step(runs: dict[str, RunLog]) -> str:
    """Log-spaced checkpoints, one by one: pooled errors of the reporting runs by the end of the gap."""
    found = []
    for name in REPORTING:
        recipe, log = Recipe.from_run(runs[name]), runs[name].forces()
        tables = recovered(chosen(measured(runs[name], "float32"), "matrices"), recipe, "log")
        for step in steps_of("log", 800)[1:]:
            part = compare_recovery(
                log, {m: each[each["step"] == step].reset_index(drop=True) for m, each in tables.items()}
            )
            found.append(part[part["pooling"] == "model"].assign(update=step))
    table = pd.concat(found).groupby(["update", "method"], sort=False)["median"].median().reset_index()
    return pivot(table, "median", "update")


def chosen(table: pd.DataFrame, tensors: str) -> pd.DataFrame:
    if tensors == "all":
        return table
    return table[~table["component"].isin(["norm", "bias"])].reset_index(drop=True)


def flagged(table: pd.DataFrame) -> float:
    """Fraction of rows that lie under the resolution of the stored weights."""
    return float((table["flag"].astype(str) == "rounding").mean())


def observations(runs: dict[str, RunLog]) -> pd.DataFrame:
    """What the tuning runs' matrices logged over every gap, and their displacement: ρ, to which the factor on ρ is
    fitted, and diffusion, which is estimated with it, in units of the injection of noise in theory."""
    found = []
    for name in (*TUNING, *LONG_TUNING):
        series = chosen(measured(runs[name], "float32"), "matrices")
        log, recipe = runs[name].forces(), Recipe.from_run(runs[name])
        last, beta1 = series["step"].max(), recipe.betas[0]
        for gap in GAPS:
            steps = np.array(steps_of(gap, last))
            starts, span = steps[:-1], np.diff(steps)
            lr = recipe.lr_at(np.arange(1, steps[-1] + 1))
            noise = lr**2 * noise_rho(np.arange(1, steps[-1] + 1), beta1)
            decay = recipe.weight_decay
            walk = noise_walk(lr, steps, recipe.betas, decay)
            shrink = np.exp(np.add.reduceat(np.log1p(-lr * decay), starts))
            full = np.add.reduceat(noise * (1 + memory_null(lr, beta1, decay)), starts)
            theory = np.add.reduceat(noise, starts)
            for tensor, rows in series[series["step"].isin(steps)].groupby(
                "tensor", sort=False, observed=True
            ):
                own = log[log["tensor"] == tensor].sort_values("step")
                numel, norm_sq = own["numel"].iloc[0], rows["norm_sq"].to_numpy()
                known = [
                    dict(zip(*pair, strict=True))
                    for pair in zip(rows["dot_steps"], rows["dots"], strict=True)
                ]
                dot = np.array([late[before] for before, late in zip(steps, known[1:], strict=False)])
                moved_sq = norm_sq[1:] - 2 * shrink * dot + shrink**2 * norm_sq[:-1]
                total = {
                    name: np.add.reduceat(own[name].to_numpy()[: steps[-1]], starts)
                    for name in (*LOGGED, "alignment")
                }
                unit = theory * numel
                columns = {
                    **walk._asdict(),
                    "true": total["injection"] / unit,
                    "share": total["injection"] / np.abs(total["alignment"]),
                    "factor": injection_scale(moved_sq, norm_sq[:-1], numel, walk, beta1),
                    "q": moved_sq / numel,
                    "turned": np.sqrt(np.maximum(moved_sq, 0) / norm_sq[:-1]),
                    "full": full / theory,
                    "displacement": moved_sq / numel / walk.noise * full / theory,
                    "diffusion": (total["injection"] + total["memory"]) / unit,
                    "size": (
                        np.abs(total["drift"])
                        + np.abs(total["injection"] + total["memory"])
                        + np.abs(total["decay"])
                    )
                    / unit,
                }
                found.append(pd.DataFrame(columns).assign(run=name, gap=gap, start=starts, span=span))
    table = pd.concat(found, ignore_index=True)
    return table[(table["q"] > 0) & (table["true"] > 0)]


def noise_along(runs: dict[str, RunLog]) -> list[float]:
    """Noise of single updates' drift over 2η‖w‖, which noise alike in all directions has, behind the warm-up."""
    found = []
    for name in (*TUNING, *LONG_TUNING):
        log = chosen(runs[name].forces(), "matrices").query("step > 60").sort_values("step")
        log = log.assign(noise=log["drift"] / (2 * log["lr"] * np.sqrt(log["norm_sq"])))
        found += [
            np.sqrt(np.mean(np.diff(own) ** 2) / 2)
            for _, own in log.groupby("tensor", observed=True)["noise"]
        ]
    return found


def estimates(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Ways to tell the diffusion of a gap, in the units of `observations`; the last one needs a log."""
    return {
        "ρ in theory": table["full"],
        "ρ of the displacement": table["full"] * table["factor"],
        "the displacement itself": table["displacement"],
        "logged ρ": table["full"] * table["true"],
    }


def tried(table: pd.DataFrame) -> str:
    """Errors of each way to tell the diffusion, over the budget: median and 90th percentile by gap."""
    lines = ["| diffusion from | " + " | ".join(GAPS) + " |", "|---" * (len(GAPS) + 1) + "|"]
    for name, estimate in estimates(table).items():
        errors = ((estimate - table["diffusion"]) / table["size"]).abs().groupby(table["gap"])
        cells = (
            f"{errors.get_group(gap).median():.1%}, {errors.get_group(gap).quantile(0.9):.0%}" for gap in GAPS
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fit(runs: dict[str, RunLog]) -> None:
    """The constants of `injection_scale`, `RHO_SPREAD` and `DIFFUSION_SPREAD`, from the tuning runs alone."""
    table = observations(runs)
    along = noise_along(runs)
    print(
        f"NOISE_ALONG: median {np.median(along):.1f} of {len(along)} matrices, {min(along):.1f} to {max(along):.1f}"
    )
    print("diffusion, error over the budget, median and 90th percentile by gap:\n" + tried(table))
    count = np.fmax(table["lr_sum"] ** 2 / table["lr_sq_sum"], 1.0)
    beyond, said = (count - 1) / (count + 9), np.log(table["q"] / table["noise"])
    rest = table["lr_sum"] ** 2 - table["noise"]
    common = ((table["q"] - table["noise"]) / rest.where(rest > 0)).clip(0, 1).fillna(0)
    lasting = np.where(said > 0, np.log1p(common * (1 / table["rho"] - 1)), said * (1 - beyond))
    true = np.log(table["true"])
    # What the error of ρ is of alignment; each grid of each run counts alike.
    share = table["share"].clip(upper=table["share"].quantile(0.97))
    weight = 1 / table.groupby(["gap", "run"])["q"].transform("size")

    def factor(constants: np.ndarray) -> pd.Series:
        cancel, fade, turn = constants
        passing = (said + cancel * beyond) / np.sqrt(1 + (count - 1) / (fade * table["stale"]))
        return passing + (lasting - passing) / (1 + (table["turned"] / turn) ** 2)

    def error(constants: np.ndarray) -> float:
        if min(constants) <= 0:
            return np.inf
        off = np.expm1(factor(constants) - true) * share
        return float((np.hypot(off, 0.003) * weight).sum() / weight.sum())

    print("constants of injection_scale:", minimize(error, (0.3, 500, 0.3), method="Nelder-Mead").x.round(3))
    long = table["span"] >= 25
    off = (true - np.log(table["factor"])).abs() / np.cbrt(table["stale"]) / beyond
    print(f"RHO_SPREAD['displacement']: {by_grid(off[long], table):.2f}")
    print(f"RHO_SPREAD['noise']: {by_grid((true.abs() / np.cbrt(table['stale']))[long], table):.2f}")
    ways = estimates(table)
    for name, way in (("displacement", "ρ of the displacement"), ("noise", "ρ in theory")):
        ratio = (table["diffusion"] / ways[way])[table["gap"].isin(["200", "400"])]
        off = np.log(ratio.where(ratio > 0)).abs() / table["stale"] ** (1 / 6)
        print(f"DIFFUSION_SPREAD[{name!r}]: {by_grid(off.dropna(), table, 0.925):.2f}")


def by_grid(off: pd.Series, table: pd.DataFrame, inside: float = 0.95) -> float:
    """Median over the grids of gaps of what holds a fraction of their rows."""
    return float(off.groupby(table["gap"]).quantile(inside).median())


def decays(runs: dict[str, RunLog]) -> str:
    """Ways to tell ‖w‖² between checkpoints, by what their decay is off, over alignment: medians, per tensor and
    pooled, and the 90th percentile per tensor. The tuning runs with a short τ."""
    found = []
    for name, one in LONG_TUNING.items():
        series = chosen(measured(runs[name], "float32"), "matrices")
        log, recipe = runs[name].forces(), Recipe.from_run(runs[name])
        for gap in LONG_GAPS:
            steps = np.array(steps_of(gap, series["step"].max(), 1 / (one.lr * one.weight_decay)))
            lr, starts, ends = recipe.lr_at(np.arange(1, steps[-1] + 1)), steps[:-1], steps[1:]
            for tensor, rows in series[series["step"].isin(steps)].groupby(
                "tensor", sort=False, observed=True
            ):
                own = log[log["tensor"] == tensor].sort_values("step").iloc[: steps[-1]]
                norm_sq, clock = rows["norm_sq"].to_numpy(), np.append(0.0, np.cumsum(lr))
                path, bend = norm_between(norm_sq, steps, lr, one.weight_decay)
                dots = [row[-2:] for row in rows["dots"][1:]]
                ways = {
                    "a monotone cubic (PCHIP) over Ση": PchipInterpolator(clock[steps], norm_sq)(clock),
                    "the mean pull of each gap": path - bend,
                    "pull and walk, each steady, from ⟨W_a,W_b⟩": both(
                        norm_sq, dots, steps, lr, one.weight_decay
                    ),
                    "a pull that runs on from gap to gap": path,
                }
                loss = (2 - lr * one.weight_decay) * lr * one.weight_decay
                true, logged = (np.add.reduceat(own[c].to_numpy(), starts) for c in ("alignment", "decay"))
                for way, each in ways.items():
                    off = -np.add.reduceat(loss * each[:-1], starts) - logged
                    found.append(
                        pd.DataFrame(
                            {"run": name, "gap": gap, "step": ends, "way": way, "off": off, "of": true}
                        )
                    )
    table = pd.concat(found)
    pooled = table.groupby(["way", "gap", "run", "step"], sort=False)[["off", "of"]].sum().reset_index()
    lines = [
        "| ‖w‖² between checkpoints | " + " | ".join(LONG_GAPS) + " |",
        "|---" * (len(LONG_GAPS) + 1) + "|",
    ]
    for way in table["way"].unique():
        cells = []
        for gap in LONG_GAPS:
            one, whole = (
                (rows["off"] / rows["of"]).abs()[(rows["way"] == way) & (rows["gap"] == gap)]
                for rows in (table, pooled)
            )
            cells.append(f"{one.median():.2%}, {one.quantile(0.9):.1%}; {whole.median():.2%}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def both(norm_sq: np.ndarray, dots: list, steps: np.ndarray, lr: np.ndarray, decay: float) -> np.ndarray:
    """‖w‖² if the way d from W_a goes on evenly along W_a, and as an even walk across it."""
    path = [norm_sq[:1]]
    for i, (a, b) in enumerate(itertools.pairwise(steps)):
        kept = np.cumprod(1 - lr[a:b] * decay)
        along, across = np.cumsum(lr[a:b] / kept), np.cumsum(lr[a:b] / kept**2)
        moved, dot = kept[-1], dots[i][0]
        way = kept * along / (moved * along[-1]) * (dot - moved * norm_sq[i])
        walk = norm_sq[i + 1] - 2 * moved * dot + moved**2 * norm_sq[i]
        path.append(kept**2 * norm_sq[i] + 2 * kept * way + kept**2 * across / (moved**2 * across[-1]) * walk)
    return np.concatenate(path)


def paper(folder: Path) -> list[str]:
    """Why the published spline recovery has a median ratio of 0.935, from the published files."""
    table = read_published_recovery(folder / "spline_from_ckpt_pythia2.json")
    log = read_published_forces(folder / "self_train" / "baseline_force.jsonl")
    injection = np.interp(table["step"], log["step"], log["injection"]) * 200_000 / NUMEL
    after, smooth, before = table["true"], table["true"] - injection, table["true"] - 2 * injection
    return [
        f"- spline / logged, as published: median {table['ratio'].median():.3f} over {len(table)} steps "
        f"(10th to 90th percentile {table['ratio'].quantile(0.1):.2f} to {table['ratio'].quantile(0.9):.2f})",
        f"- (A + I)/(A + 2I), what a path without noise makes of a log taken after the step: median "
        f"{(smooth / after).median():.3f}",
        f"- spline / (A + I), what is left for the spline itself: median {(table['spline'] / smooth).median():.3f}",
        f"- spline / A, against the alignment before the step: median {(table['spline'] / before).median():.3f}",
        f"- injection / logged alignment: median {(injection / after).median():.3f}",
    ]


def pivot(table: pd.DataFrame, value: str, index: str = "gap", **where: str) -> str:
    rows = table
    for name, wanted in where.items():
        rows = rows[rows[name] == wanted]
    order = list(rows[index].unique())
    wide = rows.pivot_table(value, index, "method", sort=False).reindex(order)[list(METHODS)]
    lines = [f"| {index} | " + " | ".join(wide.columns) + " |", "|---" * (len(wide.columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{v:.2%}" for v in row) + " |" for name, row in wide.iterrows()]
    return "\n".join(lines)


def describe(name: str, one: TrainConfig) -> str:
    return (
        f"| {name} | {one.model} | {one.batch_size} | {one.betas[1]} | {one.weight_decay} | {one.schedule} | "
        f"{one.lr} | {one.steps} |"
    )


def report(
    table: pd.DataFrame, rows: pd.DataFrame, ways: str, paths: str, early: str, published: list[str]
) -> str:
    main = table[(table["tensors"] == "matrices") & (table["run"] == "all") & (table["kind"] == "reporting")]
    runs = table[
        (table["tensors"] == "matrices")
        & (table["run"] != "all")
        & (table["kind"] == "reporting")
        & (table["dtype"] == "float32")
    ]
    half = main[(main["dtype"] == "float16") & (main["pooling"] == "tensor")]
    own = half[half["method"] == "balance"].set_index("gap")
    everything = table[(table["tensors"] == "all") & (table["run"] == "all") & (table["kind"] == "reporting")]
    tuning = table[(table["tensors"] == "matrices") & (table["run"] == "all") & (table["kind"] == "tuning")]
    far, demo = rows[rows["kind"] == "long"], rows[rows["kind"] == "demo"]
    head = "| run | model | batch | β₂ | λ | schedule | peak η | updates |\n|---|---|---|---|---|---|---|---|"
    sections = [
        "# Accuracy of forces recovered from checkpoints",
        "Written by `benchmarks/study_recovery.py`; every number of every run is in `recovery_accuracy.csv`.",
        "Trainings of 0.9 million weights on Python's source text, sequences of 64 bytes, warm-up of 50 updates, "
        "on a CPU, every update logged. The error is |1 − ratio| of the recovered alignment to the mean of the "
        "logged one over the same updates; percentages are medians over all intervals of the eight reporting runs. "
        "*Pooled*: the sum over the model's weight matrices (embeddings included, norms and biases not). "
        "*Per tensor*: each matrix by itself, q, k and v apart. `log`: steps 0, 1, 2, 4 … 512, then every 200. "
        "*balance* takes ρ from the displacement between neighbouring checkpoints, *‖W‖² alone* only from theory.",
        TAKEN,
        "## Runs\n\nReporting:\n\n"
        + "\n".join([head, *(describe(n, c) for n, c in REPORTING.items())])
        + "\n\nReporting, with gaps long against τ = 1/(ηλ):\n\n"
        + "\n".join([head, *(describe(n, c) for n, c in (LONG | DEMONSTRATION).items())])
        + "\n\nThe last is what `weightdyn demo` trains, with sequences of 128 bytes, a warm-up of 100, and its "
        "own checkpoints: 0, 1, 2, 4 … 1024, and 500, 1000, 1500.\n\n"
        "Tuning, to which the constants of ρ, its spread, and the interpolation of ‖W‖² were fitted:\n\n"
        + "\n".join([head, *(describe(n, c) for n, c in (TUNING | LONG_TUNING).items())]),
        "## float32, pooled: median\n\n" + pivot(main, "median", dtype="float32", pooling="model"),
        "## float32, pooled: 90th percentile\n\n" + pivot(main, "p90", dtype="float32", pooling="model"),
        "## float32, per tensor: median\n\n" + pivot(main, "median", dtype="float32", pooling="tensor"),
        "## float32, per tensor: 90th percentile\n\n" + pivot(main, "p90", dtype="float32", pooling="tensor"),
        "## float32, pooled, log-spaced: median over the runs, by the update at which the gap ends\n\n"
        + early,
        "## float16, pooled: median\n\n" + pivot(main, "median", dtype="float16", pooling="model"),
        "## float16, per tensor: median\n\n"
        + pivot(main, "median", dtype="float16", pooling="tensor")
        + "\n\nRows of balance flagged as under the resolution of float16: "
        + ", ".join(f"{gap} {own.loc[gap, 'rounding']:.1%}" for gap in GAPS)
        + ".",
        "## Run by run, float32: median over all gaps\n\nPooled:\n\n"
        + pivot(runs, "median", "run", pooling="model")
        + "\n\nPer tensor:\n\n"
        + pivot(runs, "median", "run", pooling="tensor"),
        "## Norms and biases included, float32, per tensor: median\n\n"
        + pivot(everything, "median", dtype="float32", pooling="tensor"),
        "## The tuning runs, float32: median\n\nPooled:\n\n"
        + pivot(tuning, "median", dtype="float32", pooling="model")
        + "\n\nPer tensor:\n\n"
        + pivot(tuning, "median", dtype="float32", pooling="tensor"),
        "## Gaps long against τ, float32\n\nN1 to N4 (τ/2, τ and 2τ of the peak η; log-spaced as above), balance. "
        "*Later gaps*: all but the first, in which the weights grow from nothing but their initial size.\n\n"
        + held(far, ["gap"], "median", "p90", "pooled", "pooled_p90")
        + "\n\nLater gaps:\n\n"
        + held(far[far["step"] > far["span"]], ["gap"], "median", "p90", "pooled", "pooled_p90")
        + "\n\nBy run:\n\n"
        + held(far[far["gap"] != "log"], ["run", "gap"], "median", "p90", "pooled"),
        "## The demo's run and its own checkpoints, float32, by the update at which the gap ends\n\n"
        + held(demo, ["step"], "median", "p90", "pooled", "inside", "drift_inside")
        + "\n\nAll:\n\n"
        + held(demo, ["gap"], "median", "p90", "pooled", "pooled_p90", "inside", "drift_inside"),
        "## ‖w‖² between checkpoints: the tuning runs with a short τ\n\nHow far the recovered decay is off, "
        "over alignment: median and 90th percentile per tensor; median pooled. The last was kept. What is "
        "left at the later gaps is mostly noise along w, which moves ‖w‖² between two checkpoints and leaves no "
        "trace in them (`decay_doubt`).\n\n" + paths,
        "## The interval\n\nFraction of the rows of balance whose logged alignment lies between `alignment_low` "
        "and `alignment_high` (95 % aimed at on the tuning runs), and logged drift between `drift_low` and "
        "`drift_high` (float32).\n\n" + intervals(table),
    ]
    drift = rows[rows["kind"] == "reporting"]
    sections += [
        "## Drift and diffusion\n\nRecovery infers what alignment is made of (no gradient is known): diffusion is "
        "injection·(1 + `memory_null`), as if noise were white, and drift is what the change of ‖w‖² leaves. Both "
        "are held against the logged means over the same updates; their error is |recovered − logged| over the "
        "logged |drift| + diffusion + |decay|, since drift goes through zero.",
        DRIFT_TAKEN + "\n\n![Drift, recovered against logged](recovery_drift.png)",
        "### Drift, pooled: median\n\n" + pivot(main, "drift_median", dtype="float32", pooling="model"),
        "### Drift, pooled: 90th percentile\n\n" + pivot(main, "drift_p90", dtype="float32", pooling="model"),
        "### Drift, per tensor: median\n\n" + pivot(main, "drift_median", dtype="float32", pooling="tensor"),
        "### Drift, per tensor: 90th percentile\n\n"
        + pivot(main, "drift_p90", dtype="float32", pooling="tensor"),
        "### Diffusion, pooled: median\n\n"
        + pivot(main, "diffusion_median", dtype="float32", pooling="model"),
        "### Diffusion, per tensor: median\n\n"
        + pivot(main, "diffusion_median", dtype="float32", pooling="tensor"),
        "### Drift, float16, per tensor: median\n\n"
        + pivot(main, "drift_median", dtype="float16", pooling="tensor"),
        "### Sign of the drift, pooled: fraction that is right\n\n"
        + pivot(main, "drift_sign", dtype="float32", pooling="model"),
        "### Sign of the drift, per tensor: fraction that is right\n\n"
        + pivot(main, "drift_sign", dtype="float32", pooling="tensor"),
        "### Logged drifts inside drift_low … drift_high (90 % aimed at on the tuning runs)\n\n"
        + pivot(main, "drift_inside", dtype="float32", pooling="tensor")
        + "\n\nfloat16:\n\n"
        + pivot(main, "drift_inside", dtype="float16", pooling="tensor"),
        "### Balance, by role (of `other`: by component), all gaps\n\n*error of 0*: what the guess of no drift "
        "makes. *sign told*: intervals drift_low … drift_high without zero; *told right*: of those, the sign that "
        "is the logged one. *diffusion/logged*: median ratio.\n\n" + drift_table(drift, ["part"]),
        "### Balance, by gap\n\n" + drift_table(drift, ["gap"]),
        "### Balance, by run\n\n" + drift_table(drift, ["run"]),
        "### What diffusion is told by: the tuning runs\n\nError over the budget, median and 90th percentile, "
        "per matrix. The second way was kept. The displacement between checkpoints is nearly the diffusion for "
        "noise, but what moves to and fro cancels in it and what persists adds up, and both by an amount that "
        "differs from tensor to tensor. The last line knows the logged ρ: what it leaves is what noise is not "
        "white, and what a log of so few updates holds by chance.\n\n" + ways,
    ]
    if published:
        sections.append(
            "## The published recovery\n\nThe file of arXiv 2606.19367, with A the alignment before the step and I "
            "the injection. I is from the force log of the same configuration, interpolated and scaled to the "
            "200,000 weights that the recovery took; the two files are of separate trainings, equal only up to "
            "update 1,000.\n\n" + "\n".join(published)
        )
    return "\n\n".join(sections) + "\n"


def figure(table: pd.DataFrame, path: Path) -> None:
    rows = table[(table["tensors"] == "matrices") & (table["run"] == "all") & (table["kind"] == "reporting")]
    panels, axes = plt.subplots(1, 2, figsize=(6.8, 2.6), sharey=True, layout="constrained", dpi=200)
    place = np.arange(len(GAPS))
    for ax, pooling, title in zip(axes, ("model", "tensor"), ("pooled", "per tensor"), strict=True):
        for method in METHODS:
            one = rows[(rows["pooling"] == pooling) & (rows["method"] == method)]
            color = plot.METHOD_COLORS[METHODS[method]]
            dashes = ":" if "alone" in method else "-"
            for dtype, marker, face in (("float32", "o", color), ("float16", "s", "white")):
                own = one[one["dtype"] == dtype].set_index("gap").loc[list(GAPS)]
                if dtype == "float32":
                    line = {"color": color, "ls": dashes, "lw": 1.1, "label": method.replace("_", " ")}
                    ax.plot(place[:-1], own["median"].iloc[:-1], **line)
                ax.plot(place, own["median"], marker, mfc=face, mec=color, ms=3.5, mew=0.8)
        target = 0.003 if pooling == "model" else 0.008
        ax.axhline(target, color="#808080", lw=0.6, ls="--", zorder=0)
        ax.annotate(f"aim {target:.1%}", (0.01, target), xycoords=("axes fraction", "data"), va="bottom",
                    fontsize=6.5, color="#808080")  # fmt: skip
        ax.set_yscale("log")
        ax.set_xticks(place, GAPS)
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("updates between checkpoints", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("median |1 − recovered/logged|", fontsize=8)
    axes[0].plot([], [], "o", color="#404040", ms=3.5, label="float32")
    axes[0].plot([], [], "s", mfc="white", mec="#404040", ms=3.5, mew=0.8, label="float16")
    panels.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=6.5,
                  frameon=False, handlelength=1.6, columnspacing=1.0)  # fmt: skip
    panels.savefig(path)
    plt.close(panels)


def drift_figure(table: pd.DataFrame, rows: pd.DataFrame, path: Path) -> None:
    main = table[(table["tensors"] == "matrices") & (table["run"] == "all") & (table["kind"] == "reporting")]
    rows = rows[(rows["kind"] == "reporting") & (rows["gap"] == "100")]
    panels, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.8), layout="constrained", dpi=200)
    place = np.arange(len(GAPS))
    for pooling, label, marker in (("model", "pooled", "o"), ("tensor", "per tensor", "s")):
        for method, dashes in (("balance", "-"), ("balance, ‖W‖² alone", ":")):
            own = main[
                (main["pooling"] == pooling) & (main["method"] == method) & (main["dtype"] == "float32")
            ]
            own = own.set_index("gap").loc[list(GAPS)]
            name = f"{label}, ‖W‖² alone" if "alone" in method else label
            left.plot(place, 100 * own["drift_median"], ls=dashes, marker=marker, ms=3.5, lw=1.1,
                      color="#404040", label=name)  # fmt: skip
    left.set_xticks(place, GAPS)
    left.set_ylim(0)
    left.set_xlabel("updates between checkpoints", fontsize=8)
    left.set_ylabel("median |error of drift|, % of the budget", fontsize=8)
    left.legend(fontsize=6.5, frameon=False)
    for role, color in plot.ROLE_COLORS.items():
        own = rows[rows["role"] == role]
        right.plot(own["logged_drift"] / own["size"], own["drift"] / own["size"], "o", ms=2, mew=0, alpha=0.6,
                   color=color, label=role)  # fmt: skip
    right.axline((0, 0), slope=1, color="#808080", lw=0.6, zorder=0)
    for line in (right.axhline, right.axvline):
        line(0, color="#808080", lw=0.6, zorder=0)
    right.set_xlim(-1, 1)
    right.set_ylim(-1.2, 1.2)
    right.set_xlabel("logged drift / logged budget", fontsize=8)
    right.set_ylabel("recovered drift / logged budget", fontsize=8)
    right.set_title("each matrix and gap of 100 updates", fontsize=8)
    right.legend(fontsize=6.5, frameon=False, markerscale=2)
    for ax in (left, right):
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    panels.savefig(path)
    plt.close(panels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/recovery"), help="where the trainings are kept"
    )
    parser.add_argument("--reference", type=Path, default=os.environ.get("WEIGHTDYN_REFERENCE"),
                        help="copy of the public data of arXiv 2606.19367")  # fmt: skip
    parser.add_argument("--fit", action="store_true", help="only fit the constants, to the tuning runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        name: train(each, arguments.runs / name)
        for names, _ in GROUPS.values()
        for name, each in names.items()
    }
    if arguments.fit:
        fit(runs)
        return
    table, rows = study(runs)
    published = []
    if arguments.reference:
        published = paper(Path(arguments.reference) / "Weibull_WeightScale_dynamics" / "derived_data")
    DATA.mkdir(exist_ok=True)
    table.to_csv(DATA / "recovery_accuracy.csv", index=False, float_format="%.6g")
    parts = by_part(rows, ["kind", "run", "part", "gap"])
    parts.to_csv(DATA / "recovery_drift.csv", index=False, float_format="%.6g")
    text = report(table, rows, tried(observations(runs)), decays(runs), by_step(runs), published)
    (DATA / "recovery.md").write_text(text, encoding="utf-8")
    figure(table, DATA / "recovery_accuracy.png")
    drift_figure(table, rows, DATA / "recovery_drift.png")
    print((DATA / "recovery.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
