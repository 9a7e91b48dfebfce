"""What alignment is made of: drift and momentum's memory, where the split is known, and in trainings.

(a) pure noise, (b) tensors behind a normalisation, (c) a quadratic, (d) small trainings of GPT-NeoX and LLaMA, with
experiments that say why κ leaves 1 where it does, (e) the mean gradient over many batches at frozen weights as
another measurement of the drift, (f) the published logs. Writes data/drift.md, data/drift.csv, data/drift.png.

    OMP_NUM_THREADS=1 python benchmarks/study_drift.py --runs runs/drift [--reference folder]

About forty minutes on one core; what is in the folder of the runs already is used as it is. The folder of the
public data is `WEIGHTDYN_REFERENCE` by default; without it (f) is left out.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from published_shares import published_shares
from torch import Tensor, nn

import weightdyn as wd
from weightdyn.core.forces import Momentum, NoiseMemory
from weightdyn.core.tables import kappa
from weightdyn.plot.style import ROLE_COLORS
from weightdyn.record.runlog import RunLog
from weightdyn.train.corpus import Corpus
from weightdyn.train.models import make_model
from weightdyn.train.trainer import TrainConfig, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = Path(__file__).resolve().parent.parent / "data"

# --- (a) pure noise -----------------------------------------------------------------------------------------

BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


def pure_noise() -> pd.DataFrame:
    """Gradients that do not depend on the weights, for every β₁; the same ones for all."""
    found = []
    for beta2, schedule in ((0.999, "constant"), (0.999, "cosine"), (0.95, "constant")):
        for beta1 in BETAS:
            log = noise_run(beta1, beta2, schedule)
            whole = wd.smooth(log, windows=1).iloc[0]
            settled = log[log["step"] > 5 / (1 - beta1)]
            moved = settled["norm_sq_after"].iloc[-1] - settled["norm_sq"].iloc[0]
            grown = moved - settled["decay"].sum() - settled["drift"].sum()
            found.append(
                {
                    "β₁": beta1,
                    "β₂": beta2,
                    "schedule": schedule,
                    "memory/null": whole["kappa"],
                    "memory/injection": whole["memory"] / whole["injection"],
                    "drift/error": whole["drift"] / whole["drift_se"],
                    "growth/η²n": grown / (settled["lr"] ** 2 * settled["numel"]).sum(),
                    "signal/injection": log["signal"].sum() / log["injection"].sum(),
                }
            )
    return pd.DataFrame(found)


def noise_run(beta1: float, beta2: float, schedule: str, steps: int = 3000, n: int = 300) -> pd.DataFrame:
    torch.manual_seed(0)
    w = nn.Parameter(0.02 * torch.randn(n, n))
    recipe = wd.Recipe.from_settings(
        lr=1e-3, steps=steps, schedule=schedule, warmup=100, floor=0.1, weight_decay=0.1
    )
    optimizer = torch.optim.AdamW([("w", w)], lr=1e-3, betas=(beta1, beta2), weight_decay=0.1)
    with wd.ForceLogger(optimizer) as logger:
        for lr in recipe.lr_at(np.arange(1, steps + 1)):
            optimizer.param_groups[0]["lr"] = float(lr)
            w.grad = torch.randn(n, n)
            optimizer.step()
    return logger.run.forces()


# --- (b) scale invariance -----------------------------------------------------------------------------------


class Normalised(nn.Module):
    """Two matrices with a normalisation behind each, and a read-out that has none."""

    def __init__(self, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.out = nn.Linear(128, 16, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            x = self.activation(F.layer_norm(x, x.shape[-1:], eps=0.0))
        return self.out(x)


def invariance(seeds: int = 4, steps: int = 1000, batch: int = 8, batches: int = 64) -> pd.DataFrame:
    """A student of a random teacher, under SGD and AdamW, and the drift by many batches at frozen weights."""
    found = []
    for name in ("SGD", "AdamW"):
        for kind, activation in (("GELU", F.gelu), ("tanh", torch.tanh)):
            for seed in range(seeds):
                torch.manual_seed(seed)
                model, teacher = Normalised(activation), Normalised(activation)
                optimizer: torch.optim.Optimizer
                if name == "SGD":
                    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
                else:
                    optimizer = torch.optim.AdamW(
                        model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0
                    )

                def fresh(model=model, teacher=teacher) -> None:
                    x = torch.randn(batch, 64)
                    model.zero_grad()
                    F.mse_loss(model(x), 3 * teacher(x).detach()).backward()

                pulls: dict[str, list[list[float]]] = {p: [] for p, _ in model.named_parameters()}
                source = "displacement" if name == "SGD" else "moments"
                with wd.ForceLogger(optimizer, model, source=source) as logger:
                    for t in range(1, steps + 1):
                        if t > steps // 5 and t % 50 == 0:
                            here: dict[str, list[float]] = {p: [] for p in pulls}
                            for _ in range(batches):
                                fresh()
                                for p, w in model.named_parameters():
                                    root = (
                                        (optimizer.state[w]["exp_avg_sq"] / (1 - 0.999**t)).sqrt()
                                        if name == "AdamW"
                                        else torch.tensor(1 - 0.9)  # SGD's u is 1/(1−μ) of a gradient
                                    )
                                    g = w.grad / root
                                    here[p].append(
                                        -2 * optimizer.param_groups[0]["lr"] * float((w.detach() * g).sum())
                                    )
                            for p, values in here.items():
                                pulls[p].append([np.mean(values), np.var(values, ddof=1) / batches])
                        fresh()
                        optimizer.step()
                log = logger.run.forces()
                whole = wd.smooth(log[log["step"] > steps // 5], windows=1).set_index("tensor")
                cosine = log["dot_wg"] / np.sqrt(log["norm_sq"] * log["g_sq"])
                largest = cosine.abs().groupby(log["tensor"], observed=True).max()
                for p, values in pulls.items():
                    truth, variance = np.mean(values, axis=0)
                    error = np.hypot(whole.loc[p, "drift_se"], np.sqrt(variance / len(values)))
                    found.append(
                        {
                            "optimizer": name,
                            "activation": kind,
                            "seed": seed,
                            "tensor": p.removesuffix(".weight"),
                            "drift/diffusion": whole.loc[p, "drift"] / whole.loc[p, "diffusion"],
                            "drift/error": whole.loc[p, "drift"] / whole.loc[p, "drift_se"],
                            "many batches": truth / whole.loc[p, "diffusion"],
                            "z": (whole.loc[p, "drift"] - truth) / error,
                            "cosine": largest[p],
                        }
                    )
    return pd.DataFrame(found)


# --- (c) a quadratic ----------------------------------------------------------------------------------------


def quadratic() -> pd.DataFrame:
    """½Σh(w−w*)² with gradient noise of a known size: drift by hand is Gauss-Hermite quadrature over that noise."""
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(21))
    weights = weights / weights.sum()
    found = []
    for beta2 in (0.95, 0.999):
        for size in (1.0, 5.0, 30.0):
            torch.manual_seed(0)
            n, steps, lr, decay = 40_000, 500, 1e-2, 0.1
            h, goal = torch.rand(n).double() * 1.5 + 0.5, 3 * torch.randn(n).double()
            w = nn.Parameter(0.5 * torch.randn(n).double())
            v = torch.zeros(n).double()
            optimizer = torch.optim.AdamW([("w", w)], lr=lr, betas=(0.9, beta2), weight_decay=decay)
            by_hand, without_own = [], []
            with wd.ForceLogger(optimizer) as logger:
                for t in range(1, steps + 1):
                    mean = h * (w.detach() - goal)
                    each = mean[:, None] + size * nodes
                    root = ((beta2 * v[:, None] + (1 - beta2) * each**2) / (1 - beta2**t)).sqrt() + 1e-8
                    pull = -2 * lr * (1 - lr * decay) * w.detach()
                    by_hand.append(float(pull @ ((each / root) @ weights)))
                    before = (v / (1 - beta2 ** max(t - 1, 1))).sqrt() + 1e-8
                    without_own.append(float(pull @ (mean / before)))
                    w.grad = mean + size * torch.randn(n).double()
                    optimizer.step()
                    v = optimizer.state[w]["exp_avg_sq"].clone()
            log = logger.run.forces()
            log = log[log["step"] > 20]
            whole = wd.smooth(log, windows=1).iloc[0]
            found.append(
                {
                    "β₂": beta2,
                    "noise": size,
                    "logged/by hand": log["drift"].sum() / sum(by_hand[20:]),
                    "error": whole["drift_se"] / abs(whole["drift"]),
                    "by hand/with v̂ before": sum(by_hand[20:]) / sum(without_own[20:]),
                    "drift/diffusion": whole["drift"] / whole["diffusion"],
                    "κ": whole["kappa"],
                }
            )
    return pd.DataFrame(found)


# --- (d) trainings ------------------------------------------------------------------------------------------

BASE = TrainConfig(
    steps=600, batch_size=8, seq_len=64, lr=3e-3, warmup=50, weight_decay=0.1, betas=(0.9, 0.95), device="cpu",
    weibull_every=600, eval_every=600, save_every=600,
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "batch 2": {"batch_size": 2},
    "batch 64": {"batch_size": 64},
    "β₁ 0": {"betas": (0.0, 0.95)},
    "β₁ 0.5": {"betas": (0.5, 0.95)},
    "β₁ 0.8": {"betas": (0.8, 0.95)},
    "β₁ 0.95": {"betas": (0.95, 0.95)},
    "β₂ 0.999": {"betas": (0.9, 0.999)},
    "λ 1": {"weight_decay": 1.0},
    "η 1e-3": {"lr": 1e-3},
    "η 1e-2": {"lr": 1e-2},
    "constant": {"schedule": "constant"},
}
MODELS = {"tiny": "GPT-NeoX", "tiny-llama": "LLaMA"}
ROLES = ("selection", "transmission", "value", "other")


def settings() -> Iterator[tuple[str, str, TrainConfig, str]]:
    for model in MODELS:
        for i, (name, changes) in enumerate(SETTINGS.items()):
            yield model, name, replace(BASE, model=model, seed=i, **changes), f"{model}-{i:02d}"


def trainings(folder: Path) -> dict[tuple[str, str], RunLog]:
    runs = {}
    for model, name, config, place in settings():
        runs[model, name] = train(config, folder / place, progress=False)
        print(f"{MODELS[model]}, {name}: there", flush=True)
    return runs


def cells(runs: dict[tuple[str, str], RunLog]) -> pd.DataFrame:
    """κ, and the signed shares of drift, diffusion and decay, by tenth of every run: by role, and by layer."""
    found = []
    for (model, setting), run in runs.items():
        log = run.forces()
        beta1 = run.info["train"]["betas"][0]
        log["signal"] = log["signal"].fillna(0.0)  # a first update has none
        log["memory_size"] = sized(log, beta1)
        for by in ("role", "layer"):
            sums = wd.aggregate(log, by)
            sums["memory_size"] = (
                log.groupby(["step", by], observed=True)["memory_size"]
                .sum()
                .reindex(pd.MultiIndex.from_frame(sums[["step", by]]))
                .to_numpy()
            )
            sums = sums[sums[by].notna()].sort_values([by, "step"], ignore_index=True)
            sums["lag"] = sums.groupby(by, observed=True, group_keys=False)[["drift", "lr"]].apply(
                partial(lag, beta1=beta1)
            )
            # Of the same rows with `lag` in the place of memory come its means and their errors.
            at_once = wd.smooth(sums.assign(memory=sums["memory"] - sums["lag"]), windows=10)
            by_size = wd.smooth(sums.assign(memory=sums["memory_size"]), windows=10)
            table = wd.budget(wd.smooth(sums, windows=10), kind="drift")
            for force in ("drift", "diffusion", "decay"):
                table[f"{force}_share"] *= np.sign(table[force])
            found.append(
                table.assign(
                    model=MODELS[model],
                    setting=setting,
                    by=by,
                    group=table[by].astype(str),
                    tenth=1 + (table["step"] - 1) * 10 // sums["step"].max(),
                    kappa_path=at_once["kappa"],
                    kappa_path_se=at_once["kappa_se"],
                    kappa_size=by_size["kappa"],
                )
            )
    columns = ["model", "setting", "by", "group", "tenth", "kappa", "kappa_se", "kappa_path", "kappa_path_se"]
    columns += [
        "kappa_size",
        "drift_share",
        "diffusion_share",
        "decay_share",
        "drift",
        "drift_se",
        "diffusion",
        "decay",
    ]
    columns += ["signal", "injection", "memory", "memory_null"]
    return pd.concat(found)[columns].reset_index(drop=True)


def sized(log: pd.DataFrame, beta1: float) -> pd.Series:
    """The memory of white noise whose size is that of the gradients as they were, update by update.

    The null takes the gradient's noise to be of one size in units of u, from update to update. Here a tensor's
    gradient g_t has the size that was measured, √(‖g̃_t‖²/n·mean v̂_t), and u_t is divided by √(mean v̂_t).
    """
    parts = []
    for _, rows in log.sort_values("step").groupby("tensor", observed=True):
        root = np.sqrt(rows["v_mean"].to_numpy())
        size = np.sqrt((rows["g_sq"] / rows["numel"]).to_numpy(float)) * root
        clock, sums = NoiseMemory(), []
        for t, (lr, decay) in enumerate(zip(rows["lr"], rows["weight_decay"], strict=True), start=1):
            of_m = 1 / (1 - beta1**t) / root[t - 1]
            momentum = Momentum(beta1, (1 - beta1) * size[t - 1], of_m, 0.0)
            sums.append(clock.update(momentum, lr, decay).lr_memory)
        part = 2 * rows["lr"] * (1 - rows["lr"] * rows["weight_decay"]) * np.array(sums) * rows["u_sq"]
        parts.append(part)
    return pd.concat(parts).reindex(log.index)


def lag(rows: pd.DataFrame, beta1: float) -> pd.Series:
    """What drift that moves within momentum's window, its noise included, adds to memory.

    u holds the gradients of the updates before, and each pulled at the weights of its time: to memory that adds
    Σ(1−β₁)β₁ˢ·drift_{t−s}·η_t/η_{t−s} − drift_t. What is left of memory then, the path's, is what the weights moved
    since those gradients: its noise is far smaller.
    """
    lr = rows["lr"].where(rows["lr"].notna(), 1.0)
    pull = rows["drift"] / lr
    return pull.ewm(alpha=1 - beta1, adjust=True).mean() * lr - rows["drift"]


# --- (d) why κ leaves 1 -------------------------------------------------------------------------------------


def batch_loss(model: nn.Module, corpus: Corpus, seed: int, update: int, config: TrainConfig) -> Tensor:
    batch = corpus.batch(seed, update, config.batch_size, config.seq_len)
    logits = model(batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def gradients(model: nn.Module, corpus: Corpus, seed: int, update: int, config: TrainConfig) -> list[Tensor]:
    """Those of a batch, clipped."""
    model.zero_grad()
    batch_loss(model, corpus, seed, update, config).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip or np.inf)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def adamw(model: nn.Module, config: TrainConfig, **changes: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.named_parameters(),
        **{"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, **changes},
    )


def branches(model_name: str, starts: tuple[int, ...] = (20, 60, 300), length: int = 110) -> pd.DataFrame:
    """κ of a training that goes on from a point in four ways, over the updates behind the first fifty.

    frozen w: gradients are taken at the weights of the point, so that no curvature answers to the noise. frozen v:
    the second moment stays what it is at the point.
    """
    corpus = Corpus.read()
    config = replace(BASE, model=model_name, schedule="constant")
    model = make_model(model_name, seed=100)
    optimizer = adamw(model, config)
    found = []
    for t in range(1, max(starts) + 1):
        optimizer.param_groups[0]["lr"] = config.lr * min(t / 10, 1)
        for p, grad in zip(model.parameters(), gradients(model, corpus, 0, t, config), strict=True):
            p.grad = grad
        optimizer.step()
        if t not in starts:
            continue
        for way in ("live", "frozen w", "frozen v", "both frozen"):
            own, still = copy.deepcopy(model), copy.deepcopy(model)
            settled = adamw(own, config)
            for p, old in zip(own.parameters(), model.parameters(), strict=True):
                state = optimizer.state[old]
                settled.state[p] = {name: value.clone() for name, value in state.items()}
                if way in ("frozen v", "both frozen"):
                    # As after very many updates: corrected now, and then as good as unchanged.
                    settled.state[p]["exp_avg"] /= 1 - config.betas[0] ** t
                    settled.state[p]["exp_avg_sq"] /= 1 - config.betas[1] ** t
                    settled.state[p]["step"].fill_(1e7)
                    settled.param_groups[0]["betas"] = (config.betas[0], 1 - 1e-6)
            source = still if way in ("frozen w", "both frozen") else own
            with wd.ForceLogger(settled, own) as logger:
                for i in range(1, length + 1):
                    fresh = gradients(source, corpus, 0, t + i, config)
                    for p, grad in zip(own.parameters(), fresh, strict=True):
                        p.grad = grad
                    settled.step()
            log = logger.run.forces()
            table = wd.smooth(log[log["step"] > log["step"].max() - length + 50], by="role", windows=1)
            found.append(table.assign(model=MODELS[model_name], start=t, way=way))
    columns = ["model", "start", "way", "role", "kappa", "kappa_se", "drift", "diffusion"]
    return pd.concat(found)[[*columns, "signal", "injection"]]


# --- (e) the mean gradient over many batches ----------------------------------------------------------------


def many_batches(model_name: str, every: int = 6, batches: int = 16) -> pd.DataFrame:
    """Drift of the mean gradient over many other batches at the weights of an update, beside the logged one."""
    corpus = Corpus.read()
    config = replace(BASE, model=model_name)
    recipe = config.recipe
    model = make_model(model_name, seed=200)
    optimizer = adamw(model, config)
    beta2 = config.betas[1]
    rows = {
        name: wd.describe(name, tuple(p.shape), model.config).rows(tuple(p.shape))
        for name, p in model.named_parameters()
    }
    found = []
    with wd.ForceLogger(optimizer, model) as logger:
        for t in range(1, config.steps + 1):
            lr = float(recipe.lr_at(t))
            optimizer.param_groups[0]["lr"] = lr
            if t % every == every // 2:  # in the middle of what it stands for
                samples = {"own": [], "before": []}
                for k in range(batches):
                    fresh = gradients(model, corpus, 1, t * batches + k, config)
                    sums = {kind: dict.fromkeys(ROLES, 0.0) for kind in samples}
                    for (name, p), grad in zip(model.named_parameters(), fresh, strict=True):
                        v = optimizer.state[p]["exp_avg_sq"]
                        own = (beta2 * v + (1 - beta2) * grad**2) / (1 - beta2**t)
                        before = v / (1 - beta2 ** (t - 1))
                        for kind, square in (("own", own), ("before", before)):
                            pull = p.detach().double() * (grad / (square.sqrt() + config.eps)).double()
                            for row in rows[name]:
                                part = pull if row.view is None else row.view.of(pull)
                                sums[kind][row.role] += float(part.sum())
                    for kind in samples:
                        samples[kind].append(sums[kind])
                factor = -2 * lr * (1 - lr * config.weight_decay)
                for role in ROLES:
                    values = np.array([each[role] for each in samples["own"]]) * factor
                    before = np.array([each[role] for each in samples["before"]]) * factor
                    found.append(
                        {
                            "step": t,
                            "role": role,
                            "truth": values.mean(),
                            "truth_var": values.var(ddof=1) / batches,
                            "before": before.mean(),
                        }
                    )
            for p, grad in zip(model.parameters(), gradients(model, corpus, 0, t, config), strict=True):
                p.grad = grad
            optimizer.step()
    truth = pd.DataFrame(found)
    truth["tenth"] = 1 + (truth["step"] - 1) * 10 // config.steps
    means = truth.groupby(["role", "tenth"]).agg(
        truth=("truth", "mean"), before=("before", "mean"), variance=("truth_var", "sum"), n=("step", "size")
    )
    means["truth_se"] = np.sqrt(means["variance"]) / means["n"]
    logged = wd.smooth(logger.run, by="role", windows=10)
    logged["tenth"] = 1 + (logged["step"] - 1) * 10 // config.steps
    table = logged.merge(means.reset_index(), on=["role", "tenth"])
    table["z"] = (table["drift"] - table["truth"]) / np.hypot(table["drift_se"], table["truth_se"])
    columns = ["role", "tenth", "drift", "drift_se", "truth", "truth_se", "before", "z", "diffusion", "kappa"]
    return table[columns].assign(model=MODELS[model_name])


# --- the report ---------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], pd.DataFrame]] = {
    "noise": pure_noise,
    "invariance": invariance,
    "quadratic": quadratic,
    **{f"branches-{model}": partial(branches, model) for model in MODELS},
    **{f"truth-{model}": partial(many_batches, model) for model in MODELS},
}


def kept(folder: Path, name: str) -> pd.DataFrame:
    """A part's table, from the folder if it is there."""
    path = folder / f"{name}.csv"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        PARTS[name]().to_csv(path, index=False)
        print(f"{name}: there", flush=True)
    return pd.read_csv(path)


