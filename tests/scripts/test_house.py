"""The structure of the repository: the arrows of imports between rooms."""

import ast
import graphlib
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("utils", "fig_plot", "demo", "runs", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = [*sorted(ROOT.glob("*.py")), *(path for folder in ROOMS for path in sorted((ROOT / folder).rglob("*.py")))]
CORE = {"settings", "results", "script", "parallel", "hub"}
INPUTS = {"core", "utils.data", "utils.models", "utils.algebra"}  # the last three do not import each other
UTILS = {*INPUTS, "utils.training", "utils.pictures", "utils.separability"}
ALLOWED: dict[str, set[str]] = {  # room -> the rooms that its files may import besides it
    "core": set(),
    "utils.data": {"core"},
    "utils.models": {"core"},
    "utils.algebra": {"core"},
    "utils.training": INPUTS,
    "utils.separability": INPUTS,
    "utils.pictures": {*INPUTS, "utils.separability"},
    "scripts": UTILS,
    "fig_plot": UTILS,
    "fig_plot.findings": {*UTILS, "fig_plot"},
    "demo": {*UTILS, "scripts"},
    "runs": {"core"},  # of it only what needs no library: Snakemake runs without torch
    "benchmarks": {*UTILS, "scripts", "demo"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> set[str]:
    """The repository's own modules that a file imports anywhere: on top, in a function, for the type checker."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & {module_name(path) for path in FILES}


def room(module: str) -> str:
    first, *rest = module.split(".")
    if first == "utils":
        return f"utils.{rest[0]}" if rest and rest[0] not in CORE else "core"
    if module in SCRIPTS:
        return "scripts"
    return "fig_plot.findings" if module.startswith("fig_plot.findings") else first


GRAPH = {module_name(path): imported_modules(ast.parse(path.read_text())) for path in FILES}


def test_arrows_between_rooms_point_one_way():
    assert "utils.data.docstrings" in GRAPH["utils.data.files"]  # the graph sees an import in a function
    assert {room(module) for module in GRAPH} == set(ALLOWED)
    assert not {
        f"{module} -> {imported}"
        for module in GRAPH
        for imported in GRAPH[module]
        if room(imported) not in {room(module), *ALLOWED[room(module)]}
    }
    assert not [path for path in FILES if "sys.path" in path.read_text()]


def test_no_two_files_import_each_other():
    # every name in `utils.x` loads utils/__init__.py, which imports nothing of the repository
    assert list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, naming the cycle


def test_docstrings_begin_with_a_noun_or_a_verb():
    """A first line says what a function returns or does: "The rows of ...", not "What ..." or "Of ..."."""
    files = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]
    lines = [(path, ast.get_docstring(node)) for path, node in nodes if isinstance(node, owners)]
    assert len([text for _, text in lines if text]) > 500
    forbidden = {"Of", "What", "Where", "Who", "Whether", "There"}
    assert not [(path, text) for path, text in lines if text and text.split()[0] in forbidden]


def test_utils_is_four_rooms_and_at_most_eight_files():
    assert len(list((ROOT / "utils").glob("*.py"))) <= 8
    folders = {path.parent.name for path in (ROOT / "utils").glob("*/*.py")}
    assert folders == {"data", "models", "algebra", "training"}
