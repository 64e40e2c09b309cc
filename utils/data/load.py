"""Load labelled texts by name: known datasets, any other of the hub, the user's own files, the docstring tasks.

    python -m utils.data.load                                   # table of the known datasets, without network
    python cache.py --dataset_name emotion                      # a key of the table, or its hub id
    python cache.py --dataset_name user/dataset:config          # any other dataset of the hub
    python cache.py --dataset_name reviews.csv --text_column review --label_column stars
    python cache.py --dataset_name folder:subset                # a folder whose README.md names subsets
    python cache.py --dataset_name docstrings/raises            # see utils/data/docstrings.py

Data without a held-out split is split 70/30. Rows without a text or of an unknown class are errors in the user's own
data; in a dataset of the hub they are left out with a warning. Code of a dataset is never executed.
"""

import hashlib
import itertools
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data import cells, splits
from utils.data.files import VALIDATION_NAMES, Source, Table, check_class_names, find_source
from utils.data.table import table
from utils.script import UserError, run_script, warn
from utils.settings import Data, Run

LEAK_WARNING = 0.01  # warn if at least this share of the test texts is also in train
MAX_MEAN = 1e5  # largest mean of targets, in standard deviations: it costs 10 of the 16 digits of float64
SPREADS = (1e-15, 1e15)  # standard deviations of targets: float64 and float32 hold their powers
MAX_CLASSES = 5000  # the label moments of cache.py are c x c in float64, for each fold: 1 GB


@dataclass(frozen=True)
class LabelledTexts:
    """The texts and labels of one split."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64 classes 0..c-1, or (n,) float64 regression targets
    label_names: list[str]  # c class names; empty for regression
    fingerprint: str  # first 16 hex digits of the SHA-256 over texts and labels

    @property
    def is_regression(self) -> bool:
        """True if the labels are numbers to predict, not classes."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of classes c; 1 for regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class Rows:
    """Texts and one label each; a text without content is the empty string."""

    texts: list[str]
    labels: list[Any]
    groups: np.ndarray | None = None  # (n,) rows of one group stay on one side of a split

    def take(self, rows: Iterable[int]) -> "Rows":
        """The rows with these numbers, in their order."""
        rows = list(rows)
        groups = None if self.groups is None else self.groups[rows]
        return Rows([self.texts[row] for row in rows], [self.labels[row] for row in rows], groups)


# ------------------------------------------------------------------ tables -> rows
def choose_parts(source: Source, label: str, wanted: str, divide_train: bool) -> dict[str, Table]:
    """The tables that serve as `train` and `test` (which may be missing), or, for `all`, every table with labels."""
    tables, spec = source.tables, source.spec
    labelled = {name: rows for name, rows in tables.items() if _has_labels(rows, label)}
    if wanted == "all":
        return labelled or tables
    names = [spec.test_split] if spec else [name for name in ("test", *VALIDATION_NAMES) if name in tables]
    held_out = [name for name in names if name and not divide_train]
    # hidden test labels are common on the hub; the validation split then serves as test
    test = next((name for name in held_out if name in labelled), next(iter(held_out), None))
    train = next(iter(tables)) if len(tables) == 1 and test is None and not spec else "train"
    missing = next((name for name in (train, test) if name and name not in tables), None)
    if missing and (spec or test is None or wanted != "test"):
        instead = "--split all" if missing == "train" else "--split all or --divide_train"
        found = f"{source.name} has no split {missing!r}; splits: {', '.join(tables)}"
        raise UserError(f"{found}. Add a split {missing!r}, or set {instead}.")
    if test in VALIDATION_NAMES and not spec:
        print(f"{source.name}: {test} serves as the test split")
    return {part: tables[name] for part, name in (("train", train), ("test", test)) if name in tables}


def _has_labels(rows: Table, label: str) -> bool:
    return label in rows.columns and not all(map(cells.is_missing, cells.typed(rows.read(label))))


