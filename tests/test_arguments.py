"""Wrong arguments: every public function names the argument it cannot take, or gives a right result.

Each entry is a call that works. Every argument of it in turn is replaced by each value of `WRONG` (and of a table
by a broken table), and what comes must be a TypeError or ValueError (or FileNotFoundError, of paths) that names the
argument, unless the value is one that the function takes: then the result is the function's own business.
"""

import copy
import functools
import inspect
import math
import re
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import weightdyn as wd
from weightdyn import plot, wisca
from weightdyn.checkpoints import recipe as recipes
from weightdyn.core.naming import describe, role_of, split_label
from weightdyn.record.runlog import RunWriter
from weightdyn.weibull.laws import law_cdf
from weightdyn.weibull.magnitudes import count_magnitudes, sum_magnitudes

mpl.use("Agg")

WRONG = {
    "None": None,
    "empty list": [],
    "empty text": "",
    "text": "no such thing",
    "number": 1.5,
    "negative": -1,
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 10**30,
    "object": object(),
    "list of None": [None],
    "mapping": {"a": 1},
    "bytes": b"\x00\xff",
    "meta tensor": torch.empty(4, 4, device="meta"),
    "sparse tensor": torch.eye(4).to_sparse(),
    "zero-size tensor": torch.empty(0, 4),
    "integer tensor": torch.ones(4, 4, dtype=torch.int64),
    "complex tensor": torch.ones(4, 4, dtype=torch.complex64),
    "empty table": pd.DataFrame(),
    "other table": pd.DataFrame({"a": [1.0]}),
    "class": RunWriter,
}


def forces_table():
    step = np.repeat(np.arange(1, 7), 2)
    table = pd.DataFrame({"step": step, "span": 1, "tensor": ["a.q_proj.weight", "a.up_proj.weight"] * 6})
    table = table.assign(stack="a", layer=pd.array([0] * 12, dtype="Int64"), component=["q", "up"] * 6)
    table = table.assign(role=["selection", "transmission"] * 6, numel=64, lr=0.01, weight_decay=0.1)
    norm = 4.0 + 0.1 * step
    return table.assign(
        norm_sq=norm,
        norm_sq_after=norm + 0.1,
        alignment=0.09,
        injection=0.02,
        decay=-0.01,
        u_sq=1.0,
        dot_wu=-1.0,
        drift=-0.01,
        memory=0.1,
        memory_null=0.11,
        signal=0.001,
    )


def weibull_table():
    table = forces_table()[["step", "tensor", "stack", "layer", "component", "role", "numel"]]
    return table.assign(lam=0.1 + 0.01 * table["step"], k=1.2, r_squared=0.99, ks=0.01, n=64)


def measured_table():
    steps = np.repeat([0, 10, 20], 1)
    return pd.DataFrame(
        {"step": steps, "tensor": "w", "stack": "", "component": "up", "role": "transmission", "numel": 100}
    ).assign(layer=pd.array([0] * 3, dtype="Int64"), norm_sq=[4.0, 4.1, 4.2])


