"""Docstrings of the installed packages as a family of labelled text tasks: the embedded dataset.

Reads the source files of the standard library and of `PACKAGES` with `ast`; it imports nothing and runs no code. Writes
demo/cache/docstrings-<key>.jsonl; the key changes with the versions of Python and of the packages, which
requirements.txt pins. docs/models_and_data.md lists the tasks.

A text is the first paragraph of a docstring. A label is a fact about the code behind the docstring, taken from the
syntax tree or from the place in the package, not from the text. A text is on the test side if the SHA-256 of its
case-folded form is divisible by five: on the same side in every task, and outside `pretraining_corpus()`.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.hub import nearest
from utils.results import write_atomically
from utils.script import ROOT, UserError

Function = ast.FunctionDef | ast.AsyncFunctionDef
CACHE_DIR = ROOT / "demo" / "cache"
ROWS_FORMAT = 1  # part of the cache's name: add 1 if a change of this file changes the rows
STANDARD_LIBRARY = "stdlib"
# with the standard library these are the classes of the task `library`
PACKAGES = ("numpy", "scipy", "sklearn", "torch", "transformers", "pandas", "matplotlib", "networkx", "sympy")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # packages that pip installs under another name
# tests, copies of other projects and applications say nothing about the library they are in
SKIPPED_FOLDERS = {"test", "tests", "_internal", "externals", "extern", "_vendor", "_vendored", "__pycache__"}
SKIPPED_FOLDERS |= {"array_api_compat", "array_api_extra", "site-packages", "dist-packages", "_antlr"}
SKIPPED_MODULES = {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "test", "antigravity", "this"}
CONTAINERS = {"pandas.core", "networkx.algorithms"}  # the parts of these libraries are one level deeper
PROPERTY_DECORATORS = {"cache_readonly", "setter", "getter", "deleter"}  # and every name that ends in "property"

MAX_TRAIN, MAX_TEST = 8_000, 2_000  # texts per task, so that every script is quick
MAX_SUBPACKAGES, MIN_SUBPACKAGE_TEXTS = 10, 50
MIN_WORDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One docstring and the facts about its owner from the syntax tree; `None` if a fact does not apply."""

    library: str
    module: str  # dotted, with the library
    kind: str  # module, class, function, method
    name: str  # qualified name inside the module, "" for the module itself
    text: str  # first paragraph, white space normalised
    docstring: str  # whole docstring, indentation removed
    returns: bool | None = None  # returns or yields a value
    raises: bool | None = None  # has a raise statement
    property: bool | None = None  # method reached as an attribute
    decorated: bool | None = None
    parameters: int | None = None  # without self and cls
    lines: int | None = None  # code lines of the body: no docstring, comment or blank line


# ------------------------------------------------------------------ source files -> rows
def first_paragraph(docstring: str) -> str:
    """The text up to the first empty line, in one line."""
    lines = itertools.takewhile(str.strip, inspect.cleandoc(docstring).split("\n"))
    return " ".join(" ".join(lines).split())


@functools.cache
def is_text(text: str) -> bool:
    """True if a first paragraph is prose: three words or more, mostly letters, no interpreter session."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= MIN_WORDS and letters >= 0.6 * len(text) and ">>>" not in text


@functools.cache
def text_hash(text: str) -> int:
    """SHA-256 of the case-folded text: it decides the side of the text and its place in the order."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).digest(), "big")


def is_test_side(text: str) -> bool:
    """True if a text is a test text, in every task."""
    return text_hash(text) % 5 == 0


def source_files(library: str) -> list[tuple[str, Path]]:
    """Dotted module names and files of one library, sorted by name; does not import the library."""
    if library == STANDARD_LIBRARY:
        root, prefix = Path(sysconfig.get_path("stdlib")), ""
        tops = [path for path in root.iterdir() if path.stem in sys.stdlib_module_names - SKIPPED_MODULES]
    else:
        spec = importlib.util.find_spec(library)
        assert spec and spec.submodule_search_locations  # cache_path asks for every package
        root, prefix = Path(next(iter(spec.submodule_search_locations))), f"{library}."
        tops = list(root.iterdir())
    found = []
    for path in (path for top in tops for path in (top.rglob("*.py") if top.is_dir() else [top])):
        parts = path.relative_to(root).with_suffix("").parts
        is_test = any("test_" in part or part == "conftest" for part in parts)
        if path.suffix == ".py" and not is_test and SKIPPED_FOLDERS.isdisjoint(parts):
            dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(((prefix + dotted).rstrip("."), path))
    return sorted(found)