def _text_pieces(settings: Data, source: Source, rows: Table, label: str) -> list[tuple[str, str | None]]:
    """A text as pieces (literal, next column), from the template, the named column, or the only text column."""
    template, column = settings.text_template, settings.text_column
    if column and template:
        raise UserError("--text_column and --text_template exclude each other. Give one of them.")
    if source.spec and not column:
        template = template or source.spec.text_template
    if template:
        try:
            template.encode()  # a shell may pass bytes that are no characters
            parsed = list(string.Formatter().parse(template))
        except ValueError:
            parsed = []
        if not any(name for _, name, _, _ in parsed) or any(form or how or name == "" for _, name, form, how in parsed):
            raise UserError(f"--text_template {template!r} must name columns in braces, like '{{title}} {{body}}'.")
        return [(literal, name) for literal, name, _, _ in parsed]
    evident = column or ("text" if "text" in rows.columns else None)
    others = [name for name in rows.columns if name != label]
    found = [evident] if evident else [name for name in others if cells.holds_text(rows.read(name))]
    if len(found) != 1:
        columns = ", ".join(rows.columns) or "none"
        raise UserError(f"{source.name} must have one text column; its columns are {columns}. Name one: --text_column.")
    return [("", found[0])]


def _join_texts(source: Source, part: str, rows: Table, pieces: list[tuple[str, str | None]]) -> list[str]:
    """One text per row; empty if every column is blank, even if the template has words around them."""
    names = [name for _, name in pieces if name is not None]
    columns = {name: cells.render_column(source.name, part, name, rows.read(name)) for name in names}
    texts = []
    for row in range(len(rows)):
        joined = "".join(literal + (columns[name][row] if name is not None else "") for literal, name in pieces)
        texts.append(joined if any(column[row].strip() for column in columns.values()) else "")
    return texts


def _labelled_rows(
    settings: Data, source: Source, tables: dict[str, Table], label: str
) -> tuple[dict[str, Rows], bool]:
    """The rows that have a label, by part; and True for a regression."""
    check_class_names(tables.values(), f"the splits of {source.name}")
    pieces = _text_pieces(settings, source, next(iter(tables.values())), label)
    regression = None if settings.task == "auto" else settings.task == "regression"
    if source.spec and settings.task == "auto" and not settings.label_column:
        regression = source.spec.num_classes == 0
    written = {part: rows.read(label) for part, rows in tables.items()}
    values, regression = cells.label_values(source.name, itertools.chain(*written.values()), regression)
    group_by = source.spec.group_by if source.spec and not settings.ungrouped_split else ()
    parts, rest = {}, iter(values)
    for part, rows in tables.items():
        texts = _join_texts(source, part, rows, pieces)
        empty = [row for row, text in enumerate(texts, 1) if not text]
        if empty and source.own:
            found = f"{len(empty)} {part} texts of {source.name} are empty: rows {cells.listed(empty)}"
            raise UserError(f"{found}. Fill or remove them.")
        columns = [_join_texts(source, part, rows, [("", name)]) for name in group_by]
        labels = list(itertools.islice(rest, len(rows)))
        labelled = Rows(texts, labels, splits.linked_groups(columns) if columns else None)
        missing = [label is None for label in labels]
        fault = f"have no label (missing or -1){cells.describe_missing(written[part], missing)}"
        parts[part] = _leave_out(source, part, labelled, missing, fault, "Label them, or change --label_column.")
    return parts, regression


def _divide(settings: Data, source: Source, rows: Rows, regression: bool) -> tuple[dict[str, Rows], str]:
    """Splits data without a held-out split into train and test; also returns the rule in words.

    Differs from the paper: the rows of one question of `medical` stay on one side. The paper splits rows, which puts
    the same question with the opposite label on the other side; `ungrouped_split` gives that split.
    """
    if len(rows.texts if rows.groups is None else set(rows.groups)) < 2:
        raise UserError(f"{source.name} has a single row, or question; a 70/30 split needs two. Set --split all.")
    if source.spec is None:
        classes = np.array(["" if regression else str(label) for label in rows.labels])
        rule, (train, test) = f"split 70/30 by seed {settings.seed}", splits.seeded_split(classes, settings.seed)
    elif rows.groups is None:
        rule, (train, test) = "seeded 70/30", splits.paper_split(len(rows.texts))
    else:
        rule, (train, test) = "grouped 70/30", splits.grouped_split(rows.groups)
    return {"train": rows.take(train), "test": rows.take(test)}, rule


