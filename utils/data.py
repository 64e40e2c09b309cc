"""Labelled texts by name: the known datasets, any other of the hub, the user's own files, the docstring tasks.

    python -m utils.data                                        # table of the known datasets, without network
    python cache.py --dataset_name emotion                      # a key of the table, or its hub id
    python cache.py --dataset_name user/dataset:config          # any other dataset of the hub
    python cache.py --dataset_name reviews.csv --text_column review --label_column stars
    python cache.py --dataset_name docstrings/raises            # see demo/docstrings.py

Files are .jsonl, .json, .csv, .tsv or .parquet in UTF-8, or a folder of them (train, test, validation by file name).
What has no held-out split is split 70/30. Rows of one's own that are empty or cannot be encoded are errors; in a
dataset of the hub, which its reader cannot mend, they are left out with a warning.
"""

import hashlib
import itertools
import math
import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils.datasets_table import DATASETS, DatasetSpec, table
from utils.io import UserError
from utils.settings import Data
from utils.sources import VALIDATION_NAMES, Source, Table, find_source

__all__ = ["DATASETS", "DatasetSpec", "LabelledTexts", "leaked_share", "load_splits", "load_texts"]

PAPER_SEED = 42  # of the 70/30 splits of the known datasets; a run's own seed must not move their test rows
TEST_SHARE = 0.3
LEAK_WARNING = 0.01  # share of test texts that also stand in train from which on a plain warning is due
INTEGER = re.compile(r"-?(0|[1-9]\d*)")  # "007" stays a name
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class LabelledTexts:
    """The texts and labels of one split."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64 classes 0..c-1, or (n,) float64 regression targets
    label_names: list[str]  # c class names; empty for regression
    fingerprint: str  # first 16 hex digits of the SHA-256 over texts and labels

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of classes c; 1 for regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class Rows:
    """Texts with a raw label each; a text without any content is the empty string."""

    texts: list[str]
    labels: list[Any]
    groups: np.ndarray | None = None  # (n,) rows of one group stay on one side of a split

    def take(self, rows: Iterable[int]) -> "Rows":
        rows = list(rows)
        groups = None if self.groups is None else self.groups[rows]
        return Rows([self.texts[row] for row in rows], [self.labels[row] for row in rows], groups)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------ columns to texts
def column(source: Source, part: Table, name: str, flag: str) -> list[Any]:
    """One column; `flag` is what names another one.

    Raises:
        UserError: there is no such column.
    """
    if name not in part.columns:
        present = ", ".join(part.columns) or "none"
        raise UserError(f"{source.name} has no column {name!r}; columns: {present}. Name one with {flag}.")
    return list(part.columns[name][:])


def label_column_name(settings: Data, source: Source, part: Table) -> str:
    """The label column: as asked for, as the table of datasets has it, or `label` / `labels`."""
    chosen = settings.label_column or (source.spec.label_column if source.spec else None)
    return chosen or next((name for name in ("label", "labels") if name in part.columns), "label")


def text_pieces(settings: Data, source: Source, part: Table, label: str) -> list[tuple[str, str | None]]:
    """A text as pieces of (literal, column behind it): of the template, of one column, or of the only text column.

    Raises:
        UserError: two ways are asked for, the template is malformed, or no column is the evident one.
    """
    if settings.text_column and settings.text_template:
        raise UserError("--text_column and --text_template exclude each other: give one of them.")
    if settings.text_column:
        return [("", settings.text_column)]
    template = settings.text_template or (source.spec.text_template if source.spec else None)
    if template is not None:
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"--text_template {template!r} is malformed ({error}).") from None
        names = [name for _, name, _, _ in parsed if name is not None]
        if not names or "" in names or any(form or conversion for _, _, form, conversion in parsed):
            raise UserError(
                f'--text_template {template!r} must name columns in braces, like "{{question}} {{choices}}".'
            )
        return [(literal, name) for literal, name, _, _ in parsed]
    if "text" in part.columns:
        return [("", "text")]
    candidates = [name for name in part.columns if name != label and holds_text(part.columns[name][:])]
    if len(candidates) != 1:
        raise UserError(
            f"Which column of {source.name} is the text? Columns: {', '.join(part.columns) or 'none'}. "
            "Name one with --text_column, or several with --text_template."
        )
    return [("", candidates[0])]


def holds_text(values: Sequence[Any]) -> bool:
    """Whether any value is a string that is not just a number."""
    return any(isinstance(value, str) and value.strip() and not NUMBER.fullmatch(value) for value in values)


def render(value: Any) -> str:
    """A cell as text: choices, a list or the hub's {label, text}, become "(0) first (1) second", as in the paper."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        return " ".join(f"({number}) {choice}" for number, choice in enumerate(value))
    return "" if value is None else str(value)


