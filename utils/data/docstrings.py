"""Docstrings of the installed packages as a family of labelled text tasks: the embedded dataset.

    python -m utils.data.docstrings                      # table of the tasks
    python -m utils.data.docstrings --task raises        # and a few rows of one task

Reads the source files of the standard library and of the packages in `PACKAGES` with `ast`; nothing is imported, no
code is run. Writes demo/cache/docstrings-<key>.jsonl, the key made of the Python and package versions and of this file:
a cache that no longer fits is never read. The rows depend on the installed versions (requirements.txt pins them);
`fingerprint()` tells two sets of rows apart and is stored beside every result.

A text is the first paragraph of a docstring. A label is a fact about the code that the docstring belongs to, taken from
the syntax tree or from the place in the package, not from the text. A text is on the test side if the SHA-256 of its
case-folded form is divisible by five: the same side in every task, and outside `pretraining_corpus()`.
"""

import ast
import collections
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from utils.results import write_atomically
from utils.script import ROOT, UserError, run_script

CACHE_DIR = ROOT / "demo" / "cache"
STANDARD_LIBRARY = "stdlib"
# top-level package -> name of its distribution; with the standard library these are the classes of task `library`
PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "transformers": "transformers",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "sympy": "sympy",
}
# tests, copies of other projects and applications say nothing about the library they are in
SKIPPED_FOLDERS = {"test", "tests", "_internal", "externals", "extern", "_vendor", "_vendored", "__pycache__"}
SKIPPED_FOLDERS |= {"array_api_compat", "array_api_extra", "site-packages", "dist-packages", "_antlr"}
SKIPPED_STANDARD_LIBRARY = {
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "test",
    "antigravity",
    "this",
}
# packages that hold nearly all of their library: their parts are the sub-packages
CONTAINERS = {"pandas.core", "networkx.algorithms"}
PROPERTY_DECORATORS = {"cache_readonly", "setter", "getter", "deleter"}  # beside every name that ends in "property"

MAX_TRAIN, MAX_TEST = 8_000, 2_000  # rows per task, so that every script is quick
MAX_SUBPACKAGES, MIN_SUBPACKAGE_TEXTS = 10, 50
MIN_WORDS = 3


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    task: str | None = None  # also print the first rows of this task
    num_examples: int = 10  # how many of them


@dataclass(frozen=True, slots=True)
class Row:
    """One docstring and what the syntax tree says about its owner; `None` where a fact does not apply."""

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


@dataclass(frozen=True)
class Task:
    """One labelling of the rows."""

    name: str
    question: str  # what it asks, one line
    label: Callable[[Row], str | float | None]  # None: the row is not in the task
    max_classes: int | None = None  # only the largest classes are kept, and none under 50 texts
    regression: bool = False


# ------------------------------------------------------------------ source files -> rows
def first_paragraph(docstring: str) -> str:
    """The text up to the first empty line, in one line."""
    lines = inspect.cleandoc(docstring).split("\n")
    empty = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
    return " ".join(" ".join(lines[:empty]).split())


@functools.cache
def is_text(text: str) -> bool:
    """Whether a first paragraph is prose: three words or more, mostly letters, no interpreter session."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= MIN_WORDS and letters >= 0.6 * len(text) and ">>>" not in text


@functools.cache
def text_hash(text: str) -> int:
    """SHA-256 of the case-folded text: gives its side and its place in the order."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).digest(), "big")


def is_test_side(text: str) -> bool:
    """One text in five is on the test side, the same one in every task."""
    return text_hash(text) % 5 == 0