def broken(table):
    """Tables of the right kind in which something is wrong."""
    numeric = [name for name in table if pd.api.types.is_float_dtype(table[name])]
    yield "no rows", table.iloc[:0]
    yield "one row", table.iloc[:1]
    yield "duplicated rows", pd.concat([table, table])
    yield "a number as text", table.assign(**{numeric[0]: "x"})
    yield "nan", table.assign(**dict.fromkeys(numeric, math.nan))
    yield "negative", table.assign(**{name: -table[name].abs() for name in numeric})
    for name in [name for name in ("step", numeric[0]) if name in table]:
        yield f"no {name}", table.drop(columns=name)
    if "step" in table:
        yield "steps as text", table.assign(step=table["step"].astype(str))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)
        self.up_proj = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.up_proj(self.q_proj(x))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the calls are made of."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    net = Net()
    for step in (0, 10, 20):
        save_file(
            {name: each.detach() + 0.01 * step for name, each in net.named_parameters()},
            folder / f"step{step}.safetensors",
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return {"folder": folder, "net": net, "llama": LlamaForCausalLM(config), "tmp": folder}


def calls(g):
    """name -> (function, arguments): every public function, called rightly."""
    F, W, M = forces_table(), weibull_table(), measured_table()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    step = {"dot_wu": -1.0, "u_sq": 1.0, "w_sq": 4.0, "lr": 0.1, "weight_decay": 0.1}
    after = {"dot_wu_after": -1.0, "u_sq": 1.0, "w_sq_after": 4.0, "lr": 0.1, "weight_decay": 0.1}
    recipe = wd.Recipe(lr=1e-2, weight_decay=0.1)
    llama = g["llama"]
    plan = wisca.plan_rescale(llama)
    optimizer = torch.optim.AdamW(g["net"].parameters(), lr=0.01)
    recovered = wd.recover_forces(M, recipe)
    tokens = torch.arange(8)[None]
    return {
        "forces_from_products": (wd.forces_from_products, {**step, "order": "exact"}),
        "before_step": (wd.before_step, after),
        "relative_update": (wd.relative_update, {"u_sq": 1.0, "w_sq": 4.0, "lr": 0.1}),
        "angle": (wd.angle, step),
        "timescale": (wd.timescale, {"lr": 0.1, "weight_decay": 0.1}),
        "drift_from_products": (
            wd.drift_from_products,
            {"dot_wg": 1.0, "lr": 0.1, "weight_decay": 0.1, "order": "exact"},
        ),
        "memory_null": (wd.memory_null, {"lr": [0.1, 0.1], "beta1": 0.9, "weight_decay": 0.1}),
        "budget": (wd.budget, {"table": F, "by": "role", "kind": "drift"}),
        "smooth": (wd.smooth, {"table": F, "by": "role", "windows": 2, "updates": 3}),
        "aggregate": (wd.aggregate, {"table": F, "by": "role"}),
        "closure": (wd.closure, {"table": F, "by": "role"}),
        "integrate": (wd.integrate, {"table": F}),
        "equilibrium": (wd.equilibrium, {"table": F, "by": "role"}),
        "phases": (wd.phases, {"table": W, "value": "lam", "forces": F}),
        "pool_weibull": (wd.pool_weibull, {"table": W, "by": "role"}),
        "shape_drift": (wd.shape_drift, {"table": W}),
        "fit_weibull": (wd.fit_weibull, {"x": x, "method": "plot", "trim": (0.1, 0.9)}),
        "rank_laws": (wd.rank_laws, {"x": x}),
        "tails": (wd.tails, {"x": x}),
        "law_cdf": (law_cdf, {"law": "gamma", "shape": 1.0, "scale": 1.0, "x": 2.0}),
        "classify": (wd.classify, {"k": 1.2, "r_squared": 0.99}),
        "count_magnitudes": (count_magnitudes, {"x": x}),
        "sum_magnitudes": (sum_magnitudes, {"x": x}),
        "MagnitudeHistogram.from_tensor": (wd.MagnitudeHistogram.from_tensor, {"x": x}),
        "MagnitudeHistogram.from_counts": (
            wd.MagnitudeHistogram.from_counts,
            {"counts": count_magnitudes(x), "dtype": "float32", "sums": None},
        ),
        "MagnitudeHistogram.load": (wd.MagnitudeHistogram.load, {"path": _histogram(g, x)}),
        "fit_weights": (
            wd.fit_weights,
            {
                "source": g["net"],
                "config": None,
                "rules": None,
                "views": True,
                "tensors": "proj",
                "by": "role",
                "method": "plot",
                "trim": (0.1, 0.9),
                "n_jobs": 1,
                "progress": False,
            },
        ),
        "diagnose": (
            wd.diagnose,
            {"source": g["net"], "rules": None, "views": True, "database": None, "n_jobs": 1},
        ),
        "describe": (
            describe,
            {
                "name": "h.0.attn.c_attn.weight",
                "shape": (12, 36),
                "config": {"n_head": 2, "n_embd": 12},
                "views": True,
                "rules": {"x": "q"},
            },
        ),
        "role_of": (role_of, {"component": "q"}),
        "split_label": (split_label, {"label": "a[q]"}),
        "Recipe": (
            wd.Recipe,
            {
                "lr": 0.1,
                "weight_decay": 0.1,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "decays": recipes.all_decay,
                "steps": 10,
                "batch_tokens": 1e6,
                "clip": 1.0,
                "z_loss": 1e-5,
                "update_scale": 2.0,
            },
        ),
        "Recipe.lr_at": (recipe.lr_at, {"updates": [1, 2]}),
        "Recipe.preset": (wd.Recipe.preset, {"name": "pythia-70m"}),
        "Recipe.from_run": (wd.Recipe.from_run, {"run": _run(g)}),
        "Recipe.from_settings": (
            wd.Recipe.from_settings,
            {
                "lr": 0.1,
                "steps": 10,
                "schedule": "cosine",
                "warmup": 2,
                "floor": 0.1,
                "weight_decay": 0.1,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "decayed": "all",
            },
        ),
        "Recipe.from_trainer_state": (
            wd.Recipe.from_trainer_state,
            {"state": {"log_history": [{"step": 1, "learning_rate": 0.1}], "max_steps": 3}, "ahead": False},
        ),
        "constant": (recipes.constant, {"peak": 0.1, "warmup": 2, "first": 1}),
        "linear": (recipes.linear, {"peak": 0.1, "steps": 10, "warmup": 2, "floor": 0.1, "first": 1}),
        "cosine": (recipes.cosine, {"peak": 0.1, "steps": 10, "warmup": 2, "floor": 0.1, "first": 1}),
        "warmup_stable_decay": (
            recipes.warmup_stable_decay,
            {"peak": 0.1, "steps": 10, "warmup": 2, "cooldown": 3, "floor": 0.1, "first": 1},
        ),
        "inverse_sqrt": (recipes.inverse_sqrt, {"peak": 0.1, "warmup": 2, "first": 1}),
        "pieces": (recipes.pieces, {"parts": [(5, recipes.constant(0.1)), (None, recipes.linear(0.1, 5))]}),
        "from_a_tenth": (recipes.from_a_tenth, {"schedule": recipes.constant(0.1, 5)}),
        "neox_cosine": (recipes.neox_cosine, {"peak": 0.1, "steps": 10, "warmup": 2, "floor": 0.1}),
        "recover_forces": (
            wd.recover_forces,
            {
                "source": M,
                "recipe": recipe,
                "method": "balance",
                "every": None,
                "views": True,
                "cache": False,
                "progress": False,
            },
        ),
        "forces_from_states": (
            wd.forces_from_states,
            {
                "source": _state(g),
                "names": [name for name, _ in g["net"].named_parameters()],
                "model": None,
                "config": None,
                "rules": None,
                "lr": 0.01,
                "optimizer": "AdamW",
                "views": True,
                "cache": False,
                "progress": False,
            },
        ),
        "compare_recovery": (wd.compare_recovery, {"truth": _logged(M), "recovered": recovered}),
        "Checkpoints": (
            wd.Checkpoints,
            {
                "source": g["folder"],
                "steps": [0, 10],
                "stage": None,
                "config": None,
                "rules": None,
                "errors": "raise",
                "keep": False,
                "endpoint": None,
            },
        ),
        "Checkpoints.measure": (
            wd.Checkpoints(g["folder"]).measure,
            {"gram": "none", "weibull": False, "views": True, "n_jobs": 1, "cache": False, "progress": False},
        ),
        "Checkpoints.file_sizes": (wd.Checkpoints(g["folder"]).file_sizes, {"step": 0}),
        "Checkpoints.files": (wd.Checkpoints(g["folder"]).files, {"step": 0, "wanted": []}),
        "Checkpoints.load": (wd.Checkpoints(g["folder"]).load, {"step": 0, "name": "q_proj.weight"}),
        "Checkpoints.contents": (
            wd.Checkpoints(g["folder"]).contents,
            {"step": 0, "beside": (), "progress": False},
        ),
        "audit_recipe": (
            wd.audit_recipe,
            {"source": _unused_rows(g), "recipe": recipe, "cache": False, "progress": False},
        ),
        "audit_recipe of a table": (wd.audit_recipe, {"source": M, "recipe": recipe}),
        "decay_clock": (wd.decay_clock, {"series": _unused_rows(g), "progress": False}),
        "plot.decay_clock": (
            plot.decay_clock,
            {"table": wd.decay_clock(_unused_rows(g)), "recipe": recipe, "ax": None},
        ),
        "RunLog": (wd.RunLog, {"path": _run(g)}),
        "RunLog.forces": (wd.RunLog(_run(g)).forces, {"by": "role", "order": "exact", "at": "before"}),
        "ForceLogger": (
            _closed(wd.ForceLogger),
            {
                "optimizer": optimizer,
                "params": g["net"],
                "every": 1,
                "out": None,
                "tensors": "proj",
                "views": True,
                "source": "moments",
                "weibull_every": None,
                "snapshot_every": None,
                "audit_every": None,
                "start_step": 0,
                "config": None,
                "rules": None,
            },
        ),
        "read_published_forces": (
            wd.read_published_forces,
            {"path": _published(g), "weight_decay": 0.01, "beta1": 0.9, "at": "before"},
        ),
        "read_published_trajectory": (wd.read_published_trajectory, {"path": _trajectory(g)}),
        "force_budget": (plot.force_budget, {"run_or_table": F, "kind": "forces", "by": "role", "ax": None}),
        "weibull_trajectory": (
            plot.weibull_trajectory,
            {"run_or_table": W, "value": "lam", "by": "role", "ax": None},
        ),
        "weights_map": (plot.weights_map, {"run_or_table": W, "value": "lam", "ax": None}),
        "loss": (
            plot.loss,
            {"run_or_table": pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), "unit": None, "ax": None},
        ),
        "plot.weibull": (
            plot.weibull,
            {"x": x, "method": "plot", "trim": (0.1, 0.9), "rivals": False, "ax": None},
        ),
        "plot.recovery": (plot.recovery, {"truth": _logged(M), "recovered": recovered, "ax": None}),
        "read_published_recovery": (wd.read_published_recovery, {"path": _published_recovery(g)}),
        "interval_means": (
            wd.interval_means,
            {"truth": _logged(M), "table": recovered, "name": "alignment"},
        ),
        "summarize": (wd.summarize, {"run": _logged_run(), "by": "role"}),
        "overview": (plot.overview, {"run": _logged_run(), "role": "selection", "ax": None}),
        "wisca_shift": (plot.wisca_shift, {"shift": _shift(), "kind": "forces", "group": None, "ax": None}),
        "compare": (
            functools.partial(wisca.compare, steps=1),
            {
                "make_model": lambda seed: copy.deepcopy(llama),
                "make_optimizer": lambda model: torch.optim.AdamW(model.parameters()),
                "batches": lambda seed, update: tokens,
                "arms": ["none"],
                "seeds": [0],
                "clip": None,
                "n_jobs": 1,
                "progress": False,
            },
        ),
        "rescale_folder": (
            wisca.rescale_folder,
            {"source": _model_folder(g), "out": g["tmp"] / "rescaled"},
        ),
        "Part": (wisca.Part, {"name": "w", "axis": 0, "channels": torch.arange(4), "measured": True}),
        "ScalingPair": (
            wisca.ScalingPair,
            {"kind": "vo", "module": "m", "a": (), "b": (), "heads": None, "layer": 0},
        ),
        "find_pairs": (wisca.find_pairs, {"model": llama}),
        "plan_rescale": (
            wisca.plan_rescale,
            {
                "model": llama,
                "pairs": ("qk",),
                "norm": "l1",
                "granularity": "tensor",
                "power_of_two": False,
                "max_alpha": None,
                "errors": "raise",
            },
        ),
        "rescale_": (
            _on_a_copy(wisca.rescale_),
            {"model": llama, "optimizer": None, "pairs": ("qk",), "moments": "keep"},
        ),
        "apply_": (
            _on_a_copy(wisca.apply_),
            {"model": llama, "table": plan, "optimizer": None, "moments": "keep"},
        ),
        "undo_": (_on_a_copy(wisca.undo_), {"model": llama, "table": plan, "optimizer": None}),
        "scale_factors": (wisca.scale_factors, {"model": llama, "table": plan}),
        "check_equivalence": (
            wisca.check_equivalence,
            {"model": llama, "batch": tokens, "table": None, "pairs": ("qk",)},
        ),
        "predict_shift": (
            wisca.predict_shift,
            {
                "before": _llama_forces(llama),
                "table": plan,
                "model": llama,
                "moments": "keep",
                "at": 0,
                "betas": (0.9, 0.95),
            },
        ),
        "RescaleSchedule": (
            _closed(wisca.RescaleSchedule),
            {
                "model": llama,
                "optimizer": torch.optim.AdamW(llama.parameters()),
                "at": (3,),
                "every": 2,
                "start_step": 0,
            },
        ),
        "ForceLogger.scalars": (_stepped(g).scalars, {"by": "role"}),
        "ShardLogger": (
            _closed(wd.ShardLogger),
            {
                "shapes": {"q_proj.weight": (8, 8)},
                "dtype": torch.float32,
                "every": 1,
                "tensors": "proj",
                "views": True,
                "weibull_every": None,
                "snapshot_every": None,
                "start_step": 0,
                "config": None,
                "rules": None,
            },
        ),
    }