def join_texts(source: Source, part: Table, pieces: list[tuple[str, str | None]]) -> list[str]:
    """One text per row; empty where every column is blank, whatever the template puts around them."""
    flag = "--text_column or --text_template"
    columns = [[render(cell) for cell in column(source, part, name, flag)] for _, name in pieces if name is not None]
    texts = []
    for cells in zip(*columns, strict=True):
        rest = iter(cells)
        joined = "".join(literal + (next(rest) if name is not None else "") for literal, name in pieces)
        texts.append(joined if any(cell.strip() for cell in cells) else "")
    return texts


# ------------------------------------------------------------------ labels
def is_regression(settings: Data, source: Source, labels: list[Any]) -> bool:
    """`task` decides; under `auto` the table of datasets, else any number that is not a whole one."""
    if settings.task != "auto":
        return settings.task == "regression"
    if source.spec and not settings.label_column:
        return source.spec.num_classes == 0
    numbers = [label for label in labels if not is_missing(label, True)]
    floats = all(isinstance(label, int | float) and not isinstance(label, bool) for label in numbers)
    return floats and any(not float(label).is_integer() for label in numbers)


def is_missing(label: Any, regression: bool = False) -> bool:
    """No label: empty, not a number, or -1, which stands for a hidden label unless it is a regression target."""
    if label is None or (isinstance(label, str) and not label.strip()):
        return True
    number = isinstance(label, int | float) and not isinstance(label, bool)
    return number and (math.isnan(label) or (label == -1 and not regression))


def typed(labels: list[Any]) -> list[Any]:
    """The cells of a csv column as numbers, if every one that is not empty is a number."""
    cells = [str(label) for label in labels if not is_missing(label, True)]
    for pattern, kind in ((INTEGER, int), (NUMBER, float)):
        if all(pattern.fullmatch(cell) for cell in cells):
            return [None if is_missing(label, True) else kind(label) for label in labels]
    return labels


