"""The rooms of the package: imports point one way, no cycle, no private name crosses a module."""

import ast
from pathlib import Path

import pytest

import weightdyn

ROOT = Path(weightdyn.__file__).parent
ROOMS = (
    "core", "files", "weibull", "record", "checkpoints", "explain", "train", "wisca", "integrations", "plot", "cli",
)  # fmt: skip
"""Each may import from those before it (and from itself), as CONTRIBUTING.md says."""

SOURCES = {
    ".".join(("weightdyn", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}


def package_imports(source: str, module: str) -> list[tuple[str, str | None]]:
    """(module, name) of each import of the package in a source, wherever it stands; a whole module has None."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "weightdyn"]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            if base.split(".")[0] == "weightdyn":
                found += [
                    (f"{base}.{alias.name}", None)
                    if f"{base}.{alias.name}" in SOURCES or f"{base}.{alias.name}.__init__" in SOURCES
                    else (base, alias.name)
                    for alias in node.names
                ]
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(source: str, module: str) -> list[str]:
    mine = room(module)
    wrong = []
    for target, name in package_imports(source, module):
        theirs = room(target)
        if mine in ROOMS and (theirs not in ROOMS or ROOMS.index(theirs) > ROOMS.index(mine)):
            wrong.append(f"{module} imports upward, from {target}")
        if (name or target.rpartition(".")[2]).startswith("_"):
            wrong.append(f"{module} takes the private {name} of {target}")
    return wrong


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_to_rooms_before_and_take_public_names(module):
    assert violations(SOURCES[module].read_text(encoding="utf-8"), module) == []


def test_the_check_sees_an_upward_import_a_private_name_and_one_inside_a_function():
    assert violations("from weightdyn.plot.style import DARK", "weightdyn.core.tables")
    assert violations("def f():\n    from weightdyn.cli import app", "weightdyn.plot.style")
    assert violations("from weightdyn.core.naming import _look_up", "weightdyn.files.hub")
    assert violations("import weightdyn", "weightdyn.files.hub")
    assert violations("from ..plot import loss", "weightdyn.files.hub")
    assert not violations("from weightdyn.core.naming import describe", "weightdyn.files.hub")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules along one cycle of a graph; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*way, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(graph))), [])


def test_no_imports_go_in_a_circle():
    graph = {
        module: {target for target, _ in package_imports(path.read_text(encoding="utf-8"), module)}
        for module, path in SOURCES.items()
        if not module.endswith("__init__")  # a room's door re-exports what is inside
    }
    assert cycle(graph) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def test_no_module_has_the_name_of_something_public_beside_it():
    for package in (weightdyn, weightdyn.wisca, weightdyn.plot):
        assert package.__file__ is not None
        beside = {path.stem for path in Path(package.__file__).parent.iterdir() if path.name[0] != "_"}
        for name in beside & set(vars(package)):
            assert vars(package)[name].__class__.__name__ == "module", f"{package.__name__}.{name}"
