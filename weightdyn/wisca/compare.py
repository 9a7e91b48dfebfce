"""Paired runs: what a rescaling does to the forces, to the Weibull law and to the loss, seed by seed.

Runs of one seed share initial weights, batches and random numbers, so the difference of two arms is the arms'
doing, and its spread over seeds says how sure that is. Two of the arms are controls. `random` scales by the same
sizes in random directions: what any rescaling does. `lr_equivalent` scales nothing and gives each tensor the
learning rate that AdamW's scale-free update makes of a rescaling: what a learning rate does.

A run is a pure function of its seed and arm, and is stored as a run directory of its own; so they can run side by
side, and what was killed is continued.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from weightdyn.forces import FORCES, By, aggregate, budget
from weightdyn.logger import ForceLogger
from weightdyn.runlog import RunLog, RunWriter
from weightdyn.trajectory import pool_weibull
from weightdyn.wisca.pairs import unwrap
from weightdyn.wisca.rescale import apply_, check_choices, plan_rescale, scale_factors
from weightdyn.wisca.schedule import EVENT, RescaleSchedule

ARMS = ("none", "init", "every=250", "random", "lr_equivalent")
"""Arms of `compare` if none are named."""

SHIFTED = (*(f"{force}_share" for force in FORCES), *FORCES, "norm_sq", "lam", "k")
"""Quantities of `Comparison.shift`, besides the losses."""

_KINDS = ("none", "init", "random", "lr_equivalent")
_CHOICES = ("moments", "norm", "granularity")
_WORDS = "none, init, random, lr_equivalent, every=N, moments=…, norm=…, granularity=…, power_of_two, clip=rescaled"
_STATE, _RESCALES, _INDEX = "state.pt", "rescales.parquet", "comparison.json"

MakeModel = Callable[[int], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Batches = Callable[[int, int], Any]
Loss = Callable[[nn.Module, Any], Tensor]


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
    progress: bool = True,
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
        progress: show a bar of the runs.
        options: of `rescale_` for all arms: pairs, norm, granularity, moments, power_of_two, max_alpha, errors.

    Returns:
        The comparison. In a process with as many threads as before, its runs are the same bit by bit.

    Raises:
        ValueError: an arm or another argument is none of those accepted; `out` holds runs of other settings;
            runs of a seed began with different weights, batches or optimizers; `lr_equivalent` of a tensor that
            has more than one α (a fused one, or by head), for which there is no one learning rate.
        TypeError: an optimizer that `ForceLogger` or `lr_equivalent` cannot take.

    Source: WISCA is arXiv 2508.16676; the controls are ours.

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
    parsed = [_parse(arm, options) for arm in arms]
    seeds = [int(seed) for seed in seeds]
    _check(parsed, seeds, steps, clip, eval_every, log_every, weibull_every, save_every)
    settings = {
        "steps": steps,
        "clip": clip,
        "log_every": log_every,
        "weibull_every": weibull_every,
        "eval_every": eval_every if evaluate is not None else None,
        "options": json.loads(json.dumps(options, default=str)),
        "config": json.loads(json.dumps(config, default=str)),
    }
    folder = None if out is None else Path(out)
    if folder is not None:
        _open(folder, settings, [arm.name for arm in parsed], seeds)
    task = _Task(
        make_model, make_optimizer, batches, loss or _model_loss, schedule, evaluate, settings, save_every
    )
    pairs = [(arm, seed) for seed in seeds for arm in parsed]
    import joblib  # where it is used: wanted here only, and slow to load

    made = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(_run)(task, arm, seed, _place(folder, arm.name, seed)) for arm, seed in pairs
    )
    runs = {
        (arm.name, seed): run
        for (arm, seed), run in zip(
            pairs, tqdm(made, total=len(pairs), unit="run", disable=not progress), strict=True
        )
    }
    _check_paired(runs)
    return Comparison(runs, {**settings, "arms": [arm.name for arm in parsed], "seeds": seeds})


class Run(NamedTuple):
    """One run of a comparison.

    Attributes:
        log: its forces, Weibull fits and metrics.
        rescales: the tables of `rescale_`, with `step`, the updates made before each; of `lr_equivalent` the
            rescaling that it stands for.
        start: digest of its initial weights, its first batch and its optimizer's settings.
    """

    log: RunLog
    rescales: pd.DataFrame
    start: str


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
        """
        folder = Path(path)
        info = _read_index(folder)
        if info is None:
            raise FileNotFoundError(
                f"{folder / _INDEX} does not exist: give the folder passed to compare as out"
            )
        places = {(arm, seed): _place(folder, arm, seed) for seed in info["seeds"] for arm in info["arms"]}
        runs = {
            key: _read_run(place) for key, place in places.items() if place and _is_done(place, info["steps"])
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
        """Force tables of all runs, with `arm` and `seed` before their columns; `by` as in `RunLog.forces`."""
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
        by: By | Sequence[str] = "model",
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
                "model", or of a list of such columns.
            window: take so many updates together: forces are summed over them (and shares are those of the
                sums), all else is averaged.
            confidence: of the interval.

        Returns:
            A row for each step (the window's last; 0 is before the first update), group and `quantity`: the
            shares |F|/Σ|F| of the forces (fractions), the forces per update, norm_sq (‖w‖² before the update),
            `lam` and `k`, and every loss, whose group is missing. Columns `value` and `control` (means over
            the seeds of either arm), `difference`, `low`, `high` (NaN of one seed), `seeds` (n).

        Raises:
            ValueError: no such arm; the two share no seed; an unknown `by`.
        """
        for argument, name in (("arm", arm), ("against", against)):
            if name not in self.arms:
                raise ValueError(f"{argument} must be one of {self.arms}, got {name!r}")
        if window < 1 or not 0 < confidence < 1:
            raise ValueError(
                f"window must be a whole number ≥ 1 and confidence in (0, 1), got {window!r} and {confidence!r}"
            )
        seeds = [seed for seed in self.seeds if {(arm, seed), (against, seed)} <= set(self.runs)]
        if not seeds:
            raise ValueError(
                f"arm {arm!r} and {against!r} share no seed; compare them again with the same seeds"
            )
        keys = [key for key in ([by] if isinstance(by, str) else by) if key != "model"]
        paired = []
        for seed in seeds:
            ours, theirs = (_values(self.runs[name, seed].log, by, keys, window) for name in (arm, against))
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


def _values(log: RunLog, by: By | Sequence[str], keys: list[str], window: int) -> pd.DataFrame:
    """What is compared of one run, in long form: step, groups, quantity, value."""
    forces = aggregate(log.forces(), by)
    forces["updates"] = forces["span"]
    for name in FORCES:
        forces[name] = forces[name] * forces["span"]
    forces = _windows(forces, keys, window, dict.fromkeys([*FORCES, "updates"], "sum") | {"norm_sq": "mean"})
    shares = budget(forces.assign(span=forces["updates"]))
    for name in FORCES:
        shares[name] = shares[name] / shares["updates"]
    tables = [_long(shares, keys, [name for name in SHIFTED if name in shares])]
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


def _long(table: pd.DataFrame, keys: list[str], names: Sequence[str]) -> pd.DataFrame:
    return table.melt(["step", *keys], list(names), "quantity", "value")


# --- arms ---------------------------------------------------------------------------------------------------


class _Arm(NamedTuple):
    """An arm's words, read."""

    name: str
    kind: str  # none, init, random, lr_equivalent, or every: no rescaling before the first update
    every: int | None
    rescaled_clip: bool
    options: dict[str, Any]


def _parse(arm: str, common: Mapping[str, Any]) -> _Arm:
    def wrong(why: str) -> ValueError:
        return ValueError(f"arms: {arm!r} {why}; an arm is made of the words {_WORDS}")

    if not isinstance(arm, str):
        raise TypeError(f"arms must be strings such as 'every=250 moments=reset', got {arm!r}")
    options, kinds, every, rescaled_clip = dict(common), [], None, False
    words = arm.split()
    for word in words:
        name, _, value = word.partition("=")
        if word in _KINDS:
            kinds.append(word)
        elif name == "every" and value.isdecimal() and int(value) > 0:
            every = int(value)
        elif name in _CHOICES:
            try:
                check_choices(**{name: value})
            except ValueError as error:
                raise wrong(f"is none: {error}") from None
            options[name] = value
        elif word == "power_of_two":
            options[word] = True
        elif word == "clip=rescaled":
            rescaled_clip = True
        else:
            raise wrong(f"has the word {word!r}")
    if not words or len(kinds) > 1:
        raise wrong("has no word" if not words else f"is {' and '.join(kinds)} at once")
    kind = kinds[0] if kinds else "init" if every is None else "every"
    if every is not None and kind not in ("init", "every"):
        raise wrong(f"cannot be {kind} and rescale on the way")
    if kind == "none" and len(words) > 1:
        raise wrong("rescales nothing, and has options of a rescaling")
    if rescaled_clip and kind != "lr_equivalent":
        raise wrong("clips by its own gradients; clip=rescaled is for lr_equivalent")
    return _Arm(" ".join(words), kind, every, rescaled_clip, options)


def _check(arms: list[_Arm], seeds: list[int], steps: int, clip: float | None, *every: int) -> None:
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms must be one or more, each once, got {names}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be whole numbers ≥ 0, each once, got {seeds}")
    if any(
        isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in (steps, *every)
    ):
        raise ValueError(
            "steps, eval_every, log_every, weibull_every and save_every must be whole numbers ≥ 1, "
            f"got {(steps, *every)}"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a number > 0, or None for no clipping, got {clip!r}")


# --- one run ------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """All that runs share."""

    make_model: MakeModel
    make_optimizer: MakeOptimizer
    batches: Batches
    loss: Loss
    schedule: Callable[[int], float] | None
    evaluate: Callable[[nn.Module], float] | None
    settings: dict[str, Any]
    save_every: int


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    inputs = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    return model(**inputs).loss


def _run(task: _Task, arm: _Arm, seed: int, place: Path | None) -> Run:
    """Train one model; continue what stands in `place`."""
    steps = task.settings["steps"]
    if place is not None and _is_done(place, steps):
        return _read_run(place)
    saved = None if place is None else place / _STATE
    state = torch.load(saved, map_location="cpu", weights_only=True) if saved and saved.exists() else None
    done = 0 if state is None else int(state["step"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.make_model(seed).train()
        device = next(model.parameters()).device
        optimizer = task.make_optimizer(model)
        start = _digest(model, optimizer, task.batches(seed, 1))
        rescales, factors = _begin(model, optimizer, arm, seed, apply=done == 0)
        base = [group["lr"] for group in optimizer.param_groups]
        torch.manual_seed(seed)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            _set_rng(state["rng"], device)
            rescales = pd.read_parquet(Path(str(place)) / _RESCALES)
            rescales = rescales[rescales["step"] <= done]
        if place is not None:
            info = {"wisca": {"arm": arm.name, "seed": seed, "start": start}}
            with contextlib.closing(RunWriter(place, done, info)) as writer:
                if done == 0:  # what an attempt left that died before its first save is done again
                    writer.restart(0)
                    writer.append("metrics", {"step": 0})
        logger = ForceLogger(
            optimizer,
            model,
            every=task.settings["log_every"],
            weibull_every=task.settings["weibull_every"],
            out=place,
            start_step=done,
        )
        with logger, _scheduled(model, optimizer, arm, logger, done) as schedule:
            if done == 0:
                if len(rescales) and arm.kind != "lr_equivalent":
                    logger.record(0, event=EVENT)
                if task.evaluate is not None:
                    logger.record(0, eval_loss=_evaluated(task, model))
            for update in range(done + 1, steps + 1):
                scale = 1.0 if task.schedule is None else task.schedule(update)
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * scale
                loss = task.loss(model, _on(device, task.batches(seed, update)))
                loss.backward()
                metrics: dict[str, Any] = {"loss": loss.detach()}
                if task.settings["clip"] is not None:
                    clip_factors = factors if arm.rescaled_clip else {}
                    metrics["grad_norm"] = _clip(model, task.settings["clip"], clip_factors)
                optimizer.step()
                optimizer.zero_grad()
                if task.evaluate is not None and (
                    update % task.settings["eval_every"] == 0 or update == steps
                ):
                    metrics["eval_loss"] = _evaluated(task, model)
                logger.record(update, **metrics)
                if place is not None and (update % task.save_every == 0 or update == steps):
                    logger.flush()
                    _save(place, update, model, optimizer, _joined(rescales, schedule))
        rescales = _joined(rescales, schedule)
        if place is None:
            return Run(logger.run, rescales, start)
        (place / _STATE).unlink()
        return _read_run(place)


def _begin(
    model: nn.Module, optimizer: torch.optim.Optimizer, arm: _Arm, seed: int, *, apply: bool
) -> tuple[pd.DataFrame, dict[str, float]]:
    """What an arm does before the first update: its table, and for `lr_equivalent` the factor of each tensor."""
    none = pd.DataFrame({"step": pd.Series(dtype="int64")})
    if arm.kind in ("none", "every"):
        return none, {}
    options = {name: value for name, value in arm.options.items() if name != "moments"}
    own = _own(options)
    table = plan_rescale(model, **options)
    factors: dict[str, float] = {}
    if arm.kind == "random":
        table = _turned(table, seed)
    if arm.kind == "lr_equivalent":
        factors = _one_factor(unwrap(model), scale_factors(model, table, pairs=own))
        _regroup(model, optimizer, factors)
    elif apply:
        table = apply_(model, table, optimizer, pairs=own, moments=arm.options.get("moments", "transport"))
    table.insert(0, "step", 0)
    return table, factors


def _own(options: Mapping[str, Any]) -> Any:
    pairs = options.get("pairs", ())
    return None if all(isinstance(pair, str) for pair in pairs) else pairs


def _turned(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Each α or its inverse, as a coin falls."""
    heads = np.random.default_rng((seed, len(table))).random(len(table)) < 0.5
    alpha = table["alpha"].where(heads, 1 / table["alpha"])
    return table.assign(
        alpha=alpha, norm_a_after=table["norm_a"] * alpha, norm_b_after=table["norm_b"] / alpha
    )


def _one_factor(model: nn.Module, factors: Mapping[str, Mapping[int, Tensor]]) -> dict[str, float]:
    found = {}
    for name, axes in factors.items():
        if any((factor != factor[0]).any() for factor in axes.values()):
            raise ValueError(
                f"lr_equivalent: {name} {tuple(model.get_parameter(name).shape)} has more than one α, and an "
                'optimizer has one learning rate for it; use granularity="tensor", and a model that keeps q, k '
                "and v apart"
            )
        found[name] = math.prod(float(factor[0]) for factor in axes.values())
    return found


def _regroup(model: nn.Module, optimizer: torch.optim.Optimizer, factors: Mapping[str, float]) -> None:
    """Give each tensor with a factor f a group of its own: lr η/f, decay λ·f, ε·f."""
    decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if not isinstance(optimizer, torch.optim.AdamW) and (
        not isinstance(optimizer, torch.optim.Adam) or decays
    ):
        raise TypeError(
            f"make_optimizer: lr_equivalent holds for AdamW, or Adam without decay, got {type(optimizer).__name__}"
        )
    named = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        factor_of = [factors.get(named.get(id(parameter), ""), 1.0) for parameter in group["params"]]
        for f in dict.fromkeys(factor_of):
            part = {
                **group,
                "lr": group["lr"] / f,
                "weight_decay": group["weight_decay"] * f,
                "eps": group["eps"] * f,
            }
            for key in ("params", "param_names"):
                if key in group:
                    part[key] = [each for each, own in zip(group[key], factor_of, strict=True) if own == f]
            groups.append(part)
    optimizer.param_groups = groups


@contextlib.contextmanager
def _scheduled(
    model: nn.Module, optimizer: torch.optim.Optimizer, arm: _Arm, logger: ForceLogger, done: int
) -> Iterator[RescaleSchedule | None]:
    if arm.every is None:
        yield None
        return
    with RescaleSchedule(
        model, optimizer, every=arm.every, logger=logger, start_step=done, **arm.options
    ) as schedule:
        yield schedule


def _joined(rescales: pd.DataFrame, schedule: RescaleSchedule | None) -> pd.DataFrame:
    tables = [rescales] + ([] if schedule is None else [schedule.events])
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else rescales


def _clip(model: nn.Module, largest: float, factors: Mapping[str, float]) -> Tensor:
    """Clip the gradients by their norm, those of tensors with a factor f as g/f; return the norm."""
    scaled = [
        (each.grad, factors[name]) for name, each in unwrap(model).named_parameters() if name in factors
    ]
    for gradient, f in scaled:
        if gradient is not None:
            gradient.div_(f)
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    for gradient, f in scaled:
        if gradient is not None:
            gradient.mul_(f)
    return norm


@torch.no_grad()
def _evaluated(task: _Task, model: nn.Module) -> float:
    model.eval()
    value = float(task.evaluate(model)) if task.evaluate is not None else math.nan
    model.train()
    return value


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(device, value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_on(device, value) for value in batch]
    return batch


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        return [("", batch)]
    items = (
        batch.items()
        if isinstance(batch, Mapping)
        else enumerate(batch)
        if isinstance(batch, list | tuple)
        else ()
    )
    return [(f"{name}.{rest}", tensor) for name, value in items for rest, tensor in _tensors(value)]


def _digest(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *_tensors(batch)]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for group in optimizer.param_groups:
        digest.update(repr([(name, value) for name, value in group.items() if name != "params"]).encode())
    return digest.hexdigest()


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


def _is_done(place: Path, steps: int) -> bool:
    """Of a flush the metrics come last, so a run whose last loss is there is there as a whole."""
    if not (place / "run.json").exists() or not (place / _RESCALES).exists() or (place / _STATE).exists():
        return False
    metrics = RunLog(place).metrics()
    return "loss" in metrics and len(metrics) > 0 and int(metrics["step"].iloc[-1]) == steps


def _read_run(place: Path) -> Run:
    log = RunLog(place)
    return Run(log, pd.read_parquet(place / _RESCALES), log.info["wisca"]["start"])


def _save(
    place: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rescales: pd.DataFrame
) -> None:
    """What a run continues from. A kill in between leaves the state of before, which is behind the rest."""
    _replace(place / _RESCALES, rescales.to_parquet)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _rng(next(model.parameters()).device),
    }
    _replace(place / _STATE, lambda path: torch.save(state, path))


def _rng(device: torch.device) -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_rng(rng: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / _INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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
    _replace(
        folder / _INDEX, lambda path: path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    )