def cut(values: Iterable[Any], like: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The values in parts as long as those of `like`."""
    rest = iter(values)
    return {part: list(itertools.islice(rest, len(of_part))) for part, of_part in like.items()}


def targets(source: Source, parts: dict[str, Rows]) -> dict[str, Rows]:
    """Rows with finite numbers as labels.

    Raises:
        UserError: a target is not a finite number, or all are equal.
    """
    numbers = {}
    for part, rows in parts.items():
        try:
            numbers[part] = Rows(rows.texts, [float(label) for label in rows.labels])
        except (TypeError, ValueError) as error:
            raise UserError(f"A target of {source.name} is not a number ({error}): --task classification?") from None
        if not all(map(math.isfinite, numbers[part].labels)):
            raise UserError(f"A target of {source.name} is infinite. Remove that row.")
    first = next(iter(parts))
    if len(set(numbers[first].labels)) < 2:
        raise UserError(f"The {first} targets of {source.name} are all equal. See --label_column.")
    return numbers


def class_values(source: Source, labels: list[Any]) -> list[Any]:
    """Labels as values that sort and compare: whole numbers as int, everything else as str."""
    if any(isinstance(label, list | dict) for label in labels):
        raise UserError(f"The labels of {source.name} are lists; one label per text is needed (--label_column).")
    numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    whole = numbers and all(float(label).is_integer() for label in labels)
    return [int(label) if whole else str(label) for label in labels]


def encode(source: Source, parts: dict[str, Rows], names: list[str] | None) -> tuple[dict[str, Rows], list[str]]:
    """Rows with labels 0..c-1, and the c class names: the classes of the training rows, sorted.

    Args:
        source: where the rows come from.
        parts: rows by part; the first part (train, where there is one) defines the classes.
        names: class names, where a label is a position among them.

    Raises:
        UserError: a single class, or, in the user's own data, a class that train lacks.
    """
    values = class_values(source, [label for rows in parts.values() for label in rows.labels])
    labels = cut(values, {part: rows.labels for part, rows in parts.items()})
    first = next(iter(parts))
    classes = sorted(set(labels[first]))
    index = {value: number for number, value in enumerate(classes)}
    spelled = {value: names[value] if names else str(value) for value in set(values)}
    if len(classes) < 2:
        raise UserError(
            f"The {first} labels of {source.name} are all {spelled[classes[0]]!r}; at least two classes are needed. "
            "See --label_column; where -1 is a class, and not a missing label, name it in words."
        )
    encoded = {}
    for part, rows in parts.items():
        kept = [row for row, value in enumerate(labels[part]) if value in index]
        if len(kept) < len(rows.texts):
            unseen = sorted(spelled[value] for value in set(labels[part]) - set(classes))
            told = f"{len(rows.texts) - len(kept)} {part} rows of {source.name} have classes that train lacks: "
            told += ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            if source.own or not kept:
                raise UserError(f"{told}. Correct them, add rows of these classes to train, or take --split all.")
            warn(f"{told}; left out")
        encoded[part] = Rows([rows.texts[row] for row in kept], [index[labels[part][row]] for row in kept])
    return encoded, [spelled[value] for value in classes]


# ------------------------------------------------------------------ rows and splits
def stratified_rows(classes: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Numbers of `num` random rows in random order, each class in proportion and, if `num` allows, none left out.

    Args:
        classes: class of each row, (n,); constant for a plain random sample.
        num: size of the sample, at most n.
        seed: the same seed gives the same rows.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(classes, return_inverse=True, return_counts=True)[1:]
    quota = num * counts / counts.sum()
    take = np.maximum(np.floor(quota).astype(int), int(num >= len(counts)))
    while take.sum() > num:
        take[np.argmax(take)] -= 1
    while take.sum() < num:
        take[np.argmax(quota - take)] += 1
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    return generator.permutation(np.concatenate([order[i : i + k] for i, k in zip(starts, take, strict=True)]))


def paper_split(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test in the paper's order, which is the same in datasets 3.5 and 5.2."""
    numbered = datasets.Dataset.from_dict({"row": range(num_rows)})
    split = numbered.train_test_split(test_size=TEST_SHARE, shuffle=True, seed=PAPER_SEED)
    return np.array(split["train"]["row"][:]), np.array(split["test"]["row"][:])


def divide(settings: Data, source: Source, rows: Rows, stratify: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and test for data without a held-out split.

    Differs from the paper: the rows of one question of `medical` stay on one side. The paper splits rows, which puts
    the same question with the opposite label on the other side; `ungrouped_split` gives that split.

    Raises:
        UserError: too few rows for two splits.
    """
    if len(rows.texts) < 2:
        raise UserError(f"{source.name} has {len(rows.texts)} labelled rows; a 70/30 split needs at least two.")
    if source.spec is None:
        classes = np.array([str(label) if stratify else "" for label in rows.labels])
        train = stratified_rows(classes, len(classes) - math.ceil(TEST_SHARE * len(classes)), settings.seed)
        test = np.setdiff1d(np.arange(len(classes)), train)
        return train, np.random.default_rng(settings.seed).permutation(test)
    if rows.groups is None:
        return paper_split(len(rows.texts))
    groups = np.unique(rows.groups)
    if len(groups) < 2:
        raise UserError(f"All rows of {source.name} share a question: take --split all or --ungrouped_split.")
    in_train = np.isin(rows.groups, groups[paper_split(len(groups))[0]])
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)


def linked_groups(columns: list[list[str]]) -> np.ndarray:
    """Group of each row, (n,): rows that share a text, in whatever case and spacing, are in one group."""
    texts: dict[str, int] = {}
    num_rows = len(columns[0])
    cells = [
        texts.setdefault(" ".join(render(cell).casefold().split()), len(texts)) for column in columns for cell in column
    ]
    edges = (np.ones(len(cells)), (np.tile(np.arange(num_rows), len(columns)), num_rows + np.array(cells)))
    graph = coo_array(edges, shape=(num_rows + len(texts),) * 2)
    return connected_components(graph, directed=False)[1][:num_rows]


def choose_parts(source: Source, label: str, split: str) -> dict[str, Table]:
    """The tables that serve as `train` and as `test`, which may be missing; for `all` every one with labels.

    Raises:
        UserError: a split is missing; the message shows those present.
    """
    splits, spec = source.splits, source.spec
    absent = f"{source.name} has no split {{!r}}; splits: {', '.join(splits)}."
    # hidden test labels are common on the hub; the validation split is then what can be scored
    labelled = [name for name, rows in splits.items() if not all(map(is_missing, rows.columns.get(label, ())[:]))]
    if spec:
        for name in filter(None, ("train", spec.test_split)):
            if name not in splits:
                raise UserError(f"{absent.format(name)} Another --dataset_revision may have it.")
        held_out = [spec.test_split] if spec.test_split else []
    else:
        held_out = [name for name in ("test", *VALIDATION_NAMES) if name in splits]
    if split == "all":
        return {name: splits[name] for name in labelled} or splits
    test = next((name for name in held_out if name in labelled), next(iter(held_out), None))
    train = next(iter(splits)) if len(splits) == 1 and test is None else "train"
    if train not in splits and (test is None or split == "train"):
        raise UserError(f"{absent.format(train)} Name one of them train, or take --split all.")
    if test in VALIDATION_NAMES and not spec:
        print(f"{source.name}: {test} serves as the test split")
    return {part: splits[name] for part, name in (("train", train), ("test", test)) if name in splits}


def labelled_rows(settings: Data, source: Source, tables: dict[str, Table]) -> tuple[dict[str, Rows], bool]:
    """The rows that have a label, by part, and whether the task is a regression.

    Raises:
        UserError: a missing column, no row, no label, or an empty text in the user's own data.
    """
    first = next(iter(tables.values()))
    label = label_column_name(settings, source, first)
    pieces = text_pieces(settings, source, first, label)
    labels = {part: column(source, rows, label, "--label_column") for part, rows in tables.items()}
    if first.untyped:
        labels = cut(typed([cell for of_part in labels.values() for cell in of_part]), labels)
    regression = is_regression(settings, source, [cell for part in labels.values() for cell in part])
    parts = {}
    for part, rows in tables.items():
        texts = join_texts(source, rows, pieces)
        empty = [number for number, text in enumerate(texts, 1) if not text]
        if empty and source.own:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise UserError(f"{len(empty)} {part} texts of {source.name} are empty: rows {shown}. Fill or remove them.")
        kept = [row for row, cell in enumerate(labels[part]) if not is_missing(cell, regression)]
        if not kept:
            found = "no rows" if not texts else f"{len(texts)} {part} rows, their labels all missing or -1"
            raise UserError(f"{source.name} has {found} (label column {label!r}). Label them, or see --label_column.")
        if len(kept) < len(texts):
            warn(f"{len(texts) - len(kept)} {part} rows of {source.name} without a label (missing or -1) are left out")
        together = source.spec.group_by if source.spec and not settings.ungrouped_split else ()
        columns = [column(source, rows, name, "--dataset_revision") for name in together]
        groups = linked_groups(columns) if columns else None
        parts[part] = Rows(texts, labels[part], groups).take(kept)
    return parts, regression


def without_empty(source: Source, parts: dict[str, Rows]) -> dict[str, Rows]:
    """The rows whose text is not empty; after the split, so that leaving one out moves no other row."""
    kept = {part: [row for row, text in enumerate(rows.texts) if text] for part, rows in parts.items()}
    for part, rows in parts.items():
        if len(kept[part]) < len(rows.texts):
            warn(f"{len(rows.texts) - len(kept[part])} {part} rows of {source.name} have no text; left out")
        if not kept[part]:
            raise UserError(f"All {part} texts of {source.name} are empty. Is --text_column right?")
    return {part: rows.take(kept[part]) for part, rows in parts.items()}


# ------------------------------------------------------------------ load
def leaked_share(train_texts: Iterable[str], test_texts: Sequence[str]) -> float:
    """Share of the test texts that also stand in train, letter by letter."""
    known = set(train_texts)
    return sum(text in known for text in test_texts) / max(len(test_texts), 1)


def split_rule(settings: Data, spec: DatasetSpec | None, divided: bool) -> str:
    """How the test rows were chosen, in words."""
    if spec:
        return "seeded 70/30" if spec.group_by and settings.ungrouped_split else spec.split_rule
    return f"split 70/30 by seed {settings.seed}" if divided else "own test"


def report(source: Source, parts: dict[str, Rows], label_names: list[str], rule: str) -> None:
    """Prints sizes, split rule and leak; warns of a leak, and of a dataset that is not what the table says."""
    sizes = {part: len(rows.texts) for part, rows in parts.items()}
    facts = [" and ".join(f"{size:,} {part}" for part, size in sizes.items()) + " texts"]
    facts.append(f"{len(label_names)} classes" if label_names else "a regression target")
    if {"train", "test"} <= set(parts):
        facts.append(rule)
        known = source.spec.sizes if source.spec else None
        if known and sum(known) != sum(sizes.values()):
            expected = f"{known[0]:,} and {known[1]:,}"
            warn(f"{source.name} was known with {expected} rows; the hub has changed, or the known sizes are wrong")
        leaked = leaked_share(parts["train"].texts, parts["test"].texts)
        facts.append(f"{leaked:.1%} of the test texts also stand in train")
        if leaked > LEAK_WARNING:
            warn(f"{leaked:.1%} of the test texts of {source.name} also stand in train: test scores reward memory")
    print(f"{source.name}: {', '.join(facts)}")


def fingerprint(source: Source, texts: list[str], labels: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 over the texts, each ended by a zero byte, and the labels."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts, 1):
        try:
            digest.update(text.encode() + b"\0")
        except UnicodeEncodeError as error:
            raise UserError(f"Text {number} of {source.name} is not valid Unicode ({error}). Correct it.") from None
    digest.update(labels.tobytes())
    return digest.hexdigest()[:16]


def load_splits(settings: Data, wanted: str = "both") -> dict[str, LabelledTexts]:
    """The texts and labels of `train` and `test`, or of `all`: every labelled row, undivided.

    Classes are those of train in every split. `seed` draws the split of data that has none, and the rows of
    `max_samples`; the splits of the known datasets are fixed.

    Args:
        settings: the dataset.
        wanted: "both", or the one split that must be there: "train", "test" or "all".

    Raises:
        UserError: the dataset cannot be found or read, or its rows do not make a task.
    """
    source = find_source(settings.dataset_name, settings.dataset_revision)
    label = label_column_name(settings, source, next(iter(source.splits.values())))
    needed = "train" if wanted == "both" else wanted
    parts, regression = labelled_rows(settings, source, choose_parts(source, label, needed))
    divided = list(parts) == ["train"] and wanted != "all"
    if wanted == "all":
        texts = [text for rows in parts.values() for text in rows.texts]
        parts = {"all": Rows(texts, [cell for rows in parts.values() for cell in rows.labels])}
    elif divided:
        train, test = divide(settings, source, parts["train"], not regression)
        parts = {"train": parts["train"].take(train), "test": parts["train"].take(test)}
    parts = without_empty(source, parts)
    label_names: list[str] = []
    if regression:
        parts = targets(source, parts)
    else:
        parts, label_names = encode(source, parts, next(iter(source.splits.values())).class_names.get(label))
    report(source, parts, label_names, split_rule(settings, source.spec, divided))
    return {part: sample(settings, source, rows, label_names) for part, rows in parts.items()}


def sample(settings: Data, source: Source, rows: Rows, label_names: list[str]) -> LabelledTexts:
    """The rows of one split, at most `max_samples` of them, with their fingerprint."""
    texts, labels = rows.texts, np.array(rows.labels, dtype=np.int64 if label_names else np.float64)
    if settings.max_samples is not None and settings.max_samples < len(texts):
        classes = labels if label_names else np.zeros(len(texts))
        chosen = stratified_rows(classes, settings.max_samples, settings.seed)
        texts, labels = [texts[row] for row in chosen], labels[chosen]
    return LabelledTexts(texts, labels, label_names, fingerprint(source, texts, labels))


def load_texts(settings: Data, split: str) -> LabelledTexts:
    """The texts and labels of one split, as `load_splits` gives them."""
    return load_splits(settings, split)[split]


def main() -> None:
    """Prints the known datasets; needs no network."""
    print(table())


if __name__ == "__main__":
    main()
