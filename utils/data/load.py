"""Load labelled texts by name: known datasets, other datasets of the hub, your own files, docstring tasks.

The loader splits data without a held-out split 70/30. Rows without a text or of an unknown class are errors in your own
data; in a dataset of the hub it leaves them out, with a warning. It executes no code of a dataset.
"""

import hashlib
import itertools
import string
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data import cells, splits
from utils.data.files import VALIDATION_NAMES, Source, Table, find_source
from utils.data.table import DatasetSpec
from utils.script import UserError, warn
from utils.settings import Data, Run

LEAK_WARNING = 0.01  # warn if at least this share of the test texts is also in train
MAX_MEAN = 1e5  # largest mean of targets, in standard deviations; squared, it costs 10 of the 16 digits of float64
SPREADS = (1e-15, 1e15)  # allowed standard deviations of targets: float64 and float32 hold their powers
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


class Row(NamedTuple):
    """A text, or the empty string, and its label."""

    text: str
    label: Any
    group: int  # rows of one group stay on one side of a split


# ------------------------------------------------------------------ tables -> rows
def choose_parts(source: Source, label: str, wanted: str, divide_train: bool) -> dict[str, Table]:
    """The tables of `train` and `test` (either may be missing) or, if `all` is wanted, every table with labels."""
    tables, spec, known = source.tables, source.spec, source.spec.is_known
    labelled = {name: rows for name, rows in tables.items() if _has_labels(rows, label)}
    if wanted == "all":
        kept = labelled or tables
        for name in [name for name in tables if name not in kept]:
            warn(f"{source.name}: the {name} rows have no labels; left out")
        return kept
    names = [spec.test_split] if known else [name for name in ("test", *VALIDATION_NAMES) if name in tables]
    held_out = [name for name in names if name and not divide_train]
    # hidden test labels are common on the hub; the validation split then serves as test
    test = next((name for name in held_out if name in labelled), next(iter(held_out), None))
    train = next(iter(tables)) if len(tables) == 1 and test is None and not known else "train"
    missing = next((name for name in (train, test) if name and name not in tables), None)
    if missing and (known or test is None or wanted != "test"):
        instead = "run cache.py with --split all" if missing == "train" else "set --divide_train"
        found = f"{source.name} has no split {missing!r}; splits: {', '.join(tables)}"
        raise UserError(f"{found}. Add a split {missing!r}, or {instead}.")
    return {part: tables[name] for part, name in (("train", train), ("test", test)) if name in tables}


def _has_labels(rows: Table, label: str) -> bool:
    return label in rows.columns and not all(map(cells.is_missing, cells.typed(rows.read(label))))


def _text_pieces(settings: Data, spec: DatasetSpec) -> list[tuple[str, str | None]]:
    """Pieces (literal, next column) that make a text, from the template or the one column."""
    template, column = settings.text_template, settings.text_column
    if column and template:
        raise UserError("--text_column and --text_template exclude each other. Give one of them.")
    template = template or ("" if column else spec.text_template)
    if not template:
        return [("", column or "text")]
    try:
        template.encode()  # a shell may pass bytes that are no characters
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        parsed = []
    if not any(name for _, name, _, _ in parsed) or any(form or how or name == "" for _, name, form, how in parsed):
        raise UserError(f"--text_template {template!r} must name columns in braces, like '{{title}} {{body}}'.")
    return [(literal, name) for literal, name, _, _ in parsed]


def _join_texts(source: Source, part: str, rows: Table, pieces: list[tuple[str, str | None]]) -> list[str]:
    """One text per row; empty if every column is blank, even if the template adds words."""
    names = [name for _, name in pieces if name is not None]
    columns = {name: cells.render_column(source.name, part, name, rows.read(name, part)) for name in names}
    texts = []
    for row in range(len(rows)):
        joined = "".join(literal + (columns[name][row] if name is not None else "") for literal, name in pieces)
        texts.append(joined if any(column[row].strip() for column in columns.values()) else "")
    return texts