def function_facts(function: Function, source: list[str], in_class: bool) -> dict:
    """The fields of `Row` that only functions and methods have; `source` are the lines of the file."""
    nodes, waiting = [], list[ast.AST](function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):  # their returns and raises are their own
            nodes.append(node)
            waiting.extend(ast.iter_child_nodes(node))
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    returns = any(not (isinstance(value, ast.Constant) and value.value is None) for value in values)
    # the last name: `setter` of @value.setter, `wraps` of @functools.wraps(f)
    decorators = [ast.unparse(node).split("(")[0].split(".")[-1] for node in function.decorator_list]
    num_parameters = sum(isinstance(node, ast.arg) for node in ast.iter_child_nodes(function.args))
    if in_class and "staticmethod" not in decorators:
        num_parameters = max(0, num_parameters - 1)
    code = [line.strip() for line in source[function.body[0].end_lineno : function.end_lineno]]
    return {
        "returns": returns or any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes),
        "raises": any(isinstance(node, ast.Raise) for node in nodes),
        "property": any(name.endswith("property") or name in PROPERTY_DECORATORS for name in decorators),
        "decorated": bool(decorators),
        "parameters": num_parameters,
        "lines": sum(bool(line) and not line.startswith("#") for line in code),
    }


def parse_file(library: str, module: str, path: Path) -> list[Row]:
    """The rows of one source file, its module, classes, methods and functions; none if it is not valid Python."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            content = file.read()
            tree = ast.parse(content)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    source, rows = content.split("\n"), []

    def visit(node: Any, kind: str, name: str, in_class: bool) -> None:
        """Adds the rows of a node (none of its own if `kind` is empty) and of the nodes inside it."""
        docstring = ast.get_docstring(node) if kind else None
        if docstring:
            facts = function_facts(node, source, in_class) if kind in ("function", "method") else {}
            rows.append(Row(library, module, kind, name, first_paragraph(docstring), docstring, **facts))
        if kind in ("function", "method"):
            return  # functions inside a function are not part of the interface
        for child in ast.iter_child_nodes(node):
            qualified = f"{name}.{getattr(child, 'name', '')}".lstrip(".")
            if isinstance(child, ast.ClassDef):
                visit(child, "class", qualified, True)
            elif isinstance(child, Function):
                visit(child, "method" if in_class else "function", qualified, in_class)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):  # if TYPE_CHECKING, try ... except ImportError
                visit(child, "", name, in_class)

    visit(tree, "module", "", False)
    return rows


# ------------------------------------------------------------------ cache
def cache_path() -> Path:
    """The file of the rows for the installed versions. Raises UserError if one of the packages is not installed."""
    try:
        versions = [importlib.metadata.version(DISTRIBUTIONS.get(library, library)) for library in PACKAGES]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"The docstring tasks need {error.name}: pip install -r requirements.txt") from None
    key = json.dumps([ROWS_FORMAT, platform.python_version(), *versions])
    return CACHE_DIR / f"docstrings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"


def parse_libraries(libraries: Iterable[str]) -> list[Row]:
    """The rows of several libraries in the order of their text hashes, so that every prefix is a random sample."""
    files = [(library, module, path) for library in libraries for module, path in source_files(library)]
    with ProcessPoolExecutor() as pool:
        parsed = pool.map(parse_file, *zip(*files, strict=True), chunksize=16)
        rows = [row for found in tqdm(parsed, "reading docstrings", len(files), unit="file") for row in found]
    return sorted(rows, key=lambda row: (text_hash(row.text), row.library, row.module, row.name, row.docstring))


@functools.cache
def load_rows() -> tuple[tuple[Row, ...], str]:
    """Every row in hash order, and the SHA-256 of them all; parses the packages if the cache is absent or damaged."""
    path = cache_path()
    stored = path.read_bytes() if path.exists() else b""
    if stored[:64] != hashlib.sha256(stored[65:]).hexdigest().encode():
        rows = parse_libraries([STANDARD_LIBRARY, *PACKAGES])
        lines = "".join(json.dumps(astuple(row)) + "\n" for row in rows).encode()
        stored = hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines
        with write_atomically(path) as temporary:
            temporary.write_bytes(stored)
    return tuple(Row(*json.loads(line)) for line in stored[65:].splitlines()), stored[:64].decode()


def pretraining_corpus() -> list[str]:
    """The distinct full docstrings in hash order; leaves out docstrings with a first paragraph on the test side."""
    return list(dict.fromkeys(row.docstring for row in load_rows()[0] if not is_test_side(row.text)))


# ------------------------------------------------------------------ tasks
def subpackage(row: Row) -> str | None:
    """The part of the library that a text comes from; one level deeper inside `CONTAINERS`."""
    parts = row.module.split(".")
    if row.library == STANDARD_LIBRARY:
        return parts[0]
    depth = 2 if ".".join(parts[:2]) in CONTAINERS else 1
    return parts[depth] if len(parts) > depth else None


def transformers_role(row: Row) -> str | None:
    """The purpose of a file of transformers: the prefix of a model's file, the sub-package of every other one."""
    if not row.module.startswith("transformers.models."):
        return subpackage(row)
    role = row.module.split(".")[-1]
    known = ("modeling", "configuration", "tokenization", "image_processing", "video_processing", "feature_extraction")
    if role.startswith("modular_"):
        return "modeling"  # transformers generates the modeling file from it
    return next((name for name in (*known, "processing") if role.startswith(f"{name}_")), None)