def markdown(table: pd.DataFrame, digits: int = 2) -> str:
    """A table as Markdown, its index as the first columns."""

    def cell(value: Any) -> str:
        if isinstance(value, (float, np.floating)):
            return "" if np.isnan(value) else f"{value:.{digits}f}"
        return str(value)

    table = table.reset_index() if any(table.index.names) else table
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1]]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_tenth(table: pd.DataFrame, value: str) -> pd.DataFrame:
    wide = table.pivot_table(index=["model", "setting", "group"], columns="tenth", values=value, sort=False)
    return wide.rename_axis(columns=None)


LOW, HIGH = 0.9, 1.1


def reason(row: pd.Series) -> str:
    """What the measurements and the experiments say of a κ that lies outside 0.9 to 1.1."""
    kappa, error, path, path_error, size = row[
        ["kappa", "kappa_se", "kappa_path", "kappa_path_se", "kappa_size"]
    ]
    along = f"the path's is {path:.2f} ± {path_error:.2f}"
    if LOW - path_error <= path <= HIGH + path_error:
        what = "noise of the drift" if abs(kappa - 1) <= 2 * error else "drift that moves within the window"
        return f"{what} ({along})"
    if row["group"] == "other":
        return f"rare tokens, whose v̂ is forgotten between their gradients ({along}; about 1 with β₂ = 0.999)"
    if LOW <= path / size <= HIGH:
        return f"gradients that change in size ({along}, and their sizes make {size:.2f})"
    if (size - 1) * (path - 1) > 0 and abs(size - 1) > 0.05:
        return f"gradients that change in size, in part, and curvature ({along}, sizes make {size:.2f})"
    return f"curvature ({along}, the gradients' sizes make {size:.2f})"