def _leave_out(
    source: Source, part: str, rows: Rows, faulty: list[bool], fault: str, remedy: str, refuse: bool = False
) -> Rows:
    """The rows without the faulty ones, with a warning. Raises UserError if none remains, or at once if `refuse`."""
    kept = [row for row, is_faulty in enumerate(faulty) if not is_faulty]
    found = f"{len(faulty) - len(kept)} of {len(faulty)} {part} rows of {source.name} {fault}"
    if not kept or (refuse and any(faulty)):
        raise UserError(f"{found}. {remedy}")
    if any(faulty):
        warn(f"{found}; left out")
    return rows.take(kept)


# ------------------------------------------------------------------ rows -> labelled texts
def _encode(source: Source, parts: dict[str, Rows], label: str) -> tuple[dict[str, Rows], list[str]]:
    """Rows with labels 0..c-1, and the c class names: the classes of the first part (train, if it exists), sorted."""
    first = next(iter(parts))
    classes = sorted(set(parts[first].labels))
    # a number beyond the class names of the file, or a word, is its own name
    known = dict(enumerate(next(iter(source.tables.values())).class_names.get(label, ())))
    spelled = {value: known.get(value, str(value)) for rows in parts.values() for value in rows.labels}
    if not 2 <= len(classes) <= MAX_CLASSES:
        found = f"all {spelled[classes[0]]!r}" if len(classes) == 1 else f"of {len(classes):,} classes"
        found = f"The {first} labels of {source.name} are {found}; at least two classes are needed"
        advice = "Change --label_column, name a class -1 in words, or set --task regression."
        raise UserError(f"{found}, and up to {MAX_CLASSES:,} are possible. {advice}")
    index = {value: number for number, value in enumerate(classes)}
    encoded = {}
    for part, rows in parts.items():
        unseen = sorted(spelled[value] for value in set(rows.labels) - set(classes))
        fault = f"have classes that train lacks: {cells.listed(unseen)}"
        remedy = "Correct them, add rows of these classes to train, or take --split all."
        numbered = Rows(rows.texts, [index.get(value) for value in rows.labels])
        absent = [number is None for number in numbered.labels]
        encoded[part] = _leave_out(source, part, numbered, absent, fault, remedy, refuse=source.own)
    return encoded, [spelled[value] for value in classes]


def _check_targets(name: str, part: str, targets: np.ndarray) -> None:
    """Raises UserError for regression targets that are all equal, or whose sums of squares would lose digits."""
    if targets.min() == targets.max():
        if part != "test":
            raise UserError(f"The {part} targets of {name} are all equal. Change --label_column or --max_samples.")
        return
    largest = float(np.abs(targets).max())
    scaled = targets / largest  # squares of the numbers themselves may overflow
    mean, std = float(scaled.mean()), float(scaled.std())
    if abs(mean) > MAX_MEAN * std or not SPREADS[0] <= std * largest <= SPREADS[1]:
        found = f"mean {mean * largest:.9g} and standard deviation {std * largest:.3g}, lose their digits"
        raise UserError(f"The {part} targets of {name}, {found}. Rescale the column, or subtract its mean.")