def flag(value: bool | None, yes: str, no: str) -> str | None:
    """The label of a fact that is true or false; None if the fact does not apply."""
    return None if value is None else yes if value else no


def private(row: Row) -> str | None:
    last = row.name.split(".")[-1]
    is_special = not last or last.startswith("__")  # neither public nor private
    return None if is_special else flag(last.startswith("_"), "private", "public")


def parameters(row: Row) -> str | None:
    return None if row.parameters is None else str(row.parameters) if row.parameters < 4 else "4 or more"


# name -> label of a row; None: the row is not in the task
TASKS: dict[str, Callable[[Row], str | float | None]] = {
    "library": lambda row: row.library,
    "kind": lambda row: row.kind,
    "returns": lambda row: flag(row.returns, "value", "nothing"),
    "raises": lambda row: flag(row.raises, "raises", "never"),
    "private": private,
    "examples": lambda row: flag(">>>" in row.docstring, "examples", "no examples") if row.kind != "module" else None,
    "property": lambda row: flag(row.property, "property", "method") if row.kind == "method" else None,
    "decorated": lambda row: flag(row.decorated, "decorated", "plain"),
    "parameters": parameters,
    **dict.fromkeys((STANDARD_LIBRARY, *PACKAGES), subpackage),  # a task with rows of this library only
    "transformers": transformers_role,
    "lines": lambda row: math.log(row.lines) if row.lines else None,
}


def most_frequent(counts: Counter, num: int) -> list[Any]:
    """The `num` labels with the highest counts; labels with equal counts in sorted order."""
    return sorted(counts, key=lambda label: (-counts[label], label))[:num]


def label_texts(rows: Iterable[Row], task: str) -> dict[str, str | float]:
    """The distinct texts of a task with their labels, in the order of the rows.

    A task named after a library has only the rows of that library, and its ten largest parts as labels. Texts that
    differ only in case count as one: the first one as written, with the most frequent label.
    """
    is_part = task in (STANDARD_LIBRARY, *PACKAGES)
    first: dict[str, str] = {}
    votes: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        in_task = is_text(row.text) and (row.library == task or not is_part)
        label = TASKS[task](row) if in_task else None
        if label is not None:
            votes[first.setdefault(row.text.casefold(), row.text)][label] += 1
    labels = {text: most_frequent(counts, 1)[0] for text, counts in votes.items()}
    if not is_part:
        return labels
    sizes = Counter(labels.values())
    kept = {label for label in most_frequent(sizes, MAX_SUBPACKAGES) if sizes[label] >= MIN_SUBPACKAGE_TEXTS}
    return {text: label for text, label in labels.items() if label in kept}


@functools.cache
def load_task(name: str) -> dict[str, tuple[list[str], list[str | float]]]:
    """Texts and labels of one task, at most 8,000 of `train` and 2,000 of `test`; every prefix is a random sample."""
    if name not in TASKS:
        raise UserError(f"There is no docstring task {name!r}.{nearest(name, TASKS)} All tasks: {', '.join(TASKS)}.")
    labels = label_texts(load_rows()[0], name)
    sides = {
        "train": [text for text in labels if not is_test_side(text)][:MAX_TRAIN],
        "test": [text for text in labels if is_test_side(text)][:MAX_TEST],
    }
    return {split: (texts, [labels[text] for text in texts]) for split, texts in sides.items()}