def sentences(table: pd.DataFrame) -> list[str]:
    """One for each cell outside."""
    lines = []
    for (model, setting, group), rows in table.groupby(["model", "setting", "group"], sort=False):
        outside = rows[(rows["kappa"] < LOW) | (rows["kappa"] > HIGH)]
        if len(outside):
            lines.append(f"- **{model}, {setting}, {group}.**")
        for _, row in outside.iterrows():
            lines.append(
                f"  In tenth {row['tenth']} κ is {row['kappa']:.2f} ± {row['kappa_se']:.2f}, {reason(row)}."
            )
    return lines


def report(parts: dict[str, pd.DataFrame], table: pd.DataFrame, published: pd.DataFrame | None) -> str:
    roles = table[table["by"] == "role"]
    truth = pd.concat([parts[f"truth-{model}"] for model in MODELS])
    branch = pd.concat([parts[f"branches-{model}"] for model in MODELS])
    branch["signal/injection"] = branch["signal"] / branch["injection"]
    ways = branch.pivot_table(
        index=["model", "start", "role"], columns="way", values=["kappa", "signal/injection"], sort=False
    )
    ways.columns = [f"{'κ' if value == 'kappa' else 'signal'}, {way}" for value, way in ways.columns]
    errors = branch.groupby("role")["kappa_se"].median().round(2).to_dict()
    invariant = parts["invariance"].groupby(["optimizer", "activation", "tensor"], sort=False)
    invariant = invariant.agg(
        **{
            "drift/diffusion": ("drift/diffusion", "mean"),
            "by many batches": ("many batches", "mean"),
            "0 within two errors": ("drift/error", lambda x: f"{(x.abs() <= 2).sum()} of {len(x)}"),
            "many batches within two": ("z", lambda x: f"{(x.abs() <= 2).sum()} of {len(x)}"),
            "largest cosine of w and g̃": ("cosine", lambda x: f"{x.max():.0e}"),
        }
    )
    outside = sentences(roles)
    lines = [
        "# What alignment is made of: drift and momentum's memory",
        "",
        "Written by `benchmarks/study_drift.py`; every cell, by role and by layer, is in `drift.csv`.",
        "",
        "alignment = drift + memory. *Drift* is −2η(1−ηλ)⟨w,g̃⟩ with the fresh gradient in units of the update, "
        "the pull of the mean gradient; *memory* is the rest; *null* is the memory that white gradient noise "
        "makes with the schedule as it was (`weightdyn.memory_null`), and κ = memory/null. Injection and memory "
        "are diffusion.",
        "",
        "![κ of the path by tenth of the run, the logged drift against that of the mean gradient, drift's share by "
        "batch](drift.png)",
        "",
        *taken(parts, roles, truth, branch),
        "",
        "## (a) Pure noise",
        "",
        "Gradients that do not depend on the weights, 90,000 of them, 3,000 updates, the same for every β₁; peak "
        "η 1e-3, λ = 0.1, warm-up of 100 updates with the cosine. *growth/η²n* is that of ‖w‖² without decay and "
        "drift, from the 5/(1−β₁)th update on: 1 for a steady η and a v̂ that stands still. Of a cosine at β₁ = "
        "0.99 the momentum holds gradients of a larger η; with β₂ = 0.95 v̂ follows the gradient that it divides.",
        "",
        markdown(parts["noise"], 4),
        "",
        "## (b) Scale invariance",
        "",
        "Two matrices with a normalisation behind each (a student of a random teacher, 1,000 updates, the last "
        "four fifths; four seeds), and a read-out that has none. A gradient is orthogonal to such a matrix, so "
        "SGD's drift is 0 to rounding. Adam divides it by √v̂, weight by weight, and then it is so only in the "
        "mean over weights.",
        "",
        markdown(invariant, 4),
        "",
        "## (c) A quadratic",
        "",
        "½Σh(w−w*)² over 40,000 weights, Gaussian gradient noise of a known size, AdamW with η 1e-2 and λ 0.1, "
        "480 updates. By hand: the expectation over that noise by quadrature. *with v̂ before*: the same with "
        "the v̂ before the update, which does not hold the gradient's own square. κ is below 1: curvature.",
        "",
        markdown(parts["quadratic"], 4),
        "",
        "## (d) Trainings",
        "",
        f"Models of 0.9 million weights on Python's source text, {BASE.steps} updates of sequences of "
        f"{BASE.seq_len} bytes; base: batch {BASE.batch_size}, peak η {BASE.lr:g}, warm-up {BASE.warmup}, cosine "
        f"to a tenth, λ {BASE.weight_decay:g}, β {BASE.betas}, clipping at {BASE.clip:g}. Another seed in every "
        "setting.",
        "",
        "### κ by role and tenth of the run",
        "",
        "Nothing is left out but β₁ = 0, where there is no memory.",
        "",
        markdown(by_tenth(roles, "kappa")),
        "",
        "### κ of the path",
        "",
        "Drift of the updates before, as momentum weighs them, in the place of the present one: what the weights "
        "moved since the gradients that u holds. It is what κ would be if drift stood still and had no noise.",
        "",
        markdown(by_tenth(roles, "kappa_path")),
        "",
        "### Drift's share, with its sign",
        "",
        "drift/(|drift| + |diffusion| + |decay|) by tenth of the run.",
        "",
        markdown(by_tenth(roles, "drift_share")),
        "",
        "### Shares over the whole run",
        "",
        markdown(whole_shares(roles)),
        "",
        "### Why κ leaves 1",
        "",
        "A training goes on from update 20, 60 or 300 in four ways, and κ is that of the 50th to the 110th "
        "update behind: *live*, as it is; *frozen w*, with gradients taken at the weights of the starting point, "
        "so that curvature cannot answer to the noise; *frozen v*, with v̂ as it was there; and both. η is "
        f"constant. Standard errors are about {errors}.",
        "",
        markdown(ways),
        "",
        "### Every cell outside 0.9 to 1.1",
        "",
        "<details><summary>One by one</summary>",
        "",
        *outside,
        "",
        "</details>",
        "",
        "## (e) The mean gradient over many batches",
        "",
        "At every sixth update the weights are held, and the gradients of 16 other batches give the drift again, "
        "with an error of its own. z is the difference over the error of both. *v̂ before*: the same mean "
        "gradient over the v̂ before the update.",
        "",
        markdown(
            truth.assign(**{"v̂ before": truth["before"]})[
                ["model", "role", "tenth", "drift", "drift_se", "truth", "truth_se", "v̂ before", "z"]
            ],
            4,
        ),
        "",
    ]
    if published is not None:
        shown = published.rename(
            columns={"white_noise": "white noise", "steady": "2b/(2b+1)", "of_2b": "A/(2b·I)"}
        )
        lines += [
            "## (f) The published logs",
            "",
            "alignment/(alignment + injection), before the step, by tenth of the run, beside what white noise "
            "makes with the real schedule, and 2b/(2b+1) = 18/19. Their drift was not logged.",
            "",
            markdown(shown[["run", "role", "tenth", "share", "white noise", "2b/(2b+1)", "A/(2b·I)"]], 3),
            "",
        ]
    return "\n".join(lines)