def _labelled_rows(
    settings: Data, source: Source, tables: dict[str, Table], label: str
) -> tuple[dict[str, list[Row]], bool]:
    """The rows that have a label, by part; and True for a regression."""
    pieces = _text_pieces(settings, source.spec)
    regression = None if settings.task == "auto" else settings.task == "regression"
    if source.spec.is_known and settings.task == "auto" and not settings.label_column:
        regression = source.spec.num_classes == 0
    written = {part: rows.read(label, part) for part, rows in tables.items()}
    values, regression = cells.label_values(source.name, itertools.chain(*written.values()), regression)
    group_by = () if settings.ungrouped_split else source.spec.group_by
    parts, rest = {}, iter(values)
    for part, rows in tables.items():
        texts = _join_texts(source, part, rows, pieces)
        columns = [_join_texts(source, part, rows, [("", name)]) for name in group_by]
        groups = splits.linked_groups(columns) if columns else range(len(rows))
        labelled = [Row(*row) for row in zip(texts, itertools.islice(rest, len(rows)), groups, strict=True)]
        missing = [row.label is None for row in labelled]
        spelled = dict.fromkeys(repr(cell) for cell, is_absent in zip(written[part], missing, strict=True) if is_absent)
        found = f"rows {cells.listed(row for row, is_absent in enumerate(missing, 1) if is_absent)}"
        fault = f"have no label (missing or -1): {found}, written {cells.listed(spelled)}"
        remedy = "Label them (a class needs a name other than these), or change --label_column."
        parts[part] = _leave_out(source, part, labelled, missing, fault, remedy)
    return parts, regression


def _divide(settings: Data, source: Source, rows: list[Row], regression: bool) -> tuple[dict[str, list[Row]], str]:
    """Splits data without a held-out split into train and test; also returns the rule in words.

    Differs from the paper: the rows of one question of `medical` stay on one side. The paper splits rows, which puts
    the same question with the opposite label on the other side; `ungrouped_split` gives that split.
    """
    groups = np.array([row.group for row in rows])
    if len(set(groups)) < 2:
        raise UserError(f"{source.name} has a single row, or question; a 70/30 split needs two. Add rows.")
    if not source.spec.is_known:
        classes = np.array(["" if regression else str(row.label) for row in rows])
        rule, (train, test) = f"split 70/30 by seed {settings.seed}", splits.seeded_split(classes, settings.seed)
    elif source.spec.group_by and not settings.ungrouped_split:
        rule, (train, test) = "grouped 70/30", splits.grouped_split(groups)
    else:
        rule, (train, test) = "seeded 70/30", splits.paper_split(len(rows))
    return {"train": [rows[row] for row in train], "test": [rows[row] for row in test]}, rule


def _in_part(part: str, things: str) -> str:
    """`test rows`, or only `rows` for data that stay in one part."""
    return things if part == "all" else f"{part} {things}"


def _leave_out(
    source: Source, part: str, rows: list[Row], faulty: list[bool], fault: str, remedy: str, refuse: bool = False
) -> list[Row]:
    """The rows without faulty ones, with a warning. Raises UserError if no row remains; if `refuse`, for any fault."""
    kept = [row for row, is_faulty in zip(rows, faulty, strict=True) if not is_faulty]
    found = f"{len(rows) - len(kept)} of {len(rows)} {_in_part(part, 'rows')} of {source.name} {fault}"
    if not kept or (refuse and any(faulty)):
        raise UserError(f"{found}. {remedy}")
    if any(faulty):
        warn(f"{found}; left out")
    return kept


