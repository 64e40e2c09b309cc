"""The structure of the repository: which file may import which, read from the imports themselves."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("utils", "fig_plot", "demo", "runs", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = [*sorted(ROOT.glob("*.py")), *(path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py")))]
# what the files of a room may import besides that room itself
ALLOWED = {
    "scripts": {"utils"},
    "utils": set(),
    "fig_plot": {"utils"},
    "demo": {"utils", "scripts"},
    "runs": set(),  # Snakemake runs it without torch
    "benchmarks": {"utils", "scripts", "demo"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_modules(tree: ast.AST) -> set[str]:
    """The repository's own modules that a file imports anywhere: on top, in a function, for the type checker."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {module_name(path) for path in FILES}
    return names & own


def room(module: str) -> str:
    return module.split(".")[0] if "." in module else "scripts"


GRAPH = {module_name(path): imported_modules(ast.parse(path.read_text())) for path in FILES}


def test_the_graph_sees_the_imports():
    """What the tests below rest on."""
    assert {"utils.models.load", "utils.algebra.moments", "utils.settings"} <= GRAPH["cache"] and "cache" in GRAPH[
        "K_sweep"
    ]
    assert "utils.data.docstrings" in GRAPH["utils.data.files"]  # imported inside a function


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_arrows_point_one_way(module):
    against = {imported for imported in GRAPH[module] if room(imported) not in {room(module), *ALLOWED[room(module)]}}
    assert not against


def test_no_two_files_import_each_other():
    assert list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, naming the cycle


def test_no_file_changes_the_search_path():
    assert not [path for path in FILES if "sys.path" in path.read_text()]
