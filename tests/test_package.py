"""What a user of the installed package meets first."""

import ast
import importlib
import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import weightdyn as wd

TABLES = {
    "ACCURACY_TABLE", "AUDIT_TABLE", "BUDGET_TABLE", "CHECKPOINT_TABLE", "CLOCK_TABLE", "CLOSURE_TABLE",
    "FIT_TABLE", "FORCE_TABLE", "INTEGRAL_TABLE", "LOG_TABLE", "PHASE_TABLE", "RECOVERY_TABLE", "RESCALE_TABLE",
    "SHAPE_TABLE", "SHIFT_TABLE", "SMOOTH_TABLE", "STATE_TABLE", "SUMMARY_TABLE", "WEIBULL_TABLE",
}  # fmt: skip
NAMES = TABLES | {
    # rooms of their own
    "plot", "recipe", "wisca",
    # record
    "ForceLogger", "RunLog", "RunLogError", "Shard", "ShardLogger",
    # names and the algebra
    "COMPONENTS", "FORCES", "ROLES", "TensorName", "View", "angle", "before_step", "describe",
    "drift_from_products", "forces_from_products", "memory_null", "relative_update", "timescale",
    # tables
    "aggregate", "budget", "closure", "equilibrium", "integrate", "phases", "pool_weibull", "smooth",
    "summarize",
    # weights
    "Diagnosis", "MagnitudeHistogram", "Tails", "WeibullFit", "classify", "diagnose", "fit_weibull", "fit_weights",
    "rank_laws", "shape_drift", "tails",
    # checkpoints
    "Audit", "CheckpointError", "Checkpoints", "Recipe", "audit_recipe", "compare_recovery", "decay_clock",
    "forces_from_states",
    "interval_means", "read_published_forces", "read_published_recovery", "read_published_trajectory",
    "recover_forces",
}  # fmt: skip


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def imported(package):
    """(name, module, name there) of everything that a package re-exports."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, "a public name is re-exported as itself"
                yield alias.asname, node.module, alias.name


def constant_docstring(module, name):
    """The string literal behind a constant's assignment, which is its docstring."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for node, after in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
    return None


def test_importing_weightdyn_loads_nothing_heavy():
    modules = loaded_by("import weightdyn; weightdyn.plot.force_budget")
    assert "weightdyn.record.logger" in modules
    for heavy in (
        "accelerate",
        "filelock",
        "huggingface_hub",
        "joblib",
        "lightning",
        "matplotlib",
        "matplotlib.pyplot",
        "numba",
        "pytorch_lightning",
        "scipy.stats",
        "transformers",
        "typer",
        "weightdyn.integrations",
    ):
        assert heavy not in modules, heavy


def test_the_modules_of_the_algebra_know_nobody():
    for module in ("core.forces", "core.tables", "core.naming", "record.runlog", "explain.trajectory"):
        assert "torch" not in loaded_by(
            "import importlib.util, types; package = types.ModuleType('weightdyn'); "
            f"package.__path__ = [{wd.__path__[0]!r}]; sys.modules['weightdyn'] = package; "
            f"import weightdyn.{module}"
        )


def test_the_public_names_are_these():
    assert {name for name, _, _ in imported(wd)} == NAMES


@pytest.mark.parametrize("package", [wd, wd.plot, wd.wisca], ids=lambda package: package.__name__)
def test_every_public_name_says_what_it_is(package):
    for name, module, original in imported(package):
        value = getattr(package, name)
        if callable(value) or inspect.ismodule(value):
            said = value.__doc__
            # A NamedTuple or a dataclass without a docstring of its own has its signature for one.
            assert said, name
            assert not said.startswith(f"{name}("), name
        else:
            assert constant_docstring(module, original), name


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_tells_the_meaning_of_each_of_its_columns(name):
    table = getattr(wd, name)
    assert table
    assert all(
        isinstance(column, str) and isinstance(meaning, str) and meaning for column, meaning in table.items()
    )
    if {"lam", "k"} <= set(table):
        assert list(table).index("lam") < list(table).index("k")


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert wd.__version__ == version("weightdyn")
