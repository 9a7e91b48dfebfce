"""What a user of the installed package meets first."""

import subprocess
import sys

import weightdyn as wd


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def test_importing_weightdyn_loads_neither_transformers_nor_pyplot():
    modules = loaded_by("import weightdyn; weightdyn.plot.force_budget")
    assert "weightdyn.record.logger" in modules
    for heavy in (
        "transformers",
        "matplotlib",
        "matplotlib.pyplot",
        "huggingface_hub",
        "typer",
        "scipy.stats",
    ):
        assert heavy not in modules, heavy


def test_the_modules_of_the_algebra_know_nobody():
    for module in ("core.forces", "core.tables", "core.naming", "record.runlog", "explain.trajectory"):
        assert "torch" not in loaded_by(
            "import importlib.util, types; package = types.ModuleType('weightdyn'); "
            f"package.__path__ = [{wd.__path__[0]!r}]; sys.modules['weightdyn'] = package; "
            f"import weightdyn.{module}"
        )


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert wd.__version__ == version("weightdyn")