def source_root(library: str) -> Path:
    """The folder of a package, found without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The docstring tasks read the package {library!r}, which is not installed for {sys.executable}. "
            "Install the pinned versions: pip install -r requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(library: str) -> list[tuple[str, Path]]:
    """Dotted module names and files of one library, sorted by name.

    Raises:
        UserError: the library is not installed.
    """
    if library == STANDARD_LIBRARY:
        root, prefix = Path(sysconfig.get_path("stdlib")), ""
        skipped = SKIPPED_STANDARD_LIBRARY
        tops = [path for path in root.iterdir() if path.stem in sys.stdlib_module_names and path.stem not in skipped]
    else:
        root, prefix = source_root(library), f"{library}."
        tops = list(root.iterdir())
    files = [path for top in tops for path in (top.rglob("*.py") if top.is_dir() else [top]) if path.suffix == ".py"]
    found = []
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any("test_" in part or part == "conftest" for part in parts):
            dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(((prefix + dotted).rstrip("."), path))
    return sorted(found)


def own_nodes(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.AST]:
    """The nodes of a function's body without those of the functions and classes defined in it."""
    found, waiting = [], list[ast.AST](function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            found.append(node)
            waiting.extend(ast.iter_child_nodes(node))
    return found


def decorator_name(decorator: ast.expr) -> str:
    """The last name of a decorator: `setter` for `@value.setter`, `wraps` for `@functools.wraps(f)`."""
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")


def function_facts(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str], in_class: bool) -> dict:
    """The fields of `Row` that only functions and methods have; `source` are the lines of the file."""
    nodes = own_nodes(function)
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    returns = any(not (isinstance(value, ast.Constant) and value.value is None) for value in values)
    decorators = [decorator_name(decorator) for decorator in function.decorator_list]
    arguments = function.args
    num_parameters = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    num_parameters += (arguments.vararg is not None) + (arguments.kwarg is not None)
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
        docstring = ast.get_docstring(node) if kind else None
        if docstring:
            facts = function_facts(node, source, in_class) if kind in ("function", "method") else {}
            rows.append(Row(library, module, kind, name, first_paragraph(docstring), docstring, **facts))
        if kind in ("function", "method"):
            return  # what is defined inside a function is nobody's interface
        for child in ast.iter_child_nodes(node):
            qualified = f"{name}.{getattr(child, 'name', '')}".lstrip(".")
            if isinstance(child, ast.ClassDef):
                visit(child, "class", qualified, True)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, "method" if in_class else "function", qualified, in_class)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):  # if TYPE_CHECKING, try ... except ImportError
                visit(child, "", name, in_class)

    visit(tree, "module", "", False)
    return rows


# ------------------------------------------------------------------ cache
def cache_key() -> dict:
    """What the rows depend on: Python, the package versions, and this file.

    Raises:
        UserError: one of the packages is not installed.
    """
    for library in PACKAGES:
        source_root(library)  # a package without distribution metadata would raise less clearly below
    return {
        "python": platform.python_version(),
        "packages": {library: importlib.metadata.version(name) for library, name in PACKAGES.items()},
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
    }


def cache_path(key: dict) -> Path:
    """The file of the rows that belong to a key."""
    return CACHE_DIR / f"docstrings-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.jsonl"


def sort_rows(rows: list[Row]) -> list[Row]:
    """The rows in the order of their text hashes, so that every prefix is a random sample."""
    return sorted(rows, key=lambda row: (text_hash(row.text), row.library, row.module, row.name, row.docstring))


def parse_libraries(libraries: list[str]) -> list[Row]:
    """The rows of several libraries in hash order; about half a minute for all of them on two cores."""
    files = [(library, module, path) for library in libraries for module, path in source_files(library)]
    # largest first, so that no worker is left with a long one; forked workers need neither torch nor a guarded script
    files.sort(key=lambda file: (-file[2].stat().st_size, file[1]))
    with ProcessPoolExecutor() as pool:
        parsed = pool.map(parse_file, *zip(*files, strict=True), chunksize=16)
        rows = [row for found in tqdm(parsed, "reading docstrings", len(files), unit="file") for row in found]
    return sort_rows(rows)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes one JSON array a line; before them, the SHA-256 of these lines."""
    lines = "".join(json.dumps(dataclasses.astuple(row)) + "\n" for row in rows)
    with write_atomically(path) as temporary:
        temporary.write_text(f"{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}", encoding="utf-8", newline="\n")


@functools.cache
def load_rows() -> tuple[tuple[Row, ...], str]:
    """Every row in hash order, and the SHA-256 of them all; from the cache, which is written first if need be.

    Raises:
        UserError: one of the packages is not installed.
    """
    path = cache_path(cache_key())
    stored = path.read_bytes() if path.exists() else b""
    if stored[:64] != hashlib.sha256(stored[65:]).hexdigest().encode():  # absent or damaged
        write_rows(path, parse_libraries([STANDARD_LIBRARY, *PACKAGES]))
        stored = path.read_bytes()
    return tuple(Row(*json.loads(line)) for line in stored[65:].splitlines()), stored[:64].decode()


def fingerprint() -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all rows."""
    return load_rows()[1][:16]


