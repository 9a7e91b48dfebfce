"""The package says nothing twice: no six lines of code stand in two places, not even under other local names."""

import ast
import io
import tokenize
from pathlib import Path

import weightdyn

ROOT = Path(weightdyn.__file__).parent
LINES = 6
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def bound_names(tree: ast.Module) -> dict[int, set[str]]:
    """For each line inside a function, the names that the function binds; an inner function adds its own."""
    found: dict[int, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bound = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
            bound |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
            for line in range(node.lineno, node.end_lineno + 1):
                found[line] = found.get(line, set()) | bound
    return found


def declarations(tree: ast.Module) -> set[int]:
    """Lines that may agree, since they do nothing: imports, docstrings, signatures."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            found |= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= set(range(node.lineno, node.body[0].lineno))
    return found


def code_lines(source: str) -> list[tuple[int, list[tuple[str, bool]]]]:
    """(number, [(token, whether it is a local name)]) of each line that says something: a lone bracket does not."""
    tree = ast.parse(source)
    bound, skipped = bound_names(tree), declarations(tree)
    keywords = {(k.lineno, k.col_offset) for k in ast.walk(tree) if isinstance(k, ast.keyword)}
    lines: dict[int, list[tuple[str, bool]]] = {}
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number = token.start[0]
        if token.type not in SILENT and number not in skipped:
            local = token.string in bound.get(number, ()) and before != "." and token.start not in keywords
            lines.setdefault(number, []).append((token.string, local))
        before = token.string
    return [
        (number, tokens)
        for number, tokens in sorted(lines.items())
        if any(character.isalnum() for token, _ in tokens for character in token)
    ]


def shape(window: list[tuple[int, list[tuple[str, bool]]]]) -> str:
    """The window's text, each local name told by where it comes first."""
    order: dict[str, str] = {}
    return "\n".join(
        " ".join(order.setdefault(token, f"name{len(order)}") if local else token for token, local in tokens)
        for _, tokens in window
    )


def duplicates(sources: dict[str, str]) -> list[str]:
    """ "file:line = file:line" of each pair of places that begin the same LINES lines and do not overlap."""
    places: dict[str, tuple[str, int, int]] = {}
    found = []
    for name, source in sources.items():
        lines = code_lines(source)
        for i in range(len(lines) - LINES + 1):
            window = lines[i : i + LINES]
            first = places.setdefault(shape(window), (name, window[0][0], window[-1][0]))
            if first[0] != name or window[0][0] > first[2]:
                found.append(f"{first[0]}:{first[1]} = {name}:{window[0][0]}")
    return found


def test_no_six_lines_of_the_package_stand_twice():
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert duplicates(sources) == []


CLONE = """
def mean(values, weight):
    total = 0.0
    for value in values:
        if value.weight > weight:
            total += value.weight * 2
        log(value=total)
    return total / len(values)
"""


def test_the_check_sees_a_copy_under_other_names_and_only_a_copy():
    renamed = CLONE.replace("total", "summed").replace("values", "numbers").replace("def mean", "def average")
    assert duplicates({"a.py": CLONE, "b.py": f"# another file\n{renamed}"}) == ["a.py:3 = b.py:4"]
    assert duplicates({"a.py": CLONE + renamed}) == ["a.py:3 = a.py:11"]
    assert duplicates({"a.py": CLONE, "b.py": renamed.replace("* 2", "* 3")}) == []
    assert duplicates({"a.py": CLONE, "b.py": renamed.replace(".weight", ".height")}) == []
    assert duplicates({"a.py": CLONE}) == []
    signature = "def take(\n" + "".join(f"    value{i},\n" for i in range(LINES)) + "):\n    return 1\n"
    assert duplicates({"a.py": signature, "b.py": signature}) == []