def _report(source: Source, parts: dict[str, Rows], label_names: list[str], rule: str) -> None:
    """Prints sizes, split rule and leak; warns of a leak, and of a dataset that differs from the table."""
    spec, sizes = source.spec, {part: len(rows.texts) for part, rows in parts.items()}
    facts = [" and ".join(f"{size:,} {part}" for part, size in sizes.items()) + " texts"]
    facts.append(f"{len(label_names)} classes" if label_names else "a regression target")
    if {"train", "test"} <= set(parts):
        if spec and spec.sizes and sum(spec.sizes) != sum(sizes.values()):
            known = " and ".join(f"{size:,}" for size in spec.sizes)
            warn(f"{source.name} had {known} rows when it was tabulated; this copy or revision has other rows")
        known_texts = set(parts["train"].texts)
        leaked = sum(text in known_texts for text in parts["test"].texts) / sizes["test"]
        facts += [rule, f"{leaked:.1%} of the test texts are also in train"]
        if leaked > LEAK_WARNING:
            warn(f"{leaked:.1%} of the test texts of {source.name} are also in train: test scores reward memory")
    print(f"{source.name}: {', '.join(facts)}")


def _sample(settings: Data, source: Source, part: str, rows: Rows, label_names: list[str]) -> LabelledTexts:
    """The rows of one split, at most as many as the settings allow, with their fingerprint."""
    texts, labels = rows.texts, np.array(rows.labels, dtype=np.int64 if label_names else np.float64)
    most = (settings.max_test_samples if part == "test" else None) or settings.max_samples
    if most is not None and most < len(texts):
        chosen = splits.stratified_rows(labels if label_names else np.zeros(len(texts)), most, settings.seed)
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    if not label_names:
        _check_targets(source.name, part, labels)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    digest.update(labels.tobytes())
    return LabelledTexts(texts, labels, label_names, digest.hexdigest()[:16])


def load_splits(settings: Data, run: Run, wanted: str = "both") -> dict[str, LabelledTexts]:
    """The texts and labels of `train` and `test`, or of `all`: every labelled row, undivided.

    Classes are those of train in every split. `seed` draws the split of data that has none, and the rows of
    `max_samples` and `max_test_samples`; the splits of the known datasets are fixed.

    Args:
        settings: the dataset.
        run: `datasets_dir` is read.
        wanted: "both", or the one split that is needed: "train", "test" or "all".
    """
    source = find_source(settings.dataset_name, settings.dataset_revision, run.datasets_dir)
    columns = next(iter(source.tables.values())).columns
    evident = "labels" if "labels" in columns and "label" not in columns else "label"
    label = settings.label_column or (source.spec.label_column if source.spec else evident)
    tables = choose_parts(source, label, wanted, settings.divide_train)
    parts, regression = _labelled_rows(settings, source, tables, label)
    rule = source.spec.split_rule if source.spec else "own test"
    if wanted == "all":
        texts = [text for rows in parts.values() for text in rows.texts]
        parts = {"all": Rows(texts, [cell for rows in parts.values() for cell in rows.labels])}
    elif list(parts) == ["train"]:
        parts, rule = _divide(settings, source, parts["train"], regression)
    for part, rows in parts.items():  # after the split, so that a missing row moves no other row
        empty = [not text for text in rows.texts]
        parts[part] = _leave_out(source, part, rows, empty, "have no text", "Is --text_column right?")
    label_names: list[str] = []
    if not regression:
        parts, label_names = _encode(source, parts, label)
    _report(source, parts, label_names, rule)
    return {part: _sample(settings, source, part, rows, label_names) for part, rows in parts.items()}


def load_texts(settings: Data, run: Run, split: str) -> LabelledTexts:
    """The texts and labels of one split, as `load_splits` gives them."""
    return load_splits(settings, run, split)[split]


def one_hot_targets(data: LabelledTexts, rows: np.ndarray | slice = slice(None)) -> Tensor:
    """Labels of some rows as y, (b, c) float64: one-hot rows of classes, or the regression target as it is."""
    labels = torch.from_numpy(np.asarray(data.labels)[rows])
    if data.is_regression:
        return labels.double().reshape(len(labels), -1)
    return torch.nn.functional.one_hot(labels, data.num_labels).double()


@dataclass(frozen=True)
class Config:
    """No settings: the command prints the known datasets."""


def main(config: Config) -> None:
    """Prints the known datasets; needs no network."""
    print(table())


if __name__ == "__main__":
    run_script(main, Config, __doc__)