# ------------------------------------------------------------------ rows -> labelled texts
def _encode(source: Source, parts: dict[str, list[Row]], label: str) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows with labels 0..c-1, and the c class names: the classes of the first part (train, if it exists), sorted."""
    first = next(iter(parts))
    classes = sorted({row.label for row in parts[first]})
    # a local copy may lack the metadata of `datasets`; a number beyond the class names, or a word, is its own name
    of_table = source.spec.class_names if label == source.spec.label_column else ()
    known = dict(enumerate(next(iter(source.tables.values())).class_names.get(label, of_table)))
    spelled = {row.label: known.get(row.label, str(row.label)) for rows in parts.values() for row in rows}
    if not 2 <= len(classes) <= MAX_CLASSES:
        found = f"all {spelled[classes[0]]!r}" if len(classes) == 1 else f"of {len(classes):,} classes"
        found = f"The {_in_part(first, 'labels')} of {source.name} are {found}, not of 2 to {MAX_CLASSES:,} classes"
        remedy = "Change --label_column, add rows, name a class -1 in words, or set --task regression."
        raise UserError(f"{found}. {remedy}")
    index = {value: number for number, value in enumerate(classes)}
    encoded = {}
    for part, rows in parts.items():
        absent = [row.label not in index for row in rows]
        unseen = sorted(spelled[value] for value in {row.label for row in rows} - set(classes))
        fault = f"have classes that train lacks: {cells.listed(unseen)}"
        remedy = "Correct them, or add rows of these classes to train."
        kept = _leave_out(source, part, rows, absent, fault, remedy, refuse=source.own)
        encoded[part] = [row._replace(label=index[row.label]) for row in kept]
    return encoded, [spelled[value] for value in classes]


def _check_targets(name: str, part: str, targets: np.ndarray) -> None:
    """Raises UserError if regression targets are all equal, or if their sums of squares would lose digits."""
    if part == "test" and targets.min() == targets.max():
        return
    with np.errstate(all="ignore"):  # sums of squares may overflow
        mean, std = float(targets.mean()), float(targets.std())
    if not (SPREADS[0] <= std <= SPREADS[1] and abs(mean) <= MAX_MEAN * std):
        found = f"The {_in_part(part, 'targets')} of {name}, mean {mean:.9g} and standard deviation {std:.3g},"
        if targets.min() == targets.max():
            raise UserError(f"{found} are all equal. Change --label_column, add rows, or raise --max_samples.")
        raise UserError(f"{found} lose their digits. Rescale the column, or subtract its mean.")


def _report(source: Source, parts: dict[str, list[Row]], label_names: list[str], rule: str) -> None:
    """Prints sizes, split rule and leak; warns of a leak, and of a dataset that differs from the table."""
    spec, sizes = source.spec, {part: len(rows) for part, rows in parts.items()}
    facts = [" and ".join(f"{size:,} {part}" for part, size in sizes.items()) + " texts"]
    facts.append(f"{len(label_names)} classes" if label_names else "a regression target")
    if {"train", "test"} <= set(parts):
        if spec.sizes and sum(spec.sizes) != sum(sizes.values()):
            known = " and ".join(f"{size:,}" for size in spec.sizes)
            warn(f"{source.name} had {known} rows when tabulated; this copy or revision has {sum(sizes.values()):,}")
        known_texts = {row.text for row in parts["train"]}
        leaked = sum(row.text in known_texts for row in parts["test"]) / sizes["test"]
        facts += [rule, f"{leaked:.1%} of the test texts are also in train"]
        if leaked > LEAK_WARNING:
            warn(f"{leaked:.1%} of the test texts of {source.name} are also in train: test scores reward memory")
    print(f"{source.name}: {', '.join(facts)}")


def _sample(settings: Data, source: Source, part: str, rows: list[Row], label_names: list[str]) -> LabelledTexts:
    """The rows of one split, at most as many as the settings allow, with their fingerprint."""
    texts = [row.text for row in rows]
    labels = np.array([row.label for row in rows], dtype=np.int64 if label_names else np.float64)
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

    Train defines the classes of every split. `seed` draws the split of data that has none, and the rows of
    `max_samples` and `max_test_samples`; known datasets have fixed splits. `wanted` is "both", or the one split that
    the caller needs: "train", "test" or "all".
    """
    source = find_source(settings.dataset_name, settings.dataset_revision, run.datasets_dir)
    label = settings.label_column or source.spec.label_column
    tables = choose_parts(source, label, wanted, settings.divide_train)
    parts, regression = _labelled_rows(settings, source, tables, label)
    chosen = next((name for name, rows in source.tables.items() if rows is tables.get("test")), "test")
    rule = "own test" if chosen == "test" else f"{chosen} as test"
    if wanted == "all":
        parts = {"all": list(itertools.chain(*parts.values()))}
    elif list(parts) == ["train"]:
        parts, rule = _divide(settings, source, parts["train"], regression)
    for part, rows in parts.items():  # after the split, so that a missing row moves no other row
        empty = [not row.text for row in rows]
        remedy = "Fill or remove them, or change --text_column."
        parts[part] = _leave_out(source, part, rows, empty, "have no text", remedy, refuse=source.own)
    label_names: list[str] = []
    if not regression:
        parts, label_names = _encode(source, parts, label)
    _report(source, parts, label_names, rule)
    return {part: _sample(settings, source, part, rows, label_names) for part, rows in parts.items()}


def load_texts(settings: Data, run: Run, split: str) -> LabelledTexts:
    """The texts and labels of one split, as `load_splits` gives them."""
    return load_splits(settings, run, split)[split]


def one_hot_targets(data: LabelledTexts, rows: np.ndarray | slice = slice(None)) -> Tensor:
    """Labels y of some rows, (b, c) float64: one-hot for classes, the unchanged target for a regression."""
    labels = torch.from_numpy(np.asarray(data.labels)[rows])
    if data.is_regression:
        return labels.double()[:, None]
    return torch.nn.functional.one_hot(labels, data.num_labels).double()