def _unused_rows(g):
    """Checkpoints of a matrix of which half the rows are moved by decay alone."""
    folder = g["tmp"] / "unused"
    if not folder.exists():
        folder.mkdir()
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        for step in (0, 10, 20):
            save_file({"embed_in.weight": weight.clone()}, folder / f"step{step}.safetensors")
            weight *= 0.99
            weight[:8] += 0.5 * weight[:8].flip(0)
    return folder


def _logged(measured):
    """A log of every update of the measured series."""
    rows = pd.DataFrame({"step": np.arange(1, 21), "span": 1, "tensor": "w", "norm_sq": 4.0})
    return rows.assign(alignment=0.01, injection=0.005, decay=-0.001)


def _llama_forces(llama):
    table = forces_table().iloc[:2].copy()
    return table.assign(
        tensor=[name for name, _ in llama.named_parameters() if "q_proj" in name or "up_proj" in name][:2]
    )


def _histogram(g, x):
    path = g["tmp"] / "histogram.npz"
    wd.MagnitudeHistogram.from_tensor(x).save(path)
    return path


def _state(g):
    """A model and its optimizer behind an update."""
    path = g["tmp"] / "ckpt.pt"
    if not path.exists():
        net = copy.deepcopy(g["net"])
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def _run(g):
    path = g["tmp"] / "run"
    if not path.exists():
        writer = RunWriter(path, 0, {"train": {"lr": 0.1, "steps": 10, "weight_decay": 0.1}})
        writer.append("metrics", {"step": 1, "loss": 2.0})
        writer.flush()
        writer.close()
    return path