def pretraining_corpus() -> list[str]:
    """The distinct full docstrings in hash order, without those whose first paragraph is on the test side."""
    return list(dict.fromkeys(row.docstring for row in load_rows()[0] if not is_test_side(row.text)))


# ------------------------------------------------------------------ tasks
def subpackage(library: str) -> Callable[[Row], str | None]:
    """The label rule "part of this library the text is from"; one level deeper inside `CONTAINERS`."""

    def label(row: Row) -> str | None:
        if row.library != library:
            return None
        parts = row.module.split(".")
        if library == STANDARD_LIBRARY:
            return parts[0]
        depth = 2 if ".".join(parts[:2]) in CONTAINERS else 1
        return parts[depth] if len(parts) > depth else None

    return label


def transformers_role(row: Row) -> str | None:
    """What a file of transformers is for: the prefix of a model's file, the sub-package of every other one."""
    if row.library != "transformers" or not row.module.startswith("transformers.models."):
        return subpackage("transformers")(row)
    role = row.module.split(".")[-1]
    known = ("modeling", "configuration", "tokenization", "image_processing", "video_processing", "feature_extraction")
    if role.startswith("modular_"):
        return "modeling"  # the file that the modeling file is generated from
    return next((name for name in (*known, "processing") if role.startswith(f"{name}_")), None)


def flag(value: bool | None, yes: str, no: str) -> str | None:
    """A yes/no fact as a label."""
    return None if value is None else yes if value else no


def private(row: Row) -> str | None:
    """Whether the name starts with an underscore; special methods are neither public nor private."""
    last = row.name.split(".")[-1]
    return None if not last or last.startswith("__") else flag(last.startswith("_"), "private", "public")


def examples(row: Row) -> str | None:
    """Whether an interpreter session follows later in the docstring."""
    return flag(">>>" in row.docstring, "examples", "no examples") if row.kind != "module" else None


def parameters(row: Row) -> str | None:
    """The number of parameters, binned."""
    return None if row.parameters is None else str(row.parameters) if row.parameters < 4 else "4 or more"


def log_lines(row: Row) -> float | None:
    """Natural logarithm of the number of code lines; None where nothing but the docstring is there."""
    return math.log(row.lines) if row.lines else None


def subpackage_task(library: str) -> Task:
    """The task of telling the largest parts of one library apart."""
    return Task(library, f"Which part of {library} is it from?", subpackage(library), MAX_SUBPACKAGES)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("library", "Which library is it from?", lambda row: row.library),
        Task("kind", "Module, class, function or method?", lambda row: row.kind),
        Task("returns", "Does the function return a value?", lambda row: flag(row.returns, "value", "nothing")),
        Task("raises", "Does the function raise?", lambda row: flag(row.raises, "raises", "never")),
        Task("private", "Does the name start with an underscore?", private),
        Task("examples", "Does the docstring go on to show examples?", examples),
        Task(
            "property",
            "Is the method a property?",
            lambda row: flag(row.property, "property", "method") if row.kind == "method" else None,
        ),
        Task("decorated", "Is the function decorated?", lambda row: flag(row.decorated, "decorated", "plain")),
        Task("parameters", "How many parameters has the function?", parameters),
        subpackage_task(STANDARD_LIBRARY),
        *(subpackage_task(library) for library in PACKAGES if library != "transformers"),
        Task("transformers", "Which kind of file of transformers is it from?", transformers_role, MAX_SUBPACKAGES),
        Task("lines", "How many code lines has the function (natural logarithm)?", log_lines, regression=True),
    )
}


