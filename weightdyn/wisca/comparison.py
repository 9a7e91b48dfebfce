"""Paired runs: what a rescaling does to the forces, to the Weibull law and to the loss, seed by seed.

Runs of one seed share initial weights, batches and random numbers, so the difference of two arms is the arms'
doing, and its spread over seeds says how sure that is. Two of the arms are controls. `random` scales by the same
sizes in random directions: what any rescaling does. `lr_equivalent` scales nothing and gives each tensor the
learning rate that AdamW's scale-free update makes of a rescaling: what a learning rate does.

A run is a pure function of its seed and arm, and is stored as a run directory of its own; so they can run side by
side, and what was killed is continued.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
from torch import nn

from weightdyn.core.checks import (
    check_choice,
    check_jobs,
    check_number,
    check_path,
    check_whole,
    refuse,
    shown,
)
from weightdyn.core.progress import Progress, progress_bar
from weightdyn.core.tables import FORCES, PARTS, By, aggregate, budget, group_columns, kappa, pool_weibull
from weightdyn.files.durable import write_file
from weightdyn.record.runlog import RunLog, RunLogError
from weightdyn.wisca.apply import rescale_
from weightdyn.wisca.arms import ARMS, parse_arm
from weightdyn.wisca.plan import CHOICES, check_choices
from weightdyn.wisca.runs import (
    Batches,
    Loss,
    MakeModel,
    MakeOptimizer,
    Run,
    Task,
    is_done,
    model_loss,
    read_run,
    train_run,
)

INDEX = "comparison.json"
"""Name of the file that says what a folder of runs compares."""

SHIFTED = (*(f"{force}_share" for force in FORCES), *FORCES, "norm_sq")
"""Quantities of `Comparison.shift` of every force table, besides λ, k and the losses."""

DRIFT_SHIFTED = ("drift_share", "diffusion_share", "drift", "memory", "diffusion", "kappa")
"""Those of a force table that knows the drift."""


def compare(
    make_model: MakeModel,
    make_optimizer: MakeOptimizer,
    batches: Batches,
    arms: Sequence[str] = ARMS,
    seeds: Iterable[int] = (0, 1, 2),
    steps: int = 1000,
    *,
    loss: Loss | None = None,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    eval_every: int = 100,
    log_every: int = 1,
    weibull_every: int = 20,
    save_every: int = 500,
    out: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    n_jobs: int | None = None,
    progress: Progress = None,
    **options: Any,
) -> Comparison:
    """Train a model once for each arm and seed, with every force on record.

    An arm is written in words, separated by spaces:

        none            no rescaling
        init            `rescale_` before the first update
        every=N         … after every N-th update; "init every=N" does both
        random          before the first update, by α or 1/α, as a coin falls for each α: the control for "any
                        rescaling of this size"
        lr_equivalent   no rescaling, but lr η/f, decay λ·f and ε·f for a tensor that `init` would multiply by f:
                        the control for "only the learning rate"

    and behind them, for this arm alone, moments=, norm=, granularity=, power_of_two, as `rescale_` takes them
    ("every=250 moments=reset", "lr_equivalent norm=l2"; "norm=l2" is "init norm=l2"). With w̃ = f·w and g̃ = g/f
    AdamW does w̃ ← (1−ηλ)w̃ − ηũ with

        ũ = (m̂/f)/(√v̂/f + ε) = m̂/(√v̂ + f·ε),    hence    w ← (1−ηλ)w − (η/f)·ũ,

    so `lr_equivalent` is `init` up to rounding. Clipping by the norm of all gradients breaks this: √Σ‖g/f‖² is not
    √Σ‖g‖², and the updates are clipped at other times and by other factors, which Adam's averages keep.
    "lr_equivalent clip=rescaled" clips by √Σ‖g/f‖², as `init` does, and is its equal again.

    Args:
        make_model: function of the seed, called with torch's generator set to it.
        make_optimizer: function of a model: AdamW (or Adam; `lr_equivalent` wants decay to be decoupled).
        batches: function of the seed and of the update's number, 1-based. Token ids (sequences, length), or
            arguments of the model with labels; anything with a `loss` of your own.
        arms: as above.
        seeds: whole numbers; intervals are over these.
        steps: updates.
        loss: function of a model and a batch. Default: that of a transformers model, with the ids as labels.
        schedule: factor on the learning rate, as a function of the update's number. Default: 1.
        clip: largest norm of all gradients. Default: no clipping.
        evaluate: function of the model that gives a held-out loss; recorded as `eval_loss` before the first
            update, every `eval_every` and at the end.
        eval_every, log_every, weibull_every, save_every: updates between evaluations, force rows, Weibull fits,
            and saves of the state that a killed run continues from.
        out: folder for the runs, as `<arm>/seed-<seed>`. What it holds already is not run again, and a killed
            run is continued from its last save; arms and seeds can be added. None keeps all in memory.
        config: what else decides the runs, for example the learning rate behind `make_optimizer`, as JSON can hold
            it. Kept as `info["config"]`, and `out` is refused if it holds runs of another one.
        n_jobs: runs at a time, as joblib counts (−1: as many as there are cores). Default: 1, or what
            `joblib.parallel_config` says.
        progress: a bar of the runs. None: where someone watches.
        options: of `rescale_` for all arms: pairs, norm, granularity, moments, power_of_two, max_alpha, errors.

    Returns:
        The comparison. In a process with as many threads as before, its runs are the same bit by bit.

    Raises:
        TypeError, ValueError: an arm or another argument is none of those accepted; `out` holds runs of other
            settings; runs of a seed began with different weights, batches or optimizers; `lr_equivalent` of a
            tensor that has more than one α (a fused one, or by head), for which there is no one learning rate; an
            optimizer that `ForceLogger` or `lr_equivalent` cannot take.
        RunLogError: a file in `out` is damaged.

    Source: WISCA is arXiv 2508.16676; the controls are ours.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=4, num_key_value_heads=1)
    >>> def batch(seed, update):
    ...     rng = torch.Generator().manual_seed(10_000 * seed + update)
    ...     return torch.randint(32, (2, 8), generator=rng)
    >>> found = compare(lambda seed: LlamaForCausalLM(config), lambda m: torch.optim.AdamW(m.parameters()),
    ...                 batch, ["none", "init"], seeds=[0, 1], steps=5, progress=False)
    >>> shift = found.shift("init", by="component")
    >>> bool(shift.query("component == 'q' and quantity == 'lam' and step == 0")["difference"].item() < 0)
    True
    """
    functions = {"make_model": make_model, "make_optimizer": make_optimizer, "batches": batches}
    optional = {"loss": loss, "schedule": schedule, "evaluate": evaluate}
    for argument, function in {**functions, **optional}.items():
        if not callable(function) and not (argument in optional and function is None):
            raise TypeError(f"{argument} must be a function, got {shown(function)}")
    parsed = [parse_arm(arm, options) for arm in _several("arms", arms, "strings such as 'init'")]
    seeds = [check_whole("seeds", seed) for seed in _several("seeds", seeds, "whole numbers")]
    _check_once("arms", [arm.name for arm in parsed])
    _check_once("seeds", seeds)
    every = {"eval_every": eval_every, "log_every": log_every, "weibull_every": weibull_every}
    for argument, number in {"steps": steps, **every, "save_every": save_every}.items():
        check_whole(argument, number, 1)
    check_number("clip", clip, 0, open_low=True, none="no clipping")
    check_jobs("n_jobs", n_jobs, none="as joblib.parallel_config says")
    inspect.signature(rescale_).bind(None, **options)
    check_choices(**{name: options[name] for name in CHOICES if name in options})
    settings = {
        "steps": steps,
        "clip": clip,
        "log_every": log_every,
        "weibull_every": weibull_every,
        "eval_every": eval_every if evaluate is not None else None,
        "options": _as_json("options", options),
        "config": _as_json("config", config),
    }
    folder = None if out is None else check_path("out", out, "the path of a folder for the runs, or None")
    if folder is not None:
        _open(folder, settings, [arm.name for arm in parsed], seeds)
    task = Task(
        make_model, make_optimizer, batches, loss or model_loss, schedule, evaluate, settings, save_every
    )
    pairs = [(arm, seed) for seed in seeds for arm in parsed]
    import joblib  # where it is used: wanted here only, and slow to load

    made = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(train_run)(task, arm, seed, _place(folder, arm.name, seed)) for arm, seed in pairs
    )
    bar = progress_bar(made, progress=progress, total=len(pairs), unit="run")
    runs = {(arm.name, seed): run for (arm, seed), run in zip(pairs, bar, strict=True)}
    _check_paired(runs)
    return Comparison(runs, {**settings, "arms": [arm.name for arm in parsed], "seeds": seeds})


@dataclass(frozen=True)
class Comparison:
    """Paired runs: what `compare` returns and `Comparison.read` reads.

    Attributes:
        runs: the `Run` of each (arm, seed).
        info: arms, seeds, steps, clip, options and how often what was logged.
    """

    runs: dict[tuple[str, int], Run]
    info: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """Read a folder that `compare` wrote, with those of its runs that are at their end.

        Raises:
            FileNotFoundError: there is no comparison, or none of its runs is at its end.
            RunLogError: a file there is damaged, or none that `compare` wrote.
        """
        folder = check_path("path", path, "the folder passed to compare as out")
        info = _read_index(folder)
        if info is None:
            raise FileNotFoundError(
                f"{folder / INDEX} does not exist: give the folder passed to compare as out"
            )
        places = {(arm, seed): _place(folder, arm, seed) for seed in info["seeds"] for arm in info["arms"]}
        runs = {
            key: read_run(place) for key, place in places.items() if place and is_done(place, info["steps"])
        }
        if not runs:
            raise FileNotFoundError(
                f"{folder} has no run at its end yet: call compare with out={str(path)!r} again"
            )
        return cls(runs, info)

    @property
    def arms(self) -> list[str]:
        """Arms that have runs, in the order in which they were named."""
        return list(dict.fromkeys(arm for arm, _ in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Seeds that have runs."""
        return list(dict.fromkeys(seed for _, seed in self.runs))

    def forces(self, by: By | Sequence[str] | None = None) -> pd.DataFrame:
        """Force tables of all runs, with `arm` and `seed` before their columns.

        Args:
            by: sum over the tensors of each "layer", "component", "role", over the "model", or over a list of such
                columns; None leaves one row per tensor.
        """
        return self._stacked(lambda run: run.log.forces(by))

    def weibull(self) -> pd.DataFrame:
        """Weibull tables of all runs (λ is `lam`), with `arm` and `seed` before their columns."""
        return self._stacked(lambda run: run.log.weibull())

    def metrics(self) -> pd.DataFrame:
        """Loss, `grad_norm` (before clipping), `eval_loss` and events of all runs, with `arm` and `seed`."""
        return self._stacked(lambda run: run.log.metrics())

    def rescales(self) -> pd.DataFrame:
        """Every α of all runs: `Run.rescales`, with `arm` and `seed` before its columns."""
        return self._stacked(lambda run: run.rescales)

    def shift(
        self,
        arm: str,
        against: str = "none",
        *,
        by: By | Sequence[str] | None = "model",
        window: int = 1,
        confidence: float = 0.95,
    ) -> pd.DataFrame:
        """How an arm differs from another, seed by seed.

            d_s = x(arm, s) − x(against, s),   difference = mean of d over the n seeds that both have,
            low, high = difference ∓ t·sd(d)/√n,   t: Student's, n−1 degrees of freedom

        Args:
            arm: what is shifted.
            against: what it is held against.
            by: sum the forces and pool the Weibull laws of each "layer", "component", "role", of the whole
                "model", or of a list of such columns; None compares tensor by tensor.
            window: take so many updates together: forces are summed over them (and shares are those of the
                sums), all else is averaged.
            confidence: of the interval.

        Returns:
            A row for each step, group and `quantity`, with the columns of `core.tables.SHIFT_TABLE`: the shares
            |F|/Σ|F| of the forces (fractions), the forces per update, norm_sq (‖w‖² before the update), `lam` and
            `k`, and every loss, whose group is missing. Where the drift is known, also `drift`, `memory` and
            `diffusion` per update, κ = memory/memory_null, and the shares of drift and diffusion among drift,
            diffusion and decay, whose own is what is left. Of single updates drift is mostly noise: take a window.

        Raises:
            TypeError, ValueError: no such arm; the two share no seed; an unknown `by`.
        """
        check_choice("arm", arm, self.arms)
        check_choice("against", against, self.arms)
        check_whole("window", window, 1, 2**31)
        check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
        seeds = [seed for seed in self.seeds if {(arm, seed), (against, seed)} <= set(self.runs)]
        if not seeds:
            raise ValueError(
                f"arm {arm!r} and {against!r} share no seed; compare them again with the same seeds"
            )
        keys, paired = [], []
        for seed in seeds:
            logs = [self.runs[name, seed].log for name in (arm, against)]
            keys = group_columns(logs[0].forces(), by)
            ours, theirs = (_values(log, by, keys, window) for log in logs)
            paired.append(ours.merge(theirs, on=["step", *keys, "quantity"], suffixes=("", "_control")))
        table = pd.concat(paired, ignore_index=True)
        table["difference"] = table["value"] - table["value_control"]
        groups = table.groupby(["step", *keys, "quantity"], dropna=False, observed=True, sort=False)
        found = groups[["value", "value_control", "difference"]].mean()
        found = found.rename(columns={"value_control": "control"})
        n = groups["difference"].count()
        spread = groups["difference"].std() / np.sqrt(n)
        reach = spread * scipy.special.stdtrit((n - 1).where(n > 1), (1 + confidence) / 2)
        found = found.assign(low=found["difference"] - reach, high=found["difference"] + reach, seeds=n)
        return found.reset_index()

    def _stacked(self, table_of: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        tables = {key: table_of(run) for key, run in self.runs.items()}
        labelled = [
            table.assign(arm=arm, seed=seed)[["arm", "seed", *table]]
            for (arm, seed), table in tables.items()
            if len(table)
        ]
        if not labelled:
            return pd.DataFrame(columns=["arm", "seed", *next(iter(tables.values()))])
        return pd.concat(labelled, ignore_index=True)

    def __repr__(self) -> str:
        rows = [f"  {arm}: seeds {[seed for name, seed in self.runs if name == arm]}" for arm in self.arms]
        return "\n".join([f"Comparison of {len(self.runs)} runs, {self.info['steps']:,} updates each", *rows])


def _values(log: RunLog, by: By | Sequence[str] | None, keys: list[str], window: int) -> pd.DataFrame:
    """What is compared of one run, in long form: step, groups, quantity, value."""
    forces = aggregate(log.forces(), by)
    parts = [name for name in PARTS if name in forces]
    forces["updates"] = forces["span"]
    for name in (*FORCES, *parts):
        forces[name] = forces[name] * forces["span"]
    sums = dict.fromkeys([*FORCES, *parts, "updates", "rows"], "sum") | {"norm_sq": "mean"}
    counts = _windows(forces, keys, window, dict.fromkeys(parts, "count")) if parts else None
    forces = _windows(forces.assign(rows=1), keys, window, sums)
    if counts is not None:  # a sum over a missing value is missing
        forces[parts] = forces[parts].where(counts[parts].eq(forces["rows"], axis=0))
    forces = forces.assign(span=forces["updates"])
    tables = [_long(_per_update(budget(forces)), keys, SHIFTED)]
    if "drift" in forces and "memory" in forces and forces["drift"].notna().any():
        shares = budget(forces, kind="drift").assign(kappa=kappa(forces))
        tables.append(_long(_per_update(shares), keys, DRIFT_SHIFTED).dropna(subset="value"))
    fits = log.weibull()
    if len(fits):
        pooled = pool_weibull(fits, by)
        tables.append(_long(_windows(pooled, keys, window, {"lam": "mean", "k": "mean"}), keys, ["lam", "k"]))
    metrics = log.metrics()
    for name in [name for name in metrics if "loss" in name]:
        recorded = metrics[["step", name]].dropna()
        tables.append(_long(_windows(recorded, [], window, {name: "mean"}), [], [name]))
    return pd.concat([table.astype({key: object for key in keys if key in table}) for table in tables])


def _windows(table: pd.DataFrame, keys: list[str], window: int, how: dict[str, Any]) -> pd.DataFrame:
    last = -(-table["step"] // window) * window
    groups = table.assign(step=last).groupby(["step", *keys], dropna=False, observed=True)
    return groups.agg(how).reset_index()


def _per_update(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its forces, sums over the updates of a window, as means."""
    names = [name for name in (*FORCES, "drift", "memory", "diffusion") if name in table]
    return table.assign(**{name: table[name] / table["updates"] for name in names})


def _long(table: pd.DataFrame, keys: list[str], names: Sequence[str]) -> pd.DataFrame:
    return table.melt(["step", *keys], [name for name in names if name in table], "quantity", "value")


def _several(argument: str, values: Any, what: str) -> list[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise refuse(argument, f"several {what}, in a list", values)
    return list(values)


def _check_once(argument: str, values: list[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{argument} must be one or more, each once, got {values}")


def _as_json(argument: str, value: Any) -> Any:
    """What a value comes back as from comparison.json."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be what JSON can hold: {error}") from None


def _check_paired(runs: Mapping[tuple[str, int], Run]) -> None:
    first: dict[int, tuple[str, str]] = {}
    for (arm, seed), run in runs.items():
        name, start = first.setdefault(seed, (arm, run.start))
        if start != run.start:
            raise ValueError(
                f"make_model and batches must be functions of the seed: with seed {seed} the arms {name!r} and "
                f"{arm!r} began with different weights, batches or optimizers; draw all random numbers from the "
                "seed, and give runs of other settings another out"
            )


# --- files --------------------------------------------------------------------------------------------------


def _place(folder: Path | None, arm: str, seed: int) -> Path | None:
    return None if folder is None else folder / arm.replace(" ", "_") / f"seed-{seed}"


def _read_index(folder: Path) -> dict[str, Any] | None:
    """What the folder's index says; None if there is none."""
    path = folder / INDEX
    if not path.exists():
        return None
    reason = "it is no regular file"
    if path.is_file():
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            return _check_index(index)
        except (ValueError, TypeError, RecursionError) as error:
            reason = f"it is damaged, or was not written by compare ({error})"
    raise RunLogError(
        f"{path} cannot be read: {reason}. Copy it from a backup; or delete it and call compare again with the "
        "same arguments: runs that are there are not made again"
    )


def _check_index(index: Any) -> dict[str, Any]:
    """Raise if something else stands where `compare` writes arms, seeds and steps; arms name folders."""
    if not isinstance(index, dict):
        raise TypeError(f"it holds a {type(index).__name__}")
    check_whole("steps", index.get("steps"), 1)
    for arm in _several("arms", index.get("arms"), "strings"):
        parse_arm(arm, {})
    for seed in _several("seeds", index.get("seeds"), "whole numbers"):
        check_whole("seeds", seed)
    return index


def _open(folder: Path, settings: dict[str, Any], arms: list[str], seeds: list[int]) -> None:
    """Enter the arms and seeds into the folder's index; refuse a folder of other settings."""
    known = _read_index(folder) or {**settings, "arms": [], "seeds": []}
    differ = [
        f"{name} (was {known.get(name)!r}, is {value!r})"
        for name, value in settings.items()
        if known.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"out: {folder} holds runs of other settings: {', '.join(differ)}; "
            "choose another out, or the same settings"
        )
    merged = {
        **settings,
        "arms": list(dict.fromkeys([*known["arms"], *arms])),
        "seeds": list(dict.fromkeys([*known["seeds"], *seeds])),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(
        folder / INDEX, lambda path: path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    )