def taken(
    parts: dict[str, pd.DataFrame], roles: pd.DataFrame, truth: pd.DataFrame, branch: pd.DataFrame
) -> list[str]:
    """What to take from it: the words were written beside these numbers."""
    noise, square, invariant = (parts[name] for name in ("noise", "quadratic", "invariance"))
    steady = noise[(noise["schedule"] == "constant") & (noise["β₂"] == 0.999)]
    short = noise[noise["β₂"] == 0.95]
    own = 1 - square.loc[square["β₂"] == 0.95, "by hand/with v̂ before"]
    worst = {beta2: (rows["memory/null"] - 1).abs().max() for beta2, rows in noise.groupby("β₂")}
    inner = roles[(roles["group"] != "other") & roles["kappa"].notna()]
    later = inner[inner["tenth"] > 2]
    first = inner[inner["tenth"] == 1]
    low, high = later["kappa_path"].quantile([0.05, 0.95])
    negative = {role: (rows["drift"] < 0).mean() for role, rows in roles.groupby("group")}
    clear = {role: (rows["drift"] < -2 * rows["drift_se"]).mean() for role, rows in roles.groupby("group")}
    frozen = branch[(branch["way"] == "frozen w") & (branch["role"] != "other")]
    total = frozen["kappa"] + frozen["signal/injection"]
    live = branch[(branch["way"] == "live") & (branch["role"] != "other")]
    outer = roles[(roles["group"] == "other") & roles["kappa_path"].notna()]
    rare, kept_long = (
        outer.loc[(outer["setting"] == "β₂ 0.999") == which, "kappa_path"].median() for which in (False, True)
    )
    adam, sgd = (
        invariant[(invariant["optimizer"] == name) & (invariant["tensor"] != "out")]
        for name in ("AdamW", "SGD")
    )
    even, uneven = (
        adam.loc[adam["activation"] == kind].groupby("tensor")["drift/diffusion"].mean().to_dict()
        for kind in ("tanh", "GELU")
    )

    def span(role: str) -> str:
        return "{:.1f} to {:.1f}".format(
            *first.loc[first["group"] == role, "kappa_path"].quantile([0.05, 0.95])
        )

    def within(rows: pd.Series) -> str:
        return f"{rows.between(LOW, HIGH).sum()} of {len(rows)} cells ({rows.between(LOW, HIGH).mean():.0%})"

    return [
        "What to take from it:",
        "",
        f"- On pure noise the split is exact: κ is within {worst[0.999]:.2%} of 1 for every β₁ with β₂ = 0.999 "
        f"and within {worst[0.95]:.1%} with 0.95, drift within {noise['drift/error'].abs().max():.1f} standard "
        f"errors of 0, and ‖w‖² grows by {steady['growth/η²n'].min():.3f} to {steady['growth/η²n'].max():.3f} of "
        "η²n whatever β₁ is (β₂ = 0.999, η steady). With β₂ = 0.95 v̂ follows the gradient that it divides, and "
        f"it is {short['growth/η²n'].min():.3f} to {short['growth/η²n'].max():.3f} of it.",
        "- Where the mean gradient is known the drift is it, to "
        f"{(square['logged/by hand'] - 1).abs().max():.1%}. By many batches at frozen weights the drift of a "
        f"training is the logged one within two errors of both in {(truth['z'].abs() <= 2).sum()} of {len(truth)} "
        "cells of role and tenth.",
        "- v̂ of the update, which holds (1−β₂)g², is the one to divide by: it costs a fresh gradient "
        f"{own.min():.0%} to {own.max():.0%} of its mean at β₂ = 0.95 (u's own gradients lose nearly as much), "
        "and v̂ before the update has no bound where gradients are rare: in the embedding the sign of such a "
        "drift is a matter of chance (e).",
        f"- A normalisation makes the drift 0 for SGD (cosines up to {sgd['cosine'].max():.0e}), **not for "
        "Adam**: divided by √v̂ weight by weight, the gradient is no longer orthogonal. Behind tanh drift is "
        f"{even['first']:+.1%} and {even['second']:+.1%} of diffusion, behind GELU, whose activations make v̂ "
        f"uneven, {uneven['first']:+.1%} and {uneven['second']:+.1%}, and many batches say much the same.",
        f"- In trainings κ lies within 0.9 to 1.1 in {within(inner['kappa'])} of role and tenth, without the role "
        "“other”. Most of what lies outside is noise of the drift at the window's edges: of the path, which has "
        f"none, {within(inner['kappa_path'])}; behind the second tenth {within(later['kappa_path'])}, 90 % of them "
        f"from {low:.2f} to {high:.2f}. **It is a few percent below 1, not at 1.**",
        "- At the start κ is off for another reason than curvature: gradients that change in size within "
        f"momentum's window, those of q and k growing (κ of the path {span('selection')}), those of the MLP and o "
        f"shrinking ({span('transmission')}). White noise of the measured sizes makes the same in the first "
        "tenth: the correlation of the two over settings and roles is "
        f"{np.corrcoef(first['kappa_path'], first['kappa_size'])[0, 1]:.2f}. What is left there, and at small η, "
        "is curvature.",
        f"- In “other” (embeddings, norms, biases) κ of the path has the median {rare:.1f} with β₂ = 0.95 and "
        f"{kept_long:.2f} with 0.999: v̂ forgets a rare token between its gradients, so that old gradients in u "
        "weigh more than new ones. Drift leads there all the same.",
        f"- With gradients taken at frozen weights the mean gradient makes {frozen['signal/injection'].min():.0%} "
        f"to {frozen['signal/injection'].max():.0%} of an update's energy, and κ falls to about 1 − "
        f"signal/injection (their sum is {total.min():.2f} to {total.max():.2f}): a mean gradient that stands "
        "still adds to drift and not to memory. In live training it does not stand still: signal/injection is "
        f"{live['signal/injection'].min():.2f} to {live['signal/injection'].max():.2f}, for curvature turns the "
        "gradient back within momentum's window, and κ stays near 1.",
        f"- Drift is negative in {negative['selection']:.0%} of the tenths for q and k (by more than two errors "
        f"in {clear['selection']:.0%}), in {negative['value']:.0%} for v ({clear['value']:.0%}), in "
        f"{negative['transmission']:.0%} for the MLP and o ({clear['transmission']:.0%}), and nearly never in the "
        "rest. For q and k it grows with the batch and with a smaller η, and everywhere towards the end of a "
        "schedule, where diffusion, η²n, fades first. At β₁ = 0, where there is no memory at all, shares of "
        "drift and diffusion are much as at 0.9.",
        "- Alignment/(alignment + injection) is near 2b/(2b+1) at every β₁ (last table of d) and in the published "
        "logs over their first half, where only LLaMA's q and k begin clearly below (f); towards their end it is "
        "above, which is drift if their noise is white.",
    ]