def _published(g):
    path = g["tmp"] / "force.jsonl"
    norm = 14_155_776 * 0.02**2
    decay = 2 * 0.001 * 0.01 * norm
    products = f'"true_align_full": -1.0, "inj_full": 0.1, "dec_full": {decay!r}'
    path.write_text(f'{{"step": 250, "eta": 0.001, {products}, "rms": 0.02}}\n')
    return path


def _trajectory(g):
    path = g["tmp"] / "trajectory.json"
    path.write_text('[{"step": 1, "k": 1.2, "lambda": 0.1, "sigma": 0.1}]')
    return path


def _published_recovery(g):
    path = g["tmp"] / "recovery.json"
    path.write_text('[{"step": 1, "true": -1.0, "spline": -1.0, "local_gap": 10}]')
    return path


def _stepped(g):
    """A logger that has logged an update."""
    net = copy.deepcopy(g["net"])
    optimizer = torch.optim.AdamW(net.parameters())
    with wd.ForceLogger(optimizer, net) as logger:
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    return logger


class _logged_run:
    """What gives the tables of a run."""

    def forces(self, by=None):
        return forces_table() if by is None else wd.aggregate(forces_table(), by)

    def weibull(self):
        return weibull_table()

    def metrics(self):
        return pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})


def _shift():
    row = {"step": [5, 10], "value": 1.0, "control": 1.0, "low": -0.1, "high": 0.1, "seeds": 3}
    quantities = [*(f"{force}_share" for force in wd.FORCES), "lam", "k", "loss"]
    return pd.concat([pd.DataFrame({"quantity": name, "difference": 0.0, **row}) for name in quantities])