def label_texts(rows: Iterable[Row], task: Task) -> tuple[list[str], list[str | float]]:
    """The distinct texts of a task and their labels, in the order of the rows, without any cap.

    Texts equal but for their case are one text, written as where it comes first; if its owners disagree on the label it
    gets the most frequent one, and of equally frequent ones the alphabetically first (the smallest number).
    """
    first: dict[str, str] = {}
    votes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows:
        label = task.label(row) if is_text(row.text) else None
        if label is not None:
            votes[first.setdefault(row.text.casefold(), row.text)][label] += 1
    labels = {text: min(counts, key=lambda label: (-counts[label], label)) for text, counts in votes.items()}
    if task.max_classes is not None:
        sizes = collections.Counter(labels.values())
        largest = sorted(sizes, key=lambda label: (-sizes[label], label))[: task.max_classes]
        kept = {label for label in largest if sizes[label] >= MIN_SUBPACKAGE_TEXTS}
        labels = {text: label for text, label in labels.items() if label in kept}
    return list(labels), list(labels.values())


@functools.cache
def label_rows(name: str) -> tuple[tuple[str, str | float, bool], ...]:
    """Text, label and "is on the test side" of every row of one task, capped, in hash order."""
    room, kept = {False: MAX_TRAIN, True: MAX_TEST}, []
    for text, label in zip(*label_texts(load_rows()[0], TASKS[name]), strict=True):
        side = is_test_side(text)
        if room[side] > 0:
            room[side] -= 1
            kept.append((text, label, side))
    return tuple(kept)


def load_task(task: str, split: Literal["train", "test", "all"]) -> tuple[list[str], list[str] | list[float]]:
    """Texts and labels of one task, in hash order: every prefix is a random sample.

    Args:
        task: a key of `TASKS`.
        split: at most 8,000 training and 2,000 test rows; `all` is both.

    Raises:
        UserError: there is no such task or split, or one of the packages is not installed.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"There is no docstring task {task!r}. {hint}All tasks: {', '.join(TASKS)}.")
    if split not in ("train", "test", "all"):
        raise UserError(f"There is no split {split!r}; the docstring tasks have train, test and all.")
    rows = [row for row in label_rows(task) if split == "all" or row[2] == (split == "test")]
    return [text for text, _, _ in rows], [label for _, label, _ in rows]  # type: ignore[return-value]


# ------------------------------------------------------------------ run
def summarize(task: Task) -> str:
    """One line of the table: name, classes, rows per split, share of the largest class in the test split, question."""
    (_, train), (_, test) = load_task(task.name, "train"), load_task(task.name, "test")
    if task.regression:
        classes, majority = "-", "-"
    else:
        classes, majority = str(len({*train, *test})), f"{max(collections.Counter(test).values()) / len(test):.3f}"
    return f"{task.name:<14}{classes:>8}{len(train):>8}{len(test):>8}{majority:>10}  {task.question}"


def main(config: Config) -> None:
    """Prints the table of the tasks, and the first rows of one of them if asked to."""
    rows, _ = load_rows()
    print(f"{'task':<14}{'classes':>8}{'train':>8}{'test':>8}{'majority':>10}  question")
    for task in TASKS.values():
        print(summarize(task))
    num_texts = len({row.text.casefold() for row in rows if is_text(row.text)})
    print(f"fingerprint {fingerprint()}: {len(rows):,} docstrings, {num_texts:,} distinct texts")
    if config.task is not None:
        for text, label in list(zip(*load_task(config.task, "train"), strict=True))[: config.num_examples]:
            print(f"{label!s:<20} {text[:200]}")
    print(cache_path(cache_key()))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