def whole_shares(roles: pd.DataFrame) -> pd.DataFrame:
    """Signed shares of a run's sums, and alignment's among the forces beside 2b/(2b+1)."""
    found = []
    for (model, setting, group), rows in roles.groupby(["model", "setting", "group"], sort=False):
        sums = rows[["drift", "diffusion", "decay", "memory", "memory_null", "injection", "signal"]].sum()
        total = sums[["drift", "diffusion", "decay"]].abs().sum()
        alignment = sums["drift"] + sums["memory"]
        beta1 = BASE.betas[0] if "betas" not in SETTINGS[setting] else SETTINGS[setting]["betas"][0]
        found.append(
            {
                "model": model,
                "setting": setting,
                "role": group,
                **{name: sums[name] / total for name in ("drift", "diffusion", "decay")},
                "κ": kappa(sums.to_frame().T).item() if beta1 else np.nan,
                "A/(A+I)": alignment / (alignment + sums["injection"]),
                "2b/(2b+1)": 2 * beta1 / (1 + beta1),
            }
        )
    return pd.DataFrame(found)


def figure(parts: dict[str, pd.DataFrame], table: pd.DataFrame, path: Path) -> None:
    """κ by tenth; drift against the mean gradient's; drift's share by batch."""
    roles = table[table["by"] == "role"]
    picture, (left, middle, right) = plt.subplots(1, 3, figsize=(6.9, 2.3), layout="constrained", dpi=200)
    settings_drawn = roles[(roles["group"] != "other") & roles["kappa_path"].notna()]
    for (_, _, role), rows in settings_drawn.groupby(["model", "setting", "group"]):
        left.plot(rows["tenth"], rows["kappa_path"], color=ROLE_COLORS[role], linewidth=0.7, alpha=0.8)
    left.axhspan(LOW, HIGH, color="#EEEEEE", zorder=0)
    left.axhline(1, color="#808080", linewidth=0.6, zorder=1)
    left.set(xlabel="tenth of the run", ylabel="κ of the path", ylim=(0, 2))
    truth = pd.concat([parts[f"truth-{model}"] for model in MODELS])
    for role, rows in truth.groupby("role"):
        scale = rows["diffusion"].abs()
        middle.errorbar(
            rows["truth"] / scale, rows["drift"] / scale, xerr=rows["truth_se"] / scale,
            yerr=rows["drift_se"] / scale, fmt="o", ms=2, linewidth=0.6, color=ROLE_COLORS[role], label=role,
        )  # fmt: skip
    middle.axline((0, 0), slope=1, color="#808080", linewidth=0.6, zorder=0)
    ends = (truth["truth"] / truth["diffusion"])[truth["role"] != "other"]
    span = (ends.min() - 0.2, ends.max() + 0.2)
    middle.set(
        xlim=span, ylim=span, xlabel="mean gradient's drift/diffusion", ylabel="logged drift/diffusion"
    )
    middle.legend(fontsize=6, frameon=False, handlelength=1)
    shares = whole_shares(roles)
    for (model, role), rows in shares[shares["setting"].isin(["batch 2", "base", "batch 64"])].groupby(
        ["model", "role"], sort=False
    ):
        if role != "other":
            size = rows["setting"].map({"batch 2": 2, "base": 8, "batch 64": 64})
            order = np.argsort(size.to_numpy())
            style = "-" if model == "GPT-NeoX" else "--"
            right.plot(
                size.to_numpy()[order], rows["drift"].to_numpy()[order], style, marker="o", ms=2.5, linewidth=1,
                color=ROLE_COLORS[role],
            )  # fmt: skip
    right.axhline(0, color="#808080", linewidth=0.6, zorder=0)
    right.set(xscale="log", xlabel="batch", ylabel="drift's share, signed")
    right.set_xticks([2, 8, 64], ["2", "8", "64"])
    right.set_xticks([], minor=True)
    right.set_title("solid: GPT-NeoX, dashed: LLaMA", fontsize=6)
    for ax in (left, middle, right):
        ax.tick_params(labelsize=7, width=0.6, length=2.5)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
        ax.spines[["top", "right"]].set_visible(False)
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--reference", type=Path, default=os.environ.get("WEIGHTDYN_REFERENCE"))
    parser.add_argument("--only", nargs="*", choices=[*PARTS, "trainings"], help="make these, and no report")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.only:
        for name in arguments.only:
            trainings(arguments.runs) if name == "trainings" else kept(arguments.runs, name)
        return
    parts = {name: kept(arguments.runs, name) for name in PARTS}
    table = cells(trainings(arguments.runs))
    published = None if arguments.reference is None else published_shares(arguments.reference)
    figure(parts, table, DATA / "drift.png")
    table.round(5).to_csv(DATA / "drift.csv", index=False)
    (DATA / "drift.md").write_text(report(parts, table, published), encoding="utf-8")


if __name__ == "__main__":
    main()