def _model_folder(g):
    folder = g["tmp"] / "model"
    if not folder.exists():
        g["llama"].save_pretrained(folder)
    return folder


def _closed(make):
    def call(**arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make(**arguments)
            made.close()

    return call


def _on_a_copy(function):
    def call(model, **arguments):
        return function(copy.deepcopy(model), **arguments)

    return call


ACCEPTED = (TypeError, ValueError, FileNotFoundError, KeyError)

OTHERS_WORD = {
    ("ForceLogger", "params", "None"): "then the names are made up, of which `tensors` selects none",
    ("ForceLogger", "tensors", "class"): "a function of the user's, which fails in its own way",
    ("ShardLogger", "tensors", "class"): "a function of the user's, which fails in its own way",
    ("forces_from_states", "lr", "class"): "a function of the user's, which fails in its own way",
    ("compare", "make_model", "class"): "a function of the user's",
    ("compare", "make_optimizer", "class"): "a function of the user's",
    ("compare", "batches", "class"): "a function of the user's",
    ("check_equivalence", "batch", "mapping"): "arguments of the model, which names its own",
    ("check_equivalence", "batch", "complex tensor"): "tokens of the model, which says what it takes",
}
"""Errors that are another's to word."""


def tried(function, arguments, name, value):
    """What is wrong with how a function takes a value for one of its arguments; None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**{**arguments, name: value})
    except ACCEPTED as error:
        message = str(error)
        if isinstance(error, OSError | FileNotFoundError) and name in (
            "path",
            "source",
            "state",
            "run",
            "database",
        ):
            return None
        if re.search(rf"\b{re.escape(name)}\b", message):
            return None
        if isinstance(value, str) and value and value in message:
            return None
        return f"{type(error).__name__}: {message[:160]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return None


SHARDS = 4

NOT_CALLED_HERE = {
    "CheckpointError": "an exception",
    "RunLogError": "an exception",
    "Audit": "made by audit_recipe",
    "Comparison": "made by compare",
    "WeibullFit": "made by fit_weibull",
    "Diagnosis": "made by diagnose",
    "Tails": "made by tails",
    "TensorName": "made by describe",
    "View": "made by describe",
    "Shard": "checked by ShardLogger.update",
    "Run": "made by compare",
}
"""Public names that have no entry, and why."""


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_wrong_argument_is_named_or_the_result_is_right(given, shard, tmp_path, monkeypatch):
    unclear = []
    for name, (function, arguments) in list(calls(given).items())[shard::SHARDS]:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # a wrong path may be one that can be made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)  # the call itself is a right one
        for argument, value in arguments.items():
            values = dict(WRONG)
            if isinstance(value, pd.DataFrame):
                values.update(broken(value))
            for label, wrong in values.items():
                if (name, argument, label) in OTHERS_WORD:
                    continue
                if found := tried(function, arguments, argument, wrong):
                    unclear.append(f"{name}({argument}={label}): {found}")
    assert unclear == []


def test_every_public_function_is_tried(given):
    tried_names = {name.rpartition(".")[2] for name in calls(given)} | {
        name.partition(".")[0] for name in calls(given)
    }
    for package in (wd, wisca, plot):
        for name, value in vars(package).items():
            public = callable(value) and not name.startswith("_") and not inspect.ismodule(value)
            if (
                public
                and name not in NOT_CALLED_HERE
                and getattr(value, "__module__", "").startswith("weightdyn")
            ):
                assert name in tried_names, f"{package.__name__}.{name}"
